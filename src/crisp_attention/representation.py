"""How objects show themselves in notebooks: fragments of HTML that need no style sheet, script or network.

Notebooks are light or dark, and a fragment is not told which. Text therefore has the notebook's own colour, and lines
and marks are of a middle lightness that stands out from both. All text is escaped.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape
from typing import Literal
from urllib.parse import quote

Tone = Literal["good", "bad", "same", "open"]

TONES: dict[Tone, str] = {"good": "#1a7f37", "bad": "#cf222e", "same": "#0969da", "open": "#9a6700"}
"""Grounds of badges. White letters stand out from each by 4.5 to 1, and each from white and near-black by 3 to 1."""

_LINE = "rgba(128, 128, 128, 0.4)"
_CARD = f"border: 1px solid {_LINE}; border-radius: 6px; padding: 8px 14px; margin: 4px 0; max-width: 72em;"
_BADGE = "color: #fff; border-radius: 4px; padding: 1px 8px; font-weight: 600; white-space: nowrap;"
# A page without a doctype gives tables a colour of their own.
_TABLE = "border-collapse: collapse; margin: 6px 0; color: inherit; font-size: inherit;"
_CELL = f"padding: 2px 12px 2px 0; border: 0; border-bottom: 1px solid {_LINE}; vertical-align: top;"


def card(heading: str, *parts: str, badge: tuple[str, Tone] | None = None) -> str:
    """A framed block.

    Args:
        heading: Its first line, plain text.
        parts: What stands below, HTML as the other functions here return it.
        badge: A word before the heading, and what colour it has.
    """
    mark = ""
    if badge is not None:
        word, tone = badge
        mark = f'<span style="{_BADGE} background: {TONES[tone]};">{escape(word)}</span> '
    return f'<div style="{_CARD}"><div>{mark}<strong>{escape(heading)}</strong></div>{"".join(parts)}</div>'


def paragraph(text: str, *, small: bool = False) -> str:
    """A paragraph of plain text; a small one for what stands beside the matter."""
    return f'<p style="margin: 6px 0;{" font-size: 0.9em; opacity: 0.8;" * small}">{escape(text)}</p>'


def bullets(sentences: Sequence[str]) -> str:
    """A list of plain sentences; nothing where there are none."""
    if not sentences:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<ul style="margin: 6px 0; padding-left: 1.4em;">{items}</ul>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], prose: Collection[str] = ()) -> str:
    """A table of plain text, which scrolls by itself where the notebook is narrower.

    Args:
        header: Names of the columns; the first names the rows.
        rows: Cells, as many in each row.
        prose: Names of further columns that hold text; all others are numbers, flush right.
    """
    sides = ["left" if not number or name in prose else "right" for number, name in enumerate(header)]

    def cells(kind: str, texts: Sequence[str]) -> str:
        return "".join(
            f'<{kind} style="{_CELL} text-align: {side};">{escape(text)}</{kind}>'
            for side, text in zip(sides, texts, strict=True)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div style="overflow-x: auto;"><table style="{_TABLE}">'
        f"<thead><tr>{cells('th', header)}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def link(text: str, path: str) -> str:
    """A paragraph whose plain text leads to a file.

    Args:
        text: What is clicked.
        path: Relative to the notebook, with "/" between its parts.
    """
    return f'<p style="margin: 6px 0;"><a href="{escape(quote(path))}" target="_blank">{escape(text)}</a></p>'


def meter(text: str, value: float, most: float) -> str:
    """A bar that is full where the value is the most that it can be, with plain text beside it."""
    bar = f'<progress value="{value:g}" max="{max(most, 1):g}" style="width: 16em; vertical-align: middle;"></progress>'
    return f'<div style="margin: 4px 0;">{bar} {escape(text)}</div>'
