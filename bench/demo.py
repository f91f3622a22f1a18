"""The main job: tell whether a bag of handwritten digits holds more nines than fours (`make demo`).

Attention-based multiple-instance learning after Ilse et al. 2018, on scikit-learn's real images. The task is that of
`fused_attn.models.tasks.mil`, whose docstring says how bags are made, with fewer bags and one short training of fixed
settings; `python -m fused_attn.models mil` is the whole comparison, and docs/models.md has its numbers. Four models
differ in how a bag's images are pooled alone: by gated attention, with uniform weights (the mean), by an oracle,
whose weights are uniform over the nines and fours, and by the maximum of each feature. All are trained and judged by
`fused_attn.models.protocol`; seeds are the demo's own. While the tasks are not frozen, scores are of validation data.

The second table holds the fused kernel to the float64 reference: its error may be twice that of the reference in the
same dtype plus one rounding step of the largest output (or gradient). On a CPU the kernel runs in Triton's
interpreter, in a process of its own, since TRITON_INTERPRET=1 must be set before the kernels are imported. The third
is the memory of a bag as large as a slide. The exit status is 1 if an error or a score is past its bound. On a CPU a
training takes one thread, unless OMP_NUM_THREADS is set, and two run at once where there are two cores.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fused_attn import location_attention
from fused_attn.models import _summary, protocol
from fused_attn.models.__main__ import score_table
from fused_attn.models._pictures import COLOURS
from fused_attn.models._summary import Row
from fused_attn.models._work import Part, counter, work_all
from fused_attn.models.tasks import SYSTEMS, TEST, TRAIN, VALIDATION, Task, mil

from .cpu import step
from .eager import gated_bag
from .families.problem import MODES
from .run import cores, peak_bytes

FIRST_SEED, SEEDS = 1000, 3  # apart from those of `protocol`, which search and final tests have
COUNTS = {TRAIN: 200, VALIDATION: 100, TEST: 400}
SETTING, EPOCHS = protocol.Setting(1e-3, 0.0), 20
MIN_SCORE, MIN_LOCATED = 0.85, 0.9
SHOWN_BAGS = 3

# Bags, least and most rows, D and A of the check. The interpreter is slow; a GPU wants bags that fill it.
CHECK_ON_CPU = (10, 10, 50, mil.DIM, mil.ATTN_DIM)
CHECK_ON_GPU = (16, 1_000, 5_000, 512, 128)
CHECKED = ("output", "grad h", "grad w", "grad b", "grad v", "grad gate weight", "grad gate bias")
SLIDE = 100_000  # rows of the bag whose memory is measured


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------


class Unit(NamedTuple):
    """One training."""

    arm: str
    seed: int
    split: str
    device: str
    output: Path | None  # for the picture

    def __str__(self) -> str:
        return f"Training on {self.device}: seed {self.seed - FIRST_SEED}, {self.arm}"


@functools.lru_cache(1)
def make_task(seed: int, device: str) -> Task:
    """The task of a seed, made once for all arms."""
    return mil.make(seed, torch.device(device), COUNTS)


def train(unit: Unit, part: Part = lambda done: None) -> Row:
    """Train and judge; `part` is told how much is done."""
    task = make_task(unit.seed, unit.device)
    tick = counter(part, EPOCHS)
    row, model = protocol.run(task, unit.arm, SETTING, unit.seed, tick, epochs=EPOCHS, split=unit.split)
    if unit.output is not None and model is not None:
        bags = mil.make_splits(unit.seed, torch.device(unit.device), COUNTS)[unit.split]
        save_picture(unit.output, model, bags.take(torch.arange(SHOWN_BAGS, device=unit.device)))
    return {"system": "mil", **row}


def experiment(seeds: int, jobs: int, split: str, output: Path, console: Console) -> list[Row]:
    """The row of every arm and seed. Saves the picture of attention with the first seed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arms = make_task(FIRST_SEED, device).arms
    units = [
        Unit(arm, FIRST_SEED + i, split, device, output if (i, arm) == (0, "attention") else None)
        for i in range(seeds)
        for arm in arms
    ]
    return [row for _, row in work_all(train, units, jobs, console)]


def problems_of(rows: Sequence[Row]) -> list[str]:
    """What is wrong with the scores, in words."""
    arms = _summary.by_arm(rows, "mil")
    means = {arm: statistics.fmean(_summary.scores(some)) for arm, some in arms.items()}
    attention = means["attention"]
    problems = []
    if not attention >= MIN_SCORE:
        problems.append(f"score of attention: expected at least {MIN_SCORE}; got {attention:.3f}")
    problems += [
        f"score of attention: expected more than that of {arm}, {means[arm]:.3f}; got {attention:.3f}"
        for arm in ("uniform", "max")
        if not attention > means[arm]
    ]
    located = statistics.fmean(row["localisation"]["instances"] for row in arms["attention"].values())
    if not located >= MIN_LOCATED:
        problems.append(f"area under the curve of the weights: expected at least {MIN_LOCATED}; got {located:.3f}")
    return problems


