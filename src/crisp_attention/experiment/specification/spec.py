"""`ExperimentSpec`: a TOML file that says which arms are trained on which data with which seeds.

Imports no torch, so that plans and reports need none.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError, CrispError, nearest
from crisp_attention.experiment.specification.mistakes import told
from crisp_attention.traits import RULES

_ATTENTION_FIELDS = tuple(item.name for item in dataclasses.fields(SparsityConfig))

MAX_SEEDS = 1000
"""Most seeds that an experiment may ask for."""

Padding = Literal["longest", "max_length"]


class _Section(BaseModel):
    # Strict: "3" or true is no number of seeds.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataSpec(_Section):
    """Which examples, and how they become token ids."""

    source: str = Field(
        description="a packaged data set, a GLUE folder, a folder of images, "
        "a CSV/TSV/JSONL/Parquet file, or a hub name"
    )
    subset: str | None = Field(None, description="configuration of a hub data set, as 'sst2' of 'glue'")
    text: str | None = Field(None, description="column of the text (default: found by its usual names)")
    text_pair: str | None = Field(None, description="column of a second text, for sentence pairs")
    label: str | None = Field(None, description="column of the label (default: found by its usual names)")
    test: str | None = Field(None, description="file with the evaluation split (default: carved from the source)")
    test_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="share of texts held out where the source has no split of its own"
    )
    neutral: Annotated[float, Field(ge=0, lt=4)] = Field(
        0.5, description="rated sentences only: ratings nearer to 0 than this are dropped"
    )
    train_examples: Annotated[int, Field(ge=1)] | None = Field(None, description="training examples (default: all)")
    test_examples: Annotated[int, Field(ge=1)] | None = Field(None, description="evaluation examples (default: all)")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="which examples a limited split consists of")
    max_length: Annotated[int, Field(ge=4)] = Field(128, description="tokens after which a text is cut")
    padding: Padding = Field("longest", description="pad to the batch's longest text, or always to max_length")
    label_noise: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of training labels that become another class, drawn by `seed`"
    )


class TrainingSpec(_Section):
    """One fixed training schedule, shared by all arms."""

    epochs: Annotated[int, Field(ge=1)] = Field(3, description="passes over the training examples")
    batch_size: Annotated[int, Field(ge=1)] = Field(32, description="examples a step")
    learning_rate: Annotated[float, Field(gt=0)] = Field(5e-5, description="peak learning rate of AdamW")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="weight decay of AdamW")
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="share of steps that warm up linearly")
    lr_schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="after the warm-up")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="gradient clipping")
    train_probe: Annotated[int, Field(ge=1)] = Field(
        500, description="training examples evaluated after each epoch, for the train-test gap"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of each label spread evenly")
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="dropout on the attention weights (default: the model's own)"
    )
    hidden_dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="dropout on hidden states (default: the model's own)"
    )

    def identity(self) -> dict[str, Any]:
        """The settings as runs are named by them; what was added later stands there only if it is not the default."""
        return _without_later(self.model_dump(mode="json"), _LATER_TRAINING)


class ArmTrainingSpec(_Section):
    """What an arm may do otherwise in training: the ordinary regularizers, and what was tuned for it."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | None = None
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    hidden_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None


