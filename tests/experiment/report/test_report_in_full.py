"""Reports of all that a record can hold."""

from __future__ import annotations

import base64
import dataclasses
import json
import re

import pytest

from crisp_attention.experiment.conclusions.analysis import analyse
from crisp_attention.experiment.report import breadth, disagreements, secondary, tables
from crisp_attention.experiment.results.examples import Examples
from crisp_attention.experiment.results.record import Timing
from record_builders import (
    ARMS,
    EXAMPLES,
    MAP_ROWS,
    MAP_TOKENS,
    draws,
    fill,
    fill_in_full,
    finished,
    make_spec,
    planned,
    planned_in,
)
from report_pages import EVEN, FIGURES, SCRIPT, Page, write

TYPOS = {"name": "typos-5", "typos": 0.05}
TWEETS = {"name": "tweets", "source": "tweets"}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Two conditions, two further evaluations, lengths, entropy, texts and attention maps."""
    arms = [*ARMS, {"name": "topk-80", "sparsity": 0.8}]
    spec = make_spec(arms=arms, vary={"label_noise": [0.0, 0.4]}, evaluations=[TYPOS, TWEETS], seeds=7)
    outcome = draws({"dense": 0.5, "topk-50": 0.6})
    special = {("topk-80", 6): None, ("percentile-80", 2): "failed"}
    folder = tmp_path_factory.mktemp("full")
    return fill_in_full(folder, spec, lambda arm, index: special.get((arm, index), outcome(arm, index)))


@pytest.fixture(scope="module")
def full_result(full):
    return analyse(full)


@pytest.fixture(scope="module")
def full_pages(full):
    return write(full)


def test_everything_in_the_records_has_its_section(full_pages):
    text, markdown = full_pages
    page = Page(text)
    targets = [value[1:] for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert targets == [
        "contrasts",
        "arms",
        "conditions",
        "evaluations",
        "training",
        "outcomes",
        "sparsity",
        "disagreements",
        "cost",
        "runs",
        "provenance",
        "specification",
    ]
    headings = [line.removeprefix("## ") for line in markdown.splitlines() if line.startswith("## ")]
    assert len(headings) == len(targets)
    drawn = re.findall(r"figures/([a-z-]+)\.svg", markdown)
    assert set(drawn) == {*FIGURES, "conditions", "evaluations", "lengths", "entropy"}


def test_every_condition_and_evaluation_states_its_n(full_result):
    cells, differences, trends = breadth.condition_tables(full_result)
    assert cells.header == ("arm", "label_noise=0", "label_noise=0.4")
    rows = {row[0]: row[1:] for row in cells.rows}
    assert all(cell.endswith(", 6 of 7 (1 diverged or failed)") for cell in rows["percentile-80"])
    assert all(cell.endswith(", 6 of 7") for cell in rows["topk-80"])
    assert [row[:2] for row in differences.rows][:2] == [
        ("topk-50, label_noise=0", "7"),
        ("percentile-80, label_noise=0", "6"),
    ]
    assert "topk-50, label_noise=0.4 (primary)" in [row[0] for row in differences.rows]
    assert [row[1] for row in trends.rows] == ["7", "6", "6"]
    accuracies, further = breadth.evaluation_tables(full_result)
    assert {row[0]: row[-1].partition(" of ")[2] for row in accuracies.rows}["topk-80"] == f"{EXAMPLES}, n = 6"
    assert [row[0] for row in further.rows if row[0].startswith("topk-50")] == ["topk-50, typos-5", "topk-50, tweets"]


def test_runs_of_every_condition_are_listed(full_result):
    made = tables.runs(full_result)
    assert len(made.rows) == 2 * 4 * 7
    missing = [row[:3] for row in made.rows if row[2] == "not done"]
    assert missing == [("topk-80, label_noise=0", "6", "not done"), ("topk-80, label_noise=0.4", "6", "not done")]


def test_secondary_outcomes_are_those_of_the_analysis(full_result):
    made = secondary.outcomes(full_result)
    assert len(made.rows) == len(full_result.outcomes) == 6 * 3
    row = next(row for row in made.rows if row[:2] == ("NLL", "topk-50"))
    found = next(item for item in full_result.outcomes if (item.outcome, item.arm) == ("nll", "topk-50"))
    assert row[2:6] == ("7", f"{found.mean_arm:.4g}", f"{found.mean_baseline:.4g}", f"{found.difference:+.4f}")
    assert row[7] == f"{found.crossed.low:+.4f} to {found.crossed.high:+.4f}"


def test_rows_that_no_number_of_agreeing_seeds_could_carry_are_told(full_result):
    """Seven seeds: p is 2/128 at best, and 18 times that after Holm."""
    assert "With 7 seeds and 18 rows the adjusted p cannot fall below 0.281" in secondary.outcomes(full_result).caption
    within_reach = dataclasses.replace(full_result, outcomes=full_result.outcomes[:3])
    assert "cannot fall" not in secondary.outcomes(within_reach).caption


def test_cost_is_a_ratio_over_the_seeds_that_both_finished(tmp_path):
    def timing(seconds):
        return Timing(started="", seconds=seconds, train_seconds=seconds, train_examples_per_second=100 / seconds)

    spec = make_spec(seeds=3)
    store = fill(tmp_path, spec, lambda arm, index: None)
    for (arm, index), run in planned(spec).items():
        if (arm, index) != ("dense", 2):
            seconds = 10.0 if arm == "dense" else (15.0, 25.0, 1000.0)[index]
            store.save(*finished(run, EVEN(arm, index), timing=timing(seconds)))
    made = secondary.cost(analyse(store))
    rows = {row[0]: dict(zip(made.header, row, strict=True)) for row in made.rows}
    assert (rows["dense"]["n"], rows["dense"]["ratio"]) == ("2", "1.00")
    assert (rows["topk-50"]["n"], rows["topk-50"]["ratio"]) == ("3", "2.00")
    assert rows["topk-50"]["ratio of examples/s"] == f"{(100 / 15 + 4) / 20:.2f}"


def test_a_time_of_zero_is_no_ratio(tmp_path):
    nothing = Timing(started="", seconds=0.0, train_seconds=0.0, train_examples_per_second=0.0)
    made = secondary.cost(analyse(fill(tmp_path, make_spec(seeds=2), EVEN, timing=nothing)))
    assert {row[4] for row in made.rows} == {"-"}


def test_flipped_texts_are_shown_with_both_arms(full_result, full_pages):
    text = " ".join(" ".join(Page(full_pages[0]).text).split())
    assert full_result.flips
    for flip in full_result.flips[:3]:
        right = f"{100 * flip.baseline_right:.0f}%", f"{100 * flip.arm_right:.0f}%"
        assert f"sentence <b>number</b> {flip.row} {flip.label} {right[0]} {right[1]}" in text
    assert "<b>" not in full_pages[0]
    assert f"sentence &lt;b>number&lt;/b> {full_result.flips[0].row}" in full_pages[1]


def test_the_maps_in_the_page_are_those_of_the_records(full, full_result, full_pages):
    data = json.loads(re.search(r'id="maps-data">(.*?)</script>', full_pages[0]).group(1))
    assert (data["arms"], data["layers"], len(data["examples"])) == (["dense", "topk-50"], 2, len(MAP_ROWS))
    seed = planned_in(full_result.spec)["label_noise=0.4", "topk-50", 0].config.run_id
    kept = full.load_arrays(full.load(seed))["maps"].tobytes()
    found = {tuple(item["tokens"]): base64.b64decode(item["maps"][1]) for item in data["examples"]}
    assert b"".join(found[tokens] for tokens in MAP_TOKENS) == kept
    disputed = [flip.row for flip in full_result.flips]
    first = [int(item["title"].split(":")[0].split()[0]) in disputed for item in data["examples"]]
    assert first == sorted(first, reverse=True)


def test_without_texts_examples_are_numbers(tmp_path):
    store = fill_in_full(tmp_path, make_spec(seeds=1), draws({"dense": 0.2, "topk-50": 0.9}), texts=False)
    text, markdown = write(store)
    for page in ("".join(Page(text).text), markdown):
        assert "The texts are not kept beside these records" in page
    row = analyse(store).flips[0].row
    assert f"example {row}" in markdown
    data = json.loads(re.search(r'id="maps-data">(.*?)</script>', text).group(1))
    assert data["examples"][0]["tokens"] == ["1", "2", "3"] or len(data["examples"][0]["tokens"]) == 4


@pytest.mark.parametrize(
    ("offsets", "seeds"), [((100, 100), ["100", "101", "102"]), ((7, 100), ["7 / 100", "8 / 101", "9 / 102"])]
)
def test_pairs_of_checkpoints_bear_the_seeds_of_their_runs(tmp_path, offsets, seeds):
    sparse, dense = offsets
    arms = [{**ARMS[0], "seed_offset": dense}, {**ARMS[1], "seed_offset": sparse}]
    result = analyse(fill(tmp_path, make_spec(seeds=3, arms=arms), EVEN))
    pairs = disagreements.what_flipped(result, None).tables[-1]
    assert [row[0] for row in pairs.rows] == seeds


def test_text_cannot_end_the_script_that_holds_it(tmp_path):
    store = fill_in_full(tmp_path, make_spec(seeds=1), EVEN)
    evil = f"</script>{SCRIPT}<!-- \u2028"
    tokens = tuple(tuple(evil for _ in own) for own in MAP_TOKENS)
    store.save_examples(Examples((evil,) * EXAMPLES, (evil,) * EXAMPLES, MAP_ROWS, tokens))
    text, _ = write(store)
    assert Page(text).elements.count("script") == text.count("<script") == 2
    data = json.loads(re.search(r'id="maps-data">(.*?)</script>', text).group(1))
    assert data["examples"][0]["text"] == f"{evil} / {evil}"
    assert data["examples"][0]["tokens"][0] == evil


def test_maps_beyond_a_pages_room_are_left_out_and_said(full, full_result, monkeypatch):
    monkeypatch.setattr(disagreements, "_MAPS_BYTES", 2 * 2 * 16 + 1)
    found = disagreements.attention_maps(full_result, full, full.examples())
    assert len(found.examples) < len(MAP_ROWS)
    assert f"on {len(found.examples)} of {len(MAP_ROWS)} examples whose maps were kept" in found.note
