"""Patients' histories, generated: an old disease comes back, and the last visit's complaint says of which organ.

Of the organ that hurts it is the latest disease that comes back; earlier ones of the same organ do not count, so that
which codes a history has does not tell, but when they were.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._arms import on_truth
from ..dipole import Dipole
from . import TEST, TRAIN, VALIDATION, Outcome, Panel, Task
from ._baselines import bag_of_words

ORGANS = ("heart", "lung", "kidney", "liver", "skin", "joint")
FORMS = ("a", "b", "c", "d")
DISEASES = tuple(f"{organ} {form}" for organ in ORGANS for form in FORMS)  # what is predicted
COMPLAINTS = tuple(f"{organ} pain" for organ in ORGANS)
ROUTINE = tuple(f"routine {i}" for i in range(20))
CODES = (*DISEASES, *COMPLAINTS, *ROUTINE)
INDEX = {code: i for i, code in enumerate(CODES)}
VISITS, BATCH = 20, 64
PATIENTS = {TRAIN: 3000, VALIDATION: 600, TEST: 1000}

Visit = tuple[str, ...]


class Batch(NamedTuple):
    """Histories as numbers."""

    visits: Tensor  # (B, T, codes)
    lengths: Tensor  # (B,)
    next_disease: Tensor  # (B,), an index into DISEASES
    truth: Tensor  # bool (B, T), the visit that had it


def patient(rng: random.Random) -> tuple[tuple[Visit, ...], str]:
    """One history and the disease of the visit that follows it.

    Every visit has one to three routine codes. Three organs have two or three diseases each, all at different visits
    and in a random order. At the last visit one of these organs hurts, and next its latest disease is back.
    """
    ill = rng.sample(ORGANS, 3)
    diseases = [f"{organ} {form}" for organ in ill for form in rng.sample(FORMS, rng.randint(2, 3))]
    length = rng.randint(len(diseases) + 2, VISITS)
    history = [rng.sample(ROUTINE, rng.randint(1, 3)) for _ in range(length)]
    times = sorted(rng.sample(range(length - 1), len(diseases)))
    in_order = rng.sample(diseases, len(diseases))
    for when, disease in zip(times, in_order, strict=True):
        history[when].insert(0, disease)
    organ = rng.choice(ill)
    history[-1].insert(0, f"{organ} pain")
    return tuple(tuple(visit) for visit in history), [x for x in in_order if x.split()[0] == organ][-1]


def draw_patients(seed: int) -> dict[str, list[tuple[tuple[Visit, ...], str]]]:
    """The patients of each split: no history is in two."""
    rng = random.Random(seed)
    patients: dict[tuple[Visit, ...], str] = {}
    while len(patients) < sum(PATIENTS.values()):
        history, disease = patient(rng)
        patients[history] = disease
    everyone = iter(patients.items())
    return {split: list(itertools.islice(everyone, count)) for split, count in PATIENTS.items()}


def collate(patients: list[tuple[tuple[Visit, ...], str]], device: torch.device) -> Batch:
    """Pad to the longest history."""
    visits = torch.zeros(len(patients), max(len(history) for history, _ in patients), len(CODES))
    for b, (history, _) in enumerate(patients):
        for t, visit in enumerate(history):
            visits[b, t, [INDEX[code] for code in visit]] = 1
    lengths = torch.tensor([len(history) for history, _ in patients])
    diseases = torch.tensor([DISEASES.index(disease) for _, disease in patients])
    truth = visits[torch.arange(len(patients)), :, diseases] > 0  # diseases come first among the codes
    return Batch(*(x.to(device) for x in (visits, lengths, diseases, truth)))


def make(seed: int, device: torch.device, *, score: str = "concat") -> Task:
    """Predict the next disease after the last visit, where every earlier visit may be seen: one of 24."""
    patients = draw_patients(seed)
    data = {split: collate(some, device) for split, some in patients.items()}

    def build(arm: str) -> nn.Module:
        model = Dipole(
            len(CODES),
            len(DISEASES),
            embed_dim=48,
            hidden_dim=32,
            score=score,
            attn_dim=32,
            attention=arm == "attention",
        )
        return model.to(device)

    def batches(generator: torch.Generator, epoch: int) -> Iterable[Batch]:
        for rows in torch.randperm(PATIENTS[TRAIN], generator=generator).to(device).split(BATCH):
            yield Batch(*(x[rows] for x in data[TRAIN]))

    def last(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits after the last visit, and its weights over the others."""
        with on_truth(model, model.get_submodule("attend"), batch.truth):
            logits, weights = model(batch.visits, batch.lengths, return_weights=True)
        at = torch.arange(len(batch.lengths), device=device), batch.lengths - 1
        return logits[at], weights[at]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(last(model, batch)[0], batch.next_disease)

    def judge(model: nn.Module, split: str) -> Outcome:
        logits, weights = last(model, data[split])
        right = (logits.argmax(-1) == data[split].next_disease).float().mean().item()
        return Outcome(right, {"visits": (weights * data[split].truth).sum(-1).mean().item()})

    def with_complaint(example: tuple[tuple[Visit, ...], str]) -> list[str]:
        """Each code, together with the complaint; nothing of when it was."""
        history, _ = example
        return [f"{history[-1][0]}, {code}" for visit in history[:-1] for code in visit]

    baselines = {"bag of codes": bag_of_words(patients, with_complaint, itemgetter(1))}

    def panels(model: nn.Module) -> list[Panel]:
        result = []
        for history, disease in patients[TEST][:3]:
            batch = collate([(history, disease)], device)
            logits, weights = last(model, batch)
            guess = DISEASES[int(logits.argmax())]
            names = [visit[0] if visit[0] in DISEASES else "routine" for visit in history[:-1]]
            title = f"then: {disease} (predicted: {guess})"
            result.append(Panel(title, weights[:, :-1], [history[-1][0]], names, batch.truth[:, :-1]))
        return result

    return Task(build, batches, loss, judge, panels, baselines=baselines, epochs=30)
