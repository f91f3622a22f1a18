import pytest
import torch
from _models import assert_formula, check_kernel, check_task

from fused_attn.models import PositionalAttention
from fused_attn.models.tasks import _stdlib
from fused_attn.models.tasks import positional as task

QUESTION = torch.tensor([[4, 5, 6, 0, 5], [3, 1, 7, 9, 9], [2, 8, 8, 8, 8]])
QUESTION_LENGTHS = torch.tensor([5, 3, 0])
ANSWERS = torch.tensor([[5, 3, 4, 0, 8, 5, 7], [3, 7, 5, 6, 9, 9, 9], [1, 1, 1, 1, 1, 1, 1], [6, 9, 9, 9, 9, 9, 9]])
ANSWER_LENGTHS = torch.tensor([7, 4, 0, 1])
CANDIDATES = torch.tensor([[0, 1, 2], [3, 1, 0], [2, 2, 3]])
ARGUMENTS = (QUESTION, QUESTION_LENGTHS, ANSWERS, ANSWER_LENGTHS, CANDIDATES)


def build(dtype=torch.float64, **options) -> PositionalAttention:
    torch.manual_seed(0)
    sizes = {"embed_dim": 4, "hidden_dim": 3, "attn_dim": 5, "position_dim": 6, "positions": 4, "sigma": 2.0}
    return PositionalAttention(10, **(sizes | options)).to(dtype)


def formula(model, question_pool, common):
    p = dict(model.named_parameters()) | dict(model.named_buffers())
    near, weights = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 3, 7, dtype=torch.float64)

    def states(row, length):
        return model.encoder(p["embed.weight"][row[:length]][None])[0][0]

    for b, (question, n) in enumerate(zip(QUESTION, QUESTION_LENGTHS.tolist(), strict=True)):
        r_q = torch.zeros(6, dtype=torch.float64)
        if n:
            h = states(question, n)
            last = torch.cat([h[-1, :3], h[0, 3:]])
            r_q = {"mean": h.mean(0), "max": h.max(0).values, "last": last}[question_pool]
        for c, row in enumerate(CANDIDATES[b].tolist()):
            m = int(ANSWER_LENGTHS[row])
            r_a = torch.zeros(6, dtype=torch.float64)
            if m:
                h, e = states(ANSWERS[row], m), []
                for j in range(m):
                    influence = torch.zeros(6, dtype=torch.float64)
                    for i in range(m):
                        word = ANSWERS[row, i]
                        if word >= common and word in question[:n] and abs(i - j) < 4:
                            influence = influence + p["influence"][abs(i - j)]
                    projected = p["attend.proj.weight"] @ h[j] + p["attend.context.weight"] @ influence
                    e.append(p["attend.score.weight"][0] @ torch.tanh(projected + p["attend.proj.bias"]))
                a = torch.stack(e).exp()
                a = a / a.sum()
                weights[b, c, :m] = a
                r_a = a @ h
            near[b, c] = -(r_q - r_a).abs().sum()
    return near, weights


@pytest.mark.parametrize(("question_pool", "common"), [("mean", 1), ("max", 5), ("last", 0)])
def test_formula(question_pool, common):
    model = build(question_pool=question_pool, common=common)
    assert_formula(model, model(*ARGUMENTS, return_weights=True), formula(model, question_pool, common))
    torch.testing.assert_close(model(*ARGUMENTS), formula(model, question_pool, common)[0])


def test_influence_is_a_gaussian_kernel_with_noise():
    torch.manual_seed(0)
    model = PositionalAttention(3, position_dim=4000, positions=60, sigma=20.0, noise=0.1)
    distance = torch.arange(60)
    torch.testing.assert_close(model.influence.mean(1), torch.exp(-(distance**2) / 800.0), rtol=0, atol=0.01)
    torch.testing.assert_close(model.influence.std(1), torch.full((60,), 0.1), rtol=0.06, atol=0)
    assert "influence" in model.state_dict()
    assert "influence" not in dict(model.named_parameters())


def test_one_answer_a_question():
    model = build()
    pairs = model(QUESTION, QUESTION_LENGTHS, ANSWERS[:3], ANSWER_LENGTHS[:3])
    torch.testing.assert_close(pairs, model(*ARGUMENTS[:4], torch.arange(3)[:, None]))


