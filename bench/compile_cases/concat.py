"""The concat family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_attn.kernels import concat, concat_bwd

from .dtypes import BF16, F16, F32


@dataclass(frozen=True)
class ConcatCase:
    """One call of the concat family, forward and backward, as its sizes and options."""

    dtype: torch.dtype
    B: int
    H: int
    Tq: int
    Tk: int
    A: int
    DV: int
    activation: str = "tanh"
    mask: int | None = None  # its rank
    window: tuple[int | None, int | None] = (None, None)
    bias: bool = False
    ragged: bool = False
    dropout: float = 0.0

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), f"B{self.B} H{self.H} Tq{self.Tq} Tk{self.Tk}"]
        parts += [f"A{self.A} Dv{self.DV}", self.activation] + [f"mask{self.mask}"] * (self.mask is not None)
        parts += ["bias"] * self.bias + ["window"] * (self.window != (None, None))
        parts += ["ragged"] * self.ragged + ["dropout"] * (self.dropout > 0)
        return " ".join(parts)

    def launch(self) -> None:
        """Forward, and a backward for every gradient."""

        def t(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        torch.set_float32_matmul_precision("highest")
        B, H, Tq, Tk = (1, self.H, self.B * self.Tq, self.B * self.Tk) if self.ragged else (
            self.B, self.H, self.Tq, self.Tk
        )  # fmt: skip
        masks = {None: None, 2: (B, Tk), 3: (B, Tq, Tk)}[self.mask]
        offsets = t(self.B + 1, dtype=torch.int32) if self.ragged else None
        tensors = (
            t(B, H, Tq, self.A),
            t(B, H, Tk, self.A),
            t(B, H, Tk, self.DV),
            t(H, self.A),
            t(B, H, Tq, Tk) if self.bias else None,
            None if masks is None else t(*masks, dtype=torch.bool),
            offsets,
            offsets,
            t(1, dtype=torch.int64) if self.dropout else None,
        )
        options = (self.activation, *self.window, self.dropout)
        out, lse, _ = concat.concat_fwd(*tensors, *options, False)
        needs = [True] * 4 + [self.bias]
        concat_bwd.concat_bwd(out, None, None, *tensors, out, lse, *options, needs)


CONCAT = [
    # the sizes that the bounds of tests/test_compile_report.py are for
    ConcatCase(BF16, 4, 1, 256, 512, 128, 128),
    ConcatCase(F32, 4, 1, 256, 512, 128, 128),
    # a Bahdanau decoder step, sigmoid, odd widths
    ConcatCase(BF16, 80, 1, 1, 50, 1000, 1000, mask=2),
    ConcatCase(F32, 4, 1, 30, 60, 300, 300, "sigmoid", mask=2),
    ConcatCase(F16, 4, 1, 100, 100, 100, 100, "gelu", mask=3, bias=True),
    # heads, windows, ragged
    ConcatCase(BF16, 4, 8, 512, 512, 64, 64, "relu", window=(100, 0), dropout=0.1),
    ConcatCase(BF16, 16, 4, 256, 256, 64, 64, "leaky_relu", ragged=True),
    ConcatCase(BF16, 16, 1, 256, 256, 128, 128, ragged=True, window=(None, -1)),
    ConcatCase(BF16, 16, 2, 100, 300, 600, 300, "sigmoid", ragged=True, dropout=0.1),
    ConcatCase(F16, 16, 1, 256, 256, 100, 100, "gelu", ragged=True, window=(100, 0), dropout=0.1),
    ConcatCase(F32, 16, 1, 256, 256, 128, 128, ragged=True),
    ConcatCase(F32, 16, 1, 256, 256, 100, 300, "silu", ragged=True, window=(100, 0), dropout=0.1),
    ConcatCase(BF16, 4, 1, 256, 256, 1, 128, "identity", mask=2),
    ConcatCase(F32, 4, 1, 64, 64, 64, 128, "silu"),
    ConcatCase(F32, 4, 1, 64, 64, 64, 64, mask=3, bias=True, window=(100, 0), dropout=0.1),
]  # fmt: skip
