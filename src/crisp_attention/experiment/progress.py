"""How far the runs of a plan, or its trials, are: what a display shows, wherever that is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from crisp_attention.experiment.execution.worker import Event
from crisp_attention.experiment.outlook import Outlook, duration
from crisp_attention.experiment.specification.runs import PlannedRun
from crisp_attention.experiment.study import Plan


@dataclass(frozen=True)
class Line:
    """What there is to tell beside the bars.

    Attributes:
        text: What happened.
        reason: Why, in as many words as it takes; empty where there is nothing to explain.
        kind: "ended", "trouble" (a run that diverged or failed), or "note".
    """

    text: str
    reason: str
    kind: Literal["ended", "trouble", "note"]

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.text, self.reason)))


@dataclass(frozen=True)
class Running:
    """One in training.

    Attributes:
        label: What it is called.
        step, steps, loss: As in `worker.Event`.
    """

    label: str
    step: int
    steps: int
    loss: float


class Progress:
    """Progress of what is expected.

    Args:
        kind: What it is called, in the plural.
        expected: Seconds that each is expected to take, by its label; None where nobody knows.
        jobs: How many are done side by side.
        label: What to call one.
        after: Labels of those that are not done if one is given up or diverges.

    Attributes:
        kind: As given.
        total: How many there are.
        ended: How many of them have ended.
    """

    def __init__(
        self,
        kind: str,
        expected: Mapping[str, float | None],
        jobs: int,
        label: Callable[[PlannedRun], str],
        after: Callable[[PlannedRun], Sequence[str]] = lambda _: (),
    ) -> None:
        self.kind = kind
        self.total = len(expected)
        self.ended = 0
        self._expected, self._label, self._after = expected, label, after
        self._outlook = Outlook(expected, jobs)
        self._running: dict[str, Running] = {}

    @property
    def running(self) -> list[Running]:
        """Those in training, in the order in which they began."""
        return list(self._running.values())

    @property
    def done(self) -> float:
        """How many are done, those in training in part."""
        return self.ended + sum(item.step / max(item.steps, 1) for item in self._running.values())

    @property
    def left(self) -> str:
        """How long the rest will take, in words; empty at the end, and where nobody knows."""
        left = self._outlook.left(time.monotonic())
        return f"about {duration(left)} left" if left and self.ended < self.total else ""

    def receive(self, planned: PlannedRun | None, event: Event) -> Line | None:
        """Take in what a worker says; returns what is to be told of it, if anything is."""
        if planned is None:
            self._outlook.begin(time.monotonic())
            return None
        label = self._label(planned)
        if label not in self._expected:  # done when it was planned, and told once more
            return None
        if event.kind == "progress":
            self._running[event.run_id] = Running(label, event.step, event.steps, event.loss)
            self._outlook.advance(label, event.step / max(event.steps, 1))
            return None
        if event.kind == "note":
            return Line(label, event.reason or "", "note")
        if event.kind == "unsaved":  # which ends all, with an error that says it
            return None
        if event.kind in ("pruned", "diverged"):
            for other in self._after(planned):
                self._outlook.end(other, finished=False)
                self.total -= 1
        return self._end(label, event)

    def _end(self, label: str, event: Event) -> Line:
        self._outlook.end(label, finished=event.kind == "finished")
        self._running.pop(event.run_id, None)
        self.ended += 1
        outcome = {"elsewhere": "is being trained by another process"}.get(event.kind, event.kind)
        text = ", ".join(filter(None, (f"[{self.ended} of {self.total}] {label}: {outcome}", event.result)))
        return Line(text, event.reason or "", "trouble" if event.kind in ("failed", "diverged") else "ended")


def of_trials(plan: Plan) -> Progress:
    """Of the trials of a plan's search, or, where they have several seeds, of their trainings."""
    todo = plan.tuning
    if todo is None:
        return Progress("trials", {}, 1, lambda run: run.label)
    seeds = todo.tune.seeds
    one = len(seeds) == 1

    def called(arm: str, number: int, seed: int) -> str:
        return f"{arm}, trial {number + 1}" + ("" if one else f", seed {seed}")

    expected = {
        called(arm, number, seed): plan.seconds_a_training(arm)
        for arm, done in todo.done.items()
        for number in range(done, todo.trials)
        for seed in seeds
    }
    return Progress(
        "trials" if one else "trainings",
        expected,
        todo.division.jobs,
        lambda run: called(run.arm, run.index, run.config.seed),
        lambda run: [called(run.arm, run.index, seed) for seed in seeds if seed > run.config.seed],
    )


def of_runs(plan: Plan) -> Progress:
    """Of a plan's runs."""
    expected = {task.run.label: plan.seconds.get((task.run.arm, task.run.condition)) for task in plan.pending}
    return Progress("runs", expected, plan.division.jobs, lambda run: run.label)
