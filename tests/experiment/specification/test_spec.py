from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import model_settings
from crisp_attention import ConfigurationError, SparsityConfig
from crisp_attention.cli import reproduce
from crisp_attention.experiment.report.pages import spec_as_toml
from crisp_attention.experiment.specification.runs import Fingerprints, RunConfig, expand
from crisp_attention.experiment.specification.spec import (
    MAX_SEEDS,
    ArmSpec,
    TrainingSpec,
    parse,
    preset,
    presets,
    read,
    to_plain,
)
from record_builders import DATA, MODEL, PRINTS, make_spec

GOOD = """
name = "mine"
model = "minilm-l6"
seeds = 3

[primary]
arm = "topk"

[data]
source = "films.csv"

[training]
epochs = 2

[[arms]]
name = "dense"

[[arms]]
name = "topk"
sparsity = 0.5
"""


def read_text(folder, text):
    file = folder / "mine.toml"
    file.write_text(text, encoding="utf-8")
    return read(file)


# A specification file


def test_reads_what_a_file_says_and_leaves_the_rest_to_the_defaults(tmp_path):
    spec = read_text(tmp_path, GOOD)
    assert (spec.name, spec.model, spec.seeds, spec.data.source) == ("mine", "minilm-l6", 3, "films.csv")
    assert spec.training == TrainingSpec(epochs=2)
    assert (spec.primary.arm, spec.primary.baseline) == ("topk", "dense")
    assert [arm.attention for arm in spec.arms] == [SparsityConfig(sparsity=0.0), SparsityConfig(sparsity=0.5)]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = 3", "seed = 3", "Unknown key 'seed'. Did you mean 'seeds'"),
        ("[training]", "[trainning]", "Unknown key 'trainning'. Did you mean 'training'"),
        ("epochs = 2", "epoch = 2", "Unknown key 'training.epoch'. Did you mean 'epochs'"),
        ("epochs = 2", "epochs = 0", r"training\.epochs: .*greater than or equal to 1, got 0"),
        ("epochs = 2", "epochs = 2.5", r"training\.epochs: .*got 2\.5"),
        ("epochs = 2", "learning_rate = 0", r"training\.learning_rate: .*greater than 0, got 0"),
        ("epochs = 2", "learning_rate = nan", r"training\.learning_rate: .*got nan"),
        ("epochs = 2", "warmup_share = 1.0", r"training\.warmup_share: .*less than 1, got 1\.0"),
        ("epochs = 2", "lr_schedule = 'linaer'", r"training\.lr_schedule: .*'linear'.*got 'linaer'"),
        ('source = "films.csv"', 'sorce = "films.csv"', "Unknown key 'data.sorce'. Did you mean 'source'"),
        ('source = "films.csv"', "", r"Missing key 'data\.source'"),
        ("[data]", "[data]\npadding = 'longst'", r"data\.padding: .*'longest'.*got 'longst'"),
        ("[data]", "[data]\nmax_length = 3", r"data\.max_length: .*got 3"),
        ("[data]", "[data]\ntest_share = 1.0", r"data\.test_share: .*got 1\.0"),
        ("[data]", "[data]\ntrain_examples = 0", r"data\.train_examples: .*got 0"),
        ('arm = "topk"', 'arm = "topc"', r"primary\.arm = 'topc' is not an arm\. Did you mean 'topk'"),
        ('arm = "topk"', 'arm = "topk"\nbaseline = "dens"', r"primary\.baseline = 'dens'.*Did you mean 'dense'"),
        ('arm = "topk"', 'arm = "dense"', r"primary\.arm and primary\.baseline must differ"),
        ('arm = "topk"', 'arms = "topk"', "Unknown key 'primary.arms'. Did you mean 'arm'"),
        ('arm = "topk"', "", r"Missing key 'primary\.arm'"),
        ("sparsity = 0.5", "sparcity = 0.5", r"Unknown key 'arms\.1\.sparcity'. Did you mean 'sparsity'"),
        ("sparsity = 0.5", "sparsity = 1.0", r"arms\.1\.attention: sparsity must be in \[0, 1\)"),
        ("sparsity = 0.5", "sparsity = '0.5'", r"sparsity must be a finite number, got '0\.5'"),
        ("sparsity = 0.5", "sparsity = 0.5\nrule = 'percentil'", "Unknown rule 'percentil'. Did you mean 'percentile'"),
        ("sparsity = 0.5", "sparsity = 0.5\nscope = 'row'", "'topk' would ignore scope='row'"),
        ("sparsity = 0.5", "sparsity = 0.5\nseed_offset = -1", r"arms\.1\.seed_offset: .*got -1"),
        ("sparsity = 0.5", "sparsity = 0.5\npadding = 'max'", r"arms\.1\.padding: .*'max_length'.*got 'max'"),
        ('name = "topk"', 'name = "dense"', "arm names must differ; repeated: dense"),
        ('name = "topk"', 'name = "../topk"', r"arms\.1\.name: .*got '\.\./topk'"),
        ('name = "topk"', "", r"Missing key 'arms\.1\.name'"),
        ('name = "mine"', 'name = "a/b"', r"name: .*got 'a/b'"),
        ('name = "mine"', "", "Missing key 'name'"),
        ('model = "minilm-l6"', "model = 6", r"model: .*string, got 6"),
        ("seeds = 3", "seeds = 1001", r"seeds: .*less than or equal to 1000, got 1001"),
        ("seeds = 3", "choices = 'ours'", r"choices: .*got 'ours'"),
        ("seeds = 3", "seeds = ", "is not valid TOML"),
        ("seeds = 3", "seeds = 3\nseeds = 4", "is not valid TOML"),
        ("[data]", "[[data]]", r"data: .*dictionary"),
    ],
)
def test_each_mistake_is_named_with_the_nearest_valid_name(tmp_path, old, new, message):
    assert GOOD.count(old) == 1
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_text(tmp_path, GOOD.replace(old, new))
    assert "mine.toml" in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("seeds = 3", "seeds = true", "seeds"),
        ("seeds = 3", 'seeds = "3"', "seeds"),
        ("epochs = 2", "epochs = true", "training.epochs"),
        ("epochs = 2", 'learning_rate = "5e-5"', "training.learning_rate"),
        ("epochs = 2", "learning_rate = true", "training.learning_rate"),
        ("epochs = 2", "learning_rate = inf", "training.learning_rate"),
        ("epochs = 2", "weight_decay = inf", "training.weight_decay"),
        ("sparsity = 0.5", "attention = 0", "attention"),
        ("sparsity = 0.5", "attention = []", "attention"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_rather_than_reinterpreted(tmp_path, old, new, key):
    with pytest.raises(ConfigurationError, match=key.replace(".", r"\.")):
        read_text(tmp_path, GOOD.replace(old, new))


def test_a_whole_number_serves_where_any_number_does(tmp_path):
    whole, broken = (
        read_text(
            tmp_path,
            GOOD.replace("epochs = 2", f"learning_rate = {rate}").replace(
                "sparsity = 0.5", f"{offset}sparsity = {share}"
            ),
        )
        for rate, share, offset in (("1", "0", "seed_offset = 9\n"), ("1.0", "0.0", "seed_offset = 9\n"))
    )
    assert whole == broken
    assert whole.training.learning_rate == 1.0
    assert ids_of(whole) == ids_of(broken)


def test_several_mistakes_are_told_at_once(tmp_path):
    text = GOOD.replace("epochs = 2", "epoch = 2").replace('source = "films.csv"', "")
    with pytest.raises(ConfigurationError, match=r"Missing key 'data\.source'.*Unknown key 'training\.epoch'"):
        read_text(tmp_path, text)


def test_one_arm_is_no_experiment():
    with pytest.raises(ConfigurationError, match=r"arms: .*at least 2"):
        make_spec(arms=[{"name": "dense"}])


@pytest.mark.parametrize("make", ["missing", "folder", "bytes"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, make):
    file = tmp_path / "mine.toml"
    if make == "folder":
        file.mkdir()
    if make == "bytes":
        file.write_bytes(b'name = "\xff"')
    with pytest.raises(ConfigurationError, match=r"Cannot read the specification .*mine\.toml"):
        read(file)


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
        ({"training": {"dropout": 0.5}}, r"Unknown key 'arms\.1\.training\.dropout'"),
        ({"training": {"attention_dropout": 1.0}}, r"attention_dropout: .*less than 1, got 1\.0"),
        ({"training": {"epochs": 5}}, r"Unknown key 'arms\.1\.training\.epochs'"),
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
    assert len({run.config.run_id for run in runs}) == len(runs) == 2 * 3 * 3
    assert [(run.index, run.condition) for run in runs[::3]] == [(index, name) for index in (0, 1) for name in names]
    assert parse(json.loads(json.dumps(to_plain(spec))), "again") == spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
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
        ({"evaluations": [{"name": "test", "typos": 0.1}]}, "differ, and from 'test' and 'train'"),
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


# Presets


def test_every_preset_loads_and_names_itself():
    found = presets()
    assert {"paper", "quick"} <= set(found)
    for name, spec in found.items():
        assert spec.name == name
        assert spec.description
        assert spec == preset(name)
        assert not spec.arm(spec.primary.baseline).attention.removes
        assert spec.arm(spec.primary.arm).attention.removes


def test_an_unknown_preset_is_refused_by_name():
    with pytest.raises(ConfigurationError, match=r"Unknown preset 'papper'\. Did you mean 'paper'"):
        preset("papper")


def test_the_paper_preset_can_be_evidence():
    spec = preset("paper")
    dense = spec.arm("dense")
    assert spec.seeds == 10
    placebos = [
        arm
        for arm in spec.arms
        if arm.attention == dense.attention and arm.padding == dense.padding and arm.seed_offset >= spec.seeds
    ]
    assert len(placebos) == 1
    assert spec.primary.arm != placebos[0].name
    primary = spec.arm(spec.primary.arm).attention
    assert (primary.rule, primary.sparsity, primary.count_padding) == ("percentile", 0.8, False)
    assert (spec.model, spec.data.source) == ("distilbert-base-uncased", "sst2")
    assert (spec.data.train_examples, spec.data.test_examples) == (None, None)
    naive = [arm for arm in spec.arms if arm.attention.count_padding]
    assert [(arm.attention.sparsity, arm.padding) for arm in naive] == [(0.8, "max_length")]


def test_the_paper_preset_says_which_settings_are_our_choice():
    spec = preset("paper")
    ours = " ".join(spec.choices)
    for words in (f"{spec.training.learning_rate:g}".replace("e-05", "e-5"), f"{spec.training.epochs} epochs"):
        assert words in ours
    for words in (f"batch {spec.training.batch_size}", f"length {spec.data.max_length}", "sparsities", "ten seeds"):
        assert words in ours
    for words in ("padding", "naive-80", "weight decay", "warm-up", "evaluation"):
        assert words in ours
    assert "91.59" in spec.description
    assert "90.62" in spec.description


def test_the_quick_preset_does_not_pretend_to_a_verdict():
    spec = preset("quick")
    assert spec.seeds < 6
    assert "cannot carry a verdict" in " ".join(spec.description.split())


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_can_be_planned_and_written_down(name):
    spec = preset(name)
    prints = Fingerprints(MODEL, {condition: condition for condition in spec.conditions()})
    prints = dataclasses.replace(prints, evaluations={item.name: item.name for item in spec.evaluations})
    runs = list(expand(spec, prints))
    assert len({run.config.run_id for run in runs}) == len(runs)
    assert len(runs) == len(spec.arms) * spec.seeds * len(spec.conditions())
    assert spec.choices
    assert parse(json.loads(json.dumps(to_plain(spec))), "again") == spec
    assert parse(tomllib.loads(spec_as_toml(spec)), "again") == spec


CLAIMING = sorted(set(presets()) - {"quick"})


@pytest.mark.parametrize("name", CLAIMING)
def test_a_preset_that_claims_anything_has_a_placebo_and_enough_seeds(name):
    spec = preset(name)
    dense = spec.arm("dense")
    placebos = [
        arm
        for arm in spec.arms
        if arm.seed_offset and arm.model_copy(update={"name": "dense", "seed_offset": 0}) == dense
    ]
    assert len(placebos) == 1
    assert placebos[0].seed_offset >= MAX_SEEDS
    assert spec.seeds >= 6
    assert spec.primary.baseline == "dense"


def test_the_controls_isolate_what_the_claim_could_be_mistaken_for():
    """Each arm shares all but one property with the claim; those that are told a sparsity are told the same."""
    spec = preset("controls")
    claim = spec.arm(spec.primary.arm).attention
    arms = {arm.name: arm for arm in spec.arms}
    rules = {(arm.attention.rule, arm.attention.scope) for arm in spec.arms if arm.attention.removes}
    assert {rule for rule, _ in rules} >= {
        "topk",
        "percentile",
        "random",
        "window",
        "bottomk",
        "drop_topk",
        "temperature",
    }
    assert ("random", "row") in rules
    assert ("random", "pair") in rules
    for arm in spec.arms:
        for attention in (arm.attention, arm.evaluate):
            if attention is not None and attention.removes and attention.sparsity is not None:
                assert attention.sparsity == claim.sparsity
    dense = SparsityConfig(sparsity=0.0)
    sides = {(arm.attention.rule, arm.attention.removes, arm.evaluate) for arm in spec.arms}
    assert ("topk", True, dense) in sides
    assert ("random", True, dense) in sides
    assert ("topk", False, claim) in sides
    assert [arm.padding for arm in spec.arms if arm.attention.count_padding] == ["max_length"]
    assert arms["topk-temperature"].attention == SparsityConfig(rule="temperature", sparsity=claim.sparsity)
    assert "temperature" in " ".join(spec.choices)
    regularized = {name for arm in spec.arms for name in arm.training.model_dump(exclude_none=True)}
    assert regularized == {"attention_dropout", "weight_decay"}


def test_presets_that_vary_something_name_the_condition_in_which_it_should_matter_most():
    small, noisy = preset("small-data"), preset("label-noise")
    assert small.primary_condition == f"train_examples={min(small.vary.train_examples)}"
    assert noisy.primary_condition == f"label_noise={max(noisy.vary.label_noise):g}"
    assert noisy.vary.label_noise == (0.0, 0.1, 0.2, 0.4)


def test_robustness_is_asked_of_typing_errors_and_other_domains():
    spec = preset("robustness")
    assert [item.typos for item in spec.evaluations if item.typos] == [0.05, 0.1]
    assert {item.source for item in spec.evaluations if item.source} == {"amazon-snippets", "tweets"}


def test_the_help_names_every_preset():
    help_text = " ".join(str(reproduce.__annotations__["preset"]).split())
    for name in presets():
        assert re.search(rf"\b{name}\b", help_text), name


# Runs and their ids

CONFIG = RunConfig(
    model=MODEL,
    data=DATA,
    max_length=128,
    padding="longest",
    training=TrainingSpec().identity(),
    attention=SparsityConfig(sparsity=0.5).to_dict(),
    seed=0,
)


def test_a_run_id_is_the_hash_of_the_content():
    """Written out once: a change of the format would orphan every record there is."""
    config = RunConfig(
        model="m", data="d", max_length=8, padding="longest", training={"b": 1, "a": 5e-5}, attention={}, seed=3
    )
    canonical = (
        '{"attention":{},"data":"d","max_length":8,"model":"m","padding":"longest","seed":3,'
        '"training":{"a":5e-05,"b":1}}'
    )
    assert config.run_id == hashlib.sha256(canonical.encode()).hexdigest()[:16]


def test_equal_configs_have_equal_ids_whatever_the_order_of_keys():
    shuffled = {key: CONFIG.training[key] for key in reversed(CONFIG.training)}
    assert dataclasses.replace(CONFIG, training=shuffled).run_id == CONFIG.run_id


def changed_configs():
    yield "model", dataclasses.replace(CONFIG, model="c" * 64)
    yield "data", dataclasses.replace(CONFIG, data="c" * 64)
    yield "max_length", dataclasses.replace(CONFIG, max_length=127)
    yield "padding", dataclasses.replace(CONFIG, padding="max_length")
    yield "seed", dataclasses.replace(CONFIG, seed=1)
    for key, value in CONFIG.training.items():
        other = "cosine" if key == "lr_schedule" else value * 2 + 1
        yield f"training.{key}", dataclasses.replace(CONFIG, training=CONFIG.training | {key: other})
    for key in ("label_smoothing", "attention_dropout", "hidden_dropout"):
        training = TrainingSpec(**{key: 0.1}).identity()
        yield f"training.{key}", dataclasses.replace(CONFIG, training=training)
    yield "evaluation", dataclasses.replace(CONFIG, evaluation=SparsityConfig(sparsity=0.0).identity())
    yield "evaluations", dataclasses.replace(CONFIG, evaluations={"typos": DATA})
    # The settings that the rule does not read are left out of a record; a rule that reads them has them.
    for key in (item.name for item in dataclasses.fields(SparsityConfig)):
        yield f"attention.{key}", dataclasses.replace(CONFIG, attention=CONFIG.attention | {key: "changed"})


def test_any_changed_field_gives_another_id():
    ids = {"": CONFIG.run_id} | {name: config.run_id for name, config in changed_configs()}
    assert len(ids) == 1 + 7 + len(TrainingSpec.model_fields) + len(dataclasses.fields(SparsityConfig))
    assert len(set(ids.values())) == len(ids)


def ids_of(spec):
    return [run.config.run_id for run in expand(spec, PRINTS)]


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"description": "other"},
        {"choices": ["other"]},
        {"model": "elsewhere/minilm"},
        {"data": {"source": "elsewhere.csv"}},
        {"primary": {"arm": "percentile-80"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_decides_no_result_is_not_part_of_the_id(changes):
    assert ids_of(make_spec(**changes)) == ids_of(make_spec())


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"epochs": 4}},
        {"training": {"train_probe": 7}},
        {"data": {"source": "movie-snippets", "max_length": 64}},
        {"data": {"source": "movie-snippets", "padding": "max_length"}},
    ],
)
def test_what_decides_a_result_is_part_of_every_id(changes):
    assert not set(ids_of(make_spec(**changes))) & set(ids_of(make_spec()))


