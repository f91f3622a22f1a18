"""Scores, normalisers and states that calls return, and the merge of states over parts of the keys."""

import dataclasses
import itertools
import re

import _concat
import _general
import _graph
import _location
import _statistics_pooling
import _target
import pytest
import torch
from _compare import assert_as_exact, evaluate, in_double, rough_runs
from _concat import every_impl
from _marks import each_dtype
from torch import Tensor, func

import fused_attn as f
from fused_attn import State, location_attention, merge, statistics_pooling

KEYS = ("key", "value", "h", "mask", "score_bias", "context", "edge", "indices")  # of these the parts have their own
PAIRS = {
    "concat": _concat.Case(queries=5, keys=37, mask="pairs", score_bias="bqk"),
    "concat, heads": _concat.Case(queries=19, keys=21, heads=2, mask="keys", score_bias="bh1k", layout="transposed"),
    "concat, window": _concat.Case(queries=40, keys=41, window=(9, 12), activation="sigmoid"),
    "concat, one query": _concat.Case(queries=1, keys=37, mask="padding", score_bias="k"),
    "concat, identity": _concat.Case(queries=5, keys=21, activation="identity", mask="empty"),
    "concat, ragged": _concat.Case(queries=31, keys=43, ragged=True),
    "concat, ragged heads": _concat.Case(queries=31, keys=43, ragged=True, heads=2),
    "concat, large": _concat.Case(queries=65, keys=130, attn_dim=33, mask="pairs"),  # past `_few`: in blocks
    "distance": _concat.Case(queries=5, keys=37, p=2, mask="pairs"),
    "general": _general.Case(queries=5, keys=37, weight="matrix", mask="pairs", score_bias="bqk"),
    "general, heads": _general.Case(queries=19, keys=21, heads=2, weight="heads", mask="keys", own_value=False),
    "general, window": _general.Case(queries=40, keys=41, attn_dim=12, window=(9, 12)),
    "general, causal": _general.Case(queries=40, keys=41, attn_dim=12, window=(None, 0)),
    "general, tanh": _general.Case(queries=5, keys=300, activation="tanh", scale=0.2),
    "general, ragged": _general.Case(queries=31, keys=43, ragged=True, own_value=False),
    "location": _location.Case(rows=63, mask="empty", score="mlp_hops", context="row", score_bias=True),
    "location, linear": _location.Case(rows=63, mask="padding", score="linear", value=7),
    "location, gated": _location.Case(rows=300, score="gated", context="sequence"),
    "location, ragged": _location.Case(rows=43, ragged=True, mask="random", context="row", score_bias=True),
    "location, ragged hops": _location.Case(rows=43, ragged=True, score="projected_hops", context="sequence"),
    "target": _target.Case(rows=63, mask="empty", value=7),
    "target, one layer": _target.Case(rows=70, second=None, activation="relu", scale=0.3),
    "target, ragged": _target.Case(rows=43, ragged=True, mask="random"),
    "graph": _graph.Case(queries=6, edges=40),
    "graph, a hub": _graph.Case(edges=300, graph="hub", heads=4, value_dim=None, edge=False),
    "graph, no heads": _graph.Case(queries=6, edges=40, heads=None, value_dim=None),
}
STATISTICS = {
    "statistics": _statistics_pooling.Case(per_channel=False, mask="empty", context="row"),
    "statistics, channels": _statistics_pooling.Case(mask="random", dim=9),
    "statistics, ragged": _statistics_pooling.Case(ragged=True, rows=43, dim=9, value=5),
}
each_case = pytest.mark.parametrize("case", PAIRS.values(), ids=PAIRS.keys())


