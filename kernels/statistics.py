"""Attentive statistics pooling: scores, softmax over the frames, weighted mean and variance, in one pass.

For the frames j of an item and a channel c, with a weight a frame or a channel:

    s_jc = u_j · v_c      α_jc = softmax_j(s_jc)      mean_c = Σ_j α_jc x_jc      var_c = Σ_j α_jc (x_jc - mean_c)²

The scores s_j of one weight a frame, and the features u_j of one a channel, are made by the kernel of location
attention, without its weighted sum: they are narrow beside the values.

The running state of a channel is (m, l, mean, M): the pivot and the sum of its softmax, and of the frames so far the
mean and l times the variance. A tile of frames has a state of its own, made while it is in registers: a first mean μ,
then with e = x - μ the rounding that it has, r = Σ p e / l, and mean = μ + r, M = Σ p (e - r)². Two states a and b
over disjoint frames join by Chan's formula,

    l = l_a + l_b      δ = mean_b - mean_a      mean = mean_a + δ l_b / l      M = M_a + M_b + δ² l_a l_b / l

once both are brought to one pivot. No square of a value is ever subtracted from another: channels far from 0 lose
nothing. The mean is float64, and two float32 for the backward, which takes differences of values with it: its
rounding to float32 would be in all of them alike. It is one number a channel.

A program has a block of channels of an item; one sequence makes several items where there are too few programs to
fill the chip, and `_statistics_merge_kernel` joins their states by the same formula.

Tiles have a channel a row and a frame a column. So the scores come out of the matrix units with two channels in a
thread, and many frames of each: sums over frames are made in registers and by the four threads that share a row. With
one weight a frame nothing but the loads says which thread has what: a thread has a vector of channels, and a state of
its own of each, over all its frames.

The backward is in statistics_bwd.py.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import (
    Matrix,
    constants,
    entries,
    entry_ptr,
    launch,
    sequence_ptr,
    sequences,
    width,
)
from .chip import (
    LENGTHS,
    LONG,
    Chip,
    all_registers,
    cdiv,
    chip_of,
    even,
    pow2,
    rule,
    tile_rows,
    unit,
    unpressed,
    whole_rows,
)
from .inputs import SPREAD, StatisticsInputs, features_dtype
from .location import features_flags, location_fwd
from .masks import Items, Spans, items_of, locate, partition, unmasked
from .products import add_product
from .softmax import finish, made_once, new_lse, no_key, pivot, power, rounded_product, store_lse
from .tiles import load_rows, store_rows

PIECE = tl.constexpr(1024)
"""Scores that are looked at in one step for their maximum, of one weight a frame."""
ALONE = tl.constexpr(SPREAD)

# ---------------------------------------------------------------------------------------------------------------
# Device helpers
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def channel_scores(
    x_ptrs,  # [BLOCK_T] pointers to rows of u
    keep,
    u,  # tile [BLOCK_T, BLOCK_A] of them, used where it is all of their features
    v_tile,  # tile [BLOCK_A, BLOCK_C] of v, as u
    v,
    c,
    size,
    flags,
    BLOCK_A: tl.constexpr,
):
    """v_c · u_j for a tile of channels and frames, [BLOCK_C, BLOCK_T]; 0 where a frame is not seen."""
    s = tl.zeros([c.shape[0], keep.shape[0]], tl.float32)
    if flags.WHOLE:
        s = add_product(tl.trans(v_tile), tl.trans(u), s, flags.COMPUTE, flags.PRECISION)
    else:
        for a0 in range(0, size.A, BLOCK_A):
            a = a0 + tl.arange(0, BLOCK_A)
            u_a = load_rows(x_ptrs, keep, a, size.A)
            v_a = load_channels(v, a, c, size)
            s = add_product(tl.trans(v_a), tl.trans(u_a), s, flags.COMPUTE, flags.PRECISION)
    return s


@triton.jit
def hide(s, keep, HIDDEN: tl.constexpr = float("-inf")):
    """Scores [BLOCK_C, BLOCK_T], -inf where a frame is not seen.

    Which frames are is loaded once, by few threads. Otherwise each thread would load it for all frames of its own.
    """
    return tl.where((made_once(keep.to(tl.int32)) != 0)[None, :], s, HIDDEN)


@triton.jit
def frame_scores(x, seq, rows, keep, LINEAR: tl.constexpr):
    """s_j for a tile of frames, [1, BLOCK_T]; where a frame is not seen -inf, or 0 of LINEAR ones."""
    hidden: tl.constexpr = 0.0 if LINEAR else float("-inf")
    if x.ptr is None:
        s = tl.where(keep, 0.0, hidden)
    else:
        s = tl.load(entry_ptr(x, seq, rows), mask=keep, other=hidden).to(tl.float32)
    return s[None, :]


@triton.jit
def given_scores(bias, seq, rows, keep, c, size):
    """Tile [BLOCK_C, BLOCK_T] of scores that are given, or of a bias of them; 0 where a frame is not seen."""
    return tl.trans(load_rows(sequence_ptr(bias, seq, rows), keep, c, size.C)).to(tl.float32)


@triton.jit
def load_channels(v, a, c, size):
    """Tile v[a, c]; 0 outside."""
    return load_rows(v.ptr + a.to(tl.int64) * v.stride, a < size.A, c, size.C)


@triton.jit
def _moments(p, x, FINE: tl.constexpr, DEVIATION: tl.constexpr):
    """(l, mean, M) over the second axis of x [BLOCK_C, BLOCK, ...] with the weights p, which broadcast to it.

    The mean must be one number wherever it is used, for r is its rounding and no other's. + 0: a product alone the
    compiler would contract with the difference that is taken of it. FINE: p x is rounded before it is summed. Lanes
    would have means of different last bits: too much only for values of float32, those of 16 bits have none so fine.
    """
    l = tl.sum(p, axis=1)
    inv = 1.0 / tl.where(l > 0, l, 1.0)
    mean = tl.sum(rounded_product(p, x) if FINE else p * x, axis=1) * inv + 0.0
    e = x - tl.expand_dims(mean, 1)
    r = tl.sum(p * e, axis=1) * inv
    if DEVIATION:
        e -= tl.expand_dims(r, 1)
        sq = tl.sum(p * e * e, axis=1).to(tl.float32)
    else:
        sq = tl.zeros(mean.shape, tl.float32)
    return l, mean.to(tl.float64) + r.to(tl.float64), sq


@triton.jit
def _join(l_a, mean_a, sq_a, l_b, mean_b, sq_b, DEVIATION: tl.constexpr):
    """(l, mean, M) of the frames of both, which have one pivot; one of them, or both, may have seen none."""
    l = l_a + l_b
    # Exactly 1 where a has seen nothing, which l_b / l_b need not be: delta is then all of the mean.
    share = tl.where(l_a == 0, 1.0, l_b / tl.where(l > 0, l, 1.0))
    delta = mean_b - mean_a
    mean = mean_a + delta * share.to(tl.float64)
    if DEVIATION:
        delta = delta.to(tl.float32)
        sq_a = sq_a + sq_b + delta * delta * l_a * share
    return l, mean, sq_a


@triton.jit
def _join_pivots(m_a, l_a, mean_a, sq_a, m_b, l_b, mean_b, sq_b, DEVIATION: tl.constexpr):
    """The state of the frames of both."""
    m = tl.maximum(m_a, m_b)
    alpha = power(m_a - pivot(m), True, False)
    beta = power(m_b - pivot(m), True, False)
    if DEVIATION:
        sq_a = sq_a * alpha
    l, mean, sq = _join(l_a * alpha, mean_a, sq_a, l_b * beta, mean_b, sq_b * beta, DEVIATION)
    return m, l, mean, sq


@triton.jit
def _join_all(l, mean, sq, DEVIATION: tl.constexpr):
    """(l, mean, M) of the frames of many states with one pivot, which are the second axis."""
    l, mean, between = _moments(l, mean, False, DEVIATION)
    if DEVIATION:
        between += tl.sum(sq, axis=1)
    return l, mean, between


@triton.jit
def _join_squares(m_a, squares_a, m_b, squares_b):
    """Σ p² of the frames of both, which have pivots of their own."""
    m = pivot(tl.maximum(m_a, m_b))
    alpha = power(m_a - m, True, False)
    beta = power(m_b - m, True, False)
    return squares_a * alpha * alpha + squares_b * beta * beta


# ---------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _walk_channels(x, v, bias, values, mask, scores_ptr, seq, start, lo, hi, c, T, size, flags, blocks):
    """A weight a channel: the state of the channels c after the frames [lo, hi)."""
    fine: tl.constexpr = values.ptr.dtype.element_ty == tl.float32
    a = tl.arange(0, blocks.A)
    v_tile = load_channels(v, a, c, size)  # stays on chip where it is WHOLE, else it is not loaded
    m = tl.full([blocks.C], float("-inf"), tl.float32)
    l = tl.zeros([blocks.C], tl.float32)
    mean = tl.zeros([blocks.C], tl.float64)
    sq = tl.zeros([blocks.C], tl.float32)
    squares = tl.zeros([blocks.C], tl.float32)
    for t0 in range(lo, hi, blocks.T):
        t = t0 + tl.arange(0, blocks.T)
        rows = (start + t).to(tl.int64)
        keep = unmasked(mask, seq, rows, t < hi)
        # Before the scores: what is made of both gets the layout of the load that comes last before it.
        y = tl.trans(load_rows(sequence_ptr(values, seq, rows), keep, c, size.C)).to(tl.float32)
        x_ptrs = sequence_ptr(x, seq, rows)
        u = load_rows(x_ptrs, keep, a, size.A)
        s = channel_scores(x_ptrs, keep, u, v_tile, v, c, size, flags, blocks.A)
        if bias.ptr is not None:
            s += given_scores(bias, seq, rows, keep, c, size)
        s = hide(s, keep)
        if scores_ptr is not None:
            store_rows(scores_ptr + (seq * T + rows) * size.C, tl.trans(s), t < hi, c, size.C)
        m_tile = tl.max(s, axis=1)
        p = power(s - pivot(m_tile)[:, None], True, False)
        l_tile, mean_tile, sq_tile = _moments(p, y, fine, flags.DEVIATION)
        if flags.CORRECTED:
            squares = _join_squares(m, squares, m_tile, tl.sum(p * p, axis=1))
        m, l, mean, sq = _join_pivots(m, l, mean, sq, m_tile, l_tile, mean_tile, sq_tile, flags.DEVIATION)
    return m, l, mean, sq, squares


@triton.jit
def _walk_given(bias, values, mask, seq, start, lo, hi, c, size, flags, blocks):
    """A weight a channel that is given: the state of the channels c after the frames [lo, hi).

    `walks` threads share the frames of a channel, as in `_walk_frames`, with pivots of their own: 0 of LINEAR ones.
    """
    fine: tl.constexpr = values.ptr.dtype.element_ty == tl.float32
    m = tl.full([blocks.C, blocks.walks], float("-inf"), tl.float32)
    l = tl.zeros([blocks.C, blocks.walks], tl.float32)
    mean = tl.zeros([blocks.C, blocks.walks], tl.float64)
    sq = tl.zeros([blocks.C, blocks.walks], tl.float32)
    squares = tl.zeros([blocks.C, blocks.walks], tl.float32)
    for t0 in range(lo, hi, blocks.T):
        t = t0 + tl.arange(0, blocks.T)
        rows = (start + t).to(tl.int64)
        keep = unmasked(mask, seq, rows, t < hi)
        y = tl.trans(load_rows(sequence_ptr(values, seq, rows), keep, c, size.C)).to(tl.float32)
        y = tl.reshape(y, [blocks.C, blocks.T // blocks.walks, blocks.walks])
        p = given_scores(bias, seq, rows, keep, c, size)
        if flags.LINEAR:
            p = tl.reshape(hide(p, keep, 0.0), y.shape)
            m_tile = tl.where(tl.sum(p, axis=1) == 0, float("-inf"), 0.0)
        else:
            s = tl.reshape(hide(p, keep), y.shape)
            m_tile = tl.max(s, axis=1)
            p = power(s - tl.expand_dims(pivot(m_tile), 1), True, False)
        l_tile, mean_tile, sq_tile = _moments(p, y, fine, flags.DEVIATION)
        if flags.CORRECTED:
            squares = _join_squares(m, squares, m_tile, tl.sum(p * p, axis=1))
        m, l, mean, sq = _join_pivots(m, l, mean, sq, m_tile, l_tile, mean_tile, sq_tile, flags.DEVIATION)
    top = tl.max(m, axis=1)
    weight = power(m - pivot(top)[:, None], True, False)
    l, mean, sq = _join_all(l * weight, mean, sq * weight, flags.DEVIATION)
    return top, l, mean, sq, tl.sum(squares * weight * weight, axis=1)


@triton.jit
def _walk_frames(x, values, mask, seq, start, lo, hi, c, size, flags, blocks):
    """One weight a frame: the state of the channels c after the frames [lo, hi), m and l of the shape [1].

    The scores are few: their maximum comes first, and no sum is ever scaled. `walks` threads share the frames of a
    channel. Each has a state of its own, and these are joined at the end.
    """
    fine: tl.constexpr = values.ptr.dtype.element_ty == tl.float32
    m = tl.full([1], float("-inf"), tl.float32)
    for t0 in range(lo, hi, PIECE):
        t = t0 + tl.arange(0, PIECE)
        rows = (start + t).to(tl.int64)
        s = frame_scores(x, seq, rows, unmasked(mask, seq, rows, t < hi), flags.LINEAR)
        m = tl.maximum(m, tl.max(tl.where(s == 0, float("-inf"), 0.0) if flags.LINEAR else s, axis=1))
    l = tl.zeros([blocks.C, blocks.walks], tl.float32)  # of each channel the same, so that it is where the means are
    mean = tl.zeros([blocks.C, blocks.walks], tl.float64)
    sq = tl.zeros([blocks.C, blocks.walks], tl.float32)
    squares = tl.zeros([blocks.C, blocks.walks], tl.float32)
    for t0 in range(lo, hi, blocks.T):
        t = t0 + tl.arange(0, blocks.T)
        rows = (start + t).to(tl.int64)
        keep = unmasked(mask, seq, rows, t < hi)
        y = tl.trans(load_rows(sequence_ptr(values, seq, rows), keep, c, size.C)).to(tl.float32)
        p = frame_scores(x, seq, rows, keep, flags.LINEAR)
        if not flags.LINEAR:
            p = power(p - pivot(m)[:, None], True, False)
        p = made_once(tl.max(p, axis=0))
        p = tl.reshape(tl.broadcast_to(p[None, :], y.shape), [blocks.C, blocks.T // blocks.walks, blocks.walks])
        l_tile, mean_tile, sq_tile = _moments(p, tl.reshape(y, p.shape), fine, flags.DEVIATION)
        if flags.CORRECTED:
            squares += tl.sum(p * p, axis=1)
        l, mean, sq = _join(l, mean, sq, l_tile, mean_tile, sq_tile, flags.DEVIATION)
    if flags.DEVIATION:
        l = tl.where(sq < 0, 0.0, l)  # as it is. Without a look at sq, it was made in another layout too.
    l, mean, sq = _join_all(l, mean, sq, flags.DEVIATION)
    return m, tl.max(l[None, :], axis=1), mean, sq, tl.sum(squares, axis=1)


@triton.jit(do_not_specialize=LENGTHS)
def _statistics_fwd_kernel(
    x,  # features u (B, T, A) or (N, A); without v scores (B, T) or (N,), or None: they are 0
    v,  # (A, C), or None
    bias,  # (B, T, C) or (N, C), added to the scores of channels, or all there is of them; or None
    values,  # (B, T, C) or (N, C)
    mask,  # (B, T), (N,) or None
    spans,
    result,
    parts,
    scores_ptr,  # (B, T, C) or (N, C) float32, or None: they are not wanted
    num_seqs,
    per_seq,
    rows_per_item,
    T,  # 0 where the batch is ragged
    size,
    flags,
    blocks,
):
    channel_blocks = tl.cdiv(size.C, blocks.C)
    item = tl.program_id(0) // channel_blocks  # the channels of a frame together: they share its features in L2
    block = tl.program_id(0) % channel_blocks
    c = block * blocks.C + tl.arange(0, blocks.C)
    seq, start, lo, hi, _ = locate(item, spans, T, num_seqs, per_seq, rows_per_item)
    if flags.PER_CHANNEL:
        r = c
        R = size.C
        own = c < R
        if v.ptr is None:
            m, l, mean, sq, squares = _walk_given(bias, values, mask, seq, start, lo, hi, c, size, flags, blocks)
        else:
            m, l, mean, sq, squares = _walk_channels(
                x, v, bias, values, mask, scores_ptr, seq, start, lo, hi, c, T, size, flags, blocks
            )
    else:
        r = tl.arange(0, 1)
        R = 1
        own = (r < R) & (block == 0)
        m, l, mean, sq, squares = _walk_frames(x, values, mask, seq, start, lo, hi, c, size, flags, blocks)
    if parts.m is None:
        _store_statistics(result, seq, num_seqs, c, size.C, r, R, m, l, mean, sq, squares, own, flags)
    else:
        at = item.to(tl.int64) * size.C + c
        tl.store(parts.mean + at, mean, mask=c < size.C)
        if flags.DEVIATION:
            tl.store(parts.sq + at, sq, mask=c < size.C)
        if flags.CORRECTED:
            tl.store(parts.squares + at, squares, mask=c < size.C)
        tl.store(parts.m + item.to(tl.int64) * R + r, m, mask=own)
        tl.store(parts.l + item.to(tl.int64) * R + r, l, mask=own)


@triton.jit
def _store_statistics(result, seq, num_seqs, c, C, r, R, m, l, mean, sq, squares, own, flags):
    """The statistics of the channels c of a sequence, and its (m, l) where it is this program's `own`."""
    at = seq * C + c
    write = c < C
    inv = finish(l)
    near = mean.to(tl.float32)
    plane = num_seqs.to(tl.int64) * C
    tl.store(result.mean + at, near.to(result.mean.dtype.element_ty), mask=write)
    if result.exact is not None:
        tl.store(result.exact + at, near, mask=write)
        tl.store(result.exact + plane + at, (mean - near.to(tl.float64)).to(tl.float32), mask=write)
        tl.store(result.exact + 2 * plane + at, tl.broadcast_to(inv, at.shape), mask=write)
    if flags.DEVIATION:
        biased = sq * inv
        var = biased
        if flags.CORRECTED:
            share = squares * inv * inv
            room = 1.0 - result.correction * share
            alone = room <= ALONE
            scale = tl.where(alone, 0.0, tl.div_rn(1.0, tl.where(alone, 1.0, room)))
            var = biased * scale
        low = var <= result.floor  # then a constant; NaN stays NaN
        high = var >= result.ceiling
        root = tl.sqrt_rn(tl.where(low | high, 1.0, var + result.eps))
        std = tl.where(low, result.least, tl.where(high, result.most, root))
        std = tl.where(m == float("-inf"), 0.0, std)  # no frame is visible
        tl.store(result.std + at, std.to(result.std.dtype.element_ty), mask=write)
        if result.exact is not None:
            slope = tl.where(low | high, 0.0, tl.div_rn(0.5, root))
            if flags.CORRECTED:
                slope *= scale
                tl.store(result.exact + 5 * plane + at, 2.0 * slope * var * result.correction, mask=write)
                tl.store(result.exact + 6 * plane + at, share, mask=write)
            tl.store(result.exact + 3 * plane + at, biased, mask=write)
            tl.store(result.exact + 4 * plane + at, slope, mask=write)
    store_lse(result.lse + (seq * R + r) * 2, m, l, own)


