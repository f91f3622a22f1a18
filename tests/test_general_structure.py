"""General attention: windows, nothing to attend to, padding that is never read, ragged rows, dropout."""

import dataclasses
import sys

import pytest
import torch
from _compare import (
    assert_as_exact,
    assert_close,
    assert_identical,
    evaluate,
    in_double,
    largest,
    rough_runs,
    strided_offsets,
)
from _concat import ALL, compare, offsets
from _general import Case, hide, operator

from fused_attn import general_attention

every_impl = pytest.mark.parametrize("impl", ALL)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
both_forms = pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
both_values = pytest.mark.parametrize("own_value", [True, False], ids=["values", "keys"])


# --- Windows ---------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@both_forms
def test_tiles_outside_the_window_are_skipped(ragged, device):
    """Values there are not read: they are tiles away from all that is visible."""
    case = Case(batch=1, queries=20, keys=350, attn_dim=2, window=(3, 4), ragged=ragged, return_weights=False)
    tensors = case.tensors(device)
    clean = evaluate(case.op, tensors, "triton", wrt=["query", "key"])
    tensors["value"].view(350, -1)[300:] = torch.nan
    got = evaluate(case.op, tensors, "triton", wrt=["query", "key"])
    got.gradients["key"].view(350, -1)[288:] = 0  # of those keys' own gradients NaN · 0 may be NaN
    assert_identical(got, clean)


@every_impl
def test_window_alone_is_the_mask_that_it_stands_for(impl, device):
    case = Case(batch=1, queries=19, keys=35, attn_dim=3, window=(5, -1))
    tensors = case.tensors(device)
    i, j = torch.arange(19, device=device)[:, None], torch.arange(35, device=device)
    mask = (i - 5 <= j) & (j <= i - 1)
    masked = operator(return_weights=True, scale=case.scale)
    assert_close(evaluate(case.op, tensors, impl), evaluate(masked, tensors | {"mask": mask[None]}, impl))


@every_impl
@pytest.mark.parametrize("far", [2**31 - 1, 2**31, sys.maxsize])
def test_sides_past_any_length_are_open_or_hide_all(far, impl, device):
    case = Case(batch=1, queries=19, keys=35, attn_dim=3)
    tensors = case.tensors(device)
    every = evaluate(case.op, tensors, impl)
    for window in ((None, far), (far, None), (far, far)):
        assert_close(evaluate(dataclasses.replace(case, window=window).op, tensors, impl), every)
    for window in ((None, -far), (-far, None)):
        assert_zero(evaluate(dataclasses.replace(case, window=window).op, tensors, impl))


# --- Nothing to attend to ----------------------------------------------------------------------------------------


def assert_zero(result):
    """Zeros everywhere: not NaN, and not the poison of unwritten memory."""
    for family in result:
        for name, x in family.items():
            assert largest(x) == 0, name


@every_impl
@both_values
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"keys": 0}, {"queries": 0, "keys": 0}], ids=str)
def test_empty_batches_give_zeros(sizes, weights, own_value, impl, device):
    case = Case(**sizes, heads=2, own_value=own_value, mask="pairs", weight="heads", return_weights=weights)
    case = dataclasses.replace(case, score_bias="bhqk" if weights else None)
    tensors = case.tensors(device)
    result = evaluate(case.op, tensors, impl)
    assert_zero(result)
    *lead, queries, _ = tensors["query"].shape
    assert result.outputs["output"].shape == (*lead, queries, 12 if own_value else 9)
    if weights:
        assert result.outputs["weights"].shape == (*lead, queries, tensors["key"].shape[-2])


@every_impl
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("lengths", [[], [(0, 0)], [(0, 3)], [(3, 0)], [(3, 0), (0, 3)]], ids=str)
def test_ragged_batches_without_pairs_give_zeros(lengths, heads, impl, device):
    case = Case(
        queries=sum(q for q, _ in lengths), keys=sum(k for _, k in lengths), attn_dim=3, heads=heads, ragged=True
    )
    cu = {f"cu_seqlens_{side}": offsets([pair[i] for pair in lengths], device) for i, side in enumerate("qk")}
    result = evaluate(case.op, case.tensors(device) | cu, impl)
    assert_zero(result)
    assert result.outputs["output"].shape == (case.queries, *(() if heads is None else (heads,)), 12)


