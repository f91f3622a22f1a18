"""Sizes that change under the compiler and the exporter, and sizes of 0."""

import dataclasses
import subprocess
import sys

import _compositions as table
import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fused_attn as f

ROWS = {name: row for name, row in table.ROWS.items() if row.columns is None}
PACKED = [name for name in ROWS if "packed" in name or name.startswith("hierarchical")]
PADDED = [name for name in ROWS if "padded" in name]
EVERY_DAY = ("location padded, all options", "concat packed", "general packed")  # by the kernel


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def lengths_compile_once(name, device, impl="auto"):
    row = dataclasses.replace(ROWS[name], device=device)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda t: row.run(impl, t), backend=graphs, fullgraph=True)
    for length in range(3, 15):
        tensors = row.tensors(impl, 2, length)
        for got, want in zip(compiled(tensors), row.run("reference", tensors), strict=True):
            torch.testing.assert_close(got, want)
    assert graphs.frame_count <= 3


WORDS = [name for name in ROWS if name.startswith("word")]


@pytest.mark.parametrize("name", WORDS)
def test_a_hypothesis_of_any_length_is_one_graph(name, device):
    lengths_compile_once(name, device)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in ROWS if name not in WORDS and "RNN" not in name])
def test_any_length_is_one_graph(name, device):
    lengths_compile_once(name, device)


@pytest.mark.kernel
@pytest.mark.parametrize("name", EVERY_DAY)
def test_any_length_is_one_graph_by_the_kernel(name, device):
    lengths_compile_once(name, device, "triton")


def exported(name, device, impl="auto"):
    """The program of a batch of three has the results of batches of other sizes."""
    row = dataclasses.replace(ROWS[name], device=device)
    module, tensors = table.Exported(row, impl), row.tensors(impl, 3, 5)
    auto = torch.export.Dim.AUTO
    other = row.tensors(impl, 4, 6)
    shapes = tuple(
        {i: auto for i, n in enumerate(x.shape) if other[name].shape[i] != n} for name, x in tensors.items()
    )
    program = torch.export.export(module, tuple(tensors.values()), dynamic_shapes=(shapes,)).module()
    for size in ((3, 5), (1, 5), (2, 7), (1, 2)):
        given = row.tensors(impl, *size)
        got = program(*given.values())
        got = [x for x in (got if isinstance(got, tuple) else (got,)) if x is not None]
        for x, want in zip(got, row.run("reference", given), strict=True):
            torch.testing.assert_close(x, want, msg=lambda text, size=size: f"{size}: {text}")


NO_KEYS = {
    "location": lambda x: f.location_attention(x, x.new_ones(4)),
    "location, weights": lambda x: f.location_attention(x, x.new_ones(4), return_weights=True)[1],
    "window": lambda x: f.location_attention(x, x.new_ones(4), window=(1, 0)),
    "concat": lambda x: f.concat_attention(x.new_ones(2, 3, 4), x, x, x.new_ones(4)),
    "distance": lambda x: f.distance_attention(x.new_ones(2, 3, 4), x, x, p=2),
    "general": lambda x: f.general_attention(x.new_ones(2, 3, 4), x),
    "general, weights": lambda x: f.general_attention(x.new_ones(2, 3, 4), x, return_weights=True)[0],
    "statistics": lambda x: torch.cat(f.statistics_pooling(x)),
    "target": lambda x: f.target_attention(x.new_ones(2, 4), x, x.new_ones(16, 3), None, x.new_ones(3)),
    "target, softmax": lambda x: f.target_attention(
        x.new_ones(2, 4), x, x.new_ones(16, 3), None, x.new_ones(3), softmax=True
    ),
    "words": lambda x: f.word_by_word_attention(
        x, x.new_ones(2, 3, 4), *x.new_ones(3, 4, 4), x.new_ones(4), x.new_ones(4, 4)
    ),
    "step": lambda x: f.location_aware_attention(
        x.new_ones(2, 4), x, x, x.new_ones(4), x[..., 0], x.new_ones(2, 3), x.new_ones(2, 4)
    )[0],
}


@pytest.mark.parametrize("name", NO_KEYS)
def test_an_exported_program_takes_no_keys(name):
    class Call(nn.Module):
        def forward(self, x):
            return NO_KEYS[name](x)

    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(Call(), (torch.randn(2, 5, 4),), dynamic_shapes=({1: dynamic},)).module()
    for length in (5, 3, 0):
        x = torch.randn(2, length, 4)
        torch.testing.assert_close(program(x), Call()(x))


