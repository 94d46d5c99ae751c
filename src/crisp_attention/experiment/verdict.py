"""A contrast -> the sentences a person reads. Four words, and never "no effect"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from crisp_attention.experiment.spec import MAX_SEEDS
from crisp_attention.experiment.statistics import (
    ALPHA,
    EQUIVALENCE_MARGIN,
    MIN_SEEDS,
    Contrast,
    seeds_needed,
)

Word = Literal["helps", "hurts", "equivalent", "inconclusive", "no verdict"]

USUAL_SEEDS = 10
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


def judge(contrast: Contrast | None, arm: str, baseline: str, planned: int) -> Verdict:
    """Put a contrast into words.

    Args:
        contrast: The primary contrast; None if no pair of seeds has finished.
        arm: Name of the arm.
        baseline: Name of what it is compared with.
        planned: Seeds per arm that the experiment asks for.
    """
    if contrast is None:
        return Verdict("no verdict", f"No verdict: no seed has finished both {arm} and {baseline}.", ())
    seeds = f"{contrast.seeds} paired seed{'s' if contrast.seeds > 1 else ''}"
    difference = (
        f"{arm} differs from {baseline} by {contrast.difference:+.2f} points "
        f"({contrast.sentences:+.1f} of {contrast.examples} examples) over {seeds}"
    )
    if contrast.seeds < MIN_SEEDS:
        return Verdict(
            "no verdict",
            f"No verdict: {seeds} {'are' if contrast.seeds > 1 else 'is'} too few.",
            (f"{difference}: an observation, not a finding.", *_what_would(contrast)),
        )
    interval = f"95% interval over seeds and examples {contrast.interval.low:+.2f} to {contrast.interval.high:+.2f}"
    details = [f"{difference}; {interval}.", f"Sign-flip permutation test: p = {contrast.p_value:.3g}."]
    if contrast.seeds < planned:
        details.append(f"Only {contrast.seeds} of {planned} planned pairs have finished.")
    word = _word(contrast)
    if word == "inconclusive" and contrast.detectable:
        details.append(
            f"This design could have detected a difference of {contrast.detectable:.2f} points or more "
            "(paired t test over seeds, 80% power); the data are compatible with "
            f"{contrast.interval.low:+.2f} to {contrast.interval.high:+.2f}."
        )
        details += _seeds_for(contrast)
    if word == "equivalent":
        details.append(
            f"Two one-sided tests place the difference within {EQUIVALENCE_MARGIN:g} points either way "
            f"(p = {contrast.p_equivalence:.3g})."
        )
    headlines = {
        "helps": f"{arm} helps: better than {baseline}.",
        "hurts": f"{arm} hurts: worse than {baseline}.",
        "equivalent": f"{arm} and {baseline} are equivalent to within {EQUIVALENCE_MARGIN:g} points.",
        "inconclusive": f"Inconclusive: these data do not tell {arm} from {baseline}.",
    }
    return Verdict(word, headlines[word], tuple(details))


def _word(contrast: Contrast) -> Word:
    if contrast.p_value < ALPHA and contrast.interval.low > 0:
        return "helps"
    if contrast.p_value < ALPHA and contrast.interval.high < 0:
        return "hurts"
    # TOST knows the spread over seeds only; other sentences must not be able to tell the arms apart either.
    within = contrast.interval.low > -EQUIVALENCE_MARGIN and contrast.interval.high < EQUIVALENCE_MARGIN
    if within and contrast.p_equivalence is not None and contrast.p_equivalence < ALPHA:
        return "equivalent"
    return "inconclusive"


def _what_would(contrast: Contrast) -> tuple[str, ...]:
    floor = 2 / 2**contrast.seeds
    return (
        f"With {contrast.seeds} seed{'s' if contrast.seeds > 1 else ''} the sign-flip test cannot go below "
        f"p = {floor:.3g}, whatever the data, and an interval over so few would be too narrow.",
        f"{MIN_SEEDS} seeds are the least that can carry a verdict, {USUAL_SEEDS} are usual: "
        f"ask for them with --seeds {USUAL_SEEDS}; finished runs are kept.",
    )


def _seeds_for(contrast: Contrast) -> tuple[str, ...]:
    if not contrast.spread:
        return ()
    wanted = seeds_needed(_EFFECT_OF_INTEREST, contrast.spread)
    estimate = (
        f"At the spread seen so far ({contrast.spread:.2f} points a pair) about {wanted} seeds would detect a "
        f"difference of {_EFFECT_OF_INTEREST:g} point with 80% power."
    )
    if wanted > MAX_SEEDS:
        return (f"{estimate} That is out of reach: more examples, or a larger effect, would be needed.",)
    if wanted <= contrast.seeds:
        return ()
    return (f"{estimate} Ask for them with --seeds {wanted}; finished runs are kept.",)
