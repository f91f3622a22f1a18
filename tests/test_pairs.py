"""Concat and general attention: gradients of some arguments and through some results, score biases, any segments."""

import _concat
import _general
import hypothesis.strategies as st
import pytest
import torch
from _compare import assert_close, evaluate
from _concat import check, compare, each_impl, every_impl, segments
from _marks import each_dtype
from _pairs import each_family
from hypothesis import example, given, settings

SMALL = {"queries": 5, "keys": 7, "attn_dim": 3, "value_dim": 4, "heads": 2, "score_bias": "bhqk", "mask": "pairs"}
EVERYTHING = {"concat": _concat.Case(**SMALL), "general": _general.Case(**SMALL, weight="heads")}
"""Small calls with every tensor argument."""
TENSORS = {
    "concat": ("query", "key", "value", "v", "score_bias"),
    "general": ("query", "key", "value", "weight", "score_bias"),
}
each_tensor = pytest.mark.parametrize(
    ("family", "name"), [(f, name) for f, names in TENSORS.items() for name in names]
)


@pytest.mark.whole  # five numbers a row
@each_impl
@each_tensor
def test_one_gradient_alone_is_that_of_the_reference(family, name, impl, device):
    check(EVERYTHING[family], device, impl, wrt=[name])


@pytest.mark.whole
@each_impl
@each_tensor
def test_gradients_without_one_of_them_are_those_of_the_reference(family, name, impl, device):
    check(EVERYTHING[family], device, impl, wrt=[n for n in TENSORS[family] if n != name])


@each_impl
@pytest.mark.parametrize("family", EVERYTHING)
@pytest.mark.parametrize("through", [("output",), ("weights",)], ids=["output", "weights"])
def test_gradients_through_one_result_alone_are_those_of_the_reference(through, family, impl, device):
    check(EVERYTHING[family], device, impl, through=through)


@each_impl
@each_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_score_bias_may_be_float32_beside_16_bit_queries(dtype, make, impl, device):
    case = make(dtype=dtype, batch=1, score_bias="qk")
    tensors = case.tensors(device)
    tensors["score_bias"] = tensors["score_bias"].float() * 1.001
    compare(case.op, tensors, impl, dtype=dtype)


@each_impl
@each_family
@each_dtype
def test_huge_score_biases_match_the_reference(dtype, make, impl, device):
    case = make(dtype=dtype, batch=1, score_bias="qk")
    tensors = case.tensors(device)
    tensors["score_bias"] = tensors["score_bias"] * 10_000
    compare(case.op, tensors, impl, dtype=dtype)


@every_impl
@each_family
@pytest.mark.parametrize("axes", ["hqk", "1k"])
def test_a_bias_of_fewer_axes_may_begin_with_1(axes, make, impl, device):
    case = make(batch=2, queries=2, keys=5, attn_dim=3, heads=1, score_bias=axes)
    tensors = case.tensors(device)
    want = evaluate(case.op, tensors, "reference")
    tensors["score_bias"] = tensors["score_bias"].reshape((1, 2, 5) if axes == "hqk" else (1, 5))
    got = evaluate(case.op, tensors, impl)
    torch.testing.assert_close(got.outputs, want.outputs)
    got.gradients["score_bias"] = got.gradients["score_bias"].view_as(want.gradients["score_bias"])
    torch.testing.assert_close(got.gradients, want.gradients)


@every_impl
@each_family
@pytest.mark.parametrize("heads", [None, 2])
def test_bias_of_minus_infinity_hides_a_key_as_the_mask_does(heads, make, impl, device):
    case = make(heads=heads, queries=7, keys=35, attn_dim=3, score_bias="bhqk", mask="pairs")
    tensors = case.tensors(device)
    mask = tensors.pop("mask")
    masked = evaluate(case.op, tensors | {"mask": mask}, impl)
    hidden = ~mask if heads is None else ~mask[:, None]
    tensors["score_bias"] = tensors["score_bias"].masked_fill(hidden, -torch.inf)
    assert_close(evaluate(case.op, tensors, impl), masked)


@st.composite
def calls(draw, longest: int, widest: int) -> tuple[dict, list[tuple[int, int]]]:
    """What a ragged call has in both families, and the lengths of its segments on both sides."""
    lengths = draw(st.lists(st.tuples(st.integers(0, longest), st.integers(0, 2 * longest)), max_size=4))
    side = st.one_of(st.none(), st.integers(-3, longest))
    return {
        "ragged": True,
        "queries": sum(q for q, _ in lengths),
        "keys": sum(k for _, k in lengths),
        "attn_dim": draw(st.integers(1, widest)),
        "value_dim": draw(st.integers(1, 20)),
        "heads": draw(st.sampled_from([None, 2])),
        "window": draw(st.one_of(st.none(), st.tuples(side, side))),
        "dropout_p": draw(st.sampled_from([0.0, 0.5])),
    }, lengths


# A window whose left side ends inside a tile of queries: of what is drawn, few have one.
SIZES = {"queries": 53, "keys": 53, "attn_dim": 3, "value_dim": 4, "heads": 2}
ENDS_IN_A_TILE = ({**SIZES, "ragged": True, "window": (3, None), "dropout_p": 0.0}, [(20, 10), (0, 3), (33, 40)])


@each_impl
@settings(max_examples=8)
@example(ENDS_IN_A_TILE, "tanh")
@given(calls(longest=20, widest=6), st.sampled_from(["tanh", "sigmoid", "relu"]))
def test_concat_matches_the_reference_for_any_segments(impl, device, call, activation):
    options, lengths = call
    case = _concat.Case(**options, activation=activation)
    compare(case.op, case.tensors(device) | segments(lengths, device), impl)


@pytest.mark.kernel
@example(ENDS_IN_A_TILE, "identity", True)
@given(calls(longest=40, widest=40), st.sampled_from(["identity", "tanh"]), st.booleans())
def test_general_matches_the_reference_for_any_segments(device, call, activation, own_value):
    options, lengths = call
    case = _general.Case(**options, activation=activation, own_value=own_value)
    compare(case.op, case.tensors(device) | segments(lengths, device), "triton")
