import pytest
import torch
from _models import assert_formula, assert_only_scores_differ, check_kernel, check_task

from fused_attn.models import Entailment

VOCABULARY, CLASSES, HIDDEN = 9, 3, 4
PREMISE, HYPOTHESIS = torch.tensor([5, 0, 3, 1]), torch.tensor([4, 2, 0, 1])
MODES = ("attention", "word_by_word")
each_mode = pytest.mark.parametrize("mode", MODES)


def build(dtype=torch.float64, **options) -> Entailment:
    torch.manual_seed(0)
    return Entailment(VOCABULARY, CLASSES, embed_dim=5, hidden=HIDDEN, **options).to(dtype)


def pairs() -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(1)
    premise, hypothesis = (torch.randint(VOCABULARY, (4, n), generator=draw) for n in (5, 4))
    return premise, PREMISE, hypothesis, HYPOTHESIS


def read(p, lstm, tokens, state):
    """Outputs and the last state, by the LSTM's equations."""
    h, c = state
    outputs = []
    for x in p["embedding.weight"][tokens]:
        z = p[f"{lstm}.weight_ih_l0"] @ x + p[f"{lstm}.bias_ih_l0"]
        z = z + p[f"{lstm}.weight_hh_l0"] @ h + p[f"{lstm}.bias_hh_l0"]
        i, f, g, o = z.split(HIDDEN)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return outputs, (h, c)


def one_direction(p, premise, hypothesis, mode, start, widths):
    """h* and the weights, padded to `widths`, of one pair."""
    zero = torch.zeros(HIDDEN, dtype=torch.float64)
    y, (h, c) = read(p, "premise_lstm", premise, (zero, zero))
    states, (last, _) = read(p, "hypothesis_lstm", hypothesis, (zero if start == "cell" else h, c))
    weights = []

    def attend(m):
        if not y:
            weights.append(zero.new_zeros(widths[0]))
            return zero
        a = torch.stack([p["pooling.score.weight"][0] @ torch.tanh(m_j) for m_j in m]).exp()
        a = a / a.sum()
        weights.append(torch.cat([a, zero.new_zeros(widths[0] - len(y))]))
        return sum(a_j * y_j for a_j, y_j in zip(a, y, strict=True))

    r = zero
    if mode == "attention":
        if states:
            query = p["pooling.query_proj.weight"] @ last
            r = attend([p["pooling.key_proj.weight"] @ y_j + query for y_j in y])
        alpha = weights[0] if weights else zero.new_zeros(widths[0])
    else:
        for h_t in states:
            query = p["pooling.hypothesis_proj.weight"] @ h_t + p["pooling.state_proj.weight"] @ r
            found = attend([p["pooling.premise_proj.weight"] @ y_j + query for y_j in y])
            r = found + torch.tanh(p["pooling.carry.weight"] @ r)
        alpha = torch.stack(weights + [zero.new_zeros(widths[0])] * (widths[1] - len(states)))
    return torch.tanh(p["from_premise.weight"] @ r + p["from_hypothesis.weight"] @ last), alpha


def formula(model, premise, premise_lengths, hypothesis, hypothesis_lengths, mode, two_way, start):
    p = dict(model.named_parameters())
    logits, weights = [], []
    for i in range(len(premise)):
        one, other = premise[i, : premise_lengths[i]], hypothesis[i, : hypothesis_lengths[i]]
        both = [one_direction(p, one, other, mode, start, (premise.shape[1], hypothesis.shape[1]))]
        if two_way:
            both.append(one_direction(p, other, one, mode, start, (hypothesis.shape[1], premise.shape[1])))
        logits.append(p["head.weight"] @ torch.cat([x for x, _ in both]) + p["head.bias"])
        weights.append([w for _, w in both])
    return torch.stack(logits), *(torch.stack(w) for w in zip(*weights, strict=True))


@each_mode
@pytest.mark.parametrize("two_way", [False, True])
@pytest.mark.parametrize("start", ["cell", "both"])
def test_formula(mode, two_way, start):
    model = build(mode=mode, two_way=two_way, start=start)
    got = model(*pairs(), return_weights=True)
    assert len(got) == 2 + two_way
    assert_formula(model, got, formula(model, *pairs(), mode, two_way, start))
    torch.testing.assert_close(model(*pairs()), got[0])


@each_mode
def test_what_is_past_the_end_does_not_matter(mode):
    model, (premise, _, hypothesis, _) = build(mode=mode, two_way=True), pairs()
    dirty = [x.clone() for x in (premise, hypothesis)]
    for x, lengths in zip(dirty, (PREMISE, HYPOTHESIS), strict=True):
        past = torch.arange(x.shape[1]) >= lengths[:, None]
        x[past] = -1
    before = model(*pairs(), return_weights=True)
    after = model(dirty[0], PREMISE, dirty[1], HYPOTHESIS, return_weights=True)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@each_mode
