"""The hierarchical kernel against the reference, that against the formula: outputs and every gradient."""

import dataclasses
import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from _compare import IMPLS, assert_close, assert_matches_reference, evaluate, in_double
from _hierarchical import SCORES, Case, pairwise
from _location import ACTIVATIONS, offsets
from hypothesis import given, settings

from fused_attn import HierarchicalOutput, Score, hierarchical_attention, location_attention
from fused_attn.kernels import hierarchical as kernels
from fused_attn.kernels.chip import A100, H200, INTERPRETER

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FACTORS = {
    "dtype": DTYPES,
    "documents": ("mixed", "sentences", "one", "one sentence"),
    "dim": (1, 17, 33, 70),
    "attn_dims": ((1, 3), (9, 5), (37, 1), (5, 40)),
    "inner": SCORES,
    "outer": SCORES,
    "contexts": (("none", "none"), ("row", "parent"), ("parent", "row"), ("none", "parent")),
    "mask": ("none", "random", "empty", "expanded"),
    "bias": (True, False),
    "layout": ("contiguous", "strided"),
    "through": ((), ("segments", "inner_weights", "outer_weights"), ("inner_weights",), ("outer_weights",)),
}
FULL = Case(inner="gated", outer="gated", contexts=("row", "parent"), mask="random")
PARAMETERS = [name for name, x in FULL.tensors(torch.device("cpu")).items() if x.is_floating_point()]
each_launch = pytest.mark.parametrize("one_launch", [True, False], ids=["one launch", "two launches"])


@pytest.mark.kernel
@pytest.mark.parametrize("case", pairwise(FACTORS), ids=str)
def test_matches_the_reference_for_every_pair_of_factors(case, device):
    assert_matches_reference(case.op, case.tensors(device), dtype=case.dtype)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_launch
def test_matches_the_reference_in_one_launch_and_in_two(one_launch, dtype, monkeypatch, device):
    ran = []
    location_fwd = kernels.location_fwd
    monkeypatch.setattr(kernels, "fits", lambda *_: one_launch)
    monkeypatch.setattr(kernels, "location_fwd", lambda *args: (ran.append(args), location_fwd(*args))[1])
    case = dataclasses.replace(FULL, dtype=dtype, dim=33)
    assert_matches_reference(case.op, case.tensors(device), dtype=dtype)
    assert len(ran) == (0 if one_launch else 2)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.float32, {"dim": 48, "attn_dims": (32, 16)}),  # whole vectors of 16
        (torch.float32, {"dim": 16, "attn_dims": (16, 16)}),  # the keys whole
        (torch.bfloat16, {"dim": 64, "attn_dims": (80, 48)}),
        (torch.bfloat16, {"dim": 128, "attn_dims": (32, 32)}),  # the keys in parts
        (torch.float16, {"dim": 129, "attn_dims": (3, 3)}),  # two launches: too wide
        (torch.bfloat16, {"dim": 100, "attn_dims": (100, 100)}),  # rows of vectors of 4
        (torch.float32, {"dim": 100, "attn_dims": (75, 100)}),
        (torch.bfloat16, {"dim": 300, "attn_dims": (75, 100)}),
    ],
    ids=str,
)
def test_matches_the_reference_for_other_sizes(dtype, sizes, device):
    case = Case(dtype=dtype, documents="sentences", inner="gated", **sizes)
    assert_matches_reference(case.op, case.tensors(device), dtype=dtype)


@pytest.mark.kernel
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_the_reference_for_every_activation_at_each_place(activation, device):
    i = ACTIVATIONS.index(activation)
    activations = tuple(ACTIVATIONS[(i + n) % len(ACTIVATIONS)] for n in range(4))
    case = Case(documents="sentences", inner="gated", outer="gated", activations=activations)
    assert_matches_reference(case.op, case.tensors(device))


@pytest.mark.kernel
@pytest.mark.parametrize("name", PARAMETERS)
def test_one_gradient_alone_is_that_of_the_reference(name, device):
    case = dataclasses.replace(FULL, documents="sentences")
    assert_matches_reference(case.op, case.tensors(device), wrt=[name])


