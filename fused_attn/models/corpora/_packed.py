"""Rows of different lengths, one after the other in one tensor; words as numbers."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._padded import length_mask

POOL = 50
"""Batches whose examples are sorted by length together: enough to save padding, few enough to stay random."""
OTHER = "*"
"""What stands for a word that has no number of its own, which is number 0."""


class Packed(NamedTuple):
    """Rows of whole numbers."""

    numbers: Tensor  # int32 (N,)
    offsets: Tensor  # int64 (R + 1,): row r is numbers[offsets[r]:offsets[r + 1]]

    @property
    def lengths(self) -> Tensor:
        """int64 ``(R,)``."""
        return self.offsets.diff()

    def row(self, i: int) -> list[int]:
        """One row."""
        numbers: list[int] = self.numbers[self.offsets[i] : self.offsets[i + 1]].tolist()
        return numbers

    def renumbered(self, new: Tensor) -> Packed:
        """With another number for each."""
        return Packed(new[self.numbers], self.offsets)

    def padded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Some rows as int64 ``(B, T)``, zero past the end, and their lengths ``(B,)``."""
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        steps = int(lengths.max()) if len(rows) else 0
        inside = length_mask(lengths, steps)
        result = torch.zeros(inside.shape, dtype=torch.int64)
        result[inside] = self.numbers[(starts[:, None] + torch.arange(steps))[inside]].long()
        return result, lengths

    def joined(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Some rows as int64 ``(M,)``, one after the other, and int32 offsets ``(B + 1,)``."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        ends = lengths.cumsum(0)
        first = self.offsets[rows] - (ends - lengths)  # where a row starts here, less where it starts there
        where = torch.arange(int(lengths.sum())) + first.repeat_interleave(lengths)
        return self.numbers[where].long(), torch.cat([ends.new_zeros(1), ends]).int()


def pack(rows: Iterable[Sequence[int]]) -> Packed:
    """Rows that are made one by one."""
    numbers, ends = array("i"), array("q", [0])
    for row in rows:
        numbers.extend(row)
        ends.append(len(numbers))
    values = torch.frombuffer(numbers, dtype=torch.int32) if numbers else torch.zeros(0, dtype=torch.int32)
    return Packed(values, torch.frombuffer(ends, dtype=torch.int64))


class Words:
    """Numbers of words, from 1. Until it is closed a new word gets the next number; then it is 0, like any other."""

    def __init__(self) -> None:
        self.index: dict[str, int] = {}
        self.open = True

    def __call__(self, words: Iterable[str]) -> list[int]:
        """Number each word."""
        if self.open:
            return [self.index.setdefault(word, len(self.index) + 1) for word in words]
        return [self.index.get(word, 0) for word in words]

    def __len__(self) -> int:
        return len(self.index) + 1

    @property
    def names(self) -> list[str]:
        """By number."""
        return [OTHER, *self.index]

    def keep(self, which: Tensor) -> Tensor:
        """Take no more words, and keep those of bool ``(len,)``: the new number of each that there was, int32."""
        which[0] = False
        new = torch.where(which, which.cumsum(0), 0).int()
        self.index = {word: int(new[old]) for word, old in self.index.items() if which[old]}
        self.open = False
        return new


def words_of(text: str) -> list[str]:
    """Lower-case words and punctuation; contractions as in the Penn Treebank, whose tokens vectors of words have."""
    return re.findall(r"n't|\w+(?=n't)|'\w+|\w+|[^\w\s]", text.lower())


def by_length(lengths: Tensor, size: int, order: torch.Generator) -> Iterator[Tensor]:
    """Batches of rows in random order, whose rows are of about the same length."""
    for pool in torch.randperm(len(lengths), generator=order).split(POOL * size):
        batches = pool[lengths[pool].argsort(stable=True)].split(size)
        for i in torch.randperm(len(batches), generator=order).tolist():
            yield batches[i]
