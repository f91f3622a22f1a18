"""Statistics pooling of scores and weights that are given; the mean alone, and what a deviation is made of."""

import itertools

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
from fused_attn.kernels import statistics as kernels

each_impl = pytest.mark.parametrize("impl", IMPLS)
KINDS = ("frame", "channel", "frame, scored", "channel, scored", "frame weight", "channel weight")
each_kind = pytest.mark.parametrize("kind", KINDS)
OPTIONS = {
    "plain": {},
    "mean": {"deviation": False},
    "unbiased": {"correction": 1.0},
    "limits": {"floor": 0.6, "ceiling": 0.9, "eps": 0.1},
    "all": {"correction": 0.7, "floor": 0.6, "ceiling": 1.3, "eps": 0.2},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def tensors_of(kind: str, device: torch.device, *, ragged: bool = False, **more) -> dict[str, Tensor]:
    """Frames, some of them hidden, and what weights them."""
    channel = kind.startswith("channel")
    sizes = {"rows": 40, "dim": 9, "mask": "random", "attn_dim": 5, "ragged": ragged} | more
    case = Case(per_channel=channel, **sizes)
    made = case.tensors(device)
    if "scored" not in kind:
        made = {name: x for name, x in made.items() if name not in ("w", "b", "v", "context")}
    shape = made["h"].shape if channel else made["h"].shape[:-1]
    given = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device, case.dtype)
    if "weight" in kind:
        given = given.abs()
        given.view(-1, *shape[1 if ragged else 2 :])[3:6] = 0  # a weight of 0 has a gradient
        return made | {"weight": given}
    return made | {"score_bias": given}


def call(*, return_weights=True, **options):
    """The statistics one after the other, and the weights."""

    def op(**arguments):
        *statistics, weights = statistics_pooling(**arguments, **options, return_weights=return_weights)
        return torch.cat(statistics, -1), weights

    return op


def by_hand(*, impl, h, w=None, b=None, v=None, score_bias=None, weight=None, mask=None, cu_seqlens=None, **options):
    """Sequence by sequence: the oracle, which calls nothing of the package."""
    o = {"deviation": True, "correction": 0.0, "floor": 1e-12, "ceiling": torch.inf, "eps": 0.0} | options
    spans = range(len(h)) if cu_seqlens is None else [slice(*x) for x in itertools.pairwise(cu_seqlens.tolist())]
    pooled, weights = [], []
    for at in spans:
        seen = (mask[at] if mask is not None else torch.ones(h[at].shape[:-1], device=h.device)).bool()
        x = h[at][seen]
        if weight is not None:
            shares = weight[at][seen]
            alpha = shares / shares.sum(0)
        else:
            score = score_bias[at][seen]
            alpha = (score if v is None else score + torch.tanh(x @ w + b) @ v).softmax(0)
        whole = alpha.new_zeros(len(seen), *alpha.shape[1:]).index_put((seen.nonzero()[:, 0],), alpha)
        weights.append(whole)
        alpha = alpha if alpha.dim() == 2 else alpha[:, None]
        mean = (alpha * x).sum(0)
        var = (alpha * (x - mean) ** 2).sum(0) / (1 - o["correction"] * (alpha**2).sum(0))
        std = (var.clamp(o["floor"], o["ceiling"]) + o["eps"]).sqrt()
        one = torch.cat([mean, std] if o["deviation"] else [mean])
        pooled.append(
            one
            if len(x)
            else sum(y.sum() for y in (h, weight, score_bias) if y is not None) * one.new_zeros(one.shape)
        )
    return torch.stack(pooled), (torch.stack if cu_seqlens is None else torch.cat)(weights)


@each_kind
@each_option
@both_forms
def test_reference_is_the_formula(ragged, options, kind, device):
    tensors = in_double(tensors_of(kind, device, ragged=ragged))
    want = evaluate(lambda **x: by_hand(**x, **options), tensors, "reference")
    assert_close(evaluate(call(**options), tensors, "reference"), want)


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
@each_option
def test_parts_of_a_sequence_match_the_reference(monkeypatch, options, kind, device):
    """More of them than the merge takes at a time; with values of other numbers of channels, in 16 bits."""
    monkeypatch.setattr(kernels, "_rows_per_item", lambda call, ragged, channel_blocks, block_t: 16)
    tensors = tensors_of(kind, device, rows=300, batch=1, dtype=torch.bfloat16)
    assert_matches_reference(call(**options), tensors, dtype=torch.bfloat16)


