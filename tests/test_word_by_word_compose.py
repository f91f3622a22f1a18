"""Word-by-word attention under PyTorch's transforms, its module, and bad input."""

import dataclasses

import pytest
import torch
import torch.utils.checkpoint
from _compare import IMPLS, assert_close, assert_matches_reference, evaluate, in_double, largest, projection
from _recurrent import Case

from fused_attn import WordByWordAttention, word_by_word_attention

PADDED = Case(premise=3, hypothesis=2, dim=3, hypothesis_dim=2, attn_dim=2, mask="some", state=True)
FORMS = {
    "padded": PADDED,
    "streamed": dataclasses.replace(PADDED, batch=1, attn_dim=33),
    "ragged": dataclasses.replace(PADDED, premise=5, hypothesis=3, mask="none", ragged=True),
    "no state": dataclasses.replace(PADDED, mask="none", state=False, return_weights=False),
}
every_impl = pytest.mark.parametrize("impl", IMPLS)
each_form = pytest.mark.parametrize("case", FORMS.values(), ids=FORMS.keys())
padded_and_ragged = pytest.mark.parametrize("case", [PADDED, FORMS["ragged"]], ids=["padded", "ragged"])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def floating(tensors):
    return [name for name, x in tensors.items() if x.is_floating_point()]


@pytest.mark.kernel
@each_form
def test_raw_operators_pass_opcheck(case, device):
    t = case.tensors(device)
    rest = map(t.get, ("state", "mask", "cu_seqlens_premise", "cu_seqlens_hypothesis"))
    inputs = (t["hypothesis"] @ t["w_h"], t["premise"] @ t["w_y"], t["premise"], t["w"], t["w_r"], t["w_t"], *rest)
    weighted = case.return_weights and not case.ragged
    if not case.ragged:  # a layout of its own for the query, which the gradients do not take over
        inputs = (inputs[0].transpose(0, 1).contiguous().transpose(0, 1), *inputs[1:])
    out, weights = torch.ops.fused_attn.word_by_word_fwd(*inputs, weighted)
    needs = [x is not None for x in inputs[:7]]
    dweights = projection(weights, 1) if weighted else None
    torch.library.opcheck(torch.ops.fused_attn.word_by_word_fwd, (*inputs, weighted))
    torch.library.opcheck(torch.ops.fused_attn.word_by_word_bwd, (projection(out, 0), dweights, *inputs, out, needs))
    none = (projection(out, 0), None, *inputs, out, [False] * 7)
    torch.library.opcheck(torch.ops.fused_attn.word_by_word_bwd, none)


@each_form
@every_impl
def test_compiles_as_one_graph_forward_and_backward(impl, case, device):
    tensors = case.tensors(device)
    compiled = torch.compile(case.op, backend="aot_eager", fullgraph=True)
    assert_close(evaluate(compiled, tensors, impl), evaluate(case.op, tensors, impl))


