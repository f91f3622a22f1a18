"""One step of location-aware attention: the last weights are part of the next score.

The loop is the user's: a decoder makes a query at a time.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._checks import (
    Checker,
    Table,
    argument,
    check_activation,
    check_dropout,
    check_flag,
    check_offsets,
    check_score_activation,
    mask_of,
    offsets_of,
)
from ._dropout import draw_seed, dropout_scale
from ._habits import explicit
from ._jagged import is_jagged, of_rows, rows_of
from ._operators import Operator, exact_of, launcher
from ._ops import Impl, exports_from_one, keeps_exact, may_ask, under_autocast, use_triton, weights_of_rows
from ._results import beside, check_wanted
from ._softmax import softmax, softmax_of_rows, sums_of_rows
from .kernels.inputs import LocationAwareInputs, LocationAwareSequenceInputs, LocationInputs
from .location import LOCATION
from .segments import Offsets, as_offsets


def _table(packed: bool, channels: bool) -> Table:
    seq, rows, offsets = ("S", "N", "") if packed else ("B", "B Tk", "cu_seqlens")
    history = ("N P" if packed else "B P Tk") if channels else rows
    layer = "of as many channels as `previous` has" if channels else "of one channel without its middle axis"
    return {
        "query": argument(f"{seq} A", "first"),
        "key": argument(f"{rows} A", offsets=offsets),
        "value": argument(f"{rows} Dv", offsets=offsets),
        "v": argument("A", linear=True),
        "previous": argument(history, offsets=offsets),
        "conv_weight": argument("C P K" if channels else "C K", hint=f"that of a `nn.Conv1d` {layer}"),
        "u": argument("C A", linear=True),
        "mask": mask_of(rows),
        "score_bias": argument(rows, "bias", optional=True),
        "cu_seqlens": offsets_of("S"),
    }


_STEP_TABLES = {  # by whether rows are packed, and the history has an axis of channels
    (packed, channels): _table(packed, channels) for packed in (False, True) for channels in (False, True)
}
PADDED = "a whole utterance is padded, with a mask"
_SEQUENCE_TABLES = {
    channels: _STEP_TABLES[False, channels]
    | {
        "query": argument("B Tq A", "first"),
        "key": argument("B Tk A", hint=PADDED),
        "value": argument("B Tk Dv", hint=PADDED),
        "previous": _STEP_TABLES[False, channels]["previous"]._replace(optional=True, offsets=""),
    }
    for channels in (False, True)
}


def _windows(previous: Tensor, width: int, keys: int) -> Tensor:
    """The last weights around each key, ``(B, Tk, K)`` or of several channels ``(B, P, Tk, K)``."""
    half = width // 2
    padded = F.pad(previous, (half, half + 1))  # one more than is used: unfold refuses a signal shorter than a window
    return padded.unfold(-1, width, 1)[..., :keys, :]


def _windows_of_packed(previous: Tensor, width: int, cu_seqlens: Tensor) -> Tensor:
    """The same of packed rows, ``(N, K)`` or ``(N, P, K)``: none reads over the ends of its sequence."""
    rows = previous.shape[0]
    segment, place = (x[0, :, None] for x in reference.positions(1, rows, cu_seqlens, previous.device))
    offset = torch.arange(width, device=previous.device) - width // 2
    near = place + offset
    there = (near >= 0) & (near < cu_seqlens.diff()[segment])
    at = torch.where(there, torch.arange(rows, device=previous.device)[:, None] + offset, 0)
    windows = previous[at]
    if previous.dim() == 1:
        return windows.masked_fill(~there, 0)
    return windows.masked_fill(~there[..., None], 0).mT


def _with_features(
    key: Tensor, previous: Tensor, conv_weight: Tensor, u: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The keys of a step: with what the filters make of the last weights.

    The convolution is a product with the windows of the weights: on a GPU cuDNN's would follow a TF32 setting of its
    own, which is on by default, and this one follows that of matrix products.
    """
    width = conv_weight.shape[-1]
    if cu_seqlens is not None:
        windows = _windows_of_packed(previous, width, cu_seqlens)
        return torch.addmm(key, windows.flatten(1) @ conv_weight.flatten(1).t(), u)
    windows = _windows(previous, width, key.shape[1])
    if previous.dim() == 3:  # the windows of a key, of all channels, are those of one filter
        windows, conv_weight = windows.transpose(1, 2).flatten(2), conv_weight.flatten(1)
    return torch.baddbmm(key, windows @ conv_weight.t(), u.expand(key.shape[0], -1, -1))


