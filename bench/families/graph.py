"""The graph family.

Sizes: N nodes, both query and key nodes, with E edges; H heads of width A; edge (0 or 1): edge features. The number
of neighbours follows a power law. The graph is static: its transposed structure is made once, and counts as an input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_attn import csr_from_edges, graph_attention, transpose_csr

from .compile_case import CompileCase, blocks
from .problem import BF16, F16, F32, Case, Cost, Inputs, Op, Sizes
from .sizes import costs, drawing


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    normal = drawing(dtype, device, seed)
    nodes, edges, H, A = (sizes[name] for name in "NEHA")
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


def _call(*, indptr_t: Tensor, indices_t: Tensor, perm: Tensor, **arguments: Any) -> Tensor:
    return graph_attention(**arguments, transposed=(indptr_t, indices_t, perm))  # type: ignore[return-value]


def _cost(sizes: Sizes, itemsize: int) -> tuple[Cost, Cost]:
    nodes, edges, H, A = (sizes[name] for name in "NEHA")
    read = (2 * nodes + 1 + edges * sizes.get("edge", 0)) * H * A
    # An edge: A products for the score, A for the sum. Rows that many edges share are counted once.
    return costs(4 * edges * H * A, itemsize, read, nodes * H * A, 4 * (2 * (nodes + 1) + 3 * edges))


# The sizes of Cora and of ogbn-arxiv; what is timed has degrees that are drawn.
_CORA = {"N": 2708, "E": 10_556, "H": 8, "A": 8}
_ARXIV = {"N": 169_343, "E": 1_166_243, "H": 4, "A": 64}
_PART = {"N": 16_384, "E": 112_834}

TIMED = (
    Case("cora", _CORA, F32),
    Case("arxiv", _ARXIV, check=_PART),
    Case("arxiv", _ARXIV, F32, check=_PART),
    Case("arxiv-edges", {**_ARXIV, "edge": 1}, check=_PART),
    Case("cora-small", _CORA, F32, "cpu"),
)

OP = Op(family="graph", inputs=_inputs, call=_call, cost=_cost, cases=TIMED)


@dataclass(frozen=True)
class GraphCase(CompileCase):
    """One call of the graph family."""

    N: int
    E: int
    H: int
    A: int
    DV: int | None = None  # None: the values are the keys
    keys: int | None = None  # key nodes, where they are not the query nodes
    edge: bool = False
    activation: str = "leaky_relu"
    dropout: float = 0.0
    weights: bool = False  # whether they are returned, and have a gradient
    index: torch.dtype = torch.int64
    hubs: bool = True  # whether nodes may be divided

    lengths = ("N", "E", "keys")

    def _parts(self) -> tuple[str, ...]:
        return (
            f"N{self.N} E{self.E} H{self.H} A{self.A}",
            "shared" if self.DV is None else f"Dv{self.DV}",
            f"keys{self.keys}" * (self.keys is not None),
            "edge" * self.edge,
            self.activation * (self.activation != "leaky_relu"),
            "dropout" * (self.dropout > 0),
            "weights" * self.weights,
            "int32" * (self.index == torch.int32),
            "no hubs" * (not self.hubs),
        )

    def _launch(self) -> None:
        from fused_attn.kernels import graph, graph_bwd
        from fused_attn.kernels.inputs import GraphInputs

        H, A, keys = self.H, self.A, self.keys or self.N
        inputs = GraphInputs(
            self._empty(self.N, H, A),
            self._empty(keys, H, A),
            self._empty(H, A),
            None if self.DV is None else self._empty(keys, H, self.DV),
            self._empty(self.E, H, A) if self.edge else None,
            self._empty(self.N + 1, dtype=self.index),
            self._empty(self.E, dtype=self.index),
            self._empty(keys + 1, dtype=self.index),
            self._empty(self.E, dtype=self.index),
            self._empty(self.E, dtype=torch.int64),
            self._seed(self.dropout),
            self.activation,
            self.dropout,
            None if self.hubs else 1,
        )
        exact = self.dtype.itemsize == 2
        out, lse, scores, more = graph.graph_fwd(inputs, exact)
        cotangents = (out, lse, scores) if self.weights else (out, None, None)
        needs = [True, True, True, self.DV is not None, self.edge]
        graph_bwd.graph_bwd(inputs, more if exact else out, lse, scores, *cotangents, needs)


COMPILED = [
    # citation graphs: narrow heads side by side, then wide ones
    GraphCase(F32, **_CORA),
    GraphCase(BF16, **_CORA, dropout=0.6),
    GraphCase(BF16, **_ARXIV),
    GraphCase(BF16, **_ARXIV, hubs=False),
    GraphCase(F32, **_ARXIV, edge=True, index=torch.int32),
    GraphCase(F16, **{**_ARXIV, "H": 1, "A": 128}, edge=True),
    # many neighbours, nodes of two kinds, values apart
    GraphCase(BF16, 1000, 100_000, 1, 16, 64, keys=30_000),
    GraphCase(F32, 1000, 100_000, 3, 64, 64, keys=50, weights=True, edge=True, activation="tanh", dropout=0.1),
    GraphCase(BF16, 1000, 100_000, 8, 128, 128, edge=True, activation="gelu", weights=True, dropout=0.1),
    # the widest whole rows, wider ones, and the narrowest
    GraphCase(F32, 10_000, 80_000, 2, 256, edge=True, dropout=0.1),
    GraphCase(F32, 10_000, 80_000, 2, 256, 256, edge=True, weights=True),
    GraphCase(BF16, 10_000, 80_000, 2, 600, edge=True),
    GraphCase(F32, 10_000, 80_000, 2, 40, 1000, activation="leaky_relu:0.01"),
    GraphCase(F32, 10_000, 80_000, 20, 3, 1, edge=True, activation="elu"),
    # whole vectors of 4, and long rows in float32, which took more registers than ptxas gave
    GraphCase(BF16, 10_000, 80_000, 2, 100, edge=True),
    GraphCase(BF16, 10_000, 80_000, 2, 300),
    GraphCase(F32, 10_000, 80_000, 2, 112, 224, edge=True, weights=True, dropout=0.1),
    GraphCase(F32, 10_000, 30_000, 8, 256, weights=True, dropout=0.1, activation="elu"),
    GraphCase(BF16, 100, 300, 1, 1, 1, edge=True, weights=True),  # all strides are 1
]
BRIEF = COMPILED[:1]
VARIED = {
    "graph": [
        GraphCase(F32, 1, 1, 8, 8),
        GraphCase(BF16, 1, 1, 4, 64, dropout=0.1),
        GraphCase(F32, 1, 1, 3, 33, 100, keys=1, edge=True, weights=True),
        GraphCase(BF16, 1, 1, 2, 36, edge=True),
    ]
}


def elements(kernel: str, constants: Mapping[str, Any]) -> int:
    """Edges by heads by features."""
    if kernel == "_graph_join_kernel":
        return blocks(constants, "I", "D")
    return blocks(constants, "E", "H", "A" if "BLOCK_A" in constants else "DV")
