"""The kernels that a call launches, each compiled for a chip and with its arguments, on tensors without numbers.

Floating-point tensors are memory that is never touched; integers (offsets, masks) are real, those that a kernel makes
for the next one included: it is walked whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

from .. import compile_report  # before the kernels, which are then not the interpreter's

# isort: split

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from ..families.problem import Inputs, Op, Sizes
from .walk import SPAN, Code, Counts, Walk, parse

SAMPLED = 5  # programs of a launch that are walked, evenly over its grid


@dataclass
class Launch:
    """One launch."""

    kernel: Any
    grid: tuple[int, int, int]
    values: list[Any]  # of the kernel's parameters, addresses of tensors made up
    tensors: list[Tensor]
    counts: Counts = field(default_factory=Counts)  # of all its programs
    code: Code | None = None

    @property
    def name(self) -> str:
        """Of the kernel."""
        return str(self.kernel.name).strip("_").removesuffix("_kernel")

    @property
    def threads(self) -> int:
        """Of a program."""
        return 32 * int(self.kernel.metadata.num_warps)

    @property
    def programs(self) -> int:
        """Of the grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]


_codes: dict[str, Code] = {}


def _flat(value: Any, kind: Any) -> Iterator[tuple[Any, Any]]:
    """Parameters of the compiled kernel: fields of tuples one by one, without constants."""
    if isinstance(kind, tuple):
        for one, its in zip(value, kind, strict=True):
            yield from _flat(one, its)
    elif kind != "constexpr":
        yield value, kind


def _launch_of(function: JITFunction, kernel: Any, grid: Any, args: Any, kwargs: Any) -> Launch:
    known = {k: v for k, v in kwargs.items() if k in function.signature.parameters}
    bound = function.signature.bind(*args, **known)
    bound.apply_defaults()
    values: list[Any] = []
    tensors: list[Tensor] = []
    for name, value in bound.arguments.items():
        for one, kind in _flat(value, kernel.src.signature[name]):
            if isinstance(one, Tensor):
                tensors.append(one)
                values.append((len(tensors) << SPAN) + one.data_ptr() % 16)
            else:
                values.append(0 if one is None or isinstance(one, float) or "fp" in str(kind) else int(one))
    grid = grid(dict(bound.arguments)) if callable(grid) else grid
    shape: Any = (*map(int, grid), *(1,) * (3 - len(grid)))
    return Launch(kernel, shape, values, tensors)


def walk(launch: Launch) -> None:
    """Fill in what all programs of a launch execute, from some of them.

    Integers are for the next launch: lengths and places, for which all programs are walked, or, from kernels that
    compute with other numbers too, whether a row is alive, which all are then.
    """
    if launch.kernel.hash not in _codes:
        _codes[launch.kernel.hash] = parse(launch.kernel.asm["ptx"])
    code = launch.code = _codes[launch.kernel.hash]
    total, (X, Y, _) = launch.programs, launch.grid
    values = [*launch.values, 0, 0]  # Triton's own scratch

    def of(chosen: Sequence[int]) -> set[int]:
        launch.counts = Counts()
        made: set[int] = set()
        for i in chosen:
            one = Walk(code, values, launch.tensors, launch.threads, launch.grid)
            launch.counts.add(one.run((i % X, i // X % Y, i // (X * Y))), total / len(chosen))
            made |= one.made
        return made

    some = range(total) if total <= SAMPLED else [i * (total - 1) // (SAMPLED - 1) for i in range(SAMPLED)]
    made = of(some)
    if made and len(some) < total and launch.counts.fma + launch.counts.flops:
        for i in made:
            launch.tensors[i].fill_(1)
    elif made and len(some) < total:
        of(range(total))


@contextlib.contextmanager
def recorded(target: str) -> Iterator[list[Launch]]:
    """Inside, calls of the package on tensors of the CPU launch nothing; gives what they would."""
    found: list[Launch] = []
    run = JITFunction.run

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launch = _launch_of(self, kernel, grid, args, kwargs)
        if launch.programs:
            walk(launch)
            found.append(launch)
        return kernel

    with (
        compile_report.as_on_a_gpu(),
        compile_report.launches(target, note),
    ):
        yield found


class Untouched:
    """`torch.randn` without numbers: memory that is only promised."""

    def __enter__(self) -> None:
        self.patch = patch("torch.randn", lambda *shape, **options: _Lazy(shape))
        self.patch.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.patch.__exit__(*error)


class _Lazy:
    """What `bench.families` does with numbers that it draws: a factor, a dtype."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape[0] if isinstance(shape[0], (tuple, list, torch.Size)) else shape

    def __mul__(self, factor: float) -> _Lazy:
        return self

    def to(self, dtype: torch.dtype) -> Tensor:
        """The tensor."""
        return torch.empty(tuple(self.shape), dtype=dtype)


def run(op: Op, sizes: Sizes, dtype: torch.dtype, mode: str) -> None:
    """Call an op of the registry on tensors without numbers, within `recorded`."""
    with Untouched():
        inputs = op.inputs(sizes, dtype, torch.device("cpu"), 0)
    call = partial(op.call, **op.options(sizes), impl="triton")
    step(call, inputs, mode)


def step(call: Callable[..., Tensor], inputs: Inputs, mode: str) -> None:
    """A forward without gradients, or one with all of them."""
    if mode == "forward":
        with torch.no_grad():
            call(**inputs)
        return
    leaves = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    out = call(**leaves)
    torch.autograd.grad(out, [x for x in leaves.values() if x.requires_grad], torch.ones_like(out))
