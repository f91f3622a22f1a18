"""General attention under PyTorch's transforms: compile, export, autograd of any order, torch.func; its module."""

import dataclasses
import shutil

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from _compare import assert_close, evaluate, in_double, largest, projection
from _concat import ALL, IMPLS, compare
from _general import Case, operator

from fused_attn import GeneralAttention, general_attention

FULL = Case(
    queries=4, keys=6, attn_dim=3, value_dim=2, heads=2, mask="pairs", score_bias="bhqk", window=(2, None),
    weight="heads", activation="tanh",
)  # fmt: skip
# By PyTorch's attention on a CPU under "auto", and the keys are the values.
SHARED = Case(queries=4, keys=6, attn_dim=3, own_value=False, mask="pairs", weight="matrix", return_weights=False)
# By PyTorch's attention too, of heads as a projection leaves them: behind the rows.
CAUSAL = Case(attn_dim=8, value_dim=8, heads=2, window=(None, 0), layout="transposed", return_weights=False)
FORMS = {
    "padded": FULL,
    "shared": SHARED,
    "dropout": Case(queries=4, keys=6, attn_dim=3, value_dim=2, dropout_p=0.5),
    "ragged": Case(queries=9, keys=8, attn_dim=3, value_dim=2, ragged=True, window=(None, 2)),
}
SMALL = Case(queries=3, keys=5, attn_dim=3, value_dim=3, weight="matrix", query_dim=2)
each_impl = pytest.mark.parametrize("impl", ALL)
each_form = pytest.mark.parametrize("case", FORMS.values(), ids=FORMS.keys())


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def attend(t, *, impl, **options):
    return general_attention(t["query"], t["key"], t["value"], t["weight"], impl=impl, **options)


# --- The raw operators -------------------------------------------------------------------------------------------


def raw_arguments(case, device, *, sdpa, need_scores):
    """Arguments of `torch.ops.fused_attn.general_fwd`, in its canonical form, and of its backward."""
    t = dataclasses.replace(case, weight="none").tensors(device)
    rows = [t.get(name) for name in ("query", "key", "value")]
    rows = [x if x is None or case.heads else x.unsqueeze(1) for x in rows]
    if case.ragged:
        rows = [x.transpose(0, 1)[None] for x in rows]
    seed = torch.tensor([5], device=device) if case.dropout_p else None
    inputs = (*rows, *map(t.get, ("score_bias", "mask", "cu_seqlens_q", "cu_seqlens_k")), seed)
    options = (case.activation, case.scale, *(case.window or (None, None)), case.dropout_p)
    out, lse, scores = torch.ops.fused_attn.general_fwd(*inputs, *options, need_scores, sdpa)
    cotangents = (projection(out, 0), projection(lse, 1), projection(scores, 2) if need_scores else None)
    needs = [x is not None for x in inputs[:4]]
    backward = (*cotangents, *inputs, out, lse, *options, need_scores, sdpa, needs)
    return (*inputs, *options, need_scores, sdpa), backward


@pytest.mark.kernel
@pytest.mark.parametrize(
    "case", [*FORMS.values(), dataclasses.replace(FULL, dtype=torch.bfloat16)], ids=[*FORMS, "bfloat16"]
)
def test_raw_operators_pass_opcheck(case, device):
    forward, backward = raw_arguments(case, device, sdpa=False, need_scores=not case.ragged)
    torch.library.opcheck(torch.ops.fused_attn.general_fwd, forward)
    torch.library.opcheck(torch.ops.fused_attn.general_bwd, backward)
    torch.library.opcheck(torch.ops.fused_attn.general_bwd, (*backward[:-1], [False] * 4))
    dout, _, _, *rest = backward
    torch.library.opcheck(torch.ops.fused_attn.general_bwd, (dout, None, None, *rest))


@pytest.mark.parametrize("case", [SHARED, CAUSAL], ids=["shared", "causal"])
def test_raw_forward_that_calls_pytorch_passes_opcheck(case, device):
    """Not the backward: opcheck's modes have no access to the tensors inside its torch.func.vjp."""
    forward, _ = raw_arguments(case, device, sdpa=True, need_scores=False)
    torch.library.opcheck(torch.ops.fused_attn.general_fwd, forward)


# --- torch.compile and torch.export ------------------------------------------------------------------------------


@each_form
@each_impl
def test_compiles_as_one_graph_forward_and_backward(impl, case, device):
    tensors = case.tensors(device)
    compiled = torch.compile(case.op, backend="aot_eager", fullgraph=True)
    assert_close(evaluate(compiled, tensors, impl), evaluate(case.op, tensors, impl))


@pytest.mark.parametrize("case", [FULL, SHARED], ids=["full", "shared"])
@each_impl
def test_compiles_as_one_graph_without_gradients(impl, case, device):
    tensors = case.tensors(device)
    compiled = torch.compile(case.op, backend="aot_eager", fullgraph=True)
    assert_close(evaluate(compiled, tensors, impl, wrt=[]), evaluate(case.op, tensors, impl, wrt=[]))


