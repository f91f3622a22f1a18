"""Matrix products of tiles."""

import triton
import triton.language as tl

from .chip import INTERPRET

_EXACT: tl.constexpr = tl.constexpr(INTERPRET)


@triton.jit
def tile_product(x, y, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """The product x y in float32.

    The interpreter's is NumPy's, whose sums have an order that differs between CPUs, and between a product and its
    transpose: a backward would not make the scores of its forward. There each sum is rounded once.
    """
    if _EXACT:
        return tl.dot(x.to(tl.float64), y.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    return tl.dot(x.to(COMPUTE), y.to(COMPUTE), input_precision=PRECISION)


@triton.jit
def add_product(x, y, acc, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """The sum acc + x y.

    In float32 each product is a sum of its own: one chain over all parts of a row rounds two to six times more (D 300
    to 1,100), and more than a matrix product of PyTorch, which has several. Of a plain sum the compiler makes one
    chain again, that begins with acc; a product with 1 it leaves alone, and makes an addition of in the end.
    """
    if tl.float32 == COMPUTE:
        part = tile_product(x, y, COMPUTE, PRECISION)
        return tl.fma(part, tl.full(part.shape, 1.0, tl.float32), acc)
    return tl.dot(x.to(COMPUTE), y.to(COMPUTE), acc, input_precision=PRECISION)
