"""Forest plots: differences with their intervals, one row each."""

from __future__ import annotations

from collections.abc import Sequence

from crisp_attention.experiment.report.drawing import Drawing, canvas, colour, finish, row_height, rows, series
from crisp_attention.experiment.report.tables import level, of_enough
from crisp_attention.experiment.statistics import EQUIVALENCE_MARGIN, Contrast, least_seeds


def forest(
    name: str, title: str, baseline: str, entries: Sequence[tuple[str, Contrast]], primary: Contrast | None = None
) -> Drawing | None:
    """Differences from a baseline with the zero line and the band that counts as equivalent; None without any.

    Args:
        name: File name without suffix.
        title: For the heading.
        baseline: What all are compared with.
        entries: Label and contrast, the first on top.
        primary: The contrast named before the run, which stands out.
    """
    if not entries:
        return None
    with canvas(row_height(len(entries))) as (figure, axes):
        axes.axvspan(-EQUIVALENCE_MARGIN, EQUIVALENCE_MARGIN, color=colour("band"), linewidth=0, zorder=0)
        axes.axvline(0, color=colour("soft"), linewidth=1)
        own = [series(1 if item is primary else 0) for _, item in entries]
        bars = [(row, found) for row, (_, item) in enumerate(entries) if (found := of_enough(item, item.interval))]
        axes.hlines(
            [row for row, _ in bars],
            [found.low for _, found in bars],
            [found.high for _, found in bars],
            color=[own[row] for row, _ in bars],
            linewidth=2,
        )
        for stands_out, marker, size in ((False, "o", 34), (True, "D", 60)):
            shown = [row for row, (_, item) in enumerate(entries) if (item is primary) == stands_out]
            axes.scatter(
                [entries[row][1].difference for row in shown],
                shown,
                color=[own[row] for row in shown],
                s=size,
                marker=marker,
                zorder=3,
                edgecolor=colour("paper"),
            )
        rows(axes, [f"{label}{' (primary)' if item is primary else ''}" for label, item in entries])
        axes.set_xlabel(f"difference from {baseline} (points)")
        least = least_seeds(entries[0][1].alpha)
        return finish(
            figure,
            name,
            title,
            f"Difference in accuracy from {baseline}, with its {level([item for _, item in entries])} over seeds and "
            f"examples (none below {least} seeds). The band is what counts as equivalent, {EQUIVALENCE_MARGIN:g} "
            f"points either way.",
            f"{'; '.join(_said(label, item) for label, item in entries)}.",
        )


def _said(label: str, contrast: Contrast) -> str:
    found = of_enough(contrast, contrast.interval)
    between = "" if found is None else f" ({found.low:+.2f} to {found.high:+.2f})"
    seeds = f"{contrast.seeds} seed{'s' if contrast.seeds > 1 else ''}"
    return f"{label} {contrast.difference:+.2f}{between}, {seeds} x {contrast.examples} examples"
