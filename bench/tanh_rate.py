"""How many hardware tanh a chip makes in a second: the wall of a kernel that makes one for each element of a score.

Imported only where there is an NVIDIA GPU: `tanh.approx.f32` is an instruction of theirs, and is one MUFU.TANH.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Chains of a program: 16 a thread, none of which waits for another."""
WARPS = 4
UNROLLED = 16
"""Of a chain in one trip of the loop, so that the loop's own instructions do not show."""


@triton.jit
def _tanh_rate_kernel(out_ptr, trips, BLOCK: tl.constexpr, UNROLLED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = 1.0 / (1 + at)
    for _ in range(trips):
        for _ in tl.static_range(UNROLLED):
            x = tl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
            )
    tl.store(out_ptr + at, x)  # what is stored can not be left out


def launch(out: Tensor, trips: int) -> None:
    """`trips` · UNROLLED tanh for each element of the float32 `out`, whose size is a multiple of BLOCK."""
    _tanh_rate_kernel[(out.numel() // BLOCK,)](out, trips, BLOCK=BLOCK, UNROLLED=UNROLLED, num_warps=WARPS)
