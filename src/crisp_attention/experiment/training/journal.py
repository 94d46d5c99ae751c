"""A run's books: progress, losses and scores by epoch, realised sparsity, time; and when to save them."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from crisp_attention.config import SparsityConfig
from crisp_attention.experiment.data.batching import EncodedSplit, RankBatches
from crisp_attention.experiment.results.pruning import exceeded
from crisp_attention.experiment.results.record import Epoch, LengthBin, Score
from crisp_attention.experiment.training.checkpoint import Checkpoints
from crisp_attention.experiment.training.evaluation import (
    Outputs,
    PairsByExample,
    attention_maps,
    evaluate,
    length_bins,
    score,
)
from crisp_attention.experiment.training.ranks import Ranks
from crisp_attention.huggingface.model import watching
from crisp_attention.monitoring import SparsityMonitor
from crisp_attention.state import attending

_PROGRESS_SECONDS = 0.3
_DIVERGENCE_STEPS = 10
"""Counted, not timed, so that a run which diverges stops at the same step each time."""


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        step: Finished training steps.
        steps: Steps of the whole run.
        loss: Mean training loss of the epoch so far.
    """

    step: int
    steps: int
    loss: float


@dataclass
class RunningLoss:
    """Sum of an epoch's training losses, unrounded, on the device until it is read.

    Attributes:
        total: Float32 scalar, or 0 before the first step.
        steps: How many it sums.
        examples: Float32 scalar: those of the largest step of all epochs; 0 before the first.
    """

    total: torch.Tensor | float = 0.0
    steps: int = 0
    examples: torch.Tensor | float = 0.0

    def add(self, loss: torch.Tensor, examples: torch.Tensor) -> None:
        """Add a step: its mean loss and number of examples, scalars."""
        self.total = self.total + loss
        self.steps += 1
        self.examples = torch.maximum(torch.as_tensor(self.examples, device=examples.device), examples)

    def begin_epoch(self) -> None:
        """Forget the losses so far."""
        self.total, self.steps = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"total": self.total, "steps": self.steps, "examples": self.examples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.total, self.steps, self.examples = state["total"], state["steps"], state["examples"]

    @property
    def mean(self) -> float:
        """Mean over the steps; 0 before the first."""
        return float(self.total) / max(self.steps, 1)


