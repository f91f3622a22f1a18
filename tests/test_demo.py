"""The demo's bags are what its docstring says, and its checks notice what is wrong."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from bench import demo

DIGITS = demo.load_digits().target
GOOD_AUCS = {"gated attention": [0.99], "mean": [0.9], "max": [0.99]}


@pytest.fixture
def small_check(monkeypatch):
    monkeypatch.setattr(demo, "CHECK_ON_CPU", (3, 5, 20, 16, 8))
    monkeypatch.setattr(demo, "CHECK_RUNS", 1)


@pytest.fixture
def run_main(monkeypatch, small_check, capsys):
    """`main` without training: the exit status and what it printed."""

    def run(aucs=GOOD_AUCS):
        monkeypatch.setattr(demo, "experiment", lambda *args: aucs)
        monkeypatch.setattr(demo, "Console", lambda: console(width=200))
        monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
        return demo.main([]), capsys.readouterr().out

    console = demo.Console
    return run


def replace_kernel(monkeypatch, change):
    """Whatever asks for the kernel gets the reference's output, changed."""
    real = demo.location_attention

    def changed(*args, impl, **kwargs):
        out = real(*args, impl="reference", **kwargs)
        return change(out) if impl == "triton" else out

    monkeypatch.setattr(demo, "location_attention", changed)


@pytest.mark.parametrize("seed", range(3))
def test_images_are_split_without_overlap(seed):
    train, test = demo.split_images(DIGITS, seed)
    assert not set(train) & set(test)
    assert len(train) + len(test) == len(DIGITS)
    share = [np.bincount(DIGITS[part]) / len(part) for part in (train, test)]
    np.testing.assert_allclose(*share, atol=0.005)  # stratified: every digit is as frequent in both


@pytest.mark.parametrize("seed", range(3))
def test_labels_and_sizes_of_bags(seed):
    pool, other = demo.split_images(DIGITS, seed)
    bags = demo.make_bags(pool, DIGITS, 200, np.random.default_rng(seed))
    assert bags.labels.sum() == 100
    nines = torch.tensor([int((DIGITS[bag] == 9).sum()) for bag in bags.images])
    sizes = torch.tensor([len(bag) for bag in bags.images])
    assert torch.equal(bags.labels == 1, nines > 0)
    assert ((nines == 0) | (nines <= sizes // 10)).all()
    assert sizes.min() >= 10
    assert sizes.max() <= 50
    assert all(len(set(bag.tolist())) == len(bag) for bag in bags.images)
    assert not set(torch.cat(bags.images).tolist()) & set(other)
    # The size does not tell the label: 100 sizes a label, so the means differ by 1.7 in standard deviation.
    assert abs(sizes[:100].double().mean() - sizes[100:].double().mean()) < 5


def test_size_range_is_used_up_to_its_ends():
    bags = demo.make_bags(np.arange(len(DIGITS)), DIGITS, 1000, np.random.default_rng(0))
    assert {len(bag) for bag in bags.images} == set(range(10, 51))


def test_packed_bags():
    bags = demo.make_bags(np.arange(len(DIGITS)), DIGITS, 6, np.random.default_rng(0))
    index, cu_seqlens = bags.pack([4, 0, 2])
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens[0] == 0
    assert cu_seqlens[-1] == len(index)
    for at, bag in enumerate([4, 0, 2]):
        assert torch.equal(index[cu_seqlens[at] : cu_seqlens[at + 1]], bags.images[bag])


@pytest.mark.parametrize("pooling", demo.POOLINGS)
def test_a_bag_is_classified_alike_alone_and_packed(pooling):
    images = torch.from_numpy(demo.load_digits().images / 16).float()[:, None]
    bags = demo.make_bags(np.arange(len(DIGITS)), DIGITS, 4, np.random.default_rng(0))
    model = demo.BagClassifier(pooling, impl="reference").eval()
    logits, weights = demo.predict(model, images, bags)
    assert len(weights) == (4 if pooling == "gated attention" else 0)
    for i, bag in enumerate(bags.images):
        h = model.encoder(images[bag])
        if pooling == "gated attention":
            pooled = weights[i] @ h
            torch.testing.assert_close(weights[i].sum(), torch.tensor(1.0))
        else:
            pooled = h.mean(0) if pooling == "mean" else h.amax(0)
        torch.testing.assert_close(model.head(pooled)[0], logits[i])


def test_the_reference_is_within_its_own_bounds(device, small_check):
    report = demo.check(device, torch.float32, fused="reference")
    assert list(report.bounds) == list(demo.CHECKED)
    assert report.fused.keys() == report.reference.keys() == report.bounds.keys()
    assert all(0 < error < 1e-2 for error in report.reference.values())
    assert report.problems() == []
    restored = demo.Report(**json.loads(json.dumps(asdict(report))))  # what the check's own process sends
    assert restored.bounds == report.bounds
    assert restored.problems() == []
    assert restored.table().row_count == len(demo.CHECKED) + 2


@pytest.mark.kernel
def test_the_kernel_is_within_its_bounds(run_main, device, request):
    if request.config.getoption("devices"):
        pytest.skip("the demo finds its device itself")
    status, printed = run_main()
    assert ("on the CPU" in printed) == (device.type == "cpu")
    assert "OK" in printed
    assert status == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda out: out * (1 + 1e-4), "output"),
        (lambda out: out.detach() + 1.01 * (out - out.detach()), "grad h"),
        (lambda out: out * torch.nan, "grad gate bias"),
    ],
    ids=["output", "gradients", "nan"],
)
def test_a_wrong_kernel_fails_the_demo(monkeypatch, run_main, change, named):
    replace_kernel(monkeypatch, change)
    status, printed = run_main()
    assert f"Past its bound: {named}" in printed
    assert status == 1


@pytest.mark.parametrize(
    "aucs",
    [
        {"gated attention": [0.94], "mean": [0.9], "max": [0.99]},
        {"gated attention": [0.96], "mean": [0.97], "max": [0.99]},
        {"gated attention": [float("nan")], "mean": [0.9], "max": [0.99]},
    ],
    ids=["low", "under the mean", "nan"],
)
def test_a_poor_auc_fails_the_demo(monkeypatch, run_main, aucs):
    replace_kernel(monkeypatch, lambda out: out)
    status, printed = run_main(aucs)
    assert "Past its bound: AUC" in printed
    assert status == 1


def test_without_triton_the_table_says_so(monkeypatch, run_main):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    status, printed = run_main()
    assert "triton is not installed" in printed
    assert "the kernel was not checked" in printed
    assert status == 0


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    data = demo.load_digits()
    bags = demo.make_bags(np.arange(len(DIGITS)), DIGITS, 8, np.random.default_rng(0))
    weights = [torch.full((len(bag),), 1 / len(bag)) for bag in bags.images]
    demo.save_picture(tmp_path / "new", data.images, DIGITS, bags, torch.full((8,), 0.5), weights)
    assert (tmp_path / "new" / "attention.png").stat().st_size > 10_000
