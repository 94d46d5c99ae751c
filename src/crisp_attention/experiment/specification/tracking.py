"""`[tracking]`: where runs are shown besides while they train. It changes no result, so it names no run."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from crisp_attention.experiment.specification.section import Section


class TrackingSpec(Section):
    """Trackers that the Trainer reports to."""

    report_to: tuple[str, ...] = Field(
        (), strict=False, description="integrations of the Trainer, as 'tensorboard', 'mlflow', 'wandb', 'trackio'"
    )


UNTRACKED: dict[str, Any] = TrackingSpec().model_dump(mode="json")
"""The section where nothing is said."""
