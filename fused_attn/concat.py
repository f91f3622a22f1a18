"""Concat attention: a feed-forward score of query and key, a softmax over the keys, a weighted sum of the values.

Also known as additive, Bahdanau or MLP attention; the score of Luong's concat, ACF, Dipole, Rocktäschel.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from . import location, reference
from ._checks import (
    Checker,
    argument,
    check_activation,
    check_dropout,
    check_flag,
    check_packed,
    check_structure,
    pairs_table,
)
from ._habits import explicit
from ._ops import (
    Impl,
    differentiable,
    exports_from_one,
    forward_mode,
    raw_backward,
    raw_op,
    second_order,
    under_autocast,
    use_triton,
    weights_from,
)

_TENSORS = 9  # tensor arguments of the raw forward
_GRADS = 5  # the leading ones of them that have gradients
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor v, Tensor? score_bias, Tensor? mask, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? seed"
)
_OPTIONS = "str activation, int? left, int? right, float dropout_p"
_TABLES = {
    (packed, heads): pairs_table(
        packed=packed, heads=heads, query="A", key="A", v=argument("A | H A" if heads else "A", linear=True)
    )
    for packed in (False, True)
    for heads in (False, True)
}


def _fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    if args[-1]:
        from ._concat_blocked import blocked_fwd

        return blocked_fwd(*args[:-1])
    from .kernels.concat import concat_fwd

    return concat_fwd(*args[:-1])


def _fwd_fake(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_scores = args[-2]
    batch, heads, length, _ = query.shape
    dtype = torch.promote_types(value.dtype, torch.float32)
    return (
        value.new_empty(batch, heads, length, value.shape[-1], dtype=dtype),
        value.new_empty(batch, heads, length, 2, dtype=dtype),
        value.new_empty((batch, heads, length, key.shape[2]) if need_scores else (0,), dtype=dtype),
    )


def _bwd(*args: Any) -> list[Tensor | None]:
    if args[-2]:
        from ._concat_blocked import blocked_bwd

        grads = blocked_bwd(*args[:-2], args[-1])  # type: ignore[call-arg]
    else:
        from .kernels.concat_bwd import concat_bwd

        grads = concat_bwd(*args[:-2], args[-1])
    return grads


_concat_fwd = raw_op(
    "concat_fwd",
    f"({_INPUTS}, {_OPTIONS}, bool need_scores, bool blocked) -> (Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
_concat_bwd = raw_backward(
    "concat_bwd",
    f"(Tensor dout, Tensor? dlse, Tensor? dscores, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS}, bool blocked, "
    "bool[] needs)",
    _bwd,
    cotangents=3,
    gradients=_GRADS,
)


class _ConcatAttention(torch.autograd.Function):
    """(out, lse, scores) by the kernel or the blocked path, all three differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # spelled out: torch.compile tells whether there is a ctx from the number of parameters
        query: Tensor, key: Tensor, value: Tensor, v: Tensor, score_bias: Tensor | None, mask: Tensor | None,
        cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seed: Tensor | None,
        activation: str, left: int | None, right: int | None, dropout_p: float, need_scores: bool, blocked: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return cast("tuple[Tensor, Tensor, Tensor]", _concat_fwd(
            query, key, value, v, score_bias, mask, cu_seqlens_q, cu_seqlens_k, seed,
            activation, left, right, dropout_p, need_scores, blocked,
        ))  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:_TENSORS], *output[:2])
        ctx.options = inputs[_TENSORS:-2]
        ctx.need_scores, ctx.blocked = inputs[-2:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, dscores: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # once: activation checkpointing recomputes them at each look
        needs = ctx.needs_input_grad[:_GRADS]
        dout = torch.zeros_like(saved[_TENSORS]) if dout is None else dout
        dscores = dscores if ctx.need_scores else None
        grads = _concat_backward(dout, dlse, dscores, *saved, *ctx.options, ctx.blocked, needs)
        none = [None] * (len(ctx.needs_input_grad) - _GRADS)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *none)


_concat_attention = differentiable(_ConcatAttention)


