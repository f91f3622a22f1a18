"""Location attention: a score from each key alone, a softmax over the keys, a weighted sum of the values.

Also known as self-attentive pooling, attention-based MIL pooling, HAN's word and sentence attention.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from . import reference
from ._checks import (
    Checker,
    Table,
    argument,
    check_activation,
    check_dropout,
    check_offsets,
    check_score_activation,
    check_values,
    check_window,
    mask_of,
    offsets_of,
    show,
)
from ._dropout import draw_seed
from ._habits import explicit
from ._jagged import jagged_offsets
from ._location_windowed import WINDOW
from ._operators import Operator, exact_of, launcher
from ._ops import (
    Impl,
    exports_from_one,
    forward_mode,
    keeps_exact,
    under_autocast,
    use_triton,
    weights_from,
    weights_of_rows,
)
from ._results import Wanted, by_formula, check_wanted, returned, stand_in, widened
from .kernels.inputs import LocationInputs, WindowInputs
from .segments import Offsets, as_offsets


def _table(rows: str, seq: str, inner: str) -> Table:
    """Rows are ``"B T"`` or ``"N"``, sequences ``"B"`` or ``"S"``; inner: the axis of the projection, or none."""
    packed = seq != "B"
    explicit = f"{seq} 1 {inner} | 1 {rows} {inner}" if packed else f"{seq} 1 {inner}"
    return {
        "h": argument(f"{rows} D", "first", offsets="" if packed else "cu_seqlens"),
        "w": argument("D A" if inner == "A" else "D | D R", linear=True),
        "b": argument(inner, optional=True),
        "v": argument("A | A R", optional=True, linear=True),
        "gate[0]": argument("D A", optional=True, linear=True),
        "gate[1]": argument("A", optional=True),
        "context": argument(f"{seq} {inner} | {rows} {inner} | {explicit}", optional=True),
        "value": argument(f"{rows} Dv", optional=True, empty=True),  # a window has weights all the same
        "mask": mask_of(rows),
        "score_bias": argument(rows, "bias", optional=True),
        "cu_seqlens": offsets_of("S"),
    }


_TABLES = {
    (packed, inner): _table("N" if packed else "B T", "S" if packed else "B", inner)
    for packed in (False, True)
    for inner in ("", "R", "A")
}


def _fake(inputs: LocationInputs, pool: bool, need_exact: bool) -> tuple[Tensor, ...]:
    h, w, _, v, _, _, _, value, _, _, cu_seqlens, *_ = inputs
    seqs = h.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    hops = cast("Tensor", w if v is None else v).shape[1]
    width = (h if value is None else value).shape[-1]
    return (
        h.new_empty((seqs, hops, width) if pool else 0),
        h.new_empty(seqs if pool else 0, hops, 2, dtype=torch.float32),
        h.new_empty(*h.shape[:-1], hops, dtype=torch.float32),
        h.new_empty((seqs, hops, width) if pool and need_exact else 0, dtype=torch.float32),
    )


def _bwd(inputs: LocationInputs, *args: Any) -> list[Tensor | None]:
    out, lse, scores, exact, dout, dlse, dscores, *_, needs = args
    run = launcher("location_bwd.location_bwd")
    return cast("list[Tensor | None]", run(inputs, exact_of(out, exact), lse, scores, dout, dlse, dscores, needs))


LOCATION = Operator(
    "location",
    LocationInputs,
    differentiable="h w b v gate_w gate_b context value score_bias",
    choices="bool pool, bool need_exact",
    results="out?pool lse?pool scores exact?need_exact",
    saved="out lse scores exact",
    forward=launcher("location.location_fwd"),
    backward=_bwd,
    fake=_fake,
    formula=reference.location_attention,
)


@explicit
@exports_from_one
@under_autocast("h", "w", "b", "v", "gate", "context", "value")
def location_attention(
    h: Tensor,
    w: Tensor | None,
    b: Tensor | None = None,
    v: Tensor | None = None,
    *,
    gate: tuple[Tensor, Tensor | None] | None = None,
    context: Tensor | Sequence[Tensor] | None = None,
    value: Tensor | Literal[False] | None = None,
    activation: str = "tanh",
    gate_activation: str = "sigmoid",
    score_activation: str = "identity",
    mask: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    score_bias: Tensor | None = None,
    cu_seqlens: Offsets | None = None,
    dropout_p: float = 0.0,
    return_weights: bool = False,
    return_log_weights: bool = False,
    return_scores: bool = False,
    return_lse: bool = False,
    return_state: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Any, ...]:
    r"""Attention pooling: scores from the keys alone.

    .. math:: s_j = v \cdot \big( act(h_j W + b + ctx_j) \odot gate\_act(h_j G + g) \big) + \beta_j, \quad
        o = \sum_j softmax_j(s_j) \, value_j

    The gate is there with `gate`, the product with `v` with `v`, the context and the bias :math:`\beta` where
    they are given. A sequence without a visible key gives zeros, zero weights and zero gradients.

    With a `window` every position i has an output of its own, over the keys that it sees:

    .. math:: o_i = \sum_j softmax_j(s_j) \, value_j \quad over \quad i - left <= j <= i + right

    A window with an open side is a scan: time and memory are linear in T. With two ends the time is T times its
    width, and so it is with dropout, which differs between the positions.

    Parameters
    ----------
    h
        Keys: ``(B, T, D)``; packed ``(N, D)`` with `cu_seqlens`; or a jagged ``torch.nested`` tensor.
        float16, bfloat16 or float32; float64 by the reference only.
    w, b
        Linear score: ``w (D,)``, ``b ()``; with R hops ``w (D, R)``, ``b (R,)``.
        MLP score (with `v`): ``w (D, A)``, ``b (A,)``; ``w=None`` where h is projected already, A = D: with a
        `context` a sequence and `value` this is concat attention of one query, ragged too.
    v
        ``(A,)``, or ``(A, R)`` for R hops.
    gate
        ``(G (D, A), g (A,) or None)``; needs `v`.
    context
        Added before the activation; its width is that of the projection (A, R, or none for ``w (D,)``).
        Padded: ``(B, A)`` or ``(B, 1, A)`` a sequence, ``(B, T, A)`` a row. Packed: ``(S, A)`` a sequence or
        ``(N, A)`` a row, or with the choice made explicit ``(S, 1, A)`` and ``(1, N, A)``, which is needed where
        S = N. Beside a jagged `h`: ``(S, A)`` or ``(S, 1, A)``, or jagged. A list or tuple of contexts, of either
        kind, is their sum: those of sequences are expanded where there are some of rows too, and not else.
    value
        What is summed: ``(B, T, Dv)`` or ``(N, Dv)``; the keys where None. False: nothing is, and there is no output;
        what else is asked for is returned, alone or as a tuple. (The kernels sum 16 features of the keys.)
    activation, gate_activation
        identity, tanh, relu, sigmoid, leaky_relu (slope 0.2), elu, gelu or silu.
    score_activation
        "logsigmoid": the softmax is of log σ(s), s the score with its bias, so that a weight is σ(s_j) / Σ σ(s)
        (Chorowski et al. 2015, smoothing). Scores that are returned, lse and a state are of log σ(s) too. "identity":
        of s itself.
    mask
        bool ``(B, T)`` or ``(N,)``, True = may be attended. What is masked is never read: it may be NaN.
    window
        ``(left, right)``, a tuple or list, None for an open side; None for one output a sequence. Causal is
        ``(None, 0)``, strictly causal ``(None, -1)``. The mask is of keys: what it hides has an output, over the keys
        that it sees. A row of NaN reaches only the positions that see it, and no gradient where nothing comes back to
        those.
    score_bias
        ``(B, T)`` or ``(N,)``, in the dtype of `h` or float32: a log-prior, added to the scores of every hop.
    cu_seqlens
        int32 ``(S + 1,)``: sequence s is the rows ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]`` of `h`.
    dropout_p
        Probability that a weight is dropped, 0 <= p < 1. It always applies: pass 0 for evaluation. The mask
        comes from a counter-based generator, seeded from PyTorch's, and is the same in the backward.
    return_weights
        Return the weights too, as they are before dropout. They are differentiable. With a window they are of size
        T·T, and padded only.
    return_log_weights
        Return the logarithms of the weights too, in the dtype of the scores, -inf of a key that is not visible, to
        which no gradient goes. They are exact where a weight is too small to be more than 0: for a loss.
    return_scores
        Return the scores too, in float32 (float64 where the inputs are), -inf where the mask hides: what the softmax
        is of, the bias within. With a window too they are one a key, for they do not depend on the position.
    return_lse
        Return log Σ exp(score) over the visible keys too, -inf of none, in the dtype of the scores.
    return_state
        Return a `State` ``(out, m, log_l)`` in place of the output, as wide as the scores: the parts of a softmax
        whose keys are split, which `merge` joins. Not with a window over a jagged `h`. Dropout changes ``out`` alone.
        All of these are differentiable.
    impl
        ``"auto"``: the Triton kernel on a GPU, PyTorch elsewhere, for float64 and for more than 128 hops; with a
        window in blocks, where the reference makes all pairs. ``"triton"`` and ``"reference"`` never fall back.

    Returns
    -------
    Tensor, State or tuple
        The output or the state alone, or a tuple of it and what is asked for, in the order weights, log weights,
        scores, lse; so in every family.
        Output ``(B, Dv)``, or ``(B, R, Dv)`` where `v` (`w` without `v`) has a hop axis; S for B where ragged.
        Weights, log weights and scores ``(B, T)`` or ``(B, R, T)``; packed ``(N,)`` or ``(N, R)``; jagged for a
        jagged `h`.
        m, log_l and lse as the output, without Dv.
        With a window: output ``(B, T, Dv)``, ``(B, T, R, Dv)``; packed ``(N, Dv)``, ``(N, R, Dv)``; jagged for a
        jagged `h`; weights and log weights ``(B, T, T)``, ``(B, R, T, T)``.

    Raises
    ------
    ValueError, TypeError
        For arguments that do not fit, packed rows with a window whose weights are asked for, and an `impl` that
        cannot run here.

    References
    ----------
    Lin et al. 2017 (self-attentive sentence embedding, R hops); Yang et al. 2016 (HAN); Ilse et al. 2018
    (gated MIL); Ma et al. 2017 (Dipole, linear score).

    """
    cu_seqlens = as_offsets(cu_seqlens)
    if not isinstance(h, Tensor):
        raise TypeError(f"h: expected a torch.Tensor; got {type(h).__name__}")
    wanted = check_wanted(return_weights, return_scores, return_lse, return_state, return_log_weights, value=value)
    value = None if value is False else value
    offsets = None
    if h.is_nested:
        h, offsets, context, value, score_bias, cu_seqlens = _unpack_jagged(
            h, context, value, score_bias, mask, cu_seqlens, wide=v is not None or not _is_vector(w)
        )
    gate_w, gate_b = _split_gate(gate)
    context, context_per_row = _validate_location(
        h, w, b, v, gate_w, gate_b, context, value, score_bias, mask, cu_seqlens,
        activation, gate_activation, dropout_p, jagged=offsets is not None,
    )  # fmt: skip
    check_score_activation("score_activation", score_activation)
    left, right = check_window(window)
    if window is not None and (wanted.weights or wanted.log_weights) and cu_seqlens is not None:
        name = "return_weights" if wanted.weights else "return_log_weights"
        raise ValueError(f"{name}: expected False with a window and packed rows, pad the batch to see them; got True")
    if window is not None and wanted.state and offsets is not None:
        raise ValueError(
            "return_state: expected False with a window and a jagged h, pass its rows with cu_seqlens; got True"
        )
    last = cast("Tensor", w if v is None else v)
    hop_axis = last.dim() == 2
    seed = draw_seed(dropout_p, h.device)
    value = value if wanted.output else stand_in(h)
    inputs = LocationInputs(
        h,
        w if w is None or w.dim() == 2 else w[:, None],
        b if b is None or b.dim() == 1 else b[None],
        v if v is None or v.dim() == 2 else v[:, None],
        gate_w, gate_b, context, value, score_bias, mask, cu_seqlens, seed,
        activation, gate_activation, float(dropout_p), context_per_row, score_activation,
    )  # fmt: skip
    unsupported = None
    if h.dtype == torch.float64:
        unsupported = "has no float64"
    elif last.shape[-1] > 128 and hop_axis:
        unsupported = "holds at most 128 hops"
    kernel = use_triton(impl, h.device, unsupported)
    if window is not None:
        both = _row_scores(inputs, kernel), h if value is None else value
        windowed = WindowInputs(*both, cu_seqlens, seed, left, right, inputs.dropout_p)
        return _windowed(windowed, h.dtype, impl, kernel, hop_axis, wanted, offsets)
    weights: Tensor | None = None
    if kernel:
        out, lse, scores, exact = LOCATION(inputs, True, keeps_exact(*inputs[:9], state=wanted.state))
        out = wanted.output_of(out, exact)
    else:
        out, lse, scores, weights = by_formula(LOCATION.formula, inputs, wanted)
    if wanted.weights and weights is None:
        weights = weights_of_rows(scores, lse, cu_seqlens)
    log_weights = weights_of_rows(scores, lse, cu_seqlens, log=True) if wanted.log_weights else None

    def keys(x: Tensor) -> Tensor:
        """A number a key and hop, in the form of the keys."""
        x = x if cu_seqlens is not None else x.mT
        x = x if hop_axis else x.squeeze(1)
        return x if offsets is None else torch.nested.nested_tensor_from_jagged(x, offsets)

    return returned(
        wanted,
        h.dtype,
        out if hop_axis else out.squeeze(1),
        lse if lse is None or hop_axis else lse.squeeze(1),
        keys(weights) if wanted.weights and weights is not None else None,
        keys(scores) if wanted.scores else None,
        None if log_weights is None else keys(log_weights),
    )


def _row_scores(inputs: LocationInputs, kernel: bool) -> Tensor:
    """The scores of all rows, for a window: not pooled, and without dropout."""
    h, context, mask = inputs.h, inputs.context, inputs.mask
    bad = None
    if not kernel:
        # 0 * NaN is NaN: the row of one that only the window hides would reach the gradients of the parameters. The
        # kernels leave out the rows that have no gradient.
        bad = ~h.isfinite().all(-1, keepdim=True)
        if inputs.context_per_row:
            assert context is not None
            bad = bad | ~context.isfinite().all(-1, keepdim=True)
            context = context.masked_fill(bad, 0)
        bad = bad if mask is None else bad & mask[..., None]
        h = h.masked_fill(bad, 0)
    plain = {"value": None, "seed": None, "dropout_p": 0.0, "score_activation": "identity"}
    alone = inputs._replace(h=h, context=context, **plain)
    scores = LOCATION(alone, False, False)[2] if kernel else LOCATION.formula(alone)[2]
    if inputs.score_activation != "identity":  # whose slope at NaN is NaN
        lost = scores.isnan()
        bad = lost if bad is None else lost | bad
        scores = reference.SCORE_ACTIVATIONS[inputs.score_activation](scores.masked_fill(lost, 0))
    return scores if bad is None else scores.masked_fill(bad, torch.nan)


def _windowed(
    inputs: WindowInputs,
    dtype: torch.dtype,
    impl: Impl,
    kernel: bool,
    hop_axis: bool,
    wanted: Wanted,
    offsets: Tensor | None,
) -> Any:
    """One output a position."""
    if impl == "reference" or forward_mode():
        out, lse = reference.windowed_attention(widened(inputs) if wanted.state else inputs)
    else:
        asked = kernel and keeps_exact(inputs.value, inputs.scores, state=wanted.state)
        out, lse, exact = WINDOW(inputs, not kernel, asked)
        out = wanted.output_of(out, exact)
    weights = _window_weights(inputs, lse, log=False) if wanted.weights else None
    log_weights = _window_weights(inputs, lse, log=True) if wanted.log_weights else None

    def rows(x: Tensor | None, hop: int) -> Any:
        return x if hop_axis or x is None else x.squeeze(hop)

    scores = inputs.scores if inputs.cu_seqlens is not None else inputs.scores.mT
    pairs = rows(weights, 1), rows(scores, 1), rows(log_weights, 1)
    results = returned(wanted, dtype, rows(out, -2), rows(lse, -2), *pairs)
    if offsets is None:
        return results
    if isinstance(results, Tensor):
        return torch.nested.nested_tensor_from_jagged(results, offsets)
    return tuple(torch.nested.nested_tensor_from_jagged(x, offsets) for x in results)


def _window_weights(inputs: WindowInputs, lse: Tensor, *, log: bool) -> Tensor:
    """The weights ``(B, R, T, T)`` of all positions and keys, or their logarithms."""
    scores = inputs.scores
    j = torch.arange(scores.shape[1], device=scores.device)
    shown = reference.in_window(j[:, None], j, inputs.left, inputs.right, torch.ones_like(j, dtype=torch.bool))
    # A position that sees NaN is NaN, but sends none if nothing comes back to it.
    lse = lse.transpose(1, 2)[..., None, :]
    spoilt = lse[..., 1].isnan()
    pairs = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).mT[:, :, None]
    pairs = pairs.masked_fill(spoilt | ~shown, -torch.inf)  # (B, R, T, T), of positions and keys
    weights = weights_from(pairs, lse.masked_fill(spoilt[..., None], 1), dim=-1, log=log)
    return reference.spoil(weights, spoilt & shown)


def _is_vector(w: Any) -> bool:
    return isinstance(w, Tensor) and w.dim() == 1


def _num_sequences(h: Tensor, cu_seqlens: Tensor | None) -> int:
    return h.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _unpack_jagged(
    h: Tensor, context: Tensor | Sequence[Tensor] | None, value: Tensor | None, score_bias: Tensor | None,
    mask: Tensor | None, cu_seqlens: Tensor | None, *, bias_name: str = "score_bias", wide: bool = True,
) -> tuple[Tensor, Tensor, Tensor | Sequence[Tensor] | None, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Packed rows and offsets of a jagged batch; contexts take the form that says a row or a sequence.

    wide: whether contexts have an axis of features.
    """
    if h.layout != torch.jagged:
        raise ValueError("h: expected layout=torch.jagged for a nested tensor; got the strided layout")
    if mask is not None:
        raise ValueError("mask: expected None with a jagged h, which holds only visible rows; got a tensor")
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens: expected None with a jagged h, which has offsets; got a tensor")
    offsets = jagged_offsets("h", h)
    rows = cast("Any", h).values()  # a NestedTensor, whose methods Tensor's type does not have

    def packed(name: str, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a jagged tensor with the offsets of h; got {type(x).__name__}")
        if not (x.is_nested and x.layout == torch.jagged):
            raise ValueError(f"{name}: expected a jagged tensor with the offsets of h; got {tuple(x.shape)}")
        theirs, data = jagged_offsets(name, x), cast("Any", x).values()
        if theirs is not offsets:
            if theirs.shape != offsets.shape or data.shape[0] != rows.shape[0] or theirs.device != offsets.device:
                raise ValueError(
                    f"{name}: expected a jagged tensor with the offsets of h; got {show(theirs.tolist())}"
                )
            check_values(name, theirs, (theirs == offsets).all(), "a jagged tensor with the offsets of h")
        return data

    def of_kind(name: str, context: Tensor) -> Tensor:
        is_jagged = isinstance(context, Tensor) and context.is_nested
        return packed(name, context)[None] if is_jagged else _a_sequence(name, context, offsets, wide)

    if isinstance(context, (tuple, list)):
        context = [of_kind(f"context[{i}]", x) for i, x in enumerate(context)]
    elif context is not None:
        context = of_kind("context", cast("Tensor", context))
    value = None if value is None else packed("value", value)
    score_bias = None if score_bias is None else packed(bias_name, score_bias)
    return rows, offsets, context, value, score_bias, offsets.to(torch.int32)


def _a_sequence(name: str, context: Tensor, offsets: Tensor, wide: bool = True) -> Tensor:
    """The form that says one vector a sequence of a jagged h; what is no tensor is left to the checks."""
    if not isinstance(context, Tensor) or context.layout != torch.strided:
        return context
    seqs, axes = offsets.shape[0] - 1, 1 + wide
    if context.dim() == axes + 1 and tuple(context.shape[:2]) == (seqs, 1):
        return context
    if context.dim() != axes or context.shape[0] != seqs:
        raise ValueError(
            f"{name}: expected a vector a sequence, S = {seqs} from h, or a jagged tensor of one a row; "
            f"got {tuple(context.shape)}"
        )
    return context[:, None]


def _split_gate(
    gate: tuple[Tensor, Tensor | None] | None, name: str = "gate"
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    if gate is None:
        return None, None
    if not isinstance(gate, (tuple, list)) or len(gate) != 2:
        raise TypeError(f"{name}: expected a pair (weight, bias or None); got {type(gate).__name__}")
    if gate[0] is None:
        raise TypeError(
            f"{name}: expected a pair (weight, bias or None), or None for no gate; got None as its weight"
        )
    return gate[0], gate[1]


def _validate_location(
    h: Tensor, w: Tensor | None, b: Tensor | None, v: Tensor | None, gate_w: Tensor | None, gate_b: Tensor | None,
    context: Tensor | Sequence[Tensor] | None, value: Tensor | None, score_bias: Tensor | None, mask: Tensor | None,
    cu_seqlens: Tensor | None, activation: str, gate_activation: str, dropout_p: float, *, jagged: bool = False,
) -> tuple[Tensor | None, bool]:  # fmt: skip
    """Check every argument; return what `one_context` makes of the context."""
    inner = "A" if v is not None else "" if _is_vector(w) else "R"
    check = Checker(_TABLES[cu_seqlens is not None, inner])
    check("h", h)
    if cu_seqlens is not None:
        check_sequences(check, cu_seqlens, h, jagged=jagged)
    check_score(check, h, w, b, v, gate_w, gate_b, activation, gate_activation)
    for name, x in (("mask", mask), ("value", value), ("score_bias", score_bias)):
        if x is not None:
            check(name, x)
    check_dropout("dropout_p", dropout_p)
    return one_context(check, context, h, cu_seqlens)


def check_sequences(check: Checker, cu_seqlens: Tensor, h: Tensor, *, jagged: bool = False) -> None:
    """Check the offsets of packed rows, which may be those of a jagged `h`, and bind S."""
    name = "h" if jagged else "cu_seqlens"
    if not jagged:
        check(name, cu_seqlens)
    check_offsets(name, cu_seqlens, h.shape[0], "packed rows")
    check.bind("S", cu_seqlens.shape[0] - 1, name)


def check_score(
    check: Checker, h: Tensor, w: Tensor | None, b: Tensor | None, v: Tensor | None, gate_w: Tensor | None,
    gate_b: Tensor | None, activation: str, gate_activation: str,
) -> None:  # fmt: skip
    """Check what makes a score of the rows `h`."""
    if w is None:
        if v is None or gate_w is not None:
            given = "v=None" if v is None else "a gate"
            raise ValueError(
                f"{check.prefix}w: expected a tensor, or None with v and without a gate (h is projected); got {given}"
            )
        check.bind("A", h.shape[-1], check.like)
    else:
        check("w", w)
    if b is not None:
        check("b", b)
    if v is not None:
        check("v", v)
    if gate_w is not None:
        if v is None:
            raise ValueError(
                f"{check.prefix}gate: expected v with a gate, to reduce the gated features to a score; got v=None"
            )
        check("gate[0]", gate_w)
        check("gate[1]", gate_b)
    check_activation(f"{check.prefix}activation", activation)
    check_activation(f"{check.prefix}gate_activation", gate_activation)


def one_context(
    check: Checker, context: Tensor | Sequence[Tensor] | None, h: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor | None, bool]:
    """Check a context of the rows `h`, or each of several; return their sum, and whether that has one entry a row.

    ``(B, T, A)`` or ``(N, A)`` where it has, else ``(B, A)`` or ``(S, A)``.
    """
    if context is None:
        return None, False
    several = isinstance(context, (tuple, list))
    of_rows: list[Tensor] = []
    of_sequences: list[Tensor] = []
    for i, x in enumerate(context if several else (cast("Tensor", context),)):
        per_row = check_context(check, "context", x, f"context[{i}]" if several else "context")
        width = x.shape[-1] if len(check.table["context"].forms[0]) == 2 else 1
        if per_row:
            of_rows.append(x.reshape(*h.shape[:-1], width))
        else:
            of_sequences.append(x.reshape(_num_sequences(h, cu_seqlens), width))
    if not (of_rows or of_sequences):
        raise ValueError("context: expected a tensor, or one or more of them; got none")
    if not of_rows:
        return functools.reduce(torch.add, of_sequences), False
    total = functools.reduce(torch.add, of_rows)
    if of_sequences:
        x = functools.reduce(torch.add, of_sequences)
        segment = None if cu_seqlens is None else reference.segment_ids(cu_seqlens, h.shape[0])
        total = total + (x[:, None] if segment is None else x.index_select(0, segment))
    return total, True


def check_context(check: Checker, row: str, context: Tensor, name: str = "") -> bool:
    """Check a context by its row of the table; return whether it has one entry a row. Where packed, S is bound.

    name: of the argument, where it is not that of the row.
    """
    name = name or row
    if context is None:  # one of several, which the table lets be none
        raise TypeError(f"{check.prefix}{name}: expected a torch.Tensor; got NoneType")
    check(name, context, row)
    forms, shape = check.table[row].forms, context.shape
    if len(forms) == 3:  # padded: of one row both kinds are the same
        return len(shape) == len(forms[1]) and shape[1] == check.sizes[forms[1][1]]
    (seq, *tail), (row, *_) = forms[:2]
    seqs, rows = check.sizes[seq], check.sizes[row]
    if len(shape) == len(forms[0]):
        if seqs == rows:
            more = "".join(f", {word}" for word in tail)
            raise ValueError(
                f"{check.prefix}{name}: expected ({seq}, 1{more}) or (1, {row}{more}) where {seq} = {row} = {seqs}, "
                f"to tell one vector a sequence from one a row; got {tuple(shape)}"
            )
        return bool(shape[0] == rows)
    return bool(shape[1] == rows and shape[0] == 1)