def test_an_arm_of_another_name_is_the_same_run():
    renamed = [{"name": "dense"}, {"name": "other-name", "sparsity": 0.5}]
    plain = make_spec(arms=renamed, primary={"arm": "other-name"})
    named = make_spec(arms=[{"name": "dense"}, {"name": "topk-50", "sparsity": 0.5}])
    assert ids_of(plain) == ids_of(named)
    assert [run.arm for run in expand(plain, PRINTS)] != [run.arm for run in expand(named, PRINTS)]


@pytest.mark.parametrize(
    "twin",
    [
        {"name": "twin", "sparsity": 0.5, "min_keep": 1},
        {"name": "twin"},
        {"name": "twin", "sparsity": 0.0, "min_keep": 3},
        {"name": "twin", "padding": "longest"},
    ],
    ids=["defaults spelled out", "dense", "dense in other words", "the data's own padding"],
)
def test_two_arms_of_equal_settings_are_no_contrast(twin):
    arms = [{"name": "dense"}, {"name": "topk-50", "sparsity": 0.5}]
    with pytest.raises(ConfigurationError, match="'twin' are the same; an A/A arm needs a seed_offset"):
        make_spec(arms=[*arms, twin])
    assert len(make_spec(arms=[*arms, twin | {"seed_offset": 1000}]).arms) == 3


