"""`Segments` and `Graph`: the same numbers as the tensors they are made of, with their values checked once."""

import dataclasses
import importlib

import pytest
import torch

import fused_attn as f
from fused_attn import Graph, Segments

LENGTHS, OTHER = [3, 0, 6], [2, 5, 0]
N, M = sum(LENGTHS), sum(OTHER)
EDGES = torch.tensor([[0, 1, 2, 2, 3, 0, 4], [1, 1, 0, 3, 3, 2, 0]])


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def offsets(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def module(name, *args, **options):
    torch.manual_seed(0)
    return getattr(f, name)(*args, **options)


PAIRS = {"query": r(N, 4), "key": r(M, 4), "value": r(M, 5)}
BOTH = ("cu_seqlens_q", "cu_seqlens_k")
# A call of packed rows, and the names of its offsets, the first of the lengths and the second of the others.
PACKED = {
    "location": (lambda **cu: f.location_attention(r(N, 4), r(4, 3), v=r(3), **cu), ("cu_seqlens",)),
    "location, window": (lambda **cu: f.location_attention(r(N, 4), r(4, 3), window=(1, 1), **cu), ("cu_seqlens",)),
    "statistics": (lambda **cu: f.statistics_pooling(r(N, 4), r(4, 3), v=r(3), **cu)[1], ("cu_seqlens",)),
    "target": (
        lambda **cu: f.target_attention(r(3, 4), r(N, 4), r(16, 3), None, r(3), **cu),
        ("cu_seqlens",),
    ),
    "concat": (lambda **cu: f.concat_attention(**PAIRS, v=r(4), **cu), BOTH),
    "distance": (lambda **cu: f.distance_attention(**PAIRS, **cu), BOTH),
    "general": (lambda **cu: f.general_attention(**PAIRS, **cu), BOTH),
    "word by word": (
        lambda **cu: f.word_by_word_attention(r(M, 4), r(N, 4), r(4, 4), r(4, 4), r(4, 4), w=r(4), w_t=r(4, 4), **cu),
        ("cu_seqlens_hypothesis", "cu_seqlens_premise"),
    ),
    "location-aware": (
        lambda **cu: f.location_aware_attention(
            r(3, 4), r(N, 4), r(N, 5), r(4), r(N).abs(), conv_weight=r(2, 3), u=r(2, 4), **cu
        ),
        ("cu_seqlens",),
    ),
    "LocationAwareAttention": (
        lambda **cu: module("LocationAwareAttention", 4, 4, 3)(r(3, 4), r(N, 4), **cu),
        ("cu_seqlens",),
    ),
    "LocationAttention": (lambda **cu: module("LocationAttention", 4, 3)(r(N, 4), **cu), ("cu_seqlens",)),
    "StatisticsPooling": (
        lambda **cu: module("StatisticsPooling", 4, 3, global_context=True)(r(N, 4), **cu),
        ("cu_seqlens",),
    ),
    "TargetAttention": (lambda **cu: module("TargetAttention", 4)(r(3, 4), r(N, 4), **cu), ("cu_seqlens",)),
    "GeneralAttention": (lambda **cu: module("GeneralAttention", 4)(**PAIRS, **cu), BOTH),
    "ConcatAttention": (
        lambda **cu: module("ConcatAttention", 4, 4, 3, context_dims=(2, 2, 2), num_heads=2)(
            **PAIRS, contexts=[r(3, 2), ("query", r(N, 2)), ("key", r(M, 2))], **cu
        ),
        BOTH,
    ),
    "DistanceAttention": (lambda **cu: module("DistanceAttention", 4, 4, 3, num_heads=2)(**PAIRS, **cu), BOTH),
    "WordByWordAttention": (
        lambda **cu: module("WordByWordAttention", 4, 4, 3)(r(M, 4), r(N, 4), **cu),
        ("cu_seqlens_hypothesis", "cu_seqlens_premise"),
    ),
}
each_packed = pytest.mark.parametrize(("call", "names"), PACKED.values(), ids=PACKED.keys())


def structures(names):
    tensors = dict(zip(names, (offsets(LENGTHS), offsets(OTHER)), strict=False))
    return tensors, {name: Segments.from_offsets(x) for name, x in tensors.items()}


@each_packed
def test_segments_give_what_their_offsets_give(call, names):
    tensors, segments = structures(names)
    torch.testing.assert_close(call(**segments), call(**tensors), rtol=0, atol=0)


@each_packed
def test_the_values_of_segments_are_not_checked_again(call, names, monkeypatch):
    tensors, segments = structures(names)
    looked = []
    monkeypatch.setattr("fused_attn._checks._check_values", lambda name, *_: looked.append(name))
    call(**segments)
    assert not looked
    call(**tensors)
    assert set(names) <= set(looked)


def test_two_levels_take_segments(monkeypatch):
    inner, outer = offsets([2, 0, 3, 4]), offsets([1, 3])
    args = Segments.from_offsets(inner), Segments.from_offsets(outer)
    score = f.Score(r(4, 3), r(3), r(3))
    expected = f.hierarchical_attention(r(N, 4), inner, outer, score, score)
    m = module("HierarchicalAttention", 4, 3)
    of_module = m(r(N, 4), inner, outer)
    monkeypatch.setattr("fused_attn._checks._check_values", lambda name, *_: pytest.fail(name))
    torch.testing.assert_close(f.hierarchical_attention(r(N, 4), *args, score, score), expected, rtol=0, atol=0)
    torch.testing.assert_close(m(r(N, 4), *args), of_module, rtol=0, atol=0)


@each_packed
def test_segments_of_other_rows_are_refused_by_name(call, names):
    _, segments = structures(names)
    for name in names:
        with pytest.raises(ValueError, match=f"^{name}: expected .*; got"):
            call(**segments | {name: Segments.from_offsets(offsets([1, 0, 1]))})


def test_offsets_that_changed_are_checked_again():
    segments = Segments.from_offsets(offsets(LENGTHS))
    segments.offsets[1] = 10
    with pytest.raises(ValueError, match="cu_seqlens: expected non-decreasing"):
        PACKED["location"][0](cu_seqlens=segments)


def test_segments_copy_what_they_are_made_of():
    cu = offsets(LENGTHS)
    segments = Segments.from_offsets(cu)
    cu[1] = 10
    PACKED["location"][0](cu_seqlens=segments)


def test_segments_of_lengths_offsets_and_jagged_rows_are_the_same():
    jagged = torch.nested.nested_tensor([r(n, 4) for n in LENGTHS], layout=torch.jagged)
    made = [
        Segments.from_offsets(offsets(LENGTHS)), Segments.from_lengths(torch.tensor(LENGTHS)),
        Segments.from_lengths(torch.tensor(LENGTHS).int()), Segments.from_jagged(jagged),
        Segments.from_offsets(offsets(LENGTHS)).to("cpu"),
    ]  # fmt: skip
    for segments in made:
        assert segments.offsets.tolist() == [0, 3, 3, 9]
        assert (len(segments), segments.longest, segments.lengths.tolist()) == (3, 6, LENGTHS)
    assert len(Segments.from_lengths(torch.tensor([], dtype=torch.int64))) == 0
    assert Segments.from_lengths(torch.tensor([], dtype=torch.int64)).longest == 0


def test_padded_rows_are_the_packed_ones():
    rows = r(N, 4)
    padded, mask = Segments.from_lengths(torch.tensor(LENGTHS)).pad(rows)
    assert padded.shape == (3, 6, 4)
    assert torch.equal(padded[mask], rows)
    assert mask.sum(1).tolist() == LENGTHS
    assert padded[~mask].abs().sum() == 0


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Segments.from_offsets([0, 3]), TypeError, "offsets: expected a torch.Tensor"),
        (
            lambda: Segments.from_offsets(offsets(LENGTHS).long()),
            TypeError,
            "offsets: expected .*int32; got int64.* offsets.int",
        ),
        (lambda: Segments.from_offsets(offsets([])[:0]), ValueError, "offsets: expected at least one offset"),
        (lambda: Segments.from_offsets(torch.tensor([0, 3, 2]).int()), ValueError, "offsets: expected non-decr"),
        (
            lambda: Segments.from_offsets(torch.tensor([1, 3]).int()),
            ValueError,
            "offsets: expected non-decr.* from 0; got .*; looks like lengths: .*, or as if the leading 0 is missing$",
        ),
        (
            lambda: Segments.from_offsets(torch.tensor([3, 1]).int()),
            ValueError,
            "offsets: expected non-decr.* from 0; got .*; looks like lengths: pass .* of them$",
        ),
        (lambda: Segments.from_lengths(torch.tensor([1, -1])), ValueError, "lengths: expected lengths of at least 0"),
        (lambda: Segments.from_lengths(torch.tensor([2**31])), ValueError, "lengths: expected fewer than"),
        (lambda: Segments.from_lengths(r(3)), TypeError, "lengths: expected .*int32"),
        (lambda: Segments.from_lengths([3, 4]), TypeError, "lengths: .* got list; a tensor of the number of rows"),
        (
            lambda: Segments.from_jagged(r(3, 4)),
            TypeError,
            "x: expected a nested tensor .*; got layout torch.strided",
        ),
        (lambda: Segments.from_jagged([3]), TypeError, "x: expected a nested tensor of .*; got list"),
        (lambda: Graph.from_csr(offsets([1, 2]), torch.tensor([0, 1, 5]).int(), 5), ValueError, "indices: expected"),
        (lambda: Graph.from_csr(offsets([1, 1]), torch.tensor([0, 1, 4]).int(), 5), ValueError, "indptr: expected"),
        (
            lambda: Graph.from_csr(offsets([1, 2]), torch.tensor([0, 1, 4]).int(), -1),
            ValueError,
            "num_keys: expected",
        ),
        (lambda: Graph.from_edges(EDGES, 5, 5, max_degree=1), ValueError, "max_degree: expected no node of more"),
        (lambda: Graph.from_edges(EDGES, 5, 5, max_degree=-1), ValueError, "max_degree: expected"),
        (lambda: Graph.from_edges(EDGES, 5, 5, max_degree=2.5), TypeError, "max_degree: expected"),
    ],
)
def test_bad_structures_are_refused_by_name(make, error, text):
    with pytest.raises(error, match=f"^{text}"):
        make()


