"""The command about data sets. Heavy imports stay inside."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from crisp_attention.cli.application import command
from crisp_attention.cli.options import Label, Subset, Test, Text, TextPair


@command
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
    from crisp_attention.experiment.specification.sections import DataSpec

    source = DataSpec(source=name, text=text, text_pair=text_pair, label=label, subset=subset, test=test)
    show_dataset(console, load(source))
