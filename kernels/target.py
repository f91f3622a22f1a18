"""Target attention: an MLP scores the keys of a history beside one query, and the pooling of rows sums the values.

Forward, for the rows j of an item, of a sequence whose query is q and whose context c = (W_q + W_d) q + b1:

    M = W_key + diag(q) W_product                       (D, A), made on the chip, a tile at a time
    z_j = k_j M + c        u_j = act(z_j)               z'_j = u_j W2 + b2        u'_j = act(z'_j)
    s_j = scale (u'_j · v + b3)

and with a softmax the online softmax over s with acc = Σ p_j value_j, else p = s. Without W2 the score is of u.
The matrix is rounded once, to the dtype of the keys, where the textbook rounds q - k and q ⊙ k of each key.
One sequence makes several items where there are too few to fill the chip; `softmax.merge` joins them. Without a
softmax the first item of a sequence has (m, l) = (0, 1) and each other one (0, 0): so what is merged is a plain sum.

The backward is in target_bwd.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .arguments import constants, entries, launch, sequence_ptr, sequences
from .chip import LENGTHS, LONG, Chip, all_registers, cdiv, chip_of, even, matmul_flags, pow2, rule, tile_rows, unit
from .inputs import TargetInputs
from .location import Blocks, Call, Result, _rows_per_item, features_flags, matmul, near
from .masks import dropout, locate, unmasked
from .products import add_product
from .softmax import finish, merge, new_lse, no_key, online_softmax, store_lse
from .tiles import load_part, load_rows

MAX_UNITS = 128
"""Of the second layer, whose sums a program keeps; of the first there may be any number."""


@triton.jit
def first_layer(
    query,  # (S, D)
    context,  # (S, A)
    key_ptrs,  # [BLOCK_T] pointers to rows of keys
    keep,
    some,  # whether any row is kept: else the query is not read
    seq,
    weights,
    a,
    size,
    flags,
    BLOCK_D: tl.constexpr,
):
    """z of the features a, [BLOCK_T, BLOCK_A]."""
    z = tl.zeros([keep.shape[0], a.shape[0]], tl.float32)
    for d0 in range(0, size.D, BLOCK_D):
        i = tl.arange(0, BLOCK_D)
        d = d0 + i
        x = load_rows(key_ptrs, keep, d, None if flags.WHOLE else size.D)
        q = tl.load(query + seq * size.D + d, mask=(d < size.D) & some, other=0.0).to(tl.float32)
        of_key = load_part(weights.wk, weights.stride_kd, weights.stride_ka, d0, i, a, size.D, size.A, flags.WHOLE)
        of_product = load_part(
            weights.wp, weights.stride_pd, weights.stride_pa, d0, i, a, size.D, size.A, flags.WHOLE
        )
        matrix = of_key.to(tl.float32) + q[:, None] * of_product.to(tl.float32)
        z = add_product(x, matrix, z, flags.COMPUTE, flags.PRECISION)
    c = tl.load(context + seq * size.A + a, mask=(a < size.A) & some, other=0.0)
    return z + c.to(tl.float32)[None, :]


@triton.jit
def second_layer(u, z, weights, a, k, size, flags):
    """The sum z + u W2 [BLOCK_T, BLOCK_K], for the features a of u."""
    w2 = load_part(weights.w2, weights.stride_2a, weights.stride_2k, 0, a, k, size.A, size.K, False)
    return add_product(u, w2, z, flags.U_COMPUTE, flags.U_PRECISION)


@triton.jit
def with_bias(z, weights, k, size):
    """The second layer's sums, and b2."""
    if weights.b2 is not None:
        z += tl.load(weights.b2 + k, mask=k < size.K, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit(do_not_specialize=LENGTHS)
def _target_fwd_kernel(
    query,  # (S, D)
    h,  # keys (B, T, D) or (N, D)
    context,  # (S, A)
    values,  # (B, T, DV), (N, DV), or None: the keys
    weights,
    mask,  # (B, T), (N,) or None
    spans,
    result,
    parts,
    scale,
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
    dv = tl.program_id(1) * blocks.DV + tl.arange(0, blocks.DV)
    first = tl.program_id(1) == 0  # the scores are made for each block of values, and stored once
    k = tl.arange(0, blocks.K)
    m = tl.full([1], float("-inf"), tl.float32)
    l = tl.zeros([1], tl.float32)
    acc = tl.zeros([blocks.DV], tl.float32)

    for t0 in range(lo, hi, blocks.T):
        t = t0 + tl.arange(0, blocks.T)
        inside = t < hi
        rows = start + t
        keep = unmasked(mask, seq, rows, inside)
        some = tl.max(keep.to(tl.int32), axis=0) != 0
        key_ptrs = sequence_ptr(h, seq, rows)
        s = tl.zeros([blocks.T, 1], tl.float32)
        z2 = tl.zeros([blocks.T, blocks.K], tl.float32)
        for a0 in range(0, size.A, blocks.A):
            a = a0 + tl.arange(0, blocks.A)
            z = first_layer(query, context, key_ptrs, keep, some, seq, weights, a, size, flags, blocks.D)
            u = activate(z, flags.ACT, flags.FAST)
            if weights.w2 is None:
                v = tl.load(weights.v + a, mask=a < size.A, other=0.0)
                s = matmul(u, v[:, None], s, flags.U_COMPUTE, flags.U_PRECISION)
            else:
                z2 = second_layer(u, z2, weights, a, k, size, flags)
        if weights.w2 is not None:
            u2 = activate(with_bias(z2, weights, k, size), flags.ACT, flags.FAST)
            v = tl.load(weights.v + k, mask=k < size.K, other=0.0)
            s = matmul(u2, v[:, None], s, flags.U_COMPUTE, flags.U_PRECISION)
        if weights.b3 is not None:
            s += tl.load(weights.b3).to(tl.float32)
        s = tl.where(keep[:, None], s * scale, float("-inf"))
        tl.store(result.scores + (seq * T + rows)[:, None], s, mask=inside[:, None] & first)

        if flags.SOFTMAX:
            p, alpha, m, l = online_softmax(s, m, l, 0, False)
            acc *= alpha
        else:
            p = tl.where(keep[:, None], s, 0.0)
        if values.ptr is None:
            val_ptrs = key_ptrs
        else:
            val_ptrs = sequence_ptr(values, seq, rows)
        x = load_rows(val_ptrs, keep, dv, size.DV).to(tl.float32)
        acc += tl.sum(p * x, axis=0)

    if not flags.SOFTMAX:
        m = tl.zeros([1], tl.float32)
        l = tl.where(lo == 0, tl.full([1], 1.0, tl.float32), 0.0)
    single = items == 1
    one = tl.arange(0, 1)
    tl.store(parts.m + item + one, m, mask=(one == 0) & first)
    tl.store(parts.l + item + one, l, mask=(one == 0) & first)
    store_lse(result.lse + seq * 2 + one, m, l, (one == 0) & single & first)
    write = dv < size.DV
    tl.store(parts.o + item.to(tl.int64) * size.DV + dv, acc, mask=write & (items != 1))
    out = acc * finish(l)
    at = seq * size.DV + dv
    tl.store(result.out + at, out.to(result.out.dtype.element_ty), mask=write & single)
    if result.exact is not None:
        tl.store(result.exact + at, out, mask=write & single)


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


def warps_of(chip: Chip) -> int:
    """AMD's have 64 lanes: of 4 each lane has twice the registers."""
    return 4 if chip.backend == "hip" else 8


@rule
def fwd_blocks(chip: Chip, itemsize: int, T: int, D: int, A: int, K: int, DV: int) -> Blocks:
    """Tiles of the forward: K holds the second layer. Chosen by the compile report (no spills)."""
    block_k, warps = pow2(K, 16, MAX_UNITS), warps_of(chip)
    if itemsize == 4:  # no matrix units in full float32: products are unrolled, and D and A go in steps of 16
        return Blocks(tile_rows(T, 32), 16, 16, pow2(DV, 16, 128), warps, K=block_k)
    # The matrix is made again for each tile, at the cost of its products: twice the rows are half of that a key.
    rows = tile_rows(T, 32 if chip.from_registers or not even(D, A, DV) else 128 if chip.hopper else 64)
    return Blocks(rows, pow2(D, 16, 64), pow2(A, 16, 64 if even(D, A) else 32), pow2(DV, 16, 128), warps, K=block_k)


class Weights(NamedTuple):
    """Those of the MLP, see the top; None where there is none."""

    wk: Tensor  # (D, A)
    stride_kd: int
    stride_ka: int
    wp: Tensor  # (D, A)
    stride_pd: int
    stride_pa: int
    w2: Tensor | None  # (A, K)
    stride_2a: int
    stride_2k: int
    b2: Tensor | None  # (K,)
    v: Tensor  # (K,), without w2 (A,)
    b3: Tensor | None  # (1,)


class Parts(NamedTuple):
    """States of items, float32."""

    o: Tensor  # (items, DV); where every sequence is one item it is not written
    m: Tensor  # (items,)
    l: Tensor


class Size(NamedTuple):
    """Widths of keys, layers and values; hops, of which there is one: the kernels of location attention have more."""

    D: int
    A: int
    R: int
    DV: int
    K: int


class Flags(NamedTuple):
    """What kernels are compiled for."""

    ACT: str
    FAST: bool
    SOFTMAX: bool
    COMPUTE: object
    PRECISION: str
    U_COMPUTE: object  # of products of features: with W2 and v
    U_PRECISION: str
    POOL: bool = True
    WHOLE: bool = False  # D and A are multiples of their blocks
    ONE_A: bool = False  # blocks.A >= A: the backward makes z once


def prepare(inputs: TargetInputs) -> Call:
    """What both passes need, as location attention has it."""
    query, h, w_key, w_product, context, w2, b2, v, b3, values, mask, cu_seqlens, activation, softmax, scale = inputs
    chip = chip_of(h.device)
    packed = cu_seqlens is not None
    D, A = w_key.shape
    size = Size(D, A, 1, (h if values is None else values).shape[-1], A if w2 is None else w2.shape[1])
    flags = Flags(
        activation,
        h.dtype.itemsize == 2 and chip.backend == "cuda",
        softmax,
        *matmul_flags(chip, h.dtype).values(),
        *features_flags(chip, h.dtype, activation),
    )
    w_key, w_product, w2 = near(w_key), near(w_product), near(w2)
    b2, b3, cu_seqlens = (x if x is None else x.contiguous() for x in (b2, b3, cu_seqlens))
    seqs, length = (cu_seqlens.numel() - 1, h.shape[0]) if packed else h.shape[:2]
    strides = (0, 0) if w2 is None else w2.stride()
    args = {
        "query": query.contiguous(),
        "h": sequences(unit(h), packed=packed),
        "context": context.contiguous(),
        "values": sequences(unit(values), packed=packed),
        "weights": Weights(
            w_key, *w_key.stride(), w_product, *w_product.stride(), w2, *strides, b2, v.contiguous(), b3
        ),
        "mask": entries(None if mask is None else mask.view(torch.uint8), packed=packed),
        "dropout": dropout(None, 0.0),
        "scale": scale,
        "num_seqs": seqs,
        "T": 0 if packed else length,
        "size": size,
    }
    return Call(seqs, length, size, flags, chip, cu_seqlens, args)  # type: ignore[arg-type]


def target_fwd(inputs: TargetInputs, need_exact: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, scores) as `fused_attn.reference.target_attention` has them; and out in float32, if asked for."""
    call = prepare(inputs)
    h, packed, (D, A, R, DV, K) = inputs.key, inputs.cu_seqlens is not None, call.size
    out = h.new_empty(call.seqs, R, DV)
    exact = h.new_empty((call.seqs, R, DV) if need_exact else 0, dtype=torch.float32)
    lse = new_lse(call.seqs, R, device=h.device)
    scores = h.new_empty(*h.shape[:-1], R, dtype=torch.float32)
    if call.seqs == 0 or call.length == 0:
        return out.zero_(), no_key(lse), scores, exact.zero_()

    blocks = fwd_blocks(call.chip, h.element_size(), LONG if packed else call.length, D, A, K, DV)
    rows = _rows_per_item(call, packed, blocks.T)
    items = call.items(rows)
    alone = items.per_seq == 1
    o = h.new_empty(0 if alone else items.count, R, DV, dtype=torch.float32)
    parts = Parts(o, *(h.new_empty(items.count, R, dtype=torch.float32) for _ in range(2)))
    args = {
        **call.args,
        "result": Result(out, lse, scores, exact if need_exact else None),
        "parts": parts,
        "rows_per_item": rows,
        "flags": constants(call.flags._replace(WHOLE=D % blocks.D == A % blocks.A == 0)),
    }
    grid = items.count, cdiv(DV, blocks.DV)
    launch(_target_fwd_kernel, grid, args, blocks, **all_registers(call.chip))
    if not alone:
        merge(*parts, items, out, lse, exact if need_exact else None, skip_single=True)
    return out, lse, scores, exact
