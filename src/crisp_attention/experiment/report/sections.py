"""What a report consists of: sections of notes, pictures and tables, the same for Markdown and HTML."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from crisp_attention.experiment.conclusions.analysis import Analysis
from crisp_attention.experiment.report import breadth, plots, secondary, tables, tuning
from crisp_attention.experiment.report.drawing import Drawing
from crisp_attention.experiment.report.forest import Row, forest
from crisp_attention.experiment.report.tables import Table

_Part = TypeVar("_Part", Drawing, Table)


@dataclass(frozen=True)
class Section:
    """One part of a report.

    Attributes:
        anchor: Its place in the page.
        title: For the heading and the contents.
        notes: Paragraphs before all else.
        drawings: Pictures.
        tables: Tables below them.
    """

    anchor: str
    title: str
    notes: tuple[str, ...] = ()
    drawings: tuple[Drawing, ...] = ()
    tables: tuple[Table, ...] = ()


def findings(analysis: Analysis) -> tuple[Section, ...]:
    """The sections of results, in the order of their weight; those without anything to show are left out."""
    removed = {arm.name: arm.realised("test") for arm in analysis.arms}
    all_contrasts = forest(
        "contrasts",
        "All contrasts",
        analysis.spec.primary.baseline,
        [Row(item.arm, item, removed[item.arm]) for item in analysis.contrasts],
        analysis.primary,
    )
    return _there(
        [
            Section("contrasts", "Contrasts", (), _some([all_contrasts]), (tables.contrasts(analysis),)),
            Section(
                "arms",
                "Arms",
                (),
                _some([plots.accuracy(analysis), plots.by_sparsity(analysis)]),
                (tables.arms(analysis),),
            ),
            Section(
                "conditions",
                "Amount and quality of training data",
                (),
                _some([breadth.condition_plot(analysis)]),
                tuple(breadth.condition_tables(analysis)),
            ),
            Section(
                "evaluations",
                "Further evaluations",
                (),
                _some([breadth.evaluation_plot(analysis)]),
                tuple(breadth.evaluation_tables(analysis)),
            ),
            Section(
                "training",
                "Training",
                (),
                _some([plots.curves(analysis), plots.gap(analysis)]),
                _some([secondary.pattern(analysis)]),
            ),
            Section(
                "outcomes",
                "Secondary outcomes",
                (),
                _some([secondary.calibration(analysis)]),
                _some([secondary.outcomes(analysis)]),
            ),
            Section(
                "sparsity",
                "Realised sparsity",
                (),
                _some([plots.layers(analysis), plots.lengths(analysis), plots.entropy(analysis)]),
            ),
        ]
    )


def closing(analysis: Analysis) -> tuple[Section, ...]:
    """The sections that a reader checks last: how settings were chosen, cost and every run."""
    return _there(
        [
            Section("tuning", "Tuning", tuning.notes(analysis), tables=_some([tuning.searches(analysis)])),
            Section("cost", "Cost", tables=_some([secondary.cost(analysis)])),
            Section("runs", "Runs", tables=(tables.runs(analysis),)),
        ]
    )


def _there(sections: Iterable[Section]) -> tuple[Section, ...]:
    return tuple(section for section in sections if section.notes or section.drawings or section.tables)


def _some(parts: Iterable[_Part | None]) -> tuple[_Part, ...]:
    return tuple(part for part in parts if part is not None)
