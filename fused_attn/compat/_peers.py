"""Which libraries there are files of, and what is in them."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path
from typing import NamedTuple

from ._replacement import Registry


class Known(NamedTuple):
    """A class of a peer file, as its source says it."""

    library: str
    name: str
    what: str
    """The first line of its docstring."""


def _folders() -> list[str]:
    return list(importlib.import_module(__package__).__path__)


def libraries() -> list[str]:
    """The packages that there are files of, by the names that they are imported by."""
    return sorted(found.name for found in pkgutil.iter_modules(_folders()) if not found.name.startswith("_"))


def registry(library: str) -> Registry:
    """Of a library, whose file and so the library itself are imported."""
    return importlib.import_module(f"{__package__}.{library}").REGISTRY


def known(library: str) -> list[Known]:
    """The classes of a library's file, read in its source: the library need not be installed."""
    source = next(path for folder in _folders() if (path := Path(folder) / f"{library}.py").exists())
    classes = [node for node in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    return [
        Known(library, node.name, (ast.get_docstring(node) or "").partition("\n")[0])
        for node in classes
        if any(isinstance(base, ast.Name) and base.id == "Replacement" for base in node.bases)
    ]
