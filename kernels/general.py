"""General (bilinear and dot) attention: s_ij = act(scale q_i · k_j) + bias_ij, softmax over j, weighted sum.

Tiles of queries meet tiles of keys on matrix units, with an online softmax (FlashAttention; Dao et al. 2022): nothing
of size Tq·Tk is stored. A bilinear weight has met the queries before.

- 16-bit inputs work in base 2, 2^(s log2 e): the factor log2 e shares the multiplication with `scale`, and one
  instruction makes the exponential. float32 inputs (`EXACT`, unless PyTorch is set to allow TF32) and calls that
  return the scores or have a bias are `NATURAL`: they take e^s itself, see `softmax.exp`. In float32 the rounding of
  s log2 e would be a relative error of keys that weigh alike, and of a bias that is the least float32 it would be
  -inf, which hides. The maximum that is kept for the backward is in the units of the
  scores: converted and back it would be off by one step, which at 1e9 is 64.
- Where the values are the keys (`SHARED`) one load of a tile serves both products: half the traffic, which decides
  when there are few queries. A tile holds widths up to 256; wider keys (`WIDE`) are loaded in parts for the score,
  and the values' width is divided among programs, each of which makes the scores again.
- A tile that all its queries see whole needs no comparisons. Where nothing but the window and the ends hide keys
  (`PLAIN`), these tiles have a loop of their own.
- Where there are too few queries to fill the chip, as in a decoder's step, the keys are split, and `softmax.merge`
  joins the parts.

The backward is in general_bwd.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .chip import (
    LENGTHS,
    LONG,
    Chip,
    all_registers,
    chip_of,
    even,
    fitted,
    matmul_flags,
    pow2,
    strides,
    unit,
    unpressed,
)
from .masks import (
    Items,
    key_range,
    old_dropout_scale,
    old_locate,
    old_sequence_of,
    partition,
    row_codes,
    visible_pairs,
    whole_range,
)
from .products import add_product
from .softmax import exp, finish, merge, new_lse, no_key, pivot, store_lse

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def power(x, NATURAL: tl.constexpr, FMA: tl.constexpr):
    """The exponential that the scores are made for: e^x, or 2^x."""
    if NATURAL:
        return exp(x, FMA)
    return tl.exp2(x)


@triton.jit
def score(y, bias, scale, rate: tl.constexpr, ACT: tl.constexpr):
    """(scale y or y after an activation) rate + bias, rounded at the same places in every kernel.

    Whether a product is rounded before it goes into a sum is the compiler's to choose, a kernel at a time. A forward
    and a backward that do not agree have other weights, by per mille at scores of thousands. So it is said here: one
    fma, or what the activation gives and 0, which rounds it.
    """
    if ACT == "identity":
        return tl.fma(y, scale * rate, bias)
    return tl.fma(y + 0.0, rate, bias)


@triton.jit
def product(
    a, a_ptrs, a_keep,  # [BLOCK_A, BLOCK_D]; with WIDE in place of it [BLOCK_A] rows, and which of them may be read
    b, b_ptrs, b_keep,  # [BLOCK_B, BLOCK_D] and so on
    width,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """a bᵀ, [BLOCK_A, BLOCK_B] float32, of tiles or of rows that are wider than a tile."""
    if WIDE:
        acc = tl.zeros([a_ptrs.shape[0], b_ptrs.shape[0]], tl.float32)
        for d0 in range(0, width, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            some = (d < width)[None, :]
            a_part = tl.load(a_ptrs[:, None] + d[None, :], mask=a_keep[:, None] & some, other=0.0)
            b_part = tl.load(b_ptrs[:, None] + d[None, :], mask=b_keep[:, None] & some, other=0.0)
            acc = add_product(a_part, tl.trans(b_part), acc, COMPUTE, PRECISION)
    else:
        acc = tl.dot(a.to(COMPUTE), tl.trans(b.to(COMPUTE)), input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=LENGTHS)
def _general_fwd_kernel(
    q_ptr, stride_qb, stride_qh, stride_qt,  # (B, H, Tq, D), or packed with stride_qb = 0
    k_ptr, stride_kb, stride_kh, stride_kt,  # (B, H, Tk, D)
    val_ptr, stride_ub, stride_uh, stride_ut,  # (B, H, Tk, DV); the keys again where SHARED
    bias_ptr, stride_sb, stride_sh, stride_sq, stride_sk,  # (B, H, Tq, Tk) or None
    mask_ptr, stride_mb, stride_mq, stride_mk,  # (B, Tq, Tk) or None
    qrow_ptr, stride_qrb, stride_qrh, stride_qrt,  # (B, H, Tq): query rows that may be read, or None
    krow_ptr, stride_krb, stride_krh, stride_krt,  # (B, H, Tk): key rows that may be read, see row_codes, or None
    q_cu_ptr, q_seq_ptr, q_first_ptr,  # see masks.Items
    k_cu_ptr,
    seed_ptr,
    out_ptr, stride_ob, stride_oh, stride_ot,  # (B, H, Tq, DV)
    lse_ptr, stride_lb, stride_lh, stride_lt,  # (B, H, Tq, 2) float32: (m, l), m in the units of `power`
    scores_ptr,  # (B, H, Tq, Tk) float32, filled with -inf, or None
    o_ptr, m_ptr, l_ptr,  # (B, H, Tq, splits[, DV]) float32; not written for one split
    splits,
    num_seqs,
    q_per_seq,
    Tq,
    Tk,
    H,
    D,
    DV,
    left,
    right,
    threshold,
    keep_scale,
    scale,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
    FMA: tl.constexpr,
    NATURAL: tl.constexpr,
    SHARED: tl.constexpr,
    WIDE: tl.constexpr,
    PLAIN: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    rate: tl.constexpr = 1.0 if NATURAL else LOG2E
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    split = tl.program_id(2) % splits
    dv = (tl.program_id(2) // splits) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    seq, q_start, lo, hi, _ = old_locate(
        tl.program_id(0), q_cu_ptr, q_seq_ptr, q_first_ptr, Tq, num_seqs, q_per_seq, BLOCK_M
    )
    k_start, length, _ = old_sequence_of(seq, k_cu_ptr, None, Tk, num_seqs, 0)
    i = lo + tl.arange(0, BLOCK_M)
    q_inside = i < hi
    q_rows = (q_start + i).to(tl.int64)
    q_keep = q_inside
    if qrow_ptr is not None:
        q_keep = (
            tl.load(qrow_ptr + seq * stride_qrb + head * stride_qrh + q_rows * stride_qrt, mask=q_inside, other=0)
            != 0
        )
    q_ptrs = q_ptr + seq * stride_qb + head * stride_qh + q_rows * stride_qt
    q = 0.0
    if not WIDE:
        q = tl.load(q_ptrs[:, None] + d[None, :], mask=q_keep[:, None] & (d < D)[None, :], other=0.0)
    k_row0 = k_start.to(tl.int64)
    k_ptr += seq * stride_kb + head * stride_kh + k_row0 * stride_kt
    val_ptr += seq * stride_ub + head * stride_uh + k_row0 * stride_ut
    if bias_ptr is not None:
        bias_ptr += seq * stride_sb + head * stride_sh
    if mask_ptr is not None:
        mask_ptr += seq * stride_mb
    if krow_ptr is not None:
        krow_ptr += seq * stride_krb + head * stride_krh + k_row0 * stride_krt
    if scores_ptr is not None:
        scores_ptr += (seq * H + head) * Tq * Tk

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    first, last = key_range(lo, hi, length, left, right, HAS_LEFT, HAS_RIGHT)
    tile0 = first // BLOCK_N
    tiles = tl.where(last > first, tl.cdiv(last, BLOCK_N) - tile0, 0)
    each = tl.cdiv(tiles, splits)
    begin = tile0 + tl.minimum(split * each, tiles)
    end = tile0 + tl.minimum((split + 1) * each, tiles)
    whole0 = begin  # the whole tiles are [whole0, whole1)
    whole1 = begin
    if PLAIN:
        first, last = whole_range(lo, hi, length, left, right, HAS_LEFT, HAS_RIGHT)
        whole0 = tl.minimum(tl.maximum(tl.cdiv(first, BLOCK_N), begin), end)
        whole1 = tl.maximum(tl.minimum(last // BLOCK_N, end), whole0)
    for EDGE in tl.static_range(0 if PLAIN else 1, 2):  # the whole tiles, then those on either side
        for n in range(begin if EDGE else whole0, end - (whole1 - whole0) if EDGE else whole1):
            tile = tl.where(n < whole0, n, n + (whole1 - whole0)) if EDGE else n
            j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            k_rows = j.to(tl.int64)
            k_keep = tl.full([BLOCK_N], True, tl.int1)
            v_keep = k_keep
            if EDGE:
                k_seen = j < length
                k_keep = k_seen
                v_keep = k_seen
                if krow_ptr is not None:
                    code = tl.load(krow_ptr + k_rows * stride_krt, mask=k_seen, other=0)
                    k_seen = code != 0
                    v_keep = code == 1
                    k_keep = v_keep if SHARED else k_seen & (code != 3)
            k_ptrs = k_ptr + k_rows * stride_kt
            k = 0.0
            if not WIDE:
                k = tl.load(k_ptrs[:, None] + d[None, :], mask=k_keep[:, None] & (d < D)[None, :], other=0.0)
            x = product(q, q_ptrs, q_keep, k, k_ptrs, k_keep, D, WIDE, COMPUTE, PRECISION, BLOCK_D)
            y = x if ACT == "identity" else activate(x * scale, ACT, FAST)
            bias = 0.0
            if EDGE:
                inside = q_keep[:, None] & k_seen[None, :]
                shown = visible_pairs(
                    i[:, None], j[None, :], inside, mask_ptr, stride_mq, stride_mk, left, right, HAS_LEFT, HAS_RIGHT
                )
                if bias_ptr is not None:
                    at = i[:, None].to(tl.int64) * stride_sq + k_rows[None, :] * stride_sk
                    bias = tl.load(bias_ptr + at, mask=shown, other=0.0).to(tl.float32) * rate
            s = score(y, bias, scale, rate, ACT)
            if EDGE:
                if (HAS_LEFT or HAS_RIGHT) or mask_ptr is not None:
                    s = tl.where((code == 3)[None, :], float("nan"), s)
                s = tl.where(shown, s, float("-inf"))
                if scores_ptr is not None:
                    at = i[:, None].to(tl.int64) * Tk + k_rows[None, :]
                    tl.store(scores_ptr + at, s, mask=inside)  # NATURAL
            m_new = tl.maximum(m, tl.max(s, axis=1))
            shift = pivot(m_new) if EDGE else m_new
            p = power(s - shift[:, None], NATURAL, FMA)
            alpha = power(m - shift, NATURAL, FMA)
            l = l * alpha + tl.sum(p, axis=1)
            if seed_ptr is not None:
                p *= old_dropout_scale(seed_ptr, j[None, :], seq * H + head, i[:, None], threshold, keep_scale)
            if SHARED and not WIDE:
                values = k
            else:
                values = tl.load(
                    val_ptr + k_rows[:, None] * stride_ut + dv[None, :],
                    mask=v_keep[:, None] & (dv < DV)[None, :],
                    other=0.0,
                )
            if EDGE and not SHARED and ((HAS_LEFT or HAS_RIGHT) or mask_ptr is not None):
                p = tl.where(shown & (code == 2)[None, :], float("nan"), p)
            acc = add_product(p, values, acc * alpha[:, None], COMPUTE, PRECISION)
            m = m_new

    rows = seq * stride_lb + head * stride_lh + q_rows * stride_lt
    if splits == 1:
        inv = finish(l)
        store_lse(lse_ptr + rows, m, l, q_inside)
        tl.store(
            out_ptr + seq * stride_ob + head * stride_oh + q_rows[:, None] * stride_ot + dv[None, :],
            acc * inv[:, None],
            mask=q_inside[:, None] & (dv < DV)[None, :],
        )
    else:
        rows = rows // 2 * splits + split
        tl.store(m_ptr + rows, m, mask=q_inside)
        tl.store(l_ptr + rows, l, mask=q_inside)
        tl.store(o_ptr + rows[:, None] * DV + dv[None, :], acc, mask=q_inside[:, None] & (dv < DV)[None, :])


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Sizes of one kernel's tiles: queries, keys, width of the score, width of the values."""

    M: int
    N: int
    D: int
    DV: int
    warps: int
    stages: int


