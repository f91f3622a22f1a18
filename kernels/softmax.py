"""Online softmax: the running state (m, l, o), and the exact merge of states over disjoint keys.

    m = max s        l = Σ exp(s - m)        o = Σ exp(s - m) value        out = o / l

A state that has seen no key has m = -inf and l = 0. `pivot` keeps every exponent away from -inf - (-inf).

What a forward keeps for its backward is (m, l), two float32 side by side: a weight is exp(s - m) / l, right at any
size of the scores. One number, lse = m + log l, would not do: beside scores of 1e9 float32 has no room for log l, and
beside 1e30 float64 has none.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import constants, launch, width
from .chip import INTERPRET, LENGTHS, cdiv, pow2
from .masks import Items, Spans, items_of

_EXACT: tl.constexpr = tl.constexpr(INTERPRET)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x, FMA: tl.constexpr):
    """e^x to a few units in the last place at any x.

    exp2(x log2 e) loses |x| units to the rounding of the product: so the product is kept in two parts. The
    interpreter has no fused multiply-add, but an exact enough exp.
    """
    if FMA:
        # 0 in float32; of -inf the two parts would be NaN, and NaN stays what it is
        x = tl.maximum(x, -150.0, propagate_nan=tl.PropagateNan.ALL)
        hi = x * 1.4426950216293335
        lo = tl.fma(x, 1.4426950216293335, -hi) + x * 1.9259629911266175e-8
        return tl.exp2(hi) * (1.0 + lo * 0.6931471805599453)
    return tl.exp(x)


@triton.jit
def rounded_product(x, y):
    """x y, x broadcast to y, rounded before it goes into a sum over lanes.

    A product that the compiler contracts with such a sum is rounded in one lane and not in the other, so that they
    end with different last bits of one score: what one of them stores is then not what the others have.
    """
    return tl.fma(tl.broadcast_to(x, y.shape), y, tl.broadcast_to(x * 0.0, y.shape))


@triton.jit
def made_once(s):
    """s [BLOCK_N] itself, where the compiler would make it again for a user of another layout.

    It adds in another order there: the weights were exp of one s less the maximum of another, off by per cents at
    scores of thousands. It makes no gather again. The compile report tells where this is needed.
    """
    return tl.gather(s, tl.arange(0, s.shape[0]), 0)


@triton.jit
def pivot(m):
    """A finite number to subtract: m, or 0 where no key was seen."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def power(x, NATURAL: tl.constexpr, FMA: tl.constexpr):
    """The exponential that the scores are made for: e^x, or 2^x.

    Without FMA e^x is 2^(x log2 e), off by |x| units in the last place of float32: beside inputs of 16 bits nothing.
    The compiler's own has four instructions more, for results under 1e-38.
    """
    if NATURAL:
        if FMA or _EXACT:
            return exp(x, FMA)
        return tl.exp2(x * LOG2E)
    return tl.exp2(x)


@triton.jit
def online_softmax(
    s, m, l, AXIS: tl.constexpr, FMA: tl.constexpr, NATURAL: tl.constexpr = True, SEEN: tl.constexpr = False
):
    """One step over scores s: the unnormalised weights, the factor on old sums, and (m, l).

    AXIS: that of s which has the keys. FMA, NATURAL: of `power`. SEEN: there is no row that has seen no key.
    """
    m_new = tl.maximum(m, tl.max(s, axis=AXIS))
    shift = m_new if SEEN else pivot(m_new)
    p = power(s - (shift if len(s.shape) == 1 else tl.expand_dims(shift, AXIS)), NATURAL, FMA)
    alpha = power(m - shift, NATURAL, FMA)
    return p, alpha, m_new, l * alpha + tl.sum(p, axis=AXIS)


@triton.jit
def join_states(m, l, acc, m_i, l_i, o_i, unit, FMA: tl.constexpr):
    """The state (m, l, acc [BLOCK_D]), and with it those of m_i, l_i [BLOCK_I], o_i [BLOCK_I, BLOCK_D]."""
    m_new = tl.maximum(m, tl.max(m_i, axis=0))
    shift = pivot(m_new)
    p = exp((m_i - shift) * unit, FMA)
    alpha = exp((m - shift) * unit, FMA)
    return m_new, l * alpha + tl.sum(p * l_i, axis=0), acc * alpha + tl.sum(p[:, None] * o_i, axis=0)


@triton.jit
def finish(l):
    """1 / l, rounded once, so that a key alone has the weight 1; 0 where no key was seen."""
    seen = l != 0  # NaN among the scores is to be seen in the result
    return tl.where(seen, tl.div_rn(1.0, tl.where(seen, l, 1.0)), 0.0)


@triton.jit
def store_lse(ptrs, m, l, mask):
    """Keep (m, l) at ptrs, the first of the two numbers of each row."""
    tl.store(ptrs, m, mask=mask)
    tl.store(ptrs + 1, l, mask=mask)


