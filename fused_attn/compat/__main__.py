"""What `replace_attention` would replace in a model: `python -m fused_attn.compat MODULE:FACTORY`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from torch import nn

from . import _peers
from ._replace import replace_attention
from ._report import aligned


def listed() -> str:
    """The libraries and their classes, a line each."""
    rows = [row for library in _peers.libraries() for row in _peers.known(library)]
    return aligned(("library", "class", "what runs"), rows)


def make(text: str) -> nn.Module:
    """The model that ``MODULE:FACTORY`` makes; ValueError, in the caller's words, where it makes none."""
    name, _, factory = text.partition(":")
    if not (name and factory):
        raise ValueError(f"expected MODULE:FACTORY, as my_package.models:make_model; got {text!r}")
    try:
        made = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{text}: cannot import {name}: {error}") from error
    for part in factory.split("."):
        if not hasattr(made, part):
            raise ValueError(f"{text}: {getattr(made, '__name__', made)} has no {part!r}")
        made = getattr(made, part)
    if not isinstance(made, nn.Module) and callable(made):
        made = made()
    if not isinstance(made, nn.Module):
        raise ValueError(f"{text}: expected a torch.nn.Module or what makes one without arguments; got {type(made)}")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fused_attn.compat", description=__doc__)
    parser.add_argument("model", nargs="?", metavar="MODULE:FACTORY", help="a module, or what makes one when called")
    parser.add_argument("--list", action="store_true", help="the libraries and classes that are known")
    args = parser.parse_args(arguments)
    if args.list == (args.model is not None):
        parser.error("expected MODULE:FACTORY or --list")
    if args.list:
        print(listed())
        return 0
    sys.path.insert(0, "")  # modules of the folder that one is in, however this was started
    try:
        print(replace_attention(make(args.model)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
