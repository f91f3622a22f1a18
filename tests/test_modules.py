"""`LocationAttention`: parameters, shapes, what it hands to the function. What modules share with those of torch."""

import pytest
import torch
from torch import nn

import fused_attn
from fused_attn import LocationAttention, location_attention

DIM, ATTN_DIM, HOPS = 6, 5, 3
# arguments -> parameters, and whether the output has a hop axis
FORMS = {
    "linear": ({}, {"proj.weight": (1, DIM), "proj.bias": (1,)}, False),
    "linear hops": ({"hops": HOPS}, {"proj.weight": (HOPS, DIM), "proj.bias": (HOPS,)}, True),
    "mlp": (
        {"attn_dim": ATTN_DIM},
        {"proj.weight": (ATTN_DIM, DIM), "proj.bias": (ATTN_DIM,), "score.weight": (1, ATTN_DIM)},
        False,
    ),
    "mlp hops": (
        {"attn_dim": ATTN_DIM, "hops": HOPS},
        {"proj.weight": (ATTN_DIM, DIM), "proj.bias": (ATTN_DIM,), "score.weight": (HOPS, ATTN_DIM)},
        True,
    ),
    "gated": (
        {"attn_dim": ATTN_DIM, "gated": True},
        {
            "proj.weight": (ATTN_DIM, DIM),
            "proj.bias": (ATTN_DIM,),
            "gate.weight": (ATTN_DIM, DIM),
            "gate.bias": (ATTN_DIM,),
            "score.weight": (1, ATTN_DIM),
        },
        False,
    ),
    "gated without biases": (
        {"attn_dim": ATTN_DIM, "gated": True, "bias": False},
        {"proj.weight": (ATTN_DIM, DIM), "gate.weight": (ATTN_DIM, DIM), "score.weight": (1, ATTN_DIM)},
        False,
    ),
    "linear with a context": (
        {"context_dim": 4},
        {"proj.weight": (1, DIM), "proj.bias": (1,), "context.weight": (1, 4)},
        False,
    ),
    "linear hops with a context": (
        {"hops": HOPS, "context_dim": 4},
        {"proj.weight": (HOPS, DIM), "proj.bias": (HOPS,), "context.weight": (HOPS, 4)},
        True,
    ),
    "one hop with an axis": ({"hops": 1}, {"proj.weight": (1, DIM), "proj.bias": (1,)}, True),
    "mlp with a context": (
        {"attn_dim": ATTN_DIM, "context_dim": 4},
        {
            "proj.weight": (ATTN_DIM, DIM),
            "proj.bias": (ATTN_DIM,),
            "score.weight": (1, ATTN_DIM),
            "context.weight": (ATTN_DIM, 4),
        },
        False,
    ),
}
each_form = pytest.mark.parametrize(("arguments", "parameters", "hop_axis"), FORMS.values(), ids=FORMS.keys())


@each_form
def test_parameters_have_the_names_and_shapes(arguments, parameters, hop_axis):
    state = LocationAttention(DIM, **arguments).state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == parameters


@each_form
def test_parameters_are_initialised_as_linear_layers_are(arguments, parameters, hop_axis):
    torch.manual_seed(0)
    module = LocationAttention(DIM, **arguments)
    torch.manual_seed(0)
    for name in ("proj", "gate", "score", "context"):  # in the order of the constructor
        if f"{name}.weight" in parameters:
            rows, columns = parameters[f"{name}.weight"]
            layer = nn.Linear(columns, rows, bias=f"{name}.bias" in parameters)
            for theirs, ours in zip(layer.parameters(), getattr(module, name).parameters(), strict=True):
                assert torch.equal(ours, theirs), name


@each_form
def test_shapes_are_those_of_the_form(arguments, parameters, hop_axis, device):
    module = LocationAttention(DIM, **arguments).to(device)
    hops = (arguments.get("hops", 1),) if hop_axis else ()
    needs_context = "context_dim" in arguments
    h, context = torch.randn(2, 7, DIM, device=device), torch.randn(2, 4, device=device) if needs_context else None
    out, weights = module(h, context=context, return_weights=True)
    assert out.shape == (2, *hops, DIM)
    assert weights.shape == (2, *hops, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    if needs_context:
        by_row = context[:, None].expand(2, 7, 4)
        torch.testing.assert_close(module(h, context=by_row), out)

    offsets = torch.tensor([0, 3, 3, 7], dtype=torch.int32, device=device)
    context = torch.randn(3, 4, device=device) if needs_context else None
    out, weights = module(h[0], context=context, cu_seqlens=offsets, return_weights=True)
    assert out.shape == (3, *hops, DIM)
    assert weights.shape == (7, *hops)


def test_forward_is_the_function_on_the_parameters(device):
    module = LocationAttention(
        DIM, ATTN_DIM, hops=HOPS, gated=True, activation="relu", gate_activation="tanh", context_dim=4
    ).to(device)
    h, context = torch.randn(2, 7, DIM, device=device), torch.randn(2, 4, device=device)
    value, score_bias = torch.randn(2, 7, 2, device=device), torch.randn(2, 7, device=device)
    mask = torch.rand(2, 7, device=device) < 0.7
    got = module(h, context=context, value=value, mask=mask, score_bias=score_bias, return_weights=True)
    p = dict(module.named_parameters())
    want = location_attention(
        h,
        p["proj.weight"].T,
        p["proj.bias"],
        p["score.weight"].T,
        gate=(p["gate.weight"].T, p["gate.bias"]),
        context=context @ p["context.weight"].T,
        value=value,
        activation="relu",
        gate_activation="tanh",
        mask=mask,
        score_bias=score_bias,
        return_weights=True,
    )
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


@each_form
def test_every_parameter_gets_a_gradient(arguments, parameters, hop_axis, device):
    module = LocationAttention(DIM, **arguments).to(device)
    context = torch.randn(2, 7, 4, device=device) if "context_dim" in arguments else None
    module(torch.randn(2, 7, DIM, device=device), context=context).square().sum().backward()
    for name, x in module.named_parameters():
        assert x.grad is not None, name
        assert x.grad.count_nonzero() > 0, name


def test_dropout_is_for_training_only(device):
    module = LocationAttention(DIM, ATTN_DIM, dropout=0.5).to(device)
    h = torch.randn(2, 7, DIM, device=device)
    assert not torch.equal(module(h), module(h))
    module.eval()
    assert torch.equal(module(h), module(h))
    plain = LocationAttention(DIM, ATTN_DIM).to(device)
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module(h), plain(h))


