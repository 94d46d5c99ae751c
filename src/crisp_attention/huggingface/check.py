"""Does every attention layer really call us, with its padding, and what does it realise?

A small forward pass answers: many architectures accept a custom attention implementation and never
call it, and nothing but a call proves otherwise.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError, CrispError, UnsupportedModelError
from crisp_attention.huggingface.state import (
    SETTINGS,
    LayerState,
    ModelState,
    attach,
    detach,
    layer_state,
    layers,
    read_settings,
    shared_states,
)
from crisp_attention.operator import AttentionOutput

Inputs = Mapping[str, Any]
"""Keyword arguments of a model's forward pass."""

_PROBE_LENGTH = 16
_PROBE_PADDING = 4


@dataclass(frozen=True)
class AttentionCall:
    """One attention call of a probe.

    Attributes:
        layer: Name of the module that called.
        shape: (B, H, Q, K).
        realised: Realised sparsity over valid pairs.
        causal: Whether the pair mask hides later keys from earlier queries.
        padding_seen: Whether the pair mask hides at least one key from every query of an example.
    """

    layer: str
    shape: tuple[int, int, int, int]
    realised: float
    causal: bool
    padding_seen: bool

    @property
    def cross(self) -> bool:
        """Whether queries and keys differ in number, as those of two sequences do in a probe."""
        return self.shape[2] != self.shape[3]


@dataclass(frozen=True)
class LayerReport:
    """What one attention layer did in a check.

    Attributes:
        index: Its place as the layers run, which `layers` and `layer_sparsity` count by.
        name: The module's name.
        heads: Query heads.
        requested: Share of pairs to remove in its sparse heads; 0 where it is dense, None where the
            rule sets none.
        realised: Share of pairs removed in those heads.
        causal: Whether later keys are hidden from earlier queries.
        cross: Whether queries and keys come from two different sequences.
    """

    index: int
    name: str
    heads: int
    requested: float | None
    realised: float
    causal: bool
    cross: bool

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
    """

    model: str
    config: SparsityConfig
    layers: tuple[LayerReport, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every attention layer is served."""
        return not self.problems

    def __str__(self) -> str:
        when = {"always": "in training and evaluation", "train": "in training only", "eval": "in evaluation only"}
        settings = ", ".join(f"{name} {value}" for name, value in self.config.changes().items() if name != "apply")
        lines = [
            f"{self.model}: {'ok' if self.ok else 'NOT SERVED'} "
            f"({settings or f'sparsity {self.config.sparsity:g}'}, {when[self.config.apply]})"
        ]
        lines += [f"  {layer}" for layer in self.layers]
        return "\n".join(lines + [f"  problem: {problem}" for problem in self.problems])


@dataclass(frozen=True)
class Probe:
    """What a dense forward pass showed.

    Attributes:
        calls: Every attention call, in order.
        problems: Sentences, one a defect; empty if every attention layer can be served.
    """

    calls: tuple[AttentionCall, ...]
    problems: tuple[str, ...]


def check(model: PreTrainedModel, inputs: Inputs | None = None) -> CheckReport:
    """Probe a sparsified model with a small batch.

    Runs two forward passes (evaluation mode, no gradients; modes and random state are put back):
    one that finds the attention layers, one that measures what each removes. On short probes the
    realised sparsity differs from the requested one by rounding and `min_keep`.

    Args:
        model: A sparsified model.
        inputs: Keyword arguments of its forward pass; by default a small batch with padding.

    Returns:
        Each layer's realised sparsity and the problems found, untouched layers by name.

    Raises:
        ConfigurationError: If the model is not sparsified.
        UnsupportedModelError: If no default inputs are known for the model.
    """
    if getattr(model.config, SETTINGS, None) is None:
        raise ConfigurationError(f"This {type(model).__name__} is not sparsified. Call crisp_attention.sparsify.")
    config, _ = read_settings(model.config)
    found = layers(model)
    try:
        problems = probe(model, inputs).problems
    finally:
        for name, state in found.items():
            attach(model.get_submodule(name), state)
    return CheckReport(type(model).__name__, config, layer_reports(model, measure(model, inputs)), problems)


def layer_reports(model: nn.Module, calls: tuple[AttentionCall, ...]) -> tuple[LayerReport, ...]:
    """What each layer did in the calls that `measure` recorded."""
    reports = []
    for name in dict.fromkeys(call.layer for call in calls):
        own = [call for call in calls if call.layer == name]
        state = layer_state(model.get_submodule(name))
        reports.append(
            LayerReport(
                index=state.index,
                name=name,
                heads=own[0].shape[1],
                requested=0.0 if state.config is None else state.config.sparsity,
                realised=sum(call.realised for call in own) / len(own),
                causal=any(call.causal for call in own),
                cross=state.cross,
            )
        )
    return tuple(reports)


