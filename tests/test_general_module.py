"""`GeneralAttention`."""

import pytest
import torch
from _concat import ALL

from fused_attn import GeneralAttention


@pytest.mark.parametrize("heads", [1, 3])
def test_the_weight_is_initialised_as_a_linear_layer_is(heads):
    torch.manual_seed(0)
    weight = GeneralAttention(100, 200, num_heads=heads).weight
    assert weight.shape == ((3, 100, 200) if heads == 3 else (100, 200))
    bound = torch.nn.Linear(100, 200).weight.abs().max().item()
    assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert GeneralAttention(7).weight.shape == (7, 7)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("value", ["none", "all heads", "each head"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_module_is_the_function_on_its_weight(packed, value, heads, impl, device):
    torch.manual_seed(0)
    module = GeneralAttention(3, 5, num_heads=heads, scale=0.3, activation="tanh").to(device)
    query, key = torch.randn(2, 4, 3, device=device), torch.randn(2, 6, 5, device=device)
    axis = (heads,) if heads > 1 and value == "each head" else ()
    values = None if value == "none" else torch.randn(2, *axis, 6, 7, device=device)
    one = values if values is not None and axis else (key if values is None else values)[:, None]
    scores = torch.tanh(0.3 * query[:, None] @ module.weight.expand(heads, -1, -1) @ key[:, None].mT)
    want = torch.softmax(scores, -1) @ one
    given = {}
    if packed:
        want, values = want.transpose(1, 2).flatten(0, 1), None if values is None else values
        values = values.transpose(1, 2) if axis else values
        query, key, values = (None if x is None else x.flatten(0, 1) for x in (query, key, values))
        for side, length in (("q", 4), ("k", 6)):
            offsets = torch.tensor([0, length, 2 * length], dtype=torch.int32, device=device)
            given[f"cu_seqlens_{side}"] = offsets
    out = module(query, key, values, impl=impl, **given)
    torch.testing.assert_close(out, want if heads > 1 else want.squeeze(1))
    out.square().sum().backward()
    assert module.weight.grad.count_nonzero() > 0


def test_module_dropout_is_for_training_only(device):
    module = GeneralAttention(3, dropout=0.5).to(device)
    query, key = torch.randn(2, 4, 3, device=device), torch.randn(2, 6, 3, device=device)
    assert not torch.equal(module(query, key), module(query, key))
    module.eval()
    assert torch.equal(module(query, key), module(query, key))


def test_repr_shows_the_options():
    shown = repr(GeneralAttention(3, 5, num_heads=2, scale=0.5, activation="relu", dropout=0.25))
    assert "query_dim=3, key_dim=5, scale=0.5, num_heads=2, activation='relu', dropout=0.25" in shown
