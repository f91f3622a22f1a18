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

In float32 Σ_j a_jr gap_jr, gap the bracket without dlse, which is 0 but for roundings (of o, of one key's weight that
is all but 1), is made first and taken from every gap: at scores of 100 gradients were off by up to 70 times what the
reference's are.

A hop of a sequence whose cotangents are all 0 sends nothing, even if its result is NaN; a row without any ds is not
read again, so that NaN in it stays out of what is summed over rows.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, activate_grad, log_sigmoid_grad
from .arguments import constants, launch, pitch, sequence_ptr, width
from .chip import LENGTHS, LONG, Chip, all_registers, cdiv, even, pow2, rule, tile_rows, unpressed, whole_rows
from .inputs import LocationInputs
from .location import WORKSPACE_BYTES, Blocks, Call, Result, Size, hop_block, prepare, project
from .location_gap import left_of_gaps, weights_and_gaps
from .masks import follow, item_rows, locate, place, sequence_at
from .products import add_product, tile_product
from .softmax import load_dlse
from .sums import Pending, add_items, sums
from .tiles import add_later, load_part, load_rows, store_rows


@triton.jit(do_not_specialize=LENGTHS)
def _location_bwd_dz_kernel(
    h,  # (B, T, D) or (N, D)
    weights,
    context,  # (S, A), (B, T, A), (N, A) or None
    values,  # (B, T, DV), (N, DV), or None: H
    mask,  # (B, T), (N,) or None
    spans,
    dropout,
    result,
    given,
    work,
    parts,
    dbias_ptr,  # (B, T) or (N,), or None
    dctx_ptr,  # (B, T, A) or (N, A), or None: context a row
    item0,
    num_seqs,
    per_seq,
    T,  # 0 where the batch is ragged
    size,
    flags,
    blocks,
):
    local = tl.program_id(0)
    item = local.to(tl.int64)
    seq = sequence_at(item0 + local, spans, num_seqs, per_seq, blocks.T)
    seq, t, inside, rows, keep = item_rows(item0 + local, seq, mask, spans, T, per_seq, blocks.T)
    h_ptrs = sequence_ptr(h, seq, rows)
    if values.ptr is None:
        val_ptrs = h_ptrs
    else:
        val_ptrs = sequence_ptr(values, seq, rows)
    r = tl.arange(0, blocks.R)
    hop = r < size.R
    at = (seq * T + rows)[:, None] * size.R + r[None, :]
    visible = keep[:, None] & hop[None, :]
    if flags.FEATURES:  # their own gradients, of which ds is what a bias and `live` need, the sum and whether any is
        du_ptrs = given.dscores + (seq * T + rows) * size.A
        ds = tl.zeros([blocks.T, blocks.R], tl.float32)
        some = tl.zeros([blocks.T], tl.int32)
        for a0 in range(0, size.A, blocks.A):
            du = load_rows(du_ptrs, keep, a0 + tl.arange(0, blocks.A), size.A).to(tl.float32)
            ds += tl.sum(du, axis=1)[:, None]
            some = tl.maximum(some, tl.max((du != 0).to(tl.int32), axis=1))
        live = some != 0
    elif given.do is None:
        ds = tl.load(given.dscores + at, mask=visible, other=0.0)
    else:
        a_w, p, gap, cotangent = weights_and_gaps(
            val_ptrs, keep, seq, t, at, visible, result, given, dropout, size, flags, blocks
        )
        if given.left is not None:
            gap -= tl.load(given.left + seq * size.R + r, mask=hop, other=0.0)[None, :]
        if given.dlse is not None:
            lse_at = (seq * size.R + r) * 2
            dlse = load_dlse(given.dlse + lse_at, result.lse + lse_at, hop)
            gap += dlse[None, :]
            cotangent += tl.abs(dlse)
        sends = visible & (cotangent != 0)[None, :]
        p = tl.where(sends, p, 0.0)
        ds = tl.where(sends, a_w * gap, 0.0)
        if given.dscores is not None:
            ds += tl.load(given.dscores + at, mask=visible, other=0.0)
        p_at = (item * blocks.T + tl.arange(0, blocks.T))[:, None] * size.R + r[None, :]
        tl.store(work.p + p_at, p, mask=(r < size.R)[None, :])
    if flags.SMOOTH:
        ds *= log_sigmoid_grad(tl.load(result.scores + at, mask=visible, other=0.0))
    slot = item * blocks.T + tl.arange(0, blocks.T)
    if work.ds is not None:
        tl.store(work.ds + slot[:, None] * size.R + r[None, :], ds, mask=(r < size.R)[None, :])
    if not flags.FEATURES:
        live = tl.max((ds != 0).to(tl.int32), axis=1) != 0
    tl.store(work.live + slot, live.to(tl.int32))
    if dbias_ptr is not None:
        dbias = tl.sum(ds, axis=1).to(dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + seq * T + rows, dbias, mask=inside)

    if weights.gw is None:
        width = size.A
    else:
        width = 2 * size.A
    if work.dz is not None:
        dz_ptrs = work.dz + slot[:, None] * width
    for a0 in range(0, size.A, blocks.A):
        a = a0 + tl.arange(0, blocks.A)
        z, g = project(h_ptrs, h_ptrs, rows, seq, live, weights, context, a, size.D, size.A, flags, False, blocks.D)
        y = activate(z, flags.ACT, flags.FAST)
        u = y
        if flags.FEATURES:
            du = load_rows(du_ptrs, live, a, size.A).to(tl.float32)
        elif weights.v is None:
            du = ds
        else:
            v = load_rows(weights.v + a * size.R, a < size.A, r, size.R).to(tl.float32)
            if blocks.R == 1:
                du = ds * tl.trans(v)
            else:
                du = tile_product(ds, tl.trans(v), flags.U_COMPUTE, flags.U_PRECISION)
        dy = du
        if weights.gw is not None:
            gate = activate(g, flags.GATE_ACT, flags.FAST)
            u = y * gate
            dy = du * gate
            dg = du * y * activate_grad(g, gate, flags.GATE_ACT, flags.FAST)
            tl.store(dz_ptrs + size.A + a[None, :], dg.to(work.dz.dtype.element_ty), mask=(a < size.A)[None, :])
            if parts.dgb is not None:
                tl.store(parts.dgb + item * size.A + a, tl.sum(dg, axis=0), mask=a < size.A)
        dz = dy * activate_grad(z, y, flags.ACT, flags.FAST)
        if work.dz is not None:
            tl.store(dz_ptrs + a[None, :], dz.to(work.dz.dtype.element_ty), mask=(a < size.A)[None, :])
        if work.dh is not None:
            store_rows(work.dh + (seq * T + rows) * size.A, dz, inside, a, size.A)
        if parts.db is not None:
            tl.store(parts.db + item * size.A + a, tl.sum(dz, axis=0), mask=a < size.A)
        if dctx_ptr is not None:
            dctx = dz.to(dctx_ptr.dtype.element_ty)
            ctx_at = (seq * T + rows)[:, None] * size.A + a[None, :]
            tl.store(dctx_ptr + ctx_at, dctx, mask=inside[:, None] & (a < size.A)[None, :])
        if parts.dv is not None:
            tl.store(parts.dv + item * size.A + a, tl.sum(u * ds, axis=0), mask=a < size.A)
        if work.u is not None:
            u_ptrs = work.u + slot[:, None] * size.A + a[None, :]
            tl.store(u_ptrs, u.to(work.u.dtype.element_ty), mask=(a < size.A)[None, :])


