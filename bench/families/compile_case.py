"""What the compile report compiles: a call of a family's launchers on meta tensors. What families share of it.

Kernels are imported where they are launched, so that what is timed needs no Triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class CompileCase:
    """One call of a family, forward and backward, as its sizes and options."""

    dtype: torch.dtype
    tf32: bool = field(default=False, kw_only=True)  # torch.set_float32_matmul_precision("high")

    lengths: ClassVar[tuple[str, ...]] = ("T",)
    """Sizes that change from call to call."""

    def __str__(self) -> str:
        return " ".join([str(self.dtype).removeprefix("torch."), *filter(None, self._parts())])

    def launch(self) -> None:
        """Forward, and a backward for every gradient."""
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        self._launch()

    def varied(self, draw: Callable[[], int]) -> Any:
        """The same with lengths that are drawn."""
        return replace(self, **{x: draw() for x in self.lengths if getattr(self, x) is not None})

    def _parts(self) -> tuple[str, ...]:
        """The name, in parts; those that are empty are left out."""
        raise NotImplementedError

    def _launch(self) -> None:
        raise NotImplementedError

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device="meta")

    def _seed(self, dropout: float) -> Tensor | None:
        return self._empty(1, dtype=torch.int64) if dropout else None


@dataclass(frozen=True)
class SequenceCase(CompileCase):
    """A call with sequences of rows."""

    B: int
    T: int
    ragged: bool = field(default=False, kw_only=True)

    @property
    def _rows(self) -> tuple[int, ...]:
        """Axes of the rows: padded or packed."""
        return (self.B * self.T,) if self.ragged else (self.B, self.T)

    @property
    def _offsets(self) -> Tensor | None:
        return self._empty(self.B + 1, dtype=torch.int32) if self.ragged else None


@dataclass(frozen=True)
class PairCase(CompileCase):
    """A call with heads of queries and keys."""

    B: int
    H: int
    Tq: int
    Tk: int
    mask: int | None = field(default=None, kw_only=True)  # its axes, but for heads
    window: tuple[int | None, int | None] = field(default=(None, None), kw_only=True)
    bias: bool = field(default=False, kw_only=True)
    ragged: bool = field(default=False, kw_only=True)
    alone: str = field(default="", kw_only=True)  # of ragged rows: "queries" or "keys", where the others are padded
    dropout: float = field(default=0.0, kw_only=True)

    lengths = ("Tq", "Tk")

    def _packed(self, side: str) -> bool:
        return self.ragged and self.alone in ("", side)

    def _rows(self, side: str) -> tuple[int, int, int]:
        """B, H and T of the queries or keys as launchers have them: packed rows are one sequence."""
        T = self.Tq if side == "queries" else self.Tk
        return (1, self.H, self.B * T) if self._packed(side) else (self.B, self.H, T)

    def _of_ragged(self) -> str:
        return f"ragged {self.alone}".strip() * self.ragged

    def _structure(self) -> tuple[Tensor | None, ...]:
        """Bias, mask, offsets of queries and of keys, seed."""
        B, H, Tq = self._rows("queries")
        Bk, _, Tk = self._rows("keys")
        pairs = (self.B * self.Tq * self.Tk,) if self.ragged else (Tq, Tk)
        shown = {None: None, 2: (Bk, Tk), 3: (1 if self.ragged else B, 1, *pairs)}[self.mask]
        return (
            self._empty(1 if self.ragged else B, H, *pairs) if self.bias else None,
            None if shown is None else self._empty(*shown, dtype=torch.bool),
            *(
                self._empty(self.B + 1, dtype=torch.int32) if self._packed(side) else None
                for side in ("queries", "keys")
            ),
            self._seed(self.dropout),
        )


def blocks(constants: Mapping[str, Any], *sides: str) -> int:
    """Elements of a tile of these sides; of a side that a kernel has no block of, one."""
    return math.prod(constants.get(f"BLOCK_{side}", 1) for side in sides)
