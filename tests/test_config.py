from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given

import crisp_attention as crisp
from cases import VALUES, model_settings
from crisp_attention import Schedule, SparsityConfig
from crisp_attention.traits import RULES
from fragments import words

configurations = model_settings().map(SparsityConfig.from_dict)


@given(config=configurations)
def test_round_trips_through_json(config):
    assert SparsityConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict() == config.replace().to_dict()


@given(config=configurations)
def test_nulls_in_old_files_mean_not_given(config):
    nulls = {item.name: None for item in dataclasses.fields(SparsityConfig)}
    assert SparsityConfig.from_dict({**nulls, **config.to_dict()}) == config


@given(config=configurations)
def test_what_differs_from_the_defaults_and_the_strength_rebuild_it(config):
    assert SparsityConfig.from_dict({**config.changes(), **config.strength}) == config
    assert set(config.changes()) <= set(config.to_dict())
    assert len(config.strength) == bool(config.traits.strengths)


@given(config=configurations)
def test_is_written_as_the_shortest_python_that_makes_it(config):
    assert eval(repr(config), {"SparsityConfig": SparsityConfig, "Schedule": Schedule}) == config
    assert "None" not in repr(config)


def test_is_told_in_a_line_and_explained_in_a_notebook():
    config = SparsityConfig(sparsity=0.9, layers=[-1], schedule={"kind": "cubic", "end": 0.5})
    ramp = "Schedule(kind='cubic', begin=0.0, end=0.5, initial=0.0, stagger=0.0)"
    assert repr(config) == f"SparsityConfig(rule='topk', sparsity=0.9, layers=(-1,), schedule={ramp})"
    shown = words(config._repr_html_())
    assert "sparsity 0.9 share of valid scores to remove" in shown
    assert shown.index("layers [-1]") < shown.index("min_keep 1")
    assert "key_block" not in shown  # no setting of this rule


@given(config=configurations)
def test_equal_configurations_hash_alike(config):
    assert hash(config.replace()) == hash(config)
    assert config.replace() == config
    assert len({config, config.replace(), config.replace(apply="eval" if config.apply != "eval" else "train")}) == 2


@given(config=configurations)
def test_a_setting_that_is_not_read_is_none_and_no_other(config):
    everywhere = {"rule", "apply", "layers", "heads", "layer_sparsity", "schedule"}
    optional = {name for traits in RULES.values() for name in traits.settings}
    assert everywhere | optional == {item.name for item in dataclasses.fields(config)}
    for name in optional:
        strength = name in config.traits.strengths or name == "stride"
        read = name in config.traits.settings and (not strength or name in config.strength)
        if name != "stride":
            assert (getattr(config, name) is not None) == read


@pytest.mark.parametrize(
    "old",
    [
        {"sparsity": 0.8, "rule": "topk", "min_keep": 1, "apply": "always", "count_padding": False},
        {"sparsity": 0.8, "rule": "percentile", "min_keep": 1, "apply": "train", "count_padding": True},
        {"sparsity": 0.5, "rule": "random", "min_keep": 2, "apply": "eval", "count_padding": False, "seed": 3},
        {"sparsity": 0.0, "rule": "topk", "min_keep": 1, "apply": "always", "count_padding": False},
    ],
)
def test_settings_of_old_files_still_load(old):
    config = SparsityConfig.from_dict({"scope": None, "seed": None, **old})
    assert {name: getattr(config, name) for name in old} == old
    assert config.gradient == "selected"
    assert config.keep_first == 0


@pytest.mark.parametrize("rule", sorted(RULES))
def test_each_rule_alone_is_a_configuration_with_its_defaults(rule):
    config = SparsityConfig(rule=rule)
    traits = RULES[rule]
    own = {name: default for name, default in traits.settings.items() if name not in traits.strengths[1:]}
    assert config.to_dict() == {"rule": rule, "apply": "always"} | {k: v for k, v in own.items() if v is not None}
    assert config.changes() == ({} if rule == "topk" else {"rule": rule})
    assert set(traits.strengths) <= set(traits.settings)
    assert traits.summary
    assert traits.source


