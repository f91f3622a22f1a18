"""The factors of concat attention's score (see concat.py), e^{scale x} of each row, laid out by tiles.

(tiles, H, A, rows of a tile): one step of d loads whole vectors, from sequences that start anywhere. A is made even;
the feature that is added has v = 0. Activations that do not factor have rows themselves in the same layout.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Entries, Heads, constants, head_ptr, launch, untold
from .chip import LENGTHS, chip_of, pow2
from .location import load_rows
from .masks import Items, finite, locate, partition, sequence_of, unmasked
from .softmax import exp

FACTOR = {"tanh": 2.0, "sigmoid": -1.0}
"""The exponents of the activations that factor: α = e^{FACTOR q}."""

PART = 16
"""Rows of a tile that one program makes factors of."""


class Side(NamedTuple):
    """Queries or keys of the score, by tiles, and as masks.Spans which rows and tiles are a sequence's."""

    tiles: Tensor  # (items, H, 1 or 2, AP, rows of a tile) float32: factors, in one part or two, or rows themselves
    rows: Tensor | None  # (items, H, rows of a tile, AP) float32: the same with features contiguous
    bound: Tensor  # (items, H) float32: max|exponent|
    cu: Tensor | None
    seq: Tensor | None
    first: Tensor | None
    num_seqs: int  # 4 n + 3, see arguments.untold
    per_seq: int  # tiles of a sequence, 4 n + 3
    codes: Tensor | None = None  # (B, H, T): of the values, see masks.row_codes


@triton.jit
def tile_at(item, side, T, rows):
    """`locate` for tiles of so many rows."""
    return locate(item, side, T, side.num_seqs >> 2, side.per_seq >> 2, rows)


@triton.jit
def rows_of(seq, side, T):
    """`sequence_of`: first packed row, length and first tile of a sequence."""
    return sequence_of(seq, side, T, side.num_seqs >> 2, side.per_seq >> 2)


@triton.jit
def rows_before(seq, head, side, T, H):
    """Rows of a contiguous tensor (B, H, T) before those of a head, of a sequence; packed B = 1. Both are int64."""
    if side.cu is None:
        return (seq * H + head) * T
    else:
        return head * T


@triton.jit
def readable(inside, keep, seq, rows, flags):
    """Which of the rows inside, int64, may be read: all where they are packed."""
    if not flags.PACKED:
        inside = unmasked(keep, seq, rows, inside)
    return inside


@triton.jit(do_not_specialize=LENGTHS)
def _concat_factor_kernel(
    x,  # (B, H, T, A), or packed
    keep,  # (B, T): rows that may hold anything are False; or None
    side,  # to be filled; its bound is (items, H, parts)
    T,
    A,
    AP,
    tile_rows,  # a multiple of blocks.T
    scale,
    flags,
    blocks,
):
    """Tiles of e^{scale x}, or of x itself without EXP; rows past the end and features past A are exponent 0.

    A program has a part of a tile, of blocks.T rows: tiles of whatever length are one kernel.
    """
    parts = tile_rows // blocks.T
    item = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    head = tl.program_id(1).to(tl.int64)
    seq, start, lo, hi, _ = tile_at(item, side, T, tile_rows)
    i = part * blocks.T + tl.arange(0, blocks.T)
    rows = (start + lo + i).to(tl.int64)
    inside = readable(lo + i < hi, keep, seq, rows, flags)
    ptrs = head_ptr(x, seq, head) + rows * x.stride_t
    tile = (item.to(tl.int64) * tl.num_programs(1) + head) * AP * tile_rows
    planes: tl.constexpr = 2 if flags.EXP and flags.EXACT else 1
    bound = tl.zeros([blocks.T], tl.float32)
    for a0 in range(0, AP, blocks.A):
        a = a0 + tl.arange(0, blocks.A)
        y = load_rows(ptrs, inside, a, A).to(tl.float32)
        if flags.EXP:
            y *= scale  # a power of two
            bound = tl.maximum(bound, tl.max(tl.abs(y), axis=1))
            if flags.EXACT:
                full = tl.exp(y.to(tl.float64))
                y = full.to(tl.float32)
                rest = (full - y.to(tl.float64)).to(tl.float32)
                at = planes * tile + (AP + a[None, :]) * tile_rows + i[:, None]
                tl.store(side.tiles + at, rest, mask=(a < AP)[None, :])
            else:
                y = exp(y, flags.FMA)
        tl.store(side.tiles + planes * tile + a[None, :] * tile_rows + i[:, None], y, mask=(a < AP)[None, :])
        if side.rows is not None:
            # The backward takes these times gradients that are 0 where a row is hidden: NaN must not come of it.
            if flags.EXP:
                y = tl.where(y == y, y, 1.0)
            else:
                y = finite(y)
            tl.store(side.rows + tile + i[:, None] * AP + a[None, :], y, mask=(a < AP)[None, :])
    tl.store(side.bound + (item * tl.num_programs(1) + head) * parts + part, tl.max(bound, axis=0))


# ---------------------------------------------------------------------------------------------------------------
# Launcher
# ---------------------------------------------------------------------------------------------------------------


class FactorBlocks(NamedTuple):
    """Rows of a tile that a program makes factors of, and features at a time."""

    T: int
    A: int
    warps: int = 4


class FactorFlags(NamedTuple):
    """What the kernel that makes factors is compiled for."""

    EXP: bool
    EXACT: bool
    FMA: bool
    PACKED: bool


def factors(
    x: Heads, keep: Entries, cu_seqlens: Tensor | None, rows: int, activation: str, *, transposed: bool = False
) -> tuple[Side, Items]:
    """Exponentials of ``x (B, H, T, A)`` (packed: B = 1), or x itself, in tiles of `rows` rows."""
    like = x.ptr
    B, H, T, A = like.shape
    seqs = B if cu_seqlens is None else cu_seqlens.numel() - 1
    items = partition(seqs, T, rows, cu_seqlens, always=True)
    width, parts, exponents = A + A % 2, rows // PART, activation in FACTOR
    exact = exponents and like.dtype == torch.float32

    def room(*shape: int) -> Tensor:
        return torch.empty(items.count, H, *shape, dtype=torch.float32, device=like.device)

    side = Side(
        room(2 if exact else 1, width, rows),
        room(rows, width) if transposed else None,
        room(parts),
        *items.spans(cu_seqlens),
        untold(seqs),
        untold(items.per_seq),
    )
    args = {
        "x": x,
        "keep": keep,
        "side": side,
        "T": T,
        "A": A,
        "AP": width,
        "tile_rows": rows,
        "scale": FACTOR.get(activation, 1.0),
    }
    fma = chip_of(like.device).backend != "interpreter"
    args["flags"] = constants(FactorFlags(exponents, exact, fma, cu_seqlens is not None))
    blocks = FactorBlocks(PART, pow2(width, 2, 16 if exact else 32))
    launch(_concat_factor_kernel, (items.count * parts, H), args, blocks)
    return side._replace(bound=side.bound.squeeze(2) if parts == 1 else side.bound.amax(2)), items
