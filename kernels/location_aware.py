"""Location-aware attention: a score that sees the last weights, through filters; a step of a decoder in one pass.

For a sequence's query q, its keys k_j, the last weights p (or their sum so far), filters F (C, K) and U (C, A):

    f_jc = Σ_k F_ck p_{j + k - (K - 1)/2}      s_j = v · act(q + k_j + f_j U) + bias_j
    α = softmax_j(s)                            out = Σ_j α_j value_j

A history of P channels p (P, Tk) has filters F (C, P, K), and f is the sum over its channels: a loop over blocks of
places goes through one channel after the other.

A program has the keys of an item. For a tile of them it gathers the windows of p, [BLOCK_T, BLOCK_K]; two products
make f and f U, which stay in registers. (One filter G = Fᵀ U of K rows in their place would be as much work where K
is C, and a launch to fold it.) All scores of the item go to a row of scratch first, then come the sums of values, a
block of their width at a time: each key and each value is read once, at any width. What was scratch becomes the
weights in float32, which the backward (location_aware_bwd.py) takes.

One sequence makes several items where there are too few to fill the chip; `_aware_merge_kernel` joins their states,
and divides the weights by the sum of all.

Keys of packed rows are read where they lie, as those of one batch entry: a sequence is its rows from `first` up to
`last`, and no window reads over these.
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
    entry_ptr,
    first_row,
    launch,
    load_pairs,
    pairs,
    pitch,
    sequence_ptr,
    sequences,
    width,
)
from .chip import LENGTHS, LONG, Chip, all_registers, cdiv, chip_of, even, matmul_flags, pow2, rule, tile_rows, unit
from .inputs import LocationAwareInputs
from .location import near
from .masks import Items, Spans, dropout, dropout_scale, items_of, locate, partition, unmasked
from .products import add_product
from .softmax import exp, finish, join_states, made_once, online_softmax, pivot, rounded_product
from .tiles import load_rows, load_weight

PACKED_ROWS = 128
"""Items of packed rows are so many rows, or twice as many, and so on: whole tiles of every kernel, so that the two of
the backward have the same items."""

# ---------------------------------------------------------------------------------------------------------------
# Device helpers
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def all_places(size, flags, blocks):
    """Where a loop over places of the filters, from 0 in steps of blocks.K, ends: whole blocks of each channel."""
    n = size.K
    if flags.P > 1:
        n = tl.cdiv(size.K, blocks.K) * (blocks.K * flags.P)
    return n


@triton.jit
def channel_and_places(n0, size, flags, blocks):
    """The channel of the history, and places [BLOCK_K] of its filters, of a step of such a loop."""
    channel = n0 * 0
    k = n0 + tl.arange(0, blocks.K)
    if flags.P > 1:
        each = tl.cdiv(size.K, blocks.K) * blocks.K
        channel = n0 // each
        k -= channel * each
    return channel, k


@triton.jit
def item_at(item, spans, Tk, num_seqs, per_seq, rows_per_item):
    """(sequence, the batch entry that has its rows; first and past-the-last row of the sequence, and of the item)."""
    seq, first, lo, hi, _items = locate(item, spans, Tk, num_seqs, per_seq, rows_per_item)
    if spans.cu is None:
        batch = seq
        last = Tk
    else:
        batch = seq * 0
        last = tl.load(spans.cu + seq + 1)
    return seq, batch, first, last, first + lo, first + hi


@triton.jit
def windows(
    seen,  # (B, P, Tq, Tk): the weights that each step sees; (B, Tq, Tk) where P is 1
    mask,
    batch,
    step,
    channel,
    t,  # [BLOCK_T] keys
    k,  # [BLOCK_K] places of a filter
    first,
    last,
    size,
):
    """The weights around keys, [BLOCK_T, BLOCK_K], and which of them there are: what is hidden is not read."""
    at = t[:, None] + (k - size.K // 2)[None, :]
    there = unmasked(mask, batch, at, (at >= first) & (at < last) & (k < size.K)[None, :])
    return load_pairs(seen, None, batch, batch * 0 + channel, step, at, 0, there).to(tl.float32), there


@triton.jit
def load_filter(filters, channel, c, k, size):
    """Tile F[c, k] of a channel of the history; 0 outside."""
    f_ptr = filters.f + channel * filters.stride_fp
    return load_weight(f_ptr, filters.stride_fc, filters.stride_fk, c, k, size.C, size.K).to(tl.float32)


@triton.jit
def load_mixer(filters, c, a, size):
    """Tile U[c, a]; 0 outside."""
    return load_weight(filters.u, filters.stride_uc, filters.stride_ua, c, a, size.C, size.A).to(tl.float32)


@triton.jit
def location_features(seen, mask, batch, step, t, c, first, last, filters, size, flags, blocks):
    """f of keys and channels, [BLOCK_T, BLOCK_C]."""
    f = tl.zeros([t.shape[0], c.shape[0]], tl.float32)
    for n0 in range(0, all_places(size, flags, blocks), blocks.K):
        channel, k = channel_and_places(n0, size, flags, blocks)
        x, _there = windows(seen, mask, batch, step, channel, t, k, first, last, size)
        f = add_product(x, tl.trans(load_filter(filters, channel, c, k, size)), f, tl.float32, flags.PRECISION)
    return f


@triton.jit
def query_and_keys(k_ptrs, keep, q_ptr, a, size):
    """q + k_j of keys and features, [BLOCK_T, BLOCK_A]."""
    q = tl.load(q_ptr + a, mask=a < size.A, other=0.0).to(tl.float32)
    return load_rows(k_ptrs, keep, a, size.A).to(tl.float32) + q[None, :]


@triton.jit
def add_features(z, seen, mask, batch, step, t, a, first, last, filters, size, flags, blocks):
    """z and f_j U of all channels, [BLOCK_T, BLOCK_A]."""
    for c0 in range(0, size.C, blocks.C):
        c = c0 + tl.arange(0, blocks.C)
        f = location_features(seen, mask, batch, step, t, c, first, last, filters, size, flags, blocks)
        z = add_product(f, load_mixer(filters, c, a, size), z, tl.float32, flags.PRECISION)
    return z


@triton.jit
def score_keys(
    k_ptrs, keep, q_ptr, seen, mask, bias, batch, step, t, first, last, v_ptr, filters, size, flags, blocks
):
    """Scores [BLOCK_T], -inf where a key is hidden."""
    s = tl.zeros([t.shape[0]], tl.float32)
    for a0 in range(0, size.A, blocks.A):
        a = a0 + tl.arange(0, blocks.A)
        z = query_and_keys(k_ptrs, keep, q_ptr, a, size)
        z = add_features(z, seen, mask, batch, step, t, a, first, last, filters, size, flags, blocks)
        v = tl.load(v_ptr + a, mask=a < size.A, other=0.0).to(tl.float32)
        s += tl.sum(rounded_product(v[None, :], activate(z, flags.ACT, flags.FAST)), axis=1)
    if bias.ptr is not None:
        s += tl.load(entry_ptr(bias, batch, t), mask=keep, other=0.0).to(tl.float32)
    if flags.SMOOTH:
        s = log_sigmoid(s)
    return tl.where(keep, s, float("-inf"))


@triton.jit
def kept(dropout, seq, t):
    """The factor of dropout on the weights of keys, [BLOCK_T]: once, not for each width of values."""
    return made_once(tl.sum(dropout_scale(dropout, t[:, None], seq, tl.zeros([1, 1], tl.int32)), axis=1))


@triton.jit
def _store_weights(result, at, p, inside):
    """Weights of keys, in the user's dtype and in float32."""
    tl.store(result.weights + at, p.to(result.weights.dtype.element_ty), mask=inside)
    if result.exact is not None:
        tl.store(result.exact + at, p, mask=inside)


