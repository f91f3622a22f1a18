"""Graph attention under PyTorch's transforms: compile, autograd of any order, torch.func, autocast; its module."""

import dataclasses

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from _compare import (
    IMPLS,
    assert_close,
    assert_matches_reference,
    evaluate,
    in_double,
    largest,
    projection,
)
from _graph import TENSORS, Case

from fused_attn import GraphAttention, csr_from_edges, graph_attention, transpose_csr

FULL = Case(edges=6, attn_dim=3, value_dim=2, static=True)
FORMS = {
    "full": FULL,
    "plain": Case(edges=6, attn_dim=3, value_dim=None, heads=None, edge=False, return_weights=False),
    "dropout": Case(edges=6, attn_dim=3, value_dim=2, dropout_p=0.5),
}
each_impl = pytest.mark.parametrize("impl", IMPLS)
each_form = pytest.mark.parametrize("case", FORMS.values(), ids=FORMS.keys())


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


# --- The raw operators -------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("case", [*FORMS.values(), dataclasses.replace(FULL, dtype=torch.bfloat16)], ids=str)
def test_raw_operators_pass_opcheck(case, device):
    t = case.tensors(device)
    rows = [x if x is None or case.heads else x.unsqueeze(-2) for x in map(t.get, TENSORS)]
    seed = torch.tensor([5], device=device) if case.dropout_p else None
    structure = map(t.get, ("indptr", "indices", "indptr_t", "indices_t", "perm"))
    forward = (*rows, *structure, seed, case.activation, case.dropout_p)
    out, lse, scores = torch.ops.fused_attn.graph_fwd(*forward)
    cotangents = (projection(out, 0), projection(lse, 1), projection(scores, 2))
    needs = [x is not None for x in rows]
    backward = (*forward[:11], out, lse, scores, *forward[11:])
    torch.library.opcheck(torch.ops.fused_attn.graph_fwd, forward)
    torch.library.opcheck(torch.ops.fused_attn.graph_bwd, (*cotangents, *backward, needs))
    torch.library.opcheck(torch.ops.fused_attn.graph_bwd, (cotangents[0], None, None, *backward, [False] * 5))


@pytest.mark.kernel
def test_raw_backward_without_edges_passes_opcheck_in_any_layout(device):
    query = torch.randn(3, 5, 4, device=device).transpose(0, 1)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    forward = (query, query, torch.randn(3, 4, device=device), None, None, none.new_zeros(6), none, None, None, None)
    out, lse, scores = torch.ops.fused_attn.graph_fwd(*forward, None, "tanh", 0.0)
    backward = (out, lse, scores, *forward, None, out, lse, scores, "tanh", 0.0, [True, True, True, False, False])
    torch.library.opcheck(torch.ops.fused_attn.graph_bwd, backward)


# --- torch.compile -----------------------------------------------------------------------------------------------


@each_form
@each_impl
def test_compiles_as_one_graph_forward_and_backward(impl, case, device):
    tensors = case.tensors(device)
    compiled = torch.compile(case.op, backend="aot_eager", fullgraph=True)
    assert_close(evaluate(compiled, tensors, impl), evaluate(case.op, tensors, impl))


@each_impl
def test_one_dynamic_graph_serves_all_sizes(impl, device):
    case = FORMS["dropout"]
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.op, backend=graphs, fullgraph=True, dynamic=True)
    counts = []
    for queries, keys, edges in ((4, 7, 9), (6, 3, 11), (3, 8, 12)):  # first, no size that another axis has too
        sized = dataclasses.replace(case, queries=queries, keys=keys, edges=edges)
        tensors = sized.tensors(device)
        assert_close(evaluate(compiled, tensors, impl), evaluate(sized.op, tensors, impl))
        counts.append(graphs.frame_count)
    assert counts[1:] == counts[:-1]


def test_structures_compile_as_one_graph(device):
    index = torch.tensor([[3, 1, 0, 3], [1, 1, 0, 2]], device=device)

    def build(index):
        indptr, indices, perm = csr_from_edges(index, 3)
        return indptr, indices, perm, *transpose_csr(indptr, indices, 4)

    compiled = torch.compile(build, backend="aot_eager", fullgraph=True)
    for x, y in zip(compiled(index), build(index), strict=True):
        assert torch.equal(x, y)


# --- Derivatives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [
    Case(queries=3, edges=5, attn_dim=2, value_dim=2, activation="tanh"),
    Case(queries=3, edges=5, attn_dim=2, value_dim=None, heads=None, edge=False),
], ids=str)  # fmt: skip
def test_gradcheck_and_gradgradcheck_pass(case, device):
    tensors = in_double(case.tensors(device))
    live = {name: x.requires_grad_() for name, x in tensors.items() if x.is_floating_point()}
    fixed = {name: x for name, x in tensors.items() if name not in live}

    def fn(*xs):
        return case.op(impl="auto", **dict(zip(live, xs, strict=True)), **fixed)

    torch.autograd.gradcheck(fn, tuple(live.values()))
    torch.autograd.gradgradcheck(fn, tuple(live.values()))


