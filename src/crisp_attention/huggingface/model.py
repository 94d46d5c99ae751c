"""The verbs on a model: sparsify, densify, dense, monitor, load."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError, UnsupportedModelError
from crisp_attention.huggingface.check import AttentionCall, evaluation, probe
from crisp_attention.huggingface.inputs import Inputs, working_inputs
from crisp_attention.huggingface.interface import register
from crisp_attention.huggingface.state import (
    IMPLEMENTATION,
    SETTINGS,
    Implementations,
    LayerState,
    ModelState,
    attach,
    configs,
    default_implementations,
    detach,
    implementations,
    layers,
    mark_config,
    unmark_config,
)
from crisp_attention.huggingface.trial import TOLERANCE, Trial
from crisp_attention.monitoring import Monitor, SparsityMonitor
from crisp_attention.operator import causal_refusal

Model = TypeVar("Model", bound=PreTrainedModel)
Watcher = TypeVar("Watcher", bound=Monitor)


def sparsify(
    model: Model, config: SparsityConfig | None = None, *, inputs: Inputs | None = None, **settings: Any
) -> Model:
    """Make every attention layer of a Transformers model sparse, in place.

    The settings go into `model.config.crisp_attention`, so that `save_pretrained` keeps them. A
    small forward pass (evaluation mode, no gradients, random state untouched) makes sure that each
    layer really calls the operator. Calling it again replaces the settings.

    Args:
        model: Any `PreTrainedModel` whose attention goes through Transformers' attention interface.
        config: The settings, or give them as keywords.
        inputs: Keyword arguments of a forward pass for the check, where the model needs other than
            token ids.
        **settings: Fields of `SparsityConfig`, in place of `config`.

    Returns:
        The same model.

    Raises:
        ConfigurationError: If a setting is invalid or the rule cannot serve this (causal) model.
        UnsupportedModelError: If the model, or one of its attention layers, would not be touched.
            The model is then as it was.
    """
    if config is not None and settings:
        raise ConfigurationError(
            f"Give a SparsityConfig or keywords, not both; got both config and {sorted(settings)}."
        )
    config = SparsityConfig.from_dict(settings) if config is None else config
    _require_interface(model)
    register()
    found = layers(model)
    restore = next(iter(found.values())).model.restore if found else None
    if restore is None and model.config._attn_implementation != IMPLEMENTATION:
        restore = implementations(model)
    previous_settings = getattr(model.config, SETTINGS, None)
    model.set_attn_implementation(IMPLEMENTATION)
    for part in configs(model):
        mark_config(part, config)
    try:
        _attach_layers(model, config, restore, inputs)
        _require_dense_equality(model, inputs)
    except Exception:
        if previous_settings is not None and found:
            _restore_settings(model, found, SparsityConfig.from_dict(previous_settings))
        else:
            _remove(model, restore)
        raise
    return model


def densify(model: Model) -> Model:
    """Undo `sparsify`: dense attention as before, settings removed from the config.

    Returns:
        The same model.
    """
    found = layers(model)
    if not found and getattr(model.config, SETTINGS, None) is None:
        return model
    _remove(model, next(iter(found.values())).model.restore if found else None)
    return model


@contextlib.contextmanager
def dense(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Dense attention within a `with` block; nests, and is undone on errors too."""
    states = _model_states(model)
    for state in states:
        state.dense += 1
    try:
        yield model
    finally:
        for state in states:
            state.dense -= 1


@contextlib.contextmanager
def monitor(model: PreTrainedModel) -> Iterator[SparsityMonitor]:
    """Count realised sparsity of every attention call within a `with` block.

    Yields:
        A `SparsityMonitor`; read `realised(training)` or `mean(training)` at any time.
    """
    with watching(model, SparsityMonitor()) as watcher:
        yield watcher


@contextlib.contextmanager
def watching(model: PreTrainedModel, watcher: Watcher) -> Iterator[Watcher]:
    """Let a monitor of your own see every attention call within a `with` block."""
    states = _model_states(model)
    for state in states:
        state.monitors.append(watcher)
    try:
        yield watcher
    finally:
        for state in states:
            state.monitors.remove(watcher)


def set_forward_index(model: PreTrainedModel, index: int) -> None:
    """Say how many training forwards a model has done: which draw a randomised rule makes next.

    Args:
        model: A sparsified model.
        index: Training forwards so far, >= 0.
    """
    for state in _model_states(model):
        state.forward_index = index


def load(auto_class: type[Any], path: str | os.PathLike[str], *, inputs: Inputs | None = None, **kwargs: Any) -> Any:
    """`from_pretrained` for a sparsified model: the settings come back, or an error does.

    Args:
        auto_class: A model class or auto class, as `AutoModelForSequenceClassification`.
        path: What `save_pretrained` wrote, or a hub name.
        inputs: As in `sparsify`.
        **kwargs: Passed to `from_pretrained`.

    Raises:
        ConfigurationError: If the checkpoint has no settings, so that it would come back dense.
    """
    register()
    model = auto_class.from_pretrained(path, **kwargs)
    settings = getattr(model.config, SETTINGS, None)
    if settings is None:
        raise ConfigurationError(
            f"{os.fspath(path)!r} was saved without {SETTINGS!r} settings, so it would load dense. "
            f"Load it with {auto_class.__name__}.from_pretrained and call crisp_attention.sparsify."
        )
    return sparsify(model, SparsityConfig.from_dict(settings), inputs=inputs)


