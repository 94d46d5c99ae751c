"""A model under audit: its forward passes under changes that must not matter, and their differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from crisp_attention.backends import Detail
from crisp_attention.checking import evaluation
from crisp_attention.config import SparsityConfig
from crisp_attention.masks import hides_future
from crisp_attention.operator import AttentionOutput
from crisp_attention.rules.selection import keep_count

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
"""Largest difference, relative to an output's scale, that rounding explains."""

HALF_TOLERANCE = 0.05
"""The same in half precision."""

_MASKS = ("attention_mask", "input_features_mask", "feature_attention_mask", "padding_mask")
_DECODER_MASKS = ("decoder_attention_mask",)
_NOT_OUTPUTS = frozenset({"cache_params", "loss", "memory", "past_key_values", "state", "states"})

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """One attention call, measured on the weights themselves.

    Attributes:
        layer: Name of the module that called.
        causal: Whether later keys are hidden from earlier queries.
        windowed: Whether keys are hidden from a query that are neither padding nor in its future.
        realised: Share of counted pairs that did not survive.
        unlawful: Queries that keep another number of keys than the settings ask for, though no tie
            at their lowest surviving weight explains it.
        escaped: Pairs that have weight though they did not survive or the model's masks hide them.
    """

    layer: str
    causal: bool
    windowed: bool
    realised: float
    unlawful: int
    escaped: int


class CallRecorder:
    """A monitor that measures every call of a rule by query."""

    detail = Detail.WEIGHTS

    def __init__(self, config: SparsityConfig) -> None:
        self.calls: list[Call] = []
        self._sparsity, self._min_keep = config.sparsity or 0.0, config.min_keep or 1

    def record(self, layer: str, training: bool, out: AttentionOutput) -> None:
        """Measure one call."""
        pairs = out.pairs
        shape = pairs.shape
        counted = torch.ones((), dtype=torch.bool) if pairs.counted is None else pairs.counted
        counted = counted.to(pairs.device).expand(shape)
        valid = torch.ones(shape, dtype=torch.bool, device=pairs.device)
        valid = valid if pairs.valid is None else pairs.valid.expand(shape)
        kept = out.keep.expand(shape)
        weighted = out.weights.expand(shape) != 0
        rows = counted.any(-1, keepdim=True)
        per_row = valid.sum(-1, keepdim=True)
        wanted = torch.minimum(keep_count(per_row, self._sparsity).clamp(min=self._min_keep), per_row)
        survivors = kept.sum(-1, keepdim=True)
        lowest = out.weights.expand(shape).masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
        tied = (kept & (out.weights == lowest)).sum(-1, keepdim=True)
        lawful = (survivors == wanted) | ((survivors > wanted) & (survivors - tied < wanted))
        total = int(counted.sum())
        future = torch.ones(shape[2], shape[3], dtype=torch.bool, device=pairs.device).triu(1 + shape[3] - shape[2])
        hidden = ~valid & valid.any(-2, keepdim=True) & valid.any(-1, keepdim=True)
        self.calls.append(
            Call(
                layer,
                causal=hides_future(valid),
                windowed=shape[2] == shape[3] and bool((hidden & ~future).any()),
                realised=1.0 - int((kept & counted).sum()) / max(total, 1),
                unlawful=int((rows & ~lawful).sum()),
                escaped=int((weighted & ~(valid & kept)).sum()),
            )
        )


