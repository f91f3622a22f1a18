"""Arguments of kernels that belong together, as tuples.

A field is read as an attribute inside the kernel. Numbers in a tuple are told to the compiler where they are 1 or a
multiple of 16, which is a variant each: strides of rows, widths and counts of heads may be there. Numbers that vary
with a length stay parameters of their own, by the names of `chip.LENGTHS`. Flags and blocks are tuples of
`constants`. A tuple is not part of another: Triton 3.6 forgets there that a stride is 1.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
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


class Sequences(NamedTuple):
    """A tensor (B, T, width), or packed rows (N, width), with unit stride on the last axis."""

    ptr: Tensor
    stride_b: int  # 0 for packed rows; see `sequence_ptr`
    stride_t: int
    EVEN: Any


def sequences(x: Tensor, *, packed: bool) -> Sequences:
    """Where rows are whole vectors, so are sequences, which loads of vectors must know, whatever the length.

    Where not, sequences are so at some lengths: 4 n + 3 is never 1 nor a multiple of 16, so that no length is a
    variant.
    """
    stride_b, stride_t = 0 if packed else stride_of(x, 0), stride_of(x, x.dim() - 2)
    even = stride_b % 16 == 0 and stride_t % 16 == 0
    return Sequences(x, stride_b if even else 4 * stride_b + 3, stride_t, tl.constexpr(even))


@triton.jit
def sequence_ptr(x, seq, start):
    """The row `start` of a sequence; seq is an int64."""
    if x.EVEN:
        stride_b = x.stride_b
    else:
        stride_b = x.stride_b >> 2
    return x.ptr + seq * stride_b + start.to(tl.int64) * x.stride_t


class Matrix(NamedTuple):
    """A tensor of two axes, the last with unit stride."""

    ptr: Tensor
    stride: int


def matrix(x: Tensor) -> Matrix:
    """A tensor of two axes."""
    return Matrix(x, x.stride(0))


@functools.cache
def constants(given: Any) -> Any:
    """A named tuple of flags or sizes, each known to the compiler."""
    return type(given)(*map(tl.constexpr, given))
