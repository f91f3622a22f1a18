"""Word-by-word attention of 16-bit rows: a program walks a few sequences, whose projections are one matrix product.

The formula is recurrent.py's. A step multiplies r by [W_r W_t] for S sequences at a time, so that the weights, which
stream from cache at every step, are read once for all of them, and by the matrix units. These take 16 rows at least:
row i is the sequence i mod S, and r, which is carried on in float32, is the sum of two rows of 16 bits (8 + 8 bits of
it in bfloat16, 11 + 11 in float16); what is left of the 16 is 0. So a product is off by 2^-17 of its terms or less.

Keys and values stay on chip for all steps, in 16 bits: `widened` keeps the compiler from widening them before the
walk, which took twice the registers. Sequences of one program may differ in length: each is masked by its own.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .activations import tanh
from .arguments import pitch, sequence_ptr
from .chip import LENGTHS, LONG, Chip, cdiv, pow2, vectors
from .masks import sequence_of, unmasked
from .products import add_product
from .softmax import finish, online_softmax, rounded_product
from .tiles import load_rows, store_rows

_ROWS: tl.constexpr = tl.constexpr(16)  # of a matrix product, at least


@triton.jit
def widened(x, ASM: tl.constexpr):
    """x in float32. ASM: at this place, and not before a loop around it, where twice the registers would hold it."""
    if ASM:
        if x.dtype == tl.bfloat16:
            both = tl.inline_asm_elementwise(
                "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], tl.int32, is_pure=False, pack=2
            )
        else:
            both = tl.inline_asm_elementwise(
                "{.reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.f32.f16 $0, lo; cvt.f32.f16 $1, hi;}",
                "=r,=r,r",
                [x],
                tl.int32,
                is_pure=False,
                pack=2,
            )
        return both.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def group_of(num_seqs, S: tl.constexpr, N: tl.constexpr):
    """Sequences of a program: (each [S], which exist; each [S N] of N rows a sequence). Those that do not are 0."""
    first = tl.program_id(0).to(tl.int64) * S
    seq = first + tl.arange(0, S)
    of = first + tl.arange(0, S * N) // N
    return tl.where(seq < num_seqs, seq, 0), seq < num_seqs, tl.where(of < num_seqs, of, 0)


@triton.jit
def store_parts(ptr, x, cols, width, WHOLE: tl.constexpr):
    """Two rows of 16 bits for each of x [S, BLOCK]: at ptr S rounded ones, then S of what was rounded off."""
    S: tl.constexpr = x.shape[0]
    s = tl.arange(0, S)
    high = x.to(ptr.dtype.element_ty)
    rest = tl.where(high.to(tl.float32) == x, 0.0, x - high.to(tl.float32))  # 0 of what is infinite
    store_rows(ptr + s * width, high, s < S, cols, None if WHOLE else width)
    store_rows(ptr + (S + s) * width, rest, s < S, cols, None if WHOLE else width)


@triton.jit
def parts_of(x, COMPUTE: tl.constexpr):
    """Rows [16, BLOCK] whose sum is x [BLOCK]: those of one vector, as `store_parts` has them."""
    high = x.to(COMPUTE)
    rest = tl.where(high.to(tl.float32) == x, 0.0, x - high.to(tl.float32)).to(COMPUTE)
    row = tl.arange(0, _ROWS)[:, None]
    return tl.where(row == 0, high[None, :], tl.where(row == 1, rest[None, :], tl.zeros_like(rest)[None, :]))


@triton.jit
def joined(x, S: tl.constexpr):
    """The sums [S, BLOCK] of the parts of rows x [16, BLOCK]."""
    return tl.sum(tl.reshape(x, [_ROWS // S, S, x.shape[1]]), axis=0)


@triton.jit
def load_weights(w, k, K, cols, width, flags):
    """Tile of a weight (K, width); no tests where it is whole tiles."""
    ptrs = w.ptr + k.to(tl.int64) * w.stride
    if flags.WHOLE:
        return tl.load(ptrs[:, None] + cols[None, :])
    return load_rows(ptrs, k < K, cols, width)


@triton.jit(do_not_specialize=LENGTHS)
def _recurrent_group_fwd_kernel(
    q,  # (B, Th, A), or packed
    k,  # (B, Ty, A)
    value,  # (B, Ty, D)
    w_ptr,  # (A,)
    w_r,  # (D, A)
    w_t,  # (D, D)
    mask,  # (B, Ty) or None
    q_spans,
    k_spans,
    first_ptr,  # (S, D): r before the first step, or None
    state_ptr,  # as in recurrent.py; nothing is there where `slots` is not 0
    result,  # and its parts (programs, 2, 2 S, D): r of two steps in turn
    Th,
    Ty,
    num_seqs,
    size,
    limit,
    slots,
    flags,
    blocks,
):
    S: tl.constexpr = blocks.S
    N: tl.constexpr = blocks.N
    seq, own, of = group_of(num_seqs, S, N)
    q_start, steps = sequence_of(seq, q_spans, Th)
    k_start, length = sequence_of(of, k_spans, Ty)
    n = tl.arange(0, S * N) % N
    a = tl.arange(0, blocks.A)
    d = tl.arange(0, blocks.D)
    keep = unmasked(mask, of, n.to(tl.int64), n < length)
    key = load_rows(sequence_ptr(k, of, k_start + n), keep, a, size.A)
    values = load_rows(sequence_ptr(value, of, k_start + n), keep, d, size.D)
    key = tl.reshape(key, [S, N, blocks.A])
    values = tl.reshape(values, [S, N, blocks.D])
    keep = tl.reshape(keep, [S, N])
    w = tl.load(w_ptr + a, mask=a < size.A, other=0.0).to(tl.float32)
    _, length = sequence_of(seq, k_spans, Ty)
    steps = tl.where(own & (length <= limit), steps, 0)

    kept = slots == 0
    wide_a = None if flags.WHOLE else size.A
    wide_d = None if flags.WHOLE else size.D
    width = size.D + size.A + size.D
    q_ptrs = sequence_ptr(q, seq, q_start)
    out_ptrs = result.out + (seq * Th + q_start) * size.D  # of packed rows Th is 0, or Ty
    state_ptrs = state_ptr + (seq * Th + q_start) * width
    weights_ptrs = result.weights
    if weights_ptrs is not None:
        weights_ptrs += (seq * Th + q_start) * Ty
    scores_ptrs = result.scores
    if scores_ptrs is not None:
        scores_ptrs += (seq * Th + q_start) * Ty
    row = tl.arange(0, _ROWS)
    parts_ptr = result.parts + tl.program_id(0).to(tl.int64) * (4 * S * size.D)
    r = tl.zeros([S, blocks.D], tl.float32)
    if first_ptr is not None:
        r += load_rows(first_ptr + seq * size.D, own, d, wide_d).to(tl.float32)
    store_rows(state_ptrs, r, kept & (steps > 0), d, wide_d)
    store_parts(parts_ptr, r, d, size.D, flags.WHOLE)
    for t in range(0, tl.max(steps, axis=0)):
        live = t < steps
        x_ptrs = parts_ptr + (t % 2) * (2 * S * size.D) + row * size.D
        # 0, but not for the compiler: what it knows of the first tiles it makes before the walk, and spills.
        first = tl.minimum(t, limit >> 20) * blocks.K
        c_rows = tl.zeros([_ROWS, blocks.A], tl.float32)
        u_rows = tl.zeros([_ROWS, blocks.D], tl.float32)
        tl.debug_barrier()  # the last step has written its r
        for k0 in range(first, size.D, blocks.K):
            i = k0 + tl.arange(0, blocks.K)
            x = load_rows(x_ptrs, row < 2 * S, i, None if flags.WHOLE else size.D)
            to_c = load_weights(w_r, i, size.D, a, size.A, flags)
            to_u = load_weights(w_t, i, size.D, d, size.D, flags)
            c_rows = add_product(x, to_c, c_rows, flags.COMPUTE, flags.PRECISION)
            u_rows = add_product(x, to_u, u_rows, flags.COMPUTE, flags.PRECISION)
        c = joined(c_rows, S) + load_rows(q_ptrs, live, a, wide_a).to(tl.float32)
        u = tanh(joined(u_rows, S), False)  # no FAST: it is carried on
        store_rows(state_ptrs + size.D, c, kept & live, a, wide_a)
        store_rows(state_ptrs + (size.D + size.A), u, kept & live, d, wide_d)
        m = tanh(widened(key, flags.ASM) + c[:, None, :], flags.FAST)
        s = tl.where(keep, tl.sum(rounded_product(w[None, None, :], m), axis=2), float("-inf"))
        if scores_ptrs is not None:
            store_rows(scores_ptrs, s, live, tl.arange(0, N), Ty)
            scores_ptrs += Ty
        p, _alpha, _m, l = online_softmax(s, float("-inf"), 0.0, 1, flags.FMA)
        inv = finish(l)
        if weights_ptrs is not None:
            store_rows(weights_ptrs, p * inv[:, None], live, tl.arange(0, N), Ty)
            weights_ptrs += Ty
        r = tl.sum(p[:, :, None] * widened(values, flags.ASM), axis=1) * inv[:, None] + u
        store_parts(parts_ptr + ((t + 1) % 2) * (2 * S * size.D), r, d, size.D, flags.WHOLE)
        state_ptrs += width
        store_rows(state_ptrs, r, kept & (t + 1 < steps), d, wide_d)
        store_rows(out_ptrs, r, live, d, wide_d)
        out_ptrs += size.D
        q_ptrs += pitch(q)


# ---------------------------------------------------------------------------------------------------------------
# Block sizes
# ---------------------------------------------------------------------------------------------------------------


class GroupBlocks(NamedTuple):
    """Sequences of a program, words of a premise, widths of score and values, rows of a weight."""

    S: int
    N: int
    A: int
    D: int
    K: int
    warps: int
    stages: int = 3


def group_blocks(chip: Chip, seqs: int, longest: int, A: int, D: int, *, packed: bool) -> GroupBlocks | None:
    """A group of sequences that stays on chip, or None where their rows are too wide, or no vectors of 4.

    Weights of rows that are no vectors are not copied by themselves: their numbers wait in registers, and spill.

    Premises are as long as they may be (`longest`; 16, 32, 64 or 128, a variant each), or as registers allow.
    Sequences are as many as there are for each core. Chosen by the compile report (no spills); speed on a GPU not yet
    measured.
    """
    width_a, width_d = pow2(A, 16, LONG), pow2(D, 16, LONG)
    row, interpreter = width_a + width_d, chip.backend == "interpreter"
    room = 64 * 16 if interpreter else 64 * 512
    plain_rows = interpreter or (vectors(A, D) if row <= 512 else row == A + D)  # others of this width spilled
    if 16 * row > room or not plain_rows:
        return None
    rows = min(1 << (room // row).bit_length() - 1, pow2(longest, 16, 128))
    whole = width_a == A and width_d == D and not packed  # no tests of columns, and one length
    group = max(1, room // (rows * row), 2 if whole and rows * row <= room else 1)
    group = min(1 << group.bit_length() - 1, pow2(cdiv(seqs, chip.cores), 1, 4))
    return GroupBlocks(group, rows, width_a, width_d, pow2(min(D, 16384 // row), 16, 64), 8)
