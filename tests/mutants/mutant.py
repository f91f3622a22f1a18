"""One way in which the package could be wrong, and the tests that have to see it."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One change of one file."""

    path: str
    old: str  # stands once in the file
    new: str
    tests: tuple[str, ...]  # arguments of pytest
    why: str
    at: int | None = None  # byte at which `old` is meant, where it need not stand once

    def applied_to(self, source: str) -> str:
        """The source with the change."""
        if self.at is None:
            return source.replace(self.old, self.new)
        raw, old = source.encode(), self.old.encode()
        assert raw[self.at : self.at + len(old)] == old
        return (raw[: self.at] + self.new.encode() + raw[self.at + len(old) :]).decode()