def test_runs_come_seed_by_seed_with_all_arms_of_a_seed_together():
    spec = make_spec(seeds=3)
    order = [(run.index, run.arm) for run in expand(spec, PRINTS)]
    assert order == [(index, arm.name) for index in range(3) for arm in spec.arms]


def test_seed_offset_moves_the_seed_and_not_the_pairing():
    spec = make_spec(seeds=3, arms=[{"name": "dense"}, {"name": "topk-50", "sparsity": 0.5, "seed_offset": 1000}])
    runs = list(expand(spec, PRINTS))
    assert [run.config.seed for run in runs if run.arm == "dense"] == [0, 1, 2]
    assert [run.config.seed for run in runs if run.arm == "topk-50"] == [1000, 1001, 1002]
    assert [run.index for run in runs if run.arm == "topk-50"] == [0, 1, 2]


def test_more_seeds_keep_the_runs_there_are():
    assert ids_of(make_spec(seeds=5))[: 3 * 3] == ids_of(make_spec(seeds=3))


def test_padding_of_an_arm_overrides_the_datas():
    arms = [{"name": "dense"}, {"name": "topk-50", "sparsity": 0.5, "padding": "longest"}]
    spec = make_spec(seeds=1, arms=arms, data={"source": "x.csv", "padding": "max_length"})
    assert [run.config.padding for run in expand(spec, PRINTS)] == ["max_length", "longest"]


def test_identity_leaves_out_what_decides_no_run():
    spec = make_spec()
    same = make_spec(name="other", description="other", choices=["other"], seeds=3)
    assert same.identity() == spec.identity()
    assert make_spec(training={"epochs": 9}).identity() != spec.identity()
    assert make_spec(primary={"arm": "percentile-80"}).identity() != spec.identity()


def test_a_toml_file_and_its_content_say_the_same(tmp_path):
    assert read_text(tmp_path, GOOD) == parse(tomllib.loads(GOOD), "x")
