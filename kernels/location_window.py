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

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import constants, head_ptr, heads, launch, pitch, sequence_ptr, sequences, width
from .chip import (
    LENGTHS,
    LONG,
    Chip,
    all_registers,
    cdiv,
    chip_of,
    matmul_flags,
    pow2,
    rule,
    tile_rows,
    unit,
    whole_rows,
)
from .inputs import WindowInputs
from .masks import (
    Items,
    Spans,
    dropout,
    dropout_scale,
    first_item,
    in_window,
    locate,
    partition,
    sequence_of,
    whole_window,
    window,
    window_tiles,
)
from .products import add_product
from .softmax import exp, finish, new_lse, online_softmax, pivot, store_lse
from .tiles import load_rows, store_both

# ---------------------------------------------------------------------------------------------------------------
# Device helpers
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def band(lo, hi, length, window, SCAN: tl.constexpr, BLOCK: tl.constexpr):
    """(first and past-the-last tile of keys that positions [lo, hi) walk, the tile whose scan has the others)."""
    tile0, tile1 = window_tiles(window, lo, hi, length, BLOCK)
    state = 0
    if SCAN:
        first, last = whole_window(window, lo, hi, length)
        if window.HAS_LEFT:  # the scan runs backwards: tile t has those from t + 1 on
            tiles = tl.maximum(tl.cdiv(length, BLOCK), 1)
            state = tl.minimum(tl.maximum(tl.cdiv(first, BLOCK), 1), tiles) - 1
            tile1 = tl.minimum(tile1, state + 1)
        else:
            # The last tile is always walked: no scan has it.
            tiles = tl.cdiv(length, BLOCK)
            state = tl.maximum(tl.minimum(tl.maximum(last, 0) // BLOCK, tiles - 1), 0)
            tile0 = state
    return tile0, tile1, state


# ---------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=LENGTHS)
def _location_window_totals_kernel(
    scores_ptr,  # (B, T, R) or (N, R) float32
    terms,  # (B, R, T, DV) or (1, R, N, DV)
    state,
    spans,
    num_seqs,
    per_seq,
    T,  # 0 where the batch is ragged
    DV,
    flags,
    blocks,
):
    item = tl.program_id(0)
    r = tl.program_id(1)
    R = tl.num_programs(1)
    d = tl.program_id(2) * blocks.DV + tl.arange(0, blocks.DV)
    seq, start, lo, hi, _ = locate(item, spans, T, num_seqs, per_seq, blocks.T)
    t = lo + tl.arange(0, blocks.T)
    rows = (start + t).to(tl.int64)
    at = (seq * T + rows) * R + r
    s = tl.load(scores_ptr + at, mask=t < hi, other=float("-inf"))
    keep = s != float("-inf")
    m = tl.max(s, axis=0)
    p = exp(s - pivot(m), flags.FMA).to(state.o.dtype.element_ty)  # [blocks.T]
    values = load_rows(head_ptr(terms, seq, r) + rows * pitch(terms), keep, d, DV).to(p.dtype)
    slot = item.to(tl.int64) * R + r
    tl.store(state.o + slot * DV + d, tl.sum(p[:, None] * values, axis=0), mask=d < DV)
    if tl.program_id(2) == 0:
        tl.store(state.m + slot, m)
        tl.store(state.l + slot, tl.sum(p, axis=0))


@triton.jit(do_not_specialize=LENGTHS)
def _location_window_scan_kernel(
    state,  # of the tiles
    scanned,  # of all tiles before each; with REVERSE behind it
    spans,
    per_seq,
    T,
    DV,
    flags,
    blocks,
):
    seq = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1)
    R = tl.num_programs(1)
    d = tl.program_id(2) * blocks.DV + tl.arange(0, blocks.DV)
    one = tl.arange(0, 1)
    _, length = sequence_of(seq, spans, T)
    item0 = first_item(seq, spans, per_seq, blocks.T)
    tiles = tl.cdiv(length, blocks.T)
    m = tl.full([1], float("-inf"), tl.float32)
    l = tl.zeros([1], state.l.dtype.element_ty)
    o = tl.zeros([blocks.DV], state.o.dtype.element_ty)
    for step in range(0, tiles):
        if flags.REVERSE:
            tile = tiles - 1 - step
        else:
            tile = step
        slot = (item0 + tile) * R + r
        tl.store(scanned.o + slot * DV + d, o, mask=d < DV)
        if tl.program_id(2) == 0:
            tl.store(scanned.m + slot + one, m)
            tl.store(scanned.l + slot + one, l)
        m_tile = tl.load(state.m + slot + one)
        m_new = tl.maximum(m, m_tile)
        shift = pivot(m_new)
        old = tl.exp(m - shift)
        new = tl.exp(m_tile - shift)
        l = l * old + tl.load(state.l + slot + one) * new
        o = o * old + tl.load(state.o + slot * DV + d, mask=d < DV, other=0.0) * new
        m = m_new


@triton.jit(do_not_specialize=LENGTHS)
def _location_window_fwd_kernel(
    scores_ptr,  # (B, T, R) or (N, R) float32
    values,  # (B, T, DV) or (N, DV)
    scanned,
    dropout,
    out_ptr,  # (B, T, R, DV) or (N, R, DV)
    exact_ptr,  # the same in float32, or None
    lse_ptr,  # (B, T, R, 2) or (N, R, 2) float32: (m, l)
    spans,
    num_seqs,
    per_seq,
    T,
    DV,
    window,
    flags,
    blocks,
):
    item = tl.program_id(0)
    r = tl.program_id(1)
    R = tl.num_programs(1)
    d = tl.program_id(2) * blocks.DV + tl.arange(0, blocks.DV)
    seq, start, lo, hi, _ = locate(item, spans, T, num_seqs, per_seq, blocks.T)
    _, length = sequence_of(seq, spans, T)
    item0 = first_item(seq, spans, per_seq, blocks.T)
    i = lo + tl.arange(0, blocks.T)
    inside = i < hi
    tile0, tile1, state = band(lo, hi, length, window, flags.SCAN, blocks.T)
    m = tl.full([blocks.T], float("-inf"), tl.float32)
    l = tl.zeros([blocks.T], tl.float32)
    acc = tl.zeros([blocks.T, blocks.DV], tl.float32)
    if flags.SCAN:
        some = lo < hi  # an item past the end has no state
        slot = (item0 + state) * R + r
        m = tl.zeros([blocks.T], tl.float32) + tl.load(scanned.m + slot, mask=some, other=float("-inf"))
        l += tl.load(scanned.l + slot, mask=some, other=0.0).to(tl.float32)
        acc += tl.load(scanned.o + slot * DV + d, mask=some & (d < DV), other=0.0).to(tl.float32)[None, :]
    for tile in range(tile0, tile1):
        j = tile * blocks.T + tl.arange(0, blocks.T)
        rows = (start + j).to(tl.int64)
        s = tl.load(scores_ptr + (seq * T + rows) * R + r, mask=j < length, other=float("-inf"))
        keep = s != float("-inf")
        shown = in_window(window, i[:, None], j[None, :], inside[:, None] & keep[None, :])
        s = tl.where(shown, s[None, :], float("-inf"))
        p, alpha, m, l = online_softmax(s, m, l, 1, flags.FMA)
        if dropout.seed is not None:
            p *= dropout_scale(dropout, j[None, :], seq * R + r, i[:, None])
        x = load_rows(sequence_ptr(values, seq, rows), keep, d, DV)
        if window.HAS_LEFT or window.HAS_RIGHT:
            # 0 * NaN is NaN: a value that is not finite is left out of the product, for those who see it to be NaN.
            finite = tl.abs(x.to(tl.float32)) < float("inf")
            x = tl.where(finite, x, 0.0)
            spoils = tl.max((finite == 0).to(tl.int32), axis=1) != 0
            p = tl.where(shown & spoils[None, :], float("nan"), p)
        acc = add_product(p, x, acc * alpha[:, None], flags.COMPUTE, flags.PRECISION)

    at = (seq * T + start + i) * R + r
    inv = finish(l)
    if tl.program_id(2) == 0:
        store_lse(lse_ptr + at * 2, m, l, inside)
    store_both(out_ptr, exact_ptr, at * DV, acc * inv[:, None], inside, tl.program_id(2) * blocks.DV, DV)


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Rows of a tile, of positions and of keys alike, and width of the values."""

    T: int
    DV: int
    scan: bool  # whether a sequence is long enough for scans
    warps: int = 4
    stages: int = 2


@rule
def window_blocks(chip: Chip, itemsize: int, length: int, DV: int, dropout: bool, packed: bool) -> Blocks:
    """Tiles of all kernels: short sequences without scans, and long ones, so that there are two variants.

    Chosen by the compile report (no spills); speed on a GPU not yet measured.

    float32 has no matrix units: its products are unrolled, over tiles of half the rows. Random words take registers.
    """
    if chip.backend == "interpreter":
        return Blocks(16, pow2(DV, 16, 32), length > 16)
    most = 32 if itemsize == 4 or dropout else 64
    rows = tile_rows(LONG if packed else length, most)
    columns = pow2(DV, 16, 64 if whole_rows(chip, DV) else 32)
    return Blocks(rows, columns, length > rows if packed else rows == most, 8)


class State(NamedTuple):
    """States of tiles, see the top; float64 but for m where the inputs are float32. None without SCAN."""

    m: Tensor | None  # (items, R) float32
    l: Tensor | None  # (items, R)
    o: Tensor | None  # (items, R, DV)


class Flags(NamedTuple):
    """What kernels are compiled for."""

    SCAN: bool
    EXACT: bool
    FMA: bool
    COMPUTE: object
    PRECISION: str
    REVERSE: bool = False


class Call(NamedTuple):
    """What the launches of one call share."""

    items: Items
    hops: int
    blocks: Blocks
    flags: Flags
    registers: dict[str, int]  # a launch option
    args: dict[str, Any]  # the kernels' arguments, by name

    def launch(self, kernel: Any, *grid: int, blocks: Blocks | None = None, **more: object) -> None:
        """Launch with those of the arguments that the kernel has."""
        launch(kernel, grid, self.args | more, blocks or self.blocks, **self.registers)

    def states(self, width: int, like: Tensor) -> State:
        """Room for a state of each tile."""
        kind = {"dtype": torch.float64 if self.flags.EXACT else torch.float32, "device": like.device}
        shape = self.items.count, self.hops
        m = torch.empty(shape, dtype=torch.float32, device=like.device)
        return State(m, torch.empty(shape, **kind), torch.empty(*shape, width, **kind))

    def scan(self, state: State, *, reverse: bool) -> State:
        """The merged states of the tiles before each, or behind it."""
        assert state.o is not None
        width = state.o.shape[-1]
        scanned = self.states(width, state.o)
        grid = self.args["num_seqs"], self.hops, max(1, cdiv(width, self.blocks.DV))
        flags = constants(self.flags._replace(REVERSE=reverse))
        self.launch(_location_window_scan_kernel, *grid, state=state, scanned=scanned, flags=flags)
        return scanned


def prepare(inputs: WindowInputs) -> Call:
    scores, values, cu_seqlens, seed, left, right, dropout_p = inputs
    chip = chip_of(values.device)
    packed, exact = cu_seqlens is not None, values.dtype == torch.float32
    length, DV = values.shape[-2:]
    seqs = cu_seqlens.numel() - 1 if packed else len(scores)
    cu_seqlens = cu_seqlens if cu_seqlens is None else cu_seqlens.contiguous()
    blocks = window_blocks(chip, values.element_size(), length, DV, dropout_p > 0, packed)
    items = partition(seqs, length, blocks.T, cu_seqlens)
    flags = Flags(
        dropout_p == 0 and (left is None or right is None) and blocks.scan,
        exact,
        exact and chip.backend != "interpreter",
        *matmul_flags(chip, values.dtype).values(),
    )
    args = {
        "scores_ptr": scores.contiguous(),
        "values": sequences(unit(values), packed=packed),
        "scanned": State(None, None, None),
        "dropout": dropout(seed, dropout_p),
        "spans": Spans(items.cu),
        "num_seqs": seqs,
        "per_seq": items.per_seq,
        "T": 0 if packed else length,
        "DV": width(DV),
        "window": window(left, right),
        "flags": constants(flags),
    }
    return Call(items, scores.shape[-1], blocks, flags, all_registers(chip), args)


def window_fwd(inputs: WindowInputs, need_exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse) as `fused_attn.reference.windowed_attention` has them; out in float32 too, as in `location_fwd`."""
    scores, values, cu_seqlens, *_ = inputs
    DV = values.shape[-1]
    out = values.new_empty(*scores.shape, DV)
    exact = scores.new_empty(out.shape if need_exact else (0,), dtype=torch.float32)
    lse = new_lse(*scores.shape, device=scores.device)
    if lse.numel() == 0:
        return out, lse, exact
    call = prepare(inputs)
    grid = call.items.count, call.hops, max(1, cdiv(DV, call.blocks.DV))  # lse is there without values
    if call.flags.SCAN:
        terms = values[None] if cu_seqlens is not None else values
        terms = heads(unit(terms)[:, None].expand(-1, call.hops, -1, -1), packed=cu_seqlens is not None)
        state = call.states(DV, scores)
        call.launch(_location_window_totals_kernel, *grid, terms=terms, state=state)
        call.args["scanned"] = call.scan(state, reverse=inputs.left is not None)
    more = {"out_ptr": out, "exact_ptr": exact if need_exact else None, "lse_ptr": lse}
    call.launch(_location_window_fwd_kernel, *grid, **more)
    return out, lse, exact
