"""The attention page in a real browser: its script agrees with the operator, its controls work, all can read it."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch

import crisp_attention as crisp
from crisp_attention.experiment.report.attention import InspectedLayer, Inspection, Level, render_attention

TOKENS = ("[CLS]", "<script>throw 1</script>", "film", "&amp;", "[SEP]")
SIZE = len(TOKENS)


def inspection(**changes) -> Inspection:
    random = np.random.default_rng(0)
    layers = tuple(
        InspectedLayer(f"layer.{number}", random.normal(size=(3, SIZE, SIZE)).astype(np.float32)) for number in (0, 1)
    )
    values = {
        "model": "made-up",
        "text": "<img src=x onerror=alert(1)> film",
        "tokens": TOKENS,
        "cut": 0,
        "rule": "topk",
        "settings": {"min_keep": 1},
        "layers": layers,
        "levels": (),
        "start": 0.4,
    }
    return Inspection(**(values | changes))


@pytest.fixture
def page_of(tmp_path, visit):
    def opened(found: Inspection, **options):
        path = tmp_path / "attention.html"
        path.write_text(render_attention(found), encoding="utf-8")
        return visit(path, **options)

    return opened


def cases():
    """Scores with and without ties, with and without invalid pairs."""
    random = np.random.default_rng(1)
    for number in range(160):
        queries = int(random.integers(1, 9))
        scores = random.normal(size=(queries, queries)).astype(np.float32)
        if number % 2:
            scores = np.round(scores)
        valid = random.random(scores.shape) < (0.6 if number % 3 == 0 else 2)
        np.fill_diagonal(valid, True)
        yield {
            "scores": np.where(valid, scores, -np.inf).astype(np.float32),
            "rule": ("topk", "percentile")[number // 2 % 2],
            "sparsity": float(random.choice([0.0, 0.07, 0.25, 0.5, 0.66, 0.8, 0.95, 0.99])),
            "min_keep": int(random.integers(1, 4)),
        }


def by_operator(case):
    scores = torch.from_numpy(case["scores"])
    valid = ~scores.isinf()
    one = torch.eye(len(scores))[None, None]
    out = crisp.attention(
        scores.masked_fill(~valid, 0.0)[None, None],
        one,
        one,
        scale=1.0,
        valid=valid[None, None],
        return_details=True,
        **{name: case[name] for name in ("rule", "sparsity", "min_keep")},
    )
    return out.keep[0, 0].flatten().int().tolist(), out.probabilities[0, 0].flatten().tolist()


@pytest.mark.filterwarnings("ignore:sparsity=.* of a single key")
def test_the_script_removes_exactly_what_the_operator_removes(page_of):
    made = list(cases())
    sent = [
        case | {"scores": base64.b64encode(case["scores"].tobytes()).decode(), "size": len(case["scores"])}
        for case in made
    ]
    answers = page_of(inspection()).evaluate(
        """cases => cases.map((item) => {
            const scores = new Float32Array(attention.bytes(item.scores).buffer);
            const keep = attention.survivors(scores, item.size, item.size, item.rule, item.sparsity, item.min_keep);
            return [Array.from(keep), Array.from(attention.weights(scores, item.size, item.size, keep))];
        })""",
        sent,
    )
    removed = 0
    for case, (keep, weights) in zip(made, answers, strict=True):
        expected, probabilities = by_operator(case)
        assert keep == expected, case
        assert weights == pytest.approx(probabilities, abs=1e-6)
        removed += len(keep) - sum(keep)
    assert removed > 1000


def test_the_slider_shows_what_each_sparsity_removes(page_of):
    page = page_of(inspection())
    assert page.locator("#requested").text_content() == "40%"
    assert page.locator("#realised").text_content() == "realised: 40.0% of all pairs removed"
    assert page.locator("[data-looks=sparse] s").count() == 2
    page.locator("#slider").fill("80")
    assert page.locator("#requested").text_content() == "80%"
    assert page.locator("#realised").text_content() == "realised: 80.0% of all pairs removed"
    assert page.locator("[data-looks=sparse] s").count() == 4
    assert page.locator("[data-looks=dense] s").count() == 0
    page.locator("#slider").focus()
    page.keyboard.press("Home")
    assert page.locator("#realised").text_content() == "realised: 0.0% of all pairs removed"


def test_a_head_and_a_token_can_be_chosen(page_of):
    page = page_of(inspection())
    page.get_by_role("button", name="Layer 2, head 3").click()
    assert page.locator("#chosen").text_content() == "Layer 2, head 3"
    assert page.locator("#head-realised").text_content() == "layer.1: 40.0% of this head's pairs removed"
    assert page.locator("#overview [aria-pressed=true]").count() == 1
    page.get_by_role("group", name="Token that looks").get_by_role("button", name="film").click()
    scores = inspection().layers[1].scores[2, 2].astype(np.float64)
    expected = np.exp(scores) / np.exp(scores).sum()
    shown = page.locator("[data-looks=dense] small").all_text_contents()
    assert [float(text) for text in shown] == pytest.approx(expected.tolist(), abs=0.0051)
    page.locator(".map[data-side=sparse] canvas").hover(position={"x": 3, "y": 3})
    assert page.locator("#read").text_content().startswith("[CLS] → [CLS]: dense 0.")


def test_another_rule_comes_with_its_own_masks(page_of):
    keep = np.zeros((3, SIZE, SIZE), dtype=bool)
    keep[:, :, :2] = True
    weights = keep / 2
    levels = (
        Level("p = 0.9", (~keep, ~keep), None),
        Level("p = 0.5", (keep, keep), (weights, weights)),
    )
    page = page_of(inspection(rule="top_p", levels=levels, start=1.0))
    assert page.locator("#requested").text_content() == "p = 0.5"
    assert page.locator("#realised").text_content() == "realised: 60.0% of all pairs removed"
    assert page.locator("[data-looks=sparse] small").all_text_contents() == ["0.50", "0.50"]
    page.locator("#slider").fill("0")
    assert page.locator("#requested").text_content() == "p = 0.9"
    assert page.locator("#realised").text_content() == "realised: 40.0% of all pairs removed"
    assert page.locator("[data-looks=sparse] s").all_text_contents() == list(TOKENS[:2])


def test_text_is_never_markup(page_of):
    page = page_of(inspection())
    assert page.locator("img").count() == 0
    assert page.locator("#choose button").nth(1).text_content() == TOKENS[1]
    assert page.locator(".quote").text_content() == "<img src=x onerror=alert(1)> film"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everyone_can_read_it(page_of, faults, scheme):
    page = page_of(inspection(), scheme=scheme)
    assert faults(page) == []


def test_a_phone_is_wide_enough(page_of, overflow):
    assert overflow(page_of(inspection(), width=360, touch=True)) <= 0


def test_the_ground_can_be_changed_and_paper_is_light(page_of):
    page = page_of(inspection())
    ground = "getComputedStyle(document.body).backgroundColor"
    corner = "document.querySelector('.map canvas').toDataURL()"
    before = page.evaluate(ground), page.evaluate(corner)
    page.get_by_role("button", name="Light / dark").click()
    after = page.evaluate(ground), page.evaluate(corner)
    assert before[0] != after[0]
    assert before[1] != after[1]
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    assert page.evaluate(corner) == before[1]
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert (page.evaluate(ground), page.evaluate(corner)) == after
