"""Validation that every family shares. Messages name the argument, what was expected, and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from .reference import ACTIVATIONS

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_tensor(
    name: str,
    x: Tensor,
    *,
    shapes: Sequence[tuple[str, Sequence[int | None]]],
    dtypes: Sequence[torch.dtype] = DTYPES,
    device: torch.device | None = None,
    hint: str = "",
) -> None:
    """Check one tensor argument.

    Parameters
    ----------
    name, x
        The argument. Anything but a tensor is a TypeError.
    shapes
        What is allowed: pairs of the shape in words (``"(D, A)"``) and in numbers, None for any size.
    dtypes, device
        What is allowed; a device of None allows any.
    hint
        What to do about a wrong shape or dtype.

    Raises
    ------
    TypeError
        For a dtype outside `dtypes`.
    ValueError
        For a shape or a device that does not fit.

    """
    hint = f"; {hint}" if hint else ""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor; got {type(x).__name__}{hint}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {_names(dtypes)}; got {_names([x.dtype])}{hint}")
    fits = any(
        x.dim() == len(sizes) and all(n is None or n == have for n, have in zip(sizes, x.shape, strict=True))
        for _, sizes in shapes
    )
    if not fits:
        expected = " or ".join(words + ("" if None in sizes else f" = {tuple(sizes)}") for words, sizes in shapes)
        raise ValueError(f"{name}: expected shape {expected}; got {tuple(x.shape)}{hint}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected device {device}; got {x.device}")


def check_activation(name: str, value: str) -> None:
    """Raise ValueError unless `value` names an activation."""
    if value not in ACTIVATIONS:
        raise ValueError(f"{name}: expected one of {', '.join(ACTIVATIONS)}; got {value!r}")


def check_dropout(name: str, value: float) -> None:
    """Raise ValueError unless 0 <= value < 1, and TypeError for what is no number."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float; got {type(value).__name__}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected 0 <= {name} < 1; got {value}")


def check_cu_seqlens(name: str, cu: Tensor, rows: int, device: torch.device) -> None:
    """Check offsets of a ragged batch: int32 ``(S + 1,)``, ``0 = cu[0] <= cu[1] <= ... <= cu[S] = rows``.

    Raises
    ------
    TypeError, ValueError
        For dtype, shape and device; for the values too where they can be read without waiting for a device.
        On a GPU, and in a compiled graph, wrong values stop the program with an assertion, as an index out of
        range does in `torch.nn.Embedding`.

    """
    check_tensor(
        name, cu, shapes=[("(S + 1,)", (None,))], dtypes=[torch.int32], device=device,
        hint="offsets of the sequences in the packed rows: lengths.cumsum(0) with a leading 0, .int()",
    )  # fmt: skip
    check_offsets(name, cu, rows, "packed rows")


def check_offsets(name: str, x: Tensor, rows: int, of: str) -> None:
    """Check the values of offsets into `rows` rows: ``0 = x[0] <= x[1] <= ... <= x[-1] = rows``.

    Raises
    ------
    ValueError
        For no offset at all; for the values as `check_cu_seqlens` does.

    """
    if x.numel() == 0:
        raise ValueError(f"{name}: expected at least one offset, 0; got an empty tensor")
    good = (x[0] == 0) & (x[-1] == rows) & (x[1:] >= x[:-1]).all()
    _check_values(name, x, good, "non-decreasing offsets from 0 to", rows, of)


def check_indices(name: str, x: Tensor, count: int, of: str) -> None:
    """Check that each number is one of ``0 .. count - 1``; a ValueError as `check_cu_seqlens` raises it."""
    good = ((x >= 0) & (x < count)).all()
    _check_values(name, x, good, "non-negative indices under", count, of)


def _check_values(name: str, x: Tensor, good: Tensor, expected: str, count: int, of: str) -> None:
    """Raise where the values can be read without waiting for a device; else assert there."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        torch._assert_async(good, f"{name}: expected {expected} the number of {of}")
    elif not good:
        came = x.tolist() if x.numel() < 100 else x  # PyTorch shows the ends of a long one
        raise ValueError(f"{name}: expected {expected} the number of {of}, {count}; got {came}")


def check_window(window: tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    """The window's sides, both open where there is none; TypeError for what is no pair of int or None."""
    if window is None:
        return None, None
    good = isinstance(window, tuple) and len(window) == 2
    if not good or any(n is not None and (not isinstance(n, int) or isinstance(n, bool)) for n in window):
        raise TypeError(f"window: expected a pair (left, right) of int or None; got {window!r}")
    # Past any length is open: the kernels add a side to a position, in int32.
    left, right = (None if side is None or side >= 2**30 else max(side, -(2**30)) for side in window)
    return left, right


