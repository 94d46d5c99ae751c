"""What finished runs say beside accuracy: probabilities, calibration, examples on which two arms disagree. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from crisp_attention.experiment import statistics
from crisp_attention.experiment.record import LengthBin, Record, Score
from crisp_attention.experiment.spec import ArmSpec
from crisp_attention.experiment.statistics import Array, Interval, ReliabilityBin
from crisp_attention.experiment.store import Store

OUTCOMES = {
    "nll": "nats",
    "brier": "squared distance, 0 to 2",
    "ece": "share",
    "ece_scaled": "share",
    "gap": "points",
    "seconds": "seconds",
}
"""Secondary outcomes and their units."""

MOST_FLIPS = 40
_HALVING = 20250806


@dataclass(frozen=True, eq=False)
class Outputs:
    """One run on the evaluation split, by example.

    Attributes:
        labels: Int `[N]`.
        correct: Bool `[N]`.
        probability: Of the true class, `[N]`.
        nll, brier: `[N]`.
        confidence, confidence_scaled: Of the predicted class, before and after temperature scaling, `[N]`.
        further: Whether each example of a further evaluation was classified correctly, by its name.
    """

    labels: Array
    correct: Array
    probability: Array
    nll: Array
    brier: Array
    confidence: Array
    confidence_scaled: Array
    further: Mapping[str, Array]


@dataclass(frozen=True)
class ArmResult:
    """What is known of one arm in one condition.

    Attributes:
        spec: The arm.
        condition: Name of the condition; "" where nothing varies.
        planned: Runs asked for.
        records: Finished runs by seed index.
        troubled: Diverged and failed runs by seed index.
        outputs: What the finished runs answered, by seed index.
    """

    spec: ArmSpec
    condition: str
    planned: int
    records: Mapping[int, Record]
    troubled: Mapping[int, Record]
    outputs: Mapping[int, Outputs] = dataclasses.field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """The arm's name."""
        return self.spec.name

    @property
    def missing(self) -> int:
        """Runs neither finished nor in trouble: not done yet."""
        return self.planned - len(self.records) - len(self.troubled)

    @property
    def indexes(self) -> list[int]:
        """Seed indexes of the finished runs; arrays by seed stand in this order."""
        return sorted(self.records)

    @property
    def test(self) -> list[Score]:
        """Scores on the evaluation split at the last epoch, by seed."""
        return [self.records[index].final.test for index in self.indexes]

    @property
    def train(self) -> list[Score]:
        """Scores on the training probe at the last epoch, by seed."""
        return [self.records[index].final.train for index in self.indexes]

    @property
    def accuracies(self) -> Array:
        """Test accuracy by seed, points, `[S]`."""
        return np.array([100 * score.accuracy for score in self.test])

    @property
    def train_accuracies(self) -> Array:
        """Accuracy on the training probe by seed, points, `[S]`."""
        return np.array([100 * score.accuracy for score in self.train])

    @property
    def gaps(self) -> Array:
        """Train minus test accuracy by seed, points, `[S]`."""
        return self.train_accuracies - self.accuracies

    @cached_property
    def nll(self) -> Array:
        """Mean negative log-likelihood on the evaluation split by seed, nats, `[S]`."""
        return np.array([self.outputs[index].nll.mean() for index in self.indexes])

    @cached_property
    def brier(self) -> Array:
        """Mean Brier score by seed, 0 to 2, `[S]`."""
        return np.array([self.outputs[index].brier.mean() for index in self.indexes])

    @cached_property
    def ece(self) -> Array:
        """Expected calibration error by seed, a share, `[S]`."""
        return np.array([_calibration_error(self.outputs[index], scaled=False) for index in self.indexes])

    @cached_property
    def ece_scaled(self) -> Array:
        """The same after temperature scaling by cross-fitting, `[S]`."""
        return np.array([_calibration_error(self.outputs[index], scaled=True) for index in self.indexes])

    @property
    def seconds(self) -> Array:
        """Time in training steps by seed, seconds, `[S]`."""
        return np.array([self.records[index].timing.train_seconds for index in self.indexes])

    @cached_property
    def reliability(self) -> tuple[ReliabilityBin, ...]:
        """Accuracy by confidence, over the predictions of all seeds together."""
        if not self.outputs:
            return ()
        outputs = [self.outputs[index] for index in self.indexes]
        return statistics.reliability(
            np.concatenate([item.confidence for item in outputs]), np.concatenate([item.correct for item in outputs])
        )

    @property
    def lengths(self) -> tuple[LengthBin, ...]:
        """Realised sparsity by length, mean over seeds; empty where records do not tell."""
        by_run = [record.realised_by_length for record in self.records.values() if record.realised_by_length]
        # Runs of one arm see the same examples; bins that differ could not be averaged.
        return tuple(
            bins[0].model_copy(update={"realised": float(np.mean([item.realised for item in bins]))})
            for bins in zip(*by_run, strict=True)
        )

    @property
    def entropy(self) -> dict[str, float]:
        """Mean attention entropy by layer over seeds, nats; empty where records do not tell."""
        by_run = [record.entropy for record in self.records.values() if record.entropy]
        return {layer: float(np.mean([run[layer] for run in by_run])) for layer in (by_run[0] if by_run else ())}

    def realised(self, mode: str) -> float | None:
        """Mean realised sparsity over seeds and layers; mode "train" or "test". None if nothing finished."""
        shares = [
            share for record in self.records.values() for share in getattr(record.realised_sparsity, mode).values()
        ]
        return float(np.mean(shares)) if shares else None

    def outcome(self, name: str) -> Array:
        """A secondary outcome by seed, `[S]`.

        Args:
            name: One of `OUTCOMES`.
        """
        values: Array = self.gaps if name == "gap" else getattr(self, name)
        return values


