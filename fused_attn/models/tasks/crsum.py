"""Which sentences of a conversation does the one who said them take up again? Sentences of Python's documentation.

A conversation has three parts. In each, Anna and Ben say two sentences each, from docstrings of the standard library
and in any order, and then each sums up in words of one own sentence and of one of the other's, the two that are left
being summed up by the other. A sentence is as important as the share of its words that its speaker takes up, or 0
where the other does. So all sentences are taken up alike, and it matters by whom. In the first epochs one takes up
little of the other.

Chosen are the six sentences with the best scores. Judged is their ROUGE-2 against the six most important ones; the
rank correlation with the importance stands beside it. Modules are split, and each conversation is of sentences of
its own split.
"""

from __future__ import annotations

import random
import re
import statistics
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .._arms import on_truth
from ..crsum import CRSum
from . import TEST, TRAIN, VALIDATION, Outcome, Panel, Task
from ._stdlib import docstrings

WORDS, BATCH = (6, 12), 10  # of a sentence
SPEAKERS, PARTS, WINDOW = ("anna", "ben"), 3, 5
BODY, SIZE = 4, 6  # sentences of a part before it is summed up, and in all
TAKEN = (0.5, 0.9)  # of the words of a sentence
GROWTH = 10  # epochs in which training texts come to take up as much from the other
TEXTS = {TRAIN: 1600, VALIDATION: 100, TEST: 300}
VECTORS, DIM = 20_000, 64
COMMON = 60  # the most frequent words are not taken up

Sentence = tuple[str, ...]


class Document(NamedTuple):
    """A conversation, how important each sentence is, and where its speaker sums up."""

    sentences: list[Sentence]
    importance: list[float]
    summaries: list[int]  # of each sentence; itself for those that sum up


class Batch(NamedTuple):
    """Documents as numbers; index 0 is for padding and unknown words."""

    words: Tensor  # (B, S, W)
    word_lengths: Tensor  # (B, S)
    lengths: Tensor  # (B,)
    importance: Tensor  # (B, S)
    truth: Tensor  # bool (B, S, S): the summary of each sentence's speaker; all for the summaries themselves


def index_of(word: str) -> int:
    """Which vector a word has: words of held-out modules were mostly not trained on, and yet are to be told apart."""
    return zlib.crc32(word.encode()) % VECTORS


def is_prose(paragraph: str) -> bool:
    """Whether it is text rather than a heading, an example or a rule of the grammar."""
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    return paragraph.rstrip().endswith((".", ":")) and letters > 0.85 * len(paragraph) and ">>>" not in paragraph


def sentences_of(paragraph: str) -> list[Sentence]:
    """Lower-case words of the sentences that are long enough."""
    parts = re.split(r"(?<=[.!?:])\s+", paragraph)
    found = (tuple(re.findall(r"[a-z_]+", part.lower())) for part in parts)
    return [words[: WORDS[1]] for words in found if len(words) >= WORDS[0]]


@cache
def sentences() -> dict[str, list[Sentence]]:
    """The prose in the docstrings of each top-level module; no sentence twice."""
    seen: set[Sentence] = set()
    result: dict[str, list[Sentence]] = {}
    for docstring in docstrings():
        some = result.setdefault(docstring.top, [])
        for paragraph in docstring.text.split("\n\n"):
            for words in sentences_of(paragraph) if is_prose(paragraph) else []:
                if words not in seen:
                    seen.add(words)
                    some.append(words)
    return {top: some for top, some in result.items() if some}


