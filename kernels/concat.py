"""Concat (additive) attention: s_ij = v · act(q_i + k_j), softmax over j, weighted sum; no tanh an element.

With `SMOOTH` the softmax is of log σ(s_ij), whose e^s is a sigmoid.

Scores. tanh and sigmoid of a sum factor into exponentials made once a row (design 3.1): with

    tanh:     α = e^{2q}, β = e^{2k}:     Σ_d v_d tanh(q_d + k_d)  = Σ_d v_d - 2 Σ_d v_d / (1 + α_d β_d)
    sigmoid:  α = e^{-q}, β = e^{-k}:     Σ_d v_d σ(q_d + k_d)     =           Σ_d v_d / (1 + α_d β_d)

and two reciprocals share one, v0/x0 + v1/x1 = (v0 x1 + v1 x0) / (x0 x1): three operations of the FMA pipe and half
a special function an element. The product x0 x1 must stay a float32, so every tile of rows carries the bound
max|exponent|; a tile of queries and `UNIT` keys past it take a loop with one tanh an element: right everywhere. The
other activations are cheap and have a direct loop only.

float32 inputs (`EXACT`) have a loop of their own, with a reciprocal and six operations an element, that is as exact
as the textbook expression in float32:

    tanh(q + k) = y / (y + 2),  y = αβ - 1 by one rounding,  α = α_hi + α_lo,  β = β_hi + β_lo

Σv - 2 Σ v r would have the rounding of numbers near Σv in it, 15 times the error of a float32 tanh where v > 0 and
A = 128; y is exact where it is small. The rounding of α alone is one error for all keys of a query, and of β for all
queries of a key, which sums keep. And sums are made in groups. 16-bit inputs carry errors far above all of this.

The factors are made, and laid out by tiles, in concat_factors.py.

Forward: a program has a tile of queries and walks the tiles of keys that its window shows. Where there are too few
queries to fill the chip the keys are split, and `softmax.merge` joins the parts. The scores of a pair of tiles are
made once, however wide the values are: sums that registers do not hold stay in memory, of the size of the output in
float32, and each tile of keys adds to them, some columns at a time.
The backward is in concat_bwd.py.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, log_sigmoid
from .arguments import (
    constants,
    entries,
    head_ptr,
    heads,
    launch,
    load_pairs,
    pairs_as,
    pitch,
    width,
)
from .chip import (
    LENGTHS,
    LONG,
    Chip,
    all_registers,
    cdiv,
    chip_of,
    even,
    matmul_flags,
    pow2,
    rule,
    tile_rows,
    unit,
    unpressed,
    vectors,
)
from .concat_factors import FACTOR, bound_at, factors, pairs_at, rows_before, rows_of, tile_at, unit_bound
from .inputs import ConcatInputs, pair_starts
from .masks import (
    Items,
    dropout,
    dropout_scale,
    row_codes,
    split_tiles,
    unmasked,
    window,
    window_pairs,
    window_tiles,
)
from .products import add_product
from .softmax import finish, merge, new_lse, no_key, online_softmax, store_lse
from .tiles import load_rows, store_both, store_rows

SAFE, SAFE_EXACT = 42.0, 80.0
"""Largest |exponent of αβ| for which (1 + α0 β0)(1 + α1 β1), or with `EXACT` αβ, is a float32 (under e^88.7)."""

GROUP = 16
"""With `EXACT`, features that are summed before they meet the sum of the others."""


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    if FAST:  # one instruction, relative error 2^-23 at most by the PTX manual; 1.0 / x takes three
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def _score_factored(aq_ptr, ak_ptr, v_ptr, AP, flags, blocks):
    """Σ_d v_d / (1 + α_d β_d), [blocks.M, blocks.N]; two features a step."""
    acc = tl.zeros([blocks.M, blocks.N], tl.float32)
    m = tl.arange(0, blocks.M)
    n = tl.arange(0, blocks.N)
    for d in range(0, AP, 2):
        a0 = tl.load(aq_ptr + d * blocks.M + m)[:, None]
        a1 = tl.load(aq_ptr + (d + 1) * blocks.M + m)[:, None]
        b0 = tl.load(ak_ptr + d * blocks.N + n)[None, :]
        b1 = tl.load(ak_ptr + (d + 1) * blocks.N + n)[None, :]
        v0 = tl.load(v_ptr + d)
        v1 = tl.load(v_ptr + d + 1)
        # Which of two products goes into their sum unrounded is said, not left to each kernel's compilation.
        x0 = tl.fma(a0, b0, 1.0)
        x1 = tl.fma(a1, b1, 1.0)
        acc = tl.fma(tl.fma(v0, x1, v1 * x0), reciprocal(x0 * x1, flags.FAST), acc)
    return acc


@triton.jit
def _product_exact(aq_ptr, ak_ptr, d, AP, one, blocks):
    """one + α_d β_d, [blocks.M, blocks.N], from factors in two parts."""
    q_ptrs = aq_ptr + d * blocks.M + tl.arange(0, blocks.M)
    k_ptrs = ak_ptr + d * blocks.N + tl.arange(0, blocks.N)
    a = tl.load(q_ptrs)[:, None]
    b = tl.load(k_ptrs)[None, :]
    a_rest = tl.load(q_ptrs + AP * blocks.M)[:, None]
    b_rest = tl.load(k_ptrs + AP * blocks.N)[None, :]
    return tl.fma(a_rest, b, tl.fma(a, b_rest, tl.fma(a, b, one)))


@triton.jit
def _score_exact(aq_ptr, ak_ptr, v_ptr, AP, flags, blocks):
    """Σ_d v_d act(q_d + k_d) from the factors, to the precision of float32."""
    acc = tl.zeros([blocks.M, blocks.N], tl.float32)
    for first in range(0, AP, flags.GROUP):
        group = tl.zeros([blocks.M, blocks.N], tl.float32)
        for d in range(first, tl.minimum(first + flags.GROUP, AP)):
            v = tl.load(v_ptr + d)
            if flags.ACT == "tanh":
                y = _product_exact(aq_ptr, ak_ptr, d, AP, -1.0, blocks)
                group = tl.fma(v, y * reciprocal(y + 2.0, flags.FAST), group)
            else:
                x = _product_exact(aq_ptr, ak_ptr, d, AP, 1.0, blocks)
                group = tl.fma(v, reciprocal(x, flags.FAST), group)
        acc += group
    return acc


@triton.jit
def _score_direct(aq_ptr, ak_ptr, v_ptr, AP, flags, blocks):
    """Σ_d v_d act(q_d + k_d), [blocks.M, blocks.N], from tiles of q and k themselves."""
    acc = tl.zeros([blocks.M, blocks.N], tl.float32)
    m = tl.arange(0, blocks.M)
    n = tl.arange(0, blocks.N)
    for first in range(0, AP, flags.GROUP):
        group = tl.zeros([blocks.M, blocks.N], tl.float32)
        for d in range(first, tl.minimum(first + flags.GROUP, AP)):
            q = tl.load(aq_ptr + d * blocks.M + m)[:, None]
            k = tl.load(ak_ptr + d * blocks.N + n)[None, :]
            group += tl.load(v_ptr + d) * activate(q + k, flags.ACT, False)
        acc += group
    return acc


@triton.jit
def _score_raw(q_ptrs, q_keep, k_ptrs, k_keep, v_ptr, A, flags):
    """Σ_d v_d act(q_d + k_d) for tiles that do not factor, from rows of q and k: one exponential an element."""
    acc = tl.zeros([q_ptrs.shape[0], k_ptrs.shape[0]], tl.float32)
    for d in range(0, A):
        q = tl.load(q_ptrs + d, mask=q_keep, other=0.0).to(tl.float32)[:, None]
        k = tl.load(k_ptrs + d, mask=k_keep, other=0.0).to(tl.float32)[None, :]
        acc += tl.load(v_ptr + d) * activate(q + k, flags.ACT, False)
    return acc


@triton.jit
def concat_scores(
    q_item, tile, head, keys, q_side, k_side, q_ptrs, q_keep, k_ptrs, k_keep, v_ptr, v_sum, size, flags, blocks
):
    """Scores of a pair of tiles, [blocks.M, blocks.N] float32.

    keys: length and first tile of the sequence. q_ptrs, k_ptrs: raw rows, of which q_keep and k_keep may be read.
    v_ptr: (AP,) of this head, v_sum its sum.
    """
    k_length, k_item0 = keys
    q_tile = q_item.to(tl.int64) * size.H + head
    k_tile = (k_item0 + tile).to(tl.int64) * size.H + head
    aq = q_side.tiles + q_tile * size.AP * blocks.M
    ak = k_side.tiles + k_tile * size.AP * blocks.N
    if flags.FACTORED:
        bound = unit_bound(k_side, k_item0, tile, head, k_length, size.H, blocks.N)
        if bound_at(q_side, q_tile, blocks.M) + bound <= flags.SAFE:
            if flags.EXACT:
                aq += q_tile * size.AP * blocks.M
                ak += k_tile * size.AP * blocks.N
                s = _score_exact(aq, ak, v_ptr, size.AP, flags, blocks)
            else:
                s = _score_factored(aq, ak, v_ptr, size.AP, flags, blocks)
                if flags.ACT == "tanh":
                    s = v_sum - 2.0 * s
        else:
            s = _score_raw(q_ptrs, q_keep, k_ptrs, k_keep, v_ptr, size.A, flags)
    else:
        s = _score_direct(aq, ak, v_ptr, size.AP, flags, blocks)
    return s


@triton.jit
def finished(s, i, j, q_keep, k_keep, seq, head, bias, mask, k_side, k_length, window, flags):
    """What the softmax is of, from scores s of the queries i and keys j; and which of these pairs are visible."""
    i = i[:, None]
    j = j[None, :]
    inside = q_keep[:, None] & k_keep[None, :]
    shown = window_pairs(window, mask, k_side.pairs, seq, head, i, j, k_length, inside)
    if bias.ptr is not None:
        s += load_pairs(bias, k_side.pairs, seq, head, i, j, k_length, shown).to(tl.float32)
    if flags.SMOOTH:
        s = log_sigmoid(s)
    return s, shown


@triton.jit
def _add_values(sums_ptrs, q_inside, q_has, scale, p, value_ptrs, v_keep, size, flags, blocks):
    """Sums [blocks.M, DV] in memory, times scale where there are some yet, and what a tile of keys adds to them."""
    for dv0 in range(0, size.DV, blocks.DV):
        dv = dv0 + tl.arange(0, blocks.DV)
        values = load_rows(value_ptrs, v_keep, dv, size.DV)
        acc = load_rows(sums_ptrs, q_has, dv, size.DV) * scale[:, None]
        acc = add_product(p, values, acc, flags.COMPUTE, flags.PRECISION)
        store_rows(sums_ptrs, acc, q_inside, dv, size.DV)
    tl.debug_barrier()  # other threads than stored them may read these numbers


@triton.jit
def _store_whole(result, rows, q_has, acc, m, l, q_inside, size, blocks):
    """The output and (m, l) of a tile whose program has seen all its keys."""
    store_lse(result.lse + rows * 2, m, l, q_inside)
    inv = finish(l)[:, None]
    if blocks.HELD:
        store_both(result.out, result.exact, rows * size.DV, acc * inv, q_inside, 0, size.DV)
    else:
        for dv0 in range(0, size.DV, blocks.DV):
            dv = dv0 + tl.arange(0, blocks.DV)
            sums = load_rows(result.o + rows * size.DV, q_has, dv, size.DV)
            store_both(result.out, result.exact, rows * size.DV, sums * inv, q_inside, dv0, size.DV)


@triton.jit(do_not_specialize=LENGTHS)
def _concat_fwd_kernel(
    q,  # (B, H, Tq, A), or packed
    k,  # (B, H, Tk, A)
    v,
    value,  # (B, H, Tk, DV)
    bias,  # a number a pair, see Pairs, or None
    mask,  # the same
    q_rows,  # (B, Tq): rows that may be read, or None
    k_rows,  # (B, Tk)
    q_side,
    k_side,
    dropout,
    result,
    splits,
    Tq,  # with packed rows, of all
    Tk,
    window,
    size,
    flags,
    blocks,
):
    q_item = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    dv = tl.arange(0, blocks.DV)
    seq, q_start, lo, hi, _ = tile_at(q_item, q_side, Tq, blocks.M)
    k_start, k_length, k_item0 = rows_of(seq, k_side, Tk, blocks.N)
    i = lo + tl.arange(0, blocks.M)
    q_inside = i < hi
    q_at = (q_start + i).to(tl.int64)
    q_ptrs = head_ptr(q, seq, head) + q_at * pitch(q)
    q_keep = unmasked(q_rows, seq, q_at, q_inside)
    before = rows_before(seq, head, q_side, Tq, size.H)
    k_ptr = head_ptr(k, seq, head)
    value_ptr = head_ptr(value, seq, head)
    v_ptr = v.ptr + head * size.AP
    v_sum = tl.load(v.sum + head)

    m = tl.full([blocks.M], float("-inf"), tl.float32)
    l = tl.zeros([blocks.M], tl.float32)
    acc = tl.zeros([blocks.M, blocks.DV if blocks.HELD else 1], tl.float32)
    if not blocks.HELD:
        sums_ptrs = result.o + ((before + q_at) * splits + split) * size.DV
    tile0, tile1 = window_tiles(window, lo, hi, k_length, blocks.N)
    begin, end = split_tiles(tile0, tile1, split, splits)
    for tile in range(begin, end):
        j = tile * blocks.N + tl.arange(0, blocks.N)
        k_inside = j < k_length
        k_at = (k_start + j).to(tl.int64)
        k_keep = unmasked(k_rows, seq, k_at, k_inside)
        s = concat_scores(
            q_item,
            tile,
            head,
            (k_length, k_item0),
            q_side,
            k_side,
            q_ptrs,
            q_keep,
            k_ptr + k_at * pitch(k),
            k_keep,
            v_ptr,
            v_sum,
            size,
            flags,
            blocks,
        )
        s, shown = finished(s, i, j, q_keep, k_keep, seq, head, bias, mask, k_side, k_length, window, flags)
        s = tl.where(shown, s, float("-inf"))
        if result.scores is not None:
            pair = pairs_at(i[:, None], j[None, :], seq, head, q_side, k_side, k_length, Tq, Tk, size)
            tl.store(result.scores + pair, s, mask=q_inside[:, None] & k_inside[None, :])
        p, alpha, m, l = online_softmax(s, m, l, 1, flags.EXACT and flags.FMA)
        if dropout.seed is not None:
            p *= dropout_scale(dropout, j[None, :], seq * size.H + head, i[:, None])
        v_keep = k_keep
        if k_side.codes is not None:
            code = tl.load(k_side.codes + rows_before(seq, head, k_side, Tk, size.H) + k_at, mask=k_keep, other=0)
            v_keep = code == 1
            p = tl.where(shown & (code == 3)[None, :], float("nan"), p)
        value_ptrs = value_ptr + k_at * pitch(value)
        if blocks.HELD:
            values = load_rows(value_ptrs, v_keep, dv, size.DV)
            acc = add_product(p, values, acc * alpha[:, None], flags.COMPUTE, flags.PRECISION)
        else:
            q_has = q_inside & (tile > begin)
            _add_values(sums_ptrs, q_inside, q_has, alpha, p, value_ptrs, v_keep, size, flags, blocks)

    q_has = q_inside & (begin < end)
    if result.o is None:
        _store_whole(result, before + q_at, q_has, acc, m, l, q_inside, size, blocks)
    else:
        if splits == 1:
            _store_whole(result, before + q_at, q_has, acc, m, l, q_inside, size, blocks)
        else:
            rows = (before + q_at) * splits + split
            tl.store(result.m + rows, m, mask=q_inside)
            tl.store(result.l + rows, l, mask=q_inside)
            if blocks.HELD:
                store_rows(result.o + rows * size.DV, acc, q_inside, dv, size.DV)


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Sizes of one kernel's tiles: queries, keys, width of the values."""

    M: int
    N: int
    DV: int
    HELD: bool  # whether sums of that width are all, and stay in registers
    warps: int
    stages: int = 2


