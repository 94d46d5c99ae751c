"""A process that trains one run after another: reads `Task`s from a pipe, writes events to it.

It writes each record itself, before it says so, and ends with its parent, however that ended.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from crisp_attention.errors import StorageError
from crisp_attention.experiment.data.dataset import ExperimentData
from crisp_attention.experiment.results.record import RealisedSparsity, Record, Timing
from crisp_attention.experiment.results.store import DISK_ERRORS, Store
from crisp_attention.experiment.specification.runs import PlannedRun
from crisp_attention.experiment.training.model import Checkpoint

if TYPE_CHECKING:
    from crisp_attention.experiment.training.checkpoint import Checkpoints
    from crisp_attention.experiment.training.evaluation import Outputs
    from crisp_attention.experiment.training.journal import Progress
    from crisp_attention.experiment.training.workbench import Workbench

    Trainer = Callable[[PlannedRun, Workbench, Callable[[Progress], None], Checkpoints], tuple[Record, Outputs | None]]

_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Task:
    """One run to do.

    Attributes:
        run: Which.
        before: Its record when it was planned, of a run to be done again; None where there was none.
            Where another process has written one since, that stands.
    """

    run: PlannedRun
    before: Record | None = None


@dataclass(frozen=True)
class Event:
    """What a worker says.

    Attributes:
        kind: "ready" for a run; "progress"; "note"; or how the run ended: "finished", "diverged", "failed",
            "elsewhere" (another process is training it), or "unsaved" (its record could not be written).
        run_id: Which run; empty for "ready".
        step, steps, loss: Progress, as in `journal.Progress`.
        reason: Why it diverged, failed or was not saved; or what there is to note.
        result: What a finished run found, in a few words.
    """

    kind: Literal["ready", "progress", "note", "finished", "diverged", "failed", "elsewhere", "unsaved"]
    run_id: str = ""
    step: int = 0
    steps: int = 0
    loss: float = 0.0
    reason: str | None = None
    result: str = ""


def serve(pipe: Any, folder: Path, checkpoint: Checkpoint, data: ExperimentData, threads: int, log: Path) -> None:
    """Body of a worker process.

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
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream

    import torch

    from crisp_attention.experiment.training.workbench import Workbench, quiet_transformers

    torch.set_num_threads(threads)
    quiet_transformers()
    bench = Workbench(checkpoint, data)
    pipe.send(Event("ready"))
    while (task := pipe.recv()) is not None:
        try:
            with store.writing():  # what is printed goes to its disk too
                event = train_task(task, store, bench, pipe)
        except StorageError as error:
            event = Event("unsaved", task.run.config.run_id, reason=str(error))
        pipe.send(event)


def train_task(task: Task, store: Store, bench: Workbench | Any, pipe: Any, trainer: Trainer | None = None) -> Event:
    """Train a run and write its record, unless another process does, or has.

    Args:
        task: Which.
        store: The run directory, opened.
        bench: Model and data.
        pipe: Told of progress and notes.
        trainer: What trains in place of `train.run`.

    Returns:
        How the run ended.

    Raises:
        StorageError: If the directory cannot be written.
    """
    run_id = task.run.config.run_id
    lock = store.lock(run_id)
    if lock is None:
        return Event("elsewhere", run_id)
    try:
        record = store.load(run_id)
        if record is None or record == task.before:
            record = _train(task.run, store, bench, pipe, trainer)
        return Event(record.status, run_id, reason=record.reason, result=_result(record))
    finally:
        lock.release()


def _train(planned: PlannedRun, store: Store, bench: Workbench, pipe: Any, trainer: Trainer | None) -> Record:
    """Train, write the record, and discard the checkpoints.

    Raises:
        StorageError: If the directory cannot be written; what was trained is in the last checkpoint.
    """
    from crisp_attention.experiment.training import train
    from crisp_attention.experiment.training.checkpoint import Checkpoints

    run_id = planned.config.run_id
    print(f"Training run {run_id}", file=sys.stderr)
    checkpoints = Checkpoints(
        store.checkpoints(run_id), run_id, lambda sentence: _tell(pipe, Event("note", run_id, reason=sentence))
    )
    started = time.perf_counter()
    try:
        record, outputs = (trainer or train.run)(
            planned,
            bench,
            lambda now: _tell(pipe, Event("progress", run_id, now.step, now.steps, now.loss)),
            checkpoints,
        )
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            # No fault of the run: it stays pending.
            raise store.unwritable(error) from error
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        record, outputs = _failure(planned, bench, reason, time.perf_counter() - started), None
    store.save(record, outputs)
    checkpoints.clear()
    return record


def _tell(pipe: Any, event: Event) -> None:
    """Report progress; end where nobody listens any more, which is no failure of the run."""
    try:
        pipe.send(event)
    except OSError:
        sys.exit(1)


def _result(record: Record) -> str:
    if record.status != "finished":
        return ""
    score = record.final.test
    return f"{score.correct} of {score.total} correct, {record.timing.seconds:.0f} s"


def _failure(planned: PlannedRun, bench: Workbench, reason: str, seconds: float) -> Record:
    from crisp_attention.experiment.training.train import describe

    return Record(
        run_id=planned.config.run_id,
        status="failed",
        reason=reason,
        arm=planned.arm,
        config=asdict(planned.config),
        classes=bench.data.classes,
        epochs=(),
        realised_sparsity=RealisedSparsity(train={}, test={}),
        parameters=0,
        timing=Timing(
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(seconds, 3),
            train_seconds=0.0,
            train_examples_per_second=0.0,
        ),
        provenance=describe(bench, bench.data.of(planned.config.data), "unknown"),
    )


def _end_with_parent() -> None:
    """Leave at once when the parent is gone, killed or not: an orphan must not train on."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS)
        os._exit(1)
