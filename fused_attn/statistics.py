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
from ._checks import Checker, Table, argument, check_activation, check_count, check_flag, check_number, check_values
from ._habits import explicit
from ._operators import Operator, launcher
from ._ops import Impl, exports_from_one, keeps_exact, may_ask, under_autocast, use_triton, weights_of_rows
from ._results import PLAIN, Wanted, beside, by_formula, check_wanted, stand_in
from .kernels.inputs import StatisticsInputs, features_dtype
from .location import _TABLES as _SCORES
from .location import LOCATION, _unpack_jagged, check_score, check_sequences, one_context
from .segments import Offsets, as_offsets


def _table(packed: bool, hops: bool) -> Table:
    rows = "N" if packed else "B T"
    given = f"{rows} | {rows} C" if not hops else "N R" if packed else "B R T"
    return {
        **_SCORES[packed, "A"],
        "v": argument("A R" if hops else "A | A C", linear=True),
        "value": argument(f"{rows} C", optional=True),
        "score_bias": argument(given, "bias", optional=True),
        "weight": argument(given, "bias", optional=True),
    }


_TABLES = {(packed, hops): _table(packed, hops) for packed in (False, True) for hops in (False, True)}


def _fake(inputs: StatisticsInputs, need_scores: bool, need_exact: bool, deviation: bool) -> tuple[Tensor, ...]:
    h, v, cu_seqlens = inputs.h, inputs.v, inputs.cu_seqlens
    rows, per_channel = h.shape[:-1], inputs.per_channel()
    seqs = h.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    channels = (h if inputs.value is None else inputs.value).shape[-1]
    hops = channels if per_channel else 1
    made = v is not None and (need_scores or not per_channel)
    features = features_dtype(h.dtype, inputs.activation) if per_channel else h.dtype
    kept = v is not None and per_channel and not inputs.bare()
    planes = 3 if not deviation else 7 if inputs.correction else 5
    return (
        h.new_empty(seqs, channels),
        h.new_empty((seqs, channels) if deviation else 0),
        h.new_empty(seqs, hops, 2, dtype=torch.float32),
        h.new_empty((*rows, hops) if made else 0, dtype=torch.float32),
        h.new_empty((*rows, v.shape[0]) if kept and v is not None else 0, dtype=features),
        h.new_empty((planes, seqs, channels) if need_exact else 0, dtype=torch.float32),
    )


def _bwd(inputs: StatisticsInputs, *args: Any) -> list[Tensor | None]:
    _mean, _std, *saved, dmean, dstd, dlse, dscores, _dx, _dexact, _, _, _, needs = args
    run = launcher("statistics_bwd.statistics_bwd")
    return cast("list[Tensor | None]", run(inputs, *saved, dmean, dstd, dlse, dscores, needs))


