"""Backward of concat attention, recomputed from (m, l): nothing of size Tq·Tk·A exists, sums have a fixed order.

With a_ij = exp(s_ij - m_i) / l_i, k_ij the dropout factor, δ_i = dO_i · o_i - l_i dl_i:

    g_ij = a_ij (k_ij dO_i · value_j - δ_i) + dscores_ij           the gradient of s_ij, and of its bias
    dvalue_j = Σ_i k_ij a_ij dO_i
    dq_id = Σ_j g_ij v_d act'(q_id + k_jd)        dk_jd = Σ_i g_ij v_d act'(q_id + k_jd)
    dv_d  = Σ_ij g_ij act(q_id + k_jd)

Both dq and dk need g, and g needs the score, a whole forward's work. So g is made once, for as many tiles of
queries as a workspace of fixed size holds (`WORKSPACE_BYTES`), and both loops run on it. (Packed rows are in
concat_bwd_packed.py.) With r = 1 / (1 + αβ):

    tanh:     t = 1 - 2r,  1 - t² = 4 (r - r²)      σ = r,  σ' = r - r²  (of -(q + k), whose sign FACTOR has)

so dq_id = c v_d Σ_j g_ij (r - r²) with c = 4 or 1, and dv wants Σ_j g_ij r. (Σ g r - Σ g r² would cost as much
and lose what cancels: its error was ten times that of the sum of differences.) A thread has
(row, feature) pairs and walks the other axis, two steps with one reciprocal: 1/x0 = x1 / (x0 x1). Sums stay in
registers; no shuffles, no atomics.

float32 inputs (`EXACT`, see concat.py) sum g t for dv, and w - w² with w = min(r, 1 - r) for r - r², which keeps its
precision on both sides; a tile at a time. And for them dO_i · (k_ij value_j - o_i) is one sum: where one key has all
the weight it is 0, and not the difference of two roundings. Without matrix units for float32 this costs one
operation more an element.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chip import LENGTHS, LONG, Chip, fitted, pow2, strides, tile_rows, unpressed
from .concat import Blocks, Call, factors, prepare
from .concat_walk import gradient_tile, walk_tile
from .masks import key_range, old_locate, old_sequence_of
from .products import add_product

WORKSPACE_BYTES = 64 * 2**20


@triton.jit(do_not_specialize=LENGTHS)
def _concat_bwd_g_kernel(
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
    q_cu_ptr, q_seq_ptr, q_first_ptr,  # see masks.Items
    k_cu_ptr, k_first_ptr,
    seed_ptr,
    do_ptr, stride_ob, stride_oh, stride_ot,  # (B, H, Tq, DV)
    lse_ptr,  # (B, H, Tq, 2) float32: (m, l)
    delta_ptr, stride_lb, stride_lh, stride_lt,  # (B, H, Tq) float32: dO · o - l dl; with EXACT -l dl
    out_ptr,  # (B, H, Tq, DV) float32, with the strides of dO
    dscores_ptr,  # (B, H, Tq, Tk) float32 or None
    dbias_ptr,  # (B, H, Tq, Tk) float32, zeros, or None
    g_ptr,  # (q items of this launch, H, k tiles, BLOCK_N, BLOCK_M) float32
    gt_ptr,  # the same with (BLOCK_M, BLOCK_N)
    p_ptr,  # as g, in COMPUTE
    q_item0,
    k_tiles,
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
    """One pair of tiles of a padded batch."""
    local = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(2)
    q_item = q_item0 + local
    seq, q_start, lo, hi, _ = old_locate(q_item, q_cu_ptr, q_seq_ptr, q_first_ptr, Tq, num_seqs, q_per_seq, BLOCK_M)
    k_start, k_length, k_item0 = old_sequence_of(seq, k_cu_ptr, k_first_ptr, Tk, num_seqs, k_per_seq)
    slot = ((local.to(tl.int64) * H + head) * k_tiles + tile) * BLOCK_N * BLOCK_M
    gradient_tile(
        slot, q_item, head, tile, seq, q_start, lo, hi, k_start, k_length, k_item0, aq_ptr, ak_ptr, bq_ptr, bk_ptr,
        q_ptr, stride_qb, stride_qh, stride_qt, k_ptr, stride_kb, stride_kh, stride_kt, v_ptr, v_sum_ptr, val_ptr,
        stride_ub, stride_uh, stride_ut, bias_ptr, stride_sb, stride_sh, stride_sq, stride_sk, mask_ptr, stride_mb,
        stride_mq, stride_mk, qrow_ptr, stride_qrb, stride_qrt, krow_ptr, stride_krb, stride_krt, seed_ptr, do_ptr,
        stride_ob, stride_oh, stride_ot, lse_ptr, delta_ptr, stride_lb, stride_lh, stride_lt, out_ptr, dscores_ptr,
        dbias_ptr, g_ptr, gt_ptr, p_ptr, Tq, Tk, H, A, AP, DV, left, right, threshold, scale, ACT, FAST, FMA,
        FACTORED, EXACT, SAFE, GROUP, HAS_LEFT, HAS_RIGHT, COMPUTE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_DV,
    )  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def _concat_bwd_dq_kernel(
    rq_ptr,  # (q items, H, BLOCK_M, AP) float32
    rk_ptr,  # (k items, H, BLOCK_N, AP) float32
    bq_ptr, bk_ptr,  # (items, H) float32
    q_ptr, stride_qb, stride_qh, stride_qt,  # (B, H, Tq, A), or packed with stride_qb = 0
    k_ptr, stride_kb, stride_kh, stride_kt,  # (B, H, Tk, A)
    v_ptr,  # (H, AP) float32
    qrow_ptr, stride_qrb, stride_qrt,
    krow_ptr, stride_krb, stride_krt,
    q_cu_ptr, q_seq_ptr, q_first_ptr,
    k_cu_ptr, k_first_ptr,
    g_ptr,  # (q items of this launch, H, k tiles, BLOCK_N, BLOCK_M) float32
    dq_ptr,  # (splits, B, H, Tq, A) float32, contiguous
    dv_ptr,  # (splits, q items, H, AP) float32: one sum a program
    stride_dp, stride_db, stride_dh,  # of dq
    splits,
    all_q_items,  # of all launches
    q_item0,
    k_tiles,
    num_seqs,
    q_per_seq,
    k_per_seq,
    Tq,
    Tk,
    H,
    A,
    AP,
    left,
    right,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
    FACTORED: tl.constexpr,
    EXACT: tl.constexpr,
    SAFE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    local = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2) % splits
    d = (tl.program_id(2) // splits) * BLOCK_D + tl.arange(0, BLOCK_D)
    q_item = q_item0 + local
    seq, q_start, lo, hi, _ = old_locate(q_item, q_cu_ptr, q_seq_ptr, q_first_ptr, Tq, num_seqs, q_per_seq, BLOCK_M)
    k_start, k_length, k_item0 = old_sequence_of(seq, k_cu_ptr, k_first_ptr, Tk, num_seqs, k_per_seq)
    m = tl.arange(0, BLOCK_M)
    q_rows = (q_start + lo + m).to(tl.int64)
    q_keep = lo + m < hi
    if qrow_ptr is not None:
        q_keep = tl.load(qrow_ptr + seq * stride_qrb + q_rows * stride_qrt, mask=q_keep, other=0) != 0
    q_tile = q_item.to(tl.int64) * H + head
    x = tl.load(rq_ptr + (q_tile * BLOCK_M + m[:, None]) * AP + d[None, :], mask=(d < AP)[None, :], other=0.0)
    s1 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    s2 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    first, last = key_range(lo, hi, k_length, left, right, HAS_LEFT, HAS_RIGHT)
    tile0 = first // BLOCK_N
    tiles = tl.where((last > first) & (lo < hi), tl.cdiv(last, BLOCK_N) - tile0, 0)
    each = tl.cdiv(tiles, splits)
    for tile in range(tile0 + split * each, tile0 + tl.minimum((split + 1) * each, tiles)):
        k_tile = (k_item0 + tile).to(tl.int64) * H + head
        g_tile = g_ptr + ((local.to(tl.int64) * H + head) * k_tiles + tile) * BLOCK_N * BLOCK_M
        row0 = (k_start + tile * BLOCK_N).to(tl.int64)
        if krow_ptr is None:
            keep_ptr = None
        else:
            keep_ptr = krow_ptr + seq * stride_krb
        s1, s2 = walk_tile(
            s1, s2, x, rk_ptr + k_tile * BLOCK_N * AP, g_tile, BLOCK_M,
            tl.minimum(BLOCK_N, tl.cdiv(last - tile * BLOCK_N, 2) * 2),
            q_ptr + seq * stride_qb + head * stride_qh + q_rows * stride_qt, q_keep,
            k_ptr + seq * stride_kb + head * stride_kh, stride_kt, row0, k_length - tile * BLOCK_N,
            keep_ptr, stride_krt, d, A, AP,
            tl.load(bq_ptr + q_tile) + tl.load(bk_ptr + k_tile) <= SAFE,
            ACT, FAST, FACTORED, EXACT, True,
        )  # fmt: skip
        if ACT == "tanh" and not EXACT:
            n = tl.arange(0, BLOCK_N)
            total += tl.sum(tl.load(g_tile + n[:, None] * BLOCK_M + m[None, :]), axis=0)
    v = tl.load(v_ptr + head * AP + d, mask=d < AP, other=0.0)[None, :]
    if ACT == "tanh":
        s2 *= 4.0
        if not EXACT:
            s1 = total[:, None] - 2.0 * s1
    part = split.to(tl.int64)
    tl.store(
        dq_ptr + part * stride_dp + seq * stride_db + head * stride_dh + q_rows[:, None] * A + d[None, :],
        v * s2,
        mask=(lo + m < hi)[:, None] & (d < A)[None, :],
    )
    tl.store(dv_ptr + (part * all_q_items * H + q_tile) * AP + d, tl.sum(s1, axis=0), mask=d < AP)


@triton.jit(do_not_specialize=LENGTHS)
def _concat_bwd_dk_kernel(
    rk_ptr,  # (k items, H, BLOCK_N, AP) float32
    rq_ptr,  # (q items, H, BLOCK_M, AP) float32
    bq_ptr, bk_ptr,  # (items, H) float32
    q_ptr, stride_qb, stride_qh, stride_qt,  # (B, H, Tq, A), or packed with stride_qb = 0
    k_ptr, stride_kb, stride_kh, stride_kt,  # (B, H, Tk, A)
    v_ptr,  # (H, AP) float32
    qrow_ptr, stride_qrb, stride_qrt,
    krow_ptr, stride_krb, stride_krt,
    q_cu_ptr, q_first_ptr,
    k_cu_ptr, k_seq_ptr, k_first_ptr,
    gt_ptr,  # (q items of this launch, H, k tiles, BLOCK_M, BLOCK_N) float32
    dk_ptr,  # (B, H, Tk, A) float32, contiguous: added to
    stride_db, stride_dh,  # of dk
    q_item0,
    q_items,  # of this launch
    k_tiles,
    num_seqs,
    q_per_seq,
    k_per_seq,
    Tq,
    Tk,
    H,
    A,
    AP,
    left,
    right,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
    FACTORED: tl.constexpr,
    EXACT: tl.constexpr,
    SAFE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of the tile of keys that a program has
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = BLOCK_N // BLOCK_R
    k_item = tl.program_id(0) // parts
    offset = (tl.program_id(0) % parts) * BLOCK_R
    head = tl.program_id(1).to(tl.int64)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    seq, k_start, k_lo, k_hi, _ = old_locate(
        k_item, k_cu_ptr, k_seq_ptr, k_first_ptr, Tk, num_seqs, k_per_seq, BLOCK_N
    )
    q_start, q_length, q_first = old_sequence_of(seq, q_cu_ptr, q_first_ptr, Tq, num_seqs, q_per_seq)
    r = tl.arange(0, BLOCK_R)
    j = k_lo + offset + r
    k_rows = (k_start + j).to(tl.int64)
    k_keep = j < k_hi
    if krow_ptr is not None:
        k_keep = tl.load(krow_ptr + seq * stride_krb + k_rows * stride_krt, mask=k_keep, other=0) != 0
    k_tile = k_item.to(tl.int64) * H + head
    x = tl.load(
        rk_ptr + (k_tile * BLOCK_N + offset + r[:, None]) * AP + d[None, :], mask=(d < AP)[None, :], other=0.0
    )
    s1 = tl.zeros([1, 1], tl.float32)
    s2 = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    # Tiles of queries of this sequence that are in this launch and see some of these keys.
    q_tile0 = tl.maximum(q_item0 - q_first, 0)
    q_tile1 = tl.minimum(q_item0 + q_items - q_first, tl.cdiv(tl.maximum(q_length, 0), BLOCK_M))
    if HAS_RIGHT:
        q_tile0 = tl.maximum(q_tile0, (k_lo + offset - right) // BLOCK_M)
    if HAS_LEFT:
        q_tile1 = tl.minimum(q_tile1, tl.cdiv(tl.maximum(k_lo + offset + BLOCK_R + left, 0), BLOCK_M))
    q_tile1 = tl.where(k_lo + offset < k_hi, q_tile1, q_tile0)
    for tile in range(q_tile0, q_tile1):
        lo = tile * BLOCK_M
        first, last = key_range(lo, tl.minimum(lo + BLOCK_M, q_length), k_hi, left, right, HAS_LEFT, HAS_RIGHT)
        if (k_lo < last) & (k_lo + BLOCK_N > first):
            q_tile = (q_first + tile).to(tl.int64) * H + head
            slot = ((q_first + tile - q_item0).to(tl.int64) * H + head) * k_tiles + k_lo // BLOCK_N
            row0 = (q_start + lo).to(tl.int64)
            if qrow_ptr is None:
                keep_ptr = None
            else:
                keep_ptr = qrow_ptr + seq * stride_qrb
            s1, s2 = walk_tile(
                s1, s2, x, rq_ptr + q_tile * BLOCK_M * AP, gt_ptr + slot * BLOCK_M * BLOCK_N + offset, BLOCK_N,
                tl.minimum(BLOCK_M, tl.cdiv(q_length - lo, 2) * 2),
                k_ptr + seq * stride_kb + head * stride_kh + k_rows * stride_kt, k_keep,
                q_ptr + seq * stride_qb + head * stride_qh, stride_qt, row0, q_length - lo,
                keep_ptr, stride_qrt, d, A, AP,
                tl.load(bq_ptr + q_tile) + tl.load(bk_ptr + k_tile) <= SAFE,
                ACT, FAST, FACTORED, EXACT, False,
            )  # fmt: skip
    v = tl.load(v_ptr + head * AP + d, mask=d < AP, other=0.0)[None, :]
    if ACT == "tanh":
        s2 *= 4.0
    at = dk_ptr + seq * stride_db + head * stride_dh + k_rows[:, None] * A + d[None, :]
    some = (j < k_hi)[:, None] & (d < A)[None, :]
    tl.store(at, tl.load(at, mask=some, other=0.0) + v * s2, mask=some)


@triton.jit(do_not_specialize=LENGTHS)
def _concat_bwd_dvalue_kernel(
    p_ptr,  # (q items of this launch, H, k tiles, BLOCK_N, BLOCK_M)
    do_ptr, stride_ob, stride_oh, stride_ot,  # (B, H, Tq, DV)
    qrow_ptr, stride_qrb, stride_qrt,
    q_cu_ptr, q_first_ptr,
    k_cu_ptr, k_seq_ptr, k_first_ptr,
    dvalue_ptr,  # (B, H, Tk, DV) float32, contiguous: added to
    stride_db, stride_dh,  # of dvalue
    q_item0,
    q_items,  # of this launch
    k_tiles,
    num_seqs,
    q_per_seq,
    k_per_seq,
    Tq,
    Tk,
    H,
    DV,
    left,
    right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = BLOCK_N // BLOCK_R
    k_item = tl.program_id(0) // parts
    offset = (tl.program_id(0) % parts) * BLOCK_R
    head = tl.program_id(1).to(tl.int64)
    d = tl.program_id(2) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    seq, k_start, k_lo, k_hi, _ = old_locate(
        k_item, k_cu_ptr, k_seq_ptr, k_first_ptr, Tk, num_seqs, k_per_seq, BLOCK_N
    )
    q_start, q_length, q_first = old_sequence_of(seq, q_cu_ptr, q_first_ptr, Tq, num_seqs, q_per_seq)
    r = tl.arange(0, BLOCK_R)
    m = tl.arange(0, BLOCK_M)
    j = k_lo + offset + r
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    q_tile0 = tl.maximum(q_item0 - q_first, 0)
    q_tile1 = tl.minimum(q_item0 + q_items - q_first, tl.cdiv(tl.maximum(q_length, 0), BLOCK_M))
    q_tile1 = tl.where(k_lo + offset < k_hi, q_tile1, q_tile0)
    for tile in range(q_tile0, q_tile1):
        lo = tile * BLOCK_M
        first, last = key_range(lo, tl.minimum(lo + BLOCK_M, q_length), k_hi, left, right, HAS_LEFT, HAS_RIGHT)
        if (k_lo < last) & (k_lo + BLOCK_N > first):
            q_rows = (q_start + lo + m).to(tl.int64)
            q_keep = lo + m < q_length
            if qrow_ptr is not None:
                q_keep = tl.load(qrow_ptr + seq * stride_qrb + q_rows * stride_qrt, mask=q_keep, other=0) != 0
            slot = ((q_first + tile - q_item0).to(tl.int64) * H + head) * k_tiles + k_lo // BLOCK_N
            p = tl.load(p_ptr + slot * BLOCK_N * BLOCK_M + (offset + r)[:, None] * BLOCK_M + m[None, :])
            do = tl.load(
                do_ptr + seq * stride_ob + head * stride_oh + q_rows[:, None] * stride_ot + d[None, :],
                mask=q_keep[:, None] & (d < DV)[None, :],
                other=0.0,
            )
            acc = add_product(p, do, acc, COMPUTE, PRECISION)
    rows = (k_start + j).to(tl.int64)
    at = dvalue_ptr + seq * stride_db + head * stride_dh + rows[:, None] * DV + d[None, :]
    some = (j < k_hi)[:, None] & (d < DV)[None, :]
    tl.store(at, tl.load(at, mask=some, other=0.0) + acc, mask=some)


class Walk(NamedTuple):
    """Tiles of the loops for dq and dk: rows of a tile of keys that one program has, and features."""

    rows: int
    features: int
    warps: int


def bwd_blocks(chip: Chip, itemsize: int, Tq: int, Tk: int, A: int, busy: bool, packed: bool) -> tuple[Blocks, Walk]:
    """Tiles of g and dvalue, and of dq and dk. With packed rows both are in one kernel, and half the keys fit.

    dq and dk: 32 rows by 128 features on 4 warps are 32 sums a thread; the compile report counts 6.6 and 5.6
    instructions an element on sm_90. No spills anywhere. On an H200 half as many features a program are 1.3 times as
    fast: more programs share a core.
    """
    if chip.backend == "interpreter":
        return Blocks(16, 32, 16, 4), Walk(16, pow2(A, 16, 32), 4)
    if itemsize == 4:
        tiles = Blocks(16, 64, 16, 8) if packed else Blocks(16, pow2(Tk, 32, 128), 16, 4)
        return tiles, Walk(32, pow2(A, 16, 128), 8)
    hip = chip.backend == "hip"
    most = 32 if packed and hip and busy else 64 if packed or (hip and busy) or chip.arch == 100 else 128
    tiles = Blocks(tile_rows(Tq, 32), tile_rows(Tk, most), 32, 8)
    features = 64 if chip.hopper else 128  # half the registers, so that more programs share a core
    return tiles, Walk(32, *((pow2(A, 16, features), 4) if A % 16 == 0 else (pow2(A, 16, 64), 8)))


def concat_bwd(
    dout: Tensor, dlse: Tensor | None, dscores: Tensor | None,
    query: Tensor, key: Tensor, value: Tensor, v: Tensor, score_bias: Tensor | None, mask: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seed: Tensor | None,
    out: Tensor, lse: Tensor,
    activation: str, left: int | None, right: int | None, dropout_p: float, needs: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of (query, key, value, v, score_bias), None where `needs` is False."""
    cu_seqlens_q, cu_seqlens_k = (x if x is None else x.contiguous() for x in (cu_seqlens_q, cu_seqlens_k))
    call = prepare(
        query, key, value, v, score_bias, mask, cu_seqlens_q, cu_seqlens_k, seed, activation, left, right, dropout_p
    )  # fmt: skip
    need_q, need_k, need_value, need_v, need_bias = needs
    (B, H, Tq, A), Tk = query.shape, key.shape[2]
    ragged = cu_seqlens_q is not None
    f32 = {"dtype": torch.float32, "device": query.device}
    dq = torch.zeros(query.shape, dtype=torch.float32 if ragged else query.dtype, device=query.device)
    dk = torch.zeros(key.shape, **f32)
    dvalue = torch.zeros(value.shape, **f32)
    dbias = torch.zeros(B, H, Tq, Tk, **f32) if need_bias else None
    dv = torch.zeros(H, A, **f32)
    if query.numel() and key.numel() and value.numel() and call.seqs:
        lengths = (LONG, LONG) if ragged else (Tq, Tk)
        blocks, walk = bwd_blocks(call.chip, value.element_size(), *lengths, A, call.busy, ragged)
        dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
        delta = torch.zeros(lse.shape[:-1], **f32) if call.flags["EXACT"] else (dout.float() * out).sum(-1)
        delta = delta if dlse is None else delta - dlse[..., 1] * lse[..., 1]
        with torch.cuda.device_of(query):
            q = factors(call.tensors["q_ptr"], call.q_rows, cu_seqlens_q, blocks.M, activation, transposed=True)
            k = factors(call.tensors["k_ptr"], call.k_rows, cu_seqlens_k, blocks.N, activation, transposed=True)
            chunk, splits = (1, 1) if ragged else _parts(call, q.items.count, blocks, walk)
            # A program of packed rows adds to its sum of dv.
            dv_parts = (torch.zeros if ragged else torch.empty)(splits * q.items.count, H, A + A % 2, **f32)
            args = {**call.tensors, **call.sizes, **call.flags}
            args |= {
                "aq_ptr": q.tiles, "ak_ptr": k.tiles, "rq_ptr": q.rows, "rk_ptr": k.rows,
                "bq_ptr": q.bound, "bk_ptr": k.bound, "v_ptr": call.v, "v_sum_ptr": call.v.sum(1),
                "q_seq_ptr": q.items.seq, "q_first_ptr": q.items.first,
                "k_seq_ptr": k.items.seq, "k_first_ptr": k.items.first,
                "q_per_seq": q.items.per_seq, "k_per_seq": k.items.per_seq,
                "do_ptr": dout, **strides("ob oh ot", dout, (0, 1, 2), packed=ragged),
                "out_ptr": out, "lse_ptr": lse, "delta_ptr": delta,
                "stride_lb": 0 if ragged else delta.stride(0), "stride_lh": delta.stride(1), "stride_lt": 1,
                "dscores_ptr": dscores if dscores is None else dscores.contiguous(), "dbias_ptr": dbias,
                "dv_ptr": dv_parts, "BLOCK_M": blocks.M, "BLOCK_N": blocks.N, "BLOCK_DV": blocks.DV,
                "BLOCK_D": walk.features, "BLOCK_R": walk.rows,
            }  # fmt: skip
            wanted = (dq if need_q or need_v else None, dk if need_k else None, dvalue if need_value else None)
            if ragged:
                from .concat_bwd_packed import packed_gradients  # which is made of this file's loops

                packed_gradients(call, q.items.count, k.items.count, blocks, args, *wanted)
            else:
                tiles = q.items.count, k.items.count, chunk, splits
                _padded_gradients(call, *tiles, blocks, walk, args, *wanted)
            dv = dv_parts.sum(0)[:, :A]
    return [
        dq.to(query.dtype) if need_q else None,
        dk.to(key.dtype) if need_k else None,
        dvalue.to(value.dtype) if need_value else None,
        dv.to(v.dtype).contiguous() if need_v else None,
        dbias.sum_to_size(score_bias.shape).to(score_bias.dtype) if need_bias else None,
    ]


