"""Checks of an audit: changes that must not matter, and tokens that must not be seen."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from crisp_attention.checking import evaluation
from crisp_attention.huggingface.audit_outcome import CheckOutcome, Stock, not_applicable, relative, watched
from crisp_attention.huggingface.trial import Outputs, Trial, difference, outputs_of, worst

_PADS = 7
_DECODED = 4


def batch_invariance(trial: Trial, stock: Stock) -> CheckOutcome:
    """Each example alone gives what it gives in the batch."""
    name = "batch invariance"
    if trial.batch < 2 or not stock.repeatable:
        return not_applicable(name, "the inputs cannot be taken apart by example")

    def measure() -> float | None:
        together = trial.unpadded(trial.run(), trial.inputs)
        found = []
        for index, expected in enumerate(together):
            inputs = trial.example(index)
            alone = Trial(trial.model, inputs)
            found.append(difference(alone.unpadded(alone.run(), inputs)[0], expected))
        return worst(found)

    return relative(name, trial, measure, "largest difference between an example alone and in a batch")


def padding_invariance(trial: Trial, stock: Stock) -> CheckOutcome:
    """More padding at the right, or none, changes nothing at the real positions."""
    name = "padding invariance"
    mask = trial.inputs.get("attention_mask")
    if not trial.token_inputs() or not isinstance(mask, Tensor) or not trial.batch or not stock.repeatable:
        return not_applicable(name, "the inputs have no padding mask")

    def measure() -> float | None:
        expected = trial.unpadded(trial.run(), trial.inputs)
        longer = trial.padded(_PADS)
        more = Trial(trial.model, longer)
        pairs = zip(more.unpadded(more.run(), longer), expected, strict=True)
        return worst([difference(one, other) for one, other in pairs])

    return relative(name, trial, measure, f"largest difference with {_PADS} more pads")


def left_padding(trial: Trial, stock: Stock) -> CheckOutcome:
    """Padding at the left changes nothing at the real positions."""
    name = "left padding"
    text = trial.first_text()
    if "input_ids" not in text or text["input_ids"].dim() != 2 or "attention_mask" not in trial.inputs:
        return not_applicable(name, "the inputs have no padding mask")
    if not stock.repeatable or "decoder_input_ids" in text:
        return not_applicable(name, "the decoder's text is not the encoder's")

    def measure() -> float | None:
        alone, padded = trial.run(text), trial.left_padded(text, _PADS)
        parameters = inspect.signature(trial.model.forward).parameters
        if "position_ids" in parameters:
            padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        length = text["input_ids"].shape[1]
        shifted = {
            key: tensor[:, _PADS:] if tensor.dim() > 1 and tensor.shape[1] == length + _PADS else tensor
            for key, tensor in trial.run(padded).items()
        }
        return difference(shifted, alone)

    return relative(name, trial, measure, f"largest difference with {_PADS} pads at the left")


def no_future(trial: Trial, stock: Stock) -> CheckOutcome:
    """Where attention is causal, later tokens never change earlier outputs."""
    name = "no look ahead"
    text = trial.first_text()
    key = "decoder_input_ids" if "decoder_input_ids" in text else "input_ids"
    if key not in text or text[key].dim() != 2 or not stock.repeatable:
        return not_applicable(name, "the inputs have no text")
    half = text[key].shape[1] // 2
    if not any(call.causal for call in watched(trial, 0.0)[1]):
        return not_applicable(name, "attention is not causal")

    def measure() -> float | None:
        first = _positions(trial.run(text), text[key].shape[1])
        changed = text[key].clone()
        changed[:, half:] = changed[:, half:].flip(1)
        second = _positions(trial.run({**text, key: changed}), changed.shape[1])
        return difference(
            {output: tensor[:, :half] for output, tensor in second.items()},
            {output: tensor[:, :half] for output, tensor in first.items()},
        )

    return relative(name, trial, measure, "largest change of earlier outputs by later tokens")


def cache_equality(trial: Trial, stock: Stock) -> CheckOutcome:
    """Decoding token by token with a key-value cache gives what one pass gives."""
    name = "KV cache equals no cache"
    text = trial.first_text()
    parameters = inspect.signature(trial.model.forward).parameters
    decoder = "decoder_input_ids" in text
    ids = text.get("decoder_input_ids", text.get("input_ids"))
    if ids is None or ids.dim() != 2 or not {"past_key_values", "use_cache"} & parameters.keys():
        return not_applicable(name, "the model does not decode")

    def measure() -> float | None:
        key = "decoder_input_ids" if decoder else "input_ids"
        extra: dict[str, Any] = {}
        with evaluation(trial.model):
            whole = trial.model(**text, use_cache=False)
            expected = _positions(whole, ids.shape[1])
            if decoder:
                if "encoder_outputs" not in parameters:
                    return None
                extra = {"encoder_outputs": trial.model.get_encoder()(input_ids=text["input_ids"])}
            start = ids.shape[1] - _DECODED
            step = trial.model(**{**text, **extra, key: ids[:, :start]}, use_cache=True)
            found = [_positions(step, start)]
            for place in range(start, ids.shape[1]):
                past = step.past_key_values
                if past is None:
                    return None
                one = {**extra, key: ids[:, place : place + 1]}
                step = trial.model(**one, past_key_values=past, use_cache=True)
                found.append(_positions(step, 1))
        joined = {output: torch.cat([part[output] for part in found if output in part], dim=1) for output in expected}
        return difference(joined, expected)

    return relative(name, trial, measure, "largest difference between cached decoding and one pass")


def _positions(result: Any, length: int) -> Outputs:
    """Outputs with one entry a decoded position."""
    return {
        key: tensor
        for key, tensor in outputs_of(result).items()
        if tensor.dim() == 3 and tensor.shape[1] == length and not key.startswith("encoder_")
    }
