"""What nobody sees changes nothing: NaN and infinity behind a mask, past a window, in sequences that see nothing."""

import pytest
import torch
from _compare import Result, assert_close
from _location import Case, offsets, table

from fused_attn import HierarchicalAttention, LocationAttention, RaggedRNN, location_attention

FILLS = (torch.nan, torch.inf, -torch.inf)


def parameters_of(module: torch.nn.Module, out: torch.Tensor, inputs: dict[str, torch.Tensor]) -> Result:
    """The output, and the gradients of a fixed projection of it: of every input and every parameter."""
    named = dict(module.named_parameters()) | {n: x for n, x in inputs.items() if x.requires_grad}
    rng = torch.Generator().manual_seed(3)
    dout = torch.randn(out.shape, generator=rng).to(out)
    grads = torch.autograd.grad(out, list(named.values()), dout, materialize_grads=True)
    return Result({"output": out.detach()}, dict(zip(named, grads, strict=True)))


def leaves(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: x.detach().clone().requires_grad_(x.is_floating_point()) for n, x in tensors.items()}


MODULES = {
    "linear": {},
    "linear, hops": {"hops": 3},
    "mlp": {"attn_dim": 5},
    "mlp, hops": {"attn_dim": 5, "hops": 2},
    "gated": {"attn_dim": 5, "gated": True},
    "gated, relu": {"attn_dim": 5, "gated": True, "activation": "relu", "gate_activation": "gelu"},
    "identity, no bias": {"attn_dim": 5, "activation": "identity", "bias": False},
}


@table(
    "module,ragged,context,fill",
    MODULES,
    (False, True),
    ("sequence", "row"),
    FILLS,
    of_kernel=7,
    torch_paths=["reference"],
)
def test_hidden_rows_change_no_gradient_of_the_module(module, ragged, context, fill, impl, device):
    """Rows behind the mask, and the context of a sequence that is all behind it or has no row."""
    torch.manual_seed(0)
    module = LocationAttention(6, context_dim=3, **MODULES[module]).to(device)
    lengths = [5, 0, 5, 5]
    lead = (15,) if ragged else (3, 5)
    mask = torch.tensor([1, 1, 0, 1, 0] + [0] * 5 + [1] * 5, dtype=torch.bool, device=device).view(lead)
    entries = lead if context == "row" else (len(lengths),) if ragged else (3,)
    tensors = {
        "h": torch.randn(*lead, 6),
        "value": torch.randn(*lead, 2),
        "score_bias": torch.randn(lead),
        "context": torch.randn(*entries, 3),
    }
    tensors = {n: x.to(device) for n, x in tensors.items()}
    unread = (
        ~mask
        if context == "row"
        else torch.tensor([0, 1, 1, 0] if ragged else [0, 1, 0], dtype=torch.bool).to(device)
    )
    extra = {"cu_seqlens": offsets(lengths, device)} if ragged else {}
    if ragged and context == "sequence":
        tensors["context"] = tensors["context"][:, None]
    elif ragged:
        tensors["context"] = tensors["context"][None]

    def run(tensors):
        tensors = leaves(tensors)
        return parameters_of(module, module(**tensors, **extra, mask=mask, impl=impl), tensors)

    clean = run({n: x.clone() for n, x in tensors.items()})
    for name in ("h", "value", "score_bias"):
        tensors[name][~mask] = fill
    context = tensors["context"][0] if ragged and context == "row" else tensors["context"]
    context[unread] = fill
    assert_close(run(tensors), clean)


@table("gated,between,fill", (False, True), (None, "linear", "gru"), FILLS, of_kernel=4, torch_paths=["reference"])
def test_hidden_rows_change_no_gradient_of_the_hierarchical_module(gated, between, fill, impl, device):
    torch.manual_seed(0)
    layer = None
    if between == "linear":
        linear = torch.nn.Linear(6, 4).to(device)

        def layer(x, offsets):
            return linear(x)
    elif between == "gru":
        layer = RaggedRNN(torch.nn.GRU(6, 4))
    module = HierarchicalAttention(
        6,
        5,
        3,
        gated=gated,
        inner_context_dim=2,
        outer_context_dim=2,
        between=layer,
        between_dim=None if layer is None else 4,
    ).to(device)
    inner, outer = offsets([3, 0, 2, 4, 2], device), offsets([3, 0, 1, 1], device)
    mask = torch.tensor(
        [1, 0, 1, 0, 0, 1, 1, 0, 1, 0, 0], dtype=torch.bool, device=device
    )  # all of two segments, a group
    tensors = {"h": torch.randn(11, 6), "inner_context": torch.randn(5, 2), "outer_context": torch.randn(4, 2)}
    tensors = {n: x.to(device) for n, x in tensors.items()}

    def run(tensors):
        tensors = leaves(tensors)
        out = module(
            tensors["h"],
            inner,
            outer,
            mask=mask,
            impl=impl,
            **{n: x[:, None] for n, x in tensors.items() if n != "h"},
        )
        return parameters_of(module, out, tensors)

    clean = run({n: x.clone() for n, x in tensors.items()})
    tensors["h"][~mask] = fill
    tensors["inner_context"][[1, 2, 4]] = fill
    tensors["outer_context"][[1, 3]] = fill
    assert_close(run(tensors), clean)


