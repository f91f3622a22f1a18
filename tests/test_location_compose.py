"""Location attention under PyTorch's transforms: compile, export, autograd of any order, torch.func, autocast."""

import dataclasses
import shutil

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from _compare import IMPLS, assert_close, assert_matches_reference, evaluate, in_double, largest, projection
from _location import Case, operator
from torch import nn

from fused_attn import LocationAttention, location_attention

FULL = Case(
    batch=2, rows=9, dim=5, attn_dim=4, hops=2, score="gated_hops", context="row", values=3, score_bias=True,
    mask="random",
)  # fmt: skip
FORMS = {
    "padded": FULL,
    "dropout": Case(batch=2, rows=9, dim=5, dropout_p=0.5),
    "ragged": Case(rows=9, dim=5, score="mlp_hops", context="sequence", ragged=True),
}
each_impl = pytest.mark.parametrize("impl", IMPLS)
each_form = pytest.mark.parametrize("case", FORMS.values(), ids=FORMS.keys())


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


# --- The raw operators -------------------------------------------------------------------------------------------


def raw_arguments(case, device):
    """Arguments of `torch.ops.fused_attn.location_fwd`, in its canonical form, and of its backward."""
    t = case.tensors(device)
    context = t.get("context")
    if context is not None:
        context = context.flatten(0, 1) if case.ragged else context
    seed = torch.tensor([5], device=device) if case.dropout_p else None
    v = t.get("v") if "v" not in t or t["v"].dim() == 2 else t["v"][:, None]
    options = (case.activation, case.gate_activation, case.dropout_p, case.context == "row")
    inputs = (
        t["h"], t["w"], t["b"], v, t.get("gate_w"), t.get("gate_b"), context, t.get("values"), t.get("score_bias"),
        t.get("mask"), t.get("cu_seqlens"), seed,
    )  # fmt: skip
    results = torch.ops.fused_attn.location_fwd(*inputs, *options)
    cotangents = [projection(x, i) for i, x in enumerate(results)]
    needs = [x is not None for x in inputs[:9]]
    return (*inputs, *options), (*cotangents, *inputs, *results, *options, needs)


@pytest.mark.kernel
@pytest.mark.parametrize(
    "case", [*FORMS.values(), dataclasses.replace(FULL, dtype=torch.bfloat16)], ids=[*FORMS, "bfloat16"]
)
def test_raw_operators_pass_opcheck(case, device):
    forward, backward = raw_arguments(case, device)
    torch.library.opcheck(torch.ops.fused_attn.location_fwd, forward)
    torch.library.opcheck(torch.ops.fused_attn.location_bwd, backward)
    no_gradients = [False] * 9
    torch.library.opcheck(torch.ops.fused_attn.location_bwd, (*backward[:-1], no_gradients))
    dout, _, _, *rest = backward
    torch.library.opcheck(torch.ops.fused_attn.location_bwd, (dout, None, None, *rest))


# --- torch.compile and torch.export ------------------------------------------------------------------------------


@each_form
@each_impl
def test_compiles_as_one_graph_forward_and_backward(impl, case, device):
    tensors = case.tensors(device)
    compiled = torch.compile(case.op, backend="aot_eager", fullgraph=True)
    assert_close(evaluate(compiled, tensors, impl), evaluate(case.op, tensors, impl))


@each_form
@each_impl
def test_compiles_as_one_graph_without_gradients(impl, case, device):
    tensors = case.tensors(device)
    compiled = torch.compile(case.op, backend="aot_eager", fullgraph=True)
    assert_close(evaluate(compiled, tensors, impl, wrt=[]), evaluate(case.op, tensors, impl, wrt=[]))


@each_impl
def test_compiles_as_one_graph_on_jagged_tensors(impl, device):
    case = Case(rows=9, dim=5, ragged=True)
    tensors = case.tensors(device)
    compiled = torch.compile(location_attention, backend="aot_eager", fullgraph=True)

    def op(*, impl, h, cu_seqlens, **parameters):
        jagged = torch.nested.nested_tensor_from_jagged(h, cu_seqlens.long())
        return compiled(jagged, **parameters, impl=impl)

    assert_close(evaluate(op, tensors, impl), evaluate(operator(return_weights=False), tensors, impl))


@each_impl
def test_one_dynamic_graph_serves_all_sizes(impl, device):
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    op = operator()
    compiled = torch.compile(op, backend=graphs, fullgraph=True, dynamic=True)
    counts = []
    for batch, rows in ((2, 9), (3, 40), (4, 21)):
        tensors = Case(batch=batch, rows=rows, dim=5, mask="random").tensors(device)
        assert_close(evaluate(compiled, tensors, impl), evaluate(op, tensors, impl))
        counts.append(graphs.frame_count)
    assert counts[1:] == counts[:-1]


