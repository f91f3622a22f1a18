"""Word-by-word attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_attn.kernels import recurrent, recurrent_bwd

from .dtypes import BF16, F16, F32


@dataclass(frozen=True)
class WordCase:
    """One call of word-by-word attention, forward and backward, as its sizes and options."""

    dtype: torch.dtype
    B: int
    Ty: int
    Th: int
    D: int
    A: int
    mask: bool = False
    weights: bool = False  # whether they are returned, and have a gradient
    ragged: bool = False

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), f"B{self.B} Ty{self.Ty} Th{self.Th} D{self.D} A{self.A}"]
        parts += ["mask"] * self.mask + ["weights"] * self.weights + ["ragged"] * self.ragged
        return " ".join(parts)

    def launch(self) -> None:
        """Forward, and a backward for every gradient."""

        def t(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        B, Ty, Th, D, A = self.B, self.Ty, self.Th, self.D, self.A
        premise, hypothesis = ((B * Ty,), (B * Th,)) if self.ragged else ((B, Ty), (B, Th))
        offsets = t(B + 1, dtype=torch.int32) if self.ragged else None
        mask = t(B, Ty, dtype=torch.bool) if self.mask else None
        tensors = (
            t(*hypothesis, A), t(*premise, A), t(*premise, D), t(A), t(D, A), t(D, D), t(B, D), mask, offsets, offsets
        )  # fmt: skip
        out, weights = recurrent.recurrent_fwd(*tensors, self.weights)
        recurrent_bwd.recurrent_bwd(out, weights if self.weights else None, *tensors, out, [True] * 7)


RECURRENT = [
    # the paper's sizes: premise and hypothesis of a sentence each; widths that are whole vectors, and that are not
    WordCase(BF16, 32, 14, 8, 100, 100),
    WordCase(F32, 32, 14, 8, 159, 159, mask=True),
    WordCase(F16, 32, 14, 8, 128, 128, mask=True, weights=True),
    WordCase(BF16, 32, 14, 8, 128, 128, ragged=True),
    # as much as is held on chip: few words of great width, many of small width
    WordCase(BF16, 256, 64, 32, 256, 256, mask=True),
    WordCase(F32, 256, 64, 32, 256, 256),
    WordCase(F32, 64, 32, 32, 512, 512, mask=True, weights=True),
    WordCase(BF16, 64, 128, 32, 64, 64, mask=True, weights=True),
    WordCase(F32, 64, 60, 32, 16, 1, mask=True),
    WordCase(BF16, 2, 35, 2, 19, 33, mask=True),
    # more than that: streamed
    WordCase(BF16, 16, 1000, 32, 256, 256, mask=True, weights=True),
    WordCase(F32, 16, 50, 32, 1000, 2000),
    WordCase(F16, 256, 64, 32, 256, 64, ragged=True),
    WordCase(F32, 16, 8, 8, 3000, 20, mask=True),
]
