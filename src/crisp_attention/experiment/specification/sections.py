"""The sections of a specification: data, training, arms, and what is varied or evaluated besides.

Imports no torch, so that plans and reports need none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from crisp_attention.config import SparsityConfig
from crisp_attention.experiment.specification.section import Section
from crisp_attention.traits import RULES

ATTENTION_FIELDS = tuple(item.name for item in dataclasses.fields(SparsityConfig))
"""Keys of an arm's table that are settings of attention."""

Padding = Literal["longest", "max_length"]


class DataSpec(Section):
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
    validation_share: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="to explore: evaluate on this share of the training split, and leave the evaluation split alone",
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


class TrainingSpec(Section):
    """One fixed training schedule, shared by all arms."""

    epochs: Annotated[int, Field(ge=1)] = Field(3, description="passes over the training examples")
    batch_size: Annotated[int, Field(ge=1)] = Field(32, description="examples a step")
    learning_rate: Annotated[float, Field(gt=0)] = Field(5e-5, description="peak learning rate of AdamW")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="weight decay of AdamW")
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="share of steps that warm up linearly")
    lr_schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="after the warm-up")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="gradient clipping")
    train_probe: Annotated[int, Field(ge=1)] = Field(
        500, description="training examples that are evaluated, for the train-test gap"
    )
    curves: bool = Field(True, description="evaluate after every epoch, for the curves; or after the last one alone")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of each label spread evenly")
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="dropout on the attention weights (default: the model's own)"
    )
    hidden_dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="dropout on hidden states (default: the model's own)"
    )

    def identity(self) -> dict[str, Any]:
        """The settings as runs are named by them; what was added later stands there only if it is not the default."""
        return without_later(self.model_dump(mode="json"), _LATER)


class ArmTrainingSpec(Section):
    """What an arm may do otherwise in training: the ordinary regularizers, and what was tuned for it."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | None = None
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    hidden_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None


class ArmSpec(Section):
    """One way of training and evaluating."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=60)]
    attention: Any = Field(description="SparsityConfig; its fields are written directly in the arm's table")
    seed_offset: Annotated[int, Field(ge=0)] = Field(0, description="added to each seed; for A/A arms")
    padding: Padding | None = Field(None, description="overrides the data's padding")
    training: ArmTrainingSpec = Field(ArmTrainingSpec(), description="overrides some of the training")
    evaluate: Any = Field(
        None, description="SparsityConfig in evaluation, where it is another than in training; {} is dense"
    )
    tune: tuple[str, ...] | None = Field(
        None, strict=False, description="which settings of [tune] are searched for it (default: all that apply)"
    )

    @model_validator(mode="before")
    @classmethod
    def _gather_attention(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "attention" in values:
            return values
        values = dict(values)
        attention = {key: values.pop(key) for key in ATTENTION_FIELDS if key in values}
        return {**values, "attention": attention}

    @field_validator("attention", mode="after")
    @classmethod
    def _parse_attention(cls, value: Any) -> SparsityConfig:
        if isinstance(value, SparsityConfig):
            return value
        if isinstance(value, Mapping) and value:
            traits = RULES.get(str(value.get("rule", "topk")))
            strengths = (*traits.strengths, "layer_sparsity") if traits and traits.strengths else ()
            known = set(value) <= set(ATTENTION_FIELDS)  # others are refused by name below
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
        own = self.model_dump(mode="json", exclude={"attention", "evaluate"}, exclude_defaults=True, exclude_none=True)
        own |= _told(self.attention)
        return own if self.evaluate is None else {**own, "evaluate": _told(self.evaluate)}


class PrimarySpec(Section):
    """The one contrast named before the experiment is run."""

    arm: str
    baseline: str = "dense"
    condition: str | None = Field(None, description="where data vary: in which condition (default: the last)")


_VARIED = ("train_examples", "label_noise")


class VarySpec(Section):
    """One property of the training data that is varied: every arm is trained at each of its values."""

    train_examples: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, strict=False, description="sizes of the training split, rising"
    )
    label_noise: tuple[Annotated[float, Field(ge=0, lt=1)], ...] | None = Field(
        None, strict=False, description="shares of wrong training labels, rising"
    )
    epochs: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None,
        strict=False,
        description="epochs at each value, in place of those of [training]: more on fewer examples, for as many steps",
    )

    @model_validator(mode="after")
    def _check_one(self) -> VarySpec:
        given = [name for name in _VARIED if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"vary one of {', '.join(_VARIED)}; got {', '.join(given) or 'none'}")
        if len(self.values) < 2 or list(self.values) != sorted(set(self.values)):
            raise ValueError(f"{self.key} must hold two or more different values, rising; got {list(self.values)}")
        if self.epochs is not None and len(self.epochs) != len(self.values):
            raise ValueError(f"epochs must be as many as {self.key}, {len(self.values)}; got {list(self.epochs)}")
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


class EvaluationSpec(Section):
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
        own = [key for key in ("text", "text_pair", "label") if getattr(self, key) is not None]
        if self.source is None and own:
            raise ValueError(f"{' and '.join(own)} must be of source, which is missing; typos take the test split")
        return self


# What later releases added to training; see `without_later`.
_LATER: dict[str, Any] = {"curves": True, "label_smoothing": 0.0, "attention_dropout": None, "hidden_dropout": None}


def without_later(content: dict[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Content without what later releases added, where that has the value it had before there was a key for it.

    So experiments and runs of earlier releases keep their names.

    Args:
        content: A section as plain data.
        later: The keys that were added, with the value that stands for "nothing said".
    """
    return {key: value for key, value in content.items() if key not in later or value != later[key]}


def _told(attention: SparsityConfig) -> dict[str, Any]:
    """Settings of attention as they are written in TOML: strength and what differs from the defaults."""
    if attention == SparsityConfig(sparsity=0.0):
        return {}
    told = attention.changes().keys() | attention.strength.keys()
    return {name: value for name, value in attention.to_dict().items() if name in told}
