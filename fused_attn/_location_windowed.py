"""The windowed form of location attention behind autograd: from scores and values to one output a position."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from . import reference
from ._location_blocked import blocked_bwd, blocked_fwd, clip_window
from ._ops import differentiable, raw_backward, raw_op, second_order

_TENSORS = 4  # tensor arguments of the raw forward
_GRADS = 2  # the leading ones of them that have gradients
_INPUTS = "Tensor scores, Tensor values, Tensor? cu_seqlens, Tensor? seed"
_OPTIONS = "int? left, int? right, float dropout_p, bool blocked"


def _fwd(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, blocked = args
    if blocked:
        return blocked_fwd(*inputs)
    from .kernels.location_window import window_fwd

    return window_fwd(*inputs[:_TENSORS], *_clipped(*inputs))


def _clipped(scores: Tensor, *args: Any) -> tuple[int | None, int | None, float]:
    """(left, right, dropout_p) for the kernels, which take a side that reaches past the rows as open."""
    *_, left, right, dropout_p = args
    return *clip_window(left, right, scores.shape[-2]), dropout_p


def _fwd_fake(scores: Tensor, values: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(values.dtype, torch.float32)
    return (
        scores.new_empty(*scores.shape, values.shape[-1], dtype=dtype),
        scores.new_empty(*scores.shape, 2, dtype=dtype),
    )


def _bwd(*args: Any) -> list[Tensor | None]:
    cotangents, tensors, results = args[:2], args[2 : 2 + _TENSORS], args[2 + _TENSORS : 4 + _TENSORS]
    *options, blocked, needs = args[4 + _TENSORS :]
    inputs: list[Any] = [*cotangents, *tensors]
    if blocked:
        grads = blocked_bwd(*inputs, results[1], *options, needs)  # type: ignore[call-arg]
    else:
        from .kernels.location_window_bwd import window_bwd

        grads = window_bwd(*inputs, *results, *_clipped(*tensors, *options), needs)
    return grads


_window_fwd = raw_op("location_window_fwd", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)", _fwd, _fwd_fake)
_window_bwd = raw_backward(
    "location_window_bwd",
    f"(Tensor dout, Tensor? dlse, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS}, bool[] needs)",
    _bwd,
    cotangents=2,
    gradients=_GRADS,
)


class WindowedAttention(torch.autograd.Function):
    """(out, lse) by the kernels or the blocked path, both differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # spelled out: torch.compile tells whether there is a ctx from the number of parameters
        scores: Tensor, values: Tensor, cu_seqlens: Tensor | None, seed: Tensor | None,
        left: int | None, right: int | None, dropout_p: float, blocked: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        results = _window_fwd(scores, values, cu_seqlens, seed, left, right, dropout_p, blocked)
        return cast("tuple[Tensor, Tensor]", results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:_TENSORS], *output)
        ctx.options = inputs[_TENSORS:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # once: activation checkpointing recomputes them at each look
        needs = ctx.needs_input_grad[:_GRADS]
        dout = torch.zeros_like(saved[_TENSORS]) if dout is None else dout
        grads = _windowed_backward(dout, dlse, *saved, *ctx.options, needs)
        none = [None] * (len(ctx.needs_input_grad) - _GRADS)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *none)


_windowed_attention = differentiable(WindowedAttention)


class _WindowedBackward(torch.autograd.Function):
    """The gradients of `WindowedAttention`; their own backward is that of `_formula`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # spelled out, as above
        dout: Tensor, dlse: Tensor | None, scores: Tensor, values: Tensor, cu_seqlens: Tensor | None,
        seed: Tensor | None, out: Tensor, lse: Tensor,
        left: int | None, right: int | None, dropout_p: float, blocked: bool, needs: tuple[bool, ...],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return tuple(_window_bwd(
            dout, dlse, scores, values, cu_seqlens, seed, out, lse, left, right, dropout_p, blocked, list(needs)
        ))  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[: 2 + _TENSORS])
        *ctx.options, _, ctx.needs = inputs[4 + _TENSORS :]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        cotangents, tensors = saved[:2], saved[2:]
        d_primals, d_cotangents = second_order(
            lambda *p: _formula(*p, *tensors[_GRADS:], *ctx.options),
            tensors[:_GRADS], cotangents, ctx.needs, grads,
        )  # fmt: skip
        none = [None] * (len(ctx.needs_input_grad) - 2 - _GRADS)
        return (*d_cotangents, *d_primals, *none)


_windowed_backward = differentiable(_WindowedBackward)


def _formula(
    scores: Tensor, values: Tensor, cu_seqlens: Tensor | None, seed: Tensor | None,
    left: int | None, right: int | None, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What second derivatives are taken of: in blocks; to the compiler, which must know all sizes, of all pairs."""
    if torch.compiler.is_compiling():
        return reference.windowed_attention(
            scores, values, cu_seqlens, seed, left=left, right=right, dropout_p=dropout_p
        )
    return blocked_fwd(scores, values, cu_seqlens, seed, left, right, dropout_p)
