"""Inputs of the statistics family for its test files: those of the location family with an MLP score.

Not `_statistics`: that is a module of Python's own.
"""

import dataclasses
import functools
import itertools
from dataclasses import dataclass

import _location
import _pairwise
import pytest
import torch
from _compare import Operator
from torch import Tensor

from fused_attn import statistics_pooling


def assert_raises(given: dict, error: type[Exception], text: str) -> None:
    """`statistics_pooling` of frames (2, 5, 3) and what is given raises; a tuple is the shape of a tensor."""
    made = {name: torch.rand(x) if isinstance(x, tuple) else x for name, x in given.items()}
    with pytest.raises(error) as caught:
        statistics_pooling(torch.rand(2, 5, 3), **made)
    assert str(caught.value).startswith(text)


def operator(**options) -> Operator:
    """`statistics_pooling` as the comparator wants it: [mean; std], and the weights; the options are fixed."""

    def op(**arguments):
        mean, std, *weights = statistics_pooling(**{"return_weights": True, **options}, **arguments)
        pooled = torch.cat([mean, std], dim=-1)
        return (pooled, *weights) if weights else pooled

    return op


@dataclass(frozen=True)
class Case(_location.Case):
    """One call: the values of the factors that the tests vary."""

    per_channel: bool = True
    weight: bool = True  # w
    floor: float = 1e-12

    @property
    def op(self) -> Operator:
        return operator(activation=self.activation, floor=self.floor)

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        channels = self.dim if self.value is None else self.value
        score = ("mlp" if self.weight else "projected") + "_hops" * self.per_channel
        like = dataclasses.replace(self, score=score, hops=channels)
        return super(Case, like).tensors(device)


pairwise = functools.partial(_pairwise.pairwise, make=Case)


def formula(*, impl, h, v, w=None, b=None, context=None, value=None, mask=None, cu_seqlens=None, act=torch.tanh):
    """What `operator` gives, sequence by sequence: the oracle, which calls nothing of the package."""
    value = h if value is None else value
    if cu_seqlens is None:
        places = [(i, slice(None)) for i in range(len(h))]
    else:
        places = [(slice(lo, hi),) for lo, hi in itertools.pairwise(cu_seqlens.tolist())]
    pooled, weights = [], torch.zeros(*h.shape[:-1], *v.shape[1:]).to(v)
    for s, at in enumerate(places):
        seen = torch.ones(h[at].shape[0], dtype=torch.bool) if mask is None else mask[at].cpu()
        rows, x = h[at][seen], value[at][seen]
        if not len(rows):
            pooled.append((value * 0).flatten(0, -2).sum(0).repeat(2))
            continue
        z = rows if w is None else rows @ w
        z = z if b is None else z + b
        if context is not None and (cu_seqlens is not None or context.dim() == 2):
            z = z + context.flatten(0, -2)[s]
        elif context is not None:
            z = z + context[at][seen]
        alpha = (act(z) @ v).softmax(0)
        each = alpha.reshape(len(rows), -1)
        mean = (each * x).sum(0)
        pooled.append(torch.cat([mean, (each * (x - mean) ** 2).sum(0).clamp(min=1e-12).sqrt()]))
        index = torch.arange(len(h.flatten(0, -2)), device=h.device).view(h.shape[:-1])[at][seen]
        weights = weights.flatten(0, h.dim() - 2).index_put((index,), alpha).view(weights.shape)
    return torch.stack(pooled), weights
