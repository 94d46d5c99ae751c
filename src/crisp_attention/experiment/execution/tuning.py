"""The search for each arm's settings: Optuna proposes, workers train, the validation part judges.

Trials are runs like the others, in a directory of their own: they have records and checkpoints, and go on
where they were interrupted. What there is of the evaluation split never comes here. Imports neither torch
nor Optuna until something is searched.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from crisp_attention.errors import CrispError
from crisp_attention.experiment.data.dataset import Dataset, ExperimentData
from crisp_attention.experiment.execution.executor import Division, Executor
from crisp_attention.experiment.execution.ledger import Ledger, place, require_optuna
from crisp_attention.experiment.execution.worker import Event, Task
from crisp_attention.experiment.results import pruning
from crisp_attention.experiment.results.record import Record
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.results.tuning import Outcome, Trial, Tuning
from crisp_attention.experiment.specification.runs import Fingerprints, PlannedRun
from crisp_attention.experiment.specification.spec import ExperimentSpec
from crisp_attention.experiment.specification.tune import Choices, TuneSpec, Value, encoded
from crisp_attention.experiment.specification.tuned import Search, searches
from crisp_attention.experiment.training.model import Checkpoint

_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class TuningPlan:
    """The searches that are to be done before the arms' seeds run.

    Attributes:
        spec: The experiment as it was asked for.
        searches: All of them.
        data: The two parts of the training split in the primary condition; the second stands where the evaluation
            split of a run is.
        checkpoint: The model.
        done: How many trials of each search have a result already, by its arm.
        division: Trials side by side, and threads.
        executor: Who does them.
        storage: URL of an Optuna storage that machines share; None for one of the run directory.
    """

    spec: ExperimentSpec
    searches: tuple[Search, ...]
    data: Dataset
    checkpoint: Checkpoint
    done: dict[str, int]
    division: Division
    executor: Executor
    storage: str | None = None

    @property
    def ledger(self) -> Ledger:
        """What was tried, in Optuna's storage."""
        return Ledger(self.spec, prints_of(self.checkpoint, self.data), self.storage)

    @property
    def tune(self) -> TuneSpec:
        """The budget."""
        assert self.spec.tune is not None
        return self.spec.tune

    @property
    def trials(self) -> int:
        """Trials of each search."""
        return self.tune.trials

    @property
    def seeds(self) -> int:
        """Trainings of each trial."""
        return self.tune.seeds_per_trial

    @property
    def left(self) -> int:
        """Trials still to do."""
        return sum(max(self.trials - count, 0) for count in self.done.values())


def plan(
    spec: ExperimentSpec,
    store: Store,
    checkpoint: Checkpoint,
    data: Dataset,
    jobs: int | None,
    executor: Executor,
    storage: str | None = None,
) -> TuningPlan | None:
    """What is to be searched; None if nothing is, or all is found. Writes nothing.

    Args:
        spec: The experiment.
        store: Its run directory, which need not be there.
        checkpoint: The model.
        data: The two parts of the training split, see `dataset.carve`.
        jobs: How many trials side by side were asked for, or None.
        executor: Who will do them.
        storage: URL of an Optuna storage to share; None for one of the run directory.

    Raises:
        ConfigurationError: If Optuna is not installed, or the storage cannot be used.
        RecordError: If what is there is damaged, or the storage holds another experiment by this name.
    """
    own = searches(spec)
    if not own or store.tuning(spec) is not None:
        return None
    require_optuna()
    assert spec.tune is not None
    done = dict.fromkeys((search.arm for search in own), 0)
    trials = Store(store.folder / "tuning")
    for path in trials.records.glob("[!.]*.json"):
        record = trials.load(path.stem)
        if record is not None and _ends(record, spec.tune):
            done[record.arm] = done.get(record.arm, 0) + 1
    todo = TuningPlan(spec, own, data, checkpoint, done, executor.divide(jobs, len(own), len(own)), executor, storage)
    todo.ledger.require()
    return todo


def prints_of(checkpoint: Checkpoint, data: Dataset) -> Fingerprints:
    """What trials are done on."""
    return Fingerprints(checkpoint.fingerprint, {"": data.fingerprint})


