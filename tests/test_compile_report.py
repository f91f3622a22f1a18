"""Kernels that run here in the interpreter only are kept honest by compiling them for the chips they are for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

pytest.importorskip("triton", reason="compiles with Triton")
pytest.importorskip("rich", reason="the report prints with rich")

ROOT = Path(__file__).parent.parent
# The report must import the kernels without the interpreter, which this process may have on.
ENV = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


BUDGETS = tomllib.loads((ROOT / "bench" / "budgets.toml").read_text())["instructions"]
GATED = "bfloat16 B64 T1024 D512 A128 gated"
TANH = "bfloat16 B4 H1 Tq256 Tk512 A128 Dv128 tanh"
MANY = [f"bfloat16 B4 H8 Tq4096 Tk4096 {widths}" for widths in ("D64 Dv64", "D128 Dv128", "D128 shared window")]
COUNTED = sorted({GATED, TANH, *MANY, *BUDGETS})
BRIEF = ["sm_86", "sm_89", "sm_100", "sm_120", "gfx90a", "gfx942"]
NVIDIA_ONLY = {"_recurrent_group_fwd_kernel"}


def report(folder: Path, *options: str) -> list[dict]:
    """The rows that the report writes; it exits with 1 where one of them failed."""
    out = folder / "rows.json"
    command = [sys.executable, "-m", "bench.compile_report", "--json", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert out.exists(), done.stdout + done.stderr
    rows = json.loads(out.read_text())
    assert (done.returncode == 0) == (not any(r["failed"] for r in rows))
    return rows


def failures(rows: list[dict]) -> list[str]:
    keys = ("target", "case", "kernel", "blocks", "stack", "shared", "error")
    return [" ".join(str(r[key]) for key in keys) for r in rows if r["failed"]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What every case takes of sm_90."""
    return report(tmp_path_factory.mktemp("report"), "--target", "sm_90", "--usage")


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """The cases whose instructions are looked at."""
    return report(tmp_path_factory.mktemp("counted"), "--target", "sm_80", "sm_90", "--case", *COUNTED)


def test_every_kernel_compiles_without_spills_and_warnings_within_shared_memory(rows):
    assert not failures(rows)


def test_a_third_of_the_cases_compiles_for_sm_80(tmp_path):
    assert not failures(report(tmp_path, "--target", "sm_80", "--usage", "--every", "3"))


def test_each_kernel_compiles_in_one_case_for_the_other_chips(rows, tmp_path):
    brief = report(tmp_path, "--brief", "--usage", "--target", *BRIEF)
    assert not failures(brief)
    for target in BRIEF:
        wanted = {r["kernel"] for r in rows} - (NVIDIA_ONLY if target.startswith("gfx") else set())
        assert {r["kernel"] for r in brief if r["target"] == target} == wanted, target


@pytest.mark.long
@pytest.mark.shared_out
@pytest.mark.parametrize("target", ["sm_80", *BRIEF])
def test_every_case_compiles_for_the_other_chips(target, tmp_path):
    assert not failures(report(tmp_path, "--usage", "--target", target))


@pytest.mark.long
@pytest.mark.shared_out
@pytest.mark.parametrize("target", ["sm_80", "sm_90", *BRIEF])
def test_calls_drawn_at_random_compile(target, tmp_path):
    rows = report(tmp_path, "--drawn", "300", "--seed", "0", "--target", target)
    assert not failures(rows)
    assert len({r["case"] for r in rows}) >= 295


def test_products_of_16_bit_operands_run_on_matrix_units(counted):
    adding = ("_merge_kernel", "_sums_kernel")
    heavy = [r for r in counted if GATED in r["case"] and r["kernel"] not in adding]
    assert {r["target"] for r in heavy} == {"sm_80", "sm_90"}
    assert all(r["loop"].get("matrix", 0) > 0 for r in heavy), heavy


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_scores_and_their_maximum_are_one_sum(target, tmp_path):
    """Where the widths of keys and values have other layouts, Triton would make the scores in both."""
    assert not failures(
        report(tmp_path, "--family", "recurrent", "--case", "Ty35 Th2", "--usage", "--target", target)
    )


