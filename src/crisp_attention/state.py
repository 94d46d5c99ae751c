"""Run-time state of a sparsified model of any kind, hung on its attention modules.

Never in a global, so that models with different settings live side by side, and deepcopy and pickle
take it along.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError
from crisp_attention.monitoring import Monitor
from crisp_attention.operator import AttentionOutput, attend
from crisp_attention.rules import Pairs

_STATE = "_crisp_layer"

Implementations = list[tuple[Any, str | None]]
"""Configuration objects, each with the name of its attention implementation."""


def _scalar(value: float | int) -> Tensor:
    """A number that compiled code reads anew each time instead of building it in."""
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


@dataclass
class ModelState:
    """Run-time state shared by all attention layers of one model.

    Attributes:
        config: The settings in force.
        restore: Each of the model's configurations and the attention implementation to return to;
            None if it was sparse from the start.
        dense: How many `crisp.dense` blocks are open.
        progress: Share of training that is done, which a schedule follows; None until it is set.
        driven: Whether somebody tells the progress in this session; a checkpoint only remembers it.
        forward_index: Int64 scalar, training forwards so far; which draw a randomised rule makes.
            Set from the Trainer's global step by `SparsityCallback`, so that resuming repeats nothing.
        unfinished: Training forwards under gradient checkpointing since a backward pass recomputed one.
        recomputed: Whether a backward pass recomputed a forward since the last training forward.
        drawn: Layers that drew a random mask in the present training forward.
        monitors: Who counts realised sparsity at present.
        probing: Whether attention is sparse in every mode just now, for a look at what it does.
        adopted: Whether it was made for one layer on its first call rather than by `sparsify`.
    """

    config: SparsityConfig
    restore: Implementations | None = None
    dense: int = 0
    progress: float | None = None
    driven: bool = False
    forward_index: Tensor = field(default_factory=lambda: _scalar(0))
    unfinished: int = 0
    recomputed: bool = False
    drawn: set[int] = field(default_factory=set)
    monitors: list[Monitor] = field(default_factory=list)
    probing: bool = False
    adopted: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy is made outside of the blocks that are open around the original."""
        return {**self.__dict__, "dense": 0, "driven": False, "drawn": set(), "monitors": []}

    def set_forward_index(self, index: int) -> None:
        """Say how many training forwards there were; every layer may draw anew."""
        self.forward_index.fill_(index)
        self.drawn.clear()


class LayerState:
    """Run-time state of one attention layer.

    Attributes:
        name: The module's name in its model.
        index: Its position among the attention layers, in calling order.
        config: Its own settings; None if it stays dense whatever the model's are.
        cross: Whether its queries and keys come from two different sequences.
        stock: The attention implementation that it has when dense; None if that is not known.
        model: State shared with the model's other layers.
    """

    def __init__(
        self, name: str, index: int, count: int, model: ModelState, *, cross: bool = False, stock: str | None = None
    ) -> None:
        self.name = name
        self.index = index
        self.config = model.config.for_layer(index, count)
        self.cross = cross
        self.stock = stock
        self.model = model
        self._depth = index / (count - 1) if count > 1 else 0.0
        self._sparsity = _scalar(0.0)
        self.follow_schedule()

    def follow_schedule(self) -> None:
        """Take over the model's progress; before any is set, sparsity is what it is at the end."""
        config = self.config
        if config is None or config.sparsity is None or config.schedule is None:
            return
        progress = 1.0 if self.model.progress is None else self.model.progress
        self._sparsity.fill_(config.schedule.sparsity(config.sparsity, progress, self._depth))

    def active(self, training: bool) -> SparsityConfig | None:
        """The settings in force for a module in this mode, or None where attention is dense.

        Raises:
            ConfigurationError: If a schedule waits for a progress that nobody sets.
        """
        config = self.config
        if config is None:
            return None
        if self.model.probing:
            return config if config.removes else None
        if self.model.dense or not config.active(training):
            return None
        if training and config.schedule is not None and not self.model.driven:
            raise ConfigurationError(
                "This model has a sparsity schedule, but nothing tells it how far training has come. Give the Trainer "
                "callbacks=[crisp_attention.SparsityCallback()], or call crisp_attention.set_progress(model, share) "
                "before each step."
            )
        return config

    def sparsity(self, config: SparsityConfig, training: bool) -> float | Tensor | None:
        """The sparsity at this moment; None where the rule has none.

        A number, or a tensor where reading it would break a compiled graph. In evaluation a
        stochastic schedule does not draw: it stands at the configuration's sparsity.
        """
        if config.schedule is None or config.sparsity is None:
            return config.sparsity
        if config.schedule.kind == "stochastic" and not training:
            return config.sparsity
        return self._sparsity if torch.compiler.is_compiling() else float(self._sparsity)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        training: bool,
        pairs: Pairs,
        bias: Tensor | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> AttentionOutput:
        """`operator.attend` as this layer is at this moment, seen by whoever watches.

        Args:
            q: As in `operator.attend`.
            k: As in `operator.attend`.
            v: As in `operator.attend`.
            training: The module's mode.
            pairs: The valid pairs.
            bias: As in `operator.attend`.
            scale: As in `operator.attend`.
            softcap: As in `operator.attend`.
            sinks: As in `operator.attend`.
            dropout_p: Applied as given.
        """
        config = self.active(training)
        if config is not None and config.rule == "random" and training:
            pairs = dataclasses.replace(pairs, first=_process() * q.shape[0])
        out = attend(
            q,
            k,
            v,
            config=config,
            pairs=pairs,
            sparsity=None if config is None else self.sparsity(config, training),
            bias=bias,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            dropout_p=dropout_p,
            stream=self._stream(config, training),
            training=training,
        )
        for monitor in self.model.monitors:
            monitor.record(self.name, training, out)
        return out

    def _stream(self, config: SparsityConfig | None, training: bool) -> Tensor | None:
        """Which random stream a randomised rule draws from: seed, layer and, in training, the step.

        A pure function of those, so that gradient checkpointing and resuming repeat the same masks.

        Raises:
            ConfigurationError: If a backward pass recomputes a forward that was not the last one, whose
                step is no longer known, or the layer draws twice in one step.
        """
        if config is None or config.rule != "random":
            return None
        base = ((config.seed or 0) * 1_000_003 + self.index) * 16_777_259 % 2**62  # an int64 with room for steps
        if not training:
            return torch.tensor(base)
        if not torch.compiler.is_compiling():
            self._require_own_draw()
        return self.model.forward_index + base

    def _require_own_draw(self) -> None:
        """Refuse to draw the masks of another call, or of a forward whose step is no longer known."""
        if torch._C._current_graph_task_id() >= 0:  # within a backward pass: gradient checkpointing recomputes
            self.model.recomputed = True
            if self.model.unfinished > 1:
                raise ConfigurationError(
                    f"Gradient checkpointing recomputes one of {self.model.unfinished} forwards, and rule 'random' "
                    "knows the draw of the last one only. Call backward after each forward, or switch gradient "
                    "checkpointing off."
                )
            return
        if self.index in self.model.drawn:
            raise ConfigurationError(
                f"Rule 'random' would give {self.name or 'this layer'} the same masks again: it ran twice since "
                "the sparsified model's forward began. Either it runs several times in a pass, which this rule "
                "cannot serve, or that model is not the one that is called: sparsify the one that is, or call "
                "crisp_attention.set_forward_index before each step."
            )
        self.model.drawn.add(self.index)


