"""`RunConfig` -> record and outputs: the only place that trains. Hugging Face's Trainer does the work.

Arms are paired: per seed they share initial weights, data order and dropout stream. All of them,
the dense one too, run through the operator, which draws dropout in one way at any sparsity.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
import torch
import transformers
from scipy.special import log_softmax
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError, UnsupportedModelError
from crisp_attention.experiment import provenance
from crisp_attention.experiment.batching import EncodedSplit, LengthGroupedBatches, by_length
from crisp_attention.experiment.data import Dataset, Split
from crisp_attention.experiment.model import Checkpoint
from crisp_attention.experiment.record import Epoch, Provenance, RealisedSparsity, Record, Score, Timing
from crisp_attention.experiment.runs import PlannedRun
from crisp_attention.experiment.spec import TrainingSpec
from crisp_attention.huggingface.callback import SparsityCallback
from crisp_attention.huggingface.model import monitor, sparsify
from crisp_attention.monitoring import SparsityMonitor

Outputs = dict[str, np.ndarray[Any, Any]]

_EVALUATION_BATCH = 64
_PROGRESS_SECONDS = 0.3


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        step: Finished training steps.
        steps: Steps of the whole run.
        loss: Mean training loss of the epoch so far.
    """

    step: int
    steps: int
    loss: float


class Workbench:
    """What many runs on the same model and data share: the tokenizer and the tokenised splits."""

    def __init__(self, checkpoint: Checkpoint, dataset: Dataset) -> None:
        self.checkpoint = checkpoint
        self.dataset = dataset
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
        self._encoded: dict[tuple[str, int], EncodedSplit] = {}

    def encoded(self, side: str, split: Split, max_length: int) -> EncodedSplit:
        """A tokenised split, made once; `side` names it."""
        key = (f"{side}-{len(split)}", max_length)
        if key not in self._encoded:
            self._encoded[key] = EncodedSplit(split, self.tokenizer, max_length)
        return self._encoded[key]


def quiet_transformers() -> None:
    """Leave the screen to our own progress display."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def preflight(checkpoint: Checkpoint, dataset: Dataset, arms: Iterable[SparsityConfig], max_length: int) -> None:
    """Make sure, before anything is written, that every arm can be run on this model.

    Loads the model as a run does and sparsifies it by each arm's settings.

    Args:
        checkpoint: The model.
        dataset: The examples.
        arms: Each arm's settings.
        max_length: Tokens that the model must have positions for.

    Raises:
        UnsupportedModelError: If the model would not be touched or does not classify text.
        ConfigurationError: If a rule cannot serve it, or it has fewer positions than `max_length`.
    """
    quiet_transformers()
    try:
        model = _load(checkpoint, dataset.classes)
        AutoTokenizer.from_pretrained(checkpoint.folder)
    except (ValueError, OSError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{checkpoint.name} cannot be fine-tuned to {len(dataset.classes)} classes of text: {error}"
        ) from None
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ConfigurationError(
            f"data.max_length = {max_length}, but {checkpoint.name} has positions for {positions} tokens."
        )
    for arm in arms:
        sparsify(model, arm)


def run(planned: PlannedRun, bench: Workbench, report: Callable[[Progress], None]) -> tuple[Record, Outputs | None]:
    """Train and evaluate one arm at one seed.

    Args:
        planned: What to run.
        bench: Model and data, already tokenised.
        report: Told of the progress a few times a second.

    Returns:
        The record (finished or diverged) and the per-example outputs (None if diverged).
    """
    config, dataset = planned.config, bench.dataset
    training = TrainingSpec(**config.training)
    started = time.perf_counter()
    began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    set_seed(config.seed)
    model = _load(bench.checkpoint, dataset.classes)
    sparsify(model, SparsityConfig.from_dict(config.attention))
    collate = DataCollatorWithPadding(bench.tokenizer, padding=config.padding, max_length=config.max_length)
    train = bench.encoded("train", dataset.train, config.max_length)
    probe = bench.encoded("probe", _probe(dataset.train, training.train_probe), config.max_length)
    test = bench.encoded("test", dataset.test, config.max_length)
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="crisp-run-"))
        watcher = stack.enter_context(monitor(model))
        watcher.watch_entropy = False  # no record holds it
        trainer = _PairedTrainer(
            model=model,
            args=_arguments(training, config.seed, scratch),
            train_dataset=train,
            data_collator=collate,
            callbacks=[SparsityCallback()],
        )
        journal = _Journal(trainer, watcher, probe, test, report)
        trainer.add_callback(journal)
        trainer.train()
        device = str(trainer.args.device)
    record = Record(
        run_id=config.run_id,
        status="diverged" if journal.diverged else "finished",
        reason=journal.diverged,
        arm=planned.arm,
        config=asdict(config),
        classes=dataset.classes,
        epochs=tuple(journal.epochs),
        realised_sparsity=RealisedSparsity(train=journal.realised_train, test=journal.realised_test),
        parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        timing=Timing(
            started=began,
            seconds=round(time.perf_counter() - started, 3),
            train_seconds=round(journal.train_seconds, 3),
            train_examples_per_second=round(journal.examples / max(journal.train_seconds, 1e-9), 2),
        ),
        provenance=describe(bench, device),
    )
    return record, None if journal.diverged else journal.outputs


def describe(bench: Workbench, device: str) -> Provenance:
    """With what a run on this bench is done."""
    return Provenance(
        packages=provenance.packages(),
        git=provenance.git(),
        platform=provenance.host(),
        device=device,
        threads=torch.get_num_threads(),
        model=bench.checkpoint.name,
        data=bench.dataset.name,
        weights_fingerprint=bench.checkpoint.fingerprint,
        data_fingerprint=bench.dataset.fingerprint,
        data_notes=bench.dataset.notes,
    )


def evaluate(trainer: Trainer, split: EncodedSplit) -> np.ndarray[Any, Any]:
    """Logits of a split in its own order, float32 `[N, C]`, in evaluation mode.

    Batches are grouped by length; results do not depend on that. Draws no random numbers.
    """
    model, collate = trainer.model, trainer.data_collator
    assert isinstance(model, PreTrainedModel)
    assert collate is not None
    logits = np.empty((len(split), cast(int, model.config.num_labels)), dtype=np.float32)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for rows in by_length(split.lengths, _EVALUATION_BATCH):
            batch = collate([split[row] for row in rows])
            inputs = {name: tensor.to(trainer.args.device) for name, tensor in batch.items() if name != "labels"}
            logits[rows] = model(**inputs).logits.float().cpu().numpy()
    model.train(was_training)
    return logits


def score(logits: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Score:
    """Mean cross-entropy in nats and the number of correct rows, in float64."""
    log_probabilities = log_softmax(logits.astype(np.float64), axis=1)
    loss = -log_probabilities[np.arange(len(labels)), labels].mean()
    return Score(loss=float(loss), correct=int((logits.argmax(axis=1) == labels).sum()), total=len(labels))


class _PairedTrainer(Trainer):
    """A Trainer whose data order depends on the seed alone, and that keeps its loss unrounded."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.loss_sum: torch.Tensor | float = 0.0
        self.loss_steps = 0

    def get_train_dataloader(self) -> DataLoader[Any]:
        split = self.train_dataset
        assert isinstance(split, EncodedSplit)
        batches = LengthGroupedBatches(split.lengths, self.args.per_device_train_batch_size, self.args.seed)
        loader: DataLoader[Any] = DataLoader(
            split,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            # Without a generator of its own the loader would draw from the dropout stream.
            generator=torch.Generator().manual_seed(self.args.seed),
        )
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]

    def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
        result = super().compute_loss(*arguments, **keywords)
        loss = result[0] if isinstance(result, tuple) else result
        self.loss_sum = self.loss_sum + loss.detach()
        self.loss_steps += 1
        return result


