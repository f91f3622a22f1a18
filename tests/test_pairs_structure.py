"""Concat and general attention: windows, sequences without pairs, padding, packed rows, and the same twice."""

import dataclasses

import _concat
import _general
import pytest
import torch
from _compare import (
    assert_as_exact,
    assert_close,
    assert_identical,
    assert_zero,
    evaluate,
    in_double,
    rough_runs,
    strided_offsets,
)
from _concat import IMPLS, every_impl, hide, offsets, segments
from _marks import both_forms, each_dtype
from _pairs import as_padded, each_family


@every_impl
@each_family
def test_window_alone_is_the_mask_that_it_stands_for(make, impl, device):
    case = make(batch=1, queries=19, keys=35, attn_dim=3, window=(5, -1))
    tensors = case.tensors(device)
    i, j = torch.arange(19, device=device)[:, None], torch.arange(35, device=device)
    mask = (i - 5 <= j) & (j <= i - 1)
    masked = dataclasses.replace(case, window=None)
    assert_close(evaluate(case.op, tensors, impl), evaluate(masked.op, tensors | {"mask": mask[None]}, impl))


@pytest.mark.whole  # there is nothing to compute
@every_impl
@each_family
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("lengths", [[], [(0, 0)], [(0, 0), (0, 0)], [(0, 3)], [(3, 0)], [(3, 0), (0, 3)]], ids=str)
def test_ragged_batches_without_pairs_give_zeros(lengths, heads, make, impl, device):
    queries, keys = (sum(pair[i] for pair in lengths) for i in range(2))
    case = make(queries=queries, keys=keys, attn_dim=3, heads=heads, ragged=True)
    result = evaluate(case.op, case.tensors(device) | segments(lengths, device), impl)
    assert_zero(result)
    assert result.outputs["output"].shape == (queries, *(() if heads is None else (heads,)), 12)


@pytest.mark.whole  # two small calls each
@every_impl
@each_family
@each_dtype
def test_masked_rows_are_never_read_in_any_dtype(dtype, make, impl, device):
    case = make(dtype=dtype, batch=1, attn_dim=3, mask="pairs", window=(9, None))
    tensors = case.tensors(device)
    clean = evaluate(case.op, tensors, impl)
    hide(tensors, torch.nan)
    assert_close(evaluate(case.op, tensors, impl), clean)


