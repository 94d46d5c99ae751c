"""One run by several processes, which a launcher (torchrun, `accelerate launch`) has started.

Rank 0 goes through the study as one process would: it plans, decides what is trained next, holds the run's lock,
writes and shows. The others are told by it what comes next, train their part of it, and print into a log.

Each run has a process group of its own. Where it fails on one rank, that rank closes the group, which ends the run
on all of them; through the launcher's store, which outlives the groups, they agree on why, and go on to the next.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import pickle
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from crisp_attention.errors import ConfigurationError, CrispError, StorageError
from crisp_attention.experiment.data.dataset import ExperimentData
from crisp_attention.experiment.execution.executor import Division
from crisp_attention.experiment.execution.local import available_cores
from crisp_attention.experiment.execution.worker import Event, Task, environment, perform
from crisp_attention.experiment.results.provenance import Launch, launch
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.resources import ResourcesSpec
from crisp_attention.experiment.specification.runs import PlannedRun
from crisp_attention.experiment.training.model import Checkpoint

if TYPE_CHECKING:
    from crisp_attention.experiment.results.record import Record
    from crisp_attention.experiment.training.checkpoint import Checkpoints
    from crisp_attention.experiment.training.evaluation import Outputs
    from crisp_attention.experiment.training.journal import Progress
    from crisp_attention.experiment.training.tracking import Tracking
    from crisp_attention.experiment.training.workbench import Workbench

T = TypeVar("T")

_JOIN = timedelta(minutes=10)
_COLLECTIVE = timedelta(minutes=10)
"""After so long without the others, a rank takes its run for failed."""
_ANSWER = timedelta(minutes=5)
"""After so long, a rank that does not say how a run ended is taken to be gone."""
_FAREWELL = timedelta(seconds=10)
_UNSERVED = {
    "ACCELERATE_MIXED_PRECISION": "Runs are trained in float32",
    "ACCELERATE_USE_DEEPSPEED": "Each process holds the whole model",
    "ACCELERATE_USE_FSDP": "Each process holds the whole model",
}


class RankError(CrispError):
    """What all were doing failed on another rank."""


class _LostError(BaseException):
    """A rank is gone. No failure of the run, which stays pending."""


@dataclass(frozen=True)
class _SetUp:
    """Runs in a directory come next."""

    folder: Path
    threads: int


@dataclass(frozen=True)
class _End:
    """How something ended on one rank: whether it failed there before it did on others, and why."""

    first: bool = False
    reason: str = ""


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
    _team = _Team(own)
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

    def divide(self, jobs: int | None, pending: int) -> Division:
        """Share the cores of this machine among its processes.

        Args:
            jobs: Must be None: a run takes all processes.
            pending: Runs to do.

        Raises:
            ConfigurationError: If runs are to be trained side by side, the launcher asks for what is not served, or
                the study does not go on within `launched`.
        """
        own = _require_team().own
        if jobs is not None:
            raise ConfigurationError(
                f"--jobs {jobs} asks for runs side by side, but a launcher has started {own.size} processes, "
                "which train one run after another together. Leave --jobs out, or start without the launcher."
            )
        for name, why in _UNSERVED.items():
            if os.environ.get(name, "no").lower() not in ("no", "false", "0", ""):
                raise ConfigurationError(f"{why}, but the launcher sets {name}={os.environ[name]}. Leave that out.")
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
            team.say(_SetUp(store.folder, division.threads))
            bench = team.together(
                functools.partial(_set_up, team.own, store.folder, division.threads, (checkpoint, data))
            )
            on_event(None, Event("ready"))
            while queue:
                task = queue.popleft()
                tell = functools.partial(_tell, functools.partial(on_event, task.run))
                event = perform(task, store, bench, tell, functools.partial(_lead, team))
                on_event(task.run, event)
                if event.kind == "unsaved":
                    # No other run could be kept either.
                    raise StorageError(event.reason)

    def close(self) -> None:
        """Nothing: the processes are the launcher's."""


def _tell(on_event: Callable[[Event], None], event: Event) -> None:
    """Report progress; end where nobody reads any more, which is no failure of the run."""
    try:
        on_event(event)
    except OSError:
        sys.exit(1)


def _lead(
    team: _Team,
    planned: PlannedRun,
    bench: Workbench,
    report: Callable[[Progress], None],
    checkpoints: Checkpoints,
    tracking: Tracking | None,
) -> tuple[Record, Outputs | None]:
    """`train.run` on all ranks."""
    from crisp_attention.experiment.training import train

    team.say(planned)
    return team.together(lambda: train.run(planned, bench, report, checkpoints, tracking))


def _follow(own: Launch) -> None:
    """Do what rank 0 says, until it says that this is all."""
    from crisp_attention.experiment.training import train
    from crisp_attention.experiment.training.checkpoint import Checkpoints

    # Ctrl-C reaches the whole process group; rank 0 decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _print_to(Path(os.devnull))
    team = _Team(own)
    store: Store | None = None
    bench: Workbench | None = None
    while (order := team.hear()) is not None:
        try:
            if isinstance(order, _SetUp):
                store = Store(order.folder)
                bench = team.together(functools.partial(_set_up, own, order.folder, order.threads, None))
                continue
            assert store is not None
            assert bench is not None
            run_id = order.config.run_id
            print(f"Training run {run_id} with rank 0", file=sys.stderr)
            checkpoints = Checkpoints(store.checkpoints(run_id), run_id)
            team.together(functools.partial(train.run, order, bench, lambda _: None, checkpoints))
        except Exception:  # rank 0 knows of it
            traceback.print_exc()
    team.leave()


