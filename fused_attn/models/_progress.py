"""How far a training is: a bar on a terminal, and lines where the output goes to a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

SECONDS = 2.0  # between two lines of the same description

Show = Callable[[str, float, int], None]


@contextmanager
def progress(console: Console) -> Iterator[Show]:
    """A function to call with (description, trainings done, in all) before the first and after each of them."""
    if console.is_terminal:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("", total=None)
            yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
        return
    start = time.monotonic()
    last, said = start, ""

    def line(what: str, done: float, total: int) -> None:
        nonlocal last, said
        now = time.monotonic()
        if what != said or done == total or now - last >= SECONDS:
            text = f"{what}: {done:.3g} of {total} trainings, {now - start:.0f} s"
            console.print(text, highlight=False, markup=False, soft_wrap=True)  # which flushes
            last, said = now, what

    yield line
