"""The checks of an audit: each a function from a trial and the stock model's behaviour to an outcome."""

from __future__ import annotations

import contextlib
import copy
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from crisp_attention.config import SparsityConfig
from crisp_attention.errors import ConfigurationError, CrispError
from crisp_attention.huggingface.check import evaluation
from crisp_attention.huggingface.model import densify, load, sparsify, watching
from crisp_attention.huggingface.state import SETTINGS, implementations
from crisp_attention.huggingface.trial import CallRecorder, Outputs, Trial, difference, floating, outputs_of, worst

Outcome = Literal["ok", "failed", "not applicable"]

_HALF, _MOST = 0.5, 0.8
_PADS = 7
_DECODED = 4


@dataclass(frozen=True)
class CheckOutcome:
    """What one check of an audit found.

    Attributes:
        name: The check.
        outcome: "ok", "failed" or "not applicable".
        figure: What was measured, mostly the largest difference between two outputs relative to
            their scale; None where nothing was.
        detail: A sentence: what the figure is, or why the check does not apply.
    """

    name: str
    outcome: Outcome
    figure: float | None
    detail: str


@dataclass(frozen=True)
class Stock:
    """The stock model's behaviour on a trial's inputs.

    Attributes:
        outputs: Its outputs.
        repeatable: Whether a second pass gives the same.
    """

    outputs: Outputs
    repeatable: bool

    @classmethod
    def of(cls, trial: Trial) -> Stock:
        """Run a dense model twice."""
        first, second = trial.run(), trial.run()
        return cls(first, difference(second, first) == 0.0)


def dense_equality(trial: Trial, stock: Stock) -> CheckOutcome:
    """At sparsity 0 the operator's own path gives the stock model's outputs, with and without a mask."""
    name = "sparsity 0 equals stock"
    if not stock.repeatable:
        return _not_applicable(name, "two passes of the dense model differ")
    bare, bare_stock = without_masks(trial)
    sparsify(trial.model, sparsity=0.0, inputs=trial.inputs)
    recorder = CallRecorder(SparsityConfig(sparsity=0.0))
    try:
        fused = difference(trial.run(), stock.outputs)
        with watching(trial.model, recorder):
            found = [fused, trial.compared(trial.run(), stock.outputs)]
            if bare_stock is not None:
                found.append(difference(trial.run(bare), bare_stock))
    finally:
        densify(trial.model)
    if not recorder.calls:
        return CheckOutcome(name, "failed", None, "no attention call was seen")
    return _judged(name, worst(found), trial, "largest difference from the stock model")


def without_masks(trial: Trial) -> tuple[dict[str, Any], Outputs | None]:
    """The inputs without their masks, and what a dense model gives for them.

    None where there are no masks, where the model cannot do without, and where an example without
    padding comes out otherwise alone than beside a padded one: the dense model then has two ways.
    """
    bare = {key: value for key, value in trial.inputs.items() if not key.endswith("mask")}
    outputs = _attempt(lambda: trial.run(bare)) if len(bare) < len(trial.inputs) else None
    if outputs is None or has_two_ways(trial):
        return bare, None
    return bare, outputs


def has_two_ways(trial: Trial) -> bool:
    """Whether a dense model treats its first example, unpadded, otherwise alone than in its batch."""
    if trial.batch < 2 or "input_ids" not in trial.inputs or "attention_mask" not in trial.inputs:
        return False
    alone = _attempt(lambda: Trial(trial.model, trial.example(0)).run())
    if alone is None:
        return False
    first = Trial(trial.model, trial.example(0)).unpadded(alone, trial.example(0))[0]
    beside = trial.unpadded(trial.run(), trial.inputs)[0]
    same = {name for name in first if name in beside and first[name].shape == beside[name].shape}
    figure = difference({name: first[name] for name in same}, {name: beside[name] for name in same})
    return figure is not None and figure > trial.tolerance


