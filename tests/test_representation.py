from __future__ import annotations

import re

import pytest

from crisp_attention import representation
from fragments import read, words

EVIL = "<script>alert('a')</script> & \"b\""
LIGHT, DARK = "#ffffff", "#111111"  # what JupyterLab's two themes put behind an output


def luminance(colour):
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_of_any_kind_is_shown_as_it_is():
    fragment = representation.card(
        EVIL,
        representation.paragraph(EVIL),
        representation.bullets([EVIL]),
        representation.table((EVIL, "b"), [(EVIL, "1")], prose=("b",)),
        representation.link(EVIL, f"{EVIL}/report.html"),
        badge=(EVIL, "good"),
    )
    assert words(fragment).count(EVIL) == 7
    assert "<script" not in fragment


def test_a_link_stays_within_the_folder():
    (link,) = read(representation.link("here", "javascript:alert(1)")).links
    assert link == "javascript%3Aalert%281%29"


@pytest.mark.parametrize("colour", representation.TONES.values())
def test_badges_are_readable_in_light_and_dark_notebooks(colour):
    assert contrast("#ffffff", colour) >= 4.5
    assert min(contrast(colour, LIGHT), contrast(colour, DARK)) >= 3


def test_numbers_are_flush_right_and_text_is_not():
    fragment = representation.table(("name", "kind", "share"), [("a", "b", "0.5")], prose=("kind",))
    assert [part.split(";")[0] for part in fragment.split("text-align: ")[1:]] == ["left", "left", "right"] * 2


def test_text_has_the_notebooks_own_colour():
    text = representation.table(("a",), [("b",)]) + representation.card("c", representation.paragraph("d", small=True))
    assert re.findall(r"(?<!-)color: ([^;]*);", text) == ["inherit"]


def test_nothing_to_list_leaves_no_trace():
    assert representation.bullets([]) == ""
