"""Numbers of the location and hierarchical families: the formula, weights at any size of the scores, 16 bits.

The oracles here are a few lines of float64 PyTorch; they call nothing of the package.
"""

import itertools
import math

import pytest
import torch
from _compare import IMPLS, assert_close, assert_matches_reference, evaluate, in_double, largest
from _hierarchical import Case as Levels
from _hierarchical import operator as levels
from _location import Case, offsets, operator, table
from torch import Tensor

from fused_attn import Score, hierarchical_attention, location_attention

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WINDOWS = (None, (None, 0), (2, None), (2, 1))
ACTS = {"tanh": torch.tanh, "identity": lambda x: x, "sigmoid": torch.sigmoid, "relu": torch.relu}


# --- The formula -------------------------------------------------------------------------------------------------


def softmax_of_seen(scores: Tensor, seen: Tensor) -> Tensor:
    """Over the last axis, 0 where nothing is seen."""
    scores = scores.masked_fill(~seen, -math.inf)
    weights = torch.exp(scores - scores.detach().amax(-1, keepdim=True).clamp(min=-1e300))
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)


def by_formula(
    *,
    h,
    w=None,
    b=None,
    v=None,
    gate_w=None,
    gate_b=None,
    context=None,
    value=None,
    score_bias=None,
    mask=None,
    activation="tanh",
    gate_activation="sigmoid",
    window=None,
    impl=None,
):
    """Location attention of a padded batch in float64: the output and the weights, as the package has them."""
    h, w, b, v, gate_w, gate_b, context, value, score_bias = (
        x if x is None else x.double() for x in (h, w, b, v, gate_w, gate_b, context, value, score_bias)
    )
    seen = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) if mask is None else mask
    hops = (w if v is None else v).dim() == 2
    z = h if w is None else torch.einsum("btd,da->bta", h, w.reshape(h.shape[-1], -1))
    z = z if b is None else z + b
    if context is not None:
        inner = 0 if v is None and not hops else 1
        z = z + context.reshape(*context.shape[: context.dim() - inner], -1).reshape(len(h), -1, z.shape[-1])
    u = ACTS[activation](z)
    if gate_w is not None:
        u = u * ACTS[gate_activation](h @ gate_w + (0 if gate_b is None else gate_b))
    s = u if v is None else torch.einsum("bta,ar->btr", u, v.reshape(u.shape[-1], -1))
    s = s if score_bias is None else s + score_bias[..., None]
    s, value = s.transpose(1, 2), h if value is None else value
    if window is not None:  # (B, R, positions, keys)
        j = torch.arange(h.shape[1], device=h.device)
        left, right = (10**9 if side is None else side for side in window)
        seen = seen[:, None, None] & (j >= j[:, None] - left) & (j <= j[:, None] + right)
        weights = softmax_of_seen(s[:, :, None].expand(-1, -1, h.shape[1], -1), seen.expand(-1, s.shape[1], -1, -1))
        out = torch.einsum("brij,bjd->bird", weights, value)
        return (out, weights) if hops else (out.squeeze(2), weights.squeeze(1))
    weights = softmax_of_seen(s, seen[:, None].expand_as(s))
    out = weights @ value
    return (out, weights) if hops else (out.squeeze(1), weights.squeeze(1))


SCORES = ("linear", "linear_hops", "mlp", "mlp_hops", "gated", "gated_hops", "projected")
SMALL = {"batch": 2, "rows": 7, "dim": 4, "attn_dim": 3, "hops": 2, "value": 3, "mask": "empty"}


def against_the_formula(case: Case, window, impl: str, device, dtype, **changed) -> None:
    tensors = case.tensors(device) | changed
    exact = evaluate(lambda **x: by_formula(**x, window=window), in_double(tensors), "reference")
    op = operator(window=window)
    assert_matches_reference(op, tensors, impl=impl, exact=exact, dtype=dtype)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_the_reference_and_its_gradients_are_the_formula(score, window, device):
    """In float64: the error rule takes the error of the reference, which says nothing where it is wrong too."""
    case = Case(**SMALL, score=score, context="row")
    tensors = in_double(case.tensors(device))
    exact = evaluate(lambda **x: by_formula(**x, window=window), tensors, "reference")
    assert_close(evaluate(operator(window=window), tensors, "reference"), exact)


