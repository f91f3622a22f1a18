"""Word-by-word attention: the last result is part of the next query, a loop that one kernel runs for a sequence."""

from __future__ import annotations

import itertools
from typing import cast

import torch
from torch import Tensor

from . import reference
from ._checks import (
    Checker,
    Table,
    argument,
    check_both,
    check_one_side,
    mask_of,
    offsets_of,
    refuse_packed,
)
from ._habits import explicit
from ._operators import Operator, launcher, vjp
from ._ops import Impl, exports_from_one, forward_mode, may_ask, under_autocast, use_triton, weights_from
from ._results import Wanted, beside, check_wanted
from ._softmax import highest, normaliser, pivot_of
from .kernels.inputs import WordByWordInputs
from .segments import Offsets, as_offsets

_OFFSETS = ("cu_seqlens_premise", "cu_seqlens_hypothesis")


def _table(premise: bool, hypothesis: bool) -> Table:
    """By which of them is packed."""
    seq = "S" if premise and hypothesis else "B"
    return {
        "premise": argument("N D" if premise else "B Ty D", "first", offsets="" if premise else _OFFSETS[0]),
        "hypothesis": argument("M Dh" if hypothesis else "B Th Dh", offsets="" if hypothesis else _OFFSETS[1]),
        "w": argument("A", linear=True),
        "w_y": argument("D A", linear=True),
        "w_h": argument("Dh A", linear=True),
        "w_r": argument("D A", linear=True),
        "w_t": argument("D D", linear=True),
        "state": argument(f"{seq} D", optional=True),
        "mask": mask_of("B Ty"),
        "cu_seqlens_premise": offsets_of(seq),
        "cu_seqlens_hypothesis": offsets_of(seq),
        "offsets": offsets_of("any"),
    }


_TABLES = {sides: _table(*sides) for sides in itertools.product((False, True), (False, True))}


def _fake(
    inputs: WordByWordInputs, need_weights: bool, need_scores: bool, need_states: bool, plain: bool
) -> tuple[Tensor, ...]:
    premise, hypothesis, w_y, *_ = inputs
    rows, (D, A) = hypothesis.shape[:-1], w_y.shape
    wide = torch.promote_types(premise.dtype, torch.float32)
    return (
        premise.new_empty(*rows, D),
        premise.new_empty((*rows, premise.shape[-2]) if need_weights else (0,), dtype=wide),
        premise.new_empty((*rows, premise.shape[-2]) if need_scores else (0,), dtype=wide),
        premise.new_empty((*rows, D + A + D) if need_states else (0,), dtype=wide),
        premise.new_empty((*premise.shape[:-1], A) if need_states else (0,)),
    )


def _fwd(
    inputs: WordByWordInputs, need_weights: bool, need_scores: bool, need_states: bool, plain: bool
) -> tuple[Tensor, ...]:
    if not plain:
        run = launcher("recurrent.recurrent_fwd")
        return cast("tuple[Tensor, ...]", run(inputs, need_weights, need_scores, need_states))
    out, *made = reference.word_by_word_attention(inputs)
    wanted = zip(made, (need_weights, need_scores), strict=True)
    # A copy: of no word, out is an input's.
    return out.clone(), *(x if need else x.new_empty(0) for x, need in wanted), made[0].new_empty(0), out.new_empty(0)


def _bwd(
    inputs: WordByWordInputs,
    states: Tensor,
    key: Tensor,
    dout: Tensor | None,
    dweights: Tensor | None,
    dscores: Tensor | None,
    dstates: Tensor | None,
    dkey: Tensor | None,
    need_weights: bool,
    need_scores: bool,
    need_states: bool,
    plain: bool,
    needs: list[bool],
) -> list[Tensor | None]:
    if not plain:
        grads = launcher("recurrent_bwd.recurrent_bwd")(inputs, states, key, dout, dweights, dscores, needs)
        return cast("list[Tensor | None]", grads)
    at = [i for i, need in enumerate(needs) if need]

    def fn(*live: Tensor) -> tuple[Tensor, ...]:
        full = dict(zip(at, live, strict=True))
        return reference.word_by_word_attention(WordByWordInputs(*(full.get(i, x) for i, x in enumerate(inputs))))

    made = dict(zip(at, vjp(fn, [inputs[i] for i in at], (dout, dweights, dscores)), strict=True)) if at else {}
    return [made.get(i) for i in range(len(needs))]


