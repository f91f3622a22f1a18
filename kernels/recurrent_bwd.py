"""Backward of word-by-word attention through time, in one program a sequence.

With the names of recurrent.py, M_tj = tanh(key_j + c_t), u_t = tanh(r_{t-1} W_t), δr_t the gradient of r_t and dα_t
that of the returned weights, from the last step to the first:

    g_tj  = δr_t · value_j + dα_tj                 ds_tj = α_tj (g_tj - Σ_k α_tk g_tk)   (+ that of a returned score)
    dz_tj = ds_tj w ⊙ (1 - M_tj²)                  dc_t  = Σ_j dz_tj = dquery_t
    du_t  = δr_t ⊙ (1 - u_t²)                      δr_{t-1} = dr_{t-1} + dc_t W_rᵀ + du_t W_tᵀ
    dkey_j = Σ_t dz_tj,  dvalue_j = Σ_t α_tj δr_t,  dw = Σ_tj ds_tj M_tj

The forward has left r, c and u of all steps. Of dkey, dc and du recurrent_weights.py makes the gradients of the
weights, and one product each those of premise and hypothesis. What is left to the kernel is what one step needs of
the next. Nothing of size Th·Ty·A exists; sums have a fixed order.

The two forms are those of the forward. `HELD` keeps dkey and dvalue on chip beside keys and values, the other adds to
them in global memory, each number by the one program that has its sequence. All scores of a step are made before its
weights, so a key with all the weight has the weight 1, g - Σ α g is 0, and no lse is needed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import tanh
from .arguments import pitch, sequence_ptr, sequences
from .chip import LENGTHS, unit
from .inputs import WordByWordInputs
from .masks import sequence_of
from .products import add_product
from .recurrent import forms, launch_forms, premise_keys, prepare, score_tile
from .recurrent_group import parts_of
from .recurrent_weights import weight_parts
from .softmax import exp, finish, made_once, online_softmax, pivot, rounded_product
from .sums import sums
from .tiles import add_rows, load_rows, store_rows


class Given(NamedTuple):
    """What the forward left, and gradients of its results; None where they have none."""

    states: Tensor  # float32 (B, Th, D + A + D), or packed: r before each step, its c and u
    dout: Tensor | None  # (B, Th, D)
    dweights: Tensor | None  # (B, Th, Ty) or (M, Ty) float32
    dscores: Tensor | None  # the same


class Scratch(NamedTuple):
    """Float32."""

    step: Tensor  # (S, D + A + D): δr, dc and du of a step
    s: Tensor  # (B, Ty): scores and their gradients, for what is not held
    g: Tensor


class Made(NamedTuple):
    """Gradients, in the inputs' dtype."""

    dz: Tensor  # (B, Th, A + D): [dc du]
    dk: Tensor  # (B, Ty, A), float32 where it may be streamed
    dvalue: Tensor  # (B, Ty, D), as dk
    dw: Tensor  # (S, A) float32
    dstate: Tensor | None  # (S, D)


@triton.jit
def matrix_vector(
    w,  # (rows, K)
    x_ptr,  # (K,) float32
    i,  # [BLOCK]
    rows,
    K,
    flags,
    BLOCK_K: tl.constexpr,
):
    """Rows i of W x, [BLOCK] float32; one reduction over threads, after all columns."""
    if flags.DOT:
        sums = tl.zeros([16, i.shape[0]], tl.float32)
        for k0 in range(0, K, 64):
            k = k0 + tl.arange(0, 64)
            x = parts_of(tl.load(x_ptr + k, mask=k < K, other=0.0), flags.COMPUTE)
            columns = tl.trans(load_rows(w.ptr + i.to(tl.int64) * w.stride, i < rows, k, K))
            sums = add_product(x, columns, sums, flags.COMPUTE, flags.PRECISION)
        return tl.sum(sums, axis=0)
    acc = tl.zeros([i.shape[0], BLOCK_K], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0)
        acc += x[None, :] * load_rows(w.ptr + i.to(tl.int64) * w.stride, i < rows, k, K).to(tl.float32)
    return tl.sum(acc, axis=1)


@triton.jit
def _add(ptrs, x, mask):
    tl.store(ptrs, tl.load(ptrs, mask=mask, other=0.0) + x, mask=mask)


@triton.jit
def _weights(s_ptrs, g_ptrs, keep, shift, inv, FMA: tl.constexpr):
    """(α, g) of a tile from the scratch, 0 where a key may not be read."""
    s = tl.load(s_ptrs, mask=keep, other=float("-inf"))
    return exp(s - shift, FMA) * inv, tl.load(g_ptrs, mask=keep, other=0.0)


