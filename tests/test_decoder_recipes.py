"""The recipes of docs/decoder_recipes.md: outputs and gradients are those of the papers' formulas."""

import functools
import math
from pathlib import Path

import _recipes
import pytest
import torch
from _compare import IMPLS
from _recipes import assert_alike, draw
from torch import Tensor

from fused_attn import ConcatAttention, GeneralAttention, LocationAwareAttention, location_aware_attention

B, TK, A, DV, C, K = 2, 7, 3, 4, 2, 3
recipe = functools.partial(_recipes.recipe, "decoder_recipes")


def energies(query: Tensor, key: Tensor, v: Tensor, history: Tensor, conv_weight: Tensor, u: Tensor) -> Tensor:
    """v · tanh(q + k_j + f_j U), f of `torch.nn.functional.conv1d`; history (B, P, Tk)."""
    f = torch.nn.functional.conv1d(history, conv_weight, padding=conv_weight.shape[-1] // 2)
    return torch.tanh(query[:, None] + key + f.mT @ u) @ v


def first_key() -> Tensor:
    return torch.tensor([1.0] + [0.0] * (TK - 1), dtype=torch.float64).repeat(B, 1)


def summed(weights: Tensor, value: Tensor) -> Tensor:
    return torch.stack([sum(weights[b, j] * value[b, j] for j in range(value.shape[1])) for b in range(len(value))])


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("family", ["concat", "general"])
def test_a_buffer_that_fills_up(family, heads, impl, device):
    """Its results are those of the rows that are there alone; sequences begin at other lengths."""
    torch.manual_seed(0)
    append, filled = recipe("A buffer of keys that fills up", "append", "filled")
    make = {"concat": lambda **o: ConcatAttention(5, 6, A, **o), "general": lambda **o: GeneralAttention(5, 6, **o)}
    attend = make[family](num_heads=heads).requires_grad_(False).to(device)
    rows, queries = torch.randn(B, TK, 6, device=device), torch.randn(TK, B, 1, 5, device=device)
    start = torch.tensor([0, 2], device=device)
    keys, lengths = torch.full((B, TK, 6), torch.nan, device=device), start.clone()
    keys[1, :2] = rows[1, :2]
    projected = attend.project_keys(keys)
    for t in range(TK - 2):
        row = rows[torch.arange(B, device=device), lengths]
        append(keys, lengths, row)
        append(projected, lengths, attend.project_keys(row[:, None])[:, 0])
        lengths += 1
        mask = filled(keys, lengths)
        assert mask.sum(1).tolist() == (start + t + 1).tolist()
        for options in ({}, {"projected": projected}):
            got = attend(queries[t], keys, mask=mask, **options, impl=impl)
            want = [attend(queries[t, b : b + 1], rows[b : b + 1, : start[b] + t + 1]) for b in range(B)]
            torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-5)


def test_tacotron_step():
    torch.manual_seed(0)
    attend = LocationAwareAttention(5, 6, A, channels=C, width=K, history=2, bias=False, dtype=torch.float64)
    memory, *queries = leaves = draw((B, TK, 6), (B, 5), (B, 5), (B, 5))
    step = recipe("Tacotron 2: last weights and their sum", "tacotron_step")
    last, total = torch.zeros(2, B, TK, dtype=torch.float64)
    history = torch.stack([last, total], 1)
    for query in queries:
        context, weights, history = step(attend, query, memory, history)
        key = memory @ attend.key_proj.weight.T
        f = torch.stack([last, total], 1), attend.conv.weight, attend.location_proj.weight.T
        last = energies(query @ attend.query_proj.weight.T, key, attend.score.weight[0], *f).softmax(1)
        total = total + last
    assert_alike((context, weights, history), (summed(last, memory), last, torch.stack([last, total], 1)), leaves)


def test_forward_attention_with_a_transition_agent():
    query, key, value, v, conv_weight, u, *moves = leaves = draw(
        (B, A), (B, TK, A), (B, TK, DV), (A,), (C, 2, K), (C, A), (B, 1), (B, 1)
    )
    step = recipe("Forward attention with a transition agent", "forward_attention")
    got = alpha = first_key()
    total = got_total = torch.zeros_like(alpha)
    for x in moves:
        history = torch.stack([got, got_total], 1)
        got_context, got = step(query, key, value, v, history, conv_weight, u, got, torch.sigmoid(x))
        got_total = got_total + got
        y = energies(query, key, v, torch.stack([alpha, total], 1), conv_weight, u).softmax(1)
        move = 1 / (1 + torch.exp(-x))
        before = [alpha[:, j - 1] if j else torch.zeros(B) for j in range(TK)]
        prior = torch.stack([(1 - move[:, 0]) * alpha[:, j] + move[:, 0] * before[j] for j in range(TK)], 1)
        alpha = (prior + 1e-8) * y
        alpha = alpha / alpha.sum(1, keepdim=True)
        total = total + alpha
    assert_alike((got_context, got), (summed(alpha, value), alpha), leaves)


@pytest.mark.parametrize(("back", "front"), [(1, 3), (2, 6), (0, 1)])
def test_windowing_hides_scores_alone(back, front):
    query, key, value, v, conv_weight, u = leaves = draw((B, A), (B, TK, A), (B, TK, DV), (A,), (C, K), (C, A))
    window_bias = recipe("Windowing at inference", "window_bias")
    weights = torch.rand(B, TK, dtype=torch.float64) + 3 * torch.eye(TK, dtype=torch.float64)[[2, TK - 1]]
    got = location_aware_attention(
        query, key, value, v, weights, conv_weight, u, score_bias=window_bias(weights, back, front)
    )
    e = energies(query, key, v, weights[:, None], conv_weight[:, None], u).exp()
    inside = [[last - back <= j < last + front for j in range(TK)] for last in (2, TK - 1)]
    e = e * torch.tensor(inside)
    alpha = e / e.sum(1, keepdim=True)
    if front == 1:  # a key alone has the weight 1, whatever its score
        torch.testing.assert_close(got[1], torch.eye(TK, dtype=torch.float64)[[2, TK - 1]])
        got, alpha, leaves = got[0], alpha.detach(), [value]
        assert_alike(got, summed(alpha, value), leaves)
    else:
        assert_alike(got, (summed(alpha, value), alpha), leaves)


