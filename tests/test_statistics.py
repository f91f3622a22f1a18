"""Attentive statistics pooling: the reference against the formula, the kernels against the reference."""

import dataclasses
import math

import hypothesis.strategies as st
import pytest
import torch
from _compare import (
    IMPLS,
    assert_close,
    assert_identical,
    assert_matches_reference,
    assert_zero,
    evaluate,
    in_double,
    largest,
)
from _location import offsets
from _marks import both_forms
from _statistics_pooling import Case, formula, operator, pairwise
from hypothesis import given

from fused_attn import StatisticsPooling, statistics_pooling
from fused_attn.kernels import statistics as kernels

# Sizes are odd, and around the tiles: 16 to 64 frames, 16 to 128 channels, 16 to 128 features.
FACTORS = {
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "rows": (1, 17, 63, 100),
    "dim": (1, 9, 33),
    "attn_dim": (1, 5, 17),
    "per_channel": (True, False),
    "weight": (True, False),
    "activation": ("tanh", "relu"),
    "ragged": (False, True),
    "mask": ("none", "random", "padding", "empty", "expanded"),
    "context": ("none", "sequence", "row"),
    "value": (None, 1, 45),
    "bias": (True, False),
    "layout": ("contiguous", "swapped", "strided"),
    "through": (("output", "weights"), ("output",), ("weights",)),
}
PARAMETERS = ("h", "w", "b", "v", "context", "value")
both_kinds = pytest.mark.parametrize("per_channel", [False, True], ids=["frame", "channel"])
each_impl = pytest.mark.parametrize("impl", IMPLS)


def check(case: Case, device: torch.device, **options) -> None:
    assert_matches_reference(case.op, case.tensors(device), dtype=case.dtype, **{"through": case.through, **options})


# --- The formula, and the kernels against it ---------------------------------------------------------------------


@both_kinds
def test_reference_is_the_formula(per_channel, device):
    """Frame by frame, with the variance as a difference of moments, which float64 can afford here."""
    case = Case(batch=2, rows=6, dim=3, attn_dim=4, context="row", value=5, mask="random", per_channel=per_channel)
    tensors = in_double(case.tensors(device))

    def by_hand(*, impl, h, w, b, v, context, value, mask):
        pooled, weights = [], []
        for i in range(len(h)):
            seen = mask[i].nonzero()[:, 0].tolist()
            scores = [torch.tanh(h[i, j] @ w + b + context[i, j]) @ v for j in seen]
            powers = [torch.exp(s) for s in scores]
            alpha = [p / sum(powers) for p in powers]
            mean = sum(a * value[i, j] for a, j in zip(alpha, seen, strict=True))
            second = sum(a * value[i, j] ** 2 for a, j in zip(alpha, seen, strict=True))
            pooled.append(torch.cat([mean, (second - mean**2).sqrt()]))
            shown = dict(zip(seen, alpha, strict=True))
            weights.append(torch.stack([shown.get(j, torch.zeros_like(alpha[0])) for j in range(h.shape[1])]))
        return torch.stack(pooled), torch.stack(weights)

    assert_close(evaluate(operator(), tensors, "reference"), evaluate(by_hand, tensors, "reference"))


def test_equal_weights_are_the_plain_mean_and_standard_deviation(device):
    h = torch.randn(2, 50, 7, dtype=torch.float64, device=device)
    mean, std = statistics_pooling(h)
    torch.testing.assert_close(mean, h.mean(1))
    torch.testing.assert_close(std, h.std(1, correction=0))


@pytest.mark.kernel
@pytest.mark.parametrize("case", pairwise(FACTORS), ids=str)
def test_matches_the_reference_for_every_pair_of_factors(case, device):
    check(case, device)


@pytest.mark.kernel
@pytest.mark.parametrize(
    "sizes",
    [
        {"dim": 32, "attn_dim": 64, "value": 160, "dtype": torch.bfloat16},  # whole vectors of 16
        {"dim": 32, "attn_dim": 16, "value": 160},
        {"dim": 3, "attn_dim": 130, "value": 19, "dtype": torch.bfloat16},  # V in parts
        {"dim": 3, "per_channel": False, "value": 300},
        {"dim": 3, "per_channel": False, "value": 256, "dtype": torch.float16},
        # rows of vectors of 4, and of none
        {"dim": 100, "attn_dim": 100, "dtype": torch.bfloat16},
        {"dim": 300, "attn_dim": 100, "ragged": True, "dtype": torch.float16},
        {"dim": 300, "attn_dim": 75, "per_channel": False, "dtype": torch.bfloat16},
        {"dim": 75, "attn_dim": 100, "value": 300},
    ],
    ids=lambda sizes: ",".join(f"{n}={x}" for n, x in sizes.items()),
)
def test_matches_the_reference_for_other_sizes(sizes, device):
    check(Case(rows=70, batch=2, **sizes), device)


