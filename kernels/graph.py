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
from .arguments import constants, launch, rows, units, width
from .chip import LENGTHS, Chip, all_registers, cdiv, chip_of, pow2, unit, unpressed
from .graph_hubs import Csr, Hubs, edges_of
from .inputs import GraphInputs
from .masks import dropout, dropout_scale
from .softmax import finish, new_lse, no_key, online_softmax, rounded_product, store_lse
from .tiles import store_rows


@triton.jit
def load_heads(x, node, h, d, H, D):
    """A node's rows of the heads h, the features d: [BLOCK_H, BLOCK_D] float32."""
    keep = (h < H)[:, None] & (d < D)[None, :]
    at = x.ptr + node * units(x.stride_n, x.UNIT) + h[:, None] * units(x.stride_h, x.UNIT) + d[None, :]
    return tl.load(at, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def load_edges(x, nodes, keep, h, d, H, D):
    """Gathered rows of the nodes [BLOCK_E], their heads h, the features d: [BLOCK_E, BLOCK_H, BLOCK_D] float32."""
    at = nodes[:, None, None] * units(x.stride_n, x.UNIT) + h[None, :, None] * units(x.stride_h, x.UNIT)
    at += d[None, None, :]
    keep = keep[:, None, None] & (h < H)[None, :, None] & (d < D)[None, None, :]
    return tl.load(x.ptr + at, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def edge_tile(e0, hi, csr, BLOCK_E: tl.constexpr):
    """(edges [BLOCK_E] from e0 on, which of them there are, the nodes they come from), int64."""
    e = (e0 + tl.arange(0, BLOCK_E)).to(tl.int64)  # the interpreter counts in int32
    keep = e < hi
    return e, keep, tl.load(csr.indices + e, mask=keep, other=0).to(tl.int64)


@triton.jit
def edge_sums(own, x, nodes, edge, e, keep, h, a, H, A):
    """(q + k [+ edge], rows of x) for the features a of edges e, with own [BLOCK_H, BLOCK_A] at one end of all."""
    rows = load_edges(x, nodes, keep, h, a, H, A)
    z = own[None, :, :] + rows
    if edge.ptr is not None:
        z += load_edges(edge, e, keep, h, a, H, A)
    return z, rows


@triton.jit(do_not_specialize=LENGTHS)
def _graph_fwd_kernel(
    q,  # (Nq, H, A)
    k,  # (Nk, H, A)
    v,  # (H, A)
    value,  # (Nk, H, DV); the keys again where SHARED
    edge,  # (E, H, A) or None
    csr,
    dropout,
    result,
    part,  # of a hub's pieces: sums that are not divided by l, or None
    nodes,
    edges,
    steps,
    size,
    flags,
    blocks,
):
    item = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64) * blocks.H + tl.arange(0, blocks.H)
    dv = tl.program_id(2) * blocks.DV + tl.arange(0, blocks.DV)
    a = tl.arange(0, blocks.A)
    node, first, lo, hi, slot = edges_of(item, nodes, edges, csr, steps, blocks.piece, flags.HUBS)
    if not flags.WIDE:
        q_row = load_heads(q, node, h, a, size.H, size.A)
        v_row = load_heads(v, node, h, a, size.H, size.A)
    m = tl.full([blocks.H], float("-inf"), tl.float32)
    l = tl.zeros([blocks.H], tl.float32)
    acc = tl.zeros([blocks.H, blocks.DV], tl.float32)
    for e0 in range(lo, hi, blocks.E):
        e, keep, j = edge_tile(e0, hi, csr, blocks.E)
        if flags.WIDE:
            s = tl.zeros([blocks.E, blocks.H], tl.float32)
            for a0 in range(0, size.A, blocks.A):
                a = a0 + tl.arange(0, blocks.A)
                q_row = load_heads(q, node, h, a, size.H, size.A)
                z, _rows = edge_sums(q_row, k, j, edge, e, keep, h, a, size.H, size.A)
                v_row = load_heads(v, node, h, a, size.H, size.A)
                s += tl.sum(rounded_product(v_row[None, :, :], activate(z, flags.ACT, flags.FAST)), axis=2)
        else:
            z, k_rows = edge_sums(q_row, k, j, edge, e, keep, h, a, size.H, size.A)
            s = tl.sum(rounded_product(v_row[None, :, :], activate(z, flags.ACT, flags.FAST)), axis=2)
        if tl.program_id(2) == 0:
            at = result.scores + e[:, None] * size.H + h[None, :]
            tl.store(at, s, mask=keep[:, None] & (h < size.H)[None, :])
        s = tl.where(keep[:, None], s, float("-inf"))
        p, alpha, m, l = online_softmax(s, m, l, 0, flags.FMA)  # p: [BLOCK_E, BLOCK_H]
        if dropout.seed is not None:
            p *= dropout_scale(dropout, (e - first)[:, None], node, h[None, :])
        if flags.SHARED and not flags.WIDE:
            values = k_rows
        else:
            values = load_edges(value, j, keep, h, dv, size.H, size.DV)
        acc = acc * alpha[:, None] + tl.sum(p[:, :, None] * values, axis=0)
    whole = (h < size.H) & (slot == -1)
    row = node * size.H + h
    if tl.program_id(2) == 0:
        store_lse(result.lse + row * 2, m, l, whole)
    out = acc * finish(l)[:, None]
    store_rows(result.out + row * size.DV, out, whole, dv, size.DV)
    if result.exact is not None:
        store_rows(result.exact + row * size.DV, out, whole, dv, size.DV)
    if flags.HUBS:
        piece = (h < size.H) & (slot >= 0)
        row = slot * size.H + h
        if tl.program_id(2) == 0:
            store_lse(part.lse + row * 2, m, l, piece)
        store_rows(part.out + row * size.DV, acc, piece, dv, size.DV)


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
    tile = pow2(cdiv(edges, nodes), 4, min(8, 1024 // row))
    return Blocks(tile, heads, width, value_width, pow2(tile * row // 128, 1, 4))


def registers_of(chip: Chip, itemsize: int, A: int, DV: int) -> dict[str, int]:
    """As `unpressed`; and for rows walked in parts, and long ones in float32, which ptxas pressed into 64 and 80."""
    long = max(A, DV) > (128 if itemsize == 4 else 256)
    return all_registers(chip) if long else unpressed(chip, A, DV)


class Size(NamedTuple):
    """Heads, width of the score, width of the values."""

    H: int
    A: int
    DV: int


class Flags(NamedTuple):
    """What kernels are compiled for."""

    ACT: str
    FAST: bool
    FMA: bool
    SHARED: bool  # the values are the keys
    WIDE: bool  # the widths are walked in parts
    HUBS: bool  # nodes may be divided


class State(NamedTuple):
    """What the forward leaves, of a node in the dtype of the keys, of a hub's pieces in float32."""

    out: Tensor | None  # (nodes, H, DV)
    lse: Tensor | None  # (nodes, H, 2): (m, l), see softmax.py
    scores: Tensor | None  # (edges, H)
    exact: Tensor | None = None  # out in float32, for a backward of 16 bits


class Call(NamedTuple):
    """What the launches of one call share, by the kernels' names."""

    chip: Chip
    blocks: Blocks
    hubs: Hubs
    args: dict[str, object]


def prepare(inputs: GraphInputs) -> Call:
    query, key, v, value, edge, indptr, indices, *_, seed, activation, dropout_p, max_degree = inputs
    chip = chip_of(query.device)
    query, key, v, edge = unit(query), unit(key), unit(v), unit(edge)
    values = key if value is None else unit(value)
    (nodes, H, A), DV, edges = query.shape, values.shape[2], indices.numel()
    blocks = graph_blocks(chip, nodes, edges, H, A, DV)
    csr = Csr(indptr.contiguous(), indices.contiguous())
    hubs = Hubs(nodes, edges, edges if max_degree is None else max_degree, blocks.piece, csr)
    flags = Flags(
        activation,
        chip.backend == "cuda" and key.element_size() == 2,
        chip.backend != "interpreter",
        value is None,
        blocks.A < A or blocks.DV < DV,
        hubs.slots > 0,
    )
    args = {
        "q": rows(query),
        "k": rows(key),
        "v": rows(v),
        "value": rows(values),
        "edge": rows(edge),
        "csr": hubs.csr,
        "dropout": dropout(seed, dropout_p),
        "size": Size(H, width(A), width(DV)),
        "flags": constants(flags),
    }
    return Call(chip, blocks, hubs, args)


def graph_fwd(inputs: GraphInputs, need_exact: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, scores) as `fused_attn.reference.graph_attention` has them, and out in float32.

    That is written only where `need_exact` says so, for the backward, which takes differences with it; else empty.
    """
    query, key, _, value, _, _, indices, *_ = inputs
    (nodes, H, A), edges = query.shape, indices.numel()
    DV = (key if value is None else value).shape[2]
    out = query.new_empty(nodes, H, DV)
    exact = query.new_empty(out.shape if need_exact else (0,), dtype=torch.float32)
    lse = new_lse(nodes, H, device=query.device)
    scores = torch.empty(edges, H, dtype=torch.float32, device=query.device)
    if out.numel() == 0 or edges == 0:
        return out.zero_(), no_key(lse), scores, exact.zero_()
    call = prepare(inputs)
    blocks, hubs = call.blocks, call.hubs
    part = State(hubs.parts(H, DV), hubs.parts(H, 2), None)
    args = {**call.args, **hubs.lengths, "result": State(out, lse, scores, exact if need_exact else None)}
    args["part"] = part
    registers = registers_of(call.chip, key.element_size(), A, DV)
    launch(_graph_fwd_kernel, (hubs.items, cdiv(H, blocks.H), cdiv(DV, blocks.DV)), args, blocks, **registers)
    hubs.join(part, args["result"], args["size"])
    return out, lse, scores, exact
