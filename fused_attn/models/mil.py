"""Attention-based multiple-instance learning (Ilse, Tomczak and Welling 2018)."""

from __future__ import annotations

from torch import Tensor, nn

from .._ops import Impl
from ..modules import LocationAttention
from ._arms import freeze_uniform
from ._padded import check_sizes


class GatedMIL(nn.Module):
    r"""Classify bags of instances by gated attention pooling.

    .. math:: h_k = f(x_k), \quad s_k = w^T (\tanh(V h_k + b) \odot \sigma(U h_k + c)), \quad
        z = \sum_k softmax_k(s_k) \, h_k, \quad logit = W_o z + b_o

    The paper has no biases b and c, its public code has them. The code's bias after w is left out: the softmax
    cancels it. Without the gate it is the paper's plain attention.

    Parameters
    ----------
    encoder
        f: instances ``(N, ...)`` -> ``(N, dim)``.
    dim, attn_dim
        Width of the encoded instances, and of the score. The paper has 500 and 128.
    classes
        Number of logits; 1 for a binary label.
    gated
        Whether there is the gate :math:`\sigma(U h + c)`.
    bias
        Whether there are b and c.
    activation, gate_activation
        In place of tanh and of the sigmoid.
    attention
        False: the mean over the bag.
    impl
        As in `location_attention`.

    """

    def __init__(
        self,
        encoder: nn.Module,
        dim: int = 500,
        attn_dim: int = 128,
        classes: int = 1,
        *,
        gated: bool = True,
        bias: bool = True,
        activation: str = "tanh",
        gate_activation: str = "sigmoid",
        attention: bool = True,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_sizes(locals(), "classes")
        self.impl: Impl = impl
        self.encoder = encoder
        self.pooling = LocationAttention(
            dim, attn_dim, gated=gated, bias=bias, activation=activation, gate_activation=gate_activation
        )
        self.head = nn.Linear(dim, classes)
        if not attention:
            freeze_uniform(self)

    def forward(
        self, instances: Tensor, cu_seqlens: Tensor, *, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of ragged bags.

        Parameters
        ----------
        instances
            ``(N, ...)``, one bag after the other.
        cu_seqlens
            int32 ``(S + 1,)``: bag s is the instances ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``. It may be empty:
            then z is zero.
        return_weights
            Return the weight of each instance in its bag too.

        Returns
        -------
        Tensor or (Tensor, Tensor)
            Logits ``(S, classes)``; weights ``(N,)``.

        """
        h = self.encoder(instances)
        z, weights = self.pooling(h, cu_seqlens=cu_seqlens, return_weights=True, impl=self.impl)
        logits = self.head(z)
        return (logits, weights) if return_weights else logits
