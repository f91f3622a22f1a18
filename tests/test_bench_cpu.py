"""The comparison with eager PyTorch on a CPU: both ways are right, and the guard sees a loss."""

import json

import pytest

pytest.importorskip("rich", reason="the table prints with rich")

from bench import cpu
from bench.eager import PAIRS


@pytest.mark.whole
@pytest.mark.parametrize("name", PAIRS)
def test_what_is_compared_is_the_same(name):
    cpu.check(PAIRS[name]())


def test_what_is_compared_must_be_the_same():
    pair = PAIRS["location, B 4 T 16 D 64"]()
    with pytest.raises(AssertionError):
        cpu.check(pair._replace(ours=lambda: pair.eager() * 1.01))


ROW = {"case": "general, tanh", "threads": 1, "mode": "forward", "ours_ms": 1.0, "eager_ms": 1.0}


@pytest.mark.parametrize(
    ("ratios", "status"),
    [((1.9,), 0), ((1.6, 1.9), 0), ((1.6, 1.6), 1)],
    ids=["within", "once", "twice"],
)
def test_the_guard_fails_where_a_stored_ratio_is_lost_twice(ratios, status, tmp_path, monkeypatch, capsys):
    stored = tmp_path / "cpu-2026-01-01.json"
    stored.write_text(json.dumps({"date": "2026-01-01", "rows": [ROW | {"ratio": 2.0}]}))
    (tmp_path / "cpu-2025.json").write_text(json.dumps({"date": "2025-01-01", "rows": []}))
    turns = iter(ratios)
    monkeypatch.setattr(cpu, "measure", lambda *args: [ROW | {"ratio": next(turns)}])
    monkeypatch.setattr(cpu, "ROOT", tmp_path)
    assert cpu.newest(tmp_path) == stored
    assert cpu.guard(list(PAIRS), 0.1, stored) == status
    said = capsys.readouterr().out
    assert ("LOST general, tanh, 1, forward: 1.60, where 2.00 is stored" in said) == bool(status)
    assert next(turns, None) is None


def test_behind_is_five_percent_and_twenty_microseconds():
    slow = {"ratio": 0.9, "ours_ms": 0.1, "eager_ms": 0.09}
    assert not cpu.is_behind(slow)
    assert cpu.is_behind(slow | {"ours_ms": 1.0, "eager_ms": 0.9})
    assert not cpu.is_behind({"ratio": 0.96, "ours_ms": 2.0, "eager_ms": 1.92})


def test_measured_rows_are_a_mode_and_a_number_of_threads(monkeypatch):
    import torch

    before = torch.get_num_threads()
    rows = cpu.measure("location, B 4 T 16 D 64", [1], 0.01)
    torch.set_num_threads(before)
    assert [cpu.key(row)[1:] for row in rows] == [(1, "forward"), (1, "forward+backward")]
    assert all(row["ratio"] == row["eager_ms"] / row["ours_ms"] > 0 for row in rows)
