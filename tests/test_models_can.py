"""CAN against its formulas, step by step in float64; what padding may not do; the task."""

import pytest
import torch
from _models import assert_formula, check_kernel, check_task

from fused_attn.models import CAN
from fused_attn.models.tasks.can import BATCH, PLACES, STORIES, draw_stories, make

WORD, HIDDEN, CONTEXT = 3, 4, 5
LENGTHS = [[2, 3, 1], [3, 0, 2], [0, 0, 0]]  # also an empty sentence between two, and an empty story
QUESTION_LENGTHS = [2, 4, 1]
FEEDBACK_LENGTHS = [0, 2, 3]


def inputs(dtype=torch.float64, device="cpu"):
    rng = torch.Generator().manual_seed(0)
    lengths = [torch.tensor(x, device=device) for x in (LENGTHS, QUESTION_LENGTHS, FEEDBACK_LENGTHS)]
    shapes = (3, 3, 3, WORD), (3, 4, WORD), (3, 3, WORD)
    vectors = [torch.randn(*s, dtype=dtype, generator=rng).to(device).requires_grad_() for s in shapes]
    return vectors, lengths


def model(dtype=torch.float64, device="cpu", **options):
    torch.manual_seed(1)
    return CAN(WORD, HIDDEN, CONTEXT, **options).to(device, dtype)


def call(can, vectors, lengths, feedback=True, **options):
    extra = {"feedback": vectors[2], "feedback_lengths": lengths[2]} if feedback else {}
    return can(vectors[0], lengths[0], vectors[1], lengths[1], **extra, **options)


def gru_step(x, h, w_ih, w_hh, b_ih, b_hh):
    xr, xz, xn = (w_ih @ x + b_ih).chunk(3)
    hr, hz, hn = (w_hh @ h + b_hh).chunk(3)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    return (1 - z) * torch.tanh(xn + r * hn) + z * h


