from __future__ import annotations

import dataclasses
import functools
import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crisp_attention.experiment.conclusions.pattern import Clause, RegularizerPattern
from crisp_attention.experiment.conclusions.verdict import Verdict, judge
from crisp_attention.experiment.specification.spec import ExperimentSpec
from crisp_attention.experiment.statistics import (
    EQUIVALENCE_EXAMPLES,
    MIN_SEEDS,
    Interval,
    Pair,
    contrasts,
    linear_trends,
    look_at,
    paired,
    seeds_needed,
)
from fragments import words

EXAMPLES = 600


@pytest.fixture(scope="module", autouse=True)
def fewer_resamples():
    """The words are tested here, not the last digit of an interval."""
    with pytest.MonkeyPatch.context() as patch:
        quick = functools.partial(paired.crossed_bootstrap, resamples=2000)
        patch.setattr(paired, "crossed_bootstrap", quick)
        yield


def compare(counts, baseline=300, examples=EXAMPLES, spread_over=True):
    """A contrast whose arm gets `counts` more examples right than the baseline, by seed.

    Args:
        counts: Difference in examples, one a seed.
        baseline: Examples the baseline gets right.
        examples: Of the evaluation split.
        spread_over: The examples that change differ from seed to seed.
    """
    shape = len(counts), examples
    arm, dense = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    dense[:, :baseline] = True
    for seed, count in enumerate(counts):
        arm[seed, : baseline + count] = True
        if spread_over:
            arm[seed], dense[seed] = np.roll(arm[seed], 37 * seed), np.roll(dense[seed], 37 * seed)
    (found,) = contrasts([Pair("topk-50", "dense", arm, dense)], np.random.default_rng(0))
    return found


def text_of(verdict):
    return "\n".join((verdict.headline, *verdict.details))


def verdict_on(counts, planned=None, **settings):
    return judge(compare(counts, **settings), "topk-50", "dense", planned or len(counts))


SPREAD = [4, -6, 8, -5, 3, -4, 7, -3]


@pytest.mark.parametrize(
    ("counts", "word"),
    [
        ([20, 22, 25, 19, 30, 24, 21, 26], "helps"),
        ([20, 22, 25, 19, 30, 24], "helps"),
        ([-20, -22, -25, -19, -30, -24, -21, -26], "hurts"),
        ([0, 1, -1, 0, 0, 1, 0, -1], "equivalent"),
        ([0] * 8, "equivalent"),
        (SPREAD, "inconclusive"),
        ([12, -9, 14, 20, -8, 8, -11, 25], "inconclusive"),
        ([20, 22, 25, 19, 30], "no verdict"),
        ([0] * 5, "no verdict"),
        ([50], "no verdict"),
    ],
)
def test_each_word_where_it_belongs(counts, word):
    found = verdict_on(counts)
    assert found.word == word
    assert word in found.headline.lower()
    assert repr(found).splitlines() == [found.headline, *(f"  {sentence}" for sentence in found.details)]
    assert words(found._repr_html_()) == " ".join((word, found.headline, *found.details))


def test_the_headline_of_a_verdict_is_one_sentence_with_both_names():
    for counts in ([20, 22, 25, 19, 30, 24], [-20, -22, -25, -19, -30, -24], [0] * 8, SPREAD):
        headline = verdict_on(counts).headline
        assert headline.count(".") - len(re.findall(r"\d\.\d", headline)) == 1
        assert "topk-50" in headline
        assert "dense" in headline


def test_significance_alone_is_not_enough_where_other_sentences_could_tell_otherwise():
    """All seeds agree on two examples: p is small, but the interval over examples holds 0."""
    found = compare([2] * 8, spread_over=False)
    assert found.p_value < 0.05
    assert found.interval.low <= 0
    # All seeds agree to the last example, but the interval over examples reaches beyond the margin.
    assert found.p_equivalence == 0.0
    assert found.interval.high > 0.5
    assert judge(found, "topk-50", "dense", 8).word == "inconclusive"


def test_equivalence_needs_both_the_seeds_and_the_examples_to_be_within_the_margin():
    found = dataclasses.replace(compare(SPREAD), p_value=0.5, p_equivalence=0.01, interval=Interval(-0.4, 0.3))
    assert judge(found, "topk-50", "dense", 8).word == "equivalent"
    for changes in ({"p_equivalence": 0.06}, {"interval": Interval(-0.6, 0.3)}, {"interval": Interval(-0.4, 0.5)}):
        assert judge(dataclasses.replace(found, **changes), "topk-50", "dense", 8).word == "inconclusive"


