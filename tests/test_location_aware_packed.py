"""The location-aware step of packed rows and jagged tensors: each sequence by itself, at its keys alone."""

import functools
import itertools

import _recurrent
import pytest
import torch
from _compare import IMPLS, assert_close, assert_matches_reference, evaluate, in_double, largest, strided_offsets
from _location import offsets
from _marks import each_dtype

from fused_attn import LocationAwareAttention, Segments, location_aware_attention

A, DV, C, K = 3, 4, 2, 5
LENGTHS = (5, 0, 1, 9, 2)
every_impl = pytest.mark.parametrize("impl", IMPLS)
histories = pytest.mark.parametrize("history", [[], [2]], ids=str)


def tensors_for(
    device,
    *,
    lengths=LENGTHS,
    dtype=torch.float32,
    masked=True,
    width=K,
    attn_dim=A,
    value_dim=DV,
    channels=C,
    history=(),
):
    rng = torch.Generator().manual_seed(1)
    rows = sum(lengths)

    def made(*shape):
        return torch.randn(shape, generator=rng).to(device, dtype)

    tensors = {
        "query": made(len(lengths), attn_dim),
        "key": made(rows, attn_dim),
        "value": made(rows, value_dim),
        "v": made(attn_dim),
        "previous": torch.rand(rows, *history, generator=rng).to(device, dtype),
        "conv_weight": made(channels, *history, width),
        "u": made(channels, attn_dim),
        "score_bias": made(rows),
        "cu_seqlens": offsets(lengths, device),
    }
    if masked:
        tensors["mask"] = (torch.rand(rows, generator=rng) < 0.7).to(device)
    return tensors


def op(*, impl, query, key, value, v, previous, conv_weight, u, **rest):
    return location_aware_attention(query, key, value, v, previous, conv_weight, u, **rest, impl=impl)


OF_ROWS = ("key", "value", "previous", "score_bias", "mask")


def one_by_one(step):
    """A step of packed rows, which calls that of one padded sequence for each."""

    def looped(*, cu_seqlens, query, **given):
        outs, weights = [query.new_zeros(0, given["value"].shape[-1])], [query.new_zeros(0)]
        for s, (lo, hi) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            own = {n: x[lo:hi][None] if n in OF_ROWS else x for n, x in given.items()}
            if own["previous"].dim() == 3:
                own["previous"] = own["previous"].mT
            out, alpha = step(query=query[s : s + 1], **own)
            seen = own["mask"].any() if "mask" in own else hi > lo
            outs.append(out if seen else out * 0)
            weights.append(alpha[0] if seen else alpha[0] * 0)
        return torch.cat(outs).nan_to_num(), torch.cat(weights).nan_to_num()

    return looped


@histories
@pytest.mark.parametrize("width", [1, 5, 11])
def test_the_reference_is_the_formula_of_each_sequence(history, width, device):
    t = in_double(tensors_for(device, history=history, width=width, lengths=(5, 1, 9, 2)))
    t["mask"] = torch.ones_like(t["mask"])
    t["mask"][[2, 7, 8]] = False
    assert_close(evaluate(op, t, "reference"), evaluate(one_by_one(_recurrent.location_aware_formula), t, ""))


@every_impl
@histories
def test_each_sequence_is_what_it_is_alone(impl, history, device):
    t = tensors_for(device, history=history)
    assert_close(evaluate(op, t, impl), evaluate(one_by_one(op), t, impl))


@each_dtype
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "all"])
@histories
@pytest.mark.kernel
def test_matches_the_reference(history, masked, dtype, device):
    t = tensors_for(device, dtype=dtype, masked=masked, history=history)
    assert_matches_reference(op, t, dtype=dtype)


