"""Concat attention where the factors would overflow, cancel, or be lost; scores that are hard on a softmax."""

import functools
import itertools

import pytest
import torch
from _compare import assert_as_exact, assert_matches_reference, evaluate, in_double, nudged, shifted
from _concat import Case, compare, each_impl, hide
from _marks import both_forms, each_dtype

from fused_attn.kernels import chip as chips
from fused_attn.kernels import concat as forward
from fused_attn.kernels import concat_bwd as backward
from fused_attn.kernels import concat_factors

each_loop = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # 16 bits have one in common


def spread(rows: int, width: int, center: float, radius: float, seed: int) -> torch.Tensor:
    """Random numbers in a shuffled range, so that every row has small and large ones."""
    rng = torch.Generator().manual_seed(seed)
    x = center + radius * torch.linspace(-1, 1, rows * width)
    return x[torch.randperm(len(x), generator=rng)].view(rows, width)


# (center, radius) of queries and of keys
RANGES = {
    "spans 100": ((0, 50), (0, 50)),
    "60 against -45": ((60, 1), (-45, 1)),
    "60 against -60": ((60, 1), (-60, 1)),
    "-60 against 60": ((-60, 1), (60, 1)),
    "both 50": ((50, 1), (50, 1)),
    "both -50": ((-50, 1), (-50, 1)),
    "at the guard": ((10, 0.4), (10, 0.6)),
    "past a pair": ((13, 1), (12, 1)),
    "small": ((0, 1e-2), (0, 1e-2)),
}


@each_impl
@each_loop
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
@pytest.mark.parametrize(("of_query", "of_key"), RANGES.values(), ids=RANGES.keys())
def test_exponents_of_any_size_are_exact(of_query, of_key, activation, dtype, impl, device):
    case = Case(dtype=dtype, batch=1, queries=5, keys=9, attn_dim=7, activation=activation)
    tensors = case.tensors(device)
    for name, (center, radius), seed in (("query", of_query, 1), ("key", of_key, 2)):
        tensors[name] = spread(*tensors[name].shape[1:], center, radius, seed)[None].to(tensors[name])
    compare(case.op, tensors, impl, dtype=dtype)


@each_impl
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
@both_forms
def test_tiles_that_exceed_the_range_leave_the_others_alone(ragged, activation, impl, device):
    """The first 16 queries and 32 keys are a tile each; after them some are large."""
    case = Case(batch=1, queries=40, keys=70, attn_dim=5, activation=activation, ragged=ragged, window=(None, 50))
    tensors = case.tensors(device)
    for name, first in (("query", 20), ("key", 33)):
        rows = tensors[name].view(-1, 5)
        rows[first] = 60
        rows[first + 1] = -60
        rows[first + 5, 2] = 45
    compare(case.op, tensors, impl)


@pytest.mark.kernel
@pytest.mark.parametrize("options", [{}, {"ragged": True}, {"window": (30, 50)}], ids=str)
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e3), (torch.float16, 1e4), (torch.bfloat16, 1e6)])
def test_a_large_row_leaves_others_alone_in_tiles_of_an_h200(dtype, size, activation, options, device, monkeypatch):
    """Forward and backward have other tiles of keys: if the row decided for its tile, their weights would differ."""
    if device.type == "cpu":
        for module, name in ((forward, "fwd_blocks"), (backward, "bwd_blocks")):
            chosen = functools.partial(lambda choose, chip, *given: choose(chips.H200, *given), getattr(module, name))
            monkeypatch.setattr(module, name, chosen)
    case = Case(dtype=dtype, batch=1, queries=20, keys=70, attn_dim=8, value_dim=4, activation=activation, **options)
    tensors = case.tensors(device)
    tensors["v"] = tensors["v"] * size
    tensors["key"].view(-1, 8)[66] = 90
    assert_matches_reference(case.op, tensors, dtype=dtype, large=True)


