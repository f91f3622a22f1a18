"""The windowed form of the location family."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fused_attn.kernels import location_window, location_window_bwd

from .dtypes import BF16, F16, F32


@dataclass(frozen=True)
class WindowCase:
    """The windowed form of the location family, from its scores on, forward and backward."""

    dtype: torch.dtype
    B: int
    T: int
    DV: int
    window: tuple[int | None, int | None]
    R: int = 1
    ragged: bool = False
    dropout: float = 0.0
    tf32: bool = False  # torch.set_float32_matmul_precision("high")

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), f"B{self.B} T{self.T} Dv{self.DV} window{self.window}"]
        parts += [f"R{self.R}"] * (self.R > 1) + ["ragged"] * self.ragged + ["dropout"] * (self.dropout > 0)
        return " ".join([*parts, *["tf32"] * self.tf32])

    def launch(self) -> None:
        """Forward, and a backward for every gradient."""
        rows = (self.B * self.T,) if self.ragged else (self.B, self.T)
        scores = torch.empty(*rows, self.R, device="meta")
        values = torch.empty(*rows, self.DV, dtype=self.dtype, device="meta")
        offsets = torch.empty(self.B + 1, dtype=torch.int32, device="meta") if self.ragged else None
        seed = torch.empty(1, dtype=torch.int64, device="meta") if self.dropout else None
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        inputs, options = (scores, values, offsets, seed), (*self.window, self.dropout)
        out, lse = location_window.window_fwd(*inputs, *options)
        location_window_bwd.window_bwd(out, lse, *inputs, out, lse, *options, [True, True])


WINDOW = [
    WindowCase(BF16, 16, 4096, 256, (None, 0)),
    WindowCase(F32, 16, 4096, 256, (None, 0)),
    WindowCase(F32, 16, 4096, 256, (None, 0), tf32=True),
    WindowCase(BF16, 64, 100, 100, (None, -1), ragged=True),
    WindowCase(F32, 64, 100, 100, (3, None), ragged=True),
    WindowCase(F16, 16, 1024, 64, (8, 8), R=4),
    WindowCase(F32, 16, 1024, 64, (8, 8), R=4, dropout=0.1),
    WindowCase(BF16, 4, 1024, 1024, (None, 0), R=30, dropout=0.1),
    WindowCase(BF16, 4, 1024, 1024, (None, None), ragged=True),
    WindowCase(F32, 4, 1024, 1000, (None, 0), R=3, ragged=True),
    WindowCase(BF16, 4, 20, 1, (None, 0)),
]
