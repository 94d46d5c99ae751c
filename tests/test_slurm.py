"""The command for Slurm, read as shells read it."""

from __future__ import annotations

import shlex

import pytest

from crisp_attention.cli.slurm import array
from crisp_attention.experiment.specification.resources import ResourcesSpec


def read(line):
    """Slurm's options, and what each job runs."""
    program, *options, wrap, own = shlex.split(line)
    assert (program, wrap) == ("sbatch", "--wrap")
    return options, own


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "my spec.toml", "--dry-run", "--out", "runs/a b"],
        ["run", "--shard", "2/7", "my spec.toml", "--jobs=3", "--out", "runs/a b", "--dry-run"],
        ["run", "my spec.toml", "--jobs", "3", "--shard=2/7", "--out", "runs/a b", "--dry-run"],
    ],
)
def test_each_job_gives_the_same_command_with_its_own_shard(arguments):
    options, own = read(array(arguments, ResourcesSpec(), 7))
    assert options == ["--array=1-7", "--cpus-per-task=1"]
    # The number stays for the shell of the job.
    assert own == "crisp run 'my spec.toml' --out 'runs/a b' --shard $SLURM_ARRAY_TASK_ID/7 --jobs 1"


@pytest.mark.parametrize(
    ("resources", "asked", "jobs"),
    [
        ({"cpus": 4}, ["--cpus-per-task=4"], 1),
        ({"cpus": 4, "gpus": 1.0}, ["--cpus-per-task=4", "--gpus-per-task=1"], 1),
        ({"cpus": 2, "gpus": 0.3}, ["--cpus-per-task=6", "--gpus-per-task=1"], 3),
        ({"gpus": 0.1}, ["--cpus-per-task=10", "--gpus-per-task=1"], 10),
    ],
)
def test_jobs_ask_for_what_their_runs_get(resources, asked, jobs):
    options, own = read(array(["run", "spec.toml"], ResourcesSpec(**resources), 2))
    assert options == ["--array=1-2", *asked]
    assert own.endswith(f" --jobs {jobs}")
