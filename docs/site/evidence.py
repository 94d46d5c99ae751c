"""All published comparisons of sparse with dense attention, together: a table and a picture, by how much was removed.

What counts is decided by the records and not by hand. The arm keeps the best-scoring pairs, by the paper's rule or each
query's own; its runs and the baseline's have the same settings; all planned pairs of seeds are done, and enough for an
interval. The baseline with other seeds stands beside them, for what nothing looks like.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from statistics import median

from matplotlib.ticker import FixedLocator, NullLocator
from tables import RESULTS, markdown

from crisp_attention.experiment import study
from crisp_attention.experiment.conclusions.analysis import Analysis, ArmResult
from crisp_attention.experiment.conclusions.cautions import near
from crisp_attention.experiment.conclusions.outputs import named
from crisp_attention.experiment.conclusions.pattern import is_placebo
from crisp_attention.experiment.report.drawing import MARKERS, Drawing, canvas, colour, finish, series
from crisp_attention.experiment.report.plots import legend_below
from crisp_attention.experiment.report.tables import of_enough, share, signed
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.statistics import EQUIVALENCE_MARGIN, Contrast

_BY_SCORE = frozenset({"percentile", "topk"})
_BANDS = (0.0, 0.4, 0.65, 1.0)
"""Upper limits of the shares removed that are told together; the first is the placebo's."""
_TICKS = (-20, -10, -5, -2, -1, 0, 1, 2, 5, 10)
FILE = RESULTS / "evidence.svg"
"""The picture as the README shows it."""


@cache
def analysis_of(name: str) -> Analysis:
    """A published study."""
    return study.analyse(Store(RESULTS / name))


@dataclass(frozen=True)
class Comparison:
    """One arm against dense attention in one condition of one study.

    Attributes:
        study: Its name.
        condition: Name of the data's condition; "" where nothing varies.
        data: Name of the data set.
        removed: Share of valid pairs removed, in training or in evaluation, whichever is more.
        contrast: The difference and its interval.
    """

    study: str
    condition: str
    data: str
    removed: float
    contrast: Contrast

    @property
    def side(self) -> int:
        """On which side of zero the interval lies: 1, -1, or 0 where zero is in it."""
        return (self.contrast.interval.low > 0) - (self.contrast.interval.high < 0)


@cache
def comparisons() -> tuple[Comparison, ...]:
    """Every comparison that counts, over all published studies; runs that two studies share count once."""
    found: dict[frozenset[str], Comparison] = {}
    for folder in sorted(path.parent for path in RESULTS.glob("*/study.json")):
        for runs, comparison in _of_study(folder.name):
            found.setdefault(runs, comparison)
    return tuple(found.values())


def _of_study(name: str) -> Iterator[tuple[frozenset[str], Comparison]]:
    analysis = analysis_of(name)
    if analysis.spec.data.validation_share is not None:  # looked for candidates, on a part of the training split
        return
    for condition, arms in analysis.by_condition.items():
        baseline = named(arms, analysis.spec.primary.baseline)
        for contrast in analysis.condition_contrasts[condition]:
            arm = named(arms, contrast.arm)
            placebo = is_placebo(analysis.spec, arm.spec)
            whole = contrast.seeds == analysis.spec.seeds and of_enough(contrast, contrast.interval) is not None
            if whole and (placebo or _by_score(arm)) and _alike(arm, baseline):
                data = arm.records[arm.indexes[0]].provenance.data
                removed = max(arm.realised(mode) or 0.0 for mode in ("train", "test"))
                runs = frozenset(record.run_id for side in (arm, baseline) for record in side.records.values())
                yield runs, Comparison(name, condition, data, removed, contrast)


def _by_score(arm: ArmResult) -> bool:
    attention = arm.spec.attention
    return bool(attention.removes and attention.rule in _BY_SCORE and not attention.count_padding)


