"""Rows of cells, as strings: the same tables in the terminal, in Markdown and in HTML. Here those of arms and runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from crisp_attention.experiment.conclusions.analysis import Analysis, ArmResult
from crisp_attention.experiment.statistics import (
    ALPHA,
    EQUIVALENCE_MARGIN,
    Contrast,
    Interval,
    interquartile_mean,
    least_seeds,
)

MISSING = "-"

_Value = TypeVar("_Value")


class Compared(Protocol):
    """Anything that was compared over paired seeds."""

    @property
    def seeds(self) -> int:
        """Pairs compared."""

    @property
    def alpha(self) -> float:
        """Level of the test."""


@dataclass(frozen=True)
class Table:
    """A table of strings.

    Attributes:
        name: What to call it, in a few words.
        caption: What it shows, with units.
        header: Column names; the first column names its rows.
        rows: Cells.
        prose: Names of the columns that hold text; all others are numbers.
    """

    name: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    prose: tuple[str, ...] = ()


def arms(analysis: Analysis) -> Table:
    """One row an arm: how many runs, how accurate, how sparse, how large the gap."""
    return Table(
        "Arms",
        f"Arms{where(analysis)}, at the last epoch of a fixed schedule: means over seeds, accuracy in % "
        "(± standard deviation over seeds), loss in nats, gap = train - test accuracy in points, "
        "sparse = share of valid pairs removed.",
        ("arm", "runs", "correct", "accuracy", "IQM", "test loss", "train loss", "gap", "sparse train", "sparse test"),
        tuple(_arm_row(arm) for arm in analysis.arms),
    )


def summary(analysis: Analysis) -> Table:
    """The terminal's table: arms with their contrast against the baseline."""
    by_arm = {contrast.arm: contrast for contrast in analysis.contrasts}
    rows = []
    for arm in analysis.arms:
        contrast = by_arm.get(arm.name)
        rows.append(
            (
                arm.name,
                f"{len(arm.records)}/{arm.planned}",
                _mean_correct(arm).replace(" of ", "/"),
                accuracy(arm),
                signed(contrast.difference) if contrast else MISSING,
                interval(of_enough(contrast, contrast.interval)).replace(" to ", "..") if contrast else MISSING,
                share(arm.realised("test")),
            )
        )
    return Table(
        "Summary",
        f"Mean over seeds{where(analysis)}: accuracy in % (± standard deviation), difference in points from "
        f"{analysis.spec.primary.baseline} with its interval over seeds and examples, realised sparsity.",
        ("arm", "runs", "correct", "accuracy", "diff", level(analysis.contrasts), "sparse"),
        tuple(rows),
    )


def contrasts(analysis: Analysis) -> Table:
    """One row a contrast, the primary one first."""
    return contrast_table(
        "Contrasts",
        f"Differences from {analysis.spec.primary.baseline}{where(analysis)} over paired seeds, in points. The first "
        "interval resamples seeds and examples; the second is over seeds alone, on these examples. p: sign-flip test; "
        f"Holm over all contrasts but the primary one; TOST: equivalence within ±{EQUIVALENCE_MARGIN:g} points; "
        "detectable: with 80% power. Below {least} seeds intervals, TOST and what is detectable would mean nothing and "
        "are left out.",
        [(f"{item.arm}{' (primary)' if item is analysis.primary else ''}", item) for item in analysis.contrasts],
    )


def contrast_table(name: str, caption: str, entries: Sequence[tuple[str, Contrast]]) -> Table:
    """Contrasts, one a row.

    Args:
        name: What to call the table.
        caption: What it shows; "{least}" becomes the number of seeds below which figures are left out.
        entries: Label and contrast.
    """
    alpha = entries[0][1].alpha if entries else ALPHA
    return Table(
        name,
        caption.format(least=least_seeds(alpha)),
        (
            "contrast",
            "seeds",
            "difference",
            "examples",
            level([item for _, item in entries]),
            "on these examples",
            "p",
            "p Holm",
            "d_z",
            "P(better)",
            "TOST p",
            "detectable",
        ),
        tuple(_contrast_row(label, item) for label, item in entries),
    )