@every_impl
@both_values
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("form", ["keys", "pairs", "window", "past window"])
def test_queries_that_see_nothing_give_zeros(form, weights, own_value, impl, device):
    window = {"window": (-40, None), "past window": (None, -21)}.get(form)
    mask = form if window is None else "none"
    case = Case(attn_dim=3, value_dim=3, own_value=own_value, window=window, mask=mask, return_weights=weights)
    tensors = case.tensors(device)
    if window is None:
        tensors["mask"] = torch.zeros_like(tensors["mask"])
    assert_zero(evaluate(case.op, tensors, impl))


@every_impl
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no weights"])
def test_some_queries_that_see_nothing_leave_the_others_alone(weights, impl, device):
    case = Case(attn_dim=3, value_dim=3, mask="pairs", return_weights=weights)
    tensors = case.tensors(device)
    result = evaluate(case.op, tensors, impl)
    blind = ~tensors["mask"].any(-1)
    assert blind.any()
    assert not blind.all()
    for x in (*result.outputs.values(), result.gradients["query"]):
        assert largest(x[blind]) == 0
        assert (x[~blind].abs().amax(-1) > 0).all()


# --- Padding ---------------------------------------------------------------------------------------------------


@every_impl
@both_values
@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
@pytest.mark.parametrize("mask", ["keys", "pairs"])
@pytest.mark.parametrize("weight", ["none", "heads"])
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no weights"])
def test_masked_rows_are_never_read_and_have_zero_gradients(weights, weight, mask, fill, own_value, impl, device):
    case = Case(
        batch=1,
        queries=7,
        keys=35,
        attn_dim=3,
        value_dim=3,
        heads=2,
        mask=mask,
        weight=weight,
        own_value=own_value,
        return_weights=weights,
    )
    tensors = case.tensors(device)
    clean = evaluate(case.op, tensors, impl)
    hidden = hide(tensors, fill)
    result = evaluate(case.op, tensors, impl)
    assert_close(result, clean)
    for name, rows in hidden.items():
        assert largest(result.gradients[name].transpose(1, 2)[rows]) == 0, name


@every_impl
@each_dtype
def test_masked_rows_are_never_read_in_any_dtype(dtype, impl, device):
    case = Case(dtype=dtype, batch=1, attn_dim=3, mask="pairs", window=(9, None))
    tensors = case.tensors(device)
    clean = evaluate(case.op, tensors, impl)
    hide(tensors, torch.nan)
    assert_close(evaluate(case.op, tensors, impl), clean)


def as_padded(case: Case, fill: float):
    """The same operator on packed rows, through a padded batch whose padding holds `fill`."""

    def padded_op(*, impl, query, key, value, cu_seqlens_q, cu_seqlens_k):
        def at(cu):
            lengths = cu.diff()
            segment = torch.repeat_interleave(torch.arange(len(lengths), device=cu.device), lengths)
            rows = torch.arange(int(cu[-1]), device=cu.device)
            return (segment, rows - cu[segment]), (len(lengths), int(lengths.max()) + 3)

        def pad(x, at, shape):
            return x.new_full((*shape, *x.shape[1:]), fill).index_put(at, x).transpose(1, 2)

        (at_q, q_shape), (at_k, k_shape) = at(cu_seqlens_q), at(cu_seqlens_k)
        seen = torch.tensor(True, device=query.device)
        q_mask, k_mask = (
            torch.zeros(shape, dtype=torch.bool, device=query.device).index_put(at, seen)
            for at, shape in ((at_q, q_shape), (at_k, k_shape))
        )
        out = general_attention(
            pad(query, at_q, q_shape),
            pad(key, at_k, k_shape),
            pad(value, at_k, k_shape),
            impl=impl,
            scale=case.scale,
            mask=q_mask[:, :, None] & k_mask[:, None],
            window=case.window,
            dropout_p=case.dropout_p,
        )
        return out.transpose(1, 2)[at_q]

    return padded_op


