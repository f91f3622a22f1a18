"""Graph attention: the kernel against the reference, the reference against the formula, structure, exactness."""

import dataclasses
import math
import re

import hypothesis.strategies as st
import pytest
import torch
from _compare import (
    IMPLS,
    Result,
    assert_as_exact,
    assert_close,
    assert_identical,
    assert_matches_reference,
    evaluate,
    in_double,
    largest,
)
from _graph import TENSORS, Case, check, formula, operator, pairwise
from hypothesis import given, settings
from test_location_reference import BY_HAND

from fused_attn import add_self_loops, csr_from_edges, graph, graph_attention, location_attention, transpose_csr
from fused_attn.kernels import graph as kernels
from fused_attn.kernels.chip import chip_of
from fused_attn.kernels.inputs import GraphInputs

each_impl = pytest.mark.parametrize("impl", IMPLS)
both_values = pytest.mark.parametrize("value_dim", [5, None], ids=["values", "keys"])
CPU = torch.device("cpu")

# Sizes are odd, and around the tiles of the interpreter: 4 edges, 2 heads, 16 features.
FACTORS = {
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "queries": (1, 4),
    "keys": (1, 5),
    "edges": (1, 3, 17),
    "attn_dim": (1, 7, 17),
    "value_dim": (None, 1, 9, 35),
    "heads": (None, 1, 3),
    "v_heads": (True, False),
    "edge": (True, False),
    "activation": tuple(BY_HAND),
    "graph": ("random", "hub", "multi"),
    "index": (torch.int64, torch.int32),
    "static": (True, False),
    "layout": ("contiguous", "transposed", "strided", "expanded"),
    "dropout_p": (0.0, 0.3),
    "return_weights": (True, False),
}


# --- Every pair of factors, and what pairs may miss --------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("case", pairwise(FACTORS), ids=str)
def test_kernel_matches_the_reference_for_every_pair_of_factors(case, device):
    check(case, device)


@pytest.mark.kernel
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dims", [(40, None), (17, 40), (40, 3)], ids=str)
def test_rows_wider_than_a_tile_match_the_reference(dims, dropout_p, device):
    """In parts: the score's, the values', or both."""
    case = Case(queries=3, edges=9, attn_dim=dims[0], value_dim=dims[1], heads=3, dropout_p=dropout_p)
    check(case, device)


@pytest.mark.kernel
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("value_dim", [None, 36], ids=["keys", "values"])
def test_calls_of_several_widths_one_after_another_match_the_reference(value_dim, layout, device):
    """Whole vectors of 4, of 8, of 16, and none: of the first two the width is known to the compiler."""
    piece = kernels.graph_blocks(chip_of(device), 1, 1, 2, 12, 36).piece
    for width, edges in ((100, 9), (24, 9), (112, 9), (7, 9), (12, 2 * piece + 3), (100, 9)):
        graph = "hub" if edges > piece else "random"
        check(Case(edges=edges, attn_dim=width, value_dim=value_dim, layout=layout, graph=graph), device)


@pytest.mark.kernel
def test_more_nodes_than_programs_of_the_backward_match_the_reference(device):
    """A program then walks several nodes: 64 programs in the interpreter."""
    check(Case(queries=75, keys=3, edges=70, attn_dim=2, value_dim=None, heads=None, edge=False), device)


HUBS = {  # degrees in edges of a piece, and edges: where hubs begin and end in a chunk of edges
    "one node has all": [(3, 1)],
    "at the first edge of a chunk": [(1, 0), (2, 0), (1, 1), (0, 1), (4, 3)],
    "one after another": [(0, 3), (1, 1), (2, -5), (1, 4), (1, 2)],
    "almost": [(1, 0), (1, 0), (0, 1), (1, -1), (1, 0)],
    "the last edge is the last of a chunk": [(0, 1), (0, 0), (3, -1)],
    "one edge in its last chunk": [(0, 2), (2, -1), (1, 1)],
}


@pytest.mark.kernel
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.4, "value_dim": None}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("name", HUBS)
def test_nodes_of_many_edges_are_divided_and_match_the_reference(name, options, device):
    piece = kernels.graph_blocks(chip_of(device), 1, 1, 2, 7, 5).piece
    degrees = torch.tensor([pieces * piece + more for pieces, more in HUBS[name]])
    case = Case(queries=len(degrees), edges=int(degrees.sum()), **options)
    tensors = case.tensors(device)  # of four keys that have edges: in the transposed structure all are hubs
    tensors["indptr"] = torch.cat([degrees.new_zeros(1), degrees.cumsum(0)]).to(device)
    assert_matches_reference(case.op, tensors, dtype=case.dtype)