@every_impl
@each_family
@pytest.mark.parametrize("window", [None, (4, -1)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("heads", [None, 2])
def test_padded_and_ragged_forms_of_the_same_batch_agree(heads, dropout_p, window, make, impl, device):
    case = make(queries=29, keys=50, attn_dim=3, heads=heads, ragged=True, dropout_p=dropout_p, window=window)
    tensors = case.tensors(device) | segments([(7, 5), (0, 2), (3, 0), (1, 34), (18, 9)], device)
    exact = evaluate(case.op, in_double(tensors), "reference")
    rough = rough_runs(case.op, tensors)
    assert_as_exact(evaluate(as_padded(case, torch.nan), tensors, impl), rough, exact)
    assert_as_exact(evaluate(case.op, tensors, impl), rough, exact)


@every_impl
@each_family
@pytest.mark.parametrize("size", [1, 30])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("heads", [None, 2])
def test_packed_rows_with_a_mask_of_keys_are_the_padded_ones(heads, activation, size, make, impl, device):
    """Of sizes too that exponentials do not hold."""
    case = make(queries=29, keys=50, attn_dim=3, heads=heads, ragged=True, mask="keys", activation=activation)
    tensors = case.tensors(device)
    tensors["key"] = tensors["key"] * size
    exact = evaluate(case.op, in_double(tensors), "reference")
    assert_as_exact(evaluate(as_padded(case, torch.nan), in_double(tensors), "reference"), exact, exact)
    assert_as_exact(evaluate(case.op, tensors, impl), rough_runs(case.op, tensors), exact)


@every_impl
@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": 2, "mask": "keys", "window": (9, 3), "dropout_p": 0.3},
        {"heads": 2, "activation": "relu", "mask": "keys", "value_dim": 40},
        {"activation": "identity", "window": (None, 0), "keys": 90},
        {"given": {"score_bias": ()}},
        {"given": {"mask": (1,)}, "heads": 2, "value_dim": 40},
        {"given": {"score_bias": (2,), "mask": (2,)}, "heads": 2, "window": (9, 3), "dropout_p": 0.3},
        {"given": {"score_bias": (1,), "mask": (2,)}, "heads": 2, "activation": "relu", "keys": 90},
    ],
    ids=str,
)
@pytest.mark.parametrize("side", ["both", "q", "k"])
def test_a_number_a_pair_of_packed_rows_is_what_padded_sequences_give(side, options, dtype, make, impl, device):
    """Of the weights, their logarithms and the scores, and of a bias and mask: those of a call for each sequence."""
    options = {"dtype": dtype, "queries": 30, "keys": 40, "attn_dim": 3, "ragged": True, **options}
    given = options.pop("given", {})  # a number a pair, by their axes after that of pairs
    case = make(**options)
    tensors = case.tensors(device)
    lengths = {"q": [17, 0, 13], "k": [9, 2, case.keys - 11]}
    if side == "q":
        lengths["k"] = [case.keys // 2] * 2
        lengths["q"] = [21, 9]
    if side == "k":
        lengths["q"] = [10] * 3
    tensors |= {f"cu_seqlens_{name}": offsets(counts, device) for name, counts in lengths.items()}
    counts = [queries * keys for queries, keys in zip(lengths["q"], lengths["k"], strict=True)]
    rng = torch.Generator().manual_seed(2)
    for name, axes in given.items():
        numbers = torch.randn(sum(counts), *axes, generator=rng)
        numbers[: lengths["k"][0]] -= 9  # a mask hides all from the first query
        tensors[name] = (numbers.to(dtype) if name == "score_bias" else numbers > -1).to(device)
    of_pairs = given.keys()
    options = {"activation": case.activation, "window": case.window, "dropout_p": case.dropout_p}
    op = _general.operator(scale=0.5, **options) if isinstance(case, _general.Case) else _concat.operator(**options)
    wanted = {"return_weights": True, "return_log_weights": True, "return_scores": True}

    def together(out, *pairs):
        """Hidden pairs have -inf on either side."""
        assert all(x[..., 0].shape == pairs[0][..., 0].shape for x in pairs)
        return out, torch.cat([x.masked_fill(x == -torch.inf, 0) for x in pairs])

    def packed(*, impl, cu_seqlens_q, cu_seqlens_k, **given):
        cu = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        for one, rows in (("q", ["query"]), ("k", ["key", "value", "mask"])):
            if side not in ("both", one):  # padded, and all of a length
                del cu[f"cu_seqlens_{one}"]
                for name in (name for name in rows if name in given and name not in of_pairs):
                    x = given[name].unflatten(0, (len(lengths[one]), -1))
                    given[name] = x if case.heads is None or x.dim() < 4 else x.transpose(1, 2)
        out, *pairs = op(impl=impl, **given, **cu, **wanted)
        if side == "k":
            out = (out if case.heads is None else out.transpose(1, 2)).flatten(0, 1)
        return together(out, *pairs)

    def apart(*, impl, cu_seqlens_q, cu_seqlens_k, v=None, **given):
        made = []
        for s in range(len(lengths["q"])):
            rows = {"query": slice(*cu_seqlens_q[s : s + 2].tolist())}
            rows |= dict.fromkeys(("key", "value", "mask"), slice(*cu_seqlens_k[s : s + 2].tolist()))
            one = {n: given[n][rows[n]] for n in given if n not in of_pairs}
            one = {n: (x if x.dim() < 3 else x.transpose(0, 1))[None] for n, x in one.items()}
            for n in of_pairs:
                x = given[n].split(counts)[s]
                x = (x if x.dim() == 2 else x[:, None]).mT.unflatten(1, (lengths["q"][s], lengths["k"][s]))
                one[n] = x if case.heads is None else x[None]
            out, *pairs = op(impl=impl, **one, **({} if v is None else {"v": v}), **wanted)
            flat = [x[0].flatten(-2) if case.heads is None else x[0].flatten(-2).mT for x in pairs]
            made.append((out[0] if case.heads is None else out[0].transpose(0, 1), *flat))
        return together(*(torch.cat(x) for x in zip(*made, strict=True)))

    oracle = packed if case.dropout_p else apart  # which draws other numbers
    exact = evaluate(oracle, in_double(tensors), "reference")
    assert_as_exact(evaluate(packed, tensors, impl), rough_runs(oracle, tensors), exact, dtype=dtype)


@every_impl
@each_family
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("size", [1, 30])
def test_rows_that_a_mask_of_packed_pairs_hides_are_never_read(size, heads, make, impl, device):
    """From all, or from some alone: a query and a key may hold NaN then, and others do not notice."""
    case = make(queries=12, keys=20, attn_dim=3, heads=heads, ragged=True)
    tensors = case.tensors(device) | segments([(7, 12), (5, 8)], device)
    tensors["key"] = tensors["key"] * size
    mask = torch.ones(124, 1, dtype=torch.bool, device=device)
    rows = mask[:84].view(7, 12)
    rows[2], rows[:, 5] = False, False
    clean = evaluate(case.op, tensors | {"mask": mask}, impl)
    spoilt = {name: x.clone() for name, x in tensors.items()}
    spoilt["query"][2], spoilt["key"][5], spoilt["value"][5] = torch.nan, torch.nan, torch.nan
    result = evaluate(case.op, spoilt | {"mask": mask}, impl)
    assert_close(result, clean)
    assert (result.gradients["query"][2] == 0).all()
    rows[3, 5] = True
    out = case.op(impl=impl, **spoilt, mask=mask)
    assert out[3].isnan().all()
    assert out[[*range(3), *range(4, 12)]].isfinite().all()


@every_impl
@each_family
@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": 2, "mask": "keys", "window": (9, 3), "dropout_p": 0.3},
        {"heads": 2, "activation": "relu", "mask": "keys", "value_dim": 40},
        {"activation": "identity", "window": (None, 0), "queries": 3},
        {"queries": 3, "keys": 90},  # one query a sequence
        {"queries": 3, "heads": 2, "dropout_p": 0.3},
    ],
    ids=str,
)
def test_rows_packed_on_one_side_are_those_packed_on_both(options, dtype, side, make, impl, device):
    """The padded side is of sequences that are all as long as the longest may be."""
    case = make(**{"dtype": dtype, "queries": 30, "keys": 36, "attn_dim": 3, "ragged": True, **options})
    tensors = case.tensors(device)
    del tensors[f"cu_seqlens_{'k' if side == 'q' else 'q'}"]
    rows = case.queries if side == "q" else case.keys
    lengths = {f"cu_seqlens_{side}": offsets([1, 0, rows - 1], device)}
    names = ("key", "value", "mask") if side == "q" else ("query",)

    def padded(x):
        x = x.unflatten(0, (3, -1))
        return x if case.heads is None or x.dim() < 4 else x.transpose(1, 2)

    def packed(x):
        return (x if x.dim() < 4 else x.transpose(1, 2)).flatten(0, 1)

    def flat(*, impl, **given):
        shape = given["query" if side == "k" else "key"].shape
        even = torch.arange(4, dtype=torch.int32, device=device) * (shape[1] if case.heads is None else shape[2])
        other = {f"cu_seqlens_{'k' if side == 'q' else 'q'}": even}
        out = case.op(impl=impl, **{n: packed(x) if n in names else x for n, x in given.items()}, **other)
        return out if side == "q" else padded(out)

    tensors |= lengths | {name: padded(tensors[name]).contiguous() for name in names if name in tensors}
    exact = evaluate(flat, in_double(tensors), "reference")
    assert_as_exact(evaluate(case.op, tensors, impl), rough_runs(flat, tensors), exact, dtype=dtype)


