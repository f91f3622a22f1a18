"""What a launcher must know of the chip before it chooses block sizes. Asked at the first launch, never at import."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import triton

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
