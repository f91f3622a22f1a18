"""Backward of concat attention over packed rows, with nothing to know of the lengths on the host.

The sums and loops are those of concat_bwd.py. There g is made once for many tiles of queries, in slots for all their
keys: with packed rows a slot for each would be as many as the longest sequence needs, which is known on the device
only. So a program keeps the one tile of g that it is at, and what it adds to is its own:

    queries     a program has a tile of queries, and walks the tiles of their keys: dq, and a partial sum of dv
    keys        a program has a tile of keys, and walks the tiles of their queries: dk and dvalue

The score is made twice, of some 4 operations an element to the 6 to 7 of either walk, and a launch is as long as its
longest sequences; there are as many launches for any lengths, and the workspace is bounded as it is there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import head_ptr, launch, pitch, untold
from .chip import LENGTHS, all_registers
from .concat import Call
from .concat_bwd import WORKSPACE_BYTES, Blocks, compute_dtype
from .concat_factors import Factors, bound_at, rows_before, rows_of, tile_at
from .concat_walk import Gradients, Workspace, features_gradient, gradient_tile, staying, tiles_meet, walk_tile
from .masks import mirrored, unmasked, window_range, window_tiles
from .products import tile_product
from .sums import sums
from .tiles import add_rows, load_rows


@triton.jit(do_not_specialize=LENGTHS)
def _concat_bwd_queries_kernel(
    q,  # (1, H, Nq, A)
    k,  # (1, H, Nk, A)
    v,
    value,  # (1, H, Nk, DV)
    bias,  # a number a pair, see Pairs, or None
    mask,  # the same
    q_rows,  # (1, Nq): rows that may be read, or None
    k_rows,  # (1, Nk)
    q_side,
    k_side,
    dropout,
    saved,
    work,  # of this launch's programs: g
    grads,
    Tq,
    Tk,
    window,
    size,
    flags,
    blocks,
):
    head = tl.program_id(1).to(tl.int64)
    q_item = (work.item0 >> 2) + tl.program_id(0)
    slot = (tl.program_id(0).to(tl.int64) * size.H + head) * blocks.N * blocks.M
    seq, q_start, lo, hi, _ = tile_at(q_item, q_side, Tq, blocks.M)
    k_start, k_length, k_item0 = rows_of(seq, k_side, Tk, blocks.N)
    m = tl.arange(0, blocks.M)
    n = tl.arange(0, blocks.N)
    at = (q_start + lo + m).to(tl.int64)
    q_inside = lo + m < hi
    q_keep = unmasked(q_rows, seq, at, q_inside)
    q_ptrs = head_ptr(q, seq, head) + at * pitch(q)
    dq_ptrs = grads.q + rows_before(seq, head, q_side, Tq, size.H) * size.A + at * size.A
    q_tile = q_item.to(tl.int64) * size.H + head
    _, last = window_range(window, lo, hi, k_length)
    tile0, tile1 = window_tiles(window, lo, hi, k_length, blocks.N)
    tile1 = tl.where(lo < hi, tile1, tile0)
    for tile in range(tile0, tile1):
        gradient_tile(
            slot,
            q_item,
            tile,
            head,
            (seq, q_start, lo, hi),
            (k_start, k_length, k_item0),
            q,
            k,
            v,
            value,
            bias,
            mask,
            q_rows,
            k_rows,
            q_side,
            k_side,
            dropout,
            saved,
            work,
            Tq,
            Tk,
            window,
            size,
            flags,
            blocks,
        )
        tl.debug_barrier()  # other threads than wrote them load the numbers of g
        k_tile = (k_item0 + tile).to(tl.int64) * size.H + head
        row0 = (k_start + tile * blocks.N).to(tl.int64)
        safe = bound_at(q_side, q_tile, blocks.M) + bound_at(k_side, k_tile, blocks.N) <= flags.SAFE
        count = tl.minimum(blocks.N, tl.cdiv(last - tile * blocks.N, 2) * 2)
        for d0 in range(0, size.AP, blocks.D):
            d = d0 + tl.arange(0, blocks.D)
            x = staying(q_side, q_tile * blocks.M + m[:, None], d, size)
            s1 = tl.zeros([blocks.M, blocks.D], tl.float32)
            s2 = tl.zeros([blocks.M, blocks.D], tl.float32)
            s1, s2 = walk_tile(
                s1,
                s2,
                x,
                d,
                k_side.rows + k_tile * blocks.N * size.AP,
                work.g + slot,
                blocks.M,
                count,
                safe,
                q_ptrs,
                q_keep,
                k,
                k_rows,
                seq,
                head,
                row0,
                k_length - tile * blocks.N,
                size,
                flags,
                True,
            )
            if flags.ACT == "tanh" and not flags.EXACT:
                total = tl.sum(tl.load(work.g + slot + n[:, None] * blocks.M + m[None, :]), axis=0)
                s1 = total[:, None] - 2.0 * s1
            add_rows(dq_ptrs, features_gradient(s2, v, head, d, size, flags), q_inside, d, size.A)
            ptrs = grads.v + q_tile * size.AP + d
            tl.store(ptrs, tl.load(ptrs, mask=d < size.AP, other=0.0) + tl.sum(s1, axis=0), mask=d < size.AP)
        tl.debug_barrier()  # before the next tile takes this one's place


@triton.jit(do_not_specialize=LENGTHS)
def _concat_bwd_keys_kernel(
    q,  # (1, H, Nq, A)
    k,  # (1, H, Nk, A)
    v,
    value,  # (1, H, Nk, DV)
    bias,  # a number a pair, see Pairs, or None
    mask,  # the same
    q_rows,  # (1, Nq): rows that may be read, or None
    k_rows,  # (1, Nk)
    q_side,
    k_side,
    dropout,
    saved,
    work,  # of this launch's programs: g transposed, and p
    grads,
    Tq,
    Tk,
    window,
    size,
    flags,
    blocks,
):
    head = tl.program_id(1).to(tl.int64)
    k_item = (work.item0 >> 2) + tl.program_id(0)
    slot = (tl.program_id(0).to(tl.int64) * size.H + head) * blocks.N * blocks.M
    seq, k_start, k_lo, k_hi, _ = tile_at(k_item, k_side, Tk, blocks.N)
    _, k_length, k_item0 = rows_of(seq, k_side, Tk, blocks.N)
    q_start, q_length, q_first = rows_of(seq, q_side, Tq, blocks.M)
    m = tl.arange(0, blocks.M)
    r = tl.arange(0, blocks.R)
    k_tile = k_item.to(tl.int64) * size.H + head
    tile0, tile1 = window_tiles(mirrored(window), k_lo, k_hi, q_length, blocks.M)
    for tile in range(tile0, tile1):
        lo = tile * blocks.M
        hi = tl.minimum(lo + blocks.M, q_length)
        if tiles_meet(window, lo, hi, k_lo, k_hi, blocks.N):
            queries = (seq, q_start, lo, hi)
            gradient_tile(
                slot,
                q_first + tile,
                k_lo // blocks.N,
                head,
                queries,
                (k_start, k_length, k_item0),
                q,
                k,
                v,
                value,
                bias,
                mask,
                q_rows,
                k_rows,
                q_side,
                k_side,
                dropout,
                saved,
                work,
                Tq,
                Tk,
                window,
                size,
                flags,
                blocks,
            )
            tl.debug_barrier()  # other threads than wrote them load the numbers of g and p
            _add_to_keys(
                slot,
                (q_first + tile).to(tl.int64) * size.H + head,
                k_tile,
                head,
                queries,
                (k_start, k_lo, k_hi),
                m,
                r,
                q,
                k,
                v,
                q_rows,
                k_rows,
                q_side,
                k_side,
                saved,
                work,
                grads,
                Tq,
                Tk,
                size,
                flags,
                blocks,
            )
            tl.debug_barrier()  # before the next tile takes this one's place


@triton.jit
def _add_to_keys(
    slot,  # where in the workspace the pair of tiles begins
    q_tile,
    k_tile,
    head,
    queries,  # as of gradient_tile
    keys,  # (first packed row of the sequence, first and past-the-last row of the tile)
    m,
    r,  # ranges of blocks.M and blocks.R: made in the loop they would cost registers
    q,
    k,
    v,
    q_rows,
    k_rows,
    q_side,
    k_side,
    saved,
    work,
    grads,
    Tq,
    Tk,
    size,
    flags,
    blocks,
):
    """Add what a tile of queries gives to dk and dvalue of a tile of keys."""
    seq, q_start, lo, hi = queries
    k_start, k_lo, k_hi = keys
    row0 = (q_start + lo).to(tl.int64)
    safe = bound_at(q_side, q_tile, blocks.M) + bound_at(k_side, k_tile, blocks.N) <= flags.SAFE
    count = tl.minimum(blocks.M, tl.cdiv(hi - lo, 2) * 2)
    q_keep = unmasked(q_rows, seq, row0 + m, lo + m < hi)
    do_ptrs = saved.do + rows_before(seq, head, q_side, Tq, size.H) * size.DV + (row0 + m) * size.DV
    before = rows_before(seq, head, k_side, Tk, size.H)
    for r0 in range(0, tl.minimum(blocks.N, k_hi - k_lo), blocks.R):
        j = k_lo + r0 + r
        k_inside = j < k_hi
        at = (k_start + j).to(tl.int64)
        k_keep = unmasked(k_rows, seq, at, k_inside)
        if grads.k is not None:
            for d0 in range(0, size.AP, blocks.D):
                d = d0 + tl.arange(0, blocks.D)
                x = staying(k_side, k_tile * blocks.N + r0 + r[:, None], d, size)
                s1 = tl.zeros([1, 1], tl.float32)
                s2 = tl.zeros([blocks.R, blocks.D], tl.float32)
                s1, s2 = walk_tile(
                    s1,
                    s2,
                    x,
                    d,
                    q_side.rows + q_tile * blocks.M * size.AP,
                    work.gt + slot + r0,
                    blocks.N,
                    count,
                    safe,
                    head_ptr(k, seq, head) + at * pitch(k),
                    k_keep,
                    q,
                    q_rows,
                    seq,
                    head,
                    row0,
                    hi - lo,
                    size,
                    flags,
                    False,
                )
                dk_ptrs = grads.k + before * size.A + at * size.A
                add_rows(dk_ptrs, features_gradient(s2, v, head, d, size, flags), k_inside, d, size.A)
        if grads.value is not None:
            p = tl.load(work.p + slot + (r0 + r)[:, None] * blocks.M + m[None, :])
            for d0 in range(0, size.DV, blocks.DV):
                d = d0 + tl.arange(0, blocks.DV)
                do = load_rows(do_ptrs, q_keep, d, size.DV)
                new = tile_product(p, do, flags.COMPUTE, flags.PRECISION)
                add_rows(grads.value + before * size.DV + at * size.DV, new, k_inside, d, size.DV)


# ---------------------------------------------------------------------------------------------------------------
# Launcher
# ---------------------------------------------------------------------------------------------------------------


def packed_gradients(
    call: Call, made: Factors, blocks: Blocks, needs: list[bool], dbias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dq, dk, dvalue, dv) as they are needed, in float32; g into dbias."""
    need_q, need_k, need_value, need_v, need_bias = needs
    args, (H, A, AP, _) = made.args, call.size
    pair, v = blocks.M * blocks.N, args["v"].given
    registers = all_registers(call.chip)

    def zeros(need: bool, *shape: int) -> Tensor | None:
        return torch.zeros(shape, dtype=torch.float32, device=v.device) if need else None

    def launches(kernel, items: int, scratch: tuple[torch.dtype | None, ...], grads: Gradients, bias=None) -> None:
        """For as many items at a time as the workspace has tiles of these dtypes."""
        each = H * pair * sum(dtype.itemsize for dtype in scratch if dtype)
        chunk = max(1, min(items, WORKSPACE_BYTES // each))
        room = (dtype and torch.empty(chunk * H * pair, dtype=dtype, device=v.device) for dtype in scratch)
        work = Workspace(*room, bias, 0)
        for item0 in range(0, items, chunk):
            every = args | {"work": work._replace(item0=untold(item0)), "grads": grads}
            launch(kernel, (min(chunk, items - item0), H), every, blocks, **registers)

    asked = need_q or need_v or need_bias
    dq, dv = zeros(asked, *args["q"].ptr.shape), zeros(asked, made.q_items, H, AP)
    dk, dvalue = zeros(need_k, *args["k"].ptr.shape), zeros(need_value, *args["value"].ptr.shape)
    if asked:
        launches(_concat_bwd_queries_kernel, made.q_items, (torch.float32, None, None), Gradients(q=dq, v=dv), dbias)
    if need_k or need_value:
        scratch = None, torch.float32, compute_dtype(call)
        launches(_concat_bwd_keys_kernel, made.k_items, scratch, Gradients(k=dk, value=dvalue))
    return dq, dk, dvalue, *sums([(dv[..., :A] if need_v and dv is not None else None, v.dtype)])
