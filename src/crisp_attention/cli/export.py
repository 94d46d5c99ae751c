"""`crisp export`: a study for other tools. Heavy imports stay inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from crisp_attention.cli.application import command
from crisp_attention.errors import ConfigurationError


@command
def export(
    folder: Annotated[Path, typer.Argument(help="Run directory, as runs/quick.", show_default=False)],
    to: Annotated[
        Literal["parquet", "csv", "mlflow", "study"],
        typer.Option(
            "--to",
            help="Two tables, runs and predictions; one MLflow run a record; or a copy of the study to publish.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="A folder (default: export/ in the run directory), or MLflow's tracking URI (default: "
            "MLFLOW_TRACKING_URI, or a database in the run directory); for a study there is no default.",
        ),
    ] = None,
) -> None:
    """Export a study: a table with a row a run, and one with a row a prediction; or the study itself, to publish.

    Reads the records alone, and needs no torch. Exporting again replaces what was exported, and doubles nothing.
    A published study holds all that its numbers rest on, a report, and no texts.

    Examples:
      crisp export runs/quick --to parquet
      crisp export runs/quick --to csv --out tables
      crisp export runs/quick --to mlflow
      crisp export runs/quick --to study --out results/quick
    """
    from crisp_attention.experiment.results.store import Store

    store = Store(folder)
    if to == "mlflow":
        from crisp_attention.experiment.export import mlflow

        done = mlflow.export(store, out)
        typer.echo(
            f"{done.new} runs written to MLflow, {done.known} there already: {done.uri}, experiment {done.experiment}"
        )
        return
    if to == "study":
        from crisp_attention.experiment.export.study import publish
        from crisp_attention.experiment.study import rebuild

        if out is None:
            raise ConfigurationError("--to study needs --out: the folder that is published.")
        count = publish(store, Path(out))
        typer.echo(f"{count} records in {out}, report: {rebuild(Path(out))[1]}")
        return
    from crisp_attention.experiment.export import files

    for path in files.export(store, to, folder / "export" if out is None else Path(out)):
        typer.echo(str(path))
