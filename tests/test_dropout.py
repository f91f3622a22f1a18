"""Dropout in every family that has it: one key of a few keeps its weight, a hundred times as large."""

import _concat
import _general
import _graph
import _location
import pytest
from _compare import IMPLS, assert_matches_reference

FEW = {"batch": 6, "queries": 4, "keys": 5, "dropout_p": 0.99}
CASES = {
    "location": _location.Case(rows=5, batch=24, dropout_p=0.99),
    "location, hops": _location.Case(rows=5, batch=24, dropout_p=0.99, score="mlp_hops"),
    "location, packed hops": _location.Case(rows=5, batch=24, dropout_p=0.99, score="mlp_hops", ragged=True),
    "concat": _concat.Case(**FEW),
    "concat, packed": _concat.Case(**FEW, ragged=True),
    "distance": _concat.Case(**FEW, p=1),
    "general": _general.Case(**FEW),
    "general, packed": _general.Case(**FEW, ragged=True),
    "graph": _graph.Case(queries=24, keys=9, edges=100, dropout_p=0.99),
}


@pytest.mark.parametrize("impl", [IMPLS[0], "auto"])
@pytest.mark.parametrize("name", CASES)
def test_a_weight_that_is_kept_of_few_has_exact_gradients(name, impl, device):
    """κ dO · value and dO · o are large and alike there, and so must be rounded alike."""
    case = CASES[name]
    for seed in (1, 2):
        assert_matches_reference(case.op, case.tensors(device), impl=impl, seed=seed)
