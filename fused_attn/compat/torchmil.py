"""torchmil: its attention pooling, alone and in its models, on `location_attention`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchmil.nn import AttentionPool as _AttentionPool
from torchmil.nn import LazyLinear

from ..location import location_attention
from ..statistics import statistics_pooling
from ._replacement import Registry, Replacement, why_not_read

_ACTIVATIONS = {nn.Tanh: "tanh", nn.ReLU: "relu", nn.GELU: "gelu"}


class AttentionPool(Replacement, _AttentionPool):
    """Attention of instances, gated or not, by location_attention; also in ABMIL, CLAM_SB and other models.

    The library's own forward runs for what is no bag (B, N, D) with a mask (B, N), at the first call of lazy layers,
    and where the weights of a layer may not be read. A bag of which nothing is visible gives zeros, there NaN.
    """

    def forward(self, X: Tensor, mask: Tensor | None = None, return_att: bool = False) -> Any:
        """As the library's."""
        bags = self.takes(X) and X.dim() == 3
        if not (bags and (mask is None or _is_mask(mask, X))) or _refusal(self, lazy=False) is not None:
            return super().forward(X, mask, return_att)
        layers = self.fc1.module, *([self.fc_gated.module] if self.gated else [])
        read = [(layer.weight, layer.bias) for layer in layers]  # once: a parametrisation may change by being read
        score = self.fc2.weight
        if not self.takes(X, score, *(x for pair in read for x in pair if x is not None)):
            return super().forward(X, mask, return_att)
        (w, b), *gates = [(weight.t(), bias) for weight, bias in read]
        visible = None if mask is None else mask != 0
        # The library's scores are of hidden instances too, ours are not: with a mask they are made without it.
        alone = return_att and visible is not None
        result: Any = location_attention(
            X,
            w,
            b,
            score[0],
            gate=gates[0] if gates else None,
            value=False if alone else None,
            activation=_ACTIVATIONS[type(self.act_layer)],
            mask=None if alone else visible,
            return_scores=return_att,
        )
        if not return_att:
            return result
        if alone:
            result = statistics_pooling(X, score_bias=result, mask=visible, deviation=False), result
        z, scores = result
        return z, scores.to(z.dtype)


def _is_mask(mask: object, bags: Tensor) -> bool:
    return type(mask) is Tensor and mask.shape == bags.shape[:2] and mask.device == bags.device


def _refusal(pool: _AttentionPool, *, lazy: bool = True) -> str | None:
    """Why a pool cannot be replaced, or a call of a replaced one, which may have changed, be ours.

    lazy: whether layers may be without weights yet, which their first call makes.
    """
    for name in ("fc1", *(["fc_gated"] if pool.gated else [])):
        wrapper = getattr(pool, name)
        why = why_not_read(name, wrapper, (LazyLinear,))
        if why is None and not (lazy and type(wrapper.module) is nn.LazyLinear):
            why = why_not_read(f"{name}.module", wrapper.module, (nn.Linear,))
        if why is not None:
            return why
    if pool.gated and (why := why_not_read("act_gated", pool.act_gated, (nn.Sigmoid,))):
        return why
    if why := why_not_read("fc2", pool.fc2, (nn.Linear,)) or why_not_read(
        "act_layer", pool.act_layer, tuple(_ACTIVATIONS)
    ):
        return why
    if isinstance(pool.act_layer, nn.GELU) and pool.act_layer.approximate != "none":
        return f"act_layer is an approximate GELU ({pool.act_layer.approximate}): only the exact one is there"
    if pool.fc2.bias is not None or pool.fc2.out_features != 1:
        return "fc2 has a bias or more outputs than one, as none of the library has"
    return None


REGISTRY: Registry = {_AttentionPool: (AttentionPool, _refusal)}
