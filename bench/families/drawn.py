"""Calls drawn at random, for the compile report: widths, lengths and options that no table thought of.

None that the public functions refuse: linear scores and projected rows have no gate, and projected rows A = D.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .aware import StepCase
from .concat import ConcatCase
from .general import GeneralCase
from .graph import GraphCase
from .hierarchical import HierarchicalCase
from .location import LocationCase, WindowCase
from .problem import BF16, F16, F32
from .recurrent import WordCase
from .statistics import StatisticsCase
from .target import TargetCase

ACTIVATIONS = ("tanh", "relu", "identity", "sigmoid", "gelu", "silu", "leaky_relu", "elu")


class _Draw(random.Random):
    """Sizes and options, as calls have them."""

    def size(self, most: int) -> int:
        """From 1 to `most`, each power of two as likely; half of them whole vectors of 16, as layers are."""
        n = min(int((most + 1) ** self.random()), most)
        return min(-(-n // 16) * 16, most) if self.yes() else n

    def yes(self, chance: float = 0.5) -> bool:
        return self.random() < chance

    def maybe(self, most: int, chance: float = 0.5) -> int | None:
        return self.size(most) if self.yes(chance) else None

    def dtype(self) -> torch.dtype:
        return self.choice((BF16, BF16, F16, F32))

    def window(self) -> tuple[int | None, int | None]:
        return self.choice(((None, 0), (None, -1), (8, 8), (100, 0), (3, None), (None, None)))

    def dropout(self) -> float:
        return 0.1 if self.yes(0.25) else 0.0


def _location(r: _Draw) -> LocationCase:
    projected = r.yes(0.2)
    width = r.size(2048)
    A = width if projected else r.maybe(2048, 0.85)
    hops = 1 if r.yes() else r.size(128)
    return LocationCase(
        r.dtype(),
        r.size(256),
        r.size(4096),
        width,
        A,
        1 if A is None else hops,
        gates=A is not None and not projected and r.yes(),
        value=r.maybe(2048, 0.3),
        context=r.choice((None, "row", "sequence")),
        activation=r.choice(ACTIVATIONS),
        mask=r.yes(),
        ragged=r.yes(0.3),
        dropout=r.dropout(),
        tf32=r.yes(0.3),
        projected=projected,
    )


def _linear_hops(r: _Draw) -> LocationCase:
    return LocationCase(
        r.dtype(),
        r.size(256),
        r.size(4096),
        r.size(2048),
        R=r.size(128),
        value=r.maybe(2048, 0.3),
        mask=r.yes(),
        ragged=r.yes(0.3),
        dropout=r.dropout(),
    )


def _window(r: _Draw) -> WindowCase:
    return WindowCase(
        r.dtype(),
        r.size(64),
        r.size(4096),
        r.size(2048),
        r.window(),
        1 if r.yes() else r.size(128),
        ragged=r.yes(0.3),
        dropout=r.dropout(),
        tf32=r.yes(0.3),
    )


def _concat(r: _Draw, activations: tuple[str, ...] = ACTIVATIONS) -> ConcatCase:
    ragged = r.yes(0.3)
    return ConcatCase(
        r.dtype(),
        r.size(64),
        r.size(16),
        *(r.size(2048) for _ in range(4)),
        r.choice(activations),
        mask=r.choice((None, 2) if ragged else (None, 2, 3)),
        window=r.window(),
        bias=not ragged and r.yes(0.3),
        ragged=ragged,
        alone=r.choice(("", "queries", "keys")) if ragged else "",
        dropout=r.dropout(),
    )


def _general(r: _Draw) -> GeneralCase:
    ragged = r.yes(0.3)
    D = r.size(2048)
    return GeneralCase(
        r.dtype(),
        r.size(64),
        r.size(16),
        r.size(8192),
        r.size(8192),
        D,
        r.choice((None, D, r.size(2048))),
        r.choice(("identity", *ACTIVATIONS)),
        mask=r.choice((None, 2) if ragged else (None, 2, 3)),
        window=r.choice(((None, None), r.window())),
        bias=not ragged and r.yes(0.3),
        weights=not ragged and r.yes(0.3),
        ragged=ragged,
        alone=r.choice(("", "queries", "keys")) if ragged else "",
        dropout=r.dropout(),
        tf32=r.yes(0.3),
    )


def _graph(r: _Draw) -> GraphCase:
    nodes = r.size(100_000)
    return GraphCase(
        r.dtype(),
        nodes,
        nodes * r.size(128),
        r.size(16),
        r.size(2048),
        r.maybe(2048, 0.3),
        keys=r.maybe(100_000, 0.3),
        edge=r.yes(),
        activation=r.choice(ACTIVATIONS),
        dropout=r.dropout(),
        weights=r.yes(0.3),
        index=r.choice((torch.int32, torch.int64)),
    )


def _hierarchical(r: _Draw) -> HierarchicalCase:
    projected = r.yes(0.2)
    D = r.size(512 if r.yes(0.8) else 2048)
    groups = r.size(2048)
    segments = groups * r.size(32)
    linear = r.yes(0.2)
    A = D if projected else None if linear else r.size(2048)
    dtype, rows = r.dtype(), segments * r.size(64)
    outer = None if r.yes(0.2) else r.size(2048)
    if projected:
        outer = D
    return HierarchicalCase(
        dtype,
        groups,
        segments,
        rows,
        D,
        A,
        outer,
        gates=r.yes(0.4) and None not in (A, outer) and not projected,
        context=r.choice((None, "row", "segment")),
        activation=r.choice(ACTIVATIONS),
        mask=r.yes(),
        tf32=r.yes(0.3),
        projected=projected,
    )


def _statistics(r: _Draw) -> StatisticsCase:
    return StatisticsCase(
        r.dtype(),
        r.size(256),
        r.size(4096),
        r.size(2048),
        r.maybe(2048, 0.8),
        mask=r.yes(),
        ragged=r.yes(0.3),
        weights=r.yes(0.4),
        tf32=r.yes(0.3),
    )


def _target(r: _Draw) -> TargetCase:
    return TargetCase(
        r.dtype(),
        r.size(2048),
        r.size(2048),
        r.size(512),
        r.size(1024),
        r.maybe(128, 0.8),
        r.maybe(512, 0.3),
        r.choice(ACTIVATIONS),
        softmax=r.yes(),
        mask=r.yes(),
        weights=r.yes(0.4),
        ragged=r.yes(0.3),
        tf32=r.yes(0.3),
    )


def _recurrent(r: _Draw) -> WordCase:
    ragged = r.yes(0.3)
    return WordCase(
        r.dtype(),
        r.size(256),
        r.size(1024),
        r.size(64),
        r.size(2048),
        r.size(2048),
        mask=r.yes(),
        weights=not ragged and r.yes(0.4),
        ragged=ragged,
    )


def _aware(r: _Draw) -> StepCase:
    return StepCase(
        r.dtype(),
        r.size(256),
        r.size(4096),
        r.size(1024),
        r.size(2048),
        r.size(64),
        2 * r.size(128) - 1,
        r.choice(ACTIVATIONS),
        mask=r.yes(),
        bias=r.yes(0.3),
        dropout=r.dropout(),
        tf32=r.yes(0.3),
    )


DRAW: tuple[tuple[str, Callable[[_Draw], Any]], ...] = (
    ("location", _location),
    ("general", _general),
    ("concat", _concat),
    ("statistics", _statistics),
    ("location", _window),
    ("graph", _graph),
    ("hierarchical", _hierarchical),
    ("recurrent", _recurrent),
    ("target", _target),
    ("general", _general),
    ("location", _linear_hops),
    ("distance", partial(_concat, activations=("abs", "square"))),
    ("aware", _aware),
)


def drawn(count: int, seed: int) -> list[tuple[str, Any]]:
    """`count` pairs (family, case), the same for the same seed; more of them are the same and others."""
    return [(family, draw(_Draw(f"{seed} {i}"))) for i, (family, draw) in zip(range(count), _cycle(), strict=False)]


def _cycle() -> Any:
    while True:
        yield from DRAW
