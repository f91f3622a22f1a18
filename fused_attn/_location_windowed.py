"""The windowed form of location attention behind autograd: from scores and values to one output a position."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from . import reference
from ._operators import Operator, exact_of, launcher
from ._tracing import in_graph
from .blocked import location as blocked
from .kernels.inputs import WindowInputs


def _fwd(inputs: WindowInputs, in_blocks: bool, need_exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    if in_blocks:
        out, lse = blocked.window_fwd(inputs)
        return out, lse, out.new_empty(0)
    run = launcher("location_window.window_fwd")
    return cast("tuple[Tensor, Tensor, Tensor]", run(_clipped(inputs), need_exact))


def _clipped(inputs: WindowInputs) -> WindowInputs:
    """For the kernels, which take a side that reaches past the rows as open."""
    left, right = blocked.clip_window(inputs.left, inputs.right, inputs.scores.shape[-2])
    return inputs._replace(left=left, right=right)


def _fake(inputs: WindowInputs, in_blocks: bool, need_exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    scores, value, *_ = inputs
    wide = torch.promote_types(value.dtype, torch.float32)
    shape = (*scores.shape, value.shape[-1])
    return (
        scores.new_empty(shape, dtype=wide if in_blocks else value.dtype),
        scores.new_empty(*scores.shape, 2, dtype=wide),
        scores.new_empty(shape if need_exact else (0,), dtype=wide),
    )


def _bwd(
    inputs: WindowInputs,
    out: Tensor,
    lse: Tensor,
    exact: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    _: None,
    in_blocks: bool,
    need_exact: bool,
    needs: list[bool],
) -> list[Tensor | None]:
    if in_blocks:
        return blocked.window_bwd(inputs, lse, dout, dlse, needs)
    run = launcher("location_window_bwd.window_bwd")
    return cast("list[Tensor | None]", run(_clipped(inputs), exact_of(out, exact), lse, dout, dlse, needs))


def _formula(inputs: WindowInputs) -> tuple[Tensor, Tensor]:
    """What second derivatives are taken of: in blocks; to the compiler, which must know all sizes, of all pairs."""
    return reference.windowed_attention(inputs) if in_graph() else blocked.window_fwd(inputs)


WINDOW = Operator(
    "location_window",
    WindowInputs,
    differentiable="scores value",
    choices="bool in_blocks, bool need_exact",
    results="out lse exact?need_exact",
    saved="out lse exact",
    forward=_fwd,
    backward=_bwd,
    fake=_fake,
    formula=_formula,
)
