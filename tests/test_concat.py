"""Concat attention, kernel and blocked path, against the reference: every pair of factors, and what pairs miss."""

import pytest
import torch
from _concat import ACTIVATIONS, Case, check, each_impl, pairwise
from _marks import both_forms, each_dtype
from _pairs import OPTIONS, WINDOWS

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
    **OPTIONS,
}
PACKED = {
    name: FACTORS[name]
    for name in ("dtype", "attn_dim", "heads", "v_heads", "activation", "window", "layout", "dropout_p")
} | {"queries": (1, 5, 21), "keys": (1, 5, 40), "value_dim": (1, 12, 20), "ragged": (True,)}
# The blocked path is quick enough for larger sizes, and has float64.
LARGE = {
    "dtype": (torch.float32, torch.float16, torch.bfloat16, torch.float64),
    "queries": (1, 5, 33, 70, 100),
    "keys": (1, 5, 33, 70, 100),
    "attn_dim": (1, 9, 64),
    "value_dim": (1, 12, 70),
}


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