def returning(case, **flags):
    """The call of a case with these flags; (output, lse), with zeros for the lse of what sees nothing."""
    options = {"return_weights": False, **flags}
    if isinstance(case, _statistics_pooling.Case):
        return _statistics_pooling.operator(activation=case.activation, floor=case.floor, **options)
    if isinstance(case, _graph.Case):
        return _graph.operator(activation=case.activation, **options)
    if isinstance(case, _target.Case):
        return _target.operator(**case.options, **options)
    if isinstance(case, _location.Case):
        return _location.operator(activation=case.activation, dropout_p=case.dropout_p, **options)
    options["window"] = case.window
    if isinstance(case, _general.Case):
        return _general.operator(activation=case.activation, scale=case.scale, **options)
    return _concat.operator(**({"activation": case.activation} if case.p is None else {"p": case.p}), **options)


def finite(lse: Tensor) -> Tensor:
    return torch.where(lse == -torch.inf, 0, lse)


def whole(case):
    """(output, lse) of all the keys in one call."""
    call = returning(case, return_lse=True)

    def op(**arguments):
        out, lse = call(**arguments)
        return out, finite(lse)

    return op


def cuts(rows: int, count: int = 2) -> list[int]:
    """From 0 to `rows` in parts, the first and one more of which are empty."""
    inner = torch.randint(0, rows + 1, (count,), generator=torch.Generator().manual_seed(rows)).tolist()
    return sorted([0, 0, *inner, inner[-1], rows])


def parts_of(case, tensors):
    """The arguments of a call for each part of the keys, and the window that is the whole one there."""
    packed = next((name for name in ("cu_seqlens_k", "cu_seqlens", "indptr") if name in tensors), None)
    if packed is None:
        length = (tensors["key"] if "key" in tensors else tensors["h"]).shape[-2]
        for lo, hi in itertools.pairwise(cuts(length)):
            made = {name: part_of(name, x, slice(lo, hi), length) for name, x in tensors.items()}
            left, right = getattr(case, "window", None) or (None, None)
            yield made, (None if left is None else left + lo, None if right is None else right - lo)
        return
    cu = tensors[packed]
    at = [cuts(n) for n in cu.diff().tolist()]
    for i in range(len(at[0]) - 1):
        rows = torch.cat([torch.arange(int(a) + c[i], int(a) + c[i + 1]) for a, c in zip(cu[:-1], at, strict=True)])
        rows = rows.to(cu.device)
        lengths = torch.tensor([c[i + 1] - c[i] for c in at], device=cu.device)
        of_edges = ("edge", "indices") if packed == "indptr" else tensors
        made = {n: part_of(n, x, rows, int(cu[-1])) if n in of_edges else x for n, x in tensors.items()}
        made[packed] = torch.cat([cu[:1], lengths.cumsum(0).to(cu.dtype)])
        yield made, (None, None)


def part_of(name: str, x: Tensor, rows: slice | Tensor, length: int) -> Tensor:
    """The rows of a tensor that has the axis of keys."""
    if name not in KEYS:
        return x
    if isinstance(rows, Tensor):  # packed
        axis = x.shape.index(length) if length in x.shape[:2] else None
        return x if axis is None else x.index_select(axis, rows)
    if name in ("mask", "score_bias"):
        return x[..., rows] if x.shape[-1] == length else x
    return x[..., rows, :] if x.shape[-2] == length else x


def split(case, stack: bool = False):
    """(output, lse) by the merge of calls on parts of the keys."""

    def op(**arguments):
        states = []
        for part, window in parts_of(case, {n: x for n, x in arguments.items() if n != "impl"}):
            here = case if window == (None, None) else dataclasses.replace(case, window=window)
            states.append(returning(here, return_state=True)(impl=arguments["impl"], **part))
        state = merge(State(*map(torch.stack, zip(*states, strict=True))) if stack else states, stacked=stack)
        wide = torch.promote_types(torch.float32, next(iter(part.values())).dtype)
        assert {x.dtype for each in (state, *states) for x in each} == {wide}
        return state.out.to(next(iter(part.values())).dtype), finite(state.lse)

    return op


