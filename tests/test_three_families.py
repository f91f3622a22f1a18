"""Statistics, target attention, graphs, words and the location-aware step: tables of what all of them have to hold.

Oracles are the formulas beside the cases: float64, plain PyTorch, nothing of the package.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import _graph
import _recurrent
import _statistics_pooling
import _target
import pytest
import torch
from _compare import IMPLS, Operator, assert_as_exact, assert_close, evaluate, in_double, largest, rough_runs
from torch import Tensor

from fused_attn import (
    GraphAttention,
    LocationAwareAttention,
    StatisticsPooling,
    TargetAttention,
    WordByWordAttention,
    location_aware_attention,
)

each_impl = pytest.mark.parametrize("impl", IMPLS)


class Family(NamedTuple):
    """One way to call an operator, its formula, and its inputs."""

    op: Operator
    formula: Operator
    tensors: Callable[..., dict[str, Tensor]]
    score: str  # the tensor that scores are linear in


def _of(case, formula: Operator, score: str = "v") -> Family:
    def tensors(device, dtype=torch.float32):
        return replace(case, dtype=dtype).tensors(device)

    return Family(case.op, formula, tensors, score)


def _location_aware(*, impl, query, key, value, v, previous, conv_weight, u, **rest):
    return location_aware_attention(query, key, value, v, previous, conv_weight, u, impl=impl, **rest)


def _location_aware_tensors(device, dtype=torch.float32, batch=3, keys=9, width=4):
    rng = torch.Generator().manual_seed(1)

    def made(*shape):
        return torch.randn(shape, generator=rng).to(device, dtype)

    return {
        "query": made(batch, width),
        "key": made(batch, keys, width),
        "value": made(batch, keys, 5),
        "v": made(width),
        "previous": made(batch, keys).float().softmax(1).to(dtype),
        "conv_weight": made(2, 3),
        "u": made(2, width),
        "score_bias": made(batch, keys),
        "mask": (torch.arange(keys) < torch.tensor([[keys], [max(keys - 3, 1)], [1]] * batch)[:batch]).to(device),
    }


_frames = _statistics_pooling.Case(rows=21, dim=9, attn_dim=6, value=7, context="sequence")
_users = _target.Case(rows=21, attn_dim=6, value=7, mask="padding")
_ragged = replace(_users, ragged=True, second=None, mask="none")
FAMILIES = {
    "frame": _of(replace(_frames, per_channel=False, mask="padding"), _statistics_pooling.formula),
    "channel": _of(replace(_frames, mask="random", context="row"), _statistics_pooling.formula),
    "ragged": _of(replace(_frames, ragged=True), _statistics_pooling.formula),
    "target": _of(_users, _users.formula),
    "history": _of(_ragged, _ragged.formula),
    "graph": _of(_graph.Case(edges=11), _graph.formula),
    "shared": _of(_graph.Case(edges=11, value_dim=None, edge=False, attn_dim=20), _graph.formula),
    "words": _of(_recurrent.Case(state=True, mask="some"), _recurrent.formula, "w"),
    "streamed": _of(
        _recurrent.Case(batch=2, premise=35, hypothesis=2, dim=19, attn_dim=33, state=True, mask="some"),
        _recurrent.formula,
        "w",
    ),
    "step": Family(_location_aware, _recurrent.location_aware_formula, _location_aware_tensors, "v"),
}
each_family = pytest.mark.parametrize("name", FAMILIES)


def assert_matches_formula(
    family: Family, tensors: dict[str, Tensor], impl: str, dtype=torch.float32, large=False, **options
):
    """The error rule, against the formula in float64."""
    exact = evaluate(family.formula, in_double(tensors), "", **options)
    rough = rough_runs(family.op, tensors, large=large, **options)
    got = evaluate(family.op, tensors, impl, **options)
    exact = type(exact)({n: x for n, x in exact.outputs.items() if n in got.outputs}, exact.gradients)
    assert_as_exact(got, rough, exact, dtype=dtype)


# --- Oracles -----------------------------------------------------------------------------------------------------


@each_family
def test_the_reference_is_the_formula(name, device):
    family = FAMILIES[name]
    tensors = in_double(family.tensors(device))
    assert_close(evaluate(family.op, tensors, "reference"), evaluate(family.formula, tensors, ""))


# --- Layouts -----------------------------------------------------------------------------------------------------


def _transposed(x):
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def _sliced(x):
    """A view with strides of its own, a storage offset, and no unit stride on the last axis."""
    wide = x.new_zeros([n + 2 for n in x.shape[:-1]] + [2 * x.shape[-1] + 3])
    view = wide[tuple(slice(1, n + 1) for n in x.shape[:-1])][..., 3::2]
    return view.copy_(x)


def _offset(x):
    """Rows of a wider tensor, the last axis as it is."""
    wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 5)
    return wide[..., 3 : 3 + x.shape[-1]].copy_(x)


def _expanded(x):
    """One number a row, of a stride 0: other numbers, so that the contiguous call has them too."""
    return x[..., :1].expand_as(x)


def _repeated(x):
    """The first along the first axis, of a stride 0."""
    return x[:1].expand_as(x)


@each_impl
@each_family
@pytest.mark.parametrize("layout", [_transposed, _sliced, _offset, _expanded, _repeated], ids=lambda f: f.__name__)
def test_every_argument_may_have_strides_of_its_own(layout, name, impl, device):
    family = FAMILIES[name]
    tensors = family.tensors(device)
    numbers = layout not in (_expanded, _repeated)  # offsets and indices keep theirs
    laid_out = {n: layout(x) if x.dim() and (numbers or x.is_floating_point()) else x for n, x in tensors.items()}
    plain = {n: x.contiguous() for n, x in laid_out.items()}
    assert any(not x.is_contiguous() for x in laid_out.values())
    assert_close(evaluate(family.op, laid_out, impl), evaluate(family.op, plain, impl))


FAR = [
    (name, tensor, axis)
    for name, axes in {
        "frame": {"h": 0, "value": 0, "context": 0, "mask": 0},
        "channel": {"h": 0, "value": 0, "context": 0, "w": 1, "mask": 0},
        "frames": {"h": 1, "value": 1, "context": 1, "mask": 1},
        "features": {"h": 2, "w": 1, "b": 0, "v": 0},
        "channels": {"value": 2, "v": 1},
        "target": {"query": 0, "key": 0, "value": 0, "mask": 0},
        "keys of a user": {"key": 1, "value": 1, "mask": 1},
        "units": {"query": 1, "key": 2, "w2": 1, "v": 0, "b2": 0},
        "graph": {"query": 0, "key": 0, "value": 0, "edge": 0},
        "heads": {"query": 1, "key": 1, "value": 1, "edge": 1, "v": 0},
        "words": {"premise": 0, "hypothesis": 0, "state": 0, "mask": 0},
        "time": {"premise": 1, "hypothesis": 1, "mask": 1},
        "widths": {"premise": 2, "w_r": 0, "w_t": 0, "w_y": 1, "w_h": 1, "w": 0},
        "step": {"query": 0, "key": 0, "value": 0, "previous": 0, "mask": 0, "score_bias": 0},
        "keys": {"key": 1, "value": 1, "previous": 1, "score_bias": 1},
    }.items()
    for tensor, axis in axes.items()
]
_SHORT = {
    "frame": _of(replace(_frames, rows=5, per_channel=False, mask="random"), _statistics_pooling.formula),
    "channel": _of(replace(_frames, rows=5, attn_dim=3, mask="random"), _statistics_pooling.formula),
    "frames": _of(replace(_frames, rows=3, context="row", mask="random"), _statistics_pooling.formula),
    "features": _of(replace(_frames, rows=5, dim=3, attn_dim=3), _statistics_pooling.formula),
    "channels": _of(replace(_frames, rows=5, value=3), _statistics_pooling.formula),
    "target": _of(replace(_users, rows=5), _users.formula),
    "keys of a user": _of(replace(_users, rows=3), _users.formula),
    "units": _of(replace(_users, rows=5, dim=3, second=3), _users.formula),
    "graph": _of(_graph.Case(queries=3, keys=3, edges=3, index=torch.int32), _graph.formula),
    "heads": _of(_graph.Case(heads=3), _graph.formula),
    "words": _of(_recurrent.Case(batch=3, hypothesis=2, state=True, mask="some"), _recurrent.formula),
    "time": _of(_recurrent.Case(premise=3, hypothesis=3, mask="some"), _recurrent.formula),
    "widths": _of(_recurrent.Case(hypothesis=2, dim=3, attn_dim=3, hypothesis_dim=3), _recurrent.formula),
    "step": FAMILIES["step"],
    "keys": FAMILIES["step"]._replace(tensors=functools.partial(_location_aware_tensors, keys=3)),
}


@pytest.fixture(scope="module")
def far_mask(device):
    """As `far_apart`, for a mask: 2 GiB, of which few pages are ever touched."""
    memory = torch.empty(2**31 + 2**12, dtype=torch.bool, device=device)

    def place(x, axis):
        strides = list(torch.empty_like(x.select(axis, 0), memory_format=torch.contiguous_format).stride())
        strides.insert(axis, 2**30)
        return memory.as_strided(x.shape, strides).copy_(x)

    return place


@each_impl
@pytest.mark.parametrize(("name", "tensor", "axis"), FAR)
def test_strides_past_int32_match_the_formula(name, tensor, axis, impl, far_apart, far_mask, device):
    """Float16, forward and backward: numbers 2**30 apart along an axis of three."""
    family = _SHORT[name]
    tensors = family.tensors(device, torch.float16)
    if "indices" in tensors:  # each key has an edge, the last one too
        tensors["indices"] = torch.arange(len(tensors["indices"])).to(tensors["indices"]) % len(tensors["key"])
    place = far_mask if tensor == "mask" else far_apart
    tensors[tensor] = place(tensors[tensor], axis)
    assert_matches_formula(family, tensors, impl, torch.float16)


# --- What must not be read ---------------------------------------------------------------------------------------

MODULES = {
    "statistics": lambda: StatisticsPooling(4, 3),
    "statistics, a weight a channel": lambda: StatisticsPooling(4, 3, per_channel=True),
    "statistics, global context": lambda: StatisticsPooling(4, 3, per_channel=True, global_context=True),
    "target": lambda: TargetAttention(4, 3, 2),
    "target, softmax": lambda: TargetAttention(4, 3, None, softmax=True),
    "words": lambda: WordByWordAttention(4, 5, 3),
    "step": lambda: LocationAwareAttention(5, 4, 3, channels=2, width=3),
    "step, projected before": lambda: LocationAwareAttention(5, 4, 3, channels=2, width=3),
    "graph": lambda: GraphAttention(4, 3, num_heads=2, edge_dim=2),
    "graph, one projection": lambda: GraphAttention(4, 3, share_weights=True),
    "graph, two kinds": lambda: GraphAttention(5, 3, key_dim=4),
}


@each_impl
@pytest.mark.parametrize("filling", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_hidden_rows_change_no_gradient_of_a_module(name, filling, impl, device):
    """Nor an output: not of parameters either, where 0 times what is hidden would be NaN."""
    torch.manual_seed(0)
    module = MODULES[name]().to(device)
    x, query, words, steps = (torch.randn(3, *size, device=device) for size in ((6, 4), (5,), (2, 5), (6,)))
    mask = torch.tensor([[True] * 6, [True, False, True, False, False, False], [False] * 6], device=device)
    # Node 4 has no edge, 3 is a source alone, 0 and 5 are targets alone.
    indptr = torch.tensor([0, 2, 3, 4, 4, 4, 5], device=device)
    indices = torch.tensor([1, 3, 2, 1, 2], device=device)
    sources = torch.tensor([False, True, True, True, False, False], device=device)
    edge, targets = torch.randn(5, 2, device=device), torch.randn(6, 5, device=device)

    def run(hidden):
        live = x.clone()
        more = []
        if name.startswith("graph"):
            live = live[0]
            if hidden:
                live[~sources if name.endswith("kinds") else [4]] = filling
            to = targets.clone()
            if hidden:
                to[3:5] = filling
            live.requires_grad_()
            given = (to.requires_grad_(), live) if name.endswith("kinds") else live
            more = [to] if name.endswith("kinds") else []
            out = module(given, indptr, indices, edge=edge if module.edge_proj is not None else None, impl=impl)
        else:
            previous = steps.clone()
            asked = query.clone()
            if hidden:
                live[~mask], previous[~mask] = filling, filling
                asked[~mask.any(1)] = filling
            live.requires_grad_()
            if name == "words":
                out = module(live, words, mask=mask, impl=impl)
            elif name.startswith("target"):
                out = module(targets[:3, :4], live, mask=mask, impl=impl)
            elif name.startswith("step"):
                projected = module.project_keys(live, mask) if name.endswith("before") else None
                more = [previous.requires_grad_()]
                out = module(asked, live, previous=previous, projected=projected, mask=mask, impl=impl)[0]
            else:
                out = module(live, mask=mask, impl=impl)
        shown = torch.where(out.isfinite(), out, torch.nan)
        grads = torch.autograd.grad(shown.square().sum(), [live, *more, *module.parameters()])
        return [shown, *grads]

    for got, want in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, want)


# --- Sixteen bits ------------------------------------------------------------------------------------------------


@each_impl
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["frame", "channel", "target", "graph", "words", "step"])
def test_no_sum_overflows_that_float32_holds(name, dtype, impl, device):
    """Scores of hundreds of thousands: NaN if they were float16 anywhere. `impl` and the weights change nothing."""
    family = FAMILIES[name]
    tensors = family.tensors(device, dtype)
    sign = tensors[family.score].sign()
    tensors[family.score] = (sign * 30000).to(dtype)  # the sum of a few of them is more than 65,504
    exact = evaluate(family.formula, in_double(tensors), "", wrt=[])
    got = evaluate(family.op, tensors, impl, wrt=[])
    for x in got.outputs.values():
        assert x.isfinite().all()
    out = got.outputs["output"]
    assert out.dtype == dtype
    settled = exact.outputs["output"].to(dtype)
    # Scores that 16-bit features round may choose another key: those that they cannot are right.
    assert ((out - settled).abs() <= 4 * torch.finfo(dtype).eps * largest(settled)).double().mean() > 0.5


@pytest.mark.parametrize("activation", ["identity", "relu", "tanh"])
def test_projections_of_sixteen_bits_do_not_overflow_on_a_cpu(activation):
    """Rows of 300 and weights of 300, of both signs: a product in float16 is inf, and their sum NaN."""
    from fused_attn import statistics_pooling, word_by_word_attention

    torch.manual_seed(0)
    h, w, v = 300 * torch.randn(2, 7, 8).sign(), 300 * torch.randn(8, 3).sign(), torch.randn(3) / 1e6
    h[:, 1:] *= torch.rand(2, 6, 8)
    half = [x.half() for x in (h, w, v)]
    options = {"activation": activation}
    mean, std = statistics_pooling(half[0], half[1], None, half[2], **options)
    want = statistics_pooling(*(x.double() for x in half[:2]), None, half[2].double(), **options)
    for got, x in zip((mean, std), want, strict=True):
        torch.testing.assert_close(got.double(), x, rtol=2e-3, atol=0.1)
    words = [h, h[:, :2], w, -w, w, torch.randn(3), torch.randn(8, 8)]
    words = [x.half() for x in words]
    got, want = word_by_word_attention(*words), word_by_word_attention(*(x.double() for x in words))
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=0.3)


@pytest.mark.parametrize("channels", [False, True], ids=["frame", "channel"])
@pytest.mark.parametrize(
    ("impl", "dtype"),  # bfloat16 has room for them, and in the kernel 8 bits each
    [
        ("reference", torch.float16),
        ("reference", torch.bfloat16),
        pytest.param("triton", torch.float16, marks=pytest.mark.kernel),
    ],
    ids=str,
)
def test_features_past_float16_score_channels_too(dtype, channels, impl, device):
    """Features of 300,000: they stay wide where a weight a channel follows, as where one a frame does."""
    from fused_attn import statistics_pooling

    torch.manual_seed(0)
    h, w = ((torch.randn(*shape) * 200).to(device, dtype) for shape in ((2, 6, 16), (16, 8)))
    v = (torch.randn(8, 16) * 1e-5).to(device, dtype)
    v = v if channels else v[:, 0]
    got = statistics_pooling(h, w, None, v, activation="relu", impl=impl)
    want = statistics_pooling(h.double(), w.double(), None, v.double(), activation="relu", impl="reference")
    for x, exact in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0.5)


# --- The normaliser ----------------------------------------------------------------------------------------------


def _sums(family: Family, name: str, tensors: dict[str, Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the weights over the keys, and how many keys each is of."""
    w = weights.double()
    if "indptr" in tensors:
        lengths = tensors["indptr"].diff()
        node = torch.repeat_interleave(torch.arange(len(lengths), device=w.device), lengths)
        return w.new_zeros(len(lengths), w.shape[1]).index_add(0, node, w), lengths[:, None]
    if "cu_seqlens" in tensors:
        lengths = tensors["cu_seqlens"].diff().long()
        seq = torch.repeat_interleave(torch.arange(len(lengths), device=w.device), lengths)
        return w.new_zeros(len(lengths), *w.shape[1:]).index_add(0, seq, w), lengths.reshape(-1, *[1] * (w.dim() - 1))
    axis = -1 if name in ("words", "streamed", "step") or w.dim() == 2 else 1
    return w.sum(axis), torch.tensor(w.shape[axis], device=w.device)


