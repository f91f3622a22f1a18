"""Backward of graph attention: walks of the edges, by their target and by their source, and no atomics.

With a_e = exp(s_e - m_i) / l_i, κ_e the dropout factor, and i the node that edge e, from j, belongs to:

    gap_e = dO_i · (κ_e value_j - o_i)      δ_i = Σ_e a_e gap_e - l_i dl_i
    g_e = a_e (gap_e - δ_i) + dscores_e                                  the gradient of s_e
    dq_i = Σ_e g_e v act'(z_e)      dk_j = Σ_e g_e v act'(z_e)      dvalue_j = Σ_e κ_e a_e dO_i
    dv = Σ_e g_e act(z_e)           dedge_e = g_e v act'(z_e)

The first kernel has a program a node, and makes g_e and κ_e a_e, a number each an edge and head. It meets the edges
twice, since g needs δ: where a node is divided, its pieces leave their gaps and parts of δ to a launch after it. The
next one has programs of two kinds, since neither needs what the other makes: some walk CSR again, each so many nodes,
for dq, dedge and a partial sum of dv, the others the transposed structure, each a key node, for dk and dvalue. The
last joins what they left of hubs and of dv. Nothing is added to by two programs.

Σ_e a_e gap_e is 0 but for rounding, that of o above all, which every gap of a node has alike: taken out, it is not
left in every g, and one edge with all the weight has a g of 0. In float32, over random nodes of six edges, the error
of Σ g, which dq is where act' is the same, is 3 to 14 times smaller than with the gap alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, activate_grad
from .arguments import constants, launch, rows
from .chip import LENGTHS, all_registers, cdiv, unpressed
from .graph import State, edge_sums, edge_tile, graph_blocks, load_edges, load_heads, prepare, registers_of
from .graph_hubs import Csr, edges_of, join_or_next, slots_of
from .inputs import GraphInputs
from .masks import dropout_scale
from .softmax import exp, load_dlse, load_lse, rounded_product
from .sums import NO_SUM, SUM_BLOCKS, Pending, add_or_next, programs_of


class Cotangents(NamedTuple):
    """Of what the forward leaves beside its output; None where there is none."""

    lse: Tensor | None
    scores: Tensor | None


class Scores(NamedTuple):
    """What the first kernel makes of the scores, (E, H) float32."""

    g: Tensor  # their gradients
    p: Tensor  # the weights after dropout
    delta: Tensor | None  # (slots, H) float32: δ of a hub's pieces


@triton.jit(do_not_specialize=LENGTHS)
def _graph_bwd_scores_kernel(
    value,  # (Nk, H, DV)
    csr,
    dropout,
    out,  # (Nq, H, DV) float32
    do,  # (Nq, H, DV)
    result,
    cotangent,
    made,
    nodes,
    edges,
    steps,
    size,
    flags,
    blocks,
):
    item = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64) * blocks.H + tl.arange(0, blocks.H)
    node, first, lo, hi, slot = edges_of(item, nodes, edges, csr, steps, blocks.piece, flags.HUBS)
    row = (node * size.H + h) * 2
    top, inv = load_lse(result.lse + row, h < size.H)
    delta = tl.zeros([blocks.H], tl.float32)
    for e0 in range(lo, hi, blocks.E):
        e, keep, j = edge_tile(e0, hi, csr, blocks.E)
        at = e[:, None] * size.H + h[None, :]
        inside = keep[:, None] & (h < size.H)[None, :]
        kappa = tl.full([blocks.E, blocks.H], 1.0, tl.float32)
        if dropout.seed is not None:
            kappa = dropout_scale(dropout, (e - first)[:, None], node, h[None, :])
        gap = tl.zeros([blocks.E, blocks.H], tl.float32)
        for d0 in range(0, size.DV, blocks.DV):
            d = d0 + tl.arange(0, blocks.DV)
            do_row = load_heads(do, node, h, d, size.H, size.DV)
            centre = load_heads(out, node, h, d, size.H, size.DV)
            values = load_edges(value, j, keep, h, d, size.H, size.DV)
            apart = kappa[:, :, None] * values - centre[None, :, :]
            gap += tl.sum(rounded_product(do_row[None, :, :], apart), axis=2)
        p = exp(tl.load(result.scores + at, mask=inside, other=float("-inf")) - top, flags.FMA) * inv
        delta += tl.sum(p * gap, axis=0)
        tl.store(made.g + at, gap, mask=inside)
        tl.store(made.p + at, p * kappa, mask=inside)
    if flags.HUBS:
        tl.store(made.delta + slot * size.H + h, delta, mask=(h < size.H) & (slot >= 0))
        hi = tl.where(slot >= 0, lo, hi)
    if cotangent.lse is not None:
        delta -= load_dlse(cotangent.lse + row, result.lse + row, h < size.H)
    tl.debug_barrier()  # other threads than wrote them may load the gaps
    _take_delta(lo, hi, delta, top, inv, result, cotangent, made, h, size, flags, blocks)


@triton.jit
def _take_delta(lo, hi, delta, top, inv, result, cotangent, made, h, size, flags, blocks):
    """Make g of the gaps of the edges lo to hi."""
    for e0 in range(lo, hi, blocks.E):
        e = (e0 + tl.arange(0, blocks.E)).to(tl.int64)  # the interpreter counts in int32
        at = e[:, None] * size.H + h[None, :]
        inside = (e < hi)[:, None] & (h < size.H)[None, :]
        p = exp(tl.load(result.scores + at, mask=inside, other=float("-inf")) - top, flags.FMA) * inv
        g = p * (tl.load(made.g + at, mask=inside, other=0.0) - delta)
        if cotangent.scores is not None:
            g += tl.load(cotangent.scores + at, mask=inside, other=0.0)
        tl.store(made.g + at, g, mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def _graph_bwd_pieces_kernel(csr, result, cotangent, made, nodes, edges, steps, size, flags, blocks):
    """The second half of the kernel above for one piece of a hub."""
    item = nodes + tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64) * blocks.H + tl.arange(0, blocks.H)
    node, first, lo, hi, slot = edges_of(item, nodes, edges, csr, steps, blocks.piece, flags.HUBS)
    if slot >= 0:
        last = tl.load(csr.indptr + node + 1).to(tl.int64)
        count = (last - 1) // blocks.piece - first // blocks.piece + 1
        delta = tl.zeros([blocks.H], tl.float32)
        for i0 in range(0, count, blocks.E):
            i = i0 + tl.arange(0, blocks.E)
            at = slots_of(i, first, blocks.piece)[:, None] * size.H + h[None, :]
            some = (i < count)[:, None] & (h < size.H)[None, :]
            delta += tl.sum(tl.load(made.delta + at, mask=some, other=0.0), axis=0)
        row = (node * size.H + h) * 2
        top, inv = load_lse(result.lse + row, h < size.H)
        if cotangent.lse is not None:
            delta -= load_dlse(cotangent.lse + row, result.lse + row, h < size.H)
        _take_delta(lo, hi, delta, top, inv, result, cotangent, made, h, size, flags, blocks)


@triton.jit
def _store_heads(ptr, part_ptr, x, node, slot, h, d, H, D, HUBS: tl.constexpr):
    """Store x [BLOCK_H, BLOCK_D] of a node, or where it is a piece of a hub in its slot."""
    inside = (h < H)[:, None] & (d < D)[None, :]
    row = (node * H + h)[:, None] * D + d[None, :]
    tl.store(ptr + row, x.to(ptr.dtype.element_ty), mask=inside & (slot == -1))
    if HUBS:
        row = (slot * H + h)[:, None] * D + d[None, :]
        tl.store(part_ptr + row, x, mask=inside & (slot >= 0))


class Grads(NamedTuple):
    """Gradients, in the dtype of what they are of, and in float32 what a hub's pieces leave, (slots, H, width)."""

    q: Tensor | None  # (Nq, H, A)
    v: Tensor | None  # (programs, H, A) float32: partial sums
    edge: Tensor | None  # (E, H, A)
    k: Tensor | None  # (Nk, H, A); where the values are the keys both terms
    value: Tensor | None  # (Nk, H, DV)
    part_q: Tensor | None
    part_k: Tensor | None
    part_value: Tensor | None


