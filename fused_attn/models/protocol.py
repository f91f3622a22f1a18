"""How the arms of a task are compared: one search for all, early stopping, and a test split that is looked at once.

1. `search` trains an arm on data drawn from `SEARCH_SEED` with each of the `RATES` of learning, then with the best of
   them and each of the `DECAYS` of weights, and the setting with the best validation score is kept, of
   equal ones that which reaches it first (`python -m fused_attn.models --search`). Those of all arms are stored in
   `settings.json`.
2. Tasks, arms, baselines and what the search tries are frozen by a commit, and only then are the `final_seeds` drawn:
   they are a hash of that commit, so that nobody could have looked at a test score before.
3. `run` trains each arm with each of these seeds, stops by the validation split of that seed, and judges the best
   epoch's model on its test split, once.

Adam with decoupled weight decay, gradients clipped to a norm of 1. The model of the epoch with the best validation
score is kept; training ends after `PATIENCE` epochs without a better one, or when there can be none.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ._arms import make_oracle, undecayed
from .tasks import TEST, VALIDATION, Task

PLAN = Path(__file__).with_name("settings.json")
SEARCH_SEED = 0
SEEDS = 5
PATIENCE, CLIP = 20, 1.0  # attention may be uniform for a dozen epochs before it starts


class Setting(NamedTuple):
    """What is chosen for an arm."""

    learning_rate: float
    weight_decay: float


DEFAULT = Setting(3e-3, 0.0)
"""Of an arm that nothing is stored for."""
RATES, DECAYS = (1e-3, 3e-3, 1e-2), (0.0, 0.1)
TRIALS = len(RATES) + len(DECAYS) - 1  # of a search


class Fit(NamedTuple):
    """A trained model in evaluation mode, and its validation score after each epoch."""

    model: nn.Module
    curve: list[float]


def final_seeds(commit: str, count: int = SEEDS) -> list[int]:
    """Seeds that follow from the commit that froze the tasks."""
    return [int(hashlib.sha256(f"{commit} {i}".encode()).hexdigest()[:7], 16) for i in range(count)]


def build(task: Task, arm: str) -> nn.Module:
    """A fresh model of an arm. What makes an oracle is the same in every task."""
    model = task.build(arm)
    if arm == "oracle":
        make_oracle(model)
    return model


def fit(
    task: Task,
    arm: str,
    setting: Setting,
    seed: int,
    tick: Callable[[], None] = lambda: None,
    epochs: int | None = None,
) -> Fit:
    """Train an arm; `tick` is called after each epoch.

    epochs: at most, in place of the task's own.
    """
    torch.manual_seed(seed)
    model = build(task, arm)
    alone = undecayed(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:  # a mean of what is given
        return Fit(model.eval(), [_validate(task, model)])
    groups = [
        {"params": [p for p in trained if p not in alone], "weight_decay": setting.weight_decay},
        {"params": [p for p in trained if p in alone], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], setting.learning_rate)
    order = torch.Generator().manual_seed(seed)
    curve: list[float] = []
    best = copy.deepcopy(model.state_dict())
    for epoch in range(task.epochs if epochs is None else epochs):
        for batch in task.batches(order, epoch):
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
        curve.append(_validate(task, model))
        tick()
        if curve[-1] > max(curve[:-1], default=float("-inf")):
            best = copy.deepcopy(model.state_dict())
        if max(curve) >= 1 or epoch - curve.index(max(curve)) >= PATIENCE:
            break
    model.load_state_dict(best)
    return Fit(model.eval(), curve)


@torch.no_grad()
def _validate(task: Task, model: nn.Module) -> float:
    score = task.judge(model.eval(), VALIDATION).score
    model.train()
    return score if score == score else float("-inf")  # NaN: training went wrong, and is never the best


class Reached(NamedTuple):
    """How good a setting is: the larger, the better."""

    score: float
    """The best validation score."""
    epoch: int
    """When it was reached, less than 0: the earlier, the larger."""


def search(task: Task, arm: str, tick: Callable[[], None] = lambda: None) -> dict[Setting, Reached]:
    """What an arm reaches with each setting that was tried; `tick` is called after each training."""
    found: dict[Setting, Reached] = {}

    def attempt(settings: list[Setting]) -> Setting:
        for setting in settings:
            curve = fit(task, arm, setting, SEARCH_SEED).curve
            found[setting] = Reached(max(curve), -1 - curve.index(max(curve)))
            tick()
        return max(found, key=lambda setting: found[setting])

    best = attempt([Setting(rate, DECAYS[0]) for rate in RATES])
    attempt([Setting(best.learning_rate, decay) for decay in DECAYS[1:]])
    return found


def run(
    task: Task,
    arm: str,
    setting: Setting,
    seed: int,
    tick: Callable[[], None] = lambda: None,
    *,
    epochs: int | None = None,
    split: str = TEST,
) -> tuple[dict[str, Any], nn.Module | None]:
    """The row of an arm or a baseline with one seed, as it is stored, and its model, which a baseline has none of."""
    start = time.perf_counter()
    row: dict[str, Any] = {"arm": arm, "seed": seed}
    model = None
    if arm in task.baselines:
        row["score"] = task.baselines[arm](split)
    else:
        model, curve = fit(task, arm, setting, seed, tick, epochs)
        with torch.no_grad():
            outcome = task.judge(model, split)
        row |= {"score": outcome.score, "localisation": dict(outcome.localisation), "curve": curve}
        row |= {"also": dict(outcome.also)} if outcome.also else {}
        row["setting"] = setting._asdict()
    return row | {"seconds": round(time.perf_counter() - start, 1)}, model


class Plan(NamedTuple):
    """What is stored in `settings.json`."""

    frozen: str | None
    """The commit that the final seeds follow from; None while tasks are still being made."""
    settings: dict[str, dict[str, Setting]]
    """By system and arm."""


def read_plan() -> Plan:
    """The stored plan."""
    stored = json.loads(PLAN.read_text())
    settings = {
        name: {arm: Setting(*x["setting"]) for arm, x in arms.items()} for name, arms in stored["settings"].items()
    }
    return Plan(stored["frozen"], settings)


def source(name: str) -> str:
    """What a system's search depends on, as a hash: the text of its task and of its model, and what is tried."""
    folder = Path(__file__).parent
    texts = [(folder / place / f"{name}.py").read_text() for place in ("tasks", ".")]
    return hashlib.sha256("\0".join([*texts, repr((RATES, DECAYS, PATIENCE))]).encode()).hexdigest()[:12]


def is_searched(name: str, arm: str) -> bool:
    """Whether the stored setting of an arm was found with the source as it is."""
    stored: Any = json.loads(PLAN.read_text())["settings"]
    return bool(stored.get(name, {}).get(arm, {}).get("source") == source(name))


def store_settings(name: str, arm: str, found: Mapping[Setting, Reached]) -> None:
    """Keep what the search found: the best setting, and all the scores that it was chosen by."""
    stored = json.loads(PLAN.read_text())
    stored["settings"].setdefault(name, {})[arm] = {
        "setting": list(max(found.items(), key=lambda x: x[1])[0]),
        "validation": {f"{x.learning_rate:g}, {x.weight_decay:g}": round(y.score, 4) for x, y in found.items()},
        "source": source(name),
    }
    PLAN.write_text(json.dumps(stored, indent=1) + "\n")
