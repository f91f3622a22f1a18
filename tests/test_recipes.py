"""The recipes of docs/recipes.md: outputs and gradients are those of the papers' formulas, written out here."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import _recipes
import pytest
import torch
from _recipes import assert_alike, draw
from torch import Tensor, nn

from fused_attn import LocationAttention

recipe = functools.partial(_recipes.recipe, "recipes")


def first(length: int, lengths: Sequence[int]) -> Tensor:
    return torch.arange(length) < torch.tensor(lengths)[:, None]


def softmax_over(keys: Sequence[int], score: Callable[[int], Tensor], size: int) -> Tensor:
    """Weights of `size` keys, of which these are seen."""
    weights = torch.zeros(size, dtype=torch.float64)
    if not keys:
        return weights
    exponentials = torch.stack([score(j) for j in keys]).exp()
    return weights.index_put((torch.tensor(keys),), exponentials / exponentials.sum())


def test_luong_monotonic():
    states, encoded, weight = leaves = draw((2, 6, 3), (2, 9, 4), (3, 4))
    mask, D = first(9, (9, 4)), 2
    local_m = recipe("Luong's local attention", "local_m")

    def output(b: int, i: int) -> Tensor:
        keys = [j for j in range(9) if abs(j - i) <= D and mask[b, j]]
        return softmax_over(keys, lambda j: states[b, i] @ weight @ encoded[b, j], 9) @ encoded[b]

    expected = torch.stack([torch.stack([output(b, i) for i in range(6)]) for b in range(2)])
    assert_alike(local_m(states, encoded, weight, D, mask), expected, leaves)


@pytest.mark.parametrize("D", [1, 2, 5])
def test_luong_predictive(D):
    states, encoded, weight, w_p, v_p = leaves = draw((2, 6, 3), (2, 9, 4), (3, 4), (3, 2), (2,))
    lengths = torch.tensor([9, 4])
    local_p = recipe("Luong's local attention", "local_p")
    places = []

    def output(b: int, i: int) -> Tensor:
        p = lengths[b] * torch.sigmoid(4 * v_p @ torch.tanh(states[b, i] @ w_p))
        places.append(p.item())
        keys = [s for s in range(lengths[b]) if p - D <= s <= p + D]
        a = softmax_over(keys, lambda s: states[b, i] @ weight @ encoded[b, s], 9)
        s = torch.arange(9)
        return (a * torch.exp(-((s - p) ** 2) / (2 * (D / 2) ** 2))) @ encoded[b]

    expected = torch.stack([torch.stack([output(b, i) for i in range(6)]) for b in range(2)])
    assert min(places) < 1  # windows that either end cuts
    assert max(places) > 8
    assert_alike(local_p(states, encoded, lengths, weight, w_p, 4 * v_p, D), expected, leaves)


def trilinear(context: Tensor, question: Tensor, *w: Tensor) -> Tensor:
    """w · [c; q; c ⊙ q] of all pairs."""
    rows = [[torch.cat([c, q, c * q]) @ torch.cat(w) for q in question] for c in context]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("name", ["bidaf", "qanet"])
def test_both_ways(name):
    context, question, *w = leaves = draw((2, 6, 3), (2, 5, 3), (3,), (3,), (3,))
    lengths = (6, 4), (2, 5)
    expected = []
    for b in range(2):
        c, q = context[b, : lengths[0][b]], question[b, : lengths[1][b]]
        s = trilinear(c, q, *w)
        c2q = s.softmax(1) @ q
        q2c = s.max(1).values.softmax(0) @ c if name == "bidaf" else s.softmax(1) @ s.softmax(0).T @ c
        rows = torch.cat([c, c2q, c * c2q, c * q2c], -1)
        expected.append(rows)
    got = recipe("BiDAF and QANet", name)(context, question, *w, first(6, lengths[0]), first(5, lengths[1]))
    assert_alike([got[b, : lengths[0][b]] for b in range(2)], expected, leaves)


def test_glimpses():
    question, regions, u, v, p = leaves = draw((2, 3), (2, 7, 4), (3, 5), (4, 5), (5, 2))
    lengths = 7, 3

    def output(b: int, g: int) -> Tensor:
        def score(j: int) -> Tensor:
            return p[:, g] @ (torch.tanh(u.T @ question[b]) * torch.tanh(v.T @ regions[b, j]))

        return softmax_over(range(lengths[b]), score, 7) @ regions[b]

    expected = torch.stack([torch.cat([output(b, 0), output(b, 1)]) for b in range(2)])
    got = recipe("Low-rank bilinear attention", "glimpses")(question, regions, u, v, p, first(7, lengths))
    assert_alike(got, expected, leaves)


def test_memory_network():
    u, *memories = leaves = draw((3, 4), *[(3, 5, 4)] * 4)
    lengths = 5, 2, 0
    states = list(u)
    for hop in range(3):
        for b in range(3):
            m, c = memories[hop][b], memories[hop + 1][b]
            p = softmax_over(range(lengths[b]), lambda i, b=b, m=m: states[b] @ m[i], 5)
            states[b] = states[b] + p @ c
    got = recipe("Memory network hops", "hops")(u, memories, first(5, lengths))
    assert_alike(got, torch.stack(states), leaves)


def test_pointer_network():
    decoded, encoded, w_1, w_2, v = leaves = draw((2, 4, 3), (2, 6, 5), (5, 7), (3, 7), (7,))
    lengths = 6, 4

    def output(b: int, i: int) -> Tensor:
        def score(j: int) -> Tensor:
            return v @ torch.tanh(encoded[b, j] @ w_1 + decoded[b, i] @ w_2)

        return softmax_over(range(lengths[b]), score, 6)

    expected = torch.stack([torch.stack([output(b, i) for i in range(4)]) for b in range(2)])
    got = recipe("Pointer network", "point")(decoded, encoded, w_1, w_2, v, first(6, lengths))
    torch.testing.assert_close(got.exp(), expected)
    targets = torch.tensor([[5, 0, 2, 2], [3, 1, 0, 3]])[..., None]
    assert_alike(got.gather(2, targets), expected.gather(2, targets).log(), leaves)


def test_pointer_generator():
    states, encoded, w_s, w_h, w_c, b, v = leaves = draw((2, 4, 3), (2, 6, 5), (3, 7), (5, 7), (7,), (7,), (7,))
    logits, gate = more = draw((2, 4, 9), (2, 4, 1))
    lengths, extra = (6, 4), 2
    words = torch.tensor([[1, 9, 3, 9, 10, 1], [0, 8, 10, 0, 5, 5]])
    found, loss, chances = [], [], []
    for n in range(2):
        coverage = torch.zeros(6, dtype=torch.float64)
        for t in range(4):

            def score(j: int, n: int = n, t: int = t, c: Tensor = coverage) -> Tensor:
                return v @ torch.tanh(encoded[n, j] @ w_h + states[n, t] @ w_s + c[j] * w_c + b)

            a = softmax_over(range(lengths[n]), score, 6)
            found.append(a @ encoded[n])
            loss.append(sum(torch.minimum(a[j], coverage[j]) for j in range(6)))
            coverage = coverage + a
            p_gen, vocabulary = gate[n, t].sigmoid(), logits[n, t].softmax(-1)
            for word in range(9 + extra):
                copied = sum((a[j] for j in range(lengths[n]) if words[n, j] == word), a.new_zeros(()))
                p = p_gen * vocabulary[word] if word < 9 else 0
                chances.append(p + (1 - p_gen) * copied)
    attend, generate = recipe("Pointer-generator with coverage", "attend", "generate")
    out, weights, lost = attend(states, encoded, w_s, w_h, w_c, b, v, first(6, lengths))
    p = generate(logits.softmax(-1), gate.sigmoid(), weights, words, extra)
    expected = torch.stack(found).view(2, 4, 5), torch.stack(loss).view(2, 4), torch.stack(chances).view(2, 4, -1)
    assert_alike([out, lost, p], expected, [*leaves, *more])


def test_self_attentive_embedding():
    h, w_1, w_2 = leaves = draw((3, 7, 4), (4, 5), (5, 2))
    lengths = 7, 3, 0
    rows, penalties = [], []
    for b, length in enumerate(lengths):
        s = torch.tanh(h[b, :length] @ w_1) @ w_2
        a = (s.exp() / s.exp().sum(0)).T
        rows.append(a @ h[b, :length])
        penalties.append(torch.linalg.matrix_norm(a @ a.T - torch.eye(2)) ** 2)
    got = recipe("Self-attentive embedding", "embed")(h, w_1, w_2, first(7, lengths))
    assert_alike(got, [torch.stack(rows), torch.stack(penalties)], leaves)


def test_which_instance():
    (rows,) = draw((9, 4))
    lengths = 5, 0, 4
    pool, head = LocationAttention(4, 3, gated=True, dtype=torch.float64), nn.Linear(4, 2, dtype=torch.float64)
    logits, shares, relative = [], [], []
    for bag in rows.split(lengths):
        u = torch.tanh(pool.proj(bag)) * torch.sigmoid(pool.gate(bag))
        s = (u @ pool.score.weight.T)[:, 0].exp()
        a = s / s.sum()
        logits.append(head((a[:, None] * bag).sum(0)))
        shares.append(a[:, None] * (bag @ head.weight.T))
        relative.append(a * len(bag))
    cu_seqlens = torch.tensor([0, 5, 5, 9], dtype=torch.int32)
    got = recipe("Which instance of a bag", "classify")(pool, head, rows, cu_seqlens)
    leaves = [rows, *pool.parameters(), *head.parameters()]
    assert_alike(got, [torch.stack(logits), torch.cat(shares), torch.cat(relative)], leaves)
    sums = torch.stack([share.sum(0) for share in got[1].split(lengths)])
    torch.testing.assert_close(sums + head.bias, got[0])


@pytest.mark.parametrize("softmax", [False, True])
def test_din_with_dice(softmax):
    """The layers of DeepCTR-Torch one after the other, in eval mode, on the four parts side by side."""
    query, key, *alphas = draw((3, 4), (3, 7, 4), (6,), (5,))
    layers = [nn.Linear(16, 6), nn.Linear(6, 5), nn.Linear(5, 1)]
    norms = [nn.BatchNorm1d(6, eps=1e-8), nn.BatchNorm1d(5, eps=1e-8)]
    model = nn.ModuleList([*layers, *norms]).double()
    for norm in norms:
        norm(torch.randn(50, norm.num_features, dtype=torch.float64) * 2 + 1)  # so that it has statistics
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    model.eval()
    mask = first(7, (7, 3, 1))
    q = query[:, None].expand_as(key)
    x = torch.cat([q, key, q - key, q * key], -1)
    for layer, norm, alpha in zip(layers[:2], norms, alphas, strict=True):
        z = layer(x)
        p = torch.sigmoid(norm(z.mT).mT)
        x = alpha * (1 - p) * z + p * z
    scores = layers[2](x)[..., 0]
    weights = scores.masked_fill(~mask, -torch.inf).softmax(1) if softmax else scores * mask
    got = recipe("DIN's Dice", "din")(query, key, layers, norms, alphas, mask, softmax)
    leaves = [query, key, *alphas, *(x for name, x in model.named_parameters() if not softmax or name != "2.bias")]
    assert_alike(got, (weights[:, None] @ key)[:, 0], leaves)


def test_every_recipe_was_tested():
    assert _recipes.named_in(Path(__file__)) == set(_recipes.sections("recipes"))


def test_a_bias_that_the_softmax_cancels(tmp_path):
    layer = recipe("A bias that the softmax cancels", "AdditivePooling")(4, 3)
    h, mask = torch.randn(2, 7, 4), first(7, (7, 3))
    scores = layer.score(torch.tanh(layer.project(h))).masked_fill(~mask[..., None], -torch.inf)
    torch.testing.assert_close(layer(h, mask), (scores.softmax(1) * h).sum(1))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(layer)
        for _ in range(2):  # the second waits for what had no gradient in the first
            parallel(h, mask).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    gradient = layer.score.bias.grad
    assert gradient is not None
    assert gradient.abs() < 1e-6 * layer.score.weight.grad.abs().max() + 1e-7
