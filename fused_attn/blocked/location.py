r"""The windowed form of location attention in blocked PyTorch: time and memory linear in the rows.

A score does not depend on the position that looks, so what a chunk of keys gives is the same for all that see it
whole, its *state*

.. math:: m = max_j x_j, \quad l = \sum_j e^{x_j - m} c_j, \quad o = \sum_j e^{x_j - m} value_j \qquad (x = s, c = 1)

and the states before a chunk, merged, are again such sums, over keys with x = m, c = l, value = o: the windowed form
of a batch with one row a chunk. So `_prefix` calls itself; every level has a `CHUNK`-th of the rows. A position adds
the few keys that not all of its chunk see, pair by pair. Windows that are bounded on both sides are pairs only.

The maxima are constants to autograd: no result depends on them. All of this is plain PyTorch, differentiable to any
order.

0 · NaN is NaN, so a row that holds one takes no part in the sums: it is hidden, and whoever sees it gets NaN after
them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._dropout import dropout_scale
from .._operators import vjp
from .._softmax import normaliser
from ..kernels.inputs import WindowInputs
from ..reference import in_window

CHUNK = 64
"""Rows of a chunk; of windows bounded on both sides up to `WIDE`, so that a chunk has not many times as many keys."""
WIDE = 1024


class _State(NamedTuple):
    """Running softmaxes: ``m, l (chunks, R, rows)``, ``o (chunks, R, rows, Dv)``."""

    m: Tensor
    l: Tensor
    o: Tensor


class _Chunks(NamedTuple):
    """Packed rows in chunks of a sequence each; ``(chunks, 1)`` each but `cu`."""

    seq: Tensor
    start: Tensor  # first row of the sequence
    length: Tensor  # of the sequence
    lo: Tensor  # position of the chunk's first row
    cu: Tensor  # (S + 1,): first chunk of each sequence


def _chunks(cu: Tensor, size: int) -> _Chunks:
    chunks = (cu.diff() + (size - 1)) // size
    first = torch.cat([cu[:1], chunks.cumsum(0)])
    seq = torch.repeat_interleave(chunks)
    lo = (torch.arange(len(seq), device=cu.device) - first[seq]) * size
    return _Chunks(seq[:, None], cu[seq, None], cu.diff()[seq, None], lo[:, None], first)


class _Rows(NamedTuple):
    """What is summed: of each row and hop the exponent and the weight, and a value, of each hop where H = R."""

    x: Tensor  # (N, R)
    c: Tensor | None  # (N, R); None: 1
    value: Tensor  # (N, H, Dv)


def _sum(
    rows: _Rows,
    chunks: _Chunks,
    i: Tensor,
    base: Tensor | int,
    width: int,
    left: int | None,
    right: int | None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> _State:
    """States of the positions i (chunks, n), over the keys of `width` positions from `base` (chunks, 1) on."""
    j = base + torch.arange(width, device=i.device).expand(len(i), -1)
    inside = (j >= 0) & (j < chunks.length)
    at = torch.where(inside, chunks.start + j, 0).flatten()

    def gather(x: Tensor) -> Tensor:  # (chunks, width, ...)
        return x.index_select(0, at).unflatten(0, j.shape)

    pairs = inside[:, None].expand(-1, i.shape[1], -1)
    shown = in_window(i[:, :, None], j[:, None], left, right, pairs)
    x = gather(rows.x).mT[:, :, None].masked_fill(~shown[:, None], -torch.inf)  # (chunks, R, n, width)
    m = x.detach().amax(-1)
    p = torch.exp(x - _pivot(m)[..., None])
    l = p.sum(-1) if rows.c is None else (p * gather(rows.c).mT[:, :, None]).sum(-1)
    if dropout_p > 0:
        assert seed is not None
        hop = torch.arange(p.shape[1], device=p.device)[:, None, None]
        stream = chunks.seq[..., None, None] * p.shape[1] + hop
        p = p * dropout_scale(seed, j[:, None, None], stream, i[:, None, :, None], dropout_p).to(p.dtype)
    value = gather(rows.value).transpose(1, 2)  # (chunks, H, width, Dv)
    if value.shape[1] == 1:  # one product for all hops
        return _State(m, l, (p.flatten(1, 2) @ value[:, 0]).unflatten(1, p.shape[1:3]))
    return _State(m, l, p @ value)


def _pivot(m: Tensor) -> Tensor:
    """A finite number to subtract: m, or 0 where no key was seen."""
    return m.masked_fill(m == -torch.inf, 0)


def _merge(a: _State, b: _State) -> _State:
    """The state over the keys of both."""
    m = torch.maximum(a.m, b.m)
    by_a, by_b = (torch.exp(x.m - _pivot(m)) for x in (a, b))
    return _State(m, a.l * by_a + b.l * by_b, a.o * by_a[..., None] + b.o * by_b[..., None])


def _by_row(state: _State, chunks: _Chunks, i: Tensor) -> _State:
    """``(chunks, R, n)`` to ``(N, R)``, without the places past the end of a sequence."""
    at = (i < chunks.length).flatten().nonzero().squeeze(1)
    return _State(*(x.transpose(1, 2).flatten(0, 1).index_select(0, at) for x in state))


def _prefix(rows: _Rows, cu: Tensor, longest: int, right: int | None) -> _State:
    """States ``(N, R)`` of the keys up to i + right, all keys where it is None."""
    size = min(CHUNK, longest)
    chunks = _chunks(cu, size)
    i = chunks.lo + torch.arange(size, device=cu.device)
    if longest <= size:
        return _by_row(_sum(rows, chunks, i, 0, size, None, right), chunks, i)
    # A chunk sees all of those up to the `whole`-th from it; from that one on, its positions see what they may.
    whole = None if right is None else (right + 1) // size
    each = _sum(rows, chunks, chunks.lo, chunks.lo, size, None, None)
    totals = _Rows(each.m[..., 0], each.l[..., 0], each.o[..., 0, :])
    far = _prefix(totals, chunks.cu, -(-longest // size), None if whole is None else whole - 1)
    far = _State(far.m[:, :, None], far.l[:, :, None], far.o[:, :, None])
    if right is None or whole is None:
        far = _State(far.m.expand(-1, -1, size), far.l.expand(-1, -1, size), far.o.expand(-1, -1, size, -1))
        return _by_row(far, chunks, i)
    base, width = chunks.lo + whole * size, size + right - whole * size
    return _by_row(_merge(_sum(rows, chunks, i, base, width, None, right), far), chunks, i)


def _pairs(
    rows: _Rows, cu: Tensor, longest: int, left: int | None, right: int | None, seed: Tensor | None, dropout_p: float
) -> _State:
    """States ``(N, R)``, each key of a window by itself."""
    span = longest if left is None or right is None else left + right
    size = max(1, min(longest, max(CHUNK, min(span, WIDE))))
    chunks = _chunks(cu, size)
    i = chunks.lo + torch.arange(size, device=cu.device)
    base: Tensor | int = 0
    width = longest
    if left is not None and right is not None and left + right + size < longest:
        base, width = chunks.lo - left, max(1, left + right + size)
    return _by_row(_sum(rows, chunks, i, base, width, left, right, seed, dropout_p), chunks, i)


def clip_window(left: int | None, right: int | None, length: int) -> tuple[int | None, int | None]:
    """The same window for sequences of at most `length` rows, open where it reaches past them."""
    left, right = (None if side is None or side >= length - 1 else max(side, -length) for side in (left, right))
    return left, right


def window_fwd(inputs: WindowInputs) -> tuple[Tensor, Tensor]:
    """(out, lse), as `fused_attn.reference.windowed_attention` has them, out in at least float32."""
    out, lse, spoilt = _sums(inputs)
    return out.masked_fill(spoilt[..., None], torch.nan), lse.masked_fill(spoilt[..., None], torch.nan)


def _sums(inputs: WindowInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse) over the rows that are finite, and which of them see one that is not."""
    scores, value, cu_seqlens, seed, left, right, dropout_p = inputs
    R, width = scores.shape[-1], value.shape[-1]
    dtype = torch.promote_types(value.dtype, torch.float32)
    hidden = (scores == -torch.inf).all(-1, keepdim=True)  # those rows of the values may hold anything
    x = scores.to(dtype).reshape(-1, R)
    if x.numel() == 0:
        nothing = normaliser(x.new_full(scores.shape, -torch.inf), x.new_zeros(scores.shape))
        return x.new_zeros(*scores.shape, width), nothing, torch.zeros_like(scores, dtype=torch.bool)
    value = value.to(dtype)
    holed = ~value.isfinite().all(-1, keepdim=True) & ~hidden
    value = value.masked_fill(hidden | holed, 0).reshape(len(x), 1, width)
    bad = holed.reshape(-1, 1) | ~(x < torch.inf)
    x = x.masked_fill(bad, -torch.inf)
    if cu_seqlens is None:
        longest = scores.shape[1]
        cu = torch.arange(len(scores) + 1, device=x.device) * longest
    else:
        cu = cu_seqlens.long()
        longest = int(cu.diff().max())
    left, right = clip_window(left, right, longest)
    if dropout_p > 0 or (left is not None and right is not None):
        state = _pairs(_Rows(x, None, value), cu, longest, left, right, seed, dropout_p)
    elif left is None:
        state = _prefix(_Rows(x, None, value), cu, longest, right)
    else:  # the other way round it is a prefix
        state = _prefix(_Rows(x.flip(0), None, value.flip(0)), len(x) - cu.flip(0), longest, left)
        state = _State(*(part.flip(0) for part in state))
    out = state.o / state.l.masked_fill(state.l == 0, 1)[..., None]
    spoilt = _sees_any(bad, cu, left, right).reshape(scores.shape)
    return out.reshape(*scores.shape, width), normaliser(state.m, state.l).reshape(*scores.shape, 2), spoilt


