"""Checks of an audit: equality with the stock model, what is removed, training, saving, restoring."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from crisp_attention.config import SETTINGS, SparsityConfig
from crisp_attention.errors import ConfigurationError, CrispError
from crisp_attention.huggingface.audit_invariance import (
    batch_invariance,
    cache_equality,
    left_padding,
    no_future,
    padding_invariance,
)
from crisp_attention.huggingface.audit_outcome import (
    HALF,
    MOST,
    CheckOutcome,
    Stock,
    attempt,
    judged,
    make_sparse_again,
    not_applicable,
    relative,
    watched,
)
from crisp_attention.huggingface.model import densify, load, watching
from crisp_attention.huggingface.persistence import implementations
from crisp_attention.huggingface.trial import CallRecorder, Outputs, Trial, difference, floating, worst


def dense_equality(trial: Trial, stock: Stock) -> CheckOutcome:
    """At sparsity 0 the operator's own path gives the stock model's outputs, with and without a mask."""
    name = "sparsity 0 equals stock"
    if not stock.repeatable:
        return not_applicable(name, "two passes of the dense model differ")
    bare, bare_stock = without_masks(trial)
    make_sparse_again(trial, 0.0)
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
    return judged(name, worst(found), trial.tolerance, "largest difference from the stock model")


def without_masks(trial: Trial) -> tuple[dict[str, Any], Outputs | None]:
    """The inputs without their masks, and what a dense model gives for them.

    None where there are no masks, where the model cannot do without, and where an example without
    padding comes out otherwise alone than beside a padded one: the dense model then has two ways.
    """
    bare = {key: value for key, value in trial.inputs.items() if not key.endswith("mask")}
    outputs = attempt(lambda: trial.run(bare)) if len(bare) < len(trial.inputs) else None
    if outputs is None or has_two_ways(trial):
        return bare, None
    return bare, outputs


def has_two_ways(trial: Trial) -> bool:
    """Whether a dense model treats its first example, unpadded, otherwise alone than in its batch."""
    if trial.batch < 2 or "input_ids" not in trial.inputs or "attention_mask" not in trial.inputs:
        return False
    alone = attempt(lambda: Trial(trial.model, trial.example(0)).run())
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
    for sparsity in (HALF, MOST):
        sparse, calls = watched(trial, sparsity)
        misses += sum(call.unlawful for call in calls)
        escaped += sum(call.escaped for call in calls)
        shares.append(sum(call.realised for call in calls) / max(len(calls), 1))
        unchanged |= stock.repeatable and difference(sparse, stock.outputs) == 0.0
        if not calls:
            return CheckOutcome(name, "failed", None, "no attention call was seen")
    detail = f"{shares[0]:.3f} at {HALF}, {shares[1]:.3f} at {MOST}, on short inputs"
    if unchanged:
        return CheckOutcome(name, "failed", shares[1], f"{detail}; the outputs are those of the dense model")
    if escaped:
        return CheckOutcome(name, "failed", shares[1], f"{detail}; {escaped} removed pairs have weight")
    if misses:
        return CheckOutcome(name, "failed", shares[1], f"{detail}; {misses} queries keep another number of keys")
    return CheckOutcome(name, "ok", shares[1], detail)


def windows(trial: Trial, stock: Stock) -> CheckOutcome:
    """Survivors lie inside the model's own windows."""
    name = "sliding windows"
    windowed = [call for call in watched(trial, HALF)[1] if call.windowed]
    if not windowed:
        return not_applicable(name, "no layer's mask is shorter than these inputs")
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
        return not_applicable(name, "no parameter is trained")

    def measure() -> float | None:
        learner = copy.deepcopy(trial.model).train()  # training moves statistics that are no parameters
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            result = learner(**trial.inputs)
        terms = [tensor.square().mean() for _, tensor in floating(result) if tensor.requires_grad]
        if not terms:
            return None
        torch.stack([term.to(terms[0].dtype) for term in terms]).sum().backward()
        known = [parameter.grad for parameter in learner.parameters() if parameter.grad is not None]
        return float(sum(int((~torch.isfinite(grad)).sum()) for grad in known)) if known else None

    return relative(name, trial, measure, "gradient entries that are not finite", limit=0.0)


def reload(trial: Trial, stock: Stock) -> CheckOutcome:
    """A saved model comes back sparse: by `load`, and by a plain `from_pretrained` or not at all."""
    name = "save and load"
    if not stock.repeatable:
        return not_applicable(name, "two passes of the dense model differ")
    make_sparse_again(trial, HALF)
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
        with contextlib.suppress(ConfigurationError):  # it may say aloud that it is not set up
            found.append(difference(plain.run(), expected))
    finally:
        densify(trial.model)
    largest = worst(found)
    if largest is not None and largest > trial.tolerance:
        stocks = _stock_reload(trial, stock)
        if stocks.outcome == "not applicable":
            return stocks
    return judged(name, largest, trial.tolerance, "largest difference after a reload")


def _stock_reload(trial: Trial, stock: Stock) -> CheckOutcome:
    """Why a reload failed: does the dense model survive one?"""
    name = "save and load"
    kind = type(trial.model)
    with tempfile.TemporaryDirectory() as folder:
        try:
            trial.model.save_pretrained(folder)
            again = Trial(kind.from_pretrained(folder, dtype=trial.model.dtype), trial.inputs).run()
        except Exception as error:  # whatever Transformers raises
            return not_applicable(name, f"the dense model itself does not reload ({type(error).__name__})")
    if difference(again, stock.outputs) != 0.0:
        return not_applicable(name, "the dense model itself reloads with other outputs")
    return CheckOutcome(name, "failed", None, "the sparse model does not reload, though the dense one does")


def restoration(trial: Trial, stock: Stock) -> CheckOutcome:
    """After `densify` outputs are the stock model's to the bit, and the configuration too."""
    name = "restore"
    before = trial.model.config.to_dict(), implementations(trial.model)
    make_sparse_again(trial, MOST)
    densify(trial.model)
    if (trial.model.config.to_dict(), implementations(trial.model)) != before:
        return CheckOutcome(name, "failed", None, "the configuration is not what it was")
    leftover = [key for module in trial.model.modules() for key in module.__dict__ if "crisp" in key]
    if leftover or SETTINGS in str(trial.model.config.to_dict()):
        return CheckOutcome(name, "failed", None, "run-time state is left on the model")
    if not stock.repeatable:
        return not_applicable(name, "two passes of the dense model differ")
    figure = difference(trial.run(), stock.outputs)
    return CheckOutcome(
        name, "ok" if figure == 0.0 else "failed", figure, f"largest difference after densify: {figure:.1e}"
    )


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
