"""Progress in a terminal: one bar for the study, one for each run in training. Plain lines elsewhere."""

from __future__ import annotations

import contextlib
import json
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table as RichTable
from rich.text import Text

from crisp_attention.experiment.conclusions.analysis import Analysis
from crisp_attention.experiment.conclusions.verdict import Verdict
from crisp_attention.experiment.data.dataset import Dataset
from crisp_attention.experiment.execution.worker import Event
from crisp_attention.experiment.outlook import Outlook
from crisp_attention.experiment.report import tables
from crisp_attention.experiment.results.tuning import Trial
from crisp_attention.experiment.specification.runs import PlannedRun
from crisp_attention.experiment.specification.sections import ArmSpec
from crisp_attention.experiment.specification.tuned import Search
from crisp_attention.experiment.study import Plan

if TYPE_CHECKING:
    from crisp_attention.huggingface.audit import AuditReport

_COLOURS = {"helps": "green", "hurts": "red", "equivalent": "cyan", "inconclusive": "yellow", "no verdict": "yellow"}
_Receiver = Callable[[PlannedRun | None, Event], None]
_WIDE_ENOUGH = 76
"""Columns for a plan that says what each arm is."""


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

    def tuning(self, plan: Plan) -> AbstractContextManager[_Receiver]:
        """Show the trials of a plan while they are trained."""
        todo = plan.tuning
        if todo is None:
            return self._show("trials", {}, 1, _trial)
        expected = {
            _trial_of(arm, number): plan.seconds_a_trial(arm)
            for arm, done in todo.done.items()
            for number in range(done, todo.trials)
        }
        return self._show("trials", expected, todo.division.jobs, _trial)

    def training(self, plan: Plan) -> AbstractContextManager[_Receiver]:
        """Show the runs of a plan while they are trained."""
        expected = {_label(task.run): plan.seconds.get((task.run.arm, task.run.condition)) for task in plan.pending}
        return self._show("runs", expected, plan.division.jobs, _label)

    @contextlib.contextmanager
    def _show(
        self, kind: str, expected: Mapping[str, float | None], jobs: int, label: Callable[[PlannedRun], str]
    ) -> Iterator[_Receiver]:
        board = _Board(kind, expected, jobs, label, self.console)
        if not self.console.is_terminal:
            yield board.receive
            return
        with Live(board.render(), console=self.console, refresh_per_second=4, transient=True) as live:
            board.on_change = lambda: live.update(board.render())
            yield board.receive


