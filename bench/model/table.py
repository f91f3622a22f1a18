"""Predicted time of every op in the registry on a chip that is not there. Nothing here is measured but what says so.

    python -m bench.model [--chip sm_90] [--family location] [--case TEXT] [--mode forward] [--kernels] [--json]

The calls run on tensors without numbers up to the driver; every kernel is compiled, and a few programs of its grid
are walked (`walk.py`), which tells trip counts, bytes, and operations. Predicted time of a launch: the unit that is
longest (matrix, FMA, special functions, issue slots, shared memory, L2, memory), what is serial, and what a launch
takes (`predict.py`, constants with sources in `chips.toml`); PyTorch's own kernels are not counted. Beside it: the
floor (bytes or FLOPs of the formula by the chip's rates), the textbook formula's operators counted the same way,
eager and compiled (`operators.py`), and SDPA where it can compute the case (its products at the share of the matrix
rate that it had on an H200, its bytes once).

`ratios.json` has predicted over measured of the kernels that an H200 has run, the model applied to them as they were.
A family with such a ratio outside 0.7 to 1.4, or with none, quotes no predictions for any chip: its cells say so.

sm_100 and gfx942 are not here: the one's products are tcgen05, whose shapes are in descriptors and not in the text,
the other has no PTX. Of both `bench.compile_report` tells registers, shared memory and instructions an element.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from . import launches as launching  # before the kernels, which are then not the interpreter's

# isort: split

import torch
from rich.console import Console
from rich.table import Table

from ..families import REGISTRY
from ..families.problem import MODES, Case, Op
from ..run import label, select
from . import operators
from .predict import executed, predict
from .rates import CHIPS, Chip

HELD: dict[str, Any] = json.loads((Path(__file__).parent / "ratios.json").read_text())  # an H200's
TRUSTED = (0.7, 1.4)  # predicted over measured
SDPA_SHARE = 0.68  # of the matrix rate: 670 of 989 TFLOPS, general/shared on an H200 (bench.json, `peers`)


def ratios() -> dict[str, list[float]]:
    """Predicted over measured by family, of the kernels that were measured."""
    found: dict[str, list[float]] = {}
    for row in HELD["rows"]:
        found.setdefault(row["case"].split("/")[0], []).append(row["predicted_ms"] / row["measured_ms"])
    return found


def trusted() -> set[str]:
    """Families whose predictions may be quoted: every such ratio is within `TRUSTED`, and there is one."""
    return {family for family, x in ratios().items() if TRUSTED[0] <= min(x) and max(x) <= TRUSTED[1]}


def reasons(families: set[str]) -> str:
    """Why families quote nothing."""
    known = ratios()
    told = [
        f"{x}: {min(known[x]):.2f} to {max(known[x]):.2f}" if x in known else f"{x}: none" for x in sorted(families)
    ]
    return f"No predictions are quoted where predicted / measured is not within 0.7 to 1.4: {', '.join(told)}."


def textbook(op: Op, case: Case, mode: str, chip: Chip) -> dict[str, float] | None:
    """Predicted ms of the reference's operators, eager and compiled; None where they ask what numbers are."""
    with torch.device("meta"), launching.Untouched():
        try:
            inputs = op.inputs(case.sizes, case.dtype, torch.device("cpu"), 0)
            inputs = {k: v.to("meta") for k, v in inputs.items()}
            options = op.options(case.sizes)
            with operators.Operators() as seen:
                launching.step(lambda **x: op.call(**x, **options, impl="reference"), inputs, mode)
        except Exception:
            return None
    return {"eager_ms": operators.eager(seen.found, chip)[0], "compiled_ms": operators.compiled(seen.found, chip)[0]}


def _floor(op: Op, case: Case, mode: str, chip: Chip) -> tuple[float, str]:
    cost = op.work(case, mode)
    flops = chip.fma_flops if case.dtype == torch.float32 else 1e12 * chip.matrix
    times = {"memory": 1e3 * cost.bytes / chip.dram_bytes, "compute": 1e3 * cost.flops / flops}
    bound = max(times, key=lambda x: times[x])
    return times[bound], bound


