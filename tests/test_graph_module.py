"""`GraphAttention`."""

import pytest
import torch
from _compare import IMPLS

from fused_attn import GraphAttention, csr_from_edges, transpose_csr

each_impl = pytest.mark.parametrize("impl", IMPLS)


@each_impl
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"concat": False},
        {"share_weights": True},
        {"key_dim": 4},
        {"edge_dim": 2},
        {"residual": True},
        {"residual": True, "concat": False, "key_dim": 4},
        {"negative_slope": 0.5},
    ],
    ids=str,
)
def test_module_is_the_published_layer(form, bias, impl, device):
    """Node by node: GATv2Conv without its self loops, in the words of its documentation."""
    torch.manual_seed(0)
    module = GraphAttention(3, 5, num_heads=2, bias=bias, **form).to(device)
    if bias:
        torch.nn.init.normal_(module.bias)
    query = torch.randn(4, 3, device=device)
    key = torch.randn(6, 4, device=device) if "key_dim" in form else query
    source, target = torch.tensor([[0, 1, 3, 3, 2], [1, 1, 2, 0, 1]], device=device)
    features = torch.randn(5, 2, device=device) if "edge_dim" in form else None
    indptr, indices, perm = csr_from_edges(torch.stack([source, target]), 4)
    left, right = module.key_proj(key).view(-1, 2, 5), module.query_proj(query).view(4, 2, 5)
    want, all_weights = torch.zeros(4, 2, 5, device=device), torch.zeros(5, 2, device=device)
    for i in range(4):
        edges = (target == i).nonzero()[:, 0]
        if len(edges) == 0:
            continue
        z = left[source[edges]] + right[i]
        if features is not None:
            z = z + module.edge_proj(features[edges]).view(-1, 2, 5)
        alpha = torch.softmax(
            (torch.nn.functional.leaky_relu(z, form.get("negative_slope", 0.2)) * module.score.weight).sum(-1), 0
        )
        want[i] = (alpha[..., None] * left[source[edges]]).sum(0)
        all_weights[edges] = alpha
    want = want.flatten(1) if form.get("concat", True) else want.mean(1)
    want = want + module.bias if bias else want
    want = want + module.residual_proj(query) if "residual" in form else want
    assert (module.bias is None) == (not bias) == (module.key_proj.bias is None)
    edge = None if features is None else features[perm]
    nodes = query if key is query else (query, key)
    out, weights = module(nodes, indptr, indices, edge=edge, return_weights=True, impl=impl)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(weights, all_weights[perm])
    by_edges = module(nodes, torch.stack([source, target]), edge=features, return_weights=True, impl=impl)
    torch.testing.assert_close(by_edges, (out, all_weights))
    transposed = transpose_csr(indptr, indices, len(key))
    assert torch.equal(module(nodes, indptr, indices, edge=edge, transposed=transposed, impl=impl), out)
    out.square().sum().backward()
    for name, x in module.named_parameters():
        assert x.grad.count_nonzero() > 0, name


def test_module_dropout_is_for_training_only(device):
    module = GraphAttention(3, 2, dropout=0.5).to(device)
    x, indptr = torch.randn(4, 3, device=device), torch.tensor([0, 4, 8, 12, 16], device=device)
    indices = torch.arange(4, device=device).repeat(4)
    assert not torch.equal(module(x, indptr, indices), module(x, indptr, indices))
    module.eval()
    assert torch.equal(module(x, indptr, indices), module(x, indptr, indices))


@pytest.mark.parametrize("bias", [True, False])
def test_module_returns_the_dtype_of_autocast(bias, device):
    layer = GraphAttention(3, 5, bias=bias).to(device)
    structure = torch.tensor([0, 1, 2], device=device), torch.tensor([1, 0], device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert layer(torch.randn(2, 3, device=device), *structure).dtype == torch.bfloat16


def test_repr_shows_the_options():
    shown = repr(GraphAttention(3, 5, num_heads=2, concat=False, share_weights=True, dropout=0.25, activation="relu"))
    assert "num_heads=2, concat=False, share_weights=True, activation='relu', dropout=0.25" in shown


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
def test_functional_call_leaves_the_module_as_it_was(shared, device):
    """A module that two names share would keep the tensors of the call in place of its parameters."""
    module = GraphAttention(4, 3, share_weights=shared).to(device)
    names = ["key_proj.weight", *([] if shared else ["query_proj.weight"])]
    assert [n for n in module.state_dict() if n.endswith("proj.weight")] == names
    assert (module.query_proj is module.key_proj) == shared
    x, indptr, indices = (
        torch.randn(3, 4, device=device),
        torch.arange(4, device=device),
        torch.arange(3, device=device),
    )

    def loss(parameters):
        return torch.func.functional_call(module, parameters, (x, indptr, indices)).square().sum()

    grads = torch.func.grad(loss)(dict(module.named_parameters()))
    assert all(isinstance(p, torch.nn.Parameter) for _, p in module.named_parameters(remove_duplicate=False))
    module(x, indptr, indices).square().sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad, grads[name])
