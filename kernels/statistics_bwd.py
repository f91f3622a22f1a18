"""Backward of attentive statistics pooling, from the inputs, the statistics and (m, l).

With e_jc = x_jc - mean_c and α_jc = exp(s_jc - m_c) / l_c, dlse_c = l_c dl_c:

    dx_jc = α_jc (dmean_c + 2 dvar_c e_jc)
    ds_jc = α_jc (dmean_c e_jc + dvar_c (e_jc² - var_c) + dlse_c) + dscores_jc         (one a frame: the sum over c)
    du_j = Σ_c ds_jc v_c        dv_c = Σ_j u_j ds_jc

The mean inside var_c has no gradient of its own: Σ_j α_jc e_jc = 0. With a weight a channel, du sums over the
channels and dv over the frames, so each has a kernel that makes the scores again: nothing of size N·C but dx reaches
memory. Only where the forward has returned the scores, for the weights, they are read: then those that dscores and
dlse belong to are the same to the last bit, and cancel. The sums over the frames are partials, one a program, that
are added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chip import LENGTHS, LONG, Chip, even, fitted, pow2, tile_rows
from .location import item_args, load_rows
from .masks import Items, old_locate, partition
from .products import add_product
from .softmax import exp, load_dlse, load_lse
from .statistics import Blocks, Call, channel_scores, frame_rows, prepare, product_warps, tile_args


@triton.jit
def _load_channels(ptr, seq, c, C, num_seqs):
    """A sequence's numbers of the channels c as float32, [1, BLOCK_C]."""
    return tl.load(ptr + seq * C + c, mask=(c < C) & (seq < num_seqs), other=0.0).to(tl.float32)[None, :]


@triton.jit
def _score_factor(e, dmean, dvar, var):
    """ds / α without dlse, [BLOCK_T, BLOCK_C]."""
    return e * (dmean + dvar * e) - dvar * var


@triton.jit
def _load_lse(lse_ptr, seq, r, R, num_seqs):
    """(m, 1 / l), [1, BLOCK_R] each."""
    top, inv = load_lse(lse_ptr + (seq * R + r) * 2, (r < R) & (seq < num_seqs))
    return top[None, :], inv[None, :]


