"""Few calls that try every pair of factors, for the Case of any family."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


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
