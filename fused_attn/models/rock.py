"""Descriptions of rock from well logs, with attention over depths and over variables (KDD 2017)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .._checks import check_tensor
from .._ops import Impl
from ..modules import HierarchicalAttention
from ._arms import freeze_uniform
from ._padded import check_lengths, check_sizes, encode, length_mask


class Rock(nn.Module):
    r"""Classes of rock from n variables (log curves), each a series over depth.

    .. math::
        h_{k,1} \dots h_{k,T_k} &= RNN_k(log_{k,1} \dots log_{k,T_k}) \\
        x_k &= \sum_i softmax_i\big(v_1 \cdot \tanh(W_1 h_{k,i} + b_1 + U_1 z)\big) \, h_{k,i} \\
        c &= \sum_k softmax_k\big(v_2 \cdot \tanh(W_2 x_k + b_2 + U_2 z)\big) \, x_k, \qquad
        logits = W_o [c; z] + b_o

    There is no RNN between the levels. Without a query there is no z in any of the formulas. A variable that was not
    logged (no depth) has no weight, and a well without any has c = 0.

    **The exact equations of the paper could not be had**: the survey calls both levels location-based, which is
    ``query_dim=None``; a related patent conditions both on the last state z of the decoder that words the
    description, which is the query. That a level has one set of score parameters for all variables, and that the
    RNN is a GRU, is our reading.

    Parameters
    ----------
    variables, classes
        n, and the number of logits: words or classes.
    hidden_dim, attn_dim
        Widths of the GRU in each direction, and of both scores.
    query_dim
        Width of z; None for no query.
    shared
        One GRU for all variables; False for one each.
    attention
        False: uniform weights.
    impl
        As in `hierarchical_attention`.

    References
    ----------
    Tong et al., Learning to Generate Rock Descriptions from Multivariate Well Logs with Hierarchical Attention,
    KDD 2017.

    """

    def __init__(
        self,
        variables: int,
        classes: int,
        *,
        hidden_dim: int = 64,
        attn_dim: int = 64,
        query_dim: int | None = None,
        shared: bool = False,
        attention: bool = True,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_sizes(locals(), "variables", "classes", "hidden_dim", "attn_dim", "query_dim")
        self.variables, self.query_dim, self.impl = variables, query_dim, impl
        self.encoders = nn.ModuleList(
            nn.GRU(1, hidden_dim, batch_first=True, bidirectional=True) for _ in range(1 if shared else variables)
        )
        width = 2 * hidden_dim
        self.attend = HierarchicalAttention(
            width, attn_dim, attn_dim, inner_context_dim=query_dim, outer_context_dim=query_dim
        )
        self.output = nn.Linear(width + (query_dim or 0), classes)
        if not attention:
            freeze_uniform(self)

    def encode(self, logs: Tensor, lengths: Tensor) -> Tensor:
        """States ``(B, n, T, 2 * hidden_dim)``, zero past the end."""
        if len(self.encoders) == 1:
            h = encode(cast("nn.GRU", self.encoders[0]), logs.flatten(0, 1)[..., None], lengths.flatten())
            return h.unflatten(0, logs.shape[:2])
        each = zip(self.encoders, logs.unbind(1), lengths.unbind(1), strict=True)
        return torch.stack([encode(cast("nn.GRU", rnn), x[..., None], n) for rnn, x, n in each], 1)

    def forward(
        self, logs: Tensor, lengths: Tensor, query: Tensor | None = None, *, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Classify wells.

        Parameters
        ----------
        logs
            ``(B, n, T)``; past the end of a series anything, also NaN.
        lengths
            int ``(B, n)``: the number of depths at which each variable was logged.
        query
            z ``(B, query_dim)``, where the constructor was told of one.
        return_weights
            Return the weights too.

        Returns
        -------
        Tensor or (Tensor, Tensor, Tensor)
            Logits ``(B, classes)``; weights of the depths ``(B, n, T)`` and of the variables ``(B, n)``.

        """
        check_tensor("logs", logs, shapes=[("(B, n, T)", (None, self.variables, None))])
        check_lengths("lengths", lengths, logs.shape[:2], logs.shape[2])
        if (query is None) != (self.query_dim is None):
            wanted, given = ("None" if x is None else "a tensor" for x in (self.query_dim, query))
            raise ValueError(f"query: expected {wanted} with query_dim={self.query_dim}; got {given}")
        wells = logs.shape[0]
        inside = length_mask(lengths, logs.shape[2])
        rows = self.encode(logs, lengths)[inside]  # depth after depth, variable after variable, well after well
        inner = torch.cat([lengths.new_zeros(1), lengths.flatten().cumsum(0)]).int()
        outer = torch.arange(wells + 1, device=logs.device, dtype=torch.int32) * self.variables
        contexts: dict[str, Tensor] = {}
        if query is not None:
            check_tensor("query", query, shapes=[("(B, query_dim)", (wells, self.query_dim))])
            contexts["inner_context"] = query.repeat_interleave(self.variables, 0)[:, None]  # one a variable
            contexts["outer_context"] = query[:, None]
        result = self.attend(rows, inner, outer, **contexts, return_weights=return_weights, impl=self.impl)
        c = result.out if return_weights else result
        logits: Tensor = self.output(c if query is None else torch.cat([c, query], -1))
        if not return_weights:
            return logits
        weights = result.inner_weights  # under autocast of another dtype than the logs
        depths = weights.new_zeros(inside.shape).masked_scatter(inside, weights)
        return logits, depths, result.outer_weights.view(wells, self.variables)
