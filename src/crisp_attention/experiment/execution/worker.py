"""Doing one run, as all executors do: from a `Task` to its record and the `Event` that says how it ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, TextIO

from crisp_attention.errors import StorageError
from crisp_attention.experiment.data.dataset import ExperimentData
from crisp_attention.experiment.results.faults import DISK_ERRORS
from crisp_attention.experiment.results.leases import Lease, LeaseLostError
from crisp_attention.experiment.results.record import RealisedSparsity, Record, Timing
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.runs import PlannedRun
from crisp_attention.experiment.training.model import Checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from crisp_attention.experiment.training.checkpoint import Checkpoints
    from crisp_attention.experiment.training.evaluation import Outputs
    from crisp_attention.experiment.training.journal import Progress
    from crisp_attention.experiment.training.tracking import Tracking
    from crisp_attention.experiment.training.workbench import Workbench

    Trainer = Callable[
        [
            PlannedRun,
            Workbench,
            Callable[[Progress], None],
            Checkpoints,
            Tracking | None,
            tuple[float, ...],
            Path | None,
        ],
        tuple[Record, Outputs | None],
    ]

# Numbers of M_MMAP_MAX and M_TRIM_THRESHOLD in malloc.h: no block from the system alone, none given back.
_ALLOCATOR = ((-4, 0), (-1, 2**31 - 1))
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass(frozen=True)
class Task:
    """One run to do.

    Attributes:
        run: Which.
        before: Its record when it was planned, of a run to be done again; None where there was none.
            Where another process has written one since, that stands.
        report_to: Trackers to show it in, see `TrackingSpec`.
        limits: Evaluation losses by epoch beyond which it is given up, see `pruning.limits`.
        keep: Whether to save the finished model too.
    """

    run: PlannedRun
    before: Record | None = None
    report_to: tuple[str, ...] = ()
    limits: tuple[float, ...] = ()
    keep: bool = False


@dataclass(frozen=True)
class Event:
    """What a worker says.

    Attributes:
        kind: "ready" for a run; "progress"; "note"; or how the run ended: "finished", "pruned", "diverged", "failed",
            "elsewhere" (another process is training it, or has taken it over), or "unsaved" (its record could not be
            written).
        run_id: Which run; empty for "ready".
        step, steps, loss: Progress, as in `journal.Progress`.
        reason: Why it was given up, diverged, failed or was not saved; or what there is to note.
        result: What a finished run found, in a few words.
    """

    kind: Literal["ready", "progress", "note", "finished", "pruned", "diverged", "failed", "elsewhere", "unsaved"]
    run_id: str = ""
    step: int = 0
    steps: int = 0
    loss: float = 0.0
    reason: str | None = None
    result: str = ""


UNSERVED = {
    "ACCELERATE_MIXED_PRECISION": "Runs are trained in float32",
    "ACCELERATE_DYNAMO_BACKEND": "Runs are not compiled",
    "ACCELERATE_USE_DEEPSPEED": "Each process holds the whole model",
    "ACCELERATE_USE_FSDP": "Each process holds the whole model",
    "ACCELERATE_USE_MEGATRON_LM": "Each process holds the whole model",
}
"""What Accelerate takes from the environment and no run is trained with, and why not."""

Tell = Callable[[Event], None]
"""Told of progress and notes while a run is in training."""


def environment(threads: int) -> dict[str, str]:
    """What numerical libraries read when they are imported, for a process that trains with so many threads."""
    return dict.fromkeys(_THREAD_VARIABLES, str(threads)) | {"TOKENIZERS_PARALLELISM": "false"}


def keep_memory() -> None:
    """Keep freed memory for the next step, where the C library is glibc; elsewhere nothing changes.

    It would give each large block back to the system, which then has to clear pages anew for every activation and
    gradient of every step. Whoever sets glibc's own variables has chosen otherwise.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no such library, or another one
        allocator = ctypes.CDLL(None)
        for option, value in _ALLOCATOR:
            allocator.mallopt(option, value)


