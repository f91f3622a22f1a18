"""The statistics family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_attn.kernels import statistics, statistics_bwd

from .dtypes import BF16, F16, F32


@dataclass(frozen=True)
class StatisticsCase:
    """One call of the statistics family, forward and backward, as its sizes and options."""

    dtype: torch.dtype
    B: int
    T: int
    C: int
    A: int | None = None  # None: one weight a frame
    mask: bool = True
    ragged: bool = False
    weights: bool = False  # whether they are returned, and have a gradient
    tf32: bool = False  # torch.set_float32_matmul_precision("high")

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), f"B{self.B} T{self.T} C{self.C}"]
        parts.append("frame" if self.A is None else f"A{self.A}")
        parts += ["mask"] * self.mask + ["ragged"] * self.ragged + ["weights"] * self.weights
        return " ".join([*parts, *["tf32"] * self.tf32])

    def launch(self) -> None:
        """Forward, and a backward for every gradient."""

        def t(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        rows = (self.B * self.T,) if self.ragged else (self.B, self.T)
        tensors = (
            t(*rows, dtype=F32) if self.A is None else t(*rows, self.A),
            None if self.A is None else t(self.A, self.C),
            t(*rows, self.C),
            t(*rows, dtype=torch.bool) if self.mask else None,
            t(self.B + 1, dtype=torch.int32) if self.ragged else None,
        )
        returned = self.weights and self.A is not None
        mean, var, lse, scores = statistics.statistics_fwd(*tensors, returned)
        needs = [True, self.A is not None, True]
        cotangents = mean, var, lse if self.weights else None, scores if returned else None
        statistics_bwd.statistics_bwd(*cotangents, *tensors, mean, var, lse, scores, needs)


STATISTICS = [
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
    StatisticsCase(BF16, 64, 300, 1500, 100, mask=False),
    StatisticsCase(BF16, 16, 300, 1536, 1024),  # V in parts
    StatisticsCase(BF16, 8, 100, 100, 50, weights=True),
    StatisticsCase(BF16, 4, 16, 1, 1),
    StatisticsCase(F32, 64, 300, 1536, 128),
    StatisticsCase(F32, 64, 300, 1536, 128, ragged=True, weights=True, tf32=True),
    StatisticsCase(F32, 4, 20, 7, 5),
]
