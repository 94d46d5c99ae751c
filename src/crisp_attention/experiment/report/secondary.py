"""What is measured beside accuracy: secondary outcomes, calibration, the regularizer's pattern, cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crisp_attention.experiment.conclusions.analysis import Analysis, ArmResult
from crisp_attention.experiment.conclusions.outcomes import OUTCOMES, OutcomeContrast
from crisp_attention.experiment.report.drawing import Drawing, canvas, colour, finish
from crisp_attention.experiment.report.plots import finished, legend_below, line_styles, listing
from crisp_attention.experiment.report.tables import MISSING, Table, interval, level, of_enough, p, signed, where
from crisp_attention.experiment.statistics import smallest_p

_NAMES = {
    "nll": "NLL",
    "brier": "Brier score",
    "ece": "ECE",
    "ece_scaled": "ECE after temperature scaling",
    "gap": "train-test gap",
    "seconds": "seconds in training steps",
}


def outcomes(analysis: Analysis) -> Table | None:
    """One row an outcome and arm."""
    if not analysis.outcomes:
        return None
    ordered = [item for name in OUTCOMES for item in analysis.outcomes if item.outcome == name]
    return Table(
        "Secondary outcomes",
        f"Secondary outcomes{where(analysis)} against {analysis.spec.primary.baseline}; less is better, but for "
        "the gap, which narrows also where both accuracies fall. NLL in nats, Brier score from 0 to 2, ECE (expected "
        "calibration error) as a share, the gap in points. "
        "The first interval is over seeds, the second over seeds and examples, for what has a value by example; "
        f"too few seeds have neither. p: sign-flip test, Holm over all rows.{_out_of_reach(ordered)}",
        (
            "outcome",
            "arm",
            "seeds",
            "mean",
            analysis.spec.primary.baseline,
            "difference",
            level(analysis.contrasts),
            "seeds and examples",
            "p",
            "p Holm",
        ),
        tuple(
            (
                _NAMES[item.outcome],
                item.arm,
                str(item.seeds),
                f"{item.mean_arm:.4g}",
                f"{item.mean_baseline:.4g}",
                signed(item.difference, 4),
                interval(of_enough(item, item.interval), 4),
                interval(of_enough(item, item.crossed), 4),
                p(item.p_value),
                p(item.p_holm),
            )
            for item in ordered
        ),
        prose=("arm",),
    )


def _out_of_reach(outcomes: Sequence[OutcomeContrast]) -> str:
    """Where so few seeds could not show anything over so many rows, that this is so."""
    seeds = max(item.seeds for item in outcomes)
    least = smallest_p(seeds) * len(outcomes)
    if least < max(item.alpha for item in outcomes):
        return ""
    return (
        f" With {seeds} seeds and {len(outcomes)} rows the adjusted p cannot fall below {p(min(1.0, least))}: "
        "no row is a finding, whatever its interval."
    )


def calibration(analysis: Analysis) -> Drawing | None:
    """Reliability curves: how often predictions of a confidence are right."""
    arms = [arm for arm in finished(analysis) if arm.reliability]
    if not arms:
        return None
    with canvas(4.2) as (figure, axes):
        axes.plot([0, 1], [0, 1], color=colour("soft"), linewidth=1, linestyle=(0, (4, 3)), label="calibrated")
        for arm, style in zip(arms, line_styles(analysis, arms), strict=True):
            bins = arm.reliability
            axes.plot(
                [item.confidence for item in bins],
                [item.accuracy for item in bins],
                **(style | {"markersize": 4, "linewidth": 1.4}),
            )
        low = min(min(item.confidence, item.accuracy) for arm in arms for item in arm.reliability)
        axes.set_xlim(max(0.0, low - 0.03), 1.02)
        axes.set_ylim(max(0.0, low - 0.03), 1.02)
        axes.set_xlabel("confidence")
        axes.set_ylabel("share correct")
        legend_below(figure, axes)
        return finish(
            figure,
            "calibration",
            "Calibration",
            "How often predictions of like confidence are correct, all seeds together in bins of equal size; below the "
            "diagonal a model is overconfident.",
            "Expected calibration error before and after temperature scaling: "
            + listing(arms, [f"{arm.ece.mean():.3f}, {arm.ece_scaled.mean():.3f}" for arm in arms]),
        )


def pattern(analysis: Analysis) -> Table | None:
    """What an arm must show to be called a regularizer, clause by clause."""
    found = analysis.pattern
    if found is None:
        return None
    answers = {True: "yes", False: "no", None: "open"}
    return Table(
        "Regularizer",
        f"Does {found.arm} act as a regularizer? Only if all of these hold: {answers[found.holds]}.",
        ("clause", "holds", "figure"),
        tuple((clause.statement, answers[clause.holds], clause.figure) for clause in found.clauses),
        prose=("holds", "figure"),
    )


def cost(analysis: Analysis) -> Table | None:
    """Time by arm, and as a ratio to the baseline over the seeds that both finished."""
    arms = finished(analysis)
    if not arms:
        return None
    baseline = analysis.arm(analysis.spec.primary.baseline)
    return Table(
        "Cost",
        f"Time{where(analysis)}, means over seeds; ratios to {baseline.name} over the seeds that both finished. Runs "
        "were timed as they were done, side by side with others: ratios near 1 are within a machine's noise.",
        (
            "arm",
            "n",
            "seconds a run",
            "in training steps",
            "ratio",
            "training examples/s",
            "ratio of examples/s",
            "parameters",
        ),
        tuple(_cost_row(arm, baseline) for arm in arms),
    )


def _cost_row(arm: ArmResult, baseline: ArmResult) -> tuple[str, ...]:
    timings = {index: record.timing for index, record in arm.records.items()}
    pairs = [(timings[index], baseline.records[index].timing) for index in arm.indexes if index in baseline.records]

    def mean(name: str, digits: int) -> str:
        return f"{np.mean([getattr(timing, name) for timing in timings.values()]):.{digits}f}"

    def ratio(name: str) -> str:
        sums = [sum(getattr(pair[side], name) for pair in pairs) for side in (0, 1)]
        return f"{sums[0] / sums[1]:.2f}" if pairs and sums[1] else MISSING

    return (
        arm.name,
        str(len(arm.records)),
        mean("seconds", 1),
        mean("train_seconds", 1),
        ratio("train_seconds"),
        mean("train_examples_per_second", 1),
        ratio("train_examples_per_second"),
        f"{next(iter(arm.records.values())).parameters:,}",
    )
