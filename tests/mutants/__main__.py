"""Breaks a copy of the tree in one way after another, and shows which test sees it: ``make mutants``.

``python tests/mutants`` tries the listed mutants (see listed.py): each names a line, what it becomes, and the tests
that have to fail. ``--drawn 100 --seed 0`` draws as many from the syntax trees of the package (see drawn.py) and runs
the tests of the file's family. At the end every test that has killed one runs on the whole tree, where it has to
pass. The exit status is 1 where a listed mutant is not killed, or more than a tenth of those drawn survive. What ran
out of time is told apart: a loop without an end, or tests that need longer (``--seconds``).
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from drawn import draw  # noqa: E402
from listed import LISTED  # noqa: E402
from mutant import Mutant  # noqa: E402


def copy_of_the_tree(folder: Path) -> Path:
    """What the tests need, with the kernels where an installation has them."""
    tree = folder / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "results")
    for name in ("fused_attn", "kernels", "tests", "bench"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore, symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", tree)
    link = tree / "fused_attn" / "kernels"
    if not link.is_symlink():
        link.symlink_to(Path("..", "kernels"))
    return tree


def run_tests(tree: Path, tests: tuple[str, ...], seconds: float) -> tuple[str, str]:
    """("killed", the first test that failed), ("survived", "") or ("timed out", "")."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "--tb=no",
        "--tables",
        *tests,
    ]
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=None if seconds == math.inf else seconds,
        )
    except subprocess.TimeoutExpired:
        return "timed out", ""
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode == 0:
        return "survived", ""
    if done.returncode < 0:  # an address out of bounds, say
        return "killed", f"a test that ended in {signal.Signals(-done.returncode).name}"
    if found is None:  # no test was found, or the run broke: that proves nothing
        return "broken", (done.stdout + done.stderr).strip()[-400:]
    return "killed", found[1]


def try_mutant(tree: Path, mutant: Mutant, seconds: float) -> tuple[str, str]:
    """Break the tree, run the tests that name the mutant, mend the tree."""
    path = tree / mutant.path
    whole = path.read_text()
    if whole.count(mutant.old) != 1 and mutant.at is None:
        return "broken", f"{mutant.path} has the text {whole.count(mutant.old)} times, not once: {mutant.old!r}"
    try:
        path.write_text(mutant.applied_to(whole))
        return run_tests(tree, mutant.tests, seconds)
    finally:
        path.write_text(whole)


def main() -> int:
    """Try them, a process a job; print a line each and a summary."""
    parser = argparse.ArgumentParser(prog="python tests/mutants", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--drawn", type=int, default=0, metavar="N", help="draw N mutants in place of the listed ones"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="REGEX", help='those whose "path: reason" has this')
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=600.0, help="longest that the tests of one may run")
    options = parser.parse_args()
    mutants = draw(ROOT, options.drawn, options.seed) if options.drawn else list(LISTED)
    mutants = [m for m in mutants if re.search(options.only, f"{m.path}: {m.why}")]
    results: list[str] = []
    killers: set[str] = set()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        trees: Queue[Path] = Queue()
        for job in range(options.jobs):
            trees.put(copy_of_the_tree(Path(folder) / str(job)))

        def work(mutant: Mutant) -> tuple[str, str, float]:
            tree, start = trees.get(), time.monotonic()
            try:
                return *try_mutant(tree, mutant, options.seconds), time.monotonic() - start
            finally:
                trees.put(tree)

        for mutant, (state, by, took) in zip(mutants, pool.map(work, mutants), strict=True):
            results.append(state)
            killers |= {by} if by.startswith("tests/") and state == "killed" else set()
            print(f"{state:9} {took:5.0f} s  {mutant.path}: {mutant.why}\n{'':19}{by}", flush=True)
        state, by = run_tests(trees.get(), ("--long", *sorted(killers)), math.inf) if killers else ("survived", "")
    if state != "survived":
        print(f"that proves nothing: on the whole tree too it is {state}, by {by or 'no test'}")
    counts = {name: results.count(name) for name in ("killed", "timed out", "survived", "broken")}
    others = ", ".join(f"{count} {name}" for name, count in counts.items() if count and name != "killed")
    print(f"{counts['killed']} of {len(results)} killed{others and f'; {others}'}")
    enough = 0.9 * (len(results) - counts["timed out"]) if options.drawn else len(results)
    return 0 if state == "survived" and counts["killed"] >= enough else 1


if __name__ == "__main__":
    sys.exit(main())
