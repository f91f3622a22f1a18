"""The concat family.

Sizes: B sequences of Tq queries and Tk keys, or S ragged ones of at most that many; H (absent: no heads),
A, Dv; left, right (absent: that side of the window is open); relu (0 or 1: tanh), padded (0 or 1: a mask of keys).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_attn import concat_attention

from ..peers import Peer, concat_flex, concat_keops
from .problem import Case, Cost, Inputs, Op, Sizes, count_rows, ragged_lengths, visible_pairs, window_of


def _concat_inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    heads = (sizes["H"],) if "H" in sizes else ()
    rows = count_rows(sizes)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    def packed_or_padded(side: int, width: int) -> Tensor:
        if "S" in sizes:
            return normal(rows[side], *heads, width)
        return normal(sizes["B"], *heads, rows[side] // sizes["B"], width)

    A = sizes["A"]
    inputs = {
        "query": packed_or_padded(0, A),
        "key": packed_or_padded(1, A),
        "value": packed_or_padded(1, sizes["Dv"]),
        "v": normal(*heads, A, std=2 * A**-0.5),  # scores spread by about 1: weights neither uniform nor one-hot
    }
    if "S" in sizes:
        for name, axis in (("cu_seqlens_q", "Tq"), ("cu_seqlens_k", "Tk")):
            lengths = torch.tensor([0, *ragged_lengths(sizes, axis)], device=device)
            inputs[name] = lengths.cumsum(0).to(torch.int32)
    if sizes.get("padded"):
        lengths = torch.tensor(ragged_lengths(sizes, "Tk", "B"), device=device)
        inputs["mask"] = torch.arange(sizes["Tk"], device=device) < lengths[:, None]
    return inputs


def _concat_options(sizes: Sizes) -> Mapping[str, Any]:
    return {
        "activation": "relu" if sizes.get("relu") else "tanh",
        "window": window_of(sizes),
    }


def _concat_cost(sizes: Sizes, itemsize: int) -> tuple[Cost, Cost]:
    A, DV, H = sizes["A"], sizes["Dv"], sizes.get("H", 1)
    queries, keys = count_rows(sizes)
    pairs = H * visible_pairs(sizes)
    index = 2 * 4 * (sizes["S"] + 1) if "S" in sizes else 0
    if sizes.get("padded"):
        index += keys  # the mask, a byte each
    read = H * (queries * A + keys * (A + DV) + A)
    out = H * queries * DV
    # The scores are no product of matrices: `tanhs` has them.
    tanhs = 0 if sizes.get("relu") else pairs * A
    forward = Cost(2 * pairs * DV, itemsize * (read + out) + index, tanhs)
    # To make the activations again is recomputation, and a tanh has its derivative.
    backward = Cost(2 * forward.flops, itemsize * (read + out + read) + index)
    return forward, backward


def _concat_peers(sizes: Sizes) -> Mapping[str, Peer]:
    if any(name in sizes for name in ("S", "left", "right", "padded")):
        return {}
    peers = {"keops": Peer(concat_keops, needs="pykeops")}
    if sizes["A"] <= 128:  # unrolled: on two cores of a CPU, 32 features took 18 s to compile and 128 took 92 s
        peers["flex"] = Peer(concat_flex, compile=True)
    return peers


# The reference writes the activations, B·H·Tq·Tk·A of them, and its backward holds about five such tensors at once:
# at most 86 GB here, but for "long-window", which no GPU holds and where its failure is the result. In float64 they
# are four times as large: hence the sizes to check at.
CONCAT = Op(
    family="concat",
    inputs=_concat_inputs,
    call=concat_attention,  # type: ignore[arg-type]
    cost=_concat_cost,
    options=_concat_options,
    peers=_concat_peers,
    cases=(
        Case("decoder", {"B": 32, "Tq": 128, "Tk": 512, "A": 256, "Dv": 256}),
        Case("decoder", {"B": 32, "Tq": 128, "Tk": 512, "A": 256, "Dv": 256}, torch.float32),
        Case("decoder-step", {"B": 128, "Tq": 1, "Tk": 512, "A": 512, "Dv": 512}),
        Case("padded", {"B": 32, "Tq": 128, "Tk": 512, "A": 256, "Dv": 256, "padded": 1}),
        Case(
            "square", {"B": 4, "H": 4, "Tq": 2048, "Tk": 2048, "A": 128, "Dv": 128}, check={"B": 1, "H": 2},
        ),
        Case("long-keys", {"B": 2, "Tq": 128, "Tk": 65_536, "A": 128, "Dv": 128}, check={"Tk": 16_384}),
        Case(
            "long-keys", {"B": 2, "Tq": 128, "Tk": 65_536, "A": 128, "Dv": 128}, torch.float32, check={"Tk": 16_384}
        ),
        Case("causal", {"B": 4, "H": 4, "Tq": 1024, "Tk": 1024, "A": 128, "Dv": 128, "right": 0}, check={"B": 1}),
        Case(
            "window", {"B": 2, "H": 2, "Tq": 4096, "Tk": 4096, "A": 128, "Dv": 128, "left": 255, "right": 0},
            check={"B": 1, "Tq": 2048, "Tk": 2048},
        ),
        Case(
            "long-window", {"B": 1, "Tq": 32_768, "Tk": 32_768, "A": 128, "Dv": 128, "left": 255, "right": 0},
            check={"Tq": 2048, "Tk": 2048},
        ),
        Case("ragged", {"S": 16, "Tq": 512, "Tk": 512, "A": 128, "Dv": 128}, check={"S": 8}),
        Case("relu", {"B": 8, "Tq": 1024, "Tk": 1024, "A": 128, "Dv": 128, "relu": 1}, check={"B": 4}),
        Case(
            "decoder-small", {"B": 4, "Tq": 256, "Tk": 512, "A": 128, "Dv": 128}, torch.float32, "cpu",
            check={"B": 2},
        ),
        Case(
            "window-small", {"B": 2, "Tq": 512, "Tk": 512, "A": 64, "Dv": 64, "left": 63, "right": 0}, torch.float32,
            "cpu",
        ),
    ),
)  # fmt: skip
