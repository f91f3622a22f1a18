"""Validation that every family shares: tables of arguments, the checker that reads them, and checks of options.

A family has a table: each argument's shapes in size names, its dtypes, a hint. The checker binds a size where it
first sees it, so that a message can say where it is from. Messages name the argument, what was expected, what came.
"""

from __future__ import annotations

import itertools
import math
import numbers
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ._tracing import every_sample
from .reference import ACTIVATIONS, SCORE_ACTIVATIONS

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FINITE = (-sys.float_info.max, math.inf)  # from, and under
TRUE_IS_VISIBLE = "True = may be attended"
OFFSETS_HINT = "offsets of the sequences in the packed rows: of lengths Segments.from_lengths(lengths) has them"

_WIDTHS = frozenset(["A", "C", "D", "Dh", "Dk", "Dq", "Dv", "K", "P", "R"]) | {"D'"}  # sizes of at least 1
_INDEX = {"bool": (torch.bool,), "int32": (torch.int32,), "index": (torch.int32, torch.int64)}
_ALLOWED: dict[torch.dtype | None, dict[str, tuple[torch.dtype, ...]]] = {
    None: {"first": DTYPES, "same": DTYPES, "bias": DTYPES, **_INDEX}
}
"""By the dtype of the first argument (None before it), what each kind of argument may have."""
for _dtype in DTYPES:
    _bias = (_dtype,) if _dtype.itemsize >= 4 else (_dtype, torch.float32)
    _ALLOWED[_dtype] = {"first": DTYPES, "same": (_dtype,), "bias": _bias, **_INDEX}

Form = tuple[str, ...]


class Argument(NamedTuple):
    """A row of a family's table."""

    forms: tuple[Form, ...]  # shapes in size names; none at all: any shape
    kind: str  # "first": gives dtype and device; "same" as it; "bias": or float32; "bool", "int32", "index"
    optional: bool
    linear: bool  # is the transpose of what `nn.Linear` calls its weight
    hint: str
    empty: bool = False  # may have a width of 0
    offsets: str = ""  # what packed rows go with, for padded ones


Table = dict[str, Argument]


def argument(
    forms: str,
    kind: str = "same",
    *,
    optional: bool = False,
    linear: bool = False,
    hint: str = "",
    empty: bool = False,
    offsets: str = "",
) -> Argument:
    """``"B T D | N D"``: alternatives between bars, of size names between spaces; a name ``S+1`` is S + 1."""
    split = tuple(tuple(form.split()) for form in forms.split("|"))
    return Argument(split, kind, optional, linear, hint, empty, offsets)


def offsets_of(rows: str, *, optional: bool = True, hint: str = OFFSETS_HINT) -> Argument:
    """The row of offsets, int32, one more than there are `rows`."""
    return argument(f"{rows}+1", "int32", optional=optional, hint=hint)


def mask_of(forms: str, hint: str = TRUE_IS_VISIBLE) -> Argument:
    """The row of a mask."""
    return argument(forms, "bool", optional=True, hint=hint)


