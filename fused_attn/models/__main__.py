"""Compare a published system's attention with what a sceptic would try: `python -m fused_attn.models NAME`.

Every arm is trained with five seeds (some two minutes a seed on one thread) and judged on test data that nothing was
chosen on; `fused_attn/models/protocol.py` says how. What is done is kept in --results, so that a run that was cut
off goes on there. Layers this small lose by a second thread: --jobs trains several arms at once instead.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import protocol
from ._work import Trial, Unit, attempt, make_task, work, work_all
from .corpora import CORPORA, DataError
from .tasks import SYSTEMS, TEST, VALIDATION, System

if TYPE_CHECKING:  # at run time after the arguments, so that --help needs neither
    from rich.console import Console
    from rich.table import Table

    from ._summary import Row


def check_arms(wanted: list[str] | None, there: list[str]) -> None:
    """End with a message where one is wanted that no system has."""
    unknown = [arm for arm in wanted or () if arm not in there]
    if unknown:
        sys.exit(f"--arm: expected some of {', '.join(dict.fromkeys(there))}; got {', '.join(unknown)}")


def search(names: list[str], arms: list[str] | None, device: str, jobs: int, console: Console) -> None:
    """Choose settings on validation scores, and store those of an arm once all have been tried.

    An arm that was searched with the same task, model and settings to try is left as it is.
    """
    tasks = {name: make_task(name, protocol.SEARCH_SEED, device) for name in names}
    check_arms(arms, [arm for task in tasks.values() for arm in task.arms])
    trials = []
    for name, task in tasks.items():
        for arm in task.arms:
            if (arms is None or arm in arms) and not protocol.is_searched(name, arm):
                trials.append(Trial(name, arm, device))
    for trial, found in work_all(attempt, trials, jobs, console):
        protocol.store_settings(trial.system, trial.arm, found)


def score_table(name: str, system: System, rows: list[Row]) -> Table:
    """Test scores, an arm a row, and the difference of each from attention."""
    from rich.table import Table

    from . import _summary

    arms = _summary.by_arm(rows, name)
    others = {arm: _summary.also(seeds) for arm, seeds in arms.items()}
    caption = f"{system.data}; {_summary.verdict(arms)}"
    table = Table("", title=f"{system.title}: {system.metric}", caption=caption)
    for column in ("mean ± deviation", "attention less it, 95 %", f"located {system.located}".strip(), "seeds"):
        table.add_column(column, justify="right")
    if any(others.values()):
        table.add_column("also", justify="right")
    for arm, seeds in arms.items():
        gain = None if arm == "attention" else _summary.gain(arms, arm)
        values = _summary.scores(seeds)
        table.add_row(
            arm,
            _summary.mean_and_deviation(values),
            "" if gain is None else str(gain),
            _summary.located(seeds),
            " ".join(f"{x:.3f}" for x in values),
            *([others[arm]] if any(others.values()) else []),
        )
    return table


def draw_all(systems: dict[str, System], rows: list[Row], folder: Path) -> None:
    """The learning curves of each system; of several, all their differences in one picture."""
    from . import _summary
    from ._pictures import draw_curves, draw_forest

    by_title = {}
    for name, system in systems.items():
        by_title[system.title] = arms = _summary.by_arm(rows, name)
        curves = {arm: list(seeds.values()) for arm, seeds in arms.items()}
        draw_curves(curves, system.metric, system.title, folder / f"{name}-curves.png")
    if len(by_title) > 1:
        draw_forest(by_title, folder / "differences.png")


def plan_units(args: argparse.Namespace, device: str, rows: list[Row], frozen: str | None, split: str) -> list[Unit]:
    """What is asked for and not done yet: system by system, and seed by seed, whose data all arms have."""
    plan, done = protocol.read_plan(), {(r["system"], r["arm"], r["seed"]) for r in rows}
    seeds = list(range(args.seeds)) if frozen is None else protocol.final_seeds(frozen, args.seeds)
    tasks = [make_task(name, seeds[0], device, args.data) for name in args.names]
    check_arms(args.arm, [arm for task in tasks for arm in (*task.arms, *task.baselines)])
    units = []
    for name, task in zip(args.names, tasks, strict=True):
        for number, seed in enumerate(seeds):
            for arm in (*task.arms, *task.baselines):
                if (name, arm, seed) not in done and (args.arm is None or arm in args.arm):
                    searched = plan.settings.get(name, {}).get(arm, protocol.DEFAULT)
                    setting = protocol.Setting(*(task.setting or searched))
                    pictures = args.output if number == 0 and arm == "attention" else None
                    units.append(
                        Unit(name, arm, number, seed, device, args.epochs, split, setting, pictures, args.data)
                    )
    return units


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="python -m fused_attn.models", description=(__doc__ or "").splitlines()[0])
    choices = [*SYSTEMS, "all"]
    parser.add_argument("names", nargs="+", choices=choices, metavar="NAME", help=", ".join(choices))
    help_ = f"a folder of public data, in place of what is generated, for one of {', '.join(CORPORA)}"
    parser.add_argument("--data", type=Path, help=help_, metavar="PATH")
    help_ = f"how many (default: {protocol.SEEDS}, at most 6)"
    parser.add_argument("--seeds", type=int, default=protocol.SEEDS, help=help_, metavar="N")
    parser.add_argument("--arm", action="append", help="only this one; may be given more than once")
    parser.add_argument("--epochs", type=int, help="at most (default: the task's own)")
    parser.add_argument("--output", type=Path, default=Path("models_output"), help="folder for the pictures")
    parser.add_argument("--results", type=Path, help="JSON lines, which are added to (default: in --output)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once (default: 1)")
    parser.add_argument("--threads", type=int, help="of a training; default: OMP_NUM_THREADS, or 1")
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    parser.add_argument("--search", action="store_true", help="choose settings on validation scores and store them")
    parser.add_argument(
        "--validation", action="store_true", help="seeds 0, 1, ... judged on validation data; no test"
    )
    args = parser.parse_args()
    if not 1 <= args.seeds <= 6:
        parser.error(f"--seeds: expected 1 to 6; got {args.seeds}")
    for name in ("threads", "jobs", "epochs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1; got {getattr(args, name)}")
    args.names = list(SYSTEMS) if "all" in args.names else list(dict.fromkeys(args.names))
    for name in ("output", "results", "data"):
        if getattr(args, name) is not None:
            setattr(args, name, getattr(args, name).expanduser())  # --data=~/x is left to us by the shell
    if args.data is not None:
        check_data(parser, args)
    return args


def check_data(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with the usage where --data does not go with the other arguments; its path is made absolute."""
    if len(args.names) != 1:
        parser.error(f"--data: expected one NAME; got {' '.join(args.names)}")
    if args.names[0] not in CORPORA:
        parser.error(f"--data: {args.names[0]} has no loader of public data; these have: {', '.join(CORPORA)}")
    if args.search:
        parser.error("--data: settings are those of the papers; --search is of generated data")
    args.data = args.data.resolve()


