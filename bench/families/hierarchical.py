"""The hierarchical family.

Sizes: G documents of 1 to L sentences of 1 to T words, ragged; D, and A of both levels. Of its kernels the forward is
its own; the backward, and two launches, are those of the location family.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_attn import Score, hierarchical_attention

from ..peers import Peer, hierarchical_padded
from .compile_case import CompileCase, blocks
from .problem import BF16, F16, F32, Case, Cost, Inputs, Op, Sizes
from .sizes import costs, drawing, offsets_of


def _lengths(sizes: Sizes) -> tuple[list[int], list[int]]:
    """Words of each sentence, and sentences of each document; of the problem, not of the draw of its inputs."""
    draw = random.Random(0)
    sentences = [draw.randint(1, sizes["L"]) for _ in range(sizes["G"])]
    return [draw.randint(1, sizes["T"]) for _ in range(sum(sentences))], sentences


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    normal = drawing(dtype, device, seed)
    D, A = sizes["D"], sizes["A"]
    words, sentences = _lengths(sizes)
    inputs = {"inner_offsets": offsets_of(words, device), "outer_offsets": offsets_of(sentences, device)}
    for level in ("inner", "outer"):  # scales as of a trained layer
        inputs[f"{level}_w"] = normal(D, A, std=2 * D**-0.5)
        inputs[f"{level}_b"] = normal(A, std=0.1)
        inputs[f"{level}_v"] = normal(A, std=2 * A**-0.5)
    return {"h": normal(sum(words), D), **inputs}


def _call(*, h: Tensor, inner_offsets: Tensor, outer_offsets: Tensor, impl: str, **scores: Tensor) -> Tensor:
    inner, outer = (Score(*(scores[f"{level}_{x}"] for x in "wbv")) for level in ("inner", "outer"))
    return hierarchical_attention(h, inner_offsets, outer_offsets, inner, outer, impl=impl)  # type: ignore[return-value, arg-type]


def _cost(sizes: Sizes, itemsize: int) -> tuple[Cost, Cost]:
    D, A = sizes["D"], sizes["A"]
    words, sentences = _lengths(sizes)
    rows, segments, groups = sum(words), len(words), len(sentences)
    # A word, and a sentence, meets every weight once and one sum of D.
    flops = 2 * (rows + segments) * (D * A + A + D)
    return costs(flops, itemsize, rows * D + 2 * (D * A + 2 * A), groups * D, 4 * (segments + groups + 2))


def _peers(sizes: Sizes) -> Mapping[str, Peer]:
    return {"padded": Peer(partial(hierarchical_padded, sentences=sizes["L"], words=sizes["T"]))}


_HAN = {"G": 256, "L": 20, "T": 40, "D": 256, "A": 128}

TIMED = (
    Case("han", _HAN),
    Case("han", _HAN, F32),
    Case("han-100", {**_HAN, "D": 100, "A": 100}),
    Case("han-many", {**_HAN, "G": 2048, "L": 30, "T": 60}, check={"G": 256}),
    Case("han-long", {**_HAN, "G": 8, "L": 400, "T": 60}),
    Case("han-small", {"G": 16, "L": 10, "T": 20, "D": 64, "A": 32}, F32, "cpu"),
)

OP = Op(family="hierarchical", inputs=_inputs, call=_call, cost=_cost, peers=_peers, cases=TIMED)


@dataclass(frozen=True)
class HierarchicalCase(CompileCase):
    """One call of the hierarchical family, forward alone."""

    G: int
    S: int
    N: int
    D: int
    A: int | None  # None: linear scores
    outer_A: int | None
    gates: int = 0
    context: str | None = None  # "row" or "segment", at both levels
    activation: str = "tanh"
    mask: bool = True
    projected: bool = False  # no W: A = D

    def _parts(self) -> tuple[str, ...]:
        return (
            f"G{self.G} S{self.S} N{self.N} D{self.D}",
            *("linear" if width is None else f"A{width}" for width in (self.A, self.outer_A)),
            "gated" * self.gates,
            f"context/{self.context}" * (self.context is not None),
            self.activation * (self.activation != "tanh"),
            "tf32" * self.tf32,
            "projected" * self.projected,
        )

    def varied(self, draw: Callable[[], int]) -> HierarchicalCase:
        """The same with other numbers of rows and segments."""
        rows = draw()
        return replace(self, N=rows, S=min(draw(), rows))

    def _launch(self) -> None:
        from fused_attn.kernels import hierarchical
        from fused_attn.kernels.inputs import HierarchicalInputs

        def score(width: int | None, parents: int, rows: int) -> tuple[Tensor | None, ...]:
            A = width or 1
            gate = (self._empty(self.D, A), self._empty(A)) if self.gates else (None, None)
            context = {None: None, "row": self._empty(rows, A), "segment": self._empty(parents, A)}[self.context]
            w, v = None if self.projected else self._empty(self.D, A), self._empty(A, 1) if width else None
            return w, self._empty(A), v, *gate, context

        options = (self.activation, "sigmoid", self.context == "row")
        inputs = HierarchicalInputs(
            self._empty(self.N, self.D),
            *score(self.A, self.S, self.N),
            *score(self.outer_A, self.G, self.S),
            self._empty(self.N, dtype=torch.bool) if self.mask else None,
            self._empty(self.S + 1, dtype=torch.int32),
            self._empty(self.G + 1, dtype=torch.int32),
            *options,
            *options,
        )
        hierarchical.hierarchical_fwd(inputs, self.dtype.itemsize == 2)


_DOCUMENTS = {"G": 256, "S": 2560, "N": 51_200}
_MANY = {"G": 512, "S": 8192, "N": 300_000}
_256 = {"D": 256, "A": 128, "outer_A": 128}
_100 = {"D": 100, "A": 100, "outer_A": 100}
_WIDEST = {"D": 256, "A": 256, "outer_A": 256}
_LINEAR = {"D": 256, "A": None, "outer_A": None}

COMPILED = [
    # HAN: words of a recurrent layer, ragged
    HierarchicalCase(BF16, **_DOCUMENTS, **_256, mask=False),
    HierarchicalCase(BF16, **_DOCUMENTS, **_100),
    HierarchicalCase(BF16, **_DOCUMENTS, **{**_256, "D": 200}),
    HierarchicalCase(F16, 64, 640, 12_800, 64, 64, 32, context="row", activation="relu"),
    HierarchicalCase(F32, **_DOCUMENTS, **_256, mask=False),
    HierarchicalCase(F32, **_DOCUMENTS, **_100, context="segment"),
    HierarchicalCase(F32, **_DOCUMENTS, **_256, gates=1, tf32=True),
    # the widest that fit, gated, and projected rows
    HierarchicalCase(BF16, **_MANY, **_WIDEST, gates=1, context="segment"),
    HierarchicalCase(BF16, **_MANY, **{**_WIDEST, "A": 1024}, gates=1, activation="gelu"),
    HierarchicalCase(F16, **_MANY, **_WIDEST, context="segment", projected=True),
    HierarchicalCase(F32, **_DOCUMENTS, D=128, A=128, outer_A=128, context="row", projected=True),
    # linear, and the narrowest
    HierarchicalCase(BF16, **_DOCUMENTS, **_LINEAR),
    HierarchicalCase(F32, **_DOCUMENTS, **_LINEAR, context="segment"),
    HierarchicalCase(BF16, 4, 8, 16, 1, 1, 1),
    # two launches: wider than the chip holds, and few long documents
    HierarchicalCase(BF16, **_DOCUMENTS, D=512, A=128, outer_A=128),
    HierarchicalCase(BF16, 2, 2000, 40_000, 256, 128, 128),
]
BRIEF = COMPILED[:1]
VARIED = {
    "hierarchical": [
        HierarchicalCase(BF16, 2, 1, 1, 64, 32, 32, mask=False),
        HierarchicalCase(BF16, 200, 1, 1, 100, 50, 50, gates=1, context="segment"),
        HierarchicalCase(F32, 2, 1, 1, 64, 63, 32, context="row"),
        HierarchicalCase(F32, 2, 1, 1, 512, 32, 16, mask=False),
        HierarchicalCase(BF16, 2, 1, 1, 512, None, None),
    ]
}


def elements(kernel: str, constants: Mapping[str, Any]) -> int:
    """Rows by features."""
    return blocks(constants, "T", "A")