def test_sharpening_is_a_scale_of_v():
    query, key, value, v, conv_weight, u, last = leaves = draw(
        (B, A), (B, TK, A), (B, TK, DV), (A,), (C, K), (C, A), (B, TK)
    )
    got = location_aware_attention(query, key, value, 2.5 * v, last, conv_weight, u)
    alpha = (2.5 * energies(query, key, v, last[:, None], conv_weight[:, None], u)).softmax(1)
    assert_alike(got, (summed(alpha, value), alpha), leaves)


def test_smoothing():
    scores, value = leaves = draw((B, TK), (B, TK, DV))
    mask = torch.arange(TK) < torch.tensor([[TK], [3]])
    smoothed = recipe("Smoothing", "smoothed")
    alpha = torch.where(mask, 1 / (1 + torch.exp(-scores)), 0)
    alpha = alpha / alpha.sum(1, keepdim=True)
    assert_alike(smoothed(scores, value, mask=mask), (summed(alpha, value), alpha), leaves)


def test_beta_binomial_has_its_moments():
    prior = recipe("Dynamic convolution attention", "beta_binomial")(11, 0.1, 0.9).double()
    n, a, b, k = 10, 0.1, 0.9, torch.arange(11)
    mean = (prior * k).sum().item()
    variance = (prior * (k - mean) ** 2).sum().item()
    assert prior.sum().item() == pytest.approx(1)
    assert mean == pytest.approx(n * a / (a + b))
    assert variance == pytest.approx(n * a * b * (a + b + n) / ((a + b) ** 2 * (a + b + 1)), rel=1e-6)


def test_dynamic_convolution():
    value, v, b, static, u, t, *makers = leaves = draw(
        (B, TK, DV), (A,), (A,), (C, K), (C, A), (2, A), (B, 2, 5), (B, 2, 5)
    )
    step, beta_binomial = recipe("Dynamic convolution attention", "dynamic_convolution_step", "beta_binomial")
    prior = beta_binomial(4).double()
    got = alpha = first_key()
    for made in makers:
        got_context, got = step(made, value, v, b, got, static, u, t, prior)
        rows = []
        for n in range(B):
            s = []
            for j in range(TK):
                at = {i: alpha[n, i] for i in range(TK)}
                f = [sum(static[c, k] * at.get(j + k - 1, 0) for k in range(K)) for c in range(C)]
                g = [sum(made[n, c, k] * at.get(j + k - 2, 0) for k in range(5)) for c in range(2)]
                p = sum(prior[k] * at.get(j - k, 0) for k in range(4))
                z = sum(f[c] * u[c] for c in range(C)) + sum(g[c] * t[c] for c in range(2)) + b
                s.append(v @ torch.tanh(z) + p.clamp(min=1e-6).log())
            rows.append(torch.stack(s).softmax(0))
        alpha = torch.stack(rows)
    assert_alike((got_context, got), (summed(alpha, value), alpha), leaves)


@pytest.mark.parametrize("hard", [False, True])
def test_stepwise_monotonic(hard):
    value, *all_energies = leaves = draw((B, TK, DV), (B, TK), (B, TK), (B, TK))
    step = recipe("Stepwise monotonic attention", "stepwise_monotonic")
    got = alpha = first_key()
    for energy in all_energies:
        got_context, got = step(energy, got, value, hard)
        p = (energy > 0).double() if hard else 1 / (1 + torch.exp(-energy))
        moved = [alpha[:, j - 1] * (1 - p[:, j - 1]) if j else torch.zeros(B) for j in range(TK)]
        alpha = torch.stack([alpha[:, j] * p[:, j] + moved[j] for j in range(TK)], 1)
    if hard:
        assert torch.equal(got, alpha)
        assert set(got.unique().tolist()) == {0, 1}
        assert_alike(got_context, summed(alpha, value), [value])
    else:
        assert_alike((got_context, got), (summed(alpha, value), alpha), leaves)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_gmm(version):
    mean, value, *makers = leaves = draw((B, 2), (B, TK, DV), (B, 3, 2), (B, 3, 2))
    step = recipe("GMM attention", "gmm_attention")
    got_mean, mu = mean, mean
    for made in makers:
        context, got, got_mean = step(made, got_mean, value, version)
        raw_w, raw_step, raw_width = made.unbind(1)
        mu = mu + (torch.log(1 + raw_step.exp()) if version == 2 else raw_step.exp())
        if version == 0:
            scale, variance = raw_w.exp(), torch.exp(-raw_width) / 2
        else:
            variance = raw_width.exp() if version == 1 else torch.log(1 + raw_width.exp()) ** 2
            scale = raw_w.exp() / raw_w.exp().sum(1, keepdim=True) / torch.sqrt(2 * math.pi * variance)
        bells = [(scale * torch.exp(-((j - mu) ** 2) / (2 * variance))).sum(1) for j in range(TK)]
        alpha = torch.stack(bells, 1)
    assert_alike((context, got, got_mean), (summed(alpha, value), alpha, mu), leaves)


def test_every_recipe_was_tested():
    """The one of sharpening has no function."""
    named = _recipes.named_in(Path(__file__)) | {"Sharpening"}
    assert named == set(_recipes.sections("decoder_recipes"))