@pytest.mark.kernel
@pytest.mark.parametrize("kind", ["frame", "channel", "channel, scored"])
@pytest.mark.parametrize("parts", [False, True])
def test_squares_of_weights_are_joined_about_one_pivot(monkeypatch, parts, kind, device):
    """Scores rise from tile to tile, so that what was summed before is scaled each time."""
    if parts:
        monkeypatch.setattr(kernels, "_rows_per_item", lambda call, ragged, channel_blocks, block_t: 16)
    tensors = tensors_of(kind, device, rows=100, mask="none")
    steps = torch.arange(100, device=device).view(-1, *[1] * (tensors["score_bias"].dim() - 2))
    tensors["score_bias"] = tensors["score_bias"] + steps / 16
    got = statistics_pooling(**tensors, correction=1.0, impl="triton")[1]
    want = statistics_pooling(**in_double(tensors), correction=1.0, impl="reference")[1]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


@pytest.mark.kernel
@each_kind
@pytest.mark.parametrize("options", [{}, {"correction": 1.0}], ids=["plain", "unbiased"])
@pytest.mark.parametrize("name", ["h", "w", "v", "score_bias", "weight"])
def test_one_gradient_alone_is_that_of_the_reference(name, options, kind, device):
    tensors = tensors_of(kind, device)
    if name in tensors:
        assert_matches_reference(call(**options), tensors, wrt=[name])


@pytest.mark.kernel
@pytest.mark.parametrize("kind", ["frame", "channel", "channel, scored", "frame weight", "channel weight"])
def test_scores_of_float32_beside_frames_of_16_bits(kind, device):
    tensors = tensors_of(kind, device, dtype=torch.bfloat16)
    name = "weight" if "weight" in kind else "score_bias"
    tensors[name] = tensors[name].float() * 1.001
    assert_matches_reference(call(), tensors, dtype=torch.bfloat16)


@each_impl
@each_kind
@each_option
def test_hidden_frames_are_never_read(options, kind, impl, device):
    tensors = tensors_of(kind, device)
    clean = evaluate(call(**options), tensors, impl)
    hidden = ~tensors["mask"]
    names = [name for name in ("h", "score_bias", "weight") if name in tensors]
    filled = {
        n: tensors[n].clone().masked_fill(hidden if tensors[n].dim() == 2 else hidden[..., None], torch.nan)
        for n in names
    }
    got = evaluate(call(**options), tensors | filled, impl)
    assert_close(got, clean)
    assert all(largest(got.gradients[n][hidden]) == 0 for n in names)


@each_impl
@each_kind
@each_option
@both_forms
def test_sequences_that_see_nothing_give_zeros(ragged, options, kind, impl, device):
    tensors = tensors_of(kind, device, ragged=ragged)
    assert_zero(evaluate(call(**options), tensors | {"mask": torch.zeros_like(tensors["mask"])}, impl))
    if "weight" in kind:
        zero = tensors | {"weight": torch.zeros_like(tensors["weight"])}
        assert_zero(evaluate(call(**options), zero, impl))


@each_impl
@each_kind
def test_one_frame_has_no_unbiased_deviation(kind, impl, device):
    tensors = tensors_of(kind, device, rows=1, mask="none")
    if "weight" in kind:
        tensors["weight"] = torch.full_like(tensors["weight"], 0.3)
    result = evaluate(call(correction=1.0, floor=0.0), tensors, impl)
    assert largest(result.outputs["output"][:, 9:]) == 0
    assert all(x.isfinite().all() for x in result.gradients.values())


@each_impl
@pytest.mark.parametrize("correction", [0.0, 1.0, 1.5])
def test_of_equal_weights_the_correction_is_that_of_torch(correction, impl, device):
    h = torch.randn(2, 9, 4, dtype=torch.float32 if impl == "triton" else torch.float64, device=device)
    want = h.std(1, correction=correction)
    for more in ({}, {"weight": torch.full_like(h[..., 0], 0.25)}, {"score_bias": torch.ones_like(h)}):
        torch.testing.assert_close(statistics_pooling(h, **more, correction=correction, impl=impl)[1], want)


@each_impl
def test_weights_may_have_any_scale(impl, device):
    """They are divided by their sum."""
    h, weight = torch.randn(2, 9, 4, device=device), torch.rand(2, 9, device=device)
    want = torch.stack(statistics_pooling(h, weight=weight, correction=1.0, impl=impl))
    for scale in (2.0**-60, 2.0**60):
        got = torch.stack(statistics_pooling(h, weight=weight * scale, correction=1.0, impl=impl))
        torch.testing.assert_close(got, want)


