"""Attention that has nothing to learn, which attention is compared with: a mean over all, or over the truth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import ConcatAttention, GeneralAttention, LocationAttention, WordByWordAttention

ATTENTION = (LocationAttention, ConcatAttention, GeneralAttention, WordByWordAttention)


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


def make_oracle(model: nn.Module) -> None:
    """Let a model with uniform weights have its attention fixed on the truth, wherever `on_truth` tells it."""
    freeze_uniform(model)
    model.register_buffer("_oracle", torch.tensor(True), persistent=False)


def is_oracle(model: nn.Module) -> bool:
    """Whether `make_oracle` made it one."""
    return hasattr(model, "_oracle")


@contextmanager
def on_truth(model: nn.Module, attention: nn.Module, truth: Tensor) -> Iterator[None]:
    """In it the attention module of an oracle sees no more than the bool `truth`, beside its own mask.

    Other models it leaves as they are. An example without a truth has to have all True.
    """

    def narrow(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        own = kwargs.get("mask")
        if own is not None and own.dim() < truth.dim():
            own = own[:, None]  # of the keys, whatever the query
        return args, {**kwargs, "mask": truth if own is None else own & truth}

    if not is_oracle(model):
        yield
        return
    handle = attention.register_forward_pre_hook(narrow, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def undecayed(module: nn.Module) -> set[nn.Parameter]:
    """Parameters that weight decay leaves alone: biases, gains, and those of attention.

    Decay draws scores to a constant, which is what attention is compared with.
    """
    scores = {p for part in module.modules() if isinstance(part, ATTENTION) for p in part.parameters()}
    return scores | {p for p in module.parameters() if p.dim() < 2}
