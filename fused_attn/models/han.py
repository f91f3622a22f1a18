"""Hierarchical attention networks for document classification (Yang et al. 2016)."""

from __future__ import annotations

from torch import Tensor, nn

from .._checks import check_cu_seqlens
from .._ops import Impl
from ..modules import HierarchicalAttention, RaggedRNN
from ._arms import freeze_uniform
from ._padded import check_indices, check_sizes


class HAN(nn.Module):
    r"""Classify documents by attention over the words of each sentence, then over the sentences.

    .. math:: h_{it} = BiGRU(e_{it}), \quad \alpha_{it} = softmax_t(u_w^T \tanh(W_w h_{it} + b_w)), \quad
        s_i = \sum_t \alpha_{it} h_{it}

    .. math:: h_i = BiGRU(s_i), \quad \alpha_i = softmax_i(u_s^T \tanh(W_s h_i + b_s)), \quad
        v = \sum_i \alpha_i h_i, \quad logits = W_c v + b_c

    with the first GRU over the words of a sentence and the second over the sentences of a document. Nothing is open.
    Without attention it is the paper's HN-AVE.

    Parameters
    ----------
    vocabulary, classes
        Number of words, and of logits.
    embed_dim, hidden, attn_dim
        Widths of the word vectors, of a GRU's state in one direction, and of both scores, by default the paper's.
    attention
        False: the mean over the words and over the sentences.
    impl
        As in `hierarchical_attention`.

    """

    def __init__(
        self,
        vocabulary: int,
        classes: int,
        *,
        embed_dim: int = 200,
        hidden: int = 50,
        attn_dim: int = 100,
        attention: bool = True,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_sizes(locals(), "vocabulary", "classes", "embed_dim", "hidden", "attn_dim")
        self.impl: Impl = impl
        self.embedding = nn.Embedding(vocabulary, embed_dim)
        self.words = RaggedRNN(nn.GRU(embed_dim, hidden, bidirectional=True))
        sentences = RaggedRNN(nn.GRU(2 * hidden, hidden, bidirectional=True))
        self.pooling = HierarchicalAttention(2 * hidden, attn_dim, between=sentences, between_dim=2 * hidden)
        self.head = nn.Linear(2 * hidden, classes)
        if not attention:
            freeze_uniform(self)

    def forward(
        self, words: Tensor, sentences: Tensor, documents: Tensor, *, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Logits of ragged documents.

        Parameters
        ----------
        words
            int64 ``(N,)``, one sentence after the other.
        sentences
            int32 ``(S + 1,)``: sentence i is the words ``sentences[i]`` to ``sentences[i + 1]``. One without words
            is not attended to; the GRU over sentences reads its zero vector.
        documents
            int32 ``(G + 1,)``: document g is the sentences ``documents[g]`` to ``documents[g + 1]``. One without
            words has v = 0.
        return_weights
            Return the weights of both levels too.

        Returns
        -------
        Tensor or (Tensor, Tensor, Tensor)
            Logits ``(G, classes)``; weights of words in their sentences ``(N,)``, of sentences in their documents
            ``(S,)``.

        """
        check_indices("words", words, "(N,)", (None,))
        check_cu_seqlens("sentences", sentences, len(words), words.device)
        h = self.words(self.embedding(words), sentences)
        v, _, of_words, of_sentences, *_ = self.pooling(h, sentences, documents, return_weights=True, impl=self.impl)
        logits = self.head(v)
        return (logits, of_words, of_sentences) if return_weights else logits
