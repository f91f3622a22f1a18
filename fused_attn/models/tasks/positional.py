"""Which docstring belongs to this first line? Text of Python's standard library."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..positional import PositionalAttention
from . import TEST, TRAIN, VALIDATION, Outcome, Panel, Task
from ._stdlib import docstrings

QUESTION, ANSWER = 16, 40  # words that are kept
CHOICES, BATCH = 10, 32
SIGMA = 3.0  # words; the paper's 15 to 35 would reach across these answers
COMMON = 60  # word 0 is for unknown words, the frequent ones come next: none of these is a question word


class Pair(NamedTuple):
    """The first line of a docstring, and what follows it."""

    top: str  # the top-level module or package
    question: tuple[str, ...]
    answer: tuple[str, ...]


class Batch(NamedTuple):
    """Questions, answers as numbers, and the candidates of each question: the right one is the first."""

    question: Tensor  # (B, Tq)
    question_lengths: Tensor  # (B,)
    answers: Tensor  # (N, Ta)
    answer_lengths: Tensor  # (N,)
    candidates: Tensor  # (B, C)


def words_of(text: str) -> tuple[str, ...]:
    """Lower-case words; a name with underscores is split into its words."""
    return tuple(re.findall(r"[a-z]+", text.lower()))


@cache
def pairs() -> tuple[Pair, ...]:
    """Pairs of all docstrings with a first line of 4 words or more, and 12 or more below it; no answer twice."""
    found: dict[tuple[str, ...], Pair] = {}
    for docstring in docstrings():
        first, _, rest = docstring.text.partition("\n\n")
        question, answer = words_of(first), words_of(rest)
        if len(question) >= 4 and len(answer) >= 12:
            pair = Pair(docstring.top, question[:QUESTION], answer[:ANSWER])
            found.setdefault(pair.answer, pair)
    return tuple(found.values())


def split(seed: int) -> dict[str, list[Pair]]:
    """The pairs of each split, from different top-level modules: about a fifth each for validation and test."""
    everything = pairs()
    modules = sorted({pair.top for pair in everything})
    random.Random(seed).shuffle(modules)
    sizes = Counter(pair.top for pair in everything)
    held_out: dict[str, set[str]] = {VALIDATION: set(), TEST: set()}
    for module in modules:
        for some in held_out.values():
            if sum(sizes[m] for m in some) + sizes[module] <= len(everything) / 5:
                some.add(module)
                break
    where = {module: split for split, some in held_out.items() for module in some}
    return {split: [x for x in everything if where.get(x.top, TRAIN) == split] for split in (TRAIN, *held_out)}


def pad(texts: list[tuple[str, ...]], index: dict[str, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers of the words, padded, and lengths."""
    words = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    for row, text in zip(words, texts, strict=True):
        row[: len(text)] = torch.tensor([index.get(word, 0) for word in text])
    return words.to(device), torch.tensor([len(text) for text in texts], device=device)


def hundreds(some: list[Pair]) -> list[list[Pair]]:
    """Rings of candidates; what is left at the end has to be enough for one."""
    return [some[i : i + 100] for i in range(0, len(some) - CHOICES, 100)]


def make(seed: int, device: torch.device) -> Task:
    """Find the right one of 10 bodies. All come from modules that were not trained on."""
    data = split(seed)
    train = data[TRAIN]
    counts = Counter(word for pair in train for word in pair.question + pair.answer)
    index = {word: i for i, (word, n) in enumerate(counts.most_common(), 1) if n > 1}

    def collate(chosen: list[Pair]) -> Batch:
        """Pairs in a ring: the candidates of each are its own answer and those of the next nine."""
        ring = torch.arange(len(chosen), device=device)
        return Batch(
            *pad([x.question for x in chosen], index, device),
            *pad([x.answer for x in chosen], index, device),
            (ring[:, None] + torch.arange(CHOICES, device=device)) % len(chosen),
        )

    shuffled = {name: random.Random(seed).sample(data[name], len(data[name])) for name in (VALIDATION, TEST)}
    judged = {name: [collate(chosen) for chosen in hundreds(some)] for name, some in shuffled.items()}

    def build(arm: str) -> nn.Module:
        model = PositionalAttention(
            1 + max(index.values()),
            embed_dim=64,
            hidden_dim=32,
            attn_dim=32,
            positions=ANSWER,
            sigma=SIGMA,
            common=COMMON,
            attention=arm == "attention",
        )
        return model.to(device)

    def batches(generator: torch.Generator, epoch: int) -> Iterable[Batch]:
        for rows in torch.randperm(len(train), generator=generator).split(BATCH):
            if len(rows) >= CHOICES:
                yield collate([train[i] for i in rows.tolist()])

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        near = model(*batch)  # its softmax is the similarity's share among the candidates
        return nn.functional.cross_entropy(near, near.new_zeros(len(near), dtype=torch.int64))

    def judge(model: nn.Module, split: str) -> Outcome:
        near = torch.cat([model(*batch) for batch in judged[split]])
        return Outcome((near >= near[:, :1]).sum(1).reciprocal().mean().item())

    def tf_idf(split: str) -> float:
        """The candidate whose words are most alike, by the cosine of their TF-IDF vectors."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(analyzer=list).fit([pair.question + pair.answer for pair in train])
        ranks = []
        for some in hundreds(shuffled[split]):
            question, answer = (
                vectorizer.transform(x) for x in zip(*((p.question, p.answer) for p in some), strict=True)
            )
            near = torch.from_numpy((question @ answer.T).toarray()).to(device).gather(1, collate(some).candidates)
            ranks.append((near >= near[:, :1]).sum(1))
        return torch.cat(ranks).reciprocal().mean().item()

    def panels(model: nn.Module) -> list[Panel]:
        result = []
        for pair in [x for x in shuffled[TEST] if len(x.answer) <= 25][:3]:  # what fits the picture
            weights = model(*collate([pair])[:4], return_weights=True)[1]
            result.append(Panel(" ".join(pair.question), weights[0], ["weight"], list(pair.answer)))
        return result

    return Task(
        build, batches, loss, judge, panels, arms=("attention", "uniform"), baselines={"TF-IDF": tf_idf}, epochs=20
    )
