"""The raw operators, whose three results have gradients of their own: random ones, none a function of another."""

import dataclasses

import pytest
import torch
from _compare import Result, assert_as_exact, in_double, nudged, projection
from _concat import Case

from fused_attn import concat, reference
from fused_attn.kernels.inputs import ConcatInputs

RESULTS = ("output", "lse", "scores")
IMPLS = (pytest.param("triton", marks=pytest.mark.kernel), "blocked")
# Every tensor has numbers enough that its largest error is no matter of luck.
PADDED = Case(queries=18, keys=35, heads=2, mask="pairs", score_bias="bhqk")
RAGGED = Case(queries=21, keys=40, heads=2, ragged=True)
SIGMOID = dataclasses.replace(PADDED, activation="sigmoid", mask="none", window=(5, -1), score_bias=None)

each_impl = pytest.mark.parametrize("impl", IMPLS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def derivatives(case: Case, tensors, impl: str, through) -> Result:
    """The three results where they are finite, and the gradients that random ones of `through` give."""
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in tensors.items()}
    seed = torch.tensor([5], device=tensors["query"].device) if case.dropout_p else None
    inputs = ConcatInputs(*case.raw_arguments(leaves, seed))
    if impl == "reference":
        results = reference.concat_attention(inputs)
    else:
        exact = impl == "triton" and case.dtype.itemsize == 2
        results = concat._CONCAT(inputs, "scores" in through, 0, exact, impl == "blocked")[:3]
    named = dict(zip(RESULTS, results, strict=True))
    # Rows that see nothing and pairs that are hidden have random gradients too: no input may feel them.
    cotangents = [projection(named[name], RESULTS.index(name)) for name in through]
    wrt = [name for name, x in leaves.items() if x.requires_grad]
    grads = torch.autograd.grad(
        [named[name] for name in through], [leaves[name] for name in wrt], cotangents, materialize_grads=True
    )
    named["output"] = named["output"].to(tensors["value"].dtype)
    outputs = {name: named[name].detach() for name in ("output", *through)}
    return Result(
        {name: x.masked_fill(x == -torch.inf, 0) for name, x in outputs.items()}, dict(zip(wrt, grads, strict=True))
    )


def check(case: Case, device, impl: str, through=RESULTS, *, small: float = 1.0) -> None:
    tensors = case.tensors(device)
    tensors |= {"query": tensors["query"] * small, "key": tensors["key"] * small, "v": tensors["v"] / small}
    exact = derivatives(case, in_double(tensors), "reference", through)
    rough = [derivatives(case, nudged(tensors, i) if i else tensors, "reference", through) for i in range(3)]
    assert_as_exact(derivatives(case, tensors, impl, through), rough, exact, dtype=case.dtype)


@each_impl
@each_dtype
@pytest.mark.parametrize("through", [("output", "lse"), ("lse",), ("output", "lse", "scores")], ids="+".join)
@pytest.mark.parametrize("case", [PADDED, SIGMOID], ids=["tanh", "sigmoid"])
def test_free_gradients_of_all_results_give_those_of_the_reference(case, through, dtype, impl, device):
    check(dataclasses.replace(case, dtype=dtype), device, impl, through)


@each_impl
@each_dtype
@pytest.mark.parametrize("through", [("output", "lse"), ("lse",)], ids="+".join)
def test_free_gradients_of_packed_rows_give_those_of_the_reference(through, dtype, impl, device):
    check(dataclasses.replace(RAGGED, dtype=dtype), device, impl, through)


@each_impl
@each_dtype
def test_free_gradients_with_dropout_give_those_of_the_reference(dtype, impl, device):
    """lse and scores are those before dropout."""
    check(dataclasses.replace(PADDED, dtype=dtype, dropout_p=0.3), device, impl)


@each_impl
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_free_gradients_without_factors_give_those_of_the_reference(activation, impl, device):
    check(dataclasses.replace(PADDED, activation=activation), device, impl)


@each_impl
def test_large_v_does_not_magnify_the_rounding_of_small_scores(impl, device):
    """lse sees what the softmax does not: an error that is the same for all keys."""
    check(dataclasses.replace(PADDED, score_bias=None), device, impl, small=1e-4)


@pytest.mark.kernel
@pytest.mark.parametrize(("activation", "by"), [("sigmoid", 5), ("tanh", 2), ("tanh", 3)])
def test_derivative_of_a_saturated_activation_is_as_exact_as_at_its_mirror_image(activation, by, device):
    """σ'(z) = σ'(-z), but y (1 - y) loses it where y is near 1: the reference is exact on one side only."""
    case = Case(queries=18, keys=35, heads=2, activation=activation)
    tensors = case.tensors(device)
    up = tensors | {name: tensors[name] / 4 + by for name in ("query", "key")}
    down = tensors | {name: -up[name] for name in ("query", "key")}
    exact = derivatives(case, in_double(up), "reference", ("scores",)).gradients
    rough = [derivatives(case, nudged(down, i), "reference", ("scores",)).gradients for i in range(3)]
    for side in (up, down):
        got = derivatives(case, side, "triton", ("scores",)).gradients
        for name in ("query", "key"):
            assert_as_exact(
                Result({}, {name: got[name]}),
                [Result({}, {name: x[name]}) for x in rough],
                Result({}, {name: exact[name]}),
            )
