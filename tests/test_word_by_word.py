"""Word-by-word attention, the kernel, against the reference; the reference by hand; exactness; structures."""

import dataclasses
import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from _compare import (
    IMPLS,
    Result,
    assert_as_exact,
    assert_close,
    assert_identical,
    assert_matches_reference,
    evaluate,
    in_double,
    largest,
    strided_offsets,
)
from _location import offsets
from _marks import each_dtype
from _recurrent import ALL, FLOATING, Case, check, formula_with_scores, operator, pairwise, told
from hypothesis import given, settings

from fused_attn import word_by_word_attention
from fused_attn.kernels import chip as chips
from fused_attn.kernels import recurrent
from fused_attn.kernels.arguments import entries, sequences
from fused_attn.kernels.recurrent_weights import weight_parts

every_impl = pytest.mark.parametrize("impl", IMPLS)

# Sizes are odd, and around what the interpreter holds on chip: premises of up to 32 words for both widths up to 16,
# 16 up to 32, none beyond; tiles of 16 otherwise.
FACTORS = {
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "batch": (1, 2),
    "premise": (1, 16, 17, 40),
    "hypothesis": (1, 3, 5),
    "dim": (1, 7, 19, 35),
    "hypothesis_dim": (1, 5),
    "attn_dim": (1, 9, 33),
    "state": (False, True),
    "mask": ("none", "some", "padding", "empty", "expanded"),
    "layout": ("contiguous", "swapped", "strided"),
    "return_weights": (True, False),
}
PACKED = {name: FACTORS[name] for name in ("dtype", "dim", "attn_dim", "state", "layout")} | {
    "premise": (3, 20, 70),
    "hypothesis": (1, 9),
    "ragged": (True,),
}
PACKED_PREMISE = PACKED | {"hypothesis": (1, 3), "alone": ("premise",)}
PACKED_HYPOTHESIS = PACKED | {
    "premise": (3, 20, 40),
    "mask": ("none", "some", "padding"),
    "return_weights": (True, False),
    "alone": ("hypothesis",),
}
HELD = Case(state=True, mask="some")
STREAMED = Case(batch=1, premise=35, hypothesis=3, dim=19, attn_dim=33, state=True, mask="some")
RAGGED = Case(premise=41, hypothesis=9, ragged=True, state=True)
FORMS = {"held": HELD, "streamed": STREAMED, "ragged": RAGGED}
RULES = {"held_blocks": recurrent.held_blocks, "stream_blocks": recurrent.stream_blocks}
held_and_streamed = pytest.mark.parametrize("case", [HELD, STREAMED], ids=["held", "streamed"])
each_form = pytest.mark.parametrize("case", FORMS.values(), ids=FORMS.keys())


@pytest.mark.kernel
@pytest.mark.parametrize(
    "case", [c for table in (FACTORS, PACKED, PACKED_PREMISE, PACKED_HYPOTHESIS) for c in pairwise(table)], ids=str
)
def test_kernel_matches_the_reference_for_every_pair_of_factors(case, device):
    check(case, device)


@pytest.mark.kernel
def test_the_forms_are_what_they_are_called(device):
    """Held on chip, streamed, and each for some of the sequences of a ragged batch."""
    if chips.chip_of(device).backend != "interpreter":
        pytest.skip("of the interpreter's block sizes")
    launched = {}
    for name, case in FORMS.items():
        made = launched[name] = []
        with pytest.MonkeyPatch.context() as patch:
            for rule in RULES:

                def told(*args, rule=rule, choose=RULES[rule], made=made):
                    blocks = choose(*args)
                    made.append((rule.split("_")[0], blocks is not None))
                    return blocks

                patch.setattr(recurrent, rule, told)
            evaluate(case.op, case.tensors(device), "triton")
    held, stream = ("held", True), ("stream", True)
    once = {"held": [held], "streamed": [("held", False), stream], "ragged": [held, stream]}
    assert launched == {name: [*calls, *calls] for name, calls in once.items()}


