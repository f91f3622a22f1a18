"""`GraphAttention`."""

import pytest
import torch
from _compare import IMPLS

from fused_attn import Graph, GraphAttention, csr_from_edges, graph, transpose_csr

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


# --- Self loops --------------------------------------------------------------------------------------------------

LOOPED = [[0, 1, 3, 3, 2, 1], [1, 1, 2, 0, 1, 1]]  # node 1 has two edges to itself, to node 3 there leads none
REDUCE = {
    "mean": lambda x: x.mean(0) if len(x) else x.sum(0),
    "add": lambda x: x.sum(0),
    "min": lambda x: x.amin(0) if len(x) else x.sum(0),
    "max": lambda x: x.amax(0) if len(x) else x.sum(0),
    "mul": lambda x: x.prod(0),
}


@each_impl
@pytest.mark.parametrize("fill", [*REDUCE, 0.5, torch.tensor([0.3, -2.0]), None], ids=str)
def test_self_loops_are_those_of_gatv2conv(fill, impl, device):
    """Its ``remove_self_loops``, ``add_self_loops`` and layer, node by node; without edge features where None."""
    torch.manual_seed(0)
    features = None if fill is None else torch.randn(6, 2, device=device, requires_grad=True)
    options = {} if fill is None else {"edge_dim": 2, "fill": fill}
    module = GraphAttention(3, 5, num_heads=2, self_loops=True, **options).to(device)
    x, edge_index = torch.randn(4, 3, device=device, requires_grad=True), torch.tensor(LOOPED, device=device)
    between = [0, 2, 3, 4]
    source, target = edge_index[:, between].tolist()
    left, right = module.key_proj(x).view(4, 2, 5), module.query_proj(x).view(4, 2, 5)
    want, all_weights = [], [None] * 8
    for i in range(4):
        edges = [e for e in range(4) if target[e] == i]
        near = left[[source[e] for e in edges] + [i]]
        z = near + right[i]
        if features is not None:
            rows = features[between][edges]
            loop = REDUCE[fill](rows) if isinstance(fill, str) else (torch.zeros(2) + fill).to(device)
            z = z + module.edge_proj(torch.cat([rows, loop[None]])).view(-1, 2, 5)
        alpha = torch.softmax((torch.nn.functional.leaky_relu(z, 0.2) * module.score.weight).sum(-1), 0)
        want.append((alpha[..., None] * near).sum(0))
        for e, a in zip([*edges, 4 + i], alpha, strict=True):
            all_weights[e] = a
    want = torch.stack(want).flatten(1) + module.bias
    out, weights = module(x, edge_index, edge=features, return_weights=True, impl=impl)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(weights, torch.stack(all_weights))
    leaves = [y for y in (x, features, *module.parameters()) if y is not None]
    for got, of_formula in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (out, want)), strict=True):
        torch.testing.assert_close(got, of_formula, rtol=1e-4, atol=1e-5)


def test_self_loops_of_a_list_of_edges_are_made_once_and_anew_when_that_is_written_to(monkeypatch):
    module, x = GraphAttention(3, 5, self_loops=True), torch.randn(4, 3)
    edge_index = torch.tensor(LOOPED)
    made = graph.loops_of(edge_index, 4)
    want = module(x, edge_index)
    assert graph.loops_of(edge_index, 4) is made
    assert graph._MADE[made.edge_index][1] is graph.edges_of(made.edge_index, 4, 4)
    with monkeypatch.context() as patch:
        patch.setattr(graph, "_loops", None)
        patch.setattr(Graph, "from_edges", None)
        assert torch.equal(module(x, edge_index), want)
    edge_index[1, 3] = 3
    assert graph.loops_of(edge_index, 4).edge_index.tolist() == [[0, 3, 2, 0, 1, 2, 3], [1, 2, 1, 0, 1, 2, 3]]
    assert not torch.equal(module(x, edge_index), want)
    before = len(graph._LOOPED), len(graph._MADE)
    del edge_index, made
    assert (len(graph._LOOPED), len(graph._MADE)) < before
    with torch.inference_mode():
        module(x, torch.tensor(LOOPED))


