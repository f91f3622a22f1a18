"""Lengths that change from call to call do not compile a kernel again and again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="compiles with Triton")
pytest.importorskip("rich", reason="the table prints with rich")

ROOT = Path(__file__).parent.parent
# The kernels must be imported without the interpreter, which this process may have on.
ENV = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
FAMILIES = {
    "location",
    "location window",
    "concat",
    "distance",
    "general",
    "hierarchical",
    "statistics",
    "graph",
    "recurrent",
    "aware",
    "target",
}
KERNELS = 39  # at least: a family whose kernels are not met counts nothing


def run(script: list[str]) -> str:
    done = subprocess.run([sys.executable, *script], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.stdout


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_sixty_calls_of_any_lengths_are_at_most_four_variants_of_a_kernel(target: str) -> None:
    found = json.loads(run(["-m", "bench.variants", "--target", target, "--json"]))
    assert set(found) == FAMILIES
    counts = {
        (family, case, kernel): n
        for family, cases in found.items()
        for case, kernels in cases.items()
        for kernel, n in kernels.items()
    }
    assert len({kernel for _, _, kernel in counts}) >= KERNELS
    assert not {name: n for name, n in counts.items() if n > 4}


SCRIPT = """
import torch
from bench.variants import record
from bench.families.location import LocationCase
from bench.families.problem import BF16
from fused_attn.kernels import arguments, location
from fused_attn.kernels.chip import LENGTHS

case = lambda T: LocationCase(BF16, 3, T, 64, 32)
with record("sm_90") as keys:
    case(64).launch()
    case(60).launch()
assert {len(k) for k in keys.values()} == {1}, keys
launch, jit = location.launch, arguments.triton.jit
# The same kernel, by another object.
location.launch = lambda kernel, *args, **more: launch(jit(kernel.fn, do_not_specialize=LENGTHS), *args, **more)
with record("sm_90") as keys:
    case(64).launch()
assert all(len(k) == 1 for k in keys.values())
# Nothing left out: each of these is a variant.
location.launch = lambda kernel, *args, **more: launch(jit(kernel.fn), *args, **more)
with record("sm_90") as keys:
    for T in (1, 63, 64):
        case(T).launch()
assert len(keys["_location_fwd_kernel"]) == 4 - 1, keys
print("passed")
"""


def test_a_kernel_that_is_compiled_for_its_lengths_is_counted() -> None:
    assert run(["-c", SCRIPT]) == "passed\n"


STRIDES = """
import torch
from fused_attn.kernels.arguments import heads, untold
from fused_attn.kernels.chip import stride_of

def outer(x):
    found = heads(x, packed=False)
    return found.UNIT.value, found.stride_b, found.stride_h

whole, odd, rows = (torch.empty(2, 3, 32, n) for n in (64, 25, 36))
assert outer(whole) == (16, 3 * 32 * 64, 32 * 64)
assert outer(odd) == (1, untold(3 * 32 * 25), untold(32 * 25))  # multiples of 16 here, and not at other lengths
assert outer(rows) == (4, untold(3 * 32 * 9), untold(32 * 9))
assert outer(whole[:, :, :1]) == (16, 3 * 32 * 64, 32 * 64)
assert stride_of(torch.empty(2, 8, 1).transpose(1, 2), 1) == 8  # PyTorch says 1
print("passed")
"""


def test_strides_keep_the_hint_that_wide_loads_need_where_they_have_it_at_any_length() -> None:
    assert run(["-c", STRIDES]) == "passed\n"
