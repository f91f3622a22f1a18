"""Graph attention (GATv2): additive attention of a node over its neighbours in CSR.

For the edges e of node i, e in [indptr_i, indptr_{i+1}), which come from the nodes j = indices_e:

    z_e = q_i + k_j [+ edge_e]       s_e = v · act(z_e)       o_i = Σ_e softmax_e(s_e) value_j

A program has one node and BLOCK_H of its heads, and walks its edges in tiles [BLOCK_E, BLOCK_H, BLOCK_A] of gathered
key rows, with an online softmax: nothing of size E·A is stored. Heads share the indices of a tile, and where they are
narrow their rows lie side by side: one gather is one run of memory. The scores, a number an edge and head, are
written: the returned weights and the backward begin with them.

- Where the values are the keys (`SHARED`) one gathered tile serves the score and the sum.
- A tile holds widths up to 256. Wider rows (`WIDE`) are loaded in parts for the score, and the values' width is
  divided among programs, each of which makes the scores again.
- A node of many edges is divided among programs (graph_hubs.py).

The backward is in graph_bwd.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .chip import LENGTHS, Chip, chip_of, pow2, strides, unit, unpressed
from .graph_hubs import Hubs, edges_of
from .masks import dropout_scale
from .softmax import exp, finish, new_lse, no_key, pivot, rounded_product, store_lse


@triton.jit
def load_heads(ptr, stride_h, h, d, H, D):
    """One node's rows of the heads h, the features d: [BLOCK_H, BLOCK_D] float32."""
    keep = (h < H)[:, None] & (d < D)[None, :]
    return tl.load(ptr + h[:, None] * stride_h + d[None, :], mask=keep, other=0.0).to(tl.float32)


@triton.jit
def load_edges(ptr, stride_n, stride_h, rows, keep, h, d, H, D):
    """Gathered rows [BLOCK_E] of the heads h, the features d: [BLOCK_E, BLOCK_H, BLOCK_D] float32."""
    at = rows[:, None, None] * stride_n + h[None, :, None] * stride_h + d[None, None, :]
    keep = keep[:, None, None] & (h < H)[None, :, None] & (d < D)[None, None, :]
    return tl.load(ptr + at, mask=keep, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=LENGTHS)
