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

from .chip import LENGTHS, all_registers, fitted, strides
from .concat import Blocks, Call
from .concat_bwd import WORKSPACE_BYTES
from .concat_walk import gradient_tile, walk_tile
from .masks import key_range, old_locate, old_sequence_of


@triton.jit(do_not_specialize=LENGTHS)
def _concat_bwd_queries_kernel(
    aq_ptr, ak_ptr,  # (items, H, 1 or 2, AP, BLOCK) float32: factors, or q and k
    rq_ptr, rk_ptr,  # (items, H, BLOCK, AP) float32: the same, transposed
    bq_ptr, bk_ptr,  # (items, H) float32: their bounds
    q_ptr, stride_qh, stride_qt,  # (H, Nq, A)
    k_ptr, stride_kh, stride_kt,  # (H, Nk, A)
    v_ptr,  # (H, AP) float32
    v_sum_ptr,  # (H,) float32: Σ_d v_d
    val_ptr, stride_uh, stride_ut,  # (H, Nk, DV)
    q_cu_ptr, q_seq_ptr, q_first_ptr,  # see masks.Items
    k_cu_ptr, k_first_ptr,
    seed_ptr,
    do_ptr, out_ptr, stride_oh, stride_ot,  # (H, Nq, DV)
    lse_ptr, delta_ptr, stride_lh,  # (H, Nq, 2) and (H, Nq) float32
    g_ptr,  # (programs, BLOCK_N, BLOCK_M) float32
    dq_ptr, stride_dh,  # (H, Nq, A) float32, contiguous: added to
    dv_ptr,  # (q items, H, AP) float32: added to
    item0,
    num_seqs,
    H,
    A,
    AP,
    DV,
    left,
    right,
    threshold,
    scale,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
    FMA: tl.constexpr,
    FACTORED: tl.constexpr,
    EXACT: tl.constexpr,
    SAFE: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    q_item = item0 + tl.program_id(0)
    slot = (tl.program_id(0).to(tl.int64) * H + head) * BLOCK_N * BLOCK_M
    seq, q_start, lo, hi, _ = old_locate(q_item, q_cu_ptr, q_seq_ptr, q_first_ptr, 0, num_seqs, 0, BLOCK_M)
    k_start, k_length, k_item0 = old_sequence_of(seq, k_cu_ptr, k_first_ptr, 0, num_seqs, 0)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    q_rows = (q_start + lo + m).to(tl.int64)
    q_keep = lo + m < hi
    q_ptrs = q_ptr + head * stride_qh + q_rows * stride_qt
    q_tile = q_item.to(tl.int64) * H + head
    first, last = key_range(lo, hi, k_length, left, right, HAS_LEFT, HAS_RIGHT)
    tile0 = first // BLOCK_N
    tile1 = tl.where((last > first) & (lo < hi), tl.cdiv(last, BLOCK_N), tile0)
    for tile in range(tile0, tile1):
        gradient_tile(
            slot, q_item, head, tile, seq, q_start, lo, hi, k_start, k_length, k_item0, aq_ptr, ak_ptr, bq_ptr,
            bk_ptr, q_ptr, 0, stride_qh, stride_qt, k_ptr, 0, stride_kh, stride_kt, v_ptr, v_sum_ptr, val_ptr, 0,
            stride_uh, stride_ut, None, 0, 0, 0, 0, None, 0, 0, 0, None, 0, 0, None, 0, 0, seed_ptr, do_ptr, 0,
            stride_oh, stride_ot, lse_ptr, delta_ptr, 0, stride_lh, 1, out_ptr, None, None, g_ptr, None, None, 0, 0,
            H, A, AP, DV, left, right, threshold, scale, ACT, FAST, FMA, FACTORED, EXACT, SAFE, GROUP, HAS_LEFT,
            HAS_RIGHT, COMPUTE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_DV,
        )  # fmt: skip
        tl.debug_barrier()  # other threads than wrote them load the numbers of g
        k_tile = (k_item0 + tile).to(tl.int64) * H + head
        row0 = (k_start + tile * BLOCK_N).to(tl.int64)
        safe = tl.load(bq_ptr + q_tile) + tl.load(bk_ptr + k_tile) <= SAFE
        count = tl.minimum(BLOCK_N, tl.cdiv(last - tile * BLOCK_N, 2) * 2)
        for d0 in range(0, AP, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            x = tl.load(rq_ptr + (q_tile * BLOCK_M + m[:, None]) * AP + d[None, :], mask=(d < AP)[None, :], other=0.0)
            s1 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            s2 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            s1, s2 = walk_tile(
                s1, s2, x, rk_ptr + k_tile * BLOCK_N * AP, g_ptr + slot, BLOCK_M, count, q_ptrs, q_keep,
                k_ptr + head * stride_kh, stride_kt, row0, k_length - tile * BLOCK_N, None, 0, d, A, AP, safe,
                ACT, FAST, FACTORED, EXACT, True,
            )  # fmt: skip
            if ACT == "tanh":
                s2 *= 4.0
                if not EXACT:
                    total = tl.sum(tl.load(g_ptr + slot + n[:, None] * BLOCK_M + m[None, :]), axis=0)
                    s1 = total[:, None] - 2.0 * s1
            v = tl.load(v_ptr + head * AP + d, mask=d < AP, other=0.0)[None, :]
            at = dq_ptr + head * stride_dh + q_rows[:, None] * A + d[None, :]
            some = q_keep[:, None] & (d < A)[None, :]
            tl.store(at, tl.load(at, mask=some, other=0.0) + v * s2, mask=some)
            at = dv_ptr + q_tile * AP + d
            tl.store(at, tl.load(at, mask=d < AP, other=0.0) + tl.sum(s1, axis=0), mask=d < AP)
        tl.debug_barrier()  # before the next tile takes this one's place


@triton.jit(do_not_specialize=LENGTHS)
def _concat_bwd_keys_kernel(
    aq_ptr, ak_ptr,  # (items, H, 1 or 2, AP, BLOCK) float32: factors, or q and k
    rq_ptr, rk_ptr,  # (items, H, BLOCK, AP) float32: the same, transposed
    bq_ptr, bk_ptr,  # (items, H) float32: their bounds
    q_ptr, stride_qh, stride_qt,  # (H, Nq, A)
    k_ptr, stride_kh, stride_kt,  # (H, Nk, A)
    v_ptr,  # (H, AP) float32
    v_sum_ptr,  # (H,) float32: Σ_d v_d
    val_ptr, stride_uh, stride_ut,  # (H, Nk, DV)
    q_cu_ptr, q_first_ptr,  # see masks.Items
    k_cu_ptr, k_seq_ptr, k_first_ptr,
    seed_ptr,
    do_ptr, out_ptr, stride_oh, stride_ot,  # (H, Nq, DV)
    lse_ptr, delta_ptr, stride_lh,  # (H, Nq, 2) and (H, Nq) float32
    gt_ptr,  # (programs, BLOCK_M, BLOCK_N) float32
    p_ptr,  # (programs, BLOCK_N, BLOCK_M)
    dk_ptr, stride_dh,  # (H, Nk, A) float32, contiguous: added to; or None
    dvalue_ptr, stride_eh,  # (H, Nk, DV) float32, contiguous: added to; or None
    item0,
    num_seqs,
    H,
    A,
    AP,
    DV,
    left,
    right,
    threshold,
    scale,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
    FMA: tl.constexpr,
    FACTORED: tl.constexpr,
    EXACT: tl.constexpr,
    SAFE: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of the tile that are walked, or summed, at a time
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    k_item = item0 + tl.program_id(0)
    slot = (tl.program_id(0).to(tl.int64) * H + head) * BLOCK_N * BLOCK_M
    seq, k_start, k_lo, k_hi, _ = old_locate(k_item, k_cu_ptr, k_seq_ptr, k_first_ptr, 0, num_seqs, 0, BLOCK_N)
    _, k_length, k_item0 = old_sequence_of(seq, k_cu_ptr, k_first_ptr, 0, num_seqs, 0)
    q_start, q_length, q_first = old_sequence_of(seq, q_cu_ptr, q_first_ptr, 0, num_seqs, 0)
    m = tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    k_tile = k_item.to(tl.int64) * H + head
    tile0 = 0
    tile1 = tl.cdiv(tl.maximum(q_length, 0), BLOCK_M)
    if HAS_RIGHT:
        tile0 = tl.maximum(k_lo - right, 0) // BLOCK_M
    if HAS_LEFT:
        tile1 = tl.minimum(tile1, tl.cdiv(tl.maximum(k_hi + left, 0), BLOCK_M))
    tile1 = tl.where(k_lo < k_hi, tile1, tile0)
    for tile in range(tile0, tile1):
        lo = tile * BLOCK_M
        hi = tl.minimum(lo + BLOCK_M, q_length)
        first, last = key_range(lo, hi, k_hi, left, right, HAS_LEFT, HAS_RIGHT)
        if (k_lo < last) & (k_lo + BLOCK_N > first):
            gradient_tile(
                slot, q_first + tile, head, k_lo // BLOCK_N, seq, q_start, lo, hi, k_start, k_length, k_item0, aq_ptr,
                ak_ptr, bq_ptr, bk_ptr, q_ptr, 0, stride_qh, stride_qt, k_ptr, 0, stride_kh, stride_kt, v_ptr,
                v_sum_ptr, val_ptr, 0, stride_uh, stride_ut, None, 0, 0, 0, 0, None, 0, 0, 0, None, 0, 0, None, 0, 0,
                seed_ptr, do_ptr, 0, stride_oh, stride_ot, lse_ptr, delta_ptr, 0, stride_lh, 1, out_ptr, None, None,
                None, gt_ptr, p_ptr, 0, 0, H, A, AP, DV, left, right, threshold, scale, ACT, FAST, FMA, FACTORED,
                EXACT, SAFE, GROUP, HAS_LEFT, HAS_RIGHT, COMPUTE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_DV,
            )  # fmt: skip
            tl.debug_barrier()  # other threads than wrote them load the numbers of g and p
            q_tile = (q_first + tile).to(tl.int64) * H + head
            row0 = (q_start + lo).to(tl.int64)
            safe = tl.load(bq_ptr + q_tile) + tl.load(bk_ptr + k_tile) <= SAFE
            count = tl.minimum(BLOCK_M, tl.cdiv(q_length - lo, 2) * 2)
            do_rows = do_ptr + head * stride_oh + (row0 + m) * stride_ot
            for r0 in range(0, tl.minimum(BLOCK_N, k_hi - k_lo), BLOCK_R):
                j = k_lo + r0 + r
                k_keep = j < k_hi
                k_rows = (k_start + j).to(tl.int64)
                if dk_ptr is not None:
                    for d0 in range(0, AP, BLOCK_D):
                        d = d0 + tl.arange(0, BLOCK_D)
                        x = tl.load(
                            rk_ptr + (k_tile * BLOCK_N + r0 + r[:, None]) * AP + d[None, :],
                            mask=(d < AP)[None, :],
                            other=0.0,
                        )
                        s1 = tl.zeros([1, 1], tl.float32)
                        s2 = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
                        s1, s2 = walk_tile(
                            s1, s2, x, rq_ptr + q_tile * BLOCK_M * AP, gt_ptr + slot + r0, BLOCK_N, count,
                            k_ptr + head * stride_kh + k_rows * stride_kt, k_keep,
                            q_ptr + head * stride_qh, stride_qt, row0, q_length - lo, None, 0, d, A, AP, safe,
                            ACT, FAST, FACTORED, EXACT, False,
                        )  # fmt: skip
                        if ACT == "tanh":
                            s2 *= 4.0
                        v = tl.load(v_ptr + head * AP + d, mask=d < AP, other=0.0)[None, :]
                        at = dk_ptr + head * stride_dh + k_rows[:, None] * A + d[None, :]
                        some = k_keep[:, None] & (d < A)[None, :]
                        tl.store(at, tl.load(at, mask=some, other=0.0) + v * s2, mask=some)
                if dvalue_ptr is not None:
                    p = tl.load(p_ptr + slot + (r0 + r)[:, None] * BLOCK_M + m[None, :])
                    for d0 in range(0, DV, BLOCK_DV):
                        d = d0 + tl.arange(0, BLOCK_DV)
                        do = tl.load(
                            do_rows[:, None] + d[None, :],
                            mask=(lo + m < hi)[:, None] & (d < DV)[None, :],
                            other=0.0,
                        )
                        at = dvalue_ptr + head * stride_eh + k_rows[:, None] * DV + d[None, :]
                        some = k_keep[:, None] & (d < DV)[None, :]
                        old = tl.load(at, mask=some, other=0.0)
                        new = tl.dot(p.to(COMPUTE), do.to(COMPUTE), input_precision=PRECISION)
                        tl.store(at, old + new, mask=some)
            tl.debug_barrier()  # before the next tile takes this one's place


def packed_gradients(
    call: Call, q_items: int, k_items: int, blocks: Blocks, args: dict[str, object],
    dq: Tensor | None, dk: Tensor | None, dvalue: Tensor | None,
) -> None:  # fmt: skip
    """Add to the gradients, which are zeros in float32, (1, H, N, width); None where one is not wanted."""
    H, pair, device = call.sizes["H"], blocks.M * blocks.N, call.v.device
    compute = torch.float32 if call.chip.backend == "interpreter" else call.tensors["val_ptr"].dtype

    def launch(kernel, items: int, scratch: dict[str, torch.dtype], **more: object) -> None:
        """For as many items at a time as the workspace has tiles."""
        each = H * pair * sum(dtype.itemsize for dtype in scratch.values())
        chunk = max(1, min(items, WORKSPACE_BYTES // each))
        space = {name: torch.empty(chunk * H * pair, dtype=dtype, device=device) for name, dtype in scratch.items()}
        every = {**args, **more, **space, "item0": 0}
        named = {name: every[name] for name in kernel.arg_names}
        kernel = fitted(kernel, every)
        for item0 in range(0, items, chunk):
            grid = min(chunk, items - item0), H
            options = {"num_warps": blocks.warps, "num_stages": 2, **all_registers(call.chip)}
            kernel[grid](**{**named, "item0": item0}, **options)

    if dq is not None:
        sizes = strides("db dh dt", dq, (0, 1, 2), packed=True)
        launch(_concat_bwd_queries_kernel, q_items, {"g_ptr": torch.float32}, **sizes, dq_ptr=dq)
    if dk is not None or dvalue is not None:
        sizes = strides("db dh dt", dk, (0, 1, 2), packed=True) | strides("eb eh et", dvalue, (0, 1, 2), packed=True)
        scratch = {"gt_ptr": torch.float32, "p_ptr": compute}
        launch(_concat_bwd_keys_kernel, k_items, scratch, **sizes, dk_ptr=dk, dvalue_ptr=dvalue)