@dataclass(eq=False)
class Journal(TrainerCallback):
    """Keeps a run's books while the Trainer trains.

    Processes that train together each keep the same books; the leader decides what depends on the time, and writes.

    Attributes:
        trainer: Who trains.
        batches: In which order.
        loss: Of the epoch in training; whoever computes losses adds them.
        watcher: A monitor that is watching the model.
        probe: Training examples evaluated after each epoch.
        test: The evaluation split.
        report: Told of the progress a few times a second.
        checkpoints: Where to save; None saves nothing.
        further: What else is evaluated after the last epoch, by name.
        evaluation: Settings of attention in evaluation; None for those of training.
        limits: Evaluation losses by epoch beyond which the run is given up.
        ranks: The processes that train together.
        curves: Whether every epoch is evaluated, or the last one alone.
        epochs, realised_train, realised_test, realised_by_length, entropy, evaluations: As in `Record`.
        outputs: Per-example outputs after the last epoch.
        diverged: Why the run was stopped; None while all is well.
        pruned: Why it was given up; None if it was not.
        train_seconds, examples: Training steps alone, and the examples that they saw.
        started: When the run first began, UTC, ISO 8601.
    """

    trainer: Trainer
    batches: RankBatches
    loss: RunningLoss
    watcher: SparsityMonitor
    probe: EncodedSplit
    test: EncodedSplit
    report: Callable[[Progress], None]
    checkpoints: Checkpoints | None = None
    further: Mapping[str, EncodedSplit] = field(default_factory=dict)
    evaluation: SparsityConfig | None = None
    limits: Sequence[float] = ()
    ranks: Ranks = field(default_factory=Ranks)
    curves: bool = True
    epochs: list[Epoch] = field(default_factory=list)
    realised_train: dict[str, float] = field(default_factory=dict)
    realised_test: dict[str, float] = field(default_factory=dict)
    realised_by_length: tuple[LengthBin, ...] = ()
    entropy: dict[str, float] = field(default_factory=dict)
    evaluations: dict[str, Score] = field(default_factory=dict)
    outputs: Outputs = field(default_factory=dict)
    diverged: str | None = None
    pruned: str | None = None
    train_seconds: float = 0.0
    examples: int = 0
    started: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    _begun: float = field(default_factory=time.perf_counter)
    _seconds_before: float = 0.0
    _clock: float = 0.0
    _reported: float = 0.0

    @property
    def seconds(self) -> float:
        """The whole run so far, without what was lost with an interruption."""
        return self._seconds_before + time.perf_counter() - self._begun

    def restore(self, books: dict[str, Any]) -> None:
        """Take up the books of a checkpoint, as `_books` made them."""
        self.epochs = [Epoch.model_validate(epoch) for epoch in books["epochs"]]
        self.loss.load_state_dict(books["loss"])
        if self.ranks.leads:  # what all had counted
            self.watcher.load_state_dict(books["watcher"])
        self.train_seconds, self.examples = books["train_seconds"], books["examples"]
        self.started, self._seconds_before = books["started"], books["seconds"]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin an epoch, or go on in one."""
        epoch, step = divmod(state.global_step, self._epoch_steps(state))
        # Where the first batches of a resumed epoch are skipped, not every version of the libraries in between says it.
        self.batches.set_epoch(epoch)
        if step == 0:
            self.watcher.reset()
            self.loss.begin_epoch()
        self._clock = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the progress, stop what diverged, save what would be long to do again."""
        if state.global_step % _DIVERGENCE_STEPS == 0:
            self._stop_if_diverged(self.loss.mean, state, control)
        now = time.perf_counter()
        if now - self._reported >= _PROGRESS_SECONDS:
            self._reported = now
            self.report(Progress(state.global_step, state.max_steps, self.loss.mean))
        # The end of an epoch is saved with its evaluation, or not at all.
        if state.global_step % self._epoch_steps(state) and self._save_if_due(control):
            self._stop_clock()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate where that is asked for, and after the last epoch keep all that the record holds."""
        self._stop_clock()
        if state.global_step % self._epoch_steps(state) == 0:
            self.examples += len(self.trainer.train_dataset)  # type: ignore[arg-type]
        loss = self.loss.mean
        self._stop_if_diverged(loss, state, control)
        if self.diverged:
            return
        last = state.global_step >= state.max_steps
        if not (last or self.curves):
            self._save_if_due(control)
            return
        self.realised_train = self.ranks.pooled(self.watcher).realised(training=True)
        with attending(cast(nn.Module, self.trainer.model), self.evaluation):
            self._evaluate(loss, last, state, control)

    def _evaluate(self, loss: float, last: bool, state: Any, control: Any) -> None:
        train_logits = self._logits(self.probe)
        self.watcher.reset()
        test_logits = self._evaluate_closely() if last else self._logits(self.test)
        self.realised_test = self.ranks.pooled(self.watcher).realised(training=False)
        if not (np.isfinite(train_logits).all() and np.isfinite(test_logits).all()):
            self._stop_if_diverged(math.nan, state, control)
            return
        self.epochs.append(
            Epoch(
                epoch=state.global_step // self._epoch_steps(state),
                running_loss=loss,
                train=score(train_logits, self.probe.labels),
                test=score(test_logits, self.test.labels),
            )
        )
        self._tell_trackers(self.epochs[-1])
        self.report(Progress(state.global_step, state.max_steps, loss))
        losses = [epoch.test.loss for epoch in self.epochs]
        if exceeded(losses, self.limits):
            self.pruned = (
                f"after epoch {len(losses)} its loss was {min(losses):.4f} at best, the median of the trials before it "
                f"{self.limits[len(losses) - 1]:.4f}"
            )
            control.should_training_stop = True
            return
        if not last:
            self._save_if_due(control)
            return
        self.outputs = {
            "test_logits": test_logits,
            "test_labels": self.test.labels,
            "test_lengths": self.test.lengths,
            "train_logits": train_logits,
            "train_labels": self.probe.labels,
        }
        self._look_closer()

    def _tell_trackers(self, epoch: Epoch) -> None:
        """Log what trackers show of an epoch."""
        # Trackers show a name without a prefix among those of training.
        realised = {"realised_sparsity": self.realised_train, "test_realised_sparsity": self.realised_test}
        shares = {name: fmean(own.values()) for name, own in realised.items() if own}
        self.trainer.log(epoch.metrics() | shares)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the checkpoint that the Trainer has just saved, and see what it cost."""
        if self.checkpoints is None:
            return
        books = self._books()
        try:
            if self.ranks.leads:
                self.checkpoints.complete(state.global_step, books)
        except (OSError, RuntimeError) as error:
            self.checkpoints.give_up(state.global_step, str(error))
        self._clock = time.perf_counter()

    def _look_closer(self) -> None:
        """Whatever is found out of the trained model after its evaluation, by an evaluation of its own."""
        self.outputs |= attention_maps(self.trainer, self.test)
        for name, split in self.further.items():
            logits = self._logits(split)
            if not np.isfinite(logits).all():
                self.diverged = f"the outputs on evaluation {name!r} are not finite"
                return
            self.evaluations[name] = score(logits, split.labels)
            self.outputs |= {f"{name}_logits": logits, f"{name}_labels": split.labels}

    def _evaluate_closely(self) -> np.ndarray[Any, Any]:
        """Evaluate as after every epoch, and keep entropy and realised sparsity by length."""
        count = PairsByExample()
        model = self.trainer.model
        self.watcher.watch_entropy = True
        with watching(cast(nn.Module, model), count):
            logits = self._logits(self.test, count)
        self.watcher.watch_entropy = False
        self.entropy = self.ranks.pooled(self.watcher).entropy(training=False)
        if count.pairs is not None:
            self.realised_by_length = length_bins(self.test.lengths, count.pairs)
        return logits

    def _logits(self, split: EncodedSplit, count: PairsByExample | None = None) -> np.ndarray[Any, Any]:
        return evaluate(self.trainer, split, count, self.ranks)

    def _books(self) -> dict[str, Any]:
        return {
            "epochs": [epoch.model_dump() for epoch in self.epochs],
            "loss": self.loss.state_dict(),
            "watcher": self.ranks.pooled(self.watcher).state_dict(),
            "train_seconds": self.train_seconds,
            "examples": self.examples,
            "seconds": self.seconds,
            "started": self.started,
        }

    def _epoch_steps(self, state: Any) -> int:
        return int(state.max_steps) // int(state.num_train_epochs)

    def _stop_clock(self) -> None:
        now = time.perf_counter()
        self.train_seconds += now - self._clock
        self._clock = now

    def _save_if_due(self, control: Any) -> bool:
        if self.checkpoints is None or self.diverged is not None:
            return False
        due = self.ranks.agree(self.checkpoints.due())
        control.should_save = control.should_save or due
        return due

    def _stop_if_diverged(self, loss: float, state: Any, control: Any) -> None:
        if not math.isfinite(loss) and self.diverged is None:
            self.diverged = f"the loss was not finite at step {state.global_step} of {state.max_steps}"
            control.should_training_stop = True
