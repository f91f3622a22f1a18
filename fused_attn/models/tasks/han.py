"""Which package a docstring of Python's standard library is from (real text; it differs between Python versions).

A document is the docstring, of 15 words or more, of a module, class or function of one of seven topics. Text between
blank lines, and up to a full stop, a colon or a semicolon, is a sentence.

What would give the package away is removed: a word stays only if it is met in training documents of at least three
topics, so that no name of a module or class decides by itself; others become the one word "*". Held out are whole
top-level classes and functions with all docstrings inside (of each topic 20 % for validation and 30 % for test),
without documents that repeat one of the training documents: whose words are to 80 % the same. Words are counted in
training documents only.
"""

from __future__ import annotations

import ast
import itertools
import random
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..han import HAN
from . import TEST, TRAIN, VALIDATION, Outcome, Panel, Task

TOPICS = {
    "asyncio": ("asyncio",),
    "email": ("email",),
    "importlib": ("importlib",),
    "logging": ("logging",),
    "unittest": ("unittest",),
    "web": ("http", "urllib", "wsgiref"),
    "xml": ("xml", "xmlrpc", "html"),
}
LEAST_WORDS, MOST_WORDS, MOST_SENTENCES = 15, 24, 12  # of a document; of a sentence; of a document
TOPICS_OF_A_WORD, DOCUMENTS_OF_A_WORD = 3, 4
HELD_OUT, ALIKE = {VALIDATION: 0.2, TEST: 0.3}, 0.8
EMBED, HIDDEN, BATCH = 32, 24, 32


class Document(NamedTuple):
    """Sentences of lower-case words; its topic, and the top-level class or function that it is from."""

    sentences: list[list[str]]
    topic: int
    origin: str

    def words(self) -> set[str]:
        """All its words."""
        return {word for sentence in self.sentences for word in sentence}


@cache
def read_documents() -> tuple[Document, ...]:
    """The docstrings of all topics."""
    library, documents = Path(sysconfig.get_paths()["stdlib"]), []
    for topic, packages in enumerate(TOPICS.values()):
        files = [file for package in packages for file in sorted((library / package).rglob("*.py"))]
        for file in files:
            module = ast.parse(file.read_text(encoding="utf-8"))
            for top in (module, *module.body):
                origin = f"{file.relative_to(library)}:{getattr(top, 'name', '')}"
                for node in [module] if top is module else ast.walk(top):
                    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                        sentences = split_sentences(ast.get_docstring(node) or "")
                        if sum(map(len, sentences)) >= LEAST_WORDS:
                            documents.append(Document(sentences, topic, origin))
    return tuple(documents)


def split_sentences(text: str) -> list[list[str]]:
    """Lower-case words of each sentence, of those that have any."""
    parts = re.split(r"\n\s*\n|[.:;!?](?=\s|$)", text.lower())
    words = (re.findall(r"[a-z]+", part)[:MOST_WORDS] for part in parts)
    return [sentence for sentence in words if sentence][:MOST_SENTENCES]


def split_documents(documents: Sequence[Document], seed: int) -> dict[str, list[Document]]:
    """The documents of each split."""
    rng = random.Random(seed)
    origins: dict[int, set[str]] = defaultdict(set)
    for document in documents:
        origins[document.topic].add(document.origin)
    where: dict[str, str] = {}
    for topic in origins.values():
        shuffled = iter(rng.sample(sorted(topic), len(topic)))
        for name, share in HELD_OUT.items():
            where |= dict.fromkeys(itertools.islice(shuffled, int(share * len(topic))), name)
    parts = {
        name: [document for document in documents if where.get(document.origin, TRAIN) == name]
        for name in (TRAIN, *HELD_OUT)
    }
    known = [document.words() for document in parts[TRAIN]]

    def repeats(words: set[str]) -> bool:
        return any(len(words & other) >= ALIKE * len(words | other) for other in known)

    return parts | {name: [d for d in parts[name] if not repeats(d.words())] for name in HELD_OUT}


def find_vocabulary(train: list[Document]) -> dict[str, int]:
    """The number of each word that stays, from 1; 0 is any other."""
    topics: dict[str, set[int]] = defaultdict(set)
    counts: dict[str, int] = defaultdict(int)
    for document in train:
        for word in document.words():
            topics[word].add(document.topic)
            counts[word] += 1
    stay = (w for w in topics if len(topics[w]) >= TOPICS_OF_A_WORD and counts[w] >= DOCUMENTS_OF_A_WORD)
    return {word: i for i, word in enumerate(sorted(stay), 1)}


def make(seed: int, device: torch.device) -> Task:
    """The documents of one seed."""
    data = split_documents(read_documents(), seed)
    train = data[TRAIN]
    vocabulary = find_vocabulary(train)

    def pack(some: list[Document]) -> tuple[Tensor, Tensor, Tensor]:
        sentences = [sentence for document in some for sentence in document.sentences]
        tokens = torch.tensor([vocabulary.get(word, 0) for sentence in sentences for word in sentence])

        def offsets(lengths: list[int]) -> Tensor:
            return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(device)

        return tokens.to(device), offsets([len(s) for s in sentences]), offsets([len(d.sentences) for d in some])

    def topics(some: list[Document]) -> Tensor:
        return torch.tensor([document.topic for document in some], device=device)

    def build(arm: str) -> nn.Module:
        return HAN(
            len(vocabulary) + 1,
            len(TOPICS),
            embed_dim=EMBED,
            hidden=HIDDEN,
            attn_dim=2 * HIDDEN,
            attention=arm == "attention",
        ).to(device)

    def batches(order: torch.Generator, epoch: int) -> Iterator[list[Document]]:
        for chosen in torch.randperm(len(train), generator=order).split(BATCH):
            yield [train[i] for i in chosen]

    def loss(model: nn.Module, batch: list[Document]) -> Tensor:
        return F.cross_entropy(model(*pack(batch)), topics(batch))

    judged = {name: (pack(data[name]), topics(data[name])) for name in HELD_OUT}

    def judge(model: nn.Module, split: str) -> Outcome:
        packed, wanted = judged[split]
        return Outcome(float((model(*packed).argmax(1) == wanted).float().mean()))

    def panels(model: nn.Module) -> list[Panel]:
        shown = []
        for document in [d for d in data[TEST] if len(d.sentences) in range(3, 6)][:2]:
            logits, words, sentences = model(*pack([document]), return_weights=True)
            rows = [[w if w in vocabulary else "*" for w in sentence[:14]] for sentence in document.sentences]
            said, wanted = list(TOPICS)[int(logits.argmax())], list(TOPICS)[document.topic]
            title = f"sentences of a document of {wanted}, taken for {said}"
            shown.append(Panel(title, sentences[None], ["attention"], [" ".join(row[:3]) for row in rows]))
            best = int(sentences.argmax())
            of_best = words.split([len(s) for s in document.sentences])[best]
            tokens = [w if w in vocabulary else "*" for w in document.sentences[best]]
            shown.append(Panel("the words of the sentence with most attention", of_best[None], ["attention"], tokens))
        return shown

    return Task(build, batches, loss, judge, panels, arms=("attention", "uniform"), epochs=30)
