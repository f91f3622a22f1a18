"""General attention: the score is a product of query and key, bilinear with a weight or dot without.

Also known as multiplicative or Luong's general; the score of Dipole's general form. Where no values are given the
values are the keys, as in the classical papers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from . import reference
from ._checks import (
    Checker,
    argument,
    check_activation,
    check_dropout,
    check_flag,
    check_number,
    check_packed,
    check_structure,
    pairs_table,
)
from ._habits import explicit
from ._operators import Operator, launcher, vjp
from ._ops import Impl, exports_from_one, forward_mode, under_autocast, use_triton, weights_from
from .segments import Offsets, as_offsets

_TABLES = {
    (packed, heads, weighted): pairs_table(
        packed=packed,
        heads=heads,
        query="Dq" if weighted else "D",
        key="Dk" if weighted else "D",
        weight=argument("Dq Dk | H Dq Dk" if heads else "Dq Dk", linear=True),
    )
    for packed in (False, True)
    for heads in (False, True)
    for weighted in (False, True)
}


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
    shown = None if mask is None else mask[:, None, None] if mask.dim() == 2 else mask[:, None]
    if causal and (shown is not None or Tq != Tk):
        lower = torch.ones(Tq, Tk, dtype=torch.bool, device=query.device).tril()
        shown, causal = lower if shown is None else shown & lower, False
    attend = torch.nn.functional.scaled_dot_product_attention
    if shown is None:
        return attend(query, key, value, is_causal=causal, scale=scale)
    blind = ~shown.any(-1, keepdim=True)
    # What a row of -inf gives differs between backends and versions: such a row sees all, and is cleared.
    return attend(query, key, value, attn_mask=shown | blind, scale=scale).masked_fill(blind, 0)


def _fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *args, sdpa = args  # type: ignore[assignment]
    if not sdpa:
        return cast("tuple[Tensor, Tensor, Tensor]", launcher("general.general_fwd")(*args))
    query, key, value, _, mask, *_, scale, _, right, _, _ = args
    out = _sdpa(mask, right == 0, scale, query, key, value)
    if out.device.type == "cpu":
        # Rows that are not finite: PyTorch's attention multiplies them by 0 where hidden, and gives 0 for a query.
        lost = ~query.isfinite().all(-1)
        if mask is not None:
            lost &= reference.used_rows(mask)[0][:, None]
        if lost.any() or (reference.in_parts(mask, None, None, right) and not out.isfinite().all()):
            out = _GENERAL.formula(*args)[0]
    lse = out.new_zeros(*out.shape[:3], 2, dtype=torch.float32)  # nothing asks for it
    # Some of its backends lay the output out as the query is; the compiler was told otherwise.
    out = out.to(torch.promote_types(out.dtype, torch.float32)).contiguous()
    return out, lse, out.new_zeros(0, dtype=torch.float32)


def _fake(query: Tensor, key: Tensor, value: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_scores = args[-2]
    batch, heads, length, _ = query.shape
    value = key if value is None else value
    return (
        value.new_empty(batch, heads, length, value.shape[-1], dtype=torch.promote_types(value.dtype, torch.float32)),
        value.new_empty(batch, heads, length, 2, dtype=torch.float32),
        value.new_empty((batch, heads, length, key.shape[2]) if need_scores else (0,), dtype=torch.float32),
    )


def _bwd(*args: Any) -> list[Tensor | None]:
    *args, sdpa, needs = args  # type: ignore[assignment]
    if not sdpa:
        return cast("list[Tensor | None]", launcher("general_bwd.general_bwd")(*args, needs))
    dout, (query, key, value, *constant), options = args[0], args[3:11], args[13:]
    (_, mask, *_), (_, scale, _, right, *_) = constant, options
    rows = (query, key) if value is None else (query, key, value)

    def pull(formula: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return vjp(lambda *rows: (formula(*rows),), rows, (dout.to(query.dtype),))

    made = pull(functools.partial(_sdpa, mask, right == 0, scale))
    if reference.in_parts(mask, None, None, right) and not all(g.isfinite().all() for g in made):  # as in `_fwd`
        made = pull(lambda q, k, v=None: _GENERAL.formula(q, k, v, *constant, *options)[0])
    return [g if need else None for g, need in zip((*made, None, None), needs, strict=False)]


_GENERAL = Operator(
    "general",
    differentiable="query key value? score_bias?",
    constant="mask? cu_seqlens_q? cu_seqlens_k? seed?",
    options="str activation, float scale, int? left, int? right, float dropout_p",
    choices="bool need_scores, bool sdpa",
    results="out lse scores?",
    saved="out lse",
    forward=_fwd,
    backward=_bwd,
    fake=_fake,
    formula=reference.general_attention,
)


@explicit
@exports_from_one
@under_autocast("query", "key", "value", "weight")
def general_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    scale: float = 1.0,
    activation: str = "identity",
    mask: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    score_bias: Tensor | None = None,
    cu_seqlens_q: Offsets | None = None,
    cu_seqlens_k: Offsets | None = None,
    dropout_p: float = 0.0,
    return_weights: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""General (bilinear, multiplicative) attention; dot attention without `weight`.

    .. math:: s_{ij} = act(scale \, q_i^T W k_j) + \beta_{ij}, \quad o_i = \sum_j softmax_j(s_{ij}) \, value_j

    A query that sees no key gives zeros, zero weights and zero gradients.

    Parameters
    ----------
    query, key
        ``(B, Tq, Dq)`` and ``(B, Tk, Dk)``, or with heads ``(B, H, Tq, Dq)`` and ``(B, H, Tk, Dk)``; packed
        ``(N, D)`` or ``(N, H, D)`` with both ``cu_seqlens``. float16, bfloat16, float32; float64 on a CPU or by the
        reference.
    value
        ``(B, Tk, Dv)``, ``(B, H, Tk, Dv)``; packed ``(N, Dv)``, ``(N, H, Dv)``. None: the keys, of which the kernel
        then loads a tile once for both products (up to a width of 256).
    weight
        W, ``(Dq, Dk)``, or with heads ``(H, Dq, Dk)``. It meets the queries before the kernel, in one product. None:
        the identity, and Dq = Dk.
    scale
        Factor on the product; 1 by default, as the classical papers have it.
    activation
        Of the product: identity, tanh, relu, sigmoid, leaky_relu (slope 0.2), gelu or silu.
    mask
        bool ``(B, Tk)`` or ``(B, Tq, Tk)``, True = may be attended; not with packed rows. Rows that it lets no
        query or key use are never read: they may be NaN.
    window
        ``(left, right)``: key j is visible to query i iff ``i - left <= j <= i + right``; None for an open side.
        Causal is ``(None, 0)``, strictly causal ``(None, -1)``. Tiles outside are skipped, and a row reaches only the
        queries that see it: a cache that is not yet written may hold NaN.
    score_bias
        Added to the scores: broadcastable to ``(B, Tq, Tk)``, or with heads to ``(B, H, Tq, Tk)``; in the dtype
        of `query` or float32; not with packed rows.
    cu_seqlens_q, cu_seqlens_k
        int32 ``(S + 1,)``, both or none: queries of sequence s see the keys of sequence s.
    dropout_p
        Probability that a weight is dropped, 0 <= p < 1; it always applies. See `location_attention`.
    return_weights
        Return the weights too (padded batches only), as they are before dropout. They are differentiable, and
        of size Tq·Tk.
    impl
        ``"auto"``: on a GPU the Triton kernel (the reference for float64), on a CPU the reference; but
        `torch.nn.functional.scaled_dot_product_attention` where it says the same and has no more to do: scale > 0, no
        activation, bias, dropout, weights or packed rows, Dv = Dk, no window or the causal one; on a GPU also values
        that are not the keys, no mask (its fastest backends have none), no window (it would let NaN past it) and no
        gradient (its backward has no derivative, so ours would run its forward twice). The rule on a GPU is not yet
        measured. ``"triton"`` and ``"reference"`` never fall back.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        Output ``(B, Tq, Dv)``, ``(B, H, Tq, Dv)``, packed ``(N, Dv)`` or ``(N, H, Dv)``; weights ``(B, Tq, Tk)``
        or ``(B, H, Tq, Tk)``.

    Raises
    ------
    ValueError
        For shapes and values that do not fit, and for an `impl` that cannot run here.
    TypeError
        For dtypes.

    References
    ----------
    Luong et al. 2015 (dot, general); Ma et al. 2017 (Dipole).

    """
    cu_seqlens_q, cu_seqlens_k = as_offsets(cu_seqlens_q), as_offsets(cu_seqlens_k)
    if not isinstance(query, Tensor):
        raise TypeError(f"query: expected a torch.Tensor; got {type(query).__name__}")
    return_weights = check_flag("return_weights", return_weights)
    left, right = _validate_general(
        query,
        key,
        value,
        weight,
        scale,
        activation,
        mask,
        window,
        score_bias,
        cu_seqlens_q,
        cu_seqlens_k,
        dropout_p,
        return_weights,
    )
    packed = cu_seqlens_q is not None
    heads = query.dim() == (3 if packed else 4)

    def canonical(x: Tensor) -> Tensor:
        x = x if heads else x.unsqueeze(1)
        return x.transpose(0, 1)[None] if packed else x

    if score_bias is not None and not heads:
        score_bias = score_bias.expand(torch.broadcast_shapes(score_bias.shape, (1, 1, 1)))[:, None]
    if score_bias is not None:
        score_bias = score_bias.expand(torch.broadcast_shapes(score_bias.shape, (1, 1, 1, 1)))
    seed = None
    if dropout_p > 0:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    query, key = canonical(query), canonical(key)
    value, dtype = None if value is None else canonical(value), key.dtype
    scores: Tensor | None = None
    kernel = use_triton(impl, query.device, "has no float64" if query.dtype == torch.float64 else None)
    options = (activation, float(scale), left, right, float(dropout_p))
    sdpa = (
        impl == "auto"
        and not return_weights
        and _sdpa_serves(query, key, value, weight, score_bias, mask, cu_seqlens_q, *options, kernel=kernel)
    )
    tail = (score_bias, mask, cu_seqlens_q, cu_seqlens_k, seed, *options)
    if kernel or sdpa:
        if weight is not None:
            if mask is not None:  # rows that may be NaN, before they meet a number
                query = query.masked_fill(~reference.used_rows(mask)[0][:, None, :, None], 0)
            bad = None
            if reference.in_parts(mask, cu_seqlens_q, left, right):
                query, bad = reference.sound(query)
            if sdpa:
                query, key, value, weight = reference.widened(query, key, value, weight)
            query = query @ weight
            query = query if bad is None else query.masked_fill(bad, torch.nan)
        out, lse, scores = _GENERAL(query, key, value, *tail, return_weights, sdpa)
    else:
        out, weights = _GENERAL.formula(query, key, value, *tail, weight=weight, weights_only=True)
    out = out.to(dtype)
    out = out[0].transpose(0, 1) if packed else out
    out = out if heads else out.squeeze(1)
    if not return_weights:
        return out
    weights = (weights if scores is None else weights_from(scores, lse[..., None, :], dim=-1)).to(out.dtype)
    return out, weights if heads else weights.squeeze(1)


