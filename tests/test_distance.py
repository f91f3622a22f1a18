"""Distance attention: kernel and blocked path against the formula in float64, and what is peculiar to distances."""

import pytest
import torch
from _concat import ALL, IMPLS, check, pairwise
from test_concat import FACTORS, PACKED

from fused_attn import DistanceAttention, distance_attention

each_impl = pytest.mark.parametrize("impl", ALL)
each_p = pytest.mark.parametrize("p", [1, 2])
OWN = {"p": (1, 2), "activation": ("identity",)}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", [*pairwise(FACTORS | OWN), *pairwise(PACKED | OWN)], ids=str)
def test_matches_the_reference_for_every_pair_of_factors(case, impl, device):
    check(case, device, impl)


def drawn(device, p, dtype=torch.float64):
    rng = torch.Generator().manual_seed(p)
    shapes = {"query": (2, 5, 4), "key": (2, 7, 4), "value": (2, 7, 3), "v": (4,)}
    return {name: torch.randn(shape, generator=rng).to(device, dtype) for name, shape in shapes.items()}


@each_p
@each_impl
def test_scores_are_minus_the_weighted_distances(p, impl, device):
    x = drawn(device, p, torch.float32)
    out, weights = distance_attention(**x, p=p, return_weights=True, impl=impl)
    y = {name: t.double() for name, t in x.items()}
    scores = -sum(
        y["v"][a] * torch.cdist(y["query"][..., a : a + 1], y["key"][..., a : a + 1], p=1) ** p for a in range(4)
    )
    torch.testing.assert_close(weights.double(), scores.softmax(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ y["value"], rtol=1e-5, atol=1e-5)


@each_p
@each_impl
def test_without_v_every_feature_counts_alike(p, impl, device):
    x = drawn(device, p, torch.float32)
    ones = distance_attention(**x | {"v": torch.ones(4, device=device)}, p=p, impl=impl)
    assert torch.equal(distance_attention(**x | {"v": None}, p=p, impl=impl), ones)


@each_p
@each_impl
def test_equal_features_have_the_gradient_that_torch_abs_gives_at_0(p, impl, device):
    x = drawn(device, p, torch.float32)
    x["key"] = x["query"][:, [0, 1, 2, 3, 4, 0, 1]].clone()
    query, key = (x[name].requires_grad_() for name in ("query", "key"))
    out = distance_attention(**x, p=p, impl=impl)
    grads = torch.autograd.grad(out.square().sum(), (query, key))
    scores = -(x["v"] * (query[:, :, None] - key[:, None]).abs() ** p).sum(-1)
    expected = torch.autograd.grad((scores.softmax(-1) @ x["value"]).square().sum(), (query, key))
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-5)


@each_p
@each_impl
def test_rows_far_from_0_keep_what_they_differ_in(p, impl, device):
    """The product form of p = 2 has q² and k² in it: at 1,000 nothing of differences of 0.01 would be left."""
    x = drawn(device, p, torch.float32)
    step = torch.linspace(0, 0.06, 7, device=device)[None, :, None].expand(2, 7, 4)
    x |= {"query": torch.full((2, 5, 4), 1000.0, device=device), "v": torch.full((4,), 1e3, device=device)}
    x["key"] = 1000.0 + step
    out = distance_attention(**x, p=p, impl=impl)
    y = {name: t.double() for name, t in x.items()}
    scores = -(y["v"] * (y["query"][:, :, None] - y["key"][:, None]).abs() ** p).sum(-1)
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ y["value"], rtol=1e-5, atol=1e-5)


@each_p
@pytest.mark.parametrize("heads", [1, 2])
def test_module_is_the_function_of_its_projections(heads, p, device):
    torch.manual_seed(0)
    m = DistanceAttention(6, 4, 5, p=p, num_heads=heads, bias=True).to(device)
    torch.nn.init.normal_(m.log_v)
    query, key = torch.randn(2, 3, 6, device=device), torch.randn(2, 8, 4, device=device)
    out, weights = m(query, key, return_weights=True)
    q, k = (
        x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (m.query_proj(query), m.key_proj(key))
    )  # (2, heads, T, 5)
    scores = -(m.log_v.exp()[:, None, None] * (q[..., :, None, :] - k[..., None, :, :]).abs() ** p).sum(-1)
    expected = scores.softmax(-1)
    torch.testing.assert_close(weights if heads > 1 else weights[:, None], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out if heads > 1 else out[:, None], expected @ key[:, None], rtol=1e-4, atol=1e-5)
    packed = m(query[0], key[0], cu_seqlens_q=torch.tensor([0, 3], dtype=torch.int32, device=device),
               cu_seqlens_k=torch.tensor([0, 8], dtype=torch.int32, device=device))  # fmt: skip
    torch.testing.assert_close(packed if heads == 1 else packed.transpose(0, 1), out[0], rtol=1e-4, atol=1e-5)
    before = {name: x.clone() for name, x in m.state_dict().items()}
    m.reset_parameters()
    assert not any(torch.equal(x, before[name]) for name, x in m.state_dict().items())
