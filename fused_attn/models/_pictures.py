"""Pictures of the experiments: weights beside the truth, learning curves, and differences with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ._summary import Interval, Row
from .tasks import Panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito's, for any eye
DPI = 120


def _save(figure: Figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white")  # on a dark page too
    plt.close(figure)


def _headless() -> None:
    import matplotlib as mpl

    mpl.use("Agg")


def draw_weights(panels: Sequence[Panel], path: Path) -> None:
    """Weights as shades, an example below the other; what the truth names has a frame."""
    _headless()
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    heights = [len(panel.rows) + 2.5 for panel in panels]
    figure, axes = plt.subplots(
        len(panels),
        squeeze=False,
        layout="constrained",
        height_ratios=heights,
        figsize=(max(6.0, 1.6 + 0.45 * max(len(p.columns) for p in panels)), 0.6 + 0.42 * sum(heights)),
    )
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        shades = axis.imshow(panel.weights.float().cpu().numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.set_title(panel.title, fontsize=9, loc="left")
        axis.set_xticks(range(len(panel.columns)), panel.columns, rotation=40, ha="right", fontsize=8)
        axis.set_yticks(range(len(panel.rows)), panel.rows, fontsize=8)
        for row, column in [] if panel.truth is None else panel.truth.nonzero().tolist():
            axis.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, ec=COLOURS[1], lw=1.6))
    marked = "; framed: where it should be" if any(panel.truth is not None for panel in panels) else ""
    figure.colorbar(shades, ax=axes[:, 0].tolist(), label=f"attention weight (share){marked}", shrink=0.6, aspect=30)
    _save(figure, path)


def draw_curves(arms: Mapping[str, Sequence[Row]], metric: str, title: str, path: Path) -> None:
    """Validation scores by epoch: the mean of the seeds, and a band from the lowest to the highest.

    A run that stopped early goes on at its best score, which is what it is judged by.
    """
    _headless()
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(layout="constrained", figsize=(6.4, 4))
    curves = {arm: [row["curve"] for row in rows if row.get("curve")] for arm, rows in arms.items()}
    last = max((len(curve) for some in curves.values() for curve in some), default=1)
    for (arm, some), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
        if some:
            each = np.array([curve + [max(curve)] * (last - len(curve)) for curve in some])
            epochs = np.arange(1, last + 1)
            axis.plot(epochs, each.mean(0), color=colour, label=arm)
            axis.fill_between(epochs, each.min(0), each.max(0), color=colour, alpha=0.18, lw=0)
    axis.set(title=title, xlabel="epoch", ylabel=f"validation {metric}")
    if axis.lines:
        axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_forest(gains: Mapping[str, Interval], path: Path) -> None:
    """Attention less uniform weights, a line a system, with its interval."""
    _headless()
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(layout="constrained", figsize=(6.4, 0.8 + 0.4 * len(gains)))
    for y, (mean, low, high) in enumerate(gains.values()):
        axis.plot([low, high], [y, y], color=COLOURS[0], lw=2)
        axis.plot(mean, y, "o", color=COLOURS[0])
    axis.axvline(0, color="grey", lw=1, ls="--")
    axis.set_yticks(range(len(gains)), list(gains))
    axis.invert_yaxis()
    axis.set(
        title="Attention beside uniform weights",
        xlabel="difference of the scores: mean of paired seeds, and 95 % of its resamples",
    )
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
