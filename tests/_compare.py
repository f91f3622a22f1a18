"""The comparator: a kernel against the reference in float64, by name, in units of the reference's own error.

An operator under test is a function ``op(impl=..., **tensors)`` that returns the output, or (output, weights).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

Operator = Callable[..., Tensor | tuple[Tensor, Tensor]]
OUTPUTS = ("output", "weights")
IMPLS = (pytest.param("triton", marks=pytest.mark.kernel), "reference")


class Result(NamedTuple):
    """What one call gave, by name."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def evaluate(
    op: Operator,
    tensors: Mapping[str, Tensor],
    impl: str,
    *,
    wrt: Sequence[str] | None = None,
    through: Sequence[str] = OUTPUTS,
    seed: int = 0,
) -> Result:
    """The outputs, and the gradients of a fixed random projection of them.

    wrt: the tensors that require a gradient; all that are floating where None.
    through: the outputs that the projection has; the others get no gradient.
    seed: PyTorch's, before the call, so that dropout draws alike.
    """
    if wrt is None:
        wrt = [name for name, x in tensors.items() if x.is_floating_point()]
    leaves = {name: x.detach().requires_grad_(name in wrt) for name, x in tensors.items()}
    torch.manual_seed(seed)
    results = op(impl=impl, **leaves)
    outputs = dict(zip(OUTPUTS, results if isinstance(results, tuple) else (results,), strict=False))
    # The weights may be absent, and have no gradient if only the values require one.
    through = [name for name in through if name in outputs and outputs[name].requires_grad]
    gradients = ()
    if wrt:
        gradients = torch.autograd.grad(
            [outputs[name] for name in through],
            [leaves[name] for name in wrt],
            [projection(outputs[name], OUTPUTS.index(name)) for name in through],
            materialize_grads=True,
        )
    return Result({name: x.detach() for name, x in outputs.items()}, dict(zip(wrt, gradients, strict=True)))


def projection(x: Tensor, seed: int) -> Tensor:
    """Random numbers like x, such that every dtype under test holds them exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, x.shape, generator=generator).to(x) / 8


def in_double(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}


def assert_matches_reference(
    op: Operator,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    impl: str = "triton",
    exact: Result | None = None,
    large: bool = False,
    **options,
) -> None:
    """The kernel in `dtype` against the reference; the options are those of `evaluate`.

    exact: what is right, where that is not the reference of these tensors in float64. large: see `rough_runs`.
    """
    if exact is None:
        exact = evaluate(op, in_double(tensors), "reference", **options)
    fused = evaluate(op, tensors, impl, **options)
    assert_as_exact(fused, rough_runs(op, tensors, large=large, **options), exact, dtype=dtype)


def rough_runs(op: Operator, tensors: Mapping[str, Tensor], *, large: bool = False, **options) -> list[Result]:
    """The reference in the tensors' own dtype, and on inputs that it can hardly tell from them.

    Three runs, or nine where their largest error in three is a matter of luck: a result has few numbers, or the
    scores are large, so that the rounding of one of them is the error of all that its softmax gives.
    """
    first = evaluate(op, tensors, "reference", **options)
    luck = large or any(x.numel() < 16 for family in first for x in family.values())
    return [first, *(evaluate(op, nudged(tensors, i), "reference", **options) for i in range(1, 9 if luck else 3))]


def shifted(op: Operator, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Result]:
    """The tensors with 1000 added to all scores, by their bias, and what is right for them: what was so before."""
    # Quarters, so that adding 1000 is exact and only the scores' own rounding is left to see.
    bias = (tensors["score_bias"] * 4).round() / 4
    exact = evaluate(op, in_double(dict(tensors) | {"score_bias": bias}), "reference")
    moved = dict(tensors) | {"score_bias": bias + 1000}
    assert_close(evaluate(op, in_double(moved), "reference"), exact)
    return moved, exact


def strided_offsets(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with offsets of ragged batches that are every other number of a larger tensor."""
    names = [name for name in tensors if name.startswith("cu_seqlens")]
    return dict(tensors) | {name: torch.stack([tensors[name], tensors[name] + 1], -1)[..., 0] for name in names}


def nudged(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The tensors moved by at most half an eps: inputs that the dtype can hardly tell from them."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(x: Tensor) -> Tensor:
        by = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device) - 0.5
        return (x.double() * (1 + torch.finfo(x.dtype).eps * by)).to(x.dtype)

    return {name: nudge(x) if x.is_floating_point() else x for name, x in tensors.items()}


def assert_as_exact(
    got: Result, rough: Result | Sequence[Result], exact: Result, *, dtype: torch.dtype = torch.float32
) -> None:
    """Each error of `got` is at most twice that of `rough`, plus one rounding step.

    exact: the reference in float64. rough: the reference in `dtype`; of several runs on inputs that `dtype` can
    hardly tell apart the largest error counts, since the largest error of one small tensor is a matter of luck.
    The step is eps of `dtype` at the largest number among the outputs, or among the gradients.
    """
    runs = [rough] if isinstance(rough, Result) else list(rough)
    wrong = []
    for kind, got_family, exact_family in zip(Result._fields, got, exact, strict=True):
        rough_families = [getattr(run, kind) for run in runs]
        assert all(family.keys() == exact_family.keys() for family in (got_family, *rough_families))
        step = torch.finfo(dtype).eps * max((largest(x) for x in exact_family.values()), default=0.0)
        for name, truth in exact_family.items():
            x, like = got_family[name], rough_families[0][name]
            assert (x.shape, x.dtype, x.device) == (like.shape, like.dtype, like.device), f"{kind}: {name}"
            error = largest(x - truth)
            allowed = 2 * max(largest(family[name] - truth) for family in rough_families) + step
            assert allowed < torch.inf, f"{kind}: {name} of the reference itself is not finite in {dtype}"
            if not error <= allowed:
                wrong.append(f"{kind}: {name} is off by {error:.3g}, allowed {allowed:.3g} (a step is {step:.3g})")
    assert not wrong, "\n".join(wrong)


def assert_identical(got: Result, want: Result) -> None:
    """Bitwise equality."""
    for kind, got_family, want_family in zip(Result._fields, got, want, strict=True):
        assert got_family.keys() == want_family.keys()
        for name, x in want_family.items():
            assert torch.equal(got_family[name], x), f"{kind}: {name} differs by {largest(got_family[name] - x):.3g}"


def assert_close(got: Result, want: Result) -> None:
    """Equality by the tolerances that PyTorch has for a dtype: of two ways to the same numbers."""
    for kind, got_family, want_family in zip(Result._fields, got, want, strict=True):
        assert got_family.keys() == want_family.keys()
        for name, x in want_family.items():
            torch.testing.assert_close(got_family[name], x, msg=lambda text, at=f"{kind}: {name}": f"{at}: {text}")


def assert_zero(result: Result) -> None:
    """Zeros everywhere: not NaN, and not the poison of unwritten memory."""
    for family in result:
        for name, x in family.items():
            assert largest(x) == 0, name


def largest(x: Tensor) -> float:
    """Largest magnitude: NaN where there is one, 0 where there is nothing."""
    return x.abs().max().item() if x.numel() else 0.0
