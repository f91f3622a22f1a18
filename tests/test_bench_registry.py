import dataclasses
import io
import json
import re

import pytest
import torch
from rich.console import Console

from bench import run
from bench.registry import LOCATION, MODES, REGISTRY, Case, Cost, Op, ragged_lengths
from fused_attn import location_attention

CASES = [pytest.param(op, case, id=run.label(op, case)) for op in REGISTRY for case in op.cases]
CPU = torch.device("cpu")
TINY = Case("tiny", {"B": 2, "T": 8, "D": 4, "A": 3, "gates": 1}, torch.float32, "cpu")


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

    call = run.call_of(op, "reference", CPU)
    out = run.runner(call, inputs, MODES[0])()["out"]
    results = run.runner(call, inputs, MODES[1], torch.randn_like(out))()
    floating = [name for name, x in inputs.items() if x.is_floating_point()]
    assert list(results) == ["out", *floating]
    for name in floating:
        assert results[name].shape == inputs[name].shape
    forward, both = (op.work(small, mode) for mode in MODES)
    assert forward.bytes == nbytes([*inputs.values(), out])
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
    ],
    ids=["linear", "mlp", "gated", "hops", "ragged"],
)
def test_location_cost_by_hand(sizes, forward, backward) -> None:
    assert LOCATION.cost(sizes, 2) == (Cost(*forward), Cost(*backward))


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

    def go(op: Op, *argv: str):
        monkeypatch.setattr(run, "REGISTRY", [dataclasses.replace(op, cases=(TINY,))])
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
        assert "peak_bytes" not in row  # not measured on a CPU
        assert "failure" not in row
    printed = capsys.readouterr().out
    assert "No kernel ran" in printed
    assert "peak MiB" not in printed


def test_table_of_every_gpu_case_fits_into_120_columns() -> None:
    rows = [
        {
            "family": op.family, "case": case.name, "dtype": case.dtype_name, "mode": mode, "provider": provider,
            "median_ms": 1234.5678, "p20_ms": 1200.0, "p80_ms": 1300.0, "floor_ms": 123.4567, "bound": "compute",
            "percent_of_ceiling": 10.0, "peak_bytes": 140 * 2**30, "error": 1.23e-06,
        }
        for op, case in run.select("cuda") for provider in run.PROVIDERS for mode in MODES
    ]  # fmt: skip
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(run.table({"device": {"name": "NVIDIA H200"}, "rows": rows}))
    text = console.export_text()
    assert "…" not in text
    line = next(line for line in text.splitlines() if "fwd+bwd" in line)
    assert line.split() == [
        "gated-bag", "bf16", "fwd+bwd", "fused", "1,234.57", "8%", "1.00", "123.4567", "10%", "compute", "143,360.0",
        "1.2e-06",
    ]  # fmt: skip


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
    found = run.check(dataclasses.replace(LOCATION, call=call), case, ["fused"], CPU, 0)["fused"]
    assert found["limits"]["b"] - 2 * found["errors"]["b"] > 1
    assert found["limits"]["w"] - 2 * found["errors"]["w"] < 1e-4
    assert "failure" not in found
