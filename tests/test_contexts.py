"""Contexts of location attention and statistics pooling in all their forms, and several together."""

import pytest
import torch
from _compare import IMPLS, evaluate
from _location import offsets

from fused_attn import ConcatAttention, LocationAttention, location_attention, reference, statistics_pooling

B, T, D, A = 3, 7, 5, 4
LENGTHS = (4, 0, 3)


def inputs(device, *, packed=False, score="mlp"):
    torch.manual_seed(0)
    rows = (sum(LENGTHS),) if packed else (B, T)
    inner = (A,) if score != "linear" else ()
    made = {"h": torch.randn(*rows, A if score == "projected" else D)}
    if score != "projected":
        made["w"] = torch.randn(D, *inner)
    if score != "linear":
        made["v"] = torch.randn(A)
    made |= {"sequence": torch.randn(B, *inner), "row": torch.randn(*rows, *inner), "more": torch.randn(B, *inner)}
    return {name: x.to(device) for name, x in made.items()}


def same(got, want):
    for kind, of_got, of_want in zip(got._fields, got, want, strict=True):
        for name, x in of_want.items():
            torch.testing.assert_close(of_got[name], x, msg=lambda text, at=f"{kind} {name}": f"{at}: {text}")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("score", ["mlp", "linear", "projected"])
@pytest.mark.parametrize("form", ["padded", "packed", "jagged"])
def test_several_contexts_are_their_sum(form, score, impl, device):
    packed = form != "padded"
    tensors = inputs(device, packed=packed, score=score)
    cu = offsets(LENGTHS, device)
    segment = torch.repeat_interleave(torch.arange(B), torch.tensor(LENGTHS)).to(device)
    structure = {"cu_seqlens": cu} if packed else {}

    def op(*, impl, h, v=None, w=None, sequence, row, more):
        contexts = [sequence[:, None], row[None] if packed else row, more[:, None]]
        given = structure
        if form == "jagged":
            nested = [torch.nested.nested_tensor_from_jagged(x, cu.long()) for x in (h, row)]
            h, contexts, given = nested[0], (sequence, nested[1], more[:, None]), {}
        return location_attention(h, w, v=v, context=contexts, **given, impl=impl)

    def by_hand(*, impl, h, v=None, w=None, sequence, row, more):
        total = sequence + more
        total = row + (total[segment] if packed else total[:, None])
        return location_attention(h, w, v=v, context=total[None] if packed else total, **structure, impl=impl)

    same(evaluate(op, tensors, impl), evaluate(by_hand, tensors, impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [T, 1])
def test_a_context_of_one_row_is_one_a_sequence(rows, impl, device):
    tensors = inputs(device)
    tensors = {"h": tensors["h"][:, :rows], **{name: tensors[name] for name in ("w", "v", "sequence", "more")}}
    mask = torch.ones(B, rows, dtype=torch.bool, device=device)
    mask[0] = False

    def op(*, impl, h, w, v, sequence, more):
        context = sequence[:, None] if more is None else [sequence[:, None], more]
        return location_attention(h, w, v=v, context=context, mask=mask, return_weights=True, impl=impl)

    def by_hand(*, impl, h, w, v, sequence, more):
        context = sequence + (0 if more is None else more)
        return location_attention(h, w, v=v, context=context, mask=mask, return_weights=True, impl=impl)

    same(evaluate(op, tensors, impl), evaluate(by_hand, tensors, impl))
    alone = {name: x for name, x in tensors.items() if name != "more"}

    def without(fn):
        return lambda **given: fn(**given, more=None)

    same(evaluate(without(op), alone, impl), evaluate(without(by_hand), alone, impl))


@pytest.mark.parametrize("score", ["linear", "mlp", "of one feature"])
def test_a_context_of_one_row_beside_jagged_rows_is_one_a_sequence(score, device):
    h = torch.randn(3, D, device=device)  # as many rows as sequences, so that what is said counts
    nested = torch.nested.nested_tensor_from_jagged(h, offsets((2, 0, 1), device).long())
    width = {"linear": (), "mlp": (A,), "of one feature": (1,)}[score]
    w, context = torch.randn(D, *width, device=device), torch.randn(3, *width, device=device)
    v = None if score == "linear" else torch.randn(*width, device=device)
    want = location_attention(h, w, None, v, context=context[:, None], cu_seqlens=offsets((2, 0, 1), device))
    for given in (context, context[:, None]):
        torch.testing.assert_close(location_attention(nested, w, None, v, context=given), want)
    with pytest.raises(ValueError, match=r"^context: expected a vector a sequence, S = 3 from h, or a jagged"):
        location_attention(nested, w, None, v, context=context[None])
    pool = LocationAttention(D, None if score == "linear" else A, context_dim=2).to(device)
    context = torch.randn(3, 2, device=device)
    torch.testing.assert_close(pool(nested, context=context[:, None]), pool(nested, context=context))


def test_a_context_of_one_row_is_not_expanded(monkeypatch, device):
    """The operator gets ``(B, A)``, and sums its gradient itself."""
    given = []
    formula = reference.location_attention
    monkeypatch.setattr("fused_attn.location.LOCATION.formula", lambda x: given.append(x) or formula(x))
    tensors = inputs(device)
    weights = {"context": tensors["sequence"][:, None], "return_lse": True, "impl": "reference"}
    location_attention(tensors["h"], tensors["w"], v=tensors["v"], **weights)
    assert given[0].context.shape == (B, A)
    assert not given[0].context_per_row


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_statistics_take_several_contexts(per_channel, impl, device):
    tensors = inputs(device)
    if per_channel:
        tensors["v"] = torch.randn(A, D, device=device)

    def op(*, impl, h, w, v, sequence, row, more):
        return statistics_pooling(h, w, None, v, context=(sequence, row, more[:, None]), impl=impl)

    def by_hand(*, impl, h, w, v, sequence, row, more):
        return statistics_pooling(h, w, None, v, context=row + (sequence + more)[:, None], impl=impl)

    same(evaluate(op, tensors, impl), evaluate(by_hand, tensors, impl))


def test_modules_take_a_context_of_one_row(device):
    h, context = torch.randn(B, T, D, device=device), torch.randn(B, 2, device=device)
    pool = LocationAttention(D, A, context_dim=2).to(device)
    torch.testing.assert_close(pool(h, context=context[:, None]), pool(h, context=context))
    attend = ConcatAttention(D, D, A, context_dims=(2, 2)).to(device)
    for queries in (1, 4, T):  # as many queries as keys is no riddle then
        query, of_query = torch.randn(B, queries, D, device=device), torch.randn(B, queries, 2, device=device)
        got = attend(query, h, contexts=[context[:, None], ("query", of_query)])
        torch.testing.assert_close(got, attend(query, h, contexts=[context, ("query", of_query)]))
