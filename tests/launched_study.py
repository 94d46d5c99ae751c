"""What each of two processes does in `test_distributed.py`: runs of a study that they train together.

Run as `python launched_study.py SPEC OUT PORT PORT PORT` with the variables that torchrun sets, but MASTER_PORT;
writes `OUT/rank-R.json`. Calls in turn:

- killed: rank 0 ends at `KILLED_AT` as by a signal;
- resumed: the same directory again, with more runs, of which one fails on rank 1 and one diverges;
- whole: the first of the runs without an interruption, in another directory.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from crisp_attention.experiment import study
from crisp_attention.experiment.execution.distributed import launched
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.spec import read
from crisp_attention.experiment.training import checkpoint, evaluation, journal, train
from crisp_attention.state import layers

KILLED_AT, FAILS_AT = 5, 4
EVALUATION_BATCH = 16
"""Small, so that the evaluation split has two and the probe one, of which rank 1 gets none."""
UNEVEN, LONELY = "train_examples=91", "train_examples=89"
"""The last batch of eight has three examples, of which rank 1 gets two; or one, of which rank 0 gets none."""
CALLS = {
    "killed": ("out", [("dropout", UNEVEN)]),
    "resumed": (
        "out",
        [
            ("scheduled", LONELY),
            ("dropout", UNEVEN),
            ("failing", UNEVEN),
            ("diverging", UNEVEN),
            ("dense", UNEVEN),
        ],
    ),
    "whole": ("other", [("dropout", UNEVEN)]),
}
RANK = int(os.environ.get("RANK", 0))


class Killed(BaseException):
    """Rank 0 ends here."""


class Mortal(checkpoint.Checkpoints):
    """Saves at every step of a run that is to be killed, and none of others."""

    dying = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments, seconds=0.0 if Mortal.dying else math.inf, share=math.inf)

    def complete(self, step: int, books: dict[str, Any]) -> None:
        super().complete(step, books)
        if step == KILLED_AT:
            raise Killed


class Notes:
    """What this rank did: by call and arm, the sparsity of each layer after each step, and its random numbers."""

    def __init__(self) -> None:
        self.call, self.arm = "", ""
        self.steps: dict[str, list[Any]] = {}
        self.random: dict[str, list[int]] = {}
        self.events: list[Any] = []

    def watch(self) -> None:
        stock_run, stock_step, stock_loss = train.run, journal.Journal.on_step_end, train._PairedTrainer.compute_loss

        def run(planned: Any, *arguments: Any, **more: Any) -> Any:
            self.arm = planned.arm
            return stock_run(planned, *arguments, **more)

        def on_step_end(own: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
            key = f"{self.call} {self.arm}"
            shares = [float(layer._sparsity) for layer in layers(own.trainer.model).values()]
            self.steps.setdefault(key, []).append([state.global_step, shares])
            self.random.setdefault(key, []).append(int(torch.get_rng_state().long().sum()))
            stock_step(own, args, state, control, **more)

        def compute_loss(own: Any, *arguments: Any, **more: Any) -> Any:
            if RANK == 1 and self.arm == "failing" and own.state.global_step == FAILS_AT:
                raise ValueError("made to fail")
            return stock_loss(own, *arguments, **more)

        train.run = run
        journal.Journal.on_step_end = on_step_end
        train._PairedTrainer.compute_loss = compute_loss

    def announce(self, message: str) -> None:
        pass

    def receive(self, planned: Any, event: Any) -> None:
        if event.kind != "progress":
            self.events.append([self.call, planned and planned.arm, event.kind, event.reason])


def main(spec_file: Path, out: Path, ports: list[str]) -> None:
    notes = Notes()
    notes.watch()
    checkpoint.Checkpoints = Mortal
    study._expect = lambda *_: {}
    evaluation.EVALUATION_BATCH = EVALUATION_BATCH
    spec = read(spec_file)
    for (call, (folder, wanted)), port in zip(CALLS.items(), ports, strict=True):
        notes.call, Mortal.dying = call, call == "killed" and RANK == 0
        os.environ["MASTER_PORT"] = port
        with suppress(Killed), launched() as leads:
            if leads:
                plan = study.prepare(spec, out / folder, notes)
                store = Store(plan.folder)
                store.open(plan.spec, plan.prints)
                tasks = deque(task for task in plan.pending if (task.run.arm, task.run.condition) in wanted)
                plan.executor.execute(tasks, store, plan.checkpoint, plan.data, plan.division, notes.receive)
    content = {"steps": notes.steps, "random": notes.random, "events": notes.events}
    (out / f"rank-{RANK}.json").write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