@torch.no_grad()
def save_picture(output: Path, model: nn.Module, bags: mil.Bags) -> None:
    """Draw bags, the first ones and not chosen by hand: a frame around each image is its attention."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    logits, weights = model(bags.images, bags.cu_seqlens, return_weights=True)
    sizes = bags.cu_seqlens.diff().tolist()
    parts = zip(*(x.cpu().split(sizes) for x in (bags.images[:, 0], bags.digits, weights)), strict=True)
    across, edge, step_, line = 20, 0.14, 1.36, 1.62  # an image is 1 × 1, its frame `edge` wide; 20 in a line
    outlines = {mil.MORE: COLOURS[0], mil.LESS: "black"}
    figure, panel = plt.subplots(layout="constrained")
    heat = plt.cm.ScalarMappable(plt.Normalize(0, float(weights.max())), "YlOrRd")
    top = 0.0
    for label, logit, (images, digits, share) in zip(bags.labels.tolist(), logits[:, 0], parts, strict=True):
        nines, fours = (digits == digit for digit in outlines)
        title = (
            f"nines: {int(nines.sum())}, with {share[nines].sum():.0%} of the attention; "
            f"fours: {int(fours.sum())}, with {share[fours].sum():.0%}; of {len(digits)} images. "
            f"{'More' if label else 'Fewer'} nines; more by the model: {logit.sigmoid():.0%}"
        )
        panel.text(-edge, top + 0.6, title, fontsize=10)
        for k, (image, digit, weight) in enumerate(zip(images, digits.tolist(), share.tolist(), strict=True)):
            x, y = k % across * step_, top + 1 + k // across * line
            side = 1 + 2 * edge
            panel.add_patch(Rectangle((x - edge, y - edge), side, side, color=heat.to_rgba(weight), lw=0, zorder=1))
            panel.imshow(image.numpy(), cmap="gray_r", extent=(x, x + 1, y + 1, y), zorder=2)
            if digit in outlines:
                panel.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=outlines[digit], lw=2, zorder=3))
            if digit in outlines or weight >= 0.05:
                panel.text(x + 0.5, y + 1 + edge, f"{weight:.2f}", ha="center", va="top", fontsize=7.5)
        top = y + line + 0.1
    panel.set(xlim=(-edge, across * step_), ylim=(top, 0), aspect="equal")
    panel.axis("off")
    panel.set_title("Which images gated attention looks at", fontsize=12)
    named = "frame: attention weight (share of 1); outlined: nines in blue, fours in black"
    figure.colorbar(heat, ax=panel, label=named, location="bottom", shrink=0.5, fraction=0.04, pad=0.01, aspect=50)
    figure.set_size_inches(13, 0.5 * top + 0.8)
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / "attention.png", dpi=130, facecolor="white")
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------
# Fused against reference
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """Errors against float64, of the fused kernel (None where it did not run) and of the reference."""

    batch: str
    fused_ran: str
    reference_ran: str
    fused: dict[str, float] | None
    reference: dict[str, float]
    bounds: dict[str, float]

    def problems(self) -> list[str]:
        """The errors that are past their bounds, in words; NaN is past any bound."""
        return [
            f"{name} ({self.batch}): expected an error of at most {self.bounds[name]:.2e}; got {error:.2e}"
            for name, error in (self.fused or {}).items()
            if not error <= self.bounds[name]
        ]

    def table(self) -> Table:
        """One row for each quantity."""
        table = Table("largest error\nagainst float64", title=f"Fused against reference: {self.batch}")
        table.caption = "Bound: twice the reference's error and one rounding step."
        for name in (f"fused\n{self.fused_ran}", f"reference\n{self.reference_ran}", "bound"):
            table.add_column(name, justify="right")
        for name, bound in self.bounds.items():
            fused = "-" if self.fused is None else f"{self.fused[name]:.1e}"
            table.add_row(name, fused, f"{self.reference[name]:.1e}", f"{bound:.1e}")
        return table


def run_once(inputs: Sequence[Tensor], cu_seqlens: Tensor, dout: Tensor, impl: str) -> list[Tensor]:
    """Gated location attention on packed bags: the output and the gradient of every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    h, w, b, v, gate_w, gate_b = leaves
    out = location_attention(h, w, b, v, gate=(gate_w, gate_b), cu_seqlens=cu_seqlens, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def check(device: torch.device, dtype: torch.dtype, fused: str | None = "triton") -> Report:
    """Compare `impl=fused` and the reference with float64 on one random batch; None leaves the fused one out."""
    on_gpu = device.type == "cuda"
    count, least, most, dim, attn_dim = CHECK_ON_GPU if on_gpu else CHECK_ON_CPU
    make = torch.Generator().manual_seed(0)
    lengths = torch.randint(least, most + 1, (count,), generator=make)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int().to(device)
    rows = int(lengths.sum())
    shapes = [(rows, dim), (dim, attn_dim), (attn_dim,), (attn_dim,), (dim, attn_dim), (attn_dim,), (count, dim)]
    scales = [1, dim**-0.5, 1, 1, dim**-0.5, 1, 1]  # scores of a trained model's size, neither flat nor one-hot
    *inputs, dout = (
        (torch.randn(shape, generator=make) * scale).to(device, dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    )
    exact = run_once([x.double() for x in inputs], cu_seqlens, dout.double(), "reference")

    def errors(impl: str) -> dict[str, float]:
        got = run_once(inputs, cu_seqlens, dout, impl)
        pairs = zip(CHECKED, got, exact, strict=True)
        return {name: float((x.double() - y).abs().max()) for name, x, y in pairs}

    steps = [torch.finfo(dtype).eps * float(x.abs().max()) for x in exact]
    steps = [steps[0], *[max(steps[1:])] * (len(steps) - 1)]  # the output, and the gradients together
    reference = errors("reference")
    bounds = {name: 2 * reference[name] + step for name, step in zip(CHECKED, steps, strict=True)}
    chip = torch.cuda.get_device_name(device) if on_gpu else f"on the CPU, threads: {torch.get_num_threads()}"
    return Report(
        batch=f"{count} bags, {rows:,} rows, D = {dim}, A = {attn_dim}, {str(dtype).removeprefix('torch.')}",
        fused_ran="(triton is not installed)" if fused is None else chip if on_gpu else "in Triton's interpreter",
        reference_ran=chip,
        fused=None if fused is None else errors(fused),
        reference=reference,
        bounds=bounds,
    )


def kernel_reports() -> list[Report]:
    """The check on what is there: the GPU; or the CPU, in a process whose kernels are made for the interpreter."""
    fused = None if importlib.util.find_spec("triton") is None else "triton"
    interpret = os.environ.get("TRITON_INTERPRET") == "1"
    if torch.cuda.is_available() and not interpret:
        return [check(torch.device("cuda"), dtype, fused) for dtype in (torch.float32, torch.bfloat16)]
    if fused is None or interpret:
        return [check(torch.device("cpu"), torch.float32, fused)]
    command = [sys.executable, "-m", "bench.demo", "--check-kernel"]
    root, interpreter = Path(__file__).resolve().parents[1], {**os.environ, "TRITON_INTERPRET": "1"}
    child = subprocess.run(command, env=interpreter, cwd=root, capture_output=True, text=True)
    if child.returncode != 0:
        raise RuntimeError(f"the check of the kernel in Triton's interpreter failed:\n{child.stderr}")
    return [Report(**fields) for fields in json.loads(child.stdout)]


def memory_table(device: torch.device, rows: int = SLIDE) -> Table:
    """Peak memory of one bag, of ours and of the same formula in eager PyTorch."""
    with device:
        pair = gated_bag(rows)
    what = "kernel" if device.type == "cuda" else "ours: on a CPU plain PyTorch too"
    table = Table("", title=f"Gated pooling of one bag of {rows:,} × 512, float32: peak memory beyond the inputs")
    for name in (what, "eager PyTorch"):
        table.add_column(name, justify="right")
    for mode in MODES:
        calls = step(pair.ours, pair.ours_leaves, mode), step(pair.eager, pair.eager_leaves, mode)
        cells = []
        for call in calls:
            call()  # makes buffers to keep
            peak = peak_bytes(call, device)
            cells.append("-" if peak is None else f"{peak / 2**20:,.0f} MiB")
        table.add_row(mode, *cells)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"1 to 6 (default: {SEEDS})")
    jobs = "trainings at once (default: as many as cores, at most 2; on a GPU 1)"
    parser.add_argument("--jobs", type=int, metavar="N", help=jobs)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), metavar="DIR", help="for the picture")
    parser.add_argument("--check-kernel", action="store_true", help="print the check of the kernel alone, as JSON")
    args = parser.parse_args(argv)
    if not 1 <= args.seeds <= 6:
        parser.error(f"--seeds: expected 1 to 6; got {args.seeds}")
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs: expected at least 1; got {args.jobs}")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # layers this small gain little from a second core, and lose much where it is busy
    if args.check_kernel:
        print(json.dumps([asdict(report) for report in kernel_reports()]))
        return 0

    console = Console()
    on_gpu = torch.cuda.is_available()
    split = VALIDATION if protocol.read_plan().frozen is None else TEST
    rows = experiment(args.seeds, args.jobs or (1 if on_gpu else min(2, cores())), split, args.output, console)
    console.print(score_table("mil", SYSTEMS["mil"], rows))
    console.print(
        f"Scores on {COUNTS[split]} {split} bags of images that are not trained on, after a short training: at most "
        f"{EPOCHS} epochs of {COUNTS[TRAIN]} bags, one setting. docs/models.md has the whole comparison.\n"
        f"Bags with the attention on each image: {args.output / 'attention.png'}"
    )
    reports = kernel_reports()
    problems = problems_of(rows)
    for report in reports:
        console.print(report.table())
        problems += report.problems()
    console.print(memory_table(torch.device("cuda" if on_gpu else "cpu")))
    for problem in problems:
        console.print(f"[red]Past its bound:[/] {problem}")
    if not problems:
        unchecked = "" if all(report.fused for report in reports) else " (the kernel was not checked)"
        console.print(f"Every score and every error is within its bound{unchecked}: [green]OK[/]")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