def choose_device(name: str | None) -> str:
    """The one that is asked for, or the GPU if there is one; ends with a message where nothing can be put on it."""
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter: PyTorch without CUDA
        sys.exit(f"--device: {device}: {str(error).splitlines()[0]}")
    return device


def make_room(path: Path, pictures: Path) -> None:
    """Make the folders of the rows and the pictures; ends with a message, before any training, where none can be."""
    for name, place in (("--output", pictures), ("--results", path.parent)):
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            sys.exit(f"{name}: expected a folder; {place}: {error.strerror}")
        if not os.access(place, os.W_OK):
            sys.exit(f"{name}: {place} is not writable")
    if path.is_dir() or (path.exists() and not os.access(path, os.R_OK | os.W_OK)):
        sys.exit(f"--results: expected a file that can be read and written; got {path}")


def main() -> int:
    """Train what is left to train, print the tables, save rows and pictures."""
    args = parse()
    try:
        import matplotlib  # noqa: F401
        from rich.console import Console
    except ImportError as error:
        sys.exit(f"{error.name} is not installed: pip install 'fused_attn[demo]'")
    from ._summary import add_row, read_rows

    if args.threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(args.threads or 1)
    device = choose_device(args.device)
    console = Console()
    if args.search:
        search(args.names, args.arm, device, args.jobs, console)
        return 0
    frozen = None if args.validation or args.data else protocol.read_plan().frozen
    split = VALIDATION if args.validation or not (frozen or args.data) else TEST
    if split == VALIDATION:
        console.print(
            "Scores are of validation data, by which settings may still be chosen; test data is not looked at."
        )
    where = {
        "frozen": frozen,
        "data": args.data and str(args.data),
        "split": split,
        "epochs": args.epochs,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    path = args.results or args.output / ("results.jsonl" if split == TEST else "validation.jsonl")
    same = {x: where[x] for x in ("frozen", "data", "split", "epochs")}  # else it is another experiment
    added = {"data": None, "split": split}  # what rows did not always have
    make_room(path, args.output)
    try:
        stored = read_rows(path)
    except ValueError as error:
        sys.exit(f"--results: {error}")
    rows = [] if args.validation else [r for r in stored if same.items() <= (added | r).items()]
    try:
        units = plan_units(args, device, rows, frozen, split)
    except DataError as error:
        sys.exit(str(error))
    for _, row in work_all(work, units, args.jobs, console):
        rows.append(row | where)
        add_row(path, rows[-1])
    systems = {name: (SYSTEMS if args.data is None else CORPORA)[name] for name in args.names}
    systems = {name: system for name, system in systems.items() if any(row["system"] == name for row in rows)}
    for name, system in systems.items():
        console.print(score_table(name, system, rows))
    draw_all(systems, rows, args.output)
    console.print(f"rows: {path}; pictures: {args.output}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