_STATISTICS = Operator(
    "statistics",
    StatisticsInputs,
    differentiable="h w b v context value score_bias",
    choices="bool need_scores, bool need_exact, bool deviation",
    results="mean std?deviation lse scores x exact?need_exact",
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
    score_bias: Tensor | None = None,
    weight: Tensor | None = None,
    hops: int | None = None,
    activation: str = "tanh",
    mask: Tensor | None = None,
    cu_seqlens: Offsets | None = None,
    deviation: bool = True,
    correction: float = 0.0,
    floor: float = 1e-12,
    ceiling: float | None = None,
    eps: float = 0.0,
    return_weights: bool = False,
    return_log_weights: bool = False,
    return_scores: bool = False,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, ...]:
    r"""Mean and standard deviation of the frames of each sequence, weighted by an attention over the frames.

    .. math:: u_j = act(h_j W + b + ctx_j), \quad \alpha_{jc} = softmax_j(u_j \cdot v_c + \beta_{jc}), \quad
        \mu_c = \sum_j \alpha_{jc} x_{jc}, \quad
        \sigma_c = \sqrt{\max\big(\sum_j \alpha_{jc} (x_{jc} - \mu_c)^2, floor\big)}

    One :math:`v` weights the frames for all channels alike (attentive statistics pooling); a :math:`v_c` a channel
    weights them for each (ECAPA-TDNN). A bias of the score, after :math:`v`, would cancel in the softmax: there is
    none. Without `w` the features are act(h + b + ctx), of frames that were projected before, as where there is a
    batch norm between: `value` says then what is pooled. Without `v` too the scores are `score_bias`, and without
    that all frames weigh the same (statistics pooling, as in x-vectors). Or the weights themselves are given.

    The variance is taken about the mean, not as a difference of squares: channels far from 0 lose nothing. Where it
    is at most `floor`, :math:`\sigma = \sqrt{floor}` is a constant and sends no gradient. A sequence without a
    visible frame gives zeros for both, zero weights and zero gradients. In full

    .. math:: \sigma_c = \sqrt{\min\Big(\max\Big(\frac{\sum_j \alpha_{jc} (x_{jc} - \mu_c)^2}
        {1 - correction \sum_j \alpha_{jc}^2}, floor\Big), ceiling\Big) + eps}

    With `hops` there are R statistics of the same frames, each by weights of its own that are alike for all channels:
    the speakers of a recording, or heads of an attention that share the frames,

    .. math:: \alpha_{jr} = softmax_j(u_j \cdot v_r + \beta_{jr}), \quad \mu_{rc} = \sum_j \alpha_{jr} x_{jc}

    Parameters
    ----------
    h
        Frames: ``(B, T, D)``; packed ``(N, D)`` with `cu_seqlens`; or a jagged ``torch.nested`` tensor.
        float16, bfloat16 or float32; float64 by the reference only.
    w, b
        ``(D, A)`` and ``(A,)``, or None: `w`, which goes with `v`, leaves the product out, and A = D.
    v
        ``(A,)``: one weight a frame; ``(A, C)``, C the width of the values: one a frame and channel; with `hops`
        ``(A, R)``.
    context
        Added before the activation. Padded: ``(B, A)`` or ``(B, 1, A)`` a sequence, ``(B, T, A)`` a row. Packed:
        ``(S, A)`` a sequence or ``(N, A)`` a row, or with the choice made explicit ``(S, 1, A)`` and ``(1, N, A)``,
        which is needed where S = N. Or several of these, see `location_attention`.
    value
        What the statistics are of: ``(B, T, C)`` or ``(N, C)``; the frames `h` where None.
    score_bias
        Added to the scores, or all of them without `v`: ``(B, T)`` or ``(N,)``, with ``v (A, C)`` a number a channel,
        ``(B, T, C)`` or ``(N, C)``; without `v` either. With `hops` ``(B, R, T)`` or ``(N, R)``. In the dtype of `h`
        or float32.
    weight
        Weights of at least 0 in place of a softmax, which are divided by their sum: ``(B, T)``, ``(N,)``, or one a
        channel, ``(B, T, C)`` or ``(N, C)``; with `hops` ``(B, R, T)`` or ``(N, R)``. Without `v` and `score_bias`.
        Their sum must be a float32. Gradients go to a weight of 0 too; where all are 0 a sequence is as if nothing of
        it were visible, to that hop.
    hops
        Number R of sets of weights, for which `v`, `score_bias` or `weight` have an axis. None: one, and no axis. It
        is said, for an axis may be as wide as the values. Scores of `v` are made of one read of `h`, at most 128 of
        them by the kernel; the values are read once a hop, without a copy, and each hop has a gradient of them, which
        are added up. Means alone of `v` take one read of all, that of `location_attention` of R hops.
    activation
        identity, tanh, relu, sigmoid, leaky_relu (slope 0.2), elu, gelu or silu.
    mask
        bool ``(B, T)`` or ``(N,)``, True = may be attended. What is masked is never read: it may be NaN.
    cu_seqlens
        int32 ``(S + 1,)``: sequence s is the rows ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]`` of `h`.
    deviation
        False: the mean alone, for which the variance is not made.
    correction
        Of the variance, at least 0. 1: the unbiased one, n / (n - 1) times that of n frames of one weight, and
        divided by :math:`1 - \sum_j \alpha_{jc}^2` for frames that count as much as they weigh ("reliability
        weights", as pyannote has them). 0 is the deviation of a frame that has all the weight, to about 1e-6.
    floor, ceiling
        Least and largest variance, in the squared unit of the values; at least 0. None: no largest one.
    eps
        Added to the variance under the root, after `floor` and `ceiling`.
    return_weights
        Return the weights too; they are differentiable. One a frame and channel are of the size of the values.
    return_log_weights, return_scores, return_lse
        See `location_attention`. There is no state to return: a deviation does not merge with others.
    impl
        ``"auto"``: the Triton kernel on a GPU, PyTorch elsewhere and for float64. ``"triton"`` and ``"reference"``
        never fall back.

    Returns
    -------
    Tensor or tuple of Tensor
        Mean and standard deviation, ``(B, C)`` each, with `hops` ``(B, R, C)``, S for B where ragged, in the dtype of
        the values. The mean alone without `deviation`, in a tuple if more is asked for.
        What is asked for follows, in the order weights, log weights, scores, lse. All but the last ``(B, T)`` or
        ``(N,)``, with one a channel ``(B, T, C)`` or ``(N, C)``, with `hops` ``(B, R, T)`` or ``(N, R)``; jagged for
        a jagged `h`. lse ``(B,)``, of channels ``(B, C)``, of hops ``(B, R)``. Of a `weight` there are weights alone.

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
    deviation = check_flag("deviation", deviation)
    if hops is not None:
        hops = check_count("hops", hops, 1)
        if v is score_bias is weight is None:
            raise ValueError(f"hops: expected None without v, score_bias and weight, frames weigh alike; got {hops}")
    if weight is not None:
        _check_weight_alone(v, score_bias, wanted)
    linear, given = weight is not None, score_bias if weight is None else weight
    offsets = None
    if h.is_nested:
        name = "weight" if linear else "score_bias"
        h, offsets, context, value, given, cu_seqlens = _unpack_jagged(
            h, context, value, given, mask, cu_seqlens, bias_name=name
        )
    context, context_per_row = _validate_statistics(
        h, w, b, v, context, value, given, mask, cu_seqlens, activation, hops,
        linear=linear, jagged=offsets is not None,
    )  # fmt: skip
    limits = check_limits(floor, ceiling, eps, correction, h.dtype)
    unsupported = "has no float64" if h.dtype == torch.float64 else None
    if hops is not None and hops > 128 and v is not None:
        unsupported = unsupported or "holds at most 128 hops"
    kernel = use_triton(impl, h.device, unsupported)
    structure = mask, cu_seqlens, activation, context_per_row
    inputs = StatisticsInputs(h, w, b, v, context, value, given, *structure, *limits, linear)
    if hops is None:
        mean, std, lse, scores, weights = _pooled(inputs, wanted, kernel, deviation)
    elif not deviation and v is not None and given is None:
        mean, lse, scores, weights = _means_of_hops(inputs, wanted, kernel)
        std = mean
    else:
        given = _scores_of_hops(inputs, kernel)
        mean, std, lse, weights = _pooled_by_hop(inputs, given, wanted, kernel, deviation)
        v, scores = None, None
    statistics = (mean, std) if deviation else (mean,)
    if wanted == PLAIN:
        return statistics if deviation else mean

    per_channel = inputs.per_channel()
    if v is None and lse is not None and wanted.pairs:
        scores = lse.new_zeros(*h.shape[:-1], 1) if given is None else given.to(lse.dtype)
        scores = scores if scores.dim() == h.dim() else scores[..., None]
        scores = scores if mask is None else scores.masked_fill(~mask[..., None], 0 if linear else -torch.inf)
    log_weights: Tensor | None = None
    if linear and wanted.weights and weights is None:
        assert scores is not None
        assert lse is not None
        total = lse[..., 1]
        total = total[:, None] if cu_seqlens is None else total[reference.segment_ids(cu_seqlens, h.shape[0])]
        weights = (scores / total.masked_fill(total == 0, 1)).masked_fill(total == 0, 0)
    elif scores is not None and lse is not None:
        if wanted.weights:
            weights = weights_of_rows(scores, lse, cu_seqlens)
        if wanted.log_weights:
            log_weights = weights_of_rows(scores, lse, cu_seqlens, log=True)

    def frames(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        if hops is not None:
            x = x if cu_seqlens is not None else x.mT
        elif not per_channel:
            x = x.squeeze(-1)
        return x if offsets is None else torch.nested.nested_tensor_from_jagged(x, offsets)

    lse = lse if lse is None or per_channel or hops is not None else lse.squeeze(1)
    pairs = weights if wanted.weights else None, scores if wanted.scores else None, log_weights
    return *statistics, *beside(wanted, h.dtype, lse, *map(frames, pairs))


def _pooled(
    inputs: StatisticsInputs, wanted: Wanted, kernel: bool, deviation: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(mean, std, lse, scores, weights), of the last three what a way makes of what is wanted."""
    if kernel:
        made = wanted.pairs and inputs.per_channel() and inputs.v is not None
        mean, std, lse, scores, *_ = _STATISTICS(inputs, made, may_ask(*inputs[:7]), deviation)
        return mean, std, lse, scores, None
    if wanted.log_weights or wanted.scores or wanted.lse:
        mean, std, lse, scores = _STATISTICS.formula(inputs, deviation=deviation)
        return mean, std, lse, scores, None
    mean, std, weights = _STATISTICS.formula(inputs, weights_only=True, deviation=deviation)
    return mean, std, None, None, weights


