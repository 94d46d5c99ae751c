"""Pending runs -> worker processes on this machine, the cores divided between them.

Several processes with few threads each train more sentences a second than one with many.
Imports no torch: the workers do.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from types import ModuleType
from typing import Any

from crisp_attention.errors import ConfigurationError, CrispError, StorageError
from crisp_attention.experiment.data.dataset import ExperimentData
from crisp_attention.experiment.execution.executor import Division
from crisp_attention.experiment.execution.worker import (
    Event,
    Task,
    environment,
    perform,
    print_to,
    set_up,
    tell_or_leave,
)
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.resources import ResourcesSpec
from crisp_attention.experiment.specification.runs import PlannedRun
from crisp_attention.experiment.training.model import Checkpoint

_GRACE_SECONDS = 10.0
_PARTING_SECONDS = 5.0


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Worker:
    process: Any
    pipe: Any
    run: PlannedRun | None = None


class LocalExecutor:
    """Worker processes on this machine, the cores divided between them.

    Args:
        resources: What each run gets.
    """

    def __init__(self, resources: ResourcesSpec) -> None:
        self._threads = resources.cpus

    def divide(self, jobs: int | None, pending: int, runs: int) -> Division:
        """Share the cores among workers: one worker a core by default, no more than there are runs.

        Args:
            jobs: Workers asked for, or None.
            pending: Runs to do.
            runs: With those that are done.

        Raises:
            ConfigurationError: If a run asks for more cores than there are, or jobs is below 1 or above what the cores
                allow.
        """
        cores = available_cores()
        threads = self._threads or 1
        if threads > cores:
            raise ConfigurationError(f"resources.cpus = {threads}, but this machine has {cores} cores.")
        most = cores // threads
        if jobs is not None and not 1 <= jobs <= most:
            share = f", {threads} a run" if threads > 1 else ""
            raise ConfigurationError(
                f"--jobs must be between 1 and {most}, for the {cores} cores of this machine{share}; got {jobs}."
            )
        workers = max(1, min(jobs or most, runs))
        # What is left of a study is done as all of it was: other threads add up in another order.
        return Division(max(1, min(workers, pending)), self._threads or max(1, cores // workers))

    def execute(
        self,
        queue: deque[Task],
        store: Store,
        checkpoint: Checkpoint,
        data: ExperimentData,
        division: Division,
        on_event: Callable[[PlannedRun | None, Event], None],
    ) -> None:
        """Do the given tasks on worker processes; see `Executor.execute`.

        A worker that dies takes only its run with it: that is told as "failed" (without a record, so that it is
        pending next time) and a new worker goes on.
        """
        workers: list[_Worker] = []

        def hire() -> None:
            with _thread_environment(division.threads):
                workers.append(_start(store, checkpoint, data, division.threads, len(workers)))

        try:
            for _ in range(division.jobs):
                hire()
            while workers:
                ready = connection.wait([worker.pipe for worker in workers])
                for worker in [worker for worker in workers if worker.pipe in ready]:
                    try:
                        event: Event = worker.pipe.recv()
                    except (EOFError, OSError):
                        workers.remove(worker)
                        worker.process.join()
                        if worker.run is None:
                            if worker.process.exitcode == 0:
                                continue
                            raise CrispError(
                                f"A worker process could not start (exit code {worker.process.exitcode}); "
                                f"see {store.folder / 'logs'}."
                            ) from None
                        reason = f"the worker process died (exit code {worker.process.exitcode}; out of memory?)"
                        on_event(worker.run, Event("failed", worker.run.config.run_id, reason=reason))
                        if queue:
                            hire()
                        continue
                    on_event(worker.run, event)
                    if event.kind == "unsaved":
                        # No other run could be kept either.
                        raise StorageError(event.reason)
                    if event.kind not in ("progress", "note"):
                        task = queue.popleft() if queue else None
                        worker.run = None if task is None else task.run
                        worker.pipe.send(task)
        finally:
            for worker in workers:
                worker.process.terminate()
            for worker in workers:
                worker.process.join(_GRACE_SECONDS)
                # The exception that a signal raises may fall into a finalizer, which swallows it. What is written is
                # whole.
                worker.process.kill()
                worker.process.join()

    def close(self) -> None:
        """Nothing stays open between two calls of `execute`."""


def _start(store: Store, checkpoint: Checkpoint, data: ExperimentData, threads: int, number: int) -> _Worker:
    # "spawn": a forked child would inherit torch's thread pools in an unusable state.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    log = store.folder / "logs" / f"worker-{os.getpid()}-{number}.log"
    process = context.Process(target=serve, args=(theirs, store.folder, checkpoint, data, threads, log), daemon=True)
    with _without_main():
        process.start()
    theirs.close()
    return _Worker(process, ours)


def serve(pipe: Any, folder: Path, checkpoint: Checkpoint, data: ExperimentData, threads: int, log: Path) -> None:
    """Body of a worker process: reads tasks from a pipe, writes events to it, and ends with its parent.

    Args:
        pipe: Duplex connection: tasks in (None ends), events out.
        folder: The run directory.
        checkpoint: Where the weights are.
        data: All data of the experiment.
        threads: Torch's threads.
        log: File that takes all that is printed.
    """
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # As an exception, so that scratch folders are removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    store = Store(folder)
    try:
        stream = log.open("a", buffering=1, encoding="utf-8")
    except OSError as error:
        pipe.send(Event("unsaved", reason=str(store.unwritable(error))))
        return
    print_to(stream)
    bench = set_up(checkpoint, data, threads)
    pipe.send(Event("ready"))
    while (task := pipe.recv()) is not None:
        pipe.send(perform(task, store, bench, functools.partial(tell_or_leave, pipe.send)))


def _end_with_parent() -> None:
    """Leave at once when the parent is gone, killed or not: an orphan must not train on."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_PARTING_SECONDS)
        os._exit(1)


@contextmanager
def _without_main() -> Iterator[None]:
    """Start children within that do not run the main module of this process again.

    A spawned child imports its parent's main module. A script without an `if __name__ == "__main__"` would begin its
    experiment anew in each worker, and a notebook or a script from standard input has no file to import. Workers
    need nothing of it.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _thread_environment(threads: int) -> Iterator[None]:
    """Thread counts that numerical libraries read when they are imported, for children started within."""
    wanted = environment(threads)
    saved = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
