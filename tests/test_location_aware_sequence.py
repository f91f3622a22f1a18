"""Location-aware attention of a whole utterance: the loop of steps by hand, its gradients, its module."""

import functools

import _recurrent
import pytest
import torch
from _compare import IMPLS, assert_close, assert_matches_reference, evaluate, in_double, largest, projection
from _marks import each_dtype

from fused_attn import LocationAwareAttention, location_aware_attention, location_aware_sequence

B, TQ, TK, A, DV, C, K = 3, 4, 6, 3, 4, 2, 3
every_impl = pytest.mark.parametrize("impl", IMPLS)
each_way = pytest.mark.parametrize("cumulative", [False, True], ids=["last", "sum"])
each_history = pytest.mark.parametrize("history", [[1], [2], [3]], ids=str)
TRITON = [pytest.param("triton", marks=pytest.mark.kernel)]


def tensors_for(
    device,
    *,
    dtype=torch.float32,
    masked=True,
    bias=True,
    queries=TQ,
    keys=TK,
    attn_dim=A,
    channels=C,
    width=K,
    history=(),
):
    rng = torch.Generator().manual_seed(1)

    def made(*shape):
        return torch.randn(shape, generator=rng).to(device, dtype)

    tensors = {
        "query": made(B, queries, attn_dim),
        "key": made(B, keys, attn_dim),
        "value": made(B, keys, DV),
        "v": made(attn_dim),
        "conv_weight": made(channels, *history, width),
        "u": made(channels, attn_dim),
        "previous": made(B, *history, keys).float().softmax(-1).to(dtype) if keys else made(B, *history, keys),
    }
    if bias:
        tensors["score_bias"] = made(B, keys)
    if masked:
        tensors["mask"] = (torch.arange(keys) < torch.tensor([[keys], [max(keys - 2, 1)], [1]])).to(device)
    return tensors


def op(*, impl, query, key, value, v, conv_weight, u, **rest):
    return location_aware_sequence(query, key, value, v, conv_weight, u, **rest, impl=impl)


def by_formula(*, impl, query, cumulative, previous=None, **rest):
    """The loop over the formula of a step, which calls nothing of the package."""
    outs, found = [], []
    seen = torch.zeros_like(rest["key"][..., 0]) if previous is None else previous
    last, total = [], seen
    if seen.dim() == 3:  # from the oldest to the newest, and the sum
        last, total = list(seen.unbind(1)), seen[:, -1]
        last = last[:-1] if cumulative else last
    for step in query.unbind(1):
        out, weights = _recurrent.location_aware_formula(impl=impl, query=step, previous=seen, **rest)
        total = total + weights
        if seen.dim() == 3:
            last = [*last, weights][-len(last) :] if last else []
            seen = torch.stack([*last, total] if cumulative else last, 1)
        else:
            seen = total if cumulative else weights
        outs.append(out)
        found.append(weights)
    return torch.stack(outs, 1), torch.stack(found, 1)


@each_way
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "all"])
def test_the_reference_is_the_loop_of_the_formula(masked, cumulative, device):
    t = in_double(tensors_for(device, masked=masked, bias=masked))
    exact = evaluate(functools.partial(by_formula, cumulative=cumulative), t, "")
    assert_close(evaluate(functools.partial(op, cumulative=cumulative), t, "reference"), exact)
    for name, x in exact.gradients.items():
        assert largest(x) > 0, name


@each_way
@each_history
def test_channels_of_history_are_the_last_weights_and_their_sum(history, cumulative, device):
    t = in_double(tensors_for(device, history=history))
    exact = evaluate(functools.partial(by_formula, cumulative=cumulative), t, "")
    assert_close(evaluate(functools.partial(op, cumulative=cumulative), t, "reference"), exact)
    for name, x in exact.gradients.items():
        assert largest(x) > 0, name


@each_way
@each_history
@pytest.mark.parametrize("impl", [*TRITON, "auto"])
def test_channels_of_history_match_the_reference(impl, history, cumulative, device):
    assert_matches_reference(
        functools.partial(op, cumulative=cumulative), tensors_for(device, history=history), impl=impl
    )


@every_impl
def test_tacotrons_history_is_zeros_before_the_first_step(impl, device):
    t = tensors_for(device, history=[2])
    zeros = torch.zeros_like(t.pop("previous"))
    got = op(impl=impl, cumulative=True, **t)
    torch.testing.assert_close(got, op(impl=impl, cumulative=True, previous=zeros, **t))
    del t["score_bias"], t["mask"]
    first, total = zeros.unbind(1)
    for i in range(TQ):
        f = torch.nn.functional.conv1d(torch.stack([first, total], 1), t["conv_weight"], padding=K // 2).mT @ t["u"]
        first = (torch.tanh(t["query"][:, i, None] + t["key"] + f) @ t["v"]).softmax(-1)
        total = total + first
        torch.testing.assert_close(op(impl=impl, cumulative=True, **t)[1][:, i], first)


@each_dtype
@each_way
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "all"])
@pytest.mark.parametrize("impl", [*TRITON, "auto"])
def test_matches_the_reference(impl, masked, cumulative, dtype, device):
    t = tensors_for(device, dtype=dtype, masked=masked, bias=masked)
    assert_matches_reference(functools.partial(op, cumulative=cumulative), t, dtype=dtype, impl=impl)