def by_hand(p, vectors, lengths, activation="tanh", attention=True, feedback=True):
    """(m + u, γ, α, β), an example, a sentence and a word at a time."""
    words = [p[f"word_gru.{n}_l0"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    sentence = [p[f"sentence_gru.{n}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]

    def states(x, length):
        h, result = x.new_zeros(HIDDEN), []
        for i in range(length):
            h = gru_step(x[i], h, *words)
            result.append(h)
        return result

    def softmax(scores):
        e = [torch.exp(s if attention else 0 * s) for s in scores]
        return [x / sum(e) for x in e]

    results = []
    for b in range(len(lengths[0])):
        g = states(vectors[1][b], lengths[1][b])
        gamma = softmax([p["question_pool.proj.weight"][0] @ x for x in g])
        u = p["question_proj.weight"] @ sum(c * x for c, x in zip(gamma, g, strict=True)) + p["question_proj.bias"]
        u = torch.tanh(u) if activation == "tanh" else u
        s, seen, alphas = u.new_zeros(CONTEXT), [], []
        for t, length in enumerate(lengths[0][b]):
            h = states(vectors[0][b, t], length)
            alphas.append([])
            if not h:
                continue
            inner = [p["state_proj.weight"] @ s + p["word_proj.weight"] @ x + p["word_proj.bias"] for x in h]
            e = [torch.sigmoid(p["score_proj.weight"] @ torch.tanh(x) + p["score_proj.bias"]) for x in inner]
            alphas[-1] = softmax([u @ x for x in e])
            s = gru_step(sum(c * x for c, x in zip(alphas[-1], h, strict=True)), s, *sentence)
            seen.append((t, s))
        query = u
        if feedback and lengths[2][b] > 0:
            f = sum(states(vectors[2][b], lengths[2][b])) / lengths[2][b]
            query = u + torch.tanh(p["feedback_proj.weight"] @ f + p["feedback_proj.bias"])
        beta = softmax([query @ x for _, x in seen])
        m = sum((c * x for c, (_, x) in zip(beta, seen, strict=True)), u.new_zeros(CONTEXT))
        results.append((m + u, gamma, alphas, {t: c for c, (t, _) in zip(beta, seen, strict=True)}))
    return results


@pytest.mark.parametrize("feedback", [True, False], ids=["feedback", "no feedback"])
@pytest.mark.parametrize(
    "options", [{}, {"activation": "identity"}, {"attention": False}], ids=["tanh", "identity", "uniform"]
)
def test_matches_the_formulas(options, feedback):
    can = model(**options)
    vectors, lengths = inputs()
    out, weights = call(can, vectors, lengths, feedback, return_weights=True)
    results = by_hand(
        dict(can.named_parameters()),
        vectors,
        (LENGTHS, QUESTION_LENGTHS, FEEDBACK_LENGTHS),
        feedback=feedback,
        **options,
    )
    expected = torch.stack([r[0] for r in results])
    torch.testing.assert_close(out, expected)
    gamma, alpha, beta = (torch.zeros_like(x) for x in weights)
    for b, (_, of_question, of_words, of_sentences) in enumerate(results):
        for j, c in enumerate(of_question):
            gamma[b, j] = c
        for t, row in enumerate(of_words):
            for i, c in enumerate(row):
                alpha[b, t, i] = c
        for t, c in of_sentences.items():
            beta[b, t] = c
    for got, wanted in zip(weights, (gamma, alpha, beta), strict=True):
        torch.testing.assert_close(got, wanted)
    # With uniform weights the formula does not reach the scores' parameters; the model gives them zeros.
    assert_formula(can, [out], [expected], {f"input {i}": x for i, x in enumerate(vectors)})


@pytest.mark.parametrize("attention", [True, False])
def test_padding_does_not_leak(attention):
    can = model(attention=attention)
    vectors, lengths = inputs()

    def run(filling):
        padded = []
        for x, n in zip(vectors, lengths, strict=True):
            past = torch.arange(x.shape[-2]) >= n[..., None]
            padded.append(x.detach().masked_fill(past[..., None], filling).requires_grad_())
        out, weights = call(can, padded, lengths, return_weights=True)
        return (
            out,
            *weights,
            *torch.autograd.grad(out.square().sum(), [*padded, *(x for x in can.parameters() if x.requires_grad)]),
        )

    for x, y in zip(run(0.0), run(torch.nan), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_an_empty_story_leaves_u_alone():
    can = model()
    vectors, lengths = inputs()
    out, weights = call(can, vectors, lengths, return_weights=True)
    g, _ = can.word_gru(vectors[1][2:, :1])  # its question has one word
    torch.testing.assert_close(out[2:], torch.tanh(can.question_proj(g[:, 0])))
    assert not weights.words[2].any()
    assert not weights.sentences[2].any()
    none = can(vectors[0][:, :0], lengths[0][:, :0], vectors[1], lengths[1], return_weights=True)
    torch.testing.assert_close(none[0][2:], out[2:])
    assert [w.shape for w in none[1]] == [(3, 4), (3, 0, 3), (3, 0)]


def test_no_feedback_words_are_no_feedback():
    can = model()
    vectors, lengths = inputs()
    torch.testing.assert_close(call(can, vectors, lengths)[0], call(can, vectors, lengths, feedback=False)[0])


def test_uniform_keeps_parameters_and_draws():
    one, other = model(), model(attention=False)
    frozen = {n for n, x in other.named_parameters() if not x.requires_grad}
    assert frozen == {"question_pool.proj.weight"}
    for (n, x), (k, y) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert n == k
        assert x.shape == y.shape
        assert n in frozen or torch.equal(x, y)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"words": torch.zeros(3, 3, 3, 2)}, ValueError, r"words: expected shape \(B, S, L, word_dim\)"),
        ({"words": torch.zeros(3, 3, WORD)}, ValueError, "words: expected shape"),
        ({"lengths": torch.zeros(3, 2, dtype=torch.int64)}, ValueError, "lengths: expected shape"),
        ({"lengths": torch.zeros(3, 3)}, TypeError, "lengths: expected dtype"),
        ({"lengths": torch.full((3, 3), 4)}, ValueError, "lengths: expected numbers from 0 to 3"),
        ({"question": torch.zeros(2, 4, WORD)}, ValueError, "question: expected shape"),
        ({"question_lengths": torch.zeros(2, dtype=torch.int64)}, ValueError, "question_lengths: expected shape"),
        ({"feedback_lengths": None}, ValueError, "feedback_lengths: expected a tensor"),
        ({"feedback": None}, ValueError, "feedback: expected a tensor"),
    ],
)
def test_bad_input(change, error, text):
    vectors, lengths = inputs(torch.float32)
    names = ("words", "question", "feedback"), ("lengths", "question_lengths", "feedback_lengths")
    arguments = dict(zip((*names[0], *names[1]), (*vectors, *lengths), strict=True)) | change
    with pytest.raises(error, match=text):
        model(torch.float32)(**arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"word_dim": 0}, "word_dim: expected at least 1; got 0"),
        ({"activation": "relu"}, "activation: expected one of tanh, identity; got 'relu'"),
    ],
)
def test_bad_options(arguments, text):
    with pytest.raises(ValueError, match=text):
        CAN(**({"word_dim": WORD, "hidden_dim": HIDDEN, "context_dim": CONTEXT} | arguments))


@pytest.mark.kernel
def test_kernel_matches_the_reference(device):
    vectors, lengths = inputs(torch.float32, device)
    check_kernel(model, lambda can: call(can, vectors, lengths), device, vectors)


def test_task_holds_out_stories():
    examples = draw_stories(0)
    assert {split: len(some) for split, some in examples.items()} == STORIES
    assert len({x.story for some in examples.values() for x in some}) == sum(STORIES.values())
    assert {x.answer for x in examples["test"]} == set(PLACES)
    for example in examples["test"][:50]:  # the last move of the person in question
        person = example.question.split()[-1]
        moves = [s.split()[-1] for s in example.story if s.startswith(person) and " to the " in s]
        assert moves[-1] == example.answer


def test_task_learns():
    task = make(0, torch.device("cpu"))
    batch = next(iter(task.batches(torch.Generator().manual_seed(0), 0)))
    assert len(batch.answers) == BATCH
    check_task(task)
