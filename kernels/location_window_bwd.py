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

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import sequence_ptr
from .chip import LENGTHS, cdiv, pow2
from .inputs import WindowInputs
from .location_window import State, band, prepare
from .masks import dropout_scale, first_item, in_window, locate, mirrored, sequence_of
from .products import add_product
from .softmax import exp, finish, load_dlse, load_lse, pivot, store_lse
from .tiles import load_rows, store_rows


@triton.jit(do_not_specialize=LENGTHS)
def _location_window_bwd_totals_kernel(
    given,
    lse_ptr,  # as given.lse, but of all positions
    state,
    spans,
    num_seqs,
    per_seq,
    T,  # 0 where the batch is ragged
    DV,
    flags,
    blocks,
):
    """Of a tile of positions and a hop δ, (m, l) of those that take part, and with SCAN their state."""
    item = tl.program_id(0)
    r = tl.program_id(1)
    R = tl.num_programs(1)
    seq, start, lo, hi, _ = locate(item, spans, T, num_seqs, per_seq, blocks.T)
    i = lo + tl.arange(0, blocks.T)
    inside = i < hi
    at = (seq * T + start + i) * R + r
    delta = tl.zeros([blocks.T], tl.float64)
    cotangent = tl.zeros([blocks.T], tl.float64)
    for d0 in range(0, DV, blocks.DV):
        d = d0 + tl.arange(0, blocks.DV)
        do = load_rows(given.do + at * DV, inside, d, DV).to(tl.float64)
        cotangent += tl.sum(tl.abs(do), axis=1)
        delta += tl.sum(do * load_rows(given.out + at * DV, inside, d, DV).to(tl.float64), axis=1)
    if given.dlse is not None:
        dlse = load_dlse(given.dlse + at * 2, lse_ptr + at * 2, inside).to(tl.float64)
        cotangent += tl.abs(dlse)
        delta -= dlse
    part = cotangent != 0
    delta = tl.where(part, delta, 0.0)
    tl.store(given.delta + at, delta, mask=inside)
    m = tl.load(lse_ptr + at * 2, mask=inside & part, other=float("-inf"))
    l = tl.load(lse_ptr + at * 2 + 1, mask=inside & part, other=0.0)
    store_lse(given.lse + at * 2, m, l, inside)
    if flags.SCAN:
        factor = finish(l)
        keep = factor != 0.0
        x = tl.where(keep, -m, float("-inf"))
        top = tl.max(x, axis=0)
        p = (exp(x - pivot(top), flags.FMA) * factor).to(state.o.dtype.element_ty)
        slot = item.to(tl.int64) * R + r
        for d0 in range(0, DV, blocks.DV):
            d = d0 + tl.arange(0, blocks.DV)
            do = load_rows(given.do + at * DV, keep, d, DV).to(p.dtype)
            tl.store(state.o + slot * DV + d, tl.sum(p[:, None] * do, axis=0), mask=d < DV)
        tl.store(state.m + slot, top)
        tl.store(state.l + slot, tl.sum(p * tl.where(keep, delta, 0.0).to(p.dtype), axis=0))


@triton.jit
def _state_scores(s, keep, val_ptrs, scanned, slot, some, DV, FMA: tl.constexpr, BLOCK_DV: tl.constexpr):
    """What the positions of a state give to ds of the keys [BLOCK]: e^{s + m} (o · value - l)."""
    m = tl.load(scanned.m + slot, mask=some, other=float("-inf"))
    gap = tl.zeros_like(s).to(scanned.l.dtype.element_ty) - tl.load(scanned.l + slot, mask=some, other=0.0)
    for d0 in range(0, DV, BLOCK_DV):
        d = d0 + tl.arange(0, BLOCK_DV)
        o = tl.load(scanned.o + slot * DV + d, mask=some & (d < DV), other=0.0)
        gap += tl.sum(load_rows(val_ptrs, keep, d, DV).to(o.dtype) * o[None, :], axis=1)
    return tl.where(m == float("-inf"), 0.0, exp(s + m, FMA) * gap.to(tl.float32))


