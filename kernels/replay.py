"""A launcher's work on the host, done again without being thought out again.

What a launcher does follows from shapes, strides, dtypes and options, never from numbers: which memory it makes, and
which operators and kernels it starts with what. So a kind of call that comes again is written down, and later ones
run what is written, a function in straight code:

    def replay(device, stream, t0, t1):
        t2 = torch.empty_strided(c2, c3, dtype=c4, device=device)
        c5(264, 1, 1, stream, c6, False, False, None, None, c7, None, None, None, (t0, 131072, 64, c8, ), t2, c9)
        return (t2, )

A kind is all that the launcher, and Triton where it specialises a kernel, may look at: see `call`. c5 launches what
Triton has compiled for this kind, without asking Triton which that is. So it is with versions of Triton whose launch
is known, on NVIDIA's chips, while nobody listens to launches; else what is written is ``kernel[grid](...)``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .chip import INTERPRET, assumed

ON = os.environ.get("FUSED_ATTN_REPLAY", "1") != "0"
"""Whether anything is written down."""
SEEN = 3
"""So many calls of a kind are made before one is written down, which takes as long as five."""
MOST = 512
"""Kinds that are remembered; then all are forgotten. A length that never comes again is a kind too."""

_RUN = JITFunction.run
_KNOWN = triton.__version__.startswith("3.6.") and torch.version.hip is None and not INTERPRET
_TENSORS = (Tensor, torch.nn.Parameter)
_OPTIONS = (bool, int, str, float, type(None))
_ROOM = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView).add(
    torch._C.DispatchKey.AutogradFunctionality
)


class Record(NamedTuple):
    """Of a kind of call."""

    run: Callable[..., Any] | None  # None: not to be had, the launcher is called each time
    hooks: list[list[Any]]  # of the kernels that are launched without Triton: what it would call before


_records: dict[Any, Record | int] = {}  # before there is one: how often the kind was seen
writing: ContextVar[Tape | None] = ContextVar("writing", default=None)
"""What writes down the call that is being made, if anything does."""


def call(launcher: Callable[..., Any], args: Sequence[Any]) -> Any:
    """``launcher(*args)``, from a record where there is one.

    args: tensors of one device, options, and tuples and lists of these. Triton specialises on a pointer's dtype and
    whether it is a multiple of 16, and on integers, which a launcher makes of shapes and strides; memory that PyTorch
    makes begins at a multiple of 16.
    """
    watched = JITFunction.run is not _RUN or torch._C._len_torch_dispatch_stack()  # launches, or operators
    if watched or not ON:
        return launcher(*args)
    direct, tensors = _direct(), []
    kind = [launcher, direct, assumed.get(), torch.backends.cuda.matmul.fp32_precision]
    for arg in args:
        for x in arg if isinstance(arg, (tuple, list)) else (arg,):
            if type(x) in _TENSORS:
                tensors.append(x)
                kind += x.dtype, x.shape, x.stride(), x.data_ptr() % 16
            elif type(x) in _OPTIONS:
                kind += type(x), repr(x) if type(x) is float else x  # 0.0 == -0.0
            else:
                return launcher(*args)
    device = tensors[0].get_device()
    if (device >= 0 and device != torch.cuda.current_device()) or torch._C._are_functorch_transforms_active():
        return launcher(*args)
    key = (device, *kind)
    record = _records.get(key, 0)
    if isinstance(record, int):
        if record == SEEN:
            _records[key], result = Tape(direct).record(launcher, args)
            return result
        if len(_records) >= MOST:
            _records.clear()
        _records[key] = record + 1
        return launcher(*args)
    if record.run is None or any(record.hooks):
        return launcher(*args)
    stream = driver.active.get_current_stream(device) if direct else None
    return record.run(tensors[0].device, stream, *tensors)


def forget() -> None:
    """Forget all records, after a change of what a launcher chooses."""
    _records.clear()


def _direct() -> bool:
    """Whether Triton would do nothing for a launch but find what it has compiled."""
    if not _KNOWN:
        return False
    runtime = triton.knobs.runtime
    listening = getattr(runtime.launch_enter_hook, "calls", True) or getattr(runtime.launch_exit_hook, "calls", True)
    return not (listening or runtime.debug or triton.knobs.compilation.instrumentation_mode)


class _NotWritten(Exception):
    """Of what another call of the kind may have otherwise."""


class Tape(TorchDispatchMode):
    """Writes a call down while it is made: below autograd, where a tensor is one object from its making on.

    direct: launches go without Triton.
    """

    def __init__(self, direct: bool) -> None:
        super().__init__()
        self.direct, self.launching, self.whole = direct, False, True
        self.lines: list[tuple[str, str]] = []  # what only makes a view has its name, other lines none
        self.space: dict[str, Any] = {"torch": torch, "__name__": __name__}
        self.names: dict[int, str] = {}
        self.starts: dict[int, str] = {}  # a tensor that begins at the same place
        self.kept: list[Tensor] = []  # so that no id is another's later
        self.hooks: list[list[Any]] = []

    def record(self, launcher: Callable[..., Any], args: Sequence[Any]) -> tuple[Record, Any]:
        """Make a call; gives its record and its result."""

        def own(x: Any) -> Any:
            """The same, each tensor an object of its own: one that comes twice may be two in another call."""
            if isinstance(x, (tuple, list)):
                return type(x)(*map(own, x)) if hasattr(x, "_fields") else type(x)(map(own, x))
            if not isinstance(x, Tensor):
                return x
            x = x.detach()
            self._name(x)
            return x

        given = [own(x) for x in args]
        inputs = list(self.names.values())
        token = writing.set(self)
        try:
            with torch._C._ExcludeDispatchKeyGuard(_AUTOGRAD), self:
                result = launcher(*given)
            with self._noting():
                self._line(f"return {self._text(result)}")
        finally:
            writing.reset(token)
            self.kept.clear()  # not when the garbage is collected: `own` holds itself, and this
        if not self.whole:
            return Record(None, []), result
        source = "\n    ".join([f"def replay({', '.join(['device', 'stream', *inputs])}):", *self._needed(inputs)])
        exec(compile(source, f"<record of {launcher.__name__}>", "exec"), self.space)
        return Record(self.space["replay"], self.hooks), result

    def launch(self, kernel: Any, grid: tuple[int, ...], values: list[Any], options: dict[str, Any]) -> None:
        """Launch a kernel."""
        self.launching = True
        try:
            compiled = kernel[grid](*values, **options)
        finally:
            self.launching = False
        with self._noting():
            if not self.direct or hasattr(compiled, "result") or kernel.pre_run_hooks or self._scratch(compiled.run):
                text = [*map(self._text, values), *(f"{name}={self._text(x)}" for name, x in options.items())]
                self._line(f"{self._text(kernel)}[{self._text(grid)}]({', '.join(text)})")
                return
            self.hooks.append(kernel.pre_run_hooks)
            run = compiled.run
            flags = (
                run.launch_cooperative_grid,
                run.launch_pdl,
                None,
                None,
                compiled.packed_metadata,
                None,
                None,
                None,
            )
            ours = [*map(str, (*grid, 1, 1)[:3]), "stream", *map(self._text, (compiled.function, *flags))]
            pointers = [self._text(x, pointer=True) for x in values]
            self._line(f"{self._text(run.launch)}({', '.join([*ours, *pointers])})")

    @staticmethod
    def _scratch(run: Any) -> bool:
        """Whether a launch has memory of its own, which Triton's launcher makes."""
        return bool(run.global_scratch_size or run.profile_scratch_size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.launching:  # Triton's interpreter has operators of its own
            with self._noting():
                self._operator(func, args, kwargs or {}, result)
        return result

    def _operator(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        many = isinstance(result, (tuple, list))
        made = result if many else (result,)
        if not all(isinstance(x, Tensor) for x in made) or torch.Tag.dynamic_output_shape in func.tags:
            raise _NotWritten  # what follows from what a tensor holds
        if func is torch.ops.aten.detach.default:
            self._name(result, of=args[0])
            return
        view = func.is_view and not many and id(args[0]) in self.names
        if func.overloadpacket.__name__ in _ROOM:
            kwargs = {"dtype": result.dtype, "device": result.device}
            run, args = "torch.empty_strided", (tuple(result.shape), result.stride())
        else:
            run = self._text(func)
        text = [*map(self._text, args), *(f"{name}={self._text(x)}" for name, x in kwargs.items())]
        for x in made:
            self._name(x)
        if view and result.data_ptr() == args[0].data_ptr():
            self.starts[id(result)] = self.starts[id(args[0])]
        to = ", ".join(self.names[id(x)] for x in made) + ", " * many
        self._line(f"{to} = {run}({', '.join(text)})", only=to if view else "")

    def _name(self, x: Tensor, of: Tensor | None = None) -> None:
        self.kept.append(x)
        name = self.names.get(id(x)) or (f"t{len(self.names)}" if of is None else self.names[id(of)])
        self.names[id(x)] = name
        self.starts.setdefault(id(x), name if of is None else self.starts[id(of)])

    def _line(self, text: str, only: str = "") -> None:
        self.lines.append((only, text))

    def _needed(self, inputs: Iterable[str]) -> list[str]:
        """The lines, without views that only gave a launch a tensor that begins where another does.

        Nothing is kept for longer than it is used: a record takes no more memory than its launcher.
        """
        lines: list[str] = []
        used = set(inputs)
        for only, text in reversed(self.lines):
            if only and only not in used:
                continue
            names = set(re.findall(r"\bt\d+\b", text))
            last = ", ".join(sorted(names - used))
            lines += [f"del {last}", text] if last and lines else [text]
            used |= names
        return lines[::-1]

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except _NotWritten:
            self.whole = False

    def _text(self, x: Any, *, pointer: bool = False) -> str:
        """An expression for x; pointer: for a launch without Triton, to which a tensor is where it begins."""
        if x is None or type(x) in (bool, int):
            return repr(x)
        if isinstance(x, torch.device):
            return "device"  # a launcher makes all where its tensors are
        if isinstance(x, Tensor):
            if id(x) not in self.names:
                raise _NotWritten
            return (self.starts if pointer else self.names)[id(x)]
        if isinstance(x, (tuple, list)) and any(isinstance(y, (Tensor, tuple, list)) for y in x):
            text = "".join(f"{self._text(y, pointer=pointer)}, " for y in x)
            if isinstance(x, list):
                return f"[{text}]"
            return f"{self._text(type(x))}({text})" if hasattr(x, "_fields") and not pointer else f"({text})"
        name = f"c{len(self.space)}"
        self.space[name] = x
        return name
