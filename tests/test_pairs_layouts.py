"""Concat and general attention on tensors of any layout: what the contiguous call gives, every argument in it."""

import _concat
import _general
import pytest
from _compare import assert_close, evaluate
from _concat import ALL
from _layouts import LAYOUTS, laid_out

SIZES = {"queries": 6, "keys": 8, "attn_dim": 4, "value_dim": 6, "heads": 2}  # even: nothing is padded, and copied so
CASES = {
    "concat": _concat.Case(**SIZES, score_bias="bhqk", mask="pairs"),
    "concat, one v": _concat.Case(**SIZES, v_heads=False, score_bias="hq1", mask="keys", dropout_p=0.3),
    "concat, identity": _concat.Case(**SIZES, activation="identity", mask="keys", window=(2, 3)),
    "concat, packed": _concat.Case(**SIZES | {"queries": 12, "keys": 14}, ragged=True, dropout_p=0.3),
    "distance": _concat.Case(**SIZES, p=1, score_bias="bhqk", mask="pairs"),
    "concat, one query": _concat.Case(**SIZES | {"queries": 1, "heads": None}, score_bias="bqk", mask="pairs"),
    "general": _general.Case(**SIZES, score_bias="bhqk", mask="pairs", weight="heads", query_dim=6),
    "general, keys are values": _general.Case(**SIZES, own_value=False, score_bias="hq1", mask="keys", dropout_p=0.3),
    "general, one weight": _general.Case(**SIZES, weight="matrix", activation="tanh", window=(2, 3)),
    "general, dot": _general.Case(**SIZES | {"value_dim": 4}, return_weights=False),
    "general, dot and mask": _general.Case(**SIZES, own_value=False, mask="pairs", return_weights=False),
    "general, packed": _general.Case(**SIZES | {"queries": 12, "keys": 14}, ragged=True, weight="heads"),
}


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_layout_of_the_arguments_changes_nothing(case, layout, impl, device):
    tensors = laid_out(case.tensors(device), layout)
    plain = {name: x.contiguous() for name, x in tensors.items()}
    assert_close(evaluate(case.op, tensors, impl), evaluate(case.op, plain, impl))
