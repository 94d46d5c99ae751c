from __future__ import annotations

import numpy as np
import pytest

from crisp_attention.errors import RecordError
from crisp_attention.experiment.conclusions.analysis import analyse
from crisp_attention.experiment.results.record import SURER
from crisp_attention.experiment.results.store import Store
from record_builders import (
    ARMS,
    PLACEBO,
    PRINTS,
    draws,
    fill,
    fill_runs,
    fill_tuned,
    finished,
    made_up_tuning,
    make_spec,
    only,
    planned,
    provenance,
    troubled,
)

EVEN = draws({"dense": 0.8, "topk-50": 0.85, "percentile-80": 0.5, "dense-again": 0.8})


def has(cautions, *words):
    return [caution for caution in cautions if all(word in caution for word in words)]


def test_a_complete_experiment_with_a_placebo_needs_no_caution(tmp_path):
    assert analyse(fill(tmp_path, make_spec(arms=[*ARMS, PLACEBO]), EVEN)).cautions == ()


LABELS = (np.arange(90) % 3 == 0).astype(np.int64)
"""Two thirds are of the first class."""


def answering(answers):
    """Made-up runs that answer by arm and seed."""

    def result(run):
        given = answers(run.arm, run.index)
        record, arrays = finished(run, given == LABELS)
        return record, arrays | {"test_labels": LABELS, "test_logits": 4 * np.eye(2, dtype=np.float32)[given]}

    return result