@pytest.mark.parametrize("keys", [1, 40, 150, 4096])
@pytest.mark.parametrize("queries", [1, 40, 4096])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_large_rows_have_the_same_scores_forward_and_backward(itemsize, packed, queries, keys):
    """It is decided for a tile of queries and so many keys: of other ones the backward's weights were others."""
    for target in (x for x in vars(chips).values() if isinstance(x, chips.Chip)):
        for busy, terms, smooth in itertools.product((False, True), {False, packed}, (False, True)):
            ahead = forward.fwd_blocks(target, itemsize, queries, keys, 8, True, busy)
            back = backward.bwd_blocks(target, itemsize, queries, keys, 8, True, busy, packed, terms, smooth)
            assert ahead.M == back.M, f"{target}: {ahead}, {back}"
            for rows in (ahead.N, back.N):
                assert concat_factors.UNIT.value % rows == 0 == rows % concat_factors.PART.value, f"{target}: {rows}"


@each_impl
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("mask", ["keys", "pairs"])
def test_large_rows_beside_masked_ones_that_hold_nan(mask, layout, impl, device):
    """The loop without factors reads the rows themselves, and must not read these."""
    case = Case(batch=1, queries=20, keys=40, attn_dim=5, mask=mask, layout=layout, window=(10, 25))
    tensors = case.tensors(device)
    tensors["query"][:, ::5] *= 50
    tensors["key"][:, ::7] *= 50
    want = evaluate(case.op, in_double(tensors), "reference")
    rough = evaluate(case.op, tensors, "reference")
    hide(tensors, torch.nan)
    assert_as_exact(evaluate(case.op, tensors, impl), rough, want)


@each_impl
@each_loop
@pytest.mark.parametrize("where", [0, 2, 11], ids=str)
def test_large_rows_beside_one_of_nan_are_exact(where, dtype, impl, device):
    """A query that is NaN is so by itself, wherever it stands in the tile of the others."""
    case = Case(dtype=dtype, batch=1, queries=12, keys=9, attn_dim=5, return_weights=False)
    tensors = case.tensors(device)
    tensors["query"][:, 1] = 60
    tensors["key"][:, :3] = 60
    others = [i for i in range(12) if i != where]
    want, rough = (evaluate(case.op, given, "reference", wrt=[]) for given in (in_double(tensors), tensors))
    tensors["query"][:, where] = torch.nan
    got = evaluate(case.op, tensors, impl, wrt=[])
    assert got.outputs["output"][:, where].isnan().all()
    got, rough, want = (x._replace(outputs={"output": x.outputs["output"][:, others]}) for x in (got, rough, want))
    assert_as_exact(got, rough, want, dtype=dtype)


@pytest.mark.kernel
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ragged": True},
        {"window": (3, 9)},
        {"mask": "keys", "heads": 2},
        {"activation": "gelu", "score_bias": "qk"},
    ],
    ids=str,
)
def test_where_a_key_has_nearly_all_the_weight_gradients_are_exact(options, seed, device):
    """They are small differences: what o is rounded by, which all keys of a query have alike, must not be in them."""
    case = Case(**{"batch": 1, "queries": 5, "keys": 70, "attn_dim": 8, "return_weights": False, **options})
    rng = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(x.shape, generator=rng).to(x) if x.is_floating_point() else x
        for name, x in case.tensors(device).items()
    }
    tensors["v"] *= 100
    assert_matches_reference(case.op, tensors, large=True)


# The largest exponent of αβ. The loops of pairs take up to 42 (on a CPU, 30), those of float32 up to 80: past 88.7
# a float32 is infinite, and past half of that the product of two may be.
EXPONENTS = (29.9, 39.9, 47, 75, 87)


@each_impl
@each_loop
@pytest.mark.parametrize("sign", [1, -1], ids=["up", "down"])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_exponents_around_the_guards_are_exact(exponent, activation, sign, dtype, impl, device):
    """Every feature of a query has it beside one of small numbers, so that neither is lost in the other."""
    case = Case(dtype=dtype, batch=1, queries=5, keys=9, attn_dim=8, activation=activation)
    tensors = case.tensors(device)
    side = sign * exponent / (4 if activation == "tanh" else -2)
    for name in ("query", "key"):
        tensors[name][..., :5] = (side + 0.01 * tensors[name][..., :5]).clamp(-abs(side), abs(side))
    compare(case.op, tensors, impl, dtype=dtype)


