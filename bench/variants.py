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
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .compile_report import TARGETS, launches
from .families import SETTINGS

MOST = 4
"""Variants of one kernel that a setting may have."""
LONGEST = 4096


@contextlib.contextmanager
def record(target: str) -> Iterator[dict[str, set[str]]]:
    """Inside, a launch for `target` runs and compiles nothing; gives the keys of each kernel."""
    keys: dict[str, set[str]] = defaultdict(set)

    def key_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bound, specialization, options = self.device_caches[driver.active.get_current_device()][-1](*args, **kwargs)
        # Tensors without memory are all at address 0: how far into its memory one begins decides.
        starts = [
            int(x.storage_offset() * x.element_size() % 16 == 0) for x in bound.values() if isinstance(x, Tensor)
        ]
        keys[self.fn.__name__].add(f"{specialization} {options} {starts}")

    with launches(target, key_only):
        yield keys


def _lengths(rng: random.Random) -> Callable[[], int]:
    return lambda: math.ceil(math.exp(rng.uniform(0, math.log(LONGEST))))


def count(target: str, family: str, calls: int) -> dict[str, dict[str, set[str]]]:
    """Keys by setting and kernel, over so many calls of each setting."""
    found = {}
    for case in SETTINGS[family]:
        draw = _lengths(random.Random(f"{family} {case}"))
        with record(target) as keys:
            for _ in range(calls):
                case.varied(draw).launch()
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