def test_context_and_context_dim_go_together():
    h, context = torch.randn(2, 7, DIM), torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"^context: expected None, since context_dim is None; got a tensor"):
        LocationAttention(DIM)(h, context=context)
    with pytest.raises(ValueError, match=r"^context: expected a tensor, by context_dim; got None"):
        LocationAttention(DIM, context_dim=4)(h)


def test_repr_shows_the_options():
    shown = repr(LocationAttention(DIM, ATTN_DIM, hops=2, activation="relu", dropout=0.25))
    assert "hops=2, activation='relu', dropout=0.25" in shown
    assert f"in_features={DIM}, out_features={ATTN_DIM}" in shown
    assert "gate_activation='silu'" in repr(LocationAttention(DIM, ATTN_DIM, gated=True, gate_activation="silu"))


# --- What every module has, as those of torch have it --------------------------------------------------------------

MODULES = {
    "location": lambda **made: fused_attn.LocationAttention(4, 3, hops=2, gated=True, context_dim=5, **made),
    "distance": lambda **made: fused_attn.DistanceAttention(4, 5, 3, num_heads=2, bias=True, **made),
    "concat": lambda **made: fused_attn.ConcatAttention(4, 5, 3, context_dims=(2,), num_heads=2, bias=True, **made),
    "general": lambda **made: fused_attn.GeneralAttention(4, 5, num_heads=2, **made),
    "hierarchical": lambda **made: fused_attn.HierarchicalAttention(4, 3, gated=True, inner_context_dim=2, **made),
    "word by word": lambda **made: fused_attn.WordByWordAttention(4, 5, 3, **made),
    "location-aware": lambda **made: fused_attn.LocationAwareAttention(4, 5, 3, channels=2, width=3, **made),
    "statistics": lambda **made: fused_attn.StatisticsPooling(4, 3, global_context=True, **made),
    "target": lambda **made: fused_attn.TargetAttention(4, 3, 2, **made),
    "graph": lambda **made: fused_attn.GraphAttention(4, 3, edge_dim=2, **made),
    "graph, shared": lambda **made: fused_attn.GraphAttention(4, 3, share_weights=True, bias=False, **made),
}
each_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())


@each_module
def test_parameters_are_made_on_a_device_and_of_a_dtype(make):
    module = make(device="meta", dtype=torch.bfloat16)
    assert {(x.device.type, x.dtype) for x in module.parameters()} == {("meta", torch.bfloat16)}
    assert {(x.device.type, x.dtype) for x in make(device=torch.device("cpu")).parameters()} == {
        ("cpu", torch.float32)
    }


@each_module
def test_reset_parameters_draws_as_the_constructor_does(make):
    torch.manual_seed(3)
    module = make()
    first = {name: x.clone() for name, x in module.state_dict().items()}
    torch.manual_seed(3)
    later = make(device="meta").to_empty(device="cpu")
    later.reset_parameters()
    for name, x in later.state_dict().items():
        assert torch.equal(x, first[name]), name
    later.reset_parameters()
    assert not all(torch.equal(x, first[name]) for name, x in later.state_dict().items())


@each_module
@pytest.mark.parametrize(
    "bad", [{"dtype": torch.int64}, {"dtype": "float32"}, {"device": "nowhere"}, {"device": 1.5}]
)
def test_a_bad_device_or_dtype_is_named(make, bad):
    with pytest.raises((TypeError, ValueError), match=rf"^{next(iter(bad))}: expected .*; got "):
        make(**bad)


def test_every_module_is_in_the_table():
    made = {type(make()).__name__ for make in MODULES.values()}
    public = {name for name in fused_attn.__all__ if isinstance(getattr(fused_attn, name), type)}
    assert public - made == {"Graph", "HierarchicalOutput", "RaggedRNN", "Score", "Segments", "State"}
