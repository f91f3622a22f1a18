"""Dropout of concat attention."""

import dataclasses

import pytest
import torch
from _compare import assert_identical, evaluate
from _concat import ALL, IMPLS, Case, check

from fused_attn import concat_attention

each_impl = pytest.mark.parametrize("impl", IMPLS)
every_impl = pytest.mark.parametrize("impl", ALL)
both_forms = pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])


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
