"""The baseline without attention: scores that are all alike."""

from __future__ import annotations

from torch import nn

from ..modules import ConcatAttention, GeneralAttention, LocationAttention, WordByWordAttention


def freeze_uniform(module: nn.Module) -> None:
    """Freeze the scores of all attention modules inside at a constant: a mean over what is visible.

    The parameters stay where they are, so that a seed gives the rest of a model the same initial numbers.
    """
    for part in module.modules():
        if isinstance(part, LocationAttention):
            last: nn.Module = part.proj if part.score is None else part.score
        elif isinstance(part, ConcatAttention | WordByWordAttention):
            last = part.score
        elif isinstance(part, GeneralAttention):
            last = part
        else:
            continue
        for parameter in last.parameters(recurse=False):
            nn.init.zeros_(parameter).requires_grad_(False)
