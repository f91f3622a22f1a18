"""Inputs of the graph family for its test files."""

import functools
import math
from dataclasses import dataclass

import _pairwise
import torch
from _compare import Operator, assert_matches_reference
from torch import Tensor

from fused_attn import csr_from_edges, graph_attention, transpose_csr

TENSORS = ("query", "key", "v", "value", "edge")


def operator(**options) -> Operator:
    """`graph_attention` as the comparator wants it; the options are fixed."""

    def op(*, impl: str, query: Tensor, key: Tensor, v: Tensor, indptr: Tensor, indices: Tensor, **rest):
        parts = [rest.pop(name) for name in ("indptr_t", "indices_t", "perm") if name in rest]
        more = {"transposed": tuple(parts)} if parts else {}
        return graph_attention(query, key, v, indptr, indices, **rest, **more, **options, impl=impl)

    return op


@dataclass(frozen=True)
class Case(_pairwise.Factors):
    """One call: the values of the factors that the tests vary."""

    dtype: torch.dtype = torch.float32
    queries: int = 4
    keys: int = 5
    edges: int = 14
    attn_dim: int = 7
    value_dim: int | None = 5  # None: the values are the keys
    heads: int | None = 2
    v_heads: bool = True  # with heads, v is (H, A)
    edge: bool = True  # edge features
    activation: str = "leaky_relu"
    graph: str = "random"  # random (nodes without edges), hub (one node has them all) or multi (one source)
    index: torch.dtype = torch.int64
    static: bool = False  # the transposed structure is given
    layout: str = "contiguous"  # contiguous, transposed, strided (the last axis) or expanded (heads)
    dropout_p: float = 0.0
    return_weights: bool = True

    @property
    def op(self) -> Operator:
        return operator(activation=self.activation, dropout_p=self.dropout_p, return_weights=self.return_weights)

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """Random inputs by name; the same on every device."""
        rng = torch.Generator().manual_seed(1)
        heads = () if self.heads is None else (self.heads,)

        def rows(count: int, width: int) -> Tensor:
            return self._laid_out(torch.randn(count, *heads, width, generator=rng).to(device, self.dtype))

        made = {"query": rows(self.queries, self.attn_dim), "key": rows(self.keys, self.attn_dim)}
        v = torch.randn(*(heads if self.v_heads else ()), self.attn_dim, generator=rng)
        made["v"] = (v / math.sqrt(self.attn_dim)).to(device, self.dtype)
        if self.value_dim is not None:
            made["value"] = rows(self.keys, self.value_dim)
        if self.edge:
            made["edge"] = rows(self.edges, self.attn_dim)
        # The first query node and the last key node have no edge, where there are others.
        source = torch.randint(0, max(self.keys - 1, 1), (self.edges,), generator=rng)
        target = torch.randint(min(1, self.queries - 1), max(self.queries, 1), (self.edges,), generator=rng)
        if self.graph == "hub":
            target[:] = self.queries - 1
        if self.graph == "multi":
            source[:] = 0
        index = torch.stack([source, target]).to(device, self.index)
        made["indptr"], made["indices"], _ = csr_from_edges(index, self.queries)
        if self.static:
            parts = transpose_csr(made["indptr"], made["indices"], self.keys)
            made |= dict(zip(("indptr_t", "indices_t", "perm"), parts, strict=True))
        return made

    def _laid_out(self, x: Tensor) -> Tensor:
        if self.layout == "strided":
            return torch.stack([x, x], -1)[..., 0]
        if self.layout == "transposed":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if self.layout == "expanded" and x.dim() == 3:
            return x[:, :1].expand_as(x)
        return x


pairwise = functools.partial(_pairwise.pairwise, make=Case)


def check(case: Case, device: torch.device, **options) -> None:
    """The kernel against the reference; the options are those of `evaluate`."""
    assert_matches_reference(case.op, case.tensors(device), dtype=case.dtype, **options)


def formula(*, impl, query, key, v, indptr, indices, value=None, edge=None, act=None, **structure):
    """Node by node: the oracle, which calls nothing of the package. act: leaky_relu where None."""
    value = key if value is None else value
    heads, act = query.shape[1], torch.nn.LeakyReLU(0.2) if act is None else act
    out, weights = [], [query.new_zeros(0, heads)]
    for i, (lo, hi) in enumerate(zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True)):
        j = indices[lo:hi].long()
        z = query[i] + key[j] + (0 if edge is None else edge[lo:hi])
        alpha = (v * act(z)).sum(-1).softmax(0)
        out.append((alpha[..., None] * value[j]).sum(0))
        weights.append(alpha)
    return torch.stack(out), torch.cat(weights)
