"""Backward of the windowed form of location attention, from the saved scores, out and (m, l).

With the dropout factor k_ij, 1 without dropout, sums over the positions i that see key j, r a hop:

    a_ijr    = exp(s_jr - m_ir) / l_ir                 δ_ir = dO_ir · o_ir - l_ir dl_ir
    ds_jr    = Σ_i a_ijr (k_ij dO_ir · value_j - δ_ir)
    dvalue_j = Σ_r Σ_i k_ij a_ijr dO_ir

Both are the forward's sums with positions and keys exchanged, over x = -m with the factor 1 / l: of the positions
that see all of a tile of keys the scanned state (m, l, o) with c = δ and value = dO is enough,

    ds_jr += e^{s_jr + m} (o · value_j - l)            dvalue_j += e^{s_jr + m} o

and no exponent is above 0, since s_jr <= m_ir where i sees j. Where key j has all the weight the two terms of ds
are equal. So in float32 they are one sum, of dO (k value - o), pair by pair, and float64 in the states; then a
gradient that is 0 comes out as one.

A position whose cotangents are all 0 takes no part, as if it saw nothing: it may be NaN, for having seen one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chip import LENGTHS, pow2
from .location import load_rows
from .location_window import band, prepare
from .masks import old_dropout_scale, old_locate, old_sequence_of, visible_pairs
from .products import add_product
from .softmax import exp, load_dlse, load_lse, store_lse


@triton.jit(do_not_specialize=LENGTHS)
def _location_window_delta_kernel(
    do_ptr,  # (B, T, R, DV) or (N, R, DV)
    out_ptr,  # the same, float32
    lse_ptr,  # (B, T, R, 2) or (N, R, 2) float32: (m, l)
    dlse_ptr,  # the same, or None
    delta_ptr,  # (B, T, R) or (N, R) float64
    seen_ptr,  # (B, T, R, 2) or (N, R, 2) float32: (m, l), (-inf, 0) where a position takes no part
    count,  # its numbers
    DV,
    BLOCK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    delta = tl.zeros([BLOCK], tl.float64)
    cotangent = tl.zeros([BLOCK], tl.float64)
    for d0 in range(0, DV, BLOCK_DV):
        d = d0 + tl.arange(0, BLOCK_DV)
        do = load_rows(do_ptr + row * DV, row < count, d, DV).to(tl.float64)
        cotangent += tl.sum(tl.abs(do), axis=1)
        delta += tl.sum(do * load_rows(out_ptr + row * DV, row < count, d, DV).to(tl.float64), axis=1)
    if dlse_ptr is not None:
        dlse = load_dlse(dlse_ptr + row * 2, lse_ptr + row * 2, row < count).to(tl.float64)
        cotangent += tl.abs(dlse)
        delta -= dlse
    part = cotangent != 0
    tl.store(delta_ptr + row, tl.where(part, delta, 0.0), mask=row < count)
    m = tl.load(lse_ptr + row * 2, mask=(row < count) & part, other=float("-inf"))
    l = tl.load(lse_ptr + row * 2 + 1, mask=(row < count) & part, other=0.0)
    store_lse(seen_ptr + row * 2, m, l, row < count)


@triton.jit
def _state_scores(
    s, keep, val_ptrs, m_ptr, l_ptr, o_ptr, some, DV, FMA: tl.constexpr, BLOCK_DV: tl.constexpr
):  # fmt: skip
    """What the positions of a state give to ds of the keys [BLOCK]: e^{s + m} (o · value - l)."""
    m = tl.load(m_ptr, mask=some, other=float("-inf"))
    gap = tl.zeros_like(s).to(l_ptr.dtype.element_ty) - tl.load(l_ptr, mask=some, other=0.0)
    for d0 in range(0, DV, BLOCK_DV):
        d = d0 + tl.arange(0, BLOCK_DV)
        o = tl.load(o_ptr + d, mask=some & (d < DV), other=0.0)
        gap += tl.sum(load_rows(val_ptrs, keep, d, DV).to(o.dtype) * o[None, :], axis=1)
    return tl.where(m == float("-inf"), 0.0, exp(s + m, FMA) * gap.to(tl.float32))


@triton.jit(do_not_specialize=LENGTHS)
def _location_window_bwd_scores_kernel(
    scores_ptr,  # (B, T, R) or (N, R) float32
    val_ptr, stride_vb, stride_vt,  # (B, T, DV) or (N, DV)
    m_ptr, l_ptr, o_ptr,  # scanned states, or None without SCAN
    seed_ptr,  # (1,) int64 or None
    do_ptr,  # (B, T, R, DV) or (N, R, DV)
    out_ptr,  # the same, float32
    lse_ptr,  # (B, T, R, 2) or (N, R, 2) float32: (m, l) of those that take part
    dlse_ptr,  # the same, or None
    delta_ptr,  # (B, T, R) or (N, R) float64
    ds_ptr,  # (B, T, R) or (N, R) float32
    cu_ptr, seq_ptr, first_ptr,  # see masks.Items
    num_seqs,
    per_seq,
    T,
    DV,
    left,
    right,
    threshold,
    scale,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SCAN: tl.constexpr,
    EXACT: tl.constexpr,
    FMA: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """A tile of keys and a hop: ds."""
    item = tl.program_id(0)
    r = tl.program_id(1)
    R = tl.num_programs(1)
    seq, start, lo, hi, _ = old_locate(item, cu_ptr, seq_ptr, first_ptr, T, num_seqs, per_seq, BLOCK)
    _, length, item0 = old_sequence_of(seq, cu_ptr, first_ptr, T, num_seqs, per_seq)
    j = lo + tl.arange(0, BLOCK)
    k_rows = (start + j).to(tl.int64)
    s = tl.load(scores_ptr + (seq * T + k_rows) * R + r, mask=j < hi, other=float("-inf"))
    keep = s != float("-inf")
    val_ptrs = val_ptr + seq * stride_vb + k_rows * stride_vt
    # Key j is seen from [j - right, j + left].
    tile0, tile1, state = band(lo, hi, length, right, left, HAS_RIGHT, HAS_LEFT, SCAN, BLOCK)
    ds = tl.zeros([BLOCK], tl.float32)
    if SCAN:
        slot = (item0 + state) * R + r
        ds += _state_scores(
            s, keep, val_ptrs, m_ptr + slot, l_ptr + slot, o_ptr + slot * DV, lo < hi, DV, FMA, BLOCK_DV
        )
    for tile in range(tile0, tl.where(lo < hi, tile1, tile0)):
        i = tile * BLOCK + tl.arange(0, BLOCK)
        inside = i < length
        at = (seq * T + start + i) * R + r
        shown = visible_pairs(
            i[:, None], j[None, :], inside[:, None] & keep[None, :], None, 0, 0, left, right, HAS_LEFT, HAS_RIGHT
        )  # fmt: skip
        top, inv = load_lse(lse_ptr + at * 2, inside)
        shown = shown & (inv != 0)[:, None]
        a = tl.where(shown, exp(s[None, :] - top[:, None], FMA) * inv[:, None], 0.0)
        if seed_ptr is not None:
            k = old_dropout_scale(seed_ptr, j[None, :], seq * R + r, i[:, None], threshold, scale)
        gap = tl.zeros([BLOCK, BLOCK], tl.float32)
        if EXACT:
            for d in range(0, DV):
                do = tl.load(do_ptr + at * DV + d, mask=inside, other=0.0).to(tl.float32)[:, None]
                out = tl.load(out_ptr + at * DV + d, mask=inside, other=0.0)[:, None]
                values = tl.load(val_ptrs + d, mask=keep, other=0.0)[None, :]
                if seed_ptr is not None:
                    values *= k
                gap = tl.fma(do, values - out, gap)
            if dlse_ptr is not None:
                gap += load_dlse(dlse_ptr + at * 2, lse_ptr + at * 2, inside)[:, None]
        else:
            for d0 in range(0, DV, BLOCK_DV):
                d = d0 + tl.arange(0, BLOCK_DV)
                do = load_rows(do_ptr + at * DV, inside, d, DV)
                values = load_rows(val_ptrs, keep, d, DV)
                gap = add_product(do, tl.trans(values), gap, COMPUTE, PRECISION)
            if seed_ptr is not None:
                gap *= k
            gap -= tl.load(delta_ptr + at, mask=inside, other=0.0).to(tl.float32)[:, None]
        ds += tl.sum(tl.where(shown, a * gap, 0.0), axis=0)
    tl.store(ds_ptr + (seq * T + k_rows) * R + r, ds, mask=j < hi)


@triton.jit(do_not_specialize=LENGTHS)
def _location_window_bwd_values_kernel(
    scores_ptr,  # (B, T, R) or (N, R) float32
    m_ptr, o_ptr,  # scanned states, or None without SCAN
    seed_ptr,  # (1,) int64 or None
    do_ptr,  # (B, T, R, DV) or (N, R, DV)
    lse_ptr,  # (B, T, R, 2) or (N, R, 2) float32: (m, l) of those that take part
    dvalue_ptr,  # (B, T, DV) or (N, DV), contiguous
    cu_ptr, seq_ptr, first_ptr,  # see masks.Items
    num_seqs,
    per_seq,
    T,
    R,
    DV,
    left,
    right,
    threshold,
    scale,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SCAN: tl.constexpr,
    FMA: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """A tile of keys and a part of the width: dvalue, over all hops."""
    item = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    seq, start, lo, hi, _ = old_locate(item, cu_ptr, seq_ptr, first_ptr, T, num_seqs, per_seq, BLOCK)
    _, length, item0 = old_sequence_of(seq, cu_ptr, first_ptr, T, num_seqs, per_seq)
    j = lo + tl.arange(0, BLOCK)
    k_rows = seq * T + start + j
    tile0, tile1, state = band(lo, hi, length, right, left, HAS_RIGHT, HAS_LEFT, SCAN, BLOCK)
    tile1 = tl.where(lo < hi, tile1, tile0)
    acc = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
    for r in range(0, R):
        s = tl.load(scores_ptr + k_rows * R + r, mask=j < hi, other=float("-inf"))
        keep = s != float("-inf")
        if SCAN:
            slot = (item0 + state) * R + r
            m = tl.load(m_ptr + slot, mask=lo < hi, other=float("-inf"))
            o = tl.load(o_ptr + slot * DV + d, mask=(lo < hi) & (d < DV), other=0.0)
            acc += tl.where(m == float("-inf"), 0.0, exp(s + m, FMA))[:, None] * o.to(tl.float32)[None, :]
        for tile in range(tile0, tile1):
            i = tile * BLOCK + tl.arange(0, BLOCK)
            inside = i < length
            at = (seq * T + start + i) * R + r
            shown = visible_pairs(
                i[None, :], j[:, None], inside[None, :] & keep[:, None], None, 0, 0, left, right, HAS_LEFT, HAS_RIGHT
            )  # fmt: skip
            top, inv = load_lse(lse_ptr + at * 2, inside)
            shown = shown & (inv != 0)[None, :]
            a = tl.where(shown, exp(s[:, None] - top[None, :], FMA) * inv[None, :], 0.0)  # [keys, positions]
            if seed_ptr is not None:
                a *= old_dropout_scale(seed_ptr, j[:, None], seq * R + r, i[None, :], threshold, scale)
            do = load_rows(do_ptr + at * DV, inside, d, DV)
            acc = add_product(a, do, acc, COMPUTE, PRECISION)
    tl.store(
        dvalue_ptr + k_rows[:, None] * DV + d[None, :],
        acc.to(dvalue_ptr.dtype.element_ty),
        mask=(j < hi)[:, None] & (d < DV)[None, :],
    )


def window_bwd(
    dout: Tensor, dlse: Tensor | None,
    scores: Tensor, values: Tensor, cu_seqlens: Tensor | None, seed: Tensor | None, out: Tensor, lse: Tensor,
    left: int | None, right: int | None, dropout_p: float, needs: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of (scores, values), None where `needs` is False."""
    need_scores, need_values = needs
    ds = torch.empty_like(scores, memory_format=torch.contiguous_format) if need_scores else None
    dvalue = torch.empty_like(values, memory_format=torch.contiguous_format) if need_values else None
    if lse.numel() == 0:
        return [None if grad is None else grad.zero_() for grad in (ds, dvalue)]
    call = prepare(scores, values, cu_seqlens, seed, left, right, dropout_p)
    dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
    delta = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
    seen = torch.empty_like(lse)
    DV, hops = values.shape[-1], call.hops
    args = {
        "do_ptr": dout, "out_ptr": out, "lse_ptr": lse, "dlse_ptr": dlse if dlse is None else dlse.contiguous(),
        "delta_ptr": delta, "seen_ptr": seen, "count": delta.numel(), "R": hops, "ds_ptr": ds, "dvalue_ptr": dvalue,
    }  # fmt: skip
    call.args.update(args)
    ragged = cu_seqlens is not None
    with torch.cuda.device_of(values):
        call.launch(
            _location_window_delta_kernel, triton.cdiv(delta.numel(), call.blocks.rows), BLOCK_DV=pow2(DV, 16, 32)
        )
        call.args["lse_ptr"] = seen
        states = {}
        if call.scan:
            rows = {"stride_vb": 0 if ragged else dout.stride(0), "stride_vt": hops * DV, "stride_vr": DV}
            states = call.states(
                DV, x_ptr=seen, c_ptr=delta, val_ptr=dout, **rows, LSE=True, REVERSE=right is not None
            )
        if need_scores:
            call.launch(_location_window_bwd_scores_kernel, call.items.count, hops, **states)
        if need_values:
            # Rows that are loaded a stage ahead need an address each: 255 registers and spills, where this has 120.
            width = max(16, call.blocks.DV // 2) if call.args["EXACT"] else call.blocks.DV
            grid = call.items.count, triton.cdiv(DV, width)
            call.launch(_location_window_bwd_values_kernel, *grid, num_stages=1, BLOCK_DV=width, **states)
    return [ds, dvalue]
