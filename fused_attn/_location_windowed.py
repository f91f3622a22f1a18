"""The windowed form of location attention behind autograd: from scores and values to one output a position."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from . import reference
from ._operators import Operator, launcher
from ._tracing import in_graph
from .blocked import location as blocked
from .kernels.inputs import WindowInputs


def _fwd(inputs: WindowInputs, in_blocks: bool) -> tuple[Tensor, Tensor]:
    if in_blocks:
        return blocked.window_fwd(inputs)
    return cast("tuple[Tensor, Tensor]", launcher("location_window.window_fwd")(_clipped(inputs)))


def _clipped(inputs: WindowInputs) -> WindowInputs:
    """For the kernels, which take a side that reaches past the rows as open."""
    left, right = blocked.clip_window(inputs.left, inputs.right, inputs.scores.shape[-2])
    return inputs._replace(left=left, right=right)


def _fake(inputs: WindowInputs, in_blocks: bool) -> tuple[Tensor, Tensor]:
    scores, value, *_ = inputs
    dtype = torch.promote_types(value.dtype, torch.float32)
    return (
        scores.new_empty(*scores.shape, value.shape[-1], dtype=dtype),
        scores.new_empty(*scores.shape, 2, dtype=dtype),
    )


def _bwd(
    inputs: WindowInputs,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    in_blocks: bool,
    needs: list[bool],
) -> list[Tensor | None]:
    if in_blocks:
        return blocked.window_bwd(inputs, lse, dout, dlse, needs)
    grads = launcher("location_window_bwd.window_bwd")(_clipped(inputs), out, lse, dout, dlse, needs)
    return cast("list[Tensor | None]", grads)


def _formula(inputs: WindowInputs) -> tuple[Tensor, Tensor]:
    """What second derivatives are taken of: in blocks; to the compiler, which must know all sizes, of all pairs."""
    return reference.windowed_attention(inputs) if in_graph() else blocked.window_fwd(inputs)


WINDOW = Operator(
    "location_window",
    WindowInputs,
    differentiable="scores value",
    choices="bool in_blocks",
    results="out lse",
    saved="out lse",
    forward=_fwd,
    backward=_bwd,
    fake=_fake,
    formula=_formula,
)
