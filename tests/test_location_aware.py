"""The location-aware step: by hand, over several steps, its gradients, its module."""

import functools
import math

import _recurrent
import pytest
import torch
from _compare import IMPLS, assert_close, assert_matches_reference, evaluate, in_double, largest
from _marks import each_dtype

from fused_attn import LocationAwareAttention, location_aware_attention

B, TK, A, DV, C, K = 2, 6, 3, 4, 2, 3
every_impl = pytest.mark.parametrize("impl", IMPLS)


def tensors_for(
    device,
    *,
    dtype=torch.float32,
    masked=True,
    bias=True,
    width=K,
    keys=TK,
    attn_dim=A,
    value_dim=DV,
    channels=C,
    history=(),
):
    rng = torch.Generator().manual_seed(1)

    def made(*shape, scale=1.0):
        return (torch.randn(shape, generator=rng) * scale).to(device, dtype)

    tensors = {
        "query": made(B, attn_dim),
        "key": made(B, keys, attn_dim),
        "value": made(B, keys, value_dim),
        "v": made(attn_dim),
        "previous": torch.softmax(torch.randn(B, *history, keys, generator=rng), -1).to(device, dtype),
        "conv_weight": made(channels, *history, width),
        "u": made(channels, attn_dim),
    }
    if bias:
        tensors["score_bias"] = made(B, keys)
    if masked:
        tensors["mask"] = (torch.arange(keys) < torch.tensor([[keys], [max(keys - 2, 0)]])).to(device)
    return tensors


def op(*, impl, query, key, value, v, previous, conv_weight, u, **rest):
    return location_aware_attention(query, key, value, v, previous, conv_weight, u, **rest, impl=impl)


@every_impl
def test_without_keys_every_gradient_is_zero(impl, device):
    t = tensors_for(device, keys=0)
    leaves = {name: x.requires_grad_() for name, x in t.items() if x.is_floating_point()}
    out, weights = op(impl=impl, **t)
    assert (out == 0).all()
    assert weights.shape == (B, 0)
    grads = torch.autograd.grad(out.sum() + weights.sum(), list(leaves.values()))
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("width", [1, 3, 9])
@every_impl
def test_matches_the_formula_by_hand(impl, width, device):
    t = tensors_for(device, width=width)
    out, weights = op(impl=impl, **t)
    n = {name: x.tolist() for name, x in in_double(t).items()}
    for b in range(B):
        raw = []
        for j in range(TK):
            f = [0.0] * C
            for c in range(C):
                for k in range(width):
                    i = j + k - width // 2
                    if 0 <= i < TK and n["mask"][b][i]:
                        f[c] += n["conv_weight"][c][k] * n["previous"][b][i]
            s = n["score_bias"][b][j]
            for a in range(A):
                z = n["query"][b][a] + n["key"][b][j][a] + sum(f[c] * n["u"][c][a] for c in range(C))
                s += n["v"][a] * math.tanh(z)
            raw.append(math.exp(s) if n["mask"][b][j] else 0.0)
        alpha = [x / sum(raw) for x in raw]
        assert weights[b].tolist() == pytest.approx(alpha, rel=1e-5, abs=1e-7)
        want = [sum(a * row[d] for a, row in zip(alpha, n["value"][b], strict=True)) for d in range(DV)]
        assert out[b].tolist() == pytest.approx(want, rel=1e-5, abs=1e-6)


@each_dtype
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "all"])
@pytest.mark.parametrize("impl", [pytest.param("triton", marks=pytest.mark.kernel), "auto"])
def test_matches_the_reference(impl, masked, dtype, device):
    assert_matches_reference(op, tensors_for(device, dtype=dtype, masked=masked, bias=masked), dtype=dtype, impl=impl)


