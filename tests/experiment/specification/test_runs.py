"""Runs and their ids."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest

from crisp_attention import ConfigurationError, SparsityConfig
from crisp_attention.experiment.specification.runs import RunConfig, expand
from crisp_attention.experiment.specification.sections import TrainingSpec
from record_builders import DATA, MODEL, PRINTS, ids_of, make_spec

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
    yield "training.curves", dataclasses.replace(CONFIG, training=TrainingSpec(curves=False).identity())
    yield "evaluation", dataclasses.replace(CONFIG, evaluation=SparsityConfig(sparsity=0.0).identity())
    yield "evaluations", dataclasses.replace(CONFIG, evaluations={"typos": DATA})
    # The settings that the rule does not read are left out of a record; a rule that reads them has them.
    for key in (item.name for item in dataclasses.fields(SparsityConfig)):
        yield f"attention.{key}", dataclasses.replace(CONFIG, attention=CONFIG.attention | {key: "changed"})


def test_any_changed_field_gives_another_id():
    ids = {"": CONFIG.run_id} | {name: config.run_id for name, config in changed_configs()}
    assert len(ids) == 1 + 7 + len(TrainingSpec.model_fields) + len(dataclasses.fields(SparsityConfig))
    assert len(set(ids.values())) == len(ids)


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
