"""ACF, attentive collaborative filtering (Chen et al. 2017): attention over a user's items and their components."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._checks import check_tensor
from .._ops import Impl
from ..location import location_attention
from ..modules import LocationAttention
from ._arms import freeze_uniform
from ._padded import check_choice, check_indices, check_sizes


class ACFWeights(NamedTuple):
    """The weights of one call."""

    items: Tensor
    """α over the history, ``(B, L)``."""
    components: Tensor
    """β over the components of each of its items, ``(B, L, M)``."""


class ACF(nn.Module):
    r"""Scores of items for a user, from the items that the user has chosen before and what is in them.

    As the paper has it (``form="paper"``), with φ = relu:

    .. math::
        \beta = softmax_m(w_2 \cdot φ(W_{2u} u + W_{2x} x_{lm} + b_2)), \quad \bar x_l = \sum_m \beta_m x_{lm} \\
        \alpha = softmax_l(w_1 \cdot φ(W_{1u} u + W_{1v} v_l + W_{1p} p_l + W_{1x} \bar x_l + b_1)) \\
        \hat R_j = (u + \sum_l \alpha_l p_l) \cdot v_j

    The author's code (``form="code"``) differs: what is summed are the projected components, it scores the items of
    the history by u and :math:`\bar x_l` alone, and it sums :math:`\bar x_l` where the paper has :math:`p_l`:

    .. math::
        \bar x_l = \sum_m \beta_m W_{2x} x_{lm}, \quad
        \alpha = softmax_l(w_1 \cdot φ(W_{1u} u + W_{1x} \bar x_l + b_1)), \quad
        \hat R_j = (u + \sum_l \alpha_l \bar x_l) \cdot v_j

    So in the code's form the history reaches the score by its content, in the paper's by vectors of its items. There,
    components steer only α. An empty history contributes zero. Whether it holds the item to be scored (in training,
    the paper's R(i) does) is for the caller to say.

    Parameters
    ----------
    num_users, num_items
        Rows of u, and of v and p.
    component_dim
        Width of a component x.
    dim
        Width of u, v and p.
    attn_dim
        Width of both scores; `dim` where None. The code's form sums vectors of that width, so it has no other.
    form
        ``"paper"`` or ``"code"``.
    attention
        False: α and β are uniform over what is visible.
    impl
        As in `location_attention`.

    References
    ----------
    Chen, Zhang, He, Nie, Liu, Chua: Attentive Collaborative Filtering, SIGIR 2017; github.com/ChenJingyuan91/ACF.

    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        component_dim: int,
        dim: int,
        *,
        attn_dim: int | None = None,
        form: str = "paper",
        attention: bool = True,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_sizes(locals(), "num_users", "num_items", "component_dim", "dim", "attn_dim")
        check_choice("form", form, ("paper", "code"))
        attn_dim = dim if attn_dim is None else attn_dim
        if form == "code" and attn_dim != dim:
            raise ValueError(f"attn_dim: expected dim = {dim} with form='code'; got {attn_dim}")
        self.form, self.attention, self.impl = form, attention, impl
        self.users, self.items = nn.Embedding(num_users, dim), nn.Embedding(num_items, dim)  # u, v
        self.auxiliary = nn.Embedding(num_items, dim) if form == "paper" else None  # p
        for table in (self.users, self.items, self.auxiliary):
            if table is not None:  # unit variance would make the first scores as wide as sqrt(dim)
                nn.init.normal_(table.weight, std=0.1)
        self.attend_components = LocationAttention(component_dim, attn_dim, activation="relu", context_dim=dim)
        width = 2 * dim + component_dim if form == "paper" else dim
        self.attend_items = LocationAttention(width, attn_dim, activation="relu", context_dim=dim)
        if not attention:
            freeze_uniform(self)

    def forward(
        self,
        users: Tensor,
        items: Tensor,
        history: Tensor,
        components: Tensor,
        *,
        history_mask: Tensor | None = None,
        component_mask: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, ACFWeights]:
        """Score `items` for `users`.

        Parameters
        ----------
        users
            Indices ``(B,)``.
        items
            Indices ``(B,)``, or ``(B, J)`` for J items a user.
        history
            Indices of the items that the users have chosen, ``(B, L)``.
        components
            What is in them, ``(B, L, M, component_dim)``.
        history_mask, component_mask
            bool ``(B, L)`` and ``(B, L, M)``, True for what is there. What is masked may be NaN, or no index.
        return_weights
            Return α and β too.

        Returns
        -------
        Tensor or (Tensor, ACFWeights)
            Scores ``(B,)`` or ``(B, J)``.

        """
        check_indices("users", users, "(B,)", (None,))
        batch = users.shape[0]
        single = items.dim() == 1
        check_indices("items", items, "(B,) or (B, J)", (batch,) if single else (batch, None))
        check_indices("history", history, "(B, L)", (batch, None))
        length = history.shape[1]
        width = self.attend_components.proj.in_features
        shape = ("(B, L, M, component_dim)", (batch, length, None, width))
        check_tensor("components", components, shapes=[shape])
        inner = (batch, length, components.shape[2])
        bools = (torch.bool,)
        if history_mask is None:
            history_mask = torch.ones(batch, length, dtype=torch.bool, device=history.device)
        check_tensor("history_mask", history_mask, shapes=[("(B, L)", (batch, length))], dtypes=bools)
        if component_mask is not None:
            check_tensor("component_mask", component_mask, shapes=[("(B, L, M)", inner)], dtypes=bools)
        shown = history_mask[..., None].expand(inner)
        shown = shown if component_mask is None else shown & component_mask

        u = self.users(users)
        content, beta = self._attend_components(u, components.flatten(0, 1), shown.flatten(0, 1))
        content = content.unflatten(0, (batch, length))
        keys = values = content
        if self.auxiliary is not None:
            chosen = history.masked_fill(~history_mask, 0)
            values = self.auxiliary(chosen)
            keys = torch.cat([self.items(chosen), values, content], -1)
        taste, alpha = self.attend_items(
            keys, context=u, value=values, mask=history_mask, return_weights=True, impl=self.impl
        )
        targets = self.items(items[:, None] if single else items)
        scores = (targets @ (u + taste)[..., None])[..., 0]
        scores = scores[:, 0] if single else scores
        return (scores, ACFWeights(alpha, beta.unflatten(0, (batch, length)))) if return_weights else scores

    def _attend_components(self, u: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x̄ of each item ``(B·L, ...)``, and β ``(B·L, M)``."""
        part = self.attend_components
        each = u.repeat_interleave(x.shape[0] // max(1, u.shape[0]), 0)
        if self.form == "paper":
            return part(x, context=each, mask=mask, return_weights=True, impl=self.impl)
        assert part.context is not None
        assert part.score is not None
        # What is summed is what is scored, so it is projected once, and the masked rows before they meet W: 0 · NaN.
        projected = nn.functional.linear(x.masked_fill(~mask[..., None], 0), part.proj.weight)
        pooled, weights = location_attention(
            projected,
            None,
            part.proj.bias,
            part.score.weight[0],
            context=part.context(each),
            activation="relu",
            mask=mask,
            return_weights=True,
            impl=self.impl,
        )
        return pooled, weights

    def extra_repr(self) -> str:
        """Options that the submodules do not show."""
        return f"form={self.form!r}, attention={self.attention}, impl={self.impl!r}"


def bpr_loss(positive: Tensor, negative: Tensor, parameters: Iterable[Tensor] = (), l2: float = 0.0) -> Tensor:
    r"""Bayesian personalised ranking: :math:`mean(-\ln σ(\hat R_i - \hat R_k)) + l2 \sum \|θ\|^2`.

    Parameters
    ----------
    positive, negative
        Scores of items that the users chose and of items that they did not, of one shape.
    parameters, l2
        What is regularised, and how much.

    Returns
    -------
    Tensor
        A number.

    """
    loss = -nn.functional.logsigmoid(positive - negative).mean()
    return loss + l2 * sum(x.square().sum() for x in parameters) if l2 else loss