@pytest.mark.kernel
def test_gradients_of_one_level_alone_are_those_of_the_reference(device):
    case = dataclasses.replace(FULL, documents="sentences")
    for level in ("inner", "outer"):
        names = [name for name in PARAMETERS if name.startswith(level)]
        assert_matches_reference(case.op, case.tensors(device), wrt=names)


@pytest.mark.kernel
@pytest.mark.parametrize("through", ["segments", "inner_weights", "outer_weights"])
def test_gradients_through_one_result_alone_are_those_of_the_reference(through, device):
    case = Case(documents="sentences", through=(through,))
    assert_matches_reference(case.op, case.tensors(device), through=("weights",))


@st.composite
def calls(draw) -> tuple[Case, list[list[int]]]:
    documents = draw(st.lists(st.lists(st.integers(0, 12), max_size=18), max_size=3))
    case = Case(
        documents="one",
        dim=draw(st.integers(1, 40)),
        attn_dims=(draw(st.integers(1, 20)), draw(st.integers(1, 20))),
        inner=draw(st.sampled_from(SCORES)),
        outer=draw(st.sampled_from(SCORES)),
        mask=draw(st.sampled_from(["none", "random"])),
    )
    return case, documents


@pytest.mark.kernel
@settings(max_examples=8)
@given(calls())
def test_matches_the_reference_for_any_documents(device, call):
    case, documents = call
    lengths = [n for document in documents for n in document]
    rng = torch.Generator().manual_seed(3)
    tensors = case.tensors(device)
    tensors["h"] = torch.randn(sum(lengths), case.dim, generator=rng).to(device)
    if case.mask != "none":
        tensors["mask"] = (torch.rand(sum(lengths), generator=rng) < 0.6).to(device)
    tensors["inner_offsets"] = offsets(lengths, device)
    tensors["outer_offsets"] = offsets([len(document) for document in documents], device)
    assert_matches_reference(case.op, tensors)


# --- The formula -------------------------------------------------------------------------------------------------


def pool_by_hand(rows, w, b, v, gate_w, gate_b, context, shown):
    """One sequence as lists of numbers, tanh and sigmoid: (weights, weighted sum)."""

    def project(row, matrix, bias):
        return [sum(x * line[a] for x, line in zip(row, matrix, strict=True)) + bias[a] for a in range(len(bias))]

    scores = []
    for row, added in zip(rows, context, strict=True):
        u = [math.tanh(z + c) for z, c in zip(project(row, w, b), added, strict=True)]
        gates = [1 / (1 + math.exp(-g)) for g in project(row, gate_w, gate_b)]
        scores.append(sum(x * g * y for x, g, y in zip(u, gates, v, strict=True)))
    raw = [math.exp(s) if seen else 0.0 for s, seen in zip(scores, shown, strict=True)]
    weights = [x / sum(raw) if sum(raw) else 0.0 for x in raw]
    return weights, [sum(a * row[d] for a, row in zip(weights, rows, strict=True)) for d in range(len(w))]


def test_reference_is_the_formula():
    case = Case(documents="mixed", dim=3, attn_dims=(4, 2), inner="gated", outer="gated", contexts=("row", "parent"))
    t = in_double(dataclasses.replace(case, mask="random").tensors(torch.device("cpu")))
    got = hierarchical_attention(
        t["h"],
        t["inner_offsets"],
        t["outer_offsets"],
        *(
            Score(t[f"{n}_w"], t[f"{n}_b"], t[f"{n}_v"], (t[f"{n}_gate_w"], t[f"{n}_gate_b"]), t[f"{n}_context"])
            for n in ("inner", "outer")
        ),
        mask=t["mask"],
        return_segments=True,
        return_weights=True,
        impl="reference",
    )
    x = {name: value.tolist() for name, value in t.items()}

    def score(level):
        return [x[f"{level}_{part}"] for part in ("w", "b", "v", "gate_w", "gate_b")]

    segments, word_weights, sentence_weights, seen, out = [], [], [], [], []
    for lo, hi in itertools.pairwise(x["inner_offsets"]):
        shown = x["mask"][lo:hi]
        weights, pooled = pool_by_hand(x["h"][lo:hi], *score("inner"), x["inner_context"][0][lo:hi], shown)
        word_weights += weights
        segments.append(pooled)
        seen.append(any(shown))
    for group, (lo, hi) in enumerate(itertools.pairwise(x["outer_offsets"])):
        context = x["outer_context"][group] * (hi - lo)
        weights, pooled = pool_by_hand(segments[lo:hi], *score("outer"), context, seen[lo:hi])
        sentence_weights += weights
        out.append(pooled)
    by_hand = HierarchicalOutput(out, segments, word_weights, sentence_weights)
    for name, want in zip(by_hand._fields, by_hand[:4], strict=False):
        torch.testing.assert_close(getattr(got, name), torch.tensor(want, dtype=torch.float64), msg=name)


