"""What a sparsified model carries with it: settings in its config, run-time state on its modules.

Settings live in `model.config.crisp_attention`, a plain dict that `config.json` carries. Run-time
state hangs on each attention module, never in a global, so that models with different settings
live side by side, and deepcopy and pickle take it along.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError
from crisp_attention.monitoring import Monitor

SETTINGS = "crisp_attention"
"""Attribute of a model's config that holds the settings."""

IMPLEMENTATION = "crisp"
"""The name in Transformers' attention and mask registries."""

_STATE = "_crisp_layer"

Implementations = list[tuple[Any, str | None]]
"""Configuration objects, each with the name of its attention implementation."""


@dataclass
class ModelState:
    """Run-time state shared by all attention layers of one model.

    Attributes:
        config: The settings in force.
        restore: Each of the model's configurations and the attention implementation to return to;
            None if it was sparse from the start.
        dense: How many `crisp.dense` blocks are open.
        forward_index: Training forwards so far; which draw a randomised rule makes. Set from the
            Trainer's global step by `SparsityCallback`, so that resuming repeats nothing.
        monitors: Who counts realised sparsity at present.
        adopted: Whether it was made for one layer on its first call rather than by `sparsify`.
    """

    config: SparsityConfig
    restore: Implementations | None = None
    dense: int = 0
    forward_index: int = 0
    monitors: list[Monitor] = field(default_factory=list)
    adopted: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy is made outside of the blocks that are open around the original."""
        return {**self.__dict__, "dense": 0, "monitors": []}


@dataclass
class LayerState:
    """Run-time state of one attention layer.

    Attributes:
        name: The module's name in its model.
        index: Its position among the attention layers, in calling order.
        model: State shared with the model's other layers.
        stock: The attention implementation that it has when dense; None if that is not known.
    """

    name: str
    index: int
    model: ModelState
    stock: str | None = None


def layer_state(module: nn.Module) -> LayerState:
    """The state of an attention module, adopted from its config on the first call if need be.

    A model loaded by `from_pretrained(..., attn_implementation="crisp")` has settings in its config
    but has not been through `sparsify`.

    Raises:
        ConfigurationError: If the module's model has no settings.
    """
    state: LayerState | None = module.__dict__.get(_STATE)
    if state is not None:
        return state
    config = getattr(module, "config", None)
    settings = getattr(config, SETTINGS, None)
    if settings is None:
        raise ConfigurationError(
            f"attn_implementation={IMPLEMENTATION!r} is set, but {type(config).__name__} has no "
            f"{SETTINGS!r} settings. Call crisp_attention.sparsify(model, sparsity=...) first."
        )
    parsed = SparsityConfig.from_dict(settings)
    if parsed.rule == "random":
        raise ConfigurationError(
            "Rule 'random' draws by layer and step, which a model knows only after crisp_attention.load or "
            "crisp_attention.sparsify. Use one of them."
        )
    index = getattr(module, "layer_idx", None)
    mark_config(config, parsed)
    name = type(module).__name__ if index is None else f"{type(module).__name__}.{index}"
    state = LayerState(name, index or 0, ModelState(parsed, adopted=True))
    attach(module, state)
    return state


def attach(module: nn.Module, state: LayerState) -> None:
    """Hang a layer's state on its module."""
    setattr(module, _STATE, state)


def layers(model: nn.Module) -> dict[str, LayerState]:
    """All attached layers of a model, by module name."""
    return {name: module.__dict__[_STATE] for name, module in model.named_modules() if _STATE in module.__dict__}


def detach(model: nn.Module) -> None:
    """Remove the state of every layer."""
    for module in model.modules():
        module.__dict__.pop(_STATE, None)


def configs(model: nn.Module) -> list[Any]:
    """Every configuration object of a model once: its own, their sub-configurations, its modules' own.

    Composite models keep one for each part, and some parts a copy of their model's; each says for
    itself which attention is used, and is saved with its part.
    """
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for name in config.sub_configs:
                add(getattr(config, name, None))

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(found.values())


def implementations(model: nn.Module) -> Implementations:
    """The attention implementation of each configuration, to return to."""
    return [(config, config._attn_implementation) for config in configs(model)]


def default_implementations(model: PreTrainedModel) -> Implementations:
    """What Transformers would choose for each configuration, where nobody knows what was before."""
    chosen: dict[int, str | None] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            chosen.setdefault(id(module.config), module.get_correct_attn_implementation(None))
    return [(config, chosen.get(id(config), chosen[id(model.config)])) for config in configs(model)]


def mark_config(config: Any, settings: SparsityConfig) -> None:
    """Write the settings where `save_pretrained` finds them.

    The implementation's name is written too: Transformers does not store it by itself, so that a
    plain `from_pretrained` would come back dense. With it, such a load is sparse again where this
    package is imported, and fails where it is not.
    """
    setattr(config, SETTINGS, settings.to_dict())
    config.attn_implementation = IMPLEMENTATION


def unmark_config(config: Any) -> None:
    """Remove what `mark_config` wrote."""
    for name in (SETTINGS, "attn_implementation"):
        config.__dict__.pop(name, None)
