"""Backward of target attention, from the saved scores and (m, l).

With the names of target.py, gap_j = dO · value_j - dO · o where there is a softmax, and dO · value_j where there is
none:

    ds_j  = a_j (gap_j + dlse) + dscores_j, without a softmax gap_j + dscores_j;  from here on times scale
    dz'_j = ds_j v ⊙ act'(z'_j)        dz_j = (dz'_j W2ᵀ) ⊙ act'(z_j)
    dW2 = Σ_j u_jᵀ dz'_j,  db2 = Σ_j dz'_j,  dv = Σ_j ds_j u'_j,  db3 = Σ_j ds_j,  dc = Σ_j dz_j, of a sequence
    dk_j = dz_j W_keyᵀ + q ⊙ (dz_j W_productᵀ) + a_j dO          dq = Σ_j k_j ⊙ (dz_j W_productᵀ)
    dM = Σ_j k_jᵀ dz_j, of a sequence:  dW_key = Σ dM,  dW_product = Σ diag(q) dM

dz, u and dz' are made for a block of items at a time in a workspace of fixed size (`WORKSPACE_BYTES`), which the
matrix products then read from L2. Sums of vectors are parts, one an item, and those of matrices one a split of the
items; all are added in a fixed order.

A sequence whose cotangents are all 0 sends nothing, even if its result is NaN; a row without any ds is not read
again, so that NaN in it stays out of what is summed over rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, activate_grad
from .arguments import constants, launch, sequence_ptr
from .chip import LENGTHS, LONG, Chip, all_registers, cdiv, even, pow2, rule, tile_rows
from .inputs import TargetInputs
from .location import WORKSPACE_BYTES, Blocks, Call, Result, matmul
from .location_bwd import Given, _like, _location_bwd_dv_kernel, _splits
from .location_gap import left_of_gaps, weights_and_gaps
from .masks import follow, item_rows, locate, place, sequence_at
from .products import add_product, tile_product
from .softmax import load_dlse
from .sums import add_items, sums
from .target import MAX_UNITS, first_layer, prepare, second_layer, warps_of, with_bias
from .tiles import add_later, load_part, load_rows, store_rows


@triton.jit
def _plain_gaps(val_ptrs, keep, seq, at, visible, result, given, size, flags, blocks):
    """(1, a, gap, |dO|) where scores are the weights, as `weights_and_gaps` has them."""
    gap = tl.zeros([blocks.T, 1], tl.float32)
    cotangent = tl.zeros([1], tl.float32)
    for d0 in range(0, size.DV, blocks.D):
        d = d0 + tl.arange(0, blocks.D)
        x = load_rows(val_ptrs, keep, d, size.DV)
        do = tl.load(given.do + seq * size.DV + d, mask=d < size.DV, other=0.0)[:, None]
        cotangent += tl.sum(tl.abs(do.to(tl.float32)), axis=0)
        gap = matmul(x, do, gap, flags.COMPUTE, flags.PRECISION)
    p = tl.load(result.scores + at, mask=visible, other=0.0)
    return tl.full([blocks.T, 1], 1.0, tl.float32), p, gap, cotangent


@triton.jit
def _first_gradients(z, dz2, ds, a, slot, item, weights, work, parts, size, flags, blocks):
    """What z of the features a gives: dz and u of the workspace, and parts of dc, and of dv where it is one layer."""
    u = activate(z, flags.ACT, flags.FAST)
    inside = a < size.A
    if weights.w2 is None:
        v = tl.load(weights.v + a, mask=inside, other=0.0).to(tl.float32)
        du = ds * v[None, :]
        if parts.dv is not None:
            tl.store(parts.dv + item * size.A + a, tl.sum(u * ds, axis=0), mask=inside)
    else:
        k = tl.arange(0, blocks.K)
        w2 = load_part(weights.w2, weights.stride_2k, weights.stride_2a, 0, k, a, size.K, size.A, False)
        du = tile_product(dz2, w2, flags.U_COMPUTE, flags.U_PRECISION)
        if work.u is not None:
            store_rows(work.u + slot * size.A, u, slot >= 0, a, size.A)
    dz = du * activate_grad(z, u, flags.ACT, flags.FAST)
    store_rows(work.dz + slot * size.A, dz, slot >= 0, a, size.A)
    if parts.dctx is not None:
        tl.store(parts.dctx + item * size.A + a, tl.sum(dz, axis=0), mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def _target_bwd_dz_kernel(
    query,  # (S, D)
    h,  # keys (B, T, D) or (N, D)
    context,  # (S, A)
    values,  # (B, T, DV), (N, DV), or None: the keys
    weights,
    mask,  # (B, T), (N,) or None
    spans,
    dropout,
    result,
    given,
    work,
    parts,
    dvalue_ptr,  # (B, T, DV) or (N, DV), or None
    scale,
    item0,
    num_seqs,
    per_seq,
    T,  # 0 where the batch is ragged
    size,
    flags,
    blocks,
):
    local = tl.program_id(0)
    item = (item0 + local).to(tl.int64)
    seq = sequence_at(item0 + local, spans, num_seqs, per_seq, blocks.T)
    seq, t, inside, rows, keep = item_rows(item0 + local, seq, mask, spans, T, per_seq, blocks.T)
    key_ptrs = sequence_ptr(h, seq, rows)
    if values.ptr is None:
        val_ptrs = key_ptrs
    else:
        val_ptrs = sequence_ptr(values, seq, rows)
    at = (seq * T + rows)[:, None]
    visible = keep[:, None]
    if flags.SOFTMAX:
        a_w, p, gap, cotangent = weights_and_gaps(
            val_ptrs, keep, seq, t, at, visible, result, given, dropout, size, flags, blocks
        )
        if given.left is not None:
            gap -= tl.load(given.left + seq)
        if given.dlse is not None:
            one = tl.arange(0, 1)
            dlse = load_dlse(given.dlse + seq * 2 + one, result.lse + seq * 2 + one, one == 0)
            gap += dlse[None, :]
            cotangent += tl.abs(dlse)
    else:
        a_w, p, gap, cotangent = _plain_gaps(val_ptrs, keep, seq, at, visible, result, given, size, flags, blocks)
    sends = visible & (cotangent != 0)[None, :]
    p = tl.where(sends, p, 0.0)
    ds = tl.where(sends, a_w * gap, 0.0)
    if given.dscores is not None:
        ds += tl.load(given.dscores + at, mask=visible, other=0.0)
    ds *= scale
    slot = local.to(tl.int64) * blocks.T + tl.arange(0, blocks.T)
    live = tl.max((ds != 0).to(tl.int32), axis=1) != 0
    some = tl.max(live.to(tl.int32), axis=0) != 0
    tl.store(work.live + slot, live.to(tl.int32))
    tl.store(work.p + slot[:, None], p)
    if dvalue_ptr is not None:
        for d0 in range(0, size.DV, blocks.D):
            d = d0 + tl.arange(0, blocks.D)
            do = tl.load(given.do + seq * size.DV + d, mask=d < size.DV, other=0.0).to(tl.float32)
            store_rows(dvalue_ptr + (seq * T + rows) * size.DV, p * do[None, :], inside, d, size.DV)
    if parts.db3 is not None:
        one = tl.arange(0, 1)
        tl.store(parts.db3 + item + one, tl.sum(ds, axis=0))

    a = tl.arange(0, blocks.A)
    k = tl.arange(0, blocks.K)
    z = first_layer(query, context, key_ptrs, live, some, seq, weights, a, size, flags, blocks.D)
    dz2 = tl.zeros([blocks.T, blocks.K], tl.float32)
    if weights.w2 is not None:
        z2 = second_layer(activate(z, flags.ACT, flags.FAST), dz2, weights, a, k, size, flags)
        if not flags.ONE_A:
            for a0 in range(blocks.A, size.A, blocks.A):
                b = a0 + a
                more = first_layer(query, context, key_ptrs, live, some, seq, weights, b, size, flags, blocks.D)
                z2 = second_layer(activate(more, flags.ACT, flags.FAST), z2, weights, b, k, size, flags)
        z2 = with_bias(z2, weights, k, size)
        u2 = activate(z2, flags.ACT, flags.FAST)
        v = tl.load(weights.v + k, mask=k < size.K, other=0.0).to(tl.float32)
        dz2 = ds * v[None, :] * activate_grad(z2, u2, flags.ACT, flags.FAST)
        if parts.dv is not None:
            tl.store(parts.dv + item * size.K + k, tl.sum(u2 * ds, axis=0), mask=k < size.K)
        if parts.db2 is not None:
            tl.store(parts.db2 + item * size.K + k, tl.sum(dz2, axis=0), mask=k < size.K)
        if work.ds is not None:
            store_rows(work.ds + slot * size.K, dz2, slot >= 0, k, size.K)
    _first_gradients(z, dz2, ds, a, slot, item, weights, work, parts, size, flags, blocks)
    if not flags.ONE_A:
        for a0 in range(blocks.A, size.A, blocks.A):
            b = a0 + a
            z = first_layer(query, context, key_ptrs, live, some, seq, weights, b, size, flags, blocks.D)
            _first_gradients(z, dz2, ds, b, slot, item, weights, work, parts, size, flags, blocks)


@triton.jit
def _gradient_of_keys(
    program, query, h, weights, spans, work, given, dkey_ptr, dquery_ptr, item0, items, num_seqs, per_seq, T, size,
    flags, blocks,
):  # fmt: skip
    """A tile of dz W_keyᵀ + q ⊙ (dz W_productᵀ), of values that are the keys + a dO; and the item's part of dq."""
    local = program % items
    i = tl.arange(0, blocks.T)
    d = program // items * blocks.D + tl.arange(0, blocks.D)
    seq, start, lo, hi, _ = locate(item0 + local, spans, T, num_seqs, per_seq, blocks.T)
    slot = (i + local * blocks.T).to(tl.int64)
    live = tl.load(work.live + slot) != 0
    some = tl.max(live.to(tl.int32), axis=0) != 0
    grad = tl.zeros([blocks.T, blocks.D], tl.float32)
    product = tl.zeros([blocks.T, blocks.D], tl.float32)
    dz_ptr = work.dz + size.A * blocks.T * local  # within the workspace, so int32
    j = tl.arange(0, blocks.A)
    for a0 in range(0, size.A, blocks.A):
        dz = load_part(dz_ptr + a0, size.A, 1, 0, i, j, blocks.T, size.A - a0, flags.WHOLE)
        w = load_part(weights.wk, weights.stride_ka, weights.stride_kd, a0, j, d, size.A, size.D, flags.WHOLE)
        grad = add_product(dz, w, grad, flags.COMPUTE, flags.PRECISION)
        w = load_part(weights.wp, weights.stride_pa, weights.stride_pd, a0, j, d, size.A, size.D, flags.WHOLE)
        product = add_product(dz, w, product, flags.COMPUTE, flags.PRECISION)
    rows = start + lo + i
    if dquery_ptr is not None:
        x = load_rows(sequence_ptr(h, seq, rows), live, d, size.D).to(tl.float32)
        part = tl.sum(x * product, axis=0)
        tl.store(dquery_ptr + (item0 + local).to(tl.int64) * size.D + d, part, mask=d < size.D)
    if dkey_ptr is not None:
        q = tl.load(query + seq * size.D + d, mask=(d < size.D) & some, other=0.0).to(tl.float32)
        grad += q[None, :] * product
        if given.do is not None:
            p = tl.load(work.p + slot)
            do = tl.load(given.do + seq * size.D + d, mask=d < size.D, other=0.0).to(tl.float32)
            grad += p[:, None] * do[None, :]
        store_rows(dkey_ptr + (seq * T + rows) * size.D, grad, lo + i < hi, d, size.D)