@pytest.mark.kernel
@each_dtype
@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=5, hypothesis=3, dim=8, attn_dim=12, state=True, mask="some"),
        Case(batch=5, premise=17, hypothesis=2, dim=16, attn_dim=16, mask="empty", return_weights=False),
        Case(premise=41, hypothesis=19, dim=12, attn_dim=8, ragged=True, state=True),
        Case(premise=15, hypothesis=19, dim=12, attn_dim=8, ragged=True, alone="hypothesis", mask="some"),
        Case(premise=41, hypothesis=3, dim=12, attn_dim=8, ragged=True, alone="premise", state=True),
    ],
    ids=str,
)
def test_programs_of_several_sequences_match_the_reference(case, cores, dtype, device):
    """Of other lengths each, and not all of a program's are there."""
    with chips.assume(chips.chip_of(device)._replace(cores=cores)):
        check(dataclasses.replace(case, dtype=dtype), device)


@pytest.mark.kernel
@each_dtype
def test_a_long_premise_of_whole_vectors_matches_the_reference(dtype, device):
    """No chip holds it, and where rows are whole vectors of 16 bits its backward has matrix units."""
    check(Case(dtype=dtype, batch=1, premise=130, hypothesis=3, dim=16, attn_dim=16, mask="some"), device)


@pytest.mark.kernel
@each_dtype
@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_stay_in_their_sequence(fill, dtype, device):
    """Though a program has several."""
    case = Case(dtype=dtype, batch=3, dim=8, attn_dim=12)
    tensors = case.tensors(device)
    lost = {name: x.clone() for name, x in tensors.items()}
    for name in ("premise", "hypothesis"):
        lost[name][1, 1] = fill
    others = torch.tensor([0, 2], device=device)
    with chips.assume(chips.chip_of(device)._replace(cores=1)):
        want, got = (evaluate(case.op, x, "triton") for x in (tensors, lost))
    for name in ("output", "weights"):
        assert torch.equal(got.outputs[name][others], want.outputs[name][others])
    for name in ("premise", "hypothesis"):
        assert torch.equal(got.gradients[name][others], want.gradients[name][others])


@pytest.mark.kernel
@pytest.mark.parametrize("name", FLOATING)
def test_one_gradient_alone_is_that_of_the_reference(name, device):
    check(HELD, device, wrt=[name])


@pytest.mark.kernel
def test_gradients_of_weights_are_sums_of_all_parts_of_rows(device):
    """Of several tiles each, too; a row that is not seen may be NaN."""
    rng = torch.Generator().manual_seed(0)
    seen = (torch.rand(10, 15, generator=rng) < 0.5).to(device)
    widths = (17, 20), (5, 9), (9, 18)
    pairs = [[torch.randn(10, 15, n, generator=rng).to(device) for n in of_pair] for of_pair in widths]
    visible = pairs[0][0] * seen[..., None]
    pairs[0][1][~seen] = 0
    want = [x.flatten(0, 1).T @ dy.flatten(0, 1) for x, dy in [(visible, pairs[0][1]), *pairs[1:]]]
    pairs[0][0][~seen] = torch.nan
    mask = entries(seen.view(torch.uint8), packed=False)
    given = [(sequences(x, packed=False), dy) for x, dy in pairs]
    parts = weight_parts(chips.chip_of(device), mask, torch.float32, given)
    for got, total in zip(parts, want, strict=True):
        assert len(got) > 1
        torch.testing.assert_close(got.sum(0), total)


@pytest.mark.kernel
@held_and_streamed
@pytest.mark.parametrize("through", [("output",), ("weights",)], ids=["output", "weights"])
def test_gradients_through_one_result_alone_are_those_of_the_reference(through, case, device):
    check(case, device, through=through)


@pytest.mark.kernel
@held_and_streamed
def test_a_gradient_of_the_last_state_alone_goes_back_through_all_steps(case, device):
    tensors = case.tensors(device)

    def last(*, impl, **leaves):
        return case.op(impl=impl, **leaves)[0][:, -1]

    assert_matches_reference(last, tensors)
    assert (evaluate(last, tensors, "triton").gradients["hypothesis"].abs().amax(-1) > 0).all()


@st.composite
def batches(draw) -> tuple[Case, list[tuple[int, int]]]:
    lengths = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 4)), max_size=4))
    case = Case(
        premise=sum(p for p, _ in lengths),
        hypothesis=sum(h for _, h in lengths),
        ragged=True,
        dim=draw(st.sampled_from([2, 17])),
        attn_dim=draw(st.sampled_from([3, 20])),
    )
    return case, lengths


