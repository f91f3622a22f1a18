"""What the compile report compiles: a family's cases call its launchers on meta tensors."""

from __future__ import annotations

import math
from typing import Any

from .concat import CONCAT
from .drawn import drawn
from .general import GENERAL
from .graph import GRAPH
from .hierarchical import HIERARCHICAL
from .location import LOCATION
from .location_window import WINDOW
from .recurrent import RECURRENT
from .statistics import STATISTICS

CASES: dict[str, list[Any]] = {
    "location": [*LOCATION, *WINDOW],
    "concat": CONCAT,
    "general": GENERAL,
    "graph": GRAPH,
    "hierarchical": HIERARCHICAL,
    "statistics": STATISTICS,
    "recurrent": RECURRENT,
}

# Each kernel in one case, where a chip is not told in full.
BRIEF: dict[str, list[Any]] = {
    "location": [LOCATION[1], LOCATION[9], LOCATION[17], WINDOW[0]],
    "concat": [CONCAT[0], CONCAT[6]],
    "general": GENERAL[3:4],
    "graph": GRAPH[:1],
    "hierarchical": HIERARCHICAL[:1],
    "statistics": [STATISTICS[1], STATISTICS[5]],
    "recurrent": RECURRENT[2:3],
}

__all__ = ["BRIEF", "CASES", "drawn", "elements"]


def elements(kernel: str, constants: dict[str, Any]) -> int:
    """Elements of the score tile that one trip of the inner loop makes: rows by features.

    The loops of the concat family take two features, or two walked rows, a trip; one with `EXACT`.
    """
    if kernel.startswith("_concat"):
        sides = {"dq": ("M", "D"), "dk": ("R", "D")}.get(kernel.split("_")[3], ("M", "N"))
        return (1 if constants.get("EXACT") else 2) * math.prod(constants.get(f"BLOCK_{side}", 1) for side in sides)
    if kernel.startswith("_general"):
        return constants["BLOCK_M"] * constants["BLOCK_N"]
    if kernel.startswith("_graph"):
        if kernel == "_graph_join_kernel":
            return constants["BLOCK_I"] * constants["BLOCK_D"]
        return constants["BLOCK_E"] * constants["BLOCK_H"] * constants.get("BLOCK_A", constants.get("BLOCK_DV", 1))
    if kernel.startswith("_location_window"):
        return constants["BLOCK_T"] ** 2
    if kernel.startswith("_recurrent"):
        return constants["BLOCK_N"] * constants["BLOCK_A"]
    if kernel.startswith("_statistics"):
        return constants.get("BLOCK_T", constants.get("BLOCK_I")) * constants["BLOCK_C"]
    side = "K" if kernel in ("_location_bwd_rows_kernel", "_location_bwd_dw_kernel") else "A"
    return constants.get("BLOCK_T", 1) * constants.get(f"BLOCK_{side}", 1)
