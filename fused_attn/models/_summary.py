"""What the stored rows of `python -m fused_attn.models` say: means, spreads and paired differences."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
KEYS = ("system", "arm", "seed", "score")
"""What every row has."""
Arm = dict[int, Row]
"""By seed."""
COMPARED = ("attention", "uniform", "oracle")
"""The arms that differ in the weights alone; all others are baselines."""
SEEDS_FOR_A_VERDICT = 5
"""Fewer all point one way too often where nothing is different: three do in one experiment of four."""


class Interval(NamedTuple):
    """A mean difference, and where 95 % of the means lie that resampling its seeds gives."""

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} " + ("(one seed)" if self.seeds == 1 else f"[{self.low:+.3f}, {self.high:+.3f}]")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that may not be there yet, without the rest of a last one that was cut off.

    Raises ValueError for any other line that is no row.
    """
    *whole, last = path.read_text(errors="replace").split("\n") if path.exists() else [""]
    rows = [_row(line) for line in whole]
    for number, row in enumerate(rows, 1):
        if row is None:
            raise ValueError(
                f"{path}:{number}: expected a row, JSON with {', '.join(KEYS)}; got {whole[number - 1]!r}"
            )
    return [row for row in (*rows, _row(last)) if row is not None]


def add_row(path: Path, row: Row) -> None:
    """Write a row below those of a file. The rest of a last one that was cut off makes room for it."""
    begun = path.read_bytes().rpartition(b"\n")[2] if path.exists() else b""
    whole = not begun or _row(begun.decode(errors="replace")) is not None
    if not whole:
        os.truncate(path, path.stat().st_size - len(begun))
    with path.open("ab") as file:
        file.write((b"\n" if begun and whole else b"") + json.dumps(row).encode() + b"\n")


def _row(line: str) -> Row | None:
    """What a line says; None for what is no row."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and row.keys() >= {*KEYS} else None


def bootstrap(differences: Sequence[float]) -> Interval:
    """Of paired differences, one a seed: all resamples with replacement, not a random choice of them.

    With five seeds these are 3,125; more than 6 seeds would be too many for that. One has no interval: NaN; and
    neither have differences of which one is NaN, whose order would mean nothing.
    """
    count = len(differences)
    if not 1 <= count <= 6:
        raise ValueError(f"differences: expected 1 to 6, one a seed; got {count}")
    if count == 1 or not all(map(math.isfinite, differences)):
        return Interval(statistics.fmean(differences), math.nan, math.nan, count)
    means = sorted(statistics.fmean(x) for x in itertools.product(differences, repeat=count))
    outside = int(0.025 * len(means))
    return Interval(statistics.fmean(differences), means[outside], means[-1 - outside], count)


def by_arm(rows: Iterable[Row], system: str) -> dict[str, Arm]:
    """Arm -> seed -> row: attention, uniform weights and the oracle, then the baselines in the order of the rows."""
    result: dict[str, Arm] = {arm: {} for arm in COMPARED}
    for row in rows:
        if row["system"] == system:
            result.setdefault(row["arm"], {})[row["seed"]] = row
    return {arm: seeds for arm, seeds in result.items() if seeds}


def scores(arm: Arm) -> list[float]:
    """One a seed."""
    return [row["score"] for row in arm.values()]


def mean_and_deviation(values: Sequence[float]) -> str:
    """In three digits; the deviation is that of a sample."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    variance = math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1)  # statistics.stdev raises for NaN
    return f"{mean:.3f} ± {math.sqrt(variance):.3f}"


def difference(one: Arm, other: Arm) -> Interval | None:
    """Of the seeds that both have; None where there are none."""
    pairs = [row["score"] - other[seed]["score"] for seed, row in one.items() if seed in other]
    return bootstrap(pairs) if pairs else None


def gain(arms: Mapping[str, Arm], over: str | None) -> Interval | None:
    """Attention less another arm; None where either is missing."""
    return difference(arms.get("attention", {}), arms.get(over or "", {}))


def best_baseline(arms: Mapping[str, Arm]) -> str | None:
    """The arm with the highest mean that has neither attention, nor uniform weights, nor the truth.

    Chosen by the scores that are shown, which favours it. One without a score (NaN) is the best of none but its like.
    """
    means = {arm: statistics.fmean(scores(rows)) for arm, rows in arms.items() if arm not in COMPARED}
    return max(means, key=lambda arm: -math.inf if math.isnan(means[arm]) else means[arm], default=None)


def located(arm: Arm) -> str:
    """The mean localisation of each level."""
    levels = [row["localisation"] for row in arm.values() if row.get("localisation")]
    return ", ".join(
        f"{statistics.fmean(x[level] for x in levels if level in x):.2f}"
        + (f" ({level})" if len(levels[0]) > 1 else "")
        for level in (levels[0] if levels else ())
    )


def also(arm: Arm) -> str:
    """The means of other scores, by their names."""
    rows = [row["also"] for row in arm.values() if row.get("also")]
    return ", ".join(
        f"{name} {statistics.fmean(x[name] for x in rows if name in x):.3f}" for name in (rows[0] if rows else ())
    )


def verdict(arms: Mapping[str, Arm]) -> str:
    """Whether attention is better than uniform weights, in words."""
    over = gain(arms, "uniform")
    if over is None:
        return ""
    if over.seeds < SEEDS_FOR_A_VERDICT:
        return f"attention less uniform weights: {over}, too few seeds for a verdict"
    if math.isnan(over.mean):
        return "no verdict: a seed has no score"
    word = "helps" if over.low > 0 else "harms" if over.high < 0 else "makes no clear difference"
    return f"attention {word}: {over}"
