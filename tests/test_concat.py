"""Concat attention, kernel and blocked path, against the reference: every pair of factors, and what pairs miss."""

import hypothesis.strategies as st
import pytest
import torch
from _concat import ACTIVATIONS, IMPLS, Case, check, compare, offsets, pairwise
from hypothesis import given, settings

each_impl = pytest.mark.parametrize("impl", IMPLS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
both_forms = pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])

WINDOWS = (None, (None, 0), (None, -1), (0, None), (3, 4), (5, -1), (-2, 9))
# Sizes are odd, and around the tiles of the interpreter: 16 queries, 32 keys, 16 or more features.
FACTORS = {
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "batch": (1, 2),
    "queries": (1, 5, 18),
    "keys": (1, 5, 35),
    "attn_dim": (1, 9),
    "value_dim": (1, 12, 20),
    "heads": (None, 2),
    "v_heads": (True, False),
    "activation": ACTIVATIONS,
    "mask": ("none", "keys", "padding", "pairs", "empty", "expanded"),
    "window": WINDOWS,
    "score_bias": (None, "bhqk", "hqk", "q1", "k", "bH1k", "1"),
    "layout": ("contiguous", "transposed", "strided", "expanded"),
    "dropout_p": (0.0, 0.3),
    "return_weights": (True, False),
    "through": (("output", "weights"), ("output",)),
}
PACKED = {
    name: FACTORS[name]
    for name in ("dtype", "attn_dim", "heads", "v_heads", "activation", "window", "layout", "dropout_p")
} | {"queries": (1, 5, 21), "keys": (1, 5, 40), "value_dim": (1, 12), "ragged": (True,)}
# The blocked path is quick enough for larger sizes, and has float64.
LARGE = {
    "dtype": (torch.float32, torch.float16, torch.bfloat16, torch.float64),
    "queries": (1, 5, 33, 70, 100),
    "keys": (1, 5, 33, 70, 100),
    "attn_dim": (1, 9, 64),
    "value_dim": (1, 12, 70),
}
TENSORS = ("query", "key", "value", "v", "score_bias")


@pytest.mark.kernel
@pytest.mark.parametrize("case", [*pairwise(FACTORS), *pairwise(PACKED)], ids=str)
def test_kernel_matches_the_reference_for_every_pair_of_factors(case, device):
    check(case, device, "triton")


@pytest.mark.parametrize("case", [*pairwise(FACTORS | LARGE), *pairwise(PACKED | LARGE)], ids=str)
def test_blocked_path_matches_the_reference_for_every_pair_of_factors(case, device):
    check(case, device, "auto")


@each_impl
@both_forms
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_the_reference_for_every_activation(activation, ragged, impl, device):
    check(Case(batch=1, queries=18, keys=35, activation=activation, ragged=ragged), device, impl)


@each_impl
@pytest.mark.parametrize("keys", [5, 35])
@pytest.mark.parametrize("window", [*WINDOWS[1:], (1, 1)], ids=str)  # (1, 1): over the edges of tiles by one
def test_matches_the_reference_for_every_window(window, keys, impl, device):
    check(Case(batch=1, queries=33, keys=keys, attn_dim=3, window=window), device, impl)


@each_impl
@each_dtype
def test_matches_the_reference_for_wide_features(dtype, impl, device):
    check(Case(dtype=dtype, batch=1, queries=17, keys=70, attn_dim=64, value_dim=70), device, impl)


@each_impl
def test_matches_the_reference_for_many_rows(impl, device):
    check(Case(batch=1, queries=100, keys=100, attn_dim=3, window=(20, 30), mask="pairs"), device, impl)


def everything() -> Case:
    """A small call with every tensor argument."""
    return Case(queries=5, keys=7, attn_dim=3, value_dim=4, heads=2, score_bias="bhqk", mask="pairs")


@each_impl
@pytest.mark.parametrize("name", TENSORS)
def test_one_gradient_alone_is_that_of_the_reference(name, impl, device):
    check(everything(), device, impl, wrt=[name])


@each_impl
@pytest.mark.parametrize("name", TENSORS)
def test_gradients_without_one_of_them_are_those_of_the_reference(name, impl, device):
    check(everything(), device, impl, wrt=[n for n in TENSORS if n != name])


@each_impl
@pytest.mark.parametrize("through", [("output",), ("weights",)], ids=["output", "weights"])
def test_gradients_through_one_result_alone_are_those_of_the_reference(through, impl, device):
    check(everything(), device, impl, through=through)


@each_impl
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_score_bias_may_be_float32_beside_16_bit_queries(dtype, impl, device):
    case = Case(dtype=dtype, batch=1, score_bias="qk")
    tensors = case.tensors(device)
    tensors["score_bias"] = tensors["score_bias"].float() * 1.001
    compare(case.op, tensors, impl, dtype=dtype)


@st.composite
def calls(draw) -> tuple[Case, list[tuple[int, int]]]:
    """A ragged call in float32, and the lengths of its segments on both sides."""
    lengths = draw(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 40)), max_size=4))
    side = st.one_of(st.none(), st.integers(-3, 20))
    case = Case(
        ragged=True,
        queries=sum(q for q, _ in lengths),
        keys=sum(k for _, k in lengths),
        attn_dim=draw(st.integers(1, 6)),
        value_dim=draw(st.integers(1, 20)),
        heads=draw(st.sampled_from([None, 2])),
        activation=draw(st.sampled_from(["tanh", "sigmoid", "relu"])),
        window=draw(st.one_of(st.none(), st.tuples(side, side))),
        dropout_p=draw(st.sampled_from([0.0, 0.5])),
    )
    return case, lengths


@each_impl
@settings(max_examples=8)
@given(calls())
def test_matches_the_reference_for_any_segments(impl, device, call):
    case, lengths = call
    cu = {f"cu_seqlens_{side}": offsets([pair[i] for pair in lengths], device) for i, side in enumerate("qk")}
    compare(case.op, case.tensors(device) | cu, impl)