def test_empty_sentences_and_batches(mode):
    model, none = build(mode=mode, two_way=True), torch.zeros(2, dtype=torch.int64)
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    logits, *weights = model(nothing, none, nothing, none, return_weights=True)
    torch.testing.assert_close(logits, model.head.bias.expand(2, CLASSES), rtol=0, atol=0)
    assert [w.shape for w in weights] == [(2, 0) if mode == "attention" else (2, 0, 0)] * 2
    premise, premise_lengths, hypothesis, hypothesis_lengths = (x[:0] for x in pairs())
    assert model(premise, premise_lengths, hypothesis, hypothesis_lengths).shape == (0, CLASSES)


@each_mode
def test_without_attention_weights_are_uniform(mode):
    model = build(mode=mode, attention=False)
    logits, weights = model(*pairs(), return_weights=True)
    uniform = (torch.arange(5) < PREMISE[:, None]) / PREMISE.clamp(min=1)[:, None].double()
    if mode == "attention":
        expected = uniform * (HYPOTHESIS > 0)[:, None]
    else:
        expected = uniform[:, None] * (torch.arange(4) < HYPOTHESIS[:, None])[..., None]
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(logits, formula(model, *pairs(), mode, False, "cell")[0])
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pooling.score.weight"]
    assert_only_scores_differ(model, build(mode=mode))


BAD = {"vocabulary": 0, "classes": 0, "embed_dim": 0, "hidden": 0, "mode": "words", "start": "zero"}


@pytest.mark.parametrize("name", BAD)
def test_constructor_errors(name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*; got "):
        Entailment(**{"vocabulary": 5, name: BAD[name]})


@pytest.mark.parametrize(
    ("place", "value", "kind", "name"),
    [
        (0, torch.zeros(4, 5), TypeError, "premise"),
        (0, torch.zeros(4, dtype=torch.int64), ValueError, "premise"),
        (2, torch.zeros(3, 4, dtype=torch.int64), ValueError, "hypothesis"),
        (1, PREMISE[:3], ValueError, "premise_lengths"),
        (1, PREMISE + 1, ValueError, "premise_lengths"),
        (3, HYPOTHESIS.float(), TypeError, "hypothesis_lengths"),
        (3, -HYPOTHESIS, ValueError, "hypothesis_lengths"),
    ],
)
def test_call_errors(place, value, kind, name):
    arguments = list(pairs())
    arguments[place] = value
    with pytest.raises(kind, match=rf"^{name}: expected .*; got "):
        build()(*arguments)


@pytest.mark.kernel
@each_mode
def test_kernel(mode, device):
    arguments = [x.to(device) for x in pairs()]
    check_kernel(build, lambda model: model(*arguments, return_weights=True), device, mode=mode, two_way=True)


def test_task():
    from fused_attn.models.tasks import entailment

    check_task(entailment.make(0, torch.device("cpu")))


def test_labels_are_right_and_words_do_not_tell_them():
    import random

    from fused_attn.models.tasks import entailment as task

    rng = random.Random(0)
    for i in range(300):
        pair = task.draw_pair(rng, i % 3, 1 + i % 5)
        scene = {}
        for phrase in " ".join(pair.premise).split(" and "):
            words = phrase.split()
            (noun,) = {*words} & task.KIND_OF.keys()
            scene[noun] = {a: next((w for w in words if w in values), None) for a, values in task.VALUES.items()}
        (name,) = {*pair.hypothesis} & ({*scene} | {*task.KINDS})
        (about,) = [noun for noun in scene if name in (noun, task.KIND_OF[noun])]
        said = pair.hypothesis[-2] if "there" in pair.hypothesis else pair.hypothesis[-1]
        attribute = next((a for a, values in task.VALUES.items() if said in values), "place")

        def fits(value, said=said, pair=pair):
            numbers = task.VALUES["number"]
            if "least" in pair.hypothesis:
                return numbers.index(value) >= numbers.index(said)
            return value in task.SIDES.get(said, (said,))

        stated = scene[about][attribute]
        assert pair.label == (2 if stated is None else 0 if fits(stated) else 1)
        values = [v[attribute] for v in scene.values() if v[attribute] is not None]
        if len(scene) > (2 if pair.label == 2 else 1):
            assert {fits(value) for value in values} == {False, True}
        assert about in pair.premise[pair.phrase]
        assert " and ".join([" ".join(pair.premise[pair.phrase])]) in " ".join(pair.premise).split(" and ")
        assert (about, said) in pair.asked


def test_held_out_combinations_are_new():
    from fused_attn.models.tasks import entailment

    data = entailment.make_pairs(0)
    known = set().union(*(pair.said for pair in data["train"]))
    assert all(pair.asked - known for pair in data["validation"] + data["test"])
    for pairs_ in data.values():
        assert [sum(p.label == i for p in pairs_) for i in range(3)] == [len(pairs_) // 3] * 3
