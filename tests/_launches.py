"""What calls of many kinds launch, by Triton and from records, up to the driver's call: see test_replay.py.

    python -m tests._launches

Prints, as JSON, by name: whether what was launched is what Triton launches, whether it was launched without Triton,
and for what may stand in the way of that, whether Triton launched.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from bench import host  # before the kernels, which are then not the interpreter's

# isort: split

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from fused_attn import concat_attention, location_attention
from fused_attn.kernels import chip, location, replay

BF16 = torch.bfloat16
B, T, D, A = 2, 48, 32, 16


def given(dtype: torch.dtype = BF16, rows: int = T, width: int = A, batch: int = B, **changed: Any) -> dict[str, Any]:
    """Arguments of location attention."""
    torch.manual_seed(0)
    made = {
        "h": torch.randn(batch, rows, D).to(dtype), "w": torch.randn(D, width).to(dtype),
        "b": torch.randn(width).to(dtype), "v": torch.randn(width).to(dtype), "mask": torch.rand(batch, rows) > 0.1,
    }  # fmt: skip
    return {**made, **changed}


def off_by_one(x: Tensor) -> Tensor:
    """Of the same layout, one element past a multiple of 16."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    assert room.data_ptr() % 16
    return room.copy_(x)


def spread(x: Tensor, stride: int) -> Tensor:
    """Its first axis so far apart."""
    return torch.empty_strided(x.shape, (stride, *x.stride()[1:]), dtype=x.dtype)


PLAIN = given()
GATE = torch.randn(D, A).to(BF16).requires_grad_()
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "float16": given(torch.float16),
    "float32": given(torch.float32),
    "no mask": {**PLAIN, "mask": None},
    "one mask for all": {**PLAIN, "mask": PLAIN["mask"][:1].expand(B, T)},
    "rows that begin elsewhere": {**PLAIN, "h": off_by_one(PLAIN["h"])},
    "a bias that begins elsewhere": {**PLAIN, "b": off_by_one(PLAIN["b"])},
    "one row": given(rows=1),
    "an odd number of rows": given(rows=47),
    "as many rows as no block has": given(rows=300),
    "one sequence": given(batch=1),
    "one feature": given(width=1),
    "an odd number of features": given(width=13),
    "sequences apart": {**PLAIN, "h": spread(PLAIN["h"], T * D + 16)},
    "sequences at odd places": {**PLAIN, "h": spread(PLAIN["h"], T * D + 1)},
    "sequences past int32": {**PLAIN, "h": spread(PLAIN["h"], 2**31)},
    "keys twice": {**PLAIN, "value": PLAIN["h"]},
    "values like the keys": {**PLAIN, "value": PLAIN["h"].clone()},
    "relu": {**PLAIN, "activation": "relu"},
    "gated": {**PLAIN, "gate": (PLAIN["w"] + 1, PLAIN["b"] + 1)},
    "dropout": {**PLAIN, "dropout_p": 0.5},
    "less dropout": {**PLAIN, "dropout_p": 0.25},
    "packed": {**PLAIN, "h": PLAIN["h"][0], "mask": None, "cu_seqlens": torch.tensor([0, 20, T], dtype=torch.int32)},
}


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """As who sets it for float32 products."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def step(options: dict[str, Any], of: tuple[str, ...] = ("h", "w", "b", "v")) -> None:
    """A call and its backward."""
    call = dict(options)
    leaves = {name: call[name].detach().requires_grad_() for name in of}
    if call.get("value") is call["h"] and "h" in of:
        call["value"] = leaves["h"]
    out = location_attention(**{**call, **leaves}, impl="triton")
    live = [x for x in (*leaves.values(), *call.get("gate", ())) if x.requires_grad]
    torch.autograd.grad(out, live, torch.ones_like(out))


def pairs() -> None:
    """Another operator, of which a tensor is two arguments."""
    x, v = PLAIN["h"], PLAIN["h"][0, 0]
    concat_attention(x, x, x, v=v, impl="triton")


def inside(context: Callable[[], Any], run: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        with context():
            run()

    return call


STEPS: dict[str, Callable[[], None]] = {
    **{name: lambda options=options: step(options) for name, options in OPTIONS.items()},
    "gradients of the gate": lambda: step({**PLAIN, "gate": (GATE, PLAIN["b"] + 1)}, ("h", "w")),
    "gradients of the rows alone": lambda: step(PLAIN, ("h",)),
    "TF32": inside(tf32, lambda: step(OPTIONS["float32"])),
    "another chip": inside(lambda: chip.assume(chip.A10), lambda: step(PLAIN)),
    "concat": pairs,
}

launched: list[Any] = []
by_triton: list[str] = []
INPUTS = {x.data_ptr(): name for options in OPTIONS.values() for name, x in options.items() if isinstance(x, Tensor)}


def note(
    self: Any, X: int, Y: int, Z: int, stream: int, function: Any, cooperative: Any, pdl: Any, scratch: Any,
    profile: Any, metadata: Any, launch_metadata: Any, enter: Any, leave: Any, *values: Any,
) -> None:  # fmt: skip
    """In the place of the driver's call: the kernel and what it is given, tensors by where they begin."""
    starts: dict[int, str] = {}

    def told(x: Any) -> str:
        if not isinstance(x, Tensor):
            return f"{type(x).__name__} {x}"
        at = x.data_ptr()
        return INPUTS.get(at) or starts.setdefault(at, f"made {len(starts)}")

    flat = [x for value in values for x in (value if isinstance(value, tuple) else (value,))]
    launched.append((id(self), X, Y, Z, stream, *map(told, flat)))


