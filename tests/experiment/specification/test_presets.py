"""The specifications that ship with the package."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib

import pytest

from crisp_attention import ConfigurationError, SparsityConfig
from crisp_attention.cli.studies import reproduce
from crisp_attention.experiment.report.pages import spec_as_toml
from crisp_attention.experiment.specification.runs import Fingerprints, expand
from crisp_attention.experiment.specification.spec import (
    MAX_SEEDS,
    parse,
    preset,
    presets,
    to_plain,
)
from record_builders import MODEL


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
