"""Log weights, which are exact where weights underflow, and calls that return no output: ``value=False``."""

import dataclasses

import pytest
import torch
from _compare import assert_as_exact, evaluate, in_double, rough_runs
from _concat import every_impl
from _marks import each_dtype
from test_states import PAIRS, STATISTICS, Reveal, returning
from torch import Tensor, func, nn

import fused_attn as f

CASES = PAIRS | STATISTICS
NAMES = list(CASES)
LOG = {"return_log_weights": True}
B, T, D = 3, 7, 5


def inputs(device="cpu", dtype=torch.float64) -> dict[str, Tensor]:
    """Scores up to some hundreds, so that most weights underflow; the last sequence has no key."""
    generator = torch.Generator().manual_seed(0)
    made = {n: torch.randn(B, T, D, generator=generator) for n in ("query", "key")}
    made |= {"v": torch.randn(D, generator=generator) * 100, "weight": torch.randn(D, D, generator=generator) * 100}
    return {n: x.to(device, dtype).requires_grad_() for n, x in made.items()}


def mask(device="cpu") -> Tensor:
    return torch.arange(T, device=device) < torch.tensor([[T], [3], [0]], device=device)


SCORES = {
    "concat": lambda query, key, v, weight: torch.tanh(query[:, :, None] + key[:, None]) @ v,
    "distance": lambda query, key, v, weight: -(query[:, :, None] - key[:, None]).abs() @ v.abs(),
    "general": lambda query, key, v, weight: query @ weight @ key.mT,
    "location": lambda query, key, v, weight: torch.tanh(key @ (weight / 100)) @ v,
}
CALLS = {
    "concat": lambda query, key, v, weight, value, **o: f.concat_attention(query, key, value, v, **o),
    "distance": lambda query, key, v, weight, value, **o: f.distance_attention(query, key, value, v.abs(), **o),
    "general": lambda query, key, v, weight, value, **o: f.general_attention(query, key, value, weight, **o),
    "location": lambda query, key, v, weight, value, **o: f.location_attention(
        key, weight / 100, v=v, value=value, **o
    ),
}
USES = {
    "concat": ["query", "v"],
    "distance": ["query", "v"],
    "general": ["query", "weight"],
    "location": ["weight", "v"],
}
each_family = pytest.mark.parametrize("family", CALLS)


def targets(x: Tensor) -> Tensor:
    """A visible key a row of each of the first two sequences."""
    return x[..., 2][:2]


@every_impl
@each_family
def test_a_loss_of_weights_that_underflow(family, impl, device):
    """Against PyTorch's log_softmax in float64: values and gradients; no NaN of rows and keys that are hidden."""
    exact, tensors = inputs(device), inputs(device, torch.float32)
    scores = SCORES[family](**exact)
    shown = mask(device) if scores.dim() == 2 else mask(device)[:, None]
    expected = scores[:2].masked_fill(~shown[:2], -torch.inf).log_softmax(-1)
    assert (expected[expected != -torch.inf] < -110).any()  # less than float32 holds
    options = {"mask": mask(device), "impl": impl, "value": False}
    got = CALLS[family](**tensors, **options, return_log_weights=True)
    assert got.dtype == torch.float32
    assert (got[2] == -torch.inf).all()
    assert torch.equal(got[:2] == -torch.inf, expected == -torch.inf)
    torch.testing.assert_close(got[:2].double(), expected, rtol=1e-5, atol=1e-3)
    names = ["key", *USES[family]]
    wanted = torch.autograd.grad(targets(expected).sum(), [exact[n] for n in names], materialize_grads=True)
    made = torch.autograd.grad(targets(got).sum(), [tensors[n] for n in names], materialize_grads=True)
    for name, a, b in zip(names, made, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-3 * float(b.abs().max()), msg=name)
    finite = torch.autograd.grad(CALLS[family](**tensors, **options, return_log_weights=True).sum(), tensors["key"])
    assert finite[0].isfinite().all()


