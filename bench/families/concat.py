"""The concat family.

Sizes: B sequences of Tq queries and Tk keys, or S ragged ones of at most that many; H (absent: no heads),
A, Dv; left, right (absent: that side of the window is open); relu (0 or 1: tanh), padded (0 or 1: a mask of keys).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fused_attn import concat_attention

from ..peers import Peer, concat_flex, concat_keops
from .compile_case import PairCase, blocks
from .problem import BF16, F16, F32, Case, Cost, Inputs, Op, Sizes
from .sizes import costs, count_rows, drawing, index_bytes, shape_of, structure_of, visible_pairs, window_of


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    normal = drawing(dtype, device, seed)
    heads, A = (sizes["H"],) if "H" in sizes else (), sizes["A"]
    inputs = {
        "query": normal(*shape_of(sizes, "Tq", A)),
        "key": normal(*shape_of(sizes, "Tk", A)),
        "value": normal(*shape_of(sizes, "Tk", sizes["Dv"])),
        "v": normal(*heads, A, std=2 * A**-0.5),  # scores spread by about 1: weights neither uniform nor one-hot
    }
    return inputs | structure_of(sizes, device, cu_seqlens_q="Tq", cu_seqlens_k="Tk")


def _options(sizes: Sizes) -> Mapping[str, Any]:
    return {"activation": "relu" if sizes.get("relu") else "tanh", "window": window_of(sizes)}


def _cost(sizes: Sizes, itemsize: int) -> tuple[Cost, Cost]:
    A, DV, H = sizes["A"], sizes["Dv"], sizes.get("H", 1)
    queries, keys = count_rows(sizes)
    pairs = H * visible_pairs(sizes)
    read, out = H * (queries * A + keys * (A + DV) + A), H * queries * DV
    # The scores are no product of matrices: `tanhs` has them.
    tanhs = 0 if sizes.get("relu") else pairs * A
    return costs(2 * pairs * DV, itemsize, read, out, index_bytes(sizes), tanhs)


def _peers(sizes: Sizes) -> Mapping[str, Peer]:
    if any(name in sizes for name in ("S", "left", "right", "padded")):
        return {}
    peers = {"keops": Peer(concat_keops, needs="pykeops")}
    if sizes["A"] <= 128:  # unrolled: on two cores of a CPU, 32 features took 18 s to compile and 128 took 92 s
        peers["flex"] = Peer(concat_flex, compile=True)
    return peers


_DECODER = {"B": 32, "Tq": 128, "Tk": 512, "A": 256, "Dv": 256}
_128 = {"A": 128, "Dv": 128}
_LONG = {"B": 2, "Tq": 128, "Tk": 65_536, **_128}
_WINDOW = {"left": 255, "right": 0}
_2048 = {"Tq": 2048, "Tk": 2048}

# The reference writes the activations, B·H·Tq·Tk·A of them, and its backward holds about five such tensors at once:
# at most 86 GB here, but for "long-window", which no GPU holds and where its failure is the result. In float64 they
# are four times as large: hence the sizes to check at.
TIMED = (
    Case("decoder", _DECODER),
    Case("decoder", _DECODER, F32),
    Case("decoder-step", {"B": 128, "Tq": 1, "Tk": 512, "A": 512, "Dv": 512}),
    Case("padded", {**_DECODER, "padded": 1}),
    Case("square", {"B": 4, "H": 4, **_2048, **_128}, check={"B": 1, "H": 2}),
    Case("long-keys", _LONG, check={"Tk": 16_384}),
    Case("long-keys", _LONG, F32, check={"Tk": 16_384}),
    Case("causal", {"B": 4, "H": 4, "Tq": 1024, "Tk": 1024, **_128, "right": 0}, check={"B": 1}),
    Case("window", {"B": 2, "H": 2, "Tq": 4096, "Tk": 4096, **_128, **_WINDOW}, check={"B": 1, **_2048}),
    Case("long-window", {"B": 1, "Tq": 32_768, "Tk": 32_768, **_128, **_WINDOW}, check=_2048),
    Case("ragged", {"S": 16, "Tq": 512, "Tk": 512, **_128}, check={"S": 8}),
    Case("relu", {"B": 8, "Tq": 1024, "Tk": 1024, **_128, "relu": 1}, check={"B": 4}),
    Case("decoder-small", {"B": 4, "Tq": 256, "Tk": 512, **_128}, F32, "cpu", check={"B": 2}),
    Case("window-small", {"B": 2, "Tq": 512, "Tk": 512, "A": 64, "Dv": 64, "left": 63, "right": 0}, F32, "cpu"),
)

OP = Op(
    family="concat",
    inputs=_inputs,
    call=concat_attention,  # type: ignore[arg-type]
    cost=_cost,
    options=_options,
    peers=_peers,
    cases=TIMED,
)


@dataclass(frozen=True)
class ConcatCase(PairCase):
    """One call of the concat family."""

    A: int
    DV: int
    activation: str = "tanh"
    weights: bool = False  # whether they are returned, and have a gradient
    smooth: bool = False  # the score goes through the logarithm of the sigmoid

    def _parts(self) -> tuple[str, ...]:
        return (
            f"B{self.B} H{self.H} Tq{self.Tq} Tk{self.Tk} A{self.A} Dv{self.DV} {self.activation}",
            f"mask{self.mask}" * (self.mask is not None),
            "bias" * self.bias,
            "window" * (self.window != (None, None)),
            "weights" * self.weights,
            "smooth" * self.smooth,
            self._of_ragged(),
            "dropout" * (self.dropout > 0),
        )

    def _launch(self) -> None:
        from fused_attn.kernels import concat, concat_bwd
        from fused_attn.kernels.inputs import ConcatInputs

        queries, keys = self._rows("queries"), self._rows("keys")
        rows = ((*queries, self.A), (*keys, self.A), (*keys, self.DV), (self.H, self.A))
        tensors = (*(self._empty(*shape) for shape in rows), *self._structure())
        smooth = "logsigmoid" if self.smooth else "identity"
        inputs = ConcatInputs(*tensors, self.activation, *self.window, self.dropout, smooth)
        exact = self.dtype.itemsize == 2
        out, lse, scores, more = concat.concat_fwd(inputs, self.weights, self.B * self.Tq * self.Tk, exact)
        needs = [True] * 4 + [self.bias]
        dscores = scores if self.weights else None
        concat_bwd.concat_bwd(inputs, more if exact else out, lse, out, None, dscores, needs)


COMPILED = [
    # the sizes that the bounds of tests/test_compile_report.py are for
    ConcatCase(BF16, 4, 1, 256, 512, 128, 128),
    ConcatCase(F32, 4, 1, 256, 512, 128, 128),
    # values wider than a block, or of rows that are vectors of 4, or of none
    ConcatCase(BF16, 4, 1, 256, 512, 128, 256),
    ConcatCase(BF16, 4, 1, 256, 512, 128, 512),
    ConcatCase(BF16, 4, 1, 256, 512, 100, 100),
    ConcatCase(BF16, 4, 1, 17, 512, 100, 300, "sigmoid", mask=2),
    ConcatCase(BF16, 4, 1, 16, 512, 128, 256, "sigmoid"),
    ConcatCase(BF16, 4, 1, 16, 512, 75, 75, "sigmoid", ragged=True),
    ConcatCase(F32, 4, 1, 256, 512, 128, 256),
    # a Bahdanau decoder step, sigmoid, odd widths
    ConcatCase(BF16, 80, 1, 1, 50, 1000, 1000, mask=2),
    ConcatCase(F32, 4, 1, 30, 60, 300, 300, "sigmoid", mask=2),
    ConcatCase(F16, 4, 1, 100, 100, 100, 100, "gelu", mask=3, bias=True),
    # heads, windows, ragged
    ConcatCase(BF16, 4, 8, 512, 512, 64, 64, "relu", window=(100, 0), dropout=0.1),
    ConcatCase(BF16, 16, 4, 256, 256, 64, 64, "leaky_relu", ragged=True),
    ConcatCase(BF16, 16, 1, 256, 256, 128, 128, ragged=True, window=(None, -1)),
    ConcatCase(BF16, 16, 2, 100, 300, 600, 300, "sigmoid", ragged=True, dropout=0.1),
    ConcatCase(F16, 16, 1, 256, 256, 100, 100, "gelu", ragged=True, window=(100, 0), dropout=0.1),
    ConcatCase(F32, 16, 1, 256, 256, 128, 128, ragged=True),
    ConcatCase(F32, 16, 1, 256, 256, 100, 300, "silu", ragged=True, window=(100, 0), dropout=0.1),
    ConcatCase(BF16, 4, 1, 256, 256, 1, 128, "identity", mask=2),
    ConcatCase(F32, 4, 1, 64, 64, 64, 128, "silu"),
    ConcatCase(F32, 4, 1, 64, 64, 64, 64, mask=3, bias=True, window=(100, 0), dropout=0.1),
    # ragged on one side
    ConcatCase(BF16, 64, 1, 1, 512, 100, 100, ragged=True, alone="keys"),
    ConcatCase(BF16, 16, 1, 1, 256, 128, 128, ragged=True, alone="keys"),
    ConcatCase(BF16, 16, 2, 256, 256, 100, 100, "sigmoid", ragged=True, alone="queries", mask=2, dropout=0.1),
    ConcatCase(F32, 16, 1, 256, 256, 128, 128, ragged=True, alone="keys", window=(None, -1)),
    ConcatCase(BF16, 16, 2, 256, 256, 128, 128, ragged=True, weights=True),
    ConcatCase(BF16, 16, 1, 256, 256, 100, 100, "gelu", ragged=True, weights=True, window=(100, 0), dropout=0.1),
    ConcatCase(F32, 16, 1, 256, 256, 128, 128, ragged=True, alone="keys", weights=True),
    # a term a pair of ragged rows
    ConcatCase(BF16, 16, 2, 256, 256, 128, 128, ragged=True, bias=True),
    ConcatCase(BF16, 16, 1, 256, 256, 100, 100, "gelu", ragged=True, mask=3, bias=True, window=(100, 0), dropout=0.1),
    ConcatCase(F32, 16, 1, 256, 256, 128, 300, "silu", ragged=True, alone="queries", mask=3, bias=True, weights=True),
    # the logarithm of the sigmoid
    ConcatCase(BF16, 4, 1, 256, 512, 128, 128, smooth=True),
    ConcatCase(BF16, 16, 1, 256, 256, 128, 512, "sigmoid", mask=2, weights=True, smooth=True),
    ConcatCase(F16, 4, 4, 256, 256, 100, 100, "gelu", mask=3, bias=True, window=(100, 0), dropout=0.1, smooth=True),
    ConcatCase(BF16, 16, 2, 256, 256, 128, 128, ragged=True, bias=True, weights=True, smooth=True),
    ConcatCase(F32, 4, 1, 256, 512, 128, 128, smooth=True),
    ConcatCase(
        F32, 16, 1, 256, 256, 100, 300, "silu", ragged=True, mask=2, window=(100, 0), dropout=0.1, smooth=True
    ),
    # ragged keys of which some are hidden
    ConcatCase(BF16, 16, 1, 256, 256, 128, 128, ragged=True, mask=2),
    ConcatCase(F32, 16, 1, 256, 256, 100, 300, "silu", ragged=True, mask=2, window=(100, 0), dropout=0.1),
]
BRIEF = [COMPILED[0], next(case for case in COMPILED if case.ragged and case.dtype == F32)]
VARIED = {
    "concat": [
        ConcatCase(BF16, 3, 1, 1, 1, 64, 64),
        ConcatCase(BF16, 3, 2, 1, 1, 100, 50, mask=2),
        ConcatCase(BF16, 3, 2, 1, 1, 64, 128, ragged=True),
        ConcatCase(F32, 3, 1, 1, 1, 100, 63, "sigmoid", mask=3, bias=True),
        ConcatCase(F32, 3, 2, 1, 1, 64, 64, "gelu", window=(5, 0), dropout=0.1),
        ConcatCase(F32, 3, 1, 1, 1, 33, 33, ragged=True, window=(None, -1)),
        ConcatCase(BF16, 3, 2, 1, 1, 64, 128, ragged=True, mask=2),
        ConcatCase(F16, 3, 2, 1, 1, 33, 64, mask=3, bias=True, window=(5, 0), dropout=0.1),
    ]
}


def elements(kernel: str, constants: Mapping[str, Any]) -> int:
    """Loops take two features, or two walked rows, a trip; one with `EXACT`."""
    sides = {"dq": ("M", "D"), "dkv": ("R", "D")}.get(kernel.split("_")[3], ("M", "N"))
    return (1 if constants.get("EXACT") else 2) * blocks(constants, *sides)
