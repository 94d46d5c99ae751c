"""Pending runs -> tasks on a Ray cluster. Imports Ray when it is reached for, and no torch."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import platform
import socket
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import crisp_attention
from crisp_attention.errors import ConfigurationError, CrispError, StorageError
from crisp_attention.experiment.data.dataset import ExperimentData
from crisp_attention.experiment.execution.executor import Division
from crisp_attention.experiment.execution.ray_task import Mailbox, Parcel, train
from crisp_attention.experiment.execution.worker import Event, Task
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.resources import ResourcesSpec
from crisp_attention.experiment.specification.runs import PlannedRun
from crisp_attention.experiment.training.model import Checkpoint, pack

ATTEMPTS = 4
"""How often a run is begun whose worker or node is lost, before it is left for the next time."""

_POLL_SECONDS = 0.5
_ANSWER_SECONDS = 10.0
_GRACE_SECONDS = 10.0
# A lock on a network folder may outlive its holder for so long.
_PATIENCE_SECONDS = 120.0


@dataclass(frozen=True)
class _Attempt:
    number: int
    task: Task
    before: int


class RayExecutor:
    """Tasks on a Ray cluster, one a run.

    What the program has connected to already is used, and left connected.

    Args:
        address: "ray://HOST:PORT" of a cluster's client port; None for the cluster that RAY_ADDRESS names, else one
            that runs on this machine, else one that is started here until `close`.
        resources: What each run gets.
    """

    def __init__(self, address: str | None, resources: ResourcesSpec) -> None:
        self._address = address or os.environ.get("RAY_ADDRESS") or None
        self._cpus, self._gpus = resources.cpus or 1, resources.gpus
        self._connected = False

    def divide(self, jobs: int | None, pending: int, runs: int) -> Division:
        """As many runs side by side as the nodes have place for; connects if something is pending.

        Args:
            jobs: How many were asked for at most, or None.
            pending: Runs to do.
            runs: With those that are done.

        Raises:
            ConfigurationError: If the cluster cannot be reached, or none of its nodes has what a run gets.
        """
        if jobs is not None and jobs < 1:
            raise ConfigurationError(f"--jobs must be at least 1, got {jobs}.")
        if not pending:
            return Division(1, self._cpus)
        self._connect()
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        places = sum(map(self._places, nodes))
        if not places:
            most = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in ("CPU", "GPU")}
            raise ConfigurationError(
                f"A run gets {self._cpus} CPUs and {self._gpus:g} GPUs ([resources]), but no node of the Ray cluster "
                f"has both: the most are {most['CPU']:g} CPUs and {most['GPU']:g} GPUs."
            )
        place = f"on Ray ({len(nodes)} node{'' if len(nodes) == 1 else 's'})"
        return Division(min(jobs or places, pending), self._cpus, place, elastic=jobs is None)

    def execute(
        self,
        queue: deque[Task],
        store: Store,
        checkpoint: Checkpoint,
        data: ExperimentData,
        division: Division,
        on_event: Callable[[PlannedRun | None, Event], None],
    ) -> None:
        """Do the given tasks on the cluster; see `Executor.execute`.

        A run whose worker or node is lost is begun again, from its checkpoint; one that is lost again and again is told
        as "failed", without a record, so that it is pending next time. When this process is killed, its tasks end.
        """
        self._connect()
        import ray
        from ray.exceptions import RayError, RayTaskError

        with _sign(store) as sign:
            folder = store.folder.resolve()
            parcel = ray.put(Parcel(crisp_attention.__version__, folder, sign, checkpoint, data, division.threads))
            files = ray.put(pack(checkpoint))
            mailbox = _mailbox()
            body = ray.remote(train).options(
                num_cpus=self._cpus, num_gpus=self._gpus, max_retries=0, scheduling_strategy="SPREAD"
            )
            flying: dict[Any, _Attempt] = {}
            numbers = itertools.count()

            def submit(task: Task, before: int) -> None:
                number, patience = next(numbers), _PATIENCE_SECONDS if before else 0.0
                reference = body.remote(task, [parcel], [files], mailbox, number, patience)
                flying[reference] = _Attempt(number, task, before)

            try:
                while queue or flying:
                    while queue and (division.elastic or len(flying) < division.jobs):
                        submit(queue.popleft(), 0)
                    ended, _ = ray.wait(list(flying), timeout=_POLL_SECONDS)
                    runs = {attempt.number: attempt.task.run for attempt in flying.values()}
                    for number, event in _mail(mailbox):
                        if number in runs:  # an attempt that was lost may have told something still
                            on_event(None if event.kind == "ready" else runs[number], event)
                    for reference in ended:
                        attempt = flying.pop(reference)
                        run = attempt.task.run
                        try:
                            event = ray.get(reference)
                        except RayTaskError as error:
                            raise _refusal(error) from None
                        except RayError as error:
                            why = f"its worker or node was lost ({type(error).__name__})"
                            if attempt.before + 1 < ATTEMPTS:
                                on_event(run, Event("note", run.config.run_id, reason=f"{why}; it is begun again"))
                                submit(attempt.task, attempt.before + 1)
                            else:
                                reason = f"{why}, {ATTEMPTS} times; out of memory?"
                                on_event(run, Event("failed", run.config.run_id, reason=reason))
                            continue
                        on_event(run, event)
                        if event.kind == "unsaved":
                            # No other run could be kept either.
                            raise StorageError(event.reason)
            finally:
                with contextlib.suppress(RayError, ConnectionError):
                    for reference in flying:
                        ray.cancel(reference, force=True)
                    # Who goes on at once must not find them at work.
                    if flying:
                        ray.wait(list(flying), num_returns=len(flying), timeout=_GRACE_SECONDS)
                    ray.kill(mailbox)

    def close(self) -> None:
        """Leave the cluster, or end it if it was started here."""
        if self._connected:
            import ray

            ray.shutdown()
            self._connected = False

    def _places(self, node: dict[str, float]) -> int:
        places = node.get("CPU", 0.0) // self._cpus
        return int(min(places, (node.get("GPU", 0.0) + 1e-9) // self._gpus) if self._gpus else places)

    def _connect(self) -> None:
        import ray

        if ray.is_initialized():
            return
        if self._address is not None:
            _probe(self._address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # The screen belongs to our own progress display.
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            ray.init(address=self._address, include_dashboard=False, **options)
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            where = f"at {self._address}" if self._address else "on this machine"
            reason = " ".join(str(error).split())
            raise ConfigurationError(f"No Ray cluster could be reached or started {where}: {reason}") from None
        self._connected = True


def _probe(address: str) -> None:
    """Make sure that somebody listens there: Ray itself would wait, for minutes or for ever.

    Raises:
        ConfigurationError: If nobody does, or the address is none.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local"):  # Ray's own words
        return
    if not host or not port.isdecimal():
        raise ConfigurationError(f"The address of a Ray cluster is HOST:PORT, as ray://head:10001; got {address!r}.")
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"No Ray cluster answers at {address} ({error}). `ray start --head` starts one; its client port is 10001."
        ) from None


@contextlib.contextmanager
def _sign(store: Store) -> Iterator[str]:
    """A file among the logs by which nodes know the run directory; yields its name."""
    path = store.folder / "logs" / f"ray-driver-{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    with store.writing():
        path.touch()
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)


def _mailbox() -> Any:
    """The actor that takes what tasks tell, on the node of this process, so that no other node can take it along."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(Mailbox).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()


def _mail(mailbox: Any) -> list[tuple[int, Event]]:
    """What tasks have told; nothing where that was lost, for how runs end is not told there."""
    import ray
    from ray.exceptions import RayError

    try:
        mail: list[tuple[int, Event]] = ray.get(mailbox.empty.remote(), timeout=_ANSWER_SECONDS)
    except RayError:
        return []
    return mail


def _refusal(error: Any) -> CrispError:
    """What to tell a user of a task that could not begin."""
    cause = error.cause
    if isinstance(cause, CrispError):
        return type(cause)(str(cause))
    return CrispError(
        f"A Ray task failed before it could train ({type(cause).__name__}: {cause}). Every node needs the same "
        "crisp-attention and the same versions of what it is built on."
    )
