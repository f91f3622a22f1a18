"""Bad input to concat attention: an error that names the argument."""

import pytest
import torch
from _concat import ALL

from fused_attn import ConcatAttention, concat_attention

B, H, TQ, TK, A, DV, N, M = 2, 3, 4, 5, 3, 6, 7, 9


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def cu(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


PADDED = {"query": zeros(B, TQ, A), "key": zeros(B, TK, A), "value": zeros(B, TK, DV), "v": zeros(A)}
HEADS = {"query": zeros(B, H, TQ, A), "key": zeros(B, H, TK, A), "value": zeros(B, H, TK, DV), "v": zeros(H, A)}
PACKED = {
    "query": zeros(N, A), "key": zeros(M, A), "value": zeros(M, DV), "v": zeros(A),
    "cu_seqlens_q": cu(0, 3, N), "cu_seqlens_k": cu(0, 5, M),
}  # fmt: skip
PACKED_HEADS = PACKED | {"query": zeros(N, H, A), "key": zeros(M, H, A), "value": zeros(M, H, DV)}


def call(device, arguments):
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    return concat_attention(**moved)


def bools(*shape):
    return zeros(*shape, dtype=torch.bool)


WRONG_SHAPES = {
    "query of rank 2 without cu_seqlens": ("query", PADDED | {"query": zeros(TQ, A)}),
    "query of rank 5": ("query", PADDED | {"query": zeros(1, B, H, TQ, A)}),
    "query of rank 4 with cu_seqlens": ("query", PACKED | {"query": zeros(1, 1, N, A)}),
    "query of rank 1 with cu_seqlens": ("query", PACKED | {"query": zeros(N)}),
    "query without features": ("query", PADDED | {"query": zeros(B, TQ, 0), "key": zeros(B, TK, 0), "v": zeros(0)}),
    "key of another width": ("key", PADDED | {"key": zeros(B, TK, A + 1)}),
    "key of another batch": ("key", PADDED | {"key": zeros(B + 1, TK, A)}),
    "key without heads": ("key", HEADS | {"key": zeros(B, TK, A)}),
    "key with other heads": ("key", HEADS | {"key": zeros(B, H + 1, TK, A)}),
    "key with heads alone": ("key", PADDED | {"key": zeros(B, H, TK, A)}),
    "packed key with heads alone": ("key", PACKED | {"key": zeros(M, H, A)}),
    "packed key with other heads": ("key", PACKED_HEADS | {"key": zeros(M, H + 1, A)}),
    "value for other rows": ("value", PADDED | {"value": zeros(B, TK + 1, DV)}),
    "value of another batch": ("value", PADDED | {"value": zeros(B + 1, TK, DV)}),
    "value without heads": ("value", HEADS | {"value": zeros(B, TK, DV)}),
    "value without features": ("value", PADDED | {"value": zeros(B, TK, 0)}),
    "packed value for other rows": ("value", PACKED | {"value": zeros(M + 1, DV)}),
    "v of another width": ("v", PADDED | {"v": zeros(A + 1)}),
    "v with heads alone": ("v", PADDED | {"v": zeros(H, A)}),
    "v of other heads": ("v", HEADS | {"v": zeros(H + 1, A)}),
    "v of rank 0": ("v", PADDED | {"v": zeros()}),
    "mask for other keys": ("mask", PADDED | {"mask": bools(B, TK + 1)}),
    "mask for other queries": ("mask", PADDED | {"mask": bools(B, TQ + 1, TK)}),
    "mask of the queries": ("mask", PADDED | {"mask": bools(B, TQ)}),
    "mask that would broadcast": ("mask", PADDED | {"mask": bools(1, TQ, TK)}),
    "mask with heads": ("mask", HEADS | {"mask": bools(B, H, TQ, TK)}),
    "mask of rank 1": ("mask", PADDED | {"mask": bools(TK)}),
    "mask of packed rows": ("mask", PACKED | {"mask": bools(M)}),
    "score_bias for other keys": ("score_bias", PADDED | {"score_bias": zeros(TK + 1)}),
    "score_bias for other queries": ("score_bias", PADDED | {"score_bias": zeros(TQ + 1, 1)}),
    "score_bias with heads alone": ("score_bias", PADDED | {"score_bias": zeros(B, 1, TQ, TK)}),
    "score_bias for other heads": ("score_bias", HEADS | {"score_bias": zeros(H + 1, 1, 1)}),
    "score_bias with no keys": ("score_bias", PADDED | {"score_bias": zeros(0)}),
    "score_bias of packed rows": ("score_bias", PACKED | {"score_bias": zeros(M)}),
    "cu_seqlens_q alone": ("cu_seqlens_k", PACKED | {"cu_seqlens_k": None}),
    "cu_seqlens_k alone": ("cu_seqlens_q", PACKED | {"cu_seqlens_q": None}),
    "cu_seqlens_q of rank 2": ("cu_seqlens_q", PACKED | {"cu_seqlens_q": cu(0, 3, N)[None]}),
    "cu_seqlens_k without an offset": ("cu_seqlens_k", PACKED | {"cu_seqlens_k": cu()}),
    "cu_seqlens_k of other sequences": ("cu_seqlens_k", PACKED | {"cu_seqlens_k": cu(0, 1, 5, M)}),
}
WRONG_VALUES = {
    "unknown activation": ("activation", PADDED | {"activation": "softplus"}),
    "unknown impl": ("impl", PADDED | {"impl": "cuda"}),
    "dropout_p under 0": ("dropout_p", PADDED | {"dropout_p": -0.1}),
    "dropout_p of 1": ("dropout_p", PADDED | {"dropout_p": 1.0}),
    "dropout_p of NaN": ("dropout_p", PADDED | {"dropout_p": float("nan")}),
    "return_weights of packed rows": ("return_weights", PACKED | {"return_weights": True}),
}
WRONG_OFFSETS = {
    "not from 0": cu(1, 3, N),
    "from under 0": cu(-1, 3, N),
    "not to N": cu(0, 3, N - 1),
    "past N": cu(0, 3, N + 1),
    "unsorted": cu(0, 5, 3, N),
}
WRONG_TYPES = {
    "query is a list": ("query", PADDED | {"query": [[[0.0] * A] * TQ] * B}),
    "query is missing": ("query", PADDED | {"query": None}),
    "query of integers": ("query", PADDED | {"query": zeros(B, TQ, A, dtype=torch.int64)}),
    "query of complex numbers": ("query", PADDED | {"query": zeros(B, TQ, A, dtype=torch.complex64)}),
    "key of another dtype": ("key", PADDED | {"key": zeros(B, TK, A, dtype=torch.float16)}),
    "key is missing": ("key", PADDED | {"key": None}),
    "value of another dtype": ("value", PADDED | {"value": zeros(B, TK, DV, dtype=torch.float64)}),
    "value is missing": ("value", PADDED | {"value": None}),
    "v of another dtype": ("v", PADDED | {"v": zeros(A, dtype=torch.bfloat16)}),
    "v is a list": ("v", PADDED | {"v": [0.0] * A}),
    "mask of numbers": ("mask", PADDED | {"mask": zeros(B, TK)}),
    "mask of bytes": ("mask", PADDED | {"mask": zeros(B, TK, dtype=torch.uint8)}),
    "score_bias of another dtype": ("score_bias", PADDED | {"score_bias": zeros(TK, dtype=torch.float64)}),
    "score_bias of integers": ("score_bias", PADDED | {"score_bias": zeros(TK, dtype=torch.int32)}),
    "score_bias is a number": ("score_bias", PADDED | {"score_bias": 1.0}),
    "cu_seqlens_q of int64": ("cu_seqlens_q", PACKED | {"cu_seqlens_q": cu(0, 3, N, dtype=torch.int64)}),
    "cu_seqlens_k is a list": ("cu_seqlens_k", PACKED | {"cu_seqlens_k": [0, 5, M]}),
    "window is a number": ("window", PADDED | {"window": 3}),
    "window of one": ("window", PADDED | {"window": (3,)}),
    "window of three": ("window", PADDED | {"window": (3, 4, 5)}),
    "window of floats": ("window", PADDED | {"window": (3.0, 4)}),
    "window of booleans": ("window", PADDED | {"window": (True, None)}),
    "activation is None": ("activation", PADDED | {"activation": None}),
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


@by_title(WRONG_SHAPES | WRONG_VALUES)
def test_wrong_shapes_and_values_raise_value_error_with_the_name(name, arguments, device):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*; got "):
        call(device, arguments)


@by_title(WRONG_TYPES)
def test_wrong_types_raise_an_error_with_the_name(name, arguments, device):
    kind = (TypeError, ValueError) if name in ("activation", "dropout_p") else TypeError
    with pytest.raises(kind, match=rf"^{name}: expected .*; got "):
        call(device, arguments)


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("offsets", WRONG_OFFSETS.values(), ids=WRONG_OFFSETS.keys())
def test_wrong_offsets_raise_value_error_with_the_name(offsets, side):
    """On the CPU; on a GPU they stop the program, which a test cannot survive."""
    good = {"query": zeros(N, A), "key": zeros(N, A), "value": zeros(N, DV), "v": zeros(A)}
    both = {name: cu(0, 3, N) for name in ("cu_seqlens_q", "cu_seqlens_k")} | {f"cu_seqlens_{side}": offsets}
    with pytest.raises(ValueError, match=rf"^cu_seqlens_{side}: expected non-decreasing offsets from 0"):
        concat_attention(**good, **both)


@pytest.mark.parametrize("name", ["key", "value", "v", "mask", "score_bias"])
def test_tensors_on_another_device_raise_value_error_with_the_name(name):
    good = PADDED | {"mask": bools(B, TK), "score_bias": zeros(TK)}
    with pytest.raises(ValueError, match=rf"^{name}: expected device cpu; got meta"):
        concat_attention(**{**good, name: good[name].to("meta")})


@pytest.mark.parametrize("title", ["key of another width", "mask of numbers", "window is a number"])
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


# --- ConcatAttention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"query_dim": 0}, "query_dim"),
        ({"key_dim": 0}, "key_dim"),
        ({"attn_dim": 0}, "attn_dim"),
        ({"num_heads": 0}, "num_heads"),
        ({"context_dims": (2, 0)}, r"context_dims\[1\]"),
        ({"activation": "softplus"}, "activation"),
        ({"dropout": 1.0}, "dropout"),
    ],
    ids=str,
)
def test_constructor_errors_name_the_argument(arguments, name):
    with pytest.raises(ValueError, match=rf"^{name}(_p)?: expected .*; got "):
        ConcatAttention(**{"query_dim": 2, "key_dim": 3, "attn_dim": 4, **arguments})


