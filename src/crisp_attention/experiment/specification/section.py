"""What all sections of a specification have in common. Imports no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A table of a specification's TOML file: frozen, and no key but those it knows."""

    # Strict: "3" or true is no number of seeds.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
