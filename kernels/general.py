"""General (bilinear and dot) attention: s_ij = act(scale q_i · k_j) + bias_ij, softmax over j, weighted sum.

With `SMOOTH` the softmax is of log σ(s_ij), whose e^s is a sigmoid.

Tiles of queries meet tiles of keys on matrix units, with an online softmax (FlashAttention; Dao et al. 2022): nothing
of size Tq·Tk is stored. A bilinear weight has met the queries before.

- 16-bit inputs work in base 2, 2^(s log2 e): the factor log2 e shares the multiplication with `scale`, and one
  instruction makes the exponential. float32 inputs (`EXACT`, unless PyTorch is set to allow TF32) and calls that
  return the scores, have a bias or are `SMOOTH` are `NATURAL`: they take e^s itself, see `softmax.exp`. In float32
  the rounding of s log2 e would be a relative error of keys that weigh alike, and of a bias that is the least float32
  it would be -inf, which hides. The maximum that is kept for the backward is in the units of the scores: converted
  and back it would be off by one step, which at 1e9 is 64.
- Where the values are the keys (`SHARED`) one load of a tile serves both products: half the traffic, which decides
  when there are few queries. A tile holds widths up to 256; wider keys (`WIDE`) are loaded in parts for the score,
  and the values' width is divided among programs, each of which makes the scores again.
- A tile that all its queries see whole needs no comparisons. Where nothing but the window and the ends hide keys
  (`PLAIN`), these tiles have a loop of their own.
- Where there are too few queries to fill the chip, as in a decoder's step, the keys are split, and `softmax.merge`
  joins the parts.

The backward is in general_bwd.py.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, log_sigmoid
from .arguments import (
    constants,
    head_ptr,
    heads,
    launch,
    load_pairs,
    pairs_as,
    pitch,
    whole_pitch,
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
    unit,
    unpressed,
    vectors,
)
from .inputs import GeneralInputs, pair_starts
from .masks import (
    Items,
    Spans,
    dropout,
    dropout_tile,
    in_window,
    locate,
    partition,
    row_codes,
    sequence_of,
    split_tiles,
    whole_window,
    window,
    window_tiles,
)
from .products import add_product, tile_product
from .softmax import LOG2E, finish, merge, new_lse, no_key, online_softmax, store_lse
from .tiles import load_rows, store_both, store_rows

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def score(y, bias, scale, rate: tl.constexpr, ACT: tl.constexpr):
    """(scale y or y after an activation) rate + bias, rounded at the same places in every kernel.

    Whether a product is rounded before it goes into a sum is the compiler's to choose, a kernel at a time. A forward
    and a backward that do not agree have other weights, by per mille at scores of thousands. So it is said here: one
    fma, or what the activation gives and 0, which rounds it.
    """
    if ACT == "identity":
        return tl.fma(y, scale * rate, bias)
    return tl.fma(y + 0.0, rate, bias)


@triton.jit
def pair_terms(i, j, score_bias, mask, seq, head, Tq, Tk, k_spans, flags, EDGE: tl.constexpr):
    """(bias in the units of `power`, pairs that a mask leaves) of a tile, before the product that they are added to.

    Triton gives the maximum of a row the layout of the load that comes last before it. Were that one of these, and
    not the product, all of the softmax would be made in two layouts. Rows are loaded to their ends, hidden pairs too:
    with a test a pair a load would be no vector. Tq, Tk: lengths of this sequence.
    """
    rate: tl.constexpr = 1.0 if flags.NATURAL else LOG2E
    bias = 0.0
    left = True
    starts = k_spans.pairs
    if EDGE:
        if mask.ptr is not None:
            there = (i < Tq) & (j < whole_pitch(Tk, mask.EVEN))
            left = load_pairs(mask, starts, seq, head, i, j, Tk, there) != 0
        if score_bias.ptr is not None:
            there = (i < Tq) & (j < whole_pitch(Tk, score_bias.EVEN))
            bias = load_pairs(score_bias, starts, seq, head, i, j, Tk, there).to(tl.float32) * rate
    return bias, left


@triton.jit
def pair_places(i, j, seq, head, Tq, Tk, k_spans, num_seqs, size, flags):
    """(where a tile is in a contiguous (B, H, Tq, Tk), or of packed rows (H, pairs), which of its pairs exist).

    Tq, Tk: lengths of this sequence.
    """
    pitch = whole_pitch(Tk, flags.EVEN)
    if k_spans.pairs is None:
        first = (seq * size.H + head) * Tq * pitch
    else:
        first = head * tl.load(k_spans.pairs + num_seqs) + tl.load(k_spans.pairs + seq)
    return first + i.to(tl.int64) * pitch + j, (i < Tq) & (j < pitch)


@triton.jit
def tile_scores(x, i, j, inside, bias, left, window, size, flags, EDGE: tl.constexpr):
    """(scores in the units of `power`, what the activation gave, visible pairs) of x = q · k, either way round.

    i, j: positions of queries and keys, to broadcast to the tile. inside: pairs of rows that may be read. bias, left:
    of `pair_terms`. EDGE: some query may not see some key of this tile.
    """
    rate: tl.constexpr = 1.0 if flags.NATURAL else LOG2E
    y = x if flags.ACT == "identity" else activate(x * size.scale, flags.ACT, flags.FAST)
    shown = in_window(window, i, j, inside & left) if EDGE else inside  # after the product, which needs the registers
    s = score(y, bias, size.scale, rate, flags.ACT)
    if flags.SMOOTH:
        s = log_sigmoid(s)
    return s, y, shown


@triton.jit
def product(
    a,
    a_ptrs,
    a_keep,  # [BLOCK_A, BLOCK_D]; with WIDE in place of it [BLOCK_A] rows, and which of them may be read
    b,
    b_ptrs,
    b_keep,  # [BLOCK_B, BLOCK_D] and so on
    width,
    WIDE: tl.constexpr,
    flags,
    BLOCK_D: tl.constexpr,
):
    """a bᵀ, [BLOCK_A, BLOCK_B] float32, of tiles or of rows that are wider than a tile."""
    if WIDE:
        acc = tl.zeros([a_ptrs.shape[0], b_ptrs.shape[0]], tl.float32)
        for d0 in range(0, width, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            a_part = load_rows(a_ptrs, a_keep, d, width)
            b_part = load_rows(b_ptrs, b_keep, d, width)
            acc = add_product(a_part, tl.trans(b_part), acc, flags.COMPUTE, flags.PRECISION)
    else:
        acc = tile_product(a, tl.trans(b), flags.COMPUTE, flags.PRECISION)
    return acc


@triton.jit
def head_rows(x, seq, head, row):
    """Pointers to rows of a head of a sequence, all int64."""
    return head_ptr(x, seq, head) + row * pitch(x)


@triton.jit
def coded_rows(codes, seq, head, row, inside):
    """Of rows of a head of a sequence: (codes, see masks.row_codes; those that are not 0, that are 1, and 1 or 2)."""
    code = inside
    seen = inside
    whole = inside
    keep = inside
    if codes.ptr is not None:
        code = tl.load(head_rows(codes, seq, head, row), mask=inside, other=0)
        seen = code != 0
        whole = code == 1
        keep = seen & (code != 3)
    return code, seen, whole, keep


@triton.jit
def narrow_rows(ptrs, keep, cols, width, WIDE: tl.constexpr):
    """A tile of rows that it holds; where it does not, 0: `product` reads them in parts."""
    rows = 0.0
    if not WIDE:
        rows = load_rows(ptrs, keep, cols, width)
    return rows


@triton.jit
def first_row(spans, seq, head, H, T):
    """Of a head of a sequence, both int64, among the rows of a contiguous (B, H, T, ...); all of a packed one."""
    if spans.cu is None:
        row = (seq * H + head) * T
    else:
        row = head * T
    return row


@triton.jit
def whole_tiles(window, lo, hi, length, begin, end, PLAIN: tl.constexpr, BLOCK: tl.constexpr):
    """First and past-the-last of the tiles [begin, end) that all rows of [lo, hi) see whole; none if not PLAIN."""
    whole0 = begin
    whole1 = begin
    if PLAIN:
        first, last = whole_window(window, lo, hi, length)
        whole0 = tl.minimum(tl.maximum(tl.cdiv(first, BLOCK), begin), end)
        whole1 = tl.maximum(tl.minimum(last // BLOCK, end), whole0)
    return whole0, whole1


@triton.jit
def tile_start(n, whole0, whole1, EDGE: tl.constexpr, BLOCK: tl.constexpr):
    """The first row of a tile that is walked: n counts the whole ones, or with EDGE those on either side of them."""
    tile = tl.where(n < whole0, n, n + (whole1 - whole0)) if EDGE else n
    return tile * BLOCK


@triton.jit(do_not_specialize=LENGTHS)
def _general_fwd_kernel(
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
    result,
    splits,
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
    split = tl.program_id(2) % splits
    dv = (tl.program_id(2) // splits) * blocks.DV + tl.arange(0, blocks.DV)
    seq, q_start, lo, hi, _ = locate(tl.program_id(0), q_spans, Tq, num_seqs, per_seq, blocks.M)
    _, q_length = sequence_of(seq, q_spans, Tq)
    k_start, length = sequence_of(seq, k_spans, Tk)
    i = lo + tl.arange(0, blocks.M)
    q_inside = i < hi
    q_rows = (q_start + i).to(tl.int64)
    _, q_keep, _, _ = coded_rows(q_codes, seq, head, q_rows, q_inside)
    q_ptrs = head_rows(query, seq, head, q_rows)
    q = narrow_rows(q_ptrs, q_keep, d, size.D, flags.WIDE)
    k_row0 = k_start.to(tl.int64)
    k_ptr = head_rows(key, seq, head, k_row0)
    val_ptr = head_rows(value, seq, head, k_row0)

    m = tl.full([blocks.M], float("-inf"), tl.float32)
    l = tl.zeros([blocks.M], tl.float32)
    acc = tl.zeros([blocks.M, blocks.DV], tl.float32)
    tile0, tile1 = window_tiles(window, lo, hi, length, blocks.N)
    begin, end = split_tiles(tile0, tile1, split, splits)
    begin = tl.minimum(begin, end)
    whole0, whole1 = whole_tiles(window, lo, hi, length, begin, end, flags.PLAIN, blocks.N)
    for EDGE in tl.static_range(0 if flags.PLAIN else 1, 2):  # the whole tiles, then those on either side
        for n in range(begin if EDGE else whole0, end - (whole1 - whole0) if EDGE else whole1):
            j0 = tile_start(n, whole0, whole1, EDGE, blocks.N)
            j = j0 + tl.arange(0, blocks.N)
            k_rows = j.to(tl.int64)
            k_seen = tl.full([blocks.N], True, tl.int1)
            k_keep = k_seen
            v_keep = k_seen
            if EDGE or flags.MASKED:
                code, k_seen, v_keep, k_keep = coded_rows(k_codes, seq, head, k_row0 + k_rows, j < length)
                k_keep = v_keep if flags.SHARED else k_keep
                if not EDGE:  # seen by all queries or none
                    k_keep = k_seen
                    v_keep = k_seen
            k_ptrs = k_ptr + k_rows * pitch(key)
            k = narrow_rows(k_ptrs, k_keep, d, size.D, flags.WIDE)
            bias, left = pair_terms(
                i[:, None], j[None, :], score_bias, mask, seq, head, q_length, length, k_spans, flags, EDGE
            )
            x = product(q, q_ptrs, q_keep, k, k_ptrs, k_keep, size.D, flags.WIDE, flags, blocks.D)
            inside = q_keep[:, None] & k_seen[None, :] if flags.PAIRS else k_seen[None, :]
            s, _y, shown = tile_scores(x, i[:, None], j[None, :], inside, bias, left, window, size, flags, EDGE)
            if EDGE and flags.PARTS:
                s = tl.where((code == 3)[None, :], float("nan"), s)
            if EDGE or flags.MASKED:
                s = tl.where(shown, s, float("-inf"))
            if result.scores is not None:
                at, there = pair_places(
                    i[:, None], j[None, :], seq, head, q_length, length, k_spans, num_seqs, size, flags
                )
                tl.store(result.scores + at, s, mask=there)  # NATURAL
            SEEN: tl.constexpr = not (EDGE or flags.MASKED)
            p, alpha, m, l = online_softmax(s, m, l, 1, flags.FMA, flags.NATURAL, SEEN)
            if dropout.seed is not None:
                p *= dropout_tile(dropout, j0, seq * size.H + head, lo, blocks.N, blocks.M, False)
            if flags.SHARED and not flags.WIDE:
                values = k
            else:
                values = load_rows(val_ptr + k_rows * pitch(value), v_keep, dv, size.DV)
            if EDGE and flags.PARTS and not flags.SHARED:
                p = tl.where(shown & (code == 2)[None, :], float("nan"), p)
            acc = add_product(p, values, acc * alpha[:, None], flags.COMPUTE, flags.PRECISION)

    row0 = first_row(q_spans, seq, head, size.H, Tq)
    rows = row0 + q_rows
    if splits == 1:
        inv = finish(l)
        store_lse(result.lse + rows * 2, m, l, q_inside)
        first = (tl.program_id(2) // splits) * blocks.DV
        row_at = row0 * size.DV + q_rows * size.DV
        store_both(result.out, result.exact, row_at, acc * inv[:, None], q_inside, first, size.DV)
    else:
        rows = rows * splits + split
        tl.store(result.m + rows, m, mask=q_inside)
        tl.store(result.l + rows, l, mask=q_inside)
        o_ptrs = result.o + (row0 * splits + split) * size.DV + q_rows * splits * size.DV
        store_rows(o_ptrs, acc, q_inside, dv, size.DV)


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Sizes of one kernel's tiles: queries, keys, width of the score, width of the values."""

    M: int
    N: int
    D: int
    DV: int
    warps: int
    stages: int


