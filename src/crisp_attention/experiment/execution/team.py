"""Processes that a launcher has started: how they meet, agree, and end together what fails on one of them.

Each thing that they do together has a process group of its own. What they say to each other besides goes over the
launcher's store, which outlives the groups.
"""

from __future__ import annotations

import contextlib
import gc
import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

from crisp_attention.errors import ConfigurationError, CrispError
from crisp_attention.experiment.results.provenance import Launch

T = TypeVar("T")

_JOIN = timedelta(minutes=10)
_COLLECTIVE = timedelta(minutes=10)
"""After so long without the others, a rank takes its run for failed."""
ANSWER = timedelta(minutes=5)
"""After so long, a rank that does not say how a run ended is taken to be gone."""
_FAREWELL = timedelta(seconds=10)


class RankError(CrispError):
    """What all were doing failed on another rank."""


class LostError(BaseException):
    """A rank is gone. No failure of the run, which stays pending."""


@dataclass(frozen=True)
class _End:
    """How something ended on one rank: whether it failed there before it did on others, and why."""

    first: bool = False
    reason: str = ""


class Team:
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

    def say(self, order: Mapping[str, Any] | None) -> None:
        """Tell the others what comes next, in what JSON can hold; None is the end. Of rank 0."""
        self._store.set(f"order/{self._orders}", json.dumps(order))
        self._orders += 1

    def hear(self) -> Any:
        """What rank 0 says next, whenever that is."""
        from torch.distributed import DistStoreError

        key = f"order/{self._orders}"
        self._orders += 1
        while True:
            with contextlib.suppress(DistStoreError):  # nothing yet
                self._store.wait([key], ANSWER)
                return json.loads(self._store.get(key))

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
        self._store.set(f"end/{meeting}/{self.own.rank}", json.dumps(asdict(own)))
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
                self._store.wait([key], ANSWER)
            except RuntimeError:
                raise LostError(rank) from None
            ends.append(_End(**json.loads(self._store.get(key))))
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
