"""Is a model served correctly? Every promise of the package, measured on a copy of the model.

    report = crisp.audit(model)
    print(report)

Each check compares the sparse model with itself under a change that must not matter (padding, batch
mates, a cache, a reload), or with the stock model where nothing was removed. What the dense model
itself does not hold, as invariance to padding in a model with convolutions, is not asked of the
sparse one: the check then says "not applicable" and why.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from crisp_attention.checking import Inputs, evaluation
from crisp_attention.errors import CrispError
from crisp_attention.huggingface.audit_checks import CHECKS, has_two_ways
from crisp_attention.huggingface.audit_outcome import CheckOutcome, Stock, make_sparse_again
from crisp_attention.huggingface.inputs import working_inputs
from crisp_attention.huggingface.model import densify, sparsify
from crisp_attention.huggingface.probe import probe
from crisp_attention.huggingface.quiet import quiet
from crisp_attention.huggingface.trial import Trial
from crisp_attention.representation import Tone, bullets, card, table

Verdict = Literal["served", "served with limits", "refused"]


@dataclass(frozen=True)
class AuditReport:
    """The audit of one model.

    Attributes:
        model: Class of the model.
        verdict: "served", "served with limits", or "refused".
        reasons: Sentences: the limits, or why it is refused; empty if served.
        checks: One outcome a check, in the order of `CHECKS`; empty if `sparsify` refuses the model.
    """

    model: str
    verdict: Verdict
    reasons: tuple[str, ...]
    checks: tuple[CheckOutcome, ...]

    @property
    def served(self) -> bool:
        """Whether the model can be used, with or without limits."""
        return self.verdict != "refused"

    @property
    def failed(self) -> tuple[CheckOutcome, ...]:
        """The checks that found something wrong."""
        return tuple(check for check in self.checks if check.outcome == "failed")

    def __repr__(self) -> str:
        marks = {"ok": "ok    ", "failed": "FAILED", "not applicable": "n/a   "}
        lines = [f"{self.model}: {self.verdict}"]
        lines += [f"  {marks[check.outcome]} {check.name}: {check.detail}" for check in self.checks]
        return "\n".join(lines + [f"  {reason}" for reason in self.reasons])

    def _repr_html_(self) -> str:
        tones: dict[Verdict, Tone] = {"served": "good", "served with limits": "open", "refused": "bad"}
        rows = [(check.name, check.outcome, check.detail) for check in self.checks]
        measured = table(("check", "outcome", "measured"), rows, prose=("outcome", "measured")) if rows else ""
        return card(self.model, bullets(self.reasons), measured, badge=(self.verdict, tones[self.verdict]))


def audit(model: PreTrainedModel, inputs: Inputs | None = None) -> AuditReport:
    """Measure on a copy of a model whether crisp attention serves it correctly.

    About fifty small forward passes. The model itself is not touched; if it is sparsified, its copy
    is made dense first. Rule "topk" is used, which serves causal models too.

    Args:
        model: Any `PreTrainedModel`, sparsified or not.
        inputs: Keyword arguments of a small forward pass, two or more examples; found by default.

    Returns:
        The verdict, its reasons and each check's outcome.
    """
    name = type(model).__name__
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ours about each check's `sparsify`
        twin = densify(copy.deepcopy(model))
        try:
            if inputs is None and twin._can_set_attn_implementation():
                with evaluation(twin):
                    inputs = working_inputs(twin)
            sparsify(twin, sparsity=0.0, inputs=inputs)
        except CrispError as refusal:
            return AuditReport(name, "refused", (str(refusal),), ())
        except Exception as error:  # whatever a model raises under an attention that it was not written for
            reason = f"Made sparse, {name} raises {type(error).__name__}: {error}."
            return AuditReport(name, "refused", (reason,), ())
        densify(twin)
        trial = Trial(twin, dict(inputs or {}))
        stock = Stock.of(trial)
        checks = tuple(check(trial, stock) for check in CHECKS)
        limits = _limits(trial)
    failed = tuple(f"Check '{check.name}' failed: {check.detail}" for check in checks if check.outcome == "failed")
    if failed:
        return AuditReport(name, "refused", failed, checks)
    return AuditReport(name, "served with limits" if limits else "served", limits, checks)


def _limits(trial: Trial) -> tuple[str, ...]:
    """What a served model cannot do, or was not seen doing."""
    make_sparse_again(trial, 0.0)
    try:
        report = probe(trial.model, trial.inputs)
    finally:
        densify(trial.model)
    limits = []
    if has_two_ways(trial):
        limits.append(
            "The dense model gives an unpadded example other outputs alone than beside a padded one; sparse, it is as "
            "beside a padded one."
        )
    if report.idle:
        limits.append(
            f"These attention layers did not run on the inputs and were not checked: {_summary(report.idle)}."
        )
    if report.dense:
        limits.append(f"Pooling heads outside of the attention interface stay dense: {_summary(report.dense)}.")
    if len({call.layer for call in report.calls}) < len(report.calls):
        limits.append("Rule 'random' is refused: an attention module runs several times in a pass.")
    return tuple(limits)


def _summary(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
