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
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import constants, launch, sequence_ptr, sequences, width
from .chip import LENGTHS, LONG, Chip, chip_of, even, pow2, rule, unit, unpressed
from .inputs import HierarchicalInputs
from .location import Blocks, _weighted_sum, fwd_blocks, gated, location_fwd, matmul, prepare, project
from .location_bwd import location_bwd
from .masks import unmasked
from .softmax import finish, new_lse, online_softmax, store_lse
from .sums import Pending
from .tiles import load_rows

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
    weights,
    context,
    D,
    A,
    flags,
    RESIDENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """The scores [BLOCK, 1] of rows, -inf where not `keep`."""
    s = tl.zeros([keep.shape[0], 1], tl.float32)
    for a0 in range(0, A, BLOCK_A):
        a = a0 + tl.arange(0, BLOCK_A)
        z, g = project(h_ptrs, h, at, 0, keep, weights, context, a, D, A, flags, RESIDENT, BLOCK_D)
        u = gated(z, g, weights, flags)
        if weights.v is None:
            s = u
        else:
            v = tl.load(weights.v + a, mask=a < A, other=0.0)[:, None]
            s = matmul(u, v, s, flags.COMPUTE, flags.PRECISION)
    return tl.where(keep[:, None], s, float("-inf"))


@triton.jit(do_not_specialize=LENGTHS)
def _hierarchical_fwd_kernel(
    h,  # (N, D)
    weights,
    context,  # (S, A), (N, A) or None
    outer_weights,
    outer_context,  # (G, A2), (S, A2) or None
    mask,  # (N,) or None
    inner_ptr,  # (S + 1,)
    outer_ptr,  # (G + 1,)
    result,
    size,
    flags,
    outer_flags,
    levels,
    blocks,
):
    group = tl.program_id(0).to(tl.int64)
    first = tl.load(outer_ptr + group)
    last = tl.load(outer_ptr + group + 1)
    r = tl.arange(0, blocks.S)
    d = tl.arange(0, blocks.DV)
    outer_m = tl.full([1], float("-inf"), tl.float32)
    outer_l = tl.zeros([1], tl.float32)
    outer_acc = tl.zeros([blocks.DV], tl.float32)

    for s0 in range(first, last, blocks.S):
        exists = s0 + r < last
        seg = (s0 + r).to(tl.int64)
        start = tl.load(inner_ptr + seg, mask=exists, other=0)
        end = tl.load(inner_ptr + seg + 1, mask=exists, other=0)  # past the last segment start = end: no row
        lo = tl.load(inner_ptr + s0)
        hi = tl.load(inner_ptr + tl.minimum(s0 + blocks.S, last))
        m = tl.full([blocks.S], float("-inf"), tl.float32)
        l = tl.zeros([blocks.S], tl.float32)
        acc = tl.zeros([blocks.DV, blocks.S], tl.float32)
        for t0 in range(lo, hi, blocks.T):
            t = t0 + tl.arange(0, blocks.T)
            rows = t.to(tl.int64)
            inside = t < hi
            keep = unmasked(mask, 0, rows, inside)
            member = (t[:, None] >= start[None, :]) & (t[:, None] < end[None, :])  # [BLOCK_T, BLOCK_S]
            at = rows
            if not levels.CTX_PER_ROW:
                at = tl.sum(tl.where(member, seg[None, :], 0), axis=1)
            h_ptrs = sequence_ptr(h, 0, rows)
            if levels.RESIDENT:
                tile = load_rows(h_ptrs, keep, tl.arange(0, blocks.D), size.D)
            else:
                tile = h_ptrs
            s = _score(
                h_ptrs, tile, at, keep, weights, context, size.D, size.A, flags, levels.RESIDENT, blocks.D, blocks.A
            )
            tl.store(result.inner_scores + rows[:, None], s, mask=inside[:, None])
            p, alpha, m, l = online_softmax(tl.where(member, s, float("-inf")), m, l, 0, False)
            if levels.RESIDENT:
                values = tile
            else:
                values = load_rows(h_ptrs, keep, d, size.D)
            acc = acc * alpha[None, :] + _weighted_sum(values, p, blocks.S, flags.COMPUTE, flags.PRECISION)

        store_lse(result.inner_lse + seg * 2, m, l, exists)
        x = acc * finish(l)[None, :]
        x_at = seg[None, :] * size.D + d[:, None]
        write = (d < size.D)[:, None] & exists[None, :]
        if result.pooled is not None:
            tl.store(result.pooled + x_at, x, mask=write)
        tl.store(result.segments + x_at, x.to(result.segments.dtype.element_ty), mask=write)
        tl.debug_barrier()  # what follows loads x from cache, other parts of it than a thread has stored

        seen = exists & (l != 0)
        at = seg
        if not levels.OUTER_CTX_PER_ROW:
            at = seg * 0 + group
        x_ptrs = result.segments + seg * size.D
        s = _score(
            x_ptrs,
            x_ptrs,
            at,
            seen,
            outer_weights,
            outer_context,
            size.D,
            size.OUTER_A,
            outer_flags,
            False,
            blocks.OUTER_D,
            blocks.OUTER_A,
        )
        tl.store(result.outer_scores + seg[:, None], s, mask=exists[:, None])
        p, alpha, outer_m, outer_l = online_softmax(s, outer_m, outer_l, 0, False)
        outer_acc = outer_acc * alpha + tl.sum(load_rows(x_ptrs, seen, d, size.D).to(tl.float32) * p, axis=0)

    store_lse(result.outer_lse + group * 2 + tl.arange(0, 1), outer_m, outer_l, True)
    out = outer_acc * finish(outer_l)
    out_at = group * size.D + d
    tl.store(result.out + out_at, out.to(result.out.dtype.element_ty), mask=d < size.D)
    if result.exact is not None:
        tl.store(result.exact + out_at, out, mask=d < size.D)


