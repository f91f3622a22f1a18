"""The papers' public data: a file a system, with `make(path, seed, device) -> Task`.

Nothing is downloaded. A loader reads the files as they are handed out, knows them by their names, and uses the splits
that they have; where there is no validation split, a fixed tenth of the training data is it. Data, splits and bags
are the same for every seed: seeds are of the initial numbers and of the order of training.

What is in no known format raises `DataError`, with the file and the line. Nothing is left out but what a loader's
docstring names. Each stands in memory as packed numbers, of which a batch takes what it needs; features of slides
stay in their files.
"""

from __future__ import annotations

from ..tasks import SYSTEMS, System
from ._files import DataError

__all__ = ["CORPORA", "DataError"]

CORPORA: dict[str, System] = {
    name: SYSTEMS[name]._replace(data=data, metric=metric)
    for name, data, metric in (
        ("can", "bAbI, one task", "accuracy"),
        ("acf", "MovieLens: the last film of each user, among all that are new to the user", "hits in the first 100"),
        ("entailment", "SNLI 1.0", "accuracy"),
        ("han", "reviews of Zhang et al. 2015 or of Tang et al. 2015", "accuracy"),
        ("mil", "MNIST-bags, or features of slides", "AUC"),
    )
}
"""The systems that have a loader, and what they are trained on."""
