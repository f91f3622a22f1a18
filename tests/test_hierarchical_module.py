"""`HierarchicalAttention` and `RaggedRNN`."""

import functools
import itertools

import pytest
import torch
from _compare import IMPLS
from _location import offsets
from torch import nn

from fused_attn import HierarchicalAttention, RaggedRNN
from fused_attn._ragged_rnn import ragged_rnn

D, A = 3, 4
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
        "inner.proj.weight": (4, D),
        "inner.gate.weight": (4, D),
        "inner.score.weight": (1, 4),
        "inner.context.weight": (4, 2),
        "outer.proj.weight": (5, 6),
        "outer.gate.weight": (5, 6),
        "outer.score.weight": (1, 5),
        "outer.context.weight": (5, 7),
    }
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
        h,
        sentences,
        documents,
        mask=mask,
        inner_context=contexts[0],
        outer_context=contexts[1],
        return_segments=True,
        return_weights=True,
        impl=impl,
    )
    segments, inner_weights = module.inner(
        h, cu_seqlens=sentences, mask=mask, context=contexts[0], return_weights=True, impl=impl
    )
    out, outer_weights = module.outer(
        segments, cu_seqlens=documents, mask=sentences.diff() > 0, context=contexts[1], return_weights=True, impl=impl
    )
    for x, y in zip(got[:4], (out, segments, inner_weights, outer_weights), strict=True):
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
            assert RaggedRNN(rnn.to(device))(torch.zeros(0, D).to(device), offsets(counts, device)).shape == (
                0,
                width,
            )


def test_contexts_and_their_widths_go_together(device):
    with pytest.raises(ValueError, match=r"^outer_context: expected None, since outer_context_dim is None; got a"):
        HierarchicalAttention(D, A)(*batch("cpu"), outer_context=torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"^inner_context: expected a tensor, by inner_context_dim; got None"):
        HierarchicalAttention(D, A, inner_context_dim=2)(*batch("cpu"))
