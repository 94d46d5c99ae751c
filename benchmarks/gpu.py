"""Is the GPU backend correct, and how near is it to what the GPU can do?

Checks every rule against the reference in float64, then times training steps of attention against dense SDPA (flash),
the usual masked form, FlexAttention with a threshold known beforehand, and adasplash where it is installed: bf16, 12
heads of width 64, 32,768 tokens a batch, sparsity 0.8, medians of event timings. Stops by itself within 8 minutes;
what was not reached is "not measured". Without a GPU it says so and exits with status 2.

    python benchmarks/gpu.py [--json results/benchmarks/gpu.json] [--rounds 7] [--check-only]

Where the CUDA toolkit's compute-sanitizer is installed, the check runs under it once more, for accesses out of bounds
and races.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from crisp_attention.backends import Call, Detail, draw_dropout, reference
from crisp_attention.bench.measure import Plan, Timing, measure
from crisp_attention.bench.results import machine
from crisp_attention.bench.variants import chosen
from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError
from crisp_attention.masks import read_pairs
from crisp_attention.operator import AttentionOutput
from crisp_attention.rules import select

RECORD = Path(__file__).parent.parent / "results" / "benchmarks" / "gpu.json"
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
TOKENS, HEADS, WIDTH, SPARSITY = 32768, 12, 64, 0.8
SECONDS = 420.0
"""No measurement begins after this many; the rest of the 8 minutes is for the one under way."""
STORED = 4096
"""Longest sequence at which forms that store scores are timed."""
NAMES = ["triton topk", "triton percentile", "triton block_topk", "flex", "adasplash", "masked topk"]
RULES = ("topk", "percentile", "block_topk", "bottomk", "window", "random")


@dataclass(frozen=True)
class Ceiling:
    """What the GPU was measured to do at most.

    Attributes:
        operations: bf16 operations a second, of a large matrix product.
        bytes: Bytes a second, read and written, of a large copy.
    """

    operations: float
    bytes: float


@dataclass(frozen=True)
class Work:
    """What one training step must do.

    Attributes:
        operations: Of matrix products (a multiply-add is two).
        bytes: Read and written, with each tensor once a kernel.
    """

    operations: float
    bytes: float

    def least_seconds(self, ceiling: Ceiling) -> float:
        """The time that the ceiling allows."""
        return max(self.operations / ceiling.operations, self.bytes / ceiling.bytes)


def work(shape: tuple[int, int, int, int], passes: int, kept: float = 1.0) -> Work:
    """Operations and bytes of a training step of this package's kernels in bf16.

    Each product of attention takes 2 N^2 D operations a head: 1 in each pass over the scores that looks for a
    threshold, 2 in the forward pass, 3 for dQ and 4 for dK and dV.

    Args:
        shape: (B, H, N, D).
        passes: How often scores are computed to find thresholds.
        kept: Share of tiles that have survivors.
    """
    batch, heads, length, width = shape
    product = 2.0 * batch * heads * length**2 * width
    tensor, row = 2.0 * batch * heads * length * width, 4.0 * batch * heads * length
    # q, k; q, k, v, o; q, k, v, o, do, dq; q, k, v, do, dk, dv. And thresholds, sums and means of rows.
    tensors = 2 * passes + 4 + 6 + 6
    return Work(product * (passes + 9 * kept), tensor * tensors + row * (passes + 2 + 4 + 3))


def passes_of(variant: str, length: int) -> int:
    """Passes over the scores of one head that at least look for thresholds, at a length: see `backends.triton`."""
    if variant == "triton topk":
        # Held in registers up to 512 keys; beyond, a pass for the range and at least one that narrows it.
        return 1 if length <= 512 else 2
    return 5 if variant == "triton percentile" else 0


def summary(timings: list[Timing], lengths: tuple[int, ...], ceiling: Ceiling | None) -> list[dict[str, Any]]:
    """A row a variant and length: milliseconds, ratio to dense, peak memory, share of the roofline reached."""
    found = {(timing.variant, timing.length): timing for timing in timings}
    rows = []
    for name in ("sdpa", *NAMES):
        for length in lengths:
            timing = found.get((name, length))
            row: dict[str, Any] = {"variant": name, "length": length, "milliseconds": None}
            if timing is not None:
                seconds = statistics.median(timing.training)
                row |= {"milliseconds": 1e3 * seconds, "ratio": timing.ratio, "peak_bytes": timing.peak}
                if ceiling is not None and name.startswith("triton"):
                    blocks = 1.0 - SPARSITY if name == "triton block_topk" else 1.0
                    must = work((TOKENS // length, HEADS, length, WIDTH), passes_of(name, length), blocks)
                    row |= {**asdict(must), "roofline": must.least_seconds(ceiling) / seconds}
            rows.append(row)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    start = f"{row['variant']:18} {row['length']:6}"
    if row["milliseconds"] is None:
        return f"{start}  not measured"
    share = f"{row['roofline']:8.0%}" if "roofline" in row else f"{'':8}"
    return f"{start} {row['milliseconds']:9.3f} ms {row['ratio']:6.2f}x {row['peak_bytes'] / 2**20:9.1f} MiB {share}"


def check(device: torch.device) -> list[dict[str, Any]]:
    """The largest errors of every rule and dtype against the reference in float64, as shares of the budget."""
    from crisp_attention.backends import triton as backend

    rows = []
    for rule in RULES:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for length, causal in ((64, False), (333, False), (1100, rule == "topk")):
                call = _call(rule, dtype, length, causal, device)
                why = backend.refusal(call)
                row = {"rule": rule, "dtype": str(dtype).removeprefix("torch."), "length": length, "refused": why}
                if why is None:
                    row |= _compare(backend, call)
                rows.append(row)
    return rows


def _call(rule: str, dtype: torch.dtype, length: int, causal: bool, device: torch.device) -> Call:
    """A padded call with dropout whose scores are exact in every precision, with many ties."""
    draw = torch.Generator().manual_seed(length)
    shape = (2, 4, length, length)
    q, k = (torch.randint(-2, 3, (2, n, length, 64), generator=draw).to(device, dtype) for n in (4, 2))
    v = torch.randn(2, 2, length, 64, generator=draw).to(device, dtype)
    valid = torch.arange(length) < torch.tensor([[length], [length - length // 3]])
    pairs, _ = read_pairs(shape, device, valid=valid.to(device), causal=causal)
    selection = select(SparsityConfig(rule=rule, sparsity=SPARSITY), pairs)
    return Call(q, k, v, pairs, selection, None, 0.125, None, None, draw_dropout(0.1, device), Detail.SUMMARY)


def _compare(backend: Any, call: Call) -> dict[str, Any]:
    """Whether the same pairs survive, and the largest error over 16 units in the last place."""
    results = []
    for module, dtype in ((reference, torch.float64), (backend, call.query.dtype)):
        inputs = [x.to(dtype).requires_grad_() for x in (call.query, call.key, call.value)]
        done = module.attention(replace(call, query=inputs[0], key=inputs[1], value=inputs[2]))
        towards = torch.linspace(-1, 1, done.output.numel(), device=done.output.device).view_as(done.output).to(dtype)
        gradients = torch.autograd.grad(done.output, inputs, towards)
        kept = AttentionOutput(call.pairs, done, None).counts.kept
        results.append(([done.output.detach(), *gradients], kept))
    (exact, wanted), (found, kept) = results
    unit = 16 * torch.finfo(call.query.dtype).eps
    errors = [
        ((ours.double() - theirs).abs().max() / (unit * theirs.abs().max().clamp(min=1.0))).item()
        for ours, theirs in zip(found, exact, strict=True)
    ]
    # NaN, which no comparison finds large, is as wrong as can be.
    worst = max(math.inf if math.isnan(error) else error for error in errors)
    return {"same_survivors": bool(torch.equal(kept, wanted)), "error": worst}


def passed(rows: list[dict[str, Any]]) -> bool:
    """Whether every call that was served is within its budget, and one was."""
    served = [row for row in rows if row["refused"] is None]
    return bool(served) and all(row["same_survivors"] and row["error"] <= 1.0 for row in served)


def sanitize() -> dict[str, str]:
    """What compute-sanitizer says of the check: "clean", its last lines, or why it did not run."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return dict.fromkeys(("memcheck", "racecheck"), "not measured: compute-sanitizer is not installed")
    said = {}
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--error-exitcode", "3", sys.executable, __file__, "--check-only"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except subprocess.TimeoutExpired:
            said[tool] = "not measured: not done within a minute"
            continue
        said[tool] = "clean" if done.returncode == 0 else "\n".join(done.stdout.splitlines()[-20:])
    return said


