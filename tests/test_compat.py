"""`fused_attn.compat` on a library that is made here: what needs no more than torch."""

import copy
import importlib
import os
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fused_attn.compat
from fused_attn.compat import _peers, replace_attention, restore_attention
from fused_attn.compat._replacement import why_not_read

ROOT = Path(__file__).parents[1]

LIBRARY = '''
import torch
from torch import nn

class Pool(nn.Module):
    """Softmax pooling."""

    def __init__(self, width, masked=False):
        super().__init__()
        self.masked = masked
        self.score = nn.Linear(width, 1)

    def forward(self, x, temperature: float = 1.0):
        return ((self.score(x) / temperature).softmax(1) * x).sum(1)

class Other(nn.Module):
    pass

def model():
    return nn.Sequential(nn.Linear(3, 4), Pool(4))
'''
FILE = '''
import fakelib
from fused_attn import location_attention
from fused_attn.compat._replacement import Replacement, why_not_read

ran = []

class Pool(Replacement, fakelib.Pool):
    """Softmax pooling, by location attention."""

    def forward(self, x, temperature=1.0):
        if not self.takes(x) or temperature != 1 or why_not_read("score", self.score):
            return super().forward(x, temperature)
        ran.append(x.device.type)
        bias = self.score.bias.expand(x.shape[:2])
        return location_attention(x, self.score.weight[0], activation="identity", score_bias=bias)

def can_replace(module):
    return "masked=True is not there" if module.masked else why_not_read("score", module.score)

REGISTRY = {fakelib.Pool: (Pool, can_replace)}
'''


@pytest.fixture
def fakelib(tmp_path, monkeypatch):
    """The library; `fakelib.ours` is the file of it, imported on reading."""
    (tmp_path / "fakelib.py").write_text(LIBRARY)
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "fakelib.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fused_attn.compat, "__path__", [*fused_attn.compat.__path__, str(tmp_path / "peers")])
    yield importlib.import_module("fakelib")
    for name in ("fakelib", "fused_attn.compat.fakelib"):
        sys.modules.pop(name, None)
    vars(fused_attn.compat).pop("fakelib", None)


def ours(fakelib):
    return importlib.import_module("fused_attn.compat.fakelib")


def model_of(fakelib):
    torch.manual_seed(0)
    return fakelib.model()


def test_a_replaced_model_is_the_model(fakelib):
    model, x = model_of(fakelib), torch.randn(2, 5, 3)
    want, keys, parameters = model(x), list(model.state_dict()), list(model.parameters())
    report = replace_attention(model, cpu="always")
    assert [(row.name, row.peer, row.ours, row.cpu) for row in report.replaced] == [
        ("1", fakelib.Pool, ours(fakelib).Pool, "ours")
    ]
    assert report.skipped == []
    assert type(model[1]) is ours(fakelib).Pool
    assert isinstance(model[1], fakelib.Pool)
    torch.testing.assert_close(model(x), want)
    assert ours(fakelib).ran == ["cpu"]
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    model(x).sum().backward()
    assert model[1].score.bias.grad is not None  # else DistributedDataParallel waits for it


def test_restored_it_is_as_it_was(fakelib):
    model = model_of(fakelib)
    before = dict(vars(model[1]))
    replace_attention(model, cpu="always")
    restore_attention(model)
    assert type(model[1]) is fakelib.Pool
    assert vars(model[1]) == before


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("cpu", ["faster", "always", "never"])
def test_what_runs_on_a_cpu(fakelib, monkeypatch, cpu, faster):
    model = model_of(fakelib)
    monkeypatch.setattr(ours(fakelib).Pool, "faster_on_cpu", faster)
    report = replace_attention(model, cpu=cpu)
    model(torch.randn(2, 5, 3))
    runs = cpu == "always" or (cpu == "faster" and faster)
    assert ours(fakelib).ran == ["cpu"] * runs
    assert (report.replaced[0].cpu == "ours") == runs
    assert replace_attention(model, cpu="never").replaced[0].cpu == "the library's (cpu='never')"  # once more
    model(torch.randn(2, 5, 3))
    assert len(ours(fakelib).ran) == runs


