"""What a cotangent of location attention's output gives each score, and in float32 what is left of its sum.

A program has the rows of an item, [BLOCK_T] by all hops [BLOCK_R]. See location_bwd.py for the formulas.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import launch, sequence_ptr
from .chip import LENGTHS
from .location import Blocks, Call, matmul
from .masks import Items, dropout_scale, item_rows, sequence_at
from .softmax import load_lse
from .sums import add_items
from .tiles import load_rows


@triton.jit
def weights_and_gaps(val_ptrs, keep, seq, t, at, visible, result, given, dropout, size, flags, blocks):
    """(a, a ⊙ k, gap, |dO| of a hop) of the `visible` scores `at`, all but the last [BLOCK_T, BLOCK_R].

    gap = dO_r · (k_jr value_j - o_r). For one hop as one sum; for more both sides are taken from o_0 where products
    are in float32. Then a key with all the weight gets 0, not the difference of two roundings. With dropout and
    more hops they are not: k o_0 is far from o_r, and would be taken out of large numbers again.
    """
    r = tl.arange(0, blocks.R)
    hop = r < size.R
    if dropout.seed is not None:
        k = dropout_scale(dropout, t[:, None], seq, r[None, :])
    gap = tl.zeros([blocks.T, blocks.R], tl.float32)
    offset = tl.zeros([blocks.R], tl.float32)  # dO_r · (o_r - o_0), or dO_r · o_r
    cotangent = tl.zeros([blocks.R], tl.float32)  # 0 where all of dO_r and dlse_r is 0
    for d0 in range(0, size.DV, blocks.D):
        d = d0 + tl.arange(0, blocks.D)
        x = load_rows(val_ptrs, keep, d, size.DV)
        out_at = seq * size.R * size.DV + r[None, :] * size.DV + d[:, None]
        some = hop[None, :] & (d < size.DV)[:, None]
        do = tl.load(given.do + out_at, mask=some, other=0.0).to(tl.float32)  # [BLOCK_D, BLOCK_R]
        out = tl.load(result.out + out_at, mask=some, other=0.0)
        cotangent += tl.sum(tl.abs(do), axis=0)
        if blocks.R == 1 and dropout.seed is not None:
            x = x.to(tl.float32) * k
        if blocks.R == 1 or (tl.float32 == flags.COMPUTE and dropout.seed is None):
            first = result.out + seq * size.R * size.DV + d
            centre = tl.load(first, mask=d < size.DV, other=0.0)
            x = x.to(tl.float32) - centre[None, :]
            out -= centre[:, None]
        offset += tl.sum(do * out, axis=0)
        gap = matmul(x, do, gap, flags.COMPUTE, flags.PRECISION)
    if blocks.R > 1 and dropout.seed is not None:
        gap *= k
    gap -= offset[None, :]

    s = tl.load(result.scores + at, mask=visible, other=float("-inf"))
    top, inv = load_lse(result.lse + (seq * size.R + r) * 2, hop)
    a_w = tl.exp(s - top[None, :]) * inv[None, :]
    p = a_w
    if dropout.seed is not None:
        p *= k
    return a_w, p, gap, cotangent


@triton.jit(do_not_specialize=LENGTHS)
def _location_bwd_gap_kernel(
    values,  # (B, T, DV) or (N, DV)
    mask,  # (B, T), (N,) or None
    spans,
    dropout,
    result,
    given,
    gap_ptr,  # (items, R) float32
    num_seqs,
    per_seq,
    T,  # 0 where the batch is ragged
    size,
    flags,
    blocks,
):
    """Σ_j a_jr gap_jr over an item, which for a sequence is 0 but for roundings, those of o above all."""
    item = tl.program_id(0)
    seq = sequence_at(item, spans, num_seqs, per_seq, blocks.T)
    seq, t, _inside, rows, keep = item_rows(item, seq, mask, spans, T, per_seq, blocks.T)
    r = tl.arange(0, blocks.R)
    val_ptrs = sequence_ptr(values, seq, rows)
    at = (seq * T + rows)[:, None] * size.R + r[None, :]
    visible = keep[:, None] & (r < size.R)[None, :]
    a_w, _p, gap, _cotangent = weights_and_gaps(
        val_ptrs, keep, seq, t, at, visible, result, given, dropout, size, flags, blocks
    )
    total = tl.sum(tl.where(visible, a_w * gap, 0.0), axis=0)
    tl.store(gap_ptr + item.to(tl.int64) * size.R + r, total, mask=r < size.R)


def left_of_gaps(call: Call, args: dict[str, Any], blocks: Blocks, items: Items, registers: dict[str, int]) -> Tensor:
    """What is left of Σ_j a_jr gap_jr, (S, R)."""
    R, out = call.size.R, args["result"].out
    gaps = torch.empty(items.count, R, dtype=torch.float32, device=out.device)
    left = torch.empty(call.seqs, R, dtype=torch.float32, device=out.device)
    args = args | {"item0": 0, "gap_ptr": gaps}
    if args["values"].ptr is None:
        args["values"] = args["h"]
    launch(_location_bwd_gap_kernel, (items.count,), args, blocks, enable_fp_fusion=False, **registers)
    add_items(gaps, left, items, 0, items.count)
    return left
