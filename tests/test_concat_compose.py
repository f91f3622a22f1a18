"""Concat attention under PyTorch's transforms: compile, export, autograd of any order, torch.func; its module."""

import dataclasses
import shutil

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from _compare import assert_close, evaluate, in_double, largest, projection
from _concat import ALL, IMPLS, Case, compare, operator
from torch import nn

from fused_attn import ConcatAttention, concat_attention

FULL = Case(queries=4, keys=6, attn_dim=3, value_dim=2, heads=2, mask="pairs", score_bias="bhqk", window=(2, None))
FORMS = {
    "padded": FULL,
    "dropout": Case(queries=4, keys=6, attn_dim=3, value_dim=2, dropout_p=0.5, activation="gelu"),
    "ragged": Case(queries=9, keys=8, attn_dim=3, value_dim=2, ragged=True, window=(None, 2)),
}
SMALL = Case(queries=3, keys=5, attn_dim=3, value_dim=2)
each_impl = pytest.mark.parametrize("impl", ALL)
each_form = pytest.mark.parametrize("case", FORMS.values(), ids=FORMS.keys())


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def attend(t, *, impl, **options):
    return concat_attention(t["query"], t["key"], t["value"], t["v"], impl=impl, **options)


# --- The raw operators -------------------------------------------------------------------------------------------


def raw_arguments(case, device, *, blocked, need_scores):
    """Arguments of `torch.ops.fused_attn.concat_fwd`, in its canonical form, and of its backward."""
    seed = torch.tensor([5], device=device) if case.dropout_p else None
    arguments = case.raw_arguments(case.tensors(device), seed)
    inputs, options = arguments[:9], arguments[9:]
    out, lse, scores = torch.ops.fused_attn.concat_fwd(*inputs, *options, need_scores, blocked)
    cotangents = (projection(out, 0), projection(lse, 1), projection(scores, 2) if need_scores else None)
    needs = [x is not None for x in inputs[:5]]
    return (*inputs, *options, need_scores, blocked), (*cotangents, *inputs, out, lse, *options, blocked, needs)


@pytest.mark.parametrize("blocked", [pytest.param(False, marks=pytest.mark.kernel), True], ids=["kernel", "blocked"])
@pytest.mark.parametrize(
    "case", [*FORMS.values(), dataclasses.replace(FULL, dtype=torch.bfloat16)], ids=[*FORMS, "bfloat16"]
)
def test_raw_operators_pass_opcheck(case, blocked, device):
    forward, backward = raw_arguments(case, device, blocked=blocked, need_scores=not case.ragged)
    torch.library.opcheck(torch.ops.fused_attn.concat_fwd, forward)
    torch.library.opcheck(torch.ops.fused_attn.concat_bwd, backward)
    no_gradients = [False] * 5
    torch.library.opcheck(torch.ops.fused_attn.concat_bwd, (*backward[:-1], no_gradients))
    dout, _, _, *rest = backward
    torch.library.opcheck(torch.ops.fused_attn.concat_bwd, (dout, None, None, *rest))
    forward, _ = raw_arguments(case, device, blocked=blocked, need_scores=False)
    torch.library.opcheck(torch.ops.fused_attn.concat_fwd, forward)


# --- torch.compile and torch.export ------------------------------------------------------------------------------


@each_form
@each_impl
def test_compiles_as_one_graph_forward_and_backward(impl, case, device):
    tensors = case.tensors(device)
    compiled = torch.compile(case.op, backend="aot_eager", fullgraph=True)
    assert_close(evaluate(compiled, tensors, impl), evaluate(case.op, tensors, impl))


@each_impl
def test_compiles_as_one_graph_without_gradients(impl, device):
    tensors = FULL.tensors(device)
    compiled = torch.compile(FULL.op, backend="aot_eager", fullgraph=True)
    assert_close(evaluate(compiled, tensors, impl, wrt=[]), evaluate(FULL.op, tensors, impl, wrt=[]))


@each_impl
def test_one_dynamic_graph_serves_all_sizes(impl, device):
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(FULL.op, backend=graphs, fullgraph=True, dynamic=True)
    counts = []
    for batch, queries, keys in ((5, 4, 6), (3, 18, 7), (4, 7, 33)):  # first, no size that another axis has too
        case = dataclasses.replace(FULL, batch=batch, queries=queries, keys=keys)
        tensors = case.tensors(device)
        assert_close(evaluate(compiled, tensors, impl), evaluate(case.op, tensors, impl))
        counts.append(graphs.frame_count)
    assert counts[1:] == counts[:-1]