def _columns(DV: int, most: int) -> tuple[int, bool]:
    """Of `Blocks` the values' columns at a time, and whether that is all of them."""
    return pow2(DV, 16, most), most >= DV


@rule
def fwd_blocks(chip: Chip, itemsize: int, Tq: int, Tk: int, DV: int, factored: bool, busy: bool) -> Blocks:
    """Tiles of the forward: long in the keys, so that a lane has few rows of α to load for many elements.

    `busy`: a mask or bias a pair, scores of packed rows that are kept, a window or dropout, which need registers of
    their own, as addresses of rows do that are no vectors. Chosen by the compile report (no spills; 4.2 instructions
    an element on sm_90).
    On an H200 128 keys on 4 warps are 1.07 times as fast as 256 on 8, but sigmoid spills; all else tried was slower.
    """
    if chip.backend == "interpreter":
        return Blocks(16, 32, *_columns(DV, 16), 4)
    if itemsize == 4:
        # Without matrix units p V is unrolled over the tile's keys. 4 scores a thread are some 15 % more
        # instructions an element than 8, of which two numbers were put on the stack.
        if factored:
            return Blocks(16, 32, pow2(DV, 16, 128), True, 4, 1) if DV <= 128 else Blocks(16, 64, 32, False, 4, 1)
        return Blocks(16, tile_rows(Tk, 64), *_columns(DV, 64), 8)
    if chip.backend == "hip":  # 64 lanes a wave, 64 KiB of shared memory
        return Blocks(tile_rows(Tq, 32), tile_rows(Tk, 64 if busy else 128), *_columns(DV, 128), 4)
    plain = 64 if Tk <= 128 else 256 if factored and vectors(DV) else 128
    block_n = plain if not busy else 64 if Tq > 16 else 32
    most = (128 if Tq > 16 or DV <= 128 else 64) if even(DV) else 32 if vectors(DV) else 16
    return Blocks(tile_rows(Tq, 32), block_n, *_columns(DV, most), 4 if Tq <= 16 and block_n > 128 else 8)