@triton.jit
def _gradient_of_weights(
    program, query, h, spans, work, dw, item0, items, items_per_split, num_seqs, per_seq, T, size, flags, blocks
):
    """dW_key and dW_product += dM and diag(q) dM over the items of a split."""
    d_tiles = tl.cdiv(size.D, blocks.D)
    tiles = d_tiles * tl.cdiv(size.A, blocks.A)
    split = program // tiles
    d = program % d_tiles * blocks.D + tl.arange(0, blocks.D)
    a = program % tiles // d_tiles * blocks.A + tl.arange(0, blocks.A)
    i = tl.arange(0, blocks.T)
    of_key = tl.zeros([blocks.D, blocks.A], tl.float32)
    of_product = tl.zeros([blocks.D, blocks.A], tl.float32)
    first = split * items_per_split
    of = sequence_at(item0 + first, spans, num_seqs, per_seq, blocks.T)
    for local in range(first, tl.minimum(first + items_per_split, items)):
        of = follow(of, item0 + local, spans, per_seq, blocks.T)
        seq, start, lo, _, _ = place(item0 + local, of, spans, T, per_seq, blocks.T)
        live = tl.load(work.live + (i + local * blocks.T)) != 0
        some = tl.max(live.to(tl.int32), axis=0) != 0
        x = load_rows(sequence_ptr(h, seq, start + lo + i), live, d, None if flags.WHOLE else size.D)
        q = tl.load(query + seq * size.D + d, mask=(d < size.D) & some, other=0.0).to(tl.float32)
        dz_ptr = work.dz + size.A * blocks.T * local  # within the workspace, so int32
        dz = load_part(dz_ptr, size.A, 1, 0, i, a, blocks.T, size.A, flags.WHOLE)
        part = tile_product(tl.trans(x), dz, flags.COMPUTE, flags.PRECISION)
        of_key += part
        of_product += q[:, None] * part
    at = (split.to(tl.int64) * size.D + d) * size.A
    add_later(dw.key + at, of_key, d < size.D, a, size.A, item0)
    add_later(dw.product + at, of_product, d < size.D, a, size.A, item0)


