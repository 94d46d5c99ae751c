"""`SparsityConfig`: which attention scores survive, where and when. All defaults live here.

This module imports neither torch nor transformers, so that records, statistics and the command
line's help can use it anywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crisp_attention.errors import ConfigurationError
from crisp_attention.representation import card, table
from crisp_attention.schedule import Schedule
from crisp_attention.settings import (
    known_keys,
    require_choice,
    require_flag,
    require_integer,
    require_real,
    require_sparsity,
    resolve,
    setting,
    written,
)
from crisp_attention.traits import RULES, RuleTraits

APPLY = ("always", "eval", "train")
GRADIENTS = ("selected", "straight_through")
SCOPES = ("matrix", "pair", "row")

SETTINGS = "crisp_attention"
"""The name under which a model keeps its settings: in a Transformers model's config, in a module's state."""


@dataclass(frozen=True)
class SparsityConfig:
    """Which attention scores survive the softmax, in which layers and heads, and when.

    Frozen and validated on construction; `to_dict` and `from_dict` round-trip through JSON. Each
    field carries its help text in `metadata["help"]`. A setting that the rule does not read is None,
    and so is one that another of its strengths replaces.

    Raises:
        ConfigurationError: If a value is out of range or the rule would ignore a setting.
    """

    sparsity: float | None = setting(
        None, "share of valid scores to remove, in [0, 1); 0 is dense attention (default 0.8; 0.5 for nm)"
    )
    rule: str = setting("topk", f"which scores survive: {', '.join(RULES)}")
    apply: str = setting("always", "when attention is sparse: always, train or eval (dense otherwise)")
    layers: tuple[int, ...] | None = setting(
        None, "attention layers that are sparse, counted from 0 as they run, negative from the last; all if not given"
    )
    heads: tuple[int, ...] | None = setting(
        None, "query heads that are sparse, in each of those layers; all if not given"
    )
    layer_sparsity: tuple[float, ...] | None = setting(
        None, "a sparsity for each attention layer as they run, in place of `sparsity`; 0 leaves a layer dense"
    )
    schedule: Schedule | None = setting(
        None, "how sparsity follows the progress of training: a Schedule or its settings"
    )
    min_keep: int | None = setting(None, "keys that each valid query keeps whatever the rule says, >= 1 (default 1)")
    keep_first: int | None = setting(
        None, "first valid keys that always survive, as [CLS] or an attention sink; part of the kept count (default 0)"
    )
    keep_self: bool | None = setting(None, "let each query keep its own key; part of the kept count (default false)")
    gradient: str | None = setting(
        None, "whose scores get gradients: 'selected' (survivors) or 'straight_through' (as if dense)"
    )
    count_padding: bool | None = setting(
        None, "count padding pairs as lowest scores, as a naive percentile does; depends on padding"
    )
    scope: str | None = setting(
        None,
        "random: as many survivors per 'row' as topk (default) or 'matrix' as percentile, or each 'pair' removed "
        "independently with probability `sparsity` (DropKey)",
    )
    seed: int | None = setting(None, "random: seed of its own random stream (default 0)")
    p: float | None = setting(None, "top_p: share of a query's attention that survives, in (0, 1) (default 0.9)")
    m: int | None = setting(None, "nm: consecutive keys in a group, >= 2 (default 4; 2:4 is sparsity 0.5)")
    window: int | None = setting(None, "window: keep keys up to this many tokens away, in place of `sparsity`")
    stride: int | None = setting(None, "window: keep also keys at every multiple of this distance; needs `window`")
    query_block: int | None = setting(None, "block_topk: queries in a block (default 16); 1 for causal models")
    key_block: int | None = setting(None, "block_topk: keys in a block (default 16)")
    drop: int | None = setting(None, "drop_topk: best keys that each query loses, >= 1 (default 1)")
    entropy: float | None = setting(
        None, "temperature: target entropy of a query's attention in nats, > 0, in place of `sparsity`"
    )

    def __post_init__(self) -> None:
        require_choice("rule", self.rule, RULES)
        require_choice("apply", self.apply, APPLY)
        self._choose_strength()
        resolve(self, "Rule", self.rule, {name: _without_strengths(traits) for name, traits in RULES.items()})
        for name, check in _CHECKS.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check(name, getattr(self, name)))
        self._check_combinations()

    def _choose_strength(self) -> None:
        """Put exactly one strength in force, or refuse."""
        strengths = self.traits.strengths
        for name in ("sparsity", "layer_sparsity", "p", "window", "drop", "entropy"):
            allowed = strengths if name != "layer_sparsity" else ("layer_sparsity",) * ("sparsity" in strengths)
            if getattr(self, name) is not None and name not in allowed:
                readers = sorted(rule for rule, traits in RULES.items() if _base(name) in traits.strengths)
                own = f"it is set by {' or '.join(strengths)}" if strengths else "it has no strength to set"
                raise ConfigurationError(
                    f"Rule {self.rule!r} would ignore {name}={getattr(self, name)!r}; {own}. {name} is read by: "
                    f"{', '.join(readers)}."
                )
        given = [name for name in (*strengths, "layer_sparsity") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigurationError(f"Give one of {', '.join(given)}: each says how much rule {self.rule!r} removes.")
        if not given and strengths:
            object.__setattr__(self, strengths[0], self.traits.settings[strengths[0]])

    def _check_combinations(self) -> None:
        if self.layers is not None and self.layer_sparsity is not None:
            raise ConfigurationError("Give layers or layer_sparsity, not both; a layer_sparsity of 0 is a dense layer.")
        if self.stride is not None and self.window is None:
            raise ConfigurationError(f"stride={self.stride} needs a fixed window: set window in place of sparsity.")
        if self.scope == "pair" and self.count_padding:
            raise ConfigurationError("scope='pair' draws for each pair alone and counts none; leave out count_padding.")
        if self.schedule is None:
            return
        if self.sparsity is None and self.layer_sparsity is None:
            raise ConfigurationError(f"A schedule moves the sparsity, which rule {self.rule!r} is not set by here.")
        if not self.removes:
            raise ConfigurationError(
                "A schedule leads to the sparsity, which is 0 here: attention would be dense throughout. Give the "
                "highest sparsity, and kind='anneal' to end dense."
            )
        # A layer whose own sparsity is 0 stays dense and follows no schedule.
        least = min(share for share in self.layer_sparsity or (self.sparsity,) if share)
        if self.schedule.final is not None and self.schedule.final > least:
            raise ConfigurationError(
                f"The schedule anneals from the sparsity {least:g} down to final={self.schedule.final:g}, which is "
                "higher. Give a lower final, or kind='linear' to rise."
            )
        if self.schedule.low is not None and self.schedule.low > least:
            raise ConfigurationError(
                f"The stochastic schedule draws between low={self.schedule.low:g} and the sparsity {least:g}, "
                "which is smaller."
            )

    @property
    def traits(self) -> RuleTraits:
        """What is known of this configuration's rule."""
        return RULES[self.rule]

    @property
    def strength(self) -> dict[str, Any]:
        """The setting that says how much is removed, by name; empty for a rule that has none."""
        values = self.to_dict()
        return {name: values[name] for name in (*self.traits.strengths, "layer_sparsity") if name in values}

    @property
    def removes(self) -> bool:
        """Whether this configuration changes attention at all."""
        return self.sparsity != 0.0 and (self.layer_sparsity is None or any(self.layer_sparsity))

    @property
    def per_row(self) -> bool:
        """Whether a query's survivors depend on that query and what it may see alone, as causal models need."""
        if self.count_padding:
            return False  # how many keys are hidden, its future among them, decides how many survive
        if self.rule == "random":
            return self.scope != "matrix"
        if self.rule == "block_topk":
            return self.query_block == 1
        return self.traits.per_row

    @property
    def by_position(self) -> bool:
        """Whether survivors depend on where a query stands among the keys, not on scores alone."""
        blocks = self.rule == "block_topk" and self.query_block != 1
        return bool(self.keep_self) or self.rule in ("random", "window") or blocks

    @property
    def by_key_position(self) -> bool:
        """Whether survivors depend on where keys stand."""
        return self.by_position or bool(self.keep_first) or self.rule in ("nm", "block_topk")

    def active(self, training: bool) -> bool:
        """Whether attention is sparse for a module in this mode.

        Args:
            training: The module's `training` flag.
        """
        return self.removes and self.apply in ("always", "train" if training else "eval")

    def for_layer(self, index: int, count: int) -> SparsityConfig | None:
        """The settings of one attention layer: without `layers` and `layer_sparsity`.

        Args:
            index: Its place as the layers run, from 0.
            count: How many attention layers there are.

        Returns:
            Its settings, or None if it stays dense.

        Raises:
            ConfigurationError: If `layers` or `layer_sparsity` do not fit the number of layers.
        """
        if self.layers is not None:
            wrong = [layer for layer in self.layers if not -count <= layer < count]
            if wrong:
                raise ConfigurationError(
                    f"layers={list(self.layers)} names {wrong[0]}, but this model has {count} attention layers, "
                    f"0 to {count - 1} (or -{count} to -1)."
                )
            if index not in {layer % count for layer in self.layers}:
                return None
        if self.layer_sparsity is None:
            return self if self.layers is None else self.replace(layers=None)
        if len(self.layer_sparsity) != count:
            raise ConfigurationError(
                f"layer_sparsity has {len(self.layer_sparsity)} values, but this model has {count} attention layers."
            )
        own = self.layer_sparsity[index]
        return self.replace(layer_sparsity=None, sparsity=own) if own > 0.0 else None

    def to_dict(self) -> dict[str, Any]:
        """The settings in force as a plain dict that JSON can hold; those not read are left out."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values["schedule"] = None if self.schedule is None else self.schedule.to_dict()
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None
        }

    def changes(self) -> dict[str, Any]:
        """Of `to_dict`, what differs from the rule's defaults: the shortest way to write it."""
        return {
            name: value
            for name, value in self.to_dict().items()
            if (name == "rule" and value != "topk")
            or (name == "apply" and value != "always")
            or (name not in ("rule", "apply") and value != self.traits.settings.get(name))
        }

    def essence(self) -> dict[str, Any]:
        """What a reader wants to know: the rule, its strength, and what differs from the rule's defaults."""
        return {"rule": self.rule, **self.strength, **self.changes()}

    def __repr__(self) -> str:
        return written(self, self.essence())

    def _repr_html_(self) -> str:
        values = self.to_dict()
        help_of = {item.name: item.metadata["help"] for item in dataclasses.fields(self)}
        # What sets this configuration apart comes first.
        order = dict.fromkeys((*self.essence(), *values))
        rows = [(name, str(values[name]), help_of[name]) for name in order]
        return card("SparsityConfig", table(("setting", "value", "meaning"), rows, prose=("value", "meaning")))

    def identity(self) -> dict[str, Any]:
        """What tells this configuration from others, in a form that later releases keep; `from_dict` reads it.

        A setting that a release adds stands in it only where it differs from its default, so that
        what was recorded before keeps its name.
        """
        read = {"apply", "rule", *self.traits.settings}
        return {**{name: value if name in read else None for name, value in _FIRST.items()}, **self.essence()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> SparsityConfig:
        """Build a configuration from a mapping, refusing unknown keys.

        Args:
            settings: Field names and values, as `to_dict` returns them.

        Raises:
            ConfigurationError: If a key is unknown or a value invalid.
        """
        return cls(**known_keys(cls, settings, "sparsity setting"))

    def replace(self, **changes: Any) -> SparsityConfig:
        """Return a copy with some settings changed, validated anew; None takes one back."""
        return type(self).from_dict({**self.to_dict(), **changes})


def _base(strength: str) -> str:
    return "sparsity" if strength == "layer_sparsity" else strength


def _without_strengths(traits: RuleTraits) -> dict[str, Any]:
    return {name: default for name, default in traits.settings.items() if name not in traits.strengths}


def _integer(least: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        require_integer(name, value, least)
        return int(value)

    return check


def _seed(name: str, value: Any) -> int:
    require_integer(name, value, 0)
    if value >= 2**32:
        raise ConfigurationError(f"{name} must be less than 2**32 = {2**32}, got {value!r}.")
    return int(value)


def _choice(choices: tuple[str, ...]) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        require_choice(name, value, choices)
        return str(value)

    return check


def _flag(name: str, value: Any) -> bool:
    require_flag(name, value)
    return bool(value)


def _mass(name: str, value: Any) -> float:
    mass = require_real(name, value)
    if not 0.0 < mass < 1.0:
        raise ConfigurationError(f"{name} must be in (0, 1) (a share of the attention, 0.9 keeps 90%), got {value!r}.")
    return mass


def _positive(name: str, value: Any) -> float:
    number = require_real(name, value)
    if number <= 0.0:
        raise ConfigurationError(f"{name} must be greater than 0, got {value!r}.")
    return number


def _sequence(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ConfigurationError(f"{name} must be a list with at least one number, got {value!r}.")
    return tuple(value)


def _layers(name: str, value: Any) -> tuple[int, ...]:
    indices = _sequence(name, value)
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int):
            raise ConfigurationError(f"{name} must hold integers, got {index!r} in {list(indices)!r}.")
    return indices


def _heads(name: str, value: Any) -> tuple[int, ...]:
    indices = _layers(name, value)
    if min(indices) < 0 or len(set(indices)) < len(indices):
        raise ConfigurationError(f"{name} must hold different integers >= 0, got {list(indices)!r}.")
    return indices


def _layer_sparsity(name: str, value: Any) -> tuple[float, ...]:
    return tuple(require_sparsity(name, item) for item in _sequence(name, value))


def _schedule(name: str, value: Any) -> Schedule:
    return value if isinstance(value, Schedule) else Schedule.from_dict(value)


# The settings of the first release, with what they were where nothing was said; see `identity`.
_FIRST = {"apply": "always", "count_padding": False, "min_keep": 1, "rule": "topk", "scope": None, "seed": None}

# How each setting is checked and brought to its type; `rule` and `apply` come before all others.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "sparsity": require_sparsity,
    "layers": _layers,
    "heads": _heads,
    "layer_sparsity": _layer_sparsity,
    "schedule": _schedule,
    "min_keep": _integer(1),
    "keep_first": _integer(0),
    "keep_self": _flag,
    "gradient": _choice(GRADIENTS),
    "count_padding": _flag,
    "scope": _choice(SCOPES),
    "seed": _seed,
    "p": _mass,
    "m": _integer(2),
    "window": _integer(0),
    "stride": _integer(2),
    "query_block": _integer(1),
    "key_block": _integer(1),
    "drop": _integer(1),
    "entropy": _positive,
}
