"""Thin `torch.nn` modules over the functions: they own parameters and nothing else."""

from .concat import ConcatAttention
from .general import GeneralAttention
from .location import LocationAttention

__all__ = ["ConcatAttention", "GeneralAttention", "LocationAttention"]
