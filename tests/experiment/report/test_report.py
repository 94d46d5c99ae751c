from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes

from crisp_attention.experiment import report
from crisp_attention.experiment.conclusions.analysis import analyse
from crisp_attention.experiment.report import breadth, plots, secondary, tables
from crisp_attention.experiment.report.provenance import spec_as_toml
from crisp_attention.experiment.results.examples import Examples
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.spec import parse, preset, presets
from crisp_attention.experiment.statistics import Interval
from record_builders import (
    ARMS,
    EXAMPLES,
    MAP_ROWS,
    MAP_TOKENS,
    PLACEBO,
    draws,
    fill,
    fill_in_full,
    fill_runs,
    finished,
    make_spec,
    planned,
    provenance,
    troubled,
)
from report_pages import EVEN, FIGURES, SCRIPT, Page, write


def files(folder):
    paths = [folder / "report.md", folder / "report.html", *(folder / "figures").iterdir()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Eight seeds of four arms; some runs diverged, failed or not done."""

    def outcome(arm, index):
        special = {("topk-50", 6): "diverged", ("percentile-80", 1): "failed", ("percentile-80", 7): None}
        special["dense-again", 4] = None
        return special[arm, index] if (arm, index) in special else EVEN(arm, index)

    spec = make_spec(arms=[*ARMS, PLACEBO], description="What this is about.", choices=["the milder sparsity"])
    return fill(tmp_path_factory.mktemp("report"), spec, outcome)


@pytest.fixture(scope="module")
def result(store):
    return analyse(store)


@pytest.fixture(scope="module")
def pages(store):
    return write(store)


# Files


def test_writes_markdown_html_and_figures(store, pages):
    found = files(store.folder)
    assert set(found) == {"report.md", "report.html", *(f"figures/{name}.svg" for name in FIGURES)}
    for name in FIGURES:
        assert ElementTree.fromstring(found[f"figures/{name}.svg"]).tag == "{http://www.w3.org/2000/svg}svg"
    assert not list(store.folder.rglob(".*"))


def test_rebuilding_gives_the_same_bytes(store, pages):
    before = files(store.folder)
    assert len(before) == 2 + len(FIGURES)
    report.write(analyse(Store(store.folder)), store.folder)
    assert files(store.folder) == before


@pytest.mark.slow
def test_another_process_without_torch_gives_the_same_bytes(store, pages):
    before = files(store.folder)
    code = (
        "import sys\n"
        "class Lacking:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'accelerate', 'datasets'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Lacking())\n"
        "from pathlib import Path; from crisp_attention.experiment import report\n"
        "from crisp_attention.experiment.conclusions.analysis import analyse\n"
        "from crisp_attention.experiment.results.store import Store\n"
        "folder = Path(sys.argv[1]); report.write(analyse(Store(folder)), folder)\n"
    )
    for path in before:
        (store.folder / path).unlink()
    environment = os.environ | {"PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code, str(store.folder)], check=True, env=environment)
    assert files(store.folder) == before


# The page stands alone


def test_the_page_is_balanced_and_has_no_script_but_its_own(pages):
    page = Page(pages[0])
    assert page.elements.count("svg") == len(FIGURES)
    assert page.elements.count("script") == 1
    assert not {"link", "iframe", "img", "object", "embed", "base", "form"} & set(page.elements)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.elements.count("h1") == 1
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids)


def test_the_page_forbids_itself_the_network(pages):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', pages[0]).group(1)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def test_the_page_refers_to_nothing_outside_itself(pages):
    text = pages[0]
    page = Page(text)
    for tag, name, value in page.attributes:
        if name.startswith("xmlns") or name == "rdf:resource":  # names of vocabularies, fetched by nobody
            continue
        assert "//" not in value, (tag, name, value)
        if name in ("src", "href", "xlink:href", "data", "srcset", "poster", "action"):
            assert value.startswith("#"), (tag, name, value)
    assert page.declarations == ["doctype html"]  # an SVG file's own would name a document on the web
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)", text))
    assert not re.search(r"https?://", "".join(page.text))


def test_references_within_the_page_lead_somewhere(pages):
    page = Page(pages[0])
    ids = {value for _, name, value in page.attributes if name == "id"}
    wanted = {value[1:] for _, name, value in page.attributes if name in ("href", "xlink:href")}
    wanted |= set(re.findall(r"url\(#([^)]*)\)", pages[0]))
    assert wanted
    assert wanted <= ids


def test_pictures_in_markdown_are_files_that_exist(store, pages):
    names = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", pages[1])
    assert sorted(names) == [f"figures/{name}.svg" for name in FIGURES]
    assert all((store.folder / name).is_file() for name in names)


def test_markup_in_data_is_text(tmp_path):
    evil = f"{SCRIPT}<img src=x onerror=alert(2)> & \"quoted\" 'too'"
    spec = make_spec(seeds=2, description=evil, choices=[evil], model=evil, data={"source": evil})
    origin = provenance(data_notes=(evil,), data=evil, model=evil, packages={evil: evil}, device=evil)
    store = fill(tmp_path, spec, EVEN, classes=(evil, "positive"), provenance=origin)
    run = planned(spec)["topk-50", 1]
    store.save(troubled(run, "failed", reason=evil), None)
    text, _ = write(store)
    page = Page(text)
    assert "img" not in page.elements
    assert text.count("<script") == page.elements.count("script") == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    shown = "".join(page.text)
    # Description, choice, note, reason, provenance: model, data, classes, a package and its version, device.
    assert shown.count("<img src=x onerror=alert(2)>") >= 10


# What it says


def test_both_pages_say_the_same(result, pages):
    page, markdown = pages
    text = " ".join("".join(Page(page).text).split())
    plain = " ".join(markdown.replace("`", "").split())
    sentences = [result.verdict.headline, *result.verdict.details, *result.cautions, result.spec.description]
    sentences += ["Our choice: the milder sparsity.", "2 of 62 rows were dropped.", "named before the run"]
    for made in (tables.arms(result), tables.contrasts(result), tables.runs(result)):
        sentences += [made.caption, *(cell for row in (made.header, *made.rows) for cell in row)]
    for sentence in sentences:
        assert sentence in text, sentence
        assert sentence in plain, sentence


def test_the_verdict_is_in_the_title_and_first(result, pages):
    assert f"<title>made-up: {result.verdict.word}</title>" in pages[0]
    assert pages[1].split("\n")[:3] == ["# made-up", "", f"**{result.verdict.headline}**"]
    for page in pages:
        assert page.index(result.verdict.headline) < page.index("percentile-80")
        assert "no effect" not in page.lower()


def test_every_cell_of_arms_states_its_n_and_counts(result):
    rows = {row[0]: row for row in tables.arms(result).rows}
    right = [int(EVEN("topk-50", index).sum()) for index in (0, 1, 2, 3, 4, 5, 7)]
    arm = dict(zip(tables.arms(result).header, rows["topk-50"], strict=True))
    assert arm["runs"] == "7 of 8 (1 diverged or failed)"
    assert arm["correct"] == f"{np.mean(right):.1f} of {EXAMPLES}"
    shares = 100 * np.array(right) / EXAMPLES
    assert arm["accuracy"] == f"{shares.mean():.2f} ± {shares.std(ddof=1):.2f}"
    assert arm["sparse train"] == "37.5%"
    assert rows["percentile-80"][1] == "6 of 8 (1 diverged or failed)"
    assert rows["dense"][1] == "8 of 8"


def test_every_run_is_listed_with_integer_counts_or_its_trouble(result, pages):
    rows = {(row[0], row[1]): row for row in tables.runs(result).rows}
    assert len(rows) == 4 * 8
    for (arm, seed), row in rows.items():
        index = int(seed) % 1000
        assert seed == str(index + (1000 if arm == "dense-again" else 0))
        if row[2] == "finished":
            assert row[3] == f"{int(EVEN(arm, index).sum())} of {EXAMPLES}"
    assert rows["topk-50", "6"][2:5] == ("diverged: made to be diverged", "-", "-")
    assert rows["percentile-80", "1"][2:5] == ("failed: made to be failed", "-", "-")
    assert rows["percentile-80", "7"][2:] == ("not done", "-", "-", "-", "-", "-")
    assert rows["dense-again", "1004"][2] == "not done"


def test_the_primary_contrast_is_marked_and_only_the_others_are_adjusted(result):
    made = tables.contrasts(result)
    rows = [dict(zip(made.header, row, strict=True)) for row in made.rows]
    assert [row["contrast"] for row in rows] == ["topk-50 (primary)", "percentile-80", "dense-again"]
    assert [row["seeds"] for row in rows] == ["7", "6", "7"]
    assert [row["p Holm"] == "-" for row in rows] == [True, False, False]
    assert all(row["examples"].endswith(f" of {EXAMPLES}") for row in rows)


def test_the_terminals_summary_has_a_row_an_arm(result):
    made = tables.summary(result)
    rows = {row[0]: dict(zip(made.header, row, strict=True)) for row in made.rows}
    assert list(rows) == ["dense", "topk-50", "percentile-80", "dense-again"]
    assert rows["dense"]["diff"] == "-"
    assert rows["topk-50"]["diff"] == f"{result.primary.difference:+.2f}"
    assert rows["topk-50"]["runs"] == "7/8"
    assert rows["percentile-80"]["sparse"] == "60.0%"
    assert rows["dense"]["sparse"] == "0.0%"


@pytest.mark.parametrize("seeds", [5, 6])
def test_figures_that_few_seeds_cannot_carry_are_left_out(tmp_path, seeds):
    spec = make_spec(arms=ARMS, vary={"label_noise": [0.0, 0.4]}, seeds=seeds)
    found = analyse(fill_in_full(tmp_path, spec, draws({"dense": 0.5, "topk-50": 0.6})))
    contrast = dict(zip(tables.contrasts(found).header, tables.contrasts(found).rows[0], strict=True))
    shown = [contrast[name] for name in ("95% interval", "on these examples", "TOST p", "detectable")]
    shown += [row[6] for row in secondary.outcomes(found).rows]
    shown += [row[4] for row in breadth.condition_tables(found)[2].rows]
    shown += [tables.summary(found).rows[1][5]]
    assert {cell == tables.MISSING for cell in shown} == {seeds < 6}
    assert {"interval" in row[2] for row in secondary.pattern(found).rows[2:] if "points" in row[2]} <= {seeds >= 6}
    assert tables.MISSING not in (contrast["p"], contrast["P(better)"])


def test_arms_that_differ_by_more_than_sparsity_share_no_line(tmp_path):
    """A line between a percentile that counts padding and one that does not would say that sparsity made the gap."""
    naive = {"name": "naive-50", "sparsity": 0.5, "rule": "percentile", "count_padding": True, "padding": "max_length"}
    store = fill(tmp_path, make_spec(seeds=1, arms=[*ARMS, naive]), EVEN)
    write(store)
    picture = (tmp_path / "figures" / "by-sparsity.svg").read_text(encoding="utf-8")
    assert {"topk", "percentile-80", "naive-50"} <= set(re.findall(r">([\w-]+)</text>", picture))
    assert ">percentile</text>" not in picture


def test_the_line_to_compare_with_is_the_baseline_alone(tmp_path, monkeypatch):
    """Another dense arm, of another dropout, is no baseline."""
    drawn, original = [], Axes.axhline

    def watched(axes, y, **settings):
        drawn.append((settings.get("label"), y))
        return original(axes, y, **settings)

    monkeypatch.setattr(Axes, "axhline", watched)
    other = {"name": "dropout", "training": {"attention_dropout": 0.3}}
    outcome = draws({"dense": 0.8, "topk-50": 0.85, "percentile-80": 0.5, "dropout": 0.3})
    found = analyse(fill(tmp_path, make_spec(seeds=2, arms=[*ARMS, other]), outcome))
    plots.by_sparsity(found)
    assert drawn == [("dense (mean)", pytest.approx(found.arm("dense").accuracies.mean()))]


def test_provenance_lists_whatever_differs_between_runs(tmp_path):
    spec = make_spec(seeds=2)
    other = provenance(packages={"crisp-attention": "0.1", "torch": "9.9"}, git={"commit": "f" * 40, "dirty": True})
    fill(tmp_path, spec, lambda arm, index: EVEN(arm, index) if index == 0 else None)
    store = fill(tmp_path, spec, lambda arm, index: EVEN(arm, index) if index == 1 else None, provenance=other)
    for page in write(store):
        assert "2.8.0; 9.9" in page
        assert "0123456789ab; ffffffffffff (modified)" in page
        assert "1,234 trained parameters" in page
        assert "negative, positive" in page


def test_pipes_and_line_breaks_do_not_break_a_markdown_table(tmp_path):
    spec = make_spec(seeds=1)
    store = fill(tmp_path, spec, EVEN)
    run = planned(spec)["topk-50", 0]
    failed = troubled(run, "failed", reason="one | two\nthree")
    store.save(failed, None, before=store.load(run.config.run_id))
    _, markdown = write(store)
    line = next(line for line in markdown.splitlines() if "failed: one" in line)
    assert len(re.findall(r"(?<!\\)\|", line)) == 9
    assert "two three" in line


def test_text_in_a_markdown_table_is_no_markup(tmp_path):
    store = fill_in_full(tmp_path, make_spec(seeds=1), draws({"dense": 0.0, "topk-50": 1.0}))
    text = "a *very* [good](x) `film` \\ <b>bold</b> <3\nfour | five"
    store.save_examples(Examples((text,) * EXAMPLES, (), MAP_ROWS, MAP_TOKENS))
    _, markdown = write(store)
    assert r"| a \*very\* \[good\](x) \`film\` \\ &lt;b>bold&lt;/b> <3 four \| five |" in markdown


def test_images_are_shown_by_number(tmp_path):
    store = fill_in_full(tmp_path, make_spec(seeds=1), draws({"dense": 0.0, "topk-50": 1.0}), texts=False)
    store.save_examples(Examples((), (), (), ()))
    _, markdown = write(store)
    assert "The examples are no texts, so that they are shown by number." in markdown
    assert re.search(r"\| example \d+ \|", markdown)


def test_every_markdown_table_is_one(pages):
    lines = pages[1].splitlines()
    heads = [number for number, line in enumerate(lines) if re.match(r"\| -+ \|", line)]
    assert len(heads) == 8  # contrasts, arms, regularizer, outcomes, disagreements, checkpoints, cost, runs
    for head in heads:
        columns = lines[head].count("|")
        assert lines[head - 2] == ""
        body = lines[head - 1 : head - 1 + next(n for n, line in enumerate(lines[head:]) if not line) + 1]
        assert {line.count("|") for line in body} == {columns}
        # Columns stand below each other, but where a cell is long.
        assert {len(line) for line in body} == {len(lines[head])} or max(map(len, lines[head].split("|"))) > 80
        assert len(body) > 3


# The specification in the report


def test_the_specification_in_the_report_asks_for_the_same_experiment(result, pages):
    text = re.search(r"```toml\n(.*?)^```$", pages[1], re.DOTALL | re.MULTILINE).group(1)
    spec = result.spec
    assert parse(tomllib.loads(text), "report") == spec
    assert tomllib.loads(text)["arms"] == [
        {"name": "dense"},
        {"name": "topk-50", "sparsity": 0.5},
        {"name": "percentile-80", "sparsity": 0.8, "rule": "percentile"},
        {"name": "dense-again", "seed_offset": 1000},
    ]


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_reads_back_from_its_toml(name):
    assert parse(tomllib.loads(spec_as_toml(preset(name))), "toml") == preset(name)


@settings(max_examples=30)
@given(
    description=st.text(st.characters(exclude_categories=["Cs"])),
    choices=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=2),
    rate=st.floats(1e-12, 1e3),
    examples=st.none() | st.integers(1, 10**9),
    padding=st.sampled_from([None, "longest", "max_length"]),
)
def test_any_specification_reads_back_from_its_toml(description, choices, rate, examples, padding):
    arms = [{"name": "dense", "padding": padding}, *ARMS[1:]]
    spec = make_spec(
        description=description,
        choices=choices,
        training={"learning_rate": rate},
        data={"source": "a\\b.csv", "train_examples": examples},
        arms=arms,
    )
    assert parse(tomllib.loads(spec_as_toml(spec)), "toml") == spec


def test_notes_on_the_data_are_of_all_conditions(tmp_path):
    """Which labels were made wrong is known where they were; what was dropped is told once."""
    spec = make_spec(arms=ARMS, vary={"label_noise": [0.0, 0.4]}, seeds=1)
    more = {"label_noise=0.4": ("200 of 500 training labels were replaced.",)}

    def result(run):
        notes = ("2 rows were dropped.", *more.get(run.condition, ()))
        return finished(run, draws({})(run.arm, run.index), provenance=provenance(data_notes=notes))

    store = fill_runs(tmp_path, spec, result)
    report.write(analyse(store), tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.count("2 rows were dropped.") == 1
    assert text.count("label_noise=0.4: 200 of 500 training labels were replaced.") == 1


def test_lines_join_seeds_and_a_placebo_shares_none(tmp_path, monkeypatch):
    spec = make_spec(arms=[*ARMS, PLACEBO], seeds=2)
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *args, **more: drawn.append(args) or plot(self, *args, **more))
    plots.accuracy(analyse(fill(tmp_path, spec, EVEN)))
    assert [places for _, places in (args for args in drawn if len(args) == 2 and len(args[0]) == 3)] == [[0, 1, 2]] * 2


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [(-1.0, -0.001, "-1.00 to -0.00"), (-0.004, 0.0, "-0.00 to +0.00"), (-0.0, 2.0, "+0.00 to +2.00")],
)
def test_an_interval_that_ends_next_to_nothing_says_on_which_side(low, high, told):
    assert tables.interval(Interval(low, high)) == told