def test_too_few_examples_cannot_show_equivalence_however_alike_the_arms():
    """No resampling knows of kinds of examples that are not there."""
    few, enough = (compare([0] * 8, examples=count) for count in (EQUIVALENCE_EXAMPLES - 1, EQUIVALENCE_EXAMPLES))
    assert few.interval == enough.interval == Interval(0.0, 0.0)
    assert judge(enough, "topk-50", "dense", 8).word == "equivalent"
    verdict = judge(few, "topk-50", "dense", 8)
    assert verdict.word == "inconclusive"
    assert "599 examples are too few to call the arms equivalent" in text_of(verdict)
    assert "too few to call" not in text_of(judge(compare(SPREAD, examples=500), "topk-50", "dense", 8))


@pytest.mark.parametrize(
    ("counts", "word", "favoured", "sentence"),
    [
        (1, "helps", (4, 0), "topk-50 is better than dense where both finish, and more runs of topk-50 do not"),
        (-1, "hurts", (0, 4), "topk-50 is worse than dense where both finish, and more runs of dense do not"),
        (0, "equivalent", (1, 0), "these data do not tell topk-50 from dense"),
        (0, "equivalent", (0, 1), "these data do not tell topk-50 from dense"),
    ],
)
def test_no_verdict_lives_on_runs_that_the_other_side_lost(counts, word, favoured, sentence):
    """Means are over runs that finish, which favours an arm whose bad runs do not."""
    found = compare([counts * size for size in (20, 22, 25, 19, 30, 24)])
    one_sided = judge(found, "topk-50", "dense", 10, troubled=favoured)
    assert one_sided.word == "inconclusive"
    assert one_sided.headline == f"Inconclusive: {sentence}."
    assert ("is not said where one of the two lost more runs" in text_of(one_sided)) == (not counts)
    lost = f"6 of 10 planned pairs have finished; diverged or failed: {favoured[0]} of topk-50, {favoured[1]} of dense."
    assert lost in text_of(one_sided)
    for troubled in ((0, 0), (2, 2), *((favoured[::-1],) if counts else ())):
        assert judge(found, "topk-50", "dense", 10, troubled=troubled).word == word


def test_what_seeds_alone_show_is_told_as_that():
    found = dataclasses.replace(compare([-6, -2, -4, -3, -5, -1, -2, -8]), p_value=0.008, interval=Interval(-1.6, 0.2))
    headline = judge(found, "topk-50", "dense", 8).headline
    assert headline == "Inconclusive: topk-50 is worse than dense on these examples, which is not shown for others."


def test_an_interval_alone_is_not_enough_either():
    found = dataclasses.replace(compare([20, 22, 25, 19, 30, 24, 21, 26]), p_value=0.06, p_equivalence=0.9)
    assert found.interval.low > 0
    assert judge(found, "topk-50", "dense", 8).word == "inconclusive"


def test_helps_and_hurts_are_not_mixed_up_when_the_arms_are_swapped():
    better = compare([20, 22, 25, 19, 30, 24, 21, 26])
    worse = compare([-20, -22, -25, -19, -30, -24, -21, -26])
    assert not any("to explore" in detail for detail in judge(better, "topk-50", "dense", 8).details)
    assert "to explore" in judge(better, "topk-50", "dense", 8, explored=True).details[-1]
    assert judge(better, "topk-50", "dense", 8).headline == "topk-50 helps: better than dense."
    assert judge(worse, "topk-50", "dense", 8).headline == "topk-50 hurts: worse than dense."


def test_without_a_finished_pair_there_is_no_verdict():
    found = judge(None, "topk-50", "dense", 10)
    assert found == Verdict("no verdict", "No verdict: no seed has finished both topk-50 and dense.", ())


