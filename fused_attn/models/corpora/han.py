r"""Reviews, with their number of stars, in two formats.

Zhang et al. 2015 (Yelp, Amazon, Yahoo and others): `train.csv` and `test.csv`, without a header; the first column is
the class, the others are text: "label","title","text" or "label","text". A new line in a text is the two characters
``\n``. Sentences end at . ! ? or a new line; words are in lower case, apart from punctuation.

Tang et al. 2015 (Yelp 2013 to 2015, IMDB): `yelp-2013-train.txt.ss`, `-dev` and `-test`. A line is user, product,
rating and text with two tabs between; text has ``<sssss>`` between sentences and spaces between words, which are
taken as they are. Where there are several such sets, the training file names one.

As in the paper, words that the training split has more than 5 times keep their own number, all others are one, and
without a file for validation a tenth of the training file is it, here every tenth review. Widths are the paper's (200
for words, 50 for each direction of a GRU, 100 for scores), and batches of 64 of about one length. Not the paper's:
vectors of words are learned from the start, not by word2vec, and Adam, 1e-3, is in place of SGD, whose learning rate
the paper chose by validation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..han import HAN
from ..protocol import Setting
from ..tasks import TEST, TRAIN, VALIDATION, Panel, Task
from ._classify import Answer, Part, bag_of_words, classify
from ._files import TENTH, beside, beside_if_there, choose, csv_rows, fail, fields_of, lines, whole_number
from ._packed import Packed, Words, pack, words_of

FORMATS = {"Zhang et al.": "train.csv", "Tang et al.": "*-train.txt.ss"}
ABOVE = 5
EMBED, HIDDEN, ATTN, BATCH = 200, 50, 100, 64

Review = tuple[int, int, list[list[str]]]
"""Line, class as it is in the file, sentences."""


class Documents(NamedTuple):
    """The reviews of a split."""

    words: Packed  # a row a sentence
    sentences: Packed  # a row a review: its rows of `words`
    labels: Tensor  # (R,), as in the file, then indices

    @property
    def reviews(self) -> Packed:
        """A row a review."""
        return Packed(self.words.numbers, self.words.offsets[self.sentences.offsets])

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `HAN` takes: words, where sentences end, where reviews end."""
        chosen, reviews = self.sentences.joined(rows)
        return *self.words.joined(chosen), reviews


def documents(words: Packed, ends: Tensor, labels: Tensor) -> Documents:
    """Review r has the rows ``ends[r]`` to ``ends[r + 1]``."""
    return Documents(words, Packed(torch.arange(len(words.lengths), dtype=torch.int32), ends.long()), labels)


class Corpus(NamedTuple):
    """All of the data."""

    parts: dict[str, Documents]
    words: Words
    classes: list[int]


def read_csv(path: Path) -> Iterator[Review]:
    """The reviews of a file of Zhang et al."""
    for number, fields in csv_rows(path):
        if len(fields) < 2:
            fail(path, number, f"expected a class and texts, with a comma between; got {','.join(fields)!r}")
        label = whole_number(path, number, "class", fields[0])
        parts = re.split(r"\\n|\n|(?<=[.!?])\s+", "\n".join(fields[1:]))
        yield number, label, [words for part in parts if (words := words_of(part))]


def read_ss(path: Path) -> Iterator[Review]:
    """The reviews of a file of Tang et al."""
    for number, line in lines(path):
        _, _, rating, text = fields_of(path, number, line, "\t\t", "user product rating text")
        label = whole_number(path, number, "rating", rating)
        yield number, label, [words for part in text.split("<sssss>") if (words := part.split())]


READERS: dict[str, Callable[[Path], Iterator[Review]]] = {"Zhang et al.": read_csv, "Tang et al.": read_ss}