class Size(NamedTuple):
    """Widths of H, and of the features of each level."""

    D: int
    A: int
    OUTER_A: int


class Levels(NamedTuple):
    """What differs from the flags of location attention, by level."""

    RESIDENT: bool  # blocks.D >= D: a tile of H is loaded once and kept
    CTX_PER_ROW: bool
    OUTER_CTX_PER_ROW: bool


class Tiles(NamedTuple):
    """Sizes of tiles of both levels: DV is at least D, S segments."""

    T: int
    D: int
    A: int
    OUTER_D: int
    OUTER_A: int
    DV: int
    S: int
    warps: int
    stages: int


class Result(NamedTuple):
    """What the forward leaves, float32 but for `out` and `segments`, which have the dtype of H."""

    out: Tensor  # (G, 1, D)
    outer_lse: Tensor  # (G, 1, 2): (m, l), see softmax.py
    outer_scores: Tensor  # (S, 1)
    segments: Tensor  # (S, D)
    inner_lse: Tensor  # (S, 1, 2)
    inner_scores: Tensor  # (N, 1)
    exact: Tensor | None  # (G, 1, D): out, for a backward of 16 bits
    pooled: Tensor | None  # (S, 1, D): segments


@rule
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


def hierarchical_fwd(inputs: HierarchicalInputs, need_exact: bool) -> tuple[Tensor, ...]:
    """(out, outer lse, outer scores, segments, inner lse, inner scores, exact, pooled).

    As `fused_attn.reference.hierarchical_attention`; the last two are `out` and `segments` in float32 where
    `need_exact` says so, for the backward, else empty.
    """
    h, w, context, outer_w, outer_context = inputs.h, inputs.w, inputs.context, inputs.outer_w, inputs.outer_context
    inner = inputs.level(h, inputs.mask, outer=False)
    chip = chip_of(h.device)
    rows, D = h.shape
    seqs, groups = inputs.inner_offsets.numel() - 1, inputs.outer_offsets.numel() - 1
    widths = [D if x is None else x.shape[1] for x in (w, outer_w)]
    gated = inputs.gate_w is not None or inputs.outer_gate_w is not None
    plain = not gated and context is None and outer_context is None
    linear = inputs.v is None, inputs.outer_v is None
    blocks, outer_blocks = blocks_of(chip, h.element_size(), D, *widths, *linear, gated, plain)
    if not fits(chip, min(blocks.DV, outer_blocks.DV), D, rows, groups):
        segments, inner_lse, inner_scores, pooled = location_fwd(inner, True, need_exact)
        segments = segments.squeeze(1)
        seen = inner_lse[:, 0, 0] != -torch.inf
        *top, exact = location_fwd(inputs.level(segments, seen, outer=True), True, need_exact)
        return *top, segments, inner_lse, inner_scores, exact, pooled

    new: Callable[..., Tensor] = h.new_empty
    outer_lse, inner_lse = (new_lse(n, 1, device=h.device) for n in (groups, seqs))
    outer_scores, inner_scores = (new(n, 1, dtype=torch.float32) for n in (seqs, rows))
    exact, pooled = (new((n, 1, D) if need_exact else (0,), dtype=torch.float32) for n in (groups, seqs))
    result = Result(new(groups, 1, D), outer_lse, outer_scores, new(seqs, D), inner_lse, inner_scores, exact, pooled)
    if groups == 0:
        return tuple(result)
    call = prepare(inner)
    outer_call = prepare(inputs.level(result.segments, None, outer=True))
    args = call.args | {
        "outer_weights": outer_call.args["weights"],
        "inner_ptr": call.cu_seqlens,
        "outer_ptr": outer_call.cu_seqlens,
        # A context is found by its own rows, of whichever level.
        "context": sequences(unit(context), packed=True),
        "outer_context": sequences(unit(outer_context), packed=True),
        "flags": constants(call.flags._replace(CTX_PER_ROW=True)),
        "outer_flags": constants(outer_call.flags._replace(CTX_PER_ROW=True)),
        "levels": constants(
            Levels(w is not None and blocks.D >= D, inputs.context_per_row, inputs.outer_context_per_row)
        ),
        "size": Size(width(D), *(n if n < 16 else width(n) for n in widths)),  # as location's
        "result": result if need_exact else result._replace(exact=None, pooled=None),
    }
    tiles = Tiles(
        blocks.T, blocks.D, blocks.A, outer_blocks.D, outer_blocks.A, blocks.DV, SEGMENTS, blocks.warps, blocks.stages
    )
    launch(_hierarchical_fwd_kernel, (groups,), args, tiles, **unpressed(chip, D, *widths))
    return tuple(result)