@pytest.mark.parametrize("case", [FORMS["padded"], FORMS["ragged"]], ids=["padded", "ragged"])
def test_inductor_compiles_the_reference(case, device):
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("on a CPU, Inductor needs a C++ compiler")
    tensors = case.tensors(device)
    compiled = torch.compile(case.op, fullgraph=True)
    assert_close(evaluate(compiled, tensors, "reference"), evaluate(case.op, tensors, "reference"))


class Pool(nn.Module):
    def __init__(self, impl):
        super().__init__()
        self.impl, self.attention = impl, LocationAttention(5, 4, hops=2, gated=True)

    def forward(self, h, mask):
        return self.attention(h, mask=mask, return_weights=True, impl=self.impl)


@each_impl
def test_exports_with_dynamic_batch_and_time(impl, device):
    torch.manual_seed(0)
    module = Pool(impl).to(device).eval()

    def inputs(batch, rows):
        return torch.randn(batch, rows, 5, device=device), torch.rand(batch, rows, device=device) < 0.8

    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    program = torch.export.export(module, inputs(3, 9), dynamic_shapes=[{0: batch, 1: time}] * 2).module()
    for sizes in ((3, 9), (2, 40), (7, 5)):
        h, mask = inputs(*sizes)
        for got, want in zip(program(h, mask), module(h, mask), strict=True):
            torch.testing.assert_close(got, want)


# --- Derivatives -------------------------------------------------------------------------------------------------


def small_double(device):
    """A call with few numbers, in float64: the names and tensors that have gradients, and the others."""
    case = Case(
        batch=2, rows=3, dim=2, attn_dim=2, hops=2, score="gated_hops", context="row", values=2, score_bias=True,
        mask="empty",
    )  # fmt: skip
    tensors = in_double(case.tensors(device))
    live = {name: x.requires_grad_() for name, x in tensors.items() if x.is_floating_point()}
    return live, {"mask": tensors["mask"]}


def test_reference_passes_gradcheck_and_gradgradcheck(device):
    live, fixed = small_double(device)

    def fn(*xs):
        return operator()(impl="reference", **dict(zip(live, xs, strict=True)), **fixed)

    torch.autograd.gradcheck(fn, tuple(live.values()))
    torch.autograd.gradgradcheck(fn, tuple(live.values()))


@pytest.mark.kernel
@pytest.mark.parametrize("case", [*FORMS.values(), Case(rows=9, dim=5, score="linear")], ids=[*FORMS, "linear"])
def test_second_derivatives_are_those_of_the_reference(case, device):
    tensors = case.tensors(device)
    names = [name for name, x in tensors.items() if x.is_floating_point()]

    def first_derivatives(*, impl, **leaves):
        results = case.op(impl=impl, **leaves)
        grads = torch.autograd.grad(
            results, [leaves[name] for name in names], [projection(x, i) for i, x in enumerate(results)],
            create_graph=True,
        )  # fmt: skip
        return torch.cat([g.flatten() for g in grads])

    assert_matches_reference(first_derivatives, tensors)


@pytest.mark.kernel
def test_second_derivatives_reach_the_gradient_of_the_output(device):
    """Not only the inputs: what flows back into the output is an input of the first backward."""
    tensors = Case(rows=9, dim=5).tensors(device)

    def jacobian_product(*, impl, direction, **leaves):
        out = operator(return_weights=False)(impl=impl, **leaves)
        return torch.autograd.grad(out, leaves["h"], direction, create_graph=True)[0]

    direction = torch.randn(3, 5, generator=torch.Generator().manual_seed(2)).to(device)
    tensors["direction"] = direction
    tensors["h"] = tensors["h"].requires_grad_()
    assert_matches_reference(jacobian_product, tensors, wrt=["h", "w", "direction"])


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
def test_vmap_over_keys_is_a_loop(impl, device):
    t = Case(batch=2, rows=9, dim=5).tensors(device)
    many = torch.randn(4, *t["h"].shape, device=device)

    def pool(h):
        return location_attention(h, t["w"], t["b"], t["v"], return_weights=True, impl=impl)

    for got, want in zip(torch.vmap(pool)(many), zip(*map(pool, many), strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))


@each_impl
def test_vmap_over_nothing_gives_nothing(impl, device):
    t = Case(batch=2, rows=9, dim=5).tensors(device)
    got = torch.vmap(lambda h: location_attention(h, t["w"], t["b"], t["v"], impl=impl))(t["h"].new_zeros(0, 2, 9, 5))
    assert got.shape == (0, 2, 5)


@each_impl
def test_vmap_over_parameters_is_an_ensemble(impl, device):
    modules = [LocationAttention(5, 4, hops=2, gated=True).to(device) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    h = torch.randn(2, 9, 5, device=device)

    def pool(parameters, h):
        return torch.func.functional_call(modules[0], (parameters, buffers), (h,), {"impl": impl})

    got = torch.vmap(pool, in_dims=(0, None))(parameters, h)
    torch.testing.assert_close(got, torch.stack([module(h, impl=impl) for module in modules]))


@each_impl
def test_per_sample_gradients_are_those_of_each_sample(impl, device):
    module = LocationAttention(5, 4, gated=True).to(device)
    parameters = {name: x.detach() for name, x in module.named_parameters()}
    h = torch.randn(4, 9, 5, device=device)

    def loss(parameters, sample):
        return torch.func.functional_call(module, parameters, (sample[None],), {"impl": impl}).square().sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, h)
    for i, sample in enumerate(h):
        for name, x in torch.func.grad(loss)(parameters, sample).items():
            torch.testing.assert_close(got[name][i], x, msg=lambda text, name=name: f"{name}: {text}")