class Result(NamedTuple):
    """What the forward leaves, contiguous, float32 but for `out`; where keys are split o, m and l of each part."""

    out: Tensor  # (B, H, Tq, DV) in the dtype of the values
    exact: Tensor | None  # the same, for a backward of 16 bits
    lse: Tensor  # (B, H, Tq, 2): (m, l), see softmax.py
    scores: Tensor | None  # (B, H, Tq, Tk), or packed (H, P), filled with -inf
    o: Tensor | None  # (B, H, Tq, splits, DV); for one part that is HELD any, or None
    m: Tensor | None  # (B, H, Tq, splits)
    l: Tensor | None


class Size(NamedTuple):
    """Heads, width of the score and as it is laid out, width of the values."""

    H: int
    A: int
    AP: int
    DV: int


class Flags(NamedTuple):
    """What kernels are compiled for."""

    ACT: str
    SMOOTH: bool  # scores go through the logarithm of the sigmoid
    FAST: bool
    FMA: bool
    FACTORED: bool
    EXACT: bool
    SAFE: float
    GROUP: int
    COMPUTE: object
    PRECISION: str


class Call(NamedTuple):
    """What the launches of one call share."""

    chip: Chip
    seqs: int
    busy: bool  # see fwd_blocks
    starts: Tensor | None  # of packed rows with a number a pair, see pair_starts
    size: Size
    flags: Flags
    args: dict[str, Any]  # by the kernels' names


