"""The graph family.

Sizes: N nodes, both query and key nodes, with E edges; H heads of width A; edge (0 or 1): edge features. The number
of neighbours follows a power law. The graph is static: its transposed structure is made once, and counts as an input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn import csr_from_edges, graph_attention, transpose_csr

from .problem import Case, Cost, Inputs, Op, Sizes


def _graph_inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    nodes, edges, H, A = (sizes[name] for name in "NEHA")

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    # The graph belongs to the problem, not to the draw of its inputs: one fixed seed. A uniform number to the third
    # power has a density that falls with the power 2/3: few nodes have most of the edges, as source or as target.
    fixed = torch.Generator().manual_seed(0)
    ends = (torch.rand(2, edges, generator=fixed).double() ** 3 * nodes).int()
    ranks = torch.stack([torch.randperm(nodes, generator=fixed) for _ in range(2)])
    indptr, indices, _ = csr_from_edges(ranks.gather(1, ends.long()).int(), nodes)
    indptr_t, indices_t, perm = transpose_csr(indptr, indices, nodes)
    structure = {
        "indptr": indptr,
        "indices": indices,
        "indptr_t": indptr_t,
        "indices_t": indices_t,
        "perm": perm.int(),
    }
    inputs = {"query": normal(nodes, H, A), "key": normal(nodes, H, A), "v": normal(H, A, std=2 * A**-0.5)}
    if sizes.get("edge"):
        inputs["edge"] = normal(edges, H, A)
    return inputs | {name: x.to(device) for name, x in structure.items()}


def _graph_call(
    *,
    query: Tensor,
    key: Tensor,
    v: Tensor,
    edge: Tensor | None = None,
    indptr: Tensor,
    indices: Tensor,
    indptr_t: Tensor,
    indices_t: Tensor,
    perm: Tensor,
    impl: str,
) -> Tensor:
    transposed = (indptr_t, indices_t, perm)
    return graph_attention(query, key, v, indptr, indices, edge=edge, transposed=transposed, impl=impl)  # type: ignore[return-value, arg-type]


def _graph_cost(sizes: Sizes, itemsize: int) -> tuple[Cost, Cost]:
    nodes, edges, H, A = (sizes[name] for name in "NEHA")
    read = (2 * nodes + 1 + edges * sizes.get("edge", 0)) * H * A
    out = nodes * H * A
    index = 4 * (2 * (nodes + 1) + 3 * edges)
    # An edge: A products for the score, A for the sum. Rows that many edges share are counted once.
    forward = Cost(4 * edges * H * A, itemsize * (read + out) + index)
    backward = Cost(2 * forward.flops, itemsize * (read + out + read) + index)
    return forward, backward


_CORA = {"N": 2708, "E": 10_556, "H": 8, "A": 8}
_ARXIV = {"N": 169_343, "E": 1_166_243, "H": 4, "A": 64}

GRAPH = Op(
    family="graph",
    inputs=_graph_inputs,
    call=_graph_call,
    cost=_graph_cost,
    cases=(
        # The sizes of Cora and of ogbn-arxiv; their degrees are drawn.
        Case("cora", _CORA, torch.float32),
        Case("arxiv", _ARXIV, check={"N": 16_384, "E": 112_834}),
        Case("arxiv", _ARXIV, torch.float32, check={"N": 16_384, "E": 112_834}),
        Case("arxiv-edges", {**_ARXIV, "edge": 1}, check={"N": 16_384, "E": 112_834}),
        Case("cora-small", _CORA, torch.float32, "cpu"),
    ),
)
