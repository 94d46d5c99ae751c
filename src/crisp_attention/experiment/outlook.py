"""How long the rest of a plan's runs will take. Pure: whoever asks says what time it is."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Iterable, Mapping


def makespan(seconds: Iterable[float], jobs: int) -> float:
    """Seconds until all is done, workers taking what is next as they become free; 0 for nothing.

    Args:
        seconds: What each takes, in order.
        jobs: Workers.
    """
    free = [0.0] * jobs
    for item in seconds:
        heapq.heapreplace(free, free[0] + item)
    return max(free)


class Outlook:
    """The time left, from what each run was expected to take and what has gone by.

    Expectations are multiplied by the pace so far: seconds gone by, over those that were expected for what is done.
    To both is added what one run takes, so that the first seconds, which say little, change little.

    Args:
        expected: Seconds that each run was expected to take, by run id; None where nobody knows. If no duration
            is known, all runs count alike, and nothing is said until one is done.
        jobs: Runs side by side.
    """

    def __init__(self, expected: Mapping[str, float | None], jobs: int) -> None:
        known = [seconds for seconds in expected.values() if seconds is not None]
        # An arm that could not be timed is taken to be as slow as the slowest.
        self._expected = {
            run: max(known, default=1.0) if seconds is None else seconds for run, seconds in expected.items()
        }
        self._trust = statistics.fmean(known) if known else 0.0
        self._jobs = jobs
        self._shares: dict[str, float] = {}
        self._begun: float | None = None

    def begin(self, now: float) -> None:
        """A worker is ready: only the first counts. What it took to start is not a pace."""
        self._begun = now if self._begun is None else self._begun

    def advance(self, run: str, share: float) -> None:
        """So much of a run is done, in [0, 1]."""
        self._shares[run] = share

    def end(self, run: str, *, finished: bool) -> None:
        """A run has ended; one that did not finish took no longer than the share that it had done."""
        if not finished:
            self._expected[run] *= self._shares.get(run, 0.0)
        self._shares[run] = 1.0

    def left(self, now: float) -> float | None:
        """Seconds until all runs have ended; None if nobody can tell.

        Args:
            now: On the clock of `begin`.
        """
        done = sum(self._expected[run] * share for run, share in self._shares.items())
        rest = {run: seconds * (1 - self._shares.get(run, 0.0)) for run, seconds in self._expected.items()}
        if not self._trust and done < 1.0:
            return None
        gone = 0.0 if self._begun is None else now - self._begun
        pace = (gone + self._trust) / (done / self._jobs + self._trust)
        # The workers share the runs, but not one run.
        return pace * max(sum(rest.values()) / self._jobs, max(rest.values(), default=0.0))


def duration(seconds: float, most: float | None = None) -> str:
    """A duration in words, or a range of two, to two digits or so."""
    longest = seconds if most is None else most
    unit, size, digits = ("s", 1, 0) if longest < 90 else ("min", 60, 0) if longest < 90 * 60 else ("h", 3600, 1)
    ends = (f"{max(value / size, 10.0**-digits):.{digits}f}" for value in (seconds, longest))
    return f"{'-'.join(dict.fromkeys(ends))} {unit}"
