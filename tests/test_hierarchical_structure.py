"""Empty words, sentences and documents, masks, scores that are hard on a softmax, and layers between the levels."""

import dataclasses

import pytest
import torch
from _compare import (
    IMPLS,
    assert_as_exact,
    assert_close,
    assert_matches_reference,
    assert_zero,
    evaluate,
    in_double,
    largest,
)
from _hierarchical import DOCUMENTS, Case, operator
from _location import offsets
from torch import nn

from fused_attn.kernels import hierarchical as kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FULL = Case(documents="few", inner="gated", outer="gated", contexts=("row", "row"), mask="random")


PATHS = (
    pytest.param("one launch", marks=pytest.mark.kernel),
    pytest.param("two launches", marks=pytest.mark.kernel),
    "reference",
)


@pytest.fixture(params=PATHS)
def impl(request, monkeypatch):
    """The implementation; where that is the kernel's, in one launch or in two."""
    if request.param == "reference":
        return "reference"
    monkeypatch.setattr(kernels, "fits", lambda *_: request.param == "one launch")
    return "triton"


@pytest.mark.parametrize("score", ["linear", "gated"])
@pytest.mark.parametrize("documents", [[], [[]], [[], [0], [0, 0]]], ids=["G=0", "S=0", "N=0"])
def test_batches_without_rows_give_zeros(documents, score, impl, device):
    lengths = [n for document in documents for n in document]
    case = Case(documents="one", inner=score, outer=score)
    tensors = case.tensors(device) | {
        "h": torch.zeros(0, 17, device=device),
        "inner_offsets": offsets(lengths, device),
        "outer_offsets": offsets([len(document) for document in documents], device),
    }
    result = evaluate(case.op, tensors, impl)
    assert_zero(result)
    assert result.outputs["output"].shape == (len(documents), 17)
    assert result.outputs["weights"].shape == (18 * len(lengths),)


def test_documents_that_see_nothing_give_zeros(impl, device):
    tensors = FULL.tensors(device)
    tensors["mask"] = torch.zeros_like(tensors["mask"])
    assert_zero(evaluate(FULL.op, tensors, impl))


