"""Every operator and module composes with every transform: see `_compositions`, which also prints the table."""

import shutil

import _compositions as table
import pytest

# By default every column meets a padded and a packed row, by PyTorch and by the kernel, and every row of the two
# columns whose failures would say nothing; all cells with --long.
EVERY_DAY = ("location padded, all options", "concat packed")
SILENT = ("compile(grad)", "one tensor twice")


def cells(impl):
    for column in table.COLUMNS:
        for name, row in table.ROWS.items():
            if not table.applies(row, column):
                continue
            often = column not in ("Inductor", *SILENT) and (name in EVERY_DAY or column in table.OF_MODULES)
            marks = [] if often and (impl == "auto" or "compile" not in column) else [pytest.mark.long]
            yield pytest.param(column, name, marks=marks, id=f"{column}-{name}")


def check(name, column, impl, device):
    if device.type != "cpu":
        pytest.skip("the table is of a CPU")
    table.cell(table.ROWS[name], column, impl)


@pytest.mark.parametrize(("column", "name"), list(cells("auto")))
def test_cell_by_pytorch(column, name, device):
    if column == "Inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("on a CPU, Inductor needs a C++ compiler")
    check(name, column, "auto", device)


@pytest.mark.kernel
@pytest.mark.parametrize(("column", "name"), list(cells("triton")))
def test_cell_by_the_kernel(column, name, device):
    if column == "Inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("on a CPU, Inductor needs a C++ compiler")
    check(name, column, "triton", device)


PLAIN = [name for name in table.ROWS if "options" not in name and table.ROWS[name].module is None]


@pytest.mark.kernel
@pytest.mark.parametrize("name", PLAIN)
def test_a_compiled_gradient_is_not_zero_where_something_captured_is_live(name, device):
    check(name, "compile(grad)", "triton", device)


@pytest.mark.parametrize("name", [name for name in PLAIN if "packed" in name] + ["GraphAttention"])
def test_one_tensor_in_several_arguments_compiles(name, device):
    check(name, "one tensor twice", "auto", device)
