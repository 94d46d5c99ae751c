"""`ExperimentSpec`: a TOML file that says which arms are trained on which data with which seeds.

Imports no torch, so that plans and reports need none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError, CrispError, nearest
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

    source: str = Field(description="a packaged data set, a GLUE folder, a CSV/TSV/JSONL/Parquet file, or a hub name")
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


class ArmSpec(_Section):
    """One way of training and evaluating."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=60)]
    attention: Any = Field(description="SparsityConfig; its fields are written directly in the arm's table")
    seed_offset: Annotated[int, Field(ge=0)] = Field(0, description="added to each seed; for A/A arms")
    padding: Padding | None = Field(None, description="overrides the data's padding")

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
            if strengths and not any(name in value for name in strengths):
                raise ValueError(
                    f"an arm that sets {', '.join(sorted(value))} must set {' or '.join(strengths[:-1])} too"
                )
        return SparsityConfig.from_dict({"sparsity": 0.0} if value == {} else value)

    def to_toml_dict(self) -> dict[str, Any]:
        """The arm as it is written in TOML: only what differs from the defaults."""
        own = self.model_dump(exclude={"attention"}, exclude_defaults=True)
        if self.attention == SparsityConfig(sparsity=0.0):
            return own
        told = self.attention.changes().keys() | self.attention.strength.keys()
        return {**own, **{name: value for name, value in self.attention.to_dict().items() if name in told}}


class PrimarySpec(_Section):
    """The one contrast named before the experiment is run."""

    arm: str
    baseline: str = "dense"


class ExperimentSpec(_Section):
    """Arms x seeds on one data set and one model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)]
    description: str = ""
    choices: tuple[str, ...] = Field(
        (), strict=False, description="settings that are our choice, not a source's; shown in the report"
    )
    model: str = Field(description="a packaged model, a folder with weights, or a hub name")
    seeds: Annotated[int, Field(ge=1, le=MAX_SEEDS)] = Field(10, description="runs per arm, seeds 0, 1, ...")
    primary: PrimarySpec
    data: DataSpec
    training: TrainingSpec = TrainingSpec()
    arms: Annotated[tuple[ArmSpec, ...], Field(min_length=2, strict=False)]

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
            twin = twins.setdefault(repr((attention, arm.seed_offset, arm.padding or self.data.padding)), arm.name)
            if twin != arm.name:
                raise ValueError(f"arms {twin!r} and {arm.name!r} are the same; an A/A arm needs a seed_offset")
        for role in ("arm", "baseline"):
            name = getattr(self.primary, role)
            if name not in names:
                raise ValueError(f"primary.{role} = {name!r} is not an arm. {nearest(name, names)}")
        if self.primary.arm == self.primary.baseline:
            raise ValueError("primary.arm and primary.baseline must differ")
        return self

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
    content: dict[str, Any] = spec.model_dump(mode="json", exclude={"arms"})
    content["arms"] = [
        {**arm.model_dump(mode="json", exclude={"attention"}), "attention": arm.attention.to_dict()}
        for arm in spec.arms
    ]
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
        raise ConfigurationError(f"{origin}: " + " ".join(_explain(item) for item in error.errors())) from None
    except CrispError as error:
        raise ConfigurationError(f"{origin}: {error}") from None


def read(path: Path) -> ExperimentSpec:
    """Read a specification from a TOML file.

    Raises:
        ConfigurationError: If the file is missing, not TOML, or invalid.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"Cannot read the specification {path}: {error}") from None
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not valid TOML: {error}") from None
    return parse(content, str(path))


def presets() -> dict[str, ExperimentSpec]:
    """The specifications that ship with the package, by name."""
    folder = resources.files("crisp_attention.experiment") / "presets"
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


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result; content-addressed by `run_id`.

    Attributes:
        model: Fingerprint of weights, configuration and tokenizer.
        data: Fingerprint of both splits, in order.
        max_length: Tokens after which a text is cut.
        padding: "longest" or "max_length".
        training: `TrainingSpec` as a dict.
        attention: `SparsityConfig.identity`.
        seed: Of initial weights, data order and dropout.
    """

    model: str
    data: str
    max_length: int
    padding: str
    training: dict[str, Any]
    attention: dict[str, Any]
    seed: int

    @property
    def run_id(self) -> str:
        """Hash of the canonical content, 16 hexadecimal digits."""
        canonical = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One arm at one seed.

    Attributes:
        arm: Its arm's name.
        index: Which of the arm's seeds, from 0; runs of equal index are paired across arms.
        config: What is run.
    """

    arm: str
    index: int
    config: RunConfig


def expand(spec: ExperimentSpec, model: str, data: str) -> Iterator[PlannedRun]:
    """All runs of an experiment, seed by seed, so that an interrupted one has complete pairs.

    Args:
        spec: The experiment.
        model: Fingerprint of the model.
        data: Fingerprint of the data.
    """
    for index in range(spec.seeds):
        for arm in spec.arms:
            config = RunConfig(
                model=model,
                data=data,
                max_length=spec.data.max_length,
                padding=arm.padding or spec.data.padding,
                training=spec.training.model_dump(mode="json"),
                attention=arm.attention.identity(),
                seed=index + arm.seed_offset,
            )
            yield PlannedRun(arm.name, index, config)


def _explain(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"Unknown key {place!r}. {nearest(str(item['loc'][-1]), _known_keys(item['loc']))}"
    if item["type"] == "missing":
        return f"Missing key {place!r}."
    message = item["msg"].removeprefix("Value error, ").rstrip(".")
    given = "" if item["type"] == "value_error" else f", got {item['input']!r}"
    return f"{place}: {message}{given}." if place else f"{message}."


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {
        "data": DataSpec,
        "training": TrainingSpec,
        "primary": PrimarySpec,
        "arms": ArmSpec,
    }
    section = sections.get(str(location[0]), ExperimentSpec) if len(location) > 1 else ExperimentSpec
    known = list(section.model_fields)
    if section is ArmSpec:
        known = [key for key in known if key != "attention"] + list(_ATTENTION_FIELDS)
    return known
