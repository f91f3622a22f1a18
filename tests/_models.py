"""What the tests of the published systems share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

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
    """One batch can be learned, the score is in its range, and the panels are matrices of weights with labels."""
    torch.manual_seed(0)
    model = task.build(True)
    baseline = task.build(False)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in baseline.parameters())
    batch = next(iter(task.batches(torch.Generator().manual_seed(0))))
    optimizer = torch.optim.Adam(model.parameters(), task.learning_rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert torch.isfinite(torch.tensor(losses)).all()
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        assert low <= task.score(model) <= 1.0
        panels = task.panels(model)
    assert panels
    for panel in panels:
        assert panel.weights.shape == (len(panel.rows), len(panel.columns)), panel.title
        torch.testing.assert_close(panel.weights.sum(-1).cpu(), torch.ones(len(panel.rows)))
