"""Concat attention, kernel and blocked path, against the reference; what is hard, empty, padded, dropped or large."""

import dataclasses
import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from _compare import assert_as_exact, assert_close, assert_identical, evaluate, in_double, largest, rough_runs
from _concat import ACTIVATIONS, ALL, IMPLS, Case, check, compare, offsets, operator, pairwise
from fused_attn.kernels import chip as chips
from fused_attn.kernels import concat_bwd as kernels
from hypothesis import given, settings
from test_location_reference import BY_HAND
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_attn import _concat_blocked, concat_attention

each_impl = pytest.mark.parametrize("impl", IMPLS)
every_impl = pytest.mark.parametrize("impl", ALL)
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
    "queries": (1, 5, 33, 70, 100), "keys": (1, 5, 33, 70, 100), "attn_dim": (1, 9, 64),
    "value_dim": (1, 12, 70),
}  # fmt: skip
TENSORS = ("query", "key", "value", "v", "score_bias")


# --- Every pair of factors, and what pairs may miss --------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("case", [*pairwise(FACTORS), *pairwise(PACKED)], ids=str)
def test_kernel_matches_the_reference_for_every_pair_of_factors(case, device):
    check(case, device, "triton")


@pytest.mark.parametrize("case", [*pairwise(FACTORS | LARGE), *pairwise(PACKED | LARGE)], ids=str)
def test_blocked_path_matches_the_reference_for_every_pair_of_factors(case, device):
    check(case, device, "auto")


@each_impl
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_the_reference_for_every_activation(activation, ragged, impl, device):
    check(Case(batch=1, queries=18, keys=35, activation=activation, ragged=ragged), device, impl)


@each_impl
@pytest.mark.parametrize("keys", [5, 35])
@pytest.mark.parametrize("window", WINDOWS[1:], ids=str)
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