SIZES = {  # several items of a sequence, more than one block of each, filters that are longer than sequences
    "items": {"lengths": (3, 300, 0, 140)},
    "an item each": {"lengths": (3, 300, 0, 140, 1)},
    "all in one": {"lengths": (270,)},
    "wide": {"attn_dim": 70, "value_dim": 70, "channels": 40},
    "wide filters": {"width": 41},
    "all": {
        "lengths": (0, 131, 7, 129),
        "attn_dim": 67,
        "value_dim": 65,
        "channels": 33,
        "width": 35,
        "history": [2],
    },
}


@pytest.mark.kernel
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_every_size_matches_the_reference(sizes, device):
    assert_matches_reference(op, tensors_for(device, **sizes))


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["query", "key", "value", "v", "previous", "conv_weight", "u", "score_bias"])
def test_one_gradient_alone_is_that_of_the_reference(name, device):
    t = tensors_for(device, lengths=(3, 150, 0, 1))
    assert_matches_reference(op, t, wrt=[name])
    assert largest(evaluate(op, t, "triton", wrt=[name]).gradients[name]) > 0


@pytest.mark.kernel
@pytest.mark.parametrize("lengths", [LENGTHS, (3, 150, 0, 1)], ids=str)
def test_dropout_is_that_of_the_reference(lengths, device):
    assert_matches_reference(functools.partial(op, dropout_p=0.5), tensors_for(device, lengths=lengths))


@every_impl
def test_scores_log_weights_and_lse_are_those_of_each_sequence(impl, device):
    t = tensors_for(device, lengths=(5, 0, 150, 2))
    options = {"return_log_weights": True, "return_scores": True, "return_lse": True}

    def told(out, weights, log_weights, scores, lse):
        finite = [x.masked_fill(x == -torch.inf, 0).flatten() for x in (out, log_weights, scores, lse)]
        return torch.cat(finite), weights

    def one_each(*, cu_seqlens, **given):
        found = []
        for s, (lo, hi) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            own = {n: x[lo:hi][None] if n in OF_ROWS else x for n, x in given.items()}
            found.append(op(**own | {"query": given["query"][s : s + 1]}, **options))
        return told(*(torch.cat([x.view(-1) for x in xs]) for xs in zip(*found, strict=True)))

    def packed(**given):
        return told(*op(**given, **options))

    assert_close(evaluate(packed, t, impl), evaluate(one_each, t, impl))
    if impl == "triton":
        assert_matches_reference(packed, t)
    nested = op(impl=impl, **jagged(t), **options)
    for got, want in zip(nested[1:4], op(impl=impl, **t, **options)[1:4], strict=True):
        assert got.is_nested
        assert torch.equal(got.values(), want)


@every_impl
def test_dropout_is_that_of_padded_rows(impl, device):
    t = tensors_for(device, lengths=(6, 6, 6))
    padded = {n: x.view(3, 6, *x.shape[1:]) if n in OF_ROWS else x for n, x in t.items() if n != "cu_seqlens"}
    got, want = (evaluate(functools.partial(op, dropout_p=0.5), x, impl) for x in (t, padded))
    torch.testing.assert_close(got.outputs["output"], want.outputs["output"])
    torch.testing.assert_close(got.outputs["weights"].view(3, 6), want.outputs["weights"])


@every_impl
@histories
def test_masked_rows_are_never_read(impl, history, device):
    t = tensors_for(device, history=history, lengths=(5, 150, 2, 3))
    t["mask"][155:157] = False  # all of a sequence
    clean = evaluate(op, t, impl)
    for name in ("key", "value", "previous", "score_bias"):
        t[name][~t["mask"]] = torch.nan
    t["query"][2] = torch.nan
    result = evaluate(op, t, impl)
    assert_close(result, clean)
    assert largest(result.outputs["output"][2]) == 0


@every_impl
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
def test_without_rows_everything_is_zero(impl, lengths, device):
    result = evaluate(op, tensors_for(device, lengths=lengths), impl)
    assert result.outputs["output"].shape == (len(lengths), DV)
    assert all(largest(x) == 0 for family in result for x in family.values())