@pytest.mark.kernel
@settings(max_examples=10)
@given(batches())
def test_any_ragged_batch_matches_the_reference(device, batch):
    case, lengths = batch
    tensors = case.tensors(device) | lengths_of(lengths, device)
    if case.hypothesis:
        assert_matches_reference(case.op, tensors)
    else:
        assert case.op(impl="triton", **tensors).shape == (0, case.dim)


def lengths_of(lengths, device):
    names = ("cu_seqlens_premise", "cu_seqlens_hypothesis")
    return {name: offsets([pair[i] for pair in lengths], device) for i, name in enumerate(names)}


# --- The reference -----------------------------------------------------------------------------------------------


def test_reference_is_the_formula_by_hand():
    case = Case(batch=1, premise=3, hypothesis=2, dim=2, hypothesis_dim=3, attn_dim=4, state=True)
    t = in_double(case.tensors(torch.device("cpu"))) | {"mask": torch.tensor([[True, False, True]])}
    out, weights = case.op(impl="reference", **t)
    n = {name: x.tolist() for name, x in t.items()}

    def times(x, matrix):
        return [sum(a * row[i] for a, row in zip(x, matrix, strict=True)) for i in range(len(matrix[0]))]

    r = n["state"][0]
    for step, h in enumerate(n["hypothesis"][0]):
        from_h, from_r = times(h, n["w_h"]), times(r, n["w_r"])
        raw = []
        for y, seen in zip(n["premise"][0], n["mask"][0], strict=True):
            m = [math.tanh(sum(x)) for x in zip(times(y, n["w_y"]), from_h, from_r, strict=True)]
            raw.append(math.exp(sum(a * b for a, b in zip(m, n["w"], strict=True))) if seen else 0.0)
        alpha = [x / sum(raw) for x in raw]
        carried = times(r, n["w_t"])
        r = [
            sum(a * y[i] for a, y in zip(alpha, n["premise"][0], strict=True)) + math.tanh(carried[i])
            for i in range(2)
        ]
        assert weights[0, step].tolist() == pytest.approx(alpha, rel=1e-12)
        assert out[0, step].tolist() == pytest.approx(r, rel=1e-12)


def test_reference_of_packed_rows_is_that_of_each_sequence_alone():
    case = Case(premise=14, hypothesis=9, ragged=True, state=True)
    t = in_double(case.tensors(torch.device("cpu")))
    out = case.op(impl="reference", **t)
    both = (t[f"cu_seqlens_{side}"].tolist() for side in ("premise", "hypothesis"))
    ends = zip(*map(itertools.pairwise, both), strict=True)
    shared = {name: t[name] for name in ("w_y", "w_h", "w_r", "w", "w_t")}
    for s, ((y0, y1), (h0, h1)) in enumerate(ends):
        alone = word_by_word_attention(
            t["premise"][None, y0:y1],
            t["hypothesis"][None, h0:h1],
            **shared,
            state=t["state"][s : s + 1],
            impl="reference",
        )
        torch.testing.assert_close(out[h0:h1], alone[0], rtol=1e-12, atol=1e-12)


# --- Structures --------------------------------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"hypothesis": 0}, {"batch": 0, "premise": 0}], ids=str)
def test_empty_batches_give_nothing_and_zero_gradients(sizes, impl, device):
    case = Case(**sizes, state=True)
    result = evaluate(case.op, case.tensors(device), impl)
    assert result.outputs["output"].shape == (case.batch, case.hypothesis, case.dim)
    assert result.outputs["weights"].shape == (case.batch, case.hypothesis, case.premise)
    for name, x in result.gradients.items():
        assert largest(x) == 0, name


@every_impl
@pytest.mark.parametrize("lengths", [[], [(0, 0)], [(3, 0)]], ids=str)
def test_ragged_batches_without_a_hypothesis_give_nothing(lengths, impl, device):
    case = Case(premise=sum(p for p, _ in lengths), hypothesis=0, ragged=True)
    result = evaluate(case.op, case.tensors(device) | lengths_of(lengths, device), impl)
    assert result.outputs["output"].shape == (0, case.dim)
    for name, x in result.gradients.items():
        assert largest(x) == 0, name


