"""Concat attention: splits and chunks, windows, calls with nothing to attend to, and padding."""

import _pairs
import pytest
import torch
from _compare import assert_close, assert_identical, evaluate
from _concat import ROWS, Case, check, compare, each_impl, every_impl, offsets
from _marks import both_forms

from fused_attn.blocked import concat as in_blocks
from fused_attn.kernels import chip as chips
from fused_attn.kernels import concat as forward
from fused_attn.kernels import concat_bwd as kernels

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
        Case(dtype=torch.float16, batch=1, queries=20, keys=300, attn_dim=3, value_dim=70),
        Case(queries=15, keys=300, attn_dim=3, ragged=True, value_dim=70),
    ],
    ids=str,
)
def test_keys_in_parts_match_the_reference(case, device):
    """On a chip of many cores, few queries have their keys split."""
    chip = chips.chip_of(device)._replace(cores=1000)
    with chips.assume(chip):
        check(case, device, "triton")


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_are_made_once_however_wide_the_values_are(monkeypatch, dtype, device):
    grids = []
    launch = forward.launch

    def counting(kernel, grid, *args, **options):
        if kernel is forward._concat_fwd_kernel:
            grids.append(grid)
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(forward, "launch", counting)
    for width in (12, 70):
        case = Case(dtype=dtype, batch=1, queries=40, keys=70, attn_dim=3, value_dim=width)
        tensors = case.tensors(device)
        evaluate(case.op, tensors, "triton")
    assert len(grids) == 2
    assert len(set(grids)) == 1, grids


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


# --- Nothing to attend to -------------------------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("activation", ["tanh", "relu", "identity"])
@_pairs.each_way_to_be_empty
def test_empty_batches_give_zeros(sizes, activation, heads, impl, device):
    _pairs.check_empty(
        Case(**sizes, activation=activation, heads=heads, score_bias="bhqk", mask="pairs"), impl, device
    )


@every_impl
@pytest.mark.parametrize("activation", ["tanh", "gelu", "identity"])
@_pairs.each_way_to_be_blind
def test_queries_that_see_nothing_give_zeros(form, activation, impl, device):
    _pairs.check_blind(Case(attn_dim=3, activation=activation, score_bias="qk", **form), impl, device)


@every_impl
def test_some_queries_that_see_nothing_leave_the_others_alone(impl, device):
    _pairs.check_some_blind(Case(attn_dim=3, mask="pairs", score_bias="bqk"), impl, device)


# --- Padding --------------------------------------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
@pytest.mark.parametrize("activation", ["tanh", "relu", "identity"])
@pytest.mark.parametrize("mask", ["keys", "pairs"])
@pytest.mark.parametrize("heads", [None, 2])
def test_masked_rows_are_never_read_and_have_zero_gradients(heads, mask, activation, fill, impl, device):
    batch = 2 if heads is None else 1
    case = Case(batch=batch, queries=7, keys=35, attn_dim=3, heads=heads, mask=mask, activation=activation)
    _pairs.check_hidden(case, fill, impl, device)


# --- Layouts that are rare ------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("axis", [1, 2])
def test_offsets_past_int32_match_the_reference(axis, far_apart, device):
    case = Case(dtype=torch.float16, batch=1, heads=3, queries=3, keys=3, score_bias="bhqk")
    tensors = case.tensors(device)
    tensors |= {name: far_apart(tensors[name], axis) for name in (*ROWS, "score_bias")}
    compare(case.op, tensors, "triton", dtype=torch.float16)


@pytest.mark.kernel
def test_packed_rows_past_int32_match_the_reference(far_apart, device):
    tensors = Case(dtype=torch.float16, batch=1, queries=3, keys=3).tensors(device)
    tensors = {name: far_apart(x[0], 0) if name in ROWS else x for name, x in tensors.items()}
    tensors |= {
        name: torch.tensor([0, 3], dtype=torch.int32, device=device) for name in ("cu_seqlens_q", "cu_seqlens_k")
    }
    compare(Case(dtype=torch.float16, ragged=True).op, tensors, "triton", dtype=torch.float16)