W, V = r(4, 3), r(4)


class Pool(torch.nn.Module):
    def forward(self, h, segments):
        return f.location_attention(h, W, cu_seqlens=segments)


class Attend(torch.nn.Module):
    def forward(self, x, graph):
        return f.graph_attention(x, x, V, graph)


def graph() -> Graph:
    return Graph.from_edges(EDGES, 5, 5)[0]


CARRIED = {"segments": (Pool(), r(N, 4), lambda: structures(["c"])[1]["c"]), "graph": (Attend(), r(5, 4), graph)}


@pytest.mark.parametrize(("layer", "x", "make"), CARRIED.values(), ids=CARRIED.keys())
def test_structures_pass_compile_export_and_vmap(layer, x, make):
    structure = make()
    expected = layer(x, structure)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, structure), expected)
    torch.testing.assert_close(compiled(x, make()), expected)
    torch.testing.assert_close(torch.export.export(layer, (x, structure)).module()(x, structure), expected)
    both = torch.func.vmap(layer, in_dims=(0, None))(torch.stack([x, 2 * x]), structure)
    torch.testing.assert_close(both, torch.stack([expected, layer(2 * x, structure)]))


def test_a_graph_gives_what_its_csr_gives(monkeypatch):
    x, v = r(5, 4).requires_grad_(), r(4)
    made, order = Graph.from_edges(EDGES, 5, 5)
    indptr, indices, perm = f.csr_from_edges(EDGES, 5)
    assert torch.equal(order, perm)
    edge = r(7, 4)[perm]
    expected = f.graph_attention(x, x, v, indptr, indices, edge=edge)
    m = module("GraphAttention", 4, 3, num_heads=2)
    of_module = m(x, indptr, indices)
    monkeypatch.setattr("fused_attn._checks._check_values", lambda name, *_: pytest.fail(name))
    got = f.graph_attention(x, x, v, made, edge=edge)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(m(x, made), of_module, rtol=0, atol=0)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.kernel
