"""Hierarchical attention under PyTorch's transforms: compile, autograd of any order, torch.func, autocast."""

import dataclasses

import pytest
import torch
import torch.utils.checkpoint
from _compare import IMPLS, assert_close, assert_matches_reference, evaluate, in_double, largest, projection
from _hierarchical import PARTS, Case, operator
from torch import nn

from fused_attn import HierarchicalAttention

each_impl = pytest.mark.parametrize("impl", IMPLS)
SMALL = Case(documents="sentences", dim=3, attn_dims=(2, 2))
FULL = dataclasses.replace(SMALL, inner="gated", outer="gated", contexts=("row", "parent"), mask="random")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def raw_arguments(case, device):
    """Arguments of `torch.ops.fused_attn.hierarchical_fwd`."""
    t = case.tensors(device)

    def score(level):
        found = {part: t.get(f"{level}_{part}") for part in PARTS}
        if found["context"] is not None:
            found["context"] = found["context"].flatten(0, 1)
        if found["v"] is not None:
            found["v"] = found["v"][:, None]
        else:
            found |= {"w": found["w"][:, None], "b": found["b"].reshape(1)}
        return found.values()

    options = [
        value for i in range(2) for value in (*case.activations[2 * i : 2 * i + 2], case.contexts[i] == "row")
    ]  # fmt: skip
    return (
        t["h"], *score("inner"), *score("outer"), t.get("mask"), t["inner_offsets"], t["outer_offsets"], *options,
    )  # fmt: skip


@pytest.mark.kernel
@pytest.mark.parametrize(
    "case",
    [FULL, dataclasses.replace(FULL, dtype=torch.bfloat16), dataclasses.replace(SMALL, inner="linear")],
    ids=["full", "bfloat16", "linear"],
)
def test_raw_operator_passes_opcheck(case, device):
    torch.library.opcheck(torch.ops.fused_attn.hierarchical_fwd, raw_arguments(case, device))


@pytest.mark.parametrize("case", [FULL, SMALL], ids=["full", "small"])
@each_impl
def test_compiles_as_one_graph_forward_and_backward(impl, case, device):
    tensors = case.tensors(device)
    compiled = torch.compile(case.op, backend="aot_eager", fullgraph=True)
    assert_close(evaluate(compiled, tensors, impl), evaluate(case.op, tensors, impl))
    assert_close(evaluate(compiled, tensors, impl, wrt=[]), evaluate(case.op, tensors, impl, wrt=[]))


@each_impl
def test_compiles_as_one_graph_with_a_layer_between(impl, device):
    tensors = SMALL.tensors(device)
    layer = nn.Linear(3, 3).to(device)
    op = operator(between=lambda segments, _: layer(segments))
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    assert_close(evaluate(compiled, tensors, impl), evaluate(op, tensors, impl))


def test_reference_passes_gradcheck_and_gradgradcheck(device):
    tensors = in_double(dataclasses.replace(FULL, documents="sentences", mask="empty").tensors(device))
    live = {name: x.requires_grad_() for name, x in tensors.items() if x.is_floating_point()}
    fixed = {name: x for name, x in tensors.items() if name not in live}

    def fn(*xs):
        return FULL.op(impl="reference", **dict(zip(live, xs, strict=True)), **fixed)

    torch.autograd.gradcheck(fn, tuple(live.values()), fast_mode=True)
    torch.autograd.gradgradcheck(fn, tuple(live.values()), fast_mode=True)


@pytest.mark.kernel
@pytest.mark.parametrize("case", [FULL, dataclasses.replace(SMALL, outer="linear")], ids=["full", "linear"])
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
    tensors = SMALL.tensors(device)

    def jacobian_product(*, impl, direction, **leaves):
        out = operator()(impl=impl, **leaves)
        return torch.autograd.grad(out, leaves["h"], direction, create_graph=True)[0]

    tensors["direction"] = torch.randn(3, 3, generator=torch.Generator().manual_seed(2)).to(device)
    tensors["h"] = tensors["h"].requires_grad_()
    assert_matches_reference(jacobian_product, tensors, wrt=["h", "inner_w", "outer_w", "direction"])


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
def test_vmap_over_rows_is_a_loop(impl, device):
    tensors = SMALL.tensors(device)
    h = tensors.pop("h")
    many = torch.stack([h, 2 * h, -h])

    def pool(h):
        return SMALL.op(impl=impl, h=h, **tensors)

    for got, want in zip(torch.vmap(pool)(many), zip(*map(pool, many), strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))


@each_impl
def test_per_sample_gradients_are_those_of_each_sample(impl, device):
    module = HierarchicalAttention(3, 2, gated=True).to(device)
    parameters = {name: x.detach() for name, x in module.named_parameters()}
    tensors = SMALL.tensors(device)
    samples = torch.stack([tensors["h"] * i for i in (1, 2, -1)])
    structure = tensors["inner_offsets"], tensors["outer_offsets"]

    def loss(parameters, h):
        return torch.func.functional_call(module, parameters, (h, *structure), {"impl": impl}).square().sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, samples)
    for i, sample in enumerate(samples):
        for name, x in torch.func.grad(loss)(parameters, sample).items():
            torch.testing.assert_close(got[name][i], x, msg=lambda text, name=name: f"{name}: {text}")


@each_impl
def test_checkpointing_changes_nothing(impl, device):
    tensors = FULL.tensors(device)

    def checkpointed(*, impl, **leaves):
        return torch.utils.checkpoint.checkpoint(FULL.op, impl=impl, **leaves, use_reentrant=False)

    assert_close(evaluate(checkpointed, tensors, impl), evaluate(FULL.op, tensors, impl))


@each_impl
@pytest.mark.parametrize("between", [False, True], ids=["alone", "between"])
def test_autocast_computes_in_its_dtype_and_returns_float32_gradients(between, impl, device):
    """Also where a layer between returns float32, as a normalisation does."""
    tensors = FULL.tensors(device)
    float32 = {"between": lambda segments, _: segments.float()} if between else {}
    back = {"between": lambda segments, _: segments.float().bfloat16()} if between else {}

    def autocast(*, impl, **leaves):
        with torch.autocast(device.type, torch.bfloat16):
            return operator(through=FULL.through, **float32)(impl=impl, **leaves)

    def by_hand(*, impl, **leaves):
        cast = {name: x.bfloat16() if x.is_floating_point() else x for name, x in leaves.items()}
        return operator(through=FULL.through, **back)(impl=impl, **cast)

    got, want = evaluate(autocast, tensors, impl), evaluate(by_hand, tensors, impl)
    for name, x in want.outputs.items():
        assert got.outputs[name].dtype == torch.bfloat16
        assert torch.equal(got.outputs[name], x), name
    for name, x in want.gradients.items():
        assert got.gradients[name].dtype == torch.float32
        assert torch.equal(got.gradients[name], x), name
        assert largest(x) > 0, name