# Of these a tensor has a row a sequence beside packed ones: a batch that PyTorch's exporter takes to be two at least.
BATCHES = (
    "location packed, all options",
    "concat, packed keys",
    "general, packed queries",
    "target packed",
    "location-aware packed",
    *WORDS,
)


@pytest.mark.parametrize("name", [name for name in PACKED if name not in BATCHES])
def test_a_packed_batch_exports_from_one_sequence_up(name, device):
    exported(name, device)


@pytest.mark.parametrize("name", PADDED)
def test_a_padded_batch_exports_from_one_sequence_up(name, device):
    exported(name, device)


@pytest.mark.kernel
@pytest.mark.parametrize("name", EVERY_DAY)
def test_a_batch_by_the_kernel_exports_from_one_sequence_up(name, device):
    exported(name, device, "triton")


@pytest.mark.kernel
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_a_saved_program_gives_the_same_numbers_in_a_fresh_process(impl, device, tmp_path):
    row = dataclasses.replace(table.ROWS["word by word packed"], device=device)
    tensors = row.tensors(impl)
    torch.export.save(
        torch.export.export(table.Exported(row, impl), tuple(tensors.values())), tmp_path / "program.pt2"
    )
    torch.save((tensors, row.run(impl, tensors)), tmp_path / "numbers.pt")
    code = (
        "import sys, torch, fused_attn\n"
        "tensors, want = torch.load(sys.argv[2])\n"
        "got = torch.export.load(sys.argv[1]).module()(*tensors.values())\n"
        "assert torch.equal(got, want[0])\n"
    )
    files = [str(tmp_path / name) for name in ("program.pt2", "numbers.pt")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, *files], check=True, timeout=300)


def test_gradients_in_a_dispatch_mode_are_the_same(device):
    """The bodies of some operators differentiate: in a mode, functorch is switched off there."""
    x = torch.randn(2, 5, 4, device=device, requires_grad=True)
    for loss in (
        lambda: f.general_attention(x, x).sin().sum(),
        lambda: f.location_attention(x, x[0, 0], window=(1, 1)).sin().sum(),
    ):
        want = torch.autograd.grad(loss(), x)
        with FlopCounterMode(display=False):
            got = torch.autograd.grad(loss(), x)
        torch.testing.assert_close(got, want)


# --- Batches of nothing ---------------------------------------------------------------------------------------------


def no_offsets(count):
    return torch.zeros(count, dtype=torch.int32)


def rnn():
    return f.RaggedRNN(nn.LSTM(4, 3, num_layers=2, bidirectional=True))


def h(*shape):
    return torch.randn(*shape, 4, requires_grad=True)


