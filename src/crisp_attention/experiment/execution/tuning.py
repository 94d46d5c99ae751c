"""The search for each arm's settings: Optuna proposes, workers train, the validation part judges.

Trials are runs like the others, in a directory of their own: they have records and checkpoints, and go on
where they were interrupted. What there is of the evaluation split never comes here. Imports neither torch
nor Optuna until something is searched.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crisp_attention.errors import ConfigurationError, CrispError, RecordError
from crisp_attention.experiment.data.dataset import Dataset, ExperimentData
from crisp_attention.experiment.execution.executor import Division, Executor
from crisp_attention.experiment.execution.worker import Event, Task
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.results.tuning import Outcome, Trial, Tuning
from crisp_attention.experiment.specification.runs import Fingerprints, PlannedRun
from crisp_attention.experiment.specification.spec import ExperimentSpec
from crisp_attention.experiment.specification.tuned import Search, searches
from crisp_attention.experiment.training.model import Checkpoint

_DATABASE = "trials.sqlite3"
_POLL_SECONDS = 1.0
# As `store.DISK_ERRORS` for SQLite.
_DISK_ERRORS = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
)


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
    """

    spec: ExperimentSpec
    searches: tuple[Search, ...]
    data: Dataset
    checkpoint: Checkpoint
    done: dict[str, int]
    division: Division
    executor: Executor

    @property
    def trials(self) -> int:
        """Trials of each search."""
        assert self.spec.tune is not None
        return self.spec.tune.trials

    @property
    def left(self) -> int:
        """Trials still to do."""
        return sum(max(self.trials - count, 0) for count in self.done.values())


def plan(
    spec: ExperimentSpec, store: Store, checkpoint: Checkpoint, data: Dataset, jobs: int | None, executor: Executor
) -> TuningPlan | None:
    """What is to be searched; None if nothing is, or all is found. Writes nothing.

    Args:
        spec: The experiment.
        store: Its run directory, which need not be there.
        checkpoint: The model.
        data: The two parts of the training split, see `dataset.carve`.
        jobs: How many trials side by side were asked for, or None.
        executor: Who will do them.

    Raises:
        ConfigurationError: If Optuna is not installed.
        RecordError: If what is there is damaged.
    """
    own = searches(spec)
    if not own or store.tuning(spec) is not None:
        return None
    if importlib.util.find_spec("optuna") is None:
        raise ConfigurationError("[tune] needs the package optuna: pip install 'crisp-attention[tune]'.")
    done = dict.fromkeys((search.arm for search in own), 0)
    trials = Store(store.folder / "tuning")
    for path in trials.records.glob("[!.]*.json"):
        record = trials.load(path.stem)
        if record is not None and record.status != "failed":
            done[record.arm] = done.get(record.arm, 0) + 1
    return TuningPlan(spec, own, data, checkpoint, done, executor.divide(jobs, len(own)), executor)


def search(
    todo: TuningPlan,
    store: Store,
    on_event: Callable[[PlannedRun | None, Event], None],
    announce: Callable[[str], None],
) -> Tuning:
    """Do all trials that are not done, and keep what they found.

    Searches go side by side; the trials of one follow each other, each proposed from those before it. An
    interrupted search goes on with the same proposals.

    Args:
        todo: What to search.
        store: The run directory, opened.
        on_event: Told of everything, as in `Executor.execute`.
        announce: Told if another process is searching, whose end is waited for.

    Raises:
        CrispError: If a trial fails, or if all trials of an arm diverge.
        RecordError: If the database is damaged.
        StorageError: If the directory cannot be written.
    """
    with _alone(store, announce):
        found = store.tuning(todo.spec)
        if found is not None:
            return found
        trials = store.open_trials()
        trials.abandoned(None, announce)  # by whoever searched here before, on another machine perhaps
        with _readable(trials):
            books = {search.arm: _Books(search, todo, trials) for search in todo.searches}
            queue = deque(task for own in books.values() if (task := own.propose()) is not None)

            def receive(run: PlannedRun | None, event: Event) -> None:
                on_event(run, event)
                if run is not None and event.kind not in ("progress", "note", "unsaved"):
                    books[run.arm].enter(run, event)
                    if (task := books[run.arm].propose()) is not None:
                        queue.append(task)

            if queue:
                data = ExperimentData({"": todo.data})
                todo.executor.execute(queue, trials, todo.checkpoint, data, todo.division, receive)
            tuning = Tuning(
                outcomes=tuple(own.outcome() for own in books.values()),
                train_examples=len(todo.data.train),
                validation_examples=len(todo.data.test),
                optuna=importlib.metadata.version("optuna"),
            )
        store.save_tuning(tuning)
        return tuning


