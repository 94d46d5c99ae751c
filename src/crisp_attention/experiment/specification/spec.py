"""`ExperimentSpec`: a TOML file that says which arms are trained on which data with which seeds.

Imports no torch, so that plans and reports need none.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from crisp_attention.errors import ConfigurationError, CrispError, nearest
from crisp_attention.experiment.specification.mistakes import told
from crisp_attention.experiment.specification.resources import ResourcesSpec
from crisp_attention.experiment.specification.section import Section
from crisp_attention.experiment.specification.sections import (
    ATTENTION_FIELDS,
    ArmSpec,
    ArmTrainingSpec,
    DataSpec,
    EvaluationSpec,
    PrimarySpec,
    TrainingSpec,
    VarySpec,
    without_later,
)
from crisp_attention.experiment.specification.tracking import UNTRACKED, TrackingSpec
from crisp_attention.experiment.specification.tune import Space, TuneSpec, fixed

USUAL_SEEDS = 10
MAX_SEEDS = 1000
"""Most seeds that an experiment may ask for."""

INCIDENTAL = ("name", "description", "choices", "seeds", "resources", "tracking")
"""Keys that do not decide what a run is."""


class ExperimentSpec(Section):
    """Arms x seeds on one data set and one model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)]
    description: str = ""
    choices: tuple[str, ...] = Field(
        (), strict=False, description="settings that are our choice, not a source's; shown in the report"
    )
    model: str = Field(description="a packaged model, 'tiny-vit' from scratch, a folder with weights, or a hub name")
    seeds: Annotated[int, Field(ge=1, le=MAX_SEEDS)] = Field(USUAL_SEEDS, description="runs per arm, seeds 0, 1, ...")
    primary: PrimarySpec
    data: DataSpec
    training: TrainingSpec = TrainingSpec()
    arms: Annotated[tuple[ArmSpec, ...], Field(min_length=2, strict=False)]
    vary: VarySpec | None = Field(None, description="a property of the training data to vary; see VarySpec")
    evaluations: tuple[EvaluationSpec, ...] = Field((), strict=False, description="more evaluations of each model")
    looks: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        strict=False,
        description="planned looks: numbers of seeds at which to test, `seeds` among them",
    )
    tune: TuneSpec | None = Field(None, description="what is searched for each arm before its seeds run; see TuneSpec")
    resources: ResourcesSpec = Field(ResourcesSpec(), description="what each run gets of a machine; see ResourcesSpec")
    tracking: TrackingSpec = Field(TrackingSpec(), description="where runs are shown besides; see TrackingSpec")

    @model_validator(mode="after")
    def _check_arms(self) -> ExperimentSpec:
        names = [arm.name for arm in self.arms]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"arm names must differ; repeated: {', '.join(repeated)}")
        if self.tune is not None and self.data.validation_share is not None:
            raise ValueError("[tune] carves off a validation part of its own: leave data.validation_share out")
        if self.tune is not None and self.tune.pruning and not self.training.curves:
            raise ValueError("tune.pruning compares trials after every epoch: leave training.curves = false out")
        if self.tune is not None:
            self.tune.check(self.arms)
        elif named := [arm.name for arm in self.arms if arm.tune is not None]:
            raise ValueError(f"arm {named[0]!r} says what to tune, but there is no [tune]")
        twins: dict[str, str] = {}
        for arm in self.arms:
            searched = self.searched(arm)
            # Settings that remove nothing are all the same attention.
            attention = fixed(arm.attention, searched) if arm.attention.removes else None
            evaluation = arm.evaluate if arm.evaluate is not None and arm.evaluate.removes else arm.evaluate is None
            training = self.training_of(arm)
            padding = arm.padding or self.data.padding
            same = repr((attention, evaluation, training, arm.seed_offset, padding, list(searched)))
            twin = twins.setdefault(same, arm.name)
            if twin != arm.name:
                raise ValueError(f"arms {twin!r} and {arm.name!r} are the same; an A/A arm needs a seed_offset")
        for role in ("arm", "baseline"):
            name = getattr(self.primary, role)
            if name not in names:
                raise ValueError(f"primary.{role} = {name!r} is not an arm. {nearest(name, names)}")
        if self.primary.arm == self.primary.baseline:
            raise ValueError("primary.arm and primary.baseline must differ")
        if self.vary is not None and getattr(self.data, self.vary.key):
            raise ValueError(f"vary.{self.vary.key} says it for each condition; leave data.{self.vary.key} out")
        if self.primary.condition is not None and self.primary.condition not in self.conditions():
            known = ", ".join(map(repr, self.conditions())) if self.vary else "there is no [vary]"
            raise ValueError(f"primary.condition = {self.primary.condition!r} is none of this experiment's: {known}")
        extra = [item.name for item in self.evaluations]
        if len(set(extra)) < len(extra) or {"running", "test", "train"} & set(extra):
            raise ValueError(
                f"names of evaluations must differ, and from 'running', 'test' and 'train'; got {', '.join(extra)}"
            )
        if self.looks and (list(self.looks) != sorted(set(self.looks)) or self.seeds not in self.looks):
            raise ValueError(
                f"looks must rise, and seeds = {self.seeds} be one of them: the look to go to; got {list(self.looks)}"
            )
        return self

    def conditions(self) -> dict[str, DataSpec]:
        """The data of each condition by its name, in order; one without a name where nothing varies."""
        if self.vary is None:
            return {"": self.data}
        key = self.vary.key
        return {f"{key}={_short(value)}": self.data.model_copy(update={key: value}) for value in self.vary.values}

    @property
    def primary_condition(self) -> str:
        """The condition in which the primary contrast is made: the last one unless another is named."""
        return self.primary.condition or list(self.conditions())[-1]

    def epochs_in(self, condition: str) -> int:
        """For how many epochs the runs of a condition train."""
        if self.vary is None or self.vary.epochs is None:
            return self.training.epochs
        return dict(zip(self.conditions(), self.vary.epochs, strict=True))[condition]

    @property
    def epochs_of_trials(self) -> int:
        """For how many epochs the trials of a search train."""
        own = None if self.tune is None else self.tune.epochs
        return own or self.epochs_in(self.primary_condition)

    def training_of(self, arm: ArmSpec) -> TrainingSpec:
        """How an arm is trained: the experiment's training with the arm's own settings."""
        return self.training.model_copy(update=arm.training.model_dump(exclude_none=True))

    def searched(self, arm: ArmSpec) -> dict[str, Space]:
        """What is searched for an arm before its seeds run, by setting; empty where that is nothing."""
        return {} if self.tune is None else self.tune.of(arm)

    def arm(self, name: str) -> ArmSpec:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def identity(self) -> dict[str, Any]:
        """All that decides what the runs are, without how many there are, where data lie or who does them."""
        content = to_plain(self)
        for key in INCIDENTAL:
            content.pop(key, None)
        if self.tune is not None:
            # Like seeds, trials may become more.
            del content["tune"]["trials"]
        return content