# --- Past a window -----------------------------------------------------------------------------------------------


def seen_from(window, rows: int, of: int, device: torch.device) -> torch.Tensor:
    """Which positions see row `of`."""
    i = torch.arange(rows, device=device)
    left, right = window
    return (True if left is None else i - left <= of) & (True if right is None else of <= i + right) & (i >= 0)


WINDOWS = ((None, 0), (None, 2), (None, -1), (0, None), (1, None), (2, 1), (0, 0))
EVERY = [
    (impl, window, name, ragged, dropout_p)
    for impl in ("blocked", "reference")
    for window in WINDOWS
    for name in ("h", "value", "score_bias", "context")
    for ragged in (False, True)
    for dropout_p in (0.0, 0.3)
]
KERNEL = [  # in the interpreter, where each takes seconds
    ("triton", (None, 0), "h", False, 0.0),
    ("triton", (None, -1), "value", True, 0.0),
    ("triton", (1, None), "h", True, 0.0),
    ("triton", (0, None), "context", False, 0.0),
    ("triton", (2, 1), "value", False, 0.3),
    ("triton", (0, 0), "h", False, 0.0),
    ("triton", (None, 2), "score_bias", False, 0.3),
]


@pytest.mark.parametrize(
    ("impl", "window", "name", "ragged", "dropout_p"),
    [*EVERY, *(pytest.param(*x, marks=pytest.mark.kernel) for x in KERNEL)],
)
def test_a_row_of_nan_reaches_only_those_who_see_it(impl, window, name, ragged, dropout_p, device):
    """Their outputs are NaN; where nothing comes back to those, no gradient knows of the row, parameters' too."""
    if impl == "blocked" and device.type != "cpu":
        pytest.skip("auto is the kernel on a GPU")
    rows, at = 18, 11
    case = Case(
        rows=rows,
        batch=2,
        dim=3,
        attn_dim=2,
        hops=2,
        score="gated_hops",
        context="row",
        value=3,
        score_bias=True,
        ragged=False,
        dropout_p=dropout_p,
    )
    tensors = case.tensors(device)
    if ragged:
        tensors = {n: x.flatten(0, 1) if x.shape[:2] == (2, rows) else x for n, x in tensors.items()}
        tensors["context"] = tensors["context"][None]
        tensors["cu_seqlens"] = offsets([rows, rows], device)
    gate = (tensors.pop("gate_w"), tensors.pop("gate_b"))

    def run(tensors, blind):
        tensors = {n: x.detach().clone().requires_grad_(x.is_floating_point()) for n, x in tensors.items()}
        torch.manual_seed(7)
        gates = tuple(x.detach().clone().requires_grad_() for x in gate)
        out = location_attention(
            **tensors, gate=gates, window=window, dropout_p=dropout_p, impl={"blocked": "auto"}.get(impl, impl)
        )
        out = out.view(2, rows, 2, 3)
        named = {n: x for n, x in tensors.items() if x.requires_grad} | dict(
            zip(("gate_w", "gate_b"), gates, strict=True)
        )
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        dout[1, blind] = 0
        grads = torch.autograd.grad(out, list(named.values()), dout, materialize_grads=True)
        return out, dict(zip(named, grads, strict=True))

    blind = seen_from(window, rows, at, device)
    clean, want = run(tensors, blind)
    spoilt = dict(tensors)
    spoilt[name] = tensors[name].clone()
    flat = spoilt[name].view(2, rows, -1)
    flat[1, at] = torch.nan
    out, got = run(spoilt, blind)
    assert out[1, blind].isnan().all()
    torch.testing.assert_close(out[1, ~blind], clean[1, ~blind])
    torch.testing.assert_close(out[0], clean[0])
    for n, x in want.items():
        torch.testing.assert_close(got[n], x, msg=lambda text, n=n: f"{n}: {text}")
    if blind.any():
        _, all_of_it = run(spoilt, [])
        assert all_of_it["w"].isnan().any() or all_of_it["value"].isnan().any()


def test_a_trace_keeps_no_answer_about_the_numbers_of_its_example():
    """Nothing was hidden there, and all was finite."""
    h, w, v = torch.randn(2, 6, 4), torch.randn(4, 3), torch.randn(3)
    mask = torch.ones(2, 6, dtype=torch.bool)
    traced = torch.jit.trace(lambda h, mask: location_attention(h, w, None, v, mask=mask), (h, mask))
    h[1, 3:], mask[1, 3:] = torch.nan, False
    torch.testing.assert_close(traced(h, mask), location_attention(h, w, None, v, mask=mask))
    mask[1] = False
    assert (traced(h, mask)[1] == 0).all()
