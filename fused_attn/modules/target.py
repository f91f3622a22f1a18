"""Target attention as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import (
    FINITE,
    argument,
    check_activation,
    check_flag,
    check_number,
    module_checker,
    offsets_of,
    weight_of,
)
from .._habits import explicit
from .._jagged import jagged_history
from .._ops import Impl
from ..segments import Offsets, as_offsets
from ..target import target_attention
from ._layers import Attention, counts, factory, optional_counts, read

_INPUTS = {
    packed: {
        "query": argument("S dim" if packed else "B dim"),
        "key": argument("N dim" if packed else "B T dim", offsets="" if packed else "cu_seqlens"),
        "cu_seqlens": offsets_of("S"),
    }
    for packed in (False, True)
}


class TargetAttention(Attention):
    r"""Target attention (DIN's local activation unit) with its MLP, see `target_attention`.

    .. math:: s_j = scale \, v \cdot act(W_2 \, act(W_1 [q; \, k_j; \, q - k_j; \, q \odot k_j] + b_1) + b_2) + b_3

    Parameters
    ----------
    dim
        Width D of the query and the keys.
    attn_dim, second_dim
        Units of the two layers; 80 and 40 are DIN's. Without the second, None, the MLP has one hidden layer.
    activation
        identity, tanh, relu, sigmoid, leaky_relu, elu, gelu or silu, of both.
    softmax, scale
        As in `target_attention`.
    bias
        The biases b1, b2 and b3.
    device, dtype
        Of the parameters, as `torch.nn.Linear` has them.

    Attributes
    ----------
    first, second, score
        The layers, `torch.nn.Linear` of 4D, A and K features, whose weights are laid out as those of DeepCTR-Torch
        and RecBole.

    Raises
    ------
    ValueError, TypeError
        For a size under 1 and an unknown activation.

    """

    _shown = ("activation", "softmax", "scale")

    def __init__(
        self,
        dim: int,
        attn_dim: int = 80,
        second_dim: int | None = 40,
        *,
        activation: str = "sigmoid",
        softmax: bool = False,
        scale: float = 1.0,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dim, attn_dim = counts(dim=dim, attn_dim=attn_dim)
        (second_dim,) = optional_counts(second_dim=second_dim)
        check_activation("activation", activation)
        super().__init__()
        made = {"bias": check_flag("bias", bias), **factory(device, dtype)}
        self.activation, self.softmax = activation, check_flag("softmax", softmax)
        self.scale = check_number("scale", scale, "a finite number", *FINITE)
        self.first = nn.Linear(4 * dim, attn_dim, **made)
        self.second = None if second_dim is None else nn.Linear(attn_dim, second_dim, **made)
        self.score = nn.Linear(attn_dim if second_dim is None else second_dim, 1, **made)

    @explicit
    @jagged_history
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Offsets | None = None,
        return_weights: bool = False,
        return_log_weights: bool = False,
        return_scores: bool = False,
        return_lse: bool = False,
        return_state: bool = False,
        impl: Impl = "auto",
    ) -> Tensor | tuple[Any, ...]:
        """Pool the history `key` for the target `query`; the rest is as in `target_attention`."""
        cu_seqlens = as_offsets(cu_seqlens)
        first, score = read("first", self.first), read("score", self.score)
        second = None if self.second is None else read("second", self.second)
        check = module_checker(_INPUTS[cu_seqlens is not None], weight_of(first), dim=first.in_features // 4)
        check("query", query)
        check("key", key)
        return target_attention(
            query,
            key,
            first.weight.t(),
            None if second is None else second.weight.t(),
            score.weight[0],
            b1=first.bias,
            b2=None if second is None else second.bias,
            b3=None if score.bias is None else score.bias[0],
            value=value,
            activation=self.activation,
            softmax=self.softmax,
            scale=self.scale,
            mask=mask,
            cu_seqlens=cu_seqlens,
            return_weights=return_weights,
            return_log_weights=return_log_weights,
            return_scores=return_scores,
            return_lse=return_lse,
            return_state=return_state,
            impl=impl,
        )