@triton.jit
def _walk_targets(start, programs, h, q, k, v, edge, csr, made, grads, nodes, edges, steps, size, flags, blocks):
    """dq, dedge and a partial sum of dv, of every `programs`-th node or piece of a hub from `start` on."""
    a = tl.program_id(2) * blocks.A + tl.arange(0, blocks.A)
    feature = (h < size.H)[:, None] & (a < size.A)[None, :]
    v_row = load_heads(v, 0, h, a, size.H, size.A)
    grad_v = tl.zeros([blocks.H, blocks.A], tl.float32)
    items = nodes
    if flags.HUBS:
        items += 2 * tl.cdiv(edges, blocks.piece)
    for n in range(0, tl.cdiv(items - start, programs)):
        item = start + n * programs
        node, _, lo, hi, slot = edges_of(item, nodes, edges, csr, steps, blocks.piece, flags.HUBS)
        q_row = load_heads(q, node, h, a, size.H, size.A)
        grad_q = tl.zeros([blocks.H, blocks.A], tl.float32)
        for e0 in range(lo, hi, blocks.E):
            e, keep, j = edge_tile(e0, hi, csr, blocks.E)
            at = e[:, None] * size.H + h[None, :]
            g = tl.load(made.g + at, mask=keep[:, None] & (h < size.H)[None, :], other=0.0)
            z, _rows = edge_sums(q_row, k, j, edge, e, keep, h, a, size.H, size.A)
            y = activate(z, flags.ACT, flags.FAST)
            grad_v += tl.sum(g[:, :, None] * y, axis=0)
            slope = activate_grad(z, y, flags.ACT, flags.FAST)
            dz = g[:, :, None] * (v_row[None, :, :] * slope)  # [BLOCK_E, BLOCK_H, BLOCK_A]
            grad_q += tl.sum(dz, axis=0)
            if grads.edge is not None:
                tl.store(
                    grads.edge + at[:, :, None] * size.A + a[None, None, :],
                    dz.to(grads.edge.dtype.element_ty),
                    mask=keep[:, None, None] & feature[None, :, :],
                )
        if grads.q is not None:
            _store_heads(grads.q, grads.part_q, grad_q, node, slot, h, a, size.H, size.A, flags.HUBS)
    row = (start * size.H + h)[:, None] * size.A + a[None, :]
    tl.store(grads.v + row, grad_v, mask=feature)


