"""What of a sparsified Transformers model outlives it: settings in its configurations.

They live in `model.config.crisp_attention`, a plain dict that `config.json` carries.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from crisp_attention.config import SETTINGS, SparsityConfig
from crisp_attention.errors import ConfigurationError
from crisp_attention.settings import require_integer, require_share
from crisp_attention.state import Implementations, LayerState, ModelState, attach, attached

# Not at run time: whoever imports Transformers registers us, which imports this module.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "crisp"
"""The name in Transformers' attention and mask registries."""

_MARKS = (SETTINGS, "attn_implementation")
_PROGRESS = "progress"
_LAYERS = "attention_layers"


class LiveSettings(dict[str, Any]):
    """Settings of a model whose layers have their state: no other module may take them from here.

    A copy, or what a pickle brings back, is a plain dict: it belongs to nobody.
    """

    def __init__(self, settings: dict[str, Any], owner: ModelState) -> None:
        super().__init__(settings)
        self._owner = weakref.ref(owner)

    @property
    def owner(self) -> ModelState | None:
        """The state that they are the settings of, or None once it is gone."""
        return self._owner()

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)


def require_own_config(config: Any, state: ModelState) -> None:
    """Refuse a configuration object that another sparsified model lives by.

    Raises:
        ConfigurationError: If what one of the two writes into it would be read by the other.
    """
    written = getattr(config, SETTINGS, None)
    if isinstance(written, LiveSettings) and written.owner is not None and written.owner is not state:
        raise ConfigurationError(
            f"This {type(config).__name__} object is shared with another sparsified model, which would be saved with "
            "these settings. Build one of the two from copy.deepcopy(config)."
        )


def layer_state(module: nn.Module) -> LayerState:
    """The state of an attention module, adopted from its config on the first call if need be.

    A model loaded by `from_pretrained(..., attn_implementation="crisp")` has settings in its config
    but has not been through `sparsify`.

    Raises:
        ConfigurationError: If the module's model has no settings, or they concern the whole model.
    """
    return attached(module) or _adopt(module)


def _adopt(module: nn.Module) -> LayerState:
    config = getattr(module, "config", None)
    if getattr(config, SETTINGS, None) is None:
        raise ConfigurationError(
            f"attn_implementation={IMPLEMENTATION!r} is set, but {type(config).__name__} has no "
            f"{SETTINGS!r} settings. Call crisp_attention.sparsify(model, sparsity=...) first."
        )
    if isinstance(getattr(config, SETTINGS), LiveSettings) and getattr(config, SETTINGS).owner is not None:
        raise ConfigurationError(
            f"This {type(module).__name__} shares its configuration object with a sparsified model (or part of one) "
            "that it is not part of, and would become sparse with it. Build it from a copy of the configuration, or "
            "call crisp_attention.sparsify on the whole model."
        )
    settings, progress = read_settings(config)
    index = getattr(module, "layer_idx", None)
    count = None if index is None else _numbered_layers(config)
    reason = None
    if settings.rule == "random":
        reason = "Rule 'random' draws by layer and step"
    elif settings.schedule is not None or (count is None and (settings.layers or settings.layer_sparsity)):
        reason = "These settings differ from layer to layer or follow training"
    elif settings.by_position and (
        getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False)
    ):
        reason = f"Rule {settings.rule!r} here must know which layers are cross-attention"
    if reason is not None:
        raise ConfigurationError(
            f"{reason}, which a model knows only after crisp_attention.load or crisp_attention.sparsify. "
            "Use one of them."
        )
    mark_config(config, settings, progress, numbered=count)
    name = type(module).__name__ if index is None else f"{type(module).__name__}.{index}"
    state = LayerState(name, index or 0, count or (index or 0) + 1, ModelState(settings, untried=True))
    attach(module, state)
    return state


def configs(model: nn.Module) -> list[Any]:
    """Every configuration object of a model once: its own, their sub-configurations, its modules' own.

    Composite models keep one for each part, and some parts a copy of their model's; each says for
    itself which attention is used, and is saved with its part.
    """
    from transformers import PreTrainedConfig

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