@each_impl
@pytest.mark.parametrize("ragged", [False, True])
def test_scores_log_weights_and_lse_of_what_is_given(ragged, impl, device):
    tensors = tensors_of("channel", device, ragged=ragged)
    flags = {f"return_{name}": True for name in ("weights", "log_weights", "scores", "lse")}
    mean, weights, logs, scores, lse = statistics_pooling(**tensors, **flags, deviation=False, impl=impl)
    want = tensors["score_bias"].masked_fill(~tensors["mask"][..., None], -torch.inf)
    assert torch.equal(scores, want)
    torch.testing.assert_close(logs.exp(), weights)
    if not ragged:
        torch.testing.assert_close(lse, want.logsumexp(1))
    torch.testing.assert_close(statistics_pooling(**tensors, deviation=False, impl=impl), mean)


@each_impl
def test_jagged_scores_and_weights(impl, device):
    cu = offsets([3, 0, 5], device)
    h, given = torch.randn(8, 4, device=device), torch.rand(8, 4, device=device)

    def jagged(x):
        return torch.nested.nested_tensor_from_jagged(x, cu.long())

    for name in ("score_bias", "weight"):
        want = torch.stack(statistics_pooling(h, cu_seqlens=cu, **{name: given}, impl=impl))
        got = torch.stack(statistics_pooling(jagged(h), **{name: jagged(given)}, impl=impl))
        torch.testing.assert_close(got, want)
        with pytest.raises(ValueError, match=f"^{name}: expected a jagged tensor"):
            statistics_pooling(jagged(h), **{name: given})


# --- Layers of others --------------------------------------------------------------------------------------------


def agree(ours, theirs, **tensors: Tensor) -> None:
    """Two functions of tensors, their results and all gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    got, want = ours(**leaves), theirs(**leaves)
    torch.testing.assert_close(got, want)
    cotangent = torch.randn(want.shape, generator=torch.Generator().manual_seed(3)).to(want)
    pairs = zip(*(torch.autograd.grad(y, leaves.values(), cotangent) for y in (got, want)), strict=True)
    for name, (a, b) in zip(leaves, pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5, msg=name)


def numbers(*shape: int, impl: str, device) -> Tensor:
    """In float64 of what is no kernel."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return made.to(device, torch.float32 if impl == "triton" else torch.float64)


@each_impl
@pytest.mark.parametrize("gate", ["softmax", "channels", "one"])
def test_aggregations_of_pyg(gate, impl, device):
    """``SoftmaxAggregation`` with its learned t, and ``AttentionalAggregation`` with a gate a channel, or one."""
    x, index = numbers(11, 4, impl=impl, device=device), torch.tensor([0] * 5 + [2] * 6, device=device)
    cu = offsets([5, 0, 6], device)
    t = (
        numbers(1, 4, impl=impl, device=device)
        if gate == "softmax"
        else numbers(11, 4 if gate == "channels" else 1, impl=impl, device=device)
    )

    def theirs(x, t):
        s = x * t if gate == "softmax" else t
        alpha = torch.cat([part.softmax(0) for part in s.split([5, 6])])
        return x.new_zeros(3, 4).index_add(0, index, alpha * x)

    def ours(x, t):
        s = x * t if gate == "softmax" else t
        s = s.squeeze(1) if gate == "one" else s
        return statistics_pooling(x, score_bias=s, deviation=False, cu_seqlens=cu, impl=impl)

    agree(ours, theirs, x=x, t=t)


@each_impl
def test_the_stats_pool_of_pyannote(impl, device):
    """Weights of frames, as a segmentation gives them: the variance is divided by v1 - v2 / v1."""

    def theirs(x, weight):
        v1, v2 = weight.sum(1, keepdim=True), weight.square().sum(1, keepdim=True)
        mean = (x * weight[..., None]).sum(1) / v1
        var = ((x - mean[:, None]).square() * weight[..., None]).sum(1) / (v1 - v2 / v1)
        return torch.cat([mean, var.sqrt()], 1)

    def ours(x, weight):
        return torch.cat(statistics_pooling(x, weight=weight, correction=1.0, floor=0.0, impl=impl), -1)

    made = numbers(3, 8, 5, impl=impl, device=device)
    agree(ours, theirs, x=made, weight=numbers(3, 8, impl=impl, device=device).sigmoid())


