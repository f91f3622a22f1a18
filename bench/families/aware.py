"""Location-aware attention: a step of a decoder is timed, an utterance is compiled.

Sizes: B sequences of Tk keys; A of the score, Dv of the values, C filters of width K; padded (0 or 1: a mask). The
reference makes the keys of the step in PyTorch, as the eager formula does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_attn import location_aware_attention

from .compile_case import CompileCase, blocks
from .problem import BF16, F16, F32, Case, Cost, Inputs, Op, Sizes
from .sizes import costs, drawing, structure_of, visible_pairs


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    normal = drawing(dtype, device, seed)
    B, Tk, A, Dv, C, K = (sizes[x] for x in ("B", "Tk", "A", "Dv", "C", "K"))
    inputs = {
        "query": normal(B, A),
        "key": normal(B, Tk, A),
        "value": normal(B, Tk, Dv),
        "v": normal(A, std=2 * A**-0.5),  # weights neither uniform nor one-hot
        "previous": normal(B, Tk).float().softmax(1).to(dtype),
        "conv_weight": normal(C, K),
        "u": normal(C, A),
    }
    return inputs | structure_of(sizes, device)


def _call(**given: Any) -> Tensor:
    return location_aware_attention(**given)[0]


def _cost(sizes: Sizes, itemsize: int) -> tuple[Cost, Cost]:
    B, Tk, A, Dv, C, K = (sizes[x] for x in ("B", "Tk", "A", "Dv", "C", "K"))
    read = B * (A + Tk * (A + Dv + 1)) + A + C * (K + A)
    keys = visible_pairs({**sizes, "Tq": 1})
    mask = B * Tk * sizes.get("padded", 0)
    return costs(2 * keys * (C * (K + A) + A + Dv), itemsize, read, B * Dv, mask, keys * A)


_TACOTRON = {"A": 128, "Dv": 512, "C": 32, "K": 31}
_LAS = {"A": 320, "Dv": 320, "C": 10, "K": 201}  # ESPnet's

TIMED = (
    Case("tacotron", {"B": 64, "Tk": 150, **_TACOTRON}),
    Case("tacotron-long", {"B": 64, "Tk": 800, **_TACOTRON, "padded": 1}),
    Case("tacotron-long", {"B": 64, "Tk": 800, **_TACOTRON, "padded": 1}, F32),
    Case("las", {"B": 32, "Tk": 400, **_LAS, "padded": 1}),
    Case("small", {"B": 4, "Tk": 60, "A": 32, "Dv": 32, "C": 8, "K": 9}, F32, "cpu"),
)

OP = Op(family="aware", inputs=_inputs, call=_call, cost=_cost, cases=TIMED)


@dataclass(frozen=True)
class StepCase(CompileCase):
    """One step of location-aware attention."""

    B: int
    Tk: int
    A: int
    Dv: int
    C: int
    K: int
    activation: str = "tanh"
    mask: bool = False
    bias: bool = False
    dropout: float = 0.0
    P: int = 0  # channels of the history; 0: it has no axis of them
    ragged: bool = field(default=False, kw_only=True)
    scores: bool = field(default=False, kw_only=True)  # whether they are returned, and have a gradient

    lengths = ("Tk",)

    def _parts(self) -> tuple[str, ...]:
        options = ("mask" * self.mask, "bias" * self.bias, "dropout" * bool(self.dropout))
        sizes = f"B{self.B} Tk{self.Tk} A{self.A} Dv{self.Dv} C{self.C} K{self.K} {self.activation}"
        return (sizes, f"P{self.P}" * bool(self.P), *options, "ragged" * self.ragged, "scores" * self.scores)

    def _history(self) -> tuple[int, ...]:
        return (self.P,) if self.P else ()

    def _launch(self) -> None:
        from fused_attn.kernels import location_aware, location_aware_bwd
        from fused_attn.kernels.inputs import LocationAwareInputs

        B, Tk, A, Dv, C, K = self.B, self.Tk, self.A, self.Dv, self.C, self.K
        P = self._history()
        rows = (B * Tk,) if self.ragged else (B, Tk)
        history = (*rows, *P) if self.ragged else (B, *P, Tk)
        shapes = (B, A), (*rows, A), (*rows, Dv), (A,), history, (C, *P, K), (C, A)
        inputs = LocationAwareInputs(
            *(self._empty(*shape) for shape in shapes),
            self._empty(*rows) if self.bias else None,
            self._empty(*rows, dtype=torch.bool) if self.mask else None,
            self._empty(B + 1, dtype=torch.int32) if self.ragged else None,
            self._seed(self.dropout),
            self.activation,
            self.dropout,
        )
        made = location_aware.location_aware_fwd(inputs, self.dtype.itemsize == 2, self.scores)
        out, weights, exact, scores = made
        kept = exact if exact.numel() else weights
        needs = [True] * 7 + [self.bias]
        dscores = scores if self.scores else None
        location_aware_bwd.location_aware_bwd(inputs, kept, out, weights, dscores, needs)


@dataclass(frozen=True)
class WalkCase(StepCase):
    """All steps of a sequence."""

    Tq: int = 1
    cumulative: bool = False
    smooth: bool = False  # the score goes through the logarithm of the sigmoid

    lengths = ("Tk", "Tq")

    def _parts(self) -> tuple[str, ...]:
        return (*super()._parts(), f"Tq{self.Tq}", "cumulative" * self.cumulative, "smooth" * self.smooth)

    def _launch(self) -> None:
        from fused_attn.kernels import location_aware_walk
        from fused_attn.kernels.inputs import LocationAwareSequenceInputs

        B, Tk, A, C, K = self.B, self.Tk, self.A, self.C, self.K
        P = self._history()
        shapes = (B, self.Tq, A), (B, Tk, A), (A,), (B, *P, Tk), (C, *P, K), (C, A)
        inputs = LocationAwareSequenceInputs(
            *(self._empty(*shape) for shape in shapes),
            self._empty(B, Tk) if self.bias else None,
            self._empty(B, Tk, dtype=torch.bool) if self.mask else None,
            self.activation,
            self.cumulative,
            "logsigmoid" if self.smooth else "identity",
        )
        location_aware_walk.location_aware_walk_fwd(inputs, False)
        weights, seen = location_aware_walk.location_aware_walk_fwd(inputs, True)
        location_aware_walk.location_aware_walk_bwd(inputs, weights, seen, weights, [True] * 6 + [self.bias])


COMPILED = [
    StepCase(BF16, 64, 150, **_TACOTRON, mask=True),
    StepCase(BF16, 64, 800, **_TACOTRON, mask=True),
    StepCase(F32, 64, 800, **_TACOTRON, mask=True),
    StepCase(BF16, 32, 400, **_LAS, mask=True, bias=True),
    StepCase(F32, 32, 400, **_LAS),
    # one item a sequence; widths that are not whole vectors; options
    StepCase(F16, 300, 20, 100, 50, 3, 5, "relu"),
    StepCase(F32, 300, 33, 159, 159, 40, 9, "gelu", mask=True, bias=True, dropout=0.1),
    StepCase(BF16, 8, 1000, 512, 1000, 64, 65, "sigmoid", mask=True, dropout=0.1),
    StepCase(F32, 2, 35, 1, 3, 1, 1, "identity"),
    # whole vectors of 4
    StepCase(BF16, 64, 800, 300, 300, 32, 31, mask=True),
    StepCase(F32, 64, 800, 100, 300, 32, 31, mask=True),
    # a history of several channels: Tacotron 2's, and ESPnet's of two dimensions
    StepCase(BF16, 64, 150, **_TACOTRON, mask=True, P=2),
    StepCase(F32, 64, 800, **_TACOTRON, mask=True, P=2),
    StepCase(F16, 32, 400, **_LAS, mask=True, P=5),
    StepCase(F32, 300, 33, 159, 159, 40, 9, "gelu", mask=True, bias=True, dropout=0.1, P=2),
    WalkCase(BF16, 64, 150, **_TACOTRON, mask=True, Tq=500, cumulative=True, P=2),
    WalkCase(F32, 64, 150, **_TACOTRON, mask=True, Tq=500, cumulative=True, P=2),
    WalkCase(F16, 32, 400, **_LAS, mask=True, Tq=50, P=5),
    StepCase(BF16, 64, 150, **_TACOTRON, mask=True, scores=True),
    StepCase(F32, 64, 800, **_TACOTRON, mask=True, scores=True),
    # packed rows: of several items a sequence, and of one
    StepCase(BF16, 64, 800, **_TACOTRON, mask=True, ragged=True),
    StepCase(F32, 64, 150, **_TACOTRON, P=2, ragged=True),
    StepCase(F16, 300, 20, 100, 50, 3, 5, "relu", mask=True, bias=True, dropout=0.1, ragged=True, scores=True),
    StepCase(F32, 300, 33, 159, 159, 40, 9, "gelu", P=2, mask=True, bias=True, dropout=0.1, ragged=True),
    # utterances
    WalkCase(BF16, 64, 150, **_TACOTRON, mask=True, Tq=500, cumulative=True),
    WalkCase(F32, 64, 150, **_TACOTRON, mask=True, Tq=500),
    WalkCase(BF16, 32, 400, **_LAS, mask=True, bias=True, Tq=50),
    WalkCase(F16, 30, 20, 100, 50, 3, 5, "relu", Tq=7),
    WalkCase(BF16, 64, 150, 300, 300, 32, 31, mask=True, Tq=50, cumulative=True),
    WalkCase(F16, 300, 20, 60, 476, 10, 201, "silu", mask=True, bias=True, Tq=50),
    WalkCase(F16, 300, 777, 16, 212, 40, 15, P=2, Tq=50, cumulative=True, smooth=True),
    WalkCase(F32, 30, 33, 159, 159, 40, 9, "gelu", mask=True, bias=True, Tq=7, cumulative=True),
    # the logarithm of the sigmoid
    WalkCase(BF16, 64, 150, **_TACOTRON, mask=True, bias=True, Tq=500, cumulative=True, P=2, smooth=True),
    WalkCase(F32, 64, 150, **_TACOTRON, mask=True, bias=True, Tq=500, cumulative=True, P=2, smooth=True),
    WalkCase(F16, 32, 400, **_LAS, mask=True, bias=True, Tq=50, smooth=True),
    WalkCase(F32, 30, 33, 159, 159, 40, 9, "gelu", mask=True, bias=True, Tq=7, smooth=True),
]
BRIEF = [*COMPILED[1:3], next(case for case in COMPILED if isinstance(case, WalkCase) and not case.P)]
VARIED = {
    "aware": [
        StepCase(BF16, 3, 1, 64, 64, 16, 31, mask=True),
        StepCase(F32, 3, 1, 100, 50, 3, 5, mask=True, bias=True, dropout=0.1),
        StepCase(BF16, 3, 1, 64, 64, 16, 31, mask=True, ragged=True),
        WalkCase(BF16, 3, 1, 64, 64, 16, 31, mask=True, Tq=1, cumulative=True),
        WalkCase(F32, 3, 1, 100, 50, 3, 5, bias=True, Tq=1),
    ]
}


def elements(kernel: str, constants: Mapping[str, Any]) -> int:
    """Keys by features, or by widths of the values."""
    return blocks(constants, "T", "A") if "values" not in kernel else blocks(constants, "T", "DV")
