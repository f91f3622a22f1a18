"""Hierarchical attention: rows (words) pooled into segments (sentences), and those into groups (documents).

Both levels are location attention; the kernel runs both in one launch. Known from HAN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import reference
from ._checks import Checker, argument, check_flag, check_offsets, check_tensor, mask_of, offsets_of
from ._habits import explicit
from ._operators import Operator, exact_of, launcher
from ._ops import Impl, exports_from_one, keeps_exact, under_autocast, use_triton, weights_from
from ._results import Wanted, check_wanted, returned, widened
from .kernels.inputs import HierarchicalInputs, LocationInputs
from .location import LOCATION, _split_gate, _table, check_context, check_score
from .segments import Offsets, as_offsets
from .states import State, lse_of

_TABLE = {
    "h": argument("N D", "first", hint="pack the rows of all segments, one after the other"),
    "inner_offsets": offsets_of("S", optional=False),
    "outer_offsets": offsets_of(
        "G", optional=False, hint="offsets of the groups in the segments: counts.cumsum(0) with a leading 0, .int()"
    ),
    "mask": mask_of("N"),
}
_LEVELS = {
    level: {
        inner: {**_table(rows, seq, inner), "w": argument("D A" if inner else "D", linear=True), "v": argument("A")}
        for inner in ("", "A")
    }
    for level, rows, seq in (("inner", "N", "S"), ("outer", "S", "G"))
}
_SCORE = 6  # tensors of a canonical score


class Score(NamedTuple):
    """The score of one level, as `location_attention` takes it, of one weighting.

    Linear: ``w (D,)``, ``b ()``. MLP: ``w (D, A)``, ``b (A,)``, ``v (A,)``, with `gate`
    ``(G (D, A), g (A,) or None)``; ``w=None`` where the rows are projected already.
    The context, added before the activation, is one vector a segment ``(S, A)`` or a row ``(N, A)``, where S = N
    ``(S, 1, A)`` or ``(1, N, A)``; of the outer level one a group ``(G, A)`` or a segment ``(S, A)``, likewise.
    """

    w: Tensor | None
    b: Tensor | None = None
    v: Tensor | None = None
    gate: tuple[Tensor, Tensor | None] | None = None
    context: Tensor | None = None
    activation: str = "tanh"
    gate_activation: str = "sigmoid"


class HierarchicalOutput(NamedTuple):
    """What `hierarchical_attention` returns where more than the output was asked for; the rest is None."""

    out: Any
    """The output, a tensor; or its `State`."""
    segments: Tensor | None
    inner_weights: Tensor | None
    outer_weights: Tensor | None
    inner_scores: Tensor | None = None
    outer_scores: Tensor | None = None
    lse: Tensor | None = None


def _fake(inputs: HierarchicalInputs, need_exact: bool) -> tuple[Tensor, ...]:
    h = inputs.h
    rows, width = h.shape
    seqs, groups = inputs.inner_offsets.shape[0] - 1, inputs.outer_offsets.shape[0] - 1
    return (
        h.new_empty(groups, 1, width),
        h.new_empty(groups, 1, 2, dtype=torch.float32),
        h.new_empty(seqs, 1, dtype=torch.float32),
        h.new_empty(seqs, width),
        h.new_empty(seqs, 1, 2, dtype=torch.float32),
        h.new_empty(rows, 1, dtype=torch.float32),
        *(h.new_empty((n, 1, width) if need_exact else (0,), dtype=torch.float32) for n in (groups, seqs)),
    )


def _bwd(inputs: HierarchicalInputs, *args: Any) -> list[Tensor | None]:
    out, outer_lse, outer_scores, segments, lse, scores, exact, pooled, *cotangents = args[:-4]
    inner = segments, exact_of(segments[:, None], pooled), lse, scores
    run = launcher("hierarchical.hierarchical_bwd")
    grads = run(inputs, exact_of(out, exact), outer_lse, outer_scores, *inner, *cotangents, args[-1])
    return cast("list[Tensor | None]", grads)


HIERARCHICAL = Operator(
    "hierarchical",
    HierarchicalInputs,
    differentiable=" ".join(HierarchicalInputs._fields[: 1 + 2 * _SCORE]),
    choices="bool need_exact",
    results="out outer_lse outer_scores segments lse scores exact?need_exact pooled?need_exact",
    saved="out outer_lse outer_scores segments lse scores exact pooled",
    dense=0,  # without a gradient of the output the outer level has nothing to do
    forward=launcher("hierarchical.hierarchical_fwd"),
    backward=_bwd,
    fake=_fake,
    formula=reference.hierarchical_attention,
)


@explicit
@exports_from_one
@under_autocast("h", "inner", "outer", "between")
def hierarchical_attention(
    h: Tensor,
    inner_offsets: Offsets,
    outer_offsets: Offsets,
    inner: Score,
    outer: Score,
    *,
    between: Callable[[Tensor, Tensor], Tensor] | None = None,
    mask: Tensor | None = None,
    return_segments: bool = False,
    return_weights: bool = False,
    return_scores: bool = False,
    return_lse: bool = False,
    return_state: bool = False,
    impl: Impl = "auto",
) -> Tensor | State | HierarchicalOutput:
    r"""Two levels of attention pooling over ragged segments, with parameters of their own.

    .. math:: x_i = \sum_{j \in i} softmax_j(s(h_j)) \, h_j, \quad y = between(x), \quad
        o_g = \sum_{i \in g} softmax_i(t(y_i)) \, y_i

    with :math:`s(h_j) = v \cdot act(h_j W + b + ctx_j)` and the other forms of `location_attention`, and t of the
    same kind. An additive (concat) score of one query a segment or a group is such a score, whose context is the
    projected query. A segment without a visible row is a zero vector that the outer level does not attend; a group
    without any gives zeros, zero weights and zero gradients.

    Parameters
    ----------
    h
        Rows ``(N, D)``, packed. float16, bfloat16 or float32; float64 by the reference only.
    inner_offsets
        int32 ``(S + 1,)``: segment i is the rows ``inner_offsets[i]`` to ``inner_offsets[i + 1]``.
    outer_offsets
        int32 ``(G + 1,)``: group g is the segments ``outer_offsets[g]`` to ``outer_offsets[g + 1]``.
    inner, outer
        The `Score` of rows, and that of segments.
    between
        ``(segments (S, D), outer_offsets) -> (S, D')``, a layer between the levels, such as the recurrent layer over
        the sentences of HAN (`RaggedRNN`). D' is the width that `outer` takes. The zero vectors of empty segments
        are in its input.
    mask
        bool ``(N,)``, True = may be attended. What is masked is never read: it may be NaN.
    return_segments
        Return the segments x too, as they are before `between`.
    return_weights
        Return the weights of both levels too, which are differentiable.
    return_scores, return_lse, return_state
        See `location_attention`: scores of both levels, -inf of a segment that sees nothing; lse and state of the
        outer one. `merge` joins states of groups over disjoint segments.
    impl
        ``"auto"``: Triton kernels on a GPU, PyTorch elsewhere and for float64. Without `between` the kernels are one
        launch where documents fit: D at most 256 (128 where a width is no multiple of 16), and as many groups as the
        chip has cores or at most 512 rows a group on average; else a launch a level. ``"triton"`` and ``"reference"``
        never fall back.

    Returns
    -------
    Tensor, State or HierarchicalOutput
        Output ``(G, D')``, or its state, whose m and log_l are ``(G,)``. With `return_segments`, weights, scores or
        lse a named tuple ``(out, segments (S, D), inner_weights (N,), outer_weights (S,), inner_scores (N,),
        outer_scores (S,), lse (G,))``, with None for what was not asked for.

    Raises
    ------
    ValueError
        For shapes and values that do not fit, and for an `impl` that cannot run here.
    TypeError
        For dtypes, and for scores that are no `Score`.

    References
    ----------
    Yang et al. 2016 (HAN).

    """
    inner_offsets, outer_offsets = as_offsets(inner_offsets), as_offsets(outer_offsets)
    return_segments = check_flag("return_segments", return_segments)
    wanted = check_wanted(return_weights, return_scores, return_lse, return_state)
    Checker(_TABLE)("h", h)
    scores = [*_tensors_of("inner", inner), *_tensors_of("outer", outer)]
    check = Checker(_TABLE)
    check("h", h)
    check("inner_offsets", inner_offsets)
    check_offsets("inner_offsets", inner_offsets, h.shape[0], "packed rows")
    check("outer_offsets", outer_offsets)
    check_offsets("outer_offsets", outer_offsets, inner_offsets.shape[0] - 1, "segments")
    check("mask", mask)
    if between is not None and not callable(between):
        raise TypeError(f"between: expected a callable or None; got {type(between).__name__}")
    seqs = inner_offsets.shape[0] - 1
    inner_level = _level("inner", scores[:_SCORE], inner, h, seqs, check)
    width = h.shape[1] if between is None else _width_of(scores[_SCORE:], h.shape[1])
    # Of which nothing is read. The compiler drops it, and a kernel that would fill it.
    like = (h.new_zeros if torch.compiler.is_compiling() else h.new_empty)(()).expand(seqs, width)
    outer_level = _level("outer", scores[_SCORE:], outer, like, outer_offsets.shape[0] - 1, check)

    def checked(segments: Tensor, offsets: Tensor) -> Tensor:
        assert between is not None
        rows = between(segments, offsets)
        check_tensor(
            "between",
            rows,
            shapes=[("(S, D')", tuple(like.shape))],
            dtypes=[h.dtype],
            device=h.device,
            hint="its result is what outer takes",
        )
        return rows

    kernel = use_triton(impl, h.device, "has no float64" if h.dtype == torch.float64 else None)
    tensors = (*inner_level[:_SCORE], *outer_level[:_SCORE], mask, inner_offsets, outer_offsets)
    inputs = HierarchicalInputs(h, *tensors, *inner_level[_SCORE:], *outer_level[_SCORE:])
    if kernel and between is None:
        out, *results, exact, _ = HIERARCHICAL(inputs, keeps_exact(*inputs[: 1 + 2 * _SCORE], state=wanted.state))
        out = wanted.output_of(out, exact)
    else:
        out, *results = reference.hierarchical_attention(
            inputs,
            between=None if between is None else checked,
            attend=functools.partial(_attend if kernel else _by_formula, wanted),
        )
    outer_lse, outer_scores, segments, inner_lse, inner_scores = results
    first = returned(Wanted(state=wanted.state), h.dtype, out.squeeze(1), outer_lse.squeeze(1), None, None)
    if not (return_segments or wanted.pairs or wanted.lse):
        return cast("Tensor | State", first)

    def weights(raw: Tensor, lse: Tensor, offsets: Tensor) -> Tensor | None:
        return weights_from(raw, lse, offsets=offsets).squeeze(1).to(h.dtype) if wanted.weights else None

    return HierarchicalOutput(
        first,
        segments if return_segments else None,
        weights(inner_scores, inner_lse, inner_offsets),
        weights(outer_scores, outer_lse, outer_offsets),
        inner_scores.squeeze(1) if wanted.scores else None,
        outer_scores.squeeze(1) if wanted.scores else None,
        lse_of(outer_lse.squeeze(1)) if wanted.lse else None,
    )


for _class in (Score, HierarchicalOutput):  # so that `torch.export.save` knows them
    pytree._register_namedtuple(_class, serialized_type_name=f"fused_attn.{_class.__name__}")


def _attend(wanted: Wanted, inputs: LocationInputs) -> tuple[Tensor, ...]:
    """One level by the kernel; for a state its output is in float32."""
    out, lse, scores, exact = LOCATION(inputs, True, keeps_exact(*inputs[:9], state=wanted.state))
    return wanted.output_of(out, exact), lse, scores


def _by_formula(wanted: Wanted, inputs: LocationInputs) -> tuple[Tensor, ...]:
    """One level by the reference, likewise."""
    return reference.location_attention(widened(inputs) if wanted.state else inputs)


def _tensors_of(name: str, score: Score) -> list[Tensor | None]:
    """(w, b, v, gate_w, gate_b, context) of a score."""
    if not isinstance(score, Score):
        raise TypeError(f"{name}: expected a Score; got {type(score).__name__}")
    return [score.w, score.b, score.v, *_split_gate(score.gate, f"{name}.gate"), score.context]


def _width_of(tensors: list[Tensor | None], default: int) -> int:
    """The width of the rows that a score takes, as far as its tensors tell."""
    weight = tensors[2] if tensors[0] is None else tensors[0]
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() else default


def _level(
    name: str, tensors: list[Tensor | None], score: Score, rows: Tensor, seqs: int, of: Checker
) -> tuple[Any, ...]:
    """A score on `rows`, checked, as `reference.hierarchical_attention` takes it; of: the checker of the rest."""
    w, b, v, gate_w, gate_b, context = tensors
    check = Checker(_LEVELS[name]["" if v is None else "A"], f"{name}.")
    check.follow(of.like, rows.dtype, rows.device)
    check.bind("D", rows.shape[1], "h" if name == "inner" else "the segments")
    check.bind("N" if name == "inner" else "S", rows.shape[0], "h" if name == "inner" else "inner_offsets")
    check.bind("S" if name == "inner" else "G", seqs, f"{name}_offsets")
    check_score(check, rows, w, b, v, gate_w, gate_b, score.activation, score.gate_activation)
    per_row = context is not None and check_context(check, "context", context)
    if context is not None:
        context = context.reshape(rows.shape[0] if per_row else seqs, context.shape[-1] if v is not None else 1)
    return (
        w if w is None or w.dim() == 2 else w[:, None],
        b if b is None or b.dim() == 1 else b[None],
        None if v is None else v[:, None],
        gate_w,
        gate_b,
        context,
        score.activation,
        score.gate_activation,
        per_row,
    )
