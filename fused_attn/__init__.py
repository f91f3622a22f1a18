"""Fused Triton kernels for the classical attention families, with PyTorch references."""

from .concat import concat_attention
from .general import general_attention
from .location import location_attention
from .modules import ConcatAttention, GeneralAttention, LocationAttention

__all__ = [
    "ConcatAttention",
    "GeneralAttention",
    "LocationAttention",
    "concat_attention",
    "general_attention",
    "location_attention",
]