@pytest.mark.kernel
def test_one_dynamic_graph_serves_all_sizes(device):
    compiled = torch.compile(PADDED.op, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, premise, hypothesis in ((5, 4, 6), (3, 7, 2)):
        sized = dataclasses.replace(PADDED, batch=batch, premise=premise, hypothesis=hypothesis)
        tensors = sized.tensors(device)
        assert_close(evaluate(compiled, tensors, "triton"), evaluate(sized.op, tensors, "triton"))


@padded_and_ragged
def test_gradcheck_and_gradgradcheck_pass(case, device):
    tensors = in_double(case.tensors(device))
    live = {name: x.requires_grad_() for name, x in tensors.items() if x.is_floating_point()}
    fixed = {name: x for name, x in tensors.items() if name not in live}
    if "mask" in fixed:
        fixed["mask"][0] = False  # nothing to see: no NaN in any order

    def fn(*xs):
        return case.op(impl="auto", **dict(zip(live, xs, strict=True)), **fixed)

    torch.autograd.gradcheck(fn, tuple(live.values()))
    torch.autograd.gradgradcheck(fn, tuple(live.values()))


@pytest.mark.kernel
@each_form
def test_second_derivatives_are_those_of_the_reference(case, device):
    tensors = case.tensors(device)
    names = floating(tensors)

    def first_derivatives(*, impl, direction, **leaves):
        results = case.op(impl=impl, **leaves)
        results = results if isinstance(results, tuple) else (results,)
        grads = torch.autograd.grad(
            results, [leaves[name] for name in names], [direction, *(projection(x, 1) for x in results[1:])],
            create_graph=True,
        )  # fmt: skip
        return torch.cat([g.flatten() for g in grads])

    out = case.op(impl="reference", **tensors)
    tensors["direction"] = projection(out[0] if isinstance(out, tuple) else out, 7)
    assert_matches_reference(first_derivatives, tensors)


@padded_and_ragged
@every_impl
def test_func_grad_is_the_gradient(impl, case, device):
    tensors = case.tensors(device)

    def loss(live):
        results = case.op(impl=impl, **{**tensors, **live})
        results = results if isinstance(results, tuple) else (results,)
        return sum((x * projection(x, i)).sum() for i, x in enumerate(results))

    got = torch.func.grad(loss)({name: tensors[name] for name in floating(tensors)})
    for name, x in evaluate(case.op, tensors, impl).gradients.items():
        torch.testing.assert_close(got[name], x, msg=lambda text, name=name: f"{name}: {text}")


@every_impl
@pytest.mark.parametrize("name", ["premise", "w_t", "state"])
def test_vmap_over_one_input_is_a_loop(name, impl, device):
    t = PADDED.tensors(device)
    many = torch.randn(2, *t[name].shape, device=device)

    def one(x):
        return PADDED.op(impl=impl, **t | {name: x})

    for got, want in zip(torch.vmap(one)(many), zip(*map(one, many), strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))


@every_impl
def test_per_sample_gradients_are_those_of_each_sample(impl, device):
    module = WordByWordAttention(3, 2, 4).to(device)
    parameters = {name: x.detach() for name, x in module.named_parameters()}
    premises, hypotheses = torch.randn(2, 3, 3, device=device), torch.randn(2, 2, 2, device=device)

    def loss(parameters, premise, hypothesis):
        given = (premise[None], hypothesis[None])
        return torch.func.functional_call(module, parameters, given, {"impl": impl}).square().sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, premises, hypotheses)
    for i in range(2):
        for name, x in torch.func.grad(loss)(parameters, premises[i], hypotheses[i]).items():
            torch.testing.assert_close(got[name][i], x, msg=lambda text, name=name: f"{name}: {text}")


@every_impl
def test_checkpointing_changes_nothing(impl, device):
    tensors = PADDED.tensors(device)

    def checkpointed(*, impl, **leaves):
        return torch.utils.checkpoint.checkpoint(PADDED.op, impl=impl, **leaves, use_reentrant=False)

    assert_close(evaluate(checkpointed, tensors, impl), evaluate(PADDED.op, tensors, impl))


@every_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_and_returns_float32_gradients(dtype, impl, device):
    tensors = PADDED.tensors(device)

    def autocast(*, impl, **leaves):
        with torch.autocast(device.type, dtype):
            return PADDED.op(impl=impl, **leaves)

    def by_hand(*, impl, **leaves):
        return PADDED.op(impl=impl, **{n: x.to(dtype) if x.is_floating_point() else x for n, x in leaves.items()})

    got, want = evaluate(autocast, tensors, impl), evaluate(by_hand, tensors, impl)
    for name, x in want.outputs.items():
        assert got.outputs[name].dtype == dtype
        assert torch.equal(got.outputs[name], x), name
    for name, x in want.gradients.items():
        assert got.gradients[name].dtype == torch.float32
        assert torch.equal(got.gradients[name], x), name
        assert largest(x) > 0, name


# --- The module --------------------------------------------------------------------------------------------------


@every_impl
@padded_and_ragged
def test_module_is_the_function_on_its_weights(case, impl, device):
    torch.manual_seed(0)
    module = WordByWordAttention(case.dim, case.hypothesis_dim, case.attn_dim).to(device)
    t = case.tensors(device)
    rest = {name: x for name, x in t.items() if not name.startswith("w")}
    weighted = not case.ragged
    got = module(**rest, return_weights=weighted, impl=impl)
    layers = ("premise_proj", "hypothesis_proj", "state_proj", "score", "carry")
    weights = [getattr(module, name).weight.T for name in layers]
    weights[3] = weights[3][:, 0]
    named = dict(zip(("w_y", "w_h", "w_r", "w", "w_t"), weights, strict=True))
    want = case.op(impl=impl, **rest, **named)
    for x, y in zip(got if weighted else (got,), want if weighted else (want,), strict=True):
        torch.testing.assert_close(x, y)
    sum(x.square().sum() for x in (got if weighted else (got,))).backward()
    assert all(x.grad.count_nonzero() > 0 for x in module.parameters())
    assert [name for name, _ in module.named_parameters()] == [f"{name}.weight" for name in layers]


