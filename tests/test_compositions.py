"""Every operator and module composes with every transform: see `_compositions`, which also prints the table."""

import dataclasses
import shutil

import _compositions as table
import pytest
import torch

# By default every column meets a padded and a packed row, by PyTorch and by the kernel, every row of the two columns
# whose failures would say nothing, and opcheck every raw operator; all cells with --long.
EVERY_DAY = ("location padded, all options", "concat packed")
SILENT = ("compile(grad)", "one tensor twice")


def cells(impl):
    for column in table.COLUMNS:
        for name, row in table.ROWS.items():
            if not table.applies(row, column, impl):
                continue
            often = column not in ("Inductor", *SILENT) and (name in EVERY_DAY or column in table.OF_MODULES)
            if column == "raw operators" and row.module is None:
                often = impl == "auto" or any(word in name for word in ("packed", "options"))
            marks = [] if often and (impl == "auto" or "compile" not in column) else [pytest.mark.long]
            yield pytest.param(column, name, marks=marks, id=f"{column}-{name}")


def check(name, column, impl, device):
    table.cell(table.ROWS[name], column, impl, device)


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


PLAIN = [
    name for name, row in table.ROWS.items() if "options" not in name and row.module is None and row.columns is None
]


@pytest.mark.kernel
@pytest.mark.parametrize("name", PLAIN)
def test_a_compiled_gradient_is_not_zero_where_something_captured_is_live(name, device):
    check(name, "compile(grad)", "triton", device)


@pytest.mark.kernel
@pytest.mark.parametrize("name", PLAIN)
def test_every_node_of_the_graph_says_its_name(name, device):
    """Anomaly mode asks for it, to say which call an error comes from; what a context holds may hide the method."""
    row = dataclasses.replace(table.ROWS[name], device=device)
    gradients = table.gradients(row, "triton", table.live(row, row.tensors("triton")))  # held: they hold the graph
    nodes, seen = {x.grad_fn for x in gradients}, set()
    while nodes:
        seen |= nodes
        nodes = {n for node in nodes if node for n, _ in node.next_functions} - seen
    names = [node.name() for node in seen if node]
    assert any("Gradients" in name for name in names)


@pytest.mark.parametrize("name", [name for name in PLAIN if "packed" in name] + ["GraphAttention"])
def test_one_tensor_in_several_arguments_compiles(name, device):
    check(name, "one tensor twice", "auto", device)


@pytest.mark.parametrize("name", ["concat padded", "concat padded, states", "general padded", "general packed"])
def test_formulas_of_pairs_compile_in_one_graph(name, device):
    """A function in one may name only what is bound in every call: the compiler reads it all."""
    check(name, "compile", "reference", device)


@pytest.mark.kernel
@pytest.mark.parametrize("name", [name for name, row in table.ROWS.items() if row.module is None])
def test_a_cuda_graph_replays_forward_and_backward(name, device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    row = dataclasses.replace(table.ROWS[name], device=device)
    tensors = table.live(row, row.tensors("triton"))
    live = [x for x in tensors.values() if x.requires_grad]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def step():
        results = row.run("triton", tensors)
        cotangents = [torch.ones_like(x) for x in results]
        return [*results, *torch.autograd.grad(results, live, cotangents, materialize_grads=True)]

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernels
        step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        for x in live:
            x.mul_(0.5)
    graph.replay()
    assert all(x.isfinite().all() for x in replayed)
    if "dropout" not in name:
        for got, want in zip(replayed, step(), strict=True):
            torch.testing.assert_close(got, want)
