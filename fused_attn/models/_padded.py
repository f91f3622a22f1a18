"""Padded batches of sequences: checks, masks, and PyTorch's recurrent encoders over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .._checks import check_tensor


def check_lengths(name: str, lengths: Tensor, shape: tuple[int, ...], steps: int) -> None:
    """Raise unless `lengths` are whole numbers of the given shape, from 0 to `steps`; a GPU's are not looked at."""
    dtypes = (torch.int32, torch.int64)
    check_tensor(name, lengths, shapes=[("lengths of the padded sequences", shape)], dtypes=dtypes)
    if lengths.device.type == "cpu" and not ((lengths >= 0) & (lengths <= steps)).all():
        raise ValueError(f"{name}: expected numbers from 0 to {steps}; got {lengths.tolist()}")


def check_indices(name: str, x: Tensor, words: str, shape: tuple[int | None, ...]) -> None:
    """Raise unless `x` are whole numbers of that shape."""
    check_tensor(name, x, shapes=[(words, shape)], dtypes=(torch.int32, torch.int64))


def check_sizes(arguments: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError for an argument of these names that is under 1; None is one that is not there."""
    for name in names:
        if arguments[name] is not None and arguments[name] < 1:
            raise ValueError(f"{name}: expected at least 1; got {arguments[name]}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {value!r}")


def length_mask(lengths: Tensor, steps: int) -> Tensor:
    """Bool ``(*lengths.shape, steps)``: True before the end."""
    return torch.arange(steps, device=lengths.device) < lengths[..., None]


def encode(rnn: nn.GRU | nn.LSTM, x: Tensor, lengths: Tensor) -> Tensor:
    """States ``(B, T, H)`` of the padded ``x (B, T, D)``, zero past the end, which is not seen: it may be NaN.

    `rnn` has ``batch_first=True``. A sequence may be empty, and so may the batch.
    """
    past = ~length_mask(lengths, x.shape[1])[..., None]
    x = x.masked_fill(past, 0)
    if x.numel() == 0:
        width = rnn.hidden_size * (2 if rnn.bidirectional else 1)
        return x.new_zeros(*x.shape[:2], width)
    if not rnn.bidirectional:  # what comes after the end changes nothing before it
        states: Tensor = rnn(x)[0]
    else:
        ends = lengths.clamp(min=1).cpu()  # an empty sequence reads one zero, whose state is zeroed below
        packed = pack_padded_sequence(x, ends, batch_first=True, enforce_sorted=False)
        states = pad_packed_sequence(rnn(packed)[0], batch_first=True, total_length=x.shape[1])[0]
    return states.masked_fill(past, 0)