SIZES = {  # more than one block of each, and filters that are longer than the keys
    "many keys, in parts": {"keys": 150},
    "wide score": {"attn_dim": 70},
    "wide values": {"value_dim": 70},
    "many channels": {"channels": 40},
    "wide filters": {"width": 41, "keys": 50},
    "short keys": {"width": 9, "keys": 2},
    "all": {"keys": 131, "attn_dim": 67, "value_dim": 65, "channels": 33, "width": 35},
    "two of history": {"history": [2], "width": 5},
    "history, all": {"history": [3], "keys": 131, "attn_dim": 67, "channels": 33, "width": 13},
    "history, short keys": {"history": [2], "width": 9, "keys": 2},
}


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "all"])
def test_channels_of_history_are_a_sum_of_convolutions(masked, count, device):
    t = in_double(tensors_for(device, history=[count], masked=masked, bias=masked))
    exact = evaluate(_recurrent.location_aware_formula, t, "")
    assert_close(evaluate(op, t, "reference"), exact)
    conv = torch.nn.functional.conv1d(t["previous"], t["conv_weight"], padding=K // 2)  # as a layer has it
    if not masked:
        s = torch.tanh(t["query"][:, None] + t["key"] + conv.mT @ t["u"]) @ t["v"]
        torch.testing.assert_close(exact.outputs["weights"], s.softmax(-1))


@each_dtype
@pytest.mark.parametrize("impl", [pytest.param("triton", marks=pytest.mark.kernel), "auto"])
def test_channels_of_history_match_the_reference(impl, dtype, device):
    assert_matches_reference(op, tensors_for(device, dtype=dtype, history=[2]), dtype=dtype, impl=impl)


@every_impl
def test_a_history_of_one_channel_is_that_without_an_axis(impl, device):
    t = tensors_for(device)
    one = t | {"previous": t["previous"][:, None], "conv_weight": t["conv_weight"][:, None]}
    got, want = evaluate(op, one, impl), evaluate(op, t, impl)
    assert torch.equal(got.outputs["output"], want.outputs["output"])
    for name, x in want.gradients.items():
        torch.testing.assert_close(got.gradients[name].view_as(x), x)


@every_impl
def test_channels_of_any_strides(impl, device):
    """As `torch.stack(..., -1)` and a transposed filter leave them."""
    t = tensors_for(device, history=[2])
    other = t | {"previous": t["previous"].mT.contiguous().mT, "conv_weight": t["conv_weight"].mT.contiguous().mT}
    assert_close(evaluate(op, other, impl), evaluate(op, t, impl))


def test_a_history_and_filters_that_do_not_fit_raise(device):
    t = tensors_for(device, history=[2])
    with pytest.raises(ValueError, match=r"conv_weight: expected shape \(C, P, K\) with P = 2 from previous"):
        op(impl="auto", **t | {"conv_weight": t["conv_weight"][:, :1]})
    with pytest.raises(ValueError, match=r"conv_weight: expected shape \(C, P, K\) with P = 2 from previous"):
        op(impl="auto", **t | {"conv_weight": t["conv_weight"][:, 0]})
    with pytest.raises(ValueError, match=r"conv_weight: expected shape \(C, K\)"):
        op(impl="auto", **t | {"previous": t["previous"][:, 0]})
    with pytest.raises(ValueError, match=r"previous: expected at least one channel, P >= 1"):
        op(impl="auto", **t | {"previous": t["previous"][:, :0], "conv_weight": t["conv_weight"][:, :0]})
    with pytest.raises(ValueError, match=r"conv_weight: expected shape \(C, P, K\) with an odd width K"):
        op(impl="auto", **t | {"conv_weight": t["conv_weight"][..., 1:]})


@pytest.mark.kernel
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_every_size_matches_the_reference(sizes, device):
    assert_matches_reference(op, tensors_for(device, **sizes))


@each_dtype
@pytest.mark.kernel
def test_calls_of_several_widths_one_after_another_match_the_reference(dtype, device):
    """Whole vectors of 4, of 8, of 16, and none; U by rows and by columns."""
    for attn_dim, value_dim in ((100, 12), (24, 36), (112, 16), (7, 100), (100, 12)):
        t = tensors_for(device, dtype=dtype, attn_dim=attn_dim, value_dim=value_dim, channels=20, keys=20)
        if attn_dim == 24:
            t["u"] = t["u"].mT.contiguous().mT
        assert_matches_reference(op, t, dtype=dtype)


@pytest.mark.kernel
@pytest.mark.parametrize("activation", ["identity", "relu", "sigmoid", "leaky_relu", "elu", "gelu", "silu"])
def test_every_activation_matches_the_reference(activation, device):
    assert_matches_reference(functools.partial(op, activation=activation), tensors_for(device))


@pytest.mark.kernel
@pytest.mark.parametrize("keys", [TK, 150])
def test_dropout_is_that_of_the_reference(keys, device):
    t = tensors_for(device, keys=keys)
    assert_matches_reference(functools.partial(op, dropout_p=0.5), t)
    assert_matches_reference(functools.partial(op, dropout_p=0.5), t, through=["output"])


@pytest.mark.kernel
def test_parts_of_hidden_keys_change_nothing(device):
    """Of one sequence all of an item is hidden, of the other every key."""
    t = tensors_for(device, keys=150)
    t["mask"] = (torch.arange(150) < torch.tensor([[60], [0]])).to(device)
    assert_matches_reference(op, t)
    clean = evaluate(op, t, "triton")
    for name in ("key", "value", "previous", "score_bias"):
        t[name][~t["mask"]] = torch.nan
    t["query"][1] = torch.nan
    assert_close(evaluate(op, t, "triton"), clean)


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["query", "key", "value", "v", "previous", "conv_weight", "u", "score_bias"])
def test_one_gradient_alone_is_that_of_the_reference(name, device):
    assert_matches_reference(op, tensors_for(device), wrt=[name])
    assert largest(evaluate(op, tensors_for(device), "triton", wrt=[name]).gradients[name]) > 0


