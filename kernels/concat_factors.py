"""What is made once for the kernels of concat attention (see concat.py), in one launch.

The factors of the score, e^{scale x} of each row of queries and keys, laid out by tiles (tiles, H, A, rows of one):
one step of d loads whole vectors, from sequences that start anywhere. A is made even; the feature that is added has
v = 0. Activations that do not factor have rows themselves in the same layout. Besides, v in float32 and its sum, and
for a backward δ of the queries.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Heads, constants, head_ptr, launch, pitch, untold
from .chip import LENGTHS, chip_of, pow2
from .masks import finite, first_item, locate, partition, sequence_of, unmasked
from .softmax import exp, load_dlse
from .tiles import load_rows

FACTOR = {"tanh": 2.0, "sigmoid": -1.0}
"""The exponents of the activations that factor: α = e^{FACTOR q}."""

PART = tl.constexpr(16)
"""Rows of a tile that one program makes factors of."""

UNIT = tl.constexpr(256)
"""Keys, from one of its multiples on, of which all scores factor or none: of every kernel a multiple of its tile."""


class Side(NamedTuple):
    """Queries or keys of the score, by tiles, and as masks.Spans which rows and tiles are a sequence's."""

    tiles: Tensor  # (items, H, 1 or 2, AP, rows of a tile) float32: factors, in one part or two, or rows themselves
    rows: Tensor | None  # (items, H, rows of a tile, AP) float32: the same with features contiguous
    bound: Tensor  # (items, H, parts of PART rows) float32: max|exponent|
    cu: Tensor | None
    num_seqs: int  # 4 n + 3, see arguments.untold
    per_seq: int  # tiles of a sequence, 4 n + 3
    codes: Tensor | None = None  # (B, H, T): of the values, see masks.row_codes
    pairs: Tensor | None = None  # of keys, where there is a number a pair of packed rows: see inputs.pair_starts


@triton.jit
def tile_at(item, side, T, rows):
    """`locate` for tiles of so many rows."""
    return locate(item, side, T, side.num_seqs >> 2, side.per_seq >> 2, rows)


@triton.jit
def rows_of(seq, side, T, rows):
    """First packed row, length and first tile, of so many rows, of a sequence, an int64."""
    start, length = sequence_of(seq, side, T)
    return start, length, first_item(seq, side, side.per_seq >> 2, rows)


@triton.jit
def rows_before(seq, head, side, T, H):
    """Rows of a contiguous tensor (B, H, T) before those of a head, of a sequence; packed B = 1. Both are int64."""
    if side.cu is None:
        return (seq * H + head) * T
    else:
        return head * T


@triton.jit
def pairs_at(i, j, seq, head, q_side, k_side, k_length, Tq, Tk, size):
    """Where pairs of queries i and keys j are in a contiguous (B, H, Tq, Tk), or of packed rows (H, pairs)."""
    if k_side.pairs is None:
        pair = (rows_before(seq, head, q_side, Tq, size.H) + i) * Tk + j
    else:
        of_head = tl.load(k_side.pairs + (k_side.num_seqs >> 2))
        pair = head * of_head + tl.load(k_side.pairs + seq) + i.to(tl.int64) * k_length + j
    return pair


@triton.jit
def bound_at(side, tile, ROWS: tl.constexpr):
    """max|exponent| of a tile of so many rows; tile = item * H + head, int64."""
    parts: tl.constexpr = ROWS // PART
    if parts == 1:
        bound = tl.load(side.bound + tile)
    else:
        bound = tl.max(tl.load(side.bound + tile * parts + tl.arange(0, parts)), axis=0)
    return bound


