"""What `docs/findings.md` and the README say of the published studies, written into them from the records in results/.

`python docs/site/findings.py` writes anew all that stands between `<!-- from the records: KIND STUDY -->` and
`<!-- end -->`, so that the pages read well where they lie, and draws the README's picture; tests compare. No figure
there is typed by hand.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean

import numpy as np
from evidence import FILE, evidence, picture
from published import analysis_of, contrast_between, pair_between
from tables import markdown, speed
from wrong_labels import wrong_labels

from crisp_attention.experiment import statistics
from crisp_attention.experiment.conclusions.analysis import Analysis, ArmResult
from crisp_attention.experiment.conclusions.pattern import is_placebo
from crisp_attention.experiment.report.tables import accuracy, interval, of_enough, p, share, signed
from crisp_attention.experiment.specification.tune import told
from crisp_attention.experiment.statistics import Contrast, PooledDifference

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "findings.md")
PUBLISHED_GAIN = 0.97
"""Points: 91.59% at 80% sparsity, 90.62% dense."""

_BLOCK = re.compile(r"(<!-- from the records: ([^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def verdict(name: str) -> str:
    """The verdict of a study, with what it rests on and the cautions beside it."""
    analysis = analysis_of(name)
    lines = [*analysis.verdict.details, *analysis.cautions]
    return "\n".join([f"**{analysis.verdict.headline}**", "", *(f"- {line}" for line in lines)])


def verdicts(*names: str) -> str:
    """A row a study: its primary contrast and the verdict."""
    rows = []
    for name in names:
        analysis = analysis_of(name)
        place = f", {analysis.spec.primary_condition}" if analysis.spec.primary_condition else ""
        # The arms of the primary condition.
        arm = analysis.arm(analysis.spec.primary.arm)
        question = f"{arm.name} against {analysis.spec.primary.baseline}{place}"
        figures = _figures(analysis.primary)[:-1]
        rows.append([f"`{name}`", question, *figures, _removed(arm), f"*{analysis.verdict.word}*"])
    return markdown(["study", "question", *_FIGURES[:-1], "removed", "verdict"], rows, prose=("question", "verdict"))


def contrasts(name: str) -> str:
    """A row an arm, in each condition: accuracy, difference from the baseline, what was removed; and what was tuned."""
    analysis = analysis_of(name)
    varied = len(analysis.conditions) > 1
    rows = []
    for condition, arms in analysis.by_condition.items():
        own = {found.arm: found for found in analysis.condition_contrasts[condition]}
        for arm in arms:
            found = own.get(arm.name)
            label = f"**{arm.name}**" if found is not None and found is analysis.primary else arm.name
            figures = _figures(found) if found is not None else [str(len(arm.records)), "", "", "", ""]
            rows.append([*([condition] if varied else []), label, accuracy(arm), *figures, _removed(arm)])
    header = [*(["condition"] if varied else []), "arm", "accuracy, %", *_FIGURES, "removed"]
    return "\n\n".join([markdown(header, rows, prose=("arm",)), *_found(analysis)])


def noise(name: str) -> str:
    """How often two dense runs, alike but for the seed, differ by as much as the paper's two."""
    analysis = analysis_of(name)
    baseline = analysis.spec.arm(analysis.spec.primary.baseline)
    alike = {arm.name for arm in analysis.spec.arms if arm == baseline or is_placebo(analysis.spec, arm)}
    accuracies = np.concatenate([arm.accuracies for arm in analysis.arms if arm.name in alike])
    pairs = list(combinations(accuracies, 2))
    as_far = sum(abs(one - other) >= PUBLISHED_GAIN for one, other in pairs)
    return (
        f"Of the {len(pairs)} pairs among our {len(accuracies)} dense runs on the same sentences, alike but for the "
        f"seed, {as_far} ({as_far / len(pairs):.0%}) differ by {PUBLISHED_GAIN} points or more."
    )