def read_documents(path: Path, reviews: Iterator[Review], words: Words, classes: list[int] | None) -> Documents:
    """Pack the reviews of a file; with `classes` each has to be of one of them."""
    ends, labels = [0], []

    def rows() -> Iterator[list[int]]:
        for line, label, parts in reviews:
            if classes is not None and label not in classes:
                names = ", ".join(map(str, classes))
                fail(path, line, f"class: expected one that the training file has ({names}); got {label}")
            labels.append(label)
            ends.append(ends[-1] + len(parts))
            yield from map(words, parts)

    packed = pack(rows())
    if not labels:
        fail(path, None, "there are no reviews")
    return documents(packed, torch.tensor(ends), torch.tensor(labels))


def divide(whole: Documents) -> dict[str, Documents]:
    """Every tenth for validation, all others to train on."""
    rows = torch.arange(len(whole.labels))
    result = {}
    for split, some in ((VALIDATION, rows[::TENTH]), (TRAIN, rows[rows % TENTH > 0])):
        words, sentences, reviews = whole.take(some)
        result[split] = documents(Packed(words.int(), sentences.long()), reviews, whole.labels[some])
    return result


@lru_cache(1)
def read(path: Path) -> Corpus:
    """The reviews of a folder."""
    name, train = choose(path, FORMATS)
    reader, words = READERS[name], Words()
    files = {VALIDATION: train.name.replace("train.txt", "dev.txt"), TEST: train.name.replace("train.", "test.")}
    test = beside(train, files[TEST])
    dev = beside_if_there(train, files[VALIDATION]) if name == "Tang et al." else None
    whole = read_documents(train, reader(train), words, None)
    words.open = False
    parts = {TRAIN: whole} if dev else divide(whole)
    if not len(parts[TRAIN].labels):
        fail(train, None, "expected two reviews at least, one for validation; got one")
    classes = sorted(set(whole.labels.tolist()))
    for split, file in ((VALIDATION, dev), (TEST, test)):
        if file:
            parts[split] = read_documents(file, reader(file), words, classes)
    new = words.keep(torch.bincount(parts[TRAIN].words.numbers, minlength=len(words)) > ABOVE)
    parts = {
        split: Documents(x.words.renumbered(new), x.sentences, torch.searchsorted(torch.tensor(classes), x.labels))
        for split, x in parts.items()
    }
    return Corpus(parts, words, classes)


def make(path: Path, seed: int, device: torch.device) -> Task:
    """Name the class of a review."""
    parts, words, classes = read(path)
    names = words.names

    def build(arm: str) -> nn.Module:
        attention = arm == "attention"
        model = HAN(len(words), len(classes), embed_dim=EMBED, hidden=HIDDEN, attn_dim=ATTN, attention=attention)
        return model.to(device)

    def collate(split: str, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.to(device) for x in parts[split].take(rows))

    def answer(model: nn.Module, batch: tuple[Tensor, ...]) -> Answer:
        return Answer(model(*batch))

    def panels(model: nn.Module) -> list[Panel]:
        test, shown = parts[TEST], []
        for i in range(min(3, len(test.labels))):
            sentences = [[names[word] for word in test.words.row(j)] for j in test.sentences.row(i)]
            if not sentences:
                continue
            logits, of_words, of_sentences = model(*collate(TEST, torch.tensor([i])), return_weights=True)
            title = f"sentences of a review of class {classes[test.labels[i]]}, taken for {classes[logits.argmax()]}"
            starts = [" ".join(sentence[:3]) for sentence in sentences]
            shown.append(Panel(title, of_sentences[None], ["attention"], starts))
            best = int(of_sentences.argmax())
            weights = of_words.split([len(sentence) for sentence in sentences])[best]
            shown.append(Panel("the words of the one with most", weights[None], ["attention"], sentences[best]))
        return shown

    labels = {split: x.labels for split, x in parts.items()}
    texts = {split: (x.reviews,) for split, x in parts.items()}
    return classify(
        build,
        {split: Part(x.labels, x.reviews.lengths) for split, x in parts.items()},
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