def test_a_graph_is_transposed_once_and_only_for_a_gradient(device, monkeypatch):
    x, v = r(5, 4).to(device), r(4).to(device)
    made, _ = Graph.from_edges(EDGES.to(device), 5, 5)
    count = []
    transpose = importlib.import_module("fused_attn.graph")._transpose
    monkeypatch.setattr("fused_attn.graph._transpose", lambda *args: count.append(1) or transpose(*args))
    with torch.no_grad():
        f.graph_attention(x, x, v, made, impl="triton")
    assert count == []
    grads = []
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        grads += torch.autograd.grad(f.graph_attention(leaf, leaf, v, made, impl="triton").square().sum(), leaf)
    assert count == [1]
    leaf = x.clone().requires_grad_()
    out = f.graph_attention(leaf, leaf, v, made.indptr, made.indices, impl="triton")
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), leaf)[0], grads[2], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("edges", "queries", "keys", "most"),
    [
        (EDGES, 5, 5, max(EDGES[0].bincount().max(), EDGES[1].bincount().max())),
        (torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]), 5, 3, 3),  # of a key
        (torch.tensor([[0, 1, 2, 3, 4], [1, 1, 1, 1, 1]]), 2, 5, 5),  # of a query
        (torch.zeros(2, 0, dtype=torch.int64), 3, 0, 0),
        (torch.zeros(2, 0, dtype=torch.int32), 0, 3, 0),
    ],
)
def test_a_graph_knows_the_most_edges_of_a_node(edges, queries, keys, most):
    made, _ = Graph.from_edges(edges, queries, keys)
    assert most <= made.max_degree <= max(2 * most - 1, 1)
    assert made.max_degree.bit_count() == 1
    assert Graph.from_edges(edges, queries, keys, max_degree=100)[0].max_degree == 128
    assert made.to("cpu") is made
    moved = made.to("meta")
    assert (moved.indptr.device.type, moved.num_keys, moved.max_degree) == ("meta", keys, made.max_degree)
    assert Graph.from_csr(made.indptr.to("meta"), made.indices.to("meta"), keys).max_degree is None


