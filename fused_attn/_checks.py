"""Validation that every family shares. Messages name the argument, what was expected, and what came."""

from __future__ import annotations

from collections.abc import Sequence

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
    if cu.numel() == 0:
        raise ValueError(f"{name}: expected at least one offset, 0; got an empty tensor")
    good = (cu[0] == 0) & (cu[-1] == rows) & (cu[1:] >= cu[:-1]).all()
    if torch.compiler.is_compiling() or cu.device.type != "cpu":
        torch._assert_async(good, f"{name}: expected non-decreasing offsets from 0 to the number of rows")
    elif not good:
        raise ValueError(
            f"{name}: expected non-decreasing offsets from 0 to the {rows} packed rows; got {cu.tolist()}"
        )
