"""What finished runs answered, by example, and what is known of an arm from it. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from crisp_attention.experiment import statistics
from crisp_attention.experiment.results.record import LengthBin, Record, Score
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.sections import ArmSpec
from crisp_attention.experiment.statistics import Array, ReliabilityBin

_HALVING = 20250806
_BATCH = 50


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

    @property
    def balanced_accuracy(self) -> float:
        """Mean accuracy over the classes, a share: the same for every answer that ignores its input."""
        return float(np.mean([self.correct[self.labels == label].mean() for label in np.unique(self.labels)]))


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
    loaded: dict[str, tuple[Array, Array, dict[str, Array]]] = {}
    for record in records:
        if record.run_id not in loaded:
            arrays = store.load_arrays(record)
            further = {
                name: _correct(arrays[f"{name}_logits"], arrays[f"{name}_labels"])
                for name in names
                if f"{name}_logits" in arrays
            }
            loaded[record.run_id] = arrays["test_logits"], arrays["test_labels"], further
    # Runs on the same examples go through the arithmetic together.
    batches: dict[tuple[tuple[int, ...], bytes], list[str]] = {}
    for run_id, (logits, labels, _) in loaded.items():
        batches.setdefault((logits.shape, labels.tobytes()), []).append(run_id)
    found: dict[str, Outputs] = {}
    for batch in batches.values():
        for start in range(0, len(batch), _BATCH):
            part = batch[start : start + _BATCH]
            logits = np.stack([loaded[run_id][0] for run_id in part])
            extra = [loaded[run_id][2] for run_id in part]
            found |= dict(zip(part, _outputs(logits, loaded[part[0]][1], extra), strict=True))
    return found


def _outputs(logits: Array, labels: Array, further: Sequence[Mapping[str, Array]]) -> Iterable[Outputs]:
    """One entry a run of logits `[S, N, C]`."""
    # The same halves for every run: a difference in calibration is never one in who was judged by what.
    scaled = statistics.rescaled(logits, labels, np.random.default_rng([_HALVING, len(labels)]))
    loss, squares = statistics.nll(logits, labels), statistics.brier(logits, labels)
    before, after = statistics.confidence(logits), statistics.confidence(scaled)
    for place, entry in enumerate(further):
        yield Outputs(
            labels=labels,
            correct=_correct(logits[place], labels),
            probability=np.exp(-loss[place]),
            nll=loss[place],
            brier=squares[place],
            confidence=before[place],
            confidence_scaled=after[place],
            further=entry,
        )


def named(arms: Iterable[ArmResult], name: str) -> ArmResult:
    """The arm of that name."""
    return next(arm for arm in arms if arm.name == name)


def shared(arm: ArmResult, baseline: ArmResult, seeds: int) -> list[int]:
    """Indexes of the first `seeds` seeds that both arms have finished."""
    return [index for index in arm.indexes if index in baseline.records and index < seeds]


def _correct(logits: Array, labels: Array) -> Array:
    return np.asarray(logits.argmax(axis=1) == labels)


def _calibration_error(outputs: Outputs, *, scaled: bool) -> float:
    confidences = outputs.confidence_scaled if scaled else outputs.confidence
    return statistics.calibration_error(confidences, outputs.correct)