@every_impl
@pytest.mark.parametrize("form", ["no words", "masked", "ragged"])
@pytest.mark.parametrize("dims", [(7, 6), (19, 33)], ids=["held", "streamed"])
def test_without_a_visible_word_the_state_is_carried_alone(dims, form, impl, device):
    case = Case(
        batch=1,
        premise=0 if form == "no words" else 5,
        hypothesis=3,
        dim=dims[0],
        attn_dim=dims[1],
        state=True,
        mask="some" if form == "masked" else "none",
        ragged=form == "ragged",
        return_weights=form != "ragged",
    )
    tensors = case.tensors(device)
    if form == "masked":
        tensors["mask"] = torch.zeros_like(tensors["mask"])
        tensors["premise"] = torch.full_like(tensors["premise"], torch.nan)
    if form == "ragged":
        tensors |= lengths_of([(0, 3), (5, 0)], device)
        tensors["state"] = tensors["state"][:2]
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        result = evaluate(case.op, tensors, impl)
    for name in ("premise", "hypothesis", "w_y", "w_h", "w_r", "w"):
        assert largest(result.gradients[name]) == 0, name
    r = tensors["state"][:1].double()
    for step in result.outputs["output"].view(3, -1):
        r = torch.tanh(r @ tensors["w_t"].double())
        torch.testing.assert_close(step, r[0].float())
    assert largest(result.gradients["w_t"]) > 0
    if "weights" in result.outputs:
        assert largest(result.outputs["weights"]) == 0


@every_impl
@held_and_streamed
@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
def test_masked_words_are_never_read_and_have_zero_gradients(fill, case, impl, device):
    tensors = case.tensors(device)
    clean = evaluate(case.op, tensors, impl)
    hidden = ~tensors["mask"]
    tensors["premise"][hidden] = fill
    result = evaluate(case.op, tensors, impl)
    assert_close(result, clean)
    assert largest(result.gradients["premise"][hidden]) == 0
    assert largest(result.outputs["weights"].transpose(1, 2)[hidden]) == 0


@pytest.mark.kernel
def test_gradients_of_two_weights_of_one_column_are_two_tensors(device):
    """The compiler may write to one of them."""
    case = Case(dim=1, attn_dim=1, mask="some", state=True)
    t = case.tensors(device)
    given = [t[name] for name in (*FLOATING, "mask")] + [None, None]
    flags = (True, False, True, False)  # weights, scores, states, plain
    *_, states, key = torch.ops.fused_attn.word_by_word_fwd(*given, *flags)
    dout = torch.ones_like(t["hypothesis"][..., :1])
    starts, choices = (dout, None, None, None, None), (*flags, [True] * 8)
    grads = torch.ops.fused_attn.word_by_word_bwd(*starts, *given, states, key, *choices)
    assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads)


@every_impl
def test_offsets_of_any_stride_are_those_offsets(impl, device):
    case = Case(ragged=True)
    tensors = case.tensors(device)
    assert_identical(evaluate(case.op, strided_offsets(tensors), impl), evaluate(case.op, tensors, impl))


@every_impl
@pytest.mark.parametrize("alone", ["premise", "hypothesis"])
def test_rows_packed_on_one_side_alone_are_those_packed_on_both(alone, impl, device):
    case = Case(premise=14, hypothesis=5, ragged=True, alone=alone, state=True, return_weights=False)
    t = case.tensors(device)
    other = "hypothesis" if alone == "premise" else "premise"
    count, rows, _ = t[other].shape

    def packed(*, impl, **given):
        even = torch.arange(count + 1, dtype=torch.int32, device=device) * rows
        out = operator()(impl=impl, **given | {other: given[other].flatten(0, 1), f"cu_seqlens_{other}": even})
        return out if other == "premise" else out.unflatten(0, (count, rows))

    assert_close(evaluate(case.op, t, impl), evaluate(packed, t, impl))


def telling(**given):
    return told(*operator(**ALL)(**given))


def test_scores_log_weights_and_lse_are_those_of_the_formula():
    case = Case(mask="padding", state=True)
    t = in_double(case.tensors(torch.device("cpu")))

    def by_formula(**given):
        out, weights, s = formula_with_scores(**given)
        return told(out, weights, s.log_softmax(-1), s, s.logsumexp(-1))

    assert_close(evaluate(telling, t, "reference"), evaluate(by_formula, t, ""))


