"""What `replace_attention` did, module by module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Replaced(NamedTuple):
    """A module that runs this package's op now."""

    name: str
    """As in ``model.named_modules()``; empty for the model itself."""
    peer: type
    """Its class before."""
    ours: type
    """Its class now."""
    cpu: str
    """What runs where its input is on a CPU, and why."""


class Skipped(NamedTuple):
    """A module of a known class, or of a class made of one, that stays what it is."""

    name: str
    """As in ``model.named_modules()``; empty for the model itself."""
    peer: str
    """The name of its class."""
    why: str


@dataclass
class Report:
    """What was replaced and what was not; printed, a table."""

    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def __str__(self) -> str:
        """Two tables, of what was replaced and of what was skipped."""
        if not (self.replaced or self.skipped):
            return "nothing of a known class; `python -m fused_attn.compat --list` shows these"
        parts = [f"replaced: {len(self.replaced)}"]
        if self.replaced:
            rows = [(_shown(row.name), row.peer.__name__, row.ours.__module__, row.cpu) for row in self.replaced]
            parts.append(aligned(("module", "class", "now of", "on a CPU"), rows))
        if self.skipped:
            parts.append(f"skipped: {len(self.skipped)}")
            rows_skipped = [(_shown(row.name), row.peer, row.why) for row in self.skipped]
            parts.append(aligned(("module", "class", "why"), rows_skipped))
        return "\n".join(parts)


def _shown(name: str) -> str:
    return name or "(the model)"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of columns, two spaces apart; the last is as wide as it is."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header) - 1)]
    return "\n".join(
        "  " + "  ".join([*(x.ljust(w) for x, w in zip(line, widths, strict=False)), line[-1]]) for line in lines
    )
