"""Which rows a program works on, which keys a query sees, and which weights dropout keeps.

A launch is over *items*: consecutive rows of one sequence, at most `Items.rows` of them. For a padded batch
item -> (sequence, part) is a division. For a ragged batch the lengths are known on the device only, so the
map is made there without a synchronisation: the launch has as many items as the worst case needs
(`N // rows + S`), at most one of them a sequence to spare, and these find an empty range.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import entry_ptr, launch, load_pairs, untold
from .chip import LENGTHS, cdiv


class Spans(NamedTuple):
    """Which rows are a sequence's, and which items: of packed rows, for kernels that call `locate`."""

    cu: Tensor | None  # (S + 1,): first row of each sequence; None: the batch is padded
    seq: Tensor | None = None  # (count,) int32: sequence of each item, S of those to spare; None: item = sequence
    first: Tensor | None = None  # (S + 1,) int32: first item of each sequence, cu // rows + s; None as above


class Items(NamedTuple):
    """The partition of a batch into items."""

    count: int
    rows: int  # most rows an item has
    per_seq: int  # items of each sequence; 0 where that differs between sequences
    seq: Tensor | None  # see Spans
    first: Tensor | None

    def spans(self, cu_seqlens: Tensor | None) -> Spans:
        """What a launcher passes to kernels that call `locate`, beside `per_seq`."""
        return Spans(cu_seqlens, self.seq, self.first)


class Dropout(NamedTuple):
    """What a kernel drops, see `dropout_scale`."""

    seed: Tensor | None  # (1,) int64, or None: nothing is dropped
    threshold: int  # of 24 bits of a word, as 4 n + 3: see arguments.untold
    scale: float


def dropout(seed: Tensor | None, p: float) -> Dropout:
    """Weights are dropped with the probability p, where there is a seed."""
    return Dropout(seed, untold(round(p * 2**24)), 1.0 / (1.0 - p))


def partition(batch: int, length: int, rows: int, cu_seqlens: Tensor | None, *, always: bool = False) -> Items:
    """Items of at most `rows` rows. Padded: `batch` sequences of `length`; ragged: `batch` over `length` rows.

    Few packed rows are an item a sequence, with no map to make, unless there is `always` to be one: a kernel with a
    map is another variant than one without.
    """
    if cu_seqlens is None:
        per_seq = cdiv(length, rows)
        return Items(batch * per_seq, rows, per_seq, None, None)
    if length <= rows and not always:
        return Items(batch, rows, 1, None, None)
    count = length // rows + batch
    seq, first = cu_seqlens.new_empty(count), cu_seqlens.new_empty(batch + 1)
    args = {"cu_ptr": cu_seqlens.contiguous(), "seq_ptr": seq, "first_ptr": first, "num_seqs": batch, "rows": rows}
    if batch:
        launch(_partition_kernel, (batch,), args, PartitionBlocks(128))
    return Items(count, rows, 0, seq, first)


class PartitionBlocks(NamedTuple):
    """Items that are written at a time."""

    I: int
    warps: int = 1


@triton.jit(do_not_specialize=LENGTHS)
def _partition_kernel(
    cu_ptr,  # (S + 1,) int32
    seq_ptr,  # (count,) int32, see Spans
    first_ptr,  # (S + 1,) int32
    num_seqs,
    rows,
    blocks,
):
    """The items of a sequence, whose places no other sequence needs to know of: see Spans."""
    seq = tl.program_id(0)
    start = tl.load(cu_ptr + seq)
    end = tl.load(cu_ptr + seq + 1)
    first = start // rows + seq
    past = end // rows + seq + 1
    tl.store(first_ptr + seq, first)
    if seq == num_seqs - 1:
        tl.store(first_ptr + num_seqs, past)
    used = first + tl.maximum(tl.cdiv(end - start, rows), 1)  # an empty sequence has one too, which says so
    for i0 in range(first, past, blocks.I):
        i = i0 + tl.arange(0, blocks.I)
        tl.store(seq_ptr + i, tl.where(i < used, seq, num_seqs), mask=i < past)


