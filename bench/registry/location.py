"""The location family.

Sizes: B sequences of T rows, or S ragged ones of at most T; D, A (absent: linear score), R (absent: no
hop axis), gates (0 or 1); with left or right, or both, a window: one output a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_attn import location_attention

from .problem import Case, Cost, Inputs, Op, Sizes, ragged_lengths, window_of


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
    window: tuple[int | None, int | None] | None,
    impl: str,
) -> Tensor:
    gate = None if gate_w is None else (gate_w, gate_b)
    return location_attention(h, w, b, v, gate=gate, cu_seqlens=cu_seqlens, window=window, impl=impl)  # type: ignore[return-value, arg-type]


def _location_options(sizes: Sizes) -> Mapping[str, Any]:
    return {"window": window_of(sizes) if {"left", "right"} & set(sizes) else None}


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
    window = _location_options(sizes)["window"]
    out = (seqs if window is None else rows) * R * D
    # A row meets every weight once, and R sums of D: of a window with two ends it is in many.
    sums = 1 if window is None or None in window else min(sum(window) + 1, sizes["T"])
    forward = Cost(2 * rows * (weights + sums * R * D), itemsize * (read + out) + index)
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
    options=_location_options,
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
        # The reference makes all pairs of positions.
        Case("prefix", {"B": 8, "T": 4096, "D": 256, "A": 128, "right": 0}, check={"B": 2}),
        Case("prefix", {"B": 8, "T": 4096, "D": 256, "A": 128, "right": 0}, torch.float32, check={"B": 2}),
        Case("context", {"B": 8, "T": 4096, "D": 256, "A": 128, "left": 16, "right": 16}, check={"B": 2}),
        Case("prefix-small", {"B": 4, "T": 1024, "D": 64, "A": 32, "right": 0}, torch.float32, "cpu"),
        Case("gated-bag-small", {"B": 1, "T": 8192, **_SMALL_GATED}, torch.float32, "cpu"),
        Case("gated-ragged-small", {"S": 16, "T": 512, **_SMALL_GATED}, torch.float32, "cpu"),
        Case("han-words-small", {"B": 64, "T": 32, "D": 64, "A": 32}, torch.float32, "cpu"),
        Case("hops-small", {"B": 16, "T": 128, "D": 64, "A": 32, "R": 4}, torch.float32, "cpu"),
        Case("linear-small", {"B": 16, "T": 512, "D": 128}, torch.float32, "cpu"),
    ),
)
