"""Device helpers of kernels/softmax.py."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="kernels are in Triton")
import triton.language as tl  # noqa: E402
from fused_attn.kernels.softmax import exp  # noqa: E402


@triton.jit
def _exp_kernel(x_ptr, y_ptr, FMA: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, exp(tl.load(x_ptr + i), FMA))


@pytest.mark.kernel
@pytest.mark.parametrize("fma", [False, True])
def test_exp_is_exact_to_a_few_units_and_zero_at_minus_infinity(fma, device):
    """Interpreted kernels take the form without FMA: the other is what a GPU gets."""
    if device.type != "cpu" and not fma:
        pytest.skip("a GPU's own exp loses |x| units")
    x = torch.linspace(-80, 0, 256, device=device)
    x[:2] = torch.tensor([-torch.inf, -1e30])
    y = torch.empty_like(x)
    _exp_kernel[(1,)](x, y, FMA=fma, BLOCK=256)
    assert (y[:2] == 0).all()
    exact = x.double().exp()
    assert ((y - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact).all()
