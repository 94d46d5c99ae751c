"""Does an arm act as a regularizer? The causal pattern, clause by clause. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from crisp_attention.experiment.specification.sections import ArmSpec
from crisp_attention.experiment.specification.spec import ExperimentSpec
from crisp_attention.experiment.statistics import EQUIVALENCE_MARGIN, Contrast, least_seeds

_DROPOUTS = ("attention_dropout", "hidden_dropout")


@dataclass(frozen=True)
class Clause:
    """One part of the pattern.

    Attributes:
        statement: What must hold.
        holds: Whether it was shown; None where it was not measured.
        difference: The figure it rests on, points; None where there is none.
        figure: The same in words, or why there is none.
    """

    statement: str
    holds: bool | None
    difference: float | None
    figure: str


@dataclass(frozen=True)
class RegularizerPattern:
    """What an arm must show to be called a regularizer.

    Attributes:
        arm: The primary arm.
        train_falls: It classifies fewer training examples correctly than the baseline.
        gap_narrows: Its gap between train and test accuracy is narrower.
        dense_keeps: Trained like it and dense in evaluation, a model is not worse than the baseline.
        beats_dropout: It is better than dense training with the best of several dropouts.
    """

    arm: str
    train_falls: Clause
    gap_narrows: Clause
    dense_keeps: Clause
    beats_dropout: Clause

    @property
    def clauses(self) -> tuple[Clause, ...]:
        """All four."""
        return self.train_falls, self.gap_narrows, self.dense_keeps, self.beats_dropout

    @property
    def holds(self) -> bool | None:
        """True if all clauses hold, False if one does not, None if one is open."""
        answers = [clause.holds for clause in self.clauses]
        return False if False in answers else None if None in answers else True


@dataclass(frozen=True)
class Fall:
    """Whether a figure of the primary arm is below the baseline's.

    Attributes:
        difference: Arm minus baseline, points.
        p_value: Two-sided.
        seeds: Pairs compared.
        alpha: Level of the test.
    """

    difference: float
    p_value: float
    seeds: int
    alpha: float


@dataclass(frozen=True)
class Standing:
    """How far the runs of an arm are, beside those that it is paired with.

    Attributes:
        awaited: Planned pairs that are not done yet.
        troubled: Runs of the arm that diverged or failed.
        planned: Pairs in all.
    """

    awaited: int = 0
    troubled: int = 0
    planned: int = 0


def regularizer_pattern(
    spec: ExperimentSpec,
    train: Fall,
    gap: Fall,
    against_baseline: Mapping[str, Contrast],
    against_dropout: Sequence[Contrast],
    standings: Mapping[str, Standing] | None = None,
) -> RegularizerPattern:
    """Judge the pattern.

    Args:
        spec: The experiment; its primary arm is judged.
        train: The arm's accuracy on training examples.
        gap: Its gap between train and test accuracy.
        against_baseline: Contrasts with the baseline by arm.
        against_dropout: The primary arm against each arm of `dropout_arms`.
        standings: By arm, those of which all is done and nothing lost left out. Nothing is said of a clause whose
            pairs are not all done, nor where more runs were lost of the side that it favours.
    """
    arm, baseline = spec.primary.arm, spec.primary.baseline
    involved = (arm, baseline, *dense_twins(spec), *dropout_arms(spec))
    stand = {name: (standings or {}).get(name, Standing()) for name in involved}
    return RegularizerPattern(
        arm,
        _fall(f"accuracy on training examples falls below that of {baseline}", train, arm, stand[arm], stand[baseline]),
        _fall(
            f"the gap between train and test accuracy is narrower than that of {baseline}",
            gap,
            arm,
            stand[arm],
            stand[baseline],
        ),
        _keeps(
            f"trained sparse and evaluated dense it is not {EQUIVALENCE_MARGIN:g} points worse than {baseline}",
            against_baseline,
            dense_twins(spec),
            stand,
        ),
        _beats(against_dropout, _dropout_tuned(spec), {name: stand[name] for name in dropout_arms(spec)}, stand[arm]),
    )


def dense_twins(spec: ExperimentSpec) -> list[str]:
    """Arms that are trained as the primary arm is and dense in evaluation."""
    primary = spec.arm(spec.primary.arm)
    return [
        arm.name
        for arm in spec.arms
        if _alike(spec, arm, primary)
        and arm.attention.replace(apply="always") == primary.attention.replace(apply="always")
        and arm.attention.active(training=True) == primary.attention.active(training=True)
        and dense(arm, training=False)
    ]


def dropout_arms(spec: ExperimentSpec) -> list[str]:
    """Dense arms that set a dropout of their own, or for which one is searched."""
    primary, searched = spec.arm(spec.primary.arm), _dropout_searched(spec)
    return [
        arm.name
        for arm in spec.arms
        if (arm.name in searched or any(getattr(arm.training, name) is not None for name in _DROPOUTS))
        and dense(arm, training=True)
        and dense(arm, training=False)
        and _padding(spec, arm) == _padding(spec, primary)
        and arm.seed_offset == primary.seed_offset
    ]


def _dropout_searched(spec: ExperimentSpec) -> set[str]:
    return {arm.name for arm in spec.arms if not spec.searched(arm).keys().isdisjoint(_DROPOUTS)}


def _dropout_tuned(spec: ExperimentSpec) -> set[str]:
    """Those of `dropout_arms` whose dropout was chosen among several: by a search, or as the best of several arms."""
    names = dropout_arms(spec)
    tuned = _dropout_searched(spec) if spec.tune is not None and spec.tune.trials > 1 else set()
    for setting in _DROPOUTS:
        rates = {name: getattr(spec.arm(name).training, setting) for name in names}
        rates = {name: rate for name, rate in rates.items() if rate is not None}
        # No dropout at all is no rate to choose among, though it may be what is chosen.
        if len(set(rates.values()) - {0.0}) > 1:
            tuned |= rates.keys()
    return tuned & set(names)


def is_placebo(spec: ExperimentSpec, arm: ArmSpec) -> bool:
    """Whether an arm is the baseline again with none of its seeds."""
    baseline = spec.arm(spec.primary.baseline)
    same = (arm.attention, arm.evaluate, _training(spec, arm)) == (
        baseline.attention,
        baseline.evaluate,
        _training(spec, baseline),
    )
    return same and abs(arm.seed_offset - baseline.seed_offset) >= spec.seeds


def _alike(spec: ExperimentSpec, arm: ArmSpec, other: ArmSpec) -> bool:
    return (_training(spec, arm), arm.seed_offset) == (_training(spec, other), other.seed_offset)


def _training(spec: ExperimentSpec, arm: ArmSpec) -> object:
    """How an arm is trained, its attention and seeds apart."""
    return spec.training_of(arm), _padding(spec, arm), tuple(spec.searched(arm))


def dense(arm: ArmSpec, *, training: bool) -> bool:
    """Whether an arm removes nothing, in training or in evaluation."""
    if not training and arm.evaluate is not None:
        return not arm.evaluate.removes
    return not arm.attention.active(training)


def _padding(spec: ExperimentSpec, arm: ArmSpec) -> str:
    return arm.padding or spec.data.padding


def _fall(statement: str, found: Fall, arm: str, own: Standing, baseline: Standing) -> Clause:
    figure = f"{found.difference:+.2f} points, p = {found.p_value:.3g}"
    if own.awaited:
        return Clause(statement, None, found.difference, f"{figure}: {_so_far([own])}")
    if found.seeds < least_seeds(found.alpha):
        return Clause(statement, None, found.difference, f"{figure}: too few seeds to tell")
    falls = found.difference < 0 and found.p_value < found.alpha
    if falls and own.troubled > baseline.troubled:
        return Clause(statement, None, found.difference, f"{figure}: {_lost(arm, own.troubled)}")
    return Clause(statement, falls, found.difference, figure)


def _keeps(
    statement: str, contrasts: Mapping[str, Contrast], twins: Sequence[str], stand: Mapping[str, Standing]
) -> Clause:
    if not twins:
        return Clause(statement, None, None, "no arm is trained like it and dense in evaluation")
    own, found = stand[twins[0]], contrasts.get(twins[0])
    if found is None:
        return Clause(statement, None, None, f"no pair of {twins[0]} has finished")
    figure = f"{found.arm}: {found.difference:+.2f} points"
    if own.awaited:
        return Clause(statement, None, found.difference, f"{figure}: {_so_far([own])}")
    if found.seeds < least_seeds(found.alpha):
        return Clause(statement, None, found.difference, f"{figure}: too few seeds to tell")
    figure += f", interval {found.interval.low:+.2f} to {found.interval.high:+.2f}"
    # Not worse is shown, not assumed: the interval must end above the margin that counts as equivalent.
    keeps = found.interval.low > -EQUIVALENCE_MARGIN
    if keeps and own.troubled > stand[found.baseline].troubled:
        return Clause(statement, None, found.difference, f"{figure}: {_lost(found.arm, own.troubled)}")
    return Clause(statement, keeps, found.difference, figure)


def _so_far(standings: Sequence[Standing]) -> str:
    done = sum(own.planned - own.awaited for own in standings)
    return f"{done} of {sum(own.planned for own in standings)} pairs are done"


def _lost(name: str, troubled: int) -> str:
    return f"{troubled} runs of {name} diverged or failed, more than of the other side"


def _beats(
    contrasts: Sequence[Contrast], tuned: AbstractSet[str], rivals: Mapping[str, Standing], own: Standing
) -> Clause:
    statement = "it is better than tuned dropout"
    if any(rival.awaited for rival in rivals.values()):
        # The best of several is not known before all are done.
        return Clause(statement, None, None, _so_far(list(rivals.values())))
    if not rivals:
        return Clause(statement, None, None, "no dense arm sets a dropout of its own")
    if not contrasts:
        return Clause(statement, None, None, "no pair of seeds has finished")
    # The best of several on the evaluation split itself: that favours dropout, never the arm.
    found = min(contrasts, key=lambda item: item.difference)
    untuned = found.baseline not in tuned
    rival = f"{found.baseline}, which was not tuned" if untuned else found.baseline
    figure = f"against {rival}: {found.difference:+.2f} points, p = {found.p_value:.3g}"
    if found.seeds < least_seeds(found.alpha):
        return Clause(statement, None, found.difference, f"{figure}: too few seeds to tell")
    figure += f", interval {found.interval.low:+.2f} to {found.interval.high:+.2f}"
    better = found.p_value < found.alpha and found.interval.low > 0
    if better and own.troubled > rivals[found.baseline].troubled:
        return Clause(statement, None, found.difference, f"{figure}: {_lost(found.arm, own.troubled)}")
    if better and untuned:
        more = "one rate alone is not tuned; add arms with others, or search it"
        return Clause(statement, None, found.difference, f"{figure}: {more}")
    return Clause(statement, better, found.difference, figure)
