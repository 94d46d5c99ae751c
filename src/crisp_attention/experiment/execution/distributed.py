"""One run by several processes, which a launcher (torchrun, `accelerate launch`) has started.

Rank 0 goes through the study as one process would: it plans, decides what is trained next, holds the run's lock,
writes and shows. The others are told by it what comes next, train their part of it, and print into a log.

Each run has a process group of its own. Where it fails on one rank, that rank closes the group, which ends the run
on all of them; through the launcher's store, which outlives the groups, they agree on why, and go on to the next.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from crisp_attention.errors import ConfigurationError, CrispError, StorageError
from crisp_attention.experiment.data.dataset import ExperimentData
from crisp_attention.experiment.execution.executor import Division
from crisp_attention.experiment.execution.local import available_cores
from crisp_attention.experiment.execution.team import ANSWER, LostError, Team
from crisp_attention.experiment.execution.worker import (
    UNSERVED,
    Event,
    Task,
    perform,
    print_to,
    set_up,
    tell_or_leave,
)
from crisp_attention.experiment.results.provenance import Launch, launch
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.resources import ResourcesSpec
from crisp_attention.experiment.specification.runs import PlannedRun, RunConfig
from crisp_attention.experiment.training.model import Checkpoint

if TYPE_CHECKING:
    from crisp_attention.experiment.results.record import Record
    from crisp_attention.experiment.training.checkpoint import Checkpoints
    from crisp_attention.experiment.training.evaluation import Outputs
    from crisp_attention.experiment.training.journal import Progress
    from crisp_attention.experiment.training.tracking import Tracking
    from crisp_attention.experiment.training.workbench import Workbench

T = TypeVar("T")


def require_share(batch_size: int) -> None:
    """Make sure that a batch can be shared evenly by the processes that a launcher started.

    Raises:
        ConfigurationError: If it cannot.
    """
    launched = launch()
    if launched is not None and batch_size % launched.size:
        raise ConfigurationError(
            f"training.batch_size = {batch_size} cannot be shared evenly by {launched.size} processes, each of which "
            "takes a part of every batch. Start a number of processes that divides it."
        )


@contextlib.contextmanager
def launched() -> Iterator[bool]:
    """What a command does under a launcher; yields whether this process is to go through the study itself.

    Without a launcher it does nothing. Otherwise rank 0 goes through the study within the block. The others
    do what it tells them before the block begins, which they then leave out.

    Raises:
        CrispError: If the processes do not find each other.
    """
    global _team
    own = launch()
    if own is None:
        yield True
        return
    if own.rank:
        _follow(own)
        yield False
        return
    _team = Team(own)
    try:
        yield True
    finally:
        _team.dismiss()
        _team = None


class LaunchedExecutor:
    """The processes that a launcher started: one run after another, each by all of them.

    Args:
        resources: What each process gets.
    """

    def __init__(self, resources: ResourcesSpec) -> None:
        self._threads = resources.cpus

    def divide(self, jobs: int | None, pending: int, runs: int) -> Division:
        """Share the cores of this machine among its processes.

        Args:
            jobs: Must be None: a run takes all processes.
            pending: Runs to do.
            runs: With those that are done.

        Raises:
            ConfigurationError: If runs are to be trained side by side, the launcher asks for what is not served, or
                the study does not go on within `launched`.
        """
        own = _require_team().own
        for name, why in UNSERVED.items():
            if os.environ.get(name, "no").lower() not in ("no", "false", "0", ""):
                raise ConfigurationError(f"{why}, but the launcher sets {name}={os.environ[name]}. Leave that out.")
        if jobs is not None:
            raise ConfigurationError(
                f"--jobs {jobs} asks for runs side by side, but a launcher has started {own.size} processes, "
                "which train one run after another together. Leave --jobs out, or start without the launcher."
            )
        return Division(1, self._threads or max(1, available_cores() // own.local_size), processes=own.size)

    def execute(
        self,
        queue: deque[Task],
        store: Store,
        checkpoint: Checkpoint,
        data: ExperimentData,
        division: Division,
        on_event: Callable[[PlannedRun | None, Event], None],
    ) -> None:
        """Do the given tasks; see `Executor.execute`.

        Raises:
            StorageError: If the run directory cannot be written.
            CrispError: If a process is gone, or cannot do what the others do.
        """
        team = _require_team()
        with _printing_to(store, team.own), _named_if_lost():
            team.say({"folder": str(store.folder), "threads": division.threads})
            bench = team.together(
                functools.partial(_set_up, team.own, store.folder, division.threads, (checkpoint, data))
            )
            on_event(None, Event("ready"))
            while queue:
                task = queue.popleft()
                tell = functools.partial(tell_or_leave, functools.partial(on_event, task.run))
                event = perform(task, store, bench, tell, functools.partial(_lead, team))
                on_event(task.run, event)
                if event.kind == "unsaved":
                    # No other run could be kept either.
                    raise StorageError(event.reason)

    def close(self) -> None:
        """Nothing: the processes are the launcher's."""


