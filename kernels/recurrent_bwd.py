"""Backward of word-by-word attention through time, in one program a sequence.

With the names of recurrent.py, M_tj = tanh(key_j + c_t), u_t = tanh(r_{t-1} W_t), δr_t the gradient of r_t and dα_t
that of the returned weights, from the last step to the first:

    g_tj  = δr_t · value_j + dα_tj                 ds_tj = α_tj (g_tj - Σ_k α_tk g_tk)
    dz_tj = ds_tj w ⊙ (1 - M_tj²)                  dc_t  = Σ_j dz_tj = dquery_t
    du_t  = δr_t ⊙ (1 - u_t²)                      δr_{t-1} = dr_{t-1} + dc_t W_rᵀ + du_t W_tᵀ
    dkey_j = Σ_t dz_tj,  dvalue_j = Σ_t α_tj δr_t,  dw = Σ_tj ds_tj M_tj

r_{t-1} W_r and r_{t-1} W_t of all steps are one matrix product before the kernel: the forward has left all r. The
kernel puts dc and du in their places, and one product more gives the gradients of both weights, dW_r = Σ_t r_{t-1}ᵀ
dc_t, dW_t = Σ_t r_{t-1}ᵀ du_t. What is left to the kernel is what one step needs of the next. Nothing of size
Th·Ty·A exists; sums have a fixed order.

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
from .arguments import Matrix, sequence_ptr
from .chip import LENGTHS
from .inputs import WordByWordInputs
from .location import add_rows, load_rows, store_rows
from .masks import sequence_of
from .recurrent import launch_forms, premise_keys, prepare, score_tile, vector_matrix
from .softmax import exp, finish, made_once, online_softmax, pivot, rounded_product
from .sums import sums


class Given(NamedTuple):
    """What PyTorch has made, float32."""

    z: Tensor  # (B, Th + 1, A + D) or packed (N + S, A + D): r W_r and r W_t, become dc and du, of the last r 0
    dweights: Tensor | None  # (B, Th, Ty)


class Scratch(NamedTuple):
    """Scores and their gradients, (B, Ty) float32, for what is not held."""

    s: Tensor
    g: Tensor


class Made(NamedTuple):
    """Gradients, in float32 but for dq."""

    dr: Tensor  # (B, Th, D): dr, becomes δr
    dq: Tensor  # (B, Th, A)
    dk: Tensor  # (B, Ty, A)
    dvalue: Tensor  # (B, Ty, D)
    dw: Tensor  # (S, A)
    dstate: Tensor  # (S, D)


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
    q,  # (B, Th, A), or packed
    k,  # (B, Ty, A)
    value,  # (B, Ty, D)
    w_ptr,  # (A,)
    w_r,  # (A, D): W_r transposed
    w_t,  # (D, D): W_t transposed
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
    q_ptr = sequence_ptr(q, seq, q_start)
    k_ptr = sequence_ptr(k, seq, k_start)
    value_ptr = sequence_ptr(value, seq, k_start)
    q_row0 = seq * Th + q_start  # packed: Th = Ty = 0
    k_row0 = seq * Ty + k_start
    dk_ptr = made.dk + k_row0 * size.A
    dvalue_ptr = made.dvalue + k_row0 * size.D
    dw_ptr = made.dw + seq * size.A
    width = size.A + size.D
    z_ptr = given.z + (q_row0 + seq) * width  # a row more a sequence
    _zero_rows(z_ptr + steps.to(tl.int64) * width, own.to(tl.int32), width, 1, blocks.D)
    _zero_rows(made.dstate + seq * size.D, own.to(tl.int32), size.D, 1, blocks.D)
    if flags.HELD:
        j = tl.arange(0, blocks.N)
        a = tl.arange(0, blocks.A)
        d = tl.arange(0, blocks.D)
        keep = premise_keys(j, length, mask, seq)
        key = load_rows(k_ptr + j.to(tl.int64) * k.stride_t, keep, a, size.A)
        values = load_rows(value_ptr + j.to(tl.int64) * value.stride_t, keep, d, size.D)
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
        row = q_row0 + t
        z_row = z_ptr + t.to(tl.int64) * width
        u_row = z_row + size.A
        q_row = q_ptr + t.to(tl.int64) * q.stride_t
        dq_row = made.dq + row * size.A
        dr_row = made.dr + row * size.D
        pairs = (seq * Th + t) * Ty
        if flags.HELD:
            c = tl.load(q_row + a, mask=a < size.A, other=0.0).to(tl.float32)
            c += tl.load(z_row + a, mask=a < size.A, other=0.0)
            dr = tl.load(dr_row + d, mask=d < size.D, other=0.0)
            y = tanh(key.to(tl.float32) + c[None, :], flags.FAST)
            s = made_once(tl.where(keep, tl.sum(rounded_product(w[None, :], y), axis=1), float("-inf")))
            g = tl.sum(rounded_product(dr[None, :], values.to(tl.float32)), axis=1)
            if given.dweights is not None:
                g += tl.load(given.dweights + pairs + j, mask=keep, other=0.0)
            p, _alpha, m, l = online_softmax(s, float("-inf"), 0.0, 0, flags.FMA)
            p *= finish(l)
            ds = p * (g - tl.sum(p * g, axis=0))
            dz = ds[:, None] * w[None, :] * (1.0 - y * y)
            dk += dz
            dval += p[:, None] * dr[None, :]
            dw += tl.sum(ds[:, None] * y, axis=0)
            dc = tl.sum(dz, axis=0)
            tl.debug_barrier()  # z has been read
            tl.store(z_row + a, dc, mask=a < size.A)
            tl.store(dq_row + a, dc.to(dq_row.dtype.element_ty), mask=a < size.A)
        else:
            for a0 in range(0, size.A, blocks.A):
                a = a0 + tl.arange(0, blocks.A)
                _add(z_row + a, tl.load(q_row + a, mask=a < size.A, other=0.0).to(tl.float32), a < size.A)
            tl.debug_barrier()
            m = tl.full([1], float("-inf"), tl.float32)
            l = tl.zeros([1], tl.float32)
            mean = tl.zeros([1], tl.float32)  # Σ α g, times l
            for n0 in range(0, length, blocks.N):
                j = n0 + tl.arange(0, blocks.N)
                keep = premise_keys(j, length, mask, seq)
                s = score_tile(k_ptr + j.to(tl.int64) * k.stride_t, keep, z_row, w_ptr, size.A, flags.FAST, blocks.A)
                g = tl.zeros([blocks.N], tl.float32)
                for d0 in range(0, size.D, blocks.D):
                    d = d0 + tl.arange(0, blocks.D)
                    values = load_rows(value_ptr + j.to(tl.int64) * value.stride_t, keep, d, size.D).to(tl.float32)
                    dr = tl.load(dr_row + d, mask=d < size.D, other=0.0)
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
                c = tl.load(z_row + a, mask=a < size.A, other=0.0)
                w = tl.load(w_ptr + a, mask=a < size.A, other=0.0).to(tl.float32)
                dc = tl.zeros([blocks.A], tl.float32)
                dw = tl.zeros([blocks.A], tl.float32)
                for n0 in range(0, length, blocks.N):
                    j = n0 + tl.arange(0, blocks.N)
                    keep = premise_keys(j, length, mask, seq)
                    p, g = _weights(s_ptr + j, g_ptr + j, keep, shift, inv, flags.FMA)
                    ds = p * (g - mean)
                    key = load_rows(k_ptr + j.to(tl.int64) * k.stride_t, keep, a, size.A).to(tl.float32)
                    y = tanh(key + c[None, :], flags.FAST)
                    dz = ds[:, None] * w[None, :] * (1.0 - y * y)
                    dc += tl.sum(dz, axis=0)
                    dw += tl.sum(ds[:, None] * y, axis=0)
                    add_rows(dk_ptr + j.to(tl.int64) * size.A, dz, keep, a, size.A)
                tl.debug_barrier()  # z has been read
                tl.store(z_row + a, dc, mask=a < size.A)
                tl.store(dq_row + a, dc.to(dq_row.dtype.element_ty), mask=a < size.A)
                _add(dw_ptr + a, dw, a < size.A)
            for d0 in range(0, size.D, blocks.D):
                d = d0 + tl.arange(0, blocks.D)
                dr = tl.load(dr_row + d, mask=d < size.D, other=0.0)
                for n0 in range(0, length, blocks.N):
                    j = n0 + tl.arange(0, blocks.N)
                    keep = premise_keys(j, length, mask, seq)
                    p, _g = _weights(s_ptr + j, g_ptr + j, keep, shift, inv, flags.FMA)
                    add_rows(dvalue_ptr + j.to(tl.int64) * size.D, p[:, None] * dr[None, :], keep, d, size.D)
        for d0 in range(0, size.D, blocks.D):
            d = d0 + tl.arange(0, blocks.D)
            u = tanh(tl.load(u_row + d, mask=d < size.D, other=0.0), False)
            tl.store(u_row + d, tl.load(dr_row + d, mask=d < size.D, other=0.0) * (1.0 - u * u), mask=d < size.D)
        tl.debug_barrier()
        for d0 in range(0, size.D, blocks.D):
            d = d0 + tl.arange(0, blocks.D)
            from_c = vector_matrix(z_row, w_r, d, size.A, size.D, blocks.K)
            from_u = vector_matrix(u_row, w_t, d, size.D, size.D, blocks.K)
            _add(dr_row - size.D + d, from_c + from_u, (d < size.D) & (t > 0))
            tl.store(made.dstate + seq * size.D + d, from_c + from_u, mask=(d < size.D) & (t == 0))
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
    inputs: WordByWordInputs, states: Tensor, dout: Tensor, dweights: Tensor | None, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of (query, key, value, w, w_r, w_t, state), None where `needs` is False; states: see the forward."""
    query, key, value, w, w_r, w_t, _, _, cu_seqlens_premise, _ = inputs
    call = prepare(inputs)
    A, D = call.size
    if dout.numel() == 0:
        shapes = *(x.shape for x in inputs[:6]), (call.seqs, D)  # type: ignore[union-attr]
        pairs = zip(inputs, shapes, needs, strict=False)
        return [value.new_zeros(shape, dtype=x.dtype) if need else None for x, shape, need in pairs]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=query.device)

    by_column = torch.cat([w_r.t(), w_t.t()])  # (A + D, D)
    z = states @ by_column.float().t()
    dr, dq = empty(*dout.shape).copy_(dout), torch.empty_like(query, memory_format=torch.contiguous_format)
    dk, dval, dw, dstate = empty(*key.shape), empty(*value.shape), empty(call.seqs, A), empty(call.seqs, D)
    more = {
        "w_r": Matrix(by_column[:A], D),
        "w_t": Matrix(by_column[A:], D),
        "given": Given(z, None if dweights is None else dweights.float().contiguous()),
        "scratch": Scratch(empty(*key.shape[:-1]), empty(*key.shape[:-1])),
        "made": Made(dr, dq, dk, dval, dw, dstate),
    }
    launch_forms(_recurrent_bwd_kernel, call, 4, key.shape[-2], cu_seqlens_premise is not None, **more)
    (dw_sum,) = sums([(dw if needs[3] else None, w.dtype)])
    of_weights = states.flatten(0, -2).t() @ z.flatten(0, -2) if needs[4] or needs[5] else empty(D, A + D)
    # Copies, which casts are anyhow: of one row both would be contiguous views of one tensor.
    of_r, of_t = (g.to(x.dtype, copy=True) for g, x in ((of_weights[:, :A], w_r), (of_weights[:, A:], w_t)))
    made = (dq, dk, dval, dw_sum, of_r, of_t, dstate)
    return [g.to(x.dtype) if need else None for g, x, need in zip(made, inputs, needs, strict=False)]
