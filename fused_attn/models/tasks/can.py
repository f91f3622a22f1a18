"""Stories in the manner of bAbI's task 1, generated: people walk about and pick things up, and one is asked for."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._arms import on_truth
from ..can import CAN, CANWeights
from . import TEST, TRAIN, VALIDATION, Outcome, Panel, Task
from ._baselines import bag_of_words

PEOPLE = ("mary", "john", "daniel", "sandra")
PLACES = ("kitchen", "garden", "office", "bathroom", "hallway", "bedroom")
THINGS = ("apple", "football", "milk")
WORDS = (
    "",
    *PEOPLE,
    *PLACES,
    *THINGS,
    "went",
    "moved",
    "travelled",
    "to",
    "the",
    "got",
    "grabbed",
    "dropped",
    "where",
    "is",
)
INDEX = {word: i for i, word in enumerate(WORDS)}
SENTENCES, LENGTH, QUESTION = 6, 5, 3
STORIES, BATCH = {TRAIN: 4000, VALIDATION: 500, TEST: 1000}, 50


class Example(NamedTuple):
    """A story, a question about it, and the place that answers it."""

    story: tuple[str, ...]
    question: str
    answer: str


class Batch(NamedTuple):
    """Examples as numbers; index 0 is padding."""

    words: Tensor  # (B, S, L)
    lengths: Tensor  # (B, S)
    question: Tensor  # (B, Lq)
    question_lengths: Tensor  # (B,)
    answers: Tensor  # (B,), here an index into PLACES
    truth: Tensor  # bool (B, S), the sentences that say it


class Reader(nn.Module):
    """Word vectors, CAN, and a linear layer over the answers."""

    def __init__(self, words: int, answers: int, dim: int, attention: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, dim)
        self.can = CAN(dim, dim, dim, attention=attention)
        self.answer = nn.Linear(dim, answers)

    def forward(self, batch: Batch) -> tuple[Tensor, CANWeights]:
        """Scores of the answers ``(B, answers)``, and the weights."""
        with on_truth(self, self.can.attend_sentences, batch.truth):
            out, weights = self.can(
                self.embed(batch.words),
                batch.lengths,
                self.embed(batch.question),
                batch.question_lengths,
                return_weights=True,
            )
        return self.answer(out), weights


def tell(rng: random.Random) -> Example:
    """One story of 3 to 6 sentences. What people pick up and drop distracts: the question is where one is."""
    where: dict[str, str] = {}
    held: dict[str, list[str]] = {person: [] for person in PEOPLE}
    story = []
    for _ in range(rng.randint(3, SENTENCES)):
        person = rng.choice(PEOPLE)
        free = [thing for thing in THINGS if not any(thing in things for things in held.values())]
        act = rng.random()
        if held[person] and act < 0.1:
            thing = held[person].pop()
            story.append(f"{person} dropped the {thing}")
        elif person in where and free and act < 0.3:
            thing = rng.choice(free)
            held[person].append(thing)
            story.append(f"{person} {rng.choice(('got', 'grabbed'))} the {thing}")
        else:
            where[person] = rng.choice([place for place in PLACES if place != where.get(person)])
            story.append(f"{person} {rng.choice(('went', 'moved', 'travelled'))} to the {where[person]}")
    person = rng.choice(list(where))
    return Example(tuple(story), f"where is {person}", where[person])


def collate(examples: list[Example], device: torch.device) -> Batch:
    """Pad to the longest story; sentences have at most 5 words, questions 3."""
    sentences = max(len(x.story) for x in examples)
    words = torch.zeros(len(examples), sentences, LENGTH, dtype=torch.int64)
    question = torch.zeros(len(examples), QUESTION, dtype=torch.int64)
    for i, example in enumerate(examples):
        for row, text in zip(
            (*words[i], question[i]),
            (*example.story, *[""] * (sentences - len(example.story)), example.question),
            strict=True,
        ):
            for j, word in enumerate(text.split()):
                row[j] = INDEX[word]
    answers = torch.tensor([PLACES.index(x.answer) for x in examples])
    lengths = (words > 0).sum(-1)
    moves = (words[..., 0] == question[:, None, -1]) & (words[..., 2] == INDEX["to"])
    last = (moves * torch.arange(1, sentences + 1)).argmax(-1)  # the last move of who is asked for
    truth = torch.arange(sentences) == last[:, None]
    return Batch(*(x.to(device) for x in (words, lengths, question, (question > 0).sum(-1), answers, truth)))


def draw_stories(seed: int) -> dict[str, list[Example]]:
    """The examples of each split: no story is in two, nor twice in one."""
    rng = random.Random(seed)
    stories: dict[tuple[str, ...], Example] = {}
    while len(stories) < sum(STORIES.values()):
        example = tell(rng)
        stories.setdefault(example.story, example)
    examples = iter(rng.sample(list(stories.values()), len(stories)))
    return {split: list(itertools.islice(examples, count)) for split, count in STORIES.items()}


def make(seed: int, device: torch.device) -> Task:
    """Answer with a place: which of six."""
    examples = draw_stories(seed)
    data = {split: collate(some, device) for split, some in examples.items()}

    def batches(generator: torch.Generator, epoch: int) -> Iterable[Batch]:
        for rows in torch.randperm(STORIES[TRAIN], generator=generator).to(device).split(BATCH):
            yield Batch(*(x[rows] for x in data[TRAIN]))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch)[0], batch.answers)

    def judge(model: nn.Module, split: str) -> Outcome:
        batch = data[split]
        scores, weights = model(batch)
        right = (scores.argmax(-1) == batch.answers).float().mean().item()
        return Outcome(right, {"sentences": (weights.sentences * batch.truth).sum(-1).mean().item()})

    def panels(model: nn.Module) -> list[Panel]:
        shown = examples[TEST][:2]
        batch = collate(shown, device)
        scores, weights = model(batch)
        result = []
        for i, example in enumerate(shown):
            n = len(example.story)
            said = PLACES[scores[i].argmax()]
            result += [
                Panel(
                    f"{example.question}? {said} (right: {example.answer}). Sentences",
                    weights.sentences[i : i + 1, :n],
                    ["β"],
                    list(example.story),
                    batch.truth[i : i + 1, :n],
                ),
                Panel(
                    "Words of each sentence",
                    weights.words[i, :n],
                    list(example.story),
                    [f"word {j + 1}" for j in range(LENGTH)],
                ),
            ]
        return result

    def with_question(example: Example) -> list[str]:
        """Each word of the story, together with who is asked for; nothing of where it stands."""
        return [f"{example.question.split()[-1]} {word}" for text in example.story for word in text.split()]

    baselines = {"bag of words": bag_of_words(examples, with_question, attrgetter("answer"))}

    def build(arm: str) -> nn.Module:
        model = Reader(len(WORDS), len(PLACES), 32, arm == "attention")
        return model.to(device)

    return Task(build, batches, loss, judge, panels, baselines=baselines, epochs=30)