def _means_of_hops(
    inputs: StatisticsInputs, wanted: Wanted, kernel: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(mean, lse, scores, weights) as `_pooled`: hops of location attention, which reads the values once for all."""
    score = inputs.score()._replace(value=inputs.value)
    if kernel:
        mean, lse, scores, _ = LOCATION(score, True, keeps_exact(*score[:9]))
        return mean, lse, scores, None
    return cast(
        "tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]", by_formula(LOCATION.formula, score, wanted)
    )


def _scores_of_hops(inputs: StatisticsInputs, kernel: bool) -> Tensor:
    """Scores of all hops, or their weights, with frames before hops; of a hidden frame they are anything."""
    given, v = inputs.score_bias, inputs.v
    if given is not None and inputs.cu_seqlens is None:
        given = given.mT
    if v is None:
        return cast("Tensor", given)
    score = inputs.score()._replace(score_bias=None, value=stand_in(inputs.h))
    scores = LOCATION(score, False, False)[2] if kernel else LOCATION.formula(score)[2]
    return scores if given is None else scores + given


def _pooled_by_hop(
    inputs: StatisticsInputs, given: Tensor, wanted: Wanted, kernel: bool, deviation: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(mean, std, lse, weights) of scores, or weights, a hop: as `_pooled`, with the hops after the sequences."""
    values = inputs.h if inputs.value is None else inputs.value
    alone = inputs._replace(h=values, w=None, b=None, v=None, context=None, value=None)
    each = [_pooled(alone._replace(score_bias=x), wanted, kernel, deviation) for x in given.unbind(-1)]
    mean, std, lse, _, weights = zip(*each, strict=True)
    return (
        torch.stack(mean, 1),
        torch.stack(std, 1) if deviation else std[0],
        None if lse[0] is None else torch.cat(lse, 1),
        None if weights[0] is None else torch.cat(weights, -1),
    )


def _check_weight_alone(v: Tensor | None, score_bias: Tensor | None, wanted: Wanted) -> None:
    """Raise for what does not go with weights that are given."""
    for name, x in (("v", v), ("score_bias", score_bias)):
        if x is not None:
            raise ValueError(f"{name}: expected None with weight, which is in place of a softmax; got a tensor")
    for name in ("log_weights", "scores", "lse"):
        if getattr(wanted, name):
            raise ValueError(f"return_{name}: expected False with weight, which is in place of a softmax; got True")


def check_limits(
    floor: float, ceiling: float | None, eps: float, correction: float, dtype: torch.dtype
) -> tuple[float, float, float, float]:
    """(floor, ceiling, eps, correction), checked."""
    anything = "a finite number of at least 0"
    floor = check_number("floor", floor, anything, 0.0, math.inf)
    eps = check_number("eps", eps, anything, 0.0, math.inf)
    most = torch.finfo(torch.float32).max  # a kernel has it in float32
    correction = check_number("correction", correction, f"{anything}, of at most {most:.3g}", 0.0, most)
    if ceiling is not None:
        ceiling = check_number("ceiling", ceiling, f"a finite number of at least the floor, {floor}", floor, math.inf)
    largest = floor if ceiling is None else ceiling
    for name, x, root in (("floor", floor, floor), ("ceiling", ceiling, largest), ("eps", eps, largest + eps)):
        if math.sqrt(root) > torch.finfo(dtype).max:
            raise ValueError(f"{name}: expected a number whose root {dtype} holds; got {x}")
    return floor, math.inf if ceiling is None else ceiling, eps, correction


def _validate_statistics(
    h: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    v: Tensor | None,
    context: Tensor | Sequence[Tensor] | None,
    value: Tensor | None,
    given: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    hops: int | None,
    *,
    linear: bool,
    jagged: bool,
) -> tuple[Tensor | None, bool]:
    """Check every tensor, `given` as score_bias or weight; return what `one_context` makes of the context."""
    if w is not None and v is None:
        raise ValueError("v: expected a tensor with w; got None")
    check = Checker(_TABLES[cu_seqlens is not None, hops is not None])
    if hops is not None:
        check.bind("R", hops, "hops")
    check("h", h)
    if cu_seqlens is not None:
        check_sequences(check, cu_seqlens, h, jagged=jagged)
    if value is None:
        check.bind("C", h.shape[-1], "h")
    else:
        check("value", value)
    if v is None:
        for name, x in (("b", b), ("context", context)):
            if x is not None:
                raise ValueError(f"{name}: expected None without v, all frames weigh the same; got a tensor")
        check_activation("activation", activation)
    else:
        check_score(check, h, w, b, v, None, None, activation, "identity")
    check("mask", mask)
    name = "weight" if linear else "score_bias"
    check(name, given)
    if hops is None and given is not None and v is not None and (given.dim() == h.dim()) != (v.dim() == 2):
        one = "channel, as v" if v.dim() == 2 else "frame, as v is one for all channels"
        raise ValueError(f"{name}: expected one number a {one}; got shape {tuple(given.shape)}")
    if given is not None and linear:
        bad = (given if hops is None or cu_seqlens is not None else given.mT) < 0
        bad = bad if mask is None else bad & (mask if given.dim() < h.dim() else mask[..., None])
        check_values("weight", given, ~bad.any(), "no negative weight")
    return one_context(check, context, h, cu_seqlens)
