"""What an op to time is: its cases, and for each its inputs, its arithmetic and its traffic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..peers import Peer

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
Sizes = Mapping[str, int]
Inputs = dict[str, Tensor]
MODES = ("forward", "forward+backward")


class Cost(NamedTuple):
    """The least that a computation has to do, whatever its implementation."""

    flops: int  # of its matrix products; recomputation and elementwise functions are not counted
    bytes: int  # each input read once, each output written once
    tanhs: int = 0  # tanh or sigmoid, one for each pair that is visible and each feature of its score


@dataclass(frozen=True)
class Case:
    """One problem."""

    name: str
    sizes: Sizes
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"  # the type of device that it is of a sensible size for
    check: Sizes = field(default_factory=dict)  # sizes to check at, where float64 does not fit at those timed

    @property
    def dtype_name(self) -> str:
        """The dtype, as `torch` names it."""
        return str(self.dtype).removeprefix("torch.")

    def capped(self, limit: int) -> Sizes:
        """The sizes with none over `limit`: the same problem in small."""
        return {name: min(size, limit) for name, size in self.sizes.items()}


@dataclass(frozen=True)
class Op:
    """One family."""

    family: str
    inputs: Callable[[Sizes, torch.dtype, torch.device, int], Inputs]
    """(sizes, dtype, device, seed) -> fresh random keyword arguments of `call`; the floating ones get gradients."""
    call: Callable[..., Tensor]
    """The op on `inputs`, `options` and `impl`."""
    cost: Callable[[Sizes, int], tuple[Cost, Cost]]
    """(sizes, bytes of an element) -> cost of the forward, cost of the backward on its own."""
    cases: tuple[Case, ...]
    options: Callable[[Sizes], Mapping[str, Any]] = lambda sizes: {}
    """Keyword arguments of `call` that are no tensors."""
    peers: Callable[[Sizes], Mapping[str, Peer]] = lambda sizes: {}
    """Other systems that can compute these sizes, by provider."""

    def work(self, case: Case, mode: str) -> Cost:
        """Cost of a case in one of `MODES`."""
        forward, backward = self.cost(case.sizes, case.dtype.itemsize)
        return forward if mode == "forward" else Cost(*(sum(both) for both in zip(forward, backward, strict=True)))
