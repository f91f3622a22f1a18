"""Peak memory of the concat family, in a fresh process: linear in the queries and in the keys."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the benchmark, which measures, prints with rich")

ROOT = Path(__file__).parent.parent
WIDTH = 8  # A and Dv: small, so that memory of size Tq·Tk shows above what the rows themselves take
# By type of device: the longest sequence, and bytes that may be there or not. On a GPU those are the workspace of the
# backward, at most 64 MiB whatever the sizes. The scores of the longest sequence are 4 GiB there, 64 MiB on a CPU.
LONGEST = {"cpu": 4096, "cuda": 32_768}
EXTRA = {"cpu": 2**20, "cuda": 2**26}
CHILD = """
import json, sys
import torch
from bench.run import peak_bytes, runner
from fused_attn import concat_attention

device, impl, width, sizes = json.loads(sys.argv[1])
device = torch.device(device)
torch.set_num_threads(1)
peaks = {}
for mode in ("forward", "forward+backward"):
    for queries, keys in sizes:
        shapes = {"query": (1, queries, width), "key": (1, keys, width), "value": (1, keys, width), "v": (width,)}
        inputs = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
        dout = torch.randn(1, queries, width, device=device)
        fn = runner(lambda **x: concat_attention(**x, impl=impl), inputs, mode, dout)
        fn()
        peaks[f"{mode} {queries} {keys}"] = peak_bytes(fn, device)
print(json.dumps(peaks))
"""


def peaks(
    device: torch.device, impl: str, series: dict[str, list[tuple[int, int]]]
) -> dict[str, dict[str, list[int]]]:
    """Bytes by mode and series, in the order of the sizes."""
    sizes = sorted({size for several in series.values() for size in several})
    argument = json.dumps([device.type, impl, WIDTH, sizes])
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Every block of 64 KiB or more by itself, so that freeing one gives it back: without, a process's peak comes out
    # up to twice as high, and another one each time; with it, it repeats to 0.4 MiB.
    env["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    command = [sys.executable, "-c", CHILD, argument]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if None in found.values():
        pytest.skip("this system does not tell what a process holds")
    return {
        mode: {name: [found[f"{mode} {q} {k}"] for q, k in several] for name, several in series.items()}
        for mode in ("forward", "forward+backward")
    }


def assert_linear(name: str, bytes_by_size: list[int], score_bytes: int, extra: int) -> None:
    """Each doubling of the sizes at most doubles the step of the last; and far below one matrix of scores."""
    steps = [b - a for a, b in pairwise(bytes_by_size)]
    assert steps[1] <= 2 * max(0, steps[0]) + extra, f"{name}: {bytes_by_size} grows faster than linearly"
    assert bytes_by_size[-1] <= score_bytes / 4, f"{name}: {bytes_by_size}, where the scores are {score_bytes} bytes"


def test_memory_is_linear_in_queries_and_keys(device: torch.device) -> None:
    impl, longest = "triton" if device.type == "cuda" else "auto", LONGEST[device.type]
    lengths = [longest // n for n in (4, 2, 1)]
    series = {
        "queries": [(n, longest) for n in lengths],
        "keys": [(longest, n) for n in lengths],
        "both": [(n, n) for n in lengths],
    }
    for mode, by_series in peaks(device, impl, series).items():
        for name, found in by_series.items():
            assert_linear(f"{mode}, {name}", found, 4 * longest**2, EXTRA[device.type])


def test_the_reference_is_not_linear(device: torch.device) -> None:
    """So the test above can fail."""
    lengths = [LONGEST[device.type] // n for n in (32, 16, 8)]  # it takes 2 · WIDTH times the scores, and more
    for mode, by_series in peaks(device, "reference", {"both": [(n, n) for n in lengths]}).items():
        found = by_series["both"]
        with pytest.raises(AssertionError, match="faster than linearly"):
            assert_linear(mode, found, 2**60, EXTRA[device.type])
        with pytest.raises(AssertionError, match="where the scores are"):
            assert_linear(mode, found[-1:] * 3, 4 * lengths[-1] ** 2, EXTRA[device.type])