@triton.jit
def _load_dlse(dlse_ptr, lse_ptr, seq, r, R, num_seqs):
    """Gradient of log l, [1, BLOCK_R]."""
    at = (seq * R + r) * 2
    return load_dlse(dlse_ptr + at, lse_ptr + at, (r < R) & (seq < num_seqs))[None, :]


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
    x_ptr, stride_xb, stride_xt,  # scores (B, T) or (N,) float32
    val_ptr, stride_ub, stride_ut,  # (B, T, C) or (N, C)
    mask_ptr, stride_mb, stride_mt,  # (B, T), (N,) or None
    cu_ptr,  # (S + 1,) or None
    seq_ptr,  # see masks.Items
    first_ptr,
    mean_ptr,  # (S, C) float32, and the rest of mean, which is float64
    mean_lo_ptr,
    var_ptr,  # (S, C) float32
    lse_ptr,  # (S, 1, 2) float32: (m, l)
    dmean_ptr,  # (S, C) float32
    dvar_ptr,  # (S, C) float32
    dlse_ptr,  # the same, or None
    dx_ptr,  # (B, T) or (N,) float32, contiguous, or None
    dval_ptr,  # (B, T, C) or (N, C), contiguous, or None
    num_seqs,
    per_seq,
    T,  # 0 where the batch is ragged
    C,
    FMA: tl.constexpr,
    BLOCK_T: tl.constexpr,  # frames of an item
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One weight a frame: an item of frames, all channels."""
    seq, start, lo, hi, _ = old_locate(tl.program_id(0), cu_ptr, seq_ptr, first_ptr, T, num_seqs, per_seq, BLOCK_T)
    t = lo + tl.arange(0, BLOCK_T)
    rows, keep = frame_rows(t, hi, start, seq, mask_ptr, stride_mb, stride_mt)
    one = tl.arange(0, 1)
    top, inv = _load_lse(lse_ptr, seq, one, 1, num_seqs)
    s = tl.load(x_ptr + seq * stride_xb + rows * stride_xt, mask=keep, other=float("-inf"))
    alpha = _frame_weights(s[:, None], top, inv, FMA)  # [BLOCK_T, 1]
    factor = tl.zeros([BLOCK_T], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        dmean = _load_channels(dmean_ptr, seq, c, C, num_seqs)
        dvar = _load_channels(dvar_ptr, seq, c, C, num_seqs)
        values = load_rows(val_ptr + seq * stride_ub + rows * stride_ut, keep, c, C).to(tl.float32)
        e = values - _load_channels(mean_ptr, seq, c, C, num_seqs)
        e -= _load_channels(mean_lo_ptr, seq, c, C, num_seqs)
        factor += tl.sum(_score_factor(e, dmean, dvar, _load_channels(var_ptr, seq, c, C, num_seqs)), axis=1)
        if dval_ptr is not None:
            dval = (alpha * (dmean + 2.0 * dvar * e)).to(dval_ptr.dtype.element_ty)
            at = (seq * T + rows)[:, None] * C + c[None, :]
            tl.store(dval_ptr + at, dval, mask=(t < hi)[:, None] & (c < C)[None, :])
    if dx_ptr is not None:
        if dlse_ptr is not None:
            factor += tl.sum(_load_dlse(dlse_ptr, lse_ptr, seq, one, 1, num_seqs), axis=1)
        tl.store(dx_ptr + seq * T + rows, tl.sum(alpha, axis=1) * factor, mask=t < hi)


@triton.jit(do_not_specialize=LENGTHS)
def _statistics_bwd_values_kernel(
    x_ptr, stride_xb, stride_xt,  # features u (B, T, A) or (N, A)
    v_ptr, stride_va,  # (A, C)
    val_ptr, stride_ub, stride_ut,  # (B, T, C) or (N, C)
    mask_ptr, stride_mb, stride_mt,  # (B, T), (N,) or None
    cu_ptr,  # (S + 1,) or None
    seq_ptr,  # see masks.Items
    first_ptr,
    mean_ptr,  # (S, C) float32, and the rest of mean, which is float64
    mean_lo_ptr,
    var_ptr,  # (S, C) float32
    lse_ptr,  # (S, C, 2) float32: (m, l)
    dmean_ptr,  # (S, C) float32
    dvar_ptr,  # (S, C) float32
    dlse_ptr,  # the same, or None
    scores_ptr,  # (B, T, C) or (N, C) float32, or None: they are made again
    dscores_ptr,  # (B, T, C) or (N, C) float32, or None
    dval_ptr,  # (B, T, C) or (N, C), contiguous, or None
    dv_ptr,  # (splits, A, C) float32, or None
    items,
    items_per_split,
    num_seqs,
    per_seq,
    T,  # 0 where the batch is ragged
    A,
    C,
    WHOLE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,  # frames of an item
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):  # fmt: skip
    """A weight a channel: dx and dv of a block of channels, over the items of a split and BLOCK_A rows of dv."""
    blocks = tl.cdiv(C, BLOCK_C)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(0) // blocks
    a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    v = load_rows(v_ptr + a.to(tl.int64) * stride_va, a < A, c, C)
    dv = tl.zeros([BLOCK_A, BLOCK_C], tl.float32)
    first = part * items_per_split
    for item in range(first, tl.minimum(first + items_per_split, items)):
        seq, start, lo, hi, _ = old_locate(item, cu_ptr, seq_ptr, first_ptr, T, num_seqs, per_seq, BLOCK_T)
        t = lo + tl.arange(0, BLOCK_T)
        rows, keep = frame_rows(t, hi, start, seq, mask_ptr, stride_mb, stride_mt)
        x_ptrs = x_ptr + seq * stride_xb + rows * stride_xt
        u = load_rows(x_ptrs, keep, a, A)
        at = (seq * T + rows) * C
        if scores_ptr is None:
            s = channel_scores(x_ptrs, keep, u, v, v_ptr, stride_va, c, A, C, WHOLE, BLOCK_A, COMPUTE, PRECISION)
        else:
            s = tl.where(keep[:, None], load_rows(scores_ptr + at, keep, c, C), float("-inf"))
        top, inv = _load_lse(lse_ptr, seq, c, C, num_seqs)
        alpha = tl.exp(s - top) * inv
        dmean = _load_channels(dmean_ptr, seq, c, C, num_seqs)
        dvar = _load_channels(dvar_ptr, seq, c, C, num_seqs)
        values = load_rows(val_ptr + seq * stride_ub + rows * stride_ut, keep, c, C).to(tl.float32)
        e = values - _load_channels(mean_ptr, seq, c, C, num_seqs)
        e -= _load_channels(mean_lo_ptr, seq, c, C, num_seqs)
        if dval_ptr is not None:
            dval = (alpha * (dmean + 2.0 * dvar * e)).to(dval_ptr.dtype.element_ty)
            write = (t < hi)[:, None] & (c < C)[None, :] & (tl.program_id(1) == 0)
            tl.store(dval_ptr + at[:, None] + c[None, :], dval, mask=write)
        if dv_ptr is not None:
            factor = _score_factor(e, dmean, dvar, _load_channels(var_ptr, seq, c, C, num_seqs))
            if dlse_ptr is not None:
                factor += _load_dlse(dlse_ptr, lse_ptr, seq, c, C, num_seqs)
            ds = alpha * factor
            if dscores_ptr is not None:
                ds += load_rows(dscores_ptr + at, keep, c, C)
            dv = add_product(tl.trans(u), ds, dv, COMPUTE, PRECISION)
    if dv_ptr is not None:
        at = (part.to(tl.int64) * A + a[:, None]) * C + c[None, :]
        tl.store(dv_ptr + at, dv, mask=(a < A)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _statistics_bwd_features_kernel(
    x_ptr, stride_xb, stride_xt,  # features u (B, T, A) or (N, A)
    v_ptr, stride_va,  # (A, C)
    val_ptr, stride_ub, stride_ut,  # (B, T, C) or (N, C)
    mask_ptr, stride_mb, stride_mt,  # (B, T), (N,) or None
    cu_ptr,  # (S + 1,) or None
    seq_ptr,  # see masks.Items
    first_ptr,
    mean_ptr,  # (S, C) float32, and the rest of mean, which is float64
    mean_lo_ptr,
    var_ptr,  # (S, C) float32
    lse_ptr,  # (S, C, 2) float32: (m, l)
    dmean_ptr,  # (S, C) float32
    dvar_ptr,  # (S, C) float32
    dlse_ptr,  # the same, or None
    scores_ptr,  # (B, T, C) or (N, C) float32, or None: they are made again
    dscores_ptr,  # (B, T, C) or (N, C) float32, or None
    dx_ptr,  # (B, T, A) or (N, A), contiguous
    num_seqs,
    per_seq,
    T,  # 0 where the batch is ragged
    A,
    C,
    WHOLE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,  # frames of an item
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):  # fmt: skip
    """A weight a channel: du of an item of frames and BLOCK_A features, over all channels."""
    seq, start, lo, hi, _ = old_locate(tl.program_id(0), cu_ptr, seq_ptr, first_ptr, T, num_seqs, per_seq, BLOCK_T)
    t = lo + tl.arange(0, BLOCK_T)
    rows, keep = frame_rows(t, hi, start, seq, mask_ptr, stride_mb, stride_mt)
    a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    x_ptrs = x_ptr + seq * stride_xb + rows * stride_xt
    u = load_rows(x_ptrs, keep, a, A)
    # wgmma takes its first operand from registers, and would still read ds there when the next one is made: as the
    # second it goes through shared memory. (ptxas sees it, and waits after each, warning C7515.)
    ACROSS: tl.constexpr = BLOCK_T >= 64
    du = tl.zeros([BLOCK_A, BLOCK_T] if ACROSS else [BLOCK_T, BLOCK_A], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        v = load_rows(v_ptr + a.to(tl.int64) * stride_va, a < A, c, C)
        at = (seq * T + rows) * C
        if scores_ptr is None:
            s = channel_scores(x_ptrs, keep, u, v, v_ptr, stride_va, c, A, C, WHOLE, BLOCK_A, COMPUTE, PRECISION)
        else:
            s = tl.where(keep[:, None], load_rows(scores_ptr + at, keep, c, C), float("-inf"))
        top, inv = _load_lse(lse_ptr, seq, c, C, num_seqs)
        alpha = tl.exp(s - top) * inv
        dmean = _load_channels(dmean_ptr, seq, c, C, num_seqs)
        dvar = _load_channels(dvar_ptr, seq, c, C, num_seqs)
        values = load_rows(val_ptr + seq * stride_ub + rows * stride_ut, keep, c, C).to(tl.float32)
        e = values - _load_channels(mean_ptr, seq, c, C, num_seqs)
        e -= _load_channels(mean_lo_ptr, seq, c, C, num_seqs)
        factor = _score_factor(e, dmean, dvar, _load_channels(var_ptr, seq, c, C, num_seqs))
        if dlse_ptr is not None:
            factor += _load_dlse(dlse_ptr, lse_ptr, seq, c, C, num_seqs)
        ds = alpha * factor
        if dscores_ptr is not None:
            ds += load_rows(dscores_ptr + at, keep, c, C)
        if ACROSS:
            du = add_product(v, tl.trans(ds), du, COMPUTE, PRECISION)
        else:
            du = add_product(ds, tl.trans(v), du, COMPUTE, PRECISION)
    if ACROSS:
        du = tl.trans(du)
    at = (seq * T + rows)[:, None] * A + a[None, :]
    tl.store(dx_ptr + at, du.to(dx_ptr.dtype.element_ty), mask=(t < hi)[:, None] & (a < A)[None, :])


def bwd_blocks(chip: Chip, itemsize: int, T: int, C: int, A: int) -> Blocks:
    """Tiles of the backward kernels; T is also the frames of an item. Chosen as the forward's are."""
    if A == 0:
        return Blocks(tile_rows(T, 32), pow2(C, 16, 128 if even(C) else 64), 16, 4)
    warps = product_warps(chip, itemsize, C, A)
    if itemsize == 4:
        return Blocks(tile_rows(T, 32), pow2(C, 16, 32 if chip.small else 64), 16, warps)
    # Registers are short: dv or du is kept beside a tile of everything else. Where rows are no whole vectors, each
    # element needs an address and a predicate too.
    whole = even(C, A)
    small = chip.from_registers or chip.arch // 10 == 10
    wgmma = chip.backend == "cuda" and not chip.from_registers
    block_t = 16 if chip.backend == "hip" else 64 if whole and wgmma else 32
    block_a = pow2(A, 16, 128 if A <= 128 and (whole or not chip.from_registers) else 64)
    block_c = 64 if whole and not small and block_a <= 64 else 32
    if small and whole and block_a <= 64:
        warps = 4
    return Blocks(tile_rows(T, block_t), pow2(C, 16, block_c), block_a, warps)


