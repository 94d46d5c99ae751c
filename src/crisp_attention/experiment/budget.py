"""A budget of time -> how many trials and seeds: fixed before anything is searched. Pure, no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from crisp_attention.errors import ConfigurationError
from crisp_attention.experiment.outlook import makespan
from crisp_attention.experiment.specification.spec import USUAL_SEEDS
from crisp_attention.experiment.specification.tune import USUAL_TRIALS
from crisp_attention.experiment.statistics import MIN_SEEDS

LEAST_TRIALS, MOST_TRIALS = 10, 100
_START_SECONDS = 15.0
"""What it takes to start workers, once for the search and once for the runs."""

_UNITS = {"h": 3600.0, "m": 60.0, "min": 60.0, "s": 1.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(h|min|m|s)\s*")


def seconds_of(text: str) -> float:
    """A duration as "2h", "1h30m", "90s" in seconds.

    Raises:
        ConfigurationError: If it is none, or 0.
    """
    parts = _DURATION.findall(text.strip().lower())
    whole = "".join(_DURATION.split(text.strip().lower())[::3])
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if whole or not seconds:
        raise ConfigurationError(f"--budget must be a duration such as 2h, 1h30m, 30m or 90s, got {text!r}.")
    return seconds


def in_words(seconds: float) -> str:
    """A duration as `seconds_of` reads it, rounded up to minutes from ten minutes on."""
    if seconds < 600:
        return f"{-(-seconds // 1):.0f}s"
    hours, minutes = divmod(-(-seconds // 60), 60)
    return f"{hours:.0f}h{minutes:02.0f}m" if hours else f"{minutes:.0f}m"


@dataclass(frozen=True)
class Cost:
    """What trials and runs take.

    Attributes:
        trial: Seconds of one trial of each search.
        run: Seconds of one run of each arm.
        searching: Workers of the search; each arm's trials follow each other.
        running: Workers of the runs.
    """

    trial: tuple[float, ...]
    run: tuple[float, ...]
    searching: int
    running: int

    def search(self, trials: int) -> float:
        """Seconds of the search."""
        return _START_SECONDS + makespan((trials * seconds for seconds in self.trial), self.searching)

    def confirmation(self, seeds: int) -> float:
        """Seconds of the runs."""
        return _START_SECONDS + makespan(self.run * seeds, self.running)


@dataclass(frozen=True)
class Share:
    """How a budget is spent.

    Attributes:
        trials: Of each arm.
        seeds: Of each arm.
    """

    trials: int
    seeds: int


def usual(trials: int | None, seeds: int | None) -> Share:
    """What is done where no budget is given: what was asked for, or the usual."""
    return Share(trials or USUAL_TRIALS, seeds or USUAL_SEEDS)


def share(budget: float, cost: Cost, trials: int | None = None, seeds: int | None = None) -> Share:
    """As many trials and seeds as fit: at most half of the time for the seeds, what is left for trials.

    Args:
        budget: Seconds.
        cost: What they take.
        trials: How many there are to be, if that is given.
        seeds: Likewise.

    Raises:
        ConfigurationError: If the budget does not suffice for what is given, or else for the least that makes sense.
    """
    fewest = Share(trials or LEAST_TRIALS, seeds or MIN_SEEDS)
    needed = cost.search(fewest.trials) + cost.confirmation(fewest.seeds)
    if needed > budget:
        raise ConfigurationError(
            f"A budget of {in_words(budget)} is too small: {fewest.trials} trials and then {fewest.seeds} seeds of "
            f"each arm take about {in_words(needed)} on this machine. Give --budget {in_words(needed)}, fewer "
            "--epochs, fewer --train-examples, or a smaller --model."
        )

    def most(fits: range, seconds: float, takes: str) -> int:
        return max((number for number in fits if getattr(cost, takes)(number) <= seconds), default=fits[0])

    for_seeds = budget / 2 if trials is None else budget - cost.search(trials)
    own_seeds = seeds or most(range(MIN_SEEDS, USUAL_SEEDS + 1), for_seeds, "confirmation")
    rest = budget - cost.confirmation(own_seeds)
    return Share(trials or most(range(LEAST_TRIALS, MOST_TRIALS + 1), rest, "search"), own_seeds)
