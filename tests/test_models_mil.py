import pytest
import torch
from _models import assert_formula, check_kernel, check_task
from torch import nn

from fused_attn.models import GatedMIL

ACTIVATIONS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu, "identity": lambda x: x}
LENGTHS = (3, 0, 5, 1)
CU_SEQLENS = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)


def build(dtype=torch.float64, **options) -> GatedMIL:
    torch.manual_seed(0)
    return GatedMIL(nn.Sequential(nn.Linear(5, 7), nn.Tanh()), 7, 6, 2, **options).to(dtype)


def instances(dtype=torch.float64) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(9, 5, dtype=dtype)


def formula(model, x, gated, activation, gate_activation):
    p = dict(model.named_parameters())
    logits, weights = [], []
    for bag in x.split(LENGTHS):
        z = torch.zeros(7, dtype=x.dtype)
        if len(bag):
            h = [torch.tanh(p["encoder.0.weight"] @ one + p["encoder.0.bias"]) for one in bag]
            scores = []
            for h_k in h:
                u = ACTIVATIONS[activation](p["pooling.proj.weight"] @ h_k + p.get("pooling.proj.bias", 0))
                if gated:
                    g = p["pooling.gate.weight"] @ h_k + p.get("pooling.gate.bias", 0)
                    u = u * ACTIVATIONS[gate_activation](g)
                scores.append(p["pooling.score.weight"][0] @ u)
            a = torch.stack(scores).exp()
            a = a / a.sum()
            weights.extend(a)
            z = sum(a_k * h_k for a_k, h_k in zip(a, h, strict=True))
        logits.append(p["head.weight"] @ z + p["head.bias"])
    return torch.stack(logits), torch.stack(weights)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pair", [("tanh", "sigmoid"), ("relu", "sigmoid"), ("identity", "tanh")], ids="-".join)
def test_formula(gated, bias, pair):
    model = build(gated=gated, bias=bias, activation=pair[0], gate_activation=pair[1])
    assert ("pooling.gate.bias" in model.state_dict()) == (gated and bias)
    x = instances().requires_grad_()
    got = model(x, CU_SEQLENS, return_weights=True)
    assert_formula(model, got, formula(model, x, gated, *pair), {"instances": x})
    torch.testing.assert_close(model(x, CU_SEQLENS), got[0])


def test_an_empty_bag_is_zero():
    model = build()
    logits = model(instances(), CU_SEQLENS)
    torch.testing.assert_close(logits[1], model.head.bias, rtol=0, atol=0)
    nothing = model(instances()[:0], torch.zeros(3, dtype=torch.int32))
    torch.testing.assert_close(nothing, model.head.bias.expand(2, 2), rtol=0, atol=0)


def test_bags_do_not_see_each_other():
    model, x = build(), instances()
    dirty = x.clone()
    dirty[3:8] = torch.nan
    clean, other = model(x, CU_SEQLENS), model(dirty, CU_SEQLENS)
    torch.testing.assert_close(other[[0, 1, 3]], clean[[0, 1, 3]], rtol=0, atol=0)
    assert other[2].isnan().all()


@pytest.mark.parametrize("gated", [True, False])
def test_without_attention_it_is_the_mean(gated):
    model, x = build(gated=gated, attention=False), instances()
    logits, weights = model(x, CU_SEQLENS, return_weights=True)
    means = torch.stack([h.mean(0) if len(h) else h.sum(0) for h in model.encoder(x).split(LENGTHS)])
    torch.testing.assert_close(logits, model.head(means))
    torch.testing.assert_close(weights, torch.cat([torch.full((n,), 1 / max(n, 1)) for n in LENGTHS]).double())
    logits.sum().backward()
    assert model.pooling.score.weight.grad is None
    same = build(gated=gated).state_dict()
    for name, value in model.state_dict().items():
        assert name == "pooling.score.weight" or torch.equal(value, same[name]), name


