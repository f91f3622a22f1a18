"""Mutants by operators on the syntax tree, and the tests of each file."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from pathlib import Path

from mutant import Mutant


def _tests(names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_{name}.py" for name in names.split())


_PAIRS = "pairs pairs_structure pairs_dropout pairs_weights pairs_hidden pairs_layouts pairs_wide"
_LAST = "inputs no_host_wait variants compositions"  # of every family, and slow to see what its own tests see
TESTS = {
    "_checks": _tests("errors inputs location_aware inputs_drawn"),
    "_habits": _tests("inputs"),
    "_ops": _tests("location_reference inputs chips compositions"),
    "_operators": _tests("compositions inputs"),
    "reference": _tests(
        "location_reference pairs_reference three_families location_numbers general "
        "location_dropout hierarchical statistics word_by_word graph location_window "
        f"{_PAIRS} location_hidden concat_structure concat_exactness"
    ),
    "_ragged_rnn": _tests("hierarchical_module location_hidden compositions_sizes compositions"),
    "location_window": _tests(
        f"location_window location_window_memory location_numbers location_layouts location_hidden {_LAST}"
    ),
    "blocked/location": _tests("location_window location_numbers location_layouts location_hidden compositions"),
    "location_aware": _tests(f"location_aware location_aware_sequence three_families {_LAST}"),
    "location": _tests(
        "modules location location_structure location_dropout location_numbers location_layouts "
        "location_hidden errors location_memory location_window "
        f"hierarchical {_LAST}"
    ),
    "concat": _tests(
        "concat_cotangents concat concat_structure concat_exactness concat_one_query "
        f"concat_blocked {_PAIRS} errors concat_memory {_LAST}"
    ),
    "general": _tests(f"general general_structure general_sdpa errors {_PAIRS} {_LAST}"),
    "hierarchical": _tests(
        "hierarchical hierarchical_structure hierarchical_module errors location_numbers "
        f"location_layouts location_hidden location_memory {_LAST}"
    ),
    "recurrent": _tests(f"word_by_word three_families {_LAST}"),
    "statistics": _tests(f"statistics three_families errors {_LAST}"),
    "target": _tests(f"target three_families errors {_LAST}"),
    "graph": _tests(f"graph three_families errors {_LAST}"),
    "": _tests(
        "softmax location concat_structure general graph statistics location_dropout location_window "
        "location_structure"
    ),
}
"""The tests of a file by a part of its name, the first that it has; those that fail soonest come first."""

_SPEED = {"blocks_of", "fits", "hop_block", "product_warps", "widths", "_rows_per_item", "_item_bytes", "_splits"}
_SPEED |= {"_channels", "all_registers", "assume", "chunk", "splits", "v_splits"}
_SPEED |= {"WORKSPACE_BYTES", "GROUP", "PART", "SEGMENTS", "SHORT", "CHUNK", "WIDE"}

_OPERATORS = {  # how each is written, and what it becomes
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.FloorDiv: ("//", "*"),
    ast.BitAnd: ("&", "|"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}


def tests_of(path: Path) -> tuple[str, ...]:
    """The tests that should see a change of the file."""
    return next(tests for part, tests in TESTS.items() if part in path.as_posix())


def _speed_only(node: ast.AST) -> bool:
    """Whether all of a node is a choice of block sizes or of how to launch: another one is as right."""
    if isinstance(node, ast.FunctionDef):
        return node.name.endswith("blocks") or node.name in _SPEED
    if isinstance(node, ast.Assign):
        return any(isinstance(x, ast.Name) and (x.id in _SPEED or x.id.startswith("block")) for x in node.targets)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in ("Blocks", "pow2", "even")
    return isinstance(node, ast.keyword) and str(node.arg).startswith(("num_", "BLOCK_"))


def _changes(source: str) -> Iterator[tuple[int, str, str, str]]:
    """(place, text there, new text, why) of each change that an operator makes."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def visit(node: ast.AST) -> Iterator[tuple[int, str, str, str]]:
        if _speed_only(node):
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
        skipped: list[ast.AST] = [*getattr(node, "decorator_list", [])]
        if isinstance(node, ast.FunctionDef):
            skipped.append(node.args)  # annotations and defaults
        if isinstance(node, ast.Dict):
            names = (getattr(key, "value", None) for key in node.keys)
            skipped += [x for name, x in zip(names, node.values, strict=True) if str(name).startswith("num_")]
        for child in ast.iter_child_nodes(node):
            if child in skipped:
                continue
            yield from visit(child)

    yield from visit(ast.parse(source))


def draw(root: Path, count: int, seed: int) -> list[Mutant]:
    """That many changes of the kernels and the families' Python, each line at most once."""
    skip = ("__init__.py", "chip.py")
    folders = ("kernels", "fused_attn", "fused_attn/blocked", "fused_attn/modules")
    files = [p for folder in folders for p in sorted((root / folder).glob("*.py"))]
    found: dict[tuple[str, int], list[Mutant]] = {}
    for path in files:
        if path.name in skip:
            continue
        source, name = path.read_text(), str(path.relative_to(root))
        for place, old, new, why in _changes(source):
            line = source.encode()[:place].count(b"\n") + 1
            mutant = Mutant(name, old, new, tests_of(Path(name)), f"line {line}: {why}", at=place)
            found.setdefault((name, line), []).append(mutant)
    chosen = random.Random(seed)
    lines = chosen.sample(sorted(found), min(count, len(found)))
    return [chosen.choice(found[line]) for line in lines]
