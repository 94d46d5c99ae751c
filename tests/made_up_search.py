"""Searches whose training is made up."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from crisp_attention.experiment.data.dataset import Dataset, Split, carve
from crisp_attention.experiment.execution import tuning
from crisp_attention.experiment.execution.local import LocalExecutor
from crisp_attention.experiment.execution.worker import Event
from crisp_attention.experiment.results.pruning import exceeded
from crisp_attention.experiment.results.record import Epoch, Score
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.resources import ResourcesSpec
from crisp_attention.experiment.training.model import Checkpoint
from record_builders import ARMS, MODEL, PLACEBO, PRINTS, finished, make_spec, troubled

RATE = {"low": 1e-5, "high": 1e-2}
CHECKPOINT = Checkpoint("made-up", None, MODEL)
HERE = LocalExecutor(ResourcesSpec(cpus=1))


class Killed(BaseException):
    """The process ends here."""


def spec_of(trials=4, **more):
    tune = {"trials": trials, "learning_rate": RATE, "sparsity": {"low": 0.1, "high": 0.9}}
    return make_spec(tune=tune | more, arms=[*map(dict, ARMS[:2]), dict(PLACEBO)])


def data(tests="evaluation text", labels=0):
    """A data set; of its evaluation split it is said what it holds."""
    texts = {"train": "text number", "test": tests}
    splits = {
        side: Split(tuple(f"{name} {number}" for number in range(60)), None, np.arange(60) % 2)
        for side, name in texts.items()
    }
    splits["test"] = dataclasses.replace(splits["test"], labels=(splits["test"].labels + labels) % 2)
    return Dataset("made-up", ("no", "yes"), splits["train"], splits["test"], ())


def loss_of(run):
    """Lowest at a learning rate of 1e-3 and a sparsity of 0.4."""
    rate, sparsity = run.config.training["learning_rate"], run.config.attention["sparsity"] or 0.0
    return 0.1 + (math.log10(rate) + 3) ** 2 + (sparsity - 0.4) ** 2


def early(rate):
    """A loss after the first epoch that no search can foresee."""
    return rate * 1e8 % 1


def hopeless(run):
    return early(run.config.training["learning_rate"])


class Machine:
    """Stands for `LocalExecutor.execute`.

    Attributes:
        trained: Runs that were trained.
        seen: All data that workers were given.
        until: Trials after which the process is killed, before their results are told.
        outcome: What becomes of a run: "finished", "diverged", "failed".
        early: Loss after the first of two epochs.
        late: Loss after the last epoch.
    """

    def __init__(self, monkeypatch):
        self.trained, self.seen, self.until, self.outcome = [], [], math.inf, lambda run: "finished"
        self.early = lambda run: 0.01  # the best epoch is not the last
        self.late = loss_of
        monkeypatch.setattr(LocalExecutor, "execute", self)

    def __call__(self, queue, store, checkpoint, data, division, on_event):
        self.seen.append(data)
        on_event(None, Event("ready"))
        while queue:
            task = queue.popleft()
            record = store.load(task.run.config.run_id)
            if record is None or record == task.before:
                self.trained.append(task.run)
                kind = self.outcome(task.run)
                made = self.result(task) if kind == "finished" else (troubled(task.run, kind), None)
                store.save(*made, task.before)
                if len(self.trained) >= self.until:
                    raise Killed
            on_event(task.run, Event("progress", task.run.config.run_id))
            on_event(task.run, Event(store.load(task.run.config.run_id).status, task.run.config.run_id, reason="why"))

    def result(self, task):
        run = task.run
        record, arrays = finished(run, np.arange(8) % 2 == 0)
        score = Score(loss=self.late(run), correct=4, total=8)
        first = Score(loss=self.early(run), correct=8, total=8)
        better = Epoch(epoch=1, running_loss=0.5, train=score, test=first)
        if exceeded([first.loss], task.limits):
            return record.model_copy(update={"epochs": (better,), "status": "pruned"}), None
        last = Epoch(epoch=2, running_loss=0.5, train=score, test=score)
        return record.model_copy(update={"epochs": (better, last)}), arrays


def tune(folder, spec, dataset=None, storage=None):
    store = Store(folder)
    store.open(spec, PRINTS)
    todo = tuning.plan(spec, store, CHECKPOINT, carve(dataset or data(), spec.tune.share), 1, HERE, storage)
    return store.tuning(spec) if todo is None else tuning.search(todo, store, lambda *_: None, lambda _: None)