NOTHING = {
    "LocationAttention": [
        (lambda: f.LocationAttention(4, 3, gated=True, hops=2), lambda m, x: m(x), [h(0, 3)]),
        (lambda: f.LocationAttention(4), lambda m, x: m(x), [h(2, 0)]),
        (lambda: f.LocationAttention(4, 3), lambda m, x: m(x, cu_seqlens=no_offsets(1)), [h(0)]),
        (lambda: f.LocationAttention(4, 3), lambda m, x: m(x, cu_seqlens=no_offsets(3)), [h(0)]),
        (lambda: f.LocationAttention(4, 3), lambda m, x: m(x, window=(1, 1)), [h(0, 3)]),
        (lambda: f.LocationAttention(4, 3), lambda m, x: m(x, window=(1, 1)), [h(2, 0)]),
    ],
    "ConcatAttention": [
        (lambda: f.ConcatAttention(4, 4, 3, bias=True), lambda m, q, k: m(q, k), [h(0, 3), h(0, 2)]),
        (lambda: f.ConcatAttention(4, 4, 3, bias=True), lambda m, q, k: m(q, k), [h(2, 0), h(2, 3)]),
        (lambda: f.ConcatAttention(4, 4, 3, bias=True), lambda m, q, k: m(q, k), [h(2, 3), h(2, 0)]),
    ],
    "DistanceAttention": [
        (lambda: f.DistanceAttention(4, 4, 3, bias=True), lambda m, q, k: m(q, k), [h(0, 3), h(0, 2)]),
        (lambda: f.DistanceAttention(4, 4, 3, bias=True), lambda m, q, k: m(q, k), [h(2, 0), h(2, 3)]),
        (lambda: f.DistanceAttention(4, 4, 3, bias=True), lambda m, q, k: m(q, k), [h(2, 3), h(2, 0)]),
    ],
    "GeneralAttention": [
        (lambda: f.GeneralAttention(4), lambda m, q, k: m(q, k), [h(0, 3), h(0, 2)]),
        (lambda: f.GeneralAttention(4), lambda m, q, k: m(q, k), [h(2, 0), h(2, 3)]),
        (lambda: f.GeneralAttention(4), lambda m, q, k: m(q, k), [h(2, 3), h(2, 0)]),
        (
            lambda: f.GeneralAttention(4),
            lambda m, q, k: m(q, k, cu_seqlens_q=no_offsets(1), cu_seqlens_k=no_offsets(1)),
            [h(0), h(0)],
        ),
    ],
    "StatisticsPooling": [
        (lambda: f.StatisticsPooling(4, 3, per_channel=True, global_context=True), lambda m, x: m(x), [h(0, 3)]),
        (lambda: f.StatisticsPooling(4, 3, global_context=True), lambda m, x: m(x), [h(2, 0)]),
        (lambda: f.StatisticsPooling(4, 3), lambda m, x: m(x, cu_seqlens=no_offsets(1)), [h(0)]),
    ],
    "TargetAttention": [
        (lambda: f.TargetAttention(4, 3, 2), lambda m, q, k: m(q, k), [h(0), h(0, 3)]),
        (lambda: f.TargetAttention(4, 3, None, softmax=True), lambda m, q, k: m(q, k), [h(2), h(2, 0)]),
        (lambda: f.TargetAttention(4), lambda m, q, k: m(q, k, cu_seqlens=no_offsets(3)), [h(2), h(0)]),
    ],
    "GraphAttention": [
        (lambda: f.GraphAttention(4, 3), lambda m, x: m(x, torch.zeros(1).long(), torch.zeros(0).long()), [h(0)]),
        (lambda: f.GraphAttention(4, 3), lambda m, x: m(x, torch.zeros(3).long(), torch.zeros(0).long()), [h(2)]),
    ],
    "HierarchicalAttention": [
        (
            lambda o=o: f.HierarchicalAttention(
                4, 3, gated=True, **({"between": rnn(), "between_dim": 6} if o else {})
            ),
            lambda m, x, a=a: m(
                x, no_offsets(a), no_offsets(a) if a == 1 else torch.tensor([0, 2], dtype=torch.int32)
            ),
            [h(0)],
        )
        for o in (False, True)
        for a in (1, 3)
    ],
    "RaggedRNN": [(rnn, lambda m, x, n=n: m(x, no_offsets(n)), [h(0)]) for n in (1, 3)],
    "WordByWordAttention": [
        (lambda: f.WordByWordAttention(4, 4, 3), lambda m, p, q: m(p, q), [h(0, 3), h(0, 2)]),
        (lambda: f.WordByWordAttention(4, 4, 3), lambda m, p, q: m(p, q), [h(2, 3), h(2, 0)]),
        (lambda: f.WordByWordAttention(4, 4, 3), lambda m, p, q: m(p, q), [h(2, 0), h(2, 3)]),
        (
            lambda: f.WordByWordAttention(4, 4, 3),
            lambda m, p, q: m(p, q, cu_seqlens_premise=no_offsets(1), cu_seqlens_hypothesis=no_offsets(1)),
            [h(0), h(0)],
        ),
    ],
    "LocationAwareAttention": [
        (lambda: f.LocationAwareAttention(4, 4, 3), lambda m, q, k: m(q, k)[0], [h(0), h(0, 3)]),
        (lambda: f.LocationAwareAttention(4, 4, 3), lambda m, q, k: m(q, k)[0], [h(2), h(2, 0)]),
    ],
}


@pytest.mark.parametrize(
    ("make", "call", "inputs"),
    [pytest.param(*case, id=f"{name}-{i}") for name, cases in NOTHING.items() for i, case in enumerate(cases)],
)
def test_a_batch_of_nothing_gives_every_parameter_a_gradient(make, call, inputs):
    """Zeros, not None: on many devices each has to send its part of every gradient."""
    module = make()
    call(module, *inputs).sum().backward()
    missing = [name for name, x in [*module.named_parameters(), *enumerate(inputs)] if x.grad is None]
    assert not missing
    assert all(x.grad.isfinite().all() for x in module.parameters())