@pytest.mark.parametrize(
    ("answers", "balanced"),
    [
        (lambda arm, index: np.zeros_like(LABELS), "50.0%"),
        # Three in five of either class, which is less than the two thirds of the first.
        (lambda arm, index: np.where((np.arange(90) // 3 + index) % 5 < 3, LABELS, 1 - LABELS), "60.0%"),
    ],
    ids=["the same answer to all", "better than chance in both classes"],
)
def test_accuracy_by_class_tells_little_learned_from_nothing(tmp_path, answers, balanced):
    """Where a model that names one class is right more often, another may still tell them apart."""
    spec = make_spec()
    result = analyse(fill_runs(tmp_path, spec, answering(answers)))
    runs = f"{spec.seeds} of {spec.seeds} runs of"
    (caution,) = has(result.cautions, "naming the most frequent class each time would (66.7%)")
    assert caution.startswith(f"{runs} topk-50 and {runs} dense classify no more examples correctly")
    assert f"by class is {balanced}; 50.0% is what a model has that learned nothing." in caution


def test_single_runs_that_learned_nothing_are_counted(tmp_path):
    """A mean over seeds hides them."""
    lost = {("dense", 1), ("topk-50", 1), ("topk-50", 2)}
    spec = make_spec()
    found = answering(lambda arm, index: 0 * LABELS if (arm, index) in lost else LABELS)
    (caution,) = has(analyse(fill_runs(tmp_path, spec, found)).cautions, "most frequent class")
    assert caution.startswith(f"2 of {spec.seeds} runs of topk-50 and 1 of {spec.seeds} runs of dense classify no more")


def test_where_all_runs_learned_nothing_of_it_is_said(tmp_path):
    assert not has(analyse(fill(tmp_path, make_spec(), EVEN)).cautions, "most frequent class")


def test_a_missing_placebo_is_told(tmp_path):
    assert has(analyse(fill(tmp_path, make_spec(), EVEN)).cautions, "no placebo", "how far identical arms differ")


@pytest.mark.parametrize(
    "other",
    [
        {"name": "other", "seed_offset": 1000, "sparsity": 0.2},
        {"name": "other", "seed_offset": 1000, "padding": "max_length"},
        {"name": "other", "seed_offset": 1},
    ],
    ids=["other sparsity", "other padding", "all seeds but one the same"],
)
def test_only_the_baseline_with_other_seeds_is_a_placebo(tmp_path, other):
    result = analyse(fill(tmp_path, make_spec(arms=[*ARMS[:2], other], seeds=3), EVEN))
    assert has(result.cautions, "no placebo")


def test_runs_in_trouble_and_runs_not_done_are_told_in_numbers(tmp_path):
    outcome = only(EVEN, dense={1: "failed"}, topk_50={2: "diverged", 4: None}, percentile_80={0: None, 1: None})
    result = analyse(fill(tmp_path, make_spec(), outcome))
    assert has(result.cautions, "2 runs diverged or failed", "left out of all means")
    assert has(result.cautions, "3 of 24 runs are not done yet")


def test_random_masks_are_told_to_be_the_same_at_every_seed(tmp_path):
    arms = [*ARMS[:2], {"name": "random-50", "sparsity": 0.5, "rule": "random"}]
    assert has(analyse(fill(tmp_path / "always", make_spec(arms=arms), EVEN)).cautions, "every seed (random-50)")
    # In training each step and example has a draw of its own.
    arms[-1]["apply"] = "train"
    assert not has(analyse(fill(tmp_path / "train", make_spec(arms=arms), EVEN)).cautions, "every seed")


def test_a_changed_number_of_seeds_is_told(tmp_path):
    store = fill(tmp_path, make_spec(seeds=6), EVEN)
    assert not has(analyse(store).cautions, "seeds was changed")
    store = fill(tmp_path, make_spec(seeds=8), EVEN)
    result = analyse(store)
    assert has(result.cautions, "number of seeds was changed (6 then 8)", "p-values")
    assert result.seeds_asked == (6, 8)
    assert result.primary.seeds == 8


def test_seeds_that_were_asked_for_elsewhere_count_where_the_runs_are_taken_over(tmp_path):
    """A look at six seeds stays one if the study goes on in another directory."""
    fill(tmp_path / "first", make_spec(seeds=6), EVEN)
    source, store = Store(tmp_path / "first"), Store(tmp_path / "second")
    for _ in range(2):  # a run that is taken up again adds nothing
        store.open(make_spec(seeds=8), PRINTS, source)
        assert store.study()[2] == [6, 8]
    other = Store(tmp_path / "other")
    other.open(make_spec(seeds=8, arms=ARMS[:2]), PRINTS, source)
    assert other.study()[2] == [8]


def test_what_a_search_found_elsewhere_stands_where_its_runs_are_taken_over(tmp_path):
    """Searched anew it would be another choice, made when results can be seen."""
    spec = make_spec(tune=TUNE, arms=[*ARMS, PLACEBO])
    source = fill_tuned(tmp_path / "first", spec)
    store = Store(tmp_path / "second")
    store.open(spec, PRINTS, source)
    assert store.tuning(spec) == source.tuning(spec)
    # Of another number of trials nothing can stand; one that has its own asks for no other.
    more = make_spec(tune=TUNE | {"trials": TUNE["trials"] + 1}, arms=[*ARMS, PLACEBO])
    with pytest.raises(RecordError, match=r"choose anew when results can be seen\. Leave it out"):
        source.tuning(more, "Leave it out")
    own = fill_tuned(tmp_path / "own", more)
    own.open(more, PRINTS, source)
    assert own.tuning(more).trials == more.tune.trials
    other = Store(tmp_path / "other")
    other.open(make_spec(tune=TUNE, arms=ARMS), PRINTS, source)
    assert other.tuning(make_spec(tune=TUNE, arms=ARMS)) is None


def test_growing_from_too_few_seeds_is_no_look(tmp_path):
    fill(tmp_path, make_spec(seeds=5), EVEN)
    result = analyse(fill(tmp_path, make_spec(seeds=8), EVEN))
    assert result.seeds_asked == (5, 8)
    assert not has(result.cautions, "seeds was changed")


@pytest.mark.parametrize("change", [{"threads": 2}, {"device": "cuda:0"}, {"packages": {"torch": "9.9"}}])
def test_runs_of_different_environments_are_told(tmp_path, change):
    spec = make_spec(seeds=2)
    store = fill(tmp_path, spec, EVEN)
    assert not has(analyse(store).cautions, "different package versions")
    run = planned(spec)["dense", 1]
    made = finished(run, EVEN("dense", 1), provenance=provenance(**change))
    store.save(*made, before=store.load(run.config.run_id))
    assert has(analyse(store).cautions, "different package versions, threads, processes or devices")


def test_a_failed_run_is_no_other_environment(tmp_path):
    """A worker that fails writes "unknown" for the device: it never came to know it."""
    spec = make_spec()
    store = fill(tmp_path, spec, EVEN)
    run = planned(spec)["dense", 4]
    failed = troubled(run, "failed", provenance=provenance(device="unknown"))
    store.save(failed, None, before=store.load(run.config.run_id))
    cautions = analyse(store).cautions
    assert has(cautions, "diverged or failed")
    assert not has(cautions, "different package versions")


TUNE = {
    "trials": 3,
    "learning_rate": {"low": 1e-5, "high": 1e-3},
    "attention_dropout": [0.0, 0.1],
    "sparsity": [0.25, 0.625],
}


def found_for_dense(folder, values):
    """The analysis of a study in which the search found other values for the dense arm than for the sparse ones."""
    spec = make_spec(tune=TUNE, arms=[*ARMS, PLACEBO])
    same = made_up_tuning(spec)
    dense, *others = same.outcomes
    first, second, *rest = dense.trials
    better = second.model_copy(update={"values": second.values | values})
    other = dense.model_copy(update={"trials": (first, better, *rest)})
    return analyse(fill_tuned(folder, spec, same.model_copy(update={"outcomes": (other, *others)})))


def test_settings_found_for_one_arm_and_not_for_the_other_are_told_with_what_it_means(tmp_path):
    """A search is one draw, which no number of seeds averages out."""
    found = found_for_dense(tmp_path, {"learning_rate": 2.5e-4})
    told = has(found.cautions, "for topk-50 (learning_rate 0.001)", "for dense (learning_rate 0.00025)")
    assert has(told, "luck of one search", "trains both arms at both")


def test_learning_rates_that_no_search_tells_apart_and_equal_settings_need_no_word(tmp_path):
    for number, rate in enumerate((1e-3, 0.91e-3)):
        cautions = found_for_dense(tmp_path / str(number), {"learning_rate": rate}).cautions
        assert not has(cautions, "other settings")
    assert has(found_for_dense(tmp_path / "far", {"learning_rate": 0.89e-3}).cautions, "other settings")
    dropout = found_for_dense(tmp_path / "dropout", {"attention_dropout": 0.0})
    assert has(dropout.cautions, "for topk-50 (attention_dropout 0.1) than for dense (attention_dropout 0)")


@pytest.mark.parametrize(
    ("dense", "sparse", "told"),
    [
        (None, None, None),
        ([], None, "attention_dropout, learning_rate, sparsity for topk-50 and nothing for dense"),
        (["learning_rate"], None, "attention_dropout, learning_rate, sparsity for topk-50 and learning_rate for dense"),
        ([], ["sparsity"], "sparsity for topk-50 and nothing for dense"),
        # How sparse it is belongs to the arm.
        (["learning_rate"], ["learning_rate", "sparsity"], None),
    ],
)
def test_arms_for_which_other_settings_of_training_are_searched_are_not_tuned_alike(tmp_path, dense, sparse, told):
    given = ({} if tune is None else {"tune": tune} for tune in (dense, sparse))
    arms = [arm | own for arm, own in zip(ARMS[:2], given, strict=True)]
    keys = "trials", "learning_rate", "attention_dropout", "sparsity"
    spec = make_spec(tune={key: TUNE[key] for key in keys}, arms=[*arms, *ARMS[2:], PLACEBO])
    found = has(analyse(fill_tuned(tmp_path, spec)).cautions, "not tuned alike")
    assert bool(found) == (told is not None)
    assert told is None or told in found[0]


def test_arms_that_differ_in_more_than_attention_are_told(tmp_path):
    arms = [ARMS[0], ARMS[1] | {"training": {"weight_decay": 0.3}}, *ARMS[2:]]
    assert has(
        analyse(fill(tmp_path / "two", make_spec(arms=arms), EVEN)).cautions, "more than attention (weight_decay)"
    )
    # Where only training differs, that is what is asked.
    arms = [ARMS[0], ARMS[0] | {"name": "topk-50", "training": {"weight_decay": 0.3}}, *ARMS[2:]]
    assert not has(analyse(fill(tmp_path / "one", make_spec(arms=arms), EVEN)).cautions, "more than attention")


def test_a_setting_that_only_one_arm_has_is_no_other_setting(tmp_path):
    arms = [ARMS[0] | {"tune": ["learning_rate"]}, ARMS[1] | {"tune": ["learning_rate", "sparsity"]}, PLACEBO]
    spec = make_spec(tune={key: TUNE[key] for key in ("trials", "learning_rate", "sparsity")}, arms=arms)
    assert not has(analyse(fill_tuned(tmp_path, spec)).cautions, "other settings")


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"padding": "max_length"}, "padding"),
        ({"seed_offset": 3}, "seed_offset"),
        ({"sparsity": 0.0, "evaluate": {"sparsity": 0.5}, "training": {"learning_rate": 1e-3}}, "learning_rate"),
    ],
)
def test_whatever_else_two_arms_differ_in_is_named(tmp_path, own, told):
    arms = [ARMS[0], ARMS[1] | own, PLACEBO]
    found = analyse(fill(tmp_path, make_spec(arms=arms), EVEN)).cautions
    assert has(found, "differ in more than attention", f"({told})")


