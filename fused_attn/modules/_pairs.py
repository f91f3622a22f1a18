"""What the modules share that attend from queries to keys: heads, and the forward of those that take packed rows."""

from __future__ import annotations

import itertools
from typing import Any, Literal, cast

from torch import Tensor, nn

from .._checks import Checker, Table, argument, check_dropout, module_checker, weight_of, width_of
from .._habits import explicit
from .._jagged import jagged_pairs
from .._ops import Impl
from .._pairs import BOTH, OF_QUERIES
from ..segments import Offsets
from ._layers import Attention, counts, project

FORMS = tuple(itertools.product((False, True), (False, True)))  # of calls: packed queries, packed keys
INPUTS: dict[tuple[bool, bool], Table] = {
    (packed_q, packed_k): {
        "query": argument("N query_dim") if packed_q else argument("B Tq query_dim", offsets=OF_QUERIES),
        "key": argument("M key_dim") if packed_k else argument("B Tk key_dim", offsets=BOTH[1]),
        "projected": argument(
            "M width" if packed_k else "B Tk width", optional=True, hint="what project_keys made of key"
        ),
        "value": argument("M Dv" if packed_k else "B Tk Dv", optional=True),
        "value of heads": argument(
            "M Dv | M num_heads Dv" if packed_k else "B Tk Dv | B num_heads Tk Dv", optional=True
        ),
    }
    for packed_q, packed_k in FORMS
}
"""The rows as a module takes them, padded and packed: before they have heads, but values may have theirs."""


class HeadsAttention(Attention):
    """Attention from queries to keys with `num_heads` heads, which an output has an axis for where there are more."""

    def __init__(self, num_heads: int, dropout: float) -> None:
        super().__init__()
        [self.num_heads] = counts(num_heads=num_heads)
        self.dropout = check_dropout("dropout", dropout)

    def _checker(self, table: Table) -> Checker:
        """The checker of the inputs, by `query_proj` and `key_proj`: a family without them has its own."""
        widths = {"query_dim": width_of(self.query_proj), "key_dim": width_of(self.key_proj)}
        return module_checker(table, weight_of(self.query_proj), **widths, num_heads=self.num_heads)

    def _width(self) -> tuple[int | None, str]:
        """Of a score of one head, None where a layer does not tell; and the constructor's name of it."""
        raise NotImplementedError

    def _check(
        self, table: Table, query: Tensor, key: Tensor, value: Tensor | None, projected: Tensor | None
    ) -> Checker:
        """Check the rows by the module's own names; the rest is left to the function, whose names are the same."""
        check = self._checker(table)
        check("query", query)
        check("key", key)
        check("value", value, "value of heads" if self.num_heads > 1 else "value")
        width, name = self._width()
        if width is not None:
            check.bind("width", self.num_heads * width, f"num_heads times {name}")
        check("projected", projected)
        return check

    def project_keys(self, key: Tensor) -> Tensor:
        """The keys times their weight, ``(B, Tk, key_dim)`` to ``(B, Tk, H width)``, the width that they score at.

        Packed ``(M, key_dim)`` to ``(M, H width)``. A decoder does it once for all its steps, and passes the result
        as `projected`.

        Keys that are not finite give NaN, which a mask or window may hide, and add nothing to the gradient of the
        weight.
        """
        self._checker(INPUTS[False, isinstance(key, Tensor) and key.dim() == 2])("key", key)
        return self._project_keys(key)

    def _project_keys(self, key: Tensor) -> Tensor:
        return project(cast("nn.Module", self.key_proj), key)

    def _split(self, x: Tensor) -> Tensor:
        """Give projected rows the axis of heads, where functions have it: after the batch, or after packed rows."""
        return x.unflatten(-1, (self.num_heads, -1)).movedim(-2, 1) if self.num_heads > 1 else x

    def _of_heads(self, x: Tensor) -> Tensor:
        """Rows that are the same for all heads: where padded one head of them."""
        return self._repeat(x) if x.dim() == 2 or self.num_heads == 1 else x.unsqueeze(1)

    def _values(self, value: Any, key: Tensor) -> Any:
        """Values that are rows as the keys are, for all heads; what has heads already, None and False stay."""
        return self._of_heads(value) if isinstance(value, Tensor) and value.dim() == key.dim() else value

    def _repeat(self, x: Tensor) -> Tensor:
        """The same rows for every head."""
        return x.unsqueeze(1).expand(-1, self.num_heads, *x.shape[1:]) if self.num_heads > 1 else x


class PairsAttention(HeadsAttention):
    """The forward of a family whose module takes padded or packed rows: the family says what it does with them."""

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | Literal[False] | None,
        projected: Tensor | None,
        **options: Any,
    ) -> Any:
        """The family's function on checked rows."""
        raise NotImplementedError

    @explicit
    @jagged_pairs
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | Literal[False] | None = None,
        *,
        projected: Tensor | None = None,
        mask: Tensor | None = None,
        window: tuple[int | None, int | None] | None = None,
        score_bias: Tensor | None = None,
        cu_seqlens_q: Offsets | None = None,
        cu_seqlens_k: Offsets | None = None,
        return_weights: bool = False,
        return_log_weights: bool = False,
        return_scores: bool = False,
        return_lse: bool = False,
        return_state: bool = False,
        impl: Impl = "auto",
    ) -> Tensor | tuple[Any, ...]:
        """Attend from ``query (B, Tq, query_dim)`` to ``key (B, Tk, key_dim)``, or packed, ``(N, query_dim)``.

        Parameters
        ----------
        query, key
            Without heads: each head scores the same rows.
        value
            The keys as they are given, where None. ``(B, Tk, Dv)`` for every head, or with more than one
            ``(B, H, Tk, Dv)``; packed ``(N, Dv)`` or ``(N, H, Dv)``. False: no output, as in the function.
        projected
            What `project_keys` made of `key`; None: it is made here.
        mask, window, score_bias, cu_seqlens_q, cu_seqlens_k, impl
            As in the function that the module is of.
        return_weights, return_log_weights, return_scores, return_lse, return_state
            As in the function.

        Returns
        -------
        Tensor, State or tuple
            As the function returns them, with heads where there are more than one: ``(B, [H,] Tq, Dv)``, packed
            ``(N, [H,] Dv)``; weights, log weights and scores ``(B, [H,] Tq, Tk)``.

        Raises
        ------
        ValueError, TypeError
            As in the function; also for queries and keys with heads, or of other widths, dtypes or devices than the
            parameters'.

        """
        form = cu_seqlens_q is not None, cu_seqlens_k is not None
        self._check(INPUTS[form], query, key, None if value is False else value, projected)
        out: Tensor | tuple[Any, ...] = self._attend(
            query,
            key,
            value,
            projected,
            mask=mask,
            window=window,
            score_bias=score_bias,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            dropout_p=self._dropout_p,
            return_weights=return_weights,
            return_log_weights=return_log_weights,
            return_scores=return_scores,
            return_lse=return_lse,
            return_state=return_state,
            impl=impl,
        )
        return out
