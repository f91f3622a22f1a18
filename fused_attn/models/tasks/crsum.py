"""Which sentences of a module's documentation are central to it? Docstrings of Python's standard library."""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..crsum import CRSum
from . import TEST, TRAIN, VALIDATION, Outcome, Panel, Task
from ._stdlib import docstrings

WORDS, SENTENCES, BATCH = 30, 25, 8
VECTORS = 20_000
COMMON = 60  # the most frequent words count for nothing


class Document(NamedTuple):
    """A run of sentences from one module's docstrings, and how central each is, see `centrality`."""

    top: str
    module: str
    sentences: tuple[tuple[str, ...], ...]
    importance: tuple[float, ...]


class Batch(NamedTuple):
    """Documents as numbers; index 0 is for padding and unknown words."""

    words: Tensor  # (B, S, W)
    word_lengths: Tensor  # (B, S)
    lengths: Tensor  # (B,)
    importance: Tensor  # (B, S)


def index_of(word: str) -> int:
    """Which vector a word has: words of held-out modules were mostly not trained on, and yet are to be told apart."""
    return zlib.crc32(word.encode()) % VECTORS


def is_prose(paragraph: str) -> bool:
    """Whether it is text rather than a heading, an example or a rule of the grammar."""
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    return paragraph.rstrip().endswith((".", ":")) and letters > 0.85 * len(paragraph) and ">>>" not in paragraph


def sentences_of(paragraph: str) -> list[tuple[str, ...]]:
    """Lower-case words of the sentences of at least four words."""
    parts = re.split(r"(?<=[.!?:])\s+", paragraph)
    found = (tuple(re.findall(r"[a-z_]+", part.lower())) for part in parts)
    return [words[:WORDS] for words in found if len(words) >= 4]


def centrality(sentences: list[tuple[str, ...]], common: set[str]) -> tuple[float, ...]:
    """How much each sentence has in common with the others: the mean over its words of the share that has the word.

    Common words are left out; a sentence of nothing else has 0.
    """
    others = max(len(sentences) - 1, 1)
    within = Counter(word for words in sentences for word in set(words))  # in how many sentences
    result = []
    for sentence in sentences:
        words = [word for word in sentence if word not in common]
        result.append(sum((within[word] - 1) / others for word in words) / max(len(words), 1))
    return tuple(result)


@cache
def documents() -> tuple[Document, ...]:
    """The prose in the docstrings of every module, cut after 25 sentences each; less than eight are left out."""
    seen: set[tuple[str, ...]] = set()  # much is said more than once
    texts: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for docstring in docstrings():
        text = texts.setdefault((docstring.top, docstring.module), [])
        for paragraph in docstring.text.split("\n\n"):
            for words in sentences_of(paragraph) if is_prose(paragraph) else []:
                if words not in seen:
                    seen.add(words)
                    text.append(words)
    counts = Counter(word for text in texts.values() for words in text for word in words)
    common = {word for word, _ in counts.most_common(COMMON)}
    result = []
    for (top, module), text in texts.items():
        for start in range(0, len(text), SENTENCES):
            run = text[start : start + SENTENCES]
            if len(run) >= 8:
                result.append(Document(top, module, tuple(run), centrality(run, common)))
    return tuple(result)


def split(seed: int) -> dict[str, list[Document]]:
    """The documents of each split, of different top-level modules (20 % for validation, 25 % for test)."""
    tops = sorted({x.top for x in documents()})
    chosen = random.Random(seed).sample(tops, len(tops) // 4 + len(tops) // 5)
    where = {top: TEST if i < len(tops) // 4 else VALIDATION for i, top in enumerate(chosen)}
    return {name: [x for x in documents() if where.get(x.top, TRAIN) == name] for name in (TRAIN, VALIDATION, TEST)}


def ranks(x: Tensor) -> Tensor:
    """Ranks from 0; equal numbers share the mean of theirs."""
    return ((x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1) - 1) / 2


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's; 0 where all are alike."""
    pair = torch.stack([ranks(a), ranks(b)]).double()
    return float(torch.nan_to_num(torch.corrcoef(pair)[0, 1]))


def make(seed: int, device: torch.device) -> Task:
    """Regress on the centrality; judged by the rank correlation inside each document."""
    data = split(seed)
    train = data[TRAIN]

    def collate(chosen: list[Document]) -> Batch:
        shape = len(chosen), max(len(x.sentences) for x in chosen)
        words, importance = torch.zeros(*shape, WORDS, dtype=torch.int64), torch.zeros(shape)
        word_lengths = torch.zeros(shape, dtype=torch.int64)
        for b, x in enumerate(chosen):
            importance[b, : len(x.importance)] = torch.tensor(x.importance)
            for t, sentence in enumerate(x.sentences):
                words[b, t, : len(sentence)] = torch.tensor([index_of(word) for word in sentence])
                word_lengths[b, t] = len(sentence)
        lengths = torch.tensor([len(x.sentences) for x in chosen])
        return Batch(*(x.to(device) for x in (words, word_lengths, lengths, importance)))

    judged = {name: collate(data[name]) for name in (VALIDATION, TEST)}

    def build(arm: str) -> nn.Module:
        model = CRSum(
            VECTORS, embed_dim=64, hidden_dim=64, attn_dim=32, window=5, mlp_dim=32, attention=arm == "attention"
        )
        model.embed.requires_grad_(False)
        return model.to(device)

    def batches(generator: torch.Generator, epoch: int) -> Iterable[Batch]:
        for rows in torch.randperm(len(train), generator=generator).split(BATCH):
            yield collate([train[i] for i in rows.tolist()])

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        error = 10 * (model(*batch[:3]) - batch.importance)  # they are about 0.1
        return error.square().sum() / batch.lengths.sum()

    def judge(model: nn.Module, split: str) -> Outcome:
        batch = judged[split]
        scores = model(*batch[:3])
        each = [
            rank_correlation(row[:n], wanted[:n])
            for row, wanted, n in zip(scores, batch.importance, batch.lengths.tolist(), strict=True)
        ]
        return Outcome(sum(each) / len(each))

    def panels(model: nn.Module) -> list[Panel]:
        result = []
        for x in data[TEST][:2]:
            _, word_weights, weights = model(*collate([x])[:3], return_weights=True)
            middle, words = len(x.sentences) // 2, [" ".join(sentence) for sentence in x.sentences]
            near = [t for t in range(middle - 5, middle + 6) if 0 <= t < len(words) and t != middle]
            title = f"{x.module}, around: {words[middle]}"[:90]
            names = [f"{t - middle:+d} {words[t][:24]}" for t in near]
            result.append(Panel(title, weights[0, :, middle, near], ["before", "after"], names))
            sentence = list(x.sentences[middle])
            result.append(
                Panel("and its words", word_weights[0, middle, None, : len(sentence)], ["weight"], sentence)
            )
        return result

    return Task(build, batches, loss, judge, panels, arms=("attention", "uniform"), epochs=20)
