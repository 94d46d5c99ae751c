"""How far a finding reaches: other amounts or qualities of training data, and further evaluations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import NullLocator

from crisp_attention.experiment.conclusions.analysis import Analysis
from crisp_attention.experiment.report.drawing import Drawing, canvas, colour, finish
from crisp_attention.experiment.report.forest import Row, forest
from crisp_attention.experiment.report.plots import legend_below, line_styles
from crisp_attention.experiment.report.tables import (
    MISSING,
    Table,
    accuracy,
    contrast_table,
    interval,
    level,
    of_enough,
    p,
    runs_of,
    share,
    signed,
    where,
)
from crisp_attention.experiment.specification.sections import VarySpec
from crisp_attention.experiment.statistics import EQUIVALENCE_MARGIN, Array

_AXES = {"train_examples": "training examples", "label_noise": "share of wrong training labels"}


def condition_plot(analysis: Analysis) -> Drawing | None:
    """Difference from the baseline over what is varied, one line an arm."""
    vary = analysis.spec.vary
    if vary is None or not any(analysis.condition_contrasts.values()):
        return None
    values = dict(zip(analysis.conditions, vary.values, strict=True))
    arms = [arm for arm in analysis.arms if arm.name != analysis.spec.primary.baseline]
    with canvas(4.0) as (figure, axes):
        axes.axhspan(-EQUIVALENCE_MARGIN, EQUIVALENCE_MARGIN, color=colour("band"), linewidth=0, zorder=0)
        axes.axhline(0, color=colour("soft"), linewidth=1)
        for number, (arm, style) in enumerate(zip(arms, line_styles(analysis, arms), strict=True)):
            own = [
                (values[condition], item)
                for condition, found in analysis.condition_contrasts.items()
                for item in found
                if item.arm == arm.name
            ]
            places = _apart([value for value, _ in own], number - (len(arms) - 1) / 2, vary)
            axes.plot(places, [item.difference for _, item in own], **style)
            for place, (_, item) in zip(places, own, strict=True):
                found = of_enough(item, item.interval)
                if found is not None:
                    axes.vlines(place, found.low, found.high, color=style["color"], linewidth=1.4)
        if vary.key == "train_examples":
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(vary.values, [f"{value:g}" for value in vary.values])
        axes.set_xlabel(_AXES[vary.key])
        axes.set_ylabel(f"difference from {analysis.spec.primary.baseline} (points)")
        legend_below(figure, axes)
        said = "; ".join(
            f"{item.arm} at {condition} {item.difference:+.2f} (n = {item.seeds})"
            for condition, found in analysis.condition_contrasts.items()
            for item in found
        )
        removed = "; ".join(f"{arm.name} {_removed(analysis, arm.name)}" for arm in arms)
        return finish(
            figure,
            "conditions",
            f"Difference by {_AXES[vary.key]}",
            f"Difference in accuracy from {analysis.spec.primary.baseline} with its {level(analysis.contrasts)} over "
            f"seeds and examples, over {_seeds(analysis)}. The band is what counts as equivalent, "
            f"{EQUIVALENCE_MARGIN:g} points either way. Pairs removed in evaluation: {removed}."
            + (f" Epochs: {', '.join(map(str, vary.epochs))}." if vary.epochs else ""),
            f"{said}.",
        )


def _seeds(analysis: Analysis) -> str:
    """How many paired seeds the differences rest on, from the least to the most."""
    counts = [item.seeds for found in analysis.condition_contrasts.values() for item in found]
    between = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return f"{between} paired seeds each"


def _removed(analysis: Analysis, arm: str) -> str:
    """The share of pairs that an arm removed in evaluation, from the least to the most over the conditions."""
    shares = [
        found
        for results in analysis.by_condition.values()
        for item in results
        if item.name == arm and (found := item.realised("test")) is not None
    ]
    return " to ".join(dict.fromkeys(share(end(shares, default=None)) for end in (min, max)))


def _apart(values: Sequence[float], step: float, vary: VarySpec) -> Array:
    """Places on the axis of what is varied, a little apart so that intervals of several arms do not hide each other."""
    places = np.asarray(values, dtype=np.float64)
    if vary.key == "train_examples":  # on a logarithmic axis
        return places * np.float64(1.02) ** step
    return places + 0.012 * step * (vary.values[-1] - vary.values[0])


def condition_tables(analysis: Analysis) -> list[Table]:
    """Accuracy in each condition, the differences there, and whether they follow what is varied."""
    if analysis.spec.vary is None:
        return []
    cells = Table(
        "Conditions",
        "Test accuracy in % (± standard deviation over seeds) and finished runs, by condition.",
        ("arm", *analysis.conditions),
        tuple(
            (
                arm.name,
                *(
                    f"{accuracy(results[number])}, {runs_of(results[number])}"
                    for results in analysis.by_condition.values()
                ),
            )
            for number, arm in enumerate(analysis.arms)
        ),
    )
    entries = [
        (f"{item.arm}, {condition}{' (primary)' if item is analysis.primary else ''}", item)
        for condition, found in analysis.condition_contrasts.items()
        for item in found
    ]
    differences = contrast_table(
        "Contrasts by condition",
        f"Differences from {analysis.spec.primary.baseline} in each condition; columns as above. Holm over all "
        "contrasts but the primary one.",
        entries,
    )
    trends = Table(
        "Interactions",
        "Does the difference follow what is varied? Least-squares slope by seed, over the seeds that are complete in "
        "every condition, in points; intervals as above; p: sign-flip test on the mean slope, Holm over all but the "
        "primary arm's.",
        ("arm", "seeds", "slope", "per", level(analysis.contrasts), "on these examples", "p", "p Holm"),
        tuple(
            (
                item.arm,
                str(item.seeds),
                signed(item.slope),
                item.unit,
                interval(of_enough(item, item.interval)),
                interval(of_enough(item, item.seed_interval)),
                p(item.p_value),
                p(item.p_holm),
            )
            for item in analysis.interactions
        ),
        prose=("per",),
    )
    return [table for table in (cells, differences, trends) if table.rows]


def evaluation_plot(analysis: Analysis) -> Drawing | None:
    """Differences on further evaluations."""
    return forest(
        "evaluations",
        "Differences on further evaluations",
        analysis.spec.primary.baseline,
        [Row(f"{item.arm}, {name}", item) for name, found in analysis.evaluation_contrasts.items() for item in found],
    )


def evaluation_tables(analysis: Analysis) -> list[Table]:
    """Accuracy on further evaluations, and the differences there."""
    names = [item.name for item in analysis.spec.evaluations]
    if not names:
        return []

    def cell(shares: list[float], counts: list[int]) -> str:
        if not shares:
            return MISSING
        spread = f" ± {np.std(shares, ddof=1):.2f}" if len(shares) > 1 else ""
        return f"{np.mean(shares):.2f}{spread} of {counts[0]}, n = {len(shares)}"

    rows = []
    for arm in analysis.arms:
        row = [arm.name, cell(arm.accuracies.tolist(), [score.total for score in arm.test])]
        for name in names:
            scores = [record.evaluations[name] for record in arm.records.values() if name in record.evaluations]
            row.append(cell([100 * score.accuracy for score in scores], [score.total for score in scores]))
        rows.append(tuple(row))
    accuracies = Table(
        "Further evaluations",
        f"Accuracy in % (± standard deviation over seeds) of the number of examples, n seeds{where(analysis)}: on the "
        "test split and on further evaluations of the same models.",
        ("arm", "test", *names),
        tuple(rows),
    )
    entries = [(f"{item.arm}, {name}", item) for name, found in analysis.evaluation_contrasts.items() for item in found]
    differences = contrast_table(
        "Contrasts on further evaluations",
        f"Differences from {analysis.spec.primary.baseline} on further evaluations; columns as above, Holm over "
        "these rows.",
        entries,
    )
    return [table for table in (accuracies, differences) if table.rows]
