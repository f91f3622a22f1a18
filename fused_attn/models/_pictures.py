"""Pictures of the experiments: weights beside the truth, learning curves, and differences with their intervals."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ._summary import COMPARED, Arm, Row, best_baseline, gain
from .tasks import Panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito's, for any eye
STYLES = dict(zip(COMPARED, ("-", "--", ":"), strict=True))
"""Of lines, so that they are told apart in grey too; a baseline's is dash-dotted."""
DPI = 120
MOST_INCHES = 60  # of a side of a picture: matplotlib takes minutes for more, and fails above 2 ** 16 dots
MOST_LETTERS = 40  # of a name


def colours_of(arms: Iterable[str]) -> dict[str, str]:
    """An arm that every task has looks the same in every picture; a baseline has one of the other colours."""
    others = [arm for arm in arms if arm not in COMPARED]
    left = itertools.cycle(COLOURS[len(COMPARED) :])
    return dict(zip(COMPARED, COLOURS, strict=False)) | dict(zip(others, left, strict=False))


def _save(figure: Figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white")  # on a dark page too
    plt.close(figure)


def _headless() -> None:
    """No window; and $ in a text is a dollar."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["text.parse_math"] = False


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def draw_weights(panels: Sequence[Panel], path: Path) -> None:
    """Weights as shades of one scale, an example below the other; what the truth names has a frame.

    Of no panels there is no picture. Of more columns or rows than it has room for every second, third, ... is named.
    """
    if not panels:
        return
    _headless()
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    longest = max(len(name) for panel in panels for name in panel.columns)
    side = 0.22 if longest < 3 else 0.45  # of a column, in inches
    wanted = max(6.5, 1.6 + side * max(len(panel.columns) for panel in panels))
    width = min(wanted, MOST_INCHES)
    titles = [textwrap.fill(_short(panel.title, 12 * MOST_LETTERS), int(13 * (width - 1.2))) for panel in panels]
    heights = [len(panel.rows) + 2 + 0.5 * title.count("\n") for panel, title in zip(panels, titles, strict=True)]
    heights = [height + 0.1 * min(longest, 14) for height in heights]  # names of columns are written aslant
    tall = 1 + 0.42 * sum(heights)
    figure, axes = plt.subplots(
        len(panels),
        squeeze=False,
        layout="constrained",
        height_ratios=heights,
        figsize=(width, min(tall, MOST_INCHES)),
    )
    every = [math.ceil(x / MOST_INCHES) for x in (wanted, tall)]  # one name of so many
    most = max(float(panel.weights.nan_to_num().max()) for panel in panels)
    for axis, panel, title in zip(axes[:, 0], panels, titles, strict=True):
        shades = axis.imshow(panel.weights.float().cpu().numpy(), cmap="Blues", vmin=0, vmax=most, aspect="auto")
        axis.set_title(title, fontsize=9, loc="left")
        ticks = [
            (range(0, len(names), step), [_short(name, MOST_LETTERS) for name in names[::step]])
            for names, step in zip((panel.columns, panel.rows), every, strict=True)
        ]
        axis.set_xticks(*ticks[0], fontsize=8)
        if longest > 2:
            plt.setp(axis.get_xticklabels(), rotation=40, ha="right")
        axis.set_yticks(*ticks[1], fontsize=8)
        for row, column in [] if panel.truth is None else panel.truth.nonzero().tolist():
            axis.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, ec=COLOURS[1], lw=1.6))
    marked = "; framed: where it should be" if any(panel.truth is not None for panel in panels) else ""
    label = f"attention weight (share of 1){marked}"
    figure.colorbar(
        shades,
        ax=axes[:, 0].tolist(),
        label=label,
        location="bottom",
        fraction=0.25 / figure.get_figheight(),
        pad=0.02,
        aspect=30,
        shrink=5 / width,
    )
    _save(figure, path)


def draw_curves(arms: Mapping[str, Sequence[Row]], metric: str, title: str, path: Path) -> None:
    """Validation scores by epoch: the mean of the seeds, and a band from the lowest to the highest.

    A run that stopped early goes on at its best score, which is what it is judged by.
    """
    _headless()
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axis = plt.subplots(layout="constrained", figsize=(6.4, 4))
    curves = {arm: [row["curve"] for row in rows if row.get("curve")] for arm, rows in arms.items()}
    last = max((len(curve) for some in curves.values() for curve in some), default=1)
    colours = colours_of(arms)
    for arm, some in curves.items():
        if some:
            each = np.array([curve + [max(curve)] * (last - len(curve)) for curve in some])
            epochs = np.arange(1, last + 1)
            dot = "o" if last == 1 else ""  # of one point there is no line
            axis.plot(epochs, each.mean(0), color=colours[arm], ls=STYLES.get(arm, "-."), label=arm, marker=dot)
            axis.fill_between(epochs, each.min(0), each.max(0), color=colours[arm], alpha=0.18, lw=0)
    seeds = max((len(some) for some in curves.values()), default=0)
    band = f"mean of {seeds} seeds, and from the lowest to the highest" if seeds > 1 else "one seed"
    axis.set_title(f"{title}\n", fontsize=11)
    axis.text(0.5, 1.02, band, transform=axis.transAxes, ha="center", va="bottom", fontsize=9)
    axis.set(xlabel="epoch", ylabel=f"validation {metric}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if axis.lines:
        axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_forest(systems: Mapping[str, Mapping[str, Arm]], path: Path) -> None:
    """Attention less uniform weights and less the best baseline, by the title of a system, with their intervals."""
    _headless()
    import matplotlib.pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure, axis = plt.subplots(
        layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12), figsize=(8, 1.5 + 0.5 * len(systems))
    )
    for y, arms in enumerate(systems.values()):
        baseline = best_baseline(arms)
        for over, place, colour, marker in (
            ("uniform", y - 0.15, COLOURS[0], "o"),
            (baseline, y + 0.15, COLOURS[1], "s"),
        ):
            difference = gain(arms, over)
            if difference is not None:
                axis.plot(
                    [difference.low, difference.high], [place, place], color=colour, lw=2, solid_capstyle="butt"
                )
                axis.plot(difference.mean, place, marker, color=colour, ms=6)
        if baseline is not None:
            axis.text(1.02, y + 0.15, baseline, transform=axis.get_yaxis_transform(), color=COLOURS[1], va="center")
    for label, colour, marker in (
        ("attention less uniform weights", COLOURS[0], "o"),
        ("attention less the best baseline, named on the right", COLOURS[1], "s"),
    ):
        axis.plot([], [], marker, color=colour, label=label)
    axis.axvline(0, color="grey", lw=1, ls="--", zorder=0)
    axis.set_yticks(range(len(systems)), list(systems))
    axis.set_ylim(len(systems) - 0.5, -0.5)
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.set_title("What attention adds to the score\n\n", fontsize=12)
    axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    several = any(len(arms.get("attention", ())) > 1 for arms in systems.values())
    spread = "mean of paired seeds, and 95 % of its resamples" if several else "one seed"
    axis.set_xlabel(f"difference of the scores: {spread}")
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    _save(figure, path)
