"""Hubs: nodes with so many edges that a program of their own would be waited for.

A node of more than PIECE edges is divided where the number of an edge is a multiple of PIECE:

    edges         0    PIECE   2 PIECE  3 PIECE        Node b has pieces: its start in chunk 0, which has slot 1, and
    nodes         |a|b-----+-------+-----|c|d|         the rest, which begin with chunks 1 and 2, slots 2 and 4.

One piece at most continues a node into a chunk, slot 2c, and one at most begins a node in its middle, slot 2c + 1.
So the programs of pieces, two a chunk, find what they have by a search in indptr: the host need not know which nodes
are hubs, and no list of them is made. What they leave in their slots is joined by a program a chunk, if a hub begins
in it. On an H200, 1.2 million edges of 169,343 nodes, one with 21,000: a program a node took 5.9 ms.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import launch
from .chip import INTERPRET, LENGTHS, cdiv, chip_of, pow2, unpressed
from .softmax import finish, join_states, store_lse


@triton.jit
def node_of(edge, nodes, csr, steps):
    """The node that an edge belongs to; `steps` halve the nodes to one."""
    left = edge * 0
    right = left + nodes
    for _ in range(0, steps):
        middle = (left + right) // 2
        before = tl.load(csr.indptr + middle).to(tl.int64) <= edge
        left = tl.where(before, middle, left)
        right = tl.where(before, right, middle)
    return left


@triton.jit
def edges_of(item, nodes, edges, csr, steps, PIECE: tl.constexpr, HUBS: tl.constexpr):
    """(node, its first edge, the edges lo to hi of this program, its slot).

    Items from `nodes` on are pieces. The slot is -1 of a node that is whole; where a program has nothing to do, for
    a hub that has pieces or in a chunk without one, it is -2, and lo = hi.
    """
    node = item
    slot = item * 0 - 1
    if HUBS:  # noqa: SIM102 — the one is known to the compiler, the other is not
        if item >= nodes:
            slot = item - nodes
            node = node_of(tl.minimum((slot + 1) // 2 * PIECE, edges - 1), nodes, csr, steps)
    first = tl.load(csr.indptr + node).to(tl.int64)
    lo = first
    hi = tl.load(csr.indptr + node + 1).to(tl.int64)
    if HUBS:
        hub = hi - first > PIECE
        if slot < 0:
            slot = tl.where(hub, slot - 1, slot)
        else:
            begin = slot // 2 * PIECE
            inside = (first > begin) & (first < begin + PIECE) & (begin + PIECE < edges)
            lo = tl.maximum(first, begin)
            hi = tl.minimum(hi, begin + PIECE)
            slot = tl.where(hub & ((slot % 2 == 0) | inside), slot, -2)
        hi = tl.where(slot == -2, lo, hi)
    return node, first, lo, hi, slot


@triton.jit
def slots_of(i, first, PIECE: tl.constexpr):
    """Slots of a hub's pieces i."""
    chunk = first // PIECE
    return tl.where(i == 0, 2 * chunk + (first > chunk * PIECE), 2 * (chunk + i))


@triton.jit
def _join(begin, head, d, part_ptr, part_lse_ptr, csr, out_ptr, lse_ptr, exact_ptr, nodes, steps, H, D, blocks):
    """A head's features d of the hub that begins in the chunk from `begin` on, if one does.

    It has the chunk's last edge, and the next one. The numbers of H, D and pointers as in `_graph_join_kernel`.
    """
    node = node_of(begin + blocks.PIECE, nodes, csr, steps)
    first = tl.load(csr.indptr + node).to(tl.int64)
    last = tl.load(csr.indptr + node + 1).to(tl.int64)
    if (last - first > blocks.PIECE) & (first >= begin) & (first < begin + blocks.PIECE):
        count = (last - 1) // blocks.PIECE - first // blocks.PIECE + 1
        m = tl.full([1], float("-inf"), tl.float32)
        l = tl.zeros([1], tl.float32)
        acc = tl.zeros([blocks.D], tl.float32)
        for i0 in range(0, count, blocks.I):
            i = i0 + tl.arange(0, blocks.I)
            at = slots_of(i, first, blocks.PIECE) * H + head
            keep = (i < count)[:, None] & (d < D)[None, :]
            part = tl.load(part_ptr + at[:, None] * D + d[None, :], mask=keep, other=0.0)
            if part_lse_ptr is None:
                acc += tl.sum(part, axis=0)
            else:
                m_i = tl.load(part_lse_ptr + at * 2, mask=i < count, other=float("-inf"))
                l_i = tl.load(part_lse_ptr + at * 2 + 1, mask=i < count, other=0.0)
                m, l, acc = join_states(m, l, acc, m_i, l_i, part, 1.0, blocks.FMA)
        row = node * H + head
        if part_lse_ptr is not None:
            acc = acc * finish(l)
            store_lse(lse_ptr + row * 2 + tl.arange(0, 1), m, l, tl.min(d, 0) == 0)
        tl.store(out_ptr + row * D + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)
        if exact_ptr is not None:
            tl.store(exact_ptr + row * D + d, acc, mask=d < D)


