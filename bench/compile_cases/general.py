"""The general family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_attn.kernels import general, general_bwd

from .dtypes import BF16, F16, F32


@dataclass(frozen=True)
class GeneralCase:
    """One call of the general family, forward and backward, as its sizes and options."""

    dtype: torch.dtype
    B: int
    H: int
    Tq: int
    Tk: int
    D: int
    DV: int | None = None  # None: the values are the keys
    activation: str = "identity"
    mask: int | None = None  # its rank
    window: tuple[int | None, int | None] = (None, None)
    bias: bool = False
    weights: bool = False  # whether they are returned, and have a gradient
    ragged: bool = False
    dropout: float = 0.0
    tf32: bool = False  # torch.set_float32_matmul_precision("high")

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), f"B{self.B} H{self.H} Tq{self.Tq} Tk{self.Tk} D{self.D}"]
        parts.append("shared" if self.DV is None else f"Dv{self.DV}")
        parts += [self.activation] * (self.activation != "identity") + [f"mask{self.mask}"] * (self.mask is not None)
        parts += ["bias"] * self.bias + ["window"] * (self.window != (None, None)) + ["weights"] * self.weights
        parts += ["ragged"] * self.ragged + ["dropout"] * (self.dropout > 0) + ["tf32"] * self.tf32
        return " ".join(parts)

    def launch(self) -> None:
        """Forward, and a backward for every gradient."""

        def t(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        B, H, Tq, Tk = (1, self.H, self.B * self.Tq, self.B * self.Tk) if self.ragged else (
            self.B, self.H, self.Tq, self.Tk
        )  # fmt: skip
        masks = {None: None, 2: (B, Tk), 3: (B, Tq, Tk)}[self.mask]
        offsets = t(self.B + 1, dtype=torch.int32) if self.ragged else None
        tensors = (
            t(B, H, Tq, self.D),
            t(B, H, Tk, self.D),
            None if self.DV is None else t(B, H, Tk, self.DV),
            t(B, H, Tq, Tk) if self.bias else None,
            None if masks is None else t(*masks, dtype=torch.bool),
            offsets,
            offsets,
            t(1, dtype=torch.int64) if self.dropout else None,
        )
        options = (self.activation, 0.125, *self.window, self.dropout)
        out, lse, scores = general.general_fwd(*tensors, *options, self.weights)
        needs = [True, True, self.DV is not None, self.bias]
        dscores = scores if self.weights else None
        general_bwd.general_bwd(out, None, dscores, *tensors, out, lse, *options, self.weights, needs)


GENERAL = [
    # many queries: the sizes that tests/test_compile_report.py asks for matrix units
    GeneralCase(BF16, 4, 8, 4096, 4096, 64, 64),
    GeneralCase(BF16, 4, 8, 4096, 4096, 128, 128),
    GeneralCase(BF16, 4, 8, 4096, 4096, 128, window=(None, 0)),
    GeneralCase(F16, 4, 4, 1024, 1024, 256, 256),
    GeneralCase(BF16, 4, 4, 1024, 1024, 256),
    # a decoder's step: keys in parts
    GeneralCase(BF16, 8, 1, 1, 8192, 128),
    GeneralCase(BF16, 64, 1, 1, 50, 1000, mask=2),
    GeneralCase(F16, 8, 1, 16, 8192, 256, 64),
    # wider than a tile, and narrow
    GeneralCase(BF16, 8, 1, 512, 512, 600),
    GeneralCase(BF16, 8, 1, 512, 512, 1024, 1024, mask=2),
    GeneralCase(BF16, 8, 1, 512, 512, 64, 600),
    GeneralCase(F16, 8, 1, 100, 100, 1, 1),
    # a mask of keys alone, as padded batches have it, and a window
    GeneralCase(BF16, 16, 8, 512, 512, 64, 64, mask=2),
    GeneralCase(BF16, 16, 8, 512, 512, 128, 128, mask=2),
    GeneralCase(BF16, 16, 4, 512, 512, 256, 256, mask=2, window=(None, 0)),
    GeneralCase(F16, 16, 1, 100, 100, 200, mask=2),
    GeneralCase(F16, 16, 1, 100, 100, 100, 75, mask=3, window=(100, 0)),
    # sides that are no int32 as 4 n + 3
    GeneralCase(BF16, 2, 2, 64, 64, 64, 64, window=(10**9, -(10**9))),
    # everything at once, and ragged
    GeneralCase(BF16, 4, 8, 512, 512, 128, 128, "tanh", 3, (100, 0), bias=True, weights=True, dropout=0.1),
    GeneralCase(BF16, 4, 4, 512, 512, 256, 256, "gelu", 3, (100, 0), bias=True, weights=True, dropout=0.1),
    GeneralCase(F16, 16, 4, 256, 256, 64, ragged=True, dropout=0.1),
    GeneralCase(BF16, 16, 1, 256, 256, 128, 128, ragged=True, window=(None, -1)),
    # float32
    GeneralCase(F32, 4, 8, 1024, 1024, 64, 64),
    GeneralCase(F32, 4, 8, 1024, 1024, 128),
    GeneralCase(F32, 4, 8, 1024, 1024, 128, 128, tf32=True),
    GeneralCase(F32, 8, 1, 1, 8192, 128),
    GeneralCase(F32, 8, 1, 512, 512, 600, 600, mask=2),
    GeneralCase(F32, 4, 1, 64, 64, 64, 64, "tanh", 3, (100, 0), bias=True, weights=True, dropout=0.1),
]  # fmt: skip
