"""Fused Triton kernels for the classical attention families, with PyTorch references."""

from .location import location_attention
from .modules import LocationAttention

__all__ = ["LocationAttention", "location_attention"]
