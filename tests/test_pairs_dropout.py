"""Dropout of concat and general attention."""

import dataclasses

import _concat
import _general
import pytest
import torch
from _compare import assert_identical, evaluate
from _concat import IMPLS, check, every_impl
from _dropout import assert_draws_nothing, assert_dropped_at_the_rate
from _marks import both_forms
from _pairs import each_family

from fused_attn import concat_attention, general_attention

SIZES = {"queries": 18, "keys": 40, "heads": 2}


def of_concat(query, key, value, scale, **options):
    return concat_attention(query, key, value, torch.full((2,), scale, device=query.device), **options)


def of_general(query, key, value, scale, **options):
    return general_attention(query, key, value, scale=scale, **options)


each_attention = pytest.mark.parametrize("attention", [of_concat, of_general], ids=["concat", "general"])


def dropped_weights(attention, device, impl, *, seed=0, scale=0.0):
    """Weights after dropout, read off as the output for unit vectors as values; and these values."""
    batch, queries, keys = 2, 5, 70
    rng = torch.Generator().manual_seed(3)
    query, key = (torch.randn(batch, 2, n, 2, generator=rng).to(device) for n in (queries, keys))
    value = torch.eye(keys, device=device).repeat(batch, 2, 1, 1).requires_grad_()
    torch.manual_seed(seed)
    return attention(query, key, value, scale, dropout_p=0.3, impl=impl), value


@every_impl
@each_attention
def test_weights_are_dropped_at_the_rate_and_the_kept_ones_scaled(attention, impl, device):
    assert_dropped_at_the_rate(dropped_weights(attention, device, impl)[0])


@every_impl
@each_attention
def test_sequences_heads_queries_and_seeds_drop_differently(attention, impl, device):
    kept = dropped_weights(attention, device, impl)[0] != 0
    other = dropped_weights(attention, device, impl, seed=1)[0] != 0
    assert len(kept.flatten(0, 2).unique(dim=0)) == 2 * 2 * 5
    assert (kept != other).any(-1).all()


@every_impl
@each_attention
def test_backward_drops_what_forward_dropped(attention, impl, device):
    dropped, value = dropped_weights(attention, device, impl, scale=0.5)
    (grad,) = torch.autograd.grad(dropped.sum(), value)  # row j of it is the sum of weights j, over all features
    torch.testing.assert_close(grad, dropped.sum(2)[..., None].expand_as(grad))


@pytest.mark.whole  # of what is no kernel's each is quick
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "case",
    [_concat.Case(**SIZES, attn_dim=3), _general.Case(**SIZES), _general.Case(**SIZES, own_value=False)],
    ids=["concat", "general", "general, keys are values"],
)
@pytest.mark.parametrize("dropout_p", [0.1, 0.999])
@both_forms
def test_every_implementation_drops_the_same_weights(ragged, dropout_p, case, impl, device):
    case = dataclasses.replace(case, ragged=ragged, dropout_p=dropout_p)
    for seed in (1, 2):
        check(case, device, impl, seed=seed)


@every_impl
@each_family
def test_no_dropout_draws_no_random_number(make, impl, device):
    case = make(batch=1, attn_dim=3)
    tensors = case.tensors(device)
    assert_identical(evaluate(case.op, tensors, impl, seed=1), evaluate(case.op, tensors, impl, seed=2))
    assert_draws_nothing(case.op, impl, tensors, device)


@every_impl
@each_family
def test_returned_weights_are_those_before_dropout(make, impl, device):
    case = make(batch=1, attn_dim=3, heads=2)
    tensors = case.tensors(device)
    plain = evaluate(case.op, tensors, impl, through=["weights"])
    dropped = evaluate(dataclasses.replace(case, dropout_p=0.5).op, tensors, impl, through=["weights"])
    assert torch.equal(plain.outputs["weights"], dropped.outputs["weights"])
    assert not torch.equal(plain.outputs["output"], dropped.outputs["output"])
    for name in plain.gradients.keys() - {"value"}:
        assert torch.equal(plain.gradients[name], dropped.gradients[name]), name