def set_implementations(wanted: Implementations) -> None:
    """Give each configuration an attention implementation."""
    for config, implementation in wanted:
        # Not the public property, which would pass it on to the parts, each of which has its own.
        config._attn_implementation_internal = implementation


def default_implementations(model: PreTrainedModel) -> Implementations:
    """What Transformers would choose for each configuration, where nobody knows what was before."""
    from transformers import PreTrainedModel

    chosen: dict[int, str | None] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            chosen.setdefault(id(module.config), module.get_correct_attn_implementation(None))
    return [(config, chosen.get(id(config), chosen[id(model.config)])) for config in configs(model)]


def mark_config(
    config: Any,
    settings: SparsityConfig,
    progress: float | None = None,
    *,
    owner: ModelState | None = None,
    numbered: int | None = None,
) -> None:
    """Write the settings where `save_pretrained` finds them.

    The implementation's name is written too: Transformers does not store it by itself, so that a
    plain `from_pretrained` would come back dense. With it, such a load is sparse again where this
    package is imported, and fails where it is not.

    Args:
        config: A model's config.
        settings: The settings in force.
        progress: Where a schedule stands, so that a checkpoint of the midst of training comes back
            as sparse as it was.
        owner: The state of the model's layers, if they have one, so that nothing else takes it from here.
        numbered: How many attention layers there are, if each knows its number among them; None otherwise. Settings
            that differ from layer to layer can then be taken up by a layer that was only loaded.
    """
    written: dict[str, Any] = settings.to_dict() if owner is None else LiveSettings(settings.to_dict(), owner)
    if settings.schedule is not None and progress is not None:
        written[_PROGRESS] = progress
    if numbered is not None and (settings.layers is not None or settings.layer_sparsity is not None):
        written[_LAYERS] = numbered
    setattr(config, SETTINGS, written)
    config.attn_implementation = IMPLEMENTATION


def read_settings(config: Any) -> tuple[SparsityConfig, float | None]:
    """What `mark_config` wrote: the settings and where their schedule stands.

    Raises:
        ConfigurationError: If the settings are damaged.
    """
    written = getattr(config, SETTINGS)
    if not isinstance(written, dict):
        return SparsityConfig.from_dict(written), None
    progress = require_share(_PROGRESS, written[_PROGRESS]) if _PROGRESS in written else None
    settings = {name: value for name, value in written.items() if name not in (_PROGRESS, _LAYERS)}
    return SparsityConfig.from_dict(settings), progress


def _numbered_layers(config: Any) -> int | None:
    """How many attention layers a model has, if each knows its number; None if that was not written.

    Raises:
        ConfigurationError: If what was written is no number.
    """
    written = getattr(config, SETTINGS).get(_LAYERS)
    if written is None:
        return None
    require_integer(_LAYERS, written, 1)
    now = getattr(config, "num_hidden_layers", written)
    if now != written:
        raise ConfigurationError(
            f"These settings differ from layer to layer and were saved with {written} attention layers; "
            f"num_hidden_layers is {now} now. Call crisp_attention.sparsify with settings for this model."
        )
    return int(written)


@dataclass(frozen=True)
class ConfigMarks:
    """What stood in a configuration, to return to.

    Attributes:
        config: The configuration.
        marks: What `mark_config` had written, by name; empty where it had not.
        implementation: Its attention implementation.
    """

    config: Any
    marks: dict[str, Any]
    implementation: str | None

    def put_back(self) -> None:
        """Let it stand there again."""
        unmark_config(self.config)
        self.config.__dict__.update(self.marks)
        set_implementations([(self.config, self.implementation)])


def marks_of(model: nn.Module) -> list[ConfigMarks]:
    """What stands in each of a model's configurations now."""
    return [
        ConfigMarks(config, {name: config.__dict__[name] for name in _MARKS if name in config.__dict__}, implementation)
        for config, implementation in implementations(model)
    ]


def unmark_config(config: Any) -> None:
    """Remove what `mark_config` wrote."""
    for name in _MARKS:
        config.__dict__.pop(name, None)
