"""Attentive statistics pooling as a module."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .._checks import check_activation, check_flag, weight_of, width_of
from .._habits import explicit
from .._ops import Impl, exports_from_one
from ..segments import Offsets, as_offsets
from ..statistics import check_limits, statistics_pooling
from ._layers import Attention, counts, factory, optional_counts, read
from .location import check_module_inputs


class StatisticsPooling(Attention):
    r"""Mean and standard deviation of the frames, weighted by an attention, see `statistics_pooling`.

    .. math:: u_j = act(W h_j + b \; [+ \; U [\mu; \sigma]]), \quad \alpha_{jc} = softmax_j(u_j \cdot v_c)

    Parameters
    ----------
    dim
        Width D of the frames.
    attn_dim
        Width A of the score.
    per_channel
        One weight a frame and channel (ECAPA-TDNN) in place of one a frame.
    hops
        Number R of weights a frame, each for all channels alike, and so of statistics; None for one. Not with
        `per_channel`.
    global_context
        Let the score see the mean and standard deviation over all frames (ECAPA-TDNN): they are the same for all
        frames of a sequence, so their product with U is made once a sequence and added to that of every frame.
    activation
        identity, tanh, relu, sigmoid, leaky_relu, elu, gelu or silu. ECAPA-TDNN's published code has more here, a
        relu and a batch norm before the tanh: that is not in this module, `statistics_pooling` without `w` takes it.
    bias
        The bias b.
    deviation, correction, floor, ceiling, eps
        As in `statistics_pooling`; of the global context too, which has both statistics.
    device, dtype
        Of the parameters, as `torch.nn.Linear` has them.

    Raises
    ------
    ValueError, TypeError
        For a size under 1, an unknown activation, and limits that `statistics_pooling` refuses.

    """

    _shown = ("per_channel", "hops", "activation", "deviation", "correction", "floor", "ceiling", "eps")

    def __init__(
        self,
        dim: int,
        attn_dim: int,
        *,
        per_channel: bool = False,
        hops: int | None = None,
        global_context: bool = False,
        activation: str = "tanh",
        bias: bool = True,
        deviation: bool = True,
        correction: float = 0.0,
        floor: float = 1e-12,
        ceiling: float | None = None,
        eps: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dim, attn_dim = counts(dim=dim, attn_dim=attn_dim)
        [hops] = optional_counts(hops=hops)
        per_channel, bias = check_flag("per_channel", per_channel), check_flag("bias", bias)
        global_context = check_flag("global_context", global_context)
        if per_channel and hops is not None:
            raise ValueError(f"hops: expected None with per_channel, which has a weight a channel; got {hops}")
        check_activation("activation", activation)
        deviation = check_flag("deviation", deviation)
        check_limits(floor, ceiling, eps, correction, torch.float32)
        super().__init__()
        made = factory(device, dtype)
        self.per_channel, self.hops, self.activation, self.deviation = per_channel, hops, activation, deviation
        self.correction, self.floor, self.ceiling, self.eps = correction, floor, ceiling, eps
        self.proj = nn.Linear(dim, attn_dim, bias=bias, **made)
        self.context = nn.Linear(2 * dim, attn_dim, bias=False, **made) if global_context else None
        self.score = nn.Linear(attn_dim, dim if per_channel else hops or 1, bias=False, **made)

    @explicit
    @exports_from_one
    def forward(
        self,
        h: Tensor,
        *,
        score_bias: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Offsets | None = None,
        return_weights: bool = False,
        return_log_weights: bool = False,
        return_scores: bool = False,
        return_lse: bool = False,
        impl: Impl = "auto",
    ) -> Tensor | tuple[Tensor, ...]:
        """Pool `h` to ``[mean; std]``, ``(B, 2D)``, or to the mean; the rest is as in `statistics_pooling`.

        With hops ``(B, R, 2D)``.
        """
        cu_seqlens = as_offsets(cu_seqlens)
        check_module_inputs(h, None, cu_seqlens, weight_of(self.proj), width_of(self.proj), None)
        limits = {name: getattr(self, name) for name in ("correction", "floor", "ceiling", "eps")}
        context = None
        if self.context is not None:
            of_all = statistics_pooling(h, mask=mask, cu_seqlens=cu_seqlens, **limits, impl=impl)
            statistics = cast("tuple[Tensor, ...]", of_all)
            context = self.context(torch.cat(statistics, dim=-1))
            if cu_seqlens is not None:
                context = context[:, None]  # one a sequence, said so: there may be as many sequences as rows
        proj, score = read("proj", self.proj), read("score", self.score).weight
        results = statistics_pooling(
            h,
            proj.weight.t(),
            proj.bias,
            score[0] if self.hops is None and not self.per_channel else score.t(),
            context=context,
            score_bias=score_bias,
            hops=self.hops,
            activation=self.activation,
            mask=mask,
            cu_seqlens=cu_seqlens,
            return_weights=return_weights,
            return_log_weights=return_log_weights,
            return_scores=return_scores,
            return_lse=return_lse,
            deviation=self.deviation,
            **limits,
            impl=impl,
        )
        if not self.deviation:
            return results
        mean, std, *more = results
        pooled = torch.cat([mean, std], dim=-1)
        return (pooled, *more) if more else pooled
