"""What a call returns: its output, and after it what more the caller asks for, in one order for all families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ._checks import check_flag
from ._operators import exact_of
from .states import State, lse_of, numbers_of

Inputs = TypeVar("Inputs", bound=tuple[Any, ...])


class Wanted(NamedTuple):
    """What is to be returned beside the output, or with a state in place of it, or without it."""

    weights: bool = False
    scores: bool = False
    lse: bool = False
    state: bool = False
    log_weights: bool = False
    output: bool = True

    @property
    def pairs(self) -> bool:
        """Whether a number a score is."""
        return self.weights or self.log_weights or self.scores

    @property
    def normaliser(self) -> bool:
        """Whether what the normaliser tells is."""
        return self.lse or self.state

    def output_of(self, out: Tensor, exact: Tensor) -> Tensor:
        """The output of an operator that leaves it in float32 too, which a state is in."""
        return exact_of(out, exact) if self.state else out


PLAIN = Wanted()


def check_wanted(*flags: Any, value: Any = None) -> Wanted:
    """The flags of `Wanted` in its order, or the first of them, checked, and whether `value` is False."""
    pairs = zip(Wanted._fields, flags, strict=False)
    wanted = Wanted(*[check_flag(f"return_{name}", x) for name, x in pairs])
    if value is not False:
        return wanted
    if wanted.state:
        raise ValueError("return_state: expected False with value=False, a state has an output; got True")
    if wanted == PLAIN:
        more = "return_weights, return_log_weights, return_scores or return_lse"
        raise ValueError(f"value: expected False only with {more}, there is nothing else to return; got False")
    return wanted._replace(output=False)


def stand_in(key: Tensor) -> Tensor:
    """Values for ``value=False``: nobody reads their sum, so they are few, there already, and ask for no gradient."""
    return key.detach()[..., :16]


def returned(
    wanted: Wanted,
    dtype: torch.dtype,
    out: Tensor,
    lse: Tensor | None,
    weights: Tensor | None,
    scores: Tensor | None,
    log_weights: Tensor | None = None,
) -> Any:
    """The output, or its state, alone; or a tuple of it and what is wanted beside it. None: what nobody wants.

    lse: (m, l), ``(*rows, 2)`` of an output ``(*rows, Dv)``. dtype: of the output and the weights.
    """
    first: Any
    if wanted.state:
        assert lse is not None
        first = State(out.to(lse.dtype), *numbers_of(lse))
    else:
        first = out.to(dtype)
    results = [first] if wanted.output else []
    results += beside(wanted, dtype, lse, weights, scores, log_weights)
    return tuple(results) if len(results) > 1 else results[0]


def beside(
    wanted: Wanted,
    dtype: torch.dtype,
    lse: Tensor | None,
    weights: Tensor | None,
    scores: Tensor | None,
    log_weights: Tensor | None = None,
) -> list[Tensor]:
    """What is wanted beside the output, in the order that all families have."""
    results = []
    if wanted.weights:
        assert weights is not None
        results.append(weights.to(dtype))
    if wanted.log_weights:
        assert log_weights is not None
        results.append(log_weights)
    if wanted.scores:
        assert scores is not None
        results.append(scores)
    if wanted.lse:
        assert lse is not None
        results.append(lse_of(lse))
    return results


def by_formula(
    formula: Callable[..., tuple[Tensor, ...]], inputs: Inputs, wanted: Wanted, **options: Any
) -> tuple[Any, ...]:
    """(out, lse, scores, weights) by a formula, the textbook in plain PyTorch; None for what nobody wants.

    For a state all is in float32. Weights alone come of the formula: see `reference._attend`.
    """
    if not (wanted.log_weights or wanted.scores or wanted.normaliser):
        out, weights = formula(inputs, weights_only=True, **options)
        return out, None, None, weights
    if wanted.state:
        inputs, options = widened(inputs), {name: widened((x,))[0] for name, x in options.items()}
    out, lse, scores = formula(inputs, **options)
    return out, lse, scores, None


def widened(inputs: Inputs) -> Inputs:
    """Inputs with their 16-bit tensors in float32."""
    made = (
        x.to(torch.promote_types(x.dtype, torch.float32)) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs
    )
    return type(inputs)(*made) if hasattr(inputs, "_fields") else type(inputs)(made)
