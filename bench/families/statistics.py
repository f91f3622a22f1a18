"""The statistics family.

Sizes: B sequences of T frames, or S ragged ones of at most T; D, A; channel (0 or 1): a weight a channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_attn import statistics_pooling

from .compile_case import SequenceCase, blocks
from .problem import BF16, F16, F32, Case, Cost, Inputs, Op, Sizes
from .sizes import costs, count_sequences, drawing, shape_of, structure_of


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    normal = drawing(dtype, device, seed)
    D, A = sizes["D"], sizes["A"]
    channels = (D,) if sizes.get("channel") else ()
    # Scales as of a trained layer: activations off their linear part, weights neither uniform nor one-hot.
    inputs = {"w": normal(D, A, std=2 * D**-0.5), "b": normal(A, std=0.1)}
    inputs["v"] = normal(A, *channels, std=2 * A**-0.5)
    return {"h": normal(*shape_of(sizes, "T", D)), **inputs, **structure_of(sizes, device, cu_seqlens="T")}


def _call(**arguments: Tensor) -> Tensor:
    return torch.cat(statistics_pooling(**arguments), dim=-1)  # type: ignore[arg-type]


def _cost(sizes: Sizes, itemsize: int) -> tuple[Cost, Cost]:
    D, A = sizes["D"], sizes["A"]
    seqs, rows, index = count_sequences(sizes)
    weights = D * A + A * (D if sizes.get("channel") else 1)
    # A frame meets every weight once, and is in two sums of D.
    return costs(2 * rows * (weights + 2 * D), itemsize, rows * D + weights + A, 2 * seqs * D, index)


_OKABE = {"B": 64, "T": 300, "D": 1500, "A": 64}
_OKABE_128 = {"D": 1536, "A": 128}
_ECAPA = {"D": 1536, "A": 128, "channel": 1}
_SMALL = {"B": 8, "T": 100, "D": 128, "A": 16}

TIMED = (
    Case("okabe", _OKABE),
    Case("okabe", _OKABE, F32),
    Case("okabe-128", {"B": 64, "T": 300, **_OKABE_128}),
    Case("okabe-ragged", {"S": 64, "T": 600, **_OKABE_128}),
    Case("okabe-recording", {**_OKABE, "B": 1, "T": 60_000}),
    Case("ecapa", {"B": 64, "T": 300, **_ECAPA}),
    Case("ecapa", {"B": 64, "T": 300, **_ECAPA}, F32),
    Case("ecapa-ragged", {"S": 64, "T": 600, **_ECAPA}),
    Case("ecapa-recording", {"B": 1, "T": 60_000, **_ECAPA}, check={"T": 10_000}),
    Case("okabe-small", _SMALL, F32, "cpu"),
    Case("ecapa-small", {**_SMALL, "channel": 1}, F32, "cpu"),
)

OP = Op(family="statistics", inputs=_inputs, call=_call, cost=_cost, cases=TIMED)


@dataclass(frozen=True)
class StatisticsCase(SequenceCase):
    """One call of the statistics family."""

    D: int
    A: int | None = None  # None: one weight a frame
    mask: bool = True
    weights: bool = False  # whether they are returned, and have a gradient
    bare: bool = False  # whether the features are given
    given: str = ""  # "frame" or "channel": a score of each is given, "frame weight": a weight; or it is made
    mean: bool = False  # alone
    unbiased: bool = False

    def _parts(self) -> tuple[str, ...]:
        return (
            f"B{self.B} T{self.T} C{self.D}",
            "frame" if self.A is None else f"A{self.A}",
            "mask" * self.mask,
            "ragged" * self.ragged,
            "weights" * self.weights,
            "bare" * self.bare,
            f"given {self.given}" * bool(self.given),
            "mean" * self.mean,
            "unbiased" * self.unbiased,
            "tf32" * self.tf32,
        )

    def _launch(self) -> None:
        from fused_attn.kernels import statistics, statistics_bwd
        from fused_attn.kernels.inputs import StatisticsInputs

        rows, A, given = self._rows, 64 if self.A is None else self.A, None
        if self.given:
            given = self._empty(*rows, self.D) if self.given == "channel" else self._empty(*rows)
        inputs = StatisticsInputs(
            self._empty(*rows, A if self.bare else self.D),
            None if self.bare or self.given else self._empty(self.D, A),
            None if self.bare or self.given else self._empty(A),
            None if self.given else self._empty(A) if self.A is None else self._empty(A, self.D),
            None,
            self._empty(*rows, self.D) if self.bare else None,
            given,
            self._empty(*rows, dtype=torch.bool) if self.mask else None,
            self._offsets,
            *("identity" if self.bare else "tanh", False, 1e-12, math.inf, 0.0),
            *(float(self.unbiased), "weight" in self.given),
        )
        returned = self.weights and self.A is not None
        mean, std, lse, scores, *more = statistics.statistics_fwd(inputs, returned, True, not self.mean)
        of_weights = (lse, scores) if self.weights else (None, None)
        cotangents = mean, None if self.mean else std, *of_weights
        needs = [x is not None for x in inputs[:7]]
        statistics_bwd.statistics_bwd(inputs, lse, scores, *more, *cotangents, needs)


COMPILED = [
    # one weight a frame: Okabe's sizes, one long recording, ragged
    StatisticsCase(BF16, 64, 300, 1500),
    StatisticsCase(BF16, 1, 60_000, 1500, mask=False),
    StatisticsCase(F16, 64, 300, 1536, ragged=True, weights=True),
    StatisticsCase(F32, 64, 300, 1500),
    StatisticsCase(F32, 4, 20, 7, weights=True),
    # one weight a channel: ECAPA, one long recording, ragged
    StatisticsCase(BF16, 64, 300, 1536, 128),
    StatisticsCase(BF16, 1, 60_000, 1536, 128, mask=False),
    StatisticsCase(F16, 64, 300, 3072, 64, ragged=True, weights=True),
    StatisticsCase(BF16, 64, 300, 1500, 128),
    StatisticsCase(BF16, 64, 300, 1500, 100, mask=False),
    StatisticsCase(F16, 64, 300, 300, 100, ragged=True, weights=True),
    StatisticsCase(F16, 64, 300, 1536, 128, bare=True),
    StatisticsCase(BF16, 16, 300, 1536, 1024),  # V in parts
    # scores and weights that are given, the mean alone, an unbiased variance
    StatisticsCase(BF16, 64, 300, 1536, given="channel", mean=True),
    StatisticsCase(F32, 1, 60_000, 128, mask=False, ragged=True, given="channel", mean=True),
    StatisticsCase(BF16, 64, 300, 1500, given="channel", unbiased=True),
    StatisticsCase(BF16, 64, 300, 1536, given="frame weight", unbiased=True),
    StatisticsCase(F32, 4, 20, 7, given="channel"),
    StatisticsCase(F32, 64, 300, 1500, mean=True),
    StatisticsCase(F16, 64, 300, 1536, 128, unbiased=True),
    StatisticsCase(BF16, 64, 300, 1536, 128, mean=True),
    StatisticsCase(BF16, 8, 100, 100, 50, weights=True),
    StatisticsCase(BF16, 4, 16, 1, 1),
    StatisticsCase(F32, 64, 300, 1536, 128),
    StatisticsCase(F32, 64, 300, 1536, 128, ragged=True, weights=True, tf32=True),
    StatisticsCase(F32, 4, 20, 7, 5),
]
BRIEF = [COMPILED[1], COMPILED[5]]
VARIED = {
    "statistics": [
        StatisticsCase(BF16, 3, 1, 64),
        StatisticsCase(F32, 3, 1, 100, mask=False, weights=True),
        StatisticsCase(BF16, 3, 1, 64, 32),
        StatisticsCase(F32, 3, 1, 100, 63, weights=True),
        StatisticsCase(BF16, 3, 1, 64, 32, ragged=True, mask=False),
        StatisticsCase(F32, 3, 1, 100, ragged=True, weights=True),
    ]
}


def elements(kernel: str, constants: Mapping[str, Any]) -> int:
    """Frames by channels."""
    return blocks(constants, "T" if "BLOCK_T" in constants else "I", "C")
