"""Attention that a recurrence runs through: word by word, and the location-aware step.

In the first the last result is part of the next query, a loop that one kernel runs for a whole sequence. In the
second the last weights are part of the next score, and the loop is the user's: a decoder makes a query at a time.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._checks import (
    Checker,
    Table,
    argument,
    check_activation,
    check_both,
    check_dropout,
    check_flag,
    check_packed,
    mask_of,
    offsets_of,
)
from ._habits import explicit
from ._operators import Operator, launcher, vjp
from ._ops import Impl, exports_from_one, forward_mode, may_ask, under_autocast, use_triton
from .concat import concat_attention
from .kernels.inputs import WordByWordInputs
from .segments import Offsets, as_offsets

_OFFSETS = ("cu_seqlens_premise", "cu_seqlens_hypothesis")


def _table(*, packed: bool) -> Table:
    return {
        "premise": argument("N D" if packed else "B Ty D", "first"),
        "hypothesis": argument("M Dh" if packed else "B Th Dh"),
        "w": argument("A", linear=True),
        "w_y": argument("D A", linear=True),
        "w_h": argument("Dh A", linear=True),
        "w_r": argument("D A", linear=True),
        "w_t": argument("D D", linear=True),
        "state": argument("S D" if packed else "B D", optional=True),
        "mask": mask_of("B Ty"),
        "cu_seqlens_premise": offsets_of("S"),
        "cu_seqlens_hypothesis": offsets_of("S"),
        "offsets": offsets_of("any"),
    }


_TABLES = {packed: _table(packed=packed) for packed in (False, True)}
_LOCATION_AWARE = {
    "query": argument("B A", "first"),
    "key": argument("B Tk A"),
    "value": argument("B Tk Dv"),
    "v": argument("A", linear=True),
    "previous": argument("B Tk"),
    "conv_weight": argument("C K", hint="that of a `nn.Conv1d` of one channel without its middle axis"),
    "u": argument("C A", linear=True),
    "mask": mask_of("B Tk"),
    "score_bias": argument("B Tk", "bias", optional=True),
}


def _fake(inputs: WordByWordInputs, need_weights: bool, need_states: bool, plain: bool) -> tuple[Tensor, ...]:
    query, key, value, *_, cu_seqlens, _ = inputs
    *rows, T = query.shape[:-1]
    weights = (*rows, T, key.shape[-2]) if need_weights else (0,)
    states = (*rows, T + (1 if cu_seqlens is None else cu_seqlens.shape[0] - 1), value.shape[-1])
    wide = torch.promote_types(value.dtype, torch.float32)
    return (
        value.new_empty(*query.shape[:-1], value.shape[-1]),
        value.new_empty(weights, dtype=wide),
        value.new_empty(states if need_states else (0,), dtype=wide),
    )


def _fwd(inputs: WordByWordInputs, need_weights: bool, need_states: bool, plain: bool) -> tuple[Tensor, ...]:
    if not plain:
        return cast("tuple[Tensor, ...]", launcher("recurrent.recurrent_fwd")(inputs, need_weights, need_states))
    out, weights = reference.word_by_word_attention(inputs)
    none = weights.new_empty(0)
    return out.clone(), weights if need_weights else none, none.clone()  # no word: out is an input's


def _bwd(
    inputs: WordByWordInputs,
    out: Tensor,
    states: Tensor,
    dout: Tensor,
    dweights: Tensor | None,
    dstates: Tensor | None,
    need_weights: bool,
    need_states: bool,
    plain: bool,
    needs: list[bool],
) -> list[Tensor | None]:
    if not plain:
        grads = launcher("recurrent_bwd.recurrent_bwd")(inputs, states, dout, dweights, needs)
        return cast("list[Tensor | None]", grads)
    at = [i for i, need in enumerate(needs) if need]

    def fn(*live: Tensor) -> tuple[Tensor, Tensor]:
        full = dict(zip(at, live, strict=True))
        return reference.word_by_word_attention(WordByWordInputs(*(full.get(i, x) for i, x in enumerate(inputs))))

    made = dict(zip(at, vjp(fn, [inputs[i] for i in at], (dout, dweights)), strict=True)) if at else {}
    return [made.get(i) for i in range(len(needs))]


_WORD_BY_WORD = Operator(
    "word_by_word",
    WordByWordInputs,
    differentiable="query key value w w_r w_t state",
    # plain: by the reference, whose loop is not the compiler's to unroll
    choices="bool need_weights, bool need_states, bool plain",
    results="out weights?need_weights states?need_states",
    saved="out states",
    forward=_fwd,
    backward=_bwd,
    fake=_fake,
    formula=reference.word_by_word_attention,
)


@explicit
@exports_from_one
@under_autocast("premise", "hypothesis", "w_y", "w_h", "w_r", "w", "w_t", "state")
def word_by_word_attention(
    premise: Tensor,
    hypothesis: Tensor,
    w_y: Tensor,
    w_h: Tensor,
    w_r: Tensor,
    w: Tensor,
    w_t: Tensor,
    *,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens_premise: Offsets | None = None,
    cu_seqlens_hypothesis: Offsets | None = None,
    return_weights: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Word-by-word attention: every word of the hypothesis attends to the premise, and to what the last one found.

    .. math:: M_{tj} = \tanh(y_j W_y + h_t W_h + r_{t-1} W_r), \quad \alpha_t = softmax_j(M_t w), \quad
        r_t = \sum_j \alpha_{tj} \, y_j + \tanh(r_{t-1} W_t)

    A true recurrence: one program walks all steps of a sequence. Where the premise has no visible key,
    r_t = tanh(r_{t-1} W_t), and the weights are zero.

    Parameters
    ----------
    premise, hypothesis
        Y ``(B, Ty, D)`` and h ``(B, Th, Dh)``; packed ``(N, D)`` and ``(M, Dh)`` with both ``cu_seqlens``. float16,
        bfloat16, float32; float64 on a CPU or by the reference.
    w_y, w_h, w_r
        ``(D, A)``, ``(Dh, A)``, ``(D, A)``. The first two meet their rows before the kernel, in one product each.
    w
        ``(A,)``.
    w_t
        ``(D, D)``.
    state
        r_0, ``(B, D)``, or packed one for each of S sequences, ``(S, D)``; zeros where None. The last r of a first
        part of the hypothesis goes on with its second part.
    mask
        bool ``(B, Ty)``, True = this word of the premise may be attended; not with packed rows. Words that it hides
        may be NaN. A padded hypothesis needs no mask: states come in order, so those up to its length are right, and
        its last is ``r[arange(B), length - 1]``. What follows is to be ignored, and its padding has to be finite.
    cu_seqlens_premise, cu_seqlens_hypothesis
        int32 ``(S + 1,)``, both or none: hypothesis s reads premise s. Either may be empty. Last states are at
        ``cu_seqlens_hypothesis[1:] - 1``, where no hypothesis is empty.
    return_weights
        Return the weights too (padded batches only). They are differentiable.
    impl
        ``"auto"``: the Triton kernel on a GPU (the reference for float64), the reference elsewhere. ``"triton"`` and
        ``"reference"`` never fall back. The reference is a loop over t, and pads packed rows to the longest sequence,
        for which it reads the offsets; to `torch.compile` and `torch.export` it is one operator.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        r of every step, ``(B, Th, D)`` or packed ``(M, D)``, of which the last is ``r[:, -1]``; weights
        ``(B, Th, Ty)``.

    Raises
    ------
    ValueError, TypeError
        For arguments that do not fit, packed rows whose weights are asked for, and an `impl` that cannot run here.

    References
    ----------
    Rocktäschel et al. 2016, Reasoning about entailment with neural attention.

    """
    cu_seqlens_premise, cu_seqlens_hypothesis = as_offsets(cu_seqlens_premise), as_offsets(cu_seqlens_hypothesis)
    if not isinstance(premise, Tensor):
        raise TypeError(f"premise: expected a torch.Tensor; got {type(premise).__name__}")
    return_weights = check_flag("return_weights", return_weights)
    _validate_word_by_word(
        premise,
        hypothesis,
        w_y,
        w_h,
        w_r,
        w,
        w_t,
        state,
        mask,
        cu_seqlens_premise,
        cu_seqlens_hypothesis,
        return_weights,
    )
    kernel = use_triton(impl, premise.device, "has no float64" if premise.dtype == torch.float64 else None)
    if mask is not None:  # words that may be NaN, before they meet a number
        (premise,) = reference.hide(mask[..., None], premise)
    more = premise, w, w_r, w_t, state, mask, cu_seqlens_premise, cu_seqlens_hypothesis
    if kernel:
        query, key = hypothesis @ w_h, premise @ w_y
    else:  # what it computes is float32 at least from the first product on
        wide = torch.promote_types(premise.dtype, torch.float32)
        query, key = (x.to(wide) @ weight.to(wide) for x, weight in ((hypothesis, w_h), (premise, w_y)))
    if kernel or (torch.compiler.is_compiling() and not forward_mode()):
        states = kernel and may_ask(query, key, *more[:5])
        out, weights, _ = _WORD_BY_WORD(WordByWordInputs(query, key, *more), return_weights, states, not kernel)
    else:
        out, weights = reference.word_by_word_attention(WordByWordInputs(query, key, *more))
    return (out, weights.to(out.dtype)) if return_weights else out


