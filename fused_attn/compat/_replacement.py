"""What the classes of all peer files share, and the refusals that they share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._ops import use_triton

CPU = ("faster", "always", "never")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Registry = dict[type, tuple["type[Replacement]", Callable[[Any], "str | None"]]]
"""Of a peer file: by class of the peer ours, and what says of a module why it cannot be replaced, or None."""

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Replacement:
    """A class of a peer file, ``class Pool(Replacement, peer.Pool)``: the peer's, with another `forward`.

    That begins with what this op does not take: ``if not self.takes(x) or ...: return super().forward(x, ...)``.
    """

    faster_on_cpu = False
    """Whether our forward was measured to be at least as fast as the peer's on a CPU."""
    fused_attn_cpu = "faster"
    """One of `CPU`: `replace_attention` sets it on the module."""

    @classmethod
    def peer(cls) -> type[nn.Module]:
        """The class of the library."""
        return next(x for x in cls.__mro__ if issubclass(x, nn.Module) and not issubclass(x, Replacement))

    def takes(self, *inputs: object) -> bool:
        """Whether ours is to run for these inputs: plain tensors of one device, of a dtype that our ops have."""
        if torch.jit.is_tracing() or not all(type(x) in (Tensor, nn.Parameter) for x in inputs):
            return False
        tensors: list[Any] = [*inputs]
        device, dtypes = tensors[0].device, {x.dtype for x in tensors}
        if not dtypes <= {*FLOATS} or any(x.device != device for x in tensors):
            return False
        if device.type == "cpu":
            return self.fused_attn_cpu == "always" or (self.fused_attn_cpu == "faster" and self.faster_on_cpu)
        return use_triton("auto", device, "has no float64" if torch.float64 in dtypes else None)


def is_ours(kind: type) -> TypeGuard[type[Replacement]]:
    """Whether a class is one of a peer file itself, not a subclass of one."""
    return Replacement in kind.__bases__


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """For an op of ours where the library's sums are float32 under autocast, which would round what it reads."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def on_cpu(ours: type[Replacement], cpu: str) -> str:
    """What runs where the input is on a CPU, as a report says it."""
    if cpu == "never":
        return "the library's (cpu='never')"
    return "ours" if cpu == "always" or ours.faster_on_cpu else "the library's (ours is not measured to be as fast)"


def why_not(module: nn.Module) -> str | None:
    """Why no module like this one is replaced, whatever its class."""
    if "forward" in vars(module):
        return "its forward was replaced by hand"
    for name, x in module.named_parameters(recurse=False):
        if x.dtype not in FLOATS:
            return f"no kernel has the dtype of its {name}, {str(x.dtype).removeprefix('torch.')}"
    return None


def why_not_read(name: str, layer: nn.Module | None, kinds: tuple[type, ...] = (nn.Linear, nn.Conv1d)) -> str | None:
    """Why the weights of a child cannot be used without calling it, or None.

    For `can_replace`, and for a forward: an adapter or a hook may come later. Parametrisations are no reason.

    kinds: exact classes whose call is known to be the product with their weight.
    """
    if layer is None:
        return None
    kind = parametrize.type_before_parametrizations(layer)
    if kind not in kinds:
        return f"{name} is a {kind.__module__}.{kind.__name__}: what it computes its weight alone does not say"
    if "forward" in vars(layer):
        return f"the forward of {name} was replaced by hand"
    if any(getattr(layer, hooks, None) for hooks in _HOOKS):
        return f"{name} has hooks, which would not be called"
    return None