def _require_interface(model: object) -> None:
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"Expected a Transformers PreTrainedModel, got {type(model).__name__}. For your own layers call "
            "crisp_attention.attention."
        )
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{type(model).__name__} computes its attention itself and never calls Transformers' attention "
            "interface: crisp attention would change nothing."
        )


def _attach_layers(
    model: PreTrainedModel, config: SparsityConfig, restore: Implementations | None, inputs: Inputs | None
) -> None:
    # The same object again, so that blocks of `dense` and `monitor` that are open stay in force.
    states = [layer.model for layer in layers(model).values() if not layer.model.adopted]
    shared = states[0] if states else ModelState(config)
    result = probe(model, inputs, config, restore)
    result.raise_for_problems()
    for call in result.calls:
        _require_causal_rule(call, config)
    if config.rule == "random" and len({call.layer for call in result.calls}) < len(result.calls):
        raise UnsupportedModelError(
            f"{type(model).__name__} runs one attention module several times in a pass; rule 'random', which draws "
            "by module, would draw the same masks each time."
        )
    stock = {id(part): implementation for part, implementation in restore or default_implementations(model)}
    shared.config, shared.restore, shared.forward_index = config, restore, 0
    # Layers that the probe did not reach, as those of a tower without input, come last.
    for index, name in enumerate(dict.fromkeys([*(call.layer for call in result.calls), *result.idle])):
        module = model.get_submodule(name)
        attach(module, LayerState(name, index, shared, stock.get(id(getattr(module, "config", model.config)))))
    if result.dense:
        warnings.warn(
            f"These pooling heads of {type(model).__name__} do not go through Transformers' attention interface and "
            f"stay dense: {', '.join(result.dense)}.",
            stacklevel=4,
        )
    _count_forwards(model, wanted=config.rule == "random")


def _require_dense_equality(model: PreTrainedModel, inputs: Inputs | None) -> None:
    """Make sure that with every score kept, the operator gives what the stock model gives.

    A model may compute its scores in a way that no argument tells, or choose its way by the name of
    its attention implementation; only its outputs show it.
    """
    if inputs is None:
        with evaluation(model), dense(model):
            inputs = working_inputs(model)
    trial = Trial(model, dict(inputs))
    with dense(model), watching(model, SparsityMonitor()):
        ours = trial.run()
    # Looser than an audit: a deep network adds up the rounding of its layers.
    coarse = model.dtype not in TOLERANCE
    limit = trial.tolerance if coarse else 10 * trial.tolerance
    now = implementations(model)
    _set_implementations(next(iter(layers(model).values())).model.restore or default_implementations(model))
    try:
        theirs = trial.run()
        figure = trial.compared(ours, theirs, typical=coarse)
        wrong = figure is not None and figure > limit and trial.compared(trial.run(), theirs) == 0.0
    finally:
        _set_implementations(now)
    if wrong:
        raise UnsupportedModelError(
            f"{type(model).__name__} with every score kept differs from the stock model (by {figure:.1e} of its "
            "outputs' scale): its attention does something that crisp attention does not know of."
        )


def _set_implementations(wanted: Implementations) -> None:
    for part, implementation in wanted:
        # Not the public property, which would pass it on to the parts, each of which has its own.
        part._attn_implementation_internal = implementation


def _require_causal_rule(call: AttentionCall, config: SparsityConfig) -> None:
    if call.causal and config.removes and not config.traits.causal:
        raise causal_refusal(config.rule)


def _model_states(model: PreTrainedModel) -> list[ModelState]:
    """The state of a sparsified model, attaching it to one that was only loaded as "crisp"."""
    attached = layers(model).values()
    if not attached or any(layer.model.adopted for layer in attached):
        settings = getattr(model.config, SETTINGS, None)
        if settings is None:
            raise ConfigurationError(f"This {type(model).__name__} is not sparsified. Call crisp_attention.sparsify.")
        sparsify(model, SparsityConfig.from_dict(settings))
    return list({id(layer.model): layer.model for layer in layers(model).values()}.values())


def _remove(model: PreTrainedModel, restore: Implementations | None) -> None:
    detach(model)
    _count_forwards(model, wanted=False)
    for part in configs(model):
        unmark_config(part)
    _set_implementations(restore or default_implementations(model))


def _restore_settings(model: PreTrainedModel, found: dict[str, LayerState], config: SparsityConfig) -> None:
    for name, state in found.items():
        attach(model.get_submodule(name), state)
    for part in configs(model):
        mark_config(part, config)
    _count_forwards(model, wanted=config.rule == "random")


def _count_forwards(model: PreTrainedModel, *, wanted: bool) -> None:
    """Advance the draw of a randomised rule once per training forward of the whole model.

    On the model, not in its layers: gradient checkpointing runs a layer twice in one step.
    """
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _advance:
                del module._forward_pre_hooks[key]
    if wanted:
        model.register_forward_pre_hook(_advance)


def _advance(model: nn.Module, _: Any) -> None:
    if model.training:
        for state in _model_states(model):  # type: ignore[arg-type]
            state.forward_index += 1
