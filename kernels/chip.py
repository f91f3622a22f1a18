"""What a launcher must know of the chip before it chooses block sizes. Asked at the first launch, never at import."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET: bool = triton.knobs.runtime.interpret
"""Whether the kernels were made for Triton's interpreter (TRITON_INTERPRET=1 before they were imported)."""


class Chip(NamedTuple):
    """One accelerator, as the block-size rules see it."""

    backend: str  # "cuda", "hip" or "interpreter"
    arch: int  # compute capability (90), or 0
    shared: int  # bytes of on-chip memory that one program may use
    cores: int  # streaming multiprocessors or compute units


H200 = Chip("cuda", 90, 232_448, 132)
A100 = Chip("cuda", 80, 166_912, 108)
B200 = Chip("cuda", 100, 232_448, 148)
MI300X = Chip("hip", 0, 65_536, 304)
INTERPRETER = Chip("interpreter", 0, 65_536, 4)


@functools.cache
def _query(device: torch.device) -> Chip:
    props = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Chip("hip", 0, 65_536, props.multi_processor_count)
    shared = getattr(props, "shared_memory_per_block_optin", 101_376)
    return Chip("cuda", props.major * 10 + props.minor, shared, props.multi_processor_count)


_assumed: ContextVar[Chip | None] = ContextVar("assumed chip", default=None)


@contextmanager
def assume(chip: Chip) -> Iterator[None]:
    """Launchers inside choose blocks for `chip`, whatever is there: how kernels are compiled without a GPU."""
    token = _assumed.set(chip)
    try:
        yield
    finally:
        _assumed.reset(token)


def chip_of(device: torch.device) -> Chip:
    """The chip that a tensor on `device` will be worked on."""
    return _assumed.get() or (INTERPRETER if INTERPRET else _query(device))


def all_registers(chip: Chip) -> dict[str, int]:
    """A launch option: up to 255 registers a thread, for kernels of at most 8 warps.

    Without it ptxas presses some kernels into 128, so that two programs could share a core, and spills what is left.
    """
    return {"maxnreg": 255} if chip.backend == "cuda" else {}


def pow2(n: int, least: int, most: int) -> int:
    """The power of two that holds n, within bounds that are powers of two themselves."""
    return max(least, min(most, triton.next_power_of_2(n)))


def unit(x: Tensor | None) -> Tensor | None:
    """X with unit stride on the last axis, the one thing that the kernels ask of a layout."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(names: str, x: Tensor | None, axes: tuple[int, ...], *, packed: bool) -> dict[str, int]:
    """Strides of x by the kernels' names; 0 where there is no x, and for the batch axis of packed rows."""
    sizes = (0,) * len(axes) if x is None else (0 if packed and axis == 0 else x.stride(axis) for axis in axes)
    return {f"stride_{name}": size for name, size in zip(names.split(), sizes, strict=True)}


_TL_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def matmul_flags(chip: Chip, dtype: torch.dtype) -> dict[str, object]:
    """How a kernel multiplies operands that were loaded in `dtype`.

    COMPUTE is what they are cast to: the interpreter multiplies bfloat16 wrongly, in float32 it is right.
    PRECISION is for float32 operands and follows PyTorch's own setting.
    """
    exact = dtype.itemsize == 2 or torch.get_float32_matmul_precision() == "highest"
    return {
        "COMPUTE": _TL_DTYPE[torch.float32 if chip.backend == "interpreter" else dtype],
        "PRECISION": "ieee" if exact else "tf32",
    }
