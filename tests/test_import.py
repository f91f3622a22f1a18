"""What `import fused_attn` does to a process, each time in a fresh one."""

import os
import subprocess
import sys

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
before = time.perf_counter()
import fused_attn
print(time.perf_counter() - before)
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
    assert not {"triton", "torch._dynamo", "torch._inductor", "fused_attn.kernels"} & set(loaded)
