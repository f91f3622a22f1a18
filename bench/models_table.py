"""Write the tables of the published systems from stored rows into docs/models.md and the README.

    python -m fused_attn.models all --results bench/results/models-2026-11-30.jsonl    trains, and stores the rows
    python -m bench.models_table [RESULTS.jsonl]                                       default: the newest day's

On a page they are what is between the lines of `MARKS`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fused_attn.models import _summary
from fused_attn.models._summary import Arm, Row
from fused_attn.models.tasks import SYSTEMS

from .run import ROOT

MARKS = "<!-- written by bench.models_table -->", "<!-- until here -->"
WHERE = "device", "torch", "python"

Arms = Mapping[str, Arm]


def newest(folder: Path = ROOT / "bench" / "results") -> Path | None:
    """The stored rows of the newest day, which their name says."""
    return max(folder.glob("models-*.jsonl"), default=None)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def score(arm: Arm | None, *, deviation: bool = True) -> str:
    """The mean of an arm that there may not be."""
    if not arm:
        return ""
    text = _summary.mean_and_deviation(_summary.scores(arm))
    return text if deviation else text.partition(" ")[0]


def gain(arms: Arms, over: str | None) -> str:
    """Attention less another arm that there may not be."""
    found = _summary.gain(arms, over)
    return "" if found is None else str(found)


def located(arms: Arms) -> str:
    """How far the weights of attention are on the truth, and uniform weights."""
    found, chance = (_summary.located(arms.get(arm, {})) for arm in ("attention", "uniform"))
    return f"{found}; uniform {chance}" if found and chance else found


def baseline(arms: Arms, *, deviation: bool = True) -> str:
    """The best one, its name first."""
    best = _summary.best_baseline(arms)
    return "" if best is None else f"{best}: {score(arms[best], deviation=deviation)}"


def systems(rows: Sequence[Row]) -> dict[str, Arms]:
    """By name, in the order of `SYSTEMS`: those that have rows.

    Raises ValueError for no rows, for validation scores, for a system that there is not and for rows of several runs.
    """
    if not rows:
        raise ValueError("rows: expected at least one; got none")
    if any(row["frozen"] is None for row in rows):
        raise ValueError("rows: expected scores on test data of frozen tasks; got validation scores")
    for name in ("frozen", "epochs", *WHERE):
        values = sorted({str(row[name]) for row in rows})
        if len(values) > 1:
            raise ValueError(f"rows: expected one {name!r}; got {', '.join(values)}")
    unknown = sorted({row["system"] for row in rows} - SYSTEMS.keys())
    if unknown:
        raise ValueError(f"rows: expected systems out of {', '.join(SYSTEMS)}; got {', '.join(unknown)}")
    found = {name: _summary.by_arm(rows, name) for name in SYSTEMS}
    return {name: arms for name, arms in found.items() if arms}


def readme(rows: Sequence[Row]) -> str:
    """One short line a system."""
    header = "system", "score", "attention", "uniform", "oracle", "best baseline", "attention less uniform, 95 %"
    lines = [
        [
            SYSTEMS[name].title,
            SYSTEMS[name].metric,
            *(score(arms.get(arm), deviation=False) for arm in _summary.COMPARED),
            baseline(arms, deviation=False),
            gain(arms, "uniform"),
        ]
        for name, arms in systems(rows).items()
    ]
    return markdown(header, lines)


def docs(rows: Sequence[Row], source: str) -> str:
    """Where the rows are from, what the systems are, their scores, and those of all arms and seeds."""
    found, first = systems(rows), rows[0]
    where = ", ".join(f"{name} {first[name]}" for name in WHERE)
    limit = "" if first["epochs"] is None else f", at most {first['epochs']} epochs"
    head = f"Test scores of `{source}` ({where}{limit}); tasks and settings as of commit {first['frozen'][:12]}."
    what = [
        [f"`{name}`", f"{x.title} ({x.paper})", x.op, x.structure, x.data, x.metric]
        for name, x in SYSTEMS.items()
        if name in found
    ]
    scores = [
        [
            f"`{name}`",
            *(score(arms.get(arm)) for arm in _summary.COMPARED),
            baseline(arms),
            gain(arms, "uniform"),
            gain(arms, _summary.best_baseline(arms)),
            located(arms),
            str(len(arms.get("attention", ()))),
        ]
        for name, arms in found.items()
    ]
    compared = "attention less uniform, 95 %", "attention less best baseline, 95 %"
    each = [
        [
            f"`{name}`",
            arm,
            score(seeds),
            "" if arm == "attention" else gain(arms, arm),
            _summary.located(seeds),
            " ".join(f"{x:.3f}" for x in _summary.scores(seeds)),
        ]
        for name, arms in found.items()
        for arm, seeds in arms.items()
    ]
    return "\n\n".join(
        [
            head,
            markdown(["NAME", "system", "op", "structure", "trained on", "score"], what),
            markdown(["NAME", *_summary.COMPARED, "best baseline", *compared, "located", "seeds"], scores),
            "Every arm:",
            markdown(["NAME", "arm", "mean ± deviation", "attention less it, 95 %", "located", "each seed"], each),
        ]
    )


def between(page: str) -> str:
    """What a page has between the marks."""
    return page.partition(MARKS[0] + "\n")[2].partition(MARKS[1])[0].strip("\n")


def replaced(page: str, text: str) -> str:
    """The page with that between the marks; ValueError where it does not have each of them once, in their order."""
    before, first, rest = page.partition(MARKS[0])
    _, second, after = rest.partition(MARKS[1])
    if not first or not second or any(mark in before + after for mark in MARKS):
        raise ValueError(f"page: expected the lines {MARKS[0]!r} and {MARKS[1]!r} once each")
    return f"{before}{first}\n{text}\n{second}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write both pages; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.models_table", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", help="JSON lines (default: the newest in bench/results)")
    path = parser.parse_args(argv).results or newest()
    if path is None or not path.is_file():
        parser.error(
            f"results: expected rows of `python -m fused_attn.models`; got {path or 'none in bench/results'}"
        )
    rows = [row for row in _summary.read_rows(path) if row.get("data") is None]  # public data are no part of these
    source = path.resolve()
    name = str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else path.name
    for page, text in ((ROOT / "README.md", readme(rows)), (ROOT / "docs" / "models.md", docs(rows, name))):
        page.write_text(replaced(page.read_text(), text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
