"""Triton's interpreter, which is most of the time of the tests, without what it makes again and again.

Half of its time goes into types: each result is a tensor with a shape of constants and a type with a printed name.
Here those of a shape are made once. What kernels compute is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest


def hasten(patch: pytest.MonkeyPatch) -> None:
    """Put quicker functions in the place of Triton's 3.6."""
    from triton.language import core
    from triton.runtime import interpreter

    patch.setattr(interpreter.InterpretedFunction, "__call__", _patched_once(interpreter.InterpretedFunction))
    new_block_type = core.block_type.__init__
    sizes: dict[tuple[int, ...], tuple[Any, int]] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {(): (core.tuple([]), core.constexpr(1))}

    def init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple([x.value if isinstance(x, core.constexpr) else x for x in shape])
        if key not in sizes:
            new_block_type(self, element_ty, shape)  # which refuses a shape that is none
            sizes[key] = self.shape, self.numel
        self.element_ty = element_ty
        self.shape, self.numel = sizes[key]

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if isinstance(type, core.block_type) else ()
        if key not in shapes:
            numel = core.constexpr(int(np.prod(key)))
            shapes[key] = core.tuple([core.constexpr(x) for x in key]), numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    def equal(self: Any, other: Any) -> Any:
        return core.constexpr(self.values == list(other))

    patch.setattr(core.block_type, "__init__", init_block_type)
    # Triton's own is a string that is made with each type, for messages and nothing else.
    name = property(lambda self: f"<{self.shape}, {self.element_ty}>", lambda self, _name: None)
    patch.setattr(core.block_type, "name", name, raising=False)
    patch.setattr(core.tensor, "__init__", init_tensor)
    patch.setattr(core.tuple, "__eq__", equal)

    plain, pointer = interpreter._get_np_dtype, np.dtype(np.uint64)
    by_name = cache(lambda name: plain(named[name]))
    named: dict[str, Any] = {}

    def np_dtype(type: Any) -> np.dtype:
        scalar = type.scalar
        if isinstance(scalar, core.pointer_type):
            return pointer
        named[scalar.name] = scalar
        return by_name(scalar.name)

    patch.setattr(interpreter, "_get_np_dtype", np_dtype)


def _patched_once(function: Any) -> Callable[..., Any]:
    """A call of a function by a kernel, which finds the interpreter in place.

    The launch of a kernel puts it there, and takes it away. A call of a function looks through the language again,
    which is a third of the time of these tests, and finds more to do in the first of each module only: what that
    does stays.
    """
    plain, seen = function.__call__, set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ in seen:
            return self.rewrite()(*args, **kwargs)
        seen.add(self.fn.__module__)
        return plain(self, *args, **kwargs)

    return call