def _graph_fwd_kernel(
    q_ptr, stride_qn, stride_qh,  # (Nq, H, A)
    k_ptr, stride_kn, stride_kh,  # (Nk, H, A)
    v_ptr, stride_vh,  # (H, A)
    val_ptr, stride_un, stride_uh,  # (Nk, H, DV); the keys again where SHARED
    edge_ptr, stride_en, stride_eh,  # (E, H, A) or None
    indptr_ptr,  # (Nq + 1,)
    indices_ptr,  # (E,)
    seed_ptr,
    out_ptr,  # (Nq, H, DV) float32
    lse_ptr,  # (Nq, H, 2) float32: (m, l), see softmax.py
    scores_ptr,  # (E, H) float32
    part_ptr,  # (slots, H, DV) float32: sums of a hub's pieces, not divided by l, or None
    part_lse_ptr,  # (slots, H, 2) float32
    nodes,
    edges,
    steps,
    H,
    A,
    DV,
    threshold,
    keep_scale,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
    FMA: tl.constexpr,
    SHARED: tl.constexpr,
    WIDE: tl.constexpr,
    PIECE: tl.constexpr,
    HUBS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    dv = tl.program_id(2) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    a = tl.arange(0, BLOCK_A)
    node, first, lo, hi, slot = edges_of(item, nodes, edges, indptr_ptr, steps, PIECE, HUBS)
    q_ptr += node * stride_qn
    if not WIDE:
        q = load_heads(q_ptr, stride_qh, h, a, H, A)
        v = load_heads(v_ptr, stride_vh, h, a, H, A)
    m = tl.full([BLOCK_H], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_DV], tl.float32)
    for e0 in range(lo, hi, BLOCK_E):
        e = (e0 + tl.arange(0, BLOCK_E)).to(tl.int64)  # the interpreter counts in int32
        keep = e < hi
        j = tl.load(indices_ptr + e, mask=keep, other=0).to(tl.int64)
        if WIDE:
            s = tl.zeros([BLOCK_E, BLOCK_H], tl.float32)
            for a0 in range(0, A, BLOCK_A):
                a = a0 + tl.arange(0, BLOCK_A)
                z = load_heads(q_ptr, stride_qh, h, a, H, A)[None, :, :]
                z += load_edges(k_ptr, stride_kn, stride_kh, j, keep, h, a, H, A)
                if edge_ptr is not None:
                    z += load_edges(edge_ptr, stride_en, stride_eh, e, keep, h, a, H, A)
                v = load_heads(v_ptr, stride_vh, h, a, H, A)
                s += tl.sum(rounded_product(v[None, :, :], activate(z, ACT, FAST)), axis=2)
        else:
            k = load_edges(k_ptr, stride_kn, stride_kh, j, keep, h, a, H, A)
            z = q[None, :, :] + k
            if edge_ptr is not None:
                z += load_edges(edge_ptr, stride_en, stride_eh, e, keep, h, a, H, A)
            s = tl.sum(rounded_product(v[None, :, :], activate(z, ACT, FAST)), axis=2)
        if tl.program_id(2) == 0:
            tl.store(scores_ptr + e[:, None] * H + h[None, :], s, mask=keep[:, None] & (h < H)[None, :])
        s = tl.where(keep[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=0))
        shift = pivot(m_new)
        p = exp(s - shift[None, :], FMA)  # [BLOCK_E, BLOCK_H]
        alpha = exp(m - shift, FMA)
        l = l * alpha + tl.sum(p, axis=0)
        if seed_ptr is not None:
            p *= dropout_scale(seed_ptr, (e - first)[:, None], node, h[None, :], threshold, keep_scale)
        if SHARED and not WIDE:
            values = k
        else:
            values = load_edges(val_ptr, stride_un, stride_uh, j, keep, h, dv, H, DV)
        acc = acc * alpha[:, None] + tl.sum(p[:, :, None] * values, axis=0)
        m = m_new
    whole = (h < H) & (slot == -1)
    rows = node * H + h
    if tl.program_id(2) == 0:
        store_lse(lse_ptr + rows * 2, m, l, whole)
    tl.store(
        out_ptr + rows[:, None] * DV + dv[None, :], acc * finish(l)[:, None], mask=whole[:, None] & (dv < DV)[None, :]
    )
    if HUBS:
        piece = (h < H) & (slot >= 0)
        rows = slot * H + h
        if tl.program_id(2) == 0:
            store_lse(part_lse_ptr + rows * 2, m, l, piece)
        tl.store(part_ptr + rows[:, None] * DV + dv[None, :], acc, mask=piece[:, None] & (dv < DV)[None, :])


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Sizes of one kernel's tiles: edges, heads, width of the score, width of the values."""

    E: int
    H: int
    A: int
    DV: int
    warps: int
    piece: int = 256  # edges of a node from which on it is divided