def test_is_frozen_and_documents_each_field():
    config = crisp.SparsityConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sparsity = 0.5  # type: ignore[misc]
    assert all(len(field.metadata["help"]) > 10 for field in dataclasses.fields(config))


def test_help_texts_name_the_defaults_in_force():
    named = 0
    for item in dataclasses.fields(SparsityConfig):
        _, found, default = item.metadata["help"].partition("(default ")
        if found:
            value = default.partition(")")[0].partition(";")[0]
            rules = [rule for rule, traits in RULES.items() if item.name in traits.settings and rule != "nm"]
            assert {json.dumps(RULES[rule].settings[item.name]) for rule in rules or ["nm"]} == {value}
            named += 1
    assert named == 10
    assert SparsityConfig(rule="nm").sparsity == 0.5  # as the help of sparsity says


def test_a_schedule_is_given_as_itself_or_as_its_settings():
    given = SparsityConfig(sparsity=0.5, schedule=Schedule(kind="linear", end=0.5))
    assert given == SparsityConfig(sparsity=0.5, schedule={"kind": "linear", "end": 0.5})
    assert given.to_dict()["schedule"]["end"] == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparcity": 0.5}, "Unknown sparsity setting 'sparcity'. Did you mean 'sparsity'"),
        ({"rule": "top_k"}, "Did you mean 'topk'"),
        ({"rule": ["topk"]}, r"Unknown rule \['topk'\]"),
        ({"rule": "random", "scope": {}}, "Unknown scope {}"),
        ({"rule": "entmax"}, "Did you mean 'entmax15'"),
        ({"sparsity": "0.5"}, "finite number, got '0.5'"),
        ({"sparsity": True}, "finite number, got True"),
        ({"sparsity": 1}, r"\[0, 1\)"),
        ({"apply": "training"}, "Did you mean 'train'"),
        ({"min_keep": 1.5}, "integer >= 1, got 1.5"),
        ({"min_keep": True}, "integer >= 1, got True"),
        ({"keep_first": -1}, "keep_first must be an integer >= 0"),
        ({"keep_self": 1}, "keep_self must be true or false, got 1"),
        ({"gradient": "straight"}, "Unknown gradient 'straight'. Did you mean 'straight_through'"),
        ({"count_padding": "yes"}, "true or false"),
        ({"heads": []}, "heads must be a list with at least one number"),
        ({"heads": "0"}, "heads must be a list"),
        ({"heads": 3}, "heads must be a list with at least one number, got 3"),
        ({"heads": [1, 1]}, "heads must hold different integers >= 0"),
        ({"heads": [True]}, "heads must hold integers, got True"),
        ({"layers": [0.5]}, "layers must hold integers, got 0.5"),
        ({"layers": []}, "layers must be a list"),
        ({"layer_sparsity": [0.5, 1.0]}, r"layer_sparsity must be in \[0, 1\).*got 1.0"),
        ({"layer_sparsity": 0.5}, "layer_sparsity must be a list"),
        ({"layer_sparsity": [0.5], "layers": [0]}, "Give layers or layer_sparsity, not both"),
        ({"layer_sparsity": [0.5], "sparsity": 0.5}, "Give one of sparsity, layer_sparsity"),
        ({"rule": "top_p", "layer_sparsity": [0.5]}, "would ignore layer_sparsity=.*; it is set by p"),
        ({"rule": "random", "scope": "rows"}, "Did you mean 'row'"),
        ({"rule": "random", "scope": "pair", "count_padding": True}, "counts none; leave out count_padding"),
        ({"rule": "random", "seed": -1}, "integer >= 0"),
        ({"rule": "random", "seed": 2**32}, r"seed must be less than 2\*\*32"),
        ({"rule": "topk", "seed": 3}, "Rule 'topk' would ignore seed=3; it is read by: random"),
        (
            {"rule": "nm", "count_padding": False},
            "would ignore count_padding=False; it is read by: percentile, random",
        ),
        ({"rule": "nm", "m": 1}, "m must be an integer >= 2"),
        ({"rule": "top_p", "p": 1.0}, r"p must be in \(0, 1\).*0.9 keeps 90%"),
        ({"rule": "top_p", "p": 0}, r"p must be in \(0, 1\)"),
        ({"rule": "top_p", "sparsity": 0.5}, "would ignore sparsity=0.5; it is set by p"),
        ({"rule": "window", "window": 2, "sparsity": 0.5}, "Give one of sparsity, window"),
        ({"rule": "window", "stride": 2}, "stride=2 needs a fixed window: set window in place of sparsity"),
        ({"rule": "window", "window": 2, "stride": 1}, "stride must be an integer >= 2"),
        ({"rule": "window", "window": -1}, "window must be an integer >= 0"),
        ({"rule": "block_topk", "key_block": 0}, "key_block must be an integer >= 1"),
        ({"rule": "drop_topk", "drop": 0}, "drop must be an integer >= 1"),
        ({"rule": "drop_topk", "sparsity": 0.0}, "would ignore sparsity=0.0; it is set by drop"),
        ({"rule": "temperature", "entropy": 0.0}, "entropy must be greater than 0"),
        ({"rule": "temperature", "entropy": 1.0, "sparsity": 0.5}, "Give one of sparsity, entropy"),
        (
            {"rule": "temperature", "min_keep": 2},
            "would ignore min_keep=2; it is read by: block_topk",
        ),
        ({"rule": "sparsemax", "sparsity": 0.5}, "would ignore sparsity=0.5; it has no strength to set"),
        (
            {"rule": "drop_topk", "schedule": {"kind": "linear"}},
            "moves the sparsity, which rule 'drop_topk'",
        ),
        ({"sparsity": 0.0, "schedule": {"kind": "anneal"}}, "which is 0 here.*kind='anneal' to end dense"),
        ({"schedule": {"kind": "linaer"}}, "Did you mean 'linear'"),
        ({"schedule": "linear"}, "Expected a mapping of schedule settings, got str"),
        ({"sparsity": 0.2, "schedule": {"kind": "stochastic", "low": 0.4}}, "between low=0.4 and the sparsity 0.2"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(crisp.ConfigurationError, match=message):
        crisp.SparsityConfig.from_dict(settings)


@pytest.mark.parametrize("settings", [["topk"], "topk", None, 0.8])
def test_settings_that_are_no_mapping_are_refused(settings):
    with pytest.raises(crisp.ConfigurationError, match="Expected a mapping of sparsity settings, got"):
        SparsityConfig.from_dict(settings)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_rule_refuses_each_setting_that_it_would_ignore(rule):
    values = {"seed": 3, "scope": "row", "m": 4, "p": 0.9, "drop": 1, "entropy": 1.0, "window": 3, "query_block": 2}
    values |= {"key_block": 2, "min_keep": 1, "keep_first": 0, "keep_self": False, "gradient": "selected"}
    values |= {"count_padding": False, "sparsity": 0.0, "stride": 2}
    assert set(values) == set(VALUES)
    for name in set(values) - set(RULES[rule].settings):
        with pytest.raises(crisp.ConfigurationError, match=f"Rule '{rule}' would ignore {name}="):
            SparsityConfig(rule=rule, **{name: values[name]})


@pytest.mark.parametrize(
    ("apply", "training", "evaluation"), [("always", True, True), ("train", True, False), ("eval", False, True)]
)
def test_apply_says_when(apply, training, evaluation):
    config = crisp.SparsityConfig(sparsity=0.5, apply=apply)
    assert config.active(training=True) is training
    assert config.active(training=False) is evaluation
    assert not config.replace(sparsity=0.0).active(training=True)


def test_whether_a_configuration_removes_anything():
    assert not SparsityConfig(sparsity=0.0).removes
    assert not SparsityConfig(layer_sparsity=[0.0, 0.0]).removes
    assert SparsityConfig(layer_sparsity=[0.0, 0.1]).removes
    assert all(SparsityConfig(rule=rule).removes for rule in RULES)


@pytest.mark.parametrize(
    ("settings", "per_row", "by_position", "by_key_position"),
    [
        ({}, True, False, False),
        ({"keep_first": 1}, True, False, True),
        ({"keep_self": True}, True, True, True),
        ({"rule": "percentile"}, False, False, False),
        ({"rule": "random"}, True, True, True),
        ({"rule": "random", "scope": "matrix"}, False, True, True),
        ({"rule": "random", "scope": "pair"}, True, True, True),
        ({"rule": "block_topk"}, False, True, True),
        ({"rule": "block_topk", "query_block": 1}, True, False, True),
        ({"rule": "nm"}, True, False, True),
        ({"rule": "window"}, True, True, True),
        ({"rule": "temperature"}, True, False, False),
        ({"rule": "sparsemax"}, True, False, False),
    ],
)
def test_what_a_query_s_survivors_depend_on(settings, per_row, by_position, by_key_position):
    config = SparsityConfig(**settings)
    assert (config.per_row, config.by_position, config.by_key_position) == (per_row, by_position, by_key_position)


def test_layers_count_from_the_end_too():
    config = SparsityConfig(layers=[0, -1], sparsity=0.6, heads=[2])
    own = [config.for_layer(index, 4) for index in range(4)]
    assert own[0] == own[3] == SparsityConfig(sparsity=0.6, heads=[2])
    assert own[1] is own[2] is None
    everywhere = SparsityConfig(rule="sparsemax")
    assert everywhere.for_layer(2, 3) is everywhere


@pytest.mark.parametrize("wrong", [4, -5])
def test_a_layer_that_does_not_exist_is_named(wrong):
    message = rf"layers=\[1, {wrong}\] names {wrong}, but this model has 4 attention layers, 0 to 3 \(or -4 to -1\)"
    with pytest.raises(crisp.ConfigurationError, match=message):
        SparsityConfig(layers=[1, wrong]).for_layer(0, 4)


def test_each_layer_has_its_own_sparsity_and_zero_leaves_it_dense():
    schedule = {"kind": "stochastic", "low": 0.3}
    config = SparsityConfig(layer_sparsity=[0.5, 0.0, 0.8], rule="percentile", min_keep=2, schedule=schedule)
    own = [config.for_layer(index, 3) for index in range(3)]
    assert own[0] == SparsityConfig(sparsity=0.5, rule="percentile", min_keep=2, schedule=schedule)
    assert own[1] is None
    assert own[2] == own[0].replace(sparsity=0.8)
    with pytest.raises(crisp.ConfigurationError, match="layer_sparsity has 3 values, but this model has 6"):
        config.for_layer(0, 6)


def test_a_setting_is_taken_back_by_none():
    config = SparsityConfig(sparsity=0.6, min_keep=3, heads=[1])
    assert config.replace(min_keep=None, heads=None) == SparsityConfig(sparsity=0.6)
    assert SparsityConfig(rule="window", window=3).replace(window=None, sparsity=0.7).window is None
    with pytest.raises(crisp.ConfigurationError, match="Give one of sparsity, layer_sparsity"):
        config.replace(layer_sparsity=[0.5])


def test_needs_no_torch():
    code = "import sys, crisp_attention.config; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_identity_of_what_the_first_release_knew_stays_as_it_was():
    first = {"apply": "always", "count_padding": False, "min_keep": 1, "scope": None, "seed": None}
    assert crisp.SparsityConfig(sparsity=0.5).identity() == {**first, "rule": "topk", "sparsity": 0.5}
    assert crisp.SparsityConfig(rule="random").identity() == {**first, "rule": "random", "sparsity": 0.8}
    assert crisp.SparsityConfig(keep_first=1).identity() == {**first, "rule": "topk", "sparsity": 0.8, "keep_first": 1}


@pytest.mark.parametrize("rule", sorted(RULES))
def test_an_identity_reads_back(rule):
    config = crisp.SparsityConfig(rule=rule)
    assert crisp.SparsityConfig.from_dict(json.loads(json.dumps(config.identity()))) == config