def statistics_bwd(
    dmean: Tensor, dvar: Tensor, dlse: Tensor | None, dscores: Tensor | None,
    x: Tensor, v: Tensor | None, values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None,
    mean: Tensor, var: Tensor, lse: Tensor, scores: Tensor, needs: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of (x, v, values), None where `needs` is False."""
    call = prepare(x, v, values, mask, cu_seqlens)
    need_x, need_v, need_values = needs
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    dvalues = torch.empty_like(values, memory_format=torch.contiguous_format) if need_values else None
    if call.seqs == 0 or call.length == 0:
        return [dx, torch.zeros_like(v) if need_v else None, dvalues]

    longest = call.length if cu_seqlens is None else LONG
    blocks = bwd_blocks(call.chip, values.element_size(), longest, call.C, call.A)
    items = partition(call.seqs, call.length, blocks.T, cu_seqlens)
    mean_hi = mean.float()
    common = {
        **call.tensors, **item_args(items), **call.sizes, **call.flags, **tile_args(call, blocks),
        "mean_ptr": mean_hi, "mean_lo_ptr": (mean - mean_hi).float(), "var_ptr": var, "lse_ptr": lse,
        "dmean_ptr": dmean.float().contiguous(), "dvar_ptr": dvar.contiguous(),
        "dlse_ptr": dlse if dlse is None else dlse.contiguous(),
    }  # fmt: skip
    del common["PER_CHANNEL"]
    with torch.cuda.device_of(values):
        if v is None:  # the scores are x, with all of their gradient
            for name in ("v_ptr", "stride_va", "A", "WHOLE", "COMPUTE", "PRECISION", "BLOCK_A"):
                del common[name]
            fma = call.chip.backend != "interpreter"
            kernel = fitted(_statistics_bwd_frame_kernel, common)
            kernel[(items.count,)](**common, dx_ptr=dx, dval_ptr=dvalues, FMA=fma)
            return [dx, None, dvalues]
        common["scores_ptr"] = scores if scores.numel() else None
        common["dscores_ptr"] = dscores if dscores is None else dscores.contiguous()
        dv = None
        if need_v or need_values:
            dv = _channels(call, blocks, items, common, dvalues, need_v)
        if need_x:
            grid = items.count, triton.cdiv(call.A, blocks.A)
            fitted(_statistics_bwd_features_kernel, common)[grid](**common, dx_ptr=dx)
    return [dx, None if dv is None else dv.sum(0).to(v.dtype), dvalues]


def _channels(
    call: Call, blocks: Blocks, items: Items, common: dict[str, object], dvalues: Tensor | None, need_v: bool
) -> Tensor | None:
    """Write dx, and return the partials of dv ``(splits, A, C)``: two programs a core, so that they are few."""
    channel_blocks, chunks = triton.cdiv(call.C, blocks.C), triton.cdiv(call.A, blocks.A) if need_v else 1
    splits = min(items.count, triton.cdiv(2 * call.chip.cores, channel_blocks * chunks))
    dv = None
    if need_v:
        dv = torch.empty(splits, call.A, call.C, dtype=torch.float32, device=common["val_ptr"].device)
    fitted(_statistics_bwd_values_kernel, common)[(channel_blocks * splits, chunks)](
        **common, dval_ptr=dvalues, dv_ptr=dv, items=items.count, items_per_split=triton.cdiv(items.count, splits),
    )  # fmt: skip
    return dv
