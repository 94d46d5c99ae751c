"""How many sentences a second does fine-tuning process, dense and sparse, against the usual recipe?

The usual recipe is Transformers' run_glue.py: stock attention, batch 32, shuffled, every sentence
padded to 128 tokens. Ours is the experiment's own training (`crisp_attention.experiment.training.train`). All
variants take turns within one run; ratios are formed within each round, since machines drift.

    python benchmarks/finetuning_throughput.py [--dataset movie-snippets] [--sentences 256] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, default_data_collator, set_seed

from crisp_attention.config import SparsityConfig
from crisp_attention.experiment.data import dataset
from crisp_attention.experiment.results import provenance
from crisp_attention.experiment.specification.runs import PlannedRun, RunConfig
from crisp_attention.experiment.specification.sections import DataSpec, TrainingSpec
from crisp_attention.experiment.training import model, train
from crisp_attention.experiment.training.workbench import Workbench, quiet_transformers

BATCH = 32
ARMS = {
    "dense": SparsityConfig(sparsity=0.0),
    "percentile-20": SparsityConfig(sparsity=0.2, rule="percentile"),
    "percentile-50": SparsityConfig(sparsity=0.5, rule="percentile"),
    "percentile-80": SparsityConfig(sparsity=0.8, rule="percentile"),
    "topk-80": SparsityConfig(sparsity=0.8, rule="topk"),
    "random-80": SparsityConfig(sparsity=0.8, rule="random"),
}


def ours(bench: Workbench, config: SparsityConfig) -> float:
    """Sentences a second of one arm's training steps."""
    planned = PlannedRun(
        "benchmark",
        0,
        RunConfig(
            model=bench.checkpoint.fingerprint,
            data=bench.data.conditions[""].fingerprint,
            max_length=128,
            padding="longest",
            training=TrainingSpec(epochs=1, batch_size=BATCH, train_probe=1).model_dump(),
            attention=config.to_dict(),
            seed=0,
        ),
    )
    record, _ = train.run(planned, bench, lambda _: None)
    return record.timing.train_examples_per_second


def usual(bench: Workbench, sentences: int) -> float:
    """Sentences a second of run_glue.py's recipe."""
    set_seed(0)
    stock = AutoModelForSequenceClassification.from_pretrained(
        bench.checkpoint.folder, dtype=torch.float32, num_labels=len(bench.data.classes)
    )
    split = bench.data.conditions[""].train
    encoded = bench.processor(list(split.texts[:sentences]), padding="max_length", max_length=128, truncation=True)
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
    quiet_transformers()
    loaded = dataset.load(DataSpec(source=options.dataset, train_examples=options.sentences, test_examples=32), print)
    bench = Workbench(model.resolve("minilm-l6", print), dataset.ExperimentData({"": loaded}))
    ours(bench, ARMS["dense"])  # warm-up, not counted
    speeds: dict[str, list[float]] = {name: [] for name in ("run_glue.py recipe", *ARMS)}
    for number in range(options.rounds):
        # A quarter of the sentences is enough where each takes several times as long.
        speeds["run_glue.py recipe"].append(usual(bench, max(BATCH, options.sentences // 4)))
        for name, config in ARMS.items():
            speeds[name].append(ours(bench, config))
        print(f"round {number + 1} of {options.rounds}: " + ", ".join(f"{n} {s[-1]:.1f}/s" for n, s in speeds.items()))
    print(f"\n{'':20}{'sentences/s':>12}  {'against recipe':>24}  {'against dense':>24}")
    figures = {}
    for name, values in speeds.items():
        ratios = {
            other: [value / base for value, base in zip(values, speeds[other], strict=True)]
            for other in ("run_glue.py recipe", "dense")
        }
        figures[name] = {"sentences_per_second": values, "ratios": ratios}
        cells = [f"{statistics.median(r):.2f} ({min(r):.2f}..{max(r):.2f})" for r in ratios.values()]
        print(f"{name:20}{statistics.median(values):12.1f}  {cells[0]:>24}  {cells[1]:>24}")
    print("median of rounds (smallest..largest)")
    if options.json:
        content = {
            "options": {name: value for name, value in vars(options).items() if name != "json"},
            "packages": provenance.packages(),
            "platform": provenance.host(),
            "figures": figures,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