def runs(analysis: Analysis) -> Table:
    """One row a run, those in trouble with their reason."""
    rows = []
    for condition, results in analysis.by_condition.items():
        for arm in results:
            place = f"{arm.name}, {condition}" if condition else arm.name
            rows += [(place, *_run_row(arm, index)) for index in range(arm.planned)]
    return Table(
        "Runs",
        "Every run: examples classified correctly, seconds, how often it was taken up again, and its id.",
        ("arm", "seed", "status", "test", "train probe", "seconds", "resumed", "run"),
        tuple(rows),
        prose=("status",),
    )


def where(analysis: Analysis) -> str:
    """In which condition, where data vary: " at NAME"."""
    return f" at {analysis.spec.primary_condition}" if analysis.spec.primary_condition else ""


def level(contrasts: Sequence[Contrast]) -> str:
    """What their intervals are called."""
    return f"{100 * (1 - (contrasts[0].alpha if contrasts else ALPHA)):.3g}% interval"


def accuracy(arm: ArmResult) -> str:
    """Mean and standard deviation over seeds, %."""
    if not arm.records:
        return MISSING
    values = arm.accuracies
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")


def runs_of(arm: ArmResult) -> str:
    """How many runs are finished, of how many."""
    trouble = f" ({len(arm.troubled)} diverged or failed)" if arm.troubled else ""
    return f"{len(arm.records)} of {arm.planned}{trouble}"


def share(value: float | None) -> str:
    """A share as a percentage."""
    return MISSING if value is None else f"{100 * value:.1f}%"


def signed(value: float | None, digits: int = 2) -> str:
    """A difference."""
    if value is None:
        return MISSING
    text = f"{value:+.{digits}f}"
    # What rounds to nothing is no loss.
    return text if float(text) else text.replace("-", "+")


def interval(found: Interval | None, digits: int = 2) -> str:
    """An interval of differences; an end that rounds to nothing keeps its sign, which says whether 0 is in it."""
    if found is None:
        return MISSING
    low, high = (f"{end + 0.0:+.{digits}f}" for end in (found.low, found.high))
    return f"{low} to {high}"


def of_enough(compared: Compared, value: _Value) -> _Value | None:
    """A figure that estimates a spread; None of too few seeds, which know too little of theirs."""
    return value if compared.seeds >= least_seeds(compared.alpha) else None


def p(value: float | None) -> str:
    """A p-value."""
    if value is None:
        return MISSING
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _run_row(arm: ArmResult, index: int) -> tuple[str, ...]:
    record = arm.records.get(index) or arm.troubled.get(index)
    if record is None:
        return (str(index + arm.spec.seed_offset), "not done", *[MISSING] * 5)
    final = record.final if index in arm.records else None
    return (
        str(record.config["seed"]),
        record.status if record.reason is None else f"{record.status}: {record.reason}",
        f"{final.test.correct} of {final.test.total}" if final else MISSING,
        f"{final.train.correct} of {final.train.total}" if final else MISSING,
        f"{record.timing.seconds:.0f}",
        str(record.resumed),
        record.run_id,
    )


def _arm_row(arm: ArmResult) -> tuple[str, ...]:
    def mean(values: list[float]) -> str:
        return f"{np.mean(values):.4f}" if values else MISSING

    return (
        arm.name,
        runs_of(arm),
        _mean_correct(arm),
        accuracy(arm),
        f"{interquartile_mean(arm.accuracies):.2f}" if arm.records else MISSING,
        mean([score.loss for score in arm.test]),
        mean([score.loss for score in arm.train]),
        signed(float(arm.gaps.mean())) if arm.records else MISSING,
        share(arm.realised("train")),
        share(arm.realised("test")),
    )


def _contrast_row(label: str, contrast: Contrast) -> tuple[str, ...]:
    detectable = of_enough(contrast, contrast.detectable)
    return (
        label,
        str(contrast.seeds),
        signed(contrast.difference),
        f"{contrast.sentences:+.1f} of {contrast.examples}",
        interval(of_enough(contrast, contrast.interval)),
        interval(of_enough(contrast, contrast.seed_interval)),
        p(contrast.p_value),
        p(contrast.p_holm),
        signed(contrast.effect_size),
        f"{contrast.probability_better:.2f}",
        p(of_enough(contrast, contrast.p_equivalence)),
        MISSING if detectable is None else f"{detectable:.2f}",
    )


def _mean_correct(arm: ArmResult) -> str:
    if not arm.records:
        return MISSING
    return f"{np.mean([score.correct for score in arm.test]):.1f} of {arm.test[0].total}"
