"""What `import fused_attn` does to a process, each time in a fresh one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # every import of it raises ImportError
import torch
from fused_attn import location_attention

h = torch.randn(2, 5, 3, requires_grad=True)
w = torch.randn(3)
for impl in ("reference", "auto"):
    out = location_attention(h, w, impl=impl)
    out.sum().backward()
    assert out.shape == (2, 3) and h.grad.isfinite().all()
try:
    location_attention(h, w, impl="triton")
except ValueError as error:
    print(error)
"""
TIMED = """
import sys, time
import torch
before = time.process_time()  # not the clock's: other programs may keep the cores busy
import fused_attn
print(time.process_time() - before)
"""
# Every public op, forward and backward, on a CPU: how many modules each imports that were not there.
FIRST_CALLS = """
import sys, torch
import fused_attn as f

h, q = (torch.randn(2, t, 8, requires_grad=True) for t in (12, 5))
rows, w, v = h.flatten(0, 1), torch.randn(8, 4), torch.randn(4)
cu = torch.tensor([0, 10, 24], dtype=torch.int32)
groups = torch.tensor([0, 2], dtype=torch.int32)
between = f.RaggedRNN(torch.nn.GRU(8, 4))
edges = torch.randint(12, (2, 30))


def graph():
    indptr, indices, _ = f.csr_from_edges(edges, 12)
    return f.graph_attention(h[0], h[0], v.repeat(2), indptr, indices)


def step():
    attend = f.LocationAwareAttention(8, 8, 4)
    context, previous = attend(q[:, 0], h)
    return attend(q[:, 1], h, previous=previous)[0]


calls = {
    "location": lambda: f.location_attention(h, w, v=v),
    "location packed, dropout": lambda: f.location_attention(rows, w, v=v, cu_seqlens=cu, dropout_p=0.1),
    "location causal": lambda: f.location_attention(h, w, v=v, window=(None, -1)),
    "location window": lambda: f.location_attention(h, w, v=v, window=(2, 2), return_weights=True)[1],
    "location window packed": lambda: f.location_attention(rows, w, v=v, cu_seqlens=cu, window=(0, None)),
    "concat": lambda: f.concat_attention(q, h, h, v.repeat(2)),
    "concat window": lambda: f.concat_attention(h, h, h, v.repeat(2), window=(1, 1), return_weights=True)[1],
    "concat packed": lambda: f.concat_attention(rows, rows, rows, v.repeat(2), cu_seqlens_q=cu, cu_seqlens_k=cu),
    "general": lambda: f.general_attention(q, h),
    "general causal": lambda: f.general_attention(h[:, None], h[:, None], h[:, None], window=(None, 0)),
    "general window": lambda: f.general_attention(h, h, window=(2, 2), dropout_p=0.1),
    "general packed": lambda: f.general_attention(rows, rows, cu_seqlens_q=cu, cu_seqlens_k=cu),
    "hierarchical": lambda: f.HierarchicalAttention(8, 4)(rows, cu, groups),
    "hierarchical, GRU": lambda: f.HierarchicalAttention(8, 4, between=between, between_dim=4)(rows, cu, groups),
    "word by word": lambda: f.WordByWordAttention(8, 8, 8)(h, q),
    "word by word packed": lambda: f.WordByWordAttention(8, 8, 8)(
        rows, rows, cu_seqlens_premise=cu, cu_seqlens_hypothesis=cu
    ),
    "location-aware": step,
    "statistics": lambda: sum(f.statistics_pooling(h, w, None, v)),
    "statistics packed": lambda: sum(f.statistics_pooling(rows, w, None, v, cu_seqlens=cu)),
    "target": lambda: f.TargetAttention(8)(q[:, 0], h),
    "target packed": lambda: f.TargetAttention(8, softmax=True)(q[:, 0], rows, cu_seqlens=cu),
    "graph": graph,
}
for name, call in calls.items():
    before = len(sys.modules)
    call().sum().backward()
    print(name, len(sys.modules) - before)
assert not {"torch._dynamo", "sympy", "triton"} & set(sys.modules)
"""


def run(script: str) -> str:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def test_package_works_without_triton_and_says_what_needs_it():
    assert run(WITHOUT_TRITON).startswith("impl: 'triton' needs the package triton")


def test_import_takes_under_300_ms_beyond_torch():
    assert min(float(run(TIMED)) for _ in range(3)) < 0.3


def test_import_imports_neither_triton_nor_the_compiler():
    loaded = run("import torch, sys; import fused_attn; print(*(m for m in sys.modules))").split()
    assert not {"triton", "torch._dynamo", "torch._inductor"} & set(loaded)
    of_kernels = {name for name in loaded if name.startswith("fused_attn.kernels.")}
    assert of_kernels == {"fused_attn.kernels.inputs"}  # which has no kernel in it


def test_first_calls_import_neither_the_compiler_nor_much_else():
    grown = {name: int(n) for name, n in (line.rsplit(maxsplit=1) for line in run(FIRST_CALLS).splitlines())}
    assert len(grown) >= 16
    assert {name: n for name, n in grown.items() if n > 20} == {}


def test_version_is_known_without_an_installation():
    found = run("import fused_attn; assert '__version__' in fused_attn.__all__; print(fused_attn.__version__)")
    assert re.fullmatch(r"\d+\.\d+\.\d+", found)
    expand = pytest.importorskip("setuptools.config.expand")
    assert expand.read_attr("fused_attn.__version__", {"fused_attn": "fused_attn"}, ROOT) == found
