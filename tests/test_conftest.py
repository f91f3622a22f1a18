"""The guards in conftest.py: tests of the tests."""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest
import hypothesis
import pytest
import torch

SKIPPED = """
import pytest

@pytest.mark.kernel
def test_skipped(device):
    pytest.skip("no reason at all")

def test_without_a_kernel():
    pass
"""
ONE_RUNS = (
    SKIPPED
    + """
@pytest.mark.kernel
def test_runs(device):
    pass
"""
)
TWO_DEVICES = """
import pytest
import torch
from fused_attn import general_attention

pytestmark = pytest.mark.kernel
MASK = torch.ones(3, dtype=torch.bool)

def x(device=None):
    return torch.randn(2, 3, 4, device=device)

def test_kernel(device):
    general_attention(x(), x(), impl="triton")

def test_validation(device):
    general_attention(x(device), x(), impl="triton")

def test_operation(device):
    x(device) + torch.arange(4)

def test_constant(device):
    x(device).masked_fill(MASK[:, None], 0)

def test_module(device):
    torch.nn.Linear(4, 4)(x(device))

def test_moved(device):
    module = torch.nn.Linear(4, 4).to(device)
    module(x().to(device) + torch.arange(4, device=x(device).device)).sum().backward()
    assert module.weight.grad.device == device
    module.weight.grad + module.weight * x(device)[0, 0] * torch.tensor(2.0)

def test_indices(device):
    assert x(device)[:, MASK].cpu().numpy().shape == x().numpy().shape

def test_gradients(device):
    leaves = [x(device).requires_grad_() for _ in range(2)]
    torch.autograd.grad(general_attention(*leaves, impl="triton").sum(), leaves)[0] + x(device)

def test_of_the_host(device):
    assert (x() + torch.arange(4)).device != x(device).device or device.index is None
"""
needs_xdist = pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="pytest-xdist is not installed")
NAMES = [f"{file}.py::test_{i}" for file in "ab" for i in range(200)]
LONG = """
import pytest

@pytest.mark.long
def test_long():
    pass

def test_short():
    pass
"""


def run(folder: Path, *options: str, **files: str) -> subprocess.CompletedProcess[str]:
    """pytest in `folder` on these files, with the conftest beside this one."""
    for name in ("conftest.py", "_devices.py", "_interpreter.py"):
        shutil.copy(Path(__file__).with_name(name), folder)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = kernel\n    long\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("tests", "options", "status"),
    [
        pytest.param(SKIPPED, [], 1, id="all skipped"),
        pytest.param(SKIPPED, ["-n", "1"], 1, id="all skipped under xdist", marks=needs_xdist),
        pytest.param(ONE_RUNS, [], 0, id="one runs"),
    ],
)
def test_session_fails_iff_every_kernel_test_was_skipped(tests, options, status, tmp_path):
    done = run(tmp_path, *options, test_it=tests)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("all 1 selected kernel tests were skipped" in done.stdout) == bool(status)


def test_a_kernel_test_that_takes_no_device_is_refused(tmp_path):
    done = run(tmp_path, test_it=ONE_RUNS.replace("test_runs(device)", "test_runs()"))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.strip().endswith("without the fixture `device`: test_it.py::test_runs")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the kernels need Triton")
def test_tensors_of_two_devices_do_not_meet(tmp_path):
    done = run(tmp_path, "--devices", "-rA", test_it=TWO_DEVICES)
    failed = sorted(re.findall(r"^FAILED test_it.py::test_(\w+)", done.stdout, re.MULTILINE))
    assert failed == ["constant", "kernel", "module", "operation", "validation"], done.stdout + done.stderr
    assert "4 passed" in done.stdout


def collected(names: list[str], marked: tuple[str, ...] = (), **options) -> list[str]:
    """Which of the tests `names` a run with these options has, in its order."""
    options = {"sample": (1, 1), "rest": (1, 1), "fair": False, "long": False} | options
    gone: list = []
    hook = SimpleNamespace(pytest_deselected=lambda items: gone.extend(items))
    long = set(marked)
    items = [
        SimpleNamespace(
            nodeid=name,
            fixturenames=("device",),
            get_closest_marker=lambda marker, name=name: True if marker == "long" and name in long else None,
            add_marker=lambda marker, name=name: long.add(name),
        )
        for name in names
    ]
    conftest.pytest_collection_modifyitems(SimpleNamespace(getoption=options.get, hook=hook), items)
    found = [item.nodeid for item in items]
    assert sorted(found + [item.nodeid for item in gone]) == sorted(names)
    return found


def test_samples_are_parts_and_fair_to_every_file():
    parts = [collected(NAMES, sample=(i, 4)) for i in range(1, 5)]
    assert sorted(name for names in parts for name in names) == sorted(NAMES)
    for names in parts:
        assert all(30 <= sum(name.startswith(f"{file}.py") for name in names) <= 70 for file in "ab")
        assert names == sorted(names, key=NAMES.index)


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "1/", "-1/4", "a/b"])
def test_a_sample_that_is_no_part_is_refused(text):
    assert conftest.part("2/8") == (2, 8)
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(f"got {text!r}")):
        conftest.part(text)


def test_the_fair_order_mixes_files_and_does_not_depend_on_how_they_were_found():
    first = collected(NAMES, fair=True)
    assert first == collected(NAMES[::-1], fair=True)
    assert all(5 <= sum(name[0] == "a" for name in first[i : i + 20]) <= 15 for i in range(0, 400, 20))


def test_long_tests_run_where_asked_for():
    assert collected(["x", "y", "z"], marked=("y",)) == ["x", "z"]
    assert collected(["x", "y", "z"], marked=("y",), long=True) == ["x", "y", "z"]


def test_the_cases_of_a_large_table_are_long_past_so_many():
    table, other = ([f"a.py::{test}[{i}]" for i in range(100)] for test in ("large", "other"))
    few = other[: conftest.CASES]
    kept = collected(table + few)
    assert set(few) <= set(kept)
    assert len(kept) == 2 * conftest.CASES
    assert set(kept) == set(collected(few + table[::-1]))  # the same, however they were found
    assert len(collected(table + few, long=True)) == len(table + few)
    assert len(collected(table + few, gpu=True)) == len(table + few)


def test_the_long_cases_of_large_tables_are_taken_in_parts():
    table, few = [f"a.py::large[{i}]" for i in range(100)], [f"a.py::few[{i}]" for i in range(conftest.CASES)]
    parts = [collected(table + few, marked=(*table, *few), long=True, rest=(i, 3)) for i in range(1, 4)]
    assert all(set(few) <= set(part) and len(part) - len(few) in (33, 34) for part in parts)
    assert sorted(set().union(*parts)) == sorted(table + few)
    assert sum(len(part) for part in parts) == len(table) + 3 * len(few)


def test_the_profile_of_long_tests_shrinks_and_draws_much():
    short, long = (hypothesis.settings.get_profile(name) for name in ("fused_attn", "long"))
    assert hypothesis.settings.default == short
    assert (long.max_examples, long.deadline) == (2_000, None)
    assert hypothesis.Phase.shrink in long.phases


def test_options_reach_a_run(tmp_path):
    assert "1 passed, 1 deselected" in run(tmp_path, "--fair", test_it=LONG).stdout
    done = run(tmp_path, "--long", "-m", "long", "--sample", "1/1", test_it=LONG)
    assert "1 passed, 1 deselected" in done.stdout
    assert run(tmp_path, "--sample", "9/8", test_it=LONG).returncode == pytest.ExitCode.USAGE_ERROR


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