@pytest.mark.parametrize(
    ("contexts", "name"),
    [
        ((), "contexts"),
        ((zeros(B, 2), zeros(B, 2)), "contexts"),
        ((zeros(2),), r"contexts\[0\]"),
        ((zeros(B, TQ + 9, 2),), r"contexts\[0\]"),
        ((zeros(B, 1, TQ, 2),), r"contexts\[0\]"),
        ((("key", zeros(B, TQ, 2)),), r"contexts\[0\]"),
        ((("value", zeros(B, TQ, 2)),), r"contexts\[0\]"),
    ],
    ids=["none", "two", "rank 1", "other rows", "rank 4", "the other side", "no side"],
)
def test_wrong_contexts_raise_value_error_with_the_name(contexts, name):
    module = ConcatAttention(2, 3, 4, context_dims=(2,))
    with pytest.raises(ValueError, match=rf"^{name}: expected .*; got "):
        module(zeros(B, TQ, 2), zeros(B, TK, 3), contexts=contexts)


def test_context_of_one_row_each_is_ambiguous_where_there_are_as_many_queries_as_keys():
    module = ConcatAttention(2, 3, 4, context_dims=(2,))
    query, key, context = zeros(B, TQ, 2), zeros(B, TQ, 3), zeros(B, TQ, 2)
    with pytest.raises(ValueError, match=r"^contexts\[0\]: expected .*\(\"query\", x\) or \(\"key\", x\).*; got "):
        module(query, key, contexts=[context])
    for side in ("query", "key"):
        assert module(query, key, contexts=[(side, context)]).shape == (B, TQ, 3)


@pytest.mark.parametrize("name", ["query", "key"])
def test_module_inputs_of_another_rank_raise_value_error_with_the_name(name):
    good = {"query": zeros(B, TQ, 2), "key": zeros(B, TK, 3)}
    with pytest.raises(ValueError, match=rf"^{name}: expected .*; got "):
        ConcatAttention(2, 3, 4)(**(good | {name: good[name][0]}))
