"""Rows that are packed on one side of the pairs and padded on the other, for what takes both sides packed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .kernels.inputs import ConcatInputs, GeneralInputs

P = TypeVar("P", ConcatInputs, GeneralInputs)
Results = tuple[Tensor, ...]


def packed_rows(x: Tensor) -> Tensor:
    """``(B, H, T, D)`` as ``(1, H, B T, D)``."""
    return x.transpose(0, 1).flatten(1, 2)[None]


def padded_rows(x: Tensor, like: Tensor) -> Tensor:
    """``(1, H, B T, D)`` as ``(B, H, T, D)``, B and T of `like`: of no sequence the rows do not tell T."""
    return x[0].unflatten(1, (like.shape[0], like.shape[2])).transpose(0, 1)


def both_packed(inputs: P) -> P:
    """Inputs whose padded side is packed, too: each of its sequences has the length that all have."""
    if inputs.cu_seqlens_q is None:
        return inputs._replace(query=packed_rows(inputs.query), cu_seqlens_q=_even(inputs.query))
    value = inputs.value if inputs.value is None else packed_rows(inputs.value)
    mask = inputs.mask
    if mask is not None and mask.dim() == 2:
        mask = mask.flatten()[None]
    key, offsets = packed_rows(inputs.key), _even(inputs.key)
    return inputs._replace(key=key, value=value, mask=mask, cu_seqlens_k=offsets)


def _even(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[2]


def with_both_packed(formula: Callable[..., Results]) -> Callable[..., Results]:
    """A formula for packed or padded rows, for those that are packed on one side: the other is packed for it.

    All but its last result have a row a query, and are as the queries came.
    """

    @functools.wraps(formula)
    def wrapped(inputs: Any, *args: Any, **options: Any) -> Results:
        if not inputs.one_sided:
            return formula(inputs, *args, **options)
        *rows, pairs = formula(both_packed(inputs), *args, **options)
        if inputs.cu_seqlens_q is None:
            rows = [padded_rows(x, inputs.query).contiguous() for x in rows]  # as operators have them
        return *rows, pairs

    return wrapped