@dataclass(frozen=True)
class OutcomeContrast:
    """A secondary outcome of two arms over paired seeds.

    Attributes:
        arm, baseline: Names.
        outcome: One of `OUTCOMES`.
        unit: Of all values.
        seeds: Pairs compared, S.
        examples: Evaluation examples, N.
        mean_arm, mean_baseline: Over these seeds.
        differences: Arm minus baseline by seed, `S` values. In every outcome, less is better.
        difference: Their mean.
        interval: Student's t over seeds; None for one seed.
        crossed: Crossed bootstrap over seeds and examples, for what has a value by example (nll, brier); else None.
        p_value: Two-sided sign-flip permutation test.
        p_holm: Adjusted over all secondary outcomes of all arms.
        alpha: The intervals hold 1 - alpha.
    """

    arm: str
    baseline: str
    outcome: str
    unit: str
    seeds: int
    examples: int
    mean_arm: float
    mean_baseline: float
    differences: tuple[float, ...]
    difference: float
    interval: Interval | None
    crossed: Interval | None
    p_value: float
    p_holm: float
    alpha: float


@dataclass(frozen=True)
class Flip:
    """An example of the evaluation split on which two arms disagree in most seeds.

    Attributes:
        row: Its place in the evaluation split.
        label: Its class.
        disagreement: Share of seeds in which exactly one of the two is right.
        arm_right, baseline_right: Share of seeds in which each is right.
        arm_probability, baseline_probability: Mean probability of the true class.
    """

    row: int
    label: str
    disagreement: float
    arm_right: float
    baseline_right: float
    arm_probability: float
    baseline_probability: float


def read_outputs(store: Store, records: Iterable[Record], evaluations: Iterable[str]) -> dict[str, Outputs]:
    """Read the per-example outputs of finished runs, each file once.

    Args:
        store: Where they are.
        records: Of finished runs.
        evaluations: Names of further evaluations; a run of an older version may lack them.

    Returns:
        By run id.

    Raises:
        RecordError: If a file is missing or damaged.
    """
    names = list(evaluations)
    found: dict[str, Outputs] = {}
    for record in records:
        if record.run_id in found:
            continue
        arrays = store.load_arrays(record)
        logits, labels = arrays["test_logits"], arrays["test_labels"]
        # The same halves for every run: a difference in calibration is never one in who was judged by what.
        random = np.random.default_rng([_HALVING, len(labels)])
        scaled = statistics.rescaled(logits[None], labels, random)[0]
        loss = statistics.nll(logits, labels)
        found[record.run_id] = Outputs(
            labels=labels,
            correct=_correct(logits, labels),
            probability=np.exp(-loss).astype(np.float32),
            nll=loss,
            brier=statistics.brier(logits, labels),
            confidence=statistics.confidence(logits).astype(np.float32),
            confidence_scaled=statistics.confidence(scaled).astype(np.float32),
            further={
                name: _correct(arrays[f"{name}_logits"], arrays[f"{name}_labels"])
                for name in names
                if f"{name}_logits" in arrays
            },
        )
    return found


def shared(arm: ArmResult, baseline: ArmResult, seeds: int) -> list[int]:
    """Indexes of the first `seeds` seeds that both arms have finished."""
    return [index for index in arm.indexes if index in baseline.records and index < seeds]