def graph_blocks(chip: Chip, nodes: int, edges: int, H: int, A: int, DV: int) -> Blocks:
    """Tiles of at most 1,024 numbers, in which a node of average degree takes few trips.

    Whole rows where they fit, and heads, up to 8, that make a row of 256. A warp has 128 to 256 numbers: addresses of
    gathered rows, and the numbers of an edge and head, need registers too; with 16 heads, or 16 edges, some were put
    on the stack. On an H200 tiles of 8 and 16 edges are 1.9 and 3.4 times slower (arxiv: 7 edges a node).
    """
    if chip.backend == "interpreter":
        return Blocks(4, pow2(H, 1, 2), pow2(A, 4, 16), pow2(DV, 4, 16), 4, 8)
    width, value_width = (pow2(n, 4, 256 if max(A, DV) <= 256 else 64) for n in (A, DV))
    heads = pow2(H, 1, min(8, 256 // max(width, value_width)))
    row = heads * max(width, value_width)
    tile = pow2(triton.cdiv(edges, nodes), 4, min(8, 1024 // row))
    return Blocks(tile, heads, width, value_width, pow2(tile * row // 128, 1, 4))


class Call(NamedTuple):
    """What the launches of one call share."""

    chip: Chip
    tensors: dict[str, Tensor | int | None]
    sizes: dict[str, int | float]
    flags: dict[str, object]


def prepare(
    query: Tensor, key: Tensor, v: Tensor, value: Tensor | None, edge: Tensor | None, seed: Tensor | None,
    activation: str, dropout_p: float,
) -> Call:  # fmt: skip
    """Arguments by the kernels' names; shapes as `fused_attn.reference.graph_attention` has them."""
    chip = chip_of(query.device)
    query, key, v, edge = unit(query), unit(key), unit(v), unit(edge)
    values = key if value is None else unit(value)
    return Call(
        chip,
        {
            "q_ptr": query, **strides("qn qh", query, (0, 1), packed=False),
            "k_ptr": key, **strides("kn kh", key, (0, 1), packed=False),
            "v_ptr": v, **strides("vh", v, (0,), packed=False),
            "val_ptr": values, **strides("un uh", values, (0, 1), packed=False),
            "edge_ptr": edge, **strides("en eh", edge, (0, 1), packed=False),
            "seed_ptr": seed,
        },
        {
            "H": query.shape[1], "A": query.shape[2], "DV": values.shape[2],
            "threshold": round(dropout_p * 2**24), "keep_scale": 1.0 / (1.0 - dropout_p),
        },
        {
            "ACT": activation, "FAST": chip.backend == "cuda" and key.element_size() == 2,
            "FMA": chip.backend != "interpreter", "SHARED": value is None,
        },
    )  # fmt: skip


def graph_fwd(
    query: Tensor, key: Tensor, v: Tensor, value: Tensor | None, edge: Tensor | None, indptr: Tensor,
    indices: Tensor, seed: Tensor | None, activation: str, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, lse, scores); arguments as `fused_attn.reference.graph_attention` has them."""
    call = prepare(query, key, v, value, edge, seed, activation, dropout_p)
    (nodes, H, A), DV, edges = query.shape, call.sizes["DV"], indices.numel()
    out = query.new_empty(nodes, H, DV, dtype=torch.float32)
    lse = new_lse(nodes, H, device=query.device)
    scores = torch.empty(edges, H, dtype=torch.float32, device=query.device)
    if out.numel() == 0 or edges == 0:
        return out.zero_(), no_key(lse), scores
    blocks = graph_blocks(call.chip, nodes, edges, H, A, DV)
    hubs = Hubs(nodes, edges, blocks.piece, indptr.contiguous())
    part, part_lse = hubs.parts(H, DV), hubs.parts(H, 2)
    with torch.cuda.device_of(query):
        _graph_fwd_kernel[(hubs.items, triton.cdiv(H, blocks.H), triton.cdiv(DV, blocks.DV))](
            **call.tensors, **call.sizes, **call.flags, **hubs.args, indices_ptr=indices.contiguous(),
            out_ptr=out, lse_ptr=lse, scores_ptr=scores, part_ptr=part, part_lse_ptr=part_lse,
            WIDE=blocks.A < A or blocks.DV < DV,
            BLOCK_E=blocks.E, BLOCK_H=blocks.H, BLOCK_A=blocks.A, BLOCK_DV=blocks.DV, num_warps=blocks.warps,
            **unpressed(call.chip, A, DV),
        )  # fmt: skip
        hubs.join(part, out, part_lse, lse)
    return out, lse, scores
