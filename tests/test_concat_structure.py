"""Splits and chunks, windows, calls with nothing to attend to, and padding."""

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
from _concat import ALL, IMPLS, ROWS, Case, check, compare, hide, offsets, operator

from fused_attn import concat_attention
from fused_attn.blocked import concat as in_blocks
from fused_attn.kernels import chip as chips
from fused_attn.kernels import concat_bwd as kernels

each_impl = pytest.mark.parametrize("impl", IMPLS)
every_impl = pytest.mark.parametrize("impl", ALL)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
both_forms = pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])


# --- Parts: splits of the keys, chunks of the workspace -------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, queries=3, keys=300, attn_dim=3),
        Case(batch=1, queries=3, keys=300, attn_dim=3, heads=2, mask="empty", score_bias="hqk", dropout_p=0.3),
        Case(batch=1, queries=20, keys=300, attn_dim=3, window=(4, 150), value_dim=70),
        Case(batch=1, queries=70, keys=200, attn_dim=3, window=(4, 100), value_dim=3),
        Case(queries=15, keys=300, attn_dim=3, ragged=True, heads=2),
        Case(dtype=torch.bfloat16, batch=1, queries=3, keys=300, attn_dim=3, mask="keys"),
    ],
    ids=str,
)
def test_keys_in_parts_match_the_reference(case, device):
    """On a chip of many cores, few queries have their keys split."""
    chip = chips.chip_of(device)._replace(cores=1000)
    with chips.assume(chip):
        check(case, device, "triton")


@pytest.mark.kernel
def test_parts_that_see_no_key_count_for_nothing(device):
    """Nor does their maximum, which is above all scores here."""
    case = Case(batch=1, queries=3, keys=300, attn_dim=3, window=(None, 50), score_bias="qk")
    tensors = case.tensors(device)
    tensors["score_bias"] = tensors["score_bias"].round() - 1000
    with chips.assume(chips.chip_of(device)._replace(cores=1000)):
        compare(case.op, tensors, "triton")


BLOCKS = [
    Case(queries=40, keys=50, heads=2, mask="pairs", score_bias="bH1k", dropout_p=0.3),
    Case(queries=40, keys=50, heads=2, activation="gelu", window=(5, 9), score_bias="hqk"),
    Case(queries=40, keys=50, activation="sigmoid", mask="keys", dropout_p=0.3),
    Case(queries=60, keys=70, heads=2, activation="identity", ragged=True, dropout_p=0.3),
    Case(queries=60, keys=70, heads=2, ragged=True, window=(None, 3), dropout_p=0.3),
]


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_small_tiles_and_blocks_of_the_blocked_path_change_nothing(monkeypatch, case, rows, device):
    """A few queries a tile and a few keys a block, where the sizes here would be one of each."""
    if device.type != "cpu":
        pytest.skip("the blocked path is for CPUs")
    monkeypatch.setattr(in_blocks, "ROWS", rows)
    monkeypatch.setattr(in_blocks, "LEAST_ROWS", 1)
    monkeypatch.setattr(in_blocks, "BUFFER_BYTES", 4 * 11 * rows * case.attn_dim)
    check(case, device, "auto")


@pytest.mark.kernel
@both_forms
def test_workspace_smaller_than_the_batch_changes_nothing(monkeypatch, ragged, device):
    case = Case(
        batch=1,
        queries=40,
        keys=40,
        attn_dim=3,
        heads=2,
        ragged=ragged,
        dropout_p=0.3,
        window=(20, 9),
        mask="none" if ragged else "pairs",
        score_bias=None if ragged else "bhqk",
    )
    tensors = case.tensors(device)
    whole = evaluate(case.op, tensors, "triton")
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", 1)
    parts = evaluate(case.op, tensors, "triton")
    assert_close(parts, whole)
    for name in parts.gradients.keys() - {"key", "value"}:  # these are summed over the chunks
        assert torch.equal(parts.gradients[name], whole.gradients[name]), name


@each_impl
@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_bitwise_equal(dtype, ragged, impl, device):
    case = Case(dtype=dtype, batch=1, queries=33, keys=40, attn_dim=3, ragged=ragged, dropout_p=0.3)
    tensors = case.tensors(device)
    assert_identical(evaluate(case.op, tensors, impl), evaluate(case.op, tensors, impl))


# --- Sequences ---------------------------------------------------------------------------------------------------


