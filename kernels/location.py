"""Location attention: a score from the key alone, softmax, weighted sum, in one pass over H.

Forward, for the rows j of an item (h_j is row j of H, r a hop):

    z_j = h_j W + b + ctx_j       u_j = act(z_j) [⊙ gate(h_j G + g)]       s_jr = u_j · v_r + bias_j

or, `SMOOTH`, the logarithm of the sigmoid of that,
and the online softmax over s with acc = Σ p_jr value_j. Where the values are H and D fits, the tile of H that
fed the projection also feeds the weighted sum. Without `v` the score is u itself (A = R).
One sequence makes several items where there are too few sequences to fill the chip; `softmax.merge` joins them.

The backward is in location_bwd.py.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, log_sigmoid
from .arguments import constants, entries, entry_ptr, first_row, launch, sequence_ptr, sequences, width
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
    whole_rows,
)
from .inputs import LocationInputs, features_dtype
from .masks import Items, Spans, dropout, dropout_scale, locate, partition, unmasked
from .products import add_product, tile_product
from .softmax import finish, merge, new_lse, no_key, online_softmax, store_lse
from .tiles import load_part, load_rows, store_rows

MAX_HOPS = 128
WORKSPACE_BYTES = 32 * 2**20  # under the L2 of an H100, so that what is written there is read back from there


# ---------------------------------------------------------------------------------------------------------------
# Device helpers
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def matmul(x, y, acc, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """The sum acc + x y; where y has one column, in float32 without the matrix units."""
    if y.shape[1] == 1:
        # + 0: a product that is fused into a sum across threads leaves them with different last bits, and then the
        # largest score is not that of the key that has it, nor the weight of a key alone 1.
        return acc + tl.sum(x.to(tl.float32) * tl.trans(y.to(tl.float32)) + 0.0, axis=1)[:, None]
    return add_product(x, y, acc, COMPUTE, PRECISION)


@triton.jit
def _add_part(h, weights, d0, a, D, A, z, g, flags, BLOCK_D: tl.constexpr):
    """(z, g) and what the columns of H from d0 on add to them."""
    d = tl.arange(0, BLOCK_D)
    w = load_part(weights.w, weights.stride_wd, weights.stride_wa, d0, d, a, D, A, flags.WHOLE)
    z = matmul(h, w, z, flags.COMPUTE, flags.PRECISION)
    if weights.gw is not None:
        w = load_part(weights.gw, weights.stride_gd, weights.stride_ga, d0, d, a, D, A, flags.WHOLE)
        g = matmul(h, w, g, flags.COMPUTE, flags.PRECISION)
    return z, g


@triton.jit
def project(
    h_ptrs,  # [BLOCK_T] pointers to rows of H
    h,  # the tile [BLOCK_T, BLOCK_D] itself where RESIDENT
    rows,
    seq,
    keep,
    weights,
    context,
    a,
    D,
    A,
    flags,
    RESIDENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(H W + b + ctx, H G + g) for the features a, [BLOCK_T, BLOCK_A] each; H itself is projected where W is None."""
    z = tl.zeros([keep.shape[0], a.shape[0]], tl.float32)
    g = tl.zeros([keep.shape[0], a.shape[0]], tl.float32)
    if weights.w is None:
        z = load_rows(h_ptrs, keep, a, A).to(tl.float32)
    elif RESIDENT:
        z, g = _add_part(h, weights, 0, a, D, A, z, g, flags, BLOCK_D)
    else:
        for d0 in range(0, D, BLOCK_D):
            part = load_rows(h_ptrs, keep, d0 + tl.arange(0, BLOCK_D), None if flags.WHOLE else D)
            z, g = _add_part(part, weights, d0, a, D, A, z, g, flags, BLOCK_D)
    if weights.b is not None:
        z += tl.load(weights.b + a, mask=a < A, other=0.0).to(tl.float32)[None, :]
    if weights.gb is not None:
        g += tl.load(weights.gb + a, mask=a < A, other=0.0).to(tl.float32)[None, :]
    if context.ptr is not None:
        if flags.CTX_PER_ROW:
            z += load_rows(sequence_ptr(context, seq, rows), keep, a, A).to(tl.float32)
        else:
            ctx = tl.load(first_row(context, seq) + a, mask=a < A, other=0.0)
            z += tl.where(keep[:, None], ctx.to(tl.float32)[None, :], 0.0)  # of a sequence that sees nothing: unread
    return z, g


