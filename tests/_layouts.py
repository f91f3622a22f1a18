"""The same numbers laid out in every way that a caller may have them, for the tables of layouts."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def sliced(x: Tensor) -> Tensor:
    """Every other element along each axis of a larger tensor, from the second on."""
    memory = torch.full([2 * n + 1 for n in x.shape], True if x.dtype == torch.bool else 77, dtype=x.dtype)
    view = memory.to(x.device)[tuple(slice(1, 2 * n + 1, 2) for n in x.shape)]
    return view.copy_(x)


def embedded(x: Tensor) -> Tensor:
    """A block inside a larger tensor, as one of several projections in one matrix has it: the last axis is dense."""
    memory = torch.full([n + 3 for n in x.shape], True if x.dtype == torch.bool else 77, dtype=x.dtype)
    view = memory.to(x.device)[tuple(slice(1, n + 1) for n in x.shape)]
    return view.copy_(x)


def transposed(x: Tensor) -> Tensor:
    """The last two axes swapped in memory."""
    return x.mT.contiguous().mT if x.dim() > 1 else x


def reversed_axes(x: Tensor) -> Tensor:
    """All axes in the opposite order in memory."""
    axes = tuple(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


def expanded(x: Tensor) -> Tensor:
    """Stride 0 along the first axis."""
    return x[:1].expand_as(x)


def expanded_last(x: Tensor) -> Tensor:
    """Stride 0 along the last axis."""
    return x[..., :1].expand_as(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (sliced, embedded, transposed, reversed_axes, expanded, expanded_last)
}


def laid_out(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """All tensors in one layout; offsets of packed rows, which cannot be all alike, sliced where that would be so."""
    return {
        name: sliced(x) if name.startswith("cu_seqlens") and layout.startswith("expanded") else LAYOUTS[layout](x)
        for name, x in tensors.items()
    }
