"""Sums of the parts that programs leave, in a fixed order: of all items, or of each sequence's.

Of all: gradients of parameters, several in one launch. A program has a few numbers of one of the sums, and walks that
one's parts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import launch, untold
from .chip import LENGTHS, cdiv, pow2
from .masks import Items, Spans, items_of

MOST = 6
"""Sums that a launch makes."""


class Sum(NamedTuple):
    """Σ_p parts[p], of matrices whose rows are contiguous; no pointers where there is none."""

    parts: Tensor | None  # (count, rows, width) float32
    out: Tensor | None  # (rows, width), contiguous
    count: int  # all 4 n + 3, see arguments.untold
    stride_p: int
    stride_row: int
    width: int
    size: int  # rows * width


@triton.jit
def _add_parts(x, program, blocks):
    at = program * blocks.N + tl.arange(0, blocks.N)
    inside = at < (x.size >> 2)
    width = (x.width >> 2).to(tl.int32)
    source = at // width * (x.stride_row >> 2) + at % width
    count = (x.count >> 2).to(tl.int32)
    acc = tl.zeros([blocks.N], tl.float32)
    for p0 in range(0, count, blocks.P):
        p = p0 + tl.arange(0, blocks.P)
        ptrs = x.parts + p[:, None].to(tl.int64) * (x.stride_p >> 2) + source[None, :]
        acc += tl.sum(tl.load(ptrs, mask=(p < count)[:, None] & inside[None, :], other=0.0), axis=0)
    tl.store(x.out + at, acc.to(x.out.dtype.element_ty), mask=inside)


@triton.jit
def add_or_next(x, program, blocks):
    """The sum x, if this program is one of its own; else which of the next one's it is, from 0."""
    if x.parts is not None:
        own = tl.cdiv((x.size >> 2).to(tl.int32), blocks.N)
        if (program >= 0) & (program < own):
            _add_parts(x, program, blocks)
        program -= own
    return program


@triton.jit
def _sums_kernel(a, b, c, d, e, f, blocks):
    program = add_or_next(a, tl.program_id(0), blocks)
    program = add_or_next(b, program, blocks)
    program = add_or_next(c, program, blocks)
    program = add_or_next(d, program, blocks)
    program = add_or_next(e, program, blocks)
    add_or_next(f, program, blocks)


class SumBlocks(NamedTuple):
    """Parts and numbers of a tile."""

    P: int
    N: int
    warps: int = 4


SUM_BLOCKS = SumBlocks(32, 128)
NO_SUM = Sum(None, None, 0, 0, 0, 0, 0)


def programs_of(x: Sum) -> int:
    """How many make a sum."""
    return cdiv(x.size >> 2, SUM_BLOCKS.N)


class Pending:
    """Sums that are to be made together, once all parts are there: in one launch, or where they are many in more."""

    def __init__(self) -> None:
        self.todo: list[Sum] = []

    def add(self, parts: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Room for the sum of ``parts (count, ...)``, all but rows contiguous, over the first axis; None for None."""
        if parts is None:
            return None
        out = parts.new_empty(parts.shape[1:], dtype=dtype)
        row = parts.stride(1) if parts.dim() == 3 else 0
        if out.numel():
            sizes = parts.shape[0], parts.stride(0), row, parts.shape[-1], out.numel()
            self.todo.append(Sum(parts, out, *map(untold, sizes)))
        return out

    def launch(self) -> None:
        """Make the sums."""
        for i in range(0, len(self.todo), MOST):
            some = self.todo[i : i + MOST]
            args = dict(zip("abcdef", some + [NO_SUM] * (MOST - len(some)), strict=True))
            launch(_sums_kernel, (sum(map(programs_of, some)),), args, SUM_BLOCKS)


def sums(given: Sequence[tuple[Tensor | None, torch.dtype]]) -> list[Tensor | None]:
    """The sums of each ``(parts, dtype)``, made at once: see `Pending`."""
    pending = Pending()
    out = [pending.add(*x) for x in given]
    pending.launch()
    return out


class ItemBlocks(NamedTuple):
    """Numbers of a tile."""

    A: int
    warps: int = 4


@triton.jit(do_not_specialize=LENGTHS)
def _item_sums_kernel(
    part_ptr,  # (items of this launch, A) float32
    sum_ptr,  # (S, A): added to, but by the first launch
    spans,
    item0,
    items,  # items of this launch
    per_seq,
    rows,
    A,
    blocks,
):
    seq = tl.program_id(0).to(tl.int64)
    a = tl.program_id(1) * blocks.A + tl.arange(0, blocks.A)
    lo, hi = items_of(seq, spans, per_seq, rows)
    lo = tl.maximum(lo, item0)
    hi = tl.minimum(hi, item0 + items)
    at = sum_ptr + seq * A + a
    acc = tl.load(at, mask=(a < A) & (item0 > 0), other=0.0).to(tl.float32)
    for i in range(lo, hi):
        acc += tl.load(part_ptr + (i - item0) * A + a, mask=a < A, other=0.0)
    tl.store(at, acc.to(at.dtype.element_ty), mask=a < A)


def add_items(parts: Tensor, total: Tensor, items: Items, item0: int, count: int) -> None:
    """Add to ``total (S, A)`` the ``parts (count, A)`` of the items from `item0` on; from the first on, write it."""
    seqs, A = total.shape
    blocks = ItemBlocks(pow2(A, 16, 128))
    args = {
        "part_ptr": parts,
        "sum_ptr": total,
        "spans": Spans(items.cu),
        "item0": item0,
        "items": count,
        "per_seq": items.per_seq,
        "rows": items.rows,
        "A": A,
    }
    launch(_item_sums_kernel, (seqs, cdiv(A, blocks.A)), args, blocks)