@triton.jit
def unit_bound(side, item0, tile, head, length, H, ROWS: tl.constexpr):
    """max|exponent| of the UNIT rows of a sequence that a tile is among.

    The forward has other tiles than the backward: decided by tiles, a score would be another, and with it a weight.
    """
    parts: tl.constexpr = ROWS // PART
    if ROWS == UNIT:  # what follows spilled
        bound = bound_at(side, (item0 + tile).to(tl.int64) * H + head, ROWS)
    else:
        part = tl.arange(0, UNIT // PART)
        at = tile // (UNIT // ROWS) * (UNIT // ROWS) + part // parts
        parts_at = ((item0 + at).to(tl.int64) * H + head) * parts + part % parts
        bound = tl.max(tl.load(side.bound + parts_at, mask=at * ROWS < length, other=0.0), axis=0)
    return bound


class Vector(NamedTuple):
    """The vector v of the score."""

    given: Tensor  # (H, A), contiguous
    ptr: Tensor  # (H, AP) float32
    sum: Tensor  # (H,) float32: Σ_d v_d


class Saved(NamedTuple):
    """Of the queries, contiguous: gradients that came, and what the forward left. Nothing in a forward."""

    do: Tensor | None = None  # (B, H, Tq, DV)
    scores: Tensor | None = None  # (B, H, Tq, Tk), or packed (H, P), float32: gradient of the scores
    out: Tensor | None = None  # (B, H, Tq, DV) float32
    lse: Tensor | None = None  # (B, H, Tq, 2) float32: (m, l)
    dlse: Tensor | None = None  # the same
    delta: Tensor | None = None  # (B, H, Tq) float32: dO · o - l dl; of float32 values -l dl


@triton.jit
def _store_vector(v, head, size, blocks):
    total = 0.0
    for a0 in range(0, size.AP, blocks.A):
        a = a0 + tl.arange(0, blocks.A)
        x = tl.load(v.given + head * size.A + a, mask=a < size.A, other=0.0).to(tl.float32)
        tl.store(v.ptr + head * size.AP + a, x, mask=a < size.AP)
        total += tl.sum(x, axis=0)
    tl.store(v.sum + head, total)


@triton.jit
def _store_delta(rows, inside, saved, size, flags, blocks):
    """δ of rows of a contiguous (B, H, Tq)."""
    delta = tl.zeros([blocks.T], tl.float32)
    if not flags.GAP:
        for d0 in range(0, size.DV, blocks.A):
            d = d0 + tl.arange(0, blocks.A)
            do = load_rows(saved.do + rows * size.DV, inside, d, size.DV).to(tl.float32)
            delta += tl.sum(do * load_rows(saved.out + rows * size.DV, inside, d, size.DV), axis=1)
    if saved.dlse is not None:
        delta -= load_dlse(saved.dlse + rows * 2, saved.lse + rows * 2, inside)
    tl.store(saved.delta + rows, delta, mask=inside)


@triton.jit
def _store_factors(x, keep, side, program, head, saved, T, tile_rows, scale, size, flags, blocks):
    """A part of a tile, of blocks.T rows; rows past the end and features past A are exponent 0.

    With `saved` δ of these rows, too.
    """
    parts = tile_rows // blocks.T
    item = program // parts
    part = program % parts
    seq, start, lo, hi, _ = tile_at(item, side, T, tile_rows)
    i = part * blocks.T + tl.arange(0, blocks.T)
    rows = (start + lo + i).to(tl.int64)
    inside = lo + i < hi
    if saved.delta is not None:
        _store_delta(rows_before(seq, head, side, T, size.H) + rows, inside, saved, size, flags, blocks)
    inside = unmasked(keep, seq, rows, inside)
    ptrs = head_ptr(x, seq, head) + rows * pitch(x)
    tile = (item.to(tl.int64) * size.H + head) * size.AP * tile_rows
    planes: tl.constexpr = 2 if flags.EXP and flags.EXACT else 1
    bound = tl.zeros([blocks.T], tl.float32)
    for a0 in range(0, size.AP, blocks.A):
        a = a0 + tl.arange(0, blocks.A)
        y = load_rows(ptrs, inside, a, size.A).to(tl.float32)
        if flags.EXP:
            y *= scale  # a power of two
            # The largest of numbers and NaN may be any of them: a tile that has NaN does not factor.
            bound = tl.maximum(bound, tl.max(tl.where(y == y, tl.abs(y), float("inf")), axis=1))
            if flags.EXACT:
                full = tl.exp(y.to(tl.float64))
                y = full.to(tl.float32)
                rest = (full - y.to(tl.float64)).to(tl.float32)
                at = planes * tile + (size.AP + a[None, :]) * tile_rows + i[:, None]
                tl.store(side.tiles + at, rest, mask=(a < size.AP)[None, :])
            else:
                y = exp(y, flags.FMA)
        tl.store(side.tiles + planes * tile + a[None, :] * tile_rows + i[:, None], y, mask=(a < size.AP)[None, :])
        if side.rows is not None:
            # The backward takes these times gradients that are 0 where a row is hidden: NaN must not come of it.
            if flags.EXP:
                y = tl.where(y == y, y, 1.0)
            else:
                y = finite(y)
            tl.store(side.rows + tile + i[:, None] * size.AP + a[None, :], y, mask=(a < size.AP)[None, :])
    tl.store(side.bound + (item * size.H + head) * parts + part, tl.max(bound, axis=0))


@triton.jit(do_not_specialize=LENGTHS)
def _concat_factor_kernel(
    q,  # (B, H, Tq, A), or packed
    k,  # (B, H, Tk, A)
    v,
    q_rows,  # (B, Tq): rows that may hold anything are 0; or None
    k_rows,  # (B, Tk)
    q_side,  # to be filled
    k_side,
    saved,
    Tq,
    Tk,
    q_items,
    q_tile,  # rows of a tile, a multiple of blocks.T: tiles of whatever length are one kernel
    k_tile,
    scale,
    size,
    flags,
    blocks,
):
    program = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    of_queries = q_items * (q_tile // blocks.T)
    if program == 0:
        _store_vector(v, head, size, blocks)
    if program < of_queries:
        _store_factors(q, q_rows, q_side, program, head, saved, Tq, q_tile, scale, size, flags, blocks)
    else:
        program -= of_queries
        _store_factors(k, k_rows, k_side, program, head, Saved(), Tk, k_tile, scale, size, flags, blocks)


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
    EXACT: bool  # factors in two parts
    GAP: bool  # dO · o is taken elsewhere
    FMA: bool


class Factors(NamedTuple):
    """What the other kernels take, and how many tiles of queries and of keys there are."""

    args: dict[str, Any]  # by their names
    q_items: int
    k_items: int


def factors(
    given: dict[str, Any],
    v: Tensor,
    offsets: tuple[Tensor | None, Tensor | None],
    tiles: tuple[int, int],
    activation: str,
    saved: Saved | None = None,
) -> Factors:
    """Make `Vector`, the `Side` of the queries and that of the keys, in tiles of so many rows.

    given: the kernels' arguments by name. saved: for a backward, whose δ is made, and factors in rows too.
    """
    exponents, like = activation in FACTOR, given["q"].ptr
    heads, width = like.shape[1], like.shape[3] + like.shape[3] % 2
    exact = exponents and like.dtype == torch.float32

    def room(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=like.device)

    def side(x: Heads, cu_seqlens: Tensor | None, rows: int) -> tuple[Side, int]:
        B, H, T, _ = x.ptr.shape
        seqs = B if cu_seqlens is None else cu_seqlens.numel() - 1
        items = partition(seqs, T, rows, cu_seqlens)
        made = Side(
            room(items.count, H, 2 if exact else 1, width, rows),
            None if saved is None else room(items.count, H, rows, width),
            room(items.count, H, rows // PART.value),
            cu_seqlens if cu_seqlens is None else cu_seqlens.contiguous(),
            untold(seqs),
            untold(items.per_seq),
        )
        return made, items.count

    (q_side, q_items), (k_side, k_items) = map(side, (given["q"], given["k"]), offsets, tiles)
    fma = chip_of(like.device).backend != "interpreter"
    made = {"v": Vector(v.contiguous(), room(heads, width), room(heads)), "q_side": q_side, "k_side": k_side}
    args = {
        **given,
        **made,
        "saved": saved or Saved(),
        "q_items": q_items,
        "q_tile": tiles[0],
        "k_tile": tiles[1],
        "scale": FACTOR.get(activation, 1.0),
        "flags": constants(FactorFlags(exponents, exact, given["value"].ptr.dtype == torch.float32, fma)),
    }
    tight = exact or (offsets != (None, None) and given["k_rows"].ptr is not None)  # else it spilled
    blocks = FactorBlocks(PART.value, pow2(width, 2, 16 if tight else 32))
    programs = q_items * (tiles[0] // blocks.T) + k_items * (tiles[1] // blocks.T)
    launch(_concat_factor_kernel, (programs, heads), args, blocks)
    return Factors({**given, **made, "saved": saved}, q_items, k_items)
