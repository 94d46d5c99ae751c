"""Experiment -> runs: one arm in one condition at one seed, content-addressed. Imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from crisp_attention.config import SparsityConfig
from crisp_attention.experiment.specification.sections import ArmSpec
from crisp_attention.experiment.specification.spec import ExperimentSpec


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result; content-addressed by `run_id`.

    Attributes:
        model: Fingerprint of weights, configuration and tokenizer.
        data: Fingerprint of both splits, in order.
        max_length: Tokens after which a text is cut.
        padding: "longest" or "max_length".
        training: `TrainingSpec.identity`, the arm's own settings included.
        attention: `SparsityConfig.identity`, in training and, unless `evaluation` says otherwise, in evaluation.
        seed: Of initial weights, data order and dropout.
        evaluation: `SparsityConfig.identity` in evaluation where it is another; None where it is not.
        evaluations: Fingerprints of the data of further evaluations, by name.
    """

    model: str
    data: str
    max_length: int
    padding: str
    training: dict[str, Any]
    attention: dict[str, Any]
    seed: int
    evaluation: dict[str, Any] | None = None
    evaluations: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def run_id(self) -> str:
        """Hash of the canonical content, 16 hexadecimal digits."""
        content = dataclasses.asdict(self)
        # Not there in the first release, whose runs keep their names.
        content = {key: value for key, value in content.items() if key not in ("evaluation", "evaluations") or value}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def rule(self) -> str:
        """Which scores survive in training; "dense" where all do."""
        attention = SparsityConfig.from_dict(self.attention)
        return attention.rule if attention.removes else "dense"


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One arm in one condition at one seed.

    Attributes:
        arm: Its arm's name.
        index: Which of the arm's seeds, from 0; runs of equal index and condition are paired across arms.
        config: What is run.
        condition: Name of the data's condition, see `ExperimentSpec.conditions`; "" where nothing varies.
    """

    arm: str
    index: int
    config: RunConfig
    condition: str = ""

    @property
    def label(self) -> str:
        """What a run is called on screens and in trackers."""
        condition = f", {self.condition}" if self.condition else ""
        return f"{self.arm}{condition}, seed {self.config.seed}"


@dataclasses.dataclass(frozen=True)
class Fingerprints:
    """What an experiment is done on, by content.

    Attributes:
        model: Of weights, configuration and tokenizer.
        data: Of both splits, by condition.
        evaluations: Of the data of further evaluations, by name.
    """

    model: str
    data: Mapping[str, str]
    evaluations: Mapping[str, str] = dataclasses.field(default_factory=dict)


def expand(spec: ExperimentSpec, prints: Fingerprints) -> Iterator[PlannedRun]:
    """All runs of an experiment, seed by seed, so that an interrupted one has complete pairs.

    Args:
        spec: The experiment.
        prints: Of its model and data.
    """
    for index in range(spec.seeds):
        for condition in spec.conditions():
            for arm in spec.arms:
                config = configure(spec, arm, prints, condition, index + arm.seed_offset)
                yield PlannedRun(arm.name, index, config, condition)


def configure(spec: ExperimentSpec, arm: ArmSpec, prints: Fingerprints, condition: str, seed: int) -> RunConfig:
    """What decides the result of one arm in one condition at one seed."""
    return RunConfig(
        model=prints.model,
        data=prints.data[condition],
        max_length=spec.data.max_length,
        padding=arm.padding or spec.data.padding,
        training=spec.training_of(arm).model_copy(update={"epochs": spec.epochs_in(condition)}).identity(),
        attention=arm.attention.identity(),
        seed=seed,
        evaluation=None if arm.evaluate is None else arm.evaluate.identity(),
        evaluations=dict(prints.evaluations),
    )
