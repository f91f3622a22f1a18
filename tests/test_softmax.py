"""Device helpers of kernels/softmax.py."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="kernels are in Triton")
import triton.language as tl  # noqa: E402

import fused_attn  # noqa: E402
from fused_attn.kernels.softmax import exp  # noqa: E402


@triton.jit
def _exp_kernel(x_ptr, y_ptr, FMA: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, exp(tl.load(x_ptr + i), FMA))


@pytest.mark.kernel
@pytest.mark.parametrize("fma", [False, True])
def test_exp_is_exact_to_a_few_units_and_zero_at_minus_infinity(fma, device):
    """Interpreted kernels take the form without FMA: the other is what a GPU gets."""
    if not (triton.knobs.runtime.interpret or fma):
        pytest.skip("compiled, the form without FMA is the GPU's own exp, which loses |x| units")
    x = torch.linspace(-80, 0, 256, device=device)
    x[:2] = torch.tensor([-torch.inf, -1e30])
    y = torch.empty_like(x)
    _exp_kernel[(1,)](x, y, FMA=fma, BLOCK=256)
    assert (y[:2] == 0).all()
    exact = x.double().exp()
    assert ((y - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact).all()


# Rows of 4 numbers, of which the second has a NaN: (family, how it is called on them).
FAMILIES = {
    "location": lambda h, v, impl: fused_attn.location_attention(h[None], v, impl=impl),
    "relu": lambda h, v, impl: fused_attn.location_attention(h[None], v, activation="relu", impl=impl),
    "window": lambda h, v, impl: fused_attn.location_attention(h[None], v, window=(None, 0), impl=impl)[:, -1],
    "concat": lambda h, v, impl: fused_attn.concat_attention(h[None, :2], h[None], h[None], v, impl=impl),
    "general": lambda h, v, impl: fused_attn.general_attention(h[None, :1], h[None], impl=impl),
    "graph": lambda h, v, impl: fused_attn.graph_attention(
        h[:1], h, v, torch.tensor([0, 3], device=h.device), torch.tensor([2, 1, 0], device=h.device), impl=impl
    ),
    "hierarchical": lambda h, v, impl: fused_attn.hierarchical_attention(
        h,
        torch.tensor([0, 2, 3], dtype=torch.int32, device=h.device),
        torch.tensor([0, 2], dtype=torch.int32, device=h.device),
        fused_attn.Score(v),
        fused_attn.Score(v),
        impl=impl,
    ),
    "statistics": lambda h, v, impl: fused_attn.statistics_pooling(h[None], v.diag(), None, v, impl=impl)[0],
    "word by word": lambda h, v, impl: fused_attn.word_by_word_attention(
        h[None], h[None, :1], *[v.diag()] * 3, v, v.diag(), impl=impl
    ),
}


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=pytest.mark.kernel), "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_visible_row_of_nan_shows_in_the_output(family, impl, device):
    """A softmax that takes its scores for minus infinity would give zeros, or leave the row out."""
    h = torch.linspace(-1, 1, 12, device=device).reshape(3, 4)
    h[1] = torch.nan
    assert FAMILIES[family](h, torch.ones(4, device=device), impl).isnan().all()
