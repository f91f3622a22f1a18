"""Gradients of the weights of word-by-word attention, Σ x_nᵀ dy_n over the rows n, of three pairs in one launch.

    dW_y = Σ_j y_jᵀ dkey_j        dW_h = Σ_t h_tᵀ dc_t        [dW_r dW_t] = Σ_t r_{t-1}ᵀ [dc_t du_t]

A program has a tile of one of them and a part of its rows; `sums` adds the parts in a fixed order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Entries, Sequences, constants, launch, sequence_ptr, untold
from .chip import Chip, all_registers, cdiv, even, matmul_flags, pow2
from .masks import unmasked
from .products import add_product
from .tiles import load_rows, store_rows

_WHOLE = tl.constexpr(16)


class Pair(NamedTuple):
    """Rows x (B, T, D) or packed, as in `arguments.Sequences`, and dy (B, T, K) of the same; no pointers: no pair."""

    ptr: Tensor | None
    stride_b: int
    stride_t: int
    UNIT: Any
    dy: Tensor | None
    stride_dy: int
    parts: Tensor | None  # (splits, D, K) float32
    D: int
    K: int
    T: int  # rows of a sequence, or all packed ones: these are 4 n + 3, see arguments.untold
    rows: int
    rows_per_split: int


@triton.jit
def _add_rows(x, mask, program, flags, blocks, MASKED: tl.constexpr):
    tiles_k = tl.cdiv(x.K, blocks.K)
    tiles = tl.cdiv(x.D, blocks.D) * tiles_k
    split = program // tiles
    d = program % tiles // tiles_k * blocks.D + tl.arange(0, blocks.D)
    k = program % tiles_k * blocks.K + tl.arange(0, blocks.K)
    per_split = (x.rows_per_split >> 2).to(tl.int32)
    T = (x.T >> 2).to(tl.int32)
    first = split * per_split
    last = tl.minimum(first + per_split, (x.rows >> 2).to(tl.int32))
    acc = tl.zeros([blocks.D, blocks.K], tl.float32)
    for n0 in range(first, last, blocks.T):
        n = n0 + tl.arange(0, blocks.T)
        seq = (n // T).to(tl.int64)
        t = n % T
        seen = n < last
        if MASKED:
            seen = unmasked(mask, seq, t, seen)
        rows = load_rows(sequence_ptr(x, seq, t), seen, d, x.D)
        dy = load_rows(x.dy + n.to(tl.int64) * x.stride_dy, n < last, k, x.K)  # 0 of the rows that are not seen
        acc = add_product(tl.trans(rows), dy, acc, flags.COMPUTE, flags.PRECISION)
    store_rows(x.parts + (split.to(tl.int64) * x.D + d) * x.K, acc, d < x.D, k, x.K)


@triton.jit
def _or_next(x, mask, program, flags, blocks, MASKED: tl.constexpr):
    """The tile of x, if this program has one of its own; else which of the next pair's it is, from 0."""
    if x.dy is not None:
        splits = tl.cdiv((x.rows >> 2).to(tl.int32), (x.rows_per_split >> 2).to(tl.int32))
        own = tl.cdiv(x.D, blocks.D) * tl.cdiv(x.K, blocks.K) * tl.maximum(splits, 1)
        if (program >= 0) & (program < own):
            _add_rows(x, mask, program, flags, blocks, MASKED)
        program -= own
    return program


@triton.jit
def _recurrent_bwd_weights_kernel(a, b, c, mask, flags, blocks):
    program = _or_next(a, mask, tl.program_id(0), flags, blocks, True)
    program = _or_next(b, mask, program, flags, blocks, False)
    _or_next(c, mask, program, flags, blocks, False)


class Blocks(NamedTuple):
    """Rows, and numbers of the gradient's tile."""

    T: int
    D: int
    K: int
    warps: int = 4


class Flags(NamedTuple):
    """How rows are multiplied, see `chip.matmul_flags`."""

    COMPUTE: object
    PRECISION: str


def weight_blocks(chip: Chip, itemsize: int, D: int, K: int) -> Blocks:
    """Of the widest pair. Chosen by the compile report (no spills)."""
    if chip.backend == "interpreter":
        return Blocks(16, 16, 16)
    if itemsize == 4:  # no matrix units in full float32: products are unrolled
        return Blocks(16, pow2(D, 16, 32), pow2(K, 16, 64))
    return Blocks(64 if chip.wgmma and even(D, K) else 32, pow2(D, 16, 64), pow2(K, 16, 64))


def weight_parts(
    chip: Chip, mask: Entries, dtype: torch.dtype, pairs: list[tuple[Sequences, Tensor] | None]
) -> list[Tensor | None]:
    """Parts (splits, D, K) of Σ xᵀ dy of three pairs, multiplied as in `dtype`; None for None.

    mask: which rows of the first may be read.
    """
    sizes = [None if given is None else (given[0].ptr.shape[-1], given[1].shape[-1]) for given in pairs]
    wide = [max(width) for width in zip(*filter(None, sizes), strict=True)]
    if not wide:
        return [None] * len(pairs)
    blocks = weight_blocks(chip, dtype.itemsize, *wide)
    tiles = [0 if size is None else cdiv(size[0], blocks.D) * cdiv(size[1], blocks.K) for size in sizes]
    most = cdiv(2 * chip.cores, sum(tiles))  # programs for two a core
    made, programs = [], 0
    for given, count in zip(pairs, tiles, strict=True):
        if given is None:
            made.append(Pair(None, 0, 0, _WHOLE, None, 0, None, 0, 0, 0, 0, 0))
            continue
        x, dy = given
        D, K, rows = x.ptr.shape[-1], dy.shape[-1], dy.shape[:-1].numel()
        per_split = max(4 * blocks.T, cdiv(cdiv(rows, most), blocks.T) * blocks.T)
        parts = torch.empty(max(1, cdiv(rows, per_split)), D, K, dtype=torch.float32, device=dy.device)
        made.append(Pair(*x, dy, dy.stride(-2), parts, D, K, *map(untold, (dy.shape[-2], rows, per_split))))
        programs += count * len(parts)
    args = dict(zip("abc", made, strict=True)) | {"mask": mask}
    args["flags"] = constants(Flags(**matmul_flags(chip, dtype)))
    launch(_recurrent_bwd_weights_kernel, (programs,), args, blocks, **all_registers(chip))
    return [x.parts for x in made]
