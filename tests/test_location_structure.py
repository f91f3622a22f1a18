"""Splitting and merging, empty sequences, padding, and scores that are hard on a softmax."""

import functools

import pytest
import torch
from _compare import (
    IMPLS,
    assert_as_exact,
    assert_close,
    assert_identical,
    assert_matches_reference,
    assert_zero,
    evaluate,
    in_double,
    largest,
)
from _location import SCORES, Case, offsets, operator
from _marks import both_forms

from fused_attn.kernels import location as kernels
from fused_attn.kernels import location_bwd
from fused_attn.kernels.chip import H200

# --- Items: a sequence in parts, and their merge -----------------------------------------------------------------


@pytest.fixture
def short_items(monkeypatch):
    """Items of one tile, so that a hundred rows are several of them."""
    monkeypatch.setattr(kernels, "_rows_per_item", lambda call, ragged, block_t: block_t)


@pytest.mark.kernel
@both_forms
@pytest.mark.parametrize("score", ["mlp", "linear_hops"])
@pytest.mark.parametrize("value", [None, 7])
@pytest.mark.parametrize("mask", ["none", "empty"])
def test_sequences_in_parts_match_the_reference(short_items, mask, value, score, ragged, device):
    case = Case(rows=150, dim=9, score=score, value=value, ragged=ragged, mask=mask)
    assert_matches_reference(case.op, case.tensors(device))


@pytest.mark.kernel
@both_forms
def test_sequences_in_parts_with_wide_values_match_the_reference(short_items, ragged, device):
    case = Case(batch=2, rows=70, dim=9, attn_dim=3, value=600, ragged=ragged, mask="empty")
    assert_matches_reference(case.op, case.tensors(device))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sequences_in_parts_match_the_reference_in_16_bits(short_items, dtype, device):
    case = Case(dtype=dtype, rows=257, score="gated", ragged=True, mask="random", dropout_p=0.3)
    assert_matches_reference(case.op, case.tensors(device), dtype=dtype)


@pytest.mark.kernel
@both_forms
@pytest.mark.parametrize("score", ["gated", "mlp", "linear"])
def test_tiles_of_an_h200_match_the_reference(monkeypatch, score, ragged, device):
    """The largest, of widths that are whole tiles of wgmma."""
    if device.type == "cpu":
        for module, rule in ((kernels, "fwd_blocks"), (location_bwd, "bwd_blocks"), (location_bwd, "product_blocks")):
            chosen = functools.partial(lambda choose, chip, *sizes: choose(H200, *sizes), getattr(module, rule))
            monkeypatch.setattr(module, rule, chosen)
    case = Case(
        dtype=torch.bfloat16, batch=2, rows=300, dim=384, attn_dim=128, score=score, ragged=ragged, mask="random"
    )
    assert_matches_reference(case.op, case.tensors(device), dtype=case.dtype)


@pytest.mark.kernel
@both_forms
def test_many_parts_are_merged(monkeypatch, ragged, device):
    """More of them than the merge takes at a time."""
    monkeypatch.setattr(kernels, "_rows_per_item", lambda call, ragged, block_t: 16)
    case = Case(batch=1, rows=600, dim=5, score="linear", score_bias=True, ragged=ragged)
    assert_matches_reference(case.op, case.tensors(device))


@pytest.mark.kernel
@pytest.mark.parametrize("value", [None, 600])
def test_parts_of_segments_of_every_length_are_merged(short_items, value, device):
    lengths = [0, 1, 16, 0, 17, 64, 65, 130, 0, 33, 0]
    case = Case(rows=sum(lengths), dim=5, value=value, ragged=True, context="none")
    tensors = case.tensors(device) | {"cu_seqlens": offsets(lengths, device)}
    assert_matches_reference(case.op, tensors)


