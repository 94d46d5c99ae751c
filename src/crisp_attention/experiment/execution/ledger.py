"""Where Optuna keeps what was tried: a file of the run directory, or a database that several machines share."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import random
import sqlite3
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crisp_attention.errors import ConfigurationError, RecordError
from crisp_attention.experiment.results.files import write_atomically
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.runs import Fingerprints
from crisp_attention.experiment.specification.spec import ExperimentSpec
from crisp_attention.experiment.specification.tuned import Search, searches

_DATABASE = "trials.sqlite3"
_OWNER, _PLACE = "owner", "place"
_IDENTITY, _TRIALS = "crisp_attention", "crisp_attention_trials"
# As `faults.DISK_ERRORS` for SQLite.
_DISK_ERRORS = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
)

_HEARTBEAT_SECONDS = 60
"""How often a machine says that its trials are alive."""
_PATIENCE_SECONDS = 900
"""After so long without a word a trial of another machine is taken to be dead."""
_ATTEMPTS, _PAUSE_SECONDS = 4, 0.3


class Book:
    """One search in Optuna's storage.

    Args:
        study: Optuna's study.
        storage: The storage that it is in.
        owner: Who this run directory is in it.
        shared: Whether other machines may propose trials too.
    """

    def __init__(self, study: Any, storage: Any, owner: str, shared: bool) -> None:
        self.study = study
        self._storage, self._owner, self._shared = storage, owner, shared
        self._heard = -math.inf

    def counted(self) -> list[Any]:
        """The trials that have a place and have not failed, by place."""
        from optuna.trial import TrialState

        trials = self.study.get_trials(deepcopy=False)
        held = [trial for trial in trials if trial.state != TrialState.FAIL and _PLACE in trial.user_attrs]
        return sorted(held, key=place)

    def ask(self, places: int) -> tuple[Any, int] | None:
        """A new trial, entered as this run directory's, and its place among the first so many; None if all are taken.

        A trial takes the first place that is free, which may be one of a trial that failed, and what is proposed
        depends on the place. Machines that ask at once may take the same: each writes down its own, then looks, and who
        sees another there gives up and asks again.
        """
        from optuna.trial import TrialState

        while free := set(range(places)) - {place(other) for other in self.counted()}:
            own = min(free)
            trial = self.study.ask()
            trial.set_user_attr(_OWNER, self._owner)
            self._heard = -math.inf
            self.keep_alive(trial.number)
            trial.set_user_attr(_PLACE, own)
            if not any(place(other) == own and other.number != trial.number for other in self.counted()):
                return trial, own
            self.study.tell(trial.number, state=TrialState.FAIL)
            time.sleep(random.uniform(0, _PAUSE_SECONDS))
        return None

    def keep_alive(self, number: int) -> None:
        """Tell machines that share the storage, now and then, that a trial is being trained."""
        now = time.monotonic()
        if self._shared and now - self._heard >= _HEARTBEAT_SECONDS:
            self._heard = now
            own = self._storage.get_study_id_from_name(self.study.study_name)
            self._storage.record_heartbeat(self._storage.get_trial_id_from_study_id_trial_number(own, number))

    def bury(self) -> None:
        """Give up trials of machines that were not heard of for long, so that what they tried is proposed again."""
        import optuna

        if self._shared:
            optuna.storages.fail_stale_trials(self.study)


def place(trial: Any) -> int:
    """Which of its search's trials one is, from 0."""
    return int(trial.user_attrs[_PLACE])