# --- The oracle itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_formula(activation):
    """Against loops over numbers."""
    left, right = window = (2, 3)
    case = Case(
        batch=1, queries=4, keys=6, attn_dim=3, value_dim=2, heads=2, activation=activation, mask="pairs",
        window=window, score_bias="bhqk",
    )  # fmt: skip
    tensors = in_double(case.tensors(torch.device("cpu")))
    out, weights = case.op(impl="reference", **tensors)
    numbers = {name: x.tolist() for name, x in tensors.items()}
    act, mask = BY_HAND[activation], numbers["mask"][0]
    for head, i in itertools.product(range(2), range(4)):
        raw = []
        for j in range(6):
            pairs = zip(numbers["query"][0][head][i], numbers["key"][0][head][j], numbers["v"][head], strict=True)
            score = sum(v * act(q + k) for q, k, v in pairs) + numbers["score_bias"][0][head][i][j]
            raw.append(math.exp(score) if mask[i][j] and i - left <= j <= i + right else 0.0)
        want = [x / sum(raw) if sum(raw) else 0.0 for x in raw]
        assert weights[0, head, i].tolist() == pytest.approx(want, rel=1e-12, abs=1e-12)
        total = [sum(w * row[d] for w, row in zip(want, numbers["value"][0][head], strict=True)) for d in range(2)]
        assert out[0, head, i].tolist() == pytest.approx(total, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("window", [None, (2, 1)], ids=str)
def test_reference_of_packed_rows_is_that_of_each_segment_alone(window):
    case = Case(queries=12, keys=14, heads=2, ragged=True, window=window)
    t = in_double(case.tensors(torch.device("cpu")))
    out = case.op(impl="reference", **t)
    ends = zip(*(itertools.pairwise(t[f"cu_seqlens_{side}"].tolist()) for side in "qk"), strict=True)
    for (q0, q1), (k0, k1) in ends:
        query, key, value = (
            t[name][lo:hi].transpose(0, 1)[None]
            for name, lo, hi in (("query", q0, q1), ("key", k0, k1), ("value", k0, k1))
        )
        alone = concat_attention(query, key, value, t["v"], window=window, impl="reference")
        torch.testing.assert_close(out[q0:q1], alone[0].transpose(0, 1), rtol=1e-12, atol=1e-12)


# --- Exactness: where the factors would overflow, cancel, or be lost -----------------------------------------------


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
@each_dtype
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


@each_impl
def test_large_rows_beside_masked_ones_that_hold_nan(impl, device):
    """The loop without factors reads the rows themselves, and must not read these."""
    case = Case(batch=1, queries=20, keys=40, attn_dim=5, mask="pairs", window=(10, 25))
    tensors = case.tensors(device)
    tensors["query"][:, ::5] *= 50
    tensors["key"][:, ::7] *= 50
    want = evaluate(case.op, in_double(tensors), "reference")
    rough = evaluate(case.op, tensors, "reference")
    hide(tensors, torch.nan)
    assert_as_exact(evaluate(case.op, tensors, impl), rough, want)


@each_impl
def test_large_v_does_not_magnify_the_rounding_of_small_scores(impl, device):
    case = Case(batch=1, queries=5, keys=9, attn_dim=8)
    tensors = case.tensors(device)
    tensors |= {"query": tensors["query"] / 100, "key": tensors["key"] / 100, "v": tensors["v"] * 100}
    compare(case.op, tensors, impl)


@each_impl
def test_adding_a_number_to_all_scores_changes_nothing(impl, device):
    case = Case(batch=1, score_bias="qk")
    tensors = case.tensors(device)
    # Quarters, so that adding 1000 is exact and only the scores' own rounding is left to see.
    tensors["score_bias"] = (tensors["score_bias"] * 4).round() / 4
    exact = evaluate(case.op, in_double(tensors), "reference")
    tensors["score_bias"] = tensors["score_bias"] + 1000
    assert_close(evaluate(case.op, in_double(tensors), "reference"), exact)
    assert_as_exact(evaluate(case.op, tensors, impl), rough_runs(case.op, tensors), exact)


@each_impl
@each_dtype
def test_huge_score_biases_match_the_reference(dtype, impl, device):
    case = Case(dtype=dtype, batch=1, score_bias="qk")
    tensors = case.tensors(device)
    tensors["score_bias"] = tensors["score_bias"] * 10_000
    compare(case.op, tensors, impl, dtype=dtype)


@every_impl
@pytest.mark.parametrize("heads", [None, 2])
def test_bias_of_minus_infinity_hides_a_key_as_the_mask_does(heads, impl, device):
    case = Case(heads=heads, queries=7, keys=35, attn_dim=3, score_bias="bhqk", mask="pairs")
    tensors = case.tensors(device)
    mask = tensors.pop("mask")
    masked = evaluate(case.op, tensors | {"mask": mask}, impl)
    hidden = ~mask if heads is None else ~mask[:, None]
    tensors["score_bias"] = tensors["score_bias"].masked_fill(hidden, -torch.inf)
    assert_close(evaluate(case.op, tensors, impl), masked)


# --- Parts: splits of the keys, chunks of the workspace -------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("case", [
    Case(batch=1, queries=3, keys=300, attn_dim=3),
    Case(batch=1, queries=3, keys=300, attn_dim=3, heads=2, mask="empty", score_bias="hqk", dropout_p=0.3),
    Case(batch=1, queries=20, keys=300, attn_dim=3, window=(4, 150), value_dim=70),
    Case(queries=15, keys=300, attn_dim=3, ragged=True, heads=2),
    Case(dtype=torch.bfloat16, batch=1, queries=3, keys=300, attn_dim=3, mask="keys"),
], ids=str)  # fmt: skip
def test_keys_in_parts_match_the_reference(case, device):
    """On a chip of many cores, few queries have their keys split."""
    chip = chips.chip_of(device)._replace(cores=1000)
    with chips.assume(chip):
        check(case, device, "triton")


@pytest.mark.kernel
@both_forms
def test_workspace_smaller_than_the_batch_changes_nothing(monkeypatch, ragged, device):
    case = Case(
        batch=1, queries=40, keys=40, attn_dim=3, heads=2, ragged=ragged, dropout_p=0.3, window=(20, 9),
        mask="none" if ragged else "pairs", score_bias=None if ragged else "bhqk",
    )  # fmt: skip
    tensors = case.tensors(device)
    whole = evaluate(case.op, tensors, "triton")
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", 1)
    parts = evaluate(case.op, tensors, "triton")
    assert_close(parts, whole)
    for name in parts.gradients.keys() - {"key", "value"}:  # these are summed over the chunks
        assert torch.equal(parts.gradients[name], whole.gradients[name]), name


@each_impl
@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_bitwise_equal(dtype, ragged, impl, device):
    case = Case(dtype=dtype, batch=1, queries=33, keys=40, attn_dim=3, ragged=ragged, dropout_p=0.3)
    tensors = case.tensors(device)
    assert_identical(evaluate(case.op, tensors, impl), evaluate(case.op, tensors, impl))


