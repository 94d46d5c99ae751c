"""The Python of README and docs, run as it is written; only what is downloaded is a small stand-in."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, DistilBertConfig, DistilBertForSequenceClassification

import crisp_attention as crisp
from crisp_attention.experiment.specification.spec import parse

ROOT = Path(__file__).parent.parent
OWN_DATA = "docs/howto/own-data.md"
PARTS = ("docs/experiment.md", "docs/tuning.md")


def snippets(file: str, language: str = "python") -> list[str]:
    text = (ROOT / file).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def distilbert(*_, **__):
    """As many layers as the published one, narrow."""
    torch.manual_seed(0)
    return DistilBertForSequenceClassification(DistilBertConfig(dim=16, n_heads=2, hidden_dim=16, vocab_size=40))


def rows(count: int = 8, length: int = 10):
    return [{"input_ids": torch.arange(5, 5 + length), "labels": torch.tensor(row % 2)} for row in range(count)]


@pytest.fixture
def names(monkeypatch, tmp_path):
    """What a reader has at hand: tensors, a batch, an empty folder, and a hub."""
    monkeypatch.chdir(tmp_path)
    own = AutoModelForSequenceClassification.from_pretrained
    monkeypatch.setattr(
        AutoModelForSequenceClassification,
        "from_pretrained",
        lambda name, **more: distilbert() if name == "distilbert-base-uncased" else own(name, **more),
    )
    mask = torch.arange(10) < torch.tensor([[10], [7]])
    q = torch.randn(2, 2, 10, 8)
    return {
        "crisp": crisp, "model": distilbert(), "q": q, "k": q, "v": q, "x": torch.randn(2, 10, 256),
        "mask": mask, "attention_mask": mask.long(), "batch": {"input_ids": torch.arange(5, 15).view(1, 10)},
    }  # fmt: skip


def test_the_readme_runs_from_top_to_bottom(names, capsys):
    found = snippets("README.md")
    assert len(found) >= 2
    for code in found:
        names["train_dataset"] = rows()
        exec(code.replace("train_dataset=...", "train_dataset=train_dataset"), names)
    printed = capsys.readouterr().out
    assert "DistilBertForSequenceClassification: ok" in printed


def test_specifications_are_specifications():
    """Whole ones as they are; parts, as of an arm, in the whole one of the page on experiments."""
    (whole,) = snippets(OWN_DATA, "toml")
    assert parse(tomllib.loads(whole), OWN_DATA).primary.arm == "topk-50"
    first, *parts = (code for page in PARTS for code in snippets(page, "toml"))
    assert len(parts) >= len(PARTS)
    for part in parts:
        page, own = tomllib.loads(first), tomllib.loads(part)
        named = {arm["name"] for arm in own.get("arms", ())}
        # A part may write an arm of the page's anew.
        own["arms"] = [arm for arm in page["arms"] if arm["name"] not in named] + own.get("arms", [])
        parse(page | own, "part")


PAGES = [
    "docs/index.md",
    "docs/start.md",
    *sorted(f"docs/howto/{path.name}" for path in (ROOT / "docs" / "howto").iterdir()),
]


@pytest.mark.parametrize("file", [page for page in PAGES if snippets(page)])
def test_pages_for_users_run_from_top_to_bottom(file, names, capsys):
    names["train_dataset"] = rows()
    for code in snippets(file):
        exec(code, names)
    # Every model that a page checks is as sparse as it says.
    assert capsys.readouterr().out.count(": ok") == "".join(snippets(file)).count("print(crisp.check(")


@pytest.mark.parametrize("file", [page for page in PAGES if snippets(page, "toml")])
def test_specifications_of_guides_are_specifications(file):
    """Whole ones as they are; arms in the whole one of the guide to your own data."""
    (around,) = snippets(OWN_DATA, "toml")
    for part in snippets(file, "toml"):
        own = tomllib.loads(part)
        if "name" not in own:
            own = tomllib.loads(around) | {"arms": tomllib.loads(around)["arms"] + own["arms"]}
        parse(own, file)


def test_the_page_on_the_operator_runs_from_top_to_bottom(names):
    found = snippets("docs/operator.md")
    assert found
    crisp.sparsify(names["model"], sparsity=0.5)
    for code in found:
        exec(code, names)
