"""Backward of general attention, recomputed from (m, l): nothing of size Tq·Tk exists, sums have a fixed order.

With x_ij = scale q_i · k_j, a_ij = exp(s_ij - m_i) / l_i, κ_ij the dropout factor, δ_i = dO_i · o_i - l_i dl_i:

    g_ij = a_ij (κ_ij dO_i · value_j - δ_i) + dscores_ij           the gradient of s_ij, and of its bias,
                                                                   with `SMOOTH` times 1 - σ(s_ij)
    dq_i = scale Σ_j g_ij act'(x_ij) k_j          dk_j = scale Σ_i g_ij act'(x_ij) q_i
    dvalue_j = Σ_i κ_ij a_ij dO_i

One kernel has a tile of queries and walks the keys for dq, the other a tile of keys and walks the queries for dk and
dvalue, with its tiles of scores transposed: what it multiplies with comes from registers. Where the values are the
keys (`SHARED`) both terms go into one sum. Nothing is added to by two programs.

float32 inputs (`EXACT`, see general.py) take dO_i · (κ_ij value_j - o_i) as one sum: where one key has all the weight
it is 0, and not the difference of two roundings. Without matrix units for float32 this costs one operation more an
element. Σ_j a_ij of it is 0 but for the rounding of o, which all keys of a query have alike: a launch before the two
(`GAP`) takes it out, by way of δ. At scores of 100 gradients were off by up to 6 times what the reference's are.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate_grad, log_sigmoid_grad
from .arguments import launch, pitch
from .chip import LENGTHS, LONG, Chip, all_registers, cdiv, even, pow2, rule, tile_rows
from .general import (
    SCORE_PART,
    Blocks,
    Flags,
    coded_rows,
    first_row,
    fitting,
    head_rows,
    narrow_rows,
    pair_places,
    pair_terms,
    prepare,
    product,
    tile_scores,
    tile_start,
    whole_rows,
    whole_tiles,
    widths,
    with_scores,
)
from .inputs import GeneralInputs
from .masks import dropout_tile, locate, mirrored, partition, sequence_of, window_tiles
from .products import add_product
from .softmax import load_dlse, load_lse, power
from .tiles import load_rows, store_rows


class Given(NamedTuple):
    """Of the queries: the gradient of the output, and what the forward left."""

    do: Tensor  # (B, H, Tq, DV)
    out: Tensor  # (B, H, Tq, DV) float32
    lse: Tensor  # (B, H, Tq, 2) float32: (m, l), m in the units of `power`
    dlse: Tensor | None  # the same
    top: Tensor  # (B, H, Tq) float32: these three the first kernel leaves for the others: m or a finite number,
    inv: Tensor  # (B, H, Tq) float32: 1 / l, 0 where no key was seen,
    delta: Tensor  # (B, H, Tq) float32: δ
    dscores: Tensor | None  # (B, H, Tq, Tk), or packed (H, P), float32


class Grads(NamedTuple):
    """Those that a kernel makes, or None."""

    q: Tensor | None = None  # (B, H, Tq, D)
    stride_q: int = 0  # D again: with that, the compiler would make products before the loop, and keep them
    bias: Tensor | None = None  # (B, H, Tq, Tk), or packed (H, P), float32, zeros
    k: Tensor | None = None  # (B, H, Tk, D); with SHARED of both terms
    value: Tensor | None = None  # (B, H, Tk, DV)


@triton.jit
def _general_gap(
    do_ptrs,
    out_ptrs,
    q_keep,  # rows [BLOCK_M, 1] or [1, BLOCK_M], and which of them may be read
    val_ptrs,
    k_keep,  # [1, BLOCK_N] or [BLOCK_N, 1]
    keep,  # κ of the tile, or 1
    DV,
):
    """dO · (κ value - out) of a tile, either way round."""
    shape: tl.constexpr = [do_ptrs.shape[0] * val_ptrs.shape[0], do_ptrs.shape[1] * val_ptrs.shape[1]]
    acc = tl.zeros(shape, tl.float32)
    for d in range(0, DV):
        do = tl.load(do_ptrs + d, mask=q_keep, other=0.0)
        out = tl.load(out_ptrs + d, mask=q_keep, other=0.0)
        values = tl.load(val_ptrs + d, mask=k_keep, other=0.0)
        acc = tl.fma(do, values * keep - out, acc)
    return acc


@triton.jit
def _pair_cotangent(given, i, j, seq, head, Tq, Tk, k_spans, num_seqs, size, flags):
    """The gradient of the scores of a tile that were returned, or 0; before the product, see `pair_terms`."""
    dscores = 0.0
    if given.dscores is not None:
        at, there = pair_places(i, j, seq, head, Tq, Tk, k_spans, num_seqs, size, flags)
        dscores = tl.load(given.dscores + at, mask=there, other=0.0)
    return dscores


@triton.jit
def _general_gradient(
    x,  # q · k of a tile, either way round
    dp,  # dO · value; with EXACT dO · (κ value - out)
    bias,
    left,  # see pair_terms
    dscores,  # see _pair_cotangent
    i,
    j,  # positions of queries and keys, to broadcast to the tile
    inside,  # pairs of rows that may be read
    top,
    inv,
    delta,  # of the queries, see Given
    keep,  # κ of the tile, or 1
    given,
    grads,
    seq,
    head,
    Tq,  # of this sequence
    Tk,
    k_spans,
    num_seqs,
    window,
    size,
    flags,
    EDGE: tl.constexpr,  # some query may not see some key of this tile
    TEST: tl.constexpr,  # and that is not seen from (top, inv) or at the end of the kernel
):
    """(gradient of scale q · k, weight after dropout), 0 where a key is not visible; with GAP (a gap, weight)."""
    s, y, shown = tile_scores(x, i, j, inside, bias, left, window, size, flags, EDGE)
    p = power(s - top, flags.NATURAL, flags.FMA) * inv
    if flags.GAP:
        return tl.where(shown, p * dp, 0.0) if TEST else p * dp, p
    if flags.EXACT:
        g = p * (dp - delta)
    else:
        g = p * (dp * keep - delta)
    if given.dscores is not None:
        g += dscores
    if flags.SMOOTH:
        g *= log_sigmoid_grad(s)
    if TEST:
        p = tl.where(shown, p, 0.0)
        g = tl.where(shown, g, 0.0)  # by itself: values that are hidden may be NaN
    if grads.bias is not None:
        at, there = pair_places(i, j, seq, head, Tq, Tk, k_spans, num_seqs, size, flags)
        tl.store(grads.bias + at, g, mask=there)
    if flags.ACT != "identity":
        g *= activate_grad(x * size.scale, y, flags.ACT, flags.FAST)
        if TEST:
            g = tl.where(shown, g, 0.0)
    return g, p * keep


@triton.jit(do_not_specialize=LENGTHS)
def _general_bwd_dq_kernel(
    query,  # (B, H, Tq, D), or packed
    key,  # (B, H, Tk, D)
    value,  # (B, H, Tk, DV); the keys again where SHARED
    score_bias,  # a number a pair, see Pairs, or None
    mask,  # the same
    q_codes,  # (B, H, Tq, 1): which rows may be read, see row_codes, or None
    k_codes,  # (B, H, Tk, 1) or None
    q_spans,
    k_spans,
    dropout,
    given,
    grads,
    num_seqs,
    per_seq,
    Tq,
    Tk,
    window,
    size,
    flags,
    blocks,
):
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, blocks.D)
    d_out = tl.program_id(2) * blocks.D + d
    dv = tl.arange(0, blocks.DV)
    seq, q_start, lo, hi, _ = locate(tl.program_id(0), q_spans, Tq, num_seqs, per_seq, blocks.M)
    _, q_length = sequence_of(seq, q_spans, Tq)
    k_start, length = sequence_of(seq, k_spans, Tk)
    i = lo + tl.arange(0, blocks.M)
    q_inside = i < hi
    q_rows = (q_start + i).to(tl.int64)
    _, q_keep, _, _ = coded_rows(q_codes, seq, head, q_rows, q_inside)
    q_ptrs = head_rows(query, seq, head, q_rows)
    q = narrow_rows(q_ptrs, q_keep, d, size.D, flags.WIDE)
    row0 = first_row(q_spans, seq, head, size.H, Tq)
    do_ptrs = given.do + row0 * size.DV + q_rows * size.DV
    do = narrow_rows(do_ptrs, q_keep, dv, size.DV, flags.WIDE_V or flags.EXACT)
    lse_at = (row0 + q_rows) * 2
    top, inv = load_lse(given.lse + lse_at, q_keep)
    if flags.EXACT and not flags.GAP:
        delta = tl.load(given.delta + row0 + q_rows, mask=q_keep, other=0.0)
    else:
        delta = tl.zeros([blocks.M], tl.float32)
        if not flags.EXACT:  # of float32 the gap is made in the walk, -l dl is left of δ
            PART: tl.constexpr = 32 if blocks.DV > 32 else blocks.DV  # of whole rows some was put on the stack
            for d0 in range(0, size.DV, PART):
                part = d0 + tl.arange(0, PART)
                do_part = load_rows(do_ptrs, q_keep, part, size.DV).to(tl.float32)
                out = load_rows(given.out + row0 * size.DV + q_rows * size.DV, q_keep, part, size.DV)
                delta += tl.sum(do_part * out, axis=1)
        if given.dlse is not None:
            delta -= load_dlse(given.dlse + lse_at, given.lse + lse_at, q_keep)
        first = q_inside & (tl.program_id(2) == 0)  # for the other kernels: a division a query, not one a trip
        tl.store(given.top + row0 + q_rows, top, mask=first)
        tl.store(given.inv + row0 + q_rows, inv, mask=first)
        if not flags.GAP:
            tl.store(given.delta + row0 + q_rows, delta, mask=first)
    top = top[:, None]
    inv = inv[:, None]
    delta = delta[:, None]
    k_row0 = k_start.to(tl.int64)
    k_ptr = head_rows(key, seq, head, k_row0)
    val_ptr = head_rows(value, seq, head, k_row0)

    acc = tl.zeros([blocks.M, blocks.D], tl.float32)
    rest = tl.zeros([blocks.M], tl.float32)
    begin, end = window_tiles(window, lo, hi, length, blocks.N)
    if flags.GAP and not flags.EXACT:
        end = begin
    whole0, whole1 = whole_tiles(window, lo, hi, length, begin, end, flags.PLAIN, blocks.N)
    for EDGE in tl.static_range(0 if flags.PLAIN else 1, 2):  # the whole tiles, then those on either side
        for n in range(begin if EDGE else whole0, end - (whole1 - whole0) if EDGE else whole1):
            j0 = tile_start(n, whole0, whole1, EDGE, blocks.N)
            j = j0 + tl.arange(0, blocks.N)
            k_rows = j.to(tl.int64)
            k_seen = tl.full([blocks.N], True, tl.int1)
            k_keep = k_seen
            if EDGE or flags.MASKED:
                _code, k_seen, _whole, k_keep = coded_rows(k_codes, seq, head, k_row0 + k_rows, j < length)
                k_keep = k_keep if EDGE else k_seen
            k_ptrs = k_ptr + k_rows * pitch(key)
            val_ptrs = val_ptr + k_rows * pitch(value)
            k = narrow_rows(k_ptrs, k_keep, d, size.D, flags.WIDE)
            bias, left = pair_terms(
                i[:, None], j[None, :], score_bias, mask, seq, head, q_length, length, k_spans, flags, EDGE
            )
            dscores = _pair_cotangent(
                given, i[:, None], j[None, :], seq, head, q_length, length, k_spans, num_seqs, size, flags
            )
            x = product(q, q_ptrs, q_keep, k, k_ptrs, k_keep, size.D, flags.WIDE, flags, blocks.D)
            keep = 1.0
            if dropout.seed is not None:
                keep = dropout_tile(dropout, j0, seq * size.H + head, lo, blocks.N, blocks.M, False)
            if flags.EXACT:
                out_ptrs = (given.out + row0 * size.DV + q_rows * size.DV)[:, None]
                dp = _general_gap(
                    do_ptrs[:, None], out_ptrs, q_keep[:, None], val_ptrs[None, :], k_keep[None, :], keep, size.DV
                )
            else:
                if flags.SHARED and not flags.WIDE:
                    values = k
                else:
                    values = narrow_rows(val_ptrs, k_keep, dv, size.DV, flags.WIDE_V)
                dp = product(do, do_ptrs, q_keep, values, val_ptrs, k_keep, size.DV, flags.WIDE_V, flags, blocks.DV)
            inside = q_keep[:, None] & k_seen[None, :] if flags.PAIRS else k_seen[None, :]
            g, _p = _general_gradient(
                x,
                dp,
                bias,
                left,
                dscores,
                i[:, None],
                j[None, :],
                inside,
                top,
                inv,
                delta,
                keep,
                given,
                grads,
                seq,
                head,
                q_length,
                length,
                k_spans,
                num_seqs,
                window,
                size,
                flags,
                EDGE,
                EDGE or flags.MASKED,
            )
            if flags.GAP:
                rest += tl.sum(g, axis=1)
            else:
                if flags.WIDE:
                    k = load_rows(k_ptrs, k_keep, d_out, size.D)
                acc = add_product(g, k, acc, flags.COMPUTE, flags.PRECISION)
    if flags.GAP:
        tl.store(given.delta + row0 + q_rows[:, None], delta + rest[:, None], mask=q_inside[:, None])
    else:
        dq_ptrs = grads.q + row0 * grads.stride_q + q_rows * grads.stride_q
        store_rows(dq_ptrs, acc * size.scale, q_inside, d_out, size.D)


@triton.jit(do_not_specialize=LENGTHS)
def _general_bwd_dkv_kernel(
    query,  # (B, H, Tq, D), or packed
    key,  # (B, H, Tk, D)
    value,  # (B, H, Tk, DV); the keys again where SHARED
    score_bias,  # a number a pair, see Pairs, or None
    mask,  # the same
    q_codes,  # (B, H, Tq, 1): which rows may be read, see row_codes, or None
    k_codes,  # (B, H, Tk, 1) or None
    q_spans,
    k_spans,
    dropout,
    given,
    grads,
    num_seqs,
    per_seq,
    Tq,
    Tk,
    window,
    size,
    flags,
    blocks,
):
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, blocks.D)
    dv = tl.arange(0, blocks.DV)
    d_out = tl.program_id(2) * blocks.D + d
    dv_out = tl.program_id(2) * blocks.DV + dv
    seq, k_start, lo, hi, _ = locate(tl.program_id(0), k_spans, Tk, num_seqs, per_seq, blocks.N)
    q_start, length = sequence_of(seq, q_spans, Tq)
    _, k_length = sequence_of(seq, k_spans, Tk)
    j = lo + tl.arange(0, blocks.N)
    k_inside = j < hi
    k_rows = (k_start + j).to(tl.int64)
    _, k_keep, _, _ = coded_rows(k_codes, seq, head, k_rows, k_inside)
    k_ptrs = head_rows(key, seq, head, k_rows)
    val_ptrs = head_rows(value, seq, head, k_rows)
    k = narrow_rows(k_ptrs, k_keep, d, size.D, flags.WIDE)
    if flags.SHARED and not flags.WIDE:
        values = k
    else:
        values = narrow_rows(val_ptrs, k_keep, dv, size.DV, flags.WIDE_V or flags.EXACT)
    q_row0 = q_start.to(tl.int64)
    q_ptr = head_rows(query, seq, head, q_row0)
    row0 = first_row(q_spans, seq, head, size.H, Tq) + q_row0

    dk = tl.zeros([blocks.N, blocks.D], tl.float32)
    dval = tl.zeros([blocks.N, blocks.DV], tl.float32)
    # The queries that see a key of this tile: the window, looked through from its other end.
    behind = mirrored(window)
    begin, end = window_tiles(behind, lo, hi, length, blocks.M)
    whole0, whole1 = whole_tiles(behind, lo, hi, length, begin, end, flags.PLAIN, blocks.M)
    for EDGE in tl.static_range(0 if flags.PLAIN else 1, 2):  # the whole tiles, then those on either side
        for n in range(begin if EDGE else whole0, end - (whole1 - whole0) if EDGE else whole1):
            i0 = tile_start(n, whole0, whole1, EDGE, blocks.M)
            i = i0 + tl.arange(0, blocks.M)
            q_rows = i.to(tl.int64)
            q_keep = tl.full([blocks.M], True, tl.int1)
            q_good = q_keep
            if EDGE or flags.MASKED:
                _code, q_keep, q_good, _keep = coded_rows(q_codes, seq, head, q_row0 + q_rows, i < length)
                if flags.MASKED and not flags.PARTS:  # a query that sees nothing may be NaN
                    q_good = tl.load(given.inv + row0 + q_rows, mask=q_keep, other=0.0) != 0
            q_ptrs = q_ptr + q_rows * pitch(query)
            do_ptrs = given.do + row0 * size.DV + q_rows * size.DV
            q = narrow_rows(q_ptrs, q_good, d, size.D, flags.WIDE)
            bias, left = pair_terms(
                i[None, :], j[:, None], score_bias, mask, seq, head, length, k_length, k_spans, flags, EDGE
            )
            dscores = _pair_cotangent(
                given, i[None, :], j[:, None], seq, head, length, k_length, k_spans, num_seqs, size, flags
            )
            x = product(k, k_ptrs, k_keep, q, q_ptrs, q_good, size.D, flags.WIDE, flags, blocks.D)
            keep = 1.0
            if dropout.seed is not None:
                keep = dropout_tile(dropout, lo, seq * size.H + head, i0, blocks.N, blocks.M, True)
            do = narrow_rows(do_ptrs, q_good, dv, size.DV, flags.WIDE_V)
            if flags.EXACT:
                out_ptrs = (given.out + row0 * size.DV + q_rows * size.DV)[None, :]
                dp = _general_gap(
                    do_ptrs[None, :], out_ptrs, q_good[None, :], val_ptrs[:, None], k_keep[:, None], keep, size.DV
                )
            else:
                dp = product(values, val_ptrs, k_keep, do, do_ptrs, q_good, size.DV, flags.WIDE_V, flags, blocks.DV)
            # Of queries past the end inv is 0; what hidden keys get is not kept. But 0 · NaN, of a value, is NaN.
            inside = tl.full([1, 1], True, tl.int1)
            if flags.PAIRS:
                inside = q_keep[None, :] & k_keep[:, None]
            elif EDGE and flags.PARTS and not flags.SHARED:  # such keys are not read
                inside = q_keep[None, :]
            top = tl.load(given.top + row0 + q_rows, mask=q_keep, other=0.0)[None, :]
            inv = tl.load(given.inv + row0 + q_rows, mask=q_good, other=0.0)[None, :]
            delta = tl.load(given.delta + row0 + q_rows, mask=q_good, other=0.0)[None, :]
            g, p = _general_gradient(
                x,
                dp,
                bias,
                left,
                dscores,
                i[None, :],
                j[:, None],
                inside,
                top,
                inv,
                delta,
                keep,
                given,
                grads,
                seq,
                head,
                length,
                k_length,
                k_spans,
                num_seqs,
                window,
                size,
                flags,
                EDGE,
                EDGE and (flags.PAIRS or flags.PARTS),
            )
            if grads.k is not None:
                if flags.WIDE:
                    q = load_rows(q_ptrs, q_good, d_out, size.D)
                if flags.SHARED:  # whose sum has a second term
                    g *= size.scale
                dk = add_product(g, q, dk, flags.COMPUTE, flags.PRECISION)
            if grads.value is not None or flags.SHARED:
                if flags.WIDE_V:
                    do = load_rows(do_ptrs, q_good, dv_out, size.DV)
                if flags.SHARED:
                    dk = add_product(p, do, dk, flags.COMPUTE, flags.PRECISION)
                else:
                    dval = add_product(p, do, dval, flags.COMPUTE, flags.PRECISION)
    row0 = first_row(k_spans, seq, head, size.H, Tk)
    if grads.k is not None:
        if not flags.SHARED:
            dk *= size.scale
        dk = tl.where(k_keep[:, None], dk, 0.0)
        store_rows(grads.k + row0 * size.D + k_rows * size.D, dk, k_inside, d_out, size.D)
    if grads.value is not None:
        dval = tl.where(k_keep[:, None], dval, 0.0)
        store_rows(grads.value + row0 * size.DV + k_rows * size.DV, dval, k_inside, dv_out, size.DV)


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


@rule
def bwd_blocks(
    chip: Chip,
    itemsize: int,
    Tq: int,
    Tk: int,
    D: int,
    DV: int,
    plain: bool,
    busy: int,
    parts: bool,
    active: bool,
    shared: bool,
) -> tuple[Blocks, Blocks]:
    """Tiles of the kernel for dq, and of that for dk and dvalue; `plain`, `busy` and `active` as in the forward.

    parts: a key may be hidden from some queries only, which costs registers too; shared: values are the keys, whose
    gradient is two products.

    Chosen by the compile report (no spills; wgmma on sm_90 from 64 rows on); for sm_90 timed on an H200.
    """
    if chip.backend == "interpreter":
        blocks = Blocks(16, 32, pow2(D, 16, 32), pow2(DV, 16, 32), 4, 2)
        return blocks, blocks
    hip, roomy = chip.backend == "hip", chip.shared > 200_000
    if itemsize == 4:  # without matrix units a product is unrolled over its width
        width, value_width = pow2(D, 16, SCORE_PART), pow2(DV, 16, 32)
        if chip.hopper and plain and Tq <= 16:
            return Blocks(16, 32, width, value_width, 4, 1), Blocks(16, 128, width, value_width, 8, 1)
        for_q = Blocks(32, 32 if plain else 16, width, value_width, 8, 1)
        return for_q, Blocks(32, 32, width, value_width, 4 if hip else 8, 1)
    width, value_width = widths(D, DV)
    m, n = tile_rows(Tq, 64), tile_rows(Tk, 64)
    few_m, few_n = min(m, 32), min(n, 32)
    size = max(width, value_width)
    if hip:  # a thread of 4 waves has up to 512 registers
        for_k = Blocks(16 if size > 128 or not plain else few_m, few_n, width, value_width, 4, 1)
        return Blocks(few_m, few_n, width, value_width, 4, 1), for_k
    if max(D, DV) > 256 and (width == 64 or even(D, DV)):
        stages = 2 if roomy else 1
        for_k = Blocks(few_m, n if roomy and not busy and chip.arch != 100 else few_n, width, value_width, 8, stages)
        return Blocks(few_m if busy else m, few_n, width, value_width, 8, stages), for_k
    cut = width > D or value_width > DV  # columns past the end, of which a thread has predicates
    if not whole_rows(chip, Tq, D, DV, not (busy or active or (parts and not plain))):  # mask and window spilled
        few = max(16, 4096 // (max(size, 64) * (2 if busy else 1)))  # a busy pair needs registers as a wide row does
        for_q = Blocks(min(m, few), min(n, few), width, value_width, 8, 1)
        for_k = for_q._replace(N=min(n, few if plain and not parts else max(16, few // 2)))
        if parts and size > 128:
            for_k = for_k._replace(D=min(width, 128), DV=min(value_width, 128))
        return for_q, for_k
    if busy and chip.hopper and size <= 128 and min(Tq, Tk) > 32:
        # 64 rows for wgmma, and 16 pairs a thread or 8; with more stages products wait for each other (C7515).
        few_n = 32 if size < 128 or busy < 2 else 16
        for_q = Blocks(64, few_n, width, value_width, 4, 1)
        if size < 128 or busy < 3:
            return for_q, Blocks(32 if size < 128 and busy < 2 else 16, 64, width, value_width, 4, 1)
        return for_q, Blocks(16, 64, width, value_width, 8, 1)  # 4 warps have room where keys are values, else not
    if busy:
        short = size > 128 or (size == 128 and busy and (chip.small or parts))
        few = 16 if size > 128 else few_m
        for_k = Blocks(few, 16 if short else few_n, width, value_width, 8, 1)
        for_q = Blocks(16, few_n, width, value_width, 8, 1)
        halves = {"D": min(width, 128), "DV": min(value_width, 128)}  # for whole rows spilled
        if busy and size > 128 and (chip.small or cut):
            for_k = for_k._replace(**halves)
        return for_q._replace(**halves) if busy and cut else for_q, for_k
    if chip.hopper and size > 128 and Tq <= 16 and not parts:
        return Blocks(16, 128, width, value_width, 4, 2), Blocks(few_m, few_n, width, value_width, 8, 2)
    if chip.hopper and size == 128 and Tq > 64:
        # wgmma has rows of 64 a warp group: fewer keys than 128 for 8 warps, and mma takes half the width each. Where
        # codes of rows are walked too, 64 queries spilled.
        for_k = Blocks(m if plain and not parts else few_m, tile_rows(Tk, 128), width, value_width, 8, 2)
        return Blocks(64, n, width, value_width, 4, 2) if parts else Blocks(128, n, width, value_width, 8, 3), for_k
    if chip.hopper and size > 128 and Tq > 64 and not cut:  # 128 rows, for the same reason: 60 to 20 a pair, 99 to 54
        for_q = Blocks(128, 32, width, value_width, 8, 2)
        m_k, stages = (16, 3) if (parts or Tq == LONG) and shared else (few_m, 2)
        for_k = Blocks(m_k, 128 if Tk > 64 else few_n, max(width, 32), max(value_width, 32), 8, stages)
        return for_q, for_k
    if size > 128:
        m_q = few_m if cut or (active and chip.arch == 100) else m
        for_q = Blocks(m_q, 16 if chip.small else few_n, width, value_width, 8, 2)
        return for_q, Blocks(few_m, 16 if parts and (cut or shared) else few_n, width, value_width, 8, 2)
    large = size > 64
    n_k = few_n if large and parts and not roomy else n
    warps = 8 if large or (parts and not roomy) else 4
    short = large or not roomy or not (plain or even(D, DV))  # rows of vectors of 4 spilled under a mask
    for_k = Blocks(few_m if short else m, n_k, width, value_width, warps, 2)
    n_q = 64 if large and chip.hopper else n  # few variants: more than 64 queries have two lengths of keys above
    return Blocks(m, n_q, width, value_width, 8 if large and not roomy else 4, 2), for_k


def general_bwd(
    inputs: GeneralInputs,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dscores: Tensor | None,
    natural: bool,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of (query, key, value, score_bias), None where `needs` is False.

    natural: as the forward had it, which then took e^s of its scores (see general.py).
    """
    call = prepare(inputs, natural, dscores is not None, backward=True)
    query, key, value, score_bias, _, cu_seqlens_q, cu_seqlens_k, *_ = inputs
    need_q, need_k, need_value, need_bias = needs
    (B, H, Tq, D), Tk, DV = query.shape, key.shape[2], call.size.DV
    exact, parts = call.flags.EXACT, call.flags.PARTS
    dq = torch.empty(query.shape, dtype=query.dtype, device=query.device) if need_q else None
    dk = torch.empty(key.shape, dtype=key.dtype, device=key.device) if need_k else None
    dvalue = torch.empty(value.shape, dtype=value.dtype, device=value.device) if need_value else None
    pairs = (1, H, score_bias.shape[-1]) if need_bias and inputs.packed else (B, H, Tq, Tk)
    dbias = torch.zeros(pairs, dtype=torch.float32, device=query.device) if need_bias else None
    if query.numel() and key.numel() and call.seqs:
        left = (torch.empty(B, H, Tq, dtype=torch.float32, device=query.device) for _ in range(3))
        dout, out, lse, dlse, dscores = (x if x is None else x.contiguous() for x in (dout, out, lse, dlse, dscores))
        given = Given(dout, out, lse, dlse, *left, dscores)
        busy = call.busy + (dscores is not None)
        flags = with_scores(call.flags, dscores is not None or need_bias, 1 if inputs.packed else Tk)

        def run(kernel, grid: tuple[int, ...], blocks: Blocks, flags: Flags, **more: object) -> None:
            wide = inputs.packed and max(D, DV) > 128 and not call.chip.hopper  # dk and dvalue spilled
            tight = exact or blocks.D < D or blocks.DV < DV or busy or wide or not even(D, DV)
            args = {**call.args, "given": given, "flags": fitting(flags, call.size, blocks), **more}
            launch(kernel, grid, args, blocks, **(all_registers(call.chip) if tight else {}))

        lengths = (LONG, LONG) if inputs.packed else (Tq, Tk)
        plain = not (busy or call.flags.MASKED)
        terms = plain, busy, parts, call.active
        for_q, for_k = bwd_blocks(call.chip, key.element_size(), *lengths, D, DV, *terms, call.flags.SHARED)
        # A launch for δ: float32 takes the rounding of o out, the others have it from that for dq, if there is one.
        fine = exact and (need_q or need_k or need_bias)
        items = partition(call.seqs, Tq, for_q.M, cu_seqlens_q)
        of_queries = {"per_seq": items.per_seq}
        if fine or not (need_q or need_bias):
            only = {**of_queries, "grads": Grads(), "given": given._replace(dscores=None)}
            run(_general_bwd_dq_kernel, (items.count, H, 1), for_q, flags._replace(GAP=True, EXACT=fine), **only)
        if need_q or need_bias:
            grid = items.count, H, cdiv(D, for_q.D)
            made = Grads(torch.empty(query.shape, dtype=query.dtype, device=query.device) if dq is None else dq, D)
            run(_general_bwd_dq_kernel, grid, for_q, flags, **of_queries, grads=made._replace(bias=dbias))
        if need_k or need_value:
            items = partition(call.seqs, Tk, for_k.N, cu_seqlens_k)
            grid = items.count, H, max(cdiv(D, for_k.D), cdiv(DV, for_k.DV))
            of_keys = {"per_seq": items.per_seq}
            made = [Grads(k=dk, value=dvalue)]
            sums = for_k.N * (for_k.D + for_k.DV) // (32 * for_k.warps)
            if dk is not None and dvalue is not None and sums > 128:  # a thread has no room for both
                made = [Grads(k=dk), Grads(value=dvalue)]
            for grads in made:
                run(_general_bwd_dkv_kernel, grid, for_k, flags, **of_keys, grads=grads)
    else:
        dq, dk, dvalue = (None if x is None else x.zero_() for x in (dq, dk, dvalue))
    return [dq, dk, dvalue, dbias.sum_to_size(score_bias.shape).to(score_bias.dtype) if need_bias else None]
