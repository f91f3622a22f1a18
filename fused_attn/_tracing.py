"""Whether, and where, the numbers of a tensor can be read."""

import torch
from torch import Tensor


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
