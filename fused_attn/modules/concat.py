"""The concat family as a module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .._checks import check_activation, check_dropout
from .._ops import Impl
from ..concat import concat_attention


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
    ) -> None:
        super().__init__()
        sizes = {"query_dim": query_dim, "key_dim": key_dim, "attn_dim": attn_dim, "num_heads": num_heads}
        sizes |= {f"context_dims[{i}]": n for i, n in enumerate(context_dims)}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1; got {size}")
        check_activation("activation", activation)
        check_dropout("dropout", dropout)
        self.num_heads, self.activation, self.dropout = num_heads, activation, dropout
        width = num_heads * attn_dim
        self.query_proj = nn.Linear(query_dim, width, bias=bias)
        self.key_proj = nn.Linear(key_dim, width, bias=False)
        self.context_projs = nn.ModuleList(nn.Linear(n, width, bias=False) for n in context_dims)
        self.score = nn.Linear(attn_dim, num_heads, bias=False)

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
            Where Tq = Tk the shape does not tell the last two apart: pass ``("key", x)`` or ``("query", x)``.
        mask, window, score_bias, return_weights, impl
            As in `concat_attention`.

        Returns
        -------
        Tensor or (Tensor, Tensor)
            ``(B, Tq, Dv)``, or ``(B, H, Tq, Dv)`` with more than one head; weights ``(B, [H,] Tq, Tk)``.

        Raises
        ------
        ValueError
            Also where contexts do not match `context_dims`, or are ambiguous.

        """
        if len(contexts) != len(self.context_projs):
            raise ValueError(f"contexts: expected {len(self.context_projs)}, by context_dims; got {len(contexts)}")
        for name, x in (("query", query), ("key", key)):
            if x.dim() != 3:
                raise ValueError(f"{name}: expected shape (B, T, {name}_dim); got {tuple(x.shape)}")
        value = key if value is None else value
        q, k = self.query_proj(query), self.key_proj(key)
        for i, (given, project) in enumerate(zip(contexts, self.context_projs, strict=True)):
            side, x = given if isinstance(given, tuple) else (None, given)
            lengths = {"query": query.shape[1], "key": key.shape[1]}
            if x.dim() == 2:
                q = q + project(x)[:, None]
                continue
            sides = [s for s in lengths if s in (side or s) and x.dim() == 3 and x.shape[1] == lengths[s]]
            if len(sides) != 1:
                raise ValueError(
                    f"contexts[{i}]: expected (B, C), (B, Tq, C) or (B, Tk, C) with Tq = {lengths['query']} and Tk = "
                    f'{lengths["key"]}, as ("query", x) or ("key", x) where they are equal; got {tuple(x.shape)}'
                )
            if sides == ["query"]:
                q = q + project(x)
            else:
                k = k + project(x)
        v = self.score.weight
        if self.num_heads > 1:
            q, k = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k))
            value = value[:, None].expand(-1, self.num_heads, -1, -1) if value.dim() == 3 else value
        else:
            v = v[0]
        return concat_attention(
            q, k, value, v, activation=self.activation, mask=mask, window=window, score_bias=score_bias,
            dropout_p=self.dropout if self.training else 0.0, return_weights=return_weights, impl=impl,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Options that the submodules do not show."""
        return f"num_heads={self.num_heads}, activation={self.activation!r}, dropout={self.dropout}"
