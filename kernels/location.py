"""Location attention: a score from the key alone, softmax, weighted sum, in one pass over H.

Forward, for the rows j of an item (h_j is row j of H, r a hop):

    z_j = h_j W + b + ctx_j       u_j = act(z_j) [⊙ gate(h_j G + g)]       s_jr = u_j · v_r + bias_j

and the online softmax over s with acc = Σ p_jr value_j. Where the values are H and D fits, the tile of H that
fed the projection also feeds the weighted sum. Without `v` the score is u itself (A = R).
One sequence makes several items where there are too few sequences to fill the chip; `softmax.merge` joins them.

The backward is in location_bwd.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .chip import (
    LENGTHS,
    LONG,
    Chip,
    chip_of,
    even,
    fitted,
    matmul_flags,
    pow2,
    stride_of,
    tile_rows,
    unit,
    unpressed,
)
from .masks import Items, old_dropout_scale, old_locate, partition
from .products import add_product
from .softmax import finish, merge, new_lse, no_key, online_softmax, store_lse

MAX_HOPS = 128
WORKSPACE_BYTES = 32 * 2**20  # under the L2 of an H100, so that what is written there is read back from there


# ---------------------------------------------------------------------------------------------------------------
# Device helpers
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def load_rows(ptrs, keep, cols, width):
    """Tile [BLOCK_T, BLOCK] of rows at ptrs [BLOCK_T]; 0 outside: what is masked is never read."""
    return tl.load(ptrs[:, None] + cols[None, :], mask=keep[:, None] & (cols < width)[None, :], other=0.0)


@triton.jit
def _load_weight(w_ptr, stride_wd, stride_wa, d, a, D, A):
    """Tile W[d, a]; 0 outside."""
    return tl.load(
        w_ptr + d[:, None] * stride_wd + a[None, :] * stride_wa,
        mask=(d < D)[:, None] & (a < A)[None, :],
        other=0.0,
    )


@triton.jit
def matmul(x, y, acc, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """The sum acc + x y; where y has one column, in float32 without the matrix units."""
    if y.shape[1] == 1:
        # + 0: a product that is fused into a sum across threads leaves them with different last bits, and then the
        # largest score is not that of the key that has it, nor the weight of a key alone 1.
        return acc + tl.sum(x.to(tl.float32) * tl.trans(y.to(tl.float32)) + 0.0, axis=1)[:, None]
    return add_product(x, y, acc, COMPUTE, PRECISION)


@triton.jit
def project(
    h_ptrs,  # [BLOCK_T] pointers to rows of H
    h,  # the tile [BLOCK_T, BLOCK_D] itself where RESIDENT
    rows,
    seq,
    keep,
    w_ptr, stride_wd, stride_wa,
    b_ptr,
    gw_ptr, stride_gd, stride_ga,
    gb_ptr,
    ctx_ptr, stride_cb, stride_ct,
    a,
    num_seqs,
    D,
    A,
    CTX_PER_ROW: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(H W + b + ctx, H G + g) for the features a, [BLOCK_T, BLOCK_A] each; H itself is projected where W is None."""
    z = tl.zeros([keep.shape[0], a.shape[0]], tl.float32)
    g = tl.zeros([keep.shape[0], a.shape[0]], tl.float32)
    if w_ptr is None:
        z = load_rows(h_ptrs, keep, a, A).to(tl.float32)
    elif RESIDENT:
        d = tl.arange(0, BLOCK_D)
        z = matmul(h, _load_weight(w_ptr, stride_wd, stride_wa, d, a, D, A), z, COMPUTE, PRECISION)
        if gw_ptr is not None:
            g = matmul(h, _load_weight(gw_ptr, stride_gd, stride_ga, d, a, D, A), g, COMPUTE, PRECISION)
    else:
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            h_d = load_rows(h_ptrs, keep, d, D)
            z = matmul(h_d, _load_weight(w_ptr, stride_wd, stride_wa, d, a, D, A), z, COMPUTE, PRECISION)
            if gw_ptr is not None:
                g = matmul(h_d, _load_weight(gw_ptr, stride_gd, stride_ga, d, a, D, A), g, COMPUTE, PRECISION)
    if b_ptr is not None:
        z += tl.load(b_ptr + a, mask=a < A, other=0.0).to(tl.float32)[None, :]
    if gb_ptr is not None:
        g += tl.load(gb_ptr + a, mask=a < A, other=0.0).to(tl.float32)[None, :]
    if ctx_ptr is not None:
        if CTX_PER_ROW:
            z += load_rows(ctx_ptr + seq * stride_cb + rows * stride_ct, keep, a, A).to(tl.float32)
        else:
            ctx = tl.load(ctx_ptr + seq * stride_cb + a, mask=(a < A) & (seq < num_seqs), other=0.0)
            z += tl.where(keep[:, None], ctx.to(tl.float32)[None, :], 0.0)  # of a sequence that sees nothing: unread
    return z, g


