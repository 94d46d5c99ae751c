"""Run-time state of a sparsified model of any kind, hung on its attention modules.

Never in a global, so that models with different settings live side by side, and deepcopy and pickle
take it along.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from crisp_attention.backends import Detail
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
    with torch.inference_mode(False):  # it is changed in place later, perhaps in training
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


@dataclass(eq=False)
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
        trained: With what settings and sparsity each layer last ran in training.
        monitors: Who counts realised sparsity at present.
        probing: Whether attention is sparse in every mode just now, for a look at what it does.
        untried: Whether `sparsify` has not tried the model out: its state was made for one layer on its first
            call, or it is being tried out now.
        layers: The layers that share it.
        homes: The configuration objects that its settings are written to.
        numbered: How many layers there are, if each module knows its number among them (`layer_idx`); else None.
        excluded: Names of submodules that stay dense, as was asked for.
        backend: What computes sparse attention: "auto" or a name. Of this machine and session, so never saved.
    """

    config: SparsityConfig
    restore: Implementations | None = None
    dense: int = 0
    progress: float | None = None
    driven: bool = False
    forward_index: Tensor = field(default_factory=lambda: _scalar(0))
    unfinished: int = 0
    recomputed: bool = False
    drawn: dict[int, int] = field(default_factory=dict)
    trained: dict[str, tuple[SparsityConfig | None, float | None]] = field(default_factory=dict)
    monitors: list[Monitor] = field(default_factory=list)
    probing: bool = False
    untried: bool = False
    layers: list[LayerState] = field(default_factory=list)
    homes: list[Any] = field(default_factory=list)
    numbered: int | None = None
    excluded: tuple[str, ...] = ()
    backend: str = "auto"

    def __getstate__(self) -> dict[str, Any]:
        """A copy is made outside of the blocks that are open around the original."""
        return {**self.__dict__, "dense": 0, "driven": False, "drawn": {}, "trained": {}, "monitors": []}

    def take_back(self, before: ModelState) -> None:
        """Return to the settings of a copy that `dataclasses.replace` made before they were changed."""
        for name in ("config", "restore", "progress", "driven", "layers", "homes", "numbered", "excluded", "backend"):
            setattr(self, name, getattr(before, name))

    def stand_at(self, progress: float) -> None:
        """Take over how far training has come; every layer follows."""
        self.progress = progress
        for layer in self.layers:
            layer.follow_schedule()

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
        model.layers.append(self)
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

    def begin(self, training: bool) -> SparsityConfig | None:
        """The settings in force for a call that begins, as `active`.

        Raises:
            ConfigurationError: As `active`, or if gradient checkpointing recomputes this layer with other attention
                than its forward pass had.
        """
        config = self.active(training)
        if not training or torch.compiler.is_compiling():
            return config
        sparsity = None if config is None else self.sparsity(config, training)
        now = (config, None if sparsity is None else float(sparsity))
        then = self.model.trained.get(self.name, now)
        if not _recomputing():
            self.model.trained[self.name] = now
        elif then != now:
            raise ConfigurationError(
                f"Gradient checkpointing recomputes {self.name or 'this layer'} with other attention than its forward "
                f"pass had ({_in_words(*then)}, now {_in_words(*now)}): its gradients would be wrong. Call backward "
                "before set_progress or another sparsify, and within the same crisp_attention.dense block."
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

    @property
    def heads(self) -> slice | list[int]:
        """Index of the heads that its settings make sparse, where they make any; of all where they name none."""
        return slice(None) if self.config is None or self.config.heads is None else list(self.config.heads)

    def request(self, config: SparsityConfig, training: bool) -> float | Tensor | None:
        """The share of pairs that these settings ask to remove at this moment; None if the rule is not told one."""
        # The sparsity of 'temperature' sets an entropy; no pair is removed.
        return None if config.rule == "temperature" else self.sparsity(config, training)

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
        detail: Detail = Detail.OUTPUT,
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
            detail: What the caller wants to see; whoever watches may want more.
        """
        config = self.begin(training)
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
            backend="auto" if config is None else self.model.backend,
            detail=max([detail, *(monitor.detail for monitor in self.model.monitors)]),
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
        if _recomputing():
            self.model.recomputed = True
            if self.model.unfinished > 1:
                raise ConfigurationError(
                    f"Gradient checkpointing recomputes one of {self.model.unfinished} forwards, and rule 'random' "
                    "knows the draw of the last one only. Call backward after each forward, or switch gradient "
                    "checkpointing off."
                )
            return
        step = int(self.model.forward_index)
        # By number: a hook that was compiled forgets nothing.
        if self.model.drawn.get(self.index) == step:
            raise ConfigurationError(
                f"Rule 'random' would give {self.name or 'this layer'} the same masks again: it ran twice since "
                "the sparsified model's forward began. Either it runs several times in a pass, which this rule "
                "cannot serve, or that model is not the one that is called: sparsify the one that is, or call "
                "crisp_attention.set_forward_index before each step."
            )
        self.model.drawn[self.index] = step


def _recomputing() -> bool:
    """Whether this runs within a backward pass, as when gradient checkpointing recomputes a layer."""
    return bool(torch._C._current_graph_task_id() >= 0)


def _in_words(config: SparsityConfig | None, sparsity: float | None) -> str:
    if config is None:
        return "dense"
    return config.rule if sparsity is None else f"{config.rule} at sparsity {sparsity:g}"


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
    hook_before_forward(model, _advance, on=[model] if wanted else [])


def hook_before_forward(model: nn.Module, hook: Callable[[nn.Module, Any], None], *, on: Iterable[nn.Module]) -> None:
    """Have a hook once on each of the given modules of a model, and on none of its others."""
    for module in model.modules():
        for key, present in list(module._forward_pre_hooks.items()):
            if present is hook:
                del module._forward_pre_hooks[key]
    for module in dict.fromkeys(on):
        module.register_forward_pre_hook(hook)


def _advance(model: nn.Module, _: Any) -> None:
    if not model.training:
        return
    if getattr(model, "_is_replica", False):
        raise ConfigurationError(
            "Rule 'random' cannot serve nn.DataParallel, whose copies of a model would draw the same masks for "
            "different examples. Use DistributedDataParallel, or one device."
        )
    for state in shared_states(model):
        state.forward_index.add_(1)
        if not torch.compiler.is_compiling():
            _count_unfinished(model, state)


def _count_unfinished(model: nn.Module, state: ModelState) -> None:
    """Count the forwards whose backward pass, under gradient checkpointing, is still to recompute them."""
    flags = [module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    # A plain module does not say whether parts of it are recomputed.
    checkpointing = torch.is_grad_enabled() and (any(flags) or not flags)
    before = 0 if state.recomputed or not checkpointing else state.unfinished
    state.unfinished, state.recomputed = before + checkpointing, False