def _set_up(own: Launch, folder: Path, threads: int, given: tuple[Checkpoint, ExperimentData] | None) -> Workbench:
    """What runs in a directory need, on each rank.

    Raises:
        ConfigurationError: If this rank lacks a GPU, or does not see what rank 0 sees.
    """
    import torch

    from crisp_attention.experiment.training.ranks import Ranks
    from crisp_attention.experiment.training.workbench import Workbench, quiet_transformers

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
        _print_to(_log(folder, own))
    # Accelerate reads the threads from there, and chooses a number of its own where there is none.
    os.environ.update(environment(threads))
    torch.set_num_threads(threads)
    quiet_transformers()
    return Workbench(checkpoint, data)


class _Team:
    """The processes that a launcher started, and what they tell each other outside of any process group.

    Args:
        own: This process.

    Raises:
        CrispError: If the others do not come.
    """

    def __init__(self, own: Launch) -> None:
        import torch
        from torch.distributed.rendezvous import rendezvous

        if torch.cuda.is_available():
            if own.local_size > torch.cuda.device_count():
                raise ConfigurationError(
                    f"{own.local_size} processes on a machine with {torch.cuda.device_count()} GPUs: each takes one. "
                    "Start no more processes than there are GPUs."
                )
            torch.cuda.set_device(own.local_rank)
        self.own = own
        self._orders = self._meetings = 0
        # Object collectives and flags go over the CPU, whatever the model is on.
        self._backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            self._store, _, _ = next(rendezvous("env://", own.rank, own.size, timeout=_JOIN))
        except (ValueError, RuntimeError) as error:
            raise CrispError(
                f"The {own.size} processes that a launcher started do not find each other: {error}"
            ) from None

    def say(self, order: _SetUp | PlannedRun | None) -> None:
        """Tell the others what comes next; None is the end. Of rank 0."""
        self._store.set(f"order/{self._orders}", pickle.dumps(order))
        self._orders += 1

    def hear(self) -> Any:
        """What rank 0 says next, whenever that is."""
        from torch.distributed import DistStoreError

        key = f"order/{self._orders}"
        self._orders += 1
        while True:
            with contextlib.suppress(DistStoreError):  # nothing yet
                self._store.wait([key], _ANSWER)
                return pickle.loads(self._store.get(key))

    def dismiss(self) -> None:
        """Say that this is all, and wait a little until everybody knows: the store may be this process's. Of rank 0."""
        with contextlib.suppress(RuntimeError):
            self.say(None)
            self._store.wait([f"gone/{rank}" for rank in range(1, self.own.size)], _FAREWELL)

    def leave(self) -> None:
        """Say that the end was heard."""
        self._store.set(f"gone/{self.own.rank}", b"")

    def together(self, act: Callable[[], T]) -> T:
        """Do something in a process group, as all ranks do; it succeeds on all of them or on none.

        Raises:
            RankError: If it failed on another rank first.
            Exception: What it raised here, if it failed here first.
        """
        from torch import distributed
        from torch.distributed import distributed_c10d

        meeting, self._meetings = self._meetings, self._meetings + 1
        own, failure = _End(), None
        try:
            distributed.init_process_group(
                self._backend,
                store=distributed_c10d.PrefixStore(f"group/{meeting}", self._store),
                rank=self.own.rank,
                world_size=self.own.size,
                timeout=_COLLECTIVE,
            )
            result = act()
        except BaseException as error:
            failure = error
            first = self._store.add(f"failures/{meeting}", 1) == 1
            own = _End(first, f"{type(error).__name__}: {error}")
            traceback.print_exc()
            if distributed.group.WORLD is not None:
                distributed.group.WORLD.abort()  # or its end would wait for what is under way on a GPU
        if distributed.is_initialized():
            distributed.destroy_process_group()
        if failure is not None:
            _let_go(failure)
        self._store.set(f"end/{meeting}/{self.own.rank}", pickle.dumps(own))
        if failure is not None and not isinstance(failure, Exception):
            raise failure
        ends = self._ends(meeting)
        cause = next((rank for rank, end in enumerate(ends) if end.first), None)
        if cause is None:
            return result
        if failure is not None and cause == self.own.rank:
            raise failure
        raise RankError(f"rank {cause}: {ends[cause].reason}") from failure

    def _ends(self, meeting: int) -> list[_End]:
        ends = []
        for rank in range(self.own.size):
            key = f"end/{meeting}/{rank}"
            try:
                self._store.wait([key], _ANSWER)
            except RuntimeError:
                raise _LostError(rank) from None
            ends.append(pickle.loads(self._store.get(key)))
        return ends


def _let_go(error: BaseException | None) -> None:
    """Free all that an exception keeps alive.

    Gloo closes its connections with its last reference, and one is in the frames of the training that failed. Others
    may be waiting for this rank in a collective: when the connections close they fail, before their time is up.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    gc.collect()


_team: _Team | None = None
"""Of rank 0, while it is in `launched`."""


def _require_team() -> _Team:
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
    except _LostError as lost:
        raise CrispError(
            f"Rank {lost} has not answered for {_ANSWER.seconds} s. Finished runs are kept; the same command goes on."
        ) from None


def _log(folder: Path, own: Launch) -> Path:
    return folder / "logs" / f"rank-{own.rank}-{os.getpid()}.log"


def _print_to(path: Path) -> None:
    """Have all that this process prints in a file."""
    stream = path.open("a", buffering=1, encoding="utf-8")
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream


@contextlib.contextmanager
def _printing_to(store: Store, own: Launch) -> Iterator[None]:
    """Have what libraries say to stderr in a file within a block: the display is shown by the same process."""
    with store.writing():
        stream = _log(store.folder, own).open("a", buffering=1, encoding="utf-8")
    before = os.dup(2)
    with stream, contextlib.redirect_stderr(stream):
        os.dup2(stream.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
