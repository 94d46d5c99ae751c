"""The experiment from Python, for notebooks and scripts: what `crisp run` and `crisp report` do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from crisp_attention.errors import ConfigurationError, nearest
from crisp_attention.experiment import study
from crisp_attention.experiment.conclusions.analysis import Analysis, analyse
from crisp_attention.experiment.conclusions.verdict import Verdict
from crisp_attention.experiment.display import TerminalDisplay
from crisp_attention.experiment.execution.choice import choose
from crisp_attention.experiment.execution.worker import Event
from crisp_attention.experiment.notebook import NotebookDisplay
from crisp_attention.experiment.report import tables
from crisp_attention.experiment.results.record import Record
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.runs import PlannedRun
from crisp_attention.experiment.specification.spec import ExperimentSpec, parse, presets, read, with_seeds
from crisp_attention.experiment.study import Plan
from crisp_attention.representation import bullets, card, link, paragraph, table

Specification = str | os.PathLike[str] | Mapping[str, Any] | ExperimentSpec
"""A TOML file's path, a preset's name, the content of such a file as a dict, or a parsed specification."""


@dataclass(frozen=True, repr=False)
class Study:
    """An experiment as its run directory tells it; shows itself in a notebook.

    Attributes:
        folder: The run directory.
        analysis: All that a report says, as data: contrasts, conditions, secondary outcomes, ...
        report: The HTML report; None if there is none.
    """

    folder: Path
    analysis: Analysis
    report: Path | None

    @property
    def spec(self) -> ExperimentSpec:
        """The experiment."""
        return self.analysis.spec

    @property
    def verdict(self) -> Verdict:
        """What may be said of the primary contrast: `word`, `headline` and `details`."""
        return self.analysis.verdict

    @property
    def records(self) -> tuple[Record, ...]:
        """What each run left behind, those that diverged or failed included: by condition, arm and seed."""
        return tuple(
            record
            for arms in self.analysis.by_condition.values()
            for arm in arms
            for _, record in sorted({**arm.records, **arm.troubled}.items())
        )

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row an arm; where data vary, one row an arm and condition.

        Accuracies are in %, differences from the baseline and their interval (over seeds and examples) in points.
        What there is nothing to compute from is NaN, and so is an interval of fewer seeds than can carry a verdict.

        Columns: `runs` (finished) of `planned`; `accuracy` and `sd`, over seeds; `difference`, `low`, `high`; `p`
        (sign-flip test); `p_holm`, adjusted over all contrasts but the primary one; `sparsity`, the share of valid
        pairs that was really removed on the evaluation split.
        """
        rows = []
        for condition, arms in self.analysis.by_condition.items():
            contrasts = {item.arm: item for item in self.analysis.condition_contrasts[condition]}
            for arm in arms:
                values = arm.accuracies
                contrast = contrasts.get(arm.name)
                interval = contrast and tables.of_enough(contrast, contrast.interval)
                rows.append(
                    {
                        "condition": condition,
                        "arm": arm.name,
                        "runs": len(arm.records),
                        "planned": arm.planned,
                        "accuracy": values.mean() if len(values) else None,
                        "sd": values.std(ddof=1) if len(values) > 1 else None,
                        "difference": contrast and contrast.difference,
                        "low": interval and interval.low,
                        "high": interval and interval.high,
                        "p": contrast and contrast.p_value,
                        "p_holm": contrast and contrast.p_holm,
                        "sparsity": arm.realised("test"),
                    }
                )
        whole = {"condition": str, "arm": str, "runs": int, "planned": int}
        frame = pd.DataFrame(rows).astype({name: whole.get(name, float) for name in rows[0]})
        return frame.set_index("arm").drop(columns="condition" if self.spec.vary is None else [])

    def __repr__(self) -> str:
        content = tables.summary(self.analysis)
        cells = [content.header, *content.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        rows = [
            "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in line).rstrip()
            for line in (enumerate(zip(row, widths, strict=True)) for row in cells)
        ]
        cautions = [f"  {caution}" for caution in self.analysis.cautions]
        where = self.folder if self.report is None else self.report
        return "\n".join([f"Study {self.spec.name}", *rows, repr(self.verdict), *cautions, str(where)])

    def _repr_html_(self) -> str:
        content = tables.summary(self.analysis)
        page = "" if self.report is None else paragraph(f"Report: {self.report}")
        # A browser is served what lies below the notebook's folder, and nothing else of a disk.
        if self.report is not None and not self.report.is_absolute() and ".." not in self.report.parts:
            page = link(f"Report: {self.report}", self.report.as_posix())
        return card(
            f"Study {self.spec.name}",
            self.verdict._repr_html_(),
            bullets(self.analysis.cautions),
            table(content.header, content.rows),
            paragraph(content.caption, small=True),
            page,
        )


def plan(
    spec: Specification,
    out: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    seeds: int | None = None,
    retry: bool = False,
    on: str = "local",
    source: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Plan:
    """What `run` would do, and how long it would take; writes nothing.

    Args:
        spec: A TOML file's path, a preset's name, a dict with the content of such a file, or an `ExperimentSpec`.
        out: Run directory (default: runs/NAME).
        jobs: Runs side by side; the cores are split between them (default: one a core).
        seeds: Runs per arm, in place of the specification's.
        retry: Do diverged and failed runs again.
        on: Where: "local", "ray" or "ray://HOST:PORT", as `crisp run --on`.
        source: Another run directory, to take over its finished runs where they are runs of this experiment.
        progress: Whether to say what is being found out.

    Returns:
        The plan; `pending` are the runs to do, `remaining` is in how many seconds.

    Raises:
        ConfigurationError: If the specification cannot be read, or a value in it makes no sense.
        CrispError: If the model, the data or the directory will not do.
    """
    with _prepared(spec, out, jobs, seeds, retry, on, source, _display(progress)) as prepared:
        return prepared


def run(
    spec: Specification,
    out: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    seeds: int | None = None,
    retry: bool = False,
    on: str = "local",
    source: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Study:
    """Run an experiment, or what is left of it: trains, writes records and the report, and says what came out.

    The same call goes on where an earlier one was interrupted, and only reads where all is done. Runs are trained in
    processes of their own, which do not run the script or notebook again that called; no `if __name__ == "__main__"`
    is needed.

    Args:
        spec: A TOML file's path, a preset's name, a dict with the content of such a file, or an `ExperimentSpec`.
        out: Run directory, new or of the same experiment (default: runs/NAME).
        jobs: Runs side by side; the cores are split between them (default: one a core).
        seeds: Runs per arm, in place of the specification's.
        retry: Do diverged and failed runs again.
        on: Where: "local", "ray" or "ray://HOST:PORT", as `crisp run --on`.
        source: Another run directory, to take over its finished runs where they are runs of this experiment.
        progress: Whether to show the plan and how far it is.

    Returns:
        The study. Runs that diverged or failed are in it, with the reason.

    Raises:
        ConfigurationError: If the specification cannot be read, or a value in it makes no sense.
        CrispError: If the model, the data or the directory will not do.
        StorageError: If the directory cannot be written; finished runs in it are kept.
    """
    display = _display(progress)
    with _prepared(spec, out, jobs, seeds, retry, on, source, display) as prepared:
        display.present(prepared)
        try:
            analysis, page = study.carry_out(prepared, display)
        except KeyboardInterrupt:
            display.announce(study.interrupted(prepared.folder, "call"))
            raise
    return Study(prepared.folder, analysis, page)


def load(folder: str | os.PathLike[str]) -> Study:
    """Read a study from its records; trains and writes nothing, and needs no torch.

    Args:
        folder: Run directory, as runs/quick.

    Raises:
        RecordError: If the directory or a record in it is damaged.
    """
    path = Path(folder)
    page = path / "report.html"
    return Study(path, analyse(Store(path)), page if page.exists() else None)


def rebuild(folder: str | os.PathLike[str]) -> Study:
    """Read a study, and write its report anew from the records alone, as `crisp report` does.

    Args:
        folder: Run directory, as runs/quick.

    Raises:
        RecordError: If the directory or a record in it is damaged.
        StorageError: If the report cannot be written.
    """
    path = Path(folder)
    return Study(path, *study.rebuild(path))


class _Silence:
    """A display that shows nothing."""

    def announce(self, message: str) -> None:
        """Keep it to itself."""

    def present(self, plan: Plan) -> None:
        """Keep it to itself."""

    @contextlib.contextmanager
    def _nothing(self, plan: Plan) -> Iterator[Callable[[PlannedRun | None, Event], None]]:
        yield lambda planned, event: None

    def tuning(self, plan: Plan) -> AbstractContextManager[Callable[[PlannedRun | None, Event], None]]:
        """Hear of the trials of a plan."""
        return self._nothing(plan)

    def training(self, plan: Plan) -> AbstractContextManager[Callable[[PlannedRun | None, Event], None]]:
        """Hear of the runs of a plan."""
        return self._nothing(plan)


def _display(progress: bool) -> TerminalDisplay | NotebookDisplay | _Silence:
    if not progress:
        return _Silence()
    console = Console()
    return NotebookDisplay() if console.is_jupyter else TerminalDisplay(console)


@contextlib.contextmanager
def _prepared(
    spec: Specification,
    out: str | os.PathLike[str] | None,
    jobs: int | None,
    seeds: int | None,
    retry: bool,
    on: str,
    source: str | os.PathLike[str] | None,
    display: study.Display,
) -> Iterator[Plan]:
    """The plan, with who does it at hand within."""
    found = with_seeds(_specified(spec), seeds)
    with contextlib.closing(choose(on, found.resources)) as executor:
        yield study.prepare(
            found,
            study.directory(found, out),
            display,
            jobs,
            retry,
            executor=executor,
            source=None if source is None else Path(source),
        )


def _specified(spec: Specification) -> ExperimentSpec:
    """The specification, in whichever form it was given."""
    if isinstance(spec, ExperimentSpec):
        return spec
    if isinstance(spec, Mapping):
        return parse(spec, "The specification")
    if isinstance(spec, str) and not spec.endswith(".toml"):
        known = presets()
        if spec in known:
            return known[spec]
        if not Path(spec).is_file():
            raise ConfigurationError(f"{spec!r} is neither a preset nor a file. {nearest(spec, known)}")
    if isinstance(spec, (str, os.PathLike)):
        return read(Path(spec))
    raise ConfigurationError(
        "A specification is the path of a TOML file, the name of a preset, a dict or an ExperimentSpec; "
        f"got {type(spec).__name__}."
    )
