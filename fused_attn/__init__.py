"""Fused Triton kernels for the classical attention families, with PyTorch references."""

from .concat import concat_attention
from .distance import distance_attention
from .general import general_attention
from .graph import Graph, add_self_loops, csr_from_edges, graph_attention, transpose_csr
from .hierarchical import HierarchicalOutput, Score, hierarchical_attention
from .location import location_attention
from .location_aware import location_aware_attention, location_aware_sequence
from .modules import (
    ConcatAttention,
    DistanceAttention,
    GeneralAttention,
    GraphAttention,
    HierarchicalAttention,
    LocationAttention,
    LocationAwareAttention,
    RaggedRNN,
    StatisticsPooling,
    TargetAttention,
    WordByWordAttention,
)
from .recurrent import word_by_word_attention
from .segments import Segments
from .states import State, merge
from .statistics import statistics_pooling
from .target import target_attention

__version__ = "0.1.0"

__all__ = [
    "ConcatAttention",
    "DistanceAttention",
    "GeneralAttention",
    "Graph",
    "GraphAttention",
    "HierarchicalAttention",
    "HierarchicalOutput",
    "LocationAttention",
    "LocationAwareAttention",
    "RaggedRNN",
    "Score",
    "Segments",
    "State",
    "StatisticsPooling",
    "TargetAttention",
    "WordByWordAttention",
    "__version__",
    "add_self_loops",
    "concat_attention",
    "csr_from_edges",
    "distance_attention",
    "general_attention",
    "graph_attention",
    "hierarchical_attention",
    "location_attention",
    "location_aware_attention",
    "location_aware_sequence",
    "merge",
    "statistics_pooling",
    "target_attention",
    "transpose_csr",
    "word_by_word_attention",
]
