import random

import pytest
import torch
from _models import assert_formula, assert_only_scores_differ, check_kernel, check_task

from fused_attn.models import HAN
from fused_attn.models.tasks import han as task

VOCABULARY, CLASSES, HIDDEN = 11, 3, 4
SENTENCES = (3, 1, 0, 4, 2, 0, 1)  # words of each; the third and the sixth have none
DOCUMENTS = (3, 0, 2, 1, 1)  # sentences of each; the fourth has no word


def offsets(lengths) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def build(dtype=torch.float64, **options) -> HAN:
    torch.manual_seed(0)
    return HAN(VOCABULARY, CLASSES, embed_dim=5, hidden=HIDDEN, attn_dim=6, **options).to(dtype)


def words() -> torch.Tensor:
    return torch.randint(VOCABULARY, (sum(SENTENCES),), generator=torch.Generator().manual_seed(1))


def attend(p, level, states):
    """Weighted sum and weights."""
    scores = []
    for h in states:
        u = torch.tanh(p[f"pooling.{level}.proj.weight"] @ h + p[f"pooling.{level}.proj.bias"])
        scores.append(p[f"pooling.{level}.score.weight"][0] @ u)
    a = torch.stack(scores).exp()
    a = a / a.sum()
    return sum(a_t * h for a_t, h in zip(a, states, strict=True)), a


def formula(model, tokens, uniform=False):
    """Logits, weights of words and of sentences, sentence by sentence with PyTorch's GRUs."""
    p = dict(model.named_parameters())
    zero = torch.zeros(2 * HIDDEN, dtype=p["head.weight"].dtype)
    logits, of_words, of_sentences = [], [], []
    pieces = iter(p["embedding.weight"][tokens].split(SENTENCES))
    for count in DOCUMENTS:
        sentences, v = [next(pieces) for _ in range(count)], zero
        vectors = []
        for sentence in sentences:
            s = zero
            if len(sentence):
                s, a = attend(p, "inner", model.words.rnn(sentence)[0])
                of_words.append(a)
            vectors.append(s)
        weights = zero.new_zeros(count)
        seen = [i for i, sentence in enumerate(sentences) if len(sentence)]
        if seen:
            h = model.pooling.between.rnn(torch.stack(vectors))[0]
            v, a = attend(p, "outer", h[seen])
            weights = weights.index_put((torch.tensor(seen),), a)
        of_sentences.append(weights)
        logits.append(p["head.weight"] @ v + p["head.bias"])
    return torch.stack(logits), torch.cat(of_words), torch.cat(of_sentences)


def test_formula():
    model = build()
    got = model(words(), offsets(SENTENCES), offsets(DOCUMENTS), return_weights=True)
    assert_formula(model, got, formula(model, words()))
    torch.testing.assert_close(model(words(), offsets(SENTENCES), offsets(DOCUMENTS)), got[0])


def test_documents_without_words_are_zero():
    model = build()
    logits = model(words(), offsets(SENTENCES), offsets(DOCUMENTS))
    for empty in (1, 3):
        torch.testing.assert_close(logits[empty], model.head.bias, rtol=0, atol=0)
    nothing = model(words()[:0], offsets([]), offsets([0, 0]))
    torch.testing.assert_close(nothing, model.head.bias.expand(2, CLASSES), rtol=0, atol=0)
    nothing = model(words()[:0], offsets([0, 0]), offsets([2]))
    torch.testing.assert_close(nothing, model.head.bias.expand(1, CLASSES), rtol=0, atol=0)


def test_documents_do_not_see_each_other():
    model, changed = build(), words()
    changed[4:10] = (changed[4:10] + 1) % VOCABULARY  # the third document
    before, after = (model(x, offsets(SENTENCES), offsets(DOCUMENTS)) for x in (words(), changed))
    others = [0, 1, 3, 4]
    torch.testing.assert_close(after[others], before[others])
    assert not torch.isclose(after[2], before[2]).any()


