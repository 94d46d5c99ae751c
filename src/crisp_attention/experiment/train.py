"""`RunConfig` -> record and outputs: the only place that trains. Hugging Face's Trainer does the work.

Arms are paired: per seed they share initial weights, data order and dropout stream. All of them,
the dense one too, run through the operator, which draws dropout in one way at any sparsity.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError, UnsupportedModelError
from crisp_attention.experiment import provenance
from crisp_attention.experiment.batching import EncodedSplit, LengthGroupedBatches
from crisp_attention.experiment.checkpoint import Checkpoints
from crisp_attention.experiment.data import Dataset, Split
from crisp_attention.experiment.evaluation import Outputs
from crisp_attention.experiment.journal import Journal, Progress, RunningLoss
from crisp_attention.experiment.model import Checkpoint
from crisp_attention.experiment.record import Provenance, RealisedSparsity, Record, Timing
from crisp_attention.experiment.runs import PlannedRun
from crisp_attention.experiment.spec import TrainingSpec
from crisp_attention.huggingface.callback import SparsityCallback
from crisp_attention.huggingface.model import monitor, sparsify


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


def run(
    planned: PlannedRun, bench: Workbench, report: Callable[[Progress], None], checkpoints: Checkpoints | None = None
) -> tuple[Record, Outputs | None]:
    """Train and evaluate one arm at one seed.

    Taken up again from a checkpoint, it gives the same record and outputs to the last bit as without
    an interruption; only the times differ.

    Args:
        planned: What to run.
        bench: Model and data, already tokenised.
        report: Told of the progress a few times a second.
        checkpoints: Where to save, and to go on from; without them nothing is saved.

    Returns:
        The record (finished or diverged) and the per-example outputs (None if diverged).
    """
    config, dataset = planned.config, bench.dataset
    training = TrainingSpec(**config.training)
    set_seed(config.seed)
    model = _load(bench.checkpoint, dataset.classes)
    sparsify(model, SparsityConfig.from_dict(config.attention))
    collate = DataCollatorWithPadding(bench.tokenizer, padding=config.padding, max_length=config.max_length)
    train = bench.encoded("train", dataset.train, config.max_length)
    probe = bench.encoded("probe", _probe(dataset.train, training.train_probe), config.max_length)
    test = bench.encoded("test", dataset.test, config.max_length)
    saved = None if checkpoints is None else checkpoints.take_up()
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="crisp-run-"))
        watcher = stack.enter_context(monitor(model))
        watcher.watch_entropy = False  # until the last evaluation
        batches = LengthGroupedBatches(train.lengths, training.batch_size, config.seed)
        trainer = _PairedTrainer(
            batches,
            checkpoints,
            model=model,
            args=_arguments(training, config.seed, scratch if checkpoints is None else str(checkpoints.folder)),
            train_dataset=train,
            data_collator=collate,
            callbacks=[SparsityCallback()],
        )
        journal = Journal(trainer, batches, trainer.running_loss, watcher, probe, test, report, checkpoints)
        if saved is not None:
            journal.restore(saved.books)
        trainer.add_callback(journal)
        trainer.train(resume_from_checkpoint=None if saved is None else str(saved.folder))
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
        realised_by_length=journal.realised_by_length,
        entropy=journal.entropy,
        evaluations=journal.evaluations,
        resumed=0 if checkpoints is None else checkpoints.resumed,
        parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        timing=Timing(
            started=journal.started,
            seconds=round(journal.seconds, 3),
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


class _PairedTrainer(Trainer):
    """A Trainer whose data order depends on the seed alone, and that keeps its loss unrounded."""

    def __init__(self, batches: LengthGroupedBatches, checkpoints: Checkpoints | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.batches = batches
        self.checkpoints = checkpoints
        self.running_loss = RunningLoss()

    def get_train_dataloader(self) -> DataLoader[Any]:
        split = self.train_dataset
        assert isinstance(split, EncodedSplit)
        loader: DataLoader[Any] = DataLoader(
            split,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            # Without a generator of its own the loader would draw from the dropout stream.
            generator=torch.Generator().manual_seed(self.args.seed),
        )
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]

    def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
        result = super().compute_loss(*arguments, **keywords)
        self.running_loss.add(result[0] if isinstance(result, tuple) else result)
        return result

    def _save_checkpoint(self, *arguments: Any, **keywords: Any) -> None:
        try:
            super()._save_checkpoint(*arguments, **keywords)
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.checkpoints is None:
                raise
            # A full disk must not end a run whose record may still find room.
            self.checkpoints.give_up(self.state.global_step, str(error))


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