# --- Windows ---------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@both_forms
def test_tiles_of_keys_outside_the_window_are_skipped(ragged, device):
    """Values there are not read: they are tiles away from all that is visible."""
    case = Case(batch=1, queries=20, keys=350, attn_dim=2, window=(3, 4), ragged=ragged, return_weights=False)
    tensors = case.tensors(device)
    clean = evaluate(case.op, tensors, "triton")
    tensors["value"].view(350, -1)[300:] = torch.nan
    assert_identical(evaluate(case.op, tensors, "triton"), clean)


@each_impl
def test_window_alone_is_the_mask_that_it_stands_for(impl, device):
    case = Case(batch=1, queries=19, keys=35, attn_dim=3, window=(5, -1))
    tensors = case.tensors(device)
    i, j = torch.arange(19, device=device)[:, None], torch.arange(35, device=device)
    mask = (i - 5 <= j) & (j <= i - 1)
    masked = operator(return_weights=True)
    assert_close(evaluate(case.op, tensors, impl), evaluate(masked, tensors | {"mask": mask[None]}, impl))


# --- Nothing to attend to ----------------------------------------------------------------------------------------


def assert_zero(result):
    """Zeros everywhere: not NaN, and not the poison of unwritten memory."""
    for family in result:
        for name, x in family.items():
            assert largest(x) == 0, name


@every_impl
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("activation", ["tanh", "relu", "identity"])
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"keys": 0}, {"queries": 0, "keys": 0}], ids=str)
def test_empty_batches_give_zeros(sizes, activation, heads, impl, device):
    case = Case(**sizes, activation=activation, heads=heads, score_bias="bhqk", mask="pairs")
    tensors = case.tensors(device)
    result = evaluate(case.op, tensors, impl)
    assert_zero(result)
    *lead, queries, _ = tensors["query"].shape
    assert result.outputs["output"].shape == (*lead, queries, 12)
    assert result.outputs["weights"].shape == (*lead, queries, tensors["key"].shape[-2])


@every_impl
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("lengths", [[], [(0, 0)], [(0, 0), (0, 0)], [(0, 3)], [(3, 0)], [(3, 0), (0, 3)]], ids=str)
def test_ragged_batches_without_pairs_give_zeros(lengths, heads, impl, device):
    case = Case(
        queries=sum(q for q, _ in lengths), keys=sum(k for _, k in lengths), attn_dim=3, heads=heads, ragged=True
    )
    cu = {f"cu_seqlens_{side}": offsets([pair[i] for pair in lengths], device) for i, side in enumerate("qk")}
    result = evaluate(case.op, case.tensors(device) | cu, impl)
    assert_zero(result)
    assert result.outputs["output"].shape == (case.queries, *(() if heads is None else (heads,)), 12)


@every_impl
@pytest.mark.parametrize("activation", ["tanh", "gelu", "identity"])
@pytest.mark.parametrize("form", ["keys", "pairs", "window", "past window"])
def test_queries_that_see_nothing_give_zeros(form, activation, impl, device):
    window = {"window": (-40, None), "past window": (None, -21)}.get(form)
    mask = form if window is None else "none"
    case = Case(attn_dim=3, activation=activation, window=window, mask=mask, score_bias="qk")
    tensors = case.tensors(device)
    if window is None:
        tensors["mask"] = torch.zeros_like(tensors["mask"])
    assert_zero(evaluate(case.op, tensors, impl))


@every_impl
def test_some_queries_that_see_nothing_leave_the_others_alone(impl, device):
    case = Case(attn_dim=3, mask="pairs", score_bias="bqk")
    tensors = case.tensors(device)
    result = evaluate(case.op, tensors, impl)
    blind = ~tensors["mask"].any(-1)
    assert blind.any()
    assert not blind.all()
    for x in (*result.outputs.values(), result.gradients["query"], result.gradients["score_bias"]):
        assert largest(x[blind]) == 0
        assert (x[~blind].abs().amax(-1) > 0).all()


# --- Padding ---------------------------------------------------------------------------------------------------


def hide(tensors, fill):
    """Put `fill` in the rows that the mask lets no query or key use; return these rows by name."""
    mask = tensors["mask"]
    keys = mask if mask.dim() == 2 else mask.any(1)
    hidden = {"key": ~keys, "value": ~keys}
    if mask.dim() == 3:
        hidden["query"] = ~mask.any(2)
    for name, rows in hidden.items():
        x = tensors[name]
        (x if x.dim() == 3 else x.transpose(1, 2))[rows] = fill
    return hidden


