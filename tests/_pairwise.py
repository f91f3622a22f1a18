"""Few calls that try every pair of factors, for the Case of any family."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TypeVar

T = TypeVar("T")


class Factors:
    """A dataclass whose fields are factors: those that are not at their defaults are a test's id."""

    def __str__(self) -> str:
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return ",".join(f"{name}={_word(x)}" for name, x in changed.items()) or "default"


def _word(x: object) -> str:
    return "+".join(map(str, x)) if isinstance(x, tuple) else str(x).removeprefix("torch.")


def pairwise(factors: Mapping[str, Sequence], make: Callable[..., T], seed: int = 0) -> list[T]:
    """Few cases such that every two values of different factors meet in one: greedy, and always the same."""
    rng = random.Random(seed)
    names = list(factors)
    unmet = {
        ((m, x), (n, y))
        for m, n in itertools.combinations(names, 2)
        for x, y in itertools.product(range(len(factors[m])), range(len(factors[n])))
    }

    def meets(picks: Mapping[str, int]) -> set:
        return set(itertools.combinations(((n, picks[n]) for n in names if n in picks), 2)) & unmet

    cases = []
    while unmet:
        picks = dict(min(unmet))
        for name in rng.sample(names, len(names)):
            if name not in picks:
                gains = [(len(meets({**picks, name: i})), rng.random(), i) for i in range(len(factors[name]))]
                picks[name] = max(gains)[2]
        unmet -= meets(picks)
        cases.append(make(**{name: factors[name][i] for name, i in picks.items()}))
    return cases