@dataclass
class Trial:
    """A model in evaluation mode with inputs that it accepts.

    Attributes:
        model: The model; changed by the audit, so a copy.
        inputs: Keyword arguments of its forward pass.
    """

    model: PreTrainedModel
    inputs: dict[str, Any]

    @property
    def tolerance(self) -> float:
        """What rounding may explain, in the model's precision."""
        return TOLERANCE.get(self.model.dtype, HALF_TOLERANCE)

    @property
    def batch(self) -> int:
        """Number of examples."""
        leading = [value.shape[0] for name, value in self.inputs.items() if isinstance(value, Tensor) and value.dim()]
        return leading[0] if len(set(leading)) == 1 else 0

    def run(self, inputs: Mapping[str, Any] | None = None) -> Outputs:
        """Outputs by name, random state the same each time; no gradients."""
        with evaluation(self.model):
            # Of the CPU alone: `evaluation` puts back no other stream.
            torch.default_generator.manual_seed(0)
            return outputs_of(self.model(**(self.inputs if inputs is None else inputs)))

    def unpadded(self, outputs: Outputs, inputs: Mapping[str, Any]) -> list[Outputs]:
        """The outputs of each example alone, at its positions that are not padding."""
        examples: list[Outputs] = []
        for index in range(self.batch):
            example = {}
            for name, tensor in outputs.items():
                if not tensor.dim() or tensor.shape[0] != self.batch:
                    continue
                mask = _mask_of(name, inputs)
                row = tensor[index]
                if mask is not None and row.dim() and row.shape[0] == mask.shape[-1]:
                    row = row[mask[index].bool()]
                elif mask is not None and row.dim() and "input_ids" not in inputs:
                    # Sound: frames were merged on the way. Those that padding touched are left out.
                    row = row[: max(1, int(row.shape[0] * float(mask[index].float().mean())) - 1)]
                example[name] = row
            examples.append(example)
        return examples

    def compared(self, ours: Outputs, theirs: Outputs, *, typical: bool = False) -> float | None:
        """Difference at positions that are not padding, or everywhere if outputs have no examples."""
        if not self.batch:
            return difference(ours, theirs, typical=typical)
        pairs = zip(self.unpadded(ours, self.inputs), self.unpadded(theirs, self.inputs), strict=True)
        return worst([difference(one, other, typical=typical) for one, other in pairs])

    def token_inputs(self) -> list[str]:
        """Names of the inputs with one entry a token of the (encoder's) text."""
        ids = self.inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            return []
        return [
            name
            for name, value in self.inputs.items()
            if isinstance(value, Tensor) and value.shape[:2] == ids.shape and not name.startswith("decoder_")
        ]

    def example(self, index: int) -> dict[str, Any]:
        """The inputs of one example, still padded."""
        return {
            name: value[index : index + 1] if isinstance(value, Tensor) and value.dim() else value
            for name, value in self.inputs.items()
        }

    def padded(self, by: int) -> dict[str, Any]:
        """The inputs with so many more pads at the right of the text, and of the decoder's text."""
        changed = dict(self.inputs)
        names = self.token_inputs() + [
            name for name in ("decoder_input_ids", "decoder_attention_mask") if name in self.inputs
        ]
        for name in names:
            value: Tensor = self.inputs[name]
            fill = self._pad_token() if name.endswith("input_ids") else 0
            changed[name] = torch.cat([value, value.new_full((*value.shape[:1], by, *value.shape[2:]), fill)], dim=1)
        return changed

    def first_text(self) -> dict[str, Any]:
        """The first example's text alone, without a mask, padding or anything else."""
        return {name: self.inputs[name][:1] for name in ("input_ids", "decoder_input_ids") if name in self.inputs}

    def left_padded(self, text: Mapping[str, Any], by: int) -> dict[str, Any]:
        """A text with so many pads at its left, masked, its positions counted from its first token."""
        ids: Tensor = text["input_ids"]
        ids = torch.cat([ids.new_full((1, by), self._pad_token()), ids], dim=1)
        mask = torch.ones_like(ids)
        mask[:, :by] = 0
        return {**text, "input_ids": ids, "attention_mask": mask}

    def _pad_token(self) -> int:
        pad = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        return pad if isinstance(pad, int) and pad >= 0 else 0


def other_texts(ids: Tensor, count: int = 32) -> Iterator[Tensor]:
    """Texts of the same length, drawn from the tokens of one's first half; second halves stay in place."""
    half = ids.shape[1] // 2
    for seed in range(count):
        draw = torch.Generator().manual_seed(seed)
        places = torch.randint(half, (half,), generator=draw).to(ids.device)
        yield torch.cat([ids[:, places], ids[:, half:]], dim=1)


def outputs_of(result: Any) -> Outputs:
    """The floating-point tensors of a forward pass, caches and losses left out."""
    return {name: tensor.detach() for name, tensor in floating(result)}


def floating(result: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Names and floating-point tensors of a nested output."""
    if isinstance(result, Tensor):
        if result.is_floating_point() and result.numel():
            yield name or "output", result
    elif isinstance(result, Mapping):
        for key, value in result.items():
            if key not in _NOT_OUTPUTS:
                yield from floating(value, f"{name}.{key}" if name else str(key))
    elif isinstance(result, (list, tuple)):
        for index, value in enumerate(result):
            yield from floating(value, f"{name}.{index}")


def difference(ours: Outputs, theirs: Outputs, *, typical: bool = False) -> float | None:
    """The largest difference relative to an output's scale; None where nothing is comparable.

    With `typical`, the median over positions instead of the largest: in half precision rounding alone
    may send a token to another expert, which changes a few positions a lot.

    An output that is missing or of another shape is infinitely different, and so is a NaN where the
    other has none.
    """
    if not theirs:
        return None
    if ours.keys() != theirs.keys():
        return float("inf")
    worst = 0.0
    for name, expected in theirs.items():
        actual = ours[name]
        if actual.shape != expected.shape:
            return float("inf")
        if not expected.numel():
            continue
        known = torch.isfinite(expected)
        if not torch.equal(known, torch.isfinite(actual)):
            return float("inf")
        if known.any():
            scale = max(1.0, float(expected[known].abs().max()))
            gap = (actual - expected).masked_fill(~known, 0.0).abs()
            found = gap.amax(-1).flatten().median() if typical and gap.dim() > 1 else gap.max()
            worst = max(worst, float(found) / scale)
    return worst


def worst(differences: list[float | None]) -> float | None:
    """The largest of several differences; None where none was comparable."""
    known = [value for value in differences if value is not None]
    return max(known) if known else None


def _mask_of(name: str, inputs: Mapping[str, Any]) -> Tensor | None:
    """The padding mask of an output: the decoder's in an encoder-decoder, unless it is the encoder's output."""
    decoder = "decoder_input_ids" in inputs and not name.startswith(("encoder_", "text_"))
    names = _MASKS if not decoder else _DECODER_MASKS if "input_ids" in inputs else (*_DECODER_MASKS, *_MASKS)
    mask = next((inputs[name] for name in names if name in inputs), None)
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
