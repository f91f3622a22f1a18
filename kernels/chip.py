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
    gfx: str = ""  # AMD's name of the architecture

    @property
    def supported(self) -> bool:
        """Whether the rules were made for it: NVIDIA's from sm_80 on, and AMD's with matrix cores (CDNA 2 on).

        Before them there is no bfloat16 and no asynchronous copy (sm_75), or a program has other waves and half the
        registers (RDNA): kernels spill.
        """
        if self.backend == "hip":
            return self.gfx in ("gfx90a", "gfx942", "gfx950")
        return self.backend == "interpreter" or self.arch >= 80

    @property
    def small(self) -> bool:
        """Whether a core has 100 KiB of shared memory and room for 1,536 threads (sm_86, sm_89, sm_120)."""
        return self.backend == "cuda" and self.shared < A100.shared

    @property
    def wgmma(self) -> bool:
        """Whether warp groups issue matrix products: of 64 rows or none, and apart only where registers suffice."""
        return self.backend == "cuda" and self.arch // 10 == 9

    @property
    def hopper(self) -> bool:
        """Whether it is the chip that blocks were timed on, an H200: bench/results/nvidia-h200-2026-11-26."""
        return self.backend == "cuda" and self.arch == 90

    @property
    def from_registers(self) -> bool:
        """Whether matrix units take operands from registers (mma.sync), not from shared memory (sm_90, sm_100).

        Then both operands and what is made of them are short of registers: tiles are half as large.
        """
        return self.backend == "cuda" and self.arch // 10 not in (9, 10)

    def __str__(self) -> str:
        return {"cuda": f"sm_{self.arch}", "hip": self.gfx}.get(self.backend, self.backend)


H200 = Chip("cuda", 90, 232_448, 132)
A100 = Chip("cuda", 80, 166_912, 108)
A10 = Chip("cuda", 86, 101_376, 72)
L40 = Chip("cuda", 89, 101_376, 142)
B200 = Chip("cuda", 100, 232_448, 148)
RTX5090 = Chip("cuda", 120, 101_376, 170)
MI250X = Chip("hip", 0, 65_536, 110, "gfx90a")
MI300X = Chip("hip", 0, 65_536, 304, "gfx942")
INTERPRETER = Chip("interpreter", 0, 65_536, 4)


@functools.cache
def _query(device: torch.device) -> Chip:
    props = torch.cuda.get_device_properties(device)
    cores = props.multi_processor_count
    if torch.version.hip is not None:
        return Chip("hip", 0, 65_536, cores, props.gcnArchName.split(":")[0])  # "gfx942:sramecc+:xnack-"
    arch = props.major * 10 + props.minor
    # What a program may use is in PyTorch's properties; where not, as little as a chip from sm_80 on may have.
    return Chip("cuda", arch, getattr(props, "shared_memory_per_block_optin", 101_376), cores)


assumed: ContextVar[Chip | None] = ContextVar("assumed chip", default=None)


@contextmanager
def assume(chip: Chip) -> Iterator[None]:
    """Launchers inside choose blocks for `chip`, whatever is there: how kernels are compiled without a GPU."""
    token = assumed.set(chip)
    try:
        yield
    finally:
        assumed.reset(token)


def chip_of(device: torch.device) -> Chip:
    """The chip that a tensor on `device` will be worked on."""
    return assumed.get() or (INTERPRETER if INTERPRET else _query(device))


def all_registers(chip: Chip) -> dict[str, int]:
    """A launch option: up to 255 registers a thread, for kernels of at most 8 warps.

    Without it ptxas presses some kernels into 128, so that two programs could share a core, and spills what is left.
    """
    return {"maxnreg": 255} if chip.backend == "cuda" else {}


def even(*widths: int) -> bool:
    """Whether rows are whole 16-byte vectors; where not, each element needs an address and a predicate."""
    return all(n % 16 == 0 for n in widths)


def vectors(*widths: int) -> bool:
    """Whether rows are vectors of 4 numbers or more: few addresses and predicates an element."""
    return all(n % 4 == 0 for n in widths)


def whole_rows(chip: Chip, *widths: int) -> bool:
    """Whether rows have the tiles of whole vectors, as those of vectors of 4 do on chips where they were counted."""
    return even(*widths) or (chip.backend == "cuda" and chip.arch in (80, 90) and vectors(*widths))


def unpressed(chip: Chip, *widths: int) -> dict[str, int]:
    """`all_registers` where ptxas was seen to press too hard: small chips, and rows that are not `even`.

    Elsewhere it decides: more registers are fewer programs a core.
    """
    return all_registers(chip) if chip.small or not even(*widths) else {}


def cdiv(n: int, size: int) -> int:
    """Parts of a size that n has, the last one maybe short; `triton.cdiv` is one of its compiler's, and slow here."""
    return -(-n // size)


def pow2(n: int, least: int, most: int) -> int:
    """The power of two that holds n, within bounds that are powers of two themselves."""
    return max(least, min(most, 1 << max(n - 1, 0).bit_length()))


rule = functools.lru_cache(maxsize=1024)
"""Of a function of numbers and a chip: what it said of calls before is remembered, host time being short."""

LONG = 2**30
"""The length that packed rows have for block sizes, of however many sequences and rows, and what goes with them."""


def tile_rows(n: int, most: int) -> int:
    """Rows of a tile for n: `most`, or half of it, at least 16. Two lengths, so that a kernel has few variants."""
    return most if n > most // 2 else max(16, most // 2)


def unit(x: Tensor | None) -> Tensor | None:
    """X with unit stride on the last axis, the one thing that the kernels ask of a layout."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def stride_of(x: Tensor, axis: int) -> int:
    """The stride of an axis. One of a single entry may have any in PyTorch: here none that a row could not have."""
    if x.shape[axis] != 1:
        return x.stride(axis)
    return 1 if axis in (-1, x.dim() - 1) else max(x.stride(axis), x.shape[-1])


LENGTHS = (
    *("T", "Tq", "Tk", "Th", "Ty", "num_seqs", "per_seq", "rows_per_item", "nodes", "edges", "steps"),
    *("keys", "key_steps", "programs"),
    *("items", "item0", "q_items", "items_per_split", "rows", "rows_per_split", "splits", "limit", "slots"),
)
"""Parameters that vary with a length, in all kernels: `do_not_specialize`, or 1 and multiples of 16 are variants.

Strides that do are in tuples, see `arguments.untold`.
"""


_TL_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def matmul_flags(chip: Chip, dtype: torch.dtype) -> dict[str, object]:
    """How a kernel multiplies operands that were loaded in `dtype`.

    COMPUTE is what they are cast to: the interpreter multiplies bfloat16 wrongly, in float32 it is right.
    PRECISION is for float32 operands and follows PyTorch's own setting for matrix products, made by either of its
    interfaces: this one sees both, where `torch.get_float32_matmul_precision` raises if they were mixed.
    """
    exact = dtype.itemsize == 2 or torch.backends.cuda.matmul.fp32_precision != "tf32"
    exact = exact or (chip.backend == "hip" and chip.gfx != "gfx942")  # the others of AMD's chips have no TF32
    return {
        "COMPUTE": _TL_DTYPE[torch.float32 if chip.backend == "interpreter" else dtype],
        "PRECISION": "ieee" if exact else "tf32",
    }
