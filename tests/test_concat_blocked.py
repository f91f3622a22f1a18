"""Memory and work of the blocked path."""

import dataclasses
import multiprocessing
import os
import time
from types import SimpleNamespace

import pytest
import torch
from _compare import assert_close, evaluate
from _concat import ACTIVATIONS, Case
from _recorder import Recorder

from fused_attn import concat, concat_attention
from fused_attn.blocked import concat as in_blocks


@pytest.fixture
def recorded(monkeypatch, device):
    """A function from a case to the record of its forward and backward on the blocked path."""
    if device.type != "cpu":
        pytest.skip("the blocked path is for CPUs")

    def record(case: Case) -> Recorder:
        recorder = Recorder()
        for name in ("concat_fwd", "concat_bwd"):
            monkeypatch.setattr(in_blocks, name, inside(recorder, getattr(in_blocks, name)))
        tensors = case.tensors(device)
        with recorder:
            evaluate(case.op, tensors, "auto")
        assert recorder.largest >= max(x.numel() for x in tensors.values())
        monkeypatch.undo()
        return recorder

    return record


def inside(mode, function):
    def wrapped(*args):
        with mode:
            return function(*args)

    return wrapped


LONG = Case(batch=1, queries=1024, keys=1024, attn_dim=16, value_dim=16, return_weights=False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("structure", [{}, {"heads": 2}, {"window": (None, 0)}, {"score_bias": "q1"}], ids=str)
def test_blocked_path_makes_nothing_of_queries_times_keys(structure, activation, recorded):
    case = dataclasses.replace(LONG, activation=activation, **structure)
    assert recorded(case).largest < case.queries * case.keys


@pytest.mark.parametrize("name", ["queries", "keys"])
@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_memory_of_the_blocked_path_is_linear(name, activation, recorded):
    case = dataclasses.replace(LONG, activation=activation)
    sizes = [recorded(dataclasses.replace(case, **{name: n})).largest for n in (1024, 2048, 4096)]
    assert sizes[1] <= 2 * sizes[0]
    assert sizes[2] <= 2 * sizes[1]


@pytest.mark.parametrize("window", [(16, 16), (None, 0)], ids=str)
def test_work_of_the_blocked_path_follows_the_window(window, recorded):
    whole = recorded(LONG).work
    share = {(16, 16): 0.15, (None, 0): 0.6}[window]
    assert recorded(dataclasses.replace(LONG, window=window)).work < share * whole


# --- A CPU that other programs keep busy -------------------------------------------------------------------------

MANY_BLOCKS = Case(batch=2, queries=70, keys=90, attn_dim=64, value_dim=16, return_weights=False)


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def counted(monkeypatch, seconds: list[float]) -> list[int]:
    """Let blocks take so many seconds, the last ever after; how many threads are set, each time one sets them."""
    monkeypatch.setattr(in_blocks, "BUFFER_BYTES", 2**16)
    now, left = [0.0], [*seconds]

    def clock() -> float:
        now[0] += (left.pop(0) if len(left) > 1 else left[0]) / 2  # read before and after
        return now[0]

    monkeypatch.setattr(in_blocks, "time", SimpleNamespace(perf_counter=clock))
    calls: list[int] = []
    set_num_threads = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda n: (calls.append(n), set_num_threads(n)))
    return calls


@pytest.mark.parametrize(
    ("seconds", "calls"),
    [
        ([1e-9], []),
        ([1.0] * 4 + [1e-9], [1, 2]),  # one thread is faster, until the call ends
        ([1.0] * 4 + [9.0], [1, 2, 2]),  # one thread is slower: back at once
    ],
    ids=["quiet", "busy", "slow"],
)
@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_blocks_that_come_late_take_one_thread(activation, seconds, calls, monkeypatch, two_threads):
    case = dataclasses.replace(MANY_BLOCKS, activation=activation)
    tensors = case.tensors(torch.device("cpu"))
    monkeypatch.setattr(in_blocks, "BUFFER_BYTES", 2**16)
    want = evaluate(case.op, tensors, "auto")
    seen = counted(monkeypatch, seconds)
    got = evaluate(case.op, tensors, "auto")
    assert seen[: len(calls)] == calls
    assert set(seen) <= {1, 2}
    assert torch.get_num_threads() == 2
    assert_close(got, want)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    seen.clear()
    evaluate(case.op, tensors, "auto")
    assert not seen


def test_an_error_leaves_the_number_of_threads(monkeypatch, two_threads):
    counted(monkeypatch, [1.0])

    def fails(z, out):
        if torch.get_num_threads() == 1:
            raise RuntimeError("out of memory")
        torch.ops.aten.gelu.out(z, out=out)

    monkeypatch.setitem(in_blocks._FORWARD, "gelu", fails)
    case = dataclasses.replace(MANY_BLOCKS, activation="gelu")
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(case.op, case.tensors(torch.device("cpu")), "auto")
    assert torch.get_num_threads() == 2


def _spin() -> None:
    while True:
        pass


@pytest.mark.long  # by the clock, beside programs that have every core
def test_beside_busy_programs_it_is_not_slower_than_eager():
    q, k, value, v = (torch.randn(shape) for shape in ((4, 256, 128), (4, 512, 128), (4, 512, 128), (128,)))

    def seconds(impl: str) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            concat_attention(q, k, value, v, impl=impl)
            times.append(time.perf_counter() - start)
        return sorted(times)[2]

    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=_spin, daemon=True) for _ in range(cores)]
    torch.set_num_threads(cores)
    try:
        for other in others:
            other.start()
        assert seconds("auto") < seconds("reference")
    finally:
        torch.set_num_threads(threads)
        for other in others:
            other.kill()


@pytest.mark.parametrize(
    ("queries", "needs_grad", "activation", "expected"),
    [
        (4, False, "tanh", False),
        (40, False, "tanh", True),
        (40, True, "tanh", False),
        (40, False, "relu", False),
        (200, True, "relu", True),
    ],
)
def test_small_calls_are_by_the_formula(queries, needs_grad, activation, expected, monkeypatch):
    monkeypatch.setattr(concat, "_FEW", 2**17)
    ran = []
    monkeypatch.setattr(
        in_blocks, "concat_fwd", lambda *args, run=in_blocks.concat_fwd: (ran.append(args), run(*args))[1]
    )
    case = Case(batch=1, queries=queries, keys=100, attn_dim=50, activation=activation, return_weights=False)
    tensors = case.tensors(torch.device("cpu"))
    evaluate(case.op, tensors, "auto", wrt=None if needs_grad else [])
    assert bool(ran) == expected