@triton.jit(do_not_specialize=LENGTHS)
def _statistics_merge_kernel(
    parts,
    spans,
    result,
    num_seqs,
    per_seq,
    rows,
    size,
    flags,
    blocks,
):
    """States of the items of a sequence, blocks.T at a time."""
    seq = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * blocks.C + tl.arange(0, blocks.C)
    lo, hi = items_of(seq, spans, per_seq, rows)
    r = c if flags.PER_CHANNEL else tl.arange(0, 1)
    R = size.C if flags.PER_CHANNEL else 1
    m = tl.full([r.shape[0]], float("-inf"), tl.float32)
    l = tl.zeros([r.shape[0]], tl.float32)
    mean = tl.zeros([blocks.C], tl.float64)
    sq = tl.zeros([blocks.C], tl.float32)
    squares = tl.zeros([blocks.C], tl.float32)
    for i0 in range(lo, hi, blocks.T):
        item = i0 + tl.arange(0, blocks.T)
        m_i = tl.trans(load_rows(parts.m + item * R, item < hi, r, R))
        l_i = tl.trans(load_rows(parts.l + item * R, item < hi, r, R))
        m_i = tl.where(l_i > 0, m_i, float("-inf"))  # past the end l is 0
        m_tile = tl.max(m_i, axis=1)
        weight = power(m_i - pivot(m_tile)[:, None], True, False)
        mean_i = tl.trans(load_rows(parts.mean + item * size.C, item < hi, c, size.C))
        sq_i = tl.zeros(mean_i.shape, tl.float32)
        if flags.DEVIATION:
            sq_i = tl.trans(load_rows(parts.sq + item * size.C, item < hi, c, size.C))
        l_tile, mean_tile, sq_tile = _join_all(weight * l_i, mean_i, weight * sq_i, flags.DEVIATION)
        if flags.CORRECTED:
            squares_i = tl.trans(load_rows(parts.squares + item * size.C, item < hi, c, size.C))
            squares = _join_squares(m, squares, m_tile, tl.sum(weight * weight * squares_i, axis=1))
        m, l, mean, sq = _join_pivots(m, l, mean, sq, m_tile, l_tile, mean_tile, sq_tile, flags.DEVIATION)
    own = r < R
    if not flags.PER_CHANNEL:
        own = own & (tl.program_id(1) == 0)
    _store_statistics(result, seq, num_seqs, c, size.C, r, R, m, l, mean, sq, squares, own, flags)


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Sizes of one kernel's tiles."""

    T: int
    C: int
    A: int
    warps: int
    stages: int = 2
    walks: int = 1  # threads that share the frames of a channel, of one weight a frame


