"""What the documentation says of the public interface is complete."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path

import pytest

import crisp_attention as crisp
from crisp_attention.experiment.export import tables
from crisp_attention.experiment.specification import resources, sections, spec, tracking, tune
from crisp_attention.schedule import KINDS
from crisp_attention.traits import RULES

ROOT = Path(__file__).parent.parent
OPERATOR = (ROOT / "docs" / "operator.md").read_text(encoding="utf-8")
# One after the other: what experiments are, how they are tuned, how they are run.
EXPERIMENT = "\n" + "\n".join(
    (ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("experiment.md", "tuning.md", "running.md")
)
# The line after which each table of a specification has its table of keys.
PLACES = {
    spec.ExperimentSpec: "# The experiment: data, arms, conditions",
    sections.PrimarySpec: "`[primary]`:",
    sections.DataSpec: "## Data",
    sections.TrainingSpec: "## Training",
    sections.ArmSpec: "## Arms",
    sections.ArmTrainingSpec: "An arm's own `training = { ... }` may set:",
    sections.VarySpec: "## Conditions",
    sections.EvaluationSpec: "## Further evaluations",
    tune.TuneSpec: "## The same budget for every arm",
    tracking.TrackingSpec: "## Trackers",
    resources.ResourcesSpec: "## Resources",
}


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


def part(start):
    """A part of the pages on experiments, from a line to the next heading; the first page's head is its first part."""
    return EXPERIMENT.partition(f"\n{start}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize(("section", "start"), PLACES.items(), ids=[section.__name__ for section in PLACES])
def test_every_key_of_a_specification_has_a_row_with_its_default(section, start):
    rows = [re.split(r" *\| *", row)[1:3] for row in part(start).splitlines() if row.startswith("|")]
    for name, field in section.model_fields.items():
        told = [default for keys, default in rows if re.search(rf"`\[*{name}\]*`", keys)]
        assert told, f"the pages on experiments have no row for {section.__name__}.{name}"
        if field.is_required() and name != "attention":
            assert told[0] == "required", f"{section.__name__}.{name} is required"
        elif isinstance(field.default, str | int | float | tuple):
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            assert told[0] == f"`{json.dumps(default)}`"
        else:
            assert told[0]
            assert told[0] != "required", f"{section.__name__}.{name} may be left out"


@pytest.mark.parametrize("name", [*tables.RUN_COLUMNS, *tables.PREDICTION_COLUMNS])
def test_every_exported_column_is_explained(name):
    assert re.search(rf"^\| [^|]*`{name}`[^|]* \|", part("## Export"), re.MULTILINE)


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
    asked = spec.parse(around | tomllib.loads(content[1]), "docs/tuning.md")
    searched = {arm.name: list(asked.searched(arm)) for arm in asked.arms}
    assert searched["dense-dropout"] == ["learning_rate", "attention_dropout"]
    assert searched["dense"] == searched["topk-50"] == ["learning_rate"]
    assert searched["sparse"] == ["learning_rate", "sparsity", "rule", "layers", "schedule"]


@pytest.mark.parametrize(
    "file",
    [
        *("README.md", "CONTRIBUTING.md", "SECURITY.md", "results/README.md"),
        *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
    ],
)
def test_links_within_the_project_lead_somewhere(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert ((ROOT / file).parent / target).exists(), f"{file} links to {target}"
