"""Statistics pooling of several sets of weights, which share the frames: `hops`."""

import pytest
import torch
from _compare import (
    IMPLS,
    assert_close,
    assert_matches_reference,
    assert_zero,
    evaluate,
    in_double,
    largest,
)
from _location import offsets
from _marks import both_forms, each_dtype
from _statistics_pooling import Case, assert_raises
from torch import Tensor

from fused_attn import StatisticsPooling, statistics_pooling

R = 3
each_impl = pytest.mark.parametrize("impl", IMPLS)
each_kind = pytest.mark.parametrize("kind", ["v", "v and bias", "bias", "weight"])
OPTIONS = {"plain": {}, "mean": {"deviation": False}, "all": {"correction": 0.7, "floor": 0.6, "eps": 0.2}}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def tensors_of(kind: str, device: torch.device, *, ragged: bool = False, **more) -> dict[str, Tensor]:
    """Frames, some of them hidden, values as wide as there are hops, and what weights them."""
    sizes = {"rows": 40, "dim": 9, "mask": "random", "attn_dim": 5, "value": R, "context": "row"}
    case = Case(per_channel=True, ragged=ragged, **(sizes | more))
    made = case.tensors(device)
    if made["v"].shape[1] != R:
        made["v"] = torch.randn(made["v"].shape[0], R, generator=torch.Generator().manual_seed(3)).to(made["v"])
    if not kind.startswith("v"):
        made = {name: x for name, x in made.items() if name not in ("w", "b", "v", "context")}
    generator = torch.Generator().manual_seed(2)
    if kind != "v":
        rows = made["h"].shape[:-1]
        shape = (*rows, R) if ragged else (rows[0], R, rows[1])
        given = torch.randn(shape, generator=generator).to(device, case.dtype)
        made |= {"weight": given.abs()} if kind == "weight" else {"score_bias": given}
    return made


def call(*, return_weights=True, **options):
    """The statistics one after the other, and the weights."""

    def op(**arguments):
        *statistics, weights = statistics_pooling(**arguments, **options, hops=R, return_weights=return_weights)
        return torch.cat(statistics, -1), weights

    return op


def hop_by_hop(**options):
    """A call a hop of what has been there before, whose own tests compare it with the formula."""

    def op(*, v=None, score_bias=None, weight=None, cu_seqlens=None, **arguments):
        each = []
        for r in range(R):
            ours = {} if v is None else {"v": v[:, r]}
            for name, x in (("score_bias", score_bias), ("weight", weight)):
                if x is not None:
                    ours[name] = x[:, r]
            each.append(
                statistics_pooling(**arguments, **ours, cu_seqlens=cu_seqlens, **options, return_weights=True)
            )
        *statistics, weights = (torch.stack(x, 1) for x in zip(*each, strict=True))
        return torch.cat(statistics, -1), weights

    return op


@each_kind
@each_option
@both_forms
def test_reference_is_a_call_a_hop(ragged, options, kind, device):
    tensors = in_double(tensors_of(kind, device, ragged=ragged))
    want = evaluate(hop_by_hop(**options), tensors, "reference")
    got = evaluate(call(**options), tensors, "reference")
    assert got.outputs["output"].shape[1] == R
    assert_close(got, want)


@pytest.mark.kernel
@each_kind
@each_option
@both_forms
@each_dtype
def test_matches_the_reference(dtype, ragged, options, kind, device):
    tensors = tensors_of(kind, device, ragged=ragged, dtype=dtype, layout="strided")
    assert_matches_reference(call(**options), tensors, dtype=dtype)


@pytest.mark.kernel
@each_kind
@pytest.mark.parametrize("name", ["h", "w", "v", "value", "score_bias", "weight"])
def test_one_gradient_alone_is_that_of_the_reference(name, kind, device):
    tensors = tensors_of(kind, device)
    if name in tensors:
        assert_matches_reference(call(), tensors, wrt=[name])


@pytest.mark.kernel
@each_kind
def test_more_hops_than_channels_whose_values_are_the_frames(kind, device):
    """Without `value` the frames have gradients of scores and of values; float32 scores beside 16 bits."""
    tensors = tensors_of(kind, device, value=None, dim=2, dtype=torch.bfloat16)
    for name in ("score_bias", "weight"):
        if name in tensors:
            tensors[name] = tensors[name].float() * 1.001
    assert_matches_reference(call(), tensors, dtype=torch.bfloat16)


