"""The location family as a module."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .._checks import (
    argument,
    check_activation,
    check_dropout,
    check_flag,
    check_score_activation,
    module_checker,
    offsets_of,
    weight_of,
    width_of,
)
from .._habits import explicit
from .._ops import Impl
from ..location import _a_sequence, check_context, location_attention
from ..segments import Offsets, as_offsets
from ._layers import Attention, counts, factory, optional_counts, project, read

_INPUTS = {
    packed: {
        "h": argument("N dim" if packed else "B T dim", offsets="" if packed else "cu_seqlens"),
        "context": argument(
            "S context_dim | N context_dim | S 1 context_dim | 1 N context_dim"
            if packed
            else "B context_dim | B T context_dim | B 1 context_dim"
        ),
        "cu_seqlens": offsets_of("S"),
    }
    for packed in (False, True)
}


class LocationAttention(Attention):
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
        identity, tanh, relu, sigmoid, leaky_relu, elu, gelu or silu; the second is σ, the gate's.
    score_activation
        "logsigmoid" for weights that are sigmoids over their sum, as in `location_attention`; or "identity".
    bias
        Biases b and g.
    context_dim
        Width of a context that is projected without bias and added into the score; None for no context.
    dropout, device, dtype
        As in `ConcatAttention`.

    Raises
    ------
    ValueError, TypeError
        For a size under 1, an unknown activation, a gate without `attn_dim`.

    """

    _shown = ("hops", "activation", "dropout")

    def __init__(
        self,
        dim: int,
        attn_dim: int | None = None,
        *,
        hops: int | None = None,
        gated: bool = False,
        activation: str = "tanh",
        gate_activation: str = "sigmoid",
        score_activation: str = "identity",
        bias: bool = True,
        context_dim: int | None = None,
        dropout: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        [dim] = counts(dim=dim)
        attn_dim, hops, context_dim = optional_counts(attn_dim=attn_dim, hops=hops, context_dim=context_dim)
        gated, bias = check_flag("gated", gated), check_flag("bias", bias)
        if gated and attn_dim is None:
            raise ValueError("attn_dim: expected a width with gated=True; got None")
        check_activation("activation", activation)
        check_activation("gate_activation", gate_activation)
        check_score_activation("score_activation", score_activation)
        super().__init__()
        made = factory(device, dtype)
        self.hops, self.dropout = hops, check_dropout("dropout", dropout)
        self.activation, self.gate_activation = activation, gate_activation
        self.score_activation = score_activation
        width = attn_dim or hops or 1
        self.proj = nn.Linear(dim, width, bias=bias, **made)
        self.gate = nn.Linear(dim, width, bias=bias, **made) if gated else None
        self.score = nn.Linear(width, hops or 1, bias=False, **made) if attn_dim is not None else None
        self.context = nn.Linear(context_dim, width, bias=False, **made) if context_dim is not None else None

    @explicit
    def forward(
        self,
        h: Tensor,
        *,
        context: Tensor | None = None,
        value: Tensor | Literal[False] | None = None,
        mask: Tensor | None = None,
        window: tuple[int | None, int | None] | None = None,
        score_bias: Tensor | None = None,
        cu_seqlens: Offsets | None = None,
        return_weights: bool = False,
        return_log_weights: bool = False,
        return_scores: bool = False,
        return_lse: bool = False,
        return_state: bool = False,
        impl: Impl = "auto",
    ) -> Tensor | tuple[Any, ...]:
        """Pool `h`; shapes, results and errors are those of `location_attention`.

        Raises
        ------
        ValueError, TypeError
            Also for inputs of other widths, dtypes or devices than the parameters', and where `context` is given
            without `context_dim`, or missing with it.

        """
        cu_seqlens = as_offsets(cu_seqlens)
        if (context is None) != (self.context is None):
            given = "None" if context is None else "a tensor"
            wanted = "None, since context_dim is None" if self.context is None else "a tensor, by context_dim"
            raise ValueError(f"context: expected {wanted}; got {given}")
        check_module_inputs(h, context, cu_seqlens, weight_of(self.proj), width_of(self.proj), width_of(self.context))
        if context is not None and self.context is not None:
            context = project(self.context, context)
        proj = read("proj", self.proj)
        w: Tensor = proj.weight.t()
        b: Tensor | None = proj.bias
        v: Tensor | None = None
        if self.score is not None:
            score = read("score", self.score).weight
            v = score.t() if self.hops is not None else score[0]
        elif self.hops is None:  # one linear score: w (D,), b (), context without a width axis
            w, b = w[:, 0], None if b is None else b[0]
            context = None if context is None else context.squeeze(-1)
        return location_attention(
            h,
            w,
            b,
            v,
            gate=gate_of(self),
            context=context,
            value=value,
            activation=self.activation,
            gate_activation=self.gate_activation,
            score_activation=self.score_activation,
            mask=mask,
            window=window,
            score_bias=score_bias,
            cu_seqlens=cu_seqlens,
            dropout_p=self._dropout_p,
            return_weights=return_weights,
            return_log_weights=return_log_weights,
            return_scores=return_scores,
            return_lse=return_lse,
            return_state=return_state,
            impl=impl,
        )

    def extra_repr(self) -> str:
        """Options that the submodules do not show: of the gate's, where there is one."""
        gate = "" if self.gate is None else f", gate_activation={self.gate_activation!r}"
        return super().extra_repr() + gate


def gate_of(pool: LocationAttention, name: str = "gate") -> tuple[Tensor, Tensor | None] | None:
    """The gate of a score, as the functions take it."""
    if pool.gate is None:
        return None
    gate = read(name, pool.gate)
    return gate.weight.t(), gate.bias


def check_module_inputs(
    h: Tensor,
    context: Tensor | None,
    cu_seqlens: Tensor | None,
    weight: Tensor | None,
    dim: int | None,
    context_dim: int | None,
) -> None:
    """Check what the module projects by its own names; the rest is left to the function, whose names are the same."""
    jagged = isinstance(h, Tensor) and h.is_nested
    for name, x in (("h", h), ("context", context)) if jagged else ():
        if isinstance(x, Tensor) and x.is_nested and x.layout != torch.jagged:
            raise ValueError(f"{name}: expected layout=torch.jagged for a nested tensor; got the strided layout")
    rows = cast("Any", h).values() if jagged else h
    offsets = cast("Any", h).offsets() if jagged else cu_seqlens
    check = module_checker(_INPUTS[offsets is not None], weight, dim=dim, context_dim=context_dim)
    check("h", rows)
    if context is None:
        return
    if offsets is not None:
        if not jagged:
            check("cu_seqlens", offsets)
        check.bind_sequences("S", offsets, "h" if jagged else "cu_seqlens")
        if jagged and isinstance(context, Tensor):
            context = (
                cast("Any", context).values()[None] if context.is_nested else _a_sequence("context", context, offsets)
            )
    check_context(check, "context", context)
