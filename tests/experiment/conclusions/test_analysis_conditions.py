"""Conditions, further evaluations, planned looks, the placebo, the pattern: what is compared with what."""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np
import pytest
from scipy import stats

from crisp_attention.experiment import statistics
from crisp_attention.experiment.conclusions.analysis import analyse
from crisp_attention.experiment.results.store import Store
from record_builders import ARMS, PLACEBO, fill_runs, finished, make_spec, troubled

SIZES = {"train_examples": [100, 400, 1600]}
CONDITIONS = ("train_examples=100", "train_examples=400", "train_examples=1600")
TYPOS = ({"name": "typos-5", "typos": 0.05}, {"name": "amazon", "source": "amazon-snippets", "test_examples": 30})
TWIN = {"name": "topk-50-to-dense", "sparsity": 0.5, "evaluate": {}}
DROPOUT = {"name": "dropout", "training": {"attention_dropout": 0.3}}
EXAMPLES = 200


def right(run, accuracy, examples=EXAMPLES):
    """Examples are hard or easy for all; which are right is drawn anew for each run."""
    random = np.random.default_rng([run.index, zlib.crc32(f"{run.arm} {run.condition}".encode())])
    return random.random(examples) < accuracy


def accuracy_of(run):
    """The sparse arm gains 20 points with 100 examples and nothing with 1,600."""
    base = {"train_examples=100": 0.6, "train_examples=400": 0.7}.get(run.condition, 0.8)
    gain = {"train_examples=100": 0.2, "train_examples=400": 0.1}.get(run.condition, 0.0)
    return base + (gain if run.arm == "topk-50" else 0.0)


def varied(run):
    record, arrays = finished(run, right(run, accuracy_of(run)))
    for name in run.config.evaluations:
        _, further = finished(run, right(run, accuracy_of(run) - 0.1, 30))
        arrays |= {f"{name}_logits": further["test_logits"], f"{name}_labels": further["test_labels"]}
    return record, arrays


@pytest.fixture(scope="module")
def spec():
    return make_spec(
        seeds=7,
        arms=[*ARMS, PLACEBO],
        vary=SIZES,
        evaluations=TYPOS,
        primary={"arm": "topk-50", "condition": "train_examples=100"},
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory, spec):
    return fill_runs(tmp_path_factory.mktemp("conditions"), spec, varied)


@pytest.fixture(scope="module")
def result(store):
    return analyse(store)


# Conditions


def test_arms_are_those_of_the_primary_condition(result):
    assert result.conditions == CONDITIONS
    assert result.arms == result.by_condition["train_examples=100"]
    for condition, arms in result.by_condition.items():
        assert [arm.name for arm in arms] == ["dense", "topk-50", "percentile-80", "dense-again"]
        assert {arm.condition for arm in arms} == {condition}
        assert {arm.planned for arm in arms} == {7}
    assert len(result.records) == 3 * 4 * 7


def test_every_arm_is_compared_in_every_condition(result, spec):
    assert tuple(result.condition_contrasts) == CONDITIONS
    for condition, found in result.condition_contrasts.items():
        assert [item.arm for item in found] == ["topk-50", "percentile-80", "dense-again"]
        arms = {arm.name: arm for arm in result.by_condition[condition]}
        for item in found:
            expected = arms[item.arm].accuracies - arms["dense"].accuracies
            assert item.differences == pytest.approx(expected)
    assert result.condition_contrasts["train_examples=100"] == result.contrasts


def test_holm_is_over_all_conditions_and_the_primary_contrast_is_not_among_them(result):
    others = [item for found in result.condition_contrasts.values() for item in found if item is not result.primary]
    assert len(others) == 8
    adjusted = statistics.holm(np.array([item.p_value for item in others]))
    assert [item.p_holm for item in others] == adjusted.tolist()
    assert result.primary.p_holm is None


def test_the_last_condition_is_the_primary_one_unless_another_is_named(tmp_path):
    spec = make_spec(seeds=6, vary=SIZES)
    found = analyse(fill_runs(tmp_path, spec, varied))
    assert found.arms == found.by_condition["train_examples=1600"]
    assert "at train_examples=1600" in found.verdict.headline


