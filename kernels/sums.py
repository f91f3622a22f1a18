"""Gradients of parameters: programs leave a part each, and one launch sums them, in a fixed order.

A program has a few numbers of one of the sums, and walks that one's parts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import launch, untold
from .chip import cdiv

MOST = 6
"""Sums that a launch makes."""


class Sum(NamedTuple):
    """Σ_p parts[p], of matrices whose rows are contiguous; no pointers where there is none."""

    parts: Tensor | None  # (count, rows, width) float32
    out: Tensor | None  # (rows, width), contiguous
    count: int  # 4 n + 3, see arguments.untold
    stride_p: int
    stride_row: int
    width: int
    size: int  # rows * width


@triton.jit
def _add_parts(x, program, blocks):
    at = program * blocks.N + tl.arange(0, blocks.N)
    inside = at < x.size
    source = at // x.width * x.stride_row + at % x.width
    count = (x.count >> 2).to(tl.int32)
    acc = tl.zeros([blocks.N], tl.float32)
    for p0 in range(0, count, blocks.P):
        p = p0 + tl.arange(0, blocks.P)
        ptrs = x.parts + p[:, None].to(tl.int64) * x.stride_p + source[None, :]
        acc += tl.sum(tl.load(ptrs, mask=(p < count)[:, None] & inside[None, :], other=0.0), axis=0)
    tl.store(x.out + at, acc.to(x.out.dtype.element_ty), mask=inside)


@triton.jit
def _or_next(x, program, blocks):
    """The sum x, if this program is one of its own; else which of the next one's it is, from 0."""
    if x.parts is not None:
        own = tl.cdiv(x.size, blocks.N)
        if (program >= 0) & (program < own):
            _add_parts(x, program, blocks)
        program -= own
    return program


@triton.jit
def _sums_kernel(a, b, c, d, e, f, blocks):
    program = _or_next(a, tl.program_id(0), blocks)
    program = _or_next(b, program, blocks)
    program = _or_next(c, program, blocks)
    program = _or_next(d, program, blocks)
    program = _or_next(e, program, blocks)
    _or_next(f, program, blocks)


class SumBlocks(NamedTuple):
    """Parts and numbers of a tile."""

    P: int
    N: int
    warps: int = 4


def sums(given: Sequence[tuple[Tensor | None, torch.dtype]]) -> list[Tensor | None]:
    """Of each ``(parts (count, ...), dtype)`` the sum over the first axis; None for None. All but rows contiguous."""
    blocks = SumBlocks(32, 128)
    out: list[Tensor | None] = [None if x is None else x.new_empty(x.shape[1:], dtype=to) for x, to in given]
    todo = [
        Sum(x, y, untold(x.shape[0]), x.stride(0), x.stride(1) if x.dim() == 3 else 0, x.shape[-1], y.numel())
        for (x, _), y in zip(given, out, strict=True)
        if x is not None and y is not None and y.numel()
    ]
    assert len(todo) <= MOST
    if todo:
        none = Sum(None, None, 0, 0, 0, 0, 0)
        args = dict(zip("abcdef", todo + [none] * (MOST - len(todo)), strict=True))
        launch(_sums_kernel, (sum(cdiv(x.size, blocks.N) for x in todo),), args, blocks)
    return out