@triton.jit
def _gradient_of_scores(
    program, scores_ptr, values, scanned, dropout, given, ds_ptr, spans, num_seqs, per_seq, T, R, DV, window, flags,
    blocks,
):  # fmt: skip
    """A tile of keys and a hop: ds."""
    item = program // R
    r = program % R
    seq, start, lo, hi, _ = locate(item, spans, T, num_seqs, per_seq, blocks.T)
    _, length = sequence_of(seq, spans, T)
    item0 = first_item(seq, spans, per_seq, blocks.T)
    j = lo + tl.arange(0, blocks.T)
    k_rows = (start + j).to(tl.int64)
    s = tl.load(scores_ptr + (seq * T + k_rows) * R + r, mask=j < hi, other=float("-inf"))
    keep = s != float("-inf")
    val_ptrs = sequence_ptr(values, seq, k_rows)
    # Key j is seen from [j - right, j + left].
    tile0, tile1, state = band(lo, hi, length, mirrored(window), flags.SCAN, blocks.T)
    ds = tl.zeros([blocks.T], tl.float32)
    if flags.SCAN:
        slot = (item0 + state) * R + r
        ds += _state_scores(s, keep, val_ptrs, scanned, slot, lo < hi, DV, flags.FMA, blocks.DV)
    for tile in range(tile0, tile1):
        i = tile * blocks.T + tl.arange(0, blocks.T)
        inside = i < length
        at = (seq * T + start + i) * R + r
        both = inside[:, None] & keep[None, :]
        shown = in_window(window, i[:, None], j[None, :], both)
        top, inv = load_lse(given.lse + at * 2, inside)
        shown = shown & (inv != 0)[:, None]
        a = tl.where(shown, exp(s[None, :] - top[:, None], flags.FMA) * inv[:, None], 0.0)
        if dropout.seed is not None:
            k = dropout_scale(dropout, j[None, :], seq * R + r, i[:, None])
        gap = tl.zeros([blocks.T, blocks.T], tl.float32)
        if flags.EXACT:
            for d in range(0, DV):
                do = tl.load(given.do + at * DV + d, mask=inside, other=0.0).to(tl.float32)[:, None]
                out = tl.load(given.out + at * DV + d, mask=inside, other=0.0)[:, None]
                x = tl.load(val_ptrs + d, mask=keep, other=0.0)[None, :]
                if dropout.seed is not None:
                    x *= k
                gap = tl.fma(do, x - out, gap)
            if given.dlse is not None:
                gap += load_dlse(given.dlse + at * 2, given.lse + at * 2, inside)[:, None]
        else:
            for d0 in tl.range(0, DV, blocks.DV, num_stages=2):
                d = d0 + tl.arange(0, blocks.DV)
                do = load_rows(given.do + at * DV, inside, d, DV)
                x = load_rows(val_ptrs, keep, d, DV)
                gap = add_product(do, tl.trans(x), gap, flags.COMPUTE, flags.PRECISION)
            if dropout.seed is not None:
                gap *= k
            gap -= tl.load(given.delta + at, mask=inside, other=0.0).to(tl.float32)[:, None]
        ds += tl.sum(tl.where(shown, a * gap, 0.0), axis=0)
    tl.store(ds_ptr + (seq * T + k_rows) * R + r, ds, mask=j < hi)


@triton.jit
def _gradient_of_values(
    program, scores_ptr, scanned, dropout, given, dvalue_ptr, spans, num_seqs, per_seq, T, R, DV, window, flags,
    blocks,
):  # fmt: skip
    """A tile of keys and a part of the width: dvalue, over all hops."""
    parts = tl.cdiv(DV, blocks.DV)
    item = program // parts
    d = program % parts * blocks.DV + tl.arange(0, blocks.DV)
    seq, start, lo, hi, _ = locate(item, spans, T, num_seqs, per_seq, blocks.T)
    _, length = sequence_of(seq, spans, T)
    item0 = first_item(seq, spans, per_seq, blocks.T)
    j = lo + tl.arange(0, blocks.T)
    k_rows = seq * T + start + j
    tile0, tile1, state = band(lo, hi, length, mirrored(window), flags.SCAN, blocks.T)
    acc = tl.zeros([blocks.T, blocks.DV], tl.float32)
    for r in range(0, R):
        s = tl.load(scores_ptr + k_rows * R + r, mask=j < hi, other=float("-inf"))
        keep = s != float("-inf")
        if flags.SCAN:
            slot = (item0 + state) * R + r
            m = tl.load(scanned.m + slot, mask=lo < hi, other=float("-inf"))
            o = tl.load(scanned.o + slot * DV + d, mask=(lo < hi) & (d < DV), other=0.0)
            acc += tl.where(m == float("-inf"), 0.0, exp(s + m, flags.FMA))[:, None] * o.to(tl.float32)[None, :]
        for tile in range(tile0, tile1):
            i = tile * blocks.T + tl.arange(0, blocks.T)
            inside = i < length
            at = (seq * T + start + i) * R + r
            both = inside[None, :] & keep[:, None]
            shown = in_window(window, i[None, :], j[:, None], both)
            top, inv = load_lse(given.lse + at * 2, inside)
            shown = shown & (inv != 0)[None, :]
            a = tl.where(shown, exp(s[:, None] - top[None, :], flags.FMA) * inv[None, :], 0.0)  # [keys, positions]
            if dropout.seed is not None:
                a *= dropout_scale(dropout, j[:, None], seq * R + r, i[None, :])
            do = load_rows(given.do + at * DV, inside, d, DV)
            acc = add_product(a, do, acc, flags.COMPUTE, flags.PRECISION)
    store_rows(dvalue_ptr + k_rows * DV, acc, j < hi, d, DV)


