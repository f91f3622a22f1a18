"""Operators that autograd, functorch, `vmap` and the compiler accept, each made from what a family says of itself."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch._library.autograd import make_autograd_impl
from torch.utils import _pytree as pytree

_LIBRARY = torch.library.Library("fused_attn", "FRAGMENT")


def raw_op(name: str, schema: str, fn: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register ``fused_attn::name`` with a fake for the compiler and a loop for `vmap`, without autograd.

    The loop is exact whatever is batched: parameters (ensembles), inputs, or the gradients of a per-sample
    backward, where summing over a folded batch would lose the samples.

    Not by `torch.library.custom_op`, which imports torch._dynamo at the first call: 800 modules, a second.
    """

    def plain(*args: Any) -> Any:
        with _without_autocast(args):
            return fn(*args)

    hidden = torch._disable_dynamo(plain)  # from the compiler, where there is one

    def body(*args: Any) -> Any:
        return hidden(*args) if "torch._dynamo" in sys.modules else plain(*args)

    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_attn::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.fused_attn, name).default

    # As custom_op has it, a result that should have had a gradient raises in the backward. But where none is asked
    # for, the body is not kept from using autograd itself, as `vjp` does.
    refuse = make_autograd_impl(op, types.SimpleNamespace(_backward_fn=None, _setup_context_fn=None))

    def autograd(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return refuse(keyset, *args)
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)

    def batched(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        leaves, spec = pytree.tree_flatten(args)
        dims = pytree.tree_flatten(in_dims)[0]

        def one(pick: Callable[[Tensor, int], Tensor]) -> Any:
            each = (x if dim is None else pick(x, dim) for x, dim in zip(leaves, dims, strict=True))
            return op(*pytree.tree_unflatten(each, spec))

        if info.batch_size == 0:  # the shapes of one sample, and none of it
            zero = one(lambda x, dim: x.new_zeros(x.shape[:dim] + x.shape[dim + 1 :]))
            empty = pytree.tree_map(lambda x: x.new_empty(0, *x.shape), zero)
            return empty, pytree.tree_map(lambda x: 0, empty)

        def sample(i: int) -> Any:
            return one(lambda x, dim: x.select(dim, i))

        outs = [pytree.tree_flatten(sample(i)) for i in range(info.batch_size)]
        stacked = [torch.stack(leaves) for leaves in zip(*(flat for flat, _ in outs), strict=True)]
        return pytree.tree_unflatten(stacked, outs[0][1]), pytree.tree_unflatten([0] * len(stacked), outs[0][1])

    torch.library.register_vmap(f"fused_attn::{name}", batched, lib=_LIBRARY)
    return op


def _without_autocast(args: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """For what was cast before: see `_ops.under_autocast`."""
    device = next(x for x in args if isinstance(x, Tensor)).device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


_FUNCTORCH = (
    "FuncTorchDynamicLayerFrontMode",
    "FuncTorchDynamicLayerBackMode",
    "FuncTorchGradWrapper",
    "ADInplaceOrView",
)


def vjp(
    fn: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Gradients of `inputs` by autograd, inside a raw operator: `torch.func.vjp` without its import of torch._dynamo.

    A cotangent of None is zero, and an input that no result depends on has a gradient of zero.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set()
    keys = torch._C.DispatchKey
    below = excluded.has(keys.AutogradCPU) or excluded.has(keys.AutogradFunctionality)
    if below or torch._C._are_functorch_transforms_active() or torch.is_inference_mode_enabled():
        # In a compiled graph there is no autograd but functorch's. A dispatch mode (the compiler has one at a graph's
        # first run, FlopCounterMode is another) has switched its dispatch keys off.
        for key in _FUNCTORCH:
            excluded = excluded.remove(getattr(keys, key))
        with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
            outs, pull, *_ = torch.func.vjp(fn, *inputs)
            pairs = zip(cotangents, outs, strict=True)
            return tuple(pull(tuple(torch.zeros_like(o) if c is None else c.to(o.dtype) for c, o in pairs)))
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        outs = fn(*leaves)
        known = [(o, c) for o, c in zip(outs, cotangents, strict=True) if c is not None and o.requires_grad]
        if not known:
            return tuple(torch.zeros_like(x) for x in leaves)
        start = _Cotangents.apply([c.to(o.dtype) for o, c in known], *(o for o, _ in known))
    return torch.autograd.grad(start, leaves, allow_unused=True, materialize_grads=True)


class _Cotangents(torch.autograd.Function):
    """A number whose gradient starts from these: given to `torch.autograd.grad` they would import SymPy."""

    @staticmethod
    def forward(ctx: Any, cotangents: list[Tensor], *outs: Tensor) -> Tensor:
        ctx.cotangents = cotangents
        return outs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return None, *ctx.cotangents


_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}


def left_to_autograd(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply``, which the compiler leaves as it is; for every function of the package.

    Dynamo would replace an autograd function by one of its own, whose backward has no derivative, and which `vmap`
    does not know. Then ``compile(func.grad(f))`` is zero where a captured tensor requires a gradient, and second
    derivatives are zero, without a word; one tensor in two arguments is refused. So Dynamo leaves these calls as they
    are to autograd and functorch, which take them apart as they do eagerly.
    """
    _FUNCTIONS[function.__name__] = function
    return functools.partial(_call, function.__name__)


def _call(name: str, *args: Any) -> Any:
    if torch.compiler.is_compiling():
        _leave_to_autograd()
    return _apply(name, *args)


def _leave_to_autograd() -> None:
    """At the time of tracing: before it, PyTorch's compiler need not be imported, which takes a second."""
    torch._dynamo.allow_in_graph(_apply)


_leave_to_autograd._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _apply(name: str, *args: Any) -> Any:
    """``Function.apply``; without functorch not its binding of the arguments, which costs more than all the rest."""
    function = _FUNCTIONS[name]
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    args = tuple([unwrap_if_dead(x) if x is not None and isinstance(x, Tensor) else x for x in args])
    asked = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
    if not asked and torch.autograd.forward_ad._current_level < 0:
        return function.forward(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def _is_eager(args: Sequence[Any]) -> bool:
    """Whether nobody watches a call's operators: no compiler, tracer, transform, dispatch mode, subclass or profiler.

    Then the dispatcher, which costs as much of the host's time as a launch, would only lead to the operator's body.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    for x in args:
        if x is not None and isinstance(x, Tensor) and (type(x) not in _PLAIN or x.is_meta or _is_batched(x)):
            return False
    return True


_PLAIN = (Tensor, torch.nn.Parameter)
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # as `is_grads_batched=True` makes them: no functorch level


@functools.cache
def launcher(path: str) -> Callable[..., Any]:
    """The launcher ``module.function`` of `fused_attn.kernels`, imported at its first call: Triton may be absent."""
    module, name = path.split(".")
    full = f"fused_attn.kernels.{module}"

    def launch(*args: Any) -> Any:
        function = getattr(sys.modules.get(full) or importlib.import_module(full), name)
        return sys.modules["fused_attn.kernels.replay"].call(function, args)

    return launch


def exact_of(out: Tensor, exact: Tensor) -> Tensor:
    """The output in float32 where it was made (see `_ops.keeps_exact`), else as it is."""
    return exact if exact.numel() else out


_KINDS = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    bool: "bool",
    float: "float",
    int | None: "int?",
}


def _kinds(inputs: type[Any]) -> dict[str, str]:
    """The fields of a class of inputs, and what a schema calls their types."""
    return {name: _KINDS[kind] for name, kind in typing.get_type_hints(inputs).items()}


class Operator:
    """A differentiable operator: its results, their gradients and the gradients of those, in every composition.

    Two raw operators are made, ``fused_attn::<name>_fwd`` and ``fused_attn::<name>_bwd``, and two autograd functions
    over them. The backward of the second is that of the formula.

    Parameters
    ----------
    name
        Of the raw operators.
    inputs
        The class of what it takes, tensors and then options: see `fused_attn.kernels.inputs`.
    differentiable
        Names of the tensors that have gradients, the first ones.
    choices
        What does not concern the formula, as a schema says it: ``"bool in_blocks"``.
    results
        Names of the results, which are all differentiable. ``name?choice`` is made where that choice is True; else it
        is of size 0. ``exact`` is ``out``, the first, in float32: its gradient is one of that.
    saved
        Names of the results that the backward takes.
    dense
        So many of the first results, saved ones, have a gradient of zeros where they have none.
    forward
        ``(inputs, *choices) -> results``.
    backward
        ``(inputs, *saved, *gradients of the results, *choices, needs) -> gradients``, one a differentiable tensor, or
        None for one that is not needed; needs: a bool for each.
    fake
        As `forward`, of tensors that have shapes and no numbers.
    formula
        ``inputs -> results`` in plain PyTorch; it may know more than the operator.
    lean
        The same, where no result that a choice is for has a gradient; it need not make these.

    """

    def __init__(
        self,
        name: str,
        inputs: type[Any],
        *,
        differentiable: str,
        results: str,
        saved: str,
        choices: str = "",
        dense: int = 1,
        forward: Callable[..., tuple[Tensor, ...]],
        backward: Callable[..., Sequence[Tensor | None]],
        fake: Callable[..., tuple[Tensor, ...]],
        formula: Callable[..., tuple[Tensor, ...]],
        lean: Callable[..., tuple[Tensor, ...]] | None = None,
    ) -> None:
        kinds = _kinds(inputs)
        tensors = [x for x, kind in kinds.items() if kind.startswith("Tensor")]
        made, conditions = zip(*([*x.split("?"), ""][:2] for x in results.split()), strict=True)
        self.name, self.inputs, self.dense, self.formula = name, inputs, dense, formula
        self.lean = lean or formula
        self.tensors, self.gradients, self.results = len(tensors), len(differentiable.split()), len(made)
        self.options = len(kinds) - len(tensors)
        self.saved = [made.index(x) for x in saved.split()]
        chosen = [x.split()[1] for x in choices.split(", ") if x]
        self.optional = {i: self.options + chosen.index(x) for i, x in enumerate(conditions) if x}
        self.exact = made.index("exact") if made[0] == "out" and "exact" in made else None
        cotangents = [f"Tensor{'?' * (i >= dense or i in self.optional)} d{x}" for i, x in enumerate(made)]
        fields = [f"{kind} {x}" for x, kind in kinds.items()]
        kept, more = [f"Tensor {x}" for x in saved.split()], [choices] if choices else []

        def out(count: int) -> str:
            return f"({', '.join(['Tensor'] * count)})"

        def results_of(run: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
            return lambda *args: run(inputs(*args[: len(kinds)]), *args[len(kinds) :])

        def gradients(*args: Any) -> tuple[Tensor | None, ...]:
            """Contiguous, as the compiler is told; no list, which batched gradients do not know."""
            given, tensors, saved, options, rest = self.parted(args)
            grads = backward(inputs(*tensors, *options), *saved, *given, *rest)
            return tuple(g if g is None else g.contiguous() for g in grads)

        def all_gradients(*args: Any) -> tuple[Tensor, ...]:
            """The same, where it may not be None."""
            return tuple(args[self.results].new_empty(0) if g is None else g for g in gradients(*args))

        def fake_gradients(*args: Any) -> tuple[Tensor, ...]:
            pairs = zip(args[self.results : self.results + self.gradients], args[-1], strict=True)
            return tuple(x.new_empty(x.shape) if need else args[self.results].new_empty(0) for x, need in pairs)

        given = ", ".join(fields + more)
        self._run = results_of(forward), gradients
        ends = 0, *itertools.accumulate((self.results, self.tensors, len(self.saved), self.options)), None
        self._parts = [slice(*ends_of) for ends_of in itertools.pairwise(ends)]
        self.fwd = raw_op(f"{name}_fwd", f"({given}) -> {out(self.results)}", results_of(forward), results_of(fake))
        given = ", ".join(
            [*cotangents, *fields[: self.tensors], *kept, *fields[self.tensors :], *more, "bool[] needs"]
        )
        self.bwd = raw_op(f"{name}_bwd", f"({given}) -> {out(self.gradients)}", all_gradients, fake_gradients)
        title = name.title().replace("_", "")
        self._apply = left_to_autograd(types.new_class(title, (_Forward,)))
        self._backward = left_to_autograd(types.new_class(f"{title}Gradients", (_Backward,)))
        _OPERATORS[name] = self

    def __call__(self, inputs: Any, *choices: Any) -> tuple[Tensor, ...]:
        """The results."""
        return self._apply(self.name, *inputs, *choices)

    def run(self, which: int, args: Sequence[Any]) -> tuple[Tensor | None, ...]:
        """A raw operator, the forward (0) or the backward (1), or where nobody watches its body alone.

        A gradient that is not needed is empty, or None.
        """
        if not _is_eager(args):
            return cast("tuple[Tensor, ...]", (self.fwd, self.bwd)[which](*args))
        with _without_autocast(args):
            return self._run[which](*args)

    def backward(
        self, inputs: Any, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None], *rest: Any
    ) -> tuple[Tensor, ...]:
        """The gradients, for choices and needs in `rest`."""
        tensors, options = inputs[: self.tensors], inputs[self.tensors :]
        return self._backward(self.name, *cotangents, *tensors, *saved, *options, *rest)

    def parted(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """What the raw backward takes: gradients of results, tensors, results, options, choices and needs."""
        return tuple([args[part] for part in self._parts])


_OPERATORS: dict[str, Operator] = {}  # by name: the compiler reaches neither a closure nor an object in arguments


class _Forward(torch.autograd.Function):
    """The results of an operator, which the first argument names."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, *args: Any) -> Any:
        return _OPERATORS[name].run(0, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operator, *args = inputs  # not `ctx.name`, a method of the node, which anomaly mode calls
        op = _OPERATORS[ctx.operator]
        ctx.save_for_backward(*args[: op.tensors], *(output[i] for i in op.saved))
        ctx.options = args[op.tensors :]  # and choices
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        op = _OPERATORS[ctx.operator]
        saved = ctx.saved_tensors  # once: activation checkpointing recomputes them at each look
        needs = ctx.needs_input_grad[1 : 1 + op.gradients]
        starts = list(cotangents)
        for i in range(op.dense):
            starts[i] = torch.zeros_like(saved[op.tensors + i]) if starts[i] is None else starts[i]
        for i, option in op.optional.items():
            starts[i] = starts[i] if ctx.options[option] else None
        if op.exact is not None and (wide := starts[op.exact]) is not None:
            wide, starts[op.exact] = wide.to(saved[op.tensors].dtype), None
            starts[0] = wide if starts[0] is None else starts[0] + wide
        grads = op._backward(op.name, *starts, *saved, *ctx.options, needs)
        none = [None] * (len(ctx.needs_input_grad) - 1 - op.gradients)
        return (None, *(g if need else None for g, need in zip(grads, needs, strict=True)), *none)


class _Backward(torch.autograd.Function):
    """The gradients of an operator, which the first argument names; their own are those of its formula."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, *args: Any) -> Any:
        *args, needs = args  # type: ignore[assignment]
        return _OPERATORS[name].run(1, (*args, list(needs)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operator, *args, ctx.needs = inputs
        op = _OPERATORS[ctx.operator]
        cotangents, tensors, _, ctx.options, _ = op.parted(args)
        ctx.save_for_backward(*cotangents, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        op = _OPERATORS[ctx.operator]
        saved = ctx.saved_tensors
        cotangents, tensors = saved[: op.results], saved[op.results :]
        primals, constant = tensors[: op.gradients], tensors[op.gradients :]
        formula = op.formula if any(cotangents[i] is not None for i in op.optional) else op.lean
        d_primals, d_cotangents = _second_order(
            lambda *p: formula(op.inputs(*p, *constant, *ctx.options)), primals, cotangents, ctx.needs, grads
        )
        none = [None] * (len(ctx.needs_input_grad) - 1 - op.results - op.gradients)
        return (None, *d_cotangents, *d_primals, *none)


def _second_order(
    formula: Callable[..., tuple[Tensor, ...]],
    primals: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Backward of a backward, through a formula that `torch.func.vjp` differentiates twice.

    needs: for which of the `primals` the first backward made a gradient, from the `cotangents` of the results. grads:
    the gradients of those gradients. Gives those of the primals and of the cotangents; None where there is none.
    """
    at = [i for i, x in enumerate(primals) if x is not None]
    wanted = [i for i in at if needs[i] and grads[i] is not None]
    seen = [j for j, c in enumerate(cotangents) if c is not None]
    d_primals: list[Tensor | None] = [None] * len(primals)
    d_cotangents: list[Tensor | None] = [None] * len(cotangents)
    if not wanted or not seen:
        return d_primals, d_cotangents

    def first_order(live: list[Any], cots: list[Any]) -> Any:
        full = dict(zip(at, live, strict=True))

        def outputs(*xs: Tensor) -> list[Tensor]:
            named = {**full, **dict(zip(wanted, xs, strict=True))}
            outs = formula(*(named.get(i) for i in range(len(primals))))
            return [outs[j] for j in seen]

        outs, pull, *_ = torch.func.vjp(outputs, *(full[i] for i in wanted))
        return pull([c.to(o.dtype) for c, o in zip(cots, outs, strict=True)])

    live, cots = [primals[i] for i in at], [cotangents[j] for j in seen]
    _, pull, *_ = torch.func.vjp(first_order, live, cots)
    from_primals, from_cots = pull(tuple(grads[i] for i in wanted))
    for i, g in zip(at, from_primals, strict=True):
        d_primals[i] = g
    for j, g in zip(seen, from_cots, strict=True):
        d_cotangents[j] = g
    return d_primals, d_cotangents
