"""DADM against its formulas in float64; what a missing model may not do; the task."""

import pytest
import torch
from _models import assert_formula, check_kernel, check_task

from fused_attn.models import DADM
from fused_attn.models.tasks.dadm import MODELS, TEST_DAYS, TRAIN_DAYS, VALIDATION_DAYS, days, make

M, CONTENT, ATTN, STATE = 4, 3, 5, 2
OPTIONS = {
    "concat": {},
    "concat of states": {"state_dim": STATE},
    "location": {"score": "location", "state_dim": STATE},
    "product": {"combine": "product"},
    "product of states": {"combine": "product", "state_dim": STATE},
    "product, location": {"combine": "product", "score": "location", "state_dim": STATE},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
MASK = [[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]]  # the last article has no model


def model(dtype=torch.float64, device="cpu", **options):
    torch.manual_seed(1)
    dadm = DADM(M, CONTENT, ATTN, num_times=7, num_categories=2, **options)
    with torch.no_grad():
        dadm.times.weight.normal_()
        dadm.categories.weight.normal_()
        if dadm.mix is not None:
            dadm.mix.fill_(0.4)
    return dadm.to(device, dtype)


def inputs(options, classes=(), dtype=torch.float64, device="cpu"):
    rng = torch.Generator().manual_seed(0)
    shapes = {"content": (3, CONTENT), "predictions": (3, M, *classes), "states": (3, M, STATE)}
    tensors = {
        n: torch.randn(*s, dtype=dtype, generator=rng).to(device).requires_grad_()
        for n, s in shapes.items()
        if n != "states" or "state_dim" in options
    }
    others = {"times": torch.tensor([0, 6, 2]), "categories": torch.tensor([1, 0, 1]), "mask": torch.tensor(MASK) > 0}
    return tensors, {n: x.to(device) for n, x in others.items()}


def by_hand(p, tensors, others, combine="mixture", score="concat", state_dim=None, attention=True):
    """(ŷ, a), an article at a time."""
    outs, weights = [], []
    for b in range(3):
        seen = [m for m in range(M) if MASK[b][m]]
        one, two = {}, {}
        for m in seen:
            key = p["keys"][m] if state_dim is None else tensors["states"][b, m]
            if score == "concat":
                inner = p["attend.query_proj.weight"] @ tensors["content"][b] + p["attend.query_proj.bias"]
                inner = inner + p["attend.key_proj.weight"] @ key
            else:
                inner = p["attend.proj.weight"] @ key + p["attend.proj.bias"]
            one[m] = p["attend.score.weight"][0] @ torch.tanh(inner)
            two[m] = p["times.weight"][others["times"][b], m] + p["categories.weight"][others["categories"][b], m]

        def softmax(scores):
            e = {m: torch.exp(s if attention else 0 * s) for m, s in scores.items()}
            return {m: x / sum(e.values()) for m, x in e.items()}

        if combine == "product":
            a = softmax({m: one[m] + two[m] for m in seen})
        else:
            share, first, second = torch.sigmoid(p["mix"]), softmax(one), softmax(two)
            a = {m: share * first[m] + (1 - share) * second[m] for m in seen}
        zero = torch.zeros_like(tensors["predictions"][b, 0])
        outs.append(sum((a[m] * tensors["predictions"][b, m] for m in seen), zero))
        weights.append(torch.stack([a.get(m, zero.new_zeros(())) for m in range(M)]))
    return torch.stack(outs), torch.stack(weights)


@each_option
@pytest.mark.parametrize("attention", [True, False], ids=["attention", "uniform"])
@pytest.mark.parametrize("classes", [(), (2,)], ids=["one number", "classes"])
def test_matches_the_formulas(options, attention, classes):
    dadm = model(attention=attention, **options)
    tensors, others = inputs(options, classes)
    got = dadm(**tensors, **others, return_weights=True)
    wanted = by_hand(dict(dadm.named_parameters()), tensors, others, attention=attention, **options)
    assert_formula(dadm, got, wanted, tensors)
    assert not got[0][2].any()
    assert not got[1][2].any()


@each_option
def test_missing_models_do_not_leak(options):
    dadm = model(**options)
    tensors, others = inputs(options)

    def run(filling):
        given = {
            n: x.detach().masked_fill(~others["mask"].view(3, M, *[1] * (x.dim() - 2)), filling).requires_grad_()
            if n != "content"
            else x
            for n, x in tensors.items()
        }
        out, weights = dadm(**given, **others, return_weights=True)
        leaves = [x for n, x in given.items() if n != "content"]
        return out, weights, *torch.autograd.grad(out.square().sum(), [*leaves, *dadm.parameters()])

    for x, y in zip(run(0.0), run(torch.nan), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@each_option
def test_uniform_is_the_mean(options):
    dadm = model(attention=False, **options)
    tensors, others = inputs(options)
    others["mask"] = None
    torch.testing.assert_close(dadm(**tensors, **others), tensors["predictions"].mean(1))


@pytest.mark.parametrize(
    ("options", "change", "error", "text"),
    [
        ({}, {"content": torch.zeros(3, 2)}, ValueError, r"content: expected shape \(B, content_dim\)"),
        ({}, {"predictions": torch.zeros(3, M + 1)}, ValueError, r"predictions: expected shape \(B, M\)"),
        ({}, {"times": torch.zeros(2, dtype=torch.int64)}, ValueError, "times: expected shape"),
        ({}, {"categories": torch.zeros(3)}, TypeError, "categories: expected dtype"),
        ({}, {"mask": torch.ones(3, M)}, TypeError, "mask: expected dtype"),
        ({}, {"states": torch.zeros(3, M, STATE)}, ValueError, "states: expected None"),
        ({"state_dim": STATE}, {"states": None}, ValueError, "states: expected a tensor"),
        ({"state_dim": STATE}, {"states": torch.zeros(3, M, 3)}, ValueError, r"states: expected shape"),
    ],
)
def test_bad_input(options, change, error, text):
    tensors, others = inputs(options, dtype=torch.float32)
    with pytest.raises(error, match=text):
        model(torch.float32, **options)(**(tensors | others | change))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_models": 0}, "num_models: expected at least 1; got 0"),
        ({"score": "dot"}, "score: expected one of concat, location; got 'dot'"),
        ({"combine": "sum"}, "combine: expected one of mixture, product; got 'sum'"),
        ({"score": "location"}, "state_dim: expected a width"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        DADM(**({"num_models": M, "content_dim": CONTENT, "attn_dim": ATTN} | options))


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["concat", "product, location"])
def test_kernel_matches_the_reference(name, device):
    tensors, others = inputs(OPTIONS[name], dtype=torch.float32, device=device)
    leaves = [x for n, x in tensors.items() if n != "content" or name == "concat"]
    check_kernel(model, lambda dadm: dadm(**tensors, **others), device, leaves, **OPTIONS[name])


def test_task_holds_out_later_days():
    pools = days(0)
    assert len(pools) == MODELS + TRAIN_DAYS + VALIDATION_DAYS + TEST_DAYS
    assert [int(pool.day[0]) for pool in pools] == list(range(len(pools)))
    rows = torch.cat([pool.content for pool in pools])
    assert len(rows.unique(dim=0)) == len(rows)


def test_task_learns():
    task = make(0, torch.device("cpu"))
    batch = next(iter(task.batches(torch.Generator().manual_seed(0), 0)))
    assert batch[0].day.min() >= MODELS
    assert batch[0].day.max() < MODELS + TRAIN_DAYS
    check_task(task)
