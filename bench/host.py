"""What a call does before the GPU begins: kernels that are started, and time of the host, counted with no GPU.

    python -m bench.host [--target sm_90] [--row TEXT] [--kernels] [--json]

The package's own calls run on small tensors of the CPU up to the driver, which is not called: a launch does all that
Triton does for one, and then nothing. PyTorch's kernels are those of its operators that would start one on a GPU.
The time is the processor's, the least of `REPEATS` calls, beside that of `scaled_dot_product_attention` in the same
run. What the rows may cost is in budgets.toml.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

from . import compile_report  # before the kernels, which are then not the interpreter's

# isort: split

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime.jit import JITFunction

from fused_attn import (
    Graph,
    Score,
    Segments,
    concat_attention,
    general_attention,
    graph_attention,
    hierarchical_attention,
    location_attention,
    location_aware_attention,
    location_aware_sequence,
    statistics_pooling,
    target_attention,
    word_by_word_attention,
)

REPEATS = 60

# What PyTorch's operators start on a GPU, one kernel where nothing is said: room, views and questions start none.
STARTS = {
    **dict.fromkeys(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"), 0),
    **dict.fromkeys(
        ("view", "_unsafe_view", "as_strided", "expand", "select", "slice", "split", "unbind", "alias"), 0
    ),
    **dict.fromkeys(("squeeze", "unsqueeze", "permute", "transpose", "t", "detach", "diagonal", "lift_fresh"), 0),
    **dict.fromkeys(("unfold", "promote_types"), 0),
    **dict.fromkeys(
        ("masked_fill", "constant_pad_nd", "index_put", "scatter_add", "slice_backward"), 2
    ),  # a copy first
}


def _alike(x: Tensor, y: Any) -> bool:
    """Whether x is what was given, and not written to."""
    return isinstance(y, Tensor) and x._version == y._version and x.data_ptr() == y.data_ptr() and x.dtype == y.dtype


class _Operators(TorchDispatchMode):
    """Names of PyTorch's operators, those inside the package's own among them, as often as they start a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fused_attn":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        written = name.endswith("_")
        same = not written and isinstance(result, Tensor) and any(_alike(result, x) for x in args[:1])  # a `to`, say
        nothing = isinstance(result, Tensor) and result.numel() == 0
        self.started += [] if same or nothing else [name] * STARTS.get(name, 1)
        return result


class _Launched(CudaLauncher):
    """A compiled kernel and its launcher, which does all that is done in Python before the driver is called."""

    function = packed_metadata = None
    num_ctas, global_scratch_size, global_scratch_align, profile_scratch_size, profile_scratch_align = 1, 0, 1, 0, 1
    launch_cooperative_grid = launch_pdl = False

    def __init__(self, name: str, count: Counter[str]) -> None:
        self.name, self.count = name, count

    def launch_metadata(self, *args: Any) -> None:
        """As a compiled kernel where nobody listens."""

    @property
    def run(self) -> Any:
        """What launches it."""
        return self

    def launch(self, *args: Any) -> None:
        """In the place of the driver's call."""
        self.count[self.name.strip("_").removesuffix("_kernel")] += 1


@contextlib.contextmanager
def no_driver(target: str) -> Iterator[Counter[str]]:
    """Inside, kernels are launched on tensors of the CPU and nothing runs; gives how often each was."""
    count: Counter[str] = Counter()

    def no_compiler(self: JITFunction, key: str, *args: Any) -> _Launched:
        cache = self.device_caches[compile_report.driver.active.get_current_device()][0]
        cache[key] = _Launched(self.fn.__name__, count)
        return cache[key]

    with (
        compile_report.as_on_a_gpu(),
        patch.object(JITFunction, "_do_compile", no_compiler),
        compile_report.launches(target, JITFunction.run, device=-1),
    ):
        yield count


