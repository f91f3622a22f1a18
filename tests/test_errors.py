"""Bad calls that are in the table of _errors.py: an error that names the argument. See also test_inputs.py."""

import os
import re
import subprocess
import sys

import pytest
import torch
from _compare import IMPLS
from _errors import BAD, CAUSES, CONSTRUCTORS, ON_CPU
from _inputs import ROWS, A, B, D, floats, map_tensors

from fused_attn import location_attention

COMPILED = [
    "location, gated: w of a layer",
    "LocationAttention: h with channels first",
    "location, gated: dropout_p of 1",
    "statistics: h of integers",
    "statistics: mask of numbers",
    "statistics: unknown activation",
    "target: w1 of a layer",
    "concat: mask of other keys",
    "concat: window is a number",
    "ConcatAttention: context of the keys, of batch 1",
    "general: weight of rank 1",
    "general, packed: score_bias of heads alone",
    "graph: indices of 16 bits",
    "hierarchical: outer v of another width",
    "word by word: premise is missing",
    "location aware: u transposed",
    "LocationAwareAttention: query with an axis of queries",
]
KERNELS = ["location, window", "statistics", "target", "concat", "general", "graph", "hierarchical", "word by word"]
WITH_IMPL = [name for name in ROWS if name not in ("csr_from_edges", "transpose_csr", "RaggedRNN")]


def call(row, changed, device):
    """The good call of a row with some arguments changed, on a device."""
    made = ROWS[row].make()
    made = made.to(device) if isinstance(made, torch.nn.Module) else made
    arguments = {**ROWS[row].arguments, **changed}
    return made(**map_tensors(lambda x: x if x.is_meta else x.to(device), arguments))


def assert_raises(row, bad, device):
    with pytest.raises(bad.error) as raised:
        call(row, bad.changed, device)
    assert str(raised.value).startswith(bad.text)
    assert "; got " in str(raised.value)


@pytest.mark.whole
@pytest.mark.parametrize(("row", "bad"), BAD.values(), ids=BAD.keys())
def test_a_bad_call_raises_with_the_name(row, bad, device):
    assert_raises(row, bad, device)


@pytest.mark.whole
@pytest.mark.parametrize(("row", "bad"), ON_CPU.values(), ids=ON_CPU.keys())
def test_on_the_cpu_a_bad_call_raises_with_the_name(row, bad):
    """Wrong numbers in a structure stop the program on a GPU, which a test cannot survive."""
    assert_raises(row, bad, torch.device("cpu"))


@pytest.mark.whole
@pytest.mark.parametrize(("numbers", "cause"), CAUSES.values(), ids=CAUSES.keys())
def test_wrong_offsets_are_told_their_likely_cause(numbers, cause):
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected non-decreasing offsets") as raised:
        location_attention(torch.zeros(9, D), torch.zeros(D), cu_seqlens=torch.tensor(numbers, dtype=torch.int32))
    said = "cu_seqlens: expected non-decreasing offsets from 0 to the number of packed rows, 9; got "
    assert str(raised.value) == f"{said}{numbers}{'' if cause is None else f'; {cause}'}"


@pytest.mark.parametrize("title", COMPILED)
def test_compiled_a_bad_call_raises_the_same(title, device):
    torch.compiler.reset()
    row, bad = BAD[title]
    with pytest.raises(bad.error) as raised:
        torch.compile(lambda: call(row, bad.changed, device), backend="eager")()
    assert str(raised.value).startswith(bad.text)


@pytest.mark.whole
@pytest.mark.parametrize(("make", "name"), CONSTRUCTORS.values(), ids=CONSTRUCTORS.keys())
def test_a_bad_constructor_raises_with_the_name(make, name):
    with pytest.raises(ValueError, match=rf"^{re.escape(name)}: expected .*; got "):
        make()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("row", WITH_IMPL)
def test_the_good_call_is_good(row, impl, device):
    got, want = call(row, {"impl": impl}, device), call(row, {"impl": "reference"}, device)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("row", KERNELS)
def test_float64_is_an_error_for_the_kernel_only(row, device):
    double = map_tensors(lambda x: x.double() if x.is_floating_point() else x, ROWS[row].arguments)
    with pytest.raises(ValueError, match=r"^impl: 'triton' has no float64"):
        call(row, double | {"impl": "triton"}, device)
    out = call(row, double, device)
    assert (out[0] if isinstance(out, tuple) else out).dtype == torch.float64


def test_more_than_128_hops_are_an_error_for_the_kernel_only(device):
    hops = {"v": floats(A, 129)}
    with pytest.raises(ValueError, match=r"^impl: 'triton' holds at most 128 hops"):
        call("location, gated", hops | {"impl": "triton", "value": None}, device)
    assert call("location, gated", hops | {"value": None}, device).shape == (B, 129, D)


def test_kernel_on_a_cpu_tensor_without_the_interpreter_says_what_to_do():
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    script = (
        "import torch; from fused_attn import location_attention\n"
        "try: location_attention(torch.zeros(1, 2, 3), torch.zeros(3), impl='triton')\n"
        "except ValueError as error: print(error)"
    )
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    said = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert re.search(r"^impl: 'triton' got a CPU tensor; .*TRITON_INTERPRET=1", said.stdout)