@pytest.mark.parametrize("name", ["premise_dim", "hypothesis_dim", "attn_dim"])
def test_constructor_errors_name_the_argument(name):
    with pytest.raises(ValueError, match=rf"^{name}: expected at least 1; got 0"):
        WordByWordAttention(**{"premise_dim": 2, "hypothesis_dim": 2, "attn_dim": 2, name: 0})


# --- Bad input ---------------------------------------------------------------------------------------------------

B, TY, TH, D, DH, A = 2, 4, 3, 5, 6, 7


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def cu(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


GOOD = {
    "premise": zeros(B, TY, D), "hypothesis": zeros(B, TH, DH), "w_y": zeros(D, A), "w_h": zeros(DH, A),
    "w_r": zeros(D, A), "w": zeros(A), "w_t": zeros(D, D),
}  # fmt: skip
PACKED = GOOD | {
    "premise": zeros(9, D), "hypothesis": zeros(8, DH), "cu_seqlens_premise": cu(0, 4, 9),
    "cu_seqlens_hypothesis": cu(0, 0, 8),
}  # fmt: skip
WRONG = [
    ("premise", GOOD, zeros(TY, D), ValueError),
    ("premise", GOOD, zeros(B, TY, 0), ValueError),
    ("premise", GOOD, None, TypeError),
    ("premise", GOOD, zeros(B, TY, D, dtype=torch.int64), TypeError),
    ("premise", PACKED, zeros(B, TY, D), ValueError),
    ("hypothesis", GOOD, zeros(B + 1, TH, DH), ValueError),
    ("hypothesis", GOOD, zeros(B, TH, DH, dtype=torch.float64), TypeError),
    ("hypothesis", PACKED, zeros(B, TH, DH), ValueError),
    ("w_y", GOOD, zeros(D + 1, A), ValueError),
    ("w_y", GOOD, zeros(D, A + 1), ValueError),
    ("w_h", GOOD, zeros(D, A), ValueError),
    ("w_r", GOOD, zeros(A, D), ValueError),
    ("w", GOOD, zeros(A, 1), ValueError),
    ("w", GOOD, zeros(0), ValueError),
    ("w", GOOD, [0.0] * A, TypeError),
    ("w_t", GOOD, zeros(D, A), ValueError),
    ("w_t", GOOD, zeros(D, D, dtype=torch.bfloat16), TypeError),
    ("state", GOOD, zeros(B, A), ValueError),
    ("state", PACKED, zeros(3, D), ValueError),
    ("mask", GOOD, zeros(B, TH, dtype=torch.bool), ValueError),
    ("mask", GOOD, zeros(B, TY), TypeError),
    ("mask", PACKED, zeros(9, dtype=torch.bool), ValueError),
    ("return_weights", PACKED, True, ValueError),
    ("cu_seqlens_premise", PACKED, None, ValueError),
    ("cu_seqlens_premise", PACKED, cu(0, 4, 8), ValueError),
    ("cu_seqlens_premise", PACKED, cu(0, 4, 9, dtype=torch.int64), TypeError),
    ("cu_seqlens_hypothesis", PACKED, None, ValueError),
    ("cu_seqlens_hypothesis", PACKED, cu(0, 8), ValueError),
    ("impl", GOOD, "cuda", ValueError),
]


@pytest.mark.parametrize(("name", "good", "bad", "error"), WRONG)
def test_bad_input_raises_an_error_with_the_name(name, good, bad, error, device):
    moved = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in {**good, name: bad}.items()}
    if name.startswith("cu_seqlens") and isinstance(bad, torch.Tensor) and device.type == "cuda":
        pytest.skip("wrong offsets stop the program there")
    with pytest.raises(error, match=rf"^{name}: expected .*; got "):
        word_by_word_attention(**moved)


@pytest.mark.parametrize("good", [GOOD, PACKED], ids=["padded", "packed"])
@every_impl
def test_the_good_calls_are_good(impl, good, device):
    moved = {name: x.to(device) for name, x in good.items()}
    assert word_by_word_attention(**moved, impl=impl).shape == (*good["hypothesis"].shape[:-1], D)


def test_float64_is_an_error_for_the_kernel_only(device):
    double = {name: x.to(device).double() for name, x in GOOD.items()}
    with pytest.raises(ValueError, match=r"^impl: 'triton' has no float64"):
        word_by_word_attention(**double, impl="triton")
    assert word_by_word_attention(**double).dtype == torch.float64
