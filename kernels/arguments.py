"""Arguments of kernels that belong together, as tuples.

A field is read as an attribute inside the kernel. Numbers in a tuple are told to the compiler where they are 1 or a
multiple of 16, which is a variant each: strides of rows, widths and counts of heads may be there. Numbers that vary
with a length stay parameters of their own, by the names of `chip.LENGTHS`. Flags and blocks are tuples of
`constants`. A tuple is not part of another: Triton 3.6 forgets there that a stride is 1.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor

from .chip import stride_of


class Rows(NamedTuple):
    """A tensor (N, H, width) with unit stride on the last axis; no pointer where there is none."""

    ptr: Tensor | None
    stride_n: int
    stride_h: int


def rows(x: Tensor | None) -> Rows:
    """A tensor (N, H, width), or (H, width) for all rows alike."""
    if x is None:
        return Rows(None, 0, 0)
    return Rows(x, 0 if x.dim() == 2 else stride_of(x, 0), stride_of(x, x.dim() - 2))


@functools.cache
def constants(given: Any) -> Any:
    """A named tuple of flags or sizes, each known to the compiler."""
    return type(given)(*map(tl.constexpr, given))
