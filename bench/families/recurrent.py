"""Word-by-word attention.

Sizes: B pairs of Tk words of a premise and Tq of a hypothesis, or S ragged ones of at most that many; D of both,
A; padded (0 or 1: a mask of the premise). The reference is the eager loop over the words of the hypothesis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fused_attn import word_by_word_attention

from .compile_case import CompileCase, blocks
from .problem import BF16, F16, F32, Case, Cost, Inputs, Op, Sizes
from .sizes import costs, count_rows, drawing, index_bytes, shape_of, structure_of, visible_pairs


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    normal = drawing(dtype, device, seed)
    D, A = sizes["D"], sizes["A"]
    inputs = {
        "premise": normal(*shape_of(sizes, "Tk", D)),
        "hypothesis": normal(*shape_of(sizes, "Tq", D)),
        "w_y": normal(D, A, std=D**-0.5),
        "w_h": normal(D, A, std=D**-0.5),
        "w_r": normal(D, A, std=D**-0.5),
        "w": normal(A, std=2 * A**-0.5),  # weights neither uniform nor one-hot
        "w_t": normal(D, D, std=D**-0.5),
    }
    return inputs | structure_of(sizes, device, cu_seqlens_premise="Tk", cu_seqlens_hypothesis="Tq")


def _cost(sizes: Sizes, itemsize: int) -> tuple[Cost, Cost]:
    D, A = sizes["D"], sizes["A"]
    words, premise_words = count_rows(sizes)
    pairs = visible_pairs(sizes)
    read = (premise_words + words) * D + 3 * D * A + A + D * D
    flops = 2 * (premise_words * D * A + words * (2 * D * A + D * D) + pairs * D)
    return costs(flops, itemsize, read, words * D, index_bytes(sizes), pairs * A)


_SNLI = {"B": 32, "Tk": 14, "Tq": 8}
_100 = {"D": 100, "A": 100}
_128 = {"D": 128, "A": 128}
_256 = {"D": 256, "A": 256}
_LARGE = {"B": 256, "Tk": 64, "Tq": 32, **_256}

TIMED = (
    # The paper's: sentences of SNLI, its smallest and its largest width.
    Case("entailment-100", {**_SNLI, **_100}),
    Case("entailment-100", {**_SNLI, **_100}, F32),
    Case("entailment-160", {**_SNLI, "D": 160, "A": 160, "padded": 1}),
    Case("large", _LARGE),
    Case("large", _LARGE, F32),
    Case("ragged", {"S": 256, "Tk": 64, "Tq": 32, **_256}),
    Case("long", {**_LARGE, "B": 64, "Tk": 1024}),
    Case("small", {**_SNLI, "B": 8, **_100}, F32, "cpu"),
)

OP = Op(
    family="recurrent",
    inputs=_inputs,
    call=word_by_word_attention,  # type: ignore[arg-type]
    cost=_cost,
    cases=TIMED,
)


@dataclass(frozen=True)
class WordCase(CompileCase):
    """One call of word-by-word attention."""

    B: int
    Tk: int
    Tq: int
    D: int
    A: int
    mask: bool = False
    weights: bool = False  # whether they are returned, and have a gradient
    ragged: bool = False
    scores: bool = False  # as weights
    alone: str = ""  # of ragged rows: "premise" or "hypothesis", where the others are padded

    lengths = ("Tk", "Tq")

    def _parts(self) -> tuple[str, ...]:
        options = (
            "mask" * self.mask,
            "weights" * self.weights,
            f"ragged {self.alone}".strip() * self.ragged,
            "scores" * self.scores,
        )
        return (f"B{self.B} Ty{self.Tk} Th{self.Tq} D{self.D} A{self.A}", *options)

    def _launch(self) -> None:
        from fused_attn.kernels import recurrent, recurrent_bwd
        from fused_attn.kernels.inputs import WordByWordInputs

        B, Tk, Tq, D, A = self.B, self.Tk, self.Tq, self.D, self.A
        packed = [self.ragged and self.alone in ("", side) for side in ("premise", "hypothesis")]
        premise, hypothesis = ((B * T,) if one else (B, T) for one, T in zip(packed, (Tk, Tq), strict=True))
        offsets = [self._empty(B + 1, dtype=torch.int32) if one else None for one in packed]
        shapes = ((*premise, D), (*hypothesis, D), (D, A), (D, A), (D, A), (A,), (D, D), (B, D))
        mask = self._empty(B, Tk, dtype=torch.bool) if self.mask else None
        inputs = WordByWordInputs(*(self._empty(*shape) for shape in shapes), mask, *offsets)
        recurrent.recurrent_fwd(inputs, self.weights, self.scores, False)
        out, weights, scores, states, key = recurrent.recurrent_fwd(inputs, self.weights, self.scores, True)
        dweights, dscores = weights if self.weights else None, scores if self.scores else None
        recurrent_bwd.recurrent_bwd(inputs, states, key, out, dweights, dscores, [True] * 8)


COMPILED = [
    # the paper's sizes: premise and hypothesis of a sentence each; widths that are whole vectors, and that are not
    WordCase(BF16, **_SNLI, **_100),
    WordCase(F32, **_SNLI, D=159, A=159, mask=True),
    WordCase(F16, **_SNLI, **_128, mask=True, weights=True),
    WordCase(BF16, **_SNLI, **_128, ragged=True),
    WordCase(BF16, **_SNLI, **_128, mask=True, weights=True, ragged=True, alone="hypothesis"),
    WordCase(F32, **_SNLI, **_100, ragged=True, alone="premise"),
    WordCase(F16, **_SNLI, **_128, mask=True, weights=True, scores=True),
    WordCase(F32, **_SNLI, D=159, A=159, mask=True, scores=True),
    # as much as is held on chip: few words of great width, many of small width
    WordCase(BF16, **_LARGE, mask=True),
    WordCase(F32, **_LARGE),
    WordCase(F32, 64, 32, 32, 512, 512, mask=True, weights=True),
    WordCase(BF16, 64, 128, 32, 64, 64, mask=True, weights=True),
    WordCase(F32, 64, 60, 32, 16, 1, mask=True),
    WordCase(BF16, 2, 35, 2, 19, 33, mask=True),
    # more than that: streamed
    WordCase(BF16, 16, 1000, 32, 256, 256, mask=True, weights=True),
    WordCase(F32, 16, 50, 32, 1000, 2000),
    WordCase(F16, **{**_LARGE, "A": 64}, ragged=True),
    WordCase(BF16, 16, 1000, 32, 256, 256, mask=True, weights=True, ragged=True, alone="hypothesis", scores=True),
    WordCase(F32, **_LARGE, mask=True, weights=True, scores=True),
    WordCase(BF16, **_LARGE, mask=True, weights=True, scores=True),
    WordCase(F32, 16, 8, 8, 3000, 20, mask=True),
]
BRIEF = [COMPILED[2], COMPILED[-1]]
VARIED = {
    "recurrent": [
        WordCase(BF16, 3, 1, 1, 64, 64),
        WordCase(F32, 3, 1, 1, 100, 50, mask=True, weights=True),
        WordCase(BF16, 3, 1, 1, 100, 100, ragged=True),
        WordCase(F32, 3, 1, 1, 1000, 2000, mask=True),
        WordCase(BF16, 3, 1, 1, 64, 64, mask=True, weights=True, ragged=True, alone="hypothesis"),
        WordCase(BF16, 3, 1, 1, 100, 100, ragged=True, alone="premise"),
    ]
}


def elements(kernel: str, constants: Mapping[str, Any]) -> int:
    """Words of the premise by features."""
    return blocks(constants, "N", "A")
