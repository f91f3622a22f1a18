"""Concat (additive) attention: s_ij = v · act(q_i + k_j), softmax over j, weighted sum; no tanh an element.

Scores. tanh and sigmoid of a sum factor into exponentials made once a row (design 3.1): with

    tanh:     α = e^{2q}, β = e^{2k}:     Σ_d v_d tanh(q_d + k_d)  = Σ_d v_d - 2 Σ_d v_d / (1 + α_d β_d)
    sigmoid:  α = e^{-q}, β = e^{-k}:     Σ_d v_d σ(q_d + k_d)     =           Σ_d v_d / (1 + α_d β_d)

and two reciprocals share one, v0/x0 + v1/x1 = (v0 x1 + v1 x0) / (x0 x1): three operations of the FMA pipe and half
a special function an element. The product x0 x1 must stay a float32, so every tile of rows carries the bound
max|exponent|; a pair of tiles past it takes a loop with one tanh an element: right everywhere. The other activations
are cheap and have a direct loop only.

float32 inputs (`EXACT`) have a loop of their own, with a reciprocal and six operations an element, that is as exact
as the textbook expression in float32:

    tanh(q + k) = y / (y + 2),  y = αβ - 1 by one rounding,  α = α_hi + α_lo,  β = β_hi + β_lo

Σv - 2 Σ v r would have the rounding of numbers near Σv in it, 15 times the error of a float32 tanh where v > 0 and
A = 128; y is exact where it is small. The rounding of α alone is one error for all keys of a query, and of β for all
queries of a key, which sums keep. And sums are made in groups. 16-bit inputs carry errors far above all of this.

The factors are laid out by tiles, (tiles, H, A, rows of a tile): one step of d loads whole vectors, from sequences
that start anywhere. A is made even; the feature that is added has v = 0.

Forward: a program has a tile of queries and walks the tiles of keys that its window shows. Where there are too few
queries to fill the chip the keys are split, and `softmax.merge` joins the parts.
The backward is in concat_bwd.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .chip import (
    LENGTHS,
    LONG,
    Chip,
    all_registers,
    chip_of,
    even,
    fitted,
    matmul_flags,
    pow2,
    strides,
    tile_rows,
    unit,
    unpressed,
)
from .masks import (
    Items,
    finite,
    key_range,
    old_dropout_scale,
    old_locate,
    old_sequence_of,
    partition,
    row_codes,
    visible,
)
from .products import add_product
from .softmax import exp, finish, merge, new_lse, no_key, pivot, store_lse

SAFE, SAFE_EXACT = 42.0, 80.0
"""Largest |exponent of αβ| for which (1 + α0 β0)(1 + α1 β1), or with `EXACT` αβ, is a float32 (under e^88.7)."""

GROUP = 16
"""With `EXACT`, features that are summed before they meet the sum of the others."""

PART = 16
"""Rows of a tile that one program makes factors of."""

FACTOR = {"tanh": 2.0, "sigmoid": -1.0}
"""The exponents of the activations that factor: α = e^{FACTOR q}."""


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    if FAST:  # one instruction, relative error 2^-23 at most by the PTX manual; 1.0 / x takes three
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit(do_not_specialize=LENGTHS)
def _concat_factor_kernel(
    x_ptr, stride_xb, stride_xh, stride_xt,  # (B, H, T, A), or packed with stride_xb = 0
    keep_ptr, stride_mb, stride_mt,  # (B, T): rows that may hold anything are False; or None
    tiles_ptr,  # (items, H, AP, tile) float32; with EXACT (items, H, 2, AP, tile), the second what is cut off
    rows_ptr,  # (items, H, tile, AP) float32: the same, transposed; or None
    bound_ptr,  # (items, H, parts) float32: max|scale x|
    cu_ptr, seq_ptr, first_ptr,
    num_seqs,
    per_seq,
    T,
    H,
    A,
    AP,
    tile_rows,  # a multiple of BLOCK_T
    scale,
    EXP: tl.constexpr,
    EXACT: tl.constexpr,
    FMA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_A: tl.constexpr,
):  # fmt: skip
    """Tiles of e^{scale x}, or of x itself without EXP; rows past the end and features past A are exponent 0.

    A program has a part of a tile, of BLOCK_T rows: tiles of whatever length are one kernel.
    """
    parts = tile_rows // BLOCK_T
    item = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    head = tl.program_id(1).to(tl.int64)
    seq, start, lo, hi, _ = old_locate(item, cu_ptr, seq_ptr, first_ptr, T, num_seqs, per_seq, tile_rows)
    i = part * BLOCK_T + tl.arange(0, BLOCK_T)
    keep = lo + i < hi
    rows = (start + lo + i).to(tl.int64)
    if keep_ptr is not None:
        keep = tl.load(keep_ptr + seq * stride_mb + rows * stride_mt, mask=keep, other=0) != 0
    ptrs = x_ptr + seq * stride_xb + head * stride_xh + rows * stride_xt
    tile = (item.to(tl.int64) * tl.num_programs(1) + head) * AP * tile_rows
    planes: tl.constexpr = 2 if EXP and EXACT else 1
    bound = tl.zeros([BLOCK_T], tl.float32)
    for a0 in range(0, AP, BLOCK_A):
        a = a0 + tl.arange(0, BLOCK_A)
        x = tl.load(ptrs[:, None] + a[None, :], mask=keep[:, None] & (a < A)[None, :], other=0.0).to(tl.float32)
        if EXP:
            x *= scale  # a power of two
            bound = tl.maximum(bound, tl.max(tl.abs(x), axis=1))
            if EXACT:
                full = tl.exp(x.to(tl.float64))
                x = full.to(tl.float32)
                rest = (full - x.to(tl.float64)).to(tl.float32)
                at = planes * tile + (AP + a[None, :]) * tile_rows + i[:, None]
                tl.store(tiles_ptr + at, rest, mask=(a < AP)[None, :])
            else:
                x = exp(x, FMA)
        tl.store(tiles_ptr + planes * tile + a[None, :] * tile_rows + i[:, None], x, mask=(a < AP)[None, :])
        if rows_ptr is not None:
            # The backward takes these times gradients that are 0 where a row is hidden: NaN must not come of it.
            if EXP:
                x = tl.where(x == x, x, 1.0)
            else:
                x = finite(x)
            tl.store(rows_ptr + tile + i[:, None] * AP + a[None, :], x, mask=(a < AP)[None, :])
    tl.store(bound_ptr + (item * tl.num_programs(1) + head) * parts + part, tl.max(bound, axis=0))


@triton.jit
def _score_factored(aq_ptr, ak_ptr, v_ptr, AP, FAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Σ_d v_d / (1 + α_d β_d), [BLOCK_M, BLOCK_N]; two features a step."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    for d in range(0, AP, 2):
        a0 = tl.load(aq_ptr + d * BLOCK_M + m)[:, None]
        a1 = tl.load(aq_ptr + (d + 1) * BLOCK_M + m)[:, None]
        b0 = tl.load(ak_ptr + d * BLOCK_N + n)[None, :]
        b1 = tl.load(ak_ptr + (d + 1) * BLOCK_N + n)[None, :]
        v0 = tl.load(v_ptr + d)
        v1 = tl.load(v_ptr + d + 1)
        # Which of two products goes into their sum unrounded is said, not left to each kernel's compilation.
        x0 = tl.fma(a0, b0, 1.0)
        x1 = tl.fma(a1, b1, 1.0)
        acc = tl.fma(tl.fma(v0, x1, v1 * x0), reciprocal(x0 * x1, FAST), acc)
    return acc


@triton.jit
def _product_exact(aq_ptr, ak_ptr, d, AP, one, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """one + α_d β_d, [BLOCK_M, BLOCK_N], from factors in two parts."""
    q_ptrs = aq_ptr + d * BLOCK_M + tl.arange(0, BLOCK_M)
    k_ptrs = ak_ptr + d * BLOCK_N + tl.arange(0, BLOCK_N)
    a = tl.load(q_ptrs)[:, None]
    b = tl.load(k_ptrs)[None, :]
    a_rest = tl.load(q_ptrs + AP * BLOCK_M)[:, None]
    b_rest = tl.load(k_ptrs + AP * BLOCK_N)[None, :]
    return tl.fma(a_rest, b, tl.fma(a, b_rest, tl.fma(a, b, one)))


@triton.jit
def _score_exact(
    aq_ptr, ak_ptr, v_ptr, AP, ACT: tl.constexpr, FAST: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Σ_d v_d act(q_d + k_d) from the factors, to the precision of float32."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, AP, GROUP):
        group = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for d in range(first, tl.minimum(first + GROUP, AP)):
            v = tl.load(v_ptr + d)
            if ACT == "tanh":
                y = _product_exact(aq_ptr, ak_ptr, d, AP, -1.0, BLOCK_M, BLOCK_N)
                group = tl.fma(v, y * reciprocal(y + 2.0, FAST), group)
            else:
                x = _product_exact(aq_ptr, ak_ptr, d, AP, 1.0, BLOCK_M, BLOCK_N)
                group = tl.fma(v, reciprocal(x, FAST), group)
        acc += group
    return acc


@triton.jit
def _score_direct(
    aq_ptr, ak_ptr, v_ptr, AP, ACT: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Σ_d v_d act(q_d + k_d), [BLOCK_M, BLOCK_N], from tiles of q and k themselves."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    for first in range(0, AP, GROUP):
        group = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for d in range(first, tl.minimum(first + GROUP, AP)):
            q = tl.load(aq_ptr + d * BLOCK_M + m)[:, None]
            k = tl.load(ak_ptr + d * BLOCK_N + n)[None, :]
            group += tl.load(v_ptr + d) * activate(q + k, ACT, False)
        acc += group
    return acc


@triton.jit
def _score_raw(q_ptrs, q_keep, k_ptrs, k_keep, v_ptr, A, ACT: tl.constexpr):
    """Σ_d v_d act(q_d + k_d) for tiles that do not factor, from rows of q and k: one exponential an element."""
    acc = tl.zeros([q_ptrs.shape[0], k_ptrs.shape[0]], tl.float32)
    for d in range(0, A):
        q = tl.load(q_ptrs + d, mask=q_keep, other=0.0).to(tl.float32)[:, None]
        k = tl.load(k_ptrs + d, mask=k_keep, other=0.0).to(tl.float32)[None, :]
        acc += tl.load(v_ptr + d) * activate(q + k, ACT, False)
    return acc


@triton.jit
def concat_scores(
    q_tile, k_tile,  # item and head of the two tiles: item * H + head
    aq_ptr, ak_ptr,  # (items, H, 1 or 2, AP, BLOCK) float32
    bq_ptr, bk_ptr,  # (items, H) float32
    q_ptrs, q_keep,  # [BLOCK_M] raw rows, and which of them may be read
    k_ptrs, k_keep,  # [BLOCK_N]
    v_ptr,  # (AP,) of this head, float32
    v_sum,  # Σ_d v_d
    A,
    AP,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
    FACTORED: tl.constexpr,
    EXACT: tl.constexpr,
    SAFE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scores of a pair of tiles, [BLOCK_M, BLOCK_N] float32."""
    aq = aq_ptr + q_tile * AP * BLOCK_M
    ak = ak_ptr + k_tile * AP * BLOCK_N
    if FACTORED:
        if tl.load(bq_ptr + q_tile) + tl.load(bk_ptr + k_tile) <= SAFE:
            if EXACT:
                s = _score_exact(
                    aq + q_tile * AP * BLOCK_M,
                    ak + k_tile * AP * BLOCK_N,
                    v_ptr,
                    AP,
                    ACT,
                    FAST,
                    GROUP,
                    BLOCK_M,
                    BLOCK_N,
                )
            else:
                s = _score_factored(aq, ak, v_ptr, AP, FAST, BLOCK_M, BLOCK_N)
                if ACT == "tanh":
                    s = v_sum - 2.0 * s
        else:
            s = _score_raw(q_ptrs, q_keep, k_ptrs, k_keep, v_ptr, A, ACT)
    else:
        s = _score_direct(aq, ak, v_ptr, AP, ACT, GROUP, BLOCK_M, BLOCK_N)
    return s