@pytest.mark.kernel
@pytest.mark.parametrize("pieces", [0, 8])
def test_free_gradients_of_the_output_and_the_normaliser_match_the_reference(pieces, device):
    """By the raw operator, whose results may all have one: Σ exp(s - m), whose m is a constant."""
    piece = kernels.graph_blocks(chip_of(device), 1, 1, 2, 7, 5).piece
    tensors = Case(edges=4 + pieces * piece).tensors(device)

    def op(*, impl, query, key, v, value, edge, indptr, indices):
        structure = (indptr, indices, None, None, None, None)
        inputs = GraphInputs(query, key, v, value, edge, *structure, "leaky_relu", 0.0)
        out, lse, *_ = graph._GRAPH(inputs, False) if impl == "triton" else graph._GRAPH.formula(inputs)
        return out, lse[..., 1].where(lse[..., 1] > 0, 1).log()  # no edge: 0

    assert_matches_reference(op, tensors)


@pytest.mark.kernel
@pytest.mark.parametrize("name", TENSORS)
def test_one_gradient_alone_is_that_of_the_reference(name, device):
    check(Case(edges=9), device, wrt=[name])


@pytest.mark.kernel
@pytest.mark.parametrize("wrt", [["key"], ["query"], ["v", "edge"]], ids=str)
def test_gradients_of_keys_that_are_the_values_alone_or_not_at_all(wrt, device):
    check(Case(edges=9, value_dim=None), device, wrt=wrt)


@pytest.mark.kernel
@both_values
@pytest.mark.parametrize("through", [("output",), ("weights",)], ids=["output", "weights"])
def test_gradients_through_one_result_alone_are_those_of_the_reference(through, value_dim, device):
    check(Case(edges=9, value_dim=value_dim, dropout_p=0.3), device, through=through)


@st.composite
def graphs(draw) -> tuple[Case, list[tuple[int, int]]]:
    """A call, and the edges of any graph."""
    queries, keys = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    edge = st.tuples(st.integers(0, keys - 1), st.integers(0, queries - 1))
    edges = draw(st.lists(edge, max_size=20))
    case = Case(
        queries=queries,
        keys=keys,
        edges=len(edges),
        attn_dim=draw(st.integers(1, 18)),
        value_dim=draw(st.one_of(st.none(), st.integers(1, 18))),
        heads=draw(st.sampled_from([None, 1, 2])),
        edge=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0.0, 0.5])),
    )
    return case, edges


@pytest.mark.kernel
@settings(max_examples=8)
@given(graphs())
def test_matches_the_reference_for_any_graph(device, call):
    case, edges = call
    index = torch.tensor(edges, dtype=torch.int64, device=device).reshape(-1, 2).T
    indptr, indices, _ = csr_from_edges(index, case.queries)
    assert_matches_reference(case.op, case.tensors(device) | {"indptr": indptr, "indices": indices})


# --- The oracle itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", [True, False], ids=["edge", "plain"])
@both_values
@pytest.mark.parametrize("activation", BY_HAND)
def test_reference_is_the_formula(activation, value_dim, edge):
    """Against loops over numbers."""
    case = Case(attn_dim=3, value_dim=value_dim, activation=activation, edge=edge)
    tensors = in_double(case.tensors(CPU))
    out, weights = case.op(impl="reference", **tensors)
    t = {name: x.tolist() for name, x in tensors.items()}
    act, values = BY_HAND[activation], t["key" if value_dim is None else "value"]
    for i in range(case.queries):
        edges = range(t["indptr"][i], t["indptr"][i + 1])
        for head in range(2):
            raw = []
            for e in edges:
                q, k = t["query"][i][head], t["key"][t["indices"][e]][head]
                x = t["edge"][e][head] if edge else [0.0] * 3
                raw.append(math.exp(sum(t["v"][head][a] * act(q[a] + k[a] + x[a]) for a in range(3))))
            want = [x / sum(raw) for x in raw]
            assert weights[edges.start : edges.stop, head].tolist() == pytest.approx(want, rel=1e-12)
            rows = [values[t["indices"][e]][head] for e in edges]
            total = [sum(w * row[d] for w, row in zip(want, rows, strict=True)) for d in range(out.shape[-1])]
            assert out[i, head].tolist() == pytest.approx(total, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_one_source_an_edge_is_pooling_over_segments(dropout_p):
    """Each edge with a key of its own: location attention over packed rows, which also drops the same weights."""
    rows, width = 11, 3
    torch.manual_seed(0)
    key, v = torch.randn(rows, width).double(), torch.randn(width).double()
    cu = torch.tensor([0, 4, 4, 5, rows], dtype=torch.int32)
    options = {"dropout_p": dropout_p, "return_weights": True, "impl": "reference"}
    torch.manual_seed(1)
    got = graph_attention(key.new_zeros(4, width), key, v, cu, torch.arange(rows), **options)
    torch.manual_seed(1)
    want = location_attention(key, None, v=v, activation="leaky_relu", cu_seqlens=cu, **options)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@each_impl
@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0, -0.5])
def test_leaky_relu_has_the_slope_that_is_asked_for(slope, impl, device):
    tensors = Case().tensors(device)

    def by_formula(*, impl, **rest):
        return formula(impl=impl, act=torch.nn.LeakyReLU(slope), **rest)

    got = evaluate(operator(negative_slope=slope, return_weights=True), tensors, impl)
    assert_as_exact(got, evaluate(by_formula, tensors, impl), evaluate(by_formula, in_double(tensors), impl))


