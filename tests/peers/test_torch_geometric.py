"""`fused_attn.compat.torch_geometric` beside PyTorch Geometric itself."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import _peer
import pytest
import torch
from _peer import Case, alone, close, library_runs, pair_of
from torch import nn

_peer.need("torch_geometric")
import torch_geometric.nn as pyg  # noqa: E402
from torch_geometric import EdgeIndex  # noqa: E402
from torch_geometric.utils import to_torch_csc_tensor  # noqa: E402

from fused_attn.compat import _peers, replace_attention  # noqa: E402
from fused_attn.compat import torch_geometric as ours  # noqa: E402

HERE = Path(__file__).parent


def graph(width=6, features=None, edges=40, nodes=12):
    """Nodes, edges (a few from a node to itself; some nodes have none that lead to it) and features of edges."""
    edge_index = torch.randint(nodes, (2, edges))
    edge_index[1] = edge_index[1].clamp(max=nodes - 3)
    edge_index[:, :3] = edge_index[:1, :3]
    more = () if features is None else (torch.randn(edges, features) if features else torch.randn(edges),)
    return torch.randn(nodes, width), edge_index, *more


def bipartite(sources=12, targets=7, features=None):
    edge_index = torch.stack([torch.randint(sources, (30,)), torch.randint(targets - 1, (30,))])
    more = () if features is None else (torch.randn(30, features),)
    return (torch.randn(sources, 6), torch.randn(targets, 5)), edge_index, *more


class Weights(nn.Module):
    """A layer that is asked for its weights."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *inputs):
        return self.layer(*inputs, return_attention_weights=True)


def conv(*arguments, inputs=graph, weights=False, **options):
    def make():
        layer = pyg.GATv2Conv(*arguments, **options)
        return Weights(layer) if weights else layer

    return Case(make, inputs, pyg.GATv2Conv)


def gat(**options):
    return Case(lambda: pyg.models.GAT(6, 8, 2, 3, v2=True, heads=2, **options), graph, pyg.GATv2Conv)


GRAPHS = {
    "plain": conv(6, 4, heads=2),
    "no self loops": conv(6, 4, heads=2, add_self_loops=False),
    "weights": conv(6, 4, heads=2, weights=True),
    "weights, no self loops": conv(6, 4, add_self_loops=False, weights=True),
    "mean, residual, slope": conv(6, 4, heads=3, concat=False, residual=True, negative_slope=0.1),
    "shared, no bias": conv(6, 4, heads=2, share_weights=True, bias=False),
    "features": conv(6, 4, heads=2, edge_dim=3, inputs=lambda: graph(features=3), weights=True),
    "features, none given": conv(6, 4, heads=2, edge_dim=3, add_self_loops=False, fill_value="add"),
    "features of one number": conv(6, 4, edge_dim=1, fill_value="max", inputs=lambda: graph(features=0)),
    "features, fill number": conv(6, 4, edge_dim=3, fill_value=0.5, inputs=lambda: graph(features=3)),
    "features, fill tensor": conv(6, 4, edge_dim=3, fill_value=torch.ones(3), inputs=lambda: graph(features=3)),
    "features, fill mul": conv(6, 4, edge_dim=3, fill_value="mul", inputs=lambda: graph(features=3)),
    "bipartite": conv((6, 5), 4, heads=2, inputs=bipartite, weights=True),
    "bipartite, more targets": conv((6, 5), 4, inputs=lambda: bipartite(7, 12), weights=True),
    "bipartite, residual, no self loops": conv((6, 5), 4, residual=True, add_self_loops=False, inputs=bipartite),
    "bipartite, features": conv((6, 5), 4, edge_dim=2, inputs=lambda: bipartite(features=2), weights=True),
    "no edges": conv(6, 4, add_self_loops=False, inputs=lambda: graph(edges=3)),
    "dropout 0": conv(6, 4, heads=2, dropout=0.0),
    "model": gat(),
    "model, jk and norm": gat(jk="cat", norm="layer"),
}
del GRAPHS["features, none given"]  # its lin_edge has no gradient in the library either