def test_every_module_meets_a_batch_of_nothing():
    modules = {
        name for name in f.__all__ if isinstance(getattr(f, name), type) and issubclass(getattr(f, name), nn.Module)
    }
    assert NOTHING.keys() == modules


# --- A recurrent layer ----------------------------------------------------------------------------------------------

LAYERS = {
    "GRU": lambda: nn.GRU(4, 3, bidirectional=True),
    "LSTM": lambda: nn.LSTM(4, 5, num_layers=2, proj_size=3, bidirectional=True),
    "RNN": lambda: nn.RNN(4, 3, num_layers=2, nonlinearity="relu", bias=False),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_a_recurrent_layer_compiles_where_pytorch_allows_it(make):
    module, rows = f.RaggedRNN(make().double()), torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    offsets, leaves = torch.tensor([0, 2, 2, 6], dtype=torch.int32), [rows, *module.parameters()]
    with torch._dynamo.config.patch(allow_rnn=True):
        got = torch.compile(module, backend="aot_eager", fullgraph=True)(rows, offsets)
    want = module(rows, offsets)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(x.sin().sum(), leaves) for x in (got, want)]
    torch.testing.assert_close(*grads)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="allow_rnn"):
        torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)(rows, offsets)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_a_recurrent_layer_has_all_derivatives_in_functorch(make):
    module, rows = f.RaggedRNN(make().double()), torch.randn(6, 4, dtype=torch.float64)
    offsets = torch.tensor([0, 2, 2, 6], dtype=torch.int32)

    def loss(x):
        return module(x, offsets).sin().sum()

    jacobian = torch.autograd.functional.jacobian(lambda x: module(x, offsets), rows)
    torch.testing.assert_close(torch.func.jacrev(lambda x: module(x, offsets))(rows), jacobian)
    torch.testing.assert_close(torch.func.jacfwd(lambda x: module(x, offsets))(rows), jacobian)
    hessian = torch.autograd.functional.hessian(loss, rows)
    torch.testing.assert_close(torch.func.hessian(loss)(rows), hessian)
    torch.testing.assert_close(torch.func.jacrev(torch.func.grad(loss))(rows), hessian)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_a_recurrent_layer_has_all_derivatives_in_a_graph(make):
    """The weights are live too, so that each graph holds a derivative of one order more than it gives."""
    module, rows = f.RaggedRNN(make().double()), torch.randn(6, 4, dtype=torch.float64)
    weight, offsets = next(module.parameters()), torch.tensor([0, 2, 2, 6], dtype=torch.int32)

    def loss(x):
        return module(x, offsets).sin().sum()

    def along(x):
        return torch.func.grad(loss)(x).sin().sum()

    for derivative in (torch.func.grad(loss), torch.func.grad(along), torch.func.jacrev(torch.func.grad(loss))):
        with torch._dynamo.config.patch(allow_rnn=True):
            got = torch.compile(derivative, backend="aot_eager", fullgraph=True)(rows)
        want = derivative(rows)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(x.cos().sum(), weight)[0] for x in (got, want)]
        torch.testing.assert_close(*grads)
        assert grads[0].norm() > 0


@pytest.mark.parametrize("bad", [[0, 2, 7], [0, 4, 2, 5], [-1, 2, 5], [0, 2, 4], []])
def test_a_recurrent_layer_refuses_offsets_that_are_none(bad):
    module, rows = f.RaggedRNN(nn.GRU(4, 3)), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"^offsets: expected"):
        module(rows, torch.tensor(bad, dtype=torch.int32))


def test_dropout_between_recurrent_layers_is_drawn_in_a_graph_too():
    module = f.RaggedRNN(nn.GRU(4, 8, num_layers=2, dropout=0.5))
    rows, offsets = torch.randn(50, 4, requires_grad=True), torch.tensor([0, 20, 50], dtype=torch.int32)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        torch.manual_seed(0)
        once = compiled(rows, offsets)
        grad = torch.autograd.grad(once.sum(), rows)[0]
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(rows, offsets), once)
        assert not torch.allclose(compiled(rows, offsets), once)
        step = torch.zeros_like(rows)
        step[3, 1] = 1e-2
        torch.manual_seed(0)
        up = compiled(rows + step, offsets).sum()
        torch.manual_seed(0)
        down = compiled(rows - step, offsets).sum()
    torch.testing.assert_close((up - down) / 2e-2, grad[3, 1], rtol=1e-2, atol=1e-3)


