"""Do the nines in a bag of handwritten digits outnumber the fours? Only the bag has a label.

A variant of the task of Ilse et al. 2018 on scikit-learn's real 8 × 8 images, whose label needs two kinds of key
instances and their counts: a bag of 40 to 80 images holds 3, 5 or 7 nines and fours together, at least one of each,
and which there are more of is the label. One image does not decide, so that a maximum cannot; and most of a bag says
nothing, which a mean must learn to cancel.

Images are split before bags are made, stratified by digit: 50 % to train on, 20 % for validation and 30 % for test
bags. The other eight digits are drawn uniformly. Size and number of keys are drawn apart from the label. Images are
standardised, without which all arms learn more slowly and some do not begin to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from .._arms import on_truth
from ..mil import GatedMIL
from . import TEST, TRAIN, VALIDATION, Outcome, Panel, Task

MORE, LESS = 9, 4
SIZES, KEYS = (40, 80), (3, 5, 7)
BAGS = {TRAIN: 200, VALIDATION: 400, TEST: 800}
DIM, ATTN_DIM, BATCH = 64, 32, 10
MEAN, DEVIATION = 0.305, 0.376  # of an image's shades, from 0 to 1


class Bags(NamedTuple):
    """Packed bags."""

    images: Tensor  # (N, 1, 8, 8)
    cu_seqlens: Tensor  # (S + 1,)
    labels: Tensor  # (S,), 0 or 1
    key: Tensor  # (N,), whether it is a nine or a four
    digits: Tensor  # (N,)

    def take(self, which: Tensor) -> Bags:
        """Some of them, packed."""
        starts, lengths = self.cu_seqlens[:-1][which], self.cu_seqlens.diff()[which]
        rows = torch.cat([torch.arange(a, a + n) for a, n in zip(starts.tolist(), lengths.tolist(), strict=True)])
        rows = rows.to(self.images.device)
        offsets = F.pad(lengths.cumsum(0), (1, 0)).int()
        return Bags(self.images[rows], offsets, self.labels[which], self.key[rows], self.digits[rows])


def split_images(digits: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Indices of the images of each split."""
    train, rest = train_test_split(np.arange(len(digits)), test_size=0.5, stratify=digits, random_state=seed)
    validation, test = train_test_split(rest, test_size=0.6, stratify=digits[rest], random_state=seed)
    return {TRAIN: train, VALIDATION: validation, TEST: test}


def draw_bag(pool: np.ndarray, digits: np.ndarray, label: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of the images of one bag."""
    size, keys = rng.integers(*SIZES, endpoint=True), rng.choice(KEYS)
    most = rng.integers(keys // 2 + 1, keys)  # of the kind that there is more of; one of the other at least
    counts = {MORE: most if label else keys - most, LESS: keys - most if label else most}
    drawn = [rng.choice(pool[digits[pool] == digit], count, replace=False) for digit, count in counts.items()]
    others = pool[~np.isin(digits[pool], (MORE, LESS))]
    drawn.append(rng.choice(others, size - keys, replace=False))
    return rng.permutation(np.concatenate(drawn))


def make_bags(pool: np.ndarray, count: int, rng: np.random.Generator) -> Bags:
    """Bags from the images of a split, every other one positive."""
    data = load_digits()
    labels = [i % 2 for i in range(count)]
    bags = [draw_bag(pool, data.target, label, rng) for label in labels]
    rows = np.concatenate(bags)
    digits = torch.from_numpy(data.target[rows])
    images = torch.tensor((data.images[rows] / 16 - MEAN) / DEVIATION, dtype=torch.float32)[:, None]
    offsets = F.pad(torch.tensor([len(bag) for bag in bags]).cumsum(0), (1, 0)).int()
    return Bags(images, offsets, torch.tensor(labels, dtype=torch.float32), torch.isin(digits, KEY_DIGITS), digits)


KEY_DIGITS = torch.tensor([MORE, LESS])


def encoder() -> nn.Module:
    """From images ``(N, 1, 8, 8)`` to ``(N, DIM)``."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 3 * 3, DIM),
        nn.ReLU(),
    )


