"""sparsify, densify and check for any `nn.Module` that is no Transformers model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from crisp_attention.backends import require_known
from crisp_attention.checking import (
    AttentionCall,
    CheckReport,
    Inputs,
    OwnAttention,
    layer_reports,
    measure,
    require_own_draws,
)
from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError, UnsupportedModelError, nearest
from crisp_attention.modules.attention import require_heads
from crisp_attention.modules.multihead import SparseMultiheadAttention, guard_nested, unguard_nested
from crisp_attention.modules.sparse import SparseModule
from crisp_attention.settings import given
from crisp_attention.state import LayerState, ModelState, attach, count_forwards, detach

Model = TypeVar("Model", bound=nn.Module)

_LOOKED_FOR = (
    "torch.nn.MultiheadAttention, timm's Attention, AttentionRope, EvaAttention and AttentionPoolLatent, "
    "and crisp_attention.CrispAttention"
)


def sparsify(
    model: Model,
    config: SparsityConfig | None = None,
    *,
    inputs: Inputs | None = None,
    exclude: Iterable[str] = (),
    backend: str = "auto",
    **settings: Any,
) -> Model:
    """As `crisp_attention.sparsify`; see there."""
    require_known(backend)
    config = given(SparsityConfig, config, settings)
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    found = _find(model, exclude)
    before = {module: (module.__class__, module.layer) for module in _served(model).values()}
    shared = _shared_state(model, config)
    settings_before = dataclasses.replace(shared)
    shared.config, shared.progress, shared.driven, shared.layers = config, None, False, []
    shared.excluded, shared.backend = exclude, backend
    try:
        states = {name: LayerState(name, index, len(found), shared) for index, name in enumerate(found)}
        for name, module in found.items():
            if (own := states[name].config) is not None:
                require_heads(f"{type(module).__name__} {name!r}", module.__dict__["num_heads"], own)
        _remove(model)
        for name, module in found.items():
            module.__class__ = _sparse_class(module) or type(module)
            attach(module, states[name])
        guard_nested(model)
        if inputs is not None:
            _require_calls(model, config, inputs)
    except Exception:
        _remove(model)
        shared.take_back(settings_before)
        for module, (cls, layer) in before.items():
            module.__class__ = cls
            if layer is not None:
                attach(module, layer)
        if before:
            guard_nested(model)
        raise
    shared.set_forward_index(0)
    shared.unfinished, shared.recomputed = 0, False
    count_forwards(model, wanted=config.rule == "random")
    return model


def densify(model: Model) -> Model:
    """As `crisp_attention.densify`; see there."""
    _remove(model)
    count_forwards(model, wanted=False)
    return model


def check(model: nn.Module, inputs: Inputs | None = None) -> CheckReport:
    """As `crisp_attention.check`; see there."""
    layers = {name: module.layer for name, module in _served(model).items() if module.layer is not None}
    if not layers:
        raise ConfigurationError(f"This {type(model).__name__} is not sparsified. Call crisp_attention.sparsify.")
    if inputs is None:
        raise UnsupportedModelError(
            f"Nothing says what a {type(model).__name__} takes. Pass inputs={{...}}, the keyword arguments of a small "
            "forward pass."
        )
    calls, problems = _tried(model, inputs)
    config = next(iter(layers.values())).model.config
    return CheckReport(type(model).__name__, config, layer_reports(model, calls), tuple(problems))


def _served(model: nn.Module) -> dict[str, SparseModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseModule)}


def _remove(model: nn.Module) -> None:
    for module in _served(model).values():
        detach(module)
        if module.stock is not None:
            module.__class__ = module.stock
    unguard_nested(model)


def _shared_state(model: nn.Module, config: SparsityConfig) -> ModelState:
    """The state that the model's layers share, the same object again so that open blocks stay in force."""
    states = [module.layer.model for module in _served(model).values() if module.layer is not None]
    return states[0] if states and all(state is states[0] for state in states) else ModelState(config)


