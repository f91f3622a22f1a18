"""The hierarchical family: its forward kernel; the backward, and two launches, are those of the location family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_attn.kernels import hierarchical

from .dtypes import BF16, F16, F32


@dataclass(frozen=True)
class HierarchicalCase:
    """One call of the hierarchical family, forward, as its sizes and options."""

    dtype: torch.dtype
    G: int
    S: int
    N: int
    D: int
    A: int | None  # None: linear scores
    outer_A: int | None
    gated: bool = False
    context: str | None = None  # "row" or "segment", at both levels
    activation: str = "tanh"
    mask: bool = True
    tf32: bool = False  # torch.set_float32_matmul_precision("high")
    projected: bool = False  # no W: A = D

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), f"G{self.G} S{self.S} N{self.N} D{self.D}"]
        parts += ["linear" if width is None else f"A{width}" for width in (self.A, self.outer_A)]
        parts += ["gated"] * self.gated + ([] if self.context is None else [f"context/{self.context}"])
        parts += [self.activation] * (self.activation != "tanh")
        return " ".join([*parts, *["tf32"] * self.tf32, *["projected"] * self.projected])

    def launch(self) -> None:
        """The forward."""

        def t(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        def score(width: int | None, parents: int, rows: int) -> tuple[Tensor | None, ...]:
            A = width or 1
            gate = (t(self.D, A), t(A)) if self.gated else (None, None)
            context = {None: None, "row": t(rows, A), "segment": t(parents, A)}[self.context]
            return None if self.projected else t(self.D, A), t(A), t(A, 1) if width else None, *gate, context

        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        options = (self.activation, "sigmoid", self.context == "row")
        hierarchical.hierarchical_fwd(
            t(self.N, self.D), *score(self.A, self.S, self.N), *score(self.outer_A, self.G, self.S),
            t(self.N, dtype=torch.bool) if self.mask else None,
            t(self.S + 1, dtype=torch.int32), t(self.G + 1, dtype=torch.int32), *options, *options,
        )  # fmt: skip


HIERARCHICAL = [
    # HAN: words of a recurrent layer, ragged
    HierarchicalCase(BF16, 256, 2560, 51_200, 256, 128, 128, mask=False),
    HierarchicalCase(BF16, 256, 2560, 51_200, 100, 100, 100),
    HierarchicalCase(F16, 64, 640, 12_800, 64, 64, 32, context="row", activation="relu"),
    HierarchicalCase(F32, 256, 2560, 51_200, 256, 128, 128, mask=False),
    HierarchicalCase(F32, 256, 2560, 51_200, 100, 100, 100, context="segment"),
    HierarchicalCase(F32, 256, 2560, 51_200, 256, 128, 128, gated=True, tf32=True),
    # the widest that fit, gated, and projected rows
    HierarchicalCase(BF16, 512, 8192, 300_000, 256, 256, 256, gated=True, context="segment"),
    HierarchicalCase(BF16, 512, 8192, 300_000, 256, 1024, 256, gated=True, activation="gelu"),
    HierarchicalCase(F16, 512, 8192, 300_000, 256, 256, 256, context="segment", projected=True),
    HierarchicalCase(F32, 256, 2560, 51_200, 128, 128, 128, context="row", projected=True),
    # linear, and the narrowest
    HierarchicalCase(BF16, 256, 2560, 51_200, 256, None, None),
    HierarchicalCase(F32, 256, 2560, 51_200, 256, None, None, context="segment"),
    HierarchicalCase(BF16, 4, 8, 16, 1, 1, 1),
    # two launches: wider than the chip holds, and few long documents
    HierarchicalCase(BF16, 256, 2560, 51_200, 512, 128, 128),
    HierarchicalCase(BF16, 2, 2000, 40_000, 256, 128, 128),
]
