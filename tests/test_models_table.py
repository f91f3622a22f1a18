"""The tables of the published systems are what the stored rows say, and what the pages have."""

import json

import pytest

from bench import models_table
from fused_attn.models import _summary
from fused_attn.models.tasks import SYSTEMS

SCORES = {"attention": 0.9, "uniform": 0.6, "oracle": 0.95, "max": 0.7, "bag of words": 0.65}
PAGES = ("README.md", "docs/models.md")


def rows(system="mil", seeds=5, **changes):
    """Scores that go up by 0.01 a seed, attention's by 0.02."""
    return [
        {
            "system": system,
            "arm": arm,
            "seed": 100 + i,
            "score": score + 0.01 * i * (1 + (arm == "attention")),
            "localisation": {"instances": 0.8 if arm == "attention" else 0.5} if arm in _summary.COMPARED else {},
            "frozen": "0123456789abcdef",
            "epochs": None,
            "device": "cpu",
            "torch": "2.13.0",
            "python": "3.11.7",
            **changes,
        }
        for i in range(seeds)
        for arm, score in SCORES.items()
    ]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables():
    text = models_table.docs(rows(), "some.jsonl")
    head, what, scores, _, each = text.split("\n\n")
    assert (
        "`some.jsonl` (device cpu, torch 2.13.0, python 3.11.7); tasks and settings as of commit 0123456789ab."
        in head
    )
    assert cells(what.splitlines()[2])[1] == "Gated attention MIL (Ilse et al. 2018)"
    assert cells(scores.splitlines()[2]) == [
        "`mil`",
        "0.940 ± 0.032",
        "0.620 ± 0.016",
        "0.970 ± 0.016",
        "max: 0.720 ± 0.016",
        "+0.320 [+0.308, +0.332]",
        "+0.220 [+0.208, +0.232]",
        "0.80; uniform 0.50",
        "5",
    ]
    lines = [cells(line) for line in each.splitlines()[2:]]
    assert [line[1] for line in lines] == [*SCORES]
    assert lines[0][3:] == ["", "0.80", "0.900 0.920 0.940 0.960 0.980"]
    assert lines[4][3:] == ["+0.270 [+0.258, +0.282]", "", "0.650 0.660 0.670 0.680 0.690"]
    short = models_table.readme(rows()).splitlines()
    assert cells(short[2])[1:] == [
        SYSTEMS["mil"].metric,
        "0.940",
        "0.620",
        "0.970",
        "max: 0.720",
        "+0.320 [+0.308, +0.332]",
    ]
    assert all(len(cells(line)) == len(cells(short[0])) for line in short)


def test_what_there_is_not_is_left_empty():
    some = [row for row in rows("dadm", seeds=1) if row["arm"] in ("attention", "uniform")]
    for row in some:
        del row["localisation"]
    line = cells(models_table.docs(some, "").split("\n\n")[2].splitlines()[2])
    assert line == ["`dadm`", "0.900", "0.600", "", "", "+0.300 (one seed)", "", "", "1"]


def test_systems_come_in_their_own_order():
    both = rows("mil") + rows("can")
    assert [*models_table.systems(both)] == ["can", "mil"]
    assert len(models_table.readme(both).splitlines()) == 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "at least one"),
        (rows(frozen=None), "validation scores"),
        (rows() + rows(frozen="fedcba"), "one 'frozen'; got 0123456789abcdef, fedcba"),
        (rows() + rows(torch="2.14"), "one 'torch'; got 2.13.0, 2.14"),
        (rows(system="milk"), "expected systems out of can, .*; got milk"),
    ],
)
def test_bad_rows(wrong, message):
    with pytest.raises(ValueError, match=message):
        models_table.systems(wrong)


def test_pages_are_written(monkeypatch, tmp_path):
    monkeypatch.setattr(models_table, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    for page in PAGES:
        (tmp_path / page).write_text("before\n{}\nold\n{}\nafter\n".format(*models_table.MARKS))
    stored = tmp_path / "models-2026-11-30.jsonl"
    public = [row | {"data": "/snli_1.0", "frozen": None, "score": 0.0} for row in rows()]
    stored.write_text("".join(json.dumps(row) + "\n" for row in public + rows()))
    for _ in range(2):  # the second time changes nothing
        assert models_table.main([str(stored)]) == 0
        for page in PAGES:
            text = (tmp_path / page).read_text()
            assert text.startswith("before\n" + models_table.MARKS[0])
            assert text.endswith(models_table.MARKS[1] + "\nafter\n")
            assert "old" not in text
            assert "+0.320 [+0.308, +0.332]" in models_table.between(text)
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(ValueError, match="once each"):
        models_table.main([str(stored)])


def test_no_results_end_with_the_usage(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(models_table, "newest", lambda: None)
    for arguments in ([], [str(tmp_path / "none.jsonl")]):
        with pytest.raises(SystemExit) as end:
            models_table.main(arguments)
        assert end.value.code == 2
        assert "results: expected rows of" in capsys.readouterr().err


def test_the_newest_rows_are_of_the_last_day(tmp_path):
    assert models_table.newest(tmp_path) is None
    for day in ("2026-12-01", "2026-11-30"):
        (tmp_path / f"models-{day}.jsonl").touch()
    assert models_table.newest(tmp_path).name == "models-2026-12-01.jsonl"


def test_the_pages_have_what_the_stored_rows_say():
    found = {page: models_table.between((models_table.ROOT / page).read_text()) for page in PAGES}
    path = models_table.newest()
    if path is None:
        assert found == dict.fromkeys(PAGES, "")
        return
    stored = _summary.read_rows(path)
    assert found["README.md"] == models_table.readme(stored)
    assert found["docs/models.md"] == models_table.docs(stored, f"bench/results/{path.name}")
    assert {row["system"] for row in stored} == {*SYSTEMS}
