"""Target attention: the reference against the textbook formula, the kernels against the reference."""

import pytest
import torch
from _compare import (
    IMPLS,
    assert_close,
    assert_identical,
    assert_matches_reference,
    evaluate,
    in_double,
    largest,
)
from _location import ACTIVATIONS, offsets
from _marks import both_forms
from _target import Case, operator, pairwise

from fused_attn import TargetAttention
from fused_attn.kernels import target as kernels
from fused_attn.kernels import target_bwd as backward

# Sizes are odd, and around the tiles: 16 to 64 keys, 16 to 64 of D, 16 to 128 features of either layer.
FACTORS = {
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "rows": (1, 17, 63, 100),
    "dim": (1, 9, 33),
    "attn_dim": (1, 17, 40),
    "second": (None, 1, 7, 20),
    "softmax": (True, False),
    "activation": ("sigmoid", "relu", "silu"),
    "scale": (1.0, -0.3),
    "ragged": (False, True),
    "mask": ("none", "random", "padding", "empty", "expanded"),
    "value": (None, 1, 45),
    "bias": (True, False),
    "layout": ("contiguous", "swapped", "strided"),
    "through": (("output", "weights"), ("output",), ("weights",)),
}
NAMES = ("query", "key", "w1", "w2", "v", "b1", "b2", "b3", "value")
each_impl = pytest.mark.parametrize("impl", IMPLS)
with_softmax = pytest.mark.parametrize("softmax", [True, False], ids=["softmax", "plain"])


def check(case: Case, device: torch.device, **options) -> None:
    assert_matches_reference(case.op, case.tensors(device), dtype=case.dtype, **{"through": case.through, **options})


# --- The formula, and the kernels against it ---------------------------------------------------------------------


@with_softmax
@both_forms
@pytest.mark.parametrize("second", [7, None])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_is_the_formula(activation, second, ragged, softmax, device):
    case = Case(
        rows=11, ragged=ragged, softmax=softmax, second=second, activation=activation, mask="random", scale=0.7
    )
    tensors = in_double(case.tensors(device))
    assert_close(evaluate(case.op, tensors, "reference"), evaluate(case.formula, tensors, ""))


@pytest.mark.kernel
@pytest.mark.parametrize("case", pairwise(FACTORS), ids=str)
def test_matches_the_reference_for_every_pair_of_factors(case, device):
    check(case, device)


@pytest.mark.kernel
@pytest.mark.parametrize(
    "sizes",
    [
        {"dim": 32, "attn_dim": 80, "second": 40, "dtype": torch.bfloat16},  # DIN's, in whole vectors of 16
        {"dim": 32, "attn_dim": 80, "second": 40},
        {"dim": 3, "attn_dim": 150, "second": 128, "dtype": torch.bfloat16},  # the first layer in parts
        {"dim": 80, "attn_dim": 36, "second": None, "dtype": torch.float16, "activation": "leaky_relu"},
        {"dim": 5, "attn_dim": 20, "value": 300, "softmax": False},  # the values in parts
        {"dim": 5, "attn_dim": 20, "value": 256, "dtype": torch.float16},
    ],
    ids=lambda sizes: ",".join(f"{n}={x}" for n, x in sizes.items()),
)
def test_matches_the_reference_for_other_sizes(sizes, device):
    check(Case(rows=70, batch=2, **sizes), device)


@pytest.mark.kernel
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_the_reference_for_every_activation(activation, device):
    check(Case(rows=21, activation=activation, softmax=activation != "elu"), device)


@pytest.mark.kernel
@with_softmax
@pytest.mark.parametrize("name", NAMES)
def test_one_gradient_alone_is_that_of_the_reference(name, softmax, device):
    check(Case(rows=21, value=7, mask="random", softmax=softmax), device, wrt=[name])


# --- Users in parts ----------------------------------------------------------------------------------------------


@pytest.fixture
def short_items(monkeypatch):
    """Items of one tile of 16 keys, so that there are more than the merge takes at a time."""
    monkeypatch.setattr(kernels, "_rows_per_item", lambda call, ragged, block_t: 16)


@pytest.fixture
def small_workspace(monkeypatch):
    """A workspace of one item: the backward starts its kernels for each."""
    monkeypatch.setattr(backward, "WORKSPACE_BYTES", 1)


@pytest.mark.kernel
@both_forms
@with_softmax
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_histories_in_parts_match_the_reference(short_items, dtype, softmax, ragged, device):
    check(Case(dtype=dtype, batch=1, rows=300, softmax=softmax, ragged=ragged, mask="random"), device)


@pytest.mark.kernel
@both_forms
@with_softmax
def test_a_backward_of_many_launches_matches_the_reference(small_workspace, softmax, ragged, device):
    check(Case(rows=100, softmax=softmax, ragged=ragged, value=5), device)


