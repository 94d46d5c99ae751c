"""Forest plots: differences with their intervals, one row each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crisp_attention.experiment.report.drawing import Drawing, canvas, colour, finish, row_height, rows, series
from crisp_attention.experiment.report.tables import level, of_enough, share
from crisp_attention.experiment.statistics import EQUIVALENCE_MARGIN, Contrast, least_seeds


@dataclass(frozen=True)
class Row:
    """A line of a forest plot.

    Attributes:
        label: At its left.
        contrast: The difference and its interval.
        removed: Share of valid pairs that the arm removed in evaluation; None where that is not known.
    """

    label: str
    contrast: Contrast
    removed: float | None = None

    @property
    def note(self) -> str:
        """At its right: what the difference rests on."""
        seeds = f"n = {self.contrast.seeds}"
        return seeds if self.removed is None else f"{seeds}, {100 * self.removed:.0f}%"


def forest(
    name: str, title: str, baseline: str, entries: Sequence[Row], primary: Contrast | None = None
) -> Drawing | None:
    """Differences from a baseline with the zero line and the band that counts as equivalent; None without any.

    Args:
        name: File name without suffix.
        title: For the heading.
        baseline: What all are compared with.
        entries: The first on top.
        primary: The contrast named before the run, which stands out.
    """
    if not entries:
        return None
    with canvas(row_height(len(entries))) as (figure, axes):
        axes.axvspan(-EQUIVALENCE_MARGIN, EQUIVALENCE_MARGIN, color=colour("band"), linewidth=0, zorder=0)
        axes.axvline(0, color=colour("soft"), linewidth=1)
        own = [series(1 if entry.contrast is primary else 0) for entry in entries]
        bars = [
            (row, found)
            for row, entry in enumerate(entries)
            if (found := of_enough(entry.contrast, entry.contrast.interval))
        ]
        axes.hlines(
            [row for row, _ in bars],
            [found.low for _, found in bars],
            [found.high for _, found in bars],
            color=[own[row] for row, _ in bars],
            linewidth=2,
        )
        for stands_out, marker, size in ((False, "o", 34), (True, "D", 60)):
            shown = [row for row, entry in enumerate(entries) if (entry.contrast is primary) == stands_out]
            axes.scatter(
                [entries[row].contrast.difference for row in shown],
                shown,
                color=[own[row] for row in shown],
                s=size,
                marker=marker,
                zorder=3,
                edgecolor=colour("paper"),
            )
        rows(axes, [f"{entry.label}{' (primary)' if entry.contrast is primary else ''}" for entry in entries])
        right = axes.secondary_yaxis("right")
        right.set_yticks(range(len(entries)), [entry.note for entry in entries])
        right.tick_params(length=0)
        right.spines["right"].set_visible(False)
        axes.set_xlabel(f"difference from {baseline} (points)")
        contrasts = [entry.contrast for entry in entries]
        least = least_seeds(contrasts[0].alpha)
        shares = (
            "" if all(entry.removed is None for entry in entries) else ", and the share of pairs removed in evaluation"
        )
        return finish(
            figure,
            name,
            title,
            f"Difference in accuracy from {baseline}, with its {level(contrasts)} over seeds and examples (none below "
            f"{least} seeds). The band is what counts as equivalent, {EQUIVALENCE_MARGIN:g} points either way. At the "
            f"right: paired seeds{shares}.",
            f"{'; '.join(_said(entry) for entry in entries)}.",
        )


def _said(entry: Row) -> str:
    contrast = entry.contrast
    found = of_enough(contrast, contrast.interval)
    between = "" if found is None else f" ({found.low:+.2f} to {found.high:+.2f})"
    seeds = f"{contrast.seeds} seed{'s' if contrast.seeds > 1 else ''}"
    removed = "" if entry.removed is None else f", {share(entry.removed)} removed"
    return f"{entry.label} {contrast.difference:+.2f}{between}, {seeds} x {contrast.examples} examples{removed}"
