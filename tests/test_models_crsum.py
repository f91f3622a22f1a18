import random

import pytest
import torch
from _models import assert_formula, assert_only_scores_differ, check_kernel, check_task

from fused_attn.models import CRSum
from fused_attn.models.tasks import _stdlib
from fused_attn.models.tasks import crsum as task

LENGTHS = torch.tensor([5, 1, 0])
WORD_LENGTHS = torch.tensor([[3, 1, 4, 0, 2], [4, 1, 1, 1, 1], [2, 0, 0, 0, 0]])
WORDS = torch.randint(9, (3, 5, 4), generator=torch.Generator().manual_seed(1))
VALID = torch.arange(5) < LENGTHS[:, None]


def build(dtype=torch.float64, **options) -> CRSum:
    torch.manual_seed(0)
    sizes = {"embed_dim": 4, "hidden_dim": 3, "attn_dim": 5, "window": 2, "mlp_dim": 6}
    return CRSum(9, **(sizes | options)).to(dtype)


def formula(model, features, sides, score, width):
    p = dict(model.named_parameters())
    scores, word_weights = torch.zeros(3, 5).double(), torch.zeros(3, 5, 4).double()
    weights = torch.zeros(3, len(sides), 5, 5).double()
    for b, sentences in enumerate(LENGTHS.tolist()):
        s = []
        for t in range(sentences):
            n = int(WORD_LENGTHS[b, t])
            x = torch.cat([p["embed.weight"][WORDS[b, t, :n]], torch.zeros(width - 1, 4).double()])
            f = []
            for j in range(n):
                near = sum(p["conv.weight"][:, :, k] @ x[j + k] for k in range(width))
                f.append(torch.tanh(near + p["conv.bias"]))
            vector = torch.zeros(3).double()
            if n:
                e = [torch.tanh(p["words.proj.weight"] @ row + p["words.proj.bias"]) for row in f]
                a = torch.stack([p["words.score.weight"][0] @ row for row in e]).exp()
                word_weights[b, t, :n] = a / a.sum()
                vector = (a / a.sum()) @ torch.stack(f)
            s.append(vector)
        if not s:
            continue
        h = model.encoder(torch.stack(s)[None])[0][0]
        for t in range(sentences):
            parts = [s[t]]
            for i, side in enumerate(sides):
                seen = [t + d for d in side if 0 <= t + d < sentences]
                c = torch.zeros(3).double()
                if seen:
                    if score == "concat":
                        q, k = p[f"attend.{i}.query_proj.weight"] @ h[t], p[f"attend.{i}.key_proj.weight"]
                        e = [p[f"attend.{i}.score.weight"][0] @ torch.tanh(q + k @ h[j]) for j in seen]
                    elif score == "general":
                        e = [h[t] @ p[f"attend.{i}.weight"] @ h[j] for j in seen]
                    else:
                        e = [h[t] @ h[j] / (h[t].norm() * h[j].norm()) for j in seen]
                    a = torch.stack(e).exp()
                    weights[b, i, t, seen] = a / a.sum()
                    c = (a / a.sum()) @ h[seen]
                norms = c.norm() * s[t].norm()
                parts.append((c @ s[t] / norms if norms > 0 else torch.zeros(()).double())[None])
            if features is not None:
                parts.append(features[b, t])
            hidden = torch.relu(p["regression.0.weight"] @ torch.cat(parts) + p["regression.0.bias"])
            scores[b, t] = (p["regression.2.weight"] @ hidden + p["regression.2.bias"])[0]
    return scores, word_weights, weights


@pytest.mark.parametrize("sides", ["apart", "together"])
@pytest.mark.parametrize("score", ["concat", "general", "cosine"])
@pytest.mark.parametrize(("features", "width"), [(0, 2), (2, 3)])
def test_formula(sides, score, features, width):
    model = build(sides=sides, score=score, features=features, filter_width=width)
    given = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True) if features else None
    offsets = [(-2, -1), (1, 2)] if sides == "apart" else [(-2, -1, 1, 2)]
    got = model(WORDS, WORD_LENGTHS, LENGTHS, given, return_weights=True)
    expected = formula(model, given, offsets, score, width)
    assert_formula(model, got, expected, {} if given is None else {"features": given})
    torch.testing.assert_close(model(WORDS, WORD_LENGTHS, LENGTHS, given), got[0])