def test_the_verdict_names_its_condition(result):
    assert result.verdict.word == "helps"
    assert result.verdict.headline == "topk-50 helps: better than dense at train_examples=100."


def test_an_interaction_is_the_trend_of_the_differences(result):
    assert [item.arm for item in result.interactions] == ["topk-50", "percentile-80", "dense-again"]
    found = result.interactions[0]
    differences = np.stack(
        [found_.differences for found_ in (items[0] for items in result.condition_contrasts.values())]
    )
    assert found.differences == pytest.approx(differences.mean(axis=1))
    expected = [stats.linregress(np.log2([100, 400, 1600]), row).slope for row in differences.T]
    assert found.slopes == pytest.approx(expected)
    assert (found.factor, found.seeds, found.examples) == ("train_examples", 7, EXAMPLES)
    adjusted = statistics.holm(np.array([item.p_value for item in result.interactions[1:]]))
    assert [item.p_holm for item in result.interactions] == [None, *adjusted.tolist()]
    assert any("falls with train_examples" in sentence for sentence in result.verdict.details)


def test_an_interaction_has_the_seeds_that_are_complete_everywhere(tmp_path, spec):
    gone = {("topk-50", "train_examples=400", 2), ("dense", "train_examples=1600", 5)}
    found = analyse(
        fill_runs(tmp_path, spec, lambda run: None if (run.arm, run.condition, run.index) in gone else varied(run))
    )
    assert {item.arm: item.seeds for item in found.interactions} == {
        "topk-50": 5,
        "percentile-80": 6,
        "dense-again": 6,
    }
    assert found.primary.seeds == 7
    assert any("2 of 84 runs are not done yet" in caution for caution in found.cautions)
    # Said now, it would be a look that nobody had planned.
    said = [sentence for sentence in found.verdict.details if "train_examples" in sentence and "follow" in sentence]
    assert len(said) == 1
    assert "is not said yet: 5 of 7 planned pairs of seeds are done in every condition" in said[0]


def test_a_trend_says_how_many_seeds_it_rests_on_where_some_were_lost(tmp_path, spec):
    lost = ("topk-50", "train_examples=400", 2)
    found = analyse(
        fill_runs(
            tmp_path,
            spec,
            lambda run: (
                (troubled(run, "diverged"), None) if (run.arm, run.condition, run.index) == lost else varied(run)
            ),
        )
    )
    assert any(
        "falls with train_examples" in sentence and "over the 6 seeds that finished everywhere" in sentence
        for sentence in found.verdict.details
    )


def test_where_nothing_varies_there_is_one_condition_without_a_name(tmp_path):
    found = analyse(fill_runs(tmp_path, make_spec(seeds=6), varied))
    assert found.conditions == ("",)
    assert found.interactions == ()
    assert found.condition_contrasts == {"": found.contrasts}
    assert found.evaluation_contrasts == {}
    assert found.look is None


# Further evaluations


def test_further_evaluations_are_compared_in_the_primary_condition(result, store):
    assert list(result.evaluation_contrasts) == ["typos-5", "amazon"]
    arms = {arm.name: arm for arm in result.arms}
    for name, found in result.evaluation_contrasts.items():
        assert [item.arm for item in found] == ["topk-50", "percentile-80", "dense-again"]
        for item in found:
            sides = [
                np.array(
                    [
                        (arrays[f"{name}_logits"].argmax(axis=1) == arrays[f"{name}_labels"]).mean()
                        for arrays in (store.load_arrays(arms[arm].records[index]) for index in range(7))
                    ]
                )
                for arm in (item.arm, "dense")
            ]
            assert item.differences == pytest.approx(100 * (sides[0] - sides[1]))
            assert (item.seeds, item.examples) == (7, 30)
    every = [item for found in result.evaluation_contrasts.values() for item in found]
    assert [item.p_holm for item in every] == statistics.holm(np.array([item.p_value for item in every])).tolist()


def test_records_without_further_evaluations_give_no_contrast(tmp_path, spec):
    found = analyse(fill_runs(tmp_path, spec, lambda run: finished(run, right(run, 0.8, 24))))
    assert found.evaluation_contrasts == {"typos-5": (), "amazon": ()}


