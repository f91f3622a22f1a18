"""Compile every kernel in every configuration that the rules can choose, with no GPU, and report what came out.

    python -m bench.compile_report [--target sm_90 ...] [--family location ...] [--case TEXT ...] [--brief]
                                   [--every N] [--drawn N [--seed N]] [--usage] [--json FILE] [--jobs N]

The family's own launchers run on meta tensors, with a driver that only names a target: what is compiled is what
a launch on that chip would compile, block sizes and pointer alignment included. A kernel that fails to compile,
spills, needs more shared memory than the chip has, that the assembler warns of (C7515: products that should run
beside other work wait for each other), or in which Triton makes a sum twice, makes the exit code 1.

`--brief` compiles a few cases, with each kernel in one of them. `--drawn N` compiles N calls of random widths, hops,
dtypes, options and lengths in place of the cases, and tells only those that fail. `--every N` leaves out all but
each N-th case. `--usage` counts no instructions: the disassembler takes a second a kernel, as compiling it does.

Columns: registers a thread, spilled bytes, shared memory of the chip's limit, and for the innermost loop with
the most arithmetic (the whole kernel where there is none, and on sm_100) instructions a thread, of which matrix,
special function (SFU) and FMA pipe. `an element`: instructions of that loop, over all threads, for one element of its
score tile. AMD: vector registers; no shared-memory column beyond the 64 KiB of a work group.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are imported: here they are compiled

import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import make_backend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fused_attn.kernels import chip as chips

from .families import BRIEF, CASES, elements
from .families.drawn import drawn

TARGETS: dict[str, tuple[GPUTarget, chips.Chip]] = {
    "sm_80": (GPUTarget("cuda", 80, 32), chips.A100),
    "sm_86": (GPUTarget("cuda", 86, 32), chips.A10),
    "sm_89": (GPUTarget("cuda", 89, 32), chips.L40),
    "sm_90": (GPUTarget("cuda", 90, 32), chips.H200),
    "sm_100": (GPUTarget("cuda", 100, 32), chips.B200),
    "sm_120": (GPUTarget("cuda", 120, 32), chips.RTX5090),
    "gfx90a": (GPUTarget("hip", "gfx90a", 64), chips.MI250X),
    "gfx942": (GPUTarget("hip", "gfx942", 64), chips.MI300X),
}


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
def launches(target: str, launch: Callable[..., Any], *, device: int | None = None) -> Iterator[None]:
    """Inside, the launch of a kernel is `launch`, with no GPU and for a chip that is taken to be `target`.

    device: under whose number Triton keeps what it compiled, where it is not the target's.
    """
    gpu, chip = TARGETS[target]
    run, active = JITFunction.run, driver._active
    driver.set_active(_OfflineDriver(gpu, list(TARGETS).index(target) if device is None else device))
    JITFunction.run = launch
    try:
        with chips.assume(chip):
            yield
    finally:
        JITFunction.run = run
        driver._active = active


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, calls on tensors of the CPU take the paths of a GPU, up to the launches of kernels."""
    with (
        patch("fused_attn._ops._triton_state", lambda: "interpreter"),  # which takes tensors of the CPU
        patch("fused_attn._tracing.can_look", lambda x: False),
        patch("fused_attn.reference.widened", lambda *tensors: tensors),
    ):
        yield


