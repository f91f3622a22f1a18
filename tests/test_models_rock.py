import pytest
import torch
from _models import assert_formula, assert_only_scores_differ, check_kernel, check_task

from fused_attn.models import Rock
from fused_attn.models.tasks import rock as task

LENGTHS = torch.tensor([[4, 2, 0], [1, 5, 3], [0, 0, 0]])


def build(dtype=torch.float64, **options) -> Rock:
    torch.manual_seed(0)
    return Rock(3, 4, hidden_dim=2, attn_dim=5, **options).to(dtype)


def inputs(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 3, 5, dtype=dtype), torch.randn(3, 6, dtype=dtype)


def formula(model, logs, z):
    p = dict(model.named_parameters())

    def score(level, x, context):
        projected = p[f"attend.{level}.proj.weight"] @ x + p[f"attend.{level}.proj.bias"]
        if context is not None:
            projected = projected + p[f"attend.{level}.context.weight"] @ context
        return p[f"attend.{level}.score.weight"][0] @ torch.tanh(projected)

    logits, depths, variables = [], torch.zeros(3, 3, 5).double(), torch.zeros(3, 3).double()
    for b in range(3):
        query, vectors, logged = None if z is None else z[b], [], []
        for k in range(3):
            if n := int(LENGTHS[b, k]):
                h = model.encoders[k % len(model.encoders)](logs[b, k, :n, None][None])[0][0]
                a = torch.stack([score("inner", h[i], query) for i in range(n)]).exp()
                depths[b, k, :n] = a / a.sum()
                vectors.append((a / a.sum()) @ h)
                logged.append(k)
        c = torch.zeros(4).double()
        if vectors:
            a = torch.stack([score("outer", x, query) for x in vectors]).exp()
            variables[b, logged] = a / a.sum()
            c = (a / a.sum()) @ torch.stack(vectors)
        features = c if z is None else torch.cat([c, query])
        logits.append(p["output.weight"] @ features + p["output.bias"])
    return torch.stack(logits), depths, variables


@pytest.mark.parametrize(("query", "shared"), [(False, False), (True, False), (False, True), (True, True)])
def test_formula(query, shared):
    model = build(query_dim=6 if query else None, shared=shared)
    logs, z = (x.requires_grad_() for x in inputs())
    arguments = (logs, z) if query else (logs, None)
    got = model(logs, LENGTHS, arguments[1], return_weights=True)
    leaves = {"logs": logs} | ({"query": z} if query else {})
    assert_formula(model, got, formula(model, *arguments), leaves)
    torch.testing.assert_close(model(logs, LENGTHS, arguments[1]), got[0])


def test_what_is_past_the_end_is_not_seen():
    model, (logs, _) = build(), inputs()
    past = torch.arange(5) >= LENGTHS[..., None]
    dirty = logs.masked_fill(past, torch.nan).requires_grad_()
    out = model(dirty, LENGTHS)
    torch.testing.assert_close(out, model(logs, LENGTHS), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(out.sum(), dirty)
    assert grad.isfinite().all()
    assert (grad[past] == 0).all()


def test_weights_come_under_autocast():
    model, (logs, _) = build().float(), inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits, depths, variables = model(logs, LENGTHS, return_weights=True)
    torch.testing.assert_close(depths.float(), model(logs, LENGTHS, return_weights=True)[1], rtol=0, atol=0.05)
    assert (logits.isfinite() & variables.isfinite().all()).all()


def test_empty_wells_and_curves():
    logits, depths, variables = build()(inputs()[0], LENGTHS, return_weights=True)
    torch.testing.assert_close(logits[2], build().output.bias)  # c = 0
    assert (depths[2] == 0).all()
    assert (variables[2] == 0).all()
    assert variables[0, 2] == 0
    torch.testing.assert_close(variables[:2].sum(1), torch.ones(2).double())


def test_without_attention_is_the_mean():
    model = build(query_dim=6, attention=False)
    _, depths, variables = model(inputs()[0], LENGTHS, inputs()[1], return_weights=True)
    inside = (torch.arange(5) < LENGTHS[..., None]).double()
    torch.testing.assert_close(depths, inside / inside.sum(-1, keepdim=True).clamp(min=1))
    logged = (LENGTHS > 0).double()
    torch.testing.assert_close(variables, logged / logged.sum(-1, keepdim=True).clamp(min=1))
    assert_only_scores_differ(model, build(query_dim=6))


@pytest.mark.parametrize(
    ("options", "changes", "error", "text"),
    [
        ({"hidden_dim": 0}, {}, ValueError, "hidden_dim: expected at least 1; got 0"),
        ({"query_dim": 0}, {}, ValueError, "query_dim: expected at least 1; got 0"),
        ({}, {"logs": torch.zeros(3, 2, 5)}, ValueError, r"logs: expected shape \(B, n, T\)"),
        ({}, {"lengths": LENGTHS[:2]}, ValueError, "lengths: expected shape"),
        ({}, {"lengths": LENGTHS + 1}, ValueError, "lengths: expected numbers from 0 to 5"),
        ({}, {"query": torch.zeros(3, 6)}, ValueError, "query: expected None with query_dim=None; got a tensor"),
        ({"query_dim": 6}, {}, ValueError, "query: expected a tensor with query_dim=6; got None"),
        ({"query_dim": 6}, {"query": torch.zeros(2, 6)}, ValueError, r"query: expected shape \(B, query_dim\)"),
    ],
)
def test_bad_arguments(options, changes, error, text):
    def run():
        model = Rock(**({"variables": 3, "classes": 4, "hidden_dim": 2} | options))
        model(**({"logs": torch.zeros(3, 3, 5), "lengths": LENGTHS} | changes))

    with pytest.raises(error, match=text):
        run()


@pytest.mark.kernel
def test_kernel(device):
    logs, z = (x.to(device).requires_grad_() for x in inputs(torch.float32))
    check_kernel(build, lambda model: model(logs, LENGTHS.to(device), z), device, [logs, z], query_dim=6)


def test_task(monkeypatch):
    monkeypatch.setattr(task, "WELLS", {"train": 64, "validation": 20, "test": 20})
    check_task(task.make(0, torch.device("cpu")))


def test_held_out_wells_are_new_and_hold_what_they_say():
    batch = task.wells(200, torch.Generator().manual_seed(0))
    assert len({tuple(x.flatten().tolist()) for x in batch.logs}) == 200
    bell = [i for i in range(200) if batch.facies[i] == 0]
    shown = torch.stack([batch.logs[i, batch.curve[i]][batch.top[i] :][: task.THICKNESS] for i in bell])
    torch.testing.assert_close(shown.mean(0), torch.linspace(1.46, -1.46, task.THICKNESS), rtol=0, atol=0.35)
