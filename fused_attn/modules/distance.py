"""The distance family as a module."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._checks import check_flag
from ..distance import check_power, distance_attention
from ._layers import counts, factory, project
from ._pairs import PairsAttention


class DistanceAttention(PairsAttention):
    r"""Attention by distances of projected queries and keys, see `distance_attention`.

    .. math:: s_{ij} = -\sum_a e^{u_a} |(W_q q_i + b)_a - (W_k k_j)_a|^p

    Parameters
    ----------
    query_dim, key_dim, attn_dim
        Widths of queries and keys, and A in which they are compared (of each head).
    p
        1 (Laplace) or 2.
    num_heads
        Number H of heads, each with distances of its own.
    bias, dropout, device, dtype
        As in `ConcatAttention`.

    Attributes
    ----------
    log_v
        u, ``(H, A)``; 0 at first.

    Raises
    ------
    ValueError, TypeError
        For a size under 1, or another p.

    """

    _shown = ("p", "num_heads", "dropout")

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        attn_dim: int,
        *,
        p: float = 1,
        num_heads: int = 1,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_power("p", p)
        query_dim, key_dim, attn_dim = counts(query_dim=query_dim, key_dim=key_dim, attn_dim=attn_dim)
        super().__init__(num_heads, dropout)
        made = factory(device, dtype)
        self.p = p
        self.query_proj = nn.Linear(query_dim, self.num_heads * attn_dim, bias=check_flag("bias", bias), **made)
        self.key_proj = nn.Linear(key_dim, self.num_heads * attn_dim, bias=False, **made)
        self.log_v = nn.Parameter(torch.zeros(self.num_heads, attn_dim, **made))

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as the constructor does."""
        super().reset_parameters()
        nn.init.zeros_(self.log_v)

    def _width(self) -> tuple[int | None, str]:
        return self.log_v.shape[1], "attn_dim"

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | Literal[False] | None,
        projected: Tensor | None,
        **options: Any,
    ) -> Any:
        q, v = project(self.query_proj, query), self.log_v.exp()
        k = self._project_keys(key) if projected is None else projected
        value = self._values(key if value is None else value, key)
        v = v if self.num_heads > 1 else v[0]
        return distance_attention(self._split(q), self._split(k), value, v, p=self.p, **options)