def realised_sparsity(trial: Trial, stock: Stock) -> CheckOutcome:
    """Weights are zero for the share of pairs that was asked for, and the outputs show it."""
    name = "realised sparsity"
    shares, misses, escaped, unchanged = [], 0, 0, False
    for sparsity in (_HALF, _MOST):
        config = SparsityConfig(sparsity=sparsity)
        sparsify(trial.model, config, inputs=trial.inputs)
        recorder = CallRecorder(config)
        try:
            with watching(trial.model, recorder):
                sparse = trial.run()
        finally:
            densify(trial.model)
        misses += sum(call.unlawful for call in recorder.calls)
        escaped += sum(call.escaped for call in recorder.calls)
        shares.append(sum(call.realised for call in recorder.calls) / max(len(recorder.calls), 1))
        unchanged |= stock.repeatable and difference(sparse, stock.outputs) == 0.0
        if not recorder.calls:
            return CheckOutcome(name, "failed", None, "no attention call was seen")
    detail = f"{shares[0]:.3f} at {_HALF}, {shares[1]:.3f} at {_MOST}, on short inputs"
    if unchanged:
        return CheckOutcome(name, "failed", shares[1], f"{detail}; the outputs are those of the dense model")
    if escaped:
        return CheckOutcome(name, "failed", shares[1], f"{detail}; {escaped} removed pairs have weight")
    if misses:
        return CheckOutcome(name, "failed", shares[1], f"{detail}; {misses} queries keep another number of keys")
    return CheckOutcome(name, "ok", shares[1], detail)


def batch_invariance(trial: Trial, stock: Stock) -> CheckOutcome:
    """Each example alone gives what it gives in the batch."""
    name = "batch invariance"
    if trial.batch < 2 or not stock.repeatable:
        return _not_applicable(name, "the inputs cannot be taken apart by example")

    def measure() -> float | None:
        together = trial.unpadded(trial.run(), trial.inputs)
        found = []
        for index, expected in enumerate(together):
            inputs = trial.example(index)
            alone = Trial(trial.model, inputs)
            found.append(difference(alone.unpadded(alone.run(), inputs)[0], expected))
        return worst(found)

    return _relative(name, trial, measure, "largest difference between an example alone and in a batch")


def padding_invariance(trial: Trial, stock: Stock) -> CheckOutcome:
    """More padding at the right, or none, changes nothing at the real positions."""
    name = "padding invariance"
    mask = trial.inputs.get("attention_mask")
    if not trial.token_inputs() or not isinstance(mask, Tensor) or not trial.batch or not stock.repeatable:
        return _not_applicable(name, "the inputs have no padding mask")

    def measure() -> float | None:
        expected = trial.unpadded(trial.run(), trial.inputs)
        longer = trial.padded(_PADS)
        more = Trial(trial.model, longer)
        pairs = zip(more.unpadded(more.run(), longer), expected, strict=True)
        return worst([difference(one, other) for one, other in pairs])

    return _relative(name, trial, measure, f"largest difference with {_PADS} more pads")


def left_padding(trial: Trial, stock: Stock) -> CheckOutcome:
    """Padding at the left changes nothing at the real positions."""
    name = "left padding"
    text = trial.first_text()
    if "input_ids" not in text or text["input_ids"].dim() != 2 or "attention_mask" not in trial.inputs:
        return _not_applicable(name, "the inputs have no padding mask")
    if not stock.repeatable or "decoder_input_ids" in text:
        return _not_applicable(name, "the decoder's text is not the encoder's")

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

    return _relative(name, trial, measure, f"largest difference with {_PADS} pads at the left")


def cache_equality(trial: Trial, stock: Stock) -> CheckOutcome:
    """Decoding token by token with a key-value cache gives what one pass gives."""
    name = "KV cache equals no cache"
    text = trial.first_text()
    parameters = inspect.signature(trial.model.forward).parameters
    decoder = "decoder_input_ids" in text
    ids = text.get("decoder_input_ids", text.get("input_ids"))
    if ids is None or ids.dim() != 2 or not {"past_key_values", "use_cache"} & parameters.keys():
        return _not_applicable(name, "the model does not decode")

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

    return _relative(name, trial, measure, "largest difference between cached decoding and one pass")