def launches(run: Callable[[], None]) -> tuple[list[Any], bool]:
    """What a step launches, and whether Triton launched any of it."""
    launched.clear()
    by_triton.clear()
    run()
    return list(launched), bool(by_triton)


@contextlib.contextmanager
def hook(name: str) -> Iterator[None]:
    """Somebody listens to launches."""
    chain = getattr(triton.knobs.runtime, name)
    chain.add(print_nothing)
    try:
        yield
    finally:
        chain.remove(print_nothing)


def print_nothing(*args: Any, **kwargs: Any) -> None:
    """A hook."""


@contextlib.contextmanager
def before_runs() -> Iterator[None]:
    """A kernel has a hook of its own."""
    kernel = location._location_fwd_kernel
    kernel.add_pre_run_hook(print_nothing)
    try:
        yield
    finally:
        kernel.pre_run_hooks.clear()


def knob(of: Any, name: str, value: Any) -> Callable[[], Any]:
    return lambda: patch.object(of, name, value)


def another_run(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
    """In the place of Triton's, as this package's own tools do it."""
    return replay._RUN(self, *args, **kwargs)


IN_THE_WAY: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "a hook before launches": lambda: hook("launch_enter_hook"),
    "a hook after launches": lambda: hook("launch_exit_hook"),
    "a hook of a kernel": before_runs,
    "a function as hook": knob(triton.knobs.runtime, "launch_enter_hook", print_nothing),
    "debug": knob(triton.knobs.runtime, "debug", True),
    "instrumentation": knob(triton.knobs.compilation, "instrumentation_mode", "consan"),
    "another run": knob(JITFunction, "run", another_run),
    "an unknown version": knob(replay, "_KNOWN", False),
    "a dispatch mode": host._Operators,
}


def main() -> None:
    """Print what was found."""
    found: dict[str, Any] = {"same": {}, "records": {}, "triton": {}}
    with (
        host.no_driver("sm_90"),
        patch.object(host._Launched, "launch", note),
        patch.object(host._Launched, "launch_metadata", lambda self, *args: by_triton.append(self.name)),
    ):
        with patch.object(replay, "call", lambda launcher, args: launcher(*args)):
            wanted = {name: launches(run)[0] for name, run in STEPS.items()}
        found["kinds"] = len({str(x) for x in wanted.values()}), len(STEPS)
        for _ in range(replay.SEEN + 2):
            for name, run in STEPS.items():
                got, triton_did = launches(run)
                found["same"][name] = found["same"].get(name, True) and got == wanted[name]
                found["records"][name] = not triton_did
        for name, context in IN_THE_WAY.items():
            for _ in range(replay.SEEN + 2):
                got, found["triton"][name] = launches(inside(context, STEPS["plain"]))
                found["same"][name] = found["same"].get(name, True) and len(got) == len(wanted["plain"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
