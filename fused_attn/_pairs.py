"""What concat, general and distance attention have alike: a call's checks, its canonical form, its results."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ._checks import (
    TRUE_IS_VISIBLE,
    Argument,
    Checker,
    Table,
    argument,
    check_activation,
    check_both,
    check_dropout,
    check_mask,
    check_one_side,
    check_pair_count,
    check_score_bias,
    check_window,
    offsets_of,
)
from ._dropout import draw_seed
from ._one_side import both_packed
from ._ops import weights_from
from ._results import Wanted, returned, stand_in
from .kernels.inputs import ConcatInputs, GeneralInputs, pair_starts
from .reference import segment_ids

P = TypeVar("P", ConcatInputs, GeneralInputs)
BOTH = ("cu_seqlens_q", "cu_seqlens_k")
OF_QUERIES = "cu_seqlens_q, and one query a sequence is query[:, None]"  # for queries of too few axes
Tables = dict[tuple[bool, bool, bool], Table]  # by: packed queries, packed keys, heads


def pairs_tables(
    query: str,
    key: str,
    *,
    keys_are_values: bool = False,
    shared: bool = False,
    linear: bool = False,
    **parameters: str,
) -> Tables:
    """The tables of a family of queries and keys, whose widths have these names.

    A score's `parameters` have these forms, with heads also one a head; a ``?`` behind says that it may be None.
    keys_are_values: where there are none. shared: padded keys and values may have one head for all. linear: the
    parameters multiply as the transpose of `nn.Linear.weight`.
    """

    def table(packed_q: bool, packed_k: bool, heads: bool) -> Table:
        h = "H " if heads else ""
        q, k = "N " if packed_q else "B Tq ", "M " if packed_k else "B Tk "
        at, k_at = q.index(" ") + 1, k.index(" ") + 1  # heads come after the batch, or after packed rows
        sequences = "S" if packed_q and packed_k else "B"

        def parameter(form: str) -> Argument:
            forms = form.rstrip("?")
            forms = f"{forms} | H {forms}" if heads else forms
            return argument(forms, linear=linear, optional=form.endswith("?"))

        def of_keys(width: str) -> str:
            one = f" | {k[:k_at]}1 {k[k_at:]}{width}" if shared and heads and not packed_k else ""
            return f"{k[:k_at]}{h}{k[k_at:]}{width}{one}"

        def of_pairs(first: str, kind: str, hint: str = "") -> Argument:
            """A number a pair: of packed rows in these forms, else as broadcasting has it."""
            if not (packed_q or packed_k):
                return Argument((), kind, True, False, TRUE_IS_VISIBLE if kind == "bool" else "")
            forms = f"{first} | P 1{' | P H' if heads else ''}"
            return argument(forms, kind, optional=True, hint=hint, empty=True)

        return {
            "query": argument(
                f"{q}{query} | {q[:at]}H {q[at:]}{query}", "first", offsets="" if packed_q else OF_QUERIES
            ),
            "key": argument(of_keys(key), offsets="" if packed_k else BOTH[1]),
            "value": argument(of_keys("Dv"), optional=keys_are_values),
            **{name: parameter(form) for name, form in parameters.items()},
            "mask": of_pairs(k, "bool", f"{TRUE_IS_VISIBLE}; one of pairs has two axes"),
            "score_bias": of_pairs("P", "bias"),
            "cu_seqlens_q": offsets_of(sequences),
            "cu_seqlens_k": offsets_of(sequences),
            "offsets": offsets_of("any"),
        }

    yes_or_no = (False, True)
    return {form: table(*form) for form in itertools.product(yes_or_no, yes_or_no, yes_or_no)}


def has_heads(given: P) -> bool:
    """Whether the rows of a call are a head each."""
    return given.query.dim() == (4 if given.cu_seqlens_q is None else 3)


def check_pairs(
    tables: Tables,
    given: P,
    parameters: Mapping[str, Tensor | None],
    window: tuple[int | None, int | None] | None,
    wanted: Wanted,
) -> P:
    """Check a call as its user made it; returns it with the sides of the window."""
    query, key = given.query, given.key
    if not isinstance(query, Tensor):
        raise TypeError(f"query: expected a torch.Tensor; got {type(query).__name__}")
    offsets = {"cu_seqlens_q": (given.cu_seqlens_q, query), "cu_seqlens_k": (given.cu_seqlens_k, key)}
    packed = [cu is not None for cu, _ in offsets.values()]
    check = Checker(tables[packed[0], packed[1], has_heads(given)])
    for name, x in {"query": query, "key": key, "value": given.value, **parameters}.items():
        if name != "value" or wanted.output:
            check(name, x)
    check_activation("activation", given.activation)
    p = check_dropout("dropout_p", given.dropout_p)
    if all(packed):
        check_both(check, BOTH, cast("Any", tuple(cu for cu, _ in offsets.values())), (query.shape[0], key.shape[0]))
    elif any(packed):
        [(name, cu, rows)] = [(name, cu, rows) for name, (cu, rows) in offsets.items() if cu is not None]
        check_one_side(check, name, cu, rows.shape[0])
    check("mask", given.mask)
    if any(packed):
        check("score_bias", given.score_bias)
        for name in ("mask",) * _mask_is_of_pairs(given) + ("score_bias",) * (given.score_bias is not None):
            check_pair_count(name, getattr(given, name).shape[0], pair_starts(given)[-1])
    else:
        scores: Any = (*given.query.shape[:-1], key.shape[-2])
        check_mask(check, given.mask, scores if len(scores) == 4 else (*scores[:-2], 1, *scores[-2:]))
        check_score_bias(check, given.score_bias, scores)
    left, right = check_window(window)
    checked = given._replace(left=left, right=right, dropout_p=p)
    return checked if wanted.output else checked._replace(value=stand_in(key))


def canonical(given: P) -> P:
    """As the operators take it: heads after the batch, packed rows as one sequence; with a seed for dropout."""
    heads = has_heads(given)
    packed_q, packed_k = given.cu_seqlens_q is not None, given.cu_seqlens_k is not None

    def rows(x: Tensor | None, packed: bool) -> Tensor | None:
        if x is None:
            return None
        x = x if heads else x.unsqueeze(1)
        return x.transpose(0, 1)[None] if packed else x

    query, key, value, *_ = given
    seed, bias = draw_seed(given.dropout_p, query.device), given.score_bias
    if bias is not None and given.packed:
        bias = _of_heads(bias)
    elif bias is not None:
        bias = bias.expand(torch.broadcast_shapes(bias.shape, (1,) * (3 + heads)))
        bias = bias if heads else bias[:, None]
    query, key, value = rows(query, packed_q), rows(key, packed_k), rows(value, packed_k)
    made = given._replace(query=query, key=key, value=value, score_bias=bias, seed=seed)
    if given.mask is None:
        return made
    of_pairs = _mask_is_of_pairs(given)
    return made._replace(mask=_of_heads(given.mask) if of_pairs else _of_keys_or_pairs(given.mask, made.key.shape[0]))


def _mask_is_of_pairs(given: P) -> bool:
    """Whether a mask of packed rows is of pairs: of two axes, and not ``(B, Tk)`` where keys are padded."""
    mask, key = given.mask, given.key
    if mask is None or mask.dim() != 2 or not given.packed:
        return False
    return given.cu_seqlens_k is not None or tuple(mask.shape) != (key.shape[0], key.shape[-2])


def _of_heads(pairs: Tensor) -> Tensor:
    """A number a pair of packed rows, ``(P,)`` or ``(P, H)``, as ``(1, H, P)``; H may be 1."""
    return (pairs if pairs.dim() == 2 else pairs[:, None]).mT[None]


def of_all_heads(inputs: P) -> P:
    """Keys and values of one head given to all."""
    heads = inputs.query.shape[1]

    def every(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape[1] == heads else x.expand(-1, heads, -1, -1)

    return inputs._replace(key=every(inputs.key), value=every(inputs.value))


def _of_keys_or_pairs(mask: Tensor, batch: int) -> Tensor:
    """A mask as a view ``(B, Tk)`` where all queries of a sequence see the same, else broadcastable to the scores.

    Of two axes the first is the batch, or 1. Of one the keys are packed.
    """
    if mask.dim() == 1:
        return mask[None]
    if mask.dim() == 2:
        return mask.expand(batch, -1)
    mask = mask[:, None] if mask.dim() == 3 else mask
    return mask[:, 0, 0].expand(batch, -1) if mask.shape[1] == 1 and mask.shape[2] == 1 else mask


def count_pairs(inputs: P, wanted: Wanted) -> int:
    """How many scores of packed rows are to be returned, which is read from the device; else 0."""
    return int(pair_starts(inputs)[-1]) if inputs.packed and wanted.pairs else 0


def _keys_of_queries(given: P) -> Tensor:
    """Of packed rows: where the keys of each query begin among the pairs, int64, one more than there are queries."""
    rows = both_packed(given) if given.one_sided else given
    assert rows.cu_seqlens_q is not None
    assert rows.cu_seqlens_k is not None
    segment = segment_ids(rows.cu_seqlens_q, rows.query.shape[2])
    return torch.nn.functional.pad(rows.cu_seqlens_k.diff().long()[segment].cumsum(0), (1, 0))


def shaped(
    given: P,
    wanted: Wanted,
    out: Tensor,
    lse: Tensor | None = None,
    scores: Tensor | None = None,
    weights: Tensor | None = None,
) -> Any:
    """The results, in the form and, but for scores and a state, the dtype of what the user gave."""
    heads, packed = has_heads(given), given.cu_seqlens_q is not None

    def rows(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x[0].transpose(0, 1) if packed else x
        return x if heads else x.squeeze(1)

    def pairs(x: Tensor | None) -> Tensor | None:
        """Of packed rows heads come last."""
        return rows(x) if x is None or not given.packed else x.mT if heads else x[0]

    def of_pairs(log: bool) -> Tensor:
        assert scores is not None
        assert lse is not None
        if not given.packed:
            return weights_from(scores, lse[..., None, :], dim=-1, log=log)
        offsets = _keys_of_queries(canonical(given._replace(dropout_p=0.0)))
        of_rows = lse.transpose(1, 2).flatten(0, 1)  # (queries, H, 2)
        return weights_from(scores.mT, of_rows, offsets=offsets, log=log).mT

    if wanted.weights and weights is None:
        weights = of_pairs(False)
    log_weights = of_pairs(True) if wanted.log_weights else None
    return returned(
        wanted,
        given.key.dtype,
        cast("Tensor", rows(out)),
        rows(lse) if wanted.normaliser else None,
        pairs(weights) if wanted.weights else None,
        pairs(scores) if wanted.scores else None,
        pairs(log_weights),
    )
