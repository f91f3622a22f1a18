"""Backward of concat attention, recomputed from (m, l): nothing of size Tq·Tk·A exists, sums have a fixed order.

With a_ij = exp(s_ij - m_i) / l_i, k_ij the dropout factor, δ_i = dO_i · o_i - l_i dl_i:

    g_ij = a_ij (k_ij dO_i · value_j - δ_i) + dscores_ij           the gradient of s_ij, and of its bias,
                                                                   with `SMOOTH` times 1 - σ(s_ij)
    dvalue_j = Σ_i k_ij a_ij dO_i
    dq_id = Σ_j g_ij v_d act'(q_id + k_jd)        dk_jd = Σ_i g_ij v_d act'(q_id + k_jd)
    dv_d  = Σ_ij g_ij act(q_id + k_jd)

Both dq and dk need g, and g needs the score, a whole forward's work. So g is made once, for as many tiles of
queries as a workspace of fixed size holds (`WORKSPACE_BYTES`), and both loops run on it. (Packed rows are in
concat_bwd_packed.py.) With r = 1 / (1 + αβ):

    tanh:     t = 1 - 2r,  1 - t² = 4 (r - r²)      σ = r,  σ' = r - r²  (of -(q + k), whose sign FACTOR has)

so dq_id = c v_d Σ_j g_ij (r - r²) with c = 4 or 1, and dv wants Σ_j g_ij r. (Σ g r - Σ g r² would cost as much
and lose what cancels: its error was ten times that of the sum of differences.) A thread has
(row, feature) pairs and walks the other axis, two steps with one reciprocal: 1/x0 = x1 / (x0 x1). Sums stay in
registers; no shuffles, no atomics.

float32 inputs (`EXACT`, see concat.py) sum g t for dv, and w - w² with w = min(r, 1 - r) for r - r², which keeps its
precision on both sides; a tile at a time. And for them dO_i · (k_ij value_j - o_i) is one sum: where one key has all
the weight it is 0, and not the difference of two roundings. Without matrix units for float32 this costs one
operation more an element. Σ_j a_ij of it is 0 but for the rounding of o, which all keys of a query have alike: a
launch before the others takes it out, by way of δ. At scores of 100 gradients were off by up to 30 times what the
reference's are.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import head_ptr, launch, pitch, untold
from .chip import LENGTHS, LONG, Chip, all_registers, cdiv, pow2, rule, tile_rows, unpressed, vectors
from .concat import Call, prepare
from .concat_factors import Factors, Saved, bound_at, factors, rows_before, rows_of, tile_at
from .concat_walk import (
    Gradients,
    Workspace,
    features_gradient,
    gradient_tile,
    staying,
    tile_weights,
    tiles_meet,
    walk_tile,
)
from .inputs import ConcatInputs
from .masks import mirrored, split_tiles, unmasked, window_range, window_tiles
from .products import add_product
from .sums import sums
from .tiles import add_later, load_rows, store_rows

WORKSPACE_BYTES = 64 * 2**20


@triton.jit
def _slot(local, head, tile, k_side, size, blocks):
    """Where a pair of tiles begins in the workspace of padded rows; local: a tile of queries of this launch."""
    return ((local.to(tl.int64) * size.H + head) * (k_side.per_seq >> 2) + tile) * blocks.N * blocks.M


@triton.jit
def _query_tiles(window, k_lo, k_hi, q_length, q_tile0, q_items, blocks):
    """Tiles of queries that see one of blocks.R keys from k_lo on, of this launch's: q_items from q_tile0 on."""
    begin, end = window_tiles(mirrored(window), k_lo, tl.minimum(k_lo + blocks.R, k_hi), q_length, blocks.M)
    return tl.maximum(begin, q_tile0), tl.minimum(end, q_tile0 + q_items)


@triton.jit(do_not_specialize=LENGTHS)
def _concat_bwd_g_kernel(
    q,  # (B, H, Tq, A)
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
    saved,
    work,  # of the tiles of queries of this launch, and all of keys
    Tq,
    Tk,
    window,
    size,
    flags,
    blocks,
):
    """One pair of tiles of a padded batch."""
    local = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(2)
    q_item = (work.item0 >> 2) + local
    seq, q_start, lo, hi, _ = tile_at(q_item, q_side, Tq, blocks.M)
    gradient_tile(
        _slot(local, head, tile, k_side, size, blocks),
        q_item,
        tile,
        head,
        (seq, q_start, lo, hi),
        rows_of(seq, k_side, Tk, blocks.N),
        q,
        k,
        v,
        value,
        bias,
        mask,
        q_rows,
        k_rows,
        q_side,
        k_side,
        dropout,
        saved,
        work,
        Tq,
        Tk,
        window,
        size,
        flags,
        blocks,
    )