class _ConcatBackward(torch.autograd.Function):
    """The gradients of `_ConcatAttention`; their own backward is the reference's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # spelled out, as above
        dout: Tensor, dlse: Tensor | None, dscores: Tensor | None,
        query: Tensor, key: Tensor, value: Tensor, v: Tensor, score_bias: Tensor | None, mask: Tensor | None,
        cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seed: Tensor | None, out: Tensor, lse: Tensor,
        activation: str, left: int | None, right: int | None, dropout_p: float, blocked: bool,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return tuple(_concat_bwd(
            dout, dlse, dscores, query, key, value, v, score_bias, mask, cu_seqlens_q, cu_seqlens_k, seed, out, lse,
            activation, left, right, dropout_p, blocked, list(needs),
        ))  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[: 3 + _TENSORS])
        ctx.options, ctx.needs = inputs[3 + _TENSORS + 2 : -2], inputs[-1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        cotangents, tensors = saved[:3], saved[3:]
        d_primals, d_cotangents = second_order(
            lambda *p: _reference(*p, *tensors[_GRADS:], *ctx.options),
            tensors[:_GRADS], cotangents, ctx.needs, grads,
        )  # fmt: skip
        none = [None] * (len(ctx.needs_input_grad) - 3 - _GRADS)
        return (*d_cotangents, *d_primals, *none)


_concat_backward = differentiable(_ConcatBackward)


def _reference(*args: Any, weights_only: bool = False) -> tuple[Tensor, ...]:
    activation, left, right, dropout_p = args[_TENSORS:]
    return reference.concat_attention(
        *args[:_TENSORS], activation=activation, left=left, right=right, dropout_p=dropout_p,
        weights_only=weights_only,
    )  # fmt: skip


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
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
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
    if not isinstance(query, Tensor):
        raise TypeError(f"query: expected a torch.Tensor; got {type(query).__name__}")
    return_weights = check_flag("return_weights", return_weights)
    left, right = _validate_concat(
        query, key, value, v, activation, mask, window, score_bias, cu_seqlens_q, cu_seqlens_k, dropout_p,
        return_weights,
    )  # fmt: skip
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
    blocked = impl == "auto" and query.device.type != "cuda" and not forward_mode()
    tail = (mask, cu_seqlens_q, cu_seqlens_k, seed, activation, left, right, float(dropout_p))
    if kernel or blocked:
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
        if query.shape[1:3] == (1, 1) and window is None and not packed:
            out, lse, scores = _pooled(query, key, value, v, score_bias, mask, seed, activation, dropout_p, kernel)
        else:
            out, lse, scores = _concat_attention(query, key, value, v, score_bias, *tail, return_weights, blocked)
    else:
        out, weights = _reference(query, key, value, v, score_bias, *tail, weights_only=True)
    out = out.to(value.dtype)
    out = out[0].transpose(0, 1) if packed else out
    out = out if heads else out.squeeze(1)
    if not return_weights:
        return out
    weights = (weights if scores is None else weights_from(scores, lse[..., None, :])).to(out.dtype)
    return out, weights if heads else weights.squeeze(1)


def _pooled(
    query: Tensor, key: Tensor, value: Tensor, v: Tensor, score_bias: Tensor | None, mask: Tensor | None,
    seed: Tensor | None, activation: str, dropout_p: float, kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
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
    run = location._location_attention if kernel else location._reference
    out, lse, scores = run(
        key[:, 0], None, None, v.mT, None, None, query[:, 0, 0], value[:, 0], bias, keys, None, seed,
        activation, "sigmoid", float(dropout_p), False,
    )  # fmt: skip
    return out[:, None], lse[:, None], scores.mT[:, None]


def _validate_concat(
    query: Tensor, key: Tensor, value: Tensor | None, v: Tensor, activation: str, mask: Tensor | None,
    window: tuple[int | None, int | None] | None, score_bias: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, dropout_p: float, return_weights: bool,
) -> tuple[int | None, int | None]:  # fmt: skip
    """Check every argument; return the window's sides."""
    given = {"mask": mask, "score_bias": score_bias, "return_weights": return_weights}
    packed = check_packed(given, cu_seqlens_q, cu_seqlens_k)
    check = Checker(_TABLES[packed, query.dim() == (3 if packed else 4)])
    for name, x in (("query", query), ("key", key), ("value", value), ("v", v)):
        check(name, x)
    check_activation("activation", activation)
    check_dropout("dropout_p", dropout_p)
    return check_structure(check, query, key, mask, window, score_bias, cu_seqlens_q, cu_seqlens_k)