# --- A list of edges ---------------------------------------------------------------------------------------------


@each_impl
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_list_of_edges_is_its_graph_with_features_and_weights_in_its_order(dtype, impl, device):
    tensors = Case(edges=9).tensors(device)
    edge_index = torch.tensor([[3, 1, 0, 3, 2, 1, 0, 2, 3], [1, 3, 0, 2, 1, 1, 3, 0, 2]], dtype=dtype, device=device)
    indptr, indices, order = csr_from_edges(edge_index, 4)
    attend = operator(return_weights=True)

    def by_edges(*, impl, edge, indptr, indices, **rest):
        out, weights = graph_attention(
            rest["query"], rest["key"], rest["v"], edge_index, value=rest["value"], edge=edge, return_weights=True,
            impl=impl,
        )  # fmt: skip
        return out, weights

    got = evaluate(by_edges, tensors, impl)
    csr = tensors | {"indptr": indptr, "indices": indices, "edge": tensors["edge"][order]}
    want = evaluate(attend, csr, impl)
    torch.testing.assert_close(got.outputs["output"], want.outputs["output"], rtol=0, atol=0)
    torch.testing.assert_close(got.outputs["weights"][order], want.outputs["weights"], rtol=0, atol=0)


def test_the_graph_of_a_list_of_edges_is_made_once_and_anew_when_that_is_written_to():
    edge_index = torch.tensor([[0, 1, 2], [2, 1, 0]])
    made = graph.edges_of(edge_index, 3, 3)
    assert graph.edges_of(edge_index, 3, 3) is made
    assert graph.edges_of(edge_index, 4, 3) is not made
    edge_index[0, 0] = 1
    assert graph.edges_of(edge_index, 3, 3).graph.indices.tolist() == [2, 1, 1]
    assert len(graph._MADE) >= 1
    before = len(graph._MADE)
    del edge_index
    assert len(graph._MADE) < before
    with torch.inference_mode():
        graph.edges_of(torch.tensor([[0], [0]]), 1, 1)


def test_a_list_of_edges_compiles_as_one_graph():
    query, v, edge = torch.randn(4, 2), torch.randn(2), torch.randn(4, 2)
    edge_index = torch.tensor([[3, 1, 0, 3], [1, 1, 0, 2]])

    def attend(edge_index):
        return graph_attention(query, query, v, edge_index, edge=edge, return_weights=True)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(edge_index), attend(edge_index))


def test_a_list_of_edges_is_told_what_is_wrong_with_it_by_its_own_name():
    query = torch.randn(3, 2)

    def attend(*edges, **more):
        return graph_attention(query, query, torch.randn(2), torch.tensor(edges), **more)

    with pytest.raises(ValueError, match=r"^edge_index\[0\]: expected non-negative indices under .* key nodes, 3"):
        attend([0, 3], [0, 1])
    with pytest.raises(ValueError, match=r"^edge_index\[1\]: expected"):
        attend([0, 1], [0, 3])
    with pytest.raises(ValueError, match=r"^edge_index: expected shape \(2, E\)"):
        attend([0, 1])
    with pytest.raises(TypeError, match=r"^edge_index: expected"):
        attend([0.0], [1.0])
    with pytest.raises(TypeError, match=r"^transposed: expected None"):
        attend([0], [1], transposed=(query, query, query))
    with pytest.raises(ValueError, match=r"^edge: expected .* 2"):
        attend([0, 1], [1, 1], edge=torch.randn(3, 2))


