"""Loads and stores of tiles in memory: of rows, one address each, and of matrices with two strides."""

import triton
import triton.language as tl


@triton.jit
def load_rows(ptrs, keep, cols, width):
    """Tile [BLOCK_T, BLOCK] of rows at ptrs [BLOCK_T]; 0 outside: what is masked is never read.

    width: None where all of the columns exist: then they have no predicates.
    """
    mask = keep[:, None]
    if width is not None:
        mask = mask & (cols < width)[None, :]
    return tl.load(ptrs[:, None] + cols[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptrs, x, keep, cols, width):
    """Store a tile where `load_rows` reads it, in the dtype that is there."""
    mask = keep[:, None]
    if width is not None:
        mask = mask & (cols < width)[None, :]
    tl.store(ptrs[:, None] + cols[None, :], x.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def store_both(out, exact, rows, x, keep, first, width):
    """Store a tile as `store_rows` does, and in float32 at `exact`, if it is not None.

    rows: where each begins, from either pointer. first: the tile's first column. A wide tile is stored once and read
    again in parts: both stores of all of it took registers that there are not.
    """
    BLOCK: tl.constexpr = x.shape[1]
    cols = first + tl.arange(0, BLOCK)
    if exact is None:
        store_rows(out + rows, x, keep, cols, width)
    else:
        store_rows(exact + rows, x, keep, cols, width)
        if BLOCK <= 64:
            store_rows(out + rows, x, keep, cols, width)
        else:
            tl.debug_barrier()  # other threads than stored them read these numbers
            for part in range(0, BLOCK, 64):
                few = first + part + tl.arange(0, 64)
                store_rows(out + rows, load_rows(exact + rows, keep, few, width), keep, few, width)


@triton.jit
def add_rows(ptrs, x, keep, cols, width):
    """Add a tile to what is there, float32."""
    store_rows(ptrs, load_rows(ptrs, keep, cols, width) + x, keep, cols, width)


@triton.jit
def add_later(ptrs, x, keep, cols, width, before):
    """Store a tile, or add it to what launches of earlier items have left, if there were any before."""
    store_rows(ptrs, x + load_rows(ptrs, keep & (before > 0), cols, width).to(tl.float32), keep, cols, width)


@triton.jit
def load_weight(ptr, stride_d, stride_a, d, a, D, A):
    """Tile W[d, a]; 0 outside."""
    return tl.load(
        ptr + d[:, None] * stride_d + a[None, :] * stride_a, mask=(d < D)[:, None] & (a < A)[None, :], other=0.0
    )


@triton.jit
def load_part(ptr, stride_d, stride_a, d0, d, a, D, A, WHOLE: tl.constexpr):
    """Tile W[d0 + d, a]; 0 outside, of which there is nothing where WHOLE says so.

    Then a loop over d0 keeps the offsets in the tile and moves one address; beside a test an element they took
    registers that there are not.
    """
    if WHOLE:
        return tl.load(ptr + d0 * stride_d + (d[:, None] * stride_d + a[None, :] * stride_a))
    else:
        return load_weight(ptr, stride_d, stride_a, d0 + d, a, D, A)