@every_impl
@each_dtype
@each_case
def test_merged_parts_are_the_whole(case, dtype, impl, device):
    case = dataclasses.replace(case, dtype=dtype)
    tensors = case.tensors(device)
    op = whole(case)
    exact = evaluate(op, in_double(tensors), "reference")
    rough = rough_runs(op, tensors)
    assert_as_exact(evaluate(split(case), tensors, impl), rough, exact, dtype=dtype)
    assert_as_exact(evaluate(op, tensors, impl), rough, exact, dtype=dtype)


@every_impl
def test_a_stacked_state_is_a_sequence_of_them(impl, device):
    case = PAIRS["concat"]
    tensors = case.tensors(device)
    for got, want in zip(*(evaluate(split(case, s), tensors, impl) for s in (True, False)), strict=True):
        assert all(torch.equal(got[name], x) for name, x in want.items())


def test_parts_have_keys_of_their_own(device):
    """The splits of the tests above: every key is in one part, and some parts are empty."""
    for case in PAIRS.values():
        tensors = {n: x for n, x in case.tensors(device).items() if n != "cu_seqlens_q"}
        name = next(name for name in ("indices", "h", "key") if name in tensors)
        sizes = [part[name].numel() for part, _ in parts_of(case, tensors)]
        assert sum(sizes) == tensors[name].numel()
        assert 0 in sizes


@every_impl
@each_dtype
@pytest.mark.parametrize(
    "name", [n for n in PAIRS | STATISTICS if "ragged" not in n or "location" in n or "stat" in n]
)
def test_scores_are_those_that_the_softmax_is_of(name, dtype, impl, device):
    """As the reference has them, in float32; their gradients too, also from what comes back to a hidden one."""
    case = dataclasses.replace((PAIRS | STATISTICS)[name], dtype=dtype)
    tensors = case.tensors(device)
    call = returning(case, return_scores=True)

    def shown(**arguments):
        out, scores = call(**arguments)
        assert scores.dtype == torch.promote_types(out.dtype, torch.float32)
        return out, Reveal.apply(scores)

    exact = evaluate(shown, in_double(tensors), "reference")
    assert_as_exact(evaluate(shown, tensors, impl), rough_runs(shown, tensors), exact, dtype=dtype)


class Reveal(torch.autograd.Function):
    """Zeros for scores of -inf, through which cotangents go on as they are: what hides them must stop these."""

    @staticmethod
    def forward(ctx, scores):
        return torch.where(scores == -torch.inf, 0, scores)

    @staticmethod
    def backward(ctx, grad):
        return grad


@every_impl
@pytest.mark.parametrize("case", STATISTICS.values(), ids=STATISTICS.keys())
def test_statistics_have_the_lse_of_their_weights(case, impl, device):
    tensors = case.tensors(device)
    exact = evaluate(whole(case), in_double(tensors), "reference")
    assert_as_exact(evaluate(whole(case), tensors, impl), rough_runs(whole(case), tensors), exact)
    _, scores, lse = returning(case, return_scores=True, return_lse=True)(impl=impl, **tensors)
    if not case.ragged:
        torch.testing.assert_close(lse, torch.logsumexp(scores, 1))


@every_impl
def test_frames_that_weigh_the_same_have_scores_of_0(impl, device):
    h, mask = torch.randn(2, 5, 3, device=device), torch.tensor([[1, 1, 0, 1, 0], [0] * 5], device=device).bool()
    *_, weights, scores, lse = statistics_pooling(
        h, mask=mask, return_weights=True, return_scores=True, return_lse=True, impl=impl
    )
    assert torch.equal(scores, torch.zeros_like(scores).masked_fill(~mask, -torch.inf))
    torch.testing.assert_close(lse, torch.tensor([3.0, 0.0], device=device).log())
    torch.testing.assert_close(weights, mask / 3)


DOCUMENTS = [[3, 0, 4], [], [2], [1, 5, 2, 6]]  # rows of each segment of each group