def ceiling_of(device: torch.device) -> Ceiling:
    """Measure a matrix product and a copy, the best of 10."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    source = torch.empty(2**29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def best(run: Any) -> float:
        seconds = []
        for _ in range(11):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        return min(seconds[1:])

    return Ceiling(2.0 * 8192**3 / best(lambda: a @ a), 2.0 * source.numel() / best(lambda: target.copy_(source)))


def main() -> int:
    """Check, measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RECORD, help="where the record goes")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each variant and length")
    parser.add_argument("--check-only", action="store_true", help="check correctness and stop")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "No GPU is at hand (torch.cuda.is_available() is False), so nothing was measured. On a machine with one: "
            "pip install 'crisp-attention[gpu,bench]' and run this script again. The kernels themselves are tested in "
            "Triton's interpreter: pytest tests/backends/test_triton.py",
            file=sys.stderr,
        )
        return 2
    started, device = time.monotonic(), torch.device("cuda")
    checks = check(device)
    for row in checks:
        told = (
            row["refused"]
            or f"survivors {'equal' if row['same_survivors'] else 'DIFFER'}, {row['error']:.2f} of the budget"
        )
        print(f"{row['rule']:12} {row['dtype']:9} {row['length']:6}  {told}")
    if options.check_only:
        return 0 if passed(checks) else 1
    ceiling, timings, notes = ceiling_of(device), [], []
    for length in LENGTHS:
        for name in NAMES:
            stores = name == "masked topk"
            if time.monotonic() - started > SECONDS or (stores and length > STORED):
                continue
            plan = Plan(device, torch.bfloat16, (length,), TOKENS, HEADS, WIDTH, SPARSITY, options.rounds)
            try:
                done = list(measure(plan, chosen([name]), notes.append))
            except (ConfigurationError, RuntimeError) as error:
                notes.append(f"{name} at {length}: {str(error).splitlines()[0]}")
                torch.cuda.empty_cache()
                continue
            known = {(timing.variant, timing.length) for timing in timings}
            timings += [timing for timing in done if (timing.variant, timing.length) not in known]
    rows = summary(timings, LENGTHS, ceiling)
    print("\n".join(line(row) for row in rows))
    said = sanitize() if time.monotonic() - started < SECONDS - 130 else {"all": "not measured: no time was left"}
    record = {
        "machine": machine(device), "ceiling": asdict(ceiling), "checks": checks, "passed": passed(checks),
        "sanitizer": said, "notes": sorted(set(notes)), "rows": rows,
        "timings": [asdict(timing) for timing in timings],
    }  # fmt: skip
    options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if passed(checks) else 1


if __name__ == "__main__":
    sys.exit(main())