def _lead(
    team: Team,
    planned: PlannedRun,
    bench: Workbench,
    report: Callable[[Progress], None],
    checkpoints: Checkpoints,
    tracking: Tracking | None,
    limits: tuple[float, ...],
    keep: Path | None,
) -> tuple[Record, Outputs | None]:
    """`train.run` on all ranks."""
    from crisp_attention.experiment.training import train

    team.say({"run": asdict(planned), "limits": limits})
    return team.together(lambda: train.run(planned, bench, report, checkpoints, tracking, limits, keep))


def _follow(own: Launch) -> None:
    """Do what rank 0 says, until it says that this is all."""
    from crisp_attention.experiment.training import train
    from crisp_attention.experiment.training.checkpoint import Checkpoints

    # Ctrl-C reaches the whole process group; rank 0 decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print_to(_opened(Path(os.devnull)))
    team = Team(own)
    store: Store | None = None
    bench: Workbench | None = None
    while (order := team.hear()) is not None:
        try:
            if "folder" in order:
                store = Store(Path(order["folder"]))
                bench = team.together(functools.partial(_set_up, own, store.folder, order["threads"], None))
                continue
            assert store is not None
            assert bench is not None
            run = PlannedRun(**order["run"] | {"config": RunConfig(**order["run"]["config"])})
            run_id = run.config.run_id
            print(f"Training run {run_id} with rank 0", file=sys.stderr)
            checkpoints = Checkpoints(store.checkpoints(run_id), run_id)
            team.together(functools.partial(train.run, run, bench, lambda _: None, checkpoints, limits=order["limits"]))
        except Exception:  # rank 0 knows of it
            traceback.print_exc()
    team.leave()


def _set_up(own: Launch, folder: Path, threads: int, given: tuple[Checkpoint, ExperimentData] | None) -> Workbench:
    """What runs in a directory need, on each rank.

    Raises:
        ConfigurationError: If this rank lacks a GPU, or does not see what rank 0 sees.
    """
    from crisp_attention.experiment.training.ranks import Ranks

    found = Ranks.current().broadcast(given)
    assert found is not None
    checkpoint, data = found
    for place in (folder, checkpoint.folder):
        if not place.is_dir():
            raise ConfigurationError(
                f"there is no folder {place} on its machine. The run directory and the model must lie where all "
                "processes see them."
            )
    if own.rank:
        print_to(_opened(_log(folder, own)))
    return set_up(checkpoint, data, threads)


_team: Team | None = None
"""Of rank 0, while it is in `launched`."""


def _require_team() -> Team:
    if _team is None:
        raise ConfigurationError(
            "A launcher has started this process among others, each of which would do the whole study. Start "
            "`crisp run` or `crisp reproduce` with it, or this process without it."
        )
    return _team


@contextlib.contextmanager
def _named_if_lost() -> Iterator[None]:
    try:
        yield
    except LostError as lost:
        raise CrispError(
            f"Rank {lost} has not answered for {ANSWER.seconds} s. Finished runs are kept; the same command goes on."
        ) from None


def _log(folder: Path, own: Launch) -> Path:
    return folder / "logs" / f"rank-{own.rank}-{os.getpid()}.log"


def _opened(path: Path) -> TextIO:
    return path.open("a", buffering=1, encoding="utf-8")


@contextlib.contextmanager
def _printing_to(store: Store, own: Launch) -> Iterator[None]:
    """Have what libraries say to stderr in a file within a block: the display is shown by the same process."""
    with store.writing():
        stream = _opened(_log(store.folder, own))
    before = os.dup(2)
    with stream, contextlib.redirect_stderr(stream):
        os.dup2(stream.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