ALL = {"return_log_weights": True, "return_scores": True, "return_lse": True}


def told(*, log_weights, scores, lse, weights):
    """Numbers of all that may be asked for, in one tensor, and the weights: 0 for -inf."""
    return torch.cat([x.masked_fill(x == -torch.inf, 0).flatten() for x in (log_weights, scores, lse)]), weights


def telling(step=op):
    def fn(**given):
        _, weights, log_weights, scores, lse = step(**given, **ALL)
        return told(log_weights=log_weights, scores=scores, lse=lse, weights=weights)

    return fn


@pytest.mark.parametrize("history", [[], [2]], ids=str)
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "all"])
def test_scores_log_weights_and_lse_are_those_of_the_formula(masked, history, device):
    t = in_double(tensors_for(device, masked=masked, history=history))

    def by_formula(*, value, **given):
        s = _recurrent.location_aware_scores(**given)
        return told(log_weights=s.log_softmax(1), scores=s, lse=s.logsumexp(1), weights=s.softmax(1))

    assert_close(evaluate(telling(), t, "reference"), evaluate(by_formula, t, ""))


@each_dtype
@pytest.mark.parametrize("keys", [TK, 150])
@pytest.mark.kernel
def test_scores_log_weights_and_lse_match_the_reference(keys, dtype, device):
    t = tensors_for(device, dtype=dtype, keys=keys)
    assert_matches_reference(telling(), t, dtype=dtype)
    assert_matches_reference(telling(), t, dtype=dtype, through=["output"])


@every_impl
@pytest.mark.parametrize("name", ["log_weights", "scores", "lse"])
def test_what_is_asked_for_comes_after_the_weights_and_changes_nothing(name, impl, device):
    t = tensors_for(device, dtype=torch.bfloat16)
    out, weights, more = op(impl=impl, **t, **{f"return_{name}": True})
    assert more.dtype == torch.float32
    assert torch.equal(out, op(impl=impl, **t)[0])
    assert more.shape == ((B,) if name == "lse" else (B, TK))
    if name == "log_weights":
        torch.testing.assert_close(more.exp().to(weights.dtype), weights)
    if name == "scores":
        assert (more == -torch.inf).equal(~t["mask"])


@every_impl
def test_scores_of_a_sequence_that_sees_nothing_are_minus_infinity_and_have_no_gradient(impl, device):
    t = tensors_for(device)
    t["mask"][1] = False
    _, _, log_weights, scores, lse = op(impl=impl, **t, **ALL)
    assert all((x[1] == -torch.inf).all() for x in (log_weights, scores, lse))
    result = evaluate(telling(), t, impl)
    assert all(x.isfinite().all() for x in result.gradients.values())
    assert largest(result.gradients["query"][1]) == largest(result.gradients["key"][1]) == 0


def test_gradients_of_scores_have_gradients(device):
    t = in_double(tensors_for(device, bias=False))
    mask = t.pop("mask")
    live = [x.requires_grad_() for x in t.values()]

    def fn(*xs):
        return telling()(impl="auto", mask=mask, **dict(zip(t, xs, strict=True)))

    torch.autograd.gradcheck(fn, live)
    torch.autograd.gradgradcheck(fn, live)


