"""All published comparisons of sparse with dense attention, together: a table and a picture, by how much was removed.

What counts is decided by the records and not by hand. The arm keeps the best-scoring pairs, by the paper's rule or each
query's own; its runs and those of a dense arm have the same settings; all planned pairs of seeds are done, and enough
for an interval; it is no search for candidates. The baseline with other seeds stands beside them, for what nothing
looks like. What only fails for its settings is counted apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from statistics import median

from matplotlib.ticker import FixedLocator, NullLocator
from published import analysis_of, contrast_between
from tables import RESULTS, markdown

from crisp_attention.experiment.conclusions.analysis import Analysis, ArmResult
from crisp_attention.experiment.conclusions.cautions import near
from crisp_attention.experiment.conclusions.outputs import named, shared
from crisp_attention.experiment.conclusions.pattern import dense, is_placebo
from crisp_attention.experiment.report.drawing import MARKERS, Drawing, canvas, colour, finish, series
from crisp_attention.experiment.report.plots import legend_below
from crisp_attention.experiment.report.tables import interval, share, signed
from crisp_attention.experiment.statistics import ALPHA, EQUIVALENCE_MARGIN, Contrast, least_seeds

_BY_SCORE = frozenset({"percentile", "topk"})
_BANDS = (-1.0, 0.0, 0.4, 0.65, 1.0)
"""Limits of the shares removed that are told together, each band with its upper one; the first is the placebo's."""
_TICKS = (-20, -10, -5, -2, -1, 0, 1, 2, 5, 10)
FILE = RESULTS / "evidence.svg"
"""The picture as the README shows it."""


@dataclass(frozen=True)
class Comparison:
    """One arm against dense attention in one condition of one study.

    Attributes:
        study: Its name.
        condition: Name of the data's condition; "" where nothing varies.
        data: Name of the data set.
        removed: Share of valid pairs removed, in training or in evaluation, whichever is more.
        contrast: The difference and its interval.
        alike: Whether both sides were trained with the same settings.
    """

    study: str
    condition: str
    data: str
    removed: float
    contrast: Contrast
    alike: bool

    @property
    def side(self) -> int:
        """On which side of zero the interval lies: 1, -1, or 0 where zero is in it."""
        return (self.contrast.interval.low > 0) - (self.contrast.interval.high < 0)

    @property
    def side_by_seeds(self) -> int:
        """The same by the test over seeds alone, at 5%."""
        found = self.contrast
        return (found.p_value < found.alpha) * ((found.difference > 0) - (found.difference < 0))


@cache
def comparisons() -> tuple[Comparison, ...]:
    """Every comparison between equals, over all published studies; runs that two studies share count once."""
    return tuple(item for item in _all() if item.alike)


def unlike() -> tuple[Comparison, ...]:
    """What is left out of these for its settings alone."""
    return tuple(item for item in _all() if not item.alike)


@cache
def _all() -> tuple[Comparison, ...]:
    found: dict[frozenset[str], Comparison] = {}
    for folder in sorted(path.parent for path in RESULTS.glob("*/study.json")):
        for runs, comparison in _of_study(folder.name):
            found.setdefault(runs, comparison)
    return tuple(found.values())


def _of_study(name: str) -> Iterator[tuple[frozenset[str], Comparison]]:
    """The comparisons of one study, each under the runs that it rests on."""
    analysis = analysis_of(name)
    if analysis.spec.data.validation_share is not None:  # looked for candidates, on a part of the training split
        return
    for condition, arms in analysis.by_condition.items():
        sparse = [arm for arm in arms if _by_score(arm)]
        against = {arm.name: _dense_beside(arm, arms, analysis) for arm in sparse}
        found = [(arm, *against[arm.name]) for arm in sparse]
        baseline = named(arms, analysis.spec.primary.baseline)
        if any(alike and other is baseline for other, alike in against.values()):
            found += [(arm, baseline, True) for arm in arms if is_placebo(analysis.spec, arm.spec)]
        for arm, other, alike in found:
            if len(shared(arm, other, analysis.spec.seeds)) == analysis.spec.seeds >= least_seeds(ALPHA):
                contrast = _contrast(analysis, condition, arm.name, other.name)
                data = arm.records[arm.indexes[0]].provenance.data
                removed = max(arm.realised(mode) or 0.0 for mode in ("train", "test"))
                runs = frozenset(record.run_id for side in (arm, other) for record in side.records.values())
                yield runs, Comparison(name, condition, data, removed, contrast, alike)


