"""Real workers whose training is made up: no torch, no time. What happens to their records is what counts.

python made_up_worker.py together FOLDER PROCESSES   all at once on the same runs
python made_up_worker.py killed FOLDER KILLS         one after another, each killed at a random moment
python made_up_worker.py apart FOLDER PROCESSES      as on machines of their own, without locks, two of which fail
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import types
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import numpy as np

from crisp_attention.experiment import training
from crisp_attention.experiment.execution import worker
from crisp_attention.experiment.execution.worker import Task
from crisp_attention.experiment.results import leases
from crisp_attention.experiment.results.leases import Leases
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.runs import PlannedRun
from record_builders import PRINTS, finished, make_spec, planned

TRAINED = "trained.txt"
SEEDS = 400


class NoCheckpoints:
    """Keeps nothing."""

    def __init__(self, *arguments: object) -> None:
        pass

    def clear(self) -> None:
        """Remove nothing."""


def train(run, bench, *_):
    """Note that the run was trained, and return a record with outputs that differ from run to run."""
    with (bench / TRAINED).open("a") as stream:
        stream.write(f"{run.config.run_id}\n")
    time.sleep(0.001)
    random_ = np.random.default_rng(int(run.config.run_id, 16))
    return finished(run, random_.random(200) < 0.8)


def make_up() -> None:
    """Have workers train as above."""
    for name, content in (("train", {"run": train}), ("checkpoint", {"Checkpoints": NoCheckpoints})):
        module = types.ModuleType(f"crisp_attention.experiment.training.{name}")
        vars(module).update(content)
        sys.modules[module.__name__] = module
        setattr(training, name, module)


def work(folder: Path, runs: Iterable[PlannedRun]) -> NoReturn:
    """Do the runs that are not done, as a worker does, and end."""
    store = Store(folder)
    for run in runs:
        if not (store.records / f"{run.config.run_id}.json").exists():
            worker._run(Task(run), store, folder, lambda event: None)
    os._exit(0)


def together(folder: Path, processes: int) -> dict[str, int]:
    """Several processes begin at the same moment."""
    spec = make_spec(seeds=20)
    Store(folder).open(spec, PRINTS)
    runs = planned(spec).values()
    gate, opener = os.pipe()
    children = []
    for _ in range(processes):
        child = os.fork()
        if child == 0:
            os.close(opener)
            os.read(gate, 1)
            work(folder, runs)
        children.append(child)
    os.close(opener)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return {"failed": sum(code != 0 for code in codes), "runs": len(runs)}


def killed(folder: Path, kills: int) -> dict[str, int]:
    """Kill -9 at random moments; after each, no record that was there has changed."""
    store, random_ = Store(folder), random.Random(os.getpid())
    spec = make_spec(seeds=SEEDS)
    store.open(spec, PRINTS)
    # Planned once: what is killed shall be at work.
    runs = planned(spec).values()
    known: dict[Path, bytes] = {}
    hit = halves = 0
    # On a slow machine more kills, so that enough is written and some of it half.
    while hit < kills or len(known) < kills or not halves:
        child = os.fork()
        if child == 0:
            work(folder, runs)
        time.sleep(random_.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        hit += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        for path, content in known.items():
            assert path.read_bytes() == content, f"{path} changed"
        new = [path for path in store.records.glob("[!.]*.json") if path not in known]
        for path in new:
            record = store.load(path.stem)
            assert record is not None
            store.load_arrays(record)
            known[path] = path.read_bytes()
        halves += any(store.records.glob(".*"))
    return {"kills": hit, "records": len(known), "halves": halves}


class Useless:
    """A file lock that excludes nobody."""

    def __init__(self, path: Path) -> None:
        pass

    def acquire(self, **arguments: object) -> None:
        """Succeed always."""

    def release(self) -> None:
        """Let go of nothing."""


def apart(folder: Path, processes: int) -> dict[str, object]:
    """One machine dies and one is suspended in the middle of a run; the others find all runs to do, and do them."""
    spec = make_spec(seeds=8)
    store = Store(folder)
    store.open(spec, PRINTS)
    runs = list(planned(spec).values())
    leases.FileLock = Useless  # type: ignore[misc]
    trained = train

    def machine(number: int, seconds: float) -> int:
        child = os.fork()
        if child:
            return child
        leases.DURATION = seconds
        own = Store(folder)
        own.leases = Leases(folder, place=f"machine {number}")
        todo = runs
        while todo:
            for run in todo:
                worker._run(Task(run), own, folder, lambda event: None)
            own.abandoned([run.config.run_id for run in todo], lambda sentence: None)
            todo = [run for run in runs if own.load(run.config.run_id) is None]
        os._exit(0)

    def stuck(run, bench, *_):
        record, outputs = trained(run, bench)
        (bench / f"begun-{run.config.run_id}").touch()
        while not (bench / "go-on").exists():
            time.sleep(0.01)
        return record, {name: array[::-1] for name, array in outputs.items()}

    sys.modules["crisp_attention.experiment.training.train"].run = stuck  # type: ignore[attr-defined]
    failing = []
    for number in range(2):
        # What dies soon is found out soon; the others must not seem dead on a slow machine.
        failing.append(machine(number, 0.5))
        while len(list(folder.glob("begun-*"))) <= number:
            time.sleep(0.01)
    dead, suspended = failing
    os.kill(dead, signal.SIGKILL)
    os.kill(suspended, signal.SIGSTOP)
    sys.modules["crisp_attention.experiment.training.train"].run = trained  # type: ignore[attr-defined]
    living = [machine(2 + number, 30.0) for number in range(processes)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in living]
    before = {path.name: path.read_bytes() for path in store.records.iterdir()}
    (folder / "go-on").touch()
    os.kill(suspended, signal.SIGCONT)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(suspended, 0)[1]))
    return {
        "failed": sum(code != 0 for code in codes),
        "interrupted": [path.name.removeprefix("begun-") for path in folder.glob("begun-*")],
        "unchanged": before == {path.name: path.read_bytes() for path in store.records.iterdir()},
    }


if __name__ == "__main__":
    make_up()
    scenario = {"together": together, "killed": killed, "apart": apart}[sys.argv[1]]
    told = scenario(Path(sys.argv[2]), int(sys.argv[3]))
    # On a line of its own: a child that was killed may have left half of one.
    print(f"\n{json.dumps(told)}")