def _sdpa_serves(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    weight: Tensor | None,
    score_bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    scale: float,
    left: int | None,
    right: int | None,
    dropout_p: float,
    *,
    kernel: bool,
) -> bool:
    """Whether `impl="auto"` calls `scaled_dot_product_attention`: the rule that `general_attention` documents.

    `kernel`: whether the Triton kernel would take the call. On a CPU it would not, and the choice is between this and
    a reference that makes all the scores.
    """
    if forward_mode():
        return False
    same = activation == "identity" and scale > 0 and dropout_p == 0 and score_bias is None and cu_seqlens is None
    if not same or left is not None or right not in (None, 0):
        return False
    if value is not None and value.shape[-1] != key.shape[-1]:
        return False  # only its backend without a fused kernel takes these
    if not kernel:
        return query.device.type == "cpu"
    gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, weight))
    return value is not None and mask is None and right is None and not gradient


def _validate_general(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    weight: Tensor | None,
    scale: float,
    activation: str,
    mask: Tensor | None,
    window: tuple[int | None, int | None] | None,
    score_bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_p: float,
    return_weights: bool,
) -> tuple[int | None, int | None]:
    """Check every argument; return the window's sides."""
    given = {"mask": mask, "score_bias": score_bias, "return_weights": return_weights}
    packed = check_packed(given, cu_seqlens_q, cu_seqlens_k)
    check = Checker(_TABLES[packed, query.dim() == (3 if packed else 4), weight is not None])
    check("query", query)
    check("key", key)
    if value is not None:
        check("value", value)
    if weight is not None:
        check("weight", weight)
    # What the scores are made in holds it: float32, or float64 for float64.
    most = torch.finfo(torch.promote_types(query.dtype, torch.float32)).max
    check_number("scale", scale, f"a finite number, of at most {most:.3g}", -most, most)
    check_activation("activation", activation)
    check_dropout("dropout_p", dropout_p)
    return check_structure(check, query, key, mask, window, score_bias, cu_seqlens_q, cu_seqlens_k)