def _alike(arm: ArmResult, baseline: ArmResult) -> bool:
    """Whether two arms were trained with the same settings, or such as no search tells apart."""
    one, other = (side.records[side.indexes[0]].config["training"] for side in (arm, baseline))
    return one.keys() == other.keys() and all(near(one[setting], other[setting]) for setting in one)


def _bands() -> list[tuple[str, list[Comparison]]]:
    """What each band of shares removed is called, and its comparisons, the lowest difference first."""
    bands = []
    for low, high in zip((-1.0, *_BANDS), _BANDS, strict=False):
        own = [item for item in comparisons() if low < item.removed <= high]
        own.sort(key=lambda item: item.contrast.difference)
        if own:
            shares = [f"{100 * end(item.removed for item in own):.0f}" for end in (min, max)]
            bands.append(("placebo" if high == 0 else f"{' to '.join(dict.fromkeys(shares))}%", own))
    return bands


def evidence() -> str:
    """A row a band of shares removed: how many comparisons there are, and on which side of zero their intervals lie."""
    rows = []
    for label, own in _bands():
        sides = Counter(item.side for item in own)
        differences = [item.contrast.difference for item in own]
        told = [signed(value) for value in (median(differences), min(differences), max(differences))]
        rows.append([label, *(str(count) for count in (len(own), sides[1], sides[0], sides[-1])), *told])
    header = [
        "pairs removed",
        "comparisons",
        "interval above zero",
        "zero in it",
        "below zero",
        "median difference, points",
        "lowest",
        "highest",
    ]
    return markdown(header, rows)


def picture() -> Drawing:
    """Every comparison with its interval, in the bands of the table, a colour a data set."""
    bands = _bands()
    places: dict[str, list[tuple[float, Comparison]]] = {}
    middles, ends, place = [], [], 0.0
    for _, own in bands:
        first = place
        for item in own:
            places.setdefault(item.data, []).append((place, item))
            place += 1
        middles.append((first + place - 1) / 2)
        ends.append(place + 0.5)
        place += 2
    with canvas(4.2) as (figure, axes):
        axes.axhspan(-EQUIVALENCE_MARGIN, EQUIVALENCE_MARGIN, color=colour("band"), linewidth=0, zorder=0)
        axes.axhline(0, color=colour("soft"), linewidth=1)
        for end in ends[:-1]:
            axes.axvline(end, color=colour("line"), linewidth=1)
        for number, (data, own) in enumerate(sorted(places.items())):
            at = [where for where, _ in own]
            found = [item.contrast for _, item in own]
            axes.vlines(
                at,
                [item.interval.low for item in found],
                [item.interval.high for item in found],
                color=series(number),
                linewidth=1.2,
            )
            axes.scatter(
                at,
                [item.difference for item in found],
                color=series(number),
                marker=MARKERS[number],
                s=16,
                zorder=3,
                label=data,
            )
        # Differences of a point and of ten stand in one picture.
        axes.set_yscale("symlog", linthresh=2, linscale=1.5)
        axes.yaxis.set_major_locator(FixedLocator(_TICKS))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda tick, _: f"{tick:+g}" if tick else "0")
        axes.set_xticks(middles, [label for label, _ in bands])
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("valid pairs removed")
        axes.set_ylabel("difference from dense (points)")
        legend_below(figure, axes)
        return finish(
            figure,
            "evidence",
            "Sparse against dense attention",
            "Every comparison of sparse with dense attention at like settings, with its 95% interval over seeds and "
            "examples, a colour a data set. Beyond two points the scale is logarithmic.",
            "; ".join(_said(item) for _, own in bands for item in own) + ".",
        )


def _said(item: Comparison) -> str:
    place = ", ".join(filter(None, (item.study, item.condition)))
    interval = item.contrast.interval
    return (
        f"{item.contrast.arm} ({place}; {share(item.removed)} removed) {item.contrast.difference:+.2f} "
        f"({interval.low:+.2f} to {interval.high:+.2f})"
    )
