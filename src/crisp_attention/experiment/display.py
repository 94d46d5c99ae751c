"""Progress in a terminal: one bar for the study, one for each run in training. Plain lines elsewhere."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table as RichTable
from rich.text import Text

from crisp_attention.experiment import progress
from crisp_attention.experiment.conclusions.analysis import Analysis
from crisp_attention.experiment.conclusions.verdict import Verdict
from crisp_attention.experiment.data.dataset import Dataset
from crisp_attention.experiment.execution.worker import Event
from crisp_attention.experiment.outline import SETTINGS, outline
from crisp_attention.experiment.progress import Progress
from crisp_attention.experiment.report import tables
from crisp_attention.experiment.specification.runs import PlannedRun
from crisp_attention.experiment.study import Plan

if TYPE_CHECKING:
    from crisp_attention.huggingface.audit import AuditReport

_COLOURS = {"helps": "green", "hurts": "red", "equivalent": "cyan", "inconclusive": "yellow", "no verdict": "yellow"}
_STYLES = {"ended": "", "trouble": "red", "note": "yellow"}
_Receiver = Callable[[PlannedRun | None, Event], None]
_WIDE_ENOUGH = 76
"""Columns for a plan that says what each arm is."""
_BESIDE_NAMES = 64
"""Columns that the final table takes beside the names of arms."""


class TerminalDisplay:
    """Shows a study's progress on a Rich console.

    Args:
        console: Where to; anything but a terminal gets a line an ended run.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def announce(self, message: str) -> None:
        """Say what happens next."""
        self.console.print(f"[dim]{escape(message)}[/dim]", highlight=False)

    def present(self, plan: Plan) -> None:
        """Show what is about to be done."""
        show_plan(self.console, plan)

    def tuning(self, plan: Plan) -> AbstractContextManager[_Receiver]:
        """Show the trials of a plan while they are trained."""
        return self._show(progress.of_trials(plan))

    def training(self, plan: Plan) -> AbstractContextManager[_Receiver]:
        """Show the runs of a plan while they are trained."""
        return self._show(progress.of_runs(plan))

    @contextlib.contextmanager
    def _show(self, board: Progress) -> Iterator[_Receiver]:
        def receive(planned: PlannedRun | None, event: Event) -> None:
            line = board.receive(planned, event)
            if line is not None:
                left = "" if self.console.is_terminal or line.kind == "note" else board.left
                text = "; ".join(filter(None, (line.text, left)))
                text = ": ".join(filter(None, (text, line.reason)))
                self.console.print(Text(text, style=_STYLES[line.kind]), highlight=False, soft_wrap=True)

        if not self.console.is_terminal:
            yield receive
            return
        with Live(get_renderable=lambda: _bars(board), console=self.console, refresh_per_second=4, transient=True):
            yield receive


def _bars(board: Progress) -> RenderableType:
    """A bar for the whole as wide as the terminal, and one for each in training."""
    whole, runs = RichTable.grid(padding=(0, 1, 0, 0), expand=True), RichTable.grid(padding=(0, 1, 0, 0))
    whole.add_column(no_wrap=True)
    whole.add_column(ratio=1)
    whole.add_row(
        Text(f"all {board.kind}", style="bold"),
        ProgressBar(board.total, board.done),
        Text(f"{board.ended} of {board.total}"),
        Text(board.left),
    )
    for item in board.running:
        runs.add_row(
            Text(item.label),
            ProgressBar(item.steps, item.step, width=24),
            Text(f"step {item.step} of {item.steps}"),
            Text(f"loss {item.loss:.3f}"),
        )
    return Group(whole, runs)


