"""Which rows a program works on, which keys a query sees, and which weights dropout keeps.

A launch is over *items*: consecutive rows of one sequence, at most `Items.rows` of them. For a padded batch
item -> (sequence, part) is a division. For a ragged batch the lengths are known on the device only, so the first
item of sequence s has the place ``cu[s] // rows + s``, which needs no other sequence's items: a launch has
``N // rows + S`` of them, at most one of a sequence to spare, which finds an empty range. An item's sequence is found
by a look at `LOOK` of these places at a time.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import entry_ptr, load_pairs, untold
from .chip import cdiv

LOOK = tl.constexpr(32)
"""Sequences that a program looks at in one step of a search: a lane each."""


class Spans(NamedTuple):
    """Which rows are a sequence's, for kernels that call `locate`."""

    cu: Tensor | None  # (S + 1,): first row of each sequence; None: the batch is padded


class Items(NamedTuple):
    """The partition of a batch into items."""

    count: int
    rows: int  # most rows an item has
    per_seq: int  # items of each sequence; 0 where that differs between sequences
    cu: Tensor | None = None  # see Spans


class Dropout(NamedTuple):
    """What a kernel drops, see `dropout_scale`."""

    seed: Tensor | None  # (1,) int64, or None: nothing is dropped
    threshold: int  # of 24 bits of a word, as 4 n + 3: see arguments.untold
    scale: float


def dropout(seed: Tensor | None, p: float) -> Dropout:
    """Weights are dropped with the probability p, where there is a seed."""
    return Dropout(seed, untold(round(p * 2**24)), 1.0 / (1.0 - p))


