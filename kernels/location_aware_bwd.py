"""Backward of location-aware attention: of one step, or of all steps of a sequence at once.

With the names of location_aware.py, a step i, dO_i the gradient of its output, dα_ij that of its weights, and κ the
factor of dropout:

    g_ij = κ_ij dO_i · value_j + dα_ij       δ_i = Σ_j α_ij g_ij       ds_ij = α_ij (g_ij - δ_i) = dbias_j
    dz_ij = ds_ij v ⊙ act'(z_ij)             dv = Σ ds_ij act(z_ij)    dk_j = Σ_i dz_ij        dq_i = Σ_j dz_ij
    dU = Σ f_ijᵀ dz_ij                       df_ij = dz_ij Uᵀ          dF_ck = Σ df_ijc p_{i, j + k - (K - 1)/2}
    dvalue_j = Σ_i κ_ij α_ij dO_i            dp_in = Σ_k e_ik,n        e_ik,n = Σ_c F_ck df_{i, n - k + (K - 1)/2, c}

Of a history of P channels each has its dp_in, and its places of F.

A key with all the weight has α 1 and δ = g, so its ds is 0 without a normaliser. Of a step there are three launches:
g, dvalue and a part of δ of each item; all that is made of dz; and the sums of parts, by sums.py. Besides the
parameters' and dq's those are the K numbers e of each key: they are stored where they are to be added, and a sum of K
parts is all that dp is. All of these are linear in dz, so programs have blocks of features and channels besides
items, and any width is a sum of more parts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, activate_grad
from .arguments import constants, entries, entry_ptr, first_row, launch, pitch, sequence_ptr
from .chip import LENGTHS, Chip, all_registers, cdiv, even, pow2, rule, tile_rows, whole_rows
from .inputs import LocationAwareInputs
from .location_aware import (
    Blocks,
    Call,
    add_features,
    all_places,
    channel_and_places,
    item_at,
    kept,
    load_filter,
    load_mixer,
    location_features,
    prepare_step,
    query_and_keys,
    windows,
)
from .masks import items_of, partition, unmasked
from .products import add_product, tile_product
from .softmax import rounded_product
from .sums import add_items, sums
from .tiles import load_rows, store_rows


class Given(NamedTuple):
    """Float32, contiguous: weights and their gradients, of which δ_i is the sum of so many parts."""

    weights: Tensor  # (B, Tq, Tk), where rows are packed (1, 1, N)
    g: Tensor  # the same; with `SMOOTH` ds
    delta: Tensor  # (B, Tq, parts), or (items,)
    dscores: Tensor | None = None  # as the weights: gradients of the scores themselves


class Made(NamedTuple):
    """What the programs leave, None where it is not wanted; float32 but for dk and dbias."""

    dk: Tensor | None  # (B, Tk, A), where rows are packed (1, N, A), and so on
    dbias: Tensor | None  # (B, Tk)
    dq: Tensor | None  # (per_seq, B, Tq, A), or (items, A)
    dv: Tensor  # (items, A)
    du: Tensor | None  # (items, C, A); of filters all or none
    df: Tensor | None  # (blocks of A, items, C, P, K)
    e: Tensor | None  # (blocks of A and C, K, B, P, Tk), of a step


@triton.jit(do_not_specialize=LENGTHS)
def _aware_bwd_values_kernel(
    value,  # (B, Tk, DV)
    mask,
    dropout,
    do_ptr,  # (S, DV)
    dweights,  # (B, Tk) or None
    given,
    dvalue_ptr,  # (B, Tk, DV) or None
    spans,
    num_seqs,
    per_seq,
    rows_per_item,
    Tk,
    size,
    blocks,
):
    item = tl.program_id(0)
    seq, batch, first, _last, lo, hi = item_at(item, spans, Tk, num_seqs, per_seq, rows_per_item)
    row0 = batch * Tk
    value_ptr = first_row(value, batch)
    delta = tl.zeros([1], tl.float32)
    for t0 in range(lo, hi, blocks.T):
        t = t0 + tl.arange(0, blocks.T)
        inside = t < hi
        keep = unmasked(mask, batch, t, inside)
        alpha = tl.load(given.weights + row0 + t, mask=keep, other=0.0)
        p = alpha
        if dropout.seed is not None:
            factor = kept(dropout, seq, t - first)
            p *= factor
        g = tl.zeros([blocks.T], tl.float32)
        for d0 in range(0, size.DV, blocks.DV):
            d = d0 + tl.arange(0, blocks.DV)
            do = tl.load(do_ptr + seq * size.DV + d, mask=d < size.DV, other=0.0).to(tl.float32)[None, :]
            values = load_rows(value_ptr + t.to(tl.int64) * pitch(value), keep, d, size.DV).to(tl.float32)
            g += tl.sum(rounded_product(do, values), axis=1)
            if dvalue_ptr is not None:
                dvalue = tl.where(keep[:, None], p[:, None] * do, 0.0)
                store_rows(dvalue_ptr + (row0 + t) * size.DV, dvalue, inside, d, size.DV)
        if dropout.seed is not None:
            g *= factor
        if dweights.ptr is not None:
            g += tl.load(entry_ptr(dweights, batch, t), mask=keep, other=0.0).to(tl.float32)
        tl.store(given.g + row0 + t, g, mask=inside)
        delta += tl.sum(alpha * g, axis=0)
    tl.store(given.delta + item + tl.arange(0, 1), delta)


@triton.jit
def gradient_of_scores(given, row, Tk, t, part0, parts, keep, flags, BLOCK: tl.constexpr):
    """ds [BLOCK_T] of keys; row: batch entry and step, whose δ has so many parts from `part0` on."""
    if flags.SMOOTH:  # which the walk has left in place of g
        ds = tl.load(given.g + row * Tk + t, mask=keep, other=0.0)
    else:
        ds = gradient_of_softmax(given, row, Tk, t, part0, parts, keep, BLOCK)
    return ds


@triton.jit
def gradient_of_softmax(given, row, Tk, t, part0, parts, keep, BLOCK: tl.constexpr):
    """α (g - δ) [BLOCK_T] of keys."""
    delta = tl.zeros([1], tl.float32)
    for i0 in range(0, parts, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        delta += tl.sum(tl.load(given.delta + part0 + i, mask=i < parts, other=0.0), axis=0)
    alpha = tl.load(given.weights + row * Tk + t, mask=keep, other=0.0)
    ds = alpha * (tl.load(given.g + row * Tk + t, mask=keep, other=0.0) - delta)
    if given.dscores is not None:
        ds += tl.load(given.dscores + row * Tk + t, mask=keep, other=0.0)
    return tl.where(keep, ds, 0.0)


@triton.jit
def _store_edges(e_ptr, lo, hi, k, k_stride, first, last, size, blocks):
    """Zeros of e where no key stands, by the first item and the last; e_ptr: (K, B, P, Tk) at [0, batch, channel]."""
    half = size.K // 2
    zero = tl.zeros([blocks.K, blocks.K], tl.float32)
    ptrs = e_ptr + k[:, None] * k_stride
    for r0 in range(0, half, blocks.K):
        r = (r0 + tl.arange(0, blocks.K))[None, :]
        there = (k < size.K)[:, None] & (r < last - first)
        # e of a key j is at n = j + k - half: none is before k - half, and none after that of the last key.
        tl.store(ptrs + (first + r), zero, mask=there & (r < k[:, None] - half) & (lo == first))
        tl.store(ptrs + (last - 1 - r), zero, mask=there & (r < half - k[:, None]) & (hi == last))


@triton.jit(do_not_specialize=LENGTHS)
def _aware_bwd_scores_kernel(
    q,  # (S, Tq, A)
    k,  # (B, Tk, A), where rows are packed (1, N, A), and so on
    v_ptr,  # (A,)
    filters,
    seen,  # (B, P, Tq, Tk), or (B, Tq, Tk)
    mask,
    spans,
    given,
    made,
    splits,  # parts of δ, where rows are not packed
    num_seqs,
    per_seq,
    rows_per_item,
    Tq,
    Tk,
    size,
    flags,
    blocks,
):
    """All that is made of dz, for the keys of an item, a block of features and one of channels."""
    item = tl.program_id(0)
    block_a = tl.program_id(1)
    block_c = tl.program_id(2)
    once = block_c == 0
    seq, batch, first, last, lo, hi = item_at(item, spans, Tk, num_seqs, per_seq, rows_per_item)
    if spans.cu is None:
        entries = num_seqs
        items = num_seqs * per_seq
        own = item % per_seq * num_seqs + seq
    else:
        entries = 1
        items = tl.num_programs(0)
        own = item
    a = block_a * blocks.A + tl.arange(0, blocks.A)
    c = block_c * blocks.C + tl.arange(0, blocks.C)
    v = tl.load(v_ptr + a, mask=a < size.A, other=0.0).to(tl.float32)
    k_ptr = first_row(k, batch)
    dq_ptr = made.dq
    if dq_ptr is not None:
        dq_ptr += own.to(tl.int64) * Tq * size.A
    df_ptr = made.df
    if df_ptr is not None:
        df_ptr += (block_a * items + item).to(tl.int64) * size.C * size.K * flags.P
    dq = tl.zeros([blocks.A], tl.float32)
    dv = tl.zeros([blocks.A], tl.float32)
    du = tl.zeros([blocks.C, blocks.A], tl.float32)
    for t0 in range(lo, hi, blocks.T):
        t = t0 + tl.arange(0, blocks.T)
        inside = t < hi
        keep = unmasked(mask, batch, t, inside)
        k_ptrs = k_ptr + t.to(tl.int64) * pitch(k)
        dk = tl.zeros([blocks.T, blocks.A], tl.float32)
        dbias = tl.zeros([blocks.T], tl.float32)
        for i in range(0, Tq):
            step = i + item * 0  # a tensor for the interpreter too
            row = batch * Tq + step
            if spans.cu is None:
                ds = gradient_of_scores(given, row, Tk, t, row * splits, splits, keep, flags, 32)
            else:  # its parts are of these items
                part0, past = items_of(seq, spans, per_seq, rows_per_item)
                ds = gradient_of_scores(given, row, Tk, t, part0, past - part0, keep, flags, 32)
            z = query_and_keys(k_ptrs, keep, sequence_ptr(q, seq, step), a, size)
            if flags.ONE_C:
                f = location_features(seen, mask, batch, step, t, c, first, last, filters, size, flags, blocks)
                z = add_product(f, load_mixer(filters, c, a, size), z, tl.float32, flags.PRECISION)
            else:
                z = add_features(z, seen, mask, batch, step, t, a, first, last, filters, size, flags, blocks)
            y = activate(z, flags.ACT, flags.FAST)
            dz = ds[:, None] * v[None, :] * activate_grad(z, y, flags.ACT, flags.FAST)
            dz = tl.where(keep[:, None], dz, 0.0)  # of a sequence that sees nothing z may be NaN
            dv += tl.sum(tl.where(keep[:, None], ds[:, None] * y, 0.0), axis=0)
            dk += dz
            dbias += ds
            if flags.WALK:
                if dq_ptr is not None:
                    dq = tl.sum(dz, axis=0)
                    tl.store(dq_ptr + step * size.A + a, dq, mask=(a < size.A) & once)
            else:
                dq += tl.sum(dz, axis=0)
            if made.du is not None or made.e is not None:
                if not flags.ONE_C:
                    f = location_features(seen, mask, batch, step, t, c, first, last, filters, size, flags, blocks)
                if made.du is not None:
                    du = add_product(tl.trans(f), dz, du, tl.float32, flags.PRECISION)
                u = load_mixer(filters, c, a, size)
                df = tile_product(dz, tl.trans(u), tl.float32, flags.PRECISION)
                for n0 in range(0, all_places(size, flags, blocks), blocks.K):
                    channel, place = channel_and_places(n0, size, flags, blocks)
                    x, there = windows(seen, mask, batch, step, channel, t, place, first, last, size)
                    if df_ptr is not None:
                        at = df_ptr + (c.to(tl.int64)[:, None] * flags.P + channel) * size.K + place[None, :]
                        some = (c < size.C)[:, None] & (place < size.K)[None, :]
                        old = tl.load(at, mask=some & ((t0 > lo) | (step > 0)), other=0.0)
                        tl.debug_barrier()  # threads that have the same numbers read before one of them writes
                        tl.store(at, add_product(tl.trans(df), x, old, tl.float32, flags.PRECISION), mask=some)
                        tl.debug_barrier()  # other threads may read it next
                    if made.e is not None:
                        w = load_filter(filters, channel, c, place, size)
                        e = tl.where(there, tile_product(df, w, tl.float32, flags.PRECISION), 0.0)
                        group = (block_c * tl.num_programs(1) + block_a).to(tl.int64) * size.K
                        e_row = ((group + place) * entries + batch) * flags.P + channel
                        n = t[:, None] + (place - size.K // 2)[None, :]
                        write = inside[:, None] & (n >= first) & (n < last) & (place < size.K)[None, :]
                        tl.store(made.e + e_row[None, :] * Tk + n, e, mask=write)
        if made.dk is not None:
            store_rows(made.dk + (batch * Tk + t) * size.A, dk, inside & once, a, size.A)
        if made.dbias is not None:
            to = made.dbias.dtype.element_ty
            tl.store(made.dbias + batch * Tk + t, dbias.to(to), mask=inside & once & (block_a == 0))

    if not flags.WALK and dq_ptr is not None:
        tl.store(dq_ptr + a, dq, mask=(a < size.A) & once)
    tl.store(made.dv + item.to(tl.int64) * size.A + a, dv, mask=(a < size.A) & once)
    if made.du is not None:
        store_rows(made.du + (item.to(tl.int64) * size.C + c) * size.A, du, c < size.C, a, size.A)
    if spans.cu is not None and df_ptr is not None:  # of no keys: nothing was added to what nobody has written
        for n0 in range(0, tl.where(lo < hi, 0, all_places(size, flags, blocks)), blocks.K):
            channel, place = channel_and_places(n0, size, flags, blocks)
            at = df_ptr + (c.to(tl.int64)[:, None] * flags.P + channel) * size.K + place[None, :]
            some = (c < size.C)[:, None] & (place < size.K)[None, :]
            tl.store(at, tl.zeros([blocks.C, blocks.K], tl.float32), mask=some)
    if made.e is not None:
        group = (block_c * tl.num_programs(1) + block_a).to(tl.int64) * size.K
        for n0 in range(0, all_places(size, flags, blocks), blocks.K):
            channel, place = channel_and_places(n0, size, flags, blocks)
            e_ptr = made.e + ((group * entries + batch) * flags.P + channel) * Tk
            stride = (item * 0 + entries).to(tl.int64) * (Tk * flags.P)
            _store_edges(e_ptr, lo, hi, place.to(tl.int64), stride, first, last, size, blocks)


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


@rule
def values_blocks(chip: Chip, T: int, DV: int) -> "ValuesBlocks":
    """Tiles of the kernel for g. As `fwd_blocks`: chosen by the compile report."""
    if chip.backend == "interpreter":
        return ValuesBlocks(16, pow2(DV, 16, 64), 4)
    return ValuesBlocks(tile_rows(T, 32), pow2(DV, 16, 256 if even(DV) else 64), 4)


class ValuesBlocks(NamedTuple):
    """Keys and width of the values of a tile."""

    T: int
    DV: int
    warps: int


@rule
def scores_blocks(chip: Chip, itemsize: int, T: int, size: object, walk: bool, P: int, told: bool) -> Blocks:
    """Tiles of the kernel for all that is made of dz. As `fwd_blocks`: chosen by the compile report.

    Products in TF32 hold whole filters in registers, so tiles are small: 16 by 64 is 41 instructions an element.
    Where both operands are there, those of a history of several channels are smaller, and those of a call whose
    scores themselves have a gradient (`told`).
    """
    pressed = (P > 1 or told) and chip.from_registers
    C, K, A, _ = size  # type: ignore[misc]
    if chip.backend == "interpreter":
        return Blocks(16, pow2(A, 16, 64), 16, pow2(K, 16, 32), 16, 4)
    if itemsize == 4:
        filters = pow2(C, 16, 32), pow2(K, 16, 32)
        small = pressed or not whole_rows(chip, A) or chip.backend == "hip"
        rows = 16 if walk or small or C > 32 else tile_rows(T, 32)
        return Blocks(rows, pow2(A, 16, 16 if small else 32), *filters, 16, 8)
    block_a = pow2(A, 16, 64 if whole_rows(chip, A) and not pressed else 32)
    # 4 warps have too few registers for channels made twice, and for rows of vectors of 4 beside what takes many.
    busy = chip.from_registers or (walk and (K > 32 or P > 1))
    many = C > 32 and (block_a == 64 or P > 1) and chip.backend == "cuda"  # on AMD 8 spill, 4 do not
    tight = many or (block_a == 64 and busy and not even(A))
    return Blocks(16, block_a, 32, 32, 16, 8 if tight else 4)


class Wanted(NamedTuple):
    """Which gradients of what the scores are made of."""

    query: bool
    key: bool
    v: bool
    previous: bool
    conv_weight: bool
    u: bool
    score_bias: bool


def of_scores(call: Call, given: Given, like: tuple[Tensor | None, ...], want: Wanted) -> list[Tensor | None]:
    """Gradients of what the scores are made of, given those of the weights, for all steps.

    like: the tensors, in the order of `want`, in whose dtypes their gradients come. That of the weights seen is made
    of one step only.
    """
    query, key, v, previous, conv_weight, u, bias = like
    B, T, P, (C, K, A, _) = call.seqs, call.length, call.flags.P, call.size
    Tq, packed = given.weights.shape[1], call.cu_seqlens is not None
    blocks = scores_blocks(
        call.chip, key.element_size(), call.longest, call.size, Tq > 1, P, given.dscores is not None
    )
    items = partition(B, T, blocks.T, None) if Tq > 1 else call.items(blocks.T, 2 * blocks.T)
    a_blocks, c_blocks = cdiv(A, blocks.A), cdiv(C, blocks.C)
    filters = want.conv_weight or want.u

    def parts(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=key.device) if wanted else None

    made = Made(
        torch.empty_like(key, memory_format=torch.contiguous_format) if want.key else None,
        torch.empty_like(bias, memory_format=torch.contiguous_format) if want.score_bias else None,
        parts(want.query, items.count * Tq, A),
        parts(True, items.count, A),
        parts(filters, items.count, C, A),
        parts(filters, a_blocks, items.count, C, P * K),
        parts(want.previous, c_blocks * a_blocks * K, P if packed else B * P, T),
    )
    args = call.args_of(items) | {
        "given": given,
        "made": made,
        "splits": given.delta.shape[-1],
        "Tq": Tq,
        "flags": constants(call.flags._replace(WALK=Tq > 1, ONE_C=c_blocks == 1)),
    }
    launch(_aware_bwd_scores_kernel, (items.count, a_blocks, c_blocks), args, blocks, **all_registers(call.chip))
    dq_parts, alike = made.dq, items.per_seq > 0
    dq, dv, dprevious, df, du = sums(
        [
            (dq_parts.view(items.per_seq, B * Tq, A) if dq_parts is not None and alike else None, query.dtype),
            (made.dv if want.v else None, v.dtype),
            (made.e, torch.float32 if previous is None else previous.dtype),
            (made.df.view(-1, C, P * K) if made.df is not None and want.conv_weight else None, conv_weight.dtype),
            (made.du if want.u else None, u.dtype),
        ]
    )
    if dq_parts is not None and not alike:
        dq = query.new_empty(B, A)
        add_items(dq_parts, dq, items, 0, items.count)
    dq = None if dq is None else dq.view(B, Tq, A)
    if dprevious is not None and previous is not None:
        dprevious = dprevious.t().reshape(previous.shape) if packed else dprevious.view(previous.shape)
    df = None if df is None else df.view(conv_weight.shape)
    return [dq, made.dk, dv, dprevious, df, du, made.dbias]


def location_aware_bwd(
    inputs: LocationAwareInputs,
    weights: Tensor,  # in float32
    dout: Tensor,
    dweights: Tensor | None,
    dscores: Tensor | None,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of (query, key, value, v, previous, conv_weight, u, score_bias), None where `needs` is False."""
    query, key, value, v, previous, conv_weight, u, score_bias, *_ = inputs
    want_value, want = needs[2], Wanted(*needs[:2], *needs[3:])
    if weights.numel() == 0:
        return [torch.zeros_like(x) if need else None for x, need in zip(inputs[:8], needs, strict=True)]
    call = prepare_step(inputs)
    packed = inputs.cu_seqlens is not None
    blocks = values_blocks(call.chip, call.longest, call.size.DV)
    items = call.items(blocks.T, 2 * blocks.T)
    g = torch.empty_like(weights)
    given = Given(weights, g, weights.new_empty(items.count if packed else (call.seqs, 1, items.per_seq)))
    dvalue = torch.empty_like(value, memory_format=torch.contiguous_format) if want_value else None
    args = call.args_of(items) | {
        "do_ptr": dout.contiguous(),
        "dweights": entries(dweights, packed=packed),
        "given": given,
        "dvalue_ptr": dvalue,
    }
    launch(_aware_bwd_values_kernel, (items.count,), args, blocks, **all_registers(call.chip))
    made: list[Tensor | None] = [None] * 7
    if any(want):
        like = (query, key, v, previous, conv_weight, u, score_bias)
        of_step = [x[None, None] if packed else x[:, None] for x in (weights, g)]
        dscores = None if dscores is None else dscores.contiguous()
        made = of_scores(call, Given(*of_step, given.delta, dscores), like, want)
    dq = None if made[0] is None else made[0][:, 0]
    return [dq, made[1], dvalue, *made[2:]]
