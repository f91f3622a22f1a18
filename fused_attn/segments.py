"""Which packed rows are a sequence, made and checked once, for layers that are called many times with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from ._checks import check_form_of_offsets, check_tensor, check_values, know

_LENGTHS = "a tensor of the number of rows of each sequence"


@dataclass(eq=False)
class Segments:
    """Sequences in packed rows, which are taken wherever `cu_seqlens` or other offsets of rows are.

    Their values are checked when they are made, not at each call. A pytree: compiled and exported programs and `vmap`
    carry it.

    Attributes
    ----------
    offsets
        int32 ``(S + 1,)``: ``0 = offsets[0] <= ... <= offsets[S]``, the number N of packed rows.

    """

    offsets: Tensor

    @classmethod
    def from_offsets(cls, offsets: Tensor) -> Segments:
        """Of int32 offsets ``(S + 1,)``, which are copied: what changes the tensor later does not change these.

        Raises
        ------
        TypeError, ValueError
            For what are no offsets, on a GPU too: their values are read here, once.

        """
        check_form_of_offsets("offsets", offsets)
        numbers = offsets.cpu()
        good = (numbers[0] == 0) & (numbers[1:] >= numbers[:-1]).all()
        check_values("offsets", numbers, good, "non-decreasing offsets from 0", offsets_into="packed rows")
        rows = int(numbers[-1])
        with torch.inference_mode(False):
            return cls(know(offsets.clone(), "offsets", rows))

    @classmethod
    def from_lengths(cls, lengths: Tensor) -> Segments:
        """Of the lengths ``(S,)`` of the sequences, int32 or int64.

        Raises
        ------
        TypeError, ValueError
            For what are no lengths.

        """
        check_tensor("lengths", lengths, shapes=[("(S,)", (None,))], dtypes=[torch.int32, torch.int64], hint=_LENGTHS)
        if bool((lengths < 0).any()):
            raise ValueError(f"lengths: expected lengths of at least 0; got {lengths.tolist()}")
        total = lengths.long().cumsum(0)
        if total.numel() and int(total[-1]) >= 2**31:
            raise ValueError(f"lengths: expected fewer than 2**31 rows; got {int(total[-1])}")
        return cls.from_offsets(torch.cat([total.new_zeros(1), total]).int())

    @classmethod
    def from_jagged(cls, x: Tensor) -> Segments:
        """Of the rows of a nested tensor of ``layout=torch.jagged``; they are its ``values()``.

        Raises
        ------
        TypeError
            For another tensor.

        """
        if not (isinstance(x, Tensor) and x.is_nested and x.layout == torch.jagged):
            came = f"layout {x.layout}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x: expected a nested tensor of layout=torch.jagged; got {came}")
        return cls.from_offsets(x.offsets().int())  # type: ignore[attr-defined]

    @classmethod
    def of_pairs(cls, queries: Offsets, keys: Offsets) -> Segments:
        """Of what attention over packed rows returns a number a pair: each query has the keys of its sequence.

        Sequence i of these are the numbers of query i, in the order of the keys; so ``pad`` of packed weights gives
        one row a query.

        queries, keys: offsets ``(S + 1,)`` as `cu_seqlens_q` and `cu_seqlens_k`.

        Raises
        ------
        TypeError, ValueError
            For what are no offsets, or of other numbers of sequences.

        """
        both = [x if isinstance(x, Segments) else cls.from_offsets(x) for x in (queries, keys)]
        if len(both[0]) != len(both[1]):
            raise ValueError(f"keys: expected as many sequences as queries has, {len(both[0])}; got {len(both[1])}")
        return cls.from_lengths(torch.repeat_interleave(both[1].lengths, both[0].lengths))

    def to(self, device: torch.device | str) -> Segments:
        """On another device."""
        with torch.inference_mode(False):
            moved = self.offsets.to(device)
        return Segments(moved if moved is self.offsets else know(moved, "offsets", int(self.offsets[-1])))

    def __len__(self) -> int:
        """Number S of sequences."""
        return self.offsets.numel() - 1

    @property
    def lengths(self) -> Tensor:
        """int32 ``(S,)``."""
        return self.offsets.diff()

    @property
    def longest(self) -> int:
        """The length of the longest sequence; it is read from the device."""
        return int(self.lengths.max()) if len(self) else 0

    def pad(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Packed rows ``(N, ...)`` as a batch ``(S, longest, ...)`` with zeros, and its mask ``(S, longest)``.

        Raises
        ------
        ValueError
            For another number of rows.

        """
        count = int(self.offsets[-1])
        if rows.shape[0] != count:
            raise ValueError(f"rows: expected {count} rows, those of the offsets; got {rows.shape[0]}")
        mask = torch.arange(self.longest, device=rows.device) < self.lengths[:, None]
        out = rows.new_zeros(*mask.shape, *rows.shape[1:])
        return out.masked_scatter(mask.view(*mask.shape, *[1] * (rows.dim() - 1)), rows), mask


torch.export.register_dataclass(Segments, serialized_type_name="fused_attn.Segments")

Offsets = Tensor | Segments
"""Where sequences begin in packed rows."""


@overload
def as_offsets(x: Offsets) -> Tensor: ...
@overload
def as_offsets(x: Offsets | None) -> Tensor | None: ...
def as_offsets(x: Offsets | None) -> Tensor | None:
    """The offsets themselves."""
    return x.offsets if isinstance(x, Segments) else x
