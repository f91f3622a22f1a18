"""MovieLens, as implicit feedback: whatever a user rated is chosen, with any number of stars.

Three layouts: 100K (`u.data`: user, item, rating and time with tabs between; `u.item`: with | between, the last 19
columns are genres), 1M and 10M (`ratings.dat`, `movies.dat`: with ``::`` between), and the later ones (`ratings.csv`,
`movies.csv`: with a header). The components of an item are its genres, one-hot.

By time, the last choice of each user is for test and the one before it for validation; choices of one time are in the
order of the file. So a user needs three. The score is HR@100: the share of users whose held-out item is among the
first 100 of all items that the user has not chosen before it. That is where the author's code cuts the ranks; nothing
is sampled. Also given are NDCG@100, and both at 10.

As in the paper, the history that is attended to is all that a user chose to train on, the item that is scored among
it, and each chosen item is compared with one that the user has not chosen, by BPR. Width 128 is the paper's; here a
batch is the choices of 8 users, so that each history is attended to once an epoch. The author's code has plain
gradient descent with a rate and a penalty of 0.01, which do not fit Adam: here 1e-3 and none.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._padded import length_mask
from ..acf import ACF, ACFWeights, bpr_loss
from ..protocol import Setting
from ..tasks import TEST, VALIDATION, Outcome, Panel, Task
from ._files import beside, choose, csv_table, fail, fields_of, lines, whole_number
from ._packed import Packed, by_length, pack

FORMATS = {"MovieLens 100K": "u.data", "MovieLens 1M": "ratings.dat", "MovieLens CSV": "ratings.csv"}
ITEMS = {"MovieLens 100K": "u.item", "MovieLens 1M": "movies.dat", "MovieLens CSV": "movies.csv"}
GENRES_100K = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
HELD_OUT = 2  # of each user: one for validation, one for test
WIDTH, USERS, CUTS = 128, 8, (100, 10)
SHOWN = 12  # items in a picture


class Item(NamedTuple):
    """A film."""

    number: int  # in the files
    title: str
    genres: list[str]


class Choices(NamedTuple):
    """All of the data."""

    chosen: Packed  # a row a user: items to train on, in the order of time
    held_out: Tensor  # (U, 2): for validation and for test
    titles: list[str]
    genres: Packed  # a row an item
    names: list[str]  # of the genres


class Batch(NamedTuple):
    """Users and what they chose."""

    users: Tensor  # (B,)
    history: Tensor  # (B, L)
    mask: Tensor  # bool (B, L)
    components: Tensor  # (B, L, M, F)
    component_mask: Tensor  # bool (B, L, M)


def read_items(name: str, path: Path) -> Iterator[tuple[int, Item]]:
    """Line and item."""
    if name == "MovieLens CSV":
        for number, row in csv_table(path, "movieId", "title", "genres"):
            item = whole_number(path, number, "movieId", row["movieId"])
            yield number, Item(item, row["title"], row["genres"].split("|"))
        return
    for number, text in lines(path, "latin-1"):
        if name == "MovieLens 1M":
            first, title, genres = fields_of(path, number, text, "::", "item title genres")
            yield number, Item(whole_number(path, number, "item", first), title, genres.split("|"))
            continue
        columns = ("item", "title", "date", "video", "address", *GENRES_100K)
        first, title, _, _, _, *flags = fields_of(path, number, text, "|", " ".join(columns))
        if not set(flags) <= {"0", "1"}:
            fail(path, number, f"genres: expected 0 or 1; got {'|'.join(flags)}")
        has = [genre for genre, flag in zip(GENRES_100K, flags, strict=True) if flag == "1"]
        yield number, Item(whole_number(path, number, "item", first), title, has)


def read_ratings(name: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line, and user, item, rating and time."""
    if name == "MovieLens CSV":
        columns = ("userId", "movieId", "rating", "timestamp")
        for number, row in csv_table(path, *columns):
            yield number, [row[column] for column in columns]
        return
    for number, text in lines(path):
        separator = "::" if name == "MovieLens 1M" else "\t"
        yield number, fields_of(path, number, text, separator, "user item rating time")


