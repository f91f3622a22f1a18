"""The concat family as a module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .._checks import (
    Table,
    argument,
    check_activation,
    check_count,
    check_cu_seqlens,
    check_flag,
    check_one_side,
    check_score_activation,
    offsets_of,
    show,
    width_of,
)
from .._habits import explicit
from .._jagged import jagged_pairs
from .._ops import Impl
from ..concat import concat_attention
from ..reference import segment_ids
from ..segments import Offsets, as_offsets
from ._layers import counts, factory, project, read
from ._pairs import FORMS, INPUTS, HeadsAttention

_INPUTS: dict[tuple[bool, bool], Table] = {
    (packed_q, packed_k): {
        **INPUTS[packed_q, packed_k],
        "context": argument(
            "S C" if packed_q and packed_k else "B C" if packed_q or packed_k else "B C | B Tq C | B Tk C | B 1 C"
        ),
        "cu_seqlens_q": offsets_of("B"),
        "offsets": offsets_of("any"),
        "query context": argument("N C" if packed_q else "B Tq C"),
        "key context": argument("M C" if packed_k else "B Tk C"),
    }
    for packed_q, packed_k in FORMS
}


class ConcatAttention(HeadsAttention):
    r"""Concat (additive, Bahdanau) attention with its projections, see `concat_attention`.

    .. math:: s_{ij} = v \cdot act(W_q q_i + W_k k_j + \sum_c W_c ctx_c + b)

    Whatever else is to be attended to adds its vector to the score: each context has a projection of its own, and
    is added to the query or the key side before the kernel, so it costs no more than that projection.

    Parameters
    ----------
    query_dim, key_dim, attn_dim
        Widths of queries and keys, and A of the score (of each head).
    context_dims
        Widths of further contexts, in the order in which `forward` takes them.
    num_heads
        Number H of heads, each with scores of its own.
    activation
        identity, tanh, relu, sigmoid, leaky_relu, elu, gelu or silu.
    score_activation
        "logsigmoid" for weights that are sigmoids over their sum, as in the function; or "identity".
    bias
        The bias b, on the query projection.
    dropout
        Probability that a weight is dropped, in training only.
    device, dtype
        Of the parameters, as `torch.nn.Linear` has them.

    Raises
    ------
    ValueError, TypeError
        For a size under 1, or an unknown activation.

    """

    _shown = ("num_heads", "activation", "dropout")

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        attn_dim: int,
        *,
        context_dims: Sequence[int] = (),
        num_heads: int = 1,
        activation: str = "tanh",
        score_activation: str = "identity",
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(context_dims, (str, bytes)) or not isinstance(context_dims, Iterable):
            raise TypeError(f"context_dims: expected a sequence of widths; got {show(context_dims)}")
        context_dims = [check_count(f"context_dims[{i}]", n, 1) for i, n in enumerate(context_dims)]
        check_activation("activation", activation)
        check_score_activation("score_activation", score_activation)
        query_dim, key_dim, attn_dim = counts(query_dim=query_dim, key_dim=key_dim, attn_dim=attn_dim)
        super().__init__(num_heads, dropout)
        made = factory(device, dtype)
        self.activation, self.score_activation = activation, score_activation
        width = self.num_heads * attn_dim
        self.query_proj = nn.Linear(query_dim, width, bias=check_flag("bias", bias), **made)
        self.key_proj = nn.Linear(key_dim, width, bias=False, **made)
        self.context_projs = nn.ModuleList(nn.Linear(n, width, bias=False, **made) for n in context_dims)
        self.score = nn.Linear(attn_dim, self.num_heads, bias=False, **made)

    def _width(self) -> tuple[int | None, str]:
        return width_of(self.score), "attn_dim"

    @explicit
    @jagged_pairs
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | Literal[False] | None = None,
        *,
        contexts: Sequence[Tensor | tuple[str, Tensor]] = (),
        projected: Tensor | None = None,
        mask: Tensor | None = None,
        window: tuple[int | None, int | None] | None = None,
        score_bias: Tensor | None = None,
        cu_seqlens_q: Offsets | None = None,
        cu_seqlens_k: Offsets | None = None,
        return_weights: bool = False,
        return_log_weights: bool = False,
        return_scores: bool = False,
        return_lse: bool = False,
        return_state: bool = False,
        impl: Impl = "auto",
    ) -> Tensor | tuple[Any, ...]:
        """Attend from ``query (B, Tq, query_dim)`` to ``key (B, Tk, key_dim)``, or packed, ``(N, query_dim)``.

        Parameters
        ----------
        query, key
            Before projection.
        value
            ``(B, Tk, Dv)`` for every head, or ``(B, H, Tk, Dv)``; packed ``(M, Dv)`` or ``(M, H, Dv)``; the keys,
            before projection, where None. False: no output, as in `concat_attention`.
        contexts
            One for each of `context_dims`: a sequence ``(B, C)`` or ``(B, 1, C)``, a key ``(B, Tk, C)`` or a query
            ``(B, Tq, C)``.
            Where Tq = Tk the shape does not tell the last two apart: pass ``("key", x)`` or ``("query", x)``, which
            say one a row. Where rows of a side are packed or jagged a tensor is one a sequence, ``(S, C)``, and those
            of rows are ``("key", x)`` with ``(M, C)`` or ``("query", x)`` with ``(N, C)``.
        projected
            What `project_keys` made of `key`; None: it is made here.
        mask, window, score_bias, cu_seqlens_q, cu_seqlens_k, impl
            As in `concat_attention`.
        return_weights, return_log_weights, return_scores, return_lse, return_state
            As in `concat_attention`.

        Returns
        -------
        Tensor, State or tuple
            ``(B, Tq, Dv)``, or ``(B, H, Tq, Dv)`` with more than one head, packed ``(N, [H,] Dv)``; weights, log
            weights and scores ``(B, [H,] Tq, Tk)``.

        Raises
        ------
        ValueError, TypeError
            As in `concat_attention`; also for inputs of other widths, dtypes or devices than the parameters', and
            where contexts do not match `context_dims`, or are ambiguous.

        """
        offsets = as_offsets(cu_seqlens_q)
        packed_k = cu_seqlens_k is not None
        check = self._check(
            _INPUTS[offsets is not None, packed_k], query, key, None if value is False else value, projected
        )
        if not isinstance(contexts, (tuple, list)):
            raise TypeError(
                f"contexts: expected a list or tuple, one for each of context_dims; got {type(contexts).__name__}"
            )
        if offsets is not None and contexts:  # which a sequence may have one of
            if packed_k:
                check_cu_seqlens("cu_seqlens_q", offsets, query.shape[0], query.device)
                check.bind_sequences("S", offsets, "cu_seqlens_q")
            else:
                check_one_side(check, "cu_seqlens_q", offsets, query.shape[0])
        if len(contexts) != len(self.context_projs):
            raise ValueError(f"contexts: expected {len(self.context_projs)}, by context_dims; got {len(contexts)}")

        def of(layer: nn.Module, x: Tensor) -> Tensor:
            """Only where rows are hidden may they be other than finite."""
            return cast("Tensor", layer(x)) if mask is None and window is None else project(layer, x)

        q, k = of(self.query_proj, query), of(self.key_proj, key) if projected is None else projected
        for i, (given, layer) in enumerate(zip(contexts, self.context_projs, strict=True)):
            side, x = _side_of(f"contexts[{i}]", given)
            check.bind("C", width_of(layer) or x.shape[-1], f"context_dims[{i}]")
            check(f"contexts[{i}]", x, f"{side or ''} context".strip())
            if side is None and offsets is not None:
                q = q + of(layer, x).index_select(0, segment_ids(offsets, query.shape[0]))
                continue
            if side is None and (x.dim() == 2 or x.shape[1] == 1):  # one query or one key: it is the same
                q = q + of(layer, x if x.dim() == 3 else x[:, None])
                continue
            if (side or _side_by_length(f"contexts[{i}]", x, query.shape[1], key.shape[1])) == "query":
                q = q + of(layer, x)
            else:
                k = k + of(layer, x)
        v = read("score", self.score).weight
        value = key if value is None else value
        return concat_attention(
            self._split(q),
            self._split(k),
            self._values(value, key),
            v if self.num_heads > 1 else v[0],
            activation=self.activation,
            score_activation=self.score_activation,
            mask=mask,
            window=window,
            score_bias=score_bias,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            dropout_p=self._dropout_p,
            return_weights=return_weights,
            return_log_weights=return_log_weights,
            return_scores=return_scores,
            return_lse=return_lse,
            return_state=return_state,
            impl=impl,
        )


def _side_of(name: str, given: Tensor | tuple[str, Tensor]) -> tuple[str | None, Tensor]:
    """The side that a context is said to be of, and its tensor."""
    if not isinstance(given, tuple):
        return None, given
    if len(given) != 2 or not isinstance(given[0], str):
        raise TypeError(f'{name}: expected a tensor, ("query", x) or ("key", x); got {show(given)}')
    if given[0] not in ("query", "key"):
        raise ValueError(f'{name}: expected ("query", x) or ("key", x); got ({show(given[0])}, x)')
    return given


def _side_by_length(name: str, x: Tensor, queries: int, keys: int) -> str:
    """The side that a context of rows is of, where its length tells."""
    if queries == keys:
        raise ValueError(
            f"{name}: expected (B, C), (B, Tq, C) or (B, Tk, C), where Tq = Tk = {keys} "
            f'as ("query", x) or ("key", x); got {tuple(x.shape)}'
        )
    return "query" if x.shape[1] == queries else "key"