@each_impl
@each_dtype
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_one_large_feature_among_many_is_exact(activation, dtype, impl, device):
    """The bound is one of all features, which are looked at in parts."""
    case = Case(dtype=dtype, batch=1, queries=3, keys=5, attn_dim=40, value_dim=3, activation=activation)
    tensors = case.tensors(device)
    for name in ("query", "key"):
        tensors[name][..., 1] += 30 if activation == "tanh" else -60
    compare(case.op, tensors, impl, dtype=dtype)


@each_impl
@each_dtype
@pytest.mark.parametrize("activation", ["tanh", "gelu", "identity"])
def test_features_of_any_size_that_cancel_are_exact(activation, dtype, impl, device):
    """Each feature at its own place in ±100, where a sum of q and k is small."""
    case = Case(dtype=dtype, batch=1, queries=9, keys=17, attn_dim=16, activation=activation)
    tensors = case.tensors(device)
    centers = spread(1, 16, 0, 100, seed=3).round().to(tensors["query"])
    tensors |= {"query": tensors["query"] + centers, "key": tensors["key"] - centers}
    compare(case.op, tensors, impl, dtype=dtype)


@each_impl
@each_dtype
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
@pytest.mark.parametrize("scale", [0.01, 0.3, 3])
def test_scores_of_many_features_of_one_sign_are_exact(scale, activation, dtype, impl, device):
    """Σ v - 2 Σ v r has the rounding of numbers near Σ v in it: 15 times what the scores themselves have."""
    case = Case(dtype=dtype, batch=1, queries=5, keys=9, attn_dim=128, value_dim=3, activation=activation)
    tensors = case.tensors(device)
    tensors |= {"query": tensors["query"] * scale, "key": tensors["key"] * scale, "v": tensors["v"].abs()}
    compare(case.op, tensors, impl, dtype=dtype)


@each_impl
@pytest.mark.parametrize("small", [1e-2, 1e-4])
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu"])
def test_large_v_does_not_magnify_the_rounding_of_small_scores(activation, small, impl, device):
    case = Case(batch=1, queries=17, keys=40, attn_dim=8, activation=activation)
    tensors = case.tensors(device)
    tensors |= {"query": tensors["query"] * small, "key": tensors["key"] * small, "v": tensors["v"] / small}
    compare(case.op, tensors, impl)


@each_impl
@pytest.mark.parametrize("exponent", [29.0, 39.6, 79.0])
def test_large_v_does_not_overflow_where_the_factors_just_fit(exponent, impl, device):
    case = Case(batch=1, queries=3, keys=5, attn_dim=8)
    tensors = case.tensors(device)
    signs = torch.tensor([1.0] * 4 + [-1.0] * 4, device=device)
    for name, by in (("query", exponent / 4), ("key", exponent / 4 * signs)):
        tensors[name] = torch.zeros_like(tensors[name]) + by
    tensors["key"][:, 1:] += tensors["value"][:, 1:, :8] / 1e4
    compare(case.op, tensors | {"v": tensors["v"].abs() * 1e5}, impl)


@each_impl
def test_adding_a_number_to_all_scores_changes_nothing(impl, device):
    case = Case(batch=1, score_bias="qk")
    tensors, exact = shifted(case.op, case.tensors(device))
    assert_matches_reference(case.op, tensors, impl=impl, exact=exact)


@each_impl
def test_weights_of_large_scores_that_are_exact_are_exact(impl, device):
    """Rounded to the scores' own precision, lse alone would be wrong here."""
    case = Case(batch=1, score_bias="qk")
    tensors = case.tensors(device)
    tensors |= {"v": tensors["v"] * 0, "score_bias": tensors["score_bias"].round() + 5000}
    exact = evaluate(case.op, in_double(tensors), "reference")
    # The comparator's nine runs, for the few numbers of v's gradient, but of the very same scores.
    moved = [nudged(tensors, i) | {"score_bias": tensors["score_bias"]} for i in range(1, 9)]
    rough = [evaluate(case.op, each, "reference") for each in (tensors, *moved)]
    assert_as_exact(evaluate(case.op, tensors, impl), rough, exact)