def probe(model: PreTrainedModel, inputs: Inputs | None) -> Probe:
    """Run a dense forward pass and find every attention call; leaves no layer state behind.

    Args:
        model: A model whose attention implementation is "crisp".
        inputs: As in `check`.
    """
    recorder = _Recorder()
    shared = ModelState(SparsityConfig(sparsity=0.0), monitors=[recorder])
    for name, module in model.named_modules():
        attach(module, LayerState(name, 0, 1, shared))
    try:
        with _evaluation(model), _running_attention_modules(model) as ran:
            _forward(model, inputs)
    finally:
        detach(model)
    called = {call.layer for call in recorder.calls}
    problems = []
    if not called:
        problems.append("no layer called the attention interface.")
    untouched = [name for name in ran if not _related(name, called)]
    if called and untouched:
        problems.append(f"these attention layers compute on their own and stay dense: {', '.join(untouched)}.")
    if inputs is None and model.main_input_name == "input_ids":
        blind = [call.layer for call in recorder.calls if call.shape[2] == call.shape[3] and not call.padding_seen]
        if blind:
            problems.append(f"the padding mask does not reach: {', '.join(dict.fromkeys(blind))}.")
    return Probe(tuple(recorder.calls), tuple(problems))


def measure(model: nn.Module, inputs: Inputs | None) -> tuple[AttentionCall, ...]:
    """Run a forward pass of a sparsified model as if it were sparse in every mode, and record it.

    Args:
        model: A model with its layers attached.
        inputs: As in `check`.
    """
    recorder = _Recorder()
    shared = shared_states(model)
    watching = [state.monitors for state in shared]
    for state in shared:
        state.probing, state.monitors = True, [recorder]
    try:
        with _evaluation(model):
            _forward(model, inputs)
    finally:
        for state, monitors in zip(shared, watching, strict=True):
            state.probing, state.monitors = False, monitors
    return tuple(recorder.calls)


def probe_inputs(model: nn.Module) -> dict[str, Tensor]:
    """A small batch for a model: two rows of tokens, the second padded, or two images.

    Raises:
        UnsupportedModelError: If the model takes neither.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"Nothing says what a {type(model).__name__} takes. Pass inputs={{...}}, the keyword arguments of a small "
            "forward pass."
        )
    device = model.device
    config = model.config.get_text_config()
    if model.main_input_name == "input_ids":
        vocabulary = config.vocab_size
        length = min(_PROBE_LENGTH, getattr(config, "max_position_embeddings", None) or _PROBE_LENGTH)
        ids = torch.arange(2 * length, device=device).view(2, length) * 7 % max(vocabulary - 8, 1)
        # Past the special tokens where the vocabulary allows it: some models derive positions from them.
        ids = (ids + 8).clamp(max=vocabulary - 1)
        mask = torch.ones_like(ids)
        mask[1, -_PROBE_PADDING:] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if "decoder_input_ids" in inspect.signature(model.forward).parameters:
            batch |= {"decoder_input_ids": ids.clone(), "decoder_attention_mask": mask.clone()}
        return batch
    if model.main_input_name == "pixel_values" and isinstance(getattr(model.config, "image_size", None), int):
        size = model.config.image_size
        shape = (2, getattr(model.config, "num_channels", 3), size, size)
        return {"pixel_values": torch.linspace(-1, 1, size * size, device=device).view(1, 1, size, size).expand(shape)}
    raise UnsupportedModelError(
        f"No default probe inputs for {type(model).__name__} (main input {model.main_input_name!r}). "
        "Pass inputs={...}, the keyword arguments of a small forward pass."
    )


def _forward(model: nn.Module, inputs: Inputs | None) -> None:
    if inputs is not None:
        model(**inputs)
        return
    try:
        model(**probe_inputs(model))
    except CrispError:
        raise
    except Exception as error:  # whatever a model raises on a batch that is not its kind
        raise UnsupportedModelError(
            f"The default probe batch does not suit {type(model).__name__} ({type(error).__name__}: {error}). "
            "Pass inputs={...}, the keyword arguments of a small forward pass."
        ) from error


class _Recorder:
    """Takes a monitor's place during a probe."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def record(self, layer: str, training: bool, out: AttentionOutput) -> None:
        kept, valid = out.counts.kept.sum().item(), out.counts.valid.sum().item()
        seen = out.pairs.valid
        self.calls.append(
            AttentionCall(
                layer=layer,
                shape=out.pairs.shape,
                realised=1.0 - kept / valid if valid else 0.0,
                causal=seen is not None and _is_causal(seen),
                padding_seen=seen is not None and not bool(seen.any(dim=-2).all()),
            )
        )


def _is_causal(valid: Tensor) -> bool:
    queries, keys = valid.shape[-2:]
    future = torch.ones(queries, keys, dtype=torch.bool, device=valid.device).triu(1 + keys - queries)
    # Padding alone hides whole columns; causality hides keys that later queries do see.
    hidden_from_some = ~valid & valid.any(dim=-2, keepdim=True)
    return queries > 1 and not bool((valid & future).any()) and bool((hidden_from_some & future).any())


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
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
    named = {name: module for name, module in model.named_modules() if "Attention" in type(module).__name__}
    innermost = {
        name: module
        for name, module in named.items()
        if not any(other != name and other.startswith(f"{name}.") for other in named)
    }
    ran: list[str] = []
    hooks = [module.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, module in innermost.items()]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def _related(name: str, called: set[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in called)
