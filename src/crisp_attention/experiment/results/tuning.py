"""`Tuning`: what was tried and found for each arm before its seeds ran. Readable without torch and without Optuna."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from crisp_attention.experiment.specification.spec import ExperimentSpec
from crisp_attention.experiment.specification.tune import Value, told
from crisp_attention.experiment.specification.tuned import Search, searches

SCHEMA = 1
"""Version of the format."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)


class Trial(_Part):
    """One training with settings that were tried.

    Attributes:
        values: By setting.
        loss: Mean cross-entropy on the validation part after the last epoch that it was trained for, nats; None if it
            diverged.
        run_id: Of its record among those of the trials.
        pruned: Epochs after which it was given up; None if it was trained to its end or diverged.
    """

    values: dict[str, Value]
    loss: float | None
    run_id: str
    pruned: int | None = None


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
        whole = (trial for trial in self.trials if trial.loss is not None and trial.pruned is None)
        return min(whole, key=lambda trial: trial.loss or 0.0)

    @property
    def losses(self) -> list[float]:
        """Of the trials that were trained to their end, the lowest first."""
        return sorted(trial.loss for trial in self.trials if trial.loss is not None and trial.pruned is None)

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
        if self.schema_version != SCHEMA:
            return f"it has schema {self.schema_version}, this version reads {SCHEMA}"
        if [outcome.arms for outcome in self.outcomes] != [search.arms for search in searches(spec)]:
            return "its arms are not those of the experiment"
        if len({len(outcome.trials) for outcome in self.outcomes}) > 1:
            return "its arms had different numbers of trials"
        faults = (_fault(*pair) for pair in zip(self.outcomes, searches(spec), strict=True))
        return next((fault for fault in faults if fault is not None), None)


def _fault(outcome: Outcome, search: Search) -> str | None:
    if not outcome.losses:
        return f"no trial of {search.arm} was trained to its end"
    for trial in outcome.trials:
        if trial.values.keys() != search.ranges.keys():
            return f"a trial of {search.arm} tried {', '.join(trial.values)}, not {', '.join(search.ranges)}"
        for name, value in trial.values.items():
            if not search.ranges[name].holds(value):
                return f"a trial of {search.arm} tried {name} = {told(value)}, outside of {search.ranges[name]}"
    return None