# Two checkpoints, and the placebo


def test_mcnemar_compares_the_two_checkpoints_of_each_seed(result):
    assert [item.index for item in result.mcnemar] == list(range(7))
    for item, difference in zip(result.mcnemar, result.primary.differences, strict=True):
        assert 100 * (item.only_arm - item.only_baseline) / EXAMPLES == pytest.approx(difference)


def test_the_placebo_is_the_contrast_of_identical_arms(result):
    assert result.placebo is next(item for item in result.secondary if item.arm == "dense-again")
    assert not any("placebo" in caution for caution in result.cautions)
    assert any(sentence.startswith("Placebo: dense-again, which is dense") for sentence in result.verdict.details)


def test_a_placebo_that_differs_is_a_caution_that_says_what_it_means(tmp_path):
    spec = make_spec(seeds=6, arms=[*ARMS, PLACEBO])
    found = analyse(
        fill_runs(tmp_path, spec, lambda run: finished(run, right(run, 0.5 if run.arm == "dense-again" else 0.8)))
    )
    assert found.placebo.p_value < 0.05
    (caution,) = [caution for caution in found.cautions if "placebo dense-again differs from dense" in caution]
    assert "although only its seeds are others" in caution
    assert "at one of 20 looks" in caution


def test_without_a_placebo_there_is_none(tmp_path):
    found = analyse(fill_runs(tmp_path, make_spec(seeds=6), varied))
    assert found.placebo is None
    assert any("There is no placebo" in caution for caution in found.cautions)


# Planned looks


def looked_at(tmp_path, complete, looks=(5, 10, 20), gone=()):
    """The first `complete` seeds are done."""
    spec = make_spec(seeds=looks[-1], looks=list(looks), arms=[*ARMS, PLACEBO])

    def some(run):
        if run.index >= complete or (run.arm, run.index) in gone:
            return None
        return finished(run, right(run, 0.95 if run.arm == "topk-50" else 0.6, 60))

    return analyse(fill_runs(tmp_path, spec, some))


def test_before_the_first_look_nothing_is_compared(tmp_path):
    found = looked_at(tmp_path, 4)
    assert (found.look.number, found.primary, found.contrasts, found.outcomes) == (0, None, (), ())
    assert found.verdict.headline == "No verdict: the first planned look is at 5 seeds, 4 are complete."


def test_a_look_at_five_seeds_says_that_it_can_find_nothing(tmp_path):
    found = looked_at(tmp_path, 7)
    assert (found.look.number, found.primary.seeds) == (1, 5)
    assert found.verdict.word == "no verdict"
    told = " ".join(found.verdict.details)
    assert "cannot go below p = 0.0625" in told
    assert "Look 1 of 3, planned at 5, 10, 20 seeds: each tests at p < 0.0167. The next is at 10 seeds." in told
    assert any("2 more pairs of seeds are done than this planned look is at" in item for item in found.cautions)


def test_a_later_look_tests_at_a_third_of_five_percent(tmp_path):
    found = looked_at(tmp_path, 10)
    assert (found.look.number, found.look.seeds) == (2, 10)
    assert {item.alpha for item in found.contrasts} == {0.05 / 3}
    assert found.verdict.word == "helps"
    assert "98.3% interval" in found.verdict.details[0]


def test_only_seeds_without_a_gap_count_towards_a_look(tmp_path):
    assert looked_at(tmp_path, 20, gone={("topk-50", 8)}).look.number == 1
    assert looked_at(tmp_path / "other", 20, gone={("percentile-80", 8)}).look.number == 3


def test_a_run_in_trouble_is_done_and_stays_out(tmp_path):
    spec = make_spec(seeds=10, looks=[5, 10])

    def some(run):
        if (run.arm, run.index) == ("dense", 3):
            return troubled(run, "diverged"), None
        return finished(run, right(run, 0.95 if run.arm == "topk-50" else 0.6, 60))

    found = analyse(fill_runs(tmp_path, spec, some))
    assert (found.look.number, found.primary.seeds) == (2, 9)
    told = "Only 9 of 10 planned pairs have finished; diverged or failed: 0 of topk-50, 1 of dense."
    assert told in found.verdict.details


