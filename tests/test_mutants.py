"""The list of mutants follows the code, and the runner tells a killed one from one that survives."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "mutants"))

from drawn import draw  # noqa: E402
from listed import LISTED  # noqa: E402


@pytest.mark.parametrize("mutant", LISTED, ids=lambda m: f"{Path(m.path).name}: {m.why}")
def test_listed_mutants_stand_once_and_name_tests_that_are_there(mutant):
    source = (ROOT / mutant.path).read_text()
    assert source.count(mutant.old) == 1
    compile(mutant.applied_to(source), mutant.path, "exec")
    assert mutant.tests
    for test in mutant.tests:
        assert (ROOT / test.split("::")[0]).is_file()


def test_every_kernel_and_every_family_has_a_listed_mutant():
    mutated = {m.path for m in LISTED}
    kernels = {f"kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py") if "_kernel(" in p.read_text()}
    assert kernels <= mutated
    assert len(LISTED) >= 40


def test_drawn_mutants_are_python_and_the_same_for_a_seed():
    mutants = draw(ROOT, 60, 5)
    assert mutants == draw(ROOT, 60, 5)
    assert len({(m.path, m.why.split(":")[0]) for m in mutants}) == 60
    for mutant in mutants:
        source = (ROOT / mutant.path).read_text()
        changed = mutant.applied_to(source)
        assert changed != source
        compile(changed, mutant.path, "exec")


def test_runner_counts_what_is_killed():
    command = [sys.executable, "tests/mutants", "--only", "leaky_relu has another slope", "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 killed" in done.stdout