# ---------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=LENGTHS)
def _aware_fwd_kernel(
    q,  # (S, 1, A)
    k,  # (B, Tk, A), where rows are packed (1, N, A), and so on
    value,  # (B, Tk, DV)
    v_ptr,  # (A,)
    filters,
    seen,  # (B, P, 1, Tk), or (B, 1, Tk)
    bias,  # (B, Tk) or None
    mask,  # (B, Tk) or None
    spans,
    dropout,
    result,
    num_seqs,
    per_seq,
    rows_per_item,
    Tk,  # N where rows are packed
    size,
    flags,
    blocks,
):
    item = tl.program_id(0)
    seq, batch, first, last, lo, hi = item_at(item, spans, Tk, num_seqs, per_seq, rows_per_item)
    step = item * 0
    q_ptr = sequence_ptr(q, seq, step)
    k_ptr = first_row(k, batch)
    value_ptr = first_row(value, batch)
    row0 = batch * Tk
    m = tl.full([1], float("-inf"), tl.float32)
    l = tl.zeros([1], tl.float32)
    for t0 in range(lo, hi, blocks.T):
        t = t0 + tl.arange(0, blocks.T)
        keep = unmasked(mask, batch, t, t < hi)
        k_ptrs = k_ptr + t.to(tl.int64) * pitch(k)
        s = score_keys(
            k_ptrs, keep, q_ptr, seen, mask, bias, batch, step, t, first, last, v_ptr, filters, size, flags, blocks
        )
        tl.store(result.scores + row0 + t, s, mask=t < hi)
        _p, _alpha, m, l = online_softmax(s, m, l, 0, flags.FMA)
    shift = pivot(m)
    inv = finish(l)
    tl.debug_barrier()  # other threads read the scores than have written them

    for d0 in range(0, size.DV, blocks.DV):
        d = d0 + tl.arange(0, blocks.DV)
        acc = tl.zeros([blocks.DV], tl.float32)
        for t0 in range(lo, hi, blocks.T):
            t = t0 + tl.arange(0, blocks.T)
            keep = unmasked(mask, batch, t, t < hi)
            p = exp(tl.load(result.scores + row0 + t, mask=t < hi, other=float("-inf")) - shift, flags.FMA)
            if dropout.seed is not None:
                p *= kept(dropout, seq, t - first)
            values = load_rows(value_ptr + t.to(tl.int64) * pitch(value), keep, d, size.DV)
            acc += tl.sum(p[:, None] * values.to(tl.float32), axis=0)
        if flags.SPLIT:
            tl.store(result.o + item.to(tl.int64) * size.DV + d, acc, mask=d < size.DV)
        else:
            out = acc * inv
            tl.store(result.out + seq * size.DV + d, out.to(result.out.dtype.element_ty), mask=d < size.DV)

    if flags.SPLIT:
        at = item + tl.arange(0, 1)
        tl.store(result.m + at, m)
        tl.store(result.l + at, l)
    else:
        tl.debug_barrier()  # weights may be where the scores are
        for t0 in range(lo, hi, blocks.T):
            t = t0 + tl.arange(0, blocks.T)
            s = tl.load(result.scores + row0 + t, mask=t < hi, other=float("-inf"))
            tl.debug_barrier()  # threads that have the same keys read before one of them writes
            _store_weights(result, row0 + t, exp(s - shift, flags.FMA) * inv, t < hi)


