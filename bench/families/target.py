"""The family of target attention.

Sizes: B users with histories of T keys, or S ragged ones of at most T; D, A, K (absent: one layer); softmax (0 or 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fused_attn import target_attention

from .compile_case import SequenceCase, blocks
from .problem import BF16, F16, F32, Case, Cost, Inputs, Op, Sizes
from .sizes import costs, count_sequences, drawing, shape_of, structure_of


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    normal = drawing(dtype, device, seed)
    D, A, K = sizes["D"], sizes["A"], sizes.get("K")
    # Scales as of a trained layer: activations off their linear part, weights neither uniform nor one-hot.
    inputs = {"query": normal(count_sequences(sizes)[0], D), "key": normal(*shape_of(sizes, "T", D))}
    inputs |= {"w1": normal(4 * D, A, std=D**-0.5), "b1": normal(A, std=0.1), "b3": normal(std=0.1)}
    if K is not None:
        inputs |= {"w2": normal(A, K, std=2 * A**-0.5), "b2": normal(K, std=0.1)}
    last = A if K is None else K
    return {**inputs, "v": normal(last, std=2 * last**-0.5), **structure_of(sizes, device, cu_seqlens="T")}


def _call(**arguments: Any) -> Any:
    return target_attention(**{"w2": None, **arguments})


def _options(sizes: Sizes) -> Mapping[str, Any]:
    return {"softmax": bool(sizes.get("softmax"))}


def _cost(sizes: Sizes, itemsize: int) -> tuple[Cost, Cost]:
    D, A, K = sizes["D"], sizes["A"], sizes.get("K")
    seqs, rows, index = count_sequences(sizes)
    last = A if K is None else K
    second = 0 if K is None else A * K
    weights = 4 * D * A + A + second + (0 if K is None else K) + last + 1
    # A query meets two parts of W1; a key the matrix that its query makes, the other layers and the sum.
    flops = 2 * (seqs * D * A + rows * (D * A + second + last + D))
    return costs(flops, itemsize, (seqs + rows) * D + weights, seqs * D, index)


_DIN = {"D": 64, "A": 80, "K": 40}
_SMALL = {"D": 32, "A": 16, "K": 8}

TIMED = (
    Case("din", {"B": 4096, "T": 100, **_DIN}),
    Case("din", {"B": 4096, "T": 100, **_DIN}, F32),
    Case("din-ragged", {"S": 4096, "T": 200, **_DIN}),
    Case("din-softmax", {"B": 4096, "T": 100, **_DIN, "softmax": 1}),
    Case("din-long", {"B": 256, "T": 2000, "D": 128, "A": 128, "K": 64}),
    Case("one-layer", {"B": 4096, "T": 50, "D": 64, "A": 36}),
    Case("din-small", {"B": 64, "T": 50, **_SMALL}, F32, "cpu"),
    Case("din-ragged-small", {"S": 64, "T": 50, **_SMALL, "softmax": 1}, F32, "cpu"),
)

OP = Op(family="target", inputs=_inputs, call=_call, cost=_cost, options=_options, cases=TIMED)


@dataclass(frozen=True)
class TargetCase(SequenceCase):
    """One call of target attention."""

    D: int
    A: int
    K: int | None = None
    DV: int | None = None
    activation: str = "sigmoid"
    softmax: bool = False
    mask: bool = False
    weights: bool = False  # whether scores and the normaliser have a gradient too

    def _parts(self) -> tuple[str, ...]:
        return (
            f"B{self.B} T{self.T} D{self.D} A{self.A}",
            "" if self.K is None else f"K{self.K}",
            "" if self.DV is None else f"Dv{self.DV}",
            self.activation,
            "softmax" * self.softmax,
            "mask" * self.mask,
            "ragged" * self.ragged,
            "weights" * self.weights,
            "tf32" * self.tf32,
        )

    def _launch(self) -> None:
        from fused_attn.kernels import target, target_bwd
        from fused_attn.kernels.inputs import TargetInputs

        rows, new = self._rows, self._empty
        inputs = TargetInputs(
            new(self.B, self.D),
            new(*rows, self.D),
            new(self.D, self.A),
            new(4 * self.D, self.A)[3 * self.D :],
            new(self.B, self.A),
            None if self.K is None else new(self.A, self.K),
            None if self.K is None else new(self.K),
            new(self.A if self.K is None else self.K),
            new(1),
            None if self.DV is None else new(*rows, self.DV),
            new(*rows, dtype=torch.bool) if self.mask else None,
            self._offsets,
            self.activation,
            self.softmax,
            1.0,
        )
        out, lse, scores, exact = target.target_fwd(inputs, self.dtype.itemsize == 2)
        cotangents = out, lse if self.weights and self.softmax else None, scores if self.weights else None
        needs = [x is not None for x in inputs[:10]]
        exact = exact if exact.numel() else out
        target_bwd.target_bwd(inputs, exact, lse, scores, *cotangents, needs)


COMPILED = [
    TargetCase(BF16, 4096, 100, 64, 80, 40),
    TargetCase(BF16, 4096, 200, 64, 80, 40, ragged=True),
    TargetCase(BF16, 4096, 100, 64, 80, 40, softmax=True, mask=True, weights=True),
    TargetCase(BF16, 256, 2000, 128, 128, 64, activation="silu"),
    TargetCase(F16, 4096, 50, 64, 36, activation="relu"),  # one layer
    TargetCase(F16, 512, 100, 64, 64, 16, 64, "leaky_relu", softmax=True),  # features in float32
    TargetCase(BF16, 512, 50, 18, 80, 40, mask=True),  # rows that are no vectors
    TargetCase(BF16, 512, 100, 256, 512, 128, 256, ragged=True, softmax=True),  # W1 in parts
    TargetCase(BF16, 4, 16, 1, 1, 1),
    TargetCase(F32, 4096, 100, 64, 80, 40),
    TargetCase(F32, 512, 100, 128, 200, 80, 33, softmax=True, ragged=True, weights=True, tf32=True),
    TargetCase(F32, 512, 100, 256, 512, 128, softmax=True),
    TargetCase(F32, 4, 20, 7, 5),
]
BRIEF = [COMPILED[0], COMPILED[7]]
VARIED = {
    "target": [
        TargetCase(BF16, 3, 1, 64, 80, 40),
        TargetCase(BF16, 3, 1, 64, 80, 40, softmax=True, ragged=True),
        TargetCase(F32, 3, 1, 100, 63, softmax=True, mask=True, weights=True),
        TargetCase(F32, 3, 1, 18, 36, 20, ragged=True),
    ]
}


def elements(kernel: str, constants: Mapping[str, Any]) -> int:
    """Rows by features."""
    return blocks(constants, "T", "A")