def check_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *,
    widths: tuple[str, str],
    same_width: bool,
) -> bool:
    """Check queries, keys and values, padded or packed; return whether they have heads.

    Parameters
    ----------
    query, key, value
        ``(B, Tq, Dq)``, ``(B, Tk, Dk)`` and ``(B, Tk, Dv)``, with heads ``(B, H, T, D)``; packed ``(N, D)`` or
        ``(N, H, D)``.
    cu_seqlens_q, cu_seqlens_k
        Both or none; their values are left to `check_structure`.
    widths
        What the messages call the widths of queries and of keys.
    same_width
        Whether keys must be as wide as queries.

    Raises
    ------
    TypeError, ValueError
        See `check_tensor`; also for features of width 0.

    """
    packed = cu_seqlens_q is not None
    if packed != (cu_seqlens_k is not None):
        name = "cu_seqlens_k" if packed else "cu_seqlens_q"
        raise ValueError(f"{name}: expected offsets with the other side's, packed rows need both; got None")
    forms = [("N, ", 2), ("N, H, ", 3)] if packed else [("B, Tq, ", 3), ("B, H, Tq, ", 4)]
    check_tensor("query", query, shapes=[(f"({words}{widths[0]})", (None,) * rank) for words, rank in forms])
    heads = query.dim() == (3 if packed else 4)
    rows: list[int | None] = [None, query.shape[1]] if packed else [query.shape[0], query.shape[1], None]
    if not heads:
        del rows[1]
    words = forms[heads][0].replace("Tq", "Tk")
    like = {"dtypes": [query.dtype], "device": query.device}
    width = query.shape[-1] if same_width else None
    check_tensor("key", key, shapes=[(f"({words}{widths[1]})", (*rows, width))], **like)  # type: ignore[arg-type]
    if value is not None:
        check_tensor("value", value, shapes=[(f"({words}Dv)", (*key.shape[:-1], None))], **like)  # type: ignore[arg-type]
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x is not None and x.shape[-1] == 0:
            raise ValueError(f"{name}: expected at least one feature; got shape {tuple(x.shape)}")
    return heads


def check_structure(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    window: tuple[int | None, int | None] | None,
    score_bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    return_weights: bool,
) -> tuple[int | None, int | None]:
    """Check what says which pairs of queries and keys meet, after `check_rows`; return the window's sides.

    Raises
    ------
    TypeError, ValueError
        See `check_tensor` and `check_cu_seqlens`; also for what packed rows do not have.

    """
    device = query.device
    if cu_seqlens_q is not None:
        for name, given in (("mask", mask), ("score_bias", score_bias)):
            if given is not None:
                raise ValueError(f"{name}: expected None with packed rows; got a tensor")
        if return_weights:
            raise ValueError(
                "return_weights: expected False with packed rows, pad the batch to see its weights; got True"
            )
        cu_seqlens_k = cast("Tensor", cu_seqlens_k)
        check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query.shape[0], device)
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, key.shape[0], device)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                f"cu_seqlens_k: expected as many sequences as cu_seqlens_q, shape {tuple(cu_seqlens_q.shape)}; got "
                f"{tuple(cu_seqlens_k.shape)}"
            )
    full = (*query.shape[:-1], key.shape[-2])  # (B, [H,] Tq, Tk)
    if mask is not None:
        keys, pairs = (full[0], full[-1]), (full[0], *full[-2:])
        check_tensor(
            "mask", mask, shapes=[("(B, Tk)", keys), ("(B, Tq, Tk)", pairs)], dtypes=[torch.bool], device=device,
            hint="True = may be attended",
        )  # fmt: skip
    if score_bias is not None:
        allowed = [query.dtype] if query.dtype.itemsize >= 4 else [query.dtype, torch.float32]
        any_shape = [("", tuple(score_bias.shape))] if isinstance(score_bias, Tensor) else []
        check_tensor("score_bias", score_bias, shapes=any_shape, dtypes=allowed, device=device)
        fits = len(score_bias.shape) <= len(full) and all(
            n in (1, m) for n, m in zip(reversed(score_bias.shape), reversed(full), strict=False)
        )
        if not fits:
            words = "(B, H, Tq, Tk)" if len(full) == 4 else "(B, Tq, Tk)"
            raise ValueError(
                f"score_bias: expected a shape that broadcasts to {words} = {full}; got {tuple(score_bias.shape)}"
            )
    return check_window(window)