@every_impl
@each_dtype
@pytest.mark.parametrize("between", [None, lambda segments, offsets: segments * 2], ids=["alone", "between"])
def test_groups_merge_over_disjoint_segments(between, dtype, impl, device):
    rng = torch.Generator().manual_seed(0)
    groups = torch.repeat_interleave(torch.tensor([len(d) for d in DOCUMENTS]))
    segments = torch.repeat_interleave(torch.tensor([n for d in DOCUMENTS for n in d]))
    shapes = {"h": (len(segments), 16), "w": (16, 8), "v": (8,), "outer_w": (16,)}
    tensors = {n: torch.randn(shape, generator=rng).to(device, dtype) for n, shape in shapes.items()}
    some = torch.rand(len(groups), generator=rng) < 0.5

    def op(*, parts=(some | True,), impl, h, w, v, outer_w):
        states = []
        for part in parts:
            inner = (segments[:, None] == torch.arange(len(groups))[part]).sum(0)
            outer = (groups[part][:, None] == torch.arange(len(DOCUMENTS))).sum(0)
            levels = (torch.cat([n.new_zeros(1), n.cumsum(0)]).int().to(device) for n in (inner, outer))
            score, outer_score = f.Score(w, v=v), f.Score(outer_w, activation="identity")
            rows = h[part[segments].to(device)]
            options = {"between": between, "return_state": True, "impl": impl}
            states.append(f.hierarchical_attention(rows, *levels, score, outer_score, **options))
        state = merge(states)
        assert state.out.dtype == torch.promote_types(h.dtype, torch.float32)
        return state.out.to(h.dtype), finite(state.lse)

    exact = evaluate(op, in_double(tensors), "reference")
    got = evaluate(lambda **x: op(parts=(some, ~some, some & False), **x), tensors, impl)
    assert_as_exact(got, rough_runs(op, tensors), exact, dtype=dtype)


@every_impl
def test_scores_of_both_levels_and_the_lse_of_groups(impl, device):
    h = torch.randn(12, 16, device=device)
    sentences, documents = (torch.tensor(x, device=device).int() for x in ([0, 5, 5, 9, 12], [0, 3, 4, 4]))
    args = (h, sentences, documents, f.Score(h[0], activation="tanh"), f.Score(h[1], activation="tanh"))
    names = ("return_segments", "return_weights", "return_scores", "return_lse", "return_state")
    got = f.hierarchical_attention(*args, **dict.fromkeys(names, True), impl=impl)
    torch.testing.assert_close(got.inner_scores, torch.tanh(h @ h[0]))
    outer = torch.tanh(got.segments @ h[1])
    outer[1] = -torch.inf
    torch.testing.assert_close(got.outer_scores, outer)
    torch.testing.assert_close(got.lse, torch.stack([outer[:3].logsumexp(0), outer[3], outer.new_tensor(-torch.inf)]))
    torch.testing.assert_close(got.out.lse, got.lse)
    torch.testing.assert_close(got.out.out, f.hierarchical_attention(*args, impl=impl))
    torch.testing.assert_close(torch.exp(outer[:3] - got.lse[0]), got.outer_weights[:3])


WINDOWED = {
    "hops": _location.Case(batch=2, rows=70, score="mlp_hops", mask="empty", value=5),
    "one": _location.Case(batch=2, rows=70, score="linear", dim=9),
    "ragged": _location.Case(rows=43, ragged=True, score="linear_hops", mask="random", dim=9),
}


@every_impl
@each_dtype
@pytest.mark.parametrize("case", WINDOWED.values(), ids=WINDOWED.keys())
def test_disjoint_windows_merge(case, dtype, impl, device):
    """Of location attention, which has a state a position: what is left of it, and the rest."""
    case = dataclasses.replace(case, dtype=dtype)
    tensors = case.tensors(device)

    def op(*, windows=((None, None),), **arguments):
        made = [returning(case, window=window, return_state=True)(**arguments) for window in windows]
        state = merge(made)
        return state.out.to(dtype if arguments["h"].dtype == dtype else torch.float64), finite(state.lse)

    exact = evaluate(op, in_double(tensors), "reference")
    got = evaluate(lambda **x: op(windows=((None, -9), (8, 0), (-1, None)), **x), tensors, impl)
    assert_as_exact(got, rough_runs(op, tensors), exact, dtype=dtype)


