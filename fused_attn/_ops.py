"""What every family shares: which implementation runs, and raw operators that `vmap` and the compiler accept."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch._library.autograd import make_autograd_impl
from torch.utils import _pytree as pytree

Impl = Literal["auto", "triton", "reference"]
P = ParamSpec("P")
R = TypeVar("R")

_LIBRARY = torch.library.Library("fused_attn", "FRAGMENT")


def _triton_state() -> str:
    """'absent', 'gpu' (compiles for a device) or 'interpreter' (TRITON_INTERPRET=1 when it was imported)."""
    if importlib.util.find_spec("triton") is None:
        return "absent"
    return "interpreter" if importlib.import_module("fused_attn.kernels.chip").INTERPRET else "gpu"


# What torch.compiler.assume_constant_result sets; calling it would import torch._dynamo, a second, with this package.
_triton_state._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _unknown_chip(device: torch.device) -> str:
    """The name of the chip of `device` where the kernels were not made for it, else nothing."""
    if not torch.cuda.is_available():  # a fake tensor: what runs later is another machine's
        return ""
    chip = importlib.import_module("fused_attn.kernels.chip").chip_of(device)
    return "" if chip.supported else str(chip)


_unknown_chip._dynamo_marked_constant = True  # type: ignore[attr-defined]


def use_triton(impl: str, device: torch.device, unsupported: str | None) -> bool:
    """Whether this call runs the kernel.

    Parameters
    ----------
    impl
        ``"auto"``: the kernel on a GPU, PyTorch elsewhere, and for what the kernel does not support, as forward mode;
        also on GPUs that the kernels were not made for (`fused_attn.kernels.chip.Chip.supported`).
        ``"triton"`` and ``"reference"`` never fall back.
    device
        Where the tensors are.
    unsupported
        Why the kernel cannot take this call, or None.

    Raises
    ------
    ValueError
        For another `impl`, or where ``"triton"`` cannot run.
    NotImplementedError
        For ``"triton"`` in forward mode.

    """
    if not isinstance(impl, str):
        raise TypeError(f"impl: expected one of {', '.join(get_args(Impl))}; got {type(impl).__name__}")
    if impl not in get_args(Impl):
        raise ValueError(f"impl: expected one of {', '.join(get_args(Impl))}; got {impl!r}")
    if impl == "reference":
        return False
    if impl == "auto":
        known = device.type == "cuda" and unsupported is None and not forward_mode() and _triton_state() == "gpu"
        return known and not _unknown_chip(device)
    state = _triton_state()
    if state == "absent":
        raise ValueError("impl: 'triton' needs the package triton, which is not installed; use 'reference'")
    if device.type == "cpu" and state != "interpreter":
        raise ValueError(
            "impl: 'triton' got a CPU tensor; move it to a GPU, use impl='reference', or set "
            "TRITON_INTERPRET=1 before the first import to run the kernel in Triton's interpreter"
        )
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"impl: 'triton' expects CUDA or ROCm tensors; got device {device}")
    if unsupported is not None:
        raise ValueError(f"impl: 'triton' {unsupported}; use impl='auto' or 'reference'")
    if device.type == "cuda" and (chip := _unknown_chip(device)):
        raise ValueError(
            "impl: 'triton' expects an NVIDIA GPU from sm_80 on (Ampere) or an AMD Instinct from gfx90a on (MI200); "
            f"got {chip}; use impl='auto' or 'reference'"
        )
    if forward_mode():
        raise NotImplementedError(
            "impl: 'triton' has no forward mode (jvp, jacfwd, hessian, dual numbers); use impl='auto' or "
            "'reference', or reverse mode (grad, vjp, jacrev)"
        )
    return True


def forward_mode() -> bool:
    """Whether `torch.func.jvp` or what is made of it, or a level of dual numbers, surrounds the call.

    Then only the reference's formulas do, which have derivatives of every kind.
    """
    return torch.autograd.forward_ad._current_level >= 0


forward_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as above; it guards the level itself


def raw_op(name: str, schema: str, fn: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register ``fused_attn::name`` with a fake for the compiler and a loop for `vmap`, without autograd.

    The loop is exact whatever is batched: parameters (ensembles), inputs, or the gradients of a per-sample
    backward, where summing over a folded batch would lose the samples.

    Not by `torch.library.custom_op`, which imports torch._dynamo at the first call: 800 modules, a second.
    """

    def plain(*args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):  # inputs were cast before: see under_autocast
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
    refuse = make_autograd_impl(op, SimpleNamespace(_backward_fn=None, _setup_context_fn=None))

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