@pytest.mark.parametrize(
    "fill", ["mean", "add", "min", "max", "mul", 0.5, torch.tensor([2.0, 3.0]), torch.ones(1, 2)]
)
def test_self_loops_take_the_place_of_those_that_there_are(fill):
    edge_index = torch.tensor([[0, 1, 2, 2, 1], [1, 1, 0, 1, 1]])
    edge = torch.tensor([[1.0, 2.0], [7.0, 7.0], [3.0, -1.0], [5.0, -4.0], [9.0, 9.0]])
    index, features = add_self_loops(edge_index, 3, edge, fill=fill)
    assert index.tolist() == [[0, 2, 2, 0, 1, 2], [1, 0, 1, 0, 1, 2]]
    if isinstance(fill, str):
        of_one = {"mean": [3.0, -1.0], "add": [6.0, -2.0], "min": [1.0, -4.0], "max": [5.0, 2.0], "mul": [5.0, -8.0]}
        of_two = [1.0, 1.0] if fill == "mul" else [0.0, 0.0]  # no edge leads to it
        loops = [[3.0, -1.0], of_one[fill], of_two]
    else:
        loops = (torch.zeros(3, 2) + fill).tolist()
    assert features.tolist() == [[1.0, 2.0], [3.0, -1.0], [5.0, -4.0], *loops]
    assert add_self_loops(edge_index, 3)[1] is None


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"fill": "median"}, ValueError, "fill: expected a number, a tensor or one of mean, add, min, max, mul; got"),
        ({"fill": float("nan")}, ValueError, "fill: expected a finite number"),
        ({"num_nodes": 2}, ValueError, "edge_index[1]: expected non-negative indices under the number of nodes, 2"),
        ({"edge": torch.ones(3)}, ValueError, "edge: expected (E, ...) with E = 2 from edge_index; got (3,)"),
        (
            {"fill": torch.ones(3), "edge": torch.ones(2, 2)},
            ValueError,
            "fill: expected the features of one edge, (2,), from edge; got (3,)",
        ),
        ({"edge": [1.0]}, TypeError, "edge: expected a torch.Tensor; got list"),
    ],
    ids=str,
)
def test_self_loops_say_what_they_cannot_take(options, error, text):
    with pytest.raises(error, match="^" + re.escape(text)):
        add_self_loops(**({"edge_index": torch.tensor([[0, 1], [1, 2]]), "num_nodes": 3} | options))


# --- Structure ---------------------------------------------------------------------------------------------------


def test_csr_has_the_edges_of_each_target_in_their_order():
    edges = torch.tensor([[5, 3, 4, 3, 0, 3], [2, 0, 2, 2, 4, 0]])
    indptr, indices, perm = csr_from_edges(edges, 6)
    assert indptr.tolist() == [0, 2, 2, 5, 5, 6, 6]
    assert indices.tolist() == [3, 3, 5, 4, 3, 0]
    assert perm.tolist() == [1, 5, 0, 2, 3, 4]
    assert [x.tolist() for x in csr_from_edges(edges[:, :0], 2)] == [[0, 0, 0], [], []]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_transposed_structure_has_the_edges_of_each_source_in_their_order(dtype):
    edges = torch.tensor([[5, 3, 4, 3, 0, 3], [2, 0, 2, 2, 4, 0]], dtype=dtype)
    indptr, indices, _ = csr_from_edges(edges, 6)
    indptr_t, indices_t, perm = transpose_csr(indptr, indices, 7)
    assert indptr_t.tolist() == [0, 1, 1, 1, 4, 5, 6, 6]
    assert indices_t.tolist() == [4, 0, 0, 2, 2, 2]
    assert perm.tolist() == [5, 0, 1, 4, 3, 2]
    assert {x.dtype for x in (indptr, indices, indptr_t, indices_t)} == {dtype}
    back = transpose_csr(indptr_t, indices_t, 6)
    assert (back[0].tolist(), back[1].tolist()) == (indptr.tolist(), [3, 3, 3, 4, 5, 0])


