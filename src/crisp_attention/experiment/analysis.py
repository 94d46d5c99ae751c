"""Records of a study -> one tidy `Analysis`: what every table, plot and sentence is made from. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from crisp_attention.experiment import statistics
from crisp_attention.experiment.record import Record, Score
from crisp_attention.experiment.runs import PlannedRun
from crisp_attention.experiment.spec import ArmSpec, ExperimentSpec
from crisp_attention.experiment.statistics import Array, Contrast
from crisp_attention.experiment.store import Store
from crisp_attention.experiment.verdict import Verdict, judge

_BOOTSTRAP_SEED = 20250806
"""Fixed, so that a report rebuilds to the last digit."""


@dataclass(frozen=True)
class ArmResult:
    """What is known of one arm.

    Attributes:
        spec: The arm.
        planned: Runs asked for.
        records: Finished runs by seed index.
        troubled: Diverged and failed runs by seed index.
    """

    spec: ArmSpec
    planned: int
    records: Mapping[int, Record]
    troubled: Mapping[int, Record]

    @property
    def name(self) -> str:
        """The arm's name."""
        return self.spec.name

    @property
    def missing(self) -> int:
        """Runs neither finished nor in trouble: not done yet."""
        return self.planned - len(self.records) - len(self.troubled)

    @property
    def test(self) -> list[Score]:
        """Scores on the evaluation split at the last epoch, by seed."""
        return [self.records[index].final.test for index in sorted(self.records)]

    @property
    def train(self) -> list[Score]:
        """Scores on the training probe at the last epoch, by seed."""
        return [self.records[index].final.train for index in sorted(self.records)]

    @property
    def accuracies(self) -> Array:
        """Test accuracy by seed, points, `[S]`."""
        return np.array([100 * score.accuracy for score in self.test])

    @property
    def gaps(self) -> Array:
        """Train minus test accuracy by seed, points, `[S]`."""
        return np.array([100 * score.accuracy for score in self.train]) - self.accuracies

    def realised(self, mode: str) -> float | None:
        """Mean realised sparsity over seeds and layers; mode "train" or "test". None if nothing finished."""
        shares = [
            share for record in self.records.values() for share in getattr(record.realised_sparsity, mode).values()
        ]
        return float(np.mean(shares)) if shares else None


@dataclass(frozen=True)
class Analysis:
    """Everything a report says.

    Attributes:
        spec: The experiment.
        arms: One entry an arm, in the specification's order.
        primary: The contrast named before the run; None without a finished pair.
        secondary: Every other arm against the baseline, Holm-adjusted.
        verdict: On the primary contrast.
        cautions: What a reader must know beside the verdict.
        seeds_asked: Numbers of seeds asked for, in turn.
    """

    spec: ExperimentSpec
    arms: tuple[ArmResult, ...]
    primary: Contrast | None
    secondary: tuple[Contrast, ...]
    verdict: Verdict
    cautions: tuple[str, ...]
    seeds_asked: tuple[int, ...]

    @property
    def contrasts(self) -> tuple[Contrast, ...]:
        """The primary contrast and the secondary ones."""
        return ((self.primary,) if self.primary else ()) + self.secondary

    @property
    def records(self) -> list[Record]:
        """All finished records."""
        return [record for arm in self.arms for record in arm.records.values()]