WITH_SCORES = {
    "held": Case(state=True, mask="some"),
    "held, several a program": Case(batch=5, hypothesis=3, dim=8, attn_dim=12, mask="some"),
    "streamed": STREAMED,
    "packed hypothesis": Case(premise=14, hypothesis=9, ragged=True, alone="hypothesis", mask="some"),
}


@pytest.mark.kernel
@each_dtype
@pytest.mark.parametrize("case", WITH_SCORES.values(), ids=WITH_SCORES.keys())
def test_scores_log_weights_and_lse_match_the_reference(case, dtype, device):
    t = dataclasses.replace(case, dtype=dtype).tensors(device)
    with chips.assume(chips.chip_of(device)._replace(cores=1)):
        assert_matches_reference(telling, t, dtype=dtype)
        assert_matches_reference(telling, t, dtype=dtype, through=["output"])


@every_impl
@pytest.mark.parametrize("name", ["log_weights", "scores", "lse"])
def test_what_is_asked_for_comes_alone_after_the_output_and_changes_nothing(name, impl, device):
    case = Case(dtype=torch.bfloat16, mask="some")
    t = case.tensors(device)
    out, more = operator(**{f"return_{name}": True})(impl=impl, **t)
    plain, weights = operator(return_weights=True)(impl=impl, **t)
    assert torch.equal(out, plain)
    assert more.dtype == torch.float32
    assert more.shape == (weights.shape[:2] if name == "lse" else weights.shape)
    if name == "scores":
        assert (more == -torch.inf).equal(~t["mask"][:, None].expand_as(more))


@every_impl
def test_scores_of_a_premise_that_is_hidden_have_no_gradient(impl, device):
    t = Case(mask="empty", state=True).tensors(device)
    _, _, log_weights, scores, lse = operator(**ALL)(impl=impl, **t)
    assert all((x[-1] == -torch.inf).all() for x in (log_weights, scores, lse))
    result = evaluate(telling, t, impl)
    assert all(x.isfinite().all() for x in result.gradients.values())
    assert largest(result.gradients["premise"][-1]) == 0


@every_impl
def test_weights_of_a_packed_hypothesis_are_those_of_a_padded_one(impl, device):
    case = Case(premise=14, hypothesis=9, ragged=True, alone="hypothesis", mask="some")
    t = case.tensors(device)
    out, weights = case.op(impl=impl, **t)
    assert weights.shape == (9, 14)
    for s, (lo, hi) in enumerate(itertools.pairwise(t["cu_seqlens_hypothesis"].tolist())):
        own = {name: t[name][s : s + 1] for name in ("premise", "mask")} | {
            "hypothesis": t["hypothesis"][None, lo:hi]
        }
        alone = operator(return_weights=True)(
            impl=impl, **own, **{n: t[n] for n in ("w_y", "w_h", "w_r", "w", "w_t")}
        )
        torch.testing.assert_close((out[None, lo:hi], weights[None, lo:hi]), alone)


@every_impl
def test_padded_and_ragged_forms_of_the_same_batch_agree(impl, device):
    lengths = [(7, 2), (0, 3), (20, 0), (40, 1), (3, 3)]
    case = Case(premise=70, hypothesis=9, ragged=True)
    tensors = case.tensors(device) | lengths_of(lengths, device)

    def as_padded(*, impl, premise, hypothesis, cu_seqlens_premise, cu_seqlens_hypothesis, **parameters):
        def pad(x, cu, fill):
            rows = [x[a:b] for a, b in itertools.pairwise(cu.tolist())]
            most = max(map(len, rows)) + 1
            return torch.stack([torch.cat([r, x.new_full((most - len(r), x.shape[1]), fill)]) for r in rows])

        words = torch.arange(41, device=device) < cu_seqlens_premise.diff()[:, None]
        out = operator()(
            impl=impl,
            premise=pad(premise, cu_seqlens_premise, torch.nan),
            hypothesis=pad(hypothesis, cu_seqlens_hypothesis, 1.0),
            mask=words,
            **parameters,
        )
        return torch.cat([x[:n] for x, n in zip(out, cu_seqlens_hypothesis.diff().tolist(), strict=True)])

    assert_close(evaluate(as_padded, tensors, impl), evaluate(case.op, tensors, impl))


