"""The list of mutants follows the code, and the runner tells a killed one from one that survives."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "mutants"))

from drawn import TESTS, draw  # noqa: E402
from listed import LISTED  # noqa: E402


def test_listed_mutants_stand_once_and_name_tests_that_are_there():
    for mutant in LISTED:
        source = (ROOT / mutant.path).read_text()
        assert source.count(mutant.old) == 1, mutant
        compile(mutant.applied_to(source), mutant.path, "exec")
        files = [ROOT / test for test in mutant.tests if test.startswith("tests/")]
        assert files, mutant
        assert all(file.is_file() for file in files), mutant
        if "-k" in mutant.tests:
            text = "".join(file.read_text() for file in [*files, *(ROOT / "tests").glob("_*.py")])  # where tables are
            words = re.split(" or | and ", mutant.tests[mutant.tests.index("-k") + 1])
            assert all(word in text for word in words), mutant
    assert len({(m.path, m.why) for m in LISTED}) == len(LISTED)


def test_every_kernel_and_every_python_path_has_a_listed_mutant():
    mutated = {m.path for m in LISTED}
    kernels = {f"kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py") if "_kernel(" in p.read_text()}
    assert kernels <= mutated
    modules = {f"fused_attn/modules/{p.name}" for p in (ROOT / "fused_attn" / "modules").glob("[!_]*.py")}
    paths = ["location", "location_aware", "general", "hierarchical", "recurrent", "statistics", "graph", "reference"]
    paths += ["target"]
    paths += ["blocked/location", "blocked/concat", "_location_windowed", "_ragged_rnn"]
    paths += ["_ops", "_operators", "_checks"]
    assert modules | {f"fused_attn/{name}.py" for name in paths} <= mutated
    assert len(LISTED) >= 60


def test_drawn_mutants_are_python_and_the_same_for_a_seed():
    mutants = draw(ROOT, 60, 5)
    assert mutants == draw(ROOT, 60, 5)
    assert len({(m.path, m.why.split(":")[0]) for m in mutants}) == 60
    for mutant in mutants:
        source = (ROOT / mutant.path).read_text()
        changed = mutant.applied_to(source)
        assert changed != source
        compile(changed, mutant.path, "exec")
    assert all((ROOT / test).is_file() for tests in TESTS.values() for test in tests)


def test_runner_counts_what_is_killed():
    command = [sys.executable, "tests/mutants", "--only", "leaky_relu has another slope", "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 killed" in done.stdout
