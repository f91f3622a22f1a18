"""PyTorch Geometric: GATv2 on `graph_attention`, aggregations on `statistics_pooling` and `location_attention`.

Layers are called, not read, so that their hooks and adapters work; of a gate network of two linear layers the weights
are read where nothing forbids it, else it is called too. What a call must be for ours to run, each class says.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from torch_geometric.nn.dense.linear import Linear

from .._checks import check_indices
from .._made_once import made_once
from ..graph import FILLS, graph_attention, loops_of
from ..location import location_attention
from ..segments import Segments
from ..statistics import statistics_pooling
from ._replacement import Registry, Replacement, why_not_read, without_autocast

_HOOKS = [
    f"_{what}_forward_{when}hooks"
    for what in ("propagate", "message", "aggregate", "message_and_aggregate", "edge_update")
    for when in ("pre_", "")
]
_ACTIVATIONS = {nn.Tanh: "tanh", nn.ReLU: "relu", nn.Sigmoid: "sigmoid", nn.SiLU: "silu", nn.Identity: "identity"}


class GATv2Conv(Replacement, pyg.GATv2Conv):
    """GATv2, by graph_attention: on a GPU nothing of edges × features is stored, but projected features of edges.

    The library's own forward runs for adjacencies that are no plain list of edges, for dropout in training (its
    random numbers are torch's, and the weights that it returns have been dropped), while the layer is explained, and
    with hooks of message passing.
    """

    def forward(
        self, x: Any, edge_index: Any, edge_attr: Tensor | None = None, return_attention_weights: bool | None = None
    ) -> Any:
        """As the library's."""
        pair = x if isinstance(x, tuple | list) else (x, x)
        given = [*pair, self.att] if edge_attr is None else [*pair, self.att, edge_attr]
        if not (self.takes(*given) and self._has_edges(pair, edge_index, edge_attr)):
            return super().forward(x, edge_index, edge_attr, return_attention_weights)
        residual = None if self.res is None else self.res(pair[1])
        keys = self.lin_l(pair[0]).unflatten(1, (self.heads, -1))
        same = pair[0] is pair[1] and self.share_weights
        queries = keys if same else self.lin_r(pair[1]).unflatten(1, (self.heads, -1))
        if self.add_self_loops:
            ends = len(keys), len(queries)
            loops = loops_of(edge_index, min(ends), ends)
            edge_index = loops.edge_index
            edge_attr = None if edge_attr is None else loops.features(edge_attr, self.fill_value)
        edge = None
        if edge_attr is not None:
            edge = self.lin_edge(edge_attr.view(len(edge_attr), -1)).unflatten(1, (self.heads, -1))
        # The library reads the next two lines in the source of a new layer, to make what its own forward calls.
        # edge_updater_type: (x: PairTensor, edge_attr: OptTensor)
        # propagate_type: (x: PairTensor, alpha: Tensor)
        score = self.att[0]
        dtype = torch.promote_types(keys.dtype, score.dtype)
        with without_autocast(keys):
            result = graph_attention(
                queries.to(dtype),
                keys.to(dtype),
                score.to(dtype),
                edge_index,
                edge=None if edge is None else edge.to(dtype),
                negative_slope=self.negative_slope,
                return_weights=bool(return_attention_weights),
            )
        out, alpha = result if isinstance(result, tuple) else (result, None)
        out = out.flatten(1) if self.concat else out.mean(1)
        out = out if residual is None else out + residual
        out = out if self.bias is None else out + self.bias
        return (out, (edge_index, alpha)) if return_attention_weights else out

    def _has_edges(self, pair: Any, edge_index: object, edge_attr: Tensor | None) -> bool:
        """Whether this is a call that `graph_attention` has."""
        plain = type(edge_index) is Tensor and edge_index.layout == torch.strided and edge_index.dtype == torch.int64
        if not plain or (self.dropout > 0 and self.training) or self.explain or any(getattr(self, x) for x in _HOOKS):
            return False
        if len(pair) != 2 or any(x.dim() != 2 for x in pair) or _refusal(self) is not None:
            return False
        if edge_attr is None:
            return True
        if self.lin_edge is None or edge_attr.dim() not in (1, 2):
            return False
        fill = self.fill_value
        shapes = (edge_attr.shape[1:], (1, *edge_attr.shape[1:]))
        known = fill in FILLS if isinstance(fill, str) else not isinstance(fill, Tensor) or fill.shape in shapes
        return not self.add_self_loops or (known and len(pair[1]) <= len(pair[0]))


def _refusal(module: pyg.GATv2Conv) -> str | None:
    """Why a layer cannot be replaced, or a call of a replaced one, which may have changed, be ours."""
    if module.flow != "source_to_target":
        return f"flow={module.flow!r}: only source_to_target is there"
    if module.decomposed_layers > 1:
        return f"decomposed_layers={module.decomposed_layers}: only 1 is there"
    for name in ("message", "edge_update", "propagate", "edge_updater", "aggregate", "update"):
        if name in vars(module):
            return f"its {name} was replaced by hand"
    if type(module.aggr_module) is not pyg.SumAggregation:
        return f"aggr={module.aggr!r}: only sum is there"
    return why_not_read("aggr_module", module.aggr_module, (pyg.SumAggregation,))