def test_other_inputs_are_the_librarys(fakelib):
    model = model_of(fakelib).to(torch.float64)
    replace_attention(model, cpu="always")
    pool = model[1]
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    assert pool.takes(x)
    assert not pool.takes(x, x.float().to(torch.complex64))
    assert not pool.takes(x, None)
    assert not pool.takes(x.to("meta"))
    torch.testing.assert_close(pool(x, temperature=2.0), fakelib.Pool.forward(pool, x, 2.0))
    traced = torch.jit.trace(pool, x, check_trace=False)
    torch.testing.assert_close(traced(2 * x), pool(2 * x))
    assert ours(fakelib).ran == ["cpu"]


def test_pickle_and_deepcopy(fakelib):
    model, x = model_of(fakelib), torch.randn(2, 5, 3)
    replace_attention(model, cpu="always")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[1]) is ours(fakelib).Pool
        assert other[1].fused_attn_cpu == "always"
        assert torch.equal(other(x), model(x))


class Adapter(nn.Linear):
    pass


def hooked(layer):
    layer.register_forward_hook(lambda *_: None)
    return layer


def by_hand(layer):
    layer.forward = lambda x: x
    return layer


CHILDREN = {
    "score is a .*Adapter": lambda layer: Adapter(4, 1),
    "score has hooks": hooked,
    "the forward of score was replaced": by_hand,
    "score is a torch.nn.modules.container.Sequential": nn.Sequential,
    "score is a torch.ao.nn.quantized": lambda layer: torch.ao.quantization.quantize_dynamic(
        nn.Sequential(layer), {nn.Linear}
    )[0],
}


@pytest.mark.parametrize("why", CHILDREN)
def test_children_that_must_be_called_are_left_alone(fakelib, why):
    model = model_of(fakelib)
    model[1].score = CHILDREN[why](model[1].score)
    report = replace_attention(model)
    assert report.replaced == []
    assert [bool(re.search(why, row.why)) for row in report.skipped] == [True]
    assert type(model[1]) is fakelib.Pool


def test_an_adapter_that_comes_later_is_called(fakelib):
    model, x = model_of(fakelib), torch.randn(2, 5, 3)
    replace_attention(model, cpu="always")
    called = []
    model[1].score.register_forward_hook(lambda *_: called.append(1))
    model(x)
    assert called == [1]
    assert ours(fakelib).ran == []


def test_parametrisations_are_no_reason(fakelib):
    model, x = model_of(fakelib), torch.randn(2, 5, 3)
    parametrizations.weight_norm(model[1].score)
    want = model(x)
    assert replace_attention(model, cpu="always").skipped == []
    torch.testing.assert_close(model(x), want)
    assert ours(fakelib).ran == ["cpu"]


def test_other_kinds_of_layers_are_named_by_the_file():
    assert why_not_read("a", None) is None
    assert why_not_read("a", Adapter(2, 2), (Adapter,)) is None


def test_what_is_skipped_says_why(fakelib):
    class Mine(fakelib.Pool):
        pass

    model = nn.ModuleDict(
        {
            "mine": Mine(4),
            "masked": fakelib.Pool(4, masked=True),
            "hand": by_hand(fakelib.Pool(4)),
            "complex": fakelib.Pool(4),
            "scripted": torch.jit.script(fakelib.Pool(4)),
            "good": fakelib.Pool(4),
            "other": fakelib.Other(),
        }
    )
    model["complex"].extra = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"(?s)^strict: .*masked=True is not there"):
        replace_attention(model, strict=True)
    assert type(model["good"]) is fakelib.Pool
    report = replace_attention(model)
    assert [row.name for row in report.replaced] == ["good"]
    assert {row.name: row.why for row in report.skipped} == {
        "mine": "a subclass of Pool, whose forward may be another",
        "masked": "masked=True is not there",
        "hand": "its forward was replaced by hand",
        "complex": "no kernel has the dtype of its extra, complex64",
        "scripted": "it is scripted; replace it before torch.jit.script, or do without that",
    }
    lines = str(report).splitlines()
    assert lines[0] == "replaced: 1"
    assert lines[2].split() == ["good", "Pool", "fused_attn.compat.fakelib", *report.replaced[0].cpu.split()]
    assert "  masked    Pool   masked=True is not there" in lines