@every_impl
def test_scores_of_a_window_are_one_a_key(impl, device):
    case = WINDOWED["hops"]
    tensors = case.tensors(device)
    _, scores, lse = returning(case, window=(None, 0), return_scores=True, return_lse=True)(impl=impl, **tensors)
    _, want = returning(case, return_scores=True)(impl=impl, **tensors)
    torch.testing.assert_close(scores, want)
    torch.testing.assert_close(lse.mT, torch.logcumsumexp(scores.double(), -1).float())


ORDER = {"return_weights": True, "return_scores": True, "return_lse": True, "return_state": True}


@pytest.mark.parametrize("name", ["concat", "general, heads", "distance", "location", "location, linear", "graph"])
def test_results_come_in_one_order(name, device):
    """Whatever is asked for comes as if it alone were, in one order; one thing alone is no tuple of it."""
    case = PAIRS[name]
    tensors = case.tensors(device)

    def asked(*flags: str):
        return returning(case, **dict.fromkeys(flags, True))(impl="auto", **tensors)

    alone = {flag: asked(flag)[1] for flag in list(ORDER)[:3]}
    state = asked("return_state")
    assert isinstance(state, State)
    torch.testing.assert_close(state.out, asked())
    for count in range(1, 4):
        for flags in itertools.combinations(alone, count):
            for first, got in ((asked(), asked(*flags)), (state, asked(*flags, "return_state"))):
                assert type(got[0]) is type(first)
                for x, y in zip(got, (first, *(alone[flag] for flag in flags)), strict=True):
                    torch.testing.assert_close(x, y)


@pytest.mark.parametrize("window", [None, (None, 0)])
def test_scores_of_a_jagged_batch_are_jagged(window, device):
    h, w = torch.randn(7, 3, device=device), torch.randn(3, device=device)
    cu = torch.tensor([0, 3, 3, 7], device=device, dtype=torch.int32)
    jagged = torch.nested.nested_tensor_from_jagged(h, cu.long())
    options = {"window": window, "return_scores": True, "return_lse": True}
    want = location_attention(h, w, cu_seqlens=cu, **options)
    got = location_attention(jagged, w, **options)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.values() if x.is_nested else x, y)
    assert got[1].is_nested
    assert all(x.is_nested == (window is not None) for x in (got[0], got[2]))


COMPOSED = ("concat", "concat, one query", "distance", "general", "general, ragged", "location", "graph")


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", COMPOSED)
def test_a_state_composes(name, dtype, impl, device):
    """Compiled in one graph, and under `func.grad`, a state has the gradients that it has; they have theirs."""
    torch.compiler.reset()  # all of these are one function to Dynamo
    case = dataclasses.replace(PAIRS[name], dtype=dtype)
    tensors = case.tensors(device)
    first = next(iter(tensors))
    call = returning(case, return_state=True)

    def loss(x: Tensor, impl: str = impl) -> Tensor:
        state = call(impl=impl, **{**tensors, first: x})
        return state.out.sin().sum() + finite(state.lse).sin().sum()

    x = tensors[first].clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(x), x, create_graph=True)
    assert want.any()
    (compiled,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x), x)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.01}
    for got in (compiled, func.grad(loss)(x.detach())):
        torch.testing.assert_close(got, want, **tolerance)
    if dtype == torch.float32:
        (reference,) = torch.autograd.grad(loss(x, "reference"), x, create_graph=True)
        (got,) = torch.autograd.grad(want.square().sum(), x)
        torch.testing.assert_close(got, torch.autograd.grad(reference.square().sum(), x)[0], **tolerance)


# --- The merge itself -----------------------------------------------------------------------------------------------


