"""Inputs of the general family for its test files: those of the concat family, scored by a product."""

import dataclasses
import functools
import math
from dataclasses import dataclass

import _concat
import _pairwise
import torch
from _compare import Operator
from torch import Tensor

from fused_attn import general_attention

ROWS = ("query", "key", "value")


def operator(**options) -> Operator:
    """`general_attention` as the comparator wants it; the options are fixed."""

    def op(
        *, impl: str, query: Tensor, key: Tensor, value: Tensor | None = None, weight: Tensor | None = None, **rest
    ):
        return general_attention(query, key, value, weight, **options, **rest, impl=impl)

    return op


@dataclass(frozen=True)
class Case(_concat.Case):
    """One call: the values of the factors that the tests vary. `attn_dim` is the width of the keys."""

    activation: str = "identity"
    weight: str = "none"  # none, matrix, or heads (a matrix a head, where there are heads)
    query_dim: int = 7  # with a weight
    own_value: bool = True  # else the values are the keys
    scale: float = 0.5

    @property
    def op(self) -> Operator:
        return operator(
            activation=self.activation,
            scale=self.scale,
            window=self.window,
            dropout_p=self.dropout_p,
            return_weights=self.return_weights and not self.ragged,
        )

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        made = super().tensors(device)
        del made["v"]
        if not self.own_value:
            del made["value"]
        if self.weight != "none":
            narrow = dataclasses.replace(self, attn_dim=self.query_dim)
            made["query"] = super(Case, narrow).tensors(device)["query"]
            per_head = (self.heads,) if self.weight == "heads" and self.heads is not None else ()
            rng = torch.Generator().manual_seed(2)
            weight = torch.randn(*per_head, self.query_dim, self.attn_dim, generator=rng)
            made["weight"] = (weight / math.sqrt(self.query_dim)).to(device, self.dtype)
        return made


pairwise = functools.partial(_pairwise.pairwise, make=Case)


def hide(tensors: dict[str, Tensor], fill: float) -> dict[str, Tensor]:
    """Put `fill` in the rows that the mask lets no query or key use; return these rows by name."""
    mask = tensors["mask"]
    keys = mask if mask.dim() == 2 else mask.any(1)
    hidden = {name: ~keys for name in ("key", "value") if name in tensors}
    if mask.dim() == 3:
        hidden["query"] = ~mask.any(2)
    for name, rows in hidden.items():
        x = tensors[name]
        (x if x.dim() == 3 else x.transpose(1, 2))[rows] = fill
    return hidden