class Checker:
    """Checks a call's arguments, in order, by a table.

    Parameters
    ----------
    table
        The family's.
    prefix
        What stands before every name: ``"inner."``.

    Attributes
    ----------
    sizes, sources
        Sizes by name, and where each is from.

    """

    def __init__(self, table: Table, prefix: str = "") -> None:
        self.table, self.prefix = table, prefix
        self.sizes: dict[str, int] = {"1": 1}
        self.sources: dict[str, str] = {}
        self.dtypes: dict[str, tuple[torch.dtype, ...]] = _ALLOWED[None]
        self.device: torch.device | None = None
        self.like = ""  # whose dtype and device they are
        self.first: Tensor | None = None

    def bind(self, word: str, size: int, source: str) -> None:
        """Let `word` be `size`, which is from `source`."""
        self.sizes[word], self.sources[word] = size, source

    def bind_sequences(self, word: str, offsets: Tensor, source: str) -> None:
        """Let `word` be the number of sequences that `offsets` are of, before their values are checked."""
        if offsets.shape[0] == 0:
            raise ValueError(f"{source}: expected at least one offset, 0; got an empty tensor")
        self.bind(word, offsets.shape[0] - 1, source)

    def follow(self, like: str, dtype: torch.dtype, device: torch.device) -> None:
        """Let dtype and device of later arguments be these, which are those of `like`."""
        self.like, self.device = like, device
        self.dtypes = _ALLOWED[dtype]

    def __call__(self, name: str, x: Any, row: str = "") -> None:
        """Check one argument, by the row of the table that has its name, or `row`.

        Raises
        ------
        TypeError
            For what is no dense tensor, and for dtypes.
        ValueError
            For a shape or a device that does not fit.

        """
        forms, kind, optional, _, hint, empty, _ = arg = self.table[row or name]
        if x is None and optional:
            return
        if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_nested:
            _refuse(self.prefix + name, x, hint if kind in _INDEX else "")
        if x.dtype not in self.dtypes[kind]:
            self._refuse_dtype(name, x, arg)
        if kind == "first" and self.device is None:
            self.follow(self.prefix + name, x.dtype, x.device)
            self.first = x
        elif x.device != self.device and self.device is not None:
            raise ValueError(
                f"{self.prefix}{name}: expected device {self.device}; got {x.device}: "
                f"that of {self.like} is {self.device}"
            )
        shape, sizes = x.shape, self.sizes
        for form in forms:
            if len(form) != len(shape):
                continue
            for word, n in zip(form, shape, strict=True):
                if word in sizes and sizes[word] != n:
                    break
            else:
                for word, n in zip(form, shape, strict=True):
                    if word not in sizes:
                        if n == 0 and word in _WIDTHS and not empty:
                            raise ValueError(
                                f"{self.prefix}{name}: expected at least one {_THINGS.get(word, 'feature')}, "
                                f"{word} >= 1; got shape {tuple(shape)}"
                            )
                        sizes[word] = n
                        self.sources[word] = self.prefix + name
                return
        if forms:
            raise ValueError(self.prefix + self._shape_error(name, x, arg))

    def _refuse_dtype(self, name: str, x: Tensor, arg: Argument) -> NoReturn:
        of, hint = "", f"; {arg.hint}" if arg.hint and arg.kind in _INDEX else ""
        if arg.kind in ("first", "same") and self.like == PARAMETERS:
            of = f", that of {PARAMETERS}"
            if x.dtype in DTYPES:
                hint = f": use module.to({x.dtype}) or torch.autocast"
        elif arg.kind == "same" and self.like and x.dtype in DTYPES:
            hint = f": that of {self.like} is {_names(self.dtypes['same'])}{hint}"
        elif arg.kind == "bool" and x.is_floating_point():
            more = "score_bias" in self.table
            hint += f": pass {name}.bool() of 0 and 1; what is added to the scores is no mask"
            hint += ": pass it as score_bias=" if more else ""
        elif arg.kind == "bool":
            hint += f": pass {name}.bool()"
        elif arg.kind == "int32" and x.dtype == torch.int64:
            hint += f"; int64 offsets: pass {name}.int()"
        elif x.is_quantized:
            hint = f": pass {name}.dequantize()"
        raise TypeError(
            f"{self.prefix}{name}: expected dtype {_names(self.dtypes[arg.kind])}{of}; got {_names([x.dtype])}{hint}"
        )

    def _shape_error(self, name: str, x: Tensor, arg: Argument) -> str:
        words = " or ".join(_in_words(form) for form in arg.forms)
        known = dict.fromkeys(w for form in arg.forms for w in form if w in self.sizes and w != "1")
        having = ", ".join(f"{_spaced(w)} = {self.sizes[w]} from {self.sources[w]}" for w in known)
        of_rank = [form for form in arg.forms if len(form) == x.dim()]
        wrong = ""
        if len(of_rank) == 1:
            pairs = zip(of_rank[0], x.shape, strict=True)
            wrong = ": " + ", ".join(f"{_spaced(w)} is {n}" for w, n in pairs if w in known and self.sizes[w] != n)
        cause = self._cause(name, x, arg) or (arg.hint if not of_rank or arg.kind != "first" else "")
        if not cause and not of_rank and arg.offsets:
            cause = f"packed rows go with {arg.offsets}"
        return (
            f"{name}: expected shape {words}{having and ' with ' + having}; got {tuple(x.shape)}{wrong}"
            f"{cause and '; ' + cause}"
        )

    def _fits(self, shape: Sequence[int], arg: Argument) -> bool:
        return any(
            len(form) == len(shape) and all(self.sizes.get(w, n) == n for w, n in zip(form, shape, strict=True))
            for form in arg.forms
        )

    def _cause(self, name: str, x: Tensor, arg: Argument) -> str:
        """The likely reason of a wrong shape, or nothing."""
        shape = tuple(x.shape)
        swapped = (*shape[:-2], *shape[:-3:-1])
        if arg.linear and len(shape) == 2 and self._fits(swapped, arg):
            return f"looks like `nn.Linear.weight`: pass `{name}.t()`"
        if arg.kind in ("first", "same") and len(shape) == 3 and self._fits(swapped, arg):
            width = next(form for form in arg.forms if len(form) == 3)[-1]
            if width in self.sizes and swapped[-1] == self.sizes[width]:
                return f"looks like channels first: pass {name}.transpose(1, 2)"
        first = self.first  # of which a later argument may show that its channels are first
        if arg.linear and len(shape) == 2 and first is not None and first.dim() == 3:
            of_rows = self.sizes.get(arg.forms[-1][0]) == first.shape[2]
            if of_rows and shape[0] == first.shape[1]:
                return f"looks as if {self.like} had channels first: pass {self.like}.transpose(1, 2)"
        ones = [axis for axis, n in enumerate(shape) if n == 1]
        for count in range(1, len(ones) + 1):
            for axes in itertools.combinations(ones, count):
                if self._fits([n for axis, n in enumerate(shape) if axis not in axes], arg):
                    which = str(axes[0]) if count == 1 else str(axes)
                    layer = "looks like the weight of a layer with one output: " if arg.linear else ""
                    return f"{layer}pass {name}.squeeze({which})"
        if arg.kind == "bool" and "B" in self.sizes:
            alike = [form[1:] for form in arg.forms if form[0] == "B"]
            if self._fits(shape, arg._replace(forms=tuple(alike))):
                batch = self.sizes["B"]
                return f"{arg.hint}; one for the whole batch: pass {name}.expand({batch}, *{name}.shape)"
        return ""