@settings(max_examples=25)
@given(counts=st.lists(st.integers(-20, 20), min_size=1, max_size=9), planned=st.integers(1, 20))
def test_what_holds_of_every_verdict(counts, planned):
    found = compare(counts, examples=50, baseline=25)
    verdict = judge(found, "topk-50", "dense", planned)
    told = text_of(verdict)
    assert "no effect" not in told.lower()
    assert "no difference" not in told.lower()
    assert "significant" not in told.lower()
    assert (verdict.word == "no verdict") == (len(counts) < MIN_SEEDS)
    assert re.search(rf"\b{len(counts)} paired seeds?\b", told)
    assert "of 50 examples" in told
    assert f"{found.difference:+.2f} points" in told
    shown = f"{found.interval.low:+.2f} to {found.interval.high:+.2f}" in told
    assert shown == (len(counts) >= MIN_SEEDS)  # a bootstrap over fewer seeds is too narrow
    assert "nan" not in told
    assert not re.search(r"\b1 seeds\b", told)
    if len(counts) >= MIN_SEEDS:
        assert f"p = {found.p_value:.3g}" in told
        assert (f"Only {len(counts)} of {planned} planned pairs have finished." in told) == (len(counts) < planned)


@pytest.mark.parametrize("seeds", range(1, MIN_SEEDS))
def test_below_six_seeds_there_is_never_a_verdict_and_it_says_why(seeds):
    for counts in ([40] * seeds, [-40] * seeds, [0] * seeds, [30 + 3 * seed for seed in range(seeds)]):
        verdict = verdict_on(counts, examples=100, baseline=50)
        assert verdict.word == "no verdict"
        assert verdict.headline.startswith("No verdict: ")
        assert not re.search(r"\b(helps|hurts|equivalent|better|worse)\b", text_of(verdict))
        assert f"cannot go below p = {2 / 2**seeds:.3g}" in text_of(verdict)
        assert f"{MIN_SEEDS} seeds are the least that can carry a verdict, 10 are usual" in text_of(verdict)
        assert advised(verdict) == [10]
        assert "finished runs are kept" in text_of(verdict)


def test_inconclusive_says_what_could_have_been_detected_and_what_remains_possible():
    found = compare(SPREAD)
    told = text_of(judge(found, "topk-50", "dense", 8))
    assert f"could have detected a difference of {found.detectable:.2f} points or more (paired t test" in told
    assert f"compatible with {found.interval.low:+.2f} to {found.interval.high:+.2f}" in told


def test_equivalent_states_its_margin_and_its_p():
    found = compare([0, 1, -1, 0, 0, 1, 0, -1])
    told = text_of(judge(found, "topk-50", "dense", 8))
    assert "equivalent to within 0.5 points" in told
    assert f"within 0.5 points either way (p = {found.p_equivalence:.3g})" in told


def advised(verdict):
    found = re.findall(r"--seeds (\d+)", text_of(verdict))
    return [int(number) for number in found]


def test_an_inconclusive_result_says_how_many_seeds_would_do_and_does_not_ask_for_them():
    """Seeds that are added once the result is known are a look that was not planned."""
    found = compare([4, -6, 8, -3, 5, -7])
    verdict = judge(found, "topk-50", "dense", 6)
    assert verdict.word == "inconclusive"
    needed = seeds_needed(1.0, found.spread)
    assert needed > 6
    assert f"about {needed} seeds would detect a difference of 1 point with 80% power" in text_of(verdict)
    assert "a study of their own: these seeds have been looked at" in text_of(verdict)
    assert advised(verdict) == []


def test_where_enough_seeds_were_planned_and_lost_no_more_are_asked_for():
    verdict = judge(compare([40, 41, 42]), "topk-50", "dense", 10, troubled=(7, 0))
    assert verdict.word == "no verdict"
    assert advised(verdict) == []


def test_without_a_spread_no_number_of_seeds_is_made_up():
    assert advised(verdict_on([1] * 6, spread_over=False)) == []


def estimated(verdict):
    found = re.search(r"about (\d+) seeds would detect", text_of(verdict))
    return found and int(found[1])


def test_fewer_seeds_than_there_are_are_never_called_for():
    counts = [1, 5, -2, 4, -1, 6, 0, 5, -3, 4]
    found = verdict_on(counts)
    assert found.word == "inconclusive"
    assert estimated(found) is None
    assert estimated(verdict_on([3 * count for count in counts])) > len(counts)


def test_more_seeds_than_an_experiment_may_have_are_out_of_reach():
    most = next(item.le for item in ExperimentSpec.model_fields["seeds"].metadata if hasattr(item, "le"))
    verdict = verdict_on([9, -8, 4, -9, 8, -5], examples=20, baseline=10)
    assert estimated(verdict) > most
    assert "That is out of reach" in text_of(verdict)


