"""Articles and an editor whose taste follows the weekday, generated."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..dadm import DADM
from . import TEST, VALIDATION, Outcome, Panel, Task

MODELS = 7  # one a day of the first week
CATEGORIES, TOPICS, ARTICLES = 6, 12, 120  # ARTICLES a day
TRAIN_DAYS, VALIDATION_DAYS, TEST_DAYS = 84, 14, 28
BASE, WEEKDAY, DRIFT, CATEGORY = 0.7, 0.7, 0.5, 1.0
WEEK = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


class Day(NamedTuple):
    """The pool of one day; several days joined have the same fields."""

    content: Tensor  # (N, TOPICS)
    category: Tensor  # (N,)
    weekday: Tensor  # (N,)
    picked: Tensor  # (N,), 0 or 1
    day: Tensor  # (N,)


def days(seed: int) -> list[Day]:
    """Every day's pool favours some categories, and the editor's taste is part lasting, part weekly, part of the day.

    A category's articles are about its topics, and the taste has weights of its own for it: a day that had few of
    them has taught little about them.
    """
    rng = torch.Generator().manual_seed(seed)

    def taste(scale: float, *shape: int) -> Tensor:
        return scale * torch.randn(*shape, CATEGORIES, TOPICS, generator=rng)

    centres = CATEGORY * torch.randn(CATEGORIES, TOPICS, generator=rng)
    base, weekly = taste(BASE), taste(WEEKDAY, 7)
    result = []
    for day in range(MODELS + TRAIN_DAYS + VALIDATION_DAYS + TEST_DAYS):
        favour = torch.softmax(1.5 * torch.randn(CATEGORIES, generator=rng), 0)
        category = torch.multinomial(favour, ARTICLES, replacement=True, generator=rng)
        content = centres[category] + torch.randn(ARTICLES, TOPICS, generator=rng)
        today = base + weekly[day % 7] + taste(DRIFT)
        logits = ((content - centres[category]) * today[category]).sum(-1)  # about half of each category is picked
        picked = torch.rand(ARTICLES, generator=rng) < torch.sigmoid(logits)
        whole = torch.full((ARTICLES,), day)
        result.append(Day(content, category, whole % 7, picked.float(), whole))
    return result


def features(day: Day) -> Tensor:
    """Of a logistic model: the topics, apart for each category, and the categories."""
    one_hot = nn.functional.one_hot(day.category, CATEGORIES).float()
    return torch.cat([(one_hot[:, :, None] * day.content[:, None]).flatten(1), one_hot], 1)


def logistic(x: Tensor, y: Tensor, l2: float = 1.0, steps: int = 8) -> Tensor:
    """The weights of a logistic regression with an L2 penalty, by Newton's method."""
    x, y = x.double(), y.double()
    w = x.new_zeros(x.shape[1])
    for _ in range(steps):
        p = torch.sigmoid(x @ w)
        hessian = x.T @ (x * (p * (1 - p))[:, None]) + l2 * torch.eye(x.shape[1], dtype=x.dtype)
        w = w - torch.linalg.solve(hessian, x.T @ (p - y) + l2 * w)
    return w.float()


def join(pools: list[Day]) -> Day:
    """Several days as one."""
    return Day(*(torch.cat(parts) for parts in zip(*pools, strict=True)))


def auc(scores: Tensor, picked: Tensor) -> float:
    """The share of pairs, of a picked article and another, in the right order."""
    above = scores[picked > 0, None] - scores[picked == 0]
    return ((above > 0).double() + (above == 0).double() / 2).mean().item()


def make(seed: int, device: torch.device) -> Task:
    """Seven models learn from a day each; DADM learns in twelve weeks which to trust, and is judged on four more."""
    pools = days(seed)
    weights = torch.stack([logistic(features(day), day.picked) for day in pools[:MODELS]])

    def ready(pool: Day) -> tuple[Day, Tensor]:
        return Day(*(x.to(device) for x in pool)), torch.sigmoid(features(pool) @ weights.T).to(device)

    train, opinions = ready(join(pools[MODELS : MODELS + TRAIN_DAYS]))
    later = [ready(day) for day in pools[MODELS + TRAIN_DAYS :]]
    judged = {VALIDATION: later[:VALIDATION_DAYS], TEST: later[VALIDATION_DAYS:]}

    def forward(model: nn.Module, pool: Day, predictions: Tensor) -> tuple[Tensor, Tensor]:
        return model(pool.content, predictions, pool.weekday, pool.category, return_weights=True)

    def batches(generator: torch.Generator, epoch: int) -> Iterable[tuple[Day, Tensor]]:
        for rows in torch.randperm(len(opinions), generator=generator).to(device).split(100):
            yield Day(*(x[rows] for x in train)), opinions[rows]

    def loss(model: nn.Module, batch: tuple[Day, Tensor]) -> Tensor:
        # The models are sure of themselves: away from 0 and 1, one wrong vote is not an infinite loss.
        return nn.functional.binary_cross_entropy(forward(model, *batch)[0].clamp(1e-4, 1 - 1e-4), batch[0].picked)

    def judge(model: nn.Module, split: str) -> Outcome:
        aucs, same = [], []
        for day, predictions in judged[split]:
            out, weights = forward(model, day, predictions)
            aucs.append(auc(out, day.picked))
            same.append(weights.gather(1, day.weekday[:, None]).mean().item())
        return Outcome(sum(aucs) / len(aucs), {"weekday": sum(same) / len(same)})

    def by_weekday(split: str) -> float:
        """The model of the same weekday alone."""
        return statistics.fmean(
            auc(predictions.gather(1, day.weekday[:, None])[:, 0], day.picked) for day, predictions in judged[split]
        )

    def all_days(split: str) -> float:
        """A model like the seven, but of all days that DADM is trained on."""
        whole = logistic(features(train), train.picked)
        return statistics.fmean(auc(features(day) @ whole, day.picked) for day, _ in judged[split])

    def panels(model: nn.Module) -> list[Panel]:
        result = []
        for day, predictions in judged[TEST][:3]:
            order = day.category.argsort(stable=True)
            _, counts = day.category.unique(return_counts=True)
            firsts = order[torch.cumsum(counts, 0) - counts]  # the first article of each category
            _, a = forward(model, day, predictions)
            result.append(
                Panel(
                    f"Day {int(day.day[0])}, a {WEEK[int(day.weekday[0])]}: an article of each category",
                    a[firsts],
                    [f"category {c}" for c in day.category[firsts].tolist()],
                    [f"model {w}" for w in WEEK],
                )
            )
        return result

    def build(arm: str) -> nn.Module:
        return DADM(MODELS, TOPICS, 16, num_times=7, num_categories=CATEGORIES, attention=arm == "attention").to(
            device
        )

    baselines = {"model of the weekday": by_weekday, "logistic regression on all days": all_days}
    return Task(build, batches, loss, judge, panels, arms=("attention", "uniform"), baselines=baselines, epochs=30)