@triton.jit(do_not_specialize=LENGTHS)
def _location_window_bwd_kernel(
    scores_ptr,  # (B, T, R) or (N, R) float32
    values,  # (B, T, DV) or (N, DV)
    scanned,
    dropout,
    given,
    ds_ptr,  # (B, T, R) or (N, R) float32, or None
    dvalue_ptr,  # (B, T, DV) or (N, DV), contiguous, or None
    spans,
    items,
    num_seqs,
    per_seq,
    T,
    R,
    DV,
    window,
    flags,
    blocks,
):
    """Gradients of the scores and of the values, by programs of their own."""
    program = tl.program_id(0)
    if ds_ptr is not None:
        if program < items * R:
            _gradient_of_scores(
                program, scores_ptr, values, scanned, dropout, given, ds_ptr, spans, num_seqs, per_seq, T, R, DV,
                window, flags, blocks,
            )  # fmt: skip
        program -= items * R
    if dvalue_ptr is not None:  # noqa: SIM102 — the one is known to the compiler, the other is not
        if program >= 0:
            _gradient_of_values(
                program, scores_ptr, scanned, dropout, given, dvalue_ptr, spans, num_seqs, per_seq, T, R, DV,
                window, flags, blocks,
            )  # fmt: skip


class Given(NamedTuple):
    """What the forward left, and its gradients; all contiguous."""

    do: Tensor  # (B, T, R, DV) or (N, R, DV)
    out: Tensor  # the same, float32
    lse: Tensor  # (B, T, R, 2) or (N, R, 2) float32: (m, l), (-inf, 0) where a position takes no part
    dlse: Tensor | None  # the same
    delta: Tensor  # (B, T, R) or (N, R) float64; these and (m, l) the first kernel leaves for the others


def window_bwd(
    inputs: WindowInputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of (scores, values), None where `needs` is False."""
    scores, values, *_ = inputs
    need_scores, need_values = needs
    ds = torch.empty_like(scores, memory_format=torch.contiguous_format) if need_scores else None
    dvalue = torch.empty_like(values, memory_format=torch.contiguous_format) if need_values else None
    if lse.numel() == 0:
        return [None if grad is None else grad.zero_() for grad in (ds, dvalue)]
    call = prepare(inputs)
    dout, out, lse, dlse = (x if x is None else x.contiguous() for x in (dout, out, lse, dlse))
    delta = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
    DV, hops, blocks = values.shape[-1], call.hops, call.blocks
    call.args.update(
        given=Given(dout, out, torch.empty_like(lse), dlse, delta),
        items=call.items.count,
        R=hops,
        ds_ptr=ds,
        dvalue_ptr=dvalue,
    )
    state = call.states(DV, scores) if call.flags.SCAN else State(None, None, None)
    narrow = blocks._replace(DV=pow2(DV, 16, 32))
    call.launch(_location_window_bwd_totals_kernel, call.items.count, hops, blocks=narrow, lse_ptr=lse, state=state)
    if call.flags.SCAN:
        call.args["scanned"] = call.scan(state, reverse=inputs.right is not None)
    # Rows that are loaded a stage ahead need an address each: 255 registers and spills, where this has 120.
    blocks = blocks._replace(DV=max(16, blocks.DV // 2) if call.flags.EXACT else blocks.DV, stages=1)
    programs = call.items.count * (hops * need_scores + cdiv(DV, blocks.DV) * need_values)
    if programs:
        call.launch(_location_window_bwd_kernel, programs, blocks=blocks)
    return [ds, dvalue]