_THINGS = {"R": "hop", "C": "channel", "P": "channel"}
PARAMETERS = "the module's parameters"
CONSTRUCTOR = "the constructor"


def module_checker(table: Table, parameter: Any, **sizes: int | None) -> Checker:
    """The checker of a module's inputs: sizes are the constructor's, dtype and device those of a parameter.

    A layer that somebody put in the place of a `nn.Linear` may have neither: then nothing is asked.
    """
    check = Checker(table)
    for word, size in sizes.items():
        if size is not None:
            check.bind(word, size, CONSTRUCTOR)
    if isinstance(parameter, Tensor) and parameter.dtype in DTYPES:
        dtype, device = parameter.dtype, parameter.device
        check.follow(PARAMETERS, dtype, device)
        if dtype != torch.float64 and device.type != "meta" and torch.is_autocast_enabled(device.type):
            check.dtypes = {**check.dtypes, "same": DTYPES[:3]}
    return check


def width_of(layer: Any) -> int | None:
    """The width of a layer's input, None where it does not tell."""
    return getattr(layer, "in_features", None)


def weight_of(layer: Any) -> Tensor | None:
    """The weight of a layer, None where it has none of that name."""
    return getattr(layer, "weight", None)


def _spaced(word: str) -> str:
    return word.replace("+", " + ")