@pytest.mark.whole  # there is nothing to compute
@every_impl
@each_family
@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("heads", [None, 2])
def test_rows_packed_on_one_side_of_no_sequence_keep_their_shapes(heads, side, make, impl, device):
    """The padded side still has a length, though it has no rows to tell it."""
    sizes = {"queries": 0 if side == "q" else 7, "keys": 0 if side == "k" else 9}
    case = make(**sizes, attn_dim=3, heads=heads, ragged=True)
    tensors = case.tensors(device) | {f"cu_seqlens_{side}": offsets([], device)}
    other = "k" if side == "q" else "q"
    del tensors[f"cu_seqlens_{other}"]
    lead = () if heads is None else (heads,)
    for name in ("query",) if other == "q" else ("key", "value"):
        tensors[name] = tensors[name].new_zeros(0, *lead, sizes["queries" if other == "q" else "keys"], 3)
    result = evaluate(case.op, tensors, impl)
    assert_zero(result)
    width = tensors["value"].shape[-1]
    assert result.outputs["output"].shape == ((0, *lead, 7, width) if side == "k" else (0, *lead, width))


@every_impl
@each_family
def test_offsets_of_any_stride_are_those_offsets(make, impl, device):
    case = make(queries=29, keys=50, attn_dim=3, ragged=True)
    tensors = case.tensors(device)
    assert_identical(evaluate(case.op, strided_offsets(tensors), impl), evaluate(case.op, tensors, impl))


@pytest.mark.parametrize("impl", IMPLS)
@each_family
@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_bitwise_equal(dtype, ragged, make, impl, device):
    case = make(dtype=dtype, batch=1, queries=33, keys=40, attn_dim=3, ragged=ragged, dropout_p=0.3)
    tensors = case.tensors(device)
    assert_identical(evaluate(case.op, tensors, impl), evaluate(case.op, tensors, impl))
