"""What people read: tables, plots, Markdown and one self-contained HTML page. From an `Analysis` and its records."""

from __future__ import annotations

from pathlib import Path

from crisp_attention.experiment.conclusions.analysis import Analysis
from crisp_attention.experiment.report.disagreements import attention_maps, what_flipped
from crisp_attention.experiment.report.pages import Content, render_html, render_markdown
from crisp_attention.experiment.report.sections import closing, findings
from crisp_attention.experiment.results.files import write_atomically
from crisp_attention.experiment.results.store import Store

__all__ = ["write"]


def write(analysis: Analysis, folder: Path) -> Path:
    """Write `report.md`, `report.html` and `figures/*.svg` into a run directory.

    The same records give the same bytes.

    Args:
        analysis: What to report.
        folder: The run directory; evaluation texts and attention maps are shown if it holds them.

    Returns:
        The HTML page.

    Raises:
        RecordError: If the texts or maps are damaged.
    """
    store = Store(folder)
    examples = store.examples()
    content = Content(
        findings(analysis),
        what_flipped(analysis, examples),
        attention_maps(analysis, store, examples),
        closing(analysis),
    )
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    for drawing in content.drawings:
        write_atomically(figures / f"{drawing.name}.svg", drawing.file.encode())
    write_atomically(folder / "report.md", render_markdown(analysis, content).encode())
    page = folder / "report.html"
    write_atomically(page, render_html(analysis, content).encode())
    return page
