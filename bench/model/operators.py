"""The time of PyTorch's operators, counted the same way: of the textbook formula, eager and compiled.

Eager, each operator that starts a kernel has its inputs and outputs once through memory, and its products by the
matrix rate, whichever takes longer, and a launch. Compiled, every run of operators between two matrix products is one
kernel, as Inductor fuses elementwise operators and reductions: it reads what others made and writes what others read.
(It makes more kernels where two reductions follow each other over different axes: what is told is the least.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..host import STARTS
from .rates import Chip

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution")


class Operator(NamedTuple):
    """One that starts a kernel."""

    name: str
    read: list[Tensor]
    written: list[Tensor]
    flops: int


class Operators(TorchDispatchMode):
    """Notes what is run inside, on tensors of no device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Operator] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if STARTS.get(name, 1) and any(x.numel() for x in written) and not func.is_view:
            flops = 0
            if name in PRODUCTS[:-1]:
                left = read[-2]
                flops = 2 * written[0].numel() * left.shape[-1]
            self.found.append(Operator(name, read, written, flops))
        return result


def _bytes(tensors: list[Tensor]) -> int:
    """Of what is stored, a broadcast axis once."""
    total = 0
    for x in {id(x): x for x in tensors}.values():
        shape = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride]
        total += torch.Size(shape).numel() * x.element_size()
    return total


def _ms(flops: float, size: float, wide: bool, chip: Chip) -> float:
    """One kernel."""
    rate = chip.fma_flops if wide else 1e12 * chip.matrix
    return 1e3 * max(flops / rate, size / chip.dram_bytes) + 1e-3 * chip.launch_us


def _wide(x: Operator) -> bool:
    """Whether its products are of float32, without TF32."""
    return bool(x.read) and x.read[-1].dtype == torch.float32


def eager(found: list[Operator], chip: Chip) -> tuple[float, int]:
    """Predicted ms, and kernels."""
    return sum(_ms(x.flops, _bytes(x.read + x.written), _wide(x), chip) for x in found), len(found)


def compiled(found: list[Operator], chip: Chip) -> tuple[float, int]:
    """Predicted ms, and kernels."""
    groups: list[list[Operator]] = []
    for x in found:
        if not x.flops and groups and not groups[-1][-1].flops:
            groups[-1].append(x)
        else:
            groups.append([x])
    total = 0.0

    def place(x: Tensor) -> int:
        return x.untyped_storage()._cdata

    readers: dict[int, set[int]] = {}
    for n, group in enumerate(groups):
        for x in group:
            for y in x.read:
                readers.setdefault(place(y), set()).add(n)
    for n, group in enumerate(groups):
        made = {place(y): y for x in group for y in x.written}
        read = {place(y): y for x in group for y in x.read if place(y) not in made}
        kept = [y for at, y in made.items() if readers.get(at, {-1}) - {n}]
        total += _ms(sum(x.flops for x in group), _bytes([*read.values(), *kept]), _wide(group[0]), chip)
    return total, len(groups)
