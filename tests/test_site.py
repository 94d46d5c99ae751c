"""What the documentation site adds to the pages: pictures, tables, and what must be there."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest
import torch

import crisp_attention as crisp
from crisp_attention.experiment import statistics as own_statistics
from crisp_attention.traits import RULES
from site_modules import DOCS, site_module

ROOT = Path(__file__).parent.parent

pictures, tables = site_module("pictures"), site_module("tables")
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
DIRECTIVES = {
    kind: re.findall(rf"^<!-- {kind} (.*) -->$", "\n".join(PAGES.values()), re.MULTILINE)
    for kind in ("rule", "table", "figure")
}


def test_every_rule_has_a_picture_on_the_page_of_concepts():
    assert set(re.findall(r"^<!-- rule (.*) -->$", PAGES["concepts.md"], re.MULTILINE)) == set(RULES)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_picture_shows_what_the_rule_keeps(rule):
    kept, drawn = pictures.apply(rule), pictures.picture_of_rule(rule)
    valid = int(pictures.VALID.sum()) ** 2
    assert drawn.count('class="kept"') == valid - kept.removed
    assert drawn.count('class="removed"') == kept.removed
    assert drawn.count("<rect") == len(pictures.TOKENS) ** 2
    assert f"{kept.removed} of {valid} valid pairs removed" in drawn


def test_the_example_enters_the_rules_as_it_is_drawn():
    """The best keys by `topk` are those of the scores themselves."""
    scores, kept = pictures.scores(), pictures.apply("topk")
    among = scores.masked_fill(~pictures.VALID, -torch.inf)
    for row in range(int(pictures.VALID.sum())):
        best = among[row].topk(int(kept.keep[row].sum())).indices
        assert set(best.tolist()) == set(kept.keep[row].nonzero().flatten().tolist())


@pytest.mark.parametrize("name", sorted(tables.TABLES))
def test_tables_are_made_from_the_records(name):
    made = tables.TABLES[name]()
    assert made.count("\n|") > 2
    assert name in DIRECTIVES["table"], "no page shows it"


def test_a_table_says_what_its_record_says():
    record = json.loads((ROOT / "results/benchmarks/finetuning-throughput.json").read_text(encoding="utf-8"))
    for name, figures in record["figures"].items():
        row = re.search(rf"^\| {re.escape(name)} \|.*$", tables.finetuning(), re.MULTILINE)
        assert row
        assert f" {statistics.median(figures['ratios']['dense']):.2f} " in row[0]


def test_pages_ask_for_figures_that_there_are():
    for study, name in (figure.split() for figure in DIRECTIVES["figure"]):
        assert (ROOT / "results" / study / "figures" / f"{name}.svg").is_file()


def test_every_page_stands_in_the_order_of_the_site():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    assert set(PAGES) <= set(re.findall(r": (\S+\.md)$", nav, re.MULTILINE))


def test_the_api_explains_every_public_name():
    explained = re.findall(r"^::: crisp_attention\.(\w+)$", PAGES["api.md"], re.MULTILINE)
    assert sorted(explained) == crisp.__all__
    rules = re.findall(r"^::: crisp_attention\.rules\.\w+\.(\w+)$", PAGES["api.md"], re.MULTILINE)
    assert sorted(rules) == sorted(RULES)
    assert "::: crisp_attention.experiment.statistics" in PAGES["api-experiment.md"]
    assert all(getattr(own_statistics, name).__doc__ for name in own_statistics.__all__)


def test_every_trap_is_told():
    """The page has a paragraph for each pitfall that the tests name."""
    from test_pitfalls import PITFALLS

    assert len(re.findall(r"^\*\*[^*]+\*\*", PAGES["pitfalls.md"], re.MULTILINE)) >= len(PITFALLS)


def test_how_to_cite_is_machine_readable():
    import yaml

    content = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert content["cff-version"] == "1.2.0"
    assert {"title", "authors", "license", "message", "type"} <= set(content)
    assert "2508.06016" in content["references"][0]["url"]
