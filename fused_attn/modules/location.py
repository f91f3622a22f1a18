"""The location family as a module."""

from __future__ import annotations

from torch import Tensor, nn

from .._checks import check_activation, check_dropout
from .._ops import Impl
from ..location import location_attention


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
        Multiply the features with a gate (Ilse et al. 2018); needs `attn_dim`.
    activation, gate_activation
        identity, tanh, relu, sigmoid, leaky_relu, gelu or silu; the second is σ, the gate's.
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
        gate_activation: str = "sigmoid",
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
        check_activation("gate_activation", gate_activation)
        check_dropout("dropout", dropout)
        self.hops, self.activation, self.gate_activation, self.dropout = hops, activation, gate_activation, dropout
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
            context=context, values=values, activation=self.activation, gate_activation=self.gate_activation,
            mask=mask, window=window, score_bias=score_bias, cu_seqlens=cu_seqlens,
            dropout_p=self.dropout if self.training else 0.0, return_weights=return_weights, impl=impl,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Options that the submodules do not show."""
        gate = "" if self.gate is None else f", gate_activation={self.gate_activation!r}"
        return f"hops={self.hops}, activation={self.activation!r}, dropout={self.dropout}{gate}"