@every_impl
def test_offsets_may_be_strided_and_segments(impl, device):
    t = tensors_for(device)
    want = evaluate(op, t, impl)
    assert_close(evaluate(op, strided_offsets(t), impl), want)
    cu = Segments.from_offsets(t.pop("cu_seqlens"))
    assert_close(evaluate(functools.partial(op, cu_seqlens=cu), t, impl), want)


@every_impl
def test_smoothing_is_that_of_each_sequence(impl, device):
    smooth = functools.partial(op, score_activation="logsigmoid")
    t = tensors_for(device)
    assert_close(evaluate(smooth, t, impl), evaluate(one_by_one(smooth), t, impl))


@histories
def test_gradcheck_and_gradgradcheck_pass(history, device):
    t = in_double(tensors_for(device, history=history, lengths=(3, 0, 2), width=3))
    rest = {name: t.pop(name) for name in ("mask", "cu_seqlens")}
    live = [x.requires_grad_() for x in t.values()]

    def fn(*xs):
        return op(impl="auto", **rest, **dict(zip(t, xs, strict=True)))

    torch.autograd.gradcheck(fn, live)
    torch.autograd.gradgradcheck(fn, live)


# --- Jagged tensors ------------------------------------------------------------------------------------------------


def jagged(t, names=OF_ROWS):
    """The same tensors, rows of these names as jagged ones of one structure; all in double, for autograd knows it."""
    cu = t["cu_seqlens"].long()
    return {
        n: torch.nested.nested_tensor_from_jagged(x, cu) if n in names else x
        for n, x in t.items()
        if n != "cu_seqlens"
    }


@every_impl
@histories
def test_jagged_tensors_are_their_rows(impl, history, device):
    t = tensors_for(device, history=history)
    leaves = {n: x.clone().requires_grad_() if x.is_floating_point() else x for n, x in t.items()}
    out, weights = op(impl=impl, **jagged(leaves))
    want = op(impl=impl, **t)
    assert torch.equal(out, want[0])
    assert weights.is_nested
    assert torch.equal(weights.offsets(), t["cu_seqlens"].long())
    assert torch.equal(weights.values(), want[1])
    (out.sum() + weights.values().square().sum()).backward()
    packed = {n: x.detach().requires_grad_() if x.is_floating_point() else x for n, x in t.items()}
    out, weights = op(impl=impl, **packed)
    (out.sum() + weights.square().sum()).backward()
    for name, x in packed.items():
        if x.requires_grad:
            torch.testing.assert_close(leaves[name].grad, x.grad)


@every_impl
def test_a_mask_of_jagged_keys_may_be_of_packed_rows_and_weights_go_on(impl, device):
    t = tensors_for(device)
    given = jagged(t, ("key", "value", "previous", "score_bias"))
    _, weights = op(impl=impl, **given)
    _, again = op(impl=impl, **given | {"previous": weights})
    _, want = op(impl=impl, **t | {"previous": weights.values()})
    assert torch.equal(again.values(), want)


@every_impl
@pytest.mark.parametrize("history", [1, 2])
def test_the_module_takes_packed_rows_and_jagged_ones(impl, history, device):
    torch.manual_seed(0)
    module = LocationAwareAttention(5, 7, A, channels=C, width=K, history=history).to(device)
    t = tensors_for(device, lengths=(4, 6, 1))
    cu, mask = t["cu_seqlens"], t["mask"]
    mask[[0, 4, 10]] = True
    query, key = torch.randn(3, 5, device=device), torch.randn(11, 7, device=device)
    nested = torch.nested.nested_tensor_from_jagged(key, cu.long())
    segments = Segments.from_offsets(cu)
    previous = nested_previous = None
    for _ in range(2):
        projected = module.project_keys(key, mask)
        context, weights = module(
            query, key, previous=previous, projected=projected, mask=mask, cu_seqlens=segments, impl=impl
        )
        again, jagged_weights = module(query, nested, previous=nested_previous, mask=mask, impl=impl)
        torch.testing.assert_close(again, context)
        torch.testing.assert_close(jagged_weights.values(), weights)
        for s, (lo, hi) in enumerate(itertools.pairwise(cu.tolist())):
            own = None if previous is None else previous[lo:hi].movedim(0, -1)[None]
            alone = module(query[s : s + 1], key[None, lo:hi], previous=own, mask=mask[None, lo:hi], impl=impl)
            torch.testing.assert_close((context[s : s + 1], weights[None, lo:hi]), alone)
        previous = weights if history == 1 else torch.stack([weights, weights], 1)
        nested_previous = jagged({"x": previous, "cu_seqlens": cu}, "x")["x"] if history > 1 else jagged_weights
    context.square().sum().backward()
    for name, x in module.named_parameters():
        assert x.grad.count_nonzero() > 0, name


