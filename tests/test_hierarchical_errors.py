"""Bad input to hierarchical attention, and its modules."""

import functools
import itertools

import pytest
import torch
from _compare import IMPLS
from _location import offsets
from torch import nn

from fused_attn import HierarchicalAttention, RaggedRNN, Score, hierarchical_attention
from fused_attn._ragged_rnn import ragged_rnn

N, S, G, D, A = 7, 3, 2, 3, 4


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def cu(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


GOOD = Score(zeros(D, A), zeros(A), zeros(A))


def call(device, **changed):
    """A good call with some arguments changed."""

    def move(x):
        if isinstance(x, Score):
            return Score(*map(move, x))
        if isinstance(x, tuple):
            return tuple(map(move, x))
        return x.to(device) if isinstance(x, torch.Tensor) else x

    good = {
        "h": zeros(N, D), "inner_offsets": cu(0, 3, 3, N), "outer_offsets": cu(0, 1, S), "inner": GOOD, "outer": GOOD,
    }  # fmt: skip
    return hierarchical_attention(**{name: move(x) for name, x in {**good, **changed}.items()})


WRONG_VALUES = {
    "h of rank 3": ("h", {"h": zeros(1, N, D)}),
    "h without features": ("h", {"h": zeros(N, 0)}),
    "inner_offsets of rank 2": ("inner_offsets", {"inner_offsets": cu(0, 3, 3, N)[None]}),
    "inner_offsets empty": ("inner_offsets", {"inner_offsets": cu()}),
    "outer_offsets of rank 0": ("outer_offsets", {"outer_offsets": cu(0)[0]}),
    "outer_offsets empty": ("outer_offsets", {"outer_offsets": cu()}),
    "mask of other rows": ("mask", {"mask": zeros(N + 1, dtype=torch.bool)}),
    "unknown impl": ("impl", {"impl": "cuda"}),
    "inner w of another width": (r"inner\.w", {"inner": GOOD._replace(w=zeros(D + 1, A))}),
    "outer w of another width": (r"outer\.w", {"outer": GOOD._replace(w=zeros(D + 1, A))}),
    "outer w missing": (r"outer\.w", {"outer": Score(None)}),
    "inner b of another width": (r"inner\.b", {"inner": GOOD._replace(b=zeros(A + 1))}),
    "inner v of another width": (r"inner\.v", {"inner": GOOD._replace(v=zeros(A + 1))}),
    "outer v with hops": (r"outer\.v", {"outer": GOOD._replace(v=zeros(A, 2))}),
    "inner w with hops": (r"inner\.w", {"inner": Score(zeros(D, 2))}),
    "inner gate of another width": (r"inner\.gate\[0\]", {"inner": GOOD._replace(gate=(zeros(D, A + 1), None))}),
    "outer context of another width": (r"outer\.context", {"outer": GOOD._replace(context=zeros(G, A + 1))}),
    "outer context of rows": (r"outer\.context", {"outer": GOOD._replace(context=zeros(N, A))}),
    "inner context of groups": (r"inner\.context", {"inner": GOOD._replace(context=zeros(G, A))}),
    "outer context where G = S": (
        r"outer\.context",
        {"outer": GOOD._replace(context=zeros(S, A)), "outer_offsets": cu(0, 1, 2, S)},
    ),
    "inner activation": (r"inner\.activation", {"inner": GOOD._replace(activation="softplus")}),
    "outer gate_activation": (r"outer\.gate_activation", {"outer": GOOD._replace(gate_activation="softplus")}),
    "between of another width": ("between", {"between": lambda segments, _: segments[:, :2]}),
    "between of other rows": ("between", {"between": lambda segments, _: segments[:2]}),
    "float64 for the kernel": (
        "impl",
        {
            "h": zeros(N, D).double(), "inner": Score(zeros(D).double()), "outer": Score(zeros(D).double()),
            "impl": "triton",
        },
    ),
}  # fmt: skip
WRONG_TYPES = {
    "h is a list": ("h", {"h": [[0.0] * D] * N}),
    "h of integers": ("h", {"h": zeros(N, D, dtype=torch.int64)}),
    "inner_offsets of int64": ("inner_offsets", {"inner_offsets": cu(0, 3, 3, N).long()}),
    "outer_offsets of int64": ("outer_offsets", {"outer_offsets": cu(0, 1, S).long()}),
    "outer_offsets is a list": ("outer_offsets", {"outer_offsets": [0, 1, S]}),
    "mask of numbers": ("mask", {"mask": zeros(N)}),
    "inner is a tuple": ("inner", {"inner": (zeros(D, A), zeros(A), zeros(A))}),
    "outer is a tensor": ("outer", {"outer": zeros(D)}),
    "inner w of another dtype": (r"inner\.w", {"inner": GOOD._replace(w=zeros(D, A, dtype=torch.float16))}),
    "outer gate is a tensor": (r"outer\.gate", {"outer": GOOD._replace(gate=zeros(D, A))}),
    "between is a number": ("between", {"between": 3}),
    "between of another dtype": ("between", {"between": lambda segments, _: segments.half()}),
    "between gives a pair": ("between", {"between": lambda segments, _: (segments, None)}),
}
WRONG_OFFSETS = {
    "inner not to N": {"inner_offsets": cu(0, 3, 3, N - 1)},
    "inner unsorted": {"inner_offsets": cu(0, 5, 3, N)},
    "outer not from 0": {"outer_offsets": cu(1, 2, S)},
    "outer past S": {"outer_offsets": cu(0, 1, S + 1)},
}


def by_title(table):
    return pytest.mark.parametrize(
        ("name", "changed"), [pytest.param(*row, id=title) for title, row in table.items()]
    )


@by_title(WRONG_VALUES)
def test_wrong_shapes_and_values_raise_value_error_with_the_name(name, changed, device):
    expected = "'triton' has no float64" if name == "impl" and "h" in changed else "expected .*; got "
    with pytest.raises(ValueError, match=rf"^{name}: {expected}"):
        call(device, **changed)


@by_title(WRONG_TYPES)
def test_wrong_types_raise_type_error_with_the_name(name, changed, device):
    with pytest.raises(TypeError, match=rf"^{name}: expected .*; got "):
        call(device, **changed)


@pytest.mark.parametrize("changed", WRONG_OFFSETS.values(), ids=WRONG_OFFSETS.keys())
def test_wrong_offsets_raise_value_error_with_the_name(changed):
    """On the CPU; on a GPU they stop the program, which a test cannot survive."""
    with pytest.raises(ValueError, match=rf"^{next(iter(changed))}: expected non-decreasing offsets from 0"):
        call(torch.device("cpu"), **changed, impl="reference")


def test_float64_is_for_the_reference(device):
    double = Score(zeros(D).double())
    assert call(device, h=zeros(N, D).double(), inner=double, outer=double).dtype == torch.float64


def test_compiled_calls_raise_the_same_errors(device):
    torch.compiler.reset()
    compiled = torch.compile(lambda: call(device, outer=GOOD._replace(v=zeros(A + 1))), backend="eager")
    with pytest.raises(ValueError, match=r"^outer\.v: expected "):
        compiled()


# --- Modules -----------------------------------------------------------------------------------------------------


LENGTHS, COUNTS = [3, 0, 1, 4, 2, 5], [2, 0, 3, 1]


def batch(device, dim=D):
    torch.manual_seed(0)
    return torch.randn(sum(LENGTHS), dim, device=device), offsets(LENGTHS, device), offsets(COUNTS, device)


def test_parameters_are_those_of_two_location_modules():
    module = HierarchicalAttention(
        D,
        4,
        5,
        between=nn.Identity(),
        between_dim=6,
        gated=True,
        inner_context_dim=2,
        outer_context_dim=7,
        bias=False,
    )
    assert {name: tuple(x.shape) for name, x in module.state_dict().items()} == {
        "inner.proj.weight": (4, D), "inner.gate.weight": (4, D), "inner.score.weight": (1, 4),
        "inner.context.weight": (4, 2), "outer.proj.weight": (5, 6), "outer.gate.weight": (5, 6),
        "outer.score.weight": (1, 5), "outer.context.weight": (5, 7),
    }  # fmt: skip
    plain = HierarchicalAttention(D, 4)
    assert {name: tuple(x.shape) for name, x in plain.state_dict().items()} == {
        f"{level}.{name}": shape
        for level in ("inner", "outer")
        for name, shape in {"proj.weight": (4, D), "proj.bias": (4,), "score.weight": (1, 4)}.items()
    }


@pytest.mark.parametrize("impl", IMPLS)
def test_forward_is_the_levels_one_after_the_other(impl, device):
    module = HierarchicalAttention(
        D, 4, 5, gated=True, activation="relu", inner_context_dim=2, outer_context_dim=6
    ).to(device)
    h, sentences, documents = batch(device)
    contexts = torch.randn(len(LENGTHS), 2, device=device), torch.randn(len(COUNTS), 6, device=device)
    mask = torch.ones(len(h), dtype=torch.bool, device=device)
    mask[0] = False
    got = module(
        h, sentences, documents, mask=mask, inner_context=contexts[0], outer_context=contexts[1],
        return_segments=True, return_weights=True, impl=impl,
    )  # fmt: skip
    segments, inner_weights = module.inner(
        h, cu_seqlens=sentences, mask=mask, context=contexts[0], return_weights=True, impl=impl
    )
    out, outer_weights = module.outer(
        segments, cu_seqlens=documents, mask=sentences.diff() > 0, context=contexts[1], return_weights=True, impl=impl
    )
    for x, y in zip(got, (out, segments, inner_weights, outer_weights), strict=True):
        torch.testing.assert_close(x, y)
    got.out.square().sum().backward()
    assert all(x.grad.count_nonzero() > 0 for x in module.parameters())


@pytest.mark.parametrize("impl", IMPLS)
def test_han_with_a_recurrent_layer_between(impl, device):
    """Against each document by itself, sentence by sentence."""
    rnn = nn.GRU(D, 2, bidirectional=True)
    module = HierarchicalAttention(D, 4, between=RaggedRNN(rnn), between_dim=4).to(device)
    h, sentences, documents = batch(device)
    out = module(h, sentences, documents, impl=impl)
    segments = module.inner(h, cu_seqlens=sentences)
    for group, (lo, hi) in enumerate(itertools.pairwise(documents.tolist())):
        seen = sentences.diff()[lo:hi] > 0
        if not seen.any():
            assert out[group].count_nonzero() == 0
            continue
        states = rnn(segments[lo:hi])[0]
        torch.testing.assert_close(out[group], module.outer(states[None], mask=seen[None])[0])
    out.square().sum().backward()
    assert all(x.grad.count_nonzero() > 0 for x in module.parameters())


@pytest.mark.parametrize("make", [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "batch_first": True, "num_layers": 2}], ids=str)
def test_ragged_rnn_runs_each_group_alone(make, options, device):
    rnn = make(D, 2, **options).to(device)
    rows = torch.randn(sum(COUNTS), D, device=device, requires_grad=True)
    alone = torch.cat([rnn(rows[lo:hi])[0] for lo, hi in itertools.pairwise([0, 2, 2, 5, 6]) if hi > lo])
    inputs, cotangent = [rows, *rnn.parameters()], torch.randn_like(alone)
    for layer in (RaggedRNN(rnn), functools.partial(ragged_rnn, rnn)):  # the second is what the compiler gets
        states = layer(rows, offsets(COUNTS, device))
        torch.testing.assert_close(states, alone)
        grads = (torch.autograd.grad(x, inputs, cotangent, retain_graph=True) for x in (states, alone))
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want)


