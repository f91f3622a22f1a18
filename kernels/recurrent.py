"""Word-by-word attention (Rocktäschel et al. 2016): an additive score whose query holds the last result.

With key = Y W_y and query = H W_h made before, one product each, and t the words of the hypothesis, j those of the
premise:

    c_t  = query_t + r_{t-1} W_r              s_tj = w · tanh(key_j + c_t)
    α_t  = softmax_j(s_t)                     r_t  = Σ_j α_tj value_j + tanh(r_{t-1} W_t)

Step t needs all of r_{t-1}, so one program walks all steps of a sequence. r goes from step to step through global
memory (float32, and a barrier): there a product with a weight reads it in any layout, and nothing limits its width.
Those of all steps stay where a gradient may be asked for, each with its c and tanh(r W_t), for the backward; else two
rows in turn, which stay in cache. The weights stream from cache, a block of rows at a time.

- `HELD`: keys and values of the premise are loaded once, and stay on chip for all steps. For premises of at most
  `limit` words and widths that registers hold. Rows of 16 bits have a kernel of their own for that, of several
  sequences a program (recurrent_group.py), but on AMD's chips.
- Otherwise tiles of them are read again at every step: first all scores of the step, into a row of scratch, then the
  sum. Any length, any width.
- How long the sequences of a ragged batch are is known on the device only: both forms are launched, and each takes
  the sequences that are its own.

The scores of a step are all there before the sum, so the softmax has its final maximum; no lse is kept, the backward
(recurrent_bwd.py) makes them again from c.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import tanh
from .arguments import constants, entries, launch, matrix, pitch, sequence_ptr, sequences, width
from .chip import LENGTHS, LONG, Chip, all_registers, cdiv, chip_of, even, matmul_flags, pow2, unit
from .inputs import WordByWordInputs
from .masks import Spans, sequence_of, unmasked
from .recurrent_group import GroupBlocks, _recurrent_group_fwd_kernel, group_blocks
from .softmax import exp, finish, made_once, online_softmax, pivot, rounded_product
from .tiles import load_rows


@triton.jit
def vector_matrix(
    x_ptr,  # (K,) float32
    w,  # (K, width)
    cols,  # [BLOCK]
    K,
    width,
    BLOCK_K: tl.constexpr,
):
    """Columns of x W, [BLOCK] float32; one reduction over threads, after all rows."""
    acc = tl.zeros([BLOCK_K, cols.shape[0]], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0)
        acc += x[:, None] * load_rows(w.ptr + k.to(tl.int64) * w.stride, k < K, cols, width).to(tl.float32)
    return tl.sum(acc, axis=0)


@triton.jit
def premise_keys(j, length, mask, seq):
    """Which words j [BLOCK_N] of the premise may be read."""
    return unmasked(mask, seq, j.to(tl.int64), j < length)


@triton.jit(do_not_specialize=LENGTHS)
def _recurrent_fwd_kernel(
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
    state_ptr,  # float32 (B, Th, W) or packed (N, W): r before each step, its c and tanh(r W_t); or (S, slots, W)
    s_ptr,  # (B, Ty) float32: scores, for what is not held
    result,
    Th,
    Ty,
    size,
    limit,  # longest premise that is held
    slots,  # rows of r that are taken in turn; 0: those of all steps stay
    flags,
    blocks,
):
    seq = tl.program_id(0).to(tl.int64)
    q_start, steps = sequence_of(seq, q_spans, Th)
    k_start, length = sequence_of(seq, k_spans, Ty)
    own = (length <= limit) == flags.HELD
    steps = tl.where(own, steps, 0)
    q_ptr = sequence_ptr(q, seq, q_start)
    k_ptr = sequence_ptr(k, seq, k_start)
    value_ptr = sequence_ptr(value, seq, k_start)
    out_ptr = result.out + (seq * Th + q_start) * size.D  # of packed rows Th is 0, or Ty
    weights_ptr = result.weights
    if weights_ptr is not None:
        weights_ptr += (seq * Th + q_start) * Ty
    scores_ptr = result.scores
    if scores_ptr is not None:
        scores_ptr += (seq * Th + q_start) * Ty
    if flags.HELD:
        j = tl.arange(0, blocks.N)
        a = tl.arange(0, blocks.A)
        d = tl.arange(0, blocks.D)
        keep = premise_keys(j, length, mask, seq)
        key = load_rows(k_ptr + j.to(tl.int64) * pitch(k), keep, a, size.A)
        values = load_rows(value_ptr + j.to(tl.int64) * pitch(value), keep, d, size.D)
        w = tl.load(w_ptr + a, mask=a < size.A, other=0.0).to(tl.float32)
    else:
        s_ptr += seq * Ty + k_start

    kept = slots == 0
    numbers = size.D + size.A + size.D
    state_ptr += tl.where(kept, seq * Th + q_start, seq * slots) * numbers
    for d0 in range(0, size.D, blocks.D):
        i = d0 + tl.arange(0, blocks.D)
        r = tl.zeros([blocks.D], tl.float32)
        if first_ptr is not None:
            r += tl.load(first_ptr + seq * size.D + i, mask=i < size.D, other=0.0).to(tl.float32)
        tl.store(state_ptr + i, r, mask=(i < size.D) & (steps > 0))
    tl.debug_barrier()
    for t in range(0, steps):
        last_ptr = state_ptr + tl.where(kept, t, t % 2).to(tl.int64) * numbers
        next_ptr = state_ptr + tl.where(kept, t + 1, (t + 1) % 2).to(tl.int64) * numbers
        c_ptr = last_ptr + size.D
        u_ptr = c_ptr + size.A
        more = t + 1 < steps
        if flags.HELD:
            c = tl.load(q_ptr + a, mask=a < size.A, other=0.0).to(tl.float32)
            c += vector_matrix(last_ptr, w_r, a, size.D, size.A, blocks.K)
            tl.store(c_ptr + a, c, mask=a < size.A)
            s = tl.sum(rounded_product(w[None, :], tanh(key.to(tl.float32) + c[None, :], flags.FAST)), axis=1)
            s = tl.where(keep, s, float("-inf"))
            if flags.ONCE:
                s = made_once(s)
            if scores_ptr is not None:
                tl.store(scores_ptr + j, s, mask=j < length)
            p, _alpha, m, l = online_softmax(s, float("-inf"), 0.0, 0, flags.FMA)
            inv = finish(l)
            if weights_ptr is not None:
                tl.store(weights_ptr + j, p * inv, mask=j < length)
            r = tl.sum(p[:, None] * values.to(tl.float32), axis=0) * inv
            u = tanh(vector_matrix(last_ptr, w_t, d, size.D, size.D, blocks.K), False)  # no FAST: it is carried on
            r += u
            tl.store(u_ptr + d, u, mask=d < size.D)
            tl.store(next_ptr + d, r, mask=(d < size.D) & more)
            tl.store(out_ptr + d, r.to(out_ptr.dtype.element_ty), mask=d < size.D)
        else:
            for a0 in range(0, size.A, blocks.A):
                a = a0 + tl.arange(0, blocks.A)
                c = tl.load(q_ptr + a, mask=a < size.A, other=0.0).to(tl.float32)
                c += vector_matrix(last_ptr, w_r, a, size.D, size.A, blocks.K)
                tl.store(c_ptr + a, c, mask=a < size.A)
            tl.debug_barrier()
            m = tl.full([1], float("-inf"), tl.float32)
            l = tl.zeros([1], tl.float32)
            for n0 in range(0, length, blocks.N):
                j = n0 + tl.arange(0, blocks.N)
                keep = premise_keys(j, length, mask, seq)
                s = score_tile(k_ptr + j.to(tl.int64) * pitch(k), keep, c_ptr, w_ptr, size.A, flags.FAST, blocks.A)
                tl.store(s_ptr + j, s, mask=j < length)
                if scores_ptr is not None:
                    tl.store(scores_ptr + j, s, mask=j < length)
                _p, _alpha, m, l = online_softmax(s, m, l, 0, flags.FMA)
            shift = pivot(m)
            inv = finish(l)
            tl.debug_barrier()
            for d0 in range(0, size.D, blocks.D):
                d = d0 + tl.arange(0, blocks.D)
                r = tl.zeros([blocks.D], tl.float32)
                for n0 in range(0, length, blocks.N):
                    j = n0 + tl.arange(0, blocks.N)
                    keep = premise_keys(j, length, mask, seq)
                    p = exp(tl.load(s_ptr + j, mask=j < length, other=float("-inf")) - shift, flags.FMA)
                    values = load_rows(value_ptr + j.to(tl.int64) * pitch(value), keep, d, size.D)
                    r += tl.sum(p[:, None] * values.to(tl.float32), axis=0)
                r *= inv
                u = tanh(vector_matrix(last_ptr, w_t, d, size.D, size.D, blocks.K), False)  # as above
                r += u
                tl.store(u_ptr + d, u, mask=d < size.D)
                tl.store(next_ptr + d, r, mask=(d < size.D) & more)
                tl.store(out_ptr + d, r.to(out_ptr.dtype.element_ty), mask=d < size.D)
            if weights_ptr is not None:
                for n0 in range(0, length, blocks.N):
                    j = n0 + tl.arange(0, blocks.N)
                    p = exp(tl.load(s_ptr + j, mask=j < length, other=float("-inf")) - shift, flags.FMA)
                    tl.store(weights_ptr + j, p * inv, mask=j < length)
        out_ptr += size.D
        q_ptr += pitch(q)
        if weights_ptr is not None:
            weights_ptr += Ty
        if scores_ptr is not None:
            scores_ptr += Ty
        tl.debug_barrier()  # the next step reads r, and writes the scratch anew


@triton.jit
def score_tile(k_ptrs, keep, c_ptr, w_ptr, A, FAST: tl.constexpr, BLOCK_A: tl.constexpr):
    """Scores [BLOCK_N] of the keys at k_ptrs, -inf where they may not be read."""
    s = tl.zeros([k_ptrs.shape[0]], tl.float32)
    for a0 in range(0, A, BLOCK_A):
        a = a0 + tl.arange(0, BLOCK_A)
        c = tl.load(c_ptr + a, mask=a < A, other=0.0)
        w = tl.load(w_ptr + a, mask=a < A, other=0.0).to(tl.float32)
        key = load_rows(k_ptrs, keep, a, A).to(tl.float32)
        s += tl.sum(rounded_product(w[None, :], tanh(key + c[None, :], FAST)), axis=1)
    return tl.where(keep, s, float("-inf"))


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Sizes of one kernel's tiles: words of the premise, widths of score and values, rows of a weight."""

    N: int
    A: int
    D: int
    K: int
    warps: int