def test_inductor_compiles_the_reference(device):
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("on a CPU, Inductor needs a C++ compiler")
    tensors = FULL.tensors(device)
    compiled = torch.compile(FULL.op, fullgraph=True)
    assert_close(evaluate(compiled, tensors, "reference"), evaluate(FULL.op, tensors, "reference"))


class Decoder(nn.Module):
    def __init__(self, impl):
        super().__init__()
        self.impl, self.attention = impl, ConcatAttention(3, 5, 4, num_heads=2, context_dims=(2,))

    def forward(self, query, key, context, mask):
        return self.attention(query, key, contexts=[context], mask=mask, return_weights=True, impl=self.impl)


@each_impl
def test_exports_with_dynamic_batch_and_lengths(impl, device):
    torch.manual_seed(0)
    module = Decoder(impl).to(device).eval()

    def inputs(batch, queries, keys):
        query, key = torch.randn(batch, queries, 3, device=device), torch.randn(batch, keys, 5, device=device)
        return query, key, torch.randn(batch, 2, device=device), torch.rand(batch, keys, device=device) < 0.8

    batch, queries, keys = (torch.export.Dim(name) for name in ("batch", "queries", "keys"))
    shapes = [{0: batch, 1: queries}, {0: batch, 1: keys}, {0: batch}, {0: batch, 1: keys}]
    program = torch.export.export(module, inputs(3, 4, 9), dynamic_shapes=shapes).module()
    for sizes in ((3, 4, 9), (2, 17, 5), (4, 6, 6)):
        given = inputs(*sizes)
        for got, want in zip(program(*given), module(*given), strict=True):
            torch.testing.assert_close(got, want)