@contextlib.contextmanager
def record(target: str) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Inside, a launch compiles for `target` and runs nothing; gives (compiled kernel, constants) of each."""
    launched: list[tuple[Any, dict[str, Any]]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        constants = {k: v for k, v in named.items() if isinstance(v, (int, str)) and k.isupper()}
        for name, prefix in (("blocks", "BLOCK_"), ("flags", "")):  # tuples, see kernels/arguments.py
            fields = named[name]._asdict() if name in named else {}
            constants |= {prefix + k: v.value for k, v in fields.items() if k.isupper() and v.value}
        launched.append((kernel, {**constants, "num_warps": kwargs.get("num_warps", 4)}))
        return kernel

    with launches(target, compile_only):
        yield launched


def _assemble(self: CUDABackend, src: str, metadata: dict[str, Any], *args: Any) -> bytes:
    """Triton's own step, which keeps what ptxas says in the metadata, so that Triton's cache has it too."""
    said = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        triton.knobs.nvidia.dump_ptxas_log = True
        cubin = _make_cubin(self, src, metadata, *args)
    metadata["ptxas"] = said.getvalue()
    return cubin


_make_cubin = CUDABackend.make_cubin
CUDABackend.make_cubin = _assemble


def _ptxas(kernel: Any, target: GPUTarget) -> str:
    """What ptxas said of a kernel."""
    if not hasattr(kernel.metadata, "ptxas"):  # from the cache, where another program put it
        metadata: dict[str, Any] = {}
        make_backend(target).make_cubin(kernel.asm["ptx"], metadata, kernel.metadata, target.arch)
        return metadata["ptxas"]
    return kernel.metadata.ptxas


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
    error: str = ""  # why it did not compile, or what is to be warned of

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


def _usage_cuda(said: str) -> tuple[int, int, str]:
    """Registers a thread, bytes of stack a thread, and warnings, from what ptxas said."""
    registers, stack = (int(re.search(key, said)[1]) for key in (r"Used (\d+) registers", r"(\d+) bytes stack frame"))
    warnings = {line for line in said.splitlines() if re.search("warning|Performance Loss", line)}
    return registers, stack, "; ".join(sorted(warnings))


def _usage_hip(text: str) -> tuple[int, int, str]:
    registers, stack = (
        int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "private_segment_fixed_size")
    )
    return registers, stack, ""


_SUM = re.compile(r'"tt\.reduce".*\n.*\n.*arith\.addf.*\n.*\n *\}\) : .* -> (.*) loc\((.*)\)')


def _sums_made_again(kernel: Any) -> str:
    """A warning where Triton made a sum over lanes once more, for a user of another layout.

    It adds in another order there, so that the two differ in their last bits. Where they are scores, the weights are
    not those of the maximum that was subtracted: at scores of thousands they are off by per cents.
    """
    sums = [_SUM.findall(kernel.asm[ir]) for ir in ("ttir", "ttgir")]
    if len(sums[1]) <= len(sums[0]):
        return ""
    layouts: dict[str, set[str]] = {}  # by the line of the program: a loop whose last trip is peeled has a line twice
    for layout, line in sums[1]:
        layouts.setdefault(line, set()).add(layout)
    return "a sum is made again in another layout" if any(len(x) > 1 for x in layouts.values()) else ""


def code_of(kernel: Any) -> list[str]:
    """The lines of the disassembly."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        return text[: text.index("s_endpgm")].splitlines()
    return [line.rsplit("\t", 1)[-1] for line in kernel.asm["sass"].splitlines()]


