"""Where templates are found and what they may call."""

from __future__ import annotations

import json
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from crisp_attention.experiment.report.tables import Table
from crisp_attention.experiment.report.theme import page_css

_WIDEST = 80
"""Characters after which a cell of a Markdown table only lengthens its own row."""


def environment(*, autoescape: bool) -> Environment:
    """The templates of this package.

    Args:
        autoescape: Whether text from data becomes harmless HTML, as in pages; not so in Markdown.
    """
    found = Environment(
        loader=PackageLoader("crisp_attention.experiment.report"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.globals["theme"] = page_css()
    found.filters["markdown_table"] = _markdown_table
    found.filters["trusted"] = Markup
    found.filters["json_for_script"] = _json_for_script
    return found


def _markdown_table(content: Table) -> str:
    """A table whose columns stand below each other in plain text too; numbers are flush right."""
    rows = [[_markdown_cell(cell) for cell in row] for row in (content.header, *content.rows)]
    widths = [min(max(3, *map(len, column)), _WIDEST) for column in zip(*rows, strict=True)]
    prose = [number == 0 or name in content.prose for number, name in enumerate(content.header)]
    rows.insert(
        1, ["-" * width if text else "-" * (width - 1) + ":" for width, text in zip(widths, prose, strict=True)]
    )
    lines = (
        [cell.ljust(width) if text else cell.rjust(width) for cell, width, text in zip(row, widths, prose, strict=True)]
        for row in rows
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(text: str) -> str:
    """Text as one cell of a Markdown table: no new column or row, no markup of its own."""
    text = re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(text.splitlines()))
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)


def _json_for_script(content: Any) -> Markup:
    # Within a script element only "</script" and "<!--" mean anything; no "<" is left to begin them.
    return Markup(json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))