@every_impl
@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
@pytest.mark.parametrize("activation", ["tanh", "relu", "identity"])
@pytest.mark.parametrize("mask", ["keys", "pairs"])
@pytest.mark.parametrize("heads", [None, 2])
def test_masked_rows_are_never_read_and_have_zero_gradients(heads, mask, activation, fill, impl, device):
    case = Case(
        batch=2 if heads is None else 1, queries=7, keys=35, attn_dim=3, heads=heads, mask=mask, activation=activation
    )
    tensors = case.tensors(device)
    clean = evaluate(case.op, tensors, impl)
    hidden = hide(tensors, fill)
    result = evaluate(case.op, tensors, impl)
    assert_close(result, clean)
    for name, rows in hidden.items():
        grad = result.gradients[name]
        assert largest((grad if heads is None else grad.transpose(1, 2))[rows]) == 0, name


@every_impl
@each_dtype
def test_masked_rows_are_never_read_in_any_dtype(dtype, impl, device):
    case = Case(dtype=dtype, batch=1, attn_dim=3, mask="pairs", window=(9, None))
    tensors = case.tensors(device)
    clean = evaluate(case.op, tensors, impl)
    hide(tensors, torch.nan)
    assert_close(evaluate(case.op, tensors, impl), clean)


def as_padded(case: Case, fill: float):
    """The same operator on packed rows, through a padded batch whose padding holds `fill`."""

    def padded_op(*, impl, query, key, value, v, cu_seqlens_q, cu_seqlens_k):
        def at(cu):
            lengths = cu.diff()
            segment = torch.repeat_interleave(torch.arange(len(lengths), device=cu.device), lengths)
            rows = torch.arange(int(cu[-1]), device=cu.device)
            return (segment, rows - cu[segment]), (len(lengths), int(lengths.max()) + 3)

        (at_q, q_shape), (at_k, k_shape) = at(cu_seqlens_q), at(cu_seqlens_k)

        def pad(x, at, shape):
            y = x.new_full((*shape, *x.shape[1:]), fill).index_put(at, x)
            return y if case.heads is None else y.transpose(1, 2)

        seen = torch.tensor(True, device=query.device)
        q_mask, k_mask = (
            torch.zeros(shape, dtype=torch.bool, device=query.device).index_put(at, seen)
            for at, shape in ((at_q, q_shape), (at_k, k_shape))
        )
        out = concat_attention(
            pad(query, at_q, q_shape), pad(key, at_k, k_shape), pad(value, at_k, k_shape), v, impl=impl,
            mask=q_mask[:, :, None] & k_mask[:, None], window=case.window, dropout_p=case.dropout_p,
        )  # fmt: skip
        return (out if case.heads is None else out.transpose(1, 2))[at_q]

    return padded_op