@triton.jit
def _weighted_sum(values, p, BLOCK_P: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """Σ_j value_j p_j, [BLOCK_DV, BLOCK_P].

    As a matrix product it reads the tile from shared memory, where the projection left it; written as a sum over
    registers it spilled at D = 512.
    """
    if BLOCK_P == 1:
        return tl.sum(values.to(tl.float32) * p, axis=0)[:, None]
    p = tl.broadcast_to(p, [p.shape[0], BLOCK_P])  # one hop: sixteen equal columns, the first is stored
    return tl.dot(tl.trans(values.to(COMPUTE)), p.to(COMPUTE), input_precision=PRECISION)


# ---------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=LENGTHS)
def _location_fwd_kernel(
    h_ptr, stride_hb, stride_ht,  # (B, T, D), or (N, D) with stride_hb = 0
    w_ptr, stride_wd, stride_wa,  # (D, A), or None: A = D
    b_ptr,  # (A,) or None
    v_ptr,  # (A, R) or None
    gw_ptr, stride_gd, stride_ga,  # (D, A) or None
    gb_ptr,  # (A,) or None
    ctx_ptr, stride_cb, stride_ct,  # (S, A), (B, T, A), (N, A) or None
    val_ptr, stride_ub, stride_ut,  # (B, T, DV), (N, DV), or None: H
    bias_ptr, stride_sb, stride_st,  # (B, T), (N,) or None
    mask_ptr, stride_mb, stride_mt,  # (B, T), (N,) or None
    cu_ptr,  # (S + 1,) or None
    seq_ptr,  # see masks.Items
    first_ptr,
    seed_ptr,  # (1,) int64 or None
    out_ptr,  # (S, R, DV) float32
    lse_ptr,  # (S, R, 2) float32: (m, l), see softmax.py
    scores_ptr,  # (B, T, R) or (N, R) float32
    o_ptr,  # (items, R, DV) float32; where every sequence is one item, and ONE_DV, it is not written
    m_ptr,  # (items, R) float32
    l_ptr,  # (items, R) float32
    num_seqs,
    per_seq,
    rows_per_item,
    T,  # 0 where the batch is ragged
    D,
    A,
    R,
    DV,
    threshold,
    scale,
    ACT: tl.constexpr,
    GATE_ACT: tl.constexpr,
    FAST: tl.constexpr,
    CTX_PER_ROW: tl.constexpr,
    RESIDENT: tl.constexpr,  # BLOCK_D >= D: a tile of H is loaded once and kept
    ONE_DV: tl.constexpr,  # BLOCK_DV >= DV: the sum is kept in registers, else in o_ptr
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    U_COMPUTE: tl.constexpr,  # of the product with v
    U_PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,  # 1 for one hop, else at least 16
    BLOCK_P: tl.constexpr,  # columns of p in the weighted sum: 1 is a sum, more a matrix product
):  # fmt: skip
    item = tl.program_id(0)
    seq, start, lo, hi, items = old_locate(item, cu_ptr, seq_ptr, first_ptr, T, num_seqs, per_seq, rows_per_item)
    r = tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_P)
    dv = tl.arange(0, BLOCK_DV)
    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_DV if ONE_DV else 1, BLOCK_P], tl.float32)

    for t0 in range(lo, hi, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        inside = t < hi
        rows = (start + t).to(tl.int64)
        keep = inside
        if mask_ptr is not None:
            keep = tl.load(mask_ptr + seq * stride_mb + rows * stride_mt, mask=inside, other=0) != 0
        h_ptrs = h_ptr + seq * stride_hb + rows * stride_ht
        if RESIDENT:
            h = load_rows(h_ptrs, keep, tl.arange(0, BLOCK_D), D)
        else:
            h = h_ptrs

        s = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
        for a0 in range(0, A, BLOCK_A):
            a = a0 + tl.arange(0, BLOCK_A)
            z, g = project(
                h_ptrs, h, rows, seq, keep, w_ptr, stride_wd, stride_wa, b_ptr, gw_ptr, stride_gd, stride_ga, gb_ptr,
                ctx_ptr, stride_cb, stride_ct, a, num_seqs, D, A, CTX_PER_ROW, RESIDENT, BLOCK_D, COMPUTE, PRECISION,
            )  # fmt: skip
            u = activate(z, ACT, FAST)
            if gw_ptr is not None:
                u *= activate(g, GATE_ACT, FAST)
            if v_ptr is None:
                s = u
            else:
                v = tl.load(v_ptr + a[:, None] * R + r[None, :], mask=(a < A)[:, None] & (r < R)[None, :], other=0.0)
                s = matmul(u, v, s, U_COMPUTE, U_PRECISION)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + seq * stride_sb + rows * stride_st, mask=keep, other=0.0)
            s += bias.to(tl.float32)[:, None]
        s = tl.where(keep[:, None], s, float("-inf"))
        at = (seq * T + rows)[:, None] * R + r[None, :]
        tl.store(scores_ptr + at, s, mask=inside[:, None] & (r < R)[None, :])

        p, alpha, m, l = online_softmax(s, m, l)
        if seed_ptr is not None:
            p *= old_dropout_scale(seed_ptr, t[:, None], seq, r[None, :], threshold, scale)
        if val_ptr is None:
            val_ptrs = h_ptrs
        else:
            val_ptrs = val_ptr + seq * stride_ub + rows * stride_ut
        if ONE_DV:
            if RESIDENT and val_ptr is None:
                values = h
            else:
                values = load_rows(val_ptrs, keep, dv, DV)
            acc = acc * alpha[None, :] + _weighted_sum(values, p, BLOCK_P, COMPUTE, PRECISION)
        else:
            # Too wide for registers: the running sum lives in this item's slot of o_ptr, which stays in cache.
            for d0 in range(0, DV, BLOCK_DV):
                d = d0 + dv
                values = load_rows(val_ptrs, keep, d, DV)
                new = _weighted_sum(values, p, BLOCK_P, COMPUTE, PRECISION)
                o_ptrs = o_ptr + (item.to(tl.int64) * R + col[None, :]) * DV + d[:, None]
                write = (d < DV)[:, None] & (col < R)[None, :]
                old = tl.load(o_ptrs, mask=write & (t0 > lo), other=0.0)
                tl.store(o_ptrs, old * alpha[None, :] + new, mask=write)
            tl.debug_barrier()  # the next tile's load may belong to another thread

    valid = seq < num_seqs
    if ONE_DV:
        single = valid & (items == 1)
    else:
        single = valid & False
    at = item.to(tl.int64) * R + r
    tl.store(m_ptr + at, m, mask=r < R)
    tl.store(l_ptr + at, l, mask=r < R)
    inv = finish(l)
    store_lse(lse_ptr + (seq * R + r) * 2, m, l, (r < R) & single)
    if ONE_DV:
        write = (dv < DV)[:, None] & (col < R)[None, :]
        offsets = col[None, :] * DV + dv[:, None]
        out = (acc * inv[None, :]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + seq * R * DV + offsets, out, mask=write & single)
        tl.store(o_ptr + item.to(tl.int64) * R * DV + offsets, acc, mask=write & (items != 1))


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


