"""`[resources]`: what a run gets of a machine. Decides how fast it is, not what it is. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from crisp_attention.experiment.specification.section import Section


class ResourcesSpec(Section):
    """What each run gets of the machine that it is done on."""

    cpus: Annotated[int, Field(ge=1)] | None = Field(
        None, description="torch threads of a run (default: on this machine the cores are shared out, on Ray 1)"
    )
    # A run trains on one device.
    gpus: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="on Ray: the GPU, or a share of it, of a run")
