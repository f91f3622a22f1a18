"""Which bags of handwritten digits hold a nine (the task of Ilse et al. 2018, on scikit-learn's real 8 × 8 images).

The images are split 60 : 40, stratified by digit, before bags are made: no held-out image is trained on. A bag has 8
to 32 images, and its size is drawn apart from its label. Half of the bags are positive: n images with 1 to n // 8
nines. The rest is drawn uniformly from the other nine digits, without replacement within a bag.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from ..mil import GatedMIL
from . import Panel, Task

POSITIVE = 9
SIZES = (8, 32)
BAGS, HELD_OUT = 300, 400
DIM, ATTN_DIM, BATCH = 64, 32, 10


def split_images(digits: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images to train on, and of those held out."""
    train, test = train_test_split(np.arange(len(digits)), test_size=0.4, stratify=digits, random_state=seed)
    return train, test


def make_bags(pool: np.ndarray, digits: np.ndarray, count: int, rng: np.random.Generator) -> list[Tensor]:
    """Indices of the images of `count` bags; those at even places hold a nine."""
    nines, others = pool[digits[pool] == POSITIVE], pool[digits[pool] != POSITIVE]
    bags = []
    for i in range(count):
        size = rng.integers(*SIZES, endpoint=True)
        held = rng.integers(1, size // 8, endpoint=True) if i % 2 == 0 else 0
        drawn = rng.choice(nines, held, replace=False), rng.choice(others, size - held, replace=False)
        bags.append(torch.from_numpy(rng.permutation(np.concatenate(drawn))))
    return bags


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


def make(seed: int, device: torch.device) -> Task:
    """The bags of one seed."""
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32, device=device)[:, None]
    train, test = split_images(data.target, seed)
    rng = np.random.default_rng(seed)
    bags, held_out = make_bags(train, data.target, BAGS, rng), make_bags(test, data.target, HELD_OUT, rng)

    def pack(some: list[Tensor]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([len(bag) for bag in some])
        return images[torch.cat(some).to(device)], F.pad(lengths.cumsum(0), (1, 0)).int().to(device)

    def labels(which: Iterable[int]) -> Tensor:
        return torch.tensor([float(i % 2 == 0) for i in which], device=device)

    def build(attention: bool) -> nn.Module:
        return GatedMIL(encoder(), DIM, ATTN_DIM, attention=attention).to(device)

    def batches(order: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for chosen in torch.randperm(BAGS, generator=order).split(BATCH):
            yield *pack([bags[i] for i in chosen]), labels(chosen.tolist())

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        instances, cu_seqlens, wanted = batch
        return F.binary_cross_entropy_with_logits(model(instances, cu_seqlens)[:, 0], wanted)

    def score(model: nn.Module) -> float:
        logits = model(*pack(held_out))[:, 0]
        return float(roc_auc_score(labels(range(HELD_OUT)).cpu(), logits.cpu()))

    def panels(model: nn.Module) -> list[Panel]:
        shown = []
        for i, bag in enumerate(held_out[:4]):
            logits, weights = model(*pack([bag]), return_weights=True)
            title = f"{'a positive' if i % 2 == 0 else 'a negative'} bag: positive by {float(logits.sigmoid()):.0%}"
            shown.append(Panel(title, weights[None], ["attention"], [str(data.target[k]) for k in bag.tolist()]))
        return shown

    return Task(build, batches, loss, score, panels, epochs=30)
