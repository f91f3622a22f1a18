"""Attentive statistics pooling: scores, softmax over the frames, weighted mean and variance, in one pass.

For the frames j of an item and a channel c, with a weight a frame (the scores s_j come ready) or a channel:

    s_jc = u_j · v_c      α_jc = softmax_j(s_jc)      mean_c = Σ_j α_jc x_jc      var_c = Σ_j α_jc (x_jc - mean_c)²

The running state of a channel is (m, l, mean, M): the pivot and the sum of its softmax, and of the frames so far the
mean and l times the variance. A tile of frames has a state of its own, made while it is in registers: a first mean μ,
then with e = x - μ the rounding that it has, r = Σ p e / l, and mean = μ + r, M = Σ p (e - r)². Two states a and b
over disjoint frames join by Chan's formula,

    l = l_a + l_b      δ = mean_b - mean_a      mean = mean_a + δ l_b / l      M = M_a + M_b + δ² l_a l_b / l

once both are brought to one pivot. No square of a value is ever subtracted from another: channels far from 0 lose
nothing. The mean is float64: the backward takes differences of
values with it, and its rounding to float32 would be in all of them alike. It is one number a channel.

A program has a block of channels of an item; one sequence makes several items where there are too few programs to
fill the chip, and `_statistics_merge_kernel` joins their states by the same formula.

The backward is in statistics_bwd.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chip import (
    LENGTHS,
    LONG,
    Chip,
    all_registers,
    chip_of,
    even,
    fitted,
    matmul_flags,
    pow2,
    tile_rows,
    unit,
    unpressed,
)
from .location import item_args, load_rows, matmul, row_strides
from .masks import old_locate, partition
from .softmax import finish, new_lse, no_key, pivot, store_lse

# ---------------------------------------------------------------------------------------------------------------
# Device helpers
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def frame_rows(t, hi, start, seq, mask_ptr, stride_mb, stride_mt):
    """Rows of the frames t [BLOCK_T], and which of them may be read."""
    rows = (start + t).to(tl.int64)
    keep = t < hi
    if mask_ptr is not None:
        keep = tl.load(mask_ptr + seq * stride_mb + rows * stride_mt, mask=keep, other=0) != 0
    return rows, keep


@triton.jit
def channel_scores(
    x_ptrs,  # [BLOCK_T] pointers to rows of u
    keep,
    u,  # tile [BLOCK_T, BLOCK_A] of them, used where it is all of their features
    v,  # tile [BLOCK_A, BLOCK_C] of v, as u
    v_ptr, stride_va,
    c,
    A,
    C,
    WHOLE: tl.constexpr,  # BLOCK_A >= A
    BLOCK_A: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """u_j · v_c for a tile of frames and channels, [BLOCK_T, BLOCK_C]; -inf where a frame is not seen."""
    s = tl.zeros([keep.shape[0], c.shape[0]], tl.float32)
    if WHOLE:
        s = matmul(u, v, s, COMPUTE, PRECISION)
    else:
        for a0 in range(0, A, BLOCK_A):
            a = a0 + tl.arange(0, BLOCK_A)
            u_a = load_rows(x_ptrs, keep, a, A)
            v_a = load_rows(v_ptr + a.to(tl.int64) * stride_va, a < A, c, C)
            s = matmul(u_a, v_a, s, COMPUTE, PRECISION)
    return tl.where(keep[:, None], s, float("-inf"))


@triton.jit
def _moments(p, x):
    """(l, mean, M) of the rows of x [BLOCK, BLOCK_C] with the weights p [BLOCK, BLOCK_C] or [BLOCK, 1].

    The mean is a division that is rounded once. A product with 1 / l the compiler would contract with the difference
    that is taken of it: e would be about a mean that is not the one kept, and r would not be its rounding.
    """
    l = tl.sum(p, axis=0)
    some = tl.where(l > 0, l, 1.0)
    mean = tl.sum(p * x, axis=0)
    if x.dtype == tl.float32:
        mean = tl.div_rn(mean, some)
    else:
        mean = mean / some
    e = x - mean[None, :]
    r = tl.sum(p * e, axis=0) * (1.0 / some)
    e -= r[None, :]
    return l, mean.to(tl.float64) + r.to(tl.float64), tl.sum(p * e * e, axis=0).to(tl.float32)


@triton.jit
def _join(m_a, l_a, mean_a, sq_a, m_b, l_b, mean_b, sq_b):
    """The state of the frames of both; one of them, or both, may have seen none."""
    m = tl.maximum(m_a, m_b)
    alpha = tl.exp(m_a - pivot(m))
    beta = tl.exp(m_b - pivot(m))
    l_a *= alpha
    l_b *= beta
    l = l_a + l_b
    # Exactly 1 where a has seen nothing, which l_b / l_b need not be: delta is then all of the mean.
    share = tl.where(l_a == 0, 1.0, l_b / tl.where(l > 0, l, 1.0))
    delta = mean_b - mean_a
    mean = mean_a + delta * share.to(tl.float64)
    delta = delta.to(tl.float32)
    return m, l, mean, sq_a * alpha + sq_b * beta + delta * delta * l_a * share


# ---------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=LENGTHS)
def _statistics_fwd_kernel(
    x_ptr, stride_xb, stride_xt,  # features u (B, T, A) or (N, A); without v scores (B, T) or (N,)
    v_ptr, stride_va,  # (A, C), or None: one weight a frame
    val_ptr, stride_ub, stride_ut,  # (B, T, C) or (N, C)
    mask_ptr, stride_mb, stride_mt,  # (B, T), (N,) or None
    cu_ptr,  # (S + 1,) or None
    seq_ptr,  # see masks.Items
    first_ptr,
    scores_ptr,  # (B, T, C) or (N, C) float32, or None: they are not wanted
    mean_ptr,  # (S, C) float64; of items (items, C) where there are m_ptr and l_ptr
    var_ptr,  # (S, C) float32; of items M, (items, C)
    lse_ptr,  # (S, R, 2) float32, R = C with v and 1 without: (m, l), see softmax.py
    m_ptr,  # (items, R) float32, or None: every sequence is one item
    l_ptr,  # (items, R) float32 or None
    num_seqs,
    per_seq,
    rows_per_item,
    T,  # 0 where the batch is ragged
    A,
    C,
    PER_CHANNEL: tl.constexpr,
    WHOLE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, BLOCK_C)
    item = tl.program_id(0) // blocks  # the channels of a frame together: they share its features in L2
    block = tl.program_id(0) % blocks
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    seq, start, lo, hi, _ = old_locate(item, cu_ptr, seq_ptr, first_ptr, T, num_seqs, per_seq, rows_per_item)
    if PER_CHANNEL:
        r = c
        R = C
        a = tl.arange(0, BLOCK_A)
        # Stays on chip where it is WHOLE, else it is not loaded.
        v = load_rows(v_ptr + a.to(tl.int64) * stride_va, a < A, c, C)
    else:
        r = tl.arange(0, 1)
        R = 1
    m = tl.full([r.shape[0]], float("-inf"), tl.float32)
    l = tl.zeros([r.shape[0]], tl.float32)
    mean = tl.zeros([BLOCK_C], tl.float64)
    sq = tl.zeros([BLOCK_C], tl.float32)

    for t0 in range(lo, hi, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        rows, keep = frame_rows(t, hi, start, seq, mask_ptr, stride_mb, stride_mt)
        x_ptrs = x_ptr + seq * stride_xb + rows * stride_xt
        if PER_CHANNEL:
            u = load_rows(x_ptrs, keep, a, A)
            s = channel_scores(x_ptrs, keep, u, v, v_ptr, stride_va, c, A, C, WHOLE, BLOCK_A, COMPUTE, PRECISION)
            if scores_ptr is not None:
                at = (seq * T + rows)[:, None] * C + c[None, :]
                tl.store(scores_ptr + at, s, mask=(t < hi)[:, None] & (c < C)[None, :])
        else:
            s = tl.load(x_ptrs, mask=keep, other=float("-inf"))[:, None]
        values = load_rows(val_ptr + seq * stride_ub + rows * stride_ut, keep, c, C).to(tl.float32)
        m_tile = tl.max(s, axis=0)
        l_tile, mean_tile, sq_tile = _moments(tl.exp(s - pivot(m_tile)[None, :]), values)
        m, l, mean, sq = _join(m, l, mean, sq, m_tile, l_tile, mean_tile, sq_tile)

    inv = finish(l)
    own = (r < R) & (seq < num_seqs)
    if not PER_CHANNEL:
        own = own & (block == 0)
    if m_ptr is None:
        at = seq * C + c
        tl.store(mean_ptr + at, mean, mask=(c < C) & (seq < num_seqs))
        tl.store(var_ptr + at, sq * inv, mask=(c < C) & (seq < num_seqs))
        store_lse(lse_ptr + (seq * R + r) * 2, m, l, own)
    else:
        at = item.to(tl.int64) * C + c
        tl.store(mean_ptr + at, mean, mask=c < C)
        tl.store(var_ptr + at, sq, mask=c < C)
        tl.store(m_ptr + item.to(tl.int64) * R + r, m, mask=own)
        tl.store(l_ptr + item.to(tl.int64) * R + r, l, mask=own)


@triton.jit(do_not_specialize=LENGTHS)
def _statistics_merge_kernel(
    mean_parts_ptr,  # (items, C) float64
    sq_parts_ptr,  # (items, C) float32
    m_ptr,  # (items, R) float32
    l_ptr,  # (items, R) float32
    first_ptr,  # (S + 1,) int32 or None
    mean_ptr,  # (S, C) float64
    var_ptr,  # (S, C) float32
    lse_ptr,  # (S, R, 2) float32
    per_seq,
    C,
    PER_CHANNEL: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """States of the items of a sequence, BLOCK_I at a time; an item counts l frames at its mean, and its M."""
    seq = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if first_ptr is None:
        lo = seq * per_seq
        hi = lo + per_seq
    else:
        lo = tl.load(first_ptr + seq).to(tl.int64)
        hi = tl.load(first_ptr + seq + 1).to(tl.int64)
    if PER_CHANNEL:
        r = c
        R = C
    else:
        r = tl.arange(0, 1)
        R = 1
    m = tl.full([r.shape[0]], float("-inf"), tl.float32)
    l = tl.zeros([r.shape[0]], tl.float32)
    mean = tl.zeros([BLOCK_C], tl.float64)
    sq = tl.zeros([BLOCK_C], tl.float32)
    for i0 in range(lo, hi, BLOCK_I):
        item = i0 + tl.arange(0, BLOCK_I)
        m_i = load_rows(m_ptr + item * R, item < hi, r, R)
        l_i = load_rows(l_ptr + item * R, item < hi, r, R)
        m_i = tl.where(l_i > 0, m_i, float("-inf"))  # past the end l is 0
        m_tile = tl.max(m_i, axis=0)
        weight = tl.exp(m_i - pivot(m_tile)[None, :])
        l_tile, mean_tile, sq_tile = _moments(weight * l_i, load_rows(mean_parts_ptr + item * C, item < hi, c, C))
        sq_tile += tl.sum(weight * load_rows(sq_parts_ptr + item * C, item < hi, c, C), axis=0)
        m, l, mean, sq = _join(m, l, mean, sq, m_tile, l_tile, mean_tile, sq_tile)
    inv = finish(l)
    tl.store(mean_ptr + seq * C + c, mean, mask=c < C)
    tl.store(var_ptr + seq * C + c, sq * inv, mask=c < C)
    own = r < R
    if not PER_CHANNEL:
        own = own & (tl.program_id(1) == 0)
    store_lse(lse_ptr + (seq * R + r) * 2, m, l, own)


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Sizes of one kernel's tiles."""

    T: int
    C: int
    A: int
    warps: int
    stages: int = 2