def _validate_word_by_word(
    premise: Tensor,
    hypothesis: Tensor,
    w_y: Tensor,
    w_h: Tensor,
    w_r: Tensor,
    w: Tensor,
    w_t: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens_premise: Tensor | None,
    cu_seqlens_hypothesis: Tensor | None,
    return_weights: bool,
) -> None:
    """Check every argument."""
    packed = check_packed(
        {"mask": mask, "return_weights": return_weights}, cu_seqlens_premise, cu_seqlens_hypothesis, _OFFSETS
    )
    check = Checker(_TABLES[packed])
    for name, x in (
        ("premise", premise),
        ("hypothesis", hypothesis),
        ("w", w),
        ("w_y", w_y),
        ("w_h", w_h),
        ("w_r", w_r),
        ("w_t", w_t),
    ):
        check(name, x)
    if cu_seqlens_premise is not None and cu_seqlens_hypothesis is not None:
        both = cu_seqlens_premise, cu_seqlens_hypothesis
        check_both(check, _OFFSETS, both, (premise.shape[0], hypothesis.shape[0]))
        check.bind("S", cu_seqlens_premise.shape[0] - 1, "cu_seqlens_premise")
    check("state", state)
    check("mask", mask)


@explicit
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
    mask: Tensor | None = None,
    score_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    r"""One step of location-aware attention: the score sees where the last step looked.

    .. math:: f_j = \sum_k F_k \, \alpha^{prev}_{j + k - (K - 1)/2}, \quad s_j = v \cdot act(q + k_j + f_j U), \quad
        \alpha = softmax_j(s), \quad o = \sum_j \alpha_j \, value_j

    A decoder calls this once a word, with the weights that the last call returned; gradients go back through them.
    The score and the sum are `concat_attention` of one query, which is one kernel. Before it one matrix
    product makes f, ``(B, Tk, C)``, of the windows of `previous`, ``(B, Tk, K)``, and another adds f U to the keys,
    ``(B, Tk, A)``: at every step all three are written, read again, and kept for the backward. Both follow PyTorch's
    TF32 setting for matrix products. A bias of the score goes into the query or the keys.

    Parameters
    ----------
    query, key
        Projected to the width A of the score: ``(B, A)`` and ``(B, Tk, A)``. float16, bfloat16, float32; float64 on a
        CPU or by the reference.
    value
        ``(B, Tk, Dv)``.
    v
        ``(A,)``.
    previous
        The last weights, ``(B, Tk)``, or what is made of them, as their sum over all steps; zeros before the first.
    conv_weight
        F, ``(C, K)``, as `torch.nn.Conv1d` has it (a cross-correlation), K odd. Outside of the keys are zeros.
    u
        U, ``(C, A)``.
    activation
        identity, tanh, relu, sigmoid, leaky_relu (slope 0.2), gelu or silu.
    mask
        bool ``(B, Tk)``, True = may be attended. What it hides of keys, values and `previous` may be NaN; the
        convolution takes it as zero.
    score_bias
        ``(B, Tk)``, added to the scores, in the dtype of `query` or float32.
    dropout_p
        Probability that a weight is dropped, 0 <= p < 1; it always applies. See `location_attention`.
    impl
        As in `concat_attention`; it does not change what comes before the score.

    Returns
    -------
    (Tensor, Tensor)
        Output ``(B, Dv)`` and weights ``(B, Tk)``, as they are before dropout. A sequence without a visible key has
        zeros in both.

    Raises
    ------
    ValueError, TypeError
        For arguments that do not fit, an even width of `conv_weight`, and an `impl` that cannot run here.

    References
    ----------
    Chorowski et al. 2015, Attention-based models for speech recognition; Shen et al. 2018 (Tacotron 2: the sum of all
    weights so far).

    """
    if not isinstance(query, Tensor):
        raise TypeError(f"query: expected a torch.Tensor; got {type(query).__name__}")
    _validate_location_aware(query, key, value, v, previous, conv_weight, u, activation, mask, score_bias, dropout_p)
    dtype = query.dtype
    tensors = query, key, value, v, previous, conv_weight, u, score_bias  # before sums of 16 bits overflow
    query, key, value, v, previous, conv_weight, u, score_bias = reference.widened(*tensors)
    if mask is not None:  # what may be NaN, before it meets a number; a key that is hidden meets itself alone
        previous = previous.masked_fill(~mask, 0)
    # The convolution is a product with the windows of the weights: on a GPU cuDNN's would follow a TF32 setting of
    # its own, which is on by default, and this one follows that of matrix products.
    half = conv_weight.shape[1] // 2
    padded = F.pad(previous, (half, half + 1))  # one more than is used: unfold refuses a signal shorter than a window
    windows = padded.unfold(1, conv_weight.shape[1], 1)[:, : key.shape[1]]
    key = torch.baddbmm(key, windows @ conv_weight.t(), u.expand(key.shape[0], -1, -1))
    out, weights = concat_attention(
        query[:, None],
        key,
        value,
        v,
        activation=activation,
        mask=mask,
        score_bias=None if score_bias is None else score_bias[:, None],
        dropout_p=dropout_p,
        return_weights=True,
        impl=impl,
    )
    return out.squeeze(1).to(dtype), weights.squeeze(1).to(dtype)


def _validate_location_aware(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    previous: Tensor,
    conv_weight: Tensor,
    u: Tensor,
    activation: str,
    mask: Tensor | None,
    score_bias: Tensor | None,
    dropout_p: float,
) -> None:
    """Check every argument: `concat_attention` would call some by another shape."""
    check = Checker(_LOCATION_AWARE)
    for name, x in (
        ("query", query),
        ("key", key),
        ("value", value),
        ("v", v),
        ("previous", previous),
        ("conv_weight", conv_weight),
    ):
        check(name, x)
    C, K = conv_weight.shape
    if K % 2 == 0:
        raise ValueError(f"conv_weight: expected shape (C, K) with an odd width K; got {(C, K)}")
    check("u", u)
    check("mask", mask)
    check("score_bias", score_bias)
    check_activation("activation", activation)
    check_dropout("dropout_p", dropout_p)