@triton.jit
def _walk_sources(item, h, q, k, v, edge, csr, do, made, grads, nodes, edges, steps, size, flags, blocks):
    """dk and dvalue of a key node or a piece of a hub; the edges of `csr` are those of the transposed structure."""
    a = tl.program_id(2) * blocks.A + tl.arange(0, blocks.A)
    dv = tl.program_id(2) * blocks.DV + tl.arange(0, blocks.DV)
    node, _, lo, hi, slot = edges_of(item, nodes, edges, csr, steps, blocks.piece, flags.HUBS)
    if grads.k is not None:
        k_row = load_heads(k, node, h, a, size.H, size.A)
        v_row = load_heads(v, 0, h, a, size.H, size.A)
    grad_k = tl.zeros([blocks.H, blocks.A], tl.float32)
    grad_value = tl.zeros([blocks.H, blocks.DV], tl.float32)
    for t0 in range(lo, hi, blocks.E):
        t, keep, i = edge_tile(t0, hi, csr, blocks.E)
        e = tl.load(csr.perm + t, mask=keep, other=0).to(tl.int64)
        at = e[:, None] * size.H + h[None, :]
        inside = keep[:, None] & (h < size.H)[None, :]
        if grads.k is not None:
            g = tl.load(made.g + at, mask=inside, other=0.0)
            z, _rows = edge_sums(k_row, q, i, edge, e, keep, h, a, size.H, size.A)
            slope = activate_grad(z, activate(z, flags.ACT, flags.FAST), flags.ACT, flags.FAST)
            grad_k += tl.sum(g[:, :, None] * (v_row[None, :, :] * slope), axis=0)
        if grads.value is not None or flags.SHARED:
            p = tl.load(made.p + at, mask=inside, other=0.0)
            do_rows = load_edges(do, i, keep, h, dv, size.H, size.DV)
            grad_value += tl.sum(p[:, :, None] * do_rows, axis=0)
    if grads.k is not None:
        if flags.SHARED:
            grad_k += grad_value
        _store_heads(grads.k, grads.part_k, grad_k, node, slot, h, a, size.H, size.A, flags.HUBS)
    if grads.value is not None:
        _store_heads(grads.value, grads.part_value, grad_value, node, slot, h, dv, size.H, size.DV, flags.HUBS)


@triton.jit(do_not_specialize=LENGTHS)
def _graph_bwd_walks_kernel(
    q,  # (Nq, H, A)
    k,  # (Nk, H, A)
    v,  # (H, A)
    edge,  # (E, H, A) or None
    csr,
    csr_t,
    do,  # (Nq, H, DV)
    made,
    grads,
    programs,  # of the walk by target; the others have an item each of the walk by source
    nodes,
    steps,
    keys,  # key nodes, and their steps
    key_steps,
    edges,
    size,
    flags,
    key_blocks,
    blocks,
):
    program = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64) * blocks.H + tl.arange(0, blocks.H)
    if program >= programs:
        if grads.k is not None or grads.value is not None:
            n = program - programs
            _walk_sources(
                n, h, q, k, v, edge, csr_t, do, made, grads, keys, edges, key_steps, size, flags, key_blocks
            )
    elif grads.v is not None:  # noqa: SIM102 — the one is known to the compiler, the other is not
        if tl.program_id(2) * blocks.A < size.A:
            _walk_targets(
                program, programs, h, q, k, v, edge, csr, made, grads, nodes, edges, steps, size, flags, blocks
            )


