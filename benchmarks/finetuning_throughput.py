"""How many sentences a second does fine-tuning process, dense and sparse, against the usual recipe?

The usual recipe is Transformers' run_glue.py: stock attention, batch 32, shuffled, every sentence
padded to 128 tokens. Ours is the experiment's own training (`crisp_attention.experiment.training.train`). What it adds
to the model's work shows beside a bare loop: the same model, batches and optimiser, and nothing else; what the operator
adds at sparsity 0, beside a bare loop with torch's own attention (SDPA). All variants take turns within one run; ratios
are formed within each round, since machines drift.

    python benchmarks/finetuning_throughput.py [--dataset movie-snippets] [--sentences 256] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch
from figures import keep
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
    get_linear_schedule_with_warmup,
    set_seed,
)

from crisp_attention.config import SparsityConfig
from crisp_attention.experiment.data import dataset
from crisp_attention.experiment.data.batching import LengthGroupedBatches
from crisp_attention.experiment.specification.runs import PlannedRun, RunConfig
from crisp_attention.experiment.specification.sections import DataSpec, TrainingSpec
from crisp_attention.experiment.training import model, train
from crisp_attention.experiment.training.workbench import Workbench, silence_training
from crisp_attention.huggingface.model import sparsify

BATCH, MAX_LENGTH, SEED = 32, 128, 0
ARMS = {
    "dense": SparsityConfig(sparsity=0.0),
    "percentile-20": SparsityConfig(sparsity=0.2, rule="percentile"),
    "percentile-50": SparsityConfig(sparsity=0.5, rule="percentile"),
    "percentile-80": SparsityConfig(sparsity=0.8, rule="percentile"),
    "topk-80": SparsityConfig(sparsity=0.8, rule="topk"),
    "random-80": SparsityConfig(sparsity=0.8, rule="random"),
}
RECIPE = "run_glue.py recipe"
STOCK = "torch's, bare loop"
BARE = {f"{arm}, bare loop": arm for arm in ("dense", "topk-80")}
TRAINING = TrainingSpec(epochs=1, batch_size=BATCH, train_probe=1)


def ours(bench: Workbench, config: SparsityConfig) -> float:
    """Sentences a second of one arm's training steps."""
    planned = PlannedRun(
        "benchmark",
        0,
        RunConfig(
            model=bench.checkpoint.fingerprint,
            data=bench.data.conditions[""].fingerprint,
            max_length=MAX_LENGTH,
            padding="longest",
            training=TRAINING.model_dump(),
            attention=config.to_dict(),
            seed=SEED,
        ),
    )
    record, _ = train.run(planned, bench, lambda _: None)
    return record.timing.train_examples_per_second


class Loop:
    """The experiment's training steps in a loop that keeps nothing.

    Args:
        bench: Model and data.
        config: Of the arm; None leaves torch's own attention.
    """

    def __init__(self, bench: Workbench, config: SparsityConfig | None) -> None:
        set_seed(SEED)
        self._model = bench.model(TRAINING)
        if config is not None:
            sparsify(self._model, config)
        self._model.train()
        self.split = bench.encoded(bench.data.conditions[""].train, MAX_LENGTH)
        self._collate = bench.collator("longest", MAX_LENGTH)
        self.batches = LengthGroupedBatches(self.split.lengths, BATCH, SEED).of_epoch(0)
        decayed, others = [], []
        for parameter in self._model.parameters():
            (decayed if parameter.ndim > 1 else others).append(parameter)
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": TRAINING.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=TRAINING.learning_rate,
            fused=True,  # as the Trainer does
        )
        steps = len(self.batches)
        self._schedule = get_linear_schedule_with_warmup(self._optimizer, int(TRAINING.warmup_share * steps), steps)
        self._next = itertools.cycle(self.batches)

    def step(self) -> None:
        """Train on the next batch; after the last comes the first."""
        self._model(**self._collate([self.split[row] for row in next(self._next)])).loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), TRAINING.max_grad_norm)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()


def bare(bench: Workbench, config: SparsityConfig | None) -> float:
    """Sentences a second of the bare loop."""
    loop = Loop(bench, config)
    started = time.perf_counter()
    for _ in loop.batches:
        loop.step()
    return len(loop.split) / (time.perf_counter() - started)


def usual(bench: Workbench, sentences: int) -> float:
    """Sentences a second of run_glue.py's recipe."""
    set_seed(0)
    stock = AutoModelForSequenceClassification.from_pretrained(
        bench.checkpoint.folder, dtype=torch.float32, num_labels=len(bench.data.classes)
    )
    split = bench.data.conditions[""].train
    encoded = bench.processor(
        list(split.texts[:sentences]), padding="max_length", max_length=MAX_LENGTH, truncation=True
    )
    rows = [
        {name: column[row] for name, column in encoded.items()} | {"label": int(split.labels[row])}
        for row in range(sentences)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=BATCH, learning_rate=2e-5, num_train_epochs=1,
            save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=stock, args=arguments, train_dataset=rows, data_collator=default_data_collator)
        started = time.perf_counter()
        trainer.train()
        return sentences / (time.perf_counter() - started)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="movie-snippets")
    parser.add_argument("--sentences", type=int, default=256, help="training sentences a measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    silence_training()
    loaded = dataset.load(DataSpec(source=options.dataset, train_examples=options.sentences, test_examples=32), print)
    bench = Workbench(model.resolve("minilm-l6", print), dataset.ExperimentData({"": loaded}))
    ours(bench, ARMS["dense"])  # warm-up, not counted
    speeds: dict[str, list[float]] = {name: [] for name in (RECIPE, STOCK, *BARE, *ARMS)}
    for number in range(options.rounds):
        # A quarter of the sentences is enough where each takes several times as long.
        speeds[RECIPE].append(usual(bench, max(BATCH, options.sentences // 4)))
        for name, config in ARMS.items():
            speeds[name].append(ours(bench, config))
        speeds[STOCK].append(bare(bench, None))
        for name, arm in BARE.items():
            speeds[name].append(bare(bench, ARMS[arm]))
        print(f"round {number + 1} of {options.rounds}: " + ", ".join(f"{n} {s[-1]:.1f}/s" for n, s in speeds.items()))
    print(f"\n{'':20}{'sentences/s':>12}  {'against recipe':>24}  {'against dense':>24}")
    figures = {}
    for name, values in speeds.items():
        ratios = {
            other: [value / base for value, base in zip(values, speeds[other], strict=True)]
            for other in (RECIPE, "dense")
        }
        figures[name] = {"sentences_per_second": values, "ratios": ratios}
        cells = [f"{statistics.median(r):.2f} ({min(r):.2f}..{max(r):.2f})" for r in ratios.values()]
        print(f"{name:20}{statistics.median(values):12.1f}  {cells[0]:>24}  {cells[1]:>24}")
    print("median of rounds (smallest..largest)")
    shares = {}
    for name, arm in BARE.items():
        shares[arm] = [one / other - 1 for one, other in zip(speeds[name], speeds[arm], strict=True)]
        print(
            f"The experiment adds to a bare loop's time, {arm}: {statistics.median(shares[arm]):.1%} "
            f"({min(shares[arm]):.1%}..{max(shares[arm]):.1%})"
        )
    keep(options, figures=figures, added_to_a_bare_loop=shares)


if __name__ == "__main__":
    main()