def states(*rows: int, parts: int = 3, width: int = 4, dtype: torch.dtype = torch.float64) -> State:
    """Stacked states, of which the first saw no key in some rows, and of one row none did."""
    rng = torch.Generator().manual_seed(parts)
    out, m, log_l = (torch.randn(parts, *rows, *more, generator=rng).to(dtype) for more in ((width,), (), ()))
    blind = torch.zeros(parts, *rows, dtype=torch.bool)
    blind[0, ..., ::2] = True
    blind[..., -1] = True
    m, log_l = m.masked_fill(blind, -torch.inf), log_l.abs().masked_fill(blind, -torch.inf)
    return State(out.masked_fill(blind[..., None], 0), m, log_l)


def textbook(out: Tensor, m: Tensor, log_l: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of the parts as if each were one key with the score m + log_l."""
    lse = m + log_l
    blind = (lse == -torch.inf).all(0)
    shares = torch.softmax(lse.masked_fill(blind, 0), 0).masked_fill(blind, 0)
    return (shares[..., None] * out).sum(0), torch.logsumexp(lse, 0)


@pytest.mark.parametrize("rows", [(5,), (2, 3, 7), (1,)])
def test_a_merge_is_a_softmax_of_parts(rows):
    given = states(*rows)
    got = merge(given, stacked=True)
    out, lse = textbook(*given)
    torch.testing.assert_close(got.out, out)
    torch.testing.assert_close(got.lse, lse)
    assert torch.equal(got.m, given.m.amax(0))


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_order_and_steps_of_a_merge_do_not_matter(order):
    parts = [State(*each) for each in zip(*states(5, parts=4), strict=True)]
    want = merge(parts)
    a, b, c, d = (parts[i] for i in order)
    for got in (
        merge([a, b, c, d]),
        merge([merge([a, b]), merge(iter((c, d)))]),
        merge([merge([merge([a]), b, c]), d]),
        merge([tuple(a), b, tuple(c), d]),
    ):
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y)


def test_scores_so_large_that_their_sum_has_no_room_beside_them():
    """m + log l in float32 would be off by 64 here."""
    m = torch.tensor([[1e9, -3e38], [1e9, 3e38]])
    given = State(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), m, torch.tensor([[0.5, 1.0], [0.0, 1.0]]))
    got = merge(given, stacked=True)
    shares = torch.softmax(torch.tensor([0.5, 0.0]), 0)
    torch.testing.assert_close(got.out, torch.stack([shares[0] + 3 * shares[1], torch.tensor(4.0)])[:, None])
    log_l = torch.logsumexp(torch.tensor([[0.5, 0.0], [1.0, -torch.inf]]), -1)
    torch.testing.assert_close(got.log_l, log_l)


def results(out: Tensor, m: Tensor, log_l: Tensor) -> tuple[Tensor, Tensor]:
    """What depends on m + log_l alone: m is a constant, and log_l has all."""
    state = merge(State(out, m, log_l), stacked=True)
    return state.out, finite(state.lse)


def loss(*state: Tensor, of=results) -> Tensor:
    out, lse = of(*state)
    return (out.square().sum() + (lse * torch.arange(1, 1 + lse.numel()).reshape(lse.shape)).sum()).tanh()


def test_gradients_of_a_merge_are_those_of_the_textbook():
    given = [x.requires_grad_() for x in states(6)]
    got = torch.autograd.grad(loss(*given), given)
    want = torch.autograd.grad(loss(*(x[:, :-1] for x in given), of=textbook), given)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g[:, :-1], w[:, :-1])
        assert (g[:, -1] == 0).all()  # where no part saw a key


def test_finite_differences_of_a_merge():
    out, m, log_l = (x[1:, :3].clone().requires_grad_() for x in states(4))
    torch.autograd.gradcheck(results, (out, m, log_l))
    torch.autograd.gradgradcheck(results, (out, m, log_l))


def test_a_merge_composes():
    given = states(4)
    want = func.grad(loss, argnums=(0, 1, 2))(*given)
    for call in (
        torch.compile(func.grad(loss, argnums=(0, 1, 2)), backend="aot_eager", fullgraph=True),
        lambda *x: torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*x), x),
    ):
        for got, x in zip(call(*(x.clone().requires_grad_() for x in given)), want, strict=True):
            torch.testing.assert_close(got, x)
    batch = tuple(torch.stack([x, x.flip(1)]) for x in given)
    each = torch.vmap(func.grad(loss))(*batch)
    torch.testing.assert_close(each[1], func.grad(loss)(*(x[1] for x in batch)))
    exported = torch.export.export(Merged(), given).module()(*given)
    for x, y in zip(exported, merge(given, stacked=True), strict=True):
        torch.testing.assert_close(x, y)


class Merged(torch.nn.Module):
    def forward(self, *state: Tensor) -> tuple[Tensor, ...]:
        return tuple(merge(State(*state), stacked=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_of_16_bits_are_merged_in_float32(dtype):
    wide = states(5, dtype=torch.float32)
    narrow = State(wide.out.to(dtype), wide.m, wide.log_l)
    got, want = (merge(x, stacked=True) for x in (narrow, narrow._replace(out=narrow.out.float())))
    assert all(x.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(got, want, strict=True))
    parts = [State(narrow.out[0], wide.m[0], wide.log_l[0]), State(wide.out[1], wide.m[1], wide.log_l[1])]
    assert all(x.dtype == torch.float32 for x in merge(parts))


def one(*rows: int) -> State:
    return State(*(torch.zeros((*rows, *more)) for more in ((4,), (), ())))


JAGGED = State(*(torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 1, 3])) for x in one(3)))
THERE = State(*(x.to("meta") for x in one(2)))


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ([], ValueError, "states: expected one State or more; got none"),
        (3, TypeError, "states: expected a sequence of them; got "),
        (torch.zeros(3), TypeError, "states: expected a sequence of them; got "),
        ([one(2), torch.zeros(3)], TypeError, "states[1]: expected a State, (out, m, log_l); got a Tensor"),
        (
            [(one(2), torch.zeros(3))],
            TypeError,
            "states[0]: expected a State, (out, m, log_l); got a tuple: a call's results, of which the state is the",
        ),
        ([(torch.zeros(3), None, None)], TypeError, "states[0].m: expected a torch.Tensor; got NoneType"),
        ([one(2), one(3)], ValueError, "states[1]: expected out of shape (2, 4), from states[0]; got (3, 4)"),
        ([one(2)._replace(m=torch.zeros(3))], ValueError, "states[0].m: expected shape (2,), from out; got (3,)"),
        ([one(2)._replace(log_l=torch.ones(2).int())], TypeError, "states[0].log_l: expected a floating dtype; got "),
        ([one(2)._replace(m=THERE.m)], ValueError, "states[0].m: expected cpu, from states[0].out; got meta"),
        ([one(2), THERE], ValueError, "states[1]: expected cpu, from states[0]; got meta"),
        (
            one(3, 2),
            TypeError,
            "states: expected a sequence of them; got one State, merged already; where",
        ),
        (JAGGED, TypeError, "states: expected a sequence of them; got one State, merged already; where"),
    ],
)
def test_a_bad_merge_names_what_is_wrong(given, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        merge(given)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (one(0, 2), ValueError, "states.out: expected shape (P, *rows, Dv) with P >= 1; got (0, 2, 4)"),
        (one(), ValueError, "states.out: expected shape (P, *rows, Dv) with P >= 1; got (4,)"),
        (
            one(3, 2)._replace(log_l=torch.zeros(3)),
            ValueError,
            "states.log_l: expected shape (3, 2), from out; got (3,)",
        ),
        ([one(2), one(2)], TypeError, "states: expected a State, (out, m, log_l); got a list"),
        (
            JAGGED,
            TypeError,
            "states.out: expected a dense tensor, jagged states come in a sequence; got a jagged one",
        ),
    ],
)
def test_a_bad_stacked_merge_names_what_is_wrong(given, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        merge(given, stacked=True)


def test_whether_states_are_stacked_is_a_bool():
    with pytest.raises(TypeError, match=r"^stacked: expected True or False; got 0"):
        merge([one(2)], stacked=0)