def _in_words(form: Form) -> str:
    return f"({_spaced(form[0])},)" if len(form) == 1 else f"({', '.join(map(_spaced, form))})"


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _refuse(name: str, x: Any, hint: str = "") -> NoReturn:
    """TypeError for what is no dense tensor."""
    if not isinstance(x, Tensor):
        hint = f"; {hint}" if hint else ""
        raise TypeError(f"{name}: expected a torch.Tensor; got {type(x).__name__}{hint}")
    if x.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor, padded or packed; got a nested one: pass its rows, {name}.values()"
        )
    raise TypeError(f"{name}: expected a dense tensor; got layout {x.layout}: pass {name}.to_dense()")


def show(value: Any) -> str:
    """A value for a message, never long."""
    try:
        text = repr(value)
    except Exception:  # an int of more digits than Python prints, say
        return f"a value too long to print, of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_tensor(
    name: str,
    x: Tensor,
    *,
    shapes: Sequence[tuple[str, Sequence[int | None]]],
    dtypes: Sequence[torch.dtype] = DTYPES,
    device: torch.device | None = None,
    hint: str = "",
) -> None:
    """Check one tensor that is in no table.

    Parameters
    ----------
    name, x
        The argument. Anything but a dense tensor is a TypeError.
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
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_nested:
        _refuse(name, x, hint)
    hint = f"; {hint}" if hint else ""
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


# --- Options -----------------------------------------------------------------------------------------------------


def check_activation(name: str, value: str) -> None:
    """Raise unless `value` names an activation: TypeError for what is no string, ValueError for another."""
    _check_name(name, value, ACTIVATIONS)


def check_score_activation(name: str, value: str) -> None:
    """Raise unless `value` names what a softmax may be of."""
    _check_name(name, value, SCORE_ACTIVATIONS)


def _check_name(name: str, value: str, names: Iterable[str]) -> None:
    """TypeError for what is no string, ValueError for one that is not among `names`."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(names)}; got {show(value)}")
    if value not in names:
        raise ValueError(f"{name}: expected one of {', '.join(names)}; got {show(value)}")


def check_number(name: str, value: Any, expected: str, low: float, high: float) -> float:
    """`value` as a float, where low <= value < high; bool is no number, NumPy's scalars are.

    Raises
    ------
    TypeError, ValueError
        For what is no real number; for one that is not as `expected`.

    """
    # The two that come are asked for first: an abstract class is slow, and the compiler does not know it.
    plain = isinstance(value, (float, int))
    if isinstance(value, bool) or not (plain or isinstance(value, (torch.SymFloat, torch.SymInt, numbers.Real))):
        raise TypeError(f"{name}: expected a float; got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected {expected}; got {show(value)}") from None
    if not low <= number < high:
        raise ValueError(f"{name}: expected {expected}; got {show(value)}")
    return number


def check_scale(value: Any, dtype: torch.dtype) -> float:
    """The factor on scores as a float, which what they are made in holds: float32, or float64 for float64."""
    most = torch.finfo(torch.promote_types(dtype, torch.float32)).max
    return check_number("scale", value, f"a finite number, of at most {most:.3g}", -most, most)


def check_dropout(name: str, value: float) -> float:
    """The probability as a float; ValueError unless 0 <= value < 1, and TypeError for what is no number."""
    return check_number(name, value, f"0 <= {name} < 1", 0.0, 1.0)


def check_flag(name: str, value: Any) -> bool:
    """`value` as a bool; TypeError for what is none."""
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"{name}: expected True or False; got {show(value)}")


def check_count(name: str, value: Any, least: int = 0) -> int:
    """`value` as an int from `least` on, that int32 holds; TypeError for what is none, ValueError for another."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise TypeError(f"{name}: expected an int; got {type(value).__name__}")
    count: int = value if isinstance(value, (int, torch.SymInt)) else int(value)  # type: ignore[assignment]
    if count < least:
        raise ValueError(f"{name}: expected at least {least}; got {show(value)}")
    if count >= 2**31:
        raise ValueError(f"{name}: expected less than 2**31; got {show(value)}")
    return count


def check_window(window: Sequence[int | None] | None) -> tuple[int | None, int | None]:
    """The window's sides, both open where there is none; TypeError for what is no pair of int or None."""
    if window is None:
        return None, None
    good = isinstance(window, (tuple, list)) and len(window) == 2
    if not good or any(n is not None and (isinstance(n, bool) or not _integral(n)) for n in window):
        raise TypeError(f"window: expected a pair (left, right) of int or None; got {show(window)}")
    # Past any length is open: the kernels add a side to a position, in int32.
    left, right = (None if side is None or side >= 2**30 else max(_as_int(side), -(2**30)) for side in window)
    return left, right


