"""Implicit feedback, generated: users choose an item because of one thing in it, or by chance; nobody says which."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._arms import is_oracle
from ..acf import ACF, ACFWeights, bpr_loss
from . import VALIDATION, Outcome, Panel, Task

USERS, ITEMS, SUBJECTS, COMPONENTS, FEATURES = 600, 120, 12, 4, 12
LIKED, CHOSEN, HELD_OUT, CHANCE, NOISE = 1, 12, 3, 0.2, 0.3
DIM, BATCH = 16, 200


class World(NamedTuple):
    """What is known of items and users, and what is hidden: subjects and tastes."""

    components: Tensor  # (ITEMS, COMPONENTS, FEATURES): a vector a subject, and noise
    subjects: Tensor  # (ITEMS, COMPONENTS), hidden
    tastes: Tensor  # (USERS, SUBJECTS), hidden
    likes: Tensor  # (USERS, ITEMS), hidden: an item has a subject of the user's taste
    chosen: Tensor  # (USERS, CHOSEN): some of the liked items, to train on
    validation: Tensor  # (USERS, HELD_OUT): others
    test: Tensor  # (USERS, HELD_OUT): others again


class Batch(NamedTuple):
    """What `ACF` takes, and an item that the user did not choose."""

    users: Tensor
    items: Tensor
    others: Tensor
    history: Tensor
    mask: Tensor


def world(seed: int) -> World:
    """Every user likes one of 12 subjects, and chose 12 items: four of five because of it, the others by chance.

    A history so has items that say nothing of the user, and each item components that do not.
    """
    rng = torch.Generator().manual_seed(seed)
    subjects = torch.rand(ITEMS, SUBJECTS, generator=rng).argsort(1)[:, :COMPONENTS]
    codes = torch.randn(SUBJECTS, FEATURES, generator=rng) / FEATURES**0.5
    noise = torch.randn(ITEMS, COMPONENTS, FEATURES, generator=rng) / FEATURES**0.5
    tastes = torch.rand(USERS, SUBJECTS, generator=rng).argsort(1) < LIKED
    likes = tastes[:, subjects].any(-1)
    draw = torch.rand(USERS, ITEMS, generator=rng)
    order = torch.where(likes, draw, 2.0).argsort(1)  # what a user likes comes first
    assert likes.gather(1, order[:, : CHOSEN + 2 * HELD_OUT]).all(), "a user likes fewer items than are taken"
    chosen, validation, test, _ = order.split([CHOSEN, HELD_OUT, HELD_OUT, ITEMS - CHOSEN - 2 * HELD_OUT], 1)
    strays = torch.where(likes, 2.0, draw).argsort(1)[:, :CHOSEN]
    chosen = torch.where(torch.rand(USERS, CHOSEN, generator=rng) < CHANCE, strays, chosen)
    return World(codes[subjects] + NOISE * noise, subjects, tastes, likes, chosen, validation, test)


def auc(positive: Tensor, scores: Tensor, negative: Tensor) -> Tensor:
    """The share of pairs in the right order, a tie being half: ``(B, P)`` against the negative ones of ``(B, J)``."""
    above = positive[:, :, None] - scores[:, None]
    right = ((above > 0).double() + (above == 0).double() / 2) * negative[:, None]
    return right.sum((1, 2)) / (negative.sum(1) * positive.shape[1])


def make(seed: int, device: torch.device, form: str = "paper") -> Task:
    """Rank what a user likes and has not chosen yet above what the user does not like; `form` is that of `ACF`."""
    data = World(*(x.to(device) for x in world(seed)))
    taken = torch.zeros(USERS, ITEMS, dtype=torch.bool, device=device).scatter(1, data.chosen, True)
    strangers = (~taken).float()

    def truth(batch: Batch) -> tuple[Tensor, Tensor]:
        """Which items, and which components of each, tell of the user's taste; all of them where none does."""
        liked = (
            data.tastes[batch.users].gather(1, data.subjects[batch.history].flatten(1)).view(*batch.history.shape, -1)
        )
        items = liked.any(-1) & batch.mask
        return items | ~items.any(-1, keepdim=True), liked | ~liked.any(-1, keepdim=True)

    def forward(model: nn.Module, batch: Batch, items: Tensor) -> tuple[Tensor, ACFWeights]:
        liked, told = truth(batch) if is_oracle(model) else (True, None)
        result: tuple[Tensor, ACFWeights] = model(
            batch.users,
            items,
            batch.history,
            data.components[batch.history],
            history_mask=batch.mask & liked,
            component_mask=told,
            return_weights=True,
        )
        return result

    def batches(generator: torch.Generator, epoch: int) -> Iterable[Batch]:
        for pairs in torch.randperm(USERS * CHOSEN, generator=generator).split(BATCH):
            users, place = (pairs // CHOSEN).to(device), (pairs % CHOSEN).to(device)
            history = data.chosen[users]
            # Items that were not chosen, drawn on the CPU, so that a seed means the same on every device.
            others = torch.multinomial(strangers[users].cpu(), 1, generator=generator)[:, 0].to(device)
            items = history.gather(1, place[:, None])[:, 0]
            yield Batch(users, items, others, history, history != items[:, None])  # the rest of the history

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        scores, _ = forward(model, batch, torch.stack([batch.items, batch.others], 1))
        return bpr_loss(scores[:, 0], scores[:, 1])

    def everyone(users: Tensor) -> Batch:
        history = data.chosen[users]
        return Batch(users, users, users, history, torch.ones_like(history, dtype=torch.bool))

    def judge(model: nn.Module, split: str) -> Outcome:
        batch = everyone(torch.arange(USERS, device=device))
        scores, weights = forward(model, batch, torch.arange(ITEMS, device=device).expand(USERS, -1))
        wanted = data.validation if split == VALIDATION else data.test
        items, components = truth(batch)
        told = ~components.all(-1)  # items of the user's taste
        return Outcome(
            auc(scores.gather(1, wanted), scores, ~data.likes).mean().item(),
            {
                "items": (weights.items * items).sum(-1).mean().item(),
                "components": (weights.components * components).sum(-1)[told].mean().item(),
            },
        )

    def panels(model: nn.Module) -> list[Panel]:
        users = torch.arange(2, device=device)
        _, weights = forward(model, everyone(users), users)
        items, components = truth(everyone(users))
        result = []
        for i in range(len(users)):
            likes = data.tastes[i].nonzero()[:, 0].tolist()
            rows = [
                " ".join(f"{'*' if s in likes else ''}{s}" for s in data.subjects[item].tolist())
                for item in data.chosen[i]
            ]
            result += [
                Panel(
                    f"User {i}, who likes subjects {likes}: items",
                    weights.items[i : i + 1],
                    ["α"],
                    [f"item {n}" for n in data.chosen[i].tolist()],
                    items[i : i + 1],
                ),
                Panel(
                    f"Components of each item, by subject (* liked by user {i})",
                    weights.components[i],
                    rows,
                    [f"component {m + 1}" for m in range(COMPONENTS)],
                    components[i] & ~components[i].all(-1, keepdim=True),
                ),
            ]
        return result

    def build(arm: str) -> nn.Module:
        model = ACF(USERS, ITEMS, FEATURES, DIM, form=form, attention=arm == "attention")
        return model.to(device)

    return Task(build, batches, loss, judge, panels, epochs=60)
