"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
From = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="FOLDER",
        help="Another run directory, as a published study: finished runs that this experiment shares are taken over.",
    ),
]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(
        "--report-to",
        metavar="NAME",
        help="Show runs in a tracker: tensorboard, mlflow, wandb, trackio. Repeatable.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop; writes nothing.")]
On = Annotated[
    str,
    typer.Option(
        metavar="WHERE",
        help="local: worker processes here. ray: the cluster of RAY_ADDRESS, or one on this machine. ray://HOST:PORT.",
    ),
]
Part = Annotated[
    str | None,
    typer.Option("--shard", metavar="K/N", help="Only part K of N of the runs, as in a Slurm array (see --dry-run)."),
]