# The pattern


def regularized(run):
    """The sparse arms remember less of the training examples and generalise better."""
    better = run.arm in ("topk-50", "topk-50-to-dense")
    record, arrays = finished(run, right(run, 0.9 if better else 0.7))
    final = record.final
    train = final.train.model_copy(update={"correct": 185 if better else 198})
    epochs = (*record.epochs[:-1], final.model_copy(update={"train": train}))
    return record.model_copy(update={"epochs": epochs}), arrays


def test_the_whole_pattern_and_help_make_a_regularizer(tmp_path):
    more = {"name": "more-dropout", "training": {"attention_dropout": 0.5}}
    spec = make_spec(seeds=7, arms=[*ARMS, TWIN, DROPOUT, more])
    found = analyse(fill_runs(tmp_path, spec, regularized))
    assert found.pattern.holds is True
    assert found.pattern.train_falls.difference == pytest.approx(-6.5)
    twin = next(arm for arm in found.arms if arm.name == TWIN["name"])
    dropouts = [arm.accuracies for arm in found.arms if arm.name.endswith("dropout")]
    assert found.pattern.dense_keeps.difference == pytest.approx((twin.accuracies - found.arms[0].accuracies).mean())
    assert len(dropouts) == 2
    assert found.pattern.beats_dropout.difference == pytest.approx(
        min((found.arms[1].accuracies - accuracies).mean() for accuracies in dropouts)
    )
    assert found.verdict.details[-1].startswith("topk-50 acts as a regularizer: ")


def test_without_the_arms_that_decide_the_word_regularizer_is_not_given(tmp_path):
    found = analyse(fill_runs(tmp_path, make_spec(seeds=7), regularized))
    assert found.pattern.holds is None
    assert "That topk-50 acts as a regularizer is not established. Not measured: " in found.verdict.details[-1]


def test_a_dense_primary_arm_has_no_pattern(tmp_path):
    spec = make_spec(seeds=6, arms=[*ARMS, DROPOUT], primary={"arm": "dropout"})
    assert analyse(fill_runs(tmp_path, spec, varied)).pattern is None


# What the words are worth


def test_a_broken_arm_hurts(tmp_path):
    """As keeping the worst-scoring pairs does: near chance in every seed."""
    arms = [{"name": "dense"}, {"name": "bottomk-80", "rule": "bottomk", "sparsity": 0.8}, PLACEBO]
    spec = make_spec(seeds=6, arms=arms, primary={"arm": "bottomk-80"})
    found = analyse(
        fill_runs(tmp_path, spec, lambda run: finished(run, right(run, 0.55 if run.arm == "bottomk-80" else 0.8)))
    )
    assert found.verdict.word == "hurts"
    assert found.placebo.p_value > 0.05


def test_one_more_condition_changes_no_other_number(tmp_path, result, spec):
    more = make_spec(
        seeds=7,
        arms=[*ARMS, PLACEBO],
        vary={"train_examples": [100, 400, 1600, 6400]},
        evaluations=TYPOS,
        primary={"arm": "topk-50", "condition": "train_examples=100"},
    )
    found = analyse(fill_runs(tmp_path, more, varied))
    for condition in CONDITIONS:
        for one, two in zip(result.condition_contrasts[condition], found.condition_contrasts[condition], strict=True):
            assert dataclasses.replace(one, p_holm=None) == dataclasses.replace(two, p_holm=None)


def test_going_from_look_to_look_is_no_change_of_mind(tmp_path):
    def grown(folder, looks):
        for seeds in (10, 20):
            spec = make_spec(seeds=seeds, looks=looks, arms=[*ARMS, PLACEBO])
            fill_runs(folder, spec, lambda run: finished(run, right(run, 0.8, 60)))
        return analyse(Store(folder)).cautions

    assert not any("number of seeds was changed" in caution for caution in grown(tmp_path / "planned", [5, 10, 20]))
    assert any("number of seeds was changed" in caution for caution in grown(tmp_path / "unplanned", []))