def row_codes(keep: Tensor | None, x: Tensor, value: Tensor | None = None) -> Tensor:
    """What may be done with the rows of ``x (B, H, T, D)``, uint8 ``(B, H, T)``, where `keep` is None or ``(B, T)``.

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
    return codes if keep is None else codes.mul_(keep[:, None])


@triton.jit
def locate(item, spans, T, num_seqs, per_seq, rows):
    """(sequence as int64, its first packed row, first and past-the-last local row of the item, items of it)."""
    if spans.cu is None:
        seq = item // per_seq
        part = item % per_seq
        start = 0
        length = T
        items = per_seq
    else:
        if spans.seq is None:
            seq = item
            part = 0
            items = 1
        else:
            seq = tl.load(spans.seq + item)
            first = tl.load(spans.first + seq)
            part = tl.maximum(item - first, 0)  # one to spare: nothing of the empty sequence S
            items = tl.load(spans.first + seq + 1, mask=seq < num_seqs, other=0) - first
        start = tl.load(spans.cu + seq)
        # An item past the end has seq == num_seqs: an empty range.
        length = tl.load(spans.cu + seq + 1, mask=seq < num_seqs, other=0) - start
    lo = part * rows
    return seq.to(tl.int64), start, lo, tl.minimum(lo + rows, length), items


@triton.jit
def sequence_of(seq, spans, T, num_seqs, per_seq):
    """(first packed row, length, first item) of a sequence; an empty one for seq = num_seqs."""
    if spans.cu is None:
        start = seq * 0
        length = T
        item = seq * per_seq
    else:
        start = tl.load(spans.cu + seq)
        length = tl.load(spans.cu + seq + 1, mask=seq < num_seqs, other=0) - start
        if spans.first is None:
            item = seq
        else:
            item = tl.load(spans.first + seq).to(tl.int64)
    return start, length, item


@triton.jit
def unmasked(mask, seq, rows, inside):
    """Which of the rows inside of a sequence a mask, one number a row or None, leaves."""
    if mask.ptr is not None:
        inside = tl.load(entry_ptr(mask, seq, rows), mask=inside, other=0) != 0
    return inside


@triton.jit
def item_rows(item, mask, spans, T, num_seqs, per_seq, BLOCK_T: tl.constexpr):
    """(sequence, local rows of the item [BLOCK_T], which of them exist, packed rows, which may be read)."""
    seq, start, lo, hi, _ = locate(item, spans, T, num_seqs, per_seq, BLOCK_T)
    t = lo + tl.arange(0, BLOCK_T)
    inside = t < hi
    rows = (start + t).to(tl.int64)
    return seq, t, inside, rows, unmasked(mask, seq, rows, inside)


@triton.jit
def items_of(seq, first_ptr, per_seq):
    """First and past-the-last item of a sequence, both int64; first_ptr: Spans.first, or None."""
    if first_ptr is None:
        lo = seq * per_seq
        hi = lo + per_seq
    else:
        lo = tl.load(first_ptr + seq).to(tl.int64)
        hi = tl.load(first_ptr + seq + 1).to(tl.int64)
    return lo, hi


@triton.jit
def dropout_scale(dropout, position, sequence, hop):
    """0 where a weight is dropped and `scale` where it is kept; the words are those of `_dropout.py`.

    position [BLOCK_T, 1], sequence a scalar, hop [1, BLOCK_R] -> [BLOCK_T, BLOCK_R]
    """
    seed = tl.load(dropout.seed)
    c0, c2 = tl.broadcast(position.to(tl.uint32), hop.to(tl.uint32))
    c1 = tl.zeros_like(c0) + sequence.to(tl.uint32)
    word, _, _, _ = tl.philox(seed, c0, c1, c2, tl.zeros_like(c0))
    return tl.where((word >> 8).to(tl.int32) >= dropout.threshold >> 2, dropout.scale, 0.0)


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
    """First and past-the-last tile of keys that any query of [lo, hi) sees."""
    first, last = window_range(window, lo, hi, length)
    tile0 = first // BLOCK
    return tile0, tl.where(last > first, tl.cdiv(last, BLOCK), tile0)


@triton.jit
def split_tiles(tile0, tile1, split, splits):
    """First and past-the-last of the tiles [tile0, tile1) that one of so many programs has; there may be none."""
    tiles = tile1 - tile0
    each = tl.cdiv(tiles, splits)
    return tile0 + split * each, tile0 + tl.minimum((split + 1) * each, tiles)


@triton.jit
def window_pairs(window, mask, seq, head, i, j, inside):
    """Which of the pairs `inside`, rows that may be read, of a head of a sequence are visible, as `in_window`."""
    if mask.ptr is not None:
        inside = inside & (load_pairs(mask, seq, head, i, j, inside) != 0)
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
