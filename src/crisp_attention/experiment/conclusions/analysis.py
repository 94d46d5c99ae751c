"""Records of a study -> one tidy `Analysis`: what every table, plot and sentence is made from. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from crisp_attention.experiment import statistics
from crisp_attention.experiment.conclusions.cautions import cautions
from crisp_attention.experiment.conclusions.outcomes import Flip, OutcomeContrast, flips, outcome_contrasts
from crisp_attention.experiment.conclusions.outputs import ArmResult, Outputs, named, read_outputs, shared
from crisp_attention.experiment.conclusions.pattern import (
    Fall,
    RegularizerPattern,
    Standing,
    dense_twins,
    dropout_arms,
    is_placebo,
    regularizer_pattern,
)
from crisp_attention.experiment.conclusions.verdict import Verdict, judge
from crisp_attention.experiment.results.record import Record
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.results.tuning import Tuning
from crisp_attention.experiment.specification.sections import ArmSpec
from crisp_attention.experiment.specification.spec import ExperimentSpec
from crisp_attention.experiment.statistics import ALPHA, Contrast, Interaction, Look, McNemar, Pair

__all__ = ["Analysis", "ArmResult", "analyse"]

_RANDOM_SEED = 20250806
"""Fixed, so that a report rebuilds to the last digit."""

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class Analysis:
    """Everything a report says.

    Attributes:
        spec: The experiment.
        arms: One entry an arm, in the specification's order, in the primary condition.
        primary: The contrast named before the run; None without a finished pair.
        secondary: Every other arm against the baseline in the primary condition, Holm-adjusted.
        verdict: On the primary contrast.
        cautions: What a reader must know beside the verdict.
        seeds_asked: Numbers of seeds asked for, in turn.
        conditions: Names of all conditions, in order; one, "", where nothing varies.
        by_condition: The arms in each condition.
        condition_contrasts: Every arm against the baseline in each condition. Holm's adjustment is over all of them but
            the primary one.
        interactions: How each arm's difference follows what is varied; empty where nothing is. Holm's adjustment is
            over all but the primary arm's, which is named before the run as its contrast is.
        evaluation_contrasts: Every arm against the baseline in the primary condition, by further evaluation. Holm's
            adjustment is over all of these.
        outcomes: Every arm against the baseline in every secondary outcome, in the primary condition.
        placebo: The baseline again with other seeds, against the baseline; None if there is no such arm.
        flips: Examples on which the primary arm and the baseline disagree in most seeds.
        mcnemar: The two checkpoints of each seed of the primary contrast.
        pattern: Whether the primary arm acts as a regularizer; None without a finished pair, or if it is dense.
        look: Which planned look this is; None where none are planned. Only its seeds are compared.
        tuning: What was searched and found before the runs; None if nothing is searched, or not found yet.
    """

    spec: ExperimentSpec
    arms: tuple[ArmResult, ...]
    primary: Contrast | None
    secondary: tuple[Contrast, ...]
    verdict: Verdict
    cautions: tuple[str, ...]
    seeds_asked: tuple[int, ...]
    conditions: tuple[str, ...]
    by_condition: Mapping[str, tuple[ArmResult, ...]]
    condition_contrasts: Mapping[str, tuple[Contrast, ...]]
    interactions: tuple[Interaction, ...]
    evaluation_contrasts: Mapping[str, tuple[Contrast, ...]]
    outcomes: tuple[OutcomeContrast, ...]
    placebo: Contrast | None
    flips: tuple[Flip, ...]
    mcnemar: tuple[McNemar, ...]
    pattern: RegularizerPattern | None
    look: Look | None
    tuning: Tuning | None

    def arm(self, name: str) -> ArmResult:
        """The arm of that name, in the primary condition."""
        return named(self.arms, name)

    @property
    def contrasts(self) -> tuple[Contrast, ...]:
        """The primary contrast and the secondary ones."""
        return ((self.primary,) if self.primary else ()) + self.secondary

    @property
    def records(self) -> list[Record]:
        """All finished records, of all conditions."""
        return [record for arms in self.by_condition.values() for arm in arms for record in arm.records.values()]


def analyse(store: Store) -> Analysis:
    """Analyse a run directory from its records alone.

    Raises:
        RecordError: If the directory or a record in it is damaged.
    """
    spec, runs, seeds_asked = store.study()
    records = store.load_all(runs)
    finished = [record for record in records.values() if record.status == "finished"]
    outputs = read_outputs(store, finished, [item.name for item in spec.evaluations])
    own: dict[tuple[str, str], dict[int, str]] = {}
    for run in runs:
        own.setdefault((run.condition, run.arm), {})[run.index] = run.config.run_id
    by_condition = {
        condition: tuple(_arm_result(arm, condition, own[condition, arm.name], records, outputs) for arm in spec.arms)
        for condition in spec.conditions()
    }
    arms = {arm.name: arm for arm in by_condition[spec.primary_condition]}
    arm, baseline = arms[spec.primary.arm], arms[spec.primary.baseline]
    others = [item for item in arms.values() if item.name != baseline.name]
    look = statistics.look_at(spec.looks, _complete(arm, baseline)) if spec.looks else None
    seeds, alpha = (look.seeds, look.alpha) if look else (spec.seeds, ALPHA)

    primary, condition_contrasts = _contrasts(spec, by_condition, seeds, alpha)
    main = condition_contrasts[spec.primary_condition]
    against_baseline = {found.arm: found for found in main}
    outcomes = outcome_contrasts(others, baseline, seeds, alpha, _RANDOM_SEED)
    pattern = _pattern(spec, arms, against_baseline, outcomes, seeds, alpha)
    everywhere = [_done(named(own, arm.name), named(own, baseline.name)) for own in by_condition.values()]
    placebo = next((found for found in main if is_placebo(spec, spec.arm(found.arm))), None)
    interactions = _interactions(spec, by_condition, seeds, alpha)
    tuning = store.tuning(spec)
    return Analysis(
        spec=spec,
        arms=tuple(arms.values()),
        primary=primary,
        secondary=tuple(found for found in main if found is not primary),
        verdict=judge(
            primary,
            arm.name,
            baseline.name,
            seeds,
            condition=spec.primary_condition,
            look=look,
            placebo=placebo,
            interaction=next((item for item in interactions if item.arm == arm.name), None),
            interaction_awaited=sum(any(index not in done for done in everywhere) for index in range(seeds)),
            pattern=pattern,
            explored=spec.data.validation_share is not None,
            awaited=0 if look else sum(index not in _done(arm, baseline) for index in range(seeds)),
            troubled=(_troubled(arm, seeds), _troubled(baseline, seeds)),
        ),
        cautions=cautions(spec, by_condition, seeds_asked, placebo, look, tuning, store.taken_over()),
        seeds_asked=tuple(seeds_asked),
        conditions=tuple(by_condition),
        by_condition=by_condition,
        condition_contrasts=condition_contrasts,
        interactions=interactions,
        evaluation_contrasts=_evaluation_contrasts(spec, others, baseline, seeds, alpha),
        outcomes=outcomes,
        placebo=placebo,
        flips=flips(arm, baseline, seeds),
        mcnemar=tuple(
            statistics.mcnemar(arm.outputs[index].correct, baseline.outputs[index].correct, index)
            for index in shared(arm, baseline, seeds)
        ),
        pattern=pattern,
        look=look,
        tuning=tuning,
    )


def _arm_result(
    arm: ArmSpec,
    condition: str,
    own: Mapping[int, str],
    records: Mapping[str, Record],
    outputs: Mapping[str, Outputs],
) -> ArmResult:
    done = {index: records[run_id] for index, run_id in own.items() if run_id in records}
    return ArmResult(
        spec=arm,
        condition=condition,
        planned=len(own),
        records={index: record for index, record in done.items() if record.status == "finished"},
        troubled={index: record for index, record in done.items() if record.status != "finished"},
        outputs={index: outputs[run_id] for index, run_id in own.items() if run_id in outputs},
    )


def _complete(arm: ArmResult, baseline: ArmResult) -> int:
    """How many seeds, from the first, are done in both arms, finished or not."""
    done = _done(arm, baseline)
    return next(index for index in range(arm.planned + 1) if index not in done)


def _done(arm: ArmResult, baseline: ArmResult) -> set[int]:
    """The seeds that are done in both arms, finished or not."""
    return {*arm.records, *arm.troubled} & {*baseline.records, *baseline.troubled}


def _troubled(arm: ArmResult, seeds: int) -> int:
    """How many of the first `seeds` runs diverged or failed."""
    return sum(index < seeds for index in arm.troubled)


def pair_of(arm: ArmResult, baseline: ArmResult, seeds: int, evaluation: str | None = None) -> Pair | None:
    """What two arms got right, on the evaluation split or on a further one; None without a shared seed.

    Args:
        arm: Compared with the baseline.
        baseline: Of the same condition.
        seeds: Only the first so many count.
        evaluation: Name of a further evaluation; None for the evaluation split.
    """
    return _paired(arm, baseline, shared(arm, baseline, seeds), evaluation)


def _paired(arm: ArmResult, baseline: ArmResult, indexes: Sequence[int], evaluation: str | None = None) -> Pair | None:
    """The same over given seeds, which both arms have finished."""
    sides: list[list[statistics.Array]] = [[], []]
    for index in indexes:
        both = [side.outputs[index] for side in (arm, baseline)]
        if evaluation is None or all(evaluation in item.further for item in both):
            for side, item in zip(sides, both, strict=True):
                side.append(item.correct if evaluation is None else item.further[evaluation])
    return Pair(arm.name, baseline.name, np.stack(sides[0]), np.stack(sides[1])) if sides[0] else None


def _contrasts(
    spec: ExperimentSpec, by_condition: Mapping[str, tuple[ArmResult, ...]], seeds: int, alpha: float
) -> tuple[Contrast | None, dict[str, tuple[Contrast, ...]]]:
    """The primary contrast, and every arm against the baseline by condition; all but the primary one are adjusted."""
    found = _compare(
        {
            (condition, arm.name): pair_of(arm, named(arms, spec.primary.baseline), seeds)
            for condition, arms in by_condition.items()
            for arm in arms
            if arm.name != spec.primary.baseline
        },
        alpha,
    )
    primary = found.pop((spec.primary_condition, spec.primary.arm), None)
    by_place: dict[str, list[Contrast]] = {condition: [] for condition in by_condition}
    if primary is not None:
        by_place[spec.primary_condition].append(primary)
    for (condition, _), item in _adjusted(found).items():
        by_place[condition].append(item)
    return primary, {condition: tuple(items) for condition, items in by_place.items()}


def _evaluation_contrasts(
    spec: ExperimentSpec, arms: Sequence[ArmResult], baseline: ArmResult, seeds: int, alpha: float
) -> dict[str, tuple[Contrast, ...]]:
    """Every arm against the baseline by further evaluation, all of them adjusted together."""
    names = [item.name for item in spec.evaluations]
    found = _adjusted(
        _compare({(name, arm.name): pair_of(arm, baseline, seeds, name) for name in names for arm in arms}, alpha)
    )
    return {name: tuple(item for (place, _), item in found.items() if place == name) for name in names}


def _compare(pairs: Mapping[_Key, Pair | None], alpha: float) -> dict[_Key, Contrast]:
    """A contrast for each pair there is, in the same order."""
    by_shape: dict[tuple[int, ...], list[_Key]] = {}
    for key, pair in pairs.items():
        if pair is not None:
            by_shape.setdefault(pair.correct_arm.shape, []).append(key)
    found: dict[_Key, Contrast] = {}
    for shape, keys in by_shape.items():
        # One generator a shape, and nothing else in it: adding an arm changes no other number.
        random = np.random.default_rng([_RANDOM_SEED, *shape])
        present = [pair for key in keys if (pair := pairs[key]) is not None]
        found |= dict(zip(keys, statistics.contrasts(present, random, alpha), strict=True))
    return {key: found[key] for key in pairs if key in found}


def _adjusted(contrasts: Mapping[_Key, Contrast]) -> dict[_Key, Contrast]:
    adjusted = statistics.holm(np.array([item.p_value for item in contrasts.values()]))
    return {
        key: dataclasses.replace(item, p_holm=float(p))
        for (key, item), p in zip(contrasts.items(), adjusted, strict=True)
    }


def _pattern(
    spec: ExperimentSpec,
    arms: Mapping[str, ArmResult],
    against_baseline: Mapping[str, Contrast],
    outcomes: Sequence[OutcomeContrast],
    seeds: int,
    alpha: float,
) -> RegularizerPattern | None:
    arm, baseline = arms[spec.primary.arm], arms[spec.primary.baseline]
    if arm.name not in against_baseline or not arm.spec.attention.removes:
        return None
    gap = next(item for item in outcomes if (item.arm, item.outcome) == (arm.name, "gap"))
    rivals = {name: pair_of(arm, arms[name], seeds) for name in dropout_arms(spec)}
    return regularizer_pattern(
        spec,
        _train_fall(arm, baseline, seeds, alpha),
        Fall(gap.difference, gap.p_value, gap.seeds, alpha),
        against_baseline,
        list(_compare(rivals, alpha).values()),
        {
            name: Standing(len(set(range(seeds)) - _done(arms[name], other)), _troubled(arms[name], seeds), seeds)
            for names, other in (((arm.name, baseline.name, *dense_twins(spec)), baseline), (dropout_arms(spec), arm))
            for name in names
        },
    )


def _train_fall(arm: ArmResult, baseline: ArmResult, seeds: int, alpha: float) -> Fall:
    pairs = shared(arm, baseline, seeds)
    by_seed = [
        np.array([100 * side.records[index].final.train.accuracy for index in pairs]) for side in (arm, baseline)
    ]
    differences = by_seed[0] - by_seed[1]
    random = np.random.default_rng([_RANDOM_SEED, len(pairs)])
    p_value = float(statistics.sign_flip_p(differences[None], random)[0])
    return Fall(float(differences.mean()), p_value, len(pairs), alpha)


def _interactions(
    spec: ExperimentSpec, by_condition: Mapping[str, tuple[ArmResult, ...]], seeds: int, alpha: float
) -> tuple[Interaction, ...]:
    """One an arm, over the seeds that are complete in every condition; all but the primary arm's are adjusted."""
    if spec.vary is None:
        return ()
    conditions = dict(zip(by_condition, spec.vary.values, strict=True))
    by_shape: dict[tuple[int, ...], dict[str, statistics.Array]] = {}
    for arm in spec.arms:
        if arm.name == spec.primary.baseline:
            continue
        sides = [(named(arms, arm.name), named(arms, spec.primary.baseline)) for arms in by_condition.values()]
        indexes = [index for index in range(seeds) if all(index in shared(*pair, seeds) for pair in sides)]
        pairs = [pair for one, other in sides if (pair := _paired(one, other, indexes)) is not None]
        if pairs:
            table = np.stack([pair.by_example for pair in pairs])
            by_shape.setdefault(table.shape, {})[arm.name] = table
    trends: dict[str, Interaction] = {}
    for shape, tables in by_shape.items():
        random = np.random.default_rng([_RANDOM_SEED, *shape])
        own = statistics.linear_trends(tables, spec.primary.baseline, spec.vary.key, conditions, random, alpha)
        trends |= {item.arm: item for item in own}
    found = [trends[arm.name] for arm in spec.arms if arm.name in trends]
    others = [item for item in found if item.arm != spec.primary.arm]
    adjusted = dict(
        zip(
            (item.arm for item in others),
            statistics.holm(np.array([item.p_value for item in others])).tolist(),
            strict=True,
        )
    )
    return tuple(dataclasses.replace(item, p_holm=adjusted.get(item.arm)) for item in found)
