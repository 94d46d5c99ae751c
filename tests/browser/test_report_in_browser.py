"""The report in a real browser: no complaints, working controls, readable by all, on a phone and on paper."""

from __future__ import annotations

import pytest

from crisp_attention.experiment import report
from crisp_attention.experiment.conclusions.analysis import analyse
from record_builders import ARMS, MAP_TOKENS, draws, fill_in_full, make_spec


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    arms = [*ARMS[:2], {"name": "an-arm-whose-name-is-long-and-which-says-everything", "sparsity": 0.8}]
    spec = make_spec(
        arms=arms,
        vary={"label_noise": [0.0, 0.4]},
        evaluations=[{"name": "typos-5", "typos": 0.05}],
        seeds=6,
        description="<script>throw new Error('markup')</script>",
    )
    store = fill_in_full(tmp_path_factory.mktemp("report"), spec, draws({"dense": 0.5, "topk-50": 0.6}))
    return report.write(analyse(store), store.folder)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everyone_can_read_it(page_file, visit, faults, scheme):
    assert faults(visit(page_file, scheme=scheme)) == []


def test_the_judge_of_that_sees_a_fault(tmp_path, visit, faults):
    path = tmp_path / "bad.html"
    path.write_text(
        "<html lang=en><title>x</title><p style='color:#eee;background:#fff'>pale</p></html>", encoding="utf-8"
    )
    assert any("color-contrast" in fault for fault in faults(visit(path)))


def test_a_phone_is_wide_enough(page_file, visit, overflow):
    page = visit(page_file, width=360, touch=True)
    assert overflow(page) <= 0
    inside = page.locator(".table .scroll").first
    assert inside.evaluate("(table) => table.scrollWidth > table.clientWidth")


def test_example_and_layer_can_be_chosen(page_file, visit):
    page = visit(page_file)
    for number in range(len(MAP_TOKENS)):
        page.locator("#maps-example").select_option(str(number))
        shown = tuple(page.locator(".map .keys").first.locator("span").all_text_contents())
        assert shown in MAP_TOKENS
    corner = "document.querySelector('.map canvas').toDataURL()"
    last = page.evaluate(corner)
    page.get_by_role("combobox", name="Layer").select_option("0")
    assert page.evaluate(corner) != last
    page.locator(".map canvas").first.hover(position={"x": 2, "y": 2})
    said = page.locator("#maps-read").text_content()
    assert said.startswith("[CLS] → [CLS]: dense ")
    assert "topk-50 " in said


def test_the_ground_can_be_changed(page_file, visit):
    page = visit(page_file, scheme="dark")
    line = "getComputedStyle(document.querySelector('#contrasts svg text')).fill"
    before = page.evaluate(line)
    page.get_by_role("button", name="Light / dark").click()
    assert page.evaluate(line) != before
    assert page.evaluate("document.documentElement.dataset.theme") == "light"


def test_contents_lead_to_their_sections(page_file, visit):
    page = visit(page_file)
    page.get_by_role("navigation").get_by_role("link", name="What flipped").click()
    assert page.locator("#disagreements").evaluate("(section) => Math.abs(section.getBoundingClientRect().top)") < 60


def test_paper_is_light_and_wide_enough(page_file, visit):
    page = visit(page_file, scheme="dark")
    page.set_viewport_size({"width": 700, "height": 1000})
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('#contrasts svg text')).fill") == "rgb(27, 27, 31)"
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert page.pdf(format="A4").startswith(b"%PDF")