@each_impl
@both_forms
@pytest.mark.parametrize("scale", [1, 50])
def test_a_sequence_of_nan_leaves_the_others_alone(scale, ragged, impl, device):
    """With large numbers, too: the loop without factors reads the rows themselves."""
    lengths = {"q": [7, 17, 5], "k": [9, 35, 5]}
    case = Case(attn_dim=3, batch=3, queries=29, keys=49, heads=2, ragged=True)
    tensors = case.tensors(device) | {f"cu_seqlens_{side}": offsets(x, device) for side, x in lengths.items()}
    if not ragged:
        case = Case(attn_dim=3, batch=3, queries=17, keys=35, heads=2)
        tensors = case.tensors(device)
    tensors |= {name: tensors[name] * scale for name in ("query", "key")}
    clean = evaluate(case.op, tensors, impl)
    at = {"query": slice(7, 24), "key": slice(9, 44), "value": slice(9, 44)} if ragged else dict.fromkeys(ROWS, 1)
    for name, rows in at.items():
        tensors[name][rows] = torch.nan
    result = evaluate(case.op, tensors, impl)
    for name, rows in (at | {"output": at["query"], "weights": 1}).items():
        for got, want in zip(result, clean, strict=True):
            if name in want:
                assert got[name][rows].isnan().any(), name
                got[name][rows] = want[name][rows]
    del result.gradients["v"], clean.gradients["v"]
    assert_close(result, clean)


# --- Windows --------------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@both_forms
def test_tiles_of_keys_outside_the_window_are_skipped(ragged, device):
    """Values there are not read: they are tiles away from all that is visible."""
    case = Case(batch=1, queries=20, keys=350, attn_dim=2, window=(3, 4), ragged=ragged, return_weights=False)
    tensors = case.tensors(device)
    clean = evaluate(case.op, tensors, "triton")
    tensors["value"].view(350, -1)[300:] = torch.nan
    assert_identical(evaluate(case.op, tensors, "triton"), clean)


@each_impl
def test_window_alone_is_the_mask_that_it_stands_for(impl, device):
    case = Case(batch=1, queries=19, keys=35, attn_dim=3, window=(5, -1))
    tensors = case.tensors(device)
    i, j = torch.arange(19, device=device)[:, None], torch.arange(35, device=device)
    mask = (i - 5 <= j) & (j <= i - 1)
    masked = operator(return_weights=True)
    assert_close(evaluate(case.op, tensors, impl), evaluate(masked, tensors | {"mask": mask[None]}, impl))


# --- Nothing to attend to -------------------------------------------------------------------------------------------


def assert_zero(result):
    """Zeros everywhere: not NaN, and not the poison of unwritten memory."""
    for family in result:
        for name, x in family.items():
            assert largest(x) == 0, name


@every_impl
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("activation", ["tanh", "relu", "identity"])
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"keys": 0}, {"queries": 0, "keys": 0}], ids=str)
def test_empty_batches_give_zeros(sizes, activation, heads, impl, device):
    case = Case(**sizes, activation=activation, heads=heads, score_bias="bhqk", mask="pairs")
    tensors = case.tensors(device)
    result = evaluate(case.op, tensors, impl)
    assert_zero(result)
    *lead, queries, _ = tensors["query"].shape
    assert result.outputs["output"].shape == (*lead, queries, 12)
    assert result.outputs["weights"].shape == (*lead, queries, tensors["key"].shape[-2])


@every_impl
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("lengths", [[], [(0, 0)], [(0, 0), (0, 0)], [(0, 3)], [(3, 0)], [(3, 0), (0, 3)]], ids=str)
def test_ragged_batches_without_pairs_give_zeros(lengths, heads, impl, device):
    case = Case(
        queries=sum(q for q, _ in lengths), keys=sum(k for _, k in lengths), attn_dim=3, heads=heads, ragged=True
    )
    cu = {f"cu_seqlens_{side}": offsets([pair[i] for pair in lengths], device) for i, side in enumerate("qk")}
    result = evaluate(case.op, case.tensors(device) | cu, impl)
    assert_zero(result)
    assert result.outputs["output"].shape == (case.queries, *(() if heads is None else (heads,)), 12)


@every_impl
@pytest.mark.parametrize("activation", ["tanh", "gelu", "identity"])
@pytest.mark.parametrize("form", ["keys", "pairs", "window", "past window"])
def test_queries_that_see_nothing_give_zeros(form, activation, impl, device):
    window = {"window": (-40, None), "past window": (None, -21)}.get(form)
    mask = form if window is None else "none"
    case = Case(attn_dim=3, activation=activation, window=window, mask=mask, score_bias="qk")
    tensors = case.tensors(device)
    if window is None:
        tensors["mask"] = torch.zeros_like(tensors["mask"])
    assert_zero(evaluate(case.op, tensors, impl))


