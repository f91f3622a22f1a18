"""The task of naming the class of each example, whatever the examples are."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tasks import TRAIN, Outcome, Panel, Task
from ..tasks._baselines import logistic_regression
from ._files import DataError
from ._packed import Packed, by_length


class Answer(NamedTuple):
    """What a model says of a batch."""

    logits: Tensor  # (B, classes)
    located: Mapping[str, Tensor] = {}  # by level (B,), how much weight is on the truth; NaN for no truth


class Part(NamedTuple):
    """A split."""

    labels: Tensor  # int64 (R,); -1 is a class that the training split has no example of
    sizes: Tensor  # (R,): examples of about the same size go together


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of examples whose class has the highest logit."""
    return float((logits.argmax(1) == labels).double().mean())


def auc(logits: Tensor, labels: Tensor) -> float:
    """The area under the curve; of several classes, the mean of each against the others."""
    from sklearn.metrics import roc_auc_score  # here, so that only what needs it asks for it

    if logits.shape[1] == 2:  # not of shares, many of which are 1 in floating point
        return float(roc_auc_score(labels, logits[:, 1] - logits[:, 0]))
    return float(roc_auc_score(labels, logits.double().softmax(1), multi_class="ovr"))


def bag_of_words(
    texts: Mapping[str, Sequence[Packed]], words: int, labels: Mapping[str, Tensor]
) -> Callable[[str], float]:
    """Logistic regression on how often each word is in a text, by split; of several texts an example, in each."""

    def judge(split: str) -> float:
        from scipy.sparse import csr_matrix, hstack  # scikit-learn has it

        def counts(text: Packed) -> Any:
            parts = (x.numpy() for x in (torch.ones(len(text.numbers)), text.numbers, text.offsets))
            return csr_matrix(tuple(parts), shape=(len(text.lengths), words))

        x = {name: hstack([counts(text) for text in some], "csr") for name, some in texts.items()}
        return logistic_regression(x, {name: y.numpy() for name, y in labels.items()}, split)

    return judge


def classify(
    build: Callable[[str], nn.Module],
    parts: Mapping[str, Part],
    collate: Callable[[str, Tensor], Any],
    answer: Callable[[nn.Module, Any], Answer],
    panels: Callable[[nn.Module], list[Panel]],
    *,
    batch: int,
    device: torch.device,
    metric: Callable[[Tensor, Tensor], float] = accuracy,
    **options: Any,
) -> Task:
    """A task whose loss is the cross entropy.

    collate: rows of a split, on the device. answer: of a batch. options: of `Task`.

    Raises DataError for one class, of which there is nothing to learn.
    """
    if len(parts[TRAIN].labels.unique()) < 2:
        raise DataError("expected examples of two classes at least to train on; got one")

    def batches(order: torch.Generator, epoch: int) -> Iterator[tuple[Any, Tensor]]:
        labels, sizes = parts[TRAIN]
        for rows in by_length(sizes, batch, order):
            yield collate(TRAIN, rows), labels[rows].to(device)

    def loss(model: nn.Module, pair: tuple[Any, Tensor]) -> Tensor:
        examples, labels = pair
        return F.cross_entropy(answer(model, examples).logits, labels)

    def judge(model: nn.Module, split: str) -> Outcome:
        labels, sizes = parts[split]
        logits: list[Tensor] = []
        located: defaultdict[str, list[Tensor]] = defaultdict(list)
        order = sizes.argsort(stable=True)
        for rows in order.split(batch):
            said = answer(model, collate(split, rows))
            logits.append(said.logits.float().cpu())
            for level, shares in said.located.items():
                located[level].append(shares.float().cpu())
        everything = torch.cat(logits)
        score = metric(everything, labels[order]) if everything.isfinite().all() else math.nan
        return Outcome(score, {level: torch.cat(shares).nanmean().item() for level, shares in located.items()})

    return Task(build, batches, loss, judge, panels, **options)
