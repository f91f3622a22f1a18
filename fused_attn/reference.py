"""The textbook formulas in plain PyTorch: the specification, the fallback, and the tests' oracle.

Every function here is written for reading: it materialises what the formula names, and autograd
differentiates it to any order. The kernels are tested against these functions in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "gelu": F.gelu,
    "silu": F.silu,
}

_U32 = 0xFFFFFFFF


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """First word of Philox-4x32-10 (Salmon et al., SC 2011) for the counter (c0, c1, c2, 0), as int64."""
    key0, key1 = seed & _U32, (seed >> 32) & _U32
    x0, x1, x2 = torch.broadcast_tensors(c0, c1, c2)
    x3 = torch.zeros_like(x0)
    for _ in range(10):
        # The product of two 32-bit words fills 64 bits: int64 wraps, and its bits are still right.
        a, b = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = ((b >> 32) & _U32) ^ x1 ^ key0, b & _U32, ((a >> 32) & _U32) ^ x3 ^ key1, a & _U32
        key0, key1 = (key0 + 0x9E3779B9) & _U32, (key1 + 0xBB67AE85) & _U32
    return x0


def dropout_threshold(dropout_p: float) -> int:
    """A weight is dropped iff the upper 24 bits of its random word are under this number."""
    return round(dropout_p * 2**24)


def dropout_scale(seed: Tensor, position: Tensor, segment: Tensor, hop: Tensor, dropout_p: float) -> Tensor:
    """Factor on each softmax weight: 0 where it is dropped, ``1 / (1 - dropout_p)`` where it is kept.

    The random word is a function of the seed and of (position in the sequence, sequence, hop) alone, so a
    kernel makes the same mask again in its backward, and padded and ragged forms of a batch drop alike.
    """
    keep = (_philox(seed, position, segment, hop) >> 8) >= dropout_threshold(dropout_p)
    return keep.to(torch.float64) / (1.0 - dropout_p)


def segment_ids(cu_seqlens: Tensor, rows: int) -> Tensor:
    """For each packed row, the index of its segment: int64 ``(rows,)``."""
    row = torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)


def location_attention(
    h: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    v: Tensor | None,
    gate_w: Tensor | None,
    gate_b: Tensor | None,
    context: Tensor | None,
    values: Tensor | None,
    score_bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    *,
    activation: str,
    gate_activation: str,
    dropout_p: float,
    context_per_row: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Location attention on canonical arguments, as `fused_attn.location` passes them.

    .. math:: u_j = act(h_j W + b + c_j) [\odot gate\_act(h_j G + g)], \quad s_{jr} = u_j \cdot v_r + \beta_j,
        \quad o_r = \sum_j softmax_j(s_{jr}) \, value_j

    Shapes: ``h (B, T, D)`` or packed ``(N, D)``; ``w (D, A)``; ``v (A, R)``, or None with ``A = R``;
    ``w`` None leaves the product out; ``context`` ``(S, A)``, or one vector a row where ``context_per_row``; ``S`` is
    the number of sequences.

    Returns ``out (S, R, Dv)`` in the dtype of ``values``, float64 ``lse (S, R)``, and in at least float32
    ``scores (B, T, R)`` or ``(N, R)``, which are ``-inf`` where the mask is False.
    """
    rows = h.shape[:-1]
    values = h if values is None else values
    if cu_seqlens is None:
        segment = torch.arange(rows[0], device=h.device)[:, None]
        position = torch.arange(rows[1], device=h.device)[None, :]
    else:
        segment = segment_ids(cu_seqlens, rows[0])
        position = torch.arange(rows[0], device=h.device) - cu_seqlens[segment]

    if mask is not None:  # what is masked may hold anything, NaN too: take it out before it meets a number
        h = h.masked_fill(~mask[..., None], 0)
        values = values.masked_fill(~mask[..., None], 0)
        score_bias = None if score_bias is None else score_bias.masked_fill(~mask, 0)
        if context is not None and context_per_row:
            context = context.masked_fill(~mask[..., None], 0)

    z = h if w is None else h @ w
    if b is not None:
        z = z + b
    if context is not None:
        z = z + (context if context_per_row else context[segment])
    u = ACTIVATIONS[activation](z)
    if gate_w is not None:
        g = h @ gate_w
        u = u * ACTIVATIONS[gate_activation](g if gate_b is None else g + gate_b)
    scores = u if v is None else u @ v
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if score_bias is not None:
        scores = scores + score_bias[..., None]
    if mask is not None:
        scores = scores.masked_fill(~mask[..., None], -torch.inf)

    if cu_seqlens is None:
        top = scores.detach().amax(1) if rows[1] else scores.new_full((rows[0], scores.shape[-1]), -torch.inf)
        pivot = top.masked_fill(top == -torch.inf, 0)  # a row that sees no key: never -inf - -inf
        weights = torch.exp(scores - pivot[:, None])
        total = weights.sum(1)
    else:
        top = scores.new_full((cu_seqlens.numel() - 1, scores.shape[-1]), -torch.inf)
        top = top.scatter_reduce(0, segment[:, None].expand_as(scores), scores.detach(), "amax")
        pivot = top.masked_fill(top == -torch.inf, 0)
        weights = torch.exp(scores - pivot[segment])
        total = torch.zeros_like(pivot).index_add(0, segment, weights)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    lse = (pivot.double() + torch.log(total.double())).masked_fill(empty, -torch.inf)
    weights = weights / (total[:, None] if cu_seqlens is None else total[segment])
    if dropout_p > 0:
        assert seed is not None
        hop = torch.arange(scores.shape[-1], device=h.device)
        scale = dropout_scale(seed, position[..., None], segment[..., None], hop, dropout_p)
        weights = weights * scale.to(weights.dtype)

    weights = weights.to(values.dtype)
    if cu_seqlens is None:
        out = weights.mT @ values
    else:
        out = values.new_zeros(cu_seqlens.numel() - 1, scores.shape[-1], values.shape[-1])
        out = out.index_add(0, segment, weights[:, :, None] * values[:, None, :])
    return out, lse, scores