class _Board:
    """Progress of what is expected.

    Args:
        kind: What it is called, in the plural.
        expected: Seconds that each is expected to take, by its label; None where nobody knows.
        jobs: How many are done side by side.
        label: What to call one.
        console: Where to show it.
    """

    def __init__(
        self,
        kind: str,
        expected: Mapping[str, float | None],
        jobs: int,
        label: Callable[[PlannedRun], str],
        console: Console,
    ) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._console = console
        self._expected, self._label = expected, label
        self._outlook = Outlook(expected, jobs)
        self._ended = 0
        self._total = len(expected)
        self._fractions: dict[str, float] = {}
        self._study = Progress(
            TextColumn(f"[bold]all {kind}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[ended]} of {task.fields[runs]}"),
            TextColumn("{task.fields[left]}"),
            console=console,
            expand=True,
        )
        self._whole = self._study.add_task(
            "all", total=float(self._total), ended=0, runs=self._total, left=self._left()
        )
        self._runs = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("step {task.completed:.0f} of {task.total:.0f}"),
            TextColumn("loss {task.fields[loss]:.3f}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def render(self) -> RenderableType:
        return Group(self._study, self._runs)

    def receive(self, planned: PlannedRun | None, event: Event) -> None:
        if planned is None:
            self._outlook.begin(time.monotonic())
            return
        if self._label(planned) not in self._expected:  # done when it was planned, and told once more
            return
        if event.kind == "progress":
            self._advance(planned, event)
        elif event.kind == "note":
            self._console.print(Text(f"{self._label(planned)}: {event.reason}", style="yellow"), soft_wrap=True)
        elif event.kind != "unsaved":  # which ends all, with an error that says it
            self._end(planned, event)
        self._study.update(
            self._whole,
            completed=self._ended + sum(self._fractions.values()),
            ended=self._ended,
            left=self._left(),
        )
        self.on_change()

    def _advance(self, planned: PlannedRun, event: Event) -> None:
        self._fractions[event.run_id] = event.step / max(event.steps, 1)
        self._outlook.advance(self._label(planned), self._fractions[event.run_id])
        if event.run_id not in self._tasks:
            self._tasks[event.run_id] = self._runs.add_task(
                escape(self._label(planned)), total=event.steps, loss=event.loss
            )
        self._runs.update(self._tasks[event.run_id], completed=event.step, total=event.steps, loss=event.loss)

    def _end(self, planned: PlannedRun, event: Event) -> None:
        self._fractions.pop(event.run_id, None)
        self._outlook.end(self._label(planned), finished=event.kind == "finished")
        task = self._tasks.pop(event.run_id, None)
        if task is not None:
            self._runs.remove_task(task)
        self._ended += 1
        outcome = {"elsewhere": "is being trained by another process"}.get(event.kind, event.kind)
        line = f"[{self._ended} of {self._total}] {self._label(planned)}: {outcome}"
        if event.result:
            line += f", {event.result}"
        if not self._console.is_terminal and (left := self._left()):
            line += f"; {left}"
        if event.reason:
            line += f": {event.reason}"
        self._console.print(
            Text(line, style="red" if event.kind in ("failed", "diverged") else ""), highlight=False, soft_wrap=True
        )

    def _left(self) -> str:
        """How long the rest will take, in words; empty at the end, and where nobody knows."""
        left = self._outlook.left(time.monotonic())
        return f"about {_duration(left)} left" if left and self._ended < self._total else ""


def show_plan(console: Console, plan: Plan) -> None:
    """Print what an experiment consists of, what of it is done, and how long the rest will take."""
    spec, division, todo = plan.spec, plan.division, len(plan.pending)
    conditions = "" if spec.vary is None else f" x {len(spec.conditions())} conditions ({', '.join(spec.conditions())})"
    sizes = [len(dataset.train) for dataset in plan.data.conditions.values()]
    console.print(
        Text.assemble(
            (spec.name, "bold"),
            f": {len(spec.arms)} arms x {_count(spec.seeds, 'seed')}{conditions} of {spec.model} on "
            f"{spec.data.source}, {' to '.join(map(str, sorted({min(sizes), max(sizes)})))} training and "
            f"{len(plan.data.test)} test examples, {_count(spec.training.epochs, 'epoch')}.",
        )
    )
    first, *others = plan.data.conditions.values()
    for note in first.notes:
        if all(note in other.notes for other in others):
            console.print(note, style="dim", markup=False, highlight=False)
    troubled = [record for record in plan.records.values() if record.status != "finished"]
    # In a narrow terminal an arm's name has to do.
    told = ["what it is"] if console.width >= _WIDE_ENOUGH else []
    table = _table("arm", *told, "done", *(["trouble"] if troubled else []), "to do", "a run")
    for column in table.columns[1 + len(told) :]:
        column.justify, column.no_wrap = "right", True
    for arm in spec.arms:
        records = [plan.records.get(run.config.run_id) for run in plan.runs if run.arm == arm.name]
        done, trouble = (
            sum(record is not None and (record.status == "finished") == well for record in records)
            for well in (True, False)
        )
        pending = sum(task.run.arm == arm.name for task in plan.pending)
        seconds = [plan.seconds[cell] for cell in plan.seconds if cell[0] == arm.name]
        table.add_row(
            Text(arm.name),
            *([Text(_settings(arm))] if told else []),
            f"{done}/{len(records)}",
            *([str(trouble)] if troubled else []),
            str(pending),
            _duration(min(seconds), max(seconds)) if seconds else "",
        )
    console.print(table)
    if troubled and not any(task.before for task in plan.pending):
        console.print(f"{_count(len(troubled), 'run')} diverged or failed; --retry does them again.", style="yellow")
    _show_tuning(console, plan)
    part = "" if plan.shard is None else f" in shard {plan.shard}"
    if not plan.pending:
        whole = f"of {_count(len(plan.runs), 'run')}" if plan.shard is None else "runs"
        console.print(f"All {whole}{part} are done.")
        return
    side = f"{division.jobs} at a time" if division.jobs > 1 else "one after another"
    side = " ".join(filter(None, (side, division.place)))
    by = f"{division.processes} processes with " if division.processes > 1 else ""
    about = "nobody knows how long" if plan.remaining is None else f"about {_duration(plan.remaining)}"
    states = [f"{plan.elsewhere} in training in another process"] * bool(plan.elsewhere)
    states += [f"{plan.begun} begun: from the last checkpoint"] * bool(plan.begun)
    begun = f" ({'; '.join(states)})" if states else ""
    console.print(
        f"{_count(todo, 'run')} to do{part}{begun}, {side}, {by}{_count(division.threads, 'thread')} each: {about}. "
        f"Ctrl-C is safe: the same command goes on in {plan.folder}.",
        markup=False,
        highlight=False,
    )


def _show_tuning(console: Console, plan: Plan) -> None:
    """Say what is searched before the runs, or what was found."""
    lines = []
    if (todo := plan.tuning) is not None:
        trials, done = len(todo.searches) * todo.trials, len(todo.searches) * todo.trials - todo.left
        about = "" if plan.searching is None else f", about {_duration(plan.searching)}"
        lines.append(
            f"Tuning first: {_count(trials, 'trial')}, {todo.trials} a search{f', {done} of them done' if done else ''}"
            f"{about}. Each trains on {len(todo.data.train)} training examples and is judged by the loss on "
            f"{len(todo.data.test)} held out from them; the evaluation split is not used."
        )
        lines += [f"  {_shared(search.arms)}: {_ranges(search)}" for search in todo.searches]
        idle = [arm.name for arm in plan.spec.arms if not plan.spec.searched(arm)]
        lines += [f"  {_shared(idle)}: nothing to search"] if idle else []
        lines += ["Whichever shard begins first searches; the others wait for what it finds."] if plan.shard else []
    elif plan.tuned is not None:
        lines.append(f"Tuned, with {_count(plan.tuned.trials, 'trial')} a search:")
        lines += [f"  {_shared(item.arms)}: {_values(item.best)}" for item in plan.tuned.outcomes]
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _ranges(search: Search) -> str:
    return "; ".join(f"{name} {found}" for name, found in search.ranges.items())


def _values(trial: Trial) -> str:
    return "; ".join(f"{name} {value:.3g}" for name, value in trial.values.items())


def _shared(arms: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(arms[:-1]), arms[-1])))


