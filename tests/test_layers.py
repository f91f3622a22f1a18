"""The layers inside the modules, whose weights are used without a call of the layer."""

import copy

import pytest
import torch
from _inputs import ROWS
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

LAYERS = [
    (name, path)
    for name, row in ROWS.items()
    if isinstance(row.make(), nn.Module)
    for path, layer in row.make().named_modules()
    if isinstance(layer, nn.Linear | nn.Conv1d)
]
each_layer = pytest.mark.parametrize(("name", "path"), LAYERS)


def inputs(name: str) -> dict:
    """Of the row, without what was projected before: then the layer that projects is used."""
    return {key: x for key, x in ROWS[name].arguments.items() if key != "projected"}


def value(result):
    return result[0] if isinstance(result, tuple) else result


def test_every_layer_of_every_module_is_here():
    assert len(LAYERS) > 25
    assert {name.split(",")[0] for name, _ in LAYERS} == {
        "LocationAttention",
        "StatisticsPooling",
        "TargetAttention",
        "ConcatAttention",
        "DistanceAttention",
        "GraphAttention",
        "HierarchicalAttention",
        "WordByWordAttention",
        "LocationAwareAttention",
    }


@each_layer
def test_a_weight_that_a_hook_sets_is_that_of_the_call(name, path):
    """`prune` makes the weight of another before each call: a step of the optimiser changes that one."""
    plain, pruned = ROWS[name].make(), ROWS[name].make()
    prune.identity(pruned.get_submodule(path), "weight")
    pruned(**inputs(name))
    with torch.no_grad():
        plain.get_submodule(path).weight.mul_(-3)
        pruned.get_submodule(path).weight_orig.mul_(-3)
    torch.testing.assert_close(value(pruned(**inputs(name))), value(plain(**inputs(name))))
    for _ in range(2):  # a graph of its own each time
        value(pruned(**inputs(name))).sum().backward()
    assert pruned.get_submodule(path).weight_orig.grad is not None


@each_layer
def test_a_normalised_weight_is_normalised(name, path):
    """By the old form, whose hook goes on with its estimate at each call in training, and by a parametrisation."""
    made = ROWS[name].make()
    old, new = copy.deepcopy(made).train(), copy.deepcopy(made).train()
    with torch.no_grad():
        for module in (old, new):
            module.get_submodule(path).weight.mul_(30)
    spectral_norm(old.get_submodule(path))
    parametrizations.spectral_norm(new.get_submodule(path))
    for _ in range(30):
        old(**inputs(name)), new(**inputs(name))
    for module in (old, new):
        weight = module.get_submodule(path).weight.flatten(1)
        torch.testing.assert_close(torch.linalg.matrix_norm(weight, 2), torch.tensor(1.0), rtol=1e-2, atol=0)


class Adapter(nn.Linear):
    """A layer with the weight of its class that computes something else, as adapters of low rank do."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return 2 * super().forward(x)


CALLED = ("context", "context_projs.0", "query_proj", "key_proj", "edge_proj", "inner.context", "outer.context")


@each_layer
def test_a_layer_that_computes_something_else_is_refused_where_it_is_not_called(name, path):
    module = ROWS[name].make()
    layer = module.get_submodule(path)
    if isinstance(layer, nn.Conv1d):
        other: nn.Module = nn.Sequential(layer)
    else:
        other = Adapter(layer.in_features, layer.out_features, layer.bias is not None)
        other.load_state_dict(layer.state_dict())
    module.set_submodule(path, other)
    if path in CALLED:
        module(**inputs(name))
        assert other.calls == 1
        return
    text = rf"^{path}: expected a torch.nn.(Linear|Conv1d), .*; got .*{type(other).__name__}"
    with pytest.raises(TypeError, match=text):
        module(**inputs(name))


CALLS = {"DistanceAttention"}  # each of its layers, and takes any


@pytest.mark.parametrize("name", sorted({name for name, _ in LAYERS} - CALLS))
def test_quantised_layers_are_refused_by_name(name):
    quantised = torch.ao.quantization.quantize_dynamic(ROWS[name].make(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(TypeError, match=r"^[a-z_.]+: expected a torch.nn.Linear, .*; got torch.ao.nn.quantized"):
        quantised(**inputs(name))


@pytest.mark.parametrize(("name", "path"), dict(reversed(LAYERS)).items())
def test_hooks_run_in_a_compiled_graph(name, path):
    torch.compiler.reset()  # a graph of a module without hooks would do: the compiler does not look at hooks again
    module = ROWS[name].make()
    prune.identity(module.get_submodule(path), "weight")
    compiled = torch.compile(module, backend="aot_eager")
    for _ in range(2):
        with torch.no_grad():
            module.get_submodule(path).weight_orig.mul_(-3)
        torch.testing.assert_close(value(compiled(**inputs(name))), value(module(**inputs(name))))
