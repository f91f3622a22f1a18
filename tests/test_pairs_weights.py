"""Weights of scores of any size: they sum to 1, multiply the values, and give the gradients that they should.

The oracle is the textbook in float64, with nothing of the package.
"""

import _concat
import _general
import pytest
import torch
from _compare import assert_as_exact, evaluate, in_double, nudged
from _concat import every_impl
from _marks import each_dtype
from torch.nn import functional as F

each_size = pytest.mark.parametrize("size", [1, 30, 1e3, 1e6])
LEAST = torch.finfo(torch.float32).min

ACTIVATIONS = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.2 * x),
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
}


def textbook(case):
    """(output, weights) of a padded call without dropout; 16-bit tensors are computed with in float32."""

    def op(*, impl, mask=None, **tensors):
        dtype = tensors["query"].dtype
        wide = {name: x.to(torch.promote_types(dtype, torch.float32)) for name, x in tensors.items()}
        return tuple(x.to(dtype) for x in formula(mask=mask, **wide))

    def formula(*, query, key, mask, value=None, v=None, weight=None, score_bias=0.0):
        act = ACTIVATIONS[case.activation]
        if getattr(case, "p", None) is not None:
            distances = (query[..., :, None, :] - key[..., None, :, :]).abs() ** case.p
            scores = -(distances * (v if v.dim() == 1 else v[:, None, None])).sum(-1)
        elif v is not None:
            pairs = act(query[..., :, None, :] + key[..., None, :, :])
            scores = (pairs * (v if v.dim() == 1 else v[:, None, None])).sum(-1)
        else:
            scores = act(case.scale * (query if weight is None else query @ weight) @ key.mT)
        scores = scores + score_bias
        i, j = (torch.arange(n, device=scores.device) for n in scores.shape[-2:])
        i = i[:, None]
        left, right = case.window or (None, None)
        shown = torch.ones_like(i == j)
        shown = shown if left is None else shown & (j >= i - left)
        shown = shown if right is None else shown & (j <= i + right)
        if mask is not None:
            mask = mask[:, None] if mask.dim() == 2 else mask
            shown = shown & (mask[:, None] if scores.dim() == 4 else mask)
        blind = ~shown.any(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(~(shown | blind), -torch.inf), -1).masked_fill(blind, 0)
        return weights @ (key if value is None else value), weights

    return op


CASES = {
    "concat": _concat.Case(queries=5, keys=21, attn_dim=4, value_dim=6, score_bias="qk"),
    "concat, window": _concat.Case(queries=19, keys=21, attn_dim=4, heads=2, score_bias="bhqk", window=(9, 12)),
    "concat, one query": _concat.Case(queries=1, keys=21, attn_dim=4, value_dim=6, score_bias="bqk"),
    "concat, identity": _concat.Case(batch=1, queries=5, keys=21, activation="identity", score_bias="qk"),
    "distance": _concat.Case(queries=5, keys=21, attn_dim=4, value_dim=6, p=1, score_bias="qk"),
    "distance, squares": _concat.Case(
        queries=19, keys=21, attn_dim=4, heads=2, p=2, score_bias="bhqk", window=(9, 12)
    ),
    "general": _general.Case(batch=1, queries=5, keys=21, attn_dim=4, value_dim=6, score_bias="qk"),
    "general, window": _general.Case(queries=19, keys=40, attn_dim=4, heads=2, score_bias="bhqk", window=(9, 12)),
    "general, keys are values": _general.Case(batch=1, queries=5, keys=40, own_value=False, score_bias="qk"),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
# What a product meets before the softmax, which forward and backward have to round alike: nothing, an activation that
# ends in a product, a bias after it.
ROUNDED = {
    f"{family}, {activation}, {'bias' if bias else 'plain'}": module.Case(
        batch=2, queries=19, keys=40, attn_dim=8, value_dim=8, activation=activation, score_bias=bias
    )
    for family, module in (("concat", _concat), ("general", _general))
    for activation in ("identity", "silu", "gelu", "leaky_relu")
    for bias in (None, "qk")
    if (family, activation) != ("concat", "identity")  # a sum of two numbers, and no product
}
# The sum of a product of more features than float32 takes at a time.
ROUNDED["general, wide"] = _general.Case(batch=2, queries=19, keys=40, attn_dim=40, value_dim=8)
BIASES = {"-1e4": -1e4, "-1e9": -1e9, "the least float32": LEAST, "1e30": 1e30}


def with_dtype(case, dtype, **changes):
    return type(case)(**{**case.__dict__, "dtype": dtype, **changes})


def assert_normal(out, weights, values, dtype):
    """Weights sum to 1, up to a rounding of each, and are what multiplies the values."""
    eps = torch.finfo(dtype).eps
    total = weights.double().sum(-1)
    # Half an eps of each weight for its own rounding, and those of float32 for the sum before it.
    assert (total - 1).abs().max() <= eps / 2 + 8 * torch.finfo(torch.float32).eps
    made = weights.double() @ values.double()
    most = weights.double() @ values.double().abs()
    sums = torch.finfo(torch.float32).eps * values.shape[-2] / 2  # at worst
    assert ((out.double() - made).abs() <= (2 * eps + sums) * most).all()


@every_impl
@each_dtype
@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES.keys())
@each_case
def test_a_row_that_a_constant_moves_keeps_its_weights(case, bias, dtype, impl, device):
    """The mask constants of Keras, TensorFlow and Hugging Face on a whole row: it is as if they were not there."""
    case = with_dtype(case, dtype)
    tensors = case.tensors(device)
    tensors["score_bias"] = torch.full_like(tensors["score_bias"], bias, dtype=torch.float32)
    for returned in (True, False):  # what is not returned is seen in the gradient of the values
        case = with_dtype(case, dtype, return_weights=returned)
        leaves = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in tensors.items()}
        result = case.op(impl=impl, **leaves)
        out, weights = result if returned else (result, None)
        values = leaves.get("value", leaves["key"])
        if returned:
            assert_normal(out, weights, values, dtype)
        if "value" in leaves:
            (grad,) = torch.autograd.grad(out.float().sum(), values)
            width = out.shape[-1]
            total = grad.double().sum() / width
            rows = out.numel() / width
            assert abs(total - rows) <= rows * (torch.finfo(dtype).eps + 1e-6), f"{total} of {rows}"


