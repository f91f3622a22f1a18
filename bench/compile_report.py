"""Compile every kernel in every configuration that the rules can choose, with no GPU, and report what came out.

    python -m bench.compile_report [--target sm_90 ...] [--family location ...] [--case TEXT] [--json FILE] [--jobs N]

The family's own launchers run on meta tensors, with a driver that only names a target: what is compiled is what
a launch on that chip would compile, block sizes and pointer alignment included. A kernel that fails to compile,
spills, or needs more shared memory than the chip has makes the exit code 1.

Columns: registers a thread, spilled bytes, shared memory of the chip's limit, and for the innermost loop with
the most arithmetic (the whole kernel where there is none, and on sm_100) instructions a thread, of which matrix,
special function (SFU) and FMA pipe. `an element`: instructions of that loop, over all threads, for one element of its
score tile. AMD: vector registers; no shared-memory column beyond the 64 KiB of a work group.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are imported: here they are compiled

import torch
import triton
from fused_attn.kernels import chip as chips
from fused_attn.kernels import (
    concat,
    concat_bwd,
    general,
    general_bwd,
    location,
    location_bwd,
    location_window,
    location_window_bwd,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS: dict[str, tuple[GPUTarget, chips.Chip]] = {
    "sm_80": (GPUTarget("cuda", 80, 32), chips.A100),
    "sm_90": (GPUTarget("cuda", 90, 32), chips.H200),
    "sm_100": (GPUTarget("cuda", 100, 32), chips.B200),
    "gfx942": (GPUTarget("hip", "gfx942", 64), chips.MI300X),
}


# ---------------------------------------------------------------------------------------------------------------
# What is compiled: a family's cases call its launchers on meta tensors
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocationCase:
    """One call of the location family, forward and backward, as its sizes and options."""

    dtype: torch.dtype
    B: int
    T: int
    D: int
    A: int | None = None  # None: the linear score
    R: int = 1
    gated: bool = False
    values: int | None = None  # their width; None: the keys
    context: str | None = None  # "row", "sequence"
    activation: str = "tanh"
    mask: bool = True
    ragged: bool = False
    dropout: float = 0.0
    tf32: bool = False  # torch.set_float32_matmul_precision("high")
    projected: bool = False  # no W: A = D

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), f"B{self.B} T{self.T} D{self.D}"]
        parts.append("linear" if self.A is None else f"A{self.A}")
        parts += [f"R{self.R}"] * (self.R > 1) + ["gated"] * self.gated
        parts += [f"Dv{self.values}"] * (self.values is not None)
        parts += [f"context/{self.context}"] * (self.context is not None)
        parts += [self.activation] * (self.activation != "tanh")
        parts += ["ragged"] * self.ragged + ["dropout"] * (self.dropout > 0) + ["tf32"] * self.tf32
        return " ".join([*parts, *["projected"] * self.projected])

    def launch(self) -> None:
        """Forward, and a backward for every gradient."""

        def t(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        rows = (self.B * self.T,) if self.ragged else (self.B, self.T)
        width = self.R if self.A is None else self.A
        gate = (t(self.D, width), t(width)) if self.gated else (None, None)
        contexts = {"row": (*rows, width), "sequence": (self.B, width)}
        tensors = (
            t(*rows, self.D),
            None if self.projected else t(self.D, width),
            t(width),
            None if self.A is None else t(self.A, self.R),
            *gate,
            None if self.context is None else t(*contexts[self.context]),
            None if self.values is None else t(*rows, self.values),
            t(*rows) if self.mask else None,
            t(*rows, dtype=torch.bool) if self.mask else None,
            t(self.B + 1, dtype=torch.int32) if self.ragged else None,
            t(1, dtype=torch.int64) if self.dropout else None,
        )
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        options = (self.activation, "sigmoid", self.dropout, self.context == "row")
        out, lse, scores = location.location_fwd(*tensors, *options)
        needs = [x is not None for x in tensors[:9]]
        location_bwd.location_bwd(out, lse, scores, *tensors, out, lse, scores, *options, needs)


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LOCATION = [
    # gated MIL: one long bag, batches, ragged
    LocationCase(BF16, 1, 100_000, 512, 128, gated=True, mask=False),
    LocationCase(BF16, 64, 1024, 512, 128, gated=True),
    LocationCase(BF16, 64, 1024, 1024, 256, gated=True, ragged=True, mask=False),
    LocationCase(F32, 64, 1024, 512, 128, gated=True),
    LocationCase(F32, 64, 1024, 512, 128, gated=True, tf32=True),
    # HAN: short sentences, a context
    LocationCase(F16, 2048, 32, 256, 128),
    LocationCase(BF16, 256, 64, 100, 100, context="row", ragged=True, mask=False, activation="relu"),
    LocationCase(F32, 256, 50, 100, 100, context="sequence"),
    # hops
    LocationCase(BF16, 64, 512, 600, 350, R=30),
    LocationCase(F32, 64, 512, 600, 350, R=30),
    LocationCase(BF16, 64, 512, 64, R=4, activation="identity"),
    # linear
    LocationCase(BF16, 256, 1024, 512),
    LocationCase(F32, 256, 1024, 512),
    # values apart, dropout, the widest and the narrowest
    LocationCase(BF16, 64, 512, 256, 64, values=128, dropout=0.1),
    LocationCase(BF16, 8, 4096, 2048, 1024, context="row", activation="gelu"),
    LocationCase(F32, 8, 4096, 2048, 1024, R=128),
    LocationCase(BF16, 4, 16, 1, 1),
    # one query a sequence of the concat family
    LocationCase(BF16, 32, 512, 256, 256, values=512, context="sequence", projected=True),
    LocationCase(F32, 80, 50, 1000, 1000, values=1000, context="sequence", dropout=0.1, projected=True),
]  # fmt: skip


@dataclass(frozen=True)
class WindowCase:
    """The windowed form of the location family, from its scores on, forward and backward."""

    dtype: torch.dtype
    B: int
    T: int
    DV: int
    window: tuple[int | None, int | None]
    R: int = 1
    ragged: bool = False
    dropout: float = 0.0
    tf32: bool = False  # torch.set_float32_matmul_precision("high")

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), f"B{self.B} T{self.T} Dv{self.DV} window{self.window}"]
        parts += [f"R{self.R}"] * (self.R > 1) + ["ragged"] * self.ragged + ["dropout"] * (self.dropout > 0)
        return " ".join([*parts, *["tf32"] * self.tf32])

    def launch(self) -> None:
        """Forward, and a backward for every gradient."""
        rows = (self.B * self.T,) if self.ragged else (self.B, self.T)
        scores = torch.empty(*rows, self.R, device="meta")
        values = torch.empty(*rows, self.DV, dtype=self.dtype, device="meta")
        offsets = torch.empty(self.B + 1, dtype=torch.int32, device="meta") if self.ragged else None
        seed = torch.empty(1, dtype=torch.int64, device="meta") if self.dropout else None
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        inputs, options = (scores, values, offsets, seed), (*self.window, self.dropout)
        out, lse = location_window.window_fwd(*inputs, *options)
        location_window_bwd.window_bwd(out, lse, *inputs, out, lse, *options, [True, True])


WINDOW = [
    WindowCase(BF16, 16, 4096, 256, (None, 0)),
    WindowCase(F32, 16, 4096, 256, (None, 0)),
    WindowCase(F32, 16, 4096, 256, (None, 0), tf32=True),
    WindowCase(BF16, 64, 100, 100, (None, -1), ragged=True),
    WindowCase(F32, 64, 100, 100, (3, None), ragged=True),
    WindowCase(F16, 16, 1024, 64, (8, 8), R=4),
    WindowCase(F32, 16, 1024, 64, (8, 8), R=4, dropout=0.1),
    WindowCase(BF16, 4, 1024, 1024, (None, 0), R=30, dropout=0.1),
    WindowCase(BF16, 4, 1024, 1024, (None, None), ragged=True),
    WindowCase(F32, 4, 1024, 1000, (None, 0), R=3, ragged=True),
    WindowCase(BF16, 4, 20, 1, (None, 0)),
]


@dataclass(frozen=True)
class ConcatCase:
    """One call of the concat family, forward and backward, as its sizes and options."""

    dtype: torch.dtype
    B: int
    H: int
    Tq: int
    Tk: int
    A: int
    DV: int
    activation: str = "tanh"
    mask: int | None = None  # its rank
    window: tuple[int | None, int | None] = (None, None)
    bias: bool = False
    ragged: bool = False
    dropout: float = 0.0

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), f"B{self.B} H{self.H} Tq{self.Tq} Tk{self.Tk}"]
        parts += [f"A{self.A} Dv{self.DV}", self.activation] + [f"mask{self.mask}"] * (self.mask is not None)
        parts += ["bias"] * self.bias + ["window"] * (self.window != (None, None))
        parts += ["ragged"] * self.ragged + ["dropout"] * (self.dropout > 0)
        return " ".join(parts)

    def launch(self) -> None:
        """Forward, and a backward for every gradient."""

        def t(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        torch.set_float32_matmul_precision("highest")
        B, H, Tq, Tk = (1, self.H, self.B * self.Tq, self.B * self.Tk) if self.ragged else (
            self.B, self.H, self.Tq, self.Tk
        )  # fmt: skip
        masks = {None: None, 2: (B, Tk), 3: (B, Tq, Tk)}[self.mask]
        offsets = t(self.B + 1, dtype=torch.int32) if self.ragged else None
        tensors = (
            t(B, H, Tq, self.A),
            t(B, H, Tk, self.A),
            t(B, H, Tk, self.DV),
            t(H, self.A),
            t(B, H, Tq, Tk) if self.bias else None,
            None if masks is None else t(*masks, dtype=torch.bool),
            offsets,
            offsets,
            t(1, dtype=torch.int64) if self.dropout else None,
        )
        options = (self.activation, *self.window, self.dropout)
        out, lse, _ = concat.concat_fwd(*tensors, *options, False)
        needs = [True] * 4 + [self.bias]
        with concat_bwd.assume_longest(self.Tk):
            concat_bwd.concat_bwd(out, None, None, *tensors, out, lse, *options, needs)


CONCAT = [
    # the sizes that the bounds of tests/test_compile_report.py are for
    ConcatCase(BF16, 4, 1, 256, 512, 128, 128),
    ConcatCase(F32, 4, 1, 256, 512, 128, 128),
    # a Bahdanau decoder step, sigmoid, odd widths
    ConcatCase(BF16, 80, 1, 1, 50, 1000, 1000, mask=2),
    ConcatCase(F32, 4, 1, 30, 60, 300, 300, "sigmoid", mask=2),
    ConcatCase(F16, 4, 1, 100, 100, 100, 100, "gelu", mask=3, bias=True),
    # heads, windows, ragged
    ConcatCase(BF16, 4, 8, 512, 512, 64, 64, "relu", window=(100, 0), dropout=0.1),
    ConcatCase(BF16, 16, 4, 256, 256, 64, 64, "leaky_relu", ragged=True),
    ConcatCase(BF16, 16, 1, 256, 256, 128, 128, ragged=True, window=(None, -1)),
    ConcatCase(BF16, 4, 1, 256, 256, 1, 128, "identity", mask=2),
    ConcatCase(F32, 4, 1, 64, 64, 64, 128, "silu"),
    ConcatCase(F32, 4, 1, 64, 64, 64, 64, mask=3, bias=True, window=(100, 0), dropout=0.1),
]  # fmt: skip


@dataclass(frozen=True)
class GeneralCase:
    """One call of the general family, forward and backward, as its sizes and options."""

    dtype: torch.dtype
    B: int
    H: int
    Tq: int
    Tk: int
    D: int
    DV: int | None = None  # None: the values are the keys
    activation: str = "identity"
    mask: int | None = None  # its rank
    window: tuple[int | None, int | None] = (None, None)
    bias: bool = False
    weights: bool = False  # whether they are returned, and have a gradient
    ragged: bool = False
    dropout: float = 0.0
    tf32: bool = False  # torch.set_float32_matmul_precision("high")

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), f"B{self.B} H{self.H} Tq{self.Tq} Tk{self.Tk} D{self.D}"]
        parts.append("shared" if self.DV is None else f"Dv{self.DV}")
        parts += [self.activation] * (self.activation != "identity") + [f"mask{self.mask}"] * (self.mask is not None)
        parts += ["bias"] * self.bias + ["window"] * (self.window != (None, None)) + ["weights"] * self.weights
        parts += ["ragged"] * self.ragged + ["dropout"] * (self.dropout > 0) + ["tf32"] * self.tf32
        return " ".join(parts)

    def launch(self) -> None:
        """Forward, and a backward for every gradient."""

        def t(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        B, H, Tq, Tk = (1, self.H, self.B * self.Tq, self.B * self.Tk) if self.ragged else (
            self.B, self.H, self.Tq, self.Tk
        )  # fmt: skip
        masks = {None: None, 2: (B, Tk), 3: (B, Tq, Tk)}[self.mask]
        offsets = t(self.B + 1, dtype=torch.int32) if self.ragged else None
        tensors = (
            t(B, H, Tq, self.D),
            t(B, H, Tk, self.D),
            None if self.DV is None else t(B, H, Tk, self.DV),
            t(B, H, Tq, Tk) if self.bias else None,
            None if masks is None else t(*masks, dtype=torch.bool),
            offsets,
            offsets,
            t(1, dtype=torch.int64) if self.dropout else None,
        )
        options = (self.activation, 0.125, *self.window, self.dropout)
        out, lse, scores = general.general_fwd(*tensors, *options, self.weights)
        needs = [True, True, self.DV is not None, self.bias]
        dscores = scores if self.weights else None
        general_bwd.general_bwd(out, None, dscores, *tensors, out, lse, *options, needs)


GENERAL = [
    # many queries: the sizes that tests/test_compile_report.py asks for matrix units
    GeneralCase(BF16, 4, 8, 4096, 4096, 64, 64),
    GeneralCase(BF16, 4, 8, 4096, 4096, 128, 128),
    GeneralCase(BF16, 4, 8, 4096, 4096, 128, window=(None, 0)),
    GeneralCase(F16, 4, 4, 1024, 1024, 256, 256),
    GeneralCase(BF16, 4, 4, 1024, 1024, 256),
    # a decoder's step: keys in parts
    GeneralCase(BF16, 8, 1, 1, 8192, 128),
    GeneralCase(BF16, 64, 1, 1, 50, 1000, mask=2),
    GeneralCase(F16, 8, 1, 16, 8192, 256, 64),
    # wider than a tile, and narrow
    GeneralCase(BF16, 8, 1, 512, 512, 600),
    GeneralCase(BF16, 8, 1, 512, 512, 1024, 1024, mask=2),
    GeneralCase(BF16, 8, 1, 512, 512, 64, 600),
    GeneralCase(F16, 8, 1, 100, 100, 1, 1),
    # everything at once, and ragged
    GeneralCase(BF16, 4, 8, 512, 512, 128, 128, "tanh", 3, (100, 0), bias=True, weights=True, dropout=0.1),
    GeneralCase(BF16, 4, 4, 512, 512, 256, 256, "gelu", 3, (100, 0), bias=True, weights=True, dropout=0.1),
    GeneralCase(F16, 16, 4, 256, 256, 64, ragged=True, dropout=0.1),
    GeneralCase(BF16, 16, 1, 256, 256, 128, 128, ragged=True, window=(None, -1)),
    # float32
    GeneralCase(F32, 4, 8, 1024, 1024, 64, 64),
    GeneralCase(F32, 4, 8, 1024, 1024, 128),
    GeneralCase(F32, 4, 8, 1024, 1024, 128, 128, tf32=True),
    GeneralCase(F32, 8, 1, 1, 8192, 128),
    GeneralCase(F32, 8, 1, 512, 512, 600, 600, mask=2),
    GeneralCase(F32, 4, 1, 64, 64, 64, 64, "tanh", 3, (100, 0), bias=True, weights=True, dropout=0.1),
]  # fmt: skip
CASES: dict[str, list[Any]] = {"location": [*LOCATION, *WINDOW], "concat": CONCAT, "general": GENERAL}


def elements(kernel: str, constants: dict[str, Any]) -> int:
    """Elements of the score tile that one trip of the inner loop makes: rows by features.

    The loops of the concat family take two features, or two walked rows, a trip; one with `EXACT`.
    """
    if kernel.startswith("_concat"):
        sides = {"dq": ("M", "D"), "dk": ("R", "D")}.get(kernel.split("_")[3], ("M", "N"))
        return (1 if constants.get("EXACT") else 2) * math.prod(constants.get(f"BLOCK_{side}", 1) for side in sides)
    if kernel.startswith("_general"):
        return constants["BLOCK_M"] * constants["BLOCK_N"]
    if kernel.startswith("_location_window"):
        return constants["BLOCK"] ** 2
    return constants.get("BLOCK_T", 1) * constants.get("BLOCK_A", constants.get("BLOCK_K", 1))


# ---------------------------------------------------------------------------------------------------------------
# How it is compiled
# ---------------------------------------------------------------------------------------------------------------


class _OfflineDriver:
    """All that a launch asks of a driver before it has a kernel."""

    def __init__(self, target: GPUTarget, device: int) -> None:
        self.target, self.device = target, device

    def get_current_device(self) -> int:
        return self.device  # Triton caches compiled kernels a device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextlib.contextmanager
def record(target: str) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Inside, a launch compiles for `target` and runs nothing; gives (compiled kernel, constants) of each."""
    gpu, chip = TARGETS[target]
    launched: list[tuple[Any, dict[str, Any]]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        constants = {k: v for k, v in kwargs.items() if isinstance(v, (int, str)) and k.isupper()}
        launched.append((kernel, {**constants, "num_warps": kwargs.get("num_warps", 4)}))
        return kernel

    driver.set_active(_OfflineDriver(gpu, list(TARGETS).index(target)))
    JITFunction.run = compile_only
    try:
        with chips.assume(chip):
            yield launched
    finally:
        JITFunction.run = run


# ---------------------------------------------------------------------------------------------------------------
# What came out
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One compiled kernel."""

    target: str
    case: str
    kernel: str
    blocks: str
    registers: int
    stack: int  # bytes a thread: registers that were spilled
    shared: int
    shared_limit: int
    loop: Counter[str]
    per_element: float
    error: str = ""

    @property
    def failed(self) -> bool:
        """Whether this kernel would not run, or would run from memory where it should run from registers."""
        return bool(self.error) or self.stack > 0 or self.shared > self.shared_limit


_UNITS = {
    "cuda": {
        "matrix": re.compile(r"^(U?[HQI]G?MMA|UTC\w*MMA)"),
        "wgmma": re.compile(r"^U?[HQI]GMMA"),  # those of matrix that whole warp groups issue, on sm_90
        "sfu": re.compile(r"^MUFU"),
        "exp": re.compile(r"^MUFU\.EX2"),
        "fma": re.compile(r"^(FFMA|FADD|FMUL)"),
        "load": re.compile(r"^(LDG|LDS|LDSM|LDGSTS|UBLKCP|UTMALDG)"),
    },
    "hip": {
        "matrix": re.compile(r"^v_mfma"),
        "sfu": re.compile(r"^v_(exp|log|rcp|sqrt|rsq|sin|cos)_"),
        "exp": re.compile(r"^v_exp_"),
        "fma": re.compile(r"^v_(pk_)?(fma|add|mul|sub|fmac)_f32"),
        "load": re.compile(r"^(global_load|buffer_load|ds_read|ds_load)"),
    },
}


def _usage_cuda(kernel: Any) -> tuple[int, int, list[str]]:
    """Registers a thread, bytes of stack a thread, and the lines of the disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", f.name], check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK"))
    return registers, stack, [line.rsplit("\t", 1)[-1] for line in kernel.asm["sass"].splitlines()]


