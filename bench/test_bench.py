"""`pytest bench`: the registry through pytest-benchmark, for its comparison of stored runs (`--benchmark-compare`).

A round is a call and a wait for the device, on the wall clock; the numbers to quote come from `python -m bench.run`.
"""

import pytest
import torch

from .families.problem import Case, Op
from .run import call_of, check, label, modes_of, providers_of, runner, select

pytest.importorskip("pytest_benchmark")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
CASES = [
    pytest.param(op, case, provider, id=f"{label(op, case)}-{provider}")
    for op, case in select(DEVICE.type)
    for provider in providers_of(op, case, DEVICE)
    if GPU or provider != "compile"  # to compile for a CPU takes longer than all the rest together
]
SPEEDS = [
    pytest.param(*one.values, mode, id=f"{one.id}-{mode}") for one in CASES for mode in modes_of(str(one.values[2]))
]


@pytest.mark.parametrize(("op", "case", "provider"), CASES)
def test_is_right(op: Op, case: Case, provider: str) -> None:
    assert "failure" not in (row := check(op, case, [provider], DEVICE, seed=0)[provider]), row["failure"]


@pytest.mark.parametrize(("op", "case", "provider", "mode"), SPEEDS)
def test_speed(op: Op, case: Case, provider: str, mode: str, benchmark) -> None:
    torch._dynamo.reset()
    call, inputs = call_of(op, case, provider, DEVICE), op.inputs(case.sizes, case.dtype, DEVICE, 1)
    out = runner(call, inputs, "forward")()["out"]
    fn = runner(call, inputs, mode, torch.randn_like(out))

    def go() -> None:
        fn()
        if GPU:
            torch.cuda.synchronize()

    benchmark.group = f"{label(op, case)} {mode}"
    benchmark.extra_info |= op.work(case, mode)._asdict()
    benchmark.pedantic(go, rounds=20 if GPU else 5, warmup_rounds=2)
