"""`ConcatAttention`."""

import pytest
import torch
from _concat import ALL

from fused_attn import ConcatAttention

QUERY, KEY, WIDTH, DIMS = 3, 5, 4, (2, 6, 7)


def inputs(device, *, queries=4, keys=6):
    torch.manual_seed(0)
    query, key = torch.randn(2, queries, QUERY, device=device), torch.randn(2, keys, KEY, device=device)
    sizes = ((2, DIMS[0]), (2, queries, DIMS[1]), (2, keys, DIMS[2]))
    return query, key, [torch.randn(size, device=device) for size in sizes]


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_parameters_have_the_names_and_shapes(bias, heads):
    module = ConcatAttention(QUERY, KEY, WIDTH, context_dims=DIMS, num_heads=heads, bias=bias)
    want = {"query_proj.weight": (heads * WIDTH, QUERY), "key_proj.weight": (heads * WIDTH, KEY)}
    want |= {f"context_projs.{i}.weight": (heads * WIDTH, n) for i, n in enumerate(DIMS)}
    want |= {"score.weight": (heads, WIDTH)} | ({"query_proj.bias": (heads * WIDTH,)} if bias else {})
    assert {name: tuple(x.shape) for name, x in module.state_dict().items()} == want


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("own_value", [False, True])
def test_shapes_are_those_of_the_form(own_value, heads, impl, device):
    module = ConcatAttention(QUERY, KEY, WIDTH, num_heads=heads).to(device)
    query, key, _ = inputs(device)
    value = torch.randn(2, 6, 9, device=device) if own_value else None
    out, weights = module(query, key, value, return_weights=True, impl=impl)
    axis = (heads,) if heads > 1 else ()
    assert out.shape == (2, *axis, 4, 9 if own_value else KEY)
    assert weights.shape == (2, *axis, 4, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.parametrize("equal", [False, True], ids=["lengths differ", "equal lengths"])
@pytest.mark.parametrize("heads", [1, 3])
def test_contexts_add_their_projections_to_the_score(heads, equal, device):
    module = ConcatAttention(
        QUERY, KEY, WIDTH, context_dims=DIMS, num_heads=heads, bias=True, activation="sigmoid"
    ).to(device)
    query, key, contexts = inputs(device, keys=4 if equal else 6)
    mask, window = torch.rand(2, key.shape[1], device=device) < 0.8, (1, 2)
    score_bias = torch.randn(*[1] * (1 if heads == 1 else 2), 4, key.shape[1], device=device)

    p = dict(module.named_parameters())
    sequence, by_query, by_key = (x @ p[f"context_projs.{i}.weight"].T for i, x in enumerate(contexts))
    q = query @ p["query_proj.weight"].T + p["query_proj.bias"]
    z = (q + sequence[:, None] + by_query)[:, :, None] + (key @ p["key_proj.weight"].T + by_key)[:, None]
    scores = (torch.sigmoid(z).unflatten(-1, (heads, WIDTH)) * p["score.weight"]).sum(-1).movedim(-1, 1) + score_bias
    i, j = torch.arange(4, device=device)[:, None], torch.arange(key.shape[1], device=device)
    shown = mask[:, None, None] & (j >= i - 1) & (j <= i + 2)
    want = torch.softmax(scores.masked_fill(~shown, -torch.inf), -1).nan_to_num(0) @ key[:, None]

    if equal:
        contexts[1:] = ("query", contexts[1]), ("key", contexts[2])
    got = module(query, key, contexts=contexts, mask=mask, window=window, score_bias=score_bias)
    torch.testing.assert_close(got, want if heads > 1 else want[:, 0])


def test_values_may_differ_between_heads(device):
    module = ConcatAttention(QUERY, KEY, WIDTH, num_heads=3).to(device)
    query, key, _ = inputs(device)
    value = torch.randn(2, 3, 6, 9, device=device)
    out, weights = module(query, key, value, return_weights=True)
    torch.testing.assert_close(out, weights @ value)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("heads", [1, 3])
def test_every_parameter_gets_a_gradient(heads, impl, device):
    module = ConcatAttention(QUERY, KEY, WIDTH, context_dims=DIMS, num_heads=heads, bias=True).to(device)
    query, key, contexts = inputs(device)
    module(query, key, contexts=contexts, impl=impl).square().sum().backward()
    for name, x in module.named_parameters():
        assert x.grad is not None, name
        assert x.grad.count_nonzero() > 0, name


def test_module_dropout_is_for_training_only(device):
    module = ConcatAttention(QUERY, KEY, WIDTH, dropout=0.5).to(device)
    query, key, _ = inputs(device)
    assert not torch.equal(module(query, key), module(query, key))
    module.eval()
    assert torch.equal(module(query, key), module(query, key))
    plain = ConcatAttention(QUERY, KEY, WIDTH).to(device)
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module(query, key), plain(query, key))


def test_repr_shows_the_options():
    shown = repr(ConcatAttention(QUERY, KEY, WIDTH, num_heads=2, activation="relu", dropout=0.25))
    assert "num_heads=2, activation='relu', dropout=0.25" in shown


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("heads", [1, 3])
def test_a_decoder_projects_its_keys_once(heads, impl, device):
    module = ConcatAttention(QUERY, KEY, WIDTH, context_dims=DIMS, num_heads=heads).to(device)
    query, key, contexts = inputs(device)
    projected = module.project_keys(key)
    assert projected.shape == (2, 6, heads * WIDTH)
    for i in range(3):
        step, given = query[:, i : i + 1], [contexts[0], contexts[1][:, i : i + 1], contexts[2]]
        got = module(step, key, contexts=given, projected=projected, impl=impl)
        torch.testing.assert_close(got, module(step, key, contexts=given, impl="reference"))
    got.square().sum().backward()
    assert module.key_proj.weight.grad.count_nonzero() > 0


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("hide", [{"mask": torch.arange(6) < 4}, {"window": (0, 0)}], ids=["mask", "window"])
def test_projected_keys_that_are_hidden_may_be_nan(hide, impl, device):
    module = ConcatAttention(QUERY, KEY, WIDTH).to(device)
    query, key, _ = inputs(device)
    key[:, 4:] = torch.nan
    hide = {name: x.to(device).expand(2, 6) if name == "mask" else x for name, x in hide.items()}
    got = module(query, key, projected=module.project_keys(key), **hide, impl=impl)
    got.sum().backward()
    torch.testing.assert_close(got, module(query, key, **hide, impl="reference"))
    assert module.key_proj.weight.grad.isfinite().all()


def test_projected_keys_of_another_width_or_length_are_named(device):
    module = ConcatAttention(QUERY, KEY, WIDTH, num_heads=3).to(device)
    query, key, _ = inputs(device)
    for projected in (module.project_keys(key)[:, 1:], module.project_keys(key)[..., :WIDTH], key):
        with pytest.raises(ValueError, match=r"projected: expected shape \(B, Tk, "):
            module(query, key, projected=projected)
