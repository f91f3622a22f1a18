"""The recurrent family as modules."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .._checks import (
    Table,
    argument,
    check_activation,
    check_dropout,
    check_flag,
    check_score_activation,
    mask_of,
    module_checker,
    weight_of,
    width_of,
)
from .._habits import explicit
from .._jagged import is_jagged, of_rows, rows_of
from .._ops import Impl
from ..location_aware import PADDED, check_padded, location_aware_attention, location_aware_sequence
from ..recurrent import word_by_word_attention
from ..segments import Offsets
from ._layers import Attention, counts, factory, project, read


def _words(premise: bool, hypothesis: bool) -> Table:
    """By which of them is packed."""
    return {
        "premise": argument(
            "N premise_dim" if premise else "B Ty premise_dim", offsets="" if premise else "cu_seqlens_premise"
        ),
        "hypothesis": argument(
            "M hypothesis_dim" if hypothesis else "B Th hypothesis_dim",
            offsets="" if hypothesis else "cu_seqlens_hypothesis",
        ),
        "state": argument("S premise_dim" if premise and hypothesis else "B premise_dim", optional=True),
    }


_WORDS = {sides: _words(*sides) for sides in itertools.product((False, True), (False, True))}


def _step(query: str, rows: str, history: str) -> Table:
    made = "what project_keys made of key"
    offsets = "" if rows == "N" else "cu_seqlens"
    return {
        "query": argument(query, hint="one query a sequence: a step of the decoder"),
        "key": argument(f"{rows} key_dim", offsets=offsets),
        "projected": argument(f"{rows} attn_dim", optional=True, hint=made, offsets=offsets),
        "mask": mask_of(rows),
        "previous": argument(rows, optional=True),
        "history": argument(history, optional=True, hint="the last weights and what is made of them"),
    }


_STEPS = {
    False: _step("B query_dim", "B Tk", "B history Tk"),
    True: _step("S query_dim", "N", "N history"),  # rows are packed
}
_UTTERANCE = _STEPS[False] | {
    "query": argument("B Tq query_dim"),
    "key": argument("B Tk key_dim", hint=PADDED),
    "projected": _STEPS[False]["projected"]._replace(offsets=""),
}


def _zeros_before(key: Tensor, channels: Sequence[int]) -> Tensor:
    """What the first step sees."""
    if is_jagged(key):
        rows = rows_of("key", key)
        return cast("Tensor", rows.nest(rows.packed.new_zeros(rows.packed.shape[0], *channels)))
    if key.dim() == 2:  # packed
        return key.new_zeros(key.shape[0], *channels)
    return key.new_zeros(key.shape[0], *channels, key.shape[1])


class WordByWordAttention(Attention):
    r"""Word-by-word attention with its projections, see `word_by_word_attention`.

    .. math:: \alpha_t = softmax_j(w \cdot \tanh(W_y y_j + W_h h_t + W_r r_{t-1})), \quad
        r_t = \sum_j \alpha_{tj} \, y_j + \tanh(W_t r_{t-1})

    Parameters
    ----------
    premise_dim, hypothesis_dim, attn_dim
        Widths D of the premise and of r, of the hypothesis, and A of the score.
    device, dtype
        Of the parameters, as `torch.nn.Linear` has them.

    Attributes
    ----------
    premise_proj, hypothesis_proj, state_proj, score, carry
        W_y, W_h, W_r, w and W_t, as `torch.nn.Linear` without bias.

    Raises
    ------
    ValueError, TypeError
        For a size under 1.

    """

    def __init__(
        self,
        premise_dim: int,
        hypothesis_dim: int,
        attn_dim: int,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        premise_dim, hypothesis_dim, attn_dim = counts(
            premise_dim=premise_dim, hypothesis_dim=hypothesis_dim, attn_dim=attn_dim
        )
        super().__init__()
        made = factory(device, dtype)
        self.premise_proj = nn.Linear(premise_dim, attn_dim, bias=False, **made)
        self.hypothesis_proj = nn.Linear(hypothesis_dim, attn_dim, bias=False, **made)
        self.state_proj = nn.Linear(premise_dim, attn_dim, bias=False, **made)
        self.score = nn.Linear(attn_dim, 1, bias=False, **made)
        self.carry = nn.Linear(premise_dim, premise_dim, bias=False, **made)

    @explicit
    def forward(
        self,
        premise: Tensor,
        hypothesis: Tensor,
        *,
        state: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens_premise: Offsets | None = None,
        cu_seqlens_hypothesis: Offsets | None = None,
        return_weights: bool = False,
        return_log_weights: bool = False,
        return_scores: bool = False,
        return_lse: bool = False,
        impl: Impl = "auto",
    ) -> Tensor | tuple[Tensor, ...]:
        """r of every word of the hypothesis; shapes, results and errors are those of `word_by_word_attention`."""
        check = module_checker(
            _WORDS[cu_seqlens_premise is not None, cu_seqlens_hypothesis is not None],
            weight_of(self.premise_proj),
            premise_dim=width_of(self.premise_proj),
            hypothesis_dim=width_of(self.hypothesis_proj),
        )
        check("premise", premise)
        check("hypothesis", hypothesis)
        check("state", state)

        def weight(name: str) -> Tensor:
            return read(name, getattr(self, name)).weight

        return word_by_word_attention(
            premise,
            hypothesis,
            weight("premise_proj").t(),
            weight("hypothesis_proj").t(),
            weight("state_proj").t(),
            weight("score")[0],
            weight("carry").t(),
            state=state,
            mask=mask,
            cu_seqlens_premise=cu_seqlens_premise,
            cu_seqlens_hypothesis=cu_seqlens_hypothesis,
            return_weights=return_weights,
            return_log_weights=return_log_weights,
            return_scores=return_scores,
            return_lse=return_lse,
            impl=impl,
        )


class LocationAwareAttention(Attention):
    r"""A decoder's attention that sees where it looked last, with its projections: see `location_aware_attention`.

    .. math:: s_j = v \cdot act(W q + b + V k_j + U f_j), \quad f = F * \alpha^{prev}

    Parameters
    ----------
    query_dim, key_dim, attn_dim
        Widths of queries and keys, and A of the score.
    channels, width, history
        Number C of filters, their odd width K, and channels of what they run over: the weights of the last step, or
        their sum, where `history` is 1; in Tacotron 2 both, where it is 2.
    activation, bias, dropout, device, dtype
        As in `ConcatAttention`.
    score_activation
        As in `location_aware_attention`.

    Raises
    ------
    ValueError, TypeError
        For a size under 1, an even width, or an unknown activation.

    """

    _shown = ("activation", "dropout")

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        attn_dim: int,
        *,
        channels: int = 32,
        width: int = 31,
        history: int = 1,
        activation: str = "tanh",
        score_activation: str = "identity",
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        query_dim, key_dim, attn_dim, channels, width, history = counts(
            query_dim=query_dim, key_dim=key_dim, attn_dim=attn_dim, channels=channels, width=width, history=history
        )
        if width % 2 == 0:
            raise ValueError(f"width: expected an odd number; got {width}")
        check_activation("activation", activation)
        check_score_activation("score_activation", score_activation)
        super().__init__()
        made = factory(device, dtype)
        self.activation, self.dropout, self.history = activation, check_dropout("dropout", dropout), history
        self.score_activation = score_activation
        self.query_proj = nn.Linear(query_dim, attn_dim, bias=check_flag("bias", bias), **made)
        self.key_proj = nn.Linear(key_dim, attn_dim, bias=False, **made)
        self.conv = nn.Conv1d(history, channels, width, padding=width // 2, bias=False, **made)
        self.location_proj = nn.Linear(channels, attn_dim, bias=False, **made)
        self.score = nn.Linear(attn_dim, 1, bias=False, **made)

    def project_keys(self, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, Tk, key_dim)`` to ``(B, Tk, attn_dim)``: the same at every step, so a decoder does it once.

        Packed ``(N, key_dim)`` to ``(N, attn_dim)``, and a jagged tensor to one. mask: bool ``(B, Tk)``, or ``(N,)``
        of packed and jagged keys; where it is False, keys may be NaN. They are 0 here, in a copy, for 0 · NaN would
        be in the gradient of the projection.
        """
        rows = rows_of("key", key) if is_jagged(key) else None
        if rows is not None:
            key, mask = rows.packed, of_rows("mask", mask, rows, "key") if is_jagged(mask) else mask
        packed = rows is not None or (isinstance(key, Tensor) and key.dim() == 2)
        check = module_checker(_STEPS[packed], weight_of(self.key_proj), key_dim=width_of(self.key_proj))
        check("key", key)
        check("mask", mask)
        if mask is not None:
            key = key.masked_fill(~mask[..., None], 0)
        projected: Tensor = self.key_proj(key)
        return projected if rows is None else cast("Tensor", rows.nest(projected))

    @explicit
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        previous: Tensor | None = None,
        projected: Tensor | None = None,
        mask: Tensor | None = None,
        score_bias: Tensor | None = None,
        cu_seqlens: Offsets | None = None,
        return_log_weights: bool = False,
        return_scores: bool = False,
        return_lse: bool = False,
        impl: Impl = "auto",
    ) -> tuple[Tensor, ...]:
        """One step.

        Parameters
        ----------
        query
            The decoder's state, ``(B, query_dim)``.
        key, value
            ``(B, Tk, key_dim)`` and ``(B, Tk, Dv)``; the values are the keys where None. Packed or jagged as in
            `location_aware_attention`.
        previous
            The weights of the last step, or their sum so far, ``(B, Tk)``; where the module's `history` is over 1
            ``(B, history, Tk)``, packed ``(N, history)``. None at the first step: zeros.
        projected
            What `project_keys` made of `key`, and of the mask where hidden keys may be NaN; None: it is made here.
        mask, score_bias, cu_seqlens, return_log_weights, return_scores, return_lse, impl
            As in `location_aware_attention`.

        Returns
        -------
        tuple of Tensor
            Context ``(B, Dv)`` and weights ``(B, Tk)``, packed ``(N,)``, of jagged keys jagged, then what is asked
            for.

        Raises
        ------
        ValueError, TypeError
            As in `location_aware_attention`; also for inputs of other widths, dtypes or devices than the parameters'.

        """
        table = _STEPS[cu_seqlens is not None]
        query, projected, value, v = self._given(table, query, key, value, projected, mask, previous)
        filters, mix = self._filters()
        if previous is None:
            previous = _zeros_before(key, filters.shape[1:-1])
        return location_aware_attention(
            query,
            projected,
            value,
            v,
            previous,
            filters,
            mix,
            activation=self.activation,
            score_activation=self.score_activation,
            mask=mask,
            score_bias=score_bias,
            cu_seqlens=cu_seqlens,
            dropout_p=self._dropout_p,
            return_log_weights=return_log_weights,
            return_scores=return_scores,
            return_lse=return_lse,
            impl=impl,
        )

    @explicit
    def sequence(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        previous: Tensor | None = None,
        cumulative: bool = False,
        projected: Tensor | None = None,
        mask: Tensor | None = None,
        score_bias: Tensor | None = None,
        impl: Impl = "auto",
    ) -> tuple[Tensor, Tensor]:
        """All steps of an utterance whose queries, ``(B, Tq, query_dim)``, are known.

        Contexts ``(B, Tq, Dv)`` and weights ``(B, Tq, Tk)``; `previous` is what the first step sees. Arguments are
        those of a step and of `location_aware_sequence`, as are the errors. Padded only.
        """
        check_padded(key)
        query, projected, value, v = self._given(_UTTERANCE, query, key, value, projected, mask, previous)
        filters, mix = self._filters()
        return location_aware_sequence(
            query,
            projected,
            value,
            v,
            filters,
            mix,
            previous=previous,
            cumulative=cumulative,
            activation=self.activation,
            score_activation=self.score_activation,
            mask=mask,
            score_bias=score_bias,
            dropout_p=self._dropout_p,
            impl=impl,
        )

    def _given(
        self,
        table: Table,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        projected: Tensor | None,
        mask: Tensor | None,
        previous: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query and keys, checked and projected, values and v."""
        if is_jagged(key):
            return self._given_jagged(query, key, value, projected, mask)
        check = module_checker(
            table,
            weight_of(self.key_proj),
            query_dim=width_of(self.query_proj),
            key_dim=width_of(self.key_proj),
            attn_dim=width_of(self.score),
            history=self.history,
        )
        check("query", query)
        check("key", key)
        check("projected", projected)
        check("previous", previous, "previous" if self.history == 1 else "history")
        projected = self.project_keys(key, mask) if projected is None else projected
        values = key if value is None else value
        return project(self.query_proj, query), projected, values, read("score", self.score).weight[0]

    def _given_jagged(
        self, query: Tensor, key: Tensor, value: Tensor | None, projected: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same of jagged keys; what is not projected is left to the function, whose names are the same."""
        check = module_checker(
            _STEPS[True],
            weight_of(self.key_proj),
            query_dim=width_of(self.query_proj),
            attn_dim=width_of(self.score),
        )
        check("query", query)
        if projected is None:
            projected = self.project_keys(key, mask)
        else:
            check("projected", of_rows("projected", projected, rows_of("key", key), "key"))
        values = key if value is None else value
        return project(self.query_proj, query), projected, values, read("score", self.score).weight[0]

    def _filters(self) -> tuple[Tensor, Tensor]:
        """F and U."""
        filters = read("conv", self.conv).weight
        return filters[:, 0] if filters.shape[1] == 1 else filters, read(
            "location_proj", self.location_proj
        ).weight.t()