def fwd_blocks(chip: Chip, itemsize: int, T: int, C: int, A: int) -> Blocks:
    """Tiles of the forward; A is 0 for one weight a frame. 8192 elements a tile are 32 registers of 8 warps.

    Chosen by the compile report (no spills, shared memory within the chip); for sm_90 timed on an H200.
    """
    if A == 0:
        rows, warps = (32, 4) if chip.hopper else (64, 8)
        return Blocks(tile_rows(T, rows), pow2(C, 16, 128), 16, warps)
    warps = product_warps(chip, itemsize, C, A)
    if itemsize == 4:  # no matrix units in full float32: products are unrolled, so A goes in steps of 16
        return Blocks(tile_rows(T, 32), pow2(C, 16, 64), 16, warps)
    # Where A fits, the block of V stays on chip for all frames.
    return Blocks(tile_rows(T, 64), pow2(C, 16, 64), pow2(A, 16, 128 if A <= 128 else 64), warps)


def product_warps(chip: Chip, itemsize: int, C: int, A: int) -> int:
    """256 threads; a wave of AMD has 64 of them, and four waves have 512 registers a lane.

    On an H200 half as many are 1.5 times as fast, in the forward as in the backward, since two programs share a core;
    where registers do not suffice for that, in float32 or beside rows that are no whole vectors, they are not.
    """
    fits = chip.hopper and itemsize == 2 and even(C, A) and A <= 128
    return 4 if chip.backend == "hip" or fits else 8