def widths(D: int, DV: int) -> tuple[int, int]:
    """Blocks of the widths of score and values on matrix units: whole up to 256, else in parts."""
    return pow2(D, 16, 256) if D <= 256 else 64, pow2(DV, 16, 256 if max(D, DV) <= 256 else 64)


def fwd_blocks(chip: Chip, itemsize: int, Tq: int, D: int, DV: int, plain: bool, busy: bool, parts: bool) -> Blocks:
    """Tiles of the forward: a decoder's step, few queries or many, so that lengths make three variants.

    Many queries, so that a tile of keys serves them all; fewer where not all is `plain`, and where a pair is `busy`:
    what it loads and draws needs registers of its own, and so do rows that are no whole vectors. Chosen by the
    compile report (no spills; wgmma on sm_90 from 64 queries on); for sm_90 timed on an H200.
    """
    if chip.backend == "interpreter":
        return Blocks(16, 32, pow2(D, 16, 32), pow2(DV, 16, 32), 4, 2)
    if itemsize == 4:  # without matrix units a product is unrolled over its width
        part, warps = (32, 4) if Tq <= 16 else (64, 8)
        block_n = 128 if chip.hopper and plain and Tq <= 16 and even(D, DV) and not parts else 32
        return Blocks(pow2(Tq, 16, 32), block_n, pow2(D, 16, part), pow2(DV, 16, part), warps, 1)
    width, value_width = widths(D, DV)
    hip, narrow, roomy = chip.backend == "hip", max(D, DV) <= 128, chip.shared > 200_000
    size = max(width, value_width)
    if max(D, DV) <= 256 and not (hip or even(D, DV)):
        few = 4096 // max(size, 64)  # a tile has 16 numbers a thread, with an address and a predicate each
        return Blocks(pow2(Tq, 16, max(few, 32)), max(16, few // 2) if busy else few, width, value_width, 8, 1)
    if hip and not narrow and not plain:  # a thread of 4 waves has up to 512 registers
        return Blocks(pow2(Tq, 16, 32), 32, width, value_width, 4, 1)
    block_m = 128 if narrow or (plain and roomy and max(D, DV) <= 256) else 64
    block_m = 16 if Tq <= 16 else min(64, block_m) if Tq <= 64 else block_m
    if chip.arch == 100 and size > 128:
        block_m = min(block_m, 64)
    # Which keys a window hides from which queries takes registers too.
    block_n = 64 if plain and (roomy or (narrow and not (parts and size == 128))) and not hip else 32
    warps = 8 if block_m >= 64 else 4
    stages = 2 if roomy or max(D, DV) <= 256 else 1
    if chip.hopper and plain and narrow and block_m == 128:
        stages, block_n = 3, 128 if size == 128 and not parts else block_n
    if busy:
        block_m = min(block_m, 32 if size >= 128 else 64)
    return Blocks(block_m, block_n, width, value_width, warps, stages)


class Call(NamedTuple):
    """What the launches of one call share."""

    chip: Chip
    seqs: int
    plain: bool  # no mask, bias or dropout
    busy: bool  # a pair has a mask, bias or dropout of its own
    tensors: dict[str, Tensor | int | None]
    sizes: dict[str, int | float]
    flags: dict[str, object]


def prepare(
    query: Tensor, key: Tensor, value: Tensor | None, score_bias: Tensor | None, mask: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seed: Tensor | None,
    activation: str, scale: float, left: int | None, right: int | None, dropout_p: float, natural: bool,
    *, backward: bool = False,
) -> Call:  # fmt: skip
    """Arguments by the kernels' names; shapes as `fused_attn.reference.general_attention` has them.

    backward: it multiplies with the queries too, and must not with those that are not finite.
    """
    chip, packed = chip_of(query.device), cu_seqlens_q is not None
    (B, H, Tq, D), Tk = query.shape, key.shape[2]
    query, key = unit(query), unit(key)
    values = key if value is None else unit(value)
    parts = left is not None or right is not None or (mask is not None and mask.dim() == 3)
    plain = mask is None and score_bias is None and seed is None
    q_rows = k_rows = None
    if mask is not None:
        q_rows, k_rows = (
            (mask.any(1, keepdim=True).expand(B, Tq), mask) if mask.dim() == 2 else (mask.any(2), mask.any(1))
        )
    if parts:  # keys that some queries see, and some do not
        k_rows = row_codes(k_rows, key, None if value is None else values)
    if parts and backward:
        q_rows = row_codes(q_rows, query)
    q_rows, k_rows = (
        x if x is None or x.dim() == 3 else x.view(torch.uint8)[:, None].expand(-1, H, -1) for x in (q_rows, k_rows)
    )
    mask = mask.view(torch.uint8) if mask is not None and mask.dim() == 3 else None
    bias = None if score_bias is None else score_bias.expand(B, H, Tq, Tk)
    cu_seqlens_q, cu_seqlens_k = (x if x is None else x.contiguous() for x in (cu_seqlens_q, cu_seqlens_k))
    seqs = cu_seqlens_q.numel() - 1 if packed else B
    precise = matmul_flags(chip, key.dtype)
    exact = key.dtype == torch.float32 and precise["PRECISION"] == "ieee"
    return Call(
        chip,
        seqs,
        plain,
        any(x is not None for x in (bias, mask, seed)),
        {
            "q_ptr": query, **strides("qb qh qt", query, (0, 1, 2), packed=packed),
            "k_ptr": key, **strides("kb kh kt", key, (0, 1, 2), packed=packed),
            "val_ptr": values, **strides("ub uh ut", values, (0, 1, 2), packed=packed),
            "bias_ptr": bias, **strides("sb sh sq sk", bias, (0, 1, 2, 3), packed=packed),
            "mask_ptr": mask, **strides("mb mq mk", mask, (0, 1, 2), packed=packed),
            "qrow_ptr": q_rows, **strides("qrb qrh qrt", q_rows, (0, 1, 2), packed=packed),
            "krow_ptr": k_rows, **strides("krb krh krt", k_rows, (0, 1, 2), packed=packed),
            "q_cu_ptr": cu_seqlens_q, "k_cu_ptr": cu_seqlens_k, "seed_ptr": seed,
        },
        {
            "num_seqs": seqs, "Tq": 0 if packed else Tq, "Tk": 0 if packed else Tk, "H": H, "D": D,
            "DV": values.shape[-1], "left": left or 0, "right": right or 0,
            "threshold": round(dropout_p * 2**24), "keep_scale": 1.0 / (1.0 - dropout_p), "scale": scale,
        },
        {
            "ACT": activation, "FAST": chip.backend == "cuda" and key.element_size() == 2,
            "FMA": chip.backend != "interpreter",
            "EXACT": exact, "NATURAL": exact or natural or bias is not None,
            "SHARED": value is None, "HAS_LEFT": left is not None, "HAS_RIGHT": right is not None, **precise,
        },
    )  # fmt: skip


def general_fwd(
    query: Tensor, key: Tensor, value: Tensor | None, score_bias: Tensor | None, mask: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seed: Tensor | None,
    activation: str, scale: float, left: int | None, right: int | None, dropout_p: float, need_scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, lse, scores); arguments as `fused_attn.reference.general_attention` has them, the weight apart.

    The scores are written only where `need_scores` says so (padded batches only), else they are empty.
    """
    call = prepare(
        query, key, value, score_bias, mask, cu_seqlens_q, cu_seqlens_k, seed,
        activation, scale, left, right, dropout_p, need_scores,
    )  # fmt: skip
    (B, H, Tq, D), Tk, DV = query.shape, key.shape[2], call.sizes["DV"]
    out = query.new_empty(B, H, Tq, DV, dtype=torch.float32)  # the backward takes differences with it
    lse = new_lse(B, H, Tq, device=query.device)
    scores = lse.new_full((B, H, Tq, Tk) if need_scores else (0,), -torch.inf, dtype=torch.float32)
    if out.numel() == 0 or Tk == 0 or call.seqs == 0:
        return out.zero_(), no_key(lse), scores
    plain = call.plain and not need_scores
    length = LONG if cu_seqlens_q is not None else Tq
    some = left is not None or right is not None or (mask is not None and mask.dim() == 3)
    blocks = fwd_blocks(call.chip, key.element_size(), length, D, DV, plain, call.busy or need_scores, some)
    with torch.cuda.device_of(query):
        items = partition(call.seqs, Tq, blocks.M, cu_seqlens_q, always=True)
        dv_blocks = triton.cdiv(DV, blocks.DV)
        splits = max(1, min(2 * call.chip.cores // (items.count * H * dv_blocks), triton.cdiv(Tk, 2 * blocks.N)))
        o = m = l = out
        if splits > 1:
            o = torch.empty(B, H, Tq, splits, DV, dtype=torch.float32, device=query.device)
            m = torch.empty(B, H, Tq, splits, dtype=torch.float32, device=query.device)
            l = torch.empty_like(m)
        packed = cu_seqlens_q is not None
        out_strides = strides("ob oh ot", out, (0, 1, 2), packed=packed)
        kernel = fitted(_general_fwd_kernel, {**call.tensors, **out_strides})
        kernel[(items.count, H, splits * dv_blocks)](
            **call.tensors, **call.sizes, **{name: x for name, x in call.flags.items() if name != "EXACT"},
            q_seq_ptr=items.seq, q_first_ptr=items.first, q_per_seq=items.per_seq,
            out_ptr=out, **out_strides,
            lse_ptr=lse, **strides("lb lh lt", lse, (0, 1, 2), packed=packed),
            scores_ptr=scores if need_scores else None, o_ptr=o, m_ptr=m, l_ptr=l, splits=splits,
            WIDE=blocks.D < D, PLAIN=plain, BLOCK_M=blocks.M, BLOCK_N=blocks.N, BLOCK_D=blocks.D,
            BLOCK_DV=blocks.DV, num_warps=blocks.warps, num_stages=blocks.stages,
            **(all_registers(call.chip) if query.element_size() == 4 else unpressed(call.chip, D, DV)),
        )  # fmt: skip
        if splits > 1:
            parts = Items(B * H * Tq * splits, 0, splits, None, None)
            flat = B * H * Tq
            merge(
                o.view(flat * splits, 1, DV), m.view(-1, 1), l.view(-1, 1), parts,
                out.view(flat, 1, DV), lse.view(flat, 1, 2), skip_single=False,
                unit=1.0 if call.flags["NATURAL"] else LN2.value,
            )  # fmt: skip
    return out, lse, scores
