"""The model of speed counts what an emulator executes, has the rates of data sheets, and says what is predicted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels are compiled with Triton")
pytest.importorskip("rich", reason="the table prints with rich")

ROOT = Path(__file__).parent.parent
# The kernels must be imported without the interpreter, which this process may have on.
ENV = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
STORED = json.loads((ROOT / "bench" / "model" / "emulated.json").read_text())
COUNTS = ("instructions", "flops", "mufu", "global_bytes")
KEY = ("kernel", "code", "grid")


def run(*script: str, status: int = 0) -> str:
    done = subprocess.run([sys.executable, *script], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout


WALK = """
import json, sys
from bench.model import emulated, launches
from bench.families.problem import BF16
family, name = sys.argv[1].split("/")
limit = next(n for f, c, n in emulated.PROBLEMS if (f, c) == (family, name))
op, sizes = emulated.problem(family, name, limit)
launches.SAMPLED = 10**6  # every program
with launches.recorded("sm_90") as found:
    launches.run(op, sizes, BF16, "forward+backward")
print(json.dumps([
    {"kernel": x.kernel.name, "code": x.code.hash, "grid": x.grid}
    | {k: getattr(x.counts, k) for k in ("flops", "mufu", "global_bytes", "instructions")}
    for x in found
]))
"""


@pytest.mark.long  # each compiles all kernels of a family
@pytest.mark.parametrize("problem", STORED["problems"])
def test_counts_are_those_of_the_emulator(problem):
    stored = STORED["problems"][problem]
    found = json.loads(run("-c", WALK, problem))
    compared = 0
    for emulated, walked in zip(stored, found, strict=False):
        if [emulated[k] for k in KEY] != [walked[k] for k in KEY]:
            continue  # written since: `python -m bench.model --emulate` counts it anew
        compared += 1
        for count in COUNTS:
            expected = emulated.get(count, 0)
            assert walked[count] == pytest.approx(expected, rel=0.05, abs=64), f"{walked['kernel']}: {count}"
    if not compared:
        pytest.skip("every kernel was written anew since the emulator ran: python -m bench.model --emulate")


LOOP = """
.visible .entry loop(.param .u64 .ptr .global .align 16 loop_param_0, .param .u32 loop_param_1)
.reqntid 64
{
	.reg .pred 	%p<2>;
	ld.param.b64 	%rd1, [loop_param_0];
	ld.param.b32 	%r1, [loop_param_1];
	mov.u32 	%r2, %tid.x;
	mov.u32 	%r6, %ctaid.x;
	shl.b32 	%r3, %r2, 2;
	mov.b32 	%r4, 0;
$L__BB0_1:                              // =>This Inner Loop Header: Depth=1
	mad.wide.s32 	%rd2, %r3, 4, %rd1;
	setp.lt.s32 	%p2, %r2, 40;
	@%p2 ld.global.v4.b32 { %r7, %r8, %r9, %r10 }, [ %rd2 + 0 ];
	ex2.approx.ftz.f32 	%r11, %r7;
	add.s32 	%r3, %r3, 256;
	add.s32 	%r4, %r4, 1;
	setp.lt.s32 	%p1, %r4, %r1;
	@%p1 bra 	$L__BB0_1;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 	{ %r20, %r21 }, { %r22, %r23 }, { %r24 }, { %r20, %r21 };
	ret;
}
"""


def test_a_loop_runs_as_often_as_its_bound_says():
    walk = pytest.importorskip("bench.model.walk")
    code = walk.parse(LOOP)
    assert [depth for _, depth in code.headers] == [1]
    one = walk.Walk(code, [1 << walk.SPAN, 7], [], 64, (1, 1, 1)).run((0, 0, 0))
    assert one.blocks[code.headers[0][0]] == 7
    assert one.mufu == 7 * 64
    assert one.flops == 2 * 2 * 16 * 8 * 16  # two warps
    assert one.global_bytes == 7 * 40 * 16  # the lanes that the guard lets through
    assert not one.unknown


SHARED = """
.visible .entry kept(.param .u64 .ptr .global .align 16 kept_param_0)
.reqntid 64
{
	.reg .pred 	%p<3>;
	ld.param.b64 	%rd1, [kept_param_0];
	mov.u32 	%r1, %tid.x;
	mad.wide.s32 	%rd2, %r1, 4, %rd1;
	ld.global.b32 	%r2, [ %rd2 + 0 ];
	mul.f32 	%r3, %r2, %r2;
	setp.lt.s32 	%p1, %r1, 24;
	selp.f32 	%r4, %r3, 0f00000000, %p1;
	setp.neu.f32 	%p2, %r4, 0f00000000;
	selp.b32 	%r5, 1, 0, %p2;
	shl.b32 	%r8, %r1, 2;
	st.shared.b32 	[%r8], %r5;
	ld.shared.b8 	%r6, [%r8];
	setp.ne.b32 	%p0, %r6, 0;
	@%p0 ld.global.b32 	%r7, [ %rd2 + 0 ];
	ret;
}
"""


def test_rows_that_a_select_hides_are_hidden_past_shared_memory():
    walk = pytest.importorskip("bench.model.walk")
    one = walk.Walk(walk.parse(SHARED), [1 << walk.SPAN], [], 64, (1, 1, 1)).run((0, 0, 0))
    assert one.global_bytes == 4 * (64 + 24)
    assert not one.unknown


def test_rates_are_those_of_the_data_sheets():
    from bench.model.rates import CHIPS

    tflops = {"sm_80": 312, "sm_86": 125, "sm_89": 181, "sm_90": 989}
    assert set(tflops) == set(CHIPS)
    for target, chip in CHIPS.items():
        assert chip.matrix == pytest.approx(tflops[target], rel=0.01)
        assert 0.5 < chip.dram_share < 1
        assert chip.tf32 < chip.matrix


RULE = """
from bench.model import table
from rich.console import Console
row = {"mode": "forward", "predicted_ms": 1.25, "bound": "x", "floor_ms": 1.0, "kernels": []}
made = [("a", 0.8), ("a", 1.3), ("b", 0.8), ("b", 1.5), ("c", 0.6)]
table.HELD["rows"] = [{"case": f"{f}/x", "predicted_ms": r, "measured_ms": 1.0} for f, r in made]
print(sorted(table.trusted()))
print(table.reasons({"b", "d"}))
rows = [row | {"family": f, "case": f} for f in "abcd"]
Console(width=200).print(table.table(rows, "sm_80", kernels=False))
"""


def test_a_family_off_its_measurements_quotes_no_predictions():
    first, why, *printed = run("-c", RULE).splitlines()
    assert first == "['a']"
    assert "b: 0.80 to 1.50, d: none" in why
    assert "Predicted, not measured" in printed[0]
    assert sum("1.2500" in line for line in printed) == 1
    assert sum("not quoted" in line for line in printed) == 3


def test_the_command_predicts_a_case():
    text = run("-m", "bench.model", "--case", "location/han-words", "--mode", "forward", "--json")
    (row,) = json.loads(text)["rows"]
    assert json.loads(text)["what"].startswith("Predicted, not measured. ")
    assert row["predicted_ms"] > row["floor_ms"] > 0
    assert row["launches"] == len(row["kernels"])
    assert row["eager_ms"] > row["compiled_ms"] > 0
    assert row["measured_ms"] > 0


def test_a_case_that_is_not_there_is_refused():
    run("-m", "bench.model", "--case", "nothing", status=2)
