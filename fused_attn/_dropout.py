"""Which weights dropout keeps: words of Philox that every implementation draws alike."""

from __future__ import annotations

import torch
from torch import Tensor

_U32 = 0xFFFFFFFF


def draw_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """A seed ``(1,)`` for a call, from PyTorch's generator of the device; None where nothing is dropped."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device) if dropout_p > 0 else None


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, ...]:
    """The four words of Philox-4x32-10 (Salmon et al., SC 2011) for the counter (c0, c1, c2, 0), as int64."""
    key0, key1 = seed & _U32, (seed >> 32) & _U32
    x0, x1, x2 = torch.broadcast_tensors(c0, c1, c2)
    x3 = torch.zeros_like(x0)
    for _ in range(10):
        # The product of two 32-bit words fills 64 bits: int64 wraps, and its bits are still right.
        a, b = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = ((b >> 32) & _U32) ^ x1 ^ key0, b & _U32, ((a >> 32) & _U32) ^ x3 ^ key1, a & _U32
        key0, key1 = (key0 + 0x9E3779B9) & _U32, (key1 + 0xBB67AE85) & _U32
    return x0, x1, x2, x3


def dropout_threshold(dropout_p: float) -> int:
    """A weight is dropped iff the upper 24 bits of its random word are under this number."""
    return round(dropout_p * 2**24)


def dropout_scale(seed: Tensor, position: Tensor, segment: Tensor, hop: Tensor, dropout_p: float) -> Tensor:
    """Factor on each softmax weight: 0 where it is dropped, ``1 / (1 - dropout_p)`` where it is kept.

    The random word is a function of the seed and of (position in the sequence, sequence, hop) alone, so a
    kernel makes the same mask again in its backward, and padded and ragged forms of a batch drop alike. The four
    words that Philox gives are those of four weights, whose positions and hops differ in bit 3: a thread has all of
    them in the layout of a matrix unit.
    """
    far, other = (position & 8) != 0, (hop & 8) != 0
    words = _philox(seed, position & ~8, segment, hop & ~8)
    word = torch.where(other, torch.where(far, words[3], words[2]), torch.where(far, words[1], words[0]))
    keep = (word >> 8) >= dropout_threshold(dropout_p)
    return keep.to(torch.float64) / (1.0 - dropout_p)
