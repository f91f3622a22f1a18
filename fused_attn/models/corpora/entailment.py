"""SNLI 1.0 (Bowman et al. 2015): `snli_1.0_train.jsonl`, `snli_1.0_dev.jsonl` and `snli_1.0_test.jsonl`.

Each line is JSON with `gold_label`, `sentence1` (the premise) and `sentence2`. Pairs whose annotators did not agree
(label "-") are left out, as the papers do. Sentences are split into lower-case words and punctuation.

A `*.txt` or `*.vec` of vectors in the folder, a word and its numbers a line (GloVe's, or word2vec's text form), is
used as in the paper: these vectors stay as they are, those of other training words are drawn from [-0.05, 0.05] and
trained, and a linear map makes them as wide as the LSTMs. Words that neither has share one trained vector; the paper
draws one for each. Without such a file the vectors of training words are learned, which the paper does not do.

As in the paper: word by word, width 100, batches of 32, Adam. There the learning rate is one of 1e-4, 3e-4 and 1e-3,
the penalty one of four and dropout one of three, by validation; here they are 1e-3 and none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..entailment import Entailment
from ..protocol import Setting
from ..tasks import TEST, TRAIN, VALIDATION, Panel, Task
from ..tasks.entailment import LABELS
from ._classify import Answer, Part, bag_of_words, classify
from ._files import DataError, beside, choose, fail, lines
from ._packed import Packed, Words, pack, words_of

FORMATS = {"SNLI": "snli_1.0_train.jsonl"}
FILES = {TRAIN: "train", VALIDATION: "dev", TEST: "test"}
UNSURE, DELIMITER = "-", "|"
WIDTH, BATCH, SPREAD = 100, 32, 0.05
NO_VECTORS = ("snli_1.0_", "README")  # other files of the corpus


class Pairs(NamedTuple):
    """The pairs of a split; a hypothesis begins with a delimiter."""

    premises: Packed
    hypotheses: Packed
    labels: Tensor  # (R,), indices into LABELS


class Vectors(NamedTuple):
    """What a file has of the vectors of words."""

    numbers: Tensor  # int64 (K,), the words
    values: Tensor  # float32 (K, E)


class Corpus(NamedTuple):
    """All of the data."""

    parts: dict[str, Pairs]
    words: Words
    vectors: Vectors | None


def read_pairs(path: Path, words: Words) -> Pairs:
    """The pairs of a file."""
    labels: list[int] = []

    def sentences() -> Iterator[list[int]]:
        for number, line in lines(path):
            try:
                pair = json.loads(line)
                label, *texts = (pair[key] for key in ("gold_label", "sentence1", "sentence2"))
            except json.JSONDecodeError as error:
                fail(path, number, f"expected JSON: {error}")
            except (KeyError, TypeError):
                fail(path, number, "expected an object with gold_label, sentence1 and sentence2")
            if label == UNSURE:
                continue
            if label not in LABELS:
                fail(path, number, f"gold_label: expected one of {', '.join((*LABELS, UNSURE))}; got {label!r}")
            if not all(isinstance(text, str) for text in texts):
                fail(path, number, "sentence1 and sentence2: expected text")
            labels.append(LABELS.index(label))
            yield words(words_of(texts[0]))
            yield words([DELIMITER, *words_of(texts[1])])

    both = pack(sentences())
    if not labels:
        fail(path, None, "there are no pairs")
    premises, hypotheses = (torch.arange(which, 2 * len(labels), 2) for which in (0, 1))

    def part(rows: Tensor) -> Packed:
        numbers, offsets = both.joined(rows)
        return Packed(numbers.int(), offsets.long())

    return Pairs(part(premises), part(hypotheses), torch.tensor(labels))


def read_vectors(folder: Path, words: Words) -> Vectors | None:
    """Of the words that there are; None where the folder has no file of vectors."""
    found_files = sorted(file for pattern in ("*.txt", "*.vec") for file in folder.glob(pattern))
    files = [file for file in found_files if not file.name.startswith(NO_VECTORS)]
    if len(files) > 1:
        raise DataError(f"{folder}: expected one file of vectors; found {', '.join(file.name for file in files)}")
    if not files:
        return None
    found: dict[int, Tensor] = {}
    width = None
    for number, line in lines(files[0]):
        fields = line.rstrip(" ").split(" ")
        if number == 1 and len(fields) == 2:  # word2vec says first how many there are, and how wide
            continue
        width = width or len(fields) - 1
        if len(fields) <= width or width < 2:  # a word may have spaces in it
            fail(files[0], number, f"expected a word and {width} numbers; got {len(fields)} fields")
        word = words.index.get(" ".join(fields[:-width]))
        if word is None:
            continue
        try:
            found[word] = torch.tensor([float(field) for field in fields[-width:]])
        except ValueError:
            fail(files[0], number, "expected numbers after the word")
    if not found:
        fail(files[0], None, "no word of the data has a vector")
    return Vectors(torch.tensor(list(found)), torch.stack(list(found.values())))


@lru_cache(1)
def read(path: Path) -> Corpus:
    """The data of a folder."""
    _, train = choose(path, FORMATS)
    words = Words()
    parts, known = {}, 0
    for split, name in FILES.items():
        parts[split] = read_pairs(beside(train, train.name.replace("train", name)), words)
        known = known or len(words)  # those of the training split
    vectors = read_vectors(train.parent, words)
    keep = torch.arange(len(words)) < known
    if vectors is not None:  # other words are of use if they have one
        keep[vectors.numbers] = True
    new = words.keep(keep)
    parts = {
        split: Pairs(x.premises.renumbered(new), x.hypotheses.renumbered(new), x.labels) for split, x in parts.items()
    }
    return Corpus(parts, words, vectors and Vectors(new[vectors.numbers].long(), vectors.values))


class GivenVectors(nn.Embedding):
    """Vectors of words, some of which are given and stay as they are, and a map that makes them `width` wide."""

    def __init__(self, count: int, given: Vectors, width: int) -> None:
        size = given.values.shape[1]
        super().__init__(count - len(given.numbers), size)
        nn.init.uniform_(self.weight, -SPREAD, SPREAD)
        self.project = nn.Linear(size, width)
        is_given = torch.zeros(count, dtype=torch.bool)
        is_given[given.numbers] = True
        place = (~is_given).cumsum(0) - 1
        place[given.numbers] = torch.arange(len(given.numbers))
        # They are part of no state: what is the best epoch's is copied often, and these are many.
        for name, x in (("given", given.values), ("is_given", is_given), ("place", place)):
            self.register_buffer(name, x, persistent=False)

    given: Tensor
    is_given: Tensor
    place: Tensor

    def forward(self, words: Tensor) -> Tensor:
        """``(..., width)``."""
        is_given, place = self.is_given[words], self.place[words]
        trained = F.embedding(place.masked_fill(is_given, 0), self.weight)
        given = F.embedding(place.masked_fill(~is_given, 0), self.given)
        return self.project(torch.where(is_given[..., None], given, trained))


def make(path: Path, seed: int, device: torch.device) -> Task:
    """Name the relation of the two sentences, one of three."""
    parts, words, vectors = read(path)
    names = words.names

    def build(arm: str) -> nn.Module:
        model = Entailment(len(words), len(LABELS), embed_dim=WIDTH, hidden=WIDTH, attention=arm == "attention")
        if vectors is not None:
            model.embedding = GivenVectors(len(words), vectors, WIDTH)
        return model.to(device)

    def collate(split: str, rows: Tensor) -> tuple[Tensor, ...]:
        premises, hypotheses, _ = parts[split]
        return tuple(x.to(device) for x in (*premises.padded(rows), *hypotheses.padded(rows)))

    def answer(model: nn.Module, batch: tuple[Tensor, ...]) -> Answer:
        return Answer(model(*batch))

    def panels(model: nn.Module) -> list[Panel]:
        shown = []
        premises, hypotheses, labels = parts[TEST]
        for i in range(min(3, len(labels))):
            logits, weights = model(*collate(TEST, torch.tensor([i])), return_weights=True)
            title = f"{LABELS[labels[i]]}, taken for {LABELS[int(logits.argmax())]}"
            rows, columns = ([names[word] for word in text.row(i)] for text in (hypotheses, premises))
            if columns:
                shown.append(Panel(title, weights[0], rows, columns))
        return shown

    texts = {split: (x.premises, x.hypotheses) for split, x in parts.items()}
    labels = {split: x.labels for split, x in parts.items()}
    return classify(
        build,
        {split: Part(x.labels, x.premises.lengths + x.hypotheses.lengths) for split, x in parts.items()},
        collate,
        answer,
        panels,
        batch=BATCH,
        device=device,
        arms=("attention", "uniform"),
        baselines={"bag of words": bag_of_words(texts, len(words), labels)},
        setting=Setting(1e-3, 0.0),
        epochs=30,
    )