def hierarchical_bwd(
    inputs: HierarchicalInputs,
    out: Tensor,
    outer_lse: Tensor,
    outer_scores: Tensor,
    segments: Tensor,
    pooled: Tensor,
    inner_lse: Tensor,
    inner_scores: Tensor,
    dout: Tensor | None,
    d_outer_lse: Tensor | None,
    d_outer_scores: Tensor | None,
    dsegments: Tensor | None,
    d_inner_lse: Tensor | None,
    d_inner_scores: Tensor | None,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of h and of the scores' tensors, inner and outer, None where `needs` is False.

    That of location attention twice: through the outer level to the segments, and through those. `out` and `pooled`,
    the segments (S, 1, D), are in float32. A segment that sees nothing has a score of -inf, so needs no mask.
    """
    size = len(needs) // 2  # tensors of a score
    inner_needs, outer_needs = needs[: 1 + size], needs[1 + size :]
    pending = Pending()
    through, *of_outer = location_bwd(
        inputs.level(segments, None, outer=True),
        out,
        outer_lse,
        outer_scores,
        dout,
        d_outer_lse,
        d_outer_scores,
        [any(inner_needs), *outer_needs, False, False],
        pending=pending,
    )[: 1 + size]
    of_inner: list[Tensor | None] = [None] * (1 + size)
    if through is not None:
        dsegments = through if dsegments is None else dsegments + through
        of_inner = location_bwd(
            inputs.level(inputs.h, inputs.mask, outer=False),
            pooled,
            inner_lse,
            inner_scores,
            dsegments[:, None],
            d_inner_lse,
            d_inner_scores,
            [*inner_needs, False, False],
            pending=pending,
        )[: 1 + size]
    pending.launch()
    return [*of_inner, *of_outer]
