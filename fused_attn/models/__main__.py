"""Train a published system with and without attention: `python -m fused_attn.models NAME` (one to two minutes).

On one CPU thread, since layers this small lose by a second one, and by far where another program keeps it busy;
--threads or OMP_NUM_THREADS say otherwise.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ._progress import progress
from .tasks import SYSTEMS, Panel, Task

if TYPE_CHECKING:  # at run time after the arguments, so that --help needs neither
    from rich.console import Console
    from rich.table import Table


def train(task: Task, attention: bool, seed: int, epochs: int, tick: Callable[[], None] = lambda: None) -> nn.Module:
    """A trained model in evaluation mode; `tick` is called after each epoch."""
    torch.manual_seed(seed)
    model = task.build(attention)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], task.learning_rate)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in task.batches(order):
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
        tick()
    return model.eval()


def experiment(name: str, seeds: int, epochs: int | None, output: Path, console: Console) -> dict[bool, list[float]]:
    """Held-out scores of every seed, by whether there is attention. Draws the weights of the first seed."""
    make = importlib.import_module(f".tasks.{name}", __package__).make
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scores: dict[bool, list[float]] = {True: [], False: []}
    with progress(console) as show:
        for seed in range(seeds):
            task = make(seed, device)
            total = task.epochs if epochs is None else epochs
            for arm, attention in enumerate(scores):
                what = f"{name} on {device.type}: seed {seed}, {'with' if attention else 'without':7} attention"
                done = (2 * seed + arm) * total

                def tick(what: str = what, all_epochs: int = 2 * seeds * total) -> None:
                    nonlocal done
                    show(what, done, all_epochs)
                    done += 1

                tick()
                model = train(task, attention, seed, total, tick)
                with torch.no_grad():
                    scores[attention].append(task.score(model))
                    if attention and seed == 0:
                        draw(task.panels(model), output / f"{name}.png")
    return scores


def verdict(scores: dict[bool, list[float]]) -> str:
    """Whether attention helped, in words."""
    gains = [a - b for a, b in zip(scores[True], scores[False], strict=True)]
    better = sum(gain > 0 for gain in gains)
    gain = statistics.mean(gains)
    word = "helps" if gain > 0 and better == len(gains) else "does not clearly help" if gain > 0 else "does not help"
    return f"attention {word}: {gain:+.3f} on average, better with {better} of {len(gains)} seeds"


def score_table(name: str, scores: dict[bool, list[float]]) -> Table:
    """Held-out scores, a row with and a row without attention."""
    from rich.table import Table

    system = SYSTEMS[name]
    table = Table("", title=f"{system.title}: held-out {system.metric}", caption=f"{system.data}; {verdict(scores)}")
    for column in ["mean", *(f"seed {i}" for i in range(len(scores[True])))]:
        table.add_column(column, justify="right")
    for attention, row in scores.items():
        cells = (f"{x:.3f}" for x in [statistics.mean(row), *row])
        table.add_row("attention" if attention else "uniform weights", *cells)
    return table


def draw(panels: list[Panel], path: Path) -> None:
    """Save the weights as shades, an example below the other."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    heights = [len(panel.rows) + 2.5 for panel in panels]
    figure, axes = plt.subplots(
        len(panels),
        squeeze=False,
        layout="constrained",
        height_ratios=heights,
        figsize=(max(6.0, 1 + 0.45 * max(len(p.columns) for p in panels)), 0.6 + 0.42 * sum(heights)),
    )
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        axis.imshow(panel.weights.float().cpu().numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.set_title(panel.title, fontsize=9, loc="left")
        axis.set_xticks(range(len(panel.columns)), panel.columns, rotation=40, ha="right", fontsize=8)
        axis.set_yticks(range(len(panel.rows)), panel.rows, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    """Train, print the table, save the picture and, where asked, the scores."""
    parser = argparse.ArgumentParser(prog="python -m fused_attn.models", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "names", nargs="+", choices=[*SYSTEMS, "all"], metavar="NAME", help=", ".join([*SYSTEMS, "all"])
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1 (default: 3)", metavar="N")
    parser.add_argument("--epochs", type=int, help="default: the task's own")
    parser.add_argument("--output", type=Path, default=Path("models_output"), help="folder for the pictures")
    parser.add_argument("--json", type=Path, help="write the scores there")
    parser.add_argument("--threads", type=int, help="of the CPU; default: OMP_NUM_THREADS, or 1")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds: expected at least 1; got {args.seeds}")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads: expected at least 1; got {args.threads}")
    try:
        import matplotlib  # noqa: F401
        from rich.console import Console
    except ImportError as error:
        sys.exit(f"{error.name} is not installed: pip install 'fused_attn[demo]'")
    if args.threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(args.threads or 1)
    console, rows = Console(), []
    for name in SYSTEMS if "all" in args.names else args.names:
        scores = experiment(name, args.seeds, args.epochs, args.output, console)
        console.print(score_table(name, scores))
        console.print(f"weights of seed 0: {args.output / f'{name}.png'}")
        rows.append(
            {"system": name, "metric": SYSTEMS[name].metric, "attention": scores[True], "uniform": scores[False]}
        )
    if args.json:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
        args.json.write_text(
            json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
