"""Pictures as SVG text: accuracy by arm, loss curves, train-test gap, realised sparsity by layer."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from crisp_attention.experiment.analysis import Analysis, ArmResult
from crisp_attention.experiment.record import Record

# Okabe and Ito's palette: told apart by all common kinds of colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#B8A800")
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "crisp-attention",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica", "sans-serif"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "axes.axisbelow": True,
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Drawing:
    """One picture.

    Attributes:
        name: File name without suffix.
        title: For the heading.
        description: What is seen, for those who can't see it and for the caption.
        svg: The drawing.
    """

    name: str
    title: str
    description: str
    svg: str


def figures(analysis: Analysis) -> list[Drawing]:
    """All pictures for which there are finished runs."""
    finished = [arm for arm in analysis.arms if arm.records]
    if not finished:
        return []
    colours = {arm.name: _COLOURS[number % len(_COLOURS)] for number, arm in enumerate(analysis.arms)}
    with matplotlib.rc_context(_STYLE):
        return [
            _accuracy(finished, colours),
            _curves(finished, colours),
            _gap(finished, colours),
            _layers(finished, colours),
        ]


def _accuracy(arms: list[ArmResult], colours: dict[str, str]) -> Drawing:
    figure, axes = _canvas(len(arms))
    shared = sorted(set.intersection(*(set(arm.records) for arm in arms)))
    for index in shared:
        line = [100 * arm.records[index].final.test.accuracy for arm in arms]
        axes.plot(range(len(arms)), line, color="#BBBBBB", linewidth=0.8, zorder=1)
    _dots(axes, arms, colours, [arm.accuracies for arm in arms])
    axes.set_ylabel("test accuracy (%)")
    return Drawing(
        "accuracy",
        "Accuracy by arm",
        "Test accuracy at the last epoch. A dot is a seed, a grey line joins the same seed across arms, "
        "a bar is the mean. " + _listing(arms, [f"{arm.accuracies.mean():.2f}%" for arm in arms]),
        _svg(figure),
    )


def _gap(arms: list[ArmResult], colours: dict[str, str]) -> Drawing:
    figure, axes = _canvas(len(arms))
    _dots(axes, arms, colours, [arm.gaps for arm in arms])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel("train - test accuracy (points)")
    return Drawing(
        "gap",
        "Generalisation gap by arm",
        "Accuracy on the training probe minus test accuracy. A regularizer narrows it. "
        + _listing(arms, [f"{arm.gaps.mean():+.2f}" for arm in arms]),
        _svg(figure),
    )


def _curves(arms: list[ArmResult], colours: dict[str, str]) -> Drawing:
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for arm in arms:
        records = [arm.records[index] for index in sorted(arm.records)]
        for axes, side in ((left, "train"), (right, "test")):
            losses = np.array([_losses(record, side) for record in records])
            epochs = np.arange(1, losses.shape[1] + 1)
            axes.plot(epochs, losses.T, color=colours[arm.name], linewidth=0.7, alpha=0.35)
            axes.plot(epochs, losses.mean(axis=0), color=colours[arm.name], linewidth=2, marker="o", label=arm.name)
    for axes, title in ((left, "training probe"), (right, "test")):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_ylabel("loss in evaluation mode (nats)")
    right.legend(frameon=False, fontsize=9)
    return Drawing(
        "curves",
        "Train and test loss",
        "Loss after each epoch, without dropout, on training examples and on the test split: bold the mean, "
        "thin each seed. Last epoch, train then test: "
        + _listing(
            arms,
            [
                f"{np.mean([score.loss for score in arm.train]):.3f}, {np.mean([score.loss for score in arm.test]):.3f}"
                for arm in arms
            ],
        ),
        _svg(figure),
    )


def _layers(arms: list[ArmResult], colours: dict[str, str]) -> Drawing:
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for arm in arms:
        shares = np.array([list(record.realised_sparsity.test.values()) for record in arm.records.values()])
        layers = np.arange(1, shares.shape[1] + 1)
        axes.plot(layers, 100 * shares.mean(axis=0), color=colours[arm.name], marker="o", label=arm.name)
    axes.set_ylim(-3, 103)
    axes.set_xlabel("attention layer")
    axes.set_ylabel("pairs removed (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return Drawing(
        "sparsity",
        "Realised sparsity by layer",
        "Share of valid query-key pairs that were really removed on the test split, mean over seeds. "
        + _listing(arms, [f"{100 * (arm.realised('test') or 0):.1f}%" for arm in arms]),
        _svg(figure),
    )


def _canvas(columns: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(max(4.2, 1.2 + 1.2 * columns), 3.6), layout="constrained")
    return figure, figure.subplots()


def _dots(axes: Any, arms: list[ArmResult], colours: dict[str, str], values: list[Any]) -> None:
    for column, (arm, points) in enumerate(zip(arms, values, strict=True)):
        axes.scatter(np.full(len(points), column), points, color=colours[arm.name], s=34, zorder=3, edgecolor="white")
        axes.hlines(points.mean(), column - 0.22, column + 0.22, color=colours[arm.name], linewidth=2.5, zorder=2)
    axes.set_xlim(-0.6, len(arms) - 0.4)
    labels = [f"{arm.name}\nn = {len(arm.records)}" for arm in arms]
    crowded = len(arms) > 5
    axes.set_xticks(range(len(arms)), labels, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    axes.grid(visible=False, axis="x")


def _losses(record: Record, side: str) -> list[float]:
    return [getattr(epoch, side).loss for epoch in record.epochs]


def _listing(arms: list[ArmResult], values: list[str]) -> str:
    return "; ".join(f"{arm.name} {value}" for arm, value in zip(arms, values, strict=True)) + "."


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # Without the XML prologue, so that it can stand inside a page.
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
