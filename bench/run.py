"""Time and memory of every op in the registry: `python -m bench.run --help`.

For each case: every provider is compared with the reference in float64 at fresh random inputs, and one that is wrong
is not timed. Then each is timed, forward (no gradients) and forward+backward (a gradient for each floating input).
Peers (sdpa, flex, keops) are other systems, forward only, and padded is eager PyTorch on padded tensors; a run on a
GPU includes those that are there, on the cases that they can compute.

- Time on a GPU: device events around a call, L2 flushed before it; median, and the 20th and 80th percentile. Where a
  call is short this includes the gaps between its launches; `--graph` times replays of a CUDA graph, without them.
  On a CPU: the wall clock, after a warm-up.
- Memory: the peak during a call, beyond what there was before: on a GPU of PyTorch's allocator; on a CPU of the
  process, where the system tells (Linux with glibc), good to some MiB.
- Ceilings are measured in the same run: a large copy, and a large matrix product in each dtype. The floor of a call
  is the larger of bytes / copy rate and FLOPs / product rate, and `% of ceiling` is the floor over the measured time.
- The tanh wall, on NVIDIA GPUs: the time of one hardware tanh for each pair that is visible and each feature, at the
  rate that a kernel of nothing else has in the same run. `× wall` is the wall over the time of the forward.

The results are written with every row, and the families take turns, so that a run cut short has something of each; by
SIGINT or SIGTERM it ends with its table and exit status 130. The exit status is 1 if `fused` failed or was wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .families import REGISTRY
from .families.problem import MODES, Case, Cost, Inputs, Op
from .run_table import Row, progress, summary, table

ROOT = Path(__file__).resolve().parent.parent
PROVIDERS = ("fused", "reference", "compile")
PEERS = {"sdpa": MODES[:1], "flex": MODES[:1], "keops": MODES[:1], "padded": MODES}  # with the modes of each
QUANTILES = (0.5, 0.2, 0.8)
# Error (relative, of the norm) beyond twice that of the reference in the same dtype: another order of summation.
SLACK = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}

Call = Callable[..., Tensor]


def select(device: str, family: str | None = None, case: str = "") -> Iterator[tuple[Op, Case]]:
    """The cases for a type of device whose ``family/name/dtype`` contains `case`."""
    for op in REGISTRY:
        for one in op.cases:
            if one.device == device and family in (None, op.family) and case in label(op, one):
                yield op, one


def in_turns(chosen: Sequence[tuple[Op, Case]]) -> list[tuple[Op, Case]]:
    """The first case of each family, the second of each, and so on."""
    families: dict[str, list[tuple[Op, Case]]] = {}
    for op, case in chosen:
        families.setdefault(op.family, []).append((op, case))
    rounds = itertools.zip_longest(*families.values())
    return [one for taken in rounds for one in taken if one is not None]


def label(op: Op, case: Case) -> str:
    """``family/name/dtype``."""
    return f"{op.family}/{case.name}/{case.dtype_name}"


def providers_of(op: Op, case: Case, device: torch.device, wanted: Sequence[str] | None = None) -> list[str]:
    """Which of the wanted providers take part; without a wish, on a GPU every peer that is installed too."""
    peers = op.peers(case.sizes)
    if wanted is None:
        wanted = [*PROVIDERS, *(name for name in peers if device.type == "cuda" and peers[name].available)]
    return [name for name in wanted if name in PROVIDERS or name in peers]


def modes_of(provider: str) -> Sequence[str]:
    """The modes in which a provider takes part."""
    return PEERS.get(provider, MODES)


def impl_of(provider: str, device: torch.device) -> str:
    """The `impl` that a provider passes: an explicit "triton" never falls back, but does not run on a CPU."""
    if provider in PEERS:
        return provider
    if provider != "fused":
        return "reference"
    return "triton" if device.type == "cuda" else "auto"


def call_of(op: Op, case: Case, provider: str, device: torch.device) -> Call:
    """The provider as a function of the op's inputs."""
    options = op.options(case.sizes)
    if provider in PEERS:
        peer = op.peers(case.sizes)[provider]
        given, compiled = partial(peer.call, **options), peer.compile
    else:
        given, compiled = partial(op.call, **options, impl=impl_of(provider, device)), provider == "compile"

    def call(**inputs: Tensor) -> Tensor:
        return given(**inputs)

    return torch.compile(call, dynamic=False) if compiled else call


