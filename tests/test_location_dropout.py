"""Dropout on the weights of location attention."""

import pytest
import torch
from _compare import IMPLS, assert_identical, assert_matches_reference, evaluate
from _dropout import assert_draws_nothing, assert_dropped_at_the_rate
from _location import Case, operator

from fused_attn import location_attention


def dropped_weights(device, impl, *, seed=0, batch=4, rows=257, hops=3, dropout_p=0.3, scale=0.0):
    """Weights after dropout, (batch, hops, rows), read off as the output for unit vectors as values.

    With them their values, of which the gradient by the output's first feature tells the backward's mask.
    """
    rng = torch.Generator().manual_seed(3)
    h = torch.randn(batch, rows, 5, generator=rng).to(device)
    w = torch.randn(5, hops, generator=rng).to(device) * scale
    value = torch.eye(rows, device=device).repeat(batch, 1, 1).requires_grad_()
    torch.manual_seed(seed)
    return location_attention(h, w, value=value, dropout_p=dropout_p, impl=impl), value


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_are_dropped_at_the_rate_and_the_kept_ones_scaled(impl, device):
    assert_dropped_at_the_rate(dropped_weights(device, impl)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_sequences_hops_and_seeds_drop_differently(impl, device):
    kept = dropped_weights(device, impl, rows=63)[0] != 0
    other = dropped_weights(device, impl, rows=63, seed=1)[0] != 0
    assert len(kept.flatten(0, 1).unique(dim=0)) == 12
    assert (kept != other).any(-1).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_drops_what_forward_dropped(impl, device):
    dropped, value = dropped_weights(device, impl, hops=1, rows=100, scale=0.5)
    (grad,) = torch.autograd.grad(dropped.sum(), value)  # row j of it is weight j, over all features
    torch.testing.assert_close(grad, dropped[:, 0, :, None].expand_as(grad))
    assert torch.equal(grad[..., 0] == 0, dropped[:, 0] == 0)


@pytest.mark.kernel
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
def test_kernel_and_reference_drop_the_same_weights(ragged, dropout_p, device):
    case = Case(rows=100, score="mlp_hops", ragged=ragged, mask="random", dropout_p=dropout_p)
    for seed in (1, 2):
        assert_matches_reference(case.op, case.tensors(device), seed=seed)


@pytest.mark.parametrize("impl", IMPLS)
def test_same_seed_gives_the_same_result(impl, device):
    case = Case(rows=63, score="gated", dropout_p=0.5)
    tensors = case.tensors(device)
    assert_identical(evaluate(case.op, tensors, impl), evaluate(case.op, tensors, impl))
    others = evaluate(case.op, tensors, impl, seed=1)
    assert not torch.equal(evaluate(case.op, tensors, impl).outputs["output"], others.outputs["output"])


@pytest.mark.parametrize("impl", IMPLS)
def test_no_dropout_is_identical_and_draws_no_random_number(impl, device):
    case = Case(rows=63)
    tensors = case.tensors(device)
    assert_identical(
        evaluate(operator(dropout_p=0.0), tensors, impl, seed=1), evaluate(operator(), tensors, impl, seed=2)
    )
    assert_draws_nothing(operator(dropout_p=0.0), impl, tensors, device)


@pytest.mark.parametrize("impl", IMPLS)
def test_returned_weights_are_those_before_dropout(impl, device):
    case = Case(rows=63, score="mlp_hops")
    tensors = case.tensors(device)
    plain = evaluate(operator(), tensors, impl, through=["weights"])
    dropped = evaluate(operator(dropout_p=0.5), tensors, impl, through=["weights"])
    assert torch.equal(plain.outputs["weights"], dropped.outputs["weights"])
    assert not torch.equal(plain.outputs["output"], dropped.outputs["output"])
    for name in ("h", "w", "b", "v"):
        assert torch.equal(plain.gradients[name], dropped.gradients[name]), name
