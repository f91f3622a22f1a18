"""`python -m fused_attn.models`: trains every arm with every seed, resumes, prints, draws and stores."""

import io
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib", reason="the pictures are drawn with matplotlib")
pytest.importorskip("rich", reason="the tables are printed with rich")
pytest.importorskip("sklearn", reason="some data are scikit-learn's")

from rich.console import Console

from fused_attn.models import __main__ as cli
from fused_attn.models import _pictures, _progress, _work, protocol
from fused_attn.models.tasks import SYSTEMS, Outcome, Panel, Task

drawn = []
made = []
judged = []
ARMS = ("attention", "uniform")
COMMIT = "0123abc"


def make(seed: int, device: torch.device) -> Task:
    """A line through the origin; only with attention is there anything to train."""
    drawn.append(seed)

    def build(arm: str) -> nn.Module:
        made.append((seed, arm))
        model = nn.Linear(1, 1, bias=False).to(device)
        nn.init.zeros_(model.weight).requires_grad_(arm == "attention")
        return nn.Sequential(model, nn.PReLU(init=1.0).to(device))

    def judge(model: nn.Module, split: str) -> Outcome:
        assert not model.training
        judged.append(split)
        return Outcome(1 - (model(x) - 3 * x).abs().mean().item() / 6, {"place": 0.5})

    x = torch.tensor([[1.0], [2.0]], device=device)
    shades = torch.tensor([[0.2, 0.8], [1.0, 0.0]])
    return Task(
        build,
        batches=lambda order, epoch: [x[torch.randperm(2, generator=order).to(device)]],
        loss=lambda model, x: (model(x) - 3 * x).square().mean(),
        judge=judge,
        panels=lambda model: [Panel("two rows", shades, ["a", "b"], ["x", "y"], shades > 0.5)] * 2,
        arms=ARMS,
        baselines={"zero": lambda split: 0.25 if split == "test" else 0.5},
        epochs=60,
    )


@pytest.fixture(autouse=True)
def _plan(monkeypatch, tmp_path):
    """A frozen plan with settings of all systems, and the task above in place of theirs."""
    plan = tmp_path / "settings.json"
    settings = {name: {arm: {"setting": [0.1, 0.0]} for arm in ARMS} for name in SYSTEMS}
    plan.write_text(json.dumps({"frozen": COMMIT, "settings": settings}))
    monkeypatch.setattr(protocol, "PLAN", plan)
    monkeypatch.setattr(_work, "importlib", SimpleNamespace(import_module=lambda *_: SimpleNamespace(make=make)))
    monkeypatch.setattr(_work, "_made", {})


def run(monkeypatch, folder, *arguments):
    monkeypatch.setattr(sys, "argv", ["models", *arguments, "--output", str(folder / "new"), "--device", "cpu"])
    for seen in (drawn, made, judged):
        seen.clear()
    return cli.main()


def stored(folder, name="results"):
    return [json.loads(line) for line in (folder / "new" / f"{name}.jsonl").read_text().splitlines()]


