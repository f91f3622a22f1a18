"""Thin `torch.nn` modules over the functions: they own parameters and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._checks import check_activation, check_dropout
from ._ops import Impl
from .concat import concat_attention
from .general import general_attention
from .location import location_attention


class LocationAttention(nn.Module):
    r"""Attention pooling with learned parameters, see `location_attention`.

    .. math:: s_j = act(w \cdot h_j + b), \quad s_j = v \cdot act(W h_j + b), \quad
        s_j = v \cdot (act(W h_j + b) \odot \sigma(G h_j + g))

    Parameters
    ----------
    dim
        Width D of the keys.
    attn_dim
        Width A of the MLP score; None for the linear score.
    hops
        Number R of weightings, each with an output of its own; None for one, without a hop axis.
    gated
        Multiply the features with a sigmoid gate (Ilse et al. 2018); needs `attn_dim`.
    activation
        identity, tanh, relu, sigmoid, leaky_relu, gelu or silu.
    bias
        Biases b and g.
    context_dim
        Width of a context that is projected without bias and added into the score; None for no context.
    dropout
        Probability that a weight is dropped, in training only.

    Raises
    ------
    ValueError
        For a size under 1, an unknown activation, a gate without `attn_dim`.

    """

    def __init__(
        self,
        dim: int,
        attn_dim: int | None = None,
        *,
        hops: int | None = None,
        gated: bool = False,
        activation: str = "tanh",
        bias: bool = True,
        context_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "attn_dim": attn_dim, "hops": hops, "context_dim": context_dim}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name}: expected at least 1; got {size}")
        if gated and attn_dim is None:
            raise ValueError("attn_dim: expected a width with gated=True; got None")
        check_activation("activation", activation)
        check_dropout("dropout", dropout)
        self.hops, self.activation, self.dropout = hops, activation, dropout
        width = attn_dim or hops or 1
        self.proj = nn.Linear(dim, width, bias=bias)
        self.gate = nn.Linear(dim, width, bias=bias) if gated else None
        self.score = nn.Linear(width, hops or 1, bias=False) if attn_dim is not None else None
        self.context = nn.Linear(context_dim, width, bias=False) if context_dim is not None else None

    def forward(
        self,
        h: Tensor,
        *,
        context: Tensor | None = None,
        values: Tensor | None = None,
        mask: Tensor | None = None,
        window: tuple[int | None, int | None] | None = None,
        score_bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_weights: bool = False,
        impl: Impl = "auto",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Pool `h`; shapes, results and errors are those of `location_attention`.

        Raises
        ------
        ValueError
            Also where `context` is given without `context_dim`, or missing with it.

        """
        if (context is None) != (self.context is None):
            given = "None" if context is None else "a tensor"
            wanted = "None, since context_dim is None" if self.context is None else "a tensor, by context_dim"
            raise ValueError(f"context: expected {wanted}; got {given}")
        if context is not None and self.context is not None:
            context = self.context(context)
        w: Tensor = self.proj.weight.t()
        b: Tensor | None = self.proj.bias
        v: Tensor | None = None
        if self.score is not None:
            v = self.score.weight.t() if self.hops is not None else self.score.weight[0]
        elif self.hops is None:  # one linear score: w (D,), b (), context without a width axis
            w, b = w[:, 0], None if b is None else b[0]
            context = None if context is None else context.squeeze(-1)
        return location_attention(
            h, w, b, v,
            gate=None if self.gate is None else (self.gate.weight.t(), self.gate.bias),
            context=context, values=values, activation=self.activation, mask=mask, window=window,
            score_bias=score_bias, cu_seqlens=cu_seqlens, dropout_p=self.dropout if self.training else 0.0,
            return_weights=return_weights, impl=impl,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Options that the submodules do not show."""
        return f"hops={self.hops}, activation={self.activation!r}, dropout={self.dropout}"


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


class GeneralAttention(nn.Module):
    r"""General (bilinear, Luong) attention with its weight, see `general_attention`.

    .. math:: s_{ij} = act(scale \, q_i^T W k_j)

    With more than one head, all score the same queries and keys, each with a W of its own.

    Parameters
    ----------
    query_dim, key_dim
        Widths of queries and keys; key_dim is query_dim where None.
    num_heads
        Number H of heads.
    scale
        Factor on the product.
    activation
        identity, tanh, relu, sigmoid, leaky_relu, gelu or silu.
    dropout
        Probability that a weight is dropped, in training only.

    Attributes
    ----------
    weight
        ``(query_dim, key_dim)``, or ``(H, query_dim, key_dim)`` with more than one head; initialised as that of a
        `torch.nn.Linear` from queries to keys.

    Raises
    ------
    ValueError
        For a size under 1, or an unknown activation.

    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int | None = None,
        *,
        num_heads: int = 1,
        scale: float = 1.0,
        activation: str = "identity",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        key_dim = query_dim if key_dim is None else key_dim
        for name, size in {"query_dim": query_dim, "key_dim": key_dim, "num_heads": num_heads}.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1; got {size}")
        check_activation("activation", activation)
        check_dropout("dropout", dropout)
        self.num_heads, self.scale, self.activation, self.dropout = num_heads, scale, activation, dropout
        heads = (num_heads,) if num_heads > 1 else ()
        self.weight = nn.Parameter(torch.empty(*heads, query_dim, key_dim))
        nn.init.uniform_(self.weight, -1 / math.sqrt(query_dim), 1 / math.sqrt(query_dim))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        window: tuple[int | None, int | None] | None = None,
        score_bias: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        return_weights: bool = False,
        impl: Impl = "auto",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from ``query (B, Tq, query_dim)`` to ``key (B, Tk, key_dim)``, or packed, ``(N, query_dim)``.

        Parameters
        ----------
        query, key
            The same for every head.
        value
            The keys where None. ``(B, Tk, Dv)`` for every head, or ``(B, H, Tk, Dv)``; packed ``(N, Dv)`` or
            ``(N, H, Dv)``.
        mask, window, score_bias, cu_seqlens_q, cu_seqlens_k, return_weights, impl
            As in `general_attention`.

        Returns
        -------
        Tensor or (Tensor, Tensor)
            As `general_attention` returns them, with heads where there are more than one: ``(B, [H,] Tq, Dv)``,
            packed ``(N, [H,] Dv)``; weights ``(B, [H,] Tq, Tk)``.

        Raises
        ------
        ValueError, TypeError
            As in `general_attention`; also for queries and keys with heads.

        """
        rank = 3 if cu_seqlens_q is None else 2
        for name, x in (("query", query), ("key", key)):
            if x.dim() != rank:
                words = f"(B, T, {name}_dim)" if rank == 3 else f"(N, {name}_dim)"
                raise ValueError(f"{name}: expected shape {words}; got {tuple(x.shape)}")

        def every_head(x: Tensor) -> Tensor:
            return x.unsqueeze(1).expand(x.shape[0], self.num_heads, *x.shape[1:])

        if self.num_heads > 1:
            query, key = every_head(query), every_head(key)
            value = every_head(value) if value is not None and value.dim() == rank else value
        return general_attention(
            query, key, value, self.weight, scale=self.scale, activation=self.activation, mask=mask, window=window,
            score_bias=score_bias, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            dropout_p=self.dropout if self.training else 0.0, return_weights=return_weights, impl=impl,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """What the weight and the options are."""
        *_, query_dim, key_dim = self.weight.shape
        return (
            f"query_dim={query_dim}, key_dim={key_dim}, num_heads={self.num_heads}, scale={self.scale}, "
            f"activation={self.activation!r}, dropout={self.dropout}"
        )
