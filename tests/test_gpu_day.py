"""`make gpu` without a GPU: its clock, its cut-offs and its table, with programs made up for the purpose."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_table, one, run
from bench.families.problem import Case, Cost, Op
from bench.gpu import Day, Step

ROOT = Path(__file__).resolve().parent.parent
FACTS = {"device": "NVIDIA Made Up", "torch": "2.11.0", "triton": "3.6.0"}
PROBE = f"import json; print('a warning'); print(json.dumps({FACTS!r}))"
needs_xdist = pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="pytest-xdist is not installed")


def python(text: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", text, *arguments]


def row(provider: str, ms: float | None, mode: str = "forward", dtype: str = "bfloat16", **more) -> dict:
    made = {"family": "concat", "case": "square", "dtype": dtype, "provider": provider, "mode": mode}
    return made | ({"failure": "wrong: out"} if ms is None else {"median_ms": ms, "percent_of_ceiling": 50.0}) | more


def outcome(name: str, outcome: str = "passed", text: str = "") -> str:
    return (
        json.dumps({"id": f"tests/{name}", "when": "call", "outcome": outcome, "seconds": 0.1, "text": text}) + "\n"
    )


REPORTS = {"rows": [row("fused", 2.0), row("reference", 9.0)]}
# Each writes as the real one does, and then: hangs until it is interrupted; hangs whatever it is told; fails.
TESTS = """
import os, time
with open(os.environ["FUSED_ATTN_TEST_RESULTS"], "a", buffering=1) as file:
    file.write({0!r})
    time.sleep({1})
"""
STUBBORN = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
open(sys.argv[1], "w").write({0!r})
print("measuring", flush=True)
time.sleep(60)
"""
FAILS = "print('it went wrong'); raise SystemExit(3)"


def stubborn(rows: list) -> list[str]:
    return python(STUBBORN.format(json.dumps({"rows": rows})), gpu.REPORT)


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """`main` with these steps: the exit status."""
    monkeypatch.setattr(gpu, "PROBE", PROBE)
    monkeypatch.setattr(gpu, "install", lambda *_: None)
    monkeypatch.setattr(gpu, "driver", lambda: None)

    def go(*steps: Step, minutes: float = 0.2) -> int:
        monkeypatch.setattr(gpu, "steps", lambda *_: list(steps))
        return gpu.main(
            ["--minutes", str(minutes), "--output", str(tmp_path / "out"), "--commit", "0123456789abcdef"]
        )

    return go


