"""Packed batches are worked on without a wait for the device: no number of a tensor is read on the host.

So they can be captured in a CUDA graph.
The kernels run here on the CPU, where reading a number is no wait; it raises.
"""

import sys

import pytest
import torch
from torch import Tensor

from fused_attn import (
    Score,
    concat_attention,
    csr_from_edges,
    general_attention,
    graph_attention,
    hierarchical_attention,
    location_attention,
    statistics_pooling,
    transpose_csr,
    word_by_word_attention,
)

pytest.importorskip("triton", reason="the kernels need Triton")
pytestmark = pytest.mark.kernel

METHODS = (
    "item", "tolist", "numpy", "__int__", "__index__", "__bool__", "__float__", "__contains__", "nonzero", "argwhere",
    "masked_select", "unique", "unique_consecutive", "repeat_interleave", "cpu", "is_nonzero", "equal", "allclose",
)  # fmt: skip
FUNCTIONS = ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "repeat_interleave", "equal")


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tensor's numbers raises, but for Triton's interpreter, which is what a device is here."""

    def guarded(name, real):
        def read(*args, **kwargs):
            frame = sys._getframe(1)
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


N, S = 46, 4
CU = offsets(20, 0, 23, 3)
KEYS = offsets(5, 2, 33, 0)
EDGES = torch.tensor([[0, 1, 2, 2, 3, 0, 4], [1, 1, 0, 3, 3, 2, 0]])
INDPTR, INDICES = csr_from_edges(EDGES, 5)[:2]
SCORE = {"b": rows(4), "v": rows(4)}


def graph(**options) -> Tensor:
    return graph_attention(rows(5, 2, 4), rows(5, 2, 4), rows(2, 4), INDPTR, INDICES, impl="triton", **options)


def pairs(op, **options) -> Tensor:
    v = [rows(8)] if op is concat_attention else []
    return op(
        rows(N, 8), rows(40, 8), rows(40, 6), *v, cu_seqlens_q=CU, cu_seqlens_k=KEYS, impl="triton", **options
    )  # fmt: skip


CALLS = {
    "location": lambda: location_attention(rows(N, 8), rows(8, 4), **SCORE, cu_seqlens=CU, impl="triton"),
    "location, long": lambda: location_attention(
        rows(300, 8), rows(8, 4), **SCORE, context=rows(2, 4), cu_seqlens=offsets(290, 10), impl="triton"
    ),
    "location, dropout and mask": lambda: location_attention(
        rows(N, 8), rows(8), mask=torch.rand(N) > 0.5, dropout_p=0.5, cu_seqlens=CU, impl="triton"
    ),
    "location window": lambda: location_attention(
        rows(N, 8), rows(8, 4), **SCORE, window=(None, 0), cu_seqlens=CU, impl="triton"
    ),
    "location window, two ends": lambda: location_attention(
        rows(N, 8), rows(8), window=(3, 3), cu_seqlens=CU, impl="triton"
    ),
    "concat": lambda: pairs(concat_attention),
    "concat, window and dropout": lambda: pairs(concat_attention, window=(4, 0), dropout_p=0.5),
    "general": lambda: pairs(general_attention),
    "general, window and dropout": lambda: pairs(general_attention, window=(4, 0), dropout_p=0.5),
    "statistics, one weight a frame": lambda: torch.cat(
        statistics_pooling(rows(N, 8), rows(8, 4), **SCORE, cu_seqlens=CU, impl="triton")
    ),
    "statistics, one weight a channel": lambda: torch.cat(
        statistics_pooling(rows(N, 8), rows(8, 4), b=rows(4), v=rows(4, 8), cu_seqlens=CU, impl="triton")
    ),
    "hierarchical": lambda: hierarchical_attention(
        rows(N, 8), CU, offsets(3, 0, 1), Score(rows(8, 4), **SCORE), Score(rows(8, 4), **SCORE), impl="triton"
    ),
    "hierarchical, wide": lambda: hierarchical_attention(
        rows(N, 300), CU, offsets(3, 0, 1), Score(rows(300, 4), **SCORE), Score(rows(300, 4), **SCORE), impl="triton"
    ),
    "graph": graph,
    "graph, transposed given": lambda: graph(transposed=transpose_csr(INDPTR, INDICES, 5)),
    "graph, dropout and weights": lambda: torch.cat(
        [x.flatten() for x in graph(value=rows(5, 2, 3), edge=rows(7, 2, 4), dropout_p=0.5, return_weights=True)]
    ),
    "word by word": lambda: word_by_word_attention(
        rows(40, 6), rows(N, 6), rows(6, 4), rows(6, 4), rows(6, 4), rows(4), rows(6, 6),
        cu_seqlens_premise=KEYS, cu_seqlens_hypothesis=CU, impl="triton",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("no_reads")
@pytest.mark.parametrize("name", CALLS)
def test_forward_and_backward_read_no_number(name: str) -> None:
    torch.manual_seed(0)
    out = CALLS[name]()
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