@triton.jit
def gated(z, g, weights, flags):
    """The features u that `project` gives z and g of."""
    u = activate(z, flags.ACT, flags.FAST)
    if weights.gw is not None:
        u *= activate(g, flags.GATE_ACT, flags.FAST)
    return u


@triton.jit
def _biased(s, bias, seq, rows, keep):
    """Scores and the bias of their rows; -inf where a row is hidden."""
    if bias.ptr is not None:
        s += tl.load(entry_ptr(bias, seq, rows), mask=keep, other=0.0).to(tl.float32)[:, None]
    return tl.where(keep[:, None], s, float("-inf"))


@triton.jit
def _weighted_sum(values, p, BLOCK_P: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """Σ_j value_j p_j, [BLOCK_DV, BLOCK_P].

    As a matrix product it reads the tile from shared memory, where the projection left it; written as a sum over
    registers it spilled at D = 512.
    """
    if BLOCK_P == 1:
        return tl.sum(values.to(tl.float32) * p, axis=0)[:, None]
    p = tl.broadcast_to(p, [p.shape[0], BLOCK_P])  # one hop: sixteen equal columns, the first is stored
    return tile_product(tl.trans(values), p, COMPUTE, PRECISION)


@triton.jit
def _store_out(result, at, out, mask):
    """The output, and where it is wanted in float32 too."""
    tl.store(result.out + at, out.to(result.out.dtype.element_ty), mask=mask)
    if result.exact is not None:
        tl.store(result.exact + at, out, mask=mask)


# ---------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=LENGTHS)
def _location_fwd_kernel(
    h,  # (B, T, D) or (N, D)
    weights,
    context,  # (S, A), (B, T, A), (N, A) or None
    values,  # (B, T, DV), (N, DV), or None: H
    bias,  # (B, T), (N,) or None
    mask,  # (B, T), (N,) or None
    spans,
    dropout,
    result,
    parts,
    num_seqs,
    per_seq,
    rows_per_item,
    T,  # 0 where the batch is ragged
    size,
    flags,
    blocks,
):
    item = tl.program_id(0)
    seq, start, lo, hi, items = locate(item, spans, T, num_seqs, per_seq, rows_per_item)
    r = tl.arange(0, blocks.R)
    col = tl.arange(0, blocks.P)
    dv = tl.arange(0, blocks.DV)
    m = tl.full([blocks.R], float("-inf"), tl.float32)
    l = tl.zeros([blocks.R], tl.float32)
    acc = tl.zeros([blocks.DV if flags.ONE_DV else 1, blocks.P], tl.float32)
    item_at = item.to(tl.int64) * size.R * size.DV

    for t0 in range(lo, hi, blocks.T):
        t = t0 + tl.arange(0, blocks.T)
        inside = t < hi
        rows = start + t
        keep = unmasked(mask, seq, rows, inside)
        h_ptrs = sequence_ptr(h, seq, rows)
        if flags.RESIDENT:
            tile = load_rows(h_ptrs, keep, tl.arange(0, blocks.D), size.D)
        else:
            tile = h_ptrs

        s = tl.zeros([blocks.T, blocks.R], tl.float32)
        for a0 in range(0, size.A, blocks.A):
            a = a0 + tl.arange(0, blocks.A)
            z, g = project(
                h_ptrs,
                tile,
                rows,
                seq,
                keep,
                weights,
                context,
                a,
                size.D,
                size.A,
                flags,
                flags.RESIDENT,
                blocks.D,
            )
            u = gated(z, g, weights, flags)
            if flags.FEATURES:
                u = _biased(u, bias, seq, rows, keep)
                store_rows(result.scores + (seq * T + rows) * size.A, u, inside, a, size.A)
            elif weights.v is None:
                s = u
            else:
                v = load_rows(weights.v + a * size.R, a < size.A, r, size.R)
                s = matmul(u, v, s, flags.U_COMPUTE, flags.U_PRECISION)
        if not flags.FEATURES:
            s = _biased(s, bias, seq, rows, keep)
            if flags.SMOOTH:
                s = log_sigmoid(s)
            at = (seq * T + rows)[:, None] * size.R + r[None, :]
            tl.store(result.scores + at, s, mask=inside[:, None] & (r < size.R)[None, :])

        if flags.POOL:
            p, alpha, m, l = online_softmax(s, m, l, 0, False)
            if dropout.seed is not None:
                p *= dropout_scale(dropout, t[:, None], seq, r[None, :])
            if values.ptr is None:
                val_ptrs = h_ptrs
            else:
                val_ptrs = sequence_ptr(values, seq, rows)
            if flags.ONE_DV:
                if flags.RESIDENT and values.ptr is None:
                    x = tile
                else:
                    x = load_rows(val_ptrs, keep, dv, size.DV)
                acc = acc * alpha[None, :] + _weighted_sum(x, p, blocks.P, flags.COMPUTE, flags.PRECISION)
            else:
                # Too wide for registers: the running sum lives in this item's slot of parts.o, which stays in cache.
                for d0 in range(0, size.DV, blocks.DV):
                    d = d0 + dv
                    write = (d < size.DV)[:, None] & (col < size.R)[None, :]
                    o_ptrs = parts.o + item_at + (col[None, :] * size.DV + d[:, None])
                    old = tl.load(o_ptrs, mask=write & (t0 > lo), other=0.0)
                    x = load_rows(val_ptrs, keep, d, None if flags.WHOLE else size.DV)
                    new = _weighted_sum(x, p, blocks.P, flags.COMPUTE, flags.PRECISION)
                    tl.store(o_ptrs, old * alpha[None, :] + new, mask=write)
                tl.debug_barrier()  # the next tile's load may belong to another thread

    if flags.POOL:
        single = items == 1
        at = item.to(tl.int64) * size.R + r
        tl.store(parts.m + at, m, mask=r < size.R)
        tl.store(parts.l + at, l, mask=r < size.R)
        store_lse(result.lse + (seq * size.R + r) * 2, m, l, (r < size.R) & single)
        out_at = seq * size.R * size.DV
        if flags.ONE_DV:
            o_at = col[None, :] * size.DV + dv[:, None]
            write = (dv < size.DV)[:, None] & (col < size.R)[None, :]
            tl.store(parts.o + item_at + o_at, acc, mask=write & (items != 1))
            _store_out(result, out_at + o_at, acc * finish(l)[None, :], write & single)
        elif single:
            for d0 in range(0, size.DV, blocks.DV):
                d = d0 + dv
                o_at = col[None, :] * size.DV + d[:, None]
                write = (d < size.DV)[:, None] & (col < size.R)[None, :]
                o = tl.load(parts.o + item_at + o_at, mask=write & (lo < hi), other=0.0)  # no rows have left none
                _store_out(result, out_at + o_at, o * finish(l)[None, :], write)


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Sizes of one kernel's tiles."""

    T: int
    D: int
    A: int
    DV: int = 0
    warps: int = 4
    stages: int = 2
    R: int = 1  # 1 for one hop, else at least 16
    P: int = 16  # columns of p in the weighted sum: 1 is a sum, more a matrix product
    K: int = 0  # features of [dz dg], in the backward


def hop_block(hops: int) -> int:
    """One hop is a column of its own; more feed matrix products, whose smallest side is 16."""
    return 1 if hops == 1 else pow2(hops, 16, MAX_HOPS)


def _features(A: int) -> int:
    """Features of a tile of wgmma: 128, or where these would be no whole tiles, up to 64."""
    return 128 if A % 128 == 0 else pow2(A, 16, 64)


@rule
def fwd_blocks(chip: Chip, itemsize: int, T: int, D: int, A: int, R: int, DV: int, linear: bool) -> Blocks:
    """Tiles of the forward. `blocks.D >= D` keeps a tile of H on chip from the projection to the weighted sum.

    Chosen by the compile report (no spills, shared memory within the chip), and for sm_90 on an H200: see
    `bench/NOTES.md`. There one hop has tiles of 128 rows: of an MLP with three stages of parts of W, of a linear
    score, which has only the tile to wait for, with two; in float32 that tile is wide.
    """
    hop = hop_block(R)
    hops = {"R": hop, "P": 1 if R == 1 and itemsize == 4 else max(16, hop)}
    hopper = chip.hopper
    wide = max(16, hop)  # columns of the accumulator: 8192 elements of it are 32 registers a thread of 8 warps
    whole = whole_rows(chip, D, DV, A)
    warps = 4 if chip.backend == "hip" and hop > 1 else 8  # 4 waves of 64 lanes have 512 registers a lane
    if itemsize == 4:
        # No matrix units in full float32: products are unrolled, so the tile is small and D goes in steps of 16.
        block_a = (
            hop
            if linear
            else pow2(A, 16, 64 if hop == 1 and whole and chip.backend != "hip" else 32 if hop <= 32 else 16)
        )
        block_d = pow2(D, 16, 128) if hopper and linear and hop == 1 else 16
        rows = tile_rows(T, 32 if hop == 1 else 16)
        return Blocks(rows, block_d, block_a, pow2(DV, 16, 4096 // wide), warps, **hops)
    if hopper and hop == 1 and linear and whole_rows(chip, D, DV):
        return Blocks(tile_rows(T, 128), pow2(D, 16, 64), 1, pow2(DV, 16, 128), warps, **hops)
    if not whole:
        block_a = hop if linear else pow2(A, 16, 32)
        return Blocks(tile_rows(T, 32), pow2(D, 16, 64), block_a, pow2(DV, 16, 2048 // wide), warps, **hops)
    if hopper and hop == 1 and D > 256:
        # Rows and features enough for wgmma's largest tiles. Their sums leave no registers for that of the values.
        return Blocks(tile_rows(T, 128), 64, _features(A), pow2(DV, 16, 64), warps, 3, **hops)
    block_dv = pow2(DV, 16, (8192 if chip.shared > 160_000 and even(D, DV, A) else 4096) // wide)
    block_d = pow2(D, 16, 256 if D <= 256 and chip.shared > 160_000 else 64)
    # mma.sync takes operands from registers where wgmma reads shared memory: half the rows.
    hip, wgmma = chip.backend == "hip", chip.backend == "cuda" and not chip.from_registers
    block_t = 64 if hip or (wgmma and hop <= 32) else 32
    block_a = hop if linear else pow2(A, 16, 64)
    return Blocks(tile_rows(T, block_t), block_d, block_a, block_dv, warps, **hops)


class Weights(NamedTuple):
    """What the score of a row is made with, see the top; None where there is none."""

    w: Tensor | None  # (D, A), or None: A = D
    stride_wd: int
    stride_wa: int
    b: Tensor | None  # (A,)
    v: Tensor | None  # (A, R)
    gw: Tensor | None  # (D, A)
    stride_gd: int
    stride_ga: int
    gb: Tensor | None  # (A,)


class Result(NamedTuple):
    """What the forward leaves, float32 but for `out`, which in the backward is float32 too, and for features."""

    out: Tensor  # (S, R, DV) in the dtype of H
    lse: Tensor  # (S, R, 2): (m, l), see softmax.py
    scores: Tensor  # (B, T, R) or (N, R)
    exact: Tensor | None = None  # as out, for a backward of 16 bits


class Parts(NamedTuple):
    """States of items, float32; none without POOL."""

    o: Tensor | None  # (items, R, DV); where every sequence is one item, and ONE_DV, it is not written
    m: Tensor | None  # (items, R)
    l: Tensor | None


class Size(NamedTuple):
    """Widths of H, of the features and of the values, and hops."""

    D: int
    A: int
    R: int
    DV: int


class Flags(NamedTuple):
    """What kernels are compiled for."""

    ACT: str
    GATE_ACT: str
    FAST: bool
    CTX_PER_ROW: bool
    COMPUTE: object
    PRECISION: str
    U_COMPUTE: object  # of the product with v
    U_PRECISION: str
    POOL: bool = True  # else scores alone
    FEATURES: bool = False  # scores alone, without v: any number of them, a part of them at a time; R is 1
    ADD: bool = False  # gradients of rows are added to what is there
    RESIDENT: bool = False  # blocks.D >= D: a tile of H is loaded once and kept
    ONE_DV: bool = False  # blocks.DV >= DV: the sum is kept in registers, else in parts.o
    WHOLE: bool = False  # widths are multiples of their blocks
    SMOOTH: bool = False  # scores go through the logarithm of the sigmoid


class Call(NamedTuple):
    """What the launches of one call share."""

    seqs: int
    length: int  # rows of a padded sequence, or all packed rows
    size: Size
    flags: Flags
    chip: Chip
    cu_seqlens: Tensor | None
    args: dict[str, Any]  # the kernels' arguments by name

    def items(self, rows: int) -> Items:
        """The partition into items of `rows` rows, whose arguments join the others."""
        items = partition(self.seqs, self.length, rows, self.cu_seqlens)
        self.args.update(spans=Spans(items.cu), per_seq=items.per_seq)
        return items


def near(x: Tensor | None) -> Tensor | None:
    """A weight whose numbers are less than 2**31 apart: the kernels find them with int32."""
    if x is None or sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) < 2**31:
        return x
    return x.contiguous()


def features_flags(chip: Chip, dtype: torch.dtype, *activations: str) -> tuple[object, str]:
    """How features are multiplied with v: where they are float32 for their size alone, in no more digits."""
    if features_dtype(dtype, *activations) != dtype:
        return tl.float32, "tf32" if chip.backend == "cuda" else "ieee"
    return tuple(matmul_flags(chip, dtype).values())


def prepare(inputs: LocationInputs, pool: bool = True) -> Call:
    h, w, b, v, gate_w, gate_b, context, values, _, mask, cu_seqlens, seed, *options = inputs
    activation, gate_activation, dropout_p, context_per_row, score_activation = options
    chip = chip_of(h.device)
    packed = cu_seqlens is not None
    h, values, context = unit(h), unit(values), unit(context)
    w, gate_w = near(w), near(gate_w)
    b, v, gate_b, cu_seqlens = (x if x is None else x.contiguous() for x in (b, v, gate_b, cu_seqlens))
    D, A = (h.shape[-1],) * 2 if w is None else w.shape
    features = v is None and not pool
    R = 1 if features else A if v is None else v.shape[1]
    size = Size(D, A, R, (h if values is None else values).shape[-1])
    activations = (activation,) if gate_w is None else (activation, gate_activation)
    flags = Flags(
        activation,
        gate_activation,
        h.dtype.itemsize == 2 and chip.backend == "cuda",
        context_per_row,
        *matmul_flags(chip, h.dtype).values(),
        *features_flags(chip, h.dtype, *activations),
        pool,
        features,
        SMOOTH=score_activation == "logsigmoid",
    )
    if context is not None and not context_per_row:
        context = context[:, None]
    strides = [(0, 0) if x is None else map(width, x.stride()) for x in (w, gate_w)]
    seqs, length = (cu_seqlens.numel() - 1, h.shape[0]) if packed else h.shape[:2]
    args = {
        "h": sequences(h, packed=packed),
        "weights": Weights(w, *strides[0], b, v, gate_w, *strides[1], gate_b),
        "context": sequences(context, packed=packed and context_per_row),
        "values": sequences(values, packed=packed),
        "mask": entries(None if mask is None else mask.view(torch.uint8), packed=packed),
        "dropout": dropout(seed, dropout_p),
        "num_seqs": seqs,
        "T": 0 if packed else length,
        # Of fewer features than a vector the loop over them went away, and beside 64 hops the backward spilled.
        "size": size._replace(D=width(D), A=A if A < 16 else width(A), DV=width(size.DV)),
    }
    return Call(seqs, length, size, flags, chip, cu_seqlens, args)


def location_fwd(
    inputs: LocationInputs, pool: bool, need_exact: bool, scores_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, scores) as `fused_attn.reference.location_attention` has them, and out in float32.

    Without `pool` there are scores alone, the rest is empty. The last is written only where `need_exact` says so, for
    the backward, which takes differences with it; else it is empty.
    """
    call = prepare(inputs, pool)
    h, w, cu_seqlens = inputs.h, inputs.w, inputs.cu_seqlens
    seqs, packed, (D, A, R, DV) = call.seqs, cu_seqlens is not None, call.size
    out = h.new_empty((seqs, R, DV) if pool else 0)
    exact = h.new_empty((seqs, R, DV) if pool and need_exact else 0, dtype=torch.float32)
    lse = new_lse(seqs if pool else 0, R, device=h.device)
    scores = h.new_empty(*h.shape[:-1], A if call.flags.FEATURES else R, dtype=scores_dtype)
    if seqs == 0 or call.length == 0:
        return out.zero_(), no_key(lse), scores, exact.zero_()

    longest, linear = LONG if packed else call.length, inputs.v is None and pool
    blocks = fwd_blocks(call.chip, h.element_size(), longest, D, A, R, DV, linear)
    one_dv = blocks.DV >= DV
    rows = _rows_per_item(call, packed, blocks.T)
    items = call.items(rows)
    alone = items.per_seq == 1
    parts = Parts(None, None, None)
    if pool:
        # One kernel for all: an item of its own only leaves (m, l) that nobody reads, and its sum, where it is in
        # registers, not even that.
        unread = out if h.dtype == torch.float32 else exact
        o = unread if alone and (one_dv or unread.numel()) else h.new_empty(items.count, R, DV, dtype=torch.float32)
        parts = Parts(o, *(h.new_empty(items.count, R, dtype=torch.float32) for _ in range(2)))
    resident = w is not None and blocks.D >= D
    whole = D % blocks.D == A % blocks.A == DV % blocks.DV == 0
    flags = call.flags._replace(RESIDENT=resident, ONE_DV=one_dv, WHOLE=whole)
    args = {
        **call.args,
        "bias": entries(inputs.score_bias, packed=packed),
        "result": Result(out, lse, scores, exact if need_exact else None),
        "parts": parts,
        "rows_per_item": rows,
        "flags": constants(flags),
    }
    registers = all_registers(call.chip) if D <= 32 or call.chip.arch == 100 else unpressed(call.chip, D, DV, A)
    if call.chip.hopper and linear and R == 1 and even(D, DV) and h.element_size() == 2:
        registers = {"maxnreg": 128}  # two programs a core, as a tile of 128 rows was timed
    launch(_location_fwd_kernel, (items.count,), args, blocks, **registers)
    if pool and not alone:
        merge(*parts, items, out, lse, exact if need_exact else None, skip_single=True)
    return out, lse, scores, exact


def _rows_per_item(call: Call, ragged: bool, block_t: int) -> int:
    """Items for four a core, if their sums fit the workspace; none so short that its sum costs more than its rows.

    Beside the workspace there is, at most, a sum for each sequence.
    """
    want, least = 4 * call.chip.cores, block_t
    if call.flags.POOL:
        want = max(1, min(want, WORKSPACE_BYTES // max(1, 4 * call.size.R * call.size.DV)))
        least = max(128, block_t) if call.size.R == 1 else 4 * block_t
    parts = cdiv(want, 1 if ragged else call.seqs)
    rows = max(cdiv(call.length, parts), least)
    return cdiv(rows, block_t) * block_t
