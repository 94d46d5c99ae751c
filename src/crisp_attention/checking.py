"""What a check of a model sees and reports, whatever kind of model it is: a forward pass, call by call."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from crisp_attention.backends import Detail
from crisp_attention.config import SparsityConfig
from crisp_attention.errors import UnsupportedModelError
from crisp_attention.masks import hides_future
from crisp_attention.operator import AttentionOutput
from crisp_attention.representation import bullets, card, paragraph, table
from crisp_attention.state import LayerState, layers, shared_states

Inputs = Mapping[str, Any]
"""Keyword arguments of a model's forward pass."""


@dataclass(frozen=True)
class AttentionCall:
    """One attention call of a probe.

    Attributes:
        layer: Name of the module that called.
        shape: (B, H, Q, K).
        realised: Realised sparsity over valid pairs, of the heads that the layer's settings make sparse.
        causal: Whether the pair mask hides later keys from earlier queries.
        padding_seen: Whether the pair mask hides at least one key from every query of an example.
        backend: What computed it, and why, as half a sentence.
    """

    layer: str
    shape: tuple[int, int, int, int]
    realised: float
    causal: bool
    padding_seen: bool
    backend: str


@dataclass(frozen=True)
class LayerReport:
    """What one attention layer did in a check.

    Attributes:
        index: Its place as the layers run, which `layers` and `layer_sparsity` count by.
        name: The module's name.
        heads: Query heads.
        requested: Share of pairs to remove in its sparse heads at this moment, which a schedule moves; 0 where it is
            dense, None where the rule sets none.
        realised: Share of pairs removed in those heads.
        causal: Whether later keys are hidden from earlier queries.
        cross: Whether queries and keys come from two different sequences.
        backend: What computed it, and why, as half a sentence.
    """

    index: int
    name: str
    heads: int
    requested: float | None
    realised: float
    causal: bool
    cross: bool
    backend: str

    def __str__(self) -> str:
        wanted = "" if self.requested is None else f" of {self.requested:.3f} requested"
        kind = ", causal" * self.causal + ", cross-attention" * self.cross
        return f"{self.index}: {self.name}: {self.heads} heads, realised sparsity {self.realised:.3f}{wanted}{kind}"