def _usage_hip(kernel: Any) -> tuple[int, int, list[str]]:
    text = kernel.asm["amdgcn"]
    registers, stack = (
        int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "private_segment_fixed_size")
    )
    return registers, stack, text[: text.index("s_endpgm")].splitlines()


def inner_loop(lines: list[str], backend: str, *, factored: bool = False) -> Counter[str]:
    """Instructions by unit of the innermost loop that computes most; of the whole kernel where it has no loop.

    With `factored` one without exponentials: the other is the loop for tiles whose factors would overflow.
    """
    ops: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in lines:
        line = line.split(";")[0].strip()
        if label := re.fullmatch(r"(\.?LBB\w*):", line):
            labels[label[1]] = len(ops)
        elif op := re.match(r"(?:@!?U?P\w+\s+)?([A-Za-z][\w.]*)", line):
            if op[1].split(".")[0] == "BRA" or op[1].startswith(("s_cbranch", "s_branch")):
                jumps.append((len(ops), line.split()[-1]))
            ops.append(op[1])

    def count(span: tuple[int, int]) -> Counter[str]:
        units = Counter({"all": span[1] - span[0]})
        for op in ops[slice(*span)]:
            units.update(unit for unit, pattern in _UNITS[backend].items() if pattern.match(op))
        return units

    def work(units: Counter[str]) -> int:
        return 16 * units["matrix"] + units["sfu"] + units["fma"]

    if any(op.startswith("UTC") for op in ops):
        # Blackwell's waits for its matrix unit are placed out of line: jumps back from them are not loops.
        return count((0, len(ops)))
    # Blackwell's uniform branches give the address, 16 bytes an instruction, in place of a label.
    targets = [(at, int(to, 16) // 16 if to.startswith("0x") else labels.get(to, at)) for at, to in jumps]
    loops = {span: count(span) for span in {(to, at + 1) for at, to in targets if to < at}}
    loops = {span: units for span, units in loops.items() if work(units)}  # the others wait for a barrier

    def holds(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
        return outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]

    innermost = [units for span, units in loops.items() if not any(holds(span, other) for other in loops)]
    if factored and (few := [units for units in innermost if units["sfu"] and units["fma"] and not units["exp"]]):
        return max(few, key=work)
    return max(innermost or [count((0, len(ops)))], key=lambda units: (work(units), units["all"]))


def _blocks(constants: dict[str, Any]) -> str:
    sizes = [f"{k.removeprefix('BLOCK_')}{v}" for k, v in constants.items() if k.startswith("BLOCK_")]
    return " ".join([*sizes, f"w{constants['num_warps']}"])


def compile_case(job: tuple[str, str, int]) -> list[Row]:
    """Every kernel that one case launches on one target."""
    target, family, index = job
    gpu, chip = TARGETS[target]
    case = CASES[family][index]
    rows: dict[tuple[str, str], Row] = {}  # a kernel that is launched twice alike is told once
    with record(target) as launched:
        try:
            case.launch()
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            rows["launch", ""] = Row(target, str(case), "launch", "", 0, 0, 0, chip.shared, Counter(), 0.0, text)
    for kernel, constants in {id(k): (k, c) for k, c in launched}.values():
        registers, stack, lines = (_usage_cuda if gpu.backend == "cuda" else _usage_hip)(kernel)
        loop = inner_loop(lines, gpu.backend, factored=bool(constants.get("FACTORED")))
        threads = constants["num_warps"] * gpu.warp_size
        row = Row(
            target, str(case), kernel.name, _blocks(constants), registers, stack, kernel.metadata.shared,
            chip.shared, loop, loop["all"] * threads / elements(kernel.name, constants),
        )  # fmt: skip
        before = rows.setdefault((row.kernel, row.blocks), row)
        if (row.failed, row.registers) > (before.failed, before.registers):
            rows[row.kernel, row.blocks] = row
    return list(rows.values())


def report(targets: list[str], family: str | None, text: str, jobs: int) -> list[Row]:
    """Compile what the filters leave, `jobs` at a time."""
    work = [
        (target, name, i)
        for target in targets
        for name, cases in CASES.items()
        for i, case in enumerate(cases)
        if family in (None, name) and text in str(case)
    ]
    with ProcessPoolExecutor(jobs) as pool:
        done = track(pool.map(compile_case, work), "compiling", len(work), console=Console(stderr=True))
        return [row for rows in done for row in rows]


def table(rows: list[Row]) -> Table:
    """The report, a line a kernel; what fails is red."""
    out = Table(title="Compiled kernels", pad_edge=False)
    for name in ("target", "case", "kernel", "blocks"):
        out.add_column(name, overflow="fold")
    for name in ("regs", "stack B", "shared / limit", "loop", "matrix", "SFU", "FMA", "load", "an element"):
        out.add_column(name, justify="right")
    for r in rows:
        cells = [
            r.target, r.case, r.error or r.kernel.strip("_").removesuffix("_kernel"), r.blocks,
            str(r.registers), str(r.stack), f"{r.shared // 1024}K / {r.shared_limit // 1024}K",
            *(str(r.loop[unit]) for unit in ("all", "matrix", "sfu", "fma", "load")), f"{r.per_element:.2f}",
        ]  # fmt: skip
        out.add_row(*cells, style="red" if r.failed else None)
    return out


def main() -> int:
    """Print the report; 1 if a kernel failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--family", choices=list(CASES))
    parser.add_argument("--case", default="", help="only cases whose name has this text")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    rows = report(args.target, args.family, args.case, args.jobs)
    Console(width=None if sys.stdout.isatty() else 200).print(table(rows))
    if args.json:
        args.json.write_text(json.dumps([vars(r) | {"failed": r.failed} for r in rows], indent=1))
    failed = [r for r in rows if r.failed]
    print(f"{len(rows)} kernels, Triton {triton.__version__}: {len(rows) - len(failed)} passed, {len(failed)} failed")
    for r in failed:
        what = r.error or f"{r.stack} bytes of stack, {r.shared} of {r.shared_limit} bytes of shared memory"
        print(f"FAILED {r.target} {r.case} {r.kernel} {r.blocks}: {what}")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