def hop_block(hops: int) -> int:
    """One hop is a column of its own; more feed matrix products, whose smallest side is 16."""
    return 1 if hops == 1 else pow2(hops, 16, MAX_HOPS)


def fwd_blocks(chip: Chip, itemsize: int, T: int, D: int, A: int, R: int, DV: int, linear: bool) -> Blocks:
    """Tiles of the forward. `blocks.D >= D` keeps a tile of H on chip from the projection to the weighted sum.

    Chosen by the compile report (no spills, shared memory within the chip), and for sm_90 on an H200: see
    `bench/NOTES.md`. Where W is read in parts, four stages of them; linear scores have only the tile to wait for, so
    it is as long as an item, or in float32 as wide.
    """
    hop = hop_block(R)
    hopper = chip.hopper
    wide = max(16, hop)  # columns of the accumulator: 8192 elements of it are 32 registers a thread of 8 warps
    whole = even(D, DV, A)
    warps = 4 if chip.backend == "hip" and hop > 1 else 8  # 4 waves of 64 lanes have 512 registers a lane
    if itemsize == 4:
        # No matrix units in full float32: products are unrolled, so the tile is small and D goes in steps of 16.
        block_a = (
            hop
            if linear
            else pow2(A, 16, 64 if hop == 1 and whole and chip.backend != "hip" else 32 if hop <= 32 else 16)
        )
        block_d = pow2(D, 16, 128) if hopper and linear and hop == 1 else 16
        return Blocks(tile_rows(T, 32 if hop == 1 else 16), block_d, block_a, pow2(DV, 16, 4096 // wide), warps)
    if not whole:
        block_a = hop if linear else pow2(A, 16, 32)
        return Blocks(tile_rows(T, 32), pow2(D, 16, 64), block_a, pow2(DV, 16, 2048 // wide), warps)
    block_dv = pow2(DV, 16, (8192 if chip.shared > 160_000 else 4096) // wide)
    block_d = pow2(D, 16, 256 if D <= 256 and chip.shared > 160_000 else 64)
    # mma.sync takes operands from registers where wgmma reads shared memory: half the rows.
    hip, wgmma = chip.backend == "hip", chip.backend == "cuda" and not chip.from_registers
    block_t = 128 if hopper and linear and hop == 1 else 64 if hip or (wgmma and hop <= 32) else 32
    stages = 4 if hopper and hop == 1 and block_d < D <= 512 else 2
    return Blocks(tile_rows(T, block_t), block_d, hop if linear else pow2(A, 16, 64), block_dv, warps, stages)


class Call(NamedTuple):
    """What the launches of one call share."""

    seqs: int
    length: int  # rows of a padded sequence, or all packed rows
    A: int
    R: int
    DV: int
    chip: Chip
    tensors: dict[str, Tensor | int | None]  # the kernels' arguments for the inputs, by name
    sizes: dict[str, int | float]
    flags: dict[str, object]


def row_strides(x: Tensor | None, ragged: bool) -> tuple[int, int]:
    """(sequence, row) strides of a tensor with one entry a row."""
    if x is None:
        return 0, 0
    return (0, stride_of(x, 0)) if ragged else (stride_of(x, 0), stride_of(x, 1))


def _near(x: Tensor | None) -> Tensor | None:
    """A weight whose numbers are less than 2**31 apart: the kernels find them with int32."""
    if x is None or sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) < 2**31:
        return x
    return x.contiguous()


def _u_flags(chip: Chip, dtype: torch.dtype, activations: tuple[str, ...]) -> dict[str, object]:
    """How features are multiplied with v: float16 has no room for them past 65,504, so float32, in as many digits."""
    flags = matmul_flags(chip, dtype)
    if dtype == torch.float16 and any(name not in ("tanh", "sigmoid") for name in activations):
        flags = {"COMPUTE": tl.float32, "PRECISION": "tf32" if chip.backend == "cuda" else "ieee"}
    return {f"U_{name}": flag for name, flag in flags.items()}


def prepare(
    h: Tensor, w: Tensor | None, b: Tensor | None, v: Tensor | None, gate_w: Tensor | None, gate_b: Tensor | None,
    context: Tensor | None, values: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None,
    seed: Tensor | None, activation: str, gate_activation: str, dropout_p: float, context_per_row: bool,
) -> Call:  # fmt: skip
    chip = chip_of(h.device)
    ragged = cu_seqlens is not None
    h, context, values = unit(h), unit(context), unit(values)
    w, gate_w = _near(w), _near(gate_w)
    mask = None if mask is None else mask.view(torch.uint8)
    h_strides, val_strides, mask_strides = (row_strides(x, ragged) for x in (h, values, mask))
    if context is None or context_per_row:
        ctx_strides = row_strides(context, ragged)
    else:
        ctx_strides = context.stride(0), 0
    half = h.dtype.itemsize == 2
    D, A = (h.shape[-1],) * 2 if w is None else w.shape
    R = A if v is None else v.shape[1]
    DV = (h if values is None else values).shape[-1]
    return Call(
        seqs=cu_seqlens.numel() - 1 if ragged else h.shape[0],
        length=h.shape[0] if ragged else h.shape[1],
        A=A,
        R=R,
        DV=DV,
        chip=chip,
        tensors={
            "h_ptr": h, "stride_hb": h_strides[0], "stride_ht": h_strides[1],
            "w_ptr": w, "stride_wd": 0 if w is None else w.stride(0), "stride_wa": 0 if w is None else w.stride(1),
            "b_ptr": b if b is None else b.contiguous(),
            "v_ptr": v if v is None else v.contiguous(),
            "gw_ptr": gate_w,
            "stride_gd": 0 if gate_w is None else gate_w.stride(0),
            "stride_ga": 0 if gate_w is None else gate_w.stride(1),
            "gb_ptr": gate_b if gate_b is None else gate_b.contiguous(),
            "ctx_ptr": context, "stride_cb": ctx_strides[0], "stride_ct": ctx_strides[1],
            "val_ptr": values, "stride_ub": val_strides[0], "stride_ut": val_strides[1],
            "mask_ptr": mask, "stride_mb": mask_strides[0], "stride_mt": mask_strides[1],
            "cu_ptr": cu_seqlens if cu_seqlens is None else cu_seqlens.contiguous(),
            "seed_ptr": seed,
        },
        sizes={
            "T": 0 if ragged else h.shape[1], "D": D, "A": A, "R": R, "DV": DV,
            "threshold": round(dropout_p * 2**24), "scale": 1.0 / (1.0 - dropout_p),
        },
        flags={
            "ACT": activation,
            "GATE_ACT": gate_activation,
            "FAST": half and chip.backend == "cuda",
            "CTX_PER_ROW": context_per_row,
            **matmul_flags(chip, h.dtype),
            **_u_flags(chip, h.dtype, (activation,) if gate_w is None else (activation, gate_activation)),
            "BLOCK_R": hop_block(R),
        },
    )  # fmt: skip


def item_args(items: Items) -> dict[str, Tensor | int | None]:
    return {"seq_ptr": items.seq, "first_ptr": items.first, "per_seq": items.per_seq}


def location_fwd(
    h: Tensor, w: Tensor | None, b: Tensor | None, v: Tensor | None, gate_w: Tensor | None, gate_b: Tensor | None,
    context: Tensor | None, values: Tensor | None, score_bias: Tensor | None, mask: Tensor | None,
    cu_seqlens: Tensor | None, seed: Tensor | None,
    activation: str, gate_activation: str, dropout_p: float, context_per_row: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, lse, scores); arguments and shapes as `fused_attn.reference.location_attention` has them."""
    call = prepare(
        h, w, b, v, gate_w, gate_b, context, values, mask, cu_seqlens, seed,
        activation, gate_activation, dropout_p, context_per_row,
    )  # fmt: skip
    seqs, R, DV = call.seqs, call.R, call.DV
    out = h.new_empty(seqs, R, DV, dtype=torch.float32)  # the backward takes differences with it
    lse = new_lse(seqs, R, device=h.device)
    scores = h.new_empty(*h.shape[:-1], R, dtype=torch.float32)
    if seqs == 0 or call.length == 0:
        return out.zero_(), no_key(lse), scores

    longest = call.length if cu_seqlens is None else LONG
    blocks = fwd_blocks(call.chip, h.element_size(), longest, h.shape[-1], call.A, R, DV, v is None)
    one_dv = blocks.DV >= DV
    rows = _rows_per_item(call, cu_seqlens is not None, blocks.T)
    items = partition(seqs, call.length, rows, cu_seqlens)
    direct = one_dv and items.first is None and items.per_seq == 1
    # One kernel for all: an item of its own only leaves (m, l) that nobody reads, and its running sum, where there is
    # one, lives where the result goes.
    o = out if items.first is None and items.per_seq == 1 else h.new_empty(items.count, R, DV, dtype=torch.float32)
    m, l = (h.new_empty(items.count, R, dtype=torch.float32) for _ in range(2))
    bias_strides = row_strides(score_bias, cu_seqlens is not None)
    with torch.cuda.device_of(h):
        fitted(_location_fwd_kernel, call.tensors)[(items.count,)](
            **call.tensors, **item_args(items), **call.sizes, **call.flags,
            bias_ptr=score_bias, stride_sb=bias_strides[0], stride_st=bias_strides[1],
            out_ptr=out, lse_ptr=lse, scores_ptr=scores, o_ptr=o, m_ptr=m, l_ptr=l,
            num_seqs=seqs, rows_per_item=rows,
            RESIDENT=w is not None and w.shape[0] <= blocks.D, ONE_DV=one_dv,
            BLOCK_T=blocks.T, BLOCK_D=blocks.D, BLOCK_A=blocks.A, BLOCK_DV=blocks.DV,
            BLOCK_P=1 if R == 1 and h.element_size() == 4 else max(16, hop_block(R)),
            num_warps=blocks.warps, num_stages=blocks.stages,
            **unpressed(call.chip, call.sizes["D"], DV, call.A),
        )  # fmt: skip
        if not direct:
            merge(o, m, l, items, out, lse, skip_single=one_dv)
    return out, lse, scores


def _rows_per_item(call: Call, ragged: bool, block_t: int) -> int:
    """Items for four a core, if their sums fit the workspace; none so short that its sum costs more than its rows.

    Beside the workspace there is, at most, a sum for each sequence.
    """
    want = max(1, min(4 * call.chip.cores, WORKSPACE_BYTES // max(1, 4 * call.R * call.DV)))
    parts = triton.cdiv(want, 1 if ragged else call.seqs)
    rows = max(triton.cdiv(call.length, parts), 4 * block_t)
    return triton.cdiv(rows, block_t) * block_t