@dataclass(frozen=True)
class CheckReport:
    """What a check found.

    Attributes:
        model: Class of the model.
        config: The settings in force; checked as if sparse in every mode.
        layers: Every attention layer, in the order in which they run.
        problems: Sentences, one a defect; empty if all is well.
        dense: Pooling heads that stay dense; sparsity is not for them, but it is said.
        idle: Attention modules that did not run on these inputs: nothing is known of them.
    """

    model: str
    config: SparsityConfig
    layers: tuple[LayerReport, ...]
    problems: tuple[str, ...]
    dense: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every attention layer that ran is served."""
        return not self.problems

    def __repr__(self) -> str:
        lines = [f"{self.model}: {'ok' if self.ok else 'NOT SERVED'} ({self._settings})"]
        lines += [f"  {layer}" for layer in self.layers]
        lines += [f"  {name}" for name in self._aside]
        lines += [f"  computed by {backend}" for backend in self._backends]
        return "\n".join(lines + [f"  problem: {problem}" for problem in self.problems])

    def _repr_html_(self) -> str:
        rows = [
            (
                str(layer.index),
                layer.name,
                str(layer.heads),
                "" if layer.requested is None else f"{layer.requested:.3f}",
                f"{layer.realised:.3f}",
                ", ".join(["causal"] * layer.causal + ["cross-attention"] * layer.cross),
            )
            for layer in self.layers
        ]
        header = ("layer", "name", "heads", "requested", "realised", "kind")
        return card(
            self.model,
            paragraph(f"{self._settings}. Shares of valid pairs that are removed, on a probe:"),
            bullets(self.problems),
            table(header, rows, prose=("name", "kind")),
            bullets(self._aside),
            bullets([f"computed by {backend}" for backend in self._backends]),
            badge=("ok", "good") if self.ok else ("not served", "bad"),
        )

    @property
    def _settings(self) -> str:
        when = {"always": "in training and evaluation", "train": "in training only", "eval": "in evaluation only"}
        told = [f"{name} {value}" for name, value in self.config.essence().items() if name != "apply"]
        return ", ".join([*told, when[self.config.apply]])

    @property
    def _aside(self) -> list[str]:
        """What sparsity does not reach, and no defect."""
        return [f"{name}: a pooling head, stays dense" for name in self.dense] + [
            f"{name}: did not run on these inputs, not checked" for name in self.idle
        ]

    @property
    def _backends(self) -> list[str]:
        """What computes the layers that are sparse, each once."""
        return list(dict.fromkeys(layer.backend for layer in self.layers if layer.requested != 0.0))


def layer_reports(model: nn.Module, calls: tuple[AttentionCall, ...]) -> tuple[LayerReport, ...]:
    """What each layer did in the calls that `measure` recorded."""
    reports = []
    states = {state.name: state for state in layers(model).values()}
    for name in dict.fromkeys(call.layer for call in calls):
        own = [call for call in calls if call.layer == name]
        state = states[name]
        reports.append(
            LayerReport(
                index=state.index,
                name=name,
                heads=own[0].shape[1],
                requested=0.0 if state.config is None else _number(state.request(state.config, training=False)),
                realised=sum(call.realised for call in own) / len(own),
                causal=any(call.causal for call in own),
                cross=state.cross,
                backend=own[0].backend,
            )
        )
    return tuple(reports)


def _number(share: float | Tensor | None) -> float | None:
    return None if share is None else float(share)


def measure(model: nn.Module, inputs: Inputs) -> tuple[AttentionCall, ...]:
    """Run a forward pass of a sparsified model as if it were sparse in every mode, and record it.

    Args:
        model: A model with its layers attached.
        inputs: Keyword arguments of its forward pass.
    """
    recorder = Recorder(layers(model))
    shared = shared_states(model)
    watching = [state.monitors for state in shared]
    for state in shared:
        state.probing, state.monitors = True, [recorder]
    try:
        with evaluation(model):
            model(**inputs)
    finally:
        for state, monitors in zip(shared, watching, strict=True):
            state.probing, state.monitors = False, monitors
    return tuple(recorder.calls)


def require_own_draws(model: nn.Module, config: SparsityConfig, calls: tuple[AttentionCall, ...]) -> None:
    """Refuse to draw by module where one runs several times in a pass.

    Raises:
        UnsupportedModelError: If the rule is 'random' and a layer called more than once.
    """
    if config.rule == "random" and len({call.layer for call in calls}) < len(calls):
        raise UnsupportedModelError(
            f"{type(model).__name__} runs one attention module several times in a pass; rule 'random', which draws "
            "by module, would draw the same masks each time."
        )


class Recorder:
    """Takes a monitor's place during a probe."""

    detail = Detail.SUMMARY

    def __init__(self, layers: Mapping[str, LayerState] | None = None) -> None:
        self.calls: list[AttentionCall] = []
        self._layers = {state.name: state for state in (layers or {}).values()}

    def record(self, layer: str, training: bool, out: AttentionOutput) -> None:
        """Keep one call."""
        heads = self._layers[layer].heads if layer in self._layers else slice(None)
        kept, valid = (count[:, heads].sum().item() for count in out.counts)
        seen = out.pairs.valid
        self.calls.append(
            AttentionCall(
                layer=layer,
                shape=out.pairs.shape,
                realised=1.0 - kept / valid if valid else 0.0,
                causal=seen is not None and hides_future(seen),
                padding_seen=seen is not None and not bool(seen.any(dim=-2).all()),
                backend=f"{out.choice.name!r}: {out.choice.reason}",
            )
        )


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode and the random state come back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class OwnAttention(TorchFunctionMode):
    """Adds to a list the modules that compute attention outside of the operator, whatever they are called.

    Such attention is a call of SDPA, or a softmax over scores `[B, H, Q, K]` of more than a few keys.
    """

    def __init__(self, model: nn.Module, found: list[str]) -> None:
        super().__init__()
        self._names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
        self._found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        scores = args[0] if args and isinstance(args[0], Tensor) else None
        softmax = (
            getattr(func, "__name__", "") == "softmax"
            and scores is not None
            and scores.dim() == 4
            and scores.shape[-1] >= 8
        )
        if softmax or func is F.scaled_dot_product_attention:
            name = self._caller()
            if name is not None and name not in self._found:
                self._found.append(name)
        return func(*args, **(kwargs or {}))

    def _caller(self) -> str | None:
        """The innermost module of the model that is running; None inside the operator."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith("crisp_attention.") and frame.f_globals is not globals():
                return None
            name = self._names.get(id(frame.f_locals.get("self")))
            if name:
                return name
            frame = frame.f_back
        return None