@triton.jit
def _zero_rows(ptr, length, width, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr):
    """Rows up to length of ptr (length, width)."""
    for n0 in range(0, length, BLOCK_N):
        j = n0 + tl.arange(0, BLOCK_N)
        for i0 in range(0, width, BLOCK):
            i = i0 + tl.arange(0, BLOCK)
            zero = tl.zeros([BLOCK_N, BLOCK], tl.float32)
            store_rows(ptr + j.to(tl.int64) * width, zero, j < length, i, width)


@triton.jit(do_not_specialize=LENGTHS)
def _recurrent_bwd_kernel(
    k,  # (B, Ty, A), or packed
    value,  # (B, Ty, D)
    w_ptr,  # (A,)
    w_r,  # (D, A)
    w_t,  # (D, D)
    mask,  # (B, Ty) or None
    q_spans,
    k_spans,
    given,
    scratch,
    made,
    Th,
    Ty,
    size,
    limit,
    flags,
    blocks,
):
    seq = tl.program_id(0).to(tl.int64)
    q_start, steps = sequence_of(seq, q_spans, Th)
    k_start, length = sequence_of(seq, k_spans, Ty)
    own = (length <= limit) == flags.HELD
    steps = tl.where(own, steps, 0)
    k_ptr = sequence_ptr(k, seq, k_start)
    value_ptr = sequence_ptr(value, seq, k_start)
    q_row0 = seq * Th + q_start  # of packed rows Th is 0, or Ty
    k_row0 = seq * Ty + k_start
    dk_ptr = made.dk + k_row0 * size.A
    dvalue_ptr = made.dvalue + k_row0 * size.D
    dw_ptr = made.dw + seq * size.A
    dr_ptr = scratch.step + seq * (size.D + size.A + size.D)
    dc_ptr = dr_ptr + size.D
    du_ptr = dc_ptr + size.A
    for d0 in range(0, size.D, blocks.D):
        d = d0 + tl.arange(0, blocks.D)
        dr = tl.zeros([blocks.D], tl.float32)
        if given.dout is not None:
            last_ptr = given.dout + (q_row0 + steps - 1) * size.D
            dr += tl.load(last_ptr + d, mask=(d < size.D) & (steps > 0), other=0.0).to(tl.float32)
        tl.store(dr_ptr + d, dr, mask=(d < size.D) & own)
    if made.dstate is not None:
        _zero_rows(made.dstate + seq * size.D, own.to(tl.int32), size.D, 1, blocks.D)
    if flags.HELD:
        j = tl.arange(0, blocks.N)
        a = tl.arange(0, blocks.A)
        d = tl.arange(0, blocks.D)
        keep = premise_keys(j, length, mask, seq)
        key = load_rows(k_ptr + j.to(tl.int64) * pitch(k), keep, a, size.A)
        values = load_rows(value_ptr + j.to(tl.int64) * pitch(value), keep, d, size.D)
        w = tl.load(w_ptr + a, mask=a < size.A, other=0.0).to(tl.float32)
        dk = tl.zeros([blocks.N, blocks.A], tl.float32)
        dval = tl.zeros([blocks.N, blocks.D], tl.float32)
        dw = tl.zeros([blocks.A], tl.float32)
    else:
        s_ptr = scratch.s + k_row0
        g_ptr = scratch.g + k_row0
        _zero_rows(dk_ptr, tl.where(own, length, 0), size.A, blocks.N, blocks.A)
        _zero_rows(dvalue_ptr, tl.where(own, length, 0), size.D, blocks.N, blocks.D)
        _zero_rows(dw_ptr, own.to(tl.int32), size.A, 1, blocks.A)
    tl.debug_barrier()

    for back in range(0, steps):
        t = steps - 1 - back
        c_ptr = given.states + (q_row0 + t) * (size.D + size.A + size.D) + size.D
        u_ptr = c_ptr + size.A
        dz_ptr = made.dz + (q_row0 + t) * (size.A + size.D)
        pairs = (q_row0 + t) * Ty
        if flags.HELD:
            c = tl.load(c_ptr + a, mask=a < size.A, other=0.0)
            dr = tl.load(dr_ptr + d, mask=d < size.D, other=0.0)
            y = tanh(key.to(tl.float32) + c[None, :], flags.FAST)
            s = made_once(tl.where(keep, tl.sum(rounded_product(w[None, :], y), axis=1), float("-inf")))
            g = tl.sum(rounded_product(dr[None, :], values.to(tl.float32)), axis=1)
            if given.dweights is not None:
                g += tl.load(given.dweights + pairs + j, mask=keep, other=0.0)
            p, _alpha, m, l = online_softmax(s, float("-inf"), 0.0, 0, flags.FMA)
            p *= finish(l)
            ds = p * (g - tl.sum(p * g, axis=0))
            if given.dscores is not None:
                ds += tl.load(given.dscores + pairs + j, mask=keep, other=0.0)
            dz = ds[:, None] * w[None, :] * (1.0 - y * y)
            dk += dz
            dval += p[:, None] * dr[None, :]
            dw += tl.sum(ds[:, None] * y, axis=0)
            dc = tl.sum(dz, axis=0)
            tl.store(dc_ptr + a, dc, mask=a < size.A)
            tl.store(dz_ptr + a, dc.to(dz_ptr.dtype.element_ty), mask=a < size.A)
        else:
            m = tl.full([1], float("-inf"), tl.float32)
            l = tl.zeros([1], tl.float32)
            mean = tl.zeros([1], tl.float32)  # Σ α g, times l
            for n0 in range(0, length, blocks.N):
                j = n0 + tl.arange(0, blocks.N)
                keep = premise_keys(j, length, mask, seq)
                s = score_tile(k_ptr + j.to(tl.int64) * pitch(k), keep, c_ptr, w_ptr, size.A, flags.FAST, blocks.A)
                g = tl.zeros([blocks.N], tl.float32)
                for d0 in range(0, size.D, blocks.D):
                    d = d0 + tl.arange(0, blocks.D)
                    values = load_rows(value_ptr + j.to(tl.int64) * pitch(value), keep, d, size.D).to(tl.float32)
                    dr = tl.load(dr_ptr + d, mask=d < size.D, other=0.0)
                    g += tl.sum(rounded_product(dr[None, :], values), axis=1)
                if given.dweights is not None:
                    g += tl.load(given.dweights + pairs + j, mask=keep, other=0.0)
                tl.store(s_ptr + j, s, mask=j < length)
                tl.store(g_ptr + j, g, mask=j < length)
                p, alpha, m, l = online_softmax(s, m, l, 0, flags.FMA)
                mean = mean * alpha + tl.sum(p * g, axis=0)
            inv = finish(l)
            mean *= inv
            shift = pivot(m)
            tl.debug_barrier()
            for a0 in range(0, size.A, blocks.A):
                a = a0 + tl.arange(0, blocks.A)
                c = tl.load(c_ptr + a, mask=a < size.A, other=0.0)
                w = tl.load(w_ptr + a, mask=a < size.A, other=0.0).to(tl.float32)
                dc = tl.zeros([blocks.A], tl.float32)
                dw = tl.zeros([blocks.A], tl.float32)
                for n0 in range(0, length, blocks.N):
                    j = n0 + tl.arange(0, blocks.N)
                    keep = premise_keys(j, length, mask, seq)
                    p, g = _weights(s_ptr + j, g_ptr + j, keep, shift, inv, flags.FMA)
                    ds = p * (g - mean)
                    if given.dscores is not None:
                        ds += tl.load(given.dscores + pairs + j, mask=keep, other=0.0)
                    key = load_rows(k_ptr + j.to(tl.int64) * pitch(k), keep, a, size.A).to(tl.float32)
                    y = tanh(key + c[None, :], flags.FAST)
                    dz = ds[:, None] * w[None, :] * (1.0 - y * y)
                    dc += tl.sum(dz, axis=0)
                    dw += tl.sum(ds[:, None] * y, axis=0)
                    add_rows(dk_ptr + j.to(tl.int64) * size.A, dz, keep, a, size.A)
                tl.store(dc_ptr + a, dc, mask=a < size.A)
                tl.store(dz_ptr + a, dc.to(dz_ptr.dtype.element_ty), mask=a < size.A)
                _add(dw_ptr + a, dw, a < size.A)
            for d0 in range(0, size.D, blocks.D):
                d = d0 + tl.arange(0, blocks.D)
                dr = tl.load(dr_ptr + d, mask=d < size.D, other=0.0)
                for n0 in range(0, length, blocks.N):
                    j = n0 + tl.arange(0, blocks.N)
                    keep = premise_keys(j, length, mask, seq)
                    p, _g = _weights(s_ptr + j, g_ptr + j, keep, shift, inv, flags.FMA)
                    add_rows(dvalue_ptr + j.to(tl.int64) * size.D, p[:, None] * dr[None, :], keep, d, size.D)
        for d0 in range(0, size.D, blocks.D):
            d = d0 + tl.arange(0, blocks.D)
            u = tl.load(u_ptr + d, mask=d < size.D, other=0.0)
            du = tl.load(dr_ptr + d, mask=d < size.D, other=0.0) * (1.0 - u * u)
            tl.store(du_ptr + d, du, mask=d < size.D)
            tl.store(dz_ptr + size.A + d, du.to(dz_ptr.dtype.element_ty), mask=d < size.D)
        tl.debug_barrier()
        for d0 in range(0, size.D, blocks.D):
            d = d0 + tl.arange(0, blocks.D)
            dr = matrix_vector(w_r, dc_ptr, d, size.D, size.A, flags, blocks.K)
            dr += matrix_vector(w_t, du_ptr, d, size.D, size.D, flags, blocks.K)
            if made.dstate is not None:
                dstate = dr.to(made.dstate.dtype.element_ty)
                tl.store(made.dstate + seq * size.D + d, dstate, mask=(d < size.D) & (t == 0))
            if given.dout is not None:
                next_ptr = given.dout + (q_row0 + t - 1) * size.D
                dr += tl.load(next_ptr + d, mask=(d < size.D) & (t > 0), other=0.0).to(tl.float32)
            tl.store(dr_ptr + d, dr, mask=d < size.D)
        tl.debug_barrier()

    if flags.HELD:
        inside = (j < length) & own
        store_rows(dk_ptr + j.to(tl.int64) * size.A, dk, inside, a, size.A)
        store_rows(dvalue_ptr + j.to(tl.int64) * size.D, dval, inside, d, size.D)
        tl.store(dw_ptr + a, dw, mask=(a < size.A) & own)


