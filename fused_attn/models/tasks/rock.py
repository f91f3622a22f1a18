"""Well logs, generated: noisy curves, of which one shows, at some depth, the shape that names the facies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._arms import on_truth
from ..rock import Rock
from . import TEST, TRAIN, VALIDATION, Outcome, Panel, Task
from ._baselines import logistic_regression

CURVES = ("gamma", "resistivity", "density", "neutron", "sonic")
DEPTHS, THICKNESS, BATCH = 36, 9, 50
WELLS = {TRAIN: 2000, VALIDATION: 600, TEST: 1000}
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

    def truth(self) -> Tensor:
        """Bool ``(B, n, T)``: the depths that show the facies."""
        depth = torch.arange(self.logs.shape[2], device=self.logs.device)
        inside = (depth >= self.top[:, None]) & (depth < self.top[:, None] + THICKNESS)
        shows = torch.arange(self.logs.shape[1], device=self.logs.device) == self.curve[:, None]
        return inside[:, None] & shows[..., None]


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
    data = {split: Batch(*(x.to(device) for x in wells(count, generator))) for split, count in WELLS.items()}
    test = data[TEST]

    def build(arm: str) -> nn.Module:
        model = Rock(len(CURVES), len(FACIES), hidden_dim=16, attn_dim=16, shared=True, attention=arm == "attention")
        return model.to(device)

    def batches(generator: torch.Generator, epoch: int) -> Iterable[Batch]:
        for rows in torch.randperm(WELLS[TRAIN], generator=generator).to(device).split(BATCH):
            yield Batch(*(x[rows] for x in data[TRAIN]))

    def forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        inside = torch.arange(DEPTHS, device=device) < batch.lengths[..., None]
        with on_truth(model, model.get_submodule("attend"), batch.truth()[inside]):
            result: tuple[Tensor, Tensor, Tensor] = model(batch.logs, batch.lengths, return_weights=True)
        return result

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(forward(model, batch)[0], batch.facies)

    def judge(model: nn.Module, split: str) -> Outcome:
        batch = data[split]
        logits, depths, curves = forward(model, batch)
        truth = batch.truth()
        return Outcome(
            (logits.argmax(-1) == batch.facies).float().mean().item(),
            {
                "curves": (curves * truth.any(-1)).sum(-1).mean().item(),
                "depths": (depths * truth).sum((1, 2)).mean().item(),  # of the curve that shows it
            },
        )

    def as_they_are(split: str) -> float:
        """Logistic regression on all numbers of a well."""
        x = {name: wells.logs.flatten(1).cpu().numpy() for name, wells in data.items()}
        y = {name: wells.facies.cpu().numpy() for name, wells in data.items()}
        return logistic_regression(x, y, split)

    def panels(model: nn.Module) -> list[Panel]:
        first = Batch(*(x[:2] for x in test))
        _, depths, curves = forward(model, first)
        truth = first.truth()
        result = []
        for i in range(2):
            name, shows, top = list(FACIES)[test.facies[i]], CURVES[test.curve[i]], int(test.top[i])
            title = f"{name} in {shows}, depths {top} to {top + THICKNESS - 1}: weights of the depths"
            result.append(Panel(title, depths[i], list(CURVES), [str(t) for t in range(DEPTHS)], truth[i]))
            result.append(
                Panel("and of the curves", curves[i : i + 1], ["weight"], list(CURVES), truth[i].any(-1)[None])
            )
        return result

    return Task(build, batches, loss, judge, panels, baselines={"logs as they are": as_they_are}, epochs=30)
