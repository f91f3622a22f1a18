"""What concat, general and distance attention have alike: a call's checks, its canonical form, its results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor

from ._checks import (
    Argument,
    Checker,
    Table,
    argument,
    check_activation,
    check_both,
    check_dropout,
    check_flag,
    check_packed,
    check_score_bias,
    check_window,
    mask_of,
    offsets_of,
)
from ._dropout import draw_seed
from .kernels.inputs import ConcatInputs, GeneralInputs

P = TypeVar("P", ConcatInputs, GeneralInputs)
Tables = dict[tuple[bool, bool], Table]  # by: packed rows, heads


def pairs_tables(
    query: str, key: str, *, keys_are_values: bool = False, linear: bool = False, **parameters: str
) -> Tables:
    """The tables of a family of queries and keys, whose widths have these names.

    A score's `parameters` have these forms, with heads also one a head; a ``?`` behind says that it may be None.
    keys_are_values: where there are none. linear: the parameters multiply as the transpose of `nn.Linear.weight`.
    """

    def table(packed: bool, heads: bool) -> Table:
        h = "H " if heads else ""
        q, k = ("N ", "M ") if packed else ("B Tq ", "B Tk ")
        at = q.index(" ") + 1  # heads come after the batch, or after packed rows

        def parameter(form: str) -> Argument:
            forms = form.rstrip("?")
            forms = f"{forms} | H {forms}" if heads else forms
            return argument(forms, linear=linear, optional=form.endswith("?"))

        return {
            "query": argument(f"{q}{query} | {q[:at]}H {q[at:]}{query}", "first"),
            "key": argument(f"{k[:at]}{h}{k[at:]}{key}"),
            "value": argument(f"{k[:at]}{h}{k[at:]}Dv", optional=keys_are_values),
            **{name: parameter(form) for name, form in parameters.items()},
            "mask": mask_of("B Tk | B Tq Tk"),
            "score_bias": Argument((), "bias", True, False, ""),
            "cu_seqlens_q": offsets_of("S"),
            "cu_seqlens_k": offsets_of("S"),
            "offsets": offsets_of("any"),
        }

    return {(packed, heads): table(packed, heads) for packed in (False, True) for heads in (False, True)}


def has_heads(given: P) -> bool:
    """Whether the rows of a call are a head each."""
    return given.query.dim() == (4 if given.cu_seqlens_q is None else 3)


def check_pairs(
    tables: Tables,
    given: P,
    parameters: Mapping[str, Tensor | None],
    window: tuple[int | None, int | None] | None,
    return_weights: bool,
) -> tuple[P, bool]:
    """Check a call as its user made it; returns it with the sides of the window, and whether to return weights."""
    query, key = given.query, given.key
    if not isinstance(query, Tensor):
        raise TypeError(f"query: expected a torch.Tensor; got {type(query).__name__}")
    return_weights = check_flag("return_weights", return_weights)
    both = given.cu_seqlens_q, given.cu_seqlens_k
    padded = {"mask": given.mask, "score_bias": given.score_bias, "return_weights": return_weights}
    packed = check_packed(padded, *both)
    check = Checker(tables[packed, has_heads(given)])
    for name, x in {"query": query, "key": key, "value": given.value, **parameters}.items():
        check(name, x)
    check_activation("activation", given.activation)
    p = check_dropout("dropout_p", given.dropout_p)
    if packed:
        offsets = cast("tuple[Tensor, Tensor]", both)
        check_both(check, ("cu_seqlens_q", "cu_seqlens_k"), offsets, (query.shape[0], key.shape[0]))
    check("mask", given.mask)
    check_score_bias(check, given.score_bias, (*given.query.shape[:-1], key.shape[-2]))
    left, right = check_window(window)
    return given._replace(left=left, right=right, dropout_p=p), return_weights


def canonical(given: P) -> P:
    """As the operators take it: heads after the batch, packed rows as one sequence; with a seed for dropout."""
    heads, packed = has_heads(given), given.cu_seqlens_q is not None

    def rows(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x if heads else x.unsqueeze(1)
        return x.transpose(0, 1)[None] if packed else x

    query, key, value, *_ = given
    seed, bias = draw_seed(given.dropout_p, query.device), given.score_bias
    if bias is not None:
        bias = bias.expand(torch.broadcast_shapes(bias.shape, (1,) * (3 + heads)))
        bias = bias if heads else bias[:, None]
    return given._replace(query=rows(query), key=rows(key), value=rows(value), score_bias=bias, seed=seed)


def shaped(given: P, out: Tensor, weights: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """The results, with weights where they are wanted, in the form and the dtype of what the user gave."""
    heads, dtype = has_heads(given), given.key.dtype
    out = out.to(dtype)
    out = out if given.cu_seqlens_q is None else out[0].transpose(0, 1)
    out = out if heads else out.squeeze(1)
    if weights is None:
        return out
    weights = weights.to(dtype)
    return out, weights if heads else weights.squeeze(1)
