"""What was measured, as a table, a picture and a file."""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

import crisp_attention
from crisp_attention.bench.measure import Plan, Timing, growth, limit
from crisp_attention.bench.variants import BASELINE, VARIANTS
from crisp_attention.errors import StorageError

_PACKAGES = ("torch", "numba", "triton", "entmax", "x-transformers", "adasplash")


def machine(device: torch.device) -> dict[str, Any]:
    """Processor or GPU, threads and versions; nothing that identifies the machine."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    else:
        kind = f"{_processor()}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}"
    return {
        "device": kind,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "crisp-attention": crisp_attention.__version__,
        **versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(plan: Plan, timings: Iterable[Timing]) -> Table:
    """A row a variant, by length: a training step's time as a ratio to dense, with its range, and peak memory."""
    timings = list(timings)
    order = [variant.name for variant in VARIANTS]
    exponents = {name: growth([timing for timing in timings if timing.variant == name]) for name in order}
    told = [f"{name} N^{exponent:.2f}" for name, exponent in exponents.items() if exponent is not None]
    shown = Table(
        title=f"Training step of attention, times that of {BASELINE} (median, least to most of {plan.rounds} rounds)",
        caption=f"{plan.heads} heads, width {plan.width}, sparsity {plan.sparsity:g}, {plan.tokens} tokens a batch. "
        f"Least possible for exact selection: {limit(plan.sparsity):.2f}. f: forward only."
        + (f" Time grows as {', '.join(told)}." if told else ""),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    shown.add_column("variant", no_wrap=True)
    for name in ("ratio", "range", "ms", "MiB"):
        shown.add_column(name, justify="right", no_wrap=True)
    for length in plan.lengths:
        own = sorted((t for t in timings if t.length == length), key=lambda timing: order.index(timing.variant))
        shown.add_row(f"N = {length}")
        for timing in own:
            shown.add_row(f" {timing.variant}", *_cells(timing))
        shown.add_section()
    return shown


def _cells(timing: Timing) -> tuple[str, ...]:
    return (
        f"{timing.ratio:.2f}{'' if timing.training else ' f'}",
        f"{min(timing.ratios):.2f}..{max(timing.ratios):.2f}",
        f"{1e3 * statistics.median(timing.training or timing.forward):.1f}",
        "-" if timing.peak is None else f"{timing.peak / 2**20:.0f}",
    )


def to_json(plan: Plan, timings: Iterable[Timing]) -> dict[str, Any]:
    """Everything that was measured, in plain types."""
    return {
        "machine": machine(plan.device),
        "plan": {
            "dtype": str(plan.dtype).removeprefix("torch."),
            "lengths": list(plan.lengths),
            "tokens": plan.tokens,
            "heads": plan.heads,
            "width": plan.width,
            "sparsity": plan.sparsity,
            "rounds": plan.rounds,
        },
        "limit": limit(plan.sparsity),
        "timings": [
            {
                "variant": timing.variant,
                "length": timing.length,
                "forward_seconds": list(timing.forward),
                "training_seconds": list(timing.training),
                "ratios": list(timing.ratios),
                "peak_bytes": timing.peak,
            }
            for timing in timings
        ],
    }


def prepare(folder: Path) -> None:
    """Make a folder for results, before anything is measured that might then be lost.

    Raises:
        StorageError: If nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise StorageError(
            f"{folder} could not be written: {error.strerror or error}. Choose another --out."
        ) from error


def save(folder: Path, plan: Plan, timings: Iterable[Timing]) -> list[Path]:
    """Write bench.json and bench.svg into a folder that is prepared; their paths."""
    timings = list(timings)
    records, picture = folder / "bench.json", folder / "bench.svg"
    records.write_text(json.dumps(to_json(plan, timings), indent=1) + "\n", encoding="utf-8")
    _draw(picture, plan, timings)
    return [records, picture]


def _draw(path: Path, plan: Plan, timings: list[Timing]) -> None:
    """Milliseconds of a training step over N on logarithmic axes, with the least possible below dense."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    markers = "osD^v<>Pxh"
    for place, variant in enumerate(VARIANTS):
        own = [timing for timing in timings if timing.variant == variant.name]
        if not own:
            continue
        lengths = [timing.length for timing in own]
        medians = [1e3 * statistics.median(timing.training or timing.forward) for timing in own]
        axes.plot(
            lengths, medians, marker=markers[place % len(markers)], markersize=4, linewidth=1.3, label=variant.name
        )
        if variant.name == BASELINE:
            least = [limit(plan.sparsity) * value for value in medians]
            axes.plot(lengths, least, "k:", linewidth=1.2, label="least possible")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(plan.lengths, labels=[str(length) for length in plan.lengths])
    axes.set_xlabel("tokens N")
    axes.set_ylabel("ms, forward and backward")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.set_title(
        f"{plan.heads} heads, width {plan.width}, sparsity {plan.sparsity:g}, {plan.tokens} tokens", fontsize=10
    )
    figure.savefig(path, metadata={"Date": None})
