"""CRSum: contextual sentence relations for extractive summarization (Ren et al., SIGIR 2017)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_tensor
from .._ops import Impl
from ..general import general_attention
from ..modules import ConcatAttention, GeneralAttention, LocationAttention
from ._arms import freeze_uniform
from ._padded import check_choice, check_indices, check_lengths, check_sizes, encode, length_mask


class CRSum(nn.Module):
    r"""How important each sentence of a document is, also by its relation to the sentences around it.

    .. math::
        f_{tj} &= \tanh(conv(x_{tj} \dots x_{t,j+k-1})), \qquad
        s_t = \sum_j softmax_j\big(u \cdot \tanh(W f_{tj} + b)\big) \, f_{tj} \\
        h_1 \dots h_S &= GRU(s_1 \dots s_S) \\
        c^-_t &= \sum_{i = t-n}^{t-1} softmax_i(score(h_t, h_i)) \, h_i, \qquad
        c^+_t = \sum_{i = t+1}^{t+n} softmax_i(score(h_t, h_i)) \, h_i \\
        y_t &= MLP\big([s_t; \cos(c^-_t, s_t); \cos(c^+_t, s_t); features_t]\big)

    with ``sides="apart"``; ``"together"`` has one context :math:`c_t` over :math:`0 < |i - t| \le n`. A side without
    sentences is 0, and so is its relation.

    **The exact equations of the paper could not be had**: this is a reading of its summary and of public code. Open
    are the score (an option; that of the words is the survey's location score, where public code has the cosine with
    a maximum over the words), whether the sides are apart (an option), the encoder of the window (here one GRU along
    the document, whose states also know what was before the window) and the relation (here the cosine, as in the
    code).

    Parameters
    ----------
    words
        Number of words, all with vectors of their own.
    embed_dim, hidden_dim, attn_dim
        Widths: of the words' vectors, of f, s and h, and of the scores.
    window
        n.
    sides
        ``"apart"`` or ``"together"``.
    score
        ``"concat"``: :math:`v \cdot \tanh(W_q h_t + W_k h_i)`; ``"general"``: :math:`h_t^T W h_i`, both with
        parameters for each side; ``"cosine"``: :math:`\cos(h_t, h_i)`.
    filter_width
        k, the words that the convolution sees: 2 are bigrams. The last of a sentence see zeros behind it.
    features
        Width of further features of a sentence (position, length, ...; CRSum+SF); 0 for none.
    mlp_dim
        Width of the hidden layer of the regression.
    attention
        False: uniform weights.
    impl
        As in `concat_attention`.

    References
    ----------
    Ren et al., Leveraging Contextual Sentence Relations for Extractive Summarization Using a Neural Attention Model,
    SIGIR 2017.

    """

    def __init__(
        self,
        words: int,
        *,
        embed_dim: int = 50,
        hidden_dim: int = 50,
        attn_dim: int = 50,
        window: int = 5,
        sides: str = "apart",
        score: str = "concat",
        filter_width: int = 2,
        features: int = 0,
        mlp_dim: int = 100,
        attention: bool = True,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_sizes(locals(), "words", "embed_dim", "hidden_dim", "attn_dim", "window", "filter_width", "mlp_dim")
        if features:
            check_sizes(locals(), "features")
        check_choice("sides", sides, ("apart", "together"))
        check_choice("score", score, ("concat", "general", "cosine"))
        self.window, self.sides, self.score, self.features = window, sides, score, features
        self.impl, self.attention = impl, attention
        self.windows = [(window, -1), (-1, window)] if sides == "apart" else [(window, window)]
        self.embed = nn.Embedding(words, embed_dim)
        self.conv = nn.Conv1d(embed_dim, hidden_dim, filter_width)
        self.words = LocationAttention(hidden_dim, attn_dim)
        self.encoder = nn.GRU(hidden_dim, hidden_dim, batch_first=True)
        self.attend = nn.ModuleList()
        for _ in self.windows if score != "cosine" else ():
            concat = score == "concat"
            self.attend.append(
                ConcatAttention(hidden_dim, hidden_dim, attn_dim) if concat else GeneralAttention(hidden_dim)
            )
        width = hidden_dim + len(self.windows) + features
        self.regression = nn.Sequential(nn.Linear(width, mlp_dim), nn.ReLU(), nn.Linear(mlp_dim, 1))
        if not attention:
            freeze_uniform(self)

    def sentences(self, words: Tensor, word_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors s ``(B, S, hidden_dim)`` of the sentences, and the weights ``(B, S, W)`` of their words."""
        batch, count, size = words.shape
        mask = length_mask(word_lengths, size).flatten(0, 1)
        x = self.embed(words.flatten(0, 1).masked_fill(~mask, 0)).masked_fill(~mask[..., None], 0)
        if size:  # Conv1d refuses a signal of no length
            x = F.pad(x.transpose(1, 2), (0, self.conv.kernel_size[0] - 1))
            f = self.conv(x).tanh().transpose(1, 2)
        else:
            f = x.new_zeros(batch * count, 0, self.conv.out_channels)
        s, weights = cast("tuple[Tensor, Tensor]", self.words(f, mask=mask, return_weights=True, impl=self.impl))
        return s.view(batch, count, s.shape[-1]), weights.view(batch, count, size)

    def contexts(self, h: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What each sentence sees around it, for each side: vectors ``(B, S, hidden_dim)``, weights ``(B, S, S)``."""
        if self.sides == "together":  # but not itself
            mask = mask[:, None] & ~torch.eye(h.shape[1], dtype=torch.bool, device=h.device)
        vectors, weights = [], []
        for i, window in enumerate(self.windows):
            if self.attend:
                result = self.attend[i](h, h, mask=mask, window=window, return_weights=True, impl=self.impl)
            else:
                unit = F.normalize(h, dim=-1)
                result = general_attention(
                    unit,
                    unit,
                    h,
                    scale=float(self.attention),
                    mask=mask,
                    window=window,
                    return_weights=True,
                    impl=self.impl,
                )
            vectors.append(result[0])
            weights.append(result[1])
        return vectors, weights

    def forward(
        self,
        words: Tensor,
        word_lengths: Tensor,
        lengths: Tensor,
        features: Tensor | None = None,
        *,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Score every sentence.

        Parameters
        ----------
        words
            int ``(B, S, W)``: the words of the sentences of the documents; what is past an end may be anything.
        word_lengths
            int ``(B, S)``: the number of words of each sentence.
        lengths
            int ``(B,)``: the number of sentences of each document.
        features
            ``(B, S, features)``, where the constructor was told of some.
        return_weights
            Return the weights too.

        Returns
        -------
        Tensor or (Tensor, Tensor, Tensor)
            Scores ``(B, S)``, 0 past the end; weights of the words ``(B, S, W)`` and of the contexts
            ``(B, sides, S, S)``, the side before first; 0 past the end too.

        """
        check_indices("words", words, "(B, S, W)", (None, None, None))
        check_lengths("word_lengths", word_lengths, words.shape[:2], words.shape[2])
        check_lengths("lengths", lengths, words.shape[:1], words.shape[1])
        if (features is not None) != (self.features > 0):
            raise ValueError(
                f"features: expected {'a tensor' if self.features else 'None'} with features={self.features} in the "
                f"constructor; got {'None' if features is None else 'a tensor'}"
            )
        mask = length_mask(lengths, words.shape[1])
        s, word_weights = self.sentences(words, word_lengths.masked_fill(~mask, 0))
        contexts, weights = self.contexts(encode(self.encoder, s, lengths), mask)
        parts = [s, *(F.cosine_similarity(c, s, dim=-1)[..., None] for c in contexts)]
        if features is not None:
            check_tensor("features", features, shapes=[("(B, S, features)", (*words.shape[:2], self.features))])
            parts.append(features.masked_fill(~mask[..., None], 0))
        scores = self.regression(torch.cat(parts, -1)).squeeze(-1).masked_fill(~mask, 0)
        if not return_weights:
            return scores
        return scores, word_weights, torch.stack(weights, 1).masked_fill(~mask[:, None, :, None], 0)
