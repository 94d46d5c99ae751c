"""The processes that train one run together, and what they exchange. Alone, nothing is exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed

from crisp_attention.monitoring import SparsityMonitor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the default process group. Each method but `own` must be called by all of them.

    Attributes:
        rank: Its number; 0 leads.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Those of the process group that is open now; one process without."""
        together = distributed.is_available() and distributed.is_initialized()
        return cls(distributed.get_rank(), distributed.get_world_size()) if together else cls()

    @property
    def leads(self) -> bool:
        """Whether this is the process that decides and writes."""
        return self.rank == 0

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's share of some work: every `size`-th item."""
        return items[self.rank :: self.size]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, element by element, the same bits on each of them; of any shape, on the device it is on."""
        if self.size == 1:
            return values
        total = values.clone()
        distributed.all_reduce(total)
        return total

    def agree(self, wanted: bool) -> bool:
        """What the leader wants; cheap enough to be asked each step."""
        if self.size == 1:
            return wanted
        flag = torch.tensor([wanted], dtype=torch.uint8)
        distributed.broadcast(flag, 0)
        return bool(flag.item())

    def broadcast(self, item: T) -> T:
        """The leader's item."""
        if self.size == 1:
            return item
        items = [item]
        distributed.broadcast_object_list(items, 0)
        return items[0]

    def gather(self, item: T) -> list[T]:
        """The items of all ranks, in their order."""
        if self.size == 1:
            return [item]
        items: list[T] = [item] * self.size
        distributed.all_gather_object(items, item)
        return items

    def pooled(self, monitor: SparsityMonitor) -> SparsityMonitor:
        """A monitor that counted what those of all ranks did."""
        if self.size == 1:
            return monitor
        whole = SparsityMonitor()
        # From the CPU: what was on one's own GPU would come out on that of the same number, or fail to.
        counted = {
            name: {key: value.cpu() for key, value in sums.items()} for name, sums in monitor.state_dict().items()
        }
        for state in self.gather(counted):
            whole.add(state)
        return whole
