"""`crisp`: each command is a few lines that call a room of the package. Heavy imports stay inside."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from crisp_attention import __version__
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
    from typer.core import TyperCommand, TyperGroup
except ModuleNotFoundError as missing:  # the core installs without the command line
    sys.exit(_needs_extra(missing))


if TYPE_CHECKING:
    from crisp_attention.experiment.specification.spec import ExperimentSpec


def _without_types_of_flags(options: list[Any]) -> list[Any]:
    """Options as the help shows them: a flag takes no value, so none is named."""
    for option in options:
        if getattr(option, "is_flag", False):
            option.metavar = ""
    return options


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types_of_flags(super().get_params(ctx))


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types_of_flags(super().get_params(ctx))


app = typer.Typer(
    name="crisp",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="minilm-l6 (packaged), a folder, or a hub name.", show_default=False)]
Seeds = Annotated[int | None, typer.Option(metavar="N", help="Runs per arm. Fewer than 6 give no verdict.")]
Out = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Run directory (default: runs/NAME). The same command resumes in it."),
]
Jobs = Annotated[
    int | None,
    typer.Option(metavar="N", help="Runs side by side; the cores are split between them (default: one a core)."),
]
Text = Annotated[str | None, typer.Option(metavar="COLUMN", help="The text (default: found by its usual names).")]
TextPair = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="The second text of a pair (default: by its usual names, or none).")
]
Label = Annotated[str | None, typer.Option(metavar="COLUMN", help="The label (default: found by its usual names).")]
Subset = Annotated[str | None, typer.Option(metavar="NAME", help="Configuration of a hub data set.")]
Test = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="The evaluation split (default: the source's own, or carved from it)."),
]
Retry = Annotated[bool, typer.Option("--retry", help="Do diverged and failed runs again.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop; writes nothing.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"crisp-attention {__version__}")
        raise typer.Exit


@app.callback()
def crisp(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Let a Transformer attend to less, and find out honestly whether it helps."""


@app.command(cls=_Command)
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
    retry: Retry = False,
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
    _run(spec.model_copy(update={"name": name}), seeds, out, jobs, retry, dry_run)


@app.command(cls=_Command)
def run(
    spec: Annotated[Path, typer.Argument(help="Experiment in TOML.", show_default=False)],
    seeds: Seeds = None,
    out: Out = None,
    jobs: Jobs = None,
    retry: Retry = False,
    dry_run: DryRun = False,
) -> None:
    """Run an experiment of your own: any arms x seeds, on your data; resumable.

    Prints the plan first: what is to do, what is done already, how long it will take.

    Examples:
      crisp run experiment.toml --dry-run
      crisp run experiment.toml --seeds 10
    """
    from crisp_attention.experiment.specification.spec import read

    _run(read(spec), seeds, out, jobs, retry, dry_run)


@app.command(cls=_Command)
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


@app.command(cls=_Command)
def check(
    model: Model,
    sparsity: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Share of scores to remove, in [0, 1) (default: the rule's own)."),
    ] = None,
    rule: Annotated[str, typer.Option(metavar="RULE", help=f"Which scores survive: {', '.join(RULES)}.")] = "topk",
) -> None:
    """Is a model served correctly, does sparsity reach every layer, and what does it realise?

    First each layer under the rule asked for, then the audit: every promise, measured on a copy.

    The audit is of the model, not of the rule: it is made with rule topk whichever is asked for.

    Exit code 0: served, with or without limits. 1: the audit finds something wrong. 2: it cannot be made sparse.

    Examples:
      crisp check minilm-l6
      crisp check minilm-l6 --rule percentile --sparsity 0.9
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


@app.command(cls=_Command)
def inspect(
    model: Model,
    text: Annotated[str, typer.Argument(help="What the model reads, in quotes.", show_default=False)],
    pair: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A second text, for models of sentence pairs.")
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help=f"Which scores survive (default: as the model was saved, else topk): {', '.join(RULES)}.",
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Share of scores removed at first, in [0, 1); the page's slider moves it."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page to write.")] = Path("attention.html"),
) -> None:
    """Write an interactive page of a model's attention to one text: every head, dense beside sparse.

    One file that needs no network.

    Examples:
      crisp inspect minilm-l6 "a sentence" --rule percentile
      crisp inspect minilm-l6 "One." --pair "Another."
    """
    from crisp_attention.experiment.inspection import inspect as look
    from crisp_attention.experiment.report.attention import render_attention
    from crisp_attention.experiment.training.model import resolve

    console = Console(stderr=True)
    checkpoint = resolve(model, lambda message: console.print(message, style="dim", markup=False, highlight=False))
    out.write_text(render_attention(look(checkpoint, text, pair, rule, sparsity)), encoding="utf-8")
    Console().print(f"Attention page: {out}", markup=False, highlight=False, soft_wrap=True)


@app.command(cls=_Command)
def data(
    name: Annotated[str | None, typer.Argument(help="A packaged data set, a folder, a file, or a hub name.")] = None,
    text: Text = None,
    text_pair: TextPair = None,
    label: Label = None,
    subset: Subset = None,
    test: Test = None,
) -> None:
    """List the packaged data sets, or show what one source looks like.

    Shows classes, sizes and an example of each, and what was dropped.

    Examples:
      crisp data
      crisp data trec
      crisp data reviews.csv --text review --label stars
      crisp data glue --subset mrpc
    """
    from crisp_attention.experiment.data.sources import PACKAGED
    from crisp_attention.experiment.display import show_dataset, show_packaged

    console = Console()
    if name is None:
        show_packaged(console, PACKAGED)
        return
    from crisp_attention.experiment.data.dataset import load
    from crisp_attention.experiment.specification.spec import DataSpec

    source = DataSpec(source=name, text=text, text_pair=text_pair, label=label, subset=subset, test=test)
    show_dataset(console, load(source))


@app.command(cls=_Command)
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
    from crisp_attention.bench.measure import Plan, measure
    from crisp_attention.bench.variants import chosen

    where = _device(device)
    if threads is not None:
        if threads < 1:
            raise ConfigurationError(f"--threads must be at least 1, got {threads}.")
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


def _device(name: str) -> Any:
    """A torch device that exists."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"--device must be cpu or cuda, got {name!r}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("--device cuda: torch sees no GPU here.")
    return device


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
