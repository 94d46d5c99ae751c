"""Where runs are done: on worker processes of this machine, by those of a launcher, or on a Ray cluster.

Imports neither torch nor Ray.
"""

from __future__ import annotations

import importlib.util

from crisp_attention.errors import ConfigurationError, nearest
from crisp_attention.experiment.execution.distributed import LaunchedExecutor
from crisp_attention.experiment.execution.executor import Executor
from crisp_attention.experiment.execution.local import LocalExecutor
from crisp_attention.experiment.execution.ray_cluster import RayExecutor
from crisp_attention.experiment.results.provenance import launch
from crisp_attention.experiment.specification.resources import ResourcesSpec

_REMOTE = "ray://"


def choose(on: str, resources: ResourcesSpec) -> Executor:
    """The executor of a name.

    Args:
        on: "local", which under a launcher is its processes, each run by all of them; "ray", for the cluster that
            RAY_ADDRESS names, else one that runs on this machine, else one that is started here for as long as it
            takes; or "ray://HOST:PORT", for the client port of a cluster elsewhere.
        resources: What each run gets.

    Raises:
        ConfigurationError: If there is none of that name, Ray is not installed, or it is not "local" under a
            launcher.
    """
    if launch() is not None:
        if on != "local":
            raise ConfigurationError(
                f"--on {on} has runs done elsewhere, but a launcher has started processes here to train each run "
                "together. Leave out one of the two."
            )
        return LaunchedExecutor(resources)
    if on == "local":
        return LocalExecutor(resources)
    if on != "ray" and not on.startswith(_REMOTE):
        raise ConfigurationError(f"Unknown executor --on {on!r}. {nearest(on, ('local', 'ray', 'ray://HOST:PORT'))}")
    if importlib.util.find_spec("ray") is None:
        raise ConfigurationError(f"--on {on} needs the package ray: pip install 'crisp-attention[ray]'.")
    return RayExecutor(on if on.startswith(_REMOTE) else None, resources)