@each_impl
@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e6, 1e30], ids=str)
def test_weights_sum_to_one_at_any_size_of_the_scores(size, dtype, name, impl, device):
    if size > torch.finfo(dtype).max / 8:
        size = torch.finfo(dtype).max / 8
    family = FAMILIES[name]
    tensors = family.tensors(device, dtype)
    tensors[family.score] = (tensors[family.score].double() * size).to(dtype)
    result = evaluate(family.op, tensors, impl, wrt=[])
    total, keys = _sums(family, name, tensors, result.outputs["weights"])
    assert ((total - 1).abs() <= torch.finfo(dtype).eps * keys.clamp(min=1)).logical_or(keys == 0).all()


@each_impl
@pytest.mark.parametrize("bias", [-1e4, -1e9, torch.finfo(torch.float32).min], ids=str)
def test_a_constant_bias_of_all_keys_changes_nothing(bias, impl, device):
    """The mask constants of other libraries, on a whole row."""
    tensors = _location_aware_tensors(device)
    tensors["score_bias"] = torch.full_like(tensors["score_bias"], bias)
    got = evaluate(_location_aware, tensors, impl)
    total = got.outputs["weights"].double().sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=9 * torch.finfo(torch.float32).eps)
    want = (got.outputs["weights"][..., None] * tensors["value"]).masked_fill(~tensors["mask"][..., None], 0).sum(1)
    torch.testing.assert_close(got.outputs["output"], want)
    sums = got.gradients["value"].sum(1)  # what the weights of a row, which sum to 1, give of the projection
    mean = evaluate(lambda *, impl, value: value.mean(1), {"value": tensors["value"]}, "")
    torch.testing.assert_close(sums, mean.gradients["value"].sum(1))