@triton.jit
def join_or_next(
    program,
    part_ptr,  # (slots, H, D) float32
    part_lse_ptr,  # (slots, H, 2) float32: (m, l), see softmax.py; None: parts of a sum
    csr,
    out_ptr,  # (nodes, H, D)
    lse_ptr,  # (nodes, H, 2) float32 or None
    exact_ptr,  # (nodes, H, D) float32, or None
    nodes,
    edges,
    steps,
    H,
    D,
    blocks,
):
    """Join what pieces of hubs left, if this program is one of a chunk; else which one after those it is, from 0."""
    wide = tl.cdiv(D, blocks.D)
    own = tl.cdiv(edges, blocks.PIECE) * H * wide
    if (program >= 0) & (program < own):
        begin = (program // (H * wide)).to(tl.int64) * blocks.PIECE
        head = program // wide % H
        d = program % wide * blocks.D + tl.arange(0, blocks.D)
        if begin + blocks.PIECE < edges:
            _join(
                begin, head, d, part_ptr, part_lse_ptr, csr, out_ptr, lse_ptr, exact_ptr, nodes, steps, H, D, blocks
            )
    return program - own


@triton.jit(do_not_specialize=LENGTHS)
def _graph_join_kernel(part, csr, result, nodes, edges, steps, size, blocks):
    """The forward's state of the hubs, of the states of their pieces."""
    out, lse, exact = result.out, result.lse, result.exact
    n = tl.program_id(0)
    join_or_next(n, part.out, part.lse, csr, out, lse, exact, nodes, edges, steps, size.H, size.DV, blocks)


class JoinBlocks(NamedTuple):
    """Pieces and width of a tile, and edges of a piece."""

    I: int
    D: int
    PIECE: int
    FMA: bool = not INTERPRET
    warps: int = 4


class Csr(NamedTuple):
    """For each node its edges, and the node that each is from."""

    indptr: Tensor  # (nodes + 1,)
    indices: Tensor  # (edges,)
    perm: Tensor | None = None  # (edges,) int64, of a transposed structure: where an edge is in the other


class Hubs(NamedTuple):
    """The programs that a structure's hubs may need."""

    nodes: int
    edges: int
    most: int  # edges that a node may have
    piece: int
    csr: Csr

    @property
    def slots(self) -> int:
        """Two a chunk of edges; none where no node can be a hub."""
        return 2 * cdiv(self.edges, self.piece) if min(self.edges, self.most) > self.piece else 0

    @property
    def items(self) -> int:
        """Programs of a walk: the nodes, then the pieces."""
        return self.nodes + self.slots

    @property
    def lengths(self) -> dict[str, int]:
        """Of every kernel that walks the structure."""
        return {"nodes": self.nodes, "edges": self.edges, "steps": self.nodes.bit_length()}

    def parts(self, *shape: int) -> Tensor | None:
        """Room for what the pieces leave, ``(slots,) + shape``."""
        if not self.slots:
            return None
        return torch.empty(self.slots, *shape, dtype=torch.float32, device=self.csr.indptr.device)

    def join(self, part: Any, result: Any, size: Any) -> None:
        """Write the hubs' rows of the forward's `result`, a `graph.State`, of those of their pieces."""
        if self.slots:
            DV = part.out.shape[2]
            blocks = self.join_blocks(DV)
            args = {"part": part, "csr": self.csr, "result": result, **self.lengths, "size": size}
            options = unpressed(chip_of(self.csr.indptr.device), DV)
            launch(_graph_join_kernel, (self.joins(part.out, blocks),), args, blocks, **options)

    def join_blocks(self, *widths: int) -> JoinBlocks:
        """Tiles of a launch that joins rows of these widths."""
        return JoinBlocks(16, pow2(max(widths), 1, 128), self.piece)

    def joins(self, parts: Tensor | None, blocks: JoinBlocks) -> int:
        """Programs that join `parts (slots, H, D)`."""
        return 0 if parts is None else self.slots // 2 * parts.shape[1] * cdiv(parts.shape[2], blocks.D)