class MaxMIL(nn.Module):
    """The largest of each feature over the bag, in place of attention."""

    def __init__(self, encoder: nn.Module, dim: int, classes: int = 1) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(dim, classes)

    def forward(self, instances: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Logits ``(S, classes)``."""
        return self.head(torch.segment_reduce(self.encoder(instances), "max", offsets=cu_seqlens, axis=0))


def instance_auc(weights: Tensor, bags: Bags) -> float:
    """How often a key instance outweighs another of its bag, the mean of the bags; equal weights count half.

    It is the area under the curve.
    """
    areas = []
    for key, w in zip(*(x.cpu().split(bags.cu_seqlens.diff().tolist()) for x in (bags.key, weights)), strict=True):
        pairs = w[key][:, None] - w[~key]
        areas.append(float(((pairs > 0).double() + (pairs == 0).double() / 2).mean()))
    return sum(areas) / len(areas)


def make_splits(seed: int, device: torch.device, counts: Mapping[str, int] = BAGS) -> dict[str, Bags]:
    """The bags of one seed, so many in each split."""
    rng = np.random.default_rng(seed)
    pools = split_images(load_digits().target, seed)
    return {
        split: Bags(*(x.to(device) for x in make_bags(pools[split], count, rng))) for split, count in counts.items()
    }


def make(seed: int, device: torch.device, counts: Mapping[str, int] = BAGS) -> Task:
    """As of `make_splits`."""
    data = make_splits(seed, device, counts)

    def build(arm: str) -> nn.Module:
        if arm == "max":
            return MaxMIL(encoder(), DIM).to(device)
        model = GatedMIL(encoder(), DIM, ATTN_DIM, attention=arm == "attention")
        return model.to(device)

    def forward(model: nn.Module, bags: Bags) -> tuple[Tensor, Tensor | None]:
        """Logits ``(S,)``, and the weights of an attention."""
        if isinstance(model, MaxMIL):
            return model(bags.images, bags.cu_seqlens)[:, 0], None
        with on_truth(model, model.get_submodule("pooling"), bags.key):
            logits, weights = model(bags.images, bags.cu_seqlens, return_weights=True)
        return logits[:, 0], weights

    def batches(order: torch.Generator, epoch: int) -> Iterator[Bags]:
        for chosen in torch.randperm(counts[TRAIN], generator=order).split(BATCH):
            yield data[TRAIN].take(chosen.to(device))

    def loss(model: nn.Module, batch: Bags) -> Tensor:
        return F.binary_cross_entropy_with_logits(forward(model, batch)[0], batch.labels)

    def judge(model: nn.Module, split: str) -> Outcome:
        bags = data[split]
        some = torch.arange(len(bags.labels), device=device).split(BATCH)  # what fits into a cache is faster
        found = [forward(model, bags.take(which)) for which in some]
        logits = torch.cat([x for x, _ in found])
        weights = [x for _, x in found if x is not None]
        located = {"instances": instance_auc(torch.cat(weights), bags)} if weights else {}
        return Outcome(float(((logits > 0) == bags.labels.bool()).float().mean()), located)

    def panels(model: nn.Module) -> list[Panel]:
        shown = []
        for i in range(4):
            bag = data[TEST].take(torch.tensor([i], device=device))
            logits, weights = forward(model, bag)
            assert weights is not None
            title = f"{'more' if bag.labels[0] else 'fewer'} nines than fours: more by {float(logits.sigmoid()):.0%}"
            names = [str(digit) for digit in bag.digits.tolist()]
            shown.append(Panel(title, weights[None], ["attention"], names, bag.key[None]))
        return shown

    return Task(build, batches, loss, judge, panels, arms=("attention", "uniform", "max", "oracle"), epochs=60)
