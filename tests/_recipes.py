"""Recipes of the docs: their functions, and what they are compared with."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def sections(page: str) -> dict[str, str]:
    """The code of each section of a page of docs/."""
    text = (Path(__file__).parents[1] / "docs" / f"{page}.md").read_text()
    return dict(re.findall(r"^## (.*?)\n.*?^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def named_in(file: Path) -> set[str]:
    """The sections whose recipes a file of tests has."""
    return set(re.findall(r'\brecipe\("(.*?)"', file.read_text()))


def recipe(page: str, section: str, *names: str) -> Any:
    """Functions that a section of a page of docs/ defines."""
    space: dict[str, Any] = {}
    exec(compile(sections(page)[section], section, "exec"), space)
    found = [space[name] for name in names]
    return found if len(found) > 1 else found[0]


def draw(*shapes: Sequence[int]) -> list[Tensor]:
    """Leaves in float64."""
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def assert_alike(got: Any, expected: Any, leaves: Sequence[Tensor]) -> None:
    """Outputs agree, and so do the gradients of a random projection of all of them."""
    got, expected = ([x] if isinstance(x, Tensor) else list(x) for x in (got, expected))
    torch.testing.assert_close(got, expected)
    cotangents = [torch.randn(x.shape, dtype=x.dtype) for x in expected]
    options = {"materialize_grads": True}
    by_recipe, by_formula = (torch.autograd.grad(xs, leaves, cotangents, **options) for xs in (got, expected))
    torch.testing.assert_close(by_recipe, by_formula)
    assert all(x.any() for x in by_formula)