def over_channels(mask: Tensor, history: Tensor) -> Tensor:
    """A mask of keys, for a history that may have an axis of channels."""
    return mask if history.dim() == mask.dim() else mask[:, None]


def check_padded(key: Tensor) -> None:
    """TypeError for jagged keys, which a step has and a whole utterance has not."""
    if isinstance(key, Tensor) and key.is_nested:
        raise TypeError(
            f"key: expected a dense tensor, {PADDED}; got a nested one: pass torch.nested.to_padded_tensor(key, 0.0)"
        )


def _history_shape(key: Tensor, conv_weight: Tensor) -> tuple[int, ...]:
    return key.shape[0], *conv_weight.shape[1:-1], key.shape[1]


def _next_history(history: Tensor, weights: Tensor, cumulative: bool) -> Tensor:
    """What the step after sees: the last weights, and with `cumulative` in the last channel their sum."""
    if history.dim() == 2:
        return history + weights if cumulative else weights
    now = weights[:, None]
    recent = history.shape[1] - cumulative
    kept = [history[:, 1:recent], now] if recent else []
    return torch.cat([*kept, history[:, recent:] + now] if cumulative else kept, 1)


def _as_pooling(inputs: LocationAwareInputs, score_activation: str) -> LocationInputs:
    """A step as location attention of keys with their features, which are made here."""
    query, key, value, v, previous, conv_weight, u, score_bias, mask, cu_seqlens, seed, activation, dropout_p = inputs
    wide = torch.promote_types(value.dtype, torch.float32)  # before sums of 16 bits overflow
    key, previous, conv_weight, u = (x.to(wide) for x in (key, previous, conv_weight, u))
    if mask is not None:  # what may be NaN, before it meets a number; a key that is hidden meets itself alone
        previous = previous.where(over_channels(mask, previous), 0)
    key = _with_features(key, previous, conv_weight, u, cu_seqlens)
    score = key, None, None, v[:, None], None, None, query
    options = activation, "sigmoid", dropout_p, False
    return LocationInputs(*score, value, score_bias, mask, cu_seqlens, seed, *options, score_activation)


def _formula(inputs: LocationAwareInputs, score_activation: str = "identity") -> tuple[Tensor, Tensor]:
    """A step on canonical arguments, in plain PyTorch: out ``(S, Dv)`` and weights, ``(B, Tk)`` or ``(N,)``."""
    out, weights = reference.location_attention(_as_pooling(inputs, score_activation), weights_only=True)
    return out[:, 0], weights[..., 0].to(inputs.value.dtype)


def _formula_with_scores(inputs: LocationAwareInputs, score_activation: str = "identity") -> tuple[Tensor, ...]:
    """The same with all results: (out, weights, these in at least float32, the scores, (m, l) of each sequence)."""
    return _of_pooling(inputs, *reference.location_attention(_as_pooling(inputs, score_activation)))


def _pooled(inputs: LocationAwareInputs, score_activation: str) -> tuple[Tensor, ...]:
    """`_formula_with_scores` by the kernel of location attention: that of a step has no activation of the score."""
    pooled = _as_pooling(inputs, score_activation)
    pooled = pooled._replace(h=pooled.h.to(inputs.key.dtype))
    return _of_pooling(inputs, *LOCATION(pooled, True, keeps_exact(*pooled[:9]))[:3])


