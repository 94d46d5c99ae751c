"""Does every attention layer of a Transformers model really call us, with its padding?

A small forward pass answers: many architectures accept a custom attention implementation and never
call it, and nothing but a call proves otherwise.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from crisp_attention.checking import (
    AttentionCall,
    CheckReport,
    Inputs,
    OwnAttention,
    Recorder,
    evaluation,
    layer_reports,
    measure,
)
from crisp_attention.config import SparsityConfig
from crisp_attention.huggingface.inputs import working_inputs
from crisp_attention.huggingface.persistence import default_implementations
from crisp_attention.state import Implementations, LayerState, ModelState, attach, detach, layers

# Called attention, but without scores of pairs that could be ranked.
_NOT_SCORED = re.compile("Linear|Lightning|Deformable|DeltaNet")


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


def probe(model: PreTrainedModel, inputs: Inputs | None, restore: Implementations | None = None) -> Probe:
    """Run a dense forward pass and find every attention call; leaves no layer state behind.

    Args:
        model: A model whose attention implementation is "crisp".
        inputs: As in `check`.
        restore: The implementation of each of the model's configurations when dense.
    """
    recorder = Recorder()
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


def _is_padded(call: AttentionCall, inputs: Inputs) -> bool:
    """Whether a call is self-attention over a text of which the inputs say that some is padding."""
    batch, _, queries, keys = call.shape
    masks = [inputs.get(name) for name in ("attention_mask", "decoder_attention_mask")]
    return queries == keys and any(
        isinstance(mask, Tensor) and mask.shape == (batch, keys) and not bool(mask.all()) for mask in masks
    )


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
