"""The guards in conftest.py: tests of the tests."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SKIPPED = """
import pytest

@pytest.mark.kernel
def test_skipped():
    pytest.skip("no reason at all")

def test_without_a_kernel():
    pass
"""
ONE_RUNS = (
    SKIPPED
    + """
@pytest.mark.kernel
def test_runs():
    pass
"""
)
needs_xdist = pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="pytest-xdist is not installed")


@pytest.mark.parametrize(
    ("tests", "options", "status"),
    [
        pytest.param(SKIPPED, [], 1, id="all skipped"),
        pytest.param(SKIPPED, ["-n", "1"], 1, id="all skipped under xdist", marks=needs_xdist),
        pytest.param(ONE_RUNS, [], 0, id="one runs"),
    ],
)
def test_session_fails_iff_every_kernel_test_was_skipped(tests, options, status, tmp_path):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_it.py").write_text(tests)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = kernel\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("all 1 selected kernel tests were skipped" in done.stdout) == bool(status)


def test_memory_that_the_package_asks_for_is_poisoned(device):
    def allocate(module):
        x = torch.zeros(3, device=device)
        names = {"__name__": module, "torch": torch, "x": x}
        exec(
            "made = [torch.empty(3, device=x.device), torch.empty_like(x), x.new_empty(3),"
            " torch.empty_strided((3,), (1,), device=x.device), torch.empty(3, dtype=torch.int32, device=x.device)]",
            names,
        )
        return names["made"]

    *floats, integers = allocate("fused_attn.somewhere")
    assert all(x.isnan().all() for x in floats)
    assert (integers == -(2**30)).all()
    *floats, _ = allocate("elsewhere")
    assert not any(x.isnan().all() for x in floats)