def _of_pooling(inputs: LocationAwareInputs, out: Tensor, lse: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
    weights = weights_of_rows(scores, lse, inputs.cu_seqlens)[..., 0]
    return out[:, 0], weights.to(inputs.value.dtype), weights, scores[..., 0], lse[:, 0]


def _weights_of_steps(inputs: LocationAwareSequenceInputs) -> tuple[Tensor]:
    """The weights of all steps on canonical arguments, ``(B, Tq, Tk)`` in at least float32: the loop."""
    query, key, v, previous, conv_weight, u, score_bias, mask, activation, cumulative, score_activation = inputs
    wide = torch.promote_types(key.dtype, torch.float32)
    query, key, v, conv_weight, u = (x.to(wide) for x in (query, key, v, conv_weight, u))
    seen = key.new_zeros(_history_shape(key, conv_weight)) if previous is None else previous.to(wide)
    if mask is not None:  # what may be NaN, before it meets a number
        seen = seen.where(over_channels(mask, seen), 0)
        key = key.masked_fill(~mask[..., None], 0)
        query = query.masked_fill(~mask.any(1)[:, None, None], 0)
        score_bias = None if score_bias is None else score_bias.masked_fill(~mask, 0)
    found, steps = [], query
    if query.shape[1] == 0:  # a step that is cut off again: so every argument has a gradient, of zeros
        steps = torch.cat([query, query.new_zeros(query.shape[0], 1, query.shape[2])], 1)
    for step in steps.unbind(1):
        z = _with_features(key + step[:, None], seen, conv_weight, u)
        scores = reference.activate(activation, z) @ v
        scores = scores if score_bias is None else scores + score_bias
        scores = reference.SCORE_ACTIVATIONS[score_activation](scores)
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        weights, _ = softmax(scores, -1)
        seen = _next_history(seen, weights, cumulative)
        found.append(weights)
    return (torch.stack(found, 1)[:, : query.shape[1]],)


def _fake(inputs: LocationAwareInputs, need_exact: bool, need_scores: bool) -> tuple[Tensor, ...]:
    value = inputs.value
    rows = value.shape[:-1]
    return (
        value.new_empty(inputs.query.shape[0], value.shape[-1]),
        value.new_empty(rows),
        value.new_empty(rows if need_exact else (0,), dtype=torch.float32),
        value.new_empty(rows if need_scores else (0,), dtype=torch.float32),
    )


def _bwd(inputs: LocationAwareInputs, *args: Any) -> list[Tensor | None]:
    _out, weights, exact, dout, dweights, _dexact, dscores, *_, needs = args
    run = launcher("location_aware_bwd.location_aware_bwd")
    return cast("list[Tensor | None]", run(inputs, exact_of(weights, exact), dout, dweights, dscores, needs))


_STEP = Operator(
    "location_aware",
    LocationAwareInputs,
    differentiable="query key value v previous conv_weight u score_bias",
    choices="bool need_exact, bool need_scores",
    results="out weights exact?need_exact scores?need_scores",
    saved="out weights exact",
    forward=launcher("location_aware.location_aware_fwd"),
    backward=_bwd,
    fake=_fake,
    formula=_formula_with_scores,
    lean=_formula,
)


def _fake_walk(inputs: LocationAwareSequenceInputs, need_seen: bool) -> tuple[Tensor, ...]:
    (B, Tq, _), key = inputs.query.shape, inputs.key
    seen = (B, Tq + 1, *inputs.conv_weight.shape[1:-1], key.shape[1]) if need_seen else (0,)
    return (
        key.new_empty(B, Tq, key.shape[1], dtype=torch.float32),
        key.new_empty(seen, dtype=torch.float32),
    )


def _bwd_walk(inputs: LocationAwareSequenceInputs, *args: Any) -> list[Tensor | None]:
    weights, seen, dweights, _dseen, _, needs = args
    run = launcher("location_aware_walk.location_aware_walk_bwd")
    return cast("list[Tensor | None]", run(inputs, weights, seen, dweights, needs))


_WALK = Operator(
    "location_aware_walk",
    LocationAwareSequenceInputs,
    differentiable="query key v previous conv_weight u score_bias",
    choices="bool need_seen",
    results="weights seen?need_seen",
    saved="weights seen",
    forward=launcher("location_aware_walk.location_aware_walk_fwd"),
    backward=_bwd_walk,
    fake=_fake_walk,
    formula=_weights_of_steps,
)


@explicit
@exports_from_one
@under_autocast("query", "key", "value", "v", "previous", "conv_weight", "u")
def location_aware_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    previous: Tensor,
    conv_weight: Tensor,
    u: Tensor,
    *,
    activation: str = "tanh",
    score_activation: str = "identity",
    mask: Tensor | None = None,
    score_bias: Tensor | None = None,
    cu_seqlens: Offsets | None = None,
    dropout_p: float = 0.0,
    return_log_weights: bool = False,
    return_scores: bool = False,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, ...]:
    r"""One step of location-aware attention: the score sees where the last step looked.

    .. math:: f_j = \sum_k F_k \, \alpha^{prev}_{j + k - (K - 1)/2}, \quad s_j = v \cdot act(q + k_j + f_j U), \quad
        \alpha = softmax_j(s), \quad o = \sum_j \alpha_j \, value_j

    A decoder calls this once a word, with the weights that the last call returned; gradients go back through them.
    The kernel makes f and f U in registers, and writes the output and the weights alone. The reference makes f,
    ``(B, Tk, C)``, and the keys of the step, ``(B, Tk, A)``, by a matrix product each. Products of float32 follow
    PyTorch's TF32 setting for matrix products. A bias of the score goes into the query or the keys.

    Parameters
    ----------
    query, key
        Projected to the width A of the score: ``(B, A)`` and ``(B, Tk, A)``; with `cu_seqlens` the keys are packed,
        ``(N, A)``, and the queries one a sequence, ``(S, A)``. float16, bfloat16, float32; float64 on a CPU or by the
        reference.
    value
        ``(B, Tk, Dv)``; packed ``(N, Dv)``.
    v
        ``(A,)``.
    previous
        The last weights, ``(B, Tk)``, packed ``(N,)``, or what is made of them, as their sum over all steps; zeros
        before the first. Or a history of P channels, ``(B, P, Tk)``, packed ``(N, P)``: the last weights and their
        sum (Tacotron 2), the last few.
    conv_weight
        F, ``(C, K)``, of a history of P channels ``(C, P, K)``, as `torch.nn.Conv1d` has it (a cross-correlation), K
        odd. Outside of a sequence's keys are zeros; f is the sum over the channels.
    u
        U, ``(C, A)``.
    activation
        identity, tanh, relu, sigmoid, leaky_relu (slope 0.2), elu, gelu or silu.
    score_activation
        "logsigmoid": a weight is σ(s_j) / Σ σ(s), s the score with its bias (smoothing). A bias of the score, which
        then counts, comes in `score_bias`. On a GPU the keys of the step are then made as the reference makes them,
        and the kernel of location attention does the rest.
    mask
        bool ``(B, Tk)`` or ``(N,)``, True = may be attended. What it hides of keys, values and `previous` may be NaN;
        the convolution takes it as zero.
    score_bias
        ``(B, Tk)`` or ``(N,)``, added to the scores, in the dtype of `query` or float32.
    cu_seqlens
        int32 ``(S + 1,)``: sequence s has the packed rows ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``. Or none where
        `key` is a jagged ``torch.nested`` tensor ``(S, T, A)``: what has a row a key is then jagged with its offsets,
        `value` ``(S, T, Dv)``, `previous` ``(S, T)`` or ``(S, T, P)``, `score_bias` and `mask` ``(S, T)``, which may
        also be of packed rows, and the weights that come back ``(S, T)``.
    dropout_p
        Probability that a weight is dropped, 0 <= p < 1; it always applies. See `location_attention`.
    return_log_weights, return_scores, return_lse
        Return them too, see `location_attention`. The kernel leaves the scores; what the normaliser tells is made of
        them in PyTorch.
    impl
        ``"auto"``: the Triton kernel on a GPU, the reference elsewhere and for float64. ``"triton"`` and
        ``"reference"`` never fall back.

    Returns
    -------
    tuple of Tensor
        Output ``(B, Dv)`` and weights ``(B, Tk)``, packed ``(S, Dv)`` and ``(N,)``, as they are before dropout. A
        sequence without a visible key has zeros in both. After these, in this order, log weights and scores, of the
        form of the weights, and lse ``(B,)``.

    Raises
    ------
    ValueError, TypeError
        For arguments that do not fit, an even width of `conv_weight`, and an `impl` that cannot run here.

    References
    ----------
    Chorowski et al. 2015, Attention-based models for speech recognition; Shen et al. 2018 (Tacotron 2: also the sum
    of all weights so far).

    """
    cu_seqlens, jagged = as_offsets(cu_seqlens), None
    if is_jagged(key):
        jagged = rows_of("key", key)
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens: expected None with a jagged key, which has offsets; got a tensor")
        key, cu_seqlens = jagged.packed, jagged.offsets.to(torch.int32)
        value, previous = (of_rows(n, x, jagged, "key") for n, x in (("value", value), ("previous", previous)))
        mask, score_bias = (
            of_rows(n, x, jagged, "key") if is_jagged(x) else x
            for n, x in (("mask", mask), ("score_bias", score_bias))
        )
    packed = cu_seqlens is not None
    table = _STEP_TABLES[packed, isinstance(previous, Tensor) and previous.dim() == 3 - packed]
    given = query, key, value, v, previous, conv_weight, u
    _validate(table, *given, activation, mask, score_bias, dropout_p, cu_seqlens, jagged is not None)
    check_score_activation("score_activation", score_activation)
    wanted = check_wanted(True, return_scores, return_lse, False, return_log_weights)
    seed = draw_seed(dropout_p, query.device)
    inputs = LocationAwareInputs(*given, score_bias, mask, cu_seqlens, seed, activation, float(dropout_p))
    kernel = use_triton(impl, query.device, "has no float64" if query.dtype == torch.float64 else None)
    more = wanted.log_weights or wanted.scores or wanted.lse
    if kernel and score_activation == "identity":
        out, weights, _, scores = _STEP(inputs, keeps_exact(*given, score_bias), more)
        lse = _normaliser_of(scores, cu_seqlens, query.shape[0]) if wanted.log_weights or wanted.lse else None
    elif kernel:
        out, weights, _, scores, lse = _pooled(inputs, score_activation)
    elif more:
        out, weights, _, scores, lse = _formula_with_scores(inputs, score_activation)
    else:
        out, weights = _formula(inputs, score_activation)
    if not more:
        return out, weights if jagged is None else jagged.nest(weights)
    log_weights = None
    if wanted.log_weights:
        assert lse is not None
        log_weights = weights_of_rows(scores[..., None], lse[:, None], cu_seqlens, log=True)[..., 0]
    of_keys = [x if x is None or jagged is None else jagged.nest(x) for x in (weights, scores, log_weights)]
    return out, *beside(wanted, value.dtype, lse, *of_keys)