def prepare(inputs: ConcatInputs, scored: bool, lse: Tensor | None = None) -> Call:
    """Arguments by the kernels' names, but for what `factors` makes.

    scored: a number a pair is returned, or comes back. lse: in a backward, which must not multiply with a query that
    sees nothing: it may be NaN.
    """
    query, key, value, _, score_bias, mask, *offsets, seed, activation, left, right, dropout_p, _ = inputs
    chip = chip_of(query.device)
    (B, H, Tq, A), Tk = query.shape, key.shape[2]
    packed_q, packed_k = (x is not None for x in offsets)
    seqs = next((x.numel() - 1 for x in offsets if x is not None), B)
    exact = value.dtype == torch.float32
    q_rows = k_rows = None
    if mask is not None:
        # Of all heads alike: what one of them alone may not use is told from the rest as what one query may not is.
        if mask.dim() != 3:
            k_rows = (mask if mask.dim() == 2 else mask.any(dim=(1, 2)).expand(B, -1)).view(torch.uint8)
        one = mask.dim() == 2 or mask.shape[1] == 1
        q_rows = None if lse is None else lse[:, 0, :, 1] if one else lse[..., 1].amax(1)  # l is 0
        mask = None if mask.dim() == 2 else mask.view(torch.uint8)
    starts = pair_starts(inputs) if inputs.packed and (scored or mask is not None or score_bias is not None) else None
    size = Size(H, A, A + A % 2, value.shape[-1])
    smooth = inputs.score_activation == "logsigmoid"
    flags = Flags(
        activation,
        smooth,
        chip.backend == "cuda",
        chip.backend != "interpreter",
        activation in FACTOR,
        exact,
        SAFE_EXACT if exact else SAFE,
        GROUP if exact else 2**20,
        *matmul_flags(chip, value.dtype).values(),
    )
    args = {
        "q": heads(unit(query), packed=packed_q),
        "k": heads(unit(key), packed=packed_k),
        "value": heads(unit(value), packed=packed_k),
        "bias": pairs_as(score_bias, (B, H, Tq, Tk), packed=inputs.packed),
        "mask": pairs_as(mask, (B, H, Tq, Tk), packed=inputs.packed),
        "q_rows": entries(q_rows, packed=packed_q),
        "k_rows": entries(k_rows, packed=packed_k),
        "dropout": dropout(seed, dropout_p),
        "Tq": Tq,
        "Tk": Tk,
        "window": window(left, right),
        "size": size._replace(A=width(A), AP=width(size.AP), DV=width(size.DV)),
        "flags": constants(flags),
    }
    masked = inputs.packed and k_rows is not None
    busy = masked or smooth or any(x is not None for x in (score_bias, mask, left, right, seed))
    return Call(chip, seqs, busy, starts, size, flags, args)