def test_sentences_that_see_nothing_are_as_if_they_were_not_there(impl, device):
    """Their zero vectors have no weight, though a zero vector has a score."""
    case = Case(documents="one")
    tensors = case.tensors(device)
    rng = torch.Generator().manual_seed(4)
    h = torch.randn(7, 17, generator=rng).to(device)
    mask = torch.tensor([1, 1, 1, 0, 0, 1, 1], dtype=torch.bool, device=device)
    hidden = tensors | {
        "h": h,
        "mask": mask,
        "inner_offsets": offsets([0, 3, 2, 0, 2], device),
        "outer_offsets": offsets([5], device),
    }
    absent = tensors | {"h": h[mask], "inner_offsets": offsets([3, 2], device), "outer_offsets": offsets([2], device)}
    op = operator(through=("outer_weights",))
    got, want = evaluate(op, hidden, impl), evaluate(op, absent, impl)
    assert got.outputs["weights"][[0, 2, 3]].tolist() == [0, 0, 0]
    torch.testing.assert_close(got.outputs["output"], want.outputs["output"])
    torch.testing.assert_close(got.outputs["weights"][[1, 4]], want.outputs["weights"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_rows_are_never_read_and_have_zero_gradients(dtype, impl, device):
    case = dataclasses.replace(FULL, dtype=dtype)
    tensors = case.tensors(device)
    clean = evaluate(case.op, tensors, impl)
    hidden = ~tensors["mask"]
    tensors["h"][hidden] = torch.nan
    tensors["inner_context"][0, hidden] = torch.nan
    result = evaluate(case.op, tensors, impl)
    assert_close(result, clean)
    assert largest(result.gradients["h"][hidden]) == 0
    assert largest(result.gradients["inner_context"][0, hidden]) == 0


def test_outer_context_of_a_sentence_that_sees_nothing_is_never_read(impl, device):
    case = Case(documents="few", contexts=("parent", "row"))
    tensors = case.tensors(device)
    clean = evaluate(case.op, tensors, impl)
    empty = tensors["inner_offsets"].diff() == 0
    tensors["outer_context"][0, empty] = torch.nan
    result = evaluate(case.op, tensors, impl)
    assert_close(result, clean)
    assert largest(result.gradients["outer_context"][0, empty]) == 0


def test_adding_a_number_to_all_scores_of_a_level_changes_nothing(impl, device):
    """A linear score without activation, whose bias moves all of them alike."""
    case = Case(documents="few", inner="linear", outer="linear", activations=("identity",) * 4, through=("segments",))
    tensors = case.tensors(device)
    exact = evaluate(case.op, in_double(tensors), "reference")
    moved = tensors | {"inner_b": tensors["inner_b"] + 1000, "outer_b": tensors["outer_b"] - 1000}
    assert_close(evaluate(case.op, in_double(moved), "reference"), exact)
    moved_exact = evaluate(case.op, in_double(moved), "reference")
    assert_as_exact(evaluate(case.op, moved, impl), evaluate(case.op, moved, "reference"), moved_exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_huge_scores_stay_finite(sign, dtype, impl, device):
    case = Case(dtype=dtype, documents="few", inner="linear", outer="linear", activations=("identity",) * 4)
    tensors = case.tensors(device)
    for level in ("inner", "outer"):
        tensors[f"{level}_w"] = tensors[f"{level}_w"] * 6000
        tensors[f"{level}_b"] = torch.full_like(tensors[f"{level}_b"], sign * 10_000)
    result = evaluate(case.op, tensors, impl)
    for family in result:
        for name, x in family.items():
            assert x.isfinite().all(), name


def test_results_are_the_same_every_time(impl, device):
    tensors = FULL.tensors(device)
    first, again = (evaluate(FULL.op, tensors, impl) for _ in range(2))
    for one, two in zip(first, again, strict=True):
        for name, x in one.items():
            assert torch.equal(x, two[name]), name


@pytest.mark.kernel
def test_many_sentences_of_every_length_cross_the_blocks(device):
    """More sentences than a block has, and rows of a sentence in several tiles; the second block starts mid-tile.

    It has the sentence of the largest score, so that what came before is scaled.
    """
    lengths = [0, 1, 16, 0, 17, 33, 3, 2, 1, 0, 40, 1, 1, 1, 1, 5, 18, 0, 7, 1]
    case = Case(contexts=("parent", "row"))
    tensors = case.tensors(device)
    rng = torch.Generator().manual_seed(5)

    def randn(*shape):
        return torch.randn(shape, generator=rng).to(device)

    tensors |= {
        "h": randn(sum(lengths), 17),
        "inner_context": randn(20, 1, 9),
        "outer_context": randn(1, 20, 5),
        "inner_offsets": offsets(lengths, device),
        "outer_offsets": offsets([1, 19], device),
    }
    tensors["outer_context"][0, 19] += 3 * tensors["outer_v"].sign()
    assert_matches_reference(case.op, tensors)


# --- A layer between ---------------------------------------------------------------------------------------------


def encoder(width: int, device: torch.device) -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(17, width), nn.Tanh()).to(device)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_between_matches_the_reference(dtype, device):
    layers = {x: encoder(6, device).to(x) for x in (dtype, torch.float64)}
    layers[torch.float64].load_state_dict(layers[dtype].state_dict())
    case = Case(dtype=dtype, documents="few", mask="random")
    tensors = case.tensors(device)
    tensors["outer_w"] = tensors["outer_w"][:6]

    def op(*, impl, h, **rest):
        return operator(through=case.through, between=lambda x, _: layers[h.dtype](x))(impl=impl, h=h, **rest)

    assert_matches_reference(op, tensors, dtype=dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_layer_between_gets_segments_and_offsets_and_its_parameters_get_gradients(impl, device):
    tensors = Case(documents="few").tensors(device)
    layer, seen = encoder(17, device), []

    def between(segments, outer_offsets):
        seen.append((segments, outer_offsets))
        return layer(segments)

    op = operator(through=("segments",), between=between)
    out, segments = op(impl=impl, **tensors)
    assert seen[0][1] is tensors["outer_offsets"]
    assert torch.equal(seen[0][0].flatten(), segments)
    assert seen[0][0].shape == (sum(len(document) for document in DOCUMENTS["few"]), 17)
    out.square().sum().backward()
    assert all(x.grad.count_nonzero() > 0 for x in layer.parameters())


@pytest.mark.parametrize("impl", IMPLS)
def test_a_layer_between_that_does_nothing_changes_nothing(impl, device):
    case = dataclasses.replace(FULL, documents="sentences")
    tensors = case.tensors(device)
    with_layer = operator(through=case.through, between=lambda segments, _: segments)
    assert_close(evaluate(with_layer, tensors, impl), evaluate(case.op, tensors, impl))


@pytest.mark.kernel
def test_second_derivatives_know_which_sentences_saw_nothing(device):
    """The formula that they are of has no -inf for an empty sentence's score: it needs to be told."""
    tensors = Case(documents="few", dim=5).tensors(device)
    leaves = [x.requires_grad_() for x in tensors.values() if x.is_floating_point()]
    found = []
    for impl in ("triton", "reference"):
        loss = operator()(impl=impl, **tensors).square().sum()
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
