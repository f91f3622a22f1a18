"""Memory and work of the blocked path."""

import dataclasses

import pytest
import torch
from _compare import evaluate
from _concat import ACTIVATIONS, Case
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_attn import _concat_blocked


class Recorder(TorchDispatchMode):
    """Sees the operators below a custom operator too: their largest tensor, and how many numbers they give."""

    largest = 0  # elements of a storage
    work = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
                self.work += 0 if x._is_view() else x.numel()
        return result


@pytest.fixture
def recorded(monkeypatch, device):
    """A function from a case to the record of its forward and backward on the blocked path."""
    if device.type != "cpu":
        pytest.skip("the blocked path is for CPUs")

    def record(case: Case) -> Recorder:
        recorder = Recorder()
        for name in ("blocked_fwd", "blocked_bwd"):
            monkeypatch.setattr(_concat_blocked, name, inside(recorder, getattr(_concat_blocked, name)))
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