def test_two_seeds_that_nearly_agree_can_be_put_into_words():
    """Differences of 35 and 36 examples of 400, a spread of 0.18 points."""
    assert verdict_on([35, 36], examples=400).word == "no verdict"


@pytest.mark.parametrize("seeds", [3, 10])
def test_any_spread_can_be_put_into_words(seeds):
    found = compare([0, 1, -1] if seeds == 3 else [*SPREAD, 2, -1])
    for spread in (0.05, 0.11, 0.12, 0.13, 0.15, 0.16, 1 / 6, 0.18, 0.2, 0.5, 3.0, 20.0):
        changed = dataclasses.replace(found, spread=spread, p_value=0.5, p_equivalence=0.5)
        assert judge(changed, "topk-50", "dense", seeds).word == ("no verdict" if seeds == 3 else "inconclusive")


def test_inconclusive_says_what_a_verdict_would_have_taken():
    found = compare(SPREAD)
    told = text_of(judge(found, "topk-50", "dense", 8))
    assert found.detectable_verdict > found.detectable
    assert f"to hold for other examples too, takes {found.detectable_verdict:.2f} or more" in told


# What stands beside the contrast

BETTER = [20, 22, 25, 19, 30, 24, 21, 26]


def told_with(counts=BETTER, **beside):
    return text_of(judge(compare(counts), "topk-50", "dense", len(counts), **beside))


def test_every_headline_names_its_condition():
    for counts in (BETTER, [-count for count in BETTER], SPREAD, [0, 1, -1, 0, 0, 1, 0, -1]):
        verdict = judge(compare(counts), "topk-50", "dense", 8, condition="label_noise=0.4")
        assert verdict.headline.endswith(" at label_noise=0.4.")
        assert "paired seeds at label_noise=0.4" in verdict.details[0]
    nothing = judge(None, "topk-50", "dense", 8, condition="label_noise=0.4")
    assert nothing.headline == "No verdict: no seed has finished both topk-50 and dense at label_noise=0.4."


@pytest.mark.parametrize(("complete", "number"), [(10, 2), (20, 3)])
def test_a_look_says_which_it_is_and_what_it_costs(complete, number):
    told = told_with(look=look_at((5, 10, 20), complete))
    assert f"Look {number} of 3, planned at 5, 10, 20 seeds: each tests at p < 0.0167." in told
    assert ("The next is at 20 seeds." in told) == (number == 2)


def test_what_five_percent_finds_a_look_may_not():
    """Seven of eight seeds agree: p lies between a third of 5% and 5%."""
    counts = [20, 22, 25, 19, -6, 24, 21, 26]
    tables = []
    for alpha in (0.05, 0.05 / 3):
        found = dataclasses.replace(compare(counts), p_value=0.03, interval=Interval(0.5, 4.0), alpha=alpha)
        tables.append(judge(found, "topk-50", "dense", 8).word)
    assert tables == ["helps", "inconclusive"]


def test_six_seeds_carry_no_verdict_at_a_stricter_level():
    found = dataclasses.replace(compare([20, 22, 25, 19, 30, 24]), alpha=0.05 / 3)
    verdict = judge(found, "topk-50", "dense", 6, look=look_at((6, 12, 18), 6))
    assert verdict.word == "no verdict"
    assert "cannot go below p = 0.0312" in text_of(verdict)
    assert "The next is at 12 seeds." in text_of(verdict)
    assert advised(verdict) == []


def test_planned_looks_are_not_talked_out_of_their_plan():
    found = compare(SPREAD)
    verdict = judge(found, "topk-50", "dense", 8, look=look_at((8, 16), 8))
    assert verdict.word == "inconclusive"
    assert "--seeds" not in text_of(verdict)


def test_the_placebo_is_told_either_way():
    same = dataclasses.replace(compare(SPREAD), arm="again")
    told = told_with(placebo=same)
    assert f"Placebo: again, which is dense with other seeds, differs from it by {same.difference:+.2f} points" in told
    assert f"(p = {same.p_value:.3g}): identical arms are not told apart, as it should be." in told
    other = dataclasses.replace(compare(BETTER), arm="again")
    assert "identical arms should not, so read the verdict with the caution below." in told_with(placebo=other)


