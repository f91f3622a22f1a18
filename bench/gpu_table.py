"""The table that ends `make gpu`: tests by family, and a line for each case of the benchmark."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# The family that a test's file is about, by how its name starts.
FAMILIES = {"location_aware": "recurrent", "word_by_word": "recurrent"} | {
    name: name for name in ("location", "concat", "general", "graph", "hierarchical", "statistics", "models")
}
BESIDE = ("graph", "reference", "compile")
PEERS = ("sdpa", "flex", "keops", "padded")
SHOWN_FAILURES = 12
WIDTH = 118


def family_of(test: str) -> str:
    """The family that a test's file is about."""
    name = Path(test.partition("::")[0]).stem.removeprefix("test_")
    return next((family for start, family in FAMILIES.items() if name.startswith(start)), "other")


def outcomes_of(path: Path) -> dict[str, Row]:
    """What became of each test, by name, from the lines of `bench.gpu_tests`: the worst of its parts."""
    order = ("passed", "skipped", "failed")
    found: dict[str, Row] = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # the line that was being written when the run was killed
            continue
        known = found.get(row["id"])
        if known is None or order.index(row["outcome"]) > order.index(known["outcome"]):
            found[row["id"]] = row
    return found


def lines_of_tests(outcomes: Mapping[str, Row]) -> list[str]:
    """Tests by family, and the first that failed."""
    counts = Counter((family_of(test), row["outcome"]) for test, row in outcomes.items())
    lines = [f"{'kernel tests':<34}{'passed':>8}{'failed':>8}{'skipped':>8}"]
    for family in [*dict.fromkeys(FAMILIES.values()), "other"]:
        numbers = [counts[family, outcome] for outcome in ("passed", "failed", "skipped")]
        if any(numbers):
            lines.append(f"{family:<34}" + "".join(f"{n:>8}" for n in numbers))
    if len(lines) == 1:
        lines.append("none ran")
    failed = [(test, row) for test, row in outcomes.items() if row["outcome"] == "failed"]
    for test, row in failed[:SHOWN_FAILURES]:
        reason = next((x[1:].strip() for x in row.get("text", "").splitlines() if x.startswith("E ")), "")
        lines.append(f"FAILED {test.removeprefix('tests/')}: {reason}"[:WIDTH])
    if len(failed) > SHOWN_FAILURES:
        lines.append(f"and {len(failed) - SHOWN_FAILURES} more, in tests.jsonl")
    return lines


def case_lines(reports: Mapping[str, Row]) -> list[str]:
    """A line a case: forward, and forward with backward.

    Time of the fused call, percent of the ceiling, the same of a replayed graph, times of eager PyTorch, of
    `torch.compile` and of the fastest other system over that of the fused call.
    """
    times: dict[tuple[str, str, str], Row] = {}  # by case, mode, and provider or "graph"
    for name, report in reports.items():
        for row in report["rows"]:
            label = f"{row['family']}/{row['case']}/{row['dtype']}"
            times[label, row["mode"], "graph" if name == "graph" else row["provider"]] = row
    if not times:
        return ["no case was measured"]
    half = f"{'ms':>9}{'ceil':>6}{'graph':>6}{'×eager':>7}{'×comp':>7}"
    lines = [f"{'':<33}{'forward':>{len(half)}} {'with backward':>{len(half)}}"]
    lines += [f"{'case':<33}{half} {half}  × peer"]
    for label in sorted({label for label, _, _ in times}):
        cells = [
            _half(times.get((label, mode, "fused")), *(times.get((label, mode, x), {}) for x in BESIDE))
            for mode in ("forward", "forward+backward")
        ]
        fused = times.get((label, "forward", "fused"), {})
        peers = [
            (times[label, "forward", peer]["median_ms"] / fused["median_ms"], peer)
            for peer in PEERS
            if "median_ms" in times.get((label, "forward", peer), {}) and "median_ms" in fused
        ]
        fastest = "{1} {0:.2f}".format(*min(peers)) if peers else ""
        lines.append(f"{_short(label):<33}{cells[0]} {cells[1]}  {fastest}".rstrip())
    return lines


def _short(label: str) -> str:
    family, case, dtype = label.split("/")
    return f"{family}/{case}"[:29] + {"bfloat16": " bf16", "float16": " f16", "float32": " f32"}.get(dtype, dtype)


def _half(fused: Row | None, graph: Row, eager: Row, compiled: Row) -> str:
    """Time, percent of the ceiling, the same of a graph's replay, and how many times faster than the others."""
    if fused is None:
        return " " * 35
    if "median_ms" not in fused:
        return f"{'FAILED':>9}" + " " * 26
    ms = fused["median_ms"]
    ratios = (f"{x['median_ms'] / ms:.2f}" if "median_ms" in x else "" for x in (eager, compiled))
    replay = f"{graph['percent_of_ceiling']:.0f}%" if "percent_of_ceiling" in graph else ""
    return f"{ms:>9.4f}{fused['percent_of_ceiling']:>5.0f}%{replay:>6}" + "{:>7}{:>7}".format(*ratios)


def table(facts: Mapping[str, Any], outcomes: Mapping[str, Row], reports: Mapping[str, Row]) -> str:
    """What was found, a screen long."""
    commit = (facts.get("commit") or "unknown")[:12] + (" with changes" if facts.get("dirty") else "")
    head = f"{facts.get('device')}, torch {facts.get('torch')}, Triton {facts.get('triton')}, commit {commit}"
    lines = [
        head,
        *textwrap.wrap(", ".join(_step(step) for step in facts.get("steps", ())), WIDTH),
        "",
        *lines_of_tests(outcomes),
        "",
    ]
    lines += case_lines(reports)
    wrong = {
        f"{row['family']}/{row['case']}/{row['dtype']}: {row['failure'].splitlines()[0]}": None
        for report in reports.values()
        for row in report["rows"]
        if row["provider"] == "fused" and "failure" in row
    }
    lines += [f"FAILED {text}"[:WIDTH] for text in list(wrong)[:SHOWN_FAILURES]]
    if facts.get("counters"):
        lines += ["", f"{'counters (% of peak)':<34}{'SM':>8}{'DRAM':>8}{'L2':>8}{'warps':>8}{'registers':>11}"]
        lines += [_counters(row) for row in facts["counters"]]
    if facts.get("sanitizer"):
        lines += ["", *(f"{tool:<34}{word}"[:WIDTH] for tool, word in facts["sanitizer"].items())]
    return "\n".join(lines) + "\n"


def _step(step: Row) -> str:
    if "skipped" in step:
        return f"{step['step']} skipped: {step['skipped']}"
    if "seconds" not in step:
        return f"{step['step']} running"
    return f"{step['step']} {step['seconds']:.0f} s{' (cut off)' if step['cut_off'] else ''}"


def _counters(row: Row) -> str:
    peaks = ("sm__throughput", "dram__throughput", "lts__throughput")
    fields = [f"{name}.avg.pct_of_peak_sustained_elapsed" for name in peaks]
    fields.append("sm__warps_active.avg.pct_of_peak_sustained_active")
    cells = "".join(f"{row.get(name, ''):>8}" for name in fields)
    return f"{row['kernel']:<34}{cells}{row.get('launch__registers_per_thread', ''):>11}"
