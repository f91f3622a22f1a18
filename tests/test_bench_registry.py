import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from bench import run, run_table
from bench.families import REGISTRY
from bench.families.problem import MODES, Case, Cost, Op
from bench.families.sizes import ragged_lengths, visible_pairs
from bench.peers import Peer
from fused_attn import concat_attention, location_attention

Console = pytest.importorskip("rich.console").Console

LOCATION, CONCAT, DISTANCE, GENERAL, GRAPH, HIERARCHICAL, RECURRENT, STATISTICS, AWARE, TARGET = REGISTRY
CASES = [pytest.param(op, case, id=run.label(op, case)) for op in REGISTRY for case in op.cases]
CPU = torch.device("cpu")
TINY = Case("tiny", {"B": 2, "T": 8, "D": 4, "A": 3, "gates": 1}, torch.float32, "cpu")
TINY_CONCAT = Case("tiny", {"B": 2, "Tq": 5, "Tk": 6, "A": 3, "Dv": 4}, torch.float32, "cpu")


def nbytes(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def test_cases_have_names_of_their_own() -> None:
    names = [(run.label(op, case), case.device) for op in REGISTRY for case in op.cases]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_case_is_built_in_small_and_its_cost_counts_its_tensors(op: Op, case: Case) -> None:
    small = dataclasses.replace(case, sizes=case.capped(9), check={})
    inputs = op.inputs(small.sizes, case.dtype, CPU, 3)
    again, other = (op.inputs(small.sizes, case.dtype, CPU, seed) for seed in (3, 4))
    for name, x in inputs.items():
        assert torch.equal(x, again[name]), name
        if x.is_floating_point():
            assert x.dtype == case.dtype
            assert not torch.equal(x, other[name]), name
            assert x.count_nonzero() > 0, name

    call = run.call_of(op, small, "reference", CPU)
    out = run.runner(call, inputs, MODES[0])()["out"]
    results = run.runner(call, inputs, MODES[1], torch.randn_like(out))()
    floating = [name for name, x in inputs.items() if x.is_floating_point()]
    assert list(results) == ["out", *floating]
    for name in floating:
        assert results[name].shape == inputs[name].shape
    forward, both = (op.work(small, mode) for mode in MODES)
    assert forward.bytes == nbytes([*inputs.values(), out])
    assert both.tanhs == forward.tanhs >= 0
    # The backward reads the inputs and the gradient of the output, and writes the other gradients.
    assert both.bytes == forward.bytes + nbytes([*inputs.values(), out]) + nbytes(results[name] for name in floating)
    assert both.flops == 3 * forward.flops > 0


@pytest.mark.parametrize(
    ("sizes", "forward", "backward"),
    [
        # H 1·4·2, w 2, b 1 in: 11; out 2. Backward: 11 + 2 in, 11 out. A row: 2 products for s, 2 for the sum.
        ({"B": 1, "T": 4, "D": 2}, (4 * 4 * 2, 13 * 2), (2 * 32, 24 * 2)),
        # H 2·3·5 = 30, W 5·7, b 7, v 7: 79; out 10. A row: 5·7 + 7 + 5 products.
        ({"B": 2, "T": 3, "D": 5, "A": 7}, (6 * 2 * 47, 89 * 2), (2 * 564, 168 * 2)),
        # Two projections: H 30, W and G 70, b and g 14, v 7: 121; out 10. A row: 70 + 7 + 5.
        ({"B": 2, "T": 3, "D": 5, "A": 7, "gates": 1}, (6 * 2 * 82, 131 * 2), (2 * 984, 252 * 2)),
        # Two hops: H 30, W 35, b 7, v 14: 86; out 20. A row: 35 + 14 + 10.
        ({"B": 2, "T": 3, "D": 5, "A": 7, "R": 2}, (6 * 2 * 59, 106 * 2), (2 * 708, 192 * 2)),
        # Two sequences of one row: H 2·5, W 35, b 7, v 7: 59; out 10; three int32 offsets.
        ({"S": 2, "T": 1, "D": 5, "A": 7}, (2 * 2 * 47, 69 * 2 + 12), (2 * 188, 128 * 2 + 12)),
        # One output a row, out 30: of a scan a row is in one sum, of a window of three in three.
        ({"B": 2, "T": 3, "D": 5, "A": 7, "right": 0}, (6 * 2 * 47, 109 * 2), (2 * 564, 188 * 2)),
        ({"B": 2, "T": 9, "D": 5, "A": 7, "left": 1, "right": 1}, (18 * 2 * 57, 229 * 2), (2 * 2052, 368 * 2)),
    ],
    ids=["linear", "mlp", "gated", "hops", "ragged", "prefix", "window"],
)
def test_location_cost_by_hand(sizes, forward, backward) -> None:
    assert LOCATION.cost(sizes, 2) == (Cost(*forward), Cost(*backward))


@pytest.mark.parametrize(
    ("sizes", "forward", "backward"),
    [
        # Query 3·5, key 4·5, value 4·7, v 5 in, twice but v: 131; out 2·3·7. A pair: 7 products, 5 tanh.
        ({}, (2 * 24 * 7, 173 * 2, 24 * 5), (4 * 24 * 7, 304 * 2)),
        ({"relu": 1}, (2 * 24 * 7, 173 * 2), (4 * 24 * 7, 304 * 2)),
        # Three heads have three of everything.
        ({"H": 3}, (6 * 24 * 7, 519 * 2, 72 * 5), (12 * 24 * 7, 912 * 2)),
        # Causal: 1 + 2 + 3 of 12 pairs. The key before it too: 1 + 2 + 2. Strictly the one before: 0 + 1 + 1.
        ({"right": 0}, (2 * 12 * 7, 173 * 2, 12 * 5), (4 * 12 * 7, 304 * 2)),
        ({"left": 1, "right": 0}, (2 * 10 * 7, 173 * 2, 10 * 5), (4 * 10 * 7, 304 * 2)),
        ({"left": 1, "right": -1}, (2 * 4 * 7, 173 * 2, 4 * 5), (4 * 4 * 7, 304 * 2)),
        # Lengths of at least min(16, Tk) = all 4 keys, and the mask: a byte a key.
        ({"padded": 1}, (2 * 24 * 7, 173 * 2 + 8, 24 * 5), (4 * 24 * 7, 304 * 2 + 8)),
        # Two sequences as long as those, and three int32 offsets twice.
        ({"S": 2}, (2 * 24 * 7, 173 * 2 + 24, 24 * 5), (4 * 24 * 7, 304 * 2 + 24)),
    ],
    ids=["plain", "relu", "heads", "causal", "window", "strict", "padded", "ragged"],
)
def test_concat_cost_by_hand(sizes, forward, backward) -> None:
    assert CONCAT.cost({"B": 2, "Tq": 3, "Tk": 4, "A": 5, "Dv": 7, **sizes}, 2) == (Cost(*forward), Cost(*backward))


@pytest.mark.parametrize(
    ("sizes", "forward", "backward"),
    [
        # Query 3·5, key and value 4·5 each, in; out 3·5. A pair: 5 products for s, 5 for the sum.
        ({"Dv": 5}, (2 * 12 * 10, 70 * 2), (4 * 12 * 10, 125 * 2)),
        # The values are the keys: one of them is read.
        ({}, (2 * 12 * 10, 50 * 2), (4 * 12 * 10, 85 * 2)),
        # A weight of 25, which each of three queries meets.
        ({"weight": 1}, (2 * 12 * 10 + 2 * 75, 75 * 2), (4 * 12 * 10 + 4 * 75, 135 * 2)),
        # Two heads have two of everything; causal: 6 of 12 pairs.
        ({"H": 2, "right": 0}, (4 * 6 * 10, 100 * 2), (8 * 6 * 10, 170 * 2)),
    ],
    ids=["dot", "shared", "bilinear", "causal heads"],
)
def test_general_cost_by_hand(sizes, forward, backward) -> None:
    assert GENERAL.cost({"B": 1, "Tq": 3, "Tk": 4, "D": 5, **sizes}, 2) == (Cost(*forward), Cost(*backward))


@pytest.mark.parametrize(
    ("sizes", "other"),
    # Lengths of at least min(16, T) = T: ragged ones are as long as the others. Offsets in int32, and a byte a word.
    [({"B": 2}, 0), ({"B": 2, "padded": 1}, 6), ({"S": 2}, 2 * 3 * 4)],
    ids=["plain", "padded", "ragged"],
)
def test_recurrent_cost_by_hand(sizes, other) -> None:
    # Premise 2·3·5 and hypothesis 2·4·5, W_y, W_h, W_r 5·7 each, w 7, W_t 25: 207; out 40.
    flops = 2 * (6 * 35 + 8 * (2 * 35 + 25) + 24 * 5)
    want = Cost(flops, 247 * 2 + other, 24 * 7), Cost(2 * flops, 454 * 2 + other)
    assert RECURRENT.cost({"Tk": 3, "Tq": 4, "D": 5, "A": 7, **sizes}, 2) == want


@pytest.mark.parametrize("padded", [0, 1])
def test_location_aware_cost_by_hand(padded) -> None:
    # Query 2·5, keys 6·5, values 6·7, v 5, weights 6, F 2·3, U 2·5: 109; out 14. A key: 6 + 10 + 5 + 7; a byte.
    flops = 2 * 6 * 28
    want = Cost(flops, 123 * 2 + 6 * padded, 30), Cost(2 * flops, 232 * 2 + 6 * padded)
    assert AWARE.cost({"B": 2, "Tk": 3, "A": 5, "Dv": 7, "C": 2, "K": 3, "padded": padded}, 2) == want


@pytest.mark.parametrize("edge", [0, 1])
def test_graph_cost_by_hand(edge) -> None:
    # Query, key and out of 3 nodes, 2·5 each; v 10; edges of 10; int32: two offsets of 4, three numbers an edge.
    rows, index = (30 + 30 + 10 + 40 * edge) * 2, 4 * (4 + 4 + 3 * 4)
    want = Cost(4 * 4 * 2 * 5, rows + 60 + index), Cost(8 * 4 * 2 * 5, 2 * rows + 60 + index)
    assert GRAPH.cost({"N": 3, "E": 4, "H": 2, "A": 5, "edge": edge}, 2) == want


def test_graph_has_few_nodes_with_many_neighbours() -> None:
    inputs = GRAPH.inputs({"N": 1000, "E": 7000, "H": 1, "A": 1}, torch.float32, CPU, 0)
    for name in ("indptr", "indptr_t"):
        degrees = inputs[name].diff().sort(descending=True).values
        assert degrees.sum() == 7000
        assert degrees[:10].sum() > 7000 / 5  # 0.01 ** (1 / 3) of them are expected
        assert degrees.median() < 7


def test_hierarchical_cost_by_hand() -> None:
    # One word, 2; W 6, b and v 3 each, twice: 26 in; 2 out; two int32 offsets twice. Twice 6 + 3 + 2 products.
    forward, backward = Cost(2 * 22, 28 * 2 + 16), Cost(4 * 22, 54 * 2 + 16)
    assert HIERARCHICAL.cost({"G": 1, "L": 1, "T": 1, "D": 2, "A": 3}, 2) == (forward, backward)


def test_padded_peer_of_hierarchical_says_the_same_and_has_gradients() -> None:
    case = Case("tiny", {"G": 5, "L": 4, "T": 6, "D": 7, "A": 3}, torch.float32, "cpu")
    found = run.check(HIERARCHICAL, case, ["padded"], CPU, 0)["padded"]
    assert "failure" not in found
    assert list(found["errors"]) == [
        "out",
        *(n for n in HIERARCHICAL.inputs(case.sizes, torch.float32, CPU, 0) if "off" not in n),
    ]
    assert run.modes_of("padded") == MODES


@pytest.mark.parametrize(
    ("sizes", "forward", "backward"),
    [
        # H 2·3·5 = 30, W 5·7, b 7, v 7: 79; out 2·2·5. A frame: 5·7 + 7 products for s, 5 for either moment.
        ({"B": 2, "T": 3}, (6 * 2 * 52, 99 * 2), (2 * 624, 178 * 2)),
        # A score a channel: v 7·5.
        ({"B": 2, "T": 3, "channel": 1}, (6 * 2 * 80, 127 * 2), (2 * 960, 234 * 2)),
        # Two sequences of one frame, and three int32 offsets.
        ({"S": 2, "T": 1}, (2 * 2 * 52, 79 * 2 + 12), (2 * 208, 138 * 2 + 12)),
    ],
    ids=["frame", "channel", "ragged"],
)
def test_statistics_cost_by_hand(sizes, forward, backward) -> None:
    assert STATISTICS.cost({"D": 5, "A": 7, **sizes}, 2) == (Cost(*forward), Cost(*backward))


@pytest.mark.parametrize(
    ("sizes", "forward", "backward"),
    [
        # Queries 2·5, keys 6·5, W1 20·7, b1 7, v 7, b3: 195; out 2·5. A user: 5·7 products; a key: 5·7 + 7 + 5.
        ({"B": 2, "T": 3}, (2 * (2 * 35 + 6 * 47), 205 * 2), (4 * (2 * 35 + 6 * 47), 400 * 2)),
        # W2 7·3, b2 and v 3 each, and no v of 7.
        ({"B": 2, "T": 3, "K": 3}, (2 * (2 * 35 + 6 * 64), 225 * 2), (4 * (2 * 35 + 6 * 64), 440 * 2)),
        # Two users of one key, and three int32 offsets.
        ({"S": 2, "T": 1}, (2 * (2 * 35 + 2 * 47), 185 * 2 + 12), (4 * (2 * 35 + 2 * 47), 360 * 2 + 12)),
    ],
    ids=["one layer", "two", "ragged"],
)
def test_target_cost_by_hand(sizes, forward, backward) -> None:
    assert TARGET.cost({"D": 5, "A": 7, **sizes}, 2) == (Cost(*forward), Cost(*backward))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("more", [{"Dv": 16}, {"H": 2, "Dv": 16, "right": 0}, {}], ids=["dot", "causal", "shared"])
@pytest.mark.parametrize("peer", ["sdpa", "flex"])
def test_peers_of_general_say_the_same(peer, more) -> None:
    case = Case("tiny", {"B": 2, "Tq": 130, "Tk": 130, "D": 16, **more}, torch.float32, "cpu")
    inputs = GENERAL.inputs(case.sizes, torch.float32, CPU, 0)
    found = GENERAL.peers(case.sizes)[peer].call(**inputs, **GENERAL.options(case.sizes))
    torch.testing.assert_close(found, run.call_of(GENERAL, case, "reference", CPU)(**inputs))


@pytest.mark.parametrize(("op", "case"), [pytest.param(CONCAT, c, id=run.label(CONCAT, c)) for c in CONCAT.cases])
def test_visible_pairs_are_the_weights_that_are_not_zero(op: Op, case: Case) -> None:
    sizes = {name: min(size, 40 if name in ("Tq", "Tk") else 3) for name, size in case.sizes.items()}
    inputs = op.inputs(sizes, torch.float32, CPU, 0)
    options = {**op.options(sizes), "return_weights": "S" not in sizes}
    if "S" in sizes:
        q, k = (ragged_lengths(sizes, axis) for axis in ("Tq", "Tk"))
        assert visible_pairs(sizes) == sum(a * b for a, b in zip(q, k, strict=True))
    else:
        _, weights = op.call(**inputs, **options, impl="reference")
        assert visible_pairs(sizes) * sizes.get("H", 1) == weights.count_nonzero()


def test_concat_weights_are_neither_uniform_nor_one_hot() -> None:
    sizes = {"B": 1, "Tq": 64, "Tk": 512, "A": 128, "Dv": 8}
    _, weights = concat_attention(**CONCAT.inputs(sizes, torch.float32, CPU, 0), return_weights=True)
    entropy = -(weights * weights.log()).sum(-1).mean() / torch.tensor(512.0).log()
    assert 0.5 < entropy < 0.95


def test_ragged_lengths_belong_to_the_case() -> None:
    lengths = ragged_lengths({"S": 64, "T": 4096})
    assert lengths == ragged_lengths({"S": 64, "T": 4096})
    assert len(lengths) == 64
    assert 16 <= min(lengths) < 500 < 3500 < max(lengths) <= 4096


def floor(cost: Cost) -> tuple[float, str]:
    return run.floor_of(cost, "float32", {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": {"float32": 1e12}})


def test_the_higher_of_the_two_bounds_is_the_floor() -> None:
    assert floor(Cost(flops=10**6, bytes=10**6)) == (1.0, "memory")
    assert floor(Cost(flops=2 * 10**9, bytes=10**6)) == (2.0, "compute")


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Run the benchmark on the tiny case with `op`; the exit status and what was stored."""
    monkeypatch.setattr(run, "ceilings", lambda *_: {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": {"float32": 1e9}})

    def go(op: Op, *argv: str, case: Case = TINY):
        monkeypatch.setattr(run, "REGISTRY", [dataclasses.replace(op, cases=(case,))])
        output = tmp_path / "sub" / "out.json"
        argv = ("--quick", "--device", "cpu", "--provider", "fused", "--provider", "reference", *argv)
        status = run.main([*argv, "--output", str(output)])
        return status, json.loads(output.read_text())

    return go


def test_quick_run_stores_what_it_promises(quick, capsys) -> None:
    status, report = quick(LOCATION, "--commit", "abc", "--case", "tiny")
    assert status == 0
    assert report["device"]["type"] == "cpu"
    assert report["device"]["name"]
    assert report["versions"].keys() >= {"python", "torch", "triton"}
    assert report["commit"] == "abc"
    assert report["dirty"] in (True, False, None)
    assert report["command"].startswith("python -m bench.run --quick --device cpu")
    assert report.keys() >= {"date", "ceilings", "quick", "timer"}
    assert [(row["provider"], row["mode"]) for row in report["rows"]] == [
        (provider, mode) for provider in ("fused", "reference") for mode in MODES
    ]
    for row in report["rows"]:
        assert (row["family"], row["case"], row["dtype"]) == ("location", "tiny", "float32")
        assert row["sizes"] == TINY.sizes
        assert row["impl"] == ("auto" if row["provider"] == "fused" else "reference")
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert Cost(row["flops"], row["bytes"]) == LOCATION.work(TINY, row["mode"])
        assert row["percent_of_ceiling"] == pytest.approx(100 * row["floor_ms"] / row["median_ms"])
        assert row["errors"].keys() == {"out", "h", "w", "b", "v", "gate_w", "gate_b"}
        assert row["error"] == max(row["errors"].values()) < 1e-5
        assert ("peak_bytes" in row) == (sys.platform == "linux")
        assert "x_tanh_wall" not in row
        assert "failure" not in row
    printed = capsys.readouterr().out
    assert "No kernel ran" in printed
    assert "threads" in printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_its_rows_and_prints_them(quick, monkeypatch, capsys, number) -> None:
    measured = run.numbers

    def interrupted(call, draw, mode, device, **options):
        if mode != "forward":
            signal.raise_signal(number)
        return measured(call, draw, mode, device, **options)

    monkeypatch.setattr(run, "numbers", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        status, report = quick(LOCATION)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert status == 130
    assert report["interrupted"]
    assert [(row["provider"], row["mode"]) for row in report["rows"]] == [("fused", "forward")]
    assert "gated" not in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_rows_are_stored_one_by_one(quick, monkeypatch, tmp_path) -> None:
    counts = []
    measured = run.numbers

    def numbers(*args, **options):
        output = tmp_path / "sub" / "out.json"
        counts.append(len(json.loads(output.read_text())["rows"]) if output.exists() else 0)
        return measured(*args, **options)

    monkeypatch.setattr(run, "numbers", numbers)
    quick(LOCATION)
    assert counts == [0, 1, 2, 3]


def test_families_take_turns() -> None:
    chosen = list(run.select("cuda"))
    turns = run.in_turns(chosen)
    assert sorted(run.label(*one) for one in turns) == sorted(run.label(*one) for one in chosen)
    assert [op.family for op, _ in turns[: len(REGISTRY)]] == [op.family for op in REGISTRY]
    of_concat = [case for op, case in turns if op is CONCAT]
    assert of_concat == [case for op, case in chosen if op is CONCAT]


def test_threads_are_those_of_idle_cores_unless_asked_for(quick, monkeypatch) -> None:
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    seen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    for load, threads in ((0.2, 4), (2.6, 1), (9.0, 1)):
        monkeypatch.setattr(run.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert run.idle_cores() == threads
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(run.os, "getloadavg", lambda: (1.9, 0.0, 0.0))
    quick(LOCATION)
    quick(LOCATION, "--threads", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    quick(LOCATION)
    assert seen == [2, 3]


def test_peak_memory_counts_what_a_call_takes_and_gives_back() -> None:
    def take() -> None:  # freed blocks of this size stay with the allocator, and are counted all the same
        blocks = [torch.ones(2**18) for _ in range(64)]
        del blocks[:]

    take()
    found = run.peak_bytes(take, CPU)
    if found is None:
        pytest.skip("this system does not tell")
    assert 63 * 2**20 < found < 80 * 2**20
    assert run.peak_bytes(lambda: None, CPU) < 4 * 2**20


def test_where_memory_is_not_told_it_is_left_out(quick, monkeypatch, capsys) -> None:
    class NoGlibc:
        def __init__(self, _) -> None: ...

    monkeypatch.setattr(run.ctypes, "CDLL", NoGlibc)
    _, report = quick(LOCATION)
    assert not any("peak_bytes" in row for row in report["rows"])
    assert "peak MiB" not in capsys.readouterr().out


def test_speed_ups_over_the_reference_and_over_its_compilation(monkeypatch) -> None:
    row = {"family": "concat", "case": "tiny", "dtype": "float32", "mode": "forward"}
    row |= {"p20_ms": 1.0, "p80_ms": 1.0, "floor_ms": 0.1, "bound": "memory", "percent_of_ceiling": 1.0}
    times = {"fused": 2.0, "reference": 16.0, "compile": 5.0}
    report = {
        "device": {"name": "CPU", "threads": 2},
        "rows": [row | {"provider": provider, "median_ms": ms} for provider, ms in times.items()],
    }
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(run_table.table(report))
    lines = console.export_text().splitlines()
    assert lines[0].strip() == "CPU, 2 threads"
    found = {line.split()[3]: line.split()[6:8] for line in lines if line.startswith(" tiny")}
    assert found == {"fused": ["8.00", "2.50"], "reference": ["1.00", "0.31"], "compile": ["3.20", "1.00"]}


def test_tanh_wall_is_of_the_forward_where_the_rate_is_known(monkeypatch, capsys) -> None:
    monkeypatch.setattr(run, "numbers", lambda *_, **__: {"median_ms": 0.5, "p20_ms": 0.5, "p80_ms": 0.5})
    ceiling = {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": {"float32": 1e9}, "tanh_per_s": 1e6}
    rows = list(run.measure(CONCAT, TINY_CONCAT, ["reference"], CPU, 0, ceiling))
    assert rows[0]["tanhs"] == 2 * 5 * 6 * 3
    assert rows[0]["x_tanh_wall"] == pytest.approx(0.18 / 0.5)
    assert "x_tanh_wall" not in rows[1]
    relu = dataclasses.replace(TINY_CONCAT, sizes={**TINY_CONCAT.sizes, "relu": 1})
    assert not any("x_tanh_wall" in r for r in run.measure(CONCAT, relu, ["reference"], CPU, 0, ceiling))
    report = {"device": {"name": "GPU"}, "timer": "a clock", "ceilings": ceiling, "rows": rows}
    assert "1e-06 T tanh/s" in run_table.summary(report)
    assert "× wall: time of one hardware tanh" in run_table.summary(report)


@pytest.mark.parametrize("target", [80, 90, 100, 120])
def test_tanh_kernel_is_one_instruction_a_tanh(target: int) -> None:
    pytest.importorskip("triton", reason="compiles with Triton")
    code = f"""
import re, triton
from bench import tanh_rate
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

blocks = {{"BLOCK": tanh_rate.BLOCK, "UNROLLED": tanh_rate.UNROLLED}}
signature = {{"out_ptr": "*fp32", "trips": "i32"}} | dict.fromkeys(blocks, "constexpr")
kernel = triton.compile(
    ASTSource(tanh_rate._tanh_rate_kernel, signature, blocks),
    target=GPUTarget("cuda", {target}, 32), options={{"num_warps": tanh_rate.WARPS}},
)
sass = kernel.asm["sass"]
print(len(re.findall("MUFU.TANH", sass)), len(re.findall("FMUL|FFMA|FADD", sass)), len(re.findall("LDL|STL", sass)))
print(tanh_rate.BLOCK // (32 * tanh_rate.WARPS) * tanh_rate.UNROLLED)
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=run.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, expected = (line.split() for line in done.stdout.splitlines())
    tanh, other, spilled = map(int, found)
    assert tanh == int(expected[0])  # none left out, none made twice
    assert other <= tanh // 2  # the instruction is used as it is, with no scaling around it; the start has some
    assert spilled == 0


def fake_peer(wrong: float = 0.0) -> Op:
    def call(*, activation: str, window: tuple, **inputs: torch.Tensor) -> torch.Tensor:
        return concat_attention(**inputs, activation=activation, window=window, impl="reference") + wrong

    return dataclasses.replace(CONCAT, peers=lambda sizes: {"keops": Peer(call), "flex": Peer(call, needs="nowhere")})


def test_peers_run_forward_only_and_are_checked(quick, capsys) -> None:
    status, report = quick(fake_peer(), "--provider", "keops", case=TINY_CONCAT)
    assert status == 0
    peers = [row for row in report["rows"] if row["provider"] == "keops"]
    assert [(row["mode"], row["impl"], list(row["errors"])) for row in peers] == [("forward", "keops", ["out"])]
    assert peers[0]["median_ms"] > 0
    status, report = quick(fake_peer(1e-3), "--provider", "keops", case=TINY_CONCAT)
    assert status == 0  # it is not ours
    assert report["rows"][-1]["failure"].startswith("wrong")


def test_peers_take_part_by_default_on_a_gpu_where_installed() -> None:
    op, gpu = fake_peer(), torch.device("cuda")
    assert run.providers_of(op, TINY_CONCAT, gpu) == ["fused", "reference", "compile", "keops"]
    assert run.providers_of(op, TINY_CONCAT, CPU) == ["fused", "reference", "compile"]
    assert run.providers_of(op, TINY_CONCAT, CPU, ["flex", "fused"]) == ["flex", "fused"]
    assert run.providers_of(LOCATION, TINY, gpu, ["flex", "fused"]) == ["fused"]
    for sizes in ({"padded": 1}, {"S": 2}, {"right": 0}, {"left": 3}):
        assert not CONCAT.peers({**TINY_CONCAT.sizes, **sizes})


@pytest.mark.parametrize("relu", [0, 1])
@pytest.mark.parametrize("heads", [{}, {"H": 2}])
@pytest.mark.parametrize("peer", ["flex", "keops"])
def test_peer_computes_the_same(peer: str, heads, relu: int) -> None:
    """FlexAttention uncompiled; KeOps where it is installed."""
    case = dataclasses.replace(TINY_CONCAT, sizes={**TINY_CONCAT.sizes, **heads, "relu": relu})
    peers = CONCAT.peers(case.sizes)
    if not peers[peer].available:
        pytest.skip(f"{peers[peer].needs} is not installed")
    inputs = CONCAT.inputs(case.sizes, torch.float32, CPU, 0)
    expected = run.call_of(CONCAT, case, "reference", CPU)(**inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        found = peers[peer].call(**inputs, **CONCAT.options(case.sizes))
    torch.testing.assert_close(found, expected)


def test_table_of_every_gpu_case_fits_into_120_columns() -> None:
    times = {"median_ms": 1234.5678, "p20_ms": 1200.0, "p80_ms": 1300.0, "floor_ms": 123.4567}
    rest = {"bound": "compute", "percent_of_ceiling": 10.0, "peak_bytes": 140 * 2**30, "error": 1.23e-06}
    rows = [
        {"family": op.family, "case": case.name, "dtype": case.dtype_name, "mode": mode, "provider": provider}
        | {**times, **rest, **({"x_tanh_wall": 1.234} if mode == "forward" else {})}
        for op, case in run.select("cuda")
        for provider in (*run.PROVIDERS, *run.PEERS)
        for mode in MODES
    ]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(run_table.table({"device": {"name": "NVIDIA H200"}, "rows": rows}))
    text = console.export_text()
    assert "…" not in text
    line = next(line for line in text.splitlines() if "fwd+bwd" in line)
    words = "las bf16 fwd+bwd fused 1,235 8% 1.00 1.00 123.46 10% compute 143,360.0 1.2e-06"
    assert " ".join(line.split()) == words


def broken(how: str) -> Op:
    def call(*, impl: str, **inputs: torch.Tensor) -> torch.Tensor:
        out = LOCATION.call(impl=impl, **inputs)
        if impl == "reference":
            return out
        if how == "raises":
            raise RuntimeError("out of memory,\nsay")
        return out + 1e-3 * out.detach() if how == "wrong" else out * torch.nan

    return dataclasses.replace(LOCATION, call=call)


@pytest.mark.parametrize(
    ("how", "text"), [("wrong", "wrong: .* of out 1.00e-03"), ("nan", "of out nan"), ("raises", "say")]
)
def test_what_fails_is_not_timed_but_told(quick, capsys, how: str, text: str) -> None:
    status, report = quick(broken(how))
    assert status == 1
    for row in report["rows"]:
        assert ("failure" in row) == (row["provider"] == "fused")
        assert ("median_ms" in row) == (row["provider"] == "reference")
    assert re.search(text, report["rows"][0]["failure"], re.DOTALL)
    assert "FAILED tiny float32 fused" in capsys.readouterr().out


def test_provider_that_fails_is_only_told_unless_it_is_fused(quick, monkeypatch) -> None:
    def no_compiler(call, **_):
        def fail(**inputs):
            raise RuntimeError("no compiler")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    status, report = quick(LOCATION, "--provider", "compile")
    assert status == 0
    failures = {row["provider"]: row.get("failure") for row in report["rows"]}
    assert failures == {"fused": None, "reference": None, "compile": "RuntimeError: no compiler"}


def test_ceilings_are_positive(monkeypatch) -> None:
    monkeypatch.setattr(run, "timed", lambda fn, *_: (fn(), [2.0])[1])
    found = run.ceilings({torch.float32}, CPU, True)
    assert found["copy_bytes_per_s"] == pytest.approx(2 * 4 * 2**24 / 2e-3)
    assert found["matmul_flops_per_s"] == {"float32": pytest.approx(2 * 1024**3 / 2e-3)}
    assert not any("tanh" in name for name in found)


def test_tanh_rate_counts_what_is_launched(monkeypatch) -> None:
    pytest.importorskip("triton", reason="the kernel is Triton's")
    from bench import tanh_rate

    launched = []
    monkeypatch.setattr(tanh_rate, "launch", lambda out, trips: launched.append((out.numel(), trips)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=3))
    monkeypatch.setattr(run, "timed", lambda fn, *_: (fn(), [2.0])[1])
    rate = run.tanh_rate(CPU, True)
    [(elements, trips)] = launched
    assert elements == 3 * 16 * tanh_rate.BLOCK  # 2,048 threads an SM
    assert rate == pytest.approx(elements * trips * tanh_rate.UNROLLED / 2e-3)


def test_selection_and_list(capsys) -> None:
    assert {case.device for _, case in run.select("cuda")} == {"cuda"}
    assert [case.name for _, case in run.select("cpu", "location", "hops")] == ["hops-small"]
    assert run.main(["--list", "--device", "cuda", "--case", "bag/bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "location/gated-bag/bfloat16" in printed
    assert "26.34 GFLOP, 102.7 MB" in printed
    with pytest.raises(SystemExit):
        run.main(["--device", "cpu", "--case", "no-such-case"])


def test_results_are_named_by_device_and_date() -> None:
    env = {"device": {"name": "NVIDIA H200"}, "date": "2026-11-23T12:32:27+00:00"}
    assert run.default_output(env) == run.ROOT / "bench" / "results" / "nvidia-h200-2026-11-23-123227.json"


def test_a_gradient_that_cancels_is_held_to_the_largest() -> None:
    """Where a score is linear, its bias shifts all scores alike: the gradient is zero but for rounding."""

    def call(*, h: torch.Tensor, w: torch.Tensor, b: torch.Tensor, impl: str) -> torch.Tensor:
        return location_attention(h, w, b, activation="identity", impl=impl)

    case = Case("linear", {"B": 2, "T": 50, "D": 4}, torch.float32, "cpu")
    op = dataclasses.replace(LOCATION, call=call, options=lambda sizes: {})
    found = run.check(op, case, ["fused"], CPU, 0)["fused"]
    assert found["limits"]["b"] - 2 * found["errors"]["b"] > 1
    assert found["limits"]["w"] - 2 * found["errors"]["w"] < 1e-4
    assert "failure" not in found