class ArmSpec(_Section):
    """One way of training and evaluating."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=60)]
    attention: Any = Field(description="SparsityConfig; its fields are written directly in the arm's table")
    seed_offset: Annotated[int, Field(ge=0)] = Field(0, description="added to each seed; for A/A arms")
    padding: Padding | None = Field(None, description="overrides the data's padding")
    training: ArmTrainingSpec = Field(ArmTrainingSpec(), description="overrides some of the training")
    evaluate: Any = Field(
        None, description="SparsityConfig in evaluation, where it is another than in training; {} is dense"
    )

    @model_validator(mode="before")
    @classmethod
    def _gather_attention(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "attention" in values:
            return values
        values = dict(values)
        attention = {key: values.pop(key) for key in _ATTENTION_FIELDS if key in values}
        return {**values, "attention": attention}

    @field_validator("attention", mode="after")
    @classmethod
    def _parse_attention(cls, value: Any) -> SparsityConfig:
        if isinstance(value, SparsityConfig):
            return value
        if isinstance(value, Mapping) and value:
            traits = RULES.get(str(value.get("rule", "topk")))
            strengths = (*traits.strengths, "layer_sparsity") if traits and traits.strengths else ()
            known = set(value) <= set(_ATTENTION_FIELDS)  # others are refused by name below
            if strengths and known and not any(name in value for name in strengths):
                raise ValueError(
                    f"an arm that sets {', '.join(sorted(value))} must set {' or '.join(strengths[:-1])} too"
                )
        return SparsityConfig.from_dict({"sparsity": 0.0} if value == {} else value)

    @field_validator("evaluate", mode="after")
    @classmethod
    def _parse_evaluation(cls, value: Any) -> SparsityConfig | None:
        return None if value is None else cls._parse_attention(value)

    @model_validator(mode="after")
    def _check_evaluation(self) -> ArmSpec:
        if self.evaluate is None:
            return self
        for side, config in (("", self.attention), ("evaluate.", self.evaluate)):
            if config.apply != "always":
                raise ValueError(f"an arm with evaluate says where it is sparse already; leave out {side}apply")
        if self.evaluate.schedule is not None:
            raise ValueError("evaluate.schedule: evaluation has no progress; a schedule belongs to training")
        return self

    def to_toml_dict(self) -> dict[str, Any]:
        """The arm as it is written in TOML: only what differs from the defaults."""
        own = self.model_dump(exclude={"attention", "evaluate"}, exclude_defaults=True, exclude_none=True)
        own |= _told(self.attention)
        return own if self.evaluate is None else {**own, "evaluate": _told(self.evaluate)}


class PrimarySpec(_Section):
    """The one contrast named before the experiment is run."""

    arm: str
    baseline: str = "dense"
    condition: str | None = Field(None, description="where data vary: in which condition (default: the last)")


class VarySpec(_Section):
    """One property of the training data that is varied: every arm is trained at each of its values."""

    train_examples: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, strict=False, description="sizes of the training split, rising"
    )
    label_noise: tuple[Annotated[float, Field(ge=0, lt=1)], ...] | None = Field(
        None, strict=False, description="shares of wrong training labels, rising"
    )

    @model_validator(mode="after")
    def _check_one(self) -> VarySpec:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"vary one of {', '.join(type(self).model_fields)}; got {', '.join(given) or 'none'}")
        if len(self.values) < 2 or list(self.values) != sorted(set(self.values)):
            raise ValueError(f"{self.key} must hold two or more different values, rising; got {list(self.values)}")
        return self

    @property
    def key(self) -> str:
        """The field of `DataSpec` that is varied."""
        return "label_noise" if self.train_examples is None else "train_examples"

    @property
    def values(self) -> tuple[float, ...]:
        """Its values, rising."""
        values: tuple[float, ...] = getattr(self, self.key)
        return values


class EvaluationSpec(_Section):
    """One more evaluation of each trained model: the test split with typing errors, or another data set's."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=60)]
    typos: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="share of the test split's letters that are mistyped"
    )
    source: str | None = Field(None, description="a data set with the same classes, whose test split is evaluated")
    text: str | None = Field(None, description="column of that data set's text (default: found by its usual names)")
    text_pair: str | None = Field(None, description="column of a second text, for sentence pairs")
    label: str | None = Field(None, description="column of the label (default: found by its usual names)")
    test_examples: Annotated[int, Field(ge=1)] | None = Field(None, description="of that data set (default: all)")

    @model_validator(mode="after")
    def _check_one(self) -> EvaluationSpec:
        if (self.typos is None) == (self.source is None):
            raise ValueError(f"evaluation {self.name!r} needs either typos or source")
        columns = [key for key in ("text", "text_pair", "label") if getattr(self, key) is not None]
        if self.source is None and columns:
            raise ValueError(f"{' and '.join(columns)} must name columns of source, which is missing")
        return self