@triton.jit
def load_lse(ptrs, mask):
    """(m, 1 / l), (0, 0) where no key was seen or the mask is False: a weight is exp(s - m) times the second."""
    m = tl.load(ptrs, mask=mask, other=float("-inf"))
    return pivot(m), finish(tl.load(ptrs + 1, mask=mask, other=0.0))


@triton.jit
def load_dlse(d_ptrs, ptrs, mask):
    """Gradient of log l, from that of l. m is a constant: no result depends on it."""
    dl = tl.load(d_ptrs + 1, mask=mask, other=0.0)
    return tl.where(dl == 0, 0.0, dl * tl.load(ptrs + 1, mask=mask, other=0.0))  # 0 stays 0 where l is NaN


def new_lse(*shape: int, device: torch.device) -> Tensor:
    """Room for (m, l), ``shape + (2,)``."""
    return torch.empty(*shape, 2, dtype=torch.float32, device=device)


def no_key(lse: Tensor) -> Tensor:
    """Fill with (-inf, 0), of rows that have seen no key."""
    lse[..., 0] = -torch.inf
    lse[..., 1] = 0.0
    return lse


@triton.jit(do_not_specialize=LENGTHS)
def _merge_kernel(
    o_ptr,  # (items, R, DV) float32
    m_ptr,  # (items, R) float32
    l_ptr,  # (items, R) float32
    spans,
    out_ptr,  # (S, R, DV)
    lse_ptr,  # (S, R, 2) float32: (m, l)
    exact_ptr,  # (S, R, DV) float32, or None
    per_seq,
    rows,
    R,
    DV,
    unit,  # what a difference of two m is in natural units
    flags,
    blocks,
):
    row = tl.program_id(0).to(tl.int64)  # sequence and hop
    seq = row // R
    d = tl.program_id(1) * blocks.DV + tl.arange(0, blocks.DV)
    lo, hi = items_of(seq, spans, per_seq, rows)
    m = tl.full([1], float("-inf"), tl.float32)
    l = tl.zeros([1], tl.float32)
    acc = tl.zeros([blocks.DV], tl.float32)
    for i0 in range(lo, hi, blocks.I):
        item = i0 + tl.arange(0, blocks.I)
        at = item * R + row % R
        m_i = tl.load(m_ptr + at, mask=item < hi, other=float("-inf"))
        l_i = tl.load(l_ptr + at, mask=item < hi, other=0.0)
        # A part that saw no key may not have written its sum.
        seen = (m_i > float("-inf"))[:, None] & (d < DV)[None, :]
        o_i = tl.load(o_ptr + at[:, None] * DV + d[None, :], mask=seen, other=0.0)
        m, l, acc = join_states(m, l, acc, m_i, l_i, o_i, unit, flags.FMA)
    inv = finish(l)
    write = hi - lo != 1 if flags.SKIP_SINGLE else True
    out = acc * inv
    tl.store(out_ptr + row * DV + d, out.to(out_ptr.dtype.element_ty), mask=(d < DV) & write)
    if exact_ptr is not None:
        tl.store(exact_ptr + row * DV + d, out, mask=(d < DV) & write)
    if tl.program_id(1) == 0:
        store_lse(lse_ptr + row * 2 + tl.arange(0, 1), m, l, write)


class MergeBlocks(NamedTuple):
    """Items and width of the values of a tile."""

    I: int
    DV: int
    warps: int = 4


class MergeFlags(NamedTuple):
    """What the kernel is compiled for."""

    FMA: bool
    SKIP_SINGLE: bool


def merge(
    o: Tensor,
    m: Tensor,
    l: Tensor,
    items: Items,
    out: Tensor,
    lse: Tensor,
    exact: Tensor | None = None,
    *,
    skip_single: bool,
    unit: float = 1.0,
) -> None:
    """Merge the states ``o (items, R, Dv)``, ``m`` and ``l (items, R)`` into ``out (S, R, Dv)``, ``lse (S, R, 2)``.

    exact: in float32 what `out` is in another dtype.
    unit: of m; log 2 where the exponentials are powers of 2. skip_single leaves sequences of exactly one item alone:
    their kernel has written the result itself.
    """
    seqs, hops, DV = out.shape
    blocks = MergeBlocks(16, pow2(DV, 1, 128))
    args = {
        "o_ptr": o,
        "m_ptr": m,
        "l_ptr": l,
        "spans": Spans(items.cu),
        "out_ptr": out,
        "lse_ptr": lse,
        "exact_ptr": exact,
        "per_seq": items.per_seq,
        "rows": items.rows,
        "R": hops,
        "DV": width(DV),
        "unit": unit,
        "flags": constants(MergeFlags(not INTERPRET, skip_single)),
    }
    launch(_merge_kernel, (seqs * hops, cdiv(DV, blocks.DV)), args, blocks)