@pytest.mark.kernel
def test_second_derivatives_through_scores_are_those_of_the_reference(device):
    t = tensors_for(device)

    def second(impl):
        leaves = {n: x.detach().requires_grad_(x.is_floating_point()) for n, x in t.items()}
        live = [x for x in leaves.values() if x.requires_grad]
        first = torch.autograd.grad(
            telling()(impl=impl, **leaves)[0].sin().sum(), live, create_graph=True, allow_unused=True
        )
        return torch.autograd.grad(sum(g.square().sum() for g in first if g is not None), live, allow_unused=True)

    for got, want in zip(second("triton"), second("reference"), strict=True):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@every_impl
def test_scores_compile(impl, device):
    torch.compiler.reset()
    t = tensors_for(device, bias=False)
    compiled = torch.compile(telling(), backend="aot_eager", fullgraph=True)
    assert_close(evaluate(compiled, t, impl), evaluate(telling(), t, impl))


def decode(*, impl, query, previous, **rest):
    """Three steps: each sees the weights of the last, and asks with what it found."""
    outs = []
    for _ in range(3):
        out, previous = op(impl=impl, query=query, previous=previous, **rest)
        query = query + out[:, :A]
        outs.append(out)
    return torch.stack(outs, 1), previous


@every_impl
def test_steps_in_a_chain_are_the_formula_and_gradients_go_through_them(impl, device):
    t = tensors_for(device, bias=False)

    def by_formula(*, impl, query, key, value, v, previous, conv_weight, u, mask):
        outs = []
        for _ in range(3):
            padded = torch.nn.functional.pad(previous.masked_fill(~mask, 0), (K // 2, K // 2))
            f = torch.stack([padded[:, i : i + K] @ conv_weight.T for i in range(TK)], 1)
            scores = torch.tanh(query[:, None] + key + f @ u) @ v
            previous = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)
            outs.append((previous[:, None] @ value)[:, 0])
            query = query + outs[-1][:, :A]
        return torch.stack(outs, 1), previous

    exact = evaluate(by_formula, in_double(t), "")
    assert_close(evaluate(decode, in_double(t), "reference"), exact)
    if impl == "triton":
        assert_matches_reference(decode, t)
    for name, x in exact.gradients.items():
        assert largest(x) > 0, name


@every_impl
@pytest.mark.parametrize("history", [[], [2]], ids=str)
def test_masked_positions_are_never_read(impl, history, device):
    t = tensors_for(device, history=history)
    clean = evaluate(op, t, impl)
    for name in ("key", "value", "score_bias"):
        t[name][~t["mask"]] = torch.nan
    hidden = ~t["mask"].view(B, *[1 for _ in history], TK).expand_as(t["previous"])
    t["previous"][hidden] = torch.nan
    result = evaluate(op, t, impl)
    assert_close(result, clean)
    assert largest(result.gradients["previous"][hidden]) == 0
    for name in ("key", "value"):
        assert largest(result.gradients[name][~t["mask"]]) == 0, name


@every_impl
def test_nothing_to_see_gives_zeros(impl, device):
    for t in (tensors_for(device), tensors_for(device, keys=0)):
        t["mask"] = torch.zeros_like(t["mask"])
        result = evaluate(op, t, impl)
        for family in result:
            for name, x in family.items():
                assert largest(x) == 0, name


@pytest.mark.parametrize("history", [[], [2]], ids=str)
def test_gradcheck_and_gradgradcheck_pass(history, device):
    t = in_double(tensors_for(device, bias=False, history=history))
    mask = t.pop("mask")
    live = [x.requires_grad_() for x in t.values()]

    def fn(*xs):
        return op(impl="auto", mask=mask, **dict(zip(t, xs, strict=True)))

    torch.autograd.gradcheck(fn, live)
    torch.autograd.gradgradcheck(fn, live)


@every_impl
def test_compiles_as_one_graph(impl, device):
    torch.compiler.reset()
    t = tensors_for(device, bias=False)
    compiled = torch.compile(decode, backend="aot_eager", fullgraph=True)
    assert_close(evaluate(compiled, t, impl), evaluate(decode, t, impl))


@pytest.mark.parametrize("history", [[], [2]], ids=str)
@every_impl
def test_vmap_is_a_loop(impl, history, device):
    t = tensors_for(device, history=history)
    many = torch.rand(3, B, *history, TK, device=device)

    def one(previous):
        return op(impl=impl, **t | {"previous": previous})

    for got, want in zip(torch.vmap(one)(many), zip(*map(one, many), strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))


def test_autocast_computes_in_its_dtype(device):
    t = tensors_for(device, bias=False)
    with torch.autocast(device.type, torch.bfloat16):
        assert {x.dtype for x in op(impl="auto", **t)} == {torch.bfloat16}


def test_dropout_drops_and_the_weights_are_those_before_it(device):
    t = tensors_for(device)
    (plain, weights), (dropped, same) = op(impl="auto", **t), op(impl="auto", dropout_p=0.5, **t)
    assert torch.equal(weights, same)
    assert not torch.equal(plain, dropped)


# --- The module --------------------------------------------------------------------------------------------------


@every_impl
def test_module_of_two_channels_is_tacotrons(impl, device):
    torch.manual_seed(0)
    module = LocationAwareAttention(5, 7, A, channels=C, width=K, history=2, bias=False).to(device)
    assert module.conv.weight.shape == (C, 2, K)
    query, key = torch.randn(B, 5, device=device), torch.randn(B, TK, 7, device=device)
    last, total = torch.zeros(2, B, TK, device=device)
    previous = None
    for _ in range(3):
        context, weights = module(query, key, previous=previous, impl=impl)
        f = module.location_proj(module.conv(torch.stack([last, total], 1)).mT)
        energies = module.score(torch.tanh(module.query_proj(query)[:, None] + module.key_proj(key) + f))
        want = energies.squeeze(-1).softmax(1)
        torch.testing.assert_close(weights, want)
        torch.testing.assert_close(context, (want[:, None] @ key)[:, 0])
        last, total = want, total + want
        previous = torch.stack([last, total], 1)
    context.square().sum().backward()
    for name, x in module.named_parameters():
        assert x.grad.count_nonzero() > 0, name
    with pytest.raises(
        ValueError, match=r"previous: expected shape \(B, history, Tk\) with .*history = 2 from the con"
    ):
        module(query, key, previous=last, impl=impl)


@every_impl
def test_module_is_the_function_on_its_parameters(impl, device):
    torch.manual_seed(0)
    module = LocationAwareAttention(5, 7, A, channels=C, width=K).to(device)
    query, key = torch.randn(B, 5, device=device), torch.randn(B, TK, 7, device=device)
    mask = torch.arange(TK, device=device) < torch.tensor([[TK], [2]], device=device)
    previous, sums = None, torch.zeros(B, TK, device=device)
    projected = module.project_keys(key)
    for _ in range(3):
        context, weights = module(query, key, previous=previous, projected=projected, mask=mask, impl=impl)
        want = location_aware_attention(
            query @ module.query_proj.weight.T + module.query_proj.bias,
            key @ module.key_proj.weight.T,
            key,
            module.score.weight[0],
            sums,
            module.conv.weight[:, 0],
            module.location_proj.weight.T,
            mask=mask,
            impl="reference",
        )
        torch.testing.assert_close((context, weights), want)
        again = module(query, key, key, previous=sums, mask=mask, impl=impl)
        torch.testing.assert_close((context, weights), again)
        sums = sums + weights
        previous = sums
    context.square().sum().backward()
    for name, x in module.named_parameters():
        assert x.grad.count_nonzero() > 0, name
    # The convolution of the formula is the module's own layer.
    torch.testing.assert_close(
        module.conv(sums[:, None]),
        torch.nn.functional.conv1d(sums[:, None], module.conv.weight, padding=K // 2),
    )


def test_module_defaults_and_repr():
    module = LocationAwareAttention(5, 7, 3, dropout=0.25, activation="relu", bias=False)
    assert module.conv.weight.shape == (32, 1, 31)
    assert module.query_proj.bias is None
    assert "activation='relu', dropout=0.25" in repr(module)
    query, key = torch.randn(B, 5), torch.randn(B, TK, 7)
    assert not torch.equal(module(query, key)[0], module(query, key)[0])
    assert torch.equal(module.eval()(query, key)[0], module(query, key)[0])
