"""The concat family as a module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .._checks import (
    argument,
    check_activation,
    check_count,
    check_dropout,
    check_flag,
    module_checker,
    show,
    weight_of,
    width_of,
)
from .._habits import explicit
from .._ops import Impl
from ..concat import concat_attention
from ..reference import sound
from ._layers import factory, read, reset_layers

_INPUTS = {
    "query": argument("B Tq query_dim"),
    "key": argument("B Tk key_dim"),
    "value": argument("B Tk Dv", optional=True),
    "value of heads": argument("B Tk Dv | B num_heads Tk Dv", optional=True),
    "context": argument("B C | B Tq C | B Tk C"),
    "query context": argument("B Tq C"),
    "key context": argument("B Tk C"),
}


class ConcatAttention(nn.Module):
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
        identity, tanh, relu, sigmoid, leaky_relu, gelu or silu.
    bias
        The bias b, on the query projection.
    dropout
        Probability that a weight is dropped, in training only.
    device, dtype
        Of the parameters, as `torch.nn.Linear` has them.

    Raises
    ------
    ValueError
        For a size under 1, or an unknown activation.

    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        attn_dim: int,
        *,
        context_dims: Sequence[int] = (),
        num_heads: int = 1,
        activation: str = "tanh",
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made = factory(device, dtype)
        query_dim = check_count("query_dim", query_dim, 1)
        key_dim = check_count("key_dim", key_dim, 1)
        attn_dim = check_count("attn_dim", attn_dim, 1)
        num_heads = check_count("num_heads", num_heads, 1)
        if isinstance(context_dims, (str, bytes)) or not isinstance(context_dims, Iterable):
            raise TypeError(f"context_dims: expected a sequence of widths; got {show(context_dims)}")
        context_dims = [check_count(f"context_dims[{i}]", n, 1) for i, n in enumerate(context_dims)]
        check_activation("activation", activation)
        bias = check_flag("bias", bias)
        dropout = check_dropout("dropout", dropout)
        self.num_heads, self.activation, self.dropout = num_heads, activation, dropout
        width = num_heads * attn_dim
        self.query_proj = nn.Linear(query_dim, width, bias=bias, **made)
        self.key_proj = nn.Linear(key_dim, width, bias=False, **made)
        self.context_projs = nn.ModuleList(nn.Linear(n, width, bias=False, **made) for n in context_dims)
        self.score = nn.Linear(attn_dim, num_heads, bias=False, **made)

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as the constructor does."""
        reset_layers(self)

    @explicit
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        contexts: Sequence[Tensor | tuple[str, Tensor]] = (),
        mask: Tensor | None = None,
        window: tuple[int | None, int | None] | None = None,
        score_bias: Tensor | None = None,
        return_weights: bool = False,
        impl: Impl = "auto",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from ``query (B, Tq, query_dim)`` to ``key (B, Tk, key_dim)``.

        Parameters
        ----------
        query, key
            Before projection.
        value
            ``(B, Tk, Dv)`` for every head, or ``(B, H, Tk, Dv)``; the keys, before projection, where None.
        contexts
            One for each of `context_dims`: a sequence ``(B, C)``, a key ``(B, Tk, C)`` or a query ``(B, Tq, C)``.
            Where Tq = Tk the shape does not tell the last two apart: pass ``("key", x)`` or ``("query", x)``, which
            say one a row.
        mask, window, score_bias, return_weights, impl
            As in `concat_attention`.

        Returns
        -------
        Tensor or (Tensor, Tensor)
            ``(B, Tq, Dv)``, or ``(B, H, Tq, Dv)`` with more than one head; weights ``(B, [H,] Tq, Tk)``.

        Raises
        ------
        ValueError, TypeError
            As in `concat_attention`; also for inputs of other widths, dtypes or devices than the parameters', and
            where contexts do not match `context_dims`, or are ambiguous.

        """
        sizes = {"query_dim": width_of(self.query_proj), "key_dim": width_of(self.key_proj)}
        check = module_checker(_INPUTS, weight_of(self.query_proj), **sizes, num_heads=self.num_heads)
        check("query", query)
        check("key", key)
        check("value", value, "value of heads" if self.num_heads > 1 else "value")
        if not isinstance(contexts, (tuple, list)):
            raise TypeError(
                f"contexts: expected a list or tuple, one for each of context_dims; got {type(contexts).__name__}"
            )
        if len(contexts) != len(self.context_projs):
            raise ValueError(f"contexts: expected {len(self.context_projs)}, by context_dims; got {len(contexts)}")
        value = key if value is None else value

        def projected(layer: nn.Module, x: Tensor) -> Tensor:
            """Rows that are not finite may be hidden, and 0 · NaN is not to reach the weight's gradient."""
            if mask is None and window is None:
                return cast("Tensor", layer(x))
            x, bad = sound(x)
            return cast("Tensor", layer(x)).masked_fill(bad, torch.nan)

        q, k = projected(self.query_proj, query), projected(self.key_proj, key)
        for i, (given, project) in enumerate(zip(contexts, self.context_projs, strict=True)):
            side, x = _side_of(f"contexts[{i}]", given)
            check.bind("C", width_of(project) or x.shape[-1], f"context_dims[{i}]")
            check(f"contexts[{i}]", x, f"{side or ''} context".strip())
            if x.dim() == 2:
                q = q + projected(project, x)[:, None]
                continue
            lengths = {"query": query.shape[1], "key": key.shape[1]}
            if side is None:
                sides = [s for s, length in lengths.items() if x.shape[1] == length]
                if len(sides) != 1:
                    raise ValueError(
                        f"contexts[{i}]: expected (B, C), (B, Tq, C) or (B, Tk, C), where Tq = Tk = {lengths['key']} "
                        f'as ("query", x) or ("key", x); got {tuple(x.shape)}'
                    )
                side = sides[0]
            if side == "query":
                q = q + projected(project, x)
            else:
                k = k + projected(project, x)
        v = read("score", self.score).weight
        if self.num_heads > 1:
            q, k = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k))
            value = value[:, None].expand(-1, self.num_heads, -1, -1) if value.dim() == 3 else value
        else:
            v = v[0]
        return concat_attention(
            q,
            k,
            value,
            v,
            activation=self.activation,
            mask=mask,
            window=window,
            score_bias=score_bias,
            dropout_p=self.dropout if self.training else 0.0,
            return_weights=return_weights,
            impl=impl,
        )

    def extra_repr(self) -> str:
        """Options that the submodules do not show."""
        return f"num_heads={self.num_heads}, activation={self.activation!r}, dropout={self.dropout}"


def _side_of(name: str, given: Tensor | tuple[str, Tensor]) -> tuple[str | None, Tensor]:
    """The side that a context is said to be of, and its tensor."""
    if not isinstance(given, tuple):
        return None, given
    if len(given) != 2 or not isinstance(given[0], str):
        raise TypeError(f'{name}: expected a tensor, ("query", x) or ("key", x); got {show(given)}')
    if given[0] not in ("query", "key"):
        raise ValueError(f'{name}: expected ("query", x) or ("key", x); got ({show(given[0])}, x)')
    return given