def outcome_contrasts(
    arms: Iterable[ArmResult], baseline: ArmResult, seeds: int, alpha: float, random_seed: int
) -> tuple[OutcomeContrast, ...]:
    """Compare every arm with the baseline in every secondary outcome.

    Args:
        arms: All but the baseline.
        baseline: What they are compared with.
        seeds: How many seeds count, from the first.
        alpha: The intervals hold 1 - alpha.
        random_seed: Of the generators, one for each number of pairs.
    """
    by_shape: dict[tuple[int, int], list[tuple[ArmResult, list[int]]]] = {}
    for arm in arms:
        if pairs := shared(arm, baseline, seeds):
            by_shape.setdefault((len(pairs), len(arm.outputs[pairs[0]].labels)), []).append((arm, pairs))
    found: list[OutcomeContrast] = []
    for shape, members in by_shape.items():
        random = np.random.default_rng([random_seed, *shape])
        crossed = iter(
            statistics.crossed_bootstrap(
                [_by_example(arm, baseline, pairs, name) for arm, pairs in members for name in ("nll", "brier")],
                random,
                alpha,
            )
        )
        for arm, pairs in members:
            found += [
                _outcome_contrast(
                    arm, baseline, pairs, name, next(crossed) if name in ("nll", "brier") else None, alpha, random_seed
                )
                for name in OUTCOMES
            ]
    adjusted = statistics.holm(np.array([item.p_value for item in found]))
    return tuple(dataclasses.replace(item, p_holm=float(p)) for item, p in zip(found, adjusted, strict=True))


def flips(arm: ArmResult, baseline: ArmResult, seeds: int) -> tuple[Flip, ...]:
    """The examples on which two arms disagree in most seeds, the most disputed first; at most 40.

    Args:
        arm: One arm.
        baseline: The other.
        seeds: How many seeds count, from the first.
    """
    pairs = shared(arm, baseline, seeds)
    if not pairs:
        return ()

    def stacked(side: ArmResult, name: str) -> Array:
        return np.stack([getattr(side.outputs[index], name) for index in pairs])

    arm_right, baseline_right = stacked(arm, "correct"), stacked(baseline, "correct")
    disagreement = (arm_right != baseline_right).mean(axis=0)
    certainty = np.stack([stacked(side, "probability").mean(axis=0) for side in (arm, baseline)])
    rows = np.flatnonzero(disagreement > 0.5)
    # Of equally disputed ones those first on which the arms are furthest apart.
    order = np.lexsort((rows, -np.abs(certainty[0] - certainty[1])[rows], -disagreement[rows]))
    classes = arm.records[pairs[0]].classes
    labels = arm.outputs[pairs[0]].labels
    return tuple(
        Flip(
            row=int(row),
            label=classes[labels[row]],
            disagreement=float(disagreement[row]),
            arm_right=float(arm_right[:, row].mean()),
            baseline_right=float(baseline_right[:, row].mean()),
            arm_probability=float(certainty[0, row]),
            baseline_probability=float(certainty[1, row]),
        )
        for row in rows[order][:MOST_FLIPS]
    )


def _correct(logits: Array, labels: Array) -> Array:
    return np.asarray(logits.argmax(axis=1) == labels)


def _calibration_error(outputs: Outputs, *, scaled: bool) -> float:
    confidences = outputs.confidence_scaled if scaled else outputs.confidence
    return statistics.calibration_error(confidences.astype(np.float64), outputs.correct)


def _by_example(arm: ArmResult, baseline: ArmResult, pairs: list[int], name: str) -> Array:
    sides = [np.stack([getattr(side.outputs[index], name) for index in pairs]) for side in (arm, baseline)]
    return np.asarray(sides[0] - sides[1])


def _outcome_contrast(
    arm: ArmResult,
    baseline: ArmResult,
    pairs: list[int],
    name: str,
    crossed: Interval | None,
    alpha: float,
    random_seed: int,
) -> OutcomeContrast:
    values = [side.outcome(name)[[side.indexes.index(index) for index in pairs]] for side in (arm, baseline)]
    differences = values[0] - values[1]
    random = np.random.default_rng([random_seed, len(pairs)])
    return OutcomeContrast(
        arm=arm.name,
        baseline=baseline.name,
        outcome=name,
        unit=OUTCOMES[name],
        seeds=len(pairs),
        examples=len(arm.outputs[pairs[0]].labels),
        mean_arm=float(values[0].mean()),
        mean_baseline=float(values[1].mean()),
        differences=tuple(differences.tolist()),
        difference=float(differences.mean()),
        interval=statistics.t_interval(differences, alpha) if len(pairs) > 1 else None,
        crossed=crossed,
        p_value=float(statistics.sign_flip_p(differences[None], random)[0]),
        p_holm=1.0,
        alpha=alpha,
    )
