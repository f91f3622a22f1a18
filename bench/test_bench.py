"""`pytest bench`: the registry through pytest-benchmark, for its comparison of stored runs (`--benchmark-compare`).

A round is a call and a wait for the device, on the wall clock; the numbers to quote come from `python -m bench.run`.
"""

import pytest
import torch

from .registry import MODES, Case, Op
from .run import PROVIDERS, call_of, check, label, runner, select

pytest.importorskip("pytest_benchmark")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# To compile for a CPU takes longer than all the rest together.
PROVIDERS_HERE = PROVIDERS if GPU else tuple(p for p in PROVIDERS if p != "compile")
CASES = [pytest.param(op, case, id=label(op, case)) for op, case in select(DEVICE.type)]


@pytest.mark.parametrize("provider", PROVIDERS_HERE)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_is_right(op: Op, case: Case, provider: str) -> None:
    assert "failure" not in (row := check(op, case, [provider], DEVICE, seed=0)[provider]), row["failure"]


@pytest.mark.parametrize("provider", PROVIDERS_HERE)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_speed(op: Op, case: Case, mode: str, provider: str, benchmark) -> None:
    torch._dynamo.reset()
    call, inputs = call_of(op, provider, DEVICE), op.inputs(case.sizes, case.dtype, DEVICE, 1)
    out = runner(call, inputs, "forward")()["out"]
    fn = runner(call, inputs, mode, torch.randn_like(out))

    def go() -> None:
        fn()
        if GPU:
            torch.cuda.synchronize()

    benchmark.group = f"{label(op, case)} {mode}"
    benchmark.extra_info |= op.work(case, mode)._asdict()
    benchmark.pedantic(go, rounds=20 if GPU else 5, warmup_rounds=2)