class _Sets(NamedTuple):
    """Rows of sets: where each begins once they are in order, and that order where they were not."""

    offsets: Segments | Tensor
    order: Tensor | None

    def sorted(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.index_select(0, self.order)


_MADE: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _sets(index: Tensor | None, ptr: Tensor | None, dim_size: int | None) -> _Sets:
    """Of the set of each row, or of the offsets of sets; made once for a tensor that nobody writes to."""
    in_graph = torch.compiler.is_compiling()

    def of_index() -> _Sets:
        assert index is not None
        assert dim_size is not None
        check_indices("index", index, dim_size, "sets")
        ordered = not in_graph and bool((index[1:] >= index[:-1]).all())
        order = None if ordered else torch.argsort(index, stable=True)
        borders = torch.arange(dim_size + 1, device=index.device, dtype=index.dtype)
        offsets = torch.searchsorted(index if order is None else index[order], borders).int()
        return _Sets(offsets if in_graph else Segments.from_offsets(offsets), order)

    def of_ptr() -> _Sets:
        assert ptr is not None
        return _Sets(ptr.int() if in_graph else Segments.from_offsets(ptr.int()), None)

    if index is None:
        assert ptr is not None
        return made_once(_MADE, ptr, (), of_ptr)
    return made_once(_MADE, index, (dim_size,), of_index)


def _has_sets(x: Tensor, index: Tensor | None, ptr: Tensor | None, dim_size: int | None, dim: int) -> bool:
    """Whether rows of two dimensions are pooled, and one of index and ptr says of which sets."""
    if (index is None) == (ptr is None) or x.dim() != 2 or dim not in (-2, 0):
        return False
    said = ptr if index is None else index
    if said is None or type(said) is not Tensor or said.dim() != 1 or said.dtype != torch.int64:
        return False
    return index is None or (dim_size is not None and len(x) == said.numel())


class AttentionalAggregation(Replacement, pyg.AttentionalAggregation):
    """Gated softmax: a gate Linear-activation-Linear by location_attention, others by statistics_pooling.

    The library's own forward runs for what are no rows (N, F), and where both `index` and `ptr` are given.
    """

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
        dim: int = -2,
    ) -> Tensor:
        """As the library's."""
        if not (self.takes(x) and _has_sets(x, index, ptr, dim_size, dim)):
            return super().forward(x, index, ptr, dim_size, dim)
        layers = self._layers_to_read(x)
        gate: Tensor | None = None
        if layers is None:  # before nn is called, as the library does it: both may draw random numbers
            gate = self.gate_nn(x) if self.gate_mlp is None else self.gate_mlp(x, batch=index, batch_size=dim_size)
        values: Tensor = x
        if self.mlp is not None:
            values = self.mlp(x, batch=index, batch_size=dim_size)
        elif self.nn is not None:
            values = self.nn(x)
        sets = _sets(index, ptr, dim_size)
        if gate is not None:
            return _pool(values, gate, sets)
        assert layers is not None
        first, activation, last = layers
        rows = sets.sorted(x)
        out = location_attention(
            rows,
            first.weight.t(),
            first.bias,
            last.weight[0],
            value=None if values is x else sets.sorted(values),
            activation=_ACTIVATIONS[type(activation)],
            score_bias=None if last.bias is None else last.bias.expand(len(x)),  # else its gradient would be None
            cu_seqlens=sets.offsets,
        )
        return cast("Tensor", out)

    def _layers_to_read(self, x: Tensor) -> list[Any] | None:
        """A gate's two layers and the activation between them, if their weights are all that there is to it."""
        gate = self.gate_nn
        if why_not_read("gate_nn", gate, (nn.Sequential,)) or gate is None or len(gate) != 3:
            return None
        layers, linear = [*gate], (nn.Linear, Linear)
        kinds = (linear, tuple(_ACTIVATIONS), linear)
        if any(why_not_read("gate_nn", layer, kind) for layer, kind in zip(layers, kinds, strict=True)):
            return None
        weights = layers[0].weight, layers[2].weight
        if torch.is_autocast_enabled(x.device.type) or not self.takes(x, *weights) or weights[1].shape[0] != 1:
            return None
        return layers if weights[0].dtype == weights[1].dtype == x.dtype else None


class SoftmaxAggregation(Replacement, pyg.SoftmaxAggregation):
    """Softmax of each channel, by statistics_pooling.

    The library's own forward runs for what are no rows (N, F), and where both `index` and `ptr` are given.
    """

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
        dim: int = -2,
    ) -> Tensor:
        """As the library's."""
        if not (self.takes(x) and _has_sets(x, index, ptr, dim_size, dim) and self.channels in (1, x.shape[1])):
            return super().forward(x, index, ptr, dim_size, dim)
        scores = x * self.t
        return _pool(x, scores.detach() if self.semi_grad and not self.learn else scores, _sets(index, ptr, dim_size))


def _pool(values: Tensor, scores: Tensor, sets: _Sets) -> Tensor:
    """Sums of rows (N, F) weighted by a softmax of scores (N, 1) or (N, F) in each set."""
    if scores.dim() != 2:
        raise ValueError(f"gate_nn: expected scores (N, 1) or (N, F); got {tuple(scores.shape)}")
    dtype = torch.promote_types(values.dtype, scores.dtype)
    values, scores = sets.sorted(values.to(dtype)), sets.sorted(scores.to(dtype))
    if scores.shape[1] == 1:
        scores = scores.squeeze(1)
    else:
        values, scores = torch.broadcast_tensors(values, scores)
    with without_autocast(values):
        out = statistics_pooling(values, score_bias=scores, cu_seqlens=sets.offsets, deviation=False)
    return cast("Tensor", out)


def _always(_: nn.Module) -> None:
    """Nothing of an aggregation can be in the way: its networks are called."""


REGISTRY: Registry = {
    pyg.GATv2Conv: (GATv2Conv, _refusal),
    pyg.AttentionalAggregation: (AttentionalAggregation, _always),
    pyg.SoftmaxAggregation: (SoftmaxAggregation, _always),
}