def training(name: str) -> str:
    """A row an arm: losses on training examples and on the evaluation split, and the gap in accuracy."""
    rows = [
        [
            arm.name,
            *(f"{fmean(score.loss for score in scores):.3f}" for scores in (arm.train, arm.test)),
            f"{arm.train_accuracies.mean():.2f}",
            signed(float(arm.gaps.mean())),
        ]
        for arm in analysis_of(name).arms
        if arm.records
    ]
    header = ["arm", "training loss, nats", "test loss, nats", "training accuracy, %", "gap, points"]
    return markdown(header, rows, prose=("arm",))


def trends(*names: str) -> str:
    """A row an arm and study: whether its difference follows what is varied."""
    rows = [
        [
            f"`{name}`",
            f"**{item.arm}**" if item.arm == analysis_of(name).spec.primary.arm else item.arm,
            str(item.seeds),
            signed(item.slope),
            f"per {item.unit}",
            interval(of_enough(item, item.interval)),
            p(item.p_value),
            p(item.p_holm),
        ]
        for name in names
        for item in analysis_of(name).interactions
    ]
    header = ["study", "arm", "seeds", "slope, points", "", "95% interval", "p", "p Holm"]
    return markdown(header, rows, prose=("arm", ""))


def against(name: str, arm: str, other: str) -> str:
    """One arm against another that is not the baseline."""
    analysis = analysis_of(name)
    found = contrast_between(analysis, analysis.spec.primary_condition, arm, other)
    return (
        f"{arm} against {other}: {signed(found.difference)} points over {found.seeds} seeds, 95% interval "
        f"{interval(found.interval)}, p = {p(found.p_value)}."
    )


def overall(*names: str) -> str:
    """A row an arm: its mean difference over studies that have the same arms on other data, in the primary condition.

    By `statistics.pooled`, p adjusted over all arms but the placebo. The placebo is the baseline with other seeds, so
    it would have been as good a baseline.
    """
    return _over_studies(names, _differences, _DIFFERENCE)


def overall_in(condition: str, *names: str) -> str:
    """The same in another condition."""
    return _over_studies(
        names, lambda analysis, *arms: pair_between(analysis, condition, *arms).by_example, _DIFFERENCE
    )


def overall_against(arm: str, other: str, *names: str) -> str:
    """One arm against another that is not the baseline, over studies, in the primary condition."""
    found = _pooled([analysis_of(name) for name in names], _differences, arm, other)
    return (
        f"{arm} against {other} over the {len(names)}: {signed(found.difference)} points over {found.seeds} pairs, 95% "
        f"interval {interval(found.interval)}, p = {p(found.p_value)}."
    )


def overall_trend(*names: str) -> str:
    """The same of the slope of each difference over what these studies vary."""
    (unit,) = {item.unit for name in names for item in analysis_of(name).interactions}
    return _over_studies(names, _slopes, f"slope, points per {unit}")


def _differences(analysis: Analysis, name: str, other: str) -> np.ndarray:
    """What each seed and example adds to an arm's difference from another, in the primary condition."""
    return pair_between(analysis, analysis.spec.primary_condition, name, other).by_example


def _slopes(analysis: Analysis, name: str, other: str) -> np.ndarray:
    """What each seed and example adds to the slope of an arm's difference from another."""
    vary = analysis.spec.vary
    assert vary is not None
    _, scale = statistics.SCALES[vary.key]
    by_example = [pair_between(analysis, condition, name, other).by_example for condition in analysis.conditions]
    # Otherwise conditions might lack different seeds.
    assert all(len(table) == analysis.spec.seeds for table in by_example), f"{analysis.spec.name} is not done yet"
    return statistics.slopes_by_example(scale(np.array(vary.values)), np.stack(by_example))