# --- Offsets that differ from sample to sample -------------------------------------------------------------------

CU = torch.tensor([[0, 2, 6], [0, 3, 6], [0, 6, 6]], dtype=torch.int32)
SOURCES = torch.tensor([[0, 1, 2], [5, 1, 0], [1, 1, 1]])
STARTS = torch.tensor([0, 1, 1, 2, 2, 2, 3])
ONE = torch.tensor([0, 2], dtype=torch.int32)
VARYING = {
    "location": (lambda x, cu, **o: f.location_attention(x, x[0], cu_seqlens=cu, **o), CU),
    "window": (lambda x, cu, **o: f.location_attention(x, x[0], cu_seqlens=cu, window=(1, 0), **o), CU),
    "concat": (lambda x, cu, **o: f.concat_attention(x, x, x, x[0], cu_seqlens_q=cu, cu_seqlens_k=cu, **o), CU),
    "general": (lambda x, cu, **o: f.general_attention(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu, **o), CU),
    "statistics": (lambda x, cu, **o: torch.cat(f.statistics_pooling(x, cu_seqlens=cu, **o)), CU),
    "target": (
        lambda x, cu, **o: f.target_attention(x[:2], x, x.repeat(3, 1)[:16], None, x[0], cu_seqlens=cu, **o),
        CU,
    ),
    "hierarchical": (
        lambda x, cu, **o: f.hierarchical_attention(x, cu, ONE.to(x.device), f.Score(x[0]), f.Score(x[1]), **o),
        CU,
    ),
    "words": (
        lambda x, cu, **o: f.word_by_word_attention(
            x, x, x[:4], x[:4], x[:4], x[0], x[:4], cu_seqlens_premise=cu, cu_seqlens_hypothesis=cu, **o
        ),
        CU,
    ),
    "step": (
        lambda x, cu, **o: torch.cat(
            [
                y.flatten()
                for y in f.location_aware_attention(x[:2], x, x, x[0], x[:, 0], x[:2, :3], x[2:4], cu_seqlens=cu, **o)
            ]
        ),
        CU,
    ),
    "graph": (lambda x, i, **o: f.graph_attention(x, x, x[0], STARTS.to(x.device), i, **o), SOURCES),
}


@pytest.mark.parametrize("impl", ["auto", "reference", pytest.param("triton", marks=pytest.mark.kernel)])
@pytest.mark.parametrize(("call", "numbers"), VARYING.values(), ids=VARYING.keys())
def test_vmap_takes_offsets_of_each_sample(call, numbers, impl, device):
    torch.manual_seed(0)
    x, numbers = torch.randn(3, 6, 4, device=device), numbers.to(device)

    def one(x, n):
        return call(x, n, impl=impl)

    def loss(x, n):
        return one(x, n).sin().sum()

    want = torch.stack([one(*sample) for sample in zip(x, numbers, strict=True)])
    torch.testing.assert_close(torch.func.vmap(one)(x, numbers), want)
    if impl == "auto":
        compiled = torch.compile(torch.func.vmap(one), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, numbers), want)
    want = torch.stack([torch.func.grad(loss)(*sample) for sample in zip(x, numbers, strict=True)])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x, numbers), want)
    if device.type == "cpu":
        wrong = numbers + torch.tensor([[0], [0], [1]], device=device) * 9
        with pytest.raises(ValueError, match=r"^(cu_seqlens\w*|inner_offsets|indices): expected non-.*; got \[\["):
            torch.func.vmap(one)(x, wrong.to(numbers.dtype))


def test_edges_of_each_sample_are_sorted_in_vmap():
    edges = torch.tensor([[[0, 1], [1, 2]], [[2, 2], [1, 0]]])
    got = torch.func.vmap(lambda e: f.csr_from_edges(e, 3))(edges)
    for each, *want in zip(got, *(f.csr_from_edges(e, 3) for e in edges), strict=True):
        assert torch.equal(each, torch.stack(want))
