"""What a careful user would write in eager PyTorch in place of each op, on inputs of the sizes that a CPU has.

A pair is the package's call and that formula, on the same numbers: `bench.cpu` times one against the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attn import (
    Score,
    concat_attention,
    distance_attention,
    general_attention,
    graph_attention,
    hierarchical_attention,
    location_attention,
    location_aware_attention,
    statistics_pooling,
    target_attention,
    word_by_word_attention,
)


class Pair(NamedTuple):
    """Two ways to the same result: each with the tensors whose gradients a step of training takes."""

    ours: Callable[[], Tensor]
    eager: Callable[[], Tensor]
    ours_leaves: list[Tensor]
    eager_leaves: list[Tensor]


def _pair(ours: Callable[[], Tensor], eager: Callable[[], Tensor], *leaves: Tensor) -> Pair:
    return Pair(ours, eager, list(leaves), list(leaves))


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def _weight(*shape: int) -> Tensor:
    return (torch.randn(shape) / shape[0] ** 0.5).requires_grad_()


def _lengths_mask(B: int, T: int) -> Tensor:
    """Lengths from T / 4 to T."""
    return torch.arange(T) < torch.randint(T // 4, T + 1, (B, 1))


def _softmax(scores: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    return torch.softmax(scores if mask is None else scores.masked_fill(~mask, -torch.inf), dim)


def _location(B: int, T: int, D: int, A: int, *, gated: bool = False, masked: bool = True) -> Pair:
    h, w, b, v = _normal(B, T, D), _weight(D, A), _normal(A), _weight(A)
    g, gb = (_weight(D, A), _normal(A)) if gated else (None, None)
    mask = _lengths_mask(B, T) if masked else None

    def eager() -> Tensor:
        u = torch.tanh(h @ w + b)
        if g is not None and gb is not None:
            u = u * torch.sigmoid(h @ g + gb)
        return (_softmax(u @ v, mask, 1)[:, None] @ h).squeeze(1)

    gate = None if g is None else (g, gb)
    return _pair(
        lambda: location_attention(h, w, b, v, gate=gate, mask=mask),  # type: ignore[return-value]
        eager,
        *(x for x in (h, w, b, v, g, gb) if x is not None),
    )


def gated_bag(rows: int) -> Pair:
    """One bag of instances, of the widths of Ilse et al. 2018 for slides."""
    return _location(1, rows, 512, 128, gated=True, masked=False)


def _padded(lengths: Tensor, *widths: int) -> tuple[Tensor, Tensor, Tensor]:
    """Padded rows, which of them are there, and those packed."""
    shown = torch.arange(int(lengths.max())) < lengths[..., None]
    rows = torch.randn(*shown.shape, *widths) * shown[..., None]
    return rows.requires_grad_(), shown, rows.detach()[shown].requires_grad_()


def _offsets(lengths: Tensor) -> Tensor:
    return F.pad(lengths.flatten().cumsum(0), (1, 0)).int()


def _ragged_location() -> Pair:
    lengths = torch.randint(16, 257, (16,))
    padded, mask, rows = _padded(lengths, 256)
    w, b, v = _weight(256, 128), _normal(128), _weight(128)
    cu = _offsets(lengths)

    def eager() -> Tensor:
        return (_softmax(torch.tanh(padded @ w + b) @ v, mask, 1)[:, None] @ padded).squeeze(1)

    def ours() -> Tensor:
        return location_attention(rows, w, b, v, cu_seqlens=cu)  # type: ignore[return-value]

    return Pair(ours, eager, [rows, w, b, v], [padded, w, b, v])


def _hierarchical() -> Pair:
    documents, sentences, D, A = 8, 20, 128, 64
    lengths = torch.randint(1, 41, (documents, sentences))
    padded, mask, rows = _padded(lengths, D)
    (w, b, v), (w2, b2, v2) = ((_weight(D, A), _normal(A), _weight(A)) for _ in range(2))

    def eager() -> Tensor:
        inner = _softmax(torch.tanh(padded @ w + b) @ v, mask, 2)
        pooled = (inner[:, :, None] @ padded).squeeze(2)
        outer = torch.softmax(torch.tanh(pooled @ w2 + b2) @ v2, 1)
        return (outer[:, None] @ pooled).squeeze(1)

    inner_offsets, outer_offsets = _offsets(lengths), torch.arange(documents + 1, dtype=torch.int32) * sentences
    levels = Score(w, b, v), Score(w2, b2, v2)

    def ours() -> Tensor:
        return hierarchical_attention(rows, inner_offsets, outer_offsets, *levels)  # type: ignore[return-value]

    weights = [w, b, v, w2, b2, v2]
    return Pair(ours, eager, [rows, *weights], [padded, *weights])


def _window(left: int | None) -> Pair:
    T = 2048
    h, w, b, v = _normal(1, T, 64), _weight(64, 32), _normal(32), _weight(32)
    i = torch.arange(T)
    shown = i <= i[:, None]
    if left is not None:
        shown = shown & (i >= i[:, None] - left)

    def eager() -> Tensor:
        scores = torch.tanh(h @ w + b) @ v
        return _softmax(scores[:, None].expand(1, T, T), shown, 2) @ h

    def ours() -> Tensor:
        return location_attention(h, w, b, v, window=(left, 0))  # type: ignore[return-value]

    return _pair(ours, eager, h, w, b, v)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
}


def _concat(B: int, Tq: int, Tk: int, A: int, *, heads: int = 1, activation: str = "tanh") -> Pair:
    lead = (B,) if heads == 1 else (B, heads)
    q, k, x = (_normal(*lead, n, A) for n in (Tq, Tk, Tk))
    v = _weight(A) if heads == 1 else _normal(heads, A)
    mask, act = _lengths_mask(B, Tk), _ACTIVATIONS[activation]

    def eager() -> Tensor:
        if heads == 1:
            return _softmax(act(q[:, :, None] + k[:, None]) @ v, mask[:, None], 2) @ x
        scores = (act(q[:, :, :, None] + k[:, :, None]) * v[:, None, None]).sum(-1)
        return _softmax(scores, mask[:, None, None], 3) @ x

    def ours() -> Tensor:
        return concat_attention(q, k, x, v, activation=activation, mask=mask)  # type: ignore[return-value]

    return _pair(ours, eager, q, k, x, v)


def _distance() -> Pair:
    query, key, value, v = _normal(4, 128, 32), _normal(4, 256, 32), _normal(4, 256, 32), _weight(32)
    mask = _lengths_mask(4, 256)

    def eager() -> Tensor:
        scores = -((query[:, :, None] - key[:, None]).abs() @ v)
        return _softmax(scores, mask[:, None], 2) @ value

    def ours() -> Tensor:
        return distance_attention(query, key, value, v, p=1, mask=mask)  # type: ignore[return-value]

    return _pair(ours, eager, query, key, value, v)


def _general(B: int, Tq: int, Tk: int, D: int, *, activation: str = "identity", weights: bool = False) -> Pair:
    query, key, value, w = _normal(B, Tq, D), _normal(B, Tk, D), _normal(B, Tk, D), _weight(D, D)
    mask = _lengths_mask(B, Tk)

    def eager() -> Tensor:
        scores = (query @ w) @ key.mT / math.sqrt(D)
        shares = _softmax(torch.tanh(scores) if activation == "tanh" else scores, mask[:, None], 2)
        out = shares @ value
        return torch.cat([out, shares], 2) if weights else out

    def ours() -> Tensor:
        found = general_attention(
            query,
            key,
            value,
            w,
            scale=1 / math.sqrt(D),
            activation=activation,
            mask=mask,
            return_weights=weights,
        )
        return torch.cat(found, 2) if isinstance(found, tuple) else found

    return _pair(ours, eager, query, key, value, w)


def _statistics(*, channels: bool) -> Pair:
    B, T, C, A = 8, 300, 512, 64
    h, w, b, v = _normal(B, T, C), _weight(C, A), _normal(A), _weight(A, C) if channels else _weight(A)
    mask = _lengths_mask(B, T)

    def eager() -> Tensor:
        scores = torch.tanh(h @ w + b) @ v
        alpha = _softmax(scores, mask[..., None], 1) if channels else _softmax(scores, mask, 1)[..., None]
        mean = (alpha * h).sum(1)
        var = (alpha * (h - mean[:, None]) ** 2).sum(1)
        return torch.cat([mean, var.clamp(min=1e-12).sqrt()], 1)

    def ours() -> Tensor:
        mean, std = statistics_pooling(h, w, b, v, mask=mask)
        return torch.cat([mean, std], 1)

    return _pair(ours, eager, h, w, b, v)


def _target(B: int, T: int, D: int, *, softmax: bool) -> Pair:
    A, K = 80, 40
    query, key = _normal(B, D), _normal(B, T, D)
    w1, w2, v, b1, b2, b3 = _weight(4 * D, A), _weight(A, K), _weight(K), _normal(A), _normal(K), _normal(1)
    mask = _lengths_mask(B, T)

    def eager() -> Tensor:  # as DeepCTR and RecBole have it
        q = query[:, None].expand_as(key)
        u = torch.sigmoid(F.linear(torch.cat([q, key, q - key, q * key], -1), w1.mT, b1))
        scores = torch.sigmoid(F.linear(u, w2.mT, b2)) @ v + b3
        weights = _softmax(scores, mask, 1) if softmax else scores.masked_fill(~mask, 0)
        return (weights[:, None] @ key).squeeze(1)

    def ours() -> Tensor:
        biases = {"b1": b1, "b2": b2, "b3": b3[0]}
        return target_attention(query, key, w1, w2, v, **biases, softmax=softmax, mask=mask)  # type: ignore[return-value]

    of_scores = [] if softmax else [b3]  # which under a softmax is 0 but for roundings
    return _pair(ours, eager, query, key, w1, w2, v, b1, b2, *of_scores)


def _graph() -> Pair:
    nodes, edges, H, A = 2000, 16_000, 4, 16
    query, key, v = _normal(nodes, H, A), _normal(nodes, H, A), _normal(H, A)
    to = torch.randint(nodes, (edges,)).sort().values
    source = torch.randint(nodes, (edges,))
    indptr = F.pad(torch.bincount(to, minlength=nodes).cumsum(0), (1, 0)).int()
    indices = source.int()

    def eager() -> Tensor:  # as GATv2 of a library by scatter
        k = key[source]
        scores = (F.leaky_relu(query[to] + k, 0.2) * v).sum(-1)
        at = to[:, None].expand_as(scores)
        top = scores.detach().new_full((nodes, H), -torch.inf).scatter_reduce(0, at, scores.detach(), "amax")
        shares = torch.exp(scores - top[to])
        total = torch.zeros(nodes, H).index_add(0, to, shares)
        return torch.zeros(nodes, H, A).index_add(0, to, (shares / total[to])[..., None] * k)

    def ours() -> Tensor:
        return graph_attention(query, key, v, indptr, indices)  # type: ignore[return-value]

    return _pair(ours, eager, query, key, v)


def _word_by_word() -> Pair:
    B, Ty, Th, D = 16, 30, 20, 64
    premise, hypothesis = _normal(B, Ty, D), _normal(B, Th, D)
    w_y, w_h, w_r, w_t, w = *(_weight(D, D) for _ in range(4)), _weight(D)
    mask = _lengths_mask(B, Ty)

    def eager() -> Tensor:
        keys, words = premise @ w_y, hypothesis @ w_h
        r, found = premise.new_zeros(B, D), []
        for t in range(Th):
            scores = torch.tanh(keys + (words[:, t] + r @ w_r)[:, None]) @ w
            r = (_softmax(scores, mask, 1)[:, None] @ premise).squeeze(1) + torch.tanh(r @ w_t)
            found.append(r)
        return torch.stack(found, 1)

    def ours() -> Tensor:
        return word_by_word_attention(premise, hypothesis, w_y, w_h, w_r, w, w_t, mask=mask)  # type: ignore[return-value]

    return _pair(ours, eager, premise, hypothesis, w_y, w_h, w_r, w, w_t)


def _location_aware() -> Pair:
    B, Tk, A, C, K = 32, 300, 128, 32, 31
    query, key, value, v = _normal(B, A), _normal(B, Tk, A), _normal(B, Tk, A), _weight(A)
    filters, u = _weight(C, K), _weight(C, A)
    mask = _lengths_mask(B, Tk)
    previous = _softmax(torch.randn(B, Tk), mask, 1).requires_grad_()
    same = previous.detach().requires_grad_()  # eager sends hidden keys a gradient, which is not compared

    def eager() -> Tensor:
        found = F.conv1d(same[:, None], filters[:, None], padding=K // 2).mT @ u
        shares = _softmax(torch.tanh(query[:, None] + key + found) @ v, mask, 1)
        return torch.cat([(shares[:, None] @ value).squeeze(1), shares], 1)

    def ours() -> Tensor:
        return torch.cat(location_aware_attention(query, key, value, v, previous, filters, u, mask=mask), 1)

    leaves = [query, key, value, v, filters, u]
    return Pair(ours, eager, [*leaves, previous], [*leaves, same])


PAIRS: dict[str, Callable[[], Pair]] = {
    "location, B 32 T 128 D 256": lambda: _location(32, 128, 256, 128),
    "location, B 4 T 16 D 64": lambda: _location(4, 16, 64, 32),
    "location, one gated bag of 5,000": lambda: gated_bag(5000),
    "location, ragged": _ragged_location,
    "location, window of 64, T 2,048": lambda: _window(63),
    "location, scan, T 2,048": lambda: _window(None),
    "hierarchical, ragged": _hierarchical,
    "concat, B 4, 192 x 256": lambda: _concat(4, 192, 256, 64),
    "concat, sigmoid, B 2, 256 x 256": lambda: _concat(2, 256, 256, 64, activation="sigmoid"),
    "concat, relu, B 2, 256 x 256": lambda: _concat(2, 256, 256, 64, activation="relu"),
    "concat, B 2, 4 x 16": lambda: _concat(2, 4, 16, 16),
    "concat step, B 32, 512 keys": lambda: _concat(32, 1, 512, 128),
    "concat step, 4 heads": lambda: _concat(16, 1, 256, 64, heads=4),
    "distance, B 4, 128 x 256": _distance,
    "general, B 4, 128 x 256": lambda: _general(4, 128, 256, 64),
    "general, tanh": lambda: _general(4, 128, 256, 64, activation="tanh"),
    "general step with weights": lambda: _general(32, 1, 512, 128, weights=True),
    "statistics": lambda: _statistics(channels=False),
    "statistics, a channel": lambda: _statistics(channels=True),
    "target, B 256 T 50 D 64": lambda: _target(256, 50, 64, softmax=False),
    "target, softmax": lambda: _target(64, 100, 32, softmax=True),
    "graph": _graph,
    "word by word": _word_by_word,
    "location-aware step": _location_aware,
}
