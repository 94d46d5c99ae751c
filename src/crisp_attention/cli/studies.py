"""Commands that do or rebuild an experiment. Heavy imports stay inside."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from crisp_attention.cli.application import command
from crisp_attention.cli.options import (
    DryRun,
    From,
    Jobs,
    Label,
    On,
    Out,
    Part,
    ReportTo,
    Retry,
    Seeds,
    Subset,
    Test,
    Text,
    TextPair,
)
from crisp_attention.errors import ConfigurationError

if TYPE_CHECKING:
    from crisp_attention.experiment.specification.spec import ExperimentSpec


def _of_all_ranks(body: Callable[..., None]) -> Callable[..., None]:
    """A command that processes of a launcher do together: its body is that of rank 0, or of one process without."""

    @functools.wraps(body)
    def command(*arguments: Any, **keywords: Any) -> None:
        from crisp_attention.experiment.execution.distributed import launched

        with launched() as leads:
            if leads:
                body(*arguments, **keywords)

    return command


@command
@_of_all_ranks
def reproduce(
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="quick: minutes, offline. paper: the published setting, needs the hub. Others: controls, small-data, "
            "label-noise, robustness, images. Default: quick, or images for a model without weights.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="minilm-l6 (packaged), tiny-vit (from scratch), a folder, or a hub name."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A packaged data set, a GLUE folder, a folder of images, a file (CSV, TSV, JSONL, Parquet), or a hub "
            "name.",
        ),
    ] = None,
    text: Text = None,
    text_pair: TextPair = None,
    label: Label = None,
    subset: Subset = None,
    test: Test = None,
    seeds: Seeds = None,
    out: Out = None,
    jobs: Jobs = None,
    on: On = "local",
    shard: Part = None,
    source: From = None,
    retry: Retry = False,
    report_to: ReportTo = None,
    dry_run: DryRun = False,
) -> None:
    """Run the paper's experiment: dense attention against three sparsities.

    Prints the plan first: what is to do, what is done already, how long it will take.

    Examples:
      crisp reproduce
      crisp reproduce --dry-run
      crisp reproduce --seeds 10
      crisp reproduce --dataset reviews.csv --label stars
      crisp reproduce --preset paper --dataset SST-2
      crisp reproduce --model tiny-vit --dataset digits
    """
    from crisp_attention.experiment.specification.spec import preset as find
    from crisp_attention.experiment.training.model import ARCHITECTURES

    parts = {"text": text, "text_pair": text_pair, "label": label, "subset": subset, "test": test}
    preset = preset or ("images" if model in ARCHITECTURES else "quick")
    spec = find(preset)
    if model is not None:
        spec = spec.model_copy(update={"model": model})
    if dataset is not None:
        from crisp_attention.experiment.data.dataset import fit_limits

        own = {"source": dataset, **parts}
        spec = spec.model_copy(update={"data": spec.data.model_copy(update=own)})
        spec = fit_limits(spec, lambda message: typer.echo(message))
    elif given := [f"--{name.replace('_', '-')}" for name, value in parts.items() if value is not None]:
        raise ConfigurationError(f"{' and '.join(given)} must go with --dataset, which is missing.")
    named = [Path(name).name for name in (model, dataset) if name is not None]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join([preset, *named]))[:60]
    spec = _tracked(spec.model_copy(update={"name": name}), report_to)
    _run(spec, seeds, out, jobs, on, shard, source, retry, dry_run)


@command
@_of_all_ranks
def run(
    spec: Annotated[Path, typer.Argument(help="Experiment in TOML.", show_default=False)],
    seeds: Seeds = None,
    out: Out = None,
    jobs: Jobs = None,
    on: On = "local",
    shard: Part = None,
    source: From = None,
    retry: Retry = False,
    report_to: ReportTo = None,
    dry_run: DryRun = False,
) -> None:
    """Run an experiment of your own: any arms x seeds, on your data; resumable.

    Prints the plan first: what is to do, what is done already, how long it will take.

    Examples:
      crisp run experiment.toml --dry-run
      crisp run experiment.toml --seeds 10
      crisp run experiment.toml --report-to tensorboard
      crisp run experiment.toml --on ray://head:10001
      crisp run experiment.toml --shard 3/20
      crisp run experiment.toml --from results/published
    """
    from crisp_attention.experiment.specification.spec import read

    _run(_tracked(read(spec), report_to), seeds, out, jobs, on, shard, source, retry, dry_run)


@command
def report(folder: Annotated[Path, typer.Argument(help="Run directory, as runs/quick.", show_default=False)]) -> None:
    """Rebuild statistics, tables, plots and pages from the records alone.

    Trains nothing and needs no torch.

    Examples:
      crisp report runs/quick
    """
    from crisp_attention.experiment import study
    from crisp_attention.experiment.display import show_result

    analysis, page = study.rebuild(folder)
    console = Console()
    show_result(console, analysis)
    console.print(f"Report: {page}", markup=False, highlight=False, soft_wrap=True)


def _tracked(spec: ExperimentSpec, report_to: list[str] | None) -> ExperimentSpec:
    """With the trackers that were named, if any were, in place of the specification's own."""
    from crisp_attention.experiment.specification.tracking import TrackingSpec

    return spec.model_copy(update={"tracking": TrackingSpec(report_to=tuple(report_to))}) if report_to else spec


def _run(
    spec: ExperimentSpec,
    seeds: int | None,
    out: Path | None,
    jobs: int | None,
    on: str,
    shard: str | None,
    source: Path | None,
    retry: bool,
    dry_run: bool,
) -> None:
    from crisp_attention.cli import slurm
    from crisp_attention.experiment import study
    from crisp_attention.experiment.display import TerminalDisplay, show_result
    from crisp_attention.experiment.execution.choice import choose
    from crisp_attention.experiment.specification.shards import Shard
    from crisp_attention.experiment.specification.spec import with_seeds

    part = None if shard is None else Shard.parse(shard)
    spec = with_seeds(spec, seeds)
    folder = study.directory(spec, out)
    console = Console()
    display = TerminalDisplay(console)
    try:
        with contextlib.closing(choose(on, spec.resources)) as executor:
            plan = study.prepare(spec, folder, display, jobs, retry, executor=executor, shard=part, source=source)
            display.present(plan)
            if dry_run:
                if plan.pending and on == "local":
                    shards = spec.seeds if part is None else part.of
                    console.print(f"As a Slurm array of {shards}:", style="dim")
                    # The shell must get it in one line.
                    typer.echo(slurm.array(sys.argv[1:], spec.resources, shards))
                return
            analysis, page = study.carry_out(plan, display)
    except KeyboardInterrupt:
        console.print(study.interrupted(folder, "command"), markup=False)
        raise typer.Exit(130) from None
    show_result(console, analysis)
    console.print(f"Report: {page}", markup=False, highlight=False, soft_wrap=True)
    if part is not None:
        if study.unfinished(folder, part):
            raise typer.Exit(1)
    elif any(arm.troubled or arm.missing for arms in analysis.by_condition.values() for arm in arms):
        raise typer.Exit(1)