@every_impl
@each_dtype
@each_case
def test_the_weight_of_a_single_visible_key_is_exactly_one(case, dtype, impl, device):
    case = with_dtype(case, dtype, window=None)
    tensors = case.tensors(device)
    tensors["mask"] = (torch.arange(tensors["key"].shape[-2], device=device) == 4).expand(len(tensors["key"]), -1)
    out, weights = case.op(impl=impl, **tensors)
    assert (weights[..., 4] == 1).all()
    values = tensors.get("value", tensors["key"])
    assert torch.equal(out, values[..., 4:5, :].expand_as(out))


@every_impl
@each_dtype
@each_size
@each_case
def test_gradients_of_scores_of_any_size_are_exact(case, size, dtype, impl, device):
    """The allowance is the oracle's own error in float32, and what rounding to 16 bits costs."""
    check_gradients(case, size, dtype, impl, device)


@pytest.mark.kernel
@each_dtype
@each_size
@pytest.mark.parametrize("case", ROUNDED.values(), ids=ROUNDED.keys())
def test_forward_and_backward_round_a_score_alike(case, size, dtype, device):
    check_gradients(case, size, dtype, "triton", device)


@pytest.mark.parametrize("width", [8, 40, 64, 300])
@pytest.mark.parametrize("queries", [1, 17, 1024])
def test_forward_and_backward_add_a_float32_score_in_parts_of_one_width(queries, width):
    """Of another width the backward's weights are not the forward's: at scores of 1e6 dvalue was off by 6."""
    pytest.importorskip("triton")
    from fused_attn.kernels import chip, general, general_bwd

    for target in (x for x in vars(chip).values() if isinstance(x, chip.Chip)):
        for plain in (True, False):
            terms = width, width, plain, 0 if plain else 2, False, False
            forward = general.fwd_blocks(target, 4, queries, *terms)
            for backward in general_bwd.bwd_blocks(target, 4, queries, 1024, *terms, False):
                assert forward.D == backward.D, f"{target}: {forward}, {backward}"


def check_gradients(case, size, dtype, impl, device):
    case = with_dtype(case, dtype)
    tensors = case.tensors(device)
    if "v" in tensors:
        if size > 1e4 and dtype == torch.float16:
            size = 1e4  # v is a float16
        tensors["v"] = tensors["v"] * size
    else:
        case = with_dtype(case, dtype, scale=case.scale * size)
    op = textbook(case)
    exact = evaluate(op, in_double(tensors), "")
    rough = [evaluate(op, tensors, ""), *(evaluate(op, nudged(tensors, i), "") for i in range(1, 9))]
    assert_as_exact(evaluate(case.op, tensors, impl), rough, exact, dtype=dtype)


@pytest.mark.parametrize("keys", [29, 35, 36])
def test_gradients_of_a_row_that_one_key_almost_has_are_exact_by_the_blocked_path(keys, device):
    check_gradients(
        _concat.Case(queries=5, keys=keys, attn_dim=16, value_dim=6, score_bias="qk"),
        30,
        torch.float32,
        "auto",
        device,
    )


@pytest.mark.kernel
@pytest.mark.parametrize("seed", [4, 6, 14, 16, 24, 31])
def test_gradients_of_a_row_that_one_key_almost_has_are_exact(seed, device):
    """A gap is the difference of a value and the output, whose rounding all gaps of a row have alike."""
    case = _general.Case(
        batch=1, queries=5, keys=21, attn_dim=4, value_dim=6, scale=50.0, return_weights=False, layout="contiguous"
    )
    rng = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(x.shape, generator=rng).to(device) for n, x in case.tensors(device).items()}

    def op(**arguments):
        return textbook(case)(**arguments)[0]

    rough = [evaluate(op, tensors, ""), *(evaluate(op, nudged(tensors, i), "") for i in range(1, 9))]
    assert_as_exact(evaluate(case.op, tensors, "triton"), rough, evaluate(op, in_double(tensors), ""))
