"""Jagged tensors, as `torch.nested` has them, in place of packed rows and their offsets."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeGuard, TypeVar, cast

import torch
from torch import Tensor

from ._checks import check_values
from .segments import as_offsets

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
    """Let a function of queries and keys take either of them jagged, and return so what has a row a query.

    Inside they are packed rows. Values are as the keys; a mask may be of packed keys, or jagged as they are. A bias,
    and a mask of pairs, of three axes, may be jagged as the weights of jagged queries are.
    """
    order = tuple(inspect.signature(fn).parameters)
    at = order.index("query"), order.index("key")

    @functools.wraps(fn)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        both = [args[i] if len(args) > i else kwargs.get(order[i]) for i in at]
        if any(is_jagged(x) for x in both):
            given: dict[str, Any] = {**dict(zip(order, args, strict=False)), **kwargs}
            before = [given.pop(name) for name in order[: at[0]]]
            return cast("R", _of_packed(cast("Callable[..., Any]", fn), given, before))
        return fn(*args, **kwargs)

    return wrapped


def jagged_history(fn: Callable[P, R]) -> Callable[P, R]:
    """Let a function of one query a sequence take the keys jagged; inside they are packed rows.

    Values, and a mask unless it is packed, are as the keys, and what has a number a key is returned so.
    """
    order = tuple(inspect.signature(fn).parameters)
    at = order.index("key")

    @functools.wraps(fn)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        key = args[at] if len(args) > at else kwargs.get("key")
        if not is_jagged(key):
            return fn(*args, **kwargs)
        if kwargs.get("cu_seqlens") is not None:
            raise ValueError("cu_seqlens: expected None with a jagged key, which has offsets; got a tensor")
        rows = rows_of("key", key)
        given: dict[str, Any] = {**dict(zip(order, args, strict=False)), **kwargs}
        given |= {"key": rows.packed, "cu_seqlens": rows.offsets.to(torch.int32)}
        for name in ("value", "mask"):
            x = given.get(name)
            if x is not None and (name == "value" or is_jagged(x)):
                given[name] = of_rows(name, x, rows, "key")
        before = [given.pop(name) for name in order[: order.index("query")]]
        results = cast("Callable[..., Any]", fn)(*before, **given)
        kinds = _kinds(given)
        if len(kinds) == 1:
            return cast("R", results)
        pairs = zip(kinds, results, strict=True)
        return cast("R", tuple(rows.nest(x) if kind in OF_PAIRS else x for kind, x in pairs))

    return wrapped


def is_jagged(x: Any) -> TypeGuard[Tensor]:
    """Whether x is a tensor of the layout that `torch.nested` calls jagged."""
    return isinstance(x, Tensor) and x.layout == torch.jagged


BESIDE = ("weights", "log_weights", "scores", "lse")  # in the order of results
OF_PAIRS = BESIDE[:3]


def _kinds(given: dict[str, Any]) -> list[str]:
    """What a call returns, in its order; its flags were checked by it."""
    return ["out"] * (given.get("value") is not False) + [kind for kind in BESIDE if given.get(f"return_{kind}")]


class Rows(NamedTuple):
    """Of a jagged tensor."""

    packed: Tensor  # (N, ...), heads after the rows
    offsets: Tensor
    heads_first: bool  # of (S, H, T, width), as `scaled_dot_product_attention` takes it, not (S, T, H, width)

    def nest(self, x: Any) -> Any:
        """Results that have these rows, packed, as a jagged tensor with its axes in the same order."""
        if isinstance(x, tuple):
            items = [self.nest(item) for item in x]
            return type(x)(*items) if hasattr(x, "_fields") else tuple(items)
        made = torch.nested.nested_tensor_from_jagged(x, self.offsets)
        return made.transpose(1, 2) if self.heads_first else made


def _of_packed(fn: Callable[..., Any], given: dict[str, Any], before: list[Any]) -> Any:
    query, key = (rows_of(name, x) if is_jagged(x := given.get(name)) else None for name in ("query", "key"))
    for rows, name in ((query, "query"), (key, "key")):
        side = f"cu_seqlens_{name[0]}"
        if rows is not None and given.get(side) is not None:
            raise ValueError(f"{side}: expected None with a jagged {name}, which has offsets; got a tensor")
        if rows is not None:
            given[name] = rows.packed
    if key is not None:
        if query is not None and key.offsets.shape != query.offsets.shape:
            wanted, came = query.offsets.shape[0] - 1, key.offsets.shape[0] - 1
            raise ValueError(f"key: expected as many sequences as query has, {wanted}; got {came}")
        for name in ("value", "mask"):
            x = given.get(name)
            if x is not None and x is not False if name == "value" else is_jagged(x) and x.dim() == 2:
                given[name] = of_rows(name, x, key, "key")
        given["cu_seqlens_k"] = key.offsets.to(torch.int32)
    if query is None:
        return fn(*before, **given)
    given["cu_seqlens_q"] = query.offsets.to(torch.int32)
    for name in ("score_bias", "mask"):
        if is_jagged(x := given.get(name)) and x.dim() > (2 if name == "mask" else 1):  # a row a query
            pairs = Rows(query.packed, _keys_of_queries(query, key, given), False)
            given[name] = of_rows(name, x, pairs, "the scores")
    results = fn(*before, **given)
    kinds = _kinds(given)
    if not any(kind in OF_PAIRS for kind in kinds):
        return query.nest(results)
    pairs = Rows(query.packed, _keys_of_queries(query, key, given), False)
    alone = not isinstance(results, tuple) or len(kinds) == 1
    made = [
        (pairs if kind in OF_PAIRS else query).nest(x)
        for kind, x in zip(kinds, (results,) if alone else results, strict=True)
    ]
    return made[0] if alone else tuple(made)


def _keys_of_queries(query: Rows, key: Rows | None, given: dict[str, Any]) -> Tensor:
    """Of a number a pair where the keys of each query begin: int64, one more than there are queries."""
    lengths = query.offsets.diff()
    if key is not None:
        of_keys = key.offsets.diff()
    elif (cu := given.get("cu_seqlens_k")) is not None:
        of_keys = as_offsets(cu).diff().long()
    else:
        of_keys = torch.full_like(lengths, given["key"].shape[-2])
    each = torch.repeat_interleave(of_keys, lengths, output_size=query.packed.shape[0])
    return torch.nn.functional.pad(each.cumsum(0), (1, 0))


def rows_of(name: str, x: Any) -> Rows:
    """The rows of a jagged tensor, of either order of axes."""
    heads_first = x.dim() == 4 and getattr(x, "_ragged_idx", 1) == 2
    offsets = jagged_offsets(name, x.transpose(1, 2) if heads_first else x)
    values = x.values()
    return Rows(values.transpose(0, 1) if heads_first else values, offsets, heads_first)


def of_rows(name: str, x: Any, rows: Rows, like: str) -> Tensor:
    """The packed rows of a jagged tensor, which are those of `like`: a row for each of its rows."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a jagged tensor, as {like} is; got {type(x).__name__}")
    if x.layout != torch.jagged:
        error, came = (TypeError, f"layout {x.layout}") if x.is_nested else (ValueError, str(tuple(x.shape)))
        raise error(f"{name}: expected a jagged tensor, as {like} is; got {came}")
    if rows.heads_first and x.dim() == 3:
        x = x.transpose(1, 2)  # of a number a row and head
    packed, theirs, _ = rows_of(name, x)
    if theirs is not rows.offsets:
        if theirs.shape != rows.offsets.shape or theirs.device != rows.offsets.device:
            raise ValueError(f"{name}: expected a jagged tensor with the offsets of {like}; got others")
        check_values(name, theirs, (theirs == rows.offsets).all(), f"a jagged tensor with the offsets of {like}")
    return packed