def test_padding_is_not_seen():
    model = build(features=2)
    words = WORDS.masked_fill(torch.arange(4) >= (WORD_LENGTHS * VALID)[..., None], 10**6)
    features = torch.zeros(3, 5, 2, dtype=torch.float64)
    dirty = features.masked_fill(~VALID[..., None], torch.nan).requires_grad_()
    out = model(words, WORD_LENGTHS, LENGTHS, dirty)
    torch.testing.assert_close(out, model(WORDS, WORD_LENGTHS, LENGTHS, features), rtol=0, atol=0)
    assert torch.autograd.grad(out.sum(), dirty)[0].isfinite().all()
    assert (out[~VALID] == 0).all()


@pytest.mark.parametrize("score", ["concat", "general", "cosine"])
def test_an_empty_side_is_zero(score):
    _, word_weights, weights = build(score=score)(WORDS, WORD_LENGTHS, LENGTHS, return_weights=True)
    assert (weights[0, 0, 0] == 0).all()  # nothing before the first
    assert (weights[0, 1, 4] == 0).all()  # nor after the last
    assert (weights[1] == 0).all()  # the only one
    assert (word_weights[0, 3] == 0).all()  # no words


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0)])
def test_empty_axes(shape):
    b, s, w = shape
    lengths = torch.full((b,), s)
    words = torch.zeros(shape, dtype=torch.int64)
    scores, word_weights, weights = build()(words, words.sum(-1), lengths, return_weights=True)
    assert (scores.shape, word_weights.shape, weights.shape) == ((b, s), (b, s, w), (b, 2, s, s))
    assert scores.isfinite().all()


@pytest.mark.parametrize("sides", ["apart", "together"])
@pytest.mark.parametrize("score", ["concat", "general", "cosine"])
def test_without_attention_is_the_mean(sides, score):
    model = build(sides=sides, score=score, attention=False)
    _, word_weights, weights = model(WORDS, WORD_LENGTHS, LENGTHS, return_weights=True)
    words = (torch.arange(4) < (WORD_LENGTHS * VALID)[..., None]).double()
    torch.testing.assert_close(word_weights, words / words.sum(-1, keepdim=True).clamp(min=1))
    t, i = torch.arange(5)[:, None], torch.arange(5)
    seen = [(i < t) & (i >= t - 2), (i > t) & (i <= t + 2)]
    seen = torch.stack(seen if sides == "apart" else [seen[0] | seen[1]]).double()
    torch.testing.assert_close(weights[0], seen / seen.sum(-1, keepdim=True).clamp(min=1))
    assert_only_scores_differ(model, build(sides=sides, score=score))


@pytest.mark.parametrize(
    ("options", "changes", "error", "text"),
    [
        ({"window": 0}, {}, ValueError, "window: expected at least 1; got 0"),
        ({"features": -1}, {}, ValueError, "features: expected at least 1; got -1"),
        ({"sides": "both"}, {}, ValueError, "sides: expected one of apart, together; got 'both'"),
        ({"score": "dot"}, {}, ValueError, "score: expected one of concat, general, cosine; got 'dot'"),
        ({}, {"words": WORDS.float()}, TypeError, "words: expected dtype int32, int64"),
        ({}, {"words": WORDS[0]}, ValueError, r"words: expected shape \(B, S, W\)"),
        ({}, {"word_lengths": WORD_LENGTHS[:2]}, ValueError, "word_lengths: expected shape"),
        ({}, {"word_lengths": WORD_LENGTHS + 1}, ValueError, "word_lengths: expected numbers from 0 to 4"),
        ({}, {"lengths": LENGTHS - 1}, ValueError, "lengths: expected numbers from 0 to 5"),
        ({}, {"features": torch.zeros(3, 5, 2)}, ValueError, "features: expected None with features=0"),
        ({"features": 2}, {}, ValueError, "features: expected a tensor with features=2"),
        ({"features": 2}, {"features": torch.zeros(3, 5, 1)}, ValueError, "features: expected shape"),
    ],
)
def test_bad_arguments(options, changes, error, text):
    def run():
        model = build(torch.float32, **options)
        model(**({"words": WORDS, "word_lengths": WORD_LENGTHS, "lengths": LENGTHS} | changes))

    with pytest.raises(error, match=text):
        run()


@pytest.mark.kernel
def test_kernel(device):
    arguments = [x.to(device) for x in (WORDS[:1, :3], WORD_LENGTHS[:1, :3], LENGTHS[:1] - 2)]
    check_kernel(build, lambda model: model(*arguments), device)


