"""Inputs of the statistics family for its test files: those of the location family with an MLP score.

Not `_statistics`: that is a module of Python's own.
"""

import dataclasses
import functools
from dataclasses import dataclass

import _location
import _pairwise
import torch
from _compare import Operator
from torch import Tensor

from fused_attn import statistics_pooling


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
    floor: float = 1e-12

    @property
    def op(self) -> Operator:
        return operator(activation=self.activation, floor=self.floor)

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        channels = self.dim if self.values is None else self.values
        like = dataclasses.replace(self, score="mlp_hops" if self.per_channel else "mlp", hops=channels)
        return super(Case, like).tensors(device)


pairwise = functools.partial(_pairwise.pairwise, make=Case)
