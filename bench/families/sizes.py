"""What families make of their sizes: shapes, lengths, inputs, and costs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .problem import Cost, Inputs, Sizes


def ragged_lengths(sizes: Sizes, axis: str = "T", count: str = "S") -> list[int]:
    """Lengths of the S sequences. They belong to the problem, not to the draw of its inputs: one fixed seed."""
    draw = random.Random(0)
    return [draw.randint(min(16, sizes[axis]), sizes[axis]) for _ in range(sizes[count])]


def window_of(sizes: Sizes) -> tuple[int | None, int | None]:
    """Its sides; where neither is said, both are open."""
    return sizes.get("left"), sizes.get("right")


# ---------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------


def drawing(dtype: torch.dtype, device: torch.device, seed: int) -> Callable[..., Tensor]:
    """A function that draws one tensor after another: of its shape, normal with this `std`."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    return normal


def shape_of(sizes: Sizes, axis: str, width: int) -> tuple[int, ...]:
    """Of a tensor with a row for each place on an axis of time: padded, or packed where there are S sequences."""
    heads = (sizes["H"],) if "H" in sizes else ()
    if "S" in sizes:
        return sum(ragged_lengths(sizes, axis)), *heads, width
    return sizes["B"], *heads, sizes[axis], width


def offsets_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Where each of the packed sequences begins, and the end."""
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def structure_of(sizes: Sizes, device: torch.device, **axes: str) -> Inputs:
    """What is there beside the rows: the offsets of ragged ones, by name and axis, or the mask of padded keys."""
    if "S" in sizes:
        return {name: offsets_of(ragged_lengths(sizes, axis), device) for name, axis in axes.items()}
    if not sizes.get("padded"):
        return {}
    lengths = torch.tensor(ragged_lengths(sizes, "Tk", "B"), device=device)
    return {"mask": torch.arange(sizes["Tk"], device=device) < lengths[:, None]}


# ---------------------------------------------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------------------------------------------


def costs(flops: int, itemsize: int, read: int, out: int, index: int = 0, tanhs: int = 0) -> tuple[Cost, Cost]:
    """Of the forward and of the backward: elements read and written, and `index` bytes of offsets and masks."""
    forward = Cost(flops, itemsize * (read + out) + index, tanhs)
    # Each product gives two, one for either operand; inputs and the output's gradient in, every gradient out. To make
    # the activations again is recomputation, and a tanh has its derivative.
    return forward, Cost(2 * flops, itemsize * (read + out + read) + index)


def count_sequences(sizes: Sizes) -> tuple[int, int, int]:
    """Sequences, their rows, and bytes of their offsets, where there is one axis of time."""
    if "S" in sizes:
        return sizes["S"], sum(ragged_lengths(sizes)), 4 * (sizes["S"] + 1)
    return sizes["B"], sizes["B"] * sizes["T"], 0


def count_rows(sizes: Sizes) -> tuple[int, int]:
    """Rows of queries and of keys, over all sequences."""
    if "S" in sizes:
        return sum(ragged_lengths(sizes, "Tq")), sum(ragged_lengths(sizes, "Tk"))
    return sizes["B"] * sizes["Tq"], sizes["B"] * sizes["Tk"]


def index_bytes(sizes: Sizes) -> int:
    """Of the offsets of queries and of keys, or of a mask of the keys, a byte each."""
    return 2 * 4 * (sizes["S"] + 1) if "S" in sizes else sizes["B"] * sizes["Tk"] * sizes.get("padded", 0)


def visible_pairs(sizes: Sizes) -> int:
    """Pairs of a query and a key that it may see, over all sequences, of one head."""
    if "S" in sizes:
        lengths = list(zip(ragged_lengths(sizes, "Tq"), ragged_lengths(sizes, "Tk"), strict=True))
    elif sizes.get("padded"):
        lengths = [(sizes["Tq"], keys) for keys in ragged_lengths(sizes, "Tk", "B")]
    else:
        lengths = [(sizes["Tq"], sizes["Tk"])] * sizes["B"]

    def of_sequence(queries: int, keys: int) -> int:
        left, right = sizes.get("left", queries), sizes.get("right", keys)
        return sum(max(0, min(keys, i + right + 1) - max(0, i - left)) for i in range(queries))

    return sum(n * of_sequence(*shape) for shape, n in Counter(lengths).items())
