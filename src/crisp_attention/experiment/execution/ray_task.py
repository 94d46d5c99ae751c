"""What happens on the nodes of a Ray cluster: one run a task. Imports neither torch nor, when it is loaded, Ray."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import crisp_attention
from crisp_attention.errors import CrispError, StorageError
from crisp_attention.experiment.data.dataset import ExperimentData
from crisp_attention.experiment.execution.worker import Event, Task, perform, set_up
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.training.model import Checkpoint, is_here, unpack

if TYPE_CHECKING:
    from crisp_attention.experiment.training.workbench import Workbench

_PROGRESS_SECONDS = 1.0
_WAIT_SECONDS = 1.0


@dataclass(frozen=True)
class Parcel:
    """What all tasks of a study share; it travels to a worker process once.

    Attributes:
        version: Of this package where the study was started.
        folder: The run directory, absolute.
        sign: Name of a file in its logs: a node that does not see it has another directory of that name.
        checkpoint: The model, as it is where the study was started.
        data: All data of the experiment.
        threads: Torch's threads.
    """

    version: str
    folder: Path
    sign: str
    checkpoint: Checkpoint
    data: ExperimentData
    threads: int


class Mailbox:
    """An actor that keeps what tasks tell until it is asked for."""

    def __init__(self) -> None:
        self._mail: list[tuple[int, Event]] = []

    def put(self, number: int, event: Event) -> None:
        """Take an event.

        Args:
            number: Of the task that tells it.
            event: What it tells.
        """
        self._mail.append((number, event))

    def empty(self) -> list[tuple[int, Event]]:
        """Hand out what has come since the last time, in order."""
        mail, self._mail = self._mail, []
        return mail


_at_hand: dict[str, Workbench] = {}
"""Model and data of the study that this process did a run of last, by the study's sign."""


def train(task: Task, parcel: list[Any], files: list[Any], mailbox: Any, number: int, patience: float) -> Event:
    """Body of a task.

    Args:
        task: The run.
        parcel: Reference to the `Parcel`, in a list so that Ray does not fetch it for each task.
        files: Reference to the files of the checkpoint, likewise: fetched where the node lacks them.
        mailbox: Takes progress and notes.
        number: Which task says so.
        patience: Seconds to wait for a process that holds the run, as one on a node that was lost may for a while.

    Returns:
        How the run ended, as `worker.perform`.

    Raises:
        CrispError: If the node cannot do any run of the study.
    """
    import ray

    shared: Parcel = ray.get(parcel[0])
    if shared.version != crisp_attention.__version__:
        raise CrispError(
            f"Node {platform.node()} has crisp-attention {crisp_attention.__version__}, the study was started with "
            f"{shared.version}."
        )
    store = Store(shared.folder)
    try:
        # Listed, not looked up: what a network file system remembers of a folder may be older than the sign.
        reachable = shared.sign in os.listdir(store.folder / "logs")
    except OSError:
        reachable = False
    if not reachable:
        raise StorageError(
            f"Node {platform.node()} cannot reach the run directory {shared.folder}. It must be in a folder that "
            "all nodes share, under the same path: choose another --out."
        )
    last = 0.0

    def tell(event: Event) -> None:
        nonlocal last
        now = time.monotonic()
        if event.kind != "progress" or now - last >= _PROGRESS_SECONDS:
            last = now
            mailbox.put.remote(number, event)

    with _printing_to(store.folder / "logs" / f"ray-{platform.node()}-{os.getpid()}.log"):
        bench = _bench(shared, files)
        tell(Event("ready"))
        deadline = time.monotonic() + patience
        while (event := perform(task, store, bench, tell)).kind == "elsewhere" and time.monotonic() < deadline:
            time.sleep(_WAIT_SECONDS)
    return event


def _bench(shared: Parcel, files: list[Any]) -> Workbench:
    if shared.sign not in _at_hand:
        checkpoint = shared.checkpoint
        if not is_here(checkpoint):
            import ray

            checkpoint = unpack(checkpoint, ray.get(files[0]))
        _at_hand.clear()
        _at_hand[shared.sign] = set_up(checkpoint, shared.data, shared.threads)
    return _at_hand[shared.sign]


@contextlib.contextmanager
def _printing_to(log: Path) -> Iterator[None]:
    """Keep what is printed beside the records."""
    with (
        log.open("a", buffering=1, encoding="utf-8") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        yield
