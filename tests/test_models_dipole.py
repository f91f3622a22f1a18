import pytest
import torch
from _models import assert_formula, assert_only_scores_differ, check_kernel, check_task

from fused_attn.models import Dipole
from fused_attn.models.tasks import dipole as task

CODES, LABELS, LENGTHS = 7, 4, torch.tensor([5, 0, 3, 1])


def build(dtype=torch.float64, **options) -> Dipole:
    torch.manual_seed(0)
    return Dipole(CODES, LABELS, embed_dim=4, hidden_dim=3, output_dim=5, attn_dim=6, **options).to(dtype)


def visits(dtype=torch.float64) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 5, CODES, dtype=dtype)


def formula(model, x, lengths, score, strict):
    """Logits of every visit, patient after patient, and the weights of each."""
    p = dict(model.named_parameters())
    logits, weights = [], []
    for history, length in zip(x, lengths.tolist(), strict=True):
        if length == 0:
            continue
        v = torch.relu(history[:length] @ p["embed.weight"].T + p["embed.bias"])
        h = model.encoder(v[None])[0][0]
        for t in range(length):
            seen = range(t if strict else t + 1)
            c = torch.zeros_like(h[0])
            row = torch.zeros(x.shape[1], dtype=x.dtype)
            if len(seen):
                if score == "location":
                    s = torch.stack([p["attend.proj.weight"][0] @ h[i] + p["attend.proj.bias"][0] for i in seen])
                elif score == "general":
                    s = torch.stack([h[t] @ p["attend.weight"] @ h[i] for i in seen])
                else:
                    w = torch.cat([p["attend.query_proj.weight"], p["attend.key_proj.weight"]], 1)  # of [h_t; h_i]
                    s = torch.stack(
                        [p["attend.score.weight"][0] @ torch.tanh(w @ torch.cat([h[t], h[i]])) for i in seen]
                    )
                a = s.exp() / s.exp().sum()
                c = sum(a[i] * h[i] for i in seen)
                row = torch.cat([a, row[len(seen) :]])
            h_tilde = torch.tanh(p["combine.weight"] @ torch.cat([c, h[t]]))
            logits.append(p["output.weight"] @ h_tilde + p["output.bias"])
            weights.append(row)
    return torch.stack(logits), torch.stack(weights)


@pytest.mark.parametrize("score", ["location", "general", "concat"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_formula(score, strict, bidirectional):
    model = build(score=score, strict=strict, bidirectional=bidirectional)
    x = visits().requires_grad_()
    valid = torch.arange(5) < LENGTHS[:, None]
    got = [y[valid] for y in model(x, LENGTHS, return_weights=True)]
    assert_formula(model, got, formula(model, x, LENGTHS, score, strict), {"visits": x})
    torch.testing.assert_close(model(x, LENGTHS)[valid], got[0])


@pytest.mark.parametrize("score", ["location", "general", "concat"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_what_is_past_the_end_is_not_seen(score, bidirectional):
    model, x, valid = build(score=score, bidirectional=bidirectional), visits(), torch.arange(5) < LENGTHS[:, None]
    dirty = x.masked_fill(~valid[..., None], torch.nan).requires_grad_()
    out = model(dirty, LENGTHS)
    torch.testing.assert_close(out[valid], model(x, LENGTHS)[valid], rtol=0, atol=0)
    (grad,) = torch.autograd.grad(out[valid].sum(), dirty)
    assert grad.isfinite().all()
    assert (grad[~valid] == 0).all()


def test_later_visits_are_not_seen_by_a_forward_encoder():
    model, x, lengths = build(bidirectional=False), visits(), torch.full((4,), 5)
    changed = x.clone()
    changed[:, 3:] += 1
    before, after = model(x, lengths), model(changed, lengths)
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=0)
    assert not torch.equal(before[:, 3:], after[:, 3:])


@pytest.mark.parametrize("score", ["location", "general", "concat"])
def test_first_visit_has_no_context(score):
    model, x, lengths = build(score=score), visits(), torch.full((4,), 5)
    logits, weights = model(x, lengths, return_weights=True)
    assert (weights[:, 0] == 0).all()
    h = model.encoder(torch.relu(model.embed(x)))[0][:, 0]
    alone = model.output(torch.tanh(h @ model.combine.weight[:, 6:].T))
    torch.testing.assert_close(logits[:, 0], alone)


@pytest.mark.parametrize("score", ["location", "general", "concat"])
def test_without_attention_is_the_mean(score):
    model, x = build(score=score, attention=False), visits()
    weights = model(x, LENGTHS, return_weights=True)[1]
    for b, length in enumerate(LENGTHS.tolist()):
        for t in range(length):
            expected = torch.zeros(5, dtype=torch.float64)
            expected[:t] = 1 / max(t, 1)
            torch.testing.assert_close(weights[b, t], expected)
    assert_only_scores_differ(model, build(score=score))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"codes": 0}, ValueError, "codes: expected at least 1; got 0"),
        ({"attn_dim": 0}, ValueError, "attn_dim: expected at least 1; got 0"),
        ({"score": "dot"}, ValueError, "score: expected one of location, general, concat; got 'dot'"),
        ({"visits": torch.zeros(4, 5, 6)}, ValueError, "visits: expected shape"),
        ({"visits": [[0.0]]}, TypeError, "visits: expected a torch.Tensor"),
        ({"lengths": torch.tensor([5, 0, 3])}, ValueError, "lengths: expected shape"),
        ({"lengths": torch.tensor([5, 0, 3, 6])}, ValueError, "lengths: expected numbers from 0 to 5"),
        ({"lengths": torch.ones(4)}, TypeError, "lengths: expected dtype int32, int64; got float32"),
    ],
)
def test_bad_arguments(change, error, text):
    def run():
        options = {k: v for k, v in change.items() if k not in ("visits", "lengths")}
        model = Dipole(**({"codes": CODES, "labels": LABELS, "hidden_dim": 3} | options))
        model(change.get("visits", torch.zeros(4, 5, CODES)), change.get("lengths", LENGTHS))

    with pytest.raises(error, match=text):
        run()


@pytest.mark.kernel
def test_kernel(device):
    x, valid = visits(torch.float32).to(device).requires_grad_(), torch.arange(5) < LENGTHS[:, None]
    check_kernel(build, lambda model: model(x, LENGTHS.to(device))[valid], device, [x])


@pytest.mark.parametrize("score", ["location", "general", "concat"])
def test_task(score, monkeypatch):
    monkeypatch.setattr(task, "PATIENTS", {"train": 64, "validation": 20, "test": 20})
    patients = task.draw_patients(0)
    assert len({history for some in patients.values() for history, _ in some}) == 104
    check_task(task.make(0, torch.device("cpu"), score=score))


def test_the_latest_disease_of_the_organ_that_hurts_comes_back():
    patients = task.draw_patients(1)["test"][:50]
    for history, disease in patients:
        (complaint, *_), organ = history[-1], disease.split()[0]
        past = [visit[0] for visit in history[:-1] if visit[0].split()[0] == organ]
        assert past[-1] == disease
        assert len({*past}) == len(past) >= 2
        assert complaint == f"{organ} pain"
    truth = task.collate(patients, torch.device("cpu")).truth
    assert truth.sum(1).eq(1).all()