def _positions(result: Any, length: int) -> Outputs:
    """Outputs with one entry a decoded position."""
    return {
        key: tensor
        for key, tensor in outputs_of(result).items()
        if tensor.dim() == 3 and tensor.shape[1] == length and not key.startswith("encoder_")
    }


def no_future(trial: Trial, stock: Stock) -> CheckOutcome:
    """Where attention is causal, later tokens never change earlier outputs."""
    name = "no look ahead"
    text = trial.first_text()
    key = "decoder_input_ids" if "decoder_input_ids" in text else "input_ids"
    if key not in text or text[key].dim() != 2 or not stock.repeatable:
        return _not_applicable(name, "the inputs have no text")
    half = text[key].shape[1] // 2
    sparsify(trial.model, sparsity=0.0, inputs=trial.inputs)
    recorder = CallRecorder(SparsityConfig(sparsity=0.0))
    try:
        with watching(trial.model, recorder):
            trial.run()
    finally:
        densify(trial.model)
    if not any(call.causal for call in recorder.calls):
        return _not_applicable(name, "attention is not causal")

    def measure() -> float | None:
        first = _positions(trial.run(text), text[key].shape[1])
        changed = text[key].clone()
        changed[:, half:] = changed[:, half:].flip(1)
        second = _positions(trial.run({**text, key: changed}), changed.shape[1])
        return difference(
            {output: tensor[:, :half] for output, tensor in second.items()},
            {output: tensor[:, :half] for output, tensor in first.items()},
        )

    return _relative(name, trial, measure, "largest change of earlier outputs by later tokens")


def windows(trial: Trial, stock: Stock) -> CheckOutcome:
    """Survivors lie inside the model's own windows."""
    name = "sliding windows"
    config = SparsityConfig(sparsity=_HALF)
    sparsify(trial.model, config, inputs=trial.inputs)
    recorder = CallRecorder(config)
    try:
        with watching(trial.model, recorder):
            trial.run()
    finally:
        densify(trial.model)
    windowed = [call for call in recorder.calls if call.windowed]
    if not windowed:
        return _not_applicable(name, "no layer's mask is shorter than these inputs")
    escaped = sum(call.escaped for call in windowed)
    return CheckOutcome(
        name,
        "failed" if escaped else "ok",
        float(escaped),
        f"{escaped} surviving pairs outside the window of {len(windowed)} layers",
    )


def gradients(trial: Trial, stock: Stock) -> CheckOutcome:
    """In training mode every gradient is finite."""
    name = "finite gradients"
    if not any(parameter.requires_grad for parameter in trial.model.parameters()):
        return _not_applicable(name, "no parameter is trained")

    def measure() -> float | None:
        learner = copy.deepcopy(trial.model).train()  # training moves statistics that are no parameters
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            result = learner(**trial.inputs)
        terms = [tensor.square().mean() for _, tensor in floating(result) if tensor.requires_grad]
        if not terms:
            return None
        torch.stack([term.to(terms[0].dtype) for term in terms]).sum().backward()
        known = [parameter.grad for parameter in learner.parameters() if parameter.grad is not None]
        return float(sum(int((~torch.isfinite(grad)).sum()) for grad in known)) if known else None

    return _relative(name, trial, measure, "gradient entries that are not finite")


def reload(trial: Trial, stock: Stock) -> CheckOutcome:
    """A saved model comes back sparse: by `load`, and by a plain `from_pretrained` or not at all."""
    name = "save and load"
    if not stock.repeatable:
        return _not_applicable(name, "two passes of the dense model differ")
    sparsify(trial.model, sparsity=_HALF, inputs=trial.inputs)
    try:
        expected = trial.run()
        kind = type(trial.model)
        with tempfile.TemporaryDirectory() as folder:
            trial.model.save_pretrained(folder)
            try:
                loaded = Trial(load(kind, folder, inputs=trial.inputs, dtype=trial.model.dtype), trial.inputs)
                plain = Trial(kind.from_pretrained(folder, dtype=trial.model.dtype), trial.inputs)
            except CrispError:
                raise
            except Exception:
                densify(trial.model)
                return _stock_reload(trial, stock)
        found = [difference(loaded.run(), expected)]
        with contextlib.suppress(ConfigurationError):  # said aloud that it is not set up: not silently dense
            found.append(difference(plain.run(), expected))
    finally:
        densify(trial.model)
    largest = worst(found)
    if largest is not None and largest > trial.tolerance:
        stocks = _stock_reload(trial, stock)
        if stocks.outcome == "not applicable":
            return stocks
    return _judged(name, largest, trial, "largest difference after a reload")


