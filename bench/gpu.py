"""All that a machine with a GPU should be asked, in a few minutes: `make gpu`, or `python -m bench.gpu --minutes 9`.

First all cores compile what the benchmark launches, so that its steps, each in one process, load kernels from
Triton's cache. Then the most valuable comes first: kernel tests, in an order that is fair to all families when it is
cut off; the benchmark in bfloat16, checked against float64 before it is timed; the same without the gaps between
launches; torch.compile; other systems; float32; hardware counters of six kernels where `ncu` may read them;
`compute-sanitizer` over one small case of each kernel, where it runs. Every step has a share of the minutes, and
what one leaves goes to the next ones. No failure stops a later step.

Needs a Python with torch, Triton, pytest and hypothesis (with pytest-xdist tests run side by side), and no network.
Results come as they are made, and a run that is killed keeps them, in bench/results/<device>-<date>/ or in $OUT:

    machine.json  device, versions, commit; each step with its seconds; counters; what the sanitizer found
    tests.jsonl   a line a test
    bench.json    the report of each run of bench.run
    log.txt       what every step printed
    table.txt     the table that is printed at the end, so far

The exit status is 0 if tests passed and nothing was wrong, 1 if something was, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .gpu_table import outcomes_of, table

ROOT = Path(__file__).resolve().parent.parent
LOG_BYTES = 12 * 2**20
SAVE_SECONDS = 10.0
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 9  # exit status of compute-sanitizer that means a finding
OURS = re.compile(r"_\w+_kernel")  # names of the package's kernels
COUNTED_CASES = ("location/gated-batch/bfloat16", "concat/square/bfloat16", "general/dot-128/bfloat16")
COUNTED_KERNELS = (
    "_location_fwd_kernel",
    "_location_bwd_dz_kernel",
    "_concat_fwd_kernel",
    "_concat_bwd_dq_kernel",
    "_concat_bwd_dkv_kernel",
    "_general_fwd_kernel",
)
COUNTERS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed.avg.per_cycle_active",
    "sm__inst_executed_pipe_tensor.sum",
    "sm__inst_executed_pipe_xu.sum",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
    "launch__registers_per_thread",
)
PROBE = """
import json, sys
try:
    import torch
except ImportError:
    sys.exit("torch is not installed in " + sys.executable)
if not torch.cuda.is_available():
    sys.exit("torch.cuda.is_available() is False on this machine")
properties = torch.cuda.get_device_properties(0)
try:
    import triton
    version = triton.__version__
except ImportError:
    version = None
print(json.dumps({
    "device": properties.name, "capability": list(torch.cuda.get_device_capability(0)),
    "memory_bytes": properties.total_memory, "processors": properties.multi_processor_count,
    "python": sys.version.split()[0], "torch": torch.__version__, "triton": version, "cuda": torch.version.cuda,
}))
"""


@dataclass
class Step:
    """A part of the day: commands that run side by side."""

    name: str
    weight: float
    """Seconds of the default nine minutes."""
    commands: list[list[str]]
    report: bool = False
    """Whether the commands write a report of `bench.run` to the path that stands for REPORT in them."""
    missing: str = ""
    """Why it can't run here."""


REPORT = "<report>"


def shares(left: float, weights: Sequence[float]) -> float:
    """Seconds for the first of the steps to come, of those that are left: in the end nothing is left over."""
    return max(0.0, left) * weights[0] / sum(weights)


