"""What the dropout of every family has to be, for weights that are read off the output."""

import torch
from _compare import Operator
from torch import Tensor


def assert_dropped_at_the_rate(dropped: Tensor) -> None:
    """Of uniform weights a share of 0.3 is dropped, and the others are scaled."""
    kept = dropped != 0
    spread = (0.3 * 0.7 / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - 0.7) < 4 * spread
    torch.testing.assert_close(dropped[kept] * dropped.shape[-1], torch.full_like(dropped[kept], 1 / 0.7))


def assert_draws_nothing(op: Operator, impl: str, tensors: dict[str, Tensor], device: torch.device) -> None:
    """The generator of random numbers is after the call where it was."""
    state_of = torch.get_rng_state if device.type == "cpu" else torch.cuda.get_rng_state
    state = state_of()
    op(impl=impl, **tensors)
    assert torch.equal(state, state_of())