class ExperimentSpec(_Section):
    """Arms x seeds on one data set and one model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)]
    description: str = ""
    choices: tuple[str, ...] = Field(
        (), strict=False, description="settings that are our choice, not a source's; shown in the report"
    )
    model: str = Field(description="a packaged model, 'tiny-vit' from scratch, a folder with weights, or a hub name")
    seeds: Annotated[int, Field(ge=1, le=MAX_SEEDS)] = Field(10, description="runs per arm, seeds 0, 1, ...")
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

    @model_validator(mode="after")
    def _check_arms(self) -> ExperimentSpec:
        names = [arm.name for arm in self.arms]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"arm names must differ; repeated: {', '.join(repeated)}")
        twins: dict[str, str] = {}
        for arm in self.arms:
            # Settings that remove nothing are all the same attention.
            attention = arm.attention if arm.attention.removes else None
            evaluation = arm.evaluate if arm.evaluate is not None and arm.evaluate.removes else arm.evaluate is None
            training = self.training_of(arm)
            same = repr((attention, evaluation, training, arm.seed_offset, arm.padding or self.data.padding))
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
        if len(set(extra)) < len(extra) or {"test", "train"} & set(extra):
            raise ValueError(f"names of evaluations must differ, and from 'test' and 'train'; got {', '.join(extra)}")
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
        return {f"{key}={value:g}": self.data.model_copy(update={key: value}) for value in self.vary.values}

    @property
    def primary_condition(self) -> str:
        """The condition in which the primary contrast is made: the last one unless another is named."""
        return self.primary.condition or list(self.conditions())[-1]

    def training_of(self, arm: ArmSpec) -> TrainingSpec:
        """How an arm is trained: the experiment's training with the arm's own settings."""
        return self.training.model_copy(update=arm.training.model_dump(exclude_none=True))

    def arm(self, name: str) -> ArmSpec:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def identity(self) -> dict[str, Any]:
        """All that decides what the runs are, without how many seeds there are or where data lie."""
        content = to_plain(self)
        for key in ("name", "description", "choices", "seeds"):
            del content[key]
        return content


def to_plain(spec: ExperimentSpec) -> dict[str, Any]:
    """The specification as JSON-ready data; `parse` reads it back."""
    content: dict[str, Any] = _without_later(spec.model_dump(mode="json", exclude={"arms"}), _LATER)
    content["data"] = _without_later(content["data"], _LATER_DATA)
    content["training"] = spec.training.identity()
    content["primary"] = _without_later(content["primary"], _LATER_PRIMARY)
    if spec.evaluations:
        content["evaluations"] = [item.model_dump(mode="json", exclude_none=True) for item in spec.evaluations]
    content["arms"] = []
    for arm in spec.arms:
        plain = arm.model_dump(mode="json", exclude={"attention", "evaluate", "training"})
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


def read(path: Path) -> ExperimentSpec:
    """Read a specification from a TOML file.

    Raises:
        ConfigurationError: If the file is missing, not TOML, or invalid.
    """
    try:
        text = path.read_text(encoding="utf-8")
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
_LATER: dict[str, Any] = {"vary": None, "evaluations": [], "looks": []}
_LATER_DATA: dict[str, Any] = {"label_noise": 0.0}
_LATER_PRIMARY: dict[str, Any] = {"condition": None}
_LATER_TRAINING: dict[str, Any] = {"label_smoothing": 0.0, "attention_dropout": None, "hidden_dropout": None}


def _without_later(content: dict[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in later or value != later[key]}


def _told(attention: SparsityConfig) -> dict[str, Any]:
    """Settings of attention as they are written in TOML: strength and what differs from the defaults."""
    if attention == SparsityConfig(sparsity=0.0):
        return {}
    told = attention.changes().keys() | attention.strength.keys()
    return {name: value for name, value in attention.to_dict().items() if name in told}


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {
        "data": DataSpec,
        "training": TrainingSpec,
        "primary": PrimarySpec,
        "arms": ArmSpec,
        "vary": VarySpec,
        "evaluations": EvaluationSpec,
    }
    section = sections.get(str(location[0]), ExperimentSpec) if len(location) > 1 else ExperimentSpec
    if section is ArmSpec and "training" in location[:-1]:
        section = ArmTrainingSpec
    known = list(section.model_fields)
    if section is ArmSpec:
        known = [key for key in known if key != "attention"] + list(_ATTENTION_FIELDS)
    return known