def analyse(store: Store) -> Analysis:
    """Analyse a run directory from its records alone.

    Raises:
        RecordError: If the directory or a record in it is damaged.
    """
    spec, runs, seeds_asked = store.study()
    records = store.load_all(runs)
    arms = tuple(_arm_result(arm, runs, records) for arm in spec.arms)
    correct = {arm.name: _correct(arm, store) for arm in arms}
    contrasts: dict[str, Contrast] = {}
    for arm in arms:
        if arm.name != spec.primary.baseline:
            # One generator per contrast, from the arm's name: adding an arm changes no other number.
            random = np.random.default_rng([_BOOTSTRAP_SEED, *arm.name.encode()])
            found = _contrast(arm.name, spec.primary.baseline, correct, random)
            if found is not None:
                contrasts[arm.name] = found
    primary = contrasts.pop(spec.primary.arm, None)
    secondary = list(contrasts.values())
    adjusted = statistics.holm(np.array([item.p_value for item in secondary]))
    return Analysis(
        spec=spec,
        arms=arms,
        primary=primary,
        secondary=tuple(
            dataclasses.replace(item, p_holm=float(p)) for item, p in zip(secondary, adjusted, strict=True)
        ),
        verdict=judge(primary, spec.primary.arm, spec.primary.baseline, spec.seeds),
        cautions=tuple(_cautions(spec, arms, seeds_asked)),
        seeds_asked=tuple(seeds_asked),
    )


def _arm_result(arm: ArmSpec, runs: list[PlannedRun], records: Mapping[str, Record]) -> ArmResult:
    own = {
        run.index: records[run.config.run_id] for run in runs if run.arm == arm.name and run.config.run_id in records
    }
    return ArmResult(
        spec=arm,
        planned=sum(run.arm == arm.name for run in runs),
        records={index: record for index, record in own.items() if record.status == "finished"},
        troubled={index: record for index, record in own.items() if record.status != "finished"},
    )


def _correct(arm: ArmResult, store: Store) -> dict[int, Array]:
    """Whether each evaluation example was classified correctly, bool `[N]` by seed index."""
    found = {}
    for index, record in arm.records.items():
        arrays: dict[str, Any] = store.load_arrays(record)
        found[index] = arrays["test_logits"].argmax(axis=1) == arrays["test_labels"]
    return found


def _contrast(
    arm: str, baseline: str, correct: Mapping[str, dict[int, Array]], random: np.random.Generator
) -> Contrast | None:
    shared = sorted(correct[arm].keys() & correct[baseline].keys())
    if not shared:
        return None
    correct_arm, correct_baseline = (np.stack([correct[name][index] for index in shared]) for name in (arm, baseline))
    return statistics.contrast(arm, baseline, correct_arm, correct_baseline, random)


def _cautions(spec: ExperimentSpec, arms: tuple[ArmResult, ...], seeds_asked: list[int]) -> list[str]:
    cautions = []
    # Growth from below the least number is no look: nothing could have been significant there.
    if len([count for count in seeds_asked if count >= statistics.MIN_SEEDS]) > 1:
        asked = " then ".join(map(str, seeds_asked))
        cautions.append(
            f"The number of seeds was changed ({asked}) after results could be seen; p-values assume it was fixed."
        )
    troubled = sum(len(arm.troubled) for arm in arms)
    if troubled:
        cautions.append(
            f"{troubled} run{'s' if troubled > 1 else ''} diverged or failed; counted here and left out of all means."
        )
    missing = sum(arm.missing for arm in arms)
    if missing:
        cautions.append(f"{missing} of {sum(arm.planned for arm in arms)} runs are not done yet.")
    if not any(_is_placebo(arm.spec, spec) for arm in arms):
        cautions.append(
            "There is no A/A arm (the baseline again with other seeds), which would show how far identical arms differ."
        )
    environments = {
        (str(record.provenance.packages), record.provenance.threads, record.provenance.device)
        for arm in arms
        for record in arm.records.values()
    }
    if len(environments) > 1:
        cautions.append("Runs were done with different package versions, threads or devices; see the provenance.")
    return cautions


def _is_placebo(arm: ArmSpec, spec: ExperimentSpec) -> bool:
    """Whether an arm is the baseline again with none of its seeds."""
    baseline = spec.arm(spec.primary.baseline)
    same = arm.attention == baseline.attention and arm.padding == baseline.padding
    return same and abs(arm.seed_offset - baseline.seed_offset) >= spec.seeds
