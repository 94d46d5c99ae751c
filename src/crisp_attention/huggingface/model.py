"""The verbs on a model: sparsify, densify, dense, monitor, load."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from crisp_attention.backends import Detail, require_known
from crisp_attention.checking import CheckReport, Inputs, measure, require_own_draws
from crisp_attention.config import SETTINGS, SparsityConfig
from crisp_attention.errors import ConfigurationError, UnsupportedModelError
from crisp_attention.huggingface.persistence import (
    IMPLEMENTATION,
    ConfigMarks,
    configs,
    default_implementations,
    implementations,
    mark_config,
    marks_of,
    read_settings,
    require_own_config,
    set_implementations,
    unmark_config,
)
from crisp_attention.huggingface.probe import probe, report_on
from crisp_attention.huggingface.trial import HALF_TOLERANCE, TOLERANCE, Trial
from crisp_attention.masks import causal_refusal
from crisp_attention.monitoring import Monitor, SparsityMonitor
from crisp_attention.operator import AttentionOutput
from crisp_attention.schedule import require_progress
from crisp_attention.settings import given
from crisp_attention.state import (
    Implementations,
    LayerState,
    ModelState,
    attach,
    attached,
    count_forwards,
    detach,
    hook_before_forward,
    layers,
    shared_states,
)

Model = TypeVar("Model", bound=PreTrainedModel)
AnyModel = TypeVar("AnyModel", bound=nn.Module)
Watcher = TypeVar("Watcher", bound=Monitor)


def sparsify(
    model: Model,
    config: SparsityConfig | None = None,
    *,
    inputs: Inputs | None = None,
    backend: str = "auto",
    **settings: Any,
) -> Model:
    """As `crisp_attention.sparsify`; see there."""
    return make_sparse(model, given(SparsityConfig, config, settings), inputs, backend=backend)


def make_sparse(
    model: Model, config: SparsityConfig, inputs: Inputs | None, *, backend: str = "auto", served: bool = False
) -> Model:
    """`sparsify` by a configuration.

    Args:
        model: As in `sparsify`.
        config: The settings.
        inputs: As in `sparsify`.
        backend: As in `sparsify`.
        served: Whether it was sparsified on these inputs before, so that it need not prove itself again.
    """
    _require_interface(model)
    require_known(backend)
    found = layers(model)
    states = [layer.model for layer in found.values() if not layer.model.untried]
    # The same object again, so that blocks of `dense` and `monitor` that are open stay in force.
    shared = states[0] if states else ModelState(config)
    for part in configs(model):
        require_own_config(part, shared)
    restore = next(iter(found.values())).model.restore if found else None
    if restore is None and model.config._attn_implementation != IMPLEMENTATION:
        restore = implementations(model)
    before, marks = dataclasses.replace(shared) if states else None, marks_of(model)
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        shared.homes, shared.backend = configs(model), backend
        for part in shared.homes:
            mark_config(part, config, owner=shared)
        _attach_layers(model, config, shared, restore, inputs, served)
    except Exception:
        if before is not None:
            shared.take_back(before)
        _put_back(model, found, marks, shared if states else None)
        raise
    return model


def densify(model: Model) -> Model:
    """As `crisp_attention.densify`; see there."""
    found = layers(model)
    if not found and getattr(model.config, SETTINGS, None) is None:
        return model
    _remove(model, next(iter(found.values())).model.restore if found else None)
    return model


def check(model: PreTrainedModel, inputs: Inputs | None = None) -> CheckReport:
    """As `crisp_attention.check`; see there."""
    if getattr(model.config, SETTINGS, None) is None:
        raise ConfigurationError(f"This {type(model).__name__} is not sparsified. Call crisp_attention.sparsify.")
    _adopt(model, inputs)
    return report_on(model, inputs)


@contextlib.contextmanager
def dense(model: AnyModel) -> Iterator[AnyModel]:
    """Dense attention within a `with` block; nests, and is undone on errors too."""
    states = model_states(model)
    for state in states:
        state.dense += 1
    try:
        yield model
    finally:
        for state in states:
            state.dense -= 1


@contextlib.contextmanager
def monitor(model: nn.Module) -> Iterator[SparsityMonitor]:
    """Count realised sparsity of every attention call within a `with` block.

    Yields:
        A `SparsityMonitor`; read `realised(training)` or `mean(training)` at any time.
    """
    with watching(model, SparsityMonitor()) as watcher:
        yield watcher


@contextlib.contextmanager
def watching(model: nn.Module, watcher: Watcher) -> Iterator[Watcher]:
    """Let a monitor of your own see every attention call within a `with` block."""
    states = model_states(model)
    for state in states:
        state.monitors.append(watcher)
    try:
        yield watcher
    finally:
        for state in states:
            state.monitors.remove(watcher)


def set_forward_index(model: nn.Module, index: int) -> None:
    """Say how many training forwards a model has done: which draw a randomised rule makes next.

    Args:
        model: A sparsified model, or one within DDP or another wrapper.
        index: Training forwards so far, >= 0.
    """
    for state in model_states(model):
        state.set_forward_index(index)


def set_progress(model: nn.Module, progress: float) -> None:
    """Say how far training has come, which the sparsity schedule follows.

    `SparsityCallback` does this in the Trainer; call it before each step of a loop of your own. A
    pure function of `progress`: nothing is counted, so that resuming needs nothing but the share.

    Args:
        model: A sparsified model, or one within DDP or another wrapper. Without a schedule nothing changes.
        progress: Share of training that is done, in [0, 1].

    Raises:
        ConfigurationError: If `progress` is not a share, or the model is not sparsified.
    """
    progress = require_progress(progress)
    for state in model_states(model):
        state.driven = True
        _stand_at(state, progress)


def load(auto_class: type[Any], path: str | os.PathLike[str], *, inputs: Inputs | None = None, **kwargs: Any) -> Any:
    """`from_pretrained` for a sparsified model: the settings come back, or an error does.

    Args:
        auto_class: A model class or auto class, as `AutoModelForSequenceClassification`.
        path: What `save_pretrained` wrote, or a hub name.
        inputs: As in `sparsify`.
        **kwargs: Passed to `from_pretrained`.

    Raises:
        ConfigurationError: If there is no such checkpoint, or it has no settings, so that it would come back dense.
    """
    try:
        model = auto_class.from_pretrained(path, **kwargs)
    except OSError as error:
        if os.path.exists(path):
            raise
        raise ConfigurationError(
            f"There is no folder {os.fspath(path)!r}, and as a model's name it could not be had from the Hugging Face "
            f"hub ({type(error).__name__}). Expected what save_pretrained wrote."
        ) from error
    if getattr(model.config, SETTINGS, None) is None:
        raise ConfigurationError(
            f"{os.fspath(path)!r} was saved without {SETTINGS!r} settings, so it would load dense (a PEFT adapter "
            f"never has them: they are the base model's). Load it with {auto_class.__name__}.from_pretrained and call "
            "crisp_attention.sparsify with the settings that it was trained with."
        )
    _adopt(model, inputs, even_if_dense=True)
    return model


def model_states(model: nn.Module) -> list[ModelState]:
    """The state of each sparsified model in a module: itself, or what DDP, a compiler or another module wraps.

    A model that was only loaded as "crisp" gets its state here.

    Raises:
        ConfigurationError: If there is none.
    """
    for marked in _marked_models(model):
        _adopt(marked)
    states = shared_states(model)
    if not states:
        raise ConfigurationError(f"This {type(model).__name__} is not sparsified. Call crisp_attention.sparsify.")
    return states


def _adopt(model: PreTrainedModel, inputs: Inputs | None = None, *, even_if_dense: bool = False) -> None:
    """Give a model that was only loaded as "crisp" its state; one that has it stays as it is."""
    attached = layers(model).values()
    now = model.config._attn_implementation
    if now != IMPLEMENTATION and all(layer.model.untried for layer in attached) and not even_if_dense:
        raise ConfigurationError(
            f"This {type(model).__name__} was saved sparse, and loaded dense with attn_implementation={now!r}. Leave "
            "that out, or call crisp_attention.sparsify, for a sparse one."
        )
    if not attached or any(layer.model.untried for layer in attached):
        settings, progress = read_settings(model.config)
        sparsify(model, settings, inputs=inputs)
        if progress is not None:
            _remember(model, progress)


def _marked_models(model: nn.Module) -> list[PreTrainedModel]:
    """The Transformers models in a module whose config holds settings, the outermost ones."""
    found: list[PreTrainedModel] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside or not isinstance(module, PreTrainedModel):
            continue
        if getattr(module.config, SETTINGS, None) is not None:
            found.append(module)
            inside.update(module.modules())
    return found


def _remember(model: nn.Module, progress: float) -> None:
    """Stand where a checkpoint stood, without anybody driving the schedule on."""
    for state in shared_states(model):
        _stand_at(state, progress)


def _stand_at(state: ModelState, progress: float) -> None:
    state.stand_at(progress)
    for home in state.homes:
        mark_config(home, state.config, progress, owner=state, numbered=state.numbered)


def _require_interface(model: PreTrainedModel) -> None:
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{type(model).__name__} computes its attention itself and never calls Transformers' attention "
            "interface: crisp attention would change nothing."
        )


def _attach_layers(
    model: PreTrainedModel,
    config: SparsityConfig,
    shared: ModelState,
    restore: Implementations | None,
    inputs: Inputs | None,
    served: bool,
) -> None:
    _guard(model, wanted=False)
    found = probe(model, inputs, restore)
    if found.problems:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be sparsified: " + " ".join(found.problems))
    shared.config, shared.restore, shared.progress, shared.driven, shared.layers = config, restore, None, False, []
    require_own_draws(model, config, found.calls)
    stock = {id(part): implementation for part, implementation in restore or default_implementations(model)}
    # Layers that the probe did not reach, as those of a tower without input, come last.
    names = list(dict.fromkeys([*(call.layer for call in found.calls), *found.idle]))
    numbers = [getattr(model.get_submodule(name), "layer_idx", None) for name in names]
    shared.numbered = len(names) if numbers == list(range(len(names))) and len(shared.homes) == 1 else None
    for home in shared.homes:
        mark_config(home, config, owner=shared, numbered=shared.numbered)
    for index, name in enumerate(names):
        own = [call for call in found.calls if call.layer == name]
        state = LayerState(
            name,
            index,
            len(names),
            shared,
            cross=name in found.cross,
            stock=stock.get(id(getattr(model.get_submodule(name), "config", model.config))),
        )
        # In cross-attention the queries are the decoder's, which must not learn of its later ones either.
        ahead = any(call.causal for call in (found.calls if state.cross else own))
        if state.config is not None and not state.config.per_row and ahead:
            raise causal_refusal(config)
        attach(model.get_submodule(name), state)
    if not served:
        # What only a call can tell, as heads that do not exist, is told now and not in training.
        measure(model, found.inputs)
        _require_dense_equality(model, found.inputs)
    if found.dense:
        warnings.warn(
            f"These pooling heads of {type(model).__name__} do not go through Transformers' attention interface and "
            f"stay dense: {', '.join(found.dense)}.",
            stacklevel=5,
        )
    shared.set_forward_index(0)
    count_forwards(model, wanted=config.rule == "random")
    _guard(model, wanted=True)


def _require_dense_equality(model: PreTrainedModel, inputs: Inputs) -> None:
    """Make sure that with every score kept, the operator gives what the stock model gives.

    A model may compute its scores in a way that no argument tells, or choose its way by the name of
    its attention implementation; only its outputs show it.
    """
    trial = Trial(model, dict(inputs))
    precisions = _Precisions()
    with dense(model), watching(model, precisions):
        ours = trial.run()
    # Looser than an audit: a deep network adds up the rounding of its layers.
    coarse = not {model.dtype, *precisions.seen} <= TOLERANCE.keys()
    limit = HALF_TOLERANCE if coarse else 10 * trial.tolerance
    now = implementations(model)
    set_implementations(next(iter(layers(model).values())).model.restore or default_implementations(model))
    try:
        theirs = trial.run()
        figure = trial.compared(ours, theirs, typical=coarse)
        wrong = figure is not None and figure > limit and trial.compared(trial.run(), theirs) == 0.0
    finally:
        set_implementations(now)
    if wrong:
        raise UnsupportedModelError(
            f"{type(model).__name__} with every score kept differs from the stock model (by {figure:.1e} of its "
            "outputs' scale): its attention does something that crisp attention does not know of."
        )


class _Precisions:
    """Sees in what precision attention is computed: autocast chooses another than the model's."""

    detail = Detail.OUTPUT

    def __init__(self) -> None:
        self.seen: set[torch.dtype] = set()

    def record(self, layer: str, training: bool, out: AttentionOutput) -> None:
        self.seen.add(out.output.dtype)


