"""`crisp export`: a study for other tools. Heavy imports stay inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from crisp_attention.cli.application import command


@command
def export(
    folder: Annotated[Path, typer.Argument(help="Run directory, as runs/quick.", show_default=False)],
    to: Annotated[
        Literal["parquet", "csv", "mlflow"],
        typer.Option("--to", help="Two tables, runs and predictions, or one MLflow run a record.", show_default=False),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="A folder (default: export/ in the run directory), or MLflow's tracking URI (default: "
            "MLFLOW_TRACKING_URI, or a database in the run directory).",
        ),
    ] = None,
) -> None:
    """Export a study: a table with a row a run, and one with a row a prediction.

    Reads the records alone, and needs no torch. Exporting again replaces what was exported, and doubles nothing.

    Examples:
      crisp export runs/quick --to parquet
      crisp export runs/quick --to csv --out tables
      crisp export runs/quick --to mlflow
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
    from crisp_attention.experiment.export import files

    for path in files.export(store, to, folder / "export" if out is None else Path(out)):
        typer.echo(str(path))