def _pooled(
    analyses: Sequence[Analysis], by_example: Callable[[Analysis, str, str], np.ndarray], arm: str, other: str
) -> PooledDifference:
    return statistics.pooled([by_example(analysis, arm, other) for analysis in analyses], np.random.default_rng(0))


def _over_studies(names: Sequence[str], by_example: Callable[[Analysis, str, str], np.ndarray], figure: str) -> str:
    """A row an arm.

    Args:
        names: Of the studies.
        by_example: What each seed and example adds to the difference between two arms, `[seeds, examples]`.
        figure: What is averaged.
    """
    analyses = [analysis_of(name) for name in names]
    spec = analyses[0].spec
    arms = [arm.name for arm in spec.arms if arm.name != spec.primary.baseline]
    placebo = next(arm.name for arm in spec.arms if is_placebo(spec, arm))

    over = functools.partial(_pooled, analyses, by_example)
    found = {arm: over(arm, spec.primary.baseline) for arm in arms}
    asked = [arm for arm in arms if arm != placebo]
    adjusted = dict(zip(asked, statistics.holm(np.array([found[arm].p_value for arm in asked])), strict=True))
    rows = []
    for arm, own in found.items():
        other = over(arm, placebo) if arm in asked else None
        rows.append(
            [
                arm,
                str(own.seeds),
                signed(own.difference),
                interval(own.interval),
                p(own.p_value),
                p(adjusted.get(arm)),
                interval(own.over_studies),
                f"{signed(other.difference)} ({interval(other.interval)})" if other else "-",
            ]
        )
    return markdown(["arm", "seeds", figure, *_OVERALL, f"from {placebo}"], rows, prose=("arm",))


def write(text: str) -> str:
    """A page with everything that comes from the records as the records have it now.

    Raises:
        KeyError: If a block asks for something that is not made here.
    """

    def block(found: re.Match[str]) -> str:
        kind, *names = found[2].split()
        return f"{found[1]}\n{_KINDS[kind](*names)}\n\n{found[3]}"

    return _BLOCK.sub(block, text)


def prose(text: str) -> str:
    """What of a page is written by hand."""
    return _BLOCK.sub("", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


_KINDS: dict[str, Callable[..., str]] = {
    "against": against,
    "contrasts": contrasts,
    "evidence": evidence,
    "noise": noise,
    "overall": overall,
    "overall-against": overall_against,
    "overall-in": overall_in,
    "overall-trend": overall_trend,
    "speed": speed,
    "training": training,
    "trends": trends,
    "verdict": verdict,
    "verdicts": verdicts,
    "wrong-labels": wrong_labels,
}
_DIFFERENCE = "difference, points"
_FIGURES = ("seeds", _DIFFERENCE, "95% interval", "p", "p Holm")
_OVERALL = ("95% interval, by variance", "p", "p Holm", "interval over data sets")


def _figures(found: Contrast | None) -> list[str]:
    if found is None:
        return ["0", "-", "-", "-", "-"]
    within = interval(of_enough(found, found.interval))
    return [str(found.seeds), signed(found.difference), within, p(found.p_value), p(found.p_holm)]


def _found(analysis: Analysis) -> list[str]:
    """What the search found for each arm, if there was one: a sentence."""
    if analysis.tuning is None:
        return []
    found = [
        f"{' and '.join(outcome.arms)} "
        + ", ".join(f"{name.replace('_', ' ')} {told(value)}" for name, value in sorted(outcome.best.values.items()))
        for outcome in analysis.tuning.outcomes
    ]
    return [f"Found by the search: {'; '.join(found)}."]


def _removed(arm: ArmResult) -> str:
    """Share of valid pairs removed; in training and in evaluation where they differ."""
    return " / ".join(dict.fromkeys(share(arm.realised(mode)) for mode in ("train", "test")))


if __name__ == "__main__":
    FILE.write_text(picture().file, encoding="utf-8")
    for page in PAGES:
        page.write_text(write(page.read_text(encoding="utf-8")), encoding="utf-8")
