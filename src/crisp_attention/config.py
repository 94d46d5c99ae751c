"""`SparsityConfig`: which attention scores survive, and when. All defaults live here.

This module imports neither torch nor transformers, so that records, statistics and the command
line's help can use it anywhere.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from crisp_attention.errors import ConfigurationError, nearest


class RuleTraits(NamedTuple):
    """What the rest of the package must know of a rule without running it.

    Attributes:
        causal: Whether the rule may serve a causal model. A threshold over a whole causal matrix
            would let later tokens change earlier outputs, so such rules may not.
        settings: The optional settings that the rule reads; it refuses all others.
        paper: Where the rule comes from.
    """

    causal: bool
    settings: frozenset[str]
    paper: str


RULES: dict[str, RuleTraits] = {
    "percentile": RuleTraits(
        causal=False,
        settings=frozenset({"count_padding"}),
        paper="Crisp Attention, arXiv 2508.06016: one threshold per head and example",
    ),
    "random": RuleTraits(
        causal=True,
        settings=frozenset({"count_padding", "scope", "seed"}),
        paper="control: as many pairs survive as under topk (or percentile), chosen at random",
    ),
    "topk": RuleTraits(
        causal=True,
        settings=frozenset({"count_padding"}),
        paper="Explicit Sparse Transformer, arXiv 1912.11637: the best keys of each query",
    ),
}

APPLY = ("always", "eval", "train")
SCOPES = ("matrix", "row")


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class SparsityConfig:
    """Which attention scores survive the softmax, and when.

    Frozen and validated on construction; `to_dict` and `from_dict` round-trip through JSON. Each
    field carries its help text in `metadata["help"]`.

    Raises:
        ConfigurationError: If a value is out of range or the rule would ignore a setting.
    """

    sparsity: float = _setting(0.8, "share of valid scores to remove, in [0, 1); 0 is dense attention")
    rule: str = _setting("topk", "which scores survive: percentile (the paper), topk, random (control)")
    min_keep: int = _setting(1, "keys that each valid query keeps whatever the threshold, >= 1")
    apply: str = _setting("always", "when attention is sparse: always, train or eval (dense otherwise)")
    count_padding: bool = _setting(
        False, "count padding pairs as lowest scores, as a naive percentile does; depends on padding"
    )
    scope: str | None = _setting(
        None, "random only: draw per query 'row' (as topk, the default) or per head 'matrix' (as percentile)"
    )
    seed: int | None = _setting(None, "random only: seed of its own random stream (default 0)")

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ConfigurationError(f"Unknown rule {self.rule!r}. {nearest(str(self.rule), RULES)}")
        _require_real("sparsity", self.sparsity)
        if not 0.0 <= self.sparsity < 1.0:
            raise ConfigurationError(
                f"sparsity must be in [0, 1) (a share of removed scores, 0.8 removes 80%), got {self.sparsity!r}."
            )
        object.__setattr__(self, "sparsity", float(self.sparsity))
        if isinstance(self.min_keep, bool) or not isinstance(self.min_keep, int) or self.min_keep < 1:
            raise ConfigurationError(f"min_keep must be an integer >= 1, got {self.min_keep!r}.")
        if self.apply not in APPLY:
            raise ConfigurationError(f"Unknown apply {self.apply!r}. {nearest(str(self.apply), APPLY)}")
        if not isinstance(self.count_padding, bool):
            raise ConfigurationError(f"count_padding must be true or false, got {self.count_padding!r}.")
        if self.scope is not None and self.scope not in SCOPES:
            raise ConfigurationError(f"Unknown scope {self.scope!r}. {nearest(str(self.scope), SCOPES)}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0):
            raise ConfigurationError(f"seed must be an integer >= 0, got {self.seed!r}.")
        self._refuse_ignored_settings()

    def _refuse_ignored_settings(self) -> None:
        optional = frozenset().union(*(traits.settings for traits in RULES.values()))
        for item in dataclasses.fields(self):
            if item.name not in optional or getattr(self, item.name) == item.default:
                continue
            if item.name not in RULES[self.rule].settings:
                readers = sorted(name for name, traits in RULES.items() if item.name in traits.settings)
                raise ConfigurationError(
                    f"Rule {self.rule!r} would ignore {item.name}={getattr(self, item.name)!r}; "
                    f"it is read by: {', '.join(readers)}."
                )

    @property
    def traits(self) -> RuleTraits:
        """What is known of this configuration's rule."""
        return RULES[self.rule]

    @property
    def removes(self) -> bool:
        """Whether this configuration removes anything at all."""
        return self.sparsity > 0.0

    def active(self, training: bool) -> bool:
        """Whether attention is sparse for a module in this mode.

        Args:
            training: The module's `training` flag.
        """
        return self.removes and self.apply in ("always", "train" if training else "eval")

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as a plain dict that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> SparsityConfig:
        """Build a configuration from a mapping, refusing unknown keys.

        Args:
            settings: Field names and values, as `to_dict` returns them.

        Raises:
            ConfigurationError: If a key is unknown or a value invalid.
        """
        if not isinstance(settings, Mapping):
            raise ConfigurationError(f"Expected a mapping of sparsity settings, got {type(settings).__name__}.")
        known = {item.name for item in dataclasses.fields(cls)}
        for key in settings:
            if key not in known:
                raise ConfigurationError(f"Unknown sparsity setting {key!r}. {nearest(str(key), known)}")
        return cls(**settings)

    def to_json(self) -> str:
        """Return the settings as canonical JSON (sorted keys)."""
        return json.dumps(self.to_dict(), sort_keys=True)

    def replace(self, **changes: Any) -> SparsityConfig:
        """Return a copy with some settings changed, validated anew."""
        return type(self).from_dict({**self.to_dict(), **changes})


def _require_real(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigurationError(f"{name} must be a finite number, got {value!r}.")
