"""A model and data -> the experiment that finds out which sparsity suits them. Defers torch until it looks at them."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError
from crisp_attention.experiment.budget import Cost
from crisp_attention.experiment.data import dataset
from crisp_attention.experiment.execution.choice import choose
from crisp_attention.experiment.specification.runs import Fingerprints, expand
from crisp_attention.experiment.specification.spec import ExperimentSpec, parse
from crisp_attention.experiment.training import model
from crisp_attention.experiment.training.model import Checkpoint

if TYPE_CHECKING:
    from crisp_attention.experiment.training.workbench import Workbench

DENSE, SPARSE, PLACEBO = "dense", "sparse", "dense-other-seeds"
"""The arms: what is compared, and the dense one again, which shows how far equal arms differ."""

_OTHER_SEEDS = 1000

_SPARSITY = {"low": 0.1, "high": 0.9}
_BLOCKS = "block_topk"
_RULES = ("topk", "percentile", _BLOCKS)
_FEWEST_BLOCKS = 4
"""Blocks of keys that half of the texts must have, for blocks to be anything but a coarse topk."""
_SCHEDULES = ("constant", {"kind": "linear", "end": 0.5}, {"kind": "anneal", "end": 0.5})
_DROPOUT = {"low": 0.0, "high": 0.3}
_RATES = {True: {"low": 1e-5, "high": 2e-4}, False: {"low": 1e-4, "high": 3e-3}}
"""Where the learning rate is searched, of models with and without weights."""


@dataclass(frozen=True)
class Question:
    """What is asked of a model and data, once both have been looked at.

    Attributes:
        spec: The experiment; its numbers of trials and seeds are the usual ones until they are fixed.
        checkpoint: The model.
        data: The data.
        bench: Both, encoded.
        rules: Rules that are searched.
        notes: What is not searched, and why, in sentences.
    """

    spec: ExperimentSpec
    checkpoint: Checkpoint
    data: dataset.ExperimentData
    bench: Workbench
    rules: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def fingerprints(self) -> Fingerprints:
        """Of model and data."""
        return Fingerprints(self.checkpoint.fingerprint, *self.data.prints())


def name_of(source: str, name: str) -> str:
    """What the experiment on a source and a model is called."""
    parts = "-".join(["tune", Path(source).stem, Path(name).name])
    return re.sub(r"[^A-Za-z0-9._]+", "-", parts)[:60]


def ask(
    data: Mapping[str, Any],
    name: str,
    training: Mapping[str, Any],
    announce: Callable[[str], None] = lambda _: None,
    *,
    seeds_per_trial: int = 1,
) -> Question:
    """Look at a model and data, and compose the experiment that tunes two arms alike and compares them.

    The dense arm's learning rate and dropouts are searched, and the sparse arm's too; that arm's sparsity, rule, layers
    and schedule besides, with as many trials. A third arm is the dense one with other seeds.

    Args:
        data: `[data]` of the specification.
        name: The model.
        training: `[training]` of the specification.
        announce: Told before something slow happens.
        seeds_per_trial: Trainings of each trial.

    Raises:
        CrispError: If the data or the model will not do.
    """
    sparse: dict[str, Any] = {"name": SPARSE, "sparsity": 0.5}
    content: dict[str, Any] = {
        "name": name_of(str(data["source"]), name),
        "model": name,
        "primary": {"arm": SPARSE, "baseline": DENSE},
        "data": dict(data),
        "training": dict(training),
        "arms": [{"name": DENSE}, {"name": PLACEBO, "seed_offset": _OTHER_SEEDS}, sparse],
    }
    spec = parse(content, "crisp tune")
    found = dataset.load_experiment(spec, announce)
    checkpoint = model.resolve(name, announce)
    from crisp_attention.experiment.training.workbench import Workbench, dropouts, positions_of, silence_training

    silence_training()
    bench = Workbench(checkpoint, found)
    network = bench.model(spec.training)
    longest = min(spec.data.max_length, positions_of(network.config) or math.inf, _reads(bench))
    content["data"]["max_length"] = int(longest)
    layers, notes = _layers(network)
    rules, more = _rules(network, bench, int(longest))
    structure: dict[str, Any] = {"rule": list(rules)} if len(rules) > 1 else {}
    structure |= layers | {"schedule": list(_SCHEDULES)}
    sparse["rule"] = rules[0]
    ranges = {"learning_rate": _RATES[checkpoint.pretrained], **dict.fromkeys(dropouts(network.config), _DROPOUT)}
    content["tune"] = {
        "pruning": True,
        "seeds_per_trial": seeds_per_trial,
        "sparsity": _SPARSITY,
        **ranges,
        **structure,
    }
    sparse["tune"] = ["sparsity", *ranges, *structure]
    return Question(parse(content, "crisp tune"), checkpoint, found, bench, rules, (*notes, *more))


def cost(question: Question, jobs: int | None) -> Cost:
    """What trials and runs take on this machine: timed on real batches, the sparse arm's by its slowest rule.

    A training of a trial is taken to be as long as a run, though it trains on less, and some are given up early.

    Args:
        question: Of a model and data.
        jobs: Worker processes asked for, or None.

    Raises:
        ConfigurationError: If jobs is out of range, or nothing could be timed.
    """
    from crisp_attention.experiment.training import timing

    spec, bench = question.spec, question.bench
    arms = [spec.arm(DENSE).model_copy(update={"tune": None})]
    arms += [
        spec.arm(SPARSE).model_copy(update={"name": rule, "attention": SparsityConfig(rule=rule, sparsity=0.5)})
        for rule in question.rules
    ]
    timed = spec.model_copy(update={"arms": tuple(arms), "tune": None, "seeds": 1})
    executor = choose("local", spec.resources)
    searching, running = (executor.divide(jobs, runs, runs) for runs in (2, len(spec.arms) * spec.seeds))
    started = time.perf_counter()
    bench.model(spec.training)
    loading = time.perf_counter() - started
    found = {}
    for threads in dict.fromkeys((searching.threads, running.threads)):
        seconds = {
            arm: own for (arm, _), own in timing.expect(bench, expand(timed, question.fingerprints), threads).items()
        }
        if DENSE not in seconds:
            raise ConfigurationError(f"The speed of {question.checkpoint.name} could not be measured: give --trials.")
        slowest = max(own for arm, own in seconds.items() if arm != DENSE or len(seconds) == 1)
        found[threads] = (seconds[DENSE] + loading, slowest + loading)
    dense, sparse = found[running.threads]
    assert spec.tune is not None
    trial = tuple(spec.tune.seeds_per_trial * seconds for seconds in found[searching.threads])
    return Cost(trial, (dense, dense, sparse), searching.jobs, running.jobs)


def _reads(bench: Workbench) -> float:
    """Tokens that a tokenizer was made for; without end where it does not say."""
    most = getattr(bench.processor, "model_max_length", None)
    return most if isinstance(most, int) else math.inf


def _rules(network: Any, bench: Workbench, most: int) -> tuple[tuple[str, ...], list[str]]:
    """Rules that serve a model, and what is to be said of the others."""
    from crisp_attention.huggingface.model import densify, sparsify

    found, notes = [], []
    lengths = bench.encoded(next(iter(bench.data.conditions.values())).train, most).lengths
    for rule in _RULES:
        config = SparsityConfig(rule=rule, sparsity=0.5)
        if rule == _BLOCKS and np.median(lengths) < _FEWEST_BLOCKS * (config.key_block or 1):
            continue  # as every other rule of the package, it is not worth a word
        try:
            sparsify(network, config)
        except ConfigurationError as error:
            notes.append(f"The rule {rule} is not searched: {error}")
        else:
            found.append(rule)
            densify(network)
    return tuple(found), notes


def _layers(network: Any) -> tuple[dict[str, Any], list[str]]:
    """Which layers are searched, and what is to be said if none are."""
    from crisp_attention.huggingface.model import densify, sparsify
    from crisp_attention.state import layers

    states = layers(sparsify(network, sparsity=0.5))
    count = len(states)
    numbered = next(iter(states.values())).model.numbered is not None
    densify(network)
    if count < 2:
        return {}, []
    if not numbered:
        return {}, [
            "The choice of layers is not searched: the attention layers of this architecture do not know their "
            "numbers, and a plain from_pretrained could not take such settings up."
        ]
    half = count // 2
    parts = [[*range(half)], [*range(half, count)], [count - 1]]
    return {"layers": ["all", *(part for number, part in enumerate(parts) if part not in parts[:number])]}, []