def to_plain(spec: ExperimentSpec) -> dict[str, Any]:
    """The specification as JSON-ready data; `parse` reads it back."""
    content: dict[str, Any] = without_later(spec.model_dump(mode="json", exclude={"arms"}), _LATER)
    content["data"] = without_later(content["data"], _LATER_DATA)
    if spec.vary is not None:
        content["vary"] = without_later(content["vary"], _LATER_VARY)
    content["training"] = spec.training.identity()
    content["primary"] = without_later(content["primary"], _LATER_PRIMARY)
    if spec.evaluations:
        content["evaluations"] = [item.model_dump(mode="json", exclude_none=True) for item in spec.evaluations]
    if spec.tune is not None:
        content["tune"] = without_later(spec.tune.model_dump(mode="json", exclude_none=True), _LATER_TUNE)
    content["arms"] = []
    for arm in spec.arms:
        plain = arm.model_dump(mode="json", exclude={"attention", "evaluate", "training"})
        plain = without_later(plain, _LATER_ARM)
        plain["attention"] = arm.attention.to_dict()
        if own := arm.training.model_dump(mode="json", exclude_none=True):
            plain["training"] = own
        if arm.evaluate is not None:
            plain["evaluate"] = arm.evaluate.to_dict()
        content["arms"].append(plain)
    return content


