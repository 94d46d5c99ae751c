"""What does runs: the interface that local workers, the processes of a launcher, and a Ray cluster share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from crisp_attention.experiment.data.dataset import ExperimentData
from crisp_attention.experiment.execution.worker import Event, Task
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.runs import PlannedRun
from crisp_attention.experiment.training.model import Checkpoint


@dataclass(frozen=True)
class Division:
    """How the machines are divided.

    Attributes:
        jobs: Runs side by side.
        threads: Torch threads of each process.
        processes: How many train each run together.
        place: Where, in a few words; empty for this machine.
        elastic: Whether more may run side by side when machines are added.
    """

    jobs: int
    threads: int
    place: str = ""
    elastic: bool = False
    processes: int = 1


class Executor(Protocol):
    """Does runs. Nothing is started or reached before it is asked to divide or execute."""

    def divide(self, jobs: int | None, pending: int, runs: int) -> Division:
        """How many runs will go side by side, and with how many threads.

        Args:
            jobs: How many were asked for at most, or None.
            pending: Runs to do.
            runs: With those that are done: how many threads each has must not depend on when it is done.

        Raises:
            ConfigurationError: If there is no place for so many, or for one.
        """

    def execute(
        self,
        queue: deque[Task],
        store: Store,
        checkpoint: Checkpoint,
        data: ExperimentData,
        division: Division,
        on_event: Callable[[PlannedRun | None, Event], None],
    ) -> None:
        """Do the given tasks; returns when each has ended.

        Interrupted by an exception (Ctrl-C), all that is in training is stopped, and goes on from its checkpoint next
        time.

        Args:
            queue: What to train, in order; emptied. `on_event` may append to it when it is told how a run has ended.
            store: The run directory, opened.
            checkpoint: Where the weights are.
            data: All data of the experiment.
            division: What `divide` said.
            on_event: Told of everything, with the run concerned (None for "ready").

        Raises:
            StorageError: If the run directory cannot be written.
            CrispError: If no worker can start.
        """

    def close(self) -> None:
        """Let go of what was started or reached."""
