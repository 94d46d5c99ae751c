"""Tables of speed and cost, made from the records in results/benchmarks: no figure in them is typed by hand."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "results"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], prose: Collection[str] = ()) -> str:
    """A table in Markdown; numbers are flush right, the first column and those named in `prose` are text."""
    marks = ["---" if not place or name in prose else "---:" for place, name in enumerate(header)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, marks, *rows])


def _read(file: str) -> Any:
    return json.loads((RESULTS / "benchmarks" / file).read_text(encoding="utf-8"))


def _benches() -> list[Any]:
    """What `crisp bench` wrote, a record a setting."""
    folder = RESULTS / "benchmarks" / "attention-cpu"
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*/bench.json"))]


def attention_cpu() -> str:
    """A table a setting of `crisp bench`: the median ratio to dense attention by variant and length."""
    parts = []
    for bench in _benches():
        plan, lengths = bench["plan"], bench["plan"]["lengths"]
        ratios: dict[str, dict[int, list[float]]] = {}
        for timing in bench["timings"]:
            ratios.setdefault(timing["variant"], {})[timing["length"]] = timing["ratios"]
        rows = [
            [variant, *(_ratio(own[length]) if length in own else "-" for length in lengths)]
            for variant, own in ratios.items()
        ]
        parts += [
            f"#### Head width {plan['width']}, {bench['machine']['device']}",
            f"{plan['heads']} heads, {plan['tokens']} tokens a batch, {plan['dtype']}, sparsity {plan['sparsity']:g}, "
            f"{plan['rounds']} rounds, torch {bench['machine']['torch']}. The least that exact selection leaves is "
            f"{bench['limit']:.2f}.",
            markdown(["variant", *(f"N = {length}" for length in lengths)], rows),
        ]
    return "\n\n".join(parts)


def _ratio(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f}"


def finetuning() -> str:
    """Sentences a second of whole fine-tuning steps."""
    record = _read("finetuning-throughput.json")
    rows = [
        [
            name,
            f"{statistics.median(figures['sentences_per_second']):.1f}",
            _ratio(figures["ratios"]["dense"]),
            _ratio(figures["ratios"]["run_glue.py recipe"]),
        ]
        for name, figures in record["figures"].items()
    ]
    header = ["recipe", "sentences a second", "times the dense arm", "times padding to 128 tokens"]
    options = record["options"]
    return (
        f"{options['sentences']} sentences of {options['dataset']}, {options['threads']} thread, medians of "
        f"{options['rounds']} rounds.\n\n{markdown(header, rows)}"
    )


def speed() -> str:
    """What kernels cost beside torch's dense attention, and whole fine-tuning beside the usual recipe: a paragraph."""
    benches = _benches()
    kernels = [
        statistics.median(timing["ratios"])
        for bench in benches
        for timing in bench["timings"]
        if timing["variant"] in ("cpu topk", "cpu percentile")
    ]
    (sparsity,) = {bench["plan"]["sparsity"] for bench in benches}
    lengths = [length for bench in benches for length in bench["plan"]["lengths"]]
    figures = _read("finetuning-throughput.json")["figures"]
    padded = statistics.median(figures["dense"]["ratios"]["run_glue.py recipe"])
    sparse = [
        statistics.median(own["ratios"]["dense"])
        for arm, own in figures.items()
        if arm.startswith(("percentile-", "topk-")) and not arm.endswith("bare loop")
    ]
    return (
        f"Attention by the kernels for processors trains in {min(kernels):.2f} to {max(kernels):.2f} times the time of "
        f"torch's dense attention (`topk` and `percentile` at {sparsity:.0%}, N = {min(lengths)} to {max(lengths)}).\n"
        f"Whole fine-tuning, dense, processes {padded:.1f} times as many sentences a second as the usual recipe, which "
        f"pads to 128 tokens,\nand the sparse arms {min(sparse):.2f} to {max(sparse):.2f} times as many as the dense "
        "one. Medians, each within one run."
    )


def step_profile() -> str:
    """Milliseconds of a fine-tuning step by part."""
    record = _read("step-profile.json")
    medians = {
        arm: {part: statistics.median(found[part] for found in rounds) for part in rounds[0]}
        for arm, rounds in record["milliseconds"].items()
    }
    parts = list(next(iter(medians.values())))
    rows = [[part, *(f"{own[part]:.0f}" for own in medians.values())] for part in parts]
    rows.append(["sum", *(f"{sum(own.values()):.0f}" for own in medians.values())])
    options = record["options"]
    return (
        f"Milliseconds a step on {options['dataset']}, {options['threads']} thread, medians of "
        f"{options['rounds']} rounds of {options['steps']} steps.\n\n{markdown(['part', *medians], rows)}"
    )


def errors() -> str:
    """How often tests and verdicts err, in simulated experiments."""
    record = _read("statistics-simulation.json")
    rows = [
        [
            name,
            f"{figures['gain']:+.2f}",
            *(f"{100 * figures[share]['share']:.1f}%" for share in ("sign_flip", "helps", "hurts", "equivalent")),
            f"{100 * figures['covers']['share']:.1f}%",
        ]
        for name, figures in record["figures"].items()
        if "gain" in figures
    ]
    header = ["what is simulated", "true gain, points", "p < .05 over seeds", "*helps*", "*hurts*", "*equivalent*"]
    options = record["options"]
    return (
        f"{options['experiments']} experiments a row, {options['examples']} test examples each.\n\n"
        f"{markdown([*header, '95% interval covers'], rows)}"
    )


def export() -> str:
    """Compiled graphs and ONNX, rule by rule."""
    record = _read("compile-and-export.json")
    rows = [
        [f"`{row['rule']}`", str(row["graphs"]), f"{row['compiled_difference']:.1g}", f"{row['onnx_difference']:.1g}"]
        for row in record["rows"]
    ]
    header = ["rule", "graphs compiled", "largest difference, compiled", "largest difference, ONNX"]
    return (
        f"{len(record['lengths'])} lengths and {record['steps']} steps of a schedule, torch "
        f"{record['versions']['torch']}.\n\n{markdown(header, rows)}"
    )


def report_at_scale() -> str:
    """What a report of a thousand runs takes."""
    record = _read("report-at-scale.json")
    rows = [
        [
            f"{row['arms']} arms x {row['seeds']} seeds",
            *(f"{row[name]:.1f}" for name in ("seconds", "analysis_seconds", "report_seconds")),
            f"{row['peak_memory_mib']}",
            f"{row['page_mib']:.2f}",
        ]
        for row in record["results"]
    ]
    return markdown(["study", "seconds", "of them statistics", "of them pages", "peak MiB", "page, MiB"], rows)


TABLES = {
    "attention-cpu": attention_cpu,
    "errors": errors,
    "export": export,
    "finetuning": finetuning,
    "report-at-scale": report_at_scale,
    "step-profile": step_profile,
}
"""The tables that a page can ask for, by name."""
