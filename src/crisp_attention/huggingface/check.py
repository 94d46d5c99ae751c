"""Does every attention layer really call us, with its padding, and what does it realise?

A small forward pass answers: many architectures accept a custom attention implementation and never
call it, and nothing but a call proves otherwise.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from crisp_attention.backends import Detail
from crisp_attention.config import SparsityConfig
from crisp_attention.errors import UnsupportedModelError
from crisp_attention.huggingface.inputs import Inputs, working_inputs
from crisp_attention.huggingface.persistence import default_implementations
from crisp_attention.masks import hides_future
from crisp_attention.operator import AttentionOutput
from crisp_attention.representation import bullets, card, paragraph, table
from crisp_attention.state import Implementations, LayerState, ModelState, attach, detach, layers, shared_states

# Called attention, but without scores of pairs that could be ranked.
_NOT_SCORED = re.compile("Linear|Lightning|Deformable|DeltaNet")


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


@dataclass(frozen=True)
class Probe:
    """What a dense forward pass showed.

    Attributes:
        calls: Every attention call, in order.
        problems: Sentences, one a defect; empty if every attention layer can be served.
        idle: Attention modules that did not run on these inputs, so that nothing is known of them.
        dense: Pooling heads that stay dense.
        cross: Layers whose queries and keys come from two different sequences.
        inputs: Keyword arguments of the forward pass.
    """

    calls: tuple[AttentionCall, ...]
    problems: tuple[str, ...]
    idle: tuple[str, ...]
    dense: tuple[str, ...]
    cross: frozenset[str]
    inputs: Inputs


def report_on(model: PreTrainedModel, inputs: Inputs | None = None) -> CheckReport:
    """What `crisp_attention.check` finds in a model whose layers are attached.

    Two forward passes: one that finds the attention layers, one that measures what each removes.
    """
    found = layers(model)
    shared = next(iter(found.values())).model
    try:
        seen = probe(model, inputs, shared.restore)
    finally:
        for name, state in found.items():
            attach(model.get_submodule(name), state)
    reports = layer_reports(model, measure(model, seen.inputs))
    return CheckReport(type(model).__name__, shared.config, reports, seen.problems, seen.dense, seen.idle)


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


def probe(model: PreTrainedModel, inputs: Inputs | None, restore: Implementations | None = None) -> Probe:
    """Run a dense forward pass and find every attention call; leaves no layer state behind.

    Args:
        model: A model whose attention implementation is "crisp".
        inputs: As in `check`.
        restore: The implementation of each of the model's configurations when dense.
    """
    recorder = _Recorder()
    shared = ModelState(SparsityConfig(sparsity=0.0), monitors=[recorder], untried=True)
    stock = {id(part): implementation for part, implementation in restore or default_implementations(model)}
    for name, module in model.named_modules():
        own = stock.get(id(getattr(module, "config", model.config)))
        attach(module, LayerState(name, 0, 1, shared, stock=own))
    try:
        with evaluation(model), _running_attention_modules(model) as ran, OwnAttention(model, ran):

            def forget() -> None:
                recorder.calls.clear()
                ran.clear()

            if inputs is None:
                inputs, apart = working_inputs(model, before_each=forget), None
            else:
                model(**inputs)
                apart = _told_apart(model, inputs)
            calls = list(recorder.calls)
            if apart is not None:
                # Texts of one length do not tell two sequences apart, and these inputs may have such.
                with contextlib.suppress(Exception):
                    model(**apart)
    finally:
        detach(model)
    # Queries and keys differ in number only where they are those of two sequences.
    cross = frozenset(call.layer for call in recorder.calls if call.shape[2] != call.shape[3])
    called = {call.layer for call in calls}
    problems = []
    if not called:
        problems.append("no layer called the attention interface.")
    alone = [name for name in dict.fromkeys(ran) if not _related(name, called)]
    pooling = [name for name in alone if _pools(model.get_submodule(name))]
    untouched = [name for name in alone if name not in pooling]
    if called and untouched:
        problems.append(f"these attention layers compute on their own and stay dense: {', '.join(untouched)}.")
    blind = [call.layer for call in calls if not call.padding_seen and _is_padded(call, inputs)]
    if blind:
        problems.append(f"the padding mask does not reach: {', '.join(dict.fromkeys(blind))}.")
    idle = [name for name in _attention_modules(model) if name not in ran and not _related(name, called)]
    return Probe(tuple(calls), tuple(problems), tuple(idle), tuple(pooling), cross, inputs)


def _told_apart(model: PreTrainedModel, inputs: Inputs) -> Inputs | None:
    """The same inputs with one token less in one of two sequences; None if they are not those of two."""
    ids = inputs.get("labels", inputs.get("input_ids"))
    if getattr(model.config, "is_encoder_decoder", False) and isinstance(ids, Tensor) and ids.dim() == 2:
        # Where the decoder's text is not given, it is made of these.
        inputs = {"decoder_input_ids": ids.clamp(min=0), **inputs}
    for side in ("decoder_", "encoder_"):
        shorter = {
            name: value[:, :-1]
            for name, value in inputs.items()
            if name.startswith(side) and isinstance(value, Tensor) and value.dim() in (2, 3) and value.shape[1] > 1
        }
        if shorter:
            return {name: value for name, value in {**inputs, **shorter}.items() if name != "labels"}
    return None


def measure(model: nn.Module, inputs: Inputs) -> tuple[AttentionCall, ...]:
    """Run a forward pass of a sparsified model as if it were sparse in every mode, and record it.

    Args:
        model: A model with its layers attached.
        inputs: Keyword arguments of its forward pass.
    """
    recorder = _Recorder(layers(model))
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


def _is_padded(call: AttentionCall, inputs: Inputs) -> bool:
    """Whether a call is self-attention over a text of which the inputs say that some is padding."""
    batch, _, queries, keys = call.shape
    masks = [inputs.get(name) for name in ("attention_mask", "decoder_attention_mask")]
    return queries == keys and any(
        isinstance(mask, Tensor) and mask.shape == (batch, keys) and not bool(mask.all()) for mask in masks
    )


class _Recorder:
    """Takes a monitor's place during a probe."""

    detail = Detail.SUMMARY

    def __init__(self, layers: Mapping[str, LayerState] | None = None) -> None:
        self.calls: list[AttentionCall] = []
        self._layers = {state.name: state for state in (layers or {}).values()}

    def record(self, layer: str, training: bool, out: AttentionOutput) -> None:
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


@contextlib.contextmanager
def _running_attention_modules(model: nn.Module) -> Iterator[list[str]]:
    """Names of the innermost modules called *Attention* that ran within the block."""
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in _attention_modules(model).items()
    ]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


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


def _attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    named = {
        name: module
        for name, module in model.named_modules()
        if "Attention" in type(module).__name__ and not _NOT_SCORED.search(type(module).__name__)
    }
    return {
        name: module
        for name, module in named.items()
        if not any(other != name and other.startswith(f"{name}.") for other in named)
    }


def _pools(module: nn.Module) -> bool:
    """Whether a module sums up a whole sequence by a learned query, as image towers do at their end."""
    return isinstance(module, nn.MultiheadAttention) or "Pool" in type(module).__name__


def _related(name: str, called: set[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in called)