def test_a_model_that_is_itself_of_a_known_class(fakelib):
    pool = fakelib.Pool(4)
    assert "(the model)" in str(replace_attention(pool, strict=True))
    assert type(pool) is ours(fakelib).Pool
    assert str(replace_attention(nn.Linear(2, 2))).startswith("nothing of a known class")


def test_only_names_and_classes(fakelib):
    def kinds(only):
        model = nn.ModuleDict({"a": model_of(fakelib), "ab": model_of(fakelib)})
        replace_attention(model, only=only)
        return [type(model[name][1]) is not fakelib.Pool for name in model]

    assert kinds("a") == [True, False]
    assert kinds(["ab.1"]) == [False, True]
    assert kinds(fakelib.Pool) == [True, True]
    assert kinds([]) == [False, False]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model": 3}, TypeError, "model: expected a torch.nn.Module; got int"),
        ({"cpu": "yes"}, ValueError, "cpu: expected one of faster, always, never; got 'yes'"),
        ({"only": "2"}, ValueError, "only: .* got '2', which is none"),
        ({"only": [nn.GRU]}, ValueError, r"only: .* got the class torch\.nn\.modules\.rnn\.GRU, which is none"),
        ({"only": [3]}, TypeError, "only: expected names of modules and classes; got int"),
    ],
    ids=str,
)
def test_errors_name_the_argument(fakelib, change, error, text):
    with pytest.raises(error, match=f"^{text}"):
        replace_attention(**{"model": model_of(fakelib), **change})


def test_restoring_what_is_no_module():
    with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module; got int"):
        restore_attention(3)


def run(*arguments, folder=ROOT):
    command = [sys.executable, *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=folder, capture_output=True, text=True)


def test_no_file_of_a_library_is_imported_before_it_is_met():
    script = """
        import sys, torch, fused_attn.compat
        fused_attn.compat.replace_attention(torch.nn.Linear(2, 2))
        print(*(name for name in sys.modules if name.startswith("fused_attn.compat.")))
    """
    found = run("-c", textwrap.dedent(script)).stdout.split()
    assert found
    assert all(name.split(".")[2].startswith("_") for name in found)


def test_the_list_is_read_in_the_source(fakelib):
    assert "fakelib" in _peers.libraries()
    assert _peers.known("fakelib") == [("fakelib", "Pool", "Softmax pooling, by location attention.")]
    assert "fused_attn.compat.fakelib" not in sys.modules
    listed = run("-m", "fused_attn.compat", "--list").stdout
    rows = [row for library in _peers.libraries() if library != "fakelib" for row in _peers.known(library)]
    assert [line.split(maxsplit=2) for line in listed.splitlines()[1:]] == [list(row) for row in rows]


def test_the_command_prints_a_report_or_what_is_wrong(tmp_path):
    (tmp_path / "mine.py").write_text("from torch import nn\nmake = lambda: nn.Linear(2, 2)\nnumber = 3\n")

    def call(*arguments):
        return run("-m", "fused_attn.compat", *arguments, folder=tmp_path)

    assert call("mine:make").stdout.startswith("nothing of a known class")
    for text, said in {
        "mine": "expected MODULE:FACTORY",
        "absent:make": "cannot import absent",
        "mine:other": "mine has no 'other'",
        "mine:number": "expected a torch.nn.Module or what makes one",
    }.items():
        result = call(text)
        assert result.returncode == 2
        assert said in result.stderr
        assert "Traceback" not in result.stderr
    assert "expected MODULE:FACTORY or --list" in call().stderr
