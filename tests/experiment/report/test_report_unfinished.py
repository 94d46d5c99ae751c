"""Reports of experiments that are not finished, or small."""

from __future__ import annotations

import re

from record_builders import fill, make_spec
from report_pages import EVEN, FIGURES, Page, write


def test_nothing_finished_is_a_report_too(tmp_path):
    store = fill(tmp_path, make_spec(), lambda arm, index: "failed" if index == 0 else None)
    text, markdown = write(store)
    page = Page(text)
    for written in ("".join(page.text), markdown):
        assert "No verdict: no seed has finished both topk-50 and dense." in written
        assert "0 of 8 (1 diverged or failed)" in written
        assert "failed: made to be failed" in written
        assert "21 of 24 runs are not done yet." in written
        assert not re.search(r"\bnan\b", written)
    assert list((tmp_path / "figures").iterdir()) == []


def test_nothing_done_at_all_is_a_report_too(tmp_path):
    text, _ = write(fill(tmp_path, make_spec(), lambda arm, index: None))
    assert "24 of 24 runs are not done yet." in "".join(Page(text).text)


def test_one_seed_is_a_report_too(tmp_path):
    store = fill(tmp_path, make_spec(seeds=1), EVEN)
    for page in write(store):
        assert "No verdict: 1 paired seed is too few." in page
        assert not re.search(r"\bnan\b", page)
        assert "1 of 1" in page
    assert sorted(path.stem for path in (tmp_path / "figures").iterdir()) == FIGURES


def test_without_curves_none_are_drawn(tmp_path):
    write(fill(tmp_path, make_spec(seeds=1, training={"curves": False}), EVEN))
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == set(FIGURES) - {"curves"}


def test_an_arm_without_a_finished_run_is_left_out_of_the_pictures_only(tmp_path):
    store = fill(tmp_path, make_spec(seeds=2), lambda arm, index: "diverged" if arm == "topk-50" else EVEN(arm, index))
    for page in write(store):
        assert "0 of 2 (2 diverged or failed)" in page
        assert not re.search(r"\bnan\b", page)
    accuracy = (tmp_path / "figures" / "accuracy.svg").read_text(encoding="utf-8")
    assert "percentile-80" in accuracy
    assert "topk-50" not in accuracy


def test_many_arms_have_room(tmp_path):
    arms = [{"name": "dense"}, *({"name": f"topk-{number}", "sparsity": number / 100} for number in range(10, 100, 10))]
    store = fill(tmp_path, make_spec(seeds=1, arms=arms), EVEN)
    text, _ = write(store)
    assert all(arm["name"] in text for arm in arms)
