"""What the operator of a family takes, its tensors first and then its options: the same for every implementation.

Shapes: B sequences of T rows, or N packed rows of S sequences where there are offsets; H heads, R hops, A the width
of a score, Dv that of the values. What each is for says the function of the same name in `fused_attn.reference`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SPREAD = 1e-6
"""Of 1 - c Σα², by which a variance is divided: at most so much, but for its rounding a frame has all the weight."""


def features_dtype(dtype: torch.dtype, *activations: str) -> torch.dtype:
    """What holds the features of a score: float16 has no room for them past 65,504."""
    unbounded = dtype == torch.float16 and any(name not in ("tanh", "sigmoid") for name in activations)
    return torch.float32 if unbounded else dtype


class LocationInputs(NamedTuple):
    """Of location attention."""

    h: Tensor  # (B, T, D) or (N, D)
    w: Tensor | None  # (D, A); None leaves the product out
    b: Tensor | None  # (A,)
    v: Tensor | None  # (A, R); None: A = R
    gate_w: Tensor | None  # (D, A)
    gate_b: Tensor | None  # (A,)
    context: Tensor | None  # (S, A), or a vector a row: see context_per_row
    value: Tensor | None  # (B, T, Dv) or (N, Dv); None: h
    score_bias: Tensor | None  # (B, T) or (N,)
    mask: Tensor | None  # bool (B, T) or (N,)
    cu_seqlens: Tensor | None  # (S + 1,)
    seed: Tensor | None  # (1,) int64, for dropout
    activation: str
    gate_activation: str
    dropout_p: float
    context_per_row: bool
    score_activation: str = "identity"  # or "logsigmoid", of a score and its bias


class WindowInputs(NamedTuple):
    """Of location attention with a window, from its scores."""

    scores: Tensor  # (B, T, R) or (N, R)
    value: Tensor  # (B, T, Dv) or (N, Dv)
    cu_seqlens: Tensor | None  # (S + 1,)
    seed: Tensor | None
    left: int | None
    right: int | None
    dropout_p: float


class ConcatInputs(NamedTuple):
    """Of concat attention, and of distance attention, which differs in what is made of query + key."""

    query: Tensor  # (B, H, Tq, A); packed with B = 1, as keys and values are, by themselves
    key: Tensor  # (B, H, Tk, A)
    value: Tensor  # (B, H, Tk, Dv)
    v: Tensor  # (H, A)
    score_bias: Tensor | None  # broadcastable to (B, H, Tq, Tk); packed (1, H or 1, P): see pair_starts
    mask: Tensor | None  # bool (B, Tk), or of pairs as score_bias
    cu_seqlens_q: Tensor | None  # (S + 1,); where only the keys have them, S = B of the queries, and so on
    cu_seqlens_k: Tensor | None  # (S + 1,)
    seed: Tensor | None
    activation: str
    left: int | None
    right: int | None
    dropout_p: float
    score_activation: str = "identity"  # or "logsigmoid", of a score and its bias

    @property
    def packed(self) -> bool:
        """Whether rows are packed, on one side or on both."""
        return self.cu_seqlens_q is not None or self.cu_seqlens_k is not None

    @property
    def one_sided(self) -> bool:
        """Whether rows are packed on one side, and padded on the other."""
        return (self.cu_seqlens_q is None) != (self.cu_seqlens_k is None)


class GeneralInputs(NamedTuple):
    """Of general attention, whose weight has met the queries."""

    query: Tensor  # (B, H, Tq, D); packed with B = 1, as keys and values are, by themselves
    key: Tensor  # (B, H, Tk, D)
    value: Tensor | None  # (B, H, Tk, Dv); None: the keys
    score_bias: Tensor | None  # broadcastable to (B, H, Tq, Tk); packed (1, H or 1, P): see pair_starts
    mask: Tensor | None  # bool (B, Tk), or of pairs as score_bias
    cu_seqlens_q: Tensor | None  # (S + 1,); where only the keys have them, S = B of the queries, and so on
    cu_seqlens_k: Tensor | None  # (S + 1,)
    seed: Tensor | None
    activation: str
    scale: float
    left: int | None
    right: int | None
    dropout_p: float
    score_activation: str = "identity"  # or "logsigmoid", of a score and its bias

    @property
    def packed(self) -> bool:
        """Whether rows are packed, on one side or on both."""
        return self.cu_seqlens_q is not None or self.cu_seqlens_k is not None

    @property
    def one_sided(self) -> bool:
        """Whether rows are packed on one side, and padded on the other."""
        return (self.cu_seqlens_q is None) != (self.cu_seqlens_k is None)


def pair_starts(inputs: ConcatInputs | GeneralInputs) -> Tensor:
    """Of packed rows the first pair of each sequence, and how many there are of all: int64 ``(S + 1,)``.

    Pairs of a sequence are those of its queries with all its keys, a query after the other.
    """
    cu_q, cu_k = inputs.cu_seqlens_q, inputs.cu_seqlens_k
    queries = inputs.query.shape[-2] if cu_q is None else cu_q.diff().long()
    keys = inputs.key.shape[-2] if cu_k is None else cu_k.diff().long()
    return torch.nn.functional.pad((queries * keys).cumsum(0), (1, 0))  # type: ignore[union-attr]


class WordByWordInputs(NamedTuple):
    """Of word-by-word attention."""

    premise: Tensor  # (B, Ty, D) or (N, D)
    hypothesis: Tensor  # (B, Th, Dh) or (M, Dh)
    w_y: Tensor  # (D, A)
    w_h: Tensor  # (Dh, A)
    w_r: Tensor  # (D, A)
    w: Tensor  # (A,)
    w_t: Tensor  # (D, D)
    state: Tensor | None  # (S, D)
    mask: Tensor | None  # bool (B, Ty)
    cu_seqlens_premise: Tensor | None  # (S + 1,); where one side alone has them, S = B of the other
    cu_seqlens_hypothesis: Tensor | None  # (S + 1,)


class LocationAwareInputs(NamedTuple):
    """Of a step of location-aware attention."""

    query: Tensor  # (S, A)
    key: Tensor  # (B, Tk, A) or (N, A)
    value: Tensor  # (B, Tk, Dv) or (N, Dv)
    v: Tensor  # (A,)
    previous: Tensor  # (B, Tk) or (N,), or of P channels (B, P, Tk) or (N, P)
    conv_weight: Tensor  # (C, K), or (C, P, K), K odd
    u: Tensor  # (C, A)
    score_bias: Tensor | None  # (B, Tk) or (N,)
    mask: Tensor | None  # bool (B, Tk) or (N,)
    cu_seqlens: Tensor | None  # (S + 1,)
    seed: Tensor | None
    activation: str
    dropout_p: float


class LocationAwareSequenceInputs(NamedTuple):
    """Of the weights of all steps of location-aware attention."""

    query: Tensor  # (B, Tq, A)
    key: Tensor  # (B, Tk, A)
    v: Tensor  # (A,)
    previous: Tensor | None  # (B, Tk), or of P channels (B, P, Tk); None: zeros
    conv_weight: Tensor  # (C, K), or (C, P, K), K odd
    u: Tensor  # (C, A)
    score_bias: Tensor | None  # (B, Tk)
    mask: Tensor | None  # bool (B, Tk)
    activation: str
    cumulative: bool
    score_activation: str = "identity"  # or "logsigmoid", of a score and its bias


class GraphInputs(NamedTuple):
    """Of graph attention."""

    query: Tensor  # (Nq, H, A)
    key: Tensor  # (Nk, H, A)
    v: Tensor  # (H, A)
    value: Tensor | None  # (Nk, H, Dv); None: the keys
    edge: Tensor | None  # (E, H, A)
    indptr: Tensor  # (Nq + 1,)
    indices: Tensor  # (E,)
    indptr_t: Tensor | None  # (Nk + 1,): these three are the transposed structure, for the backward
    indices_t: Tensor | None  # (E,)
    perm: Tensor | None  # (E,) int64
    seed: Tensor | None
    activation: str
    dropout_p: float
    max_degree: int | None = None  # no node, of either kind, has more edges


class StatisticsInputs(NamedTuple):
    """Of statistics pooling."""

    h: Tensor  # (B, T, D) or (N, D)
    w: Tensor | None  # (D, A); None leaves the product out
    b: Tensor | None  # (A,)
    v: Tensor | None  # (A,): one weight a frame; (A, C): one a channel; None, and then no w, b and context: all alike
    context: Tensor | None  # (S, A), or a vector a row: see context_per_row
    value: Tensor | None  # (B, T, C) or (N, C); None: h
    score_bias: Tensor | None  # (B, T) or (N,), with v (A, C) and, if one is given, a channel: (B, T, C) or (N, C)
    mask: Tensor | None  # bool (B, T) or (N,)
    cu_seqlens: Tensor | None  # (S + 1,)
    activation: str
    context_per_row: bool
    floor: float
    ceiling: float
    eps: float
    correction: float
    linear: bool  # whether score_bias is the weights, but for their sum; then no v

    def per_channel(self) -> bool:
        """Whether there is a weight a frame and channel."""
        last = self.score_bias if self.v is None else self.v
        return last is not None and last.dim() == (self.h.dim() if self.v is None else 2)

    def score(self) -> LocationInputs:
        """What makes the scores of frames, a channel a hop."""
        v = self.v if self.v is None or self.v.dim() == 2 else self.v[:, None]
        structure = self.mask, self.cu_seqlens, None, self.activation, "identity", 0.0, self.context_per_row
        bias = None if self.per_channel() else self.score_bias
        return LocationInputs(self.h, self.w, self.b, v, None, None, self.context, None, bias, *structure)

    def bare(self) -> bool:
        """Whether the features of a score a channel are h as it is."""
        return self.activation == "identity" and self.w is self.b is self.context is None


class TargetInputs(NamedTuple):
    """Of target attention, whose first layer has met the query: what of it is left for a key."""

    query: Tensor  # (S, D)
    key: Tensor  # (B, T, D) or (N, D)
    w_key: Tensor  # (D, A): of the key itself, W_k - W_d
    w_product: Tensor  # (D, A): of its product with the query
    context: Tensor  # (S, A): of the query, (W_q + W_d) q + b1
    w2: Tensor | None  # (A, K); None: one layer, K = A
    b2: Tensor | None  # (K,)
    v: Tensor  # (K,)
    b3: Tensor | None  # (1,)
    value: Tensor | None  # (B, T, Dv) or (N, Dv); None: the keys
    mask: Tensor | None  # bool (B, T) or (N,)
    cu_seqlens: Tensor | None  # (S + 1,)
    activation: str
    softmax: bool
    scale: float


class HierarchicalInputs(NamedTuple):
    """Of hierarchical attention: N rows in S segments in G groups; the outer level's score has the longer names."""

    h: Tensor  # (N, D)
    w: Tensor | None  # of a score as in LocationInputs, of one hop
    b: Tensor | None
    v: Tensor | None
    gate_w: Tensor | None
    gate_b: Tensor | None
    context: Tensor | None
    outer_w: Tensor | None
    outer_b: Tensor | None
    outer_v: Tensor | None
    outer_gate_w: Tensor | None
    outer_gate_b: Tensor | None
    outer_context: Tensor | None
    mask: Tensor | None  # bool (N,)
    inner_offsets: Tensor  # (S + 1,)
    outer_offsets: Tensor  # (G + 1,)
    activation: str
    gate_activation: str
    context_per_row: bool
    outer_activation: str
    outer_gate_activation: str
    outer_context_per_row: bool

    def level(self, rows: Tensor, mask: Tensor | None, *, outer: bool) -> LocationInputs:
        """One of the levels, over its rows."""
        at = self._fields.index("outer_w" if outer else "w")
        options = self[-3:] if outer else self[-6:-3]
        offsets = self.outer_offsets if outer else self.inner_offsets
        *names, per_row = options
        return LocationInputs(rows, *self[at : at + 6], None, None, mask, offsets, None, *names, 0.0, per_row)
