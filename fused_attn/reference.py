"""The textbook formulas in plain PyTorch: the specification, the fallback, and the tests' oracle.

Every function here is written for reading: it materialises what the formula names, and autograd
differentiates it to any order. The kernels are tested against these functions in float64.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dropout import dropout_scale
from ._one_side import with_both_packed
from ._softmax import highest, normaliser, pivot_of, softmax, softmax_of_rows, sums_of_rows
from ._tracing import can_look, every_sample, in_graph, is_finite, is_tame
from .kernels.inputs import (
    SPREAD,
    ConcatInputs,
    GeneralInputs,
    GraphInputs,
    HierarchicalInputs,
    LocationInputs,
    StatisticsInputs,
    TargetInputs,
    WindowInputs,
    WordByWordInputs,
    pair_starts,
)

P = TypeVar("P", ConcatInputs, GeneralInputs)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
}
"""Those of the public functions."""
SCORE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda x: x, "logsigmoid": F.logsigmoid}
"""Of what a softmax is of."""
FEATURES = ACTIVATIONS | {"abs": torch.abs, "square": torch.square}
"""What may be made of a sum of query and key; of their difference, in distance attention."""
_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh_,
    "relu": torch.relu_,
    "sigmoid": torch.sigmoid_,
    "leaky_relu": lambda x: F.leaky_relu_(x, 0.2),
    "elu": F.elu_,
    "abs": torch.abs_,
    "square": torch.square_,
}


def activate(name: str, z: Tensor) -> Tensor:
    """The feature of a z that only the caller has: on a CPU in its place, if no gradient asks for z itself.

    New memory costs a CPU as much as an activation, for the system hands it out a page at a time. Graph attention has
    "leaky_relu:0.1" too, with that slope below 0.
    """
    if ":" in name:
        return F.leaky_relu(z, float(name.partition(":")[2]))
    if name in _IN_PLACE and can_look(z) and not asks_gradient(z):
        return _IN_PLACE[name](z)
    return FEATURES[name](z)


class _Looking(threading.local):
    """Whether a formula of this thread takes hidden rows as they are: its results are looked at instead."""

    after = False


_looking = _Looking()


def looked_at_after(formula: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """A formula whose results, all but the last, tell whether hidden rows hold what they should not: if not finite.

    On a CPU to look at the rows before takes as long as a product with them, and the results are short. But only
    where no gradient is asked for: that of a query meets the keys that are hidden from it, with a factor of 0.
    """

    @functools.wraps(formula)
    def wrapped(inputs: Any, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        tensors = [x for x in (*inputs, *options.values()) if isinstance(x, Tensor)]
        if inputs.mask is not None and can_look(tensors[0]) and not asks_gradient(*tensors):
            _looking.after = True
            try:
                results = formula(inputs, *args, **options)
            finally:
                _looking.after = False
            if all(is_finite(x) for x in results[:-1]):
                return results
        return formula(inputs, *args, **options)

    return wrapped


def asks_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd, of either mode, follows what is made of these."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def segment_ids(cu_seqlens: Tensor, rows: int) -> Tensor:
    """For each packed row, the index of its segment: int64 ``(rows,)``."""
    if can_look(cu_seqlens):  # a tenth of the time of a search
        return torch.repeat_interleave(cu_seqlens.diff().long(), output_size=rows)
    row = torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens.contiguous(), row, right=True) - 1


def _location_scores(inputs: LocationInputs, segment: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores of location attention, and its values, with zeros where the mask is False: in at least float32."""
    h, *score, value, score_bias, mask, _, _, activation, gate_activation, _, per_row, score_activation = inputs
    wide = torch.promote_types(h.dtype, torch.float32)  # float16 ends at 65,504: nothing on the way is rounded to it
    h, *score, value = (x if x is None or x.dtype == wide else x.to(wide) for x in (h, *score, value))
    w, b, v, gate_w, gate_b, context = score
    value = h if value is None else value

    if mask is not None:
        h, value = hide(mask[..., None], h, value)
        score_bias = None if score_bias is None else score_bias.masked_fill(~mask, 0)
    if context is not None and not per_row:
        if segment is None and mask is not None and not _looking.after:  # of a sequence that sees nothing
            context = context.masked_fill(~mask.any(1, keepdim=True), 0)
        context = context[:, None] if segment is None else context.index_select(0, segment)
    if context is not None and mask is not None and (per_row or segment is not None):
        (context,) = hide(mask[..., None], context)

    z = _affine(h, w, b)
    if context is not None:
        z = z + context
    u = FEATURES[activation](z) if z is h else activate(activation, z)
    if gate_w is not None:
        u = u * activate(gate_activation, _affine(h, gate_w, gate_b))
    scores = u if v is None else u @ v
    if score_bias is not None:
        scores = scores + score_bias[..., None]
    scores = SCORE_ACTIVATIONS[score_activation](scores)
    if mask is not None:
        scores = scores.masked_fill(~mask[..., None], -torch.inf)
    return scores, value


