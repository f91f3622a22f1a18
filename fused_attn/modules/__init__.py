"""Thin `torch.nn` modules over the functions: they own parameters and nothing else."""

from .concat import ConcatAttention
from .distance import DistanceAttention
from .general import GeneralAttention
from .graph import GraphAttention
from .hierarchical import HierarchicalAttention, RaggedRNN
from .location import LocationAttention
from .recurrent import LocationAwareAttention, WordByWordAttention
from .statistics import StatisticsPooling
from .target import TargetAttention

__all__ = [
    "ConcatAttention",
    "DistanceAttention",
    "GeneralAttention",
    "GraphAttention",
    "HierarchicalAttention",
    "LocationAttention",
    "LocationAwareAttention",
    "RaggedRNN",
    "StatisticsPooling",
    "TargetAttention",
    "WordByWordAttention",
]
