"""General attention beside PyTorch's own: where `auto` calls it, and that all of them agree."""

import dataclasses

import pytest
import torch
from _compare import assert_close, evaluate
from _concat import ALL, compare
from _general import Case, operator, pairwise
from torch.nn.attention.flex_attention import flex_attention

from fused_attn import general_attention

SDPA = torch.nn.functional.scaled_dot_product_attention
BASE = Case(heads=2, attn_dim=8, value_dim=8, return_weights=False)
FACTORS = {
    "dtype": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    "batch": (1, 2),
    "queries": (1, 6, 33, 70),
    "keys": (1, 6, 35, 70),
    "attn_dim": (1, 9, 40),
    "heads": (None, 2),
    "weight": ("none", "matrix", "heads"),
    "own_value": (True, False),
    "scale": (1.0, 0.3),
    "mask": ("none", "keys", "padding", "pairs", "empty", "expanded"),
    "window": (None, (None, 0)),
    "layout": ("contiguous", "transposed", "strided", "expanded"),
    "return_weights": (False,),
}


@pytest.fixture
def calls(monkeypatch):
    """How often PyTorch's attention was called."""
    count = []

    def counted(*args, **kwargs):
        count.append(1)
        return SDPA(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return count


@pytest.mark.parametrize("case", pairwise(FACTORS), ids=str)
def test_auto_matches_the_reference_for_every_pair_of_factors(case, calls, device):
    case = dataclasses.replace(case, value_dim=case.attn_dim)
    compare(case.op, case.tensors(device), "auto", dtype=case.dtype)
    assert calls or device.type == "cuda"


@pytest.mark.parametrize(
    ("changes", "on_cpu", "on_gpu"),
    [
        ({}, True, True),
        ({"window": (None, 0)}, True, True),
        ({"weight": "heads"}, True, True),
        ({"dtype": torch.bfloat16}, True, True),
        ({"own_value": False}, True, False),
        ({"mask": "keys"}, True, False),
        ({"dtype": torch.float64}, True, False),
        ({"value_dim": 9}, False, False),
        ({"window": (None, -1)}, False, False),
        ({"window": (3, 0)}, False, False),
        ({"score_bias": "qk"}, False, False),
        ({"dropout_p": 0.1}, False, False),
        ({"activation": "tanh"}, False, False),
        ({"scale": -1.0}, False, False),
        ({"return_weights": True}, False, False),
        ({"ragged": True}, False, False),
    ],
    ids=str,
)
def test_auto_calls_pytorch_by_the_documented_rule(changes, on_cpu, on_gpu, calls, device):
    case = dataclasses.replace(BASE, **changes)
    case.op(impl="auto", **case.tensors(device))
    assert bool(calls) == (on_cpu if device.type == "cpu" else on_gpu)


@pytest.mark.parametrize(("keys", "right", "expected"), [(64, None, False), (65, None, True), (64, 0, True)])
def test_on_a_cpu_few_pairs_are_by_the_reference(keys, right, expected, calls, monkeypatch):
    monkeypatch.setattr("fused_attn.general._FEW", 2**18)
    query, key = torch.randn(2, 2, 1024, 4), torch.randn(2, 2, keys, 4)
    general_attention(query, key, window=(None, right))
    assert bool(calls) == expected


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=pytest.mark.kernel), "reference"])
def test_the_other_implementations_never_call_pytorch(impl, calls, device):
    evaluate(BASE.op, BASE.tensors(device), impl)
    assert not calls


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_scaled_dot_product_attention(dtype, causal, impl, device):
    case = dataclasses.replace(BASE, dtype=dtype, queries=33, window=(None, 0) if causal else None)
    tensors = case.tensors(device)

    def theirs(*, impl, query, key, value):
        return SDPA(query, key, value, is_causal=causal, scale=case.scale)

    got, want = evaluate(case.op, tensors, impl), evaluate(theirs, tensors, impl)
    for ours, other in zip(got, want, strict=True):
        for name, x in other.items():
            tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
            torch.testing.assert_close(ours[name], x, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("impl", ALL)
def test_agrees_with_flex_attention(impl, device):
    """An activation, a bias and a window at once, forward: FlexAttention has no backward on a CPU."""
    case = dataclasses.replace(BASE, activation="tanh", window=(5, 2), score_bias="hqk")
    t = case.tensors(device)

    def score(s, b, h, i, j):
        shown = (i - 5 <= j) & (j <= i + 2)
        return torch.where(shown, torch.tanh(s) + t["score_bias"][0, h, i, j], -torch.inf)

    with torch.no_grad():
        want = flex_attention(t["query"], t["key"], t["value"], score_mod=score, scale=case.scale)
    torch.testing.assert_close(case.op(impl=impl, **t), want)


def test_queries_past_the_causal_end_see_all_keys(device):
    """Queries and keys of different number: position i is position j, from the first on."""
    case = dataclasses.replace(BASE, queries=40, keys=9, window=(None, 0))
    assert_close(
        evaluate(case.op, case.tensors(device), "auto"), evaluate(case.op, case.tensors(device), "reference")
    )


def test_a_gradient_of_a_gradient_works_where_auto_calls_pytorch(calls, device):
    query, key, value = (x.double() for x in BASE.tensors(device).values())
    leaves = [x[:1, :1, :4].clone().requires_grad_() for x in (query, key, value)]
    assert torch.autograd.gradgradcheck(lambda q, k, v: general_attention(q, k, v, scale=0.7), leaves)
    assert calls or device.type == "cuda"


def test_operator_options_reach_the_call(calls, device):
    """A scale of 0 makes all keys alike; it is not PyTorch's."""
    tensors = BASE.tensors(device)
    out = operator(scale=0.0)(impl="auto", **tensors)
    torch.testing.assert_close(out, tensors["value"].mean(-2, keepdim=True).expand_as(out))
    assert not calls