@each_impl
@each_kind
def test_hidden_frames_are_never_read(kind, impl, device):
    tensors = tensors_of(kind, device)
    clean = evaluate(call(), tensors, impl)
    hidden = ~tensors["mask"]
    where = {n: hidden[..., None] for n in ("h", "value")} | {n: hidden[:, None] for n in ("score_bias", "weight")}
    where = {n: x for n, x in where.items() if n in tensors}
    filled = {n: tensors[n].clone().masked_fill(x, torch.nan) for n, x in where.items()}
    got = evaluate(call(), tensors | filled, impl)
    assert_close(got, clean)
    for n, x in where.items():
        if n in got.gradients:
            assert largest(got.gradients[n].masked_fill(~x, 0)) == 0, n


@each_impl
@each_kind
@both_forms
def test_sequences_that_see_nothing_give_zeros(ragged, kind, impl, device):
    tensors = tensors_of(kind, device, ragged=ragged)
    assert_zero(evaluate(call(), tensors | {"mask": torch.zeros_like(tensors["mask"])}, impl))


@each_impl
def test_a_hop_whose_weights_are_0_gives_zeros_and_others_do_not(impl, device):
    tensors = tensors_of("weight", device, mask="none")
    tensors["weight"][:, 1] = 0
    mean, std, weights = statistics_pooling(**tensors, hops=R, return_weights=True, impl=impl)
    for x in (mean, std, weights):
        assert largest(x[:, 1]) == 0
    torch.testing.assert_close(weights[:, ::2].sum(-1), torch.ones(len(mean), 2, device=device))


@each_impl
@both_forms
@pytest.mark.parametrize("kind", ["v", "v and bias"])
@pytest.mark.parametrize("deviation", [True, False])
def test_what_is_returned_beside_them(deviation, kind, ragged, impl, device):
    tensors = tensors_of(kind, device, ragged=ragged)
    flags = {f"return_{name}": True for name in ("weights", "log_weights", "scores", "lse")}
    options = {"deviation": deviation, "impl": impl}
    made = statistics_pooling(**tensors, **flags, hops=R, **options)
    alone = []
    for r in range(R):
        ours = tensors | {name: tensors[name][:, r] for name in ("v", "score_bias") if name in tensors}
        alone.append(statistics_pooling(**ours, **flags, **options))
    for got, *want in zip(made, *alone, strict=True):
        torch.testing.assert_close(got, torch.stack(want, 1))
    plain = statistics_pooling(**tensors, hops=R, **options)
    torch.testing.assert_close(plain[0] if deviation else plain, made[0])


@each_impl
def test_jagged_frames(impl, device):
    cu = offsets([3, 0, 5], device)
    h, given, v = (torch.randn(*x, device=device) for x in ((8, 4), (8, R), (4, R)))

    def jagged(x):
        return torch.nested.nested_tensor_from_jagged(x, cu.long())

    for more in ({"v": v}, {}):
        want = statistics_pooling(h, score_bias=given, cu_seqlens=cu, hops=R, return_weights=True, impl=impl, **more)
        got = statistics_pooling(jagged(h), score_bias=jagged(given), hops=R, return_weights=True, impl=impl, **more)
        assert got[2].is_nested
        for x, y in zip((*got[:2], got[2].values()), want, strict=True):
            torch.testing.assert_close(x, y)


