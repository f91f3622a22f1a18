"""What small problems execute in an emulator of PTX, kept in emulated.json: what the walk must agree with.

    PYTHONPATH=.:DIRECTORY_OF_PTXEMU python -m bench.model --emulate

The emulator runs every instruction of every thread; the counts are of matrix instructions, special-function
operations, instructions, and sectors of global memory that warps ask for. A kernel whose instructions (`code` is
their hash) have changed since is not compared: the command makes its counts anew, in a few minutes.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

STORED = Path(__file__).parent / "emulated.json"

FEW = {"B": 2, "S": 3, "G": 3, "H": 2, "R": 4, "N": 64, "E": 256}
# Of the registry, with few sequences and no other size over the number: ragged, padded, one query.
PROBLEMS = (
    ("location", "gated-ragged", 96),
    ("general", "dot-64", 96),
    ("general", "shared-step", 64),
    ("statistics", "okabe", 64),
    ("concat", "ragged", 64),
    ("hierarchical", "han", 64),
    ("graph", "cora", 64),
    ("recurrent", "large", 32),
)


def problem(family: str, name: str, limit: int) -> tuple[Any, Any]:
    """An op, and sizes of one of its cases in small."""
    from ..families import REGISTRY

    op = next(op for op in REGISTRY if op.family == family)
    case = next(case for case in op.cases if case.name == name)
    return op, {size: min(n, FEW.get(size, limit)) for size, n in case.sizes.items()}


def emulate() -> None:
    """Run the problems in the emulator, and write down what they execute."""
    import ptxemu.launch as emulator  # before Triton
    import torch
    from ptxemu import codegen, machine

    from ..families.problem import BF16
    from . import launches
    from .walk import _MUFU, matrix_flops, parse

    count: Counter[str] = Counter()
    compiled = codegen.Program._compile

    def counting(self: Any, i: int, fast: bool) -> Any:
        block, threads = compiled(self, i, fast), self.T
        ops = [x for x in self.kernel.blocks[i].instrs if x.op not in ("bra", "ret", "exit")]
        flops = sum(matrix_flops(x.text.split()[0]) * threads / (128 if x.op == "wgmma" else 32) for x in ops)
        mufu = threads * sum(x.op in _MUFU for x in ops)

        def run() -> Any:
            count.update({"instructions": len(ops), "flops": flops, "mufu": mufu})
            return block()

        return run

    def sectors(self: Any, place: Any, size: int, mask: Any) -> None:
        on = np.arange(self.T) if mask is None else np.flatnonzero(np.broadcast_to(mask, self.T))
        place = np.broadcast_to(place, self.T)[on].astype(np.int64)
        ends = np.concatenate([(place >> 5) + (on // 32 << 50), (place + size - 1 >> 5) + (on // 32 << 50)])
        count["global_bytes"] += 32 * len(np.unique(ends))

    def noting(owner: Any, name: str, look: Any) -> None:
        inner = getattr(owner, name)

        def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            look(self, *args)
            return inner(self, *args, **kwargs)

        setattr(owner, name, noted)

    def of_global(self: Any, registers: Any, size: int, place: Any, offset: int, mask: Any, *more: Any) -> None:
        sectors(self, place + offset, size * len(registers), mask)

    def of_copy(
        self: Any, to: Any, at: int, place: Any, offset: int, size: int, source: Any, mask: Any, ins: Any
    ) -> None:
        if source is not None:
            mask = (np.broadcast_to(source, self.T) > 0) & (True if mask is None else mask)
        sectors(self, place + offset, size, mask)

    codegen.Program._compile = counting
    noting(machine.Machine, "ldg", of_global)
    noting(machine.Machine, "stg", of_global)
    noting(machine.Machine, "cp_async", of_copy)
    found: dict[str, list[dict[str, Any]]] = {}
    run = emulator.launch

    def launch(kernel: Any, named: Any, grid: Any, log: Any) -> None:
        count.clear()
        run(kernel, named, grid, log)
        code = parse(kernel.asm["ptx"]).hash
        rows.append({"kernel": kernel.name, "code": code, "grid": list(grid), **count})

    emulator.launch = launch
    for family, name, limit in PROBLEMS:
        op, sizes = problem(family, name, limit)
        rows: list[dict[str, Any]] = []
        try:
            with emulator.emulate("sm_90"):
                call = launches.partial(op.call, **op.options(sizes), impl="triton")
                torch.manual_seed(0)
                launches.step(call, op.inputs(sizes, BF16, torch.device("cpu"), 0), "forward+backward")
        except Exception as error:  # what the emulator cannot run
            print(f"{family}/{name}: {type(error).__name__}: {error}"[:200], file=sys.stderr)
        found[f"{family}/{name}"] = rows
        print(f"{family}/{name}: {len(rows)} launches", flush=True)
        told = {"command": "python -m bench.model --emulate", "target": "sm_90", "problems": found}
        STORED.write_text(json.dumps(told) + "\n")
