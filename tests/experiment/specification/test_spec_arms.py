"""Arms as a specification writes them, what varies and what else is evaluated."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import model_settings
from crisp_attention import ConfigurationError, SparsityConfig
from crisp_attention.experiment.specification.runs import Fingerprints, expand
from crisp_attention.experiment.specification.sections import ArmSpec, TrainingSpec
from crisp_attention.experiment.specification.spec import parse, to_plain
from record_builders import MODEL, PRINTS, ids_of, make_spec

# Arms


def test_an_arm_without_settings_is_dense():
    arm = ArmSpec.model_validate({"name": "x"})
    assert arm.attention == SparsityConfig(sparsity=0.0)
    assert not arm.attention.active(training=True)
    assert not arm.attention.active(training=False)


@pytest.mark.parametrize("settings", [{"rule": "percentile"}, {"min_keep": 2}, {"apply": "train", "rule": "topk"}])
def test_an_arm_with_settings_must_say_how_sparse(settings):
    names = ", ".join(sorted(settings))
    with pytest.raises(ConfigurationError, match=rf"an arm that sets {names} must set sparsity too"):
        make_spec(arms=[{"name": "dense"}, {"name": "topk-50", **settings}])


@pytest.mark.parametrize("looks", [[5, 10], [10, 5, 8], [8, 8]], ids=["without seeds", "falling", "twice"])
def test_planned_looks_rise_and_hold_the_number_of_seeds(looks):
    with pytest.raises(ConfigurationError, match="looks must rise, and seeds = 8 be one of them"):
        make_spec(seeds=8, looks=looks)
    assert make_spec(seeds=8, looks=[5, 8, 20]).looks == (5, 8, 20)


def test_arms_can_be_found_by_name():
    spec = make_spec()
    assert spec.arm("percentile-80") is spec.arms[2]


@st.composite
def arms(draw, name="arm"):
    """An arm as a file holds it: of any rule, dense, or with nothing said at all."""
    arm = {"name": name, "seed_offset": draw(st.integers(0, 2000))}
    arm |= draw(st.just({}) | st.just({"sparsity": 0.0, "rule": "percentile"}) | model_settings() | model_settings())
    padding = draw(st.sampled_from([None, "longest", "max_length"]))
    return arm if padding is None else {**arm, "padding": padding}


@given(
    first=arms("first"),
    second=arms("second"),
    seeds=st.integers(1, 1000),
    description=st.text(),
    choices=st.lists(st.text(), max_size=3),
    rate=st.floats(1e-9, 10),
    examples=st.none() | st.integers(1, 10**6),
)
def test_round_trips_through_json(first, second, seeds, description, choices, rate, examples):
    second |= {"seed_offset": first.get("seed_offset", 0) + 1}  # never the same arm twice
    spec = make_spec(
        arms=[first, second],
        primary={"arm": "second", "baseline": "first"},
        seeds=seeds,
        description=description,
        choices=choices,
        training={"learning_rate": rate},
        data={"source": "x.csv", "train_examples": examples},
    )
    assert parse(json.loads(json.dumps(to_plain(spec))), "again") == spec


@given(arm=arms())
def test_an_arm_written_as_toml_reads_back_as_itself(arm):
    arm = ArmSpec.model_validate(arm)
    assert ArmSpec.model_validate(arm.to_toml_dict()) == arm


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        ({"sparsity": 0.5, "rule": "topk", "min_keep": 1, "seed_offset": 0}, {"sparsity": 0.5}),
        ({"rule": "nm", "sparsity": 0.5, "m": 4}, {"rule": "nm", "sparsity": 0.5}),
        ({"rule": "drop_topk", "drop": 1, "keep_first": 2}, {"rule": "drop_topk", "drop": 1, "keep_first": 2}),
        ({"rule": "sparsemax", "apply": "always"}, {"rule": "sparsemax"}),
        ({"rule": "window", "window": 3}, {"rule": "window", "window": 3}),
        ({"layer_sparsity": [0.5, 0.0]}, {"layer_sparsity": [0.5, 0.0]}),
        ({"sparsity": 0.0}, {}),
    ],
)
def test_an_arm_is_written_with_its_strength_and_without_its_defaults(settings, written):
    assert ArmSpec.model_validate({"name": "x", **settings}).to_toml_dict() == {"name": "x", **written}


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"rule": "drop_topk"}, "rule must set drop too"),
        ({"rule": "window", "stride": 2}, "rule, stride must set sparsity or window too"),
        ({"rule": "top_p"}, "rule must set p too"),
        ({"rule": ["topk"]}, r"Unknown rule \['topk'\]"),
    ],
)
def test_an_arm_of_another_strength_must_say_that(settings, wanted):
    with pytest.raises(ConfigurationError, match=wanted):
        make_spec(arms=[{"name": "dense"}, {"name": "topk-50", **settings}])


# What an arm does otherwise, what varies, what else is evaluated


def test_an_arm_may_be_trained_otherwise():
    arms = [
        {"name": "dense"},
        {"name": "dropout", "training": {"attention_dropout": 0.3, "hidden_dropout": 0.2}},
        {"name": "decay", "training": {"weight_decay": 0.1, "learning_rate": 1e-3, "label_smoothing": 0.1}},
    ]
    spec = make_spec(arms=arms, primary={"arm": "dropout"}, training={"epochs": 2})
    assert spec.training_of(spec.arms[0]) == spec.training == TrainingSpec(epochs=2)
    assert spec.training_of(spec.arms[1]) == TrainingSpec(epochs=2, attention_dropout=0.3, hidden_dropout=0.2)
    changed = TrainingSpec(epochs=2, weight_decay=0.1, learning_rate=1e-3, label_smoothing=0.1)
    assert spec.training_of(spec.arms[2]) == changed
    assert len(set(ids_of(spec))) == 3 * spec.seeds
    assert parse(json.loads(json.dumps(to_plain(spec))), "again") == spec
    for arm in spec.arms:
        assert ArmSpec.model_validate(arm.to_toml_dict()) == arm


def test_an_arm_may_be_evaluated_otherwise():
    arms = [
        {"name": "dense"},
        {"name": "sparse-to-dense", "sparsity": 0.5, "evaluate": {}},
        {"name": "dense-to-sparse", "evaluate": {"rule": "percentile", "sparsity": 0.5}},
        {"name": "random-to-topk", "rule": "random", "sparsity": 0.5, "evaluate": {"sparsity": 0.5}},
    ]
    spec = make_spec(arms=arms, primary={"arm": "sparse-to-dense"})
    assert [arm.evaluate for arm in spec.arms] == [
        None,
        SparsityConfig(sparsity=0.0),
        SparsityConfig(rule="percentile", sparsity=0.5),
        SparsityConfig(sparsity=0.5),
    ]
    assert [run.config.evaluation is None for run in expand(spec, PRINTS)][:4] == [True, False, False, False]
    assert len(set(ids_of(spec))) == 4 * spec.seeds
    assert parse(json.loads(json.dumps(to_plain(spec))), "again") == spec
    for arm in spec.arms:
        assert ArmSpec.model_validate(arm.to_toml_dict()) == arm


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"sparsity": 0.5, "apply": "train", "evaluate": {}}, "says where it is sparse already; leave out apply"),
        ({"evaluate": {"sparsity": 0.5, "apply": "eval"}}, r"leave out evaluate\.apply"),
        ({"evaluate": {"sparsity": 0.5, "schedule": {"kind": "cubic"}}}, "a schedule belongs to training"),
        ({"evaluate": {"rule": "percentile"}}, "must set sparsity too"),
        ({"evaluate": {"sparcity": 0.5}}, "Did you mean 'sparsity'"),
        ({"training": {"dropout": 0.5}}, r"Unknown key 'training\.dropout' of arm 'other'"),
        ({"training": {"attention_dropout": 1.0}}, r"attention_dropout: .*less than 1, got 1\.0"),
        ({"training": {"epochs": 5}}, r"Unknown key 'training\.epochs' of arm 'other'"),
        ({"rule": "random", "sparsity": 0.5, "scope": "pair", "count_padding": True}, "leave out count_padding"),
        ({"training": {"weight_decay": 0.01}}, "'dense' and 'other' are the same"),
    ],
)
def test_what_an_arm_cannot_do_is_refused(arm, message):
    with pytest.raises(ConfigurationError, match=message):
        make_spec(arms=[{"name": "dense"}, {"name": "other", **arm}], primary={"arm": "other"})


@pytest.mark.parametrize(
    ("vary", "names"),
    [
        ({"train_examples": [100, 500, 2000]}, ["train_examples=100", "train_examples=500", "train_examples=2000"]),
        ({"label_noise": [0, 0.1, 0.25]}, ["label_noise=0", "label_noise=0.1", "label_noise=0.25"]),
        # Six digits are not always enough.
        ({"label_noise": [0.1, 0.1000001]}, ["label_noise=0.1", "label_noise=0.1000001"]),
        ({"train_examples": [1000, 1234567]}, ["train_examples=1000", "train_examples=1234567"]),
    ],
)
def test_every_arm_is_run_at_each_value_of_what_varies(vary, names):
    spec = make_spec(vary=vary, seeds=2)
    conditions = spec.conditions()
    assert list(conditions) == names
    for values in vary.values():
        assert [getattr(data, spec.vary.key) for data in conditions.values()] == values
    assert spec.primary_condition == names[-1]
    assert make_spec(vary=vary, primary={"arm": "topk-50", "condition": names[0]}).primary_condition == names[0]
    prints = Fingerprints(MODEL, {name: str(number) for number, name in enumerate(names)})
    runs = list(expand(spec, prints))
    assert len({run.config.run_id for run in runs}) == len(runs) == 2 * 3 * len(names)
    assert [(run.index, run.condition) for run in runs[::3]] == [(index, name) for index in (0, 1) for name in names]
    assert parse(json.loads(json.dumps(to_plain(spec))), "again") == spec


def test_conditions_may_be_trained_for_epochs_of_their_own():
    vary = {"train_examples": [100, 500]}
    spec = make_spec(vary=vary | {"epochs": [9, 2]}, seeds=2)
    prints = Fingerprints(MODEL, dict.fromkeys(spec.conditions(), "the same"))
    epochs = {(run.condition, run.config.training["epochs"]) for run in expand(spec, prints)}
    assert epochs == {("train_examples=100", 9), ("train_examples=500", 2)}
    assert parse(json.loads(json.dumps(to_plain(spec))), "again") == spec
    plain = make_spec(vary=vary)
    assert [plain.epochs_in(name) for name in plain.conditions()] == [plain.training.epochs] * 2
    # Experiments of earlier releases keep their names.
    assert to_plain(plain)["vary"].keys() == {"train_examples", "label_noise"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vary": {"train_examples": [1, 2], "epochs": [3]}},
            r"epochs must be as many as train_examples, 2; got \[3\]",
        ),
        ({"vary": {"train_examples": [1, 2], "epochs": [3, 0]}}, r"epochs\.1: .*greater than or equal to 1"),
        ({"vary": {"epochs": [3, 4]}}, "vary one of train_examples, label_noise; got none"),
        ({"vary": {"train_examples": [100, 100]}}, "two or more different values, rising"),
        ({"vary": {"train_examples": [500, 100]}}, "rising; got"),
        ({"vary": {"train_examples": [100]}}, "two or more different values"),
        ({"vary": {"train_examples": [1, 2], "label_noise": [0.1, 0.2]}}, "got train_examples, label_noise"),
        ({"vary": {}}, "got none"),
        ({"vary": {"label_noise": [0.0, 1.0]}}, r"label_noise\.1: .*less than 1"),
        ({"vary": {"label_noises": [0.0, 0.1]}}, "Did you mean 'label_noise'"),
        (
            {"vary": {"train_examples": [10, 20]}, "data": {"source": "x.csv", "train_examples": 5}},
            r"leave data\.train_examples out",
        ),
        (
            {"vary": {"label_noise": [0.0, 0.2]}, "data": {"source": "x.csv", "label_noise": 0.1}},
            r"leave data\.label_noise out",
        ),
        (
            {"vary": {"label_noise": [0.0, 0.2]}, "primary": {"arm": "topk-50", "condition": "label_noise=0.3"}},
            "'label_noise=0.3' is none of this experiment's: 'label_noise=0', 'label_noise=0.2'",
        ),
        ({"primary": {"arm": "topk-50", "condition": "label_noise=0"}}, r"there is no \[vary\]"),
        ({"evaluations": [{"name": "x"}]}, "needs either typos or source"),
        ({"evaluations": [{"name": "x", "typos": 0.1, "source": "tweets"}]}, "needs either typos or source"),
        ({"evaluations": [{"name": "x", "typos": 0.1, "text": "said"}]}, "text must be of source, which is missing"),
        ({"evaluations": [{"name": "test", "typos": 0.1}]}, "differ, and from 'running', 'test' and 'train'"),
        ({"evaluations": [{"name": "running", "typos": 0.1}]}, "differ, and from 'running', 'test' and 'train'"),
        ({"evaluations": [{"name": "x", "typos": 0.1}] * 2}, "names of evaluations must differ"),
        ({"evaluations": [{"name": "x", "typo": 0.1}]}, "Did you mean 'typos'"),
    ],
)
def test_conditions_and_evaluations_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        make_spec(**changes)


def test_further_evaluations_are_part_of_a_run():
    evaluations = [{"name": "typos", "typos": 0.1}, {"name": "tweets", "source": "tweets", "test_examples": 100}]
    spec = make_spec(evaluations=evaluations)
    prints = dataclasses.replace(PRINTS, evaluations={"typos": "1", "tweets": "2"})
    assert next(expand(spec, prints)).config.evaluations == {"typos": "1", "tweets": "2"}
    assert not {run.config.run_id for run in expand(spec, prints)} & set(ids_of(spec))
    assert to_plain(spec)["evaluations"] == evaluations
    assert parse(json.loads(json.dumps(to_plain(spec))), "again") == spec
