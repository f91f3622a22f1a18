"""A library's module and a call of it, as a pair that `bench.cpu` times."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fused_attn.compat import replace_attention

from ..eager import Pair

Case = Callable[[], tuple[nn.Module, tuple[Any, ...]]]
"""Makes a module and the inputs of its call, floating ones as leaves that ask for a gradient."""


def pair_of(case: Case) -> Pair:
    """The module as it is and a copy, with the same parameters, that was replaced."""
    theirs, inputs = case()
    ours = copy.deepcopy(theirs, {id(x): x for x in theirs.parameters()})
    replace_attention(ours, cpu="always", strict=True)
    leaves = [x for x in (*tree_leaves(inputs), *theirs.parameters()) if isinstance(x, Tensor) and x.requires_grad]

    def call(module: nn.Module) -> Callable[[], Tensor]:
        return lambda: tree_leaves(module(*inputs))[0]

    return Pair(call(ours), call(theirs), leaves, leaves)


def normal(*shape: int) -> Tensor:
    """A leaf that asks for a gradient."""
    return torch.randn(shape).requires_grad_()