@triton.jit
def _store_block(result, row0, t, last, shift, inv, FMA: tl.constexpr):
    s = tl.load(result.scores + row0 + t, mask=t < last, other=float("-inf"))
    _store_weights(result, row0 + t, exp(s - shift, FMA) * inv, t < last)


@triton.jit(do_not_specialize=LENGTHS)
def _aware_merge_kernel(
    spans,
    result,
    per_seq,
    rows_per_item,
    Tk,
    size,
    flags,
    blocks,
):
    """Of one sequence a block of the output, and a block of the weights."""
    seq = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    d = block * blocks.DV + tl.arange(0, blocks.DV)
    m = tl.full([1], float("-inf"), tl.float32)
    l = tl.zeros([1], tl.float32)
    acc = tl.zeros([blocks.DV], tl.float32)
    if spans.cu is None:
        item0 = seq * per_seq
        items = per_seq
    else:
        item0, past = items_of(seq, spans, per_seq, rows_per_item)
        items = past - item0
    for i0 in range(0, items, blocks.I):
        i = i0 + tl.arange(0, blocks.I)
        at = item0 + i
        m_i = tl.load(result.m + at, mask=i < items, other=float("-inf"))
        l_i = tl.load(result.l + at, mask=i < items, other=0.0)
        o_i = load_rows(result.o + at * size.DV, i < items, d, size.DV)
        m, l, acc = join_states(m, l, acc, m_i, l_i, o_i, 1.0, flags.FMA)
    inv = finish(l)
    out = acc * inv
    tl.store(result.out + seq * size.DV + d, out.to(result.out.dtype.element_ty), mask=d < size.DV)
    t = block * blocks.T + tl.arange(0, blocks.T)
    if spans.cu is None:
        _store_block(result, seq * Tk, t, Tk, pivot(m), inv, flags.FMA)
    else:  # blocks are as many as a sequence of the mean length has
        first = tl.load(spans.cu + seq)
        last = tl.load(spans.cu + seq + 1)
        for t0 in range(first, last, tl.num_programs(1) * blocks.T):
            _store_block(result, seq * 0, t0 + t, last, pivot(m), inv, flags.FMA)


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Sizes of one kernel's tiles: keys, width of the score, channels, places of a filter, width of the values."""

    T: int
    A: int
    C: int
    K: int
    DV: int
    warps: int
    stages: int = 2


