"""Location-aware attention of a whole utterance: one program walks the steps of a sequence, forward and in reverse.

The queries of all steps are known, so the weights alone go from step to step: p_i is what step i sees, the weights of
the step before or, `SUM`, the sum of all before, and p_0 is given. With the names of location_aware.py:

    α_i = softmax_j(v · act(q_i + k_j + f_ij U) + bias_j)        p_{i+1} = α_i   (SUM: p_i + α_i)

Of a history of P channels, p_i has the last weights, the oldest first, and with `SUM` the last channel is the sum: of
two, the last weights and the sum of all. Going on, each channel of weights becomes that of the one after it.

With `SMOOTH` the softmax is of log σ(s), and ds is 1 - σ(s) times what it is else: the walk back makes the scores of
a step again, and leaves ds in place of g.

A step needs the keys only. The outputs Σ_j α_ij value_j are one matrix product of all weights after the walk, and the
gradients of weights and values two before and after the walk back, by PyTorch.

Backward, from the last step to the first, with dp_{i+1} the gradient of what the next step sees, dp of the last 0:

    g_ij = dα_ij + dp_{i+1,j}       δ_i = Σ_j α_ij g_ij        ds, dz, df and e as in location_aware_bwd.py
    dp_i = Σ_k e_ik   (SUM: + dp_{i+1}; a channel of weights: + dp_{i+1} of the channel before it)

The walk leaves g and δ; all other gradients are sums over steps, which the kernel of a step's backward makes of them,
a program a tile of keys. What goes from step to step is in global memory, which a barrier divides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, activate_grad, log_sigmoid_grad
from .arguments import constants, entries, first_row, launch, pitch, sequence_ptr
from .chip import LENGTHS, Chip, all_registers, pow2, rule, tile_rows, whole_rows
from .inputs import LocationAwareSequenceInputs
from .location_aware import (
    Blocks,
    Call,
    Size,
    add_features,
    all_places,
    channel_and_places,
    load_filter,
    load_mixer,
    prepare,
    query_and_keys,
    score_keys,
)
from .location_aware_bwd import Given, Wanted, gradient_of_scores, gradient_of_softmax, of_scores
from .masks import unmasked
from .products import add_product, tile_product
from .softmax import exp, finish, online_softmax, pivot


@triton.jit(do_not_specialize=LENGTHS)
def _aware_walk_fwd_kernel(
    q,  # (B, Tq, A)
    k,  # (B, Tk, A)
    v_ptr,  # (A,)
    filters,
    seen,  # (B, Tq + 1, Tk) float32: what each step sees, the first given; or (B, slots, Tk); (B, P, slots, Tk)
    seen_ptr,  # its memory, (B, slots, P, Tk), contiguous
    bias,  # (B, Tk) or None
    mask,  # (B, Tk) or None
    weights_ptr,  # (B, Tq, Tk) float32
    Tq,
    Tk,
    slots,  # rows of `seen` that are taken in turn
    size,
    flags,
    blocks,
):
    seq = tl.program_id(0).to(tl.int64)
    k_ptr = first_row(k, seq)
    for i in range(0, Tq):
        step = i + tl.program_id(0) * 0  # a tensor for the interpreter too
        now = step % slots
        w_ptr = weights_ptr + (seq * Tq + step) * Tk
        now_ptr = seen_ptr + (seq * slots + now) * flags.P * Tk
        next_ptr = seen_ptr + (seq * slots + (step + 1) % slots) * flags.P * Tk
        q_ptr = sequence_ptr(q, seq, step)
        m = tl.full([1], float("-inf"), tl.float32)
        l = tl.zeros([1], tl.float32)
        for t0 in range(0, Tk, blocks.T):
            t = t0 + tl.arange(0, blocks.T)
            keep = unmasked(mask, seq, t, t < Tk)
            k_ptrs = k_ptr + t.to(tl.int64) * pitch(k)
            s = score_keys(
                k_ptrs, keep, q_ptr, seen, mask, bias, seq, now, t, 0, Tk, v_ptr, filters, size, flags, blocks
            )
            tl.store(w_ptr + t, s, mask=t < Tk)
            _p, _alpha, m, l = online_softmax(s, m, l, 0, flags.FMA)
        shift = pivot(m)
        inv = finish(l)
        tl.debug_barrier()  # other threads read the scores than have written them
        for t0 in range(0, Tk, blocks.T):
            t = t0 + tl.arange(0, blocks.T)
            inside = t < Tk
            alpha = exp(tl.load(w_ptr + t, mask=inside, other=float("-inf")) - shift, flags.FMA) * inv
            tl.debug_barrier()  # threads that have the same keys read before one of them writes
            tl.store(w_ptr + t, alpha, mask=inside)
            for p in tl.static_range(flags.P - 1):
                if p + 1 < flags.P - flags.SUM:
                    older = tl.load(now_ptr + Tk * (p + 1) + t, mask=inside, other=0.0)
                else:
                    older = alpha
                tl.store(next_ptr + Tk * p + t, older, mask=inside)
            last = Tk * (flags.P - 1) + t
            if flags.SUM:
                alpha += tl.load(now_ptr + last, mask=inside, other=0.0)
            tl.store(next_ptr + last, alpha, mask=inside)
        tl.debug_barrier()  # and the next step's windows


@triton.jit(do_not_specialize=LENGTHS)
def _aware_walk_bwd_kernel(
    q,  # (B, Tq, A)
    k,  # (B, Tk, A)
    v_ptr,  # (A,)
    filters,
    seen,  # (B, P, Tq, Tk), or (B, Tq, Tk)
    bias,  # (B, Tk) with SMOOTH, or None
    mask,
    dweights_ptr,  # (B, Tq, Tk) float32, or None
    given,
    dp_ptr,  # (B, P, Tk): dp of the step after, in the end that of the first
    e_ptr,  # (B, P·K, Tk): scratch
    Tq,
    Tk,
    size,
    flags,
    blocks,
):
    seq = tl.program_id(0).to(tl.int64)
    k_ptr = first_row(k, seq)
    dp_ptr += seq * flags.P * Tk
    e_ptr += seq * size.K * flags.P * Tk
    for t0 in range(0, Tk * flags.P, blocks.T):
        t = t0 + tl.arange(0, blocks.T)
        tl.store(dp_ptr + t, tl.zeros([blocks.T], tl.float32), mask=t < Tk * flags.P)
    tl.debug_barrier()
    for back in range(0, Tq):
        step = Tq - 1 - back + tl.program_id(0) * 0
        row = seq * Tq + step
        q_ptr = sequence_ptr(q, seq, step)
        delta = tl.zeros([1], tl.float32)
        for t0 in range(0, Tk, blocks.T):
            t = t0 + tl.arange(0, blocks.T)
            inside = t < Tk
            keep = unmasked(mask, seq, t, inside)
            g = tl.load(dp_ptr + Tk * (flags.P - 1) + t, mask=inside, other=0.0)
            if flags.SUM and flags.P > 1:  # of the last weights too
                g += tl.load(dp_ptr + Tk * (flags.P - 2) + t, mask=inside, other=0.0)
            if dweights_ptr is not None:
                g += tl.load(dweights_ptr + row * Tk + t, mask=keep, other=0.0)
            tl.store(given.g + row * Tk + t, g, mask=inside)
            delta += tl.sum(tl.load(given.weights + row * Tk + t, mask=keep, other=0.0) * g, axis=0)
        tl.store(given.delta + row + tl.arange(0, 1), delta)
        tl.debug_barrier()  # other threads read g and δ than have written them
        if flags.SMOOTH:
            for t0 in range(0, Tk, blocks.T):
                t = t0 + tl.arange(0, blocks.T)
                keep = unmasked(mask, seq, t, t < Tk)
                k_ptrs = k_ptr + t.to(tl.int64) * pitch(k)
                s = score_keys(
                    k_ptrs, keep, q_ptr, seen, mask, bias, seq, step, t, 0, Tk, v_ptr, filters, size, flags, blocks
                )
                ds = gradient_of_softmax(given, row, Tk, t, row, 1, keep, 1) * log_sigmoid_grad(s)
                tl.debug_barrier()  # threads that have the same keys read before one of them writes
                tl.store(given.g + row * Tk + t, ds, mask=keep)
            tl.debug_barrier()  # and other threads read ds
        for t0 in range(0, Tk, blocks.T):
            t = t0 + tl.arange(0, blocks.T)
            keep = unmasked(mask, seq, t, t < Tk)
            k_ptrs = k_ptr + t.to(tl.int64) * pitch(k)
            ds = gradient_of_scores(given, row, Tk, t, row, 1, keep, flags, 1)
            for c0 in range(0, size.C, blocks.C):
                c = c0 + tl.arange(0, blocks.C)
                df = tl.zeros([blocks.T, blocks.C], tl.float32)
                for a0 in range(0, size.A, blocks.A):
                    a = a0 + tl.arange(0, blocks.A)
                    z = query_and_keys(k_ptrs, keep, q_ptr, a, size)
                    z = add_features(z, seen, mask, seq, step, t, a, 0, Tk, filters, size, flags, blocks)
                    y = activate(z, flags.ACT, flags.FAST)
                    v = tl.load(v_ptr + a, mask=a < size.A, other=0.0).to(tl.float32)
                    dz = ds[:, None] * v[None, :] * activate_grad(z, y, flags.ACT, flags.FAST)
                    dz = tl.where(keep[:, None], dz, 0.0)
                    u = tl.trans(load_mixer(filters, c, a, size))
                    df = add_product(dz, u, df, tl.float32, flags.PRECISION)
                for n0 in range(0, all_places(size, flags, blocks), blocks.K):
                    channel, place = channel_and_places(n0, size, flags, blocks)
                    w = load_filter(filters, channel, c, place, size)
                    e = tile_product(df, w, tl.float32, flags.PRECISION)
                    at = e_ptr + (place + channel * size.K).to(tl.int64)[None, :] * Tk + t[:, None]
                    write = (t < Tk)[:, None] & (place < size.K)[None, :]
                    if not flags.ONE_C:
                        e += tl.load(at, mask=write & (c0 > 0), other=0.0)
                        tl.debug_barrier()  # threads that have the same numbers read before one of them writes
                    tl.store(at, e, mask=write)
                tl.debug_barrier()  # other threads may add the next channels
        for t0 in range(0, Tk, blocks.T):
            t = t0 + tl.arange(0, blocks.T)
            inside = t < Tk
            keep = unmasked(mask, seq, t, inside)
            for back_p in tl.static_range(flags.P):  # the last first: a channel takes from the one before it
                p = flags.P - 1 - back_p
                found = tl.zeros([blocks.T, blocks.K], tl.float32)
                for k0 in range(0, size.K, blocks.K):
                    place = k0 + tl.arange(0, blocks.K)
                    j = t[:, None] + (size.K // 2 - place)[None, :]  # whose window has t at this place
                    there = (j >= 0) & (j < Tk) & (place < size.K)[None, :]
                    at = e_ptr + (place + size.K * p).to(tl.int64)[None, :] * Tk + j
                    found += tl.load(at, mask=there, other=0.0)
                dp = tl.where(keep, tl.sum(found, axis=1), 0.0)
                if flags.SUM and back_p == 0:
                    dp += tl.load(dp_ptr + Tk * p + t, mask=inside, other=0.0)
                    tl.debug_barrier()  # threads that have the same keys read before one of them writes
                elif p > 0:
                    dp += tl.load(dp_ptr + Tk * (p - 1) + t, mask=inside, other=0.0)
                    tl.debug_barrier()
                tl.store(dp_ptr + Tk * p + t, dp, mask=inside)
        tl.debug_barrier()


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


@rule
def walk_blocks(chip: Chip, itemsize: int, T: int, size: Size, P: int, backward: bool) -> Blocks:
    """Tiles of both walks. Chosen by the compile report (no spills); speed on a GPU not yet measured."""
    if chip.backend == "interpreter":
        return Blocks(16, pow2(size.A, 16, 64), pow2(size.C, 16, 32), pow2(size.K, 16, 32), 16, 4)
    hip = chip.backend == "hip"  # where tiles of twice the features spill
    if backward:
        block_a = pow2(size.A, 16, 16 if itemsize == 4 and (hip or not whole_rows(chip, size.A)) else 32)
        rows = 16 if P > 1 and itemsize == 4 and chip.from_registers else 32
        return Blocks(tile_rows(T, rows), block_a, 32, 32, 16, 8)
    block_a = pow2(size.A, 16, 32 if hip else 64 if itemsize == 4 or not whole_rows(chip, size.A) else 128)
    return Blocks(tile_rows(T, 32), block_a, pow2(size.C, 16, 32), pow2(size.K, 16, 32), 16, 8)


def channels_first(seen: Tensor) -> Tensor:
    """``(B, Tq, P, Tk)`` as ``(B, P, Tq, Tk)``; ``(B, Tq, Tk)`` as it is."""
    return seen.transpose(1, 2) if seen.dim() == 4 else seen


def _prepare(inputs: LocationAwareSequenceInputs, seen: Tensor) -> Call:
    query, key, v, _, conv_weight, u, score_bias, mask, activation, cumulative, score_activation = inputs
    call = prepare(query, key, None, v, seen, conv_weight, u, score_bias, mask, activation)
    return call._replace(flags=call.flags._replace(SUM=cumulative, SMOOTH=score_activation == "logsigmoid"))


def location_aware_walk_fwd(inputs: LocationAwareSequenceInputs, need_seen: bool) -> tuple[Tensor, Tensor]:
    """(weights ``(B, Tq, Tk)``, what each step saw ``(B, Tq + 1, [P,] Tk)``), float32.

    The second is empty if it is not needed.
    """
    query, key, previous = inputs.query, inputs.key, inputs.previous
    (B, Tq, _), Tk = query.shape, key.shape[1]
    weights = key.new_empty(B, Tq, Tk, dtype=torch.float32)
    slots = Tq + 1 if need_seen else 2
    seen = key.new_empty(B, slots, *inputs.conv_weight.shape[1:-1], Tk, dtype=torch.float32)
    if weights.numel():
        if previous is None:
            seen[:, 0].zero_()
        else:
            seen[:, 0].copy_(previous)
        call = _prepare(inputs, channels_first(seen))
        blocks = walk_blocks(call.chip, key.element_size(), Tk, call.size, call.flags.P, False)
        args = call.args | {
            "seen_ptr": seen,
            "weights_ptr": weights,
            "Tq": Tq,
            "slots": slots,
            "flags": constants(call.flags),
        }
        launch(_aware_walk_fwd_kernel, (B,), args, blocks, **all_registers(call.chip))
    return weights, seen if need_seen else seen.new_empty(0)


def location_aware_walk_bwd(
    inputs: LocationAwareSequenceInputs, weights: Tensor, seen: Tensor, dweights: Tensor | None, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of (query, key, v, previous, conv_weight, u, score_bias), None where `needs` is False."""
    query, key, v, previous, conv_weight, u, score_bias, *_ = inputs
    like = (query, key, v, previous, conv_weight, u, score_bias)
    B, Tq, Tk = weights.shape
    if weights.numel() == 0:
        return [x.new_zeros(x.shape) if need and x is not None else None for x, need in zip(like, needs, strict=True)]
    call = _prepare(inputs, channels_first(seen[:, :Tq]))
    blocks = walk_blocks(call.chip, key.element_size(), Tk, call.size, call.flags.P, True)
    given = Given(weights, torch.empty_like(weights), weights.new_empty(B, Tq, 1))
    dp = weights.new_empty(seen[:, 0].shape)
    args = call.args | {
        "bias": call.args["bias"] if call.flags.SMOOTH else entries(None, packed=False),
        "dweights_ptr": None if dweights is None else dweights.contiguous(),
        "given": given,
        "dp_ptr": dp,
        "e_ptr": weights.new_empty(B, call.flags.P * call.size.K, Tk),
        "Tq": Tq,
        "flags": constants(call.flags._replace(ONE_C=blocks.C >= call.size.C)),
    }
    launch(_aware_walk_bwd_kernel, (B,), args, blocks, **all_registers(call.chip))
    made = of_scores(call, given, like, Wanted(*needs)._replace(previous=False))
    made[3] = dp.to(previous.dtype) if needs[3] and previous is not None else None
    return made
