"""What the tests of all peers share: a library's module beside a copy of it that was replaced."""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fused_attn.compat import _peers, replace_attention, restore_attention


def need(library: str) -> Any:
    """The library; without it the file's tests are skipped, and under `make test-peers` they fail."""
    try:
        return importlib.import_module(library)
    except ImportError:
        if os.environ.get("FUSED_ATTN_PEERS"):
            raise
        pytest.skip(f"{library} is not installed: make test-peers", allow_module_level=True)


class Case(NamedTuple):
    """A module of a library and a call of it that ours takes."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    peer: type[nn.Module]
    """The class that is replaced, in the module or the module itself."""


class Pair(NamedTuple):
    """The library's module, the same replaced, and inputs for both."""

    theirs: nn.Module
    ours: nn.Module
    inputs: tuple[Any, ...]


def pair_of(case: Case, dtype: torch.dtype = torch.float32, *, training: bool = True) -> Pair:
    torch.manual_seed(0)
    theirs = case.make().to(dtype).train(training)
    with torch.no_grad():
        for x in theirs.parameters():  # zeros of biases would hide them
            x.add_(0.1 * torch.randn_like(x))
    ours = copy.deepcopy(theirs)
    report = replace_attention(ours, cpu="always", strict=True)
    assert {row.peer for row in report.replaced} == {case.peer}
    inputs = tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, case.inputs())
    return Pair(theirs, ours, inputs)


@contextlib.contextmanager
def alone(peer: type[nn.Module]) -> Iterator[None]:
    """Where the library's forward fails: all that is computed is ours."""
    with mock.patch.object(peer, "forward", side_effect=AssertionError("the library's forward ran")):
        yield


@contextlib.contextmanager
def library_runs(peer: type[nn.Module]) -> Iterator[None]:
    """Where the library's forward has to run."""
    with mock.patch.object(peer, "forward", autospec=True, side_effect=peer.forward) as forward:
        yield
    assert forward.called


def close(got: Any, want: Any, scale: float | None = None) -> None:
    """Trees of tensors, to 1e-5 (float64: 1e-12) of the largest number of each, or of `scale`."""
    got, want = tree_leaves(got), tree_leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        if not isinstance(b, Tensor) or not b.is_floating_point():
            assert torch.equal(a, b) if isinstance(b, Tensor) else a == b
            continue
        largest = b.abs().max().item() if scale is None and b.numel() else scale or 0.0
        rtol = 1e-12 if b.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(a, b, rtol=0, atol=rtol * max(largest, 1e-3))


def results(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, list[Tensor]]:
    """What a call returns, and the gradients of all floating inputs and of every parameter."""
    inputs = tree_map_only(
        Tensor, lambda x: x.detach().clone().requires_grad_() if x.is_floating_point() else x, inputs
    )
    out = module(*inputs)
    leaves = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.is_floating_point()]
    leaves += list(module.parameters())
    outs = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()]
    torch.manual_seed(1)
    return out, list(torch.autograd.grad(outs, leaves, [torch.randn_like(x) for x in outs]))


def check_same(case: Case, dtype: torch.dtype, training: bool) -> None:
    """Outputs, and gradients of all inputs and parameters: none is None, which DistributedDataParallel would mind."""
    theirs, ours, inputs = pair_of(case, dtype, training=training)
    want, want_gradients = results(theirs, inputs)
    with alone(case.peer):
        got, gradients = results(ours, inputs)
    close(got, want)
    close(gradients, want_gradients, max(x.abs().max().item() for x in want_gradients if x.numel()))


def check_steps(case: Case) -> None:
    """Five steps of an optimizer that was made before: the losses are equal."""
    theirs, ours, inputs = pair_of(case)
    restore_attention(ours)
    losses = []
    for module in (theirs, ours):
        optimizer = torch.optim.Adam(module.parameters(), 0.01)
        if module is ours:
            replace_attention(ours, cpu="always")
        mine = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = tree_leaves(module(*inputs))[0].square().mean()
            loss.backward()
            optimizer.step()
            mine.append(loss.detach())
        losses.append(torch.stack(mine))
    assert losses[0][0] != losses[0][4]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)


def check_state(case: Case) -> None:
    """Checkpoints load in both directions, strictly, and the repr is the library's."""
    theirs, ours, _ = pair_of(case)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert repr(ours) == repr(theirs)


def check_copies(case: Case) -> None:
    """Pickled, copied, and restored it computes the same."""
    theirs, ours, inputs = pair_of(case, training=False)
    want = theirs(*inputs)
    for module in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        with alone(case.peer):
            close(module(*inputs), want)
    restore_attention(ours)
    assert [type(x) for x in ours.modules()] == [type(x) for x in theirs.modules()]
    assert [sorted(vars(x)) for x in ours.modules()] == [sorted(vars(x)) for x in theirs.modules()]
    with library_runs(case.peer):
        close(ours(*inputs), want)


def check_compiles(case: Case, *, as_few_graphs: bool = True) -> None:
    """The whole module compiles, in as few graphs as the library's, and computes the same."""
    theirs, ours, inputs = pair_of(case, training=False)
    want = theirs(*inputs)
    if as_few_graphs:
        graphs = []
        for module in (theirs, ours):
            torch.compiler.reset()
            graphs.append(torch._dynamo.explain(module)(*inputs).graph_count)
        assert graphs[1] <= graphs[0]
    torch.compiler.reset()
    close(torch.compile(ours, backend="aot_eager")(*inputs), want)


def check_upstream(library: str, folder: str, files: list[str]) -> None:
    """The library's own tests, in a folder of a clone of its repository, pass where its known classes are ours."""
    where = Path(os.environ.get("FUSED_ATTN_UPSTREAM", "")) / folder
    if not where.exists():
        pytest.skip("make test-peers UPSTREAM=folder of a clone of the repository")
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "_upstream", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "PYTHONPATH": path, "FUSED_ATTN_LIBRARY": library}
    run = subprocess.run(command, cwd=where, env=environment, stdout=subprocess.PIPE, text=True)
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout
    for ours, _ in _peers.registry(library).values():
        assert f"ours ran: {ours.__name__}" in run.stdout


def table(cases: dict[str, Case]) -> Callable[[Any], Any]:
    """A test of each case."""
    return pytest.mark.parametrize("case", cases.values(), ids=cases)