def test_trains_prints_draws_and_stores(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, tmp_path, "mil", "--seeds", "2") == 0
    seeds = protocol.final_seeds(COMMIT, 2)
    assert drawn == seeds  # once a seed, whose data all its arms have
    assert made == [(seed, arm) for seed in seeds for arm in ARMS]
    rows = stored(tmp_path)
    assert [(r["system"], r["arm"], r["seed"]) for r in rows] == [
        ("mil", arm, seed) for seed in seeds for arm in (*ARMS, "zero")
    ]
    assert all(r["score"] > 0.9 and r["curve"] and r["frozen"] == COMMIT for r in rows[::3])
    assert all(r["score"] < 0.4 for r in rows[1::3])
    assert [r["score"] for r in rows[2::3]] == [0.25, 0.25]
    assert judged.count("test") == 4  # once an arm and seed
    printed = " ".join(capsys.readouterr().out.split())
    assert "attention less uniform weights: +0." in printed
    assert "too few seeds for a verdict" in printed
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"results.jsonl", "mil.png", "mil-curves.png"}
    assert (tmp_path / "new" / "mil.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_done_again(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, "mil", "--seeds", "1", "--arm", "uniform")
    first = stored(tmp_path)
    assert len(first) == 1
    run(monkeypatch, tmp_path, "mil", "--seeds", "2")
    rows = stored(tmp_path)
    assert rows[:1] == first
    assert len({(r["arm"], r["seed"]) for r in rows}) == len(rows) == 6
    run(monkeypatch, tmp_path, "mil", "--seeds", "2")
    assert made == []
    run(monkeypatch, tmp_path, "mil", "--seeds", "1", "--epochs", "1")  # another experiment
    assert len(made) == 2


def test_before_the_tasks_are_frozen_no_test_data_is_judged(monkeypatch, tmp_path):
    protocol.PLAN.write_text(protocol.PLAN.read_text().replace(f'"{COMMIT}"', "null"))
    run(monkeypatch, tmp_path, "mil", "--seeds", "2")
    assert set(judged) == {"validation"}
    assert [seed for seed, _ in made] == [0, 0, 1, 1]
    assert [r["score"] for r in stored(tmp_path, "validation") if r["arm"] == "zero"] == [0.5, 0.5]


def test_settings_are_chosen_on_validation_data(monkeypatch, tmp_path):
    protocol.PLAN.write_text(json.dumps({"frozen": COMMIT, "settings": {}}))
    assert run(monkeypatch, tmp_path, "mil", "--search", "--arm", "attention") == 0
    assert [arm for _, arm in made] == ["attention"] * protocol.TRIALS
    assert drawn == [protocol.SEARCH_SEED]
    assert set(judged) == {"validation"}
    found = json.loads(protocol.PLAN.read_text())["settings"]["mil"]["attention"]
    assert found["setting"] == [1e-2, 0.0]  # of what is tried, this learns fastest
    assert len(found["validation"]) == protocol.TRIALS
    assert protocol.read_plan().settings == {"mil": {"attention": protocol.Setting(1e-2, 0.0)}}
    run(monkeypatch, tmp_path, "mil", "--seeds", "1", "--epochs", "2")
    chosen = {r["arm"]: r["setting"]["learning_rate"] for r in stored(tmp_path) if "setting" in r}
    assert chosen == {"attention": 1e-2, "uniform": protocol.DEFAULT.learning_rate}


def test_what_is_searched_is_searched_again_where_its_source_is_another(monkeypatch, tmp_path):
    protocol.PLAN.write_text(json.dumps({"frozen": COMMIT, "settings": {}}))
    run(monkeypatch, tmp_path, "mil", "--search", "--arm", "attention")
    run(monkeypatch, tmp_path, "mil", "--search")
    assert [arm for _, arm in made] == ["uniform"] * protocol.TRIALS
    monkeypatch.setattr(protocol, "source", lambda name: "another")
    run(monkeypatch, tmp_path, "mil", "--search")
    assert [arm for _, arm in made] == [arm for arm in ARMS for _ in range(protocol.TRIALS)]


def test_trainings_at_once(monkeypatch, tmp_path):
    """Threads in place of processes, which would not see the task of this file."""
    monkeypatch.setattr(_work, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(jobs))
    protocol.PLAN.write_text(json.dumps({"frozen": COMMIT, "settings": {}}))
    assert run(monkeypatch, tmp_path, "mil", "--search", "--jobs", "2") == 0
    found = json.loads(protocol.PLAN.read_text())["settings"]["mil"]
    assert {*found} == {*ARMS}
    assert all(len(x["validation"]) == protocol.TRIALS for x in found.values())


def test_trainings_in_processes(tmp_path):
    options = "dadm --validation --arm uniform --arm attention --seeds 1 --epochs 1 --jobs 2 --device cpu --output"
    command = [sys.executable, "-m", "fused_attn.models", *options.split(), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert sorted((r["arm"], r["seed"]) for r in rows) == [("attention", 0), ("uniform", 0)]
    assert (tmp_path / "dadm.png").exists()


def test_an_error_of_one_training_ends_those_that_have_not_begun(monkeypatch, tmp_path):
    monkeypatch.setattr(_work, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(jobs))

    def fail(unit):
        begun.append(unit)
        if unit == 0:
            raise RuntimeError("no")
        time.sleep(0.01)

    begun = []
    with pytest.raises(RuntimeError, match="no"):
        list(_work.work_all(fail, range(1000), 2, Console(file=io.StringIO())))
    assert len(begun) < 1000


def test_all_are_trained_and_epochs_can_be_chosen(monkeypatch, tmp_path):
    assert run(monkeypatch, tmp_path, "all", "--seeds", "1", "--epochs", "1") == 0
    assert {path.stem for path in (tmp_path / "new").glob("*.png")} == {
        "differences",
        *(f"{name}{end}" for name in SYSTEMS for end in ("", "-curves")),
    }
    assert len(made) == 2 * len(SYSTEMS)


class Pipe(io.StringIO):
    """What was written when it was flushed."""

    flushed = ""

    def flush(self) -> None:
        self.flushed = self.getvalue()


def test_progress_is_lines_that_are_flushed_where_the_output_is_no_terminal(monkeypatch, tmp_path):
    pipe = Pipe()
    monkeypatch.setattr(sys, "stdout", pipe)
    monkeypatch.setattr(_progress, "SECONDS", 0.0)
    monkeypatch.setattr(cli, "score_table", lambda *args: pipe.flushed)
    run(monkeypatch, tmp_path, "mil", "--seeds", "1", "--epochs", "4")
    lines = [line.split(" trainings")[0] for line in pipe.flushed.splitlines()]
    assert lines[:5] == [f"mil, attention, seed 1: {x:.3g} of 3" for x in (0, 0.25, 0.5, 0.75, 0.99)]
    assert "mil, uniform, seed 1: 1 of 3" in lines


@pytest.mark.parametrize(
    ("environment", "arguments", "threads"),
    [
        ({}, [], [1]),
        ({}, ["--threads", "3"], [3]),
        ({"OMP_NUM_THREADS": "2"}, [], []),  # PyTorch's own reading of it
        ({"OMP_NUM_THREADS": "2"}, ["--threads", "3"], [3]),
    ],
)
def test_one_thread_unless_more_are_asked_for(monkeypatch, tmp_path, environment, arguments, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    run(monkeypatch, tmp_path, "mil", "--seeds", "1", "--epochs", "1", *arguments)
    assert seen == threads


def test_help_needs_only_torch():
    script = """
import runpy, sys
for name in ("matplotlib", "rich", "sklearn", "numpy", "triton"):
    sys.modules[name] = None  # every import of it raises ImportError
sys.argv = ["models", *sys.argv[1:]]
runpy.run_module("fused_attn.models", run_name="__main__")
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stdout[:6]) == (0, "usage:"), done.stderr
    assert "dipole" in done.stdout
    done = subprocess.run([*command, "mil"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "matplotlib is not installed: pip install 'fused_attn[demo]'\n")


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["mil", "--seeds", "0"], ["mil", "--threads", "0"], ["mil", "--jobs", "0"], []]
)
def test_bad_arguments_end_with_the_usage(monkeypatch, tmp_path, arguments, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path, *arguments)
    assert end.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_run_that_was_cut_off_in_a_row_goes_on(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, "mil", "mil", "--seeds", "1", "--epochs", "1")  # a name that is there twice is one
    whole = stored(tmp_path)
    assert len(whole) == 3
    path = tmp_path / "new" / "results.jsonl"
    path.write_text(path.read_text()[:-20])
    run(monkeypatch, tmp_path, "mil", "--seeds", "1", "--epochs", "1")
    assert made == []  # it was the baseline's
    assert [(r["arm"], r["score"]) for r in stored(tmp_path)] == [(r["arm"], r["score"]) for r in whole]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arm", "uniform", "--arm", "nine"], "--arm: expected some of attention, uniform, zero; got nine"),
        (["--search", "--arm", "zero"], "--arm: expected some of attention, uniform; got zero"),
        (["--device", "nothing"], "--device: nothing: "),
        (["--results", "{file}/rows.jsonl"], "--results: expected a folder; {file}: "),
        (["--results", "{folder}"], "--results: expected a file that can be read and written; got {folder}"),
        (["--results", "{file}"], "--results: {file}:1: expected a row"),
        (["--output", "{file}"], "--output: expected a folder; {file}: "),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(monkeypatch, tmp_path, arguments, message):
    places = {"file": tmp_path / "file", "folder": tmp_path}
    places["file"].write_text("no row\n")
    made.clear()
    command = ["models", "mil", "--device", "cpu", "--output", str(tmp_path / "new")]
    monkeypatch.setattr(sys, "argv", [*command, *(x.format(**places) for x in arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert str(end.value.code).startswith(message.format(**places))
    assert made == []


def test_paths_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["models", "mil", "--output=~/out", "--results=~/x.jsonl", "--data=~/y"])
    args = cli.parse()
    assert (args.output, args.results, args.data) == (tmp_path / "out", tmp_path / "x.jsonl", tmp_path / "y")


LETTERS = "$x_$ costs $5_^"


@pytest.mark.parametrize(
    ("title", "names"),
    [(LETTERS, [LETTERS, "a"]), ("long " * 400, ["b" * 2000, "c"]), ("wide", ["word"] * 1300), ("none", None)],
)
def test_weights_of_any_text_are_drawn(tmp_path, title, names):
    """A dollar is a dollar, and no picture is larger than matplotlib's largest."""
    path = tmp_path / "some.png"
    panels = [] if names is None else [Panel(title, torch.full((1, len(names)), torch.nan), ["α"], names)]
    _pictures.draw_weights(panels, path)
    assert path.exists() == (names is not None)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_has_a_task(name):
    module = __import__(f"fused_attn.models.tasks.{name}", fromlist=["make"])
    assert callable(module.make)
