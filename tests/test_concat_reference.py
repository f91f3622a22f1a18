"""The oracle itself: against loops over numbers, and segment by segment."""

import itertools
import math

import pytest
import torch
from _compare import in_double
from _concat import ACTIVATIONS, Case
from test_location_reference import BY_HAND

from fused_attn import concat_attention


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_formula(activation):
    """Against loops over numbers."""
    left, right = window = (2, 3)
    case = Case(
        batch=1,
        queries=4,
        keys=6,
        attn_dim=3,
        value_dim=2,
        heads=2,
        activation=activation,
        mask="pairs",
        window=window,
        score_bias="bhqk",
    )
    tensors = in_double(case.tensors(torch.device("cpu")))
    out, weights = case.op(impl="reference", **tensors)
    numbers = {name: x.tolist() for name, x in tensors.items()}
    act, mask = BY_HAND[activation], numbers["mask"][0]
    for head, i in itertools.product(range(2), range(4)):
        raw = []
        for j in range(6):
            pairs = zip(numbers["query"][0][head][i], numbers["key"][0][head][j], numbers["v"][head], strict=True)
            score = sum(v * act(q + k) for q, k, v in pairs) + numbers["score_bias"][0][head][i][j]
            raw.append(math.exp(score) if mask[i][j] and i - left <= j <= i + right else 0.0)
        want = [x / sum(raw) if sum(raw) else 0.0 for x in raw]
        assert weights[0, head, i].tolist() == pytest.approx(want, rel=1e-12, abs=1e-12)
        total = [sum(w * row[d] for w, row in zip(want, numbers["value"][0][head], strict=True)) for d in range(2)]
        assert out[0, head, i].tolist() == pytest.approx(total, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("window", [None, (2, 1)], ids=str)
def test_reference_of_packed_rows_is_that_of_each_segment_alone(window):
    case = Case(queries=12, keys=14, heads=2, ragged=True, window=window)
    t = in_double(case.tensors(torch.device("cpu")))
    out = case.op(impl="reference", **t)
    ends = zip(*(itertools.pairwise(t[f"cu_seqlens_{side}"].tolist()) for side in "qk"), strict=True)
    for (q0, q1), (k0, k1) in ends:
        query, key, value = (
            t[name][lo:hi].transpose(0, 1)[None]
            for name, lo, hi in (("query", q0, q1), ("key", k0, k1), ("value", k0, k1))
        )
        alone = concat_attention(query, key, value, t["v"], window=window, impl="reference")
        torch.testing.assert_close(out[q0:q1], alone[0].transpose(0, 1), rtol=1e-12, atol=1e-12)