@triton.jit(do_not_specialize=LENGTHS)
def _concat_bwd_gap_kernel(
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
    saved,
    gaps,
    splits,
    Tq,
    Tk,
    window,
    size,
    flags,
    blocks,
):
    """Σ_j a_ij dO_i · (k value_j - o_i) over a part of the keys: for all of them 0, but for roundings."""
    q_item = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    seq, q_start, lo, hi, _ = tile_at(q_item, q_side, Tq, blocks.M)
    k_start, k_length, k_item0 = rows_of(seq, k_side, Tk, blocks.N)
    tile0, tile1 = window_tiles(window, lo, hi, k_length, blocks.N)
    begin, end = split_tiles(tile0, tile1, split, splits)
    total = tl.zeros([blocks.M], tl.float32)
    for tile in range(begin, end):
        p, _pk, gap, _s, shown = tile_weights(
            q_item,
            tile,
            head,
            (seq, q_start, lo, hi),
            (k_start, k_length, k_item0),
            q,
            k,
            v,
            value,
            bias,
            mask,
            q_rows,
            k_rows,
            q_side,
            k_side,
            dropout,
            saved,
            Tq,
            Tk,
            window,
            size,
            flags,
            blocks,
        )
        total += tl.sum(tl.where(shown, p * gap, 0.0), axis=1)
    i = lo + tl.arange(0, blocks.M)
    rows = split.to(tl.int64) * (gaps.stride >> 2) + rows_before(seq, head, q_side, Tq, size.H)
    tl.store(gaps.ptr + rows + (q_start + i).to(tl.int64), total, mask=i < hi)