@dataclass
class Day:
    """The folder of results, the clock, and what is known so far."""

    folder: Path
    seconds: float
    start: float = field(default_factory=time.monotonic)
    stopped: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    reports: dict[str, Any] = field(default_factory=dict)
    saved: float = 0.0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.facts |= {"minutes": self.seconds / 60, "steps": [], "counters": [], "sanitizer": {}}

    def left(self) -> float:
        """Seconds until the end."""
        return self.start + self.seconds - time.monotonic()

    def stop(self, *_: object) -> None:
        """End what runs, and begin nothing more: what a signal does."""
        self.stopped = True

    def text(self) -> str:
        """The table so far."""
        return table(self.facts, outcomes_of(self.folder / "tests.jsonl"), self.reports)

    def save(self) -> None:
        """Write what is known; a file is replaced whole."""
        self.saved = time.monotonic()
        texts = {"machine.json": json.dumps(self.facts, indent=1) + "\n", "table.txt": self.text()}
        if self.reports:
            texts["bench.json"] = json.dumps(self.reports, indent=1) + "\n"
        for name, text in texts.items():
            fresh = self.folder / f".{name}"
            fresh.write_text(text)
            fresh.replace(self.folder / name)

    def take_report(self, name: str, path: Path) -> None:
        """Read what `bench.run` has stored so far."""
        if path.exists():
            self.reports[name] = json.loads(path.read_text())

    def run(self, step: Step, cap: float, environment: dict[str, str]) -> list[int]:
        """Run the commands for at most `cap` seconds: their exit statuses, and what they printed in the log.

        Before the time is up they are interrupted, and have a moment to store what they have; then they are killed.
        """
        begin = time.monotonic()
        row: dict[str, Any] = {"step": step.name, "cap_seconds": round(cap, 1)}
        self.facts["steps"].append(row)
        if step.missing or cap < 1 or self.stopped:
            row["skipped"] = step.missing or "no time was left"
            self.save()
            return []
        grace = min(10.0, 0.2 * cap)
        log = self.folder / "log.txt"
        with tempfile.TemporaryDirectory() as temporary, log.open("ab") as out:
            out.write(f"\n===== {step.name}, at most {cap:.0f} s\n".encode())
            out.flush()
            offset, report = out.tell(), Path(temporary) / "report.json"
            streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
            running = []
            for command in step.commands:
                filled = [str(report) if word == REPORT else word for word in command]
                running.append(subprocess.Popen(filled, cwd=ROOT, env=environment, start_new_session=True, **streams))
            end, interrupted = begin + cap, False
            while any(child.poll() is None for child in running):
                now = time.monotonic()
                if self.stopped:
                    end = min(end, now + grace) if not interrupted else end
                if now >= end:
                    break
                if (self.stopped or now >= end - grace) and not interrupted:
                    interrupted = True
                    for child in running:
                        if child.poll() is None:
                            child.send_signal(signal.SIGINT)
                if now - self.saved > SAVE_SECONDS:
                    if step.report:
                        self.take_report(step.name, report)
                    self.save()
                time.sleep(0.1)
            for child in running:  # and what it has started: workers, compilers
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
            statuses = [child.wait() for child in running]
            if step.report:
                self.take_report(step.name, report)
        printed = log.read_bytes()[offset:].decode(errors="replace").strip().splitlines()
        row |= {"seconds": round(time.monotonic() - begin, 1), "statuses": statuses, "cut_off": interrupted}
        row["last_line"] = printed[-1][:150] if printed else ""
        shorten(log)
        self.save()
        return statuses


