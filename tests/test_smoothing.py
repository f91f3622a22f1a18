"""Weights that are sigmoids over their sum: `score_activation="logsigmoid"`."""

import dataclasses

import _concat
import _general
import pytest
import torch
from _compare import IMPLS, assert_close, assert_matches_reference, evaluate, in_double
from _location import Case

from fused_attn import (
    ConcatAttention,
    GeneralAttention,
    LocationAttention,
    LocationAwareAttention,
    concat_attention,
    general_attention,
    location_attention,
    location_aware_attention,
    location_aware_sequence,
    merge,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CASES = [
    Case(rows=21),
    *(
        Case(rows=63, score="gated_hops", context="row", value=7, score_bias=True, mask="random", dtype=t)
        for t in DTYPES
    ),
    Case(rows=70, ragged=True, score="linear", score_bias=True, mask="empty"),
    Case(rows=257, score="linear_hops", hops=20, through=("weights",)),
    Case(rows=100, score="projected", context="sequence", value=45, dropout_p=0.3, dtype=torch.bfloat16),
    Case(rows=100, score="projected_hops", context="sequence", mask="padding", layout="strided", activation="relu"),
    Case(batch=1, rows=3000, dim=16, score="mlp", mask="padding"),
]


def smooth(op):
    return lambda **given: op(score_activation="logsigmoid", **given)


def assert_is(op, by_hand, tensors, impl, **options):
    """The reference in float64 is what is written by hand, and the kernel as near to it as all are."""
    if impl == "triton":
        assert_matches_reference(op, tensors, **options)
        return
    got, want = (evaluate(fn, in_double(tensors), "reference") for fn in (op, by_hand))
    for of_got, of_want in zip(got, want, strict=True):
        for name, x in of_want.items():
            torch.testing.assert_close(of_got[name], x, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.kernel
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_matches_the_reference(case, device):
    assert_matches_reference(smooth(case.op), case.tensors(device), dtype=case.dtype, through=case.through)


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["h", "w", "v", "score_bias", "context"])
def test_one_gradient_alone_is_that_of_the_reference(name, device):
    case = Case(rows=21, score="mlp_hops", context="sequence", score_bias=True)
    assert_matches_reference(smooth(case.op), case.tensors(device), wrt=[name])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shift", [0.0, -80.0, 30.0, -1e4])
def test_weights_are_sigmoids_over_their_sum(shift, impl, device):
    """Also where the sigmoid underflows, and where it is 1; by the definition, in float64."""
    case = Case(rows=19, score="mlp", score_bias=True, mask="random", value=5)
    tensors = case.tensors(device)
    tensors["score_bias"] = tensors["score_bias"] + shift

    def by_hand(*, impl, h, w, b, v, value, score_bias, mask):
        logs = torch.nn.functional.logsigmoid(torch.tanh(h @ w + b) @ v + score_bias)
        s = torch.sigmoid(torch.tanh(h @ w + b) @ v + score_bias) if shift > -100 else logs.exp()
        s = torch.where(mask, s, 0) if shift > -100 else logs.masked_fill(~mask, -torch.inf).softmax(1)
        alpha = s / s.sum(1, keepdim=True)
        return (alpha[:, None] @ value)[:, 0], alpha

    assert_is(smooth(case.op), by_hand, tensors, impl, large=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("window", [(None, 0), (2, 3)])
@pytest.mark.parametrize("score", ["linear_hops", "mlp"])
def test_a_window_has_the_same_scores(score, window, impl, device):
    case = Case(rows=21, score=score, mask="random", score_bias=True)
    op = smooth(case.op)
    tensors = case.tensors(device)
    tensors["mask"][:, 0] = True

    def by_hand(*, impl, h, w, b, score_bias, mask, v=None):
        z = h @ w + b
        s = (z if v is None else (torch.tanh(z) @ v)[..., None]) if v is not None else torch.tanh(z)
        s = torch.nn.functional.logsigmoid(s + score_bias[..., None]).masked_fill(~mask[..., None], -torch.inf)
        i = torch.arange(h.shape[1], device=h.device)
        near = torch.ones(len(i), len(i), dtype=torch.bool, device=h.device)
        near = near if window[0] is None else near & (i >= i[:, None] - window[0])
        near = near if window[1] is None else near & (i <= i[:, None] + window[1])
        weights = s.mT[:, :, None].masked_fill(~near, -torch.inf)
        blind = (weights == -torch.inf).all(-1, keepdim=True)
        weights = weights.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
        out = (weights @ h[:, None]).transpose(1, 2)
        return (out, weights) if v is None else (out[:, :, 0], weights[:, 0])

    assert_is(lambda **given: op(window=window, **given), by_hand, tensors, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("window", [(None, 0), (2, 3)])
@pytest.mark.parametrize("name", ["h", "score_bias"])
def test_a_row_of_nan_that_only_the_window_hides_has_no_gradient(name, window, impl, device):
    """0 times the slope of log σ at NaN is NaN: no row of NaN may meet it."""
    case = Case(rows=21, score="mlp", score_bias=True)
    clean = case.tensors(device)
    spoilt = {**clean, name: clean[name].index_fill(1, torch.tensor([20], device=device), torch.nan)}

    def seen(**given):
        return smooth(case.op)(window=window, **given)[0][:, :8]

    of_clean, of_spoilt = (evaluate(seen, tensors, impl) for tensors in (clean, spoilt))
    for got, want in zip(of_spoilt, of_clean, strict=True):
        for at, x in want.items():
            torch.testing.assert_close(got[at], x, msg=lambda text, at=at: f"{at}: {text}")


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_and_states_are_of_the_logarithm(impl, device):
    tensors = dataclasses.replace(Case(rows=21), bias=False).tensors(device)
    h, w, v = tensors["h"], tensors["w"], tensors["v"]
    options = {"v": v, "score_activation": "logsigmoid", "impl": impl}
    out, scores, lse = location_attention(h, w, **options, return_scores=True, return_lse=True)
    want = torch.nn.functional.logsigmoid(torch.tanh(h @ w) @ v)
    torch.testing.assert_close(scores, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want.logsumexp(1), rtol=1e-4, atol=1e-5)
    parts = [location_attention(x.contiguous(), w, **options, return_state=True) for x in h.split(8, 1)]
    torch.testing.assert_close(merge(parts).out, out, rtol=1e-4, atol=1e-5)


def aware(device, channels=(), steps=(), *, keys=13, attn_dim=6, filters=2):
    torch.manual_seed(0)
    tensors = {
        "query": torch.randn(3, *steps, attn_dim),
        "key": torch.randn(3, keys, attn_dim),
        "value": torch.randn(3, keys, 5),
        "v": torch.randn(attn_dim),
        "previous": torch.rand(3, *channels, keys),
        "conv_weight": torch.randn(filters, *channels, 3),
        "u": torch.randn(filters, attn_dim),
        "score_bias": torch.randn(3, keys),
    }
    tensors["mask"] = torch.arange(keys) < torch.tensor([[keys], [5], [0]])
    return {name: x.to(device) for name, x in tensors.items()}


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [(), (2,)])
def test_a_location_aware_step_matches_the_reference(channels, dtype, device):
    tensors = {n: x.to(dtype) if x.is_floating_point() else x for n, x in aware(device, channels).items()}
    assert_matches_reference(smooth(location_aware_attention), tensors, dtype=dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_location_aware_weights_are_sigmoids_over_their_sum(impl, device):
    """Of keys that are hidden and NaN too; a step, and steps that see each other's weights."""
    tensors = aware(device)
    tensors["key"][1, 5:] = tensors["value"][1, 7:] = torch.nan

    def by_hand(*, impl, query, key, value, v, previous, conv_weight, u, score_bias, mask):
        key, value = (x.masked_fill(~mask[..., None], 0) for x in (key, value))
        seen = previous.masked_fill(~mask, 0)
        f = torch.nn.functional.conv1d(seen[:, None], conv_weight[:, None], padding=1)
        s = torch.sigmoid(torch.tanh(query[:, None] + key + f.mT @ u) @ v + score_bias).masked_fill(~mask, 0)
        alpha = s / s.sum(1, keepdim=True).clamp(min=1e-30)
        return (alpha[:, None] @ value)[:, 0], alpha

    assert_is(smooth(location_aware_attention), by_hand, tensors, impl)
    _, weights, scores = smooth(location_aware_attention)(**tensors, return_scores=True, impl=impl)
    torch.testing.assert_close(scores.softmax(1)[:2], weights[:2])
    assert (scores[tensors["mask"]] < 0).all()

    def steps_by_hand(*, query, previous, **given):
        found = []
        for step in query.unbind(1):
            found.append(by_hand(query=step, previous=previous, **given))
            previous = found[-1][1]
        return tuple(torch.stack(x, 1) for x in zip(*found, strict=True))

    tensors["query"] = torch.randn(3, 4, 6, device=device)
    assert_is(smooth(location_aware_sequence), steps_by_hand, tensors, impl)


def walk(cumulative):
    return smooth(lambda **given: location_aware_sequence(**given, cumulative=cumulative))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [(), (2,)])
@pytest.mark.parametrize("cumulative", [False, True], ids=["last", "sum"])
def test_a_sequence_of_steps_matches_the_reference(cumulative, channels, dtype, device):
    tensors = {n: x.to(dtype) if x.is_floating_point() else x for n, x in aware(device, channels, (4,)).items()}
    assert_matches_reference(walk(cumulative), tensors, dtype=dtype)


@pytest.mark.kernel
@pytest.mark.parametrize("sizes", [{"keys": 40}, {"attn_dim": 70}, {"keys": 19, "filters": 35}], ids=str)
def test_a_sequence_of_more_than_a_tile_matches_the_reference(sizes, device):
    tensors = aware(device, (), (3,), **sizes)
    tensors["v"] /= tensors["v"].shape[0] ** 0.5
    assert_matches_reference(walk(True), tensors)


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["query", "key", "v", "previous", "conv_weight", "u", "score_bias"])
def test_one_gradient_alone_of_a_sequence_is_that_of_the_reference(name, device):
    assert_matches_reference(walk(False), aware(device, (), (3,)), wrt=[name])


@pytest.mark.kernel
@pytest.mark.parametrize("shift", [-1e4, -80.0, 14.0, 1e4])
def test_a_sequence_at_any_size_of_the_scores(shift, device):
    """Gradients of the scores by themselves, which are small where σ is near 1."""
    tensors = aware(device, (), (4,))
    tensors["score_bias"] = tensors["score_bias"] + shift
    assert_matches_reference(walk(False), tensors, wrt=["query", "key", "v", "score_bias"], large=True)


@pytest.mark.kernel
def test_a_sequence_never_reads_what_is_hidden(device):
    clean = aware(device, (), (4,))
    spoilt = {name: x.clone() for name, x in clean.items()}
    for name in ("key", "value", "score_bias"):
        spoilt[name][~clean["mask"]] = torch.nan
    spoilt["query"][2] = torch.nan
    assert_close(*(evaluate(walk(True), tensors, "triton") for tensors in (spoilt, clean)))


def pairs(device, heads, queries=1, dtype=torch.float32):
    torch.manual_seed(0)
    lead = (3,) if heads is None else (3, heads)
    made = {
        "query": torch.randn(*lead, queries, 6),
        "key": torch.randn(*lead, 9, 6),
        "value": torch.randn(*lead, 9, 5),
    }
    made["v"] = torch.randn(6) if heads is None else torch.randn(heads, 6)
    made["score_bias"] = torch.randn(*[1] * len(lead), queries, 9)
    made = {name: x.to(device, dtype) for name, x in made.items()}
    made["mask"] = torch.arange(9, device=device) < torch.tensor([[9], [4], [0]], device=device)
    return made


def pairs_by_hand(additive):
    def by_hand(*, impl, query, key, value, score_bias, mask, v=None):
        if additive:
            v = v if v.dim() == 1 else v[:, None, None]
            s = (torch.tanh(query[..., None, :] + key[..., None, :, :]) * v).sum(-1)
        else:
            s = 0.7 * query @ key.mT
        s = torch.sigmoid(s + score_bias).masked_fill(~mask[:, None] if s.dim() == 3 else ~mask[:, None, None], 0)
        alpha = s / s.sum(-1, keepdim=True).clamp(min=1e-300)
        return alpha @ value, alpha

    return by_hand


both_scores = pytest.mark.parametrize("additive", [False, True], ids=["general", "concat"])


def attend(additive):
    """One of the two with the options of `pairs_by_hand`."""
    op, options = (concat_attention, {}) if additive else (general_attention, {"scale": 0.7})
    return lambda **given: op(**given, **options, return_weights=True)


def without(name, tensors):
    return {other: x for other, x in tensors.items() if other != name}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("heads", [None, 1, 3])
def test_a_step_of_concat(heads, impl, device):
    op = smooth(lambda **given: concat_attention(**given, return_weights=True))
    assert_is(op, pairs_by_hand(True), pairs(device, heads), impl)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_step_of_concat_in_16_bits(dtype, device):
    op = smooth(lambda **given: concat_attention(**given, return_weights=True))
    assert_matches_reference(op, pairs(device, 2, dtype=dtype), dtype=dtype)


# What pairs of queries and keys have: tiles that are seen whole, in part, and past the ends.
OF_PAIRS = {
    "plain": {},
    "a step": {"queries": 1, "keys": 130, "return_weights": False},
    "window": {"queries": 70, "keys": 130, "window": (30, 0), "return_weights": False},
    "mask": {"mask": "keys", "heads": 2},
    "everything": {"heads": 2, "mask": "pairs", "score_bias": "bhqk", "window": (9, 4), "dropout_p": 0.3},
    "relu": {"activation": "relu", "mask": "empty", "score_bias": "k"},
    "wide": {"attn_dim": 70, "value_dim": 70, "through": ("weights",)},
    "ragged": {"ragged": True, "heads": 2, "mask": "keys", "window": (None, 2), "dropout_p": 0.3},
}
PAIRED = {"general": _general.Case, "concat": _concat.Case}
paired = pytest.mark.parametrize("make", PAIRED.values(), ids=PAIRED.keys())


@pytest.mark.kernel
@paired
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OF_PAIRS.values(), ids=OF_PAIRS.keys())
def test_the_kernel_of_pairs_matches_the_reference(options, dtype, make, device):
    case = make(dtype, **options)
    assert_matches_reference(smooth(case.op), case.tensors(device), dtype=dtype, through=case.through)


