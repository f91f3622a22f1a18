"""The demo trains what it says, and its checks notice what is wrong."""

import json
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from bench import demo
from fused_attn.models import protocol
from fused_attn.models.tasks import TEST, TRAIN, VALIDATION, mil

GOOD = {"attention": 0.95, "uniform": 0.7, "oracle": 0.99, "max": 0.8}
COUNTS = {TRAIN: 20, VALIDATION: 6, TEST: 8}


def rows_of(scores, located=0.99):
    """Of two seeds."""
    return [
        {"system": "mil", "arm": arm, "seed": seed, "score": score}
        | ({} if arm == "max" else {"localisation": {"instances": located}})
        for seed in (0, 1)
        for arm, score in scores.items()
    ]


@pytest.fixture
def small_check(monkeypatch):
    monkeypatch.setattr(demo, "CHECK_ON_CPU", (3, 5, 20, 16, 8))


@pytest.fixture
def run_main(monkeypatch, small_check, capsys):
    """`main` without training: the exit status and what it printed."""

    def run(rows=None):
        monkeypatch.setattr(demo, "experiment", lambda *args: rows or rows_of(GOOD))
        monkeypatch.setattr(demo, "memory_table", lambda *args: "memory")
        monkeypatch.setattr(demo, "Console", lambda: console(width=200))
        monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
        return demo.main([]), capsys.readouterr().out

    console = demo.Console
    return run


def replace_kernel(monkeypatch, change):
    """Whatever asks for the kernel gets the reference's output, changed."""
    real = demo.location_attention

    def changed(*args, impl, **kwargs):
        out = real(*args, impl="reference", **kwargs)
        return change(out) if impl == "triton" else out

    monkeypatch.setattr(demo, "location_attention", changed)


def test_seeds_are_no_others(monkeypatch):
    own = {demo.FIRST_SEED + i for i in range(6)}
    assert not own & {protocol.SEARCH_SEED, *range(6), *protocol.final_seeds(protocol.read_plan().frozen or "abc")}


@pytest.mark.parametrize("frozen", [None, "abc"])
def test_main_trains_every_arm_and_shows_the_test_split_only_once_tasks_are_frozen(
    monkeypatch, small_check, tmp_path, capsys, frozen
):
    seen = []

    def train(unit, part):
        part(1.0)
        seen.append(unit)
        return next(row for row in rows_of(GOOD) if row["arm"] == unit.arm) | {"seed": unit.seed}

    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr(demo, "memory_table", lambda *args: "memory")
    monkeypatch.setattr(demo, "kernel_reports", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(protocol, "read_plan", lambda: protocol.Plan(frozen, {}))
    assert demo.main(["--seeds", "2", "--jobs", "1", "--output", str(tmp_path)]) == 0
    assert [(unit.arm, unit.seed) for unit in seen] == [(arm, 1000 + i) for i in (0, 1) for arm in make().arms]
    assert [unit.output for unit in seen] == [tmp_path, *[None] * 7]
    assert {unit.split for unit in seen} == {VALIDATION if frozen is None else TEST}
    printed = " ".join(capsys.readouterr().out.split())
    assert "0.950" in printed
    assert f"Scores on {demo.COUNTS[seen[0].split]} {seen[0].split} bags" in printed
    assert "after a short training" in printed


def make():
    return mil.make(0, torch.device("cpu"), COUNTS)


@pytest.mark.whole
def test_an_arm_is_trained_judged_and_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "COUNTS", COUNTS)
    monkeypatch.setattr(demo, "EPOCHS", 2)
    demo.make_task.cache_clear()
    parts = []
    row = demo.train(demo.Unit("attention", 5, VALIDATION, "cpu", tmp_path / "new"), parts.append)
    demo.make_task.cache_clear()
    assert parts == [0.5, 1.0]
    assert len(row["curve"]) == 2
    assert row["setting"] == demo.SETTING._asdict()
    assert (row["score"] * COUNTS[VALIDATION]) % 1 == pytest.approx(0, abs=1e-6)
    assert (tmp_path / "new" / "attention.png").stat().st_size > 10_000


def test_memory_is_measured():
    table = demo.memory_table(torch.device("cpu"), rows=2_000)
    assert table.row_count == 2
    assert all("MiB" in cell or cell == "-" for column in table.columns[1:] for cell in column.cells)


def test_the_reference_is_within_its_own_bounds(device, small_check):
    report = demo.check(device, torch.float32, fused="reference")
    assert list(report.bounds) == list(demo.CHECKED)
    assert report.fused.keys() == report.reference.keys() == report.bounds.keys()
    assert all(0 < error < 1e-2 for error in report.reference.values())
    assert report.problems() == []
    restored = demo.Report(**json.loads(json.dumps(asdict(report))))  # what the check's own process sends
    assert restored.bounds == report.bounds
    assert restored.problems() == []
    assert restored.table().row_count == len(demo.CHECKED)


@pytest.mark.kernel
def test_the_kernel_is_within_its_bounds(run_main, device, request):
    if request.config.getoption("devices"):
        pytest.skip("the demo finds its device itself")
    status, printed = run_main()
    assert ("on the CPU" in printed) == (device.type == "cpu")
    assert "OK" in printed
    assert status == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda out: out * (1 + 1e-4), "output"),
        (lambda out: out.detach() + 1.01 * (out - out.detach()), "grad h"),
        (lambda out: out * torch.nan, "grad gate bias"),
    ],
    ids=["output", "gradients", "nan"],
)
def test_a_wrong_kernel_fails_the_demo(monkeypatch, run_main, change, named):
    replace_kernel(monkeypatch, change)
    status, printed = run_main()
    assert f"Past its bound: {named}" in printed
    assert status == 1


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (rows_of(GOOD | {"attention": 0.84}), "score of attention: expected at least 0.85; got 0.840"),
        (rows_of(GOOD | {"uniform": 0.96}), "expected more than that of uniform, 0.960; got 0.950"),
        (rows_of(GOOD | {"max": 0.96}), "expected more than that of max, 0.960; got 0.950"),
        (rows_of(GOOD | {"attention": float("nan")}), "expected at least 0.85; got nan"),
        (rows_of(GOOD, located=0.8), "area under the curve of the weights: expected at least 0.9; got 0.800"),
    ],
    ids=["low", "under the mean", "under the maximum", "nan", "lost"],
)
def test_a_poor_score_fails_the_demo(monkeypatch, run_main, rows, named):
    replace_kernel(monkeypatch, lambda out: out)
    status, printed = run_main(rows)
    assert "Past its bound: " in printed
    assert named in printed
    assert status == 1


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--seeds", "7"], ["--jobs", "0"]])
def test_bad_arguments_end_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        demo.main(arguments)
    assert end.value.code == 2
    assert f"{arguments[0]}: expected" in capsys.readouterr().err


def test_without_triton_the_table_says_so(monkeypatch, run_main):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    status, printed = run_main()
    assert "triton is not installed" in printed
    assert "the kernel was not checked" in printed
    assert status == 0
