"""The command to paste where Slurm, and no Ray, shares out the work."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crisp_attention.experiment.specification.resources import ResourcesSpec

_REPLACED = ("--shard", "--jobs")


def array(arguments: Sequence[str], resources: ResourcesSpec, shards: int) -> str:
    """A command that hands an experiment to Slurm as a job array, one shard a job.

    Args:
        arguments: What `crisp` was called with.
        resources: What each run gets.
        shards: How many jobs.
    """
    # Runs with a share of a GPU keep each other company on it.
    together = int(1 / resources.gpus + 1e-9) if resources.gpus else 1
    asked = [f"--array=1-{shards}", f"--cpus-per-task={together * (resources.cpus or 1)}"]
    if resources.gpus:
        asked.append(f"--gpus-per-task={math.ceil(resources.gpus)}")
    own = f"{shlex.join(['crisp', *_kept(arguments)])} --shard $SLURM_ARRAY_TASK_ID/{shards} --jobs {together}"
    # Quoted so that the shell of the job, and not the one that submits it, fills in the number.
    return f"sbatch {' '.join(asked)} --wrap {shlex.quote(own)}"


def _kept(arguments: Sequence[str]) -> list[str]:
    """The arguments without those that the array gives itself."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip or argument == "--dry-run" or argument.partition("=")[0] in _REPLACED:
            skip = not skip and argument in _REPLACED
        else:
            kept.append(argument)
    return kept
