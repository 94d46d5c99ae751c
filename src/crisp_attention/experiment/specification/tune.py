"""`[tune]`: which settings are searched for each arm before its seeds run, and with what budget. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_serializer, model_validator

from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError, nearest
from crisp_attention.experiment.specification.section import Section
from crisp_attention.schedule import Schedule
from crisp_attention.settings import require_choice
from crisp_attention.traits import RULES

if TYPE_CHECKING:
    from crisp_attention.experiment.specification.sections import ArmSpec

# What may be searched, in the order in which a search draws them: what arms have in common comes first, so that
# the first trials of two arms differ in nothing else. With the values that make sense, the ends not among them
# unless an interval is closed there.
_LIMITS: dict[str, str] = {
    "learning_rate": "(0, inf)",
    "weight_decay": "[0, inf)",
    "label_smoothing": "[0, 1)",
    "attention_dropout": "[0, 1)",
    "hidden_dropout": "[0, 1)",
    "sparsity": "(0, 1)",
}
_LOGARITHMIC = ("learning_rate", "weight_decay")
# Settings of attention that are no numbers: each changes what an arm is, so that an arm must ask for them by name.
_STRUCTURE = ("rule", "layers", "schedule")
_ATTENTION = ("sparsity", *_STRUCTURE)

ALL_LAYERS = "all"
"""Among the choices of `layers`: every layer."""

NO_SCHEDULE = "constant"
"""Among the choices of `schedule`: the sparsity stays what it is."""

Value = float | str | tuple[int, ...] | dict[str, Any]
"""What a search tries for one setting, as plain data."""


class Range(Section):
    """Where a setting is searched: anywhere between two values, or among several.

    In TOML `{ low = 1e-5, high = 1e-4 }` or a list.
    """

    low: float | None = None
    high: float | None = None
    choices: tuple[float, ...] = Field((), strict=False)

    @model_validator(mode="before")
    @classmethod
    def _take_list(cls, value: Any) -> Any:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return {"choices": value}
        if isinstance(value, Mapping) and (set(value) != {"low", "high"} or None in value.values()):
            raise ValueError(f"a range has low and high, or is a list of values; got {', '.join(value) or 'nothing'}")
        return value

    @model_validator(mode="after")
    def _check_order(self) -> Range:
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low:g} and {self.high:g}")
        if self.low is None and (len(self.choices) < 2 or list(self.choices) != sorted(set(self.choices))):
            raise ValueError(f"two or more different values are needed, rising; got {list(self.choices)}")
        return self

    @model_serializer
    def _as_written(self) -> Any:
        return list(self.choices) if self.choices else {"low": self.low, "high": self.high}

    @property
    def ends(self) -> tuple[float, float]:
        """Its lowest and its highest value."""
        if self.low is None or self.high is None:
            return self.choices[0], self.choices[-1]
        return self.low, self.high

    @property
    def samples(self) -> tuple[float, ...]:
        """Values that tell whether an arm takes all of them."""
        return self.ends

    def holds(self, value: object) -> bool:
        """Whether a search could have found this value."""
        low, high = self.ends
        return value in self.choices if self.choices else isinstance(value, int | float) and low <= value <= high

    def __str__(self) -> str:
        low, high = self.ends
        return ", ".join(map(told, self.choices)) if self.choices else f"{low:g} to {high:g}"


class Choices(Section):
    """Where a setting that is no number is searched: among several, which have no order.

    In TOML a list: rules by name; "all" or lists of layers; kinds of schedule by name, or their settings as a table.
    """

    samples: tuple[Any, ...] = Field(strict=False)

    @model_validator(mode="before")
    @classmethod
    def _take_list(cls, value: Any) -> Any:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(f"a list of what to choose from is needed, got {value!r}")
        return {"samples": tuple(tuple(item) if isinstance(item, list) else item for item in value)}

    @model_validator(mode="after")
    def _check_number(self) -> Choices:
        if len(self.samples) < 2 or len(set(map(encoded, self.samples))) < len(self.samples):
            raise ValueError(f"two or more different ones are needed, got {', '.join(map(told, self.samples))}")
        return self

    @model_serializer
    def _as_written(self) -> Any:
        return [list(item) if isinstance(item, tuple) else item for item in self.samples]

    def holds(self, value: object) -> bool:
        """Whether a search could have found this."""
        return value in self.samples

    def __str__(self) -> str:
        return "; ".join(map(told, self.samples))


Space = Range | Choices
"""Where one setting is searched."""


def encoded(value: Value) -> str:
    """What is tried for one setting, as a word that stands for it in a database."""
    return json.dumps(value, sort_keys=True)


def told(value: Value) -> str:
    """What is tried for one setting, as people read it: numbers to three digits."""
    if isinstance(value, dict):
        return " ".join([str(value["kind"]), *(f"{name} {item}" for name, item in value.items() if name != "kind")])
    if isinstance(value, tuple):
        return f"layer{'s' if len(value) > 1 else ''} {', '.join(map(str, value))}"
    return value if isinstance(value, str) else f"{value:.3g}"


def with_values(attention: SparsityConfig, values: Mapping[str, Value]) -> SparsityConfig:
    """Attention with what a search tries or has found; values of other settings are left alone.

    Raises:
        ConfigurationError: If a rule would ignore what the arm sets.
    """
    changes: dict[str, Any] = {name: value for name, value in values.items() if name in _ATTENTION}
    if changes.get("layers") == ALL_LAYERS:
        changes["layers"] = None
    if changes.get("schedule") == NO_SCHEDULE:
        changes["schedule"] = None
    elif isinstance(changes.get("schedule"), str):
        changes["schedule"] = {"kind": changes["schedule"]}
    if not changes:
        return attention
    # The defaults of one rule are no settings of another.
    return SparsityConfig.from_dict({**attention.changes(), **attention.strength, **changes})


def fixed(attention: SparsityConfig, searched: Mapping[str, Space]) -> SparsityConfig:
    """Attention as it stands for all that a search may make of it: what is searched has its first value."""
    return with_values(attention, {name: space.samples[0] for name, space in searched.items()})


USUAL_TRIALS = 20


class TuneSpec(Section):
    """The same budget for every arm, on data carved from the training split."""

    trials: Annotated[int, Field(ge=1, le=10_000)] = Field(USUAL_TRIALS, description="trials of each arm, in all")
    share: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="of the training split, held out to judge them")
    epochs: Annotated[int, Field(ge=1)] | None = Field(None, description="of each trial (default: those of training)")
    seed: Annotated[int, Field(ge=0, lt=2**32 - 10_000)] = Field(
        100_000, description="of the search, and of the training in every trial: none that the arms' runs have"
    )
    learning_rate: Range | None = None
    weight_decay: Range | None = None
    label_smoothing: Range | None = None
    attention_dropout: Range | None = None
    hidden_dropout: Range | None = None
    sparsity: Range | None = Field(None, description="in training, of arms whose strength it is")
    rule: Choices | None = Field(None, description="of arms that name it in their own tune, as the two below")
    layers: Choices | None = Field(None, description="which are sparse: 'all', or a list of their numbers")
    schedule: Choices | None = Field(None, description="of sparsity over training: kinds, or tables of settings")
    pruning: bool = Field(False, description="stop trials that are worse than the median of those before them")
    seeds_per_trial: Annotated[int, Field(ge=1, le=100)] = Field(
        1, description="trainings of each trial, which is judged by their mean loss; their seeds follow the seed above"
    )

    @model_validator(mode="after")
    def _check_ranges(self) -> TuneSpec:
        if not self.ranges:
            raise ValueError(f"nothing is searched: give a range for one of {', '.join((*_LIMITS, *_STRUCTURE))}")
        for name, limits in _LIMITS.items():
            found: Range | None = getattr(self, name)
            if found is None:
                continue
            least, most = (float(end) for end in limits[1:-1].split(","))
            for value in found.ends:
                if not least <= value < most or (value == least and limits[0] == "("):
                    raise ValueError(f"{name} must lie in {limits}, got {value:g}")
            if self.logarithmic(name) and found.low == 0:
                raise ValueError(f"{name} is searched on a logarithmic scale: low must be above 0, or list its values")
        for rule in self.rule.samples if self.rule else ():
            require_choice("rule", rule, [name for name, traits in RULES.items() if "sparsity" in traits.strengths])
        for name in _STRUCTURE[1:]:
            space: Choices | None = getattr(self, name)
            for value in space.samples if space else ():
                _check_attention(name, value)
        return self

    @property
    def seeds(self) -> range:
        """With which each trial is trained: the same for all, so that trials differ by what is tried, not by luck."""
        return range(self.seed, self.seed + self.seeds_per_trial)

    @property
    def ranges(self) -> dict[str, Space]:
        """What is searched, in the order in which it is drawn."""
        found = {name: getattr(self, name) for name in (*_LIMITS, *_STRUCTURE)}
        return {name: value for name, value in found.items() if value is not None}

    def logarithmic(self, name: str) -> bool:
        """Whether the range of a setting is searched on a logarithmic scale."""
        return name in _LOGARITHMIC

    def of(self, arm: ArmSpec) -> dict[str, Space]:
        """What is searched for an arm: all that applies to it, or what it names; empty if that is nothing.

        What an arm sets itself is not searched for it. Its sparsity is searched if that is the strength
        of its attention in training; settings of its own in evaluation stay as they are. Rule, layers and schedule
        are searched for arms that name them.

        Raises:
            ValueError: If it names a setting that cannot be searched for it.
        """
        own = arm.training.model_dump(exclude_none=True)
        own |= {name: True for name in _STRUCTURE[1:] if getattr(arm.attention, name) is not None}
        sparse = arm.attention.active(training=True) and "sparsity" in arm.attention.strength
        fitting = {
            name: found for name, found in self.ranges.items() if name not in own and (sparse or name not in _ATTENTION)
        }
        if arm.tune is None:
            return {name: found for name, found in fitting.items() if name not in _STRUCTURE}
        for name in arm.tune:
            if name not in self.ranges:
                raise ValueError(f"arm {arm.name!r}: [tune] has no range of {name!r}. {nearest(name, self.ranges)}")
            if name not in fitting:
                why = "it sets that itself" if name in own else "it is not sparse by that in training"
                raise ValueError(f"arm {arm.name!r}: {name} cannot be searched, {why}")
        return {name: found for name, found in fitting.items() if name in arm.tune}

    def check(self, arms: Sequence[ArmSpec]) -> None:
        """Make sure that every range serves an arm, and that every arm takes its ends.

        Raises:
            ValueError: If not.
        """
        used: set[str] = set()
        for arm in arms:
            searched = self.of(arm)
            used |= searched.keys()
            for name, space in searched.items():
                for value in space.samples:
                    try:
                        with_values(fixed(arm.attention, searched), {name: value})
                    except ConfigurationError as error:
                        raise ValueError(f"arm {arm.name!r} with {name} {told(value)}: {error}") from None
        if unused := [name for name in self.ranges if name not in used]:
            asked = " and names it in its tune" if unused[0] in _STRUCTURE else ""
            raise ValueError(
                f"tune.{unused[0]} is searched for no arm: leave it out, or give it an arm that takes it{asked}"
            )


def _check_attention(name: str, value: Value) -> None:
    """Make sure that layers or a schedule can be chosen.

    Raises:
        ValueError: If not.
    """
    if name == "schedule" and isinstance(value, dict):
        Schedule.from_dict(value)
    elif name == "schedule" and isinstance(value, str):
        Schedule(value)
    elif name == "layers" and isinstance(value, tuple):
        SparsityConfig(sparsity=0.5, layers=value)
    elif name == "schedule" or value != ALL_LAYERS:
        expected = "'all' or lists of numbers" if name == "layers" else "kinds by name or tables of settings"
        raise ValueError(f"{name} are {expected}, got {value!r}")
