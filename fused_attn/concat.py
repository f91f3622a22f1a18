"""Concat attention: a feed-forward score of query and key, a softmax over the keys, a weighted sum of the values.

Also known as additive, Bahdanau or MLP attention; the score of Luong's concat, ACF, Dipole, Rocktäschel.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, cast

import torch
from torch import Tensor

from . import reference
from ._checks import check_score_activation
from ._habits import explicit
from ._jagged import jagged_pairs
from ._operators import Operator, exact_of, launcher
from ._ops import Impl, exports_from_one, forward_mode, keeps_exact, under_autocast, use_triton
from ._pairs import canonical, check_pairs, count_pairs, of_all_heads, pairs_tables, shaped
from ._results import Wanted, by_formula, check_wanted
from .blocked import concat as blocked
from .kernels.inputs import ConcatInputs, LocationInputs
from .location import LOCATION
from .segments import Offsets, as_offsets

_TABLES = pairs_tables("A", "A", shared=True, linear=True, v="A")


def _fwd(
    inputs: ConcatInputs, need_scores: bool, pairs: int, need_exact: bool, in_blocks: bool
) -> tuple[Tensor, ...]:
    if in_blocks:
        results = blocked.concat_fwd(inputs, need_scores, pairs)
        return *results, results[1].new_empty(0)
    return cast("tuple[Tensor, ...]", launcher("concat.concat_fwd")(inputs, need_scores, pairs, need_exact))


def _fake(
    inputs: ConcatInputs, need_scores: bool, pairs: int, need_exact: bool, in_blocks: bool
) -> tuple[Tensor, ...]:
    query, key, value, *_ = inputs
    batch, heads, length, _ = query.shape
    wide = torch.promote_types(value.dtype, torch.float32)
    shape = batch, heads, length, value.shape[-1]
    scores = (heads, pairs) if inputs.packed else (batch, heads, length, key.shape[2])
    return (
        value.new_empty(shape, dtype=wide if in_blocks else value.dtype),
        value.new_empty(batch, heads, length, 2, dtype=wide),
        value.new_empty(scores if need_scores else (0,), dtype=wide),
        value.new_empty(shape if need_exact else (0,), dtype=wide),
    )


def _bwd(inputs: ConcatInputs, *args: Any) -> list[Tensor | None]:
    out, lse, exact, dout, dlse, dscores, *_, in_blocks, needs = args
    run: Any = blocked.concat_bwd if in_blocks else launcher("concat_bwd.concat_bwd")
    return cast("list[Tensor | None]", run(inputs, exact_of(out, exact), lse, dout, dlse, dscores, needs))


_CONCAT = Operator(
    "concat",
    ConcatInputs,
    differentiable="query key value v score_bias",
    choices="bool need_scores, SymInt pairs, bool need_exact, bool in_blocks",
    results="out lse scores?need_scores exact?need_exact",
    saved="out lse exact",
    forward=_fwd,
    backward=_bwd,
    fake=_fake,
    formula=reference.concat_attention,
    lean=functools.partial(reference.concat_attention, pairs=False),
)


@explicit
@jagged_pairs
@exports_from_one
@under_autocast("query", "key", "value", "v")
def concat_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | Literal[False],
    v: Tensor,
    *,
    activation: str = "tanh",
    score_activation: str = "identity",
    mask: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    score_bias: Tensor | None = None,
    cu_seqlens_q: Offsets | None = None,
    cu_seqlens_k: Offsets | None = None,
    dropout_p: float = 0.0,
    return_weights: bool = False,
    return_log_weights: bool = False,
    return_scores: bool = False,
    return_lse: bool = False,
    return_state: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Any, ...]:
    r"""Concat (additive) attention of projected queries and keys.

    .. math:: s_{ij} = v \cdot act(q_i + k_j) + \beta_{ij}, \quad o_i = \sum_j softmax_j(s_{ij}) \, value_j

    A query that sees no key gives zeros, zero weights and zero gradients.

    Parameters
    ----------
    query, key
        Projected to the width A of the score: ``(B, Tq, A)`` and ``(B, Tk, A)``, or with heads ``(B, H, Tq, A)``
        and ``(B, H, Tk, A)``, or ``(B, 1, Tk, A)`` for all heads; packed ``(N, A)`` or ``(N, H, A)`` with
        ``cu_seqlens``. Biases and further contexts are added to them beforehand. float16, bfloat16, float32; float64
        on a CPU or by the reference.
    value
        ``(B, Tk, Dv)``, ``(B, H, Tk, Dv)`` or ``(B, 1, Tk, Dv)``; packed ``(N, Dv)``, ``(N, H, Dv)``. False: no
        output, see `location_attention`.
    v
        ``(A,)``, or ``(H, A)``.
    activation
        identity, tanh, relu, sigmoid, leaky_relu (slope 0.2), elu, gelu or silu.
    score_activation
        "logsigmoid", see `location_attention`: of the score with its bias.
    mask
        bool, True = may be attended: of keys ``(B, Tk)``, of pairs ``(B, Tq, Tk)`` or with heads ``(B, H, Tq, Tk)``,
        where any but Tk may be 1; it is not expanded. Of ``(Tq, Tk)`` pass ``mask[None]``. Of packed rows: of keys
        ``(M,)``, of pairs, in the order of the weights, ``(P, 1)`` or ``(P, H)``; one axis is always of keys.
        Rows that it lets no query or key use are never read: they may be NaN.
    window
        ``(left, right)``, a tuple or list: key j is visible to query i iff ``i - left <= j <= i + right``; None for
        an open side. Causal is ``(None, 0)``, strictly causal ``(None, -1)``. Tiles outside are skipped, and a row
        reaches only the queries that see it: a cache that is not yet written may hold NaN.
    score_bias
        Added to the scores: ``(B, Tq, Tk)``, or with heads ``(B, H, Tq, Tk)``, where any may be 1, or ``(Tk,)``; in
        the dtype of `query` or float32. It is not expanded. Of ``(Tq, Tk)`` pass ``score_bias[None]``, of ``(B, Tk)``
        ``score_bias[:, None]``. Of packed rows in the order of the weights: ``(P,)``, ``(P, 1)`` or ``(P, H)``.
    cu_seqlens_q, cu_seqlens_k
        int32 ``(S + 1,)``, of packed rows: queries of sequence s see the keys of sequence s. Of one side alone
        ``(B + 1,)``: the other is padded, and a mask of keys hides what is past their ends. Or none where
        queries, or keys and values, are jagged ``torch.nested`` tensors, ``(S, T, [H,] width)`` or
        ``(S, H, T, width)``; results that have a row a query are jagged where queries are.
    dropout_p
        Probability that a weight is dropped, 0 <= p < 1; it always applies. See `location_attention`.
    return_weights
        Return the weights too, as they are before dropout. They are differentiable, and of size Tq·Tk. Of packed rows
        they are flat: each query's over the keys of its sequence, one query after the other. How many that is, is
        read from the device.
    return_log_weights, return_scores, return_lse, return_state
        See `location_attention`. Log weights, and scores, with the bias, are of the form of the weights.
    impl
        ``"auto"``: the Triton kernel on a GPU (the reference for float64), a blocked PyTorch path with the same
        identities and linear memory elsewhere. ``"triton"`` and ``"reference"`` never fall back.

    Returns
    -------
    Tensor, State or tuple
        Output ``(B, Tq, Dv)``, ``(B, H, Tq, Dv)``, packed ``(N, Dv)`` or ``(N, H, Dv)``; weights, log weights
        and scores ``(B, Tq, Tk)`` or ``(B, H, Tq, Tk)``; of packed rows
        ``(P,)`` or ``(P, H)`` of all P pairs of a query and a key of its sequence, whose places
        `Segments.of_pairs(cu_seqlens_q, cu_seqlens_k)` has, and of jagged queries jagged, a row a query; m, log_l and
        lse as the output, without Dv.

    Raises
    ------
    ValueError, TypeError
        For arguments that do not fit, and an `impl` that cannot run here.

    References
    ----------
    Bahdanau et al. 2015; Luong et al. 2015 (concat); Rocktäschel et al. 2016; Ma et al. 2017 (Dipole).

    """
    offsets = as_offsets(cu_seqlens_q), as_offsets(cu_seqlens_k)
    options = (activation, None, None, dropout_p, score_activation)
    wanted = check_wanted(return_weights, return_scores, return_lse, return_state, return_log_weights, value=value)
    given = check_pairs(
        _TABLES,
        ConcatInputs(query, key, cast("Tensor", value), v, score_bias, mask, *offsets, None, *options),
        {"v": v},
        window,
        wanted,
    )
    check_score_activation("score_activation", score_activation)
    return attend(given, wanted, impl)


def attend(given: ConcatInputs, wanted: Wanted, impl: Impl) -> Any:
    """Of arguments that were checked: `concat_attention`, and with other features `distance_attention`."""
    inputs = canonical(given)
    query, _, _, v, *_ = inputs
    if v.dim() == 1:  # not by `expand` where there is one head: its gradient is a sum
        inputs = inputs._replace(v=v[None] if query.shape[1] == 1 else v.expand(query.shape[1], -1))
    kernel = use_triton(impl, query.device, "has no float64" if query.dtype == torch.float64 else None)
    in_blocks = impl == "auto" and query.device.type != "cuda" and not forward_mode()
    if query.shape[1] > 1 and query.shape[2] == 1 and inputs.activation != "identity" and not inputs.packed:
        in_blocks = False  # the features of one query's scores are as large as the keys: nothing to save
    in_blocks = in_blocks and not _few(inputs)
    if not (kernel or in_blocks):
        return shaped(given, wanted, *by_formula(_CONCAT.formula, inputs, wanted, pairs=wanted.pairs))
    if inputs.activation == "identity":
        inputs = _summed(inputs)
    if _pools(inputs, kernel):
        return shaped(given, wanted, *_pooled(inputs, kernel, wanted))
    inputs = of_all_heads(inputs)
    exact = not in_blocks and keeps_exact(inputs.value, *inputs[:5], state=wanted.state)
    out, lse, scores, wide = _CONCAT(inputs, wanted.pairs, count_pairs(inputs, wanted), exact, in_blocks)
    return shaped(given, wanted, wanted.output_of(out, wide), lse, scores)


_FEW = 2**17
"""Features of pairs that the formula is faster on than blocks are, which take some 60 operators a call."""


def _few(inputs: ConcatInputs) -> bool:
    """Whether a padded call on a CPU is so small.

    Four times the features where an element costs as much in blocks: the forward of tanh and sigmoid alone has no
    tanh an element there.
    """
    if torch.compiler.is_compiling() or inputs.packed or inputs.activation == "identity":
        return False
    features = inputs.query.shape.numel() * inputs.key.shape[2]
    asked = reference.asks_gradient(*inputs[:5])
    return features <= (4 * _FEW if asked or inputs.activation not in ("tanh", "sigmoid") else _FEW)


def _summed(inputs: ConcatInputs) -> ConcatInputs:
    """Of the identity, whose v · (q + k) is a number a query and a number a key: one feature."""
    query, key, _, v, _, mask, *_ = inputs
    if mask is not None and mask.dim() != 3:  # rows that may be NaN, before they meet a number
        queries, keys = reference.used_rows(mask)
        if not inputs.packed:
            (query,) = reference.hide(queries[..., None], query)
        (key,) = reference.hide(keys[..., None], key)
    wide = torch.promote_types(query.dtype, torch.float32)
    sums = wide if query.element_size() == 2 else torch.float64  # one rounding
    parts = reference.in_parts(mask, inputs.packed, inputs.left, inputs.right)

    def score(x: Tensor) -> Tensor:
        bad = None
        if parts:
            x, bad = reference.sound(x)
        x = (x.to(sums) * v.to(sums)[:, None]).sum(-1, keepdim=True).to(wide)
        return x if bad is None else x.masked_fill(bad, torch.nan)

    return inputs._replace(query=score(query), key=score(key), v=v.new_ones(v.shape[0], 1, dtype=wide))


def _pools(inputs: ConcatInputs, kernel: bool) -> bool:
    """Whether each sequence has one query, which the location family answers.

    For several heads that family has one mask and one bias, and dropout would draw other numbers than elsewhere. On a
    CPU their products would be with zeros.
    """
    _, heads, queries, _ = inputs.query.shape
    everywhere = inputs.left is None and inputs.right is None and inputs.cu_seqlens_q is None
    if queries != 1 or not everywhere or heads == 1:
        return queries == 1 and everywhere
    alike = all(x is None or x.dim() == 2 or x.shape[1] == 1 for x in (inputs.mask, inputs.score_bias))
    return kernel and alike and inputs.dropout_p == 0 and heads <= 128


def _pooled(inputs: ConcatInputs, kernel: bool, wanted: Wanted) -> tuple[Any, ...]:
    """(out, lse, scores, weights) of one query a sequence, by the location family.

    Its keys are projected already, and the query is their context. Heads are its hops: features of all heads side by
    side, as a projection makes them, of which v has a column a head. Where a key holds a NaN in one head, all heads
    see it. Where the values differ between heads each hop sums those of all, and the others' sums are left: a tile of
    a product has 16 columns, for one hop or for 16.

    Its tile is of keys alone. That of the concat kernel has at least 16 queries, so 15 of 16 scores would be made for
    nothing: by the compile report (sm_90, bfloat16) 67 instructions a feature of a key, where this has 11, and no
    factors to write before. Speed on a GPU not yet measured. On a CPU the reference's pooling is 9 times faster than
    the blocked path at B = 32, Tk = 512, A = Dv = 256.
    """
    query, key, value, v, score_bias, mask, _, cu_seqlens, seed, activation, _, _, dropout_p, of_score = inputs
    heads, Tk = query.shape[1], key.shape[2]
    if not kernel:
        query, key, v = reference.widened(query, key, v)

    def side_by_side(x: Tensor) -> Tensor:
        """``(B, H, T, D)`` as ``(B, T, H D)``. Of one head squeezed, for the gradient of an index is a copy."""
        return x.squeeze(1) if x.shape[1] == 1 else x.transpose(1, 2).flatten(2)

    of_head = value.shape[1] > 1
    columns = v.mT if heads == 1 else torch.diag_embed(v.mT).transpose(0, 1).flatten(0, 1)  # (H A, H)
    keys = side_by_side(key if key.shape[1] == heads else key.expand(-1, heads, -1, -1))
    value = side_by_side(value)
    if cu_seqlens is not None:
        keys, value = keys.squeeze(0), value.squeeze(0)
        bias, mask = (x if x is None else x.flatten() for x in (score_bias, mask))  # a pair is a key
    else:
        bias = None if score_bias is None else score_bias.expand(query.shape[0], 1, 1, Tk).squeeze(2).squeeze(1)
    score = (keys, None, None, columns, None, None, side_by_side(query).squeeze(1))
    options = (activation, "sigmoid", dropout_p, False, of_score)
    pooled = LocationInputs(*score, value, bias, mask, cu_seqlens, seed, *options)
    if not kernel:
        out, lse, scores, weights = by_formula(LOCATION.formula, pooled, wanted)
    else:
        out, lse, scores, exact = LOCATION(pooled, True, keeps_exact(*pooled[:9], state=wanted.state))
        out, weights = wanted.output_of(out, exact), None
    if of_head:
        out = out.unflatten(2, (heads, -1)).diagonal(dim1=1, dim2=2).mT
    scores, weights = (
        x if x is None else x.mT if cu_seqlens is not None else x.mT[:, :, None] for x in (scores, weights)
    )
    return out[:, :, None], lse if lse is None else lse[:, :, None], scores, weights
