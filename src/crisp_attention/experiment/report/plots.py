"""Pictures of arms: accuracy, loss curves, train-test gap, realised sparsity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from crisp_attention.config import SparsityConfig
from crisp_attention.experiment.conclusions.analysis import Analysis, ArmResult
from crisp_attention.experiment.report.drawing import (
    MANY,
    MARKERS,
    Drawing,
    canvas,
    colour,
    finish,
    row_height,
    rows,
    series,
)
from crisp_attention.experiment.results.record import Record
from crisp_attention.experiment.statistics import Array

_Points = tuple[Sequence[float] | Array, Sequence[float] | Array]
_OTHERS = "other arms"
_APART = 5.0
"""Points of realised sparsity below which a picture of accuracy by sparsity would magnify rounding."""
_SHARES = (-3, 103)
"""Limits of an axis of percentages, whose ends are not to lie on the frame."""


def accuracy(analysis: Analysis) -> Drawing | None:
    """Test accuracy by arm, a dot a seed."""
    arms = finished(analysis)
    if not arms:
        return None
    with canvas(row_height(len(arms))) as (figure, axes):
        # Arms of other seeds, as a placebo, share none with these.
        offset = analysis.spec.arm(analysis.spec.primary.baseline).seed_offset
        joined = [place for place, arm in enumerate(arms) if arm.spec.seed_offset == offset]
        for index in sorted(set.intersection(*(set(arms[place].records) for place in joined)) if joined else ()):
            line = [100 * arms[place].records[index].final.test.accuracy for place in joined]
            axes.plot(line, joined, color=colour("line"), linewidth=0.8, zorder=1)
        _dots(axes, analysis, arms, [arm.accuracies for arm in arms])
        axes.set_xlabel("test accuracy (%)")
        return finish(
            figure,
            "accuracy",
            "Accuracy by arm",
            "Test accuracy at the last epoch. A dot is a seed, a grey line joins the same seed across arms, "
            "a bar is the mean.",
            listing(arms, [f"{arm.accuracies.mean():.2f}%" for arm in arms]),
        )


def gap(analysis: Analysis) -> Drawing | None:
    """Train minus test accuracy by arm, a dot a seed."""
    arms = finished(analysis)
    if not arms:
        return None
    with canvas(row_height(len(arms))) as (figure, axes):
        _dots(axes, analysis, arms, [arm.gaps for arm in arms])
        axes.axvline(0, color=colour("soft"), linewidth=0.8)
        axes.set_xlabel("train - test accuracy (points)")
        return finish(
            figure,
            "gap",
            "Generalisation gap by arm",
            "Accuracy on the training probe minus test accuracy. A regularizer narrows it.",
            listing(arms, [f"{arm.gaps.mean():+.2f}" for arm in arms]),
        )


def by_sparsity(analysis: Analysis) -> Drawing | None:
    """Test accuracy over realised sparsity, one line a rule; None unless there are several sparsities."""
    arms = [arm for arm in finished(analysis) if arm.realised("test") is not None]
    kinds: dict[tuple[str, str], list[ArmResult]] = {}
    for arm in arms:
        config = _in_evaluation(arm)
        # Only what is trained as it is evaluated: a line is to differ by sparsity alone.
        if config is not None and arm.spec.evaluate is None:
            others = {name: value for name, value in config.changes().items() if name not in config.strength}
            training = arm.spec.training, analysis.tuning and analysis.tuning.values.get(arm.name)
            kinds.setdefault((config.rule, repr((others, arm.spec.padding, training))), []).append(arm)
    rules = {_label(rule, own, [kind[0] for kind in kinds]): own for (rule, _), own in kinds.items()}
    baseline = next((arm for arm in arms if arm.name == analysis.spec.primary.baseline), None)
    levels = [100 * (arm.realised("test") or 0) for own in rules.values() for arm in own]
    if not levels or max(levels) - min(levels) < _APART:
        return None
    with canvas(3.6) as (figure, axes):
        if baseline is not None and not baseline.spec.attention.removes and baseline.spec.evaluate is None:
            mean, label = float(baseline.accuracies.mean()), f"{baseline.name} (mean)"
            axes.axhline(mean, color=colour("soft"), linewidth=1, linestyle=(0, (4, 3)), label=label)
        for number, (rule, own) in enumerate(rules.items()):
            own.sort(key=lambda arm: arm.realised("test") or 0)
            for arm in own:
                shares = [100 * _share(record.realised_sparsity.test) for record in _records(arm)]
                axes.scatter(shares, arm.accuracies, color=series(number), s=16, alpha=0.55, linewidth=0)
            axes.plot(
                [100 * (arm.realised("test") or 0) for arm in own],
                [arm.accuracies.mean() for arm in own],
                color=series(number),
                marker=MARKERS[(number + number // MANY) % len(MARKERS)],  # colours begin again with other markers
                linewidth=1.6,
                label=rule,
            )
        axes.set_xlabel("realised sparsity on the test split (%)")
        axes.set_ylabel("test accuracy (%)")
        legend_below(figure, axes)
        listed = [arm for own in rules.values() for arm in own]
        return finish(
            figure,
            "by-sparsity",
            "Accuracy by sparsity",
            "Test accuracy over the share of pairs that was really removed. A dot is a seed, a line joins the means of "
            "one rule whose other settings are the same.",
            listing(
                listed,
                [
                    f"{100 * (arm.realised('test') or 0):.1f}% removed, {arm.accuracies.mean():.2f}% correct "
                    f"(n = {len(arm.records)})"
                    for arm in listed
                ],
            ),
        )


def curves(analysis: Analysis) -> Drawing | None:
    """Train and test loss by epoch; None where only the last one was evaluated."""
    arms = finished(analysis)
    if not arms or not analysis.spec.training.curves:
        return None
    with canvas(3.4, 2, sharey=True) as (figure, (left, right)):
        for arm, style in zip(arms, line_styles(analysis, arms), strict=True):
            for axes, side in ((left, "train"), (right, "test")):
                losses = np.array([[getattr(epoch, side).loss for epoch in item.epochs] for item in _records(arm)])
                epochs = np.arange(1, losses.shape[1] + 1)
                if len(arms) <= MANY:
                    axes.plot(epochs, losses.T, color=style["color"], linewidth=0.6, alpha=0.35)
                axes.plot(epochs, losses.mean(axis=0), linewidth=1.8, markersize=5, **style)
        for axes, title in ((left, "training probe"), (right, "test")):
            axes.set_title(title)
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.set_ylabel("loss (nats)")
        legend_below(figure, right)
        return finish(
            figure,
            "curves",
            "Train and test loss",
            "Loss after each epoch, without dropout, on training examples and on the test split: bold the mean, "
            "thin each seed.",
            "Last epoch, train then test: "
            + listing(
                arms,
                [
                    f"{np.mean([score.loss for score in arm.train]):.3f}, "
                    f"{np.mean([score.loss for score in arm.test]):.3f}"
                    for arm in arms
                ],
            ),
        )


def layers(analysis: Analysis) -> Drawing | None:
    """Realised sparsity by layer."""
    arms = [arm for arm in finished(analysis) if arm.realised("test") is not None]

    def points(arm: ArmResult) -> _Points:
        shares = np.array([list(record.realised_sparsity.test.values()) for record in _records(arm)])
        return range(1, shares.shape[1] + 1), 100 * shares.mean(axis=0)

    return _lines(
        analysis,
        arms,
        points,
        ("attention layer", "pairs removed (%)"),
        _SHARES,
        lambda: (
            "sparsity",
            "Realised sparsity by layer",
            "Share of valid query-key pairs that were really removed on the test split, mean over seeds.",
            listing(arms, [f"{100 * (arm.realised('test') or 0):.1f}%" for arm in arms]),
        ),
    )


def lengths(analysis: Analysis) -> Drawing | None:
    """Realised sparsity by the length of an example; None where records do not tell."""
    arms = [arm for arm in finished(analysis) if arm.lengths]

    def points(arm: ArmResult) -> _Points:
        middle = [(item.shortest + item.longest) / 2 for item in arm.lengths]
        return middle, [100 * item.realised for item in arm.lengths]

    return _lines(
        analysis,
        arms,
        points,
        ("tokens of the example", "pairs removed (%)"),
        _SHARES,
        lambda: (
            "lengths",
            "Realised sparsity by length",
            "Share of valid pairs that were really removed in test examples of like length, all layers together, mean "
            "over seeds. Examples by length in tokens: "
            + "; ".join(f"{item.shortest} to {item.longest}: n = {item.examples}" for item in arms[0].lengths)
            + ".",
            "Shortest and longest: "
            + listing(
                arms, [f"{100 * arm.lengths[0].realised:.1f}%, {100 * arm.lengths[-1].realised:.1f}%" for arm in arms]
            ),
        ),
    )


def entropy(analysis: Analysis) -> Drawing | None:
    """Attention entropy by layer; None where records do not tell."""
    arms = [arm for arm in finished(analysis) if arm.entropy]
    return _lines(
        analysis,
        arms,
        lambda arm: (range(1, len(arm.entropy) + 1), list(arm.entropy.values())),
        ("attention layer", "entropy (nats)"),
        (0, None),
        lambda: (
            "entropy",
            "Attention entropy by layer",
            "Mean entropy of a query's attention on the test split: how widely it looks.",
            "Mean over layers: " + listing(arms, [f"{np.mean(list(arm.entropy.values())):.2f}" for arm in arms]),
        ),
    )


def finished(analysis: Analysis) -> list[ArmResult]:
    """The arms that have something to show."""
    return [arm for arm in analysis.arms if arm.records]


def _label(rule: str, arms: Sequence[ArmResult], rules: Sequence[str]) -> str:
    """What a line is called: by its rule, or by its arms where there are several lines of that rule."""
    return rule if rules.count(rule) == 1 else ", ".join(arm.name for arm in arms)


def line_styles(analysis: Analysis, arms: Sequence[ArmResult]) -> list[dict[str, Any]]:
    """Colour, marker and label of each arm's line; of many arms all but the primary contrast's are grey."""
    styles: list[dict[str, Any]] = []
    places = {arm.name: number for number, arm in enumerate(analysis.arms)}
    matters = (analysis.spec.primary.baseline, analysis.spec.primary.arm)
    for arm in arms:
        number = places[arm.name]
        if len(analysis.arms) > MANY:
            number = matters.index(arm.name) if arm.name in matters else -1
        if number < 0:
            named = any(style.get("label") == _OTHERS for style in styles)
            styles.append({"color": colour("line"), "zorder": 1} | ({} if named else {"label": _OTHERS}))
        else:
            styles.append({"color": series(number), "marker": MARKERS[number % len(MARKERS)], "label": arm.name})
    return styles


def legend_below(figure: Any, axes: Any) -> None:
    """A legend under the picture, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(4, 64 // (max((len(label) for label in labels), default=1) + 5)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _lines(
    analysis: Analysis,
    arms: Sequence[ArmResult],
    points: Callable[[ArmResult], _Points],
    labels: tuple[str, str],
    limits: tuple[float, float | None],
    told: Callable[[], tuple[str, str, str, str]],
) -> Drawing | None:
    """One line an arm; None without any.

    Args:
        analysis: All arms, which decides the colours.
        arms: Those that are shown.
        points: Places and values of an arm.
        labels: Of both axes.
        limits: Of the values; None where the data decide.
        told: File name, title, description and values of the drawing.
    """
    if not arms:
        return None
    with canvas(3.2) as (figure, axes):
        for arm, style in zip(arms, line_styles(analysis, arms), strict=True):
            axes.plot(*points(arm), **style)
        low, high = limits
        # Room for the markers of lines that run along the top.
        axes.set_ylim(low, 1.08 * axes.dataLim.ymax if high is None else high)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_below(figure, axes)
        return finish(figure, *told())