BAD = {"dim": 0, "attn_dim": 0, "classes": 0, "activation": "softplus", "gate_activation": "softplus"}


@pytest.mark.parametrize("name", BAD)
def test_constructor_errors(name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*; got "):
        GatedMIL(nn.Identity(), **{"dim": 5, "attn_dim": 4, name: BAD[name]})


def test_call_errors():
    model, x = build(), instances()
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected "):
        model(x, torch.tensor([0, 3, 8], dtype=torch.int32))
    with pytest.raises(TypeError, match=r"^cu_seqlens: expected "):
        model(x, CU_SEQLENS.float())


@pytest.mark.kernel
def test_kernel(device):
    x, cu_seqlens = instances(torch.float32).to(device).requires_grad_(), CU_SEQLENS.to(device)
    check_kernel(build, lambda model: model(x, cu_seqlens, return_weights=True), device, [x])


def test_task():
    pytest.importorskip("sklearn")
    from fused_attn.models.tasks import mil

    check_task(mil.make(0, torch.device("cpu")))


def test_held_out_images_are_not_trained_on_and_bags_are_as_described():
    pytest.importorskip("sklearn")
    import numpy as np

    from fused_attn.models.tasks import mil

    digits = mil.load_digits().target
    pools = mil.split_images(digits, 0)
    assert sorted(np.concatenate([*pools.values()])) == list(range(len(digits)))
    rng = np.random.default_rng(0)
    for pool in pools.values():
        for label in (0, 1) * 20:
            bag = mil.draw_bag(pool, digits, label, rng)
            assert {*bag.tolist()} <= {*pool.tolist()}
            assert len({*bag.tolist()}) == len(bag)
            assert mil.SIZES[0] <= len(bag) <= mil.SIZES[1]
            nines, fours = ((digits[bag] == digit).sum() for digit in (9, 4))
            assert nines + fours in mil.KEYS
            assert min(nines, fours) >= 1
            assert (nines > fours) == label


def test_bags_that_are_taken_are_whole():
    pytest.importorskip("sklearn")
    import numpy as np

    from fused_attn.models.tasks import mil

    bags = mil.make_bags(np.arange(1797), 6, np.random.default_rng(0))
    some = bags.take(torch.tensor([4, 0]))
    parts = bags.images.split(bags.cu_seqlens.diff().tolist())
    assert torch.equal(some.images, torch.cat([parts[4], parts[0]]))
    assert some.cu_seqlens.tolist() == [0, len(parts[4]), len(parts[4]) + len(parts[0])]
    assert torch.equal(some.labels, bags.labels[[4, 0]])
    assert torch.equal(some.key, (some.digits == 9) | (some.digits == 4))


def test_instance_auc_is_the_area_under_the_curve():
    pytest.importorskip("sklearn")
    import numpy as np
    from sklearn.metrics import roc_auc_score

    from fused_attn.models.tasks import mil

    bags = mil.make_bags(np.arange(1797), 6, np.random.default_rng(0))
    weights = torch.randint(5, bags.key.shape, generator=torch.Generator().manual_seed(0)) / 5  # with ties
    parts = (x.split(bags.cu_seqlens.diff().tolist()) for x in (bags.key, weights))
    areas = [roc_auc_score(key, w) for key, w in zip(*parts, strict=True)]
    assert mil.instance_auc(weights, bags) == pytest.approx(sum(areas) / 6)


def test_images_are_standardised_and_counts_are_those_asked_for():
    pytest.importorskip("sklearn")
    from fused_attn.models.tasks import mil

    counts = {"train": 30, "validation": 4, "test": 6}
    splits = mil.make_splits(0, torch.device("cpu"), counts)
    assert {split: len(bags.labels) for split, bags in splits.items()} == counts
    images = splits["train"].images
    assert abs(images.mean()) < 0.05
    assert abs(images.std() - 1) < 0.05
