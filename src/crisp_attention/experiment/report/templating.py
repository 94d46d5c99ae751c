"""Where templates are found and what they may call."""

from __future__ import annotations

import json
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from crisp_attention.experiment.report.theme import page_css


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
    found.filters["cell"] = _markdown_cell
    found.filters["trusted"] = Markup
    found.filters["json_for_script"] = _json_for_script
    return found


def _markdown_cell(text: str) -> str:
    """Text as one cell of a Markdown table: no new column or row, no markup of its own."""
    text = re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(text.splitlines()))
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)


def _json_for_script(content: Any) -> Markup:
    # Within a script element only "</script" and "<!--" mean anything; no "<" is left to begin them.
    return Markup(json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))