def windowed_attention(
    scores: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    *,
    left: int | None,
    right: int | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    r"""The windowed form of location attention, from its scores: one output a position, as if T queries came.

    .. math:: o_i = \sum_j softmax_j(s_j) \, value_j \quad over \quad i - left <= j <= i + right

    Shapes: ``scores (B, T, R)`` or packed ``(N, R)``, ``values (B, T, Dv)`` or ``(N, Dv)``, which may hold anything
    where the scores are ``-inf``. Dropout draws as for R heads: of key j, sequence and hop, and query i.

    Returns ``out (B, T, R, Dv)`` or ``(N, R, Dv)`` in the dtype of ``values``, float64 ``lse`` without the last axis.
    """
    if cu_seqlens is not None:
        scores, values = scores[None], values[None]
    values = values.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)
    (B, T, R), width = scores.shape, values.shape[-1]
    out, lse, _ = _attend(
        scores.mT[:, :, None].expand(B, R, T, T), values[:, None].expand(B, R, T, width), None, None,
        cu_seqlens, cu_seqlens, seed, left=left, right=right, dropout_p=dropout_p,
    )  # fmt: skip
    out, lse = out.transpose(1, 2), lse.mT
    return (out, lse) if cu_seqlens is None else (out[0], lse[0])


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


