"""Which arms share a search, and an experiment with what was found for its arms. Imports neither torch nor Optuna."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from crisp_attention.experiment.specification.runs import Fingerprints, PlannedRun, configure
from crisp_attention.experiment.specification.sections import ArmSpec, ArmTrainingSpec
from crisp_attention.experiment.specification.spec import ExperimentSpec
from crisp_attention.experiment.specification.tune import Space, Value, fixed, with_values

Values = Mapping[str, Value]
"""What a search tried or found, by setting."""


@dataclass(frozen=True)
class Search:
    """One search for settings.

    Attributes:
        arms: For which arms: all that are trained alike, so that an A/A arm or one that is dense in evaluation only
            differs from its twin in nothing else. Trials are evaluated as the first of them is.
        ranges: What is searched, by setting.
    """

    arms: tuple[str, ...]
    ranges: Mapping[str, Space]

    @property
    def arm(self) -> str:
        """The arm that trials train and evaluate."""
        return self.arms[0]

    def trial(self, spec: ExperimentSpec, values: Values, number: int, prints: Fingerprints) -> tuple[PlannedRun, ...]:
        """The trainings of one trial, as runs on data without the evaluation split; one a seed.

        Args:
            spec: The experiment as it was asked for.
            values: What is tried.
            number: From 0.
            prints: Of the model, and of the carved data as the only condition.
        """
        assert spec.tune is not None
        # In the only condition there is.
        training = spec.training.model_copy(update={"epochs": spec.epochs_of_trials})
        tried = apply(spec, {self.arm: values}).model_copy(update={"training": training, "vary": None})
        return tuple(
            PlannedRun(self.arm, number, configure(tried, tried.arm(self.arm), prints, "", seed))
            for seed in spec.tune.seeds
        )


def searches(spec: ExperimentSpec) -> tuple[Search, ...]:
    """All searches of an experiment, in the order of their first arms; none for arms with nothing to search."""
    found: dict[str, tuple[dict[str, Space], list[str]]] = {}
    for arm in spec.arms:
        if ranges := spec.searched(arm):
            found.setdefault(_training(spec, arm), (ranges, []))[1].append(arm.name)
    return tuple(Search(tuple(arms), ranges) for ranges, arms in found.values())


def apply(spec: ExperimentSpec, found: Mapping[str, Values]) -> ExperimentSpec:
    """The experiment with what was found.

    Not validated as one that a user writes: two arms may have found the same.

    Args:
        spec: As it was asked for.
        found: Values by arm; arms that are not named stay as they are.
    """
    return spec.model_copy(update={"arms": tuple(_with(arm, found.get(arm.name, {})) for arm in spec.arms)})


def probes(spec: ExperimentSpec) -> tuple[ExperimentSpec, ...]:
    """The experiment with the ends of each range, and with each choice in turn, to see whether arms take them."""
    own = searches(spec)
    most = max((len(space.samples) for search in own for space in search.ranges.values()), default=0)
    if not most:
        return (spec,)
    return tuple(
        apply(
            spec,
            {
                arm: {name: space.samples[min(turn, len(space.samples) - 1)] for name, space in search.ranges.items()}
                for search in own
                for arm in search.arms
            },
        )
        for turn in range(most)
    )


def _with(arm: ArmSpec, values: Values) -> ArmSpec:
    training = {name: value for name, value in values.items() if name in ArmTrainingSpec.model_fields}
    return arm.model_copy(
        update={
            "training": arm.training.model_copy(update=training),
            "attention": with_values(arm.attention, values),
        },
    )


def _training(spec: ExperimentSpec, arm: ArmSpec) -> str:
    """How an arm is trained, whatever its seeds and its evaluation."""
    searched = spec.searched(arm)
    sparse = arm.attention.active(training=True)
    attention = fixed(arm.attention, searched).replace(apply="always") if sparse else None
    return repr((attention, spec.training_of(arm), arm.padding or spec.data.padding, list(searched)))
