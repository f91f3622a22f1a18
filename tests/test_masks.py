"""Device helpers of kernels/masks.py: where the items of a ragged batch are, and which tiles they walk."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="kernels are in Triton")
import triton.language as tl  # noqa: E402

from fused_attn.kernels.chip import LENGTHS  # noqa: E402
from fused_attn.kernels.masks import Spans, follow, partition, place, sequence_at, window, window_tiles  # noqa: E402


@triton.jit(do_not_specialize=LENGTHS)
def _places_kernel(found_ptr, starts_ptr, spans, T, num_seqs, per_seq, rows, count, STEPS: tl.constexpr):
    """(sequence, lo, hi, items of it) of an item that is searched for, and of the next ones, by a walk."""
    first = tl.load(starts_ptr + tl.program_id(0))
    of = sequence_at(first, spans, num_seqs, per_seq, rows)
    for item in range(first, tl.minimum(first + STEPS, count)):
        if STEPS > 1:
            of = follow(of, item, spans, per_seq, rows)
        seq, _, lo, hi, items = place(item, of, spans, T, per_seq, rows)
        at = found_ptr + item * 4
        tl.store(at, seq.to(tl.int32))
        tl.store(at + 1, lo)
        tl.store(at + 2, hi)
        tl.store(at + 3, items)


def _lengths(seqs: int, kind: str, rows: int) -> list[int]:
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 3 * rows if kind == "long" else 3, (seqs,), generator=random)
    lengths[torch.rand(seqs, generator=random) < 0.3] = 0
    if kind == "one":
        lengths[:] = 0
        lengths[seqs // 2] = 5 * rows
    return lengths.tolist()


@pytest.mark.kernel
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize(("seqs", "kind"), [(1, "long"), (33, "long"), (70, "one"), (1100, "short")])
def test_items_of_ragged_sequences_are_found_by_themselves_and_by_a_walk(seqs, kind, steps, device):
    """Searches of one step, of two and of three. Items cover all rows once, and of an empty sequence there is one."""
    rows, lengths = 4, _lengths(seqs, kind, 4)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    expected = []
    for seq, length in enumerate(lengths):
        start, end = cu[seq : seq + 2].tolist()
        count = end // rows - start // rows + 1
        assert (count - 1) * rows <= length + rows <= (count + 1) * rows, "none is missing, at most one to spare"
        expected += [[seq, rows * part, min(rows * part + rows, length), count] for part in range(count)]
    items = partition(seqs, sum(lengths), rows, cu)
    assert len(expected) == items.count
    starts = torch.arange(0, items.count, max(steps, items.count // 12), dtype=torch.int32, device=device)
    found = torch.zeros(items.count, 4, dtype=torch.int32, device=device)
    args = found, starts, Spans(items.cu), 0, seqs, items.per_seq, rows, items.count
    _places_kernel[(len(starts),)](*args, STEPS=steps)
    of = sorted({i for start in starts.tolist() for i in range(start, min(start + steps, items.count))})
    assert found[of].tolist() == [expected[i] for i in of]


@triton.jit
def _tiles_kernel(found_ptr, window, lo, hi, length, BLOCK: tl.constexpr):
    tile0, tile1 = window_tiles(window, lo, hi, length, BLOCK)
    tl.store(found_ptr, tile1 - tile0)


@pytest.mark.kernel
@pytest.mark.parametrize("sides", [(None, None), (5, None), (None, 5), (40, 40)])
@pytest.mark.parametrize(("lo", "tiles"), [(16, True), (32, False), (48, False)])
def test_an_item_to_spare_walks_no_tile(lo, tiles, sides, device):
    """Its rows begin at the end of the sequence or behind it: 31 keys are there."""
    found = torch.zeros(1, dtype=torch.int32, device=device)
    _tiles_kernel[(1,)](found, window(*sides), lo, min(lo + 16, 31), 31, BLOCK=16)
    assert (found.item() > 0) == tiles
