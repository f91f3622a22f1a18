"""Hierarchical attention: rows pooled into segments and segments pooled into groups, in one launch.

One program a group, which takes its segments `SEGMENTS` at a time. For a block of them, over dense tiles of their
rows, whatever segment a row is of:

    s_j = score(h_j)        s_jr = s_j where row j is of segment r, else -inf

From there the segments are what hops are to location attention: one online softmax over [rows, segments] and one
product hᵀ p give all their vectors x_r, so that short segments neither waste a tile nor wait for each other. Then

    t_r = outer score(x_r), -inf where no row of r was seen

goes into the online softmax of the group. x_r is rounded to the dtype of H before it meets the outer level, as it is
where each level is a launch of its own: the backward, which is that of the location family level by level, and
documents that do not fit (`fits`) have the same numbers then. Not so NaN: in hᵀ p a visible row of NaN reaches all
vectors of its block of segments.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .chip import LENGTHS, LONG, Chip, chip_of, even, pow2, unpressed
from .location import Blocks, _weighted_sum, fwd_blocks, load_rows, location_fwd, matmul, prepare, project
from .softmax import finish, new_lse, online_softmax, store_lse

SEGMENTS = 16
"""Segments of a block: the smallest side of a matrix product."""
SHORT = 512
"""Rows: some tiles, which take about as long as a second launch."""


@triton.jit
def _score(
    h_ptrs,  # [BLOCK] pointers to rows
    h,  # the tile [BLOCK, BLOCK_D] itself where RESIDENT
    at,  # [BLOCK] rows of the context
    keep,
    w_ptr, stride_wd, stride_wa,
    b_ptr,
    v_ptr,
    gw_ptr, stride_gd, stride_ga,
    gb_ptr,
    ctx_ptr, stride_ct,
    D,
    A,
    ACT: tl.constexpr,
    GATE_ACT: tl.constexpr,
    FAST: tl.constexpr,
    RESIDENT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_A: tl.constexpr,
):  # fmt: skip
    """The scores [BLOCK, 1] of rows, -inf where not `keep`."""
    s = tl.zeros([keep.shape[0], 1], tl.float32)
    for a0 in range(0, A, BLOCK_A):
        a = a0 + tl.arange(0, BLOCK_A)
        z, g = project(
            h_ptrs, h, at, 0, keep, w_ptr, stride_wd, stride_wa, b_ptr, gw_ptr, stride_gd, stride_ga, gb_ptr,
            ctx_ptr, 0, stride_ct, a, 0, D, A, True, RESIDENT, BLOCK_D, COMPUTE, PRECISION,
        )  # fmt: skip
        u = activate(z, ACT, FAST)
        if gw_ptr is not None:
            u *= activate(g, GATE_ACT, FAST)
        if v_ptr is None:
            s = u
        else:
            s = matmul(u, tl.load(v_ptr + a, mask=a < A, other=0.0)[:, None], s, COMPUTE, PRECISION)
    return tl.where(keep[:, None], s, float("-inf"))


@triton.jit(do_not_specialize=LENGTHS)
def _hierarchical_fwd_kernel(
    h_ptr, stride_ht,  # (N, D)
    w_ptr, stride_wd, stride_wa,  # (D, A), or None: A = D
    b_ptr,  # (A,) or None
    v_ptr,  # (A,), or None: A = 1
    gw_ptr, stride_gd, stride_ga,  # (D, A) or None
    gb_ptr,  # (A,) or None
    ctx_ptr, stride_ct,  # (S, A), (N, A) or None
    outer_w_ptr, outer_stride_wd, outer_stride_wa,  # (D, A2), and so on
    outer_b_ptr,
    outer_v_ptr,
    outer_gw_ptr, outer_stride_gd, outer_stride_ga,
    outer_gb_ptr,
    outer_ctx_ptr, outer_stride_ct,  # (G, A2), (S, A2) or None
    mask_ptr, stride_mt,  # (N,) or None
    inner_ptr,  # (S + 1,)
    outer_ptr,  # (G + 1,)
    out_ptr,  # (G, D) float32
    outer_lse_ptr,  # (G, 2) float32: (m, l), see softmax.py
    outer_scores_ptr,  # (S,) float32
    segments_ptr,  # (S, D) in the dtype of H
    inner_lse_ptr,  # (S, 2) float32
    inner_scores_ptr,  # (N,) float32
    pooled_ptr,  # (S, D) float32
    D,
    A,
    OUTER_A,
    ACT: tl.constexpr,
    GATE_ACT: tl.constexpr,
    CTX_PER_ROW: tl.constexpr,
    OUTER_ACT: tl.constexpr,
    OUTER_GATE_ACT: tl.constexpr,
    OUTER_CTX_PER_ROW: tl.constexpr,
    FAST: tl.constexpr,
    RESIDENT: tl.constexpr,  # BLOCK_D >= D: a tile of H is loaded once and kept
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_OUTER_D: tl.constexpr,
    BLOCK_OUTER_A: tl.constexpr,
    BLOCK_DV: tl.constexpr,  # at least D
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    first = tl.load(outer_ptr + group)
    last = tl.load(outer_ptr + group + 1)
    r = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_DV)
    outer_m = tl.full([1], float("-inf"), tl.float32)
    outer_l = tl.zeros([1], tl.float32)
    outer_acc = tl.zeros([BLOCK_DV], tl.float32)

    for s0 in range(first, last, BLOCK_S):
        exists = s0 + r < last
        seg = (s0 + r).to(tl.int64)
        start = tl.load(inner_ptr + seg, mask=exists, other=0)
        end = tl.load(inner_ptr + seg + 1, mask=exists, other=0)  # past the last segment start = end: no row
        lo = tl.load(inner_ptr + s0)
        hi = tl.load(inner_ptr + tl.minimum(s0 + BLOCK_S, last))
        m = tl.full([BLOCK_S], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_S], tl.float32)
        acc = tl.zeros([BLOCK_DV, BLOCK_S], tl.float32)
        for t0 in range(lo, hi, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            rows = t.to(tl.int64)
            inside = t < hi
            keep = inside
            if mask_ptr is not None:
                keep = tl.load(mask_ptr + rows * stride_mt, mask=inside, other=0) != 0
            member = (t[:, None] >= start[None, :]) & (t[:, None] < end[None, :])  # [BLOCK_T, BLOCK_S]
            at = rows
            if not CTX_PER_ROW:
                at = tl.sum(tl.where(member, seg[None, :], 0), axis=1)
            h_ptrs = h_ptr + rows * stride_ht
            if RESIDENT:
                h = load_rows(h_ptrs, keep, tl.arange(0, BLOCK_D), D)
            else:
                h = h_ptrs
            s = _score(
                h_ptrs, h, at, keep, w_ptr, stride_wd, stride_wa, b_ptr, v_ptr, gw_ptr, stride_gd, stride_ga, gb_ptr,
                ctx_ptr, stride_ct, D, A, ACT, GATE_ACT, FAST, RESIDENT, COMPUTE, PRECISION, BLOCK_D, BLOCK_A,
            )  # fmt: skip
            tl.store(inner_scores_ptr + rows[:, None], s, mask=inside[:, None])
            p, alpha, m, l = online_softmax(tl.where(member, s, float("-inf")), m, l)
            if RESIDENT:
                values = h
            else:
                values = load_rows(h_ptrs, keep, d, D)
            acc = acc * alpha[None, :] + _weighted_sum(values, p, BLOCK_S, COMPUTE, PRECISION)

        inv = finish(l)
        store_lse(inner_lse_ptr + seg * 2, m, l, exists)
        x = acc * inv[None, :]
        x_at = seg[None, :] * D + d[:, None]
        write = (d < D)[:, None] & exists[None, :]
        tl.store(pooled_ptr + x_at, x, mask=write)
        tl.store(segments_ptr + x_at, x.to(segments_ptr.dtype.element_ty), mask=write)
        tl.debug_barrier()  # what follows loads x from cache, other parts of it than a thread has stored

        seen = exists & (l != 0)
        at = seg
        if not OUTER_CTX_PER_ROW:
            at = seg * 0 + group
        x_ptrs = segments_ptr + seg * D
        s = _score(
            x_ptrs, x_ptrs, at, seen, outer_w_ptr, outer_stride_wd, outer_stride_wa, outer_b_ptr, outer_v_ptr,
            outer_gw_ptr, outer_stride_gd, outer_stride_ga, outer_gb_ptr, outer_ctx_ptr, outer_stride_ct, D, OUTER_A,
            OUTER_ACT, OUTER_GATE_ACT, FAST, False, COMPUTE, PRECISION, BLOCK_OUTER_D, BLOCK_OUTER_A,
        )  # fmt: skip
        tl.store(outer_scores_ptr + seg[:, None], s, mask=exists[:, None])
        p, alpha, outer_m, outer_l = online_softmax(s, outer_m, outer_l)
        outer_acc = outer_acc * alpha + tl.sum(load_rows(x_ptrs, seen, d, D).to(tl.float32) * p, axis=0)

    inv = finish(outer_l)
    store_lse(outer_lse_ptr + group * 2 + tl.arange(0, 1), outer_m, outer_l, True)
    tl.store(out_ptr + group * D + d, outer_acc * inv, mask=d < D)


def blocks_of(
    chip: Chip,
    itemsize: int,
    D: int,
    A: int,
    outer_A: int,
    linear: bool,
    outer_linear: bool,
    gated: bool,
    plain: bool,
) -> tuple[Blocks, Blocks]:
    """Tiles of the inner and of the outer level: those of location attention with a hop a segment of the block.

    In 16 bits with parts of W of 64 × 32 and D at most 256: two levels have more to keep than one, and spilled.
    Where operands come from registers, of 32 × 32, and 16 rows of h where a score is gated and D past 128, or rows
    are no whole vectors.
    """

    def level(n: int, width: int, is_linear: bool) -> Blocks:
        if is_linear:  # one score, where linear hops have one each
            blocks = fwd_blocks(chip, itemsize, n, D, SEGMENTS, SEGMENTS, D, True)._replace(A=1)
        else:
            blocks = fwd_blocks(chip, itemsize, n, D, width, SEGMENTS, D, False)
        part = 32 if chip.from_registers else 64
        short = (chip.from_registers and D > 128) or not even(D, width)
        rows = min(blocks.T, 16 if gated and itemsize == 2 and short else 64)
        wide = chip.hopper and itemsize == 2 and plain and n == LONG and not is_linear
        block_a = pow2(width, 16, 128) if wide else min(blocks.A, 32)
        return blocks._replace(T=rows, D=min(blocks.D, part), A=block_a, DV=min(blocks.DV, 256), stages=2)

    return level(LONG, A, linear), level(SEGMENTS, outer_A, outer_linear)


def fits(chip: Chip, width: int, D: int, rows: int, groups: int) -> bool:
    """Whether one launch, with one program a document, is right; `width` is that of the tile of segment vectors.

    The vectors of a block of segments must stay in registers, and with fewer documents than cores the sentences have
    to be spread over the chip instead, unless the documents are short. The lengths themselves are on the device: the
    mean decides. Where it begins to pay on a GPU is not yet measured.
    """
    return width >= D and (groups >= chip.cores or rows <= groups * SHORT)


def hierarchical_fwd(
    h: Tensor,
    w: Tensor | None, b: Tensor | None, v: Tensor | None, gate_w: Tensor | None, gate_b: Tensor | None,
    context: Tensor | None,
    outer_w: Tensor | None, outer_b: Tensor | None, outer_v: Tensor | None, outer_gate_w: Tensor | None,
    outer_gate_b: Tensor | None, outer_context: Tensor | None,
    mask: Tensor | None, inner_offsets: Tensor, outer_offsets: Tensor,
    activation: str, gate_activation: str, context_per_row: bool,
    outer_activation: str, outer_gate_activation: str, outer_context_per_row: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(out, outer lse, outer scores, segments, inner lse, inner scores, pooled).

    As `fused_attn.reference.hierarchical_attention`; `pooled` is `segments` in float32, for the backward.
    """
    chip = chip_of(h.device)
    rows, D = h.shape
    seqs, groups = inner_offsets.numel() - 1, outer_offsets.numel() - 1
    widths = [D if x is None else x.shape[1] for x in (w, outer_w)]
    gated = gate_w is not None or outer_gate_w is not None
    plain = not gated and context is None and outer_context is None
    blocks, outer_blocks = blocks_of(chip, h.element_size(), D, *widths, v is None, outer_v is None, gated, plain)
    inner = (w, b, v, gate_w, gate_b, context)
    outer = (outer_w, outer_b, outer_v, outer_gate_w, outer_gate_b, outer_context)
    options = (activation, gate_activation, 0.0, context_per_row)
    outer_options = (outer_activation, outer_gate_activation, 0.0, outer_context_per_row)
    if not fits(chip, min(blocks.DV, outer_blocks.DV), D, rows, groups):
        pooled, inner_lse, inner_scores = location_fwd(h, *inner, None, None, mask, inner_offsets, None, *options)
        segments = pooled.squeeze(1).to(h.dtype, copy=True)
        seen = inner_lse[:, 0, 0] != -torch.inf
        level = location_fwd(segments, *outer, None, None, seen, outer_offsets, None, *outer_options)
        return *level, segments, inner_lse, inner_scores, pooled

    new: Callable[..., Tensor] = h.new_empty
    out, pooled = new(groups, 1, D, dtype=torch.float32), new(seqs, 1, D, dtype=torch.float32)
    outer_lse, inner_lse = (new_lse(n, 1, device=h.device) for n in (groups, seqs))
    outer_scores, inner_scores = new(seqs, 1, dtype=torch.float32), new(rows, 1, dtype=torch.float32)
    segments = new(seqs, D)
    results = (out, outer_lse, outer_scores, segments, inner_lse, inner_scores, pooled)
    if groups == 0:
        return results
    call = prepare(h, *inner, None, mask, inner_offsets, None, *options)
    outer_call = prepare(segments, *outer, None, None, outer_offsets, None, *outer_options)
    with torch.cuda.device_of(h):
        _hierarchical_fwd_kernel[(groups,)](
            h_ptr=call.tensors["h_ptr"], stride_ht=call.tensors["stride_ht"],
            **_score_args("", call.tensors), **_score_args("outer_", outer_call.tensors),
            mask_ptr=call.tensors["mask_ptr"], stride_mt=call.tensors["stride_mt"],
            inner_ptr=call.tensors["cu_ptr"], outer_ptr=outer_call.tensors["cu_ptr"],
            out_ptr=out, outer_lse_ptr=outer_lse, outer_scores_ptr=outer_scores, segments_ptr=segments,
            inner_lse_ptr=inner_lse, inner_scores_ptr=inner_scores, pooled_ptr=pooled,
            D=D, A=call.A, OUTER_A=outer_call.A,
            ACT=activation, GATE_ACT=gate_activation, CTX_PER_ROW=context_per_row,
            OUTER_ACT=outer_activation, OUTER_GATE_ACT=outer_gate_activation,
            OUTER_CTX_PER_ROW=outer_context_per_row,
            RESIDENT=w is not None and blocks.D >= D,
            **{name: call.flags[name] for name in ("FAST", "COMPUTE", "PRECISION")},
            BLOCK_T=blocks.T, BLOCK_D=blocks.D, BLOCK_A=blocks.A,
            BLOCK_OUTER_D=outer_blocks.D, BLOCK_OUTER_A=outer_blocks.A, BLOCK_DV=blocks.DV, BLOCK_S=SEGMENTS,
            num_warps=blocks.warps, num_stages=blocks.stages, **unpressed(chip, D, *widths),
        )  # fmt: skip
    return results


def _score_args(prefix: str, tensors: dict[str, Tensor | int | None]) -> dict[str, Tensor | int | None]:
    """Arguments of `_score` by the kernel's names."""
    names = (
        "w_ptr", "stride_wd", "stride_wa", "b_ptr", "v_ptr", "gw_ptr", "stride_gd", "stride_ga", "gb_ptr", "ctx_ptr",
    )  # fmt: skip
    found = {prefix + name: tensors[name] for name in names}
    return {**found, f"{prefix}stride_ct": tensors["stride_ct"] or tensors["stride_cb"]}
