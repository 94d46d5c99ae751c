"""What a reader must know beside the verdict. No torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from crisp_attention.experiment import statistics
from crisp_attention.experiment.conclusions.outputs import ArmResult, named
from crisp_attention.experiment.conclusions.pattern import dense, is_placebo
from crisp_attention.experiment.results.record import SURER
from crisp_attention.experiment.results.tuning import Tuning
from crisp_attention.experiment.specification.sections import TrainingSpec
from crisp_attention.experiment.specification.spec import ExperimentSpec
from crisp_attention.experiment.specification.tune import Value, told
from crisp_attention.experiment.statistics import Contrast, Look

_OF_TRAINING = frozenset(TrainingSpec.model_fields)

_NEAR = 0.1
"""Numbers that were found for two arms and differ by less than this share of the larger count as the same."""


def cautions(
    spec: ExperimentSpec,
    by_condition: Mapping[str, Sequence[ArmResult]],
    seeds_asked: Sequence[int],
    placebo: Contrast | None,
    look: Look | None,
    tuning: Tuning | None,
    taken_over: Mapping[str, str],
) -> tuple[str, ...]:
    """All that apply, in sentences.

    Args:
        spec: The experiment.
        by_condition: Its arms in each condition.
        seeds_asked: Numbers of seeds asked for, in turn.
        placebo: The baseline again with other seeds, against the baseline.
        look: Which planned look this is; None where none are planned.
        tuning: What was searched and found before the runs; None if nothing is searched, or not found yet.
        taken_over: Runs that were made for another study, and its name, by run id.
    """
    arms = [arm for results in by_condition.values() for arm in results]
    primary = spec.primary.arm, spec.primary.baseline
    compared = [named(by_condition[spec.primary_condition], name) for name in primary]
    found = (
        _repeats(arms),
        _little_learned(compared),
        _named_afterwards(compared, taken_over),
        _seeds_changed(spec, seeds_asked),
        _beyond_the_look(look),
        _trouble(arms),
        _missing(arms),
        _same_masks(spec),
        _no_placebo(spec),
        _placebo_differs(placebo),
        _tuned_unequally(spec),
        _trained_unlike(spec),
        _other_settings(spec, tuning),
        _environments(arms),
    )
    return tuple(sentence for sentence in found if sentence is not None)


def _repeats(arms: Sequence[ArmResult]) -> str | None:
    notes = [note for arm in arms for record in arm.records.values() for note in record.provenance.data_notes]
    return next((note for note in notes if note.endswith(SURER)), None)


def _little_learned(arms: Sequence[ArmResult]) -> str | None:
    """Below the most frequent class's share a model may still tell classes apart: balanced accuracy says whether."""
    outputs = [own for arm in arms for own in arm.outputs.values()]
    if not outputs:
        return None
    counts = np.bincount(outputs[0].labels)
    frequent = float(counts.max() / counts.sum())
    poor = {arm.name: [own for own in arm.outputs.values() if own.correct.mean() <= frequent] for arm in arms}
    if not any(poor.values()):
        return None
    runs = " and ".join(f"{len(poor[arm.name])} of {len(arm.outputs)} runs of {arm.name}" for arm in arms)
    balanced = np.mean([own.balanced_accuracy for found in poor.values() for own in found])
    return (
        f"{runs} classify no more examples correctly than naming the most frequent class each time would "
        f"({100 * frequent:.1f}%). The mean of their accuracies by class is {100 * balanced:.1f}%; "
        f"{100 / np.count_nonzero(counts):.1f}% is what a model has that learned nothing."
    )


def _named_afterwards(arms: Sequence[ArmResult], taken_over: Mapping[str, str]) -> str | None:
    """Whether the primary contrast could have been chosen by runs that were there before it was named."""
    own = [record.run_id for arm in arms for record in (*arm.records.values(), *arm.troubled.values())]
    others = sorted({taken_over[run_id] for run_id in own if run_id in taken_over})
    if not all(any(record.run_id in taken_over for record in arm.records.values()) for arm in arms):
        return None
    count = sum(run_id in taken_over for run_id in own)
    return (
        f"{count} of {len(own)} runs of the primary contrast were made for another study ({', '.join(others)}), whose "
        "results could be seen before this contrast was named."
    )


def _seeds_changed(spec: ExperimentSpec, seeds_asked: Sequence[int]) -> str | None:
    # Growth from below the least number is no look: nothing could have been significant there.
    # Growth from look to look is what was planned.
    unplanned = not set(seeds_asked) <= set(spec.looks)
    if not unplanned or len([count for count in seeds_asked if count >= statistics.MIN_SEEDS]) < 2:
        return None
    asked = " then ".join(map(str, seeds_asked))
    return f"The number of seeds was changed ({asked}) after results could be seen; p-values assume it was fixed."


