"""The layers inside the modules: what of them is called, and what is only read."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

_Layer = TypeVar("_Layer", nn.Linear, nn.Conv1d)


def read(name: str, layer: _Layer) -> _Layer:
    """The layer, whose weight and bias are what a call of it would use now: the kernel applies them itself.

    Old forms of `torch.nn.utils` (prune, spectral_norm, weight_norm) set the weight in a hook before each call, which
    is made here. Parametrisations need nothing.

    Raises
    ------
    TypeError
        For a layer that computes something else than its class: quantised, with an adapter, or a replacement.

    """
    kind: type[nn.Module] = nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Linear
    if not isinstance(layer, nn.Linear | nn.Conv1d) or type(layer).forward is not kind.forward:
        raise TypeError(
            f"{name}: expected a torch.nn.{kind.__name__}, whose weight is used without a call of the layer; got "
            f"{type(layer).__module__}.{type(layer).__name__}; merge an adapter or quantise weights in place, or "
            "use torch.nn.utils.parametrize"
        )
    for hook in layer._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):
            hook(layer, ())
    return layer


def project(linear: nn.Linear, rows: Tensor) -> Tensor:
    """``linear(rows)``; rows that are not finite give NaN, but not to the gradient of the weight."""
    if rows.is_nested:  # of visible rows only
        return linear(rows)
    bad = ~rows.isfinite().all(-1, keepdim=True)
    return linear(rows.masked_fill(bad, 0)).masked_fill(bad, torch.nan)