def _parts(call: Call, q_items: int, blocks: Blocks, walk: Walk) -> tuple[int, int]:
    """How many tiles of queries a launch has, and into how many parts dq's loop over the keys is split.

    The tiles are as many as the workspace holds, too few to fill a chip where keys are many: a program a tile took
    116 of 129 ms on an H200 (B 2, Tq 128, Tk 65,536, A 128). Parts are bounded as the workspace is.
    """
    H, A, Tq = (call.sizes[name] for name in ("H", "A", "Tq"))
    k_tiles = triton.cdiv(call.sizes["Tk"], blocks.N)
    slot = k_tiles * H * blocks.M * blocks.N * (8 + _compute(call).itemsize)
    chunk = max(1, min(q_items, WORKSPACE_BYTES // max(1, slot)))
    programs = chunk * H * triton.cdiv(A, walk.features)
    bound = WORKSPACE_BYTES // (4 * call.seqs * H * Tq * A)
    return chunk, max(1, min(4 * call.chip.cores // programs, triton.cdiv(k_tiles, 2), bound))


def _compute(call: Call) -> torch.dtype:
    """What the weights are stored in for their product with dO."""
    return torch.float32 if call.chip.backend == "interpreter" else call.tensors["val_ptr"].dtype


def _padded_gradients(
    call: Call, q_items: int, k_items: int, chunk: int, splits: int, blocks: Blocks, walk: Walk,
    args: dict[str, object], dq: Tensor | None, dk: Tensor | None, dvalue: Tensor | None,
) -> None:  # fmt: skip
    """Write dq, and add to dk and dvalue, which are zeros; None where one is not wanted."""
    H, A, DV, device = call.sizes["H"], call.sizes["A"], call.sizes["DV"], call.v.device
    k_tiles = triton.cdiv(call.sizes["Tk"], blocks.N)
    g = torch.empty(chunk, H, k_tiles, blocks.M * blocks.N, dtype=torch.float32, device=device)
    parts = None if dq is None else torch.empty(splits, *dq.shape, dtype=torch.float32, device=device)
    args = {
        **args, "g_ptr": g, "gt_ptr": torch.empty_like(g), "p_ptr": torch.empty_like(g, dtype=_compute(call)),
        "k_tiles": k_tiles, "dq_ptr": parts, "dk_ptr": dk, "dvalue_ptr": dvalue, "splits": splits,
        "all_q_items": q_items, "stride_dp": call.seqs * H * call.sizes["Tq"] * A,
    }  # fmt: skip

    registers = unpressed(call.chip, A, DV)

    def launch(kernel, grid: tuple[int, ...], *, num_warps: int = walk.warps, **more: object) -> None:
        named = {name: {**args, **more}[name] for name in kernel.arg_names}
        fitted(kernel, {**named, **more})[grid](**named, num_warps=num_warps, num_stages=2, **registers)

    def of_rows(x: Tensor) -> dict[str, int]:
        return strides("db dh dt", x, (0, 1, 2), packed=False)

    features = triton.cdiv(A, walk.features)
    keys = k_items * (blocks.N // walk.rows)
    for q_item0 in range(0, q_items, chunk):
        count = min(chunk, q_items - q_item0)
        part = {"q_item0": q_item0, "q_items": count}
        launch(_concat_bwd_g_kernel, (count, H, k_tiles), **part, num_warps=blocks.warps)
        if dq is not None:
            launch(_concat_bwd_dq_kernel, (count, H, features * splits), **part, **of_rows(dq))
        if dk is not None:
            launch(_concat_bwd_dk_kernel, (keys, H, features), **part, **of_rows(dk))
        if dvalue is not None:
            grid = (keys, H, triton.cdiv(DV, blocks.DV))
            launch(_concat_bwd_dvalue_kernel, grid, **part, **of_rows(dvalue), num_warps=8)
    if dq is not None:
        dq.copy_(parts.sum(0) if splits > 1 else parts[0])
