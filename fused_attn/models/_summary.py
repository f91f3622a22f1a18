"""What the stored rows of `python -m fused_attn.models` say: means, spreads and paired differences."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]


class Interval(NamedTuple):
    """A mean difference, and where 95 % of the means lie that resampling its seeds gives."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that may not be there yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def bootstrap(differences: Sequence[float]) -> Interval:
    """Of paired differences, one a seed: all resamples with replacement, not a random choice of them.

    With five seeds these are 3,125; more than 6 seeds would be too many for that.
    """
    count = len(differences)
    if not 1 <= count <= 6:
        raise ValueError(f"differences: expected 1 to 6, one a seed; got {count}")
    means = sorted(statistics.fmean(x) for x in itertools.product(differences, repeat=count))
    outside = int(0.025 * len(means))
    return Interval(statistics.fmean(differences), means[outside], means[-1 - outside])


def by_arm(rows: Iterable[Row], system: str) -> dict[str, dict[int, Row]]:
    """Arm -> seed -> row, in the order of the rows."""
    result: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["system"] == system:
            result.setdefault(row["arm"], {})[row["seed"]] = row
    return result


def scores(arm: dict[int, Row]) -> list[float]:
    """One a seed."""
    return [row["score"] for row in arm.values()]


def mean_and_deviation(values: Sequence[float]) -> str:
    """In three digits; the deviation is that of a sample."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def difference(one: dict[int, Row], other: dict[int, Row]) -> Interval | None:
    """Of the seeds that both have; None where there are none."""
    pairs = [row["score"] - other[seed]["score"] for seed, row in one.items() if seed in other]
    return bootstrap(pairs) if pairs else None


def located(arm: dict[int, Row]) -> str:
    """The mean localisation of each level."""
    levels = [row["localisation"] for row in arm.values() if row.get("localisation")]
    return ", ".join(
        f"{statistics.fmean(x[level] for x in levels):.2f}" + (f" ({level})" if len(levels[0]) > 1 else "")
        for level in (levels[0] if levels else ())
    )


def verdict(arms: dict[str, dict[int, Row]]) -> str:
    """Whether attention is better than uniform weights, in words."""
    gain = difference(arms["attention"], arms["uniform"]) if {"attention", "uniform"} <= arms.keys() else None
    if gain is None:
        return ""
    word = "helps" if gain.low > 0 else "harms" if gain.high < 0 else "makes no clear difference"
    return f"attention {word}: {gain}"