def require_optuna() -> None:
    """Make sure that Optuna is there.

    Raises:
        ConfigurationError: If not.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigurationError("[tune] needs the package optuna: pip install 'crisp-attention[tune]'.")


@dataclass(frozen=True)
class Ledger:
    """The searches of one experiment in Optuna's storage. Creating the object touches nothing.

    Attributes:
        spec: The experiment as it was asked for.
        prints: Of the model, and of the carved data as the only condition.
        url: Of a storage that machines share; None for a file among the trials.
    """

    spec: ExperimentSpec
    prints: Fingerprints
    url: str | None = None

    def name(self, search: Search) -> str:
        """What a search is called in the storage; in one that is shared there may be those of other experiments."""
        return search.arm if self.url is None else f"{self.spec.name}/{search.arm}"

    def agreed(self) -> int | None:
        """How many trials those who share the storage have agreed on; None if none is there. Writes nothing.

        Raises:
            ConfigurationError: If the storage cannot be used.
            RecordError: If it holds searches of another experiment by these names.
        """
        if self.url is None:
            return None
        with _usable(self.url):
            found = _read(self.url, [self.name(search) for search in searches(self.spec)])
        for search in searches(self.spec):
            attributes = found.get(self.name(search))
            if attributes is not None and attributes.get(_IDENTITY) != self._identity(search):
                what = "other data, another model or other settings" if _IDENTITY in attributes else "something else"
                raise RecordError(
                    f"The storage {masked(self.url)} holds a study {self.name(search)!r} of {what}. Give another "
                    "--storage, or what it was made with."
                )
        return next((int(attributes[_TRIALS]) for attributes in found.values() if _TRIALS in attributes), None)

    def require(self) -> None:
        """Make sure that the storage can be used for this experiment; writes nothing.

        Raises:
            ConfigurationError: If it cannot be reached.
            RecordError: If it holds searches of another experiment by these names, or of another number of trials.
        """
        assert self.spec.tune is not None
        agreed = self.agreed()
        if agreed is not None and agreed != self.spec.tune.trials:
            raise RecordError(
                f"The storage {masked(self.url or '')} holds a search of {agreed} trials, not {self.spec.tune.trials}: "
                "all who share it must ask for as many."
            )

    def open(self, trials: Store, search: Search) -> Book:
        """A search's Optuna study, new or as it was left.

        Trials of this run directory that were being trained are told to have failed: their process is gone. What they
        tried is proposed again, and their checkpoint or record is found by that.
        """
        import optuna
        from optuna.trial import TrialState

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        shared = self.url is not None
        storage = _storage(self.url or _local(trials), shared)
        study = optuna.create_study(storage=storage, study_name=self.name(search), load_if_exists=True)
        if _IDENTITY not in study.user_attrs:
            assert self.spec.tune is not None
            study.set_user_attr(_IDENTITY, self._identity(search))
            if shared:
                study.set_user_attr(_TRIALS, self.spec.tune.trials)
        owner = _owner(trials)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not shared or trial.user_attrs.get(_OWNER) == owner:
                study.tell(trial.number, state=TrialState.FAIL)
        return Book(study, storage, owner, shared)

    @contextlib.contextmanager
    def usable(self, trials: Store) -> Iterator[None]:
        """Say what is wrong with the storage.

        Args:
            trials: The directory of the trials.

        Raises:
            ConfigurationError: If it is shared and cannot be used.
            RecordError: If it is the directory's own and damaged.
            StorageError: If the disk cannot be written.
        """
        if self.url is not None:
            with _usable(self.url):
                yield
            return
        from optuna.exceptions import OptunaError
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (OptunaError, SQLAlchemyError, RuntimeError) as error:
            if type(error) is RuntimeError and not str(error).startswith("The runtime optuna version"):
                raise
            cause = error.__cause__ or error
            origin = getattr(cause, "orig", cause)
            if getattr(origin, "sqlite_errorcode", None) in _DISK_ERRORS:
                raise trials.unwritable(OSError(str(origin))) from error
            raise RecordError(
                f"{trials.folder / _DATABASE} cannot be read: {origin}. Delete it: the same trials are proposed again, "
                "and those that have a record are not done again."
            ) from None

    def _identity(self, search: Search) -> str:
        """All that decides what a trial of a search gives."""
        assert self.spec.tune is not None
        first = {name: space.samples[0] for name, space in search.ranges.items()}
        ranges = {name: str(space) for name, space in search.ranges.items()}
        trial, *others = (run.config.run_id for run in search.trial(self.spec, first, 0, self.prints))
        # With one seed, what it was before trials had several: storages that are shared stay so.
        content = json.dumps([trial, ranges, self.spec.tune.pruning, *others], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def masked(url: str) -> str:
    """A storage's URL without its password."""
    import sqlalchemy

    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return repr(url.partition("://")[0])


def _read(url: str, names: list[str]) -> dict[str, Mapping[str, Any]]:
    """What a storage says of the studies of these names; of those that it has."""
    import sqlalchemy
    from optuna.storages import RDBStorage

    place = sqlalchemy.make_url(url)
    if place.get_backend_name() == "sqlite" and place.database and place.database != ":memory:":
        file = Path(place.database)
        if not file.exists():  # looking would create it
            if not file.absolute().parent.is_dir():
                raise ConfigurationError(f"The storage {masked(url)} lies in a folder that does not exist.")
            return {}
    engine = sqlalchemy.create_engine(place)
    try:
        if "studies" not in sqlalchemy.inspect(engine).get_table_names():
            return {}
    finally:
        engine.dispose()
    storage = RDBStorage(url, skip_table_creation=True)
    try:
        present = {study.study_name: study.user_attrs for study in storage.get_all_studies()}
    finally:
        storage.remove_session()
        storage.engine.dispose()
    return {name: present[name] for name in names if name in present}


@contextlib.contextmanager
def _usable(url: str) -> Iterator[None]:
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (OptunaError, SQLAlchemyError, ImportError) as error:
        cause = error.__cause__ or error
        raise ConfigurationError(
            f"The storage {masked(url)} cannot be used: {getattr(cause, 'orig', cause)}. Expected a URL as "
            "sqlite:///trials.db or postgresql://user:password@host/database, its driver installed."
        ) from None
    except RuntimeError as error:
        if not str(error).startswith("The runtime optuna version"):
            raise
        raise ConfigurationError(f"The storage {masked(url)} cannot be used: {error}") from None


def _storage(url: str, shared: bool) -> Any:
    """Optuna's storage, its tables created if need be."""
    import optuna
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    # Heartbeats are experimental in Optuna, as it says at every call.
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", "Heartbeat of storage is supposed to be used", UserWarning)
    interval, grace = (_HEARTBEAT_SECONDS, _PATIENCE_SECONDS) if shared else (None, None)
    for _ in range(_ATTEMPTS - 1):
        with contextlib.suppress(OperationalError, ProgrammingError, IntegrityError):
            return optuna.storages.RDBStorage(url, heartbeat_interval=interval, grace_period=grace)
        # Another machine may be creating the tables just now; what else is wrong is so at the last attempt too.
        time.sleep(_PAUSE_SECONDS)
    return optuna.storages.RDBStorage(url, heartbeat_interval=interval, grace_period=grace)


def _local(trials: Store) -> str:
    import sqlalchemy

    return sqlalchemy.URL.create("sqlite", database=str(trials.folder / _DATABASE)).render_as_string()


def _owner(trials: Store) -> str:
    """A name that this run directory keeps."""
    path = trials.folder / _OWNER
    with trials.writing():
        if not path.exists():
            write_atomically(path, uuid.uuid4().hex.encode())
        return path.read_text(encoding="utf-8")