# --- Errors --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_raises(device):
    t = tensors_for(device)
    nested = jagged(t)
    cu = t["cu_seqlens"]
    for bad, error, text in (
        (t | {"cu_seqlens": None}, ValueError, r"key: expected shape \(B, Tk, A\) .*packed rows go with cu_seqlens"),
        (
            t | {"cu_seqlens": cu[:-1]},
            ValueError,
            r"cu_seqlens: expected shape \(S \+ 1,\) with S \+ 1 = 6 from query",
        ),
        (t | {"cu_seqlens": cu.long()}, TypeError, r"cu_seqlens: expected dtype int32; got int64"),
        (t | {"cu_seqlens": cu.flip(0)}, ValueError, r"cu_seqlens: expected non-decreasing offsets from 0"),
        (t | {"previous": t["previous"][1:]}, ValueError, r"previous: expected shape \(N,\) with N = 17 from key"),
        (t | {"mask": t["mask"][None]}, ValueError, r"mask: expected shape \(N,\)"),
        (t | {"value": t["value"][1:]}, ValueError, r"value: expected shape \(N, Dv\) with N = 17 from key"),
        (nested | {"cu_seqlens": cu}, ValueError, r"cu_seqlens: expected None with a jagged key"),
        (nested | {"value": t["value"]}, ValueError, r"value: expected a jagged tensor, as key is; got"),
        (nested | {"previous": t["previous"]}, ValueError, r"previous: expected a jagged tensor, as key is; got"),
        (nested | {"score_bias": t["score_bias"][1:]}, ValueError, r"score_bias: expected shape \(N,\)"),
        (
            nested | {"query": t["query"][1:]},
            ValueError,
            r"key: expected a jagged tensor of S = 4 sequences, from qu",
        ),
        (t | {"key": nested["key"][..., :1]}, ValueError, r"cu_seqlens: expected None with a jagged key"),
        (t | {"value": nested["value"]}, TypeError, r"value: expected a dense tensor, padded or packed"),
    ):
        with pytest.raises(error, match=text):
            op(impl="auto", **bad)
    module = LocationAwareAttention(5, 7, A)
    with pytest.raises(ValueError, match=r"key: expected shape \(B, Tk, key_dim\)"):
        module(torch.randn(2, 5), torch.randn(6, 7))
    with pytest.raises(ValueError, match=r"projected: expected a jagged tensor, as key is; got"):
        module(
            torch.randn(2, 5),
            torch.nested.as_nested_tensor([torch.randn(3, 7)] * 2, layout=torch.jagged),
            projected=torch.randn(6, A),
        )
    nested = torch.nested.as_nested_tensor([torch.randn(3, 7)] * 2, layout=torch.jagged)
    with pytest.raises(ValueError, match=r"projected: expected shape \(N, attn_dim\) with attn_dim = 3 from the con"):
        module(torch.randn(2, 5), nested, projected=nested)
    with pytest.raises(ValueError, match=r"key: expected shape \(N, key_dim\)"):
        module(torch.randn(2, 5), torch.randn(2, 3, 7), cu_seqlens=offsets((3, 3), torch.device("cpu")))