@each_impl
def test_the_channel_attention_of_espnet(impl, device):
    """``ChnAttnStatPooling``: a softmax a channel, and a variance as a difference of moments between two bounds."""

    def theirs(x, s):
        alpha = s.softmax(1)
        mean = (x * alpha).sum(1)
        var = (x.square() * alpha).sum(1) - mean.square()
        return torch.cat([mean, var.clamp(min=1e-4, max=1e4).sqrt()], 1)

    def ours(x, s):
        return torch.cat(statistics_pooling(x, score_bias=s, floor=1e-4, ceiling=1e4, impl=impl), -1)

    x = numbers(3, 8, 5, impl=impl, device=device)
    x[..., 0] /= 200  # under the floor
    x[..., 1] *= 300  # over the ceiling
    agree(ours, theirs, x=x, s=numbers(3, 8, 5, impl=impl, device=device) / 2)


@each_impl
def test_the_statistics_of_wespeaker(impl, device):
    """``TSTP``: the unbiased variance, and 1e-7 under the root."""

    def theirs(x):
        return torch.cat([x.mean(1), (x.var(1) + 1e-7).sqrt()], 1)

    def ours(x):
        return torch.cat(statistics_pooling(x, correction=1.0, floor=0.0, eps=1e-7, impl=impl), -1)

    agree(ours, theirs, x=numbers(3, 8, 5, impl=impl, device=device))


# --- The module, and errors --------------------------------------------------------------------------------------


ERRORS = {
    "v beside a weight": ({"weight": (2, 5), "v": (3,)}, ValueError, "v: expected None with weight"),
    "both": ({"weight": (2, 5), "score_bias": (2, 5)}, ValueError, "score_bias: expected None with weight"),
    "scores of a weight": ({"weight": (2, 5), "return_scores": True}, ValueError, "return_scores: expected False"),
    "lse of a weight": ({"weight": (2, 5), "return_lse": True}, ValueError, "return_lse: expected False"),
    "weights of other frames": ({"weight": (2, 4)}, ValueError, "weight: expected shape (B, T) or (B, T, C)"),
    "other channels": ({"score_bias": (2, 5, 4)}, ValueError, "score_bias: expected shape (B, T) or (B, T, C)"),
    "channels beside v": (
        {"score_bias": (2, 5, 3), "v": (3,)},
        ValueError,
        "score_bias: expected one number a frame, as v is one for all channels; got shape (2, 5, 3)",
    ),
    "frames beside v": (
        {"score_bias": (2, 5), "v": (3, 3)},
        ValueError,
        "score_bias: expected one number a channel, as v; got shape (2, 5)",
    ),
    "deviation": ({"deviation": 1}, TypeError, "deviation: expected True or False"),
    "correction": ({"correction": -1.0}, ValueError, "correction: expected a finite number of at least 0"),
    "eps": ({"eps": -1.0}, ValueError, "eps: expected a finite number of at least 0"),
    "ceiling": (
        {"ceiling": 0.5, "floor": 1.0},
        ValueError,
        "ceiling: expected a finite number of at least the floor",
    ),
}


@pytest.mark.parametrize(("given", "error", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_name_the_argument(given, error, text):
    assert_raises(given, error, text)


def test_a_negative_weight_is_an_error_where_it_is_seen():
    h, weight = torch.rand(2, 5, 3), torch.rand(2, 5)
    weight[1, 2] = -1
    with pytest.raises(ValueError, match=r"^weight: expected no negative weight"):
        statistics_pooling(h, weight=weight)
    statistics_pooling(h, weight=weight, mask=weight >= 0)


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_module_has_the_options_of_the_function(per_channel, device):
    limits = {"correction": 1.0, "floor": 0.1, "ceiling": 0.5, "eps": 0.01}
    module = StatisticsPooling(3, 2, per_channel=per_channel, **limits).to(device)
    h = torch.randn(2, 5, 3, device=device)
    bias = torch.randn(2, 5, 3, device=device) if per_channel else torch.randn(2, 5, device=device)
    v = module.score.weight.T if per_channel else module.score.weight[0]
    want = statistics_pooling(h, module.proj.weight.T, module.proj.bias, v, score_bias=bias, **limits)
    torch.testing.assert_close(module(h, score_bias=bias), torch.cat(want, -1))
    alone = StatisticsPooling(3, 2, per_channel=per_channel, deviation=False).to(device)
    alone.load_state_dict(module.state_dict())
    assert torch.equal(alone(h, score_bias=bias), want[0])
    assert "correction=1.0" in repr(module)