@rule
def fwd_blocks(chip: Chip, itemsize: int, T: int, C: int, A: int) -> Blocks:
    """Tiles of the forward; A is 0 for weights that no product makes.

    8192 elements a tile are 32 registers of 8 warps. Chosen by the compile report (no spills, shared memory within
    the chip).
    """
    if A == 0:  # a thread has a vector of channels, and eight frames or more
        vector = (16 // itemsize if even(C) else 4) if whole_rows(chip, C) else 1
        block_t, block_c = tile_rows(T, max(32, 8 * vector)), pow2(C, 16, 128)
        return Blocks(block_t, block_c, 16, 4, walks=min(128 * vector // block_c, block_t // 8))
    warps = product_warps(chip, itemsize, C, A)
    if itemsize == 4:  # no matrix units in full float32: products are unrolled, so A goes in steps of 16
        return Blocks(tile_rows(T, 32), pow2(C, 16, 64), 16, warps)
    # Where A fits, the block of V stays on chip for all frames.
    return Blocks(tile_rows(T, 64), pow2(C, 16, 64), pow2(A, 16, 128 if A <= 128 else 64), warps)


def product_warps(chip: Chip, itemsize: int, C: int, A: int) -> int:
    """256 threads; a wave of AMD has 64 of them, and four waves have 512 registers a lane.

    On an H200 half as many are 1.5 times as fast, in the forward as in the backward, since two programs share a core;
    where registers do not suffice for that, in float32 or beside rows that are no whole vectors, they are not.
    """
    fits = chip.hopper and itemsize == 2 and whole_rows(chip, C, A) and A <= 128
    return 4 if chip.backend == "hip" or fits else 8


class Result(NamedTuple):
    """What the forward leaves, R = C with a weight a channel and 1 with one a frame."""

    mean: Tensor  # (S, C), as the values
    std: Tensor | None
    lse: Tensor  # (S, R, 2) float32: (m, l), see softmax.py
    exact: Tensor | None  # (planes, S, C) float32, or none: see `planes`
    floor: float  # of the variance
    least: float  # the deviation there
    ceiling: float
    most: float
    eps: float
    correction: float


def planes(inputs: StatisticsInputs, deviation: bool) -> int:
    """Numbers a channel that the forward leaves the backward.

    The mean in two parts and 1 / l; of a deviation the variance V and dstd / dV; of a corrected one also
    2 dstd / dΣα² and Σα².
    """
    return 3 if not deviation else 7 if inputs.correction else 5


class Parts(NamedTuple):
    """States of items; none where every sequence is one."""

    mean: Tensor | None = None  # (items, C) float64
    sq: Tensor | None = None  # M (items, C) float32
    squares: Tensor | None = None  # Σ p² (items, C) float32, where the variance is corrected
    m: Tensor | None = None  # (items, R) float32
    l: Tensor | None = None


class Size(NamedTuple):
    """Features, or 0 for weights that no product makes, and channels."""

    A: int
    C: int


class Flags(NamedTuple):
    """What kernels are compiled for."""

    PER_CHANNEL: bool
    DEVIATION: bool
    CORRECTED: bool  # the variance, by Σα²
    LINEAR: bool  # what is given are weights, not scores
    FMA: bool
    COMPUTE: object
    PRECISION: str
    WHOLE: bool = False  # blocks.A >= A


class Call(NamedTuple):
    """What the launches of one call share."""

    seqs: int
    length: int  # frames of a padded sequence, or all packed ones
    size: Size
    chip: Chip
    flags: Flags
    cu_seqlens: Tensor | None
    args: dict[str, Any]  # the kernels' arguments by name

    def items(self, rows: int, blocks: Blocks) -> Items:
        """The partition into items of `rows` frames, whose arguments join the others with the flags for blocks."""
        items = partition(self.seqs, self.length, rows, self.cu_seqlens)
        flags = self.flags._replace(WHOLE=0 < self.size.A <= blocks.A)
        self.args.update(spans=Spans(items.cu), per_seq=items.per_seq, flags=constants(flags))
        return items


def prepare(inputs: StatisticsInputs, x: Tensor | None, deviation: bool) -> Call:
    """x: features, scores of frames (B, T, 1) or (N, 1), or None."""
    values, v, bias = inputs.h if inputs.value is None else inputs.value, inputs.v, inputs.score_bias
    mask, cu_seqlens, per_channel = inputs.mask, inputs.cu_seqlens, inputs.per_channel()
    chip, packed = chip_of(values.device), cu_seqlens is not None
    v = None if v is None or v.dim() == 1 else unit(v)
    values, cu_seqlens = unit(values), cu_seqlens if cu_seqlens is None else cu_seqlens.contiguous()
    size = Size(0 if v is None else v.shape[0], values.shape[-1])
    seqs, length = (cu_seqlens.numel() - 1, values.shape[0]) if packed else values.shape[:2]
    activations = () if inputs.bare() else (inputs.activation,)
    flags = Flags(
        per_channel, deviation, deviation and inputs.correction > 0, inputs.linear, chip.backend != "interpreter",
        *features_flags(chip, values.dtype, *activations),
    )  # fmt: skip
    frame = bias if inputs.v is None else x if x is None or per_channel else x.squeeze(-1)
    args = {
        "x": sequences(x, packed=packed) if per_channel else entries(frame, packed=packed),
        "bias": sequences(unit(bias) if per_channel else None, packed=packed),
        "v": Matrix(v, 0 if v is None else width(v.stride(0))),
        "values": sequences(values, packed=packed),
        "mask": entries(None if mask is None else mask.view(torch.uint8), packed=packed),
        "num_seqs": seqs,
        "T": 0 if packed else length,
        "size": Size(width(size.A), width(size.C)),
    }
    return Call(seqs, length, size, chip, flags, cu_seqlens, args)


def features_of(inputs: StatisticsInputs, x: Tensor | None) -> Tensor | None:
    """The features of a score a channel, `x` where they were made; None without v."""
    return None if inputs.v is None else unit(inputs.h) if inputs.bare() else x


def limits(inputs: StatisticsInputs) -> tuple[float, ...]:
    """The least and the largest variance, each with its deviation, which float32 may hold where not the variance."""
    ends = inputs.floor, inputs.ceiling
    pairs = ((x if x <= torch.finfo(torch.float32).max else math.inf, math.sqrt(x + inputs.eps)) for x in ends)
    return (*(x for pair in pairs for x in pair), inputs.eps, inputs.correction)


def statistics_fwd(
    inputs: StatisticsInputs, need_scores: bool, need_exact: bool, deviation: bool
) -> tuple[Tensor, ...]:
    """(mean, std, lse, scores) as `fused_attn.reference.statistics_pooling` has them, features u and `Result.exact`.

    The scores of one weight a frame are always there, of one a channel where they are needed; the features of these
    where they are not h. What is not there is empty.
    """
    values = inputs.h if inputs.value is None else inputs.value
    score, per_channel = inputs.score(), inputs.per_channel()
    scores = x = None
    if inputs.v is not None and per_channel and not inputs.bare():
        x = location_fwd(score._replace(v=None), False, False, features_dtype(values.dtype, inputs.activation))[2]
    elif inputs.v is not None and not per_channel:
        scores = location_fwd(score, False, False)[2]
    call = prepare(inputs, features_of(inputs, x) if per_channel else scores, deviation)
    seqs, (A, C) = call.seqs, call.size
    R = C if per_channel else 1
    need_scores = need_scores and per_channel and inputs.v is not None
    if need_scores:
        scores = torch.empty_like(values, dtype=torch.float32, memory_format=torch.contiguous_format)
    mean, std = values.new_empty(seqs, C), values.new_empty((seqs, C) if deviation else 0)
    exact = values.new_empty((planes(inputs, deviation), seqs, C) if need_exact else 0, dtype=torch.float32)
    lse = new_lse(seqs, R, device=values.device)
    scores = lse.new_empty(0) if scores is None else scores
    results = mean, std, lse, scores, values.new_empty(0) if x is None else x, exact
    if seqs == 0 or call.length == 0:
        return mean.zero_(), std.zero_(), no_key(lse), *results[3:5], exact.zero_()

    longest = call.length if inputs.cu_seqlens is None else LONG
    read = values if x is None else x, inputs.score_bias if per_channel and A == 0 else None
    itemsize = max(y.element_size() for y in read if y is not None)
    blocks = fwd_blocks(call.chip, itemsize, longest, C, A)
    channel_blocks = cdiv(C, blocks.C)
    rows = _rows_per_item(call, inputs.cu_seqlens is not None, channel_blocks, blocks.T)
    items = call.items(rows, blocks)
    parts, alone = Parts(), items.per_seq == 1
    if not alone:
        new = functools.partial(torch.empty, dtype=torch.float32, device=values.device)
        sums = (new(items.count, C) if asked else None for asked in (deviation, call.flags.CORRECTED))
        parts = Parts(new(items.count, C, dtype=torch.float64), *sums, *(new(items.count, R) for _ in range(2)))
    args = call.args | {
        "result": Result(mean, std if deviation else None, lse, exact if need_exact else None, *limits(inputs)),
        "parts": parts,
        "scores_ptr": scores if need_scores else None,
        "rows_per_item": rows,
        "rows": rows,
    }
    grid = (items.count * channel_blocks,)
    pressed = 0 < A <= 16 or (call.chip.from_registers and per_channel and need_scores)
    pressed = pressed or (A == 0 and values.element_size() == 4)
    registers = all_registers(call.chip) if pressed else unpressed(call.chip, C, A)
    launch(_statistics_fwd_kernel, grid, args, blocks, **registers)
    if not alone:
        block_c = pow2(C, 16, 128)
        grid = seqs, cdiv(C, block_c)
        launch(_statistics_merge_kernel, grid, args, Blocks(16, block_c, 0, 4), **all_registers(call.chip))
    return results


def _rows_per_item(call: Call, ragged: bool, channel_blocks: int, block_t: int) -> int:
    """Enough programs for four a core, but no item so short that its state costs more than its frames."""
    parts = cdiv(4 * call.chip.cores, channel_blocks * (1 if ragged else call.seqs))
    rows = max(cdiv(call.length, parts), 4 * block_t)
    return cdiv(rows, block_t) * block_t
