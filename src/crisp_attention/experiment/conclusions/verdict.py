"""A contrast -> the sentences a person reads. Four words, and never "no effect"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from crisp_attention.experiment.conclusions.pattern import Clause, RegularizerPattern
from crisp_attention.experiment.specification.spec import MAX_SEEDS, USUAL_SEEDS
from crisp_attention.experiment.statistics import (
    EQUIVALENCE_EXAMPLES,
    EQUIVALENCE_MARGIN,
    Contrast,
    Interaction,
    Look,
    least_seeds,
    seeds_needed,
    smallest_p,
)
from crisp_attention.representation import Tone, bullets, card

Word = Literal["helps", "hurts", "equivalent", "inconclusive", "no verdict"]

_TONES: dict[Word, Tone] = {
    "helps": "good",
    "hurts": "bad",
    "equivalent": "same",
    "inconclusive": "open",
    "no verdict": "open",
}

_EFFECT_OF_INTEREST = 1.0


@dataclass(frozen=True)
class Verdict:
    """What may be said of the primary contrast.

    Attributes:
        word: The answer.
        headline: One sentence with the word in it.
        details: What it rests on and where it ends, a sentence each.
    """

    word: Word
    headline: str
    details: tuple[str, ...]

    def __repr__(self) -> str:
        return "\n  ".join((self.headline, *self.details))

    def _repr_html_(self) -> str:
        return card(self.headline, bullets(self.details), badge=(self.word, _TONES[self.word]))


def judge(
    contrast: Contrast | None,
    arm: str,
    baseline: str,
    planned: int,
    *,
    condition: str = "",
    look: Look | None = None,
    placebo: Contrast | None = None,
    interaction: Interaction | None = None,
    interaction_awaited: int = 0,
    pattern: RegularizerPattern | None = None,
    explored: bool = False,
    awaited: int = 0,
    troubled: tuple[int, int] = (0, 0),
) -> Verdict:
    """Put a contrast into words.

    Args:
        contrast: The primary contrast; None if no pair of seeds has finished.
        arm: Name of the arm.
        baseline: Name of what it is compared with.
        planned: Seeds per arm that the experiment asks for, or that the look is at.
        condition: Where data vary, the condition that the contrast was made in.
        look: Which planned look this is, where looks are planned.
        placebo: The baseline with other seeds, against the baseline.
        interaction: How the arm's difference follows what is varied.
        interaction_awaited: How many of the planned pairs are not done yet in every condition.
        pattern: Whether the arm acts as a regularizer.
        explored: Whether the examples are a part of the training split.
        awaited: How many of the planned pairs are not done yet. A verdict before the end would be a look at the data
            that was not planned; runs that diverged or failed are not waited for.
        troubled: Runs of the arm and of the baseline that diverged or failed. A verdict on the others would favour
            the side that has more of them.
    """
    where = f" at {condition}" if condition else ""
    if look is not None and not look.number:
        return Verdict(
            "no verdict",
            f"No verdict: the first planned look is at {look.planned[0]} seeds, {look.complete} are complete{where}.",
            (),
        )
    if contrast is None:
        return Verdict("no verdict", f"No verdict: no seed has finished both {arm} and {baseline}{where}.", ())
    seeds = f"{contrast.seeds} paired seed{'s' if contrast.seeds > 1 else ''}"
    difference = (
        f"{arm} differs from {baseline} by {contrast.difference:+.2f} points "
        f"({contrast.sentences:+.1f} of {contrast.examples} examples) over {seeds}{where}"
    )
    if awaited and planned >= least_seeds(contrast.alpha):
        return Verdict(
            "no verdict",
            f"No verdict yet: {planned - awaited} of {planned} planned pairs of seeds are done{where}.",
            (f"{difference}{_within(contrast)}: so far. A verdict now would be a look that was not planned.",),
        )
    if contrast.seeds < least_seeds(contrast.alpha):
        return Verdict(
            "no verdict",
            f"No verdict: {seeds} {'are' if contrast.seeds > 1 else 'is'} too few.",
            (f"{difference}: an observation, not a finding.", *_what_would(contrast, planned, look)),
        )
    details = [f"{difference}{_within(contrast)}.", f"Sign-flip permutation test: p = {contrast.p_value:.3g}."]
    if look is not None:
        details.append(_which_look(look))
    if contrast.seeds < planned:
        details.append(
            f"Only {contrast.seeds} of {planned} planned pairs have finished{_lost(arm, baseline, troubled)}."
        )
    word = _word(contrast, troubled)
    if word == "inconclusive" and contrast.detectable:
        details.append(
            f"This design could have detected a difference of {contrast.detectable:.2f} points or more "
            "(paired t test over seeds, 80% power); a verdict, which is to hold for other examples too, takes "
            f"{contrast.detectable_verdict:.2f} or more. The data are compatible with "
            f"{contrast.interval.low:+.2f} to {contrast.interval.high:+.2f}."
        )
        details += _seeds_for(contrast, look)
    if word == "inconclusive" and _close(contrast) and contrast.examples < EQUIVALENCE_EXAMPLES:
        details.append(
            f"{contrast.examples} examples are too few to call the arms equivalent, however alike they answer: that "
            f"takes {EQUIVALENCE_EXAMPLES}."
        )
    elif word == "inconclusive" and _close(contrast):
        details.append("That they are equivalent is not said where one of the two lost more runs than the other.")
    if word == "equivalent":
        details.append(
            f"Two one-sided tests place the difference within {EQUIVALENCE_MARGIN:g} points either way "
            f"(p = {contrast.p_equivalence:.3g})."
        )
    if placebo is not None:
        details.append(_aa(placebo, contrast if contrast.p_value < contrast.alpha else None))
    if interaction is not None:
        details.append(_trend(interaction, planned, interaction_awaited))
    if pattern is not None:
        details.append(_regularizer(pattern, word))
    if explored:
        details.append(
            "Measured on a part of the training split, to explore: what was chosen by it is to be confirmed on the "
            "evaluation split."
        )
    headlines = {
        "helps": f"{arm} helps: better than {baseline}{where}.",
        "hurts": f"{arm} hurts: worse than {baseline}{where}.",
        "equivalent": f"{arm} and {baseline} are equivalent to within {EQUIVALENCE_MARGIN:g} points{where}.",
        "inconclusive": f"Inconclusive: {_open(contrast, troubled)}{where}.",
    }
    return Verdict(word, headlines[word], tuple(details))


def _open(contrast: Contrast, troubled: tuple[int, int]) -> str:
    """What is left open, and what is not."""
    if contrast.p_value >= contrast.alpha:
        return f"these data do not tell {contrast.arm} from {contrast.baseline}"
    found = f"{contrast.arm} is {'better' if contrast.difference > 0 else 'worse'} than {contrast.baseline}"
    if contrast.interval.low <= 0 <= contrast.interval.high:
        return f"{found} on these examples, which is not shown for others"
    more = contrast.arm if troubled[0] > troubled[1] else contrast.baseline
    return f"{found} where both finish, and more runs of {more} do not"


def _lost(arm: str, baseline: str, troubled: tuple[int, int]) -> str:
    if not any(troubled):
        return ""
    return f"; diverged or failed: {troubled[0]} of {arm}, {troubled[1]} of {baseline}"


def _within(found: Contrast | Interaction) -> str:
    """Its interval; nothing where seeds are too few for one."""
    if found.seeds < least_seeds(found.alpha):
        return ""
    return (
        f"; {100 * (1 - found.alpha):.3g}% interval over seeds and examples "
        f"{found.interval.low:+.2f} to {found.interval.high:+.2f}"
    )


def _word(contrast: Contrast, troubled: tuple[int, int]) -> Word:
    of_arm, of_baseline = troubled
    if contrast.p_value < contrast.alpha and contrast.interval.low > 0:
        return "helps" if of_arm <= of_baseline else "inconclusive"
    if contrast.p_value < contrast.alpha and contrast.interval.high < 0:
        return "hurts" if of_arm >= of_baseline else "inconclusive"
    alike = _close(contrast) and contrast.examples >= EQUIVALENCE_EXAMPLES and of_arm == of_baseline
    return "equivalent" if alike else "inconclusive"


def _close(contrast: Contrast) -> bool:
    """Whether both the seeds and the examples place the difference within the margin."""
    # TOST knows the spread over seeds only; other sentences must not be able to tell the arms apart either.
    within = contrast.interval.low > -EQUIVALENCE_MARGIN and contrast.interval.high < EQUIVALENCE_MARGIN
    return within and contrast.p_equivalence is not None and contrast.p_equivalence < contrast.alpha


def _what_would(contrast: Contrast, planned: int, look: Look | None) -> tuple[str, ...]:
    floor = (
        f"With {contrast.seeds} seed{'s' if contrast.seeds > 1 else ''} the sign-flip test cannot go below "
        f"p = {smallest_p(contrast.seeds):.3g}, whatever the data, and an interval over so few would be too narrow."
    )
    if look is not None:
        return floor, _which_look(look)
    if planned >= USUAL_SEEDS:
        return (floor,)
    return (
        floor,
        f"{least_seeds(contrast.alpha)} seeds are the least that can carry a verdict, {USUAL_SEEDS} are usual: "
        f"ask for them with --seeds {USUAL_SEEDS}; finished runs are kept.",
    )


def _which_look(look: Look) -> str:
    planned = ", ".join(map(str, look.planned))
    text = f"Look {look.number} of {len(look.planned)}, planned at {planned} seeds: each tests at p < {look.alpha:.3g}."
    return text if look.number == len(look.planned) else f"{text} The next is at {look.planned[look.number]} seeds."


def _seeds_for(contrast: Contrast, look: Look | None) -> tuple[str, ...]:
    if not contrast.spread:
        return ()
    wanted = seeds_needed(_EFFECT_OF_INTEREST, contrast.spread, contrast.alpha)
    estimate = (
        f"At the spread seen so far ({contrast.spread:.2f} points a pair) about {wanted} seeds would detect a "
        f"difference of {_EFFECT_OF_INTEREST:g} point with 80% power (paired t test over seeds)."
    )
    if wanted > MAX_SEEDS:
        return (f"{estimate} That is out of reach: more examples, or a larger effect, would be needed.",)
    if wanted <= contrast.seeds:
        return ()
    # More seeds once a result is known would be a look that was not planned, and p assumes that there is none.
    return (estimate if look else f"{estimate} They would be a study of their own: these seeds have been looked at.",)


def _aa(placebo: Contrast, shown: Contrast | None) -> str:
    """What the placebo says beside a difference that was shown, if one was."""
    found = (
        f"Placebo: {placebo.arm}, which is {placebo.baseline} with other seeds, differs from it by "
        f"{placebo.difference:+.2f} points (p = {placebo.p_value:.3g})"
    )
    if placebo.p_value < placebo.alpha:
        return f"{found}: identical arms should not, so read the verdict with the caution below."
    if placebo.seeds < least_seeds(placebo.alpha):
        return f"{found}: too few pairs to tell even different arms apart."
    if shown is not None and abs(placebo.difference) >= abs(shown.difference):
        return f"{found}: not told apart, yet as far apart as the two arms that are. Seeds alone make such differences."
    return f"{found}: identical arms are not told apart, as it should be."


def _trend(interaction: Interaction, planned: int, awaited: int) -> str:
    if awaited:
        return (
            f"Whether the difference follows {interaction.factor} is not said yet: {planned - awaited} of {planned} "
            "planned pairs of seeds are done in every condition."
        )
    # All of them: a slope may hang on one.
    values = [f"{value:+.2f}" for value in interaction.differences]
    values[0] += " points"
    points = ", ".join(f"{value} at {name}" for value, name in zip(values, interaction.conditions, strict=True))
    over = "" if interaction.seeds == planned else f" over the {interaction.seeds} seeds that finished everywhere"
    per = (
        f"{interaction.slope:+.2f} points per {interaction.unit}{over} (p = {interaction.p_value:.3g}"
        f"{_within(interaction)})"
    )
    if interaction.seeds < least_seeds(interaction.alpha):
        return f"{interaction.seeds} seeds cannot tell whether the difference follows {interaction.factor}: {points}."
    if interaction.p_value < interaction.alpha:
        word = "rises" if interaction.slope > 0 else "falls"
        if interaction.interval.low <= 0 <= interaction.interval.high:
            return (
                f"On these examples the difference {word} with {interaction.factor}, which is not shown for others: "
                f"{per}; {points}."
            )
        return f"The difference {word} with {interaction.factor}: {per}; {points}."
    return f"These data do not show that the difference follows {interaction.factor}: {per}; {points}."


def _regularizer(pattern: RegularizerPattern, word: Word) -> str:
    if pattern.holds and word == "helps":
        return f"{pattern.arm} acts as a regularizer: {_clauses(pattern.clauses)}."
    if pattern.holds:
        return (
            f"{pattern.arm} shows a regularizer's pattern, but that it helps is not shown: {_clauses(pattern.clauses)}."
        )
    parts = [
        f"{label}: {_clauses(clauses)}"
        for label, clauses in (
            ("Not shown", [clause for clause in pattern.clauses if clause.holds is False]),
            ("Not measured", [clause for clause in pattern.clauses if clause.holds is None]),
        )
        if clauses
    ]
    return f"That {pattern.arm} acts as a regularizer is not established. {'. '.join(parts)}."


def _clauses(clauses: Sequence[Clause]) -> str:
    return "; ".join(f"{clause.statement} ({clause.figure})" for clause in clauses)
