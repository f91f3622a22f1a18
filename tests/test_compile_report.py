"""Kernels that run here in the interpreter only are kept honest by compiling them for the chips they are for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="compiles with Triton")
pytest.importorskip("rich", reason="the report prints with rich")

ROOT = Path(__file__).parent.parent
# The report must import the kernels without the interpreter, which this process may have on.
ENV = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "rows.json"
    command = [sys.executable, "-m", "bench.compile_report", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert out.exists(), done.stdout + done.stderr
    rows = json.loads(out.read_text())
    assert (done.returncode == 0) == (not any(r["failed"] for r in rows))
    return rows


def test_every_kernel_compiles_without_spills_within_shared_memory(rows):
    failed = [f"{r['target']} {r['case']} {r['kernel']} {r['blocks']}: {r['error']}" for r in rows if r["failed"]]
    assert not failed
    assert {r["target"] for r in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}


def test_products_of_16_bit_operands_run_on_matrix_units(rows):
    heavy = [r for r in rows if "bfloat16 B64 T1024 D512 A128 gated" in r["case"] and "merge" not in r["kernel"]]
    assert heavy
    assert all(r["loop"].get("matrix", 0) > 0 for r in heavy), heavy


def test_inner_loop_counts_the_loop_with_most_arithmetic():
    code = """
    from bench.compile_report import inner_loop
    sass = ["MOV R0, R1;", "LBB0:", "FFMA R1, R2;", "LBB1:", "HGMMA.64x64x16 R1, R2;", "LDS R1, [R2];",
            "@P0 BRA LBB1;", "MUFU.EX2 R1;", "@!P1 BRA LBB0;", "LBB2:", "BRA LBB2;"]
    assert inner_loop(sass, "cuda") == {"all": 3, "matrix": 1, "wgmma": 1, "load": 1}, inner_loop(sass, "cuda")
    """
    script = "\n".join(line.strip() for line in code.strip().splitlines())
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=ENV, check=True)


def test_a_spill_or_too_much_shared_memory_fails_the_report():
    script = (
        "from collections import Counter\nfrom bench.compile_report import Row\n"
        "row = lambda stack, shared, error='': Row('t','c','k','b', 1, stack, shared, 100, Counter(), 0., error)\n"
        "assert [row(0, 100).failed, row(8, 0).failed, row(0, 101).failed, row(0, 0, 'no').failed]"
        " == [False, True, True, True]"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=ENV, check=True)


def test_additive_inner_loops_keep_their_instruction_counts(rows):
    case = "bfloat16 B4 H1 Tq256 Tk512 A128 Dv128 tanh"
    found = {r["kernel"]: r for r in rows if r["target"] == "sm_90" and r["case"] == case}
    bounds = {"_concat_fwd_kernel": 4.4, "_concat_bwd_dq_kernel": 7.0, "_concat_bwd_dk_kernel": 6.0}
    for kernel, most in bounds.items():
        row = found[kernel]
        special = row["loop"]["sfu"] * row["per_element"] / row["loop"]["all"]
        assert row["per_element"] <= most, row
        assert special <= 0.5, row


@pytest.mark.parametrize("kernel", ["_general_fwd_kernel", "_general_bwd_dq_kernel", "_general_bwd_dkv_kernel"])
@pytest.mark.parametrize("case", ["D64 Dv64", "D128 Dv128", "D128 shared window"])
def test_products_of_many_queries_and_keys_use_wgmma(rows, case, kernel):
    name = f"bfloat16 B4 H8 Tq4096 Tk4096 {case}"
    (row,) = [r for r in rows if (r["target"], r["case"], r["kernel"]) == ("sm_90", name, kernel)]
    assert row["loop"]["wgmma"] == row["loop"]["matrix"] > 0, row


def test_keys_that_are_the_values_are_loaded_once(rows):
    """A tile of values beside that of keys would take as much shared memory again, in every stage."""
    sizes = {
        r["case"].split("D256 ")[1]: r["shared"]
        for r in rows
        if r["target"] == "sm_90" and r["kernel"] == "_general_fwd_kernel" and "Tq1024 Tk1024 D256" in r["case"]
    }
    query = 128 * 256 * 2
    assert sizes["shared"] - query <= (sizes["Dv256"] - query) * 0.6, sizes