def _sees_any(rows: Tensor, cu: Tensor, left: int | None, right: int | None) -> Tensor:
    """Whether each position sees any of ``rows (N, R)``: there are more up to its window's end than to its start."""
    until = torch.cat([rows.new_zeros(1, rows.shape[1], dtype=torch.int64), rows.long().cumsum(0)])
    row = torch.arange(len(rows), device=cu.device)
    seq = torch.searchsorted(cu[1:].contiguous(), row, right=True)
    start, end = cu[seq], cu[seq + 1]
    lo = start if left is None else torch.minimum(torch.maximum(row - left, start), end)
    hi = end if right is None else torch.minimum(torch.maximum(row + right + 1, start), end)
    return until[hi] > until[lo]


def window_bwd(
    inputs: WindowInputs, lse: Tensor, dout: Tensor, dlse: Tensor | None, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of (scores, values), None where `needs` is False.

    In float64: where one key has all the weight, its gradient is the difference of two equal sums. A position that is
    NaN sends NaN, but nothing if its cotangents are all 0.
    """

    def forward(scores: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return _sums(inputs._replace(scores=scores.double(), value=value.double()))[:2]

    spoilt = lse[..., 1].isnan()
    sends = (dout != 0).any(-1)
    if dlse is not None:
        sends |= (dlse != 0).any(-1)
    dout = dout.double().masked_fill((spoilt & sends)[..., None], torch.nan)
    grads = vjp(forward, inputs[:2], (dout, dlse))
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]