def loops_of(lines: list[str]) -> tuple[list[str], set[tuple[int, int]]]:
    """The operations of a disassembly, and its jumps back as spans of them: loops, and waits for a barrier."""
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
    # Blackwell's uniform branches give the address, 16 bytes an instruction, in place of a label.
    targets = [(at, int(to, 16) // 16 if to.startswith("0x") else labels.get(to, at)) for at, to in jumps]
    return ops, {(to, at + 1) for at, to in targets if to < at}


def inner_loop(lines: list[str], backend: str, *, factored: bool = False) -> Counter[str]:
    """Instructions by unit of the innermost loop that computes most; of the whole kernel where it has no loop.

    With `factored` one without exponentials: the other is the loop for tiles whose factors would overflow.
    """
    ops, spans = loops_of(lines)

    def count(span: tuple[int, int]) -> Counter[str]:
        units = Counter({"all": span[1] - span[0]})
        for op in ops[slice(*span)]:
            units.update(unit for unit, pattern in _UNITS[backend].items() if pattern.match(op))
        return units

    def work(span: tuple[int, int], units: Counter[str]) -> int:
        # A warp's part of a product of a warp group is as many of those of a warp as it has times their 8 columns.
        groups = [int(found[1]) // 8 for op in ops[slice(*span)] if (found := re.match(r"HGMMA\.64x(\d+)x", op))]
        return 16 * (units["matrix"] - len(groups) + sum(groups)) + units["sfu"] + units["fma"]

    if any(op.startswith("UTC") for op in ops):
        # Blackwell's waits for its matrix unit are placed out of line: jumps back from them are not loops.
        return count((0, len(ops)))
    loops = {span: count(span) for span in spans}
    loops = {span: units for span, units in loops.items() if work(span, units)}  # the others wait for a barrier

    def holds(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
        return outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]

    innermost = [
        (work(span, units), units) for span, units in loops.items() if not any(holds(span, other) for other in loops)
    ]
    if factored and (few := [x for x in innermost if x[1]["sfu"] and x[1]["fma"] and not x[1]["exp"]]):
        innermost = few
    return max(innermost or [(0, count((0, len(ops))))], key=lambda x: (x[0], x[1]["all"]))[1]


def _blocks(constants: dict[str, Any]) -> str:
    sizes = [f"{k.removeprefix('BLOCK_')}{v}" for k, v in constants.items() if k.startswith("BLOCK_")]
    return " ".join([*sizes, f"w{constants['num_warps']}"])


def compile_case(target: str, case: Any, loops: bool = True) -> list[Row]:
    """Every kernel that one case launches on one target; without `loops` their instructions are not counted."""
    gpu, chip = TARGETS[target]
    rows: dict[tuple[str, str], Row] = {}  # a kernel that is launched twice alike is told once
    with record(target) as launched:
        try:
            case.launch()
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            rows["launch", ""] = Row(target, str(case), "launch", "", 0, 0, 0, chip.shared, Counter(), 0.0, text)
    for kernel, constants in {id(k): (k, c) for k, c in launched}.values():
        cuda = gpu.backend == "cuda"
        registers, stack, warnings = _usage_cuda(_ptxas(kernel, gpu)) if cuda else _usage_hip(kernel.asm["amdgcn"])
        loop: Counter[str] = Counter()
        if loops:
            loop = inner_loop(code_of(kernel), gpu.backend, factored=bool(constants.get("FACTORED")))
        threads = constants["num_warps"] * gpu.warp_size
        row = Row(
            target,
            str(case),
            kernel.name,
            _blocks(constants),
            registers,
            stack,
            kernel.metadata.shared,
            chip.shared,
            loop,
            loop["all"] * threads / elements(kernel.name, constants),
            "; ".join(filter(None, [warnings, _sums_made_again(kernel)])),
        )
        before = rows.setdefault((row.kernel, row.blocks), row)
        if (row.failed, row.registers) > (before.failed, before.registers):
            rows[row.kernel, row.blocks] = row
    return list(rows.values())


def _compile(job: tuple[str, Any, bool]) -> list[Row]:
    return compile_case(*job)


def report(targets: list[str], cases: list[Any], jobs: int, *, loops: bool = True) -> list[Row]:
    """Compile the cases for the targets, `jobs` at a time."""
    work = [(target, case, loops) for target in targets for case in cases]
    with ProcessPoolExecutor(jobs) as pool:
        done = track(pool.map(_compile, work), "compiling", len(work), console=Console(stderr=True))
        return [row for rows in done for row in rows]


def table(rows: list[Row]) -> Table:
    """The report, a line a kernel; what fails is red."""
    out = Table(title="Compiled kernels", pad_edge=False)
    for name in ("target", "case", "kernel", "blocks"):
        out.add_column(name, overflow="fold")
    for name in ("regs", "stack B", "shared / limit", "loop", "matrix", "SFU", "FMA", "load", "an element"):
        out.add_column(name, justify="right")
    for r in rows:
        cells = [r.target, r.case, r.error or r.kernel.strip("_").removesuffix("_kernel"), r.blocks]
        cells += [str(r.registers), str(r.stack), f"{r.shared // 1024}K / {r.shared_limit // 1024}K"]
        cells += [str(r.loop[unit]) for unit in ("all", "matrix", "sfu", "fma", "load")]
        cells += [f"{r.per_element:.2f}"]
        out.add_row(*cells, style="red" if r.failed else None)
    return out


def main() -> int:
    """Print the report; 1 if a kernel failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--family", choices=list(CASES))
    parser.add_argument("--case", nargs="+", default=[""], help="only cases whose name has one of these texts")
    parser.add_argument("--brief", action="store_true", help="a few cases, with each kernel in one of them")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of the cases each N-th")
    parser.add_argument("--drawn", type=int, default=0, help="so many calls drawn at random in place of the cases")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn calls")
    parser.add_argument("--usage", action="store_true", help="registers and memory alone, no instructions")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    named = [(family, case) for family, cases in (BRIEF if args.brief else CASES).items() for case in cases]
    if args.drawn:
        named = drawn(args.drawn, args.seed)
    of_family = [case for family, case in named if args.family in (None, family)]
    cases = [case for case in of_family if any(text in str(case) for text in args.case)][:: args.every]
    rows = report(args.target, cases, args.jobs, loops=not (args.drawn or args.usage))
    shown = [r for r in rows if r.failed] if args.drawn else rows
    Console(width=None if sys.stdout.isatty() else 200).print(table(shown))
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
