"""`python -m fused_attn.models`: trains both arms with every seed, prints, draws and stores."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib", reason="the pictures are drawn with matplotlib")
pytest.importorskip("rich", reason="the tables are printed with rich")
pytest.importorskip("sklearn", reason="some data are scikit-learn's")

from fused_attn.models import __main__ as cli
from fused_attn.models import _progress
from fused_attn.models.tasks import SYSTEMS, Panel, Task

made = []


def make(seed: int, device: torch.device) -> Task:
    """A line through the origin; only with attention is there anything to train."""

    def build(attention: bool) -> nn.Module:
        made.append((seed, attention))
        model = nn.Linear(1, 1, bias=False).to(device)
        nn.init.zeros_(model.weight).requires_grad_(attention)
        return nn.Sequential(model, nn.PReLU(init=1.0).to(device))

    x = torch.tensor([[1.0], [2.0]], device=device)
    return Task(
        build,
        batches=lambda order: [x[torch.randperm(2, generator=order).to(device)]],
        loss=lambda model, x: (model(x) - 3 * x).square().mean(),
        score=lambda model: 1 - (model(x) - 3 * x).abs().mean().item() / 6,
        panels=lambda model: [Panel("two rows", torch.tensor([[0.2, 0.8], [1.0, 0.0]]), ["a", "b"], ["x", "y"])] * 2,
        epochs=60,
        learning_rate=0.1,
    )


def run(monkeypatch, *arguments):
    finder = SimpleNamespace(import_module=lambda *_: SimpleNamespace(make=make))
    monkeypatch.setattr(cli, "importlib", finder)
    monkeypatch.setattr(sys, "argv", ["models", *arguments])
    made.clear()
    return cli.main()


def test_trains_prints_draws_and_stores(monkeypatch, tmp_path, capsys):
    out = tmp_path / "scores.json"
    assert run(monkeypatch, "mil", "--seeds", "2", "--output", str(tmp_path / "new"), "--json", str(out)) == 0
    assert made == [(0, True), (0, False), (1, True), (1, False)]
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["system"], row["metric"]) == ("mil", SYSTEMS["mil"].metric)
    assert all(x > 0.9 for x in row["attention"])
    assert all(x < 0.4 for x in row["uniform"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "attention helps" in printed
    assert "2 of 2 seeds" in printed
    assert (tmp_path / "new" / "mil.png").read_bytes().startswith(b"\x89PNG")


def test_all_are_trained_and_epochs_can_be_chosen(monkeypatch, tmp_path):
    assert run(monkeypatch, "all", "--seeds", "1", "--epochs", "1", "--output", str(tmp_path)) == 0
    assert {path.stem for path in tmp_path.iterdir()} == set(SYSTEMS)
    assert len(made) == 2 * len(SYSTEMS)


class Pipe(io.StringIO):
    """What was written when it was flushed."""

    flushed = ""

    def flush(self) -> None:
        self.flushed = self.getvalue()


def test_progress_is_lines_that_are_flushed_where_the_output_is_no_terminal(monkeypatch, tmp_path):
    pipe, seen = Pipe(), []
    monkeypatch.setattr(sys, "stdout", pipe)
    monkeypatch.setattr(cli, "draw", lambda *args: seen.append(pipe.flushed))
    monkeypatch.setattr(_progress, "SECONDS", 0.0)
    run(monkeypatch, "mil", "--seeds", "1", "--epochs", "3", "--output", str(tmp_path))
    assert ["4 of 6" in text for text in seen] == [False]  # drawn after the first arm, whose lines came before
    assert "3 of 6" in seen[0]
    lines = pipe.flushed.splitlines()
    for attention, first in (("with   ", 0), ("without", 3)):
        shown = [line for line in lines if f"seed 0, {attention} attention" in line]
        assert [line.split(": ")[2].split(" epochs")[0] for line in shown] == [f"{first + i} of 6" for i in range(4)]


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
    run(monkeypatch, "mil", "--seeds", "1", "--epochs", "1", "--output", str(tmp_path), *arguments)
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


@pytest.mark.parametrize("arguments", [["nothing"], ["mil", "--seeds", "0"], ["mil", "--threads", "0"], []])
def test_bad_arguments_end_with_the_usage(monkeypatch, arguments, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *arguments)
    assert end.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("attention", "uniform", "words"),
    [
        ([0.9, 0.8], [0.5, 0.7], "attention helps: +0.250"),
        ([0.9, 0.6], [0.5, 0.7], "attention does not clearly help: +0.150 on average, better with 1 of 2"),
        ([0.5, 0.6], [0.5, 0.7], "attention does not help: -0.050"),
    ],
)
def test_verdict(attention, uniform, words):
    assert words in cli.verdict({True: attention, False: uniform})


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_has_a_task(name):
    module = __import__(f"fused_attn.models.tasks.{name}", fromlist=["make"])
    assert callable(module.make)