@pytest.mark.kernel
def test_features_of_one_block_alone_send_a_gradient(device):
    """Of 130 features the first alone are scored: rows whose last ones send nothing are no rows to leave out."""
    case = Case(rows=20, dim=5, attn_dim=130, dtype=torch.bfloat16)
    tensors = case.tensors(device)
    tensors["v"][16:] = 0
    assert_matches_reference(case.op, tensors, dtype=case.dtype)


@pytest.mark.kernel
@both_kinds
@pytest.mark.parametrize("name", PARAMETERS)
def test_one_gradient_alone_is_that_of_the_reference(name, per_channel, device):
    case = Case(rows=21, dim=9, context="row", value=7, mask="random", per_channel=per_channel)
    check(case, device, wrt=[name])


@pytest.mark.kernel
@both_forms
@pytest.mark.parametrize(
    "kind",
    [
        {"activation": "identity", "bias": False, "value": 9},  # the features are the frames as they are
        {"activation": "identity", "bias": False},
        {"context": "row"},
        {"context": "sequence", "per_channel": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("names", [["v"], ["h"], None], ids=str)
def test_frames_that_were_projected_match_the_reference(names, kind, ragged, device):
    check(
        Case(rows=40, dim=21, mask="random", weight=False, ragged=ragged, layout="strided", **kind), device, wrt=names
    )


@each_impl
@both_kinds
def test_frames_that_were_projected_are_those_of_an_identity_matrix(per_channel, impl, device):
    case = Case(rows=20, dim=7, value=5, per_channel=per_channel, weight=False, mask="random")
    tensors = case.tensors(device)
    got = evaluate(case.op, tensors, impl)
    want = evaluate(case.op, tensors | {"w": torch.eye(7, device=device)}, impl)
    want.gradients.pop("w")
    assert_close(got, want)


@pytest.mark.kernel
def test_equal_weights_match_the_reference(device):
    tensors = {name: x for name, x in Case(rows=70, mask="empty").tensors(device).items() if name in ("h", "mask")}
    assert_matches_reference(operator(), tensors)


# --- Sequences in parts ------------------------------------------------------------------------------------------


@pytest.fixture
def short_items(monkeypatch):
    """Items of one tile of 16 frames, so that there are more than the merge takes at a time."""
    monkeypatch.setattr(kernels, "_rows_per_item", lambda call, ragged, channel_blocks, block_t: 16)


@pytest.mark.kernel
@both_forms
@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sequences_in_parts_match_the_reference(short_items, dtype, per_channel, ragged, device):
    case = Case(
        dtype=dtype, batch=1, rows=300, dim=3, attn_dim=5, per_channel=per_channel, ragged=ragged, mask="random"
    )
    check(case, device)


@pytest.mark.kernel
@both_kinds
def test_parts_of_segments_of_every_length_are_merged(short_items, per_channel, device):
    lengths = [0, 1, 16, 0, 17, 64, 65, 0]
    case = Case(rows=sum(lengths), dim=5, ragged=True, per_channel=per_channel)
    tensors = case.tensors(device) | {"cu_seqlens": offsets(lengths, device)}
    tensors["h"][17:34] *= 100  # a part's mean and scores far from the others'
    assert_matches_reference(case.op, tensors)


@pytest.mark.kernel
@both_kinds
def test_two_runs_are_bitwise_equal(short_items, per_channel, device):
    case = Case(rows=100, dim=9, per_channel=per_channel, mask="random")
    tensors = case.tensors(device)
    assert_identical(evaluate(case.op, tensors, "triton"), evaluate(case.op, tensors, "triton"))


# --- Numbers that are hard ---------------------------------------------------------------------------------------


@each_impl
@both_kinds
@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
def test_channels_far_from_zero_keep_their_deviation(monkeypatch, parts, per_channel, impl, device):
    """1e4 and noise of 0.1: a difference of squares in float32 would be off by 10, its square root by 3.

    A float32 mean is off by 1e-3, which is 1e-2 of the noise: its rounding is corrected.
    """
    if parts:
        monkeypatch.setattr(kernels, "_rows_per_item", lambda call, ragged, channel_blocks, block_t: 16)
    case = Case(rows=200, dim=5, value=9, per_channel=per_channel)
    tensors = case.tensors(device)
    tensors["value"] = 1e4 + 0.1 * tensors["value"]
    got = evaluate(case.op, tensors, impl).outputs["output"]
    exact = evaluate(case.op, in_double(tensors), "reference").outputs["output"]
    torch.testing.assert_close(got[:, 9:].double(), exact[:, 9:], rtol=5e-6, atol=0)
    torch.testing.assert_close(got[:, :9].double(), exact[:, :9], rtol=5e-7, atol=0)


@each_impl
@both_kinds
@both_forms
@pytest.mark.parametrize(("far", "noise"), [(1e4, 0.0), (1e6, 0.0), (1e6, 0.1), (-3e6, 0.0)], ids=str)
def test_deviations_of_any_channel_are_those_of_its_numbers(far, noise, ragged, per_channel, impl, device):
    """Of a constant one none, which is the floor; and of 1e6 ± 0.1 what float32 has left of it."""
    case = Case(rows=40, dim=5, value=9, per_channel=per_channel, ragged=ragged)
    tensors = case.tensors(device)
    tensors["value"] = far + noise * tensors["value"]
    tensors["value"][..., 3] = 4.0
    got = evaluate(case.op, tensors, impl)
    exact = evaluate(formula, in_double(tensors), "")
    mean, std = got.outputs["output"].double().chunk(2, -1)
    want_mean, want_std = exact.outputs["output"].chunk(2, -1)
    seen = (want_std > 0).any(1)  # a sequence without frames has no floor
    torch.testing.assert_close(std[seen], want_std[seen], rtol=1e-5, atol=2e-7)
    torch.testing.assert_close(mean, want_mean, rtol=2e-7, atol=0)
    assert all(x.isfinite().all() for x in got.gradients.values())


def far_from_zero(case: Case, device: torch.device) -> dict[str, torch.Tensor]:
    tensors = case.tensors(device)
    return tensors | {"value": 1e4 + 0.1 * tensors["value"]}


@pytest.mark.kernel
@both_kinds
def test_gradients_of_channels_far_from_zero_are_right_to_float32(per_channel, device):
    """Of the deviation: the mean's rounding to float32, 5e-4, would be 5e-3 of every difference from it."""
    tensors = far_from_zero(Case(rows=100, dim=5, value=9, per_channel=per_channel), device)

    def deviation(**arguments):
        return statistics_pooling(**arguments)[1]

    got = evaluate(deviation, tensors, "triton").gradients
    exact = evaluate(deviation, in_double(tensors), "reference").gradients
    for name, truth in exact.items():
        assert largest(got[name] - truth) <= 1e-5 * largest(truth), name


@pytest.mark.kernel
def test_weights_of_the_backward_are_right_to_the_last_bits(device):
    """Of scores that float32 holds exactly: the gradient of the mean is the weight."""
    steps = torch.arange(4, 12, device=device).view(-1, 1, 1) / 64
    h = -steps * (torch.arange(1000, device=device) % 97).view(1, -1, 1)
    value = torch.zeros_like(h, requires_grad=True)
    one = torch.ones(1, device=device)
    mean, _ = statistics_pooling(h, one[:, None], None, one, value=value, activation="identity", impl="triton")
    mean.sum().backward()
    torch.testing.assert_close(
        value.grad.double(), h.double().softmax(1), rtol=4 * torch.finfo(torch.float32).eps, atol=0
    )


@pytest.mark.kernel
@both_kinds
def test_shifted_values_match_the_reference(per_channel, device):
    case = Case(rows=70, dim=5, value=9, per_channel=per_channel)
    assert_matches_reference(case.op, far_from_zero(case, device))


@each_impl
@both_kinds
def test_a_constant_added_to_the_values_moves_the_mean_alone(per_channel, impl, device):
    tensors = Case(rows=40, per_channel=per_channel, value=9).tensors(device)
    tensors["value"] = (tensors["value"] * 64).round() / 64
    mean, std = statistics_pooling(**tensors, impl=impl)
    moved, same = statistics_pooling(**{**tensors, "value": tensors["value"] + 8}, impl=impl)
    torch.testing.assert_close(moved, mean + 8)
    torch.testing.assert_close(same, std)


@each_impl
@both_kinds
@pytest.mark.parametrize("sign", [1, -1])
def test_huge_scores_stay_finite(sign, per_channel, impl, device):
    case = Case(rows=100, activation="identity", per_channel=per_channel)
    tensors = case.tensors(device)
    tensors["w"] = tensors["w"] * 6000
    tensors["b"] = torch.full_like(tensors["b"], sign * 10_000)
    for family in evaluate(case.op, tensors, impl):
        for name, x in family.items():
            assert x.isfinite().all(), name


@pytest.mark.kernel
@both_kinds
@pytest.mark.parametrize("place", [5, 1090])
def test_the_largest_score_may_be_anywhere_in_a_long_sequence(place, per_channel, device):
    """The kernel of one weight a frame looks for it first, 1,024 scores at a time."""
    h = torch.zeros(16, 1100, 1, device=device)
    h[:, place] = 200
    value = torch.randn(16, 1100, 3, device=device)
    one = torch.ones(1, 1, device=device)
    v = one.expand(1, 3) if per_channel else one[0]
    mean, std = statistics_pooling(h, one, None, v, value=value, activation="identity", impl="triton")
    torch.testing.assert_close(mean, value[:, place])
    torch.testing.assert_close(std, torch.full_like(std, 1e-6))


@pytest.mark.kernel
@both_kinds
def test_large_scores_match_the_reference(per_channel, device):
    case = Case(rows=100, activation="identity", per_channel=per_channel)
    tensors = case.tensors(device)
    tensors["v"] = tensors["v"] * 30
    assert_matches_reference(case.op, tensors)


# --- The floor ---------------------------------------------------------------------------------------------------


@each_impl
@both_kinds
@pytest.mark.parametrize("floor", [0.0, 1e-12, 0.25])
def test_constant_channels_have_the_floor_and_no_gradient_from_it(floor, per_channel, impl, device):
    """Powers of two: their weighted mean is exact, so is a variance of 0."""
    tensors = Case(rows=40, per_channel=per_channel, value=9).tensors(device)
    del tensors["h"], tensors["w"], tensors["b"], tensors["v"]
    tensors["value"][..., 2] = 4.0
    tensors["value"].requires_grad_()
    h = torch.zeros(3, 40, 5, device=device)
    v = torch.randn(2, 9, device=device) if per_channel else torch.randn(2, device=device)
    w = torch.zeros(5, 2, device=device, requires_grad=True)
    _, std = statistics_pooling(h[:, :32], w, None, v, value=tensors["value"][:, :32], floor=floor, impl=impl)
    assert torch.equal(std[:, 2], torch.full_like(std[:, 2], math.sqrt(floor)))
    std[:, 2].sum().backward()
    assert largest(tensors["value"].grad) == 0
    assert largest(w.grad) == 0


@pytest.mark.kernel
@both_kinds
@both_forms
def test_floor_matches_the_reference(ragged, per_channel, device):
    """Half of the variances are under it."""
    check(Case(rows=63, per_channel=per_channel, ragged=ragged, floor=0.9), device)


@each_impl
def test_one_frame_has_no_deviation_and_finite_gradients(impl, device):
    case = Case(rows=1, floor=0.0)
    result = evaluate(case.op, case.tensors(device), impl)
    assert largest(result.outputs["output"][:, 33:]) == 0
    assert all(x.isfinite().all() for x in result.gradients.values())


# --- Nothing to attend to, and what must not be read -------------------------------------------------------------


@each_impl
@both_kinds
@pytest.mark.parametrize("sizes", [{"batch": 0, "rows": 5}, {"rows": 0}], ids=["batch=0", "rows=0"])
def test_empty_batches_give_zeros(sizes, per_channel, impl, device):
    case = Case(**sizes, per_channel=per_channel, context="sequence", mask="random", floor=1.0)
    tensors = case.tensors(device)
    result = evaluate(case.op, tensors, impl)
    assert_zero(result)
    assert result.outputs["output"].shape == (tensors["h"].shape[0], 66)


@each_impl
@both_kinds
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_ragged_batches_without_rows_give_zeros(lengths, per_channel, impl, device):
    case = Case(rows=0, ragged=True, per_channel=per_channel, floor=1.0)
    result = evaluate(case.op, case.tensors(device) | {"cu_seqlens": offsets(lengths, device)}, impl)
    assert_zero(result)
    assert result.outputs["output"].shape == (len(lengths), 66)


@each_impl
@both_kinds
@both_forms
def test_sequences_that_see_nothing_give_zeros(ragged, per_channel, impl, device):
    case = Case(rows=40, context="row", mask="random", per_channel=per_channel, ragged=ragged, floor=1.0)
    tensors = case.tensors(device)
    tensors["mask"] = torch.zeros_like(tensors["mask"])
    assert_zero(evaluate(case.op, tensors, impl))


@each_impl
@both_kinds
@both_forms
def test_masked_frames_are_never_read(ragged, per_channel, impl, device):
    case = Case(rows=63, context="row", value=7, mask="empty", per_channel=per_channel, ragged=ragged)
    tensors = case.tensors(device)
    clean = evaluate(case.op, tensors, impl)
    hidden = {"h": ~tensors["mask"], "value": ~tensors["mask"]}
    hidden["context"] = hidden["h"][None] if ragged else hidden["h"]
    filled = {
        name: x.masked_fill(hidden[name][..., None], torch.nan) for name, x in tensors.items() if name in hidden
    }
    result = evaluate(case.op, tensors | filled, impl)
    assert_close(result, clean)
    for name, rows in hidden.items():
        assert largest(result.gradients[name][rows]) == 0, name


@each_impl
@both_kinds
def test_a_ragged_batch_is_its_sequences_alone(per_channel, impl, device):
    case = Case(rows=70, ragged=True, per_channel=per_channel)
    tensors = case.tensors(device)
    h, cu = tensors.pop("h"), tensors.pop("cu_seqlens").tolist()
    together = case.op(h=h, cu_seqlens=offsets([3, 0, 67], device), **tensors, impl=impl)
    assert cu == [0, 0, 3, 3, 70, 70, 70]
    for i, rows in ((0, h[:3]), (2, h[3:])):
        alone = case.op(h=rows[None], **tensors, impl=impl)
        torch.testing.assert_close(together[0][i], alone[0][0])
    assert largest(together[0][1]) == 0


@pytest.mark.kernel
@both_kinds
def test_jagged_tensors_are_ragged_batches(per_channel, device):
    case = Case(rows=70, ragged=True, context="sequence", per_channel=per_channel)
    tensors = case.tensors(device)
    packed = evaluate(case.op, tensors, "triton")

    def op(*, impl, h, context, cu_seqlens, **parameters):
        jagged = torch.nested.nested_tensor_from_jagged(h, cu_seqlens.long())
        pooled, weights = case.op(impl=impl, h=jagged, context=context[:, 0], **parameters)
        return pooled, weights.values()

    assert_identical(evaluate(op, tensors, "triton"), packed)


# --- Layers of others --------------------------------------------------------------------------------------------


@each_impl
def test_the_pooling_of_ecapa_with_its_batch_norm(impl, device):
    """SpeechBrain's ``AttentiveStatisticsPooling``: frames, mean and deviation to conv, relu, norm, tanh and conv."""
    torch.manual_seed(0)
    wide = torch.float32 if impl == "triton" else torch.float64
    x = torch.randn(3, 6, 10, dtype=wide, device=device, requires_grad=True)
    tdnn, norm, conv = torch.nn.Conv1d(18, 4, 1), torch.nn.BatchNorm1d(4), torch.nn.Conv1d(4, 6, 1)
    layers = torch.nn.ModuleList([tdnn, norm, conv]).to(device, wide)
    mask = torch.arange(10, device=device) < torch.tensor([[10], [7], [1]], device=device)
    names = dict(layers.named_parameters(), x=x)

    def statistics(x, m):
        mean = (m * x).sum(2)
        return mean, (m * (x - mean.unsqueeze(2)).pow(2)).sum(2).clamp(1e-12).sqrt()

    def theirs():
        shown = mask.unsqueeze(1)
        both = statistics(x, shown / shown.sum(2, keepdim=True))
        attn = torch.cat([x, *(y.unsqueeze(2).expand_as(x) for y in both)], dim=1)
        attn = conv(torch.tanh(norm(torch.relu(tdnn(attn)))))
        return torch.cat(statistics(x, attn.masked_fill(~shown, -torch.inf).softmax(2)), dim=1)

    def ours():
        frames = x.mT
        both = torch.cat(statistics_pooling(frames, mask=mask, impl=impl), dim=-1)
        w = tdnn.weight[..., 0].T
        z = frames @ w[:6] + tdnn.bias + (both @ w[6:])[:, None]
        u = norm(torch.relu(z).mT).mT
        return torch.cat(statistics_pooling(u, v=conv.weight[..., 0].T, value=frames, mask=mask, impl=impl), dim=-1)

    (got, want), cotangent = (ours(), theirs()), torch.randn(3, 12, dtype=wide, device=device)
    torch.testing.assert_close(got, want)
    grads = (torch.autograd.grad(y, names.values(), cotangent, materialize_grads=True) for y in (got, want))
    for name, a, b in zip(names, *grads, strict=True):  # the last bias cancels
        torch.testing.assert_close(a, b, msg=name, rtol=1e-4, atol=1e-5)


# --- Modules -----------------------------------------------------------------------------------------------------


def test_module_with_a_global_context_sees_every_frame_beside_the_statistics(device):
    """ECAPA's form: [h; mean; std] of each frame projected by one matrix."""
    torch.manual_seed(0)
    module = StatisticsPooling(5, 4, per_channel=True, global_context=True).double().to(device)
    h = torch.randn(2, 9, 5, dtype=torch.float64, device=device)
    mask = torch.arange(9, device=device) < torch.tensor([[9], [6]], device=device)
    pooled, weights = module(h, mask=mask, return_weights=True)
    for i, rows in enumerate((h[0], h[1, :6])):
        seen = torch.cat([rows, *(x.expand_as(rows) for x in (rows.mean(0), rows.std(0, correction=0)))], dim=-1)
        both = torch.cat([module.proj.weight, module.context.weight], dim=1)
        alpha = (torch.tanh(seen @ both.T + module.proj.bias) @ module.score.weight.T).softmax(0)
        mean = (alpha * rows).sum(0)
        std = (alpha * (rows - mean) ** 2).sum(0).sqrt()
        torch.testing.assert_close(pooled[i], torch.cat([mean, std]))
        torch.testing.assert_close(weights[i, : len(rows)], alpha)


@each_impl
@pytest.mark.parametrize("global_context", [False, True])
@both_kinds
def test_module_is_the_function_padded_and_packed(per_channel, global_context, impl, device):
    torch.manual_seed(0)
    module = StatisticsPooling(5, 4, per_channel=per_channel, global_context=global_context).to(device)
    h = torch.randn(2, 9, 5, device=device)
    padded = module(h, impl=impl)
    assert padded.shape == (2, 10)
    torch.testing.assert_close(module(h.flatten(0, 1), cu_seqlens=offsets([9, 9], device), impl=impl), padded)
    jagged = torch.nested.as_nested_tensor(h, layout=torch.jagged)
    torch.testing.assert_close(module(jagged, impl=impl), padded)
    padded.sum().backward()
    assert all(x.grad.count_nonzero() for x in module.parameters())


@pytest.mark.parametrize(
    ("options", "name"), [({"dim": 0}, "dim"), ({"attn_dim": 0}, "attn_dim"), ({"activation": "max"}, "activation")]
)
def test_module_raises_for_bad_options(options, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        StatisticsPooling(**{"dim": 3, "attn_dim": 2, **options})


@st.composite
def calls(draw) -> tuple[Case, list[int]]:
    """A ragged call in float32, and the lengths of its segments."""
    lengths = draw(st.lists(st.integers(0, 60), max_size=5))
    case = Case(
        rows=sum(lengths),
        dim=draw(st.integers(1, 20)),
        attn_dim=draw(st.integers(1, 20)),
        value=draw(st.one_of(st.none(), st.integers(1, 40))),
        mask=draw(st.sampled_from(["none", "random"])),
        per_channel=draw(st.booleans()),
    )
    return case, lengths


@pytest.mark.kernel
@given(calls())
def test_matches_the_reference_for_any_segments(device, call):
    case, lengths = call
    tensors = dataclasses.replace(case, ragged=False).tensors(device)
    packed = {name: x[0] if name in ("h", "value", "mask") else x for name, x in tensors.items()}
    assert_matches_reference(case.op, {**packed, "cu_seqlens": offsets(lengths, device)})
