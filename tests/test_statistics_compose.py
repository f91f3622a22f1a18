"""Attentive statistics pooling under PyTorch's transforms: compile, autograd of any order, torch.func, autocast."""

import pytest
import torch
from _compare import IMPLS, assert_close, assert_matches_reference, evaluate, in_double, projection
from _statistics_pooling import Case, operator

from fused_attn import StatisticsPooling, statistics_pooling

FORMS = {
    "channel": Case(batch=2, rows=9, dim=5, attn_dim=4, context="row", values=3, mask="random"),
    "frame": Case(batch=2, rows=9, dim=5, attn_dim=4, per_channel=False, mask="random"),
    "ragged": Case(rows=9, dim=5, attn_dim=4, context="sequence", ragged=True),
}
each_impl = pytest.mark.parametrize("impl", IMPLS)
each_form = pytest.mark.parametrize("case", FORMS.values(), ids=FORMS.keys())


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


@pytest.mark.kernel
@pytest.mark.parametrize("weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize("per_channel", [False, True], ids=["frame", "channel"])
def test_raw_operators_pass_opcheck(per_channel, ragged, weights, device):
    rows = (9,) if ragged else (2, 9)
    torch.manual_seed(0)
    x = torch.randn(*rows, *((4,) if per_channel else ()), device=device)
    v = torch.randn(4, 5, device=device) if per_channel else None
    cu = torch.tensor([0, 3, 9], dtype=torch.int32, device=device) if ragged else None
    inputs = (x, v, torch.randn(*rows, 5, device=device), torch.rand(rows, device=device) < 0.7, cu)
    returned = weights and per_channel
    torch.library.opcheck(torch.ops.fused_attn.statistics_fwd, (*inputs, returned))
    results = torch.ops.fused_attn.statistics_fwd(*inputs, returned)
    mean, var, lse, scores = (projection(y, i) for i, y in enumerate(results))
    cotangents = (mean, var, lse if weights else None, scores if returned else None)
    for needs in ([True, per_channel, True], [False, False, True], [True, False, False], [False] * 3):
        torch.library.opcheck(torch.ops.fused_attn.statistics_bwd, (*cotangents, *inputs, *results, needs))


@each_form
@each_impl
def test_compiles_as_one_graph_forward_and_backward(impl, case, device):
    tensors = case.tensors(device)
    compiled = torch.compile(case.op, backend="aot_eager", fullgraph=True)
    assert_close(evaluate(compiled, tensors, impl), evaluate(case.op, tensors, impl))
    assert_close(evaluate(compiled, tensors, impl, wrt=[]), evaluate(case.op, tensors, impl, wrt=[]))


@each_impl
def test_compiles_without_weights(impl, device):
    case = FORMS["channel"]
    op = operator(return_weights=False)
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    tensors = case.tensors(device)
    assert_close(evaluate(compiled, tensors, impl), evaluate(op, tensors, impl))


@pytest.mark.parametrize("case", [
    Case(batch=2, rows=4, dim=2, attn_dim=2, context="row", values=2, mask="empty"),
    Case(rows=4, dim=2, attn_dim=2, ragged=True, per_channel=False),
], ids=["channel", "ragged"])  # fmt: skip
def test_reference_passes_gradcheck_and_gradgradcheck(case, device):
    tensors = in_double(case.tensors(device))
    live = {name: x.requires_grad_() for name, x in tensors.items() if x.is_floating_point()}
    fixed = {name: x for name, x in tensors.items() if name not in live}

    def fn(*xs):  # a floor of 1e-4 keeps the finite differences of a single visible frame at it
        return operator(floor=1e-4)(impl="reference", **dict(zip(live, xs, strict=True)), **fixed)

    torch.autograd.gradcheck(fn, tuple(live.values()))
    torch.autograd.gradgradcheck(fn, tuple(live.values()))


@pytest.mark.kernel
@each_form
def test_second_derivatives_are_those_of_the_reference(case, device):
    tensors = case.tensors(device)
    names = [name for name, x in tensors.items() if x.is_floating_point()]

    def first_derivatives(*, impl, **leaves):
        results = operator(floor=1e-2)(impl=impl, **leaves)
        grads = torch.autograd.grad(
            results, [leaves[name] for name in names], [projection(x, i) for i, x in enumerate(results)],
            create_graph=True,
        )  # fmt: skip
        return torch.cat([g.flatten() for g in grads])

    assert_matches_reference(first_derivatives, tensors)


@each_form
@each_impl
def test_func_grad_is_the_gradient(impl, case, device):
    tensors = case.tensors(device)
    names = [name for name, x in tensors.items() if x.is_floating_point()]

    def loss(live):
        results = case.op(impl=impl, **{**tensors, **live})
        return sum((x * projection(x, i)).sum() for i, x in enumerate(results))

    got = torch.func.grad(loss)({name: tensors[name] for name in names})
    want = evaluate(case.op, tensors, impl).gradients
    for name in names:
        torch.testing.assert_close(got[name], want[name], msg=lambda text, name=name: f"{name}: {text}")


@each_impl
@pytest.mark.parametrize("per_channel", [False, True], ids=["frame", "channel"])
def test_vmap_is_a_loop_and_per_sample_gradients_are_those_of_each_sample(per_channel, impl, device):
    torch.manual_seed(0)
    module = StatisticsPooling(5, 4, per_channel=per_channel).to(device)
    parameters = {name: x.detach() for name, x in module.named_parameters()}
    h = torch.randn(3, 9, 5, device=device)

    def pool(parameters, sample):
        return torch.func.functional_call(module, parameters, (sample[None],), {"impl": impl})[0]

    def loss(parameters, sample):
        return pool(parameters, sample).square().sum()

    got = torch.vmap(pool, in_dims=(None, 0))(parameters, h)
    torch.testing.assert_close(got, module(h, impl=impl))
    grads = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, h)
    for i, sample in enumerate(h):
        for name, x in torch.func.grad(loss)(parameters, sample).items():
            torch.testing.assert_close(grads[name][i], x, msg=lambda text, name=name: f"{name}: {text}")


@each_impl
def test_vmap_over_nothing_gives_nothing(impl, device):
    t = FORMS["frame"].tensors(device)
    got = torch.vmap(lambda h: statistics_pooling(h, t["w"], t["b"], t["v"], impl=impl))(t["h"].new_zeros(0, 2, 9, 5))
    assert [x.shape for x in got] == [(0, 2, 5)] * 2


@each_form
@each_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_and_returns_float32_gradients(dtype, impl, case, device):
    tensors = case.tensors(device)

    def cast_op(**arguments):
        with torch.autocast(device.type, dtype):
            return case.op(**arguments)

    got = evaluate(cast_op, tensors, impl)
    half = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    want = evaluate(case.op, half, impl)
    for name, x in got.outputs.items():
        assert torch.equal(x, want.outputs[name]), name
    for name, x in got.gradients.items():
        assert x.dtype == torch.float32, name
        torch.testing.assert_close(x, want.gradients[name].float(), msg=lambda text, name=name: f"{name}: {text}")
