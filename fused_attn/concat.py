"""Concat attention: a feed-forward score of query and key, a softmax over the keys, a weighted sum of the values.

Also known as additive, Bahdanau or MLP attention; the score of Luong's concat, ACF, Dipole, Rocktäschel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from . import reference
from ._checks import (
    Checker,
    Table,
    argument,
    check_activation,
    check_dropout,
    check_flag,
    check_packed,
    check_structure,
    pairs_table,
)
from ._habits import explicit
from ._operators import Operator, launcher
from ._ops import Impl, exports_from_one, forward_mode, under_autocast, use_triton, weights_from
from .blocked import concat as blocked
from .location import LOCATION
from .segments import Offsets, as_offsets

_TABLES = {
    (packed, heads): pairs_table(
        packed=packed, heads=heads, query="A", key="A", v=argument("A | H A" if heads else "A", linear=True)
    )
    for packed in (False, True)
    for heads in (False, True)
}


def _fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *args, in_blocks = args  # type: ignore[assignment]
    run: Any = blocked.concat_fwd if in_blocks else launcher("concat.concat_fwd")
    return cast("tuple[Tensor, Tensor, Tensor]", run(*args))


def _fake(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_scores = args[-2]
    batch, heads, length, _ = query.shape
    dtype = torch.promote_types(value.dtype, torch.float32)
    return (
        value.new_empty(batch, heads, length, value.shape[-1], dtype=dtype),
        value.new_empty(batch, heads, length, 2, dtype=dtype),
        value.new_empty((batch, heads, length, key.shape[2]) if need_scores else (0,), dtype=dtype),
    )


def _bwd(*args: Any) -> list[Tensor | None]:
    *args, _, in_blocks, needs = args  # type: ignore[assignment]
    run: Any = blocked.concat_bwd if in_blocks else launcher("concat_bwd.concat_bwd")
    return cast("list[Tensor | None]", run(*args, needs))


_CONCAT = Operator(
    "concat",
    differentiable="query key value v score_bias?",
    constant="mask? cu_seqlens_q? cu_seqlens_k? seed?",
    options="str activation, int? left, int? right, float dropout_p",
    choices="bool need_scores, bool in_blocks",
    results="out lse scores?",
    saved="out lse",
    forward=_fwd,
    backward=_bwd,
    fake=_fake,
    formula=reference.concat_attention,
)


@explicit
@exports_from_one
@under_autocast("query", "key", "value", "v")
def concat_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    *,
    activation: str = "tanh",
    mask: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    score_bias: Tensor | None = None,
    cu_seqlens_q: Offsets | None = None,
    cu_seqlens_k: Offsets | None = None,
    dropout_p: float = 0.0,
    return_weights: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Concat (additive) attention of projected queries and keys.

    .. math:: s_{ij} = v \cdot act(q_i + k_j) + \beta_{ij}, \quad o_i = \sum_j softmax_j(s_{ij}) \, value_j

    A query that sees no key gives zeros, zero weights and zero gradients.

    Parameters
    ----------
    query, key
        Projected to the width A of the score: ``(B, Tq, A)`` and ``(B, Tk, A)``, or with heads ``(B, H, Tq, A)``
        and ``(B, H, Tk, A)``; packed ``(N, A)`` or ``(N, H, A)`` with both ``cu_seqlens``. Biases and further
        contexts are added to them beforehand. float16, bfloat16, float32; float64 on a CPU or by the reference.
    value
        ``(B, Tk, Dv)``, ``(B, H, Tk, Dv)``; packed ``(N, Dv)``, ``(N, H, Dv)``.
    v
        ``(A,)``, or ``(H, A)``.
    activation
        identity, tanh, relu, sigmoid, leaky_relu (slope 0.2), gelu or silu.
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
        ``"auto"``: the Triton kernel on a GPU (the reference for float64), a blocked PyTorch path with the same
        identities and linear memory elsewhere. ``"triton"`` and ``"reference"`` never fall back.

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
    Bahdanau et al. 2015; Luong et al. 2015 (concat); Rocktäschel et al. 2016; Ma et al. 2017 (Dipole).

    """
    cu_seqlens_q, cu_seqlens_k = as_offsets(cu_seqlens_q), as_offsets(cu_seqlens_k)
    if not isinstance(query, Tensor):
        raise TypeError(f"query: expected a torch.Tensor; got {type(query).__name__}")
    return_weights = check_flag("return_weights", return_weights)
    given = {"query": query, "key": key, "value": value, "v": v}
    left, right = validate(
        _TABLES, given, mask, window, score_bias, cu_seqlens_q, cu_seqlens_k, dropout_p, return_weights
    )
    check_activation("activation", activation)
    return attend(
        query,
        key,
        value,
        v,
        score_bias,
        mask,
        cu_seqlens_q,
        cu_seqlens_k,
        activation,
        left,
        right,
        dropout_p,
        return_weights,
        impl,
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    score_bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    activation: str,
    left: int | None,
    right: int | None,
    dropout_p: float,
    return_weights: bool,
    impl: Impl,
) -> Tensor | tuple[Tensor, Tensor]:
    """Of arguments that were checked: `concat_attention`, and with other features `distance_attention`."""
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
    query, key, value = canonical(query), canonical(key), canonical(value)
    v = v.expand(query.shape[1], -1) if v.dim() == 1 else v
    scores: Tensor | None = None
    kernel = use_triton(impl, query.device, "has no float64" if query.dtype == torch.float64 else None)
    in_blocks = impl == "auto" and query.device.type != "cuda" and not forward_mode()
    tail = (mask, cu_seqlens_q, cu_seqlens_k, seed, activation, left, right, float(dropout_p))
    if kernel or in_blocks:
        if activation == "identity":  # v · (q + k) is a number a query and a number a key
            if mask is not None:  # rows that may be NaN, before they meet a number
                queries, keys = reference.used_rows(mask)
                query = query.masked_fill(~queries[:, None, :, None], 0)
                key = key.masked_fill(~keys[:, None, :, None], 0)
            wide = torch.promote_types(query.dtype, torch.float32)
            sums = wide if query.element_size() == 2 else torch.float64  # one rounding
            parts = reference.in_parts(mask, cu_seqlens_q, left, right)

            def score(x: Tensor) -> Tensor:
                bad = None
                if parts:
                    x, bad = reference.sound(x)
                x = (x.to(sums) * v.to(sums)[:, None]).sum(-1, keepdim=True).to(wide)
                return x if bad is None else x.masked_fill(bad, torch.nan)

            query, key = score(query), score(key)
            v = v.new_ones(v.shape[0], 1, dtype=wide)
        if query.shape[1:3] == (1, 1) and left is None and right is None and not packed:
            out, lse, scores = _pooled(query, key, value, v, score_bias, mask, seed, activation, dropout_p, kernel)
        else:
            out, lse, scores = _CONCAT(query, key, value, v, score_bias, *tail, return_weights, in_blocks)
    else:
        out, weights = _CONCAT.formula(query, key, value, v, score_bias, *tail, weights_only=True)
    out = out.to(value.dtype)
    out = out[0].transpose(0, 1) if packed else out
    out = out if heads else out.squeeze(1)
    if not return_weights:
        return out
    weights = (weights if scores is None else weights_from(scores, lse[..., None, :], dim=-1)).to(out.dtype)
    return out, weights if heads else weights.squeeze(1)


