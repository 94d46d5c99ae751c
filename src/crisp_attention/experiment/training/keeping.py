"""A trained model as a folder that others load: weights, settings, tokenizer; whole or not there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from crisp_attention.config import SparsityConfig
from crisp_attention.experiment.results.files import whole_folder
from crisp_attention.huggingface.model import densify, sparsify


def settled(attention: SparsityConfig) -> SparsityConfig | None:
    """The settings of attention in evaluation once training is over; None if it is dense then.

    Args:
        attention: Those in training. A schedule stands where it ends.
    """
    if attention.schedule is not None:
        final = {
            name: [attention.schedule.sparsity(share, 1.0) for share in value]
            if isinstance(value, list)
            else attention.schedule.sparsity(value, 1.0)
            for name, value in attention.strength.items()
        }
        attention = attention.replace(schedule=None, **final)
    return attention.replace(apply="always") if attention.active(training=False) else None


def save(model: PreTrainedModel, processor: Any, attention: SparsityConfig, most: int, folder: Path) -> None:
    """Save a model as it is evaluated: sparse, with its settings, or dense and in need of nothing but Transformers.

    Args:
        model: Trained; its attention is changed to that of evaluation.
        processor: Its tokenizer or image processor.
        attention: Its settings in training.
        most: Tokens after which a text was cut, and is to be from now on.
        folder: Where to; replaced if it is there.

    Raises:
        OSError: If it cannot be written.
    """
    evaluated = settled(attention)
    if evaluated is None:
        densify(model)
    else:
        sparsify(model, evaluated)
    with whole_folder(folder) as scratch:
        model.save_pretrained(scratch)
        with _limited(processor, most):
            processor.save_pretrained(scratch)


@contextlib.contextmanager
def _limited(processor: Any, most: int) -> Iterator[None]:
    """A tokenizer that cuts texts where training did; an image processor as it is."""
    before = getattr(processor, "model_max_length", None)
    if before is None:
        yield
        return
    processor.model_max_length = min(most, before)
    try:
        yield
    finally:
        processor.model_max_length = before