@every_impl
@pytest.mark.parametrize("window", [None, (4, -1)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_padded_and_ragged_forms_of_the_same_batch_agree(dropout_p, window, impl, device):
    lengths = {"q": [7, 0, 3, 1, 18], "k": [5, 2, 0, 34, 9]}
    case = Case(queries=29, keys=50, attn_dim=3, heads=2, ragged=True, dropout_p=dropout_p, window=window)
    tensors = case.tensors(device) | {f"cu_seqlens_{side}": offsets(x, device) for side, x in lengths.items()}
    exact = evaluate(case.op, in_double(tensors), "reference")
    rough = rough_runs(case.op, tensors)
    assert_as_exact(evaluate(as_padded(case, torch.nan), tensors, impl), rough, exact)
    assert_as_exact(evaluate(case.op, tensors, impl), rough, exact)


@every_impl
def test_offsets_of_any_stride_are_those_offsets(impl, device):
    case = Case(queries=29, keys=50, attn_dim=3, ragged=True)
    tensors = case.tensors(device)
    assert_identical(evaluate(case.op, strided_offsets(tensors), impl), evaluate(case.op, tensors, impl))


# --- Dropout ---------------------------------------------------------------------------------------------------


def dropped_weights(device, impl, *, seed=0, scale=0.0, sizes=(2, 5, 70)):
    """Weights after dropout, read off as the output for unit vectors as values; and these values."""
    batch, queries, keys = sizes
    rng = torch.Generator().manual_seed(3)
    query, key = (torch.randn(batch, 2, n, 2, generator=rng).to(device) for n in (queries, keys))
    value = torch.eye(keys, device=device).repeat(batch, 2, 1, 1).requires_grad_()
    torch.manual_seed(seed)
    return general_attention(query, key, value, scale=scale, dropout_p=0.3, impl=impl), value


@every_impl
def test_weights_are_dropped_at_the_rate_and_the_kept_ones_scaled(impl, device):
    dropped, _ = dropped_weights(device, impl)
    kept = dropped != 0
    spread = (0.3 * 0.7 / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - 0.7) < 4 * spread
    torch.testing.assert_close(dropped[kept] * 70, torch.full_like(dropped[kept], 1 / 0.7))


@every_impl
def test_sequences_heads_queries_and_seeds_drop_differently(impl, device):
    kept = dropped_weights(device, impl)[0] != 0
    other = dropped_weights(device, impl, seed=1)[0] != 0
    assert len(kept.flatten(0, 2).unique(dim=0)) == 2 * 2 * 5
    assert (kept != other).any(-1).all()


@every_impl
def test_backward_drops_what_forward_dropped(impl, device):
    dropped, value = dropped_weights(device, impl, scale=0.5)
    (grad,) = torch.autograd.grad(dropped.sum(), value)  # row j of it is the sum of weights j, over all features
    torch.testing.assert_close(grad, dropped.sum(2)[..., None].expand_as(grad))


@pytest.mark.kernel
@both_values
@both_forms
@pytest.mark.parametrize("dropout_p", [0.1, 0.999])
def test_every_implementation_drops_the_same_weights(dropout_p, ragged, own_value, device):
    case = Case(queries=18, keys=40, heads=2, ragged=ragged, own_value=own_value, dropout_p=dropout_p)
    for seed in (1, 2):
        compare(case.op, case.tensors(device), "triton", seed=seed)


@every_impl
def test_no_dropout_draws_no_random_number(impl, device):
    case = Case(batch=1, attn_dim=3)
    state = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state()
    case.op(impl=impl, **case.tensors(device))
    assert torch.equal(state, torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state())


@every_impl
def test_returned_weights_are_those_before_dropout(impl, device):
    case = Case(batch=1, attn_dim=3, heads=2)
    tensors = case.tensors(device)
    plain = evaluate(case.op, tensors, impl, through=["weights"])
    dropped = evaluate(dataclasses.replace(case, dropout_p=0.5).op, tensors, impl, through=["weights"])
    assert torch.equal(plain.outputs["weights"], dropped.outputs["weights"])
    assert not torch.equal(plain.outputs["output"], dropped.outputs["output"])
    for name in ("query", "key"):
        assert torch.equal(plain.gradients[name], dropped.gradients[name]), name
