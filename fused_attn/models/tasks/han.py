"""Which package is the important sentence of a document from? Real text, put together to documents.

A sentence is a paragraph, or its first 32 words, from a docstring of numpy, scipy, scikit-learn, matplotlib or the
standard library (as they are installed: the text differs between versions). A document has 5 to 10 sentences of any
of them, one of which begins with "important": its package is the label. So the words alone do not tell, it matters
in which sentence they are, and of that sentence it is a few words that tell.

What would give the package away is removed: a word stays only if training sentences of at least three packages have
it, others become the one word "*". Held out are whole files: of each package 15 % for validation and 25 % for test.

The truth of both levels is the important sentence: its weight among the sentences. Which of its words should have
weight is not known.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._arms import on_truth
from ..han import HAN
from . import TEST, TRAIN, VALIDATION, Outcome, Panel, Task
from ._baselines import bag_of_words
from ._stdlib import docstrings_in

PACKAGES = ("numpy", "scipy", "sklearn", "matplotlib", "python")
FILES = 80  # of each package, which are read in a few seconds
WORDS, SENTENCES = (12, 32), (5, 10)  # of a sentence; of a document
PACKAGES_OF_A_WORD, COUNT_OF_A_WORD = 3, 6
SHARES = {TRAIN: 0.6, VALIDATION: 0.15, TEST: 0.25}  # of the files
DOCUMENTS = {TRAIN: 3000, VALIDATION: 600, TEST: 1500}
MARK = "important"
EMBED, HIDDEN, BATCH = 32, 24, 50

Sentence = tuple[str, ...]


class Document(NamedTuple):
    """Sentences of lower-case words, which of them begins with the mark, and the package of that one."""

    sentences: list[Sentence]
    marked: int
    package: int


class Batch(NamedTuple):
    """Ragged documents."""

    words: Tensor  # (N,)
    sentences: Tensor  # (S + 1,)
    documents: Tensor  # (G + 1,)
    packages: Tensor  # (G,)
    marked: Tensor  # bool (S,)


def python_files(package: str) -> list[Path]:
    """Files of a package, always the same ones of one version."""
    if package == "python":
        folder, tops = Path(sysconfig.get_paths()["stdlib"]), "*.py"
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{package} is not installed: pip install 'fused_attn[demo]'")
        folder, tops = Path(spec.origin).parent, "**/*.py"
    files = sorted(file for file in folder.glob(tops) if "tests" not in file.parts)
    return random.Random(0).sample(files, min(FILES, len(files)))


def sentences_of(source: bytes) -> Iterator[Sentence]:
    """The first words of every paragraph of the docstrings that is no example and long enough to tell a package."""
    for docstring in docstrings_in("", "", source):
        for paragraph in re.split(r"\n\s*\n", docstring.text.lower()):
            words = tuple(re.findall(r"[a-z]+", paragraph))[: WORDS[1]]
            if len(words) >= WORDS[0] and ">>>" not in paragraph:
                yield words


@cache
def read_files() -> tuple[tuple[tuple[Sentence, ...], ...], ...]:
    """By package and file, sentences that no file before had."""
    seen: set[Sentence] = set()
    packages = []
    for package in PACKAGES:
        files = []
        for file in python_files(package):
            new = dict.fromkeys(words for words in sentences_of(file.read_bytes()) if words not in seen)
            seen |= new.keys()
            files.append(tuple(new))
        packages.append(tuple(file for file in files if file))
    return tuple(packages)


def split_sentences(seed: int) -> dict[str, list[list[Sentence]]]:
    """By split and package, the sentences of its files."""
    rng = random.Random(seed)
    result: dict[str, list[list[Sentence]]] = {split: [] for split in SHARES}
    for files in read_files():
        shuffled = rng.sample(files, len(files))
        ends = [0, *(round(x * len(files)) for x in itertools.accumulate(SHARES.values()))]
        for (start, end), sentences in zip(itertools.pairwise(ends), result.values(), strict=True):
            sentences.append([sentence for file in shuffled[start:end] for sentence in file])
    return result


def draw_document(packages: list[list[Sentence]], label: int, rng: random.Random) -> Document:
    """Of sentences of any package, one of which is marked."""
    sentences = [rng.choice(rng.choice(packages)) for _ in range(rng.randint(*SENTENCES))]
    marked = rng.randrange(len(sentences))
    sentences[marked] = (MARK, *rng.choice(packages[label]))
    return Document(sentences, marked, label)


def find_vocabulary(packages: list[list[Sentence]]) -> dict[str, int]:
    """The number of each word that stays, from 1; 0 is any other."""
    where: dict[str, set[int]] = defaultdict(set)
    count: Counter[str] = Counter()
    for package, sentences in enumerate(packages):
        for word in itertools.chain.from_iterable(sentences):
            where[word].add(package)
            count[word] += 1
    stay = {w for w in where if len(where[w]) >= PACKAGES_OF_A_WORD and count[w] >= COUNT_OF_A_WORD} - {MARK}
    return {word: i for i, word in enumerate(sorted({*stay, MARK}), 1)}


def make(seed: int, device: torch.device) -> Task:
    """The documents of one seed."""
    rng = random.Random(seed)
    sentences = split_sentences(seed)
    vocabulary = find_vocabulary(sentences[TRAIN])

    def known(sentence: Sentence) -> Sentence:
        """With * for words that are not in the vocabulary, and for a mark that is part of the text."""
        return tuple(word if word in vocabulary and word != MARK else "*" for word in sentence)

    packages = {
        split: [[known(sentence) for sentence in some] for some in parts] for split, parts in sentences.items()
    }
    data = {
        split: [draw_document(packages[split], i % len(PACKAGES), rng) for i in range(count)]
        for split, count in DOCUMENTS.items()
    }

    def pack(some: list[Document]) -> Batch:
        parts = [sentence for document in some for sentence in document.sentences]

        def offsets(lengths: list[int]) -> Tensor:
            return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()

        batch = Batch(
            torch.tensor([vocabulary.get(word, 0) for sentence in parts for word in sentence]),
            offsets([len(sentence) for sentence in parts]),
            offsets([len(document.sentences) for document in some]),
            torch.tensor([document.package for document in some]),
            torch.tensor([i == document.marked for document in some for i in range(len(document.sentences))]),
        )
        return Batch(*(x.to(device) for x in batch))

    judged = {split: pack(data[split]) for split in (VALIDATION, TEST)}

    def build(arm: str) -> nn.Module:
        words, width = len(vocabulary) + 1, 2 * HIDDEN
        model = HAN(
            words, len(PACKAGES), embed_dim=EMBED, hidden=HIDDEN, attn_dim=width, attention=arm == "attention"
        )
        return model.to(device)

    def batches(order: torch.Generator, epoch: int) -> Iterator[Batch]:
        drawn = random.Random(int(torch.randint(2**31, (), generator=order)))  # other documents in each epoch
        for _ in range(DOCUMENTS[TRAIN] // BATCH):
            labels = drawn.choices(range(len(PACKAGES)), k=BATCH)
            yield pack([draw_document(packages[TRAIN], label, drawn) for label in labels])

    def forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, weights of the words and of the sentences."""
        truth = batch.marked.repeat_interleave(batch.sentences.diff())
        with on_truth(model, model.get_submodule("pooling"), truth):
            result: tuple[Tensor, Tensor, Tensor] = model(*batch[:3], return_weights=True)
        return result

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(forward(model, batch)[0], batch.packages)

    def judge(model: nn.Module, split: str) -> Outcome:
        batch = judged[split]
        logits, _, of_sentences = forward(model, batch)
        located = of_sentences[batch.marked].mean().item()  # each document has one
        return Outcome((logits.argmax(1) == batch.packages).float().mean().item(), {"sentences": located})

    def panels(model: nn.Module) -> list[Panel]:
        shown = []
        for document in [d for d in data[TEST] if len(d.sentences) <= 6][:2]:
            batch = pack([document])
            logits, of_words, of_sentences = forward(model, batch)
            said, wanted = PACKAGES[int(logits.argmax())], PACKAGES[document.package]
            title = f"sentences of a document, the marked one of {wanted}, taken for {said}"
            names = [" ".join(sentence[:3]) for sentence in document.sentences]
            shown.append(Panel(title, of_sentences[None], ["attention"], names, batch.marked[None]))
            each = of_words.split([len(sentence) for sentence in document.sentences])
            words = list(document.sentences[document.marked])
            shown.append(Panel("the words of the marked sentence", each[document.marked][None], ["attention"], words))
        return shown

    package = attrgetter("package")
    baselines = {
        "bag of words": bag_of_words(data, lambda x: itertools.chain.from_iterable(x.sentences), package),
        "bag of words, marked sentence": bag_of_words(data, lambda x: x.sentences[x.marked], package),
    }
    return Task(build, batches, loss, judge, panels, baselines=baselines, epochs=30)
