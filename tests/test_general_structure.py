"""General attention: windows, nothing to attend to, padding that is never read."""

import dataclasses
import sys

import _pairs
import pytest
import torch
from _compare import assert_close, assert_identical, assert_zero, evaluate
from _concat import every_impl
from _general import Case, both_values, both_weights
from _marks import both_forms

# --- Windows ---------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@both_forms
def test_tiles_outside_the_window_are_skipped(ragged, device):
    """Values there are not read: they are tiles away from all that is visible."""
    case = Case(batch=1, queries=20, keys=350, attn_dim=2, window=(3, 4), ragged=ragged, return_weights=False)
    tensors = case.tensors(device)
    clean = evaluate(case.op, tensors, "triton", wrt=["query", "key"])
    tensors["value"].view(350, -1)[300:] = torch.nan
    got = evaluate(case.op, tensors, "triton", wrt=["query", "key"])
    got.gradients["key"].view(350, -1)[288:] = 0  # of those keys' own gradients NaN · 0 may be NaN
    assert_identical(got, clean)


@every_impl
@pytest.mark.parametrize("far", [2**31 - 1, 2**31, sys.maxsize])
def test_sides_past_any_length_are_open_or_hide_all(far, impl, device):
    case = Case(batch=1, queries=19, keys=35, attn_dim=3)
    tensors = case.tensors(device)
    every = evaluate(case.op, tensors, impl)
    for window in ((None, far), (far, None), (far, far)):
        assert_close(evaluate(dataclasses.replace(case, window=window).op, tensors, impl), every)
    for window in ((None, -far), (-far, None)):
        assert_zero(evaluate(dataclasses.replace(case, window=window).op, tensors, impl))


# --- Nothing to attend to ----------------------------------------------------------------------------------------


@every_impl
@both_values
@both_weights
@_pairs.each_way_to_be_empty
def test_empty_batches_give_zeros(sizes, weights, own_value, impl, device):
    case = Case(**sizes, heads=2, own_value=own_value, mask="pairs", weight="heads", return_weights=weights)
    _pairs.check_empty(dataclasses.replace(case, score_bias="bhqk" if weights else None), impl, device)


@every_impl
@both_values
@both_weights
@_pairs.each_way_to_be_blind
def test_queries_that_see_nothing_give_zeros(form, weights, own_value, impl, device):
    case = Case(attn_dim=3, value_dim=3, own_value=own_value, return_weights=weights, **form)
    _pairs.check_blind(case, impl, device)


@every_impl
@both_weights
def test_some_queries_that_see_nothing_leave_the_others_alone(weights, impl, device):
    _pairs.check_some_blind(Case(attn_dim=3, value_dim=3, mask="pairs", return_weights=weights), impl, device)


# --- Padding ---------------------------------------------------------------------------------------------------


@every_impl
@both_values
@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
@pytest.mark.parametrize("mask", ["keys", "pairs"])
@pytest.mark.parametrize("weight", ["none", "heads"])
@both_weights
def test_masked_rows_are_never_read_and_have_zero_gradients(weights, weight, mask, fill, own_value, impl, device):
    sizes = {"batch": 1, "queries": 7, "keys": 35, "attn_dim": 3, "value_dim": 3, "heads": 2}
    case = Case(**sizes, mask=mask, weight=weight, own_value=own_value, return_weights=weights)
    _pairs.check_hidden(case, fill, impl, device)
