"""The location kernels against the reference: outputs and every gradient, over the factors of a call."""

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from _compare import assert_matches_reference
from _location import ACTIVATIONS, SCORES, Case, offsets, operator, pairwise
from hypothesis import given

pytestmark = pytest.mark.kernel

# Sizes are odd, and around the tiles: 16 to 64 rows, 32 or more features, one to 64 columns, 1 or 16 hops.
FACTORS = {
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "rows": (1, 63, 100, 257),
    "dim": (1, 33, 70, 130),
    "attn_dim": (1, 17, 70),
    "hops": (1, 3, 20),
    "score": SCORES,
    "activation": ACTIVATIONS,
    "gate_activation": ACTIVATIONS,
    "ragged": (False, True),
    "mask": ("none", "random", "padding", "empty", "expanded"),
    "context": ("none", "sequence", "row"),
    "value": (None, 1, 45),
    "score_bias": (False, True),
    "bias": (True, False),
    "layout": ("contiguous", "swapped", "strided"),
    "dropout_p": (0.0, 0.3),
    "through": (("output", "weights"), ("output",), ("weights",)),
}
PARAMETERS = ("h", "w", "b", "v", "gate_w", "gate_b", "context", "value", "score_bias")


def check(case: Case, device: torch.device, **options) -> None:
    assert_matches_reference(case.op, case.tensors(device), dtype=case.dtype, **{"through": case.through, **options})


@pytest.mark.parametrize("case", pairwise(FACTORS), ids=str)
def test_matches_the_reference_for_every_pair_of_factors(case, device):
    check(case, device)


@pytest.mark.parametrize("score", ["linear_hops", "mlp"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_the_reference_for_every_activation(activation, score, device):
    check(Case(rows=21, score=score, activation=activation), device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_the_reference_for_every_gate_activation(activation, device):
    check(Case(rows=21, score="gated", gate_activation=activation), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {"dim": 64, "attn_dim": 64},  # whole vectors of 16
        {"rows": 96, "dim": 128, "attn_dim": 64, "score": "gated_hops", "hops": 16, "value": 64, "context": "row"},
        {"dim": 320, "attn_dim": 16, "value": 528},
        {"dim": 1100, "attn_dim": 5},  # the keys in parts, and the sum in parts
        {"dim": 7, "value": 600},  # the keys whole, the sum in parts
        {"dim": 300, "value": 19},  # the keys in parts, the sum whole
        {"batch": 1, "dim": 140, "score": "mlp_hops", "hops": 70},
        {"batch": 1, "dim": 19, "score": "linear_hops", "hops": 128},
        {"dim": 19, "attn_dim": 1024},
        # rows of vectors of 4, and of none
        {"rows": 70, "dim": 100, "attn_dim": 100, "score": "gated"},
        {"rows": 40, "dim": 300, "attn_dim": 100, "score": "mlp_hops", "context": "row", "ragged": True},
        {"dim": 300, "attn_dim": 75, "value": 100},
        {"dim": 300, "score": "linear", "value": 100},
    ],
    ids=lambda sizes: ",".join(f"{n}={x}" for n, x in sizes.items()),
)
def test_matches_the_reference_for_other_sizes(sizes, dtype, device):
    check(Case(**{"dtype": dtype, "rows": 5, **sizes}), device)


def test_wide_values_are_summed_over_tiles_of_rows(device):
    check(Case(rows=150, dim=3, attn_dim=3, value=600, ragged=True, mask="random"), device)


def everything() -> Case:
    """A small call with every tensor argument."""
    return Case(rows=21, score="gated_hops", context="row", value=7, score_bias=True, mask="random")


@pytest.mark.parametrize("context", ["row", "sequence"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_one_gradient_alone_is_that_of_the_reference(name, context, device):
    check(dataclasses.replace(everything(), context=context), device, wrt=[name])


@pytest.mark.parametrize("name", PARAMETERS)
def test_gradients_without_one_of_them_are_those_of_the_reference(name, device):
    check(everything(), device, wrt=[n for n in PARAMETERS if n != name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
def test_score_bias_may_be_float32_beside_16_bit_keys(ragged, dtype, device):
    case = Case(dtype=dtype, rows=21, ragged=ragged, score_bias=True)
    tensors = case.tensors(device)
    tensors["score_bias"] = tensors["score_bias"].float() * 1.001
    assert_matches_reference(case.op, tensors, dtype=dtype)


@pytest.mark.parametrize("return_weights", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_jagged_tensors_are_ragged_batches(score, return_weights, device):
    case = Case(rows=70, score=score, ragged=True, context="row", value=7, score_bias=True)
    tensors = case.tensors(device)
    tensors["context"] = tensors["context"][0]
    packed = operator(return_weights=return_weights)

    def op(*, impl, h, context, value, score_bias, cu_seqlens, **parameters):
        if h.dtype == torch.float64:  # the oracle has no nested tensors
            return packed(
                impl=impl,
                h=h,
                context=context[None],
                value=value,
                score_bias=score_bias,
                cu_seqlens=cu_seqlens,
                **parameters,
            )
        jagged = {
            name: torch.nested.nested_tensor_from_jagged(x, cu_seqlens.long())
            for name, x in {"h": h, "context": context, "value": value, "score_bias": score_bias}.items()
        }
        result = packed(impl=impl, **jagged, **parameters)
        return (result[0], result[1].values()) if return_weights else result

    assert_matches_reference(op, tensors)


def test_jagged_context_of_a_sequence_is_a_plain_tensor(device):
    case = Case(rows=70, ragged=True, context="sequence")
    tensors = case.tensors(device)
    tensors["context"] = tensors["context"][:, 0]

    def op(*, impl, h, context, cu_seqlens, **parameters):
        nested = torch.nested.nested_tensor_from_jagged(h, cu_seqlens.long())
        out, weights = operator()(impl=impl, h=nested, context=context, **parameters)
        return out, weights.values()

    assert_matches_reference(op, tensors)


@st.composite
def calls(draw) -> tuple[Case, list[int]]:
    """A ragged call in float32, and the lengths of its segments."""
    lengths = draw(st.lists(st.integers(0, 80), max_size=6))
    case = Case(
        rows=sum(lengths),
        dim=draw(st.integers(1, 70)),
        attn_dim=draw(st.integers(1, 20)),
        hops=draw(st.integers(1, 5)),
        score=draw(st.sampled_from(SCORES)),
        mask=draw(st.sampled_from(["none", "random"])),
        value=draw(st.one_of(st.none(), st.integers(1, 50))),
        score_bias=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0.0, 0.5])),
    )
    return case, lengths


@given(calls())
def test_matches_the_reference_for_any_segments(device, call):
    case, lengths = call
    tensors = dataclasses.replace(case, ragged=False).tensors(device)
    packed = {name: x[0] if name in ("h", "value", "score_bias", "mask") else x for name, x in tensors.items()}
    assert_matches_reference(case.op, {**packed, "cu_seqlens": offsets(lengths, device)})
