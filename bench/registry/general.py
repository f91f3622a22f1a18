"""The general family.

Sizes: B sequences of Tq queries and Tk keys, H (absent: no heads), D, Dv (absent: the values are the
keys), weight (0 or 1), left, right (absent: that side of the window is open).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_attn import general_attention

from ..peers import Peer, general_flex, general_sdpa
from .problem import Case, Cost, Inputs, Op, Sizes, count_rows, visible_pairs, window_of


def _general_inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    lead = (sizes["B"], *((sizes["H"],) if "H" in sizes else ()))
    D = sizes["D"]

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    inputs = {"query": normal(*lead, sizes["Tq"], D), "key": normal(*lead, sizes["Tk"], D)}
    if "Dv" in sizes:
        inputs["value"] = normal(*lead, sizes["Tk"], sizes["Dv"])
    if sizes.get("weight"):
        inputs["weight"] = normal(D, D, std=D**-0.5)
    return inputs


def _general_options(sizes: Sizes) -> Mapping[str, Any]:
    return {"scale": sizes["D"] ** -0.5, "window": window_of(sizes)}


def _general_cost(sizes: Sizes, itemsize: int) -> tuple[Cost, Cost]:
    D, H = sizes["D"], sizes.get("H", 1)
    queries, keys = (H * n for n in count_rows(sizes))
    width = sizes.get("Dv", D)
    weights = D * D if sizes.get("weight") else 0
    read = queries * D + keys * (D + sizes.get("Dv", 0)) + weights
    out = queries * width
    forward = Cost(2 * H * visible_pairs(sizes) * (D + width) + 2 * queries * weights, itemsize * (read + out))
    backward = Cost(2 * forward.flops, itemsize * (read + out + read))
    return forward, backward


def _general_peers(sizes: Sizes) -> Mapping[str, Peer]:
    if sizes.get("weight") or "left" in sizes or sizes.get("right", 0):
        return {}
    return {"sdpa": Peer(general_sdpa), "flex": Peer(general_flex, compile=True)}


GENERAL = Op(
    family="general",
    inputs=_general_inputs,
    call=general_attention,  # type: ignore[arg-type]
    cost=_general_cost,
    options=_general_options,
    peers=_general_peers,
    cases=(
        # Values that are the keys: few queries (a decoder's step), then many.
        Case("shared-step", {"B": 64, "Tq": 1, "Tk": 8192, "D": 256}),
        Case("shared-steps", {"B": 64, "Tq": 16, "Tk": 8192, "D": 256}),
        Case("shared-step", {"B": 64, "Tq": 1, "Tk": 8192, "D": 256}, torch.float32),
        Case("shared", {"B": 4, "H": 8, "Tq": 4096, "Tk": 4096, "D": 128}, check={"B": 1, "H": 2}),
        Case("dot-64", {"B": 4, "H": 8, "Tq": 4096, "Tk": 4096, "D": 64, "Dv": 64}, check={"B": 1, "H": 2}),
        Case("dot-128", {"B": 4, "H": 8, "Tq": 4096, "Tk": 4096, "D": 128, "Dv": 128}, check={"B": 1, "H": 2}),
        Case(
            "causal-128", {"B": 4, "H": 8, "Tq": 4096, "Tk": 4096, "D": 128, "Dv": 128, "right": 0},
            check={"B": 1, "H": 2},
        ),
        Case("bilinear", {"B": 32, "Tq": 128, "Tk": 512, "D": 256, "weight": 1}),
        Case("bilinear", {"B": 32, "Tq": 128, "Tk": 512, "D": 256, "weight": 1}, torch.float32),
        Case("bilinear-small", {"B": 4, "Tq": 64, "Tk": 256, "D": 64, "weight": 1}, torch.float32, "cpu"),
        Case(
            "causal-small", {"B": 2, "H": 2, "Tq": 256, "Tk": 256, "D": 32, "Dv": 32, "right": 0}, torch.float32,
            "cpu",
        ),
    ),
)  # fmt: skip
