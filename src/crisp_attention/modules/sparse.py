"""What every sparse attention module shares: its state, and settings that travel in the state_dict."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from crisp_attention.config import SETTINGS, SparsityConfig
from crisp_attention.errors import ConfigurationError
from crisp_attention.settings import require_share
from crisp_attention.state import LayerState, attached

_BLOCK = 512
"""Written settings take a multiple of so many bytes."""


class SparseModule(nn.Module):
    """Base of the attention modules that `sparsify` serves outside of Transformers.

    A stock module becomes sparse by taking a subclass of its own class for a class: its parameters,
    their names, its hooks and its place in the model stay what they were, copies and pickles work,
    and `densify` gives the class back.

    Its settings are an entry `crisp_attention` of the `state_dict`, a byte tensor of JSON, so that a
    stock module refuses to load it (an unexpected key) instead of being dense in silence.

    Attributes:
        stock: The class that it has when dense; None if that is its own.
    """

    stock: ClassVar[type[Any] | None] = None

    @property
    def layer(self) -> LayerState | None:
        """Its state; None where it was never made sparse."""
        return attached(self)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layer is not None:
            destination[prefix + SETTINGS] = _encode(self.layer)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        layer = self.layer
        own = dict(state_dict)
        # A checkpoint of dense weights has no such entry; it may be fine-tuned sparsely.
        if layer is not None and (written := own.pop(prefix + SETTINGS, None)) is not None:
            try:
                _take_over(written, layer)
            except ConfigurationError as error:
                error_msgs.append(f"{prefix}{SETTINGS}: {error}")
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


def in_words(config: SparsityConfig | None) -> str:
    """A layer's settings, None for dense, as a person reads them."""
    if config is None:
        return "dense attention"
    return ", ".join(f"{name}={value!r}" for name, value in config.essence().items())


def active(module: SparseModule) -> SparsityConfig | None:
    """The settings in force for a module as it is now, or None where it is dense."""
    layer = module.layer
    return None if layer is None else layer.active(module.training)


def as_stock(module: SparseModule, dropout_p: float) -> bool:
    """Whether a module may compute as its stock class does at this moment.

    Not while someone watches. Not with dropout in training either: a fused kernel draws from a
    stream of its own, and dense and sparse arms would no longer drop the same weights.

    Args:
        module: The module.
        dropout_p: Its dropout.
    """
    layer = module.layer
    if layer is None:
        return True
    dropping = module.training and dropout_p > 0.0
    return layer.begin(module.training) is None and not layer.model.monitors and not dropping


def _encode(layer: LayerState) -> Tensor:
    settings = None if layer.config is None else layer.config.to_dict()
    written = json.dumps({"settings": settings, "progress": layer.model.progress}, sort_keys=True)
    content = written.encode()
    # A tensor, so that formats which hold nothing else can hold it; of a length that progress does not change, so that
    # what copies state into state of the same sizes can.
    return torch.tensor(list(content.ljust(-(-len(content) // _BLOCK) * _BLOCK)), dtype=torch.uint8)


def _take_over(written: Tensor, layer: LayerState) -> None:
    """Take over the progress of training from a checkpoint, whose settings must be this layer's.

    Raises:
        ConfigurationError: If the settings are damaged or different.
    """
    try:
        content = json.loads(bytes(written.cpu().tolist()))
        settings, progress = content["settings"], content["progress"]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ConfigurationError("these settings are damaged.") from None
    config = None if settings is None else SparsityConfig.from_dict(settings)
    if config != layer.config:
        raise ConfigurationError(
            f"the checkpoint was written by a layer with {in_words(config)}; this one has {in_words(layer.config)}. "
            "Sparsify the model with the checkpoint's settings, load it, and then sparsify it anew if you want others."
        )
    if progress is not None:
        layer.model.stand_at(require_share("progress", progress))