def concat_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    score_bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    *,
    activation: str,
    left: int | None,
    right: int | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Concat (additive) attention on canonical arguments, as `fused_attn.concat` passes them.

    .. math:: s_{ij} = v \cdot act(q_i + k_j) + \beta_{ij}, \quad o_i = \sum_j softmax_j(s_{ij}) \, value_j

    Shapes: ``query (B, H, Tq, A)``, ``key (B, H, Tk, A)``, ``value (B, H, Tk, Dv)``, ``v (H, A)``, ``mask (B, Tk)``
    or ``(B, Tq, Tk)``, ``score_bias`` broadcastable to ``(B, H, Tq, Tk)``. Packed rows come as one sequence, B = 1,
    with both ``cu_seqlens``; a query then sees the keys of its own segment. Key j is visible to query i iff
    ``i - left <= j <= i + right``, None for an open side.

    Returns ``out (B, H, Tq, Dv)`` in the dtype of ``value``, float64 ``lse (B, H, Tq)``, and in at least float32
    ``scores (B, H, Tq, Tk)``, which are ``-inf`` where a key is not visible.
    """
    query, key, value = readable(mask, query, key, value)
    scores = (v[:, None, None] * ACTIVATIONS[activation](query[:, :, :, None] + key[:, :, None])).sum(-1)
    return _attend(
        scores, value, score_bias, mask, cu_seqlens_q, cu_seqlens_k, seed, left=left, right=right, dropout_p=dropout_p
    )


def general_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    weight: Tensor | None,
    score_bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    *,
    activation: str,
    scale: float,
    left: int | None,
    right: int | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""General (bilinear) and dot attention on canonical arguments, as `fused_attn.general` passes them.

    .. math:: s_{ij} = act(scale \, q_i^T W k_j) + \beta_{ij}, \quad o_i = \sum_j softmax_j(s_{ij}) \, value_j

    Shapes: ``query (B, H, Tq, Dq)``, ``key (B, H, Tk, Dk)``, ``value (B, H, Tk, Dv)``, None for the keys;
    ``weight (Dq, Dk)`` or ``(H, Dq, Dk)``, None for the identity with ``Dq = Dk``. The other arguments and the
    results are those of `concat_attention`.
    """
    query, key, value = readable(mask, query, key, key if value is None else value)
    scores = ACTIVATIONS[activation](scale * ((query if weight is None else query @ weight) @ key.mT))
    return _attend(
        scores, value, score_bias, mask, cu_seqlens_q, cu_seqlens_k, seed, left=left, right=right, dropout_p=dropout_p
    )


def readable(mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``(B, H, T, D)`` with zeros where the mask lets no pair use a row: it may be NaN."""
    if mask is not None:
        keys = mask if mask.dim() == 2 else mask.any(1)
        key, value = (x.masked_fill(~keys[:, None, :, None], 0) for x in (key, value))
        if mask.dim() == 3:
            query = query.masked_fill(~mask.any(2)[:, None, :, None], 0)
    return query, key, value


def _attend(
    scores: Tensor,
    value: Tensor,
    score_bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    *,
    left: int | None,
    right: int | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, scores) from the scores ``(B, H, Tq, Tk)`` of all pairs, before bias and mask."""
    B, H, Tq, Tk = scores.shape
    q_seq, i = (x[:, :, None] for x in positions(B, Tq, cu_seqlens_q, scores.device))
    k_seq, j = (x[:, None, :] for x in positions(B, Tk, cu_seqlens_k, scores.device))
    shown = in_window(i, j, left, right, q_seq == k_seq)
    if mask is not None:
        shown = shown & (mask[:, None, :] if mask.dim() == 2 else mask)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if score_bias is not None:
        scores = scores + score_bias
    scores = scores.masked_fill(~shown[:, None], -torch.inf)
    top = scores.detach().amax(-1) if Tk else scores.new_full((B, H, Tq), -torch.inf)
    pivot = top.masked_fill(top == -torch.inf, 0)
    weights = torch.exp(scores - pivot[..., None])
    total = weights.sum(-1)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    lse = (pivot.double() + torch.log(total.double())).masked_fill(empty, -torch.inf)
    weights = weights / total[..., None]
    if dropout_p > 0:
        assert seed is not None
        head = torch.arange(H, device=scores.device)[:, None, None]
        scale = dropout_scale(seed, j[:, None], q_seq[:, None] * H + head, i[:, None], dropout_p)
        weights = weights * scale.to(weights.dtype)
    return weights.to(value.dtype) @ value, lse, scores
