"""What is asked of concat and of general attention alike, for their test files."""

import dataclasses

import _concat
import _general
import pytest
import torch
from _compare import assert_close, assert_zero, evaluate, largest
from _concat import ACTIVATIONS, hide

WINDOWS = (None, (None, 0), (None, -1), (0, None), (3, 4), (5, -1), (-2, 9))
OPTIONS = {  # of both, as factors
    "activation": ACTIVATIONS,
    "mask": ("none", "keys", "padding", "pairs", "empty", "expanded"),
    "window": WINDOWS,
    "score_bias": (None, "bhqk", "hqk", "q1", "k", "bH1k", "1"),
    "layout": ("contiguous", "transposed", "strided", "expanded"),
    "dropout_p": (0.0, 0.3),
    "return_weights": (True, False),
    "through": (("output", "weights"), ("output",)),
}
each_family = pytest.mark.parametrize("make", [_concat.Case, _general.Case], ids=["concat", "general"])
each_way_to_be_empty = pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"queries": 0}, {"keys": 0}, {"queries": 0, "keys": 0}], ids=str
)
each_way_to_be_blind = pytest.mark.parametrize(
    "form",
    [{"mask": "keys"}, {"mask": "pairs"}, {"window": (-40, None)}, {"window": (None, -21)}],
    ids=["keys", "pairs", "window", "past window"],
)


def check_empty(case: _concat.Case, impl: str, device: torch.device) -> None:
    """Without queries or keys: results of the right shape, and nothing but zeros."""
    tensors = case.tensors(device)
    result = evaluate(case.op, tensors, impl)
    assert_zero(result)
    *lead, queries, _ = tensors["query"].shape
    values = tensors["value" if "value" in tensors else "key"]
    assert result.outputs["output"].shape == (*lead, queries, values.shape[-1])
    if case.return_weights:
        assert result.outputs["weights"].shape == (*lead, queries, tensors["key"].shape[-2])


def check_blind(case: _concat.Case, impl: str, device: torch.device) -> None:
    """No query sees a key, by the window or by a mask that hides all."""
    tensors = case.tensors(device)
    if "mask" in tensors:
        tensors["mask"] = torch.zeros_like(tensors["mask"])
    assert_zero(evaluate(case.op, tensors, impl))


def check_some_blind(case: _concat.Case, impl: str, device: torch.device) -> None:
    """Some queries see nothing: they have zeros, and the others what is theirs."""
    tensors = case.tensors(device)
    result = evaluate(case.op, tensors, impl)
    blind = ~tensors["mask"].any(-1)
    assert blind.any()
    assert not blind.all()
    rows = [result.gradients[name] for name in ("query", "score_bias") if name in tensors]
    for x in (*result.outputs.values(), *rows):
        assert largest(x[blind]) == 0
        assert (x[~blind].abs().amax(-1) > 0).all()


def check_hidden(case: _concat.Case, fill: float, impl: str, device: torch.device) -> None:
    """What is masked may hold `fill`: it is not read, and has no gradient."""
    tensors = case.tensors(device)
    clean = evaluate(case.op, tensors, impl)
    hidden = hide(tensors, fill)
    result = evaluate(case.op, tensors, impl)
    assert_close(result, clean)
    for name, rows in hidden.items():
        grad = result.gradients[name]
        assert largest((grad if case.heads is None else grad.transpose(1, 2))[rows]) == 0, name


def as_padded(case: _concat.Case, fill: float):
    """The same operator on packed rows, through a padded batch whose padding holds `fill`."""
    padded = dataclasses.replace(case, ragged=False, return_weights=False)

    def padded_op(*, impl, query, key, value, cu_seqlens_q, cu_seqlens_k, mask=None, **parameters):
        def at(cu):
            lengths = cu.diff()
            segment = torch.repeat_interleave(torch.arange(len(lengths), device=cu.device), lengths)
            rows = torch.arange(int(cu[-1]), device=cu.device)
            return (segment, rows - cu[segment]), (len(lengths), int(lengths.max()) + 3)

        (at_q, q_shape), (at_k, k_shape) = at(cu_seqlens_q), at(cu_seqlens_k)

        def pad(x, at, shape):
            y = x.new_full((*shape, *x.shape[1:]), fill).index_put(at, x)
            return y if case.heads is None else y.transpose(1, 2)

        all_seen = torch.tensor(True, device=query.device)
        q_mask, k_mask = (
            torch.zeros(shape, dtype=torch.bool, device=query.device).index_put(at, seen)
            for at, shape, seen in ((at_q, q_shape, all_seen), (at_k, k_shape, all_seen if mask is None else mask))
        )
        out = padded.op(
            impl=impl,
            query=pad(query, at_q, q_shape),
            key=pad(key, at_k, k_shape),
            value=pad(value, at_k, k_shape),
            mask=q_mask[:, :, None] & k_mask[:, None],
            **parameters,
        )
        return (out if case.heads is None else out.transpose(1, 2))[at_q]

    return padded_op
