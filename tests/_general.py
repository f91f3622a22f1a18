"""Inputs of the general family for its test files: those of the concat family, scored by a product."""

import dataclasses
import functools
import math
from dataclasses import dataclass

import _concat
import _pairwise
import pytest
import torch
from _compare import Operator
from torch import Tensor

from fused_attn import general_attention


def operator(**options) -> Operator:
    """`general_attention` as the comparator wants it; the options are fixed."""

    def op(
        *, impl: str, query: Tensor, key: Tensor, value: Tensor | None = None, weight: Tensor | None = None, **rest
    ):
        return general_attention(query, key, value, weight, **options, **rest, impl=impl)

    return op


both_values = pytest.mark.parametrize("own_value", [True, False], ids=["values", "keys"])
both_weights = pytest.mark.parametrize("weights", [True, False], ids=["weights", "no weights"])


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