@every_impl
@each_dtype
@pytest.mark.parametrize("name", NAMES)
def test_log_weights_are_the_logarithms(name, dtype, impl, device):
    """In float32, as PyTorch's log_softmax; gradients too, none from what comes back to a hidden one."""
    case = dataclasses.replace(CASES[name], dtype=dtype)
    tensors = case.tensors(device)
    call = returning(case, return_log_weights=True)

    def shown(**arguments):
        out, logs = call(**arguments)
        assert logs.dtype == torch.promote_types(out.dtype, torch.float32)
        return out, Reveal.apply(logs)

    def by_scores(**arguments):
        out, scores = returning(case, return_scores=True)(**arguments)
        hidden = scores == -torch.inf
        scores = scores.masked_fill(hidden, -1e9)
        offsets = arguments.get("cu_seqlens", arguments.get("indptr"))
        if "cu_seqlens_q" in arguments:
            offsets = f.Segments.of_pairs(arguments["cu_seqlens_q"], arguments["cu_seqlens_k"]).offsets
        if offsets is not None:
            parts = scores.split(offsets.diff().tolist())
            logs = torch.cat([x.log_softmax(0) for x in parts])
        else:
            logs = scores.log_softmax(1 if name in STATISTICS else -1)
        return out, logs.masked_fill(hidden, 0)

    exact = evaluate(by_scores, in_double(tensors), "reference")
    assert_as_exact(evaluate(shown, tensors, impl), rough_runs(by_scores, tensors), exact, dtype=dtype)


@every_impl
@each_family
@pytest.mark.parametrize("window", [None, (None, 0), (2, 1)])
def test_without_an_output_the_rest_is_the_same(family, window, impl, device):
    tensors = inputs(device, torch.float32)
    flags = {f"return_{name}": True for name in ("weights", "log_weights", "scores", "lse")}
    options = {"mask": mask(device), "impl": impl, "window": window}
    with_output = CALLS[family](**tensors, value=tensors["key"], **options, **flags)
    without = CALLS[family](**tensors, value=False, **options, **flags)
    assert len(without) == len(with_output) - 1 == 4
    for name, a, b in zip(flags, without, with_output[1:], strict=True):
        torch.testing.assert_close(a, b, msg=name)
        alone = CALLS[family](**tensors, value=False, **options, **{name: True})
        torch.testing.assert_close(alone, b, msg=name)


@each_family
def test_second_derivatives(family):
    tensors = {n: x.detach()[:1] / 30 if x.dim() == 3 else x.detach() / 30 for n, x in inputs().items()}
    names = ["key", *USES[family]]

    def logs(*given):
        made = CALLS[family](**tensors | dict(zip(names, given, strict=True)), value=False, window=(1, 1), **LOG)
        return Reveal.apply(made)

    given = [tensors[n].requires_grad_() for n in names]
    assert torch.autograd.gradgradcheck(logs, given)


@each_family
def test_forward_mode_and_compile(family):
    tensors = inputs()
    shown = mask()

    def logs(key):
        made = CALLS[family](**tensors | {"key": key}, value=False, mask=shown, **LOG)
        return torch.where(made == -torch.inf, 0, made)

    key = tensors["key"].detach()
    tangent = torch.randn(key.shape, dtype=key.dtype)
    _, forward = func.jvp(logs, (key,), (tangent,))
    (back,) = func.vjp(logs, key)[1](torch.ones_like(forward))
    torch.testing.assert_close(forward.sum(), (back * tangent).sum())
    compiled = torch.compile(logs, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(key), logs(key))


@every_impl
def test_of_packed_and_jagged_rows(impl, device):
    h = torch.randn(9, D, device=device)
    cu_seqlens = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=device)
    w = torch.randn(D, 2, device=device)
    b = torch.randn(2, device=device)
    logs = f.location_attention(h, w, b, value=False, cu_seqlens=cu_seqlens, impl=impl, **LOG)
    scores = torch.tanh(h @ w + b)
    expected = torch.cat([scores[:4].log_softmax(0), scores[4:].log_softmax(0)])
    torch.testing.assert_close(logs, expected)
    jagged = torch.nested.nested_tensor_from_jagged(h, cu_seqlens.long())
    torch.testing.assert_close(f.location_attention(jagged, w, b, value=False, impl=impl, **LOG).values(), expected)
    q, k, v = torch.randn(9, D, device=device), h, torch.randn(D, device=device)
    offsets = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "impl": impl}
    lse = f.concat_attention(q, k, False, v, return_lse=True, **offsets)
    torch.testing.assert_close(lse, f.concat_attention(q, k, k, v, return_lse=True, **offsets)[1])