@pytest.mark.kernel
def test_a_graph_without_hubs_starts_fewer_kernels_and_gives_the_same(device, monkeypatch):
    names: list[str] = []
    launching = importlib.import_module("fused_attn.kernels.arguments").launch
    for module in ("graph", "graph_bwd", "graph_hubs", "sums"):
        spy = f"fused_attn.kernels.{module}.launch"
        monkeypatch.setattr(spy, lambda kernel, *a, **k: names.append(kernel.__name__) or launching(kernel, *a, **k))
    x, v = r(200, 4).to(device), r(4).to(device)
    made, _ = Graph.from_edges(torch.stack([torch.arange(600) % 200, torch.arange(600) % 200]), 200, 200)
    made = made.to(device)
    assert made.max_degree == 4
    results = []
    for graph in (made, dataclasses.replace(made, max_degree=None)):
        names.clear()
        leaf = x.clone().requires_grad_()
        out = f.graph_attention(leaf, leaf, v.requires_grad_(), graph, impl="triton")
        results.append((len(names), out, *torch.autograd.grad(out.square().sum(), [leaf, v]), len(names)))
    (few, *one, few_all), (many, *other, many_all) = results
    assert (few, few_all, many, many_all) == (1, 4, 2, 6)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_what_a_graph_stands_for_is_not_given_beside_it():
    x, v, made = r(5, 4), r(4), graph()
    with pytest.raises(TypeError, match=r"^indices: expected None beside a Graph"):
        f.graph_attention(x, x, v, made, made.indices)
    with pytest.raises(TypeError, match=r"^transposed: expected None beside a Graph"):
        f.graph_attention(x, x, v, made, transposed=made.transpose())
    with pytest.raises(TypeError, match=r"^indptr: expected a Graph; got a pair"):
        f.graph_attention(x, x, v, f.Graph.from_edges(torch.tensor([[0, 1], [1, 1]]), 5, 5))
    with pytest.raises(ValueError, match=r"^indptr: expected a Graph of Nk = 4 key nodes, from key; got 5"):
        f.graph_attention(x, x[:4], v, made)
    with pytest.raises(ValueError, match=r"^indptr: expected shape \(Nq \+ 1,\)"):
        f.graph_attention(x[:4], x, v, made)