@every_impl
@pytest.mark.parametrize("window", [None, (4, -1)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("heads", [None, 2])
def test_padded_and_ragged_forms_of_the_same_batch_agree(heads, dropout_p, window, impl, device):
    lengths = {"q": [7, 0, 3, 1, 18], "k": [5, 2, 0, 34, 9]}
    case = Case(
        queries=29, keys=50, attn_dim=3, heads=heads, ragged=True, dropout_p=dropout_p, window=window
    )  # fmt: skip
    tensors = case.tensors(device) | {f"cu_seqlens_{side}": offsets(x, device) for side, x in lengths.items()}
    exact = evaluate(case.op, in_double(tensors), "reference")
    rough = rough_runs(case.op, tensors)
    assert_as_exact(evaluate(as_padded(case, torch.nan), tensors, impl), rough, exact)
    assert_as_exact(evaluate(case.op, tensors, impl), rough, exact)


# --- Dropout ---------------------------------------------------------------------------------------------------


def dropped_weights(device, impl, *, seed=0, heads=2, scale=0.0, sizes=(2, 5, 70)):
    """Weights after dropout, read off as the output for unit vectors as values; and these values."""
    batch, queries, keys = sizes
    rng = torch.Generator().manual_seed(3)
    query, key = (torch.randn(batch, heads, n, 2, generator=rng).to(device) for n in (queries, keys))
    value = torch.eye(keys, device=device).repeat(batch, heads, 1, 1).requires_grad_()
    torch.manual_seed(seed)
    v = torch.full((2,), scale, device=device)
    return concat_attention(query, key, value, v, dropout_p=0.3, impl=impl), value


@every_impl
def test_weights_are_dropped_at_the_rate_and_the_kept_ones_scaled(impl, device):
    dropped, _ = dropped_weights(device, impl)
    kept = dropped != 0
    spread = (0.3 * 0.7 / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - 0.7) < 4 * spread
    torch.testing.assert_close(dropped[kept] * 70, torch.full_like(dropped[kept], 1 / 0.7))


@every_impl
def test_sequences_heads_queries_and_seeds_drop_differently(impl, device):
    kept = dropped_weights(device, impl)[0] != 0
    other = dropped_weights(device, impl, seed=1)[0] != 0
    assert len(kept.flatten(0, 2).unique(dim=0)) == 2 * 2 * 5
    assert (kept != other).any(-1).all()


@every_impl
def test_backward_drops_what_forward_dropped(impl, device):
    dropped, value = dropped_weights(device, impl, scale=0.5)
    (grad,) = torch.autograd.grad(dropped.sum(), value)  # row j of it is the sum of weights j, over all features
    torch.testing.assert_close(grad, dropped.sum(2)[..., None].expand_as(grad))


@each_impl
@pytest.mark.parametrize("dropout_p", [0.1, 0.999])
@both_forms
def test_every_implementation_drops_the_same_weights(ragged, dropout_p, impl, device):
    case = Case(queries=18, keys=40, attn_dim=3, heads=2, ragged=ragged, dropout_p=dropout_p)
    for seed in (1, 2):
        check(case, device, impl, seed=seed)


@every_impl
def test_no_dropout_draws_no_random_number(impl, device):
    case = Case(batch=1, attn_dim=3)
    tensors = case.tensors(device)
    assert_identical(evaluate(case.op, tensors, impl, seed=1), evaluate(case.op, tensors, impl, seed=2))
    state = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state()
    case.op(impl=impl, **tensors)
    assert torch.equal(state, torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state())


@every_impl
def test_returned_weights_are_those_before_dropout(impl, device):
    case = Case(batch=1, attn_dim=3, heads=2)
    tensors = case.tensors(device)
    plain = evaluate(case.op, tensors, impl, through=["weights"])
    dropped = evaluate(dataclasses.replace(case, dropout_p=0.5).op, tensors, impl, through=["weights"])
    assert torch.equal(plain.outputs["weights"], dropped.outputs["weights"])
    assert not torch.equal(plain.outputs["output"], dropped.outputs["output"])
    for name in ("query", "key", "v"):
        assert torch.equal(plain.gradients[name], dropped.gradients[name]), name


# --- Memory and work of the blocked path ---------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Sees the operators below a custom operator too: their largest tensor, and how many numbers they give."""

    largest = 0  # elements of a storage
    work = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
                self.work += 0 if x._is_view() else x.numel()
        return result


@pytest.fixture
def recorded(monkeypatch, device):
    """A function from a case to the record of its forward and backward on the blocked path."""
    if device.type != "cpu":
        pytest.skip("the blocked path is for CPUs")

    def record(case: Case) -> Recorder:
        recorder = Recorder()
        for name in ("blocked_fwd", "blocked_bwd"):
            monkeypatch.setattr(_concat_blocked, name, inside(recorder, getattr(_concat_blocked, name)))
        tensors = case.tensors(device)
        with recorder:
            evaluate(case.op, tensors, "auto")
        assert recorder.largest >= max(x.numel() for x in tensors.values())
        monkeypatch.undo()
        return recorder

    return record


def inside(mode, function):
    def wrapped(*args):
        with mode:
            return function(*args)

    return wrapped


LONG = Case(batch=1, queries=1024, keys=1024, attn_dim=16, value_dim=16, return_weights=False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("structure", [{}, {"heads": 2}, {"window": (None, 0)}, {"score_bias": "q1"}], ids=str)
def test_blocked_path_makes_nothing_of_queries_times_keys(structure, activation, recorded):
    case = dataclasses.replace(LONG, activation=activation, **structure)
    assert recorded(case).largest < case.queries * case.keys


@pytest.mark.parametrize("name", ["queries", "keys"])
@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_memory_of_the_blocked_path_is_linear(name, activation, recorded):
    case = dataclasses.replace(LONG, activation=activation)
    sizes = [recorded(dataclasses.replace(case, **{name: n})).largest for n in (1024, 2048, 4096)]
    assert sizes[1] <= 2 * sizes[0]
    assert sizes[2] <= 2 * sizes[1]


@pytest.mark.parametrize("window", [(16, 16), (None, 0)], ids=str)
def test_work_of_the_blocked_path_follows_the_window(window, recorded):
    whole = recorded(LONG).work
    share = {(16, 16): 0.15, (None, 0): 0.6}[window]
    assert recorded(dataclasses.replace(LONG, window=window)).work < share * whole
