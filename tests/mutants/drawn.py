"""Mutants by operators on the syntax tree, and the tests of each file."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from pathlib import Path

from mutant import Mutant

TESTS = {
    "location_window": ("tests/test_location_window.py", "tests/test_location_window_memory.py"),
    "location": (
        "tests/test_location.py", "tests/test_location_structure.py", "tests/test_location_errors.py",
        "tests/test_location_dropout.py", "tests/test_location_compose.py",
    ),
    "concat": (
        "tests/test_concat.py", "tests/test_concat_structure.py", "tests/test_concat_errors.py",
        "tests/test_concat_cotangents.py", "tests/test_concat_exactness.py", "tests/test_concat_blocked.py",
        "tests/test_concat_dropout.py", "tests/test_concat_one_query.py", "tests/test_concat_compose.py",
    ),
    "general": (
        "tests/test_general.py", "tests/test_general_structure.py", "tests/test_general_errors.py",
        "tests/test_general_sdpa.py", "tests/test_general_compose.py",
    ),
    "hierarchical": (
        "tests/test_hierarchical.py", "tests/test_hierarchical_structure.py", "tests/test_hierarchical_errors.py",
        "tests/test_hierarchical_compose.py",
    ),
    "recurrent": ("tests/test_word_by_word.py", "tests/test_location_aware.py", "tests/test_word_by_word_compose.py"),
    "statistics": ("tests/test_statistics.py", "tests/test_statistics_errors.py", "tests/test_statistics_compose.py"),
    "graph": ("tests/test_graph.py", "tests/test_graph_errors.py", "tests/test_graph_compose.py"),
}  # fmt: skip
"""The tests of a family, those that fail soonest first. A file is of the first family that its name has."""

SHARED = ("tests/test_location.py", "tests/test_concat_structure.py", "tests/test_general.py", "tests/test_graph.py")
"""For files that all families use."""

_OPERATORS = {  # how each is written, and what it becomes
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.FloorDiv: ("//", "*"), ast.BitAnd: ("&", "|"),
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}  # fmt: skip


def tests_of(path: Path) -> tuple[str, ...]:
    """The tests that should see a change of the file."""
    return next((tests for family, tests in TESTS.items() if family in path.name), SHARED)


def _speed_only(name: str) -> bool:
    """Whether a function chooses block sizes: another choice is as right."""
    return name.endswith("blocks") or name in ("blocks_of", "fits", "_rows_per_item", "all_registers", "assume")


def _changes(source: str) -> Iterator[tuple[int, str, str, str]]:
    """(place, text there, new text, why) of each change that an operator makes."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def visit(node: ast.AST) -> Iterator[tuple[int, str, str, str]]:
        if isinstance(node, ast.FunctionDef) and _speed_only(node.name):
            return
        if isinstance(node, (ast.AnnAssign, ast.Raise, ast.Assert, ast.JoinedStr)):
            return
        pairs: list[tuple[ast.expr, ast.AST, ast.expr]] = []
        if isinstance(node, ast.BinOp):
            pairs = [(node.left, node.op, node.right)]
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            pairs = [(node.left, node.ops[0], node.comparators[0])]
        elif isinstance(node, ast.BoolOp):
            pairs = [(node.values[0], node.op, node.values[1])]
        for left, op, right in pairs:
            if type(op) in _OPERATORS:
                sign, other = _OPERATORS[type(op)]
                lo = starts[left.end_lineno - 1] + left.end_col_offset
                hi = starts[right.lineno - 1] + right.col_offset
                between = source.encode()[lo:hi].decode()
                if sign in between and "\n" not in between:
                    yield lo, between, between.replace(sign, other), f"{sign} becomes {other}"
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
            token = {ast.Not: "not ", ast.USub: "-", ast.Invert: "~"}[type(node.op)]
            yield starts[node.lineno - 1] + node.col_offset, token, "", f"{token.strip()} is dropped"
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 8:
            lo = starts[node.lineno - 1] + node.col_offset
            yield lo, str(node.value), str(node.value + 1), f"{node.value} becomes {node.value + 1}"
        arguments = node.args if isinstance(node, ast.FunctionDef) else None
        for child in ast.iter_child_nodes(node):
            if child is arguments or child in getattr(node, "decorator_list", []):
                continue  # annotations and defaults
            yield from visit(child)

    yield from visit(ast.parse(source))


def draw(root: Path, count: int, seed: int) -> list[Mutant]:
    """That many changes of the kernels and the families' Python, each line at most once."""
    skip = ("__init__.py", "chip.py")
    files = [
        p for folder in ("kernels", "fused_attn", "fused_attn/modules") for p in sorted((root / folder).glob("*.py"))
    ]
    found: dict[tuple[str, int], list[Mutant]] = {}
    for path in files:
        if path.name in skip:
            continue
        source, name = path.read_text(), str(path.relative_to(root))
        for place, old, new, why in _changes(source):
            line = source.encode()[:place].count(b"\n") + 1
            mutant = Mutant(name, old, new, tests_of(path), f"line {line}: {why}", at=place)
            found.setdefault((name, line), []).append(mutant)
    chosen = random.Random(seed)
    lines = chosen.sample(sorted(found), min(count, len(found)))
    return [chosen.choice(found[line]) for line in lines]
