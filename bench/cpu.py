"""The ops on a CPU beside what a careful user would write in eager PyTorch: `python -m bench.cpu --help`.

Each pair of `bench.eager` is checked, then timed call by call in turns, so that what else the machine does meets
both: the number to look at is the ratio of the medians, eager's time over ours. Forward has no gradients;
forward+backward has one for each floating input. Memory is the peak of a call beyond what there was before.

    python -m bench.cpu                      all rows, with 1 and 2 threads; written to bench/results/
    python -m bench.cpu --guard              those of the newest stored run again: exit 1 where a ratio is lost
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .eager import PAIRS, Pair
from .families.problem import MODES
from .run import ROOT, environment, peak_bytes, store

SECONDS = 1.5
"""Of a row in one mode."""
LOSS = 0.15
"""Of a stored ratio, beyond which the guard fails."""
SLOWER_US = 20
"""So much slower than eager is no matter, beside 0.95 of its speed."""

Row = dict[str, Any]
CPU = torch.device("cpu")


def step(call: Callable[[], Tensor], leaves: list[Tensor], mode: str) -> Callable[[], list[Tensor]]:
    """The call, or a step of training with it: its result, and gradients."""

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [call()]

    def both() -> list[Tensor]:
        out = call()
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    return forward if mode == MODES[0] else both


def check(pair: Pair, least: float = 1e-3) -> None:
    """Both ways have one result, and one gradient of the tensors that they share.

    least: the size below which numbers are noise, as the gradient of a bias that a softmax cancels.
    """
    ours, eager = (
        step(call, leaves, MODES[1])()
        for call, leaves in ((pair.ours, pair.ours_leaves), (pair.eager, pair.eager_leaves))
    )
    same = [True, *(x is y for x, y in zip(pair.ours_leaves, pair.eager_leaves, strict=True))]
    for got, want, shared in zip(ours, eager, same, strict=True):
        if shared:
            scale = want.abs().max().item()
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * max(scale, least))


def times(fns: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """Medians of calls in turns, in ms."""
    for fn in fns:
        for _ in range(3):
            fn()
    found: list[list[float]] = [[] for _ in fns]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found[0]) < 5:
        for fn, mine in zip(fns, found, strict=True):
            start = time.perf_counter()
            fn()
            mine.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(x) for x in found]


def measure(name: str, threads: Sequence[int], seconds: float) -> list[Row]:
    """One row a mode and number of threads, of a pair of `bench.eager`."""
    torch.manual_seed(0)
    return measure_pair(name, PAIRS[name](), threads, seconds)


def measure_pair(name: str, pair: Pair, threads: Sequence[int], seconds: float, least: float = 1e-3) -> list[Row]:
    """One row a mode and number of threads."""
    check(pair, least)
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        for mode in MODES:
            fns = [step(pair.ours, pair.ours_leaves, mode), step(pair.eager, pair.eager_leaves, mode)]
            ours, eager = times(fns, seconds)
            memory = [peak_bytes(fn, CPU) for fn in fns]
            rows.append(
                {
                    "case": name,
                    "threads": count,
                    "mode": mode,
                    "ours_ms": ours,
                    "eager_ms": eager,
                    "ratio": eager / ours,
                    "ours_bytes": memory[0],
                    "eager_bytes": memory[1],
                }
            )
    return rows


def is_behind(row: Row) -> bool:
    """Whether eager is faster, by more than 5 % and by more than `SLOWER_US`."""
    return bool(row["ratio"] < 0.95 and row["ours_ms"] - row["eager_ms"] > 1e-3 * SLOWER_US)


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows; red where eager is ahead."""
    shown = Table(title=title, pad_edge=False)
    shown.add_column("case", overflow="fold")
    for header in ("threads", "mode", "ours ms", "eager ms", "eager / ours", "ours MiB", "eager MiB"):
        shown.add_column(header, justify="right")
    for row in rows:
        memory = ("" if row[x] is None else f"{row[x] / 2**20:.1f}" for x in ("ours_bytes", "eager_bytes"))
        mode = {"forward": "fwd", "forward+backward": "fwd+bwd"}[row["mode"]]
        numbers = f"{row['ours_ms']:.3f}", f"{row['eager_ms']:.3f}", f"{row['ratio']:.2f}"
        style = "red" if is_behind(row) else None
        shown.add_row(row["case"], str(row["threads"]), mode, *numbers, *memory, style=style)
    return shown


def newest(folder: Path) -> Path | None:
    """The stored run with the latest date."""
    return max(folder.glob("cpu-*.json"), key=lambda x: json.loads(x.read_text())["date"], default=None)


def key(row: Row) -> tuple[Any, ...]:
    """What a row is of: case, threads and mode."""
    return row["case"], row["threads"], row["mode"]


def lost(now: Sequence[Row], before: Sequence[Row]) -> list[str]:
    """Which stored ratios are lost, in words."""
    stored = {key(row): row["ratio"] for row in before}
    return [
        f"{', '.join(map(str, key(row)))}: {row['ratio']:.2f}, where {stored[key(row)]:.2f} is stored"
        for row in now
        if key(row) in stored and row["ratio"] < (1 - LOSS) * stored[key(row)]
    ]


def guard(names: Sequence[str], seconds: float, path: Path) -> int:
    """1 where a ratio is lost, twice: once may be the machine."""
    before = json.loads(path.read_text())["rows"]
    failed = []
    for name in names:
        own = [row for row in before if row["case"] == name]
        threads = sorted({row["threads"] for row in own})
        if not own or not lost(measure(name, threads, seconds), own):
            continue
        failed += lost(measure(name, threads, 2 * seconds), own)
    print("\n".join([*(f"LOST {x}" for x in failed), f"{len(failed)} ratios lost against {path.relative_to(ROOT)}"]))
    return int(bool(failed))


def main(argv: Sequence[str] | None = None) -> int:
    """Time the pairs, or guard what is stored; the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", default="", help="only cases whose name has this text")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a row in one mode")
    parser.add_argument("--output", type=Path, help="default: bench/results/cpu-<name>-<date>.json")
    parser.add_argument("--guard", action="store_true", help="compare with the newest stored run, and store nothing")
    args = parser.parse_args(argv)
    names = [name for name in PAIRS if args.case in name]
    if not names:
        parser.error(f"--case: expected text of one of {', '.join(map(repr, PAIRS))}; got {args.case!r}")
    folder = ROOT / "bench" / "results"
    if args.guard:
        path = newest(folder)
        if path is None:
            parser.error(f"--guard: no cpu-*.json in {folder.relative_to(ROOT)}; run without it first")
        return guard(names, args.seconds, path)

    report = environment(CPU, [], None) | {"command": " ".join(["python -m bench.cpu", *argv]), "rows": []}
    date = report["date"][:19].replace("T", "-").replace(":", "")
    output = args.output or folder / f"cpu-{date}.json"
    for name in names:
        report["rows"] += measure(name, args.threads, args.seconds)
        store(report, output)
        row = report["rows"][-1]
        print(f"{name}: {row['ratio']:.2f} of eager's speed, {row['mode']}, {row['threads']} threads", flush=True)
    Console(width=None if sys.stdout.isatty() else 120).print(table(report["rows"], report["device"]["name"]))
    print(f"Written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
