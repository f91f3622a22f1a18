"""Graph attention (GATv2): each node attends to its neighbours, which come in CSR, by the concat score."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import reference
from ._checks import (
    Checker,
    Table,
    argument,
    check_activation,
    check_count,
    check_dropout,
    check_indices,
    check_number,
    check_offsets,
    check_tensor,
    check_values,
    know,
)
from ._dropout import draw_seed
from ._habits import explicit
from ._made_once import made_once
from ._operators import Operator, exact_of, launcher
from ._ops import Impl, exports_from_one, keeps_exact, under_autocast, use_triton, weights_from
from ._results import by_formula, check_wanted, returned
from ._tracing import can_look
from .kernels.inputs import GraphInputs

Transposed = tuple[Tensor, Tensor, Tensor]

_INDEX = (torch.int32, torch.int64)


def _table(h: str) -> Table:
    return {
        "query": argument("Nq A | Nq H A", "first"),
        "key": argument(f"Nk {h} A"),
        "v": argument("A | H A" if h else "A", linear=True),
        "value": argument(f"Nk {h} Dv", optional=True),
        "edge": argument(f"E {h} A", optional=True, hint="in the order of indices"),
        "indptr": argument("Nq+1", "index"),
        "indices": argument("E", "index"),
        "transposed[0]": argument("Nk+1", "index"),
        "transposed[1]": argument("E", "index"),
        "transposed[2]": argument("E", "index"),
    }


_TABLES = {heads: _table("H" if heads else "") for heads in (False, True)}


# Of `add_self_loops`, by PyTorch's names, and what it is of no edges.
FILLS = {"mean": ("mean", 0), "add": ("sum", 0), "min": ("amin", 0), "max": ("amax", 0), "mul": ("prod", 1)}
Fill = float | str | Tensor


def check_edge_index(edge_index: Tensor) -> None:
    """ValueError for another shape than that of a list of edges, TypeError for another dtype."""
    check_tensor("edge_index", edge_index, shapes=[("(2, E)", (2, None))], dtypes=_INDEX)


def csr_from_edges(edge_index: Tensor, num_queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """CSR of a list of edges, as `graph_attention` takes it.

    Parameters
    ----------
    edge_index
        int32 or int64 ``(2, E)``: the source (key node) and the target (query node) of each edge, as PyTorch
        Geometric has it.
    num_queries
        Number Nq of query nodes.

    Returns
    -------
    (Tensor, Tensor, Tensor)
        ``indptr (Nq + 1,)`` and ``indices (E,)``, in the dtype of `edge_index`, and the int64 permutation ``(E,)``
        that sorts the edges by target, equal ones in their order: edge features go with it, ``features[perm]``.

    Raises
    ------
    TypeError, ValueError
        For dtype and shape, for negative sources and for targets outside ``[0, Nq)``; on a GPU these stop the
        program, as in `graph_attention`.

    """
    check_edge_index(edge_index)
    num_queries = check_count("num_queries", num_queries)
    source, target = edge_index.unbind()
    check_values("edge_index[0]", source, (source >= 0).all(), "non-negative indices of key nodes")
    check_indices("edge_index[1]", target, num_queries, "query nodes")
    perm = torch.argsort(target, stable=True)
    nodes = torch.arange(num_queries + 1, device=target.device, dtype=target.dtype)
    return torch.searchsorted(target[perm], nodes).to(target.dtype), source[perm], perm


def add_self_loops(
    edge_index: Tensor, num_nodes: int, edge: Tensor | None = None, *, fill: Fill = "mean"
) -> tuple[Tensor, Tensor | None]:
    """An edge from every node to itself, in place of those that there are, as PyG's ``GATv2Conv`` adds it.

    Parameters
    ----------
    edge_index
        int32 or int64 ``(2, E)``: sources and targets.
    num_nodes
        Number N of nodes.
    edge
        Edge features ``(E, ...)``, or None.
    fill
        The features of the new edges: a number; a tensor, those of one edge, ``(...)`` or ``(1, ...)``; or "mean",
        "add", "min", "max" or "mul" of those of the edges that lead to the node from others, where there are none
        zeros, of "mul" ones.

    Returns
    -------
    (Tensor, Tensor or None)
        The edges between nodes in their order, and then those of nodes to themselves: ``(2, E')``; their features.

    Raises
    ------
    TypeError, ValueError
        For dtypes, shapes, and nodes outside ``[0, N)``; on a GPU these stop the program.

    """
    check_edge_index(edge_index)
    loops = _loops(edge_index, check_count("num_nodes", num_nodes))
    fill = check_fill("fill", fill)
    if edge is None:
        return loops.edge_index, None
    if not isinstance(edge, Tensor):
        raise TypeError(f"edge: expected a torch.Tensor; got {type(edge).__name__}")
    count = edge_index.shape[1]
    if edge.dim() == 0 or len(edge) != count:
        raise ValueError(f"edge: expected (E, ...) with E = {count} from edge_index; got {tuple(edge.shape)}")
    return loops.edge_index, loops.features(edge, fill)


def check_fill(name: str, fill: Fill) -> Fill:
    """The features of new edges, a number as a float; ValueError or TypeError for what are none."""
    if isinstance(fill, Tensor):
        return fill
    if isinstance(fill, str):
        if fill not in FILLS:
            raise ValueError(f"{name}: expected a number, a tensor or one of {', '.join(FILLS)}; got {fill!r}")
        return fill
    return check_number(name, fill, "a finite number", -sys.float_info.max, math.inf)


class _Loops(NamedTuple):
    """A list of edges with one from every node to itself."""

    edge_index: Tensor  # (2, E'): the edges between nodes in their order, then the loops
    kept: Tensor | None  # those between nodes among the edges that were given; None: all are
    num_nodes: int

    def features(self, edge: Tensor, fill: Fill) -> Tensor:
        """Of all edges, of the features of those that were given."""
        edge = edge if self.kept is None else edge.index_select(0, self.kept)
        nodes, one = self.num_nodes, edge.shape[1:]
        if isinstance(fill, str):
            reduce, none = FILLS[fill]
            target = self.edge_index[1, : len(edge)].long().view(-1, *[1] * len(one)).expand_as(edge)
            loops = edge.new_full((nodes, *one), none)
            loops = loops.scatter_reduce(0, target, edge, reduce, include_self=False)
        elif isinstance(fill, Tensor):
            if fill.shape not in (one, (1, *one)):
                raise ValueError(
                    f"fill: expected the features of one edge, {tuple(one)}, from edge; got {tuple(fill.shape)}"
                )
            loops = fill.to(edge).expand(nodes, *one)
        else:
            loops = edge.new_full((nodes, *one), fill)
        return torch.cat([edge, loops])


def _loops(edge_index: Tensor, num_nodes: int, ends: tuple[int, int] | None = None) -> _Loops:
    for i, nodes in enumerate(edge_index):
        check_indices(f"edge_index[{i}]", nodes, num_nodes if ends is None else ends[i], "nodes")
    kept = (edge_index[0] != edge_index[1]).nonzero()[:, 0]
    nodes = torch.arange(num_nodes, dtype=edge_index.dtype, device=edge_index.device)
    both = torch.cat([edge_index.index_select(1, kept), nodes.expand(2, -1)], 1)
    return _Loops(both, None if len(kept) == edge_index.shape[1] else kept, num_nodes)


def transpose_csr(indptr: Tensor, indices: Tensor, num_keys: int) -> Transposed:
    """The edges sorted by source: what the backward of `graph_attention` walks. A static graph makes it once.

    Parameters
    ----------
    indptr, indices
        As in `graph_attention`.
    num_keys
        Number Nk of key nodes.

    Returns
    -------
    (Tensor, Tensor, Tensor)
        The transposed structure, ``indptr (Nk + 1,)`` and ``indices (E,)`` of query nodes, and the int64 permutation
        ``(E,)``: where each of its edges is among those of `indices`.

    Raises
    ------
    TypeError, ValueError
        As in `graph_attention`.

    """
    return _transpose(indptr, indices, _check_structure(indptr, indices, num_keys))


def _check_structure(indptr: Tensor, indices: Tensor, num_keys: int) -> int:
    num_keys = check_count("num_keys", num_keys)
    check = Checker(_TABLES[False])
    check("indices", indices)
    check.follow("indices", torch.float32, indices.device)
    check("indptr", indptr)
    _check_csr(("indptr", "indices"), indptr, indices, num_keys, "key nodes")
    return num_keys


def _degree_limit(indptr: Tensor, indices: Tensor, num_keys: int, given: int | None) -> int | None:
    """A power of two that no node's edges exceed, `given` if it is; None where it cannot be looked for."""
    if given is None:
        if not (can_look(indptr) and can_look(indices)):
            return None
        most = int(_most_edges(indptr, indices, num_keys))
    else:
        most = check_count("max_degree", given)
        degree = _most_edges(indptr, indices, num_keys)
        check_values("max_degree", degree, degree <= most, f"no node of more edges than {most}")
    return 1 << max(most - 1, 0).bit_length()


def _most_edges(indptr: Tensor, indices: Tensor, num_keys: int) -> Tensor:
    """The most edges that a node has, query or key: of zero dimensions."""
    of_keys = indices.new_zeros(num_keys + 1).scatter_add(0, indices.long(), torch.ones_like(indices))
    return torch.maximum(of_keys.max(), torch.cat([indptr.diff(), indptr[:1]]).max())


def _transpose(indptr: Tensor, indices: Tensor, num_keys: int) -> Transposed:
    """`transpose_csr` without its checks: for the backward, whose arguments were checked before."""
    perm = torch.argsort(indices, stable=True)
    nodes = torch.arange(num_keys + 1, device=indices.device, dtype=indices.dtype)
    indptr_t = torch.searchsorted(indices[perm], nodes).to(indices.dtype)
    return indptr_t, reference.segment_ids(indptr, indices.shape[0])[perm].to(indices.dtype), perm


@dataclass(eq=False)
class Graph:
    """A graph in CSR, for `graph_attention` in place of ``indptr``, ``indices`` and ``transposed``.

    Its values are checked when it is made, not at each call; its transpose, which the backward walks, is made when a
    gradient first asks for it, and kept. A pytree: `torch.compile`, `torch.export` and `vmap` carry it.

    Attributes
    ----------
    indptr, indices
        As in `graph_attention`: int32 or int64 ``(Nq + 1,)`` and ``(E,)``.
    num_keys
        Number Nk of key nodes.
    transposed
        What `transpose_csr` makes of them, or None as long as nothing asked for it.
    max_degree
        No node, of either kind, has more edges; None where nobody knows. It is a power of two, so that graphs of a
        kind are one to `torch.compile`. Where it is at most 256 no node is divided among programs, and a call starts
        a kernel fewer on a GPU, its backward one fewer.

    """

    indptr: Tensor
    indices: Tensor
    num_keys: int
    transposed: Transposed | None = None
    max_degree: int | None = None

    @classmethod
    def from_csr(cls, indptr: Tensor, indices: Tensor, num_keys: int, *, max_degree: int | None = None) -> Graph:
        """Of the edges sorted by query node; both tensors are copied.

        max_degree: the most edges that a node has, query or key, or any number above. None: it is counted on a CPU,
        and stays unknown on a GPU, which would have to be waited for; a graph that is made on a CPU and then moved by
        `to` keeps it.

        Raises
        ------
        TypeError, ValueError
            As in `transpose_csr`, and for a `max_degree` that a node exceeds (on a GPU that stops the program).

        """
        num_keys = _check_structure(indptr, indices, num_keys)
        max_degree = _degree_limit(indptr, indices, num_keys, max_degree)
        with torch.inference_mode(False):
            pointers = know(indptr.clone(), "offsets", indices.shape[0])
            return cls(pointers, know(indices.clone(), "indices", num_keys), num_keys, max_degree=max_degree)

    @classmethod
    def from_edges(
        cls, edge_index: Tensor, num_queries: int, num_keys: int, *, max_degree: int | None = None
    ) -> tuple[Graph, Tensor]:
        """Of a list of edges ``(2, E)``, see `csr_from_edges`; also the order in which that puts the edges.

        max_degree: as in `from_csr`.

        Raises
        ------
        TypeError, ValueError
            As in `csr_from_edges` and `from_csr`.

        """
        indptr, indices, order = csr_from_edges(edge_index, num_queries)
        return cls.from_csr(indptr, indices, num_keys, max_degree=max_degree), order

    def to(self, device: torch.device | str) -> Graph:
        """On another device."""
        with torch.inference_mode(False):
            indptr, indices = self.indptr.to(device), self.indices.to(device)
            transposed = None if self.transposed is None else tuple(x.to(device) for x in self.transposed)
        if indptr is self.indptr:
            return self
        know(indptr, "offsets", indices.shape[0])
        know(indices, "indices", self.num_keys)
        return Graph(indptr, indices, self.num_keys, cast("Transposed | None", transposed), self.max_degree)

    def transpose(self) -> Transposed:
        """``transposed``, made if need be."""
        if self.transposed is None:
            self.transposed = _transpose(self.indptr, self.indices, self.num_keys)
        return self.transposed


torch.export.register_dataclass(Graph, serialized_type_name="fused_attn.Graph")


class _Edges(NamedTuple):
    """A list of edges as a graph."""

    graph: Graph
    order: Tensor  # (E,): the edges in the graph's order
    place: Tensor  # (E,): where in that order each of the edges is


_MADE: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By list of edges: its version, Nq and Nk, and what `edges_of` made; as long as the list lives."""
_LOOPED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By list of edges: its version, N, and what `loops_of` made; as long as the list lives."""


def edges_of(edge_index: Tensor, num_queries: int, num_keys: int) -> _Edges:
    """The graph of a list of edges: made once for a tensor that nobody writes to."""

    def make() -> _Edges:
        check_edge_index(edge_index)
        check_indices("edge_index[0]", edge_index[0], num_keys, "key nodes")
        graph, order = Graph.from_edges(edge_index, num_queries, num_keys)
        return _Edges(graph, order.clone(), torch.argsort(order))

    return made_once(_MADE, edge_index, (num_queries, num_keys), make)


def loops_of(edge_index: Tensor, num_nodes: int, ends: tuple[int, int] | None = None) -> _Loops:
    """A list of edges with one from every node to itself: made once for a tensor that nobody writes to.

    ends: numbers of key and query nodes, where they are of two kinds, of which the first `num_nodes` get such edges.
    """

    def make() -> _Loops:
        check_edge_index(edge_index)
        return _loops(edge_index, num_nodes, ends)

    return made_once(_LOOPED, edge_index, (num_nodes, *(ends or ())), make)


def _fake(inputs: GraphInputs, need_exact: bool) -> tuple[Tensor, ...]:
    query, key, _, value, _, _, indices, *_ = inputs
    nodes, heads, _ = query.shape
    value = key if value is None else value
    shape = nodes, heads, value.shape[-1]
    return (
        query.new_empty(shape),
        query.new_empty(nodes, heads, 2, dtype=torch.float32),
        query.new_empty(indices.shape[0], heads, dtype=torch.float32),
        query.new_empty(shape if need_exact else (0,), dtype=torch.float32),
    )


def _bwd(inputs: GraphInputs, *args: Any) -> list[Tensor | None]:
    out, lse, scores, exact, dout, dlse, dscores, _, _, needs = args
    if (needs[1] or needs[3]) and inputs.perm is None:
        made = _transpose(inputs.indptr, inputs.indices, inputs.key.shape[0])
        inputs = inputs._replace(indptr_t=made[0], indices_t=made[1], perm=made[2])
    saved = exact_of(out, exact), lse, scores
    return cast("list[Tensor | None]", launcher("graph_bwd.graph_bwd")(inputs, *saved, dout, dlse, dscores, needs))


_GRAPH = Operator(
    "graph",
    GraphInputs,
    differentiable="query key v value edge",
    choices="bool need_exact",
    results="out lse scores exact?need_exact",
    saved="out lse scores exact",
    forward=launcher("graph.graph_fwd"),
    backward=_bwd,
    fake=_fake,
    formula=reference.graph_attention,
)


@explicit
@exports_from_one
@under_autocast("query", "key", "v", "value", "edge")
def graph_attention(
    query: Tensor,
    key: Tensor,
    v: Tensor,
    indptr: Tensor | Graph,
    indices: Tensor | None = None,
    *,
    value: Tensor | None = None,
    edge: Tensor | None = None,
    activation: str = "leaky_relu",
    negative_slope: float = 0.2,
    dropout_p: float = 0.0,
    transposed: Transposed | None = None,
    return_weights: bool = False,
    return_log_weights: bool = False,
    return_scores: bool = False,
    return_lse: bool = False,
    return_state: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Any, ...]:
    r"""Graph attention (GATv2) of projected nodes over their neighbours, given in CSR.

    .. math:: s_e = v \cdot act(q_i + k_j + edge_e), \quad o_i = \sum_e softmax_e(s_e) \, value_j
        \quad over \quad indptr_i <= e < indptr_{i+1}, \quad j = indices_e

    A node without neighbours gives zeros, zero weights and zero gradients. Several edges between two nodes, and edges
    from a node to itself, are edges like others; none is added.

    Parameters
    ----------
    query, key
        Projected to the width A of the score: ``(Nq, A)`` and ``(Nk, A)``, or with heads ``(Nq, H, A)`` and
        ``(Nk, H, A)``. For a graph whose nodes are of one kind Nq = Nk. float16, bfloat16, float32; float64 on a CPU
        or by the reference.
    v
        ``(A,)``, or with heads ``(H, A)``.
    indptr, indices
        int32 or int64 ``(Nq + 1,)`` and ``(E,)``: the neighbours of node i are the rows
        ``indices[indptr[i] : indptr[i + 1]]`` of `key`. `csr_from_edges` makes them of a list of edges. Or, for both,
        a `Graph`, which was checked when it was made; or a list of edges ``(2, E)``, sources and targets, as PyTorch
        Geometric has it, whose `Graph` is made once and kept as long as that tensor lives and nobody writes to it.
    value
        ``(Nk, Dv)``, or ``(Nk, H, Dv)``. None: the projected keys, as GATv2 has it, of which the kernel then loads a
        row once for both uses (up to a width of 256).
    edge
        Projected edge features, ``(E, A)`` or ``(E, H, A)``, in the order of `indices`, or of the list of edges (they
        are copied then): added before the activation.
    activation
        identity, tanh, relu, sigmoid, leaky_relu, elu, gelu or silu.
    negative_slope
        Of leaky_relu, below 0. Each is a kernel of its own.
    dropout_p
        Probability that a weight is dropped, 0 <= p < 1; it always applies. See `location_attention`.
    transposed
        What `transpose_csr` makes of these very `indptr` and `indices`, ``(Nk + 1,)``, ``(E,)`` and ``(E,)``, for the
        kernel's gradients of key and value. None: the backward makes it, which sorts the edges; a static graph does
        better to make it once.
    return_weights
        Return the weights too, as they are before dropout. They are differentiable.
    return_log_weights, return_scores, return_lse, return_state
        See `location_attention`: the first two of edges, the others of nodes. `merge` joins states over disjoint
        edges.
    impl
        ``"auto"``: the Triton kernel on a GPU (the reference for float64), elsewhere the reference, which stores
        E·H·A. ``"triton"`` and ``"reference"`` never fall back.

    Returns
    -------
    Tensor, State or tuple
        Output ``(Nq, Dv)`` or ``(Nq, H, Dv)``; weights, log weights and scores ``(E,)`` or ``(E, H)``, in the order
        of `indices`, or of the list of edges; m, log_l and lse ``(Nq,)`` or ``(Nq, H)``.

    Raises
    ------
    ValueError
        For shapes and values that do not fit, and for an `impl` that cannot run here. Values in `indptr`, `indices`
        and `transposed` out of range raise on a CPU; on a GPU, and in a compiled graph, they stop the program with an
        assertion; so it is with a `transposed` of another graph.
    TypeError
        For dtypes.

    References
    ----------
    Brody, Alon, Yahav 2022: How Attentive are Graph Attention Networks? (GATv2).

    """
    if not isinstance(query, Tensor):
        raise TypeError(f"query: expected a torch.Tensor; got {type(query).__name__}")
    wanted = check_wanted(return_weights, return_scores, return_lse, return_state, return_log_weights)
    negative_slope = check_slope(negative_slope)
    indptr, indices, graph, edges = csr_of(indptr, indices, transposed, query, key)
    if graph is not None and graph.num_keys != key.shape[0]:
        raise ValueError(f"indptr: expected a Graph of Nk = {key.shape[0]} key nodes, from key; got {graph.num_keys}")
    _validate_graph(query, key, v, indptr, indices, value, edge, activation, dropout_p, transposed)
    kernel = use_triton(impl, query.device, "has no float64" if query.dtype == torch.float64 else None)
    heads = query.dim() == 3
    if edges is not None and edge is not None:
        edge = edge[edges.order]
    if activation == "leaky_relu" and negative_slope != 0.2:
        activation = f"leaky_relu:{negative_slope!r}"
    seed = draw_seed(dropout_p, query.device)
    rows = (x if x is None or heads else x.unsqueeze(1) for x in (query, key))
    more = (x if x is None or heads else x.unsqueeze(1) for x in (value, edge))
    v = v.expand(query.shape[1], -1) if heads and v.dim() == 1 else v if heads else v[None]
    if graph is not None:
        transposed = graph.transpose() if kernel and torch.is_grad_enabled() else None
    structure = (indptr, indices, *(transposed or (None, None, None)))
    max_degree = None if graph is None else graph.max_degree
    inputs = GraphInputs(*rows, v, *more, *structure, seed, activation, float(dropout_p), max_degree)
    weights: Tensor | None = None
    if kernel:
        out, lse, scores, exact = _GRAPH(inputs, keeps_exact(*inputs[:5], state=wanted.state))
        out = wanted.output_of(out, exact)
    else:
        out, lse, scores, weights = by_formula(_GRAPH.formula, inputs, wanted)
    if wanted.weights and weights is None:
        weights = weights_from(scores, lse, offsets=indptr)
    log_weights = weights_from(scores, lse, offsets=indptr, log=True) if wanted.log_weights else None

    def in_order(x: Tensor) -> Tensor:
        """A number an edge and head, in the order of the edges that were given."""
        x = x if edges is None else x[edges.place]
        return x if heads else x.squeeze(1)

    return returned(
        wanted,
        key.dtype,
        out if heads else out.squeeze(1),
        lse if lse is None or heads else lse.squeeze(1),
        in_order(weights) if wanted.weights and weights is not None else None,
        in_order(scores) if wanted.scores else None,
        None if log_weights is None else in_order(log_weights),
    )


def check_slope(value: float) -> float:
    """The slope of leaky_relu as a float; ValueError for one that is not finite, TypeError for no number."""
    return check_number("negative_slope", value, "a finite number", -sys.float_info.max, math.inf)


def csr_of(
    indptr: Tensor | Graph, indices: Tensor | None, transposed: Transposed | None, query: Tensor, key: Tensor
) -> tuple[Tensor, Tensor, Graph | None, _Edges | None]:
    """(indptr, indices, the `Graph` that they are of, the list of edges that this is of)."""
    edges = None
    if isinstance(indptr, tuple) and len(indptr) == 2 and isinstance(indptr[0], Graph):
        raise TypeError(
            "indptr: expected a Graph; got a pair: of (graph, order), as from_edges has it, pass the first"
        )
    if not isinstance(indptr, Graph) and (indices is not None or not isinstance(indptr, Tensor)):
        return indptr, indices, None, None
    if not isinstance(key, Tensor) or 0 in (query.dim(), key.dim()):  # before their rows are counted
        check = Checker(_TABLES[query.dim() == 3])
        check("query", query)
        check("key", key)
    if not isinstance(indptr, Graph):
        if indptr.dim() != 2:
            raise TypeError(
                "indices: expected a torch.Tensor beside indptr, or None beside a Graph or an edge_index (2, E); "
                f"got None beside {tuple(indptr.shape)}"
            )
        edges = edges_of(indptr, query.shape[0], key.shape[0])
        indptr = edges.graph
    for name, x in (("indices", indices), ("transposed", transposed)):
        if x is not None:
            raise TypeError(f"{name}: expected None beside a Graph or an edge_index; got {type(x).__name__}")
    return indptr.indptr, indptr.indices, indptr, edges


def _check_csr(names: tuple[str, str], indptr: Tensor, indices: Tensor, columns: int, of: str) -> None:
    """Check the values of a structure that has so many columns; of: what they are."""
    check_offsets(names[0], indptr, indices.shape[0], "edges")
    check_indices(names[1], indices, columns, of)


def _check_transposed(indptr: Tensor, indices: Tensor, transposed: Transposed) -> None:
    """Check that a structure, good by itself, is this one transposed: each edge once, from its key to its query.

    It costs a few passes over the edges, where making the structure sorts them.
    """
    indptr_t, indices_t, perm = transposed
    edges = indices.shape[0]
    once = torch.zeros(edges, dtype=torch.bool, device=perm.device).scatter(0, perm.long(), True)
    check_values(
        "transposed[2]", perm, once.all(), "a permutation, of every edge once, of the number of edges", edges
    )
    keys, queries = (reference.segment_ids(x, edges) for x in (indptr_t, indptr))
    what = "what transpose_csr makes of indptr and indices, it is that of another graph"
    check_values("transposed[0]", indptr_t, (indices[perm] == keys).all(), what)
    check_values("transposed[1]", indices_t, (queries[perm] == indices_t).all(), what)


def _validate_graph(
    query: Tensor,
    key: Tensor,
    v: Tensor,
    indptr: Tensor,
    indices: Tensor,
    value: Tensor | None,
    edge: Tensor | None,
    activation: str,
    dropout_p: float,
    transposed: Transposed | None,
) -> None:
    """Check every argument."""
    check = Checker(_TABLES[query.dim() == 3])
    for name, x in (("query", query), ("key", key), ("v", v), ("value", value)):
        check(name, x)
    check_activation("activation", activation)
    check_dropout("dropout_p", dropout_p)
    check.bind("Nq+1", query.shape[0] + 1, "query")
    check("indices", indices)
    check("indptr", indptr)
    _check_csr(("indptr", "indices"), indptr, indices, key.shape[0], "key nodes")
    check("edge", edge)
    if transposed is not None:
        if not isinstance(transposed, tuple) or len(transposed) != 3:
            raise TypeError(
                f"transposed: expected the three tensors of transpose_csr; got {type(transposed).__name__}"
            )
        check.bind("Nk+1", key.shape[0] + 1, "key")
        for i, x in enumerate(transposed):
            check(f"transposed[{i}]", x)
        _check_csr(("transposed[0]", "transposed[1]"), *transposed[:2], query.shape[0], "query nodes")
        check_indices("transposed[2]", transposed[2], indices.shape[0], "edges")
        _check_transposed(indptr, indices, transposed)
