"""The statistics family.

Sizes: B sequences of T frames, or S ragged ones of at most T; D, A; channel (0 or 1): a weight a channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn import statistics_pooling

from .problem import Case, Cost, Inputs, Op, Sizes, ragged_lengths


def _statistics_inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    D, A = sizes["D"], sizes["A"]
    channels = (D,) if sizes.get("channel") else ()
    # Scales as of a trained layer: activations off their linear part, weights neither uniform nor one-hot.
    inputs = {
        "w": normal(D, A, std=2 * D**-0.5), "b": normal(A, std=0.1), "v": normal(A, *channels, std=2 * A**-0.5),
    }  # fmt: skip
    if "S" not in sizes:
        return {"h": normal(sizes["B"], sizes["T"], D), **inputs}
    lengths = torch.tensor([0, *ragged_lengths(sizes)], device=device)
    inputs["cu_seqlens"] = lengths.cumsum(0).to(torch.int32)
    return {"h": normal(sum(ragged_lengths(sizes)), D), **inputs}


def _statistics_call(**arguments: Tensor) -> Tensor:
    return torch.cat(statistics_pooling(**arguments), dim=-1)  # type: ignore[arg-type]


def _statistics_cost(sizes: Sizes, itemsize: int) -> tuple[Cost, Cost]:
    D, A = sizes["D"], sizes["A"]
    if "S" in sizes:
        seqs, rows, index = sizes["S"], sum(ragged_lengths(sizes)), 4 * (sizes["S"] + 1)
    else:
        seqs, rows, index = sizes["B"], sizes["B"] * sizes["T"], 0
    weights = D * A + A * (D if sizes.get("channel") else 1)
    read, out = rows * D + weights + A, 2 * seqs * D
    # A frame meets every weight once, and is in two sums of D.
    forward = Cost(2 * rows * (weights + 2 * D), itemsize * (read + out) + index)
    # Each product gives two, one for either operand; inputs and the output's gradient in, every gradient out.
    backward = Cost(2 * forward.flops, itemsize * (read + out + read) + index)
    return forward, backward


_ECAPA = {"D": 1536, "A": 128, "channel": 1}

STATISTICS = Op(
    family="statistics",
    inputs=_statistics_inputs,
    call=_statistics_call,
    cost=_statistics_cost,
    cases=(
        Case("okabe", {"B": 64, "T": 300, "D": 1500, "A": 64}),
        Case("okabe", {"B": 64, "T": 300, "D": 1500, "A": 64}, torch.float32),
        Case("okabe-128", {"B": 64, "T": 300, "D": 1536, "A": 128}),
        Case("okabe-ragged", {"S": 64, "T": 600, "D": 1536, "A": 128}),
        Case("okabe-recording", {"B": 1, "T": 60_000, "D": 1500, "A": 64}),
        Case("ecapa", {"B": 64, "T": 300, **_ECAPA}),
        Case("ecapa", {"B": 64, "T": 300, **_ECAPA}, torch.float32),
        Case("ecapa-ragged", {"S": 64, "T": 600, **_ECAPA}),
        Case("ecapa-recording", {"B": 1, "T": 60_000, **_ECAPA}, check={"T": 10_000}),
        Case("okabe-small", {"B": 8, "T": 100, "D": 128, "A": 16}, torch.float32, "cpu"),
        Case("ecapa-small", {"B": 8, "T": 100, "D": 128, "A": 16, "channel": 1}, torch.float32, "cpu"),
    ),
)