@each_impl
def test_the_speakers_of_pyannote(impl, device):
    """``StatsPool`` of weights ``(B, R, T)``: one after the other, the variance divided by v1 - v2 / v1."""
    dtype = torch.float32 if impl == "triton" else torch.float64
    x = torch.randn(2, 8, 5, device=device, dtype=dtype, requires_grad=True)
    weight = torch.rand(2, R, 8, device=device, dtype=dtype, requires_grad=True)
    v1, v2 = weight.sum(-1)[..., None], weight.square().sum(-1)[..., None]
    mean = torch.einsum("brt,btc->brc", weight, x) / v1
    square = (x[:, None] - mean[:, :, None]).square()
    want = torch.cat([mean, (torch.einsum("brt,brtc->brc", weight, square) / (v1 - v2 / v1)).sqrt()], -1)
    got = torch.cat(statistics_pooling(x, weight=weight, hops=R, correction=1.0, floor=0.0, impl=impl), -1)
    torch.testing.assert_close(got, want)
    cotangent = torch.randn_like(want)
    ours, theirs = (torch.autograd.grad(y, (x, weight), cotangent) for y in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.kernel
def test_scores_of_all_hops_are_made_once_and_no_frame_is_copied(monkeypatch, device):
    """One operator for the scores, and one a hop that is given the values as they are."""
    from fused_attn import location, statistics

    seen = []
    for module, name in ((location, "LOCATION"), (statistics, "LOCATION"), (statistics, "_STATISTICS")):
        operator = getattr(module, name)

        def noted(inputs, *args, run=operator, name=name):
            seen.append((name, inputs.h.data_ptr()))
            return run(inputs, *args)

        monkeypatch.setattr(module, name, noted)
    h = torch.randn(2, 8, 4, device=device)
    v = torch.randn(4, R, device=device)
    statistics_pooling(h, v=v, hops=R, impl="triton")
    assert seen == [("LOCATION", h.data_ptr()), *[("_STATISTICS", h.data_ptr())] * R]
    seen.clear()
    statistics_pooling(h, v=v, hops=R, deviation=False, impl="triton")
    assert seen == [("LOCATION", h.data_ptr())]


ERRORS = {
    "no weights": ({"hops": 2}, ValueError, "hops: expected None without v, score_bias and weight"),
    "none of them": ({"hops": 0, "v": (3, 2)}, ValueError, "hops: expected at least 1; got 0"),
    "no number": ({"hops": True, "v": (3, 1)}, TypeError, "hops: expected an int; got bool"),
    "v of others": (
        {"hops": 2, "v": (3, 3)},
        ValueError,
        "v: expected shape (A, R) with A = 3 from h, R = 2 from hops",
    ),
    "v of one": ({"hops": 2, "v": (3,)}, ValueError, "v: expected shape (A, R)"),
    "weights of frames first": (
        {"hops": 2, "weight": (2, 5, 2)},
        ValueError,
        "weight: expected shape (B, R, T) with B = 2 from h, R = 2 from hops, T = 5 from h; got (2, 5, 2)",
    ),
    "a bias for all": (
        {"hops": 2, "v": (3, 2), "score_bias": (2, 5)},
        ValueError,
        "score_bias: expected shape (B, R",
    ),
    "too many for the kernel": (
        {"hops": 129, "v": (3, 129), "impl": "triton"},
        ValueError,
        "impl: ",
    ),
}


@pytest.mark.parametrize(("given", "error", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_name_the_argument(given, error, text):
    assert_raises(given, error, text)


def test_a_negative_weight_is_an_error_where_it_is_seen():
    h, weight = torch.rand(2, 5, 3), torch.rand(2, R, 5)
    weight[1, 2, 4] = -1
    with pytest.raises(ValueError, match=r"^weight: expected no negative weight"):
        statistics_pooling(h, weight=weight, hops=R)
    statistics_pooling(h, weight=weight, hops=R, mask=(weight >= 0).all(1))


@each_impl
@pytest.mark.parametrize("deviation", [True, False])
def test_the_module_is_the_function(deviation, impl, device):
    module = StatisticsPooling(4, 5, hops=R, global_context=True, deviation=deviation).to(device)
    h, bias = torch.randn(2, 6, 4, device=device), torch.randn(2, R, 6, device=device)
    pooled, weights = module(h, score_bias=bias, return_weights=True, impl=impl)
    assert pooled.shape == (2, R, 8 if deviation else 4)
    context = module.context(torch.cat(statistics_pooling(h), -1))
    layers = module.proj.weight.T, module.proj.bias, module.score.weight.T
    *want, want_weights = statistics_pooling(
        h, *layers, context=context, score_bias=bias, hops=R, deviation=deviation, return_weights=True, impl=impl
    )
    torch.testing.assert_close(pooled, torch.cat(want, -1))
    torch.testing.assert_close(weights, want_weights)
    pooled.sum().backward()
    assert all(x.grad.count_nonzero() for x in module.parameters())
    assert f"hops={R}" in repr(module)


def test_the_module_has_hops_or_channels():
    with pytest.raises(ValueError, match=r"^hops: expected None with per_channel"):
        StatisticsPooling(4, 5, hops=2, per_channel=True)
