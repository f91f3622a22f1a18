"""The graph family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_attn.kernels import graph, graph_bwd

from .dtypes import BF16, F16, F32


@dataclass(frozen=True)
class GraphCase:
    """One call of the graph family, forward and backward, as its sizes and options."""

    dtype: torch.dtype
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

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), f"N{self.N} E{self.E} H{self.H} A{self.A}"]
        parts.append("shared" if self.DV is None else f"Dv{self.DV}")
        parts += [f"keys{self.keys}"] * (self.keys is not None) + ["edge"] * self.edge
        parts += [self.activation] * (self.activation != "leaky_relu") + ["dropout"] * (self.dropout > 0)
        return " ".join([*parts, *["weights"] * self.weights, *["int32"] * (self.index == torch.int32)])

    def launch(self) -> None:
        """Forward, and a backward for every gradient."""

        def t(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        H, A, keys = self.H, self.A, self.keys or self.N
        tensors = (
            t(self.N, H, A), t(keys, H, A), t(H, A), None if self.DV is None else t(keys, H, self.DV),
            t(self.E, H, A) if self.edge else None, t(self.N + 1, dtype=self.index), t(self.E, dtype=self.index),
        )  # fmt: skip
        seed = t(1, dtype=torch.int64) if self.dropout else None
        transposed = (t(keys + 1, dtype=self.index), t(self.E, dtype=self.index), t(self.E, dtype=torch.int64))
        options = (self.activation, self.dropout)
        out, lse, scores = graph.graph_fwd(*tensors, seed, *options)
        cotangents = (out, lse, scores) if self.weights else (out, None, None)
        needs = [True, True, True, self.DV is not None, self.edge]
        graph_bwd.graph_bwd(*cotangents, *tensors, transposed, seed, out, lse, scores, *options, needs)


GRAPH = [
    # citation graphs: narrow heads side by side, then wide ones
    GraphCase(F32, 2708, 10_556, 8, 8),
    GraphCase(BF16, 2708, 10_556, 8, 8, dropout=0.6),
    GraphCase(BF16, 169_343, 1_166_243, 4, 64),
    GraphCase(F32, 169_343, 1_166_243, 4, 64, edge=True, index=torch.int32),
    GraphCase(F16, 169_343, 1_166_243, 1, 128, edge=True),
    # many neighbours, nodes of two kinds, values apart
    GraphCase(BF16, 1000, 100_000, 1, 16, 64, keys=30_000),
    GraphCase(F32, 1000, 100_000, 3, 64, 64, keys=50, weights=True, edge=True, activation="tanh", dropout=0.1),
    GraphCase(BF16, 1000, 100_000, 8, 128, 128, edge=True, activation="gelu", weights=True, dropout=0.1),
    # the widest whole rows, wider ones, and the narrowest
    GraphCase(F32, 10_000, 80_000, 2, 256, edge=True, dropout=0.1),
    GraphCase(F32, 10_000, 80_000, 2, 256, 256, edge=True, weights=True),
    GraphCase(BF16, 10_000, 80_000, 2, 600, edge=True),
    GraphCase(F32, 10_000, 80_000, 2, 40, 1000, activation="silu"),
    GraphCase(F32, 10_000, 80_000, 20, 3, 1, edge=True),
    GraphCase(BF16, 100, 300, 1, 1, 1, edge=True, weights=True),  # all strides are 1
]
