"""`Tuning`: what was tried and found for each arm before its seeds ran. Readable without torch and without Optuna."""

from __future__ import annotations

import math
import statistics

from pydantic import BaseModel, ConfigDict, Field

from crisp_attention.experiment.specification.spec import ExperimentSpec
from crisp_attention.experiment.specification.tune import Value, told
from crisp_attention.experiment.specification.tuned import Search, searches

SCHEMA = 2
"""Version of the format; 1 has no losses by seed."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)


class Trial(_Part):
    """Settings that were tried, in one training or one a seed.

    Attributes:
        values: By setting.
        loss: Mean cross-entropy on the validation part after the last epoch that it was trained for, nats; of several
            seeds the mean. None if it diverged.
        by_seed: What that is the mean of; empty where trials have one seed, and if it was given up or diverged.
        run_id: Of its first training's record among those of the trials.
        pruned: Epochs after which it was given up; None if it was trained to its end or diverged.
    """

    values: dict[str, Value]
    loss: float | None
    by_seed: tuple[float, ...] = ()
    run_id: str
    pruned: int | None = None

    @property
    def whole(self) -> bool:
        """Whether it was trained to its end."""
        return self.loss is not None and self.pruned is None


class Outcome(_Part):
    """What one search came to.

    Attributes:
        arms: For which arms.
        trials: All of them, in order.
    """

    arms: tuple[str, ...]
    trials: tuple[Trial, ...] = Field(min_length=1)

    @property
    def best(self) -> Trial:
        """The trial of the lowest loss; the first of several."""
        return min((trial for trial in self.trials if trial.whole), key=lambda trial: trial.loss or 0.0)

    @property
    def losses(self) -> list[float]:
        """Of the trials that were trained to their end, the lowest first."""
        return sorted(trial.loss for trial in self.trials if trial.loss is not None and trial.whole)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the losses of a trial's seeds, pooled over the trials that have several; or None."""
        variances = [statistics.variance(trial.by_seed) for trial in self.trials if trial.by_seed]
        return math.sqrt(statistics.fmean(variances)) if variances else None

    @property
    def pruned(self) -> int:
        """Trials that were given up."""
        return sum(trial.pruned is not None for trial in self.trials)

    @property
    def diverged(self) -> int:
        """Trials without a loss."""
        return sum(trial.loss is None for trial in self.trials)


class Tuning(_Part):
    """What all searches came to.

    Attributes:
        schema_version: `SCHEMA` at the time of writing.
        outcomes: One a search.
        train_examples, validation_examples: Sizes of the two parts of the training split.
        optuna: Version of Optuna, which proposed what was tried.
    """

    schema_version: int = Field(SCHEMA, alias="schema")
    outcomes: tuple[Outcome, ...]
    train_examples: int
    validation_examples: int
    optuna: str

    @property
    def values(self) -> dict[str, dict[str, Value]]:
        """What was found, by arm."""
        return {arm: outcome.best.values for outcome in self.outcomes for arm in outcome.arms}

    @property
    def trials(self) -> int:
        """Trials of each search."""
        return len(self.outcomes[0].trials)

    def fault(self, spec: ExperimentSpec) -> str | None:
        """Why this cannot be what was found for an experiment; None if it can."""
        if not 1 <= self.schema_version <= SCHEMA:
            return f"it has schema {self.schema_version}, this version reads 1 to {SCHEMA}"
        if [outcome.arms for outcome in self.outcomes] != [search.arms for search in searches(spec)]:
            return "its arms are not those of the experiment"
        if len({len(outcome.trials) for outcome in self.outcomes}) > 1:
            return "its arms had different numbers of trials"
        seeds = 1 if spec.tune is None else spec.tune.seeds_per_trial
        faults = (_fault(*pair, seeds) for pair in zip(self.outcomes, searches(spec), strict=True))
        return next((fault for fault in faults if fault is not None), None)


def _fault(outcome: Outcome, search: Search, seeds: int) -> str | None:
    if not outcome.losses:
        return f"no trial of {search.arm} was trained to its end"
    for trial in outcome.trials:
        if trial.values.keys() != search.ranges.keys():
            return f"a trial of {search.arm} tried {', '.join(trial.values)}, not {', '.join(search.ranges)}"
        for name, value in trial.values.items():
            if not search.ranges[name].holds(value):
                return f"a trial of {search.arm} tried {name} = {told(value)}, outside of {search.ranges[name]}"
        if len(trial.by_seed) != (seeds if trial.whole and seeds > 1 else 0):
            return f"a trial of {search.arm} has losses of {len(trial.by_seed)} seeds, {seeds} were asked for"
        if trial.by_seed and trial.loss != statistics.fmean(trial.by_seed):
            return f"the loss of a trial of {search.arm} is not the mean of those of its seeds"
    return None
