"""How sparsity follows the progress of training: a pure function of a share in [0, 1].

Nothing here counts steps: the same progress always gives the same sparsity, so that resuming,
gradient accumulation, gradient checkpointing and several processes agree without any state.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crisp_attention.errors import ConfigurationError
from crisp_attention.settings import (
    known_keys,
    require_choice,
    require_integer,
    require_real,
    require_sparsity,
    resolve,
    setting,
    written,
)

# The settings that each kind reads beside `kind`, with their defaults.
_RAMP = {"begin": 0.0, "end": 1.0, "stagger": 0.0}
KINDS: dict[str, dict[str, Any]] = {
    "constant": {},
    "linear": {**_RAMP, "initial": 0.0},
    "cubic": {**_RAMP, "initial": 0.0},
    "anneal": {**_RAMP, "final": 0.0},
    "stochastic": {"begin": 0.0, "end": 1.0, "low": 0.0, "seed": 0},
}


def require_progress(progress: object) -> float:
    """The share of training that is done as a float, or `ConfigurationError`."""
    done = require_real("progress", progress)
    if not 0.0 <= done <= 1.0:
        raise ConfigurationError(
            f"progress is the share of training that is done, in [0, 1], got {progress!r}. Give step / total_steps, "
            "and 1.0 from the last step on: past its end a schedule stands where it ended."
        )
    return done


def _require_moment(name: str, value: object) -> float:
    moment = require_real(f"schedule {name}", value)
    if not 0.0 <= moment <= 1.0:
        raise ConfigurationError(
            f"schedule {name} is a share of training, in [0, 1], got {value!r}. Divide a step by the number of steps."
        )
    return moment


@dataclass(frozen=True)
class Schedule:
    """The sparsity at each moment of training, from the configuration's own sparsity, the target.

    - constant: the target throughout.
    - linear: from `initial` at `begin` to the target at `end`, in a straight line.
    - cubic: the same ends, `target + (initial - target) * (1 - t)^3`: fast at first, slow near the
      target (Zhu & Gupta, To prune or not to prune, arXiv 1710.01878).
    - anneal: from the target at `begin` to `final` (0: dense) at `end`, in a straight line.
    - stochastic: drawn anew each step, uniformly between `low` and the target, from a generator of
      its own; `low` before `begin`, the target from `end` on. All layers share the draw.

    Before `begin` and after `end` the sparsity stays what it is there. With `stagger`, the ramp of
    the last layer begins (and ends) that much later than the first layer's, those between in
    proportion; a negative one lets the last layer begin first.

    Raises:
        ConfigurationError: If a value is out of range or the kind would ignore a setting.
    """

    kind: str = setting("constant", "constant, linear, cubic, anneal (to dense) or stochastic")
    begin: float | None = setting(None, "where the change begins, as a share of training (default 0)")
    end: float | None = setting(None, "where it is complete, as a share of training (default 1)")
    initial: float | None = setting(None, "linear and cubic: sparsity up to `begin` (default 0)")
    final: float | None = setting(None, "anneal: sparsity from `end` on (default 0, dense)")
    low: float | None = setting(None, "stochastic: lower end of the range; the upper is the sparsity (default 0)")
    stagger: float | None = setting(None, "how much later the last layer's ramp is than the first's (default 0)")
    seed: int | None = setting(None, "stochastic: seed of its own generator (default 0)")

    def __post_init__(self) -> None:
        require_choice("schedule kind", self.kind, KINDS)
        resolve(self, "Schedule", self.kind, KINDS)
        for name in ("begin", "end"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _require_moment(name, getattr(self, name)))
        for name in ("initial", "final", "low"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, require_sparsity(f"schedule {name}", getattr(self, name)))
        if self.seed is not None:
            require_integer("schedule seed", self.seed, 0)
        if self.begin is not None and self.end is not None and self.begin > self.end:
            raise ConfigurationError(
                f"schedule begin={self.begin:g} lies after end={self.end:g}; both are shares of training. "
                f"Choose begin <= {self.end:g}, or a later end."
            )
        if self.stagger is not None and self.end is not None:
            stagger = require_real("schedule stagger", self.stagger)
            if self.end + abs(stagger) > 1.0:
                raise ConfigurationError(
                    f"With end={self.end:g} and stagger={stagger:g} the latest ramp would end at "
                    f"{self.end + abs(stagger):g}, past the end of training, and its layer would never come to its "
                    "sparsity. Choose them so that end plus stagger (without its sign) is at most 1."
                )
            object.__setattr__(self, "stagger", stagger)

    def sparsity(self, target: float, progress: float, depth: float = 0.0) -> float:
        """Sparsity at one moment of training.

        Args:
            target: The configuration's sparsity, in [0, 1).
            progress: Share of training that is done, in [0, 1].
            depth: The layer's place, 0 for the first and 1 for the last.

        Raises:
            ConfigurationError: If `progress` is not a share.
        """
        progress = require_progress(progress)
        if self.kind == "constant":
            return target
        begin, end = self._ramp(depth)
        if self.kind == "stochastic":
            low = self.low or 0.0
            if progress < begin:
                return low
            if progress >= end:
                return target
            return random.Random(f"{self.seed}:{progress!r}").uniform(low, target)
        share = min(max((progress - begin) / (end - begin), 0.0), 1.0) if end > begin else float(progress >= end)
        if self.kind == "anneal":
            return target * (1.0 - share) + (self.final or 0.0) * share
        remaining = (1.0 - share) ** (3 if self.kind == "cubic" else 1)
        return (self.initial or 0.0) * remaining + target * (1.0 - remaining)

    def _ramp(self, depth: float) -> tuple[float, float]:
        stagger = self.stagger or 0.0
        # A negative stagger keeps the last layer at `begin` and delays the first.
        delay = stagger * depth if stagger >= 0 else -stagger * (1.0 - depth)
        return (self.begin or 0.0) + delay, (self.end if self.end is not None else 1.0) + delay

    def __repr__(self) -> str:
        return written(self, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The settings that this kind reads, as a plain dict that JSON can hold."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Schedule:
        """Build a schedule from a mapping, refusing unknown keys.

        Raises:
            ConfigurationError: If a key is unknown or a value invalid.
        """
        return cls(**known_keys(cls, settings, "schedule setting"))
