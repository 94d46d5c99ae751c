"""The README.md beside a model that `crisp tune` saves: what it is, why it was chosen, how to load it. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from crisp_attention import __version__
from crisp_attention.experiment.conclusions.analysis import Analysis
from crisp_attention.experiment.results.record import Record, Score
from crisp_attention.experiment.specification.tune import told

_HEADER = """\
---
library_name: transformers
pipeline_tag: {task}
tags:
- crisp-attention
---
"""


def card(analysis: Analysis, record: Record, why: str, settings: dict[str, Any] | None, task: str) -> str:
    """A model card in Markdown.

    Args:
        analysis: Of the experiment.
        record: Of the run whose model it is.
        why: Why this arm's model, in a sentence.
        settings: Of attention, as `config.crisp_attention` holds them; None if it is dense.
        task: What a pipeline calls it, as "text-classification".
    """
    spec, origin, score = analysis.spec, record.provenance, record.final.test
    accuracies = [
        f"| {_plain(arm.name)} | {len(arm.records)} | {_spread([own.final.test for own in arm.records.values()])} |"
        for arm in analysis.arms
        if arm.records
    ]
    lines = [
        _HEADER.format(task=task),
        f"# {_plain(spec.name)}: the {record.arm} arm",
        "",
        f"{_plain(origin.model)}, fine-tuned to {len(record.classes)} classes of {_plain(origin.data)} by `crisp tune` "
        f"(crisp-attention {__version__}).",
        "",
        "## How to load it",
        "",
        *_loading(task, settings),
        "",
        "## Verdict",
        "",
        _plain(analysis.verdict.headline),
        "",
        *(f"- {_plain(sentence)}" for sentence in (*analysis.verdict.details, *analysis.cautions)),
        "",
        f"{why} It is the model of seed {record.config['seed']}, the first; which seed is kept was settled beforehand. "
        "All training examples went into it, so that none were left to choose a seed on, and a choice by the "
        "evaluation split would make its accuracy look better than it is.",
        "",
        "## Accuracy",
        "",
        f"This model: {score.correct} of {score.total} evaluation examples, of a split that neither training nor the "
        "choice of settings used; the verdict, which decides between the arms, is by them. By arm, over seeds, in %:",
        "",
        "| arm | seeds | lowest | mean | highest |",
        "| --- | ---: | ---: | ---: | ---: |",
        *accuracies,
        "",
        "## Data",
        "",
        f"{_plain(origin.data)}, classes {_plain(', '.join(record.classes))}; sha256 of both splits "
        f"`{origin.data_fingerprint}`. Texts are cut after {spec.data.max_length} tokens.",
        "",
        *(f"- {_plain(note)}" for note in origin.data_notes),
        "",
        "## Settings",
        "",
        "| setting | value |",
        "| --- | --- |",
        *(f"| {name} | {_plain(value)} |" for name, value in _settings(analysis, record)),
        "",
        "## Made with",
        "",
        ", ".join(f"{name} {version}" for name, version in sorted(origin.packages.items())) + ".",
        "",
    ]
    return "\n".join(lines)


def _loading(task: str, settings: dict[str, Any] | None) -> list[str]:
    own = "image" if task == "image-classification" else '"a text"'
    more = "" if task == "image-classification" else ", truncation=True"
    code = [
        "```python",
        *(["import crisp_attention  # registers the attention that config.json asks for"] if settings else []),
        "from transformers import pipeline",
        "",
        f'classify = pipeline("{task}", "path/to/this/folder")',
        f"classify({own}{more})",
        "```",
    ]
    if settings is None:
        return ["Its attention is dense: it needs Transformers only.", "", *code]
    return [
        f"Its attention is sparse, by `{json.dumps(settings, sort_keys=True)}` in `config.json`:",
        "",
        *code,
        "",
        "Without `import crisp_attention`, Transformers refuses the attention implementation rather than be dense in "
        "silence.",
    ]


def _settings(analysis: Analysis, record: Record) -> list[tuple[str, str]]:
    """What was found for its arm, and what was given."""
    found = analysis.tuning.values.get(record.arm, {}) if analysis.tuning else {}
    training = {name: value for name, value in record.config["training"].items() if value is not None}
    rows = {name: json.dumps(value) for name, value in {**training, "attention": record.config["attention"]}.items()}
    return [(f"{name} (found in the search)", told(value)) for name, value in found.items()] + [
        (name, value) for name, value in rows.items() if name not in found
    ]


def _spread(scores: Sequence[Score]) -> str:
    """Cells with the lowest, the mean and the highest accuracy in %."""
    values = [100 * score.accuracy for score in scores]
    return " | ".join(f"{value:.2f}" for value in (min(values), fmean(values), max(values)))


def _plain(text: str) -> str:
    """Text of others, as names of files and classes are, without what Markdown would take for its own."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in " ".join(text.split()))