def shorten(log: Path) -> None:
    """The first and the last of a log that has become too long to be sent."""
    data = log.read_bytes()
    if len(data) > LOG_BYTES:
        log.write_bytes(data[: LOG_BYTES // 3] + b"\n[...]\n" + data[-LOG_BYTES // 2 :])


def steps(
    python: str, commit: str | None, has: Callable[[str], bool], which: Callable[[str], str | None]
) -> list[Step]:
    """The steps in their order; `has` tells whether Python can import a module, `which` where a program is."""

    def bench(*options: str) -> list[list[str]]:
        of = ["--commit", commit] if commit else []
        return [[python, "-m", "bench.run", "--quick", "--device", "cuda", *options, *of, "--output", REPORT]]

    def providers(*names: str) -> list[str]:
        return [word for name in names for word in ("--provider", name)]

    cores = os.cpu_count() or 1
    workers, parts = max(1, min(12, cores - 2)), max(1, min(15, cores - 1))
    beside = ["-n", str(workers)] if has("xdist") else []
    limit = ["--timeout=60"] if has("pytest_timeout") else []
    plugins = ["-p", "bench.gpu_tests", "-p", "no:cacheprovider"]
    tests = [python, "-m", "pytest", "--gpu", "-m", "kernel", "--fair", *plugins]
    tests += ["--continue-on-collection-errors", "--tb=short", "-q", *beside, *limit]
    peers = ["sdpa", "flex", "padded", *(["keops"] if has("pykeops") else [])]
    small = [python, "-m", "bench.one", "--small"]
    ncu, sanitizer = which("ncu"), which("compute-sanitizer")
    counted = [ncu or "ncu", "--csv", "--page", "raw", "--clock-control", "none", "--metrics", ",".join(COUNTERS)]
    counted += ["--kernel-name", f"regex:^({'|'.join(COUNTED_KERNELS)})$", python, "-m", "bench.one", *COUNTED_CASES]

    def sanitized_by(tool: str) -> list[str]:
        # The prefix of its lines tells in the log which of the four has found what.
        told = ["--prefix", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
        products = ["--host-products"] if tool == "initcheck" else []
        return [sanitizer or "", "--tool", tool, *told, *small, *products]

    return [
        # Predicted for an H200 and 16 cores, not measured: compile 25 s, bfloat16 40, graph 20, float32 20. Tests
        # would take 550 and torch.compile 250: both are cut off.
        Step("compile", 35, [[python, "-m", "bench.one", "--part", str(i), str(parts)] for i in range(parts)]),
        Step("tests", 200, [tests]),
        Step("bfloat16", 60, bench("--case", "bfloat16", *providers("fused", "reference")), report=True),
        Step("graph", 35, bench("--case", "bfloat16", "--graph", *providers("fused")), report=True),
        Step("torch.compile", 80, bench("--case", "bfloat16", *providers("compile")), report=True),
        Step("peers", 35, bench("--case", "bfloat16", *providers(*peers)), report=True),
        Step("float32", 30, bench("--case", "float32", *providers("fused", "reference")), report=True),
        Step("counters", 20, [counted], missing="" if ncu else "ncu is not installed"),
        Step(
            "sanitizer",
            45,
            [sanitized_by(tool) for tool in TOOLS],
            missing="" if sanitizer else "compute-sanitizer is not installed",
        ),
    ]


def counters(printed: str) -> list[dict[str, Any]]:
    """One row a kernel of ncu's raw page: the first launch of each."""
    lines = printed.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        return []
    found: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(line for line in lines[header:] if line.startswith('"')):
        name = row.get("Kernel Name")
        if row.get("ID") and name and name not in found:
            found[name] = {"kernel": name} | {key: row[key] for key in COUNTERS if row.get(key)}
    return list(found.values())


def sanitized(statuses: Sequence[int], printed: str) -> dict[str, str]:
    """What each tool said of the package's kernels: "clean", "FOUND ...", or that it did not run to its end."""
    refused = re.search(r"(?i)(not supported|unable to|permission|insufficient)[^\n]*", printed)
    why = f"did not finish{': ' + refused[0][:100] if refused else ''}"
    return {
        tool: {0: "clean", FOUND: findings(tool, printed)}.get(status, why)
        for tool, status in zip(TOOLS, statuses, strict=False)
    }


def findings(tool: str, printed: str) -> str:
    """What a tool found in the package's kernels. What it found in others, as in cuBLAS's, is counted and ignored."""
    lines = [x.removeprefix(tool).rstrip() for x in printed.splitlines() if x.split(" ")[0] == tool]
    ours: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for block in "\n".join(lines).split("\n\n"):
        if names := re.findall(r" at (.+?)\+0x", block):
            own = [name for name in names if OURS.fullmatch(name)]
            (ours if own else others)[(own or names)[0]] += 1
    counted = re.search(r"SUMMARY: (\d+)", "\n".join(lines))
    known = counted is not None and int(counted[1]) == others.total()  # all were printed, and each names a kernel
    word = "clean" if known else "FOUND SOMETHING, see log.txt"
    if ours:
        word = f"FOUND {ours.total()} in {', '.join(ours)}, see log.txt"
    return word + (f"; ignored {others.total()} in {', '.join(others)}" if others else "")


def install(day: Day, python: str, environment: dict[str, str]) -> Path | None:
    """Install the package; where that fails, a link that makes its kernels importable here, to be removed."""
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", "."]
    day.run(Step("install", 0, [pip]), min(60.0, 0.15 * day.seconds), environment)
    check = [python, "-c", "import os, fused_attn.kernels.chip as chip; print(os.path.realpath(chip.__file__))"]
    link = ROOT / "fused_attn" / "kernels"
    done = subprocess.run(check, cwd=ROOT, env=environment, capture_output=True, text=True)
    ours = done.stdout.strip() == str(ROOT / "kernels" / "chip.py")  # not those of another tree, installed before
    if ours or link.exists():
        return None
    link.symlink_to("../kernels")
    return link


def whole_day(day: Day, python: str, commit: str | None) -> int:
    """All steps; the exit status."""
    environment = {name: x for name, x in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment |= {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    environment["FUSED_ATTN_TEST_RESULTS"] = str(day.folder / "tests.jsonl")
    link = install(day, python, environment)
    try:
        todo = steps(python, commit, lambda name: importlib.util.find_spec(name) is not None, shutil.which)
        for i, step in enumerate(todo):
            weights = [0.0 if x.missing else x.weight for x in todo[i:]]
            cap = 0.0 if step.missing or day.stopped else shares(day.left() - 3, weights)
            log = day.folder / "log.txt"
            before = log.stat().st_size if log.exists() else 0
            statuses = day.run(step, cap, environment)
            printed = log.read_bytes()[min(before, log.stat().st_size) :].decode(errors="replace")
            if step.name == "counters" and statuses:
                day.facts["counters"] = counters(printed)
                if "ERR_NVGPUCTRPERM" in printed:
                    day.facts["steps"][-1]["skipped"] = "this user may not read the counters"
            if step.name == "sanitizer" and statuses:
                day.facts["sanitizer"] = sanitized(statuses, printed)
            row = day.facts["steps"][-1]
            word = row.get("skipped") or f"{row['statuses']} in {row['seconds']} s: {row['last_line']}"
            print(f"== {step.name}: {word}", flush=True)
    finally:
        if link is not None:
            link.unlink(missing_ok=True)
        day.save()
    outcomes = outcomes_of(day.folder / "tests.jsonl")
    wrong = [
        r for report in day.reports.values() for r in report["rows"] if r["provider"] == "fused" and "failure" in r
    ]
    found = any(word.startswith("FOUND") for word in day.facts["sanitizer"].values())
    passed = any(row["outcome"] == "passed" for row in outcomes.values())
    return int(bool(wrong) or found or not passed or any(row["outcome"] == "failed" for row in outcomes.values()))


def git(*words: str) -> str | None:
    """What git prints, or None where there is none."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True) if shutil.which("git") else None
    return done.stdout.strip() if done is not None and done.returncode == 0 else None


def main(argv: Sequence[str] | None = None) -> int:
    """Find the GPU, run the day, print the table; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: 9)")
    parser.add_argument("--output", type=Path, help="default: $OUT, or bench/results/<device>-<date>/")
    parser.add_argument("--commit", help="commit to record where the copy has no .git")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes: expected more than 0; got {args.minutes}")
    start, date = time.monotonic(), datetime.datetime.now(datetime.timezone.utc)
    try:
        probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=90, cwd="/")
        found = json.loads(probe.stdout.splitlines()[-1]) if probe.returncode == 0 else None
        why = "" if found else (probe.stderr.strip().splitlines() or ["no answer"])[-1]
    except subprocess.TimeoutExpired:
        found, why = None, "it did not answer within 90 s"
    if found is None:
        print(f"make gpu needs a GPU, and found none: {why}.", file=sys.stderr)
        return 2
    name = re.sub(r"\W+", "-", found["device"]).strip("-").lower()
    default = Path(os.environ.get("OUT") or ROOT / "bench" / "results" / f"{name}-{date:%Y-%m-%d-%H%M%S}")
    day = Day((args.output or default).resolve(), 60 * args.minutes, start)
    commit = args.commit or git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--", ".", ":!bench/results")
    dirty = None if changes is None else bool(changes)
    when = date.isoformat(timespec="seconds")
    day.facts = {**found, "date": when, "commit": commit, "dirty": dirty, "driver": driver(), **day.facts}
    before = {number: signal.signal(number, day.stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        day.save()
        status = whole_day(day, sys.executable, commit)
        print(f"\n{day.text()}\nResults: {day.folder}", flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status


def driver() -> str | None:
    """Driver, clocks and power limit, as nvidia-smi says them."""
    fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
