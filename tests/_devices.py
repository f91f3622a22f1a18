"""`pytest --devices -m kernel`: on a CPU, tensors of the tests' device and of the host may not meet, as on a GPU.

There the fixture `device` is ``cpu:0``, which PyTorch takes for the CPU. Where a tensor is stands on it, and what an
operation returns is where its arguments are. Of some nothing is known, and they go anywhere: what functorch wraps,
what autograd or an operator of the package hands on, what comes from NumPy or out of a compiled graph.
"""

from collections.abc import Callable

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves

DEVICE, HOST = torch.device("cpu", 0), torch.device("cpu")
# What takes both; the result is where the first of them is.
COPIES = {
    "copy_",
    "__getitem__",
    "__setitem__",
    "__set__",
    "to",
    "type_as",
    "set_",
    "_has_compatible_shallow_copy_type",
    "_nested_view_from_jagged",
}
# Their lengths and sizes of batches are on the host.
RNNS = {"gru", "lstm", "rnn_tanh", "rnn_relu", "_pack_padded_sequence", "_pad_packed_sequence"}


def place(x: Tensor) -> torch.device | None:
    return x.__dict__.get("place")


class Devices(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__
        if torch._C._len_torch_dispatch_stack():  # a tracer, whose tensors know devices of their own
            return func(*args, **kwargs)
        if getattr(func, "__self__", None) is Tensor.device:
            return (place(args[0]) or DEVICE) if args[0].device == HOST else args[0].device
        result = func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in RNNS:
            given = [x for x in given if x.is_floating_point()]
        places = {place(x) for x in given if x.dim()} or {place(x) for x in given}
        if name == "numpy" and DEVICE in places:
            raise TypeError("numpy: a tensor of the device; use .cpu()")
        if {DEVICE, HOST} <= places and (name not in COPIES or (name == "__getitem__" and place(args[0]) == HOST)):
            raise RuntimeError(f"{name}: tensors of the device and tensors made without `device=`")
        to = kwargs.get("device")
        if name == "to":
            to = to or next((x for x in args[1:] if isinstance(x, torch.device | str)), None)
        if to is not None:
            after = {torch.device(to)}
        elif name == "cpu" or not given or (name in ("tensor", "as_tensor") and not isinstance(args[0], Tensor)):
            after = {HOST}
        elif name in ("to", "type_as", "__set__"):  # x.to(y); x.data = y
            after = {place(given[-1])}
        else:
            after = {place(given[0])} if name in COPIES or name.startswith("new_") else places
        if name in ("to", "cpu", "as_tensor") and any(result is x for x in given) and after != {place(result)}:
            result = result.clone()  # as it would be
        for x in tree_leaves(result) if name != "__set__" else given[:1]:
            if isinstance(x, Tensor) and (x.is_floating_point() or name not in RNNS):
                x.place = DEVICE if DEVICE in after else HOST if after == {HOST} else None
        return result


def without(call: Callable, check: Callable = lambda *args: None) -> Callable:
    """`call` outside the mode."""

    def called(*args, **kwargs):
        check(*args, *kwargs.values())
        if not torch._C._len_torch_function_stack():
            return call(*args, **kwargs)
        with _pop_mode_temporarily():
            return called(*args, **kwargs)

    return called


def separate(patch: pytest.MonkeyPatch) -> None:
    """From now on; modules of tests that are imported later are seen too."""
    from triton.runtime.interpreter import GridExecutor

    def launched(*args):
        assert not any(isinstance(x, Tensor) and place(x) == HOST for x in args), "a kernel got a tensor of the host"

    def parameter(cls, data=None, requires_grad=True):
        made = new(cls, data, requires_grad)
        made.place = HOST if data is None else place(data)
        return made

    new, compiler = torch.nn.Parameter.__new__, torch.compile
    patch.setattr(torch.nn.Parameter, "__new__", parameter)
    patch.setattr(GridExecutor, "__call__", without(GridExecutor.__call__, launched))
    for owner, name in ((torch.export, "export"), (torch.utils.checkpoint, "checkpoint")):  # which compare devices
        patch.setattr(owner, name, without(getattr(owner, name)))
    patch.setattr(torch, "compile", lambda *args, **kwargs: without(compiler(*args, **kwargs)))
    Devices().__enter__()