def sets(width=6, rows=20, ordered=False):
    """Rows of 9 sets, of which the last and others are empty."""
    index = torch.randint(7, (rows,))
    return torch.randn(rows, width), index.sort().values if ordered else index, None, 9


def by_ptr(width=6):
    return torch.randn(10, width), None, torch.tensor([0, 3, 3, 8, 10]), 4


def two_layers(act=nn.Tanh, bias=True, linear=nn.Linear):
    return nn.Sequential(linear(6, 5, bias=bias), act(), linear(5, 1, bias=bias))


def attentional(gate, net=lambda: None, inputs=sets):
    return Case(lambda: pyg.AttentionalAggregation(gate(), net()), inputs, pyg.AttentionalAggregation)


def softmax(inputs=sets, **options):
    return Case(lambda: pyg.SoftmaxAggregation(**options), inputs, pyg.SoftmaxAggregation)


class Pool(nn.Module):
    """Convolution whose messages go through an aggregation."""

    def __init__(self):
        super().__init__()
        self.layer = pyg.SAGEConv(6, 4, aggr=pyg.SoftmaxAggregation(learn=True, channels=6))

    def forward(self, x, edge_index):
        return self.layer(x, edge_index)


POOLS = {
    "gate to read": attentional(two_layers),
    "gate to read, nn": attentional(two_layers, lambda: nn.Linear(6, 3)),
    "gate to read, no bias": attentional(lambda: two_layers(nn.ReLU, bias=False), inputs=lambda: sets(ordered=True)),
    "gate to read, of PyG's linear": attentional(lambda: two_layers(nn.SiLU, linear=pyg.Linear), inputs=by_ptr),
    "gate of one layer": attentional(lambda: nn.Linear(6, 1), inputs=by_ptr),
    "gate of an MLP": attentional(lambda: pyg.MLP([6, 8, 1], norm="layer_norm"), lambda: pyg.MLP([6, 4])),
    "gate a channel": attentional(lambda: nn.Linear(6, 6), inputs=lambda: sets(ordered=True)),
    "gate a channel, of one value": attentional(lambda: nn.Linear(6, 4), lambda: nn.Linear(6, 1)),
    "no rows": attentional(two_layers, inputs=lambda: sets(rows=0)),
    "softmax": softmax(),
    "softmax, t": softmax(t=0.3, inputs=lambda: sets(ordered=True)),
    "softmax, learn": softmax(learn=True, inputs=by_ptr),
    "softmax, channels": softmax(learn=True, channels=6),
    "softmax, semi_grad": softmax(t=2.0, semi_grad=True),
    "in a convolution": Case(Pool, graph, pyg.SoftmaxAggregation),
}
CASES = {**GRAPHS, **POOLS}


@pytest.mark.whole
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@_peer.table(CASES)
def test_outputs_and_gradients(case, dtype, training):
    _peer.check_same(case, dtype, training)


@pytest.mark.whole
@_peer.table(
    {name: case for name, case in CASES.items() if name not in ("softmax", "softmax, t", "softmax, semi_grad")}
)
def test_five_steps(case):
    _peer.check_steps(case)


@pytest.mark.whole
@_peer.table(CASES)
def test_checkpoints(case):
    _peer.check_state(case)


@pytest.mark.whole
@_peer.table(CASES)
def test_pickled_copied_and_restored(case):
    _peer.check_copies(case)


@pytest.mark.whole
@_peer.table(
    {name: CASES[name] for name in ("no self loops", "model", "gate to read", "gate a channel", "softmax, learn")}
)
def test_compiled(case):
    """With self loops there are more graphs than the library's, whose own are several too."""
    _peer.check_compiles(case, as_few_graphs=case is not CASES["model"])


