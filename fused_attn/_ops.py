"""What surrounds every call: which implementation runs, autocast, export."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar, cast, get_args

import torch
from torch import Tensor

from ._operators import left_to_autograd
from .reference import segment_ids

Impl = Literal["auto", "triton", "reference"]
_IMPLS = get_args(Impl)
P = ParamSpec("P")
R = TypeVar("R")


def _triton_state() -> str:
    """'absent', 'gpu' (compiles for a device) or 'interpreter' (TRITON_INTERPRET=1 when it was imported)."""
    chip = sys.modules.get("fused_attn.kernels.chip")
    if chip is None:
        if importlib.util.find_spec("triton") is None:
            return "absent"
        chip = importlib.import_module("fused_attn.kernels.chip")
    return "interpreter" if chip.INTERPRET else "gpu"


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
        raise TypeError(f"impl: expected one of {', '.join(_IMPLS)}; got {type(impl).__name__}")
    if impl not in _IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(_IMPLS)}; got {impl!r}")
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


def keeps_exact(like: Tensor, *tensors: Tensor | None, state: bool = False) -> bool:
    """Whether a kernel leaves its 16-bit output in float32 too: for a state, or a gradient that may be asked for."""
    return like.dtype.itemsize == 2 and (state or may_ask(like, *tensors))


def may_ask(*tensors: Tensor | None) -> bool:
    """Whether somebody may ask for a gradient of one of these."""
    if not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return any(x is not None and x.requires_grad for x in tensors)


def forward_mode() -> bool:
    """Whether `torch.func.jvp` or what is made of it, or a level of dual numbers, surrounds the call.

    Then only the reference's formulas do, which have derivatives of every kind.
    """
    return torch.autograd.forward_ad._current_level >= 0


forward_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as above; it guards the level itself


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


def weights_from(
    scores: Tensor, lse: Tensor, *, dim: int = 0, offsets: Tensor | None = None, log: bool = False
) -> Tensor:
    """Softmax weights ``exp(scores - m) / l``, 0 where no key is visible; or their logarithms, -inf there.

    Parameters
    ----------
    scores
        Of the keys, along `dim`.
    lse
        (m, l), one a row: with an axis of 1 at `dim`, or with `offsets` one a segment. m is a constant to autograd:
        no weight depends on it.
    dim
        The axis of the keys.
    offsets
        Of packed keys, which are along the first axis.
    log
        ``scores - m - log l``, which is exact where a weight is too small for its dtype.

    """
    index = None if offsets is None else segment_ids(offsets, scores.shape[0])
    if forward_mode():
        return _weights(scores, lse, index, log)
    return cast("Tensor", _weights_of(scores, lse, index, dim, log))


def weights_of_rows(scores: Tensor, lse: Tensor, offsets: Tensor | None, *, log: bool = False) -> Tensor:
    """`weights_from` of ``scores (B, T, R)`` and ``lse (B, R, 2)``, or packed ``(N, R)`` and ``(S, R, 2)``."""
    if offsets is None:
        return weights_from(scores, lse[:, None], dim=1, log=log)
    return weights_from(scores, lse, offsets=offsets, log=log)


def _weights(scores: Tensor, lse: Tensor, index: Tensor | None, log: bool) -> Tensor:
    top, total = (lse if index is None else lse[index]).unbind(-1)
    ends = torch.finfo(top.dtype)  # a row that sees nothing has (-inf, 0)
    apart, total = scores - top.detach().clamp(min=ends.min), total.clamp(min=ends.tiny)
    return apart - total.log() if log else torch.exp(apart) / total


class _Weights(torch.autograd.Function):
    """`weights_from`, whose gradient is that of a softmax: a weight times what its cotangent has over the mean.

    By the formula's own derivative the weight times its cotangent would go to the scores, and their sum to l. Where
    one key has all the weight these are equal and large, and what is left of them is their rounding.

    That of a logarithm is its cotangent less the weight times the sum of all of them; what comes back to -inf is
    dropped.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, lse: Tensor, index: Tensor | None, dim: int, log: bool) -> Tensor:
        return _weights(scores, lse, index, log)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, lse, index, ctx.dim, ctx.log = inputs
        ctx.save_for_backward(lse, index, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        lse, index, weights = ctx.saved_tensors
        of_row = lse[..., 1]

        def total(x: Tensor) -> Tensor:
            if index is None:
                return x.sum(ctx.dim, keepdim=True)
            return torch.zeros_like(of_row, dtype=x.dtype).index_put((index,), x, accumulate=True)

        if ctx.log:
            grad = grad.masked_fill(weights == -torch.inf, 0)
            of_all = total(grad)
            d_scores = grad - weights.exp() * (of_all if index is None else of_all[index])
        else:
            mean = total(weights * grad)
            d_scores = weights * (grad - (mean if index is None else mean[index]))
        # 0 but for rounding: l is the sum of what the weights are of.
        d_total = -total(d_scores) / of_row.clamp(min=torch.finfo(of_row.dtype).tiny)
        return d_scores, torch.stack([torch.zeros_like(d_total), d_total], -1), None, None, None


_weights_of = left_to_autograd(_Weights)