@every_impl
@held_and_streamed
def test_a_hypothesis_in_two_parts_is_the_whole(case, impl, device):
    tensors = case.tensors(device)

    def in_parts(*, impl, hypothesis, state, **rest):
        first, some = case.op(impl=impl, hypothesis=hypothesis[:, :1], state=state, **rest)
        second, others = case.op(impl=impl, hypothesis=hypothesis[:, 1:], state=first[:, -1], **rest)
        return torch.cat([first, second], 1), torch.cat([some, others], 1)

    assert_close(evaluate(in_parts, tensors, impl), evaluate(case.op, tensors, impl))


# --- Exactness ---------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@each_dtype
@held_and_streamed
@pytest.mark.parametrize("factor", [100, 1e-3])
def test_scores_of_any_size_are_exact(factor, case, dtype, device):
    """Large ones give one word all the weight, and its score no gradient."""
    tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.tensors(device).items()}
    assert_matches_reference(case.op, tensors | {"w": tensors["w"] * factor}, dtype=dtype)


@pytest.mark.kernel
@held_and_streamed
def test_a_word_with_all_the_weight_leaves_the_scores_no_gradient(case, device):
    tensors = case.tensors(device)
    tensors["w"] = tensors["w"] * 1e7
    result = evaluate(case.op, tensors, "triton", through=["output"])
    assert set(result.outputs["weights"].unique().tolist()) == {0.0, 1.0}
    for name in ("hypothesis", "w_y", "w_h", "w_r", "w"):
        assert largest(result.gradients[name]) == 0, name


@pytest.mark.kernel
@held_and_streamed
def test_adding_a_number_to_all_scores_changes_nothing(case, device):
    """By a feature whose tanh is 1 for every word."""
    tensors = case.tensors(device)
    tensors["premise"][..., 0] = 1
    for name in ("w_y", "w_h", "w_r"):
        tensors[name][:, -1] = 0
    tensors["w_y"][0, -1] = 100
    plain = evaluate(case.op, in_double(tensors), "reference", wrt=["hypothesis", "w_t"])
    tensors["w"][-1] += 1000
    exact = evaluate(case.op, in_double(tensors), "reference", wrt=["hypothesis", "w_t"])
    assert_close(exact, plain)

    def rolled(by):
        def op(*, impl, **leaves):
            names = ("w_y", "w_h", "w_r", "w")
            return case.op(impl=impl, **leaves | {name: leaves[name].roll(by, -1) for name in names})

        return op

    # What is left is how a sum near 1000 is rounded, and when in it the 1000 comes: in any order of the features.
    rough = [evaluate(rolled(by), tensors, "reference") for by in range(case.attn_dim)]
    assert_as_exact(evaluate(case.op, tensors, "triton"), rough, evaluate(case.op, in_double(tensors), "reference"))


@pytest.mark.kernel
def test_many_steps_stay_as_exact_as_those_of_the_reference(device):
    check(Case(batch=1, premise=5, hypothesis=40), device)


@pytest.mark.kernel
@each_form
def test_two_runs_are_bitwise_equal(case, device):
    tensors = case.tensors(device)
    assert_identical(evaluate(case.op, tensors, "triton"), evaluate(case.op, tensors, "triton"))


@pytest.mark.kernel
def test_states_of_a_padded_hypothesis_are_right_up_to_its_end(device):
    case = Case(batch=3, hypothesis=5)
    tensors = case.tensors(device)
    lengths = torch.tensor([5, 1, 3], device=device)

    def last(*, impl, **leaves):
        return case.op(impl=impl, **leaves)[0][torch.arange(3, device=device), lengths - 1]

    got = evaluate(last, tensors, "triton")
    for s, n in enumerate(lengths.tolist()):
        alone = {name: x[s : s + 1] if x.dim() == 3 else x for name, x in tensors.items()}
        alone["hypothesis"] = alone["hypothesis"][:, :n]
        want = evaluate(case.op, alone, "triton", through=["output"]).outputs["output"][:, -1]
        assert_close(Result({"output": got.outputs["output"][s : s + 1]}, {}), Result({"output": want}, {}))
        assert largest(got.gradients["hypothesis"][s, n:]) == 0