@each_impl
@pytest.mark.parametrize("sizes", [(0, 3, 0), (3, 0, 0), (3, 2, 0), (0, 0, 0)], ids=str)
@both_values
def test_graphs_without_edges_give_zeros_and_zero_gradients(value_dim, sizes, impl, device):
    queries, keys, edges = sizes
    case = Case(queries=queries, keys=keys, edges=edges, value_dim=value_dim)
    tensors = case.tensors(device) | {"indptr": torch.zeros(queries + 1, dtype=torch.int64, device=device)}
    result = evaluate(case.op, tensors, impl)
    assert result.outputs["output"].shape == (queries, 2, value_dim or 7)
    assert result.outputs["weights"].shape == (0, 2)
    assert all(largest(x) == 0 for family in result for x in family.values())


@each_impl
@both_values
def test_nodes_without_edges_give_zeros_and_are_not_read(value_dim, impl, device):
    case = Case(value_dim=value_dim, dropout_p=0.3)
    tensors = case.tensors(device)
    clean = evaluate(case.op, tensors, impl)
    assert largest(clean.outputs["output"][0]) == 0
    lonely = {name: tensors[name].clone() for name in ("query", "key", "value") if name in tensors}
    for name, x in lonely.items():
        x[0 if name == "query" else -1] = torch.nan
    result = evaluate(case.op, tensors | lonely, impl)
    assert_identical(result, clean)
    for name in lonely:
        assert largest(result.gradients[name][0 if name == "query" else -1]) == 0, name


@each_impl
def test_the_order_of_edges_and_a_given_transposed_structure_change_nothing(impl, device):
    case = Case(edges=11)
    t = case.tensors(device)
    want = evaluate(case.op, t, impl)
    node = torch.repeat_interleave(torch.arange(4, device=device), t["indptr"].diff())
    shuffle = torch.randperm(11, generator=torch.Generator().manual_seed(0)).to(device)
    indptr, indices, perm = csr_from_edges(torch.stack([t["indices"], node])[:, shuffle], 4)
    order = shuffle[perm]
    parts = dict(zip(("indptr_t", "indices_t", "perm"), transpose_csr(indptr, indices, 5), strict=True))

    def shuffled(*, impl, edge, **rest):
        out, weights = case.op(impl=impl, edge=edge[order], **rest)
        return out, weights[torch.argsort(order)]

    assert_close(evaluate(shuffled, t | {"indptr": indptr, "indices": indices} | parts, impl), want)


@pytest.mark.kernel
def test_the_kernel_uses_the_transposed_structure_that_is_given(device, monkeypatch):
    def sorts_again(*_):
        raise AssertionError("the structure is made again")

    case = Case(static=True, return_weights=False)
    tensors = case.tensors(device)
    monkeypatch.setattr(graph, "_transpose", sorts_again)
    given = evaluate(case.op, tensors, "triton")
    monkeypatch.undo()
    names = ("indptr_t", "indices_t", "perm")
    made = evaluate(case.op, {name: x for name, x in tensors.items() if name not in names}, "triton")
    assert_identical(given, made)


# --- Exactness ---------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@both_values
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_huge_scores_match_the_reference(dtype, value_dim, device):
    """One edge has all the weight, and gradients are differences of equal numbers."""
    case = Case(dtype=dtype, edges=11, value_dim=value_dim)
    tensors = case.tensors(device)
    assert_matches_reference(case.op, tensors | {"v": tensors["v"] * 100}, dtype=dtype)


@pytest.mark.kernel
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_one_edge_with_all_the_weight_leaves_the_score_no_gradient(dropout_p, device):
    case = Case(queries=1, keys=5, edges=1, dropout_p=dropout_p, return_weights=False)
    gradients = evaluate(case.op, case.tensors(device), "triton").gradients
    assert all(largest(gradients[name]) == 0 for name in ("query", "key", "v", "edge"))


@pytest.mark.kernel
def test_the_rounding_of_values_that_are_nearly_alike_is_not_left_in_the_scores(device):
    """Of a linear score every query's gradient is 0: what is left is rounding, of the spread, not of the values."""
    case = Case(edges=12, edge=False, activation="identity", return_weights=False)
    tensors = case.tensors(device)
    tensors["value"] = tensors["value"] + 100
    fused, plain = (largest(evaluate(case.op, tensors, impl).gradients["query"]) for impl in ("triton", "reference"))
    assert fused < plain / 8


