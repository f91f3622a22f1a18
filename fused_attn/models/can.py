"""CAN, the context-aware attention network (Li, Min, Ge and Kadav 2017): questions about a story."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .._checks import check_tensor
from .._ops import Impl
from ..general import general_attention
from ..location import location_attention
from ..modules import LocationAttention
from ._arms import freeze_uniform
from ._padded import check_choice, check_lengths, check_sizes, encode, length_mask

_ACTIVATIONS = {"tanh": torch.tanh, "identity": lambda x: x}


class CANWeights(NamedTuple):
    """The weights of one call."""

    question: Tensor
    """γ over the question's words, ``(B, Lq)``."""
    words: Tensor
    """α over the words of each sentence, ``(B, S, L)``."""
    sentences: Tensor
    """β over the sentences, ``(B, S)``."""


class _Dot(nn.Module):
    """Attention by a dot product, whose weights are uniform with a scale of 0."""

    def __init__(self, scale: float, impl: Impl) -> None:
        super().__init__()
        self.scale, self.impl = scale, impl

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor | None = None, *, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Output and weights."""
        return cast(
            "tuple[Tensor, Tensor]",
            general_attention(query, key, value, scale=self.scale, mask=mask, return_weights=True, impl=self.impl),
        )


class CAN(nn.Module):
    r"""What a story says about a question: attention over words, given what was read before, then over sentences.

    .. math::
        \gamma = softmax_j(v^T g_j), \quad u = act(W_{ch} \sum_j \gamma_j g_j + b) \\
        e_i = \sigma(W_{ee} \tanh(W_{es} s_{t-1} + W_{eh} h_i + b^1) + b^2), \quad \alpha = softmax_i(u^T e_i) \\
        y_t = \sum_i \alpha_i h_i, \quad s_t = GRU_s(s_{t-1}, y_t), \quad s_0 = 0 \\
        \beta = softmax_t((u + r)^T s_t), \quad m = \sum_t \beta_t s_t \\
        f = mean_d(g^f_d), \quad r = \tanh(W_{rf} f + b^f)

    g, h and :math:`g^f` are the states of one GRU over the words of the question, of each sentence, and of a user's
    feedback; r is 0 without feedback. The output m + u is what the paper's decoder is given. The decoder itself is
    not here: where answers are single words, a linear layer will do.

    **Open**: `activation` of u. The equation could not be read; the text calls it a one-layer MLP, and the equation
    of r, called the same, has a tanh.

    Parameters
    ----------
    word_dim
        Width of the word vectors.
    hidden_dim
        Width of the states g and h.
    context_dim
        Width of u, e and s.
    activation
        ``"tanh"`` or ``"identity"``.
    attention
        False: α, β and γ are uniform over what is visible.
    impl
        As in `general_attention`.

    References
    ----------
    Li, Min, Ge, Kadav: A Context-aware Attention Network for Interactive Question Answering, KDD 2017.

    """

    def __init__(
        self,
        word_dim: int,
        hidden_dim: int,
        context_dim: int,
        *,
        activation: str = "tanh",
        attention: bool = True,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_sizes(locals(), "word_dim", "hidden_dim", "context_dim")
        check_choice("activation", activation, tuple(_ACTIVATIONS))
        self.activation, self.attention, self.impl = activation, attention, impl
        self.word_gru = nn.GRU(word_dim, hidden_dim, batch_first=True)
        self.question_pool = LocationAttention(hidden_dim, activation="identity", bias=False)  # v
        self.question_proj = nn.Linear(hidden_dim, context_dim)  # W_ch
        self.state_proj = nn.Linear(context_dim, context_dim, bias=False)  # W_es
        self.word_proj = nn.Linear(hidden_dim, context_dim)  # W_eh, b1
        self.score_proj = nn.Linear(context_dim, context_dim)  # W_ee, b2
        self.sentence_gru = nn.GRUCell(hidden_dim, context_dim)
        self.feedback_proj = nn.Linear(hidden_dim, context_dim)  # W_rf
        self.attend_words = _Dot(1.0 if attention else 0.0, impl)
        self.attend_sentences = _Dot(1.0 if attention else 0.0, impl)
        if not attention:
            freeze_uniform(self)

    def forward(
        self,
        words: Tensor,
        lengths: Tensor,
        question: Tensor,
        question_lengths: Tensor,
        *,
        feedback: Tensor | None = None,
        feedback_lengths: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, CANWeights]:
        """Read the story and answer with m + u.

        Parameters
        ----------
        words
            Word vectors ``(B, S, L, word_dim)``.
        lengths
            Words of each sentence, integers ``(B, S)``. A sentence of no words is padding: it has no weight and
            leaves the state as it was. What lies behind the end of a sentence may be NaN.
        question, question_lengths
            ``(B, Lq, word_dim)`` and ``(B,)``.
        feedback, feedback_lengths
            ``(B, Lf, word_dim)`` and ``(B,)``, both or none; 0 words where there is no feedback.
        return_weights
            Return γ, α and β too.

        Returns
        -------
        Tensor or (Tensor, CANWeights)
            m + u, ``(B, context_dim)``. A story of no words has m = 0.

        """
        check_tensor("words", words, shapes=[("(B, S, L, word_dim)", (None, None, None, self.word_gru.input_size))])
        batch, sentences, length, _ = words.shape
        check_lengths("lengths", lengths, (batch, sentences), length)
        h = encode(self.word_gru, words.flatten(0, 1), lengths.flatten()).unflatten(0, (batch, sentences))
        shown, visible = length_mask(lengths, length), lengths > 0
        g, asked = self._encode("question", question, question_lengths, batch)

        pooled, gamma = cast(
            "tuple[Tensor, Tensor]", self.question_pool(g, mask=asked, return_weights=True, impl=self.impl)
        )
        u = _ACTIVATIONS[self.activation](self.question_proj(pooled))
        projected = self.word_proj(h)
        state = u.new_zeros(u.shape)
        states, alphas = [], []
        for t in range(sentences):
            e = torch.sigmoid(self.score_proj(torch.tanh(self.state_proj(state)[:, None] + projected[:, t])))
            y, alpha = self.attend_words(u[:, None], e, h[:, t], mask=shown[:, t])
            state = torch.where(visible[:, t, None], self.sentence_gru(y[:, 0], state), state)
            states.append(state)
            alphas.append(alpha[:, 0])

        query = u
        if feedback is not None or feedback_lengths is not None:
            query = u + self._feedback(feedback, feedback_lengths, batch)
        s = torch.stack(states, 1) if states else u.new_zeros(batch, 0, u.shape[1])
        m, beta = self.attend_sentences(query[:, None], s, mask=visible)
        out = m[:, 0] + u
        if not return_weights:
            return out
        alpha = torch.stack(alphas, 1) if alphas else u.new_zeros(batch, 0, length)
        return out, CANWeights(gamma, alpha, beta[:, 0])

    def _feedback(self, feedback: Tensor | None, lengths: Tensor | None, batch: int) -> Tensor:
        """r, ``(B, context_dim)``, 0 where there is no feedback."""
        if feedback is None or lengths is None:
            missing = "feedback" if feedback is None else "feedback_lengths"
            raise ValueError(f"{missing}: expected a tensor, feedback comes with its lengths; got None")
        g, given = self._encode("feedback", feedback, lengths, batch)
        mean = cast("Tensor", location_attention(g, g.new_zeros(g.shape[-1]), mask=given, impl=self.impl))
        r = torch.tanh(self.feedback_proj(mean))
        return r * (lengths > 0)[:, None]

    def _encode(self, name: str, x: Tensor, lengths: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """The GRU's states over one sequence an example, and which of them count."""
        check_tensor(name, x, shapes=[("(B, L, word_dim)", (batch, None, self.word_gru.input_size))])
        check_lengths(f"{name}_lengths", lengths, (batch,), x.shape[1])
        return encode(self.word_gru, x, lengths), length_mask(lengths, x.shape[1])

    def extra_repr(self) -> str:
        """Options that the submodules do not show."""
        return f"activation={self.activation!r}, attention={self.attention}, impl={self.impl!r}"