def read_choices(name: str, path: Path, numbers: dict[int, int], films: str) -> Iterator[tuple[int, int, int, int]]:
    """Line, user, item by its number here, and time."""
    for line, (user, item, rating, time) in read_ratings(name, path):
        number = whole_number(path, line, "item", item)
        if number not in numbers:
            fail(path, line, f"item {number} is not in {films}")
        try:
            float(rating)
        except ValueError:
            fail(path, line, f"rating: expected a number; got {rating!r}")
        yield line, whole_number(path, line, "user", user), numbers[number], whole_number(path, line, "time", time)


@lru_cache(1)
def read(path: Path) -> Choices:
    """The choices of a folder."""
    name, ratings = choose(path, FORMATS)
    films = beside(ratings, ITEMS[name])
    numbers: dict[int, int] = {}  # of the items in the files, to those here
    titles: list[str] = []
    genres: list[list[int]] = []
    index: dict[str, int] = {}
    for number, film in read_items(name, films):
        if numbers.setdefault(film.number, len(numbers)) != len(titles):
            fail(films, number, f"item {film.number} is there twice")
        titles.append(film.title)
        genres.append([index.setdefault(genre, len(index)) for genre in film.genres])
    if not index:
        fail(films, None, "no item has a genre")
    rows = array("q", itertools.chain.from_iterable(read_choices(name, ratings, numbers, films.name)))
    if not rows:
        fail(ratings, None, "there are no ratings")
    line, person, item, time = torch.frombuffer(rows, dtype=torch.int64).view(-1, 4).unbind(1)
    people, user = person.unique(return_inverse=True)
    check_once(ratings, user * len(titles) + item, line)
    order = time.argsort(stable=True)
    order = order[user[order].argsort(stable=True)]
    counts = torch.bincount(user)
    few = (counts <= HELD_OUT).nonzero()
    if len(few):
        fail(ratings, None, f"user {int(people[few[0]])} has {int(counts[few[0]])} ratings; three are needed")
    ends, item = counts.cumsum(0), item[order]
    last = ends[:, None] - torch.arange(HELD_OUT, 0, -1)
    train = torch.ones(len(item), dtype=torch.bool)
    train[last] = False
    offsets = torch.cat([ends.new_zeros(1), (counts - HELD_OUT).cumsum(0)])
    return Choices(Packed(item[train].int(), offsets), item[last], titles, pack(genres), list(index))


def check_once(path: Path, pairs: Tensor, line: Tensor) -> None:
    """Fail where a user rated an item twice: what is held out would be trained on."""
    order = pairs.argsort(stable=True)
    again = (pairs[order].diff() == 0).nonzero()[:, 0] + 1
    if len(again):
        fail(path, int(line[order[again]].min()), "the user has rated this item before")


def draw_others(chosen: Tensor, mask: Tensor, items: int, order: torch.Generator) -> Tensor:
    """For each chosen item ``(B, L)`` one that the user has not chosen, every one as likely as another."""
    sorted_ = chosen.masked_fill(~mask, items).sort(1).values  # padding comes last
    # The k-th item that is not among the chosen ones: k, and as many more as there are chosen ones up to there.
    left = items - mask.sum(1, keepdim=True)
    k = (torch.rand(chosen.shape, generator=order, dtype=torch.float64) * left).long()
    place = torch.arange(chosen.shape[1])
    before = torch.where(place < mask.sum(1, keepdim=True), sorted_ - place, items)  # free ones below each chosen one
    return k + torch.searchsorted(before, k, right=True)


