"""What `python -m fused_attn.models` trains each system on: a file a system, with `make(seed, device) -> Task`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Panel(NamedTuple):
    """The attention weights of one held-out example: dark is much."""

    title: str
    weights: Tensor  # (rows, columns)
    rows: list[str]
    columns: list[str]


@dataclass(frozen=True)
class Task:
    """The data of one seed, and how the system is trained and judged on it."""

    build: Callable[[bool], nn.Module]
    """Whether with attention -> a fresh model, in training mode."""
    batches: Callable[[torch.Generator], Iterable[Any]]
    """One epoch of training batches, in an order that the generator draws."""
    loss: Callable[[nn.Module, Any], Tensor]
    """Of one batch."""
    score: Callable[[nn.Module], float]
    """Of a model in evaluation mode, on held-out data; higher is better."""
    panels: Callable[[nn.Module], list[Panel]]
    """The weights on a few held-out examples: the first ones, not chosen by hand."""
    epochs: int
    learning_rate: float = 1e-3


class System(NamedTuple):
    """A row of the README's table; its key in `SYSTEMS` is the name of its files."""

    title: str
    paper: str
    op: str
    structure: str
    data: str  # what it is trained on; "generated" is said where it is
    metric: str


SYSTEMS: dict[str, System] = {}
