"""Fused Triton kernels for the classical attention families, with PyTorch references."""

from .concat import concat_attention
from .location import location_attention
from .modules import ConcatAttention, LocationAttention

__all__ = ["ConcatAttention", "LocationAttention", "concat_attention", "location_attention"]