def concat_fwd(inputs: ConcatInputs, need_scores: bool, pairs: int, need_exact: bool) -> tuple[Tensor, ...]:
    """(out, lse, scores) as `fused_attn.reference.concat_attention` has them, and out in float32.

    The scores are written only where `need_scores` says so, of packed rows so many `pairs`, the last only where
    `need_exact` does, for the backward, which takes differences with it; else they are empty.
    """
    query, key, value, v, _, mask, *offsets, _, activation, left, right, _, _ = inputs
    cu_seqlens_q, cu_seqlens_k = (x if x is None else x.contiguous() for x in offsets)
    call = prepare(inputs, need_scores)
    (B, H, Tq, _), Tk, DV = query.shape, key.shape[2], value.shape[-1]
    out = value.new_empty(B, H, Tq, DV)
    exact = value.new_empty(out.shape if need_exact else (0,), dtype=torch.float32)
    lse = new_lse(B, H, Tq, device=query.device)
    shape = (H, pairs) if inputs.packed else (B, H, Tq, Tk)
    scores = lse.new_full(shape if need_scores else (0,), -torch.inf, dtype=torch.float32)
    if out.numel() == 0 or Tk == 0 or call.seqs == 0:
        return out.zero_(), no_key(lse), scores, exact.zero_()
    lengths = (LONG, LONG) if inputs.packed else (Tq, Tk)
    busy = call.busy or call.size.A == 1 or call.starts is not None
    blocks = fwd_blocks(call.chip, value.element_size(), *lengths, DV, call.flags.FACTORED, busy)
    made = factors(call.args, v, (cu_seqlens_q, cu_seqlens_k), (blocks.M, blocks.N), activation)
    splits = max(1, min(2 * call.chip.cores // (made.q_items * H), cdiv(Tk, 2 * blocks.N)))
    # One kernel for one part and for several, where that does not spill.
    o = m = l = None if blocks.HELD and (call.busy or call.flags.EXACT) else lse
    if splits > 1:
        o, m, l = (lse.new_empty(B, H, Tq, splits, *width) for width in ((DV,), (), ()))
    elif not blocks.HELD:
        o = exact if need_exact else out if out.dtype == torch.float32 else lse.new_empty(out.shape)
    some = left is not None or right is not None or (mask is not None and mask.dim() > 2)
    codes = row_codes(call.args["k_rows"].ptr, call.args["value"].ptr) if some else None
    args = made.args | {
        "k_side": made.args["k_side"]._replace(codes=codes, pairs=call.starts),
        "splits": splits,
        "result": Result(out, exact if need_exact else None, lse, scores if need_scores else None, o, m, l),
    }
    pressed = call.flags.EXACT or not call.flags.FACTORED
    registers = all_registers(call.chip) if pressed else unpressed(call.chip, DV)
    launch(_concat_fwd_kernel, (made.q_items, H, splits), args, blocks, **registers)
    if splits > 1:
        flat = B * H * Tq
        states = o.view(flat * splits, 1, DV), m.view(-1, 1), l.view(-1, 1)
        merge(
            *states,
            Items(flat * splits, 0, splits),
            out.view(flat, 1, DV),
            lse.view(flat, 1, 2),
            exact.view(flat, 1, DV) if need_exact else None,
            skip_single=False,
        )
    return out, lse, scores, exact