def test_the_list_is_the_registry():
    assert [row.name for row in _peers.known("torch_geometric")] == [
        row[0].__name__ for row in _peers.registry("torch_geometric").values()
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@_peer.table({name: CASES[name] for name in ("features", "gate to read", "gate a channel", "softmax, learn")})
def test_autocast_is_the_librarys(case, dtype):
    theirs, replaced, inputs = pair_of(case)
    with torch.autocast("cpu", dtype):
        want = theirs(*inputs)
        with alone(case.peer):
            got = replaced(*inputs)
    for a, b in zip(*(_peer.tree_leaves(x) for x in (got, want)), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_dropout_in_training_is_the_librarys():
    case = conv(6, 4, heads=2, dropout=0.5, weights=True)
    theirs, replaced, inputs = pair_of(case)
    torch.manual_seed(1)
    want = theirs(*inputs)
    torch.manual_seed(1)
    with library_runs(case.peer):
        close(replaced(*inputs), want)
    want = theirs.eval()(*inputs)
    with alone(case.peer):
        close(replaced.eval()(*inputs), want)


def explained(layer, x, edge_index):
    layer.explain = True
    layer._edge_mask, layer._loop_mask = torch.ones(edge_index.shape[1]), edge_index[0] != edge_index[1]
    return x, edge_index


def hooked(layer, x, edge_index):
    layer.register_message_forward_hook(lambda module, arguments, out: 2 * out)
    return x, edge_index


def hooked_sum(layer, x, edge_index):
    layer.aggr_module.register_forward_hook(lambda module, arguments, out: 2 * out)
    return x, edge_index


def by_hand(layer, x, edge_index):
    layer.message = lambda x_j, alpha: x_j
    return x, edge_index


OTHERS = {
    "torch.sparse": lambda layer, x, edge_index: (x, to_torch_csc_tensor(edge_index, size=(12, 12)).t()),
    "EdgeIndex": lambda layer, x, edge_index: (x, EdgeIndex(edge_index, sparse_size=(12, 12))),
    "int32": lambda layer, x, edge_index: (x, EdgeIndex(edge_index.int(), sparse_size=(12, 12))),
    "explained": explained,
    "hook of messages": hooked,
    "hook of the sum": hooked_sum,
    "message by hand": by_hand,
}


@pytest.mark.parametrize("other", [pytest.param(other, id=name) for name, other in OTHERS.items()])
def test_what_is_no_plain_call_is_the_librarys(other):
    theirs, replaced, inputs = pair_of(conv(6, 4, heads=2, add_self_loops=False), training=False)
    with library_runs(pyg.GATv2Conv):
        got = replaced(*other(replaced, *inputs))
    close(got, theirs(*other(theirs, *inputs)))


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ((torch.randn(2, 5, 6), torch.tensor([0, 1, 1, 0, 1]), None, 3, -2), {}),
        ((torch.randn(5, 6), torch.tensor([0, 1, 1, 0, 1, 1]), None, 3, -1), {}),
        ((torch.randn(5, 6), torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 2, 5])), {}),
    ],
    ids=["a batch of sets", "another dimension", "index and ptr"],
)
@pytest.mark.parametrize("make", [pyg.SoftmaxAggregation, lambda: pyg.AttentionalAggregation(nn.Identity())])
def test_other_sets_are_the_librarys(make, inputs, options):
    theirs = make()
    replaced = copy.deepcopy(theirs)
    replace_attention(replaced, cpu="always")
    with library_runs(type(theirs)):
        close(replaced(*inputs), theirs(*inputs))


def test_errors_of_sets_are_of_the_same_type():
    x, index = torch.randn(5, 6), torch.tensor([0, 1, 1, 0, 2])
    replaced = pyg.SoftmaxAggregation()
    replace_attention(replaced, cpu="always")
    for inputs in ((x, index, None, 2), (x, -index, None, 3)):
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            pyg.SoftmaxAggregation()(*inputs)
        with pytest.raises(ValueError, match=r"index|dim_size"):
            replaced(*inputs)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"flow": "target_to_source"}, "flow='target_to_source': only source_to_target"),
        ({"aggr": "mean"}, "aggr='mean': only sum is there"),
        ({"decomposed_layers": 2}, "decomposed_layers=2"),
    ],
    ids=str,
)
def test_layers_that_are_skipped_say_why(options, why):
    report = replace_attention(pyg.GATv2Conv(6, 4, **options))
    assert [row.why.startswith(why) for row in report.skipped] == [True]


