"""`Record`: what one run leaves behind. Versioned; readable anywhere without torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = 3
"""Version of the record format. A change that old readers cannot bear raises it."""

READABLE = (1, 2, 3)
"""The versions that this release reads. What 2 and 3 added has defaults here."""

SURER = "Each counts as an example of its own, so that intervals and verdicts are surer than they should be."
"""How a note on the data ends that belongs beside the verdict."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Score(_Part):
    """A model on a set of examples, in evaluation mode.

    Attributes:
        loss: Mean cross-entropy, nats.
        correct: Examples classified correctly.
        total: Examples.
    """

    loss: float
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of correct examples."""
        return self.correct / self.total


class Epoch(_Part):
    """One pass over the training examples.

    Attributes:
        epoch: From 1.
        running_loss: Mean loss of the epoch's steps, in training mode (with dropout).
        train: The probe of training examples, after the epoch.
        test: The evaluation split, after the epoch. Only the last epoch's is ever compared.
    """

    epoch: int
    running_loss: float
    train: Score
    test: Score

    def metrics(self) -> dict[str, float]:
        """What trackers are told of it; the Trainer has a "train_loss" of its own."""
        return {
            "running_loss": self.running_loss,
            "probe_accuracy": self.train.accuracy,
            "probe_loss": self.train.loss,
            "test_accuracy": self.test.accuracy,
            "test_loss": self.test.loss,
        }


class Timing(_Part):
    """Where the time went.

    Attributes:
        started: UTC, ISO 8601.
        seconds: The whole run.
        train_seconds: Training steps alone.
        train_examples_per_second: Over the training steps.
    """

    started: str
    seconds: float
    train_seconds: float
    train_examples_per_second: float


class RealisedSparsity(_Part):
    """Share of valid pairs removed, by layer name; empty where that mode did not run.

    Attributes:
        train: Over the last epoch's steps.
        test: Over the last evaluation.
    """

    train: dict[str, float]
    test: dict[str, float]


class LengthBin(_Part):
    """Realised sparsity on evaluation examples of like length.

    Attributes:
        shortest, longest: Tokens of the shortest and the longest example in it.
        examples: How many there are.
        realised: Share of valid pairs removed, all layers together.
    """

    shortest: int
    longest: int
    examples: int
    realised: float


class Provenance(_Part):
    """With what a run was done.

    Attributes:
        packages: Versions of everything that can change a number.
        git: Commit and dirty flag of this package's checkout; None outside of one.
        platform: Operating system, processor architecture and Python.
        device: Where it ran, as "cpu".
        threads: Torch's threads, of each process.
        processes: How many trained it together, each a part of every batch; since version 3.
        model: Name of the model.
        data: Name of the data set.
        weights_fingerprint: Hash of weights, configuration and tokenizer.
        data_fingerprint: Hash of both splits.
        data_notes: What was dropped from the source.
    """

    packages: dict[str, str]
    git: dict[str, Any] | None
    platform: dict[str, str]
    device: str
    threads: int
    processes: int = 1
    model: str
    data: str
    weights_fingerprint: str
    data_fingerprint: str
    data_notes: tuple[str, ...]


class Arrays(_Part):
    """The file of per-example outputs beside a record.

    Attributes:
        file: Name in the same folder: an .npz with `test_logits` float32 `[N, C]`, `test_labels` int64 `[N]`,
            `train_logits`, `train_labels`, in the data set's order. Since version 2 also `test_lengths`
            int64 `[N]` (tokens), `NAME_logits` and `NAME_labels` of each further evaluation, and attention
            maps of M test examples: `map_rows` int64 `[M]` (which), `map_lengths` int64 `[M]` (tokens T),
            `map_layers` int64 `[]` (L), and `maps` uint8, the examples' `[L, T, T]` maps (mean over heads,
            queries x keys, 255 = 1.0) flattened one after another.
        sha256: Of the file.
    """

    file: str
    sha256: str


class Record(_Part):
    """One arm at one seed.

    Attributes:
        schema_version: `SCHEMA` at the time of writing.
        run_id: Hash of `config`.
        status: "finished"; "diverged" (a loss was not finite); "failed" (an error, see `reason`); of a trial also
            "pruned" (given up after an epoch).
        reason: Why not finished.
        arm: Name of the arm that first asked for this run.
        config: `RunConfig` as a dict.
        classes: Class names.
        epochs: One entry an epoch that was evaluated.
        realised_sparsity: By layer.
        realised_by_length: On the evaluation split, shortest examples first; since version 2.
        entropy: Mean attention entropy in nats on the evaluation split, by layer; since version 2.
        evaluations: Scores of further evaluations after the last epoch, by name; since version 2.
        resumed: How often the run was taken up again from a checkpoint; since version 2.
        effective_batch_size: Examples of the largest training step, counted over all processes; None where none
            ended, and before version 3.
        parameters: Number of trained parameters.
        timing: Where the time went.
        provenance: With what it was done.
        arrays: Per-example outputs; None unless finished.
    """

    schema_version: int = Field(SCHEMA, alias="schema")
    run_id: str
    status: Literal["finished", "diverged", "failed", "pruned"]
    reason: str | None = None
    arm: str
    config: dict[str, Any]
    classes: tuple[str, ...]
    epochs: tuple[Epoch, ...]
    realised_sparsity: RealisedSparsity
    realised_by_length: tuple[LengthBin, ...] = ()
    entropy: dict[str, float] = {}
    evaluations: dict[str, Score] = {}
    resumed: int = 0
    effective_batch_size: int | None = None
    parameters: int
    timing: Timing
    provenance: Provenance
    arrays: Arrays | None = None

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @property
    def final(self) -> Epoch:
        """The last epoch: the one that counts."""
        return self.epochs[-1]