def nested(rows: torch.Tensor, lengths) -> torch.Tensor:
    return torch.nested.nested_tensor_from_jagged(rows, offsets(lengths).long())


JAGGED = {
    "concat": lambda q, k, x, **o: f.concat_attention(q, k, x, r(4), **o),
    "distance": lambda q, k, x, **o: f.distance_attention(q, k, value=x, **o),
    "general": lambda q, k, x, **o: f.general_attention(query=q, key=k, value=x, **o),
    "ConcatAttention": lambda q, k, x, **o: module("ConcatAttention", 4, 4, 3, context_dims=(2, 2))(
        q, k, x, contexts=[r(3, 2), ("key", r(M, 2))], **o
    ),
    "GeneralAttention": lambda q, k, x, **o: module("GeneralAttention", 4)(q, k, x, **o),
    "DistanceAttention": lambda q, k, x, **o: module("DistanceAttention", 4, 4, 3)(q, k, x, **o),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize(("name", "call"), JAGGED.items(), ids=JAGGED.keys())
def test_jagged_queries_and_keys_give_what_packed_ones_give(name, call, heads, compiled):
    """Two jagged tensors of keys of the same lengths need not be of the same offsets."""
    if heads is not None and name.endswith("Attention"):
        return
    h = () if heads is None else (heads,)
    query, key, value = (r(n, *h, d).requires_grad_() for n, d in ((N, 4), (M, 4), (M, 5)))
    mask = torch.tensor([True, False, True, True, False, True, True])
    run = torch.compile(call, backend="aot_eager") if compiled else call
    out = run(nested(query, LENGTHS), nested(key, OTHER), nested(value, OTHER), mask=mask)
    assert out.is_nested
    assert out.offsets().tolist() == offsets(LENGTHS).tolist()
    both = {"cu_seqlens_q": offsets(LENGTHS), "cu_seqlens_k": offsets(OTHER)}
    expected = call(query, key, value, mask=mask, **both)
    torch.testing.assert_close(out.values(), expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.values().square().sum(), (query, key, value)),
        torch.autograd.grad(expected.square().sum(), (query, key, value)),
    )
    lse = call(nested(query, LENGTHS), nested(key, OTHER), nested(value, OTHER), return_lse=True)[1]
    torch.testing.assert_close(lse.values(), call(query, key, value, **both, return_lse=True)[1])


def test_axes_of_jagged_results_are_in_the_order_of_the_queries():
    """As `scaled_dot_product_attention` takes them, ``(S, H, T, width)``, too."""
    query, key, value = (r(n, 2, d).requires_grad_() for n, d in ((N, 4), (M, 4), (M, 5)))
    packed = f.general_attention(
        query, key, value, cu_seqlens_q=offsets(LENGTHS), cu_seqlens_k=offsets(OTHER), return_lse=True
    )
    rows = nested(query, LENGTHS), nested(key, OTHER), nested(value, OTHER)
    made = f.general_attention(*(x.transpose(1, 2) for x in rows), return_lse=True)
    for got, want in zip(made, packed, strict=True):
        assert got.transpose(1, 2).offsets().tolist() == offsets(LENGTHS).tolist()
        torch.testing.assert_close(got.transpose(1, 2).values(), want)
    assert made[0].shape[:2] == (3, 2)
    mixed = f.general_attention(rows[0], rows[1].transpose(1, 2), rows[2])
    torch.testing.assert_close(mixed.values(), packed[0])
    torch.testing.assert_close(
        torch.autograd.grad(made[0].transpose(1, 2).values().square().sum(), (query, key, value)),
        torch.autograd.grad(packed[0].square().sum(), (query, key, value)),
    )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("jagged", ["query", "key"])
