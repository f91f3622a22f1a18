"""The main job: find the bags that hold a "9", by attention-based multiple-instance learning (`make demo`).

The task is that of Ilse et al. 2018, on scikit-learn's handwritten digits (1,797 real images of 8 × 8): a bag of
images is positive iff it holds at least one "9", and only the bag has a label. How bags are made:

- The images are split 60 : 40, stratified by digit, before any bag is made: no test image is ever trained on.
- A bag has 10 to 50 images (uniform), drawn without replacement. Exactly half of the bags are positive, and the
  size is drawn apart from the label, so that it says nothing about it.
- A positive bag of n images holds 1 to n // 10 nines (uniform): at most what drawing digits at random would give
  on average. The rest, and all of a negative bag, is drawn uniformly from the other nine digits.

Three models differ in the pooling alone (encoder, head, their initial numbers, bags, optimiser and epochs are the
same): gated attention, mean and max, all on ragged batches. Encoder and epochs were compared on validation bags
from a part of the training images; a model meets the test bags once, after its last epoch. Mean pooling is behind
mostly because it learns slowly: on those validation bags its AUC was 0.947 after 15 epochs and 0.987 after 45, that
of gated attention 0.994 and 0.994, that of max pooling 0.995 and 0.996.

The last table holds the fused kernel to the float64 reference: its error may be twice that of the reference in the
same dtype plus one rounding step of the largest output (or gradient). On a CPU the kernel runs in Triton's
interpreter, in a process of its own, since TRITON_INTERPRET=1 must be set before the kernels are imported. The exit
status is 1 if an error or an AUC is past its bound. On a CPU it takes one thread, unless OMP_NUM_THREADS is set.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fused_attn import LocationAttention, location_attention
from fused_attn.models._progress import progress

POSITIVE_DIGIT = 9
TEST_IMAGES = 0.4
BAG_SIZES = (10, 50)
TRAIN_BAGS, TEST_BAGS = 400, 400
DIM, ATTN_DIM = 64, 32
EPOCHS, BAGS_PER_STEP, LEARNING_RATE, WEIGHT_DECAY = 15, 10, 2e-3, 1e-4
POOLINGS = ("gated attention", "mean", "max")
MIN_AUC = 0.95
SHOWN_BAGS = (3, 1)  # positive and negative bags in the picture

# Bags, least and most rows, D and A of the check. The interpreter is slow; a GPU wants bags that fill it.
CHECK_ON_CPU = (BAGS_PER_STEP, *BAG_SIZES, DIM, ATTN_DIM)
CHECK_ON_GPU = (16, 1_000, 5_000, 512, 128)
CHECK_RUNS = 20
CHECKED = ("output", "grad h", "grad w", "grad b", "grad v", "grad gate weight", "grad gate bias")


# ---------------------------------------------------------------------------------------------------------------
# Bags
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class Bags:
    """Bags of images: for each the indices of its images, and whether a nine is among them."""

    images: list[Tensor]
    labels: Tensor

    def pack(self, which: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Image indices ``(N,)`` of these bags, one bag after the other, and their ``cu_seqlens (S + 1,)``."""
        chosen = [self.images[i] for i in which]
        lengths = torch.tensor([len(bag) for bag in chosen])
        return torch.cat(chosen), F.pad(lengths.cumsum(0), (1, 0)).int()