@pytest.mark.kernel
def test_adding_a_number_to_all_scores_of_a_node_changes_nothing(device):
    """By a feature that all the neighbours have alike, exactly: only the scores' own rounding is left to see."""
    case = Case(edges=11, return_weights=False)
    tensors = case.tensors(device)
    tensors["v"] = (tensors["v"] * 4).round() / 4
    tensors["v"][:, 0] = 1
    for name in ("query", "key", "edge"):
        tensors[name][..., 0] = 0
    exact = evaluate(case.op, in_double(tensors), "reference")
    tensors["query"][..., 0] = 1024
    shifted = evaluate(case.op, in_double(tensors), "reference")
    torch.testing.assert_close(shifted.outputs, exact.outputs, rtol=1e-10, atol=1e-10)
    assert_matches_reference(case.op, tensors, exact=shifted)


@pytest.mark.kernel
@both_values
def test_two_runs_are_bitwise_equal(value_dim, device):
    case = Case(dtype=torch.bfloat16, value_dim=value_dim, dropout_p=0.3)
    tensors = case.tensors(device)
    assert_identical(evaluate(case.op, tensors, "triton"), evaluate(case.op, tensors, "triton"))


@each_impl
def test_keys_as_values_are_those_values_and_their_gradients_add(impl, device):
    case = Case(value_dim=None, dropout_p=0.3)
    tensors = case.tensors(device)
    shared = evaluate(case.op, tensors, impl)
    apart = evaluate(case.op, tensors | {"value": tensors["key"].clone()}, impl)
    gradients = dict(apart.gradients)
    gradients["key"] = gradients["key"] + gradients.pop("value")
    assert_close(shared, Result(apart.outputs, gradients))


# --- Dropout -----------------------------------------------------------------------------------------------------


@each_impl
def test_dropout_drops_its_share_and_scales_the_rest(impl, device):
    """Values of one: each output is the sum of the weights that are kept."""
    edges = 400
    query, key = torch.zeros(1, 2, 1, device=device), torch.zeros(edges, 2, 1, device=device)
    indptr, indices = torch.tensor([0, edges], device=device), torch.arange(edges, device=device)
    attend = operator(value=torch.ones_like(key), dropout_p=0.25)
    torch.manual_seed(0)
    out = attend(impl=impl, query=query, key=key, v=torch.zeros(1, device=device), indptr=indptr, indices=indices)
    kept = out.flatten() * 0.75  # of two heads, with masks of their own
    assert kept[0] != kept[1]
    assert all(abs(x - 0.75) < 5 * math.sqrt(0.25 * 0.75 / edges) for x in kept.tolist())


@pytest.mark.kernel
def test_dropout_is_the_same_for_every_implementation(device):
    case = Case(dropout_p=0.5)
    tensors = case.tensors(device)
    kernel, plain = (evaluate(case.op, tensors, impl) for impl in ("triton", "reference"))
    assert_close(kernel, plain)
    without = evaluate(dataclasses.replace(case, dropout_p=0.0).op, tensors, "reference")
    torch.testing.assert_close(kernel.outputs["weights"], without.outputs["weights"])
    assert not torch.allclose(kernel.outputs["output"], without.outputs["output"])


@pytest.mark.kernel
def test_raw_backward_without_edges_passes_opcheck_in_any_layout(device):
    query = torch.randn(3, 5, 4, device=device).transpose(0, 1)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    forward = (query, query, torch.randn(3, 4, device=device), None, None, none.new_zeros(6), none, None, None, None)
    results = torch.ops.fused_attn.graph_fwd(*forward, None, "tanh", 0.0, None, False)
    options = "tanh", 0.0, None, False, [True, True, True, False, False]
    backward = (*results[:3], None, *forward, None, *results, *options)
    torch.library.opcheck(torch.ops.fused_attn.graph_bwd, backward)


def test_structures_compile_as_one_graph(device):
    index = torch.tensor([[3, 1, 0, 3], [1, 1, 0, 2]], device=device)

    def build(index):
        indptr, indices, perm = csr_from_edges(index, 3)
        return indptr, indices, perm, *transpose_csr(indptr, indices, 4)

    compiled = torch.compile(build, backend="aot_eager", fullgraph=True)
    for x, y in zip(compiled(index), build(index), strict=True):
        assert torch.equal(x, y)


def test_float64_is_an_error_for_the_kernel_only(device):
    t = in_double(Case().tensors(device))
    arguments = [t[name] for name in ("query", "key", "v", "indptr", "indices")]
    with pytest.raises(ValueError, match=r"^impl: 'triton' has no float64"):
        graph_attention(*arguments, impl="triton")
    assert graph_attention(*arguments, impl="auto").dtype == torch.float64
