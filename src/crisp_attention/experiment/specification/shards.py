"""A part of an experiment's runs, for schedulers that start the same command many times. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from crisp_attention.errors import ConfigurationError
from crisp_attention.experiment.specification.runs import PlannedRun


@dataclass(frozen=True)
class Shard:
    """One of several parts that share no run and leave none out.

    Attributes:
        number: Which, from 1.
        of: How many there are.
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read "3/20".

        Raises:
            ConfigurationError: If it is no such thing.
        """
        found = re.fullmatch(r"([0-9]+)/(0*[1-9][0-9]*)", text)
        if found is None:
            raise ConfigurationError(f"--shard takes a number and how many there are, as 3/20; got {text!r}.")
        number, of = map(int, found.groups())
        if not 1 <= number <= of:
            raise ConfigurationError(f"--shard {text}: of {of} shards the number must be between 1 and {of}.")
        return cls(number, of)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def own(self, runs: Iterable[PlannedRun], row: int) -> frozenset[str]:
        """The ids of its runs.

        Runs are dealt out in their order, which goes seed by seed, so that more seeds move none to another shard. Each
        time that the deal would begin again with the same arm for the same shard, it is shifted by one: every shard
        gets each arm as often, up to one, as the seeds allow.

        Args:
            runs: All runs of an experiment, as `expand` yields them.
            row: How many of them a seed has: arms x conditions.
        """
        round_ = math.lcm(row, self.of)
        dealt: dict[str, int] = {}
        for place, run in enumerate(runs):
            dealt.setdefault(run.config.run_id, (place + place // round_) % self.of)
        return frozenset(run_id for run_id, shard in dealt.items() if shard == self.number - 1)
