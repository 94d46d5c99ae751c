"""What many runs on the same model and data share, and how each of them gets its model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    default_data_collator,
)

from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError, UnsupportedModelError
from crisp_attention.experiment.data.batching import EncodedImages, EncodedSplit, EncodedTexts
from crisp_attention.experiment.data.dataset import ExperimentData, Split, fingerprint
from crisp_attention.experiment.results.examples import Examples
from crisp_attention.experiment.specification.sections import ArmSpec, TrainingSpec
from crisp_attention.experiment.specification.spec import ExperimentSpec
from crisp_attention.experiment.training.evaluation import map_rows
from crisp_attention.experiment.training.model import Checkpoint, failing_as, load_tokenizer
from crisp_attention.huggingface.model import sparsify
from crisp_attention.huggingface.quiet import quiet, silence

# Under which names the configurations of architectures hold the two dropouts that an arm may set.
_DROPOUT_FIELDS = {
    "attention_dropout": ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop"),
    "hidden_dropout": ("hidden_dropout_prob", "hidden_dropout", "dropout", "resid_pdrop"),
}


_COLOURS = 3


class Workbench:
    """What many runs on the same model and data share: the tokenizer or image processor, and encoded splits.

    Args:
        checkpoint: The model.
        data: All data of the experiment.
    """

    def __init__(self, checkpoint: Checkpoint, data: ExperimentData) -> None:
        self.checkpoint = checkpoint
        self.data = data
        self.processor: Any = _processor(checkpoint, data)
        self._encoded: dict[tuple[str, int], EncodedSplit] = {}

    def encoded(self, split: Split, max_length: int) -> EncodedSplit:
        """A split as the model takes it; texts are tokenised once."""
        key = (fingerprint(self.data.classes, split), max_length)
        if key not in self._encoded:
            if split.kind == "text":
                self._encoded[key] = EncodedTexts(split, self.processor, max_length)
            else:
                config = AutoConfig.from_pretrained(self.checkpoint.folder, trust_remote_code=False)
                channels = getattr(config, "num_channels", _COLOURS)
                self._encoded[key] = EncodedImages(split, self.processor, channels, _patches(config))
        return self._encoded[key]

    def cut(self, split: Split, max_length: int) -> int:
        """How many texts of a split are longer than that many tokens; 0 where they are no texts."""
        if split.kind != "text":
            return 0
        long = split.take(np.flatnonzero(self.encoded(split, max_length).lengths >= max_length))
        if not len(long):
            return 0
        whole = self.processor(list(long.texts), long.pairs and list(long.pairs))["input_ids"]
        return sum(len(ids) > max_length for ids in whole)

    def collator(self, padding: str, max_length: int) -> Callable[[list[dict[str, Any]]], Any]:
        """What makes a batch of encoded examples; texts are padded, images need not be."""
        if self.data.test.kind == "image":
            return default_data_collator
        return DataCollatorWithPadding(self.processor, padding=padding, max_length=max_length)

    def examples(self, max_length: int) -> Examples:
        """The evaluation split as people read it, with the tokens of the examples whose maps are kept."""
        split = self.data.test
        if split.kind != "text":
            return Examples(texts=(), pairs=(), map_rows=(), map_tokens=())
        encoded = self.encoded(split, max_length)
        rows = map_rows(encoded.lengths).tolist()
        tokens = [self.processor.convert_ids_to_tokens(encoded[row]["input_ids"]) for row in rows]
        return Examples(split.texts, split.pairs or (), tuple(rows), tuple(map(tuple, tokens)))

    def model(self, training: TrainingSpec) -> PreTrainedModel:
        """The model in fp32 as a run begins with it, to classify these data.

        The classifier is new where the checkpoint has none, or one of another number of classes, and
        so is all of a model that comes without weights: draws of torch's global stream.

        Args:
            training: Sets the dropout.

        Raises:
            ConfigurationError: If the model's configuration has no such dropout.
            UnsupportedModelError: If it does not classify such examples.
        """
        return _load(self.checkpoint, self.data, training)


def silence_training() -> None:
    """Leave the screen to our own progress display."""
    silence()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


@contextlib.contextmanager
def quiet_training() -> Iterator[None]:
    """As `silence_training` within; a notebook that called us is as talkative afterwards as before."""
    accelerate = logging.getLogger("accelerate")
    level = accelerate.level
    try:
        with quiet():
            silence_training()
            yield
    finally:
        accelerate.setLevel(level)


def positions_of(config: Any) -> int | None:
    """For how many tokens a model has positions; None if its configuration does not say."""
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def dropouts(config: Any) -> tuple[str, ...]:
    """Which dropouts of an arm a model's configuration has a field for."""
    return tuple(name for name, fields in _DROPOUT_FIELDS.items() if any(hasattr(config, field) for field in fields))