def _integral(value: Any) -> bool:
    return isinstance(value, (int, numbers.Integral))


def _as_int(value: Any) -> int:
    return value if isinstance(value, int) else int(value)


# --- Values that tensors hold ------------------------------------------------------------------------------------


def check_cu_seqlens(name: str, cu: Tensor, rows: int, device: torch.device) -> None:
    """Check offsets of a ragged batch: int32 ``(S + 1,)``, ``0 = cu[0] <= cu[1] <= ... <= cu[S] = rows``.

    Raises
    ------
    TypeError, ValueError
        For dtype, shape and device; for the values too where they can be read without waiting for a device.
        On a GPU, and in a compiled graph, wrong values stop the program with an assertion, as an index out of
        range does in `torch.nn.Embedding`.

    """
    check_form_of_offsets(name, cu, device)
    check_offsets(name, cu, rows, "packed rows")


def check_form_of_offsets(name: str, cu: Tensor, device: torch.device | None = None) -> None:
    """Check all of offsets but their values."""
    of_64 = f"; int64 offsets: pass {name}.int()" if isinstance(cu, Tensor) and cu.dtype == torch.int64 else ""
    hint = OFFSETS_HINT + of_64
    check_tensor(name, cu, shapes=[("(S + 1,)", (None,))], dtypes=[torch.int32], device=device, hint=hint)
    check_any_offsets(name, cu)


def check_any_offsets(name: str, x: Tensor) -> None:
    """ValueError for no offset at all."""
    if x.numel() == 0:
        raise ValueError(f"{name}: expected at least one offset, 0; got an empty tensor")


def know(x: Tensor, what: str, count: int) -> Tensor:
    """Keep with a tensor that its values were checked, as "offsets" into so many rows, or as "indices" under it."""
    x._fused_attn_known = (what, count, x._version)  # type: ignore[attr-defined]
    return x


def _known(x: Tensor, what: str, count: int) -> bool:
    known = None if torch.compiler.is_compiling() else getattr(x, "_fused_attn_known", None)
    return known is not None and known == (what, count, x._version)


def check_offsets(name: str, x: Tensor, rows: int, of: str) -> None:
    """Check the values of offsets into `rows` rows: ``0 = x[0] <= x[1] <= ... <= x[-1] = rows``.

    Raises
    ------
    ValueError
        For no offset at all; for the values as `check_cu_seqlens` does.

    """
    check_any_offsets(name, x)
    if _known(x, "offsets", rows):
        return
    good = (x[0] == 0) & (x[-1] == rows) & (x[1:] >= x[:-1]).all()
    check_values(name, x, good, f"non-decreasing offsets from 0 to the number of {of}", rows, of)


def check_indices(name: str, x: Tensor, count: int, of: str) -> None:
    """Check that each number is one of ``0 .. count - 1``; a ValueError as `check_cu_seqlens` raises it."""
    if _known(x, "indices", count):
        return
    good = ((x >= 0) & (x < count)).all()
    check_values(name, x, good, f"non-negative indices under the number of {of}", count)


def _assert_each(good: Tensor, text: str) -> None:
    torch._assert_async(every_sample(good).all(), text)


def _leave_to_functorch() -> None:
    """So that a compiled `vmap`, which has no rule for an assertion, makes it of all samples."""
    torch._dynamo.allow_in_graph(_assert_each)


_leave_to_functorch._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as `_operators._leave_to_autograd`