def _stock_reload(trial: Trial, stock: Stock) -> CheckOutcome:
    """Why a reload failed: does the dense model survive one?"""
    name = "save and load"
    kind = type(trial.model)
    with tempfile.TemporaryDirectory() as folder:
        try:
            trial.model.save_pretrained(folder)
            again = Trial(kind.from_pretrained(folder, dtype=trial.model.dtype), trial.inputs).run()
        except Exception as error:  # whatever Transformers raises
            return _not_applicable(name, f"the dense model itself does not reload ({type(error).__name__})")
    if difference(again, stock.outputs) != 0.0:
        return _not_applicable(name, "the dense model itself reloads with other outputs")
    return CheckOutcome(name, "failed", None, "the sparse model does not reload, though the dense one does")


def restoration(trial: Trial, stock: Stock) -> CheckOutcome:
    """After `densify` outputs are the stock model's to the bit, and the configuration too."""
    name = "restore"
    before = trial.model.config.to_dict(), implementations(trial.model)
    sparsify(trial.model, sparsity=_MOST, inputs=trial.inputs)
    densify(trial.model)
    if (trial.model.config.to_dict(), implementations(trial.model)) != before:
        return CheckOutcome(name, "failed", None, "the configuration is not what it was")
    leftover = [key for module in trial.model.modules() for key in module.__dict__ if "crisp" in key]
    if leftover or SETTINGS in str(trial.model.config.to_dict()):
        return CheckOutcome(name, "failed", None, "run-time state is left on the model")
    if not stock.repeatable:
        return _not_applicable(name, "two passes of the dense model differ")
    figure = difference(trial.run(), stock.outputs)
    return CheckOutcome(name, "ok" if figure == 0.0 else "failed", figure, "largest difference after densify")


CHECKS: tuple[Callable[[Trial, Stock], CheckOutcome], ...] = (
    dense_equality,
    realised_sparsity,
    batch_invariance,
    padding_invariance,
    left_padding,
    no_future,
    cache_equality,
    windows,
    gradients,
    reload,
    restoration,
)


def _relative(name: str, trial: Trial, measure: Callable[[], float | None], detail: str) -> CheckOutcome:
    """Ask of the sparse model what the dense one holds."""
    stock = _attempt(measure)
    if stock is None:
        return _not_applicable(name, "the dense model itself does not offer it")
    limit = 0.0 if name == "finite gradients" else trial.tolerance
    # Ten times as strictly: what a dense model nearly holds, a sparse one need not.
    if stock > limit / 10:
        return _not_applicable(name, f"the dense model itself does not hold it ({stock:.1e})")
    sparsify(trial.model, sparsity=_HALF, inputs=trial.inputs)
    try:
        figure = measure()
    finally:
        densify(trial.model)
    return _judged(name, figure, trial, detail)


def _judged(name: str, figure: float | None, trial: Trial, detail: str) -> CheckOutcome:
    if figure is None:
        return _not_applicable(name, "no output can be compared")
    return CheckOutcome(name, "ok" if figure <= trial.tolerance else "failed", figure, f"{detail}: {figure:.1e}")


def _not_applicable(name: str, why: str) -> CheckOutcome:
    return CheckOutcome(name, "not applicable", None, f"{why}.")


def _attempt(measure: Callable[[], Any]) -> Any:
    """What the stock model gives, or None if it cannot be asked this way."""
    try:
        return measure()
    except CrispError:
        raise
    except Exception:  # whatever a model raises on inputs that are not its kind
        return None
