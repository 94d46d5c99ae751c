"""Pending runs -> worker processes on this machine, the cores divided between them.

Several processes with few threads each train more sentences a second than one with many.
Imports no torch: the workers do.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

from crisp_attention.errors import ConfigurationError, CrispError, StorageError
from crisp_attention.experiment.data.dataset import ExperimentData
from crisp_attention.experiment.execution import distributed
from crisp_attention.experiment.execution.worker import Event, Task, serve
from crisp_attention.experiment.results.provenance import launch
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.runs import PlannedRun
from crisp_attention.experiment.training.model import Checkpoint

_GRACE_SECONDS = 10.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass(frozen=True)
class Division:
    """How the machine is divided.

    Attributes:
        jobs: Runs side by side.
        threads: Torch threads of each process.
        processes: How many train each run: those that a launcher started, otherwise one worker.
    """

    jobs: int
    threads: int
    processes: int = 1


def divide(jobs: int | None, pending: int) -> Division:
    """Share the cores among workers: one worker a core by default, no more than there are runs.

    Args:
        jobs: Workers asked for, or None.
        pending: Runs to do.

    Raises:
        ConfigurationError: If jobs is below 1 or above the number of cores, or given under a launcher.
    """
    cores = available_cores()
    if (launched := launch()) is not None:
        return Division(1, max(1, cores // launched.local_size), distributed.processes_of(launched, jobs))
    if jobs is not None and not 1 <= jobs <= cores:
        raise ConfigurationError(f"--jobs must be between 1 and the {cores} cores of this machine, got {jobs}.")
    workers = max(1, min(jobs or cores, pending))
    return Division(workers, max(1, cores // workers))


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Worker:
    process: Any
    pipe: Any
    run: PlannedRun | None = None


def execute(
    queue: deque[Task],
    store: Store,
    checkpoint: Checkpoint,
    data: ExperimentData,
    division: Division,
    on_event: Callable[[PlannedRun | None, Event], None],
) -> None:
    """Do the given tasks; returns when each has ended.

    Under a launcher its processes do them, see `distributed`, and otherwise workers.
    A worker that dies takes only its run with it: that is told as "failed" (without a record, so
    that it is pending next time) and a new worker goes on. Interrupted by an exception (Ctrl-C), all
    workers are stopped and what they were training goes on from its checkpoint next time.

    Args:
        queue: What to train, in order; emptied. `on_event` may append to it when it is told how a run has ended.
        store: The run directory, opened.
        checkpoint: Where the weights are.
        data: All data of the experiment.
        division: Workers and threads.
        on_event: Told of everything, with the run concerned (None for "ready").

    Raises:
        StorageError: If the run directory cannot be written.
        CrispError: If a worker cannot start.
    """
    if launch() is not None:
        distributed.execute(queue, store, checkpoint, data, division.threads, on_event)
        return
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
            # The exception that a signal raises may fall into a finalizer, which swallows it. What is written is whole.
            worker.process.kill()
            worker.process.join()


def _start(store: Store, checkpoint: Checkpoint, data: ExperimentData, threads: int, number: int) -> _Worker:
    # "spawn": a forked child would inherit torch's thread pools in an unusable state.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    log = store.folder / "logs" / f"worker-{os.getpid()}-{number}.log"
    process = context.Process(target=serve, args=(theirs, store.folder, checkpoint, data, threads, log), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


@contextmanager
def _thread_environment(threads: int) -> Iterator[None]:
    """Thread counts that numerical libraries read when they are imported, for children started within."""
    wanted = dict.fromkeys(_THREAD_VARIABLES, str(threads)) | {"TOKENIZERS_PARALLELISM": "false"}
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