SIZES = {
    "one step": {"queries": 1},
    "many keys": {"keys": 40},
    "wide score": {"attn_dim": 70, "queries": 2},
    "many channels": {"channels": 40, "queries": 2},
    "wide filters": {"width": 41, "keys": 30},
    "short keys": {"width": 9, "keys": 2},
    "history": {"history": [2], "width": 25, "keys": 40, "channels": 33, "queries": 3},
    "whole vectors of 4": {"attn_dim": 36, "queries": 2},
}


@pytest.mark.kernel
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_every_size_matches_the_reference(sizes, device):
    assert_matches_reference(functools.partial(op, cumulative=True), tensors_for(device, **sizes))


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["query", "key", "value", "v", "conv_weight", "u", "previous", "score_bias"])
def test_one_gradient_alone_is_that_of_the_reference(name, device):
    assert_matches_reference(op, tensors_for(device), wrt=[name])
    assert largest(evaluate(op, tensors_for(device), "triton", wrt=[name]).gradients[name]) > 0


@pytest.mark.kernel
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
@pytest.mark.parametrize("through", ["output", "weights"])
def test_each_result_alone_has_gradients(through, activation, device):
    assert_matches_reference(functools.partial(op, activation=activation), tensors_for(device), through=[through])


@each_way
@every_impl
def test_it_is_a_step_after_the_other(impl, cumulative, device):
    t = tensors_for(device)
    out, weights = op(impl=impl, cumulative=cumulative, **t)
    seen, rest = t["previous"], {n: t[n] for n in ("score_bias", "mask")}
    for i in range(TQ):
        args = (t["query"][:, i], t["key"], t["value"], t["v"], seen, t["conv_weight"], t["u"])
        want, found = location_aware_attention(*args, **rest, impl="reference")
        torch.testing.assert_close((out[:, i], weights[:, i]), (want, found))
        seen = seen + found if cumulative else found


@each_way
@every_impl
def test_nothing_is_seen_before_the_first_step(impl, cumulative, device):
    t = tensors_for(device)
    zeros = torch.zeros_like(t.pop("previous"))
    got = op(impl=impl, cumulative=cumulative, **t)
    torch.testing.assert_close(got, op(impl=impl, cumulative=cumulative, previous=zeros, **t))


@every_impl
def test_masked_positions_are_never_read(impl, device):
    t = tensors_for(device)
    t["mask"][2] = False
    clean = evaluate(op, t, impl)
    for name in ("key", "value", "previous", "score_bias"):
        t[name][~t["mask"]] = torch.nan
    t["query"][2] = torch.nan
    result = evaluate(op, t, impl)
    assert_close(result, clean)
    assert largest(result.outputs["output"][2]) == largest(result.outputs["weights"][2]) == 0
    for name in ("key", "value", "previous", "score_bias"):
        assert largest(result.gradients[name][~t["mask"]]) == 0, name


@pytest.mark.parametrize("empty", [{"queries": 0}, {"keys": 0}], ids=str)
@every_impl
def test_of_nothing_every_gradient_is_zero(impl, empty, device):
    t = tensors_for(device, masked=False, **empty)
    result = evaluate(op, t, impl)
    assert result.outputs["weights"].shape == (B, empty.get("queries", TQ), empty.get("keys", TK))
    for family in result:
        for name, x in family.items():
            assert largest(x) == 0, name


@pytest.mark.parametrize("history", [[], [2]], ids=str)
def test_gradcheck_and_gradgradcheck_pass(history, device):
    t = in_double(tensors_for(device, bias=False, queries=2, history=history))
    mask = t.pop("mask")
    live = [x.requires_grad_() for x in t.values()]

    def fn(*xs):
        return op(impl="auto", mask=mask, cumulative=True, **dict(zip(t, xs, strict=True)))

    torch.autograd.gradcheck(fn, live)
    torch.autograd.gradgradcheck(fn, live)


@pytest.mark.kernel
@pytest.mark.parametrize("history", [[], [2]], ids=str)
def test_second_derivatives_are_those_of_the_formula(history, device):
    def first_derivatives(*, impl, **tensors):
        leaves = [x for x in tensors.values() if x.is_floating_point()]
        results = op(impl=impl, **tensors)
        starts = [projection(x, i) for i, x in enumerate(results)]
        return torch.cat([g.flatten() for g in torch.autograd.grad(results, leaves, starts, create_graph=True)])

    assert_matches_reference(first_derivatives, tensors_for(device, queries=2, history=history))