@pytest.mark.parametrize("name", JAGGED)
def test_jagged_tensors_go_with_padded_ones(name, jagged, compiled):
    """Those of the other side; the results are as the queries."""
    call = JAGGED[name]
    if name == "ConcatAttention":

        def call(q, k, x, **o):
            rows = r(3, 2, 2) if jagged == "query" else r(M, 2)
            return module("ConcatAttention", 4, 4, 3, context_dims=(2, 2))(
                q, k, x, contexts=[r(3, 2), ("key", rows)], **o
            )

    run = torch.compile(call, backend="aot_eager") if compiled else call
    if jagged == "query":
        query, key, value, mask = (
            r(N, 4),
            r(3, 2, 4),
            r(3, 2, 5),
            torch.tensor([[True], [True], [False]]).expand(3, 2),
        )
        out = run(nested(query, LENGTHS), key, value, mask=mask)
        assert out.is_nested
        expected = call(query, key, value, mask=mask, cu_seqlens_q=offsets(LENGTHS))
        torch.testing.assert_close(out.values(), expected)
        assert (expected[:3] != 0).all()
        assert (expected[3:] == 0).all()
    else:
        query, key, value = r(3, 2, 4), r(M, 4), r(M, 5)
        out = run(query, nested(key, OTHER), nested(value, OTHER))
        expected = call(query, key, value, cu_seqlens_k=offsets(OTHER))
        torch.testing.assert_close(out, expected)
        assert (expected[:2] != 0).all()
        assert (expected[2:] == 0).all()


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("keys", ["jagged", "packed", "padded"])
def test_weights_of_jagged_queries_have_a_row_a_query(keys, heads):
    h = () if heads is None else (heads,)
    query, rows, lengths = r(N, *h, 4), r(M, *h, 4), OTHER
    given = {"key": nested(rows, OTHER)}
    if keys == "packed":
        given = {"key": rows, "cu_seqlens_k": Segments.from_offsets(offsets(OTHER))}
    if keys == "padded":
        padded, lengths = r(3, *h, 4, 4), [4, 4, 4]
        given, rows = {"key": padded}, (padded if heads is None else padded.transpose(1, 2)).flatten(0, 1)
    options = {"return_weights": True, "return_scores": True, "return_lse": True}
    out, weights, scores, lse = f.general_attention(nested(query, LENGTHS), **given, **options)
    both = {"cu_seqlens_q": offsets(LENGTHS), "cu_seqlens_k": offsets(lengths)}
    want = f.general_attention(query, rows, **both, **options)
    for got, flat in zip((out, weights, scores, lse), want, strict=True):
        torch.testing.assert_close(got.values(), flat)
    assert out.offsets().tolist() == lse.offsets().tolist() == offsets(LENGTHS).tolist()
    each = [count for queries, count in zip(LENGTHS, lengths, strict=True) for _ in range(queries)]
    assert weights.offsets().tolist() == scores.offsets().tolist() == offsets(each).tolist()
    alone = f.general_attention(nested(query, LENGTHS), **given, value=False, return_weights=True)
    torch.testing.assert_close(alone.values(), want[1])
    bias, mask = r(*scores.values().shape), r(scores.values().shape[0], 1) > -1
    rows_of = torch.nested.nested_tensor_from_jagged
    terms = {"score_bias": rows_of(bias, scores.offsets()), "mask": rows_of(mask, scores.offsets())}
    got = f.general_attention(nested(query, LENGTHS), **given, **terms)
    want = f.general_attention(query, rows, **both, score_bias=bias, mask=mask)
    torch.testing.assert_close(got.values(), want)


def test_segments_of_pairs_have_a_row_a_query():
    queries, keys = Segments.from_lengths(torch.tensor(LENGTHS)), offsets(OTHER)
    pairs = Segments.of_pairs(queries, keys)
    assert pairs.lengths.tolist() == [2] * 3 + [0] * 6
    weights = f.general_attention(
        PAIRS["query"], PAIRS["key"], cu_seqlens_q=queries, cu_seqlens_k=keys, return_weights=True
    )[1]
    rows, mask = pairs.pad(weights)
    assert rows.shape == mask.shape == (N, 2)
    torch.testing.assert_close(rows.sum(1), torch.tensor([1.0] * 3 + [0.0] * 6))
    with pytest.raises(ValueError, match=r"^keys: expected as many sequences as queries has, 3; got 2"):
        Segments.of_pairs(queries, offsets([1, 2]))
    with pytest.raises(TypeError, match=r"^offsets: expected a torch.Tensor"):
        Segments.of_pairs(queries, [0, 3])


