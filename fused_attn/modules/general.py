"""The general family as a module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .._checks import FINITE, argument, check_activation, check_count, check_dropout, check_number, module_checker
from .._habits import explicit
from .._ops import Impl
from ..general import general_attention
from ..segments import Offsets
from ._layers import factory

_INPUTS = {
    packed: {
        "query": argument("N query_dim" if packed else "B Tq query_dim"),
        "key": argument("M key_dim" if packed else "B Tk key_dim"),
        "value": argument("M Dv" if packed else "B Tk Dv", optional=True),
        "value of heads": argument(
            "M Dv | M num_heads Dv" if packed else "B Tk Dv | B num_heads Tk Dv", optional=True
        ),
    }
    for packed in (False, True)
}


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
    device, dtype
        Of the parameters, as `torch.nn.Linear` has them.

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
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made = factory(device, dtype)
        query_dim = check_count("query_dim", query_dim, 1)
        key_dim = query_dim if key_dim is None else check_count("key_dim", key_dim, 1)
        num_heads = check_count("num_heads", num_heads, 1)
        scale = check_number("scale", scale, "a finite number", *FINITE)
        check_activation("activation", activation)
        dropout = check_dropout("dropout", dropout)
        self.num_heads, self.scale, self.activation, self.dropout = num_heads, scale, activation, dropout
        heads = (num_heads,) if num_heads > 1 else ()
        self.weight = nn.Parameter(torch.empty(*heads, query_dim, key_dim, **made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew, as the constructor does."""
        bound = 1 / math.sqrt(self.weight.shape[-2])
        nn.init.uniform_(self.weight, -bound, bound)

    @explicit
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        window: tuple[int | None, int | None] | None = None,
        score_bias: Tensor | None = None,
        cu_seqlens_q: Offsets | None = None,
        cu_seqlens_k: Offsets | None = None,
        return_weights: bool = False,
        impl: Impl = "auto",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from ``query (B, Tq, query_dim)`` to ``key (B, Tk, key_dim)``, or packed, ``(N, query_dim)``.

        Parameters
        ----------
        query, key
            The same for every head.
        value
            The keys where None. ``(B, Tk, Dv)`` for every head, or with more than one ``(B, H, Tk, Dv)``; packed
            ``(N, Dv)`` or ``(N, H, Dv)``.
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
            As in `general_attention`; also for queries and keys with heads, or of other widths, dtypes or devices
            than the parameters'.

        """
        rank = 3 if cu_seqlens_q is None else 2
        *_, query_dim, key_dim = self.weight.shape
        check = module_checker(
            _INPUTS[rank == 2], self.weight, query_dim=query_dim, key_dim=key_dim, num_heads=self.num_heads
        )
        check("query", query)
        check("key", key)
        check("value", value, "value of heads" if self.num_heads > 1 else "value")

        def every_head(x: Tensor) -> Tensor:
            return x.unsqueeze(1).expand(x.shape[0], self.num_heads, *x.shape[1:])

        if self.num_heads > 1:
            query, key = every_head(query), every_head(key)
            value = every_head(value) if value is not None and value.dim() == rank else value
        return general_attention(
            query,
            key,
            value,
            self.weight,
            scale=self.scale,
            activation=self.activation,
            mask=mask,
            window=window,
            score_bias=score_bias,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            dropout_p=self.dropout if self.training else 0.0,
            return_weights=return_weights,
            impl=impl,
        )

    def extra_repr(self) -> str:
        """What the weight and the options are."""
        *_, query_dim, key_dim = self.weight.shape
        return (
            f"query_dim={query_dim}, key_dim={key_dim}, num_heads={self.num_heads}, scale={self.scale}, "
            f"activation={self.activation!r}, dropout={self.dropout}"
        )