def _normaliser_of(scores: Tensor, cu_seqlens: Tensor | None, seqs: int) -> Tensor:
    """(m, l) of the scores of each sequence, ``(S, 2)``."""
    segment = None if cu_seqlens is None else reference.segment_ids(cu_seqlens, scores.shape[0])
    scores = scores[..., None]
    _, top = softmax_of_rows(scores.detach(), segment, seqs)
    return sums_of_rows(scores, top, segment)[:, 0]


@explicit
@under_autocast("query", "key", "value", "v", "conv_weight", "u", "previous")
def location_aware_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    conv_weight: Tensor,
    u: Tensor,
    *,
    previous: Tensor | None = None,
    cumulative: bool = False,
    activation: str = "tanh",
    score_activation: str = "identity",
    mask: Tensor | None = None,
    score_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Location-aware attention of all queries of an utterance, which do not wait for what a step has found.

    .. math:: \alpha_i = softmax_j(v \cdot act(q_i + k_j + f_{ij} U)), \quad f_i = F * p_i, \quad
        p_{i+1} = \alpha_i \;\text{or}\; p_i + \alpha_i, \quad o_i = \sum_j \alpha_{ij} \, value_j

    As `location_aware_attention` for one query after the other, each with the weights that the last one returned, or
    with the sum of all so far; here the weights between steps are not rounded to 16 bits. On a GPU one program walks
    all steps of a sequence over its keys, and the outputs are one matrix product of all weights.

    Parameters
    ----------
    query
        ``(B, Tq, A)``, projected to the width A of the score.
    key, value, v, conv_weight, u, activation, mask, score_bias, dropout_p, impl
        As in `location_aware_attention`. The bias is that of every step.
    score_activation
        As there, by the kernels that walk the steps; their backward then makes the scores again.
    previous
        What the first step sees, ``(B, Tk)``, or of P channels ``(B, P, Tk)``; zeros where None.
    cumulative
        A step sees the sum of `previous` and all weights before it, not the last weights alone. Of P channels the
        last is that sum, and those before it are the last P - 1 weights, the oldest first: where P = 2 the last
        weights and their sum (Tacotron 2). Without `cumulative` they are the last P.

    Returns
    -------
    (Tensor, Tensor)
        Outputs ``(B, Tq, Dv)`` and weights ``(B, Tq, Tk)``, as they are before dropout. A sequence without a visible
        key has zeros in both.

    Raises
    ------
    ValueError, TypeError
        As in `location_aware_attention`.

    References
    ----------
    Chorowski et al. 2015; Shen et al. 2018.

    """
    check_padded(key)
    history = conv_weight if previous is None else previous
    tables = _SEQUENCE_TABLES[isinstance(history, Tensor) and history.dim() == 3]
    _validate(tables, query, key, value, v, previous, conv_weight, u, activation, mask, score_bias, dropout_p)
    check_score_activation("score_activation", score_activation)
    tensors = query, key, v, previous, conv_weight, u, score_bias
    options = activation, check_flag("cumulative", cumulative), score_activation
    inputs = LocationAwareSequenceInputs(*tensors, mask, *options)
    if use_triton(impl, query.device, "has no float64" if query.dtype == torch.float64 else None):
        weights, _ = _WALK(inputs, may_ask(*tensors))
    else:
        (weights,) = _weights_of_steps(inputs)
    if mask is not None:
        value = value.masked_fill(~mask[..., None], 0)
    shares = weights
    seed = draw_seed(dropout_p, query.device)
    if seed is not None:
        seq, step, place = (torch.arange(n, device=query.device) for n in weights.shape)
        scale = dropout_scale(seed, place, seq[:, None, None], step[:, None], float(dropout_p))
        shares = weights * scale.to(weights.dtype)
    return (shares @ value.to(weights.dtype)).to(value.dtype), weights.to(value.dtype)


def _validate(
    table: Table,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    previous: Tensor | None,
    conv_weight: Tensor,
    u: Tensor,
    activation: str,
    mask: Tensor | None,
    score_bias: Tensor | None,
    dropout_p: float,
    cu_seqlens: Tensor | None = None,
    jagged: bool = False,
) -> None:
    """Check every argument: `concat_attention` would call some by another shape."""
    check = Checker(table)
    check("query", query)
    check("key", key)
    if cu_seqlens is not None:
        seqs = check.sizes["S"]
        check.bind("S+1", seqs + 1, "query")
        if not jagged:
            check("cu_seqlens", cu_seqlens)
            check_offsets("cu_seqlens", cu_seqlens, key.shape[0], "packed rows")
        elif cu_seqlens.shape[0] != seqs + 1:
            raise ValueError(
                f"key: expected a jagged tensor of S = {seqs} sequences, from query; got {cu_seqlens.shape[0] - 1}"
            )
    for name, x in (
        ("value", value),
        ("v", v),
        ("previous", previous),
        ("conv_weight", conv_weight),
    ):
        check(name, x)
    if conv_weight.shape[-1] % 2 == 0:
        form = "(C, K)" if conv_weight.dim() == 2 else "(C, P, K)"
        raise ValueError(f"conv_weight: expected shape {form} with an odd width K; got {tuple(conv_weight.shape)}")
    check("u", u)
    check("mask", mask)
    check("score_bias", score_bias)
    check_activation("activation", activation)
    check_dropout("dropout_p", dropout_p)