def raw_backward(
    name: str, schema: str, fn: Callable[..., Sequence[Tensor | None]], *, cotangents: int, gradients: int
) -> Any:
    """`raw_op` for a backward `fn`, which gives None for a gradient that is not needed: the op, an empty tensor.

    Its arguments are the `cotangents`, the inputs, of which the first `gradients` have gradients, and more, at the
    end which of these are needed. Gradients are contiguous, as the compiler is told. Their number is in the schema,
    since batched gradients (``is_grads_batched``) know no operator that returns a list.
    """

    def body(*args: Any) -> tuple[Tensor, ...]:
        return tuple(args[0].new_empty(0) if g is None else g.contiguous() for g in fn(*args))

    def fake(*args: Any) -> tuple[Tensor, ...]:
        inputs = args[cotangents : cotangents + gradients]
        return tuple(
            x.new_empty(x.shape) if need else args[0].new_empty(0) for x, need in zip(inputs, args[-1], strict=True)
        )

    return raw_op(name, f"{schema} -> ({', '.join(['Tensor'] * gradients)})", body, fake)


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


def exports_from_one(fn: Callable[P, R]) -> Callable[P, R]:
    """Let `torch.export` take any number of sequences, one too.

    Offsets say S + 1. Where the exporter asks whether their number less one is 1, as it does of every size that might
    broadcast, it would keep the answer of the example as a guard, S != 1, unless told to take sizes as they come.
    """

    @functools.wraps(fn)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
            with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
                return fn(*args, **kwargs)
        return fn(*args, **kwargs)

    return wrapped


_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}


def differentiable(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply``, for every function of the package.

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
    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]


def autocasts(device: str) -> bool:
    """Whether `torch.autocast` is on for a type of device; meta tensors compute nothing, and have none."""
    return device != "meta" and torch.is_autocast_enabled(device)


def under_autocast(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Under `torch.autocast` let an op have these arguments in its dtype, as `torch.nn.Linear` has them.

    Inside the op it is off: what the op widens stays wide. A function among the arguments has it on, as its author
    expects, and what it returns is cast too.
    """

    def decorate(fn: Callable[P, R]) -> Callable[P, R]:
        order = tuple(inspect.signature(fn).parameters)
        places = {order.index(name) for name in names}

        @functools.wraps(fn)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            first = args[0] if args else kwargs.get(order[0])
            if not isinstance(first, Tensor) or not autocasts(first.device.type):
                return fn(*args, **kwargs)
            device = first.device.type
            dtype = torch.get_autocast_dtype(device)
            given = [_cast(x, device, dtype) if i in places else x for i, x in enumerate(args)]
            more: Any = {name: _cast(x, device, dtype) if name in names else x for name, x in kwargs.items()}
            with torch.autocast(device, enabled=False):
                return fn(*given, **more)  # type: ignore[arg-type]

        return wrapped

    return decorate


def _cast(x: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(x, Tensor):
        return x.to(dtype) if x.dtype in (torch.float16, torch.bfloat16, torch.float32) else x
    if isinstance(x, tuple | list):
        items = (_cast(item, device, dtype) for item in x)
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    if not callable(x):
        return x

    def function(*args: Any) -> Any:
        with torch.autocast(device, dtype):
            return _cast(x(*args), device, dtype)

    return function


def second_order(
    formula: Callable[..., tuple[Tensor, ...]],
    primals: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Backward of a backward, through a reference formula that `torch.func.vjp` differentiates twice.

    Parameters
    ----------
    formula
        The reference forward, from all `primals` to a tuple of outputs.
    primals, cotangents
        Its inputs, and the gradients of its outputs that the first backward had.
    needs
        For which primals the first backward made a gradient.
    grads
        The gradients of those gradients, None where there is none.

    Returns
    -------
    (list, list)
        Gradients of the primals and of the cotangents, None where those are None.

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


def weights_from(scores: Tensor, lse: Tensor) -> Tensor:
    """Softmax weights ``exp(scores - m) / l``, 0 where no key is visible; `lse` is (m, l), and broadcasts but for it.

    m is a constant to autograd: no weight depends on it.
    """
    top, total = lse.unbind(-1)
    top = top.detach()
    return torch.exp(scores - top.masked_fill(top == -torch.inf, 0)) / total.masked_fill(total == 0, 1)
