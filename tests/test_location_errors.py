"""Bad input to location attention: an error that names the argument."""

import os
import re
import subprocess
import sys

import pytest
import torch

from fused_attn import location_attention

B, T, D, A, R, N = 2, 5, 3, 4, 2, 7


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def call(device, **changed):
    """A good call, padded or (with cu_seqlens) packed, with some arguments changed."""
    packed = changed.get("cu_seqlens") is not None
    good = {"h": zeros(N, D) if packed else zeros(B, T, D), "w": zeros(D, A), "b": zeros(A), "v": zeros(A)}
    arguments = {**good, **changed}

    def move(x):
        if isinstance(x, tuple):
            return tuple(move(y) for y in x)
        return x.to(device) if isinstance(x, torch.Tensor) else x

    return location_attention(**{name: move(x) for name, x in arguments.items()})


def cu(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


GOOD = cu(0, 3, N)
JAGGED = torch.nested.nested_tensor_from_jagged(zeros(N, D), cu(0, 3, N, dtype=torch.int64))
OTHER_JAGGED = torch.nested.nested_tensor_from_jagged(zeros(N + 1, D), cu(0, 3, N + 1, dtype=torch.int64))
STRIDED_NESTED = torch.nested.nested_tensor([zeros(3, D), zeros(4, D)])

WRONG_SHAPES = {
    "h of rank 1": ("h", {"h": zeros(D)}),
    "h of rank 2 without cu_seqlens": ("h", {"h": zeros(T, D)}),
    "h of rank 4": ("h", {"h": zeros(1, B, T, D)}),
    "h of rank 3 with cu_seqlens": ("h", {"h": zeros(1, N, D), "cu_seqlens": GOOD}),
    "h without features": ("h", {"h": zeros(B, T, 0), "w": zeros(0, A)}),
    "w of another width": ("w", {"w": zeros(D + 1, A)}),
    "w of rank 1 with v": ("w", {"w": zeros(D)}),
    "w of rank 3": ("w", {"w": zeros(D, A, 1)}),
    "w without columns": ("w", {"w": zeros(D, 0), "b": zeros(0), "v": zeros(0)}),
    "b of another width": ("b", {"b": zeros(A + 1)}),
    "b of rank 2": ("b", {"b": zeros(1, A)}),
    "b of rank 1 for one linear score": ("b", {"w": zeros(D), "b": zeros(1), "v": None}),
    "b of rank 0 for hops": ("b", {"w": zeros(D, R), "b": zeros(), "v": None}),
    "v of another width": ("v", {"v": zeros(A + 1)}),
    "v of rank 3": ("v", {"v": zeros(A, R, 1)}),
    "v without hops": ("v", {"v": zeros(A, 0)}),
    "neither w nor v": ("w", {"w": None, "v": None, "b": None}),
    "gate without w": ("w", {"w": None, "b": None, "v": zeros(D), "gate": (zeros(D, A), None)}),
    "v of another width than h, without w": ("v", {"w": None, "b": None}),
    "gate without v": ("gate", {"v": None, "gate": (zeros(D, A), None)}),
    "gate weight of another shape": (r"gate\[0\]", {"gate": (zeros(D, A + 1), None)}),
    "gate bias of another width": (r"gate\[1\]", {"gate": (zeros(D, A), zeros(A + 1))}),
    "context of another width": ("context", {"context": zeros(B, A + 1)}),
    "context for another batch": ("context", {"context": zeros(B + 1, A)}),
    "context for other rows": ("context", {"context": zeros(B, T + 1, A)}),
    "context of rank 1": ("context", {"context": zeros(A)}),
    "packed context for other segments": ("context", {"context": zeros(3, A), "cu_seqlens": GOOD}),
    "packed context of S = N": ("context", {"context": zeros(N, A), "cu_seqlens": cu(*range(N + 1))}),
    "values for other rows": ("values", {"values": zeros(B, T + 1, D)}),
    "values of rank 2": ("values", {"values": zeros(B, T)}),
    "packed values for other rows": ("values", {"values": zeros(N + 1, D), "cu_seqlens": GOOD}),
    "mask for other rows": ("mask", {"mask": zeros(B, T + 1, dtype=torch.bool)}),
    "mask of rank 1": ("mask", {"mask": zeros(T, dtype=torch.bool)}),
    "packed mask for other rows": ("mask", {"mask": zeros(N + 1, dtype=torch.bool), "cu_seqlens": GOOD}),
    "score_bias for other rows": ("score_bias", {"score_bias": zeros(B, T + 1)}),
    "score_bias of rank 3": ("score_bias", {"score_bias": zeros(B, T, 1)}),
    "cu_seqlens of rank 2": ("cu_seqlens", {"cu_seqlens": GOOD[None]}),
    "cu_seqlens of rank 0": ("cu_seqlens", {"cu_seqlens": cu(0)[0]}),
    "cu_seqlens without an offset": ("cu_seqlens", {"cu_seqlens": cu()}),
    "cu_seqlens with padded keys": ("h", {"h": zeros(B, T, D), "cu_seqlens": GOOD}),
    "jagged h with a mask": ("mask", {"h": JAGGED, "mask": zeros(N, dtype=torch.bool)}),
    "jagged h with cu_seqlens": ("cu_seqlens", {"h": JAGGED, "cu_seqlens": GOOD}),
    "jagged h with packed values": ("values", {"h": JAGGED, "values": zeros(N, D)}),
    "jagged h with values of other segments": ("values", {"h": JAGGED, "values": OTHER_JAGGED}),
    "jagged h with packed score_bias": ("score_bias", {"h": JAGGED, "score_bias": zeros(N)}),
    "nested h that is not jagged": ("h", {"h": STRIDED_NESTED}),
}
WRONG_VALUES = {
    "unknown activation": ("activation", {"activation": "softplus"}),
    "unknown gate_activation": ("gate_activation", {"gate_activation": "Sigmoid"}),
    "unknown impl": ("impl", {"impl": "cuda"}),
    "dropout_p under 0": ("dropout_p", {"dropout_p": -0.1}),
    "dropout_p of 1": ("dropout_p", {"dropout_p": 1.0}),
    "weights of a window over packed rows": (
        "return_weights",
        {"cu_seqlens": GOOD, "window": (None, 0), "return_weights": True},
    ),
    "weights of a window over jagged rows": (
        "return_weights",
        {"h": JAGGED, "window": (None, 0), "return_weights": True},
    ),
    "dropout_p of NaN": ("dropout_p", {"dropout_p": float("nan")}),
}
WRONG_OFFSETS = {
    "not from 0": cu(1, 3, N),
    "from under 0": cu(-1, 3, N),
    "not to N": cu(0, 3, N - 1),
    "past N": cu(0, 3, N + 1),
    "unsorted": cu(0, 5, 3, N),
    "past N inside": cu(0, N + 2, N),
}
WRONG_TYPES = {
    "h is a list": ("h", {"h": [[[0.0] * D] * T] * B}),
    "h of integers": ("h", {"h": zeros(B, T, D, dtype=torch.int64)}),
    "h of complex numbers": ("h", {"h": zeros(B, T, D, dtype=torch.complex64)}),
    "w of another dtype": ("w", {"w": zeros(D, A, dtype=torch.float16)}),
    "b of another dtype": ("b", {"b": zeros(A, dtype=torch.float64)}),
    "b is a number": ("b", {"b": 0.0}),
    "v of another dtype": ("v", {"v": zeros(A, dtype=torch.bfloat16)}),
    "gate is a tensor": ("gate", {"gate": zeros(D, A)}),
    "gate of three": ("gate", {"gate": (zeros(D, A), zeros(A), zeros(A))}),
    "gate weight of another dtype": (r"gate\[0\]", {"gate": (zeros(D, A, dtype=torch.float16), None)}),
    "gate bias of another dtype": (r"gate\[1\]", {"gate": (zeros(D, A), zeros(A, dtype=torch.float16))}),
    "context of another dtype": ("context", {"context": zeros(B, A, dtype=torch.float64)}),
    "values of another dtype": ("values", {"values": zeros(B, T, D, dtype=torch.float16)}),
    "mask of numbers": ("mask", {"mask": zeros(B, T)}),
    "mask of bytes": ("mask", {"mask": zeros(B, T, dtype=torch.uint8)}),
    "score_bias of another dtype": ("score_bias", {"score_bias": zeros(B, T, dtype=torch.float64)}),
    "score_bias of integers": ("score_bias", {"score_bias": zeros(B, T, dtype=torch.int32)}),
    "cu_seqlens of int64": ("cu_seqlens", {"cu_seqlens": GOOD.long()}),
    "cu_seqlens is a list": ("cu_seqlens", {"cu_seqlens": [0, 3, N]}),
    "jagged h with a list as values": ("values", {"h": JAGGED, "values": [0.0]}),
    "window is a number": ("window", {"window": 3}),
    "window of one": ("window", {"window": (3,)}),
    "window is a list": ("window", {"window": [None, 0]}),
    "window of floats": ("window", {"window": (None, 0.5)}),
    "window of booleans": ("window", {"window": (None, True)}),
}


def by_title(table):
    return pytest.mark.parametrize(
        ("name", "changed"), [pytest.param(*row, id=title) for title, row in table.items()]
    )


@by_title(WRONG_SHAPES | WRONG_VALUES)
def test_wrong_shapes_and_values_raise_value_error_with_the_name(name, changed, device):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*; got "):
        call(device, **changed)


@by_title(WRONG_TYPES)
def test_wrong_types_raise_type_error_with_the_name(name, changed, device):
    with pytest.raises(TypeError, match=rf"^{name}: expected .*; got "):
        call(device, **changed)


@pytest.mark.parametrize("offsets", WRONG_OFFSETS.values(), ids=WRONG_OFFSETS.keys())
def test_wrong_offsets_raise_value_error_with_the_name(offsets):
    """On the CPU; on a GPU they stop the program, which a test cannot survive."""
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected non-decreasing offsets from 0"):
        call(torch.device("cpu"), cu_seqlens=offsets, impl="reference")


def test_tensors_on_another_device_raise_value_error_with_the_name():
    good = {"h": zeros(B, T, D), "w": zeros(D, A), "b": zeros(A), "v": zeros(A)}
    for name in ("w", "b", "v"):
        with pytest.raises(ValueError, match=rf"^{name}: expected device cpu; got meta"):
            location_attention(**{**good, name: good[name].to("meta")})


@pytest.mark.parametrize("name", ["h", "w", "mask", "activation", "dropout_p"])
def test_compiled_calls_raise_the_same_errors(name, device):
    torch.compiler.reset()
    changed = {
        "h": {"h": zeros(B, T, D, dtype=torch.int64)}, "w": {"w": zeros(D + 1, A)}, "mask": {"mask": zeros(B, T)},
        "activation": {"activation": "softplus"}, "dropout_p": {"dropout_p": 1.5},
    }[name]  # fmt: skip
    compiled = torch.compile(lambda: call(device, **changed), backend="eager")
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: expected "):
        compiled()


def test_float64_is_an_error_for_the_kernel_only(device):
    double = {name: x.double() for name, x in {"h": zeros(B, T, D), "w": zeros(D, A), "v": zeros(A)}.items()}
    with pytest.raises(ValueError, match=r"^impl: 'triton' has no float64"):
        call(device, **double, b=None, impl="triton")
    assert call(device, **double, b=None, impl="auto").dtype == torch.float64


def test_more_than_128_hops_are_an_error_for_the_kernel_only(device):
    with pytest.raises(ValueError, match=r"^impl: 'triton' holds at most 128 hops"):
        call(device, v=zeros(A, 129), impl="triton")
    assert call(device, v=zeros(A, 129), impl="auto").shape == (B, 129, D)


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