def _remove(model: PreTrainedModel, restore: Implementations | None) -> None:
    detach(model)
    count_forwards(model, wanted=False)
    _guard(model, wanted=False)
    for part in configs(model):
        unmark_config(part)
    set_implementations(restore or default_implementations(model))


def _put_back(
    model: PreTrainedModel, found: dict[str, LayerState], marks: list[ConfigMarks], shared: ModelState | None
) -> None:
    """Leave a model as it was before a `sparsify` that failed.

    Args:
        model: The model.
        found: The states that its layers had.
        marks: What stood in its configurations.
        shared: Its own state, with the settings that it had; None if it was dense, or only loaded.
    """
    detach(model)
    for name, state in found.items():
        attach(model.get_submodule(name), state)
    for own in marks:
        own.put_back()
    count_forwards(model, wanted=shared is not None and shared.config.rule == "random")
    _guard(model, wanted=shared is not None)


def _guard(model: PreTrainedModel, *, wanted: bool) -> None:
    """Refuse to run a sparsified model, or a part of one, that was switched to another attention implementation."""
    # On its attention modules too: parts have configurations of their own, and can be called by themselves.
    attending = [module for module in model.modules() if attached(module) is not None]
    # Not where parts of it alone are sparse.
    whole = [model] if model.config._attn_implementation == IMPLEMENTATION else []
    hook_before_forward(model, _require_implementation, on=[*whole, *attending] if wanted else [])


def _require_implementation(module: nn.Module, _: Any) -> None:
    now = getattr(getattr(module, "config", None), "_attn_implementation", IMPLEMENTATION)
    if now != IMPLEMENTATION:
        raise ConfigurationError(
            f"This sparsified {type(module).__name__} was switched to attn_implementation={now!r}, which is dense. "
            "Call crisp_attention.densify on the whole model for dense attention, crisp_attention.dense for a while, "
            "or crisp_attention.sparsify again."
        )