@each_impl
@each_family
@pytest.mark.parametrize("size", [1.0, 1e6], ids=str)
def test_one_visible_key_has_the_weight_one(size, name, impl, device):
    """Exactly: and its value comes back as it is, and no gradient goes to its score."""
    family = FAMILIES[name]
    tensors = family.tensors(device)
    tensors[family.score] = tensors[family.score] * size
    if "indptr" in tensors:
        tensors |= {"indptr": torch.arange(5, device=device), "indices": torch.arange(4, device=device)}
        if "edge" in tensors:
            tensors["edge"] = tensors["edge"][:4].contiguous()
    elif "cu_seqlens" in tensors:
        rows, of_sequence = ("h", "context") if "h" in tensors else ("key", "query")
        count, one = len(tensors[rows]), tensors[of_sequence][:1]
        tensors["cu_seqlens"] = torch.arange(count + 1, dtype=torch.int32, device=device)
        tensors[of_sequence] = one.expand(count, *one.shape[1:]).contiguous()
    else:
        rows = next(tensors[n] for n in ("h", "premise", "key") if n in tensors)
        tensors["mask"] = torch.zeros(rows.shape[:2], dtype=torch.bool, device=device)
        tensors["mask"][:, 2] = True
    result = evaluate(family.op, tensors, impl)
    weights = result.outputs["weights"]
    assert set(weights.unique().tolist()) <= {0.0, 1.0}
    if impl == "triton":
        assert largest(result.gradients[family.score]) == 0
    exact = evaluate(family.formula, in_double(tensors), "")
    torch.testing.assert_close(result.outputs["output"].double(), exact.outputs["output"], rtol=1e-6, atol=1e-6)


# --- Gradients at any size of the scores -------------------------------------------------------------------------


@pytest.mark.kernel
@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [30.0, 1e3, 1e6], ids=str)
def test_gradients_follow_the_error_rule_at_any_size_of_the_scores(size, dtype, name, device):
    family = FAMILIES[name]
    if name == "step":  # of three sequences large scores leave one whose softmax has a gradient
        family = family._replace(tensors=functools.partial(_location_aware_tensors, batch=24))
    tensors = family.tensors(device, dtype)
    tensors[family.score] = tensors[family.score] * size
    assert_matches_formula(family, tensors, "triton", dtype, large=True)
