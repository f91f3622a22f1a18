"""bAbI (Weston et al. 2015), tasks 1 to 20 of version 1.2: files such as `qa1_single-supporting-fact_train.txt`.

A line is ``number text``, and of a question ``number text<tab>answer<tab>numbers of the supporting facts``; number 1
starts a story. A question is asked about all sentences of its story before it. Of a folder with several tasks one is
named by its training file: each is trained on its own, as in the papers. An answer of several words ("n,s") is one
class. One that no training question has can't be given, and counts as wrong.

Every tenth training story is for validation. The truth of the sentences' weights are the supporting facts. As in the
paper: Adam, 1e-3. Open there, and ours: all widths, 64, and batches of 32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..protocol import Setting
from ..tasks import TEST, TRAIN, VALIDATION, Panel, Task
from ..tasks._baselines import bag_of_words
from ..tasks.can import Batch, Reader
from ._classify import Answer, Part, classify
from ._files import TENTH, beside, choose, fail, lines, whole_number
from ._packed import Words, words_of

FORMATS = {"bAbI": "qa*_train.txt"}
DIM, BATCH = 64, 32


class Example(NamedTuple):
    """A question about a story."""

    story: tuple[str, ...]
    question: str
    answer: str
    facts: tuple[int, ...]  # indices into the story


def read_stories(path: Path) -> Iterator[list[Example]]:
    """The questions of each story."""
    sentences: dict[int, str] = {}  # by their number
    questions: list[Example] = []
    last = 0
    for line, text in lines(path):
        first, _, rest = text.partition(" ")
        number = whole_number(path, line, "number of the line", first)
        if number == 1:
            if questions:
                yield questions
            sentences, questions = {}, []
        elif number != last + 1:
            fail(path, line, f"number of the line: expected 1 or {last + 1}; got {number}")
        last = number
        if "\t" not in rest:
            if not words_of(rest):
                fail(path, line, "a sentence without words")
            sentences[number] = rest
            continue
        parts = [part.strip() for part in rest.split("\t")]
        if len(parts) != 3 or not all(parts):
            fail(path, line, f"expected question, answer and supporting facts, with tabs between; got {rest!r}")
        order = list(sentences)
        facts = [whole_number(path, line, "supporting fact", fact) for fact in parts[2].split()]
        for fact in facts:
            if fact not in sentences:
                fail(path, line, f"supporting fact: expected the number of a sentence before it; got {fact}")
        indices = tuple(order.index(fact) for fact in facts)
        questions.append(Example(tuple(sentences.values()), parts[0], parts[1], indices))
    if questions:
        yield questions


@lru_cache(1)
def read(path: Path) -> dict[str, list[Example]]:
    """The questions of each split."""
    _, train = choose(path, FORMATS)
    test = beside(train, train.name.replace("_train.txt", "_test.txt"))
    result: dict[str, list[Example]] = {TRAIN: [], VALIDATION: [], TEST: []}
    for i, questions in enumerate(read_stories(train)):
        result[TRAIN if i % TENTH else VALIDATION] += questions
    for questions in read_stories(test):
        result[TEST] += questions
    for split, some in result.items():
        if not some:
            fail(test if split == TEST else train, None, f"no questions for {split}; two stories are needed")
    return result


def make(path: Path, seed: int, device: torch.device) -> Task:
    """Answer the questions."""
    examples = read(path)
    words = Words()
    for example in examples[TRAIN]:
        words([word for text in (*example.story, example.question) for word in words_of(text)])
    words.open = False
    number = cache(lambda text: words(words_of(text)))  # there are few different sentences
    answers = {answer: i for i, answer in enumerate(sorted({x.answer for x in examples[TRAIN]}))}
    names = list(answers)

    def collate(split: str, rows: Tensor) -> Batch:
        return to_batch([examples[split][i] for i in rows.tolist()], number, answers, device)

    def answer(model: nn.Module, batch: Batch) -> Answer:
        scores, weights = model(batch)
        return Answer(scores, {"sentences": (weights.sentences * batch.truth).sum(-1)})

    def build(arm: str) -> nn.Module:
        return Reader(len(words), len(answers), DIM, arm == "attention").to(device)

    def panels(model: nn.Module) -> list[Panel]:
        shown = []
        for i, example in enumerate(examples[TEST][:2]):
            batch = collate(TEST, torch.tensor([i]))
            scores, weights = model(batch)
            title = f"{example.question} {names[int(scores.argmax())]} (right: {example.answer}). Sentences"
            shown.append(Panel(title, weights.sentences, ["β"], list(example.story), batch.truth))
        return shown

    def with_question(example: Example) -> list[str]:
        """Each word of the story, together with the last of the question."""
        last = words_of(example.question.strip(" ?"))[-1:]
        return [f"{last} {word}" for text in example.story for word in words_of(text)]

    return classify(
        build,
        {split: part_of(some, answers) for split, some in examples.items()},
        collate,
        answer,
        panels,
        batch=BATCH,
        device=device,
        baselines={"bag of words": bag_of_words(examples, with_question, attrgetter("answer"))},
        setting=Setting(1e-3, 0.0),
        epochs=200,
    )


def part_of(examples: list[Example], answers: dict[str, int]) -> Part:
    """Classes, and sentences of the story."""
    labels = torch.tensor([answers.get(x.answer, -1) for x in examples])
    return Part(labels, torch.tensor([len(x.story) for x in examples]))


def to_batch(
    examples: list[Example], number: Callable[[str], list[int]], answers: dict[str, int], device: torch.device
) -> Batch:
    """Pad to the longest story, and to the longest sentence."""
    stories = [[number(text) for text in x.story] for x in examples]
    questions = [number(x.question) for x in examples]
    sentences = max((len(story) for story in stories), default=0)
    length = max((len(text) for story in stories for text in story), default=0)
    numbers = torch.zeros(len(examples), sentences, length, dtype=torch.int64)
    lengths = torch.zeros(len(examples), sentences, dtype=torch.int64)
    truth = torch.zeros(len(examples), sentences, dtype=torch.bool)
    for i, (story, example) in enumerate(zip(stories, examples, strict=True)):
        for j, text in enumerate(story):
            numbers[i, j, : len(text)] = torch.tensor(text)
            lengths[i, j] = len(text)
        truth[i, list(example.facts)] = True
    question = nn.utils.rnn.pad_sequence([torch.tensor(q) for q in questions], batch_first=True)
    question_lengths = torch.tensor([len(q) for q in questions])
    labels = torch.tensor([answers.get(x.answer, -1) for x in examples])
    batch = Batch(numbers, lengths, question, question_lengths, labels, truth)
    return Batch(*(x.to(device) for x in batch))
