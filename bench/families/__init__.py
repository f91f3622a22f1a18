"""What is timed and what is compiled, said once a family: a family is one file here, and its name in `FAMILIES`.

A file has `OP`, which `bench.run` times; `COMPILED`, the calls that `bench.compile_report` compiles; `BRIEF`, those
of them that have each kernel once, for a chip that is not told in full; `VARIED`, by the name of a setting the calls
of which `bench.variants` changes the lengths; and `elements`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from .compile_case import CompileCase, blocks
from .problem import Op

FAMILIES = (
    "location",
    "concat",
    "distance",
    "general",
    "graph",
    "hierarchical",
    "recurrent",
    "statistics",
    "aware",
    "target",
)

_files = {family: import_module(f".{family}", __name__) for family in FAMILIES}
REGISTRY: list[Op] = [file.OP for file in _files.values()]
CASES: dict[str, list[CompileCase]] = {family: file.COMPILED for family, file in _files.items()}
BRIEF: dict[str, list[CompileCase]] = {family: file.BRIEF for family, file in _files.items()}
SETTINGS: dict[str, list[CompileCase]] = {name: x for file in _files.values() for name, x in file.VARIED.items()}


def elements(kernel: str, constants: Mapping[str, Any]) -> int:
    """Elements of the score tile that one trip of the inner loop makes: rows by features, say.

    Of a kernel of no family, which merges parts, rows by features that it has blocks of.
    """
    file = _files.get(kernel.split("_")[1])
    return file.elements(kernel, constants) if file else blocks(constants, "T", "A")
