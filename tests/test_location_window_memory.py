"""Peak memory of the windowed form of location attention, in a fresh process: linear in the rows."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from test_concat_memory import EXTRA, ROOT

WIDTH = 32  # against T·T; with 8, much of it was in blocks that a process keeps
LENGTHS = (4096, 8192, 16_384)
CHILD = """
import json, sys
import torch
from bench.run import peak_bytes, runner
from fused_attn import location_attention

device, impl, width, lengths, windows = json.loads(sys.argv[1])
device = torch.device(device)
torch.set_num_threads(1)
peaks = {}
for mode in ("forward", "forward+backward"):
    for window in windows:
        found = peaks.setdefault(f"{mode}, {window}", [])
        for rows in lengths:
            inputs = {"h": torch.randn(1, rows, width, device=device), "w": torch.randn(width, device=device)}
            dout = torch.randn(1, rows, width, device=device)
            fn = runner(lambda **x: location_attention(**x, window=tuple(window), impl=impl), inputs, mode, dout)
            fn()
            found.append(peak_bytes(fn, device))
print(json.dumps(peaks))
"""


def peaks(device: torch.device, impl: str, lengths: tuple[int, ...], windows: list) -> dict[str, list[int]]:
    """Bytes by mode and window, in the order of the lengths."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # see test_concat_memory
    command = [sys.executable, "-c", CHILD, json.dumps([device.type, impl, WIDTH, lengths, windows])]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if any(None in series for series in found.values()):
        pytest.skip("this system does not tell what a process holds")
    return found


def assert_linear(name: str, found: list[int], extra: int) -> None:
    """Twice the rows take twice the bytes, four times where all pairs are there; a process's peak is not exact."""
    for before, after in itertools.pairwise(found):
        assert after <= 2.5 * before + extra, f"{name}: {found} grows faster than linearly"


def test_memory_is_linear_in_the_rows(device):
    windows = [(None, 0), (2, None), (20, 20)]
    for name, found in peaks(device, "auto", LENGTHS, windows).items():
        assert_linear(name, found, EXTRA[device.type])
        assert found[-1] <= LENGTHS[-1] ** 2, f"{name}: {found}, a quarter of the scores of all pairs"


def test_the_reference_is_not_linear(device):
    """So the test above can fail."""
    lengths = (512, 1024, 2048)
    for name, found in peaks(device, "reference", lengths, [(None, 0)]).items():
        with pytest.raises(AssertionError, match="faster than linearly"):
            assert_linear(name, found, EXTRA[device.type])
