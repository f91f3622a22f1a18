"""Inputs of target attention for its test files, and its textbook formula."""

import functools
import itertools
import math
from dataclasses import dataclass

import _location
import _pairwise
import torch
from _compare import Operator
from _location import offsets, split_rows
from torch import Tensor

from fused_attn import target_attention


def operator(**options) -> Operator:
    """`target_attention` as the comparator wants it: the output, and the weights; the options are fixed."""

    def op(**arguments):
        return target_attention(**{"w2": None, "return_weights": True, **options, **arguments})

    return op


@dataclass(frozen=True)
class Case(_location.Case):
    """One call: the values of the factors that the tests vary."""

    rows: int = 37
    dim: int = 9
    second: int | None = 7
    activation: str = "sigmoid"
    softmax: bool = True
    scale: float = 1.0

    @property
    def options(self) -> dict:
        return {"activation": self.activation, "softmax": self.softmax, "scale": self.scale}

    @property
    def op(self) -> Operator:
        return operator(**self.options)

    @property
    def formula(self) -> Operator:
        return functools.partial(formula, **self.options)

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        rng = torch.Generator().manual_seed(1)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=rng) * scale

        lengths = split_rows(self.rows) if self.ragged else [self.rows] * self.batch
        lead = (self.rows,) if self.ragged else (self.batch, self.rows)
        last = self.attn_dim if self.second is None else self.second
        made = {
            "query": randn(len(lengths), self.dim),
            "key": randn(*lead, self.dim),
            "w1": randn(4 * self.dim, self.attn_dim, scale=1 / math.sqrt(self.dim)),
        }
        if self.second is not None:
            made["w2"] = randn(self.attn_dim, self.second, scale=3 / math.sqrt(self.attn_dim))
        made["v"] = randn(last, scale=3 / math.sqrt(last))
        if self.bias:
            made |= {"b1": randn(self.attn_dim), "b3": randn()}
            made |= {} if self.second is None else {"b2": randn(self.second)}
        if self.value is not None:
            made["value"] = randn(*lead, self.value)
        made = {name: self._laid_out(x.to(device, self.dtype)) for name, x in made.items()}
        if self.mask != "none":
            mask = self._mask(lead, lengths, rng).to(device)
            expanded = self.mask == "expanded"  # one row for all users
            made["mask"] = mask.view(-1, self.rows)[0].expand(lead) if expanded else self._laid_out(mask)
        if self.ragged:
            made["cu_seqlens"] = offsets(lengths, device)
        return made


pairwise = functools.partial(_pairwise.pairwise, make=Case)


def formula(
    *, impl, query, key, w1, v, w2=None, b1=None, b2=None, b3=None, value=None, mask=None, cu_seqlens=None,
    activation="sigmoid", softmax=True, scale=1.0,
):  # fmt: skip
    """What `operator` gives, user by user, from the four parts side by side: it calls nothing of the package."""
    special = {"identity": lambda x: x, "leaky_relu": lambda x: torch.where(x > 0, x, 0.2 * x)}
    act = special.get(activation) or getattr(torch.nn.functional, activation)
    value = key if value is None else value
    if cu_seqlens is None:
        places = [(i, slice(None)) for i in range(len(key))]
    else:
        places = [(slice(lo, hi),) for lo, hi in itertools.pairwise(cu_seqlens.tolist())]
    out, weights = [], torch.zeros(key.shape[:-1]).to(v)
    index = torch.arange(weights.numel(), device=key.device).view(weights.shape)
    for s, at in enumerate(places):
        seen = torch.ones(key[at].shape[0], dtype=torch.bool) if mask is None else mask[at].cpu()
        k, x = key[at][seen], value[at][seen]
        q = query[s].expand_as(k)
        u = torch.cat([q, k, q - k, q * k], -1) @ w1
        u = act(u if b1 is None else u + b1)
        if w2 is not None:
            u = u @ w2
            u = act(u if b2 is None else u + b2)
        score = u @ v
        score = scale * (score if b3 is None else score + b3)
        a = score.softmax(0) if softmax else score
        out.append((a[:, None] * x).sum(0))
        weights = weights.flatten().index_put((index[at][seen],), a).view(weights.shape)
    return torch.stack(out), weights
