"""What the documentation says of the public interface is complete."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

import crisp_attention as crisp
from crisp_attention.experiment.specification import spec, tune
from crisp_attention.schedule import KINDS
from crisp_attention.traits import RULES

ROOT = Path(__file__).parent.parent
OPERATOR = (ROOT / "docs" / "operator.md").read_text(encoding="utf-8")
EXPERIMENT = (ROOT / "docs" / "experiment.md").read_text(encoding="utf-8")
SECTIONS = (
    spec.ArmSpec,
    spec.ArmTrainingSpec,
    spec.DataSpec,
    spec.EvaluationSpec,
    spec.ExperimentSpec,
    spec.PrimarySpec,
    spec.TrainingSpec,
    spec.VarySpec,
    tune.TuneSpec,
)


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_is_explained(name):
    row = re.search(rf"^\| .*`{name}`.*$", OPERATOR, re.MULTILINE)
    assert row, f"docs/operator.md says nothing of the rule {name}"
    assert all(f"`{strength}`" in row[0] for strength in RULES[name].strengths)


@pytest.mark.parametrize(
    "name", [item.name for kind in (crisp.SparsityConfig, crisp.Schedule) for item in dataclasses.fields(kind)]
)
def test_every_setting_is_explained(name):
    assert re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`", OPERATOR), f"docs/operator.md says nothing of {name}"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_schedule_is_explained(kind):
    assert f"`{kind}`" in OPERATOR


@pytest.mark.parametrize(
    ("section", "name"), [(section.__name__, name) for section in SECTIONS for name in section.model_fields]
)
def test_every_key_of_a_specification_is_explained(section, name):
    assert re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`", EXPERIMENT), f"docs/experiment.md says nothing of {name}"


@pytest.mark.parametrize("name", sorted(spec.presets()))
def test_every_preset_is_explained(name):
    assert re.search(rf"^\| `{name}` \|", EXPERIMENT, re.MULTILINE)


def test_the_example_specification_is_one():
    content = re.search(r"```toml\n(name = .*?)```", EXPERIMENT, re.DOTALL)
    assert content
    assert spec.parse(tomllib.loads(content[1]), "docs/experiment.md").seeds == 10


def test_the_example_of_tuning_is_one():
    content = re.search(r"```toml\n(\[tune\].*?)```", EXPERIMENT, re.DOTALL)
    assert content
    around = {"name": "x", "model": "minilm-l6", "primary": {"arm": "topk-50"}, "data": {"source": "trec"}}
    asked = spec.parse(around | tomllib.loads(content[1]), "docs/experiment.md")
    searched = {arm.name: list(asked.searched(arm)) for arm in asked.arms}
    assert searched["dense-dropout"] == ["learning_rate", "attention_dropout"]
    assert searched["dense"] == searched["topk-50"] == ["learning_rate"]


@pytest.mark.parametrize(
    "file", ["README.md", "CONTRIBUTING.md", "docs/operator.md", "docs/experiment.md", "docs/compatibility.md"]
)
def test_links_within_the_project_lead_somewhere(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert ((ROOT / file).parent / target).exists(), f"{file} links to {target}"