@pytest.mark.kernel
@with_softmax
def test_parts_of_histories_of_every_length_are_merged(short_items, softmax, device):
    lengths = [0, 1, 16, 0, 17, 64, 65, 0]
    case = Case(rows=sum(lengths), dim=5, ragged=True, softmax=softmax)
    tensors = case.tensors(device) | {"cu_seqlens": offsets(lengths, device)}
    tensors["query"] = torch.randn(len(lengths), 5, generator=torch.Generator().manual_seed(2)).to(device)
    assert_matches_reference(case.op, tensors)


@pytest.mark.kernel
@with_softmax
def test_two_runs_are_bitwise_equal(short_items, small_workspace, softmax, device):
    case = Case(rows=100, softmax=softmax, mask="random")
    tensors = case.tensors(device)
    assert_identical(evaluate(case.op, tensors, "triton"), evaluate(case.op, tensors, "triton"))


# --- What is not there, and what is hidden -----------------------------------------------------------------------


@each_impl
@with_softmax
def test_a_user_without_a_history_gets_zeros(softmax, impl, device):
    case = Case(rows=12, ragged=True, softmax=softmax)
    tensors = case.tensors(device)
    result = evaluate(case.op, tensors, impl)
    empty = tensors["cu_seqlens"].diff() == 0
    assert empty.sum() == 4
    assert largest(result.outputs["output"][empty]) == largest(result.gradients["query"][empty]) == 0
    assert largest(result.outputs["output"][~empty]) > 0


@each_impl
@with_softmax
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"rows": 0}], ids=["no user", "no key"])
def test_no_users_or_keys_give_empty_or_zeros(sizes, softmax, impl, device):
    case = Case(softmax=softmax, value=5, **sizes)
    result = evaluate(case.op, case.tensors(device), impl)
    assert result.outputs["output"].shape == (sizes.get("batch", 3), 5)
    for family in result:
        for name, x in family.items():
            assert largest(x) == 0, name


@each_impl
@with_softmax
@both_forms
@pytest.mark.parametrize("fill", [torch.nan, torch.inf, 1e30], ids=str)
def test_hidden_keys_and_values_change_nothing(fill, ragged, softmax, impl, device):
    case = Case(rows=23, value=5, mask="empty", softmax=softmax, ragged=ragged)
    tensors = case.tensors(device)
    hidden = {n: tensors[n].masked_fill(~tensors["mask"][..., None], fill) for n in ("key", "value")}
    got, want = (evaluate(case.op, tensors | x, impl) for x in (hidden, {}))
    assert_close(got, want)


@pytest.mark.kernel
@with_softmax
def test_a_user_of_nan_without_a_cotangent_sends_none(softmax, device):
    """A key of NaN is in the result of its user: where nothing comes back to that, no gradient is NaN."""
    case = Case(rows=20, softmax=softmax)
    tensors = case.tensors(device)
    tensors["key"][1, 3] = torch.nan
    leaves = {n: x.requires_grad_() for n, x in tensors.items()}
    out = operator(**case.options, return_weights=False)(impl="triton", **leaves)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()
    grads = torch.autograd.grad(out[[0, 2]].sum(), list(leaves.values()))
    assert all(g.isfinite().all() for g in grads)
    assert largest(grads[1][1]) == 0


# --- Options and results -----------------------------------------------------------------------------------------


@each_impl
@with_softmax
def test_weights_are_made_of_the_scores(softmax, impl, device):
    case = Case(rows=15, mask="empty", softmax=softmax)
    tensors = case.tensors(device)
    out, weights, scores = operator(**case.options, return_scores=True)(impl=impl, **tensors)
    assert torch.equal(scores == -torch.inf, ~tensors["mask"])
    want = scores.softmax(1).nan_to_num(0) if softmax else scores.masked_fill(~tensors["mask"], 0)
    torch.testing.assert_close(weights, want)
    torch.testing.assert_close(out, (weights[..., None] * tensors["key"]).sum(1))


@pytest.mark.kernel
@with_softmax
def test_the_scores_have_gradients(softmax, device):
    case = Case(rows=15, mask="random", softmax=softmax)

    def op(**arguments):
        out, scores = operator(**case.options, return_weights=False, return_scores=True)(**arguments)
        return out, scores.masked_fill(scores == -torch.inf, 0)

    assert_matches_reference(op, case.tensors(device))


