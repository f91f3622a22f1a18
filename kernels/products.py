"""Matrix products of tiles."""

import triton
import triton.language as tl


@triton.jit
def add_product(x, y, acc, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """The sum acc + x y.

    In float32 each product is a sum of its own: one chain over all parts of a row rounds two to six times more (D 300
    to 1,100), and more than a matrix product of PyTorch, which has several. Of a plain sum the compiler makes one
    chain again, that begins with acc; a product with 1 it leaves alone, and makes an addition of in the end.
    """
    if tl.float32 == COMPUTE:
        part = tl.dot(x.to(COMPUTE), y.to(COMPUTE), input_precision=PRECISION)
        return tl.fma(part, tl.full(part.shape, 1.0, tl.float32), acc)
    return tl.dot(x.to(COMPUTE), y.to(COMPUTE), acc, input_precision=PRECISION)
