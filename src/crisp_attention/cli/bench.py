"""The command that measures speed. Heavy imports stay inside."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from crisp_attention.cli.application import command
from crisp_attention.errors import ConfigurationError


@command
def bench(
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu, or cuda where there is one.")] = "cpu",
    length: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Tokens of a sequence; repeatable (default 32 to 1024).")
    ] = None,
    variant: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="What to time beside sdpa; repeatable (default: all).")
    ] = None,
    sparsity: Annotated[float, typer.Option(metavar="SHARE", help="Share of scores to remove, in (0, 1).")] = 0.8,
    heads: Annotated[int, typer.Option(metavar="H", help="Attention heads.")] = 12,
    width: Annotated[int, typer.Option(metavar="D", help="Width of a head.")] = 64,
    tokens: Annotated[int, typer.Option(metavar="COUNT", help="Tokens in a batch.")] = 4096,
    rounds: Annotated[int, typer.Option(metavar="COUNT", help="How often each is timed.")] = 7,
    threads: Annotated[
        int | None, typer.Option(metavar="COUNT", help="Threads on a processor (default: as torch has it).")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write bench.json and bench.svg there.")] = None,
) -> None:
    """What does attention cost on this machine, beside dense attention and peers?

    Times forward and backward passes of all variants in turn; ratios are formed within each round.

    Examples:
      crisp bench
      crisp bench --length 256 --length 512 --variant "cpu topk"
      crisp bench --threads 1 --out results/bench
    """
    import torch

    from crisp_attention.bench import results
    from crisp_attention.bench.measure import Plan, device_of, measure
    from crisp_attention.bench.variants import chosen

    where = device_of(device)
    if threads is not None:
        most = os.cpu_count() or 1
        if not 1 <= threads <= most:
            raise ConfigurationError(f"--threads must be at least 1 and at most {most}, got {threads}.")
        torch.set_num_threads(threads)
    plan = Plan(
        where,
        torch.float32 if where.type == "cpu" else torch.bfloat16,
        lengths=tuple(dict.fromkeys(length or (32, 64, 128, 256, 512, 1024))),
        tokens=tokens,
        heads=heads,
        width=width,
        sparsity=sparsity,
        rounds=rounds,
    )
    variants = chosen(variant)
    if out is not None:
        results.prepare(out)
    console = Console()
    timings = []
    console.print(results.machine(where)["device"], markup=False)
    with console.status("Measuring ...") as status:
        for timing in measure(plan, variants, lambda line: console.print(line, markup=False, highlight=False)):
            timings.append(timing)
            status.update(f"Measuring ... {timing.variant} at N = {timing.length}: {timing.ratio:.2f} of dense")
    console.print(results.table(plan, timings))
    if out is not None:
        for path in results.save(out, plan, timings):
            console.print(f"Written: {path}", markup=False, highlight=False, soft_wrap=True)
