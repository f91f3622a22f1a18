"""Count how many variants of each kernel a run of calls of changing lengths would compile, with no GPU.

    python -m bench.variants [--target sm_90] [--family location ...] [--calls 60]

Triton compiles a kernel anew for every new key: dtypes, constants, launch options, and what it knows of each argument
(None, 1, a multiple of 16). Each setting below is called with lengths that are log-uniform in 1 to 4,096, forward and
backward, and the keys are counted; nothing is compiled. More than `MOST` of one kernel make the exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .compile_cases.concat import ConcatCase
from .compile_cases.dtypes import BF16, F16, F32
from .compile_cases.general import GeneralCase
from .compile_cases.graph import GraphCase
from .compile_cases.hierarchical import HierarchicalCase
from .compile_cases.location import LocationCase
from .compile_cases.location_window import WindowCase
from .compile_cases.recurrent import WordCase
from .compile_cases.statistics import StatisticsCase
from .compile_report import TARGETS, _OfflineDriver, chips

MOST = 4
"""Variants of one kernel that a setting may have."""
LONGEST = 4096

Draw = Callable[[], int]


def _location(case: LocationCase | WindowCase | StatisticsCase, draw: Draw) -> Any:
    return replace(case, T=draw())


def _pairs(case: ConcatCase | GeneralCase, draw: Draw) -> Any:
    return replace(case, Tq=draw(), Tk=draw())


def _hierarchical(case: HierarchicalCase, draw: Draw) -> Any:
    rows = draw()
    return replace(case, N=rows, S=min(draw(), rows))


def _graph(case: GraphCase, draw: Draw) -> Any:
    return replace(case, N=draw(), E=draw(), keys=None if case.keys is None else draw())


def _recurrent(case: WordCase, draw: Draw) -> Any:
    return replace(case, Ty=draw(), Th=draw())


# Widths that are whole vectors of 16, and widths that are not, where strides of a batch change their class with a
# length; three sequences, so that a packed batch has any number of rows.
SETTINGS: dict[str, tuple[Callable[[Any, Draw], Any], list[Any]]] = {
    "location": (_location, [
        LocationCase(BF16, 3, 1, 64, 32, mask=False),
        LocationCase(BF16, 3, 1, 100, 50, gated=True),
        LocationCase(BF16, 3, 1, 64, 32, gated=True, ragged=True),
        LocationCase(BF16, 3, 1, 512, 128, R=4, ragged=True, mask=False),
        LocationCase(F32, 3, 1, 100, 63, context="row", values=36, dropout=0.1),
        LocationCase(F32, 3, 1, 33, R=5, mask=False),
        LocationCase(F16, 200, 1, 64, 32, context="sequence", activation="relu"),
        LocationCase(BF16, 3, 1, 300, 300, values=100, context="sequence", projected=True),
        LocationCase(F32, 3, 1, 2048, 64, ragged=True, mask=False),
    ]),
    "location window": (_location, [
        WindowCase(BF16, 3, 1, 64, (None, 0)),
        WindowCase(F32, 3, 1, 100, (3, None), R=2),
        WindowCase(F32, 3, 1, 33, (8, 8), dropout=0.1),
        WindowCase(BF16, 3, 1, 64, (None, -1), ragged=True),
        WindowCase(F32, 3, 1, 100, (8, 8), ragged=True),
        WindowCase(BF16, 3, 1, 64, (None, 0), dropout=0.1, ragged=True),
    ]),
    "concat": (_pairs, [
        ConcatCase(BF16, 3, 1, 1, 1, 64, 64),
        ConcatCase(BF16, 3, 2, 1, 1, 100, 50, mask=2),
        ConcatCase(BF16, 3, 2, 1, 1, 64, 128, ragged=True),
        ConcatCase(F32, 3, 1, 1, 1, 100, 63, "sigmoid", mask=3, bias=True),
        ConcatCase(F32, 3, 2, 1, 1, 64, 64, "gelu", window=(5, 0), dropout=0.1),
        ConcatCase(F32, 3, 1, 1, 1, 33, 33, ragged=True, window=(None, -1)),
        ConcatCase(F16, 3, 2, 1, 1, 33, 64, mask=3, bias=True, window=(5, 0), dropout=0.1),
    ]),
    "general": (_pairs, [
        GeneralCase(BF16, 3, 2, 1, 1, 64, 64),
        GeneralCase(BF16, 3, 1, 1, 1, 128, mask=2),
        GeneralCase(BF16, 3, 2, 1, 1, 100, 50, window=(None, 0)),
        GeneralCase(BF16, 3, 2, 1, 1, 64, 64, ragged=True),
        GeneralCase(F32, 3, 2, 1, 1, 100, 33, "tanh", 3, (5, 0), bias=True, weights=True, dropout=0.1),
        GeneralCase(F32, 3, 1, 1, 1, 64, ragged=True, dropout=0.1),
        GeneralCase(F16, 3, 1, 1, 1, 600, 100, mask=3, bias=True),
    ]),
    "hierarchical": (_hierarchical, [
        HierarchicalCase(BF16, 2, 1, 1, 64, 32, 32, mask=False),
        HierarchicalCase(BF16, 200, 1, 1, 100, 50, 50, gated=True, context="segment"),
        HierarchicalCase(F32, 2, 1, 1, 64, 63, 32, context="row"),
        HierarchicalCase(F32, 2, 1, 1, 512, 32, 16, mask=False),
        HierarchicalCase(BF16, 2, 1, 1, 512, None, None),
    ]),
    "statistics": (_location, [
        StatisticsCase(BF16, 3, 1, 64),
        StatisticsCase(F32, 3, 1, 100, mask=False, weights=True),
        StatisticsCase(BF16, 3, 1, 64, 32),
        StatisticsCase(F32, 3, 1, 100, 63, weights=True),
        StatisticsCase(BF16, 3, 1, 64, 32, ragged=True, mask=False),
        StatisticsCase(F32, 3, 1, 100, ragged=True, weights=True),
    ]),
    "graph": (_graph, [
        GraphCase(F32, 1, 1, 8, 8),
        GraphCase(BF16, 1, 1, 4, 64, dropout=0.1),
        GraphCase(F32, 1, 1, 3, 33, 100, keys=1, edge=True, weights=True),
    ]),
    "recurrent": (_recurrent, [
        WordCase(BF16, 3, 1, 1, 64, 64),
        WordCase(F32, 3, 1, 1, 100, 50, mask=True, weights=True),
        WordCase(BF16, 3, 1, 1, 100, 100, ragged=True),
        WordCase(F32, 3, 1, 1, 1000, 2000, mask=True),
    ]),
}  # fmt: skip


@contextlib.contextmanager
def record(target: str) -> Iterator[dict[str, set[str]]]:
    """Inside, a launch for `target` runs and compiles nothing; gives the keys of each kernel."""
    gpu, chip = TARGETS[target]
    keys: dict[str, set[str]] = defaultdict(set)

    def key_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bound, specialization, options = self.device_caches[driver.active.get_current_device()][-1](*args, **kwargs)
        # Tensors without memory are all at address 0: how far into its memory one begins decides.
        starts = [
            int(x.storage_offset() * x.element_size() % 16 == 0) for x in bound.values() if isinstance(x, Tensor)
        ]
        keys[self.fn.__name__].add(f"{specialization} {options} {starts}")

    run, active = JITFunction.run, driver._active
    driver.set_active(_OfflineDriver(gpu, list(TARGETS).index(target)))
    JITFunction.run = key_only
    try:
        with chips.assume(chip):
            yield keys
    finally:
        JITFunction.run = run
        driver._active = active


def _lengths(rng: random.Random) -> Draw:
    return lambda: math.ceil(math.exp(rng.uniform(0, math.log(LONGEST))))


def count(target: str, family: str, calls: int) -> dict[str, dict[str, set[str]]]:
    """Keys by setting and kernel, over so many calls of each setting."""
    vary, cases = SETTINGS[family]
    found = {}
    for case in cases:
        draw = _lengths(random.Random(f"{family} {case}"))
        with record(target) as keys:
            for _ in range(calls):
                vary(case, draw).launch()
        found[str(case)] = dict(keys)
    return found


def main() -> int:
    """Print the table; 1 where a kernel has too many."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=list(TARGETS), default="sm_90")
    parser.add_argument("--family", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--calls", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="print numbers only, by family, setting and kernel")
    args = parser.parse_args()
    found = {
        family: {
            case: {kernel: len(keys) for kernel, keys in by_kernel.items()}
            for case, by_kernel in count(args.target, family, args.calls).items()
        }
        for family in args.family
    }
    if args.json:
        print(json.dumps(found))
    else:
        table = Table(title=f"Variants in {args.calls} calls, {args.target}", pad_edge=False)
        for name in ("family", "setting", "kernel"):
            table.add_column(name, overflow="fold")
        table.add_column("variants", justify="right")
        for family, cases in found.items():
            for case, kernels in cases.items():
                for kernel, n in kernels.items():
                    name = kernel.strip("_").removesuffix("_kernel")
                    table.add_row(family, case, name, str(n), style="red" if n > MOST else None)
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    return (
        1 if any(n > MOST for cases in found.values() for kernels in cases.values() for n in kernels.values()) else 0
    )


if __name__ == "__main__":
    sys.exit(main())