class MergeBlocks(NamedTuple):
    """Items, width of the values and keys of a program."""

    I: int
    DV: int
    T: int
    warps: int = 4


@rule
def fwd_blocks(chip: Chip, itemsize: int, T: int, size: "Size") -> Blocks:
    """Tiles of the forward. Chosen by the compile report (no spills); speed on a GPU not yet measured."""
    C, K = pow2(size.C, 16, 32), pow2(size.K, 16, 32)
    if chip.backend == "interpreter":
        return Blocks(16, pow2(size.A, 16, 64), C, K, pow2(size.DV, 16, 64), 4)
    rows = tile_rows(T, 32)
    if itemsize == 4:
        return Blocks(rows, pow2(size.A, 16, 64), C, K, pow2(size.DV, 16, 256), 8)
    rows = 16 if chip.backend == "hip" and not even(size.A, size.DV) else rows
    return Blocks(rows, pow2(size.A, 16, 128), C, K, pow2(size.DV, 16, 256), 4)


class Filters(NamedTuple):
    """What makes features of weights, see the top."""

    f: Tensor  # (C, P, K), or (C, K)
    stride_fp: int
    stride_fc: int
    stride_fk: int
    u: Tensor  # (C, A)
    stride_uc: Any  # see `width`
    stride_ua: Any


class Result(NamedTuple):
    """What the forward leaves, float32 but for the first two; the last three where keys are split.

    Scores nobody wants are scratch, in the memory of what holds the weights in float32.
    """

    out: Tensor  # (B, DV) in the dtype of the values
    weights: Tensor  # (B, Tk) or (N,) in that dtype
    exact: Tensor | None  # the weights, None where that dtype is float32
    scores: Tensor  # (B, Tk) or (N,)
    o: Tensor | None  # (items, DV)
    m: Tensor | None  # (items,)
    l: Tensor | None


class Size(NamedTuple):
    """Channels and width of the filters, widths of the score and of the values."""

    C: int
    K: int
    A: int
    DV: int


class Flags(NamedTuple):
    """What kernels are compiled for."""

    ACT: str
    FAST: bool
    FMA: bool
    PRECISION: str  # of products of weights, features and filters, which are float32
    ONE_C: bool  # blocks.C >= C, in the backward
    SPLIT: bool = False  # a sequence has several items
    SUM: bool = False  # a step sees the sum of all before it: see location_aware_walk.py
    WALK: bool = False  # several steps, and an item is one tile: see location_aware_bwd.py
    P: int = 1  # channels of the history
    SMOOTH: bool = False  # scores go through the logarithm of the sigmoid: see location_aware_walk.py


