"""ACF, both forms, against the formulas in float64; what padding may not do; BPR; the task."""

import pytest
import torch
from _models import assert_formula, check_kernel, check_task

pytest.importorskip("sklearn", reason="the task's score and baselines are scikit-learn's")

from fused_attn.models import ACF, bpr_loss
from fused_attn.models.tasks.acf import CHANCE, SUBJECTS, make, world
from fused_attn.models.tasks.acf import USERS as SPLIT

USERS, ITEMS, FEATURES, DIM = 4, 6, 3, 5
LENGTHS = [3, 1, 0]  # of the histories
COMPONENTS = [[2, 4, 0], [3, 9, 9], [9, 9, 9]]  # of their items: one has none; 9 is padding
each_form = pytest.mark.parametrize("form", ["paper", "code"])
each_attention = pytest.mark.parametrize("attention", [True, False], ids=["attention", "uniform"])


def model(dtype=torch.float64, device="cpu", **options):
    torch.manual_seed(1)
    acf = ACF(USERS, ITEMS, FEATURES, DIM, **options)
    with torch.no_grad():
        for name, x in acf.named_parameters():
            if name.startswith(("users", "items", "auxiliary")):
                x.normal_()  # as wide as the rest, so that every term of the scores is seen
    return acf.to(device, dtype)


def inputs(dtype=torch.float64, device="cpu"):
    rng = torch.Generator().manual_seed(0)
    history = torch.tensor([[0, 4, 2], [5, 1, 1], [3, 3, 3]])
    mask = torch.arange(3) < torch.tensor(LENGTHS)[:, None]
    inner = torch.arange(4) < torch.tensor(COMPONENTS)[..., None]
    x = torch.randn(3, 3, 4, FEATURES, dtype=dtype, generator=rng).to(device).requires_grad_()
    arguments = {
        "users": torch.tensor([3, 0, 1]),
        "items": torch.tensor([[1, 5], [2, 0], [4, 4]]),
        "history": history,
        "history_mask": mask,
        "component_mask": inner,
    }
    return x, {n: y.to(device) for n, y in arguments.items()}


def by_hand(p, x, arguments, form, attention):
    """Scores (3, 2), α and β: an item and a component at a time."""

    def attend(part, u, keys):
        own, context = p[f"attend_{part}.proj.weight"], p[f"attend_{part}.context.weight"]
        bias, w = p[f"attend_{part}.proj.bias"], p[f"attend_{part}.score.weight"][0]
        e = [w @ torch.relu(context @ u + own @ key + bias) for key in keys]
        e = [torch.exp(s if attention else 0 * s) for s in e]
        return [s / sum(e) for s in e]

    scores, alphas, betas = [], torch.zeros(3, 3, dtype=x.dtype), torch.zeros(3, 3, 4, dtype=x.dtype)
    for b in range(3):
        u = p["users.weight"][arguments["users"][b]]
        keys, values = [], []
        for l in range(LENGTHS[b]):
            rows = [x[b, l, m] for m in range(COMPONENTS[b][l])]
            beta = attend("components", u, rows)
            betas[b, l, : len(rows)] = torch.stack(beta).detach() if rows else 0
            if form == "code":
                rows = [p["attend_components.proj.weight"] @ row for row in rows]
            width = DIM if form == "code" else FEATURES
            content = sum((c * row for c, row in zip(beta, rows, strict=True)), x.new_zeros(width))
            item = arguments["history"][b, l]
            if form == "paper":
                v, own = p["items.weight"][item], p["auxiliary.weight"][item]
                keys.append(torch.cat([v, own, content]))
                values.append(own)
            else:
                keys.append(content)
                values.append(content)
        alpha = attend("items", u, keys)
        alphas[b, : len(keys)] = torch.stack(alpha).detach() if keys else 0
        taste = u + sum((c * value for c, value in zip(alpha, values, strict=True)), torch.zeros_like(u))
        scores.append(torch.stack([taste @ p["items.weight"][j] for j in arguments["items"][b]]))
    return torch.stack(scores), alphas, betas


@each_form
@each_attention
def test_matches_the_formulas(form, attention):
    acf = model(form=form, attention=attention)
    x, arguments = inputs()
    got, weights = acf(components=x, **arguments, return_weights=True)
    wanted, alpha, beta = by_hand(dict(acf.named_parameters()), x, arguments, form, attention)
    assert_formula(acf, [got], [wanted], {"components": x})
    torch.testing.assert_close(weights.items, alpha)
    torch.testing.assert_close(weights.components, beta)


@each_form
def test_one_item_a_user(form):
    acf = model(form=form)
    x, arguments = inputs()
    several = acf(components=x, **arguments)
    one = acf(components=x, **(arguments | {"items": arguments["items"][:, 1]}))
    torch.testing.assert_close(one, several[:, 1])


@each_form
def test_padding_does_not_leak(form):
    acf = model(form=form)
    x, arguments = inputs()
    shown = arguments["component_mask"] & arguments["history_mask"][..., None]

    def run(filling, index):
        given = x.detach().masked_fill(~shown[..., None], filling).requires_grad_()
        history = arguments["history"].masked_fill(~arguments["history_mask"], index)
        out, weights = acf(components=given, **(arguments | {"history": history}), return_weights=True)
        return out, *weights, *torch.autograd.grad(out.square().sum(), [given, *acf.parameters()])

    for y, z in zip(run(0.0, 0), run(torch.nan, -1), strict=True):
        torch.testing.assert_close(y, z, rtol=0, atol=0)