def _dense_beside(arm: ArmResult, arms: Sequence[ArmResult], analysis: Analysis) -> tuple[ArmResult, bool]:
    """The dense arm that a sparse one is to be compared with, and whether their settings are the same.

    It is the study's baseline, unless that has other settings and another dense arm with the same seeds has not.
    """
    baseline = named(arms, analysis.spec.primary.baseline)
    same_seeds = [
        other
        for other in arms
        if all(dense(other.spec, training=mode) for mode in (True, False))
        and other.spec.seed_offset == arm.spec.seed_offset
    ]
    for other in (baseline, *same_seeds):
        if _alike(arm, other):
            return other, True
    return baseline, False


def _contrast(analysis: Analysis, condition: str, arm: str, other: str) -> Contrast:
    if other == analysis.spec.primary.baseline:  # as the report has it
        return next(found for found in analysis.condition_contrasts[condition] if found.arm == arm)
    return contrast_between(analysis, condition, arm, other)


def _by_score(arm: ArmResult) -> bool:
    """Whether an arm keeps the best-scoring pairs, in training, in evaluation or in both, and removes no others."""
    used = [config for config in (arm.spec.attention, arm.spec.evaluate) if config is not None and config.removes]
    return bool(used) and all(config.rule in _BY_SCORE and not config.count_padding for config in used)


def _alike(arm: ArmResult, other: ArmResult) -> bool:
    """Whether two arms were trained with the same settings, or such as no search tells apart."""
    if not (arm.records and other.records):
        return False
    one, two = (side.records[side.indexes[0]].config["training"] for side in (arm, other))
    return one.keys() == two.keys() and all(near(one[setting], two[setting]) for setting in one)


def _bands() -> list[tuple[str, list[Comparison]]]:
    """What each band of shares removed is called, and its comparisons, the lowest difference first."""
    bands = []
    for low, high in pairwise(_BANDS):
        own = _sorted(item for item in comparisons() if low < item.removed <= high)
        if own:
            shares = [f"{100 * end(item.removed for item in own):.0f}" for end in (min, max)]
            bands.append(("placebo" if high == 0 else f"{' to '.join(dict.fromkeys(shares))}%", own))
    return bands


def _sorted(items: Iterable[Comparison]) -> list[Comparison]:
    return sorted(items, key=lambda item: item.contrast.difference)


def evidence() -> str:
    """A row a band of shares removed: how many comparisons there are, and on which side of zero they lie.

    The last row has what is left out above, since the two sides were trained with other settings.
    """
    rows = []
    for label, own in [*_bands(), ("settings differ", _sorted(unlike()))]:
        sides = Counter(item.side for item in own)
        by_seeds = Counter(item.side_by_seeds for item in own)
        differences = [item.contrast.difference for item in own]
        told = [signed(value) for value in (median(differences), differences[0], differences[-1])]
        counts = (len(own), sides[1], sides[0], sides[-1], by_seeds[1], by_seeds[-1])
        spared = sum(item.contrast.interval.low > -EQUIVALENCE_MARGIN for item in own)
        rows.append([label, *map(str, (*counts, spared)), *told])
    header = [
        "pairs removed",
        "comparisons",
        "interval above zero",
        "zero in it",
        "below zero",
        "p < 0.05, higher",
        "p < 0.05, lower",
        f"loss of {EQUIVALENCE_MARGIN:g} excluded",
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
    found = item.contrast
    return (
        f"{found.arm} ({place}; {share(item.removed)} removed) {signed(found.difference)} ({interval(found.interval)})"
    )