def split(seed: int) -> dict[str, list[Sentence]]:
    """The sentences of each split, of different top-level modules (20 % for validation, 25 % for test)."""
    tops = sorted(sentences())
    chosen = random.Random(seed).sample(tops, len(tops) // 4 + len(tops) // 5)
    where = {top: TEST if i < len(tops) // 4 else VALIDATION for i, top in enumerate(chosen)}
    result: dict[str, list[Sentence]] = {TRAIN: [], VALIDATION: [], TEST: []}
    for top in tops:
        result[where.get(top, TRAIN)] += sentences()[top]
    return result


def draw_text(pool: list[Sentence], common: set[str], rng: random.Random, other: float = 1.0) -> Document:
    """A conversation in sentences of `pool`; words of `common` are not taken up.

    other: how much is taken up from the other speaker, beside what is from oneself.
    """
    text = Document([], [], [])
    for _ in range(PARTS):
        body, order = rng.sample(pool, BODY), rng.sample([0, 1], 2)
        roles = rng.sample([(0, 0), (0, 1), (1, 0), (1, 1)], BODY)  # who says it, and who takes it up
        sums: list[list[str]] = [[], []]
        important = []
        for (speaker, by), words in zip(roles, body, strict=True):
            parts = sorted({*words} - common)
            count = round((1.0 if by == speaker else other) * rng.uniform(*TAKEN) * len(parts))
            sums[by] += rng.sample(parts, count)
            important.append(count / max(len(parts), 1) * (by == speaker))
        start = len(text.sentences)
        text.sentences.extend((SPEAKERS[who], *words) for (who, _), words in zip(roles, body, strict=True))
        text.sentences.extend((SPEAKERS[who], *rng.sample(sums[who], len(sums[who]))) for who in order)
        text.importance.extend([*important, 0.0, 0.0])
        places = [start + BODY + order.index(who) for who, _ in roles]
        text.summaries.extend([*places, start + BODY, start + BODY + 1])
    return text


def best(scores: Sequence[float]) -> list[int]:
    """The sentences with the best scores, two of each part on average, in their order."""
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[: 2 * PARTS])


def rouge(chosen: Iterable[Iterable[int]], texts: Iterable[Document]) -> float:
    """The mean F of ROUGE-2 of the chosen sentences against the most important ones."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge2"])

    def join(text: Document, which: Iterable[int]) -> str:
        return " ".join(word for i in which for word in text.sentences[i])

    return statistics.fmean(
        scorer.score(join(text, best(text.importance)), join(text, which))["rouge2"].fmeasure
        for which, text in zip(chosen, texts, strict=True)
    )


def rank_correlation(scores: Iterable[Iterable[float]], texts: Iterable[Document]) -> float:
    """The mean of Spearman's correlation of scores and importance, 0 where all scores are alike."""
    from scipy.stats import rankdata

    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, which is 0 here
        each = [
            np.nan_to_num(np.corrcoef(rankdata(list(row)), rankdata(text.importance))[0, 1])
            for row, text in zip(scores, texts, strict=True)
        ]
    return float(np.mean(each))


def make(seed: int, device: torch.device) -> Task:
    """The texts of one seed."""
    pools = split(seed)
    counts = Counter(word for words in pools[TRAIN] for word in words)
    common = {word for word, _ in counts.most_common(COMMON)}
    rng = random.Random(seed)
    data = {name: [draw_text(pools[name], common, rng) for _ in range(count)] for name, count in TEXTS.items()}

    def collate(chosen: list[Document]) -> Batch:
        shape = len(chosen), max(len(x.sentences) for x in chosen)
        longest = max(len(words) for x in chosen for words in x.sentences)
        words, word_lengths = np.zeros((*shape, longest), np.int64), np.zeros(shape, np.int64)
        importance, truth = np.zeros(shape, np.float32), np.ones((*shape, shape[1]), np.bool_)
        for b, x in enumerate(chosen):
            importance[b, : len(x.importance)] = x.importance
            for t, sentence in enumerate(x.sentences):
                words[b, t, : len(sentence)] = [index_of(word) for word in sentence]
                word_lengths[b, t] = len(sentence)
                if x.summaries[t] != t:
                    truth[b, t] = np.arange(shape[1]) == x.summaries[t]
        lengths = np.array([len(x.sentences) for x in chosen])
        arrays = words, word_lengths, lengths, importance, truth
        return Batch(*(torch.from_numpy(x).to(device) for x in arrays))

    judged = {name: collate(data[name]) for name in (VALIDATION, TEST)}

    def build(arm: str) -> nn.Module:
        model = CRSum(
            VECTORS,
            embed_dim=DIM,
            hidden_dim=DIM,
            attn_dim=32,
            score="general",
            window=WINDOW,
            mlp_dim=32,
            attention=arm == "attention",
        )
        model.embed.requires_grad_(False)
        return model.to(device)

    def batches(order: torch.Generator, epoch: int) -> Iterable[Batch]:
        drawn = random.Random(int(torch.randint(2**31, (), generator=order)))  # other texts in each epoch
        other = min(1.0, epoch / GROWTH)
        for _ in range(TEXTS[TRAIN] // BATCH):
            yield collate([draw_text(pools[TRAIN], common, drawn, other) for _ in range(BATCH)])

    def forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Scores ``(B, S)``, weights of the words, and of the sentences on both sides ``(B, 2, S, S)``."""
        with on_truth(model, model.get_submodule("attend.1"), batch.truth):
            result: tuple[Tensor, Tensor, Tensor] = model(*batch[:3], return_weights=True)
        return result

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return (forward(model, batch)[0] - batch.importance).square().mean()

    def judge(model: nn.Module, split: str) -> Outcome:
        batch = judged[split]
        scores, _, weights = forward(model, batch)
        told = ~batch.truth.all(-1)
        located = (weights[:, 1] * batch.truth).sum(-1)[told].mean().item()
        chosen = [best(row) for row in scores.tolist()]
        also = {"rank correlation": rank_correlation(scores.tolist(), data[split])}
        return Outcome(rouge(chosen, data[split]), {"sentences": located}, also)

    def similarities(text: Document) -> np.ndarray:
        """Of the sentences, by the cosine of their TF-IDF vectors."""
        x = vectorizer().transform(text.sentences)
        return (x @ x.T).toarray() - np.eye(len(text.sentences))

    @cache
    def vectorizer() -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        return TfidfVectorizer(analyzer=list).fit(pools[TRAIN])

    def central(split: str) -> float:
        """The sentences that are most like all others."""
        return rouge([best(similarities(text).sum(1)) for text in data[split]], data[split])

    def first(split: str) -> float:
        """The first two sentences of each part."""
        chosen = [start + i for start in range(0, PARTS * SIZE, SIZE) for i in range(2)]
        return rouge([chosen] * len(data[split]), data[split])

    def panels(model: nn.Module) -> list[Panel]:
        batch = collate(data[TEST][:2])
        _, _, weights = forward(model, batch)
        result = []
        for text, of_text, truth in zip(data[TEST][:2], weights[:, 1], batch.truth, strict=True):
            names = [" ".join(words[:4]) for words in text.sentences[: BODY + WINDOW]]
            rows = [f"{name} ({x:.2f})" for name, x in zip(names[:BODY], text.importance, strict=False)]
            title = "The first part of a conversation (importance): attention to what comes after"
            result.append(Panel(title, of_text[:BODY, : BODY + WINDOW], rows, names, truth[:BODY, : BODY + WINDOW]))
        return result

    baselines = {"TF-IDF centrality": central, "first sentences": first}
    return Task(build, batches, loss, judge, panels, baselines=baselines, epochs=30)
