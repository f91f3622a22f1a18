"""The trainings of `python -m fused_attn.models`: one after the other, or several in processes of their own.

Not in `__main__`, from which a new process would not get them.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from . import protocol
from ._progress import Show, progress
from .tasks import Task

if TYPE_CHECKING:  # --help needs neither
    from rich.console import Console

    from ._summary import Row


class Unit(NamedTuple):
    """One training, or one baseline."""

    system: str
    arm: str
    number: int  # of its seed, from 0
    seed: int
    device: str
    epochs: int | None
    split: str
    setting: protocol.Setting
    pictures: Path | None  # the folder, for the unit whose weights are drawn
    data: Path | None  # public data; None for the generated task

    def __str__(self) -> str:
        return f"{self.system}, {self.arm}, seed {self.number + 1}"


class Trial(NamedTuple):
    """The search of an arm."""

    system: str
    arm: str
    device: str

    def __str__(self) -> str:
        return f"{self.system}, {self.arm}: search"


Part = Callable[[float], None]
"""Is told how much of a training is done, from 0 to 1."""
Job = TypeVar("Job")
"""What `str` makes a description of."""
Result = TypeVar("Result")

_made: dict[str, tuple[int, str, Path | None, Task]] = {}


def make_task(system: str, seed: int, device: str, data: Path | None = None) -> Task:
    """The task of a system with one seed; the last one of each system is kept, for its other arms.

    data: that of the loader, in place of what is generated.
    """
    if _made.get(system, ())[:3] != (seed, device, data):
        module = importlib.import_module(f".tasks.{system}" if data is None else f".corpora.{system}", __package__)
        where = () if data is None else (data,)
        _made[system] = seed, device, data, module.make(*where, seed, torch.device(device))
    return _made[system][3]


def counter(part: Part, most: int) -> Callable[[], None]:
    """A function to call after each of at most so many epochs, that tells `part` of it."""
    epochs = itertools.count(1)
    return lambda: part(next(epochs) / most)


def part_of(show: Show, what: str, before: int, total: int) -> Part:
    """For one of several trainings: how much of all is done."""
    return lambda done: show(what, before + min(done, 0.99), total)


def work(unit: Unit, part: Part = lambda done: None) -> Row:
    """Train and judge."""
    task = make_task(unit.system, unit.seed, unit.device, unit.data)
    tick = counter(part, unit.epochs or task.epochs)
    row, model = protocol.run(task, unit.arm, unit.setting, unit.seed, tick, epochs=unit.epochs, split=unit.split)
    if unit.pictures is not None and model is not None:
        from ._pictures import draw_weights

        with torch.no_grad():
            draw_weights(task.panels(model), unit.pictures / f"{unit.system}.png")
    return {"system": unit.system, **row}


def attempt(trial: Trial, part: Part = lambda done: None) -> dict[protocol.Setting, protocol.Reached]:
    """What is reached with each setting that is tried."""
    task = make_task(trial.system, protocol.SEARCH_SEED, trial.device)
    return protocol.search(task, trial.arm, counter(part, protocol.TRIALS))


def work_all(
    do: Callable[..., Result], units: Sequence[Job], jobs: int, console: Console
) -> Iterator[tuple[Job, Result]]:
    """Each unit and what `do` makes of it, in the order in which they are done."""
    with progress(console) as show:
        if jobs == 1:
            for i, unit in enumerate(units):
                part = part_of(show, str(unit), i, len(units))
                part(0.0)
                yield unit, do(unit, part)
            return
        with ProcessPoolExecutor(
            jobs, get_context("spawn"), torch.set_num_threads, (torch.get_num_threads(),)
        ) as pool:
            begun = {pool.submit(do, unit): unit for unit in units}
            try:
                show(f"{jobs} at once", 0, len(units))
                for i, done in enumerate(as_completed(begun), 1):
                    show(str(begun[done]), i, len(units))
                    yield begun[done], done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what has not begun is not waited for
                raise
