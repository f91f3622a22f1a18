"""What the kernels of concat attention's backward share: a tile of g, and the walk over it (see concat_bwd.py)."""

import triton
import triton.language as tl

from .activations import activate, activate_grad
from .concat import concat_scores, reciprocal
from .masks import key_range, old_dropout_scale, visible
from .products import add_product
from .softmax import exp, load_lse


@triton.jit
def gradient_tile(
    slot,  # where in the workspace this tile begins
    q_item, head, tile,
    seq, q_start, lo, hi, k_start, k_length, k_item0,
    aq_ptr, ak_ptr,  # (items, H, 1 or 2, AP, BLOCK) float32: factors, or q and k
    bq_ptr, bk_ptr,  # (items, H) float32: their bounds
    q_ptr, stride_qb, stride_qh, stride_qt,  # (B, H, Tq, A), or packed with stride_qb = 0
    k_ptr, stride_kb, stride_kh, stride_kt,  # (B, H, Tk, A)
    v_ptr,  # (H, AP) float32
    v_sum_ptr,  # (H,) float32: Σ_d v_d
    val_ptr, stride_ub, stride_uh, stride_ut,  # (B, H, Tk, DV)
    bias_ptr, stride_sb, stride_sh, stride_sq, stride_sk,  # (B, H, Tq, Tk) or None
    mask_ptr, stride_mb, stride_mq, stride_mk,  # (B, Tq, Tk) or None
    qrow_ptr, stride_qrb, stride_qrt,  # (B, Tq): query rows that may be read, or None
    krow_ptr, stride_krb, stride_krt,  # (B, Tk): key rows that may be read, or None
    seed_ptr,
    do_ptr, stride_ob, stride_oh, stride_ot,  # (B, H, Tq, DV)
    lse_ptr,  # (B, H, Tq, 2) float32: (m, l)
    delta_ptr, stride_lb, stride_lh, stride_lt,  # (B, H, Tq) float32: dO · o - l dl; with EXACT -l dl
    out_ptr,  # (B, H, Tq, DV) float32, with the strides of dO
    dscores_ptr,  # (B, H, Tq, Tk) float32 or None
    dbias_ptr,  # (B, H, Tq, Tk) float32, zeros, or None
    g_ptr,  # (BLOCK_N, BLOCK_M) from slot on, float32, or None
    gt_ptr,  # (BLOCK_M, BLOCK_N), or None
    p_ptr,  # as g, in COMPUTE, or None
    Tq,
    Tk,
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
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One pair of tiles: g and k ⊙ a, queries contiguous; 0 where a key is not visible."""
    first, last = key_range(lo, hi, k_length, left, right, HAS_LEFT, HAS_RIGHT)
    if (tile * BLOCK_N < last) & ((tile + 1) * BLOCK_N > first) & (lo < hi):
        i = lo + tl.arange(0, BLOCK_M)
        j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        q_rows = (q_start + i).to(tl.int64)
        k_rows = (k_start + j).to(tl.int64)
        q_keep = i < hi
        k_keep = j < k_length
        if qrow_ptr is not None:
            q_keep = tl.load(qrow_ptr + seq * stride_qrb + q_rows * stride_qrt, mask=q_keep, other=0) != 0
        if krow_ptr is not None:
            k_keep = tl.load(krow_ptr + seq * stride_krb + k_rows * stride_krt, mask=k_keep, other=0) != 0
        v_sum = tl.load(v_sum_ptr + head)
        s = concat_scores(
            q_item.to(tl.int64) * H + head, (k_item0 + tile).to(tl.int64) * H + head, aq_ptr, ak_ptr, bq_ptr, bk_ptr,
            q_ptr + seq * stride_qb + head * stride_qh + q_rows * stride_qt, q_keep,
            k_ptr + seq * stride_kb + head * stride_kh + k_rows * stride_kt, k_keep,
            v_ptr + head * AP, v_sum, A, AP, ACT, FAST, FACTORED, EXACT, SAFE, GROUP, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if mask_ptr is None:
            mask_ptrs = None
        else:
            mask_ptrs = mask_ptr + seq * stride_mb
        shown = visible(i, j, q_keep, k_keep, mask_ptrs, stride_mq, stride_mk, left, right, HAS_LEFT, HAS_RIGHT)
        if bias_ptr is not None:
            at = i[:, None].to(tl.int64) * stride_sq + j[None, :].to(tl.int64) * stride_sk
            s += tl.load(bias_ptr + seq * stride_sb + head * stride_sh + at, mask=shown, other=0.0).to(tl.float32)
        rows = seq * stride_lb + head * stride_lh + q_rows * stride_lt
        top, inv = load_lse(lse_ptr + rows * 2, q_keep)
        delta = tl.load(delta_ptr + rows, mask=q_keep, other=0.0)
        p = tl.where(shown, exp(s - top[:, None], EXACT and FMA) * inv[:, None], 0.0)
        pk = p
        if seed_ptr is not None:
            k = old_dropout_scale(seed_ptr, j[None, :], seq * H + head, i[:, None], threshold, scale)
            pk *= k
        dp = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        o_rows = seq * stride_ob + head * stride_oh + q_rows * stride_ot
        val_ptrs = val_ptr + seq * stride_ub + head * stride_uh + k_rows * stride_ut
        if EXACT:
            for d in range(0, DV):
                do = tl.load(do_ptr + o_rows + d, mask=q_keep, other=0.0).to(tl.float32)[:, None]
                out = tl.load(out_ptr + o_rows + d, mask=q_keep, other=0.0)[:, None]
                values = tl.load(val_ptrs + d, mask=k_keep, other=0.0).to(tl.float32)[None, :]
                if seed_ptr is not None:
                    values *= k
                dp = tl.fma(do, values - out, dp)
        else:
            for d0 in range(0, DV, BLOCK_DV):
                d = d0 + tl.arange(0, BLOCK_DV)
                do = tl.load(
                    do_ptr + o_rows[:, None] + d[None, :], mask=q_keep[:, None] & (d < DV)[None, :], other=0.0
                )
                values = tl.load(val_ptrs[:, None] + d[None, :], mask=k_keep[:, None] & (d < DV)[None, :], other=0.0)
                dp = add_product(do, tl.trans(values), dp, COMPUTE, PRECISION)
            if seed_ptr is not None:
                dp *= k
        g = tl.where(shown, p * (dp - delta[:, None]), 0.0)  # values that are hidden may be NaN
        at = ((seq * H + head) * Tq + i[:, None]) * Tk + j[None, :]
        if dscores_ptr is not None:
            g += tl.load(dscores_ptr + at, mask=shown, other=0.0)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + at, g, mask=shown)
        m = tl.arange(0, BLOCK_M)[:, None]
        n = tl.arange(0, BLOCK_N)[None, :]
        slots = slot + n * BLOCK_M + m
        if g_ptr is not None:
            tl.store(g_ptr + slots, g)
        if gt_ptr is not None:
            tl.store(gt_ptr + slot + m * BLOCK_N + n, g)
        if p_ptr is not None:
            tl.store(p_ptr + slots, pk.to(p_ptr.dtype.element_ty))


@triton.jit
def walk_tile(
    s1, s2,  # Σ g r (with EXACT Σ g act) and Σ g (r - r²); without factors Σ g act and Σ g act'
    x,  # [BLOCK_R, BLOCK_D] factors (or q, k) of the rows that stay
    walk_ptr,  # (rows, AP) factors of the rows that are walked, at the tile's first
    g_ptr,  # g of (walked, staying), at the tile's first; staying rows are contiguous
    stride_g,
    count,
    x_ptrs, x_keep,  # raw rows that stay [BLOCK_R], for tiles that do not factor
    raw_ptr, stride_raw, row0, inside,  # raw rows that are walked, from row0 on; how many there are
    keep_ptr, stride_keep,  # which of these may be read; or None
    d,
    A,
    AP,
    safe,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
    FACTORED: tl.constexpr,
    EXACT: tl.constexpr,
    WANT_S1: tl.constexpr,  # else s1 stays as it is
):  # fmt: skip
    """Walk one tile. Rows past the end of a sequence have factor 1 and g = 0."""
    r = tl.arange(0, x.shape[0])
    some = d < AP
    if EXACT:
        old1 = s1
        old2 = s2
        s1 = tl.zeros_like(s1)
        s2 = tl.zeros_like(s2)
    if FACTORED:
        if safe:
            if EXACT:
                for n in range(0, count):
                    b = tl.load(walk_ptr + n * AP + d, mask=some, other=0.0)[None, :]
                    g = tl.load((g_ptr + n * stride_g + r)[:, None])
                    p = x * b
                    if ACT == "tanh":
                        y = tl.fma(x, b, -1.0)
                        one = reciprocal(y + 2.0, FAST)
                        least = tl.minimum(one, p * one)
                        one *= y
                    else:
                        one = reciprocal(1.0 + p, FAST)
                        least = tl.minimum(one, p * one)
                    s2 = tl.fma(g, tl.fma(-least, least, least), s2)
                    if WANT_S1:
                        s1 = tl.fma(g, one, s1)
            else:
                for n in range(0, count, 2):
                    b0 = tl.load(walk_ptr + n * AP + d, mask=some, other=0.0)[None, :]
                    b1 = tl.load(walk_ptr + (n + 1) * AP + d, mask=some, other=0.0)[None, :]
                    g0 = tl.load((g_ptr + n * stride_g + r)[:, None])
                    g1 = tl.load((g_ptr + (n + 1) * stride_g + r)[:, None])
                    x0 = 1.0 + x * b0
                    x1 = 1.0 + x * b1
                    inv = reciprocal(x0 * x1, FAST)
                    r0 = inv * x1
                    r1 = inv * x0
                    if WANT_S1:
                        s1 += g0 * r0
                        s1 += g1 * r1
                    s2 += g0 * (r0 - r0 * r0)
                    s2 += g1 * (r1 - r1 * r1)
        else:
            x_raw = tl.load(x_ptrs[:, None] + d[None, :], mask=x_keep[:, None] & (d < A)[None, :], other=0.0)
            for n in range(0, tl.minimum(count, inside)):
                keep = d < A
                if keep_ptr is not None:
                    keep = keep & (tl.load(keep_ptr + (row0 + n) * stride_keep) != 0)
                z = tl.load(raw_ptr + (row0 + n) * stride_raw + d, mask=keep, other=0.0).to(tl.float32)[None, :]
                z += x_raw.to(tl.float32)
                g = tl.load((g_ptr + n * stride_g + r)[:, None])
                if ACT == "tanh":
                    z *= -2.0
                one = tl.sigmoid(z)
                seen = g != 0  # a row that is hidden may be NaN, and a gradient be so
                s2 += tl.where(seen, g * (one - one * one), 0.0)
                if EXACT and ACT == "tanh":
                    one = activate(-0.5 * z, ACT, False)
                if WANT_S1:
                    s1 += tl.where(seen, g * one, 0.0)
    else:
        for n in range(0, count):
            z = x + tl.load(walk_ptr + n * AP + d, mask=some, other=0.0)[None, :]
            g = tl.load((g_ptr + n * stride_g + r)[:, None])
            one = activate(z, ACT, False)
            if WANT_S1:
                s1 += g * one
            s2 += g * activate_grad(z, one, ACT, False)
    if EXACT:
        s1 += old1
        s2 += old2
    return s1, s2
