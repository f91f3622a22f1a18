"""One query a sequence, which the pooling kernel of the location family answers."""

import pytest
import torch
from _compare import assert_as_exact, evaluate, in_double, rough_runs
from _concat import ACTIVATIONS, Case, check, compare
from _location import offsets

from fused_attn import ConcatAttention, concat, concat_attention, location_attention

IMPLS = (pytest.param("triton", marks=pytest.mark.kernel), "auto")
each_impl = pytest.mark.parametrize("impl", IMPLS)
ONE = {"queries": 1, "keys": 37, "attn_dim": 19}


@pytest.fixture
def pooled(monkeypatch):
    """How often the pooling kernel was asked."""
    calls = []
    ask = concat._pooled

    def count(*args):
        calls.append(1)
        return ask(*args)

    monkeypatch.setattr(concat, "_pooled", count)
    return calls


CASES = [
    Case(**ONE),
    *(Case(**ONE, activation=name, dtype=torch.bfloat16) for name in ACTIVATIONS if name != "tanh"),
    Case(**ONE, mask="padding", score_bias="bqk", dropout_p=0.3),
    Case(**ONE, mask="empty", score_bias="k", through=("weights",)),
    Case(**ONE, mask="pairs", score_bias="b1k", dtype=torch.float16),
    Case(**ONE, layout="strided", score_bias="1", return_weights=False),
    Case(**ONE, layout="transposed", value_dim=70, dropout_p=0.5),
    Case(queries=1, keys=300, attn_dim=3, batch=1),
    Case(**ONE, window=(None, None)),  # hides nothing
]


@each_impl
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case, impl, pooled, device):
    check(case, device, impl)
    assert pooled


@each_impl
@pytest.mark.parametrize("wrt", [["query"], ["key"], ["value"], ["v"], ["query", "v"]], ids="+".join)
def test_gradients_that_are_not_asked_for_do_not_matter(wrt, impl, device):
    check(Case(**ONE), device, impl, wrt=wrt)


@each_impl
def test_a_query_that_sees_nothing_may_be_nan(impl, pooled, device):
    case = Case(**ONE, batch=3, mask="pairs")
    tensors = case.tensors(device)
    tensors["mask"] = tensors["mask"].clone()
    tensors["mask"][0] = True
    tensors["mask"][1:] = False
    exact = evaluate(case.op, in_double(tensors), "reference")
    rough = rough_runs(case.op, tensors)
    tensors["query"][1] = torch.nan
    tensors["key"][1] = torch.inf
    tensors["value"][2] = torch.nan
    assert_as_exact(evaluate(case.op, tensors, impl), rough, exact)
    assert pooled


HEADS = [
    Case(**ONE, heads=3, v_heads=True),
    *(Case(**ONE, heads=2, v_heads=True, activation=name, dtype=torch.bfloat16) for name in ACTIVATIONS),
    Case(**ONE, heads=3, mask="padding", score_bias="bHqk", layout="transposed"),
    Case(**ONE, heads=5, mask="empty", score_bias="k", through=("weights",), dtype=torch.float16),
    Case(**ONE, heads=2, layout="strided", v_heads=True, return_weights=False),
    Case(**ONE, heads=17, v_heads=True, value_dim=40),
]


@each_impl
@pytest.mark.parametrize("shared", ["value", "key", ""])
@pytest.mark.parametrize("case", HEADS, ids=str)
def test_heads_are_hops(case, shared, impl, pooled, device):
    """By the kernel."""
    tensors = case.tensors(device)
    if shared:
        tensors[shared] = tensors[shared][:, :1]
    compare(case.op, tensors, impl, dtype=case.dtype, through=case.through)
    assert bool(pooled) == (impl == "triton" or device.type != "cpu")


@each_impl
def test_a_module_with_heads_pools(impl, pooled, device):
    module = ConcatAttention(7, 9, 8, num_heads=3).to(device)
    query, key = torch.randn(4, 1, 7, device=device), torch.randn(4, 60, 9, device=device)
    mask = torch.rand(4, 60, device=device) < 0.8
    want = module(query, key, mask=mask, return_weights=True, return_lse=True, impl="reference")
    got = module(query, key, mask=mask, return_weights=True, return_lse=True, impl=impl)
    assert bool(pooled) == (impl == "triton" or device.type != "cpu")
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@each_impl
@pytest.mark.parametrize(
    "case",
    [
        Case(**ONE, heads=2, dropout_p=0.3),
        Case(**ONE, heads=2, score_bias="bhqk"),
        Case(**ONE, heads=2, window=(0, 20)),
        Case(**ONE, window=(0, 20)),
        Case(**{**ONE, "queries": 7}, ragged=True),
    ],
    ids=str,
)
def test_windows_packed_rows_and_what_differs_between_heads_go_the_usual_way(case, impl, pooled, device):
    check(case, device, impl)
    assert not pooled


@each_impl
def test_ragged_keys_of_one_query_a_sequence_by_the_location_family(impl, device):
    """What docs/concat.md says: projected keys are `w=None`, the queries a context, the lengths may differ."""
    lengths = [5, 0, 33, 12]
    rng = torch.Generator().manual_seed(0)
    key, value = (torch.randn(sum(lengths), n, generator=rng).to(device) for n in (8, 6))
    query, v = torch.randn(len(lengths), 8, generator=rng).to(device), torch.randn(8, generator=rng).to(device)
    ends = offsets(lengths, device)
    got = location_attention(key, None, v=v, context=query[:, None], value=value, cu_seqlens=ends, impl=impl)
    ones = offsets([1] * len(lengths), device)
    want = concat_attention(query, key, value, v, cu_seqlens_q=ones, cu_seqlens_k=ends, impl=impl)
    torch.testing.assert_close(got, want)
    assert not got[1].any()


def test_a_decoder_step_is_a_row_of_the_whole(device):
    attend = ConcatAttention(12, 20, 8).to(device)
    states, encoded = torch.randn(2, 6, 12, device=device), torch.randn(2, 15, 20, device=device)
    mask = torch.arange(15, device=device) < torch.tensor([[15], [4]], device=device)
    whole, weights = attend(states, encoded, mask=mask, return_weights=True)
    for t in range(6):
        step, some = attend(states[:, t : t + 1], encoded, mask=mask, return_weights=True)
        torch.testing.assert_close(step, whole[:, t : t + 1])
        torch.testing.assert_close(some, weights[:, t : t + 1])


@each_impl
def test_compiles_for_one_query_and_for_more(impl, device):
    def loss(query, key, value, v):
        return concat_attention(query, key, value, v, impl=impl).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for queries in (1, 3):
        tensors = Case(queries=queries, keys=9, attn_dim=4).tensors(device)
        grads = []
        for fn in (loss, compiled):
            leaves = [x.clone().requires_grad_() for x in tensors.values()]
            grads.append(torch.autograd.grad(fn(*leaves), leaves))
        torch.testing.assert_close(grads[0], grads[1])