def test_states_of_jagged_queries_merge():
    """Over disjoint keys, and also with the parts as first axis of their rows."""
    query, key, value = r(N, 4), nested(r(M, 4), OTHER), nested(r(M, 5), OTHER)
    first, second = (
        f.general_attention(nested(query, LENGTHS), x, y, return_state=True)
        for x, y in ((key, value), (r(3, 4, 4), r(3, 4, 5)))
    )
    merged = f.merge([first, second])
    packed = f.merge([f.State(*(x.values() for x in state)) for state in (first, second)])
    for got, want in zip((*merged, merged.lse), (*packed, packed.lse), strict=True):
        assert got.offsets().tolist() == offsets(LENGTHS).tolist()
        torch.testing.assert_close(got.values(), want)
    with pytest.raises(
        ValueError, match=r"^states\[1\]\.out: expected a jagged tensor with the offsets of states\[0\]\.out"
    ):
        f.merge([first, f.general_attention(nested(query, [3, 1, 5]), key, value, return_state=True)])
    with pytest.raises(ValueError, match=r"^states\[1\]\.out: expected a jagged tensor, as states\[0\]\.out is"):
        f.merge([first, packed])


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        (
            {"key": r(M, 4)},
            ValueError,
            "key: expected shape (B, Tk, D) with D = 4 from query; got (7, 4); packed rows",
        ),
        ({"value": r(M, 5)}, ValueError, "value: expected a jagged tensor, as key is; got (7, 5)"),
        ({"value": nested(r(M, 5), [2, 4, 1])}, ValueError, "value: expected a jagged tensor with the offsets"),
        ({"value": nested(r(M, 5), [2, 5])}, ValueError, "value: expected a jagged tensor with the offsets"),
        (
            {"key": nested(r(M, 4), [2, 5]), "value": None},
            ValueError,
            "key: expected as many sequences as query has, 3; got 2",
        ),
        (
            {"query": r(N, 4)},
            ValueError,
            "query: expected shape (B, Tq, D) or (B, H, Tq, D); got (9, 4); packed rows",
        ),
        (
            {"query": r(2, N, 4)},
            ValueError,
            "cu_seqlens_k: expected shape (B + 1,) with B + 1 = 3 from query; got (4,)",
        ),
        (
            {"key": r(2, M, 4), "value": None},
            ValueError,
            "cu_seqlens_q: expected shape (B + 1,) with B + 1 = 3 from key",
        ),
        ({"cu_seqlens_q": offsets(OTHER)}, ValueError, "cu_seqlens_q: expected None with a jagged query"),
        ({"cu_seqlens_k": offsets(OTHER)}, ValueError, "cu_seqlens_k: expected None with a jagged key"),
        ({"key": nested(r(M, 4, 2), OTHER).transpose(1, 2)}, ValueError, "key: expected shape (M, D)"),
        (
            {"key": nested(r(M, 4), OTHER).transpose(1, 2)},
            ValueError,
            "key: expected a jagged tensor whose second axis",
        ),
        ({"score_bias": r(1)}, ValueError, "score_bias: expected P = "),
        ({"score_bias": nested(r(M), OTHER)}, ValueError, "score_bias: expected a jagged tensor with the offsets"),
        ({"key": [r(M, 4)]}, TypeError, "key: expected a torch.Tensor; got list"),
        ({"value": [r(M, 4)]}, TypeError, "value: expected a jagged tensor, as key is; got list"),
    ],
)
def test_jagged_tensors_that_do_not_fit_are_refused_by_name(changed, error, text):
    given = {"query": nested(r(N, 4), LENGTHS), "key": nested(r(M, 4), OTHER), "value": nested(r(M, 5), OTHER)}
    with pytest.raises(error) as raised:
        f.general_attention(**given | changed)
    assert str(raised.value).startswith(text)
