"""Softmaxes along an axis and over the segments of packed rows, which are 0 where no key is visible."""

from __future__ import annotations

import torch
from torch import Tensor

from ._tracing import can_look, is_finite


def normaliser(top: Tensor, total: Tensor) -> Tensor:
    """(m, l) of softmaxes, ``shape + (2,)``: the largest score, a constant to autograd, and Σ exp(score - m).

    A weight is ``exp(score - m) / l``. Where no key is visible they are (-inf, 0).
    """
    return torch.stack([top.detach().to(total.dtype), total], -1)


def softmax_of_rows(scores: Tensor, segment: Tensor | None, count: int) -> tuple[Tensor, Tensor | None]:
    """Weights over axis 1 of ``(B, T, R)``; of ``(N, R)`` over the rows of each of `count` segments.

    Also the largest scores, -inf of no row; None where nobody needs them, for every softmax is seen to have a row.
    """
    if segment is None:
        return softmax(scores, 1)
    top = scores.new_full((count, scores.shape[-1]), -torch.inf)
    top = top.scatter_reduce(0, segment[:, None].expand_as(scores), scores.detach(), "amax")
    pivot = pivot_of(top)
    weights = torch.exp(scores - pivot.index_select(0, segment))
    total = torch.zeros_like(pivot).index_add(0, segment, weights)
    return weights / total.masked_fill(total == 0, 1).index_select(0, segment), top


def softmax(scores: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
    """Softmax along `dim`, zeros of no key, of which PyTorch's makes NaN; and as `softmax_of_rows` the largest."""
    if can_look(scores) and scores.shape[dim]:
        weights = torch.softmax(scores, dim)
        if is_finite(weights.detach()):
            return weights, None
    top = highest(scores, dim)
    blind = (top == -torch.inf).unsqueeze(dim)
    return torch.softmax(scores.masked_fill(blind, 0), dim).masked_fill(blind, 0), top


def pivot_of(top: Tensor) -> Tensor:
    """From which exponents are counted: `top`, but never -inf - -inf."""
    return top.masked_fill(top == -torch.inf, 0)


def sums_of_rows(scores: Tensor, top: Tensor | None, segment: Tensor | None) -> Tensor:
    """The normaliser of `softmax_of_rows`, with the largest scores that it gave."""
    if segment is None:
        top = highest(scores, 1) if top is None else top
        return normaliser(top, torch.exp(scores - pivot_of(top)[:, None]).sum(1))
    assert top is not None
    pivot = pivot_of(top)
    exponentials = torch.exp(scores - pivot.index_select(0, segment))
    return normaliser(top, torch.zeros_like(pivot).index_add(0, segment, exponentials))


def highest(scores: Tensor, dim: int) -> Tensor:
    """The largest score along `dim`, a constant; -inf of none, which an exported program may meet later on."""
    scores = scores.detach()
    if torch.compiler.is_exporting() or not scores.shape[dim]:
        one = scores.sum(dim, keepdim=True)
        scores = torch.cat([scores, torch.full_like(one, -torch.inf)], dim)
    return scores.amax(dim)