def test_a_placebo_that_moves_as_far_as_what_was_shown_reassures_nobody():
    gain = compare(BETTER).difference
    far, near = (
        dataclasses.replace(compare(SPREAD), arm="again", difference=difference, p_value=0.3)
        for difference in (-gain, gain - 0.1)
    )
    told = told_with(placebo=far)
    assert "not told apart, yet as far apart as the two arms that are. Seeds alone make such differences." in told
    assert "as it should be" not in told
    assert "as it should be" in told_with(placebo=near)
    seeds_only = dataclasses.replace(compare(BETTER), interval=Interval(-0.1, 7.0))
    assert "Seeds alone make such differences." in text_of(judge(seeds_only, "topk-50", "dense", 8, placebo=far))
    # Beside arms that are not told apart either, it says nothing.
    assert "as it should be" in told_with(SPREAD, placebo=far)
    few = dataclasses.replace(far, seeds=MIN_SEEDS - 1)
    assert "too few pairs to tell even different arms apart." in told_with(placebo=few)


def trend_of(by_seed, examples=50):
    """Of differences by seed and condition, as numbers of the 50 examples, or as a table of them `[K, S, N]`."""
    counts = np.asarray(by_seed)
    if counts.ndim == 2:
        counts = (np.arange(examples) < counts.T[:, :, None]).astype(np.int8)
    conditions = {"a": 100.0, "b": 400.0, "c": 1600.0}
    (found,) = linear_trends({"topk-50": counts}, "dense", "train_examples", conditions, np.random.default_rng(0))
    return found


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([[20, 10, 0]] * 8, "The difference falls with train_examples: -10.00 points per doubling"),
        ([[0, 10, 20]] * 8, "The difference rises with train_examples: +10.00 points per doubling"),
        ([[4, 2, 0], [0, 2, 4]] * 4, "These data do not show that the difference follows train_examples: +0.00 points"),
        (
            [[4, 2, 0]] * 5,
            "5 seeds cannot tell whether the difference follows train_examples: +8.00 points at a, +4.00",
        ),
        (
            [[1, 0, 0]] * 8,
            "On these examples the difference falls with train_examples, which is not shown for others: -0.50 points",
        ),
    ],
)
def test_an_interaction_is_a_sentence(rows, sentence):
    assert sentence in told_with(interaction=trend_of(rows)).replace("-0.00", "+0.00")


def test_an_interaction_has_its_interval():
    found = trend_of([[20, 10, 0]] * 8)
    within = f"interval over seeds and examples {found.interval.low:+.2f} to {found.interval.high:+.2f})"
    assert f"(p = 0.00781; 95% {within}; +40.00 points at a, +20.00 at b, +0.00 at c." in told_with(interaction=found)


def pattern_of(*answers):
    clauses = [Clause(f"clause {place}", answer, 1.0, f"figure {place}") for place, answer in enumerate(answers)]
    return RegularizerPattern("topk-50", *clauses)


def test_a_regularizer_is_one_only_when_all_clauses_hold_and_it_helps():
    whole = pattern_of(True, True, True, True)
    assert "topk-50 acts as a regularizer: clause 0 (figure 0); clause 1 (figure 1); clause 2" in told_with(
        pattern=whole
    )
    for counts in (SPREAD, [-count for count in BETTER]):
        told = told_with(counts, pattern=whole)
        assert "acts as a regularizer" not in told
        assert "topk-50 shows a regularizer's pattern, but that it helps is not shown" in told


@pytest.mark.parametrize("answers", itertools.product([True, False, None], repeat=4))
def test_a_clause_that_fails_or_is_open_is_named(answers):
    told = told_with(pattern=pattern_of(*answers))
    assert ("topk-50 acts as a regularizer: " in told) == (answers == (True,) * 4)
    if answers != (True,) * 4:
        assert "That topk-50 acts as a regularizer is not established." in told
        for label, answer in (("Not shown", False), ("Not measured", None)):
            named = [place for place in range(4) if answers[place] is answer]
            listed = "; ".join(f"clause {place} (figure {place})" for place in named)
            assert (f"{label}: {listed}." in told) if named else (label not in told)


def test_without_a_verdict_nothing_beside_it_is_claimed():
    placebo = dataclasses.replace(compare(BETTER), arm="again")
    told = told_with(BETTER[:4], placebo=placebo, pattern=pattern_of(True, True, True, True))
    assert "Placebo" not in told
    assert "regularizer" not in told