@each_form
def test_an_empty_history_adds_nothing(form):
    acf = model(form=form)
    x, arguments = inputs()
    out, weights = acf(components=x, **arguments, return_weights=True)
    u, v = acf.users(arguments["users"][2]), acf.items(arguments["items"][2])
    torch.testing.assert_close(out[2], v @ u)
    assert not weights.items[2].any()
    assert not weights.components[2].any()


@each_form
def test_without_masks_everything_counts(form):
    acf = model(form=form)
    x, arguments = inputs()
    everything = {n: torch.ones_like(arguments[n]) for n in ("history_mask", "component_mask")}
    bare = {n: y for n, y in arguments.items() if n not in everything}
    torch.testing.assert_close(acf(components=x, **bare), acf(components=x, **(arguments | everything)))


def test_uniform_is_the_mean():
    acf = model(attention=False)
    x, arguments = inputs()
    bare = {n: arguments[n] for n in ("users", "items", "history")}
    taste = acf.users(arguments["users"]) + acf.auxiliary(arguments["history"]).mean(1)
    expected = (acf.items(arguments["items"]) @ taste[..., None])[..., 0]
    torch.testing.assert_close(acf(components=x, **bare), expected)


def test_bpr():
    a, b = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.5, 3.0], dtype=torch.float64)
    p = [torch.tensor([2.0, 1.0], dtype=torch.float64), torch.tensor([[3.0]], dtype=torch.float64)]
    plain = sum(torch.log(1 + torch.exp(y - x)) for x, y in zip(a, b, strict=True)) / 2
    torch.testing.assert_close(bpr_loss(a, b), plain)
    torch.testing.assert_close(bpr_loss(a, b, p, 0.1), plain + 1.4)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"users": torch.zeros(3)}, TypeError, "users: expected dtype"),
        ({"items": torch.zeros(2, dtype=torch.int64)}, ValueError, r"items: expected shape \(B,\) or \(B, J\)"),
        ({"history": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"history: expected shape \(B, L\)"),
        (
            {"components": torch.zeros(3, 3, 4, 2)},
            ValueError,
            "components: expected shape",
        ),
        ({"history_mask": torch.ones(3, 3)}, TypeError, "history_mask: expected dtype"),
        ({"component_mask": torch.ones(3, 3, 5, dtype=torch.bool)}, ValueError, "component_mask: expected shape"),
    ],
)
def test_bad_input(change, error, text):
    x, arguments = inputs(torch.float32)
    with pytest.raises(error, match=text):
        model(torch.float32)(**({"components": x} | arguments | change))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_users": 0}, "num_users: expected at least 1; got 0"),
        ({"form": "book"}, "form: expected one of paper, code; got 'book'"),
        ({"form": "code", "attn_dim": 2}, "attn_dim: expected dim = 5 with form='code'; got 2"),
    ],
)
def test_bad_options(options, text):
    sizes = {"num_users": USERS, "num_items": ITEMS, "component_dim": FEATURES, "dim": DIM}
    with pytest.raises(ValueError, match=text):
        ACF(**(sizes | options))


@pytest.mark.kernel
@each_form
def test_kernel_matches_the_reference(form, device):
    x, arguments = inputs(torch.float32, device)
    check_kernel(model, lambda acf: acf(components=x, **arguments), device, [x], form=form)


def test_world():
    data = world(0)
    subject = data.subjects.gather(1, data.sharp.int().argmax(1, keepdim=True))[:, 0]
    scene = data.subjects.masked_fill(data.sharp, -1).amax(1)
    assert data.sharp.sum(1).eq(1).all()
    assert data.subjects.masked_fill(data.sharp, 0).eq(scene[:, None] * ~data.sharp).all()  # one scene an item
    assert scene.lt(SUBJECTS).all()
    assert scene.ne(subject).all()
    own = data.likes.gather(1, data.chosen)
    assert (own | (subject[data.chosen] >= SUBJECTS)).all()  # what is not liked is a staple
    assert own.float().mean().item() == pytest.approx(1 - CHANCE, abs=0.02)
    both = data.chosen.sort(1).values
    assert (both[:, 1:] > both[:, :-1]).all()  # no item twice


def test_users_for_validation_and_test_are_strangers():
    task = make(0, torch.device("cpu"))
    known, users = (
        torch.cat([getattr(batch, name) for batch in task.batches(torch.Generator().manual_seed(0), 0)])
        for name in ("known", "users")
    )
    assert users.max() < SPLIT["train"]
    assert known[known > 0].equal(1 + users[known > 0])
    assert (known == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)


@each_form
def test_task_learns(form):
    task = make(0, torch.device("cpu"), form)
    batch = next(iter(task.batches(torch.Generator().manual_seed(0), 0)))
    assert not (batch.history[batch.mask] == batch.items.repeat_interleave(batch.mask.sum(1))).any()
    assert (batch.history == batch.items[:, None]).sum(1).eq(1).all()
    assert not (batch.history == batch.others[:, None]).any()
    check_task(task)