def partition(batch: int, length: int, rows: int, cu_seqlens: Tensor | None) -> Items:
    """Items of at most `rows` rows. Padded: `batch` sequences of `length`; ragged: `batch` over `length` rows.

    Few packed rows are an item a sequence.
    """
    if cu_seqlens is None:
        per_seq = cdiv(length, rows)
        return Items(batch * per_seq, rows, per_seq)
    if length <= rows:
        return Items(batch, rows, 1, cu_seqlens)
    return Items(length // rows + batch, rows, 0, cu_seqlens)


def row_codes(keep: Tensor | None, x: Tensor, value: Tensor | None = None) -> Tensor:
    """What may be done with the rows of ``x (B, H, T, D)``, uint8 ``(B, H, T)``.

    keep: which may be read at all, ``(B, T)`` or broadcastable to ``(B, H, T)``; None: all.

    0: a mask hides it, and nothing is read. 1: all is. 2: its row of `value` is not finite. 3: nor is it itself.
    A row that is not finite is to reach the queries that see it, and no other; but in a product its weight 0 would
    make it NaN for all of a tile. So it is not read, and its code says where NaN belongs.
    """

    def lost(y: Tensor) -> Tensor:
        return ~torch.linalg.vector_norm(y, torch.inf, dim=-1).isfinite()

    codes = torch.ones(x.shape[:-1], dtype=torch.uint8, device=x.device)
    if value is not None:
        codes += lost(value)
    codes.masked_fill_(lost(x), 3)
    return codes if keep is None else codes.mul_(keep[:, None] if keep.dim() == 2 else keep)


@triton.jit
def first_item(seq, spans, per_seq, rows):
    """The first item of a sequence, or how many there are of all, for the sequence S."""
    if spans.cu is None:
        return seq * per_seq
    else:
        return tl.where(per_seq == 0, tl.load(spans.cu + seq) // rows + seq, seq * per_seq)


@triton.jit
def sequence_at(item, spans, num_seqs, per_seq, rows):
    """The sequence of an item: the last one whose first item is not past it."""
    if spans.cu is None:
        return item // per_seq
    else:
        seq = tl.where(per_seq == 0, 0, item)
        left = tl.where(per_seq == 0, num_seqs, 1)  # it is one of so many from `seq` on
        while left > 1:
            left = tl.cdiv(left, LOOK)
            s = seq + tl.arange(0, LOOK) * left
            before = s < num_seqs
            before = before & (tl.load(spans.cu + s, mask=before, other=0) // rows + s <= item)
            seq = tl.max(tl.where(before, s, 0), axis=0)
        return seq


@triton.jit
def follow(seq, item, spans, per_seq, rows):
    """The sequence of an item, where `seq` is that of the item before it or its own: none is without an item."""
    if spans.cu is None:
        return item // per_seq
    else:
        return seq + (first_item(seq + 1, spans, per_seq, rows) <= item).to(tl.int32)


@triton.jit
def place(item, seq, spans, T, per_seq, rows):
    """`locate` of an item whose sequence is known."""
    if spans.cu is None:
        part = item % per_seq
        start = 0
        length = T
        items = per_seq
    else:
        start = tl.load(spans.cu + seq)
        end = tl.load(spans.cu + seq + 1)
        length = end - start
        part = tl.where(per_seq == 0, item - (start // rows + seq), 0)
        items = tl.where(per_seq == 0, end // rows - start // rows + 1, 1)
    lo = part * rows
    return seq.to(tl.int64), start, lo, tl.minimum(lo + rows, length), items


@triton.jit
def locate(item, spans, T, num_seqs, per_seq, rows):
    """(sequence as int64, its first packed row, first and past-the-last local row of the item, items of it)."""
    return place(item, sequence_at(item, spans, num_seqs, per_seq, rows), spans, T, per_seq, rows)


@triton.jit
def sequence_of(seq, spans, T):
    """(first packed row, length) of a sequence."""
    if spans.cu is None:
        start = seq * 0
        length = T
    else:
        start = tl.load(spans.cu + seq)
        length = tl.load(spans.cu + seq + 1) - start
    return start, length


@triton.jit
def unmasked(mask, seq, rows, inside):
    """Which of the rows inside of a sequence a mask, one number a row or None, leaves."""
    if mask.ptr is not None:
        inside = tl.load(entry_ptr(mask, seq, rows), mask=inside, other=0) != 0
    return inside


@triton.jit
def item_rows(item, seq, mask, spans, T, per_seq, BLOCK_T: tl.constexpr):
    """Of an item of `seq`: (that as int64, local rows [BLOCK_T], which exist, packed rows, which may be read)."""
    seq, start, lo, hi, _ = place(item, seq, spans, T, per_seq, BLOCK_T)
    t = lo + tl.arange(0, BLOCK_T)
    inside = t < hi
    rows = (start + t).to(tl.int64)
    return seq, t, inside, rows, unmasked(mask, seq, rows, inside)


@triton.jit
def items_of(seq, spans, per_seq, rows):
    """First and past-the-last item of a sequence, an int64."""
    return first_item(seq, spans, per_seq, rows), first_item(seq + 1, spans, per_seq, rows)


@triton.jit
def _factor(word, dropout):
    """What the weight of a random word is multiplied with: 0 where it is dropped and `scale` where it is kept."""
    return tl.where((word >> 8).to(tl.int32) >= dropout.threshold >> 2, dropout.scale, 0.0)


@triton.jit
def _words(dropout, position, sequence, hop):
    """The four words of (position, hop), of (position + 8, hop), (position, hop + 8) and both: see `_dropout.py`.

    position and hop: without bit 3, uint32, of shapes that broadcast.
    """
    c0, c2 = tl.broadcast(position, hop)
    return tl.philox(tl.load(dropout.seed), c0, tl.zeros_like(c0) + sequence.to(tl.uint32), c2, tl.zeros_like(c0))


@triton.jit
def dropout_scale(dropout, position, sequence, hop):
    """0 where a weight is dropped and `scale` where it is kept; the words are those of `_dropout.py`.

    position [BLOCK_T, 1], sequence a scalar, hop [1, BLOCK_R] -> [BLOCK_T, BLOCK_R]
    """
    c0, c2 = position.to(tl.uint32), hop.to(tl.uint32)
    w0, w1, w2, w3 = _words(dropout, c0 - (c0 & 8), sequence, c2 - (c2 & 8))
    first = (c0 & 8) == 0
    word = tl.where((c2 & 8) == 0, tl.where(first, w0, w1), tl.where(first, w2, w3))
    return _factor(word, dropout)


@triton.jit
def _without_bit_3(first, BLOCK: tl.constexpr):
    """Those of the numbers [first, first + BLOCK), both multiples of 16, whose bit 3 is 0."""
    n = tl.arange(0, BLOCK // 2)
    return (first + (((n >> 3) << 4) + (n & 7))).to(tl.uint32)


@triton.jit
def dropout_tile(
    dropout,
    position0,
    sequence,
    hop0,  # the first of the tile's, multiples of 16
    POSITIONS: tl.constexpr,
    HOPS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """`dropout_scale` of a tile [HOPS, POSITIONS], or [POSITIONS, HOPS], with a call of Philox for four weights.

    The four that differ in bit 3 belong to one thread in the layout of a matrix product and in that of its transpose.
    """
    position, hop = _without_bit_3(position0, POSITIONS), _without_bit_3(hop0, HOPS)
    ROWS: tl.constexpr = POSITIONS if TRANSPOSED else HOPS
    COLS: tl.constexpr = HOPS if TRANSPOSED else POSITIONS
    if TRANSPOSED:
        w00, w10, w01, w11 = _words(dropout, position[:, None], sequence, hop[None, :])
    else:
        w00, w01, w10, w11 = _words(dropout, position[None, :], sequence, hop[:, None])
    # w10: bit 3 of the row is set. [ROWS / 2, COLS / 2, 2, 2], the last two bit 3 of the column and of the row
    words = tl.join(tl.join(w00, w01), tl.join(w10, w11))
    words = tl.reshape(words, [ROWS // 16, 8, COLS // 16, 8, 2, 2])
    words = tl.reshape(tl.permute(words, [0, 5, 1, 2, 4, 3]), [ROWS, COLS])
    return _factor(words, dropout)


@triton.jit
def finite(x):
    """X with zeros for what is not finite: 0 · NaN would carry a hidden row into a product."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0).to(x.dtype)


class Window(NamedTuple):
    """How many keys before its own place and after it a query sees."""

    left: int  # 4 n + 3: see arguments.untold
    right: int  # 4 n + 3
    HAS_LEFT: Any  # constexpr; where not, it sees all that are before it
    HAS_RIGHT: Any


@functools.lru_cache(maxsize=1024)
def window(left: int | None, right: int | None) -> Window:
    """None: that side has no end."""
    return Window(
        untold(left or 0), untold(right or 0), tl.constexpr(left is not None), tl.constexpr(right is not None)
    )


@triton.jit
def mirrored(window):
    """The queries that see a key, as a window around its place."""
    return Window(window.right, window.left, window.HAS_RIGHT, window.HAS_LEFT)


@triton.jit
def window_sides(window):
    """(left, right) as int32: as 4 n + 3 a large one is an int64."""
    return (window.left >> 2).to(tl.int32), (window.right >> 2).to(tl.int32)


@triton.jit
def window_range(window, lo, hi, length):
    """First and past-the-last key that any query of [lo, hi) sees."""
    left, right = window_sides(window)
    first = 0
    last = length
    if window.HAS_LEFT:
        first = tl.maximum(lo - left, 0)
    if window.HAS_RIGHT:
        last = tl.minimum(hi + right, length)
    return first, last


@triton.jit
def whole_window(window, lo, hi, length):
    """First and past-the-last key that every query of [lo, hi) sees; first may be past last."""
    return window_range(window, hi - 1, lo + 1, length)


@triton.jit
def window_tiles(window, lo, hi, length, BLOCK: tl.constexpr):
    """First and past-the-last tile of keys that any query of [lo, hi), which may be empty, sees."""
    first, last = window_range(window, lo, hi, length)
    tile0 = first // BLOCK
    return tile0, tl.where((last > first) & (hi > lo), tl.cdiv(last, BLOCK), tile0)


@triton.jit
def split_tiles(tile0, tile1, split, splits):
    """First and past-the-last of the tiles [tile0, tile1) that one of so many programs has; there may be none."""
    tiles = tile1 - tile0
    each = tl.cdiv(tiles, splits)
    return tile0 + split * each, tile0 + tl.minimum((split + 1) * each, tiles)


@triton.jit
def window_pairs(window, mask, starts, seq, head, i, j, Tk, inside):
    """Which of the pairs `inside`, rows that may be read, of a head of a sequence are visible, as `in_window`."""
    if mask.ptr is not None:
        inside = inside & (load_pairs(mask, starts, seq, head, i, j, Tk, inside) != 0)
    return in_window(window, i, j, inside)


@triton.jit
def in_window(window, i, j, inside):
    """Which of the pairs `inside` of queries i and keys j are in the window, for a tile whose rows are either.

    i [BLOCK_M, 1] and j [1, BLOCK_N], or i [1, BLOCK_M] and j [BLOCK_N, 1].
    """
    left, right = window_sides(window)
    if window.HAS_LEFT:
        inside = inside & (j >= i - left)
    if window.HAS_RIGHT:
        inside = inside & (j <= i + right)
    return inside
