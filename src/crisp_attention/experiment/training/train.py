"""`RunConfig` -> record and outputs: the only place that trains. Hugging Face's Trainer does the work.

Arms are paired: per seed they share initial weights, data order and dropout stream. All of them,
the dense one too, run through the operator, which draws dropout in one way at any sparsity.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from crisp_attention.config import SparsityConfig
from crisp_attention.experiment.data.batching import EncodedSplit, LengthGroupedBatches, RankBatches
from crisp_attention.experiment.data.dataset import Dataset, Split
from crisp_attention.experiment.results import provenance
from crisp_attention.experiment.results.record import Provenance, RealisedSparsity, Record, Timing
from crisp_attention.experiment.specification.runs import PlannedRun
from crisp_attention.experiment.specification.sections import TrainingSpec
from crisp_attention.experiment.training.checkpoint import Checkpoints
from crisp_attention.experiment.training.evaluation import Outputs
from crisp_attention.experiment.training.journal import Journal, Progress, RunningLoss
from crisp_attention.experiment.training.keeping import save
from crisp_attention.experiment.training.ranks import Ranks
from crisp_attention.experiment.training.tracking import Tracking
from crisp_attention.experiment.training.workbench import Workbench
from crisp_attention.huggingface.callback import SparsityCallback
from crisp_attention.huggingface.model import monitor, sparsify
from crisp_attention.monitoring import SparsityMonitor


def run(
    planned: PlannedRun,
    bench: Workbench,
    report: Callable[[Progress], None],
    checkpoints: Checkpoints | None = None,
    tracking: Tracking | None = None,
    limits: Sequence[float] = (),
    keep: Path | None = None,
) -> tuple[Record, Outputs | None]:
    """Train and evaluate one arm at one seed.

    Taken up again from a checkpoint, it gives the same record and outputs to the last bit as without
    an interruption; only the times differ.

    Where a process group is open, its processes train the run together: each calls this with the same
    arguments, takes its part of every batch, and returns the same record but for times.

    Args:
        planned: What to run.
        bench: Model and data.
        report: Told of the progress a few times a second.
        checkpoints: Where to save, and to go on from; without them nothing is saved.
        tracking: Where to show the run besides, which changes neither record nor outputs.
        limits: Evaluation losses by epoch beyond which it is given up, for trials; empty for runs that are compared.
        keep: Where to save the finished model, ready for use; None does not.

    Returns:
        The record (finished, pruned or diverged) and the per-example outputs (None unless finished).
    """
    config = planned.config
    dataset, training = bench.data.of(config.data), TrainingSpec(**config.training)
    set_seed(config.seed)
    model = bench.model(training)
    sparsify(model, SparsityConfig.from_dict(config.attention))
    train = bench.encoded(dataset.train, config.max_length)
    probe = bench.encoded(_probe(dataset.train, training.train_probe), config.max_length)
    test = bench.encoded(dataset.test, config.max_length)
    further = {name: bench.encoded(bench.data.evaluations[name], config.max_length) for name in config.evaluations}
    ranks = Ranks.current()
    saved = None if checkpoints is None else ranks.broadcast(checkpoints.take_up() if ranks.leads else None)
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="crisp-run-"))
        watcher = stack.enter_context(monitor(model))
        watcher.watch_entropy = False  # until the last evaluation
        trackers = [] if tracking is None else stack.enter_context(tracking.of(planned))
        order = LengthGroupedBatches(train.lengths, training.batch_size, config.seed)
        batches = RankBatches(order, ranks.rank, ranks.size)
        trainer = _PairedTrainer(
            batches,
            checkpoints,
            ranks,
            watcher,
            model=model,
            args=_arguments(
                training,
                config.seed,
                scratch if checkpoints is None else str(checkpoints.folder),
                {} if tracking is None else tracking.arguments(planned),
                ranks,
            ),
            train_dataset=train,
            data_collator=bench.collator(config.padding, config.max_length),
            callbacks=[SparsityCallback(), *trackers],
        )
        trainer.remove_callback(PrinterCallback)  # who called shows the progress
        if not ranks.leads:
            # The Trainer has seeded all alike. Each drops other weights, or rows of a batch would share their dropout.
            torch.manual_seed(int(np.random.SeedSequence([config.seed, ranks.rank]).generate_state(1, np.uint64)[0]))
        journal = Journal(
            trainer=trainer,
            batches=batches,
            loss=trainer.running_loss,
            watcher=watcher,
            probe=probe,
            test=test,
            report=report,
            checkpoints=checkpoints,
            further=further,
            evaluation=None if config.evaluation is None else SparsityConfig.from_dict(config.evaluation),
            limits=limits,
            ranks=ranks,
            curves=training.curves,
        )
        if saved is not None:
            journal.restore(saved.books)
        trainer.add_callback(journal)
        trainer.train(resume_from_checkpoint=None if saved is None else str(saved.folder))
        device = str(trainer.args.device)
        if keep is not None and not journal.diverged:
            evaluated = SparsityConfig.from_dict(config.evaluation or config.attention)
            save(model, bench.processor, evaluated, config.max_length, keep)
    record = Record(
        run_id=config.run_id,
        status="diverged" if journal.diverged else "pruned" if journal.pruned else "finished",
        reason=journal.diverged or journal.pruned,
        arm=planned.arm,
        config=asdict(config),
        classes=dataset.classes,
        epochs=tuple(journal.epochs),
        realised_sparsity=RealisedSparsity(train=journal.realised_train, test=journal.realised_test),
        realised_by_length=journal.realised_by_length,
        entropy=journal.entropy,
        evaluations=journal.evaluations,
        resumed=0 if checkpoints is None else checkpoints.resumed,
        effective_batch_size=int(trainer.running_loss.examples) or None,
        parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        timing=Timing(
            started=journal.started,
            seconds=round(journal.seconds, 3),
            train_seconds=round(journal.train_seconds, 3),
            train_examples_per_second=round(journal.examples / max(journal.train_seconds, 1e-9), 2),
        ),
        provenance=describe(bench, dataset, device),
    )
    return record, journal.outputs if record.status == "finished" else None


def describe(bench: Workbench, dataset: Dataset, device: str) -> Provenance:
    """With what a run on this bench and data set is done."""
    return Provenance(
        packages=provenance.packages(),
        git=provenance.git(),
        platform=provenance.host(),
        device=device,
        threads=torch.get_num_threads(),
        processes=provenance.processes(),
        model=bench.checkpoint.name,
        data=dataset.name,
        weights_fingerprint=bench.checkpoint.fingerprint,
        data_fingerprint=dataset.fingerprint,
        data_notes=dataset.notes,
    )


class _PairedTrainer(Trainer):
    """A Trainer whose data order depends on the seed alone, and that keeps its loss unrounded.

    The gradient is that of the mean loss over the whole batch, however many processes share it.
    """

    def __init__(
        self,
        batches: RankBatches,
        checkpoints: Checkpoints | None,
        ranks: Ranks,
        watcher: SparsityMonitor,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.batches = batches
        self.checkpoints = checkpoints
        self.ranks = ranks
        self.watcher = watcher
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
        # As `accelerator.prepare` for one process: the batches are this rank's parts already.
        prepared: DataLoader[Any] = prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True
        )
        return prepared

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        mine, whole = self.batches.rows(self.state.global_step)
        seen, counted = len(inputs["labels"]), None if mine else self.watcher.state_dict()
        loss = cast(torch.Tensor, super().compute_loss(model, inputs, *arguments, **keywords))
        if counted is not None:
            self.watcher.load_state_dict(counted)
        elif seen != mine:
            raise RuntimeError(f"Expected {mine} examples in this part of a batch of {whole}, got {seen}.")
        share = loss.detach() * (mine / whole)
        self.running_loss.add(*self.ranks.sum(torch.stack((share, share.new_tensor(mine)))))
        # Gradients are averaged over processes, whose parts may be of unequal size.
        return loss * (mine * self.ranks.size / whole)

    def _save_checkpoint(self, *arguments: Any, **keywords: Any) -> None:
        problem = ""
        try:
            super()._save_checkpoint(*arguments, **keywords)
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.checkpoints is None:
                raise
            problem = str(error)
        # Each process writes the state of its random numbers: the checkpoint is whole if all have.
        problems = list(filter(None, self.ranks.gather(problem)))
        if problems and self.checkpoints is not None and self.ranks.leads:
            # A full disk must not end a run whose record may still find room.
            self.checkpoints.give_up(self.state.global_step, problems[0])


def _probe(train: Split, count: int) -> Split:
    """Evenly spaced training rows, the same for every arm and seed."""
    return train.take(np.unique(np.linspace(0, len(train) - 1, min(count, len(train))).astype(np.int64)))


def _arguments(
    training: TrainingSpec, seed: int, folder: str, tracked: Mapping[str, Any], ranks: Ranks
) -> TrainingArguments:
    # Without being told, Accelerate does not notice processes that have no GPU, and takes devices other than CUDA's.
    # Told where that is not needed, it would take any variable of a launcher for one of its own.
    cpu = not torch.cuda.is_available() and (ranks.size > 1 or torch.accelerator.is_available())
    arguments = TrainingArguments(
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and ranks.size > 1 else None,
        output_dir=folder,
        seed=seed,
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch_size // ranks.size,
        average_tokens_across_devices=False,  # the loss is weighed by `_PairedTrainer`
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        warmup_steps=training.warmup_share,
        lr_scheduler_type=training.lr_schedule if training.lr_schedule != "constant" else "constant_with_warmup",
        max_grad_norm=training.max_grad_norm,
        label_smoothing_factor=training.label_smoothing,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to=[],  # trackers are callbacks of ours, which cannot disturb a run
        disable_tqdm=True,
        remove_unused_columns=False,
        **tracked,
    )
    # A run trains on one device: of several the Trainer would make one for batches that it divides itself.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
