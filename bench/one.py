"""One call, forward and backward, of a few cases: what a profiler or `compute-sanitizer` is put around.

Or of all cases of the benchmark in parts, so that as many processes compile their kernels into Triton's cache.

Prints the kernels that were launched, and at the end those of the package that were not.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_attn import location_attention

from .families.location import OP as LOCATION
from .families.problem import Case, Inputs, Op, Sizes
from .run import call_of, label, runner, select

# Together they launch every kernel, small too.
EVERY_KERNEL = (
    *(f"location/{name}/bfloat16" for name in ("gated-bag", "hops", "prefix", "context", "sequence-context")),
    "location/linear/float32",
    *(f"concat/{name}/bfloat16" for name in ("decoder", "ragged")),
    *(f"general/{name}/bfloat16" for name in ("shared", "dot-64")),
    *(f"statistics/{name}/bfloat16" for name in ("okabe", "okabe-recording", "ecapa", "ecapa-recording")),
    "graph/arxiv-edges/bfloat16",
    "hierarchical/han/bfloat16",
    "recurrent/entailment-100/bfloat16",
)


def small(case: Case) -> Sizes:
    """The case in small, with two of what is many; one long sequence stays long enough to be split."""
    few = {name: min(case.sizes[name], 2) for name in ("B", "S", "G", "H") if name in case.sizes}
    long = {"T": min(case.sizes["T"], 2048)} if few.get("B") == 1 and "T" in case.sizes else {}
    return {**case.capped(40), **few, **long}


def _with_context(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    inputs = LOCATION.inputs(sizes, dtype, device, seed)
    return {**inputs, "context": torch.randn(sizes["B"], sizes["A"], device=device).to(dtype)}


# A kernel of its own adds up the gradient of a context, which nothing that is timed has.
_SEQUENCE_CONTEXT = Case("sequence-context", {"B": 32, "T": 512, "D": 256, "A": 128})
CONTEXT = Op("location", _with_context, location_attention, LOCATION.cost, (_SEQUENCE_CONTEXT,))


def chosen(wanted: Sequence[str]) -> Iterator[tuple[Op, Case]]:
    """The cases for a GPU with these labels."""
    for op, case in [*select("cuda"), *((CONTEXT, case) for case in CONTEXT.cases)]:
        if label(op, case) in wanted:
            yield op, case


def part(which: int, of: int) -> Iterator[tuple[Op, Case, Sizes]]:
    """A part of the benchmark's cases for a GPU, counted from 0: each as it is timed and as it is checked."""
    for op, case in list(select("cuda"))[which::of]:
        yield op, case, case.sizes
        if case.check:
            yield op, case, {**case.sizes, **case.check}


def package_kernels() -> set[str]:
    """Names of the kernels of the package."""
    package = importlib.import_module("fused_attn.kernels")
    modules = [
        importlib.import_module(f"{package.__name__}.{x.name}") for x in pkgutil.iter_modules(package.__path__)
    ]
    return {name for module in modules for name in vars(module) if name.startswith("_") and name.endswith("_kernel")}


PRODUCTS = ("mm", "mv", "bmm", "addmm", "addmv", "baddbmm")


def host_products() -> torch.library.Library:
    """PyTorch's matrix products of a GPU on the CPU, for as long as what is returned lives.

    On sm_90 cuBLAS stores by TMA, which initcheck does not see: it takes the product for unwritten memory. It sees a
    copy from the host.
    """
    library = torch.library.Library("aten", "IMPL")
    for name in PRODUCTS:
        library.impl(name, partial(on_host, getattr(torch.ops.aten, name).default), "CUDA")
    return library


def on_host(op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """The operator on the CPU, its result where the first argument is."""
    result = op(*(x.cpu() if isinstance(x, Tensor) else x for x in args), **kwargs)
    return result.to(args[0].device)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases; 1 if one of them raised."""
    parser = argparse.ArgumentParser(prog="python -m bench.one", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", help="family/name/dtype; default: a few that launch every kernel")
    parser.add_argument("--small", action="store_true", help="a small problem of the same kind")
    parser.add_argument("--part", nargs=2, type=int, metavar=("I", "N"), help="the I-th, from 0, of N parts of all")
    parser.add_argument("--host-products", action="store_true", help="without cuBLAS, whose TMA initcheck can't see")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: in Triton's interpreter")
    args = parser.parse_args(argv)
    library = host_products() if args.host_products else None  # noqa: F841 — until the end
    device = torch.device(args.device)

    from triton import knobs

    cases = chosen(args.cases or EVERY_KERNEL)
    problems = ((op, case, small(case) if args.small else case.sizes) for op, case in cases)
    launched: set[str] = set()

    def note(metadata: Any) -> None:
        launched.add(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(note)
    status = 0
    try:
        for op, case, sizes in part(*args.part) if args.part else problems:
            before = set(launched)
            call = call_of(op, case, "fused", torch.device("cuda"))  # impl="triton", in the interpreter too
            try:
                inputs = op.inputs(sizes, case.dtype, device, 0)
                torch.manual_seed(0)
                dout = torch.randn_like(runner(call, inputs, "forward")()["out"])
                runner(call, inputs, "forward+backward", dout)()
                if device.type == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:  # the next case may still be right
                status = 1
                print(f"{label(op, case)}: FAILED: {type(error).__name__}: {error}"[:600], flush=True)
            print(f"{label(op, case)}: {' '.join(sorted(launched - before))}", flush=True)
    finally:
        knobs.runtime.launch_enter_hook.remove(note)
    print(f"{len(launched)} kernels launched; not: {' '.join(sorted(package_kernels() - launched)) or 'none'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
