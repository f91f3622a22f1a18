"""What the tests of the published systems share."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from fused_attn.models.protocol import build
from fused_attn.models.tasks import Task


def assert_formula(
    model: nn.Module, got: Sequence[Tensor], expected: Sequence[Tensor], inputs: dict[str, Tensor] | None = None
) -> None:
    """Outputs agree, and so do their gradients for every parameter of the model that is trained and every input."""
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad} | (inputs or {})
    generator = torch.Generator().manual_seed(1)

    def gradients(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        generator.manual_seed(1)
        cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]
        return torch.autograd.grad(outputs, list(leaves.values()), cotangents, materialize_grads=True)

    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(a, b, msg=lambda text, i=i: f"output {i}: {text}")
    for name, a, b in zip(leaves, gradients(got), gradients(expected), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"gradient of {name}: {text}")


def check_kernel(
    build: Callable[..., nn.Module],
    call: Callable[[nn.Module], Tensor | tuple[Tensor, ...]],
    device: torch.device,
    leaves: Sequence[Tensor] = (),
    **options,
) -> None:
    """What `call` makes of ``build(dtype, impl=..., **options)`` by the kernel and the reference; gradients too."""
    results = []
    for impl in ("triton", "reference"):
        model = build(torch.float32, impl=impl, **options).to(device)
        made = call(model)
        outputs = made if isinstance(made, tuple) else (made,)
        loss = sum(x.square().sum() for x in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [*leaves, *model.parameters()])])
    torch.testing.assert_close(*results)


def assert_only_scores_differ(without: nn.Module, attends: nn.Module) -> None:
    """The baseline has the parameters of the model with attention, and their numbers but for the frozen ones."""
    of_both = zip(without.named_parameters(), attends.named_parameters(), strict=True)
    for (name, p), (other, q) in of_both:
        assert (name, p.shape) == (other, q.shape)
        assert not p.requires_grad or torch.equal(p, q), name


def check_task(task: Task, steps: int = 5, low: float = 0.0) -> None:
    """A batch can be learned, scores and localisations of every arm are in their range, and panels are weights."""
    torch.manual_seed(0)
    model, baseline = task.build("attention"), task.build("uniform")
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in baseline.parameters())
    batch = next(iter(task.batches(torch.Generator().manual_seed(0), 0)))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert torch.isfinite(torch.tensor(losses)).all()
    assert losses[-1] < losses[0]
    for arm in task.arms:
        trained = model if arm == "attention" else build(task, arm)
        assert torch.isfinite(task.loss(trained, batch))
        with torch.no_grad():
            for split in ("validation", "test"):
                score, located, _ = task.judge(trained.eval(), split)
                assert low <= score <= 1.0
                assert all(0 <= x <= 1 + 1e-5 for x in located.values())
                assert arm != "oracle" or all(x > 0.999 for x in located.values())
    if task.baselines:
        pytest.importorskip("sklearn")
    for baseline in task.baselines.values():
        assert low <= baseline("validation") <= 1.0
    with torch.no_grad():
        panels = task.panels(model.eval())
    assert panels
    for panel in panels:
        assert panel.weights.shape == (len(panel.rows), len(panel.columns)), panel.title
        assert panel.truth is None or panel.truth.shape == panel.weights.shape, panel.title
        torch.testing.assert_close(panel.weights.sum(-1).cpu(), torch.ones(len(panel.rows)))