@each_impl
def test_a_state_and_what_is_beside_it_are_of_the_softmax(impl, device):
    case = Case(rows=15, mask="empty")
    tensors = case.tensors(device)
    names = ("weights", "log_weights", "scores", "lse", "state")
    call = operator(**case.options, **{f"return_{name}": True for name in names})
    state, weights, logs, scores, lse = call(impl=impl, **tensors)
    torch.testing.assert_close(lse, scores.logsumexp(1))
    torch.testing.assert_close(logs.exp(), weights)
    torch.testing.assert_close(state.lse, lse)
    torch.testing.assert_close(state.out, operator(**case.options)(impl=impl, **tensors)[0])


@each_impl
@with_softmax
def test_a_jagged_history_is_its_rows(softmax, impl, device):
    case = Case(rows=21, ragged=True, value=5, mask="random", softmax=softmax)
    tensors = case.tensors(device)
    beside = ("weights", "log_weights", "scores", "lse") if softmax else ("weights", "scores")
    call = operator(**case.options, **{f"return_{name}": True for name in beside})
    cu = tensors["cu_seqlens"].long()

    def jagged(*, cu_seqlens, mask_too=False, **arguments):
        names = ("key", "value", "mask") if mask_too else ("key", "value")
        nested = {n: torch.nested.nested_tensor_from_jagged(arguments[n], cu) for n in names}
        results = call(**{**arguments, **nested})
        assert [x.is_nested for x in results] == [name in beside[:3] for name in ("out", *beside)]
        return [x.values() if x.is_nested else x for x in results]

    leaves = {n: x.requires_grad_(x.is_floating_point()) for n, x in tensors.items()}
    inputs = [x for x in leaves.values() if x.requires_grad]

    def with_gradients(call, **more):
        results = call(impl=impl, **leaves, **more)
        shown = [x.masked_fill(x == -torch.inf, 0) for x in results]
        return [*shown, *torch.autograd.grad(sum((x * x).sum() for x in shown), inputs)]

    want = with_gradients(call)
    for more in ({}, {"mask_too": True}):
        for x, y in zip(with_gradients(jagged, **more), want, strict=True):
            torch.testing.assert_close(x, y)


@each_impl
def test_the_module_takes_a_jagged_history(impl, device):
    module = TargetAttention(5, 6, softmax=True).to(device)
    rows, query = torch.randn(9, 5, device=device), torch.randn(3, 5, device=device)
    cu = offsets([4, 0, 5], device)
    want, weights = module(query, rows, cu_seqlens=cu, return_weights=True, impl=impl)
    nested = torch.nested.nested_tensor_from_jagged(rows, cu.long())
    got, made = module(query, nested, return_weights=True, impl=impl)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(made.values(), weights)
    assert made.offsets().tolist() == cu.tolist()
    torch.testing.assert_close(module(query, nested, impl=impl), want)
    state = module(query, nested, return_state=True, impl=impl)
    torch.testing.assert_close(state.out, want)


@pytest.mark.parametrize("units", [128, 129])
def test_more_units_than_a_kernel_holds_go_to_the_reference(units, device):
    tensors = Case(rows=5, second=units).tensors(device)
    assert operator()(**tensors)[0].shape == (3, 9)
    if units > kernels.MAX_UNITS:
        with pytest.raises(ValueError, match=r"^impl: 'triton' holds at most 128 units of the second layer"):
            operator()(**tensors, impl="triton")


# --- The module --------------------------------------------------------------------------------------------------


@each_impl
@with_softmax
@pytest.mark.parametrize("second", [4, None])
def test_the_module_is_the_mlp_of_the_four_parts(second, softmax, impl, device):
    """As DeepCTR-Torch and RecBole write it: a loop over their layers gives the scores."""
    torch.manual_seed(0)
    module = TargetAttention(5, 6, second, softmax=softmax, scale=5**-0.5).to(device)
    query, key = torch.randn(3, 5, device=device), torch.randn(3, 7, 5, device=device)
    mask = torch.arange(7, device=device) < torch.tensor([[7], [3], [1]], device=device)
    q = query[:, None].expand_as(key)
    u = torch.sigmoid(module.first(torch.cat([q, key, q - key, q * key], -1)))
    u = u if second is None else torch.sigmoid(module.second(u))
    score = module.score(u)[..., 0] * 5**-0.5
    weights = score.masked_fill(~mask, -torch.inf).softmax(1) if softmax else score * mask
    out, got = module(query, key, mask=mask, return_weights=True, impl=impl)
    torch.testing.assert_close(got, weights)
    torch.testing.assert_close(out, torch.einsum("bt,btd->bd", weights, key))


def test_the_default_is_that_of_the_paper():
    module = TargetAttention(8)
    assert [tuple(x.weight.shape) for x in (module.first, module.second, module.score)] == [
        (80, 32),
        (40, 80),
        (1, 40),
    ]
    assert "activation='sigmoid', softmax=False, scale=1.0" in repr(module)
