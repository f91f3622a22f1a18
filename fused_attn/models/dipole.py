"""Dipole: diagnosis prediction from a patient's visits (Ma et al., KDD 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import check_tensor
from .._ops import Impl
from ..modules import ConcatAttention, GeneralAttention, LocationAttention
from ._arms import freeze_uniform
from ._padded import check_choice, check_lengths, check_sizes, encode, length_mask


class Dipole(nn.Module):
    r"""The codes of the next visit, from attention over the states of the earlier ones.

    A visit is a vector x_t of the codes that were given (0 or 1):

    .. math::
        v_t &= relu(W_v x_t + b_v), \qquad h_1 \dots h_T = GRU(v_1 \dots v_T) \\
        s_{ti} &= w_\alpha \cdot h_i + b  \qquad (location) \\
        s_{ti} &= h_t^T W_\alpha h_i  \qquad (general) \\
        s_{ti} &= v_\alpha \cdot \tanh(W_\alpha [h_t; h_i])  \qquad (concat) \\
        c_t &= \sum_{i < t} softmax_i(s_{ti}) \, h_i, \qquad
        \tilde h_t = \tanh(W_c [c_t; h_t]), \qquad \hat y_t = softmax(W_s \tilde h_t + b_s)

    :math:`c_1 = 0`: before the first visit there is none to attend to. `forward` returns the logits.

    Parameters
    ----------
    codes, labels
        Number of codes in a visit, and of what is predicted.
    embed_dim, hidden_dim
        Widths of v, and of the GRU in each direction.
    output_dim
        Width of :math:`\tilde h`; that of the states where None.
    score
        ``"location"``, ``"general"`` or ``"concat"``: the paper has all three.
    attn_dim
        Width of the concat score; that of the states where None.
    strict
        The paper's i < t. Much public code attends to i <= t: False.
    bidirectional
        As in the paper. The mask then hides later *states*, but not later visits: the backward GRU carries them into
        every earlier state, :math:`h_t` included. So the output at t is a prediction only where the history ends at
        t, at the last position of each sequence; for predictions at every t of one long history take False.
    attention
        False: uniform weights.
    impl
        As in `concat_attention`.

    References
    ----------
    Ma et al., Dipole: Diagnosis Prediction in Healthcare via Attention-based Bidirectional Recurrent Neural
    Networks, KDD 2017.

    """

    def __init__(
        self,
        codes: int,
        labels: int,
        *,
        embed_dim: int = 128,
        hidden_dim: int = 128,
        output_dim: int | None = None,
        score: str = "concat",
        attn_dim: int | None = None,
        strict: bool = True,
        bidirectional: bool = True,
        attention: bool = True,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_sizes(locals(), "codes", "labels", "embed_dim", "hidden_dim", "output_dim", "attn_dim")
        check_choice("score", score, ("location", "general", "concat"))
        self.score, self.impl = score, impl
        self.window = (None, -1 if strict else 0)
        width = 2 * hidden_dim if bidirectional else hidden_dim
        output_dim = output_dim or width
        self.embed = nn.Linear(codes, embed_dim)
        self.encoder = nn.GRU(embed_dim, hidden_dim, batch_first=True, bidirectional=bidirectional)
        self.attend: LocationAttention | GeneralAttention | ConcatAttention
        if score == "location":
            self.attend = LocationAttention(width, activation="identity")
        elif score == "general":
            self.attend = GeneralAttention(width)
        else:
            self.attend = ConcatAttention(width, width, attn_dim or width)
        self.combine = nn.Linear(2 * width, output_dim, bias=False)
        self.output = nn.Linear(output_dim, labels)
        if not attention:
            freeze_uniform(self)

    def forward(
        self, visits: Tensor, lengths: Tensor, *, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict after every visit.

        Parameters
        ----------
        visits
            ``(B, T, codes)``; past the end of a history anything, also NaN.
        lengths
            int ``(B,)``: the number of visits of each patient.
        return_weights
            Return the weights too.

        Returns
        -------
        Tensor or (Tensor, Tensor)
            Logits ``(B, T, labels)``, without meaning past the end; weights ``(B, T, T)``.

        """
        check_tensor("visits", visits, shapes=[("(B, T, codes)", (None, None, self.embed.in_features))])
        check_lengths("lengths", lengths, visits.shape[:1], visits.shape[1])
        mask = length_mask(lengths, visits.shape[1])
        visits = visits.masked_fill(~mask[..., None], 0)
        h = encode(self.encoder, self.embed(visits).relu(), lengths)
        structure = {"mask": mask, "window": self.window, "return_weights": return_weights, "impl": self.impl}
        if isinstance(self.attend, LocationAttention):
            result = self.attend(h, **structure)
        else:
            result = self.attend(h, h, **structure)
        context, weights = result if return_weights else (result, None)
        logits: Tensor = self.output(self.combine(torch.cat([context, h], -1)).tanh())
        return logits if weights is None else (logits, weights)