@triton.jit
def _store_whole(out_ptrs, acc, lse_ptrs, m, l, q_inside, keep):
    """The output and (m, l) of a tile whose program has seen all its keys."""
    store_lse(lse_ptrs, m, l, q_inside)
    tl.store(out_ptrs, (acc * finish(l)[:, None]).to(out_ptrs.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=LENGTHS)
def _concat_fwd_kernel(
    aq_ptr, ak_ptr,  # (items, H, 1 or 2, AP, BLOCK) float32: factors, or q and k
    bq_ptr, bk_ptr,  # (items, H) float32: their bounds
    q_ptr, stride_qb, stride_qh, stride_qt,  # (B, H, Tq, A), or packed with stride_qb = 0
    k_ptr, stride_kb, stride_kh, stride_kt,  # (B, H, Tk, A)
    v_ptr,  # (H, AP) float32
    v_sum_ptr,  # (H,) float32: Σ_d v_d
    val_ptr, stride_ub, stride_uh, stride_ut,  # (B, H, Tk, DV)
    bias_ptr, stride_sb, stride_sh, stride_sq, stride_sk,  # (B, H, Tq, Tk) or None
    mask_ptr, stride_mb, stride_mq, stride_mk,  # (B, Tq, Tk) or None
    qrow_ptr, stride_qrb, stride_qrt,  # (B, Tq): query rows that may be read, or None
    krow_ptr, stride_krb, stride_krt,  # (B, Tk): key rows that may be read, or None
    code_ptr, stride_cb, stride_ch, stride_ct,  # (B, H, Tk): of the values, see row_codes, or None
    q_cu_ptr, q_seq_ptr, q_first_ptr,  # see masks.Items
    k_cu_ptr, k_first_ptr,
    seed_ptr,
    out_ptr, stride_ob, stride_oh, stride_ot,  # (B, H, Tq, DV)
    lse_ptr, stride_lb, stride_lh, stride_lt,  # (B, H, Tq, 2) float32: (m, l), see softmax.py
    scores_ptr,  # (B, H, Tq, Tk) float32, filled with -inf, or None
    o_ptr, m_ptr, l_ptr,  # (B, H, Tq, splits[, DV]) float32; unused, or None, for one split
    splits,
    num_seqs,
    q_per_seq,
    k_per_seq,
    Tq,
    Tk,
    H,
    A,
    AP,
    DV,
    left,
    right,
    threshold,
    scale,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
    FMA: tl.constexpr,
    FACTORED: tl.constexpr,
    EXACT: tl.constexpr,
    SAFE: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    q_item = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2) % splits
    dv = (tl.program_id(2) // splits) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    seq, q_start, lo, hi, _ = old_locate(q_item, q_cu_ptr, q_seq_ptr, q_first_ptr, Tq, num_seqs, q_per_seq, BLOCK_M)
    k_start, k_length, k_item0 = old_sequence_of(seq, k_cu_ptr, k_first_ptr, Tk, num_seqs, k_per_seq)
    i = lo + tl.arange(0, BLOCK_M)
    q_inside = i < hi
    q_rows = (q_start + i).to(tl.int64)
    q_ptrs = q_ptr + seq * stride_qb + head * stride_qh + q_rows * stride_qt
    q_keep = q_inside
    if qrow_ptr is not None:
        q_keep = tl.load(qrow_ptr + seq * stride_qrb + q_rows * stride_qrt, mask=q_inside, other=0) != 0
    v_ptr += head * AP
    v_sum = tl.load(v_sum_ptr + head)
    if mask_ptr is None:
        mask_ptrs = None
    else:
        mask_ptrs = mask_ptr + seq * stride_mb

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    first, last = key_range(lo, hi, k_length, left, right, HAS_LEFT, HAS_RIGHT)
    tile0 = first // BLOCK_N
    tiles = tl.where(last > first, tl.cdiv(last, BLOCK_N) - tile0, 0)
    each = tl.cdiv(tiles, splits)
    for tile in range(tile0 + split * each, tile0 + tl.minimum((split + 1) * each, tiles)):
        j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        k_inside = j < k_length
        k_rows = (k_start + j).to(tl.int64)
        k_keep = k_inside
        if krow_ptr is not None:
            k_keep = tl.load(krow_ptr + seq * stride_krb + k_rows * stride_krt, mask=k_inside, other=0) != 0
        s = concat_scores(
            q_item.to(tl.int64) * H + head, (k_item0 + tile).to(tl.int64) * H + head, aq_ptr, ak_ptr, bq_ptr, bk_ptr,
            q_ptrs, q_keep, k_ptr + seq * stride_kb + head * stride_kh + k_rows * stride_kt, k_keep,
            v_ptr, v_sum, A, AP, ACT, FAST, FACTORED, EXACT, SAFE, GROUP, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        shown = visible(i, j, q_keep, k_keep, mask_ptrs, stride_mq, stride_mk, left, right, HAS_LEFT, HAS_RIGHT)
        if bias_ptr is not None:
            at = i[:, None].to(tl.int64) * stride_sq + j[None, :].to(tl.int64) * stride_sk
            s += tl.load(bias_ptr + seq * stride_sb + head * stride_sh + at, mask=shown, other=0.0).to(tl.float32)
        s = tl.where(shown, s, float("-inf"))
        if scores_ptr is not None:
            at = ((seq * H + head) * Tq + i[:, None]) * Tk + j[None, :]
            tl.store(scores_ptr + at, s, mask=q_inside[:, None] & k_inside[None, :])
        m_new = tl.maximum(m, tl.max(s, axis=1))
        shift = pivot(m_new)
        p = exp(s - shift[:, None], EXACT and FMA)
        alpha = tl.exp(m - shift)
        l = l * alpha + tl.sum(p, axis=1)
        m = m_new
        if seed_ptr is not None:
            p *= old_dropout_scale(seed_ptr, j[None, :], seq * H + head, i[:, None], threshold, scale)
        v_keep = k_keep
        if code_ptr is not None:
            code = tl.load(code_ptr + seq * stride_cb + head * stride_ch + k_rows * stride_ct, mask=k_keep, other=0)
            v_keep = code == 1
            p = tl.where(shown & (code == 3)[None, :], float("nan"), p)
        values = tl.load(
            val_ptr + seq * stride_ub + head * stride_uh + k_rows[:, None] * stride_ut + dv[None, :],
            mask=v_keep[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        acc = add_product(p, values, acc * alpha[:, None], COMPUTE, PRECISION)

    rows = seq * stride_lb + head * stride_lh + q_rows * stride_lt
    out_ptrs = out_ptr + seq * stride_ob + head * stride_oh + q_rows[:, None] * stride_ot + dv[None, :]
    keep = q_inside[:, None] & (dv < DV)[None, :]
    if o_ptr is None:
        _store_whole(out_ptrs, acc, lse_ptr + rows, m, l, q_inside, keep)
    else:
        if splits == 1:
            _store_whole(out_ptrs, acc, lse_ptr + rows, m, l, q_inside, keep)
        else:
            rows = rows // 2 * splits + split
            tl.store(m_ptr + rows, m, mask=q_inside)
            tl.store(l_ptr + rows, l, mask=q_inside)
            tl.store(o_ptr + rows[:, None] * DV + dv[None, :], acc, mask=keep)


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Sizes of one kernel's tiles: queries, keys, width of the values."""

    M: int
    N: int
    DV: int
    warps: int
    stages: int = 2


def fwd_blocks(chip: Chip, itemsize: int, Tq: int, Tk: int, DV: int, factored: bool, busy: bool) -> Blocks:
    """Tiles of the forward: long in the keys, so that a lane has few rows of α to load for many elements.

    `busy`: a mask or bias a pair, a window or dropout, which need registers of their own, as addresses of rows do
    that are no whole vectors. Chosen by the compile report (no spills; 4.2 instructions an element on sm_90).
    On an H200 128 keys on 4 warps are 1.07 times as fast as 256 on 8, but sigmoid spills; all else tried was slower.
    """
    if chip.backend == "interpreter":
        return Blocks(16, 32, pow2(DV, 16, 64), 4)
    if itemsize == 4:
        # Without matrix units p V is unrolled over the tile's keys, and each block of the values' width makes the
        # scores again: one block up to 128 where that does not spill. 4 scores a thread are some 15 % more
        # instructions an element than 8, of which two numbers were put on the stack.
        if factored:
            return Blocks(16, 32, pow2(DV, 16, 128), 4, 1)
        return Blocks(16, tile_rows(Tk, 64), pow2(DV, 16, 64), 8)
    if chip.backend == "hip":  # 64 lanes a wave, 64 KiB of shared memory
        return Blocks(tile_rows(Tq, 32), tile_rows(Tk, 64 if busy else 128), pow2(DV, 16, 128), 4)
    block_n = (64 if even(DV) and Tq > 16 else 32) if busy else 64 if Tk <= 128 else 256
    return Blocks(tile_rows(Tq, 32), block_n, pow2(DV, 16, 128), 4 if Tq <= 16 and block_n > 128 else 8)


class Factors(NamedTuple):
    """One side of the score, laid out by tiles."""

    tiles: Tensor  # (items, H, 1, AP, rows of a tile) float32; 2 for factors in two parts
    rows: Tensor | None  # the same with features contiguous
    bound: Tensor  # (items, H) float32
    items: Items


def factors(
    x: Tensor, keep: Tensor | None, cu_seqlens: Tensor | None, rows: int, activation: str, *, transposed: bool = False
) -> Factors:
    """Exponentials of ``x (B, H, T, A)`` (packed: B = 1), or x itself, in tiles of `rows` rows."""
    B, H, T, A = x.shape
    seqs = B if cu_seqlens is None else cu_seqlens.numel() - 1
    items = partition(seqs, T, rows, cu_seqlens, always=True)
    width, exact = A + A % 2, activation in FACTOR and x.dtype == torch.float32
    tiles = torch.empty(items.count, H, 2 if exact else 1, width, rows, dtype=torch.float32, device=x.device)
    by_row = torch.empty(items.count, H, rows, width, dtype=torch.float32, device=x.device) if transposed else None
    parts = rows // PART
    bound = torch.empty(items.count, H, parts, dtype=torch.float32, device=x.device)
    packed = cu_seqlens is not None
    layout = {**strides("xb xh xt", x, (0, 1, 2), packed=packed), **strides("mb mt", keep, (0, 1), packed=packed)}
    fitted(_concat_factor_kernel, layout)[(items.count * parts, H)](
        **layout, x_ptr=x, keep_ptr=keep, tiles_ptr=tiles, rows_ptr=by_row, bound_ptr=bound,
        cu_ptr=cu_seqlens, seq_ptr=items.seq, first_ptr=items.first, num_seqs=seqs, per_seq=items.per_seq,
        T=T, H=H, A=A, AP=width, tile_rows=rows, scale=FACTOR.get(activation, 1.0),
        EXP=activation in FACTOR, EXACT=exact, FMA=chip_of(x.device).backend != "interpreter",
        BLOCK_T=PART, BLOCK_A=pow2(width, 2, 16 if exact else 32), num_warps=4,
    )  # fmt: skip
    return Factors(tiles, by_row, bound.squeeze(2) if parts == 1 else bound.amax(2), items)


class Call(NamedTuple):
    """What the launches of one call share."""

    chip: Chip
    seqs: int
    q_rows: Tensor | None  # (B, Tq) uint8: rows that may be read
    k_rows: Tensor | None
    v: Tensor  # (H, AP) float32
    busy: bool  # see fwd_blocks
    tensors: dict[str, Tensor | int | None]
    sizes: dict[str, int | float]
    flags: dict[str, object]


def prepare(
    query: Tensor, key: Tensor, value: Tensor, v: Tensor, score_bias: Tensor | None, mask: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seed: Tensor | None,
    activation: str, left: int | None, right: int | None, dropout_p: float,
) -> Call:  # fmt: skip
    """Arguments by the kernels' names; shapes as `fused_attn.reference.concat_attention` has them."""
    chip = chip_of(query.device)
    (B, H, Tq, A), Tk = query.shape, key.shape[2]
    ragged, exact = cu_seqlens_q is not None, value.dtype == torch.float32
    query, key, value = unit(query), unit(key), unit(value)
    q_rows = k_rows = None
    if mask is not None:
        k_rows = (mask if mask.dim() == 2 else mask.any(1)).view(torch.uint8)
        q_rows = (mask.any(1, keepdim=True).expand(B, Tq) if mask.dim() == 2 else mask.any(2)).view(torch.uint8)
        mask = mask.view(torch.uint8) if mask.dim() == 3 else None
    bias = None if score_bias is None else score_bias.expand(B, H, Tq, Tk)

    return Call(
        chip,
        cu_seqlens_q.numel() - 1 if ragged else B,
        q_rows,
        k_rows,
        torch.nn.functional.pad(v.float(), (0, A % 2)).contiguous(),  # which keeps the strides of an even v
        any(x is not None for x in (bias, mask, left, right, seed)),
        {
            "q_ptr": query, **strides("qb qh qt", query, (0, 1, 2), packed=ragged),
            "k_ptr": key, **strides("kb kh kt", key, (0, 1, 2), packed=ragged),
            "val_ptr": value, **strides("ub uh ut", value, (0, 1, 2), packed=ragged),
            "bias_ptr": bias, **strides("sb sh sq sk", bias, (0, 1, 2, 3), packed=ragged),
            "mask_ptr": mask, **strides("mb mq mk", mask, (0, 1, 2), packed=ragged),
            "qrow_ptr": q_rows, **strides("qrb qrt", q_rows, (0, 1), packed=ragged),
            "krow_ptr": k_rows, **strides("krb krt", k_rows, (0, 1), packed=ragged),
            "q_cu_ptr": cu_seqlens_q, "k_cu_ptr": cu_seqlens_k, "seed_ptr": seed,
        },
        {
            "num_seqs": cu_seqlens_q.numel() - 1 if ragged else B,
            "Tq": 0 if ragged else Tq, "Tk": 0 if ragged else Tk, "H": H, "A": A, "AP": A + A % 2,
            "DV": value.shape[-1], "left": left or 0, "right": right or 0,
            "threshold": round(dropout_p * 2**24), "scale": 1.0 / (1.0 - dropout_p),
        },
        {
            "ACT": activation, "FAST": chip.backend == "cuda", "FMA": chip.backend != "interpreter",
            "FACTORED": activation in FACTOR, "EXACT": exact, "SAFE": SAFE_EXACT if exact else SAFE,
            "GROUP": GROUP if exact else 2**20,
            "HAS_LEFT": left is not None, "HAS_RIGHT": right is not None,
            **matmul_flags(chip, value.dtype),
        },
    )  # fmt: skip


def concat_fwd(
    query: Tensor, key: Tensor, value: Tensor, v: Tensor, score_bias: Tensor | None, mask: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seed: Tensor | None,
    activation: str, left: int | None, right: int | None, dropout_p: float, need_scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, lse, scores); arguments as `fused_attn.reference.concat_attention` has them.

    The scores are written only where `need_scores` says so (padded batches only), else they are empty.
    """
    cu_seqlens_q, cu_seqlens_k = (x if x is None else x.contiguous() for x in (cu_seqlens_q, cu_seqlens_k))
    call = prepare(
        query, key, value, v, score_bias, mask, cu_seqlens_q, cu_seqlens_k, seed, activation, left, right, dropout_p
    )  # fmt: skip
    (B, H, Tq, _), Tk, DV = query.shape, key.shape[2], value.shape[-1]
    out = value.new_empty(B, H, Tq, DV, dtype=torch.float32)  # the backward takes differences with it
    lse = new_lse(B, H, Tq, device=query.device)
    scores = lse.new_full((B, H, Tq, Tk) if need_scores else (0,), -torch.inf, dtype=torch.float32)
    if out.numel() == 0 or Tk == 0 or call.seqs == 0:
        return out.zero_(), no_key(lse), scores
    ragged = cu_seqlens_q is not None
    lengths = (LONG, LONG) if ragged else (Tq, Tk)
    parts = left is not None or right is not None or (mask is not None and mask.dim() == 3)
    blocks = fwd_blocks(call.chip, value.element_size(), *lengths, DV, activation in FACTOR, call.busy)
    with torch.cuda.device_of(query):
        q = factors(call.tensors["q_ptr"], call.q_rows, cu_seqlens_q, blocks.M, activation)
        k = factors(call.tensors["k_ptr"], call.k_rows, cu_seqlens_k, blocks.N, activation)
        dv_blocks = triton.cdiv(DV, blocks.DV)
        programs = q.items.count * H * dv_blocks
        splits = max(1, min(2 * call.chip.cores // programs, triton.cdiv(Tk, 2 * blocks.N)))
        # One kernel for one part and for several, where that does not spill.
        o = m = l = None if call.busy or call.flags["EXACT"] else out
        if splits > 1:
            o = torch.empty(B, H, Tq, splits, DV, dtype=torch.float32, device=query.device)
            m = torch.empty(B, H, Tq, splits, dtype=torch.float32, device=query.device)
            l = torch.empty_like(m)
        out_strides = strides("ob oh ot", out, (0, 1, 2), packed=ragged)
        codes = row_codes(call.k_rows, call.tensors["val_ptr"]) if parts else None
        kernel = fitted(_concat_fwd_kernel, {**call.tensors, **out_strides})
        kernel[(q.items.count, H, splits * dv_blocks)](
            **call.tensors, **call.sizes, **call.flags,
            aq_ptr=q.tiles, ak_ptr=k.tiles, bq_ptr=q.bound, bk_ptr=k.bound, v_ptr=call.v, v_sum_ptr=call.v.sum(1),
            q_seq_ptr=q.items.seq, q_first_ptr=q.items.first, k_first_ptr=k.items.first,
            q_per_seq=q.items.per_seq, k_per_seq=k.items.per_seq,
            code_ptr=codes, **strides("cb ch ct", codes, (0, 1, 2), packed=ragged), out_ptr=out, **out_strides,
            lse_ptr=lse, stride_lb=0 if ragged else lse.stride(0), stride_lh=lse.stride(1), stride_lt=2,
            scores_ptr=scores if need_scores else None, o_ptr=o, m_ptr=m, l_ptr=l, splits=splits,
            BLOCK_M=blocks.M, BLOCK_N=blocks.N, BLOCK_DV=blocks.DV,
            num_warps=blocks.warps, num_stages=blocks.stages,
            **(all_registers(call.chip) if call.flags["EXACT"] else unpressed(call.chip, DV)),
        )  # fmt: skip
        if splits > 1:
            parts = Items(B * H * Tq * splits, 0, splits, None, None)
            flat = B * H * Tq
            merge(
                o.view(flat * splits, 1, DV), m.view(-1, 1), l.view(-1, 1), parts,
                out.view(flat, 1, DV), lse.view(flat, 1, 2), skip_single=False,
            )  # fmt: skip
    return out, lse, scores
