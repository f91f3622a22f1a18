"""RNN-POA: positional attention for question answering (Chen et al., SIGIR 2017)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._ops import Impl
from ..modules import LocationAttention
from ._arms import freeze_uniform
from ._padded import check_choice, check_indices, check_lengths, check_sizes, encode, length_mask


class PositionalAttention(nn.Module):
    r"""How well answers fit a question, from attention to what stands near the question's words.

    A question word in the answer has an influence on the words around it that fades with the distance u. A matrix K
    of that influence is drawn once and stays fixed; feature k of column u is a Gaussian kernel with noise:

    .. math::
        K_{k,u} &\sim N\big(e^{-u^2 / 2\sigma^2}, \sigma'^2\big), \qquad
        p_j = \sum_{i \,:\, a_i \in question} K_{\cdot, |i - j|} \\
        e_j &= v \cdot \tanh(W_H h_j + W_P p_j + b), \qquad r_a = \sum_j softmax_j(e_j) \, h_j \\
        similarity &= \exp(-\lVert r_q - r_a \rVert_1)

    over the states h_j of a bidirectional LSTM, one for questions and answers. The question does not enter the score
    but through p. An answer without words has r_a = 0.

    Public code of the paper has these formulas. How the question's states become r_q is open here, so it
    is an option.

    Parameters
    ----------
    words
        Number of words, all with vectors of their own.
    embed_dim, hidden_dim, attn_dim, position_dim
        Widths: of the words' vectors, the LSTM in each direction, the score, and p (in the paper 50 of the last).
    positions
        Number of columns of K: a question word further away than that has no influence.
    sigma, noise
        :math:`\sigma`, positive (in the paper 15 to 35), and :math:`\sigma'`.
    common
        Words with an index under this are no question words. Word 0 is for unknown words, which all look alike, and
        if the frequent ones come next, they do not count either.
    question_pool
        r_q is the ``"mean"`` or the ``"max"`` of the question's states, or the ``"last"`` state of both directions.
    attention
        False: uniform weights.
    impl
        As in `location_attention`.

    Attributes
    ----------
    influence
        K as a buffer ``(positions, position_dim)``.

    References
    ----------
    Chen et al., Enhancing Recurrent Neural Networks with Positional Attention for Question Answering, SIGIR 2017.

    """

    influence: Tensor

    def __init__(
        self,
        words: int,
        *,
        embed_dim: int = 100,
        hidden_dim: int = 50,
        attn_dim: int = 50,
        position_dim: int = 50,
        positions: int = 100,
        sigma: float = 25.0,
        noise: float = 0.1,
        common: int = 1,
        question_pool: str = "mean",
        attention: bool = True,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_sizes(locals(), "words", "embed_dim", "hidden_dim", "attn_dim", "position_dim", "positions")
        check_choice("question_pool", question_pool, ("mean", "max", "last"))
        if sigma <= 0:
            raise ValueError(f"sigma: expected a positive number; got {sigma}")
        self.common, self.question_pool, self.impl = common, question_pool, impl
        distance = torch.arange(positions, dtype=torch.get_default_dtype())[:, None]
        kernel = (-(distance**2) / (2 * sigma**2)).exp()
        self.register_buffer("influence", kernel + noise * torch.randn(positions, position_dim))
        self.embed = nn.Embedding(words, embed_dim)
        self.encoder = nn.LSTM(embed_dim, hidden_dim, batch_first=True, bidirectional=True)
        self.attend = LocationAttention(2 * hidden_dim, attn_dim, context_dim=position_dim)
        if not attention:
            freeze_uniform(self)

    def positional(self, question: Tensor, question_mask: Tensor, answer: Tensor, answer_mask: Tensor) -> Tensor:
        """p ``(P, Ta, position_dim)`` of the pairs of questions ``(P, Tq)`` and answers ``(P, Ta)``."""
        if answer.shape[1] == 0:  # which conv1d refuses
            return self.influence.new_zeros(*answer.shape, self.influence.shape[1])
        counts = question_mask & (question >= self.common)
        occurs = ((answer[:, :, None] == question[:, None]) & counts[:, None]).any(-1) & answer_mask
        # A sum over occurrences of what depends on the distance alone is a convolution with a symmetric kernel.
        kernel = torch.cat([self.influence[1:].flip(0), self.influence]).t()[:, None]
        p = F.conv1d(occurs.to(kernel.dtype)[:, None], kernel, padding=self.influence.shape[0] - 1)
        return p.transpose(1, 2)

    def pool(self, h: Tensor, lengths: Tensor) -> Tensor:
        """r_q ``(B, 2 * hidden_dim)`` of the questions' states; 0 for a question without words."""
        if h.shape[1] == 0:
            return h.new_zeros(h.shape[0], h.shape[2])
        if self.question_pool == "mean":
            return h.sum(1) / lengths.clamp(min=1)[:, None]
        if self.question_pool == "max":
            past = ~length_mask(lengths, h.shape[1])[..., None]
            return h.masked_fill(past, -torch.inf).amax(1).masked_fill(lengths[:, None] == 0, 0)
        forward, backward = h.chunk(2, -1)
        last = forward[torch.arange(h.shape[0], device=h.device), (lengths - 1).clamp(min=0)]
        return torch.cat([last, backward[:, 0]], -1)

    def forward(
        self,
        question: Tensor,
        question_lengths: Tensor,
        answers: Tensor,
        answer_lengths: Tensor,
        candidates: Tensor | None = None,
        *,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        r"""Compare questions with their candidate answers.

        Parameters
        ----------
        question, question_lengths
            Words ``(B, Tq)``, int, and their number ``(B,)``.
        answers, answer_lengths
            ``(N, Ta)`` and ``(N,)``. Each is encoded once, however many questions it is a candidate of.
        candidates
            int ``(B, C)``: the rows of `answers` that each question is compared with. None: N = B, and each question
            has one candidate, that of its own row.
        return_weights
            Return the weights too.

        Returns
        -------
        Tensor or (Tensor, Tensor)
            :math:`-\lVert r_q - r_a \rVert_1`, the logarithm of the similarity, which may underflow itself:
            ``(B, C)``; weights ``(B, C, Ta)``.

        """
        check_indices("question", question, "(B, Tq)", (None, None))
        check_indices("answers", answers, "(N, Ta)", (None, None))
        check_lengths("question_lengths", question_lengths, question.shape[:1], question.shape[1])
        check_lengths("answer_lengths", answer_lengths, answers.shape[:1], answers.shape[1])
        batch, rows = question.shape[0], answers.shape[0]
        if candidates is None:
            if rows != batch:
                raise ValueError(f"answers: expected one a question, {batch}, without candidates; got {rows}")
            candidates = torch.arange(batch, device=question.device)[:, None]
        check_indices("candidates", candidates, "(B, C)", (batch, None))
        if candidates.device.type == "cpu" and not ((candidates >= 0) & (candidates < rows)).all():
            raise ValueError(f"candidates: expected numbers from 0 to {rows - 1}; got {candidates.tolist()}")
        q_mask = length_mask(question_lengths, question.shape[1])
        a_mask = length_mask(answer_lengths, answers.shape[1])
        question, answers = question.masked_fill(~q_mask, 0), answers.masked_fill(~a_mask, 0)
        r_q = self.pool(encode(self.encoder, self.embed(question), question_lengths), question_lengths)
        h = encode(self.encoder, self.embed(answers), answer_lengths)
        pairs, each = candidates.flatten(), candidates.shape[1]  # a row for every question and candidate
        position = self.positional(
            question.repeat_interleave(each, 0), q_mask.repeat_interleave(each, 0), answers[pairs], a_mask[pairs]
        )
        r_a, weights = cast(
            "tuple[Tensor, Tensor]",
            self.attend(h[pairs], context=position, mask=a_mask[pairs], return_weights=True, impl=self.impl),
        )
        near = -(r_q.repeat_interleave(each, 0) - r_a).abs().sum(-1)
        return (near.view(batch, each), weights.view(batch, each, -1)) if return_weights else near.view(batch, each)