# ---------------------------------------------------------------------------------------------------------------
# Launcher
# ---------------------------------------------------------------------------------------------------------------


def recurrent_bwd(
    inputs: WordByWordInputs,
    states: Tensor,
    key: Tensor,
    dout: Tensor | None,
    dweights: Tensor | None,
    dscores: Tensor | None,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of (premise, hypothesis, w_y, w_h, w_r, w, w_t, state), None where `needs` is False.

    states, key: see the forward.
    """
    premise, hypothesis, w_y, w_h, *_ = inputs
    call = prepare(inputs, key)
    A, D = call.size
    if states.numel() == 0:
        shapes = [x if x is None else x.shape for x in inputs[:8]]
        return [premise.new_zeros(x) if need and x else None for x, need in zip(shapes, needs, strict=True)]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=premise.device)

    rows, words = hypothesis.shape[:-1], premise.shape[:-1]
    chosen = forms(call, 4, premise.shape[-2], grouped=False)
    # What is streamed is added to, in float32; packed rows may be, and by their lengths would be one variant more.
    dtype = torch.float32 if call.k_packed or chosen[-1][0] < 0 else premise.dtype
    dz, dw = premise.new_empty(*rows, A + D), empty(call.seqs, A)
    dk, dpremise = (premise.new_empty(*words, width, dtype=dtype) for width in (A, D))
    dstate = premise.new_empty(call.seqs, D) if needs[7] else None
    dout, dweights, dscores = (x if x is None else x.contiguous() for x in (dout, dweights, dscores))
    more = {
        "given": Given(states, dout, dweights, dscores),
        "scratch": Scratch(empty(call.seqs, D + A + D), empty(*words), empty(*words)),
        "made": Made(dz, dk, dpremise, dw, dstate),
    }
    launch_forms(_recurrent_bwd_kernel, None, call, chosen, **more)
    dk, dpremise, dq = dk.to(premise.dtype), dpremise.to(premise.dtype), dz[..., :A]
    pairs = [
        (call.args["value"], dk) if needs[2] else None,
        (sequences(unit(hypothesis), packed=call.q_packed), dq) if needs[3] else None,
        (sequences(states[..., :D], packed=call.q_packed), dz) if needs[4] or needs[6] else None,
    ]
    parts = weight_parts(call.chip, call.args["mask"], premise.dtype, pairs)
    of_r, of_t = (None, None) if parts[2] is None else (parts[2][..., :A], parts[2][..., A:])
    todo = (parts[0], parts[1], of_r if needs[4] else None, dw if needs[5] else None, of_t if needs[6] else None)
    of_weights = sums([(x, premise.dtype) for x in todo])
    if needs[0]:  # in place: else what is added is copied first
        dpremise.view(-1, D).addmm_(dk.view(-1, A), w_y.t())
    dhypothesis = dq @ w_h.t() if needs[1] else None
    return [g if need else None for g, need in zip((dpremise, dhypothesis, *of_weights, dstate), needs, strict=True)]