def _dots(axes: Any, analysis: Analysis, arms: Sequence[ArmResult], values: Sequence[Array]) -> None:
    places = {arm.name: number for number, arm in enumerate(analysis.arms)}
    own = [series(places[arm.name]) for arm in arms]
    counts = [len(points) for points in values]
    axes.scatter(
        np.concatenate(values),
        np.repeat(np.arange(len(arms)), counts),
        color=np.repeat(own, counts),
        s=26,
        zorder=3,
        edgecolor=colour("paper"),
    )
    middle = np.arange(len(arms))
    axes.vlines([points.mean() for points in values], middle - 0.3, middle + 0.3, color=own, linewidth=2.5, zorder=2)
    rows(axes, [f"{arm.name}  n = {len(arm.records)}" for arm in arms])


def _records(arm: ArmResult) -> list[Record]:
    return [arm.records[index] for index in arm.indexes]


def _share(by_layer: dict[str, float]) -> float:
    return float(np.mean(list(by_layer.values())))


def _in_evaluation(arm: ArmResult) -> SparsityConfig | None:
    """The settings that are in force in evaluation; None where it is dense."""
    config: SparsityConfig = arm.spec.attention if arm.spec.evaluate is None else arm.spec.evaluate
    return config if config.active(training=False) else None


def listing(arms: Sequence[ArmResult], values: Sequence[str]) -> str:
    """One value an arm, as the end of a caption."""
    return "; ".join(f"{arm.name} {value}" for arm, value in zip(arms, values, strict=True)) + "."
