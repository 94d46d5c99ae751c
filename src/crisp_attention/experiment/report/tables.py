"""Rows of cells, as strings: the same tables in the terminal, in Markdown and in HTML."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crisp_attention.experiment.analysis import Analysis, ArmResult
from crisp_attention.experiment.statistics import MIN_SEEDS, Contrast, Interval, interquartile_mean

MISSING = "-"


@dataclass(frozen=True)
class Table:
    """A table of strings.

    Attributes:
        caption: What it shows, with units.
        header: Column names; all columns but the first are numbers.
        rows: Cells.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def arms(analysis: Analysis) -> Table:
    """One row an arm: how many runs, how accurate, how sparse, how large the gap."""
    return Table(
        "Arms, at the last epoch of a fixed schedule: means over seeds, accuracy in % "
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
                _accuracy(arm),
                _signed(contrast.difference) if contrast else MISSING,
                _crossed(contrast).replace(" to ", "..") if contrast else MISSING,
                _share(arm.realised("test")),
            )
        )
    return Table(
        f"Mean over seeds: accuracy in % (± standard deviation), difference in points from "
        f"{analysis.spec.primary.baseline} with its interval over seeds and examples, realised sparsity.",
        ("arm", "runs", "correct", "accuracy", "diff", "95% interval", "sparse"),
        tuple(rows),
    )


def contrasts(analysis: Analysis) -> Table:
    """One row a contrast, the primary one first."""
    return Table(
        f"Differences from {analysis.spec.primary.baseline} over paired seeds, in points. The first interval resamples "
        "seeds and examples (not below 6 seeds); the second is over seeds alone, on these examples. p: sign-flip "
        "test; Holm over the secondary contrasts; TOST: equivalence within ±0.5 points; detectable: with 80% power.",
        (
            "contrast",
            "seeds",
            "difference",
            "examples",
            "95% interval",
            "on these examples",
            "p",
            "p Holm",
            "d_z",
            "P(better)",
            "TOST p",
            "detectable",
        ),
        tuple(_contrast_row(contrast, contrast is analysis.primary) for contrast in analysis.contrasts),
    )


def runs(analysis: Analysis) -> Table:
    """One row a run, those in trouble with their reason."""
    rows = []
    for arm in analysis.arms:
        for index in range(arm.planned):
            record = arm.records.get(index) or arm.troubled.get(index)
            if record is None:
                rows.append(
                    (arm.name, str(index + arm.spec.seed_offset), "not done", MISSING, MISSING, MISSING, MISSING)
                )
                continue
            final = record.final if index in arm.records else None
            rows.append(
                (
                    arm.name,
                    str(record.config["seed"]),
                    record.status if record.reason is None else f"{record.status}: {record.reason}",
                    f"{final.test.correct} of {final.test.total}" if final else MISSING,
                    f"{final.train.correct} of {final.train.total}" if final else MISSING,
                    f"{record.timing.seconds:.0f}",
                    record.run_id,
                )
            )
    return Table(
        "Every run: examples classified correctly, seconds, and the run's id.",
        ("arm", "seed", "status", "test", "train probe", "seconds", "run"),
        tuple(rows),
    )


def _arm_row(arm: ArmResult) -> tuple[str, ...]:
    def mean(values: list[float]) -> str:
        return f"{np.mean(values):.4f}" if values else MISSING

    return (
        arm.name,
        _runs(arm),
        _mean_correct(arm),
        _accuracy(arm),
        f"{interquartile_mean(arm.accuracies):.2f}" if arm.records else MISSING,
        mean([score.loss for score in arm.test]),
        mean([score.loss for score in arm.train]),
        _gap(arm),
        _share(arm.realised("train")),
        _share(arm.realised("test")),
    )


def _contrast_row(contrast: Contrast, primary: bool) -> tuple[str, ...]:
    return (
        f"{contrast.arm}{' (primary)' if primary else ''}",
        str(contrast.seeds),
        _signed(contrast.difference),
        f"{contrast.sentences:+.1f} of {contrast.examples}",
        _crossed(contrast),
        _interval(contrast.seed_interval),
        _p(contrast.p_value),
        _p(contrast.p_holm),
        _signed(contrast.effect_size),
        f"{contrast.probability_better:.2f}",
        _p(contrast.p_equivalence),
        MISSING if contrast.detectable is None else f"{contrast.detectable:.2f}",
    )


def _runs(arm: ArmResult) -> str:
    trouble = f" ({len(arm.troubled)} diverged or failed)" if arm.troubled else ""
    return f"{len(arm.records)} of {arm.planned}{trouble}"


def _mean_correct(arm: ArmResult) -> str:
    if not arm.records:
        return MISSING
    return f"{np.mean([score.correct for score in arm.test]):.1f} of {arm.test[0].total}"


def _accuracy(arm: ArmResult) -> str:
    if not arm.records:
        return MISSING
    values = arm.accuracies
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")


def _gap(arm: ArmResult) -> str:
    return _signed(float(arm.gaps.mean())) if arm.records else MISSING


def _share(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}%"


def _signed(value: float | None) -> str:
    return MISSING if value is None else f"{value:+.2f}"


def _crossed(contrast: Contrast) -> str:
    """The interval over seeds and examples; of too few seeds a bootstrap knows too little."""
    return _interval(contrast.interval) if contrast.seeds >= MIN_SEEDS else MISSING


def _interval(interval: Interval | None) -> str:
    return MISSING if interval is None else f"{interval.low:+.2f} to {interval.high:+.2f}"


def _p(value: float | None) -> str:
    if value is None:
        return MISSING
    return "<0.001" if value < 0.001 else f"{value:.3f}"
