"""The interpreter as the tests have it (`_interpreter.py`) refuses what Triton refuses, and computes the same."""

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.kernel


@triton.jit
def _sums_kernel(x_ptr, out_ptr, ROWS: tl.constexpr, COLS: tl.constexpr, OTHER: tl.constexpr):
    row, col, other = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, OTHER)
    x = tl.load(x_ptr + row[:, None] * COLS + col[None, :])
    tl.static_assert(x.shape[0] == ROWS)
    tl.static_assert(x.type.element_ty == x_ptr.dtype.element_ty)
    tl.store(out_ptr + row, tl.sum(x.to(tl.float32) * (other + 1).to(tl.float32)[None, :], axis=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32])
def test_types_and_shapes_are_those_of_the_call(dtype, device):
    for rows, cols in (4, 8), (8, 4), (1, 2):
        x = torch.arange(rows * cols, device=device).view(rows, cols).to(dtype)
        out = torch.empty(rows, device=device)
        _sums_kernel[(1,)](x, out, rows, cols, cols)
        assert out.tolist() == (x.float() * torch.arange(1, cols + 1, device=device)).sum(1).tolist()


def test_shapes_that_do_not_fit_are_refused(device):
    x, out = torch.zeros(4, 8, device=device), torch.zeros(4, device=device)
    with pytest.raises(Exception, match=r"incompatible dimensions|[Cc]annot make_shape_compatible"):
        _sums_kernel[(1,)](x, out, 4, 8, 4)