def check_values(
    name: str, x: Tensor, good: Tensor, expected: str, count: int | None = None, offsets_into: str = ""
) -> None:
    """Check that what `x` holds is `good`, a bool; a ValueError as `check_cu_seqlens` raises it.

    offsets_into: what `x` are offsets into, if they are; of these there are `count`, or nobody knows how many.
    """
    _check_values(name, x, good, expected, count, offsets_into)


def _check_values(name: str, x: Tensor, good: Tensor, expected: str, count: int | None, offsets_into: str) -> None:
    x, good = every_sample(x), every_sample(good)
    if not _holds(good, f"{name}: expected {expected}"):
        came = x.tolist() if x.numel() < 100 else x  # PyTorch shows the ends of a long one
        cause = _cause_of_offsets(name, x, count, offsets_into) if offsets_into else ""
        raise ValueError(f"{name}: expected {expected}{'' if count is None else f', {count}'}; got {came}{cause}")


def _holds(good: Tensor, text: str) -> bool:
    """Whether it is all True, where that can be read without waiting for a device; else it is asserted there."""
    compiling = torch.compiler.is_compiling()
    fake = type(good).__torch_dispatch__ is not Tensor.__torch_dispatch__  # holds no numbers
    if compiling:
        _leave_to_functorch()
    if compiling or good.device.type != "cpu" or fake:
        _assert_each(good, text)
        return True
    return bool(good.all())


def check_pair_count(name: str, came: int, count: Tensor) -> None:
    """Check that a number a pair of packed rows is for as many pairs as there are; as `check_cu_seqlens` raises."""
    count = every_sample(count)
    if not _holds(count == came, f"{name}: expected a number for each pair of a query and a key of its sequence"):
        raise ValueError(
            f"{name}: expected P = {count.tolist()} pairs, each query's with the keys of its sequence; got {came}"
        )


def _cause_of_offsets(name: str, x: Tensor, rows: int | None, of: str) -> str:
    """The likely reason of wrong offsets into so many rows, None where nobody knows how many; or nothing."""
    if x.dim() != 1:  # of every sample of a `vmap`
        return ""
    numbers = x.tolist()
    first, last, total, steps = numbers[0], numbers[-1], sum(numbers), x.diff().tolist()
    falls = [i + 1 for i, step in enumerate(steps) if step < 0]
    make = "their sums, F.pad(x.cumsum(0), (1, 0))," if of == "edges" else "Segments.from_lengths(...)"
    lengths = f"; looks like lengths: pass {make} of them"
    if min(numbers) >= 0 and total == rows:
        return lengths
    if falls and min(numbers) >= 0 and first > 0:
        return lengths if rows is None else f"{lengths}, here of {total} {of}"
    if falls:
        i = falls[0]
        return f"; {name}[{i}] = {numbers[i]} is less than {name}[{i - 1}] = {numbers[i - 1]}"
    if first != 0 and rows is None:
        return f"{lengths}, or as if the leading 0 is missing"
    if first != 0 and last == rows:
        return "; looks as if the leading 0 is missing"
    if first != 0:
        return f"; looks as if they count from {first}: pass {name} - {first}" if last - first == rows else ""
    if len(numbers) == rows and 0 in steps and last < rows:
        return f"; looks like the sequence of each row: pass {make} of torch.bincount(...) of them"
    if of != "edges" and steps and steps[0] == 0 and steps[-1] == rows and steps == sorted(steps):
        return "; looks as if lengths were expected and offsets came: pass Segments.from_offsets(...) of these"
    if rows is not None and last < rows:
        return f"; they end at {last}, and the last is to be {rows}: {of} of padding are left out"
    return f"; they are offsets into {last} {of}"


# --- Queries and keys ----------------------------------------------------------------------------------------------


def refuse_packed(rows: str, **given: Any) -> None:
    """Raise for what is `given` and goes with padded rows only, where those of this name are packed."""
    for name, x in given.items():
        if x is True:
            raise ValueError(f"{name}: expected False with a packed {rows}, pad the batch to see them; got True")
        if x is not None and x is not False:
            raise ValueError(f"{name}: expected None with a packed {rows}; got {_a_tensor(x)}")


