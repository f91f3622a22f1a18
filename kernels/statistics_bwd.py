"""Backward of attentive statistics pooling, from the inputs, the statistics and (m, l).

With e_jc = x_jc - mean_c and α_jc = exp(s_jc - m_c) / l_c, dlse_c = l_c dl_c, and P_c = Σ_j α_jc²:

    dx_jc = α_jc (dmean_c + 2 dvar_c e_jc)
    ds_jc = α_jc (dmean_c e_jc + dvar_c (e_jc² - var_c) + 2 dP_c (α_jc - P_c) + dlse_c) + dscores_jc
                                                                                  (one a frame: the sum over c)
    du_j = Σ_c ds_jc v_c        dv_c = Σ_j u_j ds_jc

dvar = dstd / 2 std, 0 where the variance is at its floor; dvar / dstd is one of the numbers that are kept, and of a
variance that is corrected by P so is 2 dP / dstd. Of weights that are given α_jc = w_jc / l_c, and dw is the same
without the factor α_jc in front, divided by l_c. From ds of
one weight a frame, or du, the backward of location attention makes the other gradients, and adds that of H to dx
where the values are H.

The mean inside var_c has no gradient of its own: Σ_j α_jc e_jc = 0. With a weight a channel, du sums over the
channels and dv over the frames, so each has a kernel that makes the scores again: nothing of size N·C but dx reaches
memory. Only where the forward has returned the scores, for the weights, they are read: then those that dscores and
dlse belong to are the same to the last bit, and cancel. The sums over the frames are partials, one a program, that
are added in a fixed order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import launch, sequence_ptr
from .chip import LENGTHS, LONG, Chip, all_registers, cdiv, even, pow2, tile_rows, unpressed, whole_rows
from .inputs import StatisticsInputs
from .location_bwd import location_bwd
from .masks import Items, follow, item_rows, sequence_at
from .products import add_product
from .softmax import exp, load_dlse, pivot, power
from .statistics import (
    Blocks,
    Call,
    channel_scores,
    features_of,
    frame_scores,
    given_scores,
    hide,
    load_channels,
    prepare,
    product_warps,
)
from .sums import Pending
from .tiles import load_rows, store_rows


@triton.jit
def _of_sequence(ptr, seq, c, C):
    """A sequence's numbers of the channels c as float32, [BLOCK_C, 1]."""
    return tl.load(ptr + seq * C + c, mask=c < C, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _load_lse(state, seq, r, R, C, num_seqs):
    """(m, 1 / l), [BLOCK_R, 1] each."""
    known = r < R
    m = tl.load(state.lse + (seq * R + r) * 2, mask=known, other=0.0)
    inv = tl.load(state.exact + (num_seqs.to(tl.int64) * 2 + seq) * C + r, mask=known, other=0.0)
    return pivot(m)[:, None], inv[:, None]


@triton.jit
def _load_dlse(state, seq, r, R):
    """Gradient of log l, [BLOCK_R, 1]."""
    at = (seq * R + r) * 2
    return load_dlse(state.dlse + at, state.lse + at, r < R)[:, None]


@triton.jit
def _deviation(values, state, seq, rows, keep, c, C, num_seqs):
    """X - mean of frames [BLOCK_T] and channels c, to the last bit of the float64 mean, [BLOCK_C, BLOCK_T]."""
    e = tl.trans(load_rows(sequence_ptr(values, seq, rows), keep, c, C)).to(tl.float32)
    e -= _of_sequence(state.exact, seq, c, C)
    return e - _of_sequence(state.exact + num_seqs.to(tl.int64) * C, seq, c, C)


@triton.jit
def _gradient(state, e, inv, seq, c, C, num_seqs):
    """inv times (dx / α, ds / α without dlse), [BLOCK_C, BLOCK_T]: inv goes into numbers of a channel."""
    dmean = _of_sequence(state.dmean, seq, c, C)
    plane = num_seqs.to(tl.int64) * C
    if state.dstd is None:
        dmean *= inv
        return tl.broadcast_to(dmean, e.shape), e * dmean
    else:
        var = _of_sequence(state.exact + 3 * plane, seq, c, C)
        slope = _of_sequence(state.exact + 4 * plane, seq, c, C)
        dvar = _of_sequence(state.dstd, seq, c, C) * slope
        dmean *= inv
        dvar *= inv
        return dmean + 2.0 * dvar * e, e * (dmean + dvar * e) - dvar * var


@triton.jit
def _of_correction(state, p, inv, seq, c, C, num_seqs):
    """inv 2 dP (p inv - P), [BLOCK_C, BLOCK_T]: what a corrected variance adds to ds / α."""
    plane = num_seqs.to(tl.int64) * C
    tilt = _of_sequence(state.dstd, seq, c, C) * _of_sequence(state.exact + 5 * plane, seq, c, C) * inv
    return p * (tilt * inv) - tilt * _of_sequence(state.exact + 6 * plane, seq, c, C)


@triton.jit
def _frame_weights(s, top, inv, FMA: tl.constexpr):
    """exp(s - m) / l without the rounding of the difference: it would be in all channels of a frame alike."""
    shown = s != float("-inf")
    s = tl.where(shown, s, top)
    d = s - top
    back = d - s
    rounding = (s - (d - back)) - (top + back)
    return tl.where(shown, exp(d, FMA) * (inv * (1.0 + rounding)), 0.0)


@triton.jit(do_not_specialize=LENGTHS)
def _statistics_bwd_frame_kernel(
    x,  # scores (B, T) or (N,), or LINEAR weights, or None: they are 0
    values,  # (B, T, C) or (N, C)
    mask,  # (B, T), (N,) or None
    spans,
    state,
    dx_ptr,  # (B, T) or (N,), contiguous, or None
    dval_ptr,  # (B, T, C) or (N, C), contiguous, or None
    num_seqs,
    per_seq,
    T,  # 0 where the batch is ragged
    size,
    flags,
    blocks,  # T: frames of an item
):
    """One weight a frame: an item of frames, all channels."""
    item = tl.program_id(0)
    seq = sequence_at(item, spans, num_seqs, per_seq, blocks.T)
    seq, _, inside, rows, keep = item_rows(item, seq, mask, spans, T, per_seq, blocks.T)
    one = tl.arange(0, 1)
    top, inv = _load_lse(state, seq, one, 1, size.C, num_seqs)
    alpha = frame_scores(x, seq, rows, keep, flags.LINEAR)  # [1, BLOCK_T]
    alpha = alpha * inv if flags.LINEAR else _frame_weights(alpha, top, inv, flags.FMA)
    factor = tl.zeros([blocks.T], tl.float32)
    for c0 in range(0, size.C, blocks.C):
        c = c0 + tl.arange(0, blocks.C)
        e = _deviation(values, state, seq, rows, keep, c, size.C, num_seqs)
        to_value, to_score = _gradient(state, e, 1.0, seq, c, size.C, num_seqs)
        if flags.CORRECTED:
            to_score += _of_correction(state, alpha, 1.0, seq, c, size.C, num_seqs)
        factor += tl.sum(to_score, axis=0)
        if dval_ptr is not None:
            store_rows(dval_ptr + (seq * T + rows) * size.C, tl.trans(alpha * to_value), inside, c, size.C)
    if dx_ptr is not None:
        if state.dlse is not None:
            factor += tl.sum(_load_dlse(state, seq, one, 1), axis=0)
        if flags.LINEAR:
            ds = tl.where(keep, tl.sum(inv, axis=0) * factor, 0.0)
        else:
            ds = tl.sum(alpha, axis=0) * factor
        if state.dscores is not None:
            ds += tl.load(state.dscores + seq * T + rows, mask=keep, other=0.0)
        tl.store(dx_ptr + seq * T + rows, ds.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _channel_scores(x_ptrs, keep, u, v_tile, v, bias, state, seq, rows, at, c, size, flags, BLOCK_A: tl.constexpr):
    """Scores of a tile, made again or read `at` the rows of those returned; any number where a frame is not seen."""
    if state.scores is None:
        s = channel_scores(x_ptrs, keep, u, v_tile, v, c, size, flags, BLOCK_A)
        if bias.ptr is not None:
            s += given_scores(bias, seq, rows, keep, c, size)
    else:
        s = tl.trans(load_rows(state.scores + at, keep, c, size.C))
    return s


@triton.jit
def _channel_gradient(p, factor, inv, keep, state, at, seq, c, C, LINEAR: tl.constexpr):
    """Ds of a tile of channels and frames, p = l α and factor = (ds / α without dlse) / l."""
    if state.dlse is not None:
        factor += _load_dlse(state, seq, c, C) * inv
    ds = tl.where(keep[None, :], factor, 0.0) if LINEAR else p * factor
    if state.dscores is not None:
        ds += tl.trans(load_rows(state.dscores + at, keep, c, C))
    return ds


@triton.jit(do_not_specialize=LENGTHS)
def _statistics_bwd_values_kernel(
    x,  # features u (B, T, A) or (N, A), or None
    v,  # (A, C), or None: the scores are given
    bias,  # (B, T, C) or (N, C), or None
    values,  # (B, T, C) or (N, C)
    mask,  # (B, T), (N,) or None
    spans,
    state,
    dval_ptr,  # (B, T, C) or (N, C), contiguous, or None
    dbias_ptr,  # (B, T, C) or (N, C), contiguous, or None
    dv_ptr,  # (splits, A, C) float32, or None
    items,
    items_per_split,
    num_seqs,
    per_seq,
    T,  # 0 where the batch is ragged
    size,
    flags,
    blocks,  # T: frames of an item
):
    """A weight a channel: dx and dv of a block of channels, over the items of a split and blocks.A rows of dv."""
    channel_blocks = tl.cdiv(size.C, blocks.C)
    c = (tl.program_id(0) % channel_blocks) * blocks.C + tl.arange(0, blocks.C)
    part = tl.program_id(0) // channel_blocks
    a = tl.program_id(1) * blocks.A + tl.arange(0, blocks.A)
    if v.ptr is not None:
        v_tile = load_channels(v, a, c, size)
    dv = tl.zeros([blocks.A, blocks.C], tl.float32)
    first = part * items_per_split
    of = sequence_at(first, spans, num_seqs, per_seq, blocks.T)
    for item in range(first, tl.minimum(first + items_per_split, items)):
        of = follow(of, item, spans, per_seq, blocks.T)
        seq, _, inside, rows, keep = item_rows(item, of, mask, spans, T, per_seq, blocks.T)
        if v.ptr is not None:
            x_ptrs = sequence_ptr(x, seq, rows)
            u = load_rows(x_ptrs, keep, a, size.A)
        at = (seq * T + rows) * size.C
        e = _deviation(values, state, seq, rows, keep, c, size.C, num_seqs)
        if v.ptr is not None:
            s = _channel_scores(x_ptrs, keep, u, v_tile, v, bias, state, seq, rows, at, c, size, flags, blocks.A)
        else:
            s = given_scores(bias, seq, rows, keep, c, size)
        top, inv = _load_lse(state, seq, c, size.C, size.C, num_seqs)
        if flags.LINEAR:
            p = hide(s, keep, 0.0)
        else:
            p = power(hide(s, keep) - top, True, False)
        to_value, to_score = _gradient(state, e, inv, seq, c, size.C, num_seqs)
        if flags.CORRECTED:
            to_score += _of_correction(state, p, inv, seq, c, size.C, num_seqs)
        if dval_ptr is not None:
            write = inside[:, None] & (c < size.C)[None, :] & (tl.program_id(1) == 0)
            dval = tl.trans((p * to_value).to(dval_ptr.dtype.element_ty))
            tl.store(dval_ptr + at[:, None] + c[None, :], dval, mask=write)
        if (dv_ptr is not None) or (dbias_ptr is not None):
            ds = _channel_gradient(p, to_score, inv, keep, state, at, seq, c, size.C, flags.LINEAR)
            if dbias_ptr is not None:
                first_part = inside & (tl.program_id(1) == 0)
                store_rows(dbias_ptr + at, tl.trans(ds), first_part, c, size.C)
            if dv_ptr is not None:
                dv = add_product(tl.trans(u), tl.trans(ds), dv, flags.COMPUTE, flags.PRECISION)
    if dv_ptr is not None:
        store_rows(dv_ptr + (part.to(tl.int64) * size.A + a) * size.C, dv, a < size.A, c, size.C)


@triton.jit(do_not_specialize=LENGTHS)
def _statistics_bwd_features_kernel(
    x,  # features u (B, T, A) or (N, A)
    v,  # (A, C)
    bias,  # (B, T, C) or (N, C), or None
    values,  # (B, T, C) or (N, C)
    mask,  # (B, T), (N,) or None
    spans,
    state,
    dx_ptr,  # (B, T, A) or (N, A), contiguous
    num_seqs,
    per_seq,
    T,  # 0 where the batch is ragged
    size,
    flags,
    blocks,  # T: frames of an item
):
    """A weight a channel: du of an item of frames and blocks.A features, over all channels.

    Frames that are not seen have any number for a score here, a column of du of their own, which is not stored: who
    has use for du does not read it there.
    """
    item = tl.program_id(0)
    seq = sequence_at(item, spans, num_seqs, per_seq, blocks.T)
    seq, _, _inside, rows, keep = item_rows(item, seq, mask, spans, T, per_seq, blocks.T)
    a = tl.program_id(1) * blocks.A + tl.arange(0, blocks.A)
    x_ptrs = sequence_ptr(x, seq, rows)
    u = load_rows(x_ptrs, keep, a, size.A)
    # wgmma takes its first operand from registers, and would still read ds there when the next one is made: as the
    # second it goes through shared memory. (ptxas sees it, and waits after each, warning C7515.)
    ACROSS: tl.constexpr = blocks.T >= 64
    du = tl.zeros([blocks.A, blocks.T] if ACROSS else [blocks.T, blocks.A], tl.float32)
    for c0 in range(0, size.C, blocks.C):
        c = c0 + tl.arange(0, blocks.C)
        v_tile = load_channels(v, a, c, size)
        at = (seq * T + rows) * size.C
        e = _deviation(values, state, seq, rows, keep, c, size.C, num_seqs)
        s = _channel_scores(x_ptrs, keep, u, v_tile, v, bias, state, seq, rows, at, c, size, flags, blocks.A)
        top, inv = _load_lse(state, seq, c, size.C, size.C, num_seqs)
        p = power(s - top, True, False)
        _to_value, to_score = _gradient(state, e, inv, seq, c, size.C, num_seqs)
        if flags.CORRECTED:
            to_score += _of_correction(state, p, inv, seq, c, size.C, num_seqs)
        ds = _channel_gradient(p, to_score, inv, keep, state, at, seq, c, size.C, False)
        if ACROSS:
            du = add_product(v_tile, ds, du, flags.COMPUTE, flags.PRECISION)
        else:
            du = add_product(tl.trans(ds), tl.trans(v_tile), du, flags.COMPUTE, flags.PRECISION)
    if ACROSS:
        du = tl.trans(du)
    store_rows(dx_ptr + (seq * T + rows) * size.A, du, keep, a, size.A)


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """What the forward left, see `statistics.Result`, and its gradients."""

    exact: Tensor
    lse: Tensor
    scores: Tensor | None  # (B, T, C) or (N, C) float32; None: they are made again, or are x or given
    dmean: Tensor  # (S, C), of any dtype
    dstd: Tensor | None
    dlse: Tensor | None  # as lse
    dscores: Tensor | None  # of scores returned, or of x


def bwd_blocks(chip: Chip, itemsize: int, T: int, C: int, A: int) -> Blocks:
    """Tiles of the backward kernels; T is also the frames of an item. Chosen as the forward's are."""
    if A == 0:
        return Blocks(tile_rows(T, 32), pow2(C, 16, 128 if whole_rows(chip, C) else 64), 16, 4)
    warps = product_warps(chip, itemsize, C, A)
    if itemsize == 4:
        whole = even(C, A) if chip.from_registers else whole_rows(chip, C, A)  # as TF32 64 channels spilled there
        most = 32 if chip.small or not whole else 64
        return Blocks(tile_rows(T, 32), pow2(C, 16, most), 16, warps)
    # Registers are short: dv or du is kept beside a tile of everything else. Where rows are no whole vectors, each
    # element needs an address and a predicate too.
    whole = whole_rows(chip, C, A)
    small = chip.from_registers or chip.arch // 10 == 10
    wgmma = chip.backend == "cuda" and not chip.from_registers
    block_t = 16 if chip.backend == "hip" or (wgmma and not whole) else 64 if wgmma and not small else 32
    block_a = pow2(A, 16, 128 if A <= 128 and (whole or not chip.from_registers) else 64)
    block_c = 64 if whole and not small and (block_a <= 64 or wgmma) else 32
    if not even(C, A):  # 64 × 64 numbers on 4 warps, as of whole vectors, spilled
        warps = 8
    if (small and whole and block_a <= 64) or (wgmma and not whole):
        warps = 4
    return Blocks(tile_rows(T, block_t), pow2(C, 16, block_c), block_a, warps)


def statistics_bwd(
    inputs: StatisticsInputs,
    lse: Tensor,
    scores: Tensor,
    x: Tensor,
    exact: Tensor,
    dmean: Tensor,
    dstd: Tensor | None,
    dlse: Tensor | None,
    dscores: Tensor | None,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of (h, w, b, v, context, value, score_bias), None where `needs` is False.

    dstd is None where there is no deviation.
    """
    need_h, need_w, need_b, need_v, need_context, need_values, need_bias = needs
    h, values, v, bias = inputs.h, inputs.h if inputs.value is None else inputs.value, inputs.v, inputs.score_bias
    per_channel, given = inputs.per_channel(), v is None and bias is not None
    made = None if v is None else features_of(inputs, x) if per_channel else scores
    need_x = v is not None and (need_h or need_w or need_b or need_context)
    need_x = need_x or (v is not None and not per_channel and (need_v or need_bias))
    call = prepare(inputs, made, dstd is not None)
    A, C = call.size
    wanted = need_h if inputs.value is None else need_values
    # Where the values are H, the gradient of the scores is added to this one.
    dvalues = torch.empty_like(values, memory_format=torch.contiguous_format) if wanted else None
    dx = None if made is None or not need_x else torch.empty_like(made, memory_format=torch.contiguous_format)
    dbias = None
    if need_bias and bias is not None and (given or per_channel):
        dbias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    parts = None
    if call.seqs and call.length:
        longest = call.length if inputs.cu_seqlens is None else LONG
        itemsize = (made if made is not None and per_channel else values).element_size()
        blocks = bwd_blocks(call.chip, itemsize, longest, C, A)
        items = call.items(blocks.T, blocks)
        dmean, dstd, dlse, dscores = (y if y is None else y.contiguous() for y in (dmean, dstd, dlse, dscores))
        returned = scores if per_channel and scores.numel() else None
        state = State(exact, lse, returned, dmean, dstd, dlse, dscores)
        args = call.args | {"state": state, "dx_ptr": dbias if given else dx, "dval_ptr": dvalues, "dbias_ptr": dbias}
        registers = unpressed(call.chip, C, A)
        if not per_channel:
            if itemsize == 4:  # pressed into 128, some spill
                registers = all_registers(call.chip)
            launch(_statistics_bwd_frame_kernel, (items.count,), args, blocks, **registers)
        elif need_v or dvalues is not None or dbias is not None:
            parts = _channels(call, blocks, items, args, itemsize, need_v)
        if per_channel and need_x:
            grid = items.count, cdiv(A, blocks.A)
            if (
                call.flags.CORRECTED and call.chip.backend == "cuda"
            ):  # two more numbers a channel: some were on the stack
                blocks = blocks._replace(warps=8)
            launch(_statistics_bwd_features_kernel, grid, args, blocks, **registers)
    elif per_channel and need_v:
        parts = lse.new_empty(0, A, C)

    dh, dvalues = (dvalues, None) if inputs.value is None else (None, dvalues)
    pending = Pending()
    of_channels = pending.add(parts, h.dtype)
    if dx is None:
        pending.launch()
        return [dh, None, None, of_channels, None, dvalues, dbias]
    score = inputs.score()._replace(v=None) if per_channel else inputs.score()
    of_frames = not per_channel
    needs = [need_h, need_w, need_b, need_v and of_frames, *[False] * 2, need_context, False, need_bias and of_frames]
    dh, dw, db, dv, _, _, dcontext, _, of_bias = location_bwd(
        score, x, lse, scores, None, None, dx, needs, onto=dh, pending=pending
    )
    pending.launch()
    dv = of_channels if dv is None else dv.squeeze(-1)
    return [dh, dw, db, dv, dcontext, dvalues, of_bias if of_frames else dbias]


def _channels(
    call: Call, blocks: Blocks, items: Items, args: dict[str, Any], itemsize: int, need_v: bool
) -> Tensor | None:
    """Write dx, and return the partials of dv ``(splits, A, C)``: two programs a core, so that they are few."""
    A, C = call.size
    channel_blocks, chunks = cdiv(C, blocks.C), cdiv(A, blocks.A) if need_v else 1
    splits = min(items.count, cdiv(2 * call.chip.cores, channel_blocks * chunks))
    dv = torch.empty(splits, A, C, dtype=torch.float32, device=args["state"].lse.device) if need_v else None
    args = args | {"dv_ptr": dv, "items": items.count, "items_per_split": cdiv(items.count, splits)}
    grid = channel_blocks * splits, chunks
    pressed = call.chip.from_registers and args["state"].scores is not None
    registers = all_registers(call.chip) if pressed else unpressed(call.chip, C, A)
    if A and call.chip.backend == "cuda" and not registers and itemsize == 4 and args["state"].scores is None:
        registers = {"maxnreg": 128}  # of 8 warps: ptxas would take 166, one program a core and not two
    launch(_statistics_bwd_values_kernel, grid, args, blocks, **registers)
    return dv