@pytest.mark.kernel
@both_forms
@pytest.mark.parametrize("context", ["row", "sequence"])
def test_workspace_smaller_than_the_batch_changes_nothing(monkeypatch, context, ragged, device):
    case = Case(
        rows=40,
        score="gated_hops",
        context=context,
        value=7,
        score_bias=True,
        mask="random",
        ragged=ragged,
        dropout_p=0.3,
    )
    tensors = case.tensors(device)
    whole = evaluate(case.op, tensors, "triton")
    monkeypatch.setattr(location_bwd, "WORKSPACE_BYTES", 1)
    assert_matches_reference(case.op, tensors)
    parts = evaluate(case.op, tensors, "triton")
    for name in ("h", "value", "context", "score_bias"):  # what is summed over rows sums in another order
        assert torch.equal(parts.gradients[name], whole.gradients[name]), name


@pytest.mark.kernel
@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_bitwise_equal(short_items, dtype, ragged, device):
    case = Case(dtype=dtype, rows=100, score="gated_hops", context="sequence", score_bias=True, ragged=ragged)
    tensors = case.tensors(device)
    assert_identical(evaluate(case.op, tensors, "triton"), evaluate(case.op, tensors, "triton"))


# --- Nothing to attend to ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("context", ["none", "sequence", "row"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("sizes", [{"batch": 0, "rows": 5}, {"rows": 0}], ids=["batch=0", "rows=0"])
def test_empty_batches_give_zeros(sizes, score, context, impl, device):
    case = Case(**sizes, score=score, context=context, value=7, score_bias=True, mask="random")
    tensors = case.tensors(device)
    result = evaluate(case.op, tensors, impl)
    assert_zero(result)
    batch, rows = tensors["h"].shape[:2]
    hops = (3,) if score.endswith("hops") else ()
    assert result.outputs["output"].shape == (batch, *hops, 7)
    assert result.outputs["weights"].shape == (batch, *hops, rows)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("context", ["none", "sequence", "row"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
def test_ragged_batches_without_rows_give_zeros(lengths, context, impl, device):
    case = Case(rows=0, score="gated_hops", ragged=True, context=context, value=7, score_bias=True)
    tensors = case.tensors(device) | {"cu_seqlens": offsets(lengths, device)}
    if context == "sequence":
        tensors["context"] = tensors["context"][: len(lengths)]
    result = evaluate(case.op, tensors, impl)
    assert_zero(result)
    assert result.outputs["output"].shape == (len(lengths), 3, 7)
    assert result.outputs["weights"].shape == (0, 3)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("score", SCORES)
@both_forms
def test_sequences_that_see_nothing_give_zeros(ragged, score, impl, device):
    case = Case(rows=40, score=score, context="row", value=7, score_bias=True, mask="random", ragged=ragged)
    tensors = case.tensors(device)
    tensors["mask"] = torch.zeros_like(tensors["mask"])
    assert_zero(evaluate(case.op, tensors, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_one_sequence_that_sees_nothing_leaves_the_others_alone(impl, device):
    case = Case(rows=40, score="mlp_hops", context="sequence", score_bias=True, mask="random")
    tensors = case.tensors(device)
    tensors["mask"][1] = False
    result = evaluate(case.op, tensors, impl)
    for family, names in (
        (result.outputs, ("output", "weights")),
        (result.gradients, ("h", "context", "score_bias")),
    ):
        for name in names:
            assert largest(family[name][1]) == 0, name
    others = {name: x[[0, 2]] if name in ("h", "context", "score_bias", "mask") else x for name, x in tensors.items()}
    alone = case.op(impl=impl, **others)
    for name, x in zip(("output", "weights"), alone, strict=True):
        torch.testing.assert_close(result.outputs[name][[0, 2]], x)


# --- Padding -----------------------------------------------------------------------------------------------------


def as_padded(op, fill):
    """The same operator on packed rows, through a padded batch whose padding holds `fill`."""

    def padded_op(*, impl, cu_seqlens, h, context=None, value=None, score_bias=None, **parameters):
        lengths = cu_seqlens.diff()
        rows = torch.arange(len(h), device=h.device)
        segment = torch.repeat_interleave(torch.arange(len(lengths), device=h.device), lengths)
        at = segment, rows - cu_seqlens[segment]
        shape = len(lengths), int(lengths.max()) + 5

        def pad(x):
            return None if x is None else x.new_full((*shape, *x.shape[1:]), fill).index_put(at, x)

        mask = torch.zeros(shape, dtype=torch.bool, device=h.device).index_put(
            at, torch.tensor(True, device=h.device)
        )
        context = None if context is None else pad(context[0])
        out, weights = op(
            impl=impl,
            h=pad(h),
            context=context,
            value=pad(value),
            score_bias=pad(score_bias),
            mask=mask,
            **parameters,
        )
        return out, (weights.mT if weights.dim() == 3 else weights)[at]

    return padded_op


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("score", ["linear", "gated_hops"])
def test_padded_and_ragged_forms_of_the_same_bags_agree(score, dropout_p, fill, impl, device):
    lengths = [7, 0, 63, 1, 30]
    case = Case(
        rows=sum(lengths), score=score, ragged=True, context="row", value=7, score_bias=True, dropout_p=dropout_p
    )
    tensors = case.tensors(device) | {"cu_seqlens": offsets(lengths, device)}
    exact = evaluate(case.op, in_double(tensors), "reference")
    rough = evaluate(case.op, tensors, "reference")
    assert_as_exact(evaluate(as_padded(case.op, fill), tensors, impl), rough, exact)
    assert_as_exact(evaluate(case.op, tensors, impl), rough, exact)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@both_forms
def test_masked_rows_are_never_read_and_have_zero_gradients(ragged, dtype, fill, impl, device):
    case = Case(
        dtype=dtype, rows=70, score="gated", context="row", value=7, score_bias=True, mask="random", ragged=ragged
    )
    tensors = case.tensors(device)
    clean = evaluate(case.op, tensors, impl)
    hidden = ~tensors["mask"]
    by_row = ("h", "value", "score_bias", "context")

    def rows(name, x):
        return x[0] if name == "context" and ragged else x

    for name in by_row:
        rows(name, tensors[name])[hidden] = fill
    result = evaluate(case.op, tensors, impl)
    assert_close(result, clean)
    for name in by_row:
        assert largest(rows(name, result.gradients[name])[hidden]) == 0, name
    for family in result:
        for name, x in family.items():
            assert x.isfinite().all(), name


# --- Scores that are hard on a softmax -----------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("score", SCORES)
def test_adding_a_number_to_all_scores_changes_nothing(score, impl, device):
    case = Case(rows=40, score=score, score_bias=True)
    tensors = case.tensors(device)
    # Quarters, so that adding 1000 is exact and only the scores' own rounding is left to see.
    tensors["score_bias"] = (tensors["score_bias"] * 4).round() / 4
    exact = evaluate(case.op, in_double(tensors), "reference")
    tensors["score_bias"] = tensors["score_bias"] + 1000
    shifted = evaluate(case.op, in_double(tensors), "reference")
    assert_close(shifted, exact)
    rough = evaluate(case.op, tensors, "reference")
    assert_as_exact(evaluate(case.op, tensors, impl), rough, exact)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_huge_scores_stay_finite(sign, dtype, impl, device):
    case = Case(dtype=dtype, rows=100, score="linear", activation="identity")
    tensors = case.tensors(device)
    tensors["w"] = tensors["w"] * 6000
    tensors["b"] = torch.full_like(tensors["b"], sign * 10_000)
    result = evaluate(case.op, tensors, impl)
    for family in result:
        for name, x in family.items():
            assert x.isfinite().all(), name
    total = result.outputs["weights"].double().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=0.01)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_huge_score_biases_match_the_reference(dtype, device):
    case = Case(dtype=dtype, rows=100, score="mlp_hops", score_bias=True)
    tensors = case.tensors(device)
    tensors["score_bias"] = tensors["score_bias"] * 10_000
    assert_matches_reference(case.op, tensors, dtype=dtype)


@pytest.mark.parametrize("impl", IMPLS)
@both_forms
def test_bias_of_minus_infinity_hides_a_key_as_the_mask_does(ragged, impl, device):
    case = Case(rows=100, score="mlp_hops", score_bias=True, mask="empty", ragged=ragged)
    tensors = case.tensors(device)
    mask = tensors.pop("mask")
    masked = evaluate(operator(), tensors | {"mask": mask}, impl)
    tensors["score_bias"] = tensors["score_bias"].masked_fill(~mask, -torch.inf)
    biased = evaluate(operator(), tensors, impl)
    assert_close(biased, masked)
