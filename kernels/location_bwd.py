"""Backward of location attention, from the saved scores and (m, l).

With the dropout factor k_jr, 1 without dropout:

    a_jr  = exp(s_jr - m_r) / l_r        dlse_r = l_r dl_r
    ds_jr = a_jr (k_jr dO_r · value_j - dO_r · o_r + dlse_r) + dscores_jr
    du_ja = Σ_r ds_jr v_ar
    dz    = du ⊙ act'(z) ⊙ gate            dg = du ⊙ act(z) ⊙ gate'
    dbias_j = Σ_r ds_jr,  db = Σ_j dz_j,  dv = Σ_j u_j ds_jᵀ            (parts, then summed in a fixed order)
    dH = [dz dg] [W G]ᵀ + (a ⊙ k) dO,  d[W G] = Hᵀ [dz dg]        (without W: dH = dz + (a ⊙ k) dO)

[dz dg], and with hops u and ds, are made for a block of items at a time in a workspace of fixed size
(`WORKSPACE_BYTES`), which the matrix products then read from L2; nothing of size N·A reaches memory as a whole.

A hop of a sequence whose cotangents are all 0 sends nothing, even if its result is NaN; a row without any ds is not
read again, so that NaN in it stays out of what is summed over rows.
"""

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, activate_grad
from .chip import LENGTHS, LONG, Chip, all_registers, even, fitted, pow2, tile_rows, unpressed
from .location import WORKSPACE_BYTES, Blocks, hop_block, item_args, load_rows, matmul, prepare, project
from .masks import Items, old_dropout_scale, old_locate, old_sequence_of, partition
from .products import add_product
from .softmax import load_dlse, load_lse


