"""Baselines from scikit-learn, whose regularisation is chosen on the validation split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from . import TRAIN, VALIDATION

PENALTIES = (0.01, 0.1, 1.0, 10.0)  # C of scikit-learn: the inverse of the penalty


def accuracy(model: Any, x: Any, y: Any) -> float:
    """Of a classifier."""
    return float(model.score(x, y))


def logistic_regression(
    x: Mapping[str, Any], y: Mapping[str, Any], split: str, metric: Callable[[Any, Any, Any], float] = accuracy
) -> float:
    """The score on `split` of the penalty with the best validation score; x and y are by split."""
    from sklearn.linear_model import LogisticRegression  # here, so that tasks need it for their baselines alone

    models = [LogisticRegression(C=c, max_iter=2000).fit(x[TRAIN], y[TRAIN]) for c in PENALTIES]
    best = max(models, key=lambda model: metric(model, x[VALIDATION], y[VALIDATION]))
    return metric(best, x[split], y[split])


def counts(texts: Mapping[str, Iterable[Iterable[str]]]) -> dict[str, Any]:
    """How often each word is in each text, by split, of words that the training split has."""
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(analyzer=list).fit(texts[TRAIN])
    return {split: vectorizer.transform(some) for split, some in texts.items()}


def bag_of_words(
    data: Mapping[str, Iterable[Any]], words: Callable[[Any], Iterable[str]], label: Callable[[Any], Any]
) -> Callable[[str], float]:
    """Logistic regression on what `words` makes of each example, by split; `label` is its class."""

    def judge(split: str) -> float:
        x = counts({name: [list(words(example)) for example in some] for name, some in data.items()})
        y = {name: [label(example) for example in some] for name, some in data.items()}
        return logistic_regression(x, y, split)

    return judge