def _pooled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    score_bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One query and one head a sequence, by the location family: keys projected already, the query a context.

    Its tile is of keys alone. That of the concat kernel has at least 16 queries, so 15 of 16 scores would be made for
    nothing: by the compile report (sm_90, bfloat16) 67 instructions a feature of a key, where this has 11, and no
    factors to write before. Speed on a GPU not yet measured. On a CPU the reference's pooling is 9 times faster than
    the blocked path at B = 32, Tk = 512, A = Dv = 256.
    """
    keys = mask
    if mask is not None:
        keys = mask if mask.dim() == 2 else mask[:, 0]
        query = query.masked_fill(~keys.any(1)[:, None, None, None], 0)  # one that sees nothing may be NaN
    bias = None if score_bias is None else score_bias.expand(*query.shape[:3], key.shape[2])[:, 0, 0]
    if not kernel:
        query, key, v = reference.widened(query, key, v)
    run = LOCATION if kernel else LOCATION.formula
    out, lse, scores = run(
        key[:, 0],
        None,
        None,
        v.mT,
        None,
        None,
        query[:, 0, 0],
        value[:, 0],
        bias,
        keys,
        None,
        seed,
        activation,
        "sigmoid",
        float(dropout_p),
        False,
    )
    return out[:, None], lse[:, None], scores.mT[:, None]


def validate(
    tables: dict[tuple[bool, bool], Table],
    given: Mapping[str, Tensor | None],
    mask: Tensor | None,
    window: tuple[int | None, int | None] | None,
    score_bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_p: float,
    return_weights: bool,
) -> tuple[int | None, int | None]:
    """Check every argument, the tensors by the table for packed rows and heads; return the window's sides."""
    query, key = cast("Tensor", given["query"]), cast("Tensor", given["key"])
    whole = {"mask": mask, "score_bias": score_bias, "return_weights": return_weights}
    packed = check_packed(whole, cu_seqlens_q, cu_seqlens_k)
    check = Checker(tables[packed, query.dim() == (3 if packed else 4)])
    for name, x in given.items():
        check(name, x)
    check_dropout("dropout_p", dropout_p)
    return check_structure(check, query, key, mask, window, score_bias, cu_seqlens_q, cu_seqlens_k)
