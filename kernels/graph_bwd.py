"""Backward of graph attention: walks of the edges, by their target and by their source, and no atomics.

With a_e = exp(s_e - m_i) / l_i, κ_e the dropout factor, and i the node that edge e, from j, belongs to:

    gap_e = dO_i · (κ_e value_j - o_i)      δ_i = Σ_e a_e gap_e - l_i dl_i
    g_e = a_e (gap_e - δ_i) + dscores_e                                  the gradient of s_e
    dq_i = Σ_e g_e v act'(z_e)      dk_j = Σ_e g_e v act'(z_e)      dvalue_j = Σ_e κ_e a_e dO_i
    dv = Σ_e g_e act(z_e)           dedge_e = g_e v act'(z_e)

The first kernel has a program a node, and makes g_e and κ_e a_e, a number each an edge and head. It meets the edges
twice, since g needs δ: where a node is divided, its pieces leave their gaps and parts of δ to a launch after it. The
second walks CSR again, a program for every so many nodes, for dq, dedge and a partial sum of dv; the third walks the
transposed structure, a program a key node, for dk and dvalue. Neither needs a score, and nothing is added to by two
programs.

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
from .arguments import launch, rows
from .chip import LENGTHS, all_registers, cdiv, unpressed
from .graph import Blocks, State, edge_sums, edge_tile, graph_blocks, load_edges, load_heads, prepare
from .graph_hubs import Csr, Hubs, edges_of, slots_of
from .inputs import GraphInputs
from .masks import dropout_scale
from .softmax import exp, load_dlse, load_lse, rounded_product
from .sums import sums


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


@triton.jit(do_not_specialize=LENGTHS)
def _graph_bwd_dq_kernel(
    q,  # (Nq, H, A)
    k,  # (Nk, H, A)
    v,  # (H, A)
    edge,  # (E, H, A) or None
    csr,
    made,
    dq_ptr,  # (Nq, H, A)
    dv_ptr,  # (programs, H, A) float32
    dedge_ptr,  # (E, H, A) or None
    part_ptr,  # (slots, H, A) float32: dq of a hub's pieces, or None
    items,  # nodes, then pieces
    nodes,
    edges,
    steps,
    size,
    flags,
    blocks,
):
    h = tl.program_id(1).to(tl.int64) * blocks.H + tl.arange(0, blocks.H)
    a = tl.program_id(2) * blocks.A + tl.arange(0, blocks.A)
    feature = (h < size.H)[:, None] & (a < size.A)[None, :]
    v_row = load_heads(v, 0, h, a, size.H, size.A)
    grad_v = tl.zeros([blocks.H, blocks.A], tl.float32)
    start = tl.program_id(0).to(tl.int64)
    for n in range(0, tl.cdiv(items - start, tl.num_programs(0))):
        item = start + n * tl.num_programs(0)
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
            if dedge_ptr is not None:
                tl.store(
                    dedge_ptr + at[:, :, None] * size.A + a[None, None, :],
                    dz.to(dedge_ptr.dtype.element_ty),
                    mask=keep[:, None, None] & feature[None, :, :],
                )
        _store_heads(dq_ptr, part_ptr, grad_q, node, slot, h, a, size.H, size.A, flags.HUBS)
    row = (start * size.H + h)[:, None] * size.A + a[None, :]
    tl.store(dv_ptr + row, grad_v, mask=feature)


@triton.jit(do_not_specialize=LENGTHS)
def _graph_bwd_dk_kernel(
    q,  # (Nq, H, A)
    k,  # (Nk, H, A)
    v,  # (H, A)
    edge,  # (E, H, A) or None
    csr,  # of the transposed structure
    perm_ptr,  # (E,): where in CSR an edge of the transposed structure is
    do,  # (Nq, H, DV)
    made,
    dk_ptr,  # (Nk, H, A) or None; with SHARED of both terms
    dvalue_ptr,  # (Nk, H, DV) or None
    part_ptr,  # (slots, H, A) float32: dk of a hub's pieces, or None
    part_value_ptr,  # (slots, H, DV) float32
    nodes,  # key nodes
    edges,
    steps,
    size,
    flags,
    blocks,
):
    item = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64) * blocks.H + tl.arange(0, blocks.H)
    a = tl.program_id(2) * blocks.A + tl.arange(0, blocks.A)
    dv = tl.program_id(2) * blocks.DV + tl.arange(0, blocks.DV)
    node, _, lo, hi, slot = edges_of(item, nodes, edges, csr, steps, blocks.piece, flags.HUBS)
    if dk_ptr is not None:
        k_row = load_heads(k, node, h, a, size.H, size.A)
        v_row = load_heads(v, 0, h, a, size.H, size.A)
    grad_k = tl.zeros([blocks.H, blocks.A], tl.float32)
    grad_value = tl.zeros([blocks.H, blocks.DV], tl.float32)
    for t0 in range(lo, hi, blocks.E):
        t = t0 + tl.arange(0, blocks.E)
        keep = t < hi
        i = tl.load(csr.indices + t, mask=keep, other=0).to(tl.int64)
        e = tl.load(perm_ptr + t, mask=keep, other=0).to(tl.int64)
        at = e[:, None] * size.H + h[None, :]
        inside = keep[:, None] & (h < size.H)[None, :]
        if dk_ptr is not None:
            g = tl.load(made.g + at, mask=inside, other=0.0)
            z, _rows = edge_sums(k_row, q, i, edge, e, keep, h, a, size.H, size.A)
            slope = activate_grad(z, activate(z, flags.ACT, flags.FAST), flags.ACT, flags.FAST)
            grad_k += tl.sum(g[:, :, None] * (v_row[None, :, :] * slope), axis=0)
        if dvalue_ptr is not None or flags.SHARED:
            p = tl.load(made.p + at, mask=inside, other=0.0)
            do_rows = load_edges(do, i, keep, h, dv, size.H, size.DV)
            grad_value += tl.sum(p[:, :, None] * do_rows, axis=0)
    if dk_ptr is not None:
        if flags.SHARED:
            grad_k += grad_value
        _store_heads(dk_ptr, part_ptr, grad_k, node, slot, h, a, size.H, size.A, flags.HUBS)
    if dvalue_ptr is not None:
        _store_heads(dvalue_ptr, part_value_ptr, grad_value, node, slot, h, dv, size.H, size.DV, flags.HUBS)


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
    query, key, v, value, edge, _, indices, *transposed, _, _, _ = inputs
    if query.numel() == 0 or indices.numel() == 0:
        return [torch.zeros_like(x) if need else None for x, need in zip(inputs[:5], needs, strict=True)]
    call = prepare(inputs)
    hubs, (H, A, DV) = call.hubs, call.args["size"]
    need_q, need_k, need_v, need_value, need_edge = needs
    dq, dk, dvalue, dedge = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in ((query, True), (key, need_k), (value, need_value), (edge, need_edge))
    )
    scores = scores.contiguous()
    args = {
        **call.args,
        "out": rows(out.contiguous()),
        "do": rows(dout.to(key.dtype).contiguous()),
        "result": State(None, lse.contiguous(), scores),
        "cotangent": Cotangents(*(x if x is None else x.contiguous() for x in (dlse, dscores))),
        "made": Scores(torch.empty_like(scores), torch.empty_like(scores), hubs.parts(H)),
        "dq_ptr": dq,
        "dk_ptr": dk,
        "dvalue_ptr": dvalue,
        "dedge_ptr": dedge,
    }

    def run(kernel, grid: tuple[int, ...], blocks: Blocks, hubs: Hubs, **more: object) -> None:
        every = {**args, **hubs.lengths, "csr": hubs.csr, **more}
        # Where the compiler put numbers on the stack: rows of many numbers, narrow ones, those walked in parts.
        narrow, wide = blocks.H * max(blocks.A, blocks.DV) <= 64, blocks.A < A or blocks.DV < DV
        pressed = kernel is _graph_bwd_scores_kernel or narrow or wide
        options = all_registers(call.chip) if pressed else unpressed(call.chip, A, DV)
        launch(kernel, grid, every, blocks, **options)

    blocks = call.blocks
    heads = cdiv(H, blocks.H)
    # Rows of dO, out and values at once: with as few warps as elsewhere the compiler put some on the stack.
    wider = blocks._replace(warps=2 * blocks.warps)
    run(_graph_bwd_scores_kernel, (hubs.items, heads), wider, hubs)
    if hubs.slots:
        run(_graph_bwd_pieces_kernel, (hubs.slots, heads), wider, hubs)
    # As many programs as a chip holds at a time, or nearly: a partial sum of dv each.
    programs = min(hubs.items, 16 * call.chip.cores)
    dv = torch.empty(programs, H, A, dtype=torch.float32, device=query.device)
    if need_q or need_v or need_edge:
        grid, part = (programs, heads, cdiv(A, blocks.A)), hubs.parts(H, A)
        run(_graph_bwd_dq_kernel, grid, blocks, hubs, items=hubs.items, dv_ptr=dv, part_ptr=part)
        hubs.join(part, dq)
    if need_k or need_value:
        indptr_t, indices_t, perm = (x.contiguous() for x in transposed)
        blocks = graph_blocks(call.chip, key.shape[0], hubs.edges, H, A, DV)
        hubs = Hubs(key.shape[0], hubs.edges, blocks.piece, Csr(indptr_t, indices_t))
        part, part_value = hubs.parts(H, A), hubs.parts(H, DV)
        grid = hubs.items, heads, max(cdiv(A, blocks.A), cdiv(DV, blocks.DV))
        more = {"perm_ptr": perm, "part_ptr": part, "part_value_ptr": part_value}
        run(_graph_bwd_dk_kernel, grid, blocks, hubs, **more)
        if need_k:
            hubs.join(part, dk)
        if need_value:
            hubs.join(part_value, dvalue)
    grads = (dq, dk, *sums([(dv if need_v else None, v.dtype)]), dvalue, dedge)
    return [g if need else None for g, need in zip(grads, needs, strict=True)]