@triton.jit(do_not_specialize=LENGTHS)
def _target_bwd_products_kernel(
    query,  # (S, D)
    h,  # keys (B, T, D) or (N, D)
    weights,
    spans,
    work,
    given,  # its dO is None where the values are not the keys
    dw,
    dkey_ptr,  # (B, T, D) or (N, D), contiguous; None: not wanted
    dquery_ptr,  # (all items, D) float32, or None
    item0,
    items,  # items of this launch
    items_per_split,
    num_seqs,
    per_seq,
    T,
    size,
    flags,
    blocks,
):
    """What is made of dz: the gradients of the matrices, whose programs are longer and so begin, and of rows."""
    program = tl.program_id(0)
    if dw.key is not None:
        own = tl.cdiv(size.D, blocks.D) * tl.cdiv(size.A, blocks.A) * tl.cdiv(items, items_per_split)
        if program < own:
            _gradient_of_weights(
                program, query, h, spans, work, dw, item0, items, items_per_split, num_seqs, per_seq, T, size,
                flags, blocks,
            )  # fmt: skip
        program -= own
    if dkey_ptr is not None or dquery_ptr is not None:  # noqa: SIM102 — the one is known to the compiler
        if program >= 0:
            _gradient_of_keys(
                program, query, h, weights, spans, work, given, dkey_ptr, dquery_ptr, item0, items, num_seqs,
                per_seq, T, size, flags, blocks,
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What a launch leaves for the products, of the rows of its items."""

    dz: Tensor  # (items, blocks.T, A)
    p: Tensor  # (items, blocks.T) float32: the weights
    live: Tensor  # (items, blocks.T) int32: rows that have a ds
    u: Tensor | None  # (items, blocks.T, A): where W2 has a gradient, for which is
    ds: Tensor | None  # (items, blocks.T, K): dz', by the name that `_location_bwd_dv_kernel` has


class Sums(NamedTuple):
    """Gradients of vectors, float32, a part each of all items; None where it is not wanted."""

    dctx: Tensor | None  # (items, A)
    db2: Tensor | None  # (items, K)
    dv: Tensor | None  # (items, K)
    db3: Tensor | None  # (items, 1)


class Matrices(NamedTuple):
    """Gradients of matrices, float32 (splits, D, A): added to, but by the first launch; None: not wanted."""

    key: Tensor | None
    product: Tensor | None


@rule
def bwd_blocks(chip: Chip, itemsize: int, T: int, D: int, A: int, K: int) -> Blocks:
    """Tiles of the backward's first kernel; T is also the rows of an item. Chosen as the forward's are."""
    block_k, warps, hip = pow2(K, 16, MAX_UNITS), warps_of(chip), chip.backend == "hip"
    if itemsize == 4:
        return Blocks(tile_rows(T, 32 if block_k <= (32 if hip else 64) else 16), 16, 16, warps=warps, K=block_k)
    rows = tile_rows(T, 32 if chip.from_registers or not even(D, A) or block_k > 64 else 64)
    return Blocks(rows, pow2(D, 16, 64), pow2(A, 16, 128 if even(D, A) else 32), warps=warps, K=block_k)


@rule
def product_blocks(chip: Chip, itemsize: int, blocks: Blocks, D: int, A: int) -> Blocks:
    """Tiles of the products of dz, whose rows are those of its items."""
    if itemsize == 4:
        return blocks._replace(D=pow2(D, 16, 32), A=pow2(A, 16, 32))
    return blocks._replace(D=pow2(D, 16, 64), A=pow2(A, 16, 64 if even(D, A) else 32))


def target_bwd(
    inputs: TargetInputs,
    out: Tensor,
    lse: Tensor,
    scores: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dscores: Tensor | None,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of (query, key, w_key, w_product, context, w2, b2, v, b3, value), None where `needs` is False."""
    call = prepare(inputs)
    query, h, w_key, w_product, context, *_, values = inputs[:10]
    need_query, need_key, need_wk, need_wp, need_ctx, need_w2, need_b2, need_v, need_b3, need_values = needs
    if call.seqs == 0 or call.length == 0:
        return [torch.zeros_like(x) if need else None for x, need in zip(inputs[:10], needs, strict=True)]
    D, A, _, _, K = call.size
    blocks = bwd_blocks(call.chip, h.element_size(), LONG if call.cu_seqlens is not None else call.length, D, A, K)
    items = call.items(blocks.T)
    f32 = {"dtype": torch.float32, "device": h.device}

    def part(need: bool, width: int) -> Tensor | None:
        return torch.empty(items.count, width, **f32) if need else None

    dkey, dvalues = _like(h, need_key), _like(values, need_values)
    parts = Sums(part(need_ctx, A), part(need_b2, K), part(need_v, K), part(need_b3, 1))
    dquery = part(need_query, D)
    work = _workspace(call, h, blocks, items.count, need_w2)
    chunk = len(work.live)

    products = product_blocks(call.chip, h.element_size(), blocks, D, A)
    tiles = cdiv(D, products.D), cdiv(A, products.A)
    splits = _splits(call.chip, tiles[0] * tiles[1], chunk)
    splits = cdiv(chunk, cdiv(chunk, splits))  # none without an item
    both = need_wk or need_wp
    matrices = Matrices(*(torch.empty(splits, D, A, **f32) if both else None for _ in range(2)))
    # Of 128 columns and rows too few for it wgmma would be made one after the other.
    second = blocks._replace(A=pow2(A, 16, 64 if blocks.K <= 64 else 32), R=blocks.K)
    second_splits = _splits(call.chip, cdiv(A, second.A), chunk)
    dw2 = torch.empty(second_splits, A, K, **f32) if need_w2 else None

    dout, dlse, dscores = (x if x is None else x.contiguous() for x in (dout, dlse, dscores))
    given = Given(dout, dlse if call.flags.SOFTMAX else None, dscores)
    flags = call.flags._replace(ONE_A=blocks.A >= A, WHOLE=D % blocks.D == A % blocks.A == 0)
    args = call.args | {
        "flags": constants(flags), "result": Result(out, lse, scores), "given": given, "work": work, "parts": parts,
        "dw": matrices, "dvalue_ptr": dvalues, "dkey_ptr": dkey, "dquery_ptr": dquery,
        "u_ptr": work.u, "ds_ptr": work.ds, "dv_ptr": dw2, "A": A, "R": K,
    }  # fmt: skip
    of_rows = {
        "flags": constants(flags._replace(WHOLE=D % products.D == A % products.A == 0)),
        "given": given if values is None else given._replace(do=None),
    }
    registers = all_registers(call.chip)
    # See location_bwd: gap is what is left of two rounded products, and its sum in float32 of their roundings.
    fusion = h.element_size() == 2
    if not fusion and call.flags.SOFTMAX and call.flags.PRECISION == "ieee" and any(needs[:9]):
        args["given"] = given._replace(left=left_of_gaps(call, args, blocks, items, registers))
    for item0 in range(0, items.count, chunk):
        count = min(chunk, items.count - item0)
        args |= {"item0": item0, "items": count, "items_per_split": cdiv(count, splits)}
        args |= {"rows": count * blocks.T, "rows_per_split": cdiv(count, second_splits) * blocks.T}
        launch(_target_bwd_dz_kernel, (count,), args, blocks, enable_fp_fusion=fusion, **registers)
        programs = count * tiles[0] if need_key or need_query else 0
        if both:
            programs += tiles[0] * tiles[1] * cdiv(count, args["items_per_split"])
        if programs:
            launch(_target_bwd_products_kernel, (programs,), args | of_rows, products, **registers)
        if dw2 is not None:
            launch(_location_bwd_dv_kernel, (cdiv(A, second.A), second_splits), args, second, **registers)

    def of_sequences(x: Tensor | None, like: Tensor) -> Tensor | None:
        if x is None:
            return None
        total = torch.empty_like(like, memory_format=torch.contiguous_format)
        add_items(x, total, items, 0, items.count)
        return total

    made = sums([
        (matrices.key if need_wk else None, w_key.dtype),
        (matrices.product if need_wp else None, w_product.dtype),
        *((x, h.dtype) for x in (dw2, parts.db2, parts.dv, parts.db3)),
    ])  # fmt: skip
    of_query, of_context = of_sequences(dquery, query), of_sequences(parts.dctx, context)
    return [of_query, dkey, *made[:2], of_context, *made[2:], dvalues]


def _workspace(call: Call, h: Tensor, blocks: Blocks, items: int, need_w2: bool) -> Work:
    """Room for the rows of as many items as fit, one at least."""
    _, A, _, _, K = call.size
    features = torch.float32 if tl.float32 == call.flags.U_COMPUTE else h.dtype
    size = blocks.T * (A * h.element_size() + 8 + (features.itemsize * (A + K) if need_w2 else 0))
    rows = max(1, min(items, WORKSPACE_BYTES // size)), blocks.T
    return Work(
        h.new_empty(*rows, A),
        h.new_empty(rows, dtype=torch.float32),
        h.new_empty(rows, dtype=torch.int32),
        h.new_empty(*rows, A, dtype=features) if need_w2 else None,
        h.new_empty(*rows, K, dtype=features) if need_w2 else None,
    )
