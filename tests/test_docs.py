"""The README and the pages of docs/: their code runs, their links lead somewhere, the README stays short."""

import ast
import re
from pathlib import Path

import pytest
import torch

import fused_attn

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
]


@pytest.mark.whole
@pytest.mark.parametrize("code", BLOCKS)
def test_a_block_of_code_runs_by_itself(code):
    """A comment that begins with a shape, as ``# (2, 512)``, is that of the name to which the line assigns."""
    torch.manual_seed(0)
    space: dict[str, object] = {}
    for node in ast.parse(code).body:
        exec(compile(ast.Module([node], []), "block", "exec"), space)
        line = code.splitlines()[node.end_lineno - 1]
        shape = re.search(r"# \((\d+(?:, \d+)*)\)", line)
        if shape and isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = space[node.targets[0].id]
            assert value.shape == torch.Size(map(int, shape[1].split(", "))), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_public_function_has_a_page():
    text = "".join(page.read_text() for page in PAGES)
    assert [name for name in fused_attn.__all__ if name[0] != "_" and not re.search(rf"\b{name}\b", text)] == []
