"""How long runs will take, from a few training steps and evaluations of each arm."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from crisp_attention.config import SparsityConfig
from crisp_attention.experiment.data.batching import EncodedSplit, by_length
from crisp_attention.experiment.specification.runs import PlannedRun
from crisp_attention.experiment.specification.sections import TrainingSpec
from crisp_attention.experiment.training.evaluation import EVALUATION_BATCH
from crisp_attention.experiment.training.workbench import Workbench
from crisp_attention.huggingface.model import set_progress, sparsify

BUDGET_SECONDS = 10.0
"""After so long no further arm is timed; it is taken to be as slow as the slowest."""


@dataclass(frozen=True)
class Pace:
    """Seconds an example.

    Attributes:
        training: In a training step.
        evaluation: In an evaluation.
    """

    training: float
    evaluation: float

    def seconds(self, planned: PlannedRun, bench: Workbench) -> float:
        """What a run takes at this pace, without what it takes to load the model."""
        training, dataset = TrainingSpec(**planned.config.training), bench.data.of(planned.config.data)
        probe = min(training.train_probe, len(dataset.train))
        further = sum(len(bench.data.evaluations[name]) for name in planned.config.evaluations)
        evaluated = (training.epochs if training.curves else 1) * (len(dataset.test) + probe) + further
        return training.epochs * len(dataset.train) * self.training + evaluated * self.evaluation


def expect(
    bench: Workbench, runs: Iterable[PlannedRun], threads: int, budget: float = BUDGET_SECONDS
) -> dict[tuple[str, str], float]:
    """Seconds that runs will take, each alone on its threads.

    Times three training steps and an evaluation of each arm, on batches of short, middling and long
    examples as they occur.

    Args:
        bench: Model and data.
        runs: One of each arm and condition, the arm to be timed first at the head.
        threads: Torch's threads in a worker.
        budget: Seconds; the first arm is timed whatever it takes.

    Returns:
        By arm and condition; without arms whose timing went wrong.
    """
    runs = list(runs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    paces: dict[str, Pace | None] = {}
    started = time.perf_counter()
    try:
        for planned in runs:
            if planned.arm in paces or (paces and time.perf_counter() - started > budget):
                continue
            try:
                paces[planned.arm] = _pace(planned, bench)
            except Exception:  # what goes wrong here goes wrong in the run, whose record will say so
                paces[planned.arm] = None
    finally:
        torch.set_num_threads(before)
    known = [pace for pace in paces.values() if pace is not None]
    if not known:
        return {}
    slowest = Pace(max(pace.training for pace in known), max(pace.evaluation for pace in known))
    found = {(planned.arm, planned.condition): paces.get(planned.arm, slowest) for planned in runs}
    cells = {(planned.arm, planned.condition): planned for planned in runs}
    return {cell: pace.seconds(cells[cell], bench) for cell, pace in found.items() if pace is not None}


def _pace(planned: PlannedRun, bench: Workbench) -> Pace:
    config = planned.config
    training, dataset = TrainingSpec(**config.training), bench.data.of(config.data)
    model = bench.model(training)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # type: ignore[arg-type]
    sparsify(model, SparsityConfig.from_dict(config.attention))
    set_progress(model, 1.0)
    # A step that changes nothing takes as long as one that does.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    collate = bench.collator(config.padding, config.max_length)
    sample = _Sample(model, collate)

    def step(batch: dict[str, Any]) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def look(batch: dict[str, Any]) -> None:
        with torch.no_grad():
            model(**batch)

    model.train()
    train = sample.seconds(bench.encoded(dataset.train, config.max_length), training.batch_size, step)
    model.eval()
    test = sample.seconds(bench.encoded(dataset.test, config.max_length), EVALUATION_BATCH, look)
    return Pace(train, test)


@dataclass(frozen=True)
class _Sample:
    """Takes the time of a model on a few batches.

    Attributes:
        model: The model.
        collate: Makes a batch of examples.
    """

    model: PreTrainedModel
    collate: Callable[[list[dict[str, Any]]], Any]

    def seconds(self, split: EncodedSplit, size: int, act: Callable[[dict[str, Any]], None]) -> float:
        """Seconds an example, over a long, a middling and a short batch after one to warm up."""
        batches = list(by_length(split.lengths, size))
        chosen = [batches[len(batches) * part // 6] for part in (1, 3, 5)]
        act(self._batch(split, chosen[1]))
        started = time.perf_counter()
        for rows in chosen:
            act(self._batch(split, rows))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / sum(map(len, chosen))

    def _batch(self, split: EncodedSplit, rows: Any) -> dict[str, Any]:
        batch = self.collate([split[row] for row in rows])
        return {name: tensor.to(self.model.device) for name, tensor in batch.items()}