@pytest.mark.parametrize("impl", IMPLS)
def test_is_two_calls_of_location_attention(impl, device):
    case = Case(documents="sentences", inner="gated", outer="linear", contexts=("row", "parent"))

    def two_calls(*, impl, h, inner_offsets, outer_offsets, inner_gate_w, inner_gate_b, outer_w, outer_b, **t):
        segments, word_weights = location_attention(
            h,
            t["inner_w"],
            t["inner_b"],
            t["inner_v"],
            gate=(inner_gate_w, inner_gate_b),
            context=t["inner_context"],
            cu_seqlens=inner_offsets,
            return_weights=True,
            impl=impl,
        )
        out, sentence_weights = location_attention(
            segments,
            outer_w,
            outer_b,
            context=t["outer_context"],
            cu_seqlens=outer_offsets,
            return_weights=True,
            impl=impl,
        )
        return out, torch.cat([segments.flatten(), word_weights, sentence_weights])

    tensors = case.tensors(device)
    assert_close(evaluate(case.op, tensors, impl), evaluate(two_calls, tensors, impl))


# --- What is returned, and where it fits -------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_returns_a_tensor_or_what_was_asked_for(impl, device):
    case = Case(documents="sentences")
    tensors = case.tensors(device)
    args = [tensors[name] for name in ("h", "inner_offsets", "outer_offsets")]
    args += [Score(*(tensors[f"{level}_{part}"] for part in "wbv")) for level in ("inner", "outer")]
    out = hierarchical_attention(*args, impl=impl)
    assert out.shape == (3, 17)
    for segments, weights in itertools.product([False, True], repeat=2):
        got = hierarchical_attention(*args, return_segments=segments, return_weights=weights, impl=impl)
        if not (segments or weights):
            assert torch.equal(got, out)
            continue
        assert isinstance(got, HierarchicalOutput)
        assert torch.equal(got.out, out)
        assert [None if x is None else tuple(x.shape) for x in got[1:]] == [
            (6, 17) if segments else None,
            (24,) if weights else None,
            (6,) if weights else None,
            *(None, None, None),
        ]


def test_one_launch_is_for_narrow_rows_and_many_or_short_documents():
    def fits(chip, D, rows, groups, itemsize=2, A=128):
        found = []
        for gated, plain in ((False, True), (False, False), (True, False)):
            blocks = kernels.blocks_of(chip, itemsize, D, A, A, False, False, gated, plain)
            found.append(kernels.fits(chip, min(b.DV for b in blocks), D, rows, groups))
        assert len(set(found)) == 1  # the options that choose other tiles do not choose another way
        return found[0]

    for chip in (A100, H200):
        assert fits(chip, 256, 51_200, 256)
        assert fits(chip, 256, 51_200, 256, itemsize=4)
        assert fits(chip, 100, 51_200, 256, A=100)
        assert not fits(chip, 264, 51_200, 256)  # the vectors
        assert fits(chip, 200, 51_200, 256)
        assert not fits(chip, 202, 51_200, 256)  # no multiple of 4: small tiles
        assert fits(chip, 256, 10**6, chip.cores)
        assert not fits(chip, 256, 10**6, chip.cores - 1)  # the chip would be idle
        assert fits(chip, 256, 512, 1)
        assert not fits(chip, 256, 513, 1)
    assert fits(INTERPRETER, 17, 100, 1)