class _Books:
    """The trials of one search, in Optuna's database."""

    def __init__(self, search: Search, todo: TuningPlan, trials: Store) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._states = optuna.trial.TrialState
        self._search, self._todo, self._trials = search, todo, trials
        self._prints = Fingerprints(todo.checkpoint.fingerprint, {"": todo.data.fingerprint})
        self._study = optuna.create_study(
            storage=_storage(trials.folder / _DATABASE), study_name=search.arm, load_if_exists=True
        )
        for trial in self._study.get_trials(deepcopy=False, states=(self._states.RUNNING,)):
            # Its process is gone. What it tried is proposed again, and its checkpoint or record is found by that.
            self._study.tell(trial.number, state=self._states.FAIL)

    def propose(self) -> Task | None:
        """The next trial; None if all are done.

        Raises:
            CrispError: If they are, and all diverged.
        """
        import optuna

        assert self._todo.spec.tune is not None
        done = self._told()
        if len(done) >= self._todo.trials:
            if all(trial.value is None for trial in done):
                raise CrispError(
                    f"Tuning: all {len(done)} trials of arm {self._search.arm!r} diverged. Other ranges in [tune], as "
                    "a lower learning_rate.high, are another experiment: give it another --out."
                )
            return None
        # A sampler a trial, so that a proposal follows from the trials before it, not from which process asks.
        self._study.sampler = optuna.samplers.TPESampler(seed=self._todo.spec.tune.seed + len(done))
        trial = self._study.ask({name: self._distribution(name) for name in self._search.ranges})
        run = self._search.trial(self._todo.spec, trial.params, len(done), self._prints)
        self._asked = trial.number
        before = self._trials.load(run.config.run_id)
        return Task(run, before if before is not None and before.status == "failed" else None)

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
        if record.status == "diverged":
            self._study.tell(self._asked, state=self._states.PRUNED)
        else:
            self._study.tell(self._asked, record.final.test.loss)

    def outcome(self) -> Outcome:
        """All that count: no more than are asked for now, so that every arm has as many."""
        return Outcome(
            arms=self._search.arms,
            trials=tuple(
                Trial(
                    values=trial.params,
                    loss=trial.value,
                    run_id=self._search.trial(self._todo.spec, trial.params, number, self._prints).config.run_id,
                )
                for number, trial in enumerate(self._told()[: self._todo.trials])
            ),
        )

    def _told(self) -> list[Any]:
        states = (self._states.COMPLETE, self._states.PRUNED)
        return self._study.get_trials(deepcopy=False, states=states)

    def _distribution(self, name: str) -> Any:
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        assert self._todo.spec.tune is not None
        found = self._search.ranges[name]
        if found.choices:
            return CategoricalDistribution(found.choices)
        low, high = found.ends
        return FloatDistribution(low, high, log=self._todo.spec.tune.logarithmic(name))


def _storage(path: Path) -> Any:
    import sqlalchemy
    from optuna.storages import RDBStorage

    try:
        return RDBStorage(sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string())
    except RuntimeError as error:  # of another version of Optuna
        raise _damaged(path, str(error)) from None


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


@contextlib.contextmanager
def _readable(trials: Store) -> Iterator[None]:
    """Say what is wrong with the database.

    Raises:
        RecordError: If it is damaged.
        StorageError: If it cannot be written.
    """
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (OptunaError, SQLAlchemyError) as error:
        cause = error.__cause__ or error
        origin = getattr(cause, "orig", cause)
        if getattr(origin, "sqlite_errorcode", None) in _DISK_ERRORS:
            raise trials.unwritable(OSError(str(origin))) from error
        raise _damaged(trials.folder / _DATABASE, str(origin)) from None


def _damaged(path: Path, why: str) -> RecordError:
    return RecordError(
        f"{path} cannot be read: {why}. Delete it: the same trials are proposed again, and those that have a record "
        "are not done again."
    )
