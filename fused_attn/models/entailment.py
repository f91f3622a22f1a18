"""Reasoning about entailment with neural attention (Rocktäschel et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .._ops import Impl
from ..modules import ConcatAttention, WordByWordAttention
from ._arms import freeze_uniform
from ._padded import check_choice, check_indices, check_lengths, check_sizes, length_mask

MODES = ("attention", "word_by_word")
STARTS = ("cell", "both")


class Entailment(nn.Module):
    r"""Classify pairs of premise and hypothesis, by whether the first entails the second.

    An LSTM reads the premise, Y its states. Another reads the hypothesis, h its states, and starts from the last
    state of the first (conditional encoding). With ``mode="attention"`` the last state of the hypothesis attends:

    .. math:: M = \tanh(Y W_y + h_N W_h), \quad \alpha = softmax(M w), \quad r = \alpha Y

    and with ``mode="word_by_word"`` each of its words does, and r is the last of

    .. math:: M_t = \tanh(Y W_y + h_t W_h + r_{t-1} W_r), \quad \alpha_t = softmax(M_t w), \quad
        r_t = \alpha_t Y + \tanh(r_{t-1} W_t), \quad r_0 = 0

    Then :math:`h^* = \tanh(W_p r + W_x h_N)` and :math:`logits = W_o h^* + b_o`. Two-way attention does the same
    with premise and hypothesis exchanged, by the same parameters, and classifies both h* together.

    The paper puts a delimiter before what the second LSTM reads: it is a word like any other here, for whoever makes
    the sentences. Word vectors are trained, and go into the LSTMs as they are; the paper has fixed ones and a
    projection.

    Parameters
    ----------
    vocabulary, classes
        Number of words, and of logits.
    embed_dim, hidden
        Widths of the word vectors, and k of states and attention (100 to 159 in the paper).
    mode
        ``"attention"`` or ``"word_by_word"``.
    two_way
        Whether to attend in both directions.
    start
        Where the second LSTM starts: ``"cell"``, from the last memory cell of the first, its output at zero; or
        ``"both"``, from cell and output, which is what `torch.nn.LSTM` calls its state.
    attention
        False: uniform weights over the premise. In ``"word_by_word"`` the recurrence stays.
    impl
        As in `concat_attention` and `word_by_word_attention`.

    """

    def __init__(
        self,
        vocabulary: int,
        classes: int = 3,
        *,
        embed_dim: int = 100,
        hidden: int = 100,
        mode: str = "word_by_word",
        two_way: bool = False,
        start: str = "cell",
        attention: bool = True,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_sizes(locals(), "vocabulary", "classes", "embed_dim", "hidden")
        check_choice("mode", mode, MODES)
        check_choice("start", start, STARTS)
        self.two_way, self.start = two_way, start
        self.impl: Impl = impl
        self.embedding = nn.Embedding(vocabulary, embed_dim)
        self.premise_lstm = nn.LSTM(embed_dim, hidden, batch_first=True)
        self.hypothesis_lstm = nn.LSTM(embed_dim, hidden, batch_first=True)
        pooling = ConcatAttention if mode == "attention" else WordByWordAttention
        self.pooling: ConcatAttention | WordByWordAttention = pooling(hidden, hidden, hidden)
        self.from_premise = nn.Linear(hidden, hidden, bias=False)
        self.from_hypothesis = nn.Linear(hidden, hidden, bias=False)
        self.head = nn.Linear(2 * hidden if two_way else hidden, classes)
        if not attention:
            freeze_uniform(self)

    def forward(
        self,
        premise: Tensor,
        premise_lengths: Tensor,
        hypothesis: Tensor,
        hypothesis_lengths: Tensor,
        *,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Logits of padded pairs.

        Parameters
        ----------
        premise, hypothesis
            int64 ``(B, Ty)`` and ``(B, Th)``; what stands past the end does not matter.
        premise_lengths, hypothesis_lengths
            int64 or int32 ``(B,)``. An empty premise has nothing to attend to, an empty hypothesis does not attend: r
            is zero.
        return_weights
            Return the weights over the premise too, and with `two_way` those over the hypothesis.

        Returns
        -------
        Tensor or (Tensor, ...)
            Logits ``(B, classes)``; weights ``(B, Ty)``, word by word ``(B, Th, Ty)``, zero past the hypothesis; then
            with `two_way` ``(B, Th)``, word by word ``(B, Ty, Th)``.

        """
        check_indices("premise", premise, "(B, Ty)", (None, None))
        check_indices("hypothesis", hypothesis, "(B, Th)", (len(premise), None))
        check_lengths("premise_lengths", premise_lengths, premise.shape[:1], premise.shape[1])
        check_lengths("hypothesis_lengths", hypothesis_lengths, premise.shape[:1], hypothesis.shape[1])
        one, other = (premise, premise_lengths), (hypothesis, hypothesis_lengths)
        read = [self._read(*one, *other)]
        if self.two_way:
            read.append(self._read(*other, *one))
        logits = self.head(torch.cat([x for x, _ in read], 1))
        return (logits, *(weights for _, weights in read)) if return_weights else logits

    def _read(
        self, premise: Tensor, premise_lengths: Tensor, hypothesis: Tensor, hypothesis_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """h* and the weights of one direction."""
        zeros = self.head.weight.new_zeros(1, len(premise), self.from_premise.in_features)
        y, (output, cell) = self._run(self.premise_lstm, premise, premise_lengths, (zeros, zeros))
        state = (zeros if self.start == "cell" else output, cell)
        h, (last, _) = self._run(self.hypothesis_lstm, hypothesis, hypothesis_lengths, state)
        last, mask = last[0], length_mask(premise_lengths, premise.shape[1])
        empty = (hypothesis_lengths == 0)[:, None]
        if isinstance(self.pooling, ConcatAttention):
            r, weights = self.pooling(last[:, None], y, mask=mask, return_weights=True, impl=self.impl)
            r, weights = r[:, 0].masked_fill(empty, 0), weights[:, 0].masked_fill(empty, 0)
        else:
            steps, weights = self.pooling(y, h, mask=mask, return_weights=True, impl=self.impl)
            steps = torch.cat([zeros.transpose(0, 1), steps], 1)  # r_0, which is the last of an empty hypothesis
            r = steps[torch.arange(len(steps), device=steps.device), hypothesis_lengths]
            past = ~length_mask(hypothesis_lengths, hypothesis.shape[1])
            weights = weights.masked_fill(past[..., None], 0)
        return torch.tanh(self.from_premise(r) + self.from_hypothesis(last)), weights

    def _run(
        self, lstm: nn.LSTM, words: Tensor, lengths: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Outputs of each word, zero past the end, and the last state; that of no words is where it started."""
        if words.numel() == 0:
            return self.embedding.weight.new_zeros(*words.shape, lstm.hidden_size), state
        words = words.masked_fill(~length_mask(lengths, words.shape[1]), 0)  # padding may be no word's number
        ends = lengths.clamp(min=1)
        x = pack_padded_sequence(self.embedding(words), ends.cpu(), batch_first=True, enforce_sorted=False)
        packed, after = lstm(x, state)
        outputs = pad_packed_sequence(packed, batch_first=True, total_length=words.shape[1])[0]
        empty = lengths == 0
        output, cell = (torch.where(empty[:, None], old, new) for old, new in zip(state, after, strict=True))
        return outputs.masked_fill(empty[:, None, None], 0), (output, cell)