def test_inner_loop_counts_the_loop_with_most_arithmetic():
    code = """
    from bench.compile_report import inner_loop
    sass = ["MOV R0, R1;", "LBB0:", "FFMA R1, R2;", "LBB1:", "HGMMA.64x64x16 R1, R2;", "LDS R1, [R2];",
            "@P0 BRA LBB1;", "MUFU.EX2 R1;", "@!P1 BRA LBB0;", "LBB2:", "BRA LBB2;"]
    assert inner_loop(sass, "cuda") == {"all": 3, "matrix": 1, "wgmma": 1, "load": 1}, inner_loop(sass, "cuda")
    """
    script = "\n".join(line.strip() for line in code.strip().splitlines())
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=ENV, check=True)


def test_a_spill_a_warning_or_too_much_shared_memory_fails_the_report():
    code = r"""
    from collections import Counter
    from bench.compile_report import Row, _usage_cuda
    row = lambda stack, shared, error="": Row("t", "c", "k", "b", 1, stack, shared, 100, Counter(), 0.0, error)
    assert [row(0, 100).failed, row(8, 0).failed, row(0, 101).failed, row(0, 0, "no").failed] == [0, 1, 1, 1]
    said = "ptxas info    : Used 76 registers, used 1 barriers\n    8 bytes stack frame, 4 bytes spill stores\n"
    warning = "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert _usage_cuda(said) == (76, 8, "")
    assert _usage_cuda(said + warning) == (76, 8, warning)
    """
    script = "\n".join(line.strip() for line in code.strip().splitlines())
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=ENV, check=True)


DRAWN = """
from bench.families import CASES
from bench.families.drawn import drawn

calls = drawn(300, 0)
assert drawn(40, 0) == calls[:40] and drawn(40, 1) != calls[:40]
assert {family for family, _ in calls} == set(CASES)
found = [case for family, case in calls if family in ("location", "hierarchical") and hasattr(case, "A")]
for case in found:  # what the public functions refuse
    widths = {case.A, getattr(case, "outer_A", case.A)}
    assert not (case.gates and (None in widths or case.projected)), case
    assert not case.projected or widths == {case.D}, case
assert {case.A is None for case in found} == {case.projected for case in found} == {True, False}
"""


def test_drawn_calls_are_the_same_for_a_seed_reach_every_family_and_are_none_that_is_refused():
    subprocess.run([sys.executable, "-c", DRAWN], cwd=ROOT, env=ENV, check=True)


def test_additive_inner_loops_keep_their_instruction_counts(counted):
    found = {r["kernel"]: r for r in counted if r["target"] == "sm_90" and r["case"] == TANH}
    # dq and dk: 6.6 and 5.6 with 128 features a program; with 64 more programs share a core, 1.3 times as fast.
    bounds = {"_concat_fwd_kernel": 4.4, "_concat_bwd_dq_kernel": 7.3, "_concat_bwd_dkv_kernel": 6.2}
    for kernel, most in bounds.items():
        row = found[kernel]
        special = row["loop"]["sfu"] * row["per_element"] / row["loop"]["all"]
        assert row["per_element"] <= most, row
        assert special <= 0.5, row


@pytest.mark.parametrize("case", BUDGETS)
def test_main_loops_keep_within_their_instructions(counted, case):
    found = {r["kernel"]: r["per_element"] for r in counted if (r["target"], r["case"]) == ("sm_90", case)}
    for kernel, budget in BUDGETS[case].items():
        assert round(found[f"_{kernel}_kernel"], 2) <= budget, kernel


@pytest.mark.parametrize("kernel", ["_general_fwd_kernel", "_general_bwd_dq_kernel", "_general_bwd_dkv_kernel"])
@pytest.mark.parametrize("case", MANY)
def test_products_of_many_queries_and_keys_use_wgmma(counted, case, kernel):
    (row,) = [r for r in counted if (r["target"], r["case"], r["kernel"]) == ("sm_90", case, kernel)]
    assert row["loop"]["wgmma"] == row["loop"]["matrix"] > 0, row


def test_keys_that_are_the_values_are_loaded_once(rows):
    """A tile of values beside that of keys would take as much shared memory again, in every stage."""
    sizes = {
        r["case"].split("D256 ")[1]: r["shared"]
        for r in rows
        if r["kernel"] == "_general_fwd_kernel" and "Tq1024 Tk1024 D256" in r["case"]
    }
    query = 128 * 256 * 2
    assert sizes["shared"] - query <= (sizes["Dv256"] - query) * 0.6, sizes
