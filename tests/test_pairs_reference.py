"""The oracle itself, of concat and general attention: against loops over numbers, and segment by segment."""

import dataclasses
import itertools
import math

import _concat
import _general
import pytest
import torch
from _compare import in_double
from _concat import ACTIVATIONS
from _pairs import each_family
from test_location_reference import BY_HAND


def concat_score(case, numbers, head, q, k):
    return sum(v * BY_HAND[case.activation](a + b) for a, b, v in zip(q, k, numbers["v"][head], strict=True))


def general_score(case, numbers, head, q, k):
    matrix = numbers.get("weight", torch.eye(3).tolist())
    if case.weight == "heads":
        matrix = matrix[head]
    product = sum(a * matrix[m][n] * b for m, a in enumerate(q) for n, b in enumerate(k))
    return BY_HAND[case.activation](case.scale * product)


SMALL = {"batch": 1, "queries": 4, "keys": 6, "attn_dim": 3, "value_dim": 2, "heads": 2}
SMALL |= {"mask": "pairs", "window": (2, 3), "score_bias": "bhqk"}
CASES = [(_concat.Case(**SMALL, activation=activation), concat_score) for activation in ACTIVATIONS]
CASES += [
    (
        _general.Case(**SMALL, activation=activation, weight=weight, own_value=own, query_dim=2, scale=0.7),
        general_score,
    )
    for activation, weight, own in itertools.product(ACTIVATIONS, ("none", "matrix", "heads"), (True, False))
]


@pytest.mark.whole  # of few numbers each
@pytest.mark.parametrize(("case", "score_of"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_reference_is_the_formula(case, score_of):
    """Against loops over numbers."""
    left, right = case.window
    tensors = in_double(case.tensors(torch.device("cpu")))
    out, weights = case.op(impl="reference", **tensors)
    numbers = {name: x.tolist() for name, x in tensors.items()}
    query, key = numbers["query"][0], numbers["key"][0]
    values, mask = numbers["value"][0] if "value" in numbers else key, numbers["mask"][0]
    for head, i in itertools.product(range(2), range(4)):
        raw = []
        for j in range(6):
            score = score_of(case, numbers, head, query[head][i], key[head][j]) + numbers["score_bias"][0][head][i][j]
            raw.append(math.exp(score) if mask[i][j] and i - left <= j <= i + right else 0.0)
        want = [x / sum(raw) if sum(raw) else 0.0 for x in raw]
        assert weights[0, head, i].tolist() == pytest.approx(want, rel=1e-12, abs=1e-12)
        total = [sum(w * row[d] for w, row in zip(want, values[head], strict=True)) for d in range(out.shape[-1])]
        assert out[0, head, i].tolist() == pytest.approx(total, rel=1e-12, abs=1e-12)


@each_family
@pytest.mark.parametrize("window", [None, (2, 1)], ids=str)
def test_reference_of_packed_rows_is_that_of_each_segment_alone(window, make):
    case = make(queries=12, keys=14, heads=2, ragged=True, window=window)
    if make is _general.Case:
        case = dataclasses.replace(case, weight="heads")
    padded = dataclasses.replace(case, ragged=False, return_weights=False)
    t = in_double(case.tensors(torch.device("cpu")))
    out = case.op(impl="reference", **t)
    ends = zip(*(itertools.pairwise(t.pop(f"cu_seqlens_{side}").tolist()) for side in "qk"), strict=True)
    for (q0, q1), (k0, k1) in ends:
        parts = (("query", q0, q1), ("key", k0, k1), ("value", k0, k1))
        rows = {name: t[name][lo:hi].transpose(0, 1)[None] for name, lo, hi in parts}
        alone = padded.op(impl="reference", **t | rows)
        torch.testing.assert_close(out[q0:q1], alone[0].transpose(0, 1), rtol=1e-12, atol=1e-12)
