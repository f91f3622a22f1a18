"""What is the important sentence of a document about? Real text, put together to documents.

A sentence is a paragraph, or its first 40 words, from a docstring of scipy, numpy or matplotlib (as they are
installed: the text differs between versions) about statistics, signals, optimisation, linear algebra or plots. A
document has 4 to 7 sentences of any of these topics, one of which begins with "important": its topic is the label. So
the words alone do not tell, it matters in which sentence they are, and of that sentence it is a few words that tell.

Names of packages are removed, and words that training sentences have less than four times are the one word "*". Held
out are whole files: of each topic 15 % for validation and 25 % for test.

Both levels have a GRU, and a GRU can itself keep nothing of a sentence that does not begin with the mark. So uniform
weights may well do as well here; what attention adds is that it says what was read.

The truth of both levels is the important sentence: its weight among the sentences. Which of its words should have
weight is not known.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
import re
from collections import Counter
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

TOPICS = {  # and the folders of their files
    "statistics": ("scipy/stats",),
    "signals": ("scipy/signal",),
    "optimisation": ("scipy/optimize",),
    "linear algebra": ("scipy/linalg", "numpy/linalg"),
    "plots": ("matplotlib",),
}
NAMES = {"scipy", "numpy", "np", "matplotlib", "mpl", "plt", "pyplot"}
FILES = 120  # of each topic, which are read in a few seconds
WORDS, SENTENCES = (16, 40), (4, 7)  # of a sentence; of a document
COUNT_OF_A_WORD = 4
SHARES = {TRAIN: 0.6, VALIDATION: 0.15, TEST: 0.25}  # of the files
DOCUMENTS = {TRAIN: 1000, VALIDATION: 600, TEST: 1500}
MARK = "important"
EMBED, HIDDEN, BATCH = 32, 24, 50

Sentence = tuple[str, ...]


class Document(NamedTuple):
    """Sentences of lower-case words, which of them begins with the mark, and the topic of that one."""

    sentences: list[Sentence]
    marked: int
    topic: int


class Batch(NamedTuple):
    """Ragged documents."""

    words: Tensor  # (N,)
    sentences: Tensor  # (S + 1,)
    documents: Tensor  # (G + 1,)
    topics: Tensor  # (G,)
    marked: Tensor  # bool (S,)


def python_files(topic: str) -> list[Path]:
    """Files of a topic, always the same ones of one version."""
    files = []
    for place in TOPICS[topic]:
        package, *folders = place.split("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{package} is not installed: pip install 'fused_attn[demo]'")
        files += sorted(Path(spec.origin).parent.joinpath(*folders).glob("**/*.py"))
    files = [file for file in files if "tests" not in file.parts]
    return random.Random(0).sample(files, min(FILES, len(files)))


def sentences_of(source: bytes) -> Iterator[Sentence]:
    """The first words of every paragraph of the docstrings that is no example and long enough to tell a topic."""
    for docstring in docstrings_in("", "", source):
        for paragraph in re.split(r"\n\s*\n", docstring.text.lower()):
            words = tuple(re.findall(r"[a-z]+", paragraph))[: WORDS[1]]
            if len(words) >= WORDS[0] and ">>>" not in paragraph:
                yield words


@cache
def read_files() -> tuple[tuple[tuple[Sentence, ...], ...], ...]:
    """By topic and file, sentences that no file before had."""
    seen: set[Sentence] = set()
    topics = []
    for topic in TOPICS:
        files = []
        for file in python_files(topic):
            new = dict.fromkeys(words for words in sentences_of(file.read_bytes()) if words not in seen)
            seen |= new.keys()
            files.append(tuple(new))
        topics.append(tuple(file for file in files if file))
    return tuple(topics)


def split_sentences(seed: int) -> dict[str, list[list[Sentence]]]:
    """By split and topic, the sentences of its files."""
    rng = random.Random(seed)
    result: dict[str, list[list[Sentence]]] = {split: [] for split in SHARES}
    for files in read_files():
        shuffled = rng.sample(files, len(files))
        ends = [0, *(round(x * len(files)) for x in itertools.accumulate(SHARES.values()))]
        for (start, end), sentences in zip(itertools.pairwise(ends), result.values(), strict=True):
            sentences.append([sentence for file in shuffled[start:end] for sentence in file])
    return result


def draw_document(topics: list[list[Sentence]], label: int, rng: random.Random) -> Document:
    """Of sentences of any topic, one of which is marked."""
    sentences = [rng.choice(rng.choice(topics)) for _ in range(rng.randint(*SENTENCES))]
    marked = rng.randrange(len(sentences))
    sentences[marked] = (MARK, *rng.choice(topics[label]))
    return Document(sentences, marked, label)


def find_vocabulary(topics: list[list[Sentence]]) -> dict[str, int]:
    """The number of each word that stays, from 1; 0 is any other."""
    count = Counter(word for some in topics for sentence in some for word in sentence)
    stay = {word for word, n in count.items() if n >= COUNT_OF_A_WORD} - NAMES
    return {word: i for i, word in enumerate(sorted({*stay, MARK}), 1)}


def make(seed: int, device: torch.device) -> Task:
    """The documents of one seed."""
    rng = random.Random(seed)
    sentences = split_sentences(seed)
    vocabulary = find_vocabulary(sentences[TRAIN])

    def known(sentence: Sentence) -> Sentence:
        """With * for words that are not in the vocabulary, and for a mark that is part of the text."""
        return tuple(word if word in vocabulary and word != MARK else "*" for word in sentence)

    topics = {split: [[known(sentence) for sentence in some] for some in parts] for split, parts in sentences.items()}
    data = {
        split: [draw_document(topics[split], i % len(TOPICS), rng) for i in range(count)]
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
            torch.tensor([document.topic for document in some]),
            torch.tensor([i == document.marked for document in some for i in range(len(document.sentences))]),
        )
        return Batch(*(x.to(device) for x in batch))

    judged = {split: pack(data[split]) for split in (VALIDATION, TEST)}

    def build(arm: str) -> nn.Module:
        words, width = len(vocabulary) + 1, 2 * HIDDEN
        model = HAN(words, len(TOPICS), embed_dim=EMBED, hidden=HIDDEN, attn_dim=width, attention=arm == "attention")
        return model.to(device)

    def batches(order: torch.Generator, epoch: int) -> Iterator[Batch]:
        drawn = random.Random(int(torch.randint(2**31, (), generator=order)))  # other documents in each epoch
        for _ in range(DOCUMENTS[TRAIN] // BATCH):
            labels = drawn.choices(range(len(TOPICS)), k=BATCH)
            yield pack([draw_document(topics[TRAIN], label, drawn) for label in labels])

    def forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, weights of the words and of the sentences."""
        truth = batch.marked.repeat_interleave(batch.sentences.diff())
        with on_truth(model, model.get_submodule("pooling"), truth):
            result: tuple[Tensor, Tensor, Tensor] = model(*batch[:3], return_weights=True)
        return result

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(forward(model, batch)[0], batch.topics)

    def judge(model: nn.Module, split: str) -> Outcome:
        batch = judged[split]
        logits, _, of_sentences = forward(model, batch)
        located = of_sentences[batch.marked].mean().item()  # each document has one
        return Outcome((logits.argmax(1) == batch.topics).float().mean().item(), {"sentences": located})

    def panels(model: nn.Module) -> list[Panel]:
        shown = []
        for document in [d for d in data[TEST] if len(d.sentences) <= 6][:2]:
            batch = pack([document])
            logits, of_words, of_sentences = forward(model, batch)
            said, wanted = (list(TOPICS)[i] for i in (int(logits.argmax()), document.topic))
            title = f"sentences of a document, the marked one of {wanted}, taken for {said}"
            names = [" ".join(sentence[:3]) for sentence in document.sentences]
            shown.append(Panel(title, of_sentences[None], ["attention"], names, batch.marked[None]))
            each = of_words.split([len(sentence) for sentence in document.sentences])
            words = list(document.sentences[document.marked])
            shown.append(Panel("the words of the marked sentence", each[document.marked][None], ["attention"], words))
        return shown

    topic = attrgetter("topic")
    baselines = {
        "bag of words": bag_of_words(data, lambda x: itertools.chain.from_iterable(x.sentences), topic),
        "bag of words, marked sentence": bag_of_words(data, lambda x: x.sentences[x.marked], topic),
    }
    return Task(build, batches, loss, judge, panels, baselines=baselines, epochs=40)
