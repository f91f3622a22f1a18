"""Implicit feedback, generated: new users are known by what they chose, which mostly says nothing of their taste.

An item is a picture: one component shows its subject, the others a scene, which is a subject too. Sharpness tells the
subject from the scene. A user likes two subjects of twelve, and chose twelve items: more than half are staples, which
everybody takes (their subject is none of the twelve), the others are of a liked subject. Nobody says which is which.

Users for validation and test were not trained on: they are user 0, the unknown one, whom the training users are half
of the time, too. So a taste has to be read from the history, where it is in about one component of nine.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import NamedTuple

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from .._arms import is_oracle
from ..acf import ACF, ACFWeights, bpr_loss
from . import TEST, TRAIN, VALIDATION, Outcome, Panel, Task

USERS = {TRAIN: 800, VALIDATION: 150, TEST: 300}
SUBJECTS, STAPLES, LIKED = 12, 6, 2
OF_SUBJECT, OF_STAPLE = 40, 12  # items of each
ITEMS = SUBJECTS * OF_SUBJECT + STAPLES * OF_STAPLE
COMPONENTS, FEATURES = 4, 16
CHOSEN, CHANCE, NOISE, SHARPNESS = 12, 0.55, 0.3, 1.0
DIM, BATCH = 16, 200


class World(NamedTuple):
    """What is known of items and users, and what is hidden: subjects and tastes. Users of all splits, in order."""

    components: Tensor  # (ITEMS, COMPONENTS, FEATURES): a vector a subject, one of sharpness, and noise
    subjects: Tensor  # (ITEMS, COMPONENTS), hidden; staples' are SUBJECTS and more
    sharp: Tensor  # bool (ITEMS, COMPONENTS), hidden: the one that shows what the item is
    likes: Tensor  # bool (users, ITEMS), hidden: an item is of a liked subject
    chosen: Tensor  # (users, CHOSEN)


def world(seed: int) -> World:
    """Items and users of one seed."""
    rng = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([OF_SUBJECT] * SUBJECTS + [OF_STAPLE] * STAPLES)
    subject = torch.arange(len(sizes)).repeat_interleave(sizes)
    others = (subject[:, None] + torch.arange(1, SUBJECTS)) % SUBJECTS  # of a liked subject: all but its own
    scene = others.gather(1, torch.randint(SUBJECTS - 1, (ITEMS, 1), generator=rng))[:, 0]
    sharp = torch.zeros(ITEMS, COMPONENTS, dtype=torch.bool)
    sharp.scatter_(1, torch.randint(COMPONENTS, (ITEMS, 1), generator=rng), True)
    subjects = torch.where(sharp, subject[:, None], scene[:, None])
    codes, noise, edge = (
        torch.randn(*shape, FEATURES, generator=rng) / FEATURES**0.5
        for shape in ((SUBJECTS + STAPLES,), (ITEMS, COMPONENTS), ())
    )
    components = codes[subjects] + NOISE * noise + SHARPNESS * torch.where(sharp, 1.0, -1.0)[..., None] * edge

    users = sum(USERS.values())
    tastes = torch.rand(users, SUBJECTS, generator=rng).argsort(1)[:, :LIKED]
    likes = (subject == tastes[..., None]).any(1)
    draw = torch.rand(users, ITEMS, generator=rng)
    liked = torch.where(likes, draw, 2.0).argsort(1)[:, :CHOSEN]  # what is wanted comes first
    staple = torch.where(subject >= SUBJECTS, draw, 2.0).argsort(1)[:, :CHOSEN]
    chosen = torch.where(torch.rand(users, CHOSEN, generator=rng) < CHANCE, staple, liked)
    return World(components, subjects, sharp, likes, chosen)


class Batch(NamedTuple):
    """What `ACF` takes, and an item that the user did not choose."""

    users: Tensor  # (B,), whose truth it is
    known: Tensor  # (B,), as whom the model knows them: 0 is nobody
    items: Tensor
    others: Tensor
    history: Tensor
    mask: Tensor


def make(seed: int, device: torch.device, form: str = "code") -> Task:
    """Rank what a user likes and has not chosen above what the user does not like; `form` is that of `ACF`."""
    data = World(*(x.to(device) for x in world(seed)))
    users = dict(
        zip(USERS, torch.arange(sum(USERS.values()), device=device).split(list(USERS.values())), strict=True)
    )
    taken = torch.zeros(len(data.chosen), ITEMS, dtype=torch.bool, device=device).scatter(1, data.chosen, True)
    strangers = (~taken).float()

    def truth(batch: Batch) -> tuple[Tensor, Tensor]:
        """Which items tell of the user's taste, all of them where none does; and which component of each item."""
        items = data.likes[batch.users].gather(1, batch.history) & batch.mask
        return items | ~items.any(-1, keepdim=True), data.sharp[batch.history]

    def forward(model: nn.Module, batch: Batch, items: Tensor) -> tuple[Tensor, ACFWeights]:
        liked, told = truth(batch) if is_oracle(model) else (True, None)
        result: tuple[Tensor, ACFWeights] = model(
            batch.known,
            items,
            batch.history,
            data.components[batch.history],
            history_mask=batch.mask & liked,
            component_mask=told,
            return_weights=True,
        )
        return result

    def batches(generator: torch.Generator, epoch: int) -> Iterable[Batch]:
        for pairs in torch.randperm(USERS[TRAIN] * CHOSEN, generator=generator).split(BATCH):
            who, place = (pairs // CHOSEN).to(device), (pairs % CHOSEN).to(device)
            history = data.chosen[who]
            # Drawn on the CPU, so that a seed means the same on every device.
            others = torch.multinomial(strangers[who].cpu(), 1, generator=generator)[:, 0].to(device)
            known = (torch.rand(len(pairs), generator=generator) < 0.5).to(device) * (1 + who)
            items = history.gather(1, place[:, None])[:, 0]
            yield Batch(who, known, items, others, history, history != items[:, None])  # the rest of the history

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        scores, _ = forward(model, batch, torch.stack([batch.items, batch.others], 1))
        return bpr_loss(scores[:, 0], scores[:, 1])

    def strange(who: Tensor) -> Batch:
        """Users that are not known but for all that they chose."""
        history = data.chosen[who]
        nobody = torch.zeros_like(who)
        return Batch(who, nobody, nobody, nobody, history, torch.ones_like(history, dtype=torch.bool))

    def ranked(scores: Tensor, split: str) -> float:
        """Of the scores of all items for the users of a split; the mean over users."""
        likes, new = data.likes[users[split]], ~taken[users[split]]
        new[:, SUBJECTS * OF_SUBJECT :] = False  # staples are not what is asked for
        rows = zip(likes.cpu(), scores.cpu(), new.cpu(), strict=True)
        return statistics.fmean(float(roc_auc_score(like[n], score[n])) for like, score, n in rows)

    def judge(model: nn.Module, split: str) -> Outcome:
        batch = strange(users[split])
        scores, weights = forward(model, batch, torch.arange(ITEMS, device=device).expand(len(batch.users), -1))
        items, components = truth(batch)
        return Outcome(
            ranked(scores, split),
            {
                "items": (weights.items * items).sum(-1).mean().item(),
                "components": (weights.components * components).sum(-1)[items].mean().item(),
            },
        )

    def neighbours(split: str) -> float:
        """Items that the training users chose together with those of the history: the sum of their cosines."""
        together = nn.functional.normalize(taken[users[TRAIN]].double(), dim=0)
        return ranked(taken[users[split]].double() @ (together.T @ together), split)

    def factorisation(split: str) -> float:
        """Factors of who chose what; a new user's are the history's projection on them."""
        from sklearn.decomposition import TruncatedSVD

        models = [
            TruncatedSVD(rank, random_state=0).fit(taken[users[TRAIN]].cpu().double()) for rank in (4, 8, 16, 32)
        ]

        def score(model: TruncatedSVD, split: str) -> float:
            factors = model.transform(taken[users[split]].cpu().double())
            return ranked(torch.from_numpy(factors @ model.components_).to(device), split)

        return score(max(models, key=lambda model: score(model, VALIDATION)), split)

    def panels(model: nn.Module) -> list[Panel]:
        batch = strange(users[TEST][:2])
        _, weights = forward(model, batch, batch.items)
        items, components = truth(batch)
        result = []
        for i, history in enumerate(batch.history):
            rows = [f"{'liked' if own else 'staple'} {n}" for own, n in zip(items[i], history.tolist(), strict=True)]
            names = [f"component {m + 1}" for m in range(COMPONENTS)]
            result += [
                Panel(f"A new user's {CHOSEN} choices", weights.items[i : i + 1], ["α"], rows, items[i : i + 1]),
                Panel("Components of each, the sharp one framed", weights.components[i], rows, names, components[i]),
            ]
        return result

    def build(arm: str) -> nn.Module:
        model = ACF(1 + USERS[TRAIN], ITEMS, FEATURES, DIM, form=form, attention=arm == "attention")
        return model.to(device)

    baselines = {"item neighbours": neighbours, "matrix factorisation": factorisation}
    return Task(build, batches, loss, judge, panels, baselines=baselines, epochs=60)
