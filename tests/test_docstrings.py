"""The docstrings' shapes are those of the tables that arguments are checked by."""

import re

import pytest

from fused_attn import (
    concat,
    distance,
    general,
    graph,
    hierarchical,
    location,
    location_aware,
    recurrent,
    statistics,
    target,
)

FUNCTIONS = {
    concat.concat_attention: concat._TABLES.values(),
    distance.distance_attention: distance._TABLES.values(),
    general.general_attention: general._TABLES[True].values(),  # with a weight: without one Dq = Dk
    graph.graph_attention: graph._TABLES.values(),
    hierarchical.hierarchical_attention: [hierarchical._TABLE],
    location.location_attention: [
        *(location._TABLES[packed, "A"] for packed in (False, True)),
        {"w": location._TABLES[False, "R"]["w"]},  # a context's A is then R, or no axis
    ],
    recurrent.word_by_word_attention: recurrent._TABLES.values(),
    location_aware.location_aware_attention: location_aware._STEP_TABLES.values(),
    location_aware.location_aware_sequence: [
        {name: table[name] for name in ("query", "previous")}  # the others as in a step
        for table in location_aware._SEQUENCE_TABLES.values()
    ],
    statistics.statistics_pooling: statistics._TABLES.values(),
    target.target_attention: target._TABLES.values(),
}


def parameters(doc):
    """Parameters of a docstring, and what is said of each; of those that stand together alike."""
    section = doc.split("Parameters\n")[1].split("Returns\n")[0]
    said = re.split(r"\n    (?=\S)", section)[1:]
    entries = (entry.partition("\n") for entry in said)
    return {name: " ".join(text.split()) for names, _, text in entries for name in names.split(", ")}


def written(form):
    """``("B", "T+1")`` as ``(B, T + 1)``."""
    sizes = [size.replace("+", " + ") for size in form]
    return f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_shape_of_the_table_is_said(function):
    said = parameters(function.__doc__)
    missing = set()
    for table in FUNCTIONS[function]:
        for name, row in table.items():
            text = said.get(name.partition("[")[0])
            if text is None or text.startswith("As in `"):
                continue
            # Packed rows are N, of keys too where both sides are said at once.
            both = [{written(form), written(form).replace("(M,", "(N,")} for form in row.forms]
            missing |= {(name, *forms) for forms in both if not any(form in text for form in forms)}
    assert sorted(missing) == []
