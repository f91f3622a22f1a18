"""The location family, and its windowed form.

Sizes: B sequences of T rows, or S ragged ones of at most T; D, A (absent: linear score), R (absent: no
hop axis), gates (0 or 1); with left or right, or both, a window: one output a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_attn import location_attention

from .compile_case import CompileCase, SequenceCase, blocks
from .problem import BF16, F16, F32, Case, Cost, Inputs, Op, Sizes
from .sizes import costs, count_sequences, drawing, shape_of, structure_of, window_of


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    normal = drawing(dtype, device, seed)
    D, A = sizes["D"], sizes.get("A")
    hops = (sizes["R"],) if "R" in sizes else ()
    inner = hops if A is None else (A,)
    # Scales as of a trained layer: activations off their linear part, weights neither uniform nor one-hot.
    inputs = {"w": normal(D, *inner, std=2 * D**-0.5), "b": normal(*inner, std=0.1)}
    if A is not None:
        inputs["v"] = normal(A, *hops, std=2 * A**-0.5)
    if sizes.get("gates"):
        inputs |= {"gate_w": normal(D, *inner, std=2 * D**-0.5), "gate_b": normal(*inner, std=0.1)}
    return {"h": normal(*shape_of(sizes, "T", D)), **inputs, **structure_of(sizes, device, cu_seqlens="T")}


def _call(*, gate_w: Tensor | None = None, gate_b: Tensor | None = None, **arguments: Any) -> Tensor:
    gate = None if gate_w is None else (gate_w, gate_b)
    return location_attention(**arguments, gate=gate)  # type: ignore[return-value]


def _options(sizes: Sizes) -> Mapping[str, Any]:
    return {"window": window_of(sizes) if {"left", "right"} & set(sizes) else None}


def _cost(sizes: Sizes, itemsize: int) -> tuple[Cost, Cost]:
    D, A, R = sizes["D"], sizes.get("A"), sizes.get("R", 1)
    seqs, rows, index = count_sequences(sizes)
    if A is None:
        weights, biases = D * R, R
    else:
        projections = 1 + sizes.get("gates", 0)
        weights, biases = D * A * projections + A * R, A * projections
    window = _options(sizes)["window"]
    out = (seqs if window is None else rows) * R * D
    # A row meets every weight once, and R sums of D: of a window with two ends it is in many.
    sums = 1 if window is None or None in window else min(sum(window) + 1, sizes["T"])
    return costs(2 * rows * (weights + sums * R * D), itemsize, rows * D + weights + biases, out, index)


_GATED = {"D": 512, "A": 128, "gates": 1}
_BATCH = {"B": 64, "T": 1024, **_GATED}
_HAN = {"B": 2048, "T": 32, "D": 256, "A": 128}
_HOPS = {"B": 64, "T": 512, "D": 600, "A": 350, "R": 30}
_LINEAR = {"B": 256, "T": 1024, "D": 512}
_LONG = {"B": 8, "T": 4096, "D": 256, "A": 128}
_SMALL = {"D": 64, "A": 32}

TIMED = (
    Case("gated-bag", {"B": 1, "T": 100_000, **_GATED}),
    Case("gated-bag", {"B": 1, "T": 100_000, **_GATED}, F32),
    Case("gated-batch", _BATCH),
    Case("gated-ragged", {"S": 64, "T": 4096, **_GATED}),
    Case("han-words", _HAN),
    Case("hops", _HOPS),
    Case("linear", _LINEAR),
    Case("linear", _LINEAR, F32),
    Case("wide", {"B": 8, "T": 4096, "D": 2048, "A": 256}),
    # The reference makes all pairs of positions.
    Case("prefix", {**_LONG, "right": 0}, check={"B": 2}),
    Case("prefix", {**_LONG, "right": 0}, F32, check={"B": 2}),
    Case("context", {**_LONG, "left": 16, "right": 16}, check={"B": 2}),
    Case("prefix-small", {"B": 4, "T": 1024, **_SMALL, "right": 0}, F32, "cpu"),
    Case("gated-bag-small", {"B": 1, "T": 8192, **_SMALL, "gates": 1}, F32, "cpu"),
    Case("gated-ragged-small", {"S": 16, "T": 512, **_SMALL, "gates": 1}, F32, "cpu"),
    Case("han-words-small", {"B": 64, "T": 32, **_SMALL}, F32, "cpu"),
    Case("hops-small", {"B": 16, "T": 128, **_SMALL, "R": 4}, F32, "cpu"),
    Case("linear-small", {"B": 16, "T": 512, "D": 128}, F32, "cpu"),
)

OP = Op(family="location", inputs=_inputs, call=_call, cost=_cost, options=_options, cases=TIMED)


@dataclass(frozen=True)
class LocationCase(SequenceCase):
    """One call of the location family."""

    D: int
    A: int | None = None  # None: the linear score
    R: int = 1
    gates: int = 0
    value: int | None = None  # their width; None: the keys
    context: str | None = None  # "row", "sequence"
    activation: str = "tanh"
    mask: bool = True
    dropout: float = 0.0
    projected: bool = False  # no W: A = D
    smooth: bool = False  # the score goes through the logarithm of the sigmoid

    def _parts(self) -> tuple[str, ...]:
        return (
            f"B{self.B} T{self.T} D{self.D}",
            "linear" if self.A is None else f"A{self.A}",
            f"R{self.R}" * (self.R > 1),
            "gated" * self.gates,
            f"Dv{self.value}" * (self.value is not None),
            f"context/{self.context}" * (self.context is not None),
            self.activation * (self.activation != "tanh"),
            "ragged" * self.ragged,
            "dropout" * (self.dropout > 0),
            "tf32" * self.tf32,
            "projected" * self.projected,
            "smooth" * self.smooth,
        )

    def _launch(self) -> None:
        from fused_attn.kernels import location, location_bwd
        from fused_attn.kernels.inputs import LocationInputs

        rows, width = self._rows, self.R if self.A is None else self.A
        gate = (self._empty(self.D, width), self._empty(width)) if self.gates else (None, None)
        contexts = {"row": (*rows, width), "sequence": (self.B, width)}
        inputs = LocationInputs(
            self._empty(*rows, self.D),
            None if self.projected else self._empty(self.D, width),
            self._empty(width),
            None if self.A is None else self._empty(self.A, self.R),
            *gate,
            None if self.context is None else self._empty(*contexts[self.context]),
            None if self.value is None else self._empty(*rows, self.value),
            self._empty(*rows) if self.mask else None,
            self._empty(*rows, dtype=torch.bool) if self.mask else None,
            self._offsets,
            self._seed(self.dropout),
            self.activation,
            "sigmoid",
            self.dropout,
            self.context == "row",
            "logsigmoid" if self.smooth else "identity",
        )
        exact = self.dtype.itemsize == 2
        out, lse, scores, more = location.location_fwd(inputs, True, exact)
        saved = more if exact else out, lse, scores
        location_bwd.location_bwd(inputs, *saved, out, lse, scores, [x is not None for x in inputs[:9]])


@dataclass(frozen=True)
class WindowCase(SequenceCase):
    """The windowed form of the location family, from its scores on."""

    DV: int
    window: tuple[int | None, int | None]
    R: int = 1
    dropout: float = 0.0

    def _parts(self) -> tuple[str, ...]:
        return (
            f"B{self.B} T{self.T} Dv{self.DV} window{self.window}",
            f"R{self.R}" * (self.R > 1),
            "ragged" * self.ragged,
            "dropout" * (self.dropout > 0),
            "tf32" * self.tf32,
        )

    def _launch(self) -> None:
        from fused_attn.kernels import location_window, location_window_bwd
        from fused_attn.kernels.inputs import WindowInputs

        scores, value = self._empty(*self._rows, self.R, dtype=F32), self._empty(*self._rows, self.DV)
        inputs = WindowInputs(scores, value, self._offsets, self._seed(self.dropout), *self.window, self.dropout)
        exact = self.dtype.itemsize == 2
        out, lse, more = location_window.window_fwd(inputs, exact)
        location_window_bwd.window_bwd(inputs, more if exact else out, lse, out, lse, [True, True])


_MLP = [
    # gated MIL: one long bag, batches, ragged
    LocationCase(BF16, 1, 100_000, **_GATED, mask=False),
    LocationCase(BF16, **_BATCH),
    LocationCase(BF16, **{**_BATCH, "D": 1024, "A": 256}, ragged=True, mask=False),
    LocationCase(F32, **_BATCH),
    LocationCase(F32, **_BATCH, tf32=True),
    # HAN: short sentences, a context
    LocationCase(F16, **_HAN),
    LocationCase(BF16, 256, 64, 100, 100, context="row", ragged=True, mask=False, activation="relu"),
    LocationCase(F32, 256, 50, 100, 100, context="sequence"),
    # hops
    LocationCase(BF16, **_HOPS),
    LocationCase(F32, **_HOPS),
    LocationCase(BF16, 64, 512, 64, R=4, activation="identity"),
    # linear
    LocationCase(BF16, **_LINEAR),
    LocationCase(F32, **_LINEAR),
    # values apart, dropout, the widest and the narrowest
    LocationCase(BF16, 64, 512, 256, 64, value=128, dropout=0.1),
    LocationCase(BF16, 8, 4096, 2048, 1024, context="row", activation="gelu"),
    LocationCase(F32, 8, 4096, 2048, 1024, R=128),
    LocationCase(BF16, 4, 16, 1, 1),
    # one query a sequence of the concat family
    LocationCase(BF16, 32, 512, 256, 256, value=512, context="sequence", projected=True),
    LocationCase(F32, 80, 50, 1000, 1000, value=1000, context="sequence", dropout=0.1, projected=True),
    LocationCase(BF16, 32, 512, 256, 256, value=512, context="sequence", projected=True, smooth=True),
    LocationCase(F32, 8, 512, 256, 64, R=4, smooth=True),
    # and of four heads, with values of their own
    LocationCase(BF16, 32, 512, 512, 512, R=4, value=512, context="sequence", projected=True),
    LocationCase(F32, 32, 512, 512, 512, R=4, value=512, context="sequence", projected=True),
    # rows of vectors of 4
    LocationCase(BF16, 64, 1024, 300, 300, mask=False),
    LocationCase(BF16, 64, 512, 1500, 100, gates=1, ragged=True),
    LocationCase(BF16, 64, 512, 300, 100, R=4, context="row"),
    LocationCase(BF16, 64, 512, 300),
]
_WINDOWS = [
    WindowCase(BF16, 16, 4096, 256, (None, 0)),
    WindowCase(F32, 16, 4096, 256, (None, 0)),
    WindowCase(F32, 16, 4096, 256, (None, 0), tf32=True),
    WindowCase(BF16, 64, 100, 100, (None, -1), ragged=True),
    WindowCase(BF16, 64, 100, 64, (10**9, -(10**9)), ragged=True),  # no int32 as 4 n + 3
    WindowCase(F32, 64, 100, 100, (3, None), ragged=True),
    WindowCase(F16, 16, 1024, 64, (8, 8), R=4),
    WindowCase(F32, 16, 1024, 64, (8, 8), R=4, dropout=0.1),
    WindowCase(BF16, 4, 1024, 1024, (None, 0), R=30, dropout=0.1),
    WindowCase(BF16, 4, 1024, 1024, (None, None), ragged=True),
    WindowCase(F32, 4, 1024, 1000, (None, 0), R=3, ragged=True),
    WindowCase(BF16, 4, 20, 1, (None, 0)),
]
COMPILED: list[CompileCase] = [*_MLP, *_WINDOWS]
BRIEF = [_MLP[1], _MLP[9], _MLP[17], _WINDOWS[0]]
VARIED: dict[str, list[Any]] = {
    "location": [
        LocationCase(BF16, 3, 1, 64, 32, mask=False),
        LocationCase(BF16, 3, 1, 100, 50, gates=1),
        LocationCase(BF16, 3, 1, 64, 32, gates=1, ragged=True),
        LocationCase(BF16, 3, 1, 512, 128, R=4, ragged=True, mask=False),
        LocationCase(F32, 3, 1, 100, 63, context="row", value=36, dropout=0.1),
        LocationCase(F32, 3, 1, 33, R=5, mask=False),
        LocationCase(F16, 200, 1, 64, 32, context="sequence", activation="relu"),
        LocationCase(BF16, 3, 1, 300, 300, value=100, context="sequence", projected=True),
        LocationCase(F32, 3, 1, 2048, 64, ragged=True, mask=False),
    ],
    "location window": [
        WindowCase(BF16, 3, 1, 64, (None, 0)),
        WindowCase(F32, 3, 1, 100, (3, None), R=2),
        WindowCase(F32, 3, 1, 33, (8, 8), dropout=0.1),
        WindowCase(BF16, 3, 1, 64, (None, -1), ragged=True),
        WindowCase(F32, 3, 1, 100, (8, 8), ragged=True),
        WindowCase(BF16, 3, 1, 64, (None, 0), dropout=0.1, ragged=True),
    ],
}


def elements(kernel: str, constants: Mapping[str, Any]) -> int:
    """Rows by features by 64 of D; in a window, of a product of tiles."""
    if kernel.startswith("_location_window"):
        return blocks(constants, "T", "T")
    features = "K" if kernel == "_location_bwd_products_kernel" else "A"
    return max(1, blocks(constants, "T", "D", features) // 64)