def search(
    todo: TuningPlan,
    store: Store,
    on_event: Callable[[PlannedRun | None, Event], None],
    announce: Callable[[str], None],
) -> Tuning:
    """Do all trials that are not done, and keep what they found.

    Searches go side by side; the trials of one follow each other, each proposed from those before it. An
    interrupted search goes on with the same proposals. Where machines share a storage, each does trials until there are
    enough, and all find the same.

    Args:
        todo: What to search.
        store: The run directory, opened.
        on_event: Told of everything, as in `Executor.execute`.
        announce: Told if another process is searching, whose end is waited for.

    Raises:
        CrispError: If a trial fails, or if all trials of an arm diverge.
        ConfigurationError: If a shared storage cannot be used.
        RecordError: If the database is damaged.
        StorageError: If the directory cannot be written.
    """
    with _alone(store, announce):
        found = store.tuning(todo.spec)
        if found is not None:
            return found
        trials = store.open_trials()
        trials.abandoned(None, announce)  # by whoever searched here before, on another machine perhaps
        with todo.ledger.usable(trials):
            books = {search.arm: _Books(search, todo, trials) for search in todo.searches}

            def receive(run: PlannedRun | None, event: Event) -> None:
                on_event(run, event)
                if run is None:
                    return
                if event.kind in ("progress", "note", "unsaved"):
                    books[run.arm].keep_alive()
                    return
                books[run.arm].enter(run, event)
                if (task := books[run.arm].propose()) is not None:
                    queue.append(task)

            told = False
            while True:
                queue = deque(task for own in books.values() if (task := own.propose()) is not None)
                if queue:
                    data = ExperimentData({"": todo.data})
                    todo.executor.execute(queue, trials, todo.checkpoint, data, todo.division, receive)
                elif all(own.complete for own in books.values()):
                    break
                else:
                    if not told:
                        announce("Waiting for the last trials, which other machines are training")
                    told = True
                    time.sleep(_POLL_SECONDS)
            tuning = Tuning(
                outcomes=tuple(own.outcome() for own in books.values()),
                train_examples=len(todo.data.train),
                validation_examples=len(todo.data.test),
                optuna=importlib.metadata.version("optuna"),
            )
        store.save_tuning(tuning)
        return tuning


