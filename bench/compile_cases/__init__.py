"""What the compile report compiles: a family's cases call its launchers on meta tensors."""

from __future__ import annotations

import math
from typing import Any

from .concat import CONCAT
from .general import GENERAL
from .location import LOCATION
from .location_window import WINDOW

CASES: dict[str, list[Any]] = {"location": [*LOCATION, *WINDOW], "concat": CONCAT, "general": GENERAL}


def elements(kernel: str, constants: dict[str, Any]) -> int:
    """Elements of the score tile that one trip of the inner loop makes: rows by features.

    The loops of the concat family take two features, or two walked rows, a trip; one with `EXACT`.
    """
    if kernel.startswith("_concat"):
        sides = {"dq": ("M", "D"), "dk": ("R", "D")}.get(kernel.split("_")[3], ("M", "N"))
        return (1 if constants.get("EXACT") else 2) * math.prod(constants.get(f"BLOCK_{side}", 1) for side in sides)
    if kernel.startswith("_general"):
        return constants["BLOCK_M"] * constants["BLOCK_N"]
    if kernel.startswith("_location_window"):
        return constants["BLOCK"] ** 2
    return constants.get("BLOCK_T", 1) * constants.get("BLOCK_A", constants.get("BLOCK_K", 1))
