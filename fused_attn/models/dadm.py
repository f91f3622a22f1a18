"""DADM, dynamic attention over the models of earlier days (Wang, Yu et al. 2017): which articles an editor picks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import check_tensor
from .._ops import Impl
from ..location import location_attention
from ..modules import ConcatAttention, LocationAttention
from ._arms import freeze_uniform
from ._padded import check_choice, check_indices, check_sizes


class DADM(nn.Module):
    r"""One prediction of M: the models are weighted by the article's content, and by its day and category.

    .. math::
        a^1 = softmax_m(score(x, k_m)), \quad a^2 = softmax_m(T_{day, m} + C_{category, m}) \\
        a = \lambda a^1 + (1 - \lambda) a^2, \quad \hat y = \sum_m a_m p_m

    **Open**: the exact equations could not be had. What is known is that models trained on earlier days are combined
    by weights with a content part and a part for time and category. The forms here are our reading:

    - `score`: ``"concat"`` is :math:`v \cdot \tanh(W_x x + W_k k_m + b)` of the article x and a vector k_m a model;
      ``"location"`` is :math:`v \cdot \tanh(W_k k_m + b)` of what each model made of the article, `states`.
    - `combine`: ``"mixture"`` is the formula above with :math:`\lambda = \sigma(l)`, l learned, 1/2 at the start;
      ``"product"`` adds the log-prior to the content scores, so that a is proportional to :math:`a^1 a^2`. There is
      no λ then: v, T and C have scales of their own.

    T and C start at zero: a uniform prior.

    Parameters
    ----------
    num_models
        M.
    content_dim
        Width of the article x.
    attn_dim
        Width of the content score.
    score, combine
        See above.
    state_dim
        Width of `states`, which the location score needs; None where the vector k_m of a model is learned, and the
        same for every article.
    num_times, num_categories
        How many days (of a week, say) and categories the prior tells apart.
    attention
        False: the mean of the predictions that are there.
    impl
        As in `location_attention`.

    References
    ----------
    Wang, Yu, Ren, Tao, Zhang, Yu, Wang: Dynamic Attention Deep Model for Article Recommendation by Learning Human
    Editors' Demonstration, KDD 2017.

    """

    def __init__(
        self,
        num_models: int,
        content_dim: int,
        attn_dim: int,
        *,
        score: str = "concat",
        combine: str = "mixture",
        state_dim: int | None = None,
        num_times: int = 1,
        num_categories: int = 1,
        attention: bool = True,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_sizes(locals(), "num_models", "content_dim", "attn_dim", "state_dim", "num_times", "num_categories")
        check_choice("score", score, ("concat", "location"))
        check_choice("combine", combine, ("mixture", "product"))
        if score == "location" and state_dim is None:
            raise ValueError("state_dim: expected a width with score='location', which sees nothing else; got None")
        self.score, self.combine, self.attention, self.impl = score, combine, attention, impl
        self.content_dim, self.state_dim = content_dim, state_dim
        key_dim = attn_dim if state_dim is None else state_dim
        self.keys = nn.Parameter(torch.randn(num_models, key_dim)) if state_dim is None else None
        self.attend: ConcatAttention | LocationAttention = (
            ConcatAttention(content_dim, key_dim, attn_dim, bias=True)
            if score == "concat"
            else LocationAttention(key_dim, attn_dim)
        )
        self.times, self.categories = nn.Embedding(num_times, num_models), nn.Embedding(num_categories, num_models)
        nn.init.zeros_(self.times.weight)
        nn.init.zeros_(self.categories.weight)
        self.mix = nn.Parameter(torch.zeros(())) if combine == "mixture" else None
        if not attention:
            freeze_uniform(self)

    def forward(
        self,
        content: Tensor,
        predictions: Tensor,
        times: Tensor,
        categories: Tensor,
        *,
        states: Tensor | None = None,
        mask: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Combine the models' predictions.

        Parameters
        ----------
        content
            Articles ``(B, content_dim)``; the location score does not look at them.
        predictions
            ``(B, M)``, or ``(B, M, C)`` for C classes: probabilities, say. Their combination is convex.
        times, categories
            Integers ``(B,)``.
        states
            ``(B, M, state_dim)``, with `state_dim` only: the models' own vectors of the article.
        mask
            bool ``(B, M)``, True where there is a model. What is masked may be NaN.
        return_weights
            Return a too.

        Returns
        -------
        Tensor or (Tensor, Tensor)
            ``(B,)`` or ``(B, C)``, 0 for an article without a model; weights ``(B, M)``.

        """
        check_tensor("content", content, shapes=[("(B, content_dim)", (None, self.content_dim))])
        batch, models = content.shape[0], self.times.embedding_dim
        flat = predictions.dim() == 2
        shapes = [("(B, M)", (batch, models)), ("(B, M, C)", (batch, models, None))]
        check_tensor("predictions", predictions, shapes=shapes)
        check_indices("times", times, "(B,)", (batch,))
        check_indices("categories", categories, "(B,)", (batch,))
        if mask is not None:
            check_tensor("mask", mask, shapes=shapes[:1], dtypes=(torch.bool,))
        values = predictions[..., None] if flat else predictions
        keys = self._keys(states, batch, mask)
        log_prior = self.times(times) + self.categories(categories)
        if not self.attention:
            log_prior = log_prior * 0
        added = log_prior if self.combine == "product" else None

        if isinstance(self.attend, ConcatAttention):
            out, weights = self.attend(
                content[:, None],
                keys,
                values,
                mask=mask,
                return_weights=True,
                impl=self.impl,
                score_bias=None if added is None else added[:, None],
            )
            out, weights = out[:, 0], weights[:, 0]
        else:
            out, weights = self.attend(
                keys, value=values, mask=mask, score_bias=added, return_weights=True, impl=self.impl
            )
        if self.mix is not None:
            share = torch.sigmoid(self.mix)
            # The prior is attention too, and its scores are the keys: one number a model.
            prior, prior_weights = location_attention(
                log_prior[..., None],
                log_prior.new_ones(1),
                value=values,
                activation="identity",
                mask=mask,
                return_weights=True,
                impl=self.impl,
            )
            out, weights = share * out + (1 - share) * prior, share * weights + (1 - share) * prior_weights
        out = out[..., 0] if flat else out
        return (out, weights) if return_weights else out

    def _keys(self, states: Tensor | None, batch: int, mask: Tensor | None) -> Tensor:
        """What stands for each model, ``(B, M, key_dim)``."""
        if self.keys is not None:
            if states is not None:
                raise ValueError("states: expected None without state_dim; got a tensor")
            return self.keys.expand(batch, -1, -1)
        if states is None:
            raise ValueError(f"states: expected a tensor of width state_dim = {self.state_dim}; got None")
        models = self.times.embedding_dim
        check_tensor("states", states, shapes=[("(B, M, state_dim)", (batch, models, self.state_dim))])
        # They meet a projection before the mask: 0 · NaN would reach its gradient.
        return states if mask is None else states.masked_fill(~mask[..., None], 0)

    def extra_repr(self) -> str:
        """Options that the submodules do not show."""
        options = f"score={self.score!r}, combine={self.combine!r}"
        return f"{options}, attention={self.attention}, impl={self.impl!r}"