def _a_tensor(x: Any) -> str:
    return "a tensor" if isinstance(x, Tensor) else show(x)


def check_both(check: Checker, names: tuple[str, str], both: tuple[Tensor, Tensor], rows: tuple[int, int]) -> None:
    """Check the offsets of two packed sides: each by itself, then that they are of as many sequences."""
    check(names[0], both[0])
    check_offsets(names[0], both[0], rows[0], "packed rows")
    check(names[1], both[1], "offsets")
    check_offsets(names[1], both[1], rows[1], "packed rows")
    check(names[1], both[1])


def check_one_side(check: Checker, name: str, offsets: Tensor, rows: int) -> None:
    """Check the offsets of packed rows whose other side is padded: they are of as many sequences, B."""
    check(name, offsets, "offsets")
    check_offsets(name, offsets, rows, "packed rows")
    check.bind("B+1", check.sizes["B"] + 1, check.sources["B"])
    check(name, offsets)


def check_mask(check: Checker, mask: Tensor | None, full: tuple[int, int, int, int]) -> None:
    """Check that a mask is of the keys, or broadcasts to the pairs, whose shape (B, H, Tq, Tk) is `full`."""
    if mask is None:
        return
    batch, heads, queries, keys = full
    *shape, last = tuple(mask.shape) or (-1,)
    fits = last == keys and (
        (len(shape) == 1 and shape[0] in (1, batch))
        or (len(shape) == 2 and shape[0] in (1, batch) and shape[1] in (1, queries))
        or (len(shape) == 3 and shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2] in (1, queries))
    )
    if not fits:
        # Not taken: where B = Tq it would be one of keys, and nobody would notice.
        hint = ", pass (Tq, Tk) as mask[None]" if (*shape, last) == (queries, keys) else ""
        raise ValueError(
            "mask: expected shape (B, Tk), (B, Tq, Tk) or (B, H, Tq, Tk), 1 for any but Tk, with "
            f"{_having(check)}; got {tuple(mask.shape)}{hint}; {TRUE_IS_VISIBLE}"
        )


def _having(check: Checker) -> str:
    """The sizes of the pairs, and where each is from."""
    words = [word for word in ("B", "H", "Tq", "Tk") if word in check.sizes]
    return ", ".join(f"{word} = {check.sizes[word]} from {check.sources[word]}" for word in words)


def check_score_bias(check: Checker, score_bias: Tensor | None, full: Sequence[int]) -> None:
    """Check that a bias has the axes of the scores, whose shape is `full`, each as long or 1; or one axis, of keys.

    Of two or three axes fewer the first would be heads or queries to PyTorch's broadcasting, and the batch to a mask:
    where both are as long nobody would notice. So it has to be 1, of any sizes: a call is not refused for its batch.
    """
    if score_bias is None:
        return
    check("score_bias", score_bias)
    shape, names = tuple(score_bias.shape), ("B", "H", "Tq", "Tk") if len(full) == 4 else ("B", "Tq", "Tk")
    if _broadcasts(shape, full) and (len(shape) in (0, 1, len(full)) or shape[0] == 1):
        return
    missing = len(full) - len(shape)
    readings = []
    if missing > 0 and len(shape) > 1:
        nones = ", ".join(["None"] * missing)
        for index, first in ((nones, names[missing]), (f":, {nones}", "B")):
            words = (first, *names[missing + 1 :])
            if _broadcasts(shape, (full[names.index(first)], *full[missing + 1 :])):
                readings.append(f"score_bias[{index}] of {_in_words(words)}")
    raise ValueError(
        f"score_bias: expected shape {_in_words(names)}, 1 for any, or (Tk,), with {_having(check)}; got {shape}"
        f"{'; pass ' if readings else ''}{', '.join(readings)}"
    )


def _broadcasts(shape: Sequence[int], full: Sequence[int]) -> bool:
    return len(shape) <= len(full) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(full), strict=False))
