"""Every tensor argument of the location and hierarchical families in layouts of its own: as the contiguous one."""

import pytest
import torch
from _compare import IMPLS, assert_close, evaluate
from _hierarchical import Case as Levels
from _location import Case, offsets, operator, table
from torch import Tensor


def shifted(x: Tensor) -> Tensor:
    """The same numbers at an odd offset of a larger storage."""
    return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)


def sliced(x: Tensor) -> Tensor:
    """Every other number along each axis of a larger tensor."""
    big = x.new_zeros([2 * n + 1 for n in x.shape])
    view = big[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


def transposed(x: Tensor) -> Tensor:
    """The axes in memory the other way round."""
    back = tuple(reversed(range(x.dim())))
    return x.permute(back).contiguous().permute(back)


def padded(x: Tensor) -> Tensor:
    """Rows with a gap between them, as a slice of wider rows."""
    return torch.cat([x, x.new_zeros(*x.shape[:-1], 3)], -1)[..., : x.shape[-1]] if x.dim() else x


def expanded(x: Tensor) -> Tensor:
    """The first of each axis for all of it: other numbers, of stride 0."""
    return x[tuple(slice(0, 1) for _ in x.shape)].expand(x.shape)


LAYOUTS = {f.__name__: f for f in (shifted, sliced, transposed, padded, expanded)}
OFFSETS = ("cu_seqlens", "inner_offsets", "outer_offsets")


def check(op, tensors: dict[str, Tensor], name: str, impl: str) -> None:
    """All arguments at once, each with its own strides; offsets cannot be expanded."""
    layout = LAYOUTS[name]
    given = {n: x if layout is expanded and n in OFFSETS else layout(x) for n, x in tensors.items()}
    if layout is not expanded:
        assert all(torch.equal(given[n], x) for n, x in tensors.items())
    plain = {n: x.clone(memory_format=torch.contiguous_format) for n, x in given.items()}
    assert_close(evaluate(op, given, impl), evaluate(op, plain, impl))


SCORES = {
    "gated, hops, a context a row": {"score": "gated_hops", "context": "row", "value": 5},
    "mlp, a context a sequence": {"score": "mlp", "context": "sequence"},
    "linear hops": {"score": "linear_hops", "context": "row", "value": 5},
    "linear": {"score": "linear", "context": "sequence"},
    "projected, hops": {"score": "projected_hops", "context": "sequence", "value": 5},
}


@table("ragged,score,layout", (False, True), SCORES, LAYOUTS, of_kernel=3, torch_paths=["reference"])
def test_location_takes_any_layout(layout, score, ragged, impl, device):
    case = Case(
        batch=2, rows=18, dim=6, attn_dim=4, hops=2, ragged=ragged, score_bias=True, mask="random", **SCORES[score]
    )
    check(case.op, case.tensors(device), layout, impl)


@table("window,layout", ((None, 0), (1, None), (2, 1)), LAYOUTS, of_kernel=3)
def test_the_windowed_form_takes_any_layout(layout, window, impl, device):
    ragged = window[1] is None
    case = Case(
        batch=2, rows=18, dim=6, hops=2, score="linear_hops", value=5, ragged=ragged, score_bias=True, mask="random"
    )
    check(operator(window=window, return_weights=not ragged), case.tensors(device), layout, impl)


@table("contexts,layout", (("row", "parent"), ("parent", "row")), LAYOUTS, of_kernel=2, torch_paths=["reference"])
def test_the_hierarchical_form_takes_any_layout(layout, contexts, impl, device):
    case = Levels(documents="few", inner="gated", outer="mlp", contexts=contexts, mask="random", dim=6)
    check(case.op, case.tensors(device), layout, impl)


# --- Cotangents, and numbers more than 2**31 apart ---------------------------------------------------------------


@table("window,layout", (None, (None, 0)), LAYOUTS, of_kernel=3)
def test_cotangents_may_have_any_layout(layout, window, impl, device):
    case = Case(batch=2, rows=18, dim=6, hops=2, score="mlp_hops", value=5)
    tensors = {n: x.requires_grad_() for n, x in case.tensors(device).items()}
    outputs = operator(window=window)(impl=impl, **tensors)
    rng = torch.Generator().manual_seed(2)
    given = [LAYOUTS[layout](torch.randn(x.shape, generator=rng).to(x)) for x in outputs]
    plain = [x.contiguous() for x in given]
    found = [torch.autograd.grad(outputs, list(tensors.values()), d, retain_graph=True) for d in (given, plain)]
    for name, got, want in zip(tensors, *found, strict=True):
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")


FAR = {  # the axis along which three numbers are 2**30 apart
    "rows": ({"h": 1, "value": 1, "context": 1, "score_bias": 1}, {"batch": 2, "rows": 3}),
    "sequences": ({"h": 0, "value": 0, "context": 0, "score_bias": 0}, {"batch": 3, "rows": 2}),
    "parameters": (
        {"w": 0, "gate_w": 0, "v": 0, "b": 0, "gate_b": 0},
        {"batch": 2, "rows": 3, "dim": 3, "attn_dim": 3},
    ),
    "columns": ({"w": 1, "gate_w": 1, "v": 1}, {"batch": 2, "rows": 3, "attn_dim": 3, "hops": 3}),
    "features": ({"h": 2, "value": 2, "context": 2}, {"batch": 2, "rows": 3, "dim": 3, "attn_dim": 3, "value": 3}),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("axes", "sizes"), FAR.values(), ids=FAR)
def test_numbers_past_int32_are_found(axes, sizes, impl, far_apart, device):
    sizes = {"dim": 4, "attn_dim": 4, "hops": 2, "value": 3} | sizes
    case = Case(dtype=torch.float16, score="gated_hops", context="row", score_bias=True, **sizes)
    tensors = case.tensors(device)
    assert_close(
        evaluate(case.op, tensors | {n: far_apart(tensors[n], axis) for n, axis in axes.items()}, impl),
        evaluate(case.op, tensors, impl),
    )


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_windowed_numbers_past_int32_are_found(impl, far_apart, device):
    case = Case(dtype=torch.float16, batch=2, rows=3, dim=4, score="linear", value=3, score_bias=True)
    tensors = case.tensors(device)
    axes = {"h": 1, "value": 1, "score_bias": 1}
    op = operator(window=(None, 0))
    far = tensors | {n: far_apart(tensors[n], axis) for n, axis in axes.items()}
    assert_close(evaluate(op, far, impl), evaluate(op, tensors, impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("axis", [0, 1])
def test_hierarchical_numbers_past_int32_are_found(axis, impl, far_apart, device):
    case = Levels(
        dtype=torch.float16, documents="one", inner="gated", contexts=("row", "row"), dim=3, attn_dims=(3, 3)
    )
    tensors = case.tensors(device)
    tensors |= {"h": torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)}
    tensors["inner_context"] = torch.ones(1, 3, 3, device=device, dtype=torch.float16)
    tensors["inner_offsets"], tensors["outer_offsets"] = offsets([3], device), offsets([1], device)
    far = dict(tensors)
    for name in ("h", "inner_w", "outer_w", "inner_gate_w"):
        far[name] = far_apart(tensors[name], axis)
    assert_close(evaluate(case.op, far, impl), evaluate(case.op, tensors, impl))