@pytest.mark.kernel
@each_form
def test_second_derivatives_are_those_of_the_reference(case, device):
    tensors = case.tensors(device)
    names = [name for name, x in tensors.items() if x.is_floating_point()]

    def first_derivatives(*, impl, **leaves):
        results = case.op(impl=impl, **leaves)
        results = results if isinstance(results, tuple) else (results,)
        grads = torch.autograd.grad(
            results, [leaves[name] for name in names], [projection(x, i) for i, x in enumerate(results)],
            create_graph=True,
        )  # fmt: skip
        return torch.cat([g.flatten() for g in grads])

    assert_matches_reference(first_derivatives, tensors)


@pytest.mark.kernel
def test_second_derivatives_reach_the_gradient_of_the_output(device):
    """Not only the inputs: what flows back into the output is an input of the first backward."""

    def jacobian_product(*, impl, direction, **leaves):
        out, _ = FULL.op(impl=impl, **leaves)
        return torch.autograd.grad(out, leaves["key"], direction, create_graph=True)[0]

    tensors = FULL.tensors(device)
    tensors["direction"] = projection(FULL.op(impl="reference", **tensors)[0], 7)
    assert_matches_reference(jacobian_product, tensors, wrt=["query", "key", "v", "direction"])


@each_form
@each_impl
def test_func_grad_is_the_gradient(impl, case, device):
    tensors = case.tensors(device)
    names = [name for name, x in tensors.items() if x.is_floating_point()]

    def loss(live):
        torch.manual_seed(0)
        results = case.op(impl=impl, **{**tensors, **live})
        results = results if isinstance(results, tuple) else (results,)
        return sum((x * projection(x, i)).sum() for i, x in enumerate(results))

    got = torch.func.grad(loss)({name: tensors[name] for name in names})
    want = evaluate(case.op, tensors, impl).gradients
    for name in names:
        torch.testing.assert_close(got[name], want[name], msg=lambda text, name=name: f"{name}: {text}")


@each_impl
@pytest.mark.parametrize("name", TENSORS)
def test_vmap_over_one_input_is_a_loop(name, impl, device):
    t = FULL.tensors(device)
    many = torch.randn(2, *t[name].shape, device=device)

    def one(x):
        return FULL.op(impl=impl, **t | {name: x})

    for got, want in zip(torch.vmap(one)(many), zip(*map(one, many), strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))


@each_impl
def test_per_sample_gradients_are_those_of_each_sample(impl, device):
    """A batch of node features on one graph."""
    module = GraphAttention(3, 2, num_heads=2).to(device)
    parameters = {name: x.detach() for name, x in module.named_parameters()}
    samples = torch.randn(3, 4, 3, device=device)
    indptr, indices, _ = csr_from_edges(torch.tensor([[0, 1, 3, 3], [1, 1, 2, 0]], device=device), 4)

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x, indptr, indices), {"impl": impl}).square().sum()

    got = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, samples)
    for i, x in enumerate(samples):
        for name, want in torch.func.grad(loss)(parameters, x).items():
            torch.testing.assert_close(got[name][i], want, msg=lambda text, name=name: f"{name}: {text}")


@each_impl
def test_checkpointing_changes_nothing(impl, device):
    tensors = FULL.tensors(device)

    def checkpointed(*, impl, **leaves):
        return torch.utils.checkpoint.checkpoint(FULL.op, impl=impl, **leaves, use_reentrant=False)

    assert_close(evaluate(checkpointed, tensors, impl), evaluate(FULL.op, tensors, impl))


# --- Autocast ----------------------------------------------------------------------------------------------------


@each_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_and_returns_float32_gradients(dtype, impl, device):
    tensors = FULL.tensors(device)

    def autocast(*, impl, **leaves):
        with torch.autocast(device.type, dtype):
            return FULL.op(impl=impl, **leaves)

    def by_hand(*, impl, **leaves):
        return FULL.op(impl=impl, **{n: x.to(dtype) if n in TENSORS else x for n, x in leaves.items()})

    got, want = evaluate(autocast, tensors, impl), evaluate(by_hand, tensors, impl)
    for name, x in want.outputs.items():
        assert got.outputs[name].dtype == dtype
        assert torch.equal(got.outputs[name], x), name
    for name, x in want.gradients.items():
        assert got.gradients[name].dtype == torch.float32
        assert torch.equal(got.gradients[name], x), name
        assert largest(x) > 0, name


# --- The module --------------------------------------------------------------------------------------------------


@each_impl
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "form", [{}, {"concat": False}, {"share_weights": True}, {"key_dim": 4}, {"edge_dim": 2}], ids=str
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
        alpha = torch.softmax((torch.nn.functional.leaky_relu(z, 0.2) * module.score.weight).sum(-1), 0)
        want[i] = (alpha[..., None] * left[source[edges]]).sum(0)
        all_weights[edges] = alpha
    want = want.flatten(1) if form.get("concat", True) else want.mean(1)
    want = want + module.bias if bias else want
    assert (module.bias is None) == (not bias) == (module.key_proj.bias is None)
    edge = None if features is None else features[perm]
    nodes = query if key is query else (query, key)
    out, weights = module(nodes, indptr, indices, edge=edge, return_weights=True, impl=impl)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(weights, all_weights[perm])
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


def test_float64_is_an_error_for_the_kernel_only(device):
    t = in_double(Case().tensors(device))
    arguments = [t[name] for name in ("query", "key", "v", "indptr", "indices")]
    with pytest.raises(ValueError, match=r"^impl: 'triton' has no float64"):
        graph_attention(*arguments, impl="triton")
    assert graph_attention(*arguments, impl="auto").dtype == torch.float64


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
