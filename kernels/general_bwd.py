"""Backward of general attention, recomputed from (m, l): nothing of size Tq·Tk exists, sums have a fixed order.

With x_ij = scale q_i · k_j, a_ij = exp(s_ij - m_i) / l_i, κ_ij the dropout factor, δ_i = dO_i · o_i - l_i dl_i:

    g_ij = a_ij (κ_ij dO_i · value_j - δ_i) + dscores_ij           the gradient of s_ij, and of its bias
    dq_i = scale Σ_j g_ij act'(x_ij) k_j          dk_j = scale Σ_i g_ij act'(x_ij) q_i
    dvalue_j = Σ_i κ_ij a_ij dO_i

One kernel has a tile of queries and walks the keys for dq, the other a tile of keys and walks the queries for dk and
dvalue, with its tiles of scores transposed: what it multiplies with comes from registers. Where the values are the
keys (`SHARED`) both terms go into one sum. Nothing is added to by two programs.

float32 inputs (`EXACT`, see general.py) take dO_i · (κ_ij value_j - o_i) as one sum: where one key has all the weight
it is 0, and not the difference of two roundings. Without matrix units for float32 this costs one operation more an
element. Σ_j a_ij of it is 0 but for the rounding of o, which all keys of a query have alike: a launch before the two
(`GAP`) takes it out, by way of δ. At scores of 100 gradients were off by up to 6 times what the reference's are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, activate_grad
from .chip import LENGTHS, LONG, Chip, all_registers, even, fitted, pow2, strides, tile_rows
from .general import LOG2E, Blocks, power, prepare, product, score, widths
from .masks import key_range, old_dropout_scale, old_locate, old_sequence_of, partition, visible_pairs, whole_range
from .products import add_product


@triton.jit
def _general_gap(
    do_ptrs, out_ptrs, q_keep,  # rows [BLOCK_M, 1] or [1, BLOCK_M], and which of them may be read
    val_ptrs, k_keep,  # [1, BLOCK_N] or [BLOCK_N, 1]
    keep,  # κ of the tile, or 1
    DV,
):  # fmt: skip
    """dO · (κ value - out) of a tile, either way round."""
    shape: tl.constexpr = [do_ptrs.shape[0] * val_ptrs.shape[0], do_ptrs.shape[1] * val_ptrs.shape[1]]
    acc = tl.zeros(shape, tl.float32)
    for d in range(0, DV):
        do = tl.load(do_ptrs + d, mask=q_keep, other=0.0)
        out = tl.load(out_ptrs + d, mask=q_keep, other=0.0)
        values = tl.load(val_ptrs + d, mask=k_keep, other=0.0)
        acc = tl.fma(do, values * keep - out, acc)
    return acc


@triton.jit
def _general_gradient(
    x,  # q · k of a tile, either way round
    dp,  # dO · value; with EXACT dO · (κ value - out)
    i, j,  # positions of queries and keys, to broadcast to the tile
    inside,  # pairs of rows that may be read
    top, inv, delta,  # of the queries: m in the units of `power`, 1 / l, and δ
    keep,  # κ of the tile, or 1
    bias_ptr, stride_sq, stride_sk,  # first pair of this sequence and head, or None
    mask_ptr, stride_mq, stride_mk,
    dscores_ptr,
    dbias_ptr,
    Tk,
    left,
    right,
    scale,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
    FMA: tl.constexpr,
    EXACT: tl.constexpr,
    NATURAL: tl.constexpr,
    GAP: tl.constexpr,
    EDGE: tl.constexpr,  # some query may not see some key of this tile
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """(gradient of scale q · k, weight after dropout), 0 where a key is not visible; with GAP (a gap, weight)."""
    rate: tl.constexpr = 1.0 if NATURAL else LOG2E
    y = x if ACT == "identity" else activate(x * scale, ACT, FAST)
    bias = 0.0
    i = i.to(tl.int64)
    if EDGE:
        shown = visible_pairs(i, j, inside, mask_ptr, stride_mq, stride_mk, left, right, HAS_LEFT, HAS_RIGHT)
        if bias_ptr is not None:
            at = i * stride_sq + j.to(tl.int64) * stride_sk
            bias = tl.load(bias_ptr + at, mask=shown, other=0.0).to(tl.float32) * rate
    p = power(score(y, bias, scale, rate, ACT) - top, NATURAL, FMA) * inv
    if GAP:
        return tl.where(shown, p * dp, 0.0) if EDGE else p * dp, p
    if EXACT:
        g = p * (dp - delta)
    else:
        g = p * (dp * keep - delta)
    if EDGE:
        p = tl.where(shown, p, 0.0)
        g = tl.where(shown, g, 0.0)  # by itself: values that are hidden may be NaN
        if dscores_ptr is not None:
            g += tl.load(dscores_ptr + i * Tk + j, mask=shown, other=0.0)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + i * Tk + j, g, mask=shown)
    if ACT != "identity":
        g *= activate_grad(x * scale, y, ACT, FAST)
        if EDGE:
            g = tl.where(shown, g, 0.0)
    return g, p * keep


@triton.jit(do_not_specialize=LENGTHS)
def _general_bwd_dq_kernel(
    q_ptr, stride_qb, stride_qh, stride_qt,  # (B, H, Tq, D), or packed with stride_qb = 0
    k_ptr, stride_kb, stride_kh, stride_kt,  # (B, H, Tk, D)
    val_ptr, stride_ub, stride_uh, stride_ut,  # (B, H, Tk, DV); the keys again where SHARED
    bias_ptr, stride_sb, stride_sh, stride_sq, stride_sk,  # (B, H, Tq, Tk) or None
    mask_ptr, stride_mb, stride_mq, stride_mk,  # (B, Tq, Tk) or None
    qrow_ptr, stride_qrb, stride_qrh, stride_qrt,  # (B, H, Tq): query rows that may be read, or None
    krow_ptr, stride_krb, stride_krh, stride_krt,  # (B, H, Tk): key rows that may be read, see row_codes, or None
    q_cu_ptr, q_seq_ptr, q_first_ptr,  # see masks.Items
    k_cu_ptr,
    seed_ptr,
    do_ptr, out_ptr, stride_ob, stride_oh, stride_ot,  # (B, H, Tq, DV); out float32
    top_ptr, inv_ptr, delta_ptr, stride_lb, stride_lh, stride_lt,  # (B, H, Tq) float32
    dscores_ptr,  # (B, H, Tq, Tk) float32 or None
    dbias_ptr,  # (B, H, Tq, Tk) float32, zeros, or None
    dq_ptr, stride_db, stride_dh, stride_dt,  # (B, H, Tq, D)
    num_seqs,
    q_per_seq,
    Tq,
    Tk,
    H,
    D,
    DV,
    left,
    right,
    threshold,
    keep_scale,
    scale,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
    FMA: tl.constexpr,
    EXACT: tl.constexpr,
    NATURAL: tl.constexpr,
    GAP: tl.constexpr,  # what is left of Σ_j a_ij gap_ij goes into δ, and that is all
    SHARED: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_V: tl.constexpr,
    PLAIN: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    d_out = tl.program_id(2) * BLOCK_D + d
    dv = tl.arange(0, BLOCK_DV)
    seq, q_start, lo, hi, _ = old_locate(
        tl.program_id(0), q_cu_ptr, q_seq_ptr, q_first_ptr, Tq, num_seqs, q_per_seq, BLOCK_M
    )
    k_start, length, _ = old_sequence_of(seq, k_cu_ptr, None, Tk, num_seqs, 0)
    i = lo + tl.arange(0, BLOCK_M)
    q_inside = i < hi
    q_rows = (q_start + i).to(tl.int64)
    q_keep = q_inside
    if qrow_ptr is not None:
        q_keep = (
            tl.load(qrow_ptr + seq * stride_qrb + head * stride_qrh + q_rows * stride_qrt, mask=q_inside, other=0)
            != 0
        )
    q_ptrs = q_ptr + seq * stride_qb + head * stride_qh + q_rows * stride_qt
    o_rows = seq * stride_ob + head * stride_oh + q_rows * stride_ot
    q = 0.0
    if not WIDE:
        q = tl.load(q_ptrs[:, None] + d[None, :], mask=q_keep[:, None] & (d < D)[None, :], other=0.0)
    do = 0.0
    if not WIDE_V and not EXACT:
        do = tl.load(do_ptr + o_rows[:, None] + dv[None, :], mask=q_keep[:, None] & (dv < DV)[None, :], other=0.0)
    rows = seq * stride_lb + head * stride_lh + q_rows * stride_lt
    top = tl.load(top_ptr + rows, mask=q_keep, other=0.0)[:, None]
    inv = tl.load(inv_ptr + rows, mask=q_keep, other=0.0)[:, None]
    delta = tl.load(delta_ptr + rows, mask=q_keep, other=0.0)[:, None]
    k_row0 = k_start.to(tl.int64)
    k_ptr += seq * stride_kb + head * stride_kh + k_row0 * stride_kt
    val_ptr += seq * stride_ub + head * stride_uh + k_row0 * stride_ut
    pairs = (seq * H + head) * Tq * Tk
    if bias_ptr is not None:
        bias_ptr += seq * stride_sb + head * stride_sh
    if mask_ptr is not None:
        mask_ptr += seq * stride_mb
    if krow_ptr is not None:
        krow_ptr += seq * stride_krb + head * stride_krh + k_row0 * stride_krt
    if dscores_ptr is not None:
        dscores_ptr += pairs
    if dbias_ptr is not None:
        dbias_ptr += pairs

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    rest = tl.zeros([BLOCK_M], tl.float32)
    first, last = key_range(lo, hi, length, left, right, HAS_LEFT, HAS_RIGHT)
    begin = first // BLOCK_N
    end = tl.where((last > first) & (lo < hi), tl.cdiv(last, BLOCK_N), begin)
    whole0 = begin  # the whole tiles are [whole0, whole1)
    whole1 = begin
    if PLAIN:
        first, last = whole_range(lo, hi, length, left, right, HAS_LEFT, HAS_RIGHT)
        whole0 = tl.minimum(tl.maximum(tl.cdiv(first, BLOCK_N), begin), end)
        whole1 = tl.maximum(tl.minimum(last // BLOCK_N, end), whole0)
    for EDGE in tl.static_range(0 if PLAIN else 1, 2):  # the whole tiles, then those on either side
        for n in range(begin if EDGE else whole0, end - (whole1 - whole0) if EDGE else whole1):
            tile = tl.where(n < whole0, n, n + (whole1 - whole0)) if EDGE else n
            j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            k_rows = j.to(tl.int64)
            k_seen = tl.full([BLOCK_N], True, tl.int1)
            k_keep = k_seen
            if EDGE:
                k_seen = j < length
                k_keep = k_seen
                if krow_ptr is not None:
                    code = tl.load(krow_ptr + k_rows * stride_krt, mask=k_seen, other=0)
                    k_seen = code != 0
                    k_keep = k_seen & (code != 3)
            k_ptrs = k_ptr + k_rows * stride_kt
            val_ptrs = val_ptr + k_rows * stride_ut
            k = 0.0
            if not WIDE:
                k = tl.load(k_ptrs[:, None] + d[None, :], mask=k_keep[:, None] & (d < D)[None, :], other=0.0)
            x = product(q, q_ptrs, q_keep, k, k_ptrs, k_keep, D, WIDE, COMPUTE, PRECISION, BLOCK_D)
            keep = 1.0
            if seed_ptr is not None:
                keep = old_dropout_scale(seed_ptr, j[None, :], seq * H + head, i[:, None], threshold, keep_scale)
            if EXACT:
                dp = _general_gap(
                    (do_ptr + o_rows)[:, None], (out_ptr + o_rows)[:, None], q_keep[:, None],
                    val_ptrs[None, :], k_keep[None, :], keep, DV,
                )  # fmt: skip
            else:
                if SHARED and not WIDE:
                    values = k
                elif not WIDE_V:
                    values = tl.load(
                        val_ptrs[:, None] + dv[None, :], mask=k_keep[:, None] & (dv < DV)[None, :], other=0.0
                    )
                else:
                    values = 0.0
                dp = product(
                    do, do_ptr + o_rows, q_keep, values, val_ptrs, k_keep, DV, WIDE_V, COMPUTE, PRECISION, BLOCK_DV
                )
            g, _p = _general_gradient(
                x, dp, i[:, None], j[None, :], q_keep[:, None] & k_seen[None, :], top, inv, delta, keep,
                bias_ptr, stride_sq, stride_sk, mask_ptr, stride_mq, stride_mk, dscores_ptr, dbias_ptr,
                Tk, left, right, scale, ACT, FAST, FMA, EXACT, NATURAL, GAP, EDGE, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            if GAP:
                rest += tl.sum(g, axis=1)
            else:
                if WIDE:
                    k = tl.load(
                        k_ptrs[:, None] + d_out[None, :], mask=k_keep[:, None] & (d_out < D)[None, :], other=0.0
                    )
                acc = add_product(g, k, acc, COMPUTE, PRECISION)
    if GAP:
        tl.store(delta_ptr + rows[:, None], delta + rest[:, None], mask=q_keep[:, None])
    else:
        tl.store(
            dq_ptr + seq * stride_db + head * stride_dh + q_rows[:, None] * stride_dt + d_out[None, :],
            (acc * scale).to(dq_ptr.dtype.element_ty),
            mask=q_inside[:, None] & (d_out < D)[None, :],
        )


@triton.jit(do_not_specialize=LENGTHS)
def _general_bwd_dkv_kernel(
    q_ptr, stride_qb, stride_qh, stride_qt,  # (B, H, Tq, D), or packed with stride_qb = 0
    k_ptr, stride_kb, stride_kh, stride_kt,  # (B, H, Tk, D)
    val_ptr, stride_ub, stride_uh, stride_ut,  # (B, H, Tk, DV); the keys again where SHARED
    bias_ptr, stride_sb, stride_sh, stride_sq, stride_sk,  # (B, H, Tq, Tk) or None
    mask_ptr, stride_mb, stride_mq, stride_mk,  # (B, Tq, Tk) or None
    qrow_ptr, stride_qrb, stride_qrh, stride_qrt,  # (B, H, Tq): query rows that may be read, or None
    krow_ptr, stride_krb, stride_krh, stride_krt,  # (B, H, Tk): key rows that may be read, see row_codes, or None
    q_cu_ptr,  # see masks.Items
    k_cu_ptr, k_seq_ptr, k_first_ptr,
    seed_ptr,
    do_ptr, out_ptr, stride_ob, stride_oh, stride_ot,  # (B, H, Tq, DV); out float32
    top_ptr, inv_ptr, delta_ptr, stride_lb, stride_lh, stride_lt,  # (B, H, Tq) float32
    dscores_ptr,  # (B, H, Tq, Tk) float32 or None
    dk_ptr, stride_db, stride_dh, stride_dt,  # (B, H, Tk, D), or None; with SHARED of both terms
    dval_ptr, stride_eb, stride_eh, stride_et,  # (B, H, Tk, DV), or None
    num_seqs,
    k_per_seq,
    Tq,
    Tk,
    H,
    D,
    DV,
    left,
    right,
    threshold,
    keep_scale,
    scale,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
    FMA: tl.constexpr,
    EXACT: tl.constexpr,
    NATURAL: tl.constexpr,
    SHARED: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_V: tl.constexpr,
    PLAIN: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    d_out = tl.program_id(2) * BLOCK_D + d
    dv_out = tl.program_id(2) * BLOCK_DV + dv
    seq, k_start, lo, hi, _ = old_locate(
        tl.program_id(0), k_cu_ptr, k_seq_ptr, k_first_ptr, Tk, num_seqs, k_per_seq, BLOCK_N
    )
    q_start, length, _ = old_sequence_of(seq, q_cu_ptr, None, Tq, num_seqs, 0)
    j = lo + tl.arange(0, BLOCK_N)
    k_inside = j < hi
    k_rows = (k_start + j).to(tl.int64)
    k_keep = k_inside
    if krow_ptr is not None:
        k_keep = (
            tl.load(krow_ptr + seq * stride_krb + head * stride_krh + k_rows * stride_krt, mask=k_inside, other=0)
            != 0
        )
    k_ptrs = k_ptr + seq * stride_kb + head * stride_kh + k_rows * stride_kt
    val_ptrs = val_ptr + seq * stride_ub + head * stride_uh + k_rows * stride_ut
    k = 0.0
    if not WIDE:
        k = tl.load(k_ptrs[:, None] + d[None, :], mask=k_keep[:, None] & (d < D)[None, :], other=0.0)
    values = 0.0
    if SHARED and not WIDE:
        values = k
    elif not WIDE_V and not EXACT:
        values = tl.load(val_ptrs[:, None] + dv[None, :], mask=k_keep[:, None] & (dv < DV)[None, :], other=0.0)
    q_row0 = q_start.to(tl.int64)
    q_ptr += seq * stride_qb + head * stride_qh + q_row0 * stride_qt
    o_row0 = seq * stride_ob + head * stride_oh + q_row0 * stride_ot
    l_row0 = seq * stride_lb + head * stride_lh + q_row0 * stride_lt
    if bias_ptr is not None:
        bias_ptr += seq * stride_sb + head * stride_sh
    if mask_ptr is not None:
        mask_ptr += seq * stride_mb
    if qrow_ptr is not None:
        qrow_ptr += seq * stride_qrb + head * stride_qrh + q_row0 * stride_qrt
    if dscores_ptr is not None:
        dscores_ptr += (seq * H + head) * Tq * Tk

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dval = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # The queries that see a key of this tile: the window, looked through from its other end.
    first, last = key_range(lo, hi, length, right, left, HAS_RIGHT, HAS_LEFT)
    begin = first // BLOCK_M
    end = tl.where((last > first) & (lo < hi), tl.cdiv(last, BLOCK_M), begin)
    whole0 = begin  # the whole tiles are [whole0, whole1)
    whole1 = begin
    if PLAIN:
        first, last = whole_range(lo, hi, length, right, left, HAS_RIGHT, HAS_LEFT)
        whole0 = tl.minimum(tl.maximum(tl.cdiv(first, BLOCK_M), begin), end)
        whole1 = tl.maximum(tl.minimum(last // BLOCK_M, end), whole0)
    for EDGE in tl.static_range(0 if PLAIN else 1, 2):  # the whole tiles, then those on either side
        for n in range(begin if EDGE else whole0, end - (whole1 - whole0) if EDGE else whole1):
            tile = tl.where(n < whole0, n, n + (whole1 - whole0)) if EDGE else n
            i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            q_rows = i.to(tl.int64)
            q_keep = tl.full([BLOCK_M], True, tl.int1)
            q_good = q_keep
            if EDGE:
                q_keep = i < length
                q_good = q_keep
                if qrow_ptr is not None:
                    code = tl.load(qrow_ptr + q_rows * stride_qrt, mask=q_keep, other=0)
                    q_keep = code != 0
                    q_good = code == 1
            q_ptrs = q_ptr + q_rows * stride_qt
            o_rows = o_row0 + q_rows * stride_ot
            q = 0.0
            if not WIDE:
                q = tl.load(q_ptrs[:, None] + d[None, :], mask=q_good[:, None] & (d < D)[None, :], other=0.0)
            x = product(k, k_ptrs, k_keep, q, q_ptrs, q_good, D, WIDE, COMPUTE, PRECISION, BLOCK_D)
            keep = 1.0
            if seed_ptr is not None:
                keep = old_dropout_scale(seed_ptr, j[:, None], seq * H + head, i[None, :], threshold, keep_scale)
            do = 0.0
            if not WIDE_V:
                do = tl.load(
                    do_ptr + o_rows[:, None] + dv[None, :], mask=q_good[:, None] & (dv < DV)[None, :], other=0.0
                )
            if EXACT:
                dp = _general_gap(
                    (do_ptr + o_rows)[None, :], (out_ptr + o_rows)[None, :], q_good[None, :],
                    val_ptrs[:, None], k_keep[:, None], keep, DV,
                )  # fmt: skip
            else:
                dp = product(
                    values, val_ptrs, k_keep, do, do_ptr + o_rows, q_good, DV, WIDE_V, COMPUTE, PRECISION, BLOCK_DV
                )
            rows = l_row0 + q_rows * stride_lt
            g, p = _general_gradient(
                x, dp, i[None, :], j[:, None], q_keep[None, :] & k_keep[:, None],
                tl.load(top_ptr + rows, mask=q_keep, other=0.0)[None, :],
                tl.load(inv_ptr + rows, mask=q_good, other=0.0)[None, :],
                tl.load(delta_ptr + rows, mask=q_good, other=0.0)[None, :],
                keep, bias_ptr, stride_sq, stride_sk, mask_ptr, stride_mq, stride_mk, dscores_ptr, None,
                Tk, left, right, scale, ACT, FAST, FMA, EXACT, NATURAL, False, EDGE, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            if dk_ptr is not None:
                if WIDE:
                    q = tl.load(
                        q_ptrs[:, None] + d_out[None, :], mask=q_good[:, None] & (d_out < D)[None, :], other=0.0
                    )
                dk = add_product(g * scale, q, dk, COMPUTE, PRECISION)
            if dval_ptr is not None or SHARED:
                if WIDE_V:
                    do = tl.load(
                        do_ptr + o_rows[:, None] + dv_out[None, :],
                        mask=q_good[:, None] & (dv_out < DV)[None, :],
                        other=0.0,
                    )
                if SHARED:
                    dk = add_product(p, do, dk, COMPUTE, PRECISION)
                else:
                    dval = add_product(p, do, dval, COMPUTE, PRECISION)
    if dk_ptr is not None:
        tl.store(
            dk_ptr + seq * stride_db + head * stride_dh + k_rows[:, None] * stride_dt + d_out[None, :],
            dk.to(dk_ptr.dtype.element_ty),
            mask=k_inside[:, None] & (d_out < D)[None, :],
        )
    if dval_ptr is not None:
        tl.store(
            dval_ptr + seq * stride_eb + head * stride_eh + k_rows[:, None] * stride_et + dv_out[None, :],
            dval.to(dval_ptr.dtype.element_ty),
            mask=k_inside[:, None] & (dv_out < DV)[None, :],
        )


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


def bwd_blocks(
    chip: Chip, itemsize: int, Tq: int, Tk: int, D: int, DV: int, plain: bool, busy: bool, parts: bool
) -> tuple[Blocks, Blocks]:
    """Tiles of the kernel for dq, and of that for dk and dvalue; `plain` and `busy` as in the forward.

    parts: a key may be hidden from some queries only, which costs registers too.

    Chosen by the compile report (no spills; wgmma on sm_90 from 64 rows on); for sm_90 timed on an H200.
    """
    if chip.backend == "interpreter":
        blocks = Blocks(16, 32, pow2(D, 16, 32), pow2(DV, 16, 32), 4, 2)
        return blocks, blocks
    hip, roomy = chip.backend == "hip", chip.shared > 200_000
    if itemsize == 4:  # without matrix units a product is unrolled over its width
        width, value_width = pow2(D, 16, 32), pow2(DV, 16, 32)
        if chip.hopper and plain and Tq <= 16:
            return Blocks(16, 32, width, value_width, 4, 1), Blocks(16, 128, width, value_width, 8, 1)
        for_q = Blocks(32, 32 if plain else 16, width, value_width, 8, 1)
        return for_q, Blocks(32, 32, width, value_width, 4 if hip else 8, 1)
    width, value_width = widths(D, DV)
    m, n = tile_rows(Tq, 64), tile_rows(Tk, 64)
    few_m, few_n = min(m, 32), min(n, 32)
    size = max(width, value_width)
    if hip:  # a thread of 4 waves has up to 512 registers
        for_k = Blocks(16 if size > 128 or not plain else few_m, few_n, width, value_width, 4, 1)
        return Blocks(few_m, few_n, width, value_width, 4, 1), for_k
    if max(D, DV) > 256:
        stages = 2 if roomy else 1
        for_k = Blocks(few_m, n if roomy and not busy else few_n, width, value_width, 8, stages)
        return Blocks(few_m if busy else m, few_n, width, value_width, 8, stages), for_k
    if not even(D, DV):
        few = max(16, 4096 // (max(size, 64) * (1 + busy)))  # a busy pair needs registers as a wide row does
        for_q = Blocks(min(m, few), min(n, few), width, value_width, 8, 1)
        return for_q, for_q._replace(N=min(n, few if plain else max(16, few // 2)))
    if not plain:
        short = size > 128 or (size == 128 and busy and (chip.small or parts))
        few = 16 if size > 128 else few_m
        for_k = Blocks(few, 16 if short else few_n, width, value_width, 8, 1)
        return Blocks(16, few_n, width, value_width, 8, 1), for_k
    if chip.hopper and size > 128 and Tq <= 16 and not parts:
        return Blocks(16, 128, width, value_width, 4, 2), Blocks(few_m, few_n, width, value_width, 8, 2)
    if chip.hopper and size == 128 and Tq > 64 and not parts:
        return Blocks(128, n, width, value_width, 8, 3), Blocks(few_m, tile_rows(Tk, 128), width, value_width, 8, 2)
    if size > 128:
        for_q = Blocks(m, 16 if chip.small else few_n, width, value_width, 8, 2)
        return for_q, Blocks(few_m, few_n, width, value_width, 8, 2)
    large = size > 64
    n_k = few_n if large and parts and not roomy else n
    for_k = Blocks(few_m if large or not roomy else m, n_k, width, value_width, 8 if large else 4, 2)
    return Blocks(m, n, width, value_width, 8 if large and not roomy else 4, 2), for_k


def general_bwd(
    dout: Tensor, dlse: Tensor | None, dscores: Tensor | None,
    query: Tensor, key: Tensor, value: Tensor | None, score_bias: Tensor | None, mask: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seed: Tensor | None, out: Tensor, lse: Tensor,
    activation: str, scale: float, left: int | None, right: int | None, dropout_p: float, natural: bool,
    needs: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of (query, key, value, score_bias), None where `needs` is False.

    natural: whether the forward returned its scores, and took e^s of them (see general.py).
    """
    call = prepare(
        query, key, value, score_bias, mask, cu_seqlens_q, cu_seqlens_k, seed,
        activation, scale, left, right, dropout_p, natural, backward=True,
    )  # fmt: skip
    need_q, need_k, need_value, need_bias = needs
    (B, H, Tq, D), Tk, DV = query.shape, key.shape[2], call.sizes["DV"]
    packed, exact = cu_seqlens_q is not None, call.flags["EXACT"]
    dq = torch.empty(query.shape, dtype=query.dtype, device=query.device) if need_q else None
    dk = torch.empty(key.shape, dtype=key.dtype, device=key.device) if need_k else None
    dvalue = torch.empty(value.shape, dtype=value.dtype, device=value.device) if need_value else None
    dbias = torch.zeros(B, H, Tq, Tk, dtype=torch.float32, device=query.device) if need_bias else None
    if query.numel() and key.numel() and call.seqs:
        # The gap of float32 is made in the kernels; -l dl is left of δ.
        top, total = (x.contiguous() for x in lse.unbind(-1))
        delta = torch.zeros_like(top) if exact else (dout * out).sum(-1)
        delta = delta if dlse is None else delta - dlse[..., 1] * total
        top, inv = top.masked_fill(top == -torch.inf, 0), total.masked_fill(total == 0, torch.inf).reciprocal()
        dout = dout.to(key.dtype).contiguous()
        args = {
            **call.tensors, **call.sizes, **call.flags, "PLAIN": call.plain and dscores is None,
            "do_ptr": dout, "out_ptr": out.contiguous(), **strides("ob oh ot", dout, (0, 1, 2), packed=packed),
            "top_ptr": top, "inv_ptr": inv, "delta_ptr": delta,
            **strides("lb lh lt", top, (0, 1, 2), packed=packed),
            "dscores_ptr": None if dscores is None else dscores.contiguous(), "dbias_ptr": dbias,
            "dval_ptr": dvalue, **strides("eb eh et", dvalue, (0, 1, 2), packed=packed),
        }  # fmt: skip

        def launch(kernel, grid: tuple[int, ...], blocks: Blocks, **more: object) -> None:
            more |= {"WIDE": blocks.D < D, "WIDE_V": blocks.DV < DV}
            more |= {f"BLOCK_{name}": getattr(blocks, name) for name in ("M", "N", "D", "DV")}
            named = {name: {**args, **more}[name] for name in kernel.arg_names}
            tight = exact or more["WIDE"] or more["WIDE_V"] or not (args["PLAIN"] and even(D, DV))
            options = all_registers(call.chip) if tight else {}
            fitted(kernel, named)[grid](**named, num_warps=blocks.warps, num_stages=blocks.stages, **options)

        lengths, busy = (LONG, LONG) if packed else (Tq, Tk), call.busy or dscores is not None
        parts = left is not None or right is not None or (mask is not None and mask.dim() == 3)
        for_q, for_k = bwd_blocks(call.chip, key.element_size(), *lengths, D, DV, args["PLAIN"], busy, parts)
        with torch.cuda.device_of(query):
            gap = exact and (need_q or need_k or need_bias)  # the gradient of the values needs no δ
            if gap or need_q or need_bias:
                items = partition(call.seqs, Tq, for_q.M, cu_seqlens_q, always=True)
                of_queries = {"q_seq_ptr": items.seq, "q_first_ptr": items.first, "q_per_seq": items.per_seq}
            if gap:
                launch(
                    _general_bwd_dq_kernel, (items.count, H, 1), for_q, GAP=True, **of_queries, dscores_ptr=None,
                    dbias_ptr=None, dq_ptr=None, **strides("db dh dt", None, (0, 1, 2), packed=packed),
                )  # fmt: skip
            if need_q or need_bias:
                made = torch.empty_like(query, memory_format=torch.contiguous_format) if dq is None else dq
                launch(
                    _general_bwd_dq_kernel, (items.count, H, triton.cdiv(D, for_q.D)), for_q, GAP=False,
                    **of_queries, dq_ptr=made, **strides("db dh dt", made, (0, 1, 2), packed=packed),
                )  # fmt: skip
            if need_k or need_value:
                items = partition(call.seqs, Tk, for_k.N, cu_seqlens_k, always=True)
                launch(
                    _general_bwd_dkv_kernel,
                    (items.count, H, max(triton.cdiv(D, for_k.D), triton.cdiv(DV, for_k.DV))), for_k,
                    k_seq_ptr=items.seq, k_first_ptr=items.first, k_per_seq=items.per_seq,
                    dk_ptr=dk, **strides("db dh dt", dk, (0, 1, 2), packed=packed),
                )  # fmt: skip
    else:
        dq, dk, dvalue = (None if x is None else x.zero_() for x in (dq, dk, dvalue))
    return [dq, dk, dvalue, dbias.sum_to_size(score_bias.shape).to(score_bias.dtype) if need_bias else None]