_WORD_BY_WORD = Operator(
    "word_by_word",
    WordByWordInputs,
    differentiable="premise hypothesis w_y w_h w_r w w_t state",
    # plain: by the reference, whose loop is not the compiler's to unroll
    choices="bool need_weights, bool need_scores, bool need_states, bool plain",
    results="out weights?need_weights scores?need_scores states?need_states key?need_states",
    saved="states key",
    dense=0,
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
    return_log_weights: bool = False,
    return_scores: bool = False,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, ...]:
    r"""Word-by-word attention: every word of the hypothesis attends to the premise, and to what the last one found.

    .. math:: M_{tj} = \tanh(y_j W_y + h_t W_h + r_{t-1} W_r), \quad \alpha_t = softmax_j(M_t w), \quad
        r_t = \sum_j \alpha_{tj} \, y_j + \tanh(r_{t-1} W_t)

    A true recurrence: one program walks all steps of a sequence. Where the premise has no visible key,
    r_t = tanh(r_{t-1} W_t), and the weights are zero.

    Parameters
    ----------
    premise, hypothesis
        Y ``(B, Ty, D)`` and h ``(B, Th, Dh)``; packed ``(N, D)`` and ``(M, Dh)``, both or one of them, with its
        ``cu_seqlens``. float16, bfloat16, float32; float64 on a CPU or by the reference.
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
        bool ``(B, Ty)``, True = this word of the premise may be attended; not with a packed one. Words that it hides
        may be NaN. A padded hypothesis needs no mask: states come in order, so those up to its length are right, and
        its last is ``r[arange(B), length - 1]``. What follows is to be ignored, and its padding has to be finite.
    cu_seqlens_premise, cu_seqlens_hypothesis
        int32 ``(S + 1,)``, of packed rows: hypothesis s reads premise s. Of one side alone ``(B + 1,)``, and the
        other is padded. Any may be empty. Last states are at ``cu_seqlens_hypothesis[1:] - 1``, where no hypothesis
        is empty.
    return_weights
        Return the weights too (of a padded premise only). They are differentiable.
    return_log_weights, return_scores, return_lse
        See `location_attention`; of a padded premise only. The kernel leaves the scores of every step; what the
        normaliser tells is made of them in PyTorch.
    impl
        ``"auto"``: the Triton kernel on a GPU (the reference for float64), the reference elsewhere. ``"triton"`` and
        ``"reference"`` never fall back. The reference is a loop over t, and pads packed rows to the longest sequence,
        for which it reads the offsets; to `torch.compile` and `torch.export` it is one operator.

    Returns
    -------
    Tensor or tuple of Tensor
        r of every step, ``(B, Th, D)`` or packed ``(M, D)``, of which the last is ``r[:, -1]``; weights, log weights
        and scores ``(B, Th, Ty)``, or ``(M, Ty)``; lse ``(B, Th)``, or ``(M,)``.

    Raises
    ------
    ValueError, TypeError
        For arguments that do not fit, a packed premise whose weights are asked for, and an `impl` that cannot run
        here.

    References
    ----------
    Rocktäschel et al. 2016, Reasoning about entailment with neural attention.

    """
    cu_seqlens_premise, cu_seqlens_hypothesis = as_offsets(cu_seqlens_premise), as_offsets(cu_seqlens_hypothesis)
    if not isinstance(premise, Tensor):
        raise TypeError(f"premise: expected a torch.Tensor; got {type(premise).__name__}")
    wanted = check_wanted(return_weights, return_scores, return_lse, False, return_log_weights)
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
        wanted,
    )
    kernel = use_triton(impl, premise.device, "has no float64" if premise.dtype == torch.float64 else None)
    rows = premise, hypothesis, w_y, w_h, w_r, w, w_t, state
    inputs = WordByWordInputs(*rows, mask, cu_seqlens_premise, cu_seqlens_hypothesis)
    more = wanted.log_weights or wanted.scores or wanted.lse
    if kernel or (torch.compiler.is_compiling() and not forward_mode()):
        asked = kernel and may_ask(*rows)
        out, weights, scores, *_ = _WORD_BY_WORD(inputs, wanted.weights, more, asked, not kernel)
    else:
        out, weights, scores = reference.word_by_word_attention(inputs)
    if not more:
        return (out, weights.to(out.dtype)) if wanted.weights else out
    top = highest(scores, -1)
    lse = normaliser(top, torch.exp(scores - pivot_of(top)[..., None]).sum(-1))
    log_weights = weights_from(scores, lse[..., None, :], dim=-1, log=True) if wanted.log_weights else None
    return out, *beside(wanted, out.dtype, lse, weights, scores, log_weights)


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
    wanted: Wanted,
) -> None:
    """Check every argument."""
    if cu_seqlens_premise is not None:
        asked = zip(Wanted._fields[:-1], wanted, strict=False)
        refuse_packed("premise", mask=mask, **{f"return_{name}": x for name, x in asked})
    check = Checker(_TABLES[cu_seqlens_premise is not None, cu_seqlens_hypothesis is not None])
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
    elif cu_seqlens_premise is not None:
        check_one_side(check, _OFFSETS[0], cu_seqlens_premise, premise.shape[0])
    elif cu_seqlens_hypothesis is not None:
        check_one_side(check, _OFFSETS[1], cu_seqlens_hypothesis, hypothesis.shape[0])
    check("state", state)
    check("mask", mask)
