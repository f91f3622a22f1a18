"""The windowed form of location attention: one output a position, from scores that do not depend on it.

    o_i = Σ_j e^{s_j} value_j / Σ_j e^{s_j}        over        i - left <= j <= i + right

Rows are in tiles. What a tile of keys gives is one state (see softmax.py) for every position that sees it whole, so
the states before a tile (behind it, where only the right side is open) are a scan over tiles:

    totals      the state of each tile: m = max x, l = Σ e^{x - m} c, o = Σ e^{x - m} value        (x = s, c = 1)
    scan        of each tile the merged states of those before it, or behind it
    forward     a tile of positions starts from the state of the keys that all of it sees, and walks the tiles of
                which its positions see different parts, pair by pair

in time T·(BLOCK + band). Windows with two ends have no scan, nor has dropout, which differs between the positions.
The backward, in location_window_bwd.py, is the same walk with positions and keys exchanged.

States are float64 for float32 inputs: in the backward, differences of them are what is left of a gradient.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    tile_rows,
    unit,
)
from .location import load_rows
from .masks import Items, key_range, old_dropout_scale, old_locate, old_sequence_of, partition, visible, whole_range
from .products import add_product
from .softmax import exp, finish, load_lse, new_lse, pivot, store_lse

# ---------------------------------------------------------------------------------------------------------------
# Device helpers
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def band(
    lo, hi, length, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SCAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(first and past-the-last tile of keys that positions [lo, hi) walk, the tile whose scan has the others)."""
    first, last = key_range(lo, hi, length, left, right, HAS_LEFT, HAS_RIGHT)
    tile0 = first // BLOCK
    tile1 = tl.where(last > first, tl.cdiv(last, BLOCK), tile0)
    state = 0
    if SCAN:
        first, last = whole_range(lo, hi, length, left, right, HAS_LEFT, HAS_RIGHT)
        if HAS_LEFT:  # the scan runs backwards: tile t has those from t + 1 on
            tiles = tl.maximum(tl.cdiv(length, BLOCK), 1)
            state = tl.minimum(tl.maximum(tl.cdiv(first, BLOCK), 1), tiles) - 1
            tile1 = tl.minimum(tile1, state + 1)
        else:
            # The last tile is always walked: no scan has it.
            tiles = tl.cdiv(length, BLOCK)
            state = tl.maximum(tl.minimum(tl.maximum(last, 0) // BLOCK, tiles - 1), 0)
            tile0 = state
    return tile0, tile1, state


@triton.jit
def _exponent(ptr, at, keep, LSE: tl.constexpr):
    """(x, factor): a score and 1, or of (m, l) -m and 1 / l; (-inf, 0) where there is none."""
    if LSE:
        top, factor = load_lse(ptr + at * 2, keep)
        x = tl.where(factor == 0.0, float("-inf"), -top)
    else:
        x = tl.load(ptr + at, mask=keep, other=float("-inf"))
        factor = tl.full(x.shape, 1.0, tl.float32)
    return x, factor


# ---------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=LENGTHS)
def _location_window_totals_kernel(
    x_ptr,  # (B, T, R) or (N, R) float32: scores; with LSE (m, l), (B, T, R, 2), of which x = -m
    c_ptr,  # (B, T, R) or (N, R) float64, or None: 1
    val_ptr, stride_vb, stride_vt, stride_vr,  # (B, T, R or 1, DV)
    m_ptr,  # (items, R) float32
    l_ptr,  # (items, R), float32 or float64
    o_ptr,  # (items, R, DV), the same
    cu_ptr, seq_ptr, first_ptr,  # see masks.Items
    num_seqs,
    per_seq,
    T,  # 0 where the batch is ragged
    DV,
    LSE: tl.constexpr,
    FMA: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    r = tl.program_id(1)
    R = tl.num_programs(1)
    d = tl.program_id(2) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    seq, start, lo, hi, _ = old_locate(item, cu_ptr, seq_ptr, first_ptr, T, num_seqs, per_seq, BLOCK)
    t = lo + tl.arange(0, BLOCK)
    rows = (start + t).to(tl.int64)
    at = (seq * T + rows) * R + r
    x, factor = _exponent(x_ptr, at, t < hi, LSE)
    keep = x != float("-inf")
    m = tl.max(x, axis=0)
    p = (exp(x - pivot(m), FMA) * factor).to(o_ptr.dtype.element_ty)  # [BLOCK]
    values = load_rows(val_ptr + seq * stride_vb + rows * stride_vt + r * stride_vr, keep, d, DV).to(p.dtype)
    slot = item.to(tl.int64) * R + r
    tl.store(o_ptr + slot * DV + d, tl.sum(p[:, None] * values, axis=0), mask=d < DV)
    if tl.program_id(2) == 0:
        if c_ptr is not None:
            p *= tl.load(c_ptr + at, mask=keep, other=0.0).to(p.dtype)
        tl.store(m_ptr + slot, m)
        tl.store(l_ptr + slot, tl.sum(p, axis=0))


@triton.jit(do_not_specialize=LENGTHS)
def _location_window_scan_kernel(
    m_ptr, l_ptr, o_ptr,  # states of the tiles, see above
    m_out_ptr, l_out_ptr, o_out_ptr,  # of all tiles before each; with REVERSE behind it
    cu_ptr, first_ptr,
    num_seqs,
    per_seq,
    T,
    DV,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1)
    R = tl.num_programs(1)
    d = tl.program_id(2) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    one = tl.arange(0, 1)
    _, length, item0 = old_sequence_of(seq, cu_ptr, first_ptr, T, num_seqs, per_seq)
    tiles = tl.cdiv(length, BLOCK)
    m = tl.full([1], float("-inf"), tl.float32)
    l = tl.zeros([1], l_ptr.dtype.element_ty)
    o = tl.zeros([BLOCK_DV], o_ptr.dtype.element_ty)
    for step in range(0, tiles):
        if REVERSE:
            tile = tiles - 1 - step
        else:
            tile = step
        slot = (item0 + tile) * R + r
        tl.store(o_out_ptr + slot * DV + d, o, mask=d < DV)
        if tl.program_id(2) == 0:
            tl.store(m_out_ptr + slot + one, m)
            tl.store(l_out_ptr + slot + one, l)
        m_tile = tl.load(m_ptr + slot + one)
        m_new = tl.maximum(m, m_tile)
        shift = pivot(m_new)
        old = tl.exp(m - shift)
        new = tl.exp(m_tile - shift)
        l = l * old + tl.load(l_ptr + slot + one) * new
        o = o * old + tl.load(o_ptr + slot * DV + d, mask=d < DV, other=0.0) * new
        m = m_new


@triton.jit(do_not_specialize=LENGTHS)
def _location_window_fwd_kernel(
    scores_ptr,  # (B, T, R) or (N, R) float32
    val_ptr, stride_vb, stride_vt,  # (B, T, DV) or (N, DV)
    m_ptr, l_ptr, o_ptr,  # scanned states, or None without SCAN
    seed_ptr,  # (1,) int64 or None
    out_ptr,  # (B, T, R, DV) or (N, R, DV) float32
    lse_ptr,  # (B, T, R, 2) or (N, R, 2) float32: (m, l), see softmax.py
    cu_ptr, seq_ptr, first_ptr,
    num_seqs,
    per_seq,
    T,
    DV,
    left,
    right,
    threshold,
    scale,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SCAN: tl.constexpr,
    FMA: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    r = tl.program_id(1)
    R = tl.num_programs(1)
    d = tl.program_id(2) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    seq, start, lo, hi, _ = old_locate(item, cu_ptr, seq_ptr, first_ptr, T, num_seqs, per_seq, BLOCK)
    _, length, item0 = old_sequence_of(seq, cu_ptr, first_ptr, T, num_seqs, per_seq)
    i = lo + tl.arange(0, BLOCK)
    inside = i < hi
    tile0, tile1, state = band(lo, hi, length, left, right, HAS_LEFT, HAS_RIGHT, SCAN, BLOCK)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
    if SCAN:
        some = lo < hi  # an item past the end has no state
        slot = (item0 + state) * R + r
        m = tl.zeros([BLOCK], tl.float32) + tl.load(m_ptr + slot, mask=some, other=float("-inf"))
        l += tl.load(l_ptr + slot, mask=some, other=0.0).to(tl.float32)
        acc += tl.load(o_ptr + slot * DV + d, mask=some & (d < DV), other=0.0).to(tl.float32)[None, :]
    for tile in range(tile0, tl.where(lo < hi, tile1, tile0)):
        j = tile * BLOCK + tl.arange(0, BLOCK)
        rows = (start + j).to(tl.int64)
        s = tl.load(scores_ptr + (seq * T + rows) * R + r, mask=j < length, other=float("-inf"))
        keep = s != float("-inf")
        shown = visible(i, j, inside, keep, None, 0, 0, left, right, HAS_LEFT, HAS_RIGHT)
        s = tl.where(shown, s[None, :], float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        shift = pivot(m_new)
        p = exp(s - shift[:, None], FMA)
        alpha = exp(m - shift, FMA)
        l = l * alpha + tl.sum(p, axis=1)
        m = m_new
        if seed_ptr is not None:
            p *= old_dropout_scale(seed_ptr, j[None, :], seq * R + r, i[:, None], threshold, scale)
        values = load_rows(val_ptr + seq * stride_vb + rows * stride_vt, keep, d, DV)
        if HAS_LEFT or HAS_RIGHT:
            # 0 * NaN is NaN: a value that is not finite is left out of the product, for those who see it to be NaN.
            finite = tl.abs(values.to(tl.float32)) < float("inf")
            values = tl.where(finite, values, 0.0)
            spoils = tl.max((finite == 0).to(tl.int32), axis=1) != 0
            p = tl.where(shown & spoils[None, :], float("nan"), p)
        acc = add_product(p, values, acc * alpha[:, None], COMPUTE, PRECISION)

    at = (seq * T + start + i) * R + r
    inv = finish(l)
    if tl.program_id(2) == 0:
        store_lse(lse_ptr + at * 2, m, l, inside)
    tl.store(out_ptr + at[:, None] * DV + d[None, :], acc * inv[:, None], mask=inside[:, None] & (d < DV)[None, :])


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Rows of a tile, of positions and of keys alike, and width of the values."""

    rows: int
    DV: int
    scan: bool  # whether a sequence is long enough for scans
    warps: int = 4


def window_blocks(chip: Chip, itemsize: int, length: int, DV: int, dropout: bool, packed: bool) -> Blocks:
    """Tiles of all kernels: short sequences without scans, and long ones, so that there are two variants.

    Chosen by the compile report (no spills); speed on a GPU not yet measured.

    float32 has no matrix units: its products are unrolled, over tiles of half the rows. Random words take registers.
    """
    if chip.backend == "interpreter":
        return Blocks(16, pow2(DV, 16, 32), length > 16)
    most = 32 if itemsize == 4 or dropout else 64
    rows = tile_rows(LONG if packed else length, most)
    return Blocks(rows, pow2(DV, 16, 64 if even(DV) else 32), length > rows if packed else rows == most, 8)


class Call(NamedTuple):
    """What the launches of one call share."""

    items: Items
    hops: int
    blocks: Blocks
    state: torch.dtype
    scan: bool
    registers: dict[str, int]  # a launch option
    args: dict[str, object]  # the kernels' arguments, by name

    def launch(self, kernel, *grid: int, num_stages: int = 2, **more: object) -> None:
        """Launch with those of the arguments that the kernel has."""
        args = {**self.args, **more}
        named = {name: args[name] for name in kernel.arg_names}
        options = {"num_warps": self.blocks.warps, "num_stages": num_stages, **self.registers}
        fitted(kernel, named)[grid](**named, **options)

    def states(self, width: int, **more: object) -> dict[str, Tensor]:
        """Scanned states, by the kernels' names: of the tiles before each, or behind it where `REVERSE`."""
        device = self.args["val_ptr"].device
        shape = self.items.count, self.hops
        m, m_out = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
        l, l_out = (torch.empty(shape, dtype=self.state, device=device) for _ in range(2))
        o, o_out = (torch.empty(*shape, width, dtype=self.state, device=device) for _ in range(2))
        parts = max(1, triton.cdiv(width, self.blocks.DV))
        self.launch(_location_window_totals_kernel, *shape, parts, m_ptr=m, l_ptr=l, o_ptr=o, **more)
        self.launch(
            _location_window_scan_kernel, self.args["num_seqs"], self.hops, parts,
            m_ptr=m, l_ptr=l, o_ptr=o, m_out_ptr=m_out, l_out_ptr=l_out, o_out_ptr=o_out, **more,
        )  # fmt: skip
        return {"m_ptr": m_out, "l_ptr": l_out, "o_ptr": o_out}


def prepare(
    scores: Tensor, values: Tensor, cu_seqlens: Tensor | None, seed: Tensor | None,
    left: int | None, right: int | None, dropout_p: float,
) -> Call:  # fmt: skip
    chip = chip_of(values.device)
    ragged, exact = cu_seqlens is not None, values.dtype == torch.float32
    length, DV = values.shape[-2:]
    seqs = cu_seqlens.numel() - 1 if ragged else len(scores)
    blocks = window_blocks(chip, values.element_size(), length, DV, dropout_p > 0, ragged)
    items = partition(seqs, length, blocks.rows, cu_seqlens)
    scan = dropout_p == 0 and (left is None or right is None) and blocks.scan
    values = unit(values[None] if ragged else values)
    args = {
        "scores_ptr": scores.contiguous(), "seed_ptr": seed, "val_ptr": values,
        **strides("vb vt", values, (0, 1), packed=ragged), "stride_vr": 0,
        "cu_ptr": cu_seqlens if cu_seqlens is None else cu_seqlens.contiguous(),
        "seq_ptr": items.seq, "first_ptr": items.first, "num_seqs": seqs, "per_seq": items.per_seq,
        "T": 0 if ragged else length, "DV": DV,
        "left": left or 0, "right": right or 0, "HAS_LEFT": left is not None, "HAS_RIGHT": right is not None,
        "threshold": round(dropout_p * 2**24), "scale": 1.0 / (1.0 - dropout_p), "SCAN": scan,
        "m_ptr": None, "l_ptr": None, "o_ptr": None,
        "EXACT": exact, "FMA": exact and chip.backend != "interpreter", **matmul_flags(chip, values.dtype),
        "BLOCK": blocks.rows, "BLOCK_DV": blocks.DV,
    }  # fmt: skip
    state = torch.float64 if exact else torch.float32
    return Call(items, scores.shape[-1], blocks, state, scan, all_registers(chip), args)


def window_fwd(
    scores: Tensor, values: Tensor, cu_seqlens: Tensor | None, seed: Tensor | None,
    left: int | None, right: int | None, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) as `fused_attn.reference.windowed_attention` has them, out in float32."""
    DV = values.shape[-1]
    out = scores.new_empty(*scores.shape, DV, dtype=torch.float32)
    lse = new_lse(*scores.shape, device=scores.device)
    if lse.numel() == 0:
        return out, lse
    call = prepare(scores, values, cu_seqlens, seed, left, right, dropout_p)
    with torch.cuda.device_of(values):
        states = {}
        if call.scan:
            states = call.states(DV, x_ptr=call.args["scores_ptr"], c_ptr=None, LSE=False, REVERSE=left is not None)
        grid = call.items.count, call.hops, max(1, triton.cdiv(DV, call.blocks.DV))  # lse is there without values
        call.launch(_location_window_fwd_kernel, *grid, out_ptr=out, lse_ptr=lse, **states)
    return out, lse
