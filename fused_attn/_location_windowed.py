"""The windowed form of location attention behind autograd: from scores and values to one output a position."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from . import reference
from ._operators import Operator, launcher
from ._tracing import in_graph
from .blocked import location as blocked


def _fwd(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, in_blocks = args
    if in_blocks:
        return blocked.window_fwd(*inputs)
    return cast("tuple[Tensor, Tensor]", launcher("location_window.window_fwd")(*inputs[:4], *_clipped(*inputs)))


def _clipped(scores: Tensor, *args: Any) -> tuple[int | None, int | None, float]:
    """(left, right, dropout_p) for the kernels, which take a side that reaches past the rows as open."""
    *_, left, right, dropout_p = args
    return *blocked.clip_window(left, right, scores.shape[-2]), dropout_p


def _fake(scores: Tensor, values: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(values.dtype, torch.float32)
    return (
        scores.new_empty(*scores.shape, values.shape[-1], dtype=dtype),
        scores.new_empty(*scores.shape, 2, dtype=dtype),
    )


def _bwd(*args: Any) -> list[Tensor | None]:
    *cotangents, scores, values, cu_seqlens, seed, out, lse, left, right, dropout_p, in_blocks, needs = args
    inputs: list[Any] = [*cotangents, scores, values, cu_seqlens, seed]
    if in_blocks:
        return blocked.window_bwd(*inputs, lse, left, right, dropout_p, needs)  # type: ignore[call-arg]
    grads = launcher("location_window_bwd.window_bwd")(
        *inputs, out, lse, *_clipped(scores, left, right, dropout_p), needs
    )
    return cast("list[Tensor | None]", grads)


def _formula(
    scores: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    left: int | None,
    right: int | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """What second derivatives are taken of: in blocks; to the compiler, which must know all sizes, of all pairs."""
    if in_graph():
        return reference.windowed_attention(
            scores, values, cu_seqlens, seed, left=left, right=right, dropout_p=dropout_p
        )
    return blocked.window_fwd(scores, values, cu_seqlens, seed, left, right, dropout_p)


WINDOW = Operator(
    "location_window",
    differentiable="scores values",
    constant="cu_seqlens? seed?",
    options="int? left, int? right, float dropout_p",
    choices="bool in_blocks",
    results="out lse",
    saved="out lse",
    forward=_fwd,
    backward=_bwd,
    fake=_fake,
    formula=_formula,
)