def test_ragged_rnn_of_no_rows(device):
    for rnn, width in ((nn.GRU(D, 2, bidirectional=True), 4), (nn.LSTM(D, 5, proj_size=3), 3)):
        for counts in ([], [0, 0]):
            assert RaggedRNN(rnn.to(device))(zeros(0, D).to(device), offsets(counts, device)).shape == (0, width)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"dim": 0}, "dim"),
        ({"inner_dim": 0}, "inner_dim"),
        ({"outer_dim": 0}, "outer_dim"),
        ({"inner_context_dim": 0}, "inner_context_dim"),
        ({"outer_context_dim": 0}, "outer_context_dim"),
        ({"between": nn.Identity(), "between_dim": 0}, "between_dim"),
        ({"between_dim": 3}, "between_dim"),
        ({"activation": "softplus"}, "activation"),
        ({"between": 3}, "between"),
    ],
    ids=str,
)
def test_constructor_errors_name_the_argument(arguments, name):
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: expected .*; got "):
        HierarchicalAttention(**{"dim": D, "inner_dim": A, **arguments})


def test_contexts_and_their_widths_go_together(device):
    with pytest.raises(ValueError, match=r"^outer_context: expected None, since outer_context_dim is None; got a"):
        HierarchicalAttention(D, A)(*batch("cpu"), outer_context=zeros(4, 2))
    with pytest.raises(ValueError, match=r"^inner_context: expected a tensor, by inner_context_dim; got None"):
        HierarchicalAttention(D, A, inner_context_dim=2)(*batch("cpu"))