@triton.jit
def _gradient_of_rows(
    program, dz_ptr, ww, p_ptr, do_ptr, grad_ptr, spans, item0, items, num_seqs, per_seq, T, D, K, R, flags, blocks
):
    """[dz dg] [W G]ᵀ + p dO. Both terms where the values are H, one of them where they are not."""
    local = program % items
    d = program // items * blocks.D + tl.arange(0, blocks.D)
    seq, start, lo, hi, _ = locate(item0 + local, spans, T, num_seqs, per_seq, blocks.T)
    i = tl.arange(0, blocks.T)
    t = lo + i
    slot = (i + local * blocks.T).to(tl.int64)
    acc = tl.zeros([blocks.T, blocks.D], tl.float32)
    if dz_ptr is not None and ww.ptr is None:
        acc += tl.load(dz_ptr + slot[:, None] * K + d[None, :], mask=(d < D)[None, :], other=0.0).to(tl.float32)
    elif dz_ptr is not None:
        k = tl.arange(0, blocks.K)
        dz_ptr += K * blocks.T * local  # within the workspace, so int32
        for k0 in range(0, K, blocks.K):
            dz = load_part(dz_ptr + k0, K, 1, 0, i, k, blocks.T, K - k0, flags.WHOLE)
            w = load_part(ww.ptr, ww.stride_k, ww.stride_d, k0, k, d, K, D, flags.WHOLE)
            acc = add_product(dz, w, acc, flags.COMPUTE, flags.PRECISION)
    if p_ptr is not None:
        r = tl.arange(0, blocks.R)
        p = tl.load(p_ptr + slot[:, None] * R + r[None, :], mask=(r < R)[None, :], other=0.0)
        do = tl.load(
            do_ptr + seq * R * D + r[:, None] * D + d[None, :],
            mask=(r < R)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        if blocks.R == 1:
            acc += p * do.to(tl.float32)
        else:
            acc = add_product(p, do, acc, flags.COMPUTE, flags.PRECISION)
    grad_ptrs = grad_ptr + (seq * T + start + t) * D
    if flags.ADD:
        acc += load_rows(grad_ptrs, t < hi, d, D).to(tl.float32)
    store_rows(grad_ptrs, acc, t < hi, d, D)


@triton.jit
def _gradient_of_weights(
    program,
    h,
    live_ptr,
    dz_ptr,
    dw_ptr,
    spans,
    item0,
    items,
    items_per_split,
    num_seqs,
    per_seq,
    T,
    D,
    K,
    flags,
    blocks,
):
    """d[W G] += Hᵀ [dz dg] over the items of a split."""
    d_tiles = tl.cdiv(D, blocks.D)
    tiles = d_tiles * tl.cdiv(K, blocks.K)
    split = program // tiles
    d = program % d_tiles * blocks.D + tl.arange(0, blocks.D)
    k = program % tiles // d_tiles * blocks.K + tl.arange(0, blocks.K)
    i = tl.arange(0, blocks.T)
    acc = tl.zeros([blocks.D, blocks.K], tl.float32)
    steps = i.to(tl.int64) * pitch(h)
    first = split * items_per_split
    of = sequence_at(item0 + first, spans, num_seqs, per_seq, blocks.T)
    for local in range(first, tl.minimum(first + items_per_split, items)):
        of = follow(of, item0 + local, spans, per_seq, blocks.T)
        seq, start, lo, _, _ = place(item0 + local, of, spans, T, per_seq, blocks.T)
        live = tl.load(live_ptr + (i + local * blocks.T)) != 0
        x = load_rows(sequence_ptr(h, seq, start + lo) + steps, live, d, None if flags.WHOLE else D)
        dz_at = dz_ptr + K * blocks.T * local  # within the workspace, so int32
        dz = load_part(dz_at, K, 1, 0, i, k, blocks.T, K, flags.WHOLE)
        acc = add_product(tl.trans(x), dz, acc, flags.COMPUTE, flags.PRECISION)
    add_later(dw_ptr + (split.to(tl.int64) * D + d) * K, acc, d < D, k, K, item0)


@triton.jit(do_not_specialize=LENGTHS)
def _location_bwd_products_kernel(
    h,  # (B, T, D) or (N, D)
    live_ptr,  # (items of this launch, blocks.T) int32
    dz_ptr,  # (items of this launch, blocks.T, K), or None: no term from the scores
    ww,  # (D, K): [W G], or None: [dz dg] itself, K = D
    p_ptr,  # (items of this launch, blocks.T, R) float32, or None: no term from the weighted sum
    do_ptr,  # (S, R, D), or None
    grad_ptr,  # (B, T, D) or (N, D), contiguous; None: not wanted
    dw_ptr,  # (splits, D, K) float32: added to, but by the first launch; None: not wanted
    spans,
    item0,
    items,  # items of this launch
    items_per_split,
    num_seqs,
    per_seq,
    T,
    D,
    K,
    R,
    flags,
    blocks,
):
    """What is made of [dz dg]: the gradient of the weights, whose programs are longer and so begin, and of rows."""
    program = tl.program_id(0)
    if dw_ptr is not None:
        own = tl.cdiv(D, blocks.D) * tl.cdiv(K, blocks.K) * tl.cdiv(items, items_per_split)
        if program < own:
            _gradient_of_weights(
                program,
                h,
                live_ptr,
                dz_ptr,
                dw_ptr,
                spans,
                item0,
                items,
                items_per_split,
                num_seqs,
                per_seq,
                T,
                D,
                K,
                flags,
                blocks,
            )
        program -= own
    if grad_ptr is not None:  # noqa: SIM102 — the one is known to the compiler, the other is not
        if program >= 0:
            _gradient_of_rows(
                program,
                dz_ptr,
                ww,
                p_ptr,
                do_ptr,
                grad_ptr,
                spans,
                item0,
                items,
                num_seqs,
                per_seq,
                T,
                D,
                K,
                R,
                flags,
                blocks,
            )


@triton.jit(do_not_specialize=LENGTHS)
def _location_bwd_dv_kernel(
    u_ptr,  # (rows, A)
    ds_ptr,  # (rows, R) float32
    dv_ptr,  # (splits, A, R) float32: added to, but by the first launch
    item0,
    rows,  # of the workspace
    rows_per_split,
    A,
    R,
    flags,
    blocks,
):
    """With hops: dv += uᵀ ds over this split's rows."""
    split = tl.program_id(1)
    a = tl.program_id(0) * blocks.A + tl.arange(0, blocks.A)
    r = tl.arange(0, blocks.R)
    acc = tl.zeros([blocks.A, blocks.R], tl.float32)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    for row0 in range(first, last, blocks.T):
        row = row0 + tl.arange(0, blocks.T)
        u = load_rows(u_ptr + row.to(tl.int64) * A, row < last, a, A)
        ds = load_rows(ds_ptr + row.to(tl.int64) * R, row < last, r, R)
        acc = add_product(tl.trans(u), ds, acc, flags.U_COMPUTE, flags.U_PRECISION)
    add_later(dv_ptr + (split.to(tl.int64) * A + a) * R, acc, a < A, r, R, item0)


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    """Gradients of what the forward left."""

    do: Tensor | None  # (S, R, DV), of any dtype; None: the scores have all that comes back
    dlse: Tensor | None  # (S, R, 2) float32
    dscores: Tensor | None  # (B, T, R) or (N, R) float32; of features (B, T, A) or (N, A)
    left: Tensor | None = None  # (S, R) float32: what is left of Σ_j a_jr gap_jr, which is 0


class Work(NamedTuple):
    """What a launch leaves for the products, of the rows of its items."""

    dz: Tensor | None  # (items, blocks.T, A or 2A): [dz dg]; None where it is dh
    p: Tensor | None  # (items, blocks.T, R) float32: a ⊙ k; none without an output
    live: Tensor  # (items, blocks.T) int32: rows that have a ds
    u: Tensor | None  # (items, blocks.T, A), with hops
    ds: Tensor | None  # (items, blocks.T, R) float32, there with u
    dh: Tensor | None  # (B, T, A) or (N, A), contiguous: where H is projected already, and no values, it is dz


class Sums(NamedTuple):
    """Gradients of vectors, float32 (items, A), a sum each item; None where it is not wanted."""

    db: Tensor | None
    dgb: Tensor | None
    dv: Tensor | None  # of one hop


class Matrix(NamedTuple):
    """[W G], of any strides."""

    ptr: Tensor | None
    stride_d: int
    stride_k: int


@rule
def bwd_blocks(chip: Chip, itemsize: int, T: int, D: int, A: int, R: int, DV: int, linear: bool) -> Blocks:
    """Tiles of the backward kernels; T is also the rows of an item. Chosen as the forward's are."""
    hop = hop_block(R)
    hopper = chip.hopper
    whole = whole_rows(chip, D, DV, 16 if hopper and linear and hop == 1 else A)  # W of one score is a vector
    if itemsize == 4:
        block_a = hop if linear else pow2(A, 16, 64 if hop == 1 and whole else 32 if hop <= 32 else 16)
        if hopper and hop == 1 and linear:
            return Blocks(tile_rows(T, 32), pow2(D, 16, 128), block_a, warps=4, R=hop)
        if hopper and hop == 1 and whole:
            return Blocks(tile_rows(T, 64), pow2(D, 16, 32), block_a, warps=8, R=hop)
        return Blocks(tile_rows(T, 32 if hop == 1 else 16), 16, block_a, warps=8, R=hop)
    if hop > 64:  # of so many hops dO has an address an element where rows are no vectors, which spilled
        rows = tile_rows(T, 16 if chip.backend == "hip" and not whole else 32)
        return Blocks(rows, pow2(D, 16, 64 if whole else 16), hop if linear else pow2(A, 16, 32), warps=8, R=hop)
    if not whole or chip.from_registers:
        return Blocks(tile_rows(T, 32), pow2(D, 16, 64), hop if linear else pow2(A, 16, 32), warps=8, R=hop)
    # With 16 features the walk of one product would keep wgmma from that of the hops: so rows too few for it.
    block_t = tile_rows(T, 128 if hopper and hop == 1 else 32 if hop > 1 and A <= 16 else 64)
    return Blocks(block_t, pow2(D, 16, 64), hop if linear else pow2(A, 16, 64), warps=8, R=hop)


@rule
def product_blocks(chip: Chip, itemsize: int, blocks: Blocks, size: Size, K: int) -> Blocks:
    """Tiles of the products of [dz dg], whose rows are those of its items: wgmma's largest where widths are whole."""
    D, A, R, DV = size
    wide = chip.hopper and itemsize == 2 and R == 1 and even(A, DV) and D % 128 == K % 128 == 0
    return blocks._replace(D=128, K=128) if wide else blocks


def location_bwd(
    inputs: LocationInputs,
    out: Tensor,
    lse: Tensor,
    scores: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    dscores: Tensor | None,
    needs: list[bool],
    *,
    onto: Tensor | None = None,
    pending: Pending | None = None,
) -> list[Tensor | None]:
    """Gradients of (h, w, b, v, gate_w, gate_b, context, values, score_bias), None where `needs` is False.

    dout: None where scores alone have a gradient. onto: contiguous, of the shape of H; the gradient of H is added to
    it, and is it. pending: the caller launches the sums, which may be among others; gradients are there when it has.
    """
    call = prepare(inputs, dout is not None or dlse is not None)
    h, w, b, v, gate_w, gate_b, context, values, score_bias, *_ = inputs
    need_h, need_w, need_b, need_v, need_gw, need_gb, need_ctx, need_values, need_bias = needs
    D, A, R, DV = call.size
    a_sequence = need_ctx and not inputs.context_per_row

    ww = call.args["weights"].w if gate_w is None else torch.cat([w, gate_w], dim=1)
    K = A if gate_w is None else 2 * A
    blocks = _blocks(call, h.element_size(), K)
    if dout is None and dlse is not None:
        dout = torch.zeros_like(out)
    if call.seqs == 0 or call.length == 0 or (dout is None and dscores is None):
        return [torch.zeros_like(x) if need else None for x, need in zip(inputs[:9], needs, strict=True)]
    items = call.items(blocks.T)
    wanted = need_b or a_sequence, need_gb, need_v
    dh, dvalues, dbias = (
        _like(h, need_h) if onto is None else onto,
        _like(values, need_values),
        _like(score_bias, need_bias),
    )
    direct = dh if ww is None and onto is None and (values is not None or dout is None) else None
    work, parts = _workspace(call, h, blocks, items.count, K, wanted, dout is not None, direct)
    chunk = len(work.live)
    products = product_blocks(call.chip, h.element_size(), blocks, call.size, K)
    tiles = cdiv(D, products.D), cdiv(K, products.K)
    splits = _splits(call.chip, tiles[0] * tiles[1], chunk)
    splits = cdiv(chunk, cdiv(chunk, splits))  # none without an item
    rows = need_h and direct is None
    v_blocks = blocks._replace(A=pow2(A, 16, 64))
    v_splits = _splits(call.chip, cdiv(A, v_blocks.A), chunk)
    whole = chunk >= items.count  # in one launch
    new = functools.partial(torch.empty, dtype=torch.float32, device=h.device)
    dctx, of_items = None, a_sequence and whole and items.per_seq > 0  # as many each
    if need_ctx and not of_items:
        dctx = new(call.seqs, A) if a_sequence and not whole else _like(context, need_ctx)
    dw = new(splits, D, K) if need_w or need_gw else None
    dv = new(v_splits, A, R) if work.u is not None else None
    dout, dlse, dscores = (x if x is None else x.contiguous() for x in (dout, dlse, dscores))
    args = call.args | {
        "flags": constants(call.flags), "result": Result(out, lse, scores), "given": Given(dout, dlse, dscores),
        "work": work, "parts": parts, "dbias_ptr": dbias, "dctx_ptr": None if a_sequence else dctx,
        **{f"{name}_ptr": x for name, x in work._asdict().items()},
        "dw_ptr": dw, "dv_ptr": dv, "do_ptr": dout, "D": width(D), "A": width(A), "R": R, "K": width(K),
    }  # fmt: skip
    # The gradient of rows has a term from the scores and one from the weighted sum: of H both, if it is the values.
    of_h = {"ww": Matrix(ww, *((0, 0) if ww is None else map(width, ww.stride()))), "grad_ptr": dh if rows else None}
    of_h["flags"] = constants(call.flags._replace(ADD=onto is not None, WHOLE=_whole(products, D=D, K=K)))
    of_h |= {} if values is None and dout is not None else {"p_ptr": None, "do_ptr": None}
    of_values = {"ww": Matrix(None, 0, 0), "grad_ptr": dvalues, "dz_ptr": None, "dw_ptr": None}
    of_values |= {"D": width(DV), "K": 0}

    many = hop_block(R) > (32 if h.element_size() == 4 else 64)  # float32 products are sums of their own
    registers = all_registers(call.chip) if many else unpressed(call.chip, D, DV, A)
    dz_blocks = blocks
    if h.element_size() == 4 and (v is not None or call.flags.FEATURES):
        dz_blocks = blocks._replace(D=min(16, blocks.D))  # beside the score's features a wider part of W spilled
    args["flags"] = constants(call.flags._replace(WHOLE=_whole(dz_blocks, D=D, A=A)))
    # gap is what is left of two rounded products that are equal where one key has all the weight: not so if one of
    # the two is fused into the difference.
    fusion = h.element_size() == 2
    if not fusion and dout is not None and call.flags.PRECISION == "ieee" and any((*needs[:7], need_bias)):
        args["given"] = args["given"]._replace(left=left_of_gaps(call, args, blocks, items, registers))
    vectors: list[Tensor | None] = [None] * 3  # gradients of b, gate_b and v, of launches before the last
    for item0 in range(0, items.count, chunk):
        count = min(chunk, items.count - item0)
        args |= {"item0": item0, "items": count, "items_per_split": cdiv(count, splits)}
        args |= {"rows": count * blocks.T, "rows_per_split": cdiv(count, v_splits) * blocks.T}
        launch(_location_bwd_dz_kernel, (count,), args, dz_blocks, enable_fp_fusion=fusion, **registers)
        programs = count * tiles[0] if rows else 0
        if dw is not None:
            programs += tiles[0] * tiles[1] * cdiv(count, args["items_per_split"])
        if programs:
            launch(_location_bwd_products_kernel, (programs,), args | of_h, products, **registers)
        if need_values:
            grid = (count * cdiv(DV, blocks.D),)
            launch(_location_bwd_products_kernel, grid, args | of_values, blocks, **registers)
        if dv is not None:
            launch(_location_bwd_dv_kernel, (cdiv(A, v_blocks.A), v_splits), args, v_blocks, **registers)
        if dctx is not None and a_sequence:
            add_items(parts.db, dctx, items, item0, count)
        if not whole:
            more = sums([(x if x is None else x[:count], torch.float32) for x in parts])
            vectors = [x if y is None else y + x for x, y in zip(more, vectors, strict=True)]

    db, dgb, dv_parts = (x if whole or x is None else x[None] for x in (parts if whole else vectors))
    dw_parts, dgw_parts = (None if dw is None else dw[..., columns] for columns in (slice(0, A), slice(A, None)))
    given = (
        (dw_parts if need_w else None, w),
        (db if need_b else None, b),
        (dv_parts if dv is None else dv, v),
        (dgw_parts if need_gw else None, gate_w),
        (dgb, gate_b),
        (parts.db.view(call.seqs, -1, A).transpose(0, 1) if of_items else None, context),
    )
    own = Pending() if pending is None else pending
    made_w, made_b, made_v, *made_gate, made_ctx = (own.add(x, h.dtype if y is None else y.dtype) for x, y in given)
    if pending is None:
        own.launch()
    made_v = made_v[:, None] if made_v is not None and dv is None else made_v
    made_ctx = made_ctx if dctx is None else dctx.to(context.dtype)
    return [dh, made_w, made_b, made_v, *made_gate, made_ctx, dvalues, dbias]


def _like(x: Tensor | None, need: bool) -> Tensor | None:
    return torch.empty_like(x, memory_format=torch.contiguous_format) if need else None


def _blocks(call: Call, itemsize: int, K: int) -> Blocks:
    """`bwd_blocks` of a call."""
    (D, A, R, DV), weights, flags = call.size, call.args["weights"], call.flags
    longest = call.length if call.cu_seqlens is None else LONG
    blocks = bwd_blocks(call.chip, itemsize, longest, D, A, R, DV, weights.v is None and not flags.FEATURES)
    gated = weights.gw is not None and flags.ACT in ("gelu", "silu")
    if flags.CTX_PER_ROW and (gated or not even(D, A, DV)):
        blocks = blocks._replace(T=min(blocks.T, 64))  # z, gate and context of 128 rows spilled
    return blocks._replace(K=pow2(K, 16, 64))


def _whole(blocks: Blocks, **widths: int) -> bool:
    """Whether widths are multiples of the blocks that have their names."""
    return all(n % getattr(blocks, name) == 0 for name, n in widths.items())


def _workspace(
    call: Call,
    h: Tensor,
    blocks: Blocks,
    items: int,
    K: int,
    wanted: tuple[bool, bool, bool],
    pooled: bool,
    dh: Tensor | None,
) -> tuple[Work, Sums]:
    """Room for as many items as fit, one at least; `wanted` are the gradients of Sums."""
    _, A, R, _ = call.size
    hops = wanted[2] and R > 1
    u_dtype = torch.float32 if tl.float32 == call.flags.U_COMPUTE else h.dtype
    u_size = u_dtype.itemsize if hops else 0
    size = _item_bytes(blocks.T, K, A, R, h.element_size(), u_size)
    rows = max(1, min(items, WORKSPACE_BYTES // size)), blocks.T
    f32 = {"dtype": torch.float32, "device": h.device}
    work = Work(
        h.new_empty(*rows, K) if dh is None else None,
        torch.empty(*rows, R, **f32) if pooled else None,
        torch.empty(rows, dtype=torch.int32, device=h.device),
        h.new_empty(*rows, A, dtype=u_dtype) if hops else None,
        torch.empty(*rows, R, **f32) if hops else None,
        dh,
    )
    of_vectors = (*wanted[:2], wanted[2] and not hops)
    return work, Sums(*(torch.empty(rows[0], A, **f32) if want else None for want in of_vectors))


def _item_bytes(rows: int, K: int, A: int, R: int, itemsize: int, u_size: int) -> int:
    """What an item takes of the workspace: dz, p and live of its rows, u and ds with hops, and its parts."""
    return rows * (K * itemsize + R * 4 + 4 + (A * u_size + R * 4 if u_size else 0)) + 3 * A * 4


def _splits(chip: Chip, tiles: int, items: int) -> int:
    """Parts of a sum over items: programs for two a core, none for fewer than four items."""
    return max(1, min(cdiv(2 * chip.cores, tiles), cdiv(items, 4)))