def test_padding_is_not_seen():
    model = build(common=0)
    question = QUESTION.masked_fill(torch.arange(5) >= QUESTION_LENGTHS[:, None], -(2**31))
    answers = ANSWERS.masked_fill(torch.arange(7) >= ANSWER_LENGTHS[:, None], 10**6)
    out = model(question, QUESTION_LENGTHS, answers, ANSWER_LENGTHS, CANDIDATES)
    torch.testing.assert_close(out, model(*ARGUMENTS), rtol=0, atol=0)


def test_empty_answers_and_questions_are_zero():
    near, weights = build()(*ARGUMENTS, return_weights=True)
    assert (weights[CANDIDATES == 2] == 0).all()
    assert (near[2, :2] == 0).all()  # r_q = r_a = 0


@pytest.mark.parametrize("question_pool", ["mean", "max", "last"])
def test_batches_without_any_word_are_zero(question_pool):
    none = torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    near, weights = build(question_pool=question_pool)(*none, *none, return_weights=True)
    assert (near == 0).all()
    assert weights.shape[-1] == 0


def test_without_attention_is_the_mean():
    model = build(attention=False)
    near, weights = model(*ARGUMENTS, return_weights=True)
    visible = (torch.arange(7) < ANSWER_LENGTHS[:, None]).double()
    torch.testing.assert_close(weights, (visible / visible.sum(1, keepdim=True).clamp(min=1))[CANDIDATES])
    h_q, h_a = (model.encoder(model.embed(words[:1]))[0][0] for words in (QUESTION, ANSWERS))
    torch.testing.assert_close(near[0, 0], -(h_q.mean(0) - h_a.mean(0)).abs().sum())
    torch.testing.assert_close(model.influence, build().influence, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "changes", "error", "text"),
    [
        ({"positions": 0}, {}, ValueError, "positions: expected at least 1; got 0"),
        ({"sigma": 0.0}, {}, ValueError, "sigma: expected a positive number; got 0.0"),
        ({"question_pool": "sum"}, {}, ValueError, "question_pool: expected one of mean, max, last; got 'sum'"),
        ({}, {0: QUESTION.float()}, TypeError, "question: expected dtype int32, int64"),
        ({}, {1: torch.tensor([5, 3, 6])}, ValueError, "question_lengths: expected numbers from 0 to 5"),
        ({}, {2: ANSWERS[0]}, ValueError, r"answers: expected shape \(N, Ta\)"),
        ({}, {3: torch.tensor([7])}, ValueError, "answer_lengths: expected shape"),
        ({}, {4: None}, ValueError, "answers: expected one a question, 3, without candidates; got 4"),
        ({}, {4: CANDIDATES[:2]}, ValueError, r"candidates: expected shape \(B, C\)"),
        ({}, {4: CANDIDATES + 2}, ValueError, "candidates: expected numbers from 0 to 3"),
    ],
)
def test_bad_arguments(options, changes, error, text):
    with pytest.raises(error, match=text):
        build(**options)(*(changes.get(i, x) for i, x in enumerate(ARGUMENTS)))


@pytest.mark.kernel
def test_kernel(device):
    arguments = [x.to(device) for x in ARGUMENTS]
    check_kernel(build, lambda model: model(*arguments), device)


@pytest.fixture
def few_docstrings(monkeypatch):
    """The docstrings of a few modules: reading all of the library takes seconds."""
    pairs = tuple(
        task.Pair(top, tuple(f"{top} does thing{i} for you".split()), (*f"it does thing{i}".split() * 4, f"x{i}"))
        for top in "abcdefghij"
        for i in range(12)
    )
    monkeypatch.setattr(task, "pairs", lambda: pairs)


@pytest.mark.usefixtures("few_docstrings")
def test_task():
    data = task.split(0)
    assert {split: len(some) for split, some in data.items()} == {"train": 72, "validation": 24, "test": 24}
    assert sum(len({x.top for x in some}) for some in data.values()) == 10
    check_task(task.make(0, torch.device("cpu")))


def test_pairs(monkeypatch):
    body = "It is_a thing. " * 4
    long, short = "Make a new thing.", "Too short."
    texts = [f"{long}\n\n{body}", f"{short}\n\n{body}", f"{long}\n\n{short}", long]
    monkeypatch.setattr(task, "docstrings", lambda: [_stdlib.Docstring("pkg", "pkg/m.py", x) for x in texts])
    task.pairs.cache_clear()
    assert task.pairs() == (task.Pair("pkg", ("make", "a", "new", "thing"), ("it", "is", "a", "thing") * 4),)
    task.pairs.cache_clear()