def ranks(scores: Tensor, wanted: Tensor) -> Tensor:
    """How many of ``scores (B, I)`` are above that of ``wanted (B,)``; equal ones are half above. NaN is the last."""
    own = scores.gather(1, wanted[:, None])
    rank = (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
    return rank.masked_fill(own[:, 0].isnan(), torch.inf)


def cut_scores(rank: Tensor) -> dict[str, float]:
    """Hit ratio and NDCG at each cut, of ranks from 0."""
    result = {}
    for cut in CUTS:
        inside = (rank < cut).double()
        result[f"HR@{cut}"] = inside.mean().item()
        result[f"NDCG@{cut}"] = (inside / (rank.double() + 2).log2()).mean().item()
    return result


def make(path: Path, seed: int, device: torch.device) -> Task:
    """Rank the item that comes next."""
    data = read(path)
    people, films, kinds = len(data.held_out), len(data.titles), len(data.names)
    one_hot = torch.eye(kinds, device=device)
    everything = torch.arange(films, device=device)

    def collate(rows: Tensor) -> Batch:
        history, lengths = data.chosen.padded(rows)
        genres, counts = data.genres.padded(history.flatten())
        shape = (*history.shape, genres.shape[1])
        components = one_hot[genres.view(shape).to(device)]
        mask = length_mask(lengths, history.shape[1])
        shown = length_mask(counts.view(history.shape), genres.shape[1])
        return Batch(rows.to(device), history.to(device), mask.to(device), components, shown.to(device))

    def forward(model: nn.Module, batch: Batch, items: Tensor) -> tuple[Tensor, ACFWeights]:
        result: tuple[Tensor, ACFWeights] = model(
            batch.users,
            items,
            batch.history,
            batch.components,
            history_mask=batch.mask,
            component_mask=batch.component_mask,
            return_weights=True,
        )
        return result

    def batches(order: torch.Generator, epoch: int) -> Iterator[tuple[Batch, Tensor]]:
        for rows in by_length(data.chosen.lengths, USERS, order):
            batch = collate(rows)
            others = draw_others(batch.history.cpu(), batch.mask.cpu(), films, order)
            yield batch, others.to(device)

    def loss(model: nn.Module, pair: tuple[Batch, Tensor]) -> Tensor:
        batch, others = pair
        scores, _ = forward(model, batch, torch.cat([batch.history, others], 1))
        chosen, other = scores.chunk(2, 1)
        return bpr_loss(chosen[batch.mask], other[batch.mask])

    def rank_held_out(split: str, score: Callable[[Tensor], Tensor]) -> Tensor:
        """Of each user, among the items that are new to them then; `score` gives ``(B, I)`` for users."""
        result = []
        for rows in data.chosen.lengths.argsort(stable=True).split(USERS):
            history, lengths = data.chosen.padded(rows)
            mask = length_mask(lengths, history.shape[1])
            known = torch.zeros(len(rows), films, dtype=torch.bool)
            known[mask.nonzero()[:, 0], history[mask]] = True
            validation, test = data.held_out[rows].unbind(1)
            if split == TEST:
                known[torch.arange(len(rows)), validation] = True
            scores = score(rows).float().cpu().masked_fill(known, -torch.inf)
            result.append(ranks(scores, validation if split == VALIDATION else test))
        return torch.cat(result)

    def judge(model: nn.Module, split: str) -> Outcome:
        def score(rows: Tensor) -> Tensor:
            return forward(model, collate(rows), everything.expand(len(rows), -1))[0]

        main, *others = cut_scores(rank_held_out(split, score)).items()
        return Outcome(main[1], also=dict(others))

    def popularity(split: str) -> float:
        """Items that most users chose."""
        counts = torch.bincount(data.chosen.numbers, minlength=films)
        return next(iter(cut_scores(rank_held_out(split, lambda rows: counts.expand(len(rows), -1))).values()))

    def panels(model: nn.Module) -> list[Panel]:
        """The last items of two users."""
        shown = []
        for user in range(min(2, people)):
            _, weights = forward(model, collate(torch.tensor([user])), everything[:1].expand(1, 1))
            items = data.chosen.row(user)
            last = slice(max(0, len(items) - SHOWN), len(items))
            alpha = weights.items[0]
            rest = alpha[: last.start].sum()[None]
            names = ["earlier items", *(data.titles[item] for item in items[last])]
            shown.append(Panel(f"user {user + 1}: items", torch.cat([rest, alpha[last]])[None], ["α"], names))
        return shown

    def build(arm: str) -> nn.Module:
        return ACF(people, films, kinds, WIDTH, attention=arm == "attention").to(device)

    return Task(
        build,
        batches,
        loss,
        judge,
        panels,
        arms=("attention", "uniform"),
        baselines={"popularity": popularity},
        setting=Setting(1e-3, 0.0),
        epochs=100,
    )
