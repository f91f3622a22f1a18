"""PyTorch Geometric: layers over a graph, and aggregations of rows into sets, some of them empty."""

from __future__ import annotations

from typing import Any

import torch
import torch_geometric.nn as pyg
from torch import nn

from .case import Case, normal


def _graph(edge_dim: int | None = None, **options: Any) -> Case:
    """2,000 nodes, 20,000 edges, 4 heads of 32."""

    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        edge_index = torch.randint(2_000, (2, 20_000))
        more = () if edge_dim is None else (normal(20_000, edge_dim),)
        return pyg.GATv2Conv(64, 32, heads=4, edge_dim=edge_dim, **options), (normal(2_000, 64), edge_index, *more)

    return make


def _sets(aggregation: nn.Module, *, ordered: bool = True, of: int = 64) -> tuple[nn.Module, tuple[Any, ...]]:
    """8,000 rows of 128 in `of` sets."""
    index = torch.randint(of, (8_000,))
    return aggregation, (normal(8_000, 128), index.sort().values if ordered else index, None, 64)


def _gate() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 1))


CASES: dict[str, Case] = {
    "GATv2Conv": _graph(),
    "GATv2Conv, no self loops": _graph(add_self_loops=False),
    "GATv2Conv, edge_attr": _graph(16),
    "GATv2Conv, residual, mean of heads": _graph(residual=True, concat=False),
    "AttentionalAggregation, two layers": lambda: _sets(pyg.AttentionalAggregation(_gate())),
    "AttentionalAggregation, unsorted": lambda: _sets(pyg.AttentionalAggregation(_gate()), ordered=False),
    "AttentionalAggregation, empty sets": lambda: _sets(pyg.AttentionalAggregation(_gate()), of=48),
    "AttentionalAggregation, one layer, nn": lambda: _sets(
        pyg.AttentionalAggregation(nn.Linear(128, 1), nn.Linear(128, 64))
    ),
    "AttentionalAggregation, a gate a channel": lambda: _sets(pyg.AttentionalAggregation(nn.Linear(128, 128))),
    "SoftmaxAggregation": lambda: _sets(pyg.SoftmaxAggregation()),
    "SoftmaxAggregation, learn": lambda: _sets(pyg.SoftmaxAggregation(learn=True)),
}