def _affine(h: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    """H W + b, of which each may be absent."""
    if w is None:
        return h if b is None else h + b
    return h @ w if b is None else F.linear(h, w.mT, b)


@looked_at_after
def location_attention(inputs: LocationInputs, *, weights_only: bool = False) -> tuple[Tensor, ...]:
    r"""Location attention on canonical arguments, as `fused_attn.location` passes them.

    .. math:: u_j = act(h_j W + b + c_j) [\odot gate\_act(h_j G + g)], \quad s_{jr} = u_j \cdot v_r + \beta_j,
        \quad o_r = \sum_j softmax_j(s_{jr}) \, value_j

    or with a `score_activation` the softmax of that of :math:`s_{jr}`.

    Returns ``out (S, R, Dv)`` in the dtype of ``value``, ``lse (S, R, 2)`` as `normaliser` has it, and in at
    least float32 ``scores (B, T, R)`` or ``(N, R)``, which are ``-inf`` where the mask is False; with `weights_only`
    out and, of the shape of the scores, the weights before dropout.
    """
    cu_seqlens, seed, dropout_p = inputs.cu_seqlens, inputs.seed, inputs.dropout_p
    dtype, rows = (inputs.h if inputs.value is None else inputs.value).dtype, inputs.h.shape[:-1]
    segment = None if cu_seqlens is None else segment_ids(cu_seqlens, rows[0])
    scores, value = _location_scores(inputs, segment)
    seqs = rows[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    weights, top = softmax_of_rows(scores, segment, seqs)
    shares = weights
    if dropout_p > 0:
        assert seed is not None
        hop = torch.arange(scores.shape[-1], device=seed.device)
        seq, place = positions(rows[0] if segment is None else 1, rows[-1], cu_seqlens, seed.device)
        scale = dropout_scale(seed, place[..., None], seq[..., None], hop, dropout_p)
        scale = scale if segment is None else scale[0]
        weights = weights * scale.to(weights.dtype)

    weights = weights.to(value.dtype)
    if segment is None:
        out = weights.mT @ value
    else:
        out = value.new_zeros(seqs, scores.shape[-1], value.shape[-1])
        out = out.index_add(0, segment, weights[:, :, None] * value[:, None, :])
    if weights_only:
        return out.to(dtype), shares
    return out.to(dtype), sums_of_rows(scores, top, segment), scores


def windowed_attention(inputs: WindowInputs) -> tuple[Tensor, Tensor]:
    r"""The windowed form of location attention, from its scores: one output a position, as if T queries came.

    .. math:: o_i = \sum_j softmax_j(s_j) \, value_j \quad over \quad i - left <= j <= i + right

    The values may hold anything where the scores are ``-inf``. Dropout draws as for R heads: of key j,
    sequence and hop, and query i.

    Returns ``out (B, T, R, Dv)`` or ``(N, R, Dv)`` in the dtype of ``value``, and ``lse``, see `normaliser`,
    with 2 for the last axis.
    """
    scores, value, cu_seqlens, seed, left, right, dropout_p = inputs
    if cu_seqlens is not None:
        scores, value = scores[None], value[None]
    (B, T, R), width, dtype = scores.shape, value.shape[-1], value.dtype
    value = value.to(torch.promote_types(dtype, torch.float32))
    # 0 * NaN is NaN: a row that holds one takes no part in the sums, and whoever sees it gets NaN after them.
    hidden = (scores == -torch.inf).all(-1, keepdim=True)
    holed = ~value.isfinite().all(-1, keepdim=True) & ~hidden
    bad = holed | ~(scores < torch.inf)
    value = value.masked_fill(hidden | holed, 0)
    pairs = scores.masked_fill(bad, -torch.inf).mT[:, :, None].expand(B, R, T, T)
    of_hops = value[:, None].expand(B, R, T, width)
    out, lse, *_ = _attend(pairs, of_hops, None, None, cu_seqlens, cu_seqlens, seed, left, right, dropout_p)
    seq, i = positions(B, T, cu_seqlens, scores.device)
    shown = in_window(i[:, :, None], i[:, None], left, right, seq[:, :, None] == seq[:, None])
    spoilt = (shown[..., None] & bad[:, None]).any(2)[..., None]  # (B, T, R, 1)
    out, lse = spoil(out.transpose(1, 2), spoilt).to(dtype), spoil(lse.transpose(1, 2), spoilt)
    return (out, lse) if cu_seqlens is None else (out[0], lse[0])


def spoil(x: Tensor, where: Tensor) -> Tensor:
    """NaN `where` told, else x. The gradient too is not finite there, but 0 where what comes back is 0."""
    big = torch.finfo(x.dtype).max
    return torch.where(where, x * big * big + torch.nan, x)


def positions(batch: int, length: int, cu_seqlens: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """(sequence, position in it) of each row: ``(B, T)`` each; packed, ``(1, N)``."""
    row = torch.arange(length, device=device)
    if cu_seqlens is None:
        return torch.arange(batch, device=device)[:, None].expand(batch, length), row.expand(batch, length)
    segment = segment_ids(cu_seqlens, length)
    return segment[None], (row - cu_seqlens[segment])[None]


def in_window(i: Tensor, j: Tensor, left: int | None, right: int | None, among: Tensor) -> Tensor:
    """Which of the pairs `among` are in the window: ``i - left <= j <= i + right``, None for an open side."""
    if left is not None:
        among = among & (j >= i - left)
    if right is not None:
        among = among & (j <= i + right)
    return among


@looked_at_after
def target_attention(inputs: TargetInputs, *, weights_only: bool = False) -> tuple[Tensor, ...]:
    r"""Target attention on canonical arguments, as `fused_attn.target` passes them.

    .. math:: u_j = act(k_j W_k + (q \odot k_j) W_p + c), \quad u'_j = act(u_j W_2 + b_2), \quad
        s_j = scale \, (u'_j \cdot v + b_3), \quad o = \sum_j a_j \, value_j

    with :math:`a = softmax(s)`, or without a softmax :math:`a = s`, which is 0 where the mask is False.

    Returns ``out (S, 1, Dv)`` in the dtype of ``value``, ``lse (S, 1, 2)`` as `normaliser` has it, (0, 1) without a
    softmax, and in at least float32 ``scores (B, T, 1)`` or ``(N, 1)``, ``-inf`` where the mask is False; with
    `weights_only` out and, of the shape of the scores, the weights.
    """
    query, key, w_key, w_product, context, w2, b2, v, b3, value = inputs[:10]
    mask, cu_seqlens, activation, normalised, scale = inputs[10:]
    dtype, rows = (key if value is None else value).dtype, key.shape[:-1]
    wide = torch.promote_types(key.dtype, torch.float32)
    query, key, w_key, w_product, context, v = (x.to(wide) for x in (query, key, w_key, w_product, context, v))
    w2, b2, b3 = (x if x is None else x.to(wide) for x in (w2, b2, b3))
    value = key if value is None else value.to(wide)
    segment = None if cu_seqlens is None else segment_ids(cu_seqlens, rows[0])
    seqs = rows[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if mask is not None:
        key, value = hide(mask[..., None], key, value)

    def of_keys(x: Tensor) -> Tensor:
        """What a sequence has, at its keys."""
        return x[:, None] if segment is None else x.index_select(0, segment)

    z = key @ w_key + (of_keys(query) * key) @ w_product + of_keys(context)
    u = activate(activation, z)
    if w2 is not None:
        u = activate(activation, _affine(u, w2, b2))
    scores = u @ v[:, None]
    scores = scale * (scores if b3 is None else scores + b3)
    weights = scores
    if mask is not None:
        weights, scores = scores.masked_fill(~mask[..., None], 0), scores.masked_fill(~mask[..., None], -torch.inf)
    top = None
    if normalised:
        weights, top = softmax_of_rows(scores, segment, seqs)
    if segment is None:
        out = weights.mT @ value
    else:
        out = value.new_zeros(seqs, 1, value.shape[-1])
        out = out.index_add(0, segment, (weights * value)[:, None])
    if weights_only:
        return out.to(dtype), weights
    if normalised:
        return out.to(dtype), sums_of_rows(scores, top, segment), scores
    one = torch.ones(seqs, 1, dtype=wide, device=key.device)
    return out.to(dtype), normaliser(torch.zeros_like(one), one), scores


@looked_at_after
@with_both_packed
def concat_attention(inputs: ConcatInputs, *, weights_only: bool = False, pairs: bool = True) -> tuple[Tensor, ...]:
    r"""Concat (additive) attention on canonical arguments, as `fused_attn.concat` passes them.

    .. math:: s_{ij} = v \cdot act(q_i + k_j) + \beta_{ij}, \quad o_i = \sum_j softmax_j(s_{ij}) \, value_j

    Packed rows come as one sequence with ``cu_seqlens``; a query then sees the keys of its own segment. Key j is
    visible to query i iff ``i - left <= j <= i + right``, None for an open side. With a `score_activation` the
    softmax is of that of :math:`s_{ij}`.

    Returns ``out (B, H, Tq, Dv)`` in the dtype of ``value``, ``lse (B, H, Tq, 2)``, see `normaliser`, and in at
    least float32 ``scores (B, H, Tq, Tk)``, which are ``-inf`` where a key is not visible, of packed rows ``(H, P)``,
    see `pair_starts`; with `weights_only` out and the weights before dropout. Without `pairs` nobody reads the last,
    which of packed rows is empty then: a compiled graph cannot hold its size.
    """
    inputs = spread(inputs)
    query, key, value, v, score_bias, mask, *offsets, seed, activation, left, right, dropout_p, of_score = inputs
    query, key, value = readable(mask, query, key, value)
    query, key, v = widened(query, key, v)
    bad = None
    if in_parts(mask, inputs.packed, left, right):
        bounded = activation in ("tanh", "sigmoid")  # the score of an infinite row is a number
        (query, bad_q), (key, bad_k) = (sound(x, nan_only=bounded) for x in (query, key))
        bad = bad_q | bad_k.mT
    scores = (v[:, None, None] * activate(activation, query[:, :, :, None] + key[:, :, None])).sum(-1)
    structure = (mask, *offsets, seed, left, right, dropout_p)
    options: dict[str, Any] = {"score_activation": of_score, "weights_only": weights_only, "pairs": pairs}
    return _attend(scores, value, score_bias, *structure, bad=bad, **options)


@looked_at_after
@with_both_packed
def general_attention(
    inputs: GeneralInputs,
    *,
    weight: Tensor | None = None,
    factor: Tensor | None = None,
    weights_only: bool = False,
    pairs: bool = True,
) -> tuple[Tensor, ...]:
    r"""General (bilinear) and dot attention on canonical arguments, as `fused_attn.general` passes them.

    .. math:: s_{ij} = act(scale \, q_i^T W k_j) + \beta_{ij}, \quad o_i = \sum_j softmax_j(s_{ij}) \, value_j

    `weight`: W, ``(Dq, Dk)`` or ``(H, Dq, Dk)``, for queries ``(B, H, Tq, Dq)``; None: the identity. `factor`: a
    further scale, ``()`` or ``(H,)``. The results are those of `concat_attention`.
    """
    inputs = spread(inputs)
    query, key, value, score_bias, mask, *offsets, seed, activation, scale, left, right, dropout_p, of_score = inputs
    query, key, value = readable(mask, query, key, key if value is None else value)
    query, key, weight = widened(query, key, weight)
    bad = None
    if in_parts(mask, inputs.packed, left, right):
        (query, bad_q), (key, bad_k) = sound(query), sound(key)
        bad = bad_q | bad_k.mT
    scores = (query if weight is None else query @ weight) @ key.mT
    scores = scale * (scores if factor is None else factor[..., None, None] * scores)
    scores = activate(activation, scores)
    structure = (mask, *offsets, seed, left, right, dropout_p)
    options: dict[str, Any] = {"score_activation": of_score, "weights_only": weights_only, "pairs": pairs}
    return _attend(scores, value, score_bias, *structure, bad=bad, **options)


def spread(inputs: P) -> P:
    """Inputs whose bias and mask of packed pairs are ``(1, H, Tq, Tk)``, 0 and False for those of two sequences."""
    flat = [inputs.packed and x is not None and x.dim() == 3 for x in (inputs.score_bias, inputs.mask)]
    if not any(flat):
        return inputs
    (Tq, Tk), starts = (inputs.query.shape[2], inputs.key.shape[2]), pair_starts(inputs)
    q_seq, i = positions(1, Tq, inputs.cu_seqlens_q, starts.device)
    k_seq, j = positions(1, Tk, inputs.cu_seqlens_k, starts.device)
    assert inputs.cu_seqlens_k is not None
    first = starts[q_seq] + i * inputs.cu_seqlens_k.diff()[q_seq]  # of each query's

    def over(x: Tensor) -> Tensor:
        at = torch.where(q_seq[0, :, None] == k_seq, first[0, :, None] + j, x.shape[-1])
        return F.pad(x, (0, 1))[..., at]

    bias, mask = (over(x) if lies else x for x, lies in zip((inputs.score_bias, inputs.mask), flat, strict=True))
    return inputs._replace(score_bias=bias, mask=mask)


def readable(mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``(B, H, T, D)`` with zeros where the mask lets no pair use a row: it may be NaN."""
    if mask is not None and not _looking.after:
        queries, keys = used_rows(mask)
        key, value = hide(keys[..., None], key, value)
        (query,) = hide(queries[..., None], query)
    return query, key, value


def hide(shown: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors with zeros where they are not `shown`, before what may be NaN there meets a number.

    They are not copied where they are seen to be tame: a weight of 0 makes 0 of them, and of their gradients.
    """
    if _looking.after:
        return tensors
    first, *rest = tensors
    hidden = first if is_tame(first) else first.masked_fill(~shown, 0)
    return hidden, *(hidden if x is first else hide(shown, x)[0] for x in rest)


def used_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Which queries and keys some pair uses, broadcastable to ``(B, H, Tq)`` and ``(B, H, Tk)``."""
    mask = mask[:, None, None] if mask.dim() == 2 else mask
    return mask.any(3), mask.any(2)


def widened(*tensors: Tensor | None) -> tuple[Any, ...]:
    """On a CPU, 16-bit tensors in float32: a product that float16 cannot hold may still be a score that it can."""
    return tuple(
        x.to(torch.promote_types(x.dtype, torch.float32))
        if x is not None and x.element_size() < 4 and x.device.type == "cpu"
        else x
        for x in tensors
    )


def in_parts(mask: Tensor | None, packed: bool, left: int | None, right: int | None) -> bool:
    """Whether a key may be hidden from some queries only."""
    window = left is not None or right is not None
    return window or packed or (mask is not None and mask.dim() == 4)


def sound(x: Tensor, *, nan_only: bool = False) -> tuple[Tensor, Tensor]:
    """X with zeros for the rows that are not finite, and which these are, ``(..., 1)``.

    0 · NaN is NaN, in a product and in its gradients: so a row that is hidden from a query must not meet it, and
    what such a row makes of the queries that do see it, NaN, is put there afterwards.
    """
    bad = (x.isnan() if nan_only else ~x.isfinite()).any(-1, keepdim=True)
    return x.masked_fill(bad, 0), bad


def _attend(
    scores: Tensor,
    value: Tensor,
    score_bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    left: int | None,
    right: int | None,
    dropout_p: float,
    *,
    bad: Tensor | None = None,
    score_activation: str = "identity",
    weights_only: bool = False,
    pairs: bool = True,
) -> tuple[Tensor, ...]:
    """(out, lse, scores) from the scores ``(B, H, Tq, Tk)`` of all pairs, before bias and mask.

    With `weights_only` (out, weights before dropout): whose gradients through both meet in one softmax, so that they
    cancel where one key has all the weight.

    `bad`: pairs with a row that is not finite, which `scores` are without. Given where keys are hidden from some
    queries only; values are then looked at too.
    """
    B, H, Tq, Tk = scores.shape
    shown = None if mask is None else mask[:, None, None] if mask.dim() == 2 else mask
    packed = cu_seqlens_q is not None
    near_only = left is not None or right is not None or packed
    if near_only or dropout_p > 0:
        q_seq, i = (x[:, :, None] for x in positions(B, Tq, cu_seqlens_q, scores.device))
        k_seq, j = (x[:, None, :] for x in positions(B, Tk, cu_seqlens_k, scores.device))
    if near_only:
        near = in_window(i, j, left, right, q_seq == k_seq)[:, None]
        shown = near if shown is None else shown & near
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if bad is not None:
        scores = scores.masked_fill(bad, torch.nan)
    if score_bias is not None:
        scores = scores + score_bias
    if shown is not None:
        scores = scores.masked_fill(~shown, -torch.inf)
    scores = SCORE_ACTIVATIONS[score_activation](scores)  # after the mask: its slope at a hidden NaN is NaN
    weights, top = softmax(scores, -1)
    shares = weights
    if dropout_p > 0:
        assert seed is not None
        head = torch.arange(H, device=scores.device)[:, None, None]
        scale = dropout_scale(seed, j[:, None], q_seq[:, None] * H + head, i[:, None], dropout_p)
        weights = weights * scale.to(weights.dtype)
    dtype = value.dtype
    (value,) = widened(value)
    if bad is not None:
        value, lost = sound(value)
        weights = weights.masked_fill(lost.mT, torch.nan)
        weights = weights if shown is None else weights.masked_fill(~shown, 0)
    weights = weights.to(value.dtype)
    if value.shape[1] == 1 and H > 1:  # for all heads: a product of their weights would copy it for each
        out = (weights.flatten(1, 2) @ value.squeeze(1)).unflatten(1, (H, Tq)).to(dtype)
    else:
        out = (weights @ value).to(dtype)

    together = (q_seq == k_seq)[0] if packed else None  # not in `of_pairs`: the compiler wants what it names bound

    def of_pairs(x: Tensor) -> Tensor:
        """As it is returned: of packed rows the pairs of each sequence alone."""
        if together is None:
            return x
        return x[0][:, together] if pairs else x.new_empty(0)

    if weights_only:
        return out, of_pairs(shares)
    top = highest(scores, -1) if top is None else top
    return out, normaliser(top, torch.exp(scores - pivot_of(top)[..., None]).sum(-1)), of_pairs(scores)


def word_by_word_attention(inputs: WordByWordInputs) -> tuple[Tensor, Tensor, Tensor]:
    r"""Word-by-word attention on canonical arguments, as `fused_attn.recurrent` passes them.

    .. math:: \alpha_t = softmax_j(w \cdot \tanh(y_j W_y + h_t W_h + r_{t-1} W_r)), \quad
        r_t = \sum_j \alpha_{tj} \, y_j + \tanh(r_{t-1} W_t)

    The state is r_0, zeros where None. Packed rows are padded here, see `pad`.

    Returns r of every step, ``(B, Th, D)`` or ``(M, D)``, and in at least float32 the weights ``(B, Th, Ty)`` or
    ``(M, Ty)`` and the scores, of which a packed premise has none, ``(0,)``.
    """
    value, hypothesis, *weights_of, state, mask, cu_seqlens_premise, cu_seqlens_hypothesis = inputs
    if mask is not None:  # words that may be NaN, before they meet a number
        (value,) = hide(mask[..., None], value)
    dtype, wide = value.dtype, torch.promote_types(value.dtype, torch.float32)
    rows = value, hypothesis, *weights_of
    value, hypothesis, w_y, w_h, w_r, w, w_t = (x.to(wide) for x in rows)  # before they overflow
    key, query = value @ w_y, hypothesis @ w_h
    if cu_seqlens_premise is not None:
        (key, value), mask = pad(cu_seqlens_premise, key, value)
    if cu_seqlens_hypothesis is not None:
        (query,), _ = pad(cu_seqlens_hypothesis, query)
    hidden = None if mask is None else ~mask
    r = value.new_zeros(value.shape[0], value.shape[-1]) if state is None else state.to(wide)
    outs, all_weights, all_scores, words = [], [], [], query
    if query.shape[1] == 0:  # a step that is cut off again: so every argument has a gradient, of zeros
        words = torch.cat([query, query.new_zeros(query.shape[0], 1, query.shape[2])], 1)
    for step in words.unbind(1):
        scores = torch.tanh(key + (step + r @ w_r)[:, None]) @ w
        if hidden is None:
            weights = torch.softmax(scores, -1)
        else:  # a premise that is all hidden keeps its scores: a softmax over nothing is NaN, as are its gradients
            some = hidden & ~hidden.all(-1, keepdim=True)
            weights = torch.softmax(scores.masked_fill(some, -torch.inf), -1).masked_fill(hidden, 0)
        r = (weights[:, None] @ value)[:, 0] + torch.tanh(r @ w_t)
        outs.append(r)
        all_weights.append(weights)
        all_scores.append(scores if hidden is None else scores.masked_fill(hidden, -torch.inf))
    results = [torch.stack(xs, 1)[:, : query.shape[1]] for xs in (outs, all_weights, all_scores)]
    if cu_seqlens_hypothesis is not None:
        seq, t = positions(1, hypothesis.shape[0], cu_seqlens_hypothesis, query.device)
        results = [x[seq[0], t[0]] for x in results]
    out, weights, scores = results
    if cu_seqlens_premise is not None:
        weights, scores = weights.new_zeros(0), weights.new_zeros(0)
    return out.to(dtype), weights, scores


def pad(cu_seqlens: Tensor, *packed: Tensor) -> tuple[list[Tensor], Tensor]:
    """Packed rows ``(N, width)`` as ``(S, T, width)``, zeros past a sequence's end; True in ``(S, T)`` up to there.

    T is the length of the longest sequence, or in a compiled graph, which must know it, N.
    """
    lengths = cu_seqlens.diff()
    known = in_graph() or lengths.numel() == 0 or lengths.device.type == "meta"
    t = torch.arange(packed[0].shape[0] if known else int(every_sample(lengths).max()), device=cu_seqlens.device)
    inside = t < lengths[:, None]
    rows = (cu_seqlens[:-1, None] + t).masked_fill(~inside, 0)
    return [x[rows].masked_fill(~inside[..., None], 0) for x in packed], inside


def graph_attention(inputs: GraphInputs, *, weights_only: bool = False) -> tuple[Tensor, ...]:
    r"""Graph attention (GATv2) on canonical arguments, as `fused_attn.graph` passes them.

    .. math:: s_e = v \cdot act(q_i + k_j + edge_e), \quad o_i = \sum_e softmax_e(s_e) \, value_j
        \quad over \quad indptr_i <= e < indptr_{i+1}, \quad j = indices_e

    Dropout draws of an edge's place among those of its node, node and head.

    Returns ``out (Nq, H, Dv)`` in the dtype of ``value``, ``lse (Nq, H, 2)``, see `normaliser`, and in at
    least float32 ``scores (E, H)``; with `weights_only` out and, of that shape, the weights before dropout.
    """
    query, key, v, value, edge, indptr, indices, *_, seed, activation, dropout_p, _ = inputs
    node, indices = segment_ids(indptr, indices.shape[0]), indices.long()
    dtype, wide = key.dtype, torch.promote_types(key.dtype, torch.float32)
    query, v = query.to(wide), v.to(wide)  # before anything can overflow
    rows = key.index_select(0, indices).to(wide)  # whose gradient is a sum, several times as fast as an index's
    z = query.index_select(0, node) + rows
    if edge is not None:
        z = z + edge
    scores = (v * activate(activation, z)).sum(-1)
    weights, top = softmax_of_rows(scores, node, query.shape[0])
    shares = weights
    if dropout_p > 0:
        assert seed is not None
        place = torch.arange(indices.shape[0], device=indices.device) - indptr[node]
        head = torch.arange(scores.shape[-1], device=indices.device)
        weights = weights * dropout_scale(seed, place[:, None], node[:, None], head, dropout_p).to(weights.dtype)
    values = rows if value is None else value.index_select(0, indices).to(wide)
    out = values.new_zeros(*query.shape[:2], values.shape[-1])
    out = out.index_add(0, node, weights[..., None] * values).to(dtype)
    if weights_only:
        return out, shares
    return out, sums_of_rows(scores, top, node), scores


def hierarchical_attention(
    inputs: HierarchicalInputs,
    *,
    between: Callable[[Tensor, Tensor], Tensor] | None = None,
    attend: Callable[[LocationInputs], tuple[Tensor, ...]] = location_attention,
) -> tuple[Tensor, ...]:
    r"""Two levels of location attention: rows into segments, segments into groups.

    .. math:: x_i = \sum_{j \in i} softmax_j(s(h_j)) h_j, \quad y = between(x), \quad
        o_g = \sum_{i \in g} softmax_i(t(y_i)) y_i

    A segment that sees no row is zero and hidden from the outer level. `attend` computes a level, by default as the
    textbook has it.

    Returns ``out (G, 1, D')``, the outer ``lse (G, 1, 2)`` and ``scores (S, 1)``, the segments ``x (S, D)`` in the
    dtype of ``h``, the inner ``lse (S, 1, 2)`` and ``scores (N, 1)``.
    """
    pooled, lse, scores = attend(inputs.level(inputs.h, inputs.mask, outer=False))
    segments = pooled.squeeze(1).to(inputs.h.dtype)
    rows = segments if between is None else between(segments, inputs.outer_offsets)
    top = attend(inputs.level(rows, lse[:, 0, 0] != -torch.inf, outer=True))
    return *top, segments, lse, scores


@looked_at_after
def statistics_pooling(
    inputs: StatisticsInputs, need_scores: bool = True, *, weights_only: bool = False, deviation: bool = True
) -> tuple[Tensor, ...]:
    r"""Mean and standard deviation of the frames, on canonical arguments, as `fused_attn.statistics` passes them.

    .. math:: u_j = act(h_j W + b + c_j), \quad \alpha_{jc} = softmax_j(u_j \cdot v_c + \beta_{jc}), \quad
        mean_c = \sum_j \alpha_{jc} x_{jc}, \quad
        var_c = \sum_j \alpha_{jc} (x_{jc} - mean_c)^2 \big/ \big(1 - correction \sum_j \alpha_{jc}^2\big), \quad
        std_c = \sqrt{\min(\max(var_c, floor), ceiling) + eps}

    and with `linear` :math:`\alpha_{jc} = \beta_{jc} / \sum_j \beta_{jc}`.

    Returns ``mean (S, C)`` and ``std (S, C)`` in the dtype of the values, ``lse (S, C, 2)``, with one weight a frame
    ``(S, 1, 2)``, and in at least float32 the scores ``(B, T, C)`` or ``(N, C)``, or one a frame, ``-inf`` where the
    mask is False; those of channels with `need_scores`, else, and without v, an empty tensor. With `weights_only`
    mean, std and the weights. Without `deviation` std is empty.
    """
    h, _, _, v, _, value, given, mask, cu_seqlens, _, _, floor, ceiling, eps, correction, linear = inputs
    segment = None if cu_seqlens is None else segment_ids(cu_seqlens, h.shape[0])
    seqs = h.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = (h if value is None else value).dtype
    if v is None:
        wide = torch.promote_types(dtype, torch.float32)
        scores = h.new_zeros(*h.shape[:-1], 1, dtype=wide) if given is None else given.to(wide)
        scores = scores if scores.dim() == h.dim() else scores[..., None]
        value = (h if value is None else value).to(wide)
        if mask is not None:
            scores = scores.masked_fill(~mask[..., None], 0 if linear else -torch.inf)
            (value,) = hide(mask[..., None], value)
    else:
        scores, value = _location_scores(inputs.score()._replace(value=value), segment)
        if given is not None and inputs.per_channel():
            given = given if mask is None else given.masked_fill(~mask[..., None], 0)
            scores = scores + given

    def to_frames(y: Tensor) -> Tensor:
        return y[:, None] if segment is None else y[segment]

    def over_frames(y: Tensor) -> Tensor:
        return y.sum(1) if segment is None else y.new_zeros(seqs, y.shape[-1]).index_add(0, segment, y)

    def total(weights: Tensor, y: Tensor) -> Tensor:
        if segment is None and weights.shape[-1] == 1:
            return (weights.mT @ y).squeeze(1)
        return over_frames(weights * y)

    top: Tensor | None
    lse: Tensor | None = None
    if linear:
        sums = over_frames(scores)
        blind = sums == 0
        least = torch.zeros_like(sums).masked_fill(blind, -torch.inf)
        top, lse = least, normaliser(least, sums)
        weights = (scores / to_frames(sums.masked_fill(blind, 1))).masked_fill(to_frames(blind), 0)
    else:
        weights, top = softmax_of_rows(scores, segment, seqs)
    alone = can_look(value) and not asks_gradient(weights, value)  # what is made on the way can be made in its place
    # About a mean that is good enough for differences from it to be exact, and then the rounding that it has itself:
    # of a channel far from 0 the rounding of one float32 mean would be more than its deviation.
    near = total(weights.detach(), value.detach())
    apart = value - to_frames(near)
    rest = total(weights, apart)
    mean, std = (near + rest).to(dtype), value.new_empty(0, dtype=dtype)
    if deviation:
        apart = apart.sub_(to_frames(rest)).square_() if alone else (apart - to_frames(rest)).square()
        var = total(weights, apart)
        if correction:
            room = 1 - correction * over_frames(weights.square())
            spread = room > SPREAD  # else a frame is alone
            var = var * torch.where(spread, 1 / torch.where(spread, room, 1), 0)
        low, high = var <= floor, var >= ceiling  # then a constant; NaN stays NaN
        std = (var + eps).masked_fill(low | high, 1).sqrt()  # finite slope, for a gradient that is then 0
        std = std.masked_fill(low, math.sqrt(floor + eps)).masked_fill(high & ~low, math.sqrt(ceiling + eps))
        std = std if top is None else std.masked_fill(top == -torch.inf, 0)
        std = std.to(dtype)
    if weights_only:
        return mean, std, weights
    lse = sums_of_rows(scores, top, segment) if lse is None else lse
    made = v is not None and (need_scores or v.dim() == 1)
    return mean, std, lse, scores if made else scores.new_empty(0)