def _settings(arm: ArmSpec) -> str:
    """An arm's settings in a line, with the keys of the specification's TOML."""

    def told(content: Mapping[str, Any]) -> list[str]:
        shown = {key: json.dumps(value) if isinstance(value, dict | list) else value for key, value in content.items()}
        return [f"{key}={value}" for key, value in shown.items()]

    content = arm.to_toml_dict()
    evaluate, training = content.pop("evaluate", None), content.pop("training", {})
    del content["name"]
    content.pop("rule", None)
    line = " ".join((arm.attention.rule if arm.attention.removes else "dense", *told(content), *told(training)))
    return line if evaluate is None else f"{line}; evaluated {' '.join(told(evaluate)) or 'dense'}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _duration(seconds: float, most: float | None = None) -> str:
    """A duration, or a range of two, to two digits or so."""
    longest = seconds if most is None else most
    unit, size, digits = ("s", 1, 0) if longest < 90 else ("min", 60, 0) if longest < 90 * 60 else ("h", 3600, 1)
    ends = (f"{max(value / size, 10.0**-digits):.{digits}f}" for value in (seconds, longest))
    return f"{'-'.join(dict.fromkeys(ends))} {unit}"


def _label(planned: PlannedRun) -> str:
    condition = f", {planned.condition}" if planned.condition else ""
    return f"{planned.arm}{condition}, seed {planned.config.seed}"


def _trial(planned: PlannedRun) -> str:
    return _trial_of(planned.arm, planned.index)


def _trial_of(arm: str, number: int) -> str:
    return f"{arm}, trial {number + 1}"


def show_result(console: Console, analysis: Analysis) -> None:
    """Print the final table, the verdict and its cautions."""
    content = tables.summary(analysis)
    table = _table(*content.header, numbers=True)
    for row in content.rows:
        table.add_row(*(Text(cell) for cell in row))
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
