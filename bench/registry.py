"""What is measured, said once: each op's cases, inputs, arithmetic and traffic.

Speed, memory, plots and the README's tables all read `REGISTRY`. Adding a family is one `Op` at the end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fused_attn import location_attention

Sizes = Mapping[str, int]
Inputs = dict[str, Tensor]
MODES = ("forward", "forward+backward")


class Cost(NamedTuple):
    """The least that a computation has to do, whatever its implementation."""

    flops: int  # of its matrix products; recomputation and elementwise functions are not counted
    bytes: int  # each input read once, each output written once


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
    """The op on `inputs` and `impl`."""
    cost: Callable[[Sizes, int], tuple[Cost, Cost]]
    """(sizes, bytes of an element) -> cost of the forward, cost of the backward on its own."""
    cases: tuple[Case, ...]

    def work(self, case: Case, mode: str) -> Cost:
        """Cost of a case in one of `MODES`."""
        forward, backward = self.cost(case.sizes, case.dtype.itemsize)
        return forward if mode == "forward" else Cost(forward.flops + backward.flops, forward.bytes + backward.bytes)


# ---------------------------------------------------------------------------------------------------------------
# Location. Sizes: B sequences of T rows, or S ragged ones of at most T; D, A (absent: linear score), R (absent: no
# hop axis), gates (0 or 1).
# ---------------------------------------------------------------------------------------------------------------


def ragged_lengths(sizes: Sizes) -> list[int]:
    """Lengths of the S sequences. They belong to the problem, not to the draw of its inputs: one fixed seed."""
    draw = random.Random(0)
    return [draw.randint(min(16, sizes["T"]), sizes["T"]) for _ in range(sizes["S"])]


def _location_inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    D, A = sizes["D"], sizes.get("A")
    hops = (sizes["R"],) if "R" in sizes else ()
    inner = hops if A is None else (A,)
    # Scales as of a trained layer: activations off their linear part, weights neither uniform nor one-hot.
    inputs = {"w": normal(D, *inner, std=2 * D**-0.5), "b": normal(*inner, std=0.1)}
    if A is not None:
        inputs["v"] = normal(A, *hops, std=2 * A**-0.5)
    if sizes.get("gates"):
        inputs |= {"gate_w": normal(D, *inner, std=2 * D**-0.5), "gate_b": normal(*inner, std=0.1)}
    if "S" in sizes:
        lengths = torch.tensor([0, *ragged_lengths(sizes)], device=device)
        inputs["cu_seqlens"] = lengths.cumsum(0).to(torch.int32)
        rows: tuple[int, ...] = (sum(ragged_lengths(sizes)),)
    else:
        rows = (sizes["B"], sizes["T"])
    return {"h": normal(*rows, D), **inputs}


def _location_call(
    *,
    h: Tensor,
    w: Tensor,
    b: Tensor,
    v: Tensor | None = None,
    gate_w: Tensor | None = None,
    gate_b: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str,
) -> Tensor:
    gate = None if gate_w is None else (gate_w, gate_b)
    return location_attention(h, w, b, v, gate=gate, cu_seqlens=cu_seqlens, impl=impl)  # type: ignore[return-value, arg-type]


def _location_cost(sizes: Sizes, itemsize: int) -> tuple[Cost, Cost]:
    D, A, R = sizes["D"], sizes.get("A"), sizes.get("R", 1)
    if "S" in sizes:
        seqs, rows, index = sizes["S"], sum(ragged_lengths(sizes)), 4 * (sizes["S"] + 1)
    else:
        seqs, rows, index = sizes["B"], sizes["B"] * sizes["T"], 0
    if A is None:
        weights, biases = D * R, R
    else:
        projections = 1 + sizes.get("gates", 0)
        weights, biases = D * A * projections + A * R, A * projections
    read = rows * D + weights + biases
    out = seqs * R * D
    # A row meets every weight once, and R sums of D.
    forward = Cost(2 * rows * (weights + R * D), itemsize * (read + out) + index)
    # Each product gives two, one for either operand; inputs and the output's gradient in, every gradient out.
    backward = Cost(2 * forward.flops, itemsize * (read + out + read) + index)
    return forward, backward


_GATED = {"D": 512, "A": 128, "gates": 1}
_SMALL_GATED = {"D": 64, "A": 32, "gates": 1}

LOCATION = Op(
    family="location",
    inputs=_location_inputs,
    call=_location_call,
    cost=_location_cost,
    cases=(
        Case("gated-bag", {"B": 1, "T": 100_000, **_GATED}),
        Case("gated-bag", {"B": 1, "T": 100_000, **_GATED}, torch.float32),
        Case("gated-batch", {"B": 64, "T": 1024, **_GATED}),
        Case("gated-ragged", {"S": 64, "T": 4096, **_GATED}),
        Case("han-words", {"B": 2048, "T": 32, "D": 256, "A": 128}),
        Case("hops", {"B": 64, "T": 512, "D": 600, "A": 350, "R": 30}),
        Case("linear", {"B": 256, "T": 1024, "D": 512}),
        Case("linear", {"B": 256, "T": 1024, "D": 512}, torch.float32),
        Case("wide", {"B": 8, "T": 4096, "D": 2048, "A": 256}),
        Case("gated-bag-small", {"B": 1, "T": 8192, **_SMALL_GATED}, torch.float32, "cpu"),
        Case("gated-ragged-small", {"S": 16, "T": 512, **_SMALL_GATED}, torch.float32, "cpu"),
        Case("han-words-small", {"B": 64, "T": 32, "D": 64, "A": 32}, torch.float32, "cpu"),
        Case("hops-small", {"B": 16, "T": 128, "D": 64, "A": 32, "R": 4}, torch.float32, "cpu"),
        Case("linear-small", {"B": 16, "T": 512, "D": 128}, torch.float32, "cpu"),
    ),
)

REGISTRY: list[Op] = [LOCATION]