class _Books:
    """The trials of one search, in Optuna's storage."""

    def __init__(self, search: Search, todo: TuningPlan, trials: Store) -> None:
        import optuna

        self._states = optuna.trial.TrialState
        self._search, self._todo, self._trials = search, todo, trials
        self._prints = prints_of(todo.checkpoint, todo.data)
        self._book = todo.ledger.open(trials, search)
        self._study = self._book.study
        self._asked: Any = None
        self._left: deque[Task] = deque()

    @property
    def complete(self) -> bool:
        """Whether as many trials as were asked for have ended."""
        first = self._first()
        return len(first) == self._todo.trials and all(trial.state.is_finished() for trial in first)

    def propose(self) -> Task | None:
        """The next training; None if all are done, or others are doing the last of them.

        Raises:
            CrispError: If they are done, and all diverged.
        """
        import optuna

        self._book.bury()
        if self._left:
            return self._left.popleft()
        if len(self._first()) >= self._todo.trials:
            if self.complete and all(trial.value is None for trial in self._first()):
                raise CrispError(
                    f"Tuning: all {self._todo.trials} trials of arm {self._search.arm!r} diverged. Other ranges in "
                    "[tune], as a lower learning_rate.high, are another experiment: give it another --out."
                )
            return None
        if (asked := self._book.ask(self._todo.trials)) is None:  # other machines were faster
            return None
        trial, number = asked
        before = [other for other in self._first() if place(other) < number]
        # A sampler a trial, so that a proposal follows from the trials there are, not from which process asks.
        self._study.sampler = optuna.samplers.TPESampler(seed=self._todo.tune.seed + number)
        for name in self._search.ranges:
            self._suggest(trial, name)
        self._asked = trial
        first, *others = self._runs(trial)
        self._left = deque(Task(run, self._failed(run)) for run in others)
        # Given up by its first seed, or not at all.
        return Task(first, self._failed(first), limits=self._limits(before))

    def keep_alive(self) -> None:
        """The trial that was proposed last is being trained."""
        self._book.keep_alive(self._asked.number)

    def enter(self, run: PlannedRun, event: Event) -> None:
        """Tell Optuna how the trial that was proposed last has ended.

        Raises:
            CrispError: If it has no result.
        """
        record = self._trials.load(run.config.run_id)
        if record is None or record.status == "failed":
            reason = event.reason or "another process is training it"
            raise CrispError(
                f"Tuning: trial {run.index + 1} of arm {run.arm!r} failed: {reason}. What is done is kept; the same "
                "command tries it again."
            )
        number = self._asked.number
        if self._study.get_trials(deepcopy=False)[number].state.is_finished():
            self._left.clear()
            return  # given up by a machine that did not hear of it for long, which has proposed another
        if record.status == "finished" and self._left:
            return
        self._left.clear()
        if record.status == "diverged":
            self._study.tell(number, state=self._states.PRUNED)
            return
        trained = [record for run in self._runs(self._asked) if (record := self._trials.load(run.config.run_id))]
        for seed, record in enumerate(trained):
            for epoch in record.epochs:
                self._asked.report(epoch.test.loss, self._step(seed, epoch.epoch))
        if record.status == "pruned":
            self._study.tell(number, state=self._states.PRUNED)
        else:
            self._study.tell(number, statistics.fmean(record.final.test.loss for record in trained))

    def outcome(self) -> Outcome:
        """All that count: no more than are asked for now, so that every arm has as many."""
        return Outcome(
            arms=self._search.arms,
            trials=tuple(
                Trial(
                    values=self._values(trial.params),
                    loss=trial.value,
                    by_seed=self._by_seed(trial),
                    run_id=self._runs(trial)[0].config.run_id,
                    pruned=trial.last_step if trial.state == self._states.PRUNED else None,
                )
                for trial in self._first()
            ),
        )

    def _first(self) -> list[Any]:
        """The trials that count, in order, those in training among them."""
        return [trial for trial in self._book.counted() if place(trial) < self._todo.trials]

    def _runs(self, trial: Any) -> tuple[PlannedRun, ...]:
        """The trainings of a trial."""
        return self._search.trial(self._todo.spec, self._values(trial.params), place(trial), self._prints)

    def _failed(self, run: PlannedRun) -> Record | None:
        """The record of a training that is to be done again."""
        known = self._trials.load(run.config.run_id)
        return known if known is not None and known.status == "failed" else None

    def _step(self, seed: int, epoch: int) -> int:
        """Where Optuna keeps what a trial's training with one of its seeds, from 0, had after an epoch, from 1."""
        return seed * self._todo.spec.epochs_of_trials + epoch

    def _by_seed(self, trial: Any) -> tuple[float, ...]:
        """A trial's losses at the end of its trainings; empty unless it has several, all of which finished."""
        if self._todo.seeds == 1 or trial.state != self._states.COMPLETE:
            return ()
        last = self._todo.spec.epochs_of_trials
        return tuple(trial.intermediate_values[self._step(seed, last)] for seed in range(self._todo.seeds))

    def _limits(self, before: list[Any]) -> tuple[float, ...]:
        """When to give up a trial, by the ones before it with the same seed, the first."""
        if not self._todo.tune.pruning:
            return ()
        epochs = self._todo.spec.epochs_of_trials
        whole = [
            [trial.intermediate_values[self._step(0, epoch)] for epoch in range(1, epochs + 1)]
            for trial in before
            if trial.state == self._states.COMPLETE
        ]
        return pruning.limits(whole, epochs)

    def _values(self, drawn: dict[str, Any]) -> dict[str, Value]:
        """What Optuna drew, as it is tried."""
        return {
            name: next(value for value in space.samples if encoded(value) == drawn[name])
            if isinstance(space, Choices)
            else drawn[name]
            for name, space in self._search.ranges.items()
        }

    def _suggest(self, trial: Any, name: str) -> None:
        space = self._search.ranges[name]
        if isinstance(space, Choices):
            trial.suggest_categorical(name, [encoded(value) for value in space.samples])
        elif space.choices:
            trial.suggest_categorical(name, space.choices)
        else:
            trial.suggest_float(name, *space.ends, log=self._todo.tune.logarithmic(name))


def _ends(record: Record, tune: TuneSpec) -> bool:
    """Whether a training is the last of its trial: a trial that is given up or diverges has no more."""
    if record.status == "finished":
        return bool(record.config["seed"] == tune.seeds[-1])
    return record.status != "failed"


@contextlib.contextmanager
def _alone(store: Store, announce: Callable[[str], None]) -> Iterator[None]:
    """Search in one process only; others wait, for a search ends with what all go on with."""
    told = False
    while (lock := store.lock("tuning")) is None:
        if not told:
            announce("Another process is tuning; waiting for what it finds")
        told = True
        time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        lock.release()
