"""The command that finds out which sparsity suits a model and data. Heavy imports stay inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from crisp_attention.cli.application import command
from crisp_attention.cli.options import DryRun, Jobs, Label, Out, Subset, Test, Text, TextPair


@command
def tune(
    data: Annotated[
        str,
        typer.Argument(
            help="Your data: a file (CSV, TSV, JSONL, Parquet), a folder, a packaged data set, or a hub name.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str, typer.Option(metavar="NAME", help="minilm-l6 (packaged), a folder, or a hub name.")
    ] = "minilm-l6",
    text: Text = None,
    text_pair: TextPair = None,
    label: Label = None,
    subset: Subset = None,
    test: Test = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="How long it may take, as 2h, 1h30m or 90s (default: 20 trials, 10 seeds)."),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(metavar="N", help="Trials of each arm (default: as many as fit the budget).")
    ] = None,
    seeds_per_trial: Annotated[
        int,
        typer.Option(metavar="N", help="Seeds that each trial is trained with; their mean loss judges it."),
    ] = 1,
    seeds: Annotated[
        int | None,
        typer.Option(metavar="N", help="Seeds of each arm to confirm it with. Fewer than 6 give no verdict."),
    ] = None,
    epochs: Annotated[int, typer.Option(metavar="N", help="Passes over the training examples.")] = 3,
    max_length: Annotated[int, typer.Option(metavar="N", help="Tokens after which a text is cut.")] = 128,
    train_examples: Annotated[
        int | None, typer.Option(metavar="N", help="Use only so many of the training examples.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="An Optuna storage that machines share, as postgresql://... or sqlite:///x.db."
        ),
    ] = None,
    out: Out = None,
    jobs: Jobs = None,
    dry_run: DryRun = False,
) -> None:
    """Which sparsity for my model and my data? Searches, confirms, and saves the model that is recommended.

    Tunes sparse and dense attention alike on data held out from the training split, compares the two with fresh seeds
    on the evaluation split, and saves the sparse model under FOLDER/model if it is shown to help, else the dense one.

    Examples:
      crisp tune reviews.csv --label stars --budget 2h
      crisp tune sms-spam --trials 20 --seeds 10 --dry-run
      crisp tune trec --storage sqlite:///trials.db
    """
    from crisp_attention.experiment import recommendation, search_space, study
    from crisp_attention.experiment.display import TerminalDisplay, show_result

    given = {
        "source": data,
        "text": text,
        "text_pair": text_pair,
        "label": label,
        "subset": subset,
        "test": test,
        "train_examples": train_examples,
        "max_length": max_length,
    }
    wish = recommendation.Wish(budget, trials, seeds, jobs, storage, seeds_per_trial)
    console = Console()
    display = TerminalDisplay(console)
    folder = out or Path("runs") / search_space.name_of(data, model)
    try:
        wish.check()
        question = search_space.ask(
            given, model, {"epochs": epochs}, display.announce, seeds_per_trial=wish.seeds_per_trial
        )
        for note in question.notes:
            display.announce(note)
        spec = recommendation.settle(question, wish, folder, display.announce)
        plan = study.prepare(spec, folder, display, jobs, storage=storage, keep=True)
        display.present(plan)
        if dry_run:
            return
        analysis, page = study.carry_out(plan, display)
        saved = recommendation.save(analysis, folder)
    except KeyboardInterrupt:
        console.print(study.interrupted(folder, "command"), markup=False)
        raise typer.Exit(130) from None
    show_result(console, analysis)
    if saved is not None:
        console.print(f"Model: {saved.folder}. {saved.why}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Report: {page}", markup=False, highlight=False, soft_wrap=True)
    if saved is None or any(arm.troubled or arm.missing for arm in analysis.arms):
        raise typer.Exit(1)
