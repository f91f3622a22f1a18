"""What chips can do, from chips.toml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomllib


@dataclass(frozen=True)
class Chip:
    """One chip, in the units of chips.toml."""

    name: str
    sms: int
    ghz: float
    matrix: float
    tf32: float
    sync_share: float
    fma: int
    dram: float
    l2: int
    l2_mib: int
    latency: int
    shared_kib: int
    threads: int
    programs: int
    launch_us: float
    dram_share: float
    issue: int
    shared: int
    sfu: int
    barrier: int

    @property
    def dram_bytes(self) -> float:
        """A second, as a copy gets them."""
        return 1e12 * self.dram * self.dram_share

    @property
    def fma_flops(self) -> float:
        """A second, in float32."""
        return 2e9 * self.fma * self.sms * self.ghz

    def ms(self, clocks: float) -> float:
        """Time of clocks."""
        return clocks / (1e6 * self.ghz)

    def clocks(self, seconds: float) -> float:
        """Clocks of a time."""
        return 1e9 * self.ghz * seconds


_GIVEN: dict[str, Any] = tomllib.loads((Path(__file__).parent / "chips.toml").read_text())
_SHARED = {k: v for k, v in _GIVEN.items() if not isinstance(v, dict)}
CHIPS = {k: Chip(**_SHARED, **v) for k, v in _GIVEN.items() if isinstance(v, dict)}
