"""Bad input to general attention: an error that names the argument."""

import pytest
import torch
from _concat import ALL

from fused_attn import GeneralAttention, general_attention

B, H, TQ, TK, DQ, DK, DV, N, M = 2, 3, 4, 5, 3, 2, 6, 7, 9


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def bools(*shape):
    return zeros(*shape, dtype=torch.bool)


def cu(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


DOT = {"query": zeros(B, TQ, DK), "key": zeros(B, TK, DK)}
PADDED = {"query": zeros(B, TQ, DQ), "key": zeros(B, TK, DK), "value": zeros(B, TK, DV), "weight": zeros(DQ, DK)}
HEADS = {
    "query": zeros(B, H, TQ, DQ), "key": zeros(B, H, TK, DK), "value": zeros(B, H, TK, DV),
    "weight": zeros(H, DQ, DK),
}  # fmt: skip
PACKED = {
    "query": zeros(N, DQ), "key": zeros(M, DK), "value": zeros(M, DV), "weight": zeros(DQ, DK),
    "cu_seqlens_q": cu(0, 3, N), "cu_seqlens_k": cu(0, 5, M),
}  # fmt: skip
PACKED_HEADS = PACKED | {"query": zeros(N, H, DQ), "key": zeros(M, H, DK), "value": zeros(M, H, DV)}


def call(device, arguments):
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    return general_attention(**moved)


WRONG_SHAPES = {
    "query of rank 2 without cu_seqlens": ("query", PADDED | {"query": zeros(TQ, DQ)}),
    "query of rank 5": ("query", PADDED | {"query": zeros(1, B, H, TQ, DQ)}),
    "query of rank 4 with cu_seqlens": ("query", PACKED | {"query": zeros(1, 1, N, DQ)}),
    "query of rank 1 with cu_seqlens": ("query", PACKED | {"query": zeros(N)}),
    "query without features": ("query", {"query": zeros(B, TQ, 0), "key": zeros(B, TK, 0)}),
    "key of another width without a weight": ("key", DOT | {"key": zeros(B, TK, DK + 1)}),
    "key of another batch": ("key", PADDED | {"key": zeros(B + 1, TK, DK)}),
    "key without heads": ("key", HEADS | {"key": zeros(B, TK, DK)}),
    "key with other heads": ("key", HEADS | {"key": zeros(B, H + 1, TK, DK)}),
    "key with heads alone": ("key", PADDED | {"key": zeros(B, H, TK, DK)}),
    "key without features": ("key", PADDED | {"key": zeros(B, TK, 0)}),
    "packed key with heads alone": ("key", PACKED | {"key": zeros(M, H, DK)}),
    "packed key with other heads": ("key", PACKED_HEADS | {"key": zeros(M, H + 1, DK)}),
    "value for other rows": ("value", PADDED | {"value": zeros(B, TK + 1, DV)}),
    "value of another batch": ("value", PADDED | {"value": zeros(B + 1, TK, DV)}),
    "value without heads": ("value", HEADS | {"value": zeros(B, TK, DV)}),
    "value without features": ("value", PADDED | {"value": zeros(B, TK, 0)}),
    "packed value for other rows": ("value", PACKED | {"value": zeros(M + 1, DV)}),
    "weight for other queries": ("weight", PADDED | {"weight": zeros(DQ + 1, DK)}),
    "weight for other keys": ("weight", PADDED | {"weight": zeros(DQ, DK + 1)}),
    "weight with heads alone": ("weight", PADDED | {"weight": zeros(H, DQ, DK)}),
    "weight of other heads": ("weight", HEADS | {"weight": zeros(H + 1, DQ, DK)}),
    "weight of rank 1": ("weight", PADDED | {"weight": zeros(DK)}),
    "mask for other keys": ("mask", PADDED | {"mask": bools(B, TK + 1)}),
    "mask for other queries": ("mask", PADDED | {"mask": bools(B, TQ + 1, TK)}),
    "mask that would broadcast": ("mask", PADDED | {"mask": bools(1, TQ, TK)}),
    "mask with heads": ("mask", HEADS | {"mask": bools(B, H, TQ, TK)}),
    "mask of rank 1": ("mask", PADDED | {"mask": bools(TK)}),
    "mask of packed rows": ("mask", PACKED | {"mask": bools(M)}),
    "score_bias for other keys": ("score_bias", PADDED | {"score_bias": zeros(TK + 1)}),
    "score_bias for other queries": ("score_bias", PADDED | {"score_bias": zeros(TQ + 1, 1)}),
    "score_bias with heads alone": ("score_bias", PADDED | {"score_bias": zeros(B, 1, TQ, TK)}),
    "score_bias for other heads": ("score_bias", HEADS | {"score_bias": zeros(H + 1, 1, 1)}),
    "score_bias of packed rows": ("score_bias", PACKED | {"score_bias": zeros(M)}),
    "cu_seqlens_q alone": ("cu_seqlens_k", PACKED | {"cu_seqlens_k": None}),
    "cu_seqlens_k alone": ("cu_seqlens_q", PACKED | {"cu_seqlens_q": None}),
    "cu_seqlens_q of rank 2": ("cu_seqlens_q", PACKED | {"cu_seqlens_q": cu(0, 3, N)[None]}),
    "cu_seqlens_k without an offset": ("cu_seqlens_k", PACKED | {"cu_seqlens_k": cu()}),
    "cu_seqlens_k of other sequences": ("cu_seqlens_k", PACKED | {"cu_seqlens_k": cu(0, 1, 5, M)}),
    "unknown activation": ("activation", PADDED | {"activation": "softplus"}),
    "unknown impl": ("impl", PADDED | {"impl": "cuda"}),
    "scale of NaN": ("scale", PADDED | {"scale": float("nan")}),
    "scale of infinity": ("scale", PADDED | {"scale": float("inf")}),
    "dropout_p under 0": ("dropout_p", PADDED | {"dropout_p": -0.1}),
    "dropout_p of 1": ("dropout_p", PADDED | {"dropout_p": 1.0}),
    "return_weights of packed rows": ("return_weights", PACKED | {"return_weights": True}),
}
WRONG_TYPES = {
    "query is a list": ("query", DOT | {"query": [[[0.0] * DK] * TQ] * B}),
    "query is missing": ("query", DOT | {"query": None}),
    "query of integers": ("query", DOT | {"query": zeros(B, TQ, DK, dtype=torch.int64)}),
    "key of another dtype": ("key", DOT | {"key": zeros(B, TK, DK, dtype=torch.float16)}),
    "key is missing": ("key", DOT | {"key": None}),
    "value of another dtype": ("value", PADDED | {"value": zeros(B, TK, DV, dtype=torch.float64)}),
    "weight of another dtype": ("weight", PADDED | {"weight": zeros(DQ, DK, dtype=torch.bfloat16)}),
    "weight is a list": ("weight", PADDED | {"weight": [[0.0] * DK] * DQ}),
    "scale is a tensor": ("scale", PADDED | {"scale": zeros()}),
    "scale is a boolean": ("scale", PADDED | {"scale": True}),
    "mask of numbers": ("mask", PADDED | {"mask": zeros(B, TK)}),
    "score_bias of another dtype": ("score_bias", PADDED | {"score_bias": zeros(TK, dtype=torch.float64)}),
    "score_bias is a number": ("score_bias", PADDED | {"score_bias": 1.0}),
    "cu_seqlens_q of int64": ("cu_seqlens_q", PACKED | {"cu_seqlens_q": cu(0, 3, N, dtype=torch.int64)}),
    "cu_seqlens_k is a list": ("cu_seqlens_k", PACKED | {"cu_seqlens_k": [0, 5, M]}),
    "window is a number": ("window", PADDED | {"window": 3}),
    "window of one": ("window", PADDED | {"window": (3,)}),
    "window of floats": ("window", PADDED | {"window": (3.0, 4)}),
    "window of booleans": ("window", PADDED | {"window": (True, None)}),
    "dropout_p is None": ("dropout_p", PADDED | {"dropout_p": None}),
}


def by_title(table):
    return pytest.mark.parametrize(
        ("name", "arguments"), [pytest.param(*row, id=title) for title, row in table.items()]
    )


@pytest.mark.parametrize(
    "arguments", [PADDED, HEADS, PACKED, PACKED_HEADS], ids=["padded", "heads", "packed", "packed heads"]
)
@pytest.mark.parametrize("impl", ALL)
def test_the_good_calls_are_good(impl, arguments, device):
    assert call(device, arguments | {"impl": impl}).shape == (*arguments["query"].shape[:-1], DV)
    assert call(device, arguments | {"impl": impl, "value": None}).shape == (*arguments["query"].shape[:-1], DK)


@by_title(WRONG_SHAPES)
def test_wrong_shapes_and_values_raise_value_error_with_the_name(name, arguments, device):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*; got "):
        call(device, arguments)


@by_title(WRONG_TYPES)
def test_wrong_types_raise_type_error_with_the_name(name, arguments, device):
    with pytest.raises(TypeError, match=rf"^{name}: expected .*; got "):
        call(device, arguments)


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("offsets", [cu(1, 3, N), cu(0, 3, N - 1), cu(0, 3, N + 1), cu(0, 5, 3, N)], ids=str)
def test_wrong_offsets_raise_value_error_with_the_name(offsets, side):
    """On the CPU; on a GPU they stop the program, which a test cannot survive."""
    good = {"query": zeros(N, DK), "key": zeros(N, DK)}
    both = {name: cu(0, 3, N) for name in ("cu_seqlens_q", "cu_seqlens_k")} | {f"cu_seqlens_{side}": offsets}
    with pytest.raises(ValueError, match=rf"^cu_seqlens_{side}: expected non-decreasing offsets from 0"):
        general_attention(**good, **both)


@pytest.mark.parametrize("name", ["key", "value", "weight", "mask", "score_bias"])
def test_tensors_on_another_device_raise_value_error_with_the_name(name):
    good = PADDED | {"mask": bools(B, TK), "score_bias": zeros(TK)}
    with pytest.raises(ValueError, match=rf"^{name}: expected device cpu; got meta"):
        general_attention(**{**good, name: good[name].to("meta")})


@pytest.mark.parametrize("title", ["weight for other keys", "mask of numbers", "window is a number"])
def test_compiled_calls_raise_the_same_errors(title, device):
    torch.compiler.reset()
    name, arguments = (WRONG_SHAPES | WRONG_TYPES)[title]
    compiled = torch.compile(lambda: call(device, arguments), backend="eager")
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: expected "):
        compiled()


def test_float64_is_an_error_for_the_kernel_only(device):
    double = {name: x.double() for name, x in PADDED.items()}
    with pytest.raises(ValueError, match=r"^impl: 'triton' has no float64"):
        call(device, double | {"impl": "triton"})
    assert call(device, double | {"impl": "auto"}).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"query_dim": 0}, "query_dim"),
        ({"key_dim": 0}, "key_dim"),
        ({"num_heads": 0}, "num_heads"),
        ({"activation": "softplus"}, "activation"),
        ({"dropout": 1.0}, "dropout"),
    ],
    ids=str,
)
def test_constructor_errors_name_the_argument(arguments, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*; got "):
        GeneralAttention(**{"query_dim": 2, "key_dim": 3, **arguments})


@pytest.mark.parametrize("name", ["query", "key"])
def test_module_inputs_of_another_rank_raise_value_error_with_the_name(name):
    good = {"query": zeros(B, TQ, 2), "key": zeros(B, TK, 3)}
    with pytest.raises(ValueError, match=rf"^{name}: expected .*; got "):
        GeneralAttention(2, 3)(**(good | {name: good[name][0]}))
