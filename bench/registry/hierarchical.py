"""The hierarchical family.

Sizes: G documents of 1 to L sentences of 1 to T words, ragged; D, and A of both levels.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from fused_attn import Score, hierarchical_attention

from ..peers import Peer, hierarchical_padded
from .problem import Case, Cost, Inputs, Op, Sizes


def hierarchical_lengths(sizes: Sizes) -> tuple[list[int], list[int]]:
    """Words of each sentence, and sentences of each document; of the problem, not of the draw of its inputs."""
    draw = random.Random(0)
    sentences = [draw.randint(1, sizes["L"]) for _ in range(sizes["G"])]
    return [draw.randint(1, sizes["T"]) for _ in range(sum(sentences))], sentences


def _hierarchical_inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    D, A = sizes["D"], sizes["A"]

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    inputs = {}
    for name, lengths in zip(("inner_offsets", "outer_offsets"), hierarchical_lengths(sizes), strict=True):
        inputs[name] = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    for level in ("inner", "outer"):  # scales as of a trained layer
        inputs[f"{level}_w"] = normal(D, A, std=2 * D**-0.5)
        inputs[f"{level}_b"] = normal(A, std=0.1)
        inputs[f"{level}_v"] = normal(A, std=2 * A**-0.5)
    return {"h": normal(int(inputs["inner_offsets"][-1]), D), **inputs}


def _hierarchical_call(
    *,
    h: Tensor,
    inner_offsets: Tensor,
    outer_offsets: Tensor,
    inner_w: Tensor,
    inner_b: Tensor,
    inner_v: Tensor,
    outer_w: Tensor,
    outer_b: Tensor,
    outer_v: Tensor,
    impl: str,
) -> Tensor:
    inner, outer = Score(inner_w, inner_b, inner_v), Score(outer_w, outer_b, outer_v)
    return hierarchical_attention(h, inner_offsets, outer_offsets, inner, outer, impl=impl)  # type: ignore[return-value, arg-type]


def _hierarchical_cost(sizes: Sizes, itemsize: int) -> tuple[Cost, Cost]:
    D, A = sizes["D"], sizes["A"]
    words, sentences = hierarchical_lengths(sizes)
    rows, segments, groups = sum(words), len(words), len(sentences)
    read = rows * D + 2 * (D * A + 2 * A)
    out, index = groups * D, 4 * (segments + groups + 2)
    # A word, and a sentence, meets every weight once and one sum of D.
    forward = Cost(2 * (rows + segments) * (D * A + A + D), itemsize * (read + out) + index)
    backward = Cost(2 * forward.flops, itemsize * (read + out + read) + index)
    return forward, backward


def _hierarchical_peers(sizes: Sizes) -> Mapping[str, Peer]:
    return {"padded": Peer(partial(hierarchical_padded, sentences=sizes["L"], words=sizes["T"]))}


HIERARCHICAL = Op(
    family="hierarchical",
    inputs=_hierarchical_inputs,
    call=_hierarchical_call,
    cost=_hierarchical_cost,
    peers=_hierarchical_peers,
    cases=(
        Case("han", {"G": 256, "L": 20, "T": 40, "D": 256, "A": 128}),
        Case("han", {"G": 256, "L": 20, "T": 40, "D": 256, "A": 128}, torch.float32),
        Case("han-100", {"G": 256, "L": 20, "T": 40, "D": 100, "A": 100}),
        Case("han-many", {"G": 2048, "L": 30, "T": 60, "D": 256, "A": 128}, check={"G": 256}),
        Case("han-long", {"G": 8, "L": 400, "T": 60, "D": 256, "A": 128}),
        Case("han-small", {"G": 16, "L": 10, "T": 20, "D": 64, "A": 32}, torch.float32, "cpu"),
    ),
)
