"""How arms are compared: early stopping, seeds, what is decayed, oracles; what the stored rows say."""

import json
import math

import pytest
import torch
from torch import nn

from fused_attn import ConcatAttention, LocationAttention
from fused_attn.models import _summary, protocol
from fused_attn.models._arms import is_oracle, make_oracle, on_truth, undecayed
from fused_attn.models.tasks import Outcome, Task

SETTING = protocol.Setting(0.1, 0.0)


def task(scores, epochs=30):
    """One weight that every epoch adds to, and validation scores that are given."""
    given = iter(scores)

    def batches(order, epoch):
        seen.append(epoch)
        return [torch.ones(1, 1)]

    seen: list[int] = []
    return seen, Task(
        build=lambda arm: nn.Linear(1, 1),
        batches=batches,
        loss=lambda model, x: -model(x).mean(),
        judge=lambda model, split: Outcome(next(given)),
        panels=lambda model: [],
        epochs=epochs,
    )


def test_the_best_epoch_is_kept_and_training_ends_when_nothing_gets_better():
    scores = [0.1, 0.5, 0.2, *[0.3] * 40]
    seen, some = task(scores)
    model, curve = protocol.fit(some, "attention", SETTING, 0)
    assert curve == scores[: 2 + protocol.PATIENCE]
    assert seen == list(range(2 + protocol.PATIENCE))
    _, twice = task([0.1, 0.5])
    torch.testing.assert_close(model.weight, protocol.fit(twice, "attention", SETTING, 0, epochs=2).model.weight)
    assert not model.training


def test_training_ends_when_nothing_can_be_better():
    _, some = task([0.5, 1.0, 1.0])
    assert protocol.fit(some, "attention", SETTING, 0).curve == [0.5, 1.0]


def test_the_search_tries_rates_and_then_decays():
    given = {1e-3: 0.2, 3e-3: 0.7, 1e-2: 0.4}
    _, some = task([*given.values(), 0.1], epochs=1)
    found = protocol.search(some, "attention")
    expected = {(rate, 0.0): (score, -1) for rate, score in given.items()} | {(3e-3, protocol.DECAYS[1]): (0.1, -1)}
    assert found == expected
    assert len(found) == protocol.TRIALS


def test_of_equal_settings_the_search_keeps_that_which_is_there_first(monkeypatch, tmp_path):
    monkeypatch.setattr(protocol, "PLAN", tmp_path / "plan.json")
    protocol.PLAN.write_text('{"frozen": null, "settings": {}}')
    _, some = task([0.1, 0.5, 0.5, 0.1, 0.1, 0.1, 0.5, 0.1], epochs=2)
    protocol.store_settings("mil", "attention", protocol.search(some, "attention"))
    assert protocol.read_plan().settings["mil"]["attention"] == (3e-3, 0.0)


def test_a_score_of_nan_is_never_the_best():
    _, some = task([math.nan, 0.2, math.nan, 0.1], epochs=4)
    assert protocol.fit(some, "attention", SETTING, 0).curve == [-math.inf, 0.2, -math.inf, 0.1]


def test_seeds_follow_from_the_commit():
    seeds = protocol.final_seeds("abc")
    assert seeds == protocol.final_seeds("abc")
    assert len({*seeds, *protocol.final_seeds("abd")}) == 2 * protocol.SEEDS
    assert protocol.final_seeds("abc", 2) == seeds[:2]


def test_the_stored_plan_can_be_read():
    plan = protocol.read_plan()
    chosen = [setting for arms in plan.settings.values() for setting in arms.values()]
    assert all(rate in protocol.RATES and decay in protocol.DECAYS for rate, decay in chosen)


def test_attention_is_not_decayed():
    model = nn.ModuleDict({"attend": ConcatAttention(3, 3, 4), "head": nn.Linear(3, 2), "norm": nn.LayerNorm(3)})
    decayed = {name for name, p in model.named_parameters() if p not in undecayed(model)}
    assert decayed == {"head.weight"}


def test_an_oracle_is_the_mean_over_the_truth():
    h, truth = torch.randn(2, 5, 3), torch.rand(2, 5) < 0.5
    truth[:, 0] = True
    own = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    model = nn.ModuleDict({"attend": LocationAttention(3, 4)})
    plain = model["attend"](h)
    with on_truth(model, model["attend"], truth):
        assert torch.equal(model["attend"](h), plain)  # of no oracle nothing changes
    make_oracle(model)
    assert is_oracle(model)
    for mask in (None, own):
        seen = truth if mask is None else truth & mask
        with on_truth(model, model["attend"], truth):
            got = model["attend"](h, mask=mask)
        torch.testing.assert_close(got, torch.stack([x[m].mean(0) for x, m in zip(h, seen, strict=True)]))
    torch.testing.assert_close(model["attend"](h), h.mean(1))