def print_to(stream: TextIO) -> None:
    """Have all that this process prints in a file."""
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream


def set_up(checkpoint: Checkpoint, data: ExperimentData, threads: int) -> Workbench:
    """What all runs of a study need in a process that trains them; its threads, memory and silence are settled too."""
    # Accelerate reads the threads from there, and chooses a number of its own where there is none.
    os.environ.update(environment(threads))
    # A launcher, or a training in the same session before, may have left these; runs are what their records say.
    for name in UNSERVED:
        os.environ.pop(name, None)
    keep_memory()
    import torch

    from crisp_attention.experiment.training.workbench import Workbench, silence_training

    torch.set_num_threads(threads)
    silence_training()
    return Workbench(checkpoint, data)


def tell_or_leave(send: Tell, event: Event) -> None:
    """Report progress; end where nobody listens any more, which is no failure of the run."""
    try:
        send(event)
    except OSError:
        sys.exit(1)


def perform(task: Task, store: Store, bench: Workbench, tell: Tell, trainer: Trainer | None = None) -> Event:
    """Do one run, unless it is done or another process is doing it; its record is written before this returns.

    Args:
        task: The run.
        store: The run directory, opened.
        bench: Model and data.
        tell: Told of progress and notes.
        trainer: What trains, in place of `train.run`.

    Returns:
        How it ended: any kind of event but "ready", "progress" and "note".
    """
    try:
        with store.writing():  # what is printed goes to its disk too
            return _run(task, store, bench, tell, trainer)
    except StorageError as error:
        return Event("unsaved", task.run.config.run_id, reason=str(error))


def _run(task: Task, store: Store, bench: Workbench, tell: Tell, trainer: Trainer | None = None) -> Event:
    run_id = task.run.config.run_id
    lease = store.lock(run_id)
    if lease is None:
        return Event("elsewhere", run_id)
    try:
        record = store.load(run_id)
        if record is None or record == task.before:
            record = _train(task, lease, store, bench, tell, trainer)
        return Event(record.status, run_id, reason=record.reason, result=_result(record))
    except LeaseLostError as error:
        print(error, file=sys.stderr)
        return Event("elsewhere", run_id)
    finally:
        lease.release()


def _train(task: Task, lease: Lease, store: Store, bench: Workbench, tell: Tell, trainer: Trainer | None) -> Record:
    """Train, write the record, and discard the checkpoints.

    Returns:
        The record that stands.

    Raises:
        StorageError: If the directory cannot be written; what was trained is in the last checkpoint.
        LeaseLostError: If another process has taken the run over.
    """
    from crisp_attention.experiment.training import train
    from crisp_attention.experiment.training.checkpoint import Checkpoints

    planned, run_id = task.run, task.run.config.run_id
    print(f"Training run {run_id}", file=sys.stderr)

    def note(sentence: str) -> None:
        tell(Event("note", run_id, reason=sentence))

    checkpoints = Checkpoints(store.checkpoints(run_id), run_id, note)
    tracking = _tracking(task, store, note)
    started = time.perf_counter()

    def report(now: Progress) -> None:
        lease.require()
        tell(Event("progress", run_id, now.step, now.steps, now.loss))

    try:
        keep = store.model(run_id) if task.keep else None
        record, outputs = (trainer or train.run)(planned, bench, report, checkpoints, tracking, task.limits, keep)
    except LeaseLostError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            # No fault of the run: it stays pending.
            raise store.unwritable(error) from error
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        record, outputs = _failure(planned, bench, reason, time.perf_counter() - started), None
    lease.renew()
    lease.require()
    record = store.save(record, outputs, task.before)
    checkpoints.clear()
    return record


def _tracking(task: Task, store: Store, note: Callable[[str], None]) -> Tracking | None:
    if not task.report_to:
        return None
    from crisp_attention.experiment.training.tracking import Tracking

    return Tracking(task.report_to, store.folder, note)


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
