"""Where runs are done: on worker processes of this machine, by those of a launcher, or on a Ray cluster.

Imports neither torch nor Ray.
"""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from crisp_attention.errors import ConfigurationError, nearest
from crisp_attention.experiment.data.dataset import ExperimentData
from crisp_attention.experiment.execution.worker import Event, Task
from crisp_attention.experiment.results.provenance import launch
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.resources import ResourcesSpec
from crisp_attention.experiment.specification.runs import PlannedRun
from crisp_attention.experiment.training.model import Checkpoint

_REMOTE = "ray://"


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

    def divide(self, jobs: int | None, pending: int) -> Division:
        """How many runs will go side by side, and with how many threads.

        Args:
            jobs: How many were asked for at most, or None.
            pending: Runs to do.

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


def choose(on: str, resources: ResourcesSpec) -> Executor:
    """The executor of a name.

    Args:
        on: "local", which under a launcher is its processes, each run by all of them; "ray", for the cluster that
            RAY_ADDRESS names, else one that runs on this machine, else one that is started here for as long as it
            takes; or "ray://HOST:PORT", for the client port of a cluster elsewhere.
        resources: What each run gets.

    Raises:
        ConfigurationError: If there is none of that name, Ray is not installed, or it is not "local" under a
            launcher.
    """
    if launch() is not None:
        from crisp_attention.experiment.execution.distributed import LaunchedExecutor

        if on != "local":
            raise ConfigurationError(
                f"--on {on} has runs done elsewhere, but a launcher has started processes here to train each run "
                "together. Leave out one of the two."
            )
        return LaunchedExecutor(resources)
    if on == "local":
        from crisp_attention.experiment.execution.local import LocalExecutor

        return LocalExecutor(resources)
    if on != "ray" and not on.startswith(_REMOTE):
        raise ConfigurationError(f"Unknown executor --on {on!r}. {nearest(on, ('local', 'ray', 'ray://HOST:PORT'))}")
    if importlib.util.find_spec("ray") is None:
        raise ConfigurationError(f"--on {on} needs the package ray: pip install 'crisp-attention[ray]'.")
    from crisp_attention.experiment.execution.ray_cluster import RayExecutor

    return RayExecutor(on if on.startswith(_REMOTE) else None, resources)
