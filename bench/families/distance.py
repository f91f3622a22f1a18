"""The distance family, which runs on concat's kernels; sizes as there, p in place of relu."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fused_attn import distance_attention

from .concat import ConcatCase, _cost, _inputs
from .problem import BF16, F32, Case, Op, Sizes
from .sizes import window_of

_NP = {"Tq": 1024, "Tk": 1024, "A": 128, "Dv": 128}


def _options(sizes: Sizes) -> Mapping[str, Any]:
    return {"p": sizes["p"], "window": window_of(sizes)}


OP = Op(
    family="distance",
    inputs=_inputs,
    call=distance_attention,  # type: ignore[arg-type]
    cost=lambda sizes, itemsize: _cost({**sizes, "relu": 1}, itemsize),  # no special function an element
    options=_options,
    cases=(
        Case("laplace", {"B": 16, **_NP, "p": 1}, check={"B": 4}),
        Case("laplace", {"B": 16, **_NP, "p": 1}, F32, check={"B": 4}),
        Case("squares", {"B": 16, **_NP, "p": 2}, check={"B": 4}),
        Case("laplace-small", {"B": 4, **_NP, "Tq": 256, "Tk": 512, "p": 1}, F32, "cpu", check={"B": 2}),
    ),
)

COMPILED = [
    ConcatCase(BF16, 4, 1, 256, 512, 128, 128, "abs"),
    ConcatCase(F32, 4, 8, 256, 256, 64, 64, "square", mask=3, bias=True, window=(100, 0), dropout=0.1),
    ConcatCase(BF16, 16, 2, 100, 300, 100, 300, "square", ragged=True),
]
BRIEF = COMPILED[:1]
VARIED = {"distance": [ConcatCase(BF16, 3, 2, 1, 1, 64, 128, "abs", mask=2)]}
