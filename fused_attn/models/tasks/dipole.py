"""Patients' histories, generated: an old disease comes back, and the last visit's complaint says which."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..dipole import Dipole
from . import Panel, Task

ORGANS = ("heart", "lung", "kidney", "liver", "skin", "joint")
FORMS = ("a", "b", "c", "d")
DISEASES = tuple(f"{organ} {form}" for organ in ORGANS for form in FORMS)  # what is predicted
COMPLAINTS = tuple(f"{organ} pain" for organ in ORGANS)
ROUTINE = tuple(f"routine {i}" for i in range(20))
CODES = (*DISEASES, *COMPLAINTS, *ROUTINE)
INDEX = {code: i for i, code in enumerate(CODES)}
VISITS, BATCH = 20, 64
TRAIN, HELD_OUT = 3000, 1000

Visit = tuple[str, ...]


class Batch(NamedTuple):
    """Histories as numbers."""

    visits: Tensor  # (B, T, codes)
    lengths: Tensor  # (B,)
    next_disease: Tensor  # (B,), an index into DISEASES


def patient(rng: random.Random) -> tuple[tuple[Visit, ...], str]:
    """One history and the disease of the visit that follows it.

    Every visit has one to three routine codes. At three or four visits, each at a random time, another organ has a
    disease. At the last visit one of these organs hurts, and next its disease is back.
    """
    length = rng.randint(8, VISITS)
    history = [rng.sample(ROUTINE, rng.randint(1, 3)) for _ in range(length)]
    ill = rng.sample(ORGANS, rng.randint(3, 4))
    diseases = [f"{organ} {rng.choice(FORMS)}" for organ in ill]
    for when, disease in zip(rng.sample(range(length - 1), len(ill)), diseases, strict=True):
        history[when].insert(0, disease)
    which = rng.randrange(len(ill))
    history[-1].insert(0, f"{ill[which]} pain")
    return tuple(tuple(visit) for visit in history), diseases[which]


def split(seed: int) -> tuple[list[tuple[tuple[Visit, ...], str]], list[tuple[tuple[Visit, ...], str]]]:
    """Training and held-out patients: no history is in both."""
    rng = random.Random(seed)
    patients: dict[tuple[Visit, ...], str] = {}
    while len(patients) < TRAIN + HELD_OUT:
        history, disease = patient(rng)
        patients[history] = disease
    everyone = list(patients.items())
    return everyone[:TRAIN], everyone[TRAIN:]


def collate(patients: list[tuple[tuple[Visit, ...], str]], device: torch.device) -> Batch:
    """Pad to the longest history."""
    visits = torch.zeros(len(patients), max(len(history) for history, _ in patients), len(CODES))
    for b, (history, _) in enumerate(patients):
        for t, visit in enumerate(history):
            visits[b, t, [INDEX[code] for code in visit]] = 1
    lengths = torch.tensor([len(history) for history, _ in patients])
    return Batch(
        visits.to(device), lengths.to(device), torch.tensor([DISEASES.index(x) for _, x in patients], device=device)
    )


def make(seed: int, device: torch.device, *, score: str = "concat") -> Task:
    """Predict the next disease after the last visit, where every earlier visit may be seen: one of 24."""
    train, held_out = split(seed)
    every, test = collate(train, device), collate(held_out, device)

    def build(attention: bool) -> nn.Module:
        model = Dipole(
            len(CODES), len(DISEASES), embed_dim=48, hidden_dim=32, score=score, attn_dim=32, attention=attention
        )
        return model.to(device)

    def batches(generator: torch.Generator) -> Iterable[Batch]:
        for rows in torch.randperm(TRAIN, generator=generator).to(device).split(BATCH):
            yield Batch(*(x[rows] for x in every))

    def last(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch.visits, batch.lengths)[torch.arange(len(batch.lengths), device=device), batch.lengths - 1]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(last(model, batch), batch.next_disease)

    def accuracy(model: nn.Module) -> float:
        return (last(model, test).argmax(-1) == test.next_disease).float().mean().item()

    def panels(model: nn.Module) -> list[Panel]:
        result = []
        for history, disease in held_out[:3]:
            batch = collate([(history, disease)], device)
            logits, weights = model(batch.visits, batch.lengths, return_weights=True)
            guess = DISEASES[int(logits[0, -1].argmax())]
            names = [visit[0] if visit[0] in DISEASES else "routine" for visit in history[:-1]]
            title = f"then: {disease} (predicted: {guess})"
            result.append(Panel(title, weights[0, -1:, :-1], [history[-1][0]], names))
        return result

    return Task(build, batches, loss, accuracy, panels, epochs=8, learning_rate=3e-3)
