from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import crisp_attention as crisp
from crisp_attention.rules import FUNCTIONS
from crisp_attention.traits import RULES


def test_every_rule_has_a_function_and_traits():
    assert set(RULES) == set(FUNCTIONS)


@given(
    sparsity=st.floats(0, 0.999),
    rule=st.sampled_from(sorted(RULES)),
    min_keep=st.integers(1, 9),
    apply=st.sampled_from(["always", "train", "eval"]),
)
def test_round_trips_through_json(sparsity, rule, min_keep, apply):
    config = crisp.SparsityConfig(sparsity=sparsity, rule=rule, min_keep=min_keep, apply=apply)
    assert crisp.SparsityConfig.from_dict(json.loads(config.to_json())) == config


def test_is_frozen_and_documents_each_field():
    config = crisp.SparsityConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sparsity = 0.5  # type: ignore[misc]
    assert all(len(field.metadata["help"]) > 10 for field in dataclasses.fields(config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparcity": 0.5}, "Unknown sparsity setting 'sparcity'. Did you mean 'sparsity'"),
        ({"rule": "top_k"}, "Did you mean 'topk'"),
        ({"sparsity": "0.5"}, "finite number, got '0.5'"),
        ({"sparsity": True}, "finite number, got True"),
        ({"sparsity": 1}, r"\[0, 1\)"),
        ({"apply": "training"}, "Did you mean 'train'"),
        ({"min_keep": 1.5}, "integer >= 1, got 1.5"),
        ({"count_padding": "yes"}, "true or false"),
        ({"rule": "random", "scope": "rows"}, "Did you mean 'row'"),
        ({"rule": "random", "seed": -1}, "integer >= 0"),
        ({"rule": "topk", "seed": 3}, "Rule 'topk' would ignore seed=3; it is read by: random"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(crisp.ConfigurationError, match=message):
        crisp.SparsityConfig.from_dict(settings)


@pytest.mark.parametrize(
    ("apply", "training", "evaluation"), [("always", True, True), ("train", True, False), ("eval", False, True)]
)
def test_apply_says_when(apply, training, evaluation):
    config = crisp.SparsityConfig(sparsity=0.5, apply=apply)
    assert config.active(training=True) is training
    assert config.active(training=False) is evaluation
    assert not config.replace(sparsity=0.0).active(training=True)


def test_needs_no_torch():
    code = "import sys, crisp_attention.config; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