@pytest.mark.parametrize("options", OF_PAIRS.values(), ids=OF_PAIRS.keys())
def test_concat_in_blocks_matches_the_reference(options, device):
    """As "auto" is on a CPU."""
    case = _concat.Case(**options)
    tensors = case.tensors(device)
    assert_matches_reference(smooth(case.op), tensors, impl="auto", through=case.through)
    got, want = (evaluate(smooth(case.op), in_double(tensors), impl) for impl in ("auto", "reference"))
    assert_close(got, want)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", ["none", "matrix"])
def test_the_kernel_of_keys_that_are_values_matches_the_reference(weight, dtype, device):
    case = _general.Case(dtype, own_value=False, weight=weight, mask="padding")
    assert_matches_reference(smooth(case.op), case.tensors(device), dtype=dtype)


@pytest.mark.kernel
@paired
@pytest.mark.parametrize("name", ["query", "key", "value", "score_bias"])
def test_one_gradient_alone_of_pairs_is_that_of_the_reference(name, make, device):
    case = make(heads=2, score_bias="hqk")
    assert_matches_reference(smooth(case.op), case.tensors(device), wrt=[name])


@pytest.mark.parametrize("impl", IMPLS)
@both_scores
@pytest.mark.parametrize("shift", [-80.0, 30.0, 1e4, -1e4])
def test_pairs_at_any_size_of_the_scores(shift, additive, impl, device):
    """Where the sigmoid underflows too, and where it is 1; far below 0 the softmax is that of the scores."""
    tensors = pairs(device, 2, 4) if additive else without("v", pairs(device, 2, 4))
    tensors["score_bias"] = tensors["score_bias"] + shift
    plain = attend(additive)
    by_hand = pairs_by_hand(additive) if shift > -100 else lambda *, impl, **given: plain(impl=impl, **given)
    assert_is(smooth(plain), by_hand, tensors, impl, large=True)


