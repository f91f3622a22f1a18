"""Structures made of a tensor's numbers: once, as long as the tensor lives and nobody writes to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")


def made_once(
    made: WeakTensorKeyDictionary, x: Tensor, sizes: tuple[int | None, ...], make: Callable[[], Made]
) -> Made:
    """What `make` makes of the numbers of x and of sizes; `made` keeps the last of each tensor, and no tensor alive.

    In a compiled graph, under functorch, and of a subclass of Tensor it is made at each call.
    """
    kept = not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
    kept = kept and type(x) is Tensor and not x.is_inference()
    key = (x._version, x.data_ptr(), x.shape, *sizes) if kept else None
    known = made.get(x) if kept else None
    if known is not None and known[0] == key:
        return cast("Made", known[1])
    with torch.inference_mode(False):
        new = make()
    if kept:
        made[x] = key, new
    return new