def parse(content: Mapping[str, Any], origin: str) -> ExperimentSpec:
    """Build a specification from a mapping.

    Args:
        content: Keys as in the TOML file.
        origin: What to call it in errors.

    Raises:
        ConfigurationError: Naming each wrong key or value, with the nearest valid name.
    """
    try:
        return ExperimentSpec.model_validate(content)
    except ValidationError as error:
        raise ConfigurationError(f"{origin}: {told(error, content, _known_keys)}") from None
    except CrispError as error:
        raise ConfigurationError(f"{origin}: {error}") from None


def with_seeds(spec: ExperimentSpec, seeds: int | None) -> ExperimentSpec:
    """The experiment with another number of runs per arm; as it is where that is None.

    Raises:
        ConfigurationError: If it cannot have so many.
    """
    return spec if seeds is None else parse(to_plain(spec) | {"seeds": seeds}, f"seeds = {seeds}")


def read(path: Path) -> ExperimentSpec:
    """Read a specification from a TOML file.

    Raises:
        ConfigurationError: If the file is missing, not TOML, or invalid.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except FileNotFoundError:
        raise ConfigurationError(f"There is no specification {path}.") from None
    except OSError as error:
        raise ConfigurationError(f"The specification {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"The specification {path} is not UTF-8: {error.reason} at byte {error.start}."
        ) from None
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not valid TOML: {error}") from None
    return parse(content, str(path))


def presets() -> dict[str, ExperimentSpec]:
    """The specifications that ship with the package, by name."""
    folder = resources.files("crisp_attention.experiment.specification") / "presets"
    files = sorted((item for item in folder.iterdir() if item.name.endswith(".toml")), key=lambda item: item.name)
    return {
        item.name.removesuffix(".toml"): parse(tomllib.loads(item.read_text(encoding="utf-8")), f"preset {item.name}")
        for item in files
    }


def preset(name: str) -> ExperimentSpec:
    """One of the specifications that ship with the package.

    Raises:
        ConfigurationError: If there is none of that name.
    """
    known = presets()
    if name not in known:
        raise ConfigurationError(f"Unknown preset {name!r}. {nearest(name, known)}")
    return known[name]


# What later releases added, with what it was where nothing is said: left out there, so that experiments
# and runs of earlier releases keep their names.
_LATER: dict[str, Any] = {
    "vary": None,
    "evaluations": [],
    "looks": [],
    "tune": None,
    "resources": ResourcesSpec().model_dump(mode="json"),
    "tracking": UNTRACKED,
}
_LATER_ARM: dict[str, Any] = {"tune": None}
_LATER_DATA: dict[str, Any] = {"label_noise": 0.0, "validation_share": None}
_LATER_VARY: dict[str, Any] = {"epochs": None}
_LATER_PRIMARY: dict[str, Any] = {"condition": None}
_LATER_TUNE: dict[str, Any] = {"pruning": False, "seeds_per_trial": 1}


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {
        "data": DataSpec,
        "training": TrainingSpec,
        "primary": PrimarySpec,
        "arms": ArmSpec,
        "vary": VarySpec,
        "evaluations": EvaluationSpec,
        "tune": TuneSpec,
        "tracking": TrackingSpec,
        "resources": ResourcesSpec,
    }
    section = sections.get(str(location[0]), ExperimentSpec) if len(location) > 1 else ExperimentSpec
    if section is ArmSpec and "training" in location[:-1]:
        section = ArmTrainingSpec
    known = list(section.model_fields)
    if section is ArmSpec:
        known = [key for key in known if key != "attention"] + list(ATTENTION_FIELDS)
    return known


def _short(value: float) -> str:
    """A number in as few digits as tell it from any other."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