@triton.jit(do_not_specialize=LENGTHS)
def _location_bwd_dz_kernel(
    h_ptr, stride_hb, stride_ht,  # (B, T, D), or (N, D) with stride_hb = 0
    w_ptr, stride_wd, stride_wa,  # (D, A), or None: A = D
    b_ptr,  # (A,) or None
    v_ptr,  # (A, R) or None
    gw_ptr, stride_gd, stride_ga,  # (D, A) or None
    gb_ptr,  # (A,) or None
    ctx_ptr, stride_cb, stride_ct,  # (S, A), (B, T, A), (N, A) or None
    val_ptr, stride_ub, stride_ut,  # (B, T, DV), (N, DV), or None: H
    mask_ptr, stride_mb, stride_mt,  # (B, T), (N,) or None
    cu_ptr,  # (S + 1,) or None
    seq_ptr,  # see masks.Items
    first_ptr,
    seed_ptr,  # (1,) int64 or None
    out_ptr,  # (S, R, DV) float32
    lse_ptr,  # (S, R, 2) float32: (m, l)
    scores_ptr,  # (B, T, R) or (N, R) float32
    do_ptr,  # (S, R, DV)
    dlse_ptr,  # the same, or None
    dscores_ptr,  # (B, T, R) or (N, R) float32, or None
    dz_ptr,  # (items of this launch, BLOCK_T, A or 2A): [dz dg]
    p_ptr,  # (items of this launch, BLOCK_T, R) float32: a ⊙ k
    live_ptr,  # (items of this launch, BLOCK_T) int32: rows that have a ds
    u_ptr,  # (items of this launch, BLOCK_T, A), or None
    ds_ptr,  # (items of this launch, BLOCK_T, R) float32, there with u
    dbias_ptr,  # (B, T) or (N,), or None
    dctx_ptr,  # (B, T, A) or (N, A), or None: context a row
    db_ptr,  # (items of this launch, A) float32 or None
    dgb_ptr,  # (items of this launch, A) float32 or None
    dv_ptr,  # (items of this launch, A) float32, or None: no v, or hops
    item0,
    num_seqs,
    per_seq,
    T,  # 0 where the batch is ragged
    D,
    A,
    R,
    DV,
    threshold,
    scale,
    ACT: tl.constexpr,
    GATE_ACT: tl.constexpr,
    FAST: tl.constexpr,
    CTX_PER_ROW: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    U_COMPUTE: tl.constexpr,
    U_PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,  # rows of an item
    BLOCK_D: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    local = tl.program_id(0)
    item = local.to(tl.int64)
    seq, start, lo, hi, _ = old_locate(item0 + local, cu_ptr, seq_ptr, first_ptr, T, num_seqs, per_seq, BLOCK_T)
    i = tl.arange(0, BLOCK_T)
    t = lo + i
    inside = t < hi
    rows = (start + t).to(tl.int64)
    keep = inside
    if mask_ptr is not None:
        keep = tl.load(mask_ptr + seq * stride_mb + rows * stride_mt, mask=inside, other=0) != 0
    h_ptrs = h_ptr + seq * stride_hb + rows * stride_ht
    if val_ptr is None:
        val_ptrs = h_ptrs
    else:
        val_ptrs = val_ptr + seq * stride_ub + rows * stride_ut
    r = tl.arange(0, BLOCK_R)
    hop = (r < R) & (seq < num_seqs)

    # gap = dO_r · (k_jr value_j - o_r). For one hop as one sum; for more both sides are taken from o_0 where products
    # are in float32. Then a key with all the weight gets 0, not the difference of two roundings. With dropout and
    # more hops they are not: k o_0 is far from o_r, and would be taken out of large numbers again.
    if seed_ptr is not None:
        k = old_dropout_scale(seed_ptr, t[:, None], seq, r[None, :], threshold, scale)
    gap = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    offset = tl.zeros([BLOCK_R], tl.float32)  # dO_r · (o_r - o_0), or dO_r · o_r
    cotangent = tl.zeros([BLOCK_R], tl.float32)  # 0 where all of dO_r and dlse_r is 0
    for d0 in range(0, DV, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        values = load_rows(val_ptrs, keep, d, DV)
        at = seq * R * DV + r[None, :] * DV + d[:, None]
        some = hop[None, :] & (d < DV)[:, None]
        do = tl.load(do_ptr + at, mask=some, other=0.0)  # [BLOCK_D, BLOCK_R]
        out = tl.load(out_ptr + at, mask=some, other=0.0)
        cotangent += tl.sum(tl.abs(do), axis=0)
        if BLOCK_R == 1 and seed_ptr is not None:
            values = values.to(tl.float32) * k
        if BLOCK_R == 1 or (tl.float32 == COMPUTE and seed_ptr is None):
            centre = tl.load(out_ptr + seq * R * DV + d, mask=(d < DV) & (seq < num_seqs), other=0.0)
            values = values.to(tl.float32) - centre[None, :]
            out -= centre[:, None]
        offset += tl.sum(do * out, axis=0)
        gap = matmul(values, do, gap, COMPUTE, PRECISION)
    if BLOCK_R > 1 and seed_ptr is not None:
        gap *= k
    gap -= offset[None, :]

    at = (seq * T + rows)[:, None] * R + r[None, :]
    visible = keep[:, None] & hop[None, :]
    s = tl.load(scores_ptr + at, mask=visible, other=float("-inf"))
    lse_at = (seq * R + r) * 2
    top, inv = load_lse(lse_ptr + lse_at, hop)
    a_w = tl.exp(s - top[None, :]) * inv[None, :]
    p = a_w
    if seed_ptr is not None:
        p *= k
    if dlse_ptr is not None:
        dlse = load_dlse(dlse_ptr + lse_at, lse_ptr + lse_at, hop)
        gap += dlse[None, :]
        cotangent += tl.abs(dlse)
    sends = visible & (cotangent != 0)[None, :]
    p = tl.where(sends, p, 0.0)
    ds = tl.where(sends, a_w * gap, 0.0)
    if dscores_ptr is not None:
        ds += tl.load(dscores_ptr + at, mask=visible, other=0.0)
    slot = item * BLOCK_T + i
    tl.store(p_ptr + slot[:, None] * R + r[None, :], p, mask=(r < R)[None, :])
    if ds_ptr is not None:
        tl.store(ds_ptr + slot[:, None] * R + r[None, :], ds, mask=(r < R)[None, :])
    live = tl.max((ds != 0).to(tl.int32), axis=1) != 0
    tl.store(live_ptr + slot, live.to(tl.int32))
    if dbias_ptr is not None:
        dbias = tl.sum(ds, axis=1).to(dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + seq * T + rows, dbias, mask=inside)

    if gw_ptr is None:
        width = A
    else:
        width = 2 * A
    dz_ptrs = dz_ptr + slot[:, None] * width
    for a0 in range(0, A, BLOCK_A):
        a = a0 + tl.arange(0, BLOCK_A)
        z, g = project(
            h_ptrs, h_ptrs, rows, seq, live, w_ptr, stride_wd, stride_wa, b_ptr, gw_ptr, stride_gd, stride_ga, gb_ptr,
            ctx_ptr, stride_cb, stride_ct, a, num_seqs, D, A, CTX_PER_ROW, False, BLOCK_D, COMPUTE, PRECISION,
        )  # fmt: skip
        y = activate(z, ACT, FAST)
        u = y
        if v_ptr is None:
            du = ds
        else:
            v = tl.load(v_ptr + a[:, None] * R + r[None, :], mask=(a < A)[:, None] & (r < R)[None, :], other=0.0).to(
                tl.float32
            )
            if BLOCK_R == 1:
                du = ds * tl.trans(v)
            else:
                du = tl.dot(ds.to(U_COMPUTE), tl.trans(v).to(U_COMPUTE), input_precision=U_PRECISION)
        dy = du
        if gw_ptr is not None:
            gate = activate(g, GATE_ACT, FAST)
            u = y * gate
            dy = du * gate
            dg = du * y * activate_grad(g, gate, GATE_ACT, FAST)
            tl.store(dz_ptrs + A + a[None, :], dg.to(dz_ptr.dtype.element_ty), mask=(a < A)[None, :])
            if dgb_ptr is not None:
                tl.store(dgb_ptr + item * A + a, tl.sum(dg, axis=0), mask=a < A)
        dz = dy * activate_grad(z, y, ACT, FAST)
        tl.store(dz_ptrs + a[None, :], dz.to(dz_ptr.dtype.element_ty), mask=(a < A)[None, :])
        if db_ptr is not None:
            tl.store(db_ptr + item * A + a, tl.sum(dz, axis=0), mask=a < A)
        if dctx_ptr is not None:
            dctx = dz.to(dctx_ptr.dtype.element_ty)
            ctx_at = (seq * T + rows)[:, None] * A + a[None, :]
            tl.store(dctx_ptr + ctx_at, dctx, mask=inside[:, None] & (a < A)[None, :])
        if dv_ptr is not None:
            tl.store(dv_ptr + item * A + a, tl.sum(u * ds, axis=0), mask=a < A)
        if u_ptr is not None:
            u_ptrs = u_ptr + slot[:, None] * A + a[None, :]
            tl.store(u_ptrs, u.to(u_ptr.dtype.element_ty), mask=(a < A)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _location_bwd_rows_kernel(
    dz_ptr,  # (items of this launch, BLOCK_T, K), or None: no term from the scores
    w_ptr, stride_wd, stride_wk,  # (D, K): [W G], or None: [dz dg] itself, K = D
    p_ptr,  # (items of this launch, BLOCK_T, R) float32, or None: no term from the weighted sum
    do_ptr,  # (S, R, D), or None
    grad_ptr,  # (B, T, D) or (N, D), contiguous
    cu_ptr,  # (S + 1,) or None
    seq_ptr,  # see masks.Items
    first_ptr,
    item0,
    num_seqs,
    per_seq,
    T,
    D,
    K,
    R,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gradient of rows: [dz dg] [W G]ᵀ + p dO. Both terms where the values are H, one of them where they are not."""
    local = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    seq, start, lo, hi, _ = old_locate(item0 + local, cu_ptr, seq_ptr, first_ptr, T, num_seqs, per_seq, BLOCK_T)
    i = tl.arange(0, BLOCK_T)
    t = lo + i
    slot = (local * BLOCK_T + i).to(tl.int64)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if dz_ptr is not None and w_ptr is None:
        acc += tl.load(dz_ptr + slot[:, None] * K + d[None, :], mask=(d < D)[None, :], other=0.0).to(tl.float32)
    elif dz_ptr is not None:
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            dz = tl.load(dz_ptr + slot[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
            w = tl.load(
                w_ptr + k[:, None] * stride_wk + d[None, :] * stride_wd,
                mask=(k < K)[:, None] & (d < D)[None, :],
                other=0.0,
            )
            acc = add_product(dz, w, acc, COMPUTE, PRECISION)
    if p_ptr is not None:
        r = tl.arange(0, BLOCK_R)
        p = tl.load(p_ptr + slot[:, None] * R + r[None, :], mask=(r < R)[None, :], other=0.0)
        do = tl.load(
            do_ptr + seq * R * D + r[:, None] * D + d[None, :],
            mask=(r < R)[:, None] & (d < D)[None, :] & (seq < num_seqs),
            other=0.0,
        )
        if BLOCK_R == 1:
            acc += p * do.to(tl.float32)
        else:
            acc = add_product(p, do, acc, COMPUTE, PRECISION)
    rows = seq * T + start + t
    tl.store(
        grad_ptr + rows[:, None] * D + d[None, :],
        acc.to(grad_ptr.dtype.element_ty),
        mask=(t < hi)[:, None] & (d < D)[None, :],
    )


@triton.jit(do_not_specialize=LENGTHS)
def _location_bwd_dw_kernel(
    h_ptr, stride_hb, stride_ht,  # (B, T, D), or (N, D) with stride_hb = 0
    live_ptr,  # (items of this launch, BLOCK_T) int32
    dz_ptr,  # (items of this launch, BLOCK_T, K)
    dw_ptr,  # (splits, D, K) float32: added to
    cu_ptr,  # (S + 1,) or None
    seq_ptr,  # see masks.Items
    first_ptr,
    item0,
    items,  # items of this launch
    items_per_split,
    num_seqs,
    per_seq,
    T,
    D,
    K,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d[W G] += Hᵀ [dz dg] over this split's items."""
    split = tl.program_id(2)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    i = tl.arange(0, BLOCK_T)
    acc = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    first = split * items_per_split
    for local in range(first, tl.minimum(first + items_per_split, items)):
        seq, start, lo, _, _ = old_locate(item0 + local, cu_ptr, seq_ptr, first_ptr, T, num_seqs, per_seq, BLOCK_T)
        rows = (start + lo + i).to(tl.int64)
        slot = (local * BLOCK_T + i).to(tl.int64)
        live = tl.load(live_ptr + slot) != 0
        h = load_rows(h_ptr + seq * stride_hb + rows * stride_ht, live, d, D)
        dz = tl.load(dz_ptr + slot[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
        acc = add_product(tl.trans(h), dz, acc, COMPUTE, PRECISION)
    at = dw_ptr + (split.to(tl.int64) * D + d[:, None]) * K + k[None, :]
    some = (d < D)[:, None] & (k < K)[None, :]
    tl.store(at, tl.load(at, mask=some, other=0.0) + acc, mask=some)


@triton.jit(do_not_specialize=LENGTHS)
def _location_bwd_dv_kernel(
    u_ptr,  # (rows, A)
    ds_ptr,  # (rows, R) float32
    dv_ptr,  # (splits, A, R) float32: added to
    rows,  # of the workspace
    rows_per_split,
    A,
    R,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """With hops: dv += uᵀ ds over this split's rows."""
    split = tl.program_id(1)
    a = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    r = tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_A, BLOCK_R], tl.float32)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    for row0 in range(first, last, BLOCK_T):
        row = row0 + tl.arange(0, BLOCK_T)
        u = load_rows(u_ptr + row.to(tl.int64) * A, row < last, a, A)
        ds = load_rows(ds_ptr + row.to(tl.int64) * R, row < last, r, R)
        acc = add_product(tl.trans(u), ds, acc, COMPUTE, PRECISION)
    at = dv_ptr + (split.to(tl.int64) * A + a[:, None]) * R + r[None, :]
    some = (a < A)[:, None] & (r < R)[None, :]
    tl.store(at, tl.load(at, mask=some, other=0.0) + acc, mask=some)


@triton.jit(do_not_specialize=LENGTHS)
def _location_bwd_context_kernel(
    db_ptr,  # (items of this launch, A) float32
    dctx_ptr,  # (S, A) float32: added to
    cu_ptr,  # (S + 1,) or None
    seq_ptr,  # see masks.Items
    first_ptr,
    item0,
    items,  # items of this launch
    num_seqs,
    per_seq,
    T,
    A,
    BLOCK_A: tl.constexpr,
):
    """Context a sequence: its gradient is the sum of dz over the items of the sequence, in their order."""
    item = item0 + tl.program_id(0)
    a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    seq, _, _, _, count = old_locate(item, cu_ptr, seq_ptr, first_ptr, T, num_seqs, per_seq, 1)
    _, _, first = old_sequence_of(seq, cu_ptr, first_ptr, T, num_seqs, per_seq)
    # The first item of a sequence in this launch sums them all; those past the last sequence have nothing to.
    last = tl.where(item == tl.maximum(first, item0), tl.minimum(first + count, item0 + items), item)
    last = tl.where(seq < num_seqs, last, item)
    acc = tl.zeros([BLOCK_A], tl.float32)
    for i in range(item, last):
        acc += tl.load(db_ptr + (i - item0).to(tl.int64) * A + a, mask=a < A, other=0.0)
    at = dctx_ptr + seq * A + a
    some = (a < A) & (item < last)
    tl.store(at, tl.load(at, mask=some, other=0.0) + acc, mask=some)


def bwd_blocks(chip: Chip, itemsize: int, T: int, D: int, A: int, R: int, DV: int, linear: bool) -> Blocks:
    """Tiles of the three backward kernels; T is also the rows of an item. Chosen as the forward's are."""
    hop = hop_block(R)
    whole = even(D, DV, A)
    hopper = chip.hopper
    if itemsize == 4:
        block_a = hop if linear else pow2(A, 16, 64 if hop == 1 and whole else 32 if hop <= 32 else 16)
        if hopper and hop == 1 and linear:
            return Blocks(tile_rows(T, 32), pow2(D, 16, 128), block_a, warps=4)
        if hopper and hop == 1 and whole:
            return Blocks(tile_rows(T, 64), pow2(D, 16, 32), block_a, warps=8)
        return Blocks(tile_rows(T, 32 if hop == 1 else 16), 16, block_a, warps=8)
    if not whole or chip.from_registers:
        return Blocks(tile_rows(T, 32), pow2(D, 16, 64), hop if linear else pow2(A, 16, 32), warps=8)
    block_t = tile_rows(T, 128 if hopper and hop == 1 else 64)
    return Blocks(block_t, pow2(D, 16, 64), hop if linear else pow2(A, 16, 64), warps=8)


def location_bwd(
    dout: Tensor, dlse: Tensor | None, dscores: Tensor | None,
    h: Tensor, w: Tensor | None, b: Tensor | None, v: Tensor | None, gate_w: Tensor | None, gate_b: Tensor | None,
    context: Tensor | None, values: Tensor | None, score_bias: Tensor | None, mask: Tensor | None,
    cu_seqlens: Tensor | None, seed: Tensor | None,
    out: Tensor, lse: Tensor, scores: Tensor,
    activation: str, gate_activation: str, dropout_p: float, context_per_row: bool, needs: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of (h, w, b, v, gate_w, gate_b, context, values, score_bias), None where `needs` is False."""
    call = prepare(
        h, w, b, v, gate_w, gate_b, context, values, mask, cu_seqlens, seed,
        activation, gate_activation, dropout_p, context_per_row,
    )  # fmt: skip
    need_h, need_w, need_b, need_v, need_gw, need_gb, need_ctx, need_values, need_bias = needs
    R, DV, D, A = call.R, call.DV, call.sizes["D"], call.A
    K = A if gate_w is None else 2 * A
    dh = torch.empty_like(h, memory_format=torch.contiguous_format) if need_h else None
    dvalues = torch.empty_like(values, memory_format=torch.contiguous_format) if need_values else None
    dbias = torch.empty_like(score_bias, memory_format=torch.contiguous_format) if need_bias else None
    dctx = None
    if need_ctx and context_per_row:
        dctx = torch.empty_like(context, memory_format=torch.contiguous_format)

    longest = call.length if cu_seqlens is None else LONG
    blocks = bwd_blocks(call.chip, h.element_size(), longest, D, A, R, DV, v is None)
    if gate_w is not None and context_per_row and activation in ("gelu", "silu"):
        blocks = blocks._replace(T=min(blocks.T, 64))  # z, gate and context of 128 rows spilled
    items = partition(call.seqs, call.length, blocks.T, cu_seqlens) if call.length else Items(0, 1, 0, None, None)
    ctx_a_row = need_ctx and context_per_row
    ctx_a_seq = need_ctx and not context_per_row
    need_weights = need_w or need_gw
    hops = need_v and R > 1
    f32: dict[str, Any] = {"dtype": torch.float32, "device": h.device}

    # The workspace holds as many items as fit, one at least.
    u_dtype = torch.float32 if call.flags["U_COMPUTE"] == tl.float32 else h.dtype
    u_size = u_dtype.itemsize if hops else 0
    chunk = max(1, min(items.count, WORKSPACE_BYTES // _item_bytes(blocks.T, K, A, R, h.element_size(), u_size)))
    dz = h.new_empty(chunk, blocks.T, K)
    p = torch.empty(chunk, blocks.T, R, **f32)
    live = torch.empty(chunk, blocks.T, dtype=torch.int32, device=h.device)
    u = h.new_empty(chunk, blocks.T, A, dtype=u_dtype) if hops else None
    ds = torch.empty(chunk, blocks.T, R, **f32) if hops else None
    parts = {  # of each item, summed when a launch is done
        "db": torch.empty(chunk, A, **f32) if need_b or ctx_a_seq else None,
        "dgb": torch.empty(chunk, A, **f32) if need_gb else None,
        "dv": torch.empty(chunk, A, **f32) if need_v and not hops else None,
    }
    sums = {name: torch.zeros(A, **f32) for name, part in parts.items() if part is not None}
    dctx_seq = torch.zeros(call.seqs, A, **f32) if ctx_a_seq else None

    ww = call.tensors["w_ptr"] if gate_w is None else torch.cat([w, gate_w], dim=1)
    block_k = min(64, max(16, triton.next_power_of_2(K)))
    tiles = triton.cdiv(D, blocks.D), triton.cdiv(K, block_k)
    splits = _splits(call.chip, tiles[0] * tiles[1], chunk)
    dw = torch.zeros(splits, D, K, **f32) if need_weights else None
    block_v = pow2(A, 16, 64)
    v_splits = _splits(call.chip, triton.cdiv(A, block_v), chunk)
    dv_hops = torch.zeros(v_splits, A, R, **f32) if hops else None

    common = {
        "num_seqs": call.seqs,
        "T": call.sizes["T"],
        "cu_ptr": call.tensors["cu_ptr"],
        **item_args(items),
    }
    dot, u_dot = ({n: call.flags[prefix + n] for n in ("COMPUTE", "PRECISION")} for prefix in ("", "U_"))
    many = h.element_size() == 4 and R > 32  # hops, of products that are sums of their own
    registers = all_registers(call.chip) if many else unpressed(call.chip, D, DV, A)
    run = {"num_warps": blocks.warps, "num_stages": blocks.stages, **registers}
    tile = {**dot, **run, "BLOCK_T": blocks.T, "BLOCK_D": blocks.D}
    # gap is what is left of two rounded products that are equal where one key has all the weight: not so if one of
    # the two is fused into the difference.
    exact: dict[str, object] = {"enable_fp_fusion": h.element_size() == 2}
    if h.element_size() == 4 and call.tensors["v_ptr"] is not None:
        exact["BLOCK_D"] = min(16, blocks.D)  # beside the score's features a wider part of W spilled
    dout = dout.contiguous()
    dlse = dlse if dlse is None else dlse.contiguous()
    dscores = dscores if dscores is None else dscores.contiguous()
    for item0 in range(0, items.count, chunk):
        count = min(chunk, items.count - item0)
        with torch.cuda.device_of(h):
            fitted(_location_bwd_dz_kernel, call.tensors)[(count,)](
                **{**call.tensors, **common, **call.sizes, **call.flags, **tile, **exact},
                out_ptr=out, lse_ptr=lse, scores_ptr=scores, do_ptr=dout, dlse_ptr=dlse, dscores_ptr=dscores,
                dz_ptr=dz, p_ptr=p, live_ptr=live, u_ptr=u, ds_ptr=ds,
                dbias_ptr=dbias, dctx_ptr=dctx if ctx_a_row else None,
                **{f"{name}_ptr": part for name, part in parts.items()}, item0=item0, BLOCK_A=blocks.A,
            )  # fmt: skip
            if need_h:
                shared = values is None
                _location_bwd_rows_kernel[(count, tiles[0])](
                    **common, **tile, dz_ptr=dz, w_ptr=ww, stride_wd=0 if ww is None else ww.stride(0),
                    stride_wk=0 if ww is None else ww.stride(1),
                    p_ptr=p if shared else None, do_ptr=dout if shared else None, grad_ptr=dh,
                    item0=item0, D=D, K=K, R=R, BLOCK_K=block_k, BLOCK_R=call.flags["BLOCK_R"],
                )  # fmt: skip
            if need_values:
                _location_bwd_rows_kernel[(count, triton.cdiv(DV, blocks.D))](
                    **common, **tile, dz_ptr=None, w_ptr=None, stride_wd=0, stride_wk=0,
                    p_ptr=p, do_ptr=dout, grad_ptr=dvalues,
                    item0=item0, D=DV, K=0, R=R, BLOCK_K=block_k, BLOCK_R=call.flags["BLOCK_R"],
                )  # fmt: skip
            if need_weights:
                fitted(_location_bwd_dw_kernel, call.tensors)[(*tiles, splits)](
                    **common, **tile,
                    **{k: call.tensors[k] for k in ("h_ptr", "stride_hb", "stride_ht")},
                    live_ptr=live, dz_ptr=dz, dw_ptr=dw, item0=item0, items=count,
                    items_per_split=triton.cdiv(count, splits), D=D, K=K, BLOCK_K=block_k,
                )  # fmt: skip
            if hops:
                _location_bwd_dv_kernel[(triton.cdiv(A, block_v), v_splits)](
                    u_ptr=u, ds_ptr=ds, dv_ptr=dv_hops, rows=count * blocks.T,
                    rows_per_split=triton.cdiv(count, v_splits) * blocks.T, A=A, R=R, **u_dot,
                    BLOCK_T=blocks.T, BLOCK_A=block_v, BLOCK_R=call.flags["BLOCK_R"], **run,
                )  # fmt: skip
            if ctx_a_seq:
                _location_bwd_context_kernel[(count, triton.cdiv(A, 128))](
                    **common, db_ptr=parts["db"], dctx_ptr=dctx_seq, item0=item0, items=count, A=A, BLOCK_A=128,
                    num_warps=4,
                )  # fmt: skip
        for name, total in sums.items():
            total += cast("Tensor", parts[name])[:count].sum(0)

    dww = None if dw is None else dw.sum(0)
    dv = None if not need_v else sums["dv"][:, None] if dv_hops is None else dv_hops.sum(0)
    return [
        dh,
        dww[:, :A].clone().to(w.dtype) if need_w else None,
        sums["db"].to(b.dtype) if need_b else None,
        dv.to(v.dtype) if need_v else None,
        dww[:, A:].clone().to(gate_w.dtype) if need_gw else None,
        sums["dgb"].to(gate_b.dtype) if need_gb else None,
        dctx if dctx_seq is None else dctx_seq.to(context.dtype),
        dvalues,
        dbias,
    ]


def _item_bytes(rows: int, K: int, A: int, R: int, itemsize: int, u_size: int) -> int:
    """What an item takes of the workspace: dz, p and live of its rows, u and ds with hops, and its parts."""
    return rows * (K * itemsize + R * 4 + 4 + (A * u_size + R * 4 if u_size else 0)) + 3 * A * 4


def _splits(chip: Chip, tiles: int, items: int) -> int:
    """Parts of a sum over items: programs for two a core, none for fewer than four items."""
    return max(1, min(triton.cdiv(2 * chip.cores, tiles), triton.cdiv(items, 4)))
