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
@pytest.mark.parametrize("score", ["concat", "cosine"])
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


@pytest.mark.parametrize("score", ["concat", "cosine"])
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
@pytest.mark.parametrize("score", ["concat", "cosine"])
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
        ({"score": "dot"}, {}, ValueError, "score: expected one of concat, cosine; got 'dot'"),
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
def few_documents(monkeypatch):
    """Documents of a few modules: reading all of the library takes seconds."""
    numbers = torch.randint(30, (24, 10, 8), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [tuple(tuple(f"w{word}" for word in sentence) for sentence in text) for text in numbers]
    made = [task.Document(f"m{i // 2}", f"m{i // 2}.py", x, task.centrality(x, {"w0"})) for i, x in enumerate(texts)]
    monkeypatch.setattr(task, "documents", lambda: tuple(made))


@pytest.mark.usefixtures("few_documents")
def test_task():
    data = task.split(0)
    assert {split: len(some) for split, some in data.items()} == {"train": 14, "validation": 4, "test": 6}
    assert sum(len({x.top for x in some}) for some in data.values()) == len({x.top for x in task.documents()})
    check_task(task.make(0, torch.device("cpu")), low=-1.0)


def test_centrality():
    sentences = [("a", "b", "the"), ("a", "c"), ("the",), ("a", "a")]
    assert task.centrality(sentences, {"the"}) == pytest.approx(((2 / 3 + 0) / 2, (2 / 3 + 0) / 2, 0, 2 / 3))


def test_rank_correlation():
    a, b = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([0.0, 5.0, 5.0, 7.0])
    assert task.rank_correlation(a, b) == pytest.approx(4.5 / (5 * 4.5) ** 0.5)
    assert task.rank_correlation(a, -a) == pytest.approx(-1)
    assert task.rank_correlation(a, torch.ones(4)) == 0


def test_sentences():
    assert task.sentences_of("It is a thing. Too short. And so\n  is this_one, too!") == [
        ("it", "is", "a", "thing"),
        ("and", "so", "is", "this_one", "too"),
    ]
    assert not task.is_prose(">>> f(1) + 2 == 3.")
    assert task.is_prose("Some words, and a stop.")


def test_docstrings():
    code = b'"""One."""\nclass A:\n    """Two."""\n    def f(self):\n        """Three."""\n        return None\n'
    assert [x.text for x in _stdlib.docstrings_in("m", "m.py", code)] == ["One.", "Two.", "Three."]