@triton.jit(do_not_specialize=LENGTHS)
def _graph_bwd_join_kernel(csr, csr_t, grads, dv, nodes, steps, keys, key_steps, edges, size, sum_blocks, blocks):
    """What programs of the walks left, joined: hubs' rows of dq, dk and dvalue, and dv."""
    n = tl.program_id(0)
    H, A, DV = size.H, size.A, size.DV
    if grads.part_q is not None:
        n = join_or_next(n, grads.part_q, None, csr, grads.q, None, None, nodes, edges, steps, H, A, blocks)
    if grads.part_k is not None:
        n = join_or_next(n, grads.part_k, None, csr_t, grads.k, None, None, keys, edges, key_steps, H, A, blocks)
    if grads.part_value is not None:
        value = grads.value
        n = join_or_next(n, grads.part_value, None, csr_t, value, None, None, keys, edges, key_steps, H, DV, blocks)
    add_or_next(dv, n, sum_blocks)


# ---------------------------------------------------------------------------------------------------------------
# Launcher
# ---------------------------------------------------------------------------------------------------------------


def graph_bwd(
    inputs: GraphInputs,
    out: Tensor,
    lse: Tensor,
    scores: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dscores: Tensor | None,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of (query, key, v, value, edge), None where `needs` is False; those of key and value transposed."""
    query, key, v, value, edge, _, indices, *transposed, _, _, _, _ = inputs
    if query.numel() == 0 or indices.numel() == 0:
        return [torch.zeros_like(x) if need else None for x, need in zip(inputs[:5], needs, strict=True)]
    call = prepare(inputs)
    hubs, (H, A), DV = call.hubs, v.shape, out.shape[2]
    need_q, need_k, need_v, need_value, need_edge = needs
    scores = scores.contiguous()
    args = {
        **call.args,
        "out": rows(out.contiguous()),
        "do": rows(dout.to(key.dtype).contiguous()),
        "result": State(None, lse.contiguous(), scores),
        "cotangent": Cotangents(*(x if x is None else x.contiguous() for x in (dlse, dscores))),
        "made": Scores(torch.empty_like(scores), torch.empty_like(scores), hubs.parts(H)),
        **hubs.lengths,
    }
    # Rows of dO, out and values at once: with as few warps as elsewhere the compiler put some on the stack.
    blocks, heads = call.blocks._replace(warps=2 * call.blocks.warps), cdiv(H, call.blocks.H)
    registers = all_registers(call.chip)
    launch(_graph_bwd_scores_kernel, (hubs.items, heads), args, blocks, **registers)
    if hubs.slots:
        launch(_graph_bwd_pieces_kernel, (hubs.slots, heads), args, blocks, **registers)

    # As many programs as a chip holds at a time, or nearly: a partial sum of dv each.
    programs = min(hubs.items, 16 * call.chip.cores) if need_q or need_v or need_edge else 0
    blocks, keys = call.blocks, hubs
    key_blocks = graph_blocks(call.chip, len(key), hubs.edges, H, A, DV)
    if need_k or need_value:
        csr = Csr(*(x.contiguous() for x in transposed))
        keys = hubs._replace(nodes=len(key), piece=key_blocks.piece, csr=csr)
    dq, dk, dvalue, dedge = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in ((query, need_q), (key, need_k), (value, need_value), (edge, need_edge))
    )
    dv = torch.empty(programs, H, A, dtype=torch.float32, device=query.device) if programs else None
    part_q, part_k = hubs.parts(H, A) if need_q else None, keys.parts(H, A) if need_k else None
    part_value = keys.parts(H, DV) if need_value else None
    args |= {
        "csr_t": keys.csr,
        "grads": Grads(dq, dv, dedge, dk, dvalue, part_q, part_k, part_value),
        "programs": programs,
        "keys": keys.nodes,
        "key_steps": keys.lengths["steps"],
        "key_blocks": constants(key_blocks),
    }
    # Where the compiler put numbers on the stack: rows of many numbers, narrow ones.
    narrow = blocks.H * max(blocks.A, blocks.DV) <= 64
    options = registers if narrow else registers_of(call.chip, key.element_size(), A, DV)
    if programs or need_k or need_value:
        sources = keys.items if need_k or need_value else 0
        grid = programs + sources, heads, max(cdiv(A, blocks.A), cdiv(DV, blocks.DV))
        warps = max(blocks.warps, key_blocks.warps)
        launch(_graph_bwd_walks_kernel, grid, args, blocks._replace(warps=warps), **options)

    sums = Pending()
    grads = [dq, dk, sums.add(dv if need_v else None, v.dtype), dvalue, dedge]
    joined = hubs.join_blocks(A, DV)
    joins = hubs.joins(part_q, joined) + keys.joins(part_k, joined) + keys.joins(part_value, joined)
    if joins:
        (total,) = sums.todo or [NO_SUM]
        args |= {"dv": total, "sum_blocks": constants(SUM_BLOCKS)}
        launch(_graph_bwd_join_kernel, (joins + programs_of(total),), args, joined, **unpressed(call.chip, A, DV))
    else:
        sums.launch()
    return grads
