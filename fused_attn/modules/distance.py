"""The distance family as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import argument, check_count, check_dropout, check_flag, module_checker, weight_of, width_of
from .._habits import explicit
from .._ops import Impl
from ..distance import check_power, distance_attention
from ..segments import Offsets
from ._layers import factory, project, reset_layers

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


class DistanceAttention(nn.Module):
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
    bias
        The bias b, on the query projection.
    dropout
        Probability that a weight is dropped, in training only.
    device, dtype
        Of the parameters, as `torch.nn.Linear` has them.

    Attributes
    ----------
    log_v
        u, ``(H, A)``; 0 at first.

    Raises
    ------
    ValueError
        For a size under 1, or another p.

    """

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
        super().__init__()
        made = factory(device, dtype)
        query_dim = check_count("query_dim", query_dim, 1)
        key_dim = check_count("key_dim", key_dim, 1)
        attn_dim = check_count("attn_dim", attn_dim, 1)
        num_heads = check_count("num_heads", num_heads, 1)
        check_power("p", p)
        bias = check_flag("bias", bias)
        self.p, self.num_heads, self.dropout = p, num_heads, check_dropout("dropout", dropout)
        self.query_proj = nn.Linear(query_dim, num_heads * attn_dim, bias=bias, **made)
        self.key_proj = nn.Linear(key_dim, num_heads * attn_dim, bias=False, **made)
        self.log_v = nn.Parameter(torch.zeros(num_heads, attn_dim, **made))

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as the constructor does."""
        reset_layers(self)
        nn.init.zeros_(self.log_v)

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
            Before projection.
        value
            The keys, before projection, where None. ``(B, Tk, Dv)`` for every head, or with more than one
            ``(B, H, Tk, Dv)``; packed ``(N, Dv)`` or ``(N, H, Dv)``.
        mask, window, score_bias, cu_seqlens_q, cu_seqlens_k, return_weights, impl
            As in `distance_attention`.

        Returns
        -------
        Tensor or (Tensor, Tensor)
            As `distance_attention` returns them, with heads where there are more than one.

        Raises
        ------
        ValueError, TypeError
            As in `distance_attention`; also for inputs of other widths, dtypes or devices than the parameters'.

        """
        rank = 3 if cu_seqlens_q is None else 2
        sizes = {"query_dim": width_of(self.query_proj), "key_dim": width_of(self.key_proj)}
        check = module_checker(_INPUTS[rank == 2], weight_of(self.query_proj), **sizes, num_heads=self.num_heads)
        check("query", query)
        check("key", key)
        check("value", value, "value of heads" if self.num_heads > 1 else "value")
        value = key if value is None else value
        q, k, v = project(self.query_proj, query), project(self.key_proj, key), self.log_v.exp()
        if self.num_heads > 1:
            axis = -2 if rank == 2 else -3
            q, k = (x.unflatten(-1, (self.num_heads, -1)).movedim(-2, axis) for x in (q, k))
            value = value.unsqueeze(1).expand(-1, self.num_heads, *value.shape[1:]) if value.dim() == rank else value
        else:
            v = v[0]
        return distance_attention(
            q,
            k,
            value,
            v,
            p=self.p,
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
        """Options that the submodules do not show."""
        return f"p={self.p}, num_heads={self.num_heads}, dropout={self.dropout}"