def test_without_attention_both_levels_are_means():
    model = build(attention=False)
    logits, of_words, of_sentences = model(words(), offsets(SENTENCES), offsets(DOCUMENTS), return_weights=True)
    counts = torch.tensor([n for n in SENTENCES for _ in range(n)], dtype=torch.float64)
    torch.testing.assert_close(of_words, 1 / counts)
    torch.testing.assert_close(of_sentences, torch.tensor([0.5, 0.5, 0, 0.5, 0.5, 0, 1], dtype=torch.float64))
    torch.testing.assert_close(logits, formula(model, words())[0])
    frozen = {"pooling.inner.score.weight", "pooling.outer.score.weight"}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    assert_only_scores_differ(model, build())


@pytest.mark.parametrize("name", ["vocabulary", "classes", "embed_dim", "hidden", "attn_dim"])
def test_constructor_errors(name):
    with pytest.raises(ValueError, match=rf"^{name}: expected at least 1; got 0"):
        HAN(**{"vocabulary": 3, "classes": 2, name: 0})


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"words": torch.zeros(11)}, TypeError, "words"),
        ({"words": torch.zeros(11, 1, dtype=torch.int64)}, ValueError, "words"),
        ({"sentences": offsets([3, 3])}, ValueError, "sentences"),
        ({"sentences": offsets(SENTENCES).float()}, TypeError, "sentences"),
        ({"documents": offsets([3, 3])}, ValueError, "outer_offsets"),
    ],
    ids=str,
)
def test_call_errors(change, kind, text):
    arguments = {"words": words(), "sentences": offsets(SENTENCES), "documents": offsets(DOCUMENTS)}
    with pytest.raises(kind, match=rf"^{text}: expected .*; got "):
        build()(**{**arguments, **change})


@pytest.mark.kernel
def test_kernel(device):
    arguments = [x.to(device) for x in (words(), offsets(SENTENCES), offsets(DOCUMENTS))]
    check_kernel(build, lambda model: model(*arguments, return_weights=True), device)


@pytest.fixture
def few_sentences(monkeypatch):
    """Reading what is installed takes seconds."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(40, (5, 20, 6, 8), generator=generator).tolist()
    files = tuple(
        tuple(tuple((f"own{i}", *(f"w{word}" for word in words)) for words in file) for file in topic)
        for i, topic in enumerate(numbers)
    )
    monkeypatch.setattr(task, "read_files", lambda: files)
    monkeypatch.setattr(task, "DOCUMENTS", {"train": 100, "validation": 20, "test": 20})


@pytest.mark.usefixtures("few_sentences")
def test_task():
    check_task(task.make(0, torch.device("cpu")))


@pytest.mark.usefixtures("few_sentences")
def test_files_are_of_one_split_and_names_are_gone():
    parts = task.split_sentences(0)
    for topic in range(5):
        assert [len(parts[split][topic]) for split in ("train", "validation", "test")] == [72, 18, 30]
        assert len({x for some in parts.values() for x in some[topic]}) == 120
    names = {*(f"own{i}" for i in range(5)), *(f"w{i}" for i in range(40))}
    assert set(task.find_vocabulary(parts["train"])) == {"important", *names}
    rare = [[("seldom", "often", "numpy")] * 3, [("often", "numpy")]]
    assert set(task.find_vocabulary(rare)) == {"important", "often"}


@pytest.mark.usefixtures("few_sentences")
def test_a_document_has_one_marked_sentence_of_its_topic():
    topics, rng = task.split_sentences(0)["train"], random.Random(0)
    for i in range(50):
        document = task.draw_document(topics, i % 5, rng)
        assert 4 <= len(document.sentences) <= 7
        marks = [i for i, words in enumerate(document.sentences) if "important" in words]
        assert marks == [document.marked]
        assert document.sentences[document.marked][:2] == ("important", f"own{i % 5}")


def test_sentences_are_the_paragraphs_of_docstrings():
    words = "Return x.y.z, the Name of the thing. See also: 3.5 and some other words of it"
    source = f"""def f():
    '''{words}

    >>> {words}

    too few words

    {words * 4}
    '''
"""
    first, second = task.sentences_of(source.encode())
    assert " ".join(first) == "return x y z the name of the thing see also and some other words of it"
    assert len(second) == 40


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(task.TOPICS, "nothing", ("nothing_of_the_kind/x",))
    with pytest.raises(ModuleNotFoundError, match="nothing_of_the_kind is not installed"):
        task.python_files("nothing")