def _sparse_class(module: nn.Module) -> type[SparseModule] | None:
    """The class with which a module is sparse; None if it cannot be."""
    if isinstance(module, SparseModule):
        return type(module)
    if type(module) is nn.MultiheadAttention:
        return SparseMultiheadAttention
    if type(module).__module__.partition(".")[0] == "timm":
        from crisp_attention.modules import timm_attention

        return timm_attention.CLASSES.get(type(module))
    return None


def _find(model: nn.Module, exclude: tuple[str, ...]) -> dict[str, nn.Module]:
    """The attention layers to make sparse, by name.

    Raises:
        ConfigurationError: If an excluded name does not exist.
        UnsupportedModelError: If there are none, or others would stay dense that nobody excluded.
    """
    modules = dict(model.named_modules())
    for name in exclude:
        if name not in modules or not name:
            raise ConfigurationError(f"exclude names {name!r}. {nearest(name, modules.keys() - {''})}")
    left = {name: module for name, module in modules.items() if not _within(name, exclude)}
    foreign = [name for name, module in left.items() if isinstance(module, PreTrainedModel)]
    left = {name: module for name, module in left.items() if not _within(name, foreign)}
    found = {name: module for name, module in left.items() if _sparse_class(module) is not None}
    holders = {name for name in left if any(_within(layer, [name]) for layer in found)}
    dense = [
        name
        for name, module in left.items()
        if _is_attention(module) and name not in holders and not _within(name, found)
    ]
    # Of attention within attention, the one that computes.
    dense = [name for name in dense if not any(other != name and _within(other, [name]) for other in dense)]
    kind = type(model).__name__
    if foreign:
        raise UnsupportedModelError(
            f"{kind} holds a Transformers model, {foreign[0]!r}, which is sparsified by itself: "
            f"crisp_attention.sparsify(model.{foreign[0]}, ...)."
            + f" Then exclude={foreign[:1]} for the other attention layers."
            * bool(found)
        )
    if dense:
        named = ", ".join(f"{name or 'the model itself'} ({type(left[name]).__name__})" for name in dense)
        raise UnsupportedModelError(
            f"These attention layers of {kind} cannot be served and would stay dense: {named}. Write them with "
            "crisp_attention.CrispAttention or crisp_attention.attention"
            + (f", or accept it with exclude={dense}." if found else ".")
        )
    if not found:
        raise UnsupportedModelError(
            f"Found no attention layer in {kind} that can be sparse. Looked for: {_LOOKED_FOR}. For layers of your "
            "own there is crisp_attention.CrispAttention, and crisp_attention.attention."
        )
    return found


def _is_attention(module: nn.Module) -> bool:
    named = re.search("attention|attn", type(module).__name__, re.IGNORECASE) is not None
    # timm's mark of a module that attends, whatever its name.
    return named or isinstance(module, nn.MultiheadAttention) or "fused_attn" in module.__dict__


def _within(name: str, roots: Iterable[str]) -> bool:
    return any(name == root or root == "" or name.startswith(f"{root}.") for root in roots)


def _tried(model: nn.Module, inputs: Inputs) -> tuple[tuple[AttentionCall, ...], list[str]]:
    """The attention calls of a forward pass, and a sentence for each defect that it showed."""
    outside: list[str] = []
    with OwnAttention(model, outside):
        calls = measure(model, inputs)
    served = _served(model)
    excluded = next((module.layer.model.excluded for module in served.values() if module.layer is not None), ())
    problems = []
    if idle := sorted(served.keys() - {call.layer for call in calls}):
        problems.append(f"these attention layers did not run with the given inputs: {', '.join(idle)}.")
    if dense := [name for name in outside if not _within(name, served) and not _within(name, excluded)]:
        problems.append(f"these modules compute attention on their own and stay dense: {', '.join(dense)}.")
    return calls, problems


def _require_calls(model: nn.Module, config: SparsityConfig, inputs: Inputs) -> None:
    """Try the model: every layer must run, once if masks are drawn at random, and nothing else attend.

    Raises:
        UnsupportedModelError: If one does not.
    """
    calls, problems = _tried(model, inputs)
    if problems:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be sparsified: " + " ".join(problems))
    require_own_draws(model, config, calls)
