"""The general family.

Sizes: B sequences of Tq queries and Tk keys, H (absent: no heads), D, Dv (absent: the values are the
keys), weight (0 or 1), left, right (absent: that side of the window is open).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fused_attn import general_attention

from ..peers import Peer, general_flex, general_sdpa
from .compile_case import PairCase, blocks
from .problem import BF16, F16, F32, Case, Cost, Inputs, Op, Sizes
from .sizes import costs, count_rows, drawing, shape_of, visible_pairs, window_of


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    normal = drawing(dtype, device, seed)
    D = sizes["D"]
    inputs = {"query": normal(*shape_of(sizes, "Tq", D)), "key": normal(*shape_of(sizes, "Tk", D))}
    if "Dv" in sizes:
        inputs["value"] = normal(*shape_of(sizes, "Tk", sizes["Dv"]))
    if sizes.get("weight"):
        inputs["weight"] = normal(D, D, std=D**-0.5)
    return inputs


def _options(sizes: Sizes) -> Mapping[str, Any]:
    return {"scale": sizes["D"] ** -0.5, "window": window_of(sizes)}


def _cost(sizes: Sizes, itemsize: int) -> tuple[Cost, Cost]:
    D, H = sizes["D"], sizes.get("H", 1)
    queries, keys = (H * n for n in count_rows(sizes))
    width = sizes.get("Dv", D)
    weights = D * D if sizes.get("weight") else 0
    flops = 2 * H * visible_pairs(sizes) * (D + width) + 2 * queries * weights
    return costs(flops, itemsize, queries * D + keys * (D + sizes.get("Dv", 0)) + weights, queries * width)


def _peers(sizes: Sizes) -> Mapping[str, Peer]:
    if sizes.get("weight") or "left" in sizes or sizes.get("right", 0):
        return {}
    return {"sdpa": Peer(general_sdpa), "flex": Peer(general_flex, compile=True)}


_STEP = {"B": 64, "Tq": 1, "Tk": 8192, "D": 256}
_SQUARE = {"B": 4, "H": 8, "Tq": 4096, "Tk": 4096}
_FEW = {"B": 1, "H": 2}
_BILINEAR = {"B": 32, "Tq": 128, "Tk": 512, "D": 256, "weight": 1}

TIMED = (
    # Values that are the keys: few queries (a decoder's step), then many.
    Case("shared-step", _STEP),
    Case("shared-steps", {**_STEP, "Tq": 16}),
    Case("shared-step", _STEP, F32),
    Case("shared", {**_SQUARE, "D": 128}, check=_FEW),
    Case("dot-64", {**_SQUARE, "D": 64, "Dv": 64}, check=_FEW),
    Case("dot-128", {**_SQUARE, "D": 128, "Dv": 128}, check=_FEW),
    Case("causal-128", {**_SQUARE, "D": 128, "Dv": 128, "right": 0}, check=_FEW),
    Case("bilinear", _BILINEAR),
    Case("bilinear", _BILINEAR, F32),
    Case("bilinear-small", {"B": 4, "Tq": 64, "Tk": 256, "D": 64, "weight": 1}, F32, "cpu"),
    Case("causal-small", {"B": 2, "H": 2, "Tq": 256, "Tk": 256, "D": 32, "Dv": 32, "right": 0}, F32, "cpu"),
)

OP = Op(
    family="general",
    inputs=_inputs,
    call=general_attention,  # type: ignore[arg-type]
    cost=_cost,
    options=_options,
    peers=_peers,
    cases=TIMED,
)


@dataclass(frozen=True)
class GeneralCase(PairCase):
    """One call of the general family."""

    D: int
    DV: int | None = None  # None: the values are the keys
    activation: str = "identity"
    weights: bool = False  # whether they are returned, and have a gradient
    state: bool = False  # likewise the state
    smooth: bool = False  # the score goes through the logarithm of the sigmoid

    def _parts(self) -> tuple[str, ...]:
        return (
            f"B{self.B} H{self.H} Tq{self.Tq} Tk{self.Tk} D{self.D}",
            "shared" if self.DV is None else f"Dv{self.DV}",
            self.activation * (self.activation != "identity"),
            f"mask{self.mask}" * (self.mask is not None),
            "bias" * self.bias,
            "window" * (self.window != (None, None)),
            "weights" * self.weights,
            "state" * self.state,
            "smooth" * self.smooth,
            self._of_ragged(),
            "dropout" * (self.dropout > 0),
            "tf32" * self.tf32,
        )

    def _launch(self) -> None:
        from fused_attn.kernels import general, general_bwd
        from fused_attn.kernels.inputs import GeneralInputs

        queries, keys = self._rows("queries"), self._rows("keys")
        tensors = (
            self._empty(*queries, self.D),
            self._empty(*keys, self.D),
            None if self.DV is None else self._empty(*keys, self.DV),
            *self._structure(),
        )
        smooth = "logsigmoid" if self.smooth else "identity"
        inputs = GeneralInputs(*tensors, self.activation, 0.125, *self.window, self.dropout, smooth)
        exact = self.dtype.itemsize == 2
        natural = self.weights or self.state
        out, lse, scores, more = general.general_fwd(inputs, self.weights, self.B * self.Tq * self.Tk, natural, exact)
        needs = [True, True, self.DV is not None, self.bias]
        dscores = scores if self.weights else None
        dlse = lse if self.state else None
        general_bwd.general_bwd(inputs, more if exact else out, lse, out, dlse, dscores, natural, needs)


_ALL = {"mask": 3, "window": (100, 0), "bias": True, "weights": True, "dropout": 0.1}

COMPILED = [
    # many queries: the sizes that tests/test_compile_report.py asks for matrix units
    GeneralCase(BF16, 4, 8, 4096, 4096, 64, 64),
    GeneralCase(BF16, 4, 8, 4096, 4096, 128, 128),
    GeneralCase(BF16, 4, 8, 4096, 4096, 128, window=(None, 0)),
    GeneralCase(F16, 4, 4, 1024, 1024, 256, 256),
    GeneralCase(BF16, 4, 4, 1024, 1024, 256),
    # a decoder's step: keys in parts
    GeneralCase(BF16, 8, 1, 1, 8192, 128),
    GeneralCase(BF16, 64, 1, 1, 50, 1000, mask=2),
    GeneralCase(F16, 8, 1, 16, 8192, 256, 64),
    # wider than a tile, and narrow
    GeneralCase(BF16, 8, 1, 512, 512, 600),
    GeneralCase(BF16, 8, 1, 512, 512, 1024, 1024, mask=2),
    GeneralCase(BF16, 8, 1, 512, 512, 64, 600),
    GeneralCase(F16, 8, 1, 100, 100, 1, 1),
    GeneralCase(BF16, 4, 8, 4096, 4096, 100, 100),
    # a mask of keys alone, as padded batches have it, and a window
    GeneralCase(BF16, 16, 8, 512, 512, 64, 64, mask=2),
    GeneralCase(BF16, 16, 8, 512, 512, 128, 128, mask=2),
    GeneralCase(BF16, 16, 4, 512, 512, 256, 256, mask=2, window=(None, 0)),
    GeneralCase(F16, 16, 1, 100, 100, 200, mask=2),
    GeneralCase(F16, 16, 1, 100, 100, 100, 75, mask=3, window=(100, 0)),
    # a term a pair
    GeneralCase(BF16, 4, 8, 1024, 1024, 128, 128, bias=True),
    GeneralCase(BF16, 4, 8, 1024, 1024, 64, 64, mask=3),
    GeneralCase(BF16, 4, 8, 1024, 1024, 128, 128, weights=True),
    # a state, whose maximum is in natural units
    GeneralCase(BF16, 4, 8, 1024, 1024, 128, 128, state=True),
    GeneralCase(F16, 4, 8, 1024, 1024, 64, mask=2, state=True),
    GeneralCase(BF16, 4, 4, 512, 512, 256, window=(None, 0), state=True),
    # the logarithm of the sigmoid
    GeneralCase(BF16, 4, 8, 1024, 1024, 64, 64, smooth=True),
    GeneralCase(BF16, 4, 8, 1024, 1024, 128, 128, mask=2, smooth=True),
    GeneralCase(BF16, 4, 4, 512, 512, 256, window=(None, 0), smooth=True),
    GeneralCase(BF16, 4, 4, 512, 512, 256, 256, "tanh", **_ALL, smooth=True),
    GeneralCase(F16, 16, 2, 256, 256, 128, 100, ragged=True, **{**_ALL, "window": (None, -1)}, smooth=True),
    GeneralCase(F32, 4, 8, 1024, 1024, 128, 128, **_ALL, smooth=True),
    # everything at once, and ragged
    GeneralCase(BF16, 4, 8, 512, 512, 128, 128, "tanh", **_ALL),
    GeneralCase(BF16, 4, 4, 512, 512, 256, 256, "gelu", **_ALL),
    GeneralCase(F16, 16, 4, 256, 256, 64, ragged=True, dropout=0.1),
    GeneralCase(BF16, 16, 1, 256, 256, 128, 128, ragged=True, window=(None, -1)),
    GeneralCase(BF16, 16, 4, 256, 256, 128, 128, ragged=True, mask=2),
    GeneralCase(BF16, 64, 1, 1, 512, 100, 100, ragged=True, alone="keys"),
    GeneralCase(BF16, 64, 1, 1, 512, 256, ragged=True, alone="keys"),
    GeneralCase(BF16, 64, 1, 1, 512, 256, ragged=True),
    GeneralCase(F16, 16, 4, 256, 256, 100, 100, ragged=True, alone="queries", mask=2, dropout=0.1),
    GeneralCase(F32, 16, 1, 256, 256, 64, 64, ragged=True, alone="keys", window=(None, -1)),
    GeneralCase(BF16, 16, 4, 256, 256, 64, 64, ragged=True, weights=True),
    GeneralCase(F16, 16, 2, 256, 256, 128, 100, "tanh", ragged=True, weights=True, window=(None, -1), dropout=0.1),
    GeneralCase(F32, 16, 1, 256, 256, 128, ragged=True, alone="keys", weights=True),
    GeneralCase(BF16, 16, 4, 256, 256, 256, 64, ragged=True),
    # a term a pair of ragged rows
    GeneralCase(BF16, 16, 4, 256, 256, 64, 64, ragged=True, bias=True),
    GeneralCase(BF16, 16, 4, 256, 256, 256, ragged=True, mask=3, bias=True),
    GeneralCase(F16, 16, 2, 256, 256, 128, 100, "tanh", ragged=True, **{**_ALL, "window": (None, -1)}),
    GeneralCase(F32, 16, 1, 256, 256, 128, ragged=True, alone="queries", mask=3, bias=True),
    # sides that are no int32 as 4 n + 3
    GeneralCase(BF16, 2, 2, 64, 64, 64, 64, window=(10**9, -(10**9))),
    # float32
    GeneralCase(F32, 4, 8, 1024, 1024, 64, 64),
    GeneralCase(F32, 4, 8, 1024, 1024, 128),
    GeneralCase(F32, 4, 8, 1024, 1024, 128, 128, tf32=True),
    GeneralCase(F32, 8, 1, 1, 8192, 128),
    GeneralCase(F32, 8, 1, 512, 512, 600, 600, mask=2),
    GeneralCase(F32, 4, 1, 64, 64, 64, 64, "tanh", **_ALL),
]
BRIEF = COMPILED[3:4]
VARIED = {
    "general": [
        GeneralCase(BF16, 3, 2, 1, 1, 64, 64),
        GeneralCase(BF16, 3, 1, 1, 1, 128, mask=2),
        GeneralCase(BF16, 3, 2, 1, 1, 100, 50, window=(None, 0)),
        GeneralCase(BF16, 3, 2, 1, 1, 64, 64, ragged=True),
        GeneralCase(F32, 3, 2, 1, 1, 100, 33, "tanh", **{**_ALL, "window": (5, 0)}),
        GeneralCase(F32, 3, 1, 1, 1, 64, ragged=True, dropout=0.1),
        GeneralCase(BF16, 3, 2, 1, 1, 64, 64, ragged=True, mask=2),
        GeneralCase(F16, 3, 1, 1, 1, 600, 100, mask=3, bias=True),
        GeneralCase(BF16, 3, 2, 1, 1, 128, 128, **_ALL),
    ]
}


def elements(kernel: str, constants: Mapping[str, Any]) -> int:
    """A tile of scores."""
    return blocks(constants, "M", "N")
