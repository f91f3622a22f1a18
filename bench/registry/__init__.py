"""What is measured, said once: each op's cases, inputs, arithmetic and traffic.

Speed, memory, plots and the README's tables all read `REGISTRY`. A family is one file here, and one name in it.
"""

from .concat import CONCAT
from .general import GENERAL
from .graph import GRAPH
from .hierarchical import HIERARCHICAL
from .location import LOCATION
from .problem import MODES, Case, Cost, Inputs, Op, Sizes, count_rows, ragged_lengths, visible_pairs
from .recurrent import RECURRENT
from .statistics import STATISTICS

REGISTRY: list[Op] = [LOCATION, CONCAT, GENERAL, GRAPH, HIERARCHICAL, RECURRENT, STATISTICS]

__all__ = [
    "MODES",
    "REGISTRY",
    "Case",
    "Cost",
    "Inputs",
    "Op",
    "Sizes",
    "count_rows",
    "ragged_lengths",
    "visible_pairs",
]