def row_of(op: Op, case: Case, mode: str, target: str) -> dict[str, Any]:
    """What is predicted of one case in one mode."""
    chip = CHIPS[target]
    row: dict[str, Any] = {"family": op.family, "case": label(op, case), "mode": mode, "chip": target}
    try:
        with launching.recorded(target) as found:
            launching.run(op, case.sizes, case.dtype, mode)
    except Exception as error:
        return row | {"failure": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
    times = [predict(x, target, chip) for x in found]
    longest = max(times, key=lambda x: x.ms)
    total = sum(x.ms for x in times)
    floor, bound = _floor(op, case, mode, chip)
    row |= {"predicted_ms": total, "bound": f"{longest.name}: {longest.bound}", "launches": len(found)}
    row |= {"floor_ms": floor, "floor": bound, **(textbook(op, case, mode, chip) or {})}
    if "sdpa" in op.peers(case.sizes) and mode == MODES[0]:
        cost = op.work(case, mode)
        row["sdpa_ms"] = 1e3 * max(cost.flops / (1e12 * chip.matrix * SDPA_SHARE), cost.bytes / chip.dram_bytes)
        row["sdpa_ms"] += 1e-3 * chip.launch_us
    for was in HELD["rows"]:
        if (was["case"], was["mode"], target) == (row["case"], mode, "sm_90"):
            row |= {"measured_ms": was["measured_ms"], "measured_commit": was["commit"]}
            row["ratio"] = was["predicted_ms"] / was["measured_ms"]
    row["kernels"] = [
        {"kernel": x.name, "grid": x.grid, "predicted_ms": t.ms, "bound": t.bound, "clocks": t.units}
        | {"loop_by_loop": executed(x)[1], "not_walked": sorted(x.counts.unknown)}
        for x, t in zip(found, times, strict=True)
    ]
    return row


def table(rows: list[dict[str, Any]], chip: str, *, kernels: bool) -> Table:
    """A line a case and mode."""
    out = Table(title=f"Predicted, not measured, for {CHIPS[chip].name} ({chip})", pad_edge=False)
    out.add_column("case, mode", overflow="fold")
    for name in ("predicted ms", "bound by", "floor ms", "predicted x eager", "x compiled", "x SDPA"):
        out.add_column(name, justify="right", overflow="fold")
    for name in ("measured, of older kernels, ms", "predicted / measured of those"):
        out.add_column(name, justify="right", overflow="fold")
    quoted = trusted()
    for row in rows:
        name = f"{row['case']}, {row['mode']}"
        if "failure" in row:
            out.add_row(name, row["failure"], style="red")
            continue
        times = [
            f"{row[k] / row['predicted_ms']:.2f}" if k in row else "" for k in ("eager_ms", "compiled_ms", "sdpa_ms")
        ]
        cells = [f"{row['predicted_ms']:.4f}", row["bound"], f"{row['floor_ms']:.4f}", *times]
        if row["family"] not in quoted:
            cells = ["not quoted", row["bound"], f"{row['floor_ms']:.4f}", "", "", ""]
        known = [f"{row['measured_ms']:.4f}", f"{row['ratio']:.2f}"] if "ratio" in row else ["", ""]
        out.add_row(name, *cells, *known)
        for x in row["kernels"] if kernels else ():
            units = " ".join(f"{k} {v:.0f}" for k, v in x["clocks"].items() if v >= 1)
            out.add_row(f"  {x['kernel']} {x['grid']}", f"{x['predicted_ms']:.4f}", units)
    return out


def main(argv: list[str] | None = None) -> int:
    """Print what is predicted; 1 if a case could not be."""
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chip", choices=list(CHIPS), default="sm_90")
    parser.add_argument("--family", choices=[op.family for op in REGISTRY])
    parser.add_argument("--case", default="", help="only cases whose family/name/dtype contains this")
    parser.add_argument("--mode", choices=MODES)
    parser.add_argument("--kernels", action="store_true", help="clocks by unit of every launch")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    chosen = list(select("cuda", args.family, args.case))
    if not chosen:
        parser.error(f"no case matches {args.case!r}")
    rows = [row_of(op, case, mode, args.chip) for op, case in chosen for mode in MODES if args.mode in (None, mode)]
    quoted = trusted()
    for row in rows:
        row["quoted"] = row["family"] in quoted
    silent = reasons({row["family"] for row in rows} - quoted)
    if args.json:
        print(json.dumps({"what": f"Predicted, not measured. {silent}", "rows": rows}))
    else:
        Console(width=None if sys.stdout.isatty() else 180).print(table(rows, args.chip, kernels=args.kernels))
        print(f"Predicted, not measured. {silent}")
    return int(any("failure" in row for row in rows))