@triton.jit(do_not_specialize=LENGTHS)
def _concat_bwd_dq_kernel(
    q,  # (B, H, Tq, A)
    k,  # (B, H, Tk, A)
    v,
    q_rows,  # (B, Tq): rows that may be read, or None
    k_rows,  # (B, Tk)
    q_side,
    k_side,
    work,
    grads,
    splits,
    Tq,
    Tk,
    window,
    size,
    flags,
    blocks,
):
    local = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2) % splits
    d = (tl.program_id(2) // splits) * blocks.D + tl.arange(0, blocks.D)
    q_item = (work.item0 >> 2) + local
    seq, q_start, lo, hi, _ = tile_at(q_item, q_side, Tq, blocks.M)
    k_start, k_length, k_item0 = rows_of(seq, k_side, Tk, blocks.N)
    m = tl.arange(0, blocks.M)
    at = (q_start + lo + m).to(tl.int64)
    q_keep = unmasked(q_rows, seq, at, lo + m < hi)
    q_ptrs = head_ptr(q, seq, head) + at * pitch(q)
    q_tile = q_item.to(tl.int64) * size.H + head
    x = staying(q_side, q_tile * blocks.M + m[:, None], d, size)
    s1 = tl.zeros([blocks.M, blocks.D], tl.float32)
    s2 = tl.zeros([blocks.M, blocks.D], tl.float32)
    total = tl.zeros([blocks.M], tl.float32)
    _, last = window_range(window, lo, hi, k_length)
    tile0, tile1 = window_tiles(window, lo, hi, k_length, blocks.N)
    tile1 = tl.where(lo < hi, tile1, tile0)
    begin, end = split_tiles(tile0, tile1, split, splits)
    for tile in range(begin, end):
        k_tile = (k_item0 + tile).to(tl.int64) * size.H + head
        g_tile = work.g + _slot(local, head, tile, k_side, size, blocks)
        s1, s2 = walk_tile(
            s1,
            s2,
            x,
            d,
            k_side.rows + k_tile * blocks.N * size.AP,
            g_tile,
            blocks.M,
            tl.minimum(blocks.N, tl.cdiv(last - tile * blocks.N, 2) * 2),
            bound_at(q_side, q_tile, blocks.M) + bound_at(k_side, k_tile, blocks.N) <= flags.SAFE,
            q_ptrs,
            q_keep,
            k,
            k_rows,
            seq,
            head,
            (k_start + tile * blocks.N).to(tl.int64),
            k_length - tile * blocks.N,
            size,
            flags,
            True,
        )
        if flags.ACT == "tanh" and not flags.EXACT:
            n = tl.arange(0, blocks.N)
            total += tl.sum(tl.load(g_tile + n[:, None] * blocks.M + m[None, :]), axis=0)
    if flags.ACT == "tanh" and not flags.EXACT:
        s1 = total[:, None] - 2.0 * s1
    part = split.to(tl.int64) * (q_side.num_seqs >> 2)
    rows = part * size.H * Tq + (rows_before(seq, head, q_side, Tq, size.H) + at)
    dq = features_gradient(s2, v, head, d, size, flags)
    store_rows(grads.q + rows * size.A, dq, lo + m < hi, d, size.A)
    item = part * (q_side.per_seq >> 2) * size.H + q_tile
    tl.store(grads.v + item * size.AP + d, tl.sum(s1, axis=0), mask=d < size.AP)


@triton.jit
def _gradient_of_keys(
    features, q, k, v, q_rows, k_rows, q_side, k_side, work, grads, q_items, Tq, Tk, window, size, flags, blocks
):
    """Dk of a tile of blocks.R keys and blocks.D features."""
    here = _keys_of_program(q_side, k_side, work, q_items, Tq, Tk, window, blocks)
    k_item, offset, k_lo, k_hi, at, seq, head, q_start, q_length, q_first, begin, end = here
    d = features * blocks.D + tl.arange(0, blocks.D)
    r = tl.arange(0, blocks.R)
    q_item0 = work.item0 >> 2
    inside = k_lo + offset + r < k_hi
    k_keep = unmasked(k_rows, seq, at, inside)
    k_ptrs = head_ptr(k, seq, head) + at * pitch(k)
    k_tile = k_item.to(tl.int64) * size.H + head
    x = staying(k_side, k_tile * blocks.N + offset + r[:, None], d, size)
    s1 = tl.zeros([1, 1], tl.float32)
    s2 = tl.zeros([blocks.R, blocks.D], tl.float32)
    for tile in range(begin, end):
        lo = tile * blocks.M
        hi = tl.minimum(lo + blocks.M, q_length)
        if tiles_meet(window, lo, hi, k_lo, k_hi, blocks.N):
            q_tile = (q_first + tile).to(tl.int64) * size.H + head
            slot = _slot(q_first + tile - q_item0, head, k_lo // blocks.N, k_side, size, blocks)
            s1, s2 = walk_tile(
                s1,
                s2,
                x,
                d,
                q_side.rows + q_tile * blocks.M * size.AP,
                work.gt + slot + offset,
                blocks.N,
                tl.minimum(blocks.M, tl.cdiv(q_length - lo, 2) * 2),
                bound_at(q_side, q_tile, blocks.M) + bound_at(k_side, k_tile, blocks.N) <= flags.SAFE,
                k_ptrs,
                k_keep,
                q,
                q_rows,
                seq,
                head,
                (q_start + lo).to(tl.int64),
                q_length - lo,
                size,
                flags,
                False,
            )
    dk_ptrs = grads.k + rows_before(seq, head, k_side, Tk, size.H) * size.A + at * size.A
    add_later(dk_ptrs, features_gradient(s2, v, head, d, size, flags), inside, d, size.A, q_item0)


@triton.jit
def _gradient_of_values(
    columns, q_rows, q_side, k_side, saved, work, grads, q_items, Tq, Tk, window, size, flags, blocks
):
    """Dvalue of a tile of blocks.R keys and blocks.DV columns."""
    here = _keys_of_program(q_side, k_side, work, q_items, Tq, Tk, window, blocks)
    _, offset, k_lo, k_hi, at, seq, head, q_start, q_length, q_first, begin, end = here
    d = columns * blocks.DV + tl.arange(0, blocks.DV)
    r = tl.arange(0, blocks.R)
    m = tl.arange(0, blocks.M)
    q_item0 = work.item0 >> 2
    before = rows_before(seq, head, q_side, Tq, size.H)
    acc = tl.zeros([blocks.R, blocks.DV], tl.float32)
    for tile in range(begin, end):
        lo = tile * blocks.M
        hi = tl.minimum(lo + blocks.M, q_length)
        if tiles_meet(window, lo, hi, k_lo, k_hi, blocks.N):
            q_at = (q_start + lo + m).to(tl.int64)
            q_keep = unmasked(q_rows, seq, q_at, lo + m < q_length)
            slot = _slot(q_first + tile - q_item0, head, k_lo // blocks.N, k_side, size, blocks)
            p = tl.load(work.p + slot + (offset + r)[:, None] * blocks.M + m[None, :])
            do = load_rows(saved.do + (before + q_at) * size.DV, q_keep, d, size.DV)
            acc = add_product(p, do, acc, flags.COMPUTE, flags.PRECISION)
    dval_ptrs = grads.value + rows_before(seq, head, k_side, Tk, size.H) * size.DV + at * size.DV
    add_later(dval_ptrs, acc, k_lo + offset + r < k_hi, d, size.DV, q_item0)


@triton.jit
def _keys_of_program(q_side, k_side, work, q_items, Tq, Tk, window, blocks):
    """Of this program the tile of keys, those that it has of it, sequence and head, and the queries they meet."""
    parts: tl.constexpr = blocks.N // blocks.R
    k_item = tl.program_id(0) // parts
    offset = (tl.program_id(0) % parts) * blocks.R
    head = tl.program_id(1).to(tl.int64)
    seq, k_start, k_lo, k_hi, _ = tile_at(k_item, k_side, Tk, blocks.N)
    q_start, q_length, q_first = rows_of(seq, q_side, Tq, blocks.M)
    at = (k_start + k_lo + offset + tl.arange(0, blocks.R)).to(tl.int64)
    q_tile0 = (work.item0 >> 2) - q_first
    begin, end = _query_tiles(window, k_lo + offset, k_hi, q_length, q_tile0, q_items, blocks)
    return k_item, offset, k_lo, k_hi, at, seq, head, q_start, q_length, q_first, begin, end


@triton.jit(do_not_specialize=LENGTHS)
def _concat_bwd_dkv_kernel(
    q,  # (B, H, Tq, A)
    k,  # (B, H, Tk, A)
    v,
    q_rows,  # (B, Tq): rows that may be read, or None
    k_rows,  # (B, Tk)
    q_side,
    k_side,
    saved,
    work,
    grads,
    q_items,  # of this launch
    Tq,
    Tk,
    window,
    size,
    flags,
    blocks,
):
    """Dk by programs that are longer, and so begin, and dvalue."""
    program = tl.program_id(2)
    if grads.k is not None:
        own = tl.cdiv(size.A, blocks.D)
        if program < own:
            _gradient_of_keys(
                program,
                q,
                k,
                v,
                q_rows,
                k_rows,
                q_side,
                k_side,
                work,
                grads,
                q_items,
                Tq,
                Tk,
                window,
                size,
                flags,
                blocks,
            )
        program -= own
    if grads.value is not None:  # noqa: SIM102 — the one is known to the compiler, the other is not
        if program >= 0:
            _gradient_of_values(
                program, q_rows, q_side, k_side, saved, work, grads, q_items, Tq, Tk, window, size, flags, blocks
            )


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Sizes of tiles: queries, keys, width of the values."""

    M: int
    N: int
    DV: int
    R: int  # rows of a tile of keys that a walk's program has, or walks at a time
    D: int  # features that it has
    warps: int
    walk_warps: int
    stages: int = 2


@rule
def bwd_blocks(
    chip: Chip,
    itemsize: int,
    Tq: int,
    Tk: int,
    A: int,
    factored: bool,
    busy: bool,
    packed: bool,
    terms: bool,
    smooth: bool,
) -> Blocks:
    """Tiles of g and dvalue, and of dq and dk. With packed rows both are in one kernel, and half the keys fit.

    Half the keys where the activation has no factors, too: |z| and z² spilled. dq and dk: 32 rows by 128 features on
    4 warps are 32 sums a thread; the compile report counts 6.6 and 5.6 instructions an element on sm_90. On an H200
    half as many features a program are 1.3 times as fast: more programs share a core. `terms`: packed rows have a
    number a pair; with a bias 128 features spilled. `smooth`: the logarithm of the sigmoid, with which 64 keys
    spilled on AMD.
    """
    if chip.backend == "interpreter":
        return Blocks(16, 32, 16, 16, pow2(A, 16, 32), 4, 4)
    if itemsize == 4:
        keys, warps = (64, 8) if packed else (pow2(Tk, 32, 128 if factored else 64), 4)
        return Blocks(16, keys, 16, 32, pow2(A, 16, 128 if vectors(A) else 64), warps, 8)
    hip = chip.backend == "hip"
    most = 64 if packed or not factored or (hip and busy) or chip.arch == 100 else 128
    most = 32 if hip and busy and (packed or smooth) else most
    features = 64 if chip.hopper or terms else 128  # half the registers, so that more programs share a core
    features, walk_warps = (pow2(A, 16, features), 4) if vectors(A) else (pow2(A, 16, 64), 8)
    return Blocks(tile_rows(Tq, 32), tile_rows(Tk, most), 32, 32, features, 8, walk_warps)


def concat_bwd(
    inputs: ConcatInputs,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dscores: Tensor | None,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of (query, key, value, v, score_bias), None where `needs` is False."""
    query, key, value, v, score_bias, _, *offsets, _, activation, _, _, _, _ = inputs
    cu_seqlens_q, cu_seqlens_k = (x if x is None else x.contiguous() for x in offsets)
    call = prepare(inputs, dscores is not None, lse)
    need_q, need_k, need_value, need_v, need_bias = needs
    (B, H, Tq, A), Tk = query.shape, key.shape[2]
    packed = inputs.packed
    if not (query.numel() and key.numel() and value.numel() and call.seqs):
        return [torch.zeros_like(x) if need else None for x, need in zip(inputs[:5], needs, strict=True)]
    lengths = (LONG, LONG) if packed else (Tq, Tk)
    terms = call.starts is not None
    kind = call.flags.FACTORED, call.busy, packed, terms, call.flags.SMOOTH
    blocks = bwd_blocks(call.chip, value.element_size(), *lengths, A, *kind)
    dout, dlse, dscores, out, lse = (x if x is None else x.contiguous() for x in (dout, dlse, dscores, out, lse))
    gap = call.flags.EXACT and any((need_q, need_k, need_v, need_bias))
    splits = 0
    if gap:
        programs = cdiv(Tq, blocks.M) * H * B
        splits = 1 if packed else max(1, min(2 * call.chip.cores // programs, cdiv(Tk, 2 * blocks.N)))
    rows = B * H * Tq
    delta = lse.new_empty(1 + splits, cdiv(rows, 4) * 4)[:, :rows]  # each at 16 bytes
    saved = Saved(dout, dscores, out, lse, dlse, delta[0])
    made = factors(call.args, v, (cu_seqlens_q, cu_seqlens_k), (blocks.M, blocks.N), activation, saved)
    made.args["k_side"] = made.args["k_side"]._replace(pairs=call.starts)
    if gap:
        made = _exact_delta(call, made, blocks, delta, splits)
    f32 = {"dtype": torch.float32, "device": query.device}
    pairs = (1, H, score_bias.shape[-1]) if packed and need_bias else (B, H, Tq, Tk)
    dbias = torch.zeros(pairs, **f32) if need_bias else None
    if packed:
        from .concat_bwd_packed import packed_gradients  # which is made of this file's loops

        grads = packed_gradients(call, made, blocks, needs, dbias)
    else:
        grads = _padded_gradients(call, made, blocks, needs, dbias)
    dq, dk, dvalue, dv = grads
    return [
        dq.to(query.dtype) if need_q else None,
        dk.to(key.dtype) if need_k else None,
        dvalue.to(value.dtype) if need_value else None,
        dv.to(v.dtype) if need_v else None,
        dbias.sum_to_size(score_bias.shape).to(score_bias.dtype) if need_bias else None,
    ]


class Gaps(NamedTuple):
    """Sums of parts of the keys."""

    ptr: Tensor  # (splits, B, H, Tq) float32
    stride: int  # 4 n + 3, see arguments.untold


def _exact_delta(call: Call, made: Factors, blocks: Blocks, parts: Tensor, splits: int) -> Factors:
    """What was made, with δ less what is left of the sums that should be 0: see general_bwd.py.

    parts: ``(1 + splits, B H Tq)``, δ is the first.
    """
    gaps = Gaps(parts[1:], untold(parts.stride(0)))
    args = made.args | {"gaps": gaps, "splits": splits}
    launch(_concat_bwd_gap_kernel, (made.q_items, call.size.H, splits), args, blocks, **all_registers(call.chip))
    (delta,) = sums([(parts, torch.float32)])
    return made._replace(args=made.args | {"saved": made.args["saved"]._replace(delta=delta)})


def compute_dtype(call: Call) -> torch.dtype:
    """What the weights are stored in for their product with dO."""
    return torch.float32 if call.chip.backend == "interpreter" else call.args["value"].ptr.dtype


def _padded_gradients(
    call: Call, made: Factors, blocks: Blocks, needs: list[bool], dbias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dvalue, dv) as they are needed, each in its own dtype or in float32; g into dbias.

    A launch has as many tiles of queries as the workspace holds, too few to fill a chip where keys are many: a
    program a tile took 116 of 129 ms on an H200 (B 2, Tq 128, Tk 65,536, A 128). So dq's loop over the keys is split
    into parts, bounded as the workspace is.
    """
    need_q, need_k, need_value, need_v, _ = needs
    args, (H, A, AP, DV) = made.args, call.size
    q, k, value, v = args["q"].ptr, args["k"].ptr, args["value"].ptr, args["v"].given
    Tq, Tk = args["Tq"], args["Tk"]
    k_tiles, pair = cdiv(Tk, blocks.N), blocks.M * blocks.N
    slot = k_tiles * H * pair * (8 + compute_dtype(call).itemsize)
    chunk = max(1, min(made.q_items, WORKSPACE_BYTES // max(1, slot)))
    features = cdiv(A, blocks.D)
    bound = WORKSPACE_BYTES // (4 * call.seqs * H * Tq * A)
    splits = max(1, min(4 * call.chip.cores // (chunk * H * features), cdiv(k_tiles, 2), bound))
    g = torch.empty(chunk, H, k_tiles, pair, dtype=torch.float32, device=v.device)
    work = Workspace(g, torch.empty_like(g), torch.empty_like(g, dtype=compute_dtype(call)), dbias, 0)
    args = args | {"splits": splits}
    dq = dv = dk = dvalue = None
    if need_q or need_v:
        dq = g.new_empty(splits, *q.shape)
        dv = g.new_empty(splits * made.q_items, H, AP)
    if need_k:
        dk = g.new_empty(k.shape)
    if need_value:
        dvalue = g.new_empty(value.shape)
    tight = not call.flags.FACTORED or (call.flags.EXACT and call.busy)
    registers = all_registers(call.chip) if tight else unpressed(call.chip, A, DV)
    walk = blocks._replace(warps=blocks.walk_warps)
    keys = made.k_items * (blocks.N // blocks.R)

    def add(kernel, grid: tuple[int, ...], tiles: Blocks, **grads: Tensor | None) -> None:
        launch(kernel, grid, args | {"grads": Gradients(**grads)}, tiles, **registers)

    for q_item0 in range(0, made.q_items, chunk):
        count = min(chunk, made.q_items - q_item0)
        args |= {"work": work._replace(item0=untold(q_item0)), "q_items": count}
        add(_concat_bwd_g_kernel, (count, H, k_tiles), blocks)
        if dq is not None:
            add(_concat_bwd_dq_kernel, (count, H, features * splits), walk, q=dq, v=dv)
        if dk is not None or dvalue is not None:
            programs = (features if need_k else 0) + (cdiv(DV, blocks.DV) if need_value else 0)
            add(_concat_bwd_dkv_kernel, (keys, H, programs), walk, k=dk, value=dvalue)
    # Float32 until here, whatever the parts and launches: as many variants of the kernels. One launch casts them all.
    parts = [
        (None if dq is None else dq.flatten(1), q.dtype),
        (None if dk is None or k.dtype == torch.float32 else dk.view(1, -1), k.dtype),
        (None if dvalue is None or value.dtype == torch.float32 else dvalue.view(1, -1), value.dtype),
        (dv[..., :A] if dv is not None and need_v else None, v.dtype),
    ]
    dq_sum, dk_cast, dvalue_cast, dv_sum = sums(parts)
    return (
        None if dq_sum is None else dq_sum.view(q.shape),
        dk if dk_cast is None else dk_cast.view(k.shape),
        dvalue if dvalue_cast is None else dvalue_cast.view(value.shape),
        dv_sum,
    )
