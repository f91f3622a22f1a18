"""The graph family as a module."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .._checks import (
    Checker,
    argument,
    check_activation,
    check_dropout,
    check_flag,
    module_checker,
    weight_of,
    width_of,
)
from .._habits import explicit
from .._ops import Impl
from ..graph import (
    Fill,
    Graph,
    Transposed,
    check_edge_index,
    check_fill,
    check_slope,
    csr_of,
    graph_attention,
    loops_of,
)
from ._layers import Attention, counts, factory, optional_counts, read

_INPUTS = {
    "x": argument("N query_dim"),
    "x[0]": argument("Nq query_dim"),
    "x[1]": argument("Nk key_dim"),
    "indptr": argument("Nq+1", "index"),
    "indices": argument("E", "index"),
    "edge": argument("E edge_dim", optional=True),
}


class GraphAttention(Attention):
    r"""Graph attention (GATv2) with its projections, see `graph_attention`.

    .. math:: s_e = v \cdot act(W_q x_i + W_k x_j + W_e edge_e), \quad o_i = \sum_e softmax_e(s_e) \, W_k x_j

    The projections are those of PyTorch Geometric's ``GATv2Conv``: `key_proj` is its ``lin_l`` (sources, and the
    values), `query_proj` its ``lin_r`` (targets), `edge_proj` its ``lin_edge``, `residual_proj` its ``res``, and
    ``score.weight`` its ``att``. Unlike it, edges from a node to itself are added where `self_loops` says so, not
    else, and layers are initialised as `torch.nn.Linear` is.

    Parameters
    ----------
    query_dim, head_dim
        Width of the nodes, and of each head's score and output.
    num_heads
        Number H of heads.
    key_dim
        Width of the source nodes, for a graph between nodes of two kinds; query_dim where None.
    edge_dim
        Width of the edge features; None for none.
    concat
        Whether the heads' outputs are put one after the other, ``H * head_dim`` wide; else their mean is taken.
    share_weights
        Whether `query_proj` is `key_proj`.
    bias
        Whether the projections of nodes have biases, and the output too.
    residual
        Whether a product of the query nodes with a weight of its own is added to the output.
    negative_slope
        Of leaky_relu, below 0.
    self_loops
        Whether every node has an edge to itself, in place of those that there are, as `add_self_loops` adds it. It
        takes a list of edges, and nodes of one kind; what it makes of the list is kept as its `Graph` is. The number
        of edges is then in values: `torch.compile` has one graph only where `add_self_loops` went before.
    fill
        Features of those edges, see `add_self_loops`: PyG's ``fill_value``. A tensor ``(edge_dim,)`` is a buffer,
        which is not saved.
    dropout, activation, device, dtype
        As in `ConcatAttention`.

    Attributes
    ----------
    query_proj, key_proj, edge_proj, residual_proj, score
        `torch.nn.Linear`; `edge_proj` is None without edge features, `residual_proj` without a residual;
        ``score.weight (H, head_dim)`` is v.
    bias
        Of the output, zeros at first; or None.

    Raises
    ------
    ValueError, TypeError
        For a size under 1, an unknown activation, or weights shared between nodes of different widths.

    """

    def __init__(
        self,
        query_dim: int,
        head_dim: int,
        *,
        num_heads: int = 1,
        key_dim: int | None = None,
        edge_dim: int | None = None,
        concat: bool = True,
        share_weights: bool = False,
        bias: bool = True,
        residual: bool = False,
        dropout: float = 0.0,
        activation: str = "leaky_relu",
        negative_slope: float = 0.2,
        self_loops: bool = False,
        fill: Fill = "mean",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        key_dim = query_dim if key_dim is None else key_dim
        query_dim, head_dim, num_heads, key_dim = counts(
            query_dim=query_dim, head_dim=head_dim, num_heads=num_heads, key_dim=key_dim
        )
        [edge_dim] = optional_counts(edge_dim=edge_dim)
        concat, bias = check_flag("concat", concat), check_flag("bias", bias)
        share_weights, residual = check_flag("share_weights", share_weights), check_flag("residual", residual)
        if share_weights and key_dim != query_dim:
            raise ValueError(f"share_weights: expected False where key_dim is not query_dim, {query_dim}; got True")
        check_activation("activation", activation)
        self_loops = check_flag("self_loops", self_loops)
        if self_loops and key_dim != query_dim:
            raise ValueError(f"self_loops: expected False where key_dim is not query_dim, {query_dim}; got True")
        fill = check_fill("fill", fill)
        default = isinstance(fill, str) and fill == "mean"
        if not default and not (self_loops and edge_dim is not None):
            got = "a tensor" if isinstance(fill, Tensor) else repr(fill)
            raise ValueError(f"fill: expected 'mean', the default, without self_loops and an edge_dim; got {got}")
        if isinstance(fill, Tensor) and fill.shape not in ((edge_dim,), (1, edge_dim)):
            raise ValueError(f"fill: expected shape (edge_dim,) with edge_dim = {edge_dim}; got {tuple(fill.shape)}")
        super().__init__()
        made = factory(device, dtype)
        self.num_heads, self.concat = num_heads, concat
        self.activation, self.dropout = activation, check_dropout("dropout", dropout)
        self.negative_slope = check_slope(negative_slope)
        self.self_loops = self_loops
        if isinstance(fill, Tensor):
            self.register_buffer("fill", fill.to(**made), persistent=False)
        else:
            self.fill = fill
        width = num_heads * head_dim
        self.key_proj = nn.Linear(key_dim, width, bias=bias, **made)
        if not share_weights:
            self._modules["query_proj"] = nn.Linear(query_dim, width, bias=bias, **made)
        self.edge_proj = None if edge_dim is None else nn.Linear(edge_dim, width, bias=False, **made)
        self.score = nn.Linear(head_dim, num_heads, bias=False, **made)
        total = width if concat else head_dim
        self.residual_proj = nn.Linear(query_dim, total, bias=False, **made) if residual else None
        self.bias = nn.Parameter(torch.zeros(total, **made)) if bias else None

    @property
    def query_proj(self) -> nn.Linear:
        """The projection of the queries: `key_proj` where they share weights.

        Then it is a module under one name: `torch.func.functional_call` does not restore one that has two.
        """
        return cast("nn.Linear", self._modules.get("query_proj", self.key_proj))

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as the constructor does."""
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @explicit
    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        indptr: Tensor | Graph,
        indices: Tensor | None = None,
        *,
        edge: Tensor | None = None,
        transposed: Transposed | None = None,
        return_weights: bool = False,
        return_log_weights: bool = False,
        return_scores: bool = False,
        return_lse: bool = False,
        impl: Impl = "auto",
    ) -> Tensor | tuple[Tensor, ...]:
        """Attend from each node to its neighbours.

        Parameters
        ----------
        x
            Nodes ``(N, query_dim)``; or a pair, the query nodes ``(Nq, query_dim)`` and the key nodes
            ``(Nk, key_dim)``. Those without edges may be NaN, but with a residual; it costs a copy of the nodes.
        indptr, indices, transposed, return_weights, return_log_weights, return_scores, return_lse, impl
            As in `graph_attention`. A state is returned there alone: what follows the heads here is of a whole.
        edge
            Edge features ``(E, edge_dim)`` in the order of `indices` or of the list of edges, where there is an
            `edge_dim`. Those of self loops that `self_loops` takes the place of are not read.

        Returns
        -------
        Tensor or tuple
            Output ``(Nq, H * head_dim)``, or ``(Nq, head_dim)`` of the mean; weights, log weights and scores
            ``(E, H)``; lse ``(Nq, H)``. With `self_loops` E is that of `add_self_loops`: the edges between nodes in
            their order, and then those of the N nodes to themselves.

        Raises
        ------
        ValueError, TypeError
            As in `graph_attention`; also for nodes and edges of other widths, dtypes or devices than the parameters'.

        """
        if isinstance(x, tuple) and len(x) != 2:
            raise ValueError(f"x: expected nodes, or a pair of query nodes and key nodes; got a tuple of {len(x)}")
        query, key = x if isinstance(x, tuple) else (x, x)
        check = module_checker(
            _INPUTS,
            weight_of(self.key_proj),
            query_dim=width_of(self.query_proj),
            key_dim=width_of(self.key_proj),
            edge_dim=width_of(self.edge_proj),
        )
        check("x[0]" if isinstance(x, tuple) else "x", query)
        if isinstance(x, tuple) or width_of(self.query_proj) != width_of(self.key_proj):
            check("x[1]", key)
        if (edge is None) != (self.edge_proj is None):
            expected = "None, since edge_dim is None" if self.edge_proj is None else "a tensor, by edge_dim"
            raise ValueError(f"edge: expected {expected}; got {'None' if edge is None else 'a tensor'}")
        check.bind("Nq+1", query.shape[0] + 1, "x")
        if self.self_loops:
            indptr, edge = self._with_loops(check, x, indptr, indices, transposed, edge)
        structure = (indptr, indices)
        indptr, indices, *_ = csr_of(indptr, indices, transposed, query, key)
        check("indices", indices)
        check("indptr", indptr)
        check("edge", edge)

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(1, (self.num_heads, -1))

        same, nodes = query is key and self.query_proj is self.key_proj, query
        query, key = _reached(query, key, indptr, indices)
        keys = heads(self.key_proj(key))
        results = graph_attention(
            keys if same else heads(self.query_proj(query)),
            keys,
            read("score", self.score).weight,
            *structure,
            edge=None if edge is None or self.edge_proj is None else heads(self.edge_proj(edge)),
            activation=self.activation,
            negative_slope=self.negative_slope,
            dropout_p=self._dropout_p,
            transposed=transposed,
            return_weights=return_weights,
            return_log_weights=return_log_weights,
            return_scores=return_scores,
            return_lse=return_lse,
            impl=impl,
        )
        out, *more = results if isinstance(results, tuple) else (results,)
        out = out.flatten(1) if self.concat else out.mean(1)
        out = out if self.residual_proj is None else out + self.residual_proj(nodes)
        out = out if self.bias is None else out + self.bias.to(out.dtype)
        return (out, *more) if more else out

    def _with_loops(
        self,
        check: Checker,
        x: Tensor | tuple[Tensor, Tensor],
        edge_index: Tensor | Graph,
        indices: Tensor | None,
        transposed: Transposed | None,
        edge: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The list of edges with those of nodes to themselves, and the features of all."""
        if isinstance(x, tuple):
            raise ValueError("x: expected nodes of one kind with self_loops; got a pair")
        if isinstance(edge_index, Graph):
            raise TypeError(
                "indptr: expected an edge_index (2, E) with self_loops; got Graph: make that of what add_self_loops "
                "makes, for a module without self_loops"
            )
        for name, given in (("indices", indices), ("transposed", transposed)):
            if given is not None:
                raise TypeError(f"{name}: expected None with self_loops; got {type(given).__name__}")
        check_edge_index(edge_index)
        check("edge_index", edge_index[0], "indices")
        check("edge", edge)
        loops = loops_of(edge_index, x.shape[0])
        check.bind("E", loops.edge_index.shape[1], "edge_index")
        return loops.edge_index, None if edge is None else loops.features(edge, self.fill)

    def extra_repr(self) -> str:
        """What the layers do not show."""
        return (
            f"num_heads={self.num_heads}, concat={self.concat}, share_weights={self.query_proj is self.key_proj}, "
            f"activation={self.activation!r}, dropout={self.dropout}"
            f"{'' if self.negative_slope == 0.2 else f', negative_slope={self.negative_slope}'}"
            f"{', self_loops=True' if self.self_loops else ''}"
            f"{'' if isinstance(self.fill, str) and self.fill == 'mean' else f', fill={self.fill}'}"
        )


def _reached(query: Tensor, key: Tensor, indptr: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The nodes, with zeros for those without edges: they may be NaN, and 0 · NaN would be in the gradient of W."""
    target = indptr.diff() > 0
    source = torch.zeros(key.shape[0], dtype=torch.bool, device=key.device)
    if key.shape[0]:  # values out of range are told by the operator
        source = source.index_fill(0, indices.long().clamp(0, key.shape[0] - 1), True)
    if query is key:
        rows = key.masked_fill(~(target | source)[:, None], 0)
        return rows, rows
    return query.masked_fill(~target[:, None], 0), key.masked_fill(~source[:, None], 0)
