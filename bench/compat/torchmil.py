"""torchmil: one bag, alone and with a mask, and a batch of padded bags."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchmil.models import ABMIL
from torchmil.nn import AttentionPool

from .case import Case, normal


def _pool(bags: int = 1, instances: int = 4_000, *, masked: bool = False, **options: Any) -> Case:
    """Instances of 512, of which with a mask a quarter to all are visible."""

    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        lengths = torch.linspace(instances / 4, instances, bags + 1).long()[1:] if bags > 1 else torch.tensor([3_000])
        mask = (torch.arange(instances) < lengths[:, None],) if masked else ()
        return AttentionPool(512, 128, **options), (normal(bags, instances, 512), *mask)

    return make


CASES: dict[str, Case] = {
    "AttentionPool": _pool(),
    "AttentionPool, relu": _pool(act="relu"),
    "AttentionPool, mask": _pool(masked=True),
    "AttentionPool, gated, mask": _pool(masked=True, gated=True),
    "AttentionPool, gated, padded bags": _pool(8, 1_000, masked=True, gated=True),
    "ABMIL, gated": lambda: (ABMIL((512,), 128, gated=True), (normal(1, 4_000, 512),)),
}
