"""What a check of an audit finds, and how it asks of a sparse model only what the dense one holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from crisp_attention.config import SparsityConfig
from crisp_attention.errors import CrispError
from crisp_attention.huggingface.model import densify, make_sparse, watching
from crisp_attention.huggingface.trial import Call, CallRecorder, Outputs, Trial, difference, other_texts

Outcome = Literal["ok", "failed", "not applicable"]

HALF, MOST = 0.5, 0.8
"""The sparsities at which an audit looks."""


@dataclass(frozen=True)
class CheckOutcome:
    """What one check of an audit found.

    Attributes:
        name: The check.
        outcome: "ok", "failed" or "not applicable".
        figure: What was measured, mostly the largest difference between two outputs relative to
            their scale; None where nothing was.
        detail: A sentence: what the figure is, or why the check does not apply.
    """

    name: str
    outcome: Outcome
    figure: float | None
    detail: str


@dataclass(frozen=True)
class Stock:
    """The stock model's behaviour on a trial's inputs.

    Attributes:
        outputs: Its outputs.
        repeatable: Whether a second pass gives the same.
    """

    outputs: Outputs
    repeatable: bool

    @classmethod
    def of(cls, trial: Trial) -> Stock:
        """Run a dense model twice."""
        first, second = trial.run(), trial.run()
        return cls(first, difference(second, first) == 0.0)


def make_sparse_again(trial: Trial, sparsity: float) -> None:
    """Sparsify a trial's model, which an audit has done before its first check, and only then asks for proof."""
    make_sparse(trial.model, SparsityConfig(sparsity=sparsity), dict(trial.inputs), served=True)


def watched(trial: Trial, sparsity: float) -> tuple[Outputs, list[Call]]:
    """Outputs and attention calls of a pass at some sparsity; the model is dense again afterwards."""
    recorder = CallRecorder(SparsityConfig(sparsity=sparsity))
    make_sparse_again(trial, sparsity)
    try:
        with watching(trial.model, recorder):
            return trial.run(), recorder.calls
    finally:
        densify(trial.model)


def relative(
    name: str, trial: Trial, measure: Callable[[], float | None], detail: str, limit: float | None = None
) -> CheckOutcome:
    """Ask of the sparse model what the dense one holds: at most `limit`, by default the trial's tolerance."""
    limit = trial.tolerance if limit is None else limit
    stock = attempt(measure)
    if stock is None:
        return not_applicable(name, "the dense model itself does not offer it")
    # Ten times as strictly: what a dense model nearly holds, a sparse one need not.
    if stock > limit / 10:
        return not_applicable(name, f"the dense model itself does not hold it ({stock:.1e})")
    make_sparse_again(trial, HALF)
    try:
        figure = measure()
    finally:
        densify(trial.model)
    if figure is not None and figure > limit and not _always_holds(trial, measure, limit):
        return not_applicable(name, "the dense model itself does not hold it on every input")
    return judged(name, figure, limit, detail)


def _always_holds(trial: Trial, measure: Callable[[], float | None], limit: float) -> bool:
    """Whether a dense model holds a property on other texts too.

    One that selects keys by scores of its own may break a tie this way or that, text by text.
    """
    inputs = trial.inputs
    if "input_ids" not in inputs:
        return True
    try:
        for text in other_texts(inputs["input_ids"]):
            trial.inputs = {**inputs, "input_ids": text}
            figure = attempt(measure)
            if figure is not None and figure > limit:
                return False
    finally:
        trial.inputs = inputs
    return True


def judged(name: str, figure: float | None, limit: float, detail: str) -> CheckOutcome:
    """The outcome of a difference of which rounding may explain `limit`."""
    if figure is None:
        return not_applicable(name, "no output can be compared")
    return CheckOutcome(name, "ok" if figure <= limit else "failed", figure, f"{detail}: {figure:.1e}")


def not_applicable(name: str, why: str) -> CheckOutcome:
    """The outcome of a check that cannot be made, and why."""
    return CheckOutcome(name, "not applicable", None, f"{why}.")


def attempt(measure: Callable[[], Any]) -> Any:
    """What the stock model gives, or None if it cannot be asked this way."""
    try:
        return measure()
    except CrispError:
        raise
    except Exception:  # whatever a model raises on inputs that are not its kind
        return None
