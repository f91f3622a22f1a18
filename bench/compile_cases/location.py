"""The location family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_attn.kernels import location, location_bwd

from .dtypes import BF16, F16, F32


@dataclass(frozen=True)
class LocationCase:
    """One call of the location family, forward and backward, as its sizes and options."""

    dtype: torch.dtype
    B: int
    T: int
    D: int
    A: int | None = None  # None: the linear score
    R: int = 1
    gated: bool = False
    values: int | None = None  # their width; None: the keys
    context: str | None = None  # "row", "sequence"
    activation: str = "tanh"
    mask: bool = True
    ragged: bool = False
    dropout: float = 0.0
    tf32: bool = False  # torch.set_float32_matmul_precision("high")
    projected: bool = False  # no W: A = D

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), f"B{self.B} T{self.T} D{self.D}"]
        parts.append("linear" if self.A is None else f"A{self.A}")
        parts += [f"R{self.R}"] * (self.R > 1) + ["gated"] * self.gated
        parts += [f"Dv{self.values}"] * (self.values is not None)
        parts += [f"context/{self.context}"] * (self.context is not None)
        parts += [self.activation] * (self.activation != "tanh")
        parts += ["ragged"] * self.ragged + ["dropout"] * (self.dropout > 0) + ["tf32"] * self.tf32
        return " ".join([*parts, *["projected"] * self.projected])

    def launch(self) -> None:
        """Forward, and a backward for every gradient."""

        def t(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        rows = (self.B * self.T,) if self.ragged else (self.B, self.T)
        width = self.R if self.A is None else self.A
        gate = (t(self.D, width), t(width)) if self.gated else (None, None)
        contexts = {"row": (*rows, width), "sequence": (self.B, width)}
        tensors = (
            t(*rows, self.D),
            None if self.projected else t(self.D, width),
            t(width),
            None if self.A is None else t(self.A, self.R),
            *gate,
            None if self.context is None else t(*contexts[self.context]),
            None if self.values is None else t(*rows, self.values),
            t(*rows) if self.mask else None,
            t(*rows, dtype=torch.bool) if self.mask else None,
            t(self.B + 1, dtype=torch.int32) if self.ragged else None,
            t(1, dtype=torch.int64) if self.dropout else None,
        )
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        options = (self.activation, "sigmoid", self.dropout, self.context == "row")
        out, lse, scores = location.location_fwd(*tensors, *options)
        needs = [x is not None for x in tensors[:9]]
        location_bwd.location_bwd(out, lse, scores, *tensors, out, lse, scores, *options, needs)


LOCATION = [
    # gated MIL: one long bag, batches, ragged
    LocationCase(BF16, 1, 100_000, 512, 128, gated=True, mask=False),
    LocationCase(BF16, 64, 1024, 512, 128, gated=True),
    LocationCase(BF16, 64, 1024, 1024, 256, gated=True, ragged=True, mask=False),
    LocationCase(F32, 64, 1024, 512, 128, gated=True),
    LocationCase(F32, 64, 1024, 512, 128, gated=True, tf32=True),
    # HAN: short sentences, a context
    LocationCase(F16, 2048, 32, 256, 128),
    LocationCase(BF16, 256, 64, 100, 100, context="row", ragged=True, mask=False, activation="relu"),
    LocationCase(F32, 256, 50, 100, 100, context="sequence"),
    # hops
    LocationCase(BF16, 64, 512, 600, 350, R=30),
    LocationCase(F32, 64, 512, 600, 350, R=30),
    LocationCase(BF16, 64, 512, 64, R=4, activation="identity"),
    # linear
    LocationCase(BF16, 256, 1024, 512),
    LocationCase(F32, 256, 1024, 512),
    # values apart, dropout, the widest and the narrowest
    LocationCase(BF16, 64, 512, 256, 64, values=128, dropout=0.1),
    LocationCase(BF16, 8, 4096, 2048, 1024, context="row", activation="gelu"),
    LocationCase(F32, 8, 4096, 2048, 1024, R=128),
    LocationCase(BF16, 4, 16, 1, 1),
    # one query a sequence of the concat family
    LocationCase(BF16, 32, 512, 256, 256, values=512, context="sequence", projected=True),
    LocationCase(F32, 80, 50, 1000, 1000, values=1000, context="sequence", dropout=0.1, projected=True),
]  # fmt: skip