def test_bootstrap():
    assert _summary.bootstrap([1.0, 1.0, 1.0]) == (1, 1, 1, 3)
    mean, low, high, seeds = _summary.bootstrap([0.0, 0.1, 0.2, 0.3, 0.4])
    assert mean == pytest.approx(0.2)
    assert (low, high, seeds) == (pytest.approx(0.08), pytest.approx(0.32), 5)
    one = _summary.bootstrap([0.25])
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert str(one) == "+0.250 (one seed)"
    with pytest.raises(ValueError, match="1 to 6"):
        _summary.bootstrap([])


def test_differences_are_of_the_seeds_that_both_have(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert _summary.read_rows(path) == []
    rows = [
        {"system": system, "arm": arm, "seed": seed, "score": score}
        for system, arm, seed, score in (
            ("a", "attention", 1, 0.9),
            ("a", "attention", 2, 0.8),
            ("a", "uniform", 2, 0.5),
            ("b", "uniform", 1, 0.0),
        )
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arms = _summary.by_arm(_summary.read_rows(path), "a")
    assert _summary.difference(arms["attention"], arms["uniform"]).mean == pytest.approx(0.3)
    assert _summary.verdict(arms) == "attention less uniform weights: +0.300 (one seed), too few seeds for a verdict"
    assert _summary.mean_and_deviation(_summary.scores(arms["attention"])) == "0.850 ± 0.071"


def arms(**scores):
    return {arm: {seed: {"score": x} for seed, x in enumerate(some)} for arm, some in scores.items()}


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([0.5, 0.6, 0.6, 0.6, 0.5], "attention helps: +0.060 [+0.020, +0.100]"),
        ([0.5, 0.4, 0.4, 0.4, 0.5], "attention harms: -0.060 [-0.100, -0.020]"),
        ([0.5, 0.5, 0.5, 0.5, 0.6], "attention makes no clear difference: +0.020 [+0.000, +0.060]"),
        ([0.6, 0.6], "attention less uniform weights: +0.100 [+0.100, +0.100], too few seeds for a verdict"),
    ],
)
def test_verdict(scores, said):
    assert _summary.verdict(arms(attention=scores, uniform=[0.5] * 5)) == said


def test_deviation():
    assert _summary.mean_and_deviation([0.5]) == "0.500"
    assert _summary.mean_and_deviation([0.25, 0.75]) == "0.500 ± 0.354"
    assert _summary.mean_and_deviation([0.5, math.nan]) == "nan ± nan"


def test_the_best_baseline_is_none_of_the_arms_that_differ_in_their_weights_alone():
    found = arms(attention=[0.7], uniform=[0.9], oracle=[1.0], zero=[0.0], some=[0.5, 0.7], other=[0.55])
    assert _summary.best_baseline(found) == "some"
    assert _summary.gain(found, "some").mean == pytest.approx(0.2)
    assert _summary.best_baseline(arms(attention=[0.7], uniform=[0.9])) is None
    assert _summary.gain(found, None) is None


def test_scores_of_nan_give_no_interval_no_verdict_and_no_best_baseline():
    found = arms(attention=[0.6, 0.6, math.nan, 0.6, 0.6], uniform=[0.5] * 5, wrong=[math.nan], some=[0.3])
    over = _summary.gain(found, "uniform")
    assert all(map(math.isnan, over[:3]))
    assert _summary.verdict(found) == "no verdict: a seed has no score"
    assert _summary.best_baseline(found) == "some"


ROW = {"system": "a", "arm": "attention", "seed": 1, "score": 0.5}


@pytest.mark.parametrize("end", ["", "\n", '\n{"system": "a", "ar', "\n[]", "\n\xff"])
def test_the_rest_of_a_row_that_was_cut_off_makes_room(tmp_path, end):
    path = tmp_path / "rows.jsonl"
    path.write_bytes((json.dumps(ROW) + end).encode("latin-1"))
    assert _summary.read_rows(path) == [ROW]
    _summary.add_row(path, ROW | {"seed": 2})
    _summary.add_row(path, ROW | {"seed": 3})
    assert path.read_text() == "".join(json.dumps(ROW | {"seed": seed}) + "\n" for seed in (1, 2, 3))


@pytest.mark.parametrize("line", ["", "{", "3", '{"system": "a"}'])
def test_another_line_that_is_no_row_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{line}\n{json.dumps(ROW)}\n")
    with pytest.raises(ValueError, match=r"rows.jsonl:2: expected a row, JSON with system, arm, seed, score"):
        _summary.read_rows(path)


def test_levels_that_not_every_row_has():
    arm = {1: {"localisation": {"a": 0.25, "b": 1.0}, "also": {"x": 1.0}}, 2: {"localisation": {"a": 0.75}}}
    assert _summary.located(arm) == "0.50 (a), 1.00 (b)"
    arm[2]["also"] = {"y": 1.0}
    assert _summary.also(arm) == "x 1.000"
