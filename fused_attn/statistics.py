"""Attentive statistics pooling: the weighted mean and standard deviation of the frames of a sequence.

The features u = act(h W + b + ctx) are PyTorch's: they are narrow beside the values. The operator takes them, or the
scores where a frame has one, and makes the softmax and both moments.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from . import reference
from ._checks import Checker, argument, check_activation, check_flag, check_number
from ._habits import explicit
from ._operators import Operator, launcher
from ._ops import Impl, exports_from_one, under_autocast, use_triton, weights_of_rows
from .kernels.inputs import StatisticsInputs
from .location import _TABLES as _SCORES
from .location import _unpack_jagged, check_context, check_score, check_sequences
from .segments import Offsets, as_offsets

_TABLES = {
    packed: {
        **{name: row for name, row in _SCORES[packed, "A"].items() if name != "score_bias"},
        "v": argument("A | A C", linear=True),
        "value": argument(f"{'N' if packed else 'B T'} C", optional=True),
    }
    for packed in (False, True)
}


def _fake(inputs: StatisticsInputs, need_scores: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, v, value, _, cu_seqlens = inputs
    seqs = value.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    channels = value.shape[-1]
    return (
        value.new_empty(seqs, channels, dtype=torch.float64),
        value.new_empty(seqs, channels, dtype=torch.float32),
        value.new_empty(seqs, 1 if v is None else channels, 2, dtype=torch.float32),
        value.new_empty(value.shape if need_scores else 0, dtype=torch.float32),
    )


def _bwd(inputs: StatisticsInputs, *args: Any) -> list[Tensor | None]:
    *args, _, needs = args  # type: ignore[assignment]
    return cast("list[Tensor | None]", launcher("statistics_bwd.statistics_bwd")(inputs, *args, needs))


_STATISTICS = Operator(
    "statistics",
    StatisticsInputs,
    differentiable="x v value",
    choices="bool need_scores",
    results="mean var lse scores?need_scores",
    saved="mean var lse scores",
    dense=2,
    forward=launcher("statistics.statistics_fwd"),
    backward=_bwd,
    fake=_fake,
    formula=reference.statistics_pooling,
)


@explicit
@exports_from_one
@under_autocast("h", "w", "b", "v", "context", "value")
def statistics_pooling(
    h: Tensor,
    w: Tensor | None = None,
    b: Tensor | None = None,
    v: Tensor | None = None,
    *,
    context: Tensor | None = None,
    value: Tensor | None = None,
    activation: str = "tanh",
    mask: Tensor | None = None,
    cu_seqlens: Offsets | None = None,
    floor: float = 1e-12,
    return_weights: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    r"""Mean and standard deviation of the frames of each sequence, weighted by an attention over the frames.

    .. math:: u_j = act(h_j W + b + ctx_j), \quad \alpha_{jc} = softmax_j(u_j \cdot v_c), \quad
        \mu_c = \sum_j \alpha_{jc} x_{jc}, \quad
        \sigma_c = \sqrt{\max\big(\sum_j \alpha_{jc} (x_{jc} - \mu_c)^2, floor\big)}

    One :math:`v` weights the frames for all channels alike (attentive statistics pooling); a :math:`v_c` a channel
    weights them for each (ECAPA-TDNN). A bias of the score, after :math:`v`, would cancel in the softmax: there is
    none. Without `w` and `v` all frames weigh the same (statistics pooling, as in x-vectors).

    The variance is taken about the mean, not as a difference of squares: channels far from 0 lose nothing. Where it
    is at most `floor`, :math:`\sigma = \sqrt{floor}` is a constant and sends no gradient. A sequence without a
    visible frame gives zeros for both, zero weights and zero gradients.

    Parameters
    ----------
    h
        Frames: ``(B, T, D)``; packed ``(N, D)`` with `cu_seqlens`; or a jagged ``torch.nested`` tensor.
        float16, bfloat16 or float32; float64 by the reference only.
    w, b
        ``(D, A)`` and ``(A,)`` or None.
    v
        ``(A,)``: one weight a frame; ``(A, C)``, C the width of the values: one a frame and channel.
    context
        Added before the activation. Padded: ``(B, A)`` or ``(B, T, A)``. Packed: ``(S, A)`` a sequence or ``(N, A)``
        a row, or with the choice made explicit ``(S, 1, A)`` and ``(1, N, A)``, which is needed where S = N.
    value
        What the statistics are of: ``(B, T, C)`` or ``(N, C)``; the frames `h` where None.
    activation
        identity, tanh, relu, sigmoid, leaky_relu (slope 0.2), gelu or silu.
    mask
        bool ``(B, T)`` or ``(N,)``, True = may be attended. What is masked is never read: it may be NaN. With `w` it
        costs a copy of `h`, whose masked rows have to be 0 for the gradient of W.
    cu_seqlens
        int32 ``(S + 1,)``: sequence s is the rows ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]`` of `h`.
    floor
        Least variance, in the squared unit of the values; at least 0.
    return_weights
        Return the weights too; they are differentiable. One a frame and channel are of the size of the values.
    impl
        ``"auto"``: the Triton kernel on a GPU, PyTorch elsewhere and for float64. ``"triton"`` and ``"reference"``
        never fall back.

    Returns
    -------
    (Tensor, Tensor) or (Tensor, Tensor, Tensor)
        Mean and standard deviation, ``(B, C)`` each, S for B where ragged, in the dtype of the values.
        Weights ``(B, T)`` or ``(N,)``, with ``v (A, C)`` ``(B, T, C)`` or ``(N, C)``; jagged for a jagged `h`.

    Raises
    ------
    ValueError, TypeError
        For arguments that do not fit, `w` without `v`, and an `impl` that cannot run here.

    References
    ----------
    Okabe et al. 2018 (attentive statistics pooling); Desplanques et al. 2020 (ECAPA-TDNN, one weight a channel);
    Snyder et al. 2018 (x-vectors, equal weights).

    """
    cu_seqlens = as_offsets(cu_seqlens)
    if not isinstance(h, Tensor):
        raise TypeError(f"h: expected a torch.Tensor; got {type(h).__name__}")
    return_weights = check_flag("return_weights", return_weights)
    offsets = None
    if h.is_nested:
        h, offsets, context, value, _, cu_seqlens = _unpack_jagged(h, context, value, None, mask, cu_seqlens)
    context_per_row = _validate_statistics(
        h, w, b, v, context, value, mask, cu_seqlens, activation, floor, jagged=offsets is not None
    )
    kernel = use_triton(impl, h.device, "has no float64" if h.dtype == torch.float64 else None)
    wide = torch.promote_types(h.dtype, torch.float32)
    if w is None or v is None:
        x = h.new_zeros(h.shape[:-1], dtype=wide)
    else:
        if mask is not None:  # 0 · NaN would be in the gradient of W
            (h,) = reference.hide(mask[..., None], h)
        x = _features(h, w, b, context, context_per_row, mask, cu_seqlens, activation)
        if v.dim() == 1:
            x = x.to(wide) @ v.to(wide)
        elif kernel:  # a product of 16-bit operands there
            x = x.to(h.dtype)
    per_channel = None if v is None or v.dim() == 1 else v
    return_scores = return_weights and per_channel is not None
    inputs = StatisticsInputs(x, per_channel, h if value is None else value, mask, cu_seqlens)
    if kernel:
        mean, var, lse, scores = _STATISTICS(inputs, return_scores)
        top, weights = lse[..., 0], None
        if return_weights:
            if per_channel is None:
                scores = (x if mask is None else x.masked_fill(~mask, -torch.inf))[..., None]
            weights = weights_of_rows(scores, lse, cu_seqlens)
    else:
        mean, var, top, weights = _STATISTICS.formula(inputs, weights_only=True)
    results = mean.to(h.dtype), _deviation(var, top, floor).to(h.dtype)
    if weights is None or not return_weights:
        return results

    weights = weights.to(h.dtype)
    weights = weights.squeeze(-1) if per_channel is None else weights
    if offsets is not None:
        weights = torch.nested.nested_tensor_from_jagged(weights, offsets)
    return *results, weights


def _features(
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    context: Tensor | None,
    context_per_row: bool,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> Tensor:
    h, w = reference.widened(h, w)  # a product of 16 bits overflows where its activation would not
    z = h @ w
    if b is not None:
        z = z + b
    if context is not None and context_per_row:
        z = z + context.reshape(z.shape)
    elif context is not None:
        context = context.reshape(context.shape[0], w.shape[1])
        z = z + (context[:, None] if cu_seqlens is None else context[reference.segment_ids(cu_seqlens, h.shape[0])])
    if mask is not None and context is not None:  # it may be NaN where it meets masked frames alone
        (z,) = reference.hide(mask[..., None], z)
    return reference.ACTIVATIONS[activation](z)


def _deviation(var: Tensor, top: Tensor, floor: float) -> Tensor:
    """sqrt(max(var, floor)), a constant at the floor; 0 where no frame is visible. NaN stays NaN."""
    low = var <= floor
    std = var.masked_fill(low, 1).sqrt()  # finite slope, for a gradient that is then 0
    return std.masked_fill(low, math.sqrt(floor)).masked_fill(top == -torch.inf, 0)


def _validate_statistics(
    h: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    v: Tensor | None,
    context: Tensor | None,
    value: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    floor: float,
    *,
    jagged: bool,
) -> bool:
    """Check every argument; return whether the context has one entry a row."""
    if (w is None) != (v is None):
        name = "w" if w is None else "v"
        raise ValueError(f"{name}: expected a tensor, w and v go together; got None")
    check = Checker(_TABLES[cu_seqlens is not None])
    check("h", h)
    if cu_seqlens is not None:
        check_sequences(check, cu_seqlens, h, jagged=jagged)
    if value is None:
        check.bind("C", h.shape[-1], "h")
    else:
        check("value", value)
    if w is None:
        for name, given in (("b", b), ("context", context)):
            if given is not None:
                raise ValueError(f"{name}: expected None without w, all frames weigh the same; got a tensor")
        check_activation("activation", activation)
    else:
        check_score(check, h, w, b, v, None, None, activation, "identity")
    check("mask", mask)
    least = check_number("floor", floor, "a finite number of at least 0", 0.0, math.inf)
    if math.sqrt(least) > torch.finfo(h.dtype).max:
        raise ValueError(f"floor: expected a number whose root {h.dtype} holds; got {floor}")
    return context is not None and check_context(check, "context", context)
