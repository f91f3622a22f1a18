"""A call from its record is the call that its launcher makes: see `fused_attn.kernels.replay`."""

import dataclasses
import dis
import gc
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import weakref
from pathlib import Path

import _compositions as table
import pytest
import torch

pytest.importorskip("triton", reason="launches with Triton")

from fused_attn.kernels import replay

ROOT = Path(__file__).parent.parent
# The kernels must be imported without the interpreter, which this process may have on.
ENV = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
OPERATORS = [name for name, row in table.ROWS.items() if row.module is None]


def results(row, tensors):
    tensors = table.live(row, tensors)
    torch.manual_seed(0)
    out = row.run("triton", tensors)
    leaves = [x for x in tensors.values() if x.requires_grad]
    starts = [torch.cos(torch.arange(x.numel(), device=x.device)).view(x.shape) for x in out]
    return [*out, *torch.autograd.grad(out, leaves, starts, materialize_grads=True)]


@pytest.mark.kernel
@pytest.mark.parametrize("name", OPERATORS)
def test_a_call_of_other_numbers_from_a_record(name, device, monkeypatch):
    row = dataclasses.replace(table.ROWS[name], device=device)
    tensors = row.tensors("triton")
    others = {n: x.flip(0) if x.is_floating_point() else x for n, x in tensors.items()}
    with monkeypatch.context() as patch:
        patch.setattr(replay, "call", lambda launcher, args: launcher(*args))
        want = results(row, others)
    for _ in range(replay.SEEN + 1):
        results(row, tensors)
    kinds = dict(replay._records)
    assert kinds
    assert all(isinstance(record, replay.Record) and record.run is not None for record in kinds.values())
    got = results(row, others)
    assert replay._records == kinds
    assert len(got) == len(want)
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg=lambda text, i=i: f"{i}: {text}")


@pytest.mark.kernel
def test_a_tensor_that_came_twice_is_two_in_another_call(device):
    row = dataclasses.replace(table.ROWS["concat packed"], device=device)
    tensors = row.tensors("triton")
    same = table.twins(tensors, lambda x: x)
    assert len({id(x) for x in same.values()}) < len(tensors)
    want = results(row, tensors)
    replay.forget()
    for _ in range(replay.SEEN + 1):
        results(row, same)
    assert all(torch.equal(x, y) for x, y in zip(results(row, tensors), want, strict=True))


def test_what_is_read_from_a_tensor_is_not_written_down(device):
    def launcher(x):
        return (x * 2 if x.sum() > 0 else x * 3,)

    one = torch.ones(3, device=device)
    for _ in range(replay.SEEN + 2):
        assert torch.equal(replay.call(launcher, (one,))[0], 2 * one)
        assert torch.equal(replay.call(launcher, (-one,))[0], -3 * one)
    assert [record.run for record in replay._records.values()] == [None]


def test_a_view_of_a_tensor_is_of_the_next_calls_tensor(device):
    def launcher(x, y, n):
        z = torch.empty_like(x[1:])
        torch.add(x[1:], n, out=z)
        return [z.add_(y[:-1].view(-1)), None, torch.stack([x, y])]

    def check(x, y):
        got = replay.call(launcher, (x, y, 2))
        assert torch.equal(got[0], x[1:] + 2 + y[:-1])
        assert got[1] is None
        assert torch.equal(got[2], torch.stack([x, y]))

    rows = torch.arange(24.0, device=device).view(6, 4)
    for i in range(replay.SEEN + 2):
        check(rows[i], rows[i + 1])
    check(rows[0], rows[0])
    assert [record.run is not None for record in replay._records.values()] == [True]


@pytest.mark.parametrize(("one", "other"), [(0.0, -0.0), (1, 1.0), (True, 1)])
def test_options_that_are_equal_and_not_alike_are_other_kinds(one, other, device):
    def launcher(x, option):
        return (x + option, option)

    x = torch.ones(3, device=device)
    for _ in range(replay.SEEN + 2):
        for option in (one, other):
            assert repr(replay.call(launcher, (x, option))[1]) == repr(option)


def test_a_call_keeps_no_memory_and_a_record_no_more_than_it_needs(device):
    made = []

    def launcher(x):
        y = x + 1
        made.append(weakref.ref(y))
        z = y * 2
        del y
        return (z,)

    x = torch.ones(3, device=device)
    gc.disable()
    try:
        for _ in range(replay.SEEN + 1):
            replay.call(launcher, (x,))
            assert made[-1]() is None
    finally:
        gc.enable()
    (record,) = replay._records.values()
    assert [x.argval for x in dis.Bytecode(record.run) if x.opname == "DELETE_FAST"] == ["t1"]


def test_nothing_is_written_down_where_that_is_off(device, monkeypatch):
    monkeypatch.setattr(replay, "ON", False)
    x = torch.ones(3, device=device)
    for _ in range(replay.SEEN + 2):
        assert torch.equal(replay.call(lambda x: (x + 1,), (x,))[0], x + 1)
    assert not replay._records


def test_no_more_kinds_are_kept_than_said(device, monkeypatch):
    monkeypatch.setattr(replay, "MOST", 3)
    for n in range(1, 9):
        x = torch.zeros(n, device=device)
        assert torch.equal(replay.call(lambda x: x + 1, (x,)), x + 1)
        assert len(replay._records) <= 3


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, "-m", "tests._launches"], cwd=ROOT, env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kind_in_the_table_launches_what_no_other_does(found):
    got, want = found["kinds"]
    assert got == want > 20


def test_records_launch_what_triton_launches(found):
    assert [name for name, same in found["same"].items() if not same] == []
    assert [name for name, recorded in found["records"].items() if not recorded] == []


def test_triton_launches_while_somebody_listens(found):
    assert not found["triton"].pop("nothing")
    assert [name for name, triton_did in found["triton"].items() if not triton_did] == []
    assert len(found["triton"]) == 9


def test_tritons_own_launcher_takes_what_a_record_gives(tmp_path):
    if shutil.which("cc") is None or not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("Triton's launcher is compiled by a C compiler, with Python's headers")
    done = subprocess.run(
        [sys.executable, "-m", "tests._driver", tmp_path], cwd=ROOT, env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    by_triton, by_record = json.loads(done.stdout)
    assert [len(launch) > 6 for launch in by_triton] == [True] * 5
    assert by_record == by_triton