@pytest.mark.parametrize("history", [[], [2]], ids=str)
@every_impl
def test_compiles_as_one_graph(impl, history, device):
    torch.compiler.reset()
    t = tensors_for(device, history=history)
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    assert_close(evaluate(compiled, t, impl), evaluate(op, t, impl))


@pytest.mark.parametrize("history", [[], [2]], ids=str)
@every_impl
def test_vmap_is_a_loop(impl, history, device):
    t = tensors_for(device, history=history)
    many = torch.rand(2, B, *history, TK, device=device)

    def one(previous):
        return op(impl=impl, **t | {"previous": previous})

    for got, want in zip(torch.vmap(one)(many), zip(*map(one, many), strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))


@every_impl
def test_dropout_drops_and_the_weights_are_those_before_it(impl, device):
    t = tensors_for(device)
    (plain, weights), (dropped, same) = op(impl=impl, **t), op(impl=impl, dropout_p=0.5, **t)
    assert torch.equal(weights, same)
    assert not torch.equal(plain, dropped)
    if impl == "triton":
        assert_matches_reference(functools.partial(op, dropout_p=0.5), t)


def test_bad_arguments_raise_with_their_names(device):
    t = tensors_for(device)
    with pytest.raises(ValueError, match=r"query: expected shape \(B, Tq, A\)"):
        op(impl="auto", **t | {"query": t["query"][:, 0]})
    with pytest.raises(ValueError, match="previous: "):
        op(impl="auto", **t | {"previous": t["previous"][:, 1:]})
    with pytest.raises(TypeError, match="cumulative: "):
        op(impl="auto", cumulative="yes", **t)
    with pytest.raises(ValueError, match="conv_weight: expected shape"):
        op(impl="auto", **t | {"conv_weight": t["conv_weight"][:, 1:]})


def test_packed_and_jagged_keys_are_told_that_an_utterance_is_padded(device):
    t = tensors_for(device)
    module = LocationAwareAttention(5, 7, A, channels=C, width=K).to(device)
    query, keys = torch.randn(B, TQ, 5, device=device), torch.randn(B, TK, 7, device=device)
    for call, key, names in (
        (lambda key: op(impl="auto", **t | {"key": key}), t["key"], r"\(B, Tk, A\)"),
        (lambda key: module.sequence(query, key), keys, r"\(B, Tk, key_dim\)"),
    ):
        with pytest.raises(ValueError, match=rf"^key: expected shape {names} .*; a whole utterance is padded"):
            call(key.flatten(0, 1))
        nested = torch.nested.as_nested_tensor(list(key), layout=torch.jagged)
        with pytest.raises(TypeError, match=r"^key: .*whole utterance is padded.*to_padded_tensor\(key, 0.0\)"):
            call(nested)
        call(torch.nested.to_padded_tensor(nested, 0.0))


@every_impl
def test_module_of_two_channels_walks_as_its_steps_do(impl, device):
    torch.manual_seed(0)
    module = LocationAwareAttention(5, 7, A, channels=C, width=K, history=2).to(device)
    query, key = torch.randn(B, TQ, 5, device=device), torch.randn(B, TK, 7, device=device)
    out, weights = module.sequence(query, key, cumulative=True, impl=impl)
    seen = torch.zeros(B, 2, TK, device=device)
    for i in range(TQ):
        want, found = module(query[:, i], key, previous=seen, impl="reference")
        torch.testing.assert_close((out[:, i], weights[:, i]), (want, found))
        seen = torch.stack([found, seen[:, 1] + found], 1)


@each_way
@every_impl
def test_module_walks_as_its_steps_do(impl, cumulative, device):
    torch.manual_seed(0)
    module = LocationAwareAttention(5, 7, A, channels=C, width=K).to(device)
    query, key = torch.randn(B, TQ, 5, device=device), torch.randn(B, TK, 7, device=device)
    mask = torch.arange(TK, device=device) < torch.tensor([[TK], [2], [4]], device=device)
    out, weights = module.sequence(query, key, cumulative=cumulative, mask=mask, impl=impl)
    seen = None
    for i in range(TQ):
        want, found = module(query[:, i], key, previous=seen, mask=mask, impl="reference")
        torch.testing.assert_close((out[:, i], weights[:, i]), (want, found))
        seen = found if seen is None or not cumulative else seen + found
    rest = {"projected": module.project_keys(key), "cumulative": cumulative, "mask": mask, "impl": impl}
    again = module.sequence(query, key, key, **rest)
    torch.testing.assert_close((out, weights), again)
    out.square().sum().backward()
    for name, x in module.named_parameters():
        assert x.grad.count_nonzero() > 0, name


def test_module_names_a_query_of_one_step(device):
    module = LocationAwareAttention(5, 7, A, channels=C, width=K).to(device)
    with pytest.raises(ValueError, match=r"query: expected shape \(B, Tq, query_dim\)"):
        module.sequence(torch.randn(B, 5, device=device), torch.randn(B, TK, 7, device=device))