class Call(NamedTuple):
    """What the launches of one call share."""

    seqs: int
    length: int  # frames of a padded sequence, or all packed ones
    A: int  # 0 for one weight a frame
    C: int
    chip: Chip
    tensors: dict[str, Tensor | int | None]  # the kernels' arguments for the inputs, by name
    sizes: dict[str, int]
    flags: dict[str, object]


def prepare(x: Tensor, v: Tensor | None, values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Call:
    chip = chip_of(values.device)
    ragged = cu_seqlens is not None
    x, v, values = x if v is None else unit(x), unit(v), unit(values)
    mask = None if mask is None else mask.view(torch.uint8)
    seqs = cu_seqlens.numel() - 1 if ragged else values.shape[0]
    A, C = 0 if v is None else v.shape[0], values.shape[-1]

    def strides(name: str, y: Tensor | None) -> dict[str, int]:
        sequence, row = row_strides(y, ragged)
        return {f"stride_{name}b": sequence, f"stride_{name}t": row}

    return Call(
        seqs=seqs,
        length=values.shape[0] if ragged else values.shape[1],
        A=A,
        C=C,
        chip=chip,
        tensors={
            "x_ptr": x, **strides("x", x),
            "v_ptr": v, "stride_va": 0 if v is None else v.stride(0),
            "val_ptr": values, **strides("u", values),
            "mask_ptr": mask, **strides("m", mask),
            "cu_ptr": cu_seqlens if cu_seqlens is None else cu_seqlens.contiguous(),
        },
        sizes={"num_seqs": seqs, "T": 0 if ragged else values.shape[1], "A": A, "C": C},
        flags={"PER_CHANNEL": v is not None, **matmul_flags(chip, values.dtype)},
    )  # fmt: skip


def tile_args(call: Call, blocks: Blocks) -> dict[str, object]:
    """Constants of a launch over tiles of frames and channels."""
    return {
        "WHOLE": 0 < call.A <= blocks.A, "BLOCK_T": blocks.T, "BLOCK_C": blocks.C, "BLOCK_A": blocks.A,
        "num_warps": blocks.warps, "num_stages": blocks.stages,
        **unpressed(call.chip, call.C, call.A),
    }  # fmt: skip


def statistics_fwd(
    x: Tensor, v: Tensor | None, values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, return_scores: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean, var, lse, scores); arguments and shapes as `fused_attn.reference.statistics_pooling` has them."""
    call = prepare(x, v, values, mask, cu_seqlens)
    seqs, C = call.seqs, call.C
    R = 1 if v is None else C
    mean = values.new_empty(seqs, C, dtype=torch.float64)
    var = values.new_empty(seqs, C, dtype=torch.float32)
    lse = new_lse(seqs, R, device=values.device)
    scores = values.new_empty(values.shape if return_scores else 0, dtype=torch.float32)
    if seqs == 0 or call.length == 0:
        return mean.zero_(), var.zero_(), no_key(lse), scores

    longest = call.length if cu_seqlens is None else LONG
    blocks = fwd_blocks(call.chip, values.element_size(), longest, C, call.A)
    channel_blocks = triton.cdiv(C, blocks.C)
    rows = _rows_per_item(call, cu_seqlens is not None, channel_blocks, blocks.T)
    items = partition(seqs, call.length, rows, cu_seqlens)
    parts = mean, var
    m = l = None
    if items.first is not None or items.per_seq > 1:
        m, l = (values.new_empty(items.count, R, dtype=torch.float32) for _ in range(2))
        parts = tuple(x.new_empty(items.count, C) for x in parts)
    with torch.cuda.device_of(values):
        fitted(_statistics_fwd_kernel, call.tensors)[(items.count * channel_blocks,)](
            **call.tensors, **item_args(items), **call.sizes, **call.flags, **tile_args(call, blocks),
            scores_ptr=scores if return_scores else None, mean_ptr=parts[0], var_ptr=parts[1],
            lse_ptr=lse, m_ptr=m, l_ptr=l, rows_per_item=rows,
        )  # fmt: skip
        if m is not None:
            block_c = pow2(C, 16, 128)
            _statistics_merge_kernel[(seqs, triton.cdiv(C, block_c))](
                *parts, m, l, items.first, mean, var, lse, items.per_seq, C,
                PER_CHANNEL=v is not None, BLOCK_I=16, BLOCK_C=block_c, num_warps=4, **all_registers(call.chip),
            )  # fmt: skip
    return mean, var, lse, scores


def _rows_per_item(call: Call, ragged: bool, channel_blocks: int, block_t: int) -> int:
    """Enough programs for four a core, but no item so short that its state costs more than its frames."""
    parts = triton.cdiv(4 * call.chip.cores, channel_blocks * (1 if ragged else call.seqs))
    rows = max(triton.cdiv(call.length, parts), 4 * block_t)
    return triton.cdiv(rows, block_t) * block_t
