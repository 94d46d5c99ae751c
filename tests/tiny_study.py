"""A study small enough for tests: a random BERT of two layers on 160 made-up sentences."""

from __future__ import annotations

from pathlib import Path

TOML = """\
name = "tiny"
model = "{model}"
seeds = {seeds}

[primary]
arm = "percentile-80"

[data]
source = "{data}"
train_examples = {train}
test_examples = 24

[training]
epochs = {epochs}
batch_size = 8
learning_rate = {learning_rate}
train_probe = 16

[[arms]]
name = "dense"

[[arms]]
name = "dense-other-seeds"
seed_offset = 100

[[arms]]
name = "percentile-80"
rule = "percentile"
sparsity = 0.8

[[arms]]
name = "random-50-train"
rule = "random"
sparsity = 0.5
apply = "train"
"""


def toml(model: Path, data: Path, **changes) -> str:
    """The specification as TOML."""
    settings = {"seeds": 2, "train": 96, "epochs": 2, "learning_rate": 5e-3} | changes
    return TOML.format(model=model, data=data, **settings)


def prints_of(checkpoint, dataset):
    """What an experiment on one data set is done on."""
    from crisp_attention.experiment.specification.runs import Fingerprints

    return Fingerprints(checkpoint.fingerprint, {"": dataset.fingerprint})


def bench_of(checkpoint, dataset):
    """A workbench for an experiment on one data set."""
    from crisp_attention.experiment.data.dataset import ExperimentData
    from crisp_attention.experiment.training.workbench import Workbench

    return Workbench(checkpoint, ExperimentData({"": dataset}))


def spec(model: Path, data: Path, **changes):
    """The specification, parsed."""
    import tomllib

    from crisp_attention.experiment.specification.spec import parse

    return parse(tomllib.loads(toml(model, data, **changes)), "tiny")


def without_curves(planned):
    """The same run, evaluated after its last epoch alone."""
    import dataclasses

    training = planned.config.training | {"curves": False}
    return dataclasses.replace(planned, config=dataclasses.replace(planned.config, training=training))