@every_impl
def test_some_queries_that_see_nothing_leave_the_others_alone(impl, device):
    case = Case(attn_dim=3, mask="pairs", score_bias="bqk")
    tensors = case.tensors(device)
    result = evaluate(case.op, tensors, impl)
    blind = ~tensors["mask"].any(-1)
    assert blind.any()
    assert not blind.all()
    for x in (*result.outputs.values(), result.gradients["query"], result.gradients["score_bias"]):
        assert largest(x[blind]) == 0
        assert (x[~blind].abs().amax(-1) > 0).all()


# --- Padding --------------------------------------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
@pytest.mark.parametrize("activation", ["tanh", "relu", "identity"])
@pytest.mark.parametrize("mask", ["keys", "pairs"])
@pytest.mark.parametrize("heads", [None, 2])
def test_masked_rows_are_never_read_and_have_zero_gradients(heads, mask, activation, fill, impl, device):
    case = Case(
        batch=2 if heads is None else 1, queries=7, keys=35, attn_dim=3, heads=heads, mask=mask, activation=activation
    )
    tensors = case.tensors(device)
    clean = evaluate(case.op, tensors, impl)
    hidden = hide(tensors, fill)
    result = evaluate(case.op, tensors, impl)
    assert_close(result, clean)
    for name, rows in hidden.items():
        grad = result.gradients[name]
        assert largest((grad if heads is None else grad.transpose(1, 2))[rows]) == 0, name


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

    def padded_op(*, impl, query, key, value, v, cu_seqlens_q, cu_seqlens_k):
        def at(cu):
            lengths = cu.diff()
            segment = torch.repeat_interleave(torch.arange(len(lengths), device=cu.device), lengths)
            rows = torch.arange(int(cu[-1]), device=cu.device)
            return (segment, rows - cu[segment]), (len(lengths), int(lengths.max()) + 3)

        (at_q, q_shape), (at_k, k_shape) = at(cu_seqlens_q), at(cu_seqlens_k)

        def pad(x, at, shape):
            y = x.new_full((*shape, *x.shape[1:]), fill).index_put(at, x)
            return y if case.heads is None else y.transpose(1, 2)

        seen = torch.tensor(True, device=query.device)
        q_mask, k_mask = (
            torch.zeros(shape, dtype=torch.bool, device=query.device).index_put(at, seen)
            for at, shape in ((at_q, q_shape), (at_k, k_shape))
        )
        out = concat_attention(
            pad(query, at_q, q_shape),
            pad(key, at_k, k_shape),
            pad(value, at_k, k_shape),
            v,
            impl=impl,
            mask=q_mask[:, :, None] & k_mask[:, None],
            window=case.window,
            dropout_p=case.dropout_p,
        )
        return (out if case.heads is None else out.transpose(1, 2))[at_q]

    return padded_op


@every_impl
@pytest.mark.parametrize("window", [None, (4, -1)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("heads", [None, 2])
def test_padded_and_ragged_forms_of_the_same_batch_agree(heads, dropout_p, window, impl, device):
    lengths = {"q": [7, 0, 3, 1, 18], "k": [5, 2, 0, 34, 9]}
    case = Case(queries=29, keys=50, attn_dim=3, heads=heads, ragged=True, dropout_p=dropout_p, window=window)
    tensors = case.tensors(device) | {f"cu_seqlens_{side}": offsets(x, device) for side, x in lengths.items()}
    exact = evaluate(case.op, in_double(tensors), "reference")
    rough = rough_runs(case.op, tensors)
    assert_as_exact(evaluate(as_padded(case, torch.nan), tensors, impl), rough, exact)
    assert_as_exact(evaluate(case.op, tensors, impl), rough, exact)


# --- Layouts that are rare ------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("axis", [1, 2])
def test_offsets_past_int32_match_the_reference(axis, far_apart, device):
    case = Case(dtype=torch.float16, batch=1, heads=3, queries=3, keys=3, score_bias="bhqk")
    tensors = case.tensors(device)
    tensors |= {name: far_apart(tensors[name], axis) for name in (*ROWS, "score_bias")}
    compare(case.op, tensors, "triton", dtype=torch.float16)


@every_impl
def test_offsets_of_any_stride_are_those_offsets(impl, device):
    case = Case(queries=29, keys=50, attn_dim=3, ragged=True)
    tensors = case.tensors(device)
    assert_identical(evaluate(case.op, strided_offsets(tensors), impl), evaluate(case.op, tensors, impl))
