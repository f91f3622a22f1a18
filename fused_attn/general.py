"""General attention: the score is a product of query and key, bilinear with a weight or dot without.

Also known as multiplicative or Luong's general; the score of Dipole's general form. Where no values are given the
values are the keys, as in the classical papers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor

from . import reference
from ._checks import argument, check_scale, check_score_activation
from ._habits import explicit
from ._jagged import jagged_pairs
from ._operators import Operator, exact_of, launcher, vjp
from ._ops import Impl, exports_from_one, forward_mode, keeps_exact, under_autocast, use_triton
from ._pairs import Tables, canonical, check_pairs, count_pairs, of_all_heads, pairs_tables, shaped
from ._results import PLAIN, by_formula, check_wanted
from .kernels.inputs import GeneralInputs
from .segments import Offsets, as_offsets


def _tables(*widths: str, **parameters: str) -> Tables:
    tables = pairs_tables(*widths, keys_are_values=True, shared=True, linear=True, **parameters)
    return {
        form: table | {"scale": argument("| H" if form[-1] else "", "bias")}  # the last says whether there are heads
        for form, table in tables.items()
    }


_TABLES = {False: _tables("D", "D"), True: _tables("Dq", "Dk", weight="Dq Dk")}  # by whether there is a weight


def _sdpa(
    mask: Tensor | None, causal: bool, scale: float, query: Tensor, key: Tensor, value: Tensor | None = None
) -> Tensor:
    """PyTorch's attention by the rules here: hidden rows are not read, a query that sees no key gives zeros."""
    query, key, value = reference.readable(mask, query, key, key if value is None else value)
    Tq = query.shape[2]
    if causal:  # no query sees what is past them: a cache that is not yet written, say
        key, value = key[:, :, :Tq], value[:, :, :Tq]
        mask = None if mask is None else mask[..., :Tq]
    Tk = key.shape[2]
    if 0 in (query.numel(), key.numel()):
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    shown = None if mask is None else mask[:, None, None] if mask.dim() == 2 else mask
    if causal and (shown is not None or Tq != Tk):
        lower = torch.ones(Tq, Tk, dtype=torch.bool, device=query.device).tril()
        shown, causal = lower if shown is None else shown & lower, False
    attend = torch.nn.functional.scaled_dot_product_attention
    if shown is None:
        return attend(query, key, value, is_causal=causal, scale=scale)
    blind = ~shown.any(-1, keepdim=True)
    # What a row of -inf gives differs between backends and versions: such a row sees all, and is cleared.
    return attend(query, key, value, attn_mask=shown | blind, scale=scale).masked_fill(blind, 0)


def _fwd(
    inputs: GeneralInputs, need_scores: bool, pairs: int, natural: bool, need_exact: bool, sdpa: bool
) -> tuple[Tensor, ...]:
    if not sdpa:
        run = launcher("general.general_fwd")
        return cast("tuple[Tensor, ...]", run(inputs, need_scores, pairs, natural, need_exact))
    query, key, value, _, mask, *_ = inputs
    out = _sdpa(mask, inputs.right == 0, inputs.scale, query, key, value)
    if out.device.type == "cpu":
        # Rows that are not finite: PyTorch's attention multiplies them by 0 where hidden, and gives 0 for a query.
        lost = ~query.isfinite().all(-1)
        if mask is not None:
            lost &= reference.used_rows(mask)[0]
        if lost.any() or (reference.in_parts(mask, False, None, inputs.right) and not out.isfinite().all()):
            out = _GENERAL.formula(inputs)[0]
    lse = out.new_zeros(*out.shape[:3], 2, dtype=torch.float32)  # nothing asks for it
    empty = lse.new_empty(0)
    # Some of its backends lay the output out as the query is; the compiler was told otherwise.
    return out.to(query.dtype).contiguous(), lse, empty, empty.clone()


def _fake(
    inputs: GeneralInputs, need_scores: bool, pairs: int, natural: bool, need_exact: bool, sdpa: bool
) -> tuple[Tensor, ...]:
    query, key, value, *_ = inputs
    batch, heads, length, _ = query.shape
    value = key if value is None else value
    shape = batch, heads, length, value.shape[-1]
    scores = (heads, pairs) if inputs.packed else (batch, heads, length, key.shape[2])
    return (
        value.new_empty(shape),
        value.new_empty(batch, heads, length, 2, dtype=torch.float32),
        value.new_empty(scores if need_scores else (0,), dtype=torch.float32),
        value.new_empty(shape if need_exact else (0,), dtype=torch.float32),
    )


