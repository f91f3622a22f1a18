"""Packed batches, and a decoder's steps, have no wait for the device: no number of a tensor is read on the host.

So they can be captured in a CUDA graph.
On the CPU reading a number is no wait; here it raises.
"""

import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from fused_attn import (
    Score,
    concat_attention,
    csr_from_edges,
    distance_attention,
    general_attention,
    graph_attention,
    hierarchical_attention,
    location_attention,
    statistics_pooling,
    target_attention,
    transpose_csr,
    word_by_word_attention,
)

pytest.importorskip("triton", reason="the kernels need Triton")

Call = Callable[..., Tensor | tuple[Tensor, ...]]

FUNCTIONS = ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "repeat_interleave", "equal")
METHODS = (*FUNCTIONS, "item", "tolist", "numpy", "cpu", "is_nonzero", "allclose")
METHODS += ("__int__", "__index__", "__bool__", "__float__", "__contains__")


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tensor's numbers raises, but for Triton's interpreter, which is what a device is here."""

    def guarded(name, real):
        def read(*args, **kwargs):
            frame = sys._getframe(1)
            if kwargs.get("output_size") is not None:  # of repeat_interleave, which then waits for nothing
                return real(*args, **kwargs)
            while frame is not None and not frame.f_globals.get("__name__", "").startswith("fused_attn"):
                if frame.f_globals.get("__name__", "").startswith("triton"):
                    return real(*args, **kwargs)
                frame = frame.f_back
            if frame is None:
                return real(*args, **kwargs)
            raise AssertionError(f"{name} waits for the device, in {frame.f_code.co_filename}:{frame.f_lineno}")

        return read

    def select(self, index):
        indices = index if isinstance(index, tuple) else (index,)
        if any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices):
            return masked(self, index)
        return getitem(self, index)

    getitem, masked = Tensor.__getitem__, guarded("a mask as an index", Tensor.__getitem__)
    monkeypatch.setattr(Tensor, "__getitem__", select)
    for owner, names in ((Tensor, METHODS), (torch, FUNCTIONS)):
        for name in names:
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, guarded(name, getattr(owner, name)))
    # On a GPU values are checked there, by an assertion.
    monkeypatch.setattr("fused_attn._checks._check_values", lambda *args: None)


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


N = 46
EDGES = [[0, 1, 2, 2, 3, 0, 4], [1, 1, 0, 3, 3, 2, 0]]


def location(*w: int, n: int = N, **options) -> Call:
    options = {"cu_seqlens": offsets(20, 0, 23, 3), **options}
    return partial(location_attention, rows(n, 8), rows(*w), **(score() if len(w) > 1 else {}), **options)


def score() -> dict[str, Tensor]:
    return {"b": rows(4), "v": rows(4)}


def pairs(op, **options) -> Call:
    v = [] if op is general_attention else [rows(8)]
    cu = {"cu_seqlens_q": offsets(20, 0, 23, 3), "cu_seqlens_k": offsets(5, 2, 33, 0)}
    return partial(op, rows(N, 8), rows(40, 8), rows(40, 6), *v, **cu, **options)


def statistics(**weights: Tensor) -> Call:
    return partial(statistics_pooling, rows(N, 8), rows(8, 4), **weights, cu_seqlens=offsets(20, 0, 23, 3))


def target(second: int | None, **options) -> Call:
    w2 = None if second is None else rows(4, second)
    w = rows(32, 4), w2, rows(4 if second is None else second)
    return partial(target_attention, rows(4, 8), rows(N, 8), *w, cu_seqlens=offsets(20, 0, 23, 3), **options)


def hierarchical(width: int) -> Call:
    scores = (Score(rows(width, 4), **score()) for _ in range(2))
    return partial(hierarchical_attention, rows(N, width), offsets(20, 0, 23, 3), offsets(3, 0, 1), *scores)


def graph(transposed: bool = False, **options) -> Call:
    csr = csr_from_edges(torch.tensor(EDGES), 5)[:2]
    if transposed:
        options["transposed"] = transpose_csr(*csr, 5)
    return partial(graph_attention, rows(5, 2, 4), rows(5, 2, 4), rows(2, 4), *csr, **options)


def step(op, *heads: int, scale: bool = False) -> Call:
    """One query a sequence, over a buffer of keys of which `lengths` are there."""
    lengths = torch.tensor([3, 0, 17])
    mask = torch.arange(20) < lengths[:, None]
    v = [] if op is general_attention else [rows(8)]
    options = {"scale": rows(*heads)} if scale else {}
    shared = (1,) if heads and op is general_attention else heads
    keys = rows(3, *shared, 20, 8), rows(3, *shared, 20, 6)
    return partial(op, rows(3, *heads, 1, 8), *keys, *v, mask=mask, **options)


def words() -> Call:
    return partial(
        word_by_word_attention,
        rows(40, 6),
        rows(N, 6),
        rows(6, 4),
        rows(6, 4),
        rows(6, 4),
        rows(4),
        rows(6, 6),
        cu_seqlens_premise=offsets(5, 2, 33, 0),
        cu_seqlens_hypothesis=offsets(20, 0, 23, 3),
    )


CALLS = {
    "location": lambda: location(8, 4),
    "location, long": lambda: location(8, 4, n=300, context=rows(2, 4), cu_seqlens=offsets(290, 10)),
    "location, dropout and mask": lambda: location(8, mask=torch.rand(N) > 0.5, dropout_p=0.5),
    "location window": lambda: location(8, 4, window=(None, 0)),
    "location window, two ends": lambda: location(8, window=(3, 3)),
    "concat": lambda: pairs(concat_attention),
    "distance": lambda: pairs(distance_attention),
    "concat, window and dropout": lambda: pairs(concat_attention, window=(4, 0), dropout_p=0.5),
    "general": lambda: pairs(general_attention),
    "general, window and dropout": lambda: pairs(general_attention, window=(4, 0), dropout_p=0.5),
    "statistics, one weight a frame": lambda: statistics(**score()),
    "statistics, one weight a channel": lambda: statistics(b=rows(4), v=rows(4, 8)),
    "target": lambda: target(3),
    "target, softmax": lambda: target(None, softmax=True, mask=torch.rand(N) > 0.5),
    "hierarchical": lambda: hierarchical(8),
    "hierarchical, wide": lambda: hierarchical(300),
    "graph": graph,
    "graph, transposed given": lambda: graph(transposed=True),
    "graph, dropout and weights": lambda: graph(
        value=rows(5, 2, 3), edge=rows(7, 2, 4), dropout_p=0.5, return_weights=True
    ),
    "word by word": words,
    "a step of concat": lambda: step(concat_attention),
    "a step of concat, heads": lambda: step(concat_attention, 2),
    "a step of general": lambda: step(general_attention),
    "a step of general, heads and a scale": lambda: step(general_attention, 2, scale=True),
}


@pytest.mark.kernel
@pytest.mark.usefixtures("no_reads")
@pytest.mark.parametrize("name", CALLS)
def test_forward_and_backward_read_no_number(name: str, device: torch.device) -> None:
    torch.manual_seed(0)
    with device:  # around what the test makes, not around what the package does
        call = CALLS[name]()
    out = call(impl="triton")
    out = torch.cat([x.flatten() for x in out]) if isinstance(out, tuple) else out
    out.backward(torch.ones_like(out))


@pytest.mark.usefixtures("no_reads")
@pytest.mark.parametrize(
    "expression",
    ["int(x.max())", "x.tolist()", "x[x > 0]", "x.nonzero()", "x.any() and 1", "range(x[0])", "x.item()"],
)
def test_a_read_inside_the_package_raises(expression: str) -> None:
    read = eval(f"lambda x: {expression}", {"__name__": "fused_attn.made_up"})
    with pytest.raises(AssertionError, match="waits for the device"):
        read(torch.ones(1, dtype=torch.int64))
