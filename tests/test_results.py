"""What is published rebuilds from what is committed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from crisp_attention.experiment import study
from crisp_attention.experiment.specification.spec import read
from site_modules import site_module

ROOT = Path(__file__).parent.parent
QUICK = ROOT / "results" / "quick"
PUBLISHED = sorted(path.parent for path in (ROOT / "results").glob("*/study.json"))
STUDIES = sorted((ROOT / "studies").glob("*.toml"))
THE_PAPERS = {"+0.97"}

findings, evidence, published = map(site_module, ("findings", "evidence", "published"))


def test_the_quick_study_rebuilds_from_its_records(tmp_path):
    folder = tmp_path / "quick"
    shutil.copytree(QUICK, folder)
    (folder / "report.md").unlink()
    study.rebuild(folder)
    assert (folder / "report.md").read_text(encoding="utf-8") == (QUICK / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", findings.PAGES, ids=lambda page: page.stem)
def test_pages_say_what_the_records_say(page):
    text = page.read_text(encoding="utf-8")
    assert "<!-- from the records: " in text
    assert findings.write(text) == text, "run: python docs/site/findings.py"


@pytest.mark.parametrize("page", findings.PAGES, ids=lambda page: page.stem)
def test_what_is_told_of_a_study_stands_in_its_report(page):
    """Differences in running text, of which a slip of the pen would go unnoticed."""
    told = re.findall(r"[+-]\d+\.\d+(?! *%)", findings.prose(page.read_text(encoding="utf-8")))
    reports = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "results").glob("*/report.md"))
    assert [figure for figure in told if figure not in reports and figure not in THE_PAPERS] == []


def test_every_published_study_is_told_of():
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    for folder in PUBLISHED:
        assert f"<!-- from the records: contrasts {folder.name} -->" in page
        assert f"results/{folder.name}/report.html" in page


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_what_is_published_is_what_was_specified(path):
    spec = read(path)
    assert spec.name == path.stem
    published = ROOT / "results" / spec.name
    if published.exists():
        asked, _, seeds = study.Store(published).study()
        assert asked == spec
        assert seeds == [spec.seeds]


def test_a_reader_finds_the_same_contrast_without_us(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "results" / "README.md").read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(ROOT)
    found: dict = {}
    exec(code, found)
    contrast = published.analysis_of("sst2-claim").primary
    np.testing.assert_allclose(found["difference"], contrast.differences)
    assert found["p_value"] == contrast.p_value


def test_the_readme_shows_what_the_records_say():
    """By the plotting library of the constraints, as pictures differ between its versions."""
    assert f"]({evidence.FILE.relative_to(ROOT).as_posix()})" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert evidence.FILE.read_text(encoding="utf-8") == evidence.picture().file, "run: python docs/site/findings.py"


def test_all_comparisons_together_are_those_of_equals():
    """Those with the baseline are the report's; controls, searches, unfinished studies, unlike settings are not in."""
    found = evidence.comparisons()
    by_study = {}
    for item in found:
        by_study.setdefault(item.study, []).append(item)
        analysis = published.analysis_of(item.study)
        assert item.contrast.seeds == analysis.spec.seeds
        if item.contrast.baseline == analysis.spec.primary.baseline:
            assert item.contrast in analysis.condition_contrasts[item.condition]
    arms = {name: [item.contrast.arm for item in own] for name, own in by_study.items()}
    assert "recipes-explore" not in arms  # a search
    assert "quick" not in arms  # three seeds
    # The search gave the first recipe another learning rate than dense, and the second the same.
    assert set(arms["confirm-movie"]) == {"dense-other-seeds", "topk-80-stochastic"}
    assert "confirm-tweets" not in arms
    # Beside the dense arm that has the same settings.
    (other,) = [it.contrast for it in found if it.contrast.arm == "topk-70-first-half-dense-settings"]
    assert other.baseline == "dense-own-settings"
    assert not {"random-80", "naive-80", "attention-dropout-30"} & set(arms["sst2-claim"])
    assert {"dense-to-percentile-80", "percentile-80-to-dense"} <= set(arms["sst2-claim"])
    assert len({(item.study, item.condition, item.contrast.arm) for item in found}) == len(found)


def test_runs_that_two_studies_share_count_once():
    """Label noise of 0 is a study of sizes at 500 examples."""
    shared = {("sizes-trec", "train_examples=500"), ("noise-trec", "label_noise=0")}
    found = [item.contrast.arm for item in evidence.comparisons() if (item.study, item.condition) in shared]
    assert sorted(found) == ["dense-other-seeds", "topk-50", "topk-80"]