class Call(NamedTuple):
    """What the launches of one call share."""

    chip: Chip
    seqs: int
    length: int  # of the sequences, or how many rows are packed
    size: Size
    flags: Flags
    cu_seqlens: Tensor | None
    args: dict[str, object]  # by the kernels' names

    def items(self, rows: int, least: int) -> Items:
        """Whole tiles of `rows` keys, at least `least`, for two programs a core; of packed rows `PACKED_ROWS`."""
        most = 2 * self.chip.cores // self.seqs
        if self.cu_seqlens is not None:
            parts = 2 * self.chip.cores if most > 1 else 1
            rows = PACKED_ROWS
        else:
            parts = max(1, min(most, self.length // least))
        return partition(self.seqs, self.length, cdiv(cdiv(self.length, parts), rows) * rows, self.cu_seqlens)

    @property
    def longest(self) -> int:
        """The length that tiles are chosen for."""
        return self.length if self.cu_seqlens is None else LONG

    def args_of(self, items: Items) -> dict[str, object]:
        """Arguments of a launch over items."""
        return self.args | {"per_seq": items.per_seq, "rows_per_item": items.rows}


def prepare(
    query: Tensor,  # (B, Tq, A); packed (S, 1, A)
    key: Tensor,
    value: Tensor | None,
    v: Tensor,
    seen: Tensor,  # (B, P, Tq, Tk), or (B, Tq, Tk); packed with B = 1
    conv_weight: Tensor,
    u: Tensor,
    score_bias: Tensor | None,
    mask: Tensor | None,
    activation: str,
    cu_seqlens: Tensor | None = None,
) -> Call:
    """Arguments by the kernels' names."""
    chip, packed = chip_of(key.device), cu_seqlens is not None
    narrow = key.element_size() == 2
    precision = str(matmul_flags(chip, torch.float32)["PRECISION"])
    if narrow and (chip.backend == "cuda" or chip.gfx == "gfx942"):
        precision = "tf32"  # of numbers of 16 bits, and of sums of them
    flags = Flags(activation, narrow and chip.backend == "cuda", chip.backend != "interpreter", precision, False)
    stride_p = 0
    if conv_weight.dim() == 3:
        flags, stride_p = flags._replace(P=conv_weight.shape[1]), conv_weight.stride(1)
    size = Size(conv_weight.shape[0], conv_weight.shape[-1], key.shape[-1], 0 if value is None else value.shape[-1])
    conv_weight, u = near(conv_weight), near(u)
    args = {
        "q": sequences(unit(query), packed=False),
        "k": sequences(unit(key), packed=packed),
        "value": sequences(unit(value), packed=packed),
        "v_ptr": v.contiguous(),
        "filters": Filters(
            conv_weight, stride_p, conv_weight.stride(0), conv_weight.stride(-1), u, *map(width, u.stride())
        ),
        "seen": pairs(seen),
        "bias": entries(score_bias, packed=packed),
        "mask": entries(None if mask is None else mask.view(torch.uint8), packed=packed),
        "spans": Spans(cu_seqlens if cu_seqlens is None else cu_seqlens.contiguous()),
        "num_seqs": query.shape[0],
        "Tk": key.shape[-2],
        "size": size._replace(A=width(size.A), DV=width(size.DV)),
    }
    return Call(chip, query.shape[0], key.shape[-2], size, flags, cu_seqlens, args)


def prepare_step(inputs: LocationAwareInputs) -> Call:
    """Arguments of a step."""
    query, key, value, v, previous, conv_weight, u, score_bias, mask, cu_seqlens, seed, activation, dropout_p = inputs
    seen = (previous if cu_seqlens is None else previous.t()[None]).unsqueeze(-2)
    call = prepare(query[:, None], key, value, v, seen, conv_weight, u, score_bias, mask, activation, cu_seqlens)
    call.args["dropout"] = dropout(seed, dropout_p)
    return call


def location_aware_fwd(
    inputs: LocationAwareInputs, need_exact: bool, need_scores: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, weights) as `fused_attn.location_aware` has them, and in float32 the weights and the scores.

    The last two are empty where they are not needed.
    """
    key, value = inputs.key, inputs.value
    rows, seqs, DV = value.shape[:-1], inputs.query.shape[0], value.shape[-1]
    out, weights = value.new_empty(seqs, DV), value.new_empty(rows)
    none = [value.new_empty(0, dtype=torch.float32) for _ in range(2)]
    wide = weights if value.dtype == torch.float32 else None  # where the kernel leaves weights in float32
    if wide is None and (need_exact or not need_scores):
        wide = value.new_empty(rows, dtype=torch.float32)
    scores = value.new_empty(rows, dtype=torch.float32) if need_scores or wide is None else wide
    exact = wide if need_exact and wide is not None else none[0]
    results = out, weights, exact, scores if need_scores else none[1]
    if weights.numel() == 0:
        out.zero_()
        return results
    call = prepare_step(inputs)
    blocks = fwd_blocks(call.chip, key.element_size(), call.longest, call.size)
    items = call.items(blocks.T, 4 * blocks.T)
    split = items.per_seq != 1
    parts = [
        value.new_empty(items.count, *width, dtype=torch.float32) if split else None for width in ((DV,), (), ())
    ]
    args = call.args_of(items) | {
        "result": Result(out, weights, None if wide is weights else wide, scores, *parts),
        "flags": constants(call.flags._replace(SPLIT=split)),
    }
    launch(_aware_fwd_kernel, (items.count,), args, blocks, **all_registers(call.chip))
    if split:
        merge_blocks = MergeBlocks(16, pow2(DV, 16, 128), 256)
        usual = call.length if inputs.cu_seqlens is None else cdiv(call.length, seqs)
        grid = seqs, max(cdiv(DV, merge_blocks.DV), cdiv(usual, merge_blocks.T))
        launch(_aware_merge_kernel, grid, args, merge_blocks)
    return results