@dataclass(eq=False)
class _Journal(TrainerCallback):
    """Keeps a run's books: progress, losses and scores by epoch, realised sparsity, time."""

    trainer: _PairedTrainer
    watcher: SparsityMonitor
    probe: EncodedSplit
    test: EncodedSplit
    report: Callable[[Progress], None]
    epochs: list[Epoch] = field(default_factory=list)
    realised_train: dict[str, float] = field(default_factory=dict)
    realised_test: dict[str, float] = field(default_factory=dict)
    outputs: Outputs = field(default_factory=dict)
    diverged: str | None = None
    train_seconds: float = 0.0
    examples: int = 0
    _clock: float = 0.0
    _reported: float = 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watcher.reset()
        self.trainer.loss_sum, self.trainer.loss_steps = 0.0, 0
        self._clock = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if now - self._reported < _PROGRESS_SECONDS:
            return
        self._reported = now
        loss = self._running_loss()
        self.report(Progress(state.global_step, state.max_steps, loss))
        self._stop_if_diverged(loss, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.train_seconds += time.perf_counter() - self._clock
        self.examples += len(self.trainer.train_dataset)  # type: ignore[arg-type]
        loss = self._running_loss()
        self._stop_if_diverged(loss, state, control)
        if self.diverged:
            return
        self.realised_train = self.watcher.realised(training=True)
        train_logits = evaluate(self.trainer, self.probe)
        self.watcher.reset()
        test_logits = evaluate(self.trainer, self.test)
        self.realised_test = self.watcher.realised(training=False)
        if not (np.isfinite(train_logits).all() and np.isfinite(test_logits).all()):
            self._stop_if_diverged(math.nan, state, control)
            return
        self.epochs.append(
            Epoch(
                epoch=len(self.epochs) + 1,
                running_loss=loss,
                train=score(train_logits, self.probe.labels),
                test=score(test_logits, self.test.labels),
            )
        )
        self.outputs = {
            "test_logits": test_logits,
            "test_labels": self.test.labels,
            "train_logits": train_logits,
            "train_labels": self.probe.labels,
        }
        self.report(Progress(state.global_step, state.max_steps, loss))

    def _running_loss(self) -> float:
        return float(self.trainer.loss_sum) / max(self.trainer.loss_steps, 1)

    def _stop_if_diverged(self, loss: float, state: Any, control: Any) -> None:
        if not math.isfinite(loss) and self.diverged is None:
            self.diverged = f"the loss was not finite at step {state.global_step} of {state.max_steps}"
            control.should_training_stop = True


def _load(checkpoint: Checkpoint, classes: tuple[str, ...]) -> PreTrainedModel:
    """The pretrained model in fp32 with a classification head, new where the checkpoint has none."""
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        checkpoint.folder,
        dtype=torch.float32,
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        label2id={name: index for index, name in enumerate(classes)},
    )
    return model


def _probe(train: Split, count: int) -> Split:
    """Evenly spaced training rows, the same for every arm and seed."""
    return train.take(np.unique(np.linspace(0, len(train) - 1, min(count, len(train))).astype(np.int64)))


def _arguments(training: TrainingSpec, seed: int, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        seed=seed,
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        warmup_steps=training.warmup_share,
        lr_scheduler_type=training.lr_schedule if training.lr_schedule != "constant" else "constant_with_warmup",
        max_grad_norm=training.max_grad_norm,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
