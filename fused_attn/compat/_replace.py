"""`replace_attention` and `restore_attention`: the class of a module is assigned, and nothing else of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from . import _peers
from ._replacement import CPU, Registry, Replacement, is_ours, on_cpu, why_not
from ._report import Replaced, Report, Skipped

Only = str | type


def replace_attention(
    model: nn.Module,
    *,
    only: Only | Sequence[Only] | None = None,
    strict: bool = False,
    cpu: Literal["faster", "always", "never"] = "faster",
) -> Report:
    """Let the attention modules of other libraries in a model run this package's ops.

    In place: a module's class becomes a subclass of its own with another `forward`. Parameters, buffers, hooks,
    state_dict and what an optimizer holds stay what they are; `restore_attention` undoes it. Only modules of exactly
    a known class are replaced, not those of subclasses; ``python -m fused_attn.compat --list`` shows the classes. A
    call that our op does not have runs the library's own forward, as on devices and for dtypes without kernel.

    Parameters
    ----------
    model
        Any module, also one of a known class itself.
    only
        What may be replaced: names as in ``model.named_modules()``, each with what is under it, and classes of the
        libraries. None: all.
    strict
        Raise, and replace nothing, if a module of a known class could not be replaced.
    cpu
        What runs where the input of a call is on a CPU. ``"faster"``: ours if it was measured to be at least as fast
        as the library's there, else the library's; ``"always"``: ours, which may be slower; ``"never"``: the
        library's.

    Returns
    -------
    Report
        What was replaced and what was skipped, with the reasons; it prints as a table.

    Raises
    ------
    TypeError
        For a `model` that is no module, and for other types in `only`.
    ValueError
        For another `cpu`, for a name or class in `only` that the model does not have, and with `strict`.

    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    if cpu not in CPU:
        raise ValueError(f"cpu: expected one of {', '.join(CPU)}; got {cpu!r}")
    report, found = Report(), []
    for name, module in _chosen(model, only):
        known = _known_of(module)
        if known is None:
            continue
        if isinstance(known, str):
            report.skipped.append(Skipped(name, _class_name(module), known))
            continue
        peer, ours = known
        found.append((module, ours))
        report.replaced.append(Replaced(name, peer, ours, on_cpu(ours, cpu)))
    if strict and report.skipped:
        raise ValueError(f"strict: expected all modules of known classes to be replaced; got\n{report}")
    for module, ours in found:
        module.__class__ = ours  # type: ignore[assignment]
        vars(module)["fused_attn_cpu"] = cpu
    return report


def restore_attention(model: nn.Module) -> None:
    """Give the modules that `replace_attention` replaced their own classes back.

    Raises
    ------
    TypeError
        For a `model` that is no module.

    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    for module in model.modules():
        kind = type(module)
        if is_ours(kind):
            module.__class__ = kind.peer()
            vars(module).pop("fused_attn_cpu", None)


def _known_of(module: nn.Module) -> tuple[type, type[Replacement]] | str | None:
    """(the class of the library, ours) of a module, or why it is not replaced, or None for other classes."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        names = {row.name for library in _peers.libraries() for row in _peers.known(library)}
        scripted = "it is scripted; replace it before torch.jit.script, or do without that"
        return scripted if _class_name(module) in names else None
    if is_ours(kind):
        return kind.peer(), kind
    classes = _registry_of(kind)
    base = next((x for x in kind.__mro__ if x in classes), None)
    if base is None:
        return None
    if base is not kind:
        return f"a subclass of {base.__name__}, whose forward may be another"
    ours, can_replace = classes[kind]
    return why_not(module) or can_replace(module) or (kind, ours)


def _registry_of(kind: type) -> Registry:
    """Of the libraries that a class and its bases are of."""
    there = {*_peers.libraries()}
    packages = {x.__module__.partition(".")[0] for x in kind.__mro__}
    return {peer: row for library in packages & there for peer, row in _peers.registry(library).items()}


def _class_name(module: nn.Module) -> str:
    return getattr(module, "original_name", type(module).__name__)


def _chosen(model: nn.Module, only: Only | Sequence[Only] | None) -> list[tuple[str, nn.Module]]:
    """The modules that `only` names, by name."""
    modules = list(model.named_modules())
    if only is None:
        return modules
    wanted = [only] if isinstance(only, str | type) else list(only)
    chosen: dict[str, nn.Module] = {}
    for entry in wanted:
        if not isinstance(entry, str | type):
            raise TypeError(f"only: expected names of modules and classes; got {type(entry).__name__}")
        if isinstance(entry, type):
            mine = [(name, x) for name, x in modules if type(x) is entry or _peer_of(x) is entry]
        else:
            mine = [(name, x) for name, x in modules if name == entry or name.startswith(f"{entry}.")]
        if not mine:
            shown = f"{entry!r}" if isinstance(entry, str) else f"the class {entry.__module__}.{entry.__name__}"
            raise ValueError(f"only: expected names and classes of modules in the model; got {shown}, which is none")
        chosen.update(mine)
    return [(name, x) for name, x in modules if name in chosen]


def _peer_of(module: nn.Module) -> type | None:
    kind = type(module)
    return kind.peer() if issubclass(kind, Replacement) else None
