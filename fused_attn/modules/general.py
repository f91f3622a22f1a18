"""The general family as a module."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._checks import (
    FINITE,
    Checker,
    Table,
    check_activation,
    check_flag,
    check_number,
    check_score_activation,
    module_checker,
)
from ..general import general_attention
from ..reference import sound
from ._layers import counts, factory
from ._pairs import PairsAttention


class GeneralAttention(PairsAttention):
    r"""General (bilinear, Luong) attention with its weight, see `general_attention`.

    .. math:: s_{ij} = act(scale \, q_i^T W k_j)

    With more than one head, all score the same queries and keys, each with a W of its own; of one query a sequence
    they are the queries of one head, which reads keys and values once.

    The weight meets the queries. `project_keys` lets it meet the keys instead, once for all steps of a decoder: for
    values of their own, and queries that are no wider than the keys. Else a step then reads more than it saves.

    Parameters
    ----------
    query_dim, key_dim
        Widths of queries and keys; key_dim is query_dim where None.
    num_heads
        Number H of heads.
    scale
        Factor on the product.
    learn_scale
        Whether the scale is a parameter, ``()``, or ``(H,)`` with more than one head, which begins as `scale`.
    activation, score_activation, dropout, device, dtype
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

    _shown = ("num_heads", "activation", "dropout")

    def __init__(
        self,
        query_dim: int,
        key_dim: int | None = None,
        *,
        num_heads: int = 1,
        scale: float = 1.0,
        learn_scale: bool = False,
        activation: str = "identity",
        score_activation: str = "identity",
        dropout: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        key_dim = query_dim if key_dim is None else key_dim
        query_dim, key_dim = counts(query_dim=query_dim, key_dim=key_dim)
        check_activation("activation", activation)
        check_score_activation("score_activation", score_activation)
        super().__init__(num_heads, dropout)
        self.activation, self.score_activation = activation, score_activation
        heads, made = (self.num_heads,) if self.num_heads > 1 else (), factory(device, dtype)
        self._first_scale = check_number("scale", scale, "a finite number", *FINITE)
        learned = check_flag("learn_scale", learn_scale)
        self.scale: float | nn.Parameter = nn.Parameter(torch.empty(heads, **made)) if learned else self._first_scale
        self.weight = nn.Parameter(torch.empty(*heads, query_dim, key_dim, **made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew, as the constructor does."""
        bound = 1 / math.sqrt(self.weight.shape[-2])
        nn.init.uniform_(self.weight, -bound, bound)
        if isinstance(self.scale, Tensor):
            nn.init.constant_(self.scale, self._first_scale)

    def _checker(self, table: Table) -> Checker:
        *_, query_dim, key_dim = self.weight.shape
        return module_checker(table, self.weight, query_dim=query_dim, key_dim=key_dim, num_heads=self.num_heads)

    def _width(self) -> tuple[int | None, str]:
        return self.weight.shape[-2], "query_dim"

    def _project_keys(self, key: Tensor) -> Tensor:
        rows, bad = sound(key)
        return nn.functional.linear(rows, self.weight.flatten(0, -2)).masked_fill(bad, torch.nan)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | Literal[False] | None,
        projected: Tensor | None,
        **options: Any,
    ) -> Any:
        value = self._values(key if value is None and projected is not None else value, key)
        k = self._of_heads(key) if projected is None else self._split(projected)
        w = self.weight if projected is None else None
        q = self._repeat(query)
        options |= {"activation": self.activation, "score_activation": self.score_activation}
        return general_attention(q, k, value, w, scale=self.scale, **options)

    def extra_repr(self) -> str:
        """What the weight and the options are."""
        *_, query_dim, key_dim = self.weight.shape
        scale = f"scale={self._first_scale}" + (", learn_scale=True" if isinstance(self.scale, Tensor) else "")
        return f"query_dim={query_dim}, key_dim={key_dim}, {scale}, {super().extra_repr()}"
