"""Arguments of kernels that belong together, as tuples.

A field is read as an attribute inside the kernel. Numbers in a tuple are told to the compiler where they are 1 or a
multiple of 16, which is a variant each: strides of rows, widths and counts of heads may be there. Numbers that vary
with a length stay parameters of their own, by the names of `chip.LENGTHS`. Flags and blocks are tuples of
`constants`. A tuple is not part of another: Triton 3.6 forgets there that a stride is 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chip import INTERPRET, rule, stride_of
from .replay import writing

_YES, _NO = tl.constexpr(True), tl.constexpr(False)
_UNITS = {n: tl.constexpr(n) for n in (1, 2, 4, 8, 16)}


class Rows(NamedTuple):
    """A tensor (N, H, width) with unit stride on the last axis; no pointer where there is none."""

    ptr: Tensor | None
    stride_n: int  # see `units`
    stride_h: int  # the same
    UNIT: Any


def rows(x: Tensor | None) -> Rows:
    """A tensor (N, H, width), or (H, width) for all rows alike."""
    if x is None:
        return Rows(None, 0, 0, _UNITS[16])
    strides = 0 if x.dim() == 2 else stride_of(x, 0), stride_of(x, x.dim() - 2)
    return Rows(x, *strides, _UNITS[math.gcd(16, *strides)])


class Sequences(NamedTuple):
    """A tensor (B, T, width), or packed rows (N, width), with unit stride on the last axis."""

    ptr: Tensor | None
    stride_b: int  # 0 for packed rows; see `sequence_ptr`
    stride_t: int  # see `pitch`
    UNIT: Any


class Heads(NamedTuple):
    """A tensor (B, H, T, width), or packed rows (1, H, N, width), with unit stride on the last axis."""

    ptr: Tensor | None
    stride_b: int  # 0 for packed rows; see `head_ptr`
    stride_h: int
    stride_t: int  # see `pitch`
    UNIT: Any


class Entries(NamedTuple):
    """One number a row, (B, T), or packed (N,)."""

    ptr: Tensor | None
    stride_b: int  # 4 n + 3; see `entry_ptr`
    stride_t: int
    PLAIN: Any


class Pairs(NamedTuple):
    """One number a query and key, (B, Tq, Tk) or (B, H, Tq, Tk); of packed rows (1, H, P), see `load_pairs`."""

    ptr: Tensor | None
    stride_b: int  # 4 n + 3, of vectors of 16 where EVEN; see `load_pairs`
    stride_h: int  # the same
    stride_q: int  # the same
    stride_k: int
    PLAIN: Any
    EVEN: Any  # rows are whole vectors


def untold(n: int) -> int:
    """A number that varies with a length, as 4 n + 3: never 1, never a multiple of 16, so that none is a variant."""
    return 4 * n + 3


def _outer(given: Tensor | None, *strides: int) -> tuple[Any, ...]:
    """(pointer, strides, unit): a power of two up to 16 that divides all strides, as loads of vectors must know.

    Strides of whole vectors are so at any length, and the compiler sees that. All but the last of others are told as
    so many units, of which the compiler sees no more.
    """
    if given is None:
        return None, *(0 for _ in strides), _UNITS[16]
    unit = math.gcd(16, *strides)
    outer = strides if unit == 16 else (*(untold(n // unit) for n in strides[:-1]), strides[-1])
    return given, *outer, _UNITS[unit]


def sequences(x: Tensor | None, *, packed: bool) -> Sequences:
    """Rows of sequences, and what is known of where they begin."""
    strides = (0, 0) if x is None else (0 if packed else stride_of(x, 0), stride_of(x, x.dim() - 2))
    return Sequences(*_outer(x, *strides))


def heads(x: Tensor | None, *, packed: bool) -> Heads:
    """As `sequences`, with an axis of heads between sequences and rows."""
    strides = (0, 0, 0) if x is None else (0 if packed else stride_of(x, 0), stride_of(x, 1), stride_of(x, 2))
    return Heads(*_outer(x, *strides))


@rule
def width(n: int) -> Any:
    """A width of rows; one of whole units of 4 or 8, and not of 16, as a number that the compiler knows.

    It is a variant, then, whose rows are read 4 or 8 numbers at a time. (Of other widths the compiler is told that
    they are whole units of 16, or nothing.)
    """
    return n if INTERPRET or n % 4 or n % 16 == 0 else tl.constexpr(n)


def entries(x: Tensor | None, *, packed: bool) -> Entries:
    """The last stride is 1, or 0 of a broadcast tensor; in a transposed view it is a length."""
    if x is None:
        return Entries(None, 0, 0, _YES)
    stride_b, stride_t = 0 if packed else stride_of(x, 0), stride_of(x, x.dim() - 1)
    plain = stride_t <= 1
    return Entries(x, untold(stride_b), stride_t if plain else untold(stride_t), _YES if plain else _NO)


def pairs(x: Tensor | None, *, whole: bool = False) -> Pairs:
    """As `entries`; without an axis of heads all have the same numbers.

    whole: rows that are whole vectors, at this length, are a variant, which loads them as such.
    """
    if x is None:
        return Pairs(None, 0, 0, 0, 0, _YES, _NO)
    stride_b, stride_q, stride_k = stride_of(x, 0), stride_of(x, x.dim() - 2), stride_of(x, x.dim() - 1)
    outer = stride_b, 0 if x.dim() == 3 else stride_of(x, 1), stride_q
    plain = stride_k <= 1
    even = whole and stride_k == 1 and all(n % 16 == 0 for n in (x.shape[-1], *outer))
    outer = tuple(untold(n // 16 if even else n) for n in outer)
    return Pairs(x, *outer, stride_k if plain else untold(stride_k), _YES if plain else _NO, _YES if even else _NO)


def pairs_as(x: Tensor | None, shape: tuple[int, ...], *, packed: bool, whole: bool = False) -> Pairs:
    """`pairs` of what broadcasts to the shape (B, H, Tq, Tk); packed it is (1, H or 1, P), see `load_pairs`."""
    if x is None or not packed:
        return pairs(x if x is None else x.expand(shape), whole=whole)
    x = x.contiguous().expand(-1, shape[1], -1)
    return Pairs(x, untold(0), untold(stride_of(x, 1)), untold(0), 1, _YES, _NO)


@triton.jit
def units(n, UNIT: tl.constexpr):
    """A stride n, which is whole units: so that the compiler knows too."""
    return n if UNIT == 16 else n // UNIT * UNIT


@triton.jit
def pitch(x):
    """From a row to the next."""
    return units(x.stride_t, x.UNIT)


@triton.jit
def _outer_stride(n, UNIT: tl.constexpr):
    return n if UNIT == 16 else (n >> 2) * UNIT


@triton.jit
def first_row(x, seq):
    """The first row of a sequence; seq is an int64."""
    return x.ptr + seq * _outer_stride(x.stride_b, x.UNIT)


@triton.jit
def sequence_ptr(x, seq, row):
    """Rows of a sequence, one or a block of them."""
    return first_row(x, seq) + row.to(tl.int64) * pitch(x)


@triton.jit
def head_ptr(x, seq, head):
    """The first row of a head of a sequence, both int64; the next one is `pitch` on."""
    return x.ptr + (seq * _outer_stride(x.stride_b, x.UNIT) + head * _outer_stride(x.stride_h, x.UNIT))


@triton.jit
def entry_ptr(x, seq, row):
    """The numbers of rows of a sequence; seq is an int64."""
    if x.PLAIN:
        stride_t = x.stride_t
    else:
        stride_t = x.stride_t >> 2
    return x.ptr + seq * (x.stride_b >> 2) + row.to(tl.int64) * stride_t


@triton.jit
def whole_pitch(n, EVEN: tl.constexpr):
    """A length n; where it is known to be whole vectors of 16, so that the compiler knows too."""
    return n // 16 * 16 if EVEN else n


@triton.jit
def load_pairs(x, starts, seq, head, i, j, Tk, shown):
    """The numbers of queries i and keys j, whose shapes broadcast, of a head of a sequence, both int64.

    starts: of packed rows, see `inputs.pair_starts`; those of the sequence begin there, a query after the other, each
    over Tk keys. None: the strides say.
    """
    if starts is None:
        unit: tl.constexpr = 16 if x.EVEN else 1
        ptr = x.ptr + (seq * (x.stride_b >> 2) + head * (x.stride_h >> 2)) * unit
        ptr = ptr + i.to(tl.int64) * (x.stride_q >> 2) * unit
    else:
        ptr = x.ptr + head * (x.stride_h >> 2) + tl.load(starts + seq) + i.to(tl.int64) * Tk
    if x.PLAIN:
        stride_k = x.stride_k
    else:
        stride_k = x.stride_k >> 2
    return tl.load(ptr + j.to(tl.int64) * stride_k, mask=shown, other=0)


class Matrix(NamedTuple):
    """A tensor of two axes, the last with unit stride."""

    ptr: Tensor | None
    stride: Any  # see `width`


def matrix(x: Tensor) -> Matrix:
    """A tensor of two axes."""
    return Matrix(x, width(x.stride(0)))


@functools.lru_cache(maxsize=None, typed=True)  # typed: tuples of equal numbers are equal, whatever their fields
def constants(given: Any) -> Any:
    """A named tuple of flags or sizes, each known to the compiler."""
    return type(given)(*map(tl.constexpr, given))


def launch(kernel: Any, grid: tuple[int, ...], args: Mapping[str, Any], blocks: Any, **options: Any) -> None:
    """Launch a kernel with those of `args` that it names, on the device of their first tensor.

    blocks: a named tuple with `warps`, and where it has them `stages`; the kernel gets it as `blocks`. options: of
    the compiler, by Triton's names.
    """
    # By position: Triton takes twice as long to sort out names.
    values = [constants(blocks) if name == "blocks" else args[name] for name in kernel.arg_names]
    options["num_warps"] = blocks.warps
    if hasattr(blocks, "stages"):
        options.setdefault("num_stages", blocks.stages)
    if tape := writing.get():
        tape.launch(kernel, grid, values, options)
        return
    device = _device_of(values)
    if device < 0 or device == torch.cuda.current_device():
        kernel[grid](*values, **options)
    else:
        with torch.cuda.device(device):
            kernel[grid](*values, **options)


def _device_of(values: list[Any]) -> int:
    """The number of the GPU of the first tensor; -1 is a CPU."""
    for value in values:
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, Tensor):
                return x.get_device()
    raise AssertionError("a kernel has a tensor")