def test_the_table_of_all_comparisons_counts_each_once():
    *rows, unlike = [line[2:-2].split(" | ") for line in evidence.evidence().splitlines()[2:]]
    assert sum(int(row[1]) for row in rows) == len(evidence.comparisons())
    for row in (*rows, unlike):
        assert int(row[1]) == sum(map(int, row[2:5])) >= sum(map(int, row[5:7]))
        assert float(row[9]) <= float(row[8]) <= float(row[10])
    above = [item for item in evidence.comparisons() if item.contrast.interval.low > 0]
    assert sum(int(row[2]) for row in rows) == len(above)
    # What the settings of study C's search made of the two recipes.
    assert unlike[0] == "settings differ"
    assert {(item.study, item.contrast.arm) for item in evidence.unlike()} == {
        ("confirm-movie", "topk-70-first-half"),
        *(
            (name, arm)
            for name in ("confirm-trec", "confirm-tweets")
            for arm in ("topk-70-first-half", "topk-80-stochastic")
        ),
    }


def test_over_data_sets_each_weighs_alike():
    """A study alone gives its own difference and p; counted twice, the same difference with less doubt."""
    found = published.analysis_of("sst2-claim").primary

    def row(*names):
        (line,) = re.findall(rf"^\| {found.arm} \| (.*) \|$", findings.overall(*names), re.MULTILINE)
        seeds, difference, interval, p_value, _, over_studies, _ = line.split(" | ")
        low, high = map(float, interval.split(" to "))
        return seeds, difference, high - low, p_value, over_studies

    once, twice = row("sst2-claim"), row("sst2-claim", "sst2-claim")
    difference = f"{found.difference:+.2f}"
    assert once[:2] == (str(found.seeds), difference)
    assert once[3] == f"{found.p_value:.3f}"
    assert twice[:2] == (str(2 * found.seeds), difference)
    assert 0 < twice[2] < once[2]
    assert twice[3] != once[3]
    assert (once[4], twice[4]) == ("-", f"{difference} to {difference}")


def test_a_slope_over_data_sets_is_that_of_the_report_where_there_is_one():
    analysis = published.analysis_of("sizes-trec")
    rows = [line[2:-2].split(" | ") for line in findings.overall_trend("sizes-trec").splitlines()]
    assert rows[0][2] == f"slope, points per {analysis.interactions[0].unit}"
    told = {row[0]: row[1:3] + row[4:5] for row in rows[2:]}
    for item in analysis.interactions:
        assert told[item.arm] == [str(item.seeds), f"{item.slope:+.2f}", f"{item.p_value:.3f}"]


def test_wrong_labels_are_told_from_true_ones():
    """By the examples of the probe in the condition without noise, of which 40% or so are labelled wrongly."""
    table, sentence = findings.wrong_labels("noise-trec").split("\n\n")
    wrong = int(re.search(r"(\d+) are labelled wrongly", sentence)[1])
    assert 30 <= wrong <= 50
    analysis = published.analysis_of("noise-trec")
    for line in table.splitlines()[2:]:
        name, seeds, labelled, _, _, true, *_ = line[2:-2].split(" | ")
        arm = analysis.arm(name)
        assert int(seeds) == len(arm.records)
        assert float(labelled) + float(true) <= 100
        # Whoever gets so many labels right gets at least these of the wrong ones.
        assert (
            arm.train_accuracies.mean() - (100 - wrong) <= float(labelled) * wrong / 100 <= arm.train_accuracies.mean()
        )


def test_over_data_sets_the_placebo_is_no_claim_to_adjust_for():
    rows = {
        row[0]: row[1:] for row in (line[2:-2].split(" | ") for line in findings.overall("sst2-claim").splitlines()[2:])
    }
    holm, plain = 4, 3
    assert rows["dense-other-seeds"][holm] == rows["dense-other-seeds"][-1] == "-"
    assert float(rows["random-80"][holm]) == pytest.approx(12 * float(rows["random-80"][plain]), abs=0.01)
    # In the baseline's place, whose contrasts are those of the report.
    arms = {arm.name: arm.accuracies.mean() for arm in published.analysis_of("sst2-claim").arms}
    assert rows["random-80"][-1].startswith(f"{arms['random-80'] - arms['dense-other-seeds']:+.2f} (")


def test_one_arm_against_another_is_what_the_report_has_where_it_has_it():
    found = published.analysis_of("sst2-claim").primary
    line = findings.against("sst2-claim", found.arm, found.baseline)
    assert f"{found.difference:+.2f} points over {found.seeds} seeds" in line
    assert f"p = {found.p_value:.3f}." in line