@pytest.mark.parametrize("case", [FULL, SHARED], ids=["full", "shared"])
@each_impl
def test_one_dynamic_graph_serves_all_sizes(impl, case, device):
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.op, backend=graphs, fullgraph=True, dynamic=True)
    counts = []
    for batch, queries, keys in ((5, 4, 6), (3, 18, 7), (4, 7, 33)):  # first, no size that another axis has too
        sized = dataclasses.replace(case, batch=batch, queries=queries, keys=keys)
        tensors = sized.tensors(device)
        assert_close(evaluate(compiled, tensors, impl), evaluate(sized.op, tensors, impl))
        counts.append(graphs.frame_count)
    assert counts[1:] == counts[:-1]


@pytest.mark.parametrize("case", [SHARED, CAUSAL], ids=["shared", "causal"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_inductor_compiles_what_is_not_the_kernel(impl, case, device):
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("on a CPU, Inductor needs a C++ compiler")
    tensors = case.tensors(device)
    compiled = torch.compile(case.op, fullgraph=True)
    assert_close(evaluate(compiled, tensors, impl), evaluate(case.op, tensors, impl))


@pytest.mark.parametrize("window", [None, (None, 0)], ids=["all", "causal"])
@each_impl
def test_exports_with_dynamic_batch_and_lengths(impl, window, device):
    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = GeneralAttention(3, 5, num_heads=2)

        def forward(self, query, key, mask):
            return self.attention(query, key, mask=mask, window=window, impl=impl)

    torch.manual_seed(0)
    module = Decoder().to(device).eval()

    def inputs(batch, queries, keys):
        query, key = torch.randn(batch, queries, 3, device=device), torch.randn(batch, keys, 5, device=device)
        return query, key, torch.rand(batch, keys, device=device) < 0.8

    batch, queries, keys = (torch.export.Dim(name) for name in ("batch", "queries", "keys"))
    shapes = [{0: batch, 1: queries}, {0: batch, 1: keys}, {0: batch, 1: keys}]
    program = torch.export.export(module, inputs(3, 4, 9), dynamic_shapes=shapes).module()
    for sizes in ((3, 4, 9), (2, 17, 5), (4, 6, 6)):
        given = inputs(*sizes)
        torch.testing.assert_close(program(*given), module(*given))


# --- Derivatives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("case", [
    Case(queries=3, keys=4, attn_dim=2, value_dim=2, mask="pairs", score_bias="q1", weight="matrix", query_dim=3),
    Case(batch=1, queries=3, keys=4, attn_dim=2, value_dim=1, heads=2, window=(1, 1), activation="tanh"),
    Case(batch=1, queries=3, keys=4, attn_dim=2, own_value=False, mask="pairs", return_weights=False),
    Case(batch=1, queries=3, keys=4, attn_dim=2, value_dim=2, heads=2, weight="heads", query_dim=2,
         window=(None, 0), return_weights=False),
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


@each_form
@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivatives_are_those_of_the_reference(impl, case, device):
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
    compare(jacobian_product, tensors, impl, wrt=["query", "key", "weight", "direction"])


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
@pytest.mark.parametrize("return_weights", [True, False])
@pytest.mark.parametrize("name", ["query", "key", "value", "weight"])
def test_vmap_over_one_input_is_a_loop(name, return_weights, impl, device):
    t = SMALL.tensors(device)
    many = torch.randn(3, *t[name].shape, device=device)

    def one(x):
        out = attend(t | {name: x}, return_weights=return_weights, impl=impl)
        return out if return_weights else (out,)

    for got, want in zip(torch.vmap(one)(many), zip(*map(one, many), strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))


@each_impl
def test_vmap_over_nothing_gives_nothing(impl, device):
    t = SMALL.tensors(device)
    got = torch.vmap(lambda query: attend(t | {"query": query}, impl=impl))(t["query"].new_zeros(0, 2, 3, 2))
    assert got.shape == (0, 2, 3, 3)


@each_impl
def test_vmap_over_parameters_is_an_ensemble(impl, device):
    modules = [GeneralAttention(3, 5, num_heads=2).to(device) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    query, key = torch.randn(2, 4, 3, device=device), torch.randn(2, 6, 5, device=device)

    def one(parameters):
        return torch.func.functional_call(modules[0], (parameters, buffers), (query, key), {"impl": impl})

    torch.testing.assert_close(torch.vmap(one)(parameters), torch.stack([m(query, key, impl=impl) for m in modules]))


@each_impl
def test_per_sample_gradients_are_those_of_each_sample(impl, device):
    module = GeneralAttention(3, 5).to(device)
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
    t = dataclasses.replace(SMALL, batch=1, queries=2).tensors(device)

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
@pytest.mark.parametrize("case", [FULL, SHARED], ids=["full", "shared"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_and_returns_float32_gradients(dtype, case, impl, device):
    tensors = case.tensors(device)

    def autocast(*, impl, **leaves):
        with torch.autocast(device.type, dtype):
            return case.op(impl=impl, **leaves)

    def by_hand(*, impl, **leaves):
        cast = {n: x.to(dtype) if n in ("query", "key", "value", "weight") else x for n, x in leaves.items()}
        return case.op(impl=impl, **cast)

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
    assert "query_dim=3, key_dim=5, num_heads=2, scale=0.5, activation='relu', dropout=0.25" in shown
