"""What calls do before a GPU begins stays within bench/budgets.toml: counted by `bench.host` with no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

pytest.importorskip("triton", reason="launches with Triton")
pytest.importorskip("rich", reason="the table prints with rich")

ROOT = Path(__file__).parent.parent
# The kernels must be imported without the interpreter, which this process may have on.
ENV = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
BUDGETS = tomllib.loads((ROOT / "bench" / "budgets.toml").read_text())


def run(script: list[str]) -> str:
    done = subprocess.run([sys.executable, *script], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def found() -> dict:
    return json.loads(run(["-m", "bench.host", "--json"]))


def test_every_call_has_a_budget(found):
    assert set(found) - {"SDPA"} == set(BUDGETS["kernels"]) == set(BUDGETS["host"])


@pytest.mark.parametrize("row", BUDGETS["kernels"])
def test_no_more_kernels_are_started(row, found):
    for way, most in zip(("forward", "backward"), BUDGETS["kernels"][row], strict=True):
        cost = found[row][way]
        assert cost["ours"], f"{way}: no kernel of the package was counted"
        assert len(cost["ours"]) + len(cost["torch"]) <= most, f"{way}: {cost}"


@pytest.mark.parametrize("row", BUDGETS["host"])
def test_the_host_takes_no_longer_than_so_many_times_what_sdpa_takes(row, found):
    for name, most in zip(("forward_us", "both_us"), BUDGETS["host"][row], strict=True):
        assert found[row][name] <= most * found["SDPA"][name], f"{name}: {found[row]}, SDPA {found['SDPA']}"


SCRIPT = """
import json, torch
from bench.host import _Operators
x = torch.ones(3, 4, requires_grad=True)
with _Operators() as seen:
    y = x.view(12).to(torch.float32)[2:].masked_fill(torch.zeros(10, dtype=torch.bool), 1.0)
    y.new_empty(3).fill_(0)
    y.new_zeros(0)
    y.sum().backward()
print(json.dumps(seen.started))
"""


def test_operators_are_counted_as_often_as_they_start_a_kernel():
    started = json.loads(run(["-c", SCRIPT]))
    assert started[:5] == ["zeros", "masked_fill", "masked_fill", "fill_", "sum"]
    assert not {"view", "to"} & set(started)
