"""Every operator and module composes with every transform: see `_compositions`, which also prints the table."""

import shutil

import _compositions as table
import pytest

# What compiles is slow: by default for the rows with the most options, and for all rows with --long.
COMPILED = ("compile, dynamic", "grad(compile)", "compile(grad(grad))", "compile(vmap(grad))", "autocast", "export")
FULL = [name for name in table.ROWS if "all options" in name or "packed" in name or table.ROWS[name].module]
INDUCTOR = ("location padded", "location packed")


def cells():
    for column in table.COLUMNS:
        for name, row in table.ROWS.items():
            for impl in row.impls:
                if not table.applies(row, column):
                    continue
                marks = [pytest.mark.kernel] if impl == "triton" else []
                yield pytest.param(column, name, impl, marks=marks, id=f"{column}-{name}-{impl}")


@pytest.mark.parametrize(("column", "name", "impl"), cells())
def test_cell(column, name, impl, device):
    if device.type != "cpu":
        pytest.skip("the table is of a CPU")
    if column == "Inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("on a CPU, Inductor needs a C++ compiler")
    table.cell(table.ROWS[name], column, impl)