def widths(D: int, DV: int) -> tuple[int, int]:
    """Blocks of the widths of score and values on matrix units: whole up to 256, else in parts."""
    return pow2(D, 16, 256) if D <= 256 else 64, pow2(DV, 16, 256 if max(D, DV) <= 256 else 64)


def whole_rows(chip: Chip, Tq: int, D: int, DV: int, simple: bool) -> bool:
    """Whether rows have the tiles of whole vectors. Those of vectors of 4 have, where registers suffice.

    That is on sm_90, where rows are padded and a score is the product alone (`simple`).
    """
    room = chip.hopper and simple and Tq != LONG and min(D, DV) > 32 and max(D, DV) <= 128
    return even(D, DV) or (room and vectors(D, DV))


SCORE_PART = 32
"""Features of a part of a float32 product, forward and backward: with two numbers they would round a score apart."""


@rule
def fwd_blocks(
    chip: Chip, itemsize: int, Tq: int, D: int, DV: int, plain: bool, busy: int, parts: bool, active: bool
) -> Blocks:
    """Tiles of the forward: a decoder's step, few queries or many, so that lengths make three variants.

    Many queries, so that a tile of keys serves them all; fewer where not all is `plain`, and where a pair has `busy`
    terms of its own: what it loads and draws needs registers, and so do rows that are no whole vectors, above all
    where an activation makes the scores (`active`). Chosen by the compile report (no spills; wgmma on sm_90 from 64
    queries on); for sm_90 timed on an H200, but for those that are busy.
    """
    if chip.backend == "interpreter":
        return Blocks(16, 32, pow2(D, 16, 32), pow2(DV, 16, 32), 4, 2)
    if itemsize == 4:  # without matrix units a product is unrolled over its width
        part, warps = (32, 4) if Tq <= 16 else (64, 4 if chip.backend == "hip" else 8)
        block_n = 128 if chip.hopper and plain and Tq <= 16 and even(D, DV) and not parts else 32
        return Blocks(pow2(Tq, 16, 32), block_n, pow2(D, 16, SCORE_PART), pow2(DV, 16, part), warps, 1)
    width, value_width = widths(D, DV)
    hip, narrow, roomy = chip.backend == "hip", max(D, DV) <= 128, chip.shared > 200_000
    size = max(width, value_width)
    whole = whole_rows(chip, Tq, D, DV, plain and not active)
    if (max(D, DV) <= 256 or width > 64) and not (hip or whole):
        few = 4096 // max(size, 64)  # a tile has 16 numbers a thread, with an address and a predicate each
        return Blocks(pow2(Tq, 16, max(few, 32)), max(16, few // 2) if busy else few, width, value_width, 8, 1)
    if hip and (busy or (active and not narrow)):  # a thread of 4 waves has up to 512 registers
        return Blocks(pow2(Tq, 16, 32), 32, width, value_width, 4, 1)
    block_m = 128 if narrow or (plain and roomy and max(D, DV) <= 256) else 64
    block_m = 16 if Tq <= 16 else min(64, block_m) if Tq <= 64 else block_m
    if chip.arch == 100 and size > 128:
        block_m = min(block_m, 64)
    # Which keys a window hides from which queries takes registers too.
    block_n = 64 if plain and (roomy or (narrow and not (parts and size == 128))) and not hip else 32
    if parts and value_width > 128 and Tq == LONG:  # ragged rows and a window: 64 keys spilled
        block_n = 32
    warps = 8 if block_m >= 64 else 4
    stages = 2 if roomy or max(D, DV) <= 256 else 1
    if chip.hopper and plain and narrow and block_m == 128:
        stages, block_n = 3, 128 if size == 128 and not parts else block_n
    if busy and chip.hopper and narrow and Tq > 16:  # 32 pairs a thread, or 16
        return Blocks(64, 32 if busy > (2 if size == 128 else 3) else 64, width, value_width, 4, 2)
    if busy:
        block_m = min(block_m, 32 if size >= 128 else 64)
    return Blocks(block_m, block_n, width, value_width, warps, stages)


class KeySpans(NamedTuple):
    """As masks.Spans, of keys."""

    cu: Tensor | None
    pairs: Tensor | None = None  # where there is a number a pair of packed rows: see inputs.pair_starts


class Size(NamedTuple):
    """Heads, widths of the score and of the values, and the factor of the products."""

    H: int
    D: int
    DV: int
    scale: float


class Flags(NamedTuple):
    """What kernels are compiled for; see above."""

    ACT: str
    SMOOTH: bool  # scores go through the logarithm of the sigmoid
    FAST: bool
    FMA: bool
    EXACT: bool
    NATURAL: bool
    SHARED: bool
    MASKED: bool  # a query may see nothing, and then be NaN
    PARTS: bool  # a key may be hidden from some queries only
    PLAIN: bool  # tiles that the window leaves whole have a loop of their own
    PAIRS: bool  # a pair has a mask, a bias, a score that is kept or a dropout factor of its own
    EVEN: bool  # and the keys are whole vectors of 16
    WIDE: bool  # the width of the score is walked in parts
    WIDE_V: bool  # that of the values
    GAP: bool  # see general_bwd.py
    COMPUTE: Any
    PRECISION: str


class Result(NamedTuple):
    """What the forward writes, float32 but for `out`, which has the dtype of the keys."""

    out: Tensor  # (B, H, Tq, DV)
    exact: Tensor | None  # the same, for a backward of 16 bits
    lse: Tensor  # (B, H, Tq, 2): (m, l), m in the units of `power`
    scores: Tensor | None  # (B, H, Tq, Tk), or packed (H, P), filled with -inf
    o: Tensor  # (B, H, Tq, splits, DV): of parts of the keys; (m, l) where there is one, and not written
    m: Tensor  # (B, H, Tq, splits)
    l: Tensor


class Call(NamedTuple):
    """What the launches of one call share."""

    chip: Chip
    seqs: int
    busy: int  # of mask, bias and dropout factor, those that a pair has
    active: bool  # whether scores are more than a product and a bias
    size: Size
    flags: Flags  # but for what blocks decide
    args: dict[str, object]  # by the kernels' names


def prepare(inputs: GeneralInputs, natural: bool, scored: bool, *, backward: bool = False) -> Call:
    """Arguments by the kernels' names.

    scored: a number a pair is returned, or comes back. backward: it multiplies with the queries too, and must
    not with those that are not finite.
    """
    query, key, value, score_bias, mask, cu_seqlens_q, cu_seqlens_k, seed, activation, *options = inputs
    scale, left, right, dropout_p, score_activation = options
    chip, packed_q, packed_k = chip_of(query.device), cu_seqlens_q is not None, cu_seqlens_k is not None
    (B, H, Tq, D), Tk = query.shape, key.shape[2]
    query, key = unit(query), unit(key)
    values = key if value is None else unit(value)
    q_rows, k_rows, pair_mask = None, mask, None
    if mask is not None and mask.dim() > 2:
        q_rows, k_rows = (mask.any(3), mask.any(2)) if mask.dim() == 4 else (None, None)
        pair_mask = mask.view(torch.uint8)
    parts = left is not None or right is not None or pair_mask is not None
    if parts:  # keys that some queries see, and some do not
        k_rows = row_codes(k_rows, key, None if value is None else values)
    if parts and backward:
        q_rows = row_codes(q_rows, query)
    q_codes, k_codes = _codes(q_rows, (B, H, Tq)), _codes(k_rows, (key.shape[0], H, Tk))
    cu_q, cu_k = (x if x is None else x.contiguous() for x in (cu_seqlens_q, cu_seqlens_k))
    scored = scored or score_bias is not None or pair_mask is not None
    starts = pair_starts(inputs) if scored and inputs.packed else None
    precise = matmul_flags(chip, key.dtype)
    exact = key.dtype == torch.float32 and precise["PRECISION"] == "ieee"
    seqs = next((x.numel() - 1 for x in (cu_seqlens_q, cu_seqlens_k) if x is not None), B)
    busy = sum(x is not None for x in (score_bias, pair_mask, seed))
    smooth = score_activation == "logsigmoid"
    size = Size(H, D, values.shape[-1], scale)
    flags = Flags(
        ACT=activation,
        SMOOTH=smooth,
        FAST=chip.backend == "cuda" and key.element_size() == 2,
        FMA=exact and chip.backend != "interpreter",
        EXACT=exact,
        NATURAL=exact or natural or score_bias is not None or smooth,
        SHARED=value is None,
        MASKED=mask is not None,
        PARTS=parts,
        PLAIN=not busy and (mask is None or parts),
        PAIRS=busy > 0,
        EVEN=False,
        WIDE=False,
        WIDE_V=False,
        GAP=False,
        **precise,
    )
    args = {
        "query": heads(query, packed=packed_q),
        "key": heads(key, packed=packed_k),
        "value": heads(values, packed=packed_k),
        "score_bias": pairs_as(score_bias, (B, H, Tq, Tk), packed=inputs.packed, whole=True),
        "mask": pairs_as(pair_mask, (B, H, Tq, Tk), packed=inputs.packed, whole=True),
        "q_codes": heads(q_codes, packed=packed_q),
        "k_codes": heads(k_codes, packed=packed_k),
        "q_spans": Spans(cu_q),
        "k_spans": KeySpans(cu_k, starts),
        "dropout": dropout(seed, dropout_p),
        "num_seqs": seqs,
        "Tq": Tq,
        "Tk": Tk,
        "window": window(left, right),
        "size": size._replace(D=width(size.D), DV=width(size.DV)),
    }
    return Call(chip, seqs, busy, smooth or activation != "identity", size, flags, args)


def _codes(rows: Tensor | None, shape: tuple[int, int, int]) -> Tensor | None:
    """Codes or a mask, (B, T) or broadcastable to the shape (B, H, T), as rows of one number."""
    if rows is None:
        return None
    # The stride of a transposed view would be a length, and compiled in.
    rows = rows if rows.stride(-1) <= 1 else rows.contiguous()
    rows = rows[:, None] if rows.dim() == 2 else rows
    return rows.view(torch.uint8).expand(shape)[..., None]


def with_scores(flags: Flags, scores: bool, Tk: int) -> Flags:
    """The flags of a launch that writes or reads a number a pair, if `scores`."""
    return flags._replace(PLAIN=False, PAIRS=True, EVEN=Tk % 16 == 0) if scores else flags


def fitting(flags: Flags, size: Size, blocks: Blocks) -> Flags:
    """The flags of a launch with these blocks."""
    return constants(flags._replace(WIDE=blocks.D < size.D, WIDE_V=blocks.DV < size.DV))


def general_fwd(
    inputs: GeneralInputs, need_scores: bool, pairs: int, natural: bool, need_exact: bool
) -> tuple[Tensor, ...]:
    """(out, lse, scores) as `fused_attn.reference.general_attention` has them, the weight apart; and out in float32.

    The scores are written only where `need_scores` says so, of packed rows so many `pairs`, the last only where
    `need_exact` does, for the backward, which takes differences with it; else they are empty. natural: m is in
    natural units, for somebody reads it; else it may be in those of `power`.
    """
    call = prepare(inputs, natural, need_scores)
    query, key, cu_seqlens_q = inputs.query, inputs.key, inputs.cu_seqlens_q
    (B, H, Tq, D), Tk, DV = query.shape, key.shape[2], call.size.DV
    out = query.new_empty(B, H, Tq, DV)
    exact = query.new_empty(out.shape if need_exact else (0,), dtype=torch.float32)
    lse = new_lse(B, H, Tq, device=query.device)
    shape = (H, pairs) if inputs.packed else (B, H, Tq, Tk)
    scores = lse.new_full(shape if need_scores else (0,), -torch.inf, dtype=torch.float32)
    if out.numel() == 0 or Tk == 0 or call.seqs == 0:
        return out.zero_(), no_key(lse), scores, exact.zero_()
    busy = call.busy + need_scores
    length, itemsize = LONG if inputs.packed else Tq, key.element_size()
    blocks = fwd_blocks(call.chip, itemsize, length, D, DV, not busy, busy, call.flags.PARTS, call.active)
    items = partition(call.seqs, Tq, blocks.M, cu_seqlens_q)
    dv_blocks = cdiv(DV, blocks.DV)
    splits = max(1, min(2 * call.chip.cores // (items.count * H * dv_blocks), cdiv(Tk, 2 * blocks.N)))
    o = m = l = lse
    if splits > 1:
        o, m, l = (lse.new_empty(B, H, Tq, splits, *width) for width in ((DV,), (), ()))
    args = {
        **call.args,
        "per_seq": items.per_seq,
        "splits": splits,
        "result": Result(out, exact if need_exact else None, lse, scores if need_scores else None, o, m, l),
        "flags": fitting(with_scores(call.flags, need_scores, 1 if inputs.packed else Tk), call.size, blocks),
    }
    options = all_registers(call.chip) if itemsize == 4 else unpressed(call.chip, D, DV)
    launch(_general_fwd_kernel, (items.count, H, splits * dv_blocks), args, blocks, **options)
    if splits > 1:
        flat = B * H * Tq
        parts = Items(flat * splits, 0, splits)
        merge(
            o.view(flat * splits, 1, DV),
            m.view(-1, 1),
            l.view(-1, 1),
            parts,
            out.view(flat, 1, DV),
            lse.view(flat, 1, 2),
            exact.view(flat, 1, DV) if need_exact else None,
            skip_single=False,
            unit=1.0 if call.flags.NATURAL else LN2.value,
        )
    return out, lse, scores, exact