def _beyond_the_look(look: Look | None) -> str | None:
    if look is None or look.complete <= look.seeds:
        return None
    return f"{look.complete - look.seeds} more pairs of seeds are done than this planned look is at: not compared."


def _trouble(arms: Sequence[ArmResult]) -> str | None:
    troubled = sum(len(arm.troubled) for arm in arms)
    if not troubled:
        return None
    return f"{troubled} run{'s' if troubled > 1 else ''} diverged or failed; counted here and left out of all means."


def _missing(arms: Sequence[ArmResult]) -> str | None:
    missing = sum(arm.missing for arm in arms)
    return f"{missing} of {sum(arm.planned for arm in arms)} runs are not done yet." if missing else None


def _same_masks(spec: ExperimentSpec) -> str | None:
    """A random rule draws by layer (in training by step), from a stream that the seed of a run has no part in."""
    names = [
        arm.name
        for arm in spec.arms
        if not dense(arm, training=False) and (arm.evaluate or arm.attention).rule == "random"
    ]
    if not names:
        return None
    return (
        f"Random masks in evaluation are the same at every seed ({', '.join(names)}): no interval covers the luck of "
        "their one draw."
    )


def _no_placebo(spec: ExperimentSpec) -> str | None:
    if any(is_placebo(spec, arm) for arm in spec.arms):
        return None
    return "There is no placebo (the baseline again with other seeds), which would show how far identical arms differ."


def _placebo_differs(placebo: Contrast | None) -> str | None:
    if placebo is None or placebo.p_value >= placebo.alpha:
        return None
    return (
        f"The placebo {placebo.arm} differs from {placebo.baseline} ({placebo.difference:+.2f} points, "
        f"p = {placebo.p_value:.3g}) although only its seeds are others. Chance alone does this at one of "
        f"{1 / placebo.alpha:.0f} looks. Until it is repeated with yet other seeds, differences of that size "
        "mean nothing here."
    )


def _tuned_unequally(spec: ExperimentSpec) -> str | None:
    """What is searched of attention belongs to the arm; what is searched of training must be the same for both."""
    names = spec.primary.arm, spec.primary.baseline
    arm, baseline = (set(spec.searched(spec.arm(name))) for name in names)
    if arm & _OF_TRAINING == baseline & _OF_TRAINING and bool(arm) == bool(baseline):
        return None
    return (
        f"The search has {_list(arm)} for {names[0]} and {_list(baseline)} for {names[1]}: the two arms of the primary "
        "contrast were not tuned alike."
    )


def _list(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _trained_unlike(spec: ExperimentSpec) -> str | None:
    """Where attention is not all that two arms differ in, their difference is not attention's alone."""
    arm, baseline = spec.arm(spec.primary.arm), spec.arm(spec.primary.baseline)
    own, other = (
        {
            **spec.training_of(side).model_dump(),
            "padding": side.padding or spec.data.padding,
            "seed_offset": side.seed_offset,
        }
        for side in (arm, baseline)
    )
    differing = [name for name in own if own[name] != other[name]]
    if not differing or (arm.attention, arm.evaluate) == (baseline.attention, baseline.evaluate):
        return None
    return (
        f"{arm.name} and {baseline.name} differ in more than attention ({', '.join(differing)}): their difference may "
        "be that of these settings."
    )


def _other_settings(spec: ExperimentSpec, tuning: Tuning | None) -> str | None:
    """Equal budgets may find unequal settings by chance, and pairing over seeds does not average that out."""
    names = spec.primary.arm, spec.primary.baseline
    if tuning is None or not all(name in tuning.values for name in names):
        return None
    arm, baseline = (tuning.values[name] for name in names)
    differing = [setting for setting in arm if setting in baseline and not near(arm[setting], baseline[setting])]
    if not differing:
        return None
    return (
        f"The search found other settings for {names[0]} ({_settings(arm, differing)}) than for {names[1]} "
        f"({_settings(baseline, differing)}). Their difference may be that of the settings, and no interval covers the "
        "luck of one search: a control trains both arms at both."
    )


def near(one: Value, other: Value) -> bool:
    """Whether two settings are the same, or numbers too close together to be told apart by a search."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=_NEAR)
    return one == other


def _settings(values: Mapping[str, Value], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {told(values[name])}" for name in names)


def _environments(arms: Sequence[ArmResult]) -> str | None:
    environments = {
        (str(own.packages), own.threads, own.processes, own.device)
        for arm in arms
        for own in (record.provenance for record in arm.records.values())
    }
    if len(environments) < 2:
        return None
    return "Runs were done with different package versions, threads, processes or devices; see the provenance."