@table("score,window", SCORES, WINDOWS, of_kernel=3)
def test_outputs_weights_and_gradients_are_those_of_the_formula(score, window, impl, device):
    case = Case(**SMALL, score=score, context="sequence", score_bias=True)
    against_the_formula(case, window, impl, device, torch.float32)


def two_levels(h, inner_offsets, outer_offsets, inner, outer, mask):
    """Hierarchical attention of scores (w, v) with tanh, in float64 loops over segments and groups."""

    def pool(rows, seen, w, v):
        if len(rows) == 0:
            return rows.new_zeros(rows.shape[1]), rows.new_zeros(0)
        s = torch.tanh(rows @ w) @ v
        weights = softmax_of_seen(s, seen)
        return weights @ rows, weights

    h, (w, v), (ow, ov) = h.double(), (x.double() for x in inner), (x.double() for x in outer)
    cut = inner_offsets.tolist()
    pooled = [pool(h[a:b], mask[a:b], w, v) for a, b in itertools.pairwise(cut)]
    segments = torch.stack([x for x, _ in pooled])
    seen = torch.tensor([bool(mask[a:b].any()) for a, b in itertools.pairwise(cut)], device=h.device)
    cut = outer_offsets.tolist()
    groups = [pool(segments[a:b], seen[a:b], ow, ov) for a, b in itertools.pairwise(cut)]
    return (
        torch.stack([x for x, _ in groups]),
        segments,
        torch.cat([x for _, x in pooled]),
        torch.cat([x for _, x in groups]),
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_two_levels_are_those_of_the_formula(impl, device):
    rng = torch.Generator().manual_seed(2)

    def randn(*shape):
        return torch.randn(shape, generator=rng).to(device)

    tensors = {"h": randn(11, 4), "w": randn(4, 3), "v": randn(3), "ow": randn(4, 5), "ov": randn(5)}
    inner, outer = offsets([3, 0, 2, 4, 2], device), offsets([3, 0, 1, 1], device)
    mask = torch.tensor([1, 0, 1, 1, 1, 1, 1, 0, 1, 0, 0], dtype=torch.bool, device=device)

    def op(*, impl, h, w, v, ow, ov):
        if h.dtype == torch.float64:
            results = two_levels(h, inner, outer, (w, v), (ow, ov), mask)
        else:
            results = hierarchical_attention(
                h,
                inner,
                outer,
                Score(w, v=v),
                Score(ow, v=ov),
                mask=mask,
                return_segments=True,
                return_weights=True,
                impl=impl,
            )
        return results[0], torch.cat([x.flatten() for x in results[1:4]])

    exact = evaluate(op, in_double(tensors), "reference")
    assert_matches_reference(op, tensors, impl=impl, exact=exact)


# --- Weights at any size of the scores ---------------------------------------------------------------------------

BIASES = {
    "one of 1e30": lambda n: torch.zeros(n).index_fill(0, torch.tensor(2), 1e30),
    "all 1e30": lambda n: torch.full((n,), 1e30),
    "-1e4": lambda n: torch.full((n,), -1e4),
    "-1e9": lambda n: torch.full((n,), -1e9),
    "finfo.min": lambda n: torch.full((n,), torch.finfo(torch.float32).min),
    "finfo.min but for two": lambda n: torch.full((n,), torch.finfo(torch.float32).min).index_fill(
        0, torch.tensor([1, 5]), 0.0
    ),
    "-1e9 but for one": lambda n: torch.full((n,), -1e9).index_fill(0, torch.tensor(1), 0.0),
}


def assert_sum_to_one(weights: Tensor, seen: Tensor) -> None:
    """Within one rounding of their dtype a key; `seen` (..., keys): where any is."""
    total = weights.double().sum(-1)
    some = seen.any(-1).expand(total.shape)
    assert (total[some] - 1).abs().max() <= torch.finfo(weights.dtype).eps * weights.shape[-1]
    assert largest(total[~some]) == 0


@table("bias,dtype,window", BIASES, DTYPES, WINDOWS, of_kernel=5)
def test_weights_sum_to_one_and_multiply_the_values(bias, dtype, window, impl, device):
    rng = torch.Generator().manual_seed(0)
    rows = 18 if impl == "triton" and window is not None else 9
    h = torch.randn(1, rows, 4, generator=rng).to(device, dtype)
    w = torch.randn(4, 2, generator=rng).to(device, dtype)
    value = torch.randn(1, rows, 3, generator=rng).to(device, dtype).requires_grad_()
    out, weights = location_attention(
        h,
        w,
        score_bias=BIASES[bias](rows)[None].to(device),
        value=value,
        window=window,
        return_weights=True,
        impl=impl,
    )
    i = torch.arange(rows, device=device)
    left, right = (10**9 if side is None else side for side in window or (None, None))
    seen = (
        (i >= i[:, None] - left) & (i <= i[:, None] + right)
        if window
        else torch.ones(1, rows, dtype=torch.bool, device=device)
    )
    assert_sum_to_one(weights, seen)
    eps = torch.finfo(dtype).eps
    want = weights.double() @ (value.double()[:, None] if window else value.double())
    want = want.transpose(1, 2) if window else want
    assert largest(out - want) <= 4 * eps * largest(value)
    (dvalues,) = torch.autograd.grad(out.float().sum(), value)
    want = weights.double().sum(1 if window is None else (1, 2))[..., None].expand_as(dvalues)
    assert largest(dvalues - want) <= 4 * eps * max(1, largest(want))


@table("score,dtype,window", ("linear", "mlp", "gated_hops"), DTYPES, WINDOWS, of_kernel=5)
def test_one_visible_key_has_the_weight_one(score, dtype, window, impl, device):
    case = Case(dtype=dtype, batch=2, rows=5, dim=6, attn_dim=4, hops=2, score=score)
    tensors = case.tensors(device)
    mask = torch.zeros(2, 5, dtype=torch.bool, device=device)
    mask[0, 3] = mask[1, 1] = True
    tensors["h"] = tensors["h"] * 30
    result = evaluate(operator(window=window), tensors | {"mask": mask}, impl)
    weights = result.outputs["weights"]
    assert set(weights.unique().tolist()) <= {0.0, 1.0}
    for name in ("w", "b", "v", "gate_w", "gate_b"):  # which the one weight does not depend on
        assert largest(result.gradients.get(name, torch.zeros(1))) == 0, name
    seen = weights.sum(-1) == 1
    out = result.outputs["output"].movedim(1, 2) if window and score == "gated_hops" else result.outputs["output"]
    assert torch.equal(out[seen].unique(dim=0), tensors["h"][mask].unique(dim=0))


@table("bias,dtype", (0.0, 1e4, -1e9, 1e30), DTYPES, of_kernel=5)
def test_weights_of_two_levels_sum_to_one(bias, dtype, impl, device):
    case = Levels(dtype=dtype, documents="few", inner="linear", outer="linear", activations=("identity",) * 4)
    tensors = case.tensors(device)
    tensors["inner_b"] = tensors["outer_b"] = torch.tensor(
        bias if dtype != torch.float16 else min(max(bias, -6e4), 6e4), dtype=dtype, device=device
    )
    inner = tensors["inner_offsets"].diff()
    for name, lengths in (("inner_weights", inner), ("outer_weights", tensors["outer_offsets"].diff())):
        _, weights = levels(activations=("identity",) * 4, through=(name,))(impl=impl, **tensors)
        entry = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
        total = torch.zeros(len(lengths), dtype=torch.float64, device=device).index_add(0, entry, weights.double())
        some = lengths > 0 if name == "inner_weights" else torch.tensor([False, True, True, False], device=device)
        assert (total[some] - 1).abs().max() <= torch.finfo(dtype).eps * lengths.max()
        assert largest(total[~some]) == 0


SCALES = (1.0, 30.0, 1e3, 1e6)


@table("scale,dtype,window", SCALES, (torch.float32, torch.bfloat16), WINDOWS, of_kernel=3)
def test_gradients_follow_the_error_rule_at_any_size_of_the_scores(dtype, scale, window, impl, device):
    options = {"window": window, "activation": "identity"}
    case = Case(dtype, batch=1, rows=18, dim=5, hops=2, score="linear_hops", value=4, score_bias=True)
    tensors = case.tensors(device)
    tensors |= {name: tensors[name] * scale for name in ("w", "score_bias")}
    op = operator(**options)
    exact = evaluate(lambda **x: by_formula(**x, **options), in_double(tensors), "reference")
    assert_matches_reference(op, tensors, impl=impl, exact=exact, dtype=dtype, large=scale > 1)


@table("score,value", ("linear_hops", "mlp_hops", "mlp"), (None, 4), of_kernel=6)
def test_gradients_are_exact_where_one_row_has_almost_all_the_weight(score, value, impl, device):
    """Scores of 100: what a row keeps of its gradient is less than the rounding of the sum it is taken from."""
    activation, scaled = (
        ("identity", ("w", "score_bias")) if score == "linear_hops" else ("tanh", ("v", "score_bias"))
    )
    op = operator(activation=activation)
    for rows in range(14, 30):
        case = Case(
            batch=2, rows=rows, dim=5, hops=2, score=score, activation=activation, value=value, score_bias=True
        )
        tensors = case.tensors(device)
        tensors |= {name: tensors[name] * 100 for name in scaled}
        assert_matches_reference(op, tensors, impl=impl, large=True)


# --- 16 bits -----------------------------------------------------------------------------------------------------

WIDE = {
    "linear": {"score": "linear"},
    "linear hops": {"score": "linear_hops"},
    "mlp": {"score": "mlp"},
    "mlp hops": {"score": "mlp_hops"},
    "gated": {"score": "gated"},
    "projected": {"score": "projected"},
    "mlp, ragged": {"score": "mlp", "ragged": True},
    "linear, ragged": {"score": "linear", "ragged": True},
}


@table("score,window", WIDE, (None, (None, 0), (2, 1)), of_kernel=3)
def test_products_past_float16_are_those_of_float32(score, window, impl, device):
    """Projections and scores of millions: finite, and the same whatever else is asked for."""
    sizes = {"batch": 2, "rows": 12, "dim": 32, "attn_dim": 32, "hops": 2}
    case = Case(torch.float16, **sizes, score_bias=True, context="sequence", **WIDE[score])
    tensors = case.tensors(device)
    for name in ("h", "w", "v", "gate_w", "context"):
        if name in tensors:
            tensors[name] = tensors[name] * 300
    wide = {n: x.float() if x.is_floating_point() else x for n, x in tensors.items()}
    fixed = {"activation": "identity", "gate_activation": "identity", "window": window}
    weights = not (case.ragged and window)
    want = operator(**fixed, return_weights=False)(impl="reference", **wide)
    alone = operator(**fixed, return_weights=False)(impl=impl, **tensors)
    assert largest(want) > 100
    torch.testing.assert_close(alone.float(), want, rtol=2e-3, atol=2e-3 * largest(want))
    if weights:
        out, shown = operator(**fixed)(impl=impl, **tensors)
        assert torch.equal(out, alone)
        assert shown.isfinite().all()
    grads = evaluate(operator(**fixed, return_weights=False), tensors, impl).gradients
    assert grads["h"].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_products_past_float16_of_two_levels_are_those_of_float32(impl, device):
    case = Levels(
        dtype=torch.float16, documents="few", dim=32, attn_dims=(32, 32), activations=("identity", "sigmoid") * 2
    )
    tensors = case.tensors(device)
    for name in ("h", "inner_w", "inner_v", "outer_w", "outer_v"):
        tensors[name] = tensors[name] * 100
    wide = {n: x.float() if x.is_floating_point() else x for n, x in tensors.items()}
    op = levels(activations=case.activations, through=case.through)
    for got, want in zip(op(impl=impl, **tensors), op(impl="reference", **wide), strict=True):
        torch.testing.assert_close(got.float(), want, rtol=2e-3, atol=2e-3 * largest(want))