def _normal(*shape: int, grad: bool = True, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_(grad)


B, T, D, A = 2, 2048, 64, 32
"""Few long sequences, so that the kernels that divide the keys do."""


def _score(*inner: int) -> dict[str, Tensor]:
    return {"w": _normal(D, A), "b": _normal(A), "v": _normal(A, *inner)}


def _segments(length: int, count: int = 2) -> Segments:
    return Segments.from_lengths(torch.tensor([length] * count))


def _location(**options: Any) -> Callable[..., Any]:
    return partial(location_attention, _normal(B, T, D), **_score(), mask=torch.rand(B, T) > 0.1, **options)


def _ragged() -> Callable[..., Any]:
    return partial(location_attention, _normal(B * T, D), **_score(), cu_seqlens=_segments(T))


def _pairs(op: Callable[..., Any], Tq: int, **more: Any) -> Callable[..., Any]:
    return partial(op, _normal(B, Tq, D), _normal(B, T, D), _normal(B, T, D), mask=torch.rand(B, T) > 0.1, **more)


def _hierarchical() -> Callable[..., Any]:
    words, sentences = _segments(16, 32), _segments(16)
    levels = (Score(_normal(D, A), _normal(A), _normal(A)) for _ in range(2))
    return partial(hierarchical_attention, _normal(512, D), words, sentences, *levels)


def _statistics() -> Callable[..., Any]:
    weights = {"w": _normal(D, A), "b": _normal(A), "v": _normal(A, D)}
    return partial(statistics_pooling, _normal(B, 512, D), **weights, mask=torch.rand(B, 512) > 0.1)


def _target() -> Callable[..., Any]:
    weights = _normal(4 * D, A), _normal(A, 40), _normal(40)
    biases = {"b1": _normal(A), "b2": _normal(40), "b3": _normal()}
    return partial(
        target_attention, _normal(B, D), _normal(B, 100, D), *weights, **biases, mask=torch.rand(B, 100) > 0.1
    )


def _graph(**known: Any) -> Callable[..., Any]:
    graph, _ = Graph.from_edges(torch.randint(64, (2, 512)), 64, 64)
    graph = dataclasses.replace(graph, **known)
    return partial(graph_attention, _normal(64, 2, 16), _normal(64, 2, 16), _normal(2, 16), graph)


def _word_by_word() -> Callable[..., Any]:
    w = [_normal(D, D) for _ in range(3)]
    mask = torch.rand(B, 24) > 0.1
    return partial(
        word_by_word_attention, _normal(B, 24, D), _normal(B, 8, D), *w, _normal(D), _normal(D, D), mask=mask
    )


def _location_aware() -> Callable[..., Any]:
    query, key, value = _normal(B, A), _normal(B, 512, A), _normal(B, 512, D)
    filters = torch.rand(B, 512).to(torch.bfloat16), _normal(8, 31), _normal(8, A)
    return partial(location_aware_attention, query, key, value, _normal(A), *filters, mask=torch.rand(B, 512) > 0.1)


def _utterance() -> Callable[..., Any]:
    query, key, value = _normal(B, 24, A), _normal(B, 64, A), _normal(B, 64, D)
    filters = _normal(8, 31), _normal(8, A)
    return partial(location_aware_sequence, query, key, value, _normal(A), *filters, mask=torch.rand(B, 64) > 0.1)


ROWS: dict[str, Callable[[], Callable[..., Any]]] = {
    "location": _location,
    "location, ragged": _ragged,
    "location, window": partial(_location, window=(None, 0)),
    "concat": lambda: _pairs(concat_attention, 8, v=_normal(D)),
    "concat, one query": lambda: _pairs(concat_attention, 1, v=_normal(D)),
    "general": lambda: _pairs(general_attention, 8),
    "hierarchical": _hierarchical,
    "statistics, a channel": _statistics,
    "target": _target,
    "graph": _graph,
    "graph, hubs": partial(_graph, max_degree=None),
    "word by word": _word_by_word,
    "location-aware step": _location_aware,
    "location-aware utterance": _utterance,
}


def _sdpa() -> Callable[..., Any]:
    q, k = _normal(B, 2, 8, 32), _normal(B, 2, 64, 32)
    return lambda impl: torch.nn.functional.scaled_dot_product_attention(q, k, k)


class Cost(NamedTuple):
    """Of one call, or of its backward."""

    ours: list[str]  # kernels of the package that were started
    torch: list[str]  # operators of PyTorch that start one

    def __str__(self) -> str:
        return f"{len(self.ours)} + {len(self.torch)}"

    def names(self) -> str:
        """Each by its name, and how often."""
        return "\n".join(f"{n} {x}" for names in self for x, n in Counter(names).items())


def _leaves(tensors: Any) -> list[Tensor]:
    return [x for x in tensors if isinstance(x, Tensor) and x.requires_grad]


class Step:
    """A call, its forward or both ways."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call
        given = (*call.args, *call.keywords.values()) if isinstance(call, partial) else ()
        self.leaves = _leaves(x for y in given for x in (y if isinstance(y, tuple) else (y,)))
        if not self.leaves:
            self.leaves = _leaves(x.cell_contents for x in call.__closure__ or ())
        outs = self.forward()
        self.starts = [torch.ones_like(x) for x in outs]

    def forward(self) -> list[Tensor]:
        """Its results that have gradients."""
        out = self.call(impl="triton")
        return _leaves(out if isinstance(out, tuple) else (out,))

    def backward(self, outs: list[Tensor]) -> None:
        """Every gradient."""
        torch.autograd.grad(outs, self.leaves, self.starts)

    def both(self) -> None:
        """A step of training, without its optimizer."""
        self.backward(self.forward())


def kernels(step: Step, count: Counter[str]) -> tuple[Cost, Cost]:
    """What a forward and a backward start."""
    both: list[Cost] = []
    outs: list[Tensor] = []
    for run in (lambda: outs.extend(step.forward()), lambda: step.backward(outs)):
        count.clear()
        with _Operators() as operators:
            run()
        both.append(Cost(list(count.elements()), operators.started))
    return both[0], both[1]


def least(run: Callable[[], Any]) -> float:
    """The processor's time of a call in µs."""
    for _ in range(5):
        run()
    times = []
    for _ in range(REPEATS):
        start = time.process_time_ns()
        run()
        times.append(time.process_time_ns() - start)
    return min(times) / 1000


def measure(target: str, rows: list[str]) -> dict[str, dict[str, Any]]:
    """By row: kernels and µs, forward and of a backward, or of both."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = {}
    with no_driver(target) as count:
        sdpa = Step(_sdpa())
        for name in ["SDPA", *rows]:
            step = sdpa if name == "SDPA" else Step(ROWS[name]())
            costs = kernels(step, count)
            found[name] = {
                "forward": costs[0]._asdict(),
                "backward": costs[1]._asdict(),
                "forward_us": least(step.forward),
                "both_us": least(step.both),
            }
    return found


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", choices=list(compile_report.TARGETS), default="sm_90")
    parser.add_argument("--row", default="", help="only rows whose name has this text")
    parser.add_argument("--kernels", action="store_true", help="name the kernels")
    parser.add_argument("--json", action="store_true", help="print numbers only")
    args = parser.parse_args()
    rows = [name for name in ROWS if args.row in name]
    if not rows:
        parser.error(f"--row: expected text of one of {', '.join(map(repr, ROWS))}; got {args.row!r}")
    found = measure(args.target, rows)
    if args.json:
        print(json.dumps(found))
        return 0
    table = Table(title=f"Before the GPU begins, {args.target}", pad_edge=False)
    table.add_column("call", overflow="fold")
    for name in ("kernels forward, ours + PyTorch's", "backward", "host µs forward", "with backward"):
        table.add_column(name, justify="right")
    for name, row in found.items():
        costs = [Cost(**row[way]) for way in ("forward", "backward")]
        table.add_row(name, *map(str, costs), f"{row['forward_us']:.0f}", f"{row['both_us']:.0f}")
        if args.kernels:
            table.add_row("", *(c.names() for c in costs), "", "")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