def _bwd(
    inputs: GeneralInputs,
    out: Tensor,
    lse: Tensor,
    exact: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dscores: Tensor | None,
    _: None,
    need_scores: bool,
    pairs: int,
    natural: bool,
    need_exact: bool,
    sdpa: bool,
    needs: list[bool],
) -> list[Tensor | None]:
    if not sdpa:
        saved = exact_of(out, exact), lse
        grads = launcher("general_bwd.general_bwd")(inputs, *saved, dout, dlse, dscores, natural, needs)
        return cast("list[Tensor | None]", grads)
    query, key, value, _, mask, *_ = inputs
    rows = (query, key) if value is None else (query, key, value)

    def pull(formula: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return vjp(lambda *rows: (formula(*rows),), rows, (dout.to(query.dtype),))

    made = pull(functools.partial(_sdpa, mask, inputs.right == 0, inputs.scale))
    parts = reference.in_parts(mask, False, None, inputs.right)
    if parts and not all(g.isfinite().all() for g in made):  # as in `_fwd`
        made = pull(lambda q, k, v=None: _GENERAL.formula(inputs._replace(query=q, key=k, value=v))[0])
    return [g if need else None for g, need in zip((*made, None, None), needs, strict=False)]


_GENERAL = Operator(
    "general",
    GeneralInputs,
    differentiable="query key value score_bias",
    choices="bool need_scores, SymInt pairs, bool natural, bool need_exact, bool sdpa",
    results="out lse scores?need_scores exact?need_exact",
    saved="out lse exact",
    forward=_fwd,
    backward=_bwd,
    fake=_fake,
    formula=reference.general_attention,
    lean=functools.partial(reference.general_attention, pairs=False),
)


@explicit
@jagged_pairs
@exports_from_one
@under_autocast("query", "key", "value", "weight")
def general_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | Literal[False] | None = None,
    weight: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    activation: str = "identity",
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
    r"""General (bilinear, multiplicative) attention; dot attention without `weight`.

    .. math:: s_{ij} = act(scale \, q_i^T W k_j) + \beta_{ij}, \quad o_i = \sum_j softmax_j(s_{ij}) \, value_j

    A query that sees no key gives zeros, zero weights and zero gradients.

    Parameters
    ----------
    query, key
        ``(B, Tq, Dq)`` and ``(B, Tk, Dk)``, or with heads ``(B, H, Tq, Dq)`` and ``(B, H, Tk, Dk)``; with
        ``cu_seqlens`` packed: ``(N, Dq)`` and ``(M, Dk)``, or ``(N, H, Dq)`` and ``(M, H, Dk)``. float16, bfloat16,
        float32; float64 on a CPU or by the reference. Keys that are the same for all heads may be
        ``(B, 1, Tk, Dk)``: with one query, no window and values of one head too, they are read once for all heads.
    value
        ``(B, Tk, Dv)``, ``(B, H, Tk, Dv)`` or ``(B, 1, Tk, Dv)``; packed ``(N, Dv)``, ``(N, H, Dv)``. None: the keys,
        of which the kernel then loads a tile once for both products (up to a width of 256). False: no output, see
        `location_attention`.
    weight
        W, ``(Dq, Dk)``, or with heads ``(H, Dq, Dk)``. It meets the queries before the kernel, in one product. None:
        the identity, and Dq = Dk.
    scale
        Factor on the product; 1 by default, as the classical papers have it. Or a tensor, ``()`` or with heads
        ``(H,)``, in the dtype of `query` or float32, which has a gradient: it is not read on the host. Where a kernel
        runs, the queries are multiplied by it before, and rounded to their dtype.
    activation
        Of the product: identity, tanh, relu, sigmoid, leaky_relu (slope 0.2), elu, gelu or silu.
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
        ``"auto"``: on a GPU the Triton kernel (the reference for float64), on a CPU the reference; but
        `torch.nn.functional.scaled_dot_product_attention` where it says the same and has no more to do: scale > 0, no
        activation, bias, dropout or packed rows, the output alone, Dv = Dk, no window or the causal one; on a CPU
        more than 2^18 pairs of query and key, over all heads, or that window (else the reference is faster); on a GPU
        values that are not the keys, no mask (its fastest backends have none), no window (it would let NaN past it)
        and no gradient (its backward has no derivative, so ours would run its forward twice). The rule on a GPU is
        not yet measured. ``"triton"`` and ``"reference"`` never fall back.

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
        For arguments that do not fit, a `scale` that the scores cannot hold, and an `impl` that cannot run here.

    References
    ----------
    Luong et al. 2015 (dot, general); Ma et al. 2017 (Dipole).

    """
    offsets = as_offsets(cu_seqlens_q), as_offsets(cu_seqlens_k)
    factor = scale if isinstance(scale, Tensor) else None
    options = (activation, 1.0, None, None, dropout_p, score_activation)
    wanted = check_wanted(return_weights, return_scores, return_lse, return_state, return_log_weights, value=value)
    given = check_pairs(
        _TABLES[weight is not None],
        GeneralInputs(query, key, cast("Tensor | None", value), score_bias, mask, *offsets, None, *options),
        {name: x for name, x in {"weight": weight, "scale": factor}.items() if x is not None},
        window,
        wanted,
    )
    inputs = canonical(given)
    if factor is None:
        inputs = inputs._replace(scale=check_scale(scale, query.dtype))
    check_score_activation("score_activation", score_activation)
    kernel = use_triton(impl, query.device, "has no float64" if query.dtype == torch.float64 else None)
    sdpa = impl == "auto" and wanted == PLAIN and _sdpa_serves(inputs, (weight, factor), kernel)
    folds = _heads_fold(inputs)
    if (folds or kernel or sdpa) and (weight is not None or factor is not None):
        inputs, weight, factor = _projected(inputs, weight, factor, sdpa or not kernel), None, None
    inputs = _folded(inputs) if folds else of_all_heads(inputs)
    if not (kernel or sdpa):
        more = {"weight": weight, "factor": factor, "pairs": wanted.pairs}
        results = by_formula(_GENERAL.formula, inputs, wanted, **more)
    else:
        exact = not sdpa and keeps_exact(*inputs[:4], state=wanted.state)
        out, lse, scores, wide = _GENERAL(
            inputs, wanted.pairs, count_pairs(inputs, wanted), wanted != PLAIN, exact, sdpa
        )
        results = wanted.output_of(out, wide), lse, scores, None
    if folds:  # what nobody wants is None, or empty
        results = tuple(x if x is None or x.dim() == 1 else x.transpose(1, 2) for x in results)
    return shaped(given, wanted, *results)


def _heads_fold(inputs: GeneralInputs) -> bool:
    """Whether heads are the queries of one: of one query each, over the same keys and values.

    Then a tile of queries has a head in each row, and keys are read once, not once a head.
    """
    query, key, value, *_ = inputs
    shared = query.shape[1] > 1 and key.shape[1] == 1 and (value is None or value.shape[1] == 1)
    return shared and query.shape[2] == 1 and inputs.left is None and inputs.right is None and not inputs.packed


def _folded(inputs: GeneralInputs) -> GeneralInputs:
    """Heads of one query each as the queries of one head, and what is of pairs likewise."""
    query, _, _, bias, mask, *_ = inputs
    inputs = inputs._replace(query=query.transpose(1, 2), score_bias=None if bias is None else bias.transpose(1, 2))
    return inputs._replace(mask=mask.transpose(1, 2)) if mask is not None and mask.dim() == 4 else inputs


def _projected(inputs: GeneralInputs, weight: Tensor | None, factor: Tensor | None, wide: bool) -> GeneralInputs:
    """With the queries multiplied by the weight and the factor; wide: on a CPU in float32."""
    query, key, value, _, mask, *_ = inputs
    if mask is not None and not inputs.packed:  # rows that may be NaN, before they meet a number
        query = query.masked_fill(~reference.used_rows(mask)[0][..., None], 0)
    bad = None
    if reference.in_parts(mask, inputs.packed, inputs.left, inputs.right):
        query, bad = reference.sound(query)
    if wide:
        query, key, value, weight = reference.widened(query, key, value, weight)
    query = query if weight is None else query @ weight
    if factor is not None:  # its gradient is a sum over all queries
        exact = torch.promote_types(query.dtype, torch.float32)
        query = (query.to(exact) * factor.to(exact)[..., None, None]).to(query.dtype)
    query = query if bad is None else query.masked_fill(bad, torch.nan)
    return inputs._replace(query=query, key=key, value=value)


_FEW = 2**18
"""Pairs that on a CPU the reference is faster on than `scaled_dot_product_attention`, whose backward begins anew."""


def _sdpa_serves(inputs: GeneralInputs, factors: tuple[Tensor | None, ...], kernel: bool) -> bool:
    """Whether `impl="auto"` calls `scaled_dot_product_attention`: the rule that `general_attention` documents.

    `factors`: what the queries are multiplied by before. `kernel`: whether the Triton kernel would take the call. On
    a CPU it would not, and the choice is between this and a reference that makes all the scores.
    """
    if forward_mode():
        return False
    query, key, value, bias, mask, _, _, _, activation, scale, left, right, dropout_p, score_activation = inputs
    same = activation == score_activation == "identity" and scale > 0 and dropout_p == 0
    if not same or bias is not None or inputs.packed or left is not None or right not in (None, 0):
        return False
    if value is not None and value.shape[-1] != key.shape[-1]:
        return False  # only its backend without a fused kernel takes these
    if not kernel:
        pairs = math.prod(query.shape[:-1]) * key.shape[-2]
        return query.device.type == "cpu" and (right == 0 or pairs > _FEW)
    gradient = reference.asks_gradient(query, key, value, *factors)
    return value is not None and mask is None and right is None and not gradient
