"""What the launchers of the location and hierarchical families allocate on a GPU: counted on meta tensors."""

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="kernels are in Triton")
from fused_attn.kernels import chip, hierarchical, location, location_bwd, location_gap, masks, softmax, sums
from fused_attn.kernels.inputs import HierarchicalInputs, LocationInputs

MIB = 2**20


class _NoLaunch:
    def __init__(self, kernel) -> None:
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.fixture(autouse=True)
def _an_h200_that_runs_nothing(monkeypatch):
    for module in (location, location_bwd, location_gap, hierarchical, masks, softmax, sums):
        for name in vars(module):
            if name.startswith("_") and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, _NoLaunch(getattr(module, name)))
    with chip.assume(chip.H200):
        yield


class _Peak(TorchDispatchMode):
    """Bytes of all storages that were made inside and are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and not any(
                y.untyped_storage()._cdata == x.untyped_storage()._cdata
                for y in tree_leaves((args, kwargs))
                if isinstance(y, Tensor)
            ):
                storage = x.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    size = storage.nbytes()
                    self.now += size
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, size)
        return result

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def nbytes(*tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


CASES = {
    "32 hops more than a tile": dict(B=8, T=4096, D=2048, A=1024, R=128),
    "Lin et al.": dict(B=32, T=2000, D=600, A=350, R=30),
    "linear hops": dict(B=4, T=8192, D=2048, A=None, R=128),
    "one long gated bag": dict(B=1, T=200_000, D=512, A=128, gated=True),
    "a context a sequence": dict(B=64, T=4096, D=512, A=512, context=True),
    "many short sequences": dict(B=50_000, T=16, D=64, A=64, context=True, ragged=True),
    "wide values": dict(B=8, T=4096, D=64, A=64, R=16, DV=4096),
    "hops over ragged rows": dict(B=300, T=300, D=1024, A=256, R=64, ragged=True, gated=True),
}


def inputs(B, T, D, A, R=None, DV=None, gated=False, context=False, ragged=False, dtype=torch.bfloat16):
    def new(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    lead = (B * T,) if ragged else (B, T)
    width = A or R
    return {
        "h": new(*lead, D),
        "w": new(D, width),
        "b": new(width),
        "v": None if A is None else new(A, R or 1),
        "gate_w": new(D, A) if gated else None,
        "gate_b": new(A) if gated else None,
        "context": new(B, width) if context else None,
        "value": None if DV is None else new(*lead, DV),
        "score_bias": None,
        "mask": new(*lead, dtype=torch.bool),
        "cu_seqlens": new(B + 1, dtype=torch.int32) if ragged else None,
        "seed": None,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_temporaries_stay_in_the_workspace(sizes, dtype):
    """Beside the results: the workspace, a sum a sequence, and a few times the parameters, summed in parts."""
    tensors = inputs(**sizes, dtype=dtype)
    given = LocationInputs(*tensors.values(), "tanh", "sigmoid", 0.0, False)
    with _Peak() as forward:
        out, lse, scores, exact = location.location_fwd(given, True, dtype == torch.bfloat16)
    kept = nbytes(out, lse, scores, exact)
    assert forward.most <= kept + location.WORKSPACE_BYTES * 1.01 + 4 * out.numel() + 8 * 2**20

    names = ("h", "w", "b", "v", "gate_w", "gate_b", "context", "value", "score_bias")
    needs = [tensors[name] is not None for name in names]
    dout = torch.empty_like(out)
    with _Peak() as backward:
        saved = exact if exact.numel() else out, lse, scores
        grads = location_bwd.location_bwd(given, *saved, dout, None, None, needs)
    parameters = 4 * sum(tensors[name].numel() for name in names[1:6] if tensors[name] is not None)
    sequences = 4 * tensors["context"].numel() if tensors["context"] is not None else 0
    offsets = 16 * len(tensors["h"]) if tensors["cu_seqlens"] is not None else 0
    allowed = nbytes(*grads) + location.WORKSPACE_BYTES * 1.01 + 4 * parameters + sequences + offsets + 16 * MIB
    assert backward.most <= allowed, f"{backward.most / MIB:.0f} MiB, allowed {allowed / MIB:.0f}"


@pytest.mark.parametrize("groups", [10, 2000])
def test_two_levels_keep_no_more_than_their_segments(groups):
    """In one launch, where documents fill the chip, and in two: sentences of five words, thirty a document."""
    D, A, sentences = 128, 128, 30 * groups

    def new(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    level = (new(D, A), new(A), new(A, 1), None, None, None)
    offsets = (new(sentences + 1, dtype=torch.int32), new(groups + 1, dtype=torch.int32))
    h = new(5 * sentences, D)
    with _Peak() as peak:
        results = hierarchical.hierarchical_fwd(
            HierarchicalInputs(h, *level, *level, None, *offsets, "tanh", "sigmoid", False, "tanh", "sigmoid", False),
            True,
        )
    segments = results[-1]
    assert peak.most <= nbytes(*results) + nbytes(segments) + location.WORKSPACE_BYTES