def preflight(checkpoint: Checkpoint, data: ExperimentData, spec: ExperimentSpec) -> None:
    """Make sure, before anything is written, that every arm can be run on this model.

    Loads the model as a run of each arm does, and sparsifies it by the arm's settings in training and
    in evaluation.

    Args:
        checkpoint: The model.
        data: The examples.
        spec: Its arms, and the tokens that the model must have positions for.

    Raises:
        UnsupportedModelError: If the model would not be touched or does not classify such examples.
        ConfigurationError: If a rule cannot serve it, it has no dropout that an arm sets, or fewer
            positions than `data.max_length`.
    """
    bench = Workbench(checkpoint, data)
    models: dict[tuple[float | None, float | None], PreTrainedModel] = {}
    for arm in spec.arms:
        training = spec.training_of(arm)
        dropouts = (training.attention_dropout, training.hidden_dropout)
        if dropouts not in models:
            models[dropouts] = bench.model(training)
        for attention in _settings(arm):
            sparsify(models[dropouts], attention)
    positions = positions_of(next(iter(models.values())).config)
    if data.test.kind == "text" and positions is not None and spec.data.max_length > positions:
        raise ConfigurationError(
            f"data.max_length = {spec.data.max_length}, but {checkpoint.name} has positions for {positions} tokens."
        )


def _settings(arm: ArmSpec) -> Iterator[SparsityConfig]:
    """Of attention in training, and in evaluation where it is another."""
    yield arm.attention
    if arm.evaluate is not None:
        yield arm.evaluate


def _processor(checkpoint: Checkpoint, data: ExperimentData) -> Any:
    if data.test.kind == "text":
        try:
            return load_tokenizer(checkpoint)
        except UnsupportedModelError as error:
            raise _unsuited(checkpoint, data, str(error)) from None
    with _suited(checkpoint, data):
        # The same pixels whether torchvision is installed or not.
        return AutoImageProcessor.from_pretrained(checkpoint.folder, backend="pil", trust_remote_code=False)


def _load(checkpoint: Checkpoint, data: ExperimentData, training: TrainingSpec) -> PreTrainedModel:
    auto: Any = AutoModelForSequenceClassification if data.test.kind == "text" else AutoModelForImageClassification
    model: PreTrainedModel
    with _suited(checkpoint, data):
        config = AutoConfig.from_pretrained(
            checkpoint.folder,
            trust_remote_code=False,
            num_labels=len(data.classes),
            id2label=dict(enumerate(data.classes)),
            label2id={name: index for index, name in enumerate(data.classes)},
            # A checkpoint may come from another kind of task, whose loss it would ask for.
            problem_type="single_label_classification",
        )
    _set_dropout(config, training, checkpoint.name)
    with _suited(checkpoint, data):
        if not checkpoint.pretrained:
            model = auto.from_config(config, dtype=torch.float32)
            return model
        model, found = auto.from_pretrained(
            checkpoint.folder,
            config=config,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    for name, theirs, ours in found["mismatched_keys"]:
        if not (ours[0] == len(data.classes) != theirs[0] and ours[1:] == theirs[1:]):
            raise _unsuited(checkpoint, data, f"{name} has the shape {list(theirs)}, expected {list(ours)}")
    return model


def _patches(config: Any) -> int:
    """Into how many patches a model cuts an image; 1 where its configuration does not say."""
    sides = [getattr(config, name, 1) for name in ("image_size", "patch_size")]
    (height, width), (own_height, own_width) = (side if isinstance(side, Sequence) else (side, side) for side in sides)
    return max(1, int(height // own_height * (width // own_width)))


def _set_dropout(config: Any, training: TrainingSpec, name: str) -> None:
    for setting, fields in _DROPOUT_FIELDS.items():
        value = getattr(training, setting)
        if value is None:
            continue
        present = [field for field in fields if hasattr(config, field)]
        if not present:
            raise ConfigurationError(
                f"{setting} = {value:g}, but the configuration of {name} ({config.model_type}) has no such dropout: "
                f"none of {', '.join(fields)}."
            )
        setattr(config, present[0], value)


def _suited(checkpoint: Checkpoint, data: ExperimentData) -> contextlib.AbstractContextManager[None]:
    """Name the model and the data where Transformers fails on them."""
    return failing_as(lambda why: _unsuited(checkpoint, data, why))


def _unsuited(checkpoint: Checkpoint, data: ExperimentData, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{checkpoint.name} cannot be fine-tuned to {len(data.classes)} classes of {data.test.kind}: {why}"
    )