@every_impl
@pytest.mark.parametrize("family", ["graph", "graph by a list of edges", "statistics", "statistics of equal weights"])
def test_log_weights_of_edges_and_frames_that_underflow(family, impl, device):
    h = torch.tensor([[0.0], [300.0], [1.0]], device=device, requires_grad=True)
    one = torch.ones(1, device=device)
    options = {"activation": "identity", "impl": impl, "return_log_weights": True, "return_weights": True}
    expected = torch.tensor([-300.0, 0.0, -299.0], device=device)
    if family == "graph":
        args = torch.tensor([0, 0, 3], device=device), torch.arange(3, device=device)
        *_, weights, logs = f.graph_attention(torch.zeros(2, 1, device=device), h, one, *args, **options)
    elif family == "graph by a list of edges":
        edges = torch.tensor([[2, 0, 1, 0], [1, 1, 1, 0]], device=device)
        *_, weights, logs = f.graph_attention(torch.zeros(2, 1, device=device), h, one, edges, **options)
        expected = torch.tensor([-299.0, -300.0, 0.0, 0.0], device=device)
    elif family == "statistics":
        *_, weights, logs = f.statistics_pooling(h[None], one[:, None], v=one, **options)
        expected = expected[None]
    else:
        shown = torch.tensor([[True, False, True]], device=device)
        *_, weights, logs = f.statistics_pooling(h[None], mask=shown, **options)
        expected = torch.where(shown, -torch.tensor(2.0).log(), -torch.inf)
    assert torch.equal(weights, expected.exp())
    torch.testing.assert_close(logs, expected)
    if "equal" not in family:
        (grad,) = torch.autograd.grad(logs.min(), h)
        torch.testing.assert_close(grad[:, 0], torch.tensor([1.0, -1.0, 0.0], device=device))


@pytest.mark.parametrize(
    "module",
    [
        f.ConcatAttention(D, D, 4),
        f.ConcatAttention(D, D, 4, num_heads=2),
        f.DistanceAttention(D, D, 4, num_heads=2),
        f.GeneralAttention(D, D, num_heads=2),
        f.LocationAttention(D, 4),
    ],
    ids=lambda module: f"{module._get_name()}",
)
def test_modules(module: nn.Module):
    query, key = torch.randn(2, B, T, D).unbind()
    rows = (key,) if isinstance(module, f.LocationAttention) else (query, key)
    out, weights, logs = module(*rows, mask=mask(), return_weights=True, **LOG)
    torch.testing.assert_close(logs.exp(), weights)
    torch.testing.assert_close(module(*rows, value=False, mask=mask(), **LOG), logs)
    assert out.shape[-1] == D


@pytest.mark.parametrize("family", ["GraphAttention", "StatisticsPooling"])
def test_modules_without_values_of_their_own(family):
    if family == "GraphAttention":
        args = torch.randn(T, D), torch.tensor([[0, 1, 2, 3], [1, 1, 1, 0]])
        module: nn.Module = f.GraphAttention(D, 4, num_heads=2)
    else:
        args, module = (torch.randn(B, T, D),), f.StatisticsPooling(D, 4, per_channel=True)
    out, weights, logs = module(*args, return_weights=True, **LOG)
    torch.testing.assert_close(logs.exp(), weights)
    torch.testing.assert_close(module(*args), out)


@each_family
def test_errors(family):
    tensors = inputs()
    with pytest.raises(ValueError, match=r"^value: expected False only with return_weights, return_log_weights"):
        CALLS[family](**tensors, value=False)
    with pytest.raises(ValueError, match=r"^return_state: expected False with value=False"):
        CALLS[family](**tensors, value=False, return_state=True)
    with pytest.raises(TypeError, match=r"^value: expected a torch.Tensor"):
        CALLS[family](**tensors, value=True, **LOG)
    with pytest.raises(TypeError, match=r"^return_log_weights: expected True or False"):
        CALLS[family](**tensors, value=False, return_log_weights=1)


def test_log_weights_of_a_packed_window_are_refused():
    h, cu_seqlens = torch.randn(9, D), torch.tensor([0, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^return_log_weights: expected"):
        f.location_attention(h, h[0], window=(1, 1), cu_seqlens=cu_seqlens, **LOG)
