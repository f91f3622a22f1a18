"""General attention, the kernel, against the reference; keys that are the values; exactness; parts."""

import pytest
import torch
from _compare import Result, assert_as_exact, assert_close, evaluate, largest, shifted
from _concat import ACTIVATIONS, ALL, check, compare
from _general import Case, both_values, operator, pairwise
from _marks import both_forms, each_dtype
from _pairs import OPTIONS, WINDOWS

from fused_attn.kernels import chip as chips
from fused_attn.kernels import general_bwd

pytestmark = pytest.mark.kernel

# Sizes are odd, and around the tiles of the interpreter: 16 queries, 32 keys, 16 or 32 features.
FACTORS = {
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "batch": (1, 2),
    "queries": (1, 6, 18, 33),
    "keys": (1, 5, 35, 70),
    "attn_dim": (1, 9, 40),
    "value_dim": (1, 12, 40),
    "heads": (None, 2),
    "weight": ("none", "matrix", "heads"),
    "own_value": (True, False),
    "scale": (1.0, 0.3, -0.5),
    **OPTIONS,
}
# Nothing but the window and the ends hide keys: whole tiles have a loop of their own.
KEPT = ("dtype", "attn_dim", "value_dim", "heads", "weight", "own_value", "scale", "activation", "window", "layout")
PLAIN = {name: FACTORS[name] for name in KEPT}
PLAIN |= {"batch": (1,), "queries": (1, 18, 70), "keys": (1, 35, 130), "return_weights": (False,)}
PACKED = PLAIN | {"queries": (1, 5, 40), "keys": (1, 5, 100), "dropout_p": (0.0, 0.3), "ragged": (True,)}


# --- Every pair of factors, and what pairs may miss --------------------------------------------------------------


@pytest.mark.parametrize("case", [*pairwise(FACTORS), *pairwise(PLAIN), *pairwise(PACKED)], ids=str)
def test_kernel_matches_the_reference_for_every_pair_of_factors(case, device):
    check(case, device, "triton")


@both_forms
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_the_reference_for_every_activation(activation, ragged, device):
    check(Case(batch=1, queries=18, keys=35, activation=activation, ragged=ragged), device, "triton")


@both_values
@pytest.mark.parametrize("keys", [5, 100])
@pytest.mark.parametrize("window", [*WINDOWS[1:], (40, 30), (-20, 60), (1, 1)], ids=str)
def test_matches_the_reference_for_every_window(window, keys, own_value, device):
    case = Case(batch=1, queries=70, keys=keys, attn_dim=3, own_value=own_value, window=window, return_weights=False)
    check(case, device, "triton")


@both_values
@each_dtype
@pytest.mark.parametrize("dims", [(70, 20), (20, 70), (70, 100)], ids=str)
def test_matches_the_reference_for_features_wider_than_a_tile(dims, dtype, own_value, device):
    """In parts: the score's, the values', or both."""
    attn_dim, value_dim = dims
    check(Case(dtype, 1, 17, 70, attn_dim, value_dim, own_value=own_value, scale=0.1), device, "triton")


# A small call with every tensor argument but the values, which are the keys; with these it is in test_pairs.py.
SHARED = Case(
    queries=5, keys=7, attn_dim=3, heads=2, score_bias="bhqk", mask="pairs", weight="heads", own_value=False
)


@pytest.mark.parametrize("wrt", [["query"], ["key"], ["weight", "score_bias"]], ids=str)
def test_gradients_of_keys_that_are_the_values_alone_or_not_at_all(wrt, device):
    check(SHARED, device, "triton", wrt=wrt)


@pytest.mark.parametrize("through", [("output",), ("weights",)], ids=["output", "weights"])
def test_gradients_of_keys_that_are_the_values_through_one_result_alone(through, device):
    check(SHARED, device, "triton", through=through)


# --- Large offsets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "axes"),
    [
        ({"heads": 3}, {"query": 1, "key": 1, "value": 1, "score_bias": 1}),
        ({"queries": 3}, {"query": 1, "score_bias": 1}),
        ({"keys": 3}, {"key": 1, "value": 1, "score_bias": 2}),
    ],
    ids=["heads", "queries", "keys"],
)
def test_offsets_past_int32_match_the_reference(sizes, axes, far_apart, device):
    case = Case(dtype=torch.float16, batch=1, score_bias="bhqk", **{"queries": 4, "keys": 5, **sizes})
    tensors = case.tensors(device)
    tensors |= {name: far_apart(tensors[name], axis) for name, axis in axes.items()}
    compare(case.op, tensors, "triton", dtype=torch.float16)


