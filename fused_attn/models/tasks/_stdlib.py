"""Text that ships with Python: the docstrings of its standard library. They differ between Python versions."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

SKIPPED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"}


class Docstring(NamedTuple):
    """Cleaned text, and where it is from."""

    top: str  # the top-level module or package
    module: str  # the file, relative to the library
    text: str


def docstrings_in(top: str, module: str, source: bytes) -> Iterator[Docstring]:
    """All docstrings of a module: its own, and those of classes and functions, in the order of `ast.walk`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            text = ast.get_docstring(node)
            if text:
                yield Docstring(top, module, text)


@cache
def docstrings() -> tuple[Docstring, ...]:
    """All docstrings of the library, without its tests: a few seconds."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [path.relative_to(library) for path in sorted(library.rglob("*.py"))]
    return tuple(
        docstring
        for path in paths
        if not SKIPPED & set(path.parts)
        for docstring in docstrings_in(path.parts[0].removesuffix(".py"), str(path), (library / path).read_bytes())
    )
