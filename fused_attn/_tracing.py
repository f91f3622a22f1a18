"""Whether, and where, the numbers of a tensor can be read."""

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

TAME = 1e6
"""No product of numbers up to this, with a parameter, overflows where that with another does not."""


def every_sample(x: Tensor) -> Tensor:
    """What `torch.func.vmap` shows a sample of, whole: its numbers can be read."""
    while not torch.compiler.is_dynamo_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def in_graph() -> bool:
    """Whether a compiled graph is being made, so that no number of a tensor can be read.

    In a backward, which autograd traces after Dynamo, PyTorch 2.11 says so by the context only.
    """
    return torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None


def can_look(x: Tensor) -> bool:
    """Whether a number of x can be read at once: on a CPU, outside of graphs, traces, transforms and modes."""
    if x.device.type != "cpu" or type(x) not in (Tensor, torch.nn.Parameter) or in_graph():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return False
    return _get_current_dispatch_mode() is None


def is_tame(x: Tensor) -> bool:
    """Whether x is seen to hold nothing but numbers up to `TAME`; False where they cannot be looked at."""
    if not can_look(x) or x.numel() == 0:
        return False
    low, high = torch.aminmax(x.detach())
    return low.item() >= -TAME and high.item() <= TAME  # neither is NaN


def is_finite(x: Tensor) -> bool:
    """Whether all numbers are; one look, which takes large ones for infinite."""
    return math.isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).item())
