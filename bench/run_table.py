"""A report of `bench.run` for people: a line a row as it comes, the table, and what the table leaves open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table  # imported where it is made: a machine without it has its results stored

Row = dict[str, Any]


def progress(row: Row) -> str:
    """One line on a row."""
    what = f"{row['family']}/{row['case']}/{row['dtype']} {row['provider']} {row['mode']}"
    if "failure" in row:
        return f"{what}: FAILED: {row['failure'].splitlines()[0][:200]}"
    return (
        f"{what}: {row['median_ms']:.4f} ms, {row['percent_of_ceiling']:.0f}% of the {row['bound']} ceiling, "
        f"error {row['error']:.1e}"
    )


def _short(x: float) -> str:
    """At least four digits of a number."""
    return f"{x:.4f}" if x < 10 else f"{x:.2f}" if x < 1000 else f"{x:,.0f}"


def table(report: Row) -> Table:
    """The rows of a stored report, for people: at most 120 columns wide."""
    from rich import box
    from rich.table import Table

    rows = report["rows"]
    key = ("family", "case", "dtype", "mode")
    bases = {
        provider: {tuple(r[k] for k in key): r.get("median_ms") for r in rows if r["provider"] == provider}
        for provider in ("reference", "compile")
    }
    memory, wall = (any(field in row for row in rows) for field in ("peak_bytes", "x_tanh_wall"))
    names = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
    modes = {"forward": "fwd", "forward+backward": "fwd+bwd"}

    threads = report["device"].get("threads")
    title = report["device"]["name"] + ("" if threads is None else f", {threads} threads")
    shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for header in ("case", "mode", "provider"):
        shown.add_column(header, no_wrap=True)
    optional = [*(["× wall"] if wall else []), *(["peak MiB"] if memory else [])]
    for header in ("ms", "±", "× ref.", "× comp.", "floor", "of ceiling", *optional, "error"):
        shown.add_column(header, no_wrap=True, justify="right")
    last = None
    for row in sorted(rows, key=lambda row: [row[k] for k in key]):  # stable: providers keep their order
        if last not in (None, row["case"] + row["dtype"]):
            shown.add_section()
        last = row["case"] + row["dtype"]
        ms = row.get("median_ms")
        cells = [f"{row['case']} {names[row['dtype']]}", modes[row["mode"]], row["provider"]]
        cells += ["failed" if ms is None else _short(ms)]
        cells += ["" if ms is None else f"{100 * (row['p80_ms'] - row['p20_ms']) / ms:.0f}%"]
        for times in bases.values():
            base = times.get(tuple(row[k] for k in key))
            cells += ["" if ms is None or base is None else f"{base / ms:.2f}"]
        cells += [_short(row["floor_ms"])]
        cells += ["" if ms is None else f"{row['percent_of_ceiling']:.0f}% {row['bound']}"]
        if wall:
            cells += [f"{row['x_tanh_wall']:.2f}" if "x_tanh_wall" in row else ""]
        if memory:
            cells += [f"{row['peak_bytes'] / 2**20:,.1f}" if "peak_bytes" in row else ""]
        shown.add_row(*cells, f"{row['error']:.1e}" if "error" in row else "")
    return shown


def summary(report: Row) -> str:
    """The ceilings, what the table does not say of itself, and every failure."""
    ceiling = report["ceilings"]
    products = ", ".join(f"{r / 1e12:.3g} TFLOP/s ({dtype})" for dtype, r in ceiling["matmul_flops_per_s"].items())
    tanh = f", {ceiling['tanh_per_s'] / 1e12:.3g} T tanh/s" if "tanh_per_s" in ceiling else ""
    lines = [
        f"Ceilings: copy {ceiling['copy_bytes_per_s'] / 1e9:,.1f} GB/s (read + written), product {products}{tanh}.",
        f"Times by {report['timer']}: median; ±, from the 20th to the 80th percentile; floor in ms.",
        "× ref., × comp.: time of the reference, of torch.compile of it / time. "
        "Error: the largest of output and gradients, against float64.",
    ]
    if any("x_tanh_wall" in row for row in report["rows"]):
        lines.append("× wall: time of one hardware tanh for each visible pair and feature / time of the forward.")
    if "tanh_failure" in ceiling:
        lines.append(f"No tanh wall: {ceiling['tanh_failure']}")
    if any(row.get("percent_of_ceiling", 0) > 100 for row in report["rows"]):
        lines.append("Over 100%: the inputs stayed in a cache, or another program slowed the measured ceiling.")
    if any(row["impl"] == "auto" for row in report["rows"]):
        lines.append(
            "No kernel ran: on a CPU `fused` is impl='auto', in PyTorch: a blocked path for concat and for windows "
            "of location, scaled_dot_product_attention where it serves general, else the same code as `reference`."
        )
    seen = set()
    for row in report["rows"]:
        if "failure" in row:
            line = f"FAILED {row['case']} {row['dtype']} {row['provider']} {row['mode']}: {row['failure']}"
            if line not in seen:
                lines.append(line)
            seen.add(line)
    return "\n".join(lines)