def runner(call: Call, inputs: Inputs, mode: str, dout: Tensor | None = None) -> Callable[[], dict[str, Tensor]]:
    """What is timed: a call of it returns the output, and with the backward each gradient, by name."""
    if mode == "forward":

        def forward() -> dict[str, Tensor]:
            with torch.no_grad():
                return {"out": call(**inputs)}

        return forward

    names = [name for name, x in inputs.items() if x.is_floating_point()]
    leaves = {name: x.detach().requires_grad_(name in names) for name, x in inputs.items()}

    def forward_backward() -> dict[str, Tensor]:
        out = call(**leaves)
        grads = torch.autograd.grad(out, [leaves[name] for name in names], dout)
        return {"out": out.detach(), **dict(zip(names, grads, strict=True))}

    return forward_backward


# ---------------------------------------------------------------------------------------------------------------
# Checking
# ---------------------------------------------------------------------------------------------------------------


def attempt(fn: Callable[[], Any]) -> tuple[Any, str | None]:
    """(Result, None), or (None, what was raised): one that fails must not end the run."""
    try:
        return fn(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"[:600]


def check(op: Op, case: Case, providers: Sequence[str], device: torch.device, seed: int) -> dict[str, Row]:
    """For each provider its relative errors ‖x - ref‖ / ‖ref‖ of output and gradients, or why there are none.

    An error may be twice that of the reference in the dtype of the case, plus a step of `SLACK`.
    """
    textbook = call_of(op, case, "reference", device)

    def exact() -> tuple[Inputs, Tensor, dict[str, Tensor]]:
        torch.manual_seed(seed)
        inputs = op.inputs({**case.sizes, **case.check}, case.dtype, device, seed)
        double = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        dout = torch.randn_like(runner(textbook, double, "forward")()["out"]).to(case.dtype)
        return inputs, dout, runner(textbook, double, "forward+backward", dout.double())()

    found, failure = attempt(exact)
    if found is None:
        return {provider: {"failure": f"no float64 reference: {failure}"} for provider in providers}
    inputs, dout, truth = found

    def errors(provider: str) -> dict[str, float]:
        got = runner(call_of(op, case, provider, device), inputs, modes_of(provider)[-1], dout)()
        return {name: ((x.double() - truth[name]).norm() / truth[name].norm()).item() for name, x in got.items()}

    rough, failure = attempt(partial(errors, "reference"))
    slack = SLACK[case.dtype]
    # A gradient may cancel to nearly nothing (that of a shift of all scores), so its step is the largest gradient's.
    step = max((x.abs().max().item() for name, x in truth.items() if name != "out"), default=0.0)
    steps = {name: 1.0 if name == "out" else max(1.0, (step / x.norm()).item()) for name, x in truth.items()}
    limits = {name: 2 * (rough or {}).get(name, slack) + slack * steps[name] for name in truth}
    rows: dict[str, Row] = {}
    for provider in providers:
        got, why = (rough, failure) if provider == "reference" else attempt(partial(errors, provider))
        if got is None:
            rows[provider] = {"failure": why}
            continue
        rows[provider] = {"error": max(got.values(), key=_nan_last), "errors": got, "limits": limits}
        wrong = [n for n, error in got.items() if not (math.isfinite(error) and error <= limits[n])]
        if wrong:
            text = ", ".join(f"{n} {got[n]:.2e} (at most {limits[n]:.2e})" for n in wrong)
            rows[provider]["failure"] = f"wrong: relative error against float64 of {text}"
    return rows


def _nan_last(x: float) -> float:
    return math.inf if math.isnan(x) else x


# ---------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------


def timed(fn: Callable[[], Any], device: torch.device, quick: bool) -> list[float]:
    """[median, 20th, 80th percentile] of a call, in milliseconds."""
    if device.type == "cuda":
        from triton.testing import do_bench

        # Milliseconds of warm-up and of measurement; each call follows a flush of L2.
        return do_bench(fn, warmup=10 if quick else 50, rep=20 if quick else 200, quantiles=list(QUANTILES))
    fn()
    times: list[float] = []
    budget = time.perf_counter() + (0.05 if quick else 1.0)
    while len(times) < 3 or (time.perf_counter() < budget and len(times) < 200):
        start = time.perf_counter()
        fn()
        times.append(1e3 * (time.perf_counter() - start))
    return torch.tensor(times, dtype=torch.float64).quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()


def graphed(fn: Callable[[], Any]) -> Callable[[], None]:
    """Replay of a CUDA graph of `fn`, captured after a warm-up on a side stream, as capturing asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def peak_bytes(fn: Callable[[], Any], device: torch.device) -> int | None:
    """Most memory held during a call, beyond what was held before: results and temporaries. None: it can't be told.

    On a GPU it is of the allocator, on a CPU of the process. `fn` has been called before: that makes buffers to keep.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        # Freed blocks of less than 32 MiB stay in the process, and a call that takes them again shows no growth: for
        # the blocked concat path 0 to 8 MiB instead of 10 to 16. A fresh process is no help: it has called `fn` once.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except (OSError, AttributeError, TypeError):  # not Linux, or not glibc
        return None
    before = _resident("VmRSS")
    fn()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    return 1024 * int(re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def ceilings(dtypes: set[torch.dtype], device: torch.device, quick: bool) -> Row:
    """A second's bytes of a copy (read + written), FLOPs of a matrix product in each dtype, and hardware tanh."""
    gpu = device.type == "cuda"
    src = torch.randn(2**29 if gpu else 2**24, device=device)
    ms = timed(partial(torch.empty_like(src).copy_, src), device, quick)[0]
    found: Row = {"copy_bytes_per_s": 2 * src.nbytes / (1e-3 * ms), "matmul_flops_per_s": {}}
    n = 8192 if gpu else 1024
    for dtype in sorted(dtypes, key=str):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        ms = timed(partial(torch.mm, a, b), device, quick)[0]
        found["matmul_flops_per_s"][str(dtype).removeprefix("torch.")] = 2 * n**3 / (1e-3 * ms)
    if gpu and torch.version.hip is None:
        rate, why = attempt(partial(tanh_rate, device, quick))
        found |= {"tanh_per_s": rate} if why is None else {"tanh_failure": why}
    return found


def tanh_rate(device: torch.device, quick: bool) -> float:
    """Hardware tanh a second of an NVIDIA GPU."""
    from . import tanh_rate as kernel

    trips = 64  # about a millisecond: 2^15 tanh for each of 2,048 threads an SM, at 16 a clock
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(processors * (2048 // (32 * kernel.WARPS)) * kernel.BLOCK, device=device)
    ms = timed(partial(kernel.launch, out, trips), device, quick)[0]
    return out.numel() * kernel.UNROLLED * trips / (1e-3 * ms)


def floor_of(cost: Cost, dtype: str, ceiling: Row) -> tuple[float, str]:
    """The shortest time in milliseconds that the ceilings allow, and which of them it is."""
    memory = 1e3 * cost.bytes / ceiling["copy_bytes_per_s"]
    compute = 1e3 * cost.flops / ceiling["matmul_flops_per_s"][dtype]
    return (memory, "memory") if memory >= compute else (compute, "compute")


def measure(
    op: Op,
    case: Case,
    providers: Sequence[str],
    device: torch.device,
    seed: int,
    ceiling: Row,
    *,
    quick: bool = False,
    graph: bool = False,
) -> Iterator[Row]:
    """The rows of one case: first the check of every provider, then their times."""
    torch._dynamo.reset()  # each case compiles anew, and does not use up the recompilations of the next
    checked = check(op, case, providers, device, seed)
    for provider in providers:
        call, impl = call_of(op, case, provider, device), impl_of(provider, device)
        for mode in modes_of(provider):
            cost = op.work(case, mode)
            floor, bound = floor_of(cost, case.dtype_name, ceiling)
            row: Row = {"family": op.family, "case": case.name, "dtype": case.dtype_name, "sizes": dict(case.sizes)}
            row |= {"provider": provider, "impl": impl, "mode": mode}
            row |= {**cost._asdict(), "floor_ms": floor, "bound": bound, "seed": seed, **checked[provider]}
            if "failure" not in row:
                draw = partial(op.inputs, case.sizes, case.dtype, device, seed + 1)
                found, why = attempt(partial(numbers, call, draw, mode, device, quick=quick, graph=graph))
                row |= found or {"failure": why}
            if "median_ms" in row:
                row["percent_of_ceiling"] = 100 * floor / row["median_ms"]
                if cost.tanhs and mode == "forward" and "tanh_per_s" in ceiling:
                    row["x_tanh_wall"] = 1e3 * cost.tanhs / ceiling["tanh_per_s"] / row["median_ms"]
            yield row


def numbers(
    call: Call, draw: Callable[[], Inputs], mode: str, device: torch.device, *, quick: bool, graph: bool
) -> Row:
    """Time of one provider in one mode, and its memory where that can be told."""
    inputs = draw()
    fn = runner(call, inputs, "forward")
    if mode != "forward":
        fn = runner(call, inputs, mode, torch.randn_like(fn()["out"]))
    fn()  # compiles
    row: Row = {}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if (peak := peak_bytes(fn, device)) is not None:
        row["peak_bytes"] = peak
    times = timed(graphed(fn) if graph else fn, device, quick)
    return row | dict(zip(("median_ms", "p20_ms", "p80_ms"), times, strict=True))


# ---------------------------------------------------------------------------------------------------------------
# Reporting
# ---------------------------------------------------------------------------------------------------------------


def _git(*args: str) -> str | None:
    try:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or a copy without .git
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(device: torch.device, argv: Sequence[str], commit: str | None) -> Row:
    """What a reader must know to believe the numbers or to repeat them."""
    gpu = device.type == "cuda"
    changes = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return {
        "device": {
            "type": device.type,
            "name": torch.cuda.get_device_name(device) if gpu else _cpu_name(),
            **({} if gpu else {"threads": torch.get_num_threads()}),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda if gpu else None,
        },
        "commit": commit or _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench.run", *argv]),
        "fp32_precision": torch.backends.cuda.matmul.fp32_precision,  # "none" or "ieee": exact
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def idle_cores() -> int:
    """Cores that this process may use, less those that other programs kept busy in the last minute; at least 1."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, round(cores() - load))


def store(report: Row, output: Path) -> None:
    """Write the report; who reads it meanwhile finds a whole one."""
    output.parent.mkdir(parents=True, exist_ok=True)
    fresh = output.with_name(output.name + ".part")
    fresh.write_text(json.dumps(report, indent=1) + "\n")
    fresh.replace(output)


def default_output(env: Row) -> Path:
    """``bench/results/<device>-<date>.json``; the time of day keeps two runs apart."""
    name = re.sub(r"\W+", "-", env["device"]["name"]).strip("-").lower()
    date = env["date"][:19].replace("T", "-").replace(":", "")
    return ROOT / "bench" / "results" / f"{name}-{date}.json"


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, torch.device, list[tuple[Op, Case]]]:
    """What was asked for, where it runs, and the cases."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Time every op in the registry.")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--family", choices=[op.family for op in REGISTRY])
    parser.add_argument("--case", default="", help="only cases whose family/name/dtype contains this")
    named = "may be repeated; default: all; peers on a GPU only, where installed"
    parser.add_argument("--provider", action="append", choices=(*PROVIDERS, *PEERS), help=named)
    parser.add_argument(
        "--threads", type=int, help="of a CPU; default: OMP_NUM_THREADS, or as many as cores are idle"
    )
    parser.add_argument("--output", type=Path, help="default: bench/results/<device>-<date>.json")
    parser.add_argument("--quick", action="store_true", help="few repetitions: a smoke test")
    parser.add_argument("--graph", action="store_true", help="time replays of CUDA graphs: no gaps between launches")
    parser.add_argument("--commit", help="commit to record where the copy has no .git")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    args = parser.parse_args(argv)

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = list(select(device.type, args.family, args.case))
    if not chosen:
        parser.error(f"no case for {device.type} matches; see --list")
    if args.graph and device.type != "cuda":
        parser.error("--graph needs a GPU")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads: expected at least 1; got {args.threads}")
    return args, device, chosen


def list_cases(chosen: Sequence[tuple[Op, Case]]) -> None:
    """Sizes and costs of the cases."""
    for op, case in chosen:
        sizes = " ".join(f"{name}={size}" for name, size in case.sizes.items())
        print(f"{label(op, case):<40} {sizes}")
        for mode in MODES:
            cost = op.work(case, mode)
            print(f"    {mode}: {cost.flops / 1e9:.4g} GFLOP, {cost.bytes / 1e6:.4g} MB")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args, device, chosen = arguments(argv)
    if args.list:
        list_cases(chosen)
        return 0

    if args.threads is not None or (device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ):
        torch.set_num_threads(args.threads or idle_cores())
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:6.1f} s] {text}", flush=True)

    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    # Compilation warns about its own internals, in the middle of the progress.
    warnings.filterwarnings("ignore", module=r"torch\.")
    report = environment(device, argv, args.commit)
    seed = time.time_ns() % 2**31  # fresh inputs every run; stored with each row, so that a failure can be repeated
    timer = "CUDA graph replays between device events" if args.graph else "device events, L2 flushed"
    report |= {"quick": args.quick, "timer": timer if device.type == "cuda" else "the wall clock"}
    report |= {"interrupted": False, "rows": []}
    output = args.output or default_output(report)
    rows = report["rows"]
    interrupt = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        ceiling = report["ceilings"] = ceilings({case.dtype for _, case in chosen}, device, args.quick)
        say(f"{report['device']['name']}: ceilings {json.dumps(ceiling)}")
        for op, case in in_turns(chosen):
            wanted = providers_of(op, case, device, args.provider)
            for row in measure(op, case, wanted, device, seed, ceiling, quick=args.quick, graph=args.graph):
                rows.append(row)
                say(progress(row))
                store(report, output)
    except KeyboardInterrupt:
        report["interrupted"] = True
        say(f"interrupted, after {len(rows)} rows")
        if not rows:
            return 130
        store(report, output)
    finally:
        signal.signal(signal.SIGTERM, interrupt)

    try:
        from rich.console import Console
    except ImportError:
        print("No table: rich is not installed")
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(table(report))
    print(summary(report))
    print(f"Written to {output}", flush=True)
    return 130 if report["interrupted"] else int(any(r["provider"] == "fused" and "failure" in r for r in rows))


if __name__ == "__main__":
    sys.exit(main())
