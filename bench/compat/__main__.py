"""What `fused_attn.compat` replaces beside the libraries' own modules, on a CPU: `python -m bench.compat --help`.

Each pair has the same parameters and inputs; results and gradients are compared, then they are timed call by call in
turns, forward and with backward, as `bench.cpu` does. The libraries are found by PYTHONPATH=build/peers, where `make
test-peers` installs them.

    PYTHONPATH=build/peers python -m bench.compat                    all that can be imported; to bench/results/
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from .. import compat
from ..cpu import CPU, SECONDS, measure_pair, table
from ..run import ROOT, environment, store
from .case import Case, pair_of


def cases() -> dict[str, Case]:
    """Of the libraries that can be imported here, by library and name."""
    found: dict[str, Case] = {}
    for module in pkgutil.iter_modules(compat.__path__):
        if module.name in ("__main__", "case"):
            continue
        try:
            mine = importlib.import_module(f"{compat.__name__}.{module.name}").CASES
        except ModuleNotFoundError as error:
            print(f"{module.name}: left out, {error}", file=sys.stderr)
            continue
        found |= {f"{module.name}: {name}": case for name, case in mine.items()}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Time the cases and store the rows; the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m bench.compat", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", default="", help="only cases whose name has this text")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a row in one mode")
    parser.add_argument("--output", type=Path, help="default: bench/results/compat-<date>.json")
    args = parser.parse_args(argv)
    chosen = {name: case for name, case in cases().items() if args.case in name}
    if not chosen:
        parser.error(f"--case: expected text of the name of a case that can run here; got {args.case!r}")
    report = environment(CPU, [], None) | {"command": " ".join(["python -m bench.compat", *argv]), "rows": []}
    date = report["date"][:19].replace("T", "-").replace(":", "")
    output = args.output or ROOT / "bench" / "results" / f"compat-{date}.json"
    for name, case in chosen.items():
        torch.manual_seed(0)
        report["rows"] += measure_pair(name, pair_of(case), args.threads, args.seconds, least=1.0)
        store(report, output)
    Console(width=None if sys.stdout.isatty() else 120).print(table(report["rows"], report["device"]["name"]))
    print(f"Written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
