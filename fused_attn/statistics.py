"""Attentive statistics pooling: the weighted mean and standard deviation of the frames of a sequence.

The features u = act(h W + b + ctx), or the scores where a frame has one, come from the kernels of location attention:
they are narrow beside the values. The operator makes the softmax and both moments of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import reference
from ._checks import Checker, argument, check_activation, check_number
from ._habits import explicit
from ._operators import Operator, launcher
from ._ops import Impl, exports_from_one, may_ask, under_autocast, use_triton, weights_of_rows
from ._results import PLAIN, beside, check_wanted
from .kernels.inputs import StatisticsInputs, features_dtype
from .location import _TABLES as _SCORES
from .location import _unpack_jagged, check_score, check_sequences, one_context
from .segments import Offsets, as_offsets

_TABLES = {
    packed: {
        **{name: row for name, row in _SCORES[packed, "A"].items() if name != "score_bias"},
        "v": argument("A | A C", linear=True),
        "value": argument(f"{'N' if packed else 'B T'} C", optional=True),
    }
    for packed in (False, True)
}


def _fake(inputs: StatisticsInputs, need_scores: bool, need_exact: bool) -> tuple[Tensor, ...]:
    h, _, _, v, _, value, _, cu_seqlens, *_ = inputs
    rows, (A, per_channel) = h.shape[:-1], (0, False) if v is None else (v.shape[0], v.dim() == 2)
    seqs = h.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    channels = (h if value is None else value).shape[-1]
    hops = channels if per_channel else 1
    made = v is not None and (need_scores or not per_channel)
    features = features_dtype(h.dtype, inputs.activation) if per_channel else h.dtype
    return (
        h.new_empty(seqs, channels),
        h.new_empty(seqs, channels),
        h.new_empty(seqs, hops, 2, dtype=torch.float32),
        h.new_empty((*rows, hops) if made else 0, dtype=torch.float32),
        h.new_empty((*rows, A) if per_channel and not inputs.bare() else 0, dtype=features),
        h.new_empty((5, seqs, channels) if need_exact else 0, dtype=torch.float32),
    )


def _bwd(inputs: StatisticsInputs, *args: Any) -> list[Tensor | None]:
    _mean, _std, *saved, dmean, dstd, dlse, dscores, _dx, _dexact, _, _, needs = args
    run = launcher("statistics_bwd.statistics_bwd")
    return cast("list[Tensor | None]", run(inputs, *saved, dmean, dstd, dlse, dscores, needs))


_STATISTICS = Operator(
    "statistics",
    StatisticsInputs,
    differentiable="h w b v context value",
    choices="bool need_scores, bool need_exact",
    results="mean std lse scores x exact?need_exact",
    saved="mean std lse scores x exact",
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
    context: Tensor | Sequence[Tensor] | None = None,
    value: Tensor | None = None,
    activation: str = "tanh",
    mask: Tensor | None = None,
    cu_seqlens: Offsets | None = None,
    floor: float = 1e-12,
    return_weights: bool = False,
    return_log_weights: bool = False,
    return_scores: bool = False,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, ...]:
    r"""Mean and standard deviation of the frames of each sequence, weighted by an attention over the frames.

    .. math:: u_j = act(h_j W + b + ctx_j), \quad \alpha_{jc} = softmax_j(u_j \cdot v_c), \quad
        \mu_c = \sum_j \alpha_{jc} x_{jc}, \quad
        \sigma_c = \sqrt{\max\big(\sum_j \alpha_{jc} (x_{jc} - \mu_c)^2, floor\big)}

    One :math:`v` weights the frames for all channels alike (attentive statistics pooling); a :math:`v_c` a channel
    weights them for each (ECAPA-TDNN). A bias of the score, after :math:`v`, would cancel in the softmax: there is
    none. Without `w` the features are act(h + b + ctx), of frames that were projected before, as where there is a
    batch norm between: `value` says then what is pooled. Without `v` too all frames weigh the same (statistics
    pooling, as in x-vectors).

    The variance is taken about the mean, not as a difference of squares: channels far from 0 lose nothing. Where it
    is at most `floor`, :math:`\sigma = \sqrt{floor}` is a constant and sends no gradient. A sequence without a
    visible frame gives zeros for both, zero weights and zero gradients.

    Parameters
    ----------
    h
        Frames: ``(B, T, D)``; packed ``(N, D)`` with `cu_seqlens`; or a jagged ``torch.nested`` tensor.
        float16, bfloat16 or float32; float64 by the reference only.
    w, b
        ``(D, A)`` and ``(A,)``, or None: `w`, which goes with `v`, leaves the product out, and A = D.
    v
        ``(A,)``: one weight a frame; ``(A, C)``, C the width of the values: one a frame and channel.
    context
        Added before the activation. Padded: ``(B, A)`` or ``(B, 1, A)`` a sequence, ``(B, T, A)`` a row. Packed:
        ``(S, A)`` a sequence or ``(N, A)`` a row, or with the choice made explicit ``(S, 1, A)`` and ``(1, N, A)``,
        which is needed where S = N. Or several of these, see `location_attention`.
    value
        What the statistics are of: ``(B, T, C)`` or ``(N, C)``; the frames `h` where None.
    activation
        identity, tanh, relu, sigmoid, leaky_relu (slope 0.2), elu, gelu or silu.
    mask
        bool ``(B, T)`` or ``(N,)``, True = may be attended. What is masked is never read: it may be NaN.
    cu_seqlens
        int32 ``(S + 1,)``: sequence s is the rows ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]`` of `h`.
    floor
        Least variance, in the squared unit of the values; at least 0.
    return_weights
        Return the weights too; they are differentiable. One a frame and channel are of the size of the values.
    return_log_weights, return_scores, return_lse
        See `location_attention`. There is no state to return: a deviation does not merge with others.
    impl
        ``"auto"``: the Triton kernel on a GPU, PyTorch elsewhere and for float64. ``"triton"`` and ``"reference"``
        never fall back.

    Returns
    -------
    tuple of Tensor
        Mean and standard deviation, ``(B, C)`` each, S for B where ragged, in the dtype of the values.
        What is asked for follows, in the order weights, log weights, scores, lse. All but the last ``(B, T)`` or
        ``(N,)``, with ``v (A, C)`` ``(B, T, C)`` or ``(N, C)``; jagged for a jagged `h`. lse
        ``(B,)``, with ``v (A, C)`` ``(B, C)``.

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
    wanted = check_wanted(return_weights, return_scores, return_lse, False, return_log_weights)
    offsets = None
    if h.is_nested:
        h, offsets, context, value, _, cu_seqlens = _unpack_jagged(h, context, value, None, mask, cu_seqlens)
    context, context_per_row = _validate_statistics(
        h, w, b, v, context, value, mask, cu_seqlens, activation, floor, jagged=offsets is not None
    )
    kernel = use_triton(impl, h.device, "has no float64" if h.dtype == torch.float64 else None)
    inputs = StatisticsInputs(h, w, b, v, context, value, mask, cu_seqlens, activation, context_per_row, float(floor))
    per_channel = v is not None and v.dim() == 2
    weights: Tensor | None = None
    lse: Tensor | None = None
    scores: Tensor | None = None
    if kernel:
        asked = may_ask(h, w, b, v, context, value)
        mean, std, lse, scores, *_ = _STATISTICS(inputs, wanted.pairs and per_channel, asked)
    elif wanted.log_weights or wanted.scores or wanted.lse:
        mean, std, lse, scores = _STATISTICS.formula(inputs)
    else:
        mean, std, weights = _STATISTICS.formula(inputs, weights_only=True)
    if wanted == PLAIN:
        return mean, std

    if v is None and lse is not None and wanted.pairs:
        scores = lse.new_zeros(*h.shape[:-1], 1)
        scores = scores if mask is None else scores.masked_fill(~mask[..., None], -torch.inf)
    log_weights: Tensor | None = None
    if scores is not None and lse is not None:
        if wanted.weights:
            weights = weights_of_rows(scores, lse, cu_seqlens)
        if wanted.log_weights:
            log_weights = weights_of_rows(scores, lse, cu_seqlens, log=True)

    def frames(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x if per_channel else x.squeeze(-1)
        return x if offsets is None else torch.nested.nested_tensor_from_jagged(x, offsets)

    lse = lse if lse is None or per_channel else lse.squeeze(1)
    pairs = weights if wanted.weights else None, scores if wanted.scores else None, log_weights
    return mean, std, *beside(wanted, h.dtype, lse, *map(frames, pairs))


def _validate_statistics(
    h: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    v: Tensor | None,
    context: Tensor | Sequence[Tensor] | None,
    value: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    floor: float,
    *,
    jagged: bool,
) -> tuple[Tensor | None, bool]:
    """Check every argument; return what `one_context` makes of the context."""
    if w is not None and v is None:
        raise ValueError("v: expected a tensor with w; got None")
    check = Checker(_TABLES[cu_seqlens is not None])
    check("h", h)
    if cu_seqlens is not None:
        check_sequences(check, cu_seqlens, h, jagged=jagged)
    if value is None:
        check.bind("C", h.shape[-1], "h")
    else:
        check("value", value)
    if v is None:
        for name, given in (("b", b), ("context", context)):
            if given is not None:
                raise ValueError(f"{name}: expected None without v, all frames weigh the same; got a tensor")
        check_activation("activation", activation)
    else:
        check_score(check, h, w, b, v, None, None, activation, "identity")
    check("mask", mask)
    least = check_number("floor", floor, "a finite number of at least 0", 0.0, math.inf)
    if math.sqrt(least) > torch.finfo(h.dtype).max:
        raise ValueError(f"floor: expected a number whose root {h.dtype} holds; got {floor}")
    return one_context(check, context, h, cu_seqlens)