@pytest.mark.parametrize("beside_the_verdict", [True, False])
def test_many_repeats_among_the_evaluation_examples_stand_beside_the_verdict(tmp_path, beside_the_verdict):
    note = "40 of 400 evaluation texts repeat another one." + f" {SURER}" * beside_the_verdict
    store = fill(
        tmp_path, make_spec(arms=[*ARMS, PLACEBO]), EVEN, provenance=provenance(data_notes=("Another note.", note))
    )
    assert analyse(store).cautions == ((note,) if beside_the_verdict else ())


def test_a_contrast_named_after_its_runs_were_there_says_so(tmp_path):
    spec = make_spec(arms=[*ARMS, PLACEBO])
    store, other = fill(tmp_path / "one", spec, EVEN), fill(tmp_path / "other", make_spec(name="earlier"), EVEN)
    own = [run.config.run_id for name in ("dense", "topk-50") for (arm, _), run in planned(spec).items() if arm == name]
    store.note_taken_over(own[:8], other)
    assert analyse(store).cautions == ()  # by the baseline alone no contrast could be chosen
    store.note_taken_over(own[:10], other)
    assert has(analyse(store).cautions, "10 of 16 runs of the primary contrast", "another study (earlier)")
    store.open(spec, PRINTS)
    assert len(store.taken_over()) == 10
