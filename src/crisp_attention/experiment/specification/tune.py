"""`[tune]`: which settings are searched for each arm before its seeds run, and with what budget. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_serializer, model_validator

from crisp_attention.config import SparsityConfig
from crisp_attention.errors import nearest
from crisp_attention.experiment.specification.section import Section

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

    def holds(self, value: float) -> bool:
        """Whether a search could have found this value."""
        low, high = self.ends
        return value in self.choices if self.choices else low <= value <= high

    def __str__(self) -> str:
        low, high = self.ends
        return ", ".join(f"{value:g}" for value in self.choices) if self.choices else f"{low:g} to {high:g}"


def fixed(attention: SparsityConfig, searched: Mapping[str, Range]) -> SparsityConfig:
    """Attention as it stands for all that a search may make of it: what is searched has its lowest value."""
    return attention.replace(sparsity=searched["sparsity"].ends[0]) if "sparsity" in searched else attention


class TuneSpec(Section):
    """The same budget for every arm, on data carved from the training split."""

    trials: Annotated[int, Field(ge=1, le=10_000)] = Field(20, description="trials of each arm, in all")
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

    @model_validator(mode="after")
    def _check_ranges(self) -> TuneSpec:
        if not self.ranges:
            raise ValueError(f"nothing is searched: give a range for one of {', '.join(_LIMITS)}")
        for name, found in self.ranges.items():
            limits = _LIMITS[name]
            least, most = (float(end) for end in limits[1:-1].split(","))
            for value in found.ends:
                if not least <= value < most or (value == least and limits[0] == "("):
                    raise ValueError(f"{name} must lie in {limits}, got {value:g}")
            if self.logarithmic(name) and found.low == 0:
                raise ValueError(f"{name} is searched on a logarithmic scale: low must be above 0, or list its values")
        return self

    @property
    def ranges(self) -> dict[str, Range]:
        """What is searched, in the order in which it is drawn."""
        found = {name: getattr(self, name) for name in _LIMITS}
        return {name: value for name, value in found.items() if value is not None}

    def logarithmic(self, name: str) -> bool:
        """Whether the range of a setting is searched on a logarithmic scale."""
        return name in _LOGARITHMIC

    def of(self, arm: ArmSpec) -> dict[str, Range]:
        """What is searched for an arm: all that applies to it, or what it names; empty if that is nothing.

        What an arm sets itself is not searched for it. Its sparsity is searched if that is the strength
        of its attention in training; settings of its own in evaluation stay as they are.

        Raises:
            ValueError: If it names a setting that cannot be searched for it.
        """
        own = arm.training.model_dump(exclude_none=True)
        sparse = arm.attention.active(training=True) and "sparsity" in arm.attention.strength
        fitting = {
            name: found for name, found in self.ranges.items() if (sparse if name == "sparsity" else name not in own)
        }
        if arm.tune is None:
            return fitting
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
            for value in searched["sparsity"].ends if "sparsity" in searched else ():
                arm.attention.replace(sparsity=value)
        if unused := [name for name in self.ranges if name not in used]:
            raise ValueError(f"tune.{unused[0]} is searched for no arm: leave it out, or give it an arm that takes it")