@pytest.mark.parametrize("probe", ["raise SystemExit('torch.cuda.is_available() is False on this machine')", "1 / 0"])
def test_without_a_gpu_it_says_so_and_exits_2(monkeypatch, capsys, tmp_path, probe):
    monkeypatch.setattr(gpu, "PROBE", probe)
    assert gpu.main(["--output", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("make gpu needs a GPU, and found none: ")
    assert len(printed.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_day_keeps_what_was_made_and_goes_on_after_failures_and_cut_offs(made_up, tmp_path, capsys):
    begin = time.monotonic()
    status = made_up(
        Step("tests", 2, [python(TESTS.format(outcome("test_concat.py::test_a") + '{"id": "half a li', 60))]),
        Step("bfloat16", 2, [stubborn(REPORTS["rows"])], report=True),
        Step("broken", 1, [python(FAILS)]),
        Step("absent", 1, [["no-such-program"]], missing="no-such-program is not installed"),
        Step("torch.compile", 2, [stubborn([row("compile", 3.0)])], report=True),
        minutes=0.3,
    )
    assert status == 0
    assert time.monotonic() - begin < 0.3 * 60 + 8
    steps = {step["step"]: step for step in json.loads((tmp_path / "out" / "machine.json").read_text())["steps"]}
    assert steps["tests"]["cut_off"]
    assert steps["bfloat16"]["cut_off"]
    assert steps["bfloat16"]["last_line"] == "measuring"
    assert steps["broken"]["statuses"] == [3]
    assert steps["absent"]["skipped"] == "no-such-program is not installed"
    assert steps["torch.compile"]["statuses"] == [-signal.SIGKILL]
    assert sorted(x.name for x in (tmp_path / "out").iterdir()) == [
        "bench.json",
        "log.txt",
        "machine.json",
        "table.txt",
        "tests.jsonl",
    ]
    assert "it went wrong" in (tmp_path / "out" / "log.txt").read_text()
    text = (tmp_path / "out" / "table.txt").read_text()
    assert text in capsys.readouterr().out
    assert [line.split() for line in text.splitlines() if line.startswith("concat")] == [
        ["concat", "1", "0", "0"],
        ["concat/square", "bf16", "2.0000", "50%", "4.50", "1.50"],
    ]
    facts = json.loads((tmp_path / "out" / "machine.json").read_text())
    assert facts.items() >= {**FACTS, "commit": "0123456789abcdef"}.items()


@pytest.mark.parametrize(
    "step",
    [
        Step("tests", 1, [python(TESTS.format(outcome("test_graph.py::test_a", "failed"), 0))]),
        Step("tests", 1, [python(FAILS)]),
        Step("bfloat16", 1, [stubborn([row("fused", None)])], report=True),
        Step("sanitizer", 1, [python("raise SystemExit(9)")]),
    ],
)
def test_what_is_wrong_is_the_exit_status(made_up, step):
    good = Step("before", 1, [python(TESTS.format(outcome("test_concat.py::test_a"), 0))])
    assert made_up(*([step] if step.commands == [python(FAILS)] else [good, step]), minutes=0.1) == 1


def test_what_a_step_leaves_goes_to_the_next_ones():
    weights, left, caps = [210, 120, 40, 60], 430.0, []
    for i in range(4):
        caps.append(gpu.shares(left, weights[i:]))
        left -= caps[-1]
    assert caps == pytest.approx([210, 120, 40, 60])
    assert gpu.shares(430 - 10, weights[1:]) == pytest.approx(420 * 120 / 220)
    assert gpu.shares(2 * 430, weights) == pytest.approx(2 * 210)
    assert gpu.shares(-5, weights) == 0


SCRIPT = """
import sys
from bench import gpu
from bench.gpu import Step
gpu.PROBE, gpu.SAVE_SECONDS = {probe!r}, 0.0
gpu.install = gpu.driver = lambda *_: None
gpu.steps = lambda *_: [
    Step("tests", 1, [{tests!r}]), Step("bfloat16", 1, [{bench!r}], report=True), Step("later", 1, [{later!r}]),
]
sys.exit(gpu.main(["--minutes", "3", "--output", sys.argv[1]]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_leaves_results_and_the_table_so_far(tmp_path, number):
    out, pid = tmp_path / "out", tmp_path / "pid"
    bench = python(
        f"import os; open({str(pid)!r}, 'w').write(str(os.getpid()))" + STUBBORN.format(json.dumps(REPORTS)),
        gpu.REPORT,
    )
    script = SCRIPT.format(
        probe=PROBE,
        tests=python(TESTS.format(outcome("test_concat.py::test_a"), 0)),
        bench=bench,
        later=python(f"open({str(tmp_path / 'later')!r}, 'w')"),
    )
    day = subprocess.Popen(
        [sys.executable, "-c", script, str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 60
        while not (out / "bench.json").exists():
            assert day.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        day.send_signal(number)
        printed, _ = day.communicate(timeout=60)
    finally:
        day.kill()
        if number == signal.SIGKILL:
            os.kill(int(pid.read_text()), signal.SIGKILL)
    text = (out / "table.txt").read_text()
    assert "concat/square bf16" in text
    assert "concat                                   1       0       0" in text
    assert not (tmp_path / "later").exists()
    if number != signal.SIGKILL:
        assert text in printed
        assert "later skipped: no time was left" in text
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)


def test_commands_run_side_by_side_and_each_status_is_kept(tmp_path):
    day = Day(tmp_path, 30)
    begin = time.monotonic()
    commands = [python(f"import time; time.sleep(1.5); raise SystemExit({i})") for i in range(4)]
    assert day.run(Step("four", 1, commands), 20, dict(os.environ)) == [0, 1, 2, 3]
    assert time.monotonic() - begin < 5.5


def test_a_long_log_keeps_its_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOG_BYTES", 3000)
    log = tmp_path / "log.txt"
    log.write_bytes(b"first" + b"." * 5000 + b"last")
    gpu.shorten(log)
    assert log.stat().st_size < 3000
    assert log.read_bytes()[:5] + log.read_bytes()[-4:] == b"firstlast"


def test_every_step_is_a_command_that_its_program_understands(monkeypatch, capsys):
    steps = gpu.steps("python3", "abc", lambda name: True, lambda name: f"/usr/bin/{name}")
    assert [step.name for step in steps] == [
        "compile",
        "tests",
        "bfloat16",
        "graph",
        "torch.compile",
        "peers",
        "float32",
        "counters",
        "sanitizer",
    ]
    for step in steps:
        for command in step.commands:
            if "bench.run" in command:
                assert command[-2:] == ["--output", gpu.REPORT]
                assert run.main([*command[3:-2], "--list"]) == 0
    assert [command[2] for command in steps[-1].commands] == list(gpu.TOOLS)
    compiled = [command[2:] for command in steps[0].commands]
    assert compiled == [["bench.one", "--part", str(i), str(len(compiled))] for i in range(len(compiled))]
    for labels in (gpu.COUNTED_CASES, one.EVERY_KERNEL):
        assert {run.label(*case) for case in one.chosen(labels)} == set(labels)
    assert set(gpu.COUNTED_KERNELS) <= one.package_kernels()
    bare = gpu.steps("python3", None, lambda name: False, lambda name: None)
    assert [bool(step.missing) for step in bare] == [False] * 7 + [True] * 2
    assert "-n" not in bare[1].commands[0]
    assert not {"--commit", "keops"} & {word for step in bare for command in step.commands for word in command}


def test_parts_are_of_every_case_as_it_is_timed_and_as_it_is_checked(monkeypatch):
    parts = [list(one.part(i, 15)) for i in range(15)]
    assert {run.label(op, case) for part in parts for op, case, _ in part} == {
        run.label(*found) for found in run.select("cuda")
    }
    pytest.importorskip("triton")
    seen = []

    def double(x, *, impl):
        seen.append(len(x))
        return 2 * x

    cases = tuple(Case(name, {"n": n}, check={"n": 1} if n > 5 else {}) for n, name in enumerate("abcdefgh"))
    op = Op("made", lambda sizes, *_: {"x": torch.ones(sizes["n"])}, double, lambda *_: (Cost(0, 0),) * 2, cases)
    monkeypatch.setattr(one, "select", lambda device: [(op, case) for case in op.cases])
    assert one.main(["--part", "1", "3", "--device", "cpu"]) == 0
    assert seen == [n for n in (1, 4, 7, 1) for _ in ("forward", "forward+backward")]


def test_the_table_says_passed_and_failed_and_every_case(tmp_path):
    path = tmp_path / "tests.jsonl"
    lines = [outcome(f"test_location_window.py::test_{i}") for i in range(7)]
    lines += [
        outcome("test_word_by_word.py::test_x"),
        outcome("test_word_by_word.py::test_x", "failed", "E   ah\nE no"),
    ]
    lines += [outcome("test_demo.py::test_y", "skipped"), '{"id": "cut']
    path.write_text("".join(lines))
    graph = {"rows": [row("fused", 1.0, percent_of_ceiling=88.0)]}
    reports = {
        "bfloat16": {
            "rows": [
                row("fused", 2.0),
                row("reference", 9.0),
                row("fused", 4.0, "forward+backward"),
                row("reference", 6.0, "forward+backward"),
            ]
        },
        "graph": graph,
        "torch.compile": {"rows": [row("compile", 3.0)]},
        "peers": {"rows": [row("flex", 5.0)]},
        "float32": {"rows": [row("fused", None, dtype="float32"), row("reference", 1.0, dtype="float32")]},
    }
    facts = {
        **FACTS,
        "commit": "0123456789abcdef",
        "dirty": True,
        "steps": [{"step": "tests", "seconds": 99.6, "cut_off": True}, {"step": "counters", "skipped": "no ncu"}],
        "counters": [{"kernel": "_a_kernel", gpu.COUNTERS[1]: "71.2", "launch__registers_per_thread": "128"}],
        "sanitizer": {"memcheck": "clean", "racecheck": "did not finish"},
    }
    text = gpu_table.table(facts, gpu_table.outcomes_of(path), reports)
    words = [line.split() for line in text.splitlines()]
    assert text.startswith("NVIDIA Made Up, torch 2.11.0, Triton 3.6.0, commit 0123456789ab with changes\n")
    assert "tests 100 s (cut off), counters skipped: no ncu" in text
    for line in (
        "location 7 0 0",
        "recurrent 0 1 0",
        "other 0 0 1",
        "FAILED test_word_by_word.py::test_x: ah",
        "concat/square bf16 2.0000 50% 88% 4.50 1.50 4.0000 50% 1.50 flex 2.50",
        "concat/square f32 FAILED",
        "FAILED concat/square/float32: wrong: out",
        "_a_kernel 71.2 128",
        "memcheck clean",
    ):
        assert line.split() in words
    assert max(map(len, text.splitlines())) <= 120


def test_the_table_of_a_whole_day_fits_a_screen():
    rows = [
        row(provider, 1234.5678, mode, case.dtype_name, family=op.family, case=case.name)
        for op, case in run.select("cuda")
        for mode in run.MODES
        for provider in ("fused", "reference", "compile")
    ]
    text = gpu_table.table(FACTS, {}, {"bfloat16": {"rows": rows}})
    assert len(text.splitlines()) < 80
    assert max(map(len, text.splitlines())) <= 120


def test_failures_beyond_a_dozen_are_counted():
    failed = {f"tests/test_graph.py::test_{i}": {"outcome": "failed"} for i in range(20)}
    lines = gpu_table.lines_of_tests(failed)
    assert len(lines) == 2 + gpu_table.SHOWN_FAILURES + 1
    assert lines[-1] == "and 8 more, in tests.jsonl"


def test_counters_are_those_of_the_first_launch_of_each_kernel():
    name, registers = gpu.COUNTERS[1], "launch__registers_per_thread"
    printed = f"""==PROF== Connected to process 12
location/gated-batch/bfloat16: _location_fwd_kernel
"ID","Process ID","Kernel Name","{registers}","{name}"
"","","","register/thread","%"
"0","12","_location_fwd_kernel","168","61.5"
==PROF== between
"1","12","_concat_fwd_kernel","255","1,234.5"
"2","12","_location_fwd_kernel","99","1.0"
"""
    assert gpu.counters(printed) == [
        {"kernel": "_location_fwd_kernel", name: "61.5", registers: "168"},
        {"kernel": "_concat_fwd_kernel", name: "1,234.5", registers: "255"},
    ]
    assert gpu.counters("==ERROR== ERR_NVGPUCTRPERM") == []


def test_the_sanitizer_is_clean_found_something_or_did_not_finish():
    found = gpu.sanitized([0, gpu.FOUND, -9, 1], "========= Error: Device not supported by the tool\nmore")
    assert list(found) == list(gpu.TOOLS)
    assert [word.split()[0] for word in found.values()] == ["clean", "FOUND", "did", "did"]
    assert "not supported by the tool" in found["synccheck"]


# What they printed of an H200, in lines that began with "=========", and without the host's frames but one.
RACES = """\
TOOL COMPUTE-SANITIZER
statistics/okabe/bfloat16: _statistics_bwd_frame_kernel _statistics_fwd_kernel
TOOL Error: Race reported between Read access at nvjet_sm90_tst_32x64_64x16_2x1_v_bz_NTN+0xb00
TOOL     and Write access at nvjet_sm90_tst_32x64_64x16_2x1_v_bz_NTN+0x29e0 [8 hazards]
TOOL
statistics/okabe-recording/bfloat16: _statistics_merge_kernel
TOOL Error: Race reported between Read access at nvjet_sm90_tst_32x64_64x16_2x1_v_bz_NTN+0xb00
TOOL     and Write access at nvjet_sm90_tst_32x64_64x16_2x1_v_bz_NTN+0x29e0 [8 hazards]
TOOL
TOOL RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""
READS = """\
TOOL Uninitialized __global__ memory read of size 2 bytes
TOOL     at _recurrent_fwd_kernel+0x550 in location.py:51
TOOL     by thread (64,0,0) in block (0,0,0)
TOOL     Address 0x7f64e9d25850
TOOL     Saved host backtrace up to driver entry point at kernel launch time
TOOL         Host Frame: launch in recurrent.py:305
TOOL
TOOL ERROR SUMMARY: 15904 errors
TOOL ERROR SUMMARY: 15884 errors were not printed. Use --print-limit option to adjust the number of printed errors
"""


def test_the_sanitizer_is_asked_of_the_kernels_of_the_package_only():
    """What it says of cuBLAS's is ignored where it is all that it says."""
    assert all(gpu.OURS.fullmatch(name) for name in one.package_kernels())
    races, reads, cublas = RACES.replace("TOOL", "racecheck"), READS.replace("TOOL", "initcheck"), "nvjet_sm90_"
    printed = races + reads + "memcheck ERROR SUMMARY: 0 errors\n"
    found = gpu.sanitized([0, gpu.FOUND, 0, gpu.FOUND], printed)
    assert found["memcheck"] == found["synccheck"] == "clean"
    assert found["racecheck"] == "clean; ignored 2 in nvjet_sm90_tst_32x64_64x16_2x1_v_bz_NTN"
    assert found["initcheck"] == "FOUND 1 in _recurrent_fwd_kernel, see log.txt"
    mixed = races.replace(f"Write access at {cublas}", "Write access at _a_kernel+0x10 or ", 1)
    assert gpu.findings("racecheck", mixed).startswith(f"FOUND 1 in _a_kernel, see log.txt; ignored 1 in {cublas}")
    for unsure in (
        reads.replace("_recurrent_fwd_kernel", "void at::add_kernel<int>(int*)"),  # what was not printed may be ours
        "initcheck Program hit an error on CUDA API call to cudaLaunchKernel\ninitcheck ERROR SUMMARY: 1 error\n",
        "initcheck COMPUTE-SANITIZER\n",
    ):
        assert gpu.findings("initcheck", unsure).startswith("FOUND SOMETHING, see log.txt")


def test_products_on_the_host_are_those_of_the_device():
    """And stand in for all that make one on a GPU."""
    a, b, x = torch.randn(3, 4), torch.randn(4, 5), torch.randn(3, 5)
    aten = torch.ops.aten
    assert torch.equal(one.on_host(aten.mm.default, a, b), a @ b)
    assert torch.equal(one.on_host(aten.addmm.default, x, a, b, beta=2), torch.addmm(x, a, b, beta=2))
    library = one.host_products()
    assert library._op_impls == {f"aten/{name}/CUDA" for name in one.PRODUCTS}


ITEMS = """
import pytest

def test_passes():
    pass

def test_fails():
    assert 1 == 2

def test_skips():
    pytest.skip("not here")

def test_breaks_the_device(request):
    if hasattr(request.config, "workerinput"):
        request.config.broken = True
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

@pytest.mark.parametrize("i", range(20))
def test_after(i, request):
    assert not getattr(request.config, "broken", False), "in the process whose device is broken"
"""


@pytest.mark.parametrize("options", [[], pytest.param(["-n", "2"], marks=needs_xdist)], ids=["alone", "xdist"])
def test_plugin_writes_a_line_a_test_and_replaces_a_worker_with_a_broken_device(tmp_path, options):
    (tmp_path / "test_items.py").write_text(ITEMS)
    (tmp_path / "test_unimportable.py").write_text("import no_such_module")
    path = tmp_path / "tests.jsonl"
    command = [sys.executable, "-m", "pytest", "-p", "bench.gpu_tests", "-p", "no:cacheprovider", "-q"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FUSED_ATTN_TEST_RESULTS": str(path)}
    done = subprocess.run(
        [*command, "--continue-on-collection-errors", *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    found = {name.partition("::")[2] or name: x["outcome"] for name, x in gpu_table.outcomes_of(path).items()}
    expected = {"passes": "passed", "fails": "failed", "skips": "skipped", "breaks_the_device": "failed"}
    expected = {f"test_{name}": x for name, x in expected.items()} | {"test_unimportable.py": "failed"}
    assert found == expected | {f"test_after[{i}]": "passed" for i in range(20)}, done.stdout
    assert any("assert 1 == 2" in x.get("text", "") for x in map(json.loads, path.read_text().splitlines()))


@pytest.mark.long
@pytest.mark.kernel
def test_small_cases_launch_every_kernel(monkeypatch, device):
    """Here in the interpreter, whose rules for a chip are its own: on a GPU `bench.one` prints what it left out."""
    if device.type != "cpu":
        pytest.skip("counts launches of the interpreter")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    ran, execute = set(), interpreter.GridExecutor.__call__

    def call(self, *args, **kwargs):
        ran.add(self.fn.__name__)
        return execute(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
    assert one.main(["--small", "--device", "cpu"]) == 0
    assert ran >= one.package_kernels()


@pytest.mark.parametrize("ours", [True, False])
def test_kernels_are_of_this_tree_even_where_it_cannot_be_installed(monkeypatch, tmp_path, ours):
    """Another tree's may have been installed before."""
    (tmp_path / "fused_attn").mkdir()
    (tmp_path / "kernels").mkdir()
    chip = (tmp_path if ours else tmp_path / "elsewhere") / "kernels" / "chip.py"
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, f"{chip}\n", ""))
    link = gpu.install(Day(tmp_path / "out", 5), sys.executable, {"PATH": "", "PIP_NO_INDEX": "1"})
    assert link == (None if ours else tmp_path / "fused_attn" / "kernels")
    assert link is None or link.resolve() == tmp_path / "kernels"
