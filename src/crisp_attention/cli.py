"""`crisp`: each command is a few lines that call a room of the package. Heavy imports stay inside."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

from crisp_attention.errors import ConfigurationError, CrispError
from crisp_attention.traits import RULES


def _needs_extra(missing: ModuleNotFoundError) -> str:
    return (
        f"The crisp command needs the extra 'experiment' ({missing.name} is missing): "
        "pip install 'crisp-attention[experiment]'"
    )


try:
    import typer
    from rich.console import Console
    from rich.markup import escape
except ModuleNotFoundError as missing:  # the core installs without the command line
    sys.exit(_needs_extra(missing))


if TYPE_CHECKING:
    from crisp_attention.experiment.specification.spec import ExperimentSpec

app = typer.Typer(
    name="crisp",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Let a Transformer attend to less, and find out honestly whether it helps.",
)

Seeds = Annotated[int | None, typer.Option(min=1, max=1000, help="Runs per arm. Fewer than 6 give no verdict.")]
Out = Annotated[Path | None, typer.Option(help="Run directory (default: runs/NAME). The same command resumes in it.")]
Jobs = Annotated[
    int | None, typer.Option(min=1, help="Runs side by side; the cores are split between them (default: one a core).")
]
Text = Annotated[str | None, typer.Option(help="Column of the text (default: found by its usual names).")]
Label = Annotated[str | None, typer.Option(help="Column of the label (default: found by its usual names).")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop; writes nothing.")]
Retry = Annotated[bool, typer.Option("--retry", help="Do diverged and failed runs again.")]


@app.command()
def reproduce(
    preset: Annotated[
        str | None,
        typer.Option(
            help="quick: minutes, offline. paper: the published setting, needs the hub. controls, small-data, "
            "label-noise, robustness, images: what each asks, its description says. "
            "Default: quick, or images for a model without weights."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="minilm-l6 (packaged), tiny-vit (from scratch), a folder, or a hub name."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="A packaged data set, a GLUE folder, a folder of images, a CSV/TSV/JSONL/Parquet file, or a hub name."
        ),
    ] = None,
    text: Text = None,
    label: Label = None,
    seeds: Seeds = None,
    out: Out = None,
    jobs: Jobs = None,
    retry: Retry = False,
    dry_run: DryRun = False,
) -> None:
    """Run the paper's experiment: dense attention against three sparsities.

    Examples:
      crisp reproduce

      crisp reproduce --dry-run

      crisp reproduce --seeds 10

      crisp reproduce --dataset reviews.csv --text review --label stars

      crisp reproduce --preset paper --model minilm-l6 --dataset path/to/SST-2

      crisp reproduce --model tiny-vit --dataset digits
    """
    from crisp_attention.experiment.specification.spec import preset as find
    from crisp_attention.experiment.training.model import ARCHITECTURES

    preset = preset or ("images" if model in ARCHITECTURES else "quick")
    spec = find(preset)
    if model is not None:
        spec = spec.model_copy(update={"model": model})
    if dataset is not None:
        from crisp_attention.experiment.data.dataset import fit_limits

        own = {"source": dataset, "subset": None, "text": text, "label": label}
        spec = spec.model_copy(update={"data": spec.data.model_copy(update=own)})
        spec = fit_limits(spec, lambda message: typer.echo(message))
    elif text is not None or label is not None:
        raise ConfigurationError("--text and --label name columns of --dataset, which is missing.")
    named = [Path(name).name for name in (model, dataset) if name is not None]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join([preset, *named]))[:60]
    _run(spec.model_copy(update={"name": name}), seeds, out, jobs, retry, dry_run)


@app.command()
def run(
    spec: Annotated[Path, typer.Argument(help="Experiment in TOML.", show_default=False)],
    seeds: Seeds = None,
    out: Out = None,
    jobs: Jobs = None,
    retry: Retry = False,
    dry_run: DryRun = False,
) -> None:
    """Run an experiment of your own: any arms x seeds, on your data; resumable.

    Prints the plan first: what there is to do, what is done already, how long it will take.

    Examples:
      crisp run experiment.toml --dry-run

      crisp run experiment.toml --seeds 10
    """
    from crisp_attention.experiment.specification.spec import read

    _run(read(spec), seeds, out, jobs, retry, dry_run)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Run directory, as runs/quick.", show_default=False)]) -> None:
    """Rebuild statistics, tables, plots and pages from the records alone.

    Example:
      crisp report runs/quick
    """
    from crisp_attention.experiment import study
    from crisp_attention.experiment.display import show_result

    analysis, page = study.rebuild(folder)
    console = Console()
    show_result(console, analysis)
    console.print(f"Report: {page}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="minilm-l6 (packaged), a folder, or a hub name.", show_default=False)],
    sparsity: Annotated[
        float | None, typer.Option(help="Share of scores to remove, in [0, 1); the rule's own default if not given.")
    ] = None,
    rule: Annotated[str, typer.Option(help=f"Which scores survive: {', '.join(RULES)}.")] = "topk",
) -> None:
    """Is a model served correctly, does sparsity reach every layer, and what does it realise?

    Prints each layer and then the audit: every promise measured on a copy of the model. Exit code 0
    if the model is served, with or without limits, 1 if the audit finds something wrong, 2 if it
    cannot be made sparse at all.

    Example:
      crisp check minilm-l6 --rule percentile
    """
    from crisp_attention.config import SparsityConfig

    config = SparsityConfig(sparsity=sparsity, rule=rule)
    from crisp_attention.experiment.training.model import resolve

    console = Console(stderr=True)
    checkpoint = resolve(model, lambda message: console.print(message, style="dim", markup=False, highlight=False))
    from transformers import AutoModel
    from transformers.utils import logging

    from crisp_attention.experiment.display import show_audit
    from crisp_attention.huggingface.audit import audit
    from crisp_attention.huggingface.check import check as probe
    from crisp_attention.huggingface.model import sparsify

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    network = AutoModel.from_pretrained(checkpoint.folder)
    report = audit(network)
    if report.checks:
        if report.served:
            typer.echo(str(probe(sparsify(network, config))))
        show_audit(Console(), report)
    else:
        sparsify(network, config)  # raises with the reason
    if not report.served:
        raise typer.Exit(1)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="minilm-l6 (packaged), a folder, or a hub name.", show_default=False)],
    text: Annotated[str, typer.Argument(help="What the model reads, in quotes.", show_default=False)],
    pair: Annotated[str | None, typer.Option(help="A second text, for models of sentence pairs.")] = None,
    rule: Annotated[
        str | None,
        typer.Option(help=f"Which scores survive (default: as the model was saved, else topk): {', '.join(RULES)}."),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of scores removed at first, in [0, 1); the page's slider moves it.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("attention.html"),
) -> None:
    """Write an interactive page of a model's attention to one text: every head, dense beside sparse.

    Examples:
      crisp inspect minilm-l6 "a sentence"

      crisp inspect minilm-l6 "One sentence." --pair "And another." --rule percentile --sparsity 0.9
    """
    from crisp_attention.experiment.inspection import inspect as look
    from crisp_attention.experiment.report.attention import render_attention
    from crisp_attention.experiment.training.model import resolve

    console = Console(stderr=True)
    checkpoint = resolve(model, lambda message: console.print(message, style="dim", markup=False, highlight=False))
    out.write_text(render_attention(look(checkpoint, text, pair, rule, sparsity)), encoding="utf-8")
    Console().print(f"Attention page: {out}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def data(
    name: Annotated[str | None, typer.Argument(help="A packaged data set, a folder, a file, or a hub name.")] = None,
    text: Text = None,
    label: Label = None,
) -> None:
    """List the packaged data sets, or show what one source looks like.

    Examples:
      crisp data

      crisp data trec

      crisp data reviews.csv --text review --label stars
    """
    from crisp_attention.experiment.data.sources import PACKAGED
    from crisp_attention.experiment.display import show_dataset, show_packaged

    console = Console()
    if name is None:
        show_packaged(console, PACKAGED)
        return
    from crisp_attention.experiment.data.dataset import load
    from crisp_attention.experiment.specification.spec import DataSpec

    show_dataset(console, load(DataSpec(source=name, text=text, label=label)))


def _run(
    spec: ExperimentSpec, seeds: int | None, out: Path | None, jobs: int | None, retry: bool, dry_run: bool
) -> None:
    from crisp_attention.experiment import study
    from crisp_attention.experiment.display import TerminalDisplay, show_plan, show_result
    from crisp_attention.experiment.specification.spec import parse, to_plain

    if seeds is not None:
        spec = parse(to_plain(spec) | {"seeds": seeds}, f"--seeds {seeds}")
    folder = out or Path("runs") / spec.name
    console = Console()
    display = TerminalDisplay(console)
    try:
        plan = study.prepare(spec, folder, display, jobs, retry)
        show_plan(console, plan)
        if dry_run:
            return
        analysis, page = study.carry_out(plan, display)
    except KeyboardInterrupt:
        console.print(
            f"Interrupted. Finished runs are kept in {folder}; the same command goes on from there.", markup=False
        )
        raise typer.Exit(130) from None
    show_result(console, analysis)
    console.print(f"Report: {page}", markup=False, highlight=False, soft_wrap=True)
    if any(arm.troubled or arm.missing for arm in analysis.arms):
        raise typer.Exit(1)


def main() -> NoReturn:
    """Entry point: errors that the user can mend are one sentence and exit code 2."""
    # Results must not depend on telemetry or progress bars of libraries underneath.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app()
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] == "crisp_attention":
            raise
        sys.exit(_needs_extra(missing))
    except BrokenPipeError:
        # The reader (as `head`) has seen enough; keep Python from complaining when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (CrispError, OSError) as error:
        Console(stderr=True).print("[bold red]Error:[/bold red]", escape(str(error)), highlight=False, soft_wrap=True)
        sys.exit(2)
    sys.exit(0)


if __name__ == "__main__":
    main()