@pytest.mark.kernel
@both_scores
@pytest.mark.parametrize("shift", [8.0, 14.0])
def test_a_small_slope_is_not_lost(shift, additive, device):
    """It is 1 - σ(s), of which a difference would leave nothing."""
    tensors = pairs(device, 2, 4) if additive else without("v", pairs(device, 2, 4))
    tensors["score_bias"] = tensors["score_bias"] + shift
    assert_matches_reference(smooth(attend(additive)), tensors, wrt=["query", "key", "score_bias"], large=True)


@pytest.mark.parametrize("impl", IMPLS)
@paired
def test_scores_and_states_of_pairs_are_of_the_logarithm(make, impl, device):
    case = dataclasses.replace(make(heads=2, mask="keys", score_bias="hqk"), return_weights=False)
    tensors = case.tensors(device)
    raw = case.op(**tensors, impl="reference", return_scores=True)[1]
    want = torch.where(raw == -torch.inf, raw, torch.nn.functional.logsigmoid(raw))
    out, log_weights, scores, lse = smooth(case.op)(
        **tensors, impl=impl, return_log_weights=True, return_scores=True, return_lse=True
    )
    torch.testing.assert_close(scores, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want.logsumexp(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_weights, want.log_softmax(-1), rtol=1e-4, atol=1e-5)
    halves = []
    for keys in (slice(0, 20), slice(20, None)):
        of_keys = {"key": -2, "value": -2, "score_bias": -1, "mask": -1}
        part = {
            n: x.movedim(of_keys[n], 0)[keys].movedim(0, of_keys[n]) if n in of_keys else x
            for n, x in tensors.items()
        }
        halves.append(smooth(case.op)(**part, impl=impl, return_state=True))
    torch.testing.assert_close(merge(halves).out, out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
@pytest.mark.parametrize("heads", [None, 3])
@both_scores
@pytest.mark.parametrize("name", ["key", "score_bias"])
@pytest.mark.parametrize("form", ["pairs", "keys", "window"])
def test_pairs_that_are_hidden_and_nan_have_no_gradient(form, name, additive, heads, impl, device):
    """A key that no query sees, and a bias of it."""
    clean = pairs(device, heads, 4) if additive else without("v", pairs(device, heads, 4))
    clean["mask"] = torch.ones(3, 9, dtype=torch.bool, device=device)
    window = (None, 4) if form == "window" else None
    if form != "window":
        clean["mask"][:, 8] = False
    if form == "pairs":
        clean["mask"] = clean["mask"][:, None].expand(-1, 4, -1)
        clean["mask"] = clean["mask"] if heads is None else clean["mask"][:, None]
    axis = -1 if name == "score_bias" else -2
    spoilt = {**clean, name: clean[name].index_fill(axis, torch.tensor([8], device=device), torch.nan)}
    op = smooth(lambda **given: attend(additive)(**given, window=window))
    of_clean, of_spoilt = (evaluate(op, tensors, impl) for tensors in (clean, spoilt))
    for got, want in zip(of_spoilt, of_clean, strict=True):
        for at, x in want.items():
            torch.testing.assert_close(got[at], x, msg=lambda text, at=at: f"{at}: {text}")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("queries", [1, 4])
@both_scores
def test_pairs_are_sigmoids_over_their_sum(additive, queries, heads, impl, device):
    tensors = pairs(device, heads, queries) if additive else without("v", pairs(device, heads, queries))
    assert_is(smooth(attend(additive)), pairs_by_hand(additive), tensors, impl)


@pytest.mark.parametrize("make", [lambda **o: ConcatAttention(3, 5, 4, **o), lambda **o: GeneralAttention(3, 5, **o)])
def test_modules_of_pairs_pass_it_on(make, device):
    smoothed, plain = make(score_activation="logsigmoid").to(device), make().to(device)
    plain.load_state_dict(smoothed.state_dict())
    query, key = torch.randn(2, 2, 3, device=device), torch.randn(2, 9, 5, device=device)
    _, scores = smoothed(query, key, return_scores=True)
    _, raw = plain(query, key, return_scores=True)
    torch.testing.assert_close(scores, torch.nn.functional.logsigmoid(raw))
    assert "score_activation='logsigmoid'" in repr(smoothed)


@pytest.mark.parametrize("impl", IMPLS)
def test_modules_pass_it_on(impl, device):
    h = torch.randn(2, 9, 5, device=device)
    smoothed, plain = LocationAttention(5, 4, score_activation="logsigmoid"), LocationAttention(5, 4)
    plain.load_state_dict(smoothed.state_dict())
    smoothed, plain = smoothed.to(device), plain.to(device)
    _, scores = smoothed(h, return_scores=True, impl=impl)
    _, raw = plain(h, return_scores=True, impl=impl)
    torch.testing.assert_close(scores, torch.nn.functional.logsigmoid(raw))
    assert "score_activation='logsigmoid'" in repr(smoothed)
    assert "score_activation" not in repr(plain)
    step = LocationAwareAttention(3, 5, 4, channels=2, width=3, score_activation="logsigmoid").to(device)
    query = torch.randn(2, 2, 3, device=device)
    first, weights = step(query[:, 0], h, impl=impl)
    second = step(query[:, 1], h, previous=weights, impl=impl)
    outs, all_weights = step.sequence(query, h)
    torch.testing.assert_close((outs[:, 0], outs[:, 1]), (first, second[0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(all_weights[:, 1], second[1], rtol=1e-4, atol=1e-5)
