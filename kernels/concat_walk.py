"""What the kernels of concat attention's backward share: a tile of g, and the walk over it (see concat_bwd.py)."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, activate_grad, log_sigmoid_grad
from .arguments import entry_ptr, head_ptr, pitch
from .concat import concat_scores, finished, reciprocal
from .concat_factors import pairs_at, rows_before
from .masks import dropout_scale, unmasked, window_range
from .products import add_product
from .softmax import exp, load_lse
from .tiles import load_rows


class Workspace(NamedTuple):
    """Numbers of the pairs of tiles that a launch has, from some tile of queries (or of keys) on; None: not made."""

    g: Tensor | None  # (tiles, BLOCK_N, BLOCK_M) float32
    gt: Tensor | None  # (tiles, BLOCK_M, BLOCK_N): the same, transposed
    p: Tensor | None  # as g, in COMPUTE: k ⊙ a
    bias: Tensor | None  # (B, H, Tq, Tk), or packed (H, P), float32, zeros: g again
    item0: int  # the first of these tiles, 4 n + 3


class Gradients(NamedTuple):
    """What a kernel makes, contiguous float32 or None: dk and dvalue are added to, and all where rows are packed."""

    q: Tensor | None = None  # (splits, B, H, Tq, A)
    v: Tensor | None = None  # (splits, q items, H, AP): one sum a program
    k: Tensor | None = None  # (B, H, Tk, A)
    value: Tensor | None = None  # (B, H, Tk, DV)


@triton.jit
def tiles_meet(window, lo, hi, k_lo, length, BLOCK_N: tl.constexpr):
    """Whether a query of [lo, hi) sees a key of the tile from k_lo on: where none does, no g is made."""
    first, last = window_range(window, lo, hi, length)
    return (k_lo < last) & (k_lo + BLOCK_N > first)


@triton.jit
def tile_weights(
    q_item,
    tile,
    head,
    queries,  # (sequence, its first packed row, first and past-the-last row of the tile)
    keys,  # (first packed row, length, first tile) of the sequence
    q,
    k,
    v,
    value,
    bias,
    mask,
    q_rows,
    k_rows,
    q_side,
    k_side,
    dropout,  # as in concat.py
    saved,
    Tq,
    Tk,
    window,
    size,
    flags,
    blocks,
):
    """(a, k ⊙ a, dO · k value, or with EXACT dO · (k value - o), the scores, visible pairs) of a pair of tiles."""
    seq, q_start, lo, hi = queries
    k_start, k_length, k_item0 = keys
    i = lo + tl.arange(0, blocks.M)
    j = tl.arange(0, blocks.N) + tile * blocks.N
    q_at = (q_start + i).to(tl.int64)
    k_at = (k_start + j).to(tl.int64)
    q_keep = unmasked(q_rows, seq, q_at, i < hi)
    k_keep = unmasked(k_rows, seq, k_at, j < k_length)
    s = concat_scores(
        q_item,
        tile,
        head,
        (k_length, k_item0),
        q_side,
        k_side,
        head_ptr(q, seq, head) + q_at * pitch(q),
        q_keep,
        head_ptr(k, seq, head) + k_at * pitch(k),
        k_keep,
        v.ptr + head * size.AP,
        tl.load(v.sum + head),
        size,
        flags,
        blocks,
    )
    s, shown = finished(s, i, j, q_keep, k_keep, seq, head, bias, mask, k_side, k_length, window, flags)
    before = rows_before(seq, head, q_side, Tq, size.H)
    wide = before * size.DV + q_at * size.DV
    top, inv = load_lse(saved.lse + (before + q_at) * 2, q_keep)
    p = tl.where(shown, exp(s - top[:, None], flags.EXACT and flags.FMA) * inv[:, None], 0.0)
    pk = p
    if dropout.seed is not None:
        kept = dropout_scale(dropout, j[None, :], seq * size.H + head, i[:, None])
        pk *= kept
    dp = tl.zeros([blocks.M, blocks.N], tl.float32)
    value_ptrs = head_ptr(value, seq, head) + k_at * pitch(value)
    if flags.EXACT:
        for d in range(0, size.DV):
            do = tl.load(saved.do + wide + d, mask=q_keep, other=0.0).to(tl.float32)[:, None]
            out = tl.load(saved.out + wide + d, mask=q_keep, other=0.0)[:, None]
            values = tl.load(value_ptrs + d, mask=k_keep, other=0.0).to(tl.float32)[None, :]
            if dropout.seed is not None:
                values *= kept
            dp = tl.fma(do, values - out, dp)
    else:
        do_ptrs = saved.do + wide
        for d0 in range(0, size.DV, blocks.DV):
            d = d0 + tl.arange(0, blocks.DV)
            do = load_rows(do_ptrs, q_keep, d, size.DV)
            values = load_rows(value_ptrs, k_keep, d, size.DV)
            dp = add_product(do, tl.trans(values), dp, flags.COMPUTE, flags.PRECISION)
        if dropout.seed is not None:
            dp *= kept
    return p, pk, dp, s, shown


@triton.jit
def gradient_tile(
    slot,  # where in the workspace this tile begins
    q_item,
    tile,
    head,
    queries,  # as of tile_weights
    keys,
    q,
    k,
    v,
    value,
    bias,
    mask,
    q_rows,
    k_rows,
    q_side,
    k_side,
    dropout,
    saved,
    work,
    Tq,
    Tk,
    window,
    size,
    flags,
    blocks,
):
    """One pair of tiles: g and k ⊙ a, queries contiguous; 0 where a key is not visible."""
    seq, q_start, lo, hi = queries
    if tiles_meet(window, lo, hi, tile * blocks.N, keys[1], blocks.N) & (lo < hi):
        p, pk, dp, s, shown = tile_weights(
            q_item,
            tile,
            head,
            queries,
            keys,
            q,
            k,
            v,
            value,
            bias,
            mask,
            q_rows,
            k_rows,
            q_side,
            k_side,
            dropout,
            saved,
            Tq,
            Tk,
            window,
            size,
            flags,
            blocks,
        )
        i = lo + tl.arange(0, blocks.M)
        rows = rows_before(seq, head, q_side, Tq, size.H) + (q_start + i).to(tl.int64)
        delta = tl.load(saved.delta + rows, mask=i < hi, other=0.0)
        g = tl.where(shown, p * (dp - delta[:, None]), 0.0)  # values that are hidden may be NaN
        j = tl.arange(0, blocks.N) + tile * blocks.N
        pair = pairs_at(i[:, None], j[None, :], seq, head, q_side, k_side, keys[1], Tq, Tk, size)
        if saved.scores is not None:
            g += tl.load(saved.scores + pair, mask=shown, other=0.0)
        if flags.SMOOTH:
            g = tl.where(shown, g * log_sigmoid_grad(s), 0.0)
        if work.bias is not None:
            tl.store(work.bias + pair, g, mask=shown)
        m = tl.arange(0, blocks.M)[:, None]
        n = tl.arange(0, blocks.N)[None, :]
        at = slot + n * blocks.M + m
        if work.g is not None:
            tl.store(work.g + at, g)
        if work.gt is not None:
            tl.store(work.gt + slot + m * blocks.N + n, g)
        if work.p is not None:
            tl.store(work.p + at, pk.to(work.p.dtype.element_ty))


@triton.jit
def staying(side, rows, d, size):
    """Features d of the factors of rows [R, 1], counted over all tiles, that stay while the others are walked."""
    return tl.load(side.rows + rows * size.AP + d[None, :], mask=(d < size.AP)[None, :], other=0.0)


@triton.jit
def features_gradient(s2, v, head, d, size, flags):
    """What `walk_tile` has summed, as a gradient of the features d of q or k."""
    if flags.ACT == "tanh":
        s2 *= 4.0
    return tl.load(v.ptr + head * size.AP + d, mask=d < size.AP, other=0.0)[None, :] * s2


@triton.jit
def walk_tile(
    s1,
    s2,  # Σ g r (with EXACT Σ g act) and Σ g (r - r²); without factors Σ g act and Σ g act'
    x,  # [rows, features d] factors (or q, k) of the rows that stay
    d,
    walk_ptr,  # (rows, AP) factors of the rows that are walked, at the tile's first
    g_ptr,
    stride_g,  # g of (walked, staying), at the tile's first; staying rows are contiguous
    count,
    safe,  # whether the tiles factor; what follows is for those that do not
    x_ptrs,
    x_keep,  # raw rows that stay
    raw,
    keep,  # raw rows that are walked, and which of them may be read: Heads and Entries
    seq,
    head,
    row0,
    inside,  # the first of them, and how many there are
    size,
    flags,
    WANT_S1: tl.constexpr,  # else s1 stays as it is
):
    """Walk one tile. Rows past the end of a sequence have factor 1 and g = 0."""
    r = tl.arange(0, x.shape[0])
    some = d < size.AP
    if flags.EXACT:
        old1 = s1
        old2 = s2
        s1 = tl.zeros_like(s1)
        s2 = tl.zeros_like(s2)
    if flags.FACTORED:
        if safe:
            if flags.EXACT:
                for n in range(0, count):
                    b = tl.load(walk_ptr + n * size.AP + d, mask=some, other=0.0)[None, :]
                    g = tl.load((g_ptr + n * stride_g + r)[:, None])
                    p = x * b
                    if flags.ACT == "tanh":
                        y = tl.fma(x, b, -1.0)
                        one = reciprocal(y + 2.0, flags.FAST)
                        least = tl.minimum(one, p * one)
                        one *= y
                    else:
                        one = reciprocal(1.0 + p, flags.FAST)
                        least = tl.minimum(one, p * one)
                    s2 = tl.fma(g, tl.fma(-least, least, least), s2)
                    if WANT_S1:
                        s1 = tl.fma(g, one, s1)
            else:
                for n in range(0, count, 2):
                    b0 = tl.load(walk_ptr + n * size.AP + d, mask=some, other=0.0)[None, :]
                    b1 = tl.load(walk_ptr + (n + 1) * size.AP + d, mask=some, other=0.0)[None, :]
                    g0 = tl.load((g_ptr + n * stride_g + r)[:, None])
                    g1 = tl.load((g_ptr + (n + 1) * stride_g + r)[:, None])
                    x0 = 1.0 + x * b0
                    x1 = 1.0 + x * b1
                    inv = reciprocal(x0 * x1, flags.FAST)
                    r0 = inv * x1
                    r1 = inv * x0
                    if WANT_S1:
                        s1 += g0 * r0
                        s1 += g1 * r1
                    s2 += g0 * (r0 - r0 * r0)
                    s2 += g1 * (r1 - r1 * r1)
        else:
            x_raw = load_rows(x_ptrs, x_keep, d, size.A)
            raw_ptr = head_ptr(raw, seq, head)
            for n in range(0, tl.minimum(count, inside)):
                shown = d < size.A
                if keep.ptr is not None:
                    kept = tl.load(entry_ptr(keep, seq, row0 + n)).to(tl.float32)
                    # A tile is compared: one number's answer is a float to the interpreter.
                    shown = shown & (tl.full(d.shape, 1.0, tl.float32) * kept != 0)
                z = tl.load(raw_ptr + (row0 + n) * pitch(raw) + d, mask=shown, other=0.0).to(tl.float32)[None, :]
                z += x_raw.to(tl.float32)
                g = tl.load((g_ptr + n * stride_g + r)[:, None])
                if flags.ACT == "tanh":
                    z *= -2.0
                one = tl.sigmoid(z)
                seen = g != 0  # a row that is hidden may be NaN, and a gradient be so
                s2 += tl.where(seen, g * (one - one * one), 0.0)
                if flags.EXACT and flags.ACT == "tanh":
                    one = activate(-0.5 * z, flags.ACT, False)
                if WANT_S1:
                    s1 += tl.where(seen, g * one, 0.0)
    else:
        for n in range(0, count):
            z = x + tl.load(walk_ptr + n * size.AP + d, mask=some, other=0.0)[None, :]
            g = tl.load((g_ptr + n * stride_g + r)[:, None])
            one = activate(z, flags.ACT, False)
            if WANT_S1:
                s1 += g * one
            s2 += g * activate_grad(z, one, flags.ACT, False)
    if flags.EXACT:
        s1 += old1
        s2 += old2
    return s1, s2