def test_edge_features_of_loops_that_are_replaced_are_not_read():
    module, edge = GraphAttention(3, 5, self_loops=True, edge_dim=2), torch.randn(6, 2)
    x, edge_index = torch.randn(4, 3), torch.tensor(LOOPED)
    want = module(x, edge_index, edge=edge)
    edge[[1, 5]] = torch.nan
    assert torch.equal(module(x, edge_index, edge=edge.requires_grad_()), want)
    module(x, edge_index, edge=edge).sum().backward()
    assert edge.grad.isfinite().all()


def test_the_module_with_self_loops_compiles_and_is_copied():
    fill = torch.tensor([0.5, 1.0], requires_grad=True)
    module = GraphAttention(3, 5, self_loops=True, edge_dim=2, fill=fill)
    assert "fill" not in module.state_dict()
    assert "self_loops=True, fill=tensor(" in repr(module)
    x, edge_index, edge = torch.randn(4, 3), torch.tensor(LOOPED), torch.randn(6, 2)
    want = module(x, edge_index, edge=edge)
    want.sum().backward()
    assert fill.grad.count_nonzero()
    torch.testing.assert_close(torch.compile(module, backend="eager")(x, edge_index, edge=edge), want)
    assert torch.equal(
        module.double()(x.double(), edge_index, edge=edge.double()).float().isfinite(), want.isfinite()
    )


NODES, EDGES = torch.randn(4, 3), torch.tensor(LOOPED)
SELF_LOOPS_REFUSE = {
    "flag": ({"self_loops": 1}, {}, TypeError, "self_loops: expected True or False"),
    "two widths": ({"key_dim": 4}, {}, ValueError, "self_loops: expected False where key_dim is not query_dim, 3"),
    "fill of nothing": ({"fill": 0.5}, {}, ValueError, "fill: expected 'mean', the default, without self_loops and"),
    "fill of no loops": ({"self_loops": False, "edge_dim": 2, "fill": 0}, {}, ValueError, "fill: expected 'mean'"),
    "fill": ({"edge_dim": 2, "fill": "median"}, {}, ValueError, "fill: expected a number, a tensor or one of"),
    "fill of no kind": ({"edge_dim": 2, "fill": [0.5]}, {}, TypeError, "fill: expected a number"),
    "fill of others": ({"edge_dim": 2, "fill": torch.ones(3)}, {}, ValueError, "fill: expected shape (edge_dim,)"),
    "two kinds": ({}, {"x": (NODES, NODES)}, ValueError, "x: expected nodes of one kind with self_loops; got a pair"),
    "a graph": ({}, {"indptr": Graph.from_edges(EDGES, 4, 4)[0]}, TypeError, "indptr: expected an edge_index (2, E)"),
    "csr": ({}, {"indices": EDGES[0]}, TypeError, "indices: expected None with self_loops; got Tensor"),
    "other nodes": (
        {},
        {"x": NODES[:3]},
        ValueError,
        "edge_index[0]: expected non-negative indices under the number",
    ),
    "other edges": (
        {"edge_dim": 2},
        {"edge": torch.ones(5, 2)},
        ValueError,
        "edge: expected shape (E, edge_dim) with E = 6 from edge_index",
    ),
    "no list": ({}, {"indptr": EDGES[0]}, ValueError, "edge_index: expected shape (2, E)"),
    "nothing": ({}, {"indptr": None}, TypeError, "edge_index: expected"),
}


@pytest.mark.parametrize(("made", "given", "error", "text"), SELF_LOOPS_REFUSE.values(), ids=SELF_LOOPS_REFUSE.keys())
def test_self_loops_refuse_what_they_cannot_take(made, given, error, text):
    with pytest.raises(error) as caught:
        GraphAttention(3, 5, **{"self_loops": True, **made})(**{"x": NODES, "indptr": EDGES, **given})
    assert str(caught.value).startswith(text)