@each_impl
def test_jacrev_is_the_jacobian(impl, device):
    t = Case(batch=1, rows=5, dim=3, score="linear").tensors(device)

    def pool(h):
        return location_attention(h, t["w"], t["b"], impl=impl)

    torch.testing.assert_close(torch.func.jacrev(pool)(t["h"]), torch.autograd.functional.jacobian(pool, t["h"]))


def test_forward_mode_works_in_the_reference(device):
    live, fixed = small_double(device)
    h = live.pop("h").detach()
    rest = {name: x.detach() for name, x in live.items()} | fixed

    def pool(h):
        return operator(return_weights=False)(impl="reference", h=h, **rest)

    direction = projection(h, 0)
    _, got = torch.func.jvp(pool, (h,), (direction,))
    jacobian = torch.func.jacrev(pool)(h)
    torch.testing.assert_close(got, torch.einsum("brvijk,ijk->brv", jacobian, direction))


@pytest.mark.kernel
def test_forward_mode_of_the_kernel_raises_a_clear_error(device):
    t = Case(batch=1, rows=5, dim=3, score="linear").tensors(device)

    def pool(h):
        return location_attention(h, t["w"], t["b"], impl="triton")

    with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward.mode"):
        torch.func.jvp(pool, (t["h"],), (torch.ones_like(t["h"]),))


@each_form
@each_impl
def test_checkpointing_changes_nothing(impl, case, device):
    """It unpacks what the forward saved, once, after running the forward again with the same random numbers."""
    tensors = case.tensors(device)

    def checkpointed(*, impl, **leaves):
        return torch.utils.checkpoint.checkpoint(case.op, impl=impl, **leaves, use_reentrant=False)

    assert_close(evaluate(checkpointed, tensors, impl), evaluate(case.op, tensors, impl))


# --- Modules, autocast and CUDA graphs ---------------------------------------------------------------------------


@each_impl
def test_functional_call_uses_the_given_parameters(impl, device):
    module, other = (LocationAttention(5, 4, context_dim=3).to(device) for _ in range(2))
    h, context = torch.randn(2, 9, 5, device=device), torch.randn(2, 3, device=device)
    got = torch.func.functional_call(module, other.state_dict(), (h,), {"context": context, "impl": impl})
    assert torch.equal(got, other(h, context=context, impl=impl))


@each_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_and_returns_float32_gradients(dtype, impl, device):
    case = Case(batch=2, rows=9, dim=5, score="gated", context="row", values=3, score_bias=True)
    tensors = case.tensors(device)

    def autocast(*, impl, **leaves):
        with torch.autocast(device.type, dtype):
            return case.op(impl=impl, **leaves)

    def by_hand(*, impl, score_bias, **leaves):
        return case.op(impl=impl, score_bias=score_bias, **{name: x.to(dtype) for name, x in leaves.items()})

    got, want = evaluate(autocast, tensors, impl), evaluate(by_hand, tensors, impl)
    for name, x in want.outputs.items():
        assert got.outputs[name].dtype == dtype
        assert torch.equal(got.outputs[name], x), name
    for name, x in want.gradients.items():
        assert got.gradients[name].dtype == torch.float32
        assert torch.equal(got.gradients[name], x), name
        assert largest(x) > 0, name


@each_impl
def test_autocast_leaves_float64_alone(impl, device):
    if impl == "triton":
        impl = "auto"  # the kernel has no float64; auto takes the reference
    h, w = (
        torch.randn(2, 9, 5, dtype=torch.float64, device=device),
        torch.randn(5, dtype=torch.float64, device=device),
    )
    with torch.autocast(device.type, torch.bfloat16):
        assert location_attention(h, w, impl=impl).dtype == torch.float64


@pytest.mark.kernel
@each_form
def test_cuda_graph_replays_forward_and_backward(case, device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    tensors = case.tensors(device)
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in tensors.items()}
    live = [x for x in leaves.values() if x.requires_grad]

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    cotangents = [projection(x, i) for i, x in enumerate(case.op(impl="triton", **leaves))]

    def step():
        results = case.op(impl="triton", **leaves)
        return *results, *torch.autograd.grad(results, live, cotangents)

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernels
        step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        for x in live:
            x.mul_(0.5)
    graph.replay()
    if not case.dropout_p:
        for got, want in zip(replayed, step(), strict=True):
            torch.testing.assert_close(got, want)
    assert all(x.isfinite().all() for x in replayed)