def held_blocks(chip: Chip, per_element: int, longest: int, A: int, D: int) -> Blocks | None:
    """One tile of all widths that stays on chip, or None where they are too wide.

    It is as long as the premises may be (`longest`; 16, 32 or 128, a variant each), or as registers allow: an element
    of a key and of a value has `per_element` of them, 1 in the forward and 4 in the backward. Chosen by the compile
    report (no spills); speed on a GPU not yet measured.
    """
    width_a, width_d = pow2(A, 16, LONG), pow2(D, 16, LONG)
    room = 64 * 16 if chip.backend == "interpreter" else 128 * 256 // per_element
    room //= 2 if chip.arch == 100 else 1  # what the others hold spilled there
    row = width_a + width_d
    if 16 * row > room:
        return None
    rows = min(1 << (room // row).bit_length() - 1, 128 if longest > 32 else pow2(longest, 16, 32))
    return Blocks(rows, width_a, width_d, 16 if 2 * rows * row > room else 32, 8 if rows * row > 1024 else 4)


def stream_blocks(chip: Chip, per_element: int, longest: int, A: int, D: int) -> Blocks:
    """Tiles that are read again at every step."""
    if chip.backend == "interpreter":
        return Blocks(16, 16, 16, 16, 4)
    return Blocks(pow2(longest, 16, 32), pow2(A, 16, 128), pow2(D, 16, 128), 32 if per_element == 1 else 16, 8)


class Size(NamedTuple):
    """Widths of the score and of the values."""

    A: int
    D: int


class Flags(NamedTuple):
    """What kernels are compiled for."""

    FAST: bool
    FMA: bool
    ONCE: bool  # scores go through `made_once`: on AMD's chips narrow ones were made twice
    HELD: bool  # keys and values of a premise stay on chip
    ASM: bool  # 16 bits are widened by `recurrent_group.widened`
    DOT: bool  # vectors meet weights by matrix units in the backward: float16 has no room for small gradients
    WHOLE: bool  # weights are whole tiles
    COMPUTE: object  # see `chip.matmul_flags`
    PRECISION: str


class Result(NamedTuple):
    """What the forward leaves."""

    out: Tensor  # (B, Th, D)
    weights: Tensor | None  # (B, Th, Ty) or (M, Ty) float32
    scores: Tensor | None  # the same
    parts: Tensor | None  # what is scratch of groups, see `group_parts`


class Call(NamedTuple):
    """What the launches of one call share, by the kernels' names."""

    chip: Chip
    seqs: int
    q_packed: bool  # rows of the hypothesis
    k_packed: bool  # those of the premise
    size: Size
    flags: Flags
    args: dict[str, Any]


def prepare(inputs: WordByWordInputs, key: Tensor) -> Call:
    """Arguments by the kernels' names; key: the premise, projected."""
    value, hypothesis, *_, w_r, w, w_t, _, mask, cu_seqlens_premise, cu_seqlens_hypothesis = inputs
    chip, k_packed, q_packed = (
        chip_of(value.device),
        cu_seqlens_premise is not None,
        cu_seqlens_hypothesis is not None,
    )
    value, w_r, w_t = (unit(x) for x in (value, w_r, w_t))
    spans = (Spans(x if x is None else x.contiguous()) for x in (cu_seqlens_hypothesis, cu_seqlens_premise))
    seqs = value.shape[0] if cu_seqlens_premise is None else cu_seqlens_premise.numel() - 1
    A, D = size = Size(w.shape[0], value.shape[-1])
    fast = chip.backend == "cuda" and key.element_size() == 2
    matmul = matmul_flags(chip, key.dtype)
    hip, interpreter = chip.backend == "hip", chip.backend == "interpreter"
    dot = key.dtype == torch.bfloat16 and not hip and (interpreter or even(A, D))
    flags = Flags(fast, not interpreter, hip, False, fast, dot, False, **matmul)
    args = {
        "k": sequences(key, packed=k_packed),
        "value": sequences(value, packed=k_packed),
        "w_ptr": w.contiguous(),
        "w_r": matrix(w_r),
        "w_t": matrix(w_t),
        "mask": entries(None if mask is None else mask.view(torch.uint8), packed=k_packed),
        **dict(zip(("q_spans", "k_spans"), spans, strict=True)),
        "size": Size(width(A), width(D)),
        "Th": 0 if q_packed else hypothesis.shape[1],
        "Ty": 0 if k_packed else value.shape[1],
        "num_seqs": seqs,
    }
    return Call(chip, seqs, q_packed, k_packed, size, flags, args)


Form = tuple[int, Blocks | GroupBlocks]
"""The longest premise that it holds on chip (-1: none), and its blocks."""


def forms(call: Call, per_element: int, longest: int, *, grouped: bool, told: bool = False) -> list[Form]:
    """What is to be launched.

    longest: words of the longest premise, or of all packed ones; what is held then is as long as twice their mean.
    grouped: rows of 16 bits that are held are those of `GroupBlocks`. told: scores are left, and less is held beside:
    as many rows of 32 bits spilled, and two sequences where both operands of a product are in registers.
    """
    chip, (A, D) = call.chip, call.size
    usual = cdiv(2 * longest, call.seqs) if call.k_packed else longest
    held: Blocks | GroupBlocks | None = None
    if grouped and call.args["k"].ptr.element_size() == 2 and chip.backend != "hip":
        packed = call.q_packed or call.k_packed or (told and chip.from_registers)
        held = group_blocks(chip, call.seqs, usual, A, D, packed=packed)
    held = held or held_blocks(chip, 2 * per_element if told else per_element, usual, A, D)
    made = [(held.N, held)] if held is not None and (call.k_packed or longest <= held.N) else []
    if held is None or longest > held.N:
        made.append((-1, stream_blocks(chip, per_element, longest, A, D)))
    return made


def group_parts(call: Call, chosen: list[Form], width: int) -> Tensor | None:
    """Room for vectors of two steps in parts, see `recurrent_group`; None where no form has groups."""
    groups = [blocks.S for _, blocks in chosen if isinstance(blocks, GroupBlocks)]
    like = call.args["k"].ptr
    dtype = torch.float32 if call.chip.backend == "interpreter" else like.dtype
    return like.new_empty(cdiv(call.seqs, groups[0]), 2, 2 * groups[0], width, dtype=dtype) if groups else None


def launch_forms(kernel, group_kernel, call: Call, chosen: list[Form], **more: object) -> None:
    """Launch the held form, the streamed one, or both, so that each sequence has its own.

    A program has one sequence, or those of a group.
    """
    args = {**call.args, **more, "limit": chosen[0][0]}
    A, D = call.size
    for holds, blocks in chosen:
        flags, programs, started = call.flags._replace(HELD=holds >= 0), call.seqs, kernel
        if holds >= 0 and call.chip.backend != "interpreter":  # spilled, beside what is held
            flags = flags._replace(DOT=False)
        if isinstance(blocks, GroupBlocks):
            flags = flags._replace(WHOLE=blocks.A == A and blocks.D == D and D % blocks.K == 0)
            programs, started = cdiv(call.seqs, blocks.S), group_kernel
        args["flags"] = constants(flags)
        launch(started, (programs,), args, blocks, **all_registers(call.chip))


def recurrent_fwd(
    inputs: WordByWordInputs, need_weights: bool, need_scores: bool, need_states: bool
) -> tuple[Tensor, ...]:
    """(out, weights, scores, states, key): the first as `fused_attn.reference.word_by_word_attention` has them.

    states: in float32 r before each step, its c and tanh(r W_t), ``(B, Th, D + A + D)`` or packed. key: the premise,
    projected. They, and weights and scores (of padded premises only), are empty where they are not needed.
    """
    premise, hypothesis, w_y, w_h, *_, state, _, _, _ = inputs
    key = premise @ w_y
    call = prepare(inputs, key)
    (A, D), rows = call.size, hypothesis.shape[:-1]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=premise.device)

    out = premise.new_empty(*rows, D)
    weights, scores = (empty(*rows, premise.shape[-2]) if need else empty(0) for need in (need_weights, need_scores))
    states = empty(*(rows if need_states else (call.seqs, 2)), D + A + D)
    if out.numel():
        more = {
            "q": sequences(hypothesis @ w_h, packed=call.q_packed),
            "s_ptr": empty(*premise.shape[:-1]),
            "first_ptr": None if state is None else state.contiguous(),
            "state_ptr": states,
            "slots": 0 if need_states else 2,
        }
        chosen = forms(call, 1, premise.shape[-2], grouped=True, told=need_scores)
        more["result"] = Result(
            out,
            weights if need_weights else None,
            scores if need_scores else None,
            group_parts(call, chosen, D),
        )
        launch_forms(_recurrent_fwd_kernel, _recurrent_group_fwd_kernel, call, chosen, **more)
    return out, weights, scores, *((states, key) if need_states else (empty(0), key.new_empty(0)))