@pytest.fixture
def few_sentences(monkeypatch):
    """Reading all of the library takes seconds."""
    numbers = torch.randint(200, (8, 20, 9), generator=torch.Generator().manual_seed(0)).tolist()
    texts = {f"m{i}": [tuple(f"w{word}" for word in words) for words in some] for i, some in enumerate(numbers)}
    monkeypatch.setattr(task, "sentences", lambda: texts)
    monkeypatch.setattr(task, "TEXTS", {"train": 40, "validation": 6, "test": 6})


@pytest.mark.usefixtures("few_sentences")
def test_task():
    pytest.importorskip("rouge_score")
    parts = task.split(0)
    assert {split: len(some) for split, some in parts.items()} == {"train": 100, "validation": 20, "test": 40}
    assert len({words for some in parts.values() for words in some}) == 160
    check_task(task.make(0, torch.device("cpu")))


@pytest.mark.usefixtures("few_sentences")
def test_sentences_are_taken_up_alike_but_count_by_their_speaker_alone():
    pool, common, rng = task.split(0)["train"], {"w0", "w1"}, random.Random(0)
    texts = [task.draw_text(pool, common, rng) for _ in range(50)]
    more, counted = [], []
    for text in texts:
        assert len(text.sentences) == len(text.importance) == len(text.summaries) == 18
        for start in (0, 6, 12):
            body, ends = text.sentences[start : start + 4], text.sentences[start + 4 : start + 6]
            sums = {words[0]: ({*words[1:]}, start + 4 + i) for i, words in enumerate(ends)}
            assert {*sums} == {"anna", "ben"}
            assert not common & (sums["anna"][0] | sums["ben"][0])
            important = text.importance[start : start + 4]
            assert sorted((words[0], x > 0) for words, x in zip(body, important, strict=True)) == [
                *(("anna", False), ("anna", True), ("ben", False), ("ben", True))
            ]
            for i, (speaker, *words) in enumerate(body):
                own, place = sums[speaker]
                other, _ = sums[{"anna": "ben", "ben": "anna"}[speaker]]
                assert text.summaries[start + i] == place
                parts = {*words} - common
                assert len(parts & (own if important[i] else other)) >= round((important[i] or 0.45) * len(parts))
                more.append(len(parts & own) - len(parts & other))
                counted.append(important[i])
            assert text.summaries[start + 4 : start + 6] == [start + 4, start + 5]
            assert text.importance[start + 4 : start + 6] == [0, 0]
    assert abs(sum(more) / len(more)) < 0.3  # both take up as much
    assert sum(counted) / len(counted) == pytest.approx(0.35, abs=0.03)
    at_first = [x for text in texts[:9] for x in task.draw_text(pool, common, rng, 0.0).sentences]
    assert sum(map(len, at_first)) < 0.9 * sum(len(x) for text in texts[:9] for x in text.sentences)


def test_rank_correlation():
    a, text = [1.0, 2.0, 3.0, 10.0], task.Document([], [0.0, 5.0, 5.0, 7.0], [])
    assert task.rank_correlation([a], [text]) == pytest.approx(4.5 / (5 * 4.5) ** 0.5)
    assert task.rank_correlation([a, [-x for x in a]], [text, text]) == pytest.approx(0)
    assert task.rank_correlation([[1.0] * 4], [text]) == 0


def test_rouge_is_of_the_best_sentences():
    pytest.importorskip("rouge_score")
    sentences = [(f"a{i}", f"b{i}", f"c{i}") for i in range(8)]
    text = task.Document(sentences, [0.9, 0.0, 0.8, 0.7, 0.1, 0.0, 0.2, 0.3], [])
    best = [0, 2, 3, 4, 6, 7]
    assert task.best(text.importance) == best
    assert task.rouge([best], [text]) == 1
    assert task.rouge([best, [1, 5]], [text, text]) == pytest.approx(0.5)


def test_sentences():
    assert task.sentences_of("It is a thing that goes on and on. Too short. So\n  is this_one, a b c d e!") == [
        ("it", "is", "a", "thing", "that", "goes", "on", "and", "on"),
        ("so", "is", "this_one", "a", "b", "c", "d", "e"),
    ]
    assert not task.is_prose(">>> f(1) + 2 == 3.")
    assert task.is_prose("Some words, and a stop.")


def test_docstrings():
    code = b'"""One."""\nclass A:\n    """Two."""\n    def f(self):\n        """Three."""\n        return None\n'
    assert [x.text for x in _stdlib.docstrings_in("m", "m.py", code)] == ["One.", "Two.", "Three."]