# --- Derivatives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("case", [
    Case(queries=3, keys=4, attn_dim=2, value_dim=2, mask="pairs", score_bias="q1"),
    Case(batch=1, queries=3, keys=4, attn_dim=2, value_dim=1, heads=2, window=(1, 1), activation="sigmoid"),
    Case(batch=1, queries=3, keys=4, attn_dim=2, value_dim=1, activation="gelu"),
    Case(batch=1, queries=3, keys=4, attn_dim=2, value_dim=1, activation="identity"),
    Case(queries=4, keys=5, attn_dim=2, value_dim=1, ragged=True),
], ids=str)  # fmt: skip
def test_gradcheck_and_gradgradcheck_pass(case, impl, device):
    tensors = in_double(case.tensors(device))
    live = {name: x.requires_grad_() for name, x in tensors.items() if x.is_floating_point()}
    fixed = {name: x for name, x in tensors.items() if name not in live}

    def fn(*xs):
        return case.op(impl=impl, **dict(zip(live, xs, strict=True)), **fixed)

    torch.autograd.gradcheck(fn, tuple(live.values()))
    torch.autograd.gradgradcheck(fn, tuple(live.values()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "case", [*FORMS.values(), dataclasses.replace(SMALL, activation="identity")], ids=[*FORMS, "identity"]
)
def test_second_derivatives_are_those_of_the_reference(case, impl, device):
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

    compare(first_derivatives, tensors, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivatives_reach_the_gradient_of_the_output(impl, device):
    """Not only the inputs: what flows back into the output is an input of the first backward."""

    def jacobian_product(*, impl, direction, **leaves):
        out = operator()(impl=impl, **leaves)
        return torch.autograd.grad(out, leaves["query"], direction, create_graph=True)[0]

    tensors = SMALL.tensors(device)
    tensors["direction"] = projection(operator()(impl="reference", **tensors), 7)
    compare(jacobian_product, tensors, impl, wrt=["query", "key", "v", "direction"])


@each_impl
def test_func_grad_is_the_gradient(impl, device):
    tensors = FULL.tensors(device)
    names = [name for name, x in tensors.items() if x.is_floating_point()]

    def loss(live):
        results = FULL.op(impl=impl, **{**tensors, **live})
        return sum((x * projection(x, i)).sum() for i, x in enumerate(results))

    got = torch.func.grad(loss)({name: tensors[name] for name in names})
    want = evaluate(FULL.op, tensors, impl).gradients
    for name in names:
        torch.testing.assert_close(got[name], want[name], msg=lambda text, name=name: f"{name}: {text}")


@each_impl
@pytest.mark.parametrize("name", ["query", "key", "value", "v"])
def test_vmap_over_one_input_is_a_loop(name, impl, device):
    t = SMALL.tensors(device)
    many = torch.randn(3, *t[name].shape, device=device)

    def one(x):
        return attend(t | {name: x}, return_weights=True, impl=impl)

    for got, want in zip(torch.vmap(one)(many), zip(*map(one, many), strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))


@each_impl
def test_vmap_over_nothing_gives_nothing(impl, device):
    t = SMALL.tensors(device)
    got = torch.vmap(lambda query: attend(t | {"query": query}, impl=impl))(t["query"].new_zeros(0, 2, 3, 3))
    assert got.shape == (0, 2, 3, 2)


@each_impl
def test_vmap_over_parameters_is_an_ensemble(impl, device):
    modules = [ConcatAttention(3, 5, 4, num_heads=2).to(device) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    query, key = torch.randn(2, 4, 3, device=device), torch.randn(2, 6, 5, device=device)

    def one(parameters):
        return torch.func.functional_call(modules[0], (parameters, buffers), (query, key), {"impl": impl})

    torch.testing.assert_close(torch.vmap(one)(parameters), torch.stack([m(query, key, impl=impl) for m in modules]))


@each_impl
def test_per_sample_gradients_are_those_of_each_sample(impl, device):
    module = ConcatAttention(3, 5, 4).to(device)
    parameters = {name: x.detach() for name, x in module.named_parameters()}
    queries, keys = torch.randn(3, 4, 3, device=device), torch.randn(3, 6, 5, device=device)

    def loss(parameters, query, key):
        out = torch.func.functional_call(module, parameters, (query[None], key[None]), {"impl": impl})
        return out.square().sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, queries, keys)
    for i in range(3):
        for name, x in torch.func.grad(loss)(parameters, queries[i], keys[i]).items():
            torch.testing.assert_close(got[name][i], x, msg=lambda text, name=name: f"{name}: {text}")


@each_impl
def test_jacrev_is_the_jacobian(impl, device):
    t = dataclasses.replace(SMALL, batch=1, queries=2, value_dim=1).tensors(device)

    def one(key):
        return attend(t | {"key": key}, impl=impl)

    torch.testing.assert_close(torch.func.jacrev(one)(t["key"]), torch.autograd.functional.jacobian(one, t["key"]))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_forward_mode_works_in_the_reference_which_auto_takes_there(impl, device):
    t = in_double(SMALL.tensors(device))

    def one(query):
        return attend(t | {"query": query}, impl=impl)

    direction = projection(t["query"], 0)
    _, got = torch.func.jvp(one, (t["query"],), (direction,))
    torch.testing.assert_close(got, torch.einsum("bqvijk,ijk->bqv", torch.func.jacrev(one)(t["query"]), direction))


@pytest.mark.kernel
def test_forward_mode_of_the_kernel_raises_a_clear_error(device):
    t = SMALL.tensors(device)
    query, ones = (t["query"],), (torch.ones_like(t["query"]),)
    with pytest.raises(NotImplementedError, match=r"^impl: 'triton' has no forward mode"):
        torch.func.jvp(lambda x: attend(t | {"query": x}, impl="triton"), query, ones)


@each_form
@each_impl
def test_checkpointing_changes_nothing(impl, case, device):
    tensors = case.tensors(device)

    def checkpointed(*, impl, **leaves):
        return torch.utils.checkpoint.checkpoint(case.op, impl=impl, **leaves, use_reentrant=False)

    assert_close(evaluate(checkpointed, tensors, impl), evaluate(case.op, tensors, impl))


# --- Autocast ----------------------------------------------------------------------------------------------------


@each_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_and_returns_float32_gradients(dtype, impl, device):
    case = dataclasses.replace(FULL, activation="sigmoid")
    tensors = case.tensors(device)

    def autocast(*, impl, **leaves):
        with torch.autocast(device.type, dtype):
            return case.op(impl=impl, **leaves)

    def by_hand(*, impl, score_bias, mask, **leaves):
        cast = {name: x.to(dtype) for name, x in leaves.items()}
        return case.op(impl=impl, score_bias=score_bias, mask=mask, **cast)

    got, want = evaluate(autocast, tensors, impl), evaluate(by_hand, tensors, impl)
    for name, x in want.outputs.items():
        assert got.outputs[name].dtype == dtype
        assert torch.equal(got.outputs[name], x), name
    for name, x in want.gradients.items():
        assert got.gradients[name].dtype == torch.float32
        assert torch.equal(got.gradients[name], x), name
        assert largest(x) > 0, name


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_autocast_leaves_float64_alone(impl, device):
    with torch.autocast(device.type, torch.bfloat16):
        assert attend(in_double(SMALL.tensors(device)), impl=impl).dtype == torch.float64


# --- The module --------------------------------------------------------------------------------------------------

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
    ).to(device)  # fmt: skip
    query, key, contexts = inputs(device, keys=4 if equal else 6)
    mask, window = torch.rand(2, key.shape[1], device=device) < 0.8, (1, 2)
    score_bias = torch.randn(4, 1, device=device) * torch.randn(key.shape[1], device=device)

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