def show_plan(console: Console, plan: Plan) -> None:
    """Print what an experiment consists of, what of it is done, and how long the rest will take."""
    told = outline(plan)
    console.print(Text.assemble((told.name, "bold"), f": {told.size}"))
    for note in told.notes:
        console.print(note, style="dim", markup=False, highlight=False)
    # In a narrow terminal an arm's name has to do.
    places = [place for place, name in enumerate(told.arms.header) if name != SETTINGS or console.width >= _WIDE_ENOUGH]
    header = [told.arms.header[place] for place in places]
    table = _table(*header)
    for column, name in zip(table.columns[1:], header[1:], strict=True):
        if name not in told.arms.prose:
            column.justify, column.no_wrap = "right", True
    for row in told.arms.rows:
        table.add_row(*(Text(row[place]) for place in places))
    console.print(table)
    if told.trouble:
        console.print(f"{told.trouble}; --retry does them again.", style="yellow")
    for number, line in enumerate(told.tuning):
        console.print(f"{'  ' * bool(number)}{line}", markup=False, highlight=False)
    on = "" if told.done else f" Ctrl-C is safe: the same command goes on in {plan.folder}."
    console.print(f"{told.todo}{on}", markup=False, highlight=False)


def show_result(console: Console, analysis: Analysis) -> None:
    """Print the final table, the verdict and its cautions."""
    content = tables.summary(analysis)
    # In a narrow terminal names stay whole, and accuracy has to do.
    wide = console.width >= _BESIDE_NAMES + max(len(row[0]) for row in content.rows)
    places = [place for place, name in enumerate(content.header) if name != "correct" or wide]
    table = _table(*(content.header[place] for place in places), numbers=True)
    for row in content.rows:
        table.add_row(*(Text(row[place]) for place in places))
    console.print(table)
    console.print(content.caption, style="dim", markup=False, highlight=False)
    console.print(_verdict_panel(analysis.verdict, analysis.cautions))


def _verdict_panel(verdict: Verdict, cautions: tuple[str, ...]) -> Panel:
    colour = _COLOURS[verdict.word]
    lines = [Text(verdict.headline, style=f"bold {colour}")]
    lines += [Text(sentence) for sentence in verdict.details]
    lines += [Text(sentence, style="dim") for sentence in cautions]
    return Panel(Group(*lines), title="verdict", title_align="left", border_style=colour)


def show_packaged(console: Console, packaged: Mapping[str, str]) -> None:
    """List the data sets that come from the package index."""
    table = _table("data set", "what it holds")
    for name, description in packaged.items():
        table.add_row(name, Text(description))
    console.print(table)
    console.print(
        "Also: a GLUE folder, a folder of images (train/CLASS/FILE), a CSV/TSV/JSONL/Parquet file, or the name of a "
        "data set on the hub."
    )


def show_dataset(console: Console, dataset: Dataset) -> None:
    """Show sizes, classes and a few examples of a data set."""
    console.print(dataset.name, style="bold", markup=False)
    table = _table("class", "training", "evaluation", "an example")
    for index, name in enumerate(dataset.classes):
        rows = (dataset.train.labels == index).nonzero()[0]
        example = dataset.train.texts[rows[0]] if len(rows) and dataset.train.texts else ""
        counts = (str((split.labels == index).sum()) for split in (dataset.train, dataset.test))
        table.add_row(Text(name), *counts, Text(textwrap.shorten(example, 90, placeholder=" ...")))
    console.print(table)
    for note in dataset.notes:
        console.print(note, markup=False, highlight=False)


def _table(*header: str, numbers: bool = False) -> RichTable:
    """An unruled table; with `numbers`, all columns but the first are flush right."""
    table = RichTable(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for position, name in enumerate(header):
        table.add_column(name, justify="right" if numbers and position else "left", overflow="fold")
    return table


def show_audit(console: Console, report: AuditReport) -> None:
    """Print the verdict on a model and what each check of its audit measured.

    Args:
        console: Where to; long sentences wrap in their column.
        report: What `crisp.audit` returned.
    """
    colours = {"ok": "green", "failed": "bold red", "not applicable": "dim"}
    console.print(Text(f"\nAudit of {report.model}, with rule topk whichever rule is asked for:"))
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("check", overflow="fold")
    table.add_column("outcome", overflow="fold")
    table.add_column("measured", overflow="fold")
    for check in report.checks:
        table.add_row(check.name, Text(check.outcome, colours[check.outcome]), Text(check.detail))
    console.print(table)
    colour = {"served": "green", "served with limits": "yellow", "refused": "red"}[report.verdict]
    console.print(Text.assemble((report.model, "bold"), ": ", (report.verdict, f"bold {colour}")))
    for reason in report.reasons:
        console.print(Text(reason))
