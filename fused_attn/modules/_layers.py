"""What every module shares: its constructor's checks, and its layers, which are called or only read."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .._checks import check_count, show
from ..reference import sound

_Layer = TypeVar("_Layer", nn.Linear, nn.Conv1d)


def factory(device: Any, dtype: Any) -> dict[str, Any]:
    """A constructor's `device` and `dtype`, checked, as layers take them."""
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if dtype is not None and dtype not in floats:
        raise TypeError(f"dtype: expected float16, bfloat16, float32, float64 or None; got {show(dtype)}")
    try:
        return {"device": None if device is None else torch.device(device), "dtype": dtype}
    except (RuntimeError, TypeError, ValueError) as error:
        kind = ValueError if isinstance(device, str) else TypeError
        raise kind(f"device: expected a torch.device, its name or None; got {show(device)}") from error


def counts(**sizes: int) -> list[int]:
    """A constructor's sizes, checked by name: ints from 1 on."""
    return [check_count(name, size, 1) for name, size in sizes.items()]


def optional_counts(**sizes: int | None) -> list[int | None]:
    """Sizes that may be None."""
    return [None if size is None else check_count(name, size, 1) for name, size in sizes.items()]


class Attention(nn.Module):
    """What the modules of all families have: layers, perhaps a dropout, and options that its layers do not show."""

    dropout = 0.0  # no annotations here: TorchScript reads them, and its refusal would be of a type it does not know
    score_activation = "identity"
    _shown = cast("tuple[str, ...]", ())

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as the constructor does."""
        reset_layers(self)

    @property
    def _dropout_p(self) -> float:
        """Of this call: in evaluation nothing is dropped."""
        return self.dropout if self.training else 0.0

    def extra_repr(self) -> str:
        """Options that the submodules do not show."""
        names = self._shown if self.score_activation == "identity" else (*self._shown, "score_activation")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def reset_layers(module: nn.Module) -> None:
    """``reset_parameters`` of the layers in a module, in the order in which they were made."""
    for child in module.children():
        reset = getattr(child, "reset_parameters", None)
        if callable(reset):
            reset()
        else:
            reset_layers(child)


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


def project(layer: nn.Module, rows: Tensor) -> Tensor:
    """``layer(rows)``; rows that are not finite give NaN, but not to the gradient of the weight."""
    if rows.is_nested:  # of visible rows only
        return cast("Tensor", layer(rows))
    rows, bad = sound(rows)
    return cast("Tensor", layer(rows)).masked_fill(bad, torch.nan)
