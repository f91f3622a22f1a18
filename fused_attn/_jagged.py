"""Jagged tensors, as `torch.nested` has them, in place of packed rows and their offsets."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from ._checks import check_values

P = ParamSpec("P")
R = TypeVar("R")


def jagged_offsets(name: str, x: Tensor) -> Tensor:
    """The offsets of a jagged tensor that is packed, its ragged axis after the batch."""
    jagged = cast("Any", x)  # a NestedTensor, whose methods Tensor's type does not have
    if jagged.lengths() is not None:
        raise ValueError(f"{name}: expected a jagged tensor without holes; got one with lengths; rebuild it packed")
    if getattr(jagged, "_ragged_idx", 1) != 1:
        raise ValueError(
            f"{name}: expected a jagged tensor whose second axis is the ragged one; got a transposed one"
        )
    return cast("Tensor", jagged.offsets())


def jagged_pairs(fn: Callable[P, R]) -> Callable[P, R]:
    """Let a function of queries and keys take both jagged, and return so what has a row a query.

    Inside they are packed rows. A mask may be of packed keys, or jagged too; values are as the keys.
    """
    order = tuple(inspect.signature(fn).parameters)
    at = order.index("query")

    @functools.wraps(fn)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        query = args[at] if len(args) > at else kwargs.get("query")
        if isinstance(query, Tensor) and query.layout == torch.jagged:
            given: dict[str, Any] = {**dict(zip(order, args, strict=False)), **kwargs}
            return cast("R", _of_packed(cast("Callable[..., Any]", fn), given, [given.pop(n) for n in order[:at]]))
        return fn(*args, **kwargs)

    return wrapped


def _of_packed(fn: Callable[..., Any], given: dict[str, Any], before: list[Any]) -> Any:
    for side in ("cu_seqlens_q", "cu_seqlens_k"):
        if given.get(side) is not None:
            raise ValueError(f"{side}: expected None with a jagged query, which has offsets; got a tensor")
    if given.get("return_state") is True:
        raise ValueError(
            "return_state: expected False with a jagged query, pass its rows with cu_seqlens_q; got True"
        )
    offsets = _unpack(given, "query")
    if given.get("key") is not None:
        of_keys = _unpack(given, "key")
        if of_keys.shape != offsets.shape:
            wanted, came = offsets.shape[0] - 1, of_keys.shape[0] - 1
            raise ValueError(f"key: expected as many sequences as query has, {wanted}; got {came}")
        for name in ("value", "mask"):
            x = given.get(name)
            wants = x is not None and x is not False if name == "value" else isinstance(x, Tensor) and x.is_nested
            if wants:
                theirs = _unpack(given, name)
                if theirs is not of_keys:
                    if theirs.shape != of_keys.shape or theirs.device != of_keys.device:
                        raise ValueError(f"{name}: expected a jagged tensor with the offsets of key; got others")
                    check_values(name, theirs, (theirs == of_keys).all(), "a jagged tensor with the offsets of key")
        given["cu_seqlens_k"] = of_keys.to(torch.int32)
    given["cu_seqlens_q"] = offsets.to(torch.int32)
    results = fn(*before, **given)
    if isinstance(results, tuple):
        return tuple(torch.nested.nested_tensor_from_jagged(x, offsets) for x in results)
    return torch.nested.nested_tensor_from_jagged(results, offsets)


def _unpack(given: dict[str, Any], name: str) -> Tensor:
    """Put the rows of a jagged tensor in its place; returns its offsets."""
    x = given[name]
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a jagged tensor, as query is; got {type(x).__name__}")
    if x.layout != torch.jagged:
        error, came = (TypeError, f"layout {x.layout}") if x.is_nested else (ValueError, str(tuple(x.shape)))
        raise error(f"{name}: expected a jagged tensor, as query is; got {came}")
    offsets = jagged_offsets(name, x)
    given[name] = cast("Any", x).values()
    return offsets
