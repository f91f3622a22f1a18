"""States of softmaxes over some of the keys, and their exact merge: for keys that are split, streamed or apart."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._checks import check_flag
from ._jagged import is_jagged, of_rows, rows_of
from ._softmax import pivot_of, softmax


class State(NamedTuple):
    r"""What an attention over some of the keys leaves for the rest: `return_state=True` gives it, `merge` joins them.

    .. math:: m = \max_j s_j, \quad log\_l = \log \sum_j e^{s_j - m}, \quad out = \sum_j softmax_j(s_j) \, value_j

    float32, or float64 where the inputs are. Of a row that sees no key: zeros, -inf and -inf. The two numbers m and
    log_l are not one, m + log_l, for beside a large m float32 has no room for the other.

    To autograd m is a constant, and log_l has the gradient of both: exact for whatever depends on m + log_l alone, as
    `merge` does.
    """

    out: Tensor
    """``(*rows, Dv)``."""
    m: Tensor
    """``(*rows)``."""
    log_l: Tensor
    """``(*rows)``."""

    @property
    def lse(self) -> Tensor:
        """The logarithm of the sum of the exponentials of all scores, m + log_l; -inf of no key."""
        return self.m + self.log_l


pytree._register_namedtuple(State, serialized_type_name="fused_attn.State")  # for `torch.export.save`


def merge(states: State | Iterable[State], *, stacked: bool = False) -> State:
    r"""Join states of the same queries over disjoint keys: the state over all of these, exactly.

    .. math:: m = \max_p m_p, \quad l = \sum_p e^{m_p - m} l_p, \quad out = \sum_p \frac{e^{m_p - m} l_p}{l} out_p

    It is differentiable, to any order, in all of the states; it does not matter in which order, or in how many steps
    they are joined. States that have seen no key change nothing.

    Parameters
    ----------
    states
        A sequence of one or more of ``(out (*rows, Dv), m (*rows), log_l (*rows))``. 16-bit tensors are computed with
        in float32. Those of jagged queries are jagged, of the same offsets.
    stacked
        Whether `states` is one `State` whose tensors have the parts as first axis, ``(out (P, *rows, Dv),
        m (P, *rows), log_l (P, *rows))``. It is said, for the first axis of a state alone is its batch.

    Returns
    -------
    State
        In float32, float64 where one of the states is. ``.out`` is the output: cast it as you like.

    Raises
    ------
    ValueError, TypeError
        For no states, what are no states, one that is not said to be stacked, and tensors that do not fit together.

    """
    if check_flag("stacked", stacked):
        _check("states", cast("State", states), parts=True)
        out, m, log_l = cast("State", states)
    else:
        if isinstance(states, State):
            raise TypeError(
                "states: expected a sequence of them; got one State, merged already; where its first axis is "
                "of parts pass stacked=True"
            )
        if isinstance(states, Tensor) or not isinstance(states, Iterable):
            raise TypeError(f"states: expected a sequence of them; got {type(states).__name__}")
        parts = list(states)
        if not parts:
            raise ValueError("states: expected one State or more; got none")
        if isinstance(parts[0], tuple) and parts[0] and is_jagged(parts[0][0]):
            return _merge_jagged(parts)
        for i, part in enumerate(parts):
            _check(f"states[{i}]", part, parts=False)
            out, first = part[0], parts[0][0]  # a tuple will do
            if out.shape != first.shape:
                expected = f"out of shape {tuple(first.shape)}, from states[0]"
                raise ValueError(f"states[{i}]: expected {expected}; got {tuple(out.shape)}")
            if out.device != first.device:
                raise ValueError(f"states[{i}]: expected {first.device}, from states[0]; got {out.device}")
        out, m, log_l = (_stacked([part[i] for part in parts]) for i in range(3))
    wide = functools.reduce(torch.promote_types, (out.dtype, m.dtype, log_l.dtype), torch.float32)
    out, m, log_l = out.to(wide), m.to(wide), log_l.to(wide)
    top = m.detach().amax(0)
    x = m - pivot_of(top) + log_l  # the logarithms of the parts' sums, counted from the largest score of all
    total = torch.exp(x).sum(0)
    shares = softmax(x, 0)[0]
    return State((shares[..., None] * out).sum(0), top, log_of(total))


def _merge_jagged(parts: list[State]) -> State:
    """Of jagged queries, whose axes are in one order: the rows of all are packed alike."""
    rows = rows_of("states[0].out", parts[0][0])
    packed = []
    for i, part in enumerate(parts):
        if not isinstance(part, tuple) or len(part) != 3:
            raise _no_state(f"states[{i}]", part)
        given = dict(zip((f"states[{i}].{field}" for field in State._fields), part, strict=True))
        packed.append(State(*(of_rows(name, x, rows, "states[0].out") for name, x in given.items())))
    return cast("State", rows.nest(merge(packed)))


def log_of(total: Tensor) -> Tensor:
    """log l, which is -inf, and has no gradient, where no key was seen."""
    blind = total == 0
    return torch.log(total.masked_fill(blind, 1)).masked_fill(blind, -torch.inf)


def numbers_of(lse: Tensor) -> tuple[Tensor, Tensor]:
    """(m, log_l) of a normaliser ``(*rows, 2)``, see `_softmax.normaliser`."""
    top, total = lse.unbind(-1)
    return top.detach(), log_of(total)


def lse_of(lse: Tensor) -> Tensor:
    """m + log l of a normaliser, in one number: `State.lse`."""
    m, log_l = numbers_of(lse)
    return m + log_l


def _stacked(tensors: list[Tensor]) -> Tensor:
    """Stacked, in the widest of their dtypes."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    return torch.stack([x.to(dtype) for x in tensors])


def _no_state(name: str, given: object) -> TypeError:
    """The error for what is no state, without its numbers."""
    several = isinstance(given, tuple) and given and isinstance(given[0], State)
    hint = ": a call's results, of which the state is the first" if several else ""
    return TypeError(f"{name}: expected a State, (out, m, log_l); got a {type(given).__name__}{hint}")


def _check(name: str, state: State, *, parts: bool) -> None:
    """Check the form of a state; `parts`: whether its tensors have an axis of parts."""
    if not isinstance(state, tuple) or len(state) != 3:
        raise _no_state(name, state)
    for field, x in zip(State._fields, state, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}.{field}: expected a torch.Tensor; got {type(x).__name__}")
        if is_jagged(x):
            raise TypeError(
                f"{name}.{field}: expected a dense tensor, jagged states come in a sequence; got a jagged one"
            )
        if not x.is_floating_point():
            raise TypeError(f"{name}.{field}: expected a floating dtype; got {x.dtype}")
        if x.device != state[0].device:
            raise ValueError(f"{name}.{field}: expected {state[0].device}, from {name}.out; got {x.device}")
    out, *numbers = state
    least = 2 if parts else 1
    if out.dim() < least or (parts and out.shape[0] == 0):
        form = "(P, *rows, Dv) with P >= 1" if parts else "(*rows, Dv)"
        raise ValueError(f"{name}.out: expected shape {form}; got {tuple(out.shape)}")
    for field, x in zip(State._fields[1:], numbers, strict=True):
        rows = tuple(out.shape[:-1])
        if x.shape != rows:
            raise ValueError(f"{name}.{field}: expected shape {rows}, from out; got {tuple(x.shape)}")