def split_images(digits: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the test images, stratified by digit."""
    train, test = train_test_split(np.arange(len(digits)), test_size=TEST_IMAGES, stratify=digits, random_state=seed)
    return train, test


def make_bags(pool: np.ndarray, digits: np.ndarray, count: int, rng: np.random.Generator) -> Bags:
    """`count` bags from the images in `pool`, the first half positive; the module's docstring says how."""
    nines, others = pool[digits[pool] == POSITIVE_DIGIT], pool[digits[pool] != POSITIVE_DIGIT]
    labels = torch.arange(count) < count // 2
    images = []
    for positive in labels.tolist():
        size = rng.integers(*BAG_SIZES, endpoint=True)
        held = rng.integers(1, size // 10, endpoint=True) if positive else 0
        drawn = rng.choice(nines, held, replace=False), rng.choice(others, size - held, replace=False)
        images.append(torch.from_numpy(rng.permutation(np.concatenate(drawn))))
    return Bags(images, labels.float())


# ---------------------------------------------------------------------------------------------------------------
# Models and training
# ---------------------------------------------------------------------------------------------------------------


class BagClassifier(nn.Module):
    """Encode each image, pool each bag, classify the bag."""

    def __init__(self, pooling: str, impl: str = "auto") -> None:
        super().__init__()
        self.pooling, self.impl = pooling, impl
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(32 * 3 * 3, DIM), nn.ReLU()),
        )
        self.head = nn.Linear(DIM, 1)
        # Made last, so that encoder and head start from the same numbers whatever the pooling.
        self.attention = LocationAttention(DIM, ATTN_DIM, gated=True) if pooling == "gated attention" else None

    def forward(self, images: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits ``(S,)`` of the packed bags, and the attention ``(N,)`` where there is one."""
        h, weights = self.encoder(images), None
        if self.attention is None:
            pooled = torch.segment_reduce(h, self.pooling, offsets=cu_seqlens, axis=0)
        else:
            pooled, weights = self.attention(h, cu_seqlens=cu_seqlens, return_weights=True, impl=self.impl)
        return self.head(pooled).squeeze(1), weights


def train(
    pooling: str, images: Tensor, bags: Bags, seed: int, *, impl: str = "auto", tick: Callable[[], None] | None = None
) -> BagClassifier:
    """A classifier trained on `bags`; `tick` is called after each epoch."""
    torch.manual_seed(seed)
    shuffle = np.random.default_rng(seed)
    model = BagClassifier(pooling, impl).to(images.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * -(-len(bags.images) // BAGS_PER_STEP)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for chosen in torch.from_numpy(shuffle.permutation(len(bags.images))).split(BAGS_PER_STEP):
            index, cu_seqlens = (x.to(images.device) for x in bags.pack(chosen.tolist()))
            logits, _ = model(images[index], cu_seqlens)
            loss = F.binary_cross_entropy_with_logits(logits, bags.labels[chosen].to(images.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if tick is not None:
            tick()
    return model.eval()


@torch.no_grad()
def predict(model: BagClassifier, images: Tensor, bags: Bags) -> tuple[Tensor, list[Tensor]]:
    """Logits of all bags, and the attention in each (nothing for a pooling without)."""
    index, cu_seqlens = (x.to(images.device) for x in bags.pack(range(len(bags.images))))
    logits, weights = model(images[index], cu_seqlens)
    return logits.cpu(), [] if weights is None else list(weights.cpu().split(cu_seqlens.diff().tolist()))


def experiment(seeds: int, impl: str, output: Path, console: Console) -> dict[str, list[float]]:
    """Train and test every pooling with every seed: its AUCs on held-out bags. Saves the picture of the first."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32, device=device)[:, None]
    aucs: dict[str, list[float]] = {pooling: [] for pooling in POOLINGS}
    with progress(console) as show:
        done, total = 0, seeds * len(POOLINGS) * EPOCHS
        for seed in range(seeds):
            train_images, test_images = split_images(data.target, seed)
            rng = np.random.default_rng(seed)
            train_bags = make_bags(train_images, data.target, TRAIN_BAGS, rng)
            test_bags = make_bags(test_images, data.target, TEST_BAGS, rng)
            for pooling in POOLINGS:
                what = f"Training on {device.type}: seed {seed}, {pooling:15}"

                def tick(what: str = what) -> None:
                    nonlocal done
                    done += 1
                    show(what, done, total)

                show(what, done, total)
                model = train(pooling, images, train_bags, seed, impl=impl, tick=tick)
                logits, weights = predict(model, images, test_bags)
                aucs[pooling].append(float(roc_auc_score(test_bags.labels, logits)))
                if weights and seed == 0:
                    save_picture(output, data.images, data.target, test_bags, logits.sigmoid(), weights)
    console.print(
        f"A model was trained on {TRAIN_BAGS} bags from {len(train_images)} images and tested on {TEST_BAGS} bags "
        f"from the {len(test_images)} others; a bag holds {BAG_SIZES[0]} to {BAG_SIZES[1]} images, half of the bags "
        f"hold a {POSITIVE_DIGIT}."
    )
    return aucs


def auc_table(aucs: dict[str, list[float]]) -> Table:
    """Test AUC, a row for each pooling."""
    table = Table("pooling", title="AUC on held-out bags")
    seeds = len(aucs[POOLINGS[0]])
    for name in ["mean", *(f"seed {i}" for i in range(seeds))]:
        table.add_column(name, justify="right")
    for pooling, values in aucs.items():
        table.add_row(pooling, *(f"{x:.4f}" for x in [statistics.mean(values), *values]))
    return table


def auc_problems(aucs: dict[str, list[float]]) -> list[str]:
    """What is wrong with the AUCs, in words."""
    attention, mean = (statistics.mean(aucs[p]) for p in ("gated attention", "mean"))
    problems = []
    if not attention >= MIN_AUC:
        problems.append(f"AUC of gated attention: expected at least {MIN_AUC}; got {attention:.4f}")
    if not attention > mean:
        problems.append(f"AUC of gated attention: expected more than mean pooling's {mean:.4f}; got {attention:.4f}")
    return problems


def save_picture(
    output: Path, images: np.ndarray, digits: np.ndarray, bags: Bags, probability: Tensor, weights: list[Tensor]
) -> None:
    """Draw the first test bags of each label (not chosen by hand): a frame around each image is its attention."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    half = len(bags.images) // 2
    shown = [*range(SHOWN_BAGS[0]), *range(half, half + SHOWN_BAGS[1])]
    across, edge, step, line = 15, 0.14, 1.36, 1.62  # an image is 1 × 1, its frame `edge` wide; 15 in a line
    figure, panel = plt.subplots(layout="constrained")
    heat = plt.cm.ScalarMappable(plt.Normalize(0, 1), "YlOrRd")
    top = 0.0
    for i in shown:
        nines = torch.from_numpy(digits[bags.images[i]] == POSITIVE_DIGIT)
        title = f"{'Positive' if bags.labels[i] else 'Negative'} bag, {probability[i]:.1%} positive by the model"
        if nines.any():
            share = float(weights[i][nines].sum())
            title += f"; the nines ({nines.sum()} of {len(nines)} images) hold {share:.0%} of the attention"
        panel.text(-edge, top + 0.55, title, fontsize=10)
        for k, (image, weight) in enumerate(zip(bags.images[i].tolist(), weights[i].tolist(), strict=True)):
            x, y = k % across * step, top + 1 + k // across * line
            side = 1 + 2 * edge
            panel.add_patch(Rectangle((x - edge, y - edge), side, side, color=heat.to_rgba(weight), lw=0, zorder=1))
            panel.imshow(images[image], cmap="gray_r", extent=(x, x + 1, y + 1, y), zorder=2)
            if nines[k]:
                panel.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor="tab:blue", linewidth=2, zorder=3))
            if nines[k] or weight >= 0.1:
                panel.text(x + 0.5, y + 1 + edge, f"{weight:.2f}", ha="center", va="top", fontsize=7.5)
        top = y + line + 0.1
    panel.set(xlim=(-edge, across * step), ylim=(top, 0), aspect="equal")
    panel.axis("off")
    label = "frame: attention weight (written under nines and from 0.1 on); blue: a nine"
    figure.colorbar(heat, ax=panel, label=label, fraction=0.03, pad=0.01, aspect=40)
    figure.set_size_inches(11, 0.5 * top)
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / "attention.png", dpi=130)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------
# Fused against reference
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """Errors against float64 and costs, of the fused kernel (None where it did not run) and of the reference."""

    batch: str
    fused_ran: str
    reference_ran: str
    fused: dict[str, float] | None
    reference: dict[str, float]
    bounds: dict[str, float]
    costs: dict[str, tuple[str, str]]

    def problems(self) -> list[str]:
        """The errors that are past their bounds, in words; NaN is past any bound."""
        return [
            f"{name} ({self.batch}): expected an error of at most {self.bounds[name]:.2e}; got {error:.2e}"
            for name, error in (self.fused or {}).items()
            if not error <= self.bounds[name]
        ]

    def table(self) -> Table:
        """One row for each quantity and each cost."""
        table = Table("largest error\nagainst float64", title=f"Fused against reference: {self.batch}")
        table.caption = (
            "Time: median of forward and backward. Peak memory: what PyTorch's allocator gave out meanwhile, beyond "
            "the inputs. Bound: twice the reference's error and one rounding step."
        )
        for name in (f"fused\n{self.fused_ran}", f"reference\n{self.reference_ran}", "bound"):
            table.add_column(name, justify="right")
        for name, bound in self.bounds.items():
            fused = "-" if self.fused is None else f"{self.fused[name]:.1e}"
            table.add_row(name, fused, f"{self.reference[name]:.1e}", f"{bound:.1e}")
        table.add_section()
        for name, cost in self.costs.items():
            table.add_row(name, *cost, "")
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

    def costs(impl: str | None) -> list[str]:
        if impl is None or (impl == "triton" and not on_gpu):
            return ["-", "-"]  # how long an interpreter takes says nothing about the kernel
        return measure(lambda: run_once(inputs, cu_seqlens, dout, impl), device)

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
        costs=dict(zip(("time", "peak memory"), zip(costs(fused), costs("reference"), strict=True), strict=True)),
    )


def measure(run: Callable[[], object], device: torch.device) -> list[str]:
    """Median time, and peak of the memory that PyTorch's allocator gave out meanwhile (inputs not counted)."""
    times = []
    for _ in range(CHECK_RUNS + 3):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run()
            times.append((time.perf_counter() - begin) * 1e3)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            run()
        with tempfile.TemporaryDirectory() as folder:
            recorded.export_chrome_trace(f"{folder}/trace.json")
            events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
        peak = max(e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]")
    return [f"{statistics.median(times[3:]):.2f} ms", f"{peak / 2**20:.2f} MiB"]


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), metavar="DIR", help="for the picture")
    impls = "what the attention trains with (default: auto, the kernel on a GPU and PyTorch on a CPU)"
    parser.add_argument("--impl", choices=("auto", "triton", "reference"), default="auto", help=impls)
    parser.add_argument("--check-kernel", action="store_true", help="print the last table alone, as JSON")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds: expected at least 1; got {args.seeds}")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # layers this small gain little from a second core, and lose much where it is busy
    if args.check_kernel:
        print(json.dumps([asdict(report) for report in kernel_reports()]))
        return 0

    console = Console()
    aucs = experiment(args.seeds, args.impl, args.output, console)
    console.print(auc_table(aucs))
    console.print(f"Bags with the attention on each image: {args.output / 'attention.png'}")
    reports = kernel_reports()
    problems = auc_problems(aucs)
    for report in reports:
        console.print(report.table())
        problems += report.problems()
    for problem in problems:
        console.print(f"[red]Past its bound:[/] {problem}")
    if not problems:
        unchecked = "" if all(report.fused for report in reports) else " (the kernel was not checked)"
        console.print(f"Every AUC and every error is within its bound{unchecked}: [green]OK[/]")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
