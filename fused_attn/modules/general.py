"""The general family as a module."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._checks import FINITE, Checker, Table, check_activation, check_number, module_checker
from ..general import general_attention
from ._layers import counts, factory
from ._pairs import PairsAttention


class GeneralAttention(PairsAttention):
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
    activation, dropout, device, dtype
        As in `ConcatAttention`.

    Attributes
    ----------
    weight
        ``(query_dim, key_dim)``, or ``(H, query_dim, key_dim)`` with more than one head; initialised as that of a
        `torch.nn.Linear` from queries to keys.

    Raises
    ------
    ValueError, TypeError
        For a size under 1, or an unknown activation.

    """

    _shown = ("num_heads", "scale", "activation", "dropout")

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
        key_dim = query_dim if key_dim is None else key_dim
        query_dim, key_dim = counts(query_dim=query_dim, key_dim=key_dim)
        check_activation("activation", activation)
        super().__init__(num_heads, dropout)
        self.activation = activation
        self.scale = check_number("scale", scale, "a finite number", *FINITE)
        heads = (self.num_heads,) if self.num_heads > 1 else ()
        self.weight = nn.Parameter(torch.empty(*heads, query_dim, key_dim, **factory(device, dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew, as the constructor does."""
        bound = 1 / math.sqrt(self.weight.shape[-2])
        nn.init.uniform_(self.weight, -bound, bound)

    def _checker(self, table: Table) -> Checker:
        *_, query_dim, key_dim = self.weight.shape
        return module_checker(table, self.weight, query_dim=query_dim, key_dim=key_dim, num_heads=self.num_heads)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor | Literal[False] | None, **options: Any) -> Any:
        q, k, w = self._repeat(query), self._repeat(key), self.weight
        return general_attention(q, k, value, w, scale=self.scale, activation=self.activation, **options)

    def extra_repr(self) -> str:
        """What the weight and the options are."""
        *_, query_dim, key_dim = self.weight.shape
        return f"query_dim={query_dim}, key_dim={key_dim}, {super().extra_repr()}"
