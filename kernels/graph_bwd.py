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

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, activate_grad
from .chip import LENGTHS, all_registers, unpressed
from .graph import Blocks, graph_blocks, load_edges, load_heads, prepare
from .graph_hubs import Hubs, edges_of, slots_of
from .masks import dropout_scale
from .softmax import exp, load_dlse, load_lse, rounded_product


@triton.jit(do_not_specialize=LENGTHS)
def _graph_bwd_scores_kernel(
    val_ptr, stride_un, stride_uh,  # (Nk, H, DV)
    indptr_ptr,  # (Nq + 1,)
    indices_ptr,  # (E,)
    seed_ptr,
    out_ptr,  # (Nq, H, DV) float32
    do_ptr,  # (Nq, H, DV)
    lse_ptr,  # (Nq, H, 2) float32: (m, l)
    dlse_ptr,  # the same, or None
    scores_ptr,  # (E, H) float32
    dscores_ptr,  # (E, H) float32 or None
    g_ptr,  # (E, H) float32: gradients of the scores
    p_ptr,  # (E, H) float32: weights after dropout
    delta_ptr,  # (slots, H) float32: of a hub's pieces, or None
    nodes,
    edges,
    steps,
    H,
    DV,
    threshold,
    keep_scale,
    FMA: tl.constexpr,
    PIECE: tl.constexpr,
    HUBS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    node, first, lo, hi, slot = edges_of(item, nodes, edges, indptr_ptr, steps, PIECE, HUBS)
    row = node * H + h
    top, inv = load_lse(lse_ptr + row * 2, h < H)
    delta = tl.zeros([BLOCK_H], tl.float32)
    for e0 in range(lo, hi, BLOCK_E):
        e = (e0 + tl.arange(0, BLOCK_E)).to(tl.int64)  # the interpreter counts in int32
        keep = e < hi
        j = tl.load(indices_ptr + e, mask=keep, other=0).to(tl.int64)
        at = e[:, None] * H + h[None, :]
        inside = keep[:, None] & (h < H)[None, :]
        kappa = tl.full([BLOCK_E, BLOCK_H], 1.0, tl.float32)
        if seed_ptr is not None:
            kappa = dropout_scale(seed_ptr, (e - first)[:, None], node, h[None, :], threshold, keep_scale)
        gap = tl.zeros([BLOCK_E, BLOCK_H], tl.float32)
        for d0 in range(0, DV, BLOCK_DV):
            d = d0 + tl.arange(0, BLOCK_DV)
            do = load_heads(do_ptr + node * H * DV, DV, h, d, H, DV)
            out = load_heads(out_ptr + node * H * DV, DV, h, d, H, DV)
            values = load_edges(val_ptr, stride_un, stride_uh, j, keep, h, d, H, DV)
            apart = kappa[:, :, None] * values - out[None, :, :]
            gap += tl.sum(rounded_product(do[None, :, :], apart), axis=2)
        p = exp(tl.load(scores_ptr + at, mask=inside, other=float("-inf")) - top, FMA) * inv
        delta += tl.sum(p * gap, axis=0)
        tl.store(g_ptr + at, gap, mask=inside)
        tl.store(p_ptr + at, p * kappa, mask=inside)
    if HUBS:
        tl.store(delta_ptr + slot * H + h, delta, mask=(h < H) & (slot >= 0))
        hi = tl.where(slot >= 0, lo, hi)
    if dlse_ptr is not None:
        delta -= load_dlse(dlse_ptr + row * 2, lse_ptr + row * 2, h < H)
    tl.debug_barrier()  # other threads than wrote them may load the gaps
    _take_delta(lo, hi, delta, top, inv, scores_ptr, dscores_ptr, g_ptr, h, H, FMA, BLOCK_E)


@triton.jit
def _take_delta(
    lo, hi, delta, top, inv, scores_ptr, dscores_ptr, g_ptr, h, H, FMA: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Make g of the gaps of the edges lo to hi."""
    for e0 in range(lo, hi, BLOCK_E):
        e = (e0 + tl.arange(0, BLOCK_E)).to(tl.int64)  # the interpreter counts in int32
        at = e[:, None] * H + h[None, :]
        inside = (e < hi)[:, None] & (h < H)[None, :]
        p = exp(tl.load(scores_ptr + at, mask=inside, other=float("-inf")) - top, FMA) * inv
        g = p * (tl.load(g_ptr + at, mask=inside, other=0.0) - delta)
        if dscores_ptr is not None:
            g += tl.load(dscores_ptr + at, mask=inside, other=0.0)
        tl.store(g_ptr + at, g, mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def _graph_bwd_pieces_kernel(
    indptr_ptr,  # (Nq + 1,)
    lse_ptr,  # (Nq, H, 2) float32: (m, l)
    dlse_ptr,  # the same, or None
    scores_ptr,  # (E, H) float32
    dscores_ptr,  # (E, H) float32 or None
    g_ptr,  # (E, H) float32: gaps, which become gradients of the scores
    delta_ptr,  # (slots, H) float32
    nodes,
    edges,
    steps,
    H,
    FMA: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The second half of the kernel above for one piece of a hub."""
    item = nodes + tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    node, first, lo, hi, slot = edges_of(item, nodes, edges, indptr_ptr, steps, PIECE, True)
    if slot >= 0:
        last = tl.load(indptr_ptr + node + 1).to(tl.int64)
        count = (last - 1) // PIECE - first // PIECE + 1
        delta = tl.zeros([BLOCK_H], tl.float32)
        for i0 in range(0, count, BLOCK_E):
            i = i0 + tl.arange(0, BLOCK_E)
            at = slots_of(i, first, PIECE)[:, None] * H + h[None, :]
            delta += tl.sum(tl.load(delta_ptr + at, mask=(i < count)[:, None] & (h < H)[None, :], other=0.0), axis=0)
        row = node * H + h
        top, inv = load_lse(lse_ptr + row * 2, h < H)
        if dlse_ptr is not None:
            delta -= load_dlse(dlse_ptr + row * 2, lse_ptr + row * 2, h < H)
        _take_delta(lo, hi, delta, top, inv, scores_ptr, dscores_ptr, g_ptr, h, H, FMA, BLOCK_E)


@triton.jit(do_not_specialize=LENGTHS)
def _graph_bwd_dq_kernel(
    q_ptr, stride_qn, stride_qh,  # (Nq, H, A)
    k_ptr, stride_kn, stride_kh,  # (Nk, H, A)
    v_ptr, stride_vh,  # (H, A)
    edge_ptr, stride_en, stride_eh,  # (E, H, A) or None
    indptr_ptr,  # (Nq + 1,)
    indices_ptr,  # (E,)
    g_ptr,  # (E, H) float32
    dq_ptr,  # (Nq, H, A)
    dv_ptr,  # (programs, H, A) float32
    dedge_ptr,  # (E, H, A) or None
    part_ptr,  # (slots, H, A) float32: dq of a hub's pieces, or None
    items,  # nodes, then pieces
    nodes,
    edges,
    steps,
    H,
    A,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
    PIECE: tl.constexpr,
    HUBS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_A: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    a = tl.program_id(2) * BLOCK_A + tl.arange(0, BLOCK_A)
    feature = (h < H)[:, None] & (a < A)[None, :]
    v = load_heads(v_ptr, stride_vh, h, a, H, A)
    grad_v = tl.zeros([BLOCK_H, BLOCK_A], tl.float32)
    start = tl.program_id(0).to(tl.int64)
    for n in range(0, tl.cdiv(items - start, tl.num_programs(0))):
        item = start + n * tl.num_programs(0)
        node, _, lo, hi, slot = edges_of(item, nodes, edges, indptr_ptr, steps, PIECE, HUBS)
        q = load_heads(q_ptr + node * stride_qn, stride_qh, h, a, H, A)
        grad_q = tl.zeros([BLOCK_H, BLOCK_A], tl.float32)
        for e0 in range(lo, hi, BLOCK_E):
            e = (e0 + tl.arange(0, BLOCK_E)).to(tl.int64)  # the interpreter counts in int32
            keep = e < hi
            j = tl.load(indices_ptr + e, mask=keep, other=0).to(tl.int64)
            at = e[:, None] * H + h[None, :]
            g = tl.load(g_ptr + at, mask=keep[:, None] & (h < H)[None, :], other=0.0)
            z = q[None, :, :] + load_edges(k_ptr, stride_kn, stride_kh, j, keep, h, a, H, A)
            if edge_ptr is not None:
                z += load_edges(edge_ptr, stride_en, stride_eh, e, keep, h, a, H, A)
            y = activate(z, ACT, FAST)
            grad_v += tl.sum(g[:, :, None] * y, axis=0)
            dz = g[:, :, None] * (v[None, :, :] * activate_grad(z, y, ACT, FAST))  # [BLOCK_E, BLOCK_H, BLOCK_A]
            grad_q += tl.sum(dz, axis=0)
            if dedge_ptr is not None:
                tl.store(
                    dedge_ptr + at[:, :, None] * A + a[None, None, :],
                    dz.to(dedge_ptr.dtype.element_ty),
                    mask=keep[:, None, None] & feature[None, :, :],
                )
        rows = (node * H + h)[:, None] * A + a[None, :]
        tl.store(dq_ptr + rows, grad_q.to(dq_ptr.dtype.element_ty), mask=feature & (slot == -1))
        if HUBS:
            rows = (slot * H + h)[:, None] * A + a[None, :]
            tl.store(part_ptr + rows, grad_q, mask=feature & (slot >= 0))
    rows = (start * H + h)[:, None] * A + a[None, :]
    tl.store(dv_ptr + rows, grad_v, mask=feature)


@triton.jit(do_not_specialize=LENGTHS)
def _graph_bwd_dk_kernel(
    q_ptr, stride_qn, stride_qh,  # (Nq, H, A)
    k_ptr, stride_kn, stride_kh,  # (Nk, H, A)
    v_ptr, stride_vh,  # (H, A)
    edge_ptr, stride_en, stride_eh,  # (E, H, A) or None
    indptr_ptr,  # (Nk + 1,), of the transposed structure
    indices_ptr,  # (E,), of the transposed structure: query nodes
    perm_ptr,  # (E,): where in CSR an edge of the transposed structure is
    do_ptr,  # (Nq, H, DV)
    g_ptr,  # (E, H) float32
    p_ptr,  # (E, H) float32: weights after dropout
    dk_ptr,  # (Nk, H, A) or None; with SHARED of both terms
    dval_ptr,  # (Nk, H, DV) or None
    part_ptr,  # (slots, H, A) float32: dk of a hub's pieces, or None
    part_val_ptr,  # (slots, H, DV) float32
    nodes,  # key nodes
    edges,
    steps,
    H,
    A,
    DV,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
    SHARED: tl.constexpr,
    PIECE: tl.constexpr,
    HUBS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    a = tl.program_id(2) * BLOCK_A + tl.arange(0, BLOCK_A)
    dv = tl.program_id(2) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    node, _, lo, hi, slot = edges_of(item, nodes, edges, indptr_ptr, steps, PIECE, HUBS)
    if dk_ptr is not None:
        k = load_heads(k_ptr + node * stride_kn, stride_kh, h, a, H, A)
        v = load_heads(v_ptr, stride_vh, h, a, H, A)
    grad_k = tl.zeros([BLOCK_H, BLOCK_A], tl.float32)
    grad_val = tl.zeros([BLOCK_H, BLOCK_DV], tl.float32)
    for t0 in range(lo, hi, BLOCK_E):
        t = t0 + tl.arange(0, BLOCK_E)
        keep = t < hi
        i = tl.load(indices_ptr + t, mask=keep, other=0).to(tl.int64)
        e = tl.load(perm_ptr + t, mask=keep, other=0).to(tl.int64)
        at = e[:, None] * H + h[None, :]
        inside = keep[:, None] & (h < H)[None, :]
        if dk_ptr is not None:
            g = tl.load(g_ptr + at, mask=inside, other=0.0)
            z = load_edges(q_ptr, stride_qn, stride_qh, i, keep, h, a, H, A) + k[None, :, :]
            if edge_ptr is not None:
                z += load_edges(edge_ptr, stride_en, stride_eh, e, keep, h, a, H, A)
            slope = activate_grad(z, activate(z, ACT, FAST), ACT, FAST)
            grad_k += tl.sum(g[:, :, None] * (v[None, :, :] * slope), axis=0)
        if dval_ptr is not None or SHARED:
            p = tl.load(p_ptr + at, mask=inside, other=0.0)
            do = load_edges(do_ptr, H * DV, DV, i, keep, h, dv, H, DV)
            grad_val += tl.sum(p[:, :, None] * do, axis=0)
    if dk_ptr is not None:
        if SHARED:
            grad_k += grad_val
        keep = (h < H)[:, None] & (a < A)[None, :]
        rows = (node * H + h)[:, None] * A + a[None, :]
        tl.store(dk_ptr + rows, grad_k.to(dk_ptr.dtype.element_ty), mask=keep & (slot == -1))
        if HUBS:
            rows = (slot * H + h)[:, None] * A + a[None, :]
            tl.store(part_ptr + rows, grad_k, mask=keep & (slot >= 0))
    if dval_ptr is not None:
        keep = (h < H)[:, None] & (dv < DV)[None, :]
        rows = (node * H + h)[:, None] * DV + dv[None, :]
        tl.store(dval_ptr + rows, grad_val.to(dval_ptr.dtype.element_ty), mask=keep & (slot == -1))
        if HUBS:
            rows = (slot * H + h)[:, None] * DV + dv[None, :]
            tl.store(part_val_ptr + rows, grad_val, mask=keep & (slot >= 0))


# ---------------------------------------------------------------------------------------------------------------
# Launcher
# ---------------------------------------------------------------------------------------------------------------


def graph_bwd(
    dout: Tensor, dlse: Tensor | None, dscores: Tensor | None,
    query: Tensor, key: Tensor, v: Tensor, value: Tensor | None, edge: Tensor | None, indptr: Tensor,
    indices: Tensor, transposed: tuple[Tensor, Tensor, Tensor] | None, seed: Tensor | None,
    out: Tensor, lse: Tensor, scores: Tensor, activation: str, dropout_p: float, needs: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of (query, key, v, value, edge), None where `needs` is False.

    transposed: (indptr, indices, permutation) of the transposed structure, where key or value needs a gradient.
    """
    call = prepare(query, key, v, value, edge, seed, activation, dropout_p)
    (nodes, H, A), DV, edges = query.shape, call.sizes["DV"], indices.numel()
    if query.numel() == 0 or edges == 0:
        inputs = (query, key, v, value, edge)
        return [torch.zeros_like(x) if need else None for x, need in zip(inputs, needs, strict=True)]
    need_q, need_k, need_v, need_value, need_edge = needs
    scores = scores.contiguous()
    dq, dk, dvalue, dedge = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in ((query, True), (key, need_k), (value, need_value), (edge, need_edge))
    )
    args = {
        **call.tensors, **call.sizes, **call.flags, "out_ptr": out.contiguous(),
        "do_ptr": dout.to(key.dtype).contiguous(), "lse_ptr": lse.contiguous(), "scores_ptr": scores,
        "dlse_ptr": None if dlse is None else dlse.contiguous(),
        "dscores_ptr": None if dscores is None else dscores.contiguous(),
        "g_ptr": torch.empty_like(scores), "p_ptr": torch.empty_like(scores),
        "dq_ptr": dq, "dk_ptr": dk, "dval_ptr": dvalue, "dedge_ptr": dedge,
    }  # fmt: skip

    def launch(kernel, grid: tuple[int, ...], blocks: Blocks, **more: object) -> None:
        more |= {f"BLOCK_{name}": getattr(blocks, name) for name in ("E", "H", "A", "DV")}
        named = {name: {**args, **more}[name] for name in kernel.arg_names}
        pressed = kernel is _graph_bwd_scores_kernel
        options = all_registers(call.chip) if pressed else unpressed(call.chip, A, DV)
        kernel[grid](**named, num_warps=blocks.warps, **options)

    with torch.cuda.device_of(query):
        blocks = graph_blocks(call.chip, nodes, edges, H, A, DV)
        heads = triton.cdiv(H, blocks.H)
        hubs = Hubs(nodes, edges, blocks.piece, indptr.contiguous())
        args |= {"indices_ptr": indices.contiguous(), "delta_ptr": hubs.parts(H)}
        # Rows of dO, out and values at once: with as few warps as elsewhere the compiler put some on the stack.
        wider = blocks._replace(warps=2 * blocks.warps)
        launch(_graph_bwd_scores_kernel, (hubs.items, heads), wider, **hubs.args)
        if hubs.slots:
            launch(_graph_bwd_pieces_kernel, (hubs.slots, heads), wider, **hubs.args)
        # As many programs as a chip holds at a time, or nearly: a partial sum of dv each.
        programs = min(hubs.items, 16 * call.chip.cores)
        dv = torch.empty(programs, H, A, dtype=torch.float32, device=query.device)
        if need_q or need_v or need_edge:
            grid, part = (programs, heads, triton.cdiv(A, blocks.A)), hubs.parts(H, A)
            launch(_graph_bwd_dq_kernel, grid, blocks, **hubs.args, items=hubs.items, dv_ptr=dv, part_ptr=part)
            hubs.join(part, dq)
        if need_k or need_value:
            indptr_t, indices_t, perm = (x.contiguous() for x in transposed)
            blocks = graph_blocks(call.chip, key.shape[0], edges, H, A, DV)
            hubs = Hubs(key.shape[0], edges, blocks.piece, indptr_t)
            part, part_val = hubs.parts(H, A), hubs.parts(H, DV)
            launch(
                _graph_bwd_dk_kernel,
                (hubs.items, heads, max(triton.cdiv(A, blocks.A), triton.cdiv(DV, blocks.DV))), blocks, **hubs.args,
                indices_ptr=indices_t, perm_ptr=perm, part_ptr=part, part_val_ptr=part_val,
            )  # fmt: skip
            if need_k:
                hubs.join(part, dk)
            if need_value:
                hubs.join(part_val, dvalue)
    grads = (dq, dk, dv.sum(0).to(v.dtype), dvalue, dedge)
    return [g if need else None for g, need in zip(grads, needs, strict=True)]