def _process() -> int:
    """This process's rank among those that train together.

    With it, processes draw what one process would draw for their batches put one after another.
    """
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if together else 0


def attached(module: nn.Module) -> LayerState | None:
    """The state that hangs on a module, or None."""
    state: LayerState | None = module.__dict__.get(_STATE)
    return state


def attach(module: nn.Module, state: LayerState) -> None:
    """Hang a layer's state on its module."""
    setattr(module, _STATE, state)


def layers(model: nn.Module) -> dict[str, LayerState]:
    """All attached layers of a model, by module name; those made alone learn their name."""
    found = {name: module.__dict__[_STATE] for name, module in model.named_modules() if _STATE in module.__dict__}
    for name, layer in found.items():
        layer.name = layer.name or name
    return found


def shared_states(model: nn.Module) -> list[ModelState]:
    """The state that a model's layers share; several where parts of it were sparsified apart."""
    return list({id(layer.model): layer.model for layer in layers(model).values()}.values())


@contextlib.contextmanager
def attending(model: nn.Module, config: SparsityConfig | None) -> Iterator[None]:
    """Other settings in every layer within a `with` block, for evaluation; undone on errors too.

    Args:
        model: A sparsified model.
        config: Settings that `sparsify` accepts for it, without a schedule; None changes nothing.
    """
    found = list(layers(model).values()) if config is not None else []
    before = [layer.config for layer in found]
    try:
        for layer in found:
            layer.config = config and config.for_layer(layer.index, len(found))
        yield
    finally:
        for layer, own in zip(found, before, strict=True):
            layer.config = own


def detach(model: nn.Module) -> None:
    """Remove the state of every layer of a model, its own included."""
    for module in model.modules():
        module.__dict__.pop(_STATE, None)


def count_forwards(model: nn.Module, *, wanted: bool) -> None:
    """Advance the draw of a randomised rule once per training forward of the whole model.

    On the model, not in its layers: gradient checkpointing runs a layer twice in one step.
    """
    hook_before_forward(model, _advance, wanted=wanted)


def hook_before_forward(model: nn.Module, hook: Callable[[nn.Module, Any], None], *, wanted: bool) -> None:
    """Have a hook on a model once, or not at all, and on none of its parts."""
    for module in model.modules():
        for key, present in list(module._forward_pre_hooks.items()):
            if present is hook:
                del module._forward_pre_hooks[key]
    if wanted:
        model.register_forward_pre_hook(hook)


def _advance(model: nn.Module, _: Any) -> None:
    if not model.training:
        return
    for state in shared_states(model):
        state.forward_index.add_(1)
        if not torch.compiler.is_compiling():
            state.drawn.clear()
            _count_unfinished(model, state)


def _count_unfinished(model: nn.Module, state: ModelState) -> None:
    """Count the forwards whose backward pass, under gradient checkpointing, is still to recompute them."""
    flags = [module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    # A plain module does not say whether parts of it are recomputed.
    checkpointing = torch.is_grad_enabled() and (any(flags) or not flags)
    before = 0 if state.recomputed or not checkpointing else state.unfinished
    state.unfinished, state.recomputed = before + checkpointing, False