# --- Keys that are the values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize(
    "structure",
    [
        {},
        {"mask": "pairs", "heads": 2, "score_bias": "hqk"},
        {"ragged": True, "dropout_p": 0.3},
        {"attn_dim": 70},
        {"window": (None, 0), "queries": 70, "keys": 70, "return_weights": False},
    ],
    ids=str,
)
def test_keys_as_values_are_those_values_and_their_gradients_add(structure, impl, dtype, device):
    if (impl, dtype) == ("triton", torch.float64):
        pytest.skip("the kernel has no float64")
    case = Case(dtype=dtype, own_value=False, **structure)
    tensors = case.tensors(device)
    shared = evaluate(case.op, tensors, impl)
    apart = evaluate(case.op, tensors | {"value": tensors["key"].clone()}, impl)
    gradients = dict(apart.gradients)
    gradients["key"] = gradients["key"] + gradients.pop("value")
    if dtype == torch.bfloat16:  # one sum is rounded once
        torch.testing.assert_close(shared.gradients["key"], gradients["key"], rtol=0.05, atol=0.05)
        gradients["key"] = shared.gradients["key"]
    assert_close(shared, Result(apart.outputs, gradients))


@both_forms
def test_gradients_of_keys_and_values_by_a_launch_each_match_the_reference(ragged, device, monkeypatch):
    """As they are where a thread has no room for both, which is at widths that the interpreter's tiles never have."""
    rule, seen = general_bwd.bwd_blocks, []

    def crowded(*args):
        for_q, for_k = rule(*args)
        return for_q, for_k._replace(N=256, warps=1)

    run = general_bwd.launch
    monkeypatch.setattr(general_bwd, "bwd_blocks", crowded)
    monkeypatch.setattr(
        general_bwd, "launch", lambda kernel, *a, **k: (seen.append(kernel.__name__), run(kernel, *a, **k))
    )
    check(Case(ragged=ragged, queries=20, keys=150, window=(None, 3)), device, "triton")
    assert seen[-2:] == ["_general_bwd_dkv_kernel"] * 2


# --- Exactness ---------------------------------------------------------------------------------------------------


@both_values
@each_dtype
@pytest.mark.parametrize("factor", [30, 1e-3])
def test_scores_of_any_size_are_exact(factor, dtype, own_value, device):
    """Large ones give one key all the weight, and gradients that are differences of equal numbers."""
    case = Case(dtype=dtype, batch=1, queries=18, keys=40, own_value=own_value)
    tensors = case.tensors(device)
    compare(case.op, tensors | {"query": tensors["query"] * factor}, "triton", dtype=dtype)


@both_values
def test_one_key_with_all_the_weight_leaves_the_scores_no_gradient(own_value, device):
    """With float32 exactly none, however large queries and keys are."""
    case = Case(batch=1, queries=20, keys=40, attn_dim=8, value_dim=40, own_value=own_value, return_weights=False)
    tensors = case.tensors(device)
    keys = torch.eye(8, device=device).repeat(5, 1) * (1 + torch.arange(40, device=device)[:, None])
    tensors |= {"key": keys[None] * 100, "query": keys[None, -20:] * 100}
    assert largest(evaluate(case.op, tensors, "triton").gradients["query"]) == 0


def test_adding_a_number_to_all_scores_changes_nothing(device):
    case = Case(batch=1, score_bias="qk")
    tensors, exact = shifted(case.op, case.tensors(device))
    # One run: of a bias moved by half an eps the scores would be as far off as those from an lse in float32.
    assert_as_exact(evaluate(case.op, tensors, "triton"), evaluate(case.op, tensors, "reference"), exact)


# --- Splits of the keys, and the same twice -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, queries=1, keys=300, return_weights=False),
        Case(batch=1, queries=3, keys=300, own_value=False, attn_dim=40),
        Case(batch=1, queries=3, keys=300, heads=2, mask="empty", score_bias="hqk", dropout_p=0.3),
        # Past the first tile.
        Case(batch=1, queries=50, keys=300, window=(4, 150), value_dim=70, return_weights=False),
        Case(queries=15, keys=300, ragged=True, heads=2),
        Case(dtype=torch.bfloat16, batch=1, queries=16, keys=300, mask="keys", own_value=False),
    ],
    ids=str,
)
def test_keys_in_parts_match_the_reference(case, device):
    """On a chip of many cores, few queries have their keys split."""
    with chips.assume(chips.chip_of(device)._replace(cores=1000)):
        check(case, device, "triton")


def test_dot_attention_with_scale_is_that_of_a_scaled_query(device):
    case = Case(batch=1, scale=0.25)
    tensors = case.tensors(device)
    scaled = tensors | {"query": tensors["query"] * 0.25}
    got = operator(scale=0.25)(impl="triton", **tensors)
    torch.testing.assert_close(got, operator()(impl="triton", **scaled))
