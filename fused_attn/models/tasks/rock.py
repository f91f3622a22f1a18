"""Well logs, generated: noisy curves, of which one shows, at some depth, the shape that names the facies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..rock import Rock
from . import Panel, Task

CURVES = ("gamma", "resistivity", "density", "neutron", "sonic")
DEPTHS, THICKNESS, BATCH = 36, 9, 50
TRAIN, HELD_OUT = 2000, 1000
RAMP = torch.linspace(0, 1, THICKNESS)
FACIES = {  # what sedimentologists read from the shape of a curve
    "bell": 1 - RAMP,
    "funnel": RAMP,
    "egg": 1 - (2 * RAMP - 1).abs(),
    "hourglass": (2 * RAMP - 1).abs(),
}


class Batch(NamedTuple):
    """Wells."""

    logs: Tensor  # (B, n, T)
    lengths: Tensor  # (B, n)
    facies: Tensor  # (B,), an index into FACIES
    curve: Tensor  # (B,), the curve that shows it
    top: Tensor  # (B,), and from which depth on


def wells(count: int, generator: torch.Generator) -> Batch:
    """Curves of 24 to 36 depths, all noise with a memory; in one of each well is the facies.

    The shapes have the same mean and the same energy: only the order of their numbers tells them apart.
    """
    shapes = torch.stack(list(FACIES.values()))
    shapes = (shapes - shapes.mean(1, keepdim=True)) / shapes.std(1, keepdim=True)

    lengths = torch.randint(24, DEPTHS + 1, (count, len(CURVES)), generator=generator)
    noise = torch.randn(count, len(CURVES), DEPTHS, generator=generator)
    logs = torch.zeros_like(noise)
    logs[:, :, 0] = 0.5 * noise[:, :, 0]
    for t in range(1, DEPTHS):  # an autoregression of variance 1 / 4
        logs[:, :, t] = 0.6 * logs[:, :, t - 1] + 0.4 * noise[:, :, t]
    facies = torch.randint(len(FACIES), (count,), generator=generator)
    curve = torch.randint(len(CURVES), (count,), generator=generator)
    each = torch.arange(count)
    top = (torch.rand(count, generator=generator) * (lengths[each, curve] - THICKNESS + 1)).long()
    logs[each[:, None], curve[:, None], top[:, None] + torch.arange(THICKNESS)] += shapes[facies]
    return Batch(logs.masked_fill(torch.arange(DEPTHS) >= lengths[..., None], 0), lengths, facies, curve, top)


def make(seed: int, device: torch.device) -> Task:
    """Name the facies, one of four."""
    generator = torch.Generator().manual_seed(seed)
    train, test = (Batch(*(x.to(device) for x in wells(count, generator))) for count in (TRAIN, HELD_OUT))

    def build(attention: bool) -> nn.Module:
        model = Rock(len(CURVES), len(FACIES), hidden_dim=16, attn_dim=16, shared=True, attention=attention)
        return model.to(device)

    def batches(generator: torch.Generator) -> Iterable[Batch]:
        for rows in torch.randperm(TRAIN, generator=generator).to(device).split(BATCH):
            yield Batch(*(x[rows] for x in train))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch.logs, batch.lengths), batch.facies)

    def accuracy(model: nn.Module) -> float:
        return (model(test.logs, test.lengths).argmax(-1) == test.facies).float().mean().item()

    def panels(model: nn.Module) -> list[Panel]:
        _, depths, curves = model(test.logs[:2], test.lengths[:2], return_weights=True)
        result = []
        for i in range(2):
            name, shows, top = list(FACIES)[test.facies[i]], CURVES[test.curve[i]], int(test.top[i])
            title = f"{name} in {shows}, depths {top} to {top + THICKNESS - 1}: weights of the depths"
            result.append(Panel(title, depths[i], list(CURVES), [str(t) for t in range(DEPTHS)]))
            result.append(Panel("and of the curves", curves[i : i + 1], ["weight"], list(CURVES)))
        return result

    return Task(build, batches, loss, accuracy, panels, epochs=8, learning_rate=1e-2)