def test_hooks_and_adapters_of_a_gate_are_called():
    """They may come after the replacement: the gate is then called, and ours pools."""
    theirs, replaced, inputs = pair_of(POOLS["gate to read"])
    called = []
    replaced.gate_nn[0].register_forward_hook(lambda *_: called.append(1))
    want = theirs(*inputs)
    with alone(pyg.AttentionalAggregation):
        close(replaced(*inputs), want)
    assert called == [1]

    class Adapter(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for module in (theirs, replaced):
        adapter = Adapter(6, 5)
        adapter.load_state_dict(theirs.gate_nn[0].state_dict())
        module.gate_nn[0] = adapter
    want = theirs(*inputs)
    with alone(pyg.AttentionalAggregation):
        close(replaced(*inputs), want)


def test_parametrised_gates_are_read(monkeypatch):
    theirs, replaced, inputs = pair_of(POOLS["gate to read"])
    for module in (theirs, replaced):
        nn.utils.parametrizations.weight_norm(module.gate_nn[0])
    called = []
    read = ours.location_attention
    monkeypatch.setattr(ours, "location_attention", lambda *a, **k: called.append(1) or read(*a, **k))
    close(replaced(*inputs), theirs(*inputs))
    assert called == [1]


def test_lazy_layers_are_made_by_the_first_call():
    torch.manual_seed(0)
    layer = ours.GATv2Conv(-1, 4)
    layer.fused_attn_cpu = "always"
    with alone(pyg.GATv2Conv):
        assert layer(*graph()).shape == (12, 4)
    gate = ours.AttentionalAggregation(nn.Sequential(pyg.Linear(-1, 5), nn.Tanh(), pyg.Linear(5, 1)))
    gate.fused_attn_cpu = "always"
    with alone(pyg.AttentionalAggregation):
        assert gate(*sets()).shape == gate(*sets()).shape == (9, 6)


def test_a_new_layer_of_ours_is_the_librarys():
    torch.manual_seed(0)
    layer = ours.GATv2Conv(6, 4, heads=2)
    torch.manual_seed(0)
    theirs = pyg.GATv2Conv(6, 4, heads=2)
    theirs.load_state_dict(layer.state_dict(), strict=True)
    layer.fused_attn_cpu = "always"
    inputs = graph()
    want = theirs(*inputs)
    with alone(pyg.GATv2Conv):
        close(layer(*inputs), want)
    with library_runs(pyg.GATv2Conv):
        close(layer(inputs[0], EdgeIndex(inputs[1], sparse_size=(12, 12))), want)


def test_structures_are_made_once(monkeypatch):
    _, replaced, inputs = pair_of(POOLS["softmax"])
    made = []
    monkeypatch.setattr(ours, "check_indices", lambda *_: made.append(1))
    want = replaced(*inputs)
    replaced(*inputs)
    assert made == [1]
    inputs[1].copy_(inputs[1].flip(0))  # written to: made anew
    assert not torch.allclose(replaced(*inputs), want)
    assert made == [1, 1]
    before = len(ours._MADE)
    del inputs
    assert len(ours._MADE) == before - 1


def test_the_command_reports_a_model_of_the_library(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch_geometric.nn as pyg\nmake = lambda: pyg.models.GAT(6, 8, 2, 3, v2=True)\n"
    )
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "fused_attn.compat", "mine:make"]
    run = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, check=True, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout.startswith("replaced: 2")


def test_the_librarys_own_tests():
    files = ["conv/test_gatv2_conv.py", "aggr/test_attention.py", "aggr/test_basic.py"]
    _peer.check_upstream("torch_geometric", "pytorch_geometric/test/nn", files)
